"""Dispatch and combine against workers in the same process, with and without faults."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.dispatch import LONE_ROWS, Graph, Pending
from mesh import wire
from mesh.errors import Unavailable
from mesh.plan import ExpertId
from mesh.transport.loopback import LoopbackHub, LoopbackTransport
from protos import engine_pb2 as pb
from tests.rig import (
    NUM_EXPERTS,
    Worker,
    connect,
    expected,
    factor_of,
    make_dispatcher,
    random_step,
    times,
)

LAYER = 3


class Rig:
    """A dispatcher on a loopback network, and the workers that a test asks for."""

    def __init__(self, max_tokens: int = 64) -> None:
        self.hub = LoopbackHub()
        self.transport = self.hub.transport()
        self.dispatcher = make_dispatcher(self.transport, max_tokens=max_tokens)
        self.workers: list[Worker] = []
        self.transports: dict[str, LoopbackTransport] = {}
        self.num_late = 0

    def worker(self, worker_id: str, *indices: int, **options: object) -> Worker:
        transport = self.transports[worker_id] = self.hub.transport()
        experts = [ExpertId(LAYER, index) for index in indices]
        worker = Worker(worker_id, lambda: transport, experts, **options)  # type: ignore[arg-type]
        self.workers.append(worker)
        return worker

    def connect(self, epoch: int = 1) -> pb.Routing:
        return connect(self.dispatcher, self.transport, self.workers, epoch)

    def hold_replies_of(self, *workers: Worker) -> None:
        """Nothing of what these say arrives before the transport's release."""
        sessions = {
            self.dispatcher.peers[worker.worker_id].reply_session
            for worker in workers
            if worker.worker_id in self.dispatcher.peers
        }
        self.transport.faults.held = lambda tag: wire.decode(tag).session in sessions

    @property
    def num_frames_held(self) -> int:
        """Between steps: frames that are neither free nor forgotten."""
        return self.dispatcher._frames.num_frames - self.dispatcher._frames.num_free

    def end(self) -> None:
        for worker in self.workers:
            worker.plane.stop()
        self.dispatcher.close()

    def run(self, num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """What came back, and what should have."""
        x_TD, ids_TK, weights_TK = random_step(num_tokens, seed=seed)
        self.dispatcher.begin_step(1)
        y_TD = self.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK).combine()
        return y_TD, expected(LAYER, x_TD, ids_TK, weights_TK)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.end()


def test_each_row_comes_back_from_its_own_experts(rig: Rig) -> None:
    for index in range(NUM_EXPERTS):
        rig.worker(f"w{index}", index)
    rig.connect()
    for num_tokens in (1, 2, 17, 64):
        got, want = rig.run(num_tokens, seed=num_tokens)
        torch.testing.assert_close(got, want)
    assert rig.dispatcher.void_rows() == {}


def test_colocated_experts_share_one_message(rig: Rig) -> None:
    first = rig.worker("first", 0, 2)
    rig.worker("second", 1, 3)
    rig.connect()
    got, want = rig.run(20)
    torch.testing.assert_close(got, want)
    assert set(first.plane.stats().rows) == {ExpertId(LAYER, 0), ExpertId(LAYER, 2)}


def test_answers_do_not_depend_on_where_the_experts_are() -> None:
    answers = []
    for split in ([(0,), (1,), (2,), (3,)], [(0, 3), (1, 2)], [(0, 1, 2, 3)]):
        rig = Rig()
        for number, indices in enumerate(split):
            rig.worker(f"w{number}", *indices)
        rig.connect()
        answers.append(rig.run(33)[0])
        for worker in rig.workers:
            worker.plane.stop()
        rig.dispatcher.close()
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_a_token_goes_to_every_slice_of_its_experts(rig: Rig) -> None:
    # Experts in two slices: unit 2e + s multiplies by 2e + s + 1, and their sum is the expert.
    for number, units in enumerate([(0, 3), (1, 2), (4, 5, 6), (7,)]):
        rig.worker(f"w{number}", *units).plane.cut(2 * NUM_EXPERTS)
    routing = connect(rig.dispatcher, rig.transport, rig.workers)
    routing.expert_shards = 2
    rig.dispatcher.set_routing(routing)
    x_TD, ids_TK, weights_TK = random_step(64)
    rig.dispatcher.begin_step(1)
    y_TD = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK).combine()
    factors_TK = (2 * (100.0 * LAYER) + 4 * ids_TK + 3) * weights_TK
    torch.testing.assert_close(y_TD, factors_TK.sum(dim=1, keepdim=True) * x_TD)
    placed = rig.dispatcher.place(LAYER, 0, x_TD, ids_TK, weights_TK)
    rig.dispatcher.begin_step(1)
    rig.dispatcher.leave(placed, cast(Graph, SimpleNamespace(replay=lambda: None)))
    torch.testing.assert_close(placed.combine(), y_TD)
    rig.workers[3].plane.stop()
    rig.transports["w3"].die()
    rig.dispatcher.poll()
    rig.dispatcher.begin_step(1)
    rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK).combine()
    void = rig.dispatcher.void_rows()
    assert {row for _, row in void} == set((ids_TK == 3).any(dim=1).nonzero().view(-1).tolist())
    assert "expert 3 of layer 3 is unavailable: slice 1 of 2: " in str(next(iter(void.values())))


