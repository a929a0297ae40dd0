"""A worker with a real checkpoint and a real data plane, and a placement that it belongs to.

The model has two layers of sixteen experts; one worker may hold them all, unless a test says
otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import expert_worker.service
from expert_worker.control import SERVICE_NAME
from expert_worker.data_plane import DataPlane
from mesh.config import PlacementConfig, WorkerConfig
from mesh.errors import AlreadyExists, CheckpointError, ConfigError, ModelMismatch, Unavailable
from mesh.grpc_server import open_channel
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_to_proto
from mesh.transport.ucx import UcxTransport
from mesh.wire import HEALTH_NAME
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.control import Running, homes_of, plan_where, running, running_placement
from tests.families import PLAIN, make_checkpoint

COLOCATED = PlacementConfig(port=0, experts_per_worker=16, settle_s=1.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(PLAIN, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(directory: Path) -> ModelConfig:
    return ModelConfig.from_hf(directory)


def running_worker(
    directory: Path, placement: str, worker_id: str = "w0", **options: object
) -> AbstractAsyncContextManager[Running]:
    config = WorkerConfig(
        model=directory, placement=placement, memory_bytes=1 << 30, worker_id=worker_id
    )
    return running(
        replace(config, **options),
        lambda config, stop: expert_worker.service.run(config, worker_id, stop),
    )


def watch_plans(channel: grpc.aio.Channel) -> object:
    return placement_pb2_grpc.PlacementStub(channel).WatchPlan(pb.WatchPlanRequest())


def complete(plan: pb.Plan) -> bool:
    return plan.complete


async def code_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


async def wait_for_health(channel: grpc.aio.Channel, service: str, serving: bool) -> None:
    status = health_pb2.HealthCheckResponse
    wanted = status.SERVING if serving else status.NOT_SERVING
    states = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service)
    )
    async with asyncio.timeout(20):
        async for state in states:
            if state.status == wanted:
                states.cancel()
                return


async def get(url: str) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{url}", timeout=10) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_it_loads_what_it_is_told_and_names_each_expert(directory: Path, model: ModelConfig):
    async with (
        running_placement(model, COLOCATED) as placement,
        open_channel(placement.address) as to_placement,
        running_worker(directory, placement.address) as worker,
        open_channel(worker.address) as channel,
    ):
        plan = await plan_where(watch_plans(to_placement), complete)
        assert [w.grpc_address for w in plan.workers] == [worker.address]
        assert plan.workers[0].ucx_address
        for expert in model_experts(model):
            await wait_for_health(channel, f"expert/{expert}", serving=True)
        await wait_for_health(channel, SERVICE_NAME, serving=True)
        assert (await get(f"{worker.http}/readyz"))[0] == 200
        info = await worker_pb2_grpc.ExpertWorkerStub(channel).Info(worker_pb2.WorkerInfoRequest())
        assert len(info.resident) == 32
        assert info.memory_used_bytes == 32 * model.expert_bytes("float32")
        metrics = (await get(f"{worker.http}/metrics"))[1]
        assert "expert_mesh:resident_experts 32.0" in metrics


def model_experts(model: ModelConfig) -> list[ExpertId]:
    return [ExpertId(layer, i) for layer in model.moe_layers for i in range(model.num_experts)]


async def test_a_gateway_connects_and_a_wrong_one_is_told_why(directory: Path, model: ModelConfig):
    transport = UcxTransport()
    good = worker_pb2.ConnectRequest(
        gateway_id="g0",
        ucx_address=transport.address,
        reply_session=7,
        model_fingerprint=model.fingerprint,
        hidden_size=model.hidden_size,
        dtype="float32",
    )

    def changed(**fields: object) -> worker_pb2.ConnectRequest:
        request = worker_pb2.ConnectRequest()
        request.CopyFrom(good)
        for name, value in fields.items():
            setattr(request, name, value)
        return request

    async with (
        running_placement(model, COLOCATED) as placement,
        running_worker(directory, placement.address) as worker,
        open_channel(worker.address) as channel,
    ):
        stub = worker_pb2_grpc.ExpertWorkerStub(channel)
        reply = await stub.Connect(good)
        assert 0 < reply.session < 1 << 16
        assert (reply.max_rows, bool(reply.ucx_address)) == (4096, True)
        for fields in (
            {"model_fingerprint": "other"},
            {"hidden_size": 1},
            {"dtype": "bfloat16"},
        ):
            code, words = await code_of(stub.Connect(changed(**fields)))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "--model and --dtype" in words
        for fields in (
            {"gateway_id": ""},
            {"ucx_address": b""},
            {"ucx_address": b"x" * 70_000},
            {"reply_session": 1 << 16},
        ):
            code, _ = await code_of(stub.Connect(changed(**fields)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
        code, _ = await code_of(stub.Connect(changed(ucx_address=b"no address at all")))
        assert code is grpc.StatusCode.UNAVAILABLE

        info = await stub.Info(worker_pb2.WorkerInfoRequest())
        assert info.sessions == 1
        request = worker_pb2.DisconnectRequest(gateway_id="g0", session=reply.session)
        await stub.Disconnect(request)
        await stub.Disconnect(request)
        assert (await stub.Info(worker_pb2.WorkerInfoRequest())).sessions == 0
    transport.close()


async def test_experts_are_loaded_by_hand_within_memory_and_model(
    directory: Path, model: ModelConfig
):
    memory_bytes = 2 * model.expert_bytes("float32")
    async with (
        running_placement(model) as placement,
        running_worker(directory, placement.address, memory_bytes=memory_bytes) as worker,
        open_channel(worker.address) as channel,
    ):
        stub = worker_pb2_grpc.ExpertWorkerStub(channel)
        layer = model.moe_layers[0]

        def load(*indices: int, layer: int = layer) -> object:
            experts = [expert_to_proto(ExpertId(layer, i)) for i in indices]
            return stub.LoadExperts(worker_pb2.LoadExpertsRequest(experts=experts))

        assert len((await load(3, 5)).resident) == 2
        await wait_for_health(channel, f"expert/{layer}.5", serving=True)
        code, words = await code_of(load(6))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "w0" in words
        assert str(memory_bytes) in words
        assert (await code_of(load(16)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await code_of(load(0, layer=0)))[0] is grpc.StatusCode.INVALID_ARGUMENT

        request = worker_pb2.UnloadExpertsRequest(experts=[expert_to_proto(ExpertId(layer, 5))])
        assert len((await stub.UnloadExperts(request)).resident) == 1
        await wait_for_health(channel, f"expert/{layer}.5", serving=False)
        await wait_for_health(channel, f"expert/{layer}.3", serving=True)


async def test_it_serves_on_while_placement_is_away_and_comes_back(
    directory: Path, model: ModelConfig
):
    async with running_placement(model, COLOCATED) as first:
        port = int(first.address.rsplit(":", 1)[1])
        worker = running_worker(directory, first.address)
        running = await worker.__aenter__()
        async with open_channel(first.address) as channel:
            before = await plan_where(watch_plans(channel), complete)
    try:
        async with open_channel(running.address) as channel:
            await wait_for_health(channel, SERVICE_NAME, serving=True)
            async with (
                running_placement(model, replace(COLOCATED, port=port)) as second,
                open_channel(second.address) as to_placement,
            ):
                after = await plan_where(watch_plans(to_placement), lambda plan: True)
                assert homes_of(after) == homes_of(before)
                assert after.epoch > before.epoch
    finally:
        await worker.__aexit__(None, None, None)


async def test_a_refusal_at_the_first_registration_ends_it(directory: Path, model: ModelConfig):
    other = replace(model, fingerprint="another model")
    async with (
        running_placement(other) as placement,
        running_worker(directory, placement.address) as worker,
    ):
        with pytest.raises(ModelMismatch, match="same --model"):
            await asyncio.wait_for(worker.task, 20)
    async with (
        running_placement(model) as placement,
        running_worker(directory, placement.address, "twin") as first,
        open_channel(first.address) as channel,
    ):
        await wait_for_health(channel, SERVICE_NAME, serving=True)
        async with running_worker(directory, placement.address, "twin") as second:
            with pytest.raises(AlreadyExists, match="--worker-id"):
                await asyncio.wait_for(second.task, 20)


async def test_it_hands_over_to_a_spare_before_it_leaves(directory: Path, model: ModelConfig):
    async with (
        running_placement(model, COLOCATED) as placement,
        open_channel(placement.address) as to_placement,
        running_worker(directory, placement.address, "old") as old,
        open_channel(old.address) as channel,
    ):
        plans = watch_plans(to_placement)
        await plan_where(plans, complete)
        async with running_worker(directory, placement.address, "spare") as spare:
            async with open_channel(spare.address) as to_spare:
                await wait_for_health(to_spare, SERVICE_NAME, serving=True)
            stub = worker_pb2_grpc.ExpertWorkerStub(channel)
            await stub.Drain(worker_pb2.WorkerDrainRequest())
            await asyncio.wait_for(old.task, 20)
            async with asyncio.timeout(20):
                async for plan in plans:
                    assert plan.complete
                    if {ids[0] for ids in homes_of(plan).values()} == {"spare"}:
                        break


async def test_the_end_of_its_data_plane_is_its_end(
    directory: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    broken = False
    turn = DataPlane._turn

    def break_when_told(plane: DataPlane) -> None:
        if broken:
            raise MemoryError("no memory for a batch")
        turn(plane)

    monkeypatch.setattr(DataPlane, "_turn", break_when_told)
    async with (
        running_placement(model, COLOCATED) as placement,
        running_worker(directory, placement.address) as worker,
        open_channel(worker.address) as channel,
    ):
        await wait_for_health(channel, SERVICE_NAME, serving=True)
        broken = True
        stub = worker_pb2_grpc.ExpertWorkerStub(channel)
        # Wakes the data plane, which nobody answers any more.
        stub.Disconnect(worker_pb2.DisconnectRequest(gateway_id="g", session=1))
        with pytest.raises(Unavailable, match="no memory for a batch"):
            await asyncio.wait_for(worker.task, 20)


async def test_silence_with_work_in_hand_is_not_serving(
    directory: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
):
    stats = DataPlane.stats
    silent_s, longest_batch_s = 6.0, 4.0  # it has computed for about as long before
    monkeypatch.setattr(
        DataPlane,
        "stats",
        lambda plane: replace(
            stats(plane),
            busy=True,
            last_progress_s=time.monotonic() - silent_s,
            longest_batch_s=longest_batch_s,
        ),
    )
    async with (
        running_placement(model, COLOCATED) as placement,
        running_worker(directory, placement.address) as worker,
        open_channel(worker.address) as channel,
    ):
        await wait_for_health(channel, SERVICE_NAME, serving=True)
        longest_batch_s = 0.0
        await wait_for_health(channel, SERVICE_NAME, serving=False)
        await wait_for_health(channel, HEALTH_NAME, serving=False)
        status, body = await get(f"{worker.http}/readyz")
        assert status == 503
        assert "silent for 6 s" in json.loads(body)["reason"]
        assert (await get(f"{worker.http}/healthz"))[0] == 200


async def test_what_cannot_be_served_is_said_at_the_start(directory: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--device cpu"):
        async with running_worker(directory, "127.0.0.1:1", device="cuda:77"):
            pass
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        async with running_worker(tmp_path, "127.0.0.1:1"):
            pass
    truncated = tmp_path / "truncated"
    shutil.copytree(directory, truncated)
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        async with running_worker(truncated, "127.0.0.1:1"):
            pass


async def test_the_process_announces_itself_and_leaves_on_sigterm(
    directory: Path, model: ModelConfig
):
    async with (
        running_placement(model, COLOCATED) as placement,
        open_channel(placement.address) as channel,
    ):
        ours, theirs = os.pipe()
        code = (
            "import asyncio; from pathlib import Path; from mesh.config import WorkerConfig; "
            "from expert_worker.service import serve; "
            f"asyncio.run(serve(WorkerConfig(model=Path({str(directory)!r}), worker_id='w7', "
            f"placement={placement.address!r}, ready_fd={theirs})))"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, pass_fds=[theirs], stderr=asyncio.subprocess.PIPE
        )
        os.close(theirs)
        with os.fdopen(ours) as pipe:
            ready = json.loads(await asyncio.to_thread(pipe.read))
        assert (ready["id"], ready["pid"]) == ("w7", process.pid)
        plans = watch_plans(channel)
        await plan_where(plans, complete)
        process.send_signal(signal.SIGTERM)
        _, stderr = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, stderr.decode()
        events = [json.loads(line) for line in stderr.decode().splitlines()]
        assert events[-1]["event"] == "worker_stopping"
        assert {event["id"] for event in events} == {"w7"}
        await plan_where(plans, lambda plan: not plan.experts)
