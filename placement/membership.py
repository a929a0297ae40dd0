"""Who is there. Pure: ``now`` is passed in, leases are told to it and not made by it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mesh.errors import AlreadyExists
from mesh.plan import ExpertId
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

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    def state(self, wanted: Collection[ExpertId]) -> str:
        """registered, loading, ready or draining, where ``wanted`` is what it should hold."""
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
        self.workers[info.worker_id] = Worker(info, lease_id, now, frozenset(resident))
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

    def next_expiry_s(self) -> float | None:
        """When :meth:`expire` may have something to do."""
        seen = [w.last_seen_s for w in self.workers.values()]
        seen += [g.last_seen_s for g in self.gateways.values()]
        return min(seen) + self._lease_s if seen else None
