"""Read one routed expert from a checkpoint, or a slice of it, whichever way its family stores it.

Legend: D hidden size of the model, H hidden size of the expert or of the slice, E experts of a
layer.

With ``shards`` = n an expert is cut along its hidden dimension: unit ``index`` is slice
``index % n`` of expert ``index // n``, and the outputs of the n slices sum to the expert's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mesh.checkpoint import Checkpoint
from mesh.mlp import ClampedMlp, GatedMlp, Mlp, PlainMlp
from mesh.model_config import ModelConfig
from mesh.upload import fill

Part = tuple[Tensor, str, tuple[int, ...], tuple[Any, ...]]
"""Where it goes, the stored tensor's name and shape, and the part of that to read."""

_MIXTRAL = ("w1.weight", "w3.weight", "w2.weight")
_GATED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def load_expert(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    index: int,
    device: torch.device | str,
    dtype: torch.dtype,
    shards: int = 1,
) -> Mlp:
    """One unit in memory of its own; nothing of any other is read.

    Raises CheckpointError when a tensor is absent or of another shape than config.json says.
    """
    tensors = empty_expert(config, index, device, dtype, shards)
    expert, part = divmod(index, shards)
    for target, name, shape, where in _parts(
        checkpoint, config, layer, expert, _hidden(config, part, shards), tensors
    ):
        fill(target, checkpoint.slice(name, shape)[where].view(target.shape))
    if part and "down_bias" in tensors:
        tensors["down_bias"].zero_()  # of the sum of all slices, it is to be there once
    return make_expert(config, tensors)


def empty_expert(
    config: ModelConfig,
    index: int,
    device: torch.device | str,
    dtype: torch.dtype,
    shards: int = 1,
) -> dict[str, Tensor]:
    """The tensors of one unit, as :meth:`mesh.mlp.Mlp.tensors` names them, yet to be filled."""
    hidden = _hidden(config, index % shards, shards)
    width, height = config.hidden_size, hidden.stop - hidden.start
    gated = config.expert_kind == "gated"
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up" if gated else "up": (2 * height if gated else height, width),
        "down": (width, height),
    }
    if config.clamp is not None:
        shapes |= {"gate_up_bias": (2 * height,), "down_bias": (width,)}
    return {n: torch.empty(shape, device=device, dtype=dtype) for n, shape in shapes.items()}


def make_expert(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Mlp:
    """The MLP of tensors that are filled."""
    if config.expert_kind == "plain":
        return PlainMlp(tensors["up"], tensors["down"], config.activation)
    if config.clamp is None:
        return GatedMlp(tensors["gate_up"], tensors["down"], config.activation)
    return ClampedMlp(
        tensors["gate_up"],
        tensors["gate_up_bias"],
        tensors["down"],
        tensors["down_bias"],
        config.clamp,
    )


def _hidden(config: ModelConfig, part: int, shards: int) -> slice:
    """The hidden units of a slice: as equal as whole numbers can be."""
    total = config.expert_hidden_size
    return slice(total * part // shards, total * (part + 1) // shards)


def _parts(
    checkpoint: Checkpoint,
    config: ModelConfig,
    layer: int,
    expert: int,
    hidden: slice,
    into: Mapping[str, Tensor],
) -> Iterator[Part]:
    """What to read, and where it goes."""
    block = f"model.layers.{layer}.mlp.experts"
    if config.clamp is not None or f"{block}.gate_up_proj" in checkpoint:
        yield from _fused_parts(config, block, expert, hidden, into)
        return
    names = _GATED
    if config.family == "mixtral":
        block, names = f"model.layers.{layer}.block_sparse_moe.experts", _MIXTRAL
    gate, up, down = (f"{block}.{expert}.{name}" for name in names)
    inner = (config.expert_hidden_size, config.hidden_size)
    if config.expert_kind == "plain":
        yield into["up"], up, inner, (hidden,)
    else:
        gate_HD, up_HD = into["gate_up"].chunk(2)
        yield gate_HD, gate, inner, (hidden,)
        yield up_HD, up, inner, (hidden,)
    yield into["down"], down, inner[::-1], (slice(None), hidden)


def _fused_parts(
    config: ModelConfig, block: str, expert: int, hidden: slice, into: Mapping[str, Tensor]
) -> Iterator[Part]:
    """Of tensors that hold all experts of a layer.

    gpt-oss stores inputs before outputs, gate and up by turns, and biases.
    """
    experts, width, height = config.num_experts, config.hidden_size, config.expert_hidden_size
    gate_up, down = f"{block}.gate_up_proj", f"{block}.down_proj"
    if config.clamp is None:
        gate_HD, up_HD = into["gate_up"].chunk(2)
        shape = (experts, 2 * height, width)
        yield gate_HD, gate_up, shape, (expert, hidden)
        yield up_HD, gate_up, shape, (expert, slice(height + hidden.start, height + hidden.stop))
        yield into["down"], down, (experts, width, height), (expert, slice(None), hidden)
        return
    by_turns = slice(2 * hidden.start, 2 * hidden.stop)
    pairs_DH2 = into["gate_up"].view(2, -1, width).permute(2, 1, 0)
    yield pairs_DH2, gate_up, (experts, width, 2 * height), (expert, slice(None), by_turns)
    pairs_H2 = into["gate_up_bias"].view(2, -1).t()
    yield pairs_H2, f"{gate_up}_bias", (experts, 2 * height), (expert, by_turns)
    yield into["down"].t(), down, (experts, height, width), (expert, hidden)
    yield into["down_bias"], f"{down}_bias", (experts, width), (expert,)
