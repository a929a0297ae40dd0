"""UCX: contexts, workers and endpoints through UCXX's core layer, messages through our own
compiled calls (:mod:`mesh.native`) on the same handles. The only file that knows either. What
comes back through the seam (buffers, requests, endpoints) is ours, which types cannot say: Any.

Error handling is on, so that a dead peer is reported; ``MM_ERROR_HANDLING`` keeps shared
memory in use with it, and the keepalive is short because shared memory has no other way to
notice a death.
"""

from __future__ import annotations

import os

# UCXX sets a variable that this build of UCX does not read; the warning would go to stdout.
os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
# A crash in compiled code says where it was; Python's own handler tells only of Python.
os.environ.setdefault("UCX_HANDLE_ERRORS", "bt")

import ctypes
import struct
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from ucxx._lib.libucxx import (
    Feature,
    UCXAddress,
    UCXContext,
    UCXEndpoint,
    UCXError,
    UCXWorker,
    get_ucx_version,
)

from mesh import native, wire
from mesh.errors import MeshError, MessageTruncated, PeerLost, TransportError
from mesh.mlp import NativeMlp
from mesh.plan import ExpertId
from mesh.replay import ReplayDevice, Replays
from mesh.transport.base import Request, RoundTrip, Trail

_DEFAULTS = {
    "MM_ERROR_HANDLING": "y",
    # While a rendezvous over shared memory is outstanding, the keepalive does not report the
    # death of its peer. Eager fragments are as fast there, and every death is seen.
    "RNDV_THRESH": "intra:inf,inter:auto",
}
# Below the threshold a device buffer is staged through the host: 14 us a post instead of 2.
_CUDA_DEFAULTS = {"RNDV_THRESH": "64"}
_UCXX_RNDV_THRESH = "8192"
"""What UCXX puts into the environment when it is imported, unless the user said something."""

_CHECKSUM_BYTES = 4
_OWN_TAG = 0xF << 60
"""Of what a process sends itself: no :class:`mesh.wire.Kind`."""
_MAX_REOPENED = 50
"""What is kept of each takes some 5 MB and 12 descriptors."""
_DOUBT_AFTER_S = 0.5
_LOOK_INTERVAL_S = 0.1
# Of ucs_status_t.
_TRUNCATED = -9
_CONNECTION_RESET = -25
_GPU_FAILED = "the GPU failed at what comes before a layer's experts"
_TOO_MANY = "more UCX messages are in flight than this process may have"
_MAX_TRIPS = 256
_MAX_TRAILS = 1 << 14
# A native.RoundTrip, written in one call.
_PACK_TRIP = struct.Struct("=7Q").pack_into
_TRIP_BYTES = ctypes.sizeof(native.RoundTrip)

_send = native.short.postbox_send
_receive = native.short.postbox_receive
_release = native.short.postbox_release


def _keep(thing: object) -> None:
    """For ever: what UCXX does at its end would wait for messages that never come whole."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _let_go(thing: object) -> None:
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(thing))


def _checksum(address: bytes) -> bytes:
    return zlib.crc32(address).to_bytes(_CHECKSUM_BYTES, "little")


class UcxBuffer:
    """The memory of a tensor."""

    __slots__ = ("_tensor", "address", "nbytes")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.address = tensor.data_ptr()
        self.nbytes = tensor.nbytes


class UcxRequest:
    """An operation of the postbox, whose number is free again once this is gone."""

    __slots__ = ("_postbox", "number")

    def __init__(self, postbox: _Postbox, number: int) -> None:
        self._postbox = postbox
        self.number = number
        if number < 0:
            raise TransportError(_TOO_MANY)

    @property
    def status(self) -> int:
        """See ``native.DONE``."""
        return int(self._postbox.status[self.number])

    @property
    def completed(self) -> bool:
        """See :class:`mesh.transport.base.Request`."""
        return bool(self._postbox.status[self.number] != native.IN_PROGRESS)

    @property
    def ended_s(self) -> float:
        """See :class:`mesh.transport.base.Request`."""
        return float(self._postbox.ended_us[self.number]) / 1e6

    def cancel(self) -> None:
        """See :meth:`mesh.transport.base.Transport.cancel`."""
        native.short.postbox_cancel(self._postbox.pointer, self.number)

    def __del__(self) -> None:
        # Where both go in one collection of garbage, the postbox may have gone first.
        if self.number >= 0 and self._postbox.pointer:
            _release(self._postbox.pointer, self.number)


class _Unposted:
    """A request to a peer that is gone: it never was UCX's."""

    status = _CONNECTION_RESET
    completed = True
    ended_s = 0.0
    number = -1


