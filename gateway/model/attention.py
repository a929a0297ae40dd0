"""Attention over the paged KV cache.

:class:`PagedAttention` is made once for a step: it knows which slots each sequence reads, for
all layers. The attention blocks, one of each layer, make queries, store keys and values and ask
it for the rest. It is the one place to replace for kernels that read pages on a GPU.

Legend: T tokens of the step, S sequences of the step, B sequences of a group, Q queries of a
group, L slots that a sequence reads, H heads, J heads of keys and values, K size of a key, V size
of a value, D hidden size, N size of the unturned part of a key, R rank of the latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.model.batch import SequenceSlice
from gateway.model.kv_cache import KvCache
from gateway.model.norm import RmsNorm
from gateway.model.rope import rotate_
from mesh.model_config import GroupedAttention, LatentAttention


@dataclass(frozen=True)
class KvLayout:
    """Where a row of the cache has what, and how scores are scaled."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    value_offset: int
    scale: float


@dataclass(frozen=True)
class _Group:
    """Sequences that are attended in one call: many of one token, or one of many."""

    rows: slice | Tensor
    """Which of the step's T tokens."""
    num_sequences: int
    slots: Tensor
    """int64 [B * L]."""
    bias: Tensor | None
    """[B or 1, 1, 1 or Q, L], zero or -inf; None: every slot is seen, or the causal ones."""
    decode: bool


