"""The placement service over real gRPC, with workers that only pretend to load.

Two layers of two experts and one expert of each layer on a worker, unless a test says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.config import PlacementConfig
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_to_proto
from placement.service import SERVICE_NAME
from protos import placement_pb2 as pb
from tests.control import Mesh, homes_of, plan_where, pretend_worker, running_placement, tiny_model
from tests.families import PLAIN, make_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def model(directory: Path) -> ModelConfig:
    return tiny_model(directory)


def complete(plan: pb.Plan) -> bool:
    return plan.complete


async def code_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def test_workers_register_load_and_are_in_the_plan(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest(gateway_id="g"))
        await mesh.start("w0")
        note = (await mesh.stub.GetPlan(pb.GetPlanRequest())).note
        assert note == "1 of 2 workers are registered"
        await mesh.start("w1")
        plan = await plan_where(plans, complete)
        assert {w for ids in homes_of(plan).values() for w in ids} == {"w0", "w1"}
        assert len(homes_of(plan)) == 4
        assert {w.grpc_address for w in plan.workers} == {"w0:1", "w1:1"}
        assert plan.epoch <= 3  # start-up is coalesced
        late = mesh.stub.WatchPlan(pb.WatchPlanRequest(gateway_id="late"))
        assert await late.read() == plan


async def test_readiness_is_a_complete_plan(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        health = health_pb2_grpc.HealthStub(mesh.channel)
        states = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        status = health_pb2.HealthCheckResponse
        assert (await states.read()).status == status.NOT_SERVING
        await mesh.start("w0")
        await mesh.start("w1")
        assert (await states.read()).status == status.SERVING
        mesh.workers["w1"].call.cancel()
        assert (await states.read()).status == status.NOT_SERVING


async def test_a_killed_worker_leaves_the_plan_at_once_and_a_spare_takes_over(directory: Path):
    model = tiny_model(directory, num_layers=1)
    config = PlacementConfig(port=0, max_replicas=1)
    async with running_placement(model, config) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for name in ("w0", "w1", "w2"):
            await mesh.start(name)
        before = homes_of(await plan_where(plans, complete))
        dead = before[ExpertId(0, 0)][0]
        mesh.workers[dead].call.cancel()
        first = await plan_where(plans, lambda plan: True)
        assert homes_of(first) == {e: ids for e, ids in before.items() if ids != [dead]}
        after = homes_of(await plan_where(plans, complete))
        moved = {e for e in before if before[e] != after[e]}
        assert moved == {e for e, ids in before.items() if ids == [dead]}
        status = await mesh.stub.GetStatus(pb.GetStatusRequest())
        kinds = [event.kind for event in status.events]
        assert kinds == ["worker_registered"] * 3 + ["worker_gone", "moves", "repaired"]
        assert status.moves == 1
        metrics = await metrics_of(server.http)
        assert metrics["expert_mesh:repair_seconds_count"] == 1
        assert metrics['expert_mesh:workers_lost_total{how="gone"}'] == 1
        assert metrics["expert_mesh:expert_moves_total"] == 1


async def metrics_of(address: str) -> dict[str, float]:
    text = await asyncio.to_thread(
        lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    )
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


async def test_a_replica_serves_at_once_when_a_worker_is_killed(directory: Path):
    model = tiny_model(directory, num_layers=1)
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for name in ("w0", "w1", "w2", "w3"):
            await mesh.start(name)
        before = await plan_where(plans, lambda p: sum(map(len, homes_of(p).values())) == 4)
        (dead, other) = homes_of(before)[ExpertId(0, 1)]
        mesh.workers[dead].call.cancel()
        first = await plan_where(plans, lambda plan: True)
        assert first.complete
        assert homes_of(first) == homes_of(before) | {ExpertId(0, 1): [other]}


async def test_a_worker_that_gateways_do_not_reach_is_replaced_and_comes_back(directory: Path):
    model = tiny_model(directory, num_layers=1)
    config = PlacementConfig(port=0, max_replicas=1)
    async with running_placement(model, config) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for name in ("w0", "w1", "w2"):
            await mesh.start(name)
        before = homes_of(await plan_where(plans, complete))
        (hung,) = before[ExpertId(0, 0)]
        (spare,) = {"w0", "w1", "w2"} - {w for ids in before.values() for w in ids}
        gateway = mesh.stub.ReportLoad()
        await gateway.write(pb.GatewayReport(gateway_id="g", unreachable_worker_ids=[hung]))
        first = await plan_where(plans, lambda plan: True)
        assert ExpertId(0, 0) not in homes_of(first)
        assert hung in {w.worker_id for w in first.workers}
        assert homes_of(await plan_where(plans, complete))[ExpertId(0, 0)] == [spare]
        await mesh.workers[hung].report()
        await gateway.write(pb.GatewayReport(gateway_id="g"))
        await plan_where(plans, lambda plan: hung not in {w.worker_id for w in plan.workers})
        events = (await mesh.stub.GetStatus(pb.GetStatusRequest())).events
        assert "worker_back" in {event.kind for event in events}
        gateway.cancel()


async def test_experts_that_fit_nowhere_are_sliced(directory: Path):
    model = tiny_model(directory, num_layers=1)
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for i in range(4):
            worker = pretend_worker(mesh.stub, model, f"w{i}")
            worker.info.memory_bytes = worker.info.expert_bytes // 2
            await mesh.add(worker)
        plan = await plan_where(plans, complete)
        assert plan.expert_shards == 2
        assert sorted(homes_of(plan)) == [ExpertId(0, i) for i in range(4)]
        orders = [order for w in mesh.workers.values() for order in w.orders if order.load]
        assert {order.expert_shards for order in orders} == {2}
        whole = pretend_worker(mesh.stub, model, "w9", resident=[ExpertId(0, 0)])
        code, words = await code_of(whole.register())
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "cut into 1" in words


async def test_a_hung_worker_is_dead_when_its_lease_is_over(model: ModelConfig):
    config = PlacementConfig(port=0, lease_s=0.3)
    async with running_placement(model, config) as server, Mesh(server.address, model) as mesh:
        await mesh.start("w0")
        await mesh.start("w1")
        # Nobody sends a second heartbeat: both streams are ended from the other side.
        async with asyncio.timeout(20):
            assert await mesh.workers["w0"].call.code() is grpc.StatusCode.OK
        assert (await mesh.stub.GetStatus(pb.GetStatusRequest())).workers == []


async def test_another_model_and_a_taken_name_are_refused(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        await mesh.start("w0")
        stranger = pretend_worker(mesh.stub, model, "w1")
        stranger.info.model_fingerprint = "other"
        code, words = await code_of(stranger.register())
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "same --model" in words
        double = pretend_worker(mesh.stub, model, "w0")
        double.info.pid = 99
        code, words = await code_of(double.register())
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "--worker-id" in words
        for change in ({"worker_id": ""}, {"expert_bytes": 0}, {"worker_id": "x" * 1000}):
            odd = pretend_worker(mesh.stub, model, "w2")
            odd.info.MergeFrom(pb.WorkerInfo(**change))
            for name, value in change.items():
                setattr(odd.info, name, value)
            assert (await code_of(odd.register()))[0] is grpc.StatusCode.INVALID_ARGUMENT
        call = mesh.stub.Heartbeat()
        await call.write(pb.WorkerReport(lease_id="never given"))
        assert (await code_of(call.read()))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_restarted_placement_adopts_the_plan_that_is_served(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for name in ("w0", "w1", "spare"):
            await mesh.start(name)
        before = await plan_where(plans, complete)
        residents = {name: worker.resident for name, worker in mesh.workers.items()}

    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for name, resident in residents.items():
            await mesh.start(name, resident=resident, last_epoch=before.epoch)
        # The first plan of the new life is the one that was served, none comes before it.
        after = await plan_where(plans, lambda plan: True)
        assert after.epoch > before.epoch
        assert homes_of(after) == homes_of(before)
        assert not [o for w in mesh.workers.values() for o in w.orders if o.load or o.unload]


async def test_a_drained_worker_hands_over_and_leaves(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        for name in ("w0", "w1", "w2"):
            await mesh.start(name)
        plan = await plan_where(plans, complete)
        leaving = plan.workers[0].worker_id
        await mesh.stub.Drain(pb.DrainRequest(worker_id=leaving), timeout=20)
        assert mesh.workers[leaving].told_to_leave
        plan = await plan_where(plans, lambda plan: leaving not in str(plan.experts))
        assert plan.complete
        code, words = await code_of(mesh.stub.Drain(pb.DrainRequest(worker_id="nobody")))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "expert-mesh status" in words


async def test_gateways_are_seen_while_they_report(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        await mesh.start("w0")
        await mesh.start("w1")
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        await plan_where(plans, complete)
        call = mesh.stub.ReportLoad()
        load = [pb.ExpertLoad(expert=expert_to_proto(ExpertId(0, 1)), rows=50)]
        await call.write(pb.GatewayReport(gateway_id="g0", host="here", epoch=77, load=load))
        # The gateway has seen an epoch that this life of placement has not: it goes beyond.
        assert (await plan_where(plans, lambda plan: True)).epoch == 78
        status = await mesh.stub.GetStatus(pb.GetStatusRequest())
        assert [g.gateway.gateway_id for g in status.gateways] == ["g0"]
        assert [w.state for w in status.workers] == ["ready", "ready"]
        assert status.plan.complete
        await call.done_writing()
        await call
        assert not (await mesh.stub.GetStatus(pb.GetStatusRequest())).gateways
        code, _ = await code_of(nameless(mesh))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


async def nameless(mesh: Mesh) -> None:
    call = mesh.stub.ReportLoad()
    await call.write(pb.GatewayReport())
    await call


async def test_rebalance_counts_its_moves(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        code, words = await code_of(mesh.stub.Rebalance(pb.RebalanceRequest()))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "0 of 2 workers" in words
        await mesh.start("w0")
        await mesh.start("w1")
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        epoch = (await plan_where(plans, complete)).epoch
        reply = await mesh.stub.Rebalance(pb.RebalanceRequest())
        assert (reply.moves, reply.epoch) == (0, epoch)


async def test_colocation_is_said_in_the_plan(directory: Path):
    model = tiny_model(directory, num_experts=4)
    config = PlacementConfig(port=0, experts_per_worker=2)
    async with running_placement(model, config) as server, Mesh(server.address, model) as mesh:
        await mesh.start("w0")
        await mesh.start("w1")
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        plan = await plan_where(plans, complete)
        assert plan.experts_per_worker == 2
        assert "colocated: a worker holds up to 2 of the 4 experts" in plan.note


async def test_a_worker_too_small_for_its_expert_is_named(model: ModelConfig):
    async with running_placement(model) as server, Mesh(server.address, model) as mesh:
        await mesh.start("big")
        small = pretend_worker(mesh.stub, model, "small")
        small.info.memory_bytes = 1500
        await small.register()
        async with asyncio.timeout(20):
            while "small is 548 bytes short" not in (note := await note_of(mesh)):
                assert "small" not in note
        assert "--memory-bytes" in note


async def note_of(mesh: Mesh) -> str:
    return (await mesh.stub.GetPlan(pb.GetPlanRequest())).note


async def test_the_process_announces_itself_and_stops_on_sigterm(tmp_path: Path):
    make_checkpoint(PLAIN, tmp_path)
    ours, theirs = os.pipe()
    code = (
        "import asyncio; from pathlib import Path; from mesh.config import PlacementConfig; "
        "from placement.service import serve; "
        f"asyncio.run(serve(PlacementConfig(port=0, model=Path({str(tmp_path)!r}), "
        f"ready_fd={theirs})))"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, pass_fds=[theirs], stderr=asyncio.subprocess.PIPE
    )
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        ready = json.loads(await asyncio.to_thread(pipe.read))
    model = ModelConfig.from_hf(tmp_path)
    async with Mesh(ready["grpc"], model) as mesh:
        plans = mesh.stub.WatchPlan(pb.WatchPlanRequest())
        await mesh.start("w0")
        # A gateway keeps its stream open for ever: so placement has to end it.
        load = mesh.stub.ReportLoad()
        await load.write(pb.GatewayReport(gateway_id="g"))
        while not (await mesh.stub.GetStatus(pb.GetStatusRequest())).gateways:
            pass
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async with asyncio.timeout(20):
                assert [plan async for plan in plans] == []
        async with asyncio.timeout(20):
            assert await load == pb.ReportLoadReply()
    _, stderr = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0, stderr.decode()
    lines = [json.loads(line) for line in stderr.decode().splitlines()]
    assert not [line for line in lines if line["level"] == "error"]
    events = [line["event"] for line in lines]
    assert events[0] == "placement_listening"
    assert events[-1] == "placement_stopping" or "worker_gone" in events[-1]
