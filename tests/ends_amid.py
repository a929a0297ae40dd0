"""Processes that end amid a message over shared memory: their memory cannot be read to its end.

UCX has claimed a place in the receiver's queue by then, and nobody will ever fill it: as where
the process was killed at that moment.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from typing import Any

# Else UCX looks into what happened first.
os.environ["UCX_HANDLE_ERRORS"] = "none"

import torch

from cli.main import app
from mesh import wire
from mesh.transport.ucx import UcxBuffer, UcxEndpoint, UcxTransport

_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def half_readable(nbytes: int) -> UcxBuffer:
    """So many bytes of which the first half can be read."""
    page = mmap.PAGESIZE
    half = -(-nbytes // 2 // page) * page
    memory = mmap.mmap(-1, 2 * half + page)
    _kept.append(memory)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    if _libc.mprotect(ctypes.c_void_p(tensor.data_ptr() + half), ctypes.c_size_t(half + page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = half - nbytes // 2
    return UcxBuffer(tensor[start : start + nbytes])


def _send_and_end(address: bytes, nbytes: int, tag: int, *, amid_a_fragment: bool) -> None:
    """A message of 64 bytes with tag 1, which opens the way, and half of another."""
    transport = UcxTransport()
    endpoint = transport.connect(address)
    opening = endpoint.send(transport.wrap(torch.zeros(64, dtype=torch.uint8)), 1)
    while not opening.completed:
        transport.progress()
    if amid_a_fragment:
        endpoint.send(half_readable(nbytes), tag)
    else:
        # As far as there is room in the queue, whose owner takes nothing out of it meanwhile.
        endpoint.send(transport.wrap(torch.zeros(nbytes, dtype=torch.uint8)), tag)
    for _ in range(10_000):
        transport.progress()
    os.kill(os.getpid(), signal.SIGKILL)


def _serve_until(num_replies: int, flags: list[str]) -> None:
    """A worker that ends amid the reply after so many."""
    send = UcxEndpoint.send

    def counting(endpoint: UcxEndpoint, buffer: Any, tag: int) -> Any:
        nonlocal num_replies
        if wire.decode(tag).kind == wire.Kind.REPLY:
            num_replies -= 1
            if num_replies < 0:
                buffer = half_readable(buffer.nbytes)
        return send(endpoint, buffer, tag)

    UcxEndpoint.send = counting  # type: ignore[method-assign]
    # What answers without Python asks nobody.
    UcxTransport.answering = lambda transport, **options: None  # type: ignore[assignment]
    app(["worker", *flags])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["amid-a-fragment" | "between-fragments" as where, to, size, tag]:
            amid_a_fragment = where == "amid-a-fragment"
            _send_and_end(bytes.fromhex(to), int(size), int(tag), amid_a_fragment=amid_a_fragment)
        case ["worker", count, *rest]:
            _serve_until(int(count), rest)
