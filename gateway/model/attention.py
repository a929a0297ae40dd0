"""Attention over the paged KV cache.

:class:`PagedAttention` is made once for a step: it knows which blocks each sequence reads, for
all layers. The attention blocks, one of each layer, make queries, store keys and values and ask
it for the rest. It is the one place to replace for kernels that read pages on a GPU.

Legend: T tokens of the step, B sequences of a group, Q queries of a group, L positions that a
sequence reads, W elements of a position in the cache, H heads, J heads of keys and values, K size
of a key, V size of a value, D hidden size, R rank of the latent, U size of the unturned part of a
key, X and Y widths of projections.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.model.batch import SequenceSlice
from gateway.model.kv_cache import KvCache
from gateway.model.norm import RmsNorm
from gateway.model.rope import rotate_
from mesh import native
from mesh.linear import Linear
from mesh.model_config import GroupedAttention, LatentAttention

# On a CPU, what one call gathers should still be in the core's second cache when it is multiplied:
# half of it is best, measured at 2 MiB.
_TILE_BYTES = 1 << 20


@dataclass(frozen=True)
class KvLayout:
    """Where a row of the cache has what, and how scores are scaled."""

    width: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    value_offset: int
    scale: float


@dataclass(frozen=True)
class _Group:
    """Sequences that are attended in one call: many of one token, or one of many."""

    tokens: slice | Tensor
    """Which of the step's T tokens."""
    num_sequences: int
    blocks: Tensor
    """int64, the blocks to read, equally many of each sequence."""
    columns: slice
    """Which of the positions in its blocks each sequence attends to."""
    bias: Tensor | None
    """[B or 1, 1, 1 or Q, columns], zero or -inf; None: all are seen, or the causal ones."""
    decode: bool


@dataclass(frozen=True)
class _Pages:
    """Sequences of one new token whose pages are read where they lie, by compiled code."""

    tokens: slice | Tensor
    blocks_BN: Tensor
    first_B: Tensor
    end_B: Tensor
    """int64: which of the positions in its blocks each sequence attends to."""
    longest: int


