"""Which expert lives on which worker. Pure: values in, a target out.

Every layer is an assignment problem: each expert takes one of a worker's seats, at the cost

    traffic(expert) x (link_cost(worker) + how busy other layers keep the worker)
    + crowding price x seat number, so that colocation is the least crowded there is

and ``scipy.optimize.linear_sum_assignment`` finds the cheapest assignment exactly. The rule
``strict`` (one expert in all) is the same problem with all layers in one.

Device memory ties the layers together: a seat that a cheap layer takes on a small worker may be
the one that a later layer cannot do without. So each layer is solved under one more constraint,
which is exact and needs no search. Let a worker have room for c experts and K seats a layer, and
let R layers of E experts follow. They can use min(c, K R) of its room; the seats that this layer
takes of the rest are free, every further one is taken from them. By max-flow min-cut they can be
seated if and only if every j of them can, sum over workers of min(c, K j) >= E j, which is
concave in j and zero at j = 0, so that j = R decides. Hence this layer may take
``sum of min(c, K R) - E R`` seats that are not free; dummy rows occupy the others.

Slices of one expert are to be on different workers. An assignment prices single seats and cannot
say that, so that behind it slices that are new where they sit change places, which leaves crowding
and memory as they are.

What lives stays where it is: only what has no home is seated, the same way, and only if the
memory of the others leaves it no seat are the layers solved anew, at a price for every move. Then
workers that a layer leaves empty take replicas of its busiest experts. To move what lives for the
sake of balance takes a :class:`~placement.improve.Budget`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from mesh.errors import PlacementError
from mesh.plan import ExpertId
from placement.improve import FREE, Budget, improve
from placement.rules import Rules, Target, WorkerSpec, shortage
from placement.seating import EMPTY, Seating

_MOVE_PRICE = 1e7
"""Nothing that lives is moved but to seat what has no home."""
_CROWDING_PRICE = 1e4
_BESIDE_PRICE = 3e3
"""Of a seat beside another slice of the same expert: below crowding, above what a link saves."""
_HOMELESS_PRICE = 1e10
_BARRED_PRICE = 1e9
"""Of a seat that its unit is not to have: above everything but having none."""
_BUSY_PRICE = 1e3  # above what a link saves, below what a repair may move
_EVICTION_PRICE = 1e5
"""Of a replica, to make room for what has no home: above crowding, below moving what lives."""
_DOUBT_PRICE = 1e6
"""Of a seat on a worker that may be cut off: above taking a replica's elsewhere."""


def plan(
    rules: Rules,
    workers: Sequence[WorkerSpec],
    *,
    homes: Mapping[str, Collection[ExpertId]] | None = None,
    residents: Mapping[str, Collection[ExpertId]] | None = None,
    traffic: Mapping[ExpertId, float] | None = None,
    barred: Mapping[str, Collection[ExpertId]] | None = None,
    max_replicas: int = 0,
    budget: Budget | None = None,
    partial: bool = False,
) -> Target:
    """The cheapest target within the rules.

    ``homes`` are the experts that live on each worker already, ``residents`` those that it
    has in its memory for whatever reason; ``traffic`` is in any unit, experts it does not name
    count as average. ``barred`` are experts that a worker is not to have unless nobody else can:
    they do not live there, but nothing that lives anywhere is moved for them. At most
    ``max_replicas`` workers hold one expert, 0: as many as there are seats. What lives is moved
    for balance as far as ``budget`` goes; where nothing lives yet it is free to. PlacementError,
    naming what is missing and the remedy, when the rules cannot be met; with ``partial``, layer
    by layer as many experts as can be have a home, the busiest first, and the note says the same.
    """
    short = shortage(rules, workers)
    if short and not partial:
        raise PlacementError(short)
    seating = Seating(rules, workers, traffic or {}, barred or {})
    seating.keep(homes or {})
    living = [[tuple(at) for at in holders] for holders in seating.holders]
    is_new = not any(at for holders in seating.holders for at in holders)
    if is_new or not _seat_homeless(seating):
        seating = _seat_anew(seating, traffic or {}, barred or {}, bool(short), max_replicas)
    if rules.shards > 1:
        _spread(seating, living)
    _trim(seating, max_replicas)
    seating.keep_replicas(residents or {}, max_replicas)
    _replicate(seating, max_replicas)
    if is_new or budget:
        improve(seating, FREE if is_new else budget or FREE, max_replicas)
    for g, i in sorted(seating.barred):
        _leave_barred(seating, g, i)
    target = seating.target()
    notes = [_colocation_note(rules, seating), _missing_note(target.missing, short)]
    return replace(target, note="; ".join(note for note in notes if note))


