"""How long what has failed is left alone: longer each time, up to a minute, until it was calm."""

from __future__ import annotations

FORGIVEN_AFTER_S = 120.0
_SHORTEST_S = 1.0
_LONGEST_S = 60.0


def next_s(last_s: float) -> float:
    """Seconds of a quarantine after one of ``last_s``; 0: there was none, or it is forgiven."""
    return min(max(2 * last_s, _SHORTEST_S), _LONGEST_S)
