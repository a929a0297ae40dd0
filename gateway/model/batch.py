"""What one step asks of the decoder.

Legend: T tokens of the step, N rows that need logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch


class SequenceSlice(NamedTuple):
    """The tokens of one sequence in a step: ``num_tokens`` new ones behind ``num_cached``."""

    num_cached: int
    num_tokens: int
    block_table: tuple[int, ...]
    """KV blocks that hold positions 0 to num_cached + num_tokens - 1, in order. Of a sequence that
    decodes, the same object from step to step until it has another block."""


@dataclass(frozen=True)
class ForwardBatch:
    """Slices laid end to end. Token t of slice s stands at position num_cached + t.

    By column, of one entry a slice: a batch that decodes is laid out a thousand times a second.
    """

    num_cached: Sequence[int]
    num_tokens: Sequence[int]
    block_tables: list[tuple[int, ...]]
    token_ids_T: torch.Tensor
    """int64, on the CPU; the decoder moves it."""
    logit_rows_N: torch.Tensor
    """int64: the rows of T whose logits are wanted, distinct and ascending."""

    @classmethod
    def of(
        cls, slices: Iterable[SequenceSlice], token_ids_T: torch.Tensor, logit_rows_N: torch.Tensor
    ) -> ForwardBatch:
        """A batch of at least one slice."""
        num_cached, num_tokens, block_tables = zip(*slices, strict=True)
        return cls(num_cached, num_tokens, list(block_tables), token_ids_T, logit_rows_N)

    @cached_property
    def slices(self) -> tuple[SequenceSlice, ...]:
        """One after another."""
        return tuple(map(SequenceSlice, self.num_cached, self.num_tokens, self.block_tables))


class PendingExperts(Protocol):
    """Rows that are away at their experts."""

    def combine(self) -> torch.Tensor:
        """Wait for the replies; y_TD, the weighted sum over each row's experts.

        Rows whose expert nobody serves come back as zeros and are noted by the dispatcher:
        the engine asks it after the step which rows of the batch are void.
        """
        ...


class Experts(Protocol):
    """The routed experts of every layer, wherever they are."""

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> PendingExperts:
        """Send each row to its K experts. Returns at once; ``x_TD`` is not needed afterwards.

        ``expert_ids_TK`` is int64, ``weights_TK`` float32; the sum over K runs in the order of
        K and in float32, so that it does not depend on where the experts are.
        """
        ...
