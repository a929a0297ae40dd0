"""Routed rows between their tokens and the arenas: in order of expert out, weighted sums back.

Legend: T tokens, K experts a token, R = T x K routed rows, E experts of a layer, D hidden size,
N arena rows. Where experts are cut into n slices, E counts slices, and ``ids_TK`` and ``rows_TK``
have n columns for each of ``weights_TK``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mesh import native

IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Sorted(Protocol):
    """Rows whose order by expert is known, those of one expert as they came."""

    def counts(self) -> list[int]:
        """Rows of each expert."""
        ...

    def scatter(
        self, x_TD: Tensor, rows: IntArray, headers: Mapping[int, IntArray], send_ND: Tensor
    ) -> Tensor:
        """Write the n-th row in order of expert to arena row ``rows[n]``, and what is an int32
        each of ``headers`` from the start of its arena row on. Returns ``rows_TK``, the arena
        row of each. Everything is written when this returns."""
        ...


class Layout(Protocol):
    """How a device does it; ``micro_batch`` says whose buffers may be used."""

    def sort(self, micro_batch: int, ids_TK: Tensor, num_experts: int) -> Sorted: ...

    def combine(self, reply_ND: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """``y_TD``: summed in float32 and in order of K, in the dtype of the replies. Every slice
        of an expert has the expert's weight."""
        ...


@dataclass(frozen=True)
class _CpuSorted:
    ids_TK: Tensor
    num_experts: int

    def counts(self) -> list[int]:
        counts: list[int] = np.bincount(
            self.ids_TK.view(-1).numpy(), minlength=self.num_experts
        ).tolist()
        return counts

    def scatter(
        self, x_TD: Tensor, rows: IntArray, headers: Mapping[int, IntArray], send_ND: Tensor
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        rows_TK = torch.empty_like(self.ids_TK)
        native.short.layout_scatter(
            self.ids_TK.data_ptr(),
            self.ids_TK.numel(),
            self.ids_TK.shape[1],
            rows.ctypes.data,
            x_TD.data_ptr(),
            send_ND.data_ptr(),
            x_TD.shape[1] * x_TD.element_size(),
            rows_TK.data_ptr(),
        )
        for row, header in headers.items():
            words = send_ND[row:].view(-1).view(torch.int32)
            words[: len(header)] = torch.from_numpy(header)
        return rows_TK


class CpuLayout:
    """Compiled: for a few rows, calls into a tensor library would cost more than the work."""

    def sort(self, micro_batch: int, ids_TK: Tensor, num_experts: int) -> _CpuSorted:
        """See :class:`Layout`."""
        return _CpuSorted(ids_TK.contiguous(), num_experts)

    def combine(self, reply_ND: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See :class:`Layout`."""
        tokens, per_token = rows_TK.shape
        if per_token != weights_TK.shape[1]:
            weights_TK = weights_TK.repeat_interleave(per_token // weights_TK.shape[1], dim=1)
        if reply_ND.dtype != torch.float32:
            y_TKD = reply_ND.index_select(0, rows_TK.view(-1)).view(tokens, per_token, -1)
            return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(reply_ND.dtype)
        weights_TK = weights_TK.contiguous()
        y_TD = reply_ND.new_empty(tokens, reply_ND.shape[1])
        native.short.layout_combine(
            reply_ND.data_ptr(),
            rows_TK.data_ptr(),
            weights_TK.data_ptr(),
            tokens,
            per_token,
            reply_ND.shape[1],
            y_TD.data_ptr(),
        )
        return y_TD
