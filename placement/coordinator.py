"""What placement decides, apart from how it is told and whom it tells. Pure: ``now`` is passed in.

A target says where experts should live (:mod:`placement.planner`); workers load towards it; the
plan that gateways route by holds only what is resident on live workers. An expert moves by
being loaded there, published there, and unloaded here once every gateway has that plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping

from mesh.errors import Overloaded, PlacementError
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from placement.load import LoadAverage, balancedness
from placement.membership import Gateway, Membership, Worker
from placement.planner import (
    REPAIR_MOVE_PRICE,
    Rules,
    Target,
    WorkerSpec,
    link_cost,
    plan,
)
from protos import placement_pb2 as pb

MAX_MEMBERS = 16_384
_RETRY_ORDER_S = 5.0
_MAX_ERRORS_IN_NOTE = 3


class Coordinator:
    """The state of one mesh. Every method is instant but the function :meth:`next_target` gives.

    A turn is: :meth:`expire`, :meth:`publish`, :meth:`orders`; and when :meth:`next_target` has
    something to compute, :meth:`adopt` its result and take another.
    """

    def __init__(
        self,
        rules: Rules,
        fingerprint: str,
        *,
        min_workers: int,
        settle_s: float,
        lease_s: float,
    ) -> None:
        self.members = Membership(lease_s)
        self.plan: pb.Plan | None = None
        """As published last; None before the first."""
        self.target: Target | None = None
        self._rules = rules
        self._experts = frozenset(rules.experts)
        self._fingerprint = fingerprint
        self._workers_needed = max(min_workers, rules.workers_needed)
        self._settle_s = settle_s
        self._settled_at_s: float | None = None
        self._epoch = 0
        self._stale = False
        self._shortage = ""
        self._traffic: LoadAverage[ExpertId] = LoadAverage()
        self._worker_load: LoadAverage[str] = LoadAverage()
        self._orders: dict[str, tuple[pb.WorkerOrder, float]] = {}

    # What is heard.

    def register(self, request: pb.RegisterRequest, lease_id: str, now: float) -> Worker | None:
        """A worker, perhaps of an earlier life of placement. See :meth:`Membership.register`."""
        if len(self.members.workers) >= MAX_MEMBERS:
            raise Overloaded(f"{MAX_MEMBERS} workers are registered, which is the limit")
        resident = self._known(request.resident)
        earlier = self.members.register(request.worker, lease_id, resident, now)
        if earlier:
            self._orders.pop(earlier.lease_id, None)
        if resident and self._settled_at_s is None:
            self._settled_at_s = now + self._settle_s
        self._epoch = max(self._epoch, request.last_epoch)
        self._stale = True
        return earlier

    def report(self, worker: Worker, report: pb.WorkerReport, now: float) -> bool:
        """A heartbeat. True when there may be something to decide."""
        was_draining = worker.draining
        changed = self.members.report(worker, report, self._known(report.resident), now)
        self._stale |= worker.draining != was_draining
        self._worker_load.observe(worker.worker_id, sum(load.rows for load in report.load), now)
        return changed

    def gateway_report(self, report: pb.GatewayReport, now: float) -> bool:
        """A gateway's load and epoch. True when there may be something to decide."""
        known = self.members.gateways.get(report.gateway_id)
        if known is None and len(self.members.gateways) >= MAX_MEMBERS:
            raise Overloaded(f"{MAX_MEMBERS} gateways report, which is the limit")
        self.members.gateways[report.gateway_id] = Gateway(report, now)
        self._epoch = max(self._epoch, report.epoch)
        for load in report.load:
            expert = expert_from_proto(load.expert)
            if expert in self._experts:
                self._traffic.observe(expert, load.rows, now)
        return known is None or known.report.epoch != report.epoch

    def gateway_gone(self, gateway_id: str) -> None:
        """A gateway's stream ended."""
        self.members.gateways.pop(gateway_id, None)

    def drop(self, lease_id: str) -> Worker | None:
        """A worker's stream ended. Returns the worker unless its lease had ended before."""
        worker = self.members.drop(lease_id)
        if worker:
            self._forget(worker)
        return worker

    def expire(self, now: float) -> list[Worker]:
        """Workers that have been silent for too long are gone."""
        dead = self.members.expire(now)
        for worker in dead:
            self._forget(worker)
        return dead

    def drain(self, worker_id: str) -> None:
        """Move everything away from a worker. PlacementError when there is none of the name."""
        worker = self.members.workers.get(worker_id)
        if worker is None:
            raise PlacementError(f"no worker {worker_id!r}: `expert-mesh status` names them")
        worker.draining = True
        self._stale = True

    def next_deadline_s(self) -> float | None:
        """When time alone may change something."""
        times = [self.members.next_expiry_s()]
        if self.target is None and self._stale:
            times.append(self._settled_at_s)
        return min((t for t in times if t is not None), default=None)

    # What is decided.

    def next_target(
        self, now: float, *, move_price: float = REPAIR_MOVE_PRICE, forced: bool = False
    ) -> Callable[[], Target] | None:
        """The computation of a new target, if one is due: slow, and safe to run in a thread.

        Give its result to :meth:`adopt`, the words of its PlacementError to :meth:`note_shortage`.
        """
        if not (self._stale or forced) or not self._may_plan(now):
            return None
        self._stale = False
        staying = [w for w in self.members.workers.values() if not w.draining]
        gateway_hosts = [g.report.host for g in self.members.gateways.values()]
        specs = [
            WorkerSpec(
                w.worker_id,
                w.info.memory_bytes,
                w.info.expert_bytes,
                link_cost(w.info.host, w.info.nics, gateway_hosts),
            )
            for w in staying
        ]
        return functools.partial(
            plan,
            self._rules,
            specs,
            homes=self._homes(staying),
            traffic={e: self._traffic.rate(e, now) for e in self._experts},
            move_price=move_price,
            # Only a mesh that serves nothing yet can wait for better days.
            partial=self.target is not None or self._settled_at_s is not None,
        )

    def adopt(self, target: Target) -> int:
        """Work towards a target from now on. Returns how many experts it moves."""
        before = self.target.workers_by_expert if self.target else {}
        self.target = target
        return sum(
            1
            for expert in self._experts
            if before.get(expert) and before.get(expert) != target.workers_by_expert.get(expert)
        )

    def note_shortage(self, shortage: str) -> None:
        """The first target could not be made: say so until workers come."""
        self._shortage = shortage

    def publish(self) -> bool:
        """Bring :attr:`plan` up to date; True when that made a new epoch."""
        if self.target is None:
            return False
        serving = self._serving()
        ids = sorted({worker_id for ids in serving.values() for worker_id in ids})
        fresh = pb.Plan(
            epoch=self._epoch,
            model_fingerprint=self._fingerprint,
            workers=[self.members.workers[worker_id].info for worker_id in ids],
            experts=[
                pb.ExpertPlacement(expert=expert_to_proto(e), worker_ids=serving[e])
                for e in sorted(serving)
            ],
            experts_per_worker=self._rules.experts_per_worker,
            note=self._note(self.target),
            complete=len(serving) == len(self._experts),
            # Also what a worker had that died since the target was made: a new one is on its way.
            pending=[
                expert_to_proto(e)
                for e in sorted(self._experts - serving.keys() - set(self.target.missing))
            ],
        )
        if fresh == self.plan or (self.plan is None and not serving):
            return False
        fresh.epoch = self._epoch = self._epoch + 1
        self.plan = fresh
        return True

    def orders(self, now: float, listening: Collection[str]) -> list[tuple[str, pb.WorkerOrder]]:
        """What those who listen, by lease, have to be told that they were not told yet."""
        target = self.target or Target()
        wanted_by_worker = target.experts_by_worker()
        routed = self._routed()
        epoch = self._epoch  # what anybody has heard of, or a worker would not obey
        nobody_routes = self.plan is None and self._settled_at_s is None
        told = []
        for worker in self.members.workers.values():
            if worker.lease_id not in listening:
                continue
            wanted = wanted_by_worker.get(worker.worker_id, set())
            here = routed.get(worker.worker_id, set())
            staying = not worker.draining
            order = pb.WorkerOrder(
                load=[expert_to_proto(e) for e in sorted(wanted - worker.resident) if staying],
                unload=[
                    expert_to_proto(e) for e in sorted(worker.resident - wanted - here) if staying
                ],
                epoch=epoch,
                leave=worker.draining
                and (nobody_routes or (not self._stale and here <= set(target.missing))),
            )
            nothing = pb.WorkerOrder(epoch=epoch)
            last, told_s = self._orders.get(worker.lease_id, (nothing, now))
            failed = worker.error and order.load and now - told_s >= _RETRY_ORDER_S
            if order != last or failed:
                self._orders[worker.lease_id] = (order, now)
                told.append((worker.lease_id, order))
        return told

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

    def current_plan(self) -> pb.Plan:
        """The published plan; before the first, one of epoch 0 that says what is awaited."""
        if self.plan is not None:
            return self.plan
        return pb.Plan(model_fingerprint=self._fingerprint, note=self.why_not_ready() or "")

    def states(self) -> list[str]:
        """Of each live worker."""
        wanted = self.target.experts_by_worker() if self.target else {}
        return [w.state(wanted.get(w.worker_id, ())) for w in self.members.workers.values()]

    def status(self, now: float) -> pb.MeshStatus:
        """Everything a person may want to see."""
        wanted = self.target.experts_by_worker() if self.target else {}
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
                )
                for _, w in sorted(self.members.workers.items())
            ],
            gateways=[
                pb.GatewayStatus(gateway=g.report, age_s=now - g.last_seen_s)
                for _, g in sorted(self.members.gateways.items())
            ],
            balancedness=self.balancedness(now),
        )

    def balancedness(self, now: float) -> float:
        """Of the rows that workers compute, over those that hold experts."""
        holders = [w for w in self.members.workers.values() if w.resident]
        return balancedness(self._worker_load.rate(w.worker_id, now) for w in holders)

    def num_missing(self) -> int:
        """Experts that nobody serves."""
        return len(self._experts) - (len(self.plan.experts) if self.plan else 0)

    def _known(self, experts: Collection[pb.ExpertId]) -> frozenset[ExpertId]:
        return frozenset(map(expert_from_proto, experts)) & self._experts

    def _forget(self, worker: Worker) -> None:
        self._orders.pop(worker.lease_id, None)
        self._worker_load.forget(worker.worker_id)
        self._stale = True

    def _may_plan(self, now: float) -> bool:
        if self.target is not None:
            return True
        workers = self.members.workers.values()
        if self._settled_at_s is not None:
            # Workers of an earlier life: adopt what they serve once all had time to come back.
            resident = frozenset().union(*(w.resident for w in workers))
            return now >= self._settled_at_s or resident == self._experts
        return sum(not w.draining for w in workers) >= self._workers_needed

    def _homes(self, staying: Collection[Worker]) -> Mapping[str, Collection[ExpertId]]:
        """Where each expert counts as living already: where it is planned to be and is; else
        where it is; else where it is on its way to."""
        homes: dict[str, set[ExpertId]] = {w.worker_id: set() for w in staying}
        holders: dict[ExpertId, set[str]] = {}
        for worker in staying:
            for expert in worker.resident:
                holders.setdefault(expert, set()).add(worker.worker_id)
        target = self.target.workers_by_expert if self.target else {}
        for expert in self._experts:
            holding = holders.get(expert, set())
            planned = {w for w in target.get(expert, ()) if w in homes}
            for worker_id in (planned & holding) or holding or planned:
                homes[worker_id].add(expert)
        return homes

    def _serving(self) -> dict[ExpertId, tuple[str, ...]]:
        """Where rows may go: planned workers that have the expert, else any that has it."""
        planned: dict[ExpertId, list[str]] = {}
        others: dict[ExpertId, list[str]] = {}
        target = self.target.workers_by_expert if self.target else {}
        for worker_id, worker in sorted(self.members.workers.items()):
            for expert in worker.resident:
                right = worker_id in target.get(expert, ()) and not worker.draining
                (planned if right else others).setdefault(expert, []).append(worker_id)
        return {e: tuple(ids) for e, ids in {**others, **planned}.items()}

    def _routed(self) -> dict[str, set[ExpertId]]:
        """What gateways may still send to each worker: everything, until all have the plan."""
        plan = self.plan
        if plan is None or any(g.report.epoch < plan.epoch for g in self.members.gateways.values()):
            return {w.worker_id: set(w.resident) for w in self.members.workers.values()}
        routed: dict[str, set[ExpertId]] = {}
        for placement in plan.experts:
            for worker_id in placement.worker_ids:
                routed.setdefault(worker_id, set()).add(expert_from_proto(placement.expert))
        return routed

    def _note(self, target: Target) -> str:
        errors = [
            f"worker {w.worker_id}: {w.error}" for w in self.members.workers.values() if w.error
        ]
        return "; ".join([note for note in (target.note, *errors[:_MAX_ERRORS_IN_NOTE]) if note])