class _Postbox:
    """The C side's record of all operations; it lives as long as anyone may ask for one."""

    def __init__(self, worker: UCXWorker) -> None:
        self.worker = worker  # UCX's must not end before this
        self.pointer = native.short.postbox_new(worker.handle)
        if not self.pointer:
            raise TransportError("there is no memory for UCX's messages")
        self.record: native.Postbox = self.pointer.contents
        self.status: Any = self.record.status
        self.ended_us: Any = self.record.ended_us
        self.dead: list[int] = []
        """Endpoints that died, whose receives are to be cancelled."""
        self.num_deaths = 0

    def __del__(self) -> None:
        if self.pointer:
            native.short.postbox_free(self.pointer)
            self.pointer = None


class UcxMessage:
    """An unexpected message, already removed from UCX's queue: it must be received."""

    __slots__ = ("_message", "_postbox", "nbytes", "tag")

    def __init__(self, postbox: _Postbox, found: native.Arrival) -> None:
        self._postbox = postbox
        self._message: int = found.message
        self.tag: int = found.tag
        self.nbytes: int = found.bytes

    def receive(self, buffer: Any) -> UcxRequest:
        """See :class:`mesh.transport.base.Message`."""
        box = self._postbox
        number = native.short.postbox_take(
            box.pointer,
            self._message,
            buffer.address,
            min(buffer.nbytes, self.nbytes),
            native.ANYWHERE,
        )
        return UcxRequest(box, number)


class UcxEndpoint:
    """One peer, by its worker address."""

    def __init__(self, postbox: _Postbox, address: bytes, *, watched: bool = True) -> None:
        self._postbox = postbox
        self.alive = True
        """False once the peer was reported dead or the endpoint was closed."""
        checksum, raw = address[:_CHECKSUM_BYTES], address[_CHECKSUM_BYTES:]
        if _checksum(raw) != checksum:
            raise PeerLost("UCX cannot reach the peer: what it sent is no worker address")
        try:
            self._endpoint = UCXEndpoint.create_from_worker_address(
                postbox.worker, UCXAddress.create_from_buffer(raw), watched
            )
        except UCXError as error:
            raise PeerLost(
                f"UCX cannot reach the peer ({error}); `expert-mesh doctor` on both hosts "
                "shows the transports that they share"
            ) from error
        self.handle: int = self._endpoint.handle
        self._endpoint.set_close_callback(self._closed)

    def _closed(self) -> None:
        """UCX calls this from within its progress, where nothing may be cancelled."""
        if self.alive:
            self.alive = False
            self._postbox.dead.append(self.handle)
            self._postbox.num_deaths += 1
            self._postbox.record.attention = 1

    def send(self, buffer: Any, tag: int) -> UcxRequest | _Unposted:
        """See :class:`mesh.transport.base.Endpoint`."""
        if not self.alive:
            return _Unposted()
        box, what = self._postbox, (buffer.address, buffer.nbytes, tag, native.ANYWHERE)
        return UcxRequest(box, _send(box.pointer, self.handle, *what))

    def post_receive(self, buffer: Any, tag: int) -> UcxRequest | _Unposted:
        """See :class:`mesh.transport.base.Endpoint`."""
        if not self.alive:
            return _Unposted()
        box = self._postbox
        return UcxRequest(
            box, _receive(box.pointer, self.handle, buffer.address, buffer.nbytes, tag)
        )

    def close(self) -> None:
        """See :class:`mesh.transport.base.Endpoint`.

        The plain close flushes, which a stopped peer never lets end; this one is forced.
        """
        self.alive = False
        native.short.postbox_cancel_receives(self._postbox.pointer, self.handle)
        self._endpoint.close_blocking()


