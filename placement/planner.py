"""Which expert lives on which worker. Pure: values in, a target out.

Every layer is an assignment problem: each expert takes one of a worker's seats, at the cost

    traffic(expert) x link_cost(worker) + move price, if it does not live there yet
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
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from mesh.config import PlacementRule
from mesh.errors import PlacementError
from mesh.plan import ExpertId

REBALANCE_MOVE_PRICE = 1.0
"""In units of an average expert's traffic: a rebalance moves what gains more than that."""
REPAIR_MOVE_PRICE = 1e7
"""Nothing that lives is moved to seat what has no home."""
_CROWDING_PRICE = 1e4
_HOMELESS_PRICE = 1e10
_BUSY_PRICE = 1e3  # above what a link saves, below what a repair may move

_LINK_COST_SAME_HOST = 1.0
_LINK_COST_RDMA = 2.0
_LINK_COST_OTHER = 8.0


@dataclass(frozen=True)
class WorkerSpec:
    """What the planner needs to know of a worker."""

    worker_id: str
    memory_bytes: int
    expert_bytes: int
    """What one expert takes there; depends on the worker's dtype."""
    link_cost: float = 1.0
    """Relative cost of a row's way between the gateways and this worker."""


@dataclass(frozen=True)
class Rules:
    """What no plan may break."""

    layers: tuple[int, ...]
    num_experts: int
    rule: PlacementRule = "per-layer"
    experts_per_worker: int = 1

    @property
    def experts(self) -> list[ExpertId]:
        return [ExpertId(layer, i) for layer in self.layers for i in range(self.num_experts)]

    @property
    def workers_needed(self) -> int:
        """Fewest workers that could do, were memory no matter."""
        if self.rule == "strict":
            return len(self.layers) * self.num_experts
        return -(-self.num_experts // self.experts_per_worker)


@dataclass(frozen=True)
class Target:
    """Where every expert should live. Lists of workers are a seam for replicas; today one each."""

    workers_by_expert: Mapping[ExpertId, tuple[str, ...]] = field(default_factory=dict)
    missing: tuple[ExpertId, ...] = ()
    note: str = ""
    """What a person should know: colocation, a shortage and its remedy."""

    def experts_by_worker(self) -> dict[str, set[ExpertId]]:
        """The other way round; workers without experts are absent."""
        experts_by_worker: dict[str, set[ExpertId]] = {}
        for expert, worker_ids in self.workers_by_expert.items():
            for worker_id in worker_ids:
                experts_by_worker.setdefault(worker_id, set()).add(expert)
        return experts_by_worker


def link_cost(worker_host: str, nics: Collection[str], gateway_hosts: Collection[str]) -> float:
    """Mean over the gateways of the cost of the link to a worker."""
    if not gateway_hosts:
        return _LINK_COST_SAME_HOST
    remote = _LINK_COST_RDMA if nics else _LINK_COST_OTHER
    costs = [_LINK_COST_SAME_HOST if host == worker_host else remote for host in gateway_hosts]
    return sum(costs) / len(costs)


def plan(
    rules: Rules,
    workers: Sequence[WorkerSpec],
    *,
    homes: Mapping[str, Collection[ExpertId]] | None = None,
    traffic: Mapping[ExpertId, float] | None = None,
    move_price: float = REPAIR_MOVE_PRICE,
    partial: bool = False,
) -> Target:
    """The cheapest target within the rules.

    ``homes`` are the experts that each worker has already; ``traffic`` is in any unit, experts
    it does not name count as average. PlacementError, naming what is missing and the remedy,
    when the rules cannot be met; with ``partial``, layer by layer as many experts as can be have a
    home, the busiest first, and the note says the same.
    """
    shortage = _shortage(rules, workers)
    if shortage and not partial:
        raise PlacementError(shortage)
    workers = sorted(workers, key=lambda worker: worker.worker_id)
    if rules.rule == "strict":
        groups, seats = [rules.experts], 1
    else:
        groups = [[ExpertId(layer, i) for i in range(rules.num_experts)] for layer in rules.layers]
        seats = rules.experts_per_worker
    seats = min(seats, max(map(len, groups)))
    room = np.array([w.memory_bytes // w.expert_bytes for w in workers], dtype=np.int64)
    traffic = traffic or {}
    mean_traffic = sum(traffic.values()) / max(len(traffic), 1)
    if mean_traffic == 0:
        traffic, mean_traffic = {}, 1.0
    placed: dict[ExpertId, tuple[str, ...]] = {}
    for done, experts in enumerate(groups):
        weights = np.array([traffic.get(e, mean_traffic) / mean_traffic for e in experts])
        move_cost = _move_cost(experts, workers, homes or {}, move_price)
        cost = weights[:, None] * np.array([w.link_cost for w in workers]) + move_cost
        layers_left = len(groups) - done - 1
        chosen = _assign(cost, weights, room, seats, layers_left, bool(shortage))
        for expert, worker in zip(experts, chosen, strict=True):
            if worker >= 0:
                placed[expert] = (workers[worker].worker_id,)
                room[worker] -= 1
    missing = tuple(e for e in rules.experts if e not in placed)
    notes = [_colocation_note(rules, placed), _missing_note(missing, shortage)]
    return Target(placed, missing, "; ".join(note for note in notes if note))


def _move_cost(
    experts: Sequence[ExpertId],
    workers: Sequence[WorkerSpec],
    homes: Mapping[str, Collection[ExpertId]],
    move_price: float,
) -> np.ndarray:
    row = {expert: i for i, expert in enumerate(experts)}
    cost = np.full((len(experts), len(workers)), move_price)
    for column, worker in enumerate(workers):
        for expert in homes.get(worker.worker_id, ()):
            if expert in row:
                cost[row[expert], column] = 0.0
    return cost


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
    return [int(columns[c]) if c < len(columns) else -1 for c in chosen[:num_experts]]


def _shortage(rules: Rules, workers: Sequence[WorkerSpec]) -> str:
    """Why the rules cannot be met by these workers, and what to do; empty if they can."""
    needed, there = rules.workers_needed, len(workers)
    strict = rules.rule == "strict"
    if there < needed:
        remedies = [f"start {needed - there} more"]
        if strict:
            reason = "one per expert, by the rule strict"
            remedies.append("use --rule per-layer")
        else:
            crowd = rules.experts_per_worker
            reason = (
                "one per expert of a layer" if crowd == 1 else f"{crowd} experts of a layer each"
            )
            if there:
                enough = -(-rules.num_experts // there)
                remedies.append(f"allow colocation with --experts-per-worker {enough}")
        return f"model needs {needed} workers ({reason}), {there} are registered: " + ", or ".join(
            remedies
        )
    most = 1 if strict else rules.experts_per_worker * len(rules.layers)
    num_experts = rules.num_experts * len(rules.layers)
    room = {w.worker_id: min(w.memory_bytes // w.expert_bytes, most) for w in workers}
    short = num_experts - sum(room.values())
    if short <= 0:
        return ""
    smallest = min(workers, key=lambda worker: room[worker.worker_id])
    share = min(-(-num_experts // there), most)
    short_bytes = share * smallest.expert_bytes - smallest.memory_bytes
    return (
        f"workers have memory for {num_experts - short} of {num_experts} experts: "
        f"{smallest.worker_id} is {short_bytes:,} bytes short of its {share} "
        f"({smallest.expert_bytes:,} bytes each, {smallest.memory_bytes:,} bytes there); "
        "give it more with --memory-bytes, or start more workers"
    )


def _colocation_note(rules: Rules, placed: Mapping[ExpertId, tuple[str, ...]]) -> str:
    crowd: dict[tuple[int, str], int] = {}
    for expert, worker_ids in placed.items():
        for worker_id in worker_ids:
            crowd[expert.layer, worker_id] = crowd.get((expert.layer, worker_id), 0) + 1
    most = max(crowd.values(), default=0)
    if most <= 1:
        return ""
    return (
        f"colocated: a worker holds up to {most} of the {rules.num_experts} experts of a layer; "
        f"{rules.num_experts} workers would hold one each"
    )


def _missing_note(missing: Sequence[ExpertId], shortage: str) -> str:
    if not missing:
        return ""
    named = ", ".join(str(expert) for expert in missing[:8])
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"nobody serves {named}{more} (layer.expert): {shortage}"
