"""The fork server with tiny children: what it says of them, and that none outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cli.child import command_of


class Server:
    """A fork server as its supervisor sees it."""

    def __init__(self, grace_s: float = 5.0, cwd: Path | None = None) -> None:
        flags = ["--grace-s", str(grace_s), "--entry", "tests.multiprocess.children:main"]
        self.process = subprocess.Popen(
            command_of("cli.fork_server", *flags),
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def say(self, **command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")

    def hear(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        heard = json.loads(self.process.stdout.readline())
        assert list(heard) == [event], heard
        fields: dict[str, Any] = heard[event]
        return fields

    def spawn(self, name: str, *argv: str, log: Path | None = None) -> int:
        """Start a child and wait until it says that it is ready; its pid."""
        self.say(spawn={"name": name, "argv": argv, "log": str(log) if log else None})
        pid: int = self.hear("started")["pid"]
        assert self.hear("ready") == {"name": name, "pid_seen": pid}
        return pid


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.communicate()


def test_a_child_runs_with_its_argv_and_its_end_is_told(server: Server, tmp_path: Path) -> None:
    pid = server.spawn("a", "say", "hello", "there", log=tmp_path / "a.log")
    assert server.hear("exited") == {"name": "a", "pid": pid, "code": 0, "signal": None}
    assert (tmp_path / "a.log").read_text() == "hello there\n"


def test_what_lies_in_the_current_directory_is_not_run(tmp_path: Path) -> None:
    for name in ("cli", "mesh", "tests", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was run')")
    server = Server(cwd=tmp_path)
    server.spawn("a", "say", "hello", log=tmp_path / "a.log")
    assert server.hear("exited")["code"] == 0
    server.process.terminate()
    server.process.communicate()
    assert (tmp_path / "a.log").read_text() == "hello\n"


@pytest.mark.parametrize(("verb", "code"), [("exit", 7), ("raise", 1)])
def test_the_exit_code_is_told(server: Server, tmp_path: Path, verb: str, code: int) -> None:
    server.spawn("a", verb, "7", log=tmp_path / "a.log")
    assert server.hear("exited")["code"] == code
    assert ("ValueError: 7" in (tmp_path / "a.log").read_text()) == (verb == "raise")


def test_a_killed_child_is_told_by_its_signal_and_reaped(server: Server) -> None:
    pid = server.spawn("a", "sleep")
    os.kill(pid, signal.SIGKILL)
    assert server.hear("exited") == {"name": "a", "pid": pid, "code": None, "signal": 9}
    assert not psutil.pid_exists(pid)


def test_a_signal_reaches_the_child_it_names_alone(server: Server) -> None:
    server.spawn("a", "sleep")
    other = server.spawn("b", "sleep")
    server.say(signal={"name": "a", "number": signal.SIGTERM})
    assert server.hear("exited")["name"] == "a"
    assert psutil.pid_exists(other)


def test_what_a_child_started_itself_ends_with_it(server: Server) -> None:
    pid = server.spawn("a", "sleep-with-child")
    (grandchild,) = psutil.Process(pid).children()
    os.kill(pid, signal.SIGKILL)
    server.hear("exited")
    grandchild.wait(timeout=10)


def test_the_end_of_stdin_ends_the_deaf_children_too() -> None:
    server = Server(grace_s=0.2)
    pids = {server.spawn("a", "sleep"), server.spawn("b", "sleep-deaf")}
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert [server.hear("exited")["signal"] for _ in pids] == [signal.SIGTERM, signal.SIGKILL]
    assert server.process.wait() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_sigterm_ends_the_server_and_its_children(server: Server) -> None:
    server.spawn("a", "sleep")
    server.process.terminate()
    assert server.hear("exited")["signal"] == signal.SIGTERM
    assert server.process.wait() == 0


def test_children_die_with_a_server_that_is_killed(server: Server) -> None:
    child = psutil.Process(server.spawn("a", "sleep-deaf"))
    server.process.kill()
    child.wait(timeout=10)


def test_a_child_that_never_is_ready_is_told_as_exited(server: Server) -> None:
    server.say(spawn={"name": "a", "argv": [], "log": os.devnull})
    server.hear("started")
    assert server.hear("exited")["code"] == 1