class _Lookout:
    """Tells whether shared memory is blocked: sends its own process a message that way.

    UCX says "busy", which it says for other reasons too: our own sends wait while a peer's queue
    is full, and it may say so for ever where that peer died.
    """

    def __init__(self, postbox: _Postbox, address: bytes) -> None:
        self._postbox = postbox
        context = UCXContext({"TLS": "sm"}, feature_flags=(Feature.TAG, Feature.WAKEUP))
        self._sender = _Postbox(UCXWorker(context))
        _keep(self._sender.worker)
        self._endpoint: UcxEndpoint | None = None
        self._sent: list[Any] = []
        with suppress(PeerLost):  # where the user has us use no shared memory
            self._endpoint = UcxEndpoint(self._sender, address, watched=False)
            _keep(self._endpoint)
        self._buffers = [UcxBuffer(torch.zeros(1, dtype=torch.uint8)) for _ in range(2)]
        self._awaited_s = 0.0

    def look(self, since_s: float) -> float:
        """For how long our message has been awaited, now that ``since_s`` have passed; it is sent
        with the first look. 0 when it came: send another."""
        if self._endpoint is None:
            return 0.0
        if not self._sent:
            number = _receive(self._postbox.pointer, 0, self._buffers[0].address, 1, _OWN_TAG)
            self._sent = [
                UcxRequest(self._postbox, number),
                self._endpoint.send(self._buffers[1], _OWN_TAG),
            ]
        else:
            self._awaited_s += since_s
        native.short.postbox_progress(self._sender.pointer)
        if self._sent[0].completed:
            self._sent.clear()
            self._awaited_s = 0.0
        return self._awaited_s


class UcxAnswering:
    """See :class:`mesh.transport.base.Answering`."""

    def __init__(
        self, postbox: _Postbox, row_bytes: int, max_rows: int, device: ReplayDevice | None
    ) -> None:
        self._postbox = postbox
        self._device = device
        self._row_bytes = row_bytes
        self._pointer = native.short.answering_new(
            postbox.pointer, row_bytes, max_rows, device.handle if device else None
        )
        if not self._pointer:
            raise TransportError("there is no memory for the dispatches in hand")
        self._record: native.Answering = self._pointer.contents
        self._experts: Mapping[ExpertId, NativeMlp | Replays] = {}
        self._past: list[Mapping[ExpertId, NativeMlp | Replays]] = []
        self._keys: dict[ExpertId, int] = {}

    def __del__(self) -> None:
        if self._pointer:
            native.short.answering_free(self._pointer)

    @property
    def in_hand(self) -> int:
        """See :class:`mesh.transport.base.Answering`."""
        return int(self._record.in_hand)

    @property
    def computing(self) -> int:
        """See :class:`mesh.transport.base.Answering`."""
        return int(self._record.computing)

    @property
    def last_progress_s(self) -> float:
        """See :class:`mesh.transport.base.Answering`."""
        return float(self._record.last_progress_us) / 1e6

    def open(self, session: int, endpoint: Any, reply_session: int) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        native.short.answering_open(self._pointer, session, endpoint.handle, reply_session)

    def close(self, session: int) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        native.short.answering_close(self._pointer, session)

    def borrow(self, session: int, lent: bytes) -> bool:
        """See :class:`mesh.transport.base.Answering`."""
        return bool(native.short.answering_borrow(self._pointer, session, lent))

    def fetch(self, session: int, first: int, rows: Any) -> bool:
        """See :class:`mesh.transport.base.Answering`."""
        return bool(
            native.short.answering_fetch(
                self._pointer, session, first, rows.nbytes // self._row_bytes, rows.address
            )
        )

    def deliver(self, session: int, first: int, rows: Any) -> bool:
        """See :class:`mesh.transport.base.Answering`."""
        return bool(
            native.short.answering_deliver(
                self._pointer, session, first, rows.nbytes // self._row_bytes, rows.address
            )
        )

    def cut(self, num_experts: int, header_rows: int) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        self._record.num_experts = min(num_experts, wire.MAX_EXPERTS)  # more have no tags
        self._record.header_rows = header_rows

    def doubt(self, doubted: bool) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        self._record.doubted = doubted

    def serve(self, experts: Mapping[ExpertId, NativeMlp | Replays]) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        self._past.append(self._experts)
        for expert in self._experts.keys() - experts.keys():
            self._record.answerers[self._keys[expert]].computes = None
        self._keys |= {expert: wire.expert_key(*expert) for expert in experts}
        for expert, computes in experts.items():
            self._record.answerers[self._keys[expert]].computes = computes.handle
        self._experts = experts

    def counts(self) -> Iterator[tuple[ExpertId, int, float]]:
        """See :class:`mesh.transport.base.Answering`."""
        for expert, key in self._keys.copy().items():
            answerer = self._record.answerers[key]
            if answerer.rows:
                yield expert, answerer.rows, answerer.microseconds / 1e6

    def look(self) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        native.long.answering_look(self._pointer)

    def trace(self) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        native.short.answering_trace(self._pointer, _MAX_TRAILS)

    def trails(self) -> Iterator[Trail]:
        """See :class:`mesh.transport.base.Answering`."""
        taken = [_trail(self._record.trails[n]) for n in range(self._record.num_trails)]
        self._record.num_trails = 0
        return iter(taken)

    def strand(self, patience_s: float) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        native.long.answering_strand(self._pointer, int(patience_s * 1e6))

    def failed(self) -> Iterator[tuple[int, wire.Refusal]]:
        """See :class:`mesh.transport.base.Answering`."""
        reason = ctypes.c_int32()
        while self._record.failed:
            tag = native.short.answering_next_failed(self._pointer, reason)
            yield tag, wire.Refusal(reason.value)

    def run(self, *, spin_s: float, wake_fd: int) -> None:
        """See :class:`mesh.transport.base.Answering`."""
        if self._past and not self.in_hand:
            self._past.clear()  # what was in hand may have used them
        native.long.answering_run(self._pointer, int(spin_s * 1e6), wake_fd)


