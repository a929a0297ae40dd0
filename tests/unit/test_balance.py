"""Replicas and balance against what others publish, on real and on made-up traffic."""

from __future__ import annotations

import pytest

from placement.rules import Rules
from tests.balancers import (
    CASES,
    PEERS,
    Traffic,
    balance,
    eplb,
    loads_to_make,
    ours,
    rules_and_workers,
    slowest,
)


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Traffic, Traffic, list[str], Rules]:
    then, now, num_workers = CASES[request.param]
    rules, workers = rules_and_workers(then, num_workers)
    return then, now, workers, rules


def test_the_first_plan_is_balanced_as_well_as_any_peer(
    case: tuple[Traffic, Traffic, list[str], Rules],
) -> None:
    then, _, workers, rules = case
    placed = ours(rules, then, workers)
    for peer in PEERS.values():
        theirs = peer(then, workers)
        assert balance(placed, then, workers) >= balance(theirs, then, workers) - 1e-9
        assert slowest(placed, then) <= slowest(theirs, then) + 1e-6


def test_when_load_drifts_it_is_balanced_as_well_with_fewer_moves(
    case: tuple[Traffic, Traffic, list[str], Rules],
) -> None:
    then, now, workers, rules = case
    before = ours(rules, then, workers)
    after = ours(rules, now, workers, before)
    theirs = eplb(now, workers)
    moves = loads_to_make(before, after)
    assert balance(after, now, workers) >= balance(theirs, now, workers) - 1e-9
    assert balance(after, now, workers) >= balance(before, now, workers) - 1e-9
    assert moves < loads_to_make(eplb(then, workers), theirs)
