"""Kernels in Triton of attention, norm and router. Imported only where there is a GPU.

Legend: T tokens, B sequences, M blocks of the longest, H heads, J heads of keys and values,
G = H / J queries of one such head, K size of a key, V size of a value, C = K / 2 turning pairs,
S rows of the cache, X width of queries, keys and values together, W width of a row; of the router
D hidden size, E experts, K experts of a token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mesh.dependent_launch import DEPENDENT, wait_for_previous
from mesh.launch import Launcher

if TYPE_CHECKING:
    from gateway.model.norm import RmsNorm

_PAIRS = 512
_POSITIONS = 32768
"""About how many, read at once, keep the whole GPU reading."""
_MAX_SPLITS = 64
_NO_WINDOW = 1 << 30
_LOG2_E = math.log2(math.e)


@triton.jit
def _turn_and_store_kernel(
    qkv,
    qkv_stride,
    cis,
    slots,
    cache,
    cache_width,
    num_pairs,
    num_turning_pairs,
    num_query_pairs,
    C: tl.constexpr,
    PAIRS: tl.constexpr,
):
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < num_pairs
    turning = pair < num_turning_pairs
    slot = tl.load(slots + token).to(tl.int64)
    at = qkv + token * qkv_stride + 2 * pair
    even, odd = tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
    turn = cis + token * 2 * C + 2 * (pair % C)
    cos, sin = tl.load(turn, mask=turning, other=1.0), tl.load(turn + 1, mask=turning, other=0.0)
    even32, odd32 = even.to(tl.float32), odd.to(tl.float32)
    new_even = (even32 * cos - odd32 * sin).to(qkv.dtype.element_ty)
    new_odd = (even32 * sin + odd32 * cos).to(qkv.dtype.element_ty)
    tl.store(at, new_even, mask=turning)
    tl.store(at + 1, new_odd, mask=turning)
    if slot >= 0:
        kept = inside & (pair >= num_query_pairs)
        to = cache + slot * cache_width + 2 * (pair - num_query_pairs)
        tl.store(to, tl.where(turning, new_even, even), mask=kept)
        tl.store(to + 1, tl.where(turning, new_odd, odd), mask=kept)


def turn_and_store(
    qkv_TX: Tensor, cis_T1C: Tensor, slots_T: Tensor, cache_SW: Tensor, q_width: int, qk_width: int
) -> None:
    """Turn queries and keys in place and write keys and values to their slots; -1: nowhere."""
    num_tokens, width = qkv_TX.shape
    cis = torch.view_as_real(cis_T1C)
    _turn_and_store_kernel[(num_tokens, triton.cdiv(width // 2, _PAIRS))](
        qkv_TX,
        qkv_TX.stride(0),
        cis,
        slots_T,
        cache_SW,
        cache_SW.shape[1],
        width // 2,
        qk_width // 2,
        q_width // 2,
        C=cis.shape[-2],
        PAIRS=_PAIRS,
        **DEPENDENT,
    )


@triton.jit
def _span(length, window, splits, N: tl.constexpr):
    # Positions of each split; of the last ones, perhaps fewer, or none.
    return tl.cdiv(tl.cdiv(tl.minimum(length, window), splits), N) * N


@triton.jit
def _decode_kernel(
    q,
    q_stride_b,
    cache,
    tables,
    table_stride,
    lengths,
    partial,
    maxima,
    sums,
    cache_width,
    value_offset,
    scale,
    window,
    splits,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wait_for_previous()
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1)
    split = tl.program_id(2)
    heads = tl.num_programs(1) * G
    length = tl.load(lengths + b)
    span = _span(length, window, splits, N)
    begin = tl.maximum(length - window, 0) + split * span
    end = tl.minimum(begin + span, length)
    g = tl.arange(0, ROWS)
    k_at = tl.arange(0, K_PAD)
    v_at = tl.arange(0, V_PAD)
    n = tl.arange(0, N)
    query = tl.load(
        q + b * q_stride_b + (j * G + g)[:, None] * K + k_at[None, :],
        mask=(g < G)[:, None] & (k_at < K)[None, :],
        other=0.0,
    )
    best = tl.full([ROWS], -1e30, dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, V_PAD], dtype=tl.float32)
    for start in range(begin, end, N):
        position = start + n
        seen = position < end
        block = tl.load(tables + b * table_stride + position // BLOCK_SIZE, mask=seen, other=0)
        row = (block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE) * cache_width
        key = tl.load(
            cache + row[:, None] + j * K + k_at[None, :],
            mask=seen[:, None] & (k_at < K)[None, :],
            other=0.0,
        )
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        score = tl.where(seen[None, :], score, -1e30)
        new_best = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.where(seen[None, :], tl.exp2(score - new_best[:, None]), 0.0)
        fade = tl.exp2(best - new_best)
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(
            cache + row[:, None] + value_offset + j * V + v_at[None, :],
            mask=seen[:, None] & (v_at < V)[None, :],
            other=0.0,
        )
        acc = acc * fade[:, None]
        acc += tl.dot(weight.to(value.dtype), value, input_precision=PRECISION)
        best = new_best
    at = (b * heads + j * G + g) * splits + split
    tl.store(maxima + at, best, mask=g < G)
    tl.store(sums + at, total, mask=g < G)
    tl.store(
        partial + at[:, None] * V + v_at[None, :],
        acc,
        mask=(g < G)[:, None] & (v_at < V)[None, :],
    )


@triton.jit
def _reduce_kernel(
    partial,
    maxima,
    sums,
    sinks,
    lengths,
    out,
    window,
    splits,
    V: tl.constexpr,
    V_PAD: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    SINKS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = (b * tl.num_programs(1) + head) * splits
    s = tl.arange(0, S)
    v_at = tl.arange(0, V_PAD)
    length = tl.load(lengths + b)
    there = s * _span(length, window, splits, N) < tl.minimum(length, window)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
    wait_for_previous()
    maximum = tl.load(maxima + at + s, mask=there, other=-1e30)
    total = tl.load(sums + at + s, mask=there, other=0.0)
    part = tl.load(
        partial + (at + s)[:, None] * V + v_at[None, :],
        mask=there[:, None] & (v_at < V)[None, :],
        other=0.0,
    )
    best = tl.max(maximum, axis=0)
    if SINKS:
        best = tl.maximum(best, sink)
    share = tl.exp2(maximum - best)
    total = tl.sum(total * share, axis=0)
    if SINKS:
        total += tl.exp2(sink - best)
    value = tl.sum(part * share[:, None], axis=0) / tl.maximum(total, 1e-30)
    tl.store(out + at // splits * V + v_at, value, mask=v_at < V)


def _positions_at_once(q_BHK: Tensor, num_kv_heads: int) -> int:
    """How many positions a program reads."""
    _, num_heads, key_dim = q_BHK.shape
    if key_dim > 256:
        return 16
    return 64 if num_heads > num_kv_heads and key_dim <= 128 else 32


def num_splits(q_BHK: Tensor, num_kv_heads: int, longest: int) -> int:
    """Parts of a sequence, each read by a program of its own."""
    at_once = _positions_at_once(q_BHK, num_kv_heads)
    wanted = max(1, _POSITIONS // (at_once * len(q_BHK) * num_kv_heads))
    return min(wanted, _MAX_SPLITS, max(1, longest // at_once))


def paged_decode(
    q_BHK: Tensor,
    cache_SW: Tensor,
    tables_BM: Tensor,
    lengths_B: Tensor,
    *,
    splits: int,
    block_size: int,
    num_kv_heads: int,
    value_dim: int,
    value_offset: int,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """``out_BHV``: one query a sequence over its ``lengths_B`` first positions in the cache.

    ``tables_BM`` (int32) holds the blocks of each; a length of 0 gives zeros. With a window, the
    last so many positions; a sink takes its part of the weights and adds nothing.
    """
    batch, num_heads, key_dim = q_BHK.shape
    group = num_heads // num_kv_heads
    device, at_once = q_BHK.device, _positions_at_once(q_BHK, num_kv_heads)
    shape = (batch, num_heads, splits)
    partial = torch.empty(*shape, value_dim, dtype=torch.float32, device=device)
    maxima, sums = torch.empty(2, *shape, dtype=torch.float32, device=device).unbind(0)
    q_BHK = q_BHK if q_BHK.stride()[1:] == (key_dim, 1) else q_BHK.contiguous()
    k_pad, v_pad = (max(16, triton.next_power_of_2(n)) for n in (key_dim, value_dim))
    _decode_kernel[(batch, num_kv_heads, splits)](
        q_BHK,
        q_BHK.stride(0),
        cache_SW,
        tables_BM,
        tables_BM.stride(0),
        lengths_B,
        partial,
        maxima,
        sums,
        cache_SW.shape[1],
        value_offset,
        scale * _LOG2_E,
        window or _NO_WINDOW,
        splits,
        G=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        K=key_dim,
        K_PAD=k_pad,
        V=value_dim,
        V_PAD=v_pad,
        BLOCK_SIZE=block_size,
        N=at_once,
        PRECISION="ieee" if cache_SW.dtype == torch.float32 else "tf32",
        # Of longer keys, two warps have no registers for a block.
        num_warps=2 if group == 1 and k_pad <= 128 else 4,
        **DEPENDENT,
    )
    out_BHV = q_BHK.new_empty(batch, num_heads, value_dim)
    _reduce_kernel[(batch, num_heads)](
        partial,
        maxima,
        sums,
        partial if sinks_H is None else sinks_H,
        lengths_B,
        out_BHV,
        window or _NO_WINDOW,
        splits,
        V=value_dim,
        V_PAD=v_pad,
        S=triton.next_power_of_2(splits),
        N=at_once,
        SINKS=sinks_H is not None,
        # More parts at once are more than the registers of one warp.
        num_warps=1 if splits <= 32 else 4,
        **DEPENDENT,
    )
    return out_BHV


@triton.jit
def normed(value, weight, width, eps: tl.constexpr, dtype: tl.constexpr):
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    return (value * scale * weight.to(tl.float32)).to(dtype)


@triton.jit
def _rms_norm_kernel(x, weights, out, width, eps: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weights + column, mask=inside, other=0.0)
    wait_for_previous()
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    value = normed(value, weight, width, eps, out.dtype.element_ty)
    tl.store(out + row * width + column, value, mask=inside)


_launch_rms_norm = Launcher(_rms_norm_kernel, num_warps=8, **DEPENDENT)


def rms_norm(x_TD: Tensor, norm: RmsNorm) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * weight`` of each row, in float32; both contiguous."""
    out_TD = torch.empty_like(x_TD)
    num_rows, width = x_TD.shape
    _launch_rms_norm(
        (num_rows, 1),
        (x_TD, norm.weight_D, out_TD),
        fixed=(width,),
        constants=(norm.eps, triton.next_power_of_2(width)),
    )
    return out_TD


