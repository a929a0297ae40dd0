"""Kernels in Triton that gateway and worker share. Imported only where there is a GPU.

Legend: R rows, H hidden size of an MLP, E experts of a layer, G of them that are here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh.launch import Launcher

_BLOCK = 1024


@triton.jit
def _gated_kernel(gate_up, out, hidden, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    at = gate_up + row * 2 * hidden + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + hidden, mask=inside, other=0.0)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        acted = gate * tl.sigmoid(2 * inner)
    else:
        acted = gate * tl.sigmoid(gate)
    # Rounded between the two, as in two kernels: the same numbers as on a CPU.
    acted = acted.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * hidden + column, acted * up.to(tl.float32), mask=inside)


_launch_gated = Launcher(_gated_kernel)
_GELU = {"silu": False, "swish": False, "gelu_new": True, "gelu_pytorch_tanh": True}


def gates(activation: str) -> bool:
    """Whether :func:`gated` knows an activation."""
    return activation in _GELU


def gated(gate_up_RH: Tensor, activation: str) -> Tensor:
    """``act(gate) * up`` in one pass, of a contiguous tensor with gate in front of up."""
    rows, width = gate_up_RH.shape
    out_RH = torch.empty(rows, width // 2, dtype=gate_up_RH.dtype, device=gate_up_RH.device)
    grid = (rows, triton.cdiv(width // 2, _BLOCK))
    constants = (_BLOCK, _GELU[activation])
    _launch_gated(grid, (gate_up_RH, out_RH), fixed=(width // 2,), constants=constants)
    return out_RH


@triton.jit
def _ends_kernel(counts, here, ends, num_here, num_rows, G_PAD: tl.constexpr):
    g = tl.arange(0, G_PAD)
    index = tl.load(here + g, mask=g < num_here, other=0)
    count = tl.load(counts + index, mask=g < num_here, other=0)
    # Whatever a stranger wrote there, nothing is read or written outside the rows.
    count = tl.minimum(tl.maximum(count, 0), num_rows)
    tl.store(ends + g, tl.minimum(tl.cumsum(count, axis=0), num_rows), mask=g < num_here)


def group_ends(counts_E: Tensor, here_G: Tensor, num_rows: int) -> Tensor:
    """Where each group's rows end, int32: ascending, and never past ``num_rows``."""
    ends_G = torch.empty_like(here_G)
    _ends_kernel[(1,)](
        counts_E, here_G, ends_G, len(here_G), num_rows, G_PAD=triton.next_power_of_2(len(here_G))
    )
    return ends_G
