"""Attention over the paged cache on a GPU.

Decoding reads the pages where they lie, all sequences in one kernel; a prompt goes through the
library's fused attention, from its own keys and values where none came before them.

Legend: T tokens, B sequences that decode, M blocks of the longest of them; and as in
:mod:`gateway.model.attention`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from gateway.model import gpu_kernels
from gateway.model.attention import KvLayout, PagedAttention, _Group
from gateway.model.batch import SequenceSlice
from gateway.model.kv_cache import KvCache

MAX_KEY_DIM = 512
"""Of what the kernel that decodes keeps on chip; latents are longer."""
_LONG_PROMPT = 4096
"""From here on cuDNN's attention is so much quicker (573 to 309 TFLOP/s at 10,000 tokens on an
H200) that planning it for another length is worth while."""
_FOR_LONG = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,  # which alone takes heads of more than 256
    SDPBackend.MATH,
]


class Decoding:
    """Sequences of one token each, as the kernel wants them. int32 but for the slots."""

    def __init__(
        self, kv: KvCache, slots_T: Tensor, tables_BM: Tensor, lengths_B: Tensor, longest: int
    ) -> None:
        self._kv = kv
        self.slots_T = slots_T
        self.tables_BM = tables_BM
        self.lengths_B = lengths_B
        self._longest = longest

    def turn_and_store(
        self, layer: int, qkv_TX: Tensor, cis_T1C: Tensor, q_width: int, qk_width: int
    ) -> None:
        """See :meth:`PagedAttention.turn_and_store`."""
        gpu_kernels.turn_and_store(
            qkv_TX, cis_T1C, self.slots_T, self._kv.rows[layer], q_width, qk_width
        )

    def __call__(
        self,
        layer: int,
        q_THK: Tensor,
        layout: KvLayout,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """See :class:`PagedAttention`."""
        longest = self._longest if window is None else min(window, self._longest)
        return gpu_kernels.paged_decode(
            q_THK,
            self._kv.rows[layer],
            self.tables_BM,
            self.lengths_B,
            splits=gpu_kernels.num_splits(q_THK, layout.num_kv_heads, longest),
            block_size=self._kv.block_size,
            num_kv_heads=layout.num_kv_heads,
            value_dim=layout.value_dim,
            value_offset=layout.value_offset,
            scale=layout.scale,
            window=window,
            sinks_H=sinks_H,
        )


class GpuPagedAttention(PagedAttention):
    """See :class:`PagedAttention`; keys of at most MAX_KEY_DIM."""

    def __init__(
        self,
        slices: Sequence[SequenceSlice],
        kv: KvCache,
        windows: Collection[int | None],
        sinks: bool,
    ) -> None:
        super().__init__(slices, kv, windows, sinks)
        self._new_kv_TW = self.positions_T.new_empty(0)
        self._decoding: Decoding | None = None
        decoding = [n for n, one in enumerate(slices) if one.num_tokens == 1]
        if decoding:
            last = [self._ends[n] - 1 for n in decoding]
            self._decode_T = torch.tensor(last).to(self._device)
            tables, lengths = pages_of([slices[n] for n in decoding])
            self._decoding = Decoding(
                kv,
                self._new_slots_T,
                torch.from_numpy(tables).to(self._device),
                torch.from_numpy(lengths).to(self._device),
                int(lengths.max()),
            )

    def _group(self, window: int | None) -> list[_Group]:
        """Of prompts alone."""
        return [
            self._prompt(n, one, window) for n, one in enumerate(self._slices) if one.num_tokens > 1
        ]

    def _prompt(self, n: int, one: SequenceSlice, window: int | None) -> _Group:
        end = one.num_cached + one.num_tokens
        if self._sinks or (window is not None and end > window):
            return self._prefill(n, one, window)
        table = one.block_table[: -(-end // self._kv.block_size)] if one.num_cached else ()
        return _Group(
            tokens=slice(self._ends[n] - one.num_tokens, self._ends[n]),
            num_sequences=1,
            blocks=torch.tensor(table, dtype=torch.int64).to(self._device),
            columns=slice(0, end),
            bias=None,
            decode=False,
        )

    def turn_and_store(
        self, layer: int, qkv_TX: Tensor, cis_T1C: Tensor, q_width: int, qk_width: int
    ) -> None:
        """See :class:`PagedAttention`."""
        gpu_kernels.turn_and_store(
            qkv_TX, cis_T1C, self._new_slots_T, self._kv.rows[layer], q_width, qk_width
        )
        self._new_kv_TW = qkv_TX[:, q_width:]

    def __call__(
        self,
        layer: int,
        q_THK: Tensor,
        layout: KvLayout,
        window: int | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """See :class:`PagedAttention`."""
        groups = self._groups[window]
        if self._decoding is not None and not groups:
            return self._decoding(layer, q_THK, layout, window, sinks_H)
        if self._decoding is None and len(groups) == 1:
            return self._attend(layer, q_THK, layout, groups[0], sinks_H)
        out_THV = q_THK.new_empty(*q_THK.shape[:2], layout.value_dim)
        if self._decoding is not None:
            q_BHK = q_THK.index_select(0, self._decode_T)
            out_BHV = self._decoding(layer, q_BHK, layout, window, sinks_H)
            out_THV.index_copy_(0, self._decode_T, out_BHV)
        for group in groups:
            out_THV[group.tokens] = self._attend(layer, q_THK[group.tokens], layout, group, sinks_H)
        return out_THV

    def _attend(
        self, layer: int, q_QHK: Tensor, layout: KvLayout, group: _Group, sinks_H: Tensor | None
    ) -> Tensor:
        if group.bias is not None:
            return super()._attend(layer, q_QHK, layout, group, sinks_H)
        if len(group.blocks):
            pages = self._kv.pages[layer].index_select(0, group.blocks)
            kv_LW = pages.view(-1, layout.width)[: group.columns.stop]
        else:
            kv_LW = self._new_kv_TW[group.tokens]
        heads = layout.num_kv_heads
        k_LJK = kv_LW[:, : heads * layout.key_dim].view(len(kv_LW), heads, -1)
        v_LJV = kv_LW[:, layout.value_offset :].view(len(kv_LW), heads, -1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_QHK, k_LJK, v_LJV))
        out = _causal(q, k, v, layout.scale)
        return out[0].transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Queries are the last of the positions that keys have."""
    grouped = q.shape[1] > k.shape[1]
    if q.shape[2] < k.shape[2]:
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    backends = _FOR_LONG if q.shape[2] >= _LONG_PROMPT and q.dtype != torch.float32 else []
    with sdpa_kernel(backends, set_priority=True) if backends else nullcontext():
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )


def pages_of(slices: Sequence[SequenceSlice]) -> tuple[np.ndarray, np.ndarray]:
    """Blocks (padded with 0) and lengths of sequences, int32."""
    lengths = np.array([one.num_cached + one.num_tokens for one in slices], dtype=np.int32)
    tables = np.zeros((len(slices), max(len(one.block_table) for one in slices)), dtype=np.int32)
    for row, one in zip(tables, slices, strict=True):
        row[: len(one.block_table)] = one.block_table
    return tables, lengths
