"""Weights on their way from a checkpoint's pages to a device.

A GPU reads pinned memory at the full speed of its link, and the pages of a file only through a
buffer of its driver's, in turns. So a large tensor goes in pieces through two pinned buffers: one
is filled while the other is read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_BYTES = 32 << 20

_kept = threading.local()


def fill(target: Tensor, source: Tensor) -> None:
    """Copy a tensor of the same shape; from the host, everything is there when this returns."""
    if not target.is_cuda or source.is_cuda:
        target.copy_(source)
        return
    turns = [(buffer, _event()) for buffer in _buffers()]
    for number, (of_target, of_source) in enumerate(pieces(target, source, PIECE_BYTES)):
        buffer, read = turns[number % len(turns)]
        read.synchronize()
        nbytes = of_target.numel() * of_target.element_size()
        staged = buffer[:nbytes].view(target.dtype).view(of_target.shape)
        staged.copy_(of_source)
        of_target.copy_(staged, non_blocking=True)
        read.record()
    for _, read in turns:
        read.synchronize()


def pieces(target: Tensor, source: Tensor, max_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in parts of the same shape, of at most so many bytes of the target."""
    nbytes = target.numel() * target.element_size()
    if nbytes <= max_bytes:
        if nbytes:
            yield target, source
    elif len(target) == 1:
        yield from pieces(target[0], source[0], max_bytes)
    else:
        step = max(1, len(target) * max_bytes // nbytes)
        for at in range(0, len(target), step):
            yield from pieces(target[at : at + step], source[at : at + step], max_bytes)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _buffers() -> tuple[Tensor, Tensor]:
    """Of this thread, kept: to pin memory takes longer than to read a small expert."""
    if not hasattr(_kept, "buffers"):
        one, other = (torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in "12")
        _kept.buffers = (one, other)
    buffers: tuple[Tensor, Tensor] = _kept.buffers
    return buffers
