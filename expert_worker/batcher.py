"""Which waiting rows are computed together. Pure: no tensors, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mesh.plan import ExpertId

Item = TypeVar("Item")


@dataclass
class Batcher(Generic[Item]):
    """Queues rows by expert and hands out the expert that has waited longest.

    ``merge_rows`` bounds how many rows of one expert go into one batch; a single item that is
    larger goes alone.
    """

    merge_rows: int
    queued_rows: int = 0
    _queues: dict[ExpertId, deque[tuple[int, Item]]] = field(default_factory=dict)

    def put(self, expert: ExpertId, rows: int, item: Item) -> None:
        """Queue ``rows`` rows for an expert."""
        self._queues.setdefault(expert, deque()).append((rows, item))
        self.queued_rows += rows

    def take(self) -> tuple[ExpertId, list[Item]]:
        """The next batch, in order of arrival within its expert; there must be ``queued_rows``.

        An expert with rows left over goes to the end of the line, so that one busy expert
        does not starve the others.
        """
        expert = next(iter(self._queues))
        queue = self._queues.pop(expert)
        items: list[Item] = []
        rows = 0
        while queue and (not items or rows + queue[0][0] <= self.merge_rows):
            count, item = queue.popleft()
            items.append(item)
            rows += count
        if queue:
            self._queues[expert] = queue
        self.queued_rows -= rows
        return expert, items
