"""What placement decides, apart from how it is told and whom it tells. Pure: ``now`` is passed in.

A target says where experts should live (:mod:`placement.planner`); workers load towards it; the
plan that gateways route by holds only what is resident on live workers that they reach
(:mod:`placement.movement` is the way from the one to the other).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from mesh.config import PlacementConfig
from mesh.errors import ModelMismatch, Overloaded, PlacementError
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from placement.faults import Faults
from placement.history import History
from placement.improve import Budget
from placement.load import LoadAverage, balancedness
from placement.membership import Gateway, Membership, Worker
from placement.movement import Movement, Steps
from placement.planner import plan
from placement.policy import RebalancePolicy
from placement.rules import Rules, Target, WorkerSpec, choose_shards, possible_shards
from placement.topology import Topology
from protos import placement_pb2 as pb

MAX_MEMBERS = 16_384
_RETRY_ORDER_S = 5.0
_MAX_ERRORS_IN_NOTE = 3
_BALANCE_INTERVAL_S = 1.0
_TELL_EPOCH_AFTER_S = 0.5
"""Many messages, and no hurry: rows wait for what others have to be told."""
_MIN_ROWS_PER_EXPERT = 20.0
"""Of the window that load is averaged over: fewer say nothing of balance."""


def says_no_more(order: pb.WorkerOrder, last: pb.WorkerOrder) -> bool:
    """Whether an order tells nothing new but an epoch."""
    same = pb.WorkerOrder()
    same.CopyFrom(order)
    same.epoch = last.epoch
    return same == last


class Coordinator:
    """The state of one mesh. Every method is instant but the function :meth:`next_target` gives.

    A turn is: :meth:`expire`, :meth:`publish`, :meth:`orders`; and when :meth:`next_target` has
    something to compute, :meth:`adopt` its result and take another.

    ``expert_hidden_size`` is what experts can be sliced by, where no worker holds one whole.
    """

    def __init__(
        self,
        rules: Rules,
        fingerprint: str,
        config: PlacementConfig,
        *,
        expert_hidden_size: int = 1,
        topology: Topology | None = None,
    ) -> None:
        self.members = Membership(config.lease_s)
        self.history = History()
        self.faults = Faults()
        self.plan: pb.Plan | None = None
        """As published last; None before the first."""
        self.target: Target | None = None
        self.moves = 0
        """Experts that found another worker, since start."""
        self.repairs_s: list[float] = []
        """How long each repair took that nobody counted yet."""
        self._fingerprint = fingerprint
        self._config = config
        self._topology = topology or Topology()
        self._expert_hidden_size = expert_hidden_size
        self._rules = rules
        self._experts = frozenset(rules.experts)
        self._shards_are_fixed = config.expert_shards > 0
        if self._shards_are_fixed:
            self._fix_shards(config.expert_shards)
        self._settled_at_s: float | None = None
        self._epoch = 0
        self._stale = False
        self._shortage = ""
        self._traffic: LoadAverage[ExpertId] = LoadAverage()
        self._worker_load: LoadAverage[str] = LoadAverage()
        self._orders: dict[str, tuple[pb.WorkerOrder, float]] = {}
        self._guests: dict[ExpertId, str] = {}
        self._published: tuple[object, ...] = ()
        self._serving: Mapping[ExpertId, tuple[str, ...]] = {}
        self._placed: dict[str, set[ExpertId]] = {}
        self._placements: dict[ExpertId, pb.ExpertPlacement] = {}
        """What the plan has where: of each expert, of each worker that has any, and in its words,
        so that a new plan takes as long as what it changes."""
        self._tell_epoch_at_s: float | None = None
        """When those who have nothing to do are told of the last epoch; None: they were."""
        self._trials = 0
        """How often an expert stayed where it is for another try: gateways try by a new plan."""
        self._moved: tuple[tuple[object, ...], Movement] | None = None
        self._policy = RebalancePolicy(config.rebalance_below, config.rebalance_after_s)
        self._next_balance_s = 0.0
        self._rebalanced: tuple[float, float] | None = None
        self._incomplete_since_s: float | None = None

    # What is heard.

    def register(self, request: pb.RegisterRequest, lease_id: str, now: float) -> Worker | None:
        """A worker, perhaps of an earlier life of placement. See :meth:`Membership.register`.

        ModelMismatch when what it holds is sliced in another way than this mesh's experts.
        """
        if len(self.members.workers) >= MAX_MEMBERS:
            raise Overloaded(f"{MAX_MEMBERS} workers are registered, which is the limit")
        if request.resident:
            self._adopt_shards(request.worker.worker_id, request.expert_shards or 1)
        resident = self._known(request.resident)
        earlier = self.members.register(request.worker, lease_id, resident, now)
        if earlier:
            self._orders.pop(earlier.lease_id, None)
        self.faults.forget(request.worker.worker_id)
        if resident and self._settled_at_s is None:
            self._settled_at_s = now + self._config.settle_s
        self._hear_epoch(request.last_epoch, now)
        self._stale = True
        self.history.note(
            now,
            "worker_registered",
            f"{request.worker.worker_id} joined with {len(resident)} experts",
            worker_id=request.worker.worker_id,
            resident=len(resident),
        )
        return earlier

    def report(self, worker: Worker, report: pb.WorkerReport, now: float) -> bool:
        """A heartbeat. True when there may be something to decide."""
        was_draining, had_error = worker.draining, worker.error
        changed = self.members.report(worker, report, self._known(report.resident), now)
        if worker.draining and not was_draining:
            self._note_draining(worker.worker_id, now)
        if worker.error and worker.error != had_error:
            text = f"{worker.worker_id} could not do what it was told: {worker.error}"
            facts = {"worker_id": worker.worker_id, "error": worker.error}
            self.history.note(now, "worker_order_failed", text, bad=True, **facts)
        self._worker_load.observe(worker.worker_id, sum(load.rows for load in report.load), now)
        return changed or worker.cut_off

    def gateway_report(self, report: pb.GatewayReport, now: float) -> bool:
        """A gateway's load, epoch and whom it cannot reach. True when there may be something to
        decide."""
        known = self.members.gateways.get(report.gateway_id)
        if known is None and len(self.members.gateways) >= MAX_MEMBERS:
            raise Overloaded(f"{MAX_MEMBERS} gateways report, which is the limit")
        self.members.gateways[report.gateway_id] = Gateway(report, now)
        self._hear_epoch(report.epoch, now)
        for load in report.load:
            expert = expert_from_proto(load.expert)
            if expert in self._experts:
                self._traffic.observe(expert, load.rows, now)
        faulty = self._hear_faults(report, now)
        if known is None:
            return True
        before = known.report
        return faulty or (before.epoch, before.unreachable_worker_ids) != (
            report.epoch,
            report.unreachable_worker_ids,
        )

    def _hear_faults(self, report: pb.GatewayReport, now: float) -> bool:
        """Take note of experts that workers get wrong. True when there are new ones.

        What a gateway says by another plan than the last is old, and will be said again. One that
        finds fault with everybody is at fault itself.
        """
        if not report.faults or self.plan is None or report.epoch != self.plan.epoch:
            return False
        said = {
            (worker_id, expert_from_proto(fault.expert))
            for fault in report.faults
            for worker_id in fault.worker_ids
        }
        placed = self._placed
        said &= {(w, expert) for w, experts in placed.items() for expert in experts}
        if len(placed) > 1 and {w for w, _ in said} == placed.keys():
            return False
        begun = self.faults.hear(sorted(said), now)
        for (worker_id, expert), seconds in begun:
            text = f"{worker_id} gets {expert} wrong: not used for it for {seconds:g} s"
            facts = {"worker_id": worker_id, "expert": str(expert)}
            self.history.note(now, "expert_faulty", text, bad=True, seconds=seconds, **facts)
        self._stale |= bool(begun)
        return bool(begun)

    def gateway_gone(self, gateway_id: str) -> None:
        """A gateway's stream ended."""
        self.members.gateways.pop(gateway_id, None)

    def drop(self, lease_id: str, now: float) -> Worker | None:
        """A worker's stream ended. Returns the worker unless its lease had ended before."""
        worker = self.members.drop(lease_id)
        if worker:
            text = f"{worker.worker_id} left" if worker.draining else f"{worker.worker_id} is gone"
            self._lose(worker, now, "worker_gone", text)
        return worker

    def expire(self, now: float) -> list[Worker]:
        """Workers that have been silent for too long are gone; those that gateways do not reach
        count as lost until they do. Returns the silent ones."""
        dead = self.members.expire(now)
        for worker in dead:
            text = f"{worker.worker_id} was silent for {self._config.lease_s:g} s"
            self._lose(worker, now, "worker_silent", text)
        placed = self._placed
        lost, back = self.members.judge(placed, now)
        for worker in lost:
            text = f"{worker.worker_id} is alive, but gateways do not reach it"
            self._note_loss(worker, now, "worker_unreachable", text)
        for worker in back:
            text = f"{worker.worker_id} is within reach again"
            self.history.note(now, "worker_back", text, worker_id=worker.worker_id)
        tried_again = self.faults.expire(now)
        for worker_id, expert in tried_again:
            text = f"{worker_id} may serve {expert} again"
            self.history.note(
                now, "expert_tried_again", text, worker_id=worker_id, expert=str(expert)
            )
            self._trials += expert in placed.get(worker_id, ())
        self._stale |= bool(lost or back or tried_again)
        return dead

    def drain(self, worker_id: str, now: float) -> None:
        """Move everything away from a worker. PlacementError when there is none of the name."""
        worker = self.members.workers.get(worker_id)
        if worker is None:
            raise PlacementError(f"no worker {worker_id!r}: `expert-mesh status` names them")
        if not worker.draining:
            worker.draining = True
            self._note_draining(worker_id, now)

    def next_deadline_s(self, now: float) -> float | None:
        """When time alone may change something."""
        times = [self.members.next_deadline_s(now), self.faults.next_deadline_s()]
        times.append(self._tell_epoch_at_s)
        if self.target is None and self._stale:
            times.append(self._settled_at_s)
        return min((t for t in times if t is not None), default=None)

    # What is decided.

    def rebalance_due(self, now: float) -> bool:
        """Whether the policy wants a turn at balance. Ask while there is traffic."""
        if now < self._next_balance_s or self.target is None or self._stale:
            return False
        self._next_balance_s = now + _BALANCE_INTERVAL_S
        traffic = self._traffic_now(now)
        enough = _MIN_ROWS_PER_EXPERT * len(self._experts)
        if sum(traffic.values()) * self._traffic.window_s < enough:
            return False
        due = self._policy.observe(balancedness(self.target.loads(traffic).values()), now)
        return due and not self.target.missing and self._movement().is_done

    def next_target(
        self, now: float, *, budget: Budget | None = None
    ) -> Callable[[], Target] | None:
        """The computation of a new target, if one is due: slow, and safe to run in a thread.

        With ``budget`` one is, and it may move what lives. Give the result to :meth:`adopt`, the
        words of a PlacementError, of this or of that, to :meth:`note_shortage`.
        """
        if not (self._stale or budget) or not self._may_plan(now):
            return None
        staying = [w for w in self._reachable() if not w.draining]
        gateway_hosts = [g.report.host for g in self.members.gateways.values()]
        doubted = self.members.doubted()
        specs = [
            WorkerSpec(
                w.worker_id,
                w.info.memory_bytes,
                w.info.expert_bytes,
                self._topology.link_cost(w.info, gateway_hosts),
                w.info.host,
                w.worker_id in doubted,
            )
            for w in staying
        ]
        self._stale = False
        rules = self._rules
        if not self._shards_are_fixed:
            rules = replace(rules, shards=choose_shards(rules, specs, self._expert_hidden_size))
        return functools.partial(
            plan,
            rules,
            specs,
            homes=self._homes(staying),
            residents={w.worker_id: w.resident for w in staying},
            barred=self.faults.by_worker(),
            traffic=self._traffic_now(now),
            max_replicas=self._config.max_replicas,
            budget=budget,
            # Only a mesh that serves nothing yet can wait for better days.
            partial=self.target is not None or self._settled_at_s is not None,
        )

    def adopt(self, target: Target, now: float) -> int:
        """Work towards a target from now on. Returns how many experts it moves."""
        if not self._shards_are_fixed:
            self._fix_shards(target.shards)
        before = self.target.workers_by_expert if self.target else {}
        self.target = target
        self._guests.clear()
        for worker_id, expert in sorted(self.faults.out):
            if worker_id in target.workers_by_expert.get(expert, ()):
                text = f"{worker_id} keeps {expert}, which it gets wrong: nobody else has a seat"
                facts = {"worker_id": worker_id, "expert": str(expert)}
                self.history.note(now, "faulty_expert_stays", text, bad=True, **facts)
        moves = [
            (expert, worker_id)
            for expert, worker_ids in target.workers_by_expert.items()
            if expert in before and before[expert] != worker_ids
            for worker_id in set(worker_ids) - set(before[expert])
        ]
        self.moves += len(moves)
        if moves:
            text = f"{len(moves)} experts move: " + ", ".join(
                f"{expert} to {worker_id}" for expert, worker_id in sorted(moves)[:4]
            )
            self.history.note(
                now, "moves", text + (" ..." if len(moves) > 4 else ""), moves=len(moves)
            )
        return len(moves)

    def rebalance_begins(self, now: float) -> None:
        """Remember how balanced the mesh is, to compare with."""
        self._rebalanced = now, self.balancedness(now)

    def rebalance_done(self, moves: int, now: float) -> None:
        """A rebalance has its target."""
        self._policy.took_turn(moves, now)
        _, before = self._rebalanced or (now, 1.0)
        text = f"rebalance from {before:.0%}: {moves} experts move"
        self.history.note(now, "rebalance", text, moves=moves, balancedness=round(before, 4))

    def note_shortage(self, shortage: str) -> None:
        """The first target could not be made: say so until workers come."""
        self._shortage = shortage

    def publish(self, now: float) -> bool:
        """Bring :attr:`plan` up to date; True when that made a new epoch."""
        if self.target is None:
            return False
        serving = self._movement().serving
        ids = {worker_id for ids in set(serving.values()) for worker_id in ids}
        # Those cut off are named so that gateways go on trying to reach them.
        ids |= {w.worker_id for w in self.members.workers.values() if w.cut_off}
        infos = [self.members.workers[worker_id].info for worker_id in sorted(ids)]
        # Also what a worker had that died since the target was made: a new one is on its way.
        pending = sorted(self._experts - serving.keys() - set(self.target.missing))
        note = self._note(self.target)
        facts = (self._epoch, serving, infos, pending, note, self._trials)
        if facts == self._published or (self.plan is None and not serving):
            return False
        self._epoch += 1
        self._tell_epoch_at_s = now + _TELL_EPOCH_AFTER_S
        self._published = (self._epoch, *facts[1:])
        self._place(serving)
        before = self.plan
        fresh = self.plan = pb.Plan(
            epoch=self._epoch,
            model_fingerprint=self._fingerprint,
            workers=infos,
            experts=[self._placements[expert] for expert in sorted(serving)],
            experts_per_worker=self._rules.experts_per_worker,
            strict=self._rules.rule == "strict",
            note=note,
            complete=len(serving) == len(self._experts),
            pending=map(expert_to_proto, pending),
            expert_shards=self._rules.shards,
        )
        if not fresh.complete and before is not None and before.complete:
            self._incomplete_since_s = self._incomplete_since_s or now
        if fresh.complete and self._incomplete_since_s is not None:
            took_s = now - self._incomplete_since_s
            self._incomplete_since_s = None
            self.repairs_s.append(took_s)
            text = f"every expert is served again after {took_s:.2f} s"
            self.history.note(now, "repaired", text, seconds=round(took_s, 3), epoch=fresh.epoch)
        return True

    def orders(self, now: float, listening: Collection[str]) -> list[tuple[str, pb.WorkerOrder]]:
        """What those who listen, by lease, have to be told that they were not told yet."""
        movement = self._unstick(now)
        routed = self._routed()
        told = []
        for worker in self.members.workers.values():
            if worker.lease_id not in listening:
                continue
            order = self._order(worker, movement, routed)
            nothing = pb.WorkerOrder(epoch=order.epoch, expert_shards=order.expert_shards)
            last, told_s = self._orders.get(worker.lease_id, (nothing, now))
            failed = worker.error and order.load and now - told_s >= _RETRY_ORDER_S
            if order == last and not failed:
                continue
            if says_no_more(order, last) and now < (self._tell_epoch_at_s or now):
                continue
            self._orders[worker.lease_id] = (order, now)
            told.append((worker.lease_id, order))
        if now >= (self._tell_epoch_at_s or now):
            self._tell_epoch_at_s = None
        return told

    def _order(
        self, worker: Worker, movement: Movement, routed: Mapping[str, Collection[ExpertId]]
    ) -> pb.WorkerOrder:
        here = set(routed.get(worker.worker_id, ()))
        steps = Steps() if worker.cut_off else movement.steps(worker, here)
        missing = set(self.target.missing) if self.target else set()
        nobody_routes = self.plan is None and self._settled_at_s is None
        order = pb.WorkerOrder(
            load=map(expert_to_proto, steps.load),
            unload=map(expert_to_proto, steps.unload),
            epoch=self._epoch,
            leave=worker.draining and (nobody_routes or (not self._stale and here <= missing)),
            expert_shards=self._rules.shards,
        )
        for expert in steps.load:
            if source := movement.source(expert, worker):
                order.sources.add(
                    expert=expert_to_proto(expert), grpc_address=source.info.grpc_address
                )
        return order

    def _unstick(self, now: float) -> Movement:
        """The way to the target, with a detour or less moves where workers are in each other's
        way. Every gateway must have the plan: until then, to wait is the way."""
        self._guests = {e: w for e, w in self._guests.items() if not self._has_arrived(e)}
        movement = self._movement()
        if movement.is_done or not self._gateways_follow():
            return movement
        routed = self._routed()
        if any(
            movement.steps(w, routed.get(w.worker_id, ())) != Steps() for w in self._reachable()
        ):
            return movement
        if detour := movement.detour():
            expert, worker_id = detour
            self._guests[expert] = worker_id
            text = f"{expert} goes by way of {worker_id}: where it moves to has no room yet"
            self.history.note(now, "detour", text, expert=str(expert), worker_id=worker_id)
        elif self.target and movement.is_stuck:
            self.target = replace(self.target, workers_by_expert=movement.where_it_is())
            text = "no memory to make these moves in: experts stay where they are"
            self.history.note(now, "moves_given_up", text, bad=True)
            self._stale = True
        return self._movement()

    # What is shown.

    def why_not_ready(self) -> str | None:
        """In words; None while every expert has a worker."""
        if self.target is None:
            if self._settled_at_s is not None:
                return "waiting for the workers of an earlier life to come back"
            there = len(self.members.workers)
            return self._shortage or f"{there} of {self._workers_needed} workers are registered"
        if self.plan is not None and self.plan.complete:
            return None
        there = len(self.plan.experts) if self.plan else 0
        note = self._note(self.target)
        return f"{there} of {len(self._experts)} experts are served" + (note and f": {note}")

    @property
    def epoch(self) -> int:
        """The newest that anybody has heard of."""
        return self._epoch

    def current_plan(self) -> pb.Plan:
        """The published plan; before the first, one of epoch 0 that says what is awaited."""
        if self.plan is not None:
            return self.plan
        return pb.Plan(model_fingerprint=self._fingerprint, note=self.why_not_ready() or "")

    def states(self) -> list[str]:
        """Of each live worker."""
        wanted = self.target.experts_by_worker() if self.target else {}
        return [w.state(wanted.get(w.worker_id, ())) for w in self.members.workers.values()]

    def status(self, now: float, unix_s: float = 0.0) -> pb.MeshStatus:
        """Everything a person may want to see; ``unix_s`` is what ``now`` is called outside."""
        wanted = self.target.experts_by_worker() if self.target else {}
        rebalanced_s, before = self._rebalanced or (now - unix_s, 0.0)
        return pb.MeshStatus(
            plan=self.current_plan(),
            workers=[
                pb.WorkerStatus(
                    worker=w.info,
                    state=w.state(wanted.get(w.worker_id, ())),
                    resident=[expert_to_proto(e) for e in sorted(w.resident)],
                    rows_per_s=self._worker_load.rate(w.worker_id, now),
                    queue_rows=w.queue_rows,
                    age_s=now - w.last_seen_s,
                    error=w.error,
                    faulty=map(expert_to_proto, self.faults.of(w.worker_id)),
                )
                for _, w in sorted(self.members.workers.items())
            ],
            gateways=[
                pb.GatewayStatus(gateway=g.report, age_s=now - g.last_seen_s)
                for _, g in sorted(self.members.gateways.items())
            ],
            balancedness=self.balancedness(now),
            balancedness_before=before,
            rebalanced_at_unix_s=unix_s + rebalanced_s - now,
            moves=self.moves,
            replicas=self.num_replicas(),
            events=[
                pb.MeshEvent(at_unix_s=unix_s + e.at_s - now, kind=e.kind, text=e.text)
                for e in self.history.latest
            ],
        )

    def balancedness(self, now: float) -> float:
        """Of the rows that workers compute, over those that hold experts."""
        holders = [w for w in self.members.workers.values() if w.resident]
        return balancedness(self._worker_load.rate(w.worker_id, now) for w in holders)

    def num_missing(self) -> int:
        """Experts that nobody serves."""
        return len(self._experts) - len(self._serving)

    def num_replicas(self) -> int:
        """Workers that serve an expert beside its first."""
        return sum(map(len, self._placed.values())) - len(self._serving)

    # Between them.

    @property
    def _workers_needed(self) -> int:
        return max(self._config.min_workers, self._rules.workers_needed)

    def _fix_shards(self, shards: int) -> None:
        """Experts are cut into so many slices, for good."""
        if shards not in possible_shards(self._rules.num_experts, self._expert_hidden_size):
            raise PlacementError(
                f"{self._rules.num_experts} experts of hidden size {self._expert_hidden_size} "
                f"cannot be cut into {shards}: it must divide the size, and the slices of a layer "
                "be no more than 1023; choose another --expert-shards"
            )
        self._rules = replace(self._rules, shards=shards)
        self._experts = frozenset(self._rules.experts)
        self._shards_are_fixed = True

    def _adopt_shards(self, worker_id: str, shards: int) -> None:
        """What a worker that comes back holds counts in so many slices."""
        if not self._shards_are_fixed:
            self._fix_shards(shards)
        if shards != self._rules.shards:
            raise ModelMismatch(
                f"worker {worker_id} holds experts cut into {shards}, this mesh has them cut into "
                f"{self._rules.shards}: restart the worker, or placement with --expert-shards"
            )

    def _hear_epoch(self, epoch: int, now: float) -> None:
        """Someone has seen this epoch. One that we did not give was given by another placement,
        which knew more: then ours is stale, and we start over from what workers report."""
        if epoch <= self._epoch:
            return
        if self.plan is not None:
            text = (
                f"another placement has given epoch {epoch}, ours is {self._epoch}: starting over"
            )
            self.history.note(now, "fenced", text, bad=True, epoch=epoch, ours=self._epoch)
            self.plan = self.target = None
            self._place({})
            self._guests.clear()
            self._settled_at_s = now + self._config.settle_s
            self._stale = True
        self._epoch = epoch

    def _known(self, experts: Collection[pb.ExpertId]) -> frozenset[ExpertId]:
        return frozenset(map(expert_from_proto, experts)) & self._experts

    def _lose(self, worker: Worker, now: float, kind: str, text: str) -> None:
        self._orders.pop(worker.lease_id, None)
        self._worker_load.forget(worker.worker_id)
        self.faults.forget(worker.worker_id)
        self._stale = True
        self._note_loss(worker, now, kind, text)

    def _note_loss(self, worker: Worker, now: float, kind: str, text: str) -> None:
        """A repair begins with the loss of a worker that rows went to."""
        if worker.worker_id in self._placed and self._incomplete_since_s is None:
            self._incomplete_since_s = now
        facts = {"worker_id": worker.worker_id, "draining": worker.draining}
        self.history.note(now, kind, text, bad=not worker.draining, **facts)

    def _note_draining(self, worker_id: str, now: float) -> None:
        self._stale = True
        text = f"{worker_id} is leaving"
        self.history.note(now, "worker_draining", text, worker_id=worker_id)

    def _reachable(self) -> list[Worker]:
        return [w for w in self.members.workers.values() if not w.cut_off]

    def _movement(self) -> Movement:
        """As things are; made anew only when they have changed, since it takes a while."""
        workers = self._reachable()
        facts = (
            self._rules,
            self.target or Target(),
            [(w.info, w.resident, w.draining) for w in workers],
            dict(self._guests),
            self.faults.out,
        )
        if self._moved is None or self._moved[0] != facts:
            before = self._moved[1] if self._moved and self._moved[0][0] == self._rules else None
            self._moved = (
                facts,
                Movement(self._rules, facts[1], workers, self._guests, self.faults.out, before),
            )
        return self._moved[1]

    def _has_arrived(self, expert: ExpertId) -> bool:
        target = self.target.workers_by_expert.get(expert, ()) if self.target else ()
        workers = self.members.workers
        return all(w in workers and expert in workers[w].resident for w in target)

    def _traffic_now(self, now: float) -> dict[ExpertId, float]:
        return self._traffic.rates(self._experts, now)

    def _may_plan(self, now: float) -> bool:
        if self.target is not None:
            return True
        workers = self._reachable()
        if self._settled_at_s is not None:
            # Workers of an earlier life: adopt what they serve once all had time to come back.
            resident = frozenset().union(*(w.resident for w in workers))
            return now >= self._settled_at_s or resident == self._experts
        return sum(not w.draining for w in workers) >= self._workers_needed

    def _homes(self, staying: Collection[Worker]) -> Mapping[str, Collection[ExpertId]]:
        """Where each expert counts as living already: where it is planned to be, unless the
        worker failed to load it; else where it is."""
        planned = self.target.experts_by_worker() if self.target else {}
        homes: dict[str, Collection[ExpertId]] = {}
        for worker in staying:
            here = planned.get(worker.worker_id, frozenset())
            homes[worker.worker_id] = here & worker.resident if worker.error else here
        elsewhere = self._experts.difference(*homes.values())
        for worker in staying:
            if stranded := elsewhere & worker.resident:
                homes[worker.worker_id] = stranded.union(homes[worker.worker_id])
        return homes

    def _gateways_follow(self) -> bool:
        """Every gateway has the plan."""
        plan = self.plan
        return plan is not None and all(
            g.report.epoch >= plan.epoch for g in self.members.gateways.values()
        )

    def _routed(self) -> Mapping[str, Collection[ExpertId]]:
        """What gateways may still send to each worker: everything, until all have the plan."""
        if self.plan is None or not self._gateways_follow():
            return {w.worker_id: w.resident for w in self.members.workers.values()}
        return self._placed

    def _place(self, serving: Mapping[ExpertId, tuple[str, ...]]) -> None:
        """Take over where experts are served from now on."""
        changed = [e for e, ids in serving.items() if self._serving.get(e) != ids]
        changed += self._serving.keys() - serving.keys()
        for expert in changed:
            ids = serving.get(expert, ())
            for worker_id in self._serving.get(expert, ()):
                self._placed[worker_id].discard(expert)
            for worker_id in ids:
                self._placed.setdefault(worker_id, set()).add(expert)
            self._placements[expert] = pb.ExpertPlacement(
                expert=expert_to_proto(expert), worker_ids=ids
            )
        self._placed = {w: experts for w, experts in self._placed.items() if experts}
        self._serving = serving

    def _note(self, target: Target) -> str:
        errors = [
            f"worker {w.worker_id}: {w.error}" for w in self.members.workers.values() if w.error
        ]
        return "; ".join([note for note in (target.note, *errors[:_MAX_ERRORS_IN_NOTE]) if note])
