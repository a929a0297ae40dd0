"""The planner against brute force, and its stories in small numbers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import PlacementError
from mesh.plan import ExpertId
from placement.improve import Budget
from placement.planner import plan
from placement.rules import Rules, Target, WorkerSpec, choose_shards


def worker(name: str, room: int = 1000, link: float = 1.0, host: str = "") -> WorkerSpec:
    return WorkerSpec(name, memory_bytes=room * 10, expert_bytes=10, link_cost=link, host=host)


def workers(n: int) -> list[WorkerSpec]:
    return [worker(f"w{i}") for i in range(n)]


def assert_within_rules(target: Target, rules: Rules, specs: list[WorkerSpec]) -> None:
    experts_by_worker = target.experts_by_worker()
    for spec in specs:
        experts = experts_by_worker.pop(spec.worker_id, set())
        assert len(experts) * rules.unit_bytes(spec) <= spec.memory_bytes
        per_layer = Counter(e.layer for e in experts)
        assert max(per_layer.values(), default=0) <= rules.experts_per_worker
        assert rules.rule != "strict" or len(experts) <= 1
    assert not experts_by_worker
    assert sorted([*target.workers_by_expert, *target.missing]) == rules.experts
    assert all(len(set(ids)) == len(ids) for ids in target.workers_by_expert.values())


def cost_of(
    seatings: list[dict[ExpertId, int]], specs: list[WorkerSpec], weights: dict[ExpertId, float]
) -> float:
    """What the planner says that it minimises."""
    loads = [0.0] * len(specs)
    cost = 0.0
    for seating in seatings:
        for expert, w in seating.items():
            loads[w] += weights[expert]
            cost += weights[expert] * specs[w].link_cost
    mean = sum(weights.values()) / len(specs)
    return cost + sum(load**2 for load in loads) / (2 * mean)


@given(st.data())
def test_no_layer_by_layer_brute_force_is_cheaper(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 4))
    num_workers = data.draw(st.integers(num_experts, 5))
    links = data.draw(st.lists(st.integers(1, 9), min_size=num_workers, max_size=num_workers))
    specs = [worker(f"w{i}", link=link) for i, link in enumerate(links)]
    rules = Rules((3, 5), num_experts)
    traffic = {e: float(data.draw(st.integers(1, 20))) for e in rules.experts}
    target = plan(rules, specs, traffic=traffic, max_replicas=1)

    assert_within_rules(target, rules, specs)
    mean = sum(traffic.values()) / len(traffic)
    weights = {e: rate / mean for e, rate in traffic.items()}
    index = {spec.worker_id: i for i, spec in enumerate(specs)}
    found = [{e: index[ids[0]] for e, ids in target.workers_by_expert.items()}]
    best: list[dict[ExpertId, int]] = []
    for layer in rules.layers:
        experts = [ExpertId(layer, i) for i in range(num_experts)]
        ways = itertools.permutations(range(num_workers), num_experts)
        best.append(
            min(
                (dict(zip(experts, way, strict=True)) for way in ways),
                key=lambda way: cost_of([*best, way], specs, weights),
            )
        )
    assert cost_of(found, specs, weights) <= cost_of(best, specs, weights) + 1e-6


@given(st.data())
def test_one_layer_costs_what_brute_force_finds(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 4))
    num_workers = data.draw(st.integers(num_experts, 5))
    specs = [worker(f"w{i}", link=data.draw(st.integers(1, 9))) for i in range(num_workers)]
    rules = Rules((3,), num_experts)
    weights = {e: float(data.draw(st.integers(1, 20))) for e in rules.experts}
    target = plan(rules, specs, traffic=weights, max_replicas=1)
    links = {spec.worker_id: spec.link_cost for spec in specs}
    found = sum(weights[e] * links[ids[0]] for e, ids in target.workers_by_expert.items())
    assert found == min(
        sum(weights[e] * specs[w].link_cost for e, w in zip(rules.experts, way, strict=True))
        for way in itertools.permutations(range(num_workers), num_experts)
    )


def ways_to_replicate(spare: int, num_experts: int) -> Iterator[list[int]]:
    """How many workers each expert could have."""
    for extra in itertools.combinations_with_replacement(range(num_experts), spare):
        yield [1 + extra.count(i) for i in range(num_experts)]


@given(st.data())
def test_the_busiest_share_is_the_least_that_brute_force_finds(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 4))
    spare = data.draw(st.integers(0, 4))
    specs = workers(num_experts + spare)
    rules = Rules((0,), num_experts)
    traffic = {e: float(data.draw(st.integers(1, 20))) for e in rules.experts}
    target = plan(rules, specs, traffic=traffic)
    assert_within_rules(target, rules, specs)
    assert sum(map(len, target.workers_by_expert.values())) == len(specs)
    assert max(target.loads(traffic).values()) == pytest.approx(
        min(
            max(traffic[e] / counts[e.index] for e in rules.experts)
            for counts in ways_to_replicate(spare, num_experts)
        )
    )


@given(st.data())
def test_replicas_share_a_host_only_where_no_other_could_take_them(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 4))
    names = [f"w{i}" for i in range(num_experts + data.draw(st.integers(0, 4)))]
    specs = [worker(name, host=data.draw(st.sampled_from("abc"))) for name in names]
    rules = Rules((0, 1), num_experts)
    traffic = {e: float(data.draw(st.integers(0, 20))) for e in rules.experts}
    homes = {
        name: [ExpertId(layer, i) for layer in rules.layers]
        for i, name in enumerate(data.draw(st.permutations(names))[:num_experts])
    }
    target = plan(rules, specs, traffic=traffic, homes=homes)
    assert_within_rules(target, rules, specs)
    host_of = {spec.worker_id: spec.host for spec in specs}
    every_host = set(host_of.values())
    hosts = {e: [host_of[w] for w in ids] for e, ids in target.workers_by_expert.items()}
    for expert, at in hosts.items():
        for host in {host for host in at if at.count(host) > 1}:
            others = [hosts[e] for e in rules.experts if e.layer == expert.layer]
            assert set(at) == every_host or all(host in other for other in others)


def test_replicas_are_on_different_hosts_from_the_start():
    specs = [worker(f"{host}{i}", host=host) for host in "ab" for i in range(4)]
    rules = Rules(tuple(range(5)), 6)
    traffic = {e: 10.0 if e.index < 2 else 1.0 for e in rules.experts}
    target = plan(rules, specs, traffic=traffic)
    for expert in rules.experts:
        ids = target.workers_by_expert[expert]
        assert len({w[0] for w in ids}) == len(ids) == (2 if expert.index < 2 else 1)


def test_who_has_the_hot_expert_of_one_layer_gets_a_cold_one_of_the_next():
    rules = Rules((0, 1), 3)
    traffic = {e: [9.0, 2.0, 1.0][e.index] for e in rules.experts}
    loads = plan(rules, workers(3), traffic=traffic).loads(traffic)
    assert sorted(loads.values()) == [4.0, 10.0, 10.0]


def test_replicas_never_crowd():
    # Room for two of a layer each, but two workers are no more than the experts are.
    target = plan(Rules((0, 1), 2, experts_per_worker=2), workers(2))
    assert all(len(ids) == 1 for ids in target.workers_by_expert.values())
    target = plan(Rules((0,), 2, experts_per_worker=2), workers(3))
    assert max(len(experts) for experts in target.experts_by_worker().values()) == 1


def test_max_replicas_is_the_most_workers_of_an_expert():
    rules = Rules((0,), 2)
    traffic = {ExpertId(0, 0): 100.0, ExpertId(0, 1): 1.0}
    target = plan(rules, workers(6), traffic=traffic, max_replicas=2)
    assert [len(target.workers_by_expert[e]) for e in rules.experts] == [2, 2]
    fewer = plan(
        rules, workers(6), traffic=traffic, homes=target.experts_by_worker(), max_replicas=1
    )
    assert [len(fewer.workers_by_expert[e]) for e in rules.experts] == [1, 1]


def test_the_nearest_replica_is_named_first():
    specs = [worker("far", link=8.0), worker("mid", link=2.0), worker("near", link=1.0)]
    target = plan(Rules((0,), 1), specs)
    assert target.workers_by_expert == {ExpertId(0, 0): ("near", "mid", "far")}


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


def lives_in(target: Target) -> set[tuple[ExpertId, str]]:
    return {(e, w) for e, ids in target.workers_by_expert.items() for w in ids}


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 3), st.integers(0, 9)
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
    orphans = {e for e in lost if before.workers_by_expert[e] == (dead,)}
    moved = {e for e, _ in lives_in(after) - lives_in(before)}
    assert moved <= lost
    # An expert that lost all its workers has a home again before any replica keeps its own;
    # with every seat taken there is none.
    assert set(after.missing) <= orphans
    assert not after.missing or len(survivors) * seats < num_experts
    # Replicas make way for it, one for each, and for nothing else.
    gone = lives_in(before) - lives_in(after) - {(e, dead) for e in lost}
    assert len(gone) <= len(orphans)
    assert_within_rules(after, rules, survivors)


def test_a_replica_makes_way_for_what_has_no_home_even_where_memory_is_what_is_short():
    # w2 holds a replica in each layer and no more fits; w0 and w1 have one seat and room each.
    rules = Rules((0, 1), 2)
    specs = [worker("w0", room=2), worker("w1", room=2), worker("w2", room=2)]
    a, b, c, d = rules.experts
    homes = {"w0": [a, c], "w2": [a, c]}
    target = plan(rules, specs, homes=homes, partial=True)
    assert not target.missing
    assert_within_rules(target, rules, specs)
    target = plan(rules, specs[::2], homes=homes, partial=True)
    assert target.workers_by_expert == {a: ("w0",), b: ("w2",), c: ("w0",), d: ("w2",)}


def test_a_spare_that_joins_takes_replicas_and_moves_nothing():
    rules = Rules((0, 1), 2)
    traffic = {e: 5.0 if e.index else 1.0 for e in rules.experts}
    before = plan(rules, workers(2), traffic=traffic)
    after = plan(rules, workers(3), traffic=traffic, homes=before.experts_by_worker())
    assert lives_in(after) - lives_in(before) == {(ExpertId(0, 1), "w2"), (ExpertId(1, 1), "w2")}
    assert lives_in(before) < lives_in(after)


def test_who_comes_back_keeps_what_it_has():
    rules = Rules((0, 1), 2)
    homes = {"w0": rules.experts[::2], "w1": rules.experts[1::2]}
    cold = {e: 1.0 if e.index else 5.0 for e in rules.experts}
    target = plan(
        rules, workers(3), traffic=cold, homes=homes, residents={"w2": rules.experts[1::2]}
    )
    assert target.experts_by_worker()["w2"] == set(rules.experts[1::2])


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
    moved = plan(rules, specs, budget=Budget(), **prices)
    assert moved.workers_by_expert == {hot: ("near",), cold: ("far",)}
    for budget in (None, Budget(price=100.0), Budget(moves=1)):
        kept = plan(rules, specs, budget=budget, **prices)
        assert kept.workers_by_expert == {hot: ("far",), cold: ("near",)}


def test_a_replica_follows_the_traffic_and_costs_one_move():
    rules = Rules((0,), 3)
    then = {e: [9.0, 2.0, 1.0][e.index] for e in rules.experts}
    now = {e: [2.0, 1.0, 9.0][e.index] for e in rules.experts}
    before = plan(rules, workers(4), traffic=then)
    assert len(before.workers_by_expert[0, 0]) == 2
    homes = before.experts_by_worker()
    after = plan(rules, workers(4), traffic=now, homes=homes, budget=Budget(moves=1))
    assert len(lives_in(after) - lives_in(before)) == 1
    assert max(after.loads(now).values()) == 4.5
    assert plan(rules, workers(4), traffic=now, homes=homes) == before


@given(st.data())
def test_a_rebalance_keeps_the_rules_and_its_budget(
    data: st.DataObject,
) -> None:
    seats = data.draw(st.integers(1, 3))
    rules = Rules((0, 1, 2), data.draw(st.integers(1, 5)), experts_per_worker=seats)
    specs = [
        worker(
            f"w{i}",
            room=data.draw(st.integers(3 * seats, 12)),
            link=data.draw(st.sampled_from((1.0, 2.0))),
            host=data.draw(st.sampled_from("ab")),
        )
        for i in range(rules.workers_needed + data.draw(st.integers(0, 3)))
    ]
    draw = st.fixed_dictionaries({e: st.floats(0, 50) for e in rules.experts})
    before = plan(rules, specs, traffic=data.draw(draw))
    homes, now = before.experts_by_worker(), data.draw(draw)
    budget = Budget(moves=data.draw(st.integers(0, 6)))
    after = plan(rules, specs, traffic=now, homes=homes, budget=budget)
    assert_within_rules(after, rules, specs)
    assert not after.missing
    assert len(lives_in(after) - lives_in(before)) <= budget.moves
    assert len(lives_in(after)) == len(lives_in(before))


@given(st.data())
def test_a_worker_has_what_it_is_barred_from_only_where_nobody_else_can(
    data: st.DataObject,
) -> None:
    seats = data.draw(st.integers(1, 2))
    rules = Rules((0, 1), data.draw(st.integers(1, 5)), experts_per_worker=seats)
    specs = workers(rules.workers_needed + data.draw(st.integers(0, 3)))
    draw = st.fixed_dictionaries({e: st.floats(0, 50) for e in rules.experts})
    before = plan(rules, specs, traffic=data.draw(draw))
    living = lives_in(before)
    barred = data.draw(st.sets(st.sampled_from(sorted(living)), max_size=6))
    by_worker: dict[str, list[ExpertId]] = {}
    for expert, worker_id in barred:
        by_worker.setdefault(worker_id, []).append(expert)
    after = plan(
        rules,
        specs,
        traffic=data.draw(draw),
        homes=before.experts_by_worker(),
        residents=before.experts_by_worker(),
        barred=by_worker,
        budget=data.draw(st.sampled_from((None, Budget()))),
    )
    assert_within_rules(after, rules, specs)
    assert not after.missing
    crowds = Counter((w, e.layer) for e, ids in after.workers_by_expert.items() for w in ids)
    replicas = {(w, e.layer) for e, w in lives_in(after) if len(after.workers_by_expert[e]) > 1}
    for expert, worker_id in lives_in(after) & barred:
        assert after.workers_by_expert[expert] == (worker_id,)
        for spec in specs:
            place = (spec.worker_id, expert.layer)
            if (expert, spec.worker_id) not in barred:
                assert crowds[place] == seats
                assert place not in replicas


def test_nothing_is_moved_for_what_a_worker_is_barred_from_but_replicas():
    rules = Rules((0,), 2)
    homes = {"w0": [ExpertId(0, 0)], "w1": [ExpertId(0, 1)]}
    full = plan(rules, workers(2), homes=homes, barred={"w0": [ExpertId(0, 0)]})
    assert full == plan(rules, workers(2), homes=homes)
    replicated = {**homes, "w2": [ExpertId(0, 1)]}
    target = plan(rules, workers(3), homes=replicated, barred={"w0": [ExpertId(0, 0)]})
    (new,) = target.workers_by_expert[0, 0]
    assert new != "w0"
    assert "w0" in target.workers_by_expert[0, 1]


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


@given(st.data())
def test_slices_are_seated_as_so_many_smaller_experts(data: st.DataObject) -> None:
    shards = data.draw(st.integers(1, 4))
    num_experts, seats = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    sliced = Rules((0, 1), num_experts, experts_per_worker=seats, shards=shards)
    whole = Rules((0, 1), num_experts * shards, experts_per_worker=seats)
    rooms = [data.draw(st.integers(0, 6)) for _ in range(data.draw(st.integers(1, 6)))]
    big = [WorkerSpec(f"w{i}", 10 * r, 10 * shards) for i, r in enumerate(rooms)]
    small = [WorkerSpec(f"w{i}", 10 * r, 10) for i, r in enumerate(rooms)]
    traffic = {e: float(data.draw(st.integers(0, 9))) for e in whole.experts}
    target = plan(sliced, big, traffic=traffic, partial=True)
    assert_within_rules(target, sliced, big)
    assert target.shards == shards
    same = plan(whole, small, traffic=traffic, partial=True)
    assert target.missing == same.missing
    assert seats > 1 or target.workers_by_expert == same.workers_by_expert


def slices_together(target: Target) -> Counter[tuple[str, int, int]]:
    """Slices by worker, layer and expert."""
    return Counter(
        (worker_id, layer, index // target.shards)
        for (layer, index), worker_ids in target.workers_by_expert.items()
        for worker_id in worker_ids
    )


@given(st.data())
def test_as_many_workers_as_slices_have_one_of_each_expert(data: st.DataObject) -> None:
    num_experts, shards = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    rules = Rules((0, 1), num_experts, experts_per_worker=num_experts, shards=shards)
    specs = [
        worker(f"w{i}", link=data.draw(st.sampled_from((1.0, 2.0, 9.0)))) for i in range(shards)
    ]
    draw = st.fixed_dictionaries({e: st.floats(0, 50) for e in rules.experts})
    target = plan(rules, specs, traffic=data.draw(draw))
    for _ in range(2):
        assert slices_together(target) == {
            (spec.worker_id, layer, expert): 1
            for spec in specs
            for layer in rules.layers
            for expert in range(num_experts)
        }
        homes = target.experts_by_worker()
        homes.pop("w0", None)  # it starts anew
        target = plan(rules, specs, traffic=data.draw(draw), homes=homes, budget=Budget(price=0.0))


@given(st.data())
def test_slices_of_an_expert_are_as_far_apart_as_can_be_and_workers_no_more_crowded(
    data: st.DataObject,
) -> None:
    num_experts, shards = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 5))
    num_workers, spare = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 2))
    crowd = -(-num_experts * shards // num_workers)
    rules = Rules((0, 1), num_experts, experts_per_worker=crowd + spare, shards=shards)
    specs = workers(num_workers)
    draw = st.fixed_dictionaries({e: st.floats(0, 50) for e in rules.experts})
    before = plan(rules, specs, traffic=data.draw(draw))
    homes = before.experts_by_worker()
    now = data.draw(draw)
    for target in (before, plan(rules, specs, traffic=now, homes=homes, budget=Budget())):
        assert_within_rules(target, rules, specs)
        assert max(slices_together(target).values()) == -(-shards // num_workers)
        crowds = Counter((w, e.layer) for e, w in lives_in(target))
        assert max(crowds.values()) == crowd


def test_a_slice_without_a_home_goes_where_no_other_of_its_expert_is():
    rules = Rules((0,), 2, experts_per_worker=2, shards=2)
    (a0, a1), (b0, b1) = rules.experts[:2], rules.experts[2:]
    for alone, other in ((a0, b0), (b0, a0)):
        target = plan(rules, workers(3), homes={"w0": [alone], "w1": [other]})
        assert max(slices_together(target).values()) == 1
        assert target.workers_by_expert[alone] == ("w0",)
    full = plan(rules, workers(2), homes={"w0": [a0, a1], "w1": [b0, b1]})
    assert full.workers_by_expert == {a0: ("w0",), a1: ("w0",), b0: ("w1",), b1: ("w1",)}


def test_an_expert_that_fits_nowhere_is_cut_into_as_few_slices_as_do():
    rules = Rules((0,), 2)
    too_small = [WorkerSpec(f"w{i}", memory_bytes=40, expert_bytes=100) for i in range(6)]
    assert choose_shards(rules, too_small, hidden_size=12) == 3
    # 5 does not divide 12, and 34 bytes would do.
    tiny = [WorkerSpec(f"w{i}", memory_bytes=24, expert_bytes=100) for i in range(12)]
    assert choose_shards(rules, tiny, hidden_size=12) == 6
    assert choose_shards(rules, [*tiny, WorkerSpec("big", 100, 100)], hidden_size=12) == 1
    with pytest.raises(PlacementError, match=r"100 bytes whole .*needs 6 workers .*cut into 3"):
        choose_shards(rules, too_small[:4], hidden_size=12)
    with pytest.raises(PlacementError, match="--memory-bytes"):
        choose_shards(rules, [WorkerSpec("w", 1, 100)], hidden_size=12)


def test_a_slice_takes_its_part_of_the_bytes_rounded_up():
    rules = Rules((0,), 1, shards=3)
    assert rules.unit_bytes(WorkerSpec("w", 0, 100)) == 34
    with pytest.raises(PlacementError, match="memory for 2 of 3 slices: w2 is 1 bytes short"):
        plan(rules, [WorkerSpec(f"w{i}", 34 - (i == 2), 100) for i in range(3)])