def _trail(of: native.Trail) -> Trail:
    """From durations, which the device counts back from when it was seen to be done."""
    computed_us = of.done_us - of.deliver_us
    began_us = computed_us - of.compute_us
    fetched_us = began_us - of.queued_us
    return Trail(
        of.tag,
        of.found_us / 1e6,
        of.received_us / 1e6,
        ((fetched_us - of.fetch_us) / 1e6, fetched_us / 1e6),
        (began_us / 1e6, computed_us / 1e6),
        (computed_us / 1e6, of.sent_us / 1e6),
    )


class UcxAsking:
    """See :class:`mesh.transport.base.Asking`."""

    def __init__(self, postbox: _Postbox, device: ReplayDevice) -> None:
        self._device = device
        self._pointer: int | None = None
        self.follow(postbox)

    def follow(self, postbox: _Postbox) -> None:
        """Ask by this one from here on, when nothing is away."""
        self._free()
        self._postbox = postbox
        self._pointer = native.short.asking_new(postbox.pointer, self._device.handle)
        if not self._pointer:
            raise TransportError("there is no memory to ask from")

    def __del__(self) -> None:
        self._free()

    def _free(self) -> None:
        if self._pointer:
            native.short.asking_free(self._pointer)
            self._pointer = None

    @property
    def num_deaths(self) -> int:
        """See :class:`mesh.transport.base.Asking`."""
        return self._postbox.num_deaths

    def aim(self, ask: native.Ask, endpoint: Any) -> None:
        """See :class:`mesh.transport.base.Asking`."""
        ask.endpoint = endpoint.handle

    def leave(self, seat: native.Seat, graphs: Sequence[int]) -> bool:
        """See :class:`mesh.transport.base.Asking`."""
        left = native.long.asking_leave(self._pointer, seat, *_handles(graphs))
        if left < 0:
            raise MeshError(_GPU_FAILED)
        return bool(left)

    def wait(
        self,
        seat: native.Seat,
        *,
        spin_s: float,
        timeout_s: float,
        then: native.Seat | None = None,
        graphs: Sequence[int] = (),
    ) -> tuple[bool, bool]:
        """See :class:`mesh.transport.base.Asking`."""
        spin_us, timeout_us = int(spin_s * 1e6), int(timeout_s * 1e6)
        came = native.long.asking_wait(
            self._pointer, seat, spin_us, timeout_us, then, *_handles(graphs)
        )
        if came < 0:
            raise MeshError(_GPU_FAILED)
        return came > 0, came > 1

    def taken(self, ask: native.Ask) -> tuple[UcxRequest, UcxRequest]:
        """See :class:`mesh.transport.base.Asking`."""
        return UcxRequest(self._postbox, ask.received), UcxRequest(self._postbox, ask.sent)


