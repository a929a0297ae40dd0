"""Experts that a worker answers for with nothing that can be used. Pure: ``now`` is passed in."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mesh.plan import ExpertId
from placement import quarantine

Pair = tuple[str, ExpertId]
"""A worker, and the expert that it gets wrong."""


@dataclass
class _Fault:
    until_s: float
    quarantine_s: float


class Faults:
    """Which worker is not to have which expert for a while.

    A quarantine doubles each time that the fault is back when it is over; one that stays away for
    long enough is forgotten, and so are those of a worker that starts anew.
    """

    def __init__(self) -> None:
        self.out: frozenset[Pair] = frozenset()
        """Those in quarantine."""
        self._known: dict[Pair, _Fault] = {}

    def hear(self, pairs: Iterable[Pair], now: float) -> list[tuple[Pair, float]]:
        """Gateways say so. Returns those whose quarantine begins with it, and its seconds; of one
        that is in quarantine it is no news."""
        begun = []
        for pair in pairs:
            if pair in self.out:
                continue
            known = self._known.get(pair)
            quarantine_s = quarantine.next_s(known.quarantine_s if known else 0.0)
            self._known[pair] = _Fault(now + quarantine_s, quarantine_s)
            begun.append((pair, quarantine_s))
        if begun:
            self.out |= {pair for pair, _ in begun}
        return begun

    def expire(self, now: float) -> list[Pair]:
        """End the quarantines that are over. Returns them."""
        over = sorted(pair for pair in self.out if now >= self._known[pair].until_s)
        if over:
            self.out -= set(over)
        forgiven = [
            p for p, f in self._known.items() if now >= f.until_s + quarantine.FORGIVEN_AFTER_S
        ]
        for pair in forgiven:
            del self._known[pair]
        return over

    def forget(self, worker_id: str) -> None:
        """A worker is gone, or there anew."""
        self._known = {pair: f for pair, f in self._known.items() if pair[0] != worker_id}
        self.out = frozenset(pair for pair in self.out if pair[0] != worker_id)

    def of(self, worker_id: str) -> list[ExpertId]:
        """What a worker is not to have now, ascending."""
        return sorted(expert for name, expert in self.out if name == worker_id)

    def by_worker(self) -> dict[str, Collection[ExpertId]]:
        """The same of all."""
        return {name: self.of(name) for name in {name for name, _ in self.out}}

    def next_deadline_s(self) -> float | None:
        """When :meth:`expire` has something to return."""
        until_s = min((self._known[pair].until_s for pair in self.out), default=math.inf)
        return until_s if until_s < math.inf else None
