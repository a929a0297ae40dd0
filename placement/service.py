"""The placement service: gRPC in, orders and plans out. What it decides is in
:mod:`placement.coordinator`; here are the streams, the clock and the process."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from mesh import telemetry
from mesh.config import PlacementConfig
from mesh.errors import InvalidInput, ModelMismatch, PlacementError, Unavailable
from mesh.grpc_server import GrpcServer, stop_signals, until_first_ends
from mesh.http import HttpServer
from mesh.model_config import ModelConfig
from placement.coordinator import Coordinator
from placement.improve import Budget
from placement.membership import Worker
from placement.rules import Rules
from placement.topology import Topology
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc as rpc

log = structlog.get_logger()

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Placement"].full_name
_HEARTBEAT_INTERVAL_S = 2.0
_COALESCE_S = 0.05
_MAX_NAME_LENGTH = 256
_MAX_EPOCH = 1 << 62
_MAX_SHARDS = 1 << 10
_REPAIR_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_FAULT = "expert_faulty"
_LOSSES = ("worker_gone", "worker_silent", "worker_unreachable")


class PlacementService(rpc.PlacementServicer):
    """Serves the RPCs while :meth:`run` decides. All of it lives on one event loop."""

    def __init__(
        self, config: PlacementConfig, model: ModelConfig, registry: CollectorRegistry
    ) -> None:
        rules = Rules(model.moe_layers, model.num_experts, config.rule, config.experts_per_worker)
        self._coordinator = Coordinator(
            rules,
            model.fingerprint,
            config,
            expert_hidden_size=model.expert_hidden_size,
            topology=Topology.read(config.topology) if config.topology else None,
        )
        self._by_hand = Budget(price=config.rebalance_price)
        self._by_itself = Budget(price=config.rebalance_price, moves=config.rebalance_moves)
        # Taken once, so that an event is said to have been at the same time whenever it is shown.
        self._unix_offset_s = time.time() - time.monotonic()
        self._fingerprint = model.fingerprint
        self._model_path = config.model
        self._lease_s = config.lease_s
        self._orders: dict[str, asyncio.Queue[pb.WorkerOrder | None]] = {}
        self._wake = asyncio.Event()
        self._urgent = False
        self._changed = asyncio.Event()
        self._planning = asyncio.Lock()
        self._replan = asyncio.Event()
        self._rebalance_is_due = False
        self._trouble = self._coordinator.why_not_ready()
        self._stopping = asyncio.Event()
        self._gauges = {
            name: Gauge(telemetry.METRIC_PREFIX + name, text, registry=registry)
            for name, text in (
                ("plan_epoch", "Epoch of the published plan."),
                ("missing_experts", "Experts that nobody serves."),
                ("balancedness", "Mean over maximum of the workers' rows."),
                ("gateways", "Gateways that report."),
                ("replicas", "Workers that serve an expert beside its first."),
            )
        }
        self._moves = 0
        self._moves_counter = Counter(
            telemetry.METRIC_PREFIX + "expert_moves",
            "Experts that found another worker.",
            registry=registry,
        )
        self._lost_counter = Counter(
            telemetry.METRIC_PREFIX + "workers_lost",
            "Workers that died, fell silent or got out of the gateways' reach.",
            ["how"],
            registry=registry,
        )
        self._faults_counter = Counter(
            telemetry.METRIC_PREFIX + "expert_faults",
            "Experts that a worker was taken off because it gets them wrong.",
            registry=registry,
        )
        self._rebalances = Counter(
            telemetry.METRIC_PREFIX + "rebalances", "Turns at balance.", registry=registry
        )
        self._repair_seconds = Histogram(
            telemetry.METRIC_PREFIX + "repair_seconds",
            "From the loss of a worker until every expert was served again.",
            buckets=_REPAIR_BUCKETS_S,
            registry=registry,
        )
        self._workers_gauge = Gauge(
            telemetry.METRIC_PREFIX + "workers", "Live workers.", ["state"], registry=registry
        )

    def why_not_ready(self) -> str | None:
        """In words; None while the plan is complete. Callable from any thread."""
        return self._trouble

    async def run(self, set_ready: Callable[[bool], Awaitable[None]]) -> None:
        """Decide whenever something changed, for ever."""
        await until_first_ends(self._follow(set_ready), self._plan())

    async def _follow(self, set_ready: Callable[[bool], Awaitable[None]]) -> None:
        """Bring the plan and the orders up to date with who is there, at once."""
        self._measure()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._until_deadline_s()):
                    await self._wake.wait()
                if not self._urgent:
                    await asyncio.sleep(_COALESCE_S)
            self._wake.clear()
            self._urgent = False
            for worker in self._coordinator.expire(time.monotonic()):
                self._end_stream(worker.lease_id)
            self._tell()
            self._measure()
            await set_ready(self._trouble is None)
            self._replan.set()

    async def _plan(self) -> None:
        """Compute targets beside it: what died is routed around before it is replaced."""
        while True:
            await self._replan.wait()
            self._replan.clear()
            await self._retarget()
            if self._rebalance_is_due:
                self._rebalance_is_due = False
                await self._rebalance(self._by_itself)

    def stop(self) -> None:
        """End every open stream."""
        self._stopping.set()
        for lease_id in self._orders:
            self._end_stream(lease_id)
        self._notify_watchers()

    # RPCs.

    async def Register(self, request: pb.RegisterRequest, context: Any) -> pb.RegisterReply:
        info = request.worker
        if not 0 < len(info.worker_id) <= _MAX_NAME_LENGTH:
            raise InvalidInput(f"worker_id must have 1 to {_MAX_NAME_LENGTH} characters")
        if info.expert_bytes < 1 or not info.grpc_address or request.last_epoch > _MAX_EPOCH:
            raise InvalidInput(
                f"worker {info.worker_id} must give a grpc_address, expert_bytes above 0 and a "
                f"last_epoch below {_MAX_EPOCH}"
            )
        if request.expert_shards > _MAX_SHARDS:
            raise InvalidInput(f"expert_shards must be {_MAX_SHARDS} or less")
        if info.model_fingerprint != self._fingerprint:
            raise ModelMismatch(
                f"worker {info.worker_id} has another model than placement, which serves "
                f"{self._model_path} ({self._fingerprint}, not {info.model_fingerprint}): "
                "start both with the same --model"
            )
        lease_id = secrets.token_hex(8)
        earlier = self._coordinator.register(request, lease_id, time.monotonic())
        if earlier:
            self._end_stream(earlier.lease_id)
        self._rethink()
        return pb.RegisterReply(
            lease_id=lease_id,
            lease_s=self._lease_s,
            heartbeat_interval_s=min(_HEARTBEAT_INTERVAL_S, self._lease_s / 2.5),
            epoch=self._coordinator.epoch,
        )

    async def Heartbeat(
        self, request_iterator: AsyncIterator[pb.WorkerReport], context: Any
    ) -> AsyncIterator[pb.WorkerOrder]:
        reports = aiter(request_iterator)
        first = await anext(reports, pb.WorkerReport())
        worker = self._coordinator.members.by_lease(first.lease_id)
        if worker is None or worker.lease_id in self._orders:
            raise Unavailable("this lease has ended: register again")
        orders = self._orders[worker.lease_id] = asyncio.Queue()
        self._take_report(worker, first)

        async def read() -> None:
            try:
                async for report in reports:
                    self._take_report(worker, report)
            finally:
                orders.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (order := await orders.get()) is not None:
                yield order
        finally:
            reader.cancel()
            del self._orders[worker.lease_id]
            self._coordinator.drop(worker.lease_id, time.monotonic())
            self._rethink(urgent=True)

    async def WatchPlan(self, request: pb.WatchPlanRequest, context: Any) -> AsyncIterator[pb.Plan]:
        sent = None
        while not self._stopping.is_set():
            changed = self._changed
            plan = self._coordinator.plan
            if plan is not None and plan is not sent:
                yield plan
                sent = plan
            else:
                await changed.wait()

    async def GetPlan(self, request: pb.GetPlanRequest, context: Any) -> pb.Plan:
        return self._coordinator.current_plan()

    async def ReportLoad(
        self, request_iterator: AsyncIterator[pb.GatewayReport], context: Any
    ) -> pb.ReportLoadReply:
        # Its other side keeps the stream open; a server that ends would cut it.
        await until_first_ends(self._take_load(request_iterator), self._stopping.wait())
        return pb.ReportLoadReply()

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainReply:
        self._coordinator.drain(request.worker_id, time.monotonic())
        self._rethink()
        while (
            request.worker_id in self._coordinator.members.workers and not self._stopping.is_set()
        ):
            await self._changed.wait()
        return pb.DrainReply(epoch=self._coordinator.current_plan().epoch)

    async def Rebalance(self, request: pb.RebalanceRequest, context: Any) -> pb.RebalanceReply:
        if self._coordinator.target is None:
            raise PlacementError(f"there is no plan yet: {self.why_not_ready()}")
        moves = await self._rebalance(self._by_hand)
        return pb.RebalanceReply(epoch=self._coordinator.current_plan().epoch, moves=moves)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.MeshStatus:
        now = time.monotonic()
        return self._coordinator.status(now, now + self._unix_offset_s)

    # Between them.

    async def _take_load(self, reports: AsyncIterator[pb.GatewayReport]) -> None:
        """What one gateway reports, until it ends."""
        gateway_id = ""
        unreachable: set[str] = set()
        try:
            async for report in reports:
                if not 0 < len(report.gateway_id) <= _MAX_NAME_LENGTH or report.epoch > _MAX_EPOCH:
                    raise InvalidInput(
                        f"a report needs a gateway_id of 1 to {_MAX_NAME_LENGTH} characters and "
                        f"an epoch below {_MAX_EPOCH}"
                    )
                if gateway_id and report.gateway_id != gateway_id:
                    raise InvalidInput(f"this stream is of gateway {gateway_id}")
                gateway_id = report.gateway_id
                if lost := set(report.unreachable_worker_ids) - unreachable:
                    log.warning("workers_unreachable", gateway_id=gateway_id, workers=sorted(lost))
                now = time.monotonic()
                if self._coordinator.gateway_report(report, now):
                    # What died is news at any time; that all have the plan can wait a little.
                    lost_some = unreachable != set(report.unreachable_worker_ids)
                    self._rethink(urgent=lost_some or bool(report.faults))
                if report.load and self._coordinator.rebalance_due(now):
                    self._rebalance_is_due = True
                    self._replan.set()
                unreachable = set(report.unreachable_worker_ids)
        finally:
            self._coordinator.gateway_gone(gateway_id)
            self._rethink()

    def _take_report(self, worker: Worker, report: pb.WorkerReport) -> None:
        if self._coordinator.report(worker, report, time.monotonic()):
            self._rethink()

    def _rethink(self, *, urgent: bool = False) -> None:
        self._urgent |= urgent
        self._wake.set()

    def _until_deadline_s(self) -> float | None:
        now = time.monotonic()
        deadline_s = self._coordinator.next_deadline_s(now)
        return None if deadline_s is None else max(deadline_s - now, 0.001)

    async def _rebalance(self, budget: Budget) -> int:
        """Move what lives, as far as the budget goes; how many experts find another worker."""
        self._coordinator.rebalance_begins(time.monotonic())
        moves = await self._retarget(budget)
        self._coordinator.rebalance_done(moves, time.monotonic())
        self._rebalances.inc()
        self._rethink()
        return moves

    async def _retarget(self, budget: Budget | None = None) -> int:
        """Compute a new target if one is due, act on it, and count the experts that it moves."""
        async with self._planning:
            try:
                compute = self._coordinator.next_target(time.monotonic(), budget=budget)
                if compute is None:
                    return 0
                target = await asyncio.to_thread(compute)
                moves = self._coordinator.adopt(target, time.monotonic())
            except PlacementError as error:
                log.warning("no_plan", reason=str(error))
                self._coordinator.note_shortage(str(error))
                return 0
            log.info("target", moves=moves, missing=len(target.missing), note=target.note)
            self._rethink(urgent=True)
            return moves

    def _tell(self) -> None:
        now = time.monotonic()
        if self._coordinator.publish(now):
            plan = self._coordinator.current_plan()
            log.info("plan", epoch=plan.epoch, complete=plan.complete, note=plan.note)
        self._notify_watchers()  # first: rows may still go to the dead, and orders are many
        for lease_id, order in self._coordinator.orders(now, self._orders):
            self._orders[lease_id].put_nowait(order)

    def _measure(self) -> None:
        state = self._coordinator
        self._trouble = state.why_not_ready()
        self._gauges["plan_epoch"].set(state.current_plan().epoch)
        self._gauges["missing_experts"].set(state.num_missing())
        self._gauges["balancedness"].set(state.balancedness(time.monotonic()))
        self._gauges["gateways"].set(len(state.members.gateways))
        self._gauges["replicas"].set(state.num_replicas())
        self._moves_counter.inc(state.moves - self._moves)
        self._moves = state.moves
        while state.repairs_s:
            self._repair_seconds.observe(state.repairs_s.pop())
        for event in state.history.take_news():
            (log.warning if event.is_bad else log.info)(event.kind, **event.facts)
            if event.kind in _LOSSES and not event.facts.get("draining"):
                self._lost_counter.labels(event.kind.removeprefix("worker_")).inc()
            elif event.kind == _FAULT:
                self._faults_counter.inc()
        states = state.states()
        for name in ("registered", "loading", "ready", "draining", "unreachable"):
            self._workers_gauge.labels(name).set(states.count(name))

    def _notify_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end_stream(self, lease_id: str) -> None:
        if lease_id in self._orders:
            self._orders[lease_id].put_nowait(None)


async def serve(config: PlacementConfig) -> None:
    """The placement process: :func:`run` until a signal, with its events on stderr."""
    telemetry.configure_logging("placement", f"placement-{os.getpid()}", config.log_level)
    # What was imported is not to be searched for garbage while a large mesh is planned anew.
    gc.collect()
    gc.freeze()
    await run(config, ModelConfig.from_hf(config.model), stop_signals())


async def run(config: PlacementConfig, model: ModelConfig, stop: asyncio.Event) -> None:
    """Serve until ``stop``. Raises MeshError when it cannot start."""
    registry = telemetry.new_registry()
    service = PlacementService(config, model, registry)
    server = GrpcServer(config, [(rpc.add_PlacementServicer_to_server, service)], [SERVICE_NAME])
    http = HttpServer(config, registry, why_not_ready=service.why_not_ready)
    async with server, http:
        log.info("placement_listening", grpc=server.address, http=http.address)
        telemetry.announce_ready(config, {"grpc": server.address, "http": http.address})
        set_ready = functools.partial(server.set_ready, SERVICE_NAME)
        await until_first_ends(stop.wait(), service.run(set_ready))
        log.info("placement_stopping")
        service.stop()
