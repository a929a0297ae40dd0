"""The device that kernels are tested on: with ``TRITON_INTERPRET=1``, slowly, the CPU."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def close(got: torch.Tensor, want: torch.Tensor, of: torch.dtype | None = None) -> None:
    """Equal but for the rounding of a dtype, by the norm of the difference."""
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error < _LIMITS[of or got.dtype], f"relative error {error}"
