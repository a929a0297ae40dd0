"""A gateway follows the plan: a scripted placement, scripted workers, a scripted engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from gateway.engine_link import EngineLink
from gateway.routing import Router, load_between, missing_experts, routing_for, why_not_well
from mesh.config import GatewayConfig, ServerConfig
from mesh.grpc_server import GrpcServer, open_channel
from mesh.plan import ExpertId
from mesh.wire import HEALTH_NAME
from protos import engine_pb2, placement_pb2, placement_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.scripted_engine import MODEL, ScriptedEngine, linked_engine

TWO_EXPERTS = replace(MODEL, moe_layers=(0,), num_experts=2)


def placed(index: int, *worker_ids: str) -> placement_pb2.ExpertPlacement:
    expert = placement_pb2.ExpertId(layer=0, index=index)
    return placement_pb2.ExpertPlacement(expert=expert, worker_ids=worker_ids)


class Placement(placement_pb2_grpc.PlacementServicer):
    """Says the plans of the test; keeps what gateways report."""

    def __init__(self) -> None:
        self.plans: asyncio.Queue[placement_pb2.Plan | None] = asyncio.Queue()
        self.reports: asyncio.Queue[placement_pb2.GatewayReport] = asyncio.Queue()
        self.watching = asyncio.Queue[str]()

    async def WatchPlan(self, request: Any, context: Any) -> AsyncIterator[placement_pb2.Plan]:
        self.watching.put_nowait(request.gateway_id)
        while (plan := await self.plans.get()) is not None:
            yield plan

    async def ReportLoad(self, reports: Any, context: Any) -> placement_pb2.ReportLoadReply:
        async for report in reports:
            self.reports.put_nowait(report)
        return placement_pb2.ReportLoadReply()


class Worker(worker_pb2_grpc.ExpertWorkerServicer):
    """Grants sessions, unless it is told to refuse."""

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id
        self.refuse = False
        self.lost_words = 0
        self.answering = asyncio.Event()
        self.answering.set()
        self.control: GrpcServer | None = None
        self.connects: asyncio.Queue[worker_pb2.ConnectRequest] = asyncio.Queue()
        self.disconnects: asyncio.Queue[worker_pb2.DisconnectRequest] = asyncio.Queue()
        self.address = ""
        self._granted = 0

    async def Connect(self, request: Any, context: Any) -> worker_pb2.ConnectReply:
        self.connects.put_nowait(request)
        await self.answering.wait()
        if self.refuse:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another model")
        self._granted += 1
        return worker_pb2.ConnectReply(
            session=self._granted, ucx_address=self.worker_id.encode(), max_rows=64
        )

    async def Disconnect(self, request: Any, context: Any) -> worker_pb2.DisconnectReply:
        self.disconnects.put_nowait(request)
        if self.lost_words > 0:
            self.lost_words -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "its link is down")
        return worker_pb2.DisconnectReply()

    def info(self, generation: int = 0) -> placement_pb2.WorkerInfo:
        return placement_pb2.WorkerInfo(
            worker_id=self.worker_id,
            grpc_address=self.address,
            ucx_address=f"{self.worker_id}/{generation}".encode(),
        )


@dataclass
class Mesh:
    placement: Placement
    workers: list[Worker]
    engine: ScriptedEngine
    link: EngineLink
    router: Router
    epoch: int = field(default=0)

    def plan(
        self,
        *homes: tuple[str, ...],
        generation: int = 0,
        cut_off: tuple[str, ...] = (),
        **fields: Any,
    ) -> None:
        """The next plan: the homes of expert 0, of expert 1, ..., and who has lost its own."""
        named = {worker_id for home in (*homes, cut_off) for worker_id in home}
        self.epoch += 1
        values: dict[str, Any] = {
            "epoch": self.epoch,
            "model_fingerprint": TWO_EXPERTS.fingerprint,
            "workers": [w.info(generation) for w in self.workers if w.worker_id in named],
            "experts": [placed(index, *home) for index, home in enumerate(homes)],
            **fields,
        }
        self.placement.plans.put_nowait(placement_pb2.Plan(**values))

    async def routed(self) -> dict[int, list[str]]:
        """What the engine hears next; it takes it over at once."""
        routing = await self.engine.routings.get()
        stats = engine_pb2.EngineStats(epoch=routing.epoch)
        self.engine.send(engine_pb2.FromEngine(stats=stats))
        return {e.expert.index: list(e.worker_ids) for e in routing.experts}


@asynccontextmanager
async def running_mesh(num_workers: int = 2) -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        placement = Placement()
        add = placement_pb2_grpc.add_PlacementServicer_to_server
        server = GrpcServer(ServerConfig(), [(add, placement)], ["expertmesh.v1.Placement"])
        await stack.enter_async_context(server)
        workers = [Worker(f"w{i}") for i in range(num_workers)]
        for worker in workers:
            add = worker_pb2_grpc.add_ExpertWorkerServicer_to_server
            control = GrpcServer(ServerConfig(), [(add, worker)], ["expertmesh.v1.ExpertWorker"])
            await stack.enter_async_context(control)
            worker.address = control.address
            worker.control = control
        engine, link = await stack.enter_async_context(linked_engine())
        engine.start()
        await link.started
        config = GatewayConfig(port=0, placement=server.address)
        router = Router(config, "g1", TWO_EXPERTS, link, on_change=lambda: None)
        identity = placement_pb2.GatewayReport(gateway_id="g1", grpc_address="here:1")
        running = asyncio.create_task(router.run(identity))
        yield Mesh(placement, workers, engine, link, router)
        running.cancel()
        await asyncio.wait({running})
        await router.close()


async def test_the_engine_routes_to_the_workers_that_connected() -> None:
    async with running_mesh() as mesh:
        assert "no plan yet" in (mesh.router.trouble() or "")
        mesh.plan(("w0",), ("w1", "w0"))
        routing = await mesh.engine.routings.get()
        assert (routing.epoch, len(routing.peers)) == (1, 0)
        routing = await mesh.engine.routings.get()
        assert routing.experts == [placed(0, "w0"), placed(1, "w1", "w0")]
        assert [(p.worker_id, p.session, p.max_rows) for p in routing.peers] == [
            *(("w0", 1, 64), ("w1", 1, 64)),
        ]
        asked = [await worker.connects.get() for worker in mesh.workers]
        assert {(a.ucx_address, a.dtype, a.hidden_size) for a in asked} == {
            (b"engine", "float32", MODEL.hidden_size)
        }
        assert [a.reply_session for a in asked] == [p.reply_session for p in routing.peers]
        assert len({a.reply_session for a in asked}) == 2
        assert mesh.router.trouble() is None
        assert mesh.router.num_workers == 2


async def test_a_worker_that_refuses_is_tried_again_and_told_to_placement() -> None:
    async with running_mesh() as mesh:
        mesh.workers[1].refuse = True
        mesh.plan(("w0",), ("w1",))
        assert await mesh.routed() == {}
        assert await mesh.routed() == {0: ["w0"]}
        assert "expert 1 of layer 0" in (mesh.router.trouble() or "")
        while list((await mesh.placement.reports.get()).unreachable_worker_ids) != ["w1"]:
            pass
        mesh.workers[1].refuse = False
        assert await mesh.routed() == {0: ["w0"], 1: ["w1"]}
        while (await mesh.placement.reports.get()).unreachable_worker_ids:
            pass


async def test_a_worker_that_the_plan_does_without_is_tried_until_it_is_back() -> None:
    async with running_mesh() as mesh:
        mesh.workers[1].refuse = True
        mesh.plan(("w0",), ("w1",))
        while list((await mesh.placement.reports.get()).unreachable_worker_ids) != ["w1"]:
            pass
        mesh.plan(("w0",), ("w0",), cut_off=("w1",))
        while (await mesh.placement.reports.get()).epoch != 2:
            pass
        assert (await mesh.placement.reports.get()).unreachable_worker_ids == ["w1"]
        mesh.workers[1].refuse = False
        while (await mesh.placement.reports.get()).unreachable_worker_ids:
            pass


async def test_a_lost_peer_is_routed_around_at_once_and_connected_anew() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1", "w0"))
        await mesh.routed()
        await mesh.routed()
        first = await mesh.workers[1].connects.get()
        lost = engine_pb2.PeerLost(worker_id="w1", reason="connection reset")
        for reply_session in (first.reply_session + 1, first.reply_session):
            lost.reply_session = reply_session  # of another connection; of this one
            mesh.engine.send(engine_pb2.FromEngine(peer_lost=lost))
        assert await mesh.routed() == {0: ["w0"], 1: ["w0"]}
        assert (await mesh.workers[1].disconnects.get()).session == 1
        assert await mesh.routed() == {0: ["w0"], 1: ["w1", "w0"]}
        second = await mesh.workers[1].connects.get()
        assert second.reply_session != first.reply_session


async def test_an_engine_with_another_transport_is_connected_anew_to_all() -> None:
    async with running_mesh() as mesh:
        first, second = mesh.workers
        second.answering.clear()
        mesh.plan(("w0",), ("w1",))
        assert await mesh.routed() == {}
        assert await mesh.routed() == {0: ["w0"]}
        for worker in mesh.workers:
            assert (await worker.connects.get()).ucx_address == b"engine"
        # The second has not answered to the address that is no more.
        reopened = engine_pb2.TransportReopened(ucx_address=b"another", transport_number=1)
        mesh.engine.send(engine_pb2.FromEngine(transport_reopened=reopened))
        assert await mesh.routed() == {}
        assert await mesh.routed() == {0: ["w0"]}
        assert (await first.connects.get()).ucx_address == b"another"
        second.answering.set()
        assert (await second.disconnects.get()).session == 1
        assert (await second.connects.get()).ucx_address == b"another"
        routing = await mesh.engine.routings.get()
        assert [peer.worker_id for peer in routing.peers] == ["w0", "w1"]
        assert routing.transport_number == 1


async def test_a_worker_that_left_the_plan_gets_its_session_back_after_the_takeover() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        mesh.plan(("w0",), ("w0",))
        routing = await mesh.engine.routings.get()
        assert [peer.worker_id for peer in routing.peers] == ["w0"]
        assert mesh.workers[1].disconnects.empty()
        mesh.engine.send(engine_pb2.FromEngine(stats=engine_pb2.EngineStats(epoch=2)))
        assert (await mesh.workers[1].disconnects.get()).gateway_id == "g1"


async def test_a_worker_that_did_not_hear_it_is_told_again_that_it_left_the_plan() -> None:
    async with running_mesh() as mesh:
        mesh.workers[1].lost_words = 2
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        mesh.plan(("w0",), ("w0",))
        await mesh.routed()
        told = [await mesh.workers[1].disconnects.get() for _ in range(3)]
        assert [request.session for request in told] == [1, 1, 1]
    assert mesh.workers[1].disconnects.empty()


async def test_a_worker_that_never_hears_it_does_not_hold_up_the_end() -> None:
    async with running_mesh() as mesh:
        mesh.workers[1].lost_words = 1 << 30
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        mesh.plan(("w0",), ("w0",))
        await mesh.routed()
        await mesh.workers[1].disconnects.get()


async def test_a_worker_that_came_back_under_its_name_is_connected_anew() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        mesh.plan(("w0",), ("w1",), generation=1)
        assert await mesh.routed() == {}
        assert await mesh.routed() == {0: ["w0"], 1: ["w1"]}
        for worker in mesh.workers:
            assert worker.connects.qsize() == 2


async def test_without_placement_the_last_plan_is_served_until_a_newer_one_comes() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        assert await mesh.placement.watching.get() == "g1"
        mesh.placement.plans.put_nowait(None)
        assert await mesh.placement.watching.get() == "g1"
        assert mesh.router.trouble() is None
        mesh.placement.plans.put_nowait(placement_pb2.Plan(epoch=0))
        mesh.plan(("w1",), ("w1",))
        assert await mesh.routed() == {0: ["w1"], 1: ["w1"]}


async def test_a_plan_may_come_while_a_worker_takes_its_time_to_connect() -> None:
    async with running_mesh(num_workers=3) as mesh:
        slow = mesh.workers[0]
        slow.answering.clear()
        mesh.plan(("w0",), ("w1",))
        await slow.connects.get()
        mesh.plan(("w0", "w2"), ("w1",))  # w2 was never tried when the wait for w0 ends
        assert await mesh.routed() == {}
        assert await mesh.routed() == {1: ["w1"]}
        assert await mesh.routed() == {0: ["w2"], 1: ["w1"]}
        slow.answering.set()
        assert await mesh.routed() == {0: ["w0", "w2"], 1: ["w1"]}


async def test_a_late_worker_that_is_well_stays_and_one_that_is_not_is_dropped() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1", "w0"))
        await mesh.routed()
        await mesh.routed()
        control = mesh.workers[1].control
        assert control is not None
        session = (await mesh.workers[1].connects.get()).reply_session
        late = engine_pb2.PeerLate(worker_id="w1", reply_session=session, reason="no reply")
        await control.set_ready(HEALTH_NAME, True)
        with capture_logs() as events:
            mesh.engine.send(engine_pb2.FromEngine(peer_late=late))
            while "worker_slow" not in [event["event"] for event in events]:
                await mesh.placement.reports.get()
        assert mesh.engine.routings.empty()
        assert mesh.engine.drops.empty()
        await control.set_ready(HEALTH_NAME, False)
        mesh.engine.send(engine_pb2.FromEngine(peer_late=late))
        drop = await mesh.engine.drops.get()
        assert (drop.worker_id, drop.reply_session) == ("w1", session)
        assert drop.reason == "no reply, and its health says that its data plane is stuck"
        assert await mesh.routed() == {0: ["w0"], 1: ["w0"]}
        while list((await mesh.placement.reports.get()).unreachable_worker_ids) != ["w1"]:
            pass


async def test_a_worker_that_does_not_answer_is_not_well() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        async with open_channel(f"127.0.0.1:{hung.getsockname()[1]}") as channel:
            assert "its health check failed" in (await why_not_well(channel) or "")


async def test_a_plan_of_a_rival_placement_is_not_followed() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        mesh.epoch -= 1
        mesh.plan(("w1",), ("w1",))
        mesh.epoch -= 2
        mesh.plan(("w1",), ("w1",))
        mesh.epoch = 1
        mesh.plan(("w1",), ("w0",))
        assert await mesh.routed() == {0: ["w1"], 1: ["w0"]}


async def test_placement_hears_of_experts_that_a_worker_gets_wrong_until_the_next_plan() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
        expert = placement_pb2.ExpertId(layer=0, index=1)
        fault = engine_pb2.ExpertFault(worker_id="w1", expert=expert, reason="out_of_memory")
        mesh.engine.send(engine_pb2.FromEngine(expert_fault=fault))
        while not (report := await mesh.placement.reports.get()).faults:
            pass
        assert list(report.faults) == [placed(1, "w1")]
        mesh.plan(("w0",), ("w1",))
        while (await mesh.placement.reports.get()).faults:
            pass


async def test_a_plan_for_another_model_is_not_followed() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",), model_fingerprint="other")
        mesh.plan(("w1",), ("w1",))
        assert await mesh.routed() == {}
        assert await mesh.routed() == {0: ["w1"], 1: ["w1"]}
        assert mesh.workers[0].connects.empty()


async def test_placement_hears_what_was_routed_since_the_last_report() -> None:
    async with running_mesh() as mesh:
        first = await mesh.placement.reports.get()
        assert (first.gateway_id, first.grpc_address, len(first.load)) == ("g1", "here:1", 0)
        expert = placement_pb2.ExpertId(layer=0, index=1)
        for rows in (10, 25):
            load = [placement_pb2.ExpertLoad(expert=expert, rows=rows)]
            stats = engine_pb2.EngineStats(running=1, load=load)
            mesh.engine.send(engine_pb2.FromEngine(stats=stats))
            while not (report := await mesh.placement.reports.get()).load:
                pass
            assert report.running == 1
            assert report.load[0].rows == {10: 10, 25: 15}[rows]


async def test_at_its_end_every_session_is_given_back() -> None:
    async with running_mesh() as mesh:
        mesh.plan(("w0",), ("w1",))
        await mesh.routed()
        await mesh.routed()
    assert [worker.disconnects.qsize() for worker in mesh.workers] == [1, 1]


def test_routing_has_only_what_is_connected() -> None:
    plan = placement_pb2.Plan(epoch=4, experts=[placed(0, "a", "b"), placed(1, "a")])
    routing = routing_for(plan, {"b": engine_pb2.Peer(worker_id="b")})
    assert routing.experts == [placed(0, "b")]
    assert routing.epoch == 4
    assert routing.pending == [placed(1).expert]  # placement will hear that a is out of reach
    plan.pending.add(layer=0, index=7)
    assert [e.index for e in routing_for(plan, {}).pending] == [7, 0, 1]
    assert missing_experts(TWO_EXPERTS, routing) == [ExpertId(0, 1)]


def test_load_is_what_grew() -> None:
    def stats(*rows: int) -> engine_pb2.EngineStats:
        load = [
            placement_pb2.ExpertLoad(expert=placement_pb2.ExpertId(layer=0, index=i), rows=n)
            for i, n in enumerate(rows)
        ]
        return engine_pb2.EngineStats(load=load)

    grown = load_between(stats(5, 7), stats(5, 9, 1))
    assert [(load.expert.index, load.rows) for load in grown] == [(1, 2), (2, 1)]


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.routing.REPORT_INTERVAL_S", 0.05)
    monkeypatch.setattr("gateway.routing._LOST_PEER_PAUSE_S", 0.05)
