"""NVIDIA's multi-process service: processes that share a GPU run on it at once.

Without it the driver gives the GPU to one process after the other, which costs a layer of a
gateway and a worker on one GPU more than twice its time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OFF = (
    "NVIDIA's multi-process service is off and could not be started here: processes that share a "
    "GPU take turns on it, at less than half the speed"
)
_CONTROL = "nvidia-cuda-mps-control"
_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_LOGS = "CUDA_MPS_LOG_DIRECTORY"
_DEVICES = "CUDA_VISIBLE_DEVICES"
_QUESTION = "get_default_active_thread_percentage"
_TIMEOUT_S = 10.0


def installed() -> bool:
    """Whether this host has the service's control program."""
    return shutil.which(_CONTROL) is not None


def running() -> bool:
    """Whether a service answers where this process's CUDA would look for it."""
    pipes = Path(os.environ.get(_PIPES, "/tmp/nvidia-mps"))
    return installed() and (pipes / "control").exists() and _say(_QUESTION)


@contextmanager
def sharing() -> Iterator[bool]:
    """A service for the CUDA processes started in the block; whether there is one.

    One that runs already is used and left alone. Else one of our own is started, which
    children find through this process's environment, and ended behind the block.
    """
    if running():
        yield True
        return
    if not installed():
        yield False
        return
    directory = Path(tempfile.mkdtemp(prefix="expert-mesh-mps-"))
    before = {name: os.environ.get(name) for name in (_PIPES, _LOGS, _DEVICES)}
    os.environ |= {_PIPES: str(directory), _LOGS: str(directory)}
    try:
        on = _run([_CONTROL, "-d"]) and _say(_QUESTION)
        numbers = (before[_DEVICES] or "").split(",")
        if on and all(number.strip().isdecimal() for number in numbers):
            # The service sees those alone, and its clients call them what it calls them.
            os.environ[_DEVICES] = ",".join(map(str, range(len(numbers))))
        yield on
    finally:
        _say("quit -t 1")
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        shutil.rmtree(directory, ignore_errors=True)


def _say(word: str) -> bool:
    return _run([_CONTROL], word + "\n")


def _run(command: list[str], words: str = "") -> bool:
    try:
        done = subprocess.run(
            command,
            input=words,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
