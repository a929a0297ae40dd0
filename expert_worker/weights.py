"""Weights from one worker to another: both ends, on the thread of a data plane.

The taker pulls: it posts the receive of a chunk, then asks for it (FETCH), and the giver answers
with its bytes (WEIGHTS). Both headers say number and length, so a chunk of another length than
was posted matches nothing and ends the transfer. Few chunks are under way at once, and each end
moves them between two batches, for a part of the time that its rows take: serving goes on.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog
import torch

from mesh import wire
from mesh.errors import MessageTruncated, Overloaded, PeerLost, TransportError
from mesh.transport.base import Buffer, Endpoint, Message, Request, Transport

log = structlog.get_logger()

CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""By device type. What passes through a core is to be done soon; over NVLink, more is faster."""

_MAX_GIVEN = 8
_WINDOW = 4
_FETCH = int(wire.Kind.FETCH)
_WEIGHTS = int(wire.Kind.WEIGHTS)


_SHARE = 0.25
_MOST_SAVED_S = 0.02
_PATIENCE_S = 0.0002


class Allowance:
    """How long weights may have the thread after each turn of rows. Pure: the clock is passed in.

    A share of what rows took. What the other end was not there to use is kept for when it is:
    where both ends serve, each is at it for a fifth of the time, and seldom the same one.
    """

    def __init__(self) -> None:
        self.saved_s = 0.0
        self._began_s = 0.0
        self._moved_s = 0.0

    def begin(self, now_s: float, rows_s: float) -> None:
        """Rows took so long."""
        self.saved_s = min(self.saved_s + _SHARE * rows_s, max(_MOST_SAVED_S, _SHARE * rows_s))
        self._began_s = self._moved_s = now_s

    def goes_on(self, now_s: float, moved: bool) -> bool:
        """Whether to go on now: there is time left, and something moved lately."""
        if moved:
            self._moved_s = now_s
        spent_s = now_s - self._began_s
        if spent_s < self.saved_s and now_s - self._moved_s < _PATIENCE_S:
            return True
        self.saved_s = max(self.saved_s - spent_s, 0.0)
        return False


def chunks_of(tensors: Mapping[str, torch.Tensor], chunk_bytes: int) -> list[torch.Tensor]:
    """The bytes of contiguous tensors, by name, cut into views of at most ``chunk_bytes``.

    Raises Overloaded when the header cannot number them.
    """
    chunks = [
        chunk
        for _, tensor in sorted(tensors.items())
        for chunk in torch.split(tensor.view(-1).view(torch.uint8), chunk_bytes)
        if len(chunk)
    ]
    if chunk_bytes > wire.MAX_CHUNK_BYTES or len(chunks) > wire.MAX_CHUNKS:
        raise Overloaded(
            f"{len(chunks)} chunks of {chunk_bytes} bytes are more than the {wire.MAX_CHUNKS} of "
            f"{wire.MAX_CHUNK_BYTES} of one transfer; load this expert from the checkpoint"
        )
    return chunks


@dataclass(eq=False)
class Giving:
    """An expert that is being given. ``ended`` is done when it no longer is."""

    session: int
    """What the taker's FETCH must carry."""
    endpoint: Endpoint
    reply_session: int
    chunks: list[torch.Tensor]
    due: deque[int] = field(default_factory=deque)
    posted: list[tuple[Request, Buffer]] = field(default_factory=list)
    ended: Future[None] = field(default_factory=Future)


@dataclass(eq=False)
class Taking:
    """An expert that is being taken. ``received_bytes`` may be read from any thread.

    ``result`` is done when the transport no longer touches the chunks: with None when every
    byte of them is there, else with the error.
    """

    session: int
    endpoint: Endpoint
    peer_session: int
    chunks: list[torch.Tensor]
    next_chunk: int = 0
    posted: deque[tuple[Request, Buffer]] = field(default_factory=deque)
    received_bytes: int = 0
    error: TransportError | None = None
    result: Future[None] = field(default_factory=Future)


