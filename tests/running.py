"""Whole meshes of real processes, started by ``expert-mesh up --json`` as a program would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
DEMO_MODEL = ROOT / "models" / "demo"


class RunningMesh:
    """One ``up`` that said it is ready."""

    def __init__(self, *flags: str | Path) -> None:
        command = [sys.executable, "-m", "cli.main", "up", "--json", *map(str, flags)]
        self.up = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            self.ready = self.next_event("ready")
        except BaseException:
            self.up.kill()
            raise
        self.name: str = self.ready["mesh"]
        self.gateway: str = self.ready["gateways"][0]
        self.placement: str = self.ready["placement"]
        self.processes = psutil.Process(self.up.pid).children(recursive=True)

    def next_event(self, name: str) -> dict[str, Any]:
        """The next line that it prints, which must be this event."""
        assert self.up.stdout is not None
        line = self.up.stdout.readline()
        assert line, f"up ended with {self.up.wait()}: {self.stderr()}"
        event: dict[str, Any] = json.loads(line)
        assert event["event"] == name, event
        return event

    def stderr(self) -> str:
        assert self.up.stderr is not None
        return self.up.stderr.read()

    def expert_mesh(self, *words: str) -> Any:
        """What a command of ours prints with ``--json``: its only line."""
        (answer,) = self.lines(*words)
        return answer

    def lines(self, *words: str) -> list[dict[str, Any]]:
        """What a command of ours prints with ``--json``."""
        command = [sys.executable, "-m", "cli.main", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def ask(self, *words: str) -> list[dict[str, Any]]:
        """The events of ``scale`` or ``roll``."""
        return self.lines(*words, "--mesh", self.name)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.expert_mesh("status", "--target", self.placement)
        return status

    def homes_of(self, layer: int, index: int) -> list[str]:
        """The ids of the workers that serve an expert."""
        plan = self.expert_mesh("plan", "--target", self.placement)
        return next(
            list(e["workers"])
            for e in plan["experts"]
            if (e["layer"], e["index"]) == (layer, index)
        )

    def home_of(self, layer: int, index: int) -> str:
        """The id of the worker that serves an expert."""
        plan = self.expert_mesh("plan", "--target", self.placement)
        (home,) = next(
            e["workers"] for e in plan["experts"] if (e["layer"], e["index"]) == (layer, index)
        )
        return str(home)

    def pid_of(self, worker_id: str) -> int:
        return next(int(w["pid"]) for w in self.ready["workers"] if w["id"] == worker_id)

    def end(self) -> int:
        """Ask it to end; its exit code."""
        self.processes = psutil.Process(self.up.pid).children(recursive=True)
        self.up.terminate()
        return self.up.wait()

    def survivors(self) -> list[psutil.Process]:
        """What is left of its processes."""
        _, alive = psutil.wait_procs(self.processes, timeout=20)
        return alive


@contextmanager
def running_mesh(*flags: str | Path) -> Iterator[RunningMesh]:
    """A mesh for the length of a block."""
    mesh = RunningMesh(*flags)
    try:
        yield mesh
    finally:
        if mesh.up.poll() is None:
            mesh.end()
        assert mesh.up.stdout is not None
        assert mesh.up.stderr is not None
        mesh.up.stdout.close()
        mesh.up.stderr.close()
