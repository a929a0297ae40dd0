"""What `up` says of GPUs that several processes share. Nothing here needs one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cli import mps
from cli.gpu_memory import reserved_bytes
from cli.up import MeshSpec
from mesh.config import GatewayConfig, WorkerConfig
from mesh.model_config import ModelConfig
from tests.running import DEMO_MODEL


def test_workers_experts_are_reserved_on_their_gateways_gpu() -> None:
    model = ModelConfig.from_hf(DEMO_MODEL)
    config = GatewayConfig(model=DEMO_MODEL, device="cuda", dtype="bfloat16")
    devices = ["cuda:0", "cuda:1"], ["cuda:0", "cuda:0", "cuda:1"]
    worker = WorkerConfig(device="cuda", max_rows=100, merge_rows=100)
    two, one = reserved_bytes(model, config, *devices, 1, worker)
    assert two == 2 * one
    more = reserved_bytes(model, config, *devices, 3, worker)[1]
    expert = len(model.moe_layers) * model.expert_bytes("bfloat16")
    assert more - one == 2 * expert
    larger = reserved_bytes(model, config, *devices, 1, replace(worker, merge_rows=200))[1]
    assert larger - one == 100 * 2 * (model.hidden_size + 3 * model.expert_hidden_size)
    longer = replace(config, max_batch_tokens=config.max_batch_tokens + 300)
    rows = 2 * 2 * 300 * model.experts_per_token // 3  # two gateways' step, over three workers
    more = reserved_bytes(model, longer, *devices, 1, worker)[1]
    assert more - one == rows * 2 * model.hidden_size


def test_on_a_cpu_nothing_is_reserved_and_nothing_shared() -> None:
    spec = MeshSpec.of({"model": DEMO_MODEL})
    assert not spec.shares_gpus
    assert [gateway.reserved_bytes for gateway in spec.gateways] == [0]


def test_without_the_service_it_says_so_and_leaves_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with mps.sharing() as on:
        assert not on
        assert not mps.running()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a script in the place of NVIDIA's control program writes down: the devices that it is
    shown, its directory and what it is told."""
    control, told = tmp_path / "nvidia-cuda-mps-control", tmp_path / "told"
    control.write_text(
        "#!/bin/sh\n"
        f'echo "${{CUDA_VISIBLE_DEVICES-all}} $CUDA_MPS_PIPE_DIRECTORY $* $(/bin/cat)" >> {told}\n',
        encoding="utf-8",
    )
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return told


def test_a_service_is_started_for_the_block_and_ended_behind_it(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with mps.sharing() as on:
        assert on
        assert "quit" not in told.read_text()
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    words = [line.split(maxsplit=2) for line in told.read_text().splitlines()]
    assert [word.strip() for *_, word in words] == [
        "-d",
        "get_default_active_thread_percentage",
        "quit -t 1",
    ]
    assert len({directory for _, directory, _ in words}) == 1


@pytest.mark.parametrize(
    ("shown", "inside"), [("1", "0"), ("2, 0", "0,1"), ("GPU-8932f937", "GPU-8932f937"), ("", "")]
)
def test_clients_number_devices_as_the_service_does(
    told: Path, monkeypatch: pytest.MonkeyPatch, shown: str, inside: str
) -> None:
    """A service that is shown the second GPU alone calls it the first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with mps.sharing():
        assert told.read_text().startswith(shown)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == inside
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