class PagedAttention:
    """One step's reads and writes of the cache.

    ``windows`` are those that layers will ask for; ``sinks`` whether they will bring some.
    """

    def __init__(
        self,
        slices: Sequence[SequenceSlice],
        kv: KvCache,
        windows: Iterable[int | None],
        sinks: bool,
    ) -> None:
        self._kv = kv
        self._sinks = sinks
        self._slices = slices
        self._device = kv.rows[0].device
        self._dtype = kv.rows[0].dtype
        widest = max(len(one.block_table) for one in slices)
        tables = [one.block_table + (0,) * (widest - len(one.block_table)) for one in slices]
        first_slots_SN = torch.tensor(tables) * kv.block_size
        self._slots_SL = (first_slots_SN[:, :, None] + torch.arange(kv.block_size)).flatten(1)
        cached_S = torch.tensor([one.num_cached for one in slices])
        counts = [one.num_tokens for one in slices]
        self._ends = torch.tensor(counts).cumsum(0).tolist()
        sequence_T, positions_T = torch.arange(len(slices)), cached_S
        if self._ends[-1] > len(slices):
            sequence_T = sequence_T.repeat_interleave(torch.tensor(counts))
            first_T = (torch.tensor(self._ends) - torch.tensor(counts) - cached_S)[sequence_T]
            positions_T = torch.arange(self._ends[-1]) - first_T
        self.positions_T = positions_T.to(self._device)
        self._new_slots_T = self._slots_SL[sequence_T, positions_T].to(self._device)
        self._groups = {window: self._group(window) for window in set(windows)}

    def _group(self, window: int | None) -> list[_Group]:
        decoding = [n for n, one in enumerate(self._slices) if one.num_tokens == 1]
        groups = [self._decode(decoding, window)] if decoding else []
        for n, one in enumerate(self._slices):
            if one.num_tokens > 1:
                groups.append(self._prefill(n, one, window))
        return groups

    def _decode(self, sequences: list[int], window: int | None) -> _Group:
        lengths = [self._slices[n].num_cached + 1 for n in sequences]
        rows = [self._ends[n] - 1 for n in sequences]
        longest = max(lengths)
        slots_BL = (
            self._slots_SL[sequences] if len(sequences) < len(self._slices) else self._slots_SL
        )
        if window is not None and longest > window:
            first_B = (torch.tensor(lengths) - window).clamp_(min=0)
            slots_BL = slots_BL.gather(1, first_B[:, None] + torch.arange(window))
            lengths = [min(length, window) for length in lengths]
            longest = window
        slots_BL = slots_BL[:, :longest]
        bias = None
        if min(lengths) < longest:
            absent_BL = torch.arange(longest) >= torch.tensor(lengths)[:, None]
            slots_BL = slots_BL.masked_fill(absent_BL, self._kv.zero_slot)
            bias = self._bias(absent_BL)[:, None, None]
        apart = rows != list(range(rows[0], rows[-1] + 1))
        return self._finish(
            rows=torch.tensor(rows, device=self._device) if apart else slice(rows[0], rows[-1] + 1),
            slots_BL=slots_BL,
            bias=bias,
            decode=True,
        )

    def _prefill(self, n: int, one: SequenceSlice, window: int | None) -> _Group:
        end = one.num_cached + one.num_tokens
        first = 0 if window is None else max(0, one.num_cached - window + 1)
        bias = None
        if one.num_cached or self._sinks or (window is not None and end > window):
            query_Q1 = torch.arange(one.num_cached, end)[:, None]
            key_L = torch.arange(first, end)
            unseen_QL = key_L > query_Q1
            if window is not None:
                unseen_QL |= key_L <= query_Q1 - window
            bias = self._bias(unseen_QL)[None, None]
        return self._finish(
            rows=slice(self._ends[n] - one.num_tokens, self._ends[n]),
            slots_BL=self._slots_SL[n : n + 1, first:end],
            bias=bias,
            decode=False,
        )

    def _bias(self, hidden: Tensor) -> Tensor:
        bias = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)
        return bias.to(self._device)

    def _finish(
        self, rows: slice | Tensor, slots_BL: Tensor, bias: Tensor | None, decode: bool
    ) -> _Group:
        if self._sinks:
            # A sink is a key and value of zeros whose score comes from the bias alone.
            if bias is None:
                bias = torch.zeros(1, 1, 1, slots_BL.shape[1], dtype=self._dtype)
                bias = bias.to(self._device)
            slots_BL = F.pad(slots_BL, (0, 1), value=self._kv.zero_slot)
        return _Group(rows, len(slots_BL), slots_BL.flatten().to(self._device), bias, decode)

    def store(self, rows_SW: Tensor, kv_TW: Tensor) -> None:
        """Write the step's tokens into a layer's cache, before it is read."""
        rows_SW.index_copy_(0, self._new_slots_T, kv_TW)

    def __call__(
        self,
        q_THK: Tensor,
        rows_SW: Tensor,
        layout: KvLayout,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """``out_THV``: each token over what its sequence has stored up to and with itself."""
        groups = self._groups[window]
        if len(groups) == 1:
            return _attend(q_THK, rows_SW, layout, groups[0], sinks_H)
        out_THV = q_THK.new_empty(*q_THK.shape[:2], layout.value_dim)
        for group in groups:
            out_THV[group.rows] = _attend(q_THK[group.rows], rows_SW, layout, group, sinks_H)
        return out_THV


def _attend(
    q_QHK: Tensor, rows_SW: Tensor, layout: KvLayout, group: _Group, sinks_H: Tensor | None
) -> Tensor:
    batch, kv_heads, bias = group.num_sequences, layout.num_kv_heads, group.bias
    num_queries, num_heads, key_dim = q_QHK.shape
    shape = (batch, -1, kv_heads)
    kv_XW = rows_SW.index_select(0, group.slots)
    keys, values = kv_heads * layout.key_dim, kv_heads * layout.value_dim
    k_BJLK = kv_XW[:, :keys].view(*shape, layout.key_dim).transpose(1, 2)
    v_XV = kv_XW[:, layout.value_offset : layout.value_offset + values]
    v_BJLV = v_XV.view(*shape, layout.value_dim).transpose(1, 2)
    if group.decode:
        # Heads that share keys become the queries of one head: nothing is expanded.
        q = q_QHK.reshape(batch, kv_heads, num_heads // kv_heads, key_dim)
        if sinks_H is not None and bias is not None:
            sinks = sinks_H.view(1, kv_heads, -1, 1)
            bias = _with_sinks(bias, sinks, q)
        out = F.scaled_dot_product_attention(q, k_BJLK, v_BJLV, bias, scale=layout.scale)
        return out.reshape(num_queries, num_heads, layout.value_dim)
    q = q_QHK.transpose(0, 1)[None]
    if sinks_H is not None and bias is not None:
        bias = _with_sinks(bias, sinks_H.view(1, -1, 1, 1), q)
    out = F.scaled_dot_product_attention(
        q,
        k_BJLK,
        v_BJLV,
        bias,
        is_causal=bias is None,
        scale=layout.scale,
        enable_gqa=num_heads > kv_heads,
    )
    return out[0].transpose(0, 1)


def _with_sinks(bias: Tensor, sinks: Tensor, q: Tensor) -> Tensor:
    """Append each head's sink to the bias of the slots."""
    batch, heads, queries, _ = q.shape
    return torch.cat(
        [
            bias.expand(batch, heads, queries, bias.shape[-1]),
            sinks.to(bias.dtype).expand(batch, heads, queries, 1),
        ],
        dim=-1,
    )


class AttentionBlock(Protocol):
    """One layer's attention, projections and all."""

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        cis_T1C: Tensor,
        paged: PagedAttention,
        rows_SW: Tensor,
    ) -> Tensor:
        """``residual_TD`` plus the attention of the normed ``x_TD``."""
        ...


class Projection:
    """A linear map that is added to a residual in the same GEMM."""

    def __init__(self, weight_DX: Tensor, bias_D: Tensor | None) -> None:
        self._weight_XD = weight_DX.t()
        self._bias_D = bias_D

    def __call__(self, residual_TD: Tensor, x_TX: Tensor) -> Tensor:
        out_TD = torch.addmm(residual_TD, x_TX, self._weight_XD)
        return out_TD if self._bias_D is None else out_TD.add_(self._bias_D)


@dataclass(frozen=True)
class GroupedWeights:
    """Queries' rows first, then keys', then values'; pairs that turn lie side by side."""

    qkv_XD: Tensor
    qkv_bias_X: Tensor | None
    output: Projection
    head_norm: RmsNorm | None = None
    """Over each head of queries and keys."""
    q_norm: RmsNorm | None = None
    """Over all queries together; with ``k_norm`` over all keys."""
    k_norm: RmsNorm | None = None
    sinks_H: Tensor | None = None


class GroupedBlock:
    """Multi-head, grouped-query or multi-query attention."""

    def __init__(
        self, config: GroupedAttention, window: int | None, weights: GroupedWeights
    ) -> None:
        self._weights = weights
        self._window = window
        self._clip = config.clip_qkv
        self._num_turning = config.num_heads + config.num_kv_heads
        self._num_heads = config.num_heads
        self._head_dim = config.head_dim
        self._q_width = config.num_heads * config.head_dim
        self._qk_width = self._num_turning * config.head_dim
        self._layout = KvLayout(
            num_kv_heads=config.num_kv_heads,
            key_dim=config.head_dim,
            value_dim=config.head_dim,
            value_offset=config.num_kv_heads * config.head_dim,
            scale=config.scale,
        )

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        cis_T1C: Tensor,
        paged: PagedAttention,
        rows_SW: Tensor,
    ) -> Tensor:
        weights = self._weights
        qkv_TX = F.linear(x_TD, weights.qkv_XD, weights.qkv_bias_X)
        if weights.q_norm is not None and weights.k_norm is not None:
            q_TX, k_TX = qkv_TX[:, : self._q_width], qkv_TX[:, self._q_width : self._qk_width]
            q_TX.copy_(weights.q_norm(q_TX))
            k_TX.copy_(weights.k_norm(k_TX))
        if self._clip is not None:
            qkv_TX.clamp_(-self._clip, self._clip)
        qk_TYK = qkv_TX[:, : self._qk_width].view(-1, self._num_turning, self._head_dim)
        if weights.head_norm is not None:
            qk_TYK.copy_(weights.head_norm(qk_TYK))
        rotate_(qk_TYK, cis_T1C)
        paged.store(rows_SW, qkv_TX[:, self._q_width :])
        q_THK = qk_TYK[:, : self._num_heads]
        out_THV = paged(q_THK, rows_SW, self._layout, self._window, weights.sinks_H)
        return weights.output(residual_TD, out_THV.reshape(-1, self._q_width))


