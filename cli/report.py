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
    from cli.supervisor import Process
    from protos import placement_pb2 as pb

Counts = Mapping[str, tuple[int, int]]
"""Of each thing that is waited for: how many are there, of how many."""


@dataclass(frozen=True)
class Ready:
    """A mesh that serves: what each process announced, and the first complete plan."""

    placement: dict[str, Any]
    gateways: list[dict[str, Any]]
    workers: list[dict[str, Any]]
    plan: pb.Plan
    log_dir: Path
    took_s: float


class JsonReport:
    """One object a line on stdout."""

    def progress(self, counts: Counts) -> None:
        """Nothing: the next line says that all is ready."""

    def ready(self, ready: Ready) -> None:
        everyone = [ready.placement, *ready.gateways, *ready.workers]
        self._say(
            event="ready",
            gateways=[gateway["grpc"] for gateway in ready.gateways],
            placement=ready.placement["grpc"],
            http=[process["http"] for process in everyone],
            workers=[{"id": w["id"], "pid": w["pid"], "address": w["grpc"]} for w in ready.workers],
        )

    def exited(self, process: Process) -> None:
        end = process.exited.result()
        self._say(
            event="exited", name=process.name, pid=process.pid, code=end.code, signal=end.signal
        )

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
                "Ctrl-C drains and ends it",
                soft_wrap=True,
                highlight=False,
            )

    def exited(self, process: Process) -> None:
        self._console.print(Text(process.describe_end(), style="bold red"), soft_wrap=True)

    def draining(self) -> None:
        self._bars.stop()
        self._console.print("draining (Ctrl-C again kills)")