def _seat_homeless(seating: Seating) -> bool:
    """Seat what sits nowhere, moving nothing but replicas. False when moving more would seat more.

    Where a worker's only seat or room is taken by the replica of another expert, this goes.
    """
    extra_W: list[set[tuple[int, int]]] = [set() for _ in seating.workers]
    for g, holders in enumerate(seating.holders):
        for i, at in enumerate(holders):
            if len(at) > 1:
                first = min(at, key=lambda w: (seating.link_W[w], w))
                for w in at:
                    if w != first:
                        extra_W[w].add((g, i))
    num_extra_W = np.array([len(extra) for extra in extra_W])
    most_W = seating.room_W + seating.crowd_GW.sum(axis=0)
    seatable = min(seating.num_units, int(np.minimum(most_W, seating.seats).sum()))
    for g in range(len(seating.groups)):
        homeless = seating.homeless(g)
        if not homeless:
            continue
        may_seat = len(homeless) - (seating.num_units - seatable)
        if _seat_homeless_of(seating, g, homeless, extra_W, num_extra_W) < may_seat:
            return False
    return True


def _seat_homeless_of(
    seating: Seating,
    group: int,
    homeless: list[int],
    extra_W: list[set[tuple[int, int]]],
    num_extra_W: np.ndarray,
) -> int:
    """Of one group; how many. ``extra_W`` are the replicas of each worker that may go."""
    room_W = seating.room_W + num_extra_W
    crowd_W = seating.crowd_GW[group]
    free_W = np.clip(np.minimum(seating.seats - crowd_W, room_W), 0, None)
    columns = np.repeat(np.arange(len(free_W)), free_W).tolist()
    numbers = np.concatenate([np.arange(count) for count in [0, *free_W[free_W > 0]]])
    prices = (_CROWDING_PRICE * (crowd_W[columns] + numbers)).tolist()
    for w in np.flatnonzero((free_W == 0) & (room_W > 0) & (num_extra_W > 0)).tolist():
        for _, i in [e for e in extra_W[w] if e[0] == group]:
            weight, count = seating.weight_GN[group, i], len(seating.holders[group][i])
            columns.append(w)
            prices.append(_EVICTION_PRICE + weight / (count - 1))
    if not columns:
        return 0
    column_w = np.array(columns)
    price = np.array(prices) + np.where(seating.room_W[column_w] > 0, 0.0, _EVICTION_PRICE)
    price += np.where(seating.doubted_W[column_w], _DOUBT_PRICE, 0.0)
    weights = seating.weight_GN[group, homeless]
    table = weights[:, None] * seating.price_W()[column_w] + price
    if seating.rules.shards > 1:
        experts = np.array(homeless) // seating.rules.shards
        table += _BESIDE_PRICE * seating.slices_EW(group)[experts][:, column_w]
    for row, unit in enumerate(homeless):
        table[row, np.isin(column_w, list(seating.barred.get((group, unit), ())))] += _BARRED_PRICE
    if len(homeless) > len(columns):
        stay = np.repeat(_HOMELESS_PRICE + _BUSY_PRICE * weights[:, None], len(homeless), axis=1)
        table = np.hstack([table, stay])
    rows, chosen = linear_sum_assignment(table)
    seated = 0
    for row, c in zip(rows.tolist(), chosen.tolist(), strict=True):
        if c < len(columns):
            seated += _take_over(seating, group, homeless[row], columns[c], extra_W, num_extra_W)
    return seated


def _take_over(
    seating: Seating,
    group: int,
    unit: int,
    worker: int,
    extra_W: list[set[tuple[int, int]]],
    num_extra_W: np.ndarray,
) -> bool:
    """Seat a unit on a worker, in place of a replica where it must be."""
    crowded = seating.crowd_GW[group, worker] == seating.seats
    if crowded or seating.room_W[worker] == 0:
        may_go = [e for e in extra_W[worker] if e[0] == group or not crowded]
        if not may_go:
            return False
        least = min(may_go, key=lambda e: (seating.share(*e), e))
        extra_W[worker].remove(least)
        num_extra_W[worker] -= 1
        seating.take(*least, worker)
    seating.put(group, unit, worker)
    return True


