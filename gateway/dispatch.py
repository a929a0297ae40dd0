"""Dispatch and combine: rows out to experts, rows back, weighted and summed.

Legend: T tokens of a micro-batch, K experts a token, R = T x K routed rows, E experts of a
layer, D hidden size, F rows of a frame. Where experts are cut, K and E count slices.

Rows travel in *frames*: equal parts of one send arena and one reply arena. A message to a worker
is a run of rows inside a frame, and its reply lands in the same rows of the reply arena, so one
index says where every routed row went and where it comes back. A frame keeps its rows until they
are answered: sending them again, to another worker, is posting the same rows under another
header, once the transport has let go of the first attempt. Where that takes too long, because the
worker hangs or is slow, the rows move to a frame of their own and go from there; the frame that
they leave is not used again before the transport has let go of it, whenever that may be.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import structlog
import torch

from gateway.balance import Balancer
from gateway.layout import CpuLayout, IntArray, Layout, Sorted
from mesh import wire
from mesh.errors import ExpertUnavailable, MessageTruncated, TransportError
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from mesh.transport.base import Buffer, Endpoint, Request, RoundTrip, Transport
from protos import engine_pb2 as pb
from protos import inference_pb2

log = structlog.get_logger()

# A frame holds this many times the rows that a worker gets when routing is even, so that the
# usual step needs one message a worker; what is more uneven is split.
_UNEVENNESS = 4
_MIN_FRAME_ROWS = 64
_MAX_MICRO_BATCHES = 2
_SPARE_FRAMES = 8
"""For rows that are sent again before their first attempt has ended."""
_ASK_AGAIN_S = 1.0
"""How often to ask about a worker that stays late."""
_MAX_FAULTS = 3
"""Unusable answers in a row after which a worker gets no more rows for an expert."""
_LOOK_INTERVAL_S = 0.02
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
    late_s: float | None = None
    """When it was last asked about; None: it answers."""
    lost: str | None = None
    """Why it was given up."""

    def __post_init__(self) -> None:
        self.dispatch_bits = wire.encode(_DISPATCH, self.session, 0, 0, 0, 0)
        self.reply_bits = wire.encode(_REPLY, self.reply_session, 0, 0, 0, 0)

    def take_slot(self) -> int | None:
        """A slot that no outstanding dispatch has; None when all are taken."""
        if len(self.busy_slots) == wire.MAX_SLOTS:
            return None
        while self.next_slot in self.busy_slots:
            self.next_slot = (self.next_slot + 1) % wire.MAX_SLOTS
        self.busy_slots.add(self.next_slot)
        return self.next_slot


class _Run(NamedTuple):
    """Neighbouring rows of one expert in the arenas: ``num_rows`` from row ``start``."""

    expert: ExpertId
    start: int
    num_rows: int


@dataclass(eq=False, slots=True)
class _Message:
    """One dispatch on its way: the runs in it, where it went, and what is posted for it."""

    peer: _Peer
    runs: tuple[_Run, ...]
    slot: int
    sent: Request
    reply: Request
    sent_s: float
    refusal: str | None = None
    num_rows: int = field(init=False)
    """As it was sent; ``runs`` may have lost some to another message since."""

    def __post_init__(self) -> None:
        first, last = self.runs[0], self.runs[-1]
        self.num_rows = last.start + last.num_rows - first.start

    @property
    def ended(self) -> bool:
        """The transport is done with both buffers."""
        return self.reply.completed and self.sent.completed


@dataclass(eq=False)
class _Abandoned:
    """A dispatch that nobody waits for any more. It holds its frame until it has ended."""

    message: _Message
    frame: int | None
    """None: of arenas that were replaced since."""
    arenas: tuple[torch.Tensor, torch.Tensor]
    """What the transport may still read and write."""


class Pending:
    """The rows of one dispatch that are away; see :class:`gateway.model.batch.PendingExperts`."""

    def __init__(self, dispatcher: Dispatcher, micro_batch: int, weights_TK: torch.Tensor) -> None:
        self.dispatcher = dispatcher
        self.micro_batch = micro_batch
        self.weights_TK = weights_TK
        self.rows_TK = torch.empty(0, dtype=torch.int64)
        self.frames: list[int] = []
        self.messages: list[_Message] = []
        self.waiting_since_s = 0.0
        self.num_moves = 0
        self.failed_over = False

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
    together, ``spin_s`` how long to poll for replies before sleeping. Between steps nothing is
    away that anybody waits for.
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
        self._max_choices = max_tokens * config.experts_per_token
        self._row_bytes = config.hidden_size * dtype.itemsize
        self._hidden_size = config.hidden_size
        self._device = device
        self._dtype = dtype
        self._reply_timeout_s = reply_timeout_s
        self._spin_s = spin_s
        self._scratch = transport.wrap(torch.zeros(64, dtype=torch.uint8))
        self._peers: dict[str, _Peer] = {}
        self._routes: dict[ExpertId, list[_Peer]] = {}
        self._expected: set[ExpertId] = set()
        """Experts that are served, or may soon be."""
        self._outstanding: dict[tuple[int, int], _Message] = {}
        self._abandoned: list[_Abandoned] = []
        self._balancer = Balancer()
        self._faults: Counter[tuple[str, ExpertId]] = Counter()
        self._taken_off: dict[ExpertId, str] = {}
        self._lost: list[pb.PeerLost] = []
        self._ended_sessions: set[int] = set()
        self._late: list[pb.PeerLate] = []
        self._expert_faults: list[pb.ExpertFault] = []
        self._num_micro_batches = 1
        self._calls: Counter[int] = Counter()
        self._away: list[Pending] = []
        self._void: dict[tuple[int, int], ExpertUnavailable] = {}
        self.layout: Layout = CpuLayout()
        self.arena_version = 0
        """Counts the times that :attr:`arenas` or :attr:`layout` were replaced."""
        self._shards = 0
        self._frame_rows = self._num_frames = 0
        self._parked_frames: set[int] = set()
        self._num_moves = 0
        self._shards = 0
        self._cut(shards=1)
        self._allocate(num_peers=0, max_rows=wire.MAX_ROWS)
        self.on_late: Callable[[], None] = lambda: None
        """Called over and over while a step waits for rows that are late: a chance to pass on
        :meth:`late_peers` and to :meth:`drop`."""
        self.epoch = 0
        self.rows_by_expert: Counter[ExpertId] = Counter()
        self.refused = 0
        self.replayed_rows = 0
        self.failovers = 0
        self.expert_wait_s = 0.0
        self.pause_s = 0.0

    # Between steps.

    def set_routing(self, routing: pb.Routing) -> None:
        """Take over an epoch's peers and experts: connect what is new, close what is gone."""
        self._settle()
        named = {peer.worker_id: peer for peer in routing.peers}
        for worker_id, peer in list(self._peers.items()):
            now = named.get(worker_id)
            if now is None or now.reply_session != peer.reply_session:
                del self._peers[worker_id]
                peer.lost = "it left the plan"
                peer.endpoint.close()
        # A routing that was on its way when a peer was lost still names its session.
        self._ended_sessions &= {peer.reply_session for peer in routing.peers}
        for worker_id in named.keys() - self._peers.keys():
            new = named[worker_id]
            if new.reply_session in self._ended_sessions:
                continue
            try:
                endpoint = self._transport.connect(new.ucx_address)
            except TransportError as error:
                self._note_lost(worker_id, new.reply_session, str(error))
                continue
            self._peers[worker_id] = _Peer(worker_id, endpoint, new.session, new.reply_session)
        self._routes = {
            expert_from_proto(placed.expert): [
                self._peers[w] for w in placed.worker_ids if w in self._peers
            ]
            for placed in routing.experts
        }
        self._expected = set(self._routes) | set(map(expert_from_proto, routing.pending))
        self._balancer.keep_only(self._peers, self._routes)
        self._faults.clear()
        self._cut(max(1, routing.expert_shards))
        self._taken_off.clear()
        self._allocate(
            num_peers=len(self._peers),
            max_rows=min((peer.max_rows for peer in routing.peers), default=wire.MAX_ROWS),
        )
        self.epoch = routing.epoch

    def begin_step(self, num_micro_batches: int) -> None:
        """Forget what the last step left."""
        self._settle()
        self._num_micro_batches = num_micro_batches
        self._calls.clear()
        self._void.clear()

    def _settle(self) -> None:
        """Take back the rows that a step left away which failed, and what else has ended."""
        for pending in self._away:
            while pending.messages:
                self._wait_once(pending)
            self._release(pending)
        self._away.clear()
        if self._abandoned:
            self._reap()

    def void_rows(self) -> dict[tuple[int, int], ExpertUnavailable]:
        """(micro-batch, row of its T) that some expert did not answer in this step, and why."""
        return self._void

    def lost_peers(self) -> list[pb.PeerLost]:
        """Workers lost since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def late_peers(self) -> list[pb.PeerLate]:
        """Workers to ask about since the last call."""
        late, self._late = self._late, []
        return late

    def expert_faults(self) -> list[pb.ExpertFault]:
        """Experts that workers were taken off since the last call, for what they answered."""
        faults, self._expert_faults = self._expert_faults, []
        return faults

    def drop(self, order: pb.DropPeer) -> None:
        """Do without a worker from now on, unless it was connected anew. Also amid a step."""
        peer = self._peers.get(order.worker_id)
        if peer is not None and peer.reply_session == order.reply_session:
            self._lose(peer, order.reason)

    def paces(self) -> list[inference_pb2.WorkerPace]:
        """How fast each connected worker is, where that is known."""
        paces = []
        for worker_id in sorted(self._peers):
            one_s, two_s = (self._balancer.expected_s(worker_id, rows) for rows in (1, 2))
            if one_s is not None and two_s is not None:
                paces.append(
                    inference_pb2.WorkerPace(
                        worker_id=worker_id, dispatch_s=one_s, row_s=two_s - one_s
                    )
                )
        return paces

    def poll(self) -> bool:
        """Progress without waiting; True while there may be more to do at once."""
        moved = bool(self._transport.progress())
        self._drain_unexpected()
        if self._abandoned:
            self._reap()
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
        ids_TK, weights_TK = self._units(ids_TK, weights_TK)
        laid = self.layout.sort(micro_batch, ids_TK, self._num_units)
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
                    self._give_up(pending, run, self._why_unserved(run.expert))
        return pending

    def _micro_batch(self, layer: int) -> int:
        return self._calls[layer] % self._num_micro_batches

    def combine(self, pending: Pending) -> torch.Tensor:
        """Wait until every row of ``pending`` is back or void, then sum; frees its frames."""
        self.wait(pending)
        return self.layout.combine(self._reply_RD, pending.rows_TK, pending.weights_TK)

    def wait(self, pending: Pending) -> None:
        """Until every row of ``pending`` is back or void; frees its frames."""
        started = pending.waiting_since_s = time.monotonic()
        while pending.messages:
            self._wait_once(pending)
        waited_s = time.monotonic() - started
        self.expert_wait_s += waited_s
        if pending.failed_over:
            self.pause_s += waited_s
        self._release(pending)
        self._away.remove(pending)

    def _group_by_worker(
        self, layer: int, counts_E: list[int]
    ) -> list[tuple[_Peer | None, list[tuple[ExpertId, int]]]]:
        """What each worker gets: experts and rows, ascending. None gets what nobody serves."""
        groups: dict[_Peer | None, list[tuple[ExpertId, int]]] = {}
        shared: list[tuple[int, ExpertId, Sequence[_Peer]]] = []
        for index, count in enumerate(counts_E):
            if count:
                expert = ExpertId(layer, index)
                self.rows_by_expert[expert] += count
                replicas = self._replicas(expert)
                if len(replicas) > 1:
                    shared.append((count, expert, replicas))
                else:
                    peer = replicas[0] if replicas else None
                    groups.setdefault(peer, []).append((expert, count))
        if shared:
            self._spread(shared, groups)
        return list(groups.items())

    def _spread(
        self,
        shared: list[tuple[int, ExpertId, Sequence[_Peer]]],
        groups: dict[_Peer | None, list[tuple[ExpertId, int]]],
    ) -> None:
        """Add the experts that have replicas to ``groups``, the largest first."""
        busy_s: dict[str, float] = {}

        def give(peer: _Peer, count: int) -> None:
            more_s = self._balancer.guess_s(peer.worker_id, count)
            busy_s[peer.worker_id] = busy_s.get(peer.worker_id, 0.0) + more_s

        for peer, experts in groups.items():
            if peer is not None:
                give(peer, sum(count for _, count in experts))
        for count, expert, replicas in sorted(shared, key=lambda s: s[0], reverse=True):
            by_id = {peer.worker_id: peer for peer in replicas}
            for worker_id, part in self._balancer.share(expert, count, [*by_id], busy_s).items():
                give(by_id[worker_id], part)
                groups.setdefault(by_id[worker_id], []).append((expert, part))
        for experts in groups.values():
            experts.sort()

    def _replicas(self, expert: ExpertId, besides: _Peer | None = None) -> Sequence[_Peer]:
        """The workers that an expert's rows may go to: those that are late only for want of
        others."""
        routes = self._routes.get(expert, ())
        if len(routes) == 1:
            return routes if routes[0].endpoint.alive and routes[0] is not besides else ()
        alive = [peer for peer in routes if peer.endpoint.alive and peer is not besides]
        return [peer for peer in alive if peer.late_s is None] or alive

    def _best_replica(
        self, expert: ExpertId, num_rows: int, besides: _Peer | None = None
    ) -> _Peer | None:
        """Who should answer soonest."""
        return min(
            self._replicas(expert, besides),
            key=lambda peer: self._balancer.guess_s(peer.worker_id, num_rows),
            default=None,
        )

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
        counts_E = np.zeros(self._num_units, dtype=np.int32)
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
            (layer, expert), first, num_rows = runs[0]
            header = 0
            if len(runs) > 1:
                num_rows = runs[-1].start + runs[-1].num_rows - first
                expert, header = wire.SEVERAL, self._header_rows
            rest = wire.encode(0, 0, slot, layer, expert, num_rows)
            trips.append(
                RoundTrip(
                    peer.endpoint,
                    self._wrap(self._sends, self._send_RD, first - header, num_rows + header),
                    peer.dispatch_bits | rest,
                    self._wrap(self._replies, self._reply_RD, first, num_rows),
                    peer.reply_bits | rest,
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
        self._hurry(pending)

    def _end(self, pending: Pending, message: _Message) -> None:
        """Close one dispatch; where it failed, send its rows to whoever else serves them."""
        reason = self._close_dispatch(message)
        if reason is None:
            return
        pending.failed_over = True
        self.failovers += 1
        peer = message.peer
        # A message of several does not say whose rows were at fault: each goes again alone.
        besides = None if len(message.runs) > 1 else peer
        for run in message.runs:
            if besides is None and peer in self._replicas(run.expert):
                other: _Peer | None = peer
            else:
                other = self._best_replica(run.expert, run.num_rows, besides)
            if other is None:
                self._give_up(pending, run, f"worker {peer.worker_id}: {reason}")
            else:
                self.replayed_rows += run.num_rows
                self._post(pending, [(other, (run,))])

    def _close_dispatch(self, message: _Message) -> str | None:
        """Take note of a dispatch that has ended; in words why it failed, if it did."""
        peer = message.peer
        peer.busy_slots.discard(message.slot)
        del self._outstanding[peer.reply_session, message.slot]
        if message.refusal is not None:
            if peer.late_s is not None:
                self._note_answer(peer)
            return message.refusal
        failure = self._transport.failure(message.reply)
        if failure is None:
            ended_s = message.reply.ended_s
            seconds = ended_s - message.sent_s
            self._balancer.observe(peer.worker_id, message.num_rows, seconds, ended_s)
            if peer.late_s is not None:
                self._note_answer(peer)
            if self._faults:
                for run in message.runs:
                    self._faults.pop((peer.worker_id, run.expert), None)
            return None
        if isinstance(failure, MessageTruncated):
            reason = f"its answer has another length: {failure}"
            self._note_fault(message, reason)
            return reason
        self._lose(peer, str(failure))
        return peer.lost

    # What is late.

    def _hurry(self, pending: Pending) -> None:
        """Do something about the dispatches that take far longer than usual."""
        now = time.monotonic()
        any_late = False
        for message in tuple(pending.messages):
            if message not in pending.messages:
                continue  # it ended while another one was posted
            peer = message.peer
            # What the gateway did before it began to wait is not the worker's time.
            waited_s = now - max(message.sent_s, pending.waiting_since_s)
            if now - message.sent_s > self._reply_timeout_s:
                self._lose(peer, f"no reply within {self._reply_timeout_s:g} s")
            elif waited_s > self._balancer.patience_s(peer.worker_id, message.num_rows):
                any_late = True
                self._doubt(peer, message, now)
                self._move(pending, message)
        if self._abandoned:
            self._reap()
        if any_late:
            self.on_late()

    def _doubt(self, peer: _Peer, message: _Message, now: float) -> None:
        """Have it asked whether the worker lives; until it answers, others are preferred."""
        if peer.late_s is not None and now - peer.late_s < _ASK_AGAIN_S:
            return
        reason = f"no reply to {message.num_rows} rows within {now - message.sent_s:.2f} s"
        if peer.late_s is None:
            log.warning("worker_late", worker_id=peer.worker_id, reason=reason)
        peer.late_s = now
        self._late.append(
            pb.PeerLate(worker_id=peer.worker_id, reply_session=peer.reply_session, reason=reason)
        )

    def _note_answer(self, peer: _Peer) -> None:
        peer.late_s = None
        log.info("worker_answers_again", worker_id=peer.worker_id)

    def _move(self, pending: Pending, message: _Message) -> None:
        """Send late rows again, each run to a worker that is not late itself, if there is one.

        They go from a frame of their own. Where none of its rows are left with it, the first
        attempt is abandoned.
        """
        moves = [
            (run, other)
            for run in message.runs
            if (other := self._best_replica(run.expert, run.num_rows, message.peer)) is not None
            and other.late_s is None
        ]
        if not moves or self._num_moves + len(self._abandoned) >= _SPARE_FRAMES:
            return
        old = message.runs[0].start // self._frame_rows
        new = self._free_frames.pop()
        pending.frames.append(new)
        pending.num_moves += 1
        self._num_moves += 1
        shift = (new - old) * self._frame_rows
        gone = {run for run, _ in moves}
        message.runs = tuple(run for run in message.runs if run not in gone)
        if not message.runs:
            pending.messages.remove(message)
            self._abandoned.append(_Abandoned(message, old, (self._send_RD, self._reply_RD)))
        for run, _ in moves:
            rows = slice(run.start, run.start + run.num_rows)
            to = slice(rows.start + shift, rows.stop + shift)
            self._send_RD[to] = self._send_RD[rows]
            in_run_TK = (pending.rows_TK >= rows.start) & (pending.rows_TK < rows.stop)
            pending.rows_TK.add_(in_run_TK * shift)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        pending.failed_over = True
        self.failovers += 1
        self.replayed_rows += sum(run.num_rows for run, _ in moves)
        self._post(
            pending,
            [(other, (_Run(run.expert, run.start + shift, run.num_rows),)) for run, other in moves],
        )

    def _reap(self) -> None:
        """Take back what abandoned dispatches held, of those that have ended."""
        overdue_s = time.monotonic() - self._reply_timeout_s
        left = []
        for abandoned in self._abandoned:
            message = abandoned.message
            if message.ended:
                reason = self._close_dispatch(message)
                log.info(
                    "late_reply_dropped" if reason is None else "late_dispatch_failed",
                    worker_id=message.peer.worker_id,
                    after_s=round(time.monotonic() - message.sent_s, 3),
                    reason=reason,
                )
            else:
                left.append(abandoned)
                if message.sent_s < overdue_s:
                    self._lose(message.peer, f"no reply within {self._reply_timeout_s:g} s")
        self._abandoned = left
        free = self._parked_frames - {abandoned.frame for abandoned in left}
        self._parked_frames -= free
        self._free_frames.extend(free)

    def _release(self, pending: Pending) -> None:
        """Free the frames of a dispatch that is over, but for those that others still hold."""
        held = {abandoned.frame for abandoned in self._abandoned}
        self._free_frames.extend(frame for frame in pending.frames if frame not in held)
        self._parked_frames.update(frame for frame in pending.frames if frame in held)
        self._num_moves -= pending.num_moves

    # What cannot be used.

    def _give_up(self, pending: Pending, run: _Run, reason: str) -> None:
        """Void the tokens that have a row in ``run``."""
        self._reply_RD[run.start : run.start + run.num_rows] = 0
        index, part = divmod(run.expert.index, self._shards)
        if self._shards > 1:
            reason = f"slice {part} of {self._shards}: {reason}"
        error = ExpertUnavailable(
            run.expert.layer, index, reason, coming=run.expert in self._expected
        )
        in_run_TK = (pending.rows_TK >= run.start) & (pending.rows_TK < run.start + run.num_rows)
        for token in in_run_TK.any(dim=1).nonzero().view(-1).tolist():
            self._void.setdefault((pending.micro_batch, token), error)

    def _lose(self, peer: _Peer, reason: str) -> None:
        """Route nothing more to a peer; closing its endpoint ends what is posted on it."""
        if self._peers.get(peer.worker_id) is peer:
            log.warning("worker_lost", worker_id=peer.worker_id, reason=reason)
            del self._peers[peer.worker_id]
            peer.lost = reason
            self._ended_sessions.add(peer.reply_session)
            self._note_lost(peer.worker_id, peer.reply_session, reason)
            peer.endpoint.close()

    def _note_lost(self, worker_id: str, reply_session: int, reason: str) -> None:
        self._lost.append(
            pb.PeerLost(worker_id=worker_id, reply_session=reply_session, reason=reason)
        )

    def _drain_unexpected(self) -> None:
        """Act on refusals and wrong answers; drop late replies and whatever strangers send."""
        while (unexpected := self._transport.probe()) is not None:
            unexpected.receive(self._scratch)
            frame = wire.decode(unexpected.tag)
            message = self._outstanding.get((frame.session, frame.slot))
            if message is None or message.refusal is not None:
                log.debug("message_dropped", **frame._asdict())
            elif frame.kind == wire.Kind.REFUSE:
                self._refused(message, frame.rows)
            elif frame.kind == wire.Kind.REPLY and not message.reply.completed:
                self._misanswered(message, frame)
            else:
                log.debug("message_dropped", **frame._asdict())

    def _refused(self, message: _Message, code: int) -> None:
        """Take the posted receive back, and the worker off what it does not serve."""
        known = code in wire.Refusal.__members__.values()
        reason = wire.Refusal(code).name.lower() if known else f"refusal {code}"
        peer = message.peer
        log.warning("dispatch_refused", worker_id=peer.worker_id, reason=reason)
        self.refused += 1
        message.refusal = f"refused the rows: {reason}"
        if code == wire.Refusal.UNKNOWN_SESSION:
            self._lose(peer, "it does not know our session")
        elif code == wire.Refusal.DRAINING:
            for expert in self._routes:
                self._take_off(peer, expert, message.refusal)
        elif code == wire.Refusal.UNKNOWN_EXPERT and len(message.runs) == 1:
            self._take_off(peer, message.runs[0].expert, message.refusal)
        else:
            self._note_fault(message, message.refusal)
        self._transport.cancel(message.reply)

    def _misanswered(self, message: _Message, frame: wire.Frame) -> None:
        """Take the posted receive back: its answer came, under a header that does not fit."""
        message.refusal = (
            f"answered for {frame.rows} rows of {frame.layer}.{frame.expert} where it was sent "
            f"{message.num_rows} of {', '.join(str(run.expert) for run in message.runs)}"
        )
        log.warning("wrong_answer", worker_id=message.peer.worker_id, reason=message.refusal)
        self._note_fault(message, message.refusal)
        self._transport.cancel(message.reply)

    def _note_fault(self, message: _Message, reason: str) -> None:
        """Count an answer that cannot be used; after some in a row, ask this worker no more."""
        if len(message.runs) != 1:
            return  # nobody knows whose fault it was: each expert is asked again alone
        peer, expert = message.peer, message.runs[0].expert
        self._faults[peer.worker_id, expert] += 1
        if self._faults[peer.worker_id, expert] < _MAX_FAULTS:
            return
        log.error("expert_faulty", worker_id=peer.worker_id, expert=str(expert), reason=reason)
        self._take_off(peer, expert, reason)
        if not self._routes[expert]:
            self._expected.discard(expert)
        self._expert_faults.append(
            pb.ExpertFault(worker_id=peer.worker_id, expert=expert_to_proto(expert), reason=reason)
        )

    def _take_off(self, peer: _Peer, expert: ExpertId, reason: str) -> None:
        """Send a worker no more rows for an expert before the next plan."""
        if peer in self._routes[expert]:
            self._routes[expert] = [p for p in self._routes[expert] if p is not peer]
            self._taken_off[expert] = f"worker {peer.worker_id}: {reason}"

    def _why_unserved(self, expert: ExpertId) -> str:
        lost = [f"worker {p.worker_id}: {p.lost}" for p in self._routes.get(expert, ()) if p.lost]
        unserved = "no worker of the plan serves it"
        return "; ".join(lost) or self._taken_off.get(expert, unserved)

    # Frames.

    def _cut(self, shards: int) -> None:
        """Count in slices from here on, ``shards`` to an expert: all that was experts is units."""
        if shards == self._shards:
            return
        self._shards = shards
        self._num_units = self._num_experts * shards
        self._max_routed_rows = self._max_choices * shards
        self._header_rows = -(-self._num_units * 4 // self._row_bytes)
        if self._device.type == "cuda":
            from gateway.gpu_layout import GpuLayout

            self.layout = GpuLayout(self._max_routed_rows, self._device)
            self.arena_version += 1

    def _units(
        self, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a token goes to, with K as many times more: an expert is the sum of its slices."""
        if self._shards == 1:
            return expert_ids_TK, weights_TK
        slices = torch.arange(self._shards, device=expert_ids_TK.device)
        units_TKS = expert_ids_TK.unsqueeze(-1) * self._shards + slices
        return units_TKS.flatten(1), weights_TK.repeat_interleave(self._shards, dim=1)

    def _allocate(self, num_peers: int, max_rows: int) -> None:
        """Arenas for the worst step, anew only when that has grown.

        Whatever the routing, a micro-batch fills frames but for the last of each worker, so
        its full frames and one more a worker (and one for what nobody serves) are enough, and
        some to spare for rows that move.
        """
        even_rows = _UNEVENNESS * self._max_routed_rows // max(1, num_peers)
        frame_rows = min(self._max_routed_rows, max(even_rows, _MIN_FRAME_ROWS), max_rows)
        frame_rows += self._header_rows
        full_frames = -(-self._max_routed_rows // (frame_rows - self._header_rows))
        num_frames = full_frames + _MAX_MICRO_BATCHES * (num_peers + 1) + _SPARE_FRAMES
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
        self._parked_frames.clear()
        for abandoned in self._abandoned:
            abandoned.frame = None
        self._sends: dict[tuple[int, int], Buffer] = {}
        self._replies: dict[tuple[int, int], Buffer] = {}

    def _wrap(
        self,
        wrapped: dict[tuple[int, int], Buffer],
        arena_RD: torch.Tensor,
        start: int,
        num_rows: int,
    ) -> Buffer:
        buffer = wrapped.get((start, num_rows))
        if buffer is None:
            buffer = self._transport.wrap(arena_RD[start : start + num_rows])
            wrapped[start, num_rows] = buffer
        return buffer


def _rows_in_order(messages: list[tuple[_Peer | None, tuple[_Run, ...]]]) -> IntArray:
    """The arena row of every routed row in order of expert: those of one fill its runs."""
    runs = sorted((run for _, runs in messages for run in runs), key=lambda run: run.expert)
    return np.concatenate([np.arange(run.start, run.start + run.num_rows) for run in runs])
