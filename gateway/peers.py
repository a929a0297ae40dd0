"""The workers as this gateway sees them: which it may ask for what, and what it thinks of them.

Between two plans it only ever learns that less is served: a worker that is lost, late or at fault
is asked no more, or after the others, until placement has heard of it and the next plan comes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from gateway.balance import Balancer
from mesh import wire
from mesh.errors import TransportError
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from mesh.transport.base import Endpoint, Transport
from protos import engine_pb2 as pb
from protos import inference_pb2

log = structlog.get_logger()

_ASK_AGAIN_S = 1.0
"""How often to ask about a worker that stays late."""
_MAX_FAULTS = 3
"""Unusable answers in a row after which a worker gets no more rows for an expert."""


@dataclass(eq=False)
class Peer:
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
    num_experts: int = 0
    """That it serves, of all layers."""
    by_reference: bool = False
    """It reads rows and writes answers in our own arenas; see :mod:`gateway.lending`."""

    def __post_init__(self) -> None:
        self.dispatch_bits = wire.encode(int(wire.Kind.DISPATCH), self.session, 0, 0, 0, 0)
        self.reply_bits = wire.encode(int(wire.Kind.REPLY), self.reply_session, 0, 0, 0, 0)

    def take_slot(self) -> int | None:
        """A slot that no outstanding dispatch has; None when all are taken."""
        if len(self.busy_slots) == wire.MAX_SLOTS:
            return None
        while self.next_slot in self.busy_slots:
            self.next_slot = (self.next_slot + 1) % wire.MAX_SLOTS
        self.busy_slots.add(self.next_slot)
        return self.next_slot


Groups = dict[Peer | None, list[tuple[ExpertId, int]]]
"""What each worker gets: experts and rows, ascending. None gets what nobody serves."""


class Peers:
    """Every worker of the plan that this gateway is connected to. One thread owns it."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._connected: dict[str, Peer] = {}
        self._routes: dict[ExpertId, list[Peer]] = {}
        self._expected: set[ExpertId] = set()
        """Experts that are served, or may soon be."""
        self._taken_off: dict[ExpertId, str] = {}
        self._faults: Counter[tuple[str, ExpertId]] = Counter()
        self._ended_sessions: set[int] = set()
        self.transport_number = 0
        """Counts the times that the transport was opened anew: whom a routing names, the worker
        knows by the address of one of them."""
        self._lost: list[pb.PeerLost] = []
        self._late: list[pb.PeerLate] = []
        self._expert_faults: list[pb.ExpertFault] = []
        self.on_gone: Callable[[Peer], None] = lambda peer: None
        """Told of each that is given up, before what is posted on its endpoint ends."""
        self.balancer = Balancer()
        self.version = 0
        """Counts the times that anything changed of whom to ask for what."""

    def __len__(self) -> int:
        return len(self._connected)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._connected

    def __getitem__(self, worker_id: str) -> Peer:
        return self._connected[worker_id]

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._connected.values())

    def of_session(self, reply_session: int) -> Peer | None:
        """Who answers under this session."""
        return next((peer for peer in self if peer.reply_session == reply_session), None)

    def follow(self, routing: pb.Routing) -> None:
        """Take over an epoch's peers and experts: connect what is new, close what is gone."""
        named = {peer.worker_id: peer for peer in routing.peers}
        if routing.transport_number != self.transport_number:
            named = {}  # it was on its way when the transport was opened anew: another one comes
        for worker_id, peer in list(self._connected.items()):
            now = named.get(worker_id)
            if now is None or now.reply_session != peer.reply_session:
                del self._connected[worker_id]
                peer.lost = "it left the plan"
                self.on_gone(peer)
                peer.endpoint.close()
        # A routing that was on its way when a peer was lost still names its session.
        self._ended_sessions &= {peer.reply_session for peer in routing.peers}
        for worker_id in named.keys() - self._connected.keys():
            self._connect(named[worker_id])
        self._routes = {
            expert_from_proto(placed.expert): [
                self._connected[w] for w in placed.worker_ids if w in self._connected
            ]
            for placed in routing.experts
        }
        for peer in self:
            peer.num_experts = 0
        for routes in self._routes.values():
            for peer in routes:
                peer.num_experts += 1
        self._expected = set(self._routes) | set(map(expert_from_proto, routing.pending))
        self._taken_off.clear()
        self._faults.clear()
        self.balancer.keep_only(self._connected, self._routes)
        self.version += 1

    def _connect(self, new: pb.Peer) -> None:
        if new.reply_session in self._ended_sessions:
            return
        try:
            endpoint = self._transport.connect(new.ucx_address)
        except TransportError as error:
            self._note_lost(new.worker_id, new.reply_session, str(error))
        else:
            self._connected[new.worker_id] = Peer(
                new.worker_id, endpoint, new.session, new.reply_session
            )

    def close(self) -> None:
        """End every endpoint."""
        for peer in self._connected.values():
            self.on_gone(peer)
            peer.endpoint.close()
        self._connected.clear()
        self._routes.clear()
        self.version += 1

    def reopen(self, reason: str) -> None:
        """Have the transport opened anew, which is the fault of none of them. Nobody serves before
        a routing comes that was made with its new address."""
        for peer in self._connected.values():
            peer.lost = reason
            self.on_gone(peer)
            peer.endpoint.close()
        self._connected.clear()
        self._lost.clear()
        self._late.clear()
        self._transport.reopen()
        self.transport_number += 1
        self.version += 1

    # Who gets what.

    def group(self, layer: int, counts_E: Sequence[int]) -> Groups:
        """Split the rows of a layer's experts among the workers that serve them."""
        groups: Groups = {}
        shared: list[tuple[int, ExpertId, Sequence[Peer]]] = []
        for index, count in enumerate(counts_E):
            if count:
                expert = ExpertId(layer, index)
                replicas = self.replicas(expert)
                if len(replicas) > 1:
                    shared.append((count, expert, replicas))
                else:
                    peer = replicas[0] if replicas else None
                    groups.setdefault(peer, []).append((expert, count))
        if shared:
            self._spread(shared, groups)
        return groups

    def _spread(self, shared: list[tuple[int, ExpertId, Sequence[Peer]]], groups: Groups) -> None:
        """Add the experts that have replicas to ``groups``, the largest first."""
        busy_s: dict[str, float] = {}

        def give(peer: Peer, count: int) -> None:
            more_s = self.balancer.guess_s(peer.worker_id, count)
            busy_s[peer.worker_id] = busy_s.get(peer.worker_id, 0.0) + more_s

        for peer, experts in groups.items():
            if peer is not None:
                give(peer, sum(count for _, count in experts))
        for count, expert, replicas in sorted(shared, key=lambda s: s[0], reverse=True):
            by_id = {peer.worker_id: peer for peer in replicas}
            for worker_id, part in self.balancer.share(expert, count, [*by_id], busy_s).items():
                give(by_id[worker_id], part)
                groups.setdefault(by_id[worker_id], []).append((expert, part))
        for experts in groups.values():
            experts.sort()

    def num_shared(self, layer: int, num_experts: int) -> int:
        """How many experts of a layer may be asked of several."""
        experts = (ExpertId(layer, index) for index in range(num_experts))
        return sum(len(self.replicas(expert)) > 1 for expert in experts)

    def trusts(self, peer: Peer) -> bool:
        """Nothing is held against it: it answers, and as it should."""
        faulty = any(worker_id == peer.worker_id for worker_id, _ in self._faults)
        return peer.late_s is None and peer.endpoint.alive and not faulty

    def replicas(self, expert: ExpertId, besides: Peer | None = None) -> Sequence[Peer]:
        """The workers that an expert's rows may go to: those that are late only for want of
        others."""
        routes = self._routes.get(expert, ())
        if len(routes) == 1:
            return routes if routes[0].endpoint.alive and routes[0] is not besides else ()
        alive = [peer for peer in routes if peer.endpoint.alive and peer is not besides]
        return [peer for peer in alive if peer.late_s is None] or alive

    def best_replica(
        self, expert: ExpertId, num_rows: int, besides: Peer | None = None
    ) -> Peer | None:
        """Who should answer soonest."""
        return min(
            self.replicas(expert, besides),
            key=lambda peer: self.balancer.guess_s(peer.worker_id, num_rows),
            default=None,
        )

    def is_expected(self, expert: ExpertId) -> bool:
        """Whether it may be served by a plan to come, if it is not by this one."""
        return expert in self._expected

    def why_unserved(self, expert: ExpertId) -> str:
        """In words, why an expert has no worker."""
        lost = [f"worker {p.worker_id}: {p.lost}" for p in self._routes.get(expert, ()) if p.lost]
        unserved = "no worker of the plan serves it"
        return "; ".join(lost) or self._taken_off.get(expert, unserved)

    # What is learnt of them.

    def answered(self, peer: Peer, experts: Sequence[ExpertId]) -> None:
        """A dispatch came back as it should."""
        if peer.late_s is not None:
            self.note_answer(peer)
        if self._faults:
            for expert in experts:
                if self._faults.pop((peer.worker_id, expert), None):
                    self.version += 1

    def note_answer(self, peer: Peer) -> None:
        """It answers, in whatever way: it is not late any more."""
        if peer.late_s is not None:
            peer.late_s = None
            self.version += 1
            log.info("worker_answers_again", worker_id=peer.worker_id)

    def is_late(self, peer: Peer, num_rows: int, waited_s: float) -> bool:
        """Whether a dispatch to it lasts far longer than usual."""
        return waited_s > self.balancer.patience_s(peer.worker_id, num_rows)

    def doubt(self, peer: Peer, reason: str) -> None:
        """Have it asked whether the worker lives; until it answers, others are preferred."""
        now = time.monotonic()
        if peer.late_s is not None and now - peer.late_s < _ASK_AGAIN_S:
            return
        if peer.late_s is None:
            log.warning("worker_late", worker_id=peer.worker_id, reason=reason)
            self.version += 1
        peer.late_s = now
        self._late.append(
            pb.PeerLate(worker_id=peer.worker_id, reply_session=peer.reply_session, reason=reason)
        )

    def lose(self, peer: Peer, reason: str) -> None:
        """Route nothing more to a peer; closing its endpoint ends what is posted on it."""
        if self._connected.get(peer.worker_id) is peer:
            log.warning("worker_lost", worker_id=peer.worker_id, reason=reason)
            del self._connected[peer.worker_id]
            self.version += 1
            peer.lost = reason
            self._ended_sessions.add(peer.reply_session)
            self._note_lost(peer.worker_id, peer.reply_session, reason)
            self.on_gone(peer)
            peer.endpoint.close()

    def _note_lost(self, worker_id: str, reply_session: int, reason: str) -> None:
        self._lost.append(
            pb.PeerLost(worker_id=worker_id, reply_session=reply_session, reason=reason)
        )

    def lose_dead(self) -> None:
        """Lose those whose endpoint was reported dead."""
        for peer in list(self._connected.values()):
            if not peer.endpoint.alive:
                self.lose(peer, "its endpoint was reported dead")

    def drop(self, order: pb.DropPeer) -> None:
        """Do without a worker from now on, unless it was connected anew."""
        peer = self._connected.get(order.worker_id)
        if peer is not None and peer.reply_session == order.reply_session:
            self.lose(peer, order.reason)

    def refused(self, peer: Peer, code: int, experts: Sequence[ExpertId], reason: str) -> None:
        """Take a worker off what it does not serve."""
        if code == wire.Refusal.UNKNOWN_SESSION:
            self.lose(peer, "it does not know our session")
        elif code == wire.Refusal.DRAINING:
            for expert in self._routes:
                self._take_off(peer, expert, reason)
        elif code == wire.Refusal.UNKNOWN_EXPERT and len(experts) == 1:
            self._take_off(peer, experts[0], reason)
        else:
            self.note_fault(peer, experts, reason)

    def note_fault(self, peer: Peer, experts: Sequence[ExpertId], reason: str) -> None:
        """Count an answer that cannot be used; after some in a row, ask this worker no more."""
        if len(experts) != 1:
            return  # nobody knows whose fault it was: each expert is asked again alone
        (expert,) = experts
        self._faults[peer.worker_id, expert] += 1
        self.version += 1
        if self._faults[peer.worker_id, expert] < _MAX_FAULTS:
            return
        log.error("expert_faulty", worker_id=peer.worker_id, expert=str(expert), reason=reason)
        self._take_off(peer, expert, reason)
        if not self._routes[expert]:
            self._expected.discard(expert)
        self._expert_faults.append(
            pb.ExpertFault(worker_id=peer.worker_id, expert=expert_to_proto(expert), reason=reason)
        )

    def _take_off(self, peer: Peer, expert: ExpertId, reason: str) -> None:
        """Send a worker no more rows for an expert before the next plan."""
        if peer in self._routes[expert]:
            self._routes[expert] = [p for p in self._routes[expert] if p is not peer]
            self._taken_off[expert] = f"worker {peer.worker_id}: {reason}"
            self.version += 1

    # What others should hear of it.

    def take_lost(self) -> list[pb.PeerLost]:
        """Workers lost since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def take_late(self) -> list[pb.PeerLate]:
        """Workers to ask about since the last call."""
        late, self._late = self._late, []
        return late

    def take_expert_faults(self) -> list[pb.ExpertFault]:
        """Experts that workers were taken off since the last call, for what they answered."""
        faults, self._expert_faults = self._expert_faults, []
        return faults

    def paces(self) -> list[inference_pb2.WorkerPace]:
        """How fast each connected worker is, where that is known."""
        paces = []
        for worker_id in sorted(self._connected):
            one_s, two_s = (self.balancer.expected_s(worker_id, rows) for rows in (1, 2))
            if one_s is not None and two_s is not None:
                paces.append(
                    inference_pb2.WorkerPace(
                        worker_id=worker_id, dispatch_s=one_s, row_s=two_s - one_s
                    )
                )
        return paces
