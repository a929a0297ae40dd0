"""Who sits where while a target is being made: mutable, and always within the rules.

What is seated is a group of units at a time: the units of a layer, or by the rule ``strict`` all
there are. Arrays are G groups x N units, or G groups x S seats, K seats of each of W workers side
by side. A unit's weight is its traffic in units of the mean unit's; workers that hold a unit share
it evenly.

Everything is judged by one cost, which is linear in where rows go and quadratic in who is busy:

    sum over seats of share x link_cost  +  sum over workers of load^2 / (2 x mean load)

:meth:`Seating.price_W` is its derivative: what one more row would cost on each worker.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from mesh.plan import ExpertId
from placement.rules import Rules, Target, WorkerSpec

EMPTY = -1


class Seating:
    """Seats of workers and the units on them."""

    def __init__(
        self,
        rules: Rules,
        workers: Sequence[WorkerSpec],
        traffic: Mapping[ExpertId, float],
        barred: Mapping[str, Collection[ExpertId]],
    ) -> None:
        self.rules = rules
        self.workers = sorted(workers, key=lambda worker: worker.worker_id)
        self.groups, self._place = _groups(rules)
        seats = 1 if rules.rule == "strict" else rules.experts_per_worker
        self.num_units = len(self.groups[0])
        self.seats = min(seats, self.num_units)
        """Of one worker in one group."""
        self.index_W = {w.worker_id: i for i, w in enumerate(self.workers)}
        self.barred: dict[tuple[int, int], set[int]] = {}
        """Workers that are not to have a unit of a group while anybody else can."""
        for worker_id in barred.keys() & self.index_W.keys():
            for unit in barred[worker_id]:
                place = divmod(self._place[unit], self.num_units)
                self.barred.setdefault(place, set()).add(self.index_W[worker_id])
        self.link_W = np.array([w.link_cost for w in self.workers])
        self.doubted_W = np.array([w.doubted for w in self.workers], dtype=np.bool_)
        self.room_W = np.array([rules.room(w) for w in self.workers], dtype=np.int64)
        """Units that still fit into each worker's memory."""
        hosts = sorted({w.host for w in self.workers})
        self.host_W = np.array([hosts.index(w.host) for w in self.workers], dtype=np.int64)
        self.num_hosts = len(hosts)
        self.weight_GN = self._weights(traffic)
        self.unit_GS = np.full((len(self.groups), len(self.workers) * self.seats), EMPTY)
        self.crowd_GW = np.zeros((len(self.groups), len(self.workers)), dtype=np.int64)
        self.holders: list[list[list[int]]] = [[[] for _ in group] for group in self.groups]
        """The workers of each unit of each group."""
        self.load_W = np.zeros(len(self.workers))
        self.mean_load = max(float(self.weight_GN.sum()) / max(len(self.workers), 1), 1e-9)

    def _weights(self, traffic: Mapping[ExpertId, float]) -> np.ndarray:
        mean = sum(traffic.values()) / max(len(traffic), 1)
        if mean <= 0:
            return np.ones((len(self.groups), self.num_units))
        rates = [[traffic.get(unit, mean) for unit in group] for group in self.groups]
        return np.array(rates) / mean

    def price_W(self, load_W: np.ndarray | None = None) -> np.ndarray:
        """What one more row would cost on each worker."""
        return self.link_W + (self.load_W if load_W is None else load_W) / self.mean_load

    def share(self, group: int, unit: int) -> float:
        """What each worker of a unit carries of it; all of it where there is none."""
        return float(self.weight_GN[group, unit]) / max(len(self.holders[group][unit]), 1)

    def share_GS(self) -> np.ndarray:
        """What each seat carries."""
        counts = np.array([[len(at) for at in group] for group in self.holders])
        share_GN = self.weight_GN / np.maximum(counts, 1)
        shares = np.take_along_axis(share_GN, np.maximum(self.unit_GS, 0), axis=1)
        return np.where(self.unit_GS == EMPTY, 0.0, shares)

    def put(self, group: int, unit: int, worker: int) -> None:
        """Seat a unit on a worker that has a seat and room for it."""
        start = worker * self.seats
        seats = self.unit_GS[group, start : start + self.seats]
        seats[int(np.argmax(seats == EMPTY))] = unit
        self._change_holders(group, unit, [*self.holders[group][unit], worker])
        self.crowd_GW[group, worker] += 1
        self.room_W[worker] -= 1

    def take(self, group: int, unit: int, worker: int) -> None:
        """The other way round."""
        start = worker * self.seats
        seats = self.unit_GS[group, start : start + self.seats]
        seats[int(np.argmax(seats == unit))] = EMPTY
        rest = [w for w in self.holders[group][unit] if w != worker]
        self._change_holders(group, unit, rest)
        self.crowd_GW[group, worker] -= 1
        self.room_W[worker] += 1

    def _change_holders(self, group: int, unit: int, holders: list[int]) -> None:
        for holder in self.holders[group][unit]:
            self.load_W[holder] -= self.share(group, unit)
        self.holders[group][unit] = holders
        for holder in holders:
            self.load_W[holder] += self.share(group, unit)

    def swap(self, group: int, seat: int, other: int) -> None:
        """Exchange what sits on two seats of different workers; the other seat may be empty."""
        for unit, old, new in (
            (int(self.unit_GS[group, seat]), seat // self.seats, other // self.seats),
            (int(self.unit_GS[group, other]), other // self.seats, seat // self.seats),
        ):
            if unit != EMPTY:
                rest = [w for w in self.holders[group][unit] if w != old]
                self._change_holders(group, unit, [*rest, new])
                self.crowd_GW[group, [old, new]] += (-1, 1)
                self.room_W[[old, new]] += (1, -1)
        self.unit_GS[group, [seat, other]] = self.unit_GS[group, [other, seat]]

    def shares_host(self, group: int, unit: int, worker: int, leaving: int = EMPTY) -> bool:
        """Whether another worker than ``leaving``, on the host of ``worker``, has the unit."""
        host = self.host_W[worker]
        return any(
            self.host_W[holder] == host and holder != leaving
            for holder in self.holders[group][unit]
        )

    def slices_EW(self, group: int) -> np.ndarray:
        """How many slices of each expert of a group each worker has."""
        counts_EW = np.zeros((self.num_units // self.rules.shards, len(self.workers)), np.int64)
        seats = np.flatnonzero(self.unit_GS[group] != EMPTY)
        expert_of = self.unit_GS[group, seats] // self.rules.shards
        np.add.at(counts_EW, (expert_of, seats // self.seats), 1)
        return counts_EW

    def apart_S(self, group: int, seat: int) -> np.ndarray:
        """By seat: how much further apart the slices of experts would be if what sits on ``seat``
        and there changed places, as half of what the sum of :meth:`slices_EW` squared loses."""
        slices_EW = self.slices_EW(group)
        expert_S = self.unit_GS[group] // self.rules.shards  # of EMPTY that is EMPTY
        worker_S = np.arange(len(expert_S)) // self.seats
        expert, worker = expert_S[seat], worker_S[seat]
        away_S = slices_EW[expert, worker] - slices_EW[expert, worker_S] - 1
        back_S = slices_EW[expert_S, worker_S] - slices_EW[expert_S, worker] - 1
        apart_S = away_S + np.where(expert_S == EMPTY, 0, back_S)
        return np.where((expert_S == expert) | (worker_S == worker), 0, apart_S)

    def keep(self, homes: Mapping[str, Collection[ExpertId]]) -> None:
        """Seat what lives already where it does, as far as the rules go: of every unit one home
        first, those that have no choice before the others; then replicas, where they crowd nobody.
        """
        holders: dict[int, list[int]] = {}
        for worker_id in sorted(homes.keys() & self.index_W.keys()):
            w = self.index_W[worker_id]
            for unit in homes[worker_id]:
                holders.setdefault(self._place[unit], []).append(w)
        for (g, i), barred in self.barred.items():
            place = g * self.num_units + i
            if at := [w for w in holders.pop(place, ()) if w not in barred]:
                holders[place] = at
        if self._keep_all(holders):
            return
        living = sorted(
            (len(at), *divmod(place, self.num_units), at) for place, at in holders.items()
        )
        for _, g, i, at in living:
            fits = [w for w in at if self.crowd_GW[g, w] < self.seats and self.room_W[w] > 0]
            if fits:
                self.put(g, i, min(fits, key=lambda w: (self.crowd_GW[g, w], self.link_W[w], w)))
        for count, g, i, at in living:
            if count > 1 and self.holders[g][i]:
                for w in at:
                    if self.crowd_GW[g, w] == 0 and self.room_W[w] > 0:
                        self.put(g, i, w)

    def _keep_all(self, holders: Mapping[int, list[int]]) -> bool:
        """Seat all of them at once, if that is within the rules: the usual case, and fast."""
        if not holders:
            return True
        places = np.fromiter(holders, dtype=np.int64, count=len(holders))
        counts = np.fromiter(map(len, holders.values()), dtype=np.int64, count=len(holders))
        w_H = np.array([w for at in holders.values() for w in at])
        g_H, i_H = np.divmod(np.repeat(places, counts), self.num_units)
        count_H = np.repeat(counts, counts)
        crowd_GW = np.zeros_like(self.crowd_GW)
        np.add.at(crowd_GW, (g_H, w_H), 1)
        used_W = crowd_GW.sum(axis=0)
        if (
            self.seats > 1
            or (used_W > self.room_W).any()
            or (crowd_GW > self.seats).any()
            or ((count_H > 1) & (crowd_GW[g_H, w_H] > 1)).any()
        ):
            return False
        self.unit_GS[g_H, w_H] = i_H
        self.crowd_GW += crowd_GW
        self.room_W -= used_W
        np.add.at(self.load_W, w_H, self.weight_GN[g_H, i_H] / count_H)
        for place, at in holders.items():
            g, i = divmod(place, self.num_units)
            self.holders[g][i] = at
        return True

    def keep_replicas(
        self, residents: Mapping[str, Collection[ExpertId]], max_replicas: int
    ) -> None:
        """Make replicas of what workers still have and need not hold, where they crowd nobody."""
        is_spare_W = (self.crowd_GW == 0).any(axis=0) & (self.room_W > 0)
        for worker_id in sorted(residents.keys() & self.index_W.keys()):
            w = self.index_W[worker_id]
            if not is_spare_W[w]:
                continue
            for unit in sorted(residents[worker_id]):
                g, i = divmod(self._place[unit], self.num_units)
                at = self.holders[g][i]
                few = not max_replicas or len(at) < max_replicas
                if w in self.barred.get((g, i), ()):
                    continue
                if at and few and self.crowd_GW[g, w] == 0 and self.room_W[w] > 0:
                    self.put(g, i, w)

    def homeless(self, group: int) -> list[int]:
        """Units of a group that sit nowhere."""
        return [i for i, at in enumerate(self.holders[group]) if not at]

    def target(self) -> Target:
        """As it stands: workers of a unit best first, so the nearest to the gateways."""
        ids = [w.worker_id for w in self.workers]
        rank = np.lexsort((np.arange(len(ids)), self.link_W)).argsort().tolist()
        placed: dict[ExpertId, tuple[str, ...]] = {}
        missing: list[ExpertId] = []
        for group, holders in zip(self.groups, self.holders, strict=True):
            for unit, at in zip(group, holders, strict=True):
                if len(at) == 1:
                    placed[unit] = (ids[at[0]],)
                elif at:
                    placed[unit] = tuple(ids[w] for w in sorted(at, key=rank.__getitem__))
                else:
                    missing.append(unit)
        return Target(placed, tuple(missing), shards=self.rules.shards)


@functools.lru_cache(maxsize=2)
def _groups(rules: Rules) -> tuple[list[list[ExpertId]], dict[ExpertId, int]]:
    """The units of each group, and the place of each among all, one group after another."""
    per_layer = [
        [ExpertId(layer, i) for i in range(rules.units_per_layer)] for layer in rules.layers
    ]
    units = [unit for layer in per_layer for unit in layer]
    groups = [units] if rules.rule == "strict" else per_layer
    return groups, {unit: place for place, unit in enumerate(units)}
