"""``expert-mesh bench layer`` on a CPU: it checks its answers before it times anything."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from cli.bench_layer import run
from cli.layer_reference import measure
from cli.layer_shape import Shape
from cli.ranks import run_ranks


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_a_layer_over_two_workers_is_right_and_timed(kind: str) -> None:
    shape = Shape(64, 96, kind, num_experts=4, top_k=2, workers=2, device="cpu", dtype="float32")
    lines = run(shape, [1, 40], repeat=3)
    assert [line.rows for line in lines] == [1, 40]
    assert sum(line.error for line in lines) < 2e-5
    # Each worker holds two of the four experts that each of 40 tokens takes two of.
    assert 40 <= lines[1].busiest <= 80
    assert all(0 < line.ours <= line.ours_p99 for line in lines)
    assert all(0 < line.post < line.ours for line in lines)
    assert 1 <= lines[0].peers <= lines[1].peers == 2
    assert all(0 < line.reference <= line.reference_p99 for line in lines)
    assert all(line.reference_ranks == 2 and line.reference_error < 2e-5 for line in lines)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_reference_without_counts_is_right_too(workers: int) -> None:
    """An expert a rank and few rows, which is what a graph can hold."""
    shape = Shape(32, 48, "gated", workers, min(2, workers), workers, "cpu", "float32")
    order = {"shape": asdict(shape), "sizes": [1, 6, 300], "repeat": 2}
    for answer in run_ranks(measure, workers, "cpu", order):
        assert answer["error"] < 1e-5
        assert len(answer["times"]) == 2
