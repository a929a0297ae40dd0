"""``expert-mesh bench layer`` on a CPU: it checks its answers before it times anything."""

from __future__ import annotations

import pytest

from cli.bench_layer import Shape, run


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_a_layer_over_two_workers_is_right_and_timed(kind: str) -> None:
    shape = Shape(64, 96, kind, num_experts=4, top_k=2, workers=2, device="cpu", dtype="float32")
    lines = run(shape, [1, 40], repeat=3)
    assert [line.rows for line in lines] == [1, 40]
    assert sum(line.error for line in lines) < 2e-5
    # Each worker holds two of the four experts that each of 40 tokens takes two of.
    assert 40 <= lines[1].busiest <= 80
    assert all(0 < line.ours <= line.ours_p99 for line in lines)
