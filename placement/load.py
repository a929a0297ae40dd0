"""How busy experts and workers have been lately. Pure: ``now`` is passed in."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class LoadAverage(Generic[Key]):
    """Rows per second of each key, averaged over an exponentially fading window."""

    def __init__(self, window_s: float = 30.0) -> None:
        self.window_s = window_s
        self._faded: dict[Key, tuple[float, float]] = {}

    def observe(self, key: Key, rows: int, now: float) -> None:
        """Rows that were counted since the last observation of the key."""
        self._faded[key] = (self._at(key, now) + rows, now)

    def rate(self, key: Key, now: float) -> float:
        """Rows per second; 0 for a key that was never seen."""
        return self._at(key, now) / self.window_s

    def forget(self, key: Key) -> None:
        """Drop a key that is gone."""
        self._faded.pop(key, None)

    def _at(self, key: Key, now: float) -> float:
        rows, then = self._faded.get(key, (0.0, now))
        return rows * math.exp((then - now) / self.window_s)


def balancedness(loads: Iterable[float]) -> float:
    """Mean over maximum: 1 when all carry the same, towards 0 when one carries all."""
    listed = list(loads)
    most = max(listed, default=0.0)
    return sum(listed) / len(listed) / most if most > 0 else 1.0
