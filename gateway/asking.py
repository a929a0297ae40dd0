"""Layers whose rows leave a GPU without a decision of the host: planned ahead, asked in one call.

Who serves which expert, and where in the arenas its rows go, changes with the plan, not with the
step. So each layer of a graphed micro-batch has a *seat*: tables on the device by which its graph
lays the rows out, and the same by peer for the compiled turn (``mesh/native/asking.c``), which
launches the graph and posts what it has made. Whatever does not fit goes the way that any dispatch
goes: a seat that could not leave, and what a seat has away when something is amiss.

Legend: T tokens, K experts a token, R = T x K routed rows, E experts of a layer (slices, where
experts are cut), N arena rows, D hidden size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gateway import balance
from gateway.frames import MAX_MICRO_BATCHES, Frames, Run
from gateway.peers import Peer, Peers
from mesh import native, wire
from mesh.plan import ExpertId
from mesh.replay import CAPTURED_AHEAD
from mesh.transport.base import Asking, Request

MAX_ROWS = 16384
"""Of a seat: up to here, comparing every pair of rows takes little beside their experts."""
_PICK_EVERY = 64
"""After so many uses replicas are picked again; more where there are more, for what that takes."""
_OBSERVE_EVERY = 16


class Tables:
    """Where :func:`gateway.gpu_kernels.place` puts the rows of each expert, as int32 ``words``:
    how many messages have a header; then of each expert its message (-1: none), the row that
    this starts at, and the end of its room; then of each header its row and whose it is."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._on_host = torch.zeros(
            1 + 5 * num_experts, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.words = torch.zeros_like(self._on_host, device=device)
        self.write(np.full(num_experts, -1, dtype=np.int32), [], [], [], 0)

    def write(
        self,
        groups_E: Sequence[int] | npt.NDArray[np.int32],
        firsts: Sequence[int],
        limits: Sequence[int],
        headed: Sequence[int],
        header_rows: int,
    ) -> None:
        """``groups_E`` says whose message each expert is in, ``firsts`` and ``limits`` where those
        start and must end, ``headed`` which have counts ``header_rows`` ahead of their rows."""
        words = self._on_host.numpy()
        words[0] = len(headed)
        by_expert = words[1:].reshape(5, -1)
        by_expert[0] = groups_E
        for row, of_groups in enumerate((firsts, limits), start=1):
            by_expert[row] = np.array([*of_groups, 0], dtype=np.int32)[by_expert[0]]
        for n, group in enumerate(headed):
            by_expert[3:, n] = firsts[group] - header_rows, group
        self.words.copy_(self._on_host, non_blocking=True)


class Away(NamedTuple):
    """A message that a seat has posted, and what it holds."""

    peer: Peer
    runs: tuple[Run, ...]
    frame: int
    slot: int
    reply: Request
    sent: Request
    sent_s: float


class _Held(NamedTuple):
    """What one peer's messages of one micro-batch go out by, layer after layer."""

    frame: int
    slot: int


