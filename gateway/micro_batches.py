"""From the parts of a step to what the decoder takes."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch

from gateway.kv_blocks import BlockAllocator
from gateway.model.batch import ForwardBatch
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
    requests, num_tokens, wants_token = zip(*parts, strict=True)
    num_cached = [request.num_computed for request in requests]
    tables = [request.table.blocks for request in requests]
    if not all(wants_token):
        # It holds blocks for all that is known.
        tables = [
            table if wants else table[: blocks.blocks_for(start + num)]
            for table, start, num, wants in zip(
                tables, num_cached, num_tokens, wants_token, strict=True
            )
        ]
    ends = list(accumulate(num_tokens))
    if ends[-1] == len(parts):
        token_ids = array("q", [request.token_ids[-1] for request in requests])
    else:
        token_ids = array("q")
        for request, start, num in zip(requests, num_cached, num_tokens, strict=True):
            token_ids += request.token_ids[start : start + num]
    logit_rows = [end - 1 for end, wants in zip(ends, wants_token, strict=True) if wants]
    return ForwardBatch(
        num_cached,
        num_tokens,
        tables,
        torch.frombuffer(token_ids, dtype=torch.int64),
        torch.from_numpy(np.array(logit_rows, dtype=np.int64)),
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
