"""Forks the processes of a mesh from one that has imported everything they need.

Sixteen workers that each import torch take half a minute on two cores; forked, they take a few
seconds and share its memory. ``python -m cli.fork_server`` reads one JSON object a line on
stdin and writes one a line on stdout:

====================================================== ========================================
``{"spawn": {"name", "argv", "log": path or null}}``   fork, and run ``--entry`` with argv
``{"signal": {"name", "number"}}``                     signal a child; SIGKILL: its whole group
``{"started": {"name", "pid"}}``                       it runs
``{"ready": {"name", ...}}``                           the JSON line that it wrote to --ready-fd
``{"exited": {"name", "pid", "code", "signal"}}``      it is reaped; code or signal is null
====================================================== ========================================

``--ready-fd N`` is added to each argv. At the end of stdin, children get SIGTERM, and their
process groups SIGKILL after ``--grace-s``: nothing outlives this process, nor this one its
parent. It is single-threaded, since a fork copies only the thread that calls it, and makes no
object of gRPC, UCX or CUDA, none of which survive a fork.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import math
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class _Child:
    name: str
    pid: int
    ready_fd: int
    ready_text: bytes = b""


class ForkServer:
    """Commands in, events out, children reaped; ``entry`` is what each child runs."""

    def __init__(self, entry: Callable[[list[str]], int], grace_s: float) -> None:
        self._entry = entry
        self._grace_s = grace_s
        self._children: dict[int, _Child] = {}
        self._command_text = b""
        self._ending = False
        self._kill_at_s = math.inf
        # Signals come into the loop as bytes of a pipe, their numbers.
        self._signals_fd, self._wakeup_fd = os.pipe()
        os.set_blocking(self._wakeup_fd, False)
        signal.set_wakeup_fd(self._wakeup_fd)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Grandchildren whose parent died come to us, who reap them: a zombie counts as alive
        # to its UCX peers.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._signals_fd, selectors.EVENT_READ, self._read_signals)
        self._selector.register(0, selectors.EVENT_READ, self._read_commands)

    def serve(self) -> None:
        """Run until stdin has ended and every child is gone."""
        while self._children or not self._ending:
            left_s = self._kill_at_s - time.monotonic()
            for key, _ in self._selector.select(None if left_s == math.inf else left_s):
                key.data()
            if time.monotonic() >= self._kill_at_s:
                self._kill_at_s = math.inf
                for child in self._children.values():
                    _signal(child, signal.SIGKILL)

    def _read_commands(self) -> None:
        chunk = os.read(0, 1 << 16)
        if not chunk:
            self._end()
            return
        *lines, self._command_text = (self._command_text + chunk).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "spawn" in command:
                self._spawn(**command["spawn"])
            else:
                self._signal(**command["signal"])

    def _spawn(self, name: str, argv: list[str], log: str | None) -> None:
        ready_fd, child_ready_fd = os.pipe()
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(ready_fd)
            self._run_child(server_pid, argv, log, child_ready_fd)
        os.close(child_ready_fd)
        child = self._children[pid] = _Child(name, pid, ready_fd)
        self._selector.register(ready_fd, selectors.EVENT_READ, lambda: self._read_ready(child))
        _emit("started", name=name, pid=pid)

    def _run_child(self, server_pid: int, argv: list[str], log: str | None, fd: int) -> NoReturn:
        code = 1
        try:
            # Its own session: a Ctrl-C on the terminal is for the supervisor, who drains.
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server_pid:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            for key in self._selector.get_map().values():
                os.close(key.fd)
            os.close(self._wakeup_fd)
            self._selector.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if log is not None:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
            os.dup2(2, 1)
            code = self._entry([*argv, "--ready-fd", str(fd)])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _read_ready(self, child: _Child) -> None:
        chunk = os.read(child.ready_fd, 1 << 16)
        child.ready_text += chunk
        if chunk and not child.ready_text.endswith(b"\n"):
            return
        self._selector.unregister(child.ready_fd)
        os.close(child.ready_fd)
        if child.ready_text:
            _emit("ready", name=child.name, **json.loads(child.ready_text))

    def _signal(self, name: str, number: int) -> None:
        for child in self._children.values():
            if child.name == name:
                _signal(child, number)

    def _read_signals(self) -> None:
        if signal.SIGTERM in os.read(self._signals_fd, 1 << 16):
            self._end()
        self._reap()

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while status := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                child = self._children.pop(status.si_pid, None)
                if child is not None:
                    # What it started itself ends with it. The group still is its own: until
                    # it is reaped, nobody else can get its pid.
                    _signal(child, signal.SIGKILL)
                _, wait_status = os.waitpid(status.si_pid, 0)
                if child is not None:
                    code = os.waitstatus_to_exitcode(wait_status)
                    _emit(
                        "exited",
                        name=child.name,
                        pid=child.pid,
                        code=code if code >= 0 else None,
                        signal=-code if code < 0 else None,
                    )

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self._selector.unregister(0)
            self._kill_at_s = time.monotonic() + self._grace_s
            for child in self._children.values():
                _signal(child, signal.SIGTERM)


def _signal(child: _Child, number: int) -> None:
    try:
        (os.killpg if number == signal.SIGKILL else os.kill)(child.pid, number)
    except ProcessLookupError:  # It has no group of its own yet; its pid is ours until reaped.
        os.kill(child.pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _emit(event: str, **fields: Any) -> None:
    # A supervisor that is gone cannot listen; its children are ended all the same.
    with suppress(BrokenPipeError):
        os.write(1, json.dumps({event: fields}).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cli.fork_server")
    parser.add_argument("--entry", default="cli.main:main", metavar="MODULE:FUNCTION")
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE")
    parser.add_argument("--grace-s", type=float, default=10.0)
    arguments = parser.parse_args()
    for name in arguments.preload:
        importlib.import_module(name)
    module, _, function = arguments.entry.partition(":")
    entry = getattr(importlib.import_module(module), function)
    # Nothing imported so far is garbage: keep the collector from touching, and so copying,
    # the pages that children share.
    gc.collect()
    gc.freeze()
    ForkServer(entry, arguments.grace_s).serve()


if __name__ == "__main__":
    main()