class Seat:
    """One layer of one micro-batch. Graphs know its buffers, so they stay where they are."""

    def __init__(
        self,
        asks: Asks,
        micro_batch: int,
        layer: int,
        num_experts: int,
        row_bytes: int,
        device: torch.device,
    ) -> None:
        self.asks = asks
        self.micro_batch = micro_batch
        self.layer = layer
        self.num_experts = num_experts
        self.tables = Tables(num_experts, device)
        self.rows_R = torch.full((MAX_ROWS,), -1, dtype=torch.int64, device=device)
        self.counts_E = torch.zeros(
            num_experts, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.groups_E = np.full(num_experts, -1, dtype=np.int32)
        self.totals_E = np.zeros(num_experts, dtype=np.uint64)
        self.by_peer = (native.Ask * num_experts)()
        self.record = native.Seat(
            counts=self.counts_E.data_ptr(),
            groups=self.groups_E.ctypes.data,
            totals=self.totals_E.ctypes.data,
            asks=ctypes.cast(self.by_peer, ctypes.POINTER(native.Ask)),
            row_bytes=row_bytes,
            num_experts=num_experts,
        )
        self.peers: list[Peer] = []
        """Of each of them."""
        self.version = -1
        """Of the peers, that the plan was made for."""
        self.num_plans = 0
        """So far: the number of the one that its tables say."""
        self.num_shared = 0
        """Of the experts, those that have replicas."""
        self.num_uses = 0

    def place(self, x_TD: Tensor, ids_TK: Tensor, shards: int, send_ND: Tensor) -> Tensor:
        """What a graph ends with: rows to the arena, one for each of the ``shards`` slices of an
        expert, and counts to the host. Returns where each row will be, ``rows_TK``."""
        from gateway import gpu_kernels

        num_tokens, num_choices = ids_TK.shape
        rows_TK = self.rows_TK(torch.Size((num_tokens, num_choices * shards)))
        gpu_kernels.place(x_TD, ids_TK, self.tables.words, send_ND, rows_TK, self.counts_E)
        return rows_TK

    @property
    def picks_again(self) -> bool:
        """Whether to choose among replicas anew: not all layers in one step."""
        turn = self.num_uses + self.layer
        return self.num_shared > 0 and turn % max(_PICK_EVERY, self.num_shared) == 0

    def rows_TK(self, shape: torch.Size) -> Tensor:
        """What :meth:`place` writes and returns."""
        return self.rows_R[: shape.numel()].view(shape)

    def away(self) -> Iterator[tuple[int, Peer, native.Ask]]:
        """Who was asked the last time, and the number of each."""
        for group, peer in enumerate(self.peers):
            if self.by_peer[group].num_rows:
                yield group, peer, self.by_peer[group]

    def runs(self, group: int, first: int) -> tuple[Run, ...]:
        """The rows of one ask, from row ``first`` on."""
        runs = []
        for index in np.flatnonzero(self.groups_E == group).tolist():
            count = int(self.counts_E[index])
            if count:
                runs.append(Run(ExpertId(self.layer, index), first, count))
                first += count
        return tuple(runs)


class Asks:
    """The seats of one dispatcher, which owns it.

    Each holds a small frame and a slot for every peer of its plan, together with the seats of the
    other layers of its micro-batch: of those, one is away at a time.
    """

    def __init__(
        self,
        asking: Asking,
        peers: Peers,
        frames: Frames,
        *,
        row_bytes: int,
        device: torch.device,
        spin_s: float,
        grouped: bool,
    ) -> None:
        """``grouped``: workers compute those of a layer that they hold together."""
        self._asking = asking
        self._peers = peers
        self._frames = frames
        self._row_bytes = row_bytes
        self._device = device
        self._spin_s = spin_s
        self._grouped = grouped
        self._seats: dict[tuple[int, int], Seat] = {}
        self._past: list[Seat] = []
        """Whose rows are still to be counted."""
        self._past_posted_ns = 0
        self._held: dict[tuple[int, Peer], _Held] = {}
        self._away: dict[int, Seat] = {}
        """By micro-batch."""
        self._num_deaths = 0

    def seat(self, micro_batch: int, layer: int, num_experts: int, num_rows: int) -> Seat | None:
        """Whose buffers a graph is to be captured with; None where there is none for so many."""
        if num_rows > MAX_ROWS or micro_batch >= MAX_MICRO_BATCHES:
            return None
        seat = self._seats.get((micro_batch, layer))
        if seat is None or seat.num_experts != num_experts:
            if seat is not None:
                self._past.append(seat)
                self._past_posted_ns += seat.record.posted_ns
            seat = Seat(self, micro_batch, layer, num_experts, self._row_bytes, self._device)
            self._seats[micro_batch, layer] = seat
        return seat

    def prepare(self, seat: Seat) -> None:
        """Have its tables say what holds now: before its rows are placed."""
        if self._asking.num_deaths != self._num_deaths:
            self._num_deaths = self._asking.num_deaths
            self._peers.lose_dead()
        seat.num_uses += 1
        if seat.version != self._peers.version or seat.picks_again:
            self._plan(seat)

    def plan_of(self, seat: Seat) -> int:
        """The number of the plan that its tables say and that holds now, or 0. What is placed by it
        may leave if :meth:`prepare` then keeps it."""
        holds = self._asking.num_deaths == self._num_deaths and seat.version == self._peers.version
        return seat.num_plans if holds else 0

    def leave(self, seat: Seat, graphs: Sequence[int]) -> bool:
        """Launch the graph (``CUgraphExec``) that places the rows of a seat, which is prepared, and
        send them; none where they were placed already. False, with nothing sent, where they do not
        fit the plan. Raises MeshError when the device failed."""
        left = self._asking.leave(seat.record, graphs)
        if left:
            self._away[seat.micro_batch] = seat
        return left

    def wait(
        self, seat: Seat, awake_since_s: float, then: Seat | None = None, graphs: Sequence[int] = ()
    ) -> tuple[bool, bool]:
        """Until all of a seat is back. It is not where that takes more than to wait, and it is to
        :meth:`surrender`. What was sent before ``awake_since_s`` says nothing of a worker.

        With graphs, those are launched as soon as all is back, and the seat that the last places
        leaves, if there is one: whether it did, is the second.
        """
        back, left = self._asking.wait(
            seat.record,
            spin_s=self._spin_s,
            timeout_s=balance.MIN_PATIENCE_S,
            then=None if then is None else then.record,
            graphs=graphs,
        )
        if back:
            del self._away[seat.micro_batch]
            self._note_answers(seat, awake_since_s)
        if left and then is not None:
            self._away[then.micro_batch] = then
        return back, left

    def _note_answers(self, seat: Seat, awake_since_s: float) -> None:
        sent_s = seat.record.sent_us / 1e6
        if seat.num_uses % _OBSERVE_EVERY == 1 and sent_s >= awake_since_s:
            for _, peer, ask in seat.away():
                ended_s = ask.ended_us / 1e6
                self._peers.balancer.observe(
                    peer.worker_id, ask.num_rows, ended_s - sent_s, ended_s
                )
        if seat.version != self._peers.version:
            for group, peer, _ in seat.away():
                self._peers.answered(peer, [run.expert for run in seat.runs(group, 0)])

    def surrender(self, seat: Seat) -> list[Away]:
        """What a seat has away, which is the caller's from here on, with all that it holds."""
        del self._away[seat.micro_batch]
        sent_s = seat.record.sent_us / 1e6
        found = []
        for group, peer, ask in seat.away():
            held = self._held.pop((seat.micro_batch, peer))
            runs = seat.runs(group, ask.first)
            found.append(Away(peer, runs, *held, *self._asking.taken(ask), sent_s))
        self._unplan(seat.micro_batch)
        return found

    def give_back(self) -> None:
        """Let go of all frames and slots: nothing is away, and the next plan is another."""
        for (_, peer), held in self._held.items():
            self._release(peer, held)
        self._held.clear()
        for micro_batch in range(MAX_MICRO_BATCHES):
            self._unplan(micro_batch)

    @property
    def posted_s(self) -> float:
        """What posting took, of all seats since the start."""
        posted_ns: int = sum(seat.record.posted_ns for seat in self._seats.values())
        return (self._past_posted_ns + posted_ns) / 1e9

    def take_rows(self) -> Iterator[tuple[ExpertId, int]]:
        """Rows that each expert was sent since the last call."""
        for seat in (*self._past, *self._seats.values()):
            for index in np.flatnonzero(seat.totals_E).tolist():
                yield ExpertId(seat.layer, index), int(seat.totals_E[index])
            seat.totals_E[:] = 0
        self._past.clear()

    # Plans.

    def _plan(self, seat: Seat) -> None:
        """Lay out who is asked for what, as long as nothing is held against anybody."""
        seat.num_plans += 1
        if seat.micro_batch not in self._away:
            for key in [key for key in self._held if key[0] == seat.micro_batch and key[1].lost]:
                self._release(key[1], self._held.pop(key))
        if seat.version != self._peers.version:
            seat.version = self._peers.version
            seat.num_shared = self._peers.num_shared(seat.layer, seat.num_experts)
        seat.peers = []
        seat.groups_E[:] = -1
        groups = self._peers.group(seat.layer, [1] * seat.num_experts)
        if all(map(self._peers.trusts, filter(None, groups))):
            for peer, experts in groups.items():
                held = None if peer is None else self._hold(seat.micro_batch, peer)
                if peer is None or held is None:
                    continue  # its rows go the other way
                self._aim(seat, peer, held)
                seat.groups_E[[expert.index for expert, _ in experts]] = len(seat.peers)
                seat.peers.append(peer)
        seat.record.num_asks = len(seat.peers)
        asks = seat.by_peer[: len(seat.peers)]
        sizes = np.bincount(seat.groups_E[seat.groups_E >= 0], minlength=len(asks)).tolist()
        for ask, peer, size in zip(asks, seat.peers, sizes, strict=True):
            ask.several = self._grouped and size > 1 and peer.num_experts > CAPTURED_AHEAD
        seat.tables.write(
            seat.groups_E,
            [ask.first for ask in asks],
            [ask.first + ask.capacity for ask in asks],
            [group for group, size in enumerate(sizes) if size > 1],
            self._frames.header_rows,
        )

    def _aim(self, seat: Seat, peer: Peer, held: _Held) -> None:
        frames, ask = self._frames, seat.by_peer[len(seat.peers)]
        first, limit = frames.rows_of(held.frame)
        ask.send_tag = wire.encode(0, peer.session, held.slot, seat.layer, 0, 0)
        ask.reply_tag = wire.encode(0, peer.reply_session, held.slot, seat.layer, 0, 0)
        ask.rows = frames.send_RD.data_ptr() + first * self._row_bytes
        ask.replies = frames.reply_RD.data_ptr() + first * self._row_bytes
        ask.first = first
        ask.header_bytes = frames.header_rows * self._row_bytes
        ask.capacity = limit - first
        ask.by_reference = peer.by_reference
        ask.num_rows = 0
        self._asking.aim(ask, peer.endpoint)

    def _unplan(self, micro_batch: int) -> None:
        """Plan its seats anew before they leave again."""
        for seat in self._seats.values():
            if seat.micro_batch == micro_batch:
                seat.version = -1

    def _hold(self, micro_batch: int, peer: Peer) -> _Held | None:
        held = self._held.get((micro_batch, peer))
        if held is None:
            frame = self._frames.take_small()
            if frame is None:
                return None
            slot = peer.take_slot()
            if slot is None:
                self._frames.give_back([frame], ())
                return None
            held = self._held[micro_batch, peer] = _Held(frame, slot)
        return held

    def _release(self, peer: Peer, held: _Held) -> None:
        peer.busy_slots.discard(held.slot)
        self._frames.give_back([held.frame], ())
