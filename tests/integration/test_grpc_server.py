"""What every service promises of its server, told with a small servicer of the Placement API."""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import closing, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client import Gauge
from structlog.testing import capture_logs

from mesh.config import ServerConfig
from mesh.errors import ConfigError, PlacementError
from mesh.grpc_server import GrpcServer, open_channel, open_sync_channel
from mesh.http import HttpServer
from mesh.plan import ExpertId
from mesh.telemetry import announce_ready, bound_expert_series, new_registry
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc as rpc
from tests.unread import Unread

NAME = "expertmesh.v1.Placement"


class Servicer(rpc.PlacementServicer):
    def __init__(self) -> None:
        self.watchers_gone = asyncio.Event()

    async def GetPlan(self, request: pb.GetPlanRequest, context: object) -> pb.Plan:
        raise PlacementError("12 of 16 workers are there: start 4 more")

    async def GetStatus(self, request: pb.GetStatusRequest, context: object) -> pb.MeshStatus:
        return {}["secret of the house"]

    async def Drain(self, request: pb.DrainRequest, context: object) -> pb.DrainReply:
        return pb.DrainReply(epoch=len(request.worker_id))

    async def WatchPlan(
        self, request: pb.WatchPlanRequest, context: object
    ) -> AsyncIterator[pb.Plan]:
        try:
            yield pb.Plan(epoch=1)
            if request.gateway_id == "unlucky":
                raise PlacementError("the plan is gone")
            await asyncio.Event().wait()
        finally:
            self.watchers_gone.set()


def make_server(config: ServerConfig | None = None, **options: object) -> GrpcServer:
    return GrpcServer(
        config or ServerConfig(),
        [(rpc.add_PlacementServicer_to_server, Servicer())],
        [NAME],
        **options,
    )


async def test_a_mesh_error_reaches_the_client_as_its_status_and_sentence():
    async with make_server() as server, open_channel(server.address) as channel:
        stub = rpc.PlacementStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetPlan(pb.GetPlanRequest())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "12 of 16 workers are there: start 4 more"

        replies = stub.WatchPlan(pb.WatchPlanRequest(gateway_id="unlucky"))
        assert (await replies.read()).epoch == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replies.read()
        assert caught.value.details() == "the plan is gone"


async def test_a_bug_reaches_the_client_without_its_traceback():
    async with make_server() as server, open_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rpc.PlacementStub(channel).GetStatus(pb.GetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    assert "GetStatus" in caught.value.details()


async def test_a_stream_is_closed_at_once_when_its_client_vanishes():
    servicer = Servicer()
    server = GrpcServer(ServerConfig(), [(rpc.add_PlacementServicer_to_server, servicer)], [NAME])
    async with server, open_channel(server.address) as channel:
        replies = rpc.PlacementStub(channel).WatchPlan(pb.WatchPlanRequest())
        await replies.read()
        replies.cancel()
        await asyncio.wait_for(servicer.watchers_gone.wait(), 10)


async def test_liveness_is_there_from_the_start_and_readiness_when_said():
    async def check(service: str) -> int:
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    status = health_pb2.HealthCheckResponse
    async with make_server() as server, open_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert await check("") == status.SERVING
        assert await check(NAME) == status.NOT_SERVING
        await server.set_ready(NAME, True)
        await server.set_ready("expert/0.7", True)
        assert await check(NAME) == status.SERVING
        assert await check("expert/0.7") == status.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check("expert/0.8")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_all_of_health_in_one_list():
    async with make_server() as server, open_channel(server.address) as channel:
        await server.set_ready("expert/0.7", True)
        reply = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
    status = health_pb2.HealthCheckResponse
    assert {name: of.status for name, of in reply.statuses.items()} == {
        "": status.SERVING,
        NAME: status.NOT_SERVING,
        "expert/0.7": status.SERVING,
    }


async def test_a_watcher_is_told_of_every_change_and_of_the_end():
    status = health_pb2.HealthCheckResponse
    async with make_server() as server, open_channel(server.address) as channel:
        replies = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="expert/0.7")
        )
        told = [(await replies.read()).status]
        for ready in (True, False, True):
            await server.set_ready("expert/0.7", ready)
            told.append((await replies.read()).status)
        await server.stop()
        told.append((await replies.read()).status)
        assert await replies.read() is grpc.aio.EOF
    assert told == [
        status.SERVICE_UNKNOWN,
        status.SERVING,
        status.NOT_SERVING,
        status.SERVING,
        status.NOT_SERVING,
    ]


async def test_watchers_that_never_read_hold_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mesh.health.MAX_WATCHERS", 2)
    status = health_pb2.HealthCheckResponse
    request = health_pb2.HealthCheckRequest(service=NAME)
    server = make_server()
    await server.start()
    async with open_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        replies = stub.Watch(request)
        await replies.read()
        with closing(Unread(server.address)) as unread:
            unread.call("/grpc.health.v1.Health/Watch", request.SerializeToString())
            await asyncio.to_thread(unread.wait_stalled)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Watch(request).read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            for ready in (True, False, True):
                await asyncio.wait_for(server.set_ready(NAME, ready), 10)
            assert (await stub.Check(request)).status == status.SERVING
            await asyncio.wait_for(server.stop(grace_s=0.1), 10)


