"""The seam between the mesh and whatever moves its bytes.

One thread owns a transport and everything made from it. Tags are 64-bit integers. Buffers
are wrapped once and kept: the wrap is what costs. A request ends in exactly one way:
``completed`` turns true, and :meth:`Transport.failure` says whether it went well. Until then
the caller keeps the buffer: a transport does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from mesh import native, wire
from mesh.errors import TransportError
from mesh.mlp import NativeMlp
from mesh.plan import ExpertId
from mesh.replay import ReplayDevice, Replays


class Buffer(Protocol):
    """A view of a tensor's memory that a transport can use. Keeps the memory alive."""

    @property
    def nbytes(self) -> int: ...


class Request(Protocol):
    """A posted send or receive. The buffer belongs to the transport until ``completed``."""

    @property
    def completed(self) -> bool: ...

    @property
    def ended_s(self) -> float:
        """``time.monotonic()`` of when it was completed, which may be long before anybody asked."""
        ...


class Message(Protocol):
    """A message that arrived and that no posted receive matched."""

    @property
    def tag(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def receive(self, buffer: Buffer) -> Request:
        """Take the payload. Into a shorter buffer it fails, and the message is gone."""
        ...


class Endpoint(Protocol):
    """The way to one peer."""

    @property
    def alive(self) -> bool: ...

    def send(self, buffer: Buffer, tag: int) -> Request: ...

    def post_receive(self, buffer: Buffer, tag: int) -> Request:
        """Receive one message with exactly this tag, as long as the buffer; fails when the peer
        dies or the message has another length."""
        ...

    def close(self) -> None:
        """End the endpoint. What is posted on it completes, as failed, while progressing."""
        ...


class RoundTrip(NamedTuple):
    """A message to a peer, and the receive of its reply."""

    endpoint: Endpoint
    send: Buffer
    send_tag: int
    receive: Buffer
    receive_tag: int


class Trail(NamedTuple):
    """When one dispatch went through its stages, in ``time.monotonic()`` seconds."""

    tag: int
    found_s: float
    received_s: float
    """Its rows are here, or what says where they are."""
    fetched_s: tuple[float, float]
    """Its rows came by reference."""
    computed_s: tuple[float, float]
    """The batch that it was in was."""
    sent_s: tuple[float, float]


class Answering(Protocol):
    """Answers regular dispatches (see :mod:`mesh.wire`) without a line of Python.

    Regular is what has an open session, an expert of :meth:`serve` (or several of a layer, where
    those are served together), rows within the bound and the right length. All else is left to be
    probed.
    """

    @property
    def in_hand(self) -> int:
        """Dispatches that came in and whose replies are not out."""
        ...

    @property
    def computing(self) -> int:
        """Those of them that a device computes: nothing wakes a sleeper when it is done."""
        ...

    @property
    def last_progress_s(self) -> float:
        """``time.monotonic()`` of the last dispatch."""
        ...

    def open(self, session: int, endpoint: Endpoint, reply_session: int) -> None:
        """Answer this session's dispatches, with this session of the peer's."""
        ...

    def close(self, session: int) -> None:
        """Answer them no more."""
        ...

    def borrow(self, session: int, lent: bytes) -> bool:
        """Take this session's dispatches by reference from here on, in the arenas that ``lent`` (a
        :class:`mesh.native.LentArenas`) tells of. False where they cannot be reached."""
        ...

    def fetch(self, session: int, first: int, rows: Buffer) -> bool:
        """Fill ``rows`` from a session's arena, before what is queued on the device's stream from
        here on. False: not lent."""
        ...

    def deliver(self, session: int, first: int, rows: Buffer) -> bool:
        """Answer them, which are computed: the caller has seen it. False: not lent."""
        ...

    def cut(self, num_experts: int, header_rows: int) -> None:
        """A message of several experts says of so many how many rows are theirs, in the rows ahead
        of theirs. To be said before what is served by that."""
        ...

    def serve(self, experts: Mapping[ExpertId, NativeMlp | Replays]) -> None:
        """Answer for these experts in place of those before; a layer's expert ``wire.SEVERAL`` is
        all of them together."""
        ...

    def doubt(self, doubted: bool) -> None:
        """Whether those together may be others by now than :meth:`serve` was told: their messages
        are left to be probed then. From any thread."""
        ...

    def counts(self) -> Iterable[tuple[ExpertId, int, float]]:
        """Rows and seconds of each expert that had any, since the start. From any thread."""
        ...

    def look(self) -> None:
        """Bring what is in hand forward after a :meth:`Transport.progress`; take nothing new."""
        ...

    def trace(self) -> None:
        """Keep the trails of dispatches from here on."""
        ...

    def trails(self) -> Iterable[Trail]:
        """Those that were answered since the last call, as far as there was room."""
        ...

    def strand(self, patience_s: float) -> None:
        """Give up what came in part from a session that was closed so long ago."""
        ...

    def failed(self) -> Iterable[tuple[int, wire.Refusal]]:
        """Tags of the dispatches that were taken and got no answer since, which are to be refused,
        and why."""
        ...

    def run(self, *, spin_s: float, wake_fd: int) -> None:
        """Answer, and sleep while there is nothing: ``spin_s`` of idleness are polled first.

        Returns when a message is not regular, an endpoint died, a device failed, ``wake_fd`` is
        readable, or something has been in hand for a second.
        """
        ...


class Asking(Protocol):
    """Asks the experts of a layer (``native.Seat``) as soon as a GPU has laid their rows out, and
    waits for the replies, without a line of Python: see ``native/asking.c``."""

    @property
    def num_deaths(self) -> int:
        """Of endpoints, so far."""
        ...

    def aim(self, ask: native.Ask, endpoint: Endpoint) -> None:
        """Send this part of a layer there."""
        ...

    def leave(self, seat: native.Seat, graphs: Sequence[int]) -> bool:
        """Launch graphs (``CUgraphExec``; none: that was done) and post what the last has made;
        False, with nothing posted, where that does not fit the asks. Raises MeshError when the
        device failed."""
        ...

    def wait(
        self,
        seat: native.Seat,
        *,
        spin_s: float,
        timeout_s: float,
        then: native.Seat | None = None,
        graphs: Sequence[int] = (),
    ) -> tuple[bool, bool]:
        """Whether all is back. It is not when something failed, a message is there to be probed, an
        endpoint died, or time is up: what was posted is to be :meth:`taken`.

        With graphs, once all is back they are launched at once, and the rows of another seat leave
        as by :meth:`leave`: whether they did, is the second.
        """
        ...

    def taken(self, ask: native.Ask) -> tuple[Request, Request]:
        """The reply and the sent of one that is away, which is the caller's from here on."""
        ...


class Transport(Protocol):
    """Tagged messages between the processes of a mesh."""

    @property
    def address(self) -> bytes:
        """What a peer needs to :meth:`connect`; handed out over authenticated gRPC alone."""
        ...

    def connect(self, address: bytes) -> Endpoint: ...

    def wrap(self, tensor: torch.Tensor) -> Buffer:
        """Wrap a contiguous tensor of any dtype."""
        ...

    def exchange(self, trips: Sequence[RoundTrip]) -> list[tuple[Request, Request]]:
        """Post every receive, then every send; the reply and the sent of each trip."""
        ...

    def progress(self) -> bool:
        """Move bytes; True while there may be more to do at once."""
        ...

    def wait(self, requests: Sequence[Request], *, spin_s: float, timeout_s: float) -> None:
        """Return once all are completed, a message is there to be probed, an endpoint died, or
        time is up; ``spin_s`` are polled before sleeping. Others may end without a return."""
        ...

    def failure(self, request: Request) -> TransportError | None:
        """Why a completed request failed; None when it went well."""
        ...

    def cancel(self, request: Request) -> None:
        """End a receive that nobody will answer, so that its buffer comes back."""
        ...

    def probe(self) -> Message | None:
        """The oldest unexpected message of any tag, removed from the queue."""
        ...

    def answering(
        self, *, row_bytes: int, max_rows: int, device: ReplayDevice | None = None
    ) -> Answering | None:
        """At most one; None where every message is to be probed. With a ``device``, experts are
        served by their :class:`Replays`."""
        ...

    def asking(self, device: ReplayDevice) -> Asking | None:
        """None where every message is to be sent by itself."""
        ...

    def fileno(self) -> int:
        """A descriptor that becomes readable when an armed transport has work; always the same."""
        ...

    def arm(self) -> bool:
        """True when it is safe to sleep on :meth:`fileno`; False: progress first."""
        ...

    def stuck_s(self) -> float:
        """For how long nothing has come in from this host that peers sent; 0 while it does. One
        that ends amid a message blocks the queue that all of them share, for good.

        To be asked where there is nothing else to do; time in which nobody asks does not count.
        """
        ...

    def reopen(self) -> None:
        """Be a new transport, with another :attr:`address`, that owes nobody anything: what is
        posted ends as failed, what was sent to it is gone, and no buffer is touched any more.

        Endpoints are the caller's to close first. Not where there is an :class:`Answering`.
        """
        ...

    def close(self) -> None: ...


def why_stuck(transport: Transport, patience_s: float) -> str | None:
    """Why a transport has to start anew, in words; None while it has not."""
    stuck_s = transport.stuck_s()
    if stuck_s < patience_s:
        return None
    return (
        f"for {stuck_s:.1f} s nothing has come in over shared memory: "
        "a process of this host ended amid a message to this one"
    )
