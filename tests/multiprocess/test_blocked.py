"""Shared memory that brings nothing any more, because a sender ended amid a message."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from expert_mesh import AsyncClient
from mesh import wire
from mesh.errors import PeerLost, TransportError
from mesh.transport.base import Endpoint, why_stuck
from mesh.transport.ucx import UcxTransport
from tests.multiprocess.test_elastic import until
from tests.multiprocess.test_faulty_worker import experts_of
from tests.multiprocess.test_transfer import worker_process
from tests.multiprocess.test_ucx import ALL, Process
from tests.rig import HIDDEN_SIZE, Worker, compiled
from tests.running import RunningMesh, running_mesh
from tests.scripted_placement import ScriptedPlacement
from tests.token_is_expert import make_token_is_expert

DYING = "dying"
_kept: list[torch.Tensor] = []


def end_amid_a_message_to(address: bytes, transport: UcxTransport | None = None) -> None:
    """Have a process do so; ``transport`` has to be turned meanwhile where nobody else does."""
    command = [sys.executable, "-m", "tests.ends_amid", "amid-a-fragment", address.hex(), "65536"]
    command.append("2")
    process = subprocess.Popen(command)
    while process.poll() is None:
        if transport is not None:
            transport.progress()
    assert process.returncode == -signal.SIGSEGV


def turn_until(transport: UcxTransport, done: Callable[[], bool], within_s: float = 20.0) -> bool:
    """Whether it was done in time."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        if done():
            return True
        transport.progress()
    return False


def bytes_of(transport: UcxTransport, nbytes: int) -> object:
    """For good: what is begun may be written to for as long as the transport is turned."""
    _kept.append(torch.zeros(nbytes, dtype=torch.uint8))
    return transport.wrap(_kept[-1])


def test_who_ends_amid_a_message_is_told_from_who_takes_none() -> None:
    stopped = Process("stopped", [])
    stopped.wait_started()
    transport = UcxTransport()
    endpoint = transport.connect(stopped.address)
    first = endpoint.send(bytes_of(transport, 64), 1)
    assert turn_until(transport, lambda: first.completed)
    # It takes nothing, and what we send it waits for room in its queue ...
    stopped.process.send_signal(signal.SIGSTOP)
    waiting = [endpoint.send(bytes_of(transport, 65536), 1) for _ in range(100)]
    turn_until(transport, lambda: transport.stuck_s() > 0, within_s=3)
    assert not transport.arm()
    assert not all(request.completed for request in waiting)
    assert transport.stuck_s() == 0
    # ... for ever, where it is killed.
    stopped.kill()
    endpoint.close()
    turn_until(transport, lambda: transport.stuck_s() > 0, within_s=3)
    assert transport.stuck_s() == 0

    end_amid_a_message_to(transport.address, transport)
    assert turn_until(transport, lambda: why_stuck(transport, 0.5) is not None)
    transport.close()


def test_a_transport_that_was_opened_anew_hears_and_owes_nothing() -> None:
    transport, other = UcxTransport(), UcxTransport()

    def hears() -> bool:
        endpoint: Endpoint = other.connect(transport.address)
        sent = endpoint.send(bytes_of(other, 64), 7)

        def arrived() -> bool:
            other.progress()
            message = transport.probe()
            return message is not None and message.receive(bytes_of(transport, 64)).completed

        came = turn_until(transport, arrived, within_s=3)
        endpoint.close()
        assert sent.completed
        return came

    descriptor = transport.fileno()
    end_amid_a_message_to(transport.address, transport)
    while (message := transport.probe()) is not None:
        never = message.receive(bytes_of(transport, message.nbytes))
    assert not hears()
    assert not never.completed
    before = transport.address
    transport.reopen()
    assert never.completed
    assert "reset" in str(transport.failure(never)).lower()
    assert transport.address != before
    assert transport.fileno() == descriptor
    assert hears()
    assert transport.stuck_s() == 0
    transport.close()
    other.close()


def test_the_rest_of_a_message_whose_sender_died_is_waited_for_until_the_transport_is_another() -> (
    None
):
    transport = UcxTransport()
    nbytes = 32 << 20
    command = ["tests.ends_amid", "between-fragments", transport.address.hex(), str(nbytes), "2"]
    process = subprocess.Popen([sys.executable, "-m", *command])
    assert turn_until(transport, lambda: transport.probe() is not None)
    assert process.wait() == -signal.SIGKILL
    found = []

    def begun() -> bool:
        message = transport.probe()
        if message is not None:
            found.append(message.receive(bytes_of(transport, nbytes)))
        return bool(found)

    assert turn_until(transport, begun)
    (never,) = found
    transport.cancel(never)
    # What others send comes: nothing is blocked.
    assert not turn_until(transport, lambda: never.completed or transport.stuck_s() > 0, within_s=3)
    transport.reopen()
    assert never.completed
    assert isinstance(transport.failure(never), PeerLost)
    transport.close()


