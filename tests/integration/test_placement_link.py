"""A worker's lease with a placement that says what the test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from expert_worker.placement_link import PlacementLink
from mesh.config import ServerConfig
from mesh.grpc_server import GrpcServer
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc as rpc


class Placement(rpc.PlacementServicer):
    """Grants every lease; orders come from the test, None ends the stream."""

    def __init__(self) -> None:
        self.registered: asyncio.Queue[pb.RegisterRequest] = asyncio.Queue()
        self.orders: asyncio.Queue[pb.WorkerOrder | None] = asyncio.Queue()

    async def Register(self, request: Any, context: Any) -> pb.RegisterReply:
        self.registered.put_nowait(request)
        return pb.RegisterReply(lease_id="l", lease_s=5, heartbeat_interval_s=2)

    async def Heartbeat(self, reports: Any, context: Any) -> AsyncIterator[pb.WorkerOrder]:
        while (order := await self.orders.get()) is not None:
            yield order


async def test_orders_of_an_older_epoch_than_was_heard_of_are_not_obeyed() -> None:
    placement = Placement()
    obeyed: asyncio.Queue[int] = asyncio.Queue()
    add = rpc.add_PlacementServicer_to_server
    async with GrpcServer(
        ServerConfig(), [(add, placement)], ["expertmesh.v1.Placement"]
    ) as server:
        link = PlacementLink(
            server.address,
            None,
            pb.WorkerInfo(worker_id="w"),
            resident=lambda: [],
            expert_shards=lambda: 1,
            make_report=pb.WorkerReport,
            on_order=lambda order: obeyed.put_nowait(order.epoch),
        )
        running = asyncio.create_task(link.run())
        assert (await placement.registered.get()).last_epoch == 0
        for epoch in (5, 5, 7):
            placement.orders.put_nowait(pb.WorkerOrder(epoch=epoch))
            assert await obeyed.get() == epoch
        placement.orders.put_nowait(None)
        assert (await placement.registered.get()).last_epoch == 7
        for epoch in (6, 0, 7):  # of one that was away and has not heard
            placement.orders.put_nowait(pb.WorkerOrder(epoch=epoch))
        assert await obeyed.get() == 7
        assert obeyed.empty()
        running.cancel()
        await asyncio.wait({running})