MAX_SCORED = 1 << 23
"""Products up to which :func:`choose` scores experts itself: each token reads all weights."""
_SCORED_AT_ONCE = 16384
"""Weights that a program reads, of as many experts as they are."""


@triton.jit
def _choose_kernel(
    scored,
    router,
    bias,
    correction,
    there,
    norm,
    normed_out,
    logits,
    arrived,
    ids,
    weights,
    num_experts,
    width,
    scale: tl.constexpr,
    eps: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OF_CHOSEN: tl.constexpr,
    BIAS: tl.constexpr,
    CORRECTED: tl.constexpr,
    THERE: tl.constexpr,
    NORM: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ALONE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    is_one = expert < num_experts
    left = 0
    if BLOCK > 0:
        column = tl.arange(0, BLOCK)
        inside = column < width
        some = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
        here = (some < num_experts)[:, None] & inside[None, :]
        row = tl.load(router + some[:, None] * width + column[None, :], mask=here, other=0.0)
        if NORM:
            norm_weight = tl.load(norm + column, mask=inside, other=0.0)
        wait_for_previous()
        value = tl.load(scored + token * width + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            value = normed(value, norm_weight, width, eps, normed_out.dtype.element_ty)
            if tl.program_id(1) == 0:
                tl.store(normed_out + token * width + column, value, mask=inside)
            value = value.to(tl.float32)
        dot = tl.sum(value[None, :] * row.to(tl.float32), axis=1)
        if not ALONE:
            tl.store(logits + token * num_experts + some, dot, mask=some < num_experts)
            # Whoever is the last finds what all have scored.
            tl.debug_barrier()
            left = tl.num_programs(1) - 1 - tl.atomic_add(arrived + token, 1)
    else:
        wait_for_previous()
    if left == 0:
        if ALONE:
            its = expert[None, :] == some[:, None]
            logit = tl.sum(tl.where(its, dot[:, None], 0.0), axis=0)
        else:
            if BLOCK > 0:
                tl.store(arrived + token, 0)
            logit = tl.load(logits + token * num_experts + expert, mask=is_one, other=0.0)
        if BIAS:
            logit += tl.load(bias + expert, mask=is_one, other=0.0)
        # Whatever came in, what goes out are experts that there are.
        logit = tl.where(logit == logit, logit, 0.0)
        if OF_CHOSEN:
            score = logit
        elif SCORING == "softmax":
            best = tl.max(tl.where(is_one, logit, -float("inf")), axis=0)
            score = tl.where(is_one, tl.exp(logit - best), 0.0)
            score = score / tl.sum(score, axis=0)
        else:
            score = 1.0 / (1.0 + tl.exp(-logit))
        rank = score
        if CORRECTED:
            rank += tl.load(correction + expert, mask=is_one, other=0.0)
        rank = tl.where(is_one, rank, -float("inf"))
        # All at once, where one maximum after the other would each wait for the one before.
        equal = rank[:, None] == rank[None, :]
        before = (rank[:, None] > rank[None, :]) | (equal & (expert[:, None] < expert[None, :]))
        nth = tl.sum(before.to(tl.int32), axis=0)
        choice = tl.arange(0, CHOICES_PAD)
        mine = choice < CHOICES
        is_nth = choice[:, None] == nth[None, :]
        chosen = tl.sum(tl.where(is_nth, expert[None, :], 0), axis=1)
        weight = tl.sum(tl.where(is_nth, score[None, :], 0.0), axis=1)
        if OF_CHOSEN:
            weight = tl.where(mine, weight, -float("inf"))
            weight = tl.exp(weight - tl.max(weight, axis=0))
            weight = weight / tl.sum(weight, axis=0)
        elif NORMALIZE:
            # DeepSeek-V3's own guard against a row of zeros.
            weight = weight / (tl.sum(tl.where(mine, weight, 0.0), axis=0) + 1e-20)
        if THERE:
            chosen = tl.where(tl.load(there + token) > 0, chosen, num_experts)
        tl.store(ids + token * CHOICES + choice, chosen.to(tl.int64), mask=mine)
        tl.store(weights + token * CHOICES + choice, weight * scale, mask=mine)


_launch_choose = Launcher(_choose_kernel, num_warps=4, **DEPENDENT)


def choose(
    scored: Tensor,
    router_ED: Tensor | None,
    top_k: int,
    *,
    scoring: str,
    normalize: bool,
    softmax_of_chosen: bool,
    scale: float,
    num_experts: int,
    arrived_T: Tensor,
    bias_E: Tensor | None = None,
    correction_E: Tensor | None = None,
    there_T: Tensor | None = None,
    norm: RmsNorm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ids_TK`` (int64) and ``weights_TK`` (float32) of each token's K best experts.

    ``scored`` is ``logits_TE`` in float32 or, with the router's weights (and bias), ``x_TD``, which
    with a ``norm`` is normed first and then returned, too: else that is just what was scored. Of
    ``x_TD``, programs share a token's experts and count those of them that are done in
    ``arrived_T`` (int32, zeros, which it is again behind it): no two calls at once have the same.
    Tokens whose ``there_T`` (int32) is 0 go to nobody: to an id past the experts.
    """
    num_tokens, width = scored.shape
    normed_TD = scored if norm is None else torch.empty_like(scored)
    weight_D = scored if norm is None else norm.weight_D
    experts = max(16, triton.next_power_of_2(num_experts))
    logits_TE, block, at_once = scored, 0, 1
    if router_ED is not None:
        logits_TE = scored.new_empty(num_tokens, num_experts, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        at_once = min(triton.next_power_of_2(num_experts), max(1, _SCORED_AT_ONCE // block))
    ids_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=scored.device)
    weights_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=scored.device)
    _launch_choose(
        (num_tokens, 1 if router_ED is None else triton.cdiv(num_experts, at_once)),
        (
            scored,
            *(scored if t is None else t for t in (router_ED, bias_E, correction_E, there_T)),
            weight_D,
            normed_TD,
            logits_TE,
            arrived_T,
            ids_TK,
            weights_TK,
        ),
        fixed=(num_experts, width),
        constants=(
            scale,
            0.0 if norm is None else norm.eps,
            top_k,
            experts,
            max(16, triton.next_power_of_2(top_k)),
            block,
            scoring,
            normalize,
            softmax_of_chosen,
            bias_E is not None and router_ED is not None,
            correction_E is not None,
            there_T is not None,
            norm is not None,
            at_once,
            router_ED is not None and at_once >= num_experts,
        ),
    )
    return ids_TK, weights_TK, normed_TD


@triton.jit(do_not_specialize=["num_rows"])
def _go_on_kernel(
    facts, tokens, tables, num_rows, size, width, block_size: tl.constexpr, ROWS: tl.constexpr
):
    wait_for_previous()
    row = tl.arange(0, ROWS)
    # Who has no slot is nobody, and stays where it is.
    inside = (row < num_rows) & (
        tl.load(facts + 2 * size + row, mask=row < num_rows, other=-1) >= 0
    )
    token = tl.load(tokens + row, mask=inside, other=0)
    position = tl.load(facts + size + row, mask=inside, other=0) + 1
    block = tl.load(tables + row * width + position // block_size, mask=inside, other=0)
    # What is not a number has no embedding; its request ends.
    tl.store(facts + row, tl.maximum(token, 0).to(tl.int32), mask=inside)
    tl.store(facts + size + row, position, mask=inside)
    tl.store(facts + 2 * size + row, block * block_size + position % block_size, mask=inside)
    tl.store(facts + 3 * size + row, position + 1, mask=inside)


_launch_go_on = Launcher(_go_on_kernel, **DEPENDENT)


def go_on(facts_4B: Tensor, tokens_N: Tensor, tables_BM: Tensor, block_size: int) -> None:
    """Move the first N sequences of :class:`gateway.model.decode_facts.DecodeFacts` on, each by its
    token (int64), which stands in a block of its table."""
    _launch_go_on(
        (1, 1),
        (facts_4B, tokens_N, tables_BM),
        varying=(len(tokens_N),),
        fixed=tuple(tables_BM.shape),
        constants=(block_size, triton.next_power_of_2(facts_4B.shape[1])),
    )
