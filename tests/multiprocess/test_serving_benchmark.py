"""The benchmark of serving under load, small and on CPUs: it runs to its end, and ends what it
started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.running import ROOT

COMMAND = [sys.executable, "-m", "benchmarks.serving", "--device", "cpu"]


@pytest.mark.slow
def test_every_load_is_measured_and_answers_are_those_of_a_request_alone(tmp_path: Path) -> None:
    flags = ["--quick", "--model", "tiny", "--concurrency", "1,4"]
    flags += ["--gateways", "2", "--clients", "2"]
    done = subprocess.run(
        [*COMMAND, *flags, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "serving.json").read_text())["tiny"]
    assert (found["gateways"], found["workers"]) == (2, 2)
    assert found["same_alone"]
    assert found["alone_again"] == "16 of 16"
    lines = found["lines"]
    assert [(line["concurrency"], line["completed"]) for line in lines] == [(1, 8), (4, 8)]
    assert all(line["output_tokens"] == 8 * 8 for line in lines)
    assert all(line["among_load"] == "16 of 16" for line in lines)
    assert all(0 < line["expert_wait_share"] < 1 for line in lines)
    assert lines[0]["of_best"] == 1.0
    assert done.stdout.count("in flight: ") == 2
    assert (tmp_path / "serving.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_it_leaves_no_process_behind(number: signal.Signals) -> None:
    flags = ["--model", "demo", "--up", "--experts-per-worker 16"]
    benchmark = subprocess.Popen(
        [*COMMAND, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert benchmark.stdout is not None
    for line in benchmark.stdout:
        if "alone, asked again" in line:
            break
    processes = psutil.Process(benchmark.pid).children(recursive=True)
    assert (
        len(processes) >= 5
    )  # up, its fork server, placement, a gateway's two, a worker, a client
    benchmark.send_signal(number)
    benchmark.communicate()
    assert benchmark.returncode != 0
    assert psutil.wait_procs(processes, timeout=20)[1] == []
