"""Dispatch and combine against workers in the same process, with and without faults."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh import wire
from mesh.errors import Unavailable
from mesh.plan import ExpertId
from mesh.transport.loopback import LoopbackHub, LoopbackTransport
from tests.rig import (
    NUM_EXPERTS,
    Worker,
    connect,
    expected,
    make_dispatcher,
    random_step,
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

    def worker(self, worker_id: str, *indices: int, **options: object) -> Worker:
        transport = self.transports[worker_id] = self.hub.transport()
        experts = [ExpertId(LAYER, index) for index in indices]
        worker = Worker(worker_id, lambda: transport, experts, **options)  # type: ignore[arg-type]
        self.workers.append(worker)
        return worker

    def connect(self, epoch: int = 1) -> None:
        connect(self.dispatcher, self.transport, self.workers, epoch)

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
    for worker in made.workers:
        worker.plane.stop()
    made.dispatcher.close()


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


def test_a_batch_larger_than_a_worker_takes_is_split(rig: Rig) -> None:
    for index in range(NUM_EXPERTS):
        rig.worker(f"w{index}", index, max_rows=5)
    rig.connect()
    got, want = rig.run(64)
    torch.testing.assert_close(got, want)
    assert all(worker.plane.stats().refused == {} for worker in rig.workers)


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
    rig.dispatcher._lose(rig.dispatcher._peers["all"], "no reply")
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
    assert [worker_id for worker_id, _ in rig.dispatcher.lost_peers()] == ["victim"]
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
    assert rig.dispatcher.replayed_rows == 32


def test_a_silent_worker_is_given_up_after_the_reply_timeout(rig: Rig) -> None:
    rig.worker("silent", 0, 1, 2, 3)
    rig.connect()
    rig.transports["silent"].faults.drop = lambda tag: True
    rig.run(4)
    assert len(rig.dispatcher.void_rows()) == 4
    ((worker_id, reason),) = rig.dispatcher.lost_peers()
    assert (worker_id, reason) == ("silent", "no reply within 1 s")


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
    assert rig.dispatcher.lost_peers() == []


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
    assert worker.plane.stats().refused == {"failed": 2}


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
    assert worker.plane.stats().refused.keys() == {"draining"}
    assert len(rig.dispatcher.void_rows()) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"session": 1}, "unknown_session"),
        ({"expert": 2}, "unknown_expert"),
        ({"layer": 9}, "unknown_expert"),
        ({"rows": 3}, "wrong_length"),
        ({"rows": 0}, "too_many_rows"),
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


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
