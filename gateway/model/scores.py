"""What a step says of the next tokens.

Legend: N rows that want a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOT_A_NUMBER = -1
"""In place of a token id, where a row of logits has a NaN."""


class Likeliest(NamedTuple):
    """:func:`likeliest` of all rows (int64), which a device has in hand."""

    ids_N: Tensor
    on_host_N: Tensor
    """The same, pinned, once the device's stream has come so far."""


class Scores:
    """Of each row, how likely every token is; on a device that may be still to come."""

    def __init__(self, head_NV: Tensor, likeliest: Likeliest | None = None) -> None:
        """What the head made, in the model's dtype; ``likeliest`` of it, if that is asked for
        already."""
        self._head_NV = head_NV
        self.likeliest = likeliest

    @property
    def logits_NV(self) -> Tensor:
        """float32. The caller may overwrite it."""
        return self._head_NV.float()

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """Of several micro-batches, end to end."""
        return parts[0] if len(parts) == 1 else cls(torch.cat([part._head_NV for part in parts]))

    def of_rows(self, rows: Sequence[int]) -> Scores:
        """Of some of the rows."""
        return Scores(self._head_NV[list(rows)])


def likeliest(scores_NV: Tensor) -> Tensor:
    """The largest of each row, NOT_A_NUMBER where there is a NaN: to argmax it is the largest."""
    if scores_NV.device.type == "cpu":  # NumPy is many times faster at it
        token_ids_N = torch.from_numpy(scores_NV.numpy().argmax(axis=-1))
    else:
        token_ids_N = scores_NV.argmax(dim=-1)
    largest_N = scores_NV.gather(1, token_ids_N.unsqueeze(1)).flatten()
    return token_ids_N.masked_fill_(largest_N.isnan(), NOT_A_NUMBER)
