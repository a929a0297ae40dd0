"""What the graphs of a step that decodes read of its batch, in the memory that they know.

Legend: B sequences, padded to the size of the graphs; M blocks of the longest that may be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gateway.model.batch import ForwardBatch

BlockTable = tuple[int, ...]
_NOBODY_41 = np.array([[0], [0], [-1], [0]], dtype=np.int32)


class DecodeFacts:
    """The buffers of one size of batch, all int32. From step to step little changes in them: each
    sequence moves on by a token, few have another block, and the rest is as it was."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        def on_host(*shape: int) -> Tensor:
            pinned = device.type == "cuda"
            return torch.zeros(shape, dtype=torch.int32, pin_memory=pinned)

        self.size = size
        self._on_host_4B = on_host(4, size)
        self._as_array_4B = self._on_host_4B.numpy()
        self.facts_4B = torch.zeros(4, size, dtype=torch.int32, device=device)
        self.slots_B.fill_(-1)  # what runs before a batch is there writes nowhere
        self.tables_BM = torch.zeros(size, width, dtype=torch.int32, device=device)
        self._tables_on_host_BM = np.zeros((size, width), dtype=np.int32)
        self._staged = on_host(size * width)
        """What has changed of the tables, end to end: only so is it copied without a wait."""
        self._tables: list[BlockTable] = [()] * size
        self._rows_B = np.arange(size)
        self._positions: list[int] = []
        """Of the last batch."""
        self._went_on = False

    @property
    def tokens_B(self) -> Tensor:
        """The token of each sequence."""
        return self.facts_4B[0]

    @property
    def positions_B(self) -> Tensor:
        """Where it stands."""
        return self.facts_4B[1]

    @property
    def slots_B(self) -> Tensor:
        """Where in the cache its key and value go; -1: nowhere."""
        return self.facts_4B[2]

    @property
    def lengths_B(self) -> Tensor:
        """How many positions each sequence attends to."""
        return self.facts_4B[3]

    def fill(self, batch: ForwardBatch, block_size: int) -> None:
        """Bring a batch to the device. Rows past it have no slot, no length and no experts."""
        count = len(batch.num_tokens)
        if batch.block_tables != self._tables[:count]:
            self._lay_out(batch.block_tables)
        self._as_array_4B[:, count:] = _NOBODY_41
        tokens, positions, slots, lengths = self._as_array_4B[:, :count]
        tokens[:] = batch.token_ids_T.numpy()
        positions[:] = batch.num_cached
        blocks, within = np.divmod(positions, block_size)
        slots[:] = self._tables_on_host_BM[self._rows_B[:count], blocks] * block_size + within
        lengths[:] = positions + 1
        self.facts_4B.copy_(self._on_host_4B, non_blocking=True)
        self._positions = list(batch.num_cached)
        self._went_on = False

    def go_on(self, tokens_N: Tensor, block_size: int) -> bool:
        """Move each sequence of the last batch on by its next token, which the device has chosen:
        nothing waits for the host. False, with nothing done, where one has no block for it yet."""
        positions = [position + 1 for position in self._positions]
        if len(tokens_N) != len(positions) or self._went_on:
            return False
        for position, table in zip(positions, self._tables, strict=False):
            if position >= len(table) * block_size:
                return False
        self._move_on(tokens_N, block_size)
        self._positions, self._went_on = positions, True
        return True

    def _move_on(self, tokens_N: Tensor, block_size: int) -> None:
        from gateway.model import gpu_kernels

        gpu_kernels.go_on(self.facts_4B, tokens_N, self.tables_BM, block_size)

    def follow(self, batch: ForwardBatch) -> bool:
        """Whether this is the batch that :meth:`go_on` has brought about; then it needs no
        :meth:`fill`."""
        if not self._went_on or list(batch.num_cached) != self._positions:
            return False
        tables = batch.block_tables
        for new, old in zip(tables, self._tables, strict=False):
            if new is not old and new[: len(old)] != old:
                return False
        if tables != self._tables[: len(tables)]:
            self._lay_out(tables)
        self._went_on = False
        return True

    def _lay_out(self, tables: Sequence[BlockTable]) -> None:
        """Take over the tables of the first rows, where they are others than before."""
        changed = [row for row, new in enumerate(tables) if new is not self._tables[row]]
        start, stop = len(tables[changed[0]]), 0
        for row in changed:
            old, new = self._tables[row], tables[row]
            same = len(old) if new[: len(old)] == old else 0
            self._tables_on_host_BM[row, same : len(new)] = new[same:]
            self._tables[row] = new
            start, stop = min(start, same), max(stop, len(new))
        rows, columns = slice(changed[0], changed[-1] + 1), slice(start, stop)
        part = self._tables_on_host_BM[rows, columns]
        staged = self._staged[: part.size].view(part.shape)
        staged.numpy()[:] = part
        self.tables_BM[rows, columns].copy_(staged.to(self.tables_BM.device, non_blocking=True))
