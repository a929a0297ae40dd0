"""When to do what can wait, beside rows that cannot. Pure: the clock is passed in."""

from __future__ import annotations

_QUIET_S = 0.005
"""Without rows for so long, none are about to come."""
_SHARE = 0.2


class Pacing:
    """A fifth of the time while rows come, all of it while none do."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def may_begin(self, now_s: float, rows_s: float) -> bool:
        """``rows_s``: when there was the last to do for rows."""
        return now_s >= self._next_s or now_s - rows_s >= _QUIET_S

    def ended(self, began_s: float, now_s: float) -> None:
        """One piece of it took so long."""
        self._next_s = now_s + (now_s - began_s) * (1 / _SHARE - 1)
