"""How busy experts and workers have been lately. Pure: ``now`` is passed in."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_MOST_WINDOWS = 100.0
"""That numbers may grow for: e to the power of it is far from what a float holds."""


class LoadAverage(Generic[Key]):
    """Rows per second of each key, averaged over an exponentially fading window."""

    def __init__(self, window_s: float = 30.0) -> None:
        self.window_s = window_s
        # What rows at one time would come to the same; later ones count more. So all fade as one.
        self._rows: dict[Key, float] = {}
        self._at_s = 0.0

    def observe(self, key: Key, rows: int, now: float) -> None:
        """Rows that were counted since the last observation of the key."""
        if not self._rows or now > self._at_s + _MOST_WINDOWS * self.window_s:
            left = self._left(now)
            self._rows = {k: n * left for k, n in self._rows.items()}
            self._at_s = now
        self._rows[key] = self._rows.get(key, 0.0) + rows / self._left(now)

    def rate(self, key: Key, now: float) -> float:
        """Rows per second; 0 for a key that was never seen."""
        return self._rows.get(key, 0.0) * self._left(now) / self.window_s

    def rates(self, keys: Iterable[Key], now: float) -> dict[Key, float]:
        """The same of many."""
        factor = self._left(now) / self.window_s
        return {key: self._rows.get(key, 0.0) * factor for key in keys}

    def forget(self, key: Key) -> None:
        """Drop a key that is gone."""
        self._rows.pop(key, None)

    def _left(self, now: float) -> float:
        return math.exp((self._at_s - now) / self.window_s)


def balancedness(loads: Iterable[float]) -> float:
    """Mean over maximum: 1 when all carry the same, towards 0 when one carries all."""
    listed = list(loads)
    most = max(listed, default=0.0)
    return sum(listed) / len(listed) / most if most > 0 else 1.0
