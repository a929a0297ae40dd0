"""The processes of a mesh on one machine, as the one who started them sees them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from cli.child import command_of
from cli.options import without_variables
from mesh.errors import Unavailable

_LOG_TAIL_LINES = 5


@dataclass(frozen=True)
class Exit:
    """How a process ended: with a code, or by a signal."""

    code: int | None
    signal: int | None

    @property
    def was_asked_for(self) -> bool:
        """Told to end, it did."""
        return self.code == 0 or self.signal == signal.SIGTERM

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        with suppress(ValueError):
            return signal.Signals(self.signal).name
        return f"signal {self.signal}"


@dataclass
class Process:
    """One child of the fork server."""

    name: str
    log: Path
    started: asyncio.Future[int] = field(default_factory=asyncio.Future)
    """Its pid."""
    ready: asyncio.Future[dict[str, Any]] = field(default_factory=asyncio.Future)
    """What it announced."""
    exited: asyncio.Future[Exit] = field(default_factory=asyncio.Future)

    @property
    def alive(self) -> bool:
        return not self.exited.done()

    @property
    def pid(self) -> int:
        """Valid once ``started`` is done."""
        return self.started.result()

    def describe_end(self) -> str:
        """Name, how it ended, and the last lines of its log. Only after its end."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        except OSError:
            lines = []
        log = "; its log ends:\n" + "\n".join(lines) if lines else ""
        return f"{self.name} ended with {self.exited.result()}{log}"


class Supervisor:
    """Runs a :mod:`cli.fork_server`. Leaving the context ends all that it started."""

    def __init__(
        self,
        preload: Iterable[str],
        log_dir: Path,
        on_exit: Callable[[Process], None],
        entry: str = "cli.main:main",
        grace_s: float = 10.0,
    ) -> None:
        self._command = command_of("cli.fork_server", "--entry", entry, "--grace-s", str(grace_s))
        for module in preload:
            self._command += ["--preload", module]
        self.log_dir = log_dir
        self._on_exit = on_exit
        self._grace_s = grace_s
        self.processes: dict[str, Process] = {}
        """Those that live, by name."""
        self.ended = False
        """Nothing can be started any more."""

    async def __aenter__(self) -> Supervisor:
        # Libraries that start a thread when imported would make the fork unsafe.
        environ = without_variables(os.environ) | {"OPENBLAS_NUM_THREADS": "1"}
        self._server = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environ,
            start_new_session=True,
        )
        if self._server.stdin is None or self._server.stdout is None:
            raise RuntimeError("a subprocess without the pipes that it was to have")
        self._commands = self._server.stdin
        self._listening = asyncio.create_task(self._listen(self._server.stdout))
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._commands.close()
        try:
            await asyncio.wait_for(self._server.wait(), 2 * self._grace_s)
        except TimeoutError:
            self._server.kill()  # Its children have asked the kernel to die with it.
            await self._server.wait()
        await self._listening

    def spawn(self, name: str, argv: Sequence[str]) -> Process:
        """Fork ``expert-mesh argv``. Returns at once. No living process may have the name."""
        process = self.processes[name] = Process(name, self.log_dir / f"{name}.log")
        self._say(spawn={"name": name, "argv": list(argv), "log": str(process.log)})
        return process

    def signal(self, process: Process, number: int) -> None:
        """Send a signal; nothing happens when the process has ended."""
        self._say(signal={"name": process.name, "number": number})

    async def wait_ready(self, process: Process) -> dict[str, Any]:
        """What the process announced. Unavailable when it ends before it does."""
        either: list[asyncio.Future[Any]] = [process.ready, process.exited]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not process.ready.done():
            raise Unavailable(process.describe_end())
        return process.ready.result()

    def _say(self, **command: Any) -> None:
        self._commands.write(json.dumps(command).encode() + b"\n")

    async def _listen(self, events: asyncio.StreamReader) -> None:
        while line := await events.readline():
            ((event, fields),) = json.loads(line).items()
            process = self.processes[fields.pop("name")]
            if event == "started":
                process.started.set_result(fields["pid"])
            elif event == "ready":
                process.ready.set_result(fields)
            else:
                self._ended(process, Exit(fields["code"], fields["signal"]))
        self.ended = True
        # The server's end is theirs.
        for process in list(self.processes.values()):
            self._ended(process, Exit(None, signal.SIGKILL))

    def _ended(self, process: Process, exit: Exit) -> None:
        del self.processes[process.name]
        process.exited.set_result(exit)
        self._on_exit(process)
