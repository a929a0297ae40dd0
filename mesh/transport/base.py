"""The seam between the mesh and whatever moves its bytes.

One thread owns a transport and everything made from it. Tags are 64-bit integers. Buffers
are wrapped once and kept: the wrap is what costs. A request ends in exactly one way:
``completed`` turns true, and :meth:`Transport.failure` says whether it went well. Until then
the caller keeps the buffer: a transport does not.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mesh.errors import TransportError


class Buffer(Protocol):
    """A view of a tensor's memory that a transport can use. Keeps the memory alive."""

    @property
    def nbytes(self) -> int: ...


class Request(Protocol):
    """A posted send or receive. The buffer belongs to the transport until ``completed``."""

    @property
    def completed(self) -> bool: ...


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
        """Receive one message with exactly this tag; fails when the peer dies."""
        ...

    def close(self) -> None:
        """End the endpoint. What is posted on it completes, as failed, while progressing."""
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

    def progress(self) -> bool:
        """Move bytes; True while there may be more to do at once."""
        ...

    def failure(self, request: Request) -> TransportError | None:
        """Why a completed request failed; None when it went well."""
        ...

    def probe(self) -> Message | None:
        """The oldest unexpected message of any tag, removed from the queue."""
        ...

    def abandon(self, tag: int) -> None:
        """Complete a posted receive that nobody will answer, so that its buffer comes back."""
        ...

    def fileno(self) -> int:
        """A descriptor that becomes readable when an armed transport has work."""
        ...

    def arm(self) -> bool:
        """True when it is safe to sleep on :meth:`fileno`; False: progress first."""
        ...

    def close(self) -> None: ...
