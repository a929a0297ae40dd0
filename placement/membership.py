"""Who is there, and whom the gateways reach. Pure: ``now`` is passed in, leases are told to it and
not made by it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from mesh.errors import AlreadyExists
from mesh.plan import ExpertId
from placement import quarantine
from protos import placement_pb2 as pb


@dataclass
class Worker:
    """A live worker, as it last said of itself."""

    info: pb.WorkerInfo
    lease_id: str
    last_seen_s: float
    resident: frozenset[ExpertId]
    queue_rows: int = 0
    error: str = ""
    draining: bool = False
    cut_off: bool = False
    """It has its lease, but rows do not reach it: it counts as lost until they do again."""
    cut_off_at_s: float = -math.inf
    quarantine_s: float = 0.0
    """How long it is cut off at least. Doubles each time that it does not last."""

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    def state(self, wanted: Collection[ExpertId]) -> str:
        """In a word, as WorkerStatus has them; ``wanted`` is what it should hold."""
        if self.cut_off:
            return "unreachable"
        if self.draining:
            return "draining"
        if not self.resident.issuperset(wanted):
            return "loading"
        return "ready" if self.resident else "registered"


@dataclass
class Gateway:
    """A gateway that reports."""

    report: pb.GatewayReport
    last_seen_s: float


class Membership:
    """Live workers and gateways. A worker that is not heard of for ``lease_s`` is dead."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._overdue_s = lease_s / 2  # a heartbeat comes every lease_s / 2.5, or sooner
        self.workers: dict[str, Worker] = {}
        self.gateways: dict[str, Gateway] = {}

    def register(
        self, info: pb.WorkerInfo, lease_id: str, resident: Collection[ExpertId], now: float
    ) -> Worker | None:
        """Start a lease. Returns the worker's earlier self if it had not ended yet.

        AlreadyExists when another process holds the id.
        """
        held = self.workers.get(info.worker_id)
        if held and (held.info.pid, held.info.grpc_address) != (info.pid, info.grpc_address):
            raise AlreadyExists(
                f"a worker {info.worker_id} lives at {held.info.grpc_address} "
                f"(pid {held.info.pid}); choose another --worker-id"
            )
        worker = self.workers[info.worker_id] = Worker(info, lease_id, now, frozenset(resident))
        if held:
            worker.cut_off, worker.cut_off_at_s = held.cut_off, held.cut_off_at_s
            worker.quarantine_s = held.quarantine_s
        return held

    def by_lease(self, lease_id: str) -> Worker | None:
        """The worker that holds the lease, if it still counts."""
        return next((w for w in self.workers.values() if w.lease_id == lease_id), None)

    def report(
        self, worker: Worker, report: pb.WorkerReport, resident: Collection[ExpertId], now: float
    ) -> bool:
        """Take a heartbeat in. True when it says something that a plan depends on."""
        before = (worker.resident, worker.error, worker.draining)
        worker.last_seen_s = now
        worker.queue_rows = report.queue_rows
        worker.resident = frozenset(resident)
        worker.error = report.error
        worker.draining = worker.draining or report.draining
        return before != (worker.resident, worker.error, worker.draining)

    def drop(self, lease_id: str) -> Worker | None:
        """End a lease. Returns the worker, or None when it had ended before."""
        worker = self.by_lease(lease_id)
        return self.workers.pop(worker.worker_id) if worker else None

    def expire(self, now: float) -> list[Worker]:
        """End the leases of those that have been silent for too long, and forget such gateways."""
        silent_since = now - self._lease_s
        dead = [w for w in self.workers.values() if w.last_seen_s <= silent_since]
        for worker in dead:
            del self.workers[worker.worker_id]
        for gateway_id in [i for i, g in self.gateways.items() if g.last_seen_s <= silent_since]:
            del self.gateways[gateway_id]
        return dead

    def judge(self, placed: Collection[str], now: float) -> tuple[list[Worker], list[Worker]]:
        """Whom the gateways do not reach any more, and whom they do again.

        A worker is cut off when most gateways say so, or when one does and its heartbeat is
        overdue. A gateway that reaches none of ``placed``, those that rows go to, is cut off
        itself: what it says of others does not count. A worker is back when no longer cut
        off by that rule, heard of since, and its quarantine is over: one that comes and goes
        stays out for longer each time.
        """
        lost: list[Worker] = []
        back: list[Worker] = []
        votes, most = self._votes(placed)
        for worker in self.workers.values():
            count = votes.get(worker.worker_id, 0)
            overdue = now >= worker.last_seen_s + self._overdue_s
            is_out = count > most or (count > 0 and overdue)
            if is_out and not worker.cut_off:
                calm = now - worker.cut_off_at_s > quarantine.FORGIVEN_AFTER_S
                worker.quarantine_s = quarantine.next_s(0.0 if calm else worker.quarantine_s)
                worker.cut_off, worker.cut_off_at_s = True, now
                lost.append(worker)
            elif worker.cut_off and not is_out and self._may_return(worker, now):
                worker.cut_off = False
                back.append(worker)
        return lost, back

    def doubted(self) -> set[str]:
        """Workers that share a host with one that is cut off, and were not heard of since.

        The link of a host takes all of its workers away at once, and only those that rows go to
        are missed at once.
        """
        cut_off_s: dict[str, float] = {}
        for worker in self.workers.values():
            if worker.cut_off:
                before_s = cut_off_s.get(worker.info.host, -math.inf)
                cut_off_s[worker.info.host] = max(before_s, worker.cut_off_at_s)
        return {
            worker.worker_id
            for worker in self.workers.values()
            if worker.last_seen_s <= cut_off_s.get(worker.info.host, -math.inf)
        }

    def _votes(self, placed: Collection[str]) -> tuple[dict[str, int], float]:
        """How many gateways that may be believed name each worker, and half their number."""
        named = [set(g.report.unreachable_worker_ids) for g in self.gateways.values()]
        believed = [ids for ids in named if len(placed) < 2 or not ids.issuperset(placed)]
        votes: dict[str, int] = {}
        for ids in believed:
            for worker_id in ids:
                votes[worker_id] = votes.get(worker_id, 0) + 1
        return votes, len(believed) / 2

    @staticmethod
    def _may_return(worker: Worker, now: float) -> bool:
        heard = worker.last_seen_s > worker.cut_off_at_s
        return heard and now >= worker.cut_off_at_s + worker.quarantine_s

    def next_deadline_s(self, now: float) -> float | None:
        """When :meth:`expire` or :meth:`judge` may have something to do because of time alone."""
        workers = self.workers.values()
        times = [w.last_seen_s + self._lease_s for w in workers]
        times += [g.last_seen_s + self._lease_s for g in self.gateways.values()]
        named = {w for g in self.gateways.values() for w in g.report.unreachable_worker_ids}
        judged = [w.cut_off_at_s + w.quarantine_s for w in workers if w.cut_off]
        judged += [w.last_seen_s + self._overdue_s for w in workers if w.worker_id in named]
        return min([*times, *(at_s for at_s in judged if at_s > now)], default=None)
