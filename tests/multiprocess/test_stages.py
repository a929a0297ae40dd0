"""The overlap picture and the stages of a step, from processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(benchmark: str, *flags: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--device", "cpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_traces_and_draws_into_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there"
    sizes = ["--rows", "8", "--hidden", "64", "--mlp-hidden", "128", "--workers", "2"]
    said = run("overlap", *sizes, "--steps", "12", "--out", str(out))
    assert "of transfer time hidden" in said
    assert json.loads((out / "overlap-8.json").read_text())["traceEvents"]
    assert (out / "overlap-8.png").stat().st_size > 0


@pytest.mark.parametrize("flags", [[], ["--slices"]], ids=["whole", "slices"])
def test_of_a_step_every_stage_is_told(flags: list[str]) -> None:
    said = run("stages", "--model", "tiny", "--quick", "--json", *flags)
    (found,) = json.loads(said).values()
    assert set(found) == {"1", "4"}
    for one in found.values():
        parts = {name: one[name] for name in ("away_us", "device_us", "gateway_us", "between_us")}
        assert all(us > 0 for us in parts.values()), parts
        assert one["device_us"] < one["away_us"]