@pytest.mark.parametrize("expert", [2, wire.SEVERAL], ids=["compiled", "python"])
def test_a_data_plane_waits_no_more_for_the_rest_of_what_a_dead_gateway_sent(
    expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_worker.data_plane._CALL_TIMEOUT_S", 60.0)
    monkeypatch.setenv("UCX_MM_FIFO_SIZE", "32")  # far less than it is to send
    rows = wire.MAX_ROWS
    load = None if expert == wire.SEVERAL else compiled
    worker = Worker("w", UcxTransport, ALL, max_rows=rows, load=load)
    gateway = UcxTransport()
    session = worker.plane.connect("g", gateway.address, 7)
    tag = wire.encode(wire.Kind.DISPATCH, session, 0, 0, expert, rows)
    nbytes = (rows + (expert == wire.SEVERAL)) * 4 * HIDDEN_SIZE
    command = ["tests.ends_amid", "between-fragments", worker.address.hex(), str(nbytes), str(tag)]

    def send_a_part() -> None:
        """While the data plane takes nothing."""
        assert subprocess.run([sys.executable, "-m", *command]).returncode == -signal.SIGKILL

    worker.plane.weights(lambda transfers: send_a_part())
    time.sleep(0.5)
    worker.plane.drain(0.1)  # begun: it is waited for while its gateway may live
    assert worker.plane._busy()
    worker.plane.disconnect("g", session)
    began_s = time.monotonic()
    worker.plane.drain(30)
    assert time.monotonic() - began_s < 20
    assert worker.plane.is_alive()
    worker.plane.stop()
    gateway.close()


def test_a_data_plane_that_is_blocked_ends_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expert_worker.data_plane.STUCK_PATIENCE_S", 0.5)
    worker = Worker("w", UcxTransport, ALL)
    end_amid_a_message_to(worker.address)
    worker.plane.join(20)
    assert isinstance(worker.plane.failure, TransportError)
    assert "shared memory" in str(worker.plane.failure)


async def test_a_worker_process_that_is_blocked_ends(tmp_path: Path) -> None:
    model = make_token_is_expert(tmp_path / "model")
    async with ScriptedPlacement() as placement:
        with worker_process(model, placement.address, "w") as process:
            await placement.until_registered("w")
            end_amid_a_message_to(placement.registered["w"].worker.ucx_address)
            assert await asyncio.to_thread(process.wait, 30) == 1


@contextmanager
def dying_worker(mesh: RunningMesh, model: Path, num_replies: int) -> Iterator[None]:
    """A worker that joins, and dies amid the reply after so many."""
    flags = ("--model", str(model), "--placement", mesh.placement, "--worker-id", DYING)
    command = [sys.executable, "-m", "tests.ends_amid", "worker", str(num_replies), *flags]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.DEVNULL) as process:
        try:
            yield
            assert process.wait(20) == -signal.SIGSEGV
        finally:
            process.kill()


async def test_a_worker_that_dies_amid_its_answer_costs_no_request(tmp_path: Path) -> None:
    model, logs = make_token_is_expert(tmp_path / "model"), tmp_path / "logs"
    with (
        running_mesh("--model", model, "--max-replicas", "1", "--log-dir", logs) as mesh,
        dying_worker(mesh, model, num_replies=50),
    ):
        await until(mesh, lambda status: experts_of(status, DYING) is not None)
        # It is given what a worker has that leaves; one more comes, for when it dies.
        home = mesh.home_of(layer=0, index=3)
        drain = ("drain", home, "--target", mesh.placement)
        await asyncio.to_thread(mesh.expert_mesh, *drain)
        assert mesh.home_of(layer=0, index=3) == DYING
        await asyncio.to_thread(mesh.ask, "scale", "4")
        async with AsyncClient(mesh.gateway) as client:
            answers = await asyncio.gather(
                *(client.complete([i % 4], max_tokens=200, temperature=0) for i in range(8))
            )
        assert [answer.token_ids for answer in answers] == [(i % 4,) * 200 for i in range(8)]
        events = [json.loads(line) for line in (logs / "gateway-0.log").read_text().splitlines()]
        (reopened,) = [event for event in events if event["event"] == "transport_reopened"]
        assert "shared memory" in reopened["reason"]
