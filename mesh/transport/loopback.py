"""A transport inside one process, for tests: it can delay, drop, truncate and die.

Semantics are UCX's: a send completes once the message is taken over, a message matches the
oldest posted receive with its tag or waits to be probed, a longer message than its buffer
fails the receive, and what is posted on a dead endpoint completes as failed.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mesh.errors import MessageTruncated, PeerLost, TransportError
from mesh.transport.base import Request, RoundTrip


@dataclass(eq=False)
class LoopbackBuffer:
    """Bytes of a tensor."""

    bytes_: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Length of the buffer."""
        return self.bytes_.numel()


@dataclass(eq=False)
class LoopbackRequest:
    """A posted send or receive."""

    tag: int
    buffer: LoopbackBuffer
    exact: bool = False
    """A message that is shorter than the buffer fails it too."""
    begun: bool = False
    """A part of the message is there."""
    completed: bool = False
    ended_s: float = 0.0
    error: TransportError | None = None

    def finish(self, payload: torch.Tensor | None, error: TransportError | None = None) -> None:
        """Complete, with a payload to copy into the buffer where it is a receive."""
        if payload is not None:
            spare = self.buffer.nbytes - payload.numel()
            if spare < 0 or (spare and self.exact):
                error = MessageTruncated(f"{payload.numel()} bytes for {self.buffer.nbytes}")
            self.buffer.bytes_[: payload.numel()].copy_(payload[: self.buffer.nbytes])
        self.error = error
        self.ended_s = time.monotonic()
        self.completed = True


@dataclass
class LoopbackMessage:
    """A message that waits to be received."""

    tag: int
    payload: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Length of the payload."""
        return self.payload.numel()

    def receive(self, buffer: LoopbackBuffer) -> LoopbackRequest:
        """See :class:`mesh.transport.base.Message`."""
        request = LoopbackRequest(self.tag, buffer)
        request.finish(self.payload)
        return request


@dataclass
class Faults:
    """What goes wrong with what is sent to a transport."""

    drop: Callable[[int], bool] = lambda tag: False
    """Messages with these tags are lost on the way; the sender does not learn of it."""
    begun: Callable[[int], bool] = lambda tag: False
    """Messages with these tags never arrive whole, and not even their sender's death ends the
    receives that they matched."""
    stuck_s: float = 0.0
    """Nothing is delivered while it is not 0."""
    held: Callable[[int], bool] = lambda tag: False
    """Messages with these tags are kept back until :meth:`LoopbackTransport.release`."""


@dataclass
class LoopbackHub:
    """The network: all transports that can reach each other."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    transports: dict[bytes, LoopbackTransport] = field(default_factory=dict)

    def transport(self) -> LoopbackTransport:
        """A new one, reachable under its address."""
        with self.lock:
            made = LoopbackTransport(self, f"loopback-{len(self.transports)}".encode())
            self.transports[made.address] = made
            return made


class LoopbackEndpoint:
    """See :class:`mesh.transport.base.Endpoint`."""

    def __init__(self, owner: LoopbackTransport, peer: LoopbackTransport) -> None:
        self._owner = owner
        self._peer = peer
        self._address = peer.address
        self._open = True
        self._posted: list[LoopbackRequest] = []

    @property
    def alive(self) -> bool:
        """False once either side is gone."""
        return self._open and not self._peer.dead

    def send(self, buffer: LoopbackBuffer, tag: int) -> LoopbackRequest:
        """See :class:`mesh.transport.base.Endpoint`."""
        request = LoopbackRequest(tag, buffer)
        if self.alive:
            if self._peer.address == self._address:
                self._peer.deliver(tag, buffer.bytes_.clone())
            request.finish(None)
        else:
            request.finish(None, PeerLost("the peer is gone"))
        return request

    def post_receive(self, buffer: LoopbackBuffer, tag: int) -> LoopbackRequest:
        """See :class:`mesh.transport.base.Endpoint`."""
        request = LoopbackRequest(tag, buffer, exact=True)
        if self.alive:
            self._posted = [r for r in self._posted if not r.completed] + [request]
            self._owner.post(request)
        else:
            request.finish(None, PeerLost("the peer is gone"))
        return request

    def fail_posted(self) -> None:
        """End what is posted, as UCX does when its keepalive finds the peer dead."""
        for request in self._posted:
            if not request.completed and not request.begun:
                request.finish(None, PeerLost("the peer is gone"))
        self._posted = []

    def close(self) -> None:
        """See :class:`mesh.transport.base.Endpoint`."""
        self._open = False
        self.fail_posted()