def test_a_batch_larger_than_a_worker_takes_is_split(rig: Rig) -> None:
    for index in range(NUM_EXPERTS):
        rig.worker(f"w{index}", index, max_rows=5)
    rig.connect()
    got, want = rig.run(64)
    torch.testing.assert_close(got, want)
    assert all(worker.plane.stats().refused == {} for worker in rig.workers)


@pytest.mark.parametrize(
    ("max_rows", "messages", "num_frames"),
    [(64, [{0: 3, 2: 4}, {1: 25}, {3: 30}], 1), (40, [{0: 3, 2: 4}, {1: 25}, {3: 8}, {3: 22}], 2)],
)
def test_many_rows_of_an_expert_are_a_message_of_their_own(
    rig: Rig,
    monkeypatch: pytest.MonkeyPatch,
    max_rows: int,
    messages: list[dict[int, int]],
    num_frames: int,
) -> None:
    monkeypatch.setattr("gateway.dispatch.LONE_ROWS", 25)
    worker = rig.worker("all", 0, 1, 2, 3, max_rows=max_rows)
    rig.connect()
    ids_TK = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([3, 25, 4, 30])).view(-1, 1)
    x_TD, _, weights_TK = random_step(len(ids_TK), k=1)
    ids_TK = ids_TK[torch.randperm(len(ids_TK))]
    rig.dispatcher.begin_step(1)
    pending = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK)
    assert isinstance(pending, Pending)
    sent = [{run.expert.index: run.num_rows for run in one.runs} for one in pending.messages]
    assert sent == messages
    assert len(pending.frames) == num_frames
    torch.testing.assert_close(pending.combine(), expected(LAYER, x_TD, ids_TK, weights_TK))
    assert worker.plane.stats().refused == {}
    assert rig.num_frames_held == 0


@pytest.mark.parametrize(
    ("max_rows", "rows"), [(64, [62]), (40, [31, 31]), (30, [21, 21, 20]), (20, [16, 16, 15, 15])]
)
def test_messages_of_several_are_as_long_as_each_other(
    rig: Rig, max_rows: int, rows: list[int]
) -> None:
    rig.worker("all", 0, 1, 2, 3, max_rows=max_rows)
    rig.connect()
    ids_TK = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([3, 25, 4, 30])).view(-1, 1)
    x_TD, _, weights_TK = random_step(len(ids_TK), k=1)
    rig.dispatcher.begin_step(1)
    pending = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK)
    assert isinstance(pending, Pending)
    assert [one.num_rows for one in pending.messages] == rows
    torch.testing.assert_close(pending.combine(), expected(LAYER, x_TD, ids_TK, weights_TK))
    assert rig.num_frames_held == 0


def test_two_micro_batches_are_away_at_once(rig: Rig) -> None:
    rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    rig.dispatcher.begin_step(2)
    steps = [random_step(9, seed=seed) for seed in (1, 2)]
    pending = [rig.dispatcher.dispatch(LAYER, *step) for step in steps]
    for step, away in zip(steps, pending, strict=True):
        torch.testing.assert_close(away.combine(), expected(LAYER, *step))


def test_rows_that_a_failed_step_left_away_do_not_leak(rig: Rig) -> None:
    rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    for seed in range(50):
        rig.dispatcher.begin_step(2)
        rig.dispatcher.dispatch(LAYER, *random_step(60, seed=seed))
    got, want = rig.run(64)
    torch.testing.assert_close(got, want)


def test_a_routing_that_was_on_its_way_does_not_bring_a_lost_session_back(rig: Rig) -> None:
    worker = rig.worker("all", 0, 1, 2, 3)
    stale = connect(rig.dispatcher, rig.transport, rig.workers)
    rig.dispatcher.peers.lose(rig.dispatcher.peers["all"], "no reply")
    worker.plane.disconnect("gateway", stale.peers[0].session)
    rig.dispatcher.set_routing(stale)
    rig.run(2)
    assert len(rig.dispatcher.void_rows()) == 2
    assert worker.plane.stats().refused == {}
    rig.connect(epoch=2)
    got, want = rig.run(2)
    torch.testing.assert_close(got, want)