def _handles(graphs: Sequence[int]) -> tuple[ctypes.Array[ctypes.c_uint64], int]:
    return (ctypes.c_uint64 * len(graphs))(*graphs), len(graphs)


class UcxTransport:
    """A UCX worker of this process. See :class:`mesh.transport.base.Transport`.

    ``keepalive_ms`` is how often peers are looked at that say nothing: each look wakes a
    sleeping process.
    """

    def __init__(self, *, cuda: bool = False, keepalive_ms: int = 300) -> None:
        # By the environment, where a user's own word wins: UCXX overwrites some of what its
        # config argument says.
        if os.environ.get("UCX_RNDV_THRESH") == _UCXX_RNDV_THRESH:
            del os.environ["UCX_RNDV_THRESH"]
        settings = _DEFAULTS | (_CUDA_DEFAULTS if cuda else {})
        for name, value in (settings | {"KEEPALIVE_INTERVAL": f"{keepalive_ms}ms"}).items():
            os.environ.setdefault(f"UCX_{name}", value)
        self._num_reopened = 0
        self._asking: UcxAsking | None = None
        self._closed = False
        self._open()
        # A number of our own: whoever waits for it need not hear of another worker.
        self._descriptor = os.dup(self._worker.epoll_file_descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._found = native.Arrival()
        self._trips = (native.RoundTrip * _MAX_TRIPS)()
        self._numbers = (ctypes.c_int32 * (2 * _MAX_TRIPS))()

    def _open(self) -> None:
        self._lookout: _Lookout | None = None
        self._looked_s = 0.0
        self._stuck_s = 0.0
        context = UCXContext(feature_flags=(Feature.TAG, Feature.WAKEUP))
        self._worker = UCXWorker(context)
        _keep(self._worker)
        self._worker.init_blocking_progress_mode()
        self._postbox = _Postbox(self._worker)

    @property
    def address(self) -> bytes:
        """The worker address that peers connect to, behind a checksum.

        UCX aborts the process on bytes that are no address.
        """
        raw = bytes(self._worker.address.tobytes())
        return _checksum(raw) + raw

    def connect(self, address: bytes) -> UcxEndpoint:
        """Raises PeerLost when no transport leads there."""
        return UcxEndpoint(self._postbox, address)

    def wrap(self, tensor: torch.Tensor) -> UcxBuffer:
        """See :class:`mesh.transport.base.Transport`."""
        return UcxBuffer(tensor)

    def exchange(self, trips: Sequence[RoundTrip]) -> list[tuple[Request, Request]]:
        """See :class:`mesh.transport.base.Transport`."""
        box, numbers = self._postbox, self._numbers
        if len(trips) > _MAX_TRIPS or not all(trip.endpoint.alive for trip in trips):
            replies = [trip.endpoint.post_receive(trip.receive, trip.receive_tag) for trip in trips]
            sent = [trip.endpoint.send(trip.send, trip.send_tag) for trip in trips]
            return list(zip(replies, sent, strict=True))
        trip: Any
        for number, trip in enumerate(trips):
            endpoint, send, send_tag, receive, receive_tag = trip
            _PACK_TRIP(
                self._trips,
                number * _TRIP_BYTES,
                endpoint.handle,
                send.address,
                send.nbytes,
                send_tag,
                receive.address,
                receive.nbytes,
                receive_tag,
            )
        if native.short.postbox_exchange(box.pointer, len(trips), self._trips, numbers) < 0:
            raise TransportError(_TOO_MANY)
        return [
            (UcxRequest(box, numbers[2 * i]), UcxRequest(box, numbers[2 * i + 1]))
            for i in range(len(trips))
        ]

    def progress(self) -> bool:
        """See :class:`mesh.transport.base.Transport`."""
        moved = bool(native.short.postbox_progress(self._postbox.pointer))
        if self._postbox.dead:
            self._bury()
        return moved

    def _bury(self) -> None:
        """End the receives that were posted for peers which died."""
        self._postbox.record.attention = 0
        while self._postbox.dead:
            native.short.postbox_cancel_receives(self._postbox.pointer, self._postbox.dead.pop())

    def wait(self, requests: Sequence[Any], *, spin_s: float, timeout_s: float) -> None:
        """See :class:`mesh.transport.base.Transport`."""
        numbers = [request.number for request in requests if request.number >= 0]
        native.long.postbox_wait(
            self._postbox.pointer,
            len(numbers),
            (ctypes.c_int32 * len(numbers))(*numbers),
            int(spin_s * 1e6),
            int(timeout_s * 1e6),
        )
        if self._postbox.dead:
            self._bury()

    def failure(self, request: Any) -> TransportError | None:
        """Translate UCX's error, if any."""
        status = request.status
        if status == native.DONE:
            return None
        if status == native.SHORT:
            return MessageTruncated("UCX: the message was shorter than it should be")
        text = f"UCX: {native.short.status_text(status).decode()}"
        return MessageTruncated(text) if status == _TRUNCATED else PeerLost(text)

    def cancel(self, request: Any) -> None:
        """See :class:`mesh.transport.base.Transport`."""
        if request.number >= 0:
            request.cancel()

    def probe(self) -> UcxMessage | None:
        """See :class:`mesh.transport.base.Transport`."""
        if not native.short.postbox_probe(self._postbox.pointer, 1, self._found):
            return None
        return UcxMessage(self._postbox, self._found)

    def answering(
        self, *, row_bytes: int, max_rows: int, device: ReplayDevice | None = None
    ) -> UcxAnswering | None:
        """See :class:`mesh.transport.base.Transport`."""
        return UcxAnswering(self._postbox, row_bytes, max_rows, device)

    def asking(self, device: ReplayDevice) -> UcxAsking:
        """See :class:`mesh.transport.base.Transport`."""
        self._asking = UcxAsking(self._postbox, device)
        return self._asking

    def fileno(self) -> int:
        """UCX's event descriptor."""
        return self._descriptor

    def arm(self) -> bool:
        """See :class:`mesh.transport.base.Transport`."""
        return bool(native.short.postbox_arm(self._postbox.pointer))

    def stuck_s(self) -> float:
        """See :class:`mesh.transport.base.Transport`."""
        now_s = time.monotonic()
        since_s = now_s - self._looked_s
        if since_s < _LOOK_INTERVAL_S:
            return self._stuck_s
        self._looked_s = now_s
        self._stuck_s = 0.0
        if not self.arm() and now_s - self._postbox.record.busy_since_us / 1e6 > _DOUBT_AFTER_S:
            if self._lookout is None:
                self._lookout = _Lookout(self._postbox, self.address)
            self._stuck_s = self._lookout.look(min(since_s, 2 * _LOOK_INTERVAL_S))
        return self._stuck_s

    def reopen(self) -> None:
        """See :class:`mesh.transport.base.Transport`.

        The worker from before is kept and never progressed again, without which UCX copies
        nothing; with RDMA and CUDA it reads what it receives, and what it was reading ends in the
        turns that it gets here. Raises TransportError past a fixed number of times.
        """
        if self._num_reopened == _MAX_REOPENED:
            raise TransportError(f"UCX was opened anew {_MAX_REOPENED} times; restart the process")
        self._num_reopened += 1
        self._turn()
        native.short.postbox_abandon(self._postbox.pointer)
        self._open()
        if self._asking is not None:
            self._asking.follow(self._postbox)
        os.dup2(self._worker.epoll_file_descriptor, self._descriptor, inheritable=False)

    def close(self) -> None:
        """Endpoints are the caller's to close first."""
        self._turn()
        if self._lookout is None and not self._closed:
            self._closed = True
            _let_go(self._worker)

    def _turn(self) -> None:
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
