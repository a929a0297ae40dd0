"""UCX through the core layer of UCXX. The only file that knows either.

Error handling is on, so that a dead peer is reported; ``MM_ERROR_HANDLING`` keeps shared
memory in use with it, and the keepalive is short because shared memory has no other way to
notice a death.
"""

from __future__ import annotations

import os

# UCXX sets a variable that this build of UCX does not read; the warning would go to stdout.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")

import zlib

import torch
from ucxx._lib.arr import Array
from ucxx._lib.libucxx import (
    Feature,
    UCXAddress,
    UCXContext,
    UCXEndpoint,
    UCXError,
    UCXRequest,
    UCXWorker,
    UCXXTag,
    UCXXTagMask,
    UCXXTagMaskFull,
    get_ucx_version,
)

from mesh.errors import MessageTruncated, PeerLost, TransportError

_DEFAULTS = {
    "MM_ERROR_HANDLING": "y",
    # While a rendezvous over shared memory is outstanding, the keepalive does not report the
    # death of its peer. Eager fragments are as fast there, and every death is seen.
    "RNDV_THRESH": "intra:inf,inter:auto",
}
# Below the threshold a device buffer is staged through the host: 14 us a post instead of 2.
_CUDA_DEFAULTS = {"RNDV_THRESH": "64"}

_CHECKSUM_BYTES = 4


def _checksum(address: bytes) -> bytes:
    return zlib.crc32(address).to_bytes(_CHECKSUM_BYTES, "little")


_ANY_TAG = UCXXTag(0)
_ANY_MASK = UCXXTagMask(0)


class UcxMessage:
    """An unexpected message, already removed from UCX's queue: it must be received."""

    __slots__ = ("_probe", "_worker", "nbytes", "tag")

    def __init__(self, worker: UCXWorker, probe: object) -> None:
        self._worker = worker
        self._probe = probe
        self.tag: int = probe.sender_tag.value  # type: ignore[attr-defined]
        self.nbytes: int = probe.length  # type: ignore[attr-defined]

    def receive(self, buffer: Array) -> UCXRequest:
        """See :class:`mesh.transport.base.Message`."""
        return self._worker.tag_recv_with_handle(buffer, self._probe)


class UcxEndpoint:
    """One peer, by its worker address."""

    __slots__ = ("_alive", "_endpoint")

    def __init__(self, worker: UCXWorker, address: bytes) -> None:
        self._alive = True
        checksum, raw = address[:_CHECKSUM_BYTES], address[_CHECKSUM_BYTES:]
        if _checksum(raw) != checksum:
            raise PeerLost("UCX cannot reach the peer: what it sent is no worker address")
        try:
            self._endpoint = UCXEndpoint.create_from_worker_address(
                worker, UCXAddress.create_from_buffer(raw), True
            )
        except UCXError as error:
            raise PeerLost(
                f"UCX cannot reach the peer ({error}); `expert-mesh doctor` on both hosts "
                "shows the transports that they share"
            ) from error
        self._endpoint.set_close_callback(self._closed)

    def _closed(self) -> None:
        self._alive = False

    @property
    def alive(self) -> bool:
        """False once the peer was reported dead or the endpoint was closed."""
        return self._alive

    def send(self, buffer: Array, tag: int) -> UCXRequest:
        """See :class:`mesh.transport.base.Endpoint`."""
        return self._endpoint.tag_send(buffer, UCXXTag(tag))

    def post_receive(self, buffer: Array, tag: int) -> UCXRequest:
        """See :class:`mesh.transport.base.Endpoint`."""
        return self._endpoint.tag_recv(buffer, UCXXTag(tag), UCXXTagMaskFull)

    def close(self) -> None:
        """See :class:`mesh.transport.base.Endpoint`.

        The plain close flushes, which a stopped peer never lets end; this one is forced.
        """
        self._alive = False
        self._endpoint.close_blocking()


class UcxTransport:
    """A UCX worker of this process. See :class:`mesh.transport.base.Transport`.

    ``keepalive_ms`` is how often peers are looked at that say nothing: each look wakes a
    sleeping process.
    """

    def __init__(self, *, cuda: bool = False, keepalive_ms: int = 300) -> None:
        # By the environment, where a user's own word wins: UCXX overwrites some of what its
        # config argument says.
        settings = _DEFAULTS | (_CUDA_DEFAULTS if cuda else {})
        for name, value in (settings | {"KEEPALIVE_INTERVAL": f"{keepalive_ms}ms"}).items():
            os.environ.setdefault(f"UCX_{name}", value)
        self._context = UCXContext(feature_flags=(Feature.TAG, Feature.WAKEUP))
        self._worker = UCXWorker(self._context)
        self._worker.init_blocking_progress_mode()
        self.progress = self._worker.progress
        self.arm = self._worker.arm
        self._own: UCXEndpoint | None = None
        self._empty = Array(bytearray(1))

    @property
    def address(self) -> bytes:
        """The worker address that peers connect to, behind a checksum.

        UCX aborts the process on bytes that are no address.
        """
        raw = bytes(self._worker.address.tobytes())
        return _checksum(raw) + raw

    def connect(self, address: bytes) -> UcxEndpoint:
        """Raises PeerLost when no transport leads there."""
        return UcxEndpoint(self._worker, address)

    def wrap(self, tensor: torch.Tensor) -> Array:
        """bfloat16 has no buffer protocol, so every tensor travels as bytes."""
        view = tensor.view(torch.uint8)
        return Array(view if view.is_cuda else view.numpy())

    def failure(self, request: UCXRequest) -> TransportError | None:
        """Translate UCX's error, if any."""
        try:
            request.check_error()
        except UCXError as error:
            if "runcat" in str(error):
                return MessageTruncated(f"UCX: {error}")
            return PeerLost(f"UCX: {error}")
        return None

    def probe(self) -> UcxMessage | None:
        """See :class:`mesh.transport.base.Transport`."""
        found = self._worker.tag_probe(_ANY_TAG, _ANY_MASK, remove=True)
        return UcxMessage(self._worker, found) if found.matched else None

    def abandon(self, tag: int) -> None:
        """UCXX's core has no cancel of one receive: a message to ourselves ends it."""
        if self._own is None:
            self._own = UCXEndpoint.create_from_worker_address(
                self._worker, UCXAddress.create_from_worker(self._worker), False
            )
        self._own.tag_send(self._empty, UCXXTag(tag))

    def fileno(self) -> int:
        """UCX's event descriptor."""
        return int(self._worker.epoll_file_descriptor)

    def close(self) -> None:
        """Endpoints are the caller's to close first."""
        if self._own is not None:
            self._own.close_blocking()
        for _ in range(1000):
            if not self._worker.progress():
                break


def ucx_version() -> str:
    """Of the library that is loaded: the wheel's, or the system's where that is preferred."""
    return ".".join(map(str, get_ucx_version()))


def available_transports() -> list[str]:
    """``transport/device`` of all that UCX can use in this process, as ``tcp/eth0``."""
    info = UCXContext(feature_flags=(Feature.TAG,)).info
    return [line.rsplit(" ", 1)[1] for line in info.splitlines() if " resource " in line]
