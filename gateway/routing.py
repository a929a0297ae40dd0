"""From placement's plan to the engine's routing: which workers this gateway is connected to.

The last plan is kept while placement is away: serving never needs it.
"""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.engine_link import EngineLink
from mesh.config import GatewayConfig
from mesh.grpc_server import TlsFiles, open_channel
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto, shards_of
from mesh.wire import HEALTH_NAME, MAX_EXPERTS, MAX_SESSIONS
from protos import engine_pb2, placement_pb2, placement_pb2_grpc, worker_pb2, worker_pb2_grpc

log = structlog.get_logger()

REPORT_INTERVAL_S = 1.0
_CONNECT_TIMEOUT_S = 2.0
_CONNECT_TOGETHER_S = 0.1
"""How long the first of several connections waits for the others before it is used."""
_LOST_PEER_PAUSE_S = 0.5
_TAKEOVER_TIMEOUT_S = 5.0
_DISCONNECT_TRIES = 40
"""Over three minutes: a worker that hangs, or whose link is cut, is back or gone by then."""
_HEALTH_TIMEOUT_S = 0.3
_HEALTH_CHECKS = 2


def routing_for(
    plan: placement_pb2.Plan, peers: Mapping[str, engine_pb2.Peer], transport_number: int = 0
) -> engine_pb2.Routing:
    """The plan as far as ``peers``, by worker id, are connected.

    What has a worker that is not connected may be served soon: once it is, or once placement
    knows what this gateway knows.
    """
    experts = [
        placement_pb2.ExpertPlacement(
            expert=placed.expert, worker_ids=[w for w in placed.worker_ids if w in peers]
        )
        for placed in plan.experts
    ]
    return engine_pb2.Routing(
        epoch=plan.epoch,
        peers=[peers[worker_id] for worker_id in sorted(peers)],
        experts=[placed for placed in experts if placed.worker_ids],
        pending=[*plan.pending, *(p.expert for p in experts if not p.worker_ids)],
        expert_shards=plan.expert_shards,
        transport_number=transport_number,
    )


def missing_experts(model: ModelConfig, routing: engine_pb2.Routing) -> list[ExpertId]:
    """Experts, or slices of them, that no connected worker serves, ascending."""
    served = {expert_from_proto(placed.expert) for placed in routing.experts}
    units = range(model.num_experts * max(1, routing.expert_shards))
    every = (ExpertId(layer, i) for layer in model.moe_layers for i in units)
    return [expert for expert in every if expert not in served]


def load_between(
    before: engine_pb2.EngineStats, after: engine_pb2.EngineStats
) -> list[placement_pb2.ExpertLoad]:
    """Rows dispatched between two stats, of the experts that had any."""
    old = {expert_from_proto(load.expert): load.rows for load in before.load}
    grown = ((load, load.rows - old.get(expert_from_proto(load.expert), 0)) for load in after.load)
    return [
        placement_pb2.ExpertLoad(expert=load.expert, rows=rows) for load, rows in grown if rows > 0
    ]


def backoff_s(attempt: int) -> float:
    """Pause before try ``attempt`` (0, 1, ...): 0.1 s doubling to 5 s, less up to a half."""
    return min(0.1 * (1 << min(attempt, 10)), 5.0) * random.uniform(0.5, 1.0)


