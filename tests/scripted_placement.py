"""A placement that says what a test tells it to, and a caller that sends rows to its workers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from gateway.dispatch import Dispatcher
from mesh.config import ServerConfig
from mesh.grpc_server import GrpcServer, open_channel
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from mesh.transport.ucx import UcxTransport
from protos import engine_pb2, placement_pb2_grpc, worker_pb2, worker_pb2_grpc
from protos import placement_pb2 as pb


class ScriptedPlacement(placement_pb2_grpc.PlacementServicer):
    """Takes every worker, and orders nothing by itself."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.registered: dict[str, pb.RegisterRequest] = {}
        self.reports: dict[str, pb.WorkerReport] = {}
        self.plan = pb.Plan()
        self._orders: defaultdict[str, asyncio.Queue[pb.WorkerOrder]] = defaultdict(asyncio.Queue)
        self._heard = asyncio.Condition()
        self._server = GrpcServer(
            ServerConfig(host=host),
            [(placement_pb2_grpc.add_PlacementServicer_to_server, self)],
            [],
        )

    @property
    def address(self) -> str:
        return self._server.address

    async def __aenter__(self) -> ScriptedPlacement:
        await self._server.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._server.stop(0)

    def order(
        self,
        worker_id: str,
        load: Iterable[ExpertId],
        *,
        shards: int = 1,
        sources: Mapping[ExpertId, str] | None = None,
    ) -> None:
        """Have a worker load these, which those workers have."""
        self._orders[worker_id].put_nowait(
            pb.WorkerOrder(
                epoch=1,
                load=map(expert_to_proto, load),
                expert_shards=shards,
                sources=[
                    pb.ExpertSource(expert=expert_to_proto(e), grpc_address=address)
                    for e, address in (sources or {}).items()
                ],
            )
        )

    async def until_registered(self, *worker_ids: str) -> None:
        async with self._heard, asyncio.timeout(30):
            await self._heard.wait_for(lambda: self.registered.keys() >= set(worker_ids))

    async def until_resident(self, worker_id: str, experts: Iterable[ExpertId]) -> None:
        """Until a worker says that it holds these and nothing else."""
        wanted = sorted(experts)

        def holds() -> bool:
            report = self.reports.get(worker_id, pb.WorkerReport())
            return [expert_from_proto(e) for e in report.resident] == wanted

        async with self._heard, asyncio.timeout(60):
            await self._heard.wait_for(holds)

    async def until_error(self, worker_id: str) -> str:
        """Until a worker says what went wrong."""
        async with self._heard, asyncio.timeout(30):
            await self._heard.wait_for(
                lambda: worker_id in self.reports and self.reports[worker_id].error
            )
        return self.reports[worker_id].error

    def routes(self, shards: int) -> pb.Plan:
        """The plan of what workers hold now."""
        homes: defaultdict[ExpertId, list[str]] = defaultdict(list)
        for worker_id, report in sorted(self.reports.items()):
            for expert in map(expert_from_proto, report.resident):
                homes[expert].append(worker_id)
        return pb.Plan(
            epoch=1,
            expert_shards=shards,
            workers=[request.worker for request in self.registered.values()],
            experts=[
                pb.ExpertPlacement(expert=expert_to_proto(e), worker_ids=homes[e])
                for e in sorted(homes)
            ],
        )

    # RPCs.

    async def Register(self, request: pb.RegisterRequest, context: object) -> pb.RegisterReply:
        worker_id = request.worker.worker_id
        async with self._heard:
            self.registered[worker_id] = request
            self._heard.notify_all()
        return pb.RegisterReply(lease_id=worker_id, lease_s=30, heartbeat_interval_s=0.2, epoch=1)

    async def Heartbeat(
        self, reports: AsyncIterator[pb.WorkerReport], context: object
    ) -> AsyncIterator[pb.WorkerOrder]:
        first = await anext(aiter(reports))
        await self._hear(first)
        hearing = asyncio.create_task(self._hear_all(reports))
        try:
            while True:
                yield await self._orders[first.lease_id].get()
        finally:
            hearing.cancel()

    async def _hear_all(self, reports: AsyncIterator[pb.WorkerReport]) -> None:
        async for report in reports:
            await self._hear(report)

    async def _hear(self, report: pb.WorkerReport) -> None:
        async with self._heard:
            self.reports[report.lease_id] = report
            if report.draining:
                self._orders[report.lease_id].put_nowait(pb.WorkerOrder(epoch=1, leave=True))
            self._heard.notify_all()


class Caller:
    """A gateway reduced to its dispatcher."""

    def __init__(
        self,
        directory: Path,
        model: ModelConfig,
        max_tokens: int = 16,
        reply_timeout_s: float = 10.0,
    ) -> None:
        self._model = model
        self._transport = UcxTransport()
        self.dispatcher = Dispatcher(
            self._transport,
            model,
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_tokens=max_tokens,
            reply_timeout_s=reply_timeout_s,
        )

    async def connect(self, plan: pb.Plan) -> None:
        """As the front does."""
        routing = engine_pb2.Routing(
            epoch=plan.epoch, experts=plan.experts, expert_shards=plan.expert_shards
        )
        for number, worker in enumerate(plan.workers, start=1):
            async with open_channel(worker.grpc_address) as channel:
                reply = await worker_pb2_grpc.ExpertWorkerStub(channel).Connect(
                    worker_pb2.ConnectRequest(
                        gateway_id="caller",
                        ucx_address=self._transport.address,
                        reply_session=number,
                        model_fingerprint=self._model.fingerprint,
                        hidden_size=self._model.hidden_size,
                        dtype="float32",
                        expert_shards=plan.expert_shards,
                    )
                )
            routing.peers.add(
                worker_id=worker.worker_id,
                ucx_address=reply.ucx_address,
                session=reply.session,
                reply_session=number,
                max_rows=reply.max_rows,
            )
        self.dispatcher.set_routing(routing)

    async def ask(
        self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """One layer's experts for some tokens; every row must be answered."""

        def step() -> torch.Tensor:
            with torch.inference_mode():
                self.dispatcher.begin_step(1)
                return self.dispatcher.dispatch(layer, x_TD, ids_TK, weights_TK).combine()

        y_TD = await asyncio.to_thread(step)
        assert not self.dispatcher.void_rows()
        return y_TD

    def close(self) -> None:
        self.dispatcher.close()
        self._transport.close()
