"""The placement map that gateways route by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from protos import placement_pb2 as pb


class ExpertId(NamedTuple):
    """One MLP of one MoE layer."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


@dataclass(frozen=True)
class Plan:
    """Which workers serve each expert, best first. ``epoch`` orders plans and only grows."""

    epoch: int
    workers_by_expert: Mapping[ExpertId, tuple[str, ...]] = field(default_factory=dict)

    def experts_of(self, worker_id: str) -> list[ExpertId]:
        """The experts a worker serves, ascending."""
        return sorted(e for e, ids in self.workers_by_expert.items() if worker_id in ids)


def expert_to_proto(expert: ExpertId) -> pb.ExpertId:
    """As it crosses gRPC."""
    return pb.ExpertId(layer=expert.layer, index=expert.index)


def expert_from_proto(expert: pb.ExpertId) -> ExpertId:
    """As it came over gRPC."""
    return ExpertId(expert.layer, expert.index)