async def why_not_well(channel: grpc.aio.Channel) -> str | None:
    """In words, why a worker's rows are not waited for; None when its health says that they come.

    A worker that does not answer is asked once more: it may have been busy for a moment.
    """
    request = health_pb2.HealthCheckRequest(service=HEALTH_NAME)
    for _ in range(_HEALTH_CHECKS):
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = await check(request, timeout=_HEALTH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            why = f"its health check failed: {_why(error)}"
        else:
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return None
            return "its health says that its data plane is stuck"
    return why


@dataclass(frozen=True)
class Connection:
    """A worker that granted this gateway a session."""

    worker: placement_pb2.WorkerInfo
    peer: engine_pb2.Peer
    channel: grpc.aio.Channel
    expert_shards: int
    """What the session's indices count; see :func:`mesh.plan.shards_of`."""


class Router:
    """Keeps the engine's routing true to the plan, and placement informed.

    ``on_change`` is called whenever :meth:`trouble` may say something else.
    """

    def __init__(
        self,
        config: GatewayConfig,
        gateway_id: str,
        model: ModelConfig,
        link: EngineLink,
        on_change: Callable[[], None],
    ) -> None:
        self._tls = TlsFiles.of(config)
        self._model = model
        self._link = link
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._placement_address = config.placement
        self._placement_channel = open_channel(config.placement, self._tls)
        self._placement = placement_pb2_grpc.PlacementStub(self._placement_channel)
        self._plan = placement_pb2.Plan()
        self._routing = engine_pb2.Routing()
        self._missing = missing_experts(model, self._routing)
        self._connections: dict[str, Connection] = {}
        self._unreachable: set[str] = set()
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._attempts: dict[str, int] = {}
        self._retry_at_s: dict[str, float] = {}
        self._last_session = random.randrange(MAX_SESSIONS)
        self._wake_reconcile = asyncio.Event()
        self._wake_report = asyncio.Event()
        self._retiring: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self._examining: dict[str, asyncio.Task[None]] = {}
        self._faults: dict[ExpertId, set[str]] = {}
        self._transport: engine_pb2.TransportReopened | None = None
        link.on_transport_reopened = self._on_transport_reopened
        link.on_peer_lost = self._on_peer_lost
        link.on_peer_late = self._on_peer_late
        link.on_expert_fault = self._on_expert_fault

    @property
    def num_workers(self) -> int:
        """Workers connected now."""
        return len(self._connections)

    def trouble(self) -> str | None:
        """Why requests cannot be served yet, in words; None when every expert is in reach."""
        if self._plan.epoch == 0:
            return f"no plan yet from placement at {self._placement_address}"
        missing = self._missing
        if not missing:
            return None
        return (
            f"no connected worker for expert {missing[0].index} of layer {missing[0].layer}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + (f"; placement says: {self._plan.note}" if self._plan.note else "")
        )

    async def run(self, identity: placement_pb2.GatewayReport) -> None:
        """Watch, connect and report until cancelled; every report says ``identity``.

        The engine has started.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_plan())
            tasks.create_task(self._reconcile_forever())
            tasks.create_task(self._report_forever(identity))

    async def close(self) -> None:
        """Give every session back, each by one try. The engine sends nothing any more."""
        self._closing.set()
        for task in (*self._examining.values(), *self._connecting.values()):
            task.cancel()
        for worker_id in list(self._connections):
            self._retire(self._connections.pop(worker_id), epoch=0)
        await asyncio.gather(*self._retiring)
        await self._placement_channel.close(None)

    # The plan.

    async def _watch_plan(self) -> None:
        attempt = 0
        while True:
            try:
                request = placement_pb2.WatchPlanRequest(gateway_id=self._gateway_id)
                async for plan in self._placement.WatchPlan(request):
                    attempt = 0
                    self._take_plan(plan)
            except grpc.aio.AioRpcError as error:
                if attempt == 0:
                    log.warning("placement_away", address=self._placement_address, why=_why(error))
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1

    def _take_plan(self, plan: placement_pb2.Plan) -> None:
        if plan.epoch < self._plan.epoch:
            log.warning("old_plan_ignored", epoch=plan.epoch, ours=self._plan.epoch)
        elif plan.epoch == self._plan.epoch > 0 and plan != self._plan:
            log.warning("rival_plan_ignored", epoch=plan.epoch)
        elif plan.epoch > 0 and plan.model_fingerprint != self._model.fingerprint:
            log.error(
                "plan_for_another_model",
                theirs=plan.model_fingerprint,
                ours=self._model.fingerprint,
                remedy="start placement and gateway on the same checkpoint",
            )
        elif self._model.num_experts * shards_of(plan) > MAX_EXPERTS:
            log.error(
                "plan_cuts_too_finely",
                slices=self._model.num_experts * shards_of(plan),
                most=MAX_EXPERTS,
                remedy="start placement with fewer --expert-shards",
            )
        else:
            log.info("plan", epoch=plan.epoch, workers=len(plan.workers), complete=plan.complete)
            self._plan = plan
            self._faults.clear()
            self._wake_reconcile.set()

    # Connections.

    async def _reconcile_forever(self) -> None:
        while True:
            self._wake_reconcile.clear()
            await self._reconcile()
            # A worker of a plan that came in the meantime was not tried yet: it has no time.
            now = time.monotonic()
            pauses = [self._retry_at_s.get(w, now) - now for w in self._unconnected()]
            try:
                async with asyncio.timeout(max(min(pauses), 0.0) if pauses else None):
                    await self._wake_reconcile.wait()
            except TimeoutError:
                pass  # time to try a worker again

    async def _reconcile(self) -> None:
        """Make connections follow the plan: first without who left, then with who came."""
        wanted = self._wanted()
        for worker_id, connection in list(self._connections.items()):
            worker = wanted.get(worker_id)
            if (
                worker is None
                or worker.ucx_address != connection.worker.ucx_address
                or connection.expert_shards != shards_of(self._plan)
            ):
                self._retire(self._connections.pop(worker_id), self._plan.epoch)
                self._retry_at_s.pop(worker_id, None)
        self._unreachable &= wanted.keys()
        self._publish()
        now = time.monotonic()
        due = [wanted[w] for w in self._unconnected() if self._retry_at_s.get(w, now) <= now]
        for worker in due:
            task = asyncio.create_task(self._connect(worker))
            self._connecting[worker.worker_id] = task
            task.add_done_callback(functools.partial(self._connect_ended, worker.worker_id))
        if due:
            # One that hangs holds up neither the others nor the next plan.
            await asyncio.wait(self._connecting.values(), timeout=_CONNECT_TOGETHER_S)
            self._publish()

    def _connect_ended(self, worker_id: str, task: asyncio.Task[None]) -> None:
        del self._connecting[worker_id]
        self._wake_reconcile.set()
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.error("connect_failed", worker_id=worker_id, exc_info=bug)
            self._note_unreachable(worker_id, repr(bug))

    def _wanted(self) -> dict[str, placement_pb2.WorkerInfo]:
        """Everybody that the plan names: placement asks also after those it sends no rows to."""
        return {worker.worker_id: worker for worker in self._plan.workers}

    def _unconnected(self) -> list[str]:
        """Who is wanted and neither connected nor being connected."""
        there = self._connections.keys() | self._connecting.keys()
        return [worker_id for worker_id in self._wanted() if worker_id not in there]

    async def _connect(self, worker: placement_pb2.WorkerInfo) -> None:
        started = self._link.started.result()
        transport = self._transport
        reply_session = self._new_session()
        expert_shards = shards_of(self._plan)
        channel = open_channel(worker.grpc_address, self._tls)
        try:
            reply = await worker_pb2_grpc.ExpertWorkerStub(channel).Connect(
                worker_pb2.ConnectRequest(
                    gateway_id=self._gateway_id,
                    ucx_address=transport.ucx_address if transport else started.ucx_address,
                    reply_session=reply_session,
                    model_fingerprint=self._model.fingerprint,
                    hidden_size=self._model.hidden_size,
                    dtype=started.dtype,
                    expert_shards=expert_shards,
                ),
                timeout=_CONNECT_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            await channel.close(None)
            self._note_unreachable(worker.worker_id, _why(error))
            return
        peer = engine_pb2.Peer(
            worker_id=worker.worker_id,
            ucx_address=reply.ucx_address,
            session=reply.session,
            reply_session=reply_session,
            max_rows=reply.max_rows,
        )
        connection = Connection(worker, peer, channel, expert_shards)
        if transport is not self._transport:
            self._retire(connection, epoch=0)  # it knows an address that is no more
            return
        self._connections[worker.worker_id] = connection
        self._unreachable.discard(worker.worker_id)
        self._attempts.pop(worker.worker_id, None)
        log.info("worker_connected", worker_id=worker.worker_id, address=worker.grpc_address)

    def _new_session(self) -> int:
        """A session of no live connection and of none that ended lately; never 0."""
        taken = {0, *(connection.peer.reply_session for connection in self._connections.values())}
        while True:
            self._last_session = (self._last_session + 1) % MAX_SESSIONS
            if self._last_session not in taken:
                return self._last_session

    def _note_unreachable(self, worker_id: str, why: str) -> None:
        attempt = self._attempts.get(worker_id, 0)
        self._attempts[worker_id] = attempt + 1
        self._retry_at_s[worker_id] = time.monotonic() + backoff_s(attempt)
        if worker_id not in self._unreachable:
            log.warning("worker_unreachable", worker_id=worker_id, why=why)
            self._unreachable.add(worker_id)
            self._wake_report.set()

    def _on_peer_lost(self, lost: engine_pb2.PeerLost) -> None:
        connection = self._connection(lost.worker_id, lost.reply_session)
        if connection is not None:
            self._give_up(connection, lost.reason)

    def _on_transport_reopened(self, reopened: engine_pb2.TransportReopened) -> None:
        log.warning("connecting_anew", workers=len(self._connections))
        self._transport = reopened
        for worker_id in list(self._connections):
            self._retire(self._connections.pop(worker_id), epoch=0)
        self._publish()
        self._wake_reconcile.set()

    def _on_peer_late(self, late: engine_pb2.PeerLate) -> None:
        connection = self._connection(late.worker_id, late.reply_session)
        if connection is not None and late.worker_id not in self._examining:
            task = asyncio.create_task(self._examine(connection, late.reason))
            self._examining[late.worker_id] = task
            task.add_done_callback(lambda _: self._examining.pop(late.worker_id))

    def _on_expert_fault(self, fault: engine_pb2.ExpertFault) -> None:
        self._faults.setdefault(expert_from_proto(fault.expert), set()).add(fault.worker_id)
        self._wake_report.set()

    async def _examine(self, connection: Connection, reason: str) -> None:
        """Ask a worker that is late whether it is well, and do without it where it is not."""
        worker_id = connection.worker.worker_id
        why = await why_not_well(connection.channel)
        if why is None:
            log.info("worker_slow", worker_id=worker_id, reason=reason)
        elif self._connections.get(worker_id) is connection:
            drop = engine_pb2.DropPeer(
                worker_id=worker_id,
                reply_session=connection.peer.reply_session,
                reason=f"{reason}, and {why}",
            )
            self._link.drop_peer(drop)
            self._give_up(connection, drop.reason)

    def _connection(self, worker_id: str, reply_session: int) -> Connection | None:
        """To a worker, unless it is another one than the engine spoke of."""
        connection = self._connections.get(worker_id)
        if connection is None or connection.peer.reply_session != reply_session:
            return None
        return connection

    def _give_up(self, connection: Connection, reason: str) -> None:
        """Route around a worker; try to connect it anew after a while."""
        worker_id = connection.worker.worker_id
        del self._connections[worker_id]
        self._note_unreachable(worker_id, reason)
        self._retry_at_s[worker_id] = time.monotonic() + _LOST_PEER_PAUSE_S
        self._retire(connection, epoch=0)
        self._publish()
        self._wake_reconcile.set()

    def _publish(self) -> None:
        """Tell the engine, where something changed."""
        shards = shards_of(self._plan)
        peers = {w: c.peer for w, c in self._connections.items() if c.expert_shards == shards}
        number = self._transport.transport_number if self._transport else 0
        routing = routing_for(self._plan, peers, number)
        if routing != self._routing:
            self._routing = routing
            self._missing = missing_experts(self._model, routing)
            self._link.route(routing)
            self._on_change()

    def _retire(self, connection: Connection, epoch: int) -> None:
        """Give a session back once the engine routes by ``epoch``, beside everything else."""
        task = asyncio.create_task(self._disconnect(connection, epoch))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _disconnect(self, connection: Connection, epoch: int) -> None:
        try:
            async with asyncio.timeout(_TAKEOVER_TIMEOUT_S):
                await self._link.until_epoch(epoch)
        except TimeoutError:
            log.warning("engine_keeps_old_routing", epoch=epoch)
        try:
            await self._give_back(connection)
        finally:
            await connection.channel.close(None)

    async def _give_back(self, connection: Connection) -> None:
        """Tell the worker, again and again where the word is lost: it would keep the session."""
        worker = connection.worker
        request = worker_pb2.DisconnectRequest(
            gateway_id=self._gateway_id, session=connection.peer.session
        )
        stub = worker_pb2_grpc.ExpertWorkerStub(connection.channel)
        for attempt in range(_DISCONNECT_TRIES):
            newer = self._connections.get(worker.worker_id)
            if newer is not None and newer.worker.ucx_address == worker.ucx_address:
                return  # To grant the new session, it ended this one.
            try:
                await stub.Disconnect(request, timeout=_CONNECT_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if attempt == 0:
                    log.info("worker_gone", worker_id=worker.worker_id, why=_why(error))
            else:
                return
            try:
                async with asyncio.timeout(backoff_s(attempt)):
                    await self._closing.wait()
            except TimeoutError:
                continue
            return

    # Reports.

    async def _report_forever(self, identity: placement_pb2.GatewayReport) -> None:
        attempt = 0
        while True:
            try:
                await self._placement.ReportLoad(self._reports(identity))
                attempt = 0
            except grpc.aio.AioRpcError as error:
                log.debug("report_failed", why=_why(error))
            await asyncio.sleep(backoff_s(attempt))
            attempt += 1

    async def _reports(
        self, identity: placement_pb2.GatewayReport
    ) -> AsyncIterator[placement_pb2.GatewayReport]:
        reported = self._link.stats
        while True:
            self._wake_report.clear()
            stats = self._link.stats
            report = placement_pb2.GatewayReport(
                epoch=self._routing.epoch,
                load=load_between(reported, stats) if stats is not reported else (),
                running=stats.running,
                waiting=stats.waiting,
                kv_usage=stats.kv_usage,
                unreachable_worker_ids=sorted(self._unreachable),
                faults=[
                    placement_pb2.ExpertPlacement(
                        expert=expert_to_proto(expert), worker_ids=sorted(self._faults[expert])
                    )
                    for expert in sorted(self._faults)
                ],
            )
            report.MergeFrom(identity)
            yield report
            reported = stats
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._wake_report.wait()
            except TimeoutError:
                pass  # time for the next report


def _why(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