class LoopbackTransport:
    """See :class:`mesh.transport.base.Transport`."""

    def __init__(self, hub: LoopbackHub, address: bytes) -> None:
        self._hub = hub
        self.address = address
        self.faults = Faults()
        self.dead = False
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._posted: list[LoopbackRequest] = []
        self._unexpected: deque[LoopbackMessage] = deque()
        self._kept: list[tuple[int, torch.Tensor]] = []
        self._endpoints: list[LoopbackEndpoint] = []

    def connect(self, address: bytes) -> LoopbackEndpoint:
        """Raises PeerLost for an address that nobody has."""
        peer = self._hub.transports.get(address)
        if peer is None:
            raise PeerLost(f"no loopback transport at {address!r}")
        endpoint = LoopbackEndpoint(self, peer)
        self._endpoints.append(endpoint)
        return endpoint

    def wrap(self, tensor: torch.Tensor) -> LoopbackBuffer:
        """See :class:`mesh.transport.base.Transport`."""
        return LoopbackBuffer(tensor.view(torch.uint8).view(-1))

    def post(self, request: LoopbackRequest) -> None:
        """Match a receive with what has arrived, or keep it posted."""
        with self._hub.lock:
            for message in self._unexpected:
                if message.tag == request.tag:
                    self._unexpected.remove(message)
                    request.finish(message.payload)
                    return
            self._posted.append(request)

    def deliver(self, tag: int, payload: torch.Tensor) -> None:
        """Called by the sender's side."""
        with self._hub.lock:
            if self.faults.drop(tag):
                return
            if self.faults.stuck_s or self.faults.held(tag):
                self._kept.append((tag, payload))
                return
            for request in self._posted:
                if request.tag == tag and not request.completed and not request.begun:
                    if self.faults.begun(tag):
                        request.begun = True
                    else:
                        self._posted.remove(request)
                        request.finish(payload)
                    break
            else:
                self._unexpected.append(LoopbackMessage(tag, payload))
            os.eventfd_write(self._event, 1)

    def release(self) -> None:
        """Deliver what was held back, in order."""
        with self._hub.lock:
            kept, self._kept = self._kept, []
            self.faults.held = lambda tag: False
            for tag, payload in kept:
                self.deliver(tag, payload)

    def die(self) -> None:
        """As ``kill -9``: nothing more comes or goes."""
        with self._hub.lock:
            self.dead = True
            for transport in self._hub.transports.values():
                os.eventfd_write(transport._event, 1)

    def progress(self) -> bool:
        """Notice dead peers; messages move by themselves."""
        for endpoint in self._endpoints:
            if not endpoint.alive:
                endpoint.fail_posted()
        self._endpoints = [e for e in self._endpoints if e.alive]
        return False

    def failure(self, request: LoopbackRequest) -> TransportError | None:
        """See :class:`mesh.transport.base.Transport`."""
        return request.error

    def probe(self) -> LoopbackMessage | None:
        """See :class:`mesh.transport.base.Transport`."""
        with self._hub.lock:
            return self._unexpected.popleft() if self._unexpected else None

    def exchange(self, trips: Sequence[RoundTrip]) -> list[tuple[Request, Request]]:
        """See :class:`mesh.transport.base.Transport`."""
        replies = [trip.endpoint.post_receive(trip.receive, trip.receive_tag) for trip in trips]
        return [
            (reply, trip.endpoint.send(trip.send, trip.send_tag))
            for reply, trip in zip(replies, trips, strict=True)
        ]

    def wait(self, requests: Sequence[Any], *, spin_s: float, timeout_s: float) -> None:
        """See :class:`mesh.transport.base.Transport`. Sleeps at once."""
        self.progress()
        if self.arm() and not all(request.completed for request in requests):
            select.select([self._event], [], [], timeout_s)

    def cancel(self, request: Any) -> None:
        """See :class:`mesh.transport.base.Transport`."""
        with self._hub.lock:
            if not request.completed and not request.begun:
                self._posted = [posted for posted in self._posted if posted is not request]
                request.finish(None, PeerLost("cancelled"))

    def answering(self, *, row_bytes: int, max_rows: int, device: object = None) -> None:
        """Every message is to be probed: see :class:`mesh.transport.base.Transport`."""

    def asking(self, device: object) -> None:
        """See :class:`mesh.transport.base.Transport`."""

    def fileno(self) -> int:
        """Readable when something was delivered."""
        return self._event

    def arm(self) -> bool:
        """Clear the event; False when there is something to look at."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return True
        return False

    def stuck_s(self) -> float:
        """As the fault says."""
        return self.faults.stuck_s

    def reopen(self) -> None:
        """See :class:`mesh.transport.base.Transport`."""
        with self._hub.lock:
            for request in self._posted:
                request.finish(None, PeerLost("the transport was opened anew"))
            self._posted, self._kept = [], []
            self._unexpected.clear()
            self.faults = Faults()
            del self._hub.transports[self.address]
            self.address += b"+"
            self._hub.transports[self.address] = self

    def close(self) -> None:
        """Nobody reaches this transport any more."""
        self.die()
