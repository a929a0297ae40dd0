"""Kernels in Triton around the experts: sort, scatter, combine. Imported only on a GPU.

Legend: T tokens, K experts a token, R = T x K routed rows, E experts, D hidden size. Where experts
are cut into n slices (SHARDS), E counts slices, R = T x K x n, and ``rows_TK`` has n columns for
each choice: routed row r is for slice r % n of choice r // n.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from gateway.model.gpu_kernels import normed
from gateway.model.norm import RmsNorm
from mesh.dependent_launch import DEPENDENT, wait_for_previous
from mesh.launch import Launcher

_ROWS = 64
_EXPERTS = 32
_COMPARED_ROWS = 2048
"""Up to here, comparing every pair of rows is quicker than to count those of each block first."""
_MAX_BLOCK = 256
_BLOCKS_AT_ONCE = 128


@triton.jit
def _positions_kernel(
    ids, num_rows, positions, counts, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):
    wait_for_previous()
    block = tl.program_id(0)
    num_blocks = tl.cdiv(num_rows, ROWS)
    lane = tl.arange(0, ROWS)
    if block < num_blocks:
        row = block * ROWS + lane
        mine = tl.load(ids + row, mask=row < num_rows, other=0).to(tl.int32)
        before = tl.zeros([ROWS], dtype=tl.int32)
        for start in range(0, num_rows, ROWS):
            other_row = start + lane
            other = tl.load(ids + other_row, mask=other_row < num_rows, other=1 << 30)
            other = other.to(tl.int32)
            less = other[None, :] < mine[:, None]
            same = (other[None, :] == mine[:, None]) & (other_row[None, :] < row[:, None])
            before += tl.sum((less | same).to(tl.int32), axis=1)
        tl.store(positions + row, before, mask=row < num_rows)
    else:
        expert = (block - num_blocks) * EXPERTS + tl.arange(0, EXPERTS)
        count = tl.zeros([EXPERTS], dtype=tl.int32)
        for start in range(0, num_rows, ROWS):
            other_row = start + lane
            other = tl.load(ids + other_row, mask=other_row < num_rows, other=1 << 30)
            same = other.to(tl.int32)[None, :] == expert[:, None]
            count += tl.sum(same.to(tl.int32), axis=1)
        tl.store(counts + expert, count, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_rows"])
def _tallied_positions_kernel(
    ids,
    tallies,
    positions,
    num_rows,
    num_experts,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    wait_for_previous()
    block = tl.program_id(0)
    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    inside = row < num_rows
    mine = tl.load(ids + row, mask=inside, other=0).to(tl.int32)
    position = tl.load(tallies + block * num_experts + mine, mask=inside, other=0)
    totals = tallies + tl.num_programs(0) * num_experts
    for start in range(0, num_experts, EXPERTS):
        expert = start + tl.arange(0, EXPERTS)
        total = tl.load(totals + expert, mask=expert < num_experts, other=0)
        position += tl.sum(tl.where(expert[None, :] < mine[:, None], total[None, :], 0), axis=1)
    for start in range(0, ROWS, PART):
        other_lane = start + tl.arange(0, PART)
        other_row = block * ROWS + other_lane
        other = tl.load(ids + other_row, mask=other_row < num_rows, other=-1).to(tl.int32)
        same = (other[None, :] == mine[:, None]) & (other_lane[None, :] < lane[:, None])
        position += tl.sum(same.to(tl.int32), axis=1)
    tl.store(positions + row, position, mask=inside)


_launch_tallied_positions = Launcher(_tallied_positions_kernel, **DEPENDENT)


def sort_by_expert(ids_R: Tensor, positions_R: Tensor, counts_E: Tensor) -> None:
    """Where each row stands when rows are in order of expert (those of one as they came), and
    how many each expert has. int32 out; an id past the experts counts for none and comes last."""
    num_rows, num_experts = len(ids_R), len(counts_E)
    if num_rows > _COMPARED_ROWS:
        ids_R = ids_R.clamp(max=num_experts)  # who is nobody's has a count, too
        tallies = _tallied(ids_R, num_rows, num_experts + 1, shards=1)
        _launch_tallied_positions(
            (triton.cdiv(num_rows, _MAX_BLOCK), 1),
            (ids_R, tallies, positions_R),
            varying=(num_rows,),
            fixed=(num_experts + 1,),
            constants=(_MAX_BLOCK, _ROWS, _EXPERTS),
        )
        counts_E.copy_(tallies[-1, :num_experts])
        return
    grid = (triton.cdiv(num_rows, _ROWS) + triton.cdiv(num_experts, _EXPERTS),)
    _positions_kernel[grid](
        ids_R,
        num_rows,
        positions_R,
        counts_E,
        num_experts,
        ROWS=_ROWS,
        EXPERTS=_EXPERTS,
        **DEPENDENT,
    )


@triton.jit
def _scatter_kernel(
    x, positions, row_of_position, rows, send, num_choices, width, BLOCK: tl.constexpr
):
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)
    for choice in range(0, num_choices):
        row = tl.load(row_of_position + tl.load(positions + token * num_choices + choice))
        row = row.to(tl.int64)
        if row >= 0:
            tl.store(send + row * width + column, value, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(rows + token * num_choices + choice, row)


def scatter(
    x_TD: Tensor, positions_R: Tensor, row_of_position_R: Tensor, rows_TK: Tensor, send_RD: Tensor
) -> None:
    """Copy each token to the rows of ``send_RD`` that its K experts read.

    ``row_of_position_R`` (int32) says which row the n-th in order of expert has, -1 for none;
    ``rows_TK`` (int64) gets the row of each.
    """
    num_tokens, width = x_TD.shape
    block = min(2048, triton.next_power_of_2(width))
    _scatter_kernel[(num_tokens, triton.cdiv(width, block))](
        x_TD,
        positions_R,
        row_of_position_R,
        rows_TK,
        send_RD,
        rows_TK.shape[1],
        width,
        BLOCK=block,
        **DEPENDENT,
    )


@triton.jit
def _combine_kernel(
    reply,
    rows,
    weights,
    residual,
    out,
    norm,
    normed_out,
    width,
    eps: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARDS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if NORM:
        norm_weight = tl.load(norm + column, mask=inside, other=0.0)
    wait_for_previous()
    if RESIDUAL:
        before = tl.load(residual + token * width + column, mask=inside, other=0.0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for each in tl.static_range(COLUMNS):
        row = tl.load(rows + token * COLUMNS + each)
        weight = tl.load(weights + token * (COLUMNS // SHARDS) + each // SHARDS)
        value = tl.load(reply + row * width + column, mask=inside & (row >= 0), other=0.0)
        total += tl.where(row >= 0, value.to(tl.float32) * weight, 0.0)
    if RESIDUAL:
        total = total.to(out.dtype.element_ty).to(tl.float32) + before.to(tl.float32)
    total = total.to(out.dtype.element_ty)
    tl.store(out + token * width + column, total, mask=inside)
    if NORM:
        value = total.to(tl.float32)
        value = normed(value, norm_weight, width, eps, out.dtype.element_ty)
        tl.store(normed_out + token * width + column, value, mask=inside)


_launch_combine = Launcher(_combine_kernel, **DEPENDENT)
_launch_combine_and_norm = Launcher(_combine_kernel, num_warps=8, **DEPENDENT)


def combine(
    reply_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor, residual_TD: Tensor | None = None
) -> Tensor:
    """The weighted sum of each token's rows, in float32 and in order of K, as y_TD; with a
    residual, that plus the rounded sum. Slices have the weight of their expert."""
    (num_tokens, num_rows), width = rows_TK.shape, reply_RD.shape[1]
    shards = num_rows // weights_TK.shape[1]
    out_TD = reply_RD.new_empty(num_tokens, width)
    columns, block = _columns_of(width)
    more_TD = reply_RD if residual_TD is None else residual_TD
    _launch_combine(
        (num_tokens, columns),
        (reply_RD, rows_TK, weights_TK, more_TD, out_TD, out_TD, out_TD),
        fixed=(width,),
        constants=(0.0, num_rows, shards, block, residual_TD is not None, False),
    )
    return out_TD


def combine_and_norm(
    reply_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor, residual_TD: Tensor, norm: RmsNorm
) -> tuple[Tensor, Tensor]:
    """The same with a residual, and the norm of that."""
    out_TD, normed_TD = torch.empty_like(residual_TD), torch.empty_like(residual_TD)
    (num_tokens, num_rows), width = rows_TK.shape, reply_RD.shape[1]
    shards, block = num_rows // weights_TK.shape[1], triton.next_power_of_2(width)
    _launch_combine_and_norm(
        (num_tokens, 1),
        (reply_RD, rows_TK, weights_TK, residual_TD, out_TD, norm.weight_D, normed_TD),
        fixed=(width,),
        constants=(norm.eps, num_rows, shards, block, True, True),
    )
    return out_TD, normed_TD


@functools.cache
def _columns_of(width: int, most: int = 2048) -> tuple[int, int]:
    """Into how many blocks of columns a row is cut, and of how many each."""
    block = min(most, triton.next_power_of_2(width))
    return triton.cdiv(width, block), block


@triton.jit
def _headers_kernel(headers, words, num_words, words_per_row, WORDS: tl.constexpr):
    wait_for_previous()
    header = headers + tl.program_id(0) * (num_words + 1)
    to = words + tl.load(header).to(tl.int64) * words_per_row
    word = tl.arange(0, WORDS)
    inside = word < num_words
    tl.store(to + word, tl.load(header + 1 + word, mask=inside), mask=inside)


def write_headers(headers_ME: Tensor, send_ND: Tensor) -> None:
    """Write each header (int32: an arena row, then the words) from the start of its row on."""
    words = send_ND.view(-1).view(torch.int32)
    _headers_kernel[(len(headers_ME),)](
        headers_ME,
        words,
        headers_ME.shape[1] - 1,
        len(words) // len(send_ND),
        WORDS=triton.next_power_of_2(headers_ME.shape[1]),
        **DEPENDENT,
    )


@triton.jit
def _unit(ids, row, num_rows, nobody, SHARDS: tl.constexpr):
    expert = tl.load(ids + row // SHARDS, mask=row < num_rows, other=nobody).to(tl.int32)
    return expert * SHARDS + row % SHARDS


@triton.jit(do_not_specialize=["num_rows"])
def _tally_kernel(
    ids,
    tallies,
    num_rows,
    num_experts,
    SHARDS: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    # Of each block of rows, how many each expert has: a line behind the first one.
    wait_for_previous()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    whose = _unit(ids, row, num_rows, num_experts, SHARDS)
    count = tl.sum((whose[None, :] == expert[:, None]).to(tl.int32), axis=1)
    at = tallies + (tl.program_id(0) + 1) * num_experts + expert
    tl.store(at, count, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_blocks"])
def _sum_up_kernel(tallies, num_blocks, num_experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    # From there on, how many it has in all blocks before; in the last line, in all.
    wait_for_previous()
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    is_one = expert < num_experts
    before = tl.zeros([EXPERTS], dtype=tl.int32)
    tl.store(tallies + expert, before, mask=is_one)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = (block < num_blocks)[:, None] & is_one[None, :]
        at = tallies + (block[:, None] + 1) * num_experts + expert[None, :]
        count = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(count, axis=0), mask=inside)
        before += tl.sum(count, axis=0)


_launch_tally = Launcher(_tally_kernel, **DEPENDENT)
_launch_sum_up = Launcher(_sum_up_kernel, **DEPENDENT)


def _tallied(ids: Tensor, num_rows: int, num_experts: int, shards: int) -> Tensor:
    """``tallies``, int32: of each block of _MAX_BLOCK rows, how many rows each of the experts (or
    slices) has in all blocks before it; in one line more, how many in all."""
    blocks, of_experts = triton.cdiv(num_rows, _MAX_BLOCK), triton.cdiv(num_experts, _EXPERTS)
    tallies = ids.new_empty(blocks + 1, num_experts, dtype=torch.int32)
    _launch_tally(
        (blocks, of_experts),
        (ids, tallies),
        varying=(num_rows,),
        fixed=(num_experts,),
        constants=(shards, _MAX_BLOCK, _EXPERTS),
    )
    _launch_sum_up(
        (of_experts, 1),
        (tallies,),
        varying=(blocks,),
        fixed=(num_experts,),
        constants=(min(_BLOCKS_AT_ONCE, triton.next_power_of_2(blocks)), _EXPERTS),
    )
    return tallies


@triton.jit(do_not_specialize=["num_rows"])
def _place_kernel(
    x,
    ids,
    tables,
    send,
    words,
    rows,
    counts,
    tallies,
    num_rows,
    rows_per_token,
    num_experts,
    width,
    words_per_row,
    SHARDS: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TALLIED: tl.constexpr,
    E_PAD: tl.constexpr,
):
    program = tl.program_id(0)
    groups = tables + 1
    lane = tl.arange(0, ROWS)
    totals = tallies + tl.cdiv(num_rows, ROWS) * num_experts
    num_headers = tl.load(tables)
    wait_for_previous()
    if program < num_rows:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        token = (program // rows_per_token).to(tl.int64)
        value = tl.load(x + token * width + column, mask=inside)
        mine = _unit(ids, program, num_rows, num_experts, SHARDS)
        known = mine < num_experts
        group = tl.load(groups + mine, mask=known, other=-1)
        first = tl.load(groups + num_experts + mine, mask=known, other=0)
        limit = tl.load(groups + 2 * num_experts + mine, mask=known, other=0)
        if TALLIED:
            expert = tl.arange(0, E_PAD)
            with_mine = tl.load(groups + expert, mask=expert < num_experts, other=-1) == group
            ahead = with_mine & (expert < mine) & (expert < num_experts)
            row = first + tl.sum(tl.load(totals + expert, mask=ahead, other=0))
            block = program // ROWS
            row += tl.load(tallies + block * num_experts + mine, mask=known, other=0)
            other_row = block * ROWS + lane
            other = _unit(ids, other_row, num_rows, num_experts, SHARDS)
            row += tl.sum(((other == mine) & (other_row < program)).to(tl.int32))
        else:
            before = tl.zeros([ROWS], dtype=tl.int32)
            for start in range(0, num_rows, ROWS):
                other_row = start + lane
                other = _unit(ids, other_row, num_rows, num_experts, SHARDS)
                with_mine = tl.load(groups + other, mask=other < num_experts, other=-1) == group
                ahead = (other < mine) | ((other == mine) & (other_row < program))
                before += (with_mine & ahead).to(tl.int32)
            row = first + tl.sum(before)
        row = tl.where((group >= 0) & (row < limit), row, -1).to(tl.int64)
        if tl.program_id(1) == 0:
            tl.store(rows + program, row)
        if row >= 0:
            tl.store(send + row * width + column, value, mask=inside)
    elif tl.program_id(1) == 0:
        expert = (program - num_rows) * EXPERTS + tl.arange(0, EXPERTS)
        is_one = expert < num_experts
        its_group = tl.load(groups + expert, mask=is_one, other=-1)
        count = tl.zeros([EXPERTS], dtype=tl.int32)
        if TALLIED:
            count += tl.load(totals + expert, mask=is_one, other=0)
        else:
            for start in range(0, num_rows, ROWS):
                other_row = start + lane
                other = _unit(ids, other_row, num_rows, num_experts, SHARDS)
                same = other[None, :] == expert[:, None]
                count += tl.sum(same.to(tl.int32), axis=1)
        tl.store(counts + expert, count, mask=is_one)
        for n in range(0, num_headers):
            header = tl.load(groups + 3 * num_experts + n).to(tl.int64)
            owner = tl.load(groups + 4 * num_experts + n)
            word = tl.where(its_group == owner, count, 0)
            tl.store(words + header * words_per_row + expert, word, mask=is_one)


_launch_place = Launcher(_place_kernel, **DEPENDENT)


def place(
    x_TD: Tensor,
    ids_TK: Tensor,
    tables: Tensor,
    send_ND: Tensor,
    rows_TK: Tensor,
    counts_E: Tensor,
) -> None:
    """Copy each token to where the ``tables`` (see :class:`gateway.asking.Tables`) have its K
    experts find it, or every slice of them, with the counts of messages for several ahead of them.

    ``rows_TK`` (int64) gets the row of each, -1 for what has none, and ``counts_E`` (int32, also
    in pinned memory of the host) how many each expert or slice has. An id past the experts is
    nobody's.
    """
    num_rows, num_experts, width = rows_TK.numel(), len(counts_E), x_TD.shape[1]
    rows_per_token = rows_TK.shape[1]
    # Each part of a row compares all over again: few parts where there is much to compare.
    columns, block = _columns_of(width, 1024 if num_rows <= 512 else 4096)
    compared = min(_MAX_BLOCK, max(16, 1 << (num_rows - 1).bit_length()))
    shards, of_experts = rows_per_token // ids_TK.shape[1], triton.cdiv(num_experts, _EXPERTS)
    tallied, tallies = num_rows > _COMPARED_ROWS, ids_TK
    if tallied:
        tallies = _tallied(ids_TK, num_rows, num_experts, shards)
    _launch_place(
        (num_rows + of_experts, columns),
        (x_TD, ids_TK, tables, send_ND, send_ND.view(torch.int32), rows_TK, counts_E, tallies),
        varying=(num_rows,),
        fixed=(rows_per_token, num_experts, width, width * send_ND.itemsize // 4),
        constants=(
            shards,
            compared,
            _EXPERTS,
            block,
            tallied,
            triton.next_power_of_2(num_experts) if tallied else 1,
        ),
    )
