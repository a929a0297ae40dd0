"""How long runs take whose device computes behind the host's back."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_WARM_UP = 8


def each(
    run: Callable[[], object], device: torch.device, repeat: int, *, wait: bool = True
) -> list[float]:
    """Microseconds of each run, its device's work included."""
    times = []
    for _ in range(_WARM_UP + repeat):
        began_s = time.perf_counter()
        run()
        if wait:
            _wait(device)
        times.append((time.perf_counter() - began_s) * 1e6)
    return times[_WARM_UP:]


def chained(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Microseconds of a run among many that the host does not wait for."""
    for _ in range(_WARM_UP):
        run()
    _wait(device)
    began_s = time.perf_counter()
    for _ in range(repeat):
        run()
    _wait(device)
    return (time.perf_counter() - began_s) * 1e6 / repeat


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