def test_a_gateway_that_connects_again_gives_its_last_session_up(rig: Rig) -> None:
    worker = rig.worker("all", 0, 1, 2, 3)
    rig.connect(epoch=1)
    rig.connect(epoch=2)
    assert worker.plane.stats().sessions == 1
    got, want = rig.run(20)
    torch.testing.assert_close(got, want)


def test_a_data_plane_computes_with_the_threads_that_it_was_given(rig: Rig) -> None:
    mapped = Path("/proc/self/maps").read_text().split()
    (openmp,) = {path for path in mapped if "libgomp" in path}
    seen = set()

    def look(x_RD: torch.Tensor) -> torch.Tensor:
        seen.add(ctypes.CDLL(openmp).omp_get_max_threads())
        return x_RD

    rig.worker("all", 0, 1, 2, 3, load=lambda expert: look)
    rig.connect()
    rig.run(2)
    assert seen == {1}


def test_rows_of_an_unserved_expert_are_void_and_the_others_are_not(rig: Rig) -> None:
    rig.worker("most", 0, 1, 2)
    rig.connect()
    x_TD, _, weights_TK = random_step(3)
    ids_TK = torch.tensor([[0, 1], [1, 3], [2, 0]])
    rig.dispatcher.begin_step(1)
    got = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK).combine()
    want = expected(LAYER, x_TD, ids_TK, weights_TK)
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    void = rig.dispatcher.void_rows()
    assert list(void) == [(0, 1)]
    assert "expert 3 of layer 3 is unavailable" in str(void[0, 1])


def test_a_dead_worker_voids_its_rows_and_is_reported(rig: Rig) -> None:
    rig.worker("most", 0, 1, 2)
    rig.worker("victim", 3)
    rig.connect()
    rig.transports["victim"].faults.held = lambda tag: True
    x_TD, _, weights_TK = random_step(2)
    ids_TK = torch.tensor([[0, 1], [1, 3]])
    rig.dispatcher.begin_step(1)
    pending = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK)
    rig.transports["victim"].die()
    pending.combine()
    assert list(rig.dispatcher.void_rows()) == [(0, 1)]
    assert [lost.worker_id for lost in rig.dispatcher.peers.take_lost()] == ["victim"]
    got, _ = rig.run(8, seed=5)
    assert got.isfinite().all()


def test_rows_of_a_dead_worker_go_to_a_replica(rig: Rig) -> None:
    rig.worker("first", 0, 1, 2, 3)
    rig.worker("second", 0, 1, 2, 3)
    rig.connect()
    rig.transports["first"].faults.held = lambda tag: True
    x_TD, ids_TK, weights_TK = random_step(16)
    rig.dispatcher.begin_step(1)
    pending = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK)
    rig.transports["first"].die()
    torch.testing.assert_close(pending.combine(), expected(LAYER, x_TD, ids_TK, weights_TK))
    assert rig.dispatcher.void_rows() == {}
    assert 0 < rig.dispatcher.replayed_rows < 32
    assert rig.dispatcher.failovers == 1
    assert rig.dispatcher.pause_s > 0


def test_replicas_share_the_rows(rig: Rig) -> None:
    first, second = (rig.worker(name, 0, 1, 2, 3) for name in ("first", "second"))
    rig.connect()
    for seed in range(8):
        got, want = rig.run(16, seed=seed)
        torch.testing.assert_close(got, want)
    rows = [sum(worker.plane.stats().rows.values()) for worker in (first, second)]
    assert sum(rows) == 8 * 32
    assert min(rows) > 0
    assert [pace.worker_id for pace in rig.dispatcher.peers.paces()] == ["first", "second"]


def test_answers_do_not_depend_on_how_rows_are_shared() -> None:
    answers = []
    for num_replicas in (1, 3):
        rig = Rig(max_tokens=512)
        for number in range(num_replicas):
            rig.worker(f"w{number}", 0, 1, 2, 3)
        rig.connect()
        answers.append(rig.run(512)[0])
        if num_replicas == 3:
            assert all(worker.plane.stats().rows for worker in rig.workers)
        rig.end()
    assert torch.equal(answers[0], answers[1])


# Late.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.balance.MIN_PATIENCE_S", 0.02)
    monkeypatch.setattr("gateway.balance._UNKNOWN_PATIENCE_S", 0.02)


