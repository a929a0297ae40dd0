"""When to rebalance without being asked. Pure: ``now`` is passed in."""

from __future__ import annotations

_HYSTERESIS = 0.05
_LONGEST_PAUSE = 16.0
"""In units of ``after_s``."""


class RebalancePolicy:
    """Due once balancedness has been below ``below`` for ``after_s``, and then no sooner than
    ``after_s`` later. A turn that found nothing worth its price doubles the pause: what cannot be
    balanced is left in peace. ``below`` 0 is never."""

    def __init__(self, below: float, after_s: float) -> None:
        self._below = below
        self._after_s = after_s
        self._pause_s = after_s
        self._since_s: float | None = None
        self._not_before_s = 0.0

    def observe(self, balancedness: float, now: float) -> bool:
        """Whether a turn is due."""
        if balancedness > self._below + _HYSTERESIS:
            self._since_s, self._pause_s = None, self._after_s
            self._not_before_s = min(self._not_before_s, now + self._after_s)
        elif balancedness < self._below and self._since_s is None:
            self._since_s = now
        if self._since_s is None:
            return False
        return now >= max(self._since_s + self._after_s, self._not_before_s)

    def took_turn(self, moves: int, now: float) -> None:
        """A turn made so many moves."""
        longest_s = _LONGEST_PAUSE * self._after_s
        self._pause_s = self._after_s if moves else min(2 * self._pause_s, longest_s)
        self._not_before_s = now + self._pause_s
