"""What the doctor makes of a host."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable

from typer.testing import CliRunner

from cli.doctor import Finding, judge_locked_memory, judge_open_files, judge_shm, judge_transports
from cli.main import app

HERE = ("self/memory", "tcp/eth0", "posix/memory")


def worries(findings: Iterable[Finding]) -> set[str]:
    """What is not ok; each must name a remedy."""
    found = [finding for finding in findings if finding.status != "ok"]
    assert all(finding.remedy for finding in found)
    return {finding.name for finding in found}


def test_a_host_without_rdma_or_gpu_is_well() -> None:
    assert worries(judge_transports(HERE, rdma_nics=[], num_gpus=0)) == set()


def test_an_rdma_nic_that_ucx_cannot_use_is_a_worry() -> None:
    assert worries(judge_transports(HERE, ["mlx5_0"], 0)) == {"RDMA"}
    assert worries(judge_transports((*HERE, "rc_mlx5/mlx5_0:1"), ["mlx5_0"], 0)) == set()


def test_a_gpu_that_ucx_cannot_use_is_a_worry() -> None:
    assert worries(judge_transports(HERE, [], 1)) == {"GPU transports"}
    assert worries(judge_transports((*HERE, "cuda_copy/cuda"), [], 1)) == set()


def test_missing_basics_are_worries() -> None:
    assert worries(judge_transports(("self/memory",), [], 0)) == {"shared memory", "TCP"}


def test_limits() -> None:
    assert worries([judge_shm(64 << 20), judge_open_files(1024)]) == {"/dev/shm", "open files"}
    assert worries([judge_shm(1 << 30), judge_open_files(65536)]) == set()
    assert worries([judge_open_files(resource.RLIM_INFINITY)]) == set()
    assert worries([judge_locked_memory(8 << 20, needed=True)]) == {"locked memory"}
    assert worries([judge_locked_memory(8 << 20, needed=False)]) == set()


def test_this_host_can_serve() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    names = {finding["name"] for finding in json.loads(result.stdout)["findings"]}
    assert {"python", "torch", "UCX", "UCX transports", "/dev/shm", "GPUs"} <= names