@dataclass(frozen=True)
class LatentWeights:
    """``down`` makes the query (or its latent), the latent of keys and values, and the part of
    the key that turns, in this order."""

    down_XD: Tensor
    down_bias_X: Tensor | None
    q_norm: RmsNorm | None
    q_up_YX: Tensor | None
    """None where queries have no latent: ``down`` made them."""
    kv_norm: RmsNorm
    key_up_HNR: Tensor
    value_up_HRV: Tensor
    output: Projection


class LatentBlock:
    """Multi-head latent attention, absorbed: https://arxiv.org/abs/2405.04434, section 2.1.

    Keys and values are never made: queries are brought to the latent's space and its weighted
    sum back from there, so that the cache holds one small head that all heads share.
    """

    def __init__(self, config: LatentAttention, weights: LatentWeights) -> None:
        self._weights = weights
        self._config = config
        q_width = config.num_heads * (config.nope_dim + config.rope_dim)
        q_width = config.q_lora_rank or q_width
        self._split = [q_width, config.kv_lora_rank, config.rope_dim]
        self._layout = KvLayout(
            num_kv_heads=1,
            key_dim=config.kv_lora_rank + config.rope_dim,
            value_dim=config.kv_lora_rank,
            value_offset=0,
            scale=config.scale,
        )

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        cis_T1C: Tensor,
        paged: PagedAttention,
        rows_SW: Tensor,
    ) -> Tensor:
        weights, config = self._weights, self._config
        down_TX = F.linear(x_TD, weights.down_XD, weights.down_bias_X)
        q_TX, latent_TR, turned_TK = torch.split(down_TX, self._split, dim=-1)
        if weights.q_up_YX is not None and weights.q_norm is not None:
            q_TX = F.linear(weights.q_norm(q_TX), weights.q_up_YX)
        q_THK = q_TX.view(-1, config.num_heads, config.nope_dim + config.rope_dim)
        plain_THN, turning_THK = torch.split(
            q_THK, [config.nope_dim, config.rope_dim], dim=-1
        )
        rotate_(turning_THK, cis_T1C)
        rotate_(turned_TK[:, None], cis_T1C)
        paged.store(rows_SW, torch.cat([weights.kv_norm(latent_TR), turned_TK], dim=-1))
        q_HTR = torch.bmm(plain_THN.transpose(0, 1), weights.key_up_HNR)
        q_THK = torch.cat([q_HTR.transpose(0, 1), turning_THK], dim=-1)
        out_THR = paged(q_THK, rows_SW, self._layout)
        out_HTV = torch.bmm(out_THR.transpose(0, 1), weights.value_up_HRV)
        return weights.output(residual_TD, out_HTV.transpose(0, 1).flatten(1))
