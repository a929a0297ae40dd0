"""Kernels that are made ready while the one before them runs. Imported only where there is a GPU.

NVIDIA's programmatic dependent launch, from Hopper on: under the Multi-Process Service a kernel of
a graph begins 3 us behind the one that it depends on, and one that is launched so, and waits by
itself, 1 us (ten kernels of 46 us in all: 79 and 59 us on an H200).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

_THERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
_WAIT = tl.constexpr(_THERE)
DEPENDENT: dict[str, Any] = {"launch_pdl": True} if _THERE else {}
"""Options of a launch of a kernel that calls :func:`wait_for_previous`, in all of its programs."""


@triton.jit
def wait_for_previous():
    """Until the kernels before this one have ended, and what they wrote is seen. Ahead of it may be
    read what none of them writes, such as weights, or the lengths that a step begins with; nothing
    may be written. The kernel behind may come to where it waits from here on, ahead of other
    processes' kernels that would take its place (prompts of a model with 128 experts on two H200s:
    425,000 to 503,000 tokens/s)."""
    if _WAIT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
