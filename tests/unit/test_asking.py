"""Layers that leave in one compiled call, on a stand-in for the driver that computes on the host.

The graph of a layer does what :func:`gateway.gpu_kernels.place` does; workers are real, over UCX.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.asking import MAX_ROWS
from gateway.dispatch import Placed
from mesh import wire
from mesh.errors import MeshError
from mesh.plan import ExpertId
from mesh.transport.ucx import UcxTransport
from protos import engine_pb2 as pb
from protos import placement_pb2
from tests.rig import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    Worker,
    connect,
    expected,
    factor_of,
    random_step,
    times,
)
from tests.seats import Layer, seated_dispatcher
from tests.stand_in import FAILS_AT_LAUNCH, FAILS_LATER, Graph, Knobs, compiled

LAYERS = (3, 4)
LAYER = LAYERS[0]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("driver"))


class Rig:
    """A gateway whose layers have seats, and the workers that a test asks for."""

    def __init__(self, driver: str, grouped: bool = False) -> None:
        self.transport = UcxTransport()
        self.dispatcher = seated_dispatcher(self.transport, driver, grouped)
        self.workers: list[Worker] = []
        self.layers: dict[tuple[int, int, int], Layer] = {}
        self.left: list[bool] = []
        """Of each layer that ran, whether it left by its seat."""

    def worker(self, worker_id: str, *indices: int, **options: object) -> Worker:
        experts = [ExpertId(layer, index) for layer in LAYERS for index in indices]
        worker = Worker(worker_id, UcxTransport, experts, **options)  # type: ignore[arg-type]
        self.workers.append(worker)
        return worker

    def connect(self, epoch: int = 1) -> pb.Routing:
        self.layers.clear()  # as engines do where the arenas are others
        return connect(self.dispatcher, self.transport, self.workers, epoch)

    @property
    def header_rows(self) -> int:
        return self.dispatcher._frames.header_rows

    def layer(self, num_tokens: int, layer: int = LAYER, micro_batch: int = 0) -> Layer:
        key = (layer, micro_batch, num_tokens)
        if key not in self.layers:
            self.layers[key] = Layer(self.dispatcher, layer, micro_batch, num_tokens)
        return self.layers[key]

    def run(
        self, num_tokens: int, seed: int = 0, layer: int = LAYER
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What came back, and what should have."""
        step = random_step(num_tokens, seed=seed)
        self.dispatcher.begin_step(1)
        one = self.layer(num_tokens, layer)
        self.left.append(one.leave(*step))
        return one.come_back(), expected(layer, *step)

    @property
    def num_frames_held(self) -> int:
        """Between steps: frames that are neither free nor a seat's."""
        frames, asks = self.dispatcher._frames, self.dispatcher._asks
        assert asks is not None
        return frames.num_frames - frames.num_free - len(asks._held)

    def settle(self) -> None:
        """Until nothing is away any more that nobody waits for."""
        until = time.monotonic() + 20
        while self.dispatcher._abandoned and time.monotonic() < until:
            self.dispatcher.poll()
        assert self.num_frames_held == 0
        assert self.dispatcher._outstanding == {}

    def end(self) -> None:
        for worker in self.workers:
            worker.plane.stop()
        self.dispatcher.close()
        self.transport.close()


@pytest.fixture
def rig(driver: str) -> Iterator[Rig]:
    made = Rig(driver)
    yield made
    made.end()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.balance.MIN_PATIENCE_S", 0.05)
    monkeypatch.setattr("gateway.balance._UNKNOWN_PATIENCE_S", 0.05)


