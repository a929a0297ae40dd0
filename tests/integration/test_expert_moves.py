"""Experts in slices, and experts that come from another worker, by the order of placement.

The model has two layers of sixteen experts. Rows go through a real dispatcher to real workers.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import torch

from expert_worker.weights import Giving, WeightTransfers
from mesh.grpc_server import open_channel
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId
from protos import worker_pb2, worker_pb2_grpc
from tests.families import PLAIN, make_checkpoint
from tests.integration.test_worker_service import code_of, get, running_worker, wait_for_health
from tests.local_experts import LocalExperts
from tests.scripted_placement import Caller, ScriptedPlacement

NUM_TOKENS = 12


@pytest.fixture(scope="module", params=[PLAIN, "qwen3_moe", "gpt_oss"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(request.param, tmp_path_factory.mktemp("model"), sharded=True)


@pytest.fixture
def model(directory: Path) -> ModelConfig:
    return ModelConfig.from_hf(directory)


@pytest.fixture
async def placement() -> AsyncIterator[ScriptedPlacement]:
    async with ScriptedPlacement() as scripted:
        yield scripted


def without_weights(directory: Path, copy: Path) -> Path:
    """What a host needs that is to get its experts from others."""
    copy.mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(directory / name, copy)
    return copy


def units(model: ModelConfig, shards: int = 1) -> list[ExpertId]:
    layer = model.moe_layers[0]
    return [ExpertId(layer, index) for index in range(model.num_experts * shards)]


async def answers_like_whole_experts(
    directory: Path, model: ModelConfig, placement: ScriptedPlacement, shards: int = 1
) -> Caller:
    caller = Caller(directory, model)
    await caller.connect(placement.routes(shards))
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(NUM_TOKENS, model.hidden_size, generator=generator)
    scores_TE = torch.rand(NUM_TOKENS, model.num_experts, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(model.experts_per_token, dim=1)
    layer = model.moe_layers[0]
    y_TD = await caller.ask(layer, x_TD, ids_TK, weights_TK)
    expected = LocalExperts(directory, model).dispatch(layer, x_TD, ids_TK, weights_TK).combine()
    torch.testing.assert_close(y_TD, expected, rtol=1e-4, atol=1e-5)
    return caller


async def test_slices_answer_as_whole_experts_do(
    directory: Path, model: ModelConfig, placement: ScriptedPlacement
) -> None:
    # Each worker has memory for a third of all there is: one slice of every expert.
    memory_bytes = model.num_experts * -(-model.expert_bytes("float32") // 3) + 2048
    options = {"memory_bytes": memory_bytes, "threads": 1}
    async with (
        running_worker(directory, placement.address, "w0", **options) as first,
        running_worker(directory, placement.address, "w1", **options),
        running_worker(directory, placement.address, "w2", **options),
    ):
        await placement.until_registered("w0", "w1", "w2")
        assert placement.registered["w0"].expert_shards == 0
        for part in range(3):
            held = units(model, 3)[part::3]
            placement.order(f"w{part}", held, shards=3)
            await placement.until_resident(f"w{part}", held)
        async with open_channel(first.address) as channel:
            await wait_for_health(channel, f"expert/{units(model, 3)[45]}", serving=True)
        caller = await answers_like_whole_experts(directory, model, placement, shards=3)
        caller.close()


async def test_another_number_of_slices_is_another_start(
    directory: Path, model: ModelConfig, placement: ScriptedPlacement
) -> None:
    async with (
        running_worker(directory, placement.address) as worker,
        open_channel(worker.address) as channel,
    ):
        await placement.until_registered("w0")
        placement.order("w0", units(model))
        await placement.until_resident("w0", units(model))
        old = await answers_like_whole_experts(directory, model, placement)

        placement.order("w0", units(model, 2), shards=2)
        await placement.until_resident("w0", units(model, 2))
        # Who counts whole experts gets no answer at all, let alone a slice's.
        with pytest.raises(AssertionError):
            await old.ask(
                model.moe_layers[0],
                torch.ones(1, model.hidden_size),
                torch.tensor([[1]]),
                torch.ones(1, 1),
            )
        old.close()
        plan = placement.routes(shards=1)
        caller = Caller(directory, model)
        code, words = await code_of(caller.connect(plan))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "counts 16 experts and slices in a layer, this worker 32" in words
        caller.close()
        caller = await answers_like_whole_experts(directory, model, placement, shards=2)
        caller.close()
        stub = worker_pb2_grpc.ExpertWorkerStub(channel)
        info = await stub.Info(worker_pb2.WorkerInfoRequest())
        assert info.memory_used_bytes == 32 * -(-model.expert_bytes("float32") // 2)


@pytest.mark.parametrize("shards", [1, 2])
async def test_a_host_without_weights_gets_them_from_a_worker(
    directory: Path, model: ModelConfig, placement: ScriptedPlacement, tmp_path: Path, shards: int
) -> None:
    bare = without_weights(directory, tmp_path / "bare")
    experts = units(model, shards)
    async with (
        running_worker(directory, placement.address, "giver") as giver,
        running_worker(bare, placement.address, "taker") as taker,
    ):
        await placement.until_registered("giver", "taker")
        placement.order("taker", experts[:1], shards=shards)
        assert "no weights on its host" in await placement.until_error("taker")
        placement.order("giver", experts, shards=shards)
        await placement.until_resident("giver", experts)
        sources = dict.fromkeys(experts, giver.address)
        placement.order("taker", experts, shards=shards, sources=sources)
        await placement.until_resident("taker", experts)
        metrics = (await get(f"{taker.http}/metrics"))[1]
        assert 'expert_read_bytes_per_second{way="peer"}' in metrics
        giver.stop.set()
        await asyncio.gather(giver.task)
        del placement.reports["giver"], placement.registered["giver"]
        caller = await answers_like_whole_experts(directory, model, placement, shards)
        caller.close()


async def test_what_a_giver_refuses(
    directory: Path, model: ModelConfig, placement: ScriptedPlacement
) -> None:
    async with (
        running_worker(directory, placement.address) as worker,
        open_channel(worker.address) as channel,
    ):
        await placement.until_registered("w0")
        held = units(model)[:1]
        placement.order("w0", held)
        await placement.until_resident("w0", held)
        stub = worker_pb2_grpc.ExpertWorkerStub(channel)

        async def code(**fields: object) -> grpc.StatusCode:
            good = {"model_fingerprint": model.fingerprint, "dtype": "float32", "worker_id": "w1"}
            good |= {"ucx_address": worker_address, "expert": {"layer": model.moe_layers[0]}}
            request = worker_pb2.SendExpertRequest(**(good | fields))
            return (await code_of(stub.SendExpert(request).read()))[0]

        worker_address = placement.registered["w0"].worker.ucx_address
        for fields in ({"model_fingerprint": "x"}, {"dtype": "float16"}, {"expert_shards": 2}):
            assert await code(**fields) is grpc.StatusCode.FAILED_PRECONDITION
        absent = {"layer": model.moe_layers[0], "index": 1}
        assert await code(expert=absent) is grpc.StatusCode.UNAVAILABLE
        assert await code(ucx_address=b"no address") is grpc.StatusCode.UNAVAILABLE


async def test_a_giver_that_does_not_answer_is_named(
    directory: Path,
    model: ModelConfig,
    placement: ScriptedPlacement,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expert_worker.expert_reader._ANSWER_TIMEOUT_S", 0.2)
    bare = without_weights(directory, tmp_path / "bare")
    held = units(model)[:1]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with running_worker(bare, placement.address):
            await placement.until_registered("w0")
            placement.order("w0", held, sources={held[0]: address})
            error = await placement.until_error("w0")
            assert f"worker {address} did not answer within 0.2 s" in error


async def test_a_giver_that_ends_half_way_leaves_it_to_the_file(
    directory: Path,
    model: ModelConfig,
    placement: ScriptedPlacement,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stalled = asyncio.Event()
    loop = asyncio.get_running_loop()
    give_next = WeightTransfers._give_next

    def give_one(transfers: WeightTransfers, giving: Giving) -> bool:
        if giving.due and giving.due[0] > 0:
            loop.call_soon_threadsafe(stalled.set)
            return False
        return give_next(transfers, giving)

    held = units(model)[:2]
    async with running_worker(directory, placement.address, "taker") as taker:
        async with running_worker(directory, placement.address, "giver") as giver:
            await placement.until_registered("giver", "taker")
            placement.order("giver", held)
            await placement.until_resident("giver", held)
            # The file is measured by the first, so that the peer is tried for the second.
            placement.order("taker", held[:1])
            await placement.until_resident("taker", held[:1])
            monkeypatch.setattr(WeightTransfers, "_give_next", give_one)
            placement.order("taker", held, sources={held[1]: giver.address})
            await asyncio.wait_for(stalled.wait(), 20)
            assert [e.index for e in placement.reports["taker"].resident] == [0]
        del placement.reports["giver"], placement.registered["giver"]
        await placement.until_resident("taker", held)
        metrics = (await get(f"{taker.http}/metrics"))[1]
        assert 'expert_read_bytes_per_second{way="peer"} 0.0' in metrics
