"""What benchmarks/stages.py makes of when dispatches came and were answered."""

from __future__ import annotations

import pytest

from benchmarks.stages import Served, stages


def lives(gateway: str, offset: float, steps: int = 5, layers: int = 3) -> list[Served]:
    """Two workers a layer, the second 10 later and 20 longer: away for 100 + 30, then 50 of the
    gateway's; 400 between two steps."""
    found, now = [], offset
    for _ in range(steps):
        for layer in range(layers):
            found.append(Served(0, gateway, layer, 8, now, now + 100, 90))
            found.append(Served(1, gateway, layer, 8, now + 10, now + 130, 95))
            now += 130 + (50 if layer < layers - 1 else 400)
    return found


def in_order(*parts: list[Served]) -> list[Served]:
    return sorted((one for part in parts for one in part), key=lambda one: one.found_us)


def test_a_layer_is_away_until_its_last_reply() -> None:
    found = stages(lives("a", 0.0), 3)
    assert found == pytest.approx(
        {"away_us": 130, "device_us": 95, "gateway_us": 50, "between_us": 400, "together": 0}
    )


@pytest.mark.parametrize(("behind", "together"), [(1.0, 1.0), (20.0, 0.0)])
def test_who_is_answered_at_once_was_computed_together(behind: float, together: float) -> None:
    found = stages(in_order(lives("a", 0.0), lives("b", behind)), 5)
    assert found["together"] == together
    assert found["away_us"] == pytest.approx(130)


def test_the_first_steps_are_left_out() -> None:
    slow = [one._replace(done_us=one.done_us + 40) for one in lives("a", 0.0, steps=2)]
    quick = lives("a", 1e5, steps=4)
    assert stages(in_order(slow, quick), 4)["away_us"] == pytest.approx(130)
    assert stages(in_order(slow, quick), 6)["away_us"] > 140
