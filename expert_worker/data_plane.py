"""The worker's data plane: rows in, experts, rows out. One thread owns all of it.

Legend: R rows of one message, D hidden size.

A message is received into a buffer of its own; its rows are queued by expert, computed
together with what else waits for that expert, written back into the same buffer (a reply is as
long as its rows) and sent from there. The buffer returns to the pool when the send has ended.
"""

from __future__ import annotations

import ctypes
import math
import os
import queue
import random
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import structlog
import torch

from expert_worker.batcher import Batcher
from expert_worker.compute import Compute, CpuCompute, Part, Ticket
from expert_worker.expert_store import Expert, ExpertStore
from expert_worker.pacing import Pacing
from expert_worker.weights import Allowance, WeightTransfers
from mesh import native, wire
from mesh.errors import MeshError, ModelMismatch, TransportError, Unavailable
from mesh.plan import ExpertId
from mesh.transport.base import (
    Answering,
    Buffer,
    Endpoint,
    Message,
    Request,
    Trail,
    Transport,
    why_stuck,
)
from mesh.transport.waiting import Waiter

log = structlog.get_logger()
T = TypeVar("T")

_SCRATCH_BYTES = 64
_MAX_IN_HAND = 256
_CALL_TIMEOUT_S = 10.0
_LOOK_AROUND_S = 1.0
_STRAND_AFTER_S = 1.0
STUCK_PATIENCE_S = 5.0
"""A gateway that was only stopped amid a message to us may be back by then."""
# Plain integers: an enum's member costs a microsecond to look up, on every message.
_DISPATCH = int(wire.Kind.DISPATCH)
_REFERENCE = int(wire.Kind.REFERENCE)
_ARENAS = int(wire.Kind.ARENAS)
_REPLY = int(wire.Kind.REPLY)


@dataclass(frozen=True)
class DataPlaneStats:
    """A snapshot, since start unless it says otherwise."""

    rows: dict[ExpertId, int]
    compute_s: dict[ExpertId, float]
    refused: dict[str, int]
    queue_rows: int
    """Waiting now."""
    sessions: int
    """Open now."""
    last_progress_s: float
    """``time.monotonic()`` of the last turn of the loop that did something."""
    busy: bool
    """Rows are here that it has to compute; what waits for a slow gateway does not count."""
    longest_batch_s: float


@dataclass(eq=False)
class _Session:
    number: int
    gateway_id: str
    endpoint: Endpoint
    reply_session: int
    num_experts: int
    """Of a layer, as the gateway counts them."""
    closed_s: float = math.inf
    """In ``time.monotonic()``."""


@dataclass
class _RowBuffer:
    """``rows_RD`` and those ranges of it that were used, each made once and kept."""

    rows_RD: torch.Tensor
    ranges: dict[tuple[int, int], Buffer] = field(default_factory=dict)


@dataclass(eq=False)
class _Work:
    """One dispatch that is being served."""

    session: _Session
    frame: wire.Frame
    buffer: _RowBuffer
    num_header_rows: int
    request: Request
    found_s: float
    reference: torch.Tensor | None
    """The row of the session's arena, once that has come in; None: they come themselves."""
    answers_RD: torch.Tensor | None = None
    """The outputs, where they are not in the buffer."""
    waiting_segments: int = 0
    received_s: float = 0.0
    computed_s: float = 0.0
    device_s: float = 0.0


@dataclass(frozen=True)
class _Segment:
    """The rows of one expert within a message."""

    work: _Work
    part: Part


class _Batch(NamedTuple):
    """What is being computed together, of one expert; None: one message of several."""

    expert: ExpertId | None
    segments: list[_Segment]
    ticket: Ticket
    experts: Mapping[ExpertId, Expert]
    """Those that were here."""


class _Lending(NamedTuple):
    """What a gateway says of the arenas that it lends, on its way in."""

    session: _Session
    frame: wire.Frame
    lent: torch.Tensor
    buffer: Buffer
    request: Request


