"""Meshes that grow, shrink and are replaced worker by worker while they serve."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from expert_mesh import AsyncClient
from tests.running import RunningMesh, running_mesh
from tests.token_is_expert import make_token_is_expert

NUM_EXPERTS = 4
NUM_TOKENS = 24


@pytest.fixture
def small(tmp_path: Path) -> Iterator[RunningMesh]:
    """A worker for each of four experts; token t needs expert t alone."""
    with running_mesh("--model", make_token_is_expert(tmp_path / "model")) as mesh:
        yield mesh


@asynccontextmanager
async def load(mesh: RunningMesh) -> AsyncIterator[None]:
    """Two clients for each expert, one request after the other; each answer must be right."""
    stopping = asyncio.Event()

    async def client_of(expert: int, client: AsyncClient) -> int:
        num_answers = 0
        while not stopping.is_set():
            answer = await client.complete([expert], max_tokens=NUM_TOKENS, temperature=0)
            assert answer.token_ids == (expert,) * NUM_TOKENS
            num_answers += 1
        return num_answers

    async with AsyncClient(mesh.gateway) as client, asyncio.TaskGroup() as tasks:
        clients = [
            tasks.create_task(client_of(expert, client)) for expert in 2 * [*range(NUM_EXPERTS)]
        ]
        await client.complete([0], max_tokens=1)
        try:
            yield
        finally:
            stopping.set()
    assert all(client.result() > 0 for client in clients)


async def until(mesh: RunningMesh, holds: Callable[[dict[str, Any]], bool]) -> None:
    """Or until the test's own time limit."""
    while not holds(await asyncio.to_thread(mesh.status)):
        pass


def worker_ids(mesh: RunningMesh) -> set[str]:
    return {worker["id"] for worker in mesh.status()["workers"]}


async def test_it_grows_and_shrinks_under_load(small: RunningMesh) -> None:
    before = worker_ids(small)
    async with load(small):
        *came, done = await asyncio.to_thread(small.ask, "scale", "6")
        assert {event["event"] for event in came} == {"joined"}
        comers = {event["name"] for event in came}
        assert len(comers) == 2
        assert done["workers"] == 6
        await until(
            small,
            lambda status: comers <= {w["id"] for w in status["workers"] if w["experts"]},
        )

        *left, done = await asyncio.to_thread(small.ask, "scale", "4")
        assert {(event["event"], event["name"]) for event in left} == {
            ("left", comer) for comer in comers
        }
        assert done["workers"] == 4
    status = small.status()
    assert status["complete"]
    assert worker_ids(small) == before
    told = [small.next_event(name) for name in ("joined", "joined", "left", "left")]
    assert {event["name"] for event in told} == comers


async def test_every_worker_is_replaced_under_load(small: RunningMesh) -> None:
    before = {worker["pid"] for worker in small.ready["workers"]}
    async with load(small):
        events = await asyncio.to_thread(small.ask, "roll")
    replaced = [event for event in events if event["event"] == "replaced"]
    assert [event["done"] for event in replaced] == [1, 2, 3, 4]
    status = small.status()
    assert status["complete"]
    assert {worker["id"] for worker in status["workers"]} == {event["by"] for event in replaced}
    assert not any(psutil.pid_exists(pid) for pid in before)


async def test_a_worker_told_to_end_hands_its_experts_over_first(tmp_path: Path) -> None:
    model = make_token_is_expert(tmp_path / "model")
    with running_mesh("--model", model, "--workers", "5") as mesh:
        victim = mesh.home_of(layer=0, index=2)
        async with load(mesh):
            psutil.Process(mesh.pid_of(victim)).terminate()
            left = await asyncio.to_thread(mesh.next_event, "left")
            assert (left["name"], left["workers"]) == (victim, 4)
        status = mesh.status()
        assert status["complete"]
        assert victim not in {worker["id"] for worker in status["workers"]}


async def test_a_worker_drained_by_hand_is_not_started_again(tmp_path: Path) -> None:
    model = make_token_is_expert(tmp_path / "model")
    with running_mesh("--model", model, "--workers", "5") as mesh:
        victim = mesh.home_of(layer=0, index=1)
        async with load(mesh):
            await asyncio.to_thread(mesh.expert_mesh, "drain", victim, "--target", mesh.placement)
        assert mesh.next_event("left")["name"] == victim
        assert len(worker_ids(mesh)) == 4


async def test_a_killed_worker_is_back_before_a_request_gives_up(small: RunningMesh) -> None:
    victim = small.home_of(layer=0, index=3)
    async with load(small):
        psutil.Process(small.pid_of(victim)).kill()
        for event in ("exited", "restarting", "joined"):
            told = await asyncio.to_thread(small.next_event, event)
            assert victim in (told["name"], told.get("replaces"))
        await until(small, lambda status: bool(status["complete"]))


async def test_a_worker_that_hangs_is_killed_and_started_again(tmp_path: Path) -> None:
    model = make_token_is_expert(tmp_path / "model")
    flags = ("--workers", "5", "--hung-after-s", "3", "--expert-patience-s", "30")
    with running_mesh("--model", model, *flags) as mesh:
        victim = mesh.home_of(layer=0, index=1)
        async with load(mesh):
            psutil.Process(mesh.pid_of(victim)).suspend()
            hung = await asyncio.to_thread(mesh.next_event, "hung")
            assert (hung["name"], hung["pid"]) == (victim, mesh.pid_of(victim))
            exited = await asyncio.to_thread(mesh.next_event, "exited")
            assert (exited["name"], exited["signal"]) == (victim, signal.SIGKILL)
            assert (await asyncio.to_thread(mesh.next_event, "restarting"))["name"] == victim
            assert (await asyncio.to_thread(mesh.next_event, "joined"))["replaces"] == victim
            await until(mesh, lambda status: bool(status["complete"]))


def complaint(*words: str) -> str:
    """The one line that a wish gets which is refused."""
    command = [sys.executable, "-m", "cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_it_never_shrinks_below_what_the_rules_need(small: RunningMesh) -> None:
    said = complaint("scale", "3", "--mesh", small.name)
    assert "3 workers cannot hold every expert" in said
    assert "4 can" in said
    said = complaint("drain", "worker-00", "--target", small.placement)
    assert "without worker-00 there are 3 workers" in said
    assert len(worker_ids(small)) == 4


def test_a_roll_that_is_broken_off_leaves_the_mesh_whole(small: RunningMesh) -> None:
    command = [sys.executable, "-m", "cli.main", "roll", "--json", "--mesh", small.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rolling:
        assert small.next_event("left")["name"] == "worker-00"
        assert small.next_event("replaced")["by"] == "worker-00.2"
        assert "the mesh is rolling" in complaint("scale", "6", "--mesh", small.name)
        rolling.kill()
    while len(left := worker_ids(small)) != NUM_EXPERTS or not small.status()["complete"]:
        pass  # until the test's own time limit
    assert "worker-03" in left


def test_it_ends_in_order_in_the_middle_of_a_roll(small: RunningMesh) -> None:
    command = [sys.executable, "-m", "cli.main", "roll", "--mesh", small.name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as rolling:
        small.next_event("left")
        assert small.end() == 0
        _, said = rolling.communicate()
    assert "ended" in said
    assert small.survivors() == []