def _seat_anew(
    old: Seating,
    traffic: Mapping[ExpertId, float],
    barred: Mapping[str, Collection[ExpertId]],
    partial: bool,
    max_replicas: int,
) -> Seating:
    """Every layer solved exactly, at a price for each move; replicas stay where they still fit."""
    seating = Seating(old.rules, old.workers, traffic, barred)
    share_GN = seating.weight_GN / _expected_holders(seating, max_replicas)
    load_W = np.zeros(len(seating.workers))
    room_W = seating.room_W.copy()
    for g in range(len(seating.groups)):
        move_NW = np.full((seating.num_units, len(seating.workers)), _MOVE_PRICE)
        for i, at in enumerate(old.holders[g]):
            move_NW[i, at] = 0.0
            move_NW[i, list(seating.barred.get((g, i), ()))] = _BARRED_PRICE
        cost = share_GN[g][:, None] * seating.price_W(load_W) + move_NW
        layers_left = len(seating.groups) - g - 1
        chosen = _assign(cost, share_GN[g], room_W, seating.seats, layers_left, partial)
        for i, w in enumerate(chosen):
            if w != EMPTY:
                seating.put(g, i, w)
                load_W[w] += share_GN[g, i]
                room_W[w] -= 1
    for g, holders in enumerate(old.holders):
        for i, at in enumerate(holders):
            for w in at:
                free = seating.crowd_GW[g, w] == 0 and seating.room_W[w] > 0
                if free and seating.holders[g][i]:
                    seating.put(g, i, w)
    return seating