class WeightTransfers:
    """What is given and taken. Everything runs on the thread that owns ``transport``."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._scratch = transport.wrap(torch.zeros(1, dtype=torch.uint8))
        self._givings: dict[int, Giving] = {}
        self._takings: dict[int, Taking] = {}
        self._left: list[Taking] = []
        """Whose chunks the transport may still write to."""
        self._small: list[Request] = []
        self._last_session = random.randrange(wire.MAX_SESSIONS)

    @property
    def any(self) -> bool:
        """There is something to do, or to wait for."""
        return bool(self._givings or self._takings or self._small)

    def give(self, address: bytes, reply_session: int, chunks: list[torch.Tensor]) -> Giving:
        """Answer what the worker at ``address`` fetches of ``chunks``, until :meth:`end`.

        Raises PeerLost when nothing leads there, Overloaded past a fixed number at once.
        """
        if len(self._givings) >= _MAX_GIVEN:
            raise Overloaded(f"{_MAX_GIVEN} workers take weights from this one; try again soon")
        endpoint = self._transport.connect(address)
        giving = Giving(self._new_session(), endpoint, reply_session, chunks)
        self._givings[giving.session] = giving
        return giving

    def end(self, giving: Giving) -> None:
        """Give nothing more of it."""
        if not giving.ended.done():
            giving.ended.set_result(None)
            giving.endpoint.close()

    def reserve(self) -> int:
        """A session for :meth:`take`, which the giver has to know first."""
        return self._new_session()

    def take(
        self, address: bytes, peer_session: int, session: int, chunks: list[torch.Tensor]
    ) -> Taking:
        """Fill ``chunks`` from the worker at ``address``. Raises PeerLost."""
        taking = Taking(session, self._transport.connect(address), peer_session, chunks)
        self._takings[session] = taking
        return taking

    def abandon(self, taking: Taking, error: TransportError) -> None:
        """Take nothing more; its result will be ``error`` unless it is done already."""
        if taking.error is None and not taking.result.done():
            taking.error = error
            taking.endpoint.close()

    def leave(self, taking: Taking) -> None:
        """Wait no more for the transport to let go of what was abandoned: a message that a worker
        has begun to give and then hangs on may never end. Its memory is kept until it does."""
        if self._takings.pop(taking.session, None) is not None:
            self._left.append(taking)

    def accept(self, message: Message) -> bool:
        """Act on a message that is about weights; False, untouched, when it is not."""
        if message.tag >> 60 not in (_FETCH, _WEIGHTS):
            return False
        frame = wire.decode_chunk(message.tag)
        if frame.kind == _FETCH:
            giving = self._givings.get(frame.session)
            if giving is not None and not giving.ended.done():
                self._fetched(giving, frame)
        else:
            # What was asked for has a receive posted, and does not come this way.
            taking = self._takings.get(frame.session)
            if taking is not None:
                words = f"chunk {frame.chunk} came with {frame.nbytes} bytes, not as asked"
                self.abandon(taking, MessageTruncated(words))
        self._small.append(message.receive(self._scratch))
        return True

    def turn(self) -> bool:
        """Move at most one chunk of each transfer; True when something moved."""
        moved = False
        for giving in list(self._givings.values()):
            moved |= self._give_next(giving)
        for taking in list(self._takings.values()):
            moved |= self._take_next(taking)
        if self._small:
            self._small = [request for request in self._small if not request.completed]
        if self._left:
            self._left = [t for t in self._left if not all(r.completed for r, _ in t.posted)]
        return moved

    def close(self) -> None:
        """End every transfer, before the transport closes."""
        for giving in self._givings.values():
            self.end(giving)
        for taking in self._takings.values():
            self.abandon(taking, PeerLost("this worker is ending"))
            if not taking.result.done():
                taking.result.set_exception(taking.error or PeerLost("this worker is ending"))

    def _new_session(self) -> int:
        left = [taking.session for taking in self._left]
        while True:
            self._last_session = (self._last_session + 1) % wire.MAX_SESSIONS
            if self._last_session not in {*self._givings, *self._takings, *left}:
                return self._last_session

    def _fetched(self, giving: Giving, frame: wire.Chunk) -> None:
        known = frame.chunk < len(giving.chunks)
        if known and len(giving.chunks[frame.chunk]) == frame.nbytes and len(giving.due) < _WINDOW:
            giving.due.append(frame.chunk)
            return
        log.warning("weights_refused", reason="no such chunk", **frame._asdict())
        self.end(giving)

    def _give_next(self, giving: Giving) -> bool:
        giving.posted = [pair for pair in giving.posted if not pair[0].completed]
        if not giving.endpoint.alive:
            self.end(giving)
        if giving.ended.done():
            if not giving.posted:
                del self._givings[giving.session]
            return False
        if not giving.due or len(giving.posted) >= _WINDOW:
            return False
        number = giving.due.popleft()
        buffer = self._transport.wrap(giving.chunks[number])
        tag = wire.encode_chunk(_WEIGHTS, giving.reply_session, buffer.nbytes, number)
        giving.posted.append((giving.endpoint.send(buffer, tag), buffer))
        return True

    def _take_next(self, taking: Taking) -> bool:
        moved = False
        while taking.posted and taking.posted[0][0].completed:
            request, buffer = taking.posted.popleft()
            moved = True
            failure = self._transport.failure(request)
            if failure is None:
                taking.received_bytes += buffer.nbytes
            else:
                self.abandon(taking, failure)
        if not taking.endpoint.alive:
            self.abandon(taking, PeerLost("the worker that gives weights is gone"))
        left = taking.error is None and taking.next_chunk < len(taking.chunks)
        if left and len(taking.posted) < _WINDOW:
            buffer = self._transport.wrap(taking.chunks[taking.next_chunk])
            number, taking.next_chunk = taking.next_chunk, taking.next_chunk + 1
            tag = wire.encode_chunk(_WEIGHTS, taking.session, buffer.nbytes, number)
            taking.posted.append((taking.endpoint.post_receive(buffer, tag), buffer))
            tag = wire.encode_chunk(_FETCH, taking.peer_session, buffer.nbytes, number)
            self._small.append(taking.endpoint.send(self._scratch, tag))
            return True
        if not left and not taking.posted:
            self._taken(taking)
            return True
        return moved

    def _taken(self, taking: Taking) -> None:
        del self._takings[taking.session]
        if taking.error is None:
            taking.endpoint.close()
            taking.result.set_result(None)
        else:
            taking.result.set_exception(taking.error)
