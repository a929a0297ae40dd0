"""``python -m tests.chaos``: chaos for as long as is wanted, replayable from its seed."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tests import netns
from tests.chaos.events import CutHost, Shape
from tests.chaos.plan import make_plan
from tests.chaos.run import run_chaos


def chaos(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 60.0,
    seed: Annotated[int | None, typer.Option(help="Of plan and load; random if absent.")] = None,
    workers: Annotated[int, typer.Option(min=1)] = 20,
    gateways: Annotated[int, typer.Option(min=1)] = 2,
    experts_per_worker: Annotated[int, typer.Option(min=1)] = 1,
    hosts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Network namespaces for the workers, whose links are cut.",
            show_default="two thirds of the time none, then 2",
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second.")] = 3.0,
    log_dir: Annotated[Path | None, typer.Option(help="Where processes log.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object a part.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only print the plan.")] = False,
) -> None:
    """Break a real mesh in every way that it must survive, under load, and watch."""
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    one_host = Shape(workers, gateways, experts_per_worker)
    # Each host has to be able to do without the other: two experts of a layer on a worker.
    several = Shape(workers, gateways, max(experts_per_worker, 2), hosts=hosts or 2)
    parts = [(one_host, minutes)] if hosts == 0 else [(several, minutes)]
    if hosts is None:
        parts = [(one_host, minutes * 2 / 3), (several, minutes / 3)]
    if hosts != 0 and (reason := netns.why_not()):
        if hosts is not None:
            raise typer.Exit(_complain(reason))
        print(f"left out: {CutHost.kind}: {reason}", file=sys.stderr)
        parts = [(one_host, minutes)]
    for shape, part_minutes in parts:
        duration_s = part_minutes * 60
        events = make_plan(seed, duration_s, shape)
        print(f"seed {seed}, {shape}: {len(events)} events", file=sys.stderr)
        if dry_run:
            print(*events, sep="\n")
            continue
        part_log_dir = log_dir and log_dir / f"hosts-{shape.hosts}"
        outcome = asyncio.run(
            run_chaos(
                seed, duration_s, shape, events, rate=rate, say=_Clock().say, log_dir=part_log_dir
            )
        )
        print(outcome.as_json() if as_json else outcome, flush=True)
        for violation in outcome.violations:
            print(f"VIOLATION: {violation}", file=sys.stderr)
        if outcome.violations:
            raise typer.Exit(_complain(f"seed {seed} breaks it; logs: {outcome.log_dir}"))


class _Clock:
    """Says things, each with the time since it was made."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began_s:7.1f}] {line}", file=sys.stderr, flush=True)


def _complain(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(chaos)
    app()
