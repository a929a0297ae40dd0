"""What a person is shown of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.report import plot, table_of

RESULTS = {
    "floor": {"prefill_tokens_per_s": 900.0, "tpot_ms": {"1": 1.0, "32": 2.0}},
    "ours": {
        "prefill_tokens_per_s": 800.0,
        "tpot_ms": {"1": 1.5, "32": 2.25},
        "batch_tokens_agree": "64 of 64",
    },
    "transformers": {"failed": "[/rank0] it is not installed"},
}


def test_a_side_is_a_line_and_one_that_failed_says_why() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table_of("one", RESULTS, (1, 32)))
    lines = captured.get().splitlines()
    (ours,) = [line for line in lines if "ours" in line]
    assert all(word in ours for word in ("800", "1.50", "2.25", "64 of 64"))
    (peer,) = [line for line in lines if "transformers" in line]
    assert "[/rank0] it is not installed" in peer


def test_the_plot_is_of_those_that_ran(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures are optional")
    plot({"one": RESULTS}, tmp_path / "papers.png")
    assert (tmp_path / "papers.png").read_bytes().startswith(b"\x89PNG")
