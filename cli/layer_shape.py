"""What ``expert-mesh bench layer`` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What is measured."""

    hidden: int
    mlp_hidden: int
    kind: str
    num_experts: int
    top_k: int
    workers: int
    device: str
    dtype: str
