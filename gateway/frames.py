"""Where rows leave from and come back to.

Legend: R rows of an arena, D hidden size.

Rows travel in *frames*: equal parts of one send arena and one reply arena. A message to a worker
is a run of rows inside a frame, and its reply lands in the same rows of the reply arena, so one
index says where every routed row went and where it comes back. A message for several experts says
ahead of its rows how many are whose: each frame begins with room for that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch

from mesh.plan import ExpertId
from mesh.transport.base import Buffer, Transport

# A frame holds this many times the rows that a worker gets when routing is even, so that the
# usual step needs one message a worker; what is more uneven is split.
_UNEVENNESS = 4
_MIN_ROWS = 64
MAX_MICRO_BATCHES = 2


class Run(NamedTuple):
    """Neighbouring rows of one expert in the arenas: ``num_rows`` from row ``start``."""

    expert: ExpertId
    start: int
    num_rows: int


class Frames:
    """The arenas, and which parts of them are free.

    A frame that is given back while the transport may still use it is *parked*: it is not taken
    again before :meth:`unpark`.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_spare: int,
    ) -> None:
        self._transport = transport
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._num_spare = num_spare
        self.num_frames = 0
        self.frame_rows = 0
        self.header_rows = 0
        """What a frame begins with, before its first row."""

    def allocate(
        self, *, routed_rows: int, header_rows: int, num_peers: int, max_rows: int, num_kept: int
    ) -> bool:
        """Arenas for the worst step, anew only when that has changed; True if so.

        Whatever the routing, a micro-batch fills frames but for the last of each worker, so
        its full frames and one more a worker (and one for what nobody serves) are enough, and
        some to spare. ``max_rows`` is the most that any worker takes in a message; ``num_kept``
        frames are kept beside all that.
        """
        even_rows = _UNEVENNESS * routed_rows // max(1, num_peers)
        rows = min(routed_rows, max(even_rows, _MIN_ROWS), max_rows)
        num_full = -(-routed_rows // rows)
        num_frames = num_full + MAX_MICRO_BATCHES * (num_peers + 1) + self._num_spare + num_kept
        cut = (rows + header_rows, header_rows, num_frames)
        if cut == (self.frame_rows, self.header_rows, self.num_frames):
            return False
        self.frame_rows, self.header_rows, self.num_frames = cut
        shape = (num_frames * self.frame_rows, self._hidden_size)
        self.send_RD = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self.reply_RD = torch.zeros_like(self.send_RD)
        if self._device.type == "cuda":
            # The transport writes into it on a stream of its own.
            torch.cuda.current_stream(self._device).synchronize()
        self._free = list(range(num_frames))
        self._parked: set[int] = set()
        self._sends: dict[tuple[int, int], Buffer] = {}
        self._replies: dict[tuple[int, int], Buffer] = {}
        return True

    @property
    def num_free(self) -> int:
        """Frames that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free frame."""
        return self._free.pop()

    def give_back(self, frames: Iterable[int], held: Collection[int | None]) -> None:
        """Free ``frames``, and park those that are ``held``."""
        for frame in frames:
            if frame in held:
                self._parked.add(frame)
            else:
                self._free.append(frame)

    def unpark(self, held: Collection[int | None]) -> None:
        """Free what is parked and no longer ``held``."""
        free = self._parked.difference(held)
        self._parked -= free
        self._free.extend(free)

    def rows_of(self, frame: int) -> tuple[int, int]:
        """Its first row behind the header, and the end of its rows."""
        return frame * self.frame_rows + self.header_rows, (frame + 1) * self.frame_rows

    def sending(self, start: int, num_rows: int) -> Buffer:
        """Rows of the send arena, for the transport."""
        return self._wrap(self._sends, self.send_RD, start, num_rows)

    def replying(self, start: int, num_rows: int) -> Buffer:
        """Rows of the reply arena, for the transport."""
        return self._wrap(self._replies, self.reply_RD, start, num_rows)

    def _wrap(
        self,
        wrapped: dict[tuple[int, int], Buffer],
        arena_RD: torch.Tensor,
        start: int,
        num_rows: int,
    ) -> Buffer:
        buffer = wrapped.get((start, num_rows))
        if buffer is None:
            buffer = self._transport.wrap(arena_RD[start : start + num_rows])
            wrapped[start, num_rows] = buffer
        return buffer