def wrong(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
    """An expert whose rows must never be seen."""
    return times(1e9)


def test_each_row_comes_back_from_its_own_expert_and_is_counted(rig: Rig) -> None:
    for index in range(NUM_EXPERTS):
        rig.worker(f"w{index}", index)
    rig.connect()
    for seed, num_tokens in enumerate((1, 2, 17, 64, 2)):
        got, want = rig.run(num_tokens, seed)
        torch.testing.assert_close(got, want)
    assert rig.left == [True] * 5
    assert rig.dispatcher.void_rows() == {}
    assert sum(rig.dispatcher.rows_by_expert.values()) == 2 * (1 + 2 + 17 + 64 + 2)
    served = {e: n for worker in rig.workers for e, n in worker.plane.stats().rows.items()}
    assert dict(rig.dispatcher.rows_by_expert) == served
    assert {pace.worker_id for pace in rig.dispatcher.peers.paces()} >= {"w0", "w1"}
    assert rig.dispatcher.expert_wait_s > 0
    rig.settle()


def test_experts_of_one_worker_share_a_message_and_layers_its_frame(rig: Rig) -> None:
    """What one layer said ahead of its rows is not the next one's."""
    first, second = rig.worker("first", 0, 2, 3), rig.worker("second", 1)
    rig.connect()
    for seed in range(12):
        got, want = rig.run(1 + seed % 5, seed, LAYERS[seed % 2])
        torch.testing.assert_close(got, want)
    assert rig.left == [True] * 12
    assert first.plane.stats().refused == second.plane.stats().refused == {}


@pytest.mark.parametrize("grouped", [False, True])
def test_one_of_a_workers_experts_is_asked_like_several_where_those_are_computed_together(
    driver: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many experts, one alone has no graph of its own."""
    monkeypatch.setattr("gateway.asking.CAPTURED_AHEAD", 2)
    rig = Rig(driver, grouped)
    try:
        most, rest = rig.worker("most", 0, 1, 2), rig.worker("rest", 3)
        served: dict[str, list[int]] = {"most": [], "rest": []}
        for worker in (most, rest):
            tell = served[worker.worker_id].append
            worker.plane.trace(lambda trail, tell=tell: tell(wire.decode(trail.tag).expert))
        rig.connect()
        x_TD, _, weights_TK = random_step(2)
        for ids in ([[1, 3], [1, 3]], [[0, 2], [2, 1]]):
            step = x_TD, torch.tensor(ids), weights_TK
            rig.dispatcher.begin_step(1)
            one = rig.layer(2)
            assert one.leave(*step)
            torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
        for worker in (most, rest):
            worker.plane.weights(lambda transfers: None)  # a turn of its thread: it has told of all
        alone = wire.SEVERAL if grouped else 1
        assert served == {"most": [alone, wire.SEVERAL], "rest": [3]}
    finally:
        rig.end()


def test_two_micro_batches_are_away_at_once_layer_after_layer(rig: Rig) -> None:
    rig.worker("most", 0, 1, 2)
    rig.worker("rest", 3)
    rig.connect()
    for seed in range(5):
        rig.dispatcher.begin_step(2)
        away: list[tuple[Layer, tuple[torch.Tensor, ...]]] = []
        for layer in LAYERS:
            for micro_batch in (0, 1):
                if layer != LAYER:
                    one, step = away.pop(0)
                    torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
                step = random_step(9, seed=10 * seed + micro_batch)
                one = rig.layer(9, layer, micro_batch)
                assert one.leave(*step)
                away.append((one, step))
        for one, step in away:
            torch.testing.assert_close(one.come_back(), expected(LAYERS[1], *step))


def test_what_is_back_makes_the_next_one_leave(rig: Rig) -> None:
    rig.worker("most", 0, 1, 2)
    rig.worker("rest", 3)
    rig.connect()
    for seed in range(5):
        rig.dispatcher.begin_step(2)
        steps = [random_step(3 + n, seed=10 * seed + n) for n in range(2)]
        one, other = rig.layer(3, LAYER, 0), rig.layer(4, LAYER, 1)
        assert one.leave(*steps[0])
        torch.testing.assert_close(one.turn(other, *steps[1]), expected(LAYER, *steps[0]))
        assert other.placed.pending is None
        torch.testing.assert_close(other.come_back(), expected(LAYER, *steps[1]))
    assert sum(rig.dispatcher.rows_by_expert.values()) == 5 * 2 * (3 + 4)


def test_what_is_back_makes_the_next_one_leave_in_any_way(rig: Rig) -> None:
    """The next one fits no plan; then the one before it is refused."""
    rig.worker("most", 0, 1, 2)
    rig.connect()
    rig.dispatcher.begin_step(2)
    one, other = rig.layer(2, LAYER, 0), rig.layer(2, LAYER, 1)
    x_TD, _, weights_TK = random_step(2)
    served, lost = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0, 1], [3, 2]])
    assert one.leave(x_TD, served, weights_TK)
    got = one.turn(other, x_TD, lost, weights_TK)
    torch.testing.assert_close(got, expected(LAYER, x_TD, served, weights_TK))
    assert other.placed.pending is not None
    other.come_back()
    assert rig.dispatcher.void_rows().keys() == {(1, 1)}

    rig.dispatcher.begin_step(2)
    rig.workers[0].plane._store.unload([ExpertId(LAYER, 2)])
    one.leave(x_TD, served, weights_TK)
    one.turn(other, x_TD, torch.tensor([[0, 1], [1, 0]]), weights_TK)
    got = other.come_back()
    want = expected(LAYER, x_TD, torch.tensor([[0, 1], [1, 0]]), weights_TK)
    torch.testing.assert_close(got, want)
    assert rig.dispatcher.void_rows().keys() == {(0, 1)}


def test_a_step_may_begin_with_the_end_of_the_last(rig: Rig, driver: str) -> None:
    """Behind other graphs. Its rows are away when it is begun; or are taken back, where another
    step comes, and leave again."""
    knobs = Knobs(driver)
    rig.worker("most", 0, 1, 2)
    rig.worker("rest", 3)
    rig.connect()
    first, last = rig.layer(3, LAYERS[0]), rig.layer(3, LAYERS[1])
    idle = torch.zeros(1)
    between = SimpleNamespace(graph=Graph(idle.data_ptr(), 1, 1.0))
    between.raw_cuda_graph_exec = lambda: ctypes.addressof(between.graph)
    for seed in range(4):
        steps = [random_step(3, seed=10 * seed + n) for n in range(2)]
        rig.dispatcher.begin_step(1)
        assert last.leave(*steps[0])
        first._fill(*steps[1])
        launched = knobs["launched"]
        assert rig.dispatcher.turn_at_once(last.placed, first.placed, between, first)
        assert knobs["launched"] == launched + 2
        torch.testing.assert_close(last._combined(), expected(LAYERS[1], *steps[0]))
        assert rig.dispatcher.is_away(first.placed)
        assert not rig.dispatcher.is_away(last.placed)
        proceeds = seed % 2 == 0
        rig.dispatcher.begin_step(1, away=proceeds)
        assert rig.dispatcher.is_away(first.placed) == proceeds
        if not proceeds:
            assert first.leave(*steps[1])
        torch.testing.assert_close(first.come_back(), expected(LAYERS[0], *steps[1]))
        assert not rig.dispatcher.void_rows()
    rig.settle()


def test_a_step_that_does_not_come_back_in_time_begins_no_other(rig: Rig, driver: str) -> None:
    """Nothing of the next is launched."""
    knobs = Knobs(driver)
    rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    first, last = rig.layer(3, LAYERS[0]), rig.layer(3, LAYERS[1])
    rig.dispatcher.begin_step(1)
    step = random_step(3)
    rig.workers[0].plane._store.unload([ExpertId(LAYERS[1], int(step[1][0, 0]))])
    assert last.leave(*step)
    launched = knobs["launched"]
    assert not rig.dispatcher.turn_at_once(last.placed, first.placed, first)
    assert knobs["launched"] == launched
    assert not rig.dispatcher.is_away(first.placed)
    last.come_back()
    assert (0, 0) in rig.dispatcher.void_rows()


def test_what_was_launched_before_leaves_if_its_plan_holds(rig: Rig, driver: str) -> None:
    """Where it does not, it is launched again."""
    knobs = Knobs(driver)
    for index in range(NUM_EXPERTS):
        rig.worker(f"w{index}", index)
    rig.connect()
    assert rig.dispatcher.plan_of(rig.layer(5).placed) == 0
    rig.run(5)
    for seed in range(2):
        rig.dispatcher.begin_step(1)
        one, step = rig.layer(5), random_step(5, seed=seed)
        plan = one.launch(*step)
        assert plan
        launched = knobs["launched"]
        if seed == 1:
            rig.dispatcher.peers.version += 1
        rig.dispatcher.leave(one.placed, one, plan)
        assert knobs["launched"] == launched + seed
        torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
    rig.settle()


def test_a_batch_that_comes_from_no_graph_is_another_micro_batch_of_the_step(rig: Rig) -> None:
    rig.worker("most", 0, 1, 2)
    rig.connect()
    one, step = rig.layer(2), (random_step(2)[0], torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2))
    lost = torch.tensor([[0, 1], [3, 2]])
    rig.dispatcher.begin_step(2)
    assert one.leave(*step)
    pending = rig.dispatcher.dispatch(LAYER, step[0], lost, step[2])
    torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
    pending.combine()
    assert set(rig.dispatcher.void_rows()) == {(1, 1)}


def test_padding_is_nobodys_and_leaves_nothing(rig: Rig) -> None:
    rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    x_TD, ids_TK, weights_TK = random_step(4)
    ids_TK[2:] = NUM_EXPERTS
    one = rig.layer(4)
    for padded in (ids_TK, torch.full_like(ids_TK, NUM_EXPERTS)):
        rig.dispatcher.begin_step(1)
        assert one.leave(x_TD, padded, weights_TK)
        rig.dispatcher.come_back(one.placed)
        assert torch.equal(one.placed.rows_TK >= 0, padded < NUM_EXPERTS)
    assert sum(rig.dispatcher.rows_by_expert.values()) == 4


def test_replicas_take_turns(rig: Rig) -> None:
    rig.worker("one", 0, 1, 2, 3)
    rig.worker("two", 0, 1, 2, 3)
    rig.connect()
    for seed in range(200):
        got, want = rig.run(2, seed)
        torch.testing.assert_close(got, want)
    assert rig.left == [True] * 200
    assert all(sum(worker.plane.stats().rows.values()) > 40 for worker in rig.workers)


def test_an_expert_that_nobody_serves_makes_its_layer_leave_the_other_way(rig: Rig) -> None:
    worker = rig.worker("most", 0, 1, 2)
    rig.connect()
    x_TD, _, weights_TK = random_step(3)
    one = rig.layer(3)
    for ids_TK, by_seat in (([[0, 1], [1, 3], [2, 0]], False), ([[0, 1], [1, 2], [2, 0]], True)):
        step = (x_TD, torch.tensor(ids_TK), weights_TK)
        rig.dispatcher.begin_step(1)
        posted_s = rig.dispatcher.posted_s
        assert one.leave(*step) == by_seat
        assert rig.dispatcher.posted_s > posted_s
        got, want = one.come_back(), expected(LAYER, *step)
        torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
        assert set(rig.dispatcher.void_rows()) == (set() if by_seat else {(0, 1)})
    assert sum(worker.plane.stats().rows.values()) == 5 + 6
    assert sum(rig.dispatcher.rows_by_expert.values()) == 6 + 6


def test_more_rows_than_a_message_takes_leave_the_other_way(rig: Rig) -> None:
    for index in range(NUM_EXPERTS):
        rig.worker(f"w{index}", index, max_rows=5)
    rig.connect()
    for num_tokens in (2, 64, 2):
        got, want = rig.run(num_tokens)
        torch.testing.assert_close(got, want)
    assert rig.left == [True, False, True]
    assert all(worker.plane.stats().refused == {} for worker in rig.workers)


def test_more_tokens_than_a_seat_takes_have_none(rig: Rig) -> None:
    rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    asks = rig.dispatcher._asks
    assert asks is not None
    assert asks.seat(0, LAYER, NUM_EXPERTS, MAX_ROWS) is not None
    assert asks.seat(0, LAYER, NUM_EXPERTS, MAX_ROWS + 1) is None
    x_TD, ids_TK, weights_TK = random_step(3)
    rows_TK = torch.full_like(ids_TK, -1)
    placed = Placed(LAYER, 0, x_TD, ids_TK, weights_TK, rows_TK, None, rig.dispatcher)

    class Nothing:
        def replay(self) -> None:
            pass

        def raw_cuda_graph_exec(self) -> int:
            raise AssertionError("there is no seat")

    rig.dispatcher.begin_step(1)
    rig.dispatcher.leave(placed, Nothing())
    rig.dispatcher.come_back(placed)
    got = rig.dispatcher.layout.combine(rig.dispatcher.arenas[1], placed.rows_TK, weights_TK)
    torch.testing.assert_close(got, expected(LAYER, x_TD, ids_TK, weights_TK))


def test_refused_rows_go_to_a_replica_and_the_seat_asks_that_from_then_on(rig: Rig) -> None:
    moved = rig.worker("moved", 0, 1, 2, 3)
    rig.worker("stays", 0, 1, 2, 3)
    rig.connect()
    moved.store.unload([ExpertId(LAYER, 2)])
    for seed in range(200):
        got, want = rig.run(4, seed)
        torch.testing.assert_close(got, want)
    assert rig.dispatcher.void_rows() == {}
    assert rig.dispatcher.refused > 0
    assert rig.left == [True] * 200
    assert rig.dispatcher.peers.take_lost() == []
    rig.settle()


def test_whoever_answers_badly_is_asked_by_seats_again_once_it_answers_well(rig: Rig) -> None:
    fails = [True, True, False]

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            if fails and fails.pop(0):
                raise torch.OutOfMemoryError("no memory left")
            return x_RD * factor_of(expert)

        return run

    rig.worker("w", 2, load=load)
    rig.connect()
    step = (random_step(1)[0], torch.full((1, 2), 2), torch.ones(1, 2))
    one = rig.layer(1)
    left, void = [], []
    for _ in range(4):
        rig.dispatcher.begin_step(1)
        left.append(one.leave(*step))
        got = one.come_back()
        void.append(len(rig.dispatcher.void_rows()))
    assert (left, void) == ([True, False, False, True], [1, 1, 0, 0])
    torch.testing.assert_close(got, expected(LAYER, *step))
    assert rig.dispatcher.peers.take_expert_faults() == []


@pytest.mark.parametrize("replica", [True, False])
def test_a_worker_that_is_dropped_with_rows_in_hand(rig: Rig, replica: bool) -> None:
    hold = threading.Event()

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            hold.wait(20)
            return x_RD * 1e9

        return run

    rig.worker("hung", 0, 1, load=load)
    rig.worker("fine", *([0, 1] if replica else []), 2, 3)
    routing = rig.connect()
    session = next(peer.reply_session for peer in routing.peers if peer.worker_id == "hung")
    x_TD, _, weights_TK = random_step(2)
    step = (x_TD, torch.tensor([[0, 1], [2, 3]]), weights_TK)
    rig.dispatcher.begin_step(1)
    one = rig.layer(2)
    assert one.leave(*step)
    rig.dispatcher.peers.drop(pb.DropPeer(worker_id="hung", reply_session=session, reason="hung"))
    got, want = one.come_back(), expected(LAYER, *step)
    torch.testing.assert_close(got[1], want[1])
    if replica:
        torch.testing.assert_close(got[0], want[0])
    assert set(rig.dispatcher.void_rows()) == (set() if replica else {(0, 0)})
    assert [lost.worker_id for lost in rig.dispatcher.peers.take_lost()] == ["hung"]
    hold.set()
    rig.dispatcher.begin_step(1)
    assert one.leave(*step) == replica
    one.come_back()
    rig.settle()


def test_the_next_layer_is_planned_while_this_one_is_away_with_a_worker_that_is_lost(
    rig: Rig,
) -> None:
    hold = threading.Event()

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            hold.wait(20)
            return x_RD * 1e9

        return run

    rig.worker("hung", 0, 1, load=load)
    rig.worker("fine", 2, 3)
    routing = rig.connect()
    session = next(peer.reply_session for peer in routing.peers if peer.worker_id == "hung")
    x_TD, _, weights_TK = random_step(2)
    one, other = rig.layer(2, LAYERS[0]), rig.layer(2, LAYERS[1])
    rig.dispatcher.begin_step(1)
    assert one.leave(x_TD, torch.tensor([[0, 1], [2, 3]]), weights_TK)
    rig.dispatcher.peers.drop(pb.DropPeer(worker_id="hung", reply_session=session, reason="hung"))
    step = (x_TD, torch.tensor([[3, 2], [2, 3]]), weights_TK)
    one.turn(other, *step)
    torch.testing.assert_close(other.come_back(), expected(LAYERS[1], *step))
    assert set(rig.dispatcher.void_rows()) == {(0, 0)}
    hold.set()
    rig.dispatcher.begin_step(1)
    assert one.leave(*step)
    one.come_back()
    rig.settle()


@pytest.mark.usefixtures("impatient")
def test_late_rows_go_to_a_replica_and_the_late_reply_harms_nobody(rig: Rig) -> None:
    hold = threading.Event()

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            hold.wait(20)
            return x_RD * 1e9

        return run

    rig.worker("late", 0, 1, load=load)
    rig.worker("prompt", 2, 3)
    rig.worker("replica", 0, 1)
    routing = rig.connect()
    x_TD, _, weights_TK = random_step(3)
    step = (x_TD, torch.tensor([[0, 2], [1, 3], [0, 1]]), weights_TK)
    one = rig.layer(3)
    for _ in range(200):
        rig.dispatcher.begin_step(1)
        one.leave(*step)
        torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
        if rig.dispatcher.failovers:
            break
    assert rig.dispatcher.void_rows() == {}
    assert [late.worker_id for late in rig.dispatcher.peers.take_late()] == ["late"]
    assert rig.dispatcher.peers.take_lost() == []
    # It is late still: whoever it shares with is asked, by seats.
    rig.left.clear()
    for seed in range(3):
        got, want = rig.run(5, seed)
        torch.testing.assert_close(got, want)
    assert rig.left == [True] * 3
    hold.set()
    rig.settle()
    assert rig.dispatcher.peers["late"].late_s is None
    rig.dispatcher.set_routing(routing)  # all is given back, and taken again
    got, want = rig.run(5)
    rig.settle()


@pytest.mark.usefixtures("impatient")
def test_a_late_worker_without_a_replica_is_waited_for(rig: Rig) -> None:
    hold = threading.Event()
    asked: list[str] = []

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            hold.wait(20)
            return x_RD * factor_of(expert)

        return run

    def on_late() -> None:
        asked.extend(late.worker_id for late in rig.dispatcher.peers.take_late())
        hold.set()

    rig.worker("slow", 0, 1, 2, 3, load=load)
    rig.connect()
    rig.dispatcher.on_late = on_late
    got, want = rig.run(4)
    torch.testing.assert_close(got, want)
    assert asked == ["slow"]
    assert rig.dispatcher.void_rows() == {}
    assert rig.dispatcher.failovers == 0
    got, want = rig.run(4)
    assert rig.left == [True, True]


def test_what_a_broken_step_left_away_does_not_leak(rig: Rig) -> None:
    rig.worker("most", 0, 1, 2)
    rig.worker("rest", 3)
    rig.connect()
    for seed in range(50):
        rig.dispatcher.begin_step(2)
        x_TD, ids_TK, weights_TK = random_step(7, seed=seed)
        for micro_batch in (0, 1):
            one = rig.layer(7, LAYER, micro_batch)
            assert one.leave(x_TD, ids_TK, weights_TK)
    rig.workers[1].plane.drain(timeout_s=1.0)
    one = rig.layer(7)
    for _ in range(2):  # refused, and then nobody's
        rig.dispatcher.begin_step(1)
        one.leave(x_TD, torch.full_like(ids_TK, 3), weights_TK)
    assert one.placed.pending is not None
    for num_tokens in (7, 9):
        x_TD, ids_TK, weights_TK = random_step(num_tokens)
        one, step = rig.layer(num_tokens), (x_TD, ids_TK.clamp(max=2), weights_TK)
        rig.dispatcher.begin_step(1)
        assert one.leave(*step)
        torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
    rig.settle()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("num_away", [1, 2])
def test_a_transport_that_is_opened_anew_voids_what_is_away_and_seats_ask_by_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, num_away: int
) -> None:
    hold = threading.Event()

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            hold.wait(20)
            return x_RD * factor_of(expert)

        return run

    rig.worker("all", 0, 1, 2, 3, load=load)
    rig.connect()
    hold.set()
    other = rig.layer(3, LAYERS[1], micro_batch=1)
    rig.dispatcher.begin_step(1)
    assert other.leave(*random_step(3))
    other.come_back()
    hold.clear()
    reasons = ["blocked"]
    monkeypatch.setattr("gateway.dispatch.why_stuck", lambda *_: reasons.pop() if reasons else None)
    ones = [rig.layer(3, LAYER, micro_batch) for micro_batch in range(num_away)]
    rig.dispatcher.begin_step(num_away)
    for one in ones:
        assert one.leave(*random_step(3))
    for one in ones:
        one.come_back()
    assert reasons == []
    assert len(rig.dispatcher.void_rows()) == 3 * num_away
    # Nobody is asked before the front has connected anew, nor by seats that had nothing away.
    rig.dispatcher.begin_step(1)
    assert not other.leave(*random_step(3))
    other.come_back()
    assert len(rig.dispatcher.void_rows()) == 3
    hold.set()
    rig.connect(epoch=2)
    for seed in range(3):
        got, want = rig.run(3, seed)
        torch.testing.assert_close(got, want)
    assert rig.left == [True, True, True]
    rig.settle()


@pytest.mark.parametrize("fails", [FAILS_AT_LAUNCH, FAILS_LATER])
def test_a_device_that_fails_is_said_and_nothing_is_sent(rig: Rig, fails: int) -> None:
    worker = rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    one = rig.layer(2)
    one.graph.fails = fails
    rig.dispatcher.begin_step(1)
    with pytest.raises(MeshError, match="the GPU failed"):
        one.leave(*random_step(2))
    one.graph.fails = 0
    other = rig.layer(2, LAYER, micro_batch=1)
    other.graph.fails = fails
    assert one.leave(*random_step(2))
    with pytest.raises(MeshError, match="the GPU failed"):
        one.turn(other, *random_step(2))
    got, want = rig.run(2)
    torch.testing.assert_close(got, want)
    assert sum(worker.plane.stats().rows.values()) == 4 + 4
    rig.settle()


def test_rows_count_also_where_experts_are_cut_into_slices_since(rig: Rig) -> None:
    rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    rig.run(4)
    version = rig.dispatcher.arena_version
    rig.dispatcher.set_routing(pb.Routing(epoch=2, expert_shards=2))
    assert rig.dispatcher.arena_version > version
    asks = rig.dispatcher._asks
    assert asks is not None
    assert asks.seat(0, LAYER, 2 * NUM_EXPERTS, 16) is not None
    for _ in range(2):
        assert sum(rig.dispatcher.rows_by_expert.values()) == 8


def test_rows_go_to_every_slice_by_seats_and_where_those_are_of_no_use(rig: Rig) -> None:
    hold = threading.Event()
    hold.set()

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            hold.wait(20)
            return x_RD * factor_of(expert)

        return run

    units = 2 * NUM_EXPERTS
    for name, part in (("first", 0), ("hangs", 1), ("other", 1)):
        worker = rig.worker(name, *range(part, units, 2), load=load if name == "hangs" else None)
        worker.plane.cut(units)
    routing = connect(rig.dispatcher, rig.transport, rig.workers)
    routing.expert_shards = 2
    rig.dispatcher.set_routing(routing)
    one = Layer(rig.dispatcher, LAYER, 0, 5, shards=2)
    sessions = {peer.worker_id: peer.reply_session for peer in routing.peers}

    def drop(name: str) -> None:
        said = pb.DropPeer(worker_id=name, reply_session=sessions[name], reason="hung")
        rig.dispatcher.peers.drop(said)

    def came(x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        # Unit 2e + s multiplies by 100 x layer + 2e + s + 1, and their sum is the expert.
        factors_TK = (2 * (100.0 * LAYER) + 4 * ids_TK + 3) * weights_TK
        torch.testing.assert_close(one.come_back(), factors_TK.sum(dim=1, keepdim=True) * x_TD)

    for seed in range(4):
        rig.dispatcher.begin_step(1)
        assert one.leave(*random_step(5, seed=seed))
        came(*random_step(5, seed=seed))
    hold.clear()
    rig.dispatcher.begin_step(1)
    assert one.leave(*random_step(5))
    drop("hangs")
    came(*random_step(5))
    assert rig.dispatcher.void_rows() == {}
    drop("other")
    rig.dispatcher.begin_step(1)
    assert not one.leave(*random_step(5))
    one.come_back()
    assert len(rig.dispatcher.void_rows()) == 5
    hold.set()
    rig.settle()


class Referred:
    """A worker, all in the test's hands, that reads and answers rows in the gateway's arenas."""

    def __init__(self, rig: Rig, index: int) -> None:
        self.transport = UcxTransport()
        self.endpoint = self.transport.connect(rig.transport.address)
        self.rig = rig
        self.session, self.reply_session, self.index = 5 + index, 7 + index, index
        self.seen: list[tuple[wire.Frame, int, int]] = []

    def look(self) -> None:
        self.transport.progress()
        found = self.transport.probe()
        if found is None:
            return
        into = torch.zeros(max(1, found.nbytes // 8), dtype=torch.int64)
        received = found.receive(self.transport.wrap(into))
        while not received.completed:
            self.transport.progress()
        frame, first = wire.decode(found.tag), int(into[0])
        self.seen.append((frame, found.nbytes, first))
        arenas = self.rig.dispatcher.arenas
        answer = torch.zeros(0)
        if frame.kind == wire.Kind.REFERENCE:
            counts = {frame.expert: frame.rows}
            if frame.expert == wire.SEVERAL:
                header = arenas[0][first - self.rig.header_rows : first].reshape(-1)
                counts = dict(enumerate(header.view(torch.int32)[:NUM_EXPERTS].tolist()))
            assert sum(counts.values()) == frame.rows
            for index, count in counts.items():
                where = slice(first, first := first + count)
                factor = factor_of(ExpertId(frame.layer, index))
                arenas[1][where] = factor * arenas[0][where]
        else:
            x_RD = into.view(torch.float32).view(-1, HIDDEN_SIZE)
            answer = x_RD * factor_of(ExpertId(frame.layer, frame.expert))
        tag = wire.encode(wire.Kind.REPLY, self.reply_session, *frame[2:])
        self.sent = self.endpoint.send(self.transport.wrap(answer), tag)
        self.kept = answer


@pytest.fixture
def referred(rig: Rig) -> Iterator[list[Referred]]:
    workers = [Referred(rig, index) for index in (0, 1)]
    routing = pb.Routing(epoch=1)
    for worker in workers:
        routing.peers.add(
            worker_id=f"w{worker.index}",
            ucx_address=worker.transport.address,
            session=worker.session,
            reply_session=worker.reply_session,
            max_rows=512,
        )
        for index in {0: (0, 2, 3), 1: (1,)}[worker.index]:
            routing.experts.add(
                expert=placement_pb2.ExpertId(layer=LAYER, index=index),
                worker_ids=[f"w{worker.index}"],
            )
    rig.dispatcher.set_routing(routing)
    rig.dispatcher.peers["w0"].by_reference = True
    rig.dispatcher.peers.version += 1
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            for worker in workers:
                worker.look()

    thread = threading.Thread(target=serve)
    thread.start()
    yield workers
    over.set()
    thread.join()
    for worker in workers:
        worker.endpoint.close()
        worker.transport.close()


def test_a_reference_is_eight_bytes_and_its_reply_is_empty(
    rig: Rig, referred: list[Referred]
) -> None:
    step = (random_step(3)[0], torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.ones(3, 2))
    rig.dispatcher.begin_step(1)
    one = rig.layer(3)
    assert one.leave(*step)
    torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
    ((frame, nbytes, first),) = referred[0].seen
    assert (frame.kind, frame.session, *frame[3:]) == (wire.Kind.REFERENCE, 5, LAYER, 0, 3)
    assert (nbytes, first) == (8, int(one.placed.rows_TK[0, 0]))
    ((frame, nbytes, _),) = referred[1].seen
    assert (frame.kind, frame.session, *frame[3:]) == (wire.Kind.DISPATCH, 6, LAYER, 1, 3)
    assert nbytes == 3 * 4 * HIDDEN_SIZE


def test_several_experts_rows_are_referred_to_behind_their_counts(
    rig: Rig, referred: list[Referred]
) -> None:
    one = rig.layer(3)
    for choices in ([[0, 1], [3, 0], [3, 1]], [[2, 3], [3, 2], [0, 2]], [[1, 2], [1, 2], [2, 1]]):
        step = (random_step(3)[0], torch.tensor(choices), torch.ones(3, 2))
        rig.dispatcher.begin_step(1)
        assert one.leave(*step)
        torch.testing.assert_close(one.come_back(), expected(LAYER, *step))
    seen = [(frame.kind, frame.expert, frame.rows) for frame, _, _ in referred[0].seen]
    several = (wire.Kind.REFERENCE, wire.SEVERAL)
    assert seen == [(*several, 4), (*several, 6), (wire.Kind.REFERENCE, 2, 3)]
    assert {nbytes for _, nbytes, _ in referred[0].seen} == {8}


@pytest.mark.usefixtures("impatient")
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_late_or_lost_no_row_is_wrong_and_no_frame_leaks(
    driver: str, data: st.DataObject
) -> None:
    rig = Rig(driver)
    holds = {name: threading.Event() for name in "ab"}

    def load_of(name: str) -> Callable[[ExpertId], Callable[[torch.Tensor], torch.Tensor]]:
        def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
            def run(x_RD: torch.Tensor) -> torch.Tensor:
                holds[name].wait(20)
                return x_RD * factor_of(expert)

            return run

        return load

    for name in "ab":
        rig.worker(name, 0, 1, 2, 3, load=load_of(name))
    rig.worker("c", 0, 1, 2, 3)
    routing = rig.connect()
    sessions = {peer.worker_id: peer.reply_session for peer in routing.peers}
    lost = set()
    for seed in range(data.draw(st.integers(1, 5))):
        held = data.draw(st.sets(st.sampled_from("ab")), label="held")
        for name, hold in holds.items():
            hold.clear() if name in held else hold.set()
        num_micro_batches = data.draw(st.integers(1, 2))
        rig.dispatcher.begin_step(num_micro_batches)
        for number, layer in enumerate(LAYERS):
            steps = [
                random_step(data.draw(st.integers(1, 32)), seed=100 * seed + 10 * number + n)
                for n in range(num_micro_batches)
            ]
            ones = [rig.layer(len(step[0]), layer, n) for n, step in enumerate(steps)]
            for one, step in zip(ones, steps, strict=True):
                one.leave(*step)
            if data.draw(st.integers(0, 7)) == 0:
                name = data.draw(st.sampled_from("ab"), label="drop")
                lost.add(name)
                order = pb.DropPeer(worker_id=name, reply_session=sessions[name], reason="test")
                rig.dispatcher.peers.drop(order)
            for one, step in zip(ones, steps, strict=True):
                torch.testing.assert_close(one.come_back(), expected(layer, *step))
    assert rig.dispatcher.void_rows() == {}
    assert {one.worker_id for one in rig.dispatcher.peers.take_lost()} == lost
    for hold in holds.values():
        hold.set()
    rig.run(4)
    rig.settle()
    rig.end()
