"""The seam between the mesh and whatever moves its bytes.

One thread owns a transport and everything made from it. Tags are 64-bit integers. Buffers
are wrapped once and kept: the wrap is what costs. A request ends in exactly one way: done
with ``error`` None, or done with a :class:`mesh.errors.TransportError`.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Buffer(Protocol):
    """A registered view of a tensor's memory. Keeps the tensor alive."""

    @property
    def nbytes(self) -> int: ...


class Request(Protocol):
    """A posted send or receive. The buffer belongs to the transport until ``done``."""

    @property
    def done(self) -> bool: ...

    @property
    def error(self) -> Exception | None:
        """Why it failed; None while it runs or when it went well."""
        ...


class Message(Protocol):
    """A message that arrived and that no posted receive matched."""

    tag: int
    nbytes: int

    def receive(self, buffer: Buffer) -> Request:
        """Take the payload. A shorter buffer ends in MessageTruncated, the message is gone."""
        ...


class Endpoint(Protocol):
    """The way to one peer."""

    @property
    def alive(self) -> bool: ...

    def send(self, buffer: Buffer, tag: int) -> Request: ...

    def post_receive(self, buffer: Buffer, tag: int) -> Request:
        """Receive one message with exactly this tag; fails with PeerLost when the peer dies."""
        ...

    def close(self) -> None:
        """End the endpoint. Requests that are posted on it end with PeerLost."""
        ...


class Transport(Protocol):
    """Tagged messages between the processes of a mesh."""

    @property
    def address(self) -> bytes:
        """What a peer needs to :meth:`connect`; handed out over authenticated gRPC alone."""
        ...

    def connect(self, address: bytes) -> Endpoint: ...

    def wrap(self, tensor: torch.Tensor) -> Buffer:
        """Wrap contiguous memory of any dtype."""
        ...

    def progress(self) -> bool:
        """Move bytes; True while there may be more to do at once."""
        ...

    def probe(self) -> Message | None:
        """The oldest unexpected message of any tag, removed from the queue."""
        ...

    def abandon(self, tag: int) -> None:
        """End a posted receive that nobody will answer, so that its buffer comes back."""
        ...

    def fileno(self) -> int:
        """A descriptor that becomes readable when an armed transport has work."""
        ...

    def arm(self) -> bool:
        """True when it is safe to sleep on :meth:`fileno`; False: progress first."""
        ...

    def close(self) -> None: ...
