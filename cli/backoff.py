"""When to start a process again that ended. Pure: the clock is passed in."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_STEADY_S = 60.0


@dataclass
class Backoff:
    """Of one process that there should be: at once the first time, then 1, 2, 4, ... 60 s apart.

    One that ran for a minute has a clean slate.
    """

    num_ends: int = 0
    """In a row."""

    def pause_s(self, ran_s: float) -> float:
        """It ended after ``ran_s``: how long to wait before starting it again."""
        self.num_ends = 1 if ran_s >= _STEADY_S else self.num_ends + 1
        if self.num_ends == 1:
            return 0.0
        doublings = min(self.num_ends - 2, 10)
        return float(min(_FIRST_PAUSE_S * (1 << doublings), _LONGEST_PAUSE_S))
