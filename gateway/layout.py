"""Routed rows between their tokens and the arenas: in order of expert out, weighted sums back.

Legend: T tokens, K experts a token, R = T x K routed rows, E experts of a layer, D hidden size,
N arena rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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
        """``y_TD``: summed in float32 and in order of K, in the dtype of the replies."""
        ...


@dataclass(frozen=True)
class _CpuSorted:
    shape: torch.Size
    ids_R: IntArray
    num_experts: int

    def counts(self) -> list[int]:
        counts: list[int] = np.bincount(self.ids_R, minlength=self.num_experts).tolist()
        return counts

    def scatter(
        self, x_TD: Tensor, rows: IntArray, headers: Mapping[int, IntArray], send_ND: Tensor
    ) -> Tensor:
        rows_R = np.empty(len(self.ids_R), dtype=np.int64)
        rows_R[np.argsort(self.ids_R, kind="stable")] = rows
        rows_TK = torch.from_numpy(rows_R).view(self.shape)
        send_ND.index_copy_(0, rows_TK.view(-1), x_TD.repeat_interleave(self.shape[1], dim=0))
        for row, header in headers.items():
            words = send_ND[row:].view(-1).view(torch.int32)
            words[: len(header)] = torch.from_numpy(header)
        return rows_TK


class CpuLayout:
    """By NumPy, which has the least to say for a few rows."""

    def sort(self, micro_batch: int, ids_TK: Tensor, num_experts: int) -> _CpuSorted:
        """See :class:`Layout`."""
        return _CpuSorted(ids_TK.shape, ids_TK.reshape(-1).numpy(), num_experts)

    def combine(self, reply_ND: Tensor, rows_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See :class:`Layout`."""
        y_TKD = reply_ND.index_select(0, rows_TK.view(-1)).view(*rows_TK.shape, -1)
        return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(reply_ND.dtype)
