"""The gateway's processes: how they rise, and that they always fall together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from expert_mesh import AsyncClient
from mesh.errors import DeadlineExceeded, Unavailable

ROOT = Path(__file__).parent.parent.parent


class Gateway:
    """A gateway with a scripted engine, in processes of its own."""

    def __init__(self, **fields: Any) -> None:
        read_fd, write_fd = os.pipe()
        config = {
            "model": str(ROOT / "models" / "demo"),
            "port": 0,
            "placement": "127.0.0.1:1",
            "ready_fd": write_fd,
            **fields,
        }
        argv = [sys.executable, "-m", "tests.multiprocess.scripted_gateway", json.dumps(config)]
        self.process = subprocess.Popen(
            argv, cwd=ROOT, pass_fds=[write_fd], stderr=subprocess.PIPE, text=True
        )
        os.close(write_fd)
        with os.fdopen(read_fd) as ready:
            line = ready.readline()
        self.ready: dict[str, Any] = json.loads(line) if line else {}
        self.children = psutil.Process(self.process.pid).children() if line else []

    def end(self) -> tuple[int, str]:
        """Wait for its end; exit code and log."""
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, log

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for child in self.children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    gateway = Gateway()
    yield gateway
    gateway.kill()


async def first_token(client: AsyncClient, token_id: int) -> Any:
    """A stream that has begun. Waits for the engine to load."""
    while True:
        stream = client.generate([token_id])
        try:
            await anext(stream)
        except Unavailable as error:
            if "loading its model" not in str(error):
                raise
        else:
            return stream


async def until_it_drains(client: AsyncClient) -> None:
    """Wait until new requests are refused, as they are once the signal has arrived."""
    refused = ""
    while "shutting down" not in refused:
        try:
            await client.complete([9], timeout_s=0.2)
        except Unavailable as error:
            refused = str(error)
        except DeadlineExceeded:
            pass  # the engine hangs, and the signal has not arrived


def assert_gone(gateway: Gateway) -> None:
    assert len(gateway.children) == 1
    assert not gateway.children[0].is_running()


async def test_it_announces_its_ports_and_says_why_it_is_not_ready(gateway: Gateway) -> None:
    assert gateway.ready["pid"] == gateway.process.pid
    assert gateway.ready["id"].startswith("gateway-")
    async with AsyncClient(gateway.ready["grpc"]) as client:
        await first_token(client, 9)
        assert not await client.health()

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{gateway.ready['http']}{path}") as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    assert (await asyncio.to_thread(get, "/healthz"))[0] == 200
    code, reason = await asyncio.to_thread(get, "/readyz")
    assert (code, "no plan yet from placement" in reason) == (503, True)
    assert "expert_mesh:num_requests_running" in (await asyncio.to_thread(get, "/metrics"))[1]


async def test_a_signal_lets_streams_end_and_takes_nothing_new(gateway: Gateway) -> None:
    async with AsyncClient(gateway.ready["grpc"]) as client:
        stream = await first_token(client, 1)
        gateway.signal(signal.SIGTERM)
        await until_it_drains(client)
        assert gateway.process.poll() is None
        await stream.aclose()
        code, _ = await asyncio.to_thread(gateway.end)
    assert code == 0
    assert_gone(gateway)


async def test_a_second_signal_ends_what_runs(gateway: Gateway) -> None:
    async with AsyncClient(gateway.ready["grpc"]) as client:
        stream = await first_token(client, 1)
        gateway.signal(signal.SIGINT)
        await until_it_drains(client)
        gateway.signal(signal.SIGINT)
        with pytest.raises(Unavailable):
            await anext(stream)
        code, _ = await asyncio.to_thread(gateway.end)
    assert code == 0
    assert_gone(gateway)


async def test_the_death_of_the_engine_is_the_end_of_the_gateway(gateway: Gateway) -> None:
    async with AsyncClient(gateway.ready["grpc"]) as client:
        stream = await first_token(client, 1)
        with pytest.raises(Unavailable, match="engine process ended"):
            await client.complete([2])
        with pytest.raises(Unavailable, match="engine process ended"):
            await anext(stream)
    code, log = await asyncio.to_thread(gateway.end)
    assert code == 1
    assert '"exit_code": 3' in log
    assert_gone(gateway)


async def test_an_engine_that_hangs_is_killed_in_the_end(gateway: Gateway) -> None:
    async with AsyncClient(gateway.ready["grpc"]) as client:
        hanging = await first_token(client, 3)
        gateway.signal(signal.SIGTERM)
        await until_it_drains(client)
        gateway.signal(signal.SIGTERM)
        with pytest.raises(Unavailable):
            await anext(hanging)
    code, log = await asyncio.to_thread(gateway.end)
    assert (code, "engine_killed" in log) == (0, True)
    assert_gone(gateway)


async def test_the_engine_does_not_outlive_a_front_that_was_killed(gateway: Gateway) -> None:
    gateway.process.kill()
    await asyncio.to_thread(psutil.wait_procs, gateway.children, 10)
    assert_gone(gateway)


def test_a_port_in_use_is_said_and_leaves_no_engine(gateway: Gateway) -> None:
    port = int(gateway.ready["grpc"].rpartition(":")[2])
    code, log = Gateway(port=port).end()
    assert code == 1
    assert f"cannot listen for gRPC on 127.0.0.1:{port}" in log


def test_an_engine_that_cannot_load_says_why() -> None:
    code, log = Gateway(threads=7).end()
    assert code == 1
    assert "the weights are bad; fetch them again" in log


def test_a_directory_that_is_no_checkpoint_is_said_at_once(tmp_path: Path) -> None:
    code, log = Gateway(model=str(tmp_path)).end()
    assert (code, "has no config.json" in log) == (1, True)
