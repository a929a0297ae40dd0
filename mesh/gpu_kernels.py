"""Kernels in Triton that gateway and worker share. Imported only where there is a GPU.

Legend: R rows, H hidden size of an MLP, E experts of a layer, G of them that are here, K and N
widths of what goes into a matrix and comes out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


@triton.jit
def _grouped_kernel(
    x,
    weights,
    out,
    ends,
    num_groups,
    n_size,
    k_size,
    G_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    tile = tl.program_id(0)
    g = tl.arange(0, G_PAD)
    there = g < num_groups
    begins = tl.load(ends + g - 1, mask=there & (g > 0), other=0)
    tiles = tl.where(there, tl.cdiv(tl.load(ends + g, mask=there, other=0) - begins, M), 0)
    group = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    if group < num_groups:
        before = tl.sum(tl.where(g < group, tiles, 0), axis=0)
        begin = tl.sum(tl.where(g == group, begins, 0), axis=0)
        row = begin + (tile - before) * M + tl.arange(0, M)
        inside = row < tl.load(ends + group)
        column = tl.program_id(1) * N + tl.arange(0, N)
        k_at = tl.arange(0, K)
        x_at = x + row.to(tl.int64)[:, None] * k_size + k_at[None, :]
        w_row = group.to(tl.int64) * n_size + column
        w_at = weights + w_row[None, :] * k_size + k_at[:, None]
        acc = tl.zeros([M, N], dtype=tl.float32)
        for start in range(0, k_size, K):
            left = k_at < k_size - start
            part = tl.load(x_at + start, mask=inside[:, None] & left[None, :], other=0.0)
            weight = tl.load(
                w_at + start, mask=left[:, None] & (column < n_size)[None, :], other=0.0
            )
            acc += tl.dot(part, weight, input_precision="ieee")
        at = out + row.to(tl.int64)[:, None] * n_size + column[None, :]
        tl.store(at, acc, mask=inside[:, None] & (column < n_size)[None, :])


def grouped_linear(x_RK: Tensor, weights_GNK: Tensor, ends_G: Tensor) -> Tensor:
    """``out_RN``: rows of each group by its matrix; those past the last end are left undefined.

    By torch's grouped GEMM where it has one that a graph may hold, which is bfloat16's.
    """
    if x_RK.dtype == torch.bfloat16:
        return F.grouped_mm(x_RK, weights_GNK.transpose(1, 2), offs=ends_G)
    x_RK = x_RK.contiguous()
    groups, n_size, k_size = weights_GNK.shape
    out_RN = x_RK.new_empty(len(x_RK), n_size)
    # Twice the mean or more, so that most groups are one tile: each tile reads its weights.
    rows = min(128, max(16, triton.next_power_of_2(2 * len(x_RK) // groups)))
    columns = 128 if rows == 128 else 64
    grid = (triton.cdiv(len(x_RK), rows) + groups, triton.cdiv(n_size, columns))
    _grouped_kernel[grid](
        x_RK,
        weights_GNK,
        out_RN,
        ends_G,
        groups,
        n_size,
        k_size,
        G_PAD=triton.next_power_of_2(groups),
        M=rows,
        N=columns,
        K=64,
        num_warps=8 if rows == 128 else 4,
        num_stages=4,
    )
    return out_RN
