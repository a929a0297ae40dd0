"""Whether processes grow: their own memory by time, a line through it, and what is too steep."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import linear_regression

_WARM_UP_S = 60.0
"""Of a process's life: allocators fill, buffers of each size are made once."""
_LEAST_SPAN_S = 45.0
_MB = 1 << 20
_NOISE_MB = 8.0
"""A rise over the whole span, beside what may fill, that means nothing ..."""
_STEEP_MB_PER_MIN = 0.25
"""... and a slope that an allocator still has after an hour."""


class Memory:
    """Samples of every process. One that is started again is another.

    ``fills_mb`` is what a process may still take without growing: a cache of that size is there
    from the start, but its pages count only once they are used.
    """

    def __init__(self, fills_mb: float = 0.0) -> None:
        self._steep_mb = _NOISE_MB + fills_mb
        self._samples: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)

    def sample(self, pids: Mapping[str, int], now_s: float) -> None:
        """Note what each process, by name, and its children hold now."""
        for name, pid in pids.items():
            with suppress(OSError):
                self._samples[name, pid].append((now_s, _own_bytes(pid) / _MB))
                for child in _children(pid):
                    at = (now_s, _own_bytes(child) / _MB)
                    self._samples[f"{name} (child)", child].append(at)

    def add(self, name: str, pid: int, samples: list[tuple[float, float]]) -> None:
        """Samples from elsewhere: seconds, MB."""
        self._samples[name, pid] += samples

    def slopes(self) -> dict[str, float]:
        """MB a minute after the warm-up, of those that lived long enough to tell."""
        return {f"{name} {pid}": slope for (name, pid), (slope, _) in self._lines().items()}

    def growing(self) -> list[tuple[str, float]]:
        """Those that do, each with its slope in MB a minute."""
        return [
            (f"{name} (pid {pid})", slope)
            for (name, pid), (slope, rise_mb) in self._lines().items()
            if slope > _STEEP_MB_PER_MIN and rise_mb > self._steep_mb
        ]

    def as_json(self) -> str:
        """Every sample, by process: a list of [seconds, MB] for ``name pid``."""
        return json.dumps(
            {f"{name} {pid}": samples for (name, pid), samples in self._samples.items()}
        )

    def _lines(self) -> dict[tuple[str, int], tuple[float, float]]:
        """The slope of each, and by how much the least of its last third is above that of its
        first: what comes and goes by turns has a slope at any moment, and rises by nothing."""
        lines = {}
        for key, samples in self._samples.items():
            warm = [(t, mb) for t, mb in samples if t - samples[0][0] >= _WARM_UP_S]
            if warm and warm[-1][0] - warm[0][0] >= _LEAST_SPAN_S:
                fit = linear_regression(*zip(*warm, strict=True))
                third = len(warm) // 3
                first, last = (min(mb for _, mb in part) for part in (warm[:third], warm[-third:]))
                lines[key] = fit.slope * 60, last - first
        return lines


def _own_bytes(pid: int) -> int:
    """Anonymous memory: what is mapped from files is nobody's growth."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
