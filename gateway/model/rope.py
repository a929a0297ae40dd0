"""Rotary position embedding.

Heads are kept with turning pairs side by side: checkpoints that have them half a head apart are
permuted at load (:func:`pair_up`), which no dot product sees. A rotation is then one complex
product. The formulas of the kinds are those of ``transformers``' modeling_rope_utils.

Legend: T tokens of the step, H heads, D size of the turning part of a head, C = D / 2 pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mesh.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> Tensor:
    """Radians that each of the C pairs turns from one position to the next, float32."""
    dim = rope.dim
    power_C = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    turns_C = 1.0 / power_C
    if rope.kind == "linear":
        return turns_C / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, turns_C)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor) * power_C)
    if rope.kind == "yarn":
        return _yarn(rope, turns_C)
    return turns_C  # default, and dynamic up to the length where it would begin to change


def _llama3(rope: RopeConfig, turns_C: Tensor) -> Tensor:
    """Slow pairs slowed by the factor, fast ones left, those between interpolated."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength_C = 2 * math.pi / turns_C
    blend_C = ((rope.original_max_len / wavelength_C - low) / (high - low)).clamp(0, 1)
    return (1 - blend_C) * turns_C / rope.factor + blend_C * turns_C


def _yarn(rope: RopeConfig, turns_C: Tensor) -> Tensor:
    """https://arxiv.org/abs/2309.00071, section 3.2: NTK by parts."""

    def dim_of(rotations: float) -> float:
        spread = math.log(rope.original_max_len / (rotations * 2 * math.pi))
        return rope.dim * spread / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp_C = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return turns_C / rope.factor * ramp_C + turns_C * (1 - ramp_C)


class Rope:
    """Turns positions into rotations, once for all layers of a step."""

    def __init__(self, rope: RopeConfig, device: torch.device | str) -> None:
        self._turns_C = inverse_frequencies(rope).to(device)
        self._length_C = torch.full_like(self._turns_C, rope.attention_factor)

    def __call__(self, positions_T: Tensor) -> Tensor:
        """``cis_T1C``, complex64: to multiply pairs by."""
        angle_TC = positions_T[:, None] * self._turns_C
        return torch.polar(self._length_C.expand_as(angle_TC), angle_TC)[:, None]


def rotate_(x_THD: Tensor, cis_T1C: Tensor) -> None:
    """Turn each head's pairs, in place. Strides over T and H must be even."""
    pairs = x_THD.view(*x_THD.shape[:-1], -1, 2)
    if x_THD.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(cis_T1C)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(cis_T1C)))


def pair_up(rows: Tensor, dim: int) -> Tensor:
    """Reorder the first dimension, heads of ``dim``: from half a head apart to side by side."""
    halves = rows.view(-1, 2, dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
