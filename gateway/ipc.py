"""Messages between a gateway's front and its engine: protobuf over a Unix socket pair.

Each message follows its length in bytes, an unsigned 32-bit little-endian integer.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections.abc import AsyncIterator

from mesh.errors import TransportError
from protos import engine_pb2 as pb

MAX_FRAME_BYTES = 64 << 20
"""Far above any plan or prompt; a larger length means that the stream is broken."""
MAX_PENDING_BYTES = 16 << 20
"""What the engine keeps for a front that does not read, before it waits for it."""
_CHUNK_BYTES = 1 << 18
_LENGTH = struct.Struct("<I")


def encode_frame(message: pb.ToEngine | pb.FromEngine) -> bytes:
    """A message behind its length. Raises TransportError above MAX_FRAME_BYTES."""
    payload = message.SerializeToString()
    if len(payload) > MAX_FRAME_BYTES:
        raise TransportError(
            f"a message of {len(payload)} bytes is more than the {MAX_FRAME_BYTES} that front "
            "and engine exchange; send less at once"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts a stream of bytes into payloads, however it arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads that ``chunk`` completes. Raises TransportError for a broken stream."""
        self._buffer += chunk
        payloads = []
        start = 0
        while len(self._buffer) >= start + _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise TransportError(
                    f"a frame of {length} bytes from the other process of this gateway is not "
                    "one of ours; restart the gateway"
                )
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return payloads


class EngineChannel:
    """The engine's end. Never blocks, but for a front that lets MAX_PENDING_BYTES pile up."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = FrameReader()
        self._pending = bytearray()
        self.closed = False
        """The front is gone; nothing more comes, and what is sent is dropped."""

    def fileno(self) -> int:
        """Readable when :meth:`recv_all` has something, the end of the front included."""
        return self._sock.fileno()

    def recv_all(self) -> list[pb.ToEngine]:
        """All messages that have arrived whole."""
        messages: list[pb.ToEngine] = []
        while not self.closed:
            try:
                chunk = self._sock.recv(_CHUNK_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                chunk = b""
            self.closed = not chunk
            messages += map(pb.ToEngine.FromString, self._reader.feed(chunk))
        return messages

    def send(self, message: pb.FromEngine) -> None:
        """Send now what the socket takes; :meth:`flush` sends the rest."""
        self._pending += encode_frame(message)
        self.flush()
        while len(self._pending) > MAX_PENDING_BYTES:
            select.select([], [self._sock], [])
            self.flush()

    def flush(self) -> bool:
        """Go on sending; True when everything is sent."""
        try:
            while self._pending and not self.closed:
                del self._pending[: self._sock.send(self._pending)]
        except BlockingIOError:
            return False
        except ConnectionError:
            self.closed = True
        if self.closed:
            self._pending.clear()
        return True

    def close(self) -> None:
        """Close the socket, which tells the front."""
        self.closed = True
        self._sock.close()


class AsyncChannel:
    """The front's end, on one event loop. Iterating ends when the engine's end is closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> AsyncChannel:
        """Take over a connected socket."""
        return cls(*await asyncio.open_unix_connection(sock=sock))

    async def __aiter__(self) -> AsyncIterator[pb.FromEngine]:
        frames = FrameReader()
        try:
            while chunk := await self._reader.read(_CHUNK_BYTES):
                for payload in frames.feed(chunk):
                    yield pb.FromEngine.FromString(payload)
        except ConnectionError:
            return  # an engine that was killed with our messages unread

    def send(self, message: pb.ToEngine) -> None:
        """Queue a message. Dropped when the engine is gone: the iteration ends, too."""
        self._writer.write(encode_frame(message))

    async def close(self) -> None:
        """Send what is queued and close the socket."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return  # closed all the same
