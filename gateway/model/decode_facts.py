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
        """Where each sequence of the batch stands."""
        self._next_positions: list[int] = []
        """Where it will, once that is foreseen."""

    @property
    def count(self) -> int:
        """Sequences of the batch."""
        return len(self._positions)

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
        self._positions, self._next_positions = list(batch.num_cached), []

    def foresee(self, block_tables: Sequence[BlockTable], block_size: int) -> bool:
        """Make ready to :meth:`go_on`, while the batch is on its way: these are the blocks of its
        sequences, those that it has and perhaps more. False where one has no block for its next
        token."""
        if block_tables != self._tables[: self.count]:
            self._lay_out(block_tables)
        positions = [position + 1 for position in self._positions]
        for position, table in zip(positions, block_tables, strict=True):
            if position >= len(table) * block_size:
                return False
        self._next_positions = positions
        return True

    def go_on(self, tokens_N: Tensor, block_size: int) -> bool:
        """Move each sequence on by its next token (int64), which the device has chosen: nothing
        waits for the host. False, with nothing done, where that was not foreseen."""
        if not self._next_positions or len(tokens_N) != len(self._next_positions):
            return False
        self._move_on(tokens_N, block_size)
        self.went_on()
        return True

    def went_on(self) -> None:
        """What was foreseen has come, by whatever moved the sequences on the device."""
        self._positions, self._next_positions = self._next_positions, []

    def _move_on(self, tokens_N: Tensor, block_size: int) -> None:
        from gateway.model import gpu_kernels

        gpu_kernels.go_on(self.facts_4B, tokens_N, self.tables_BM, block_size)

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