def wrong(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
    """An expert whose rows must never be seen."""
    return times(1e9)


@pytest.mark.usefixtures("impatient")
def test_late_rows_go_to_a_replica_and_the_late_reply_harms_nobody(rig: Rig) -> None:
    late = rig.worker("late", 0, 1, 2, 3, load=wrong)
    rig.worker("prompt", 0, 1, 2, 3)
    rig.connect()
    rig.hold_replies_of(late)
    got, want = rig.run(16)
    torch.testing.assert_close(got, want)
    assert rig.dispatcher.void_rows() == {}
    ((name, reason),) = [(p.worker_id, p.reason) for p in rig.dispatcher.peers.take_late()]
    assert name == "late"
    assert "no reply to" in reason
    assert rig.dispatcher.peers.take_lost() == []
    # While it is late, it is sent nothing more.
    before = late.plane.stats().rows
    for seed in range(4):
        got, want = rig.run(16, seed=seed)
        torch.testing.assert_close(got, want)
    assert late.plane.stats().rows == before
    assert rig.num_frames_held == 1
    # What it says now is dropped, whenever it comes.
    step = random_step(16, seed=9)
    pending = rig.dispatcher.dispatch(LAYER, *step)
    rig.transport.release()
    torch.testing.assert_close(pending.combine(), expected(LAYER, *step))
    rig.dispatcher.begin_step(1)
    assert rig.num_frames_held == 0


@pytest.mark.usefixtures("impatient")
def test_a_gateway_that_was_stopped_does_not_take_that_time_for_its_workers(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = rig.worker("all", 0, 1, 2, 3)
    rig.connect()
    for seed in range(8):
        rig.run(4, seed)
    balancer = rig.dispatcher.peers.balancer
    usual_s = balancer.patience_s("all", 4)

    wait = rig.transport.wait

    def stopped(*args: object, **options: object) -> None:
        monkeypatch.setattr(rig.transport, "wait", wait)
        time.sleep(1.2)
        rig.transport.release()  # it sees now what came meanwhile

    rig.hold_replies_of(worker)
    monkeypatch.setattr(rig.transport, "wait", stopped)
    got, want = rig.run(4)
    torch.testing.assert_close(got, want)
    assert balancer.patience_s("all", 4) <= 2 * usual_s
    assert rig.dispatcher.peers.take_late() == []
    assert worker.worker_id in rig.dispatcher.peers


def test_a_late_reply_may_come_before_that_of_the_replica(rig: Rig) -> None:
    late = rig.worker("late", 0, 1, 2, 3, load=wrong)
    prompt = rig.worker("prompt", 0, 1, 2, 3)
    rig.connect()
    rig.hold_replies_of(late)
    arrived: list[int] = []

    def meanwhile(tag: int) -> bool:
        """Behind the first dispatch comes what was moved: just before, the late reply arrives."""
        arrived.append(tag)
        if len(arrived) > 1:
            rig.transport.release()
        return False

    rig.transports["prompt"].faults.held = meanwhile
    got, want = rig.run(16)
    torch.testing.assert_close(got, want)
    assert sum(prompt.plane.stats().rows.values()) == 32


@pytest.mark.usefixtures("impatient")
def test_rows_wait_for_a_slow_worker_that_nobody_can_replace(rig: Rig) -> None:
    slow = rig.worker("slow", 0, 1, 2, 3)
    rig.connect()
    rig.hold_replies_of(slow)
    asked: list[str] = []

    def on_late() -> None:
        asked.extend(peer.worker_id for peer in rig.dispatcher.peers.take_late())
        rig.num_late += 1
        if rig.num_late == 3:
            rig.transport.release()

    rig.dispatcher.on_late = on_late
    got, want = rig.run(4)
    torch.testing.assert_close(got, want)
    assert asked == ["slow"]
    assert rig.dispatcher.void_rows() == {}
    assert rig.dispatcher.failovers == 0


@pytest.mark.usefixtures("impatient")
def test_each_worker_is_timed_by_its_own_reply(rig: Rig) -> None:
    rig.worker("prompt", 0, 1)
    slow = rig.worker("slow", 2, 3)
    rig.connect()
    rig.hold_replies_of(slow)
    rig.dispatcher.begin_step(1)
    step = (random_step(1)[0], torch.tensor([[0, 2]]), torch.ones(1, 2))
    pending = rig.dispatcher.dispatch(LAYER, *step)

    def on_late() -> None:
        if [message.peer.worker_id for message in pending.messages] == ["slow"]:
            rig.transport.release()

    rig.dispatcher.on_late = on_late
    pending.combine()
    pace_s = {pace.worker_id: pace.dispatch_s for pace in rig.dispatcher.peers.paces()}
    assert pace_s["prompt"] < pace_s["slow"]


@pytest.mark.usefixtures("impatient")
def test_a_worker_can_be_dropped_in_the_middle_of_a_step(rig: Rig) -> None:
    hung = rig.worker("hung", 0, 1)
    rig.worker("fine", 2, 3)
    routing = rig.connect()
    rig.hold_replies_of(hung)
    session = next(peer.reply_session for peer in routing.peers if peer.worker_id == "hung")
    orders = [
        pb.DropPeer(worker_id="hung", reply_session=session + 1),  # of an earlier connection
        pb.DropPeer(worker_id="nobody", reply_session=session),
        pb.DropPeer(worker_id="hung", reply_session=session, reason="it does not answer"),
    ]
    rig.dispatcher.on_late = lambda: rig.dispatcher.peers.drop(orders.pop(0))
    x_TD, _, weights_TK = random_step(2)
    ids_TK = torch.tensor([[0, 2], [2, 3]])
    rig.dispatcher.begin_step(1)
    got = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK).combine()
    torch.testing.assert_close(got[1], expected(LAYER, x_TD, ids_TK, weights_TK)[1])
    ((row, error),) = rig.dispatcher.void_rows().items()
    assert (row, error.coming) == ((0, 0), True)
    assert "worker hung: it does not answer" in str(error)
    assert [lost.worker_id for lost in rig.dispatcher.peers.take_lost()] == ["hung"]
    assert orders == []
    # A plan that was on its way meanwhile names it still: it is not connected again by that.
    rig.dispatcher.set_routing(routing)
    assert "fine" in rig.dispatcher.peers
    assert "hung" not in rig.dispatcher.peers


@pytest.mark.usefixtures("impatient")
def test_a_plan_may_come_while_an_abandoned_dispatch_is_still_out(rig: Rig) -> None:
    late = rig.worker("late", 0, 1, 2, 3, load=wrong)
    rig.worker("prompt", 0, 1, 2, 3)
    routing = rig.connect()
    rig.hold_replies_of(late)
    rig.run(16)
    for epoch, max_rows in ((2, 9), (3, 64)):  # other frames, other arenas
        routing.epoch = epoch
        for peer in routing.peers:
            peer.max_rows = max_rows
        rig.dispatcher.set_routing(routing)
        got, want = rig.run(16, seed=epoch)
        torch.testing.assert_close(got, want)
    assert rig.num_frames_held == 0
    rig.transport.release()
    got, want = rig.run(16, seed=7)
    torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("impatient")
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_late_or_lost_no_row_is_wrong_and_no_frame_leaks(
    data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    lone_rows = data.draw(st.sampled_from([1, 6, LONE_ROWS]), label="lone rows")
    monkeypatch.setattr("gateway.dispatch.LONE_ROWS", lone_rows)
    rig = Rig()
    for name in ("a", "b", "c"):
        rig.worker(name, 0, 1, 2, 3)
    rig.connect()
    for seed in range(data.draw(st.integers(1, 6))):
        held = data.draw(st.sets(st.sampled_from("ab")), label="held")
        rig.hold_replies_of(*(worker for worker in rig.workers if worker.worker_id in held))
        sizes = data.draw(st.lists(st.integers(1, 32), min_size=1, max_size=2), label="sizes")
        rig.dispatcher.begin_step(len(sizes))
        steps = [random_step(size, seed=seed + size) for size in sizes]
        pendings = [rig.dispatcher.dispatch(LAYER, *step) for step in steps]
        for step, pending in zip(steps, pendings, strict=True):
            torch.testing.assert_close(pending.combine(), expected(LAYER, *step))
        if data.draw(st.booleans(), label="release"):
            rig.transport.release()
    assert rig.dispatcher.void_rows() == {}
    rig.transport.release()
    rig.run(4)
    while rig.num_frames_held:
        rig.dispatcher.poll()
    rig.end()


# Answers that cannot be used.


class Rogue:
    """A worker that answers every dispatch at once, as it likes."""

    def __init__(self, rig: Rig, answer: Callable[[wire.Frame, torch.Tensor], None]) -> None:
        self.worker_id = "rogue"
        transport = rig.hub.transport()
        self.address = transport.address
        self.max_rows = 64
        self.experts = [ExpertId(LAYER, index) for index in range(NUM_EXPERTS)]
        self.num_dispatches = 0
        self.plane = self

        def deliver(tag: int, payload: torch.Tensor) -> None:
            self.num_dispatches += 1
            answer(wire.decode(tag), payload)

        transport.deliver = deliver  # type: ignore[method-assign]

    def connect(self, gateway_id: str, address: bytes, reply_session: int) -> int:
        self.reply_session = reply_session
        return 5

    def stop(self) -> None:
        pass


def test_a_gateway_to_which_nothing_comes_any_more_opens_its_transport_anew(rig: Rig) -> None:
    rig.worker("w", 0, 1, 2, 3)
    before = rig.connect()
    rig.transport.faults.stuck_s = 6.0
    rig.run(8)
    assert len(rig.dispatcher.void_rows()) == 8
    (why, *_) = rig.dispatcher.void_rows().values()
    assert why.coming
    assert "shared memory" in str(why)
    # The worker is not lost: who it was connected by is.
    assert rig.dispatcher.peers.take_lost() == []
    assert rig.dispatcher.peers.transport_number == 1
    rig.dispatcher.set_routing(before)  # it was on its way
    assert len(rig.dispatcher.peers) == 0
    rig.connect(epoch=2)
    got, want = rig.run(8)
    torch.testing.assert_close(got, want)
    assert rig.dispatcher.void_rows() == {}
    assert rig.num_frames_held == 0


def test_an_idle_gateway_opens_a_broken_transport_anew_too(rig: Rig) -> None:
    rig.worker("w", 0, 1, 2, 3)
    rig.connect()
    rig.dispatcher.poll()
    assert rig.dispatcher.peers.transport_number == 0
    rig.transport.faults.stuck_s = 6.0
    rig.dispatcher.poll()
    assert rig.dispatcher.peers.transport_number == 1


@pytest.mark.parametrize("with_replica", [False, True])
def test_rows_of_a_worker_that_died_amid_its_answer_are_not_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, with_replica: bool
) -> None:
    monkeypatch.setattr("gateway.dispatch._LET_GO_S", 0.1)
    rig.worker("dying", 0, 1, 2, 3)
    if with_replica:
        rig.worker("other", 0, 1, 2, 3)
    rig.connect()
    session = rig.dispatcher.peers["dying"].reply_session

    def die(tag: int) -> bool:
        if wire.decode(tag).session == session:
            rig.transports["dying"].dead = True
            return True
        return False

    rig.transport.faults.begun = die
    got, want = rig.run(32)
    assert rig.transports["dying"].dead
    if with_replica:
        torch.testing.assert_close(got, want)
    else:
        assert len(rig.dispatcher.void_rows()) == 32
    until_s = time.monotonic() + 5
    while not rig.dispatcher.peers.transport_number and time.monotonic() < until_s:
        rig.dispatcher.poll()
    assert rig.dispatcher.peers.transport_number == 1
    rig.workers = [rig.worker("new", 0, 1, 2, 3)]
    rig.connect(epoch=2)
    got, want = rig.run(32)
    torch.testing.assert_close(got, want)
    assert rig.num_frames_held == 0


def test_a_worker_that_answers_with_garbage_is_taken_off_and_reported(rig: Rig) -> None:
    gateway = rig.transport

    def too_long(frame: wire.Frame, payload: torch.Tensor) -> None:
        tag = frame._replace(kind=wire.Kind.REPLY, session=rogue.reply_session)
        gateway.deliver(wire.encode(*tag), torch.ones(9999, dtype=torch.uint8))

    def too_short(frame: wire.Frame, payload: torch.Tensor) -> None:
        tag = frame._replace(kind=wire.Kind.REPLY, session=rogue.reply_session)
        gateway.deliver(wire.encode(*tag), payload[:-4])

    def of_other_rows(frame: wire.Frame, payload: torch.Tensor) -> None:
        tag = frame._replace(kind=wire.Kind.REPLY, session=rogue.reply_session, rows=frame.rows + 1)
        gateway.deliver(wire.encode(*tag), payload)

    def no_memory(frame: wire.Frame, payload: torch.Tensor) -> None:
        tag = frame._replace(kind=wire.Kind.REFUSE, session=rogue.reply_session)
        code = int(wire.Refusal.OUT_OF_MEMORY)
        gateway.deliver(wire.encode(*tag._replace(rows=code)), payload[:1])

    def unheard_of(frame: wire.Frame, payload: torch.Tensor) -> None:
        tag = frame._replace(kind=wire.Kind.REFUSE, session=rogue.reply_session, rows=999)
        gateway.deliver(wire.encode(*tag), payload[:1])

    for epoch, (answer, words) in enumerate(
        [
            (too_long, "another length"),
            (too_short, "another length"),
            (of_other_rows, "rows of 3.2 where"),
            (no_memory, "out_of_memory"),
            (unheard_of, "refusal 999"),
        ],
        start=1,
    ):
        rogue = Rogue(rig, answer)
        rig.workers = [rogue, rig.worker(f"good {epoch}", 0, 1, 2, 3)]  # type: ignore[list-item]
        rig.connect(epoch)
        x_TD, _, weights_TK = random_step(6, k=1)
        ids_TK = torch.full((6, 1), 2)
        for seed in range(12):
            x_TD = random_step(6, seed=seed)[0]
            rig.dispatcher.begin_step(1)
            got = rig.dispatcher.dispatch(LAYER, x_TD, ids_TK, weights_TK).combine()
            torch.testing.assert_close(got, expected(LAYER, x_TD, ids_TK, weights_TK))
        assert rogue.num_dispatches == 3
        (fault,) = rig.dispatcher.peers.take_expert_faults()
        assert (fault.worker_id, fault.expert.index) == ("rogue", 2)
        assert words in fault.reason
        assert rig.dispatcher.peers.take_lost() == []
        rig.workers[1].plane.stop()
    rig.workers = []


def test_one_good_answer_excuses_the_bad_ones_before_it(rig: Rig) -> None:
    fails = [True, True, False, True, True, False]

    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            if fails.pop(0):
                raise torch.OutOfMemoryError("no memory left")
            return x_RD * factor_of(expert)

        return run

    rig.worker("w", 2, load=load)
    rig.connect()
    step = (random_step(1)[0], torch.full((1, 1), 2), torch.ones(1, 1))
    for num_void in (1, 1, 0, 1, 1, 0):
        rig.dispatcher.begin_step(1)
        rig.dispatcher.dispatch(LAYER, *step).combine()
        assert len(rig.dispatcher.void_rows()) == num_void
    assert rig.dispatcher.peers.take_expert_faults() == []


def test_nobody_waits_for_an_expert_whose_only_worker_cannot_compute_it(rig: Rig) -> None:
    def load(expert: ExpertId) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("no memory left")

        return run

    rig.worker("w", 2, load=load)
    rig.connect()
    step = (random_step(1)[0], torch.full((1, 1), 2), torch.ones(1, 1))
    coming = []
    for _ in range(5):
        rig.dispatcher.begin_step(1)
        rig.dispatcher.dispatch(LAYER, *step).combine()
        (error,) = rig.dispatcher.void_rows().values()
        coming.append(error.coming)
        assert "worker w: refused the rows: out_of_memory" in str(error)
    assert coming == [True, True, False, False, False]
    (fault,) = rig.dispatcher.peers.take_expert_faults()
    assert "out_of_memory" in fault.reason


def test_a_draining_worker_is_left_alone_after_one_refusal(rig: Rig) -> None:
    leaving = rig.worker("leaving", 0, 1, 2, 3)
    rig.worker("staying", 0, 1, 2, 3)
    rig.connect()
    leaving.plane.drain(timeout_s=1.0)
    for seed in range(4):
        got, want = rig.run(16, seed=seed)
        torch.testing.assert_close(got, want)
    assert leaving.plane.stats().refused == {"draining": 1}
    assert rig.dispatcher.void_rows() == {}


def test_a_silent_worker_is_given_up_after_the_reply_timeout(rig: Rig) -> None:
    rig.worker("silent", 0, 1, 2, 3)
    rig.connect()
    rig.transports["silent"].faults.drop = lambda tag: True
    rig.dispatcher._reply_timeout_s = 1.0
    rig.run(4)
    assert len(rig.dispatcher.void_rows()) == 4
    (lost,) = rig.dispatcher.peers.take_lost()
    assert (lost.worker_id, lost.reason) == ("silent", "no reply within 1 s")


def test_a_refusal_moves_the_rows_to_a_replica(rig: Rig) -> None:
    moved = rig.worker("moved", 0, 1, 2, 3)
    rig.worker("stays", 0, 1, 2, 3)
    rig.connect()
    moved.store.unload([ExpertId(LAYER, 2)])
    for seed in range(3):
        got, want = rig.run(16, seed=seed)
        torch.testing.assert_close(got, want)
    assert rig.dispatcher.void_rows() == {}
    # Once for the message of all four, once for the one that was at fault.
    assert moved.plane.stats().refused == {"unknown_expert": 2}
    assert rig.dispatcher.peers.take_lost() == []


def test_an_expert_that_fails_is_refused_and_the_worker_serves_on(rig: Rig) -> None:
    def load(expert: ExpertId):  # type: ignore[no-untyped-def]
        def run(x_RD: torch.Tensor) -> torch.Tensor:
            if expert.index == 1:
                raise torch.OutOfMemoryError("no memory left")
            return x_RD

        return run

    worker = rig.worker("w", 0, 1, 2, 3, load=load)
    rig.connect()
    x_TD, _, weights_TK = random_step(1)
    for ids, void in (([[0, 1]], 1), ([[0, 2]], 0)):
        rig.dispatcher.begin_step(1)
        rig.dispatcher.dispatch(LAYER, x_TD, torch.tensor(ids), weights_TK).combine()
        assert len(rig.dispatcher.void_rows()) == void
    assert worker.plane.stats().refused == {"out_of_memory": 2}


def test_a_call_to_a_data_plane_that_ended_fails_at_once(rig: Rig) -> None:
    worker = rig.worker("w", 0)
    worker.plane.stop()
    with pytest.raises(Unavailable, match="has ended"):
        worker.plane.connect("gateway", rig.transport.address, 1)


def test_a_draining_worker_refuses_what_is_new(rig: Rig) -> None:
    worker = rig.worker("w", 0, 1, 2, 3)
    rig.connect()
    worker.plane.drain(timeout_s=1.0)
    rig.run(2)
    assert worker.plane.stats().refused == {"draining": 1}
    assert len(rig.dispatcher.void_rows()) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"session": 1}, "unknown_session"),
        ({"expert": 2}, "unknown_expert"),
        ({"layer": 9}, "unknown_expert"),
        ({"rows": 3}, "wrong_length"),
        ({"rows": 0}, "malformed"),
        ({"rows": 60000}, "too_many_rows"),
        ({"kind": 0}, "malformed"),
        ({"kind": 15}, "malformed"),
        ({"expert": wire.SEVERAL}, "wrong_length"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_by_name(
    rig: Rig, change: dict[str, int], reason: str
) -> None:
    worker = rig.worker("w", 0, 1)
    stranger = rig.hub.transport()
    session = worker.plane.connect("stranger", stranger.address, 7)
    fields = {"kind": wire.Kind.DISPATCH, "session": session, "slot": 5, "layer": LAYER}
    fields |= {"expert": 1, "rows": 2} | change
    if change.get("session"):
        fields["session"] = (session + 1) % wire.MAX_SESSIONS
    payload = stranger.wrap(torch.ones(2, 8))
    endpoint = stranger.connect(worker.address)
    endpoint.send(payload, wire.encode(**fields))
    while worker.plane.stats().refused != {reason: 1}:
        pass
    good = wire.encode(wire.Kind.DISPATCH, session, 6, LAYER, 1, 2)
    answer = torch.zeros(2, 8)
    reply = endpoint.post_receive(
        stranger.wrap(answer), wire.encode(wire.Kind.REPLY, 7, 6, LAYER, 1, 2)
    )
    endpoint.send(payload, good)
    while not reply.completed:
        pass
    assert torch.equal(answer, torch.full((2, 8), 302.0))


def test_wrong_counts_are_refused(rig: Rig) -> None:
    worker = rig.worker("w", 0, 1)
    stranger = rig.hub.transport()
    session = worker.plane.connect("stranger", stranger.address, 7)
    rows = torch.zeros(3, 8)
    rows[0].view(torch.int32)[:4] = torch.tensor([-1, 3, 0, 0])
    tag = wire.encode(wire.Kind.DISPATCH, session, 0, LAYER, wire.SEVERAL, 2)
    stranger.connect(worker.address).send(stranger.wrap(rows), tag)
    while worker.plane.stats().refused != {"bad_counts": 1}:
        pass


@settings(max_examples=50)
@given(tags=st.lists(st.integers(0, 2**64 - 1), max_size=20), nbytes=st.integers(1, 4096))
def test_random_frames_harm_neither_side(tags: list[int], nbytes: int) -> None:
    rig = Rig()
    worker = rig.worker("w", 0, 1, 2, 3)
    rig.connect()
    stranger = rig.hub.transport()
    noise = stranger.wrap(torch.zeros(nbytes, dtype=torch.uint8))
    for tag in tags:
        stranger.connect(worker.address).send(noise, tag)
        stranger.connect(rig.transport.address).send(noise, tag)
    got, want = rig.run(8)
    torch.testing.assert_close(got, want)
    worker.plane.stop()
    rig.dispatcher.close()


@given(st.integers(0, 2**64 - 1))
def test_any_tag_decodes_to_what_encodes_it(tag: int) -> None:
    assert wire.encode(*wire.decode(tag)) == tag
