"""The planner against brute force, and its stories in small numbers."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import PlacementError
from mesh.plan import ExpertId
from placement.planner import (
    REBALANCE_MOVE_PRICE,
    REPAIR_MOVE_PRICE,
    Rules,
    Target,
    WorkerSpec,
    link_cost,
    plan,
)


def worker(name: str, room: int = 1000, link: float = 1.0) -> WorkerSpec:
    return WorkerSpec(name, memory_bytes=room * 10, expert_bytes=10, link_cost=link)


def workers(n: int) -> list[WorkerSpec]:
    return [worker(f"w{i}") for i in range(n)]


def assert_within_rules(target: Target, rules: Rules, specs: list[WorkerSpec]) -> None:
    experts_by_worker = target.experts_by_worker()
    for spec in specs:
        experts = experts_by_worker.pop(spec.worker_id, set())
        assert len(experts) * spec.expert_bytes <= spec.memory_bytes
        per_layer = Counter(e.layer for e in experts)
        assert max(per_layer.values(), default=0) <= rules.experts_per_worker
        assert rules.rule != "strict" or len(experts) <= 1
    assert not experts_by_worker
    assert sorted([*target.workers_by_expert, *target.missing]) == rules.experts


def layer_cost(seating: tuple[int, ...], specs: list[WorkerSpec], weights: list[float]) -> float:
    """What the planner says that it minimises, for experts that live nowhere yet."""
    crowd = Counter(seating)
    crowding = sum(1e4 * seat for count in crowd.values() for seat in range(count))
    return crowding + sum(
        weight * specs[w].link_cost for weight, w in zip(weights, seating, strict=True)
    )


@settings(deadline=None)
@given(st.data())
def test_each_layer_costs_what_brute_force_finds(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 4))
    seats = data.draw(st.integers(1, 3))
    num_workers = data.draw(st.integers(-(-num_experts // seats), 4))
    links = data.draw(st.lists(st.integers(1, 9), min_size=num_workers, max_size=num_workers))
    specs = [worker(f"w{i}", link=link) for i, link in enumerate(links)]
    rules = Rules((3, 5), num_experts, experts_per_worker=seats)
    traffic = {e: float(data.draw(st.integers(1, 20))) for e in rules.experts}
    target = plan(rules, specs, traffic=traffic)

    assert_within_rules(target, rules, specs)
    mean = sum(traffic.values()) / len(traffic)
    index = {spec.worker_id: i for i, spec in enumerate(specs)}
    for layer in rules.layers:
        experts = [ExpertId(layer, i) for i in range(num_experts)]
        weights = [traffic[e] / mean for e in experts]
        found = tuple(index[target.workers_by_expert[e][0]] for e in experts)
        best = min(
            layer_cost(seating, specs, weights)
            for seating in itertools.product(range(num_workers), repeat=num_experts)
            if max(Counter(seating).values()) <= seats
        )
        assert layer_cost(found, specs, weights) == pytest.approx(best)


def can_be_seated(rules: Rules, room: tuple[int, ...]) -> bool:
    """By trying every way to seat every layer."""
    if not rules.layers:
        return True
    rest = Rules(rules.layers[1:], rules.num_experts, experts_per_worker=rules.experts_per_worker)
    return any(
        can_be_seated(rest, tuple(r - c for r, c in zip(room, counts, strict=True)))
        for counts in itertools.product(
            *(range(min(r, rules.experts_per_worker) + 1) for r in room)
        )
        if sum(counts) == rules.num_experts
    )


@settings(deadline=None)
@given(st.data())
def test_a_plan_is_found_exactly_when_there_is_one(data: st.DataObject) -> None:
    rules = Rules(
        tuple(range(data.draw(st.integers(1, 3)))),
        data.draw(st.integers(1, 4)),
        experts_per_worker=data.draw(st.integers(1, 2)),
    )
    specs = [
        worker(f"w{i}", room=data.draw(st.integers(0, 5)), link=data.draw(st.integers(1, 9)))
        for i in range(data.draw(st.integers(0, 4)))
    ]
    feasible = can_be_seated(rules, tuple(s.memory_bytes // s.expert_bytes for s in specs))
    if feasible:
        target = plan(rules, specs)
        assert not target.missing
        assert_within_rules(target, rules, specs)
    else:
        with pytest.raises(PlacementError):
            plan(rules, specs)
    best_effort = plan(rules, specs, partial=True)
    assert_within_rules(best_effort, rules, specs)
    assert bool(best_effort.missing) == (not feasible)


def test_a_small_worker_is_kept_for_the_layer_that_needs_it():
    # Layer 0 would like the cheap b and c, but then a alone could not seat layer 1.
    specs = [worker("a", room=2, link=9), worker("b", room=1), worker("c", room=1)]
    rules = Rules((0, 1), 2)
    target = plan(rules, specs)
    assert_within_rules(target, rules, specs)
    assert len(target.experts_by_worker()["a"]) == 2


@settings(deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 9)
)
def test_after_a_death_only_what_died_moves(
    num_experts: int, num_layers: int, seats: int, spares: int, victim: int
) -> None:
    rules = Rules(tuple(range(num_layers)), num_experts, experts_per_worker=seats)
    specs = workers(rules.workers_needed + spares)
    before = plan(rules, specs)
    dead = specs[victim % len(specs)].worker_id
    survivors = [spec for spec in specs if spec.worker_id != dead]
    after = plan(rules, survivors, homes=before.experts_by_worker(), partial=True)

    lost = before.experts_by_worker().get(dead, set())
    moved = {
        e for e in rules.experts if after.workers_by_expert.get(e) != before.workers_by_expert[e]
    }
    assert moved == lost
    # With every seat taken there is no home for what was lost; with a spare there is.
    assert not after.missing or len(survivors) * seats < num_experts
    assert_within_rules(after, rules, survivors)


def test_a_plan_that_is_served_is_adopted_as_it_is():
    rules = Rules((0, 1), 4)
    homes = {f"w{i}": [ExpertId(0, (i + 1) % 4), ExpertId(1, 3 - i)] for i in range(4)}
    target = plan(rules, workers(4), homes=homes)
    assert target.experts_by_worker() == {w: set(experts) for w, experts in homes.items()}


def test_a_rebalance_moves_the_hot_expert_near_and_a_repair_does_not():
    rules = Rules((0,), 2)
    specs = [worker("far", link=8.0), worker("near", link=1.0)]
    hot, cold = ExpertId(0, 0), ExpertId(0, 1)
    homes = {"far": [hot], "near": [cold]}
    traffic = {hot: 90.0, cold: 10.0}
    prices = {"homes": homes, "traffic": traffic}
    moved = plan(rules, specs, move_price=REBALANCE_MOVE_PRICE, **prices)
    assert moved.workers_by_expert == {hot: ("near",), cold: ("far",)}
    kept = plan(rules, specs, move_price=REPAIR_MOVE_PRICE, **prices)
    assert kept.workers_by_expert == {hot: ("far",), cold: ("near",)}


def test_colocation_is_the_least_crowded_and_says_so():
    target = plan(Rules((0, 1), 16, experts_per_worker=16), workers(5))
    for layer in (0, 1):
        crowd = Counter(w[0] for e, w in target.workers_by_expert.items() if e.layer == layer)
        assert sorted(crowd.values()) == [3, 3, 3, 3, 4]
    assert "up to 4 of the 16 experts" in target.note
    assert not plan(Rules((0,), 4, experts_per_worker=4), workers(4)).note


def test_strict_gives_each_expert_a_worker_of_its_own():
    rules = Rules((0, 1), 3, rule="strict")
    target = plan(rules, workers(7))
    assert_within_rules(target, rules, workers(7))
    with pytest.raises(PlacementError, match=r"needs 6 workers .*strict.*5 .*start 1 more"):
        plan(rules, workers(5))


def test_too_few_workers_is_an_error_that_names_the_remedy():
    message = (
        "model needs 16 workers (one per expert of a layer), 12 are registered: start 4 more, "
        "or allow colocation with --experts-per-worker 2"
    )
    with pytest.raises(PlacementError) as caught:
        plan(Rules((0,), 16), workers(12))
    assert str(caught.value) == message
    rest = plan(Rules((0,), 16), workers(12), partial=True)
    assert len(rest.missing) == 4
    assert rest.note.endswith(message)
    assert str(rest.missing[0]) in rest.note


def test_too_little_memory_is_an_error_that_names_the_worker_and_the_bytes():
    specs = [worker("big", room=2), WorkerSpec("small", memory_bytes=13, expert_bytes=10)]
    with pytest.raises(PlacementError, match=r"3 of 4 experts: small is 7 bytes short of its 2"):
        plan(Rules((0, 1), 2), specs)


def test_what_must_go_without_is_the_least_busy():
    rules = Rules((0,), 3)
    traffic = {ExpertId(0, 0): 5.0, ExpertId(0, 1): 1.0, ExpertId(0, 2): 9.0}
    target = plan(rules, workers(2), traffic=traffic, partial=True)
    assert target.missing == (ExpertId(0, 1),)


def test_links_cost_less_on_the_host_and_with_rdma():
    assert link_cost("a", [], []) == link_cost("a", [], ["a"])
    assert link_cost("a", [], ["a"]) < link_cost("a", ["mlx5_0"], ["b"]) < link_cost("a", [], ["b"])
    assert link_cost("a", [], ["a", "b"]) < link_cost("a", [], ["b", "c"])