def _spread(seating: Seating, living: Sequence[Sequence[Sequence[int]]]) -> None:
    """Have slices that are new where they sit change places within a layer, so that those of one
    expert are on different workers: together, they take as long as the expert uncut."""
    for g, holders in enumerate(seating.holders):
        slices_EW = seating.slices_EW(g)
        if seating.seats == 1 or slices_EW.max() < 2:
            continue
        worker_S = np.arange(seating.unit_GS.shape[1]) // seating.seats
        is_new_S = np.array(
            [
                unit != EMPTY and holders[unit] == [w] and w not in living[g][unit]
                for unit, w in zip(seating.unit_GS[g].tolist(), worker_S.tolist(), strict=True)
            ]
        )
        barred_NW = np.zeros((seating.num_units, len(seating.workers)), dtype=np.bool_)
        for i in range(seating.num_units):
            barred_NW[i, list(seating.barred.get((g, i), ()))] = True
        seats = deque(np.flatnonzero(is_new_S).tolist())
        while seats:
            seat = seats.popleft()
            unit, worker = int(seating.unit_GS[g, seat]), seat // seating.seats
            if slices_EW[unit // seating.rules.shards, worker] < 2:
                continue
            unit_S = seating.unit_GS[g]
            may_S = is_new_S & ~barred_NW[unit, worker_S] & ~barred_NW[unit_S, worker]
            apart_S = np.where(may_S, seating.apart_S(g, seat), 0)
            most = int(apart_S.max())
            if most <= 0:
                continue
            best = np.flatnonzero(apart_S == most)
            weight_N = seating.weight_GN[g]
            other = int(best[np.abs(weight_N[unit_S[best]] - weight_N[unit]).argmin()])
            seating.swap(g, seat, other)
            slices_EW = seating.slices_EW(g)
            seats += [seat, other]


def _expected_holders(seating: Seating, max_replicas: int) -> np.ndarray:
    """How many workers each unit of each group will have, once replicas are seated."""
    counts_GN = np.ones((len(seating.groups), seating.num_units), dtype=np.int64)
    spare = min(
        max(len(seating.workers) - seating.num_units, 0),
        max(int(seating.room_W.sum()) // len(seating.groups) - seating.num_units, 0),
    )
    most = max_replicas or len(seating.workers)
    for weight_N, count_N in zip(seating.weight_GN, counts_GN, strict=True):
        for _ in range(spare):
            share_N = np.where(count_N < most, weight_N / count_N, -1.0)
            busiest = int(share_N.argmax())
            if share_N[busiest] < 0:
                break
            count_N[busiest] += 1
    return counts_GN


def _assign(
    cost: np.ndarray,
    weights: np.ndarray,
    room: np.ndarray,
    seats: int,
    layers_left: int,
    partial: bool,
) -> list[int]:
    """The worker of each expert of one layer, -1 for none. See the module for the constraint."""
    num_experts = len(cost)
    seats_here = np.minimum(room, seats)
    columns = np.repeat(np.arange(len(room)), seats_here)
    numbers = np.concatenate([np.arange(count) for count in [0, *seats_here]])
    table = cost[:, columns] + _CROWDING_PRICE * numbers
    if partial:
        homeless = np.repeat(_HOMELESS_PRICE + _BUSY_PRICE * weights[:, None], num_experts, axis=1)
        table = np.hstack([table, homeless])
    else:
        later = np.minimum(room, seats * layers_left)
        costly = numbers >= (room - later)[columns]
        may_take = int(later.sum()) - num_experts * layers_left
        num_dummies = max(int(costly.sum()) - may_take, 0)
        dummy = np.where(costly, 0.0, np.inf)
        table = np.vstack([table, np.repeat(dummy[None], num_dummies, axis=0)])
    _, chosen = linear_sum_assignment(table)
    return [int(columns[c]) if c < len(columns) else EMPTY for c in chosen[:num_experts]]


def _trim(seating: Seating, max_replicas: int) -> None:
    """Take away what is beyond ``max_replicas``, from the busiest workers first."""
    if not max_replicas:
        return
    for g, holders in enumerate(seating.holders):
        for i in range(len(holders)):
            while len(seating.holders[g][i]) > max_replicas:
                price_W = seating.price_W()
                worst = max(seating.holders[g][i], key=lambda w: (price_W[w], w))
                seating.take(g, i, worst)


def _replicate(seating: Seating, max_replicas: int) -> None:
    """Give workers that a layer leaves empty replicas of what is busiest there per worker.

    On a host that has the expert only once nothing else is left for the seat; a worker that holds
    anything of a layer takes no replica of it, so that replicas never crowd.
    """
    if len(seating.workers) <= seating.num_units or max_replicas == 1:
        return
    empty_GW = seating.crowd_GW == 0
    waiting: list[tuple[float, int, int]] = []
    for g in np.flatnonzero(empty_GW.any(axis=1)).tolist():
        shares = [seating.share(g, i) for i in range(seating.num_units)]
        waiting += [(-shares[i], g, i) for i, at in enumerate(seating.holders[g]) if at]
    for may_share_host in (False, True):
        heapq.heapify(waiting)
        put_off: list[tuple[float, int, int]] = []
        while waiting:
            entry = heapq.heappop(waiting)
            _, g, i = entry
            at = seating.holders[g][i]
            if max_replicas and len(at) >= max_replicas:
                continue
            may_W = empty_GW[g] & (seating.room_W > 0)
            may_W[list(seating.barred.get((g, i), ()))] = False
            if not may_W.any():
                continue
            elsewhere_W = may_W & ~np.isin(seating.host_W, seating.host_W[at])
            if elsewhere_W.any():
                may_W = elsewhere_W
            elif not may_share_host and len(set(seating.host_W[at])) < seating.num_hosts:
                put_off.append(entry)
                continue
            w = int(np.where(may_W, seating.price_W(), np.inf).argmin())
            seating.put(g, i, w)
            empty_GW[g, w] = False
            heapq.heappush(waiting, (-seating.share(g, i), g, i))
        waiting = put_off


def _leave_barred(seating: Seating, g: int, i: int) -> None:
    """Take a unit from who is barred from it, if another has it now, or a seat for it: replicas
    that came last may have made others take a seat twice."""
    barred = seating.barred[g, i]
    at = seating.holders[g][i]
    if at and barred.issuperset(at):
        seats = [w for w in _free_seats(seating, g) if w not in barred]
        if seats:
            seating.put(g, i, min(seats, key=lambda w: (seating.crowd_GW[g, w], w)))
        else:
            extra = [
                (seating.share(g, j), j, w)
                for j, others in enumerate(seating.holders[g])
                if len(set(others) - seating.barred.get((g, j), set())) > 1
                for w in others
                if w not in barred
            ]
            if not extra:
                return
            _, j, w = min(extra)
            seating.take(g, j, w)
            seating.put(g, i, w)
    well = set(seating.holders[g][i]) - barred
    for w in barred.intersection(seating.holders[g][i]) if well else ():
        seating.take(g, i, w)


def _free_seats(seating: Seating, g: int) -> list[int]:
    """Workers that can take one more of a group."""
    free_W = (seating.crowd_GW[g] < seating.seats) & (seating.room_W > 0)
    return [int(w) for w in np.flatnonzero(free_W)]


def _colocation_note(rules: Rules, seating: Seating) -> str:
    per_layer_W = seating.crowd_GW
    if rules.rule == "strict" or not per_layer_W.size or int(per_layer_W.max()) <= 1:
        return ""
    units = rules.units_per_layer
    unit = "experts" if rules.shards == 1 else "slices of experts"
    return (
        f"colocated: a worker holds up to {int(per_layer_W.max())} of the {units} {unit} of a "
        f"layer; {units} workers would hold one each"
    )


def _missing_note(missing: Sequence[ExpertId], short: str) -> str:
    if not missing:
        return ""
    named = ", ".join(str(expert) for expert in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"nobody serves {named}{more} (layer.expert): {short}"
