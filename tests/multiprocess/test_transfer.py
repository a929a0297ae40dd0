"""Weights between processes, when the giver stops or its host is cut off amid a transfer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from cli.supervisor import Process, Supervisor
from expert_worker.weights import Taking, WeightTransfers
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId
from tests import netns
from tests.families import PLAIN, make_checkpoint
from tests.integration.test_worker_service import running_worker
from tests.scripted_placement import ScriptedPlacement

needs_namespaces = pytest.mark.skipif(bool(netns.why_not()), reason=netns.why_not())


@contextmanager
def worker_process(directory: Path, placement: str, worker_id: str) -> Iterator[psutil.Process]:
    """A worker that ends with the block, stopped or not."""
    words = ["worker", "--model", str(directory), "--placement", placement]
    words += ["--worker-id", worker_id, "--memory-bytes", str(1 << 30)]
    command = [sys.executable, "-m", "cli.main", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """One layer of two experts of 32 MiB, which are 32 chunks."""
    sizes = {"hidden_size": 256, "intermediate_size": 16384, "num_hidden_layers": 2}
    return make_checkpoint(PLAIN, tmp_path / "model", num_local_experts=2, **sizes)


def until_logged(log: Path, event: str) -> None:
    """Or until the test's own time limit."""
    while event not in log.read_text():
        time.sleep(0.01)


def after_some_chunks(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do it once the first bytes of an expert are in and before the last are asked for."""
    take_next = WeightTransfers._take_next
    done: list[Taking] = []

    def take(transfers: WeightTransfers, taking: Taking) -> bool:
        if taking.received_bytes and not done:
            assert taking.next_chunk < len(taking.chunks)
            done.append(taking)
            act()
        return take_next(transfers, taking)

    monkeypatch.setattr(WeightTransfers, "_take_next", take)


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_giver_that_stops_amid_a_transfer_is_left_for_the_next_source(
    directory: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    # Where it stops amid a fragment, the taker is blocked, and would end.
    monkeypatch.setattr("expert_worker.data_plane.STUCK_PATIENCE_S", 60.0)
    model = ModelConfig.from_hf(directory)
    held = [ExpertId(model.moe_layers[0], index) for index in range(2)]
    async with ScriptedPlacement() as placement:
        with worker_process(directory, placement.address, "giver") as giver:
            async with running_worker(directory, placement.address, "taker"):
                await placement.until_registered("giver", "taker")
                placement.order("giver", held)
                await placement.until_resident("giver", held)
                # The file is measured by the first, so that the peer is tried for the second.
                placement.order("taker", held[:1])
                await placement.until_resident("taker", held[:1])
                after_some_chunks(monkeypatch, lambda: os.kill(giver.pid, how))
                address = placement.registered["giver"].worker.grpc_address
                with capture_logs() as logs:
                    placement.order("taker", held, sources={held[1]: address})
                    await placement.until_resident("taker", held)
                (left,) = [log for log in logs if log["event"] == "expert_not_read"]
                assert (left["way"], left["expert"]) == ("peer", str(held[1]))
                if how is signal.SIGSTOP:
                    assert left["reason"] == f"worker {address} sent nothing for 5 s"
                (read,) = [log for log in logs if log["event"] == "expert_read"]
                assert read["way"] == "file"


@needs_namespaces
async def test_a_giver_whose_host_is_cut_off_amid_a_transfer_is_left_for_the_next_source(
    directory: Path, tmp_path: Path
) -> None:
    held = [ExpertId(1, index) for index in range(2)]
    ends: list[Process] = []
    with netns.Network(["giver", "taker"]) as network:
        async with (
            ScriptedPlacement(network.gate) as placement,
            Supervisor([], tmp_path, ends.append, entry="tests.netns:main") as supervisor,
        ):
            for name in ("giver", "taker"):
                words = [network.namespace(name), "worker", "--model", str(directory)]
                words += ["--host", network.address(name), "--placement", placement.address]
                words += ["--worker-id", name, "--memory-bytes", str(1 << 30)]
                supervisor.spawn(name, words)
            await placement.until_registered("giver", "taker")
            placement.order("giver", held)
            await placement.until_resident("giver", held)
            placement.order("taker", held[:1])
            await placement.until_resident("taker", held[:1])
            address = placement.registered["giver"].worker.grpc_address
            network.slow("giver", "64mbit")
            placement.order("taker", held, sources={held[1]: address})
            await asyncio.to_thread(until_logged, tmp_path / "giver.log", "giving_expert")
            network.cut("giver")
            await placement.until_resident("taker", held)
    told = [json.loads(line) for line in (tmp_path / "taker.log").read_text().splitlines()]
    (left,) = [event for event in told if event["event"] == "expert_not_read"]
    assert left["way"] == "peer"
    assert f"worker {address}" in left["reason"]
    assert [event["way"] for event in told if event["event"] == "expert_read"] == ["file", "file"]
