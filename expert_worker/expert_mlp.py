"""Read one routed expert from a checkpoint, whichever way its family stores it.

Legend: D hidden size of the model, H hidden size of the expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh.checkpoint import Checkpoint
from mesh.mlp import ClampedMlp, GatedMlp, Mlp, load_gated, load_plain
from mesh.model_config import ModelConfig, SwigluClamp

_MIXTRAL = ("w1.weight", "w3.weight", "w2.weight")
_GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
_PLAIN = ("up_proj.weight", "down_proj.weight")


def load_expert(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    index: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Mlp:
    """One expert in memory of its own; of fused tensors, only its part is read.

    Raises CheckpointError when a tensor is absent or of another shape than config.json says.
    """
    block = f"model.layers.{layer}.mlp.experts"
    sizes = (config.hidden_size, config.expert_hidden_size)
    if config.expert_kind == "plain":
        up, down = (f"{block}.{index}.{part}" for part in _PLAIN)
        return load_plain(checkpoint, (up, down), *sizes, config.activation, device, dtype)
    if config.clamp is not None:
        return _load_clamped(checkpoint, block, config, config.clamp, index, device, dtype)
    if f"{block}.gate_up_proj" in checkpoint:
        return _load_fused(checkpoint, block, config, index, device, dtype)
    parts = _GATED
    if config.family == "mixtral":
        block, parts = f"model.layers.{layer}.block_sparse_moe.experts", _MIXTRAL
    gate, up, down = (f"{block}.{index}.{part}" for part in parts)
    return load_gated(checkpoint, (gate, up, down), *sizes, config.activation, device, dtype)


def _load_fused(
    checkpoint: Checkpoint,
    block: str,
    config: ModelConfig,
    index: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> GatedMlp:
    experts, width, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
    gate_up = checkpoint.slice(f"{block}.gate_up_proj", (experts, 2 * hidden, width))
    down = checkpoint.slice(f"{block}.down_proj", (experts, width, hidden))
    return GatedMlp(
        _own(gate_up[index], device, dtype), _own(down[index], device, dtype), config.activation
    )


def _load_clamped(
    checkpoint: Checkpoint,
    block: str,
    config: ModelConfig,
    clamp: SwigluClamp,
    index: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> ClampedMlp:
    """gpt-oss stores inputs before outputs, and gate and up by turns."""
    experts, width, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
    gate_up = checkpoint.slice(f"{block}.gate_up_proj", (experts, width, 2 * hidden))[index]
    gate_up_bias = checkpoint.slice(f"{block}.gate_up_proj_bias", (experts, 2 * hidden))[index]
    down = checkpoint.slice(f"{block}.down_proj", (experts, hidden, width))[index]
    down_bias = checkpoint.slice(f"{block}.down_proj_bias", (experts, width))[index]
    return ClampedMlp(
        _own(torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1).t(), device, dtype),
        _own(torch.cat([gate_up_bias[::2], gate_up_bias[1::2]]), device, dtype),
        _own(down.t(), device, dtype),
        _own(down_bias, device, dtype),
        clamp,
    )


def _own(part: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """A contiguous copy: parts of a file are not aligned alike, and would hold the file open."""
    return part.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
