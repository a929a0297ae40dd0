"""A placement service inside the test's process, and workers that only pretend to load."""

from __future__ import annotations

import asyncio
import functools
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

import placement.service
from mesh.config import PlacementConfig, ServerConfig
from mesh.grpc_server import TlsFiles, open_channel
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc as rpc
from tests.families import PLAIN, make_checkpoint


@dataclass(frozen=True)
class Running:
    """A service and the way to end it."""

    address: str
    http: str
    stop: asyncio.Event
    task: asyncio.Future[None]


@functools.cache
def _tiny_model(directory: Path) -> ModelConfig:
    return ModelConfig.from_hf(make_checkpoint(PLAIN, directory))


def tiny_model(directory: Path, *, num_experts: int = 2, num_layers: int = 2) -> ModelConfig:
    """A real description of a model with as many experts as a story needs."""
    return replace(
        _tiny_model(directory), num_experts=num_experts, moe_layers=tuple(range(num_layers))
    )


@asynccontextmanager
async def running(
    config: ServerConfig, run: Callable[[ServerConfig, asyncio.Event], Awaitable[None]]
) -> AsyncIterator[Running]:
    """A service in this process, from the line that says it is ready until the block ends."""
    ours, theirs = os.pipe()
    stop = asyncio.Event()
    task = asyncio.ensure_future(run(replace(config, ready_fd=theirs), stop))
    reading = asyncio.ensure_future(asyncio.to_thread(_read_all, ours))
    await asyncio.wait([task, reading], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        os.close(theirs)
        await reading
        await task
    addresses = json.loads(await reading)
    try:
        yield Running(addresses["grpc"], addresses["http"], stop, task)
    finally:
        stop.set()
        await asyncio.gather(task, return_exceptions=True)


def _read_all(descriptor: int) -> str:
    with os.fdopen(descriptor) as pipe:
        return pipe.read()


def running_placement(
    model: ModelConfig, config: PlacementConfig | None = None
) -> AbstractAsyncContextManager[Running]:
    """Placement, of a model that need not exist."""
    return running(
        config or PlacementConfig(port=0, settle_s=1.0),
        lambda config, stop: placement.service.run(config, model, stop),
    )


@dataclass
class PretendWorker:
    """Registers, obeys orders by saying that it did, and remembers them."""

    stub: rpc.PlacementStub
    info: pb.WorkerInfo
    resident: set[ExpertId]
    orders: list[pb.WorkerOrder]
    obeys: bool = True
    told_to_leave: bool = False
    call: grpc.aio.StreamStreamCall | None = None
    lease_id: str = ""

    async def register(self, last_epoch: int = 0) -> None:
        reply = await self.stub.Register(
            pb.RegisterRequest(
                worker=self.info,
                resident=map(expert_to_proto, self.resident),
                last_epoch=last_epoch,
            )
        )
        self.lease_id = reply.lease_id
        self.call = self.stub.Heartbeat()
        await self.report()

    async def report(self, **fields: object) -> None:
        await self.call.write(
            pb.WorkerReport(
                lease_id=self.lease_id, resident=map(expert_to_proto, self.resident), **fields
            )
        )

    async def work(self) -> None:
        """Until the stream ends."""
        async for order in self.call:
            self.orders.append(order)
            if order.leave:
                self.told_to_leave = True
                await self.call.done_writing()
            elif self.obeys and (order.load or order.unload):
                self.resident |= set(map(expert_from_proto, order.load))
                self.resident -= set(map(expert_from_proto, order.unload))
                await self.report()


def pretend_worker(
    stub: rpc.PlacementStub,
    model: ModelConfig,
    worker_id: str,
    *,
    resident: Collection[ExpertId] = (),
    obeys: bool = True,
) -> PretendWorker:
    info = pb.WorkerInfo(
        worker_id=worker_id,
        grpc_address=f"{worker_id}:1",
        host="here",
        device="cpu",
        memory_bytes=1 << 30,
        expert_bytes=1 << 10,
        model_fingerprint=model.fingerprint,
    )
    return PretendWorker(stub, info, set(resident), [], obeys)


class Mesh:
    """Pretend workers of one placement, each with a task that works."""

    def __init__(self, address: str, model: ModelConfig, tls: TlsFiles | None = None) -> None:
        self.channel = open_channel(address, tls)
        self.stub = rpc.PlacementStub(self.channel)
        self.model = model
        self.workers: dict[str, PretendWorker] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(
        self, worker_id: str, *, last_epoch: int = 0, **options: object
    ) -> PretendWorker:
        worker = pretend_worker(self.stub, self.model, worker_id, **options)
        return await self.add(worker, last_epoch)

    async def add(self, worker: PretendWorker, last_epoch: int = 0) -> PretendWorker:
        await worker.register(last_epoch)
        self._tasks.append(asyncio.create_task(worker.work()))
        self.workers[worker.info.worker_id] = worker
        return worker

    async def __aenter__(self) -> Mesh:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.close(None)


async def plan_where(
    plans: AsyncIterator[pb.Plan], wanted: object, timeout_s: float = 20.0
) -> pb.Plan:
    """The first plan of a watch that ``wanted(plan)`` is true of; epochs must grow."""
    async with asyncio.timeout(timeout_s):
        epoch = -1
        async for plan in plans:
            assert plan.epoch > epoch
            epoch = plan.epoch
            if wanted(plan):
                return plan
    raise AssertionError("the watch ended")


def homes_of(plan: pb.Plan) -> dict[ExpertId, list[str]]:
    """As a plan has it."""
    return {expert_from_proto(p.expert): list(p.worker_ids) for p in plan.experts}
