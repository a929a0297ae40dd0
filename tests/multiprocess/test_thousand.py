"""A mesh before a thousand clients, each with a connection of its own, and what it says of it."""

from __future__ import annotations

import asyncio
import json
import resource
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expert_mesh import AsyncClient
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.running import RunningMesh, running_mesh
from tests.token_is_expert import NUM_LAYERS, make_token_is_expert

NUM_CLIENTS = 1000
FOREVER = 4096


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[RunningMesh]:
    """Two requests run and 300 wait; token t needs expert t alone."""
    model = make_token_is_expert(tmp_path_factory.mktemp("model"))
    flags = ("--experts-per-worker", "2", "--max-running", "2", "--max-waiting", "300")
    with running_mesh("--model", model, "--log-dir", logs, *flags) as mesh:
        yield mesh


def samples(address: str) -> Counter[str]:
    """Each metric's value, without our prefix; the sum, of one with several series."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name.removeprefix("expert_mesh:")] += sample.value
    return found


async def test_what_a_mesh_did_is_in_its_metrics(narrow: RunningMesh) -> None:
    _, gateway, *workers = narrow.ready["http"]

    def of_workers(name: str) -> float:
        return sum(samples(worker)[name] for worker in workers)

    async with AsyncClient(narrow.gateway) as client:
        long = {"max_tokens": FOREVER, "temperature": 0.0, "ignore_eos": True}
        streams = [client.generate([i % 4] * 40, **long) for i in range(5)]
        reading = [asyncio.create_task(anext(stream)) for stream in streams]
        await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        while True:  # what the engine says arrives a little later; the test has a limit
            now = await asyncio.to_thread(samples, gateway)
            if (now["num_requests_running"], now["num_requests_waiting"]) == (2, 3):
                break
        assert 0 < now["kv_cache_usage_perc"] <= 1
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        while now["num_requests_running"] or now["num_requests_waiting"]:
            now = await asyncio.to_thread(samples, gateway)

        before, rows_before = now, of_workers("expert_rows_total")
        for token in range(4):
            await client.complete([token] * 10, max_tokens=5, temperature=0.0)
        while now["generation_tokens_total"] < before["generation_tokens_total"] + 20:
            now = await asyncio.to_thread(samples, gateway)
    assert now["generation_tokens_total"] == before["generation_tokens_total"] + 20
    assert now["prompt_tokens_total"] == before["prompt_tokens_total"] + 40
    # One expert of each layer sees each token but the last, of which nobody asked what follows.
    assert of_workers("expert_rows_total") - rows_before == 4 * (10 + 5 - 1) * NUM_LAYERS
    assert of_workers("expert_compute_seconds_total") > 0
    assert of_workers("queue_rows") == 0


async def test_a_request_is_followed_by_its_id(narrow: RunningMesh, logs: Path) -> None:
    async with AsyncClient(narrow.gateway) as client:
        await client.complete([1, 1], request_id="story-1", max_tokens=3, temperature=0.0)

    def told() -> dict[str, str]:
        lines = (logs / "gateway-0.log").read_text().splitlines()
        events = [json.loads(line) for line in lines if "story-1" in line]
        return {event["event"]: event["request_id"].partition("#")[0] for event in events}

    story = {"request_queued", "request_ended", "request_finished"}
    while not story <= told().keys():
        pass  # until the test's own time limit
    assert {told()[event] for event in story} == {"story-1"}


@pytest.mark.timeout(200)
async def test_a_thousand_clients_at_once(narrow: RunningMesh) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * NUM_CLIENTS:
        pytest.skip(f"{hard} open files are too few")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * NUM_CLIENTS, hard))
    port = int(narrow.gateway.rpartition(":")[2])
    async with AsyncExitStack() as stack:
        options = (("grpc.use_local_subchannel_pool", 1),)
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(narrow.gateway, options=options)
            )
            for _ in range(NUM_CLIENTS)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        connections = psutil.Process().net_connections("tcp")
        assert sum(c.raddr != () and c.raddr.port == port for c in connections) >= NUM_CLIENTS

        async def ask(number: int) -> str:
            token = number % 4
            request = pb.GenerateRequest(stream=True)
            request.prompt_token_ids.ids.append(token)
            request.sampling.max_tokens, request.sampling.temperature = 3, 0.0
            try:
                replies = [r async for r in InferenceStub(channels[number]).Generate(request)]
            except grpc.aio.AioRpcError as error:
                return error.code().name
            said = [token_id for reply in replies for token_id in reply.token_ids]
            return "right" if said == [token] * 3 else f"{said} of {token}"

        answers = Counter(await asyncio.gather(*map(ask, range(NUM_CLIENTS))))
        assert answers.keys() <= {"right", "RESOURCE_EXHAUSTED"}
        assert answers["right"] >= 302
        assert await ask(3) == "right"
