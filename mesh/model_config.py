"""One description of a model, whatever family it is from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """What the services need to know of a checkpoint. Made by :func:`from_hf`, never mutated."""

    family: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_model_len: int
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    """Decoder layers that have routed experts, ascending."""
    expert_hidden_size: int
    expert_kind: Literal["gated", "plain"]
    dtype: str
    """Of the checkpoint: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    """Hash of the config and of the weights' index: two processes with different ones don't mix."""