async def test_reflection_names_the_services():
    async with make_server() as server, open_channel(server.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        assert NAME in {s.name for s in reply.list_services_response.service}
        await call.done_writing()


async def test_with_tokens_every_call_but_health_needs_one():
    async with (
        make_server(tokens=["first", "second"]) as server,
        open_channel(server.address) as channel,
    ):
        stub = rpc.PlacementStub(channel)
        request = pb.DrainRequest(worker_id="abc")
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "second"),)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Drain(request, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.WatchPlan(pb.WatchPlanRequest()).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflection.read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

        reply = await stub.Drain(request, metadata=(("authorization", "Bearer second"),))
        assert reply.epoch == 3
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_a_message_over_the_limit_is_refused_and_the_server_serves_on():
    async with (
        make_server(max_message_bytes=1000) as server,
        open_channel(server.address) as channel,
    ):
        stub = rpc.PlacementStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Drain(pb.DrainRequest(worker_id="x" * 1001))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Drain(pb.DrainRequest(worker_id="x" * 900))).epoch == 900


async def test_past_so_many_connections_more_are_refused_until_one_ends(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("mesh.grpc_server._MAX_CONNECTIONS", 2)
    async with make_server() as server, open_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        with closing(Unread(server.address)) as first, closing(Unread(server.address)) as second:
            for holding in (first, second):
                await asyncio.to_thread(holding.wait_connected)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(health_pb2.HealthCheckRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=20)


async def test_a_taken_port_is_an_error_that_names_it():
    async with make_server() as server:
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{server.port}: Address already"):
            await make_server(ServerConfig(port=server.port)).start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        http = HttpServer(ServerConfig(http_port=port), new_registry(), why_not_ready=lambda: None)
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already.*http-port"):
            http.start()


async def test_a_stream_that_nobody_reads_is_given_up():
    servicer = Servicer()
    adds = [(rpc.add_PlacementServicer_to_server, servicer)]
    server = GrpcServer(ServerConfig(), adds, [NAME], longest_write_s=0.05)
    async with server, open_channel(server.address) as channel:
        with closing(Unread(server.address)) as unread, capture_logs() as events:
            stream = unread.call("/expertmesh.v1.Placement/WatchPlan", b"")
            await asyncio.wait_for(servicer.watchers_gone.wait(), 10)
            assert [(event["event"], event["method"]) for event in events] == [
                ("client_does_not_read", "/expertmesh.v1.Placement/WatchPlan")
            ]
            # Should it read after all, it hears how its stream ended.
            await asyncio.to_thread(unread.read, stream, b"read nothing of its stream")
        replies = rpc.PlacementStub(channel).WatchPlan(pb.WatchPlanRequest())
        assert (await replies.read()).epoch == 1


async def test_a_port_that_is_only_preferred_is_taken_while_it_is_free():
    async with make_server() as free:
        port = free.port
    preferring = ServerConfig(preferred_port=port)
    async with make_server(preferring) as first, make_server(preferring) as second:
        assert first.port == port
        assert second.port not in (0, port)
        async with open_channel(second.address) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_the_server_stops_while_a_stream_is_open():
    server = make_server()
    await server.start()
    async with open_channel(server.address) as channel:
        replies = rpc.PlacementStub(channel).WatchPlan(pb.WatchPlanRequest())
        await replies.read()
        await server.stop(grace_s=0.05)
        with pytest.raises(grpc.aio.AioRpcError):
            await replies.read()


async def test_the_sync_channel_reaches_it_too():
    def drain(address: str) -> int:
        with open_sync_channel(address) as channel:
            return rpc.PlacementStub(channel).Drain(pb.DrainRequest(worker_id="abcd")).epoch

    async with make_server() as server:
        assert await asyncio.to_thread(drain, server.address) == 4


async def get(url: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_http_tells_alive_from_ready_and_serves_metrics():
    registry = new_registry()
    Gauge("expert_mesh:plan_epoch", "Epoch of the plan.", registry=registry).set(7)
    trouble: list[str | None] = ["waiting for workers: 3 of 16"]
    async with HttpServer(ServerConfig(), registry, why_not_ready=lambda: trouble[0]) as http:
        url = f"http://{http.address}"
        assert (await get(f"{url}/healthz"))[0] == 200
        status, body = await get(f"{url}/readyz")
        assert status == 503
        assert json.loads(body) == {"ok": False, "reason": "waiting for workers: 3 of 16"}
        trouble[0] = None
        assert (await get(f"{url}/readyz"))[0] == 200
        assert "expert_mesh:plan_epoch 7.0" in (await get(f"{url}/metrics"))[1]
        assert (await get(f"{url}/other"))[0] == 404


def test_an_http_client_that_sends_a_byte_now_and_then_is_cut_off(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("mesh.http._LONGEST_REQUEST_S", 0.2)
    monkeypatch.setattr("mesh.http._MAX_CONNECTIONS", 1)
    http = HttpServer(ServerConfig(), new_registry(), why_not_ready=lambda: None)
    http.start()
    host, port = http.address.split(":")
    slow = socket.create_connection((host, int(port)), timeout=0.02)
    with closing(slow), suppress(ConnectionError):
        while True:
            slow.sendall(b"X")
            with suppress(TimeoutError):
                if not slow.recv(1):
                    break
    while True:  # its slot is free a moment later
        with closing(socket.create_connection((host, int(port)), timeout=10)) as client:
            client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            with suppress(ConnectionError):
                if client.recv(100).startswith(b"HTTP/1.0 200"):
                    break
    http.stop()


def test_series_of_experts_are_bounded():
    rows = {ExpertId(0, i): float(i) for i in range(5)}
    assert bound_expert_series(rows, limit=3) == {
        ("0", "0"): 0.0,
        ("0", "1"): 1.0,
        ("0", "2"): 2.0,
        ("other", "other"): 7.0,
    }


def test_the_supervisor_reads_one_line_and_the_end():
    ours, theirs = socket.socketpair()
    with ours:
        announce_ready(ServerConfig(ready_fd=theirs.detach()), {"grpc": "127.0.0.1:1"})
        assert ours.makefile().read() == '{"grpc": "127.0.0.1:1"}\n'