class PagedAttention:
    """One step's writes and reads of the cache.

    ``windows`` are those that layers will ask for; ``sinks`` says that they will bring some.
    """

    def __init__(
        self,
        slices: Sequence[SequenceSlice],
        kv: KvCache,
        windows: Collection[int | None],
        sinks: bool,
    ) -> None:
        self._kv = kv
        self._sinks = sinks
        self._slices = slices
        self._device = kv.rows[0].device
        self._dtype = kv.rows[0].dtype
        on_cpu = self._device.type == "cpu"
        self._in_place = on_cpu and self._dtype == torch.float32
        self._blocks_at_once = _TILE_BYTES // kv.pages[0][0].nbytes if on_cpu else sys.maxsize
        self._ends = list(accumulate(one.num_tokens for one in slices))
        positions: list[int] = []
        slots: list[int] = []
        for one in slices:
            new = range(one.num_cached, one.num_cached + one.num_tokens)
            table, size = one.block_table, kv.block_size
            positions.extend(new)
            slots.extend([table[p // size] * size + p % size for p in new])
        self.positions_T = torch.tensor(positions).to(self._device)
        self._new_slots_T = torch.tensor(slots).to(self._device)
        self._pages: dict[int | None, _Pages] = {}
        self._groups = {window: self._group(window) for window in windows}

    def _group(self, window: int | None) -> list[_Group]:
        decoding = [n for n, one in enumerate(self._slices) if one.num_tokens == 1]
        groups: list[_Group] = []
        if decoding and self._in_place:
            self._pages[window] = self._read_in_place(decoding, window)
        elif decoding:
            groups.extend(self._decode(decoding, window))
        for n, one in enumerate(self._slices):
            if one.num_tokens > 1:
                groups.append(self._prefill(n, one, window))
        return groups

    def _read_in_place(self, sequences: list[int], window: int | None) -> _Pages:
        tables, firsts, ends = zip(
            *(self._reach(self._slices[n], window) for n in sequences), strict=True
        )
        return _Pages(
            self._tokens(sequences),
            self._padded(tables, max(map(len, tables))),
            torch.tensor(firsts),
            torch.tensor(ends),
            max(ends),
        )

    def _tokens(self, sequences: Sequence[int]) -> slice | Tensor:
        """Which of the step's tokens are these sequences', of one each."""
        last = [self._ends[n] - 1 for n in sequences]
        if last[-1] - last[0] == len(last) - 1:
            return slice(last[0], last[-1] + 1)
        return torch.tensor(last, device=self._device)

    def _decode(self, sequences: list[int], window: int | None) -> list[_Group]:
        reached = [self._reach(self._slices[n], window) for n in sequences]
        tables, firsts, ends = zip(*reached, strict=True)
        widths = [len(table) for table in tables]
        blocks_BN = self._padded(tables, max(widths))
        start, stop = min(firsts), self._stop(max(ends), max(widths))
        bias = None
        if self._sinks or not _all_are(start, firsts) or not _all_are(stop, ends):
            column_L = torch.arange(start, stop)
            first_B1, end_B1 = torch.tensor(firsts)[:, None], torch.tensor(ends)[:, None]
            bias = self._bias((column_L < first_B1) | (column_L >= end_B1))[:, None, None]
        groups = []
        for begin, end in _tiles(widths, self._blocks_at_once):
            width = max(widths[begin:end])
            columns = slice(start, self._stop(max(ends[begin:end]), width))
            groups.append(
                _Group(
                    tokens=self._tokens(sequences[begin:end]),
                    num_sequences=end - begin,
                    blocks=blocks_BN[begin:end, : width + self._sinks].flatten(),
                    columns=columns,
                    bias=None if bias is None else bias[begin:end, ..., : columns.stop - start],
                    decode=True,
                )
            )
        return groups

    def _prefill(self, n: int, one: SequenceSlice, window: int | None) -> _Group:
        table, first, end = self._reach(one, window)
        columns, bias = slice(first, self._stop(end, len(table))), None
        if self._sinks or one.num_cached or (window is not None and one.num_tokens > window):
            column_L = torch.arange(columns.start, columns.stop)
            query_Q1 = torch.arange(end - one.num_tokens, end)[:, None]
            unseen_QL = column_L > query_Q1
            if window is not None:
                unseen_QL |= column_L <= query_Q1 - window
            bias = self._bias(unseen_QL)[None, None]
        return _Group(
            tokens=slice(self._ends[n] - one.num_tokens, self._ends[n]),
            num_sequences=1,
            blocks=self._padded([table], len(table)).flatten(),
            columns=columns,
            bias=bias,
            decode=False,
        )

    def _reach(self, one: SequenceSlice, window: int | None) -> tuple[tuple[int, ...], int, int]:
        """The blocks a slice reads, and the first and the end of its positions among them."""
        end, size = one.num_cached + one.num_tokens, self._kv.block_size
        first = 0 if window is None else max(0, one.num_cached + 1 - window)
        skipped = first // size
        table = one.block_table[skipped : -(-end // size)]
        return table, first - skipped * size, end - skipped * size

    def _stop(self, end: int, num_blocks: int) -> int:
        """Where columns end: with sinks, behind the first position of the zero block that
        follows the sequence's own and stands for the sink."""
        return num_blocks * self._kv.block_size + 1 if self._sinks else end

    def _padded(self, tables: Sequence[tuple[int, ...]], width: int) -> Tensor:
        zero = (self._kv.zero_block,)
        padded = [table + zero * (width + self._sinks - len(table)) for table in tables]
        return torch.tensor(padded).to(self._device)

    def _bias(self, unseen: Tensor) -> Tensor:
        bias = torch.zeros(unseen.shape, dtype=self._dtype).masked_fill_(unseen, -torch.inf)
        return bias.to(self._device)

    def turn_and_store(
        self, layer: int, qkv_TX: Tensor, cis_T1C: Tensor, q_width: int, qk_width: int
    ) -> None:
        """Turn queries and keys in place, and :meth:`store` the keys with the values."""
        head_dim = 2 * cis_T1C.shape[-1]
        rotate_(qkv_TX[:, :qk_width].view(len(qkv_TX), -1, head_dim), cis_T1C)
        self.store(layer, qkv_TX[:, q_width:])

    def store(self, layer: int, kv_TW: Tensor) -> None:
        """Write the step's tokens into a layer's cache, before it is read."""
        self._kv.rows[layer].index_copy_(0, self._new_slots_T, kv_TW)

    def __call__(
        self,
        layer: int,
        q_THK: Tensor,
        layout: KvLayout,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """``out_THV``: each token over what its sequence has stored up to and with itself."""
        groups, pages = self._groups[window], self._pages.get(window)
        if pages is not None and not groups:
            return self._attend_in_place(layer, q_THK, layout, pages, sinks_H)
        if pages is None and len(groups) == 1:
            return self._attend(layer, q_THK, layout, groups[0], sinks_H)
        out_THV = q_THK.new_empty(*q_THK.shape[:2], layout.value_dim)
        if pages is not None:
            out_THV[pages.tokens] = self._attend_in_place(
                layer, q_THK[pages.tokens], layout, pages, sinks_H
            )
        for group in groups:
            out_QHV = self._attend(layer, q_THK[group.tokens], layout, group, sinks_H)
            out_THV[group.tokens] = out_QHV
        return out_THV

    def _attend(
        self, layer: int, q_QHK: Tensor, layout: KvLayout, group: _Group, sinks_H: Tensor | None
    ) -> Tensor:
        num_queries, num_heads, key_dim = q_QHK.shape
        batch, kv_heads, bias = group.num_sequences, layout.num_kv_heads, group.bias
        pages = self._kv.pages[layer].index_select(0, group.blocks)
        # Views on what was gathered, each in one call: on a CPU these calls are what costs.
        length, first = group.columns.stop - group.columns.start, group.columns.start * layout.width
        strides = pages.numel() // batch, key_dim, layout.width, 1
        k_BJLK = pages.as_strided((batch, kv_heads, length, key_dim), strides, first)
        strides = pages.numel() // batch, layout.value_dim, layout.width, 1
        v_BJLV = pages.as_strided(
            (batch, kv_heads, length, layout.value_dim), strides, first + layout.value_offset
        )
        if group.decode:
            # Heads that share keys become the queries of one head: nothing is expanded.
            q = q_QHK.reshape(batch, kv_heads, -1, key_dim)
        else:
            q = q_QHK.transpose(0, 1)[None]
        if sinks_H is not None and bias is not None:
            bias = _add_sinks(bias, sinks_H, q)
        out = F.scaled_dot_product_attention(
            q,
            k_BJLK,
            v_BJLV,
            bias,
            is_causal=bias is None and not group.decode,
            scale=layout.scale,
            enable_gqa=q.shape[1] > kv_heads,
        )
        if group.decode:
            return out.reshape(num_queries, num_heads, layout.value_dim)
        return out[0].transpose(0, 1)

    def _attend_in_place(
        self, layer: int, q_BHK: Tensor, layout: KvLayout, pages: _Pages, sinks_H: Tensor | None
    ) -> Tensor:
        if q_BHK.stride()[1:] != (layout.key_dim, 1):
            q_BHK = q_BHK.contiguous()
        batch, num_heads, _ = q_BHK.shape
        out_BHV = q_BHK.new_empty(batch, num_heads, layout.value_dim)
        scores = q_BHK.new_empty(pages.longest)
        cache = native.Paged(
            self._kv.rows[layer].data_ptr(),
            self._kv.block_size,
            layout.width,
            layout.num_kv_heads,
            layout.key_dim,
            layout.value_dim,
            layout.value_offset,
            layout.scale,
        )
        sinks_H = None if sinks_H is None else sinks_H.contiguous()
        native.long.attend_pages(
            cache,
            q_BHK.data_ptr(),
            q_BHK.stride(0),
            pages.blocks_BN.data_ptr(),
            pages.blocks_BN.shape[1],
            pages.first_B.data_ptr(),
            pages.end_B.data_ptr(),
            None if sinks_H is None else sinks_H.data_ptr(),
            batch,
            num_heads,
            scores.data_ptr(),
            out_BHV.data_ptr(),
        )
        return out_BHV


def _all_are(value: int, values: Sequence[int]) -> bool:
    return values.count(value) == len(values)


def _tiles(widths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Cut a list into runs of which the count times the widest is at most ``limit``, or of one."""
    cuts, widest = [0], 0
    for n, width in enumerate(widths):
        widest = max(widest, width)
        if (n + 1 - cuts[-1]) * widest > limit and n > cuts[-1]:
            cuts.append(n)
            widest = width
    return list(pairwise([*cuts, len(widths)]))


def _add_sinks(bias: Tensor, sinks_H: Tensor, q: Tensor) -> Tensor:
    """Let the last column, a key and value of zeros, score each head's sink."""
    batch, heads, queries, _ = q.shape
    seen = bias[..., :-1].expand(batch, heads, queries, -1)
    sinks = sinks_H.to(bias.dtype).view(1, heads, -1, 1).expand(batch, heads, queries, 1)
    return torch.cat([seen, sinks], dim=-1)


class Paged(Protocol):
    """What the attention of grouped heads asks of a step's pages."""

    def turn_and_store(
        self, layer: int, qkv_TX: Tensor, cis_T1C: Tensor, q_width: int, qk_width: int
    ) -> None: ...

    def __call__(
        self,
        layer: int,
        q_THK: Tensor,
        layout: KvLayout,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor: ...


class AttentionBlock(Protocol):
    """One layer's attention, projections and all."""

    def __call__(
        self,
        layer: int,
        x_TD: Tensor,
        residual_TD: Tensor,
        cis_T1C: Tensor,
        paged: Any,
    ) -> Tensor:
        """``residual_TD`` plus the attention of the normed ``x_TD``."""
        ...


@dataclass(frozen=True)
class GroupedWeights:
    """Queries' rows first, then keys', then values'; pairs that turn lie side by side."""

    qkv: Linear
    output: Linear
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
            width=config.kv_width,
            num_kv_heads=config.num_kv_heads,
            key_dim=config.head_dim,
            value_dim=config.head_dim,
            value_offset=config.num_kv_heads * config.head_dim,
            scale=config.scale,
        )

    def __call__(
        self,
        layer: int,
        x_TD: Tensor,
        residual_TD: Tensor,
        cis_T1C: Tensor,
        paged: Paged,
    ) -> Tensor:
        weights = self._weights
        qkv_TX = weights.qkv(x_TD)
        if weights.q_norm is not None and weights.k_norm is not None:
            q_TX, k_TX = qkv_TX[:, : self._q_width], qkv_TX[:, self._q_width : self._qk_width]
            q_TX.copy_(weights.q_norm(q_TX))
            k_TX.copy_(weights.k_norm(k_TX))
        if self._clip is not None:
            qkv_TX.clamp_(-self._clip, self._clip)
        qk_TYK = qkv_TX[:, : self._qk_width].view(-1, self._num_turning, self._head_dim)
        if weights.head_norm is not None:
            qk_TYK.copy_(weights.head_norm(qk_TYK))
        paged.turn_and_store(layer, qkv_TX, cis_T1C, self._q_width, self._qk_width)
        q_THK = qk_TYK[:, : self._num_heads]
        out_THV = paged(layer, q_THK, self._layout, self._window, weights.sinks_H)
        return weights.output(out_THV.reshape(-1, self._q_width), residual_TD)


@dataclass(frozen=True)
class LatentWeights:
    """``down`` makes the query (or its latent), the latent of keys and values, and the part of
    the key that turns, in this order."""

    down: Linear
    q_norm: RmsNorm | None
    q_up: Linear | None
    """None where queries have no latent: ``down`` made them."""
    kv_norm: RmsNorm
    key_up_HUR: Tensor
    value_up_HRV: Tensor
    output: Linear


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
            width=config.kv_width,
            num_kv_heads=1,
            key_dim=config.kv_lora_rank + config.rope_dim,
            value_dim=config.kv_lora_rank,
            value_offset=0,
            scale=config.scale,
        )

    def __call__(
        self,
        layer: int,
        x_TD: Tensor,
        residual_TD: Tensor,
        cis_T1C: Tensor,
        paged: PagedAttention,
    ) -> Tensor:
        weights, config = self._weights, self._config
        down_TX = weights.down(x_TD)
        q_TX, latent_TR, turned_TK = torch.split(down_TX, self._split, dim=-1)
        if weights.q_up is not None and weights.q_norm is not None:
            q_TX = weights.q_up(weights.q_norm(q_TX))
        q_THK = q_TX.view(-1, config.num_heads, config.nope_dim + config.rope_dim)
        plain_THU, turning_THK = torch.split(q_THK, [config.nope_dim, config.rope_dim], dim=-1)
        rotate_(turning_THK, cis_T1C)
        rotate_(turned_TK[:, None], cis_T1C)
        paged.store(layer, torch.cat([weights.kv_norm(latent_TR), turned_TK], dim=-1))
        q_HTR = torch.bmm(plain_THU.transpose(0, 1), weights.key_up_HUR)
        q_THK = torch.cat([q_HTR.transpose(0, 1), turning_THK], dim=-1)
        out_THR = paged(layer, q_THK, self._layout)
        out_HTV = torch.bmm(out_THR.transpose(0, 1), weights.value_up_HRV)
        return weights.output(out_HTV.transpose(0, 1).flatten(1), residual_TD)
