"""The overlap picture, from processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_traces_and_draws_into_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    out = tmp_path / "not" / "there"
    sizes = ["--rows", "8", "--hidden", "64", "--mlp-hidden", "128", "--workers", "2"]
    command = [sys.executable, "-m", "benchmarks.overlap", "--device", "cpu", *sizes]
    done = subprocess.run(
        [*command, "--steps", "12", "--out", out], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "of transfer time hidden" in done.stdout
    assert json.loads((out / "overlap-8.json").read_text())["traceEvents"]
    assert (out / "overlap-8.png").stat().st_size > 0
