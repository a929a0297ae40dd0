"""Plans of chaos: the seed is all, and the mesh can survive each of them."""

from __future__ import annotations

import pytest

from tests.chaos.events import (
    SETTLE_S,
    CutHost,
    Event,
    JoinWorker,
    KillGateway,
    KillPlacement,
    KillWorker,
    PauseWorker,
    RollWorker,
    Scale,
    Shape,
    SlowWorker,
)
from tests.chaos.memory import Memory
from tests.chaos.plan import make_plan, survivable

ONE_SPARE = Shape(workers=17, gateways=2)
HOUR_S = 3600.0


def test_the_seed_alone_makes_the_plan() -> None:
    plan = make_plan(7, HOUR_S, Shape())
    assert plan == make_plan(7, HOUR_S, Shape())
    assert plan != make_plan(8, HOUR_S, Shape())
    assert all(event.end_s < HOUR_S for event in plan)


def test_an_hour_has_something_of_everything() -> None:
    kinds = {type(event) for event in make_plan(1, HOUR_S, Shape())}
    assert len(kinds) == 15
    assert CutHost in {type(e) for e in make_plan(1, HOUR_S, Shape(20, 2, 2, hosts=2))}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [ONE_SPARE, Shape(), Shape(12, 2, 2), Shape(18, 2, 2, hosts=2)])
def test_no_plan_takes_more_than_there_is_to_spare(seed: int, shape: Shape) -> None:
    plan = make_plan(seed, 300.0, shape)
    moments = {moment for event in plan for moment in (event.at_s, event.end_s)}
    for moment in moments:
        away = {
            name
            for event in plan
            if event.takes_target and event.at_s <= moment <= event.end_s
            for name in event.targets(shape)
        }
        seats = len(set(shape.worker_names) - away) * shape.experts_per_worker
        assert seats >= shape.num_experts
        assert set(shape.gateway_names) - away


def test_the_only_spare_is_not_lost_twice() -> None:
    first = KillWorker(10.0, "worker-00", 5.0)
    assert not survivable(KillWorker(12.0, "worker-01", 5.0), [first], ONE_SPARE)
    assert not survivable(KillWorker(15.0 + SETTLE_S, "worker-01", 5.0), [first], ONE_SPARE)
    assert survivable(KillWorker(15.1 + SETTLE_S, "worker-01", 5.0), [first], ONE_SPARE)
    assert survivable(SlowWorker(12.0, "worker-01", 5.0), [first], ONE_SPARE)


def test_one_process_has_one_trouble_at_a_time() -> None:
    slow: list[Event] = [SlowWorker(10.0, "worker-00", 5.0)]
    assert not survivable(PauseWorker(12.0, "worker-00", 1.0), slow, ONE_SPARE)
    assert survivable(PauseWorker(12.0, "worker-01", 1.0), slow, ONE_SPARE)


def test_one_change_of_size_at_a_time_and_no_other_trouble_for_who_is_rolled() -> None:
    scale: list[Event] = [Scale(10.0, "by 1", 5.0)]
    assert not survivable(Scale(12.0, "by 2", 5.0), scale, ONE_SPARE)
    assert survivable(KillWorker(12.0, "worker-00", 5.0), scale, ONE_SPARE)
    roll: list[Event] = [RollWorker(10.0, "worker-00", 5.0)]
    assert not survivable(KillWorker(12.0, "worker-00", 5.0), roll, ONE_SPARE)
    assert survivable(KillWorker(12.0, "worker-01", 5.0), roll, ONE_SPARE)


def test_one_gateway_stays() -> None:
    first: list[Event] = [KillGateway(10.0, "gateway-0", 5.0)]
    assert not survivable(KillGateway(12.0, "gateway-1", 5.0), first, ONE_SPARE)
    assert survivable(KillGateway(12.0, "gateway-1", 5.0), first, Shape(17, 3))


def test_nothing_is_lost_that_placement_has_to_make_good_while_it_is_away() -> None:
    away: list[Event] = [KillPlacement(20.0, "placement", 5.0)]
    assert not survivable(KillWorker(22.0, "worker-00", 1.0), away, ONE_SPARE)
    assert not survivable(JoinWorker(10.0, "extra", 12.0), away, ONE_SPARE)
    assert survivable(JoinWorker(10.0, "extra", 30.0), away, ONE_SPARE)
    assert survivable(SlowWorker(22.0, "worker-00", 1.0), away, ONE_SPARE)


def test_a_cut_host_takes_its_workers() -> None:
    shape = Shape(16, 2, 2, hosts=2)
    cut: list[Event] = [CutHost(10.0, "host-0", 1.0)]
    assert shape.workers_on("host-0") == shape.worker_names[::2]
    assert not survivable(SlowWorker(10.0, "worker-00", 1.0), cut, shape)
    assert not survivable(KillWorker(10.0, "worker-01", 1.0), cut, shape)
    assert survivable(SlowWorker(10.0, "worker-01", 1.0), cut, shape)


def test_memory_that_grows_is_told_from_memory_that_fills() -> None:
    memory = Memory()
    minutes = [(float(s), s / 60) for s in range(0, 1200, 2)]
    memory.add("leaks", 1, [(s, 100 + minute) for s, minute in minutes])
    memory.add("fills", 2, [(s, 100 + 50 * min(minute, 1.0)) for s, minute in minutes])
    memory.add("young", 3, [(s, 100 + 50 * minute) for s, minute in minutes if minute < 1.5])
    assert [name for name, _ in memory.growing()] == ["leaks (pid 1)"]


def test_a_cache_may_be_used_for_the_first_time_late() -> None:
    minutes = [(float(s), s / 60) for s in range(0, 180, 2)]
    filling = [(s, 100 + 8 * max(minute - 1.0, 0.0)) for s, minute in minutes]
    for fills_mb, grows in [(0.0, True), (16.0, False)]:
        memory = Memory(fills_mb)
        memory.add("engine", 1, filling)
        assert bool(memory.growing()) is grows
