"""Moves that pay: replicas for what has become busy, and swaps between busy and idle workers. Pure.

Both are local searches from what is there, so that few moves do most of the good:

- in a layer, the replica that is missed least makes way for one of the expert that is busiest per
  worker, as long as that lowers the busiest;
- a worker swaps an expert for a less busy one of the same layer with a worker where rows cost
  less (:meth:`Seating.price_W`), or moves it to one that the layer leaves empty; but never so that
  slices of one expert come closer together.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from placement.seating import EMPTY, Seating

_MOST_STEPS = 4096
"""Of one search: far above what one needs, so that its time is bounded."""


@dataclass(frozen=True)
class Budget:
    """What balance may cost."""

    price: float = 0.05
    """A move must gain this, in units of an average expert's rows over a link of cost 1."""
    moves: int = _MOST_STEPS
    """Experts that may be loaded somewhere."""
    slack: float = 0.05
    """Workers are left in peace where a row costs no more than this above the mean."""


FREE = Budget(price=0.005, slack=-np.inf)
"""Where nothing lives yet."""


def improve(seating: Seating, budget: Budget, max_replicas: int) -> None:
    """Carry out the moves that gain more than the budget's price, the best first."""
    moves = _exchange_replicas(seating, budget, max_replicas)
    _swap(seating, budget, budget.moves - moves)


def _exchange_replicas(seating: Seating, budget: Budget, max_replicas: int) -> int:
    """Replicas follow the traffic. Returns how many were made."""
    waiting = [
        (-_busiest(seating, g), g)
        for g, holders in enumerate(seating.holders)
        if any(len(at) > 1 for at in holders)
    ]
    heapq.heapify(waiting)
    moves = 0
    while waiting and moves < budget.moves:
        _, g = heapq.heappop(waiting)
        if not _exchange_one(seating, g, budget.price, max_replicas):
            continue
        moves += 1
        heapq.heappush(waiting, (-_busiest(seating, g), g))
    return moves


def _busiest(seating: Seating, g: int) -> float:
    """The most that a worker carries of one expert of a group."""
    return max(seating.share(g, i) for i in range(seating.num_units))


def _exchange_one(seating: Seating, g: int, price: float, max_replicas: int) -> bool:
    """The busiest expert of a layer takes the seat of the replica that is missed least."""
    holders = seating.holders[g]
    count_N = np.array([len(at) for at in holders])
    share_N = np.where(count_N > 0, seating.weight_GN[g] / np.maximum(count_N, 1), -np.inf)
    may_grow_N = count_N < (max_replicas or len(seating.workers))
    busiest = int(share_N.argmax())
    if not may_grow_N[busiest]:
        return False
    without_N = np.where(count_N > 1, seating.weight_GN[g] / np.maximum(count_N - 1, 1), np.inf)
    without_N[busiest] = np.inf
    price_W = seating.price_W()
    for i in np.argsort(without_N, kind="stable").tolist():
        if share_N[busiest] - without_N[i] <= price:
            return False
        seats = [
            w
            for w in holders[i]
            if w not in holders[busiest]
            and w not in seating.barred.get((g, busiest), ())
            and not _new_conflict(seating, g, busiest, w)
        ]
        if seats:
            w = min(seats, key=lambda w: (price_W[w], w))
            seating.take(g, i, w)
            seating.put(g, busiest, w)
            return True
    return False


def _new_conflict(seating: Seating, g: int, unit: int, worker: int, leaving: int = EMPTY) -> bool:
    """Whether a seat would put two replicas of a unit on one host while another has none."""
    if not seating.shares_host(g, unit, worker, leaving):
        return False
    if leaving != EMPTY and seating.shares_host(g, unit, leaving, leaving):
        return False  # no worse than it is
    hosts = {int(seating.host_W[w]) for w in seating.holders[g][unit] if w != leaving}
    return len(hosts) < seating.num_hosts


def _swap(seating: Seating, budget: Budget, moves: int) -> None:
    """Swaps and moves, from the worker where a row costs most to where it gains most."""
    share_GS = seating.share_GS()
    tired_W = np.zeros(len(seating.workers), dtype=bool)
    has_moved = False
    for _ in range(_MOST_STEPS):
        if tired_W.all() and has_moved:
            tired_W[:] = has_moved = False  # what others moved may have made room for these
        if tired_W.all() or moves <= 0:
            return
        price_W = np.where(tired_W, -np.inf, seating.price_W())
        worker = int(price_W.argmax())
        if price_W[worker] <= seating.price_W().mean() + budget.slack:
            return
        moved = _swap_away(seating, share_GS, worker, budget.price, moves)
        tired_W[worker] = moved is None
        if moved:
            other, count = moved
            moves -= count
            tired_W[other] = False
            has_moved = True


def _swap_away(
    seating: Seating, share_GS: np.ndarray, worker: int, price: float, moves: int
) -> tuple[int, int] | None:
    """The best swap of one worker: with whom, and how many experts moved; None if none pays."""
    K = seating.seats
    worker_S = np.repeat(np.arange(len(seating.workers)), K)
    price_W = seating.price_W()
    gap_S = price_W[worker] - price_W[worker_S]
    empty_GS = seating.unit_GS == EMPTY
    crowd_GS = np.repeat(seating.crowd_GW, K, axis=1)
    may_GS = ~empty_GS | (
        (crowd_GS < seating.crowd_GW[:, worker, None]) & (seating.room_W > 0)[worker_S]
    )
    may_GS &= gap_S > 0
    may_GS &= np.where(empty_GS, 1, 2) <= moves
    paid_GS = np.where(empty_GS, price, 2 * price)
    for own in range(worker * K, worker * K + K):
        delta_GS = share_GS[:, own, None] - share_GS
        gain_GS = delta_GS * (gap_S - delta_GS / seating.mean_load) - paid_GS
        gain_GS = np.where(may_GS & (delta_GS > 0) & ~empty_GS[:, own, None], gain_GS, -np.inf)
        for _ in range(8):
            g, seat = divmod(int(gain_GS.argmax()), gain_GS.shape[1])
            if gain_GS[g, seat] <= 1e-9:
                break
            other = int(worker_S[seat])
            if count := _try_swap(seating, g, own, seat):
                share_GS[g, [own, seat]] = share_GS[g, [seat, own]]
                return other, count
            gain_GS[g, seat] = -np.inf
    return None


def _try_swap(seating: Seating, g: int, own_seat: int, seat: int) -> int:
    """Swap two seats of a group if the rules allow it. How many experts moved."""
    worker, other = own_seat // seating.seats, seat // seating.seats
    unit, back = int(seating.unit_GS[g, own_seat]), int(seating.unit_GS[g, seat])
    if other in seating.barred.get((g, unit), ()) or worker in seating.barred.get((g, back), ()):
        return 0
    if other in seating.holders[g][unit] or _new_conflict(seating, g, unit, other, worker):
        return 0
    if back != EMPTY and (
        worker in seating.holders[g][back] or _new_conflict(seating, g, back, worker, other)
    ):
        return 0
    if seating.rules.shards > 1 and seating.apart_S(g, own_seat)[seat] < 0:
        return 0
    seating.swap(g, own_seat, seat)
    return 1 if back == EMPTY else 2
