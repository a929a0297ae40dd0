"""What no plan may break, what a plan is, and the words for a mesh that is too small. Pure."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mesh.config import PlacementRule
from mesh.errors import PlacementError
from mesh.plan import ExpertId
from mesh.wire import MAX_EXPERTS


@dataclass(frozen=True)
class WorkerSpec:
    """What the planner needs to know of a worker."""

    worker_id: str
    memory_bytes: int
    expert_bytes: int
    """What one whole expert takes there; depends on the worker's dtype."""
    link_cost: float = 1.0
    """Relative cost of a row's way between the gateways and this worker."""
    host: str = ""
    doubted: bool = False
    """It may not be within reach: what has no home goes there last."""


@dataclass(frozen=True)
class Rules:
    """What no plan may break.

    With ``shards`` n > 1 each expert is n slices of its hidden dimension, every slice is a unit of
    its own, and an :class:`ExpertId` counts units: its index is expert * n + slice.
    """

    layers: tuple[int, ...]
    num_experts: int
    """Of a layer, whole ones."""
    rule: PlacementRule = "per-layer"
    experts_per_worker: int = 1
    shards: int = 1

    @property
    def units_per_layer(self) -> int:
        """What is to be seated of each layer."""
        return self.num_experts * self.shards

    @property
    def experts(self) -> list[ExpertId]:
        """Every unit, ascending."""
        return [ExpertId(layer, i) for layer in self.layers for i in range(self.units_per_layer)]

    @property
    def workers_needed(self) -> int:
        """Fewest workers that could do, were memory no matter."""
        if self.rule == "strict":
            return len(self.layers) * self.units_per_layer
        return -(-self.units_per_layer // self.experts_per_worker)

    def unit_bytes(self, worker: WorkerSpec) -> int:
        """What one unit takes on a worker."""
        return -(-worker.expert_bytes // self.shards)

    def room(self, worker: WorkerSpec) -> int:
        """How many units a worker's memory holds."""
        return worker.memory_bytes // self.unit_bytes(worker)


@dataclass(frozen=True)
class Target:
    """Where every unit should live: on one worker, or on several that share its rows, the best
    first."""

    workers_by_expert: Mapping[ExpertId, tuple[str, ...]] = field(default_factory=dict)
    missing: tuple[ExpertId, ...] = ()
    note: str = ""
    """What a person should know: colocation, a shortage and its remedy."""
    shards: int = 1
    """Slices of an expert, which the ids count."""

    def experts_by_worker(self) -> dict[str, frozenset[ExpertId]]:
        """The other way round; workers without experts are absent."""
        return dict(self._experts_by_worker)

    @functools.cached_property
    def _experts_by_worker(self) -> dict[str, frozenset[ExpertId]]:
        experts_by_worker: dict[str, list[ExpertId]] = {}
        for expert, worker_ids in self.workers_by_expert.items():
            for worker_id in worker_ids:
                experts_by_worker.setdefault(worker_id, []).append(expert)
        return {w: frozenset(experts) for w, experts in experts_by_worker.items()}

    def loads(self, traffic: Mapping[ExpertId, float]) -> dict[str, float]:
        """Of each worker that holds anything, where replicas share rows evenly."""
        loads: dict[str, float] = {}
        for expert, worker_ids in self.workers_by_expert.items():
            share = traffic.get(expert, 0.0) / len(worker_ids)
            for worker_id in worker_ids:
                loads[worker_id] = loads.get(worker_id, 0.0) + share
        return loads


def shortage(rules: Rules, workers: Sequence[WorkerSpec]) -> str:
    """Why the rules cannot be met by these workers, and what to do; empty if they can."""
    needed, there = rules.workers_needed, len(workers)
    strict = rules.rule == "strict"
    unit = "expert" if rules.shards == 1 else "slice"
    if there < needed:
        remedies = [f"start {needed - there} more"]
        if strict:
            reason = f"one per {unit}, by the rule strict"
            remedies.append("use --rule per-layer")
        else:
            crowd = rules.experts_per_worker
            reason = (
                f"one per {unit} of a layer" if crowd == 1 else f"{crowd} {unit}s of a layer each"
            )
            if there:
                enough = -(-rules.units_per_layer // there)
                remedies.append(f"allow colocation with --experts-per-worker {enough}")
        if rules.shards > 1:
            reason += f", each expert cut into {rules.shards}"
        return f"model needs {needed} workers ({reason}), {there} are registered: " + ", or ".join(
            remedies
        )
    most = 1 if strict else rules.experts_per_worker * len(rules.layers)
    num_units = rules.units_per_layer * len(rules.layers)
    room = {w.worker_id: min(rules.room(w), most) for w in workers}
    short = num_units - sum(room.values())
    if short <= 0:
        return ""
    smallest = min(workers, key=lambda worker: room[worker.worker_id])
    share = min(-(-num_units // there), most)
    unit_bytes = rules.unit_bytes(smallest)
    short_bytes = share * unit_bytes - smallest.memory_bytes
    return (
        f"workers have memory for {num_units - short} of {num_units} {unit}s: "
        f"{smallest.worker_id} is {short_bytes:,} bytes short of its {share} "
        f"({unit_bytes:,} bytes each, {smallest.memory_bytes:,} bytes there); "
        "give it more with --memory-bytes, or start more workers"
    )


def choose_shards(rules: Rules, workers: Sequence[WorkerSpec], hidden_size: int) -> int:
    """Into how many slices to cut each expert: as few as these workers can hold.

    1 where one worker's memory holds an expert whole. ``hidden_size`` is the experts' own, which
    the number divides. PlacementError, with the remedy, when no number would do.
    """
    if not workers or any(w.memory_bytes >= w.expert_bytes for w in workers):
        return 1
    largest = max(workers, key=lambda worker: worker.memory_bytes / worker.expert_bytes)
    trouble = ""
    for shards in possible_shards(rules.num_experts, hidden_size):
        cut = replace(rules, shards=shards)
        if (reason := shortage(cut, workers)) == "":
            return shards
        if not trouble and cut.room(largest):
            trouble = reason
    raise PlacementError(
        f"no worker holds an expert of {largest.expert_bytes:,} bytes whole (the largest has "
        f"{largest.memory_bytes:,}), nor can these seat its slices: "
        + (trouble or "give them more with --memory-bytes")
    )


def possible_shards(num_experts: int, hidden_size: int) -> list[int]:
    """The numbers of slices that a model's experts can be cut into, ascending."""
    most = min(hidden_size, MAX_EXPERTS // num_experts)
    return [n for n in range(1, most + 1) if hidden_size % n == 0]
