"""Names of experts, here and on the wire."""

from __future__ import annotations

from typing import NamedTuple

from protos import placement_pb2 as pb


class ExpertId(NamedTuple):
    """One MLP of one MoE layer."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs

    def __str__(self) -> str:
        return f"{self.layer}.{self.index}"


def shards_of(message: pb.Plan | pb.WorkerOrder) -> int:
    """Slices that each expert is cut into, 1 where experts are whole.

    With n, an index counts slices: ``expert * n + slice``.
    """
    return max(1, message.expert_shards)


def expert_to_proto(expert: ExpertId) -> pb.ExpertId:
    """As it crosses gRPC."""
    return pb.ExpertId(layer=expert.layer, index=expert.index)


def expert_from_proto(expert: pb.ExpertId) -> ExpertId:
    """As it came over gRPC."""
    return ExpertId(expert.layer, expert.index)
