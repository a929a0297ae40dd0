"""The layout of routed rows on a GPU: two kernels out, one back, and no wait but for counts.

Counts come to the host in a small copy behind the sort, and where each row goes returns in one,
both by pinned memory. Layers that come from graphs need none of this: :mod:`gateway.asking`.

Legend: T tokens, K experts a token, R = T x K routed rows, E experts of a layer, D hidden size,
N arena rows, M headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gateway import gpu_kernels
from gateway.layout import IntArray
from gateway.model.norm import RmsNorm

_MAX_HEADERS = 256


class _Buffers:
    """What one micro-batch needs, made once."""

    def __init__(self, max_rows: int, num_experts: int, device: torch.device) -> None:
        def pinned(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, pin_memory=True)

        def there(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.num_experts = num_experts
        self.positions_R = there(max_rows)
        self.rows_R = there(max_rows, dtype=torch.int64)
        self.counts_E = there(num_experts)
        self.counts_on_host_E = pinned(num_experts)
        self.row_of_position_R = there(max_rows)
        self.row_of_position_on_host_R = pinned(max_rows)
        self.headers_ME = there(_MAX_HEADERS, num_experts + 1)
        self.headers_on_host_ME = pinned(_MAX_HEADERS, num_experts + 1)
        # Spinning on an event costs less than a microsecond; blocking on one, a wake-up.
        self.event = torch.cuda.Event()

    def wait(self, stream: torch.cuda.Stream) -> None:
        """Until the stream has come to where it is now."""
        self.event.record(stream)
        while not self.event.query():
            pass


@dataclass
class GpuSorted:
    """See :class:`gateway.layout.Sorted`. ``ids_TK`` past the experts are rows of nobody."""

    buffers: _Buffers
    shape: torch.Size
    stream: torch.cuda.Stream

    def counts(self) -> list[int]:
        """See :class:`gateway.layout.Sorted`."""
        self.buffers.wait(self.stream)
        counts: list[int] = self.buffers.counts_on_host_E.tolist()
        return counts

    def scatter(
        self, x_TD: Tensor, rows: IntArray, headers: Mapping[int, IntArray], send_ND: Tensor
    ) -> Tensor:
        """See :class:`gateway.layout.Sorted`. Rows of nobody go nowhere: -1."""
        buffers, num_rows = self.buffers, self.shape.numel()
        on_host = buffers.row_of_position_on_host_R[:num_rows]
        on_host.numpy()[: len(rows)] = rows
        on_host.numpy()[len(rows) :] = -1
        there = buffers.row_of_position_R[:num_rows]
        there.copy_(on_host, non_blocking=True)
        rows_TK = buffers.rows_R[:num_rows].view(self.shape)
        gpu_kernels.scatter(x_TD, buffers.positions_R, there, rows_TK, send_ND)
        self._write(headers, send_ND)
        buffers.wait(self.stream)
        return rows_TK

    def _write(self, headers: Mapping[int, IntArray], send_ND: Tensor) -> None:
        buffers = self.buffers
        items = list(headers.items())
        for start in range(0, len(items), _MAX_HEADERS):
            some = items[start : start + _MAX_HEADERS]
            if start:
                buffers.wait(self.stream)
            on_host = buffers.headers_on_host_ME.numpy()
            for n, (row, header) in enumerate(some):
                on_host[n, 0] = row
                on_host[n, 1:] = header
            there = buffers.headers_ME[: len(some)]
            there.copy_(buffers.headers_on_host_ME[: len(some)], non_blocking=True)
            gpu_kernels.write_headers(there, send_ND)


class GpuLayout:
    """See :class:`gateway.layout.Layout`. ``max_rows`` is of one micro-batch.

    Made under the stream that everything but the capture of graphs will run on.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self._max_rows = max_rows
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._buffers: dict[int, _Buffers] = {}

    def sort(self, micro_batch: int, ids_TK: Tensor, num_experts: int) -> GpuSorted:
        """See :class:`gateway.layout.Layout`."""
        buffers = self._buffers.get(micro_batch)
        if buffers is None or buffers.num_experts != num_experts:
            buffers = _Buffers(self._max_rows, num_experts, self._device)
            self._buffers[micro_batch] = buffers
        gpu_kernels.sort_by_expert(
            ids_TK.reshape(-1), buffers.positions_R[: ids_TK.numel()], buffers.counts_E
        )
        buffers.counts_on_host_E.copy_(buffers.counts_E, non_blocking=True)
        return GpuSorted(buffers, ids_TK.shape, self._stream)

    def combine(
        self,
        reply_ND: Tensor,
        rows_TK: Tensor,
        weights_TK: Tensor,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        """See :class:`gateway.layout.Layout`; ``residual_TD`` is added."""
        return gpu_kernels.combine(reply_ND, rows_TK, weights_TK, residual_TD)

    def combine_and_norm(
        self,
        reply_ND: Tensor,
        rows_TK: Tensor,
        weights_TK: Tensor,
        residual_TD: Tensor,
        norm: RmsNorm,
    ) -> tuple[Tensor, Tensor]:
        """The same, and the norm of that."""
        return gpu_kernels.combine_and_norm(reply_ND, rows_TK, weights_TK, residual_TD, norm)
