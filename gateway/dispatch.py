"""Dispatch and combine: rows out to experts, rows back, weighted and summed.

Legend: T tokens of a micro-batch, K experts a token, R = T x K routed rows, E experts of a
layer, D hidden size, F rows of a frame.

Rows travel in *frames*: equal parts of one send arena and one reply arena. A message to a worker
is a run of rows inside a frame, and its reply lands in the same rows of the reply arena, so one
index says where every routed row went and where it comes back. A frame keeps its rows until they
are answered: sending them again, to another worker, is posting the same rows under another
header, once the transport has let go of the first attempt.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import structlog
import torch

from gateway.layout import CpuLayout, IntArray, Layout, Sorted
from mesh import wire
from mesh.errors import ExpertUnavailable, TransportError
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_from_proto
from mesh.transport.base import Buffer, Endpoint, Request, RoundTrip, Transport
from protos import engine_pb2 as pb

log = structlog.get_logger()

# A frame holds this many times the rows that a worker gets when routing is even, so that the
# usual step needs one message a worker; what is more uneven is split.
_UNEVENNESS = 4
_MIN_FRAME_ROWS = 64
_MAX_MICRO_BATCHES = 2
_LOOK_INTERVAL_S = 0.05
"""How often to look for what is overdue while replies are awaited."""
# Plain integers: an enum's member costs a microsecond to look up, on every message.
_DISPATCH = int(wire.Kind.DISPATCH)
_REPLY = int(wire.Kind.REPLY)


@dataclass(eq=False)
class _Peer:
    """A connected worker."""

    worker_id: str
    endpoint: Endpoint
    session: int
    reply_session: int
    busy_slots: set[int] = field(default_factory=set)
    next_slot: int = 0

    def take_slot(self) -> int | None:
        """A slot that no outstanding dispatch has; None when all are taken."""
        if len(self.busy_slots) == wire.MAX_SLOTS:
            return None
        while self.next_slot in self.busy_slots:
            self.next_slot = (self.next_slot + 1) % wire.MAX_SLOTS
        self.busy_slots.add(self.next_slot)
        return self.next_slot


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows of one expert in the arenas: ``num_rows`` from row ``start``."""

    expert: ExpertId
    start: int
    num_rows: int


@dataclass(eq=False)
class _Message:
    """One dispatch on its way: the runs in it, where it went, and what is posted for it."""

    peer: _Peer
    runs: tuple[_Run, ...]
    slot: int
    sent: Request
    reply: Request
    sent_s: float
    refusal: str | None = None

    @property
    def ended(self) -> bool:
        """The transport is done with both buffers."""
        return self.reply.completed and self.sent.completed


class Pending:
    """The rows of one dispatch that are away; see :class:`gateway.model.batch.PendingExperts`."""

    def __init__(self, dispatcher: Dispatcher, micro_batch: int, weights_TK: torch.Tensor) -> None:
        self.dispatcher = dispatcher
        self.micro_batch = micro_batch
        self.weights_TK = weights_TK
        self.rows_TK = torch.empty(0, dtype=torch.int64)
        self.frames: list[int] = []
        self.messages: list[_Message] = []

    def combine(self) -> torch.Tensor:
        """Wait for the replies; the weighted sum over K, in float32, as y_TD."""
        return self.dispatcher.combine(self)


@dataclass(frozen=True)
class Prepared:
    """Rows that are in order of expert, on their way to :meth:`Dispatcher.send`."""

    micro_batch: int
    laid: Sorted
    weights_TK: torch.Tensor


