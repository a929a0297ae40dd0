"""Whole meshes: placement, workers, gateways and their supervisor, each a real process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from expert_mesh import AsyncClient, Client
from mesh.errors import Overloaded, Unavailable
from tests.running import DEMO_MODEL, RunningMesh, running_mesh
from tests.token_is_expert import make_token_is_expert

PROMPT = "In the beginning God created the heaven and the earth."
FOREVER = 4096
NOTICED_WITHIN_S = 1.0
"""From a worker's death to the end of the requests that need it: a promise, not a speed. UCX
looks at silent peers every 0.3 s, so that it takes 0.5 to 0.7 s, on a busy machine too."""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[RunningMesh]:
    """A mesh that may be broken, and stays so: token t needs the worker of expert t alone."""
    model = make_token_is_expert(tmp_path / "model")
    with running_mesh("--model", model, "--no-restart") as mesh:
        yield mesh


def test_the_ready_line_names_everyone(mesh: RunningMesh) -> None:
    workers = mesh.ready["workers"]
    assert len(workers) == len({worker["pid"] for worker in workers}) == 16
    assert len(mesh.ready["http"]) == 18
    for address in mesh.ready["http"]:
        for path in ("healthz", "readyz", "metrics"):
            with urllib.request.urlopen(f"http://{address}/{path}") as answer:
                assert answer.status == 200


def test_every_expert_is_a_process_of_its_own(mesh: RunningMesh) -> None:
    status = mesh.status()
    assert status["complete"]
    for worker in status["workers"]:
        layers = [layer for layer, _ in worker["experts"]]
        assert sorted(layers) == [0, 1, 2, 3]


def test_it_writes_english(mesh: RunningMesh) -> None:
    answer = mesh.expert_mesh(
        *("generate", "--target", mesh.gateway, "--prompt", PROMPT),
        *("--max-tokens", "40", "--temperature", "0"),
    )
    assert answer["usage"]["completion_tokens"] == 40
    assert {"the", "and", "of"} & set(answer["text"].split())


def test_a_second_up_gives_the_same_tokens_from_fewer_workers(mesh: RunningMesh) -> None:
    with running_mesh("--model", DEMO_MODEL, "--experts-per-worker", "8") as other:
        assert len(other.ready["workers"]) == 2
        assert "coloca" in other.status()["note"]
        answers = []
        for gateway in (mesh.gateway, other.gateway):
            with Client(gateway) as client:
                done = client.complete(PROMPT, max_tokens=64, temperature=0.8, seed=3, logprobs=2)
                answers.append(done.choices[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs


async def test_a_client_that_leaves_frees_its_request(mesh: RunningMesh) -> None:
    async with AsyncClient(mesh.gateway) as client:

        async def until_running(count: int) -> None:
            while (await client.server_info()).running != count:
                pass  # until the test's own time limit

        async with aclosing(client.generate(PROMPT, ignore_eos=True)) as chunks:
            await anext(chunks)
            await until_running(1)
        await until_running(0)


async def test_a_flood_is_answered_to_the_last_request(tmp_path: Path) -> None:
    model = make_token_is_expert(tmp_path / "model")
    flags = ("--experts-per-worker", "4", "--max-running", "4", "--max-waiting", "16")
    with running_mesh("--model", model, *flags) as mesh:
        async with AsyncClient(mesh.gateway) as client:
            answers = await asyncio.gather(
                *(client.complete([i % 4], max_tokens=32, temperature=0) for i in range(200)),
                return_exceptions=True,
            )
            served = [a for a in answers if not isinstance(a, BaseException)]
            refused = [a for a in answers if isinstance(a, Overloaded)]
            assert len(served) + len(refused) == 200
            assert refused
            assert all(
                set(a.token_ids) == {a.token_ids[0]} and len(a.token_ids) == 32 for a in served
            )
            assert (await client.complete([1], max_tokens=3, temperature=0)).token_ids == (1, 1, 1)


async def test_a_killed_worker_ends_the_requests_that_need_it_and_no_others(
    small: RunningMesh,
) -> None:
    victim = small.home_of(layer=0, index=3)
    async with AsyncClient(small.gateway) as client:
        doomed = client.generate([3], max_tokens=FOREVER, temperature=0, ignore_eos=True)
        other = client.generate([2], max_tokens=FOREVER, temperature=0, ignore_eos=True)
        assert (await anext(doomed)).token_ids[0] == 3
        assert (await anext(other)).token_ids[0] == 2
        victims_process = psutil.Process(small.pid_of(victim))
        killed_s = time.monotonic()
        victims_process.kill()

        with pytest.raises(Unavailable, match="expert 3 of layer"):
            async for _ in doomed:
                pass
        assert time.monotonic() - killed_s < NOTICED_WITHIN_S
        event = small.next_event("exited")
        assert (event["name"], event["signal"]) == (victim, signal.SIGKILL)
        assert {token for _ in range(10) for token in (await anext(other)).token_ids} == {2}
        await other.aclose()

        with pytest.raises(Unavailable, match="expert 3 of layer"):
            await client.complete([3], max_tokens=2)
        assert (await client.complete([0], max_tokens=2, temperature=0)).token_ids == (0, 0)
    status = small.status()
    assert not status["complete"]
    assert victim not in {worker["id"] for worker in status["workers"]}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_spare_takes_over_for_a_worker_that_dies_or_hangs(
    tmp_path: Path, how: signal.Signals
) -> None:
    model = make_token_is_expert(tmp_path / "model")
    with running_mesh("--model", model, "--workers", "5") as mesh:
        async with AsyncClient(mesh.gateway) as client:
            streams = [
                client.generate([token], max_tokens=FOREVER, temperature=0, ignore_eos=True)
                for token in range(4)
            ]
            for token, stream in enumerate(streams):
                assert (await anext(stream)).token_ids[0] == token
            victim = psutil.Process(mesh.pid_of(mesh.homes_of(layer=0, index=3)[0]))
            victim.send_signal(how)
            for _ in range(20):
                for token, stream in enumerate(streams):
                    assert set((await anext(stream)).token_ids) == {token}
            if how is signal.SIGSTOP:
                victim.send_signal(signal.SIGCONT)
                for token, stream in enumerate(streams):
                    assert set((await anext(stream)).token_ids) == {token}
            for stream in streams:
                await stream.aclose()


def test_serving_goes_on_without_placement(small: RunningMesh) -> None:
    (placement,) = (p for p in small.processes if _listens_on(p, small.placement))
    placement.kill()
    assert small.next_event("exited")["name"] == "placement"
    with Client(small.gateway) as client:
        assert client.complete([1], max_tokens=2, temperature=0).token_ids == (1, 1)


def _listens_on(process: psutil.Process, address: str) -> bool:
    port = int(address.rpartition(":")[2])
    connections = process.net_connections(kind="tcp")
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def test_sigterm_ends_it_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    with running_mesh("--model", make_token_is_expert(tmp_path / "model")) as mesh:
        assert mesh.end() == 0
        assert mesh.survivors() == []


async def test_requests_in_flight_are_served_before_it_ends(small: RunningMesh) -> None:
    async with AsyncClient(small.gateway) as client:
        chunks = client.generate([1], max_tokens=200, temperature=0, ignore_eos=True)
        tokens = list((await anext(chunks)).token_ids)
        small.up.send_signal(signal.SIGINT)
        async for chunk in chunks:
            tokens += chunk.token_ids
    assert tokens == [1] * 200
    assert await asyncio.to_thread(small.up.wait) == 0


async def test_a_second_ctrl_c_does_not_wait_for_requests(small: RunningMesh) -> None:
    async with AsyncClient(small.gateway) as client:
        chunks = client.generate([1], max_tokens=FOREVER, temperature=0, ignore_eos=True)
        await anext(chunks)
        small.up.send_signal(signal.SIGINT)
        while await client.health():
            pass  # until it drains
        small.up.send_signal(signal.SIGINT)
        with pytest.raises(Unavailable):
            async for _ in chunks:
                pass
    assert await asyncio.to_thread(small.up.wait) == 0
    assert small.survivors() == []


def test_nothing_outlives_a_supervisor_that_is_killed(small: RunningMesh) -> None:
    small.up.kill()
    assert small.survivors() == []


def test_the_end_of_the_fork_server_is_the_end_of_up(tmp_path: Path) -> None:
    with running_mesh("--model", make_token_is_expert(tmp_path / "model")) as mesh:
        (fork_server,) = psutil.Process(mesh.up.pid).children()
        fork_server.kill()
        assert mesh.up.wait() == 1
        assert "the process that starts all others has ended" in mesh.stderr()
        assert mesh.survivors() == []


def test_the_end_of_the_last_gateway_is_the_end_of_up(small: RunningMesh) -> None:
    (gateway,) = (p for p in small.processes if _listens_on(p, small.gateway))
    gateway.kill()
    event = small.next_event("exited")
    assert (event["name"], event["signal"]) == ("gateway-0", signal.SIGKILL)
    assert small.up.wait() == 1
    assert "no gateway is left" in small.stderr()
    assert small.survivors() == []


def test_a_start_that_takes_too_long_says_what_is_missing(tmp_path: Path) -> None:
    model = make_token_is_expert(tmp_path / "model")
    command = [sys.executable, "-m", "cli.main", "up", "--model", str(model)]
    flags = ["--min-workers", "5", "--timeout-s", "10"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not ready after 10 s: 0 of 8 experts loaded" in line
    assert "4 of 5 workers are registered" in line


def test_what_died_is_started_again_where_it_was(tmp_path: Path) -> None:
    with running_mesh("--model", make_token_is_expert(tmp_path / "model")) as mesh:
        names = {mesh.placement: "placement", mesh.gateway: "gateway-0"}
        homes = {a: next(p for p in mesh.processes if _listens_on(p, a)) for a in names}
        for address, name in names.items():
            homes[address].kill()
            end = mesh.next_event("exited")
            assert (end["name"], end["signal"]) == (name, signal.SIGKILL)
            assert mesh.next_event("restarting")["pause_s"] == 0
            joined = mesh.next_event("joined")
            assert (joined["replaces"], joined["address"]) == (name, address)
        with Client(mesh.gateway) as client:
            while not client.health():
                pass  # until the test's own time limit
            assert client.complete([1], max_tokens=2, temperature=0).token_ids == (1, 1)
        assert mesh.status()["complete"]


@pytest.mark.slow
def test_an_idle_mesh_sleeps(mesh: RunningMesh) -> None:
    with Client(mesh.gateway) as client:
        client.complete(PROMPT, max_tokens=4)
    processes = [psutil.Process(mesh.up.pid), *mesh.processes]

    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def used(window_s: float = 5.0) -> float:
        before_s = cpu_s()
        time.sleep(window_s)
        return (cpu_s() - before_s) / window_s

    # The same work costs more beside a busy neighbour: the quietest window counts.
    least = min(used() for _ in range(3))
    assert least < 0.05, f"{least:.1%} of a core"
