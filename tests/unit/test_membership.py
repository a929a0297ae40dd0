"""Stories of a small mesh, told to the coordinator with the time in hand.

Two layers of two experts and workers with one expert of each layer, unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.config import PlacementConfig
from mesh.errors import AlreadyExists, PlacementError
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from placement.coordinator import Coordinator
from placement.load import LoadAverage, balancedness
from placement.improve import Budget
from placement.rules import Rules
from protos import placement_pb2 as pb

RULES = Rules((0, 1), 2)


@dataclass
class Mesh:
    """A coordinator and the workers that obey it, with time standing still between calls."""

    rules: Rules = RULES
    config: PlacementConfig = PlacementConfig(settle_s=2.0, lease_s=3.0, max_replicas=1)
    now: float = 100.0
    told: dict[str, pb.WorkerOrder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coordinator = Coordinator(self.rules, "f" * 16, self.config, expert_hidden_size=8)

    def register(
        self, name: str, resident: Iterable[ExpertId] = (), last_epoch: int = 0, pid: int = 1
    ) -> None:
        info = pb.WorkerInfo(
            worker_id=name,
            grpc_address=f"{name}:1",
            host=name,
            memory_bytes=1000,
            expert_bytes=10,
            pid=pid,
        )
        request = pb.RegisterRequest(
            worker=info, resident=map(expert_to_proto, resident), last_epoch=last_epoch
        )
        self.coordinator.register(request, lease_id=f"lease-{name}-{pid}", now=self.now)

    def report(self, name: str, **fields: object) -> None:
        worker = self.coordinator.members.workers[name]
        fields.setdefault("resident", map(expert_to_proto, worker.resident))
        self.coordinator.report(worker, pb.WorkerReport(**fields), self.now)

    def gateway(self, epoch: int, load: dict[ExpertId, int] | None = None) -> None:
        report = pb.GatewayReport(gateway_id="g", host="gateway-host", epoch=epoch)
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
                resident = set(worker.resident) | set(map(expert_from_proto, order.load))
                resident -= set(map(expert_from_proto, order.unload))
                self.report(name, resident=map(expert_to_proto, sorted(resident)))
        self.told.clear()

    def settle(self) -> None:
        """Decide and obey until there is nothing left to do."""
        self.turn()
        while self.told:
            self.obey()
            self.turn()

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


def test_min_workers_are_waited_for():
    mesh = Mesh(config=replace(Mesh.config, min_workers=3))
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
    assert not orders[holder].leave
    mesh.gateway(epoch=mesh.coordinator.plan.epoch)
    assert mesh.turn()[holder].leave


def test_a_draining_worker_leaves_anyway_when_nobody_can_take_over():
    mesh = running(2)
    mesh.report("w0", draining=True)
    orders = mesh.turn()
    assert orders["w0"].leave
    assert not orders["w1"].leave
    assert "start 1 more" in mesh.coordinator.plan.note


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("jkdog"), st.integers(0, 4)), max_size=25))
def test_whatever_happens_the_plan_is_true_and_in_the_end_complete(
    events: list[tuple[str, int]],
):
    """Workers join, are killed, drain, obey or not, and a gateway follows or lags behind."""
    mesh = Mesh()
    for event, number in events:
        name = f"w{number}"
        here = name in mesh.coordinator.members.workers
        if event == "j" and not here:
            mesh.register(name)
        elif event == "k":
            mesh.told.pop(name, None)
            mesh.coordinator.drop(f"lease-{name}-1", mesh.now)
        elif event == "d" and here:
            mesh.coordinator.drain(name, mesh.now)
        elif event == "o":
            mesh.obey()
        elif event == "g":
            mesh.gateway(epoch=max(mesh.coordinator.current_plan().epoch - number, 0))
        before = mesh.coordinator.plan
        for name, order in mesh.turn().items():
            assert not (order.leave and order.load)
            routed = {e for e, ids in mesh.served.items() if ids == (name,)}
            assert not routed & set(map(expert_from_proto, order.unload))
        after = mesh.coordinator.plan
        assert after is before or before is None or after.epoch > before.epoch
        for expert, ids in mesh.served.items():
            for worker_id in ids:
                assert expert in mesh.coordinator.members.workers[worker_id].resident
    mesh.coordinator.gateway_gone("g")
    for name in ("x", "y"):
        mesh.register(name)
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
