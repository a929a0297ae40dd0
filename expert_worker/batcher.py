"""Which waiting rows are computed together. Pure: no tensors, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mesh.plan import ExpertId

Item = TypeVar("Item")


@dataclass
class Batcher(Generic[Item]):
    """Queues rows and hands out what waits for the expert of the oldest.

    ``merge_rows`` bounds how many rows of one expert go into one batch; a single item that is
    larger goes alone.
    """

    merge_rows: int
    queued_rows: int = 0
    _waiting: list[tuple[ExpertId, int, Item]] = field(default_factory=list)

    def put(self, expert: ExpertId, rows: int, item: Item) -> None:
        """Queue ``rows`` rows for an expert."""
        self._waiting.append((expert, rows, item))
        self.queued_rows += rows

    def take(self) -> tuple[ExpertId, list[Item]]:
        """The next batch, in order of arrival; there must be ``queued_rows``."""
        oldest, rows, first = self._waiting[0]
        items, left = [first], []
        full = False
        for expert, count, item in self._waiting[1:]:
            if expert == oldest and not full:
                full = rows + count > self.merge_rows
                if not full:
                    items.append(item)
                    rows += count
                    continue
            left.append((expert, count, item))
        self._waiting = left
        self.queued_rows -= rows
        return oldest, items
