"""Captured graphs for the compiled turn of a GPU's worker: see ``native/device.c``.

Legend: R rows of a buffer, D hidden size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch

from mesh import native, wire
from mesh.errors import Unavailable

SLOTS = native.RING * native.SIZES
WHOLE = native.STEPS - 1
"""The step of a slot whose graph computes all of its rows."""
DELIVERY = 4
"""Numbers that say where the outputs of a part are to be."""
CAPTURED_AHEAD = 256
"""Experts of a worker: of more, none has graphs of its own before it was asked for often."""
MAX_TOGETHER = 8
"""Messages of several experts that are computed together, each in its part of a slot."""


def slots_of(num_rows: int) -> range:
    """The slots of the smallest buffers that hold so many rows; empty when none does."""
    first = (num_rows - 1).bit_length() * native.RING
    return range(first, first + native.RING) if first < SLOTS else range(0)


def step_of(num_rows: int) -> int:
    """The first step of those slots whose graph computes so many rows."""
    size = (num_rows - 1).bit_length()
    if size < native.STEPPED:
        return WHOLE
    half = 1 << (size - 1)
    return (num_rows - half - 1) * native.STEPS // half


def slot_rows(slot: int, step: int = WHOLE) -> int:
    """How many rows a slot's buffer has, or the graph of one of its steps computes."""
    rows = 1 << slot // native.RING
    return rows - (WHOLE - step) * rows // (2 * native.STEPS)


class ReplayDevice:
    """Launches graphs on one stream, by the thread that has its context.

    ``stream`` is a ``CUstream``; ``driver`` is loaded at run time. Raises Unavailable.
    """

    def __init__(self, stream: int, driver: str = "libcuda.so.1") -> None:
        self.handle: int | None = native.short.device_new(driver.encode(), stream)
        if not self.handle:
            raise Unavailable(f"{driver} is missing, too old or refuses events")
        self.buffers: dict[int, torch.Tensor] = {}
        """By slot, those that were lent."""
        self.counts: dict[int, torch.Tensor] = {}
        """Of the same, int32 on the host: where graphs of several experts leave the counts of each
        part, behind each other."""
        self.deliveries: dict[int, torch.Tensor] = {}
        """Of the same, int64, a row for each part: where those put its outputs; see
        :func:`mesh.gpu_kernels.grouped_out`."""

    def __del__(self) -> None:
        if self.handle:
            native.short.device_free(self.handle)

    def lend(self, slot: int, rows_RD: torch.Tensor) -> None:
        """This slot's memory from here on, :func:`slot_rows` rows of it."""
        self.buffers[slot] = rows_RD
        self.counts[slot] = torch.zeros(
            MAX_TOGETHER * wire.MAX_EXPERTS, dtype=torch.int32, pin_memory=rows_RD.is_cuda
        )
        self.deliveries[slot] = torch.zeros(
            MAX_TOGETHER, DELIVERY, dtype=torch.int64, device=rows_RD.device
        )
        kept = rows_RD, self.counts[slot], self.deliveries[slot]
        native.short.device_lend(self.handle, slot, *(tensor.data_ptr() for tensor in kept))

    def capture(self) -> int:
        """Amid a capture on this stream: a launch that brings rows, or takes them away, as each
        launch of the graph has them. Raises RuntimeError."""
        node: int | None = native.short.device_capture(self.handle)
        if not node:
            raise RuntimeError("the driver does not capture copies")
        return node

    @property
    def out(self) -> int:
        """The stream (``CUstream``) that what is delivered leaves on."""
        return int(native.short.device_out(self.handle))

    def share(self, memory: torch.Tensor) -> native.Lent:
        """What another process of this host needs to map this memory. Raises Unavailable."""
        lent = native.Lent()
        if not native.short.device_share(self.handle, memory.data_ptr(), memory.nbytes, lent):
            raise Unavailable("the driver does not lend this memory to other processes")
        return lent


class Replays:
    """The graphs (``CUgraphExec``) of one expert, or of several of a layer (``here``) together, by
    slot and step; ``owner`` and they live as long as this."""

    def __init__(self, owner: object = None, here: Iterable[int] = ()) -> None:
        self._record = native.Replays()
        self._here = tuple(here)
        for index in self._here:
            self._record.here[index] = 1
        self._kept: list[object] = [owner]
        self._doubled: Replays | None = None
        self.handle: int | None = ctypes.addressof(self._record)

    def add(
        self,
        slot: int,
        graph: int,
        keep: object = None,
        step: int = WHOLE,
        copies: native.Captured | None = None,
    ) -> None:
        """Launch this graph for the slot's first rows, as many as the step has; ``copies`` names
        the launches among its own that :meth:`ReplayDevice.capture` made."""
        record = copies or native.Captured()
        record.graph = graph
        self._kept.append((record, keep))
        self._record.graphs[slot * native.STEPS + step] = ctypes.addressof(record)

    def of_parts(self, parts: int) -> Replays:
        """The graphs for so many messages of several experts (a power of two), each in its part
        of a slot."""
        if parts == 1:
            return self
        if self._doubled is None:
            self._doubled = Replays(here=self._here)
            self._record.doubled = self._doubled.handle
        return self._doubled.of_parts(parts // 2)

    def __contains__(self, slot: int) -> bool:
        return any(self._record.graphs[slot * native.STEPS + step] for step in range(native.STEPS))
