"""Rows shared over replicas: nothing is lost, the slow get less, and nobody is forgotten."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import (
    FIXED_ROWS,
    MAX_PROBE_EVERY,
    MIN_PART_ROWS,
    MIN_PATIENCE_S,
    PROBE_EVERY,
    Balancer,
    level,
)
from mesh.plan import ExpertId

EXPERT = ExpertId(0, 3)
SPEEDS = st.dictionaries(st.sampled_from("abcde"), st.floats(1e-7, 1e-2), min_size=1, max_size=5)
BUSY = st.dictionaries(st.sampled_from("abcde"), st.floats(0, 1), max_size=5)


def balancer_of(**units_s: float) -> Balancer:
    """One that has seen a worker take so long for a row."""
    balancer = Balancer()
    for worker_id, unit_s in units_s.items():
        balancer.observe(worker_id, 0, unit_s * FIXED_ROWS, now=0.0)
    return balancer


def shares_over(balancer: Balancer, num_rows: int, steps: int, workers: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for _ in range(steps):
        total.update(balancer.share(EXPERT, num_rows, workers, {}))
    return total


@given(num_rows=st.integers(1, 10_000), units_s=SPEEDS, busy_s=BUSY)
def test_every_row_goes_somewhere_and_no_part_is_tiny(
    num_rows: int, units_s: dict[str, float], busy_s: dict[str, float]
) -> None:
    balancer = balancer_of(**units_s)
    for _ in range(3):
        shares = balancer.share(EXPERT, num_rows, sorted(units_s), busy_s)
        assert sum(shares.values()) == num_rows
        assert shares.keys() <= units_s.keys()
        assert len(shares) == 1 or min(shares.values()) >= MIN_PART_ROWS


@given(num_rows=st.integers(256, 10_000), units_s=SPEEDS, busy_s=BUSY)
def test_whoever_gets_rows_ends_with_the_others(
    num_rows: int, units_s: dict[str, float], busy_s: dict[str, float]
) -> None:
    shares = level(num_rows, units_s, busy_s)
    ends_s = [busy_s.get(w, 0.0) + units_s[w] * (FIXED_ROWS + rows) for w, rows in shares.items()]
    rounding_s = len(units_s) * max(units_s[w] for w in shares)
    assert max(ends_s) - min(ends_s) <= rounding_s + 1e-9


def test_many_rows_are_split_by_speed() -> None:
    shares = balancer_of(fast=1e-6, slow=3e-6).share(EXPERT, 4000, ["fast", "slow"], {})
    # 3 to 1, but for the message that each costs.
    assert shares == {"fast": 3032, "slow": 968}


def test_few_rows_stay_together_and_take_turns() -> None:
    balancer = balancer_of(a=1e-6, b=1e-6)
    assert all(len(balancer.share(EXPERT, 8, ["a", "b"], {})) == 1 for _ in range(4))
    assert shares_over(balancer, 8, 100, "ab") == {"a": 400, "b": 400}


def test_over_steps_few_rows_are_shared_by_speed() -> None:
    assert shares_over(balancer_of(a=4e-6, b=5e-6), 9, 90, "ab") == {"a": 450, "b": 360}


def test_a_worker_that_the_layer_keeps_busy_is_left_alone() -> None:
    balancer = balancer_of(a=1e-6, b=1e-6)
    assert balancer.share(EXPERT, 8, ["a", "b"], {"a": 1e-3}) == {"b": 8}
    assert balancer.share(EXPERT, 8, ["a", "b"], {"a": 1e-3}) == {"b": 8}


@pytest.mark.parametrize("num_rows", [4, 2000])
def test_the_share_of_a_worker_that_turns_slow_falls_within_a_few_replies(num_rows: int) -> None:
    balancer = balancer_of(a=1e-6, b=1e-6)
    before = shares_over(balancer, num_rows, 10, "ab")["b"]
    for step in range(3):
        balancer.observe("b", num_rows, 20e-6 * (FIXED_ROWS + num_rows), now=0.01 * step)
    assert shares_over(balancer, num_rows, 10, "ab")["b"] < before / 4


@pytest.mark.parametrize("num_rows", [4, 2000])
def test_a_starved_worker_is_tried_again_and_forgiven_at_once(num_rows: int) -> None:
    balancer = balancer_of(a=1e-6, b=50e-6)
    tried = shares_over(balancer, num_rows, 100 * PROBE_EVERY, "ab")["b"]
    assert 0 < tried <= 2 * MIN_PART_ROWS
    balancer.observe("b", num_rows, 1e-6 * (FIXED_ROWS + num_rows), now=10.0)
    assert shares_over(balancer, num_rows, 20, "ab")["b"] > 5 * num_rows


@given(slowness=st.floats(2, 1000), num_rows=st.integers(1, 127))
def test_to_try_a_slow_worker_now_and_then_costs_little(slowness: float, num_rows: int) -> None:
    balancer = balancer_of(a=1e-6, b=slowness * 1e-6)
    shares = shares_over(balancer, num_rows, MAX_PROBE_EVERY + 1, "ab")
    assert shares["b"] > 0
    assert shares["b"] * slowness / shares["a"] < (0.05 if slowness < 128 else 0.3)


def test_a_newcomer_counts_as_fast_until_it_was_measured() -> None:
    balancer = balancer_of(a=1e-6)
    assert shares_over(balancer, 8, 100, "ab") == {"a": 400, "b": 400}


def test_what_is_late_depends_on_what_is_usual() -> None:
    balancer = balancer_of(quick=1e-6, slow=1e-2)
    assert balancer.patience_s("quick", 64) == MIN_PATIENCE_S
    assert balancer.patience_s("slow", FIXED_ROWS) == pytest.approx(8 * 1e-2 * 2 * FIXED_ROWS)
    assert balancer.patience_s("stranger", 1) == 1.0
    balancer.keep_only({"quick"}, {EXPERT})
    assert balancer.patience_s("slow", 64) == 1.0