class _Command(Generic[T]):
    """A call from another thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.result: Future[T] = Future()

    def run(self) -> None:
        try:
            self.result.set_result(self._function())
        except MeshError as error:
            self.result.set_exception(error)


class _Refused(Exception):
    def __init__(self, reason: wire.Refusal) -> None:
        super().__init__(reason.name.lower())
        self.reason = reason


class DataPlane(threading.Thread):
    """Serves dispatches of every connected gateway.

    ``make_transport`` is called on the thread, which owns the transport from then on. Methods
    are callable from any thread; :attr:`failure` is what ended the thread, if anything did.
    """

    def __init__(
        self,
        make_transport: Callable[[], Transport],
        store: ExpertStore,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_experts: int,
        max_rows: int,
        merge_rows: int,
        spin_s: float,
        threads: int,
    ) -> None:
        super().__init__(name="data-plane", daemon=True)
        self._threads = threads
        self._make_transport = make_transport
        self._store = store
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._max_rows = max_rows
        self._spin_s = spin_s
        self._row_bytes = hidden_size * dtype.itemsize
        self._count(num_experts)
        self._commands: queue.SimpleQueue[_Command[Any]] = queue.SimpleQueue()
        self._ended = False
        self._sessions: dict[int, _Session] = {}
        self._next_session = random.randrange(1, wire.MAX_SESSIONS)
        self._free: dict[int, list[_RowBuffer]] = defaultdict(list)
        self._receiving: list[_Work] = []
        self._stranded: list[_Work] = []
        """What came in part from who is gone: UCX waits for the rest for ever, and may write it."""
        self._sending: list[_Work] = []
        self._dropping: list[Request] = []
        self._lending: list[_Lending] = []
        self._delivering: deque[tuple[_Work, Ticket]] = deque()
        self._compute_on: Compute = CpuCompute()
        if device.type == "cuda":
            from expert_worker.gpu_compute import GpuCompute

            self._compute_on = GpuCompute(device)
        self._computing: deque[_Batch] = deque()
        self._batcher: Batcher[_Segment] = Batcher(merge_rows)
        self._rows: Counter[ExpertId] = Counter()
        self._compute_s: defaultdict[ExpertId, float] = defaultdict(float)
        self._refused: Counter[str] = Counter()
        self._last_progress_s = time.monotonic()
        self._starting = False
        self._longest_batch_s = 0.0
        self._draining = False
        self._stopping = False
        self._answering: Answering | None = None
        self._served: tuple[Mapping[ExpertId, Expert], int] = ({}, 0)
        """The experts that the transport answers for, and the version of how."""
        self._bound: Future[bytes] = Future()
        self.failure: BaseException | None = None
        self._pacing = Pacing()
        self._unprepared = False
        self.prepared = threading.Event()
        """All that makes quick what nobody has asked for yet is there, for the first time."""
        self._on_served: Callable[[Trail], None] | None = None
        """Told of every dispatch on the thread, once anybody wants to know."""

    # Called from other threads.

    def wait_started(self, timeout_s: float = 30.0) -> bytes:
        """The transport's address, once there is one."""
        return self._bound.result(timeout_s)

    def connect(
        self,
        gateway_id: str,
        address: bytes,
        reply_session: int,
        num_experts: int | None = None,
    ) -> int:
        """Open a session for a gateway and return its number.

        ``num_experts`` is what the gateway counts in a layer; see :meth:`cut`. Raises MeshError.
        """
        return self._call(lambda: self._open(gateway_id, address, reply_session, num_experts))

    def disconnect(self, gateway_id: str, session: int) -> None:
        """End a session; one that is not the gateway's, or already gone, is left alone."""
        self._call(lambda: self._close(gateway_id, session))

    def cut(self, num_experts: int) -> None:
        """From here on a layer has so many experts, or slices of them.

        Rows of sessions from before are refused: what they call an expert is another now. No
        expert may be in the store until this returns.
        """
        self._call(lambda: self._cut(num_experts))

    def weights(self, function: Callable[[WeightTransfers], T]) -> T:
        """What ``function`` makes of the transfers of weights, on the thread that owns them."""
        return self._call(lambda: function(self._weights))

    def trace(self, on_served: Callable[[Trail], None]) -> None:
        """Tell of every dispatch from here on, on the thread. On a GPU each takes longer for it."""
        self._call(lambda: self._trace(on_served))

    def stats(self) -> DataPlaneStats:
        """Counters as of now."""
        rows, compute_s = Counter(self._rows), defaultdict(float, self._compute_s)
        last_progress_s = self._last_progress_s
        if self._answering is not None:
            for expert, count, seconds in self._answering.counts():
                rows[expert] += count
                compute_s[expert] += seconds
            last_progress_s = max(last_progress_s, self._answering.last_progress_s)
        return DataPlaneStats(
            dict(rows),
            dict(compute_s),
            dict(self._refused),
            self._batcher.queued_rows,
            len(self._sessions),
            last_progress_s,
            self._starting
            or bool(self._computing)
            or self._batcher.queued_rows > 0
            or self._computing_natively(),
            self._longest_batch_s,
        )

    def drain(self, timeout_s: float) -> None:
        """Refuse what comes from now on and wait until what is in hand is served."""
        self._draining = True
        self._waiter.wake()
        until = time.monotonic() + timeout_s
        while self._busy() and self.is_alive() and time.monotonic() < until:
            time.sleep(0.01)

    def stop(self) -> None:
        """End the thread and free everything it owns."""
        self._stopping = True
        if self.is_alive():
            self._waiter.wake()
        self.join()

    def _call(self, function: Callable[[], T]) -> T:
        command = _Command(function)
        self._commands.put(command)
        if self._ended:
            self._fail_commands()
        else:
            self._waiter.wake()
        return command.result.result(_CALL_TIMEOUT_S)

    def _fail_commands(self) -> None:
        while not self._commands.empty():
            self._commands.get().result.set_exception(
                Unavailable("the worker's data plane has ended; restart the worker")
            )

    # Everything below runs on the thread.

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        # OpenMP counts threads for each thread that computes: what the process was told does not
        # hold here, and workers that share cores would wait for each other's helpers at barriers.
        torch.set_num_threads(self._threads)
        if self._device.type == "cpu":
            # Woken by a gateway that has more to send, it must not take the core from it.
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        try:
            # First: a transport must find the GPU's context on this thread.
            self._compute_on.open()
            transport = self._transport = self._make_transport()
            self._scratch = transport.wrap(torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8))
            self._nothing = transport.wrap(torch.zeros(0, dtype=torch.uint8))
            self._weights = WeightTransfers(transport)
            self._allowance = Allowance()
            self._waiter = Waiter(transport, spin_s=self._spin_s)
            self._answering = transport.answering(
                row_bytes=self._row_bytes,
                max_rows=self._max_rows,
                device=self._compute_on.replays,
            )
            self._tell_counts()
            if self._answering is None:
                self.prepared.set()
            self._store.on_change = self._doubt
            self._bound.set_result(transport.address)
            with torch.inference_mode():
                while not self._stopping:
                    self._turn()
            for session in list(self._sessions.values()):
                self._close(session.gateway_id, session.number)
            self._weights.close()
            transport.close()
        except BaseException as error:
            self.failure = error
            log.exception("data_plane_failed")
            if not self._bound.done():
                self._bound.set_exception(error)
        finally:
            self._ended = True
            self._fail_commands()

    def _turn(self) -> None:
        """Receive, compute at most one batch, send; wait when there was nothing of it."""
        began_s = time.monotonic()
        self._transport.progress()
        if self._answering is not None and self._answering.in_hand:
            self._answering.look()
            for tag, reason in self._answering.failed():
                self._refuse(wire.decode(tag), reason)
        if self._answering is not None and self._on_served is not None:
            for trail in self._answering.trails():
                self._on_served(trail)
        moved = self._accept()
        if self._receiving:
            moved |= self._received()
        if self._batcher.queued_rows and len(self._computing) < self._compute_on.depth:
            self._compute()
            moved = True
        if self._computing:
            moved |= self._computed()
        if self._delivering:
            moved |= self._delivered()
        if self._sending:
            moved |= self._sent()
        if self._lending:
            moved |= self._lent()
        if self._weights.any:
            moved |= self._move_weights(began_s)
        while not self._commands.empty():
            self._commands.get().run()
            moved = True
        if moved:
            self._last_progress_s = time.monotonic()
            self._waiter.busy()
        elif (
            self._computing
            or self._delivering
            or (self._must_turn() and self._computing_natively())
        ):
            self._waiter.busy()
        elif self._answering is None or self._must_turn():
            self._waiter.wait(_LOOK_AROUND_S if self._receiving else None)
            self._look_around()
        else:
            self._answer(self._answering)
            self._look_around()

    def _move_weights(self, began_s: float) -> bool:
        """Both ends have to be at it for a chunk to move."""
        now_s = time.monotonic()
        self._allowance.begin(now_s, now_s - began_s)
        moved = self._weights.turn()
        step = True
        while self._weights.any and self._allowance.goes_on(time.monotonic(), step):
            step = self._transport.progress()
            step |= self._accept()
            step |= self._weights.turn()
            moved |= step
        return moved

    def _answer(self, answering: Answering) -> None:
        """Let what is regular be answered without us, until we are needed."""
        answering.doubt(False)  # first: what changes from here on is doubted again
        experts, version = self._store.experts, self._compute_on.version
        if self._served[0] is not experts or self._served[1] != version:
            self._served, self._unprepared = (experts, version), True
            answering.serve(self._compute_on.serve(experts))
        began_s = time.monotonic()
        if self._unprepared and self._pacing.may_begin(began_s, answering.last_progress_s):
            self._unprepared = self._compute_on.prepare(self._num_experts, self._header_rows)
            self._pacing.ended(began_s, time.monotonic())
            if not self._unprepared:
                self.prepared.set()
        if self._unprepared:
            self._waiter.wake()  # what is left is for the next turns
        answering.run(spin_s=self._spin_s, wake_fd=self._waiter.descriptor)
        self._waiter.settle()

    def _doubt(self) -> None:
        """On whatever thread changes the store: the next message of several experts is ours."""
        if self._answering is not None:
            self._answering.doubt(True)

    def _must_turn(self) -> bool:
        return self._draining or self._in_hand() or self._weights.any or bool(self._lending)

    def _computing_natively(self) -> bool:
        return self._answering is not None and self._answering.computing > 0

    def _in_hand(self) -> bool:
        return bool(
            self._receiving
            or self._sending
            or self._computing
            or self._delivering
            or self._batcher.queued_rows
        )

    def _busy(self) -> bool:
        answering = self._answering is not None and self._answering.in_hand > 0
        return answering or self._in_hand()

    def _open(
        self, gateway_id: str, address: bytes, reply_session: int, num_experts: int | None
    ) -> int:
        if self._draining:
            raise Unavailable("this worker is draining; the next plan names another")
        if num_experts not in (None, self._num_experts):
            raise ModelMismatch(
                f"gateway {gateway_id} counts {num_experts} experts and slices in a layer, this "
                f"worker {self._num_experts}: one of them follows an old plan and will get the new"
            )
        endpoint = self._transport.connect(address)
        # A gateway that comes again has given its last session up; that word may have been lost.
        for earlier in [s for s in self._sessions.values() if s.gateway_id == gateway_id]:
            self._close(gateway_id, earlier.number)
        while self._next_session in self._sessions or self._next_session == 0:
            self._next_session = (self._next_session + 1) % wire.MAX_SESSIONS
        number = self._next_session
        self._next_session = (number + 1) % wire.MAX_SESSIONS
        self._sessions[number] = _Session(
            number, gateway_id, endpoint, reply_session, self._num_experts
        )
        if self._answering is not None:
            self._answering.open(number, endpoint, reply_session)
        return number

    def _trace(self, on_served: Callable[[Trail], None]) -> None:
        self._on_served = on_served
        if self._answering is not None:
            self._answering.trace()

    def _count(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._header_rows = -(-num_experts * 4 // self._row_bytes)

    def _tell_counts(self) -> None:
        if self._answering is not None:
            self._answering.cut(self._num_experts, self._header_rows)

    def _cut(self, num_experts: int) -> None:
        while self._batcher.queued_rows or self._computing:
            if self._batcher.queued_rows:
                self._compute()
            self._computed()
        self._rows.clear()
        self._compute_s.clear()
        self._count(num_experts)
        if self._answering is not None:
            for session in self._sessions:
                self._answering.close(session)
        self._tell_counts()

    def _close(self, gateway_id: str, number: int) -> None:
        session = self._sessions.get(number)
        if session is not None and session.gateway_id == gateway_id:
            del self._sessions[number]
            session.closed_s = time.monotonic()
            if self._answering is not None:
                self._answering.close(number)
            session.endpoint.close()

    def _look_around(self) -> None:
        if (stuck := why_stuck(self._transport, STUCK_PATIENCE_S)) is not None:
            raise TransportError(stuck)
        for session in list(self._sessions.values()):
            if not session.endpoint.alive:
                log.info("gateway_gone", gateway_id=session.gateway_id)
                self._close(session.gateway_id, session.number)
        self._strand()

    def _strand(self) -> None:
        """Wait no more for the rest of what somebody sent who has been gone for long enough."""
        if self._answering is not None and self._answering.in_hand:
            self._answering.strand(_STRAND_AFTER_S)
        gone_s = time.monotonic() - _STRAND_AFTER_S
        if stranded := [work for work in self._receiving if work.session.closed_s < gone_s]:
            self._stranded += stranded
            self._receiving = [work for work in self._receiving if work not in stranded]

    def _accept(self) -> bool:
        """Take what arrived; bounded, so that what is in hand is served first."""
        moved = False
        while len(self._receiving) + len(self._sending) < _MAX_IN_HAND:
            message = self._transport.probe()
            if message is None:
                break
            moved = True
            if self._weights.accept(message):
                continue
            frame = wire.decode(message.tag)
            if frame.kind == _ARENAS and self._listen(frame, message):
                continue
            try:
                work = self._receive(frame, message)
            except _Refused as refused:
                # A shorter buffer makes the transport throw the rest of the message away.
                self._dropping = [r for r in self._dropping if not r.completed]
                self._dropping.append(message.receive(self._scratch))
                self._refuse(frame, refused.reason)
            else:
                if work.request.completed:
                    self._queue(work)
                else:
                    self._receiving.append(work)
        return moved

    def _receive(self, frame: wire.Frame, message: Message) -> _Work:
        """Check the header before a byte of the payload is touched, then start to receive."""
        if frame.kind not in (_DISPATCH, _REFERENCE) or not frame.rows:
            raise _Refused(wire.Refusal.MALFORMED)
        session = self._sessions.get(frame.session)
        if session is None:
            raise _Refused(wire.Refusal.UNKNOWN_SESSION)
        if self._draining:
            raise _Refused(wire.Refusal.DRAINING)
        if frame.rows > self._max_rows:
            raise _Refused(wire.Refusal.TOO_MANY_ROWS)
        several = frame.expert == wire.SEVERAL
        if not several and ExpertId(frame.layer, frame.expert) not in self._store.experts:
            raise _Refused(wire.Refusal.UNKNOWN_EXPERT)
        num_header_rows = self._header_rows if several else 0
        num_rows = num_header_rows + frame.rows
        reference = torch.zeros(1, dtype=torch.int64) if frame.kind == _REFERENCE else None
        if message.nbytes != (num_rows * self._row_bytes if reference is None else 8):
            raise _Refused(wire.Refusal.WRONG_LENGTH)
        try:
            buffer = self._buffer(num_rows)
        except RuntimeError as error:
            log.exception("no_buffer", rows=num_rows)
            raise _Refused(_refusal_for(error)) from error
        if reference is None:
            into = self._range(buffer, 0, num_rows)
        else:
            into = self._transport.wrap(reference)
        request = message.receive(into)
        now = time.perf_counter()
        return _Work(session, frame, buffer, num_header_rows, request, now, reference)

    def _refuse(self, frame: wire.Frame, reason: wire.Refusal) -> None:
        """Tell the gateway, where it is known; a stranger gets no answer."""
        self._refused[reason.name.lower()] += 1
        session = self._sessions.get(frame.session)
        log.warning(
            "dispatch_refused",
            reason=reason.name.lower(),
            gateway_id=session.gateway_id if session else None,
            **frame._asdict(),
        )
        if session is not None and frame.kind in (_DISPATCH, _REFERENCE):
            tag = wire.encode(
                wire.Kind.REFUSE,
                session.reply_session,
                frame.slot,
                frame.layer,
                frame.expert,
                reason,
            )
            self._dropping.append(session.endpoint.send(self._scratch, tag))

    def _listen(self, frame: wire.Frame, message: Message) -> bool:
        """Receive what a gateway says of its arenas; False where that is not what it is."""
        session = self._sessions.get(frame.session)
        if session is None or message.nbytes != ctypes.sizeof(native.LentArenas):
            return False
        lent = torch.empty(message.nbytes, dtype=torch.uint8)
        buffer = self._transport.wrap(lent)
        self._lending.append(_Lending(session, frame, lent, buffer, message.receive(buffer)))
        return True

    def _lent(self) -> bool:
        """Answer whether what was lent can be reached."""
        heard = [lending for lending in self._lending if lending.request.completed]
        self._lending = [lending for lending in self._lending if not lending.request.completed]
        for session, frame, lent, _, request in heard:
            if self._transport.failure(request) is not None or self._answering is None:
                continue
            reached = session.number in self._sessions and self._answering.borrow(
                session.number, lent.numpy().tobytes()
            )
            log.info("arenas_lent", gateway_id=session.gateway_id, reached=reached)
            tag = wire.encode(_ARENAS, session.reply_session, frame.slot, 0, 0, int(reached))
            self._dropping.append(session.endpoint.send(self._scratch, tag))
        return bool(heard)

    def _received(self) -> bool:
        """Queue the rows of every message that has come in since."""
        arrived = [work for work in self._receiving if work.request.completed]
        if arrived:
            self._receiving = [work for work in self._receiving if not work.request.completed]
            for work in arrived:
                self._queue(work)
        return bool(arrived)

    def _queue(self, work: _Work) -> None:
        """Hand a message's rows to the batcher."""
        work.received_s = time.perf_counter()
        if self._transport.failure(work.request) is not None:
            self._recycle(work.buffer)
            return
        if work.reference is not None and not self._fetch(work, work.reference):
            self._recycle(work.buffer)
            self._refuse(work.frame, wire.Refusal.MALFORMED)
            return
        if work.num_header_rows and self._start_several(work):
            return
        try:
            segments = self._segments(work)
        except _Refused as refused:
            self._recycle(work.buffer)
            self._refuse(work.frame, refused.reason)
            return
        work.waiting_segments = len(segments)
        for expert, segment in segments:
            self._batcher.put(expert, segment.part.num_rows, segment)

    def _fetch(self, work: _Work, reference: torch.Tensor) -> bool:
        """Have the device bring rows here that lie in an arena; False: they don't."""
        ahead = work.num_header_rows
        rows = self._range(work.buffer, 0, ahead + work.frame.rows)
        return self._answering is not None and self._answering.fetch(
            work.session.number, int(reference) - ahead, rows
        )

    def _start_several(self, work: _Work) -> bool:
        """Have the device compute a message of several experts by the counts that are there."""
        if work.session.num_experts != self._num_experts:
            return False
        layer, rows = work.frame.layer, work.frame.rows
        experts = self._store.experts
        part = Part(work.buffer.rows_RD, work.num_header_rows, rows)
        try:
            ticket = self._compute_on.start_several(experts, layer, part, self._num_experts)
        except RuntimeError:
            log.exception("experts_failed", layer=layer)
            return False
        if ticket is None:
            return False
        work.answers_RD = ticket.answers_RD
        work.waiting_segments = 1
        self._computing.append(_Batch(None, [_Segment(work, part)], ticket, experts))
        return True

    def _segments(self, work: _Work) -> list[tuple[ExpertId, _Segment]]:
        """Split a message by expert."""
        if work.session.num_experts != self._num_experts:
            raise _Refused(wire.Refusal.UNKNOWN_SESSION)
        frame, rows_RD = work.frame, work.buffer.rows_RD
        if frame.expert != wire.SEVERAL:
            part = Part(rows_RD, 0, frame.rows)
            return [(ExpertId(frame.layer, frame.expert), _Segment(work, part))]
        header = rows_RD[: work.num_header_rows].reshape(-1).view(torch.int32)
        counts = header[: self._num_experts].tolist()
        segments = []
        start = work.num_header_rows
        for expert, count in self._counted(frame, counts, self._store.experts):
            segments.append((expert, _Segment(work, Part(rows_RD, start, count))))
            start += count
        return segments

    def _counted(
        self, frame: wire.Frame, counts: list[int], here: Mapping[ExpertId, Expert]
    ) -> list[tuple[ExpertId, int]]:
        """The experts that a message's counts name, and the rows of each."""
        if min(counts) < 0 or sum(counts) != frame.rows:
            raise _Refused(wire.Refusal.BAD_COUNTS)
        named = [(ExpertId(frame.layer, index), n) for index, n in enumerate(counts) if n]
        if any(expert not in here for expert, _ in named):
            raise _Refused(wire.Refusal.UNKNOWN_EXPERT)
        return named

    def _compute(self) -> None:
        """Start to run one expert over its rows."""
        expert, segments = self._batcher.take()
        experts = self._store.experts
        mlp = experts.get(expert)
        if mlp is None:
            for segment in segments:
                self._finish(segment.work, wire.Refusal.UNKNOWN_EXPERT)
            return
        try:
            self._starting = True
            ticket = self._compute_on.start(mlp, [segment.part for segment in segments])
        except RuntimeError as error:
            # These rows can go elsewhere, the worker serves on.
            log.exception("expert_failed", expert=str(expert))
            for segment in segments:
                self._finish(segment.work, _refusal_for(error))
            return
        finally:
            self._starting = False
        self._computing.append(_Batch(expert, segments, ticket, experts))

    def _computed(self) -> bool:
        """Reply to every message that is complete."""
        moved = False
        while self._computing and self._computing[0].ticket.done:
            moved = True
            expert, segments, ticket, experts = self._computing.popleft()
            seconds, refusal = ticket.seconds, None
            self._longest_batch_s = max(self._longest_batch_s, seconds)
            named: list[tuple[ExpertId, int]] = []
            if expert is not None:
                named = [(expert, sum(segment.part.num_rows for segment in segments))]
            else:
                try:
                    named = self._counted(segments[0].work.frame, ticket.counts, experts)
                except _Refused as refused:
                    refusal = refused.reason
            for expert, num_rows in named:
                self._rows[expert] += num_rows
                self._compute_s[expert] += seconds / len(named)
            now = time.perf_counter()
            for segment in segments:
                segment.work.computed_s = now
                segment.work.device_s = seconds
                self._finish(segment.work, refusal)
        return moved

    def _finish(self, work: _Work, refusal: wire.Refusal | None) -> None:
        """One segment of a message is done; the last one sends the reply."""
        work.waiting_segments -= 1
        if refusal is not None and work.frame.rows:
            self._refuse(work.frame, refusal)
            work.frame = work.frame._replace(rows=0)
        if work.waiting_segments:
            return
        if not work.frame.rows or not work.session.endpoint.alive:
            self._recycle(work.buffer)
            return
        if work.answers_RD is None:
            rows = self._range(work.buffer, work.num_header_rows, work.frame.rows)
        else:
            rows = self._transport.wrap(work.answers_RD)
        if work.reference is None:
            self._reply(work, rows)
        elif self._answering is not None and self._answering.deliver(
            work.session.number, int(work.reference), rows
        ):
            self._delivering.append((work, self._compute_on.mark()))
        else:
            self._refuse(work.frame, wire.Refusal.MALFORMED)
            self._recycle(work.buffer)

    def _delivered(self) -> bool:
        """Say of what was answered in an arena that it is there."""
        moved = False
        while self._delivering and self._delivering[0][1].done:
            work, ticket = self._delivering.popleft()
            work.device_s += ticket.seconds
            self._reply(work, self._nothing)
            moved = True
        return moved

    def _reply(self, work: _Work, rows: Buffer) -> None:
        frame = work.frame
        tag = wire.encode(
            _REPLY,
            work.session.reply_session,
            frame.slot,
            frame.layer,
            frame.expert,
            frame.rows,
        )
        work.request = work.session.endpoint.send(rows, tag)
        if work.request.completed:
            self._done(work)
        else:
            self._sending.append(work)

    def _sent(self) -> bool:
        """Take back the buffers of replies that are out."""
        done = [work for work in self._sending if work.request.completed]
        if done:
            self._sending = [work for work in self._sending if not work.request.completed]
            for work in done:
                self._done(work)
        return bool(done)

    def _done(self, work: _Work) -> None:
        """A reply is out."""
        self._recycle(work.buffer)
        if self._on_served is not None:
            began_s = work.computed_s - work.device_s
            # Of what a device fetches, the end is not known: not before it computes.
            referred = work.reference is not None
            fetched_s = max(work.received_s, began_s) if referred else work.received_s
            self._on_served(
                Trail(
                    wire.encode(*work.frame),
                    work.found_s,
                    work.received_s,
                    (work.received_s, fetched_s),
                    (began_s, work.computed_s),
                    (work.computed_s, time.perf_counter()),
                )
            )

    def _buffer(self, num_rows: int) -> _RowBuffer:
        """A free buffer of the next power of two of rows, so that few sizes serve all."""
        capacity = 1 << (num_rows - 1).bit_length()
        if self._free[capacity]:
            return self._free[capacity].pop()
        shape = (capacity, self._hidden_size)
        buffer = _RowBuffer(torch.zeros(shape, dtype=self._dtype, device=self._device))
        if self._device.type == "cuda":
            # The transport writes into it on a stream of its own.
            torch.cuda.current_stream(self._device).synchronize()
        return buffer

    def _recycle(self, buffer: _RowBuffer) -> None:
        self._free[buffer.rows_RD.shape[0]].append(buffer)

    def _range(self, buffer: _RowBuffer, start: int, count: int) -> Buffer:
        wrapped = buffer.ranges.get((start, count))
        if wrapped is None:
            wrapped = self._transport.wrap(buffer.rows_RD[start : start + count])
            buffer.ranges[start, count] = wrapped
        return wrapped


def _refusal_for(error: RuntimeError) -> wire.Refusal:
    """By name: torch has a class for a device that is out of memory, and words for a host."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return wire.Refusal.OUT_OF_MEMORY
    return wire.Refusal.FAILED
