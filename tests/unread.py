"""A client that opens a stream and never reads: HTTP/2 by hand, with a window of 0."""

from __future__ import annotations

import socket
import struct

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _WINDOW_UPDATE = 0, 1, 4, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4


class Unread:
    """A connection whose streams stall at their first byte, until :meth:`read`."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._host = host
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._next_stream = 1
        self._unseen = b""
        no_window = struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0)
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, no_window))
        self._socket.sendall(_frame(_SETTINGS, _ACK, 0))

    def call(self, method: str, message: bytes) -> int:
        """Start ``/package.Service/Method``; its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": self._host,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(_field(name, value) for name, value in headers.items())
        body = b"\0" + struct.pack(">I", len(message)) + message
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        self._socket.sendall(_frame(_DATA, _END_STREAM, stream, body))
        return stream

    def wait_connected(self) -> None:
        """Until the server has sent its settings."""
        self._read_until(b"\0\0")

    def wait_stalled(self) -> None:
        """Until the server has sent a header, behind which its first message waits."""
        self._read_until(b"application/grpc")

    def read(self, stream: int, until: bytes) -> None:
        """Open the stream's window, and read until these bytes come."""
        self._socket.sendall(_frame(_WINDOW_UPDATE, 0, stream, struct.pack(">I", 1 << 20)))
        self._read_until(until)

    def _read_until(self, until: bytes) -> None:
        while until not in self._unseen:
            chunk = self._socket.recv(1 << 16)
            assert chunk, f"the server ended the connection after {self._unseen!r}"
            self._unseen += chunk
        self._unseen = self._unseen.partition(until)[2]

    def close(self) -> None:
        self._socket.close()


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
    )


def _field(name: str, value: str) -> bytes:
    """HPACK: a literal with a new name, not indexed, no Huffman."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
