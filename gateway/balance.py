"""Which replica of an expert computes which rows. Pure: rows and seconds in, rows out.

A dispatch of n rows is taken to last ``unit_s x (FIXED_ROWS + n)``: a message costs as much as
some rows, however few are in it. ``unit_s`` is measured for each worker from post to reply, so
that a slow device, a long way and a busy worker all count as what they are: slow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mesh.plan import ExpertId

FIXED_ROWS = 64
"""A message costs about as much as this many rows."""
MIN_PART_ROWS = 64
"""Fewer rows are not worth a message of their own."""
PROBE_EVERY = 32
"""A replica that was left out this many times in a row is tried again; one that is n times as
slow as the fastest, n times as many: whatever it takes, trying costs a few per cent."""
MAX_PROBE_EVERY = 4096
MIN_PATIENCE_S = 0.25
"""No dispatch is late before."""

_LATE = 8.0
"""A dispatch is late when it has lasted this many times what it should."""
_UNKNOWN_PATIENCE_S = 1.0
_GUESS_S = 1e-6
_LEAST_S = 1e-12
_CLOSE = 1.5
"""Replicas that would end within this factor of the first are equally good."""
_KEEP = 0.75
"""What one reply leaves of the average before it, at most ..."""
_FADE_S = 1.0
"""... and the older that is, the less: a replica that is tried again is not judged by its past."""


@dataclass
class _Pace:
    unit_s: float
    at_s: float


@dataclass
class _Turns:
    """How the replicas of one expert took turns."""

    num_turns: int = 0
    last_turn: dict[str, int] = field(default_factory=dict)
    credit_rows: dict[str, float] = field(default_factory=dict)


class Balancer:
    """What is known of the workers' speed, and what follows from it.

    Workers that were never heard of count as being as fast as the fastest beside them.
    """

    def __init__(self) -> None:
        self._paces: dict[str, _Pace] = {}
        self._turns: dict[ExpertId, _Turns] = {}

    def observe(self, worker_id: str, num_rows: int, seconds: float, now: float) -> None:
        """A worker took ``seconds`` from post to reply."""
        unit_s = seconds / (FIXED_ROWS + num_rows)
        pace = self._paces.get(worker_id)
        if pace is None:
            self._paces[worker_id] = _Pace(unit_s, now)
            return
        age_s = now - pace.at_s
        keep = _KEEP if age_s < _FADE_S / 4 else min(_KEEP, math.exp(-age_s / _FADE_S))
        pace.unit_s = keep * pace.unit_s + (1 - keep) * unit_s
        pace.at_s = now

    def keep_only(self, worker_ids: Collection[str], experts: Collection[ExpertId]) -> None:
        """Forget the other workers, and how other experts were shared."""
        self._paces = {w: pace for w, pace in self._paces.items() if w in worker_ids}
        self._turns = {e: turns for e, turns in self._turns.items() if e in experts}

    def expected_s(self, worker_id: str, num_rows: int) -> float | None:
        """How long a dispatch should last; None where nothing is known of the worker."""
        pace = self._paces.get(worker_id)
        return None if pace is None else pace.unit_s * (FIXED_ROWS + num_rows)

    def guess_s(self, worker_id: str, num_rows: int) -> float:
        """The same, with a guess for a worker of which nothing is known."""
        expected_s = self.expected_s(worker_id, num_rows)
        if expected_s is not None:
            return expected_s
        fastest_s = min((pace.unit_s for pace in self._paces.values()), default=_GUESS_S)
        return fastest_s * (FIXED_ROWS + num_rows)

    def patience_s(self, worker_id: str, num_rows: int) -> float:
        """After how long a dispatch is late."""
        expected_s = self.expected_s(worker_id, num_rows)
        if expected_s is None:
            return _UNKNOWN_PATIENCE_S
        return max(MIN_PATIENCE_S, _LATE * expected_s)

    def share(
        self,
        expert: ExpertId,
        num_rows: int,
        worker_ids: Sequence[str],
        busy_s: Mapping[str, float],
    ) -> dict[str, int]:
        """Rows for each replica that gets any, so that the last of them ends early.

        ``busy_s`` is what the layer has given to each worker already. Few rows go to one
        replica, and over time to each by its speed.
        """
        turns = self._turns.setdefault(expert, _Turns())
        turns.num_turns += 1
        units_s = self._units_s(worker_ids)
        fastest_s = min(units_s.values())
        starved = [
            worker_id
            for worker_id, unit_s in units_s.items()
            if turns.num_turns - turns.last_turn.setdefault(worker_id, turns.num_turns)
            >= min(PROBE_EVERY * unit_s / fastest_s, MAX_PROBE_EVERY)
        ]
        if num_rows < 2 * MIN_PART_ROWS:
            chosen = starved[0] if starved else _whose_turn(turns, num_rows, units_s, busy_s)
            shares = {chosen: num_rows}
        else:
            shares = dict.fromkeys(starved[:1], MIN_PART_ROWS)
            others = {w: unit_s for w, unit_s in units_s.items() if w not in shares}
            shares |= level(num_rows - sum(shares.values()), others, busy_s)
        turns.last_turn.update(dict.fromkeys(shares, turns.num_turns))
        return shares

    def _units_s(self, worker_ids: Sequence[str]) -> dict[str, float]:
        known = {w: self._paces[w].unit_s for w in worker_ids if w in self._paces}
        fastest_s = min(known.values(), default=_GUESS_S)
        return {w: max(known.get(w, fastest_s), _LEAST_S) for w in worker_ids}


def level(
    num_rows: int, units_s: Mapping[str, float], busy_s: Mapping[str, float]
) -> dict[str, int]:
    """Split rows so that all who get any end at once, and none gets fewer than MIN_PART_ROWS.

    Who would get fewer gets none. ``units_s`` is each worker's time for a row.
    """
    free = dict(units_s)
    while True:
        ends_s = (
            num_rows + sum(FIXED_ROWS + busy_s.get(w, 0.0) / unit_s for w, unit_s in free.items())
        ) / sum(1 / unit_s for unit_s in free.values())
        parts = {
            w: (ends_s - busy_s.get(w, 0.0)) / unit_s - FIXED_ROWS for w, unit_s in free.items()
        }
        least = min(parts, key=lambda w: parts[w])
        if len(parts) == 1 or parts[least] >= MIN_PART_ROWS:
            break
        del free[least]
    shares = {w: int(part) for w, part in parts.items()}
    first = max(parts, key=lambda w: parts[w])
    shares[first] += num_rows - sum(shares.values())
    return shares


def _whose_turn(
    turns: _Turns, num_rows: int, units_s: Mapping[str, float], busy_s: Mapping[str, float]
) -> str:
    """One of those that end about first: the one that is furthest behind its share."""
    ends_s = {
        w: busy_s.get(w, 0.0) + unit_s * (FIXED_ROWS + num_rows) for w, unit_s in units_s.items()
    }
    limit_s = _CLOSE * min(ends_s.values())
    close = {w: 1 / units_s[w] for w, end_s in ends_s.items() if end_s <= limit_s}
    total = sum(close.values())
    credit = {w: turns.credit_rows.get(w, 0.0) + num_rows * s / total for w, s in close.items()}
    chosen = max(credit, key=lambda w: credit[w])
    credit[chosen] -= num_rows
    turns.credit_rows = credit
    return chosen
