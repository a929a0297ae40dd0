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
from tests.chaos.events import Shape
from tests.chaos.plan import make_plan
from tests.chaos.run import run_chaos


def chaos(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 60.0,
    seed: Annotated[
        int | None, typer.Option(help="Of plan and load; a random one if absent.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1)] = 20,
    gateways: Annotated[int, typer.Option(min=1)] = 2,
    experts_per_worker: Annotated[int, typer.Option(min=1)] = 1,
    hosts: Annotated[
        int, typer.Option(min=0, help="Network namespaces for the workers, whose links are cut.")
    ] = 0,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second.")] = 2.0,
    log_dir: Annotated[Path | None, typer.Option(help="Where processes log.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object at the end.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only print the plan.")] = False,
) -> None:
    """Break a real mesh in every way that it must survive, under load, and watch."""
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    if hosts and (reason := netns.why_not()):
        raise typer.Exit(_complain(reason))
    shape = Shape(workers, gateways, experts_per_worker, hosts=hosts)
    duration_s = minutes * 60
    events = make_plan(seed, duration_s, shape)
    print(f"seed {seed}: {len(events)} events in {duration_s:.0f} s", file=sys.stderr)
    if dry_run:
        print(*events, sep="\n")
        return
    began_s = time.monotonic()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        print(f"[{time.monotonic() - began_s:7.1f}] {line}", file=sys.stderr, flush=True)

    outcome = asyncio.run(
        run_chaos(seed, duration_s, shape, events, rate=rate, say=say, log_dir=log_dir)
    )
    if as_json:
        print(outcome.as_json())
    else:
        print(
            f"{outcome.answered} answered, {outcome.left} left by their clients, "
            f"{outcome.cut_short} cut short by the end of their gateway; {outcome.tokens} tokens; "
            f"longest gap {outcome.longest_gap_s:.2f} s; {dict(outcome.events)}"
        )
    for violation in outcome.violations:
        print(f"VIOLATION: {violation}", file=sys.stderr)
    if outcome.violations:
        raise typer.Exit(_complain(f"seed {seed} breaks it; logs: {outcome.log_dir}"))


def _complain(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    typer.run(chaos)
