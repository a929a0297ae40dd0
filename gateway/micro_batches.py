"""From the parts of a step to what the decoder takes."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import TypeVar

import torch

from gateway.kv_blocks import BlockAllocator
from gateway.model.batch import ForwardBatch, SequenceSlice
from gateway.request import Request
from gateway.scheduler import Part

MicroBatch = tuple[Part, ...]
T = TypeVar("T")


def split(parts: MicroBatch) -> list[MicroBatch]:
    """Two micro-batches of about as many tokens each; one where there is one part."""
    if len(parts) == 1:
        return [parts]
    ends = list(accumulate(part.num_tokens for part in parts))
    cut = min(range(1, len(parts)), key=lambda i: abs(2 * ends[i - 1] - ends[-1]))
    return [parts[:cut], parts[cut:]]


def to_batch(parts: MicroBatch, blocks: BlockAllocator) -> ForwardBatch:
    """Lay the parts end to end; each one's last row wants logits if it reaches the end."""
    token_ids = array("q")
    slices = []
    logit_rows = array("q")
    for request, num_tokens, wants_token in parts:
        start, table = request.num_computed, request.table.blocks
        if num_tokens == 1:
            token_ids.append(request.token_ids[start])
        else:
            token_ids += request.token_ids[start : start + num_tokens]
        if wants_token:
            logit_rows.append(len(token_ids) - 1)
        else:
            table = table[: blocks.blocks_for(start + num_tokens)]
        slices.append(SequenceSlice(start, num_tokens, table))
    return ForwardBatch(
        tuple(slices),
        torch.frombuffer(token_ids, dtype=torch.int64),
        torch.frombuffer(logit_rows, dtype=torch.int64) if logit_rows else torch.empty(0).long(),
    )


def requests_of_rows(
    micro_batches: list[MicroBatch], rows: Mapping[tuple[int, int], T]
) -> dict[Request, T]:
    """Whose token a (micro-batch, row) is; one value a request, where it has several rows."""
    requests: dict[Request, T] = {}
    for (index, row), value in rows.items():
        ends = list(accumulate(part.num_tokens for part in micro_batches[index]))
        requests.setdefault(micro_batches[index][bisect_right(ends, row)].request, value)
    return requests
