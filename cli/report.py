"""What ``expert-mesh up`` says while it runs: to a person, or to a program."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from cli.status import plan_tables

if TYPE_CHECKING:
    from protos import placement_pb2 as pb

Counts = Mapping[str, tuple[int, int]]
"""Of each thing that is waited for: how many are there, of how many."""


@dataclass(frozen=True)
class Ready:
    """A mesh that serves: what each process announced, and the first complete plan."""

    mesh: str
    placement: dict[str, Any]
    gateways: list[dict[str, Any]]
    workers: list[dict[str, Any]]
    plan: pb.Plan
    log_dir: Path
    took_s: float


def describe(event: Mapping[str, Any]) -> str:
    """One event of a mesh in a line for a person."""
    match event:
        case {"event": "joined", "name": name, "pid": pid, "replaces": replaces, "took_s": took_s}:
            place = f" in place of {replaces}" if replaces else ""
            return f"{name} (pid {pid}) is there{place} after {took_s:.1f} s"
        case {"event": "left", "name": name, "workers": workers}:
            return f"{name} has left; {workers} workers"
        case {"event": "replaced", "name": name, "by": by, "took_s": took_s, "done": n, "of": of}:
            return f"{n} of {of}: {by} took over from {name} in {took_s:.1f} s"
        case {"event": "restarting", "name": name, "ends": ends, "pause_s": pause_s}:
            often = f", {ends} in a row" if ends > 1 else ""
            when = f"in {pause_s:.0f} s" if pause_s else "now"
            return f"{name} is started again {when}{often}"
        case {"event": "hung", "name": name, "pid": pid, "silent_s": silent_s}:
            return (
                f"{name} (pid {pid}) hangs: /healthz said nothing for {silent_s:g} s; it is killed"
            )
        case {"event": "exited", "name": name, "code": code, "signal": signal}:
            return f"{name} ended with " + (
                f"code {code}" if signal is None else f"signal {signal}"
            )
        case {"event": "done", "workers": workers, "took_s": took_s}:
            return f"done: {workers} workers after {took_s:.1f} s"
    return json.dumps(event)


class JsonReport:
    """One object a line on stdout."""

    def progress(self, counts: Counts) -> None:
        """Nothing: the next line says that all is ready."""

    def ready(self, ready: Ready) -> None:
        everyone = [ready.placement, *ready.gateways, *ready.workers]
        self._say(
            event="ready",
            mesh=ready.mesh,
            gateways=[gateway["grpc"] for gateway in ready.gateways],
            placement=ready.placement["grpc"],
            http=[process["http"] for process in everyone],
            workers=[{"id": w["id"], "pid": w["pid"], "address": w["grpc"]} for w in ready.workers],
        )

    def happened(self, event: Mapping[str, Any], text: str) -> None:
        self._say(**event)

    def draining(self) -> None:
        """Nothing: the end of the process says it."""

    def _say(self, **fields: Any) -> None:
        print(json.dumps(fields), flush=True)


class TextReport:
    """Bars on a terminal; elsewhere a line for each thing that is complete.

    With ``hints``, what to do next once all is ready.
    """

    def __init__(self, *, hints: bool) -> None:
        self._hints = hints
        self._console = Console()
        self._began_s = time.monotonic()
        self._complete: set[str] = set()
        self._bars = Progress(
            TextColumn("{task.description:20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._bar_of: dict[str, Any] = {}

    def progress(self, counts: Counts) -> None:
        for what, (done, total) in counts.items():
            if self._console.is_terminal:
                if what not in self._bar_of:
                    self._bars.start()
                    self._bar_of[what] = self._bars.add_task(what)
                self._bars.update(self._bar_of[what], completed=done, total=total)
            elif done == total and what not in self._complete:
                self._complete.add(what)
                after_s = time.monotonic() - self._began_s
                self._console.print(f"{what}: {done} of {total} after {after_s:.1f} s")

    def ready(self, ready: Ready) -> None:
        self._bars.stop()
        for table in plan_tables(ready.plan, self._console.width):
            self._console.print(table)
        if ready.plan.note:
            self._console.print(Text(ready.plan.note, style="yellow"))
        gateways = ", ".join(gateway["grpc"] for gateway in ready.gateways)
        self._console.print(
            f"[bold green]ready[/] after {ready.took_s:.1f} s: {len(ready.workers)} workers, "
            f"placement at {ready.placement['grpc']}, gateway at [bold]{gateways}[/]",
            soft_wrap=True,
            highlight=False,
        )
        if self._hints:
            gateway = ready.gateways[0]
            self._console.print(
                f"metrics: http://{gateway['http']}/metrics   logs: {ready.log_dir}\n"
                f"try: expert-mesh generate --target {gateway['grpc']} --prompt 'Hello'\n"
                f"more workers: expert-mesh scale {len(ready.workers) + 1} --mesh {ready.mesh}"
                "   Ctrl-C drains and ends it",
                soft_wrap=True,
                highlight=False,
            )

    def happened(self, event: Mapping[str, Any], text: str) -> None:
        style = "bold red" if event["event"] in ("exited", "hung") else ""
        self._console.print(Text(text or describe(event), style=style), soft_wrap=True)

    def draining(self) -> None:
        self._bars.stop()
        self._console.print("draining (Ctrl-C again kills)")
