"""Stories of a small mesh, told to the coordinator with the time in hand.

Two layers of two experts and workers with one expert of each layer, unless a test says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config import PlacementConfig
from mesh.errors import AlreadyExists, ModelMismatch, PlacementError
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from placement.coordinator import Coordinator
from placement.improve import Budget
from placement.load import LoadAverage, balancedness
from placement.policy import RebalancePolicy
from placement.rules import Rules
from protos import placement_pb2 as pb

RULES = Rules((0, 1), 2)
CONFIG = PlacementConfig(settle_s=2.0, lease_s=3.0, max_replicas=1)


@dataclass
class Mesh:
    """A coordinator and the workers that obey it, with time standing still between calls."""

    rules: Rules = RULES
    config: PlacementConfig = CONFIG
    now: float = 100.0
    told: dict[str, pb.WorkerOrder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinator = Coordinator(self.rules, "f" * 16, self.config, expert_hidden_size=8)

    def register(
        self,
        name: str,
        resident: Iterable[ExpertId] = (),
        last_epoch: int = 0,
        pid: int = 1,
        host: str = "",
        memory_bytes: int = 1000,
        shards: int = 1,
    ) -> None:
        info = pb.WorkerInfo(
            worker_id=name,
            grpc_address=f"{name}:1",
            host=host or name,
            memory_bytes=memory_bytes,
            expert_bytes=10,
            pid=pid,
        )
        request = pb.RegisterRequest(
            worker=info,
            resident=map(expert_to_proto, resident),
            last_epoch=last_epoch,
            expert_shards=shards,
        )
        self.coordinator.register(request, lease_id=f"lease-{name}-{pid}", now=self.now)

    def report(self, name: str, **fields: object) -> None:
        worker = self.coordinator.members.workers[name]
        fields.setdefault("resident", map(expert_to_proto, worker.resident))
        self.coordinator.report(worker, pb.WorkerReport(**fields), self.now)

    def gateway(
        self,
        epoch: int | None = None,
        load: dict[ExpertId, int] | None = None,
        name: str = "g",
        unreachable: Iterable[str] = (),
        faults: Iterable[tuple[str, ExpertId]] = (),
    ) -> None:
        """A report; of the newest epoch unless it is said."""
        report = pb.GatewayReport(
            gateway_id=name,
            host="gateway-host",
            epoch=self.coordinator.epoch if epoch is None else epoch,
            unreachable_worker_ids=unreachable,
            faults=[
                pb.ExpertPlacement(expert=expert_to_proto(e), worker_ids=[w]) for w, e in faults
            ],
        )
        for expert, rows in (load or {}).items():
            report.load.add(expert=expert_to_proto(expert), rows=rows)
        self.coordinator.gateway_report(report, self.now)

    def turn(self, budget: Budget | None = None) -> dict[str, pb.WorkerOrder]:
        """Decide; returns the orders that were given."""
        coordinator = self.coordinator
        coordinator.expire(self.now)
        coordinator.publish(self.now)
        compute = coordinator.next_target(self.now, budget=budget)
        if compute:
            coordinator.adopt(compute(), self.now)
            coordinator.publish(self.now)
        leases = [w.lease_id for w in coordinator.members.workers.values()]
        given = {lease.split("-")[1]: o for lease, o in coordinator.orders(self.now, leases)}
        self.told.update(given)
        return given

    def obey(self) -> None:
        """Every worker does what it was told, and says so."""
        for name, order in self.told.items():
            worker = self.coordinator.members.workers.get(name)
            if worker:
                resident = set(worker.resident) - set(map(expert_from_proto, order.unload))
                resident |= set(map(expert_from_proto, order.load))
                self.check_room(worker.info, resident, order.expert_shards)
                self.report(name, resident=map(expert_to_proto, sorted(resident)))
        self.told.clear()

    def check_room(self, info: pb.WorkerInfo, resident: set[ExpertId], shards: int) -> None:
        """In memory, and one of a layer beyond the rules at most."""
        assert len(resident) * -(-info.expert_bytes // shards) <= info.memory_bytes
        crowd = Counter(e.layer for e in resident)
        assert max(crowd.values(), default=0) <= self.rules.experts_per_worker + 1

    def settle(self, budget: Budget | None = None) -> None:
        """Decide and obey, gateways too, until there is nothing left to do."""
        self.turn(budget)
        for _ in range(100):
            for gateway in self.coordinator.members.gateways.values():
                gateway.report.epoch = self.coordinator.epoch
            if not self.told and not self.turn():
                return
            self.obey()
            self.turn()
        raise AssertionError("it never settles")

    @property
    def served(self) -> dict[ExpertId, tuple[str, ...]]:
        return {
            expert_from_proto(p.expert): tuple(p.worker_ids)
            for p in self.coordinator.current_plan().experts
        }


ONE_LAYER = Rules((0,), 2)
"""With three workers, one has nothing to do."""


def running(num_workers: int = 2, **fields: object) -> Mesh:
    """A mesh of w0, w1, ... with all experts served."""
    mesh = Mesh(**fields)
    for i in range(num_workers):
        mesh.register(f"w{i}")
    mesh.settle()
    assert mesh.coordinator.plan.complete
    mesh.now += 0.5  # until all are told of the last epoch
    for i in range(num_workers):
        mesh.report(f"w{i}")
    mesh.settle()
    return mesh


def test_the_plan_comes_when_enough_workers_are_there_and_names_only_what_is_resident():
    mesh = Mesh()
    mesh.register("w0")
    assert mesh.turn() == {}
    assert mesh.coordinator.why_not_ready() == "1 of 2 workers are registered"
    mesh.register("w1")
    orders = mesh.turn()
    assert {name: len(order.load) for name, order in orders.items()} == {"w0": 2, "w1": 2}
    assert mesh.coordinator.plan is None
    assert mesh.coordinator.states() == ["loading", "loading"]

    mesh.report("w0", resident=[orders["w0"].load[0]])
    mesh.turn()
    assert mesh.coordinator.plan.epoch == 1
    assert not mesh.coordinator.plan.complete
    assert mesh.served == {expert_from_proto(orders["w0"].load[0]): ("w0",)}
    assert mesh.coordinator.why_not_ready() == "1 of 4 experts are served"
    mesh.told = orders
    mesh.obey()
    mesh.settle()
    assert sorted(mesh.served) == RULES.experts
    assert mesh.coordinator.why_not_ready() is None
    assert mesh.coordinator.states() == ["ready", "ready"]


def test_the_plan_says_which_lost_experts_are_on_their_way():
    mesh = running(num_workers=2)
    lost = [e for e, ids in mesh.served.items() if ids == ("w0",)]
    assert len(lost) == 2

    def pending() -> list[ExpertId]:
        return [expert_from_proto(e) for e in mesh.coordinator.current_plan().pending]

    assert pending() == []
    mesh.coordinator.drop("lease-w0-1", mesh.now)
    mesh.coordinator.publish(mesh.now)
    assert pending() == lost  # nobody has thought yet about where they go
    mesh.turn()
    assert pending() == []  # nowhere
    mesh.register("w2")
    mesh.turn()
    assert pending() == lost  # it loads them
    mesh.settle()
    assert (mesh.coordinator.current_plan().complete, pending()) == (True, [])


def test_min_workers_are_waited_for():
    mesh = Mesh(config=replace(CONFIG, min_workers=3))
    mesh.register("w0")
    mesh.register("w1")
    assert mesh.turn() == {}
    mesh.register("w2")
    assert mesh.turn()


def test_a_turn_without_news_says_nothing():
    mesh = running()
    epoch = mesh.coordinator.plan.epoch
    assert mesh.turn() == {}
    assert mesh.coordinator.plan.epoch == epoch


def test_a_death_leaves_the_plan_at_once_and_a_spare_takes_over():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    spare = ({"w0", "w1", "w2"} - {ids[0] for ids in mesh.served.values()}).pop()
    lost = {e for e, ids in mesh.served.items() if ids == (holder,)}
    kept = {e: ids for e, ids in mesh.served.items() if e not in lost}
    epoch = mesh.coordinator.plan.epoch

    mesh.coordinator.drop(f"lease-{holder}-1", mesh.now)
    mesh.coordinator.publish(mesh.now)
    assert mesh.coordinator.plan.epoch == epoch + 1
    assert mesh.served == kept
    orders = mesh.turn()
    assert {expert_from_proto(e) for e in orders[spare].load} == lost
    mesh.settle()
    assert mesh.served == kept | {e: (spare,) for e in lost}


def test_without_a_spare_the_rest_is_served_and_the_note_names_what_is_missing():
    mesh = running(2)
    mesh.coordinator.drop("lease-w1-1", mesh.now)
    mesh.settle()
    assert {ids for ids in mesh.served.values()} == {("w0",)}
    plan = mesh.coordinator.plan
    assert not plan.complete
    assert "nobody serves" in plan.note
    assert "start 1 more" in plan.note
    assert "start 1 more" in mesh.coordinator.why_not_ready()

    mesh.register("w9")
    mesh.settle()
    assert mesh.coordinator.plan.complete
    assert mesh.coordinator.plan.note == ""


def test_a_silent_worker_is_dead_when_its_lease_is_over_and_not_before():
    mesh = running(2)
    mesh.now += 2.0
    mesh.report("w0")
    assert mesh.coordinator.next_deadline_s(mesh.now) == pytest.approx(mesh.now + 1.0)
    mesh.now += 0.9
    assert mesh.coordinator.expire(mesh.now) == []
    mesh.now += 0.1
    assert [w.worker_id for w in mesh.coordinator.expire(mesh.now)] == ["w1"]
    assert mesh.coordinator.drop("lease-w1-1", mesh.now) is None


def test_a_live_worker_keeps_its_name_to_itself_but_may_come_back():
    mesh = running(2)
    with pytest.raises(AlreadyExists, match="--worker-id"):
        mesh.register("w0", pid=2)
    mesh.register("w0", pid=1, resident=[ExpertId(0, 0)])
    mesh.coordinator.drop("lease-w0-1", mesh.now)
    mesh.register("w0", pid=2)


def homes(mesh: Mesh) -> dict[str, list[ExpertId]]:
    by_worker: dict[str, list[ExpertId]] = {}
    for expert, (worker,) in mesh.served.items():
        by_worker.setdefault(worker, []).append(expert)
    return by_worker


def test_a_restarted_placement_adopts_what_is_served_and_moves_nothing():
    before = running(3, rules=ONE_LAYER)
    spare = ({"w0", "w1", "w2"} - homes(before).keys()).pop()
    after = Mesh(now=500.0, rules=ONE_LAYER)
    after.register(spare)
    first, second = homes(before)
    after.register(first, homes(before)[first], last_epoch=7)
    # Two workers would do for a plan, but somebody of the earlier life is still to come.
    assert after.turn() == {}
    assert after.coordinator.plan is None
    assert after.coordinator.next_deadline_s(after.now) == pytest.approx(502.0)
    after.now += 1.0
    after.register(second, homes(before)[second], last_epoch=9)
    orders = after.turn()
    assert not any(order.load or order.unload for order in orders.values())
    assert after.served == before.served
    assert after.coordinator.plan.epoch == 10


def test_a_restarted_placement_does_not_wait_for_the_dead():
    before = running(2)
    after = Mesh(now=500.0)
    after.register("w0", homes(before)["w0"], last_epoch=3)
    after.now += 2.0
    after.turn()
    assert homes(after) == {"w0": homes(before)["w0"]}
    assert "nobody serves" in after.coordinator.plan.note


def test_an_epoch_that_somebody_has_seen_is_never_given_again():
    mesh = running(2)
    mesh.gateway(epoch=40)
    mesh.turn()
    assert mesh.coordinator.plan.epoch == 41


def test_orders_are_never_older_than_what_their_worker_has_heard_of():
    mesh = Mesh()
    for name in ("w0", "w1"):
        mesh.register(name, last_epoch=41)  # restarted, and with nothing loaded
    orders = mesh.turn()
    assert mesh.coordinator.plan is None
    assert {name: (order.epoch, len(order.load)) for name, order in orders.items()} == {
        "w0": (41, 2),
        "w1": (41, 2),
    }


def test_who_has_nothing_to_do_hears_of_a_new_epoch_a_little_later():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    spare = ({"w0", "w1", "w2"} - homes(mesh).keys()).pop()
    mesh.coordinator.drop(f"lease-{holder}-1", mesh.now)
    assert list(mesh.turn()) == [spare]
    mesh.obey()
    mesh.turn()
    assert mesh.coordinator.next_deadline_s(mesh.now) == pytest.approx(mesh.now + 0.5)
    mesh.now += 0.5
    (idle,) = {"w0", "w1", "w2"} - {holder, spare}
    assert mesh.turn()[idle] == pb.WorkerOrder(epoch=mesh.coordinator.epoch, expert_shards=1)
    assert mesh.turn() == {}


def test_a_draining_worker_hands_over_before_it_leaves():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    spare = ({"w0", "w1", "w2"} - homes(mesh).keys()).pop()
    mesh.gateway(epoch=mesh.coordinator.plan.epoch)
    mesh.coordinator.drain(holder, mesh.now)
    orders = mesh.turn()
    assert len(orders[spare].load) == 1
    assert not any(order.leave for order in orders.values())
    assert mesh.served[0, 0] == (holder,)

    mesh.obey()
    orders = mesh.turn()
    assert mesh.served[0, 0] == (spare,)
    # The gateway may still send by the plan before this one.
    assert not any(order.leave for order in orders.values())
    mesh.gateway(epoch=mesh.coordinator.plan.epoch)
    assert mesh.turn()[holder].leave


def test_a_draining_worker_leaves_anyway_when_nobody_can_take_over():
    mesh = running(2)
    mesh.report("w0", draining=True)
    orders = mesh.turn()
    assert [name for name, order in orders.items() if order.leave] == ["w0"]
    assert "start 1 more" in mesh.coordinator.plan.note


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from("jkdogurtf"), st.integers(0, 4)), max_size=25),
    st.sampled_from((20, 30, 1000)),
    st.integers(0, 2),
)
def test_whatever_happens_the_plan_is_true_and_in_the_end_complete(
    events: list[tuple[str, int]], memory_bytes: int, max_replicas: int
):
    """Workers join, are killed, drain, obey or not, cannot be reached and get experts wrong, a
    gateway follows or lags behind, experts become busy and are rebalanced, and time passes."""
    mesh = Mesh(config=replace(CONFIG, max_replicas=max_replicas))
    for event, number in events:
        name = f"w{number}"
        here = name in mesh.coordinator.members.workers
        budget = None
        if event == "j" and not here:
            mesh.register(name, memory_bytes=memory_bytes)
        elif event == "k":
            mesh.told.pop(name, None)
            mesh.coordinator.drop(f"lease-{name}-1", mesh.now)
        elif event == "d" and here:
            mesh.coordinator.drain(name, mesh.now)
        elif event == "o":
            mesh.obey()
        elif event == "g":
            mesh.gateway(max(mesh.coordinator.current_plan().epoch - number, 0))
        elif event == "u":
            mesh.gateway(mesh.coordinator.current_plan().epoch, unreachable=[name])
        elif event == "f":
            mesh.gateway(faults=[(name, e) for e in RULES.experts[number % 3 :]])
        elif event == "r" and mesh.coordinator.target:
            mesh.gateway(0, load={RULES.experts[number % 4]: 500})
            budget = Budget()
        elif event == "t":
            mesh.now += 0.5 * number
            for alive in mesh.coordinator.members.workers:
                mesh.report(alive)
        before = mesh.coordinator.plan
        served = mesh.served
        for name, order in mesh.turn(budget).items():
            assert not (order.leave and order.load)
            unloaded = set(map(expert_from_proto, order.unload))
            assert not unloaded & {e for e, ids in served.items() if ids == (name,)}
            assert not unloaded & {e for e, ids in mesh.served.items() if name in ids}
        after = mesh.coordinator.plan
        assert after is before or before is None or after.epoch > before.epoch
        for expert, ids in mesh.served.items():
            for worker_id in ids:
                assert expert in mesh.coordinator.members.workers[worker_id].resident
                assert not mesh.coordinator.members.workers[worker_id].cut_off
    mesh.coordinator.gateway_gone("g")
    for name in ("x", "y"):
        mesh.register(name, memory_bytes=memory_bytes)
    mesh.now += 2.9
    for name in mesh.coordinator.members.workers:
        mesh.report(name)
    mesh.settle()
    assert mesh.coordinator.plan.complete
    draining = {n for n, w in mesh.coordinator.members.workers.items() if w.draining}
    assert not draining & {w for ids in mesh.served.values() for w in ids}


def test_a_worker_may_leave_before_there_is_a_plan():
    mesh = Mesh()
    mesh.register("w0")
    mesh.report("w0", draining=True)
    assert mesh.turn()["w0"].leave


def test_draining_a_stranger_is_an_error():
    with pytest.raises(PlacementError, match="no worker 'w7'"):
        running().coordinator.drain("w7", 0.0)


def test_an_expert_is_unloaded_when_no_gateway_can_send_to_it_any_more():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    spare = ({"w0", "w1", "w2"} - homes(mesh).keys()).pop()
    mesh.report(spare, resident=[expert_to_proto(ExpertId(0, 0))])
    mesh.gateway(epoch=0)
    mesh.turn()
    assert mesh.served[0, 0] == (holder,)
    mesh.gateway(epoch=mesh.coordinator.plan.epoch)
    orders = mesh.turn()
    assert list(orders) == [spare]
    assert list(map(expert_from_proto, orders[spare].unload)) == [(0, 0)]


def test_a_rebalance_brings_the_hot_expert_to_the_gateways_host():
    mesh = running(2)
    cold_home, hot = "w0", ExpertId(0, 0)
    if mesh.served[hot] == ("w0",):
        cold_home, hot = "w0", ExpertId(0, 1)
    mesh.coordinator.members.workers[cold_home].info.host = "gateway-host"
    mesh.gateway(epoch=mesh.coordinator.plan.epoch, load={hot: 1000})
    mesh.turn()
    assert mesh.served[hot] != (cold_home,)
    mesh.turn(Budget())
    while mesh.told:
        mesh.obey()
        mesh.turn()
        mesh.gateway(epoch=mesh.coordinator.plan.epoch)
        mesh.turn()
    assert mesh.served[hot] == (cold_home,)
    assert mesh.coordinator.plan.complete


def test_a_failed_order_is_shown_and_given_again_after_a_while():
    mesh = Mesh()
    mesh.register("w0")
    mesh.register("w1")
    order = mesh.turn()["w0"]
    mesh.report("w0", error="layer 0 of the checkpoint is truncated")
    assert mesh.turn() == {}
    assert "worker w0: layer 0" in mesh.coordinator.why_not_ready()
    mesh.now += 2.5
    mesh.report("w0", error="layer 0 of the checkpoint is truncated")
    mesh.report("w1")
    assert mesh.turn() == {}
    mesh.now += 2.5
    assert mesh.turn() == {"w0": order}


def test_orders_wait_for_a_worker_that_does_not_listen_yet():
    mesh = Mesh()
    mesh.register("w0")
    mesh.register("w1")
    mesh.coordinator.adopt(mesh.coordinator.next_target(mesh.now)(), mesh.now)
    assert mesh.coordinator.orders(mesh.now, []) == []
    assert len(mesh.coordinator.orders(mesh.now, ["lease-w0-1"])) == 1


def test_status_shows_load_and_balance():
    mesh = running(2)
    mesh.report("w0", load=[pb.ExpertLoad(rows=300)], queue_rows=5)
    mesh.gateway(epoch=1)
    status = mesh.coordinator.status(mesh.now)
    assert [w.rows_per_s for w in status.workers] == [10.0, 0.0]
    assert status.workers[0].queue_rows == 5
    assert status.balancedness == pytest.approx(0.5)
    assert [g.gateway.gateway_id for g in status.gateways] == ["g"]


def test_load_fades():
    load: LoadAverage[str] = LoadAverage(window_s=10.0)
    load.observe("a", 100, now=0.0)
    assert load.rate("a", now=0.0) == 10.0
    load.observe("a", 0, now=10.0)
    assert load.rate("a", now=20.0) == pytest.approx(10.0 * 0.1353, rel=1e-3)
    assert load.rate("b", now=0.0) == 0.0


def test_balancedness_is_mean_over_max():
    assert balancedness([]) == 1.0
    assert balancedness([0.0, 0.0]) == 1.0
    assert balancedness([3.0, 3.0]) == 1.0
    assert balancedness([4.0, 0.0, 0.0, 0.0]) == 0.25


# Replicas, moves and the room for them.


def with_replicas(num_workers: int, **fields: object) -> Mesh:
    config = replace(CONFIG, max_replicas=0)
    return running(num_workers, config=config, **fields)


def test_after_a_death_the_replica_serves_at_once_and_who_joins_restores_the_count():
    mesh = with_replicas(4, rules=ONE_LAYER)
    assert sorted(map(len, mesh.served.values())) == [2, 2]
    dead, other = mesh.served[0, 1]
    mesh.coordinator.drop(f"lease-{dead}-1", mesh.now)
    mesh.coordinator.publish(mesh.now)
    assert mesh.coordinator.plan.complete
    assert mesh.served[0, 1] == (other,)
    mesh.settle()
    mesh.register("w9")
    orders = mesh.turn()
    assert list(orders) == ["w9"]
    assert list(map(expert_from_proto, orders["w9"].load)) == [(0, 1)]
    assert [s.grpc_address for s in orders["w9"].sources] == [f"{other}:1"]
    mesh.obey()
    mesh.settle()
    assert mesh.served[0, 1] == (other, "w9")


def test_an_expert_that_lost_all_its_workers_takes_the_seat_of_a_replica():
    mesh = with_replicas(3, rules=ONE_LAYER)
    (alone,) = (e for e, ids in mesh.served.items() if len(ids) == 1)
    (twice,) = (e for e, ids in mesh.served.items() if len(ids) == 2)
    mesh.coordinator.drop(f"lease-{mesh.served[alone][0]}-1", mesh.now)
    (order,) = (order for order in mesh.turn().values() if order.load)
    assert list(map(expert_from_proto, order.load)) == [alone]
    mesh.settle()
    assert sorted(map(len, mesh.served.values())) == [1, 1]
    assert twice in mesh.served
    assert all(len(w.resident) == 1 for w in mesh.coordinator.members.workers.values())


def swap(mesh: Mesh, first: ExpertId, second: ExpertId) -> None:
    """Have two experts of a layer change places."""
    target = mesh.coordinator.target
    places = dict(target.workers_by_expert)
    places[first], places[second] = places[second], places[first]
    assert mesh.coordinator.adopt(replace(target, workers_by_expert=places), mesh.now) == 2


def test_full_workers_swap_by_holding_both_experts_for_a_while():
    mesh = running(2, rules=ONE_LAYER)
    before = mesh.served
    mesh.gateway()
    swap(mesh, *before)
    orders = mesh.turn()
    assert {len(order.load) for order in orders.values()} == {1}
    assert not any(order.unload for order in orders.values())
    mesh.obey()
    mesh.turn()
    # Both are there, so the plan names the new places; the old ones go when the gateway knows.
    a, b = before
    assert mesh.served == {a: before[b], b: before[a]}
    assert not any(order.unload for order in mesh.told.values())
    mesh.gateway()
    assert {len(order.unload) for order in mesh.turn().values()} == {1}
    mesh.settle()
    assert all(len(w.resident) == 1 for w in mesh.coordinator.members.workers.values())


def test_where_memory_has_no_room_for_both_they_swap_by_way_of_a_third():
    mesh = Mesh(rules=ONE_LAYER)
    for name in ("w0", "w1", "w2"):
        mesh.register(name, memory_bytes=10)
    mesh.settle()
    before = mesh.served
    mesh.gateway()
    swap(mesh, *before)
    served = []
    for _ in range(20):
        mesh.turn()
        mesh.obey()
        assert sorted(mesh.served) == sorted(before)
        served.append(mesh.served)
        mesh.gateway()
    a, b = before
    assert mesh.served == {a: before[b], b: before[a]}
    assert {w.worker_id for w in mesh.coordinator.members.workers.values() if not w.resident}
    assert "detour" in {event.kind for event in mesh.coordinator.history.latest}


def test_moves_that_no_memory_has_room_for_are_given_up():
    mesh = Mesh(rules=ONE_LAYER)
    for name in ("w0", "w1"):
        mesh.register(name, memory_bytes=10)
    mesh.settle()
    before = mesh.served
    mesh.gateway()
    swap(mesh, *before)
    mesh.settle()
    assert mesh.served == before
    assert mesh.coordinator.states() == ["ready", "ready"]
    kinds = [event.kind for event in mesh.coordinator.history.latest]
    assert kinds.count("moves_given_up") == 1


def test_a_source_on_the_same_host_comes_first():
    mesh = Mesh(rules=Rules((0,), 1), config=replace(CONFIG, max_replicas=3))
    mesh.register("a", host="far")
    mesh.settle()
    mesh.register("b", host="near")
    mesh.settle()
    mesh.register("c", host="near")
    order = mesh.turn()["c"]
    assert [s.grpc_address for s in order.sources] == ["b:1"]


# Who is out of the gateways' reach.


def test_a_worker_that_the_gateways_do_not_reach_is_lost_until_they_do():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    mesh.gateway(unreachable=[holder])
    mesh.turn()
    assert (0, 0) not in mesh.served
    assert mesh.coordinator.status(mesh.now).plan.workers
    # Its name stays in the plan, so that gateways go on trying.
    assert holder in {w.worker_id for w in mesh.coordinator.plan.workers}
    mesh.settle()
    assert mesh.coordinator.plan.complete
    assert mesh.served[0, 0] != (holder,)
    assert "unreachable" in mesh.coordinator.states()

    mesh.now += 2.0
    mesh.gateway()
    mesh.turn()
    # The gateway reaches it, but nobody has heard of it since.
    assert "unreachable" in mesh.coordinator.states()
    for name in ("w0", "w1", "w2"):
        mesh.report(name)
    mesh.settle()
    assert "unreachable" not in mesh.coordinator.states()
    kinds = [e.kind for e in mesh.coordinator.history.latest if e.kind != "worker_registered"]
    assert kinds == ["worker_unreachable", "moves", "repaired", "worker_back"]


def test_what_a_worker_had_that_is_cut_off_goes_to_another_host_if_it_can():
    mesh = Mesh(replace(ONE_LAYER, experts_per_worker=2))
    for name, host in [("a0", "a"), ("a1", "a"), ("b0", "b"), ("b1", "b"), ("a2", "a")]:
        mesh.register(name, host=host)
    mesh.settle()
    lost = next(w for (w, *_) in mesh.served.values() if w.startswith("a"))
    mesh.now += 0.5
    for name in ("b0", "b1"):
        mesh.report(name)
    mesh.gateway(unreachable=[lost])
    mesh.turn()
    assert mesh.coordinator.members.doubted() == {"a0", "a1", "a2"}
    gone = [e for e in ONE_LAYER.experts if e not in mesh.served]
    assert gone
    homes = {w for e in gone for w in mesh.coordinator.target.workers_by_expert[e]}
    assert homes <= {"b0", "b1"}

    # Whoever is heard of again is as good as any.
    mesh.now += 0.1
    mesh.report("a2")
    assert mesh.coordinator.members.doubted() == {"a0", "a1"}


def test_most_gateways_must_say_so_unless_its_heartbeat_is_overdue_too():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    for name in ("g0", "g1", "g2"):
        mesh.gateway(name=name)
    mesh.gateway(name="g0", unreachable=[holder])
    mesh.turn()
    assert mesh.served[0, 0] == (holder,)
    assert mesh.coordinator.next_deadline_s(mesh.now) == pytest.approx(mesh.now + 1.5)
    mesh.gateway(name="g1", unreachable=[holder])
    mesh.turn()
    assert (0, 0) not in mesh.served or mesh.served[0, 0] != (holder,)

    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    mesh.gateway(name="g1")
    mesh.gateway(name="g0", unreachable=[holder])
    mesh.now += 1.5
    mesh.turn()
    assert mesh.coordinator.members.workers[holder].cut_off


def test_a_gateway_that_reaches_nobody_is_cut_off_itself():
    mesh = running(3, rules=ONE_LAYER)
    before = mesh.served
    mesh.gateway(unreachable=["w0", "w1", "w2"])
    mesh.now += 2.5
    mesh.turn()
    assert mesh.served == before


def test_a_worker_that_comes_and_goes_stays_out_for_longer_each_time():
    mesh = running(3, rules=ONE_LAYER)
    worker = mesh.coordinator.members.workers[mesh.served[0, 0][0]]
    out_s = []
    for _ in range(8):
        mesh.gateway(unreachable=[worker.worker_id])
        mesh.turn()
        left_s = mesh.now
        while worker.cut_off:
            mesh.now += 0.5
            for name in ("w0", "w1", "w2"):
                mesh.report(name)
            mesh.gateway()
            mesh.turn()
        out_s.append(mesh.now - left_s)
    assert out_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


# Who gets an expert wrong.


def kinds_of(mesh: Mesh) -> list[str]:
    return [event.kind for event in mesh.coordinator.history.latest]


def faulty_in(mesh: Mesh) -> dict[str, list[ExpertId]]:
    status = mesh.coordinator.status(mesh.now)
    return {w.worker.worker_id: list(map(expert_from_proto, w.faulty)) for w in status.workers}


def test_an_expert_that_its_worker_gets_wrong_is_seated_elsewhere():
    mesh = running(3, rules=ONE_LAYER)
    expert, kept = ExpertId(0, 0), ExpertId(0, 1)
    (wrong,) = mesh.served[expert]
    (spare,) = {"w0", "w1", "w2"} - homes(mesh).keys()
    before = mesh.served
    mesh.gateway(faults=[(wrong, expert)])
    loads = {name: order.load for name, order in mesh.turn().items() if order.load}
    assert loads == {spare: [expert_to_proto(expert)]}
    # Requests wait for it, as gateways send that worker none of its rows any more.
    assert mesh.served == {kept: before[kept]}
    assert list(map(expert_from_proto, mesh.coordinator.plan.pending)) == [expert]
    assert faulty_in(mesh)[wrong] == [expert]
    # The spare may have to fetch it from there.
    mesh.gateway()
    assert not any(order.unload for order in mesh.turn().values())
    mesh.obey()
    assert not any(order.unload for order in mesh.turn().values())
    assert mesh.served == {expert: (spare,), kept: before[kept]}
    mesh.gateway()
    assert list(map(expert_from_proto, mesh.turn()[wrong].unload)) == [expert]
    mesh.settle()
    assert kinds_of(mesh)[3:] == ["expert_faulty", "moves", "repaired"]

    mesh.now += 1.0
    for name in ("w0", "w1", "w2"):
        mesh.report(name)
    mesh.settle()
    assert mesh.served[expert] == (spare,)
    assert faulty_in(mesh) == {"w0": [], "w1": [], "w2": []}
    assert kinds_of(mesh)[-1] == "expert_tried_again"


def test_a_replica_serves_at_once_what_another_worker_gets_wrong():
    mesh = with_replicas(4, rules=ONE_LAYER)
    wrong, other = mesh.served[0, 1]
    mesh.gateway(faults=[(wrong, ExpertId(0, 1))])
    mesh.coordinator.publish(mesh.now)
    assert mesh.coordinator.plan.complete
    assert mesh.served[0, 1] == (other,)
    mesh.settle()
    # Its seat takes a replica of the other expert meanwhile.
    assert wrong in mesh.served[0, 0]
    assert mesh.coordinator.faults.of(wrong) == [(0, 1)]


def test_of_two_that_have_an_expert_it_is_loaded_from_the_one_that_gets_it_right():
    mesh = with_replicas(4, rules=ONE_LAYER)
    wrong, other = mesh.served[0, 1]
    for name, worker in mesh.coordinator.members.workers.items():
        worker.info.host = "far" if name == other else "near"
    mesh.gateway(faults=[(wrong, ExpertId(0, 1))])
    mesh.register("w9", host="near")
    order = mesh.turn()["w9"]
    assert list(map(expert_from_proto, order.load)) == [(0, 1)]
    assert [s.grpc_address for s in order.sources] == [f"{other}:1"]


def test_the_only_worker_that_can_have_an_expert_keeps_it_and_is_tried_less_and_less_often():
    mesh = running(2)
    before = mesh.served
    (wrong,) = before[0, 0]
    fault = (wrong, ExpertId(0, 0))
    out_s = []
    for _ in range(8):
        epoch = mesh.coordinator.epoch
        mesh.gateway(faults=[fault])
        mesh.turn()
        since_s = mesh.now
        while mesh.coordinator.epoch == epoch:
            mesh.now += 0.5
            for name in ("w0", "w1"):
                mesh.report(name)
            mesh.gateway(epoch, faults=[fault])
            mesh.turn()
            assert mesh.served == before
            assert mesh.now < since_s + 100.0
        # By a new plan gateways try it again; what they said by the old one is old.
        mesh.gateway(epoch, faults=[fault])
        mesh.turn()
        assert mesh.coordinator.faults.of(wrong) == []
        out_s.append(mesh.now - since_s)
    assert out_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert "faulty_expert_stays" in kinds_of(mesh)

    mesh.now += 120.0
    for name in ("w0", "w1"):
        mesh.coordinator.members.workers[name].last_seen_s = mesh.now
    mesh.turn()
    mesh.gateway(faults=[fault])
    mesh.turn()
    assert mesh.coordinator.faults.next_deadline_s() == mesh.now + 1.0


def test_a_worker_that_starts_anew_starts_without_faults():
    mesh = running(3, rules=ONE_LAYER)
    (wrong,) = mesh.served[0, 0]
    mesh.gateway(faults=[(wrong, ExpertId(0, 0))])
    mesh.turn()
    mesh.coordinator.drop(f"lease-{wrong}-1", mesh.now)
    mesh.register(wrong, pid=2)
    assert not mesh.coordinator.faults.out
    mesh.settle()
    assert mesh.coordinator.plan.complete


def test_a_gateway_that_finds_fault_with_everybody_is_at_fault_itself():
    mesh = running(3, rules=ONE_LAYER)
    before = mesh.served
    mesh.gateway(faults=[(ids[0], expert) for expert, ids in before.items()])
    mesh.turn()
    assert mesh.served == before
    mesh.gateway(faults=[("w9", ExpertId(0, 0)), (before[0, 0][0], ExpertId(0, 1))])
    mesh.turn()
    assert mesh.served == before


# Slices.


def test_slices_are_decided_with_the_first_target_and_stay():
    mesh = Mesh(rules=ONE_LAYER)
    for i in range(4):
        mesh.register(f"w{i}", memory_bytes=5)
    mesh.settle()
    plan = mesh.coordinator.plan
    assert plan.complete
    assert plan.expert_shards == 2
    assert sorted(mesh.served) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    mesh.register("big", memory_bytes=1000)
    mesh.settle()
    assert mesh.coordinator.plan.expert_shards == 2

    after = Mesh(rules=ONE_LAYER, now=500.0)
    for worker in mesh.coordinator.members.workers.values():
        after.register(worker.worker_id, worker.resident, memory_bytes=5, shards=2)
    after.settle()
    assert after.served == mesh.served
    with pytest.raises(ModelMismatch, match="cut into 4, this mesh has them cut into 2"):
        after.register("old", [ExpertId(0, 7)], shards=4)


def test_slices_may_be_asked_for():
    mesh = Mesh(rules=ONE_LAYER, config=replace(CONFIG, expert_shards=2))
    mesh.register("w0")
    assert mesh.coordinator.why_not_ready() == "1 of 4 workers are registered"
    with pytest.raises(PlacementError, match="another --expert-shards"):
        Mesh(rules=ONE_LAYER, config=replace(CONFIG, expert_shards=3))


# Two placements.


def test_a_placement_that_hears_of_a_newer_one_starts_over_from_what_workers_report():
    mesh = running(2)
    other_way = {"w0": homes(mesh)["w1"], "w1": homes(mesh)["w0"]}
    # Another placement has swapped everything while this one was away.
    for name, resident in other_way.items():
        mesh.coordinator.drop(f"lease-{name}-1", mesh.now)
        mesh.register(name, resident, last_epoch=90)
    orders = mesh.turn()
    assert not any(order.load or order.unload for order in orders.values())
    assert homes(mesh) == other_way
    assert mesh.coordinator.plan.epoch == 91
    assert "fenced" in {event.kind for event in mesh.coordinator.history.latest}


def test_a_stale_placement_without_workers_says_nothing():
    mesh = running(2)
    for name in ("w0", "w1"):
        mesh.coordinator.drop(f"lease-{name}-1", mesh.now)
    mesh.gateway(epoch=90)
    mesh.turn()
    assert mesh.coordinator.plan is None
    mesh.now += 10.0
    mesh.turn()
    assert mesh.coordinator.plan is None
    assert mesh.coordinator.why_not_ready()


def test_orders_carry_the_newest_epoch_that_anybody_has_heard_of():
    mesh = Mesh()
    mesh.register("w0", last_epoch=7)
    mesh.register("w1")
    assert {order.epoch for order in mesh.turn().values()} == {7}


# Balance.


def test_a_mesh_out_of_balance_is_due_after_a_while_and_once_it_moved_nothing_less_often():
    policy = RebalancePolicy(below=0.8, after_s=10.0)
    assert not policy.observe(0.7, now=0.0)
    assert not policy.observe(0.82, now=5.0)  # not good enough to forget it
    assert policy.observe(0.7, now=10.0)
    policy.took_turn(moves=3, now=10.0)
    assert not policy.observe(0.7, now=19.0)
    assert policy.observe(0.7, now=20.0)
    policy.took_turn(moves=0, now=20.0)
    assert not policy.observe(0.7, now=39.0)
    assert policy.observe(0.7, now=40.0)
    policy.took_turn(moves=0, now=40.0)
    assert not policy.observe(0.9, now=60.0)
    assert not policy.observe(0.7, now=61.0)
    assert policy.observe(0.7, now=71.0)
    assert not RebalancePolicy(below=0.0, after_s=1.0).observe(0.0, now=100.0)


def test_a_rebalance_is_due_when_traffic_has_drifted_and_not_when_there_is_none():
    mesh = with_replicas(3, rules=ONE_LAYER)
    (cold,) = (e for e, ids in mesh.served.items() if len(ids) == 2)
    (hot,) = (e for e, ids in mesh.served.items() if len(ids) == 1)
    mesh.gateway()
    due = []
    for _ in range(40):
        mesh.now += 1.0
        for name in ("w0", "w1", "w2"):
            mesh.report(name)
        mesh.gateway(load={hot: 900, cold: 100})
        mesh.turn()
        due.append(mesh.coordinator.rebalance_due(mesh.now))
    # Thirty seconds after the first report that had enough rows to tell.
    assert due == [False] * 30 + [True] * 10
    mesh.coordinator.rebalance_begins(mesh.now)
    mesh.settle(Budget())
    mesh.coordinator.rebalance_done(1, mesh.now)
    assert len(mesh.served[hot]) == 2
    assert not mesh.coordinator.rebalance_due(mesh.now + 1.0)
    status = mesh.coordinator.status(mesh.now, unix_s=1e9)
    assert status.moves == 1
    assert status.rebalanced_at_unix_s == 1e9
    assert status.replicas == 1
    assert status.events[-1].kind == "rebalance"
    assert status.events[-1].at_unix_s == 1e9

    idle = with_replicas(3, rules=ONE_LAYER)
    idle.now += 100.0
    assert not idle.coordinator.rebalance_due(idle.now)


def test_a_repair_is_timed_from_the_death_until_the_plan_is_complete():
    mesh = running(3, rules=ONE_LAYER)
    holder = mesh.served[0, 0][0]
    mesh.coordinator.drop(f"lease-{holder}-1", mesh.now)
    mesh.turn()
    mesh.now += 1.25
    mesh.settle()
    assert mesh.coordinator.repairs_s == [1.25]
    repaired = mesh.coordinator.history.latest[-1]
    assert (repaired.kind, repaired.text) == (
        "repaired",
        "every expert is served again after 1.25 s",
    )