class Dispatcher:
    """The routed experts of every layer; see :class:`gateway.model.batch.Experts`.

    One thread owns it. ``max_tokens`` is the most tokens that the micro-batches of a step have
    together, ``spin_s`` how long to poll for replies before sleeping. Nothing is in flight
    between steps.
    """

    def __init__(
        self,
        transport: Transport,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
        reply_timeout_s: float,
        spin_s: float = 0.0,
    ) -> None:
        self._transport = transport
        self._num_experts = config.num_experts
        self._hidden_size = config.hidden_size
        self._device = device
        self._dtype = dtype
        self._max_routed_rows = max_tokens * config.experts_per_token
        self._header_rows = -(-config.num_experts * 4 // (config.hidden_size * dtype.itemsize))
        self._reply_timeout_s = reply_timeout_s
        self._spin_s = spin_s
        self._scratch = transport.wrap(torch.zeros(64, dtype=torch.uint8))
        self._peers: dict[str, _Peer] = {}
        self._routes: dict[ExpertId, list[_Peer]] = {}
        self._outstanding: dict[tuple[int, int], _Message] = {}
        self._lost: list[tuple[str, str]] = []
        self._num_micro_batches = 1
        self._calls: Counter[int] = Counter()
        self._away: list[Pending] = []
        self._void: dict[tuple[int, int], ExpertUnavailable] = {}
        self.layout: Layout = CpuLayout()
        if device.type == "cuda":
            from gateway.gpu_layout import GpuLayout

            self.layout = GpuLayout(self._max_routed_rows, device)
        self.arena_version = 0
        """Counts the times that :attr:`arenas` were replaced."""
        self._frame_rows = self._num_frames = 0
        self._allocate(num_peers=0, max_rows=wire.MAX_ROWS)
        self.epoch = 0
        self.rows_by_expert: Counter[ExpertId] = Counter()
        self.refused = 0
        self.replayed_rows = 0
        self.expert_wait_s = 0.0

    # Between steps.

    def set_routing(self, routing: pb.Routing) -> None:
        """Take over an epoch's peers and experts: connect what is new, close what is gone."""
        named = {peer.worker_id: peer for peer in routing.peers}
        for worker_id, peer in list(self._peers.items()):
            if worker_id not in named or named[worker_id].session != peer.session:
                del self._peers[worker_id]
                peer.endpoint.close()
        for worker_id in named.keys() - self._peers.keys():
            new = named[worker_id]
            try:
                endpoint = self._transport.connect(new.ucx_address)
            except TransportError as error:
                self._lost.append((worker_id, str(error)))
                continue
            self._peers[worker_id] = _Peer(worker_id, endpoint, new.session, new.reply_session)
        self._routes = {
            expert_from_proto(placed.expert): [
                self._peers[w] for w in placed.worker_ids if w in self._peers
            ]
            for placed in routing.experts
        }
        self._allocate(
            num_peers=len(self._peers),
            max_rows=min((peer.max_rows for peer in routing.peers), default=wire.MAX_ROWS),
        )
        self.epoch = routing.epoch

    def begin_step(self, num_micro_batches: int) -> None:
        """Forget what the last step left; one that failed may have left rows away."""
        for pending in self._away:
            while pending.messages:
                self._wait_once(pending)
            self._free_frames.extend(pending.frames)
        self._away.clear()
        self._num_micro_batches = num_micro_batches
        self._calls.clear()
        self._void.clear()

    def void_rows(self) -> dict[tuple[int, int], ExpertUnavailable]:
        """(micro-batch, row of its T) that some expert did not answer in this step, and why."""
        return self._void

    def lost_peers(self) -> list[tuple[str, str]]:
        """Workers lost since the last call, each with the reason."""
        lost, self._lost = self._lost, []
        return lost

    def poll(self) -> bool:
        """Progress without waiting; True while there may be more to do at once."""
        moved = bool(self._transport.progress())
        self._drain_unexpected()
        for peer in list(self._peers.values()):
            if not peer.endpoint.alive:
                self._lose(peer, "its endpoint was reported dead")
        return moved

    def close(self) -> None:
        """End every endpoint."""
        for peer in self._peers.values():
            peer.endpoint.close()
        self._peers.clear()
        self._routes.clear()
        self._transport.progress()

    # In a step.

    @property
    def arenas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows leave from and come back to."""
        return self._send_RD, self._reply_RD

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Pending:
        """See :class:`gateway.model.batch.Experts`."""
        return self.send(layer, x_TD, self.prepare(self._micro_batch(layer), ids_TK, weights_TK))

    def prepare(self, micro_batch: int, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> Prepared:
        """The part of a dispatch that the device does for itself: a graph may hold it."""
        laid = self.layout.sort(micro_batch, ids_TK, self._num_experts)
        return Prepared(micro_batch, laid, weights_TK)

    def send(self, layer: int, x_TD: torch.Tensor, prepared: Prepared) -> Pending:
        """The part for which the host must know what goes where."""
        pending = Pending(self, prepared.micro_batch, prepared.weights_TK)
        self._calls[layer] += 1
        self._away.append(pending)
        counts_E = prepared.laid.counts()
        messages = [
            (peer, runs)
            for peer, counts in self._group_by_worker(layer, counts_E)
            for runs in self._place(pending, counts)
        ]
        headers: dict[int, IntArray] = {
            runs[0].start - self._header_rows: self._counts_of(runs)
            for _, runs in messages
            if len(runs) > 1
        }
        pending.rows_TK = prepared.laid.scatter(
            x_TD, _rows_in_order(messages), headers, self._send_RD
        )
        self._post(pending, [(peer, runs) for peer, runs in messages if peer is not None])
        for peer, runs in messages:
            if peer is None:
                for run in runs:
                    self._give_up(pending, run, "no worker of the plan serves it")
        return pending

    def _micro_batch(self, layer: int) -> int:
        return self._calls[layer] % self._num_micro_batches

    def combine(self, pending: Pending) -> torch.Tensor:
        """Wait until every row of ``pending`` is back or void, then sum; frees its frames."""
        self.wait(pending)
        return self.layout.combine(self._reply_RD, pending.rows_TK, pending.weights_TK)

    def wait(self, pending: Pending) -> None:
        """Until every row of ``pending`` is back or void; frees its frames."""
        started = time.perf_counter()
        while pending.messages:
            self._wait_once(pending)
        self.expert_wait_s += time.perf_counter() - started
        self._free_frames.extend(pending.frames)
        self._away.remove(pending)

    def _group_by_worker(
        self, layer: int, counts_E: list[int]
    ) -> list[tuple[_Peer | None, list[tuple[ExpertId, int]]]]:
        """What each worker gets: experts and rows, ascending. None gets what nobody serves."""
        groups: dict[_Peer | None, list[tuple[ExpertId, int]]] = {}
        for index, count in enumerate(counts_E):
            if count:
                expert = ExpertId(layer, index)
                groups.setdefault(self._route(expert), []).append((expert, count))
                self.rows_by_expert[expert] += count
        return list(groups.items())

    def _route(self, expert: ExpertId) -> _Peer | None:
        """The worker that an expert's rows go to."""
        for peer in self._routes.get(expert, ()):
            if peer.endpoint.alive:
                return peer
        return None

    def _place(
        self, pending: Pending, counts: list[tuple[ExpertId, int]]
    ) -> Iterable[tuple[_Run, ...]]:
        """Lay one worker's rows into frames; the runs of each frame are one message."""
        runs: list[_Run] = []
        start = stop = 0
        for expert, count in counts:
            while count:
                if start == stop:
                    if runs:
                        yield tuple(runs)
                        runs = []
                    frame = self._free_frames.pop()
                    pending.frames.append(frame)
                    start = frame * self._frame_rows + self._header_rows
                    stop = (frame + 1) * self._frame_rows
                taken = min(count, stop - start)
                runs.append(_Run(expert, start, taken))
                start += taken
                count -= taken
        yield tuple(runs)

    def _counts_of(self, runs: tuple[_Run, ...]) -> IntArray:
        """What a message for several experts says ahead of its rows."""
        counts_E = np.zeros(self._num_experts, dtype=np.int32)
        for run in runs:
            counts_E[run.expert.index] = run.num_rows
        return counts_E

    def _post(self, pending: Pending, messages: list[tuple[_Peer, tuple[_Run, ...]]]) -> None:
        """Post the receives of all replies, then the sends."""
        slots: list[int] = []
        trips: list[RoundTrip] = []
        for number, (peer, runs) in enumerate(messages):
            slot = peer.take_slot()
            if slot is None:
                # What has slots goes out first, so that some come back.
                self._launch(pending, messages[:number], slots, trips)
                self._wait_once(pending)
                self._post(pending, messages[number:])
                return
            slots.append(slot)
            first, num_rows = runs[0].start, runs[-1].start + runs[-1].num_rows - runs[0].start
            layer, expert = runs[0].expert
            header = 0
            if len(runs) > 1:
                expert, header = wire.SEVERAL, self._header_rows
            trips.append(
                RoundTrip(
                    peer.endpoint,
                    self._wrap(self._send_RD, first - header, num_rows + header),
                    wire.encode(_DISPATCH, peer.session, slot, layer, expert, num_rows),
                    self._wrap(self._reply_RD, first, num_rows),
                    wire.encode(_REPLY, peer.reply_session, slot, layer, expert, num_rows),
                )
            )
        self._launch(pending, messages, slots, trips)

    def _launch(
        self,
        pending: Pending,
        messages: list[tuple[_Peer, tuple[_Run, ...]]],
        slots: list[int],
        trips: list[RoundTrip],
    ) -> None:
        now_s = time.monotonic()
        posted = self._transport.exchange(trips)
        for (peer, runs), slot, (reply, sent) in zip(messages, slots, posted, strict=True):
            message = _Message(peer, runs, slot, sent, reply, now_s)
            self._outstanding[peer.reply_session, slot] = message
            pending.messages.append(message)

    def _wait_once(self, pending: Pending) -> None:
        """One turn of waiting for replies."""
        requests = [r for message in pending.messages for r in (message.reply, message.sent)]
        self._transport.wait(requests, spin_s=self._spin_s, timeout_s=_LOOK_INTERVAL_S)
        self._drain_unexpected()
        ended = [message for message in pending.messages if message.ended]
        if ended:
            pending.messages = [message for message in pending.messages if not message.ended]
            for message in ended:
                self._end(pending, message)
            return
        overdue_s = time.monotonic() - self._reply_timeout_s
        for message in pending.messages:
            if message.sent_s < overdue_s:
                self._lose(message.peer, f"no reply within {self._reply_timeout_s:g} s")

    def _end(self, pending: Pending, message: _Message) -> None:
        """Close one dispatch; where it failed, send its rows to whoever else serves them."""
        peer = message.peer
        peer.busy_slots.discard(message.slot)
        del self._outstanding[peer.reply_session, message.slot]
        reason = message.refusal
        if reason is None:
            failure = self._transport.failure(message.reply)
            if failure is None:
                return
            reason = str(failure)
            self._lose(peer, reason)
        for run in message.runs:
            other = self._route(run.expert)
            if other is None:
                self._give_up(pending, run, f"worker {peer.worker_id}: {reason}")
            else:
                self.replayed_rows += run.num_rows
                self._post(pending, [(other, (run,))])

    def _give_up(self, pending: Pending, run: _Run, reason: str) -> None:
        """Void the tokens that have a row in ``run``."""
        self._reply_RD[run.start : run.start + run.num_rows] = 0
        error = ExpertUnavailable(*run.expert, reason)
        in_run_TK = (pending.rows_TK >= run.start) & (pending.rows_TK < run.start + run.num_rows)
        for token in in_run_TK.any(dim=1).nonzero().view(-1).tolist():
            self._void.setdefault((pending.micro_batch, token), error)

    def _lose(self, peer: _Peer, reason: str) -> None:
        """Route nothing more to a peer; closing its endpoint ends what is posted on it."""
        if self._peers.get(peer.worker_id) is peer:
            log.warning("worker_lost", worker_id=peer.worker_id, reason=reason)
            del self._peers[peer.worker_id]
            self._lost.append((peer.worker_id, reason))
            peer.endpoint.close()

    def _drain_unexpected(self) -> None:
        """Act on refusals; drop late replies and whatever strangers send."""
        while (unexpected := self._transport.probe()) is not None:
            unexpected.receive(self._scratch)
            frame = wire.decode(unexpected.tag)
            message = self._outstanding.get((frame.session, frame.slot))
            if frame.kind != wire.Kind.REFUSE or message is None or message.refusal is not None:
                log.debug("message_dropped", **frame._asdict())
                continue
            self._refused(message, frame.rows)

    def _refused(self, message: _Message, code: int) -> None:
        """Take the posted receive back, and the worker off the expert that it refused.

        A message for several experts does not say which was at fault: its rows go again, to
        the same worker, expert by expert.
        """
        known = code in wire.Refusal.__members__.values()
        reason = wire.Refusal(code).name.lower() if known else f"refusal {code}"
        log.warning("dispatch_refused", worker_id=message.peer.worker_id, reason=reason)
        self.refused += 1
        message.refusal = f"refused the rows: {reason}"
        if code == wire.Refusal.UNKNOWN_SESSION:
            self._lose(message.peer, "it does not know our session")
        if len(message.runs) == 1:
            expert = message.runs[0].expert
            self._routes[expert] = [p for p in self._routes[expert] if p is not message.peer]
        self._transport.cancel(message.reply)

    # Frames.

    def _allocate(self, num_peers: int, max_rows: int) -> None:
        """Arenas for the worst step, anew only when that has grown.

        Whatever the routing, a micro-batch fills frames but for the last of each worker, so
        its full frames and one more a worker (and one for what nobody serves) are enough.
        """
        even_rows = _UNEVENNESS * self._max_routed_rows // max(1, num_peers)
        frame_rows = min(self._max_routed_rows, max(even_rows, _MIN_FRAME_ROWS), max_rows)
        frame_rows += self._header_rows
        full_frames = -(-self._max_routed_rows // (frame_rows - self._header_rows))
        num_frames = full_frames + _MAX_MICRO_BATCHES * (num_peers + 1)
        if (frame_rows, num_frames) == (self._frame_rows, self._num_frames):
            return
        self._frame_rows, self._num_frames = frame_rows, num_frames
        shape = (num_frames * frame_rows, self._hidden_size)
        self._send_RD = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._reply_RD = torch.zeros_like(self._send_RD)
        self.arena_version += 1
        if self._device.type == "cuda":
            # The transport writes into it on a stream of its own.
            torch.cuda.current_stream(self._device).synchronize()
        self._free_frames = list(range(num_frames))
        self._wrapped: dict[tuple[int, int, int], Buffer] = {}

    def _wrap(self, arena_RD: torch.Tensor, start: int, num_rows: int) -> Buffer:
        key = (arena_RD.data_ptr(), start, num_rows)
        wrapped = self._wrapped.get(key)
        if wrapped is None:
            wrapped = self._transport.wrap(arena_RD[start : start + num_rows])
            self._wrapped[key] = wrapped
        return wrapped


def _rows_in_order(messages: list[tuple[_Peer | None, tuple[_Run, ...]]]) -> IntArray:
    """The arena row of every routed row in order of expert: those of one fill its runs."""
    runs = sorted((run for _, runs in messages for run in runs), key=lambda run: run.expert)
    return np.concatenate([np.arange(run.start, run.start + run.num_rows) for run in runs])
