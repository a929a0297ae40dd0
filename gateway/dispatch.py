"""Dispatch and combine: rows out to experts, rows back, weighted and summed.

Legend: T tokens of a micro-batch, K experts a token, R = T x K routed rows, E experts of a
layer, D hidden size, F rows of a frame. Where experts are cut into n slices, E counts slices, and
rows are R = T x K x n: ``rows_TK`` has n columns for each choice of ``ids_TK`` and ``weights_TK``.

A frame (:mod:`gateway.frames`) keeps its rows until they are answered: sending them again, to
another worker, is posting the same rows under another header, once the transport has let go of
the first attempt. Where that takes too long, because the worker hangs or is slow, the rows move
to a frame of their own and go from there; the frame that they leave is not used again before the
transport has let go of it, whenever that may be.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import structlog
import torch

from gateway.asking import MAX_ROWS, Asks, Seat
from gateway.frames import Frames, Run
from gateway.layout import CpuLayout, IntArray, Layout
from gateway.lending import Lending
from gateway.peers import Peer, Peers
from mesh import wire
from mesh.errors import ExpertUnavailable, MessageTruncated, Unavailable
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId
from mesh.replay import ReplayDevice
from mesh.transport.base import Request, RoundTrip, Transport, why_stuck
from protos import engine_pb2 as pb
from protos import inference_pb2

log = structlog.get_logger()

_SPARE_FRAMES = 8
"""For rows that are sent again before their first attempt has ended."""
_ROWS_OF_NOBODY = 1024
"""Of a frame, where there is no worker to send it to."""
LONE_ROWS = 2048
"""Of one expert, from here on: one dense product is quicker than its part of a grouped one."""
_LOOK_INTERVAL_S = 0.02
"""How often to look for what is overdue while replies are awaited."""
STUCK_PATIENCE_S = 2.0
"""Who was only stopped amid a message to us may be back by then. If not, it costs a step."""
_LET_GO_S = 1.0
"""How long the transport may take to let go of what it does for a worker that is gone. It does so
at once, or never: the rest of a message that the worker had begun to send does not come."""
_STOPPED_S = 1.0
"""Who has not looked for so long was stopped, or busy: that time says nothing of the workers."""


@dataclass(eq=False, slots=True)
class _Message:
    """One dispatch on its way: the runs in it, where it went, and what is posted for it."""

    peer: Peer
    runs: tuple[Run, ...]
    slot: int
    sent: Request
    reply: Request
    sent_s: float
    refusal: str | None = None
    gone_s: float | None = None
    """When its worker was seen to be gone."""
    num_rows: int = field(init=False)
    """As it was sent; ``runs`` may have lost some to another message since."""

    def __post_init__(self) -> None:
        first, last = self.runs[0], self.runs[-1]
        self.num_rows = last.start + last.num_rows - first.start

    @property
    def experts(self) -> list[ExpertId]:
        """Of the rows that are still with it."""
        return [run.expert for run in self.runs]

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


class Graph(Protocol):
    """A captured graph; see :class:`torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...

    def raw_cuda_graph_exec(self) -> int: ...


@dataclass(eq=False)
class Placed:
    """The rows of one layer as a graph lays them out, whenever it is launched.

    Graphs know these tensors: they stay alive, and where they are, as long as this.
    """

    layer: int
    micro_batch: int
    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    rows_TK: torch.Tensor
    """Where each row comes back in the reply arena, once it has; -1 for none."""
    seat: Seat | None
    dispatcher: Dispatcher
    pending: Pending | None = None
    """Its rows that are away, where not by the seat."""

    def combine(self) -> torch.Tensor:
        """See :class:`Pending`."""
        self.dispatcher.come_back(self)
        reply_ND = self.dispatcher.arenas[1]
        return self.dispatcher.layout.combine(reply_ND, self.rows_TK, self.weights_TK)


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
        self._grouped = config.experts_grouped(dtype.itemsize)
        self._max_choices = max_tokens * config.experts_per_token
        self._row_bytes = config.hidden_size * dtype.itemsize
        self._device = device
        self._reply_timeout_s = reply_timeout_s
        self._spin_s = spin_s
        self._scratch = transport.wrap(torch.zeros(64, dtype=torch.uint8))
        self.peers = Peers(transport)
        self._frames = Frames(
            transport,
            hidden_size=config.hidden_size,
            dtype=dtype,
            device=device,
            num_spare=_SPARE_FRAMES,
        )
        self._outstanding: dict[tuple[int, int], _Message] = {}
        self._abandoned: list[_Abandoned] = []
        self._num_micro_batches = 1
        self._calls: Counter[int] = Counter()
        self._away: list[Pending] = []
        self._void: dict[tuple[int, int], ExpertUnavailable] = {}
        self.layout: Layout = CpuLayout()
        self.arena_version = 0
        """Counts the times that :attr:`arenas` or :attr:`layout` were replaced."""
        self._asks: Asks | None = None
        self._asked: dict[Placed, Seat] = {}
        """What is away by its seat."""
        self._lending: Lending | None = None
        self._num_moves = 0
        self._looked_s = self._awake_since_s = time.monotonic()
        self.shards = 0
        """Slices of an expert, which :attr:`rows_by_expert` counts."""
        self._rows_by_expert: Counter[ExpertId] = Counter()
        self._cut(shards=1)
        if device.type == "cuda":
            self._use_driver(device)
        self._allocate(max_rows=_ROWS_OF_NOBODY)
        self.on_away: Callable[[], None] = lambda: None
        """Called in every layer when rows have left and are about to be waited for: time for a
        little of what nobody waits for."""
        self.on_late: Callable[[], None] = lambda: None
        """Called over and over while a step waits for rows that are late: a chance to pass on
        whom the :attr:`peers` are late of, and to drop them."""
        self.epoch = 0
        self.refused = 0
        self.replayed_rows = 0
        self.failovers = 0
        self.expert_wait_s = 0.0
        self.pause_s = 0.0
        self._posted_s = 0.0

    # Between steps.

    def set_routing(self, routing: pb.Routing) -> None:
        """Take over an epoch's peers and experts: connect what is new, close what is gone."""
        self._settle()
        if self._asks is not None:
            self._asks.give_back()
        self.peers.follow(routing)
        self._cut(max(1, routing.expert_shards))
        self._allocate(
            max_rows=min((peer.max_rows for peer in routing.peers), default=_ROWS_OF_NOBODY)
        )
        if self._lending is not None:
            self._lending.lend(self.peers, self.arenas)
        self.epoch = routing.epoch

    def begin_step(self, num_micro_batches: int, *, away: bool = False) -> None:
        """Forget what the last step left; ``away``: but for rows of its own, which have left."""
        if not away:
            self._settle()
        elif self._abandoned:
            self._reap()
        self._num_micro_batches = num_micro_batches
        self._calls.clear()
        self._void.clear()

    def _settle(self) -> None:
        """Take back the rows that a step left away which failed, and what else has ended."""
        while self._asked:
            self._surrender(*self._asked.popitem())
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

    @property
    def address(self) -> bytes:
        """What workers reach this gateway by, until the transport is opened anew."""
        return self._transport.address

    def paces(self) -> list[inference_pb2.WorkerPace]:
        """How fast each connected worker is, where that is known."""
        return self.peers.paces()

    def poll(self) -> bool:
        """Progress without waiting; True while there may be more to do at once."""
        moved = bool(self._transport.progress())
        self._drain_unexpected()
        if self._abandoned:
            self._reap()
        self.peers.lose_dead()
        if not moved:
            self._heal([abandoned.message for abandoned in self._abandoned])
        return moved

    @property
    def rows_by_expert(self) -> Mapping[ExpertId, int]:
        """Rows that each expert was sent since the start."""
        if self._asks is not None:
            for expert, num_rows in self._asks.take_rows():
                self._rows_by_expert[expert] += num_rows
        return self._rows_by_expert

    @property
    def posted_s(self) -> float:
        """What it took, since the start, to post the messages of layers whose rows were laid out:
        receives and sends, to all their workers. What is sent again is not in it."""
        return self._posted_s + (0.0 if self._asks is None else self._asks.posted_s)

    def close(self) -> None:
        """End every endpoint."""
        self.peers.close()
        self._transport.progress()

    # In a step.

    @property
    def arenas(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where rows leave from and come back to."""
        return self._frames.send_RD, self._frames.reply_RD

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Pending | Placed:
        """See :class:`gateway.model.batch.Experts`."""
        micro_batch = self._micro_batch(layer)
        seat = self._seat(micro_batch, layer, ids_TK)
        if seat is None or not x_TD.is_cuda:
            return self._send(layer, micro_batch, x_TD, ids_TK, weights_TK)
        seat.asks.prepare(seat)
        placed = self.place(layer, micro_batch, x_TD.contiguous(), ids_TK, weights_TK)
        self._leave(placed, seat, [])
        return placed

    def _seat(self, micro_batch: int, layer: int, ids_TK: torch.Tensor) -> Seat | None:
        if self._asks is None:
            return None
        num_rows = ids_TK.numel() * self.shards
        return self._asks.seat(micro_batch, layer, self._num_units, num_rows)

    def _send(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> Pending:
        pending = Pending(self, micro_batch, weights_TK)
        self._calls[layer] += 1
        self._away.append(pending)
        laid = self.layout.sort(micro_batch, self._units(ids_TK), self._num_units)
        messages = [
            (peer, runs)
            for peer, counts in self.peers.group(layer, laid.counts()).items()
            for runs in self._place(pending, counts)
        ]
        headers: dict[int, IntArray] = {
            runs[0].start - self._frames.header_rows: self._counts_of(runs)
            for _, runs in messages
            if len(runs) > 1
        }
        pending.rows_TK = laid.scatter(
            x_TD, _rows_in_order(messages), headers, self._frames.send_RD
        )
        began_s = time.perf_counter()
        self._post(pending, [(peer, runs) for peer, runs in messages if peer is not None])
        self._posted_s += time.perf_counter() - began_s
        for peer, runs in messages:
            if peer is None:
                for run in runs:
                    self._give_up(pending, run, self.peers.why_unserved(run.expert))
        return pending

    def _micro_batch(self, layer: int) -> int:
        return self._calls[layer] % self._num_micro_batches

    def combine(self, pending: Pending) -> torch.Tensor:
        """Wait until every row of ``pending`` is back or void, then sum; frees its frames."""
        self.wait(pending)
        return self.layout.combine(self._frames.reply_RD, pending.rows_TK, pending.weights_TK)

    def wait(self, pending: Pending) -> None:
        """Until every row of ``pending`` is back or void; frees its frames."""
        self.on_away()
        started_s = time.monotonic()
        if not pending.waiting_since_s:
            pending.waiting_since_s = started_s
        while pending.messages:
            self._wait_once(pending)
        waited_s = time.monotonic() - started_s
        self.expert_wait_s += waited_s
        if pending.failed_over:
            self.pause_s += waited_s
        self._release(pending)
        self._away.remove(pending)

    # In a step, from a graph.

    def place(
        self,
        layer: int,
        micro_batch: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> Placed:
        """The part of a dispatch that the device does for itself. A graph can end with it; then
        it is to be called while that is captured, and once before."""
        seat = self._seat(micro_batch, layer, ids_TK)
        if seat is not None:
            ids_TK = ids_TK.contiguous()
            rows_TK = seat.place(x_TD, ids_TK, self.shards, self._frames.send_RD)
        else:
            rows_TK = ids_TK.new_full((len(ids_TK), ids_TK.shape[1] * self.shards), -1)
        return Placed(layer, micro_batch, x_TD, ids_TK, weights_TK, rows_TK, seat, self)

    def plan_of(self, placed: Placed) -> int:
        """By which a graph would place the rows now; 0 where they have no plan that is sure."""
        return 0 if placed.seat is None else placed.seat.asks.plan_of(placed.seat)

    def leave(self, placed: Placed, graph: Graph, launched_by: int = 0) -> None:
        """Launch the graph that places the rows, unless it was launched by the plan (see
        :meth:`plan_of`) that still holds, and send them."""
        seat = placed.seat
        if seat is None:
            graph.replay()
            self._send_placed(placed)
        else:
            seat.asks.prepare(seat)
            graphs = [] if launched_by == seat.num_plans else [graph.raw_cuda_graph_exec()]
            self._leave(placed, seat, graphs)

    def _leave(self, placed: Placed, seat: Seat, graphs: Sequence[int]) -> None:
        self._note_look()
        self._note_left(placed, seat, seat.asks.leave(seat, graphs))

    def _note_left(self, placed: Placed, seat: Seat, left: bool) -> None:
        if left:
            placed.pending = None  # of a step that broke off
            self._calls[placed.layer] += 1
            self._asked[placed] = seat
        else:
            self._transport.progress()  # an endpoint may have died
            self._send_placed(placed)

    def _send_placed(self, placed: Placed) -> None:
        """As if they had not been placed."""
        placed.pending = self._send(
            placed.layer, placed.micro_batch, placed.x_TD, placed.ids_TK, placed.weights_TK
        )

    def turn(self, back: Placed, placed: Placed | None, graph: Graph) -> None:
        """:meth:`come_back`, then :meth:`leave`, or no more than the launch: with nothing in
        between where that can be."""
        if self.turn_at_once(back, placed, graph):
            return
        self.come_back(back)
        if placed is None:
            graph.replay()
        else:
            self.leave(placed, graph)

    def turn_at_once(self, back: Placed, placed: Placed | None, *graphs: Graph) -> bool:
        """With nothing in between, :meth:`come_back`, and :meth:`leave` with graphs of which the
        last places the rows; False, with nothing launched, where that cannot be."""
        seat = placed.seat if placed is not None else None
        if back.pending is not None or (placed is not None and seat is None):
            return False
        self._note_look()
        if seat is not None:
            seat.asks.prepare(seat)
        handles = [graph.raw_cuda_graph_exec() for graph in graphs]
        came, left = self._wait_seat(self._asked[back], seat, handles)
        if came:
            del self._asked[back]
            if placed is not None and seat is not None:
                self._note_left(placed, seat, left)
        return came

    def is_away(self, placed: Placed) -> bool:
        """Whether its rows have left and are still to come back."""
        return placed in self._asked or placed.pending in self._away

    def _wait_seat(
        self, seat: Seat, then: Seat | None = None, graphs: Sequence[int] = ()
    ) -> tuple[bool, bool]:
        self.on_away()
        began_s = time.monotonic()
        came_and_left = seat.asks.wait(seat, self._awake_since_s, then, graphs)
        self.expert_wait_s += self._note_look() - began_s
        return came_and_left

    def come_back(self, placed: Placed) -> None:
        """Until every row that left is back or void: ``placed.rows_TK`` says where it is. As
        :meth:`wait` does, this frees its frames: what reads them is to be launched next."""
        pending, placed.pending = placed.pending, None
        if pending is None:
            seat, began_s = self._asked.pop(placed), time.monotonic()
            back, _ = self._wait_seat(seat)
            if back:
                return
            pending = self._surrender(placed, seat)
            pending.waiting_since_s = began_s
        self.wait(pending)
        if pending.rows_TK is not placed.rows_TK:
            placed.rows_TK.copy_(pending.rows_TK)

    def _surrender(self, placed: Placed, seat: Seat) -> Pending:
        """Make what a seat has away what any dispatch has away."""
        pending = Pending(self, placed.micro_batch, placed.weights_TK)
        pending.rows_TK = placed.rows_TK
        for peer, runs, frame, slot, reply, sent, sent_s in seat.asks.surrender(seat):
            message = _Message(peer, runs, slot, sent, reply, sent_s)
            self._outstanding[peer.reply_session, slot] = message
            pending.messages.append(message)
            pending.frames.append(frame)
        self._away.append(pending)
        return pending

    # Frames and messages.

    def _place(
        self, pending: Pending, counts: list[tuple[ExpertId, int]]
    ) -> Iterable[tuple[Run, ...]]:
        """Lay one worker's rows into as few frames as hold them. The runs of a frame are a message,
        but what is large goes alone; where nothing is, messages are as long as each other, so that
        each passes on while another is computed."""
        runs: list[Run] = []
        start = stop = 0
        left = sum(count for _, count in counts)
        evenly = all(count < LONE_ROWS for _, count in counts)
        # A message of several has its counts ahead of it, as a frame begins: large ones are last.
        for expert, count in sorted(counts, key=lambda of_expert: of_expert[1] >= LONE_ROWS):
            self._rows_by_expert[expert] += count
            alone = count >= LONE_ROWS
            while count:
                if runs and (alone or start == stop):
                    yield tuple(runs)
                    runs = []
                if start == stop:
                    frame = self._frames.take()
                    pending.frames.append(frame)
                    start, stop = self._frames.rows_of(frame)
                    if evenly:
                        stop = start + -(-left // -(-left // (stop - start)))
                taken = min(count, stop - start)
                runs.append(Run(expert, start, taken))
                start += taken
                count -= taken
                left -= taken
        yield tuple(runs)

    def _counts_of(self, runs: tuple[Run, ...]) -> IntArray:
        """What a message for several experts says ahead of its rows."""
        counts_E = np.zeros(self._num_units, dtype=np.int32)
        for run in runs:
            counts_E[run.expert.index] = run.num_rows
        return counts_E

    def _post(self, pending: Pending, messages: list[tuple[Peer, tuple[Run, ...]]]) -> None:
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
                expert, header = wire.SEVERAL, self._frames.header_rows
            rest = wire.encode(0, 0, slot, layer, expert, num_rows)
            trips.append(
                RoundTrip(
                    peer.endpoint,
                    self._frames.sending(first - header, num_rows + header),
                    peer.dispatch_bits | rest,
                    self._frames.replying(first, num_rows),
                    peer.reply_bits | rest,
                )
            )
        self._launch(pending, messages, slots, trips)

    def _launch(
        self,
        pending: Pending,
        messages: list[tuple[Peer, tuple[Run, ...]]],
        slots: list[int],
        trips: list[RoundTrip],
    ) -> None:
        now_s = self._note_look()
        posted = self._transport.exchange(trips)
        for (peer, runs), slot, (reply, sent) in zip(messages, slots, posted, strict=True):
            message = _Message(peer, runs, slot, sent, reply, now_s)
            self._outstanding[peer.reply_session, slot] = message
            pending.messages.append(message)

    def _wait_once(self, pending: Pending) -> None:
        """One turn of waiting for replies."""
        requests = [r for message in pending.messages for r in (message.reply, message.sent)]
        self._transport.wait(requests, spin_s=self._spin_s, timeout_s=_LOOK_INTERVAL_S)
        self._note_look()
        self._drain_unexpected()
        ended = [message for message in pending.messages if message.ended]
        if ended:
            pending.messages = [message for message in pending.messages if not message.ended]
            for message in ended:
                self._end(pending, message)
            return
        self._hurry(pending)

    def _note_look(self) -> float:
        """That replies can be seen now; the time."""
        now_s = time.monotonic()
        if now_s - self._looked_s > _STOPPED_S:
            self._awake_since_s = now_s
        self._looked_s = now_s
        return now_s

    def _waited_since_s(self, message: _Message) -> float:
        """When its worker's time began, as far as it can be told."""
        return max(message.sent_s, self._awake_since_s)

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
            if besides is None and peer in self.peers.replicas(run.expert):
                other: Peer | None = peer
            else:
                other = self.peers.best_replica(run.expert, run.num_rows, besides)
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
            self.peers.note_answer(peer)
            return message.refusal
        failure = self._transport.failure(message.reply)
        if failure is None:
            self.peers.answered(peer, message.experts)
            if message.sent_s >= self._awake_since_s:
                ended_s = message.reply.ended_s
                self.peers.balancer.observe(
                    peer.worker_id, message.num_rows, ended_s - message.sent_s, ended_s
                )
            return None
        if isinstance(failure, MessageTruncated):
            reason = f"its answer has another length: {failure}"
            self.peers.note_fault(peer, message.experts, reason)
            return reason
        self.peers.lose(peer, str(failure))
        return peer.lost

    # What is late.

    def _hurry(self, pending: Pending) -> None:
        """Do something about the dispatches that take far longer than usual."""
        now = time.monotonic()
        any_late = False
        if self._heal([*pending.messages, *(late.message for late in self._abandoned)]):
            return
        for message in tuple(pending.messages):
            if message not in pending.messages:
                continue  # it ended while another one was posted
            peer = message.peer
            # What the gateway did before it began to wait is not the worker's time.
            since_s = self._waited_since_s(message)
            waited_s = now - max(since_s, pending.waiting_since_s)
            if not peer.endpoint.alive:
                self._move(pending, message)
            elif now - since_s > self._reply_timeout_s:
                self.peers.lose(peer, f"no reply within {self._reply_timeout_s:g} s")
            elif self.peers.is_late(peer, message.num_rows, waited_s):
                any_late = True
                waited = f"{now - message.sent_s:.2f} s"
                self.peers.doubt(peer, f"no reply to {message.num_rows} rows within {waited}")
                self._move(pending, message)
        if self._abandoned:
            self._reap()
        if any_late:
            self.on_late()

    def _heal(self, messages: Sequence[_Message]) -> bool:
        """Open the transport anew where it would wait for ever; what is away fails with that."""
        reason = self._why_broken(messages)
        if reason is None:
            return False
        log.warning("transport_reopened", reason=reason, workers=len(self.peers))
        for placed, seat in self._asked.items():
            placed.pending = self._surrender(placed, seat)
        self._asked.clear()
        self.peers.reopen(reason)
        return True

    def _why_broken(self, messages: Sequence[_Message]) -> str | None:
        if (stuck := why_stuck(self._transport, STUCK_PATIENCE_S)) is not None:
            return stuck
        now = time.monotonic()
        for message in messages:
            if message.peer.endpoint.alive or message.ended:
                continue
            if message.gone_s is None:
                message.gone_s = now
            elif now - max(message.gone_s, self._awake_since_s) > _LET_GO_S:
                return f"worker {message.peer.worker_id} is gone amid a message"
        return None

    def _move(self, pending: Pending, message: _Message) -> None:
        """Send late rows again, each run to a worker that is not late itself, if there is one.

        They go from a frame of their own. Where none of its rows are left with it, the first
        attempt is abandoned.
        """
        frames = self._frames
        moves = [
            (run, other)
            for run in message.runs
            if (other := self.peers.best_replica(run.expert, run.num_rows, message.peer))
            is not None
            and other.late_s is None
        ]
        if not moves or self._num_moves + len(self._abandoned) >= _SPARE_FRAMES:
            return
        old, new = frames.frame_of(message.runs[0].start), frames.take()
        pending.frames.append(new)
        pending.num_moves += 1
        self._num_moves += 1
        shift = frames.rows_of(new)[0] - frames.rows_of(old)[0]
        gone = {run for run, _ in moves}
        message.runs = tuple(run for run in message.runs if run not in gone)
        if not message.runs:
            pending.messages.remove(message)
            self._abandoned.append(_Abandoned(message, old, self.arenas))
        for run, _ in moves:
            rows = slice(run.start, run.start + run.num_rows)
            to = slice(rows.start + shift, rows.stop + shift)
            frames.send_RD[to] = frames.send_RD[rows]
            in_run_TK = (pending.rows_TK >= rows.start) & (pending.rows_TK < rows.stop)
            pending.rows_TK.add_(in_run_TK * shift)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        pending.failed_over = True
        self.failovers += 1
        self.replayed_rows += sum(run.num_rows for run, _ in moves)
        self._post(
            pending,
            [(other, (Run(run.expert, run.start + shift, run.num_rows),)) for run, other in moves],
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
                if self._waited_since_s(message) < overdue_s:
                    self.peers.lose(message.peer, f"no reply within {self._reply_timeout_s:g} s")
        self._abandoned = left
        self._frames.unpark(self._held())

    def _release(self, pending: Pending) -> None:
        """Free the frames of a dispatch that is over, but for those that others still hold."""
        self._frames.give_back(pending.frames, self._held())
        self._num_moves -= pending.num_moves

    def _held(self) -> set[int | None]:
        return {abandoned.frame for abandoned in self._abandoned}

    # What cannot be used.

    def _give_up(self, pending: Pending, run: Run, reason: str) -> None:
        """Void the tokens that have a row in ``run``."""
        self._frames.reply_RD[run.start : run.start + run.num_rows] = 0
        index, part = divmod(run.expert.index, self.shards)
        if self.shards > 1:
            reason = f"slice {part} of {self.shards}: {reason}"
        error = ExpertUnavailable(
            run.expert.layer, index, reason, coming=self.peers.is_expected(run.expert)
        )
        in_run_TK = (pending.rows_TK >= run.start) & (pending.rows_TK < run.start + run.num_rows)
        for token in in_run_TK.any(dim=1).nonzero().view(-1).tolist():
            self._void.setdefault((pending.micro_batch, token), error)

    def _drain_unexpected(self) -> None:
        """Act on refusals and wrong answers; drop late replies and whatever strangers send."""
        while (unexpected := self._transport.probe()) is not None:
            unexpected.receive(self._scratch)
            frame = wire.decode(unexpected.tag)
            if frame.kind == wire.Kind.ARENAS:
                self._note_lending(frame)
                continue
            message = self._outstanding.get((frame.session, frame.slot))
            if message is None or message.refusal is not None:
                log.debug("message_dropped", **frame._asdict())
            elif frame.kind == wire.Kind.REFUSE:
                self._refused(message, frame.rows)
            elif frame.kind == wire.Kind.REPLY and not message.reply.completed:
                self._misanswered(message, frame)
            else:
                log.debug("message_dropped", **frame._asdict())

    def _note_lending(self, frame: wire.Frame) -> None:
        peer = self.peers.of_session(frame.session)
        if self._lending is not None and peer is not None:
            self._lending.answered(peer, frame)
            self.peers.version += 1

    def _refused(self, message: _Message, code: int) -> None:
        """Take the posted receive back, and the worker off what it does not serve."""
        known = code in wire.Refusal.__members__.values()
        reason = wire.Refusal(code).name.lower() if known else f"refusal {code}"
        peer = message.peer
        log.warning("dispatch_refused", worker_id=peer.worker_id, reason=reason)
        self.refused += 1
        message.refusal = f"refused the rows: {reason}"
        self.peers.refused(peer, code, message.experts, message.refusal)
        self._transport.cancel(message.reply)

    def _misanswered(self, message: _Message, frame: wire.Frame) -> None:
        """Take the posted receive back: its answer came, under a header that does not fit."""
        message.refusal = (
            f"answered for {frame.rows} rows of {frame.layer}.{frame.expert} where it was sent "
            f"{message.num_rows} of {', '.join(str(run.expert) for run in message.runs)}"
        )
        log.warning("wrong_answer", worker_id=message.peer.worker_id, reason=message.refusal)
        self.peers.note_fault(message.peer, message.experts, message.refusal)
        self._transport.cancel(message.reply)

    # Sizes.

    def _cut(self, shards: int) -> None:
        """Count in slices from here on, ``shards`` to an expert: all that was experts is units."""
        if shards == self.shards:
            return
        self.shards = shards
        self._num_units = self._num_experts * shards
        self._max_routed_rows = self._max_choices * shards
        if self._device.type == "cuda":
            from gateway.gpu_layout import GpuLayout

            self.layout = GpuLayout(self._max_routed_rows, self._device)
            self.arena_version += 1

    def _use_driver(self, device: torch.device) -> None:
        """Find what needs a GPU's driver beside torch: lent arenas, compiled turns."""
        try:
            replays = ReplayDevice(torch.cuda.current_stream(device).cuda_stream)
        except Unavailable as error:
            log.warning("no_driver", reason=str(error))
            return
        if hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph_exec"):
            self.ask_by(replays)
        else:
            log.warning("layers_not_compiled", reason="this torch does not hand its graphs over")
        try:
            self._lending = Lending(self._transport, replays, device)
        except Unavailable as error:
            log.warning("rows_not_by_reference", reason=str(error))
        else:
            self.peers.on_gone = self._lending.take_back

    def ask_by(self, replays: ReplayDevice) -> None:
        """Have the layers that come from graphs asked by compiled code, before any routing."""
        asking = self._transport.asking(replays)
        if asking is not None:
            self._asks = Asks(
                asking,
                self.peers,
                self._frames,
                row_bytes=self._row_bytes,
                device=self._device,
                spin_s=self._spin_s,
                grouped=self._grouped,
            )

    def _units(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """What a token goes to, one for each column of its rows: every slice of its experts."""
        if self.shards == 1:
            return ids_TK
        slices = torch.arange(self.shards, device=ids_TK.device)
        return (ids_TK.unsqueeze(-1) * self.shards + slices).flatten(1)

    def _allocate(self, max_rows: int) -> None:
        """Arenas for the worst step of those that may come now."""
        new = self._frames.allocate(
            routed_rows=self._max_routed_rows,
            header_rows=-(-self._num_units * 4 // self._row_bytes),
            num_peers=len(self.peers),
            max_rows=max_rows,
            seat_rows=0 if self._asks is None else MAX_ROWS,
        )
        if new:
            self.arena_version += 1
            for abandoned in self._abandoned:
                abandoned.frame = None


def _rows_in_order(messages: list[tuple[Peer | None, tuple[Run, ...]]]) -> IntArray:
    """The arena row of every routed row in order of expert: those of one fill its runs."""
    runs = sorted((run for _, runs in messages for run in runs), key=lambda run: run.expert)
    return np.concatenate([np.arange(run.start, run.start + run.num_rows) for run in runs])
