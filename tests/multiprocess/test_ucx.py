"""The data plane over UCX between processes: answers, deaths, hangs, noise, sleep."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gateway.dispatch import Dispatcher
from mesh import wire
from mesh.errors import MessageTruncated, PeerLost
from mesh.plan import ExpertId
from mesh.transport.ucx import UcxTransport
from protos import engine_pb2, placement_pb2
from tests.rig import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    Worker,
    compiled,
    expected,
    factor_of,
    make_dispatcher,
    random_step,
    times,
)

ALL = [ExpertId(0, index) for index in range(NUM_EXPERTS)]


class Process:
    """A :mod:`tests.ucx_worker`."""

    def __init__(self, worker_id: str, experts: list[ExpertId], max_rows: int = 4096) -> None:
        self.worker_id = worker_id
        self.experts = experts
        self.max_rows = max_rows
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.ucx_worker",
                worker_id,
                str(max_rows),
                *map(str, experts),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def wait_started(self) -> None:
        self.address = bytes.fromhex(self._read()["address"])

    def _read(self) -> dict:  # type: ignore[type-arg]
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise AssertionError(f"{self.worker_id} ended with {self.process.wait()}")

    def ask(self, **order: object):  # type: ignore[no-untyped-def]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._read()["answer"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Mesh:
    """A gateway's dispatcher here, its workers elsewhere."""

    def __init__(
        self, *workers: Process, max_tokens: int = 2048, reply_timeout_s: float = 1.0
    ) -> None:
        for worker in workers:
            worker.wait_started()
        self.workers = workers
        self.transport = UcxTransport()
        self.dispatcher: Dispatcher = make_dispatcher(
            self.transport, max_tokens=max_tokens, reply_timeout_s=reply_timeout_s
        )
        routing = engine_pb2.Routing(epoch=1)
        for number, worker in enumerate(workers, start=1):
            session = worker.ask(connect=self.transport.address.hex(), reply_session=number)
            routing.peers.add(
                worker_id=worker.worker_id,
                ucx_address=worker.address,
                session=session,
                reply_session=number,
                max_rows=worker.max_rows,
            )
        for expert in ALL:
            routing.experts.add(
                expert=placement_pb2.ExpertId(layer=expert.layer, index=expert.index),
                worker_ids=[w.worker_id for w in workers if expert in w.experts],
            )
        self.dispatcher.set_routing(routing)

    def close(self) -> None:
        self.dispatcher.close()
        self.transport.close()
        for worker in self.workers:
            worker.process.stdin.close()  # type: ignore[union-attr]
            worker.process.send_signal(signal.SIGCONT)
            worker.process.wait(10)


def start(*experts: list[ExpertId], max_tokens: int = 2048, max_rows: int = 4096) -> Mesh:
    workers = [Process(f"w{n}", held, max_rows) for n, held in enumerate(experts)]
    return Mesh(*workers, max_tokens=max_tokens)


@pytest.fixture
def pair() -> Iterator[Mesh]:
    """Two workers that both hold everything."""
    mesh = start(ALL, ALL)
    yield mesh
    mesh.close()


def test_small_and_large_batches_come_back_right() -> None:
    mesh = start(*([expert] for expert in ALL), max_rows=700)
    for num_tokens in (1, 3, 100, 2048):
        step = random_step(num_tokens, seed=num_tokens)
        mesh.dispatcher.begin_step(1)
        y_TD = mesh.dispatcher.dispatch(0, *step).combine()
        torch.testing.assert_close(y_TD, expected(0, *step))
    mesh.close()


def test_a_killed_worker_is_noticed_in_flight_and_its_rows_go_to_the_replica(pair: Mesh) -> None:
    first, second = pair.workers
    first.process.send_signal(signal.SIGSTOP)
    step = random_step(500)
    pair.dispatcher.begin_step(1)
    pending = pair.dispatcher.dispatch(0, *step)
    first.kill()
    torch.testing.assert_close(pending.combine(), expected(0, *step))
    assert [lost.worker_id for lost in pair.dispatcher.peers.take_lost()] == ["w0"]
    assert 0 < pair.dispatcher.replayed_rows < 1000
    assert second.ask(stats=1)["refused"] == {}


def test_a_stopped_worker_is_given_up_and_what_it_says_later_harms_nothing(pair: Mesh) -> None:
    first, _ = pair.workers
    first.process.send_signal(signal.SIGSTOP)
    for seed in range(3):
        step = random_step(500, seed=seed)
        pair.dispatcher.begin_step(1)
        y_TD = pair.dispatcher.dispatch(0, *step).combine()
        torch.testing.assert_close(y_TD, expected(0, *step))
    (lost,) = pair.dispatcher.peers.take_lost()
    assert lost.worker_id == "w0"
    assert "no reply within 1 s" in lost.reason or "UCX" in lost.reason
    first.process.send_signal(signal.SIGCONT)
    for seed in range(50):
        step = random_step(50, seed=seed)
        pair.dispatcher.begin_step(1)
        y_TD = pair.dispatcher.dispatch(0, *step).combine()
        torch.testing.assert_close(y_TD, expected(0, *step))
        pair.dispatcher.poll()


def test_a_stopped_worker_is_replaced_amid_the_step_and_used_again_when_it_goes_on() -> None:
    mesh = Mesh(Process("w0", ALL), Process("w1", ALL), reply_timeout_s=30.0)
    first, dispatcher = mesh.workers[0], mesh.dispatcher

    def run(num_tokens: int, seed: int) -> None:
        step = random_step(num_tokens, seed=seed)
        dispatcher.begin_step(1)
        torch.testing.assert_close(dispatcher.dispatch(0, *step).combine(), expected(0, *step))

    def slowness() -> float:
        paces = {pace.worker_id: pace.row_s for pace in dispatcher.peers.paces()}
        return paces["w0"] / paces["w1"]

    for seed in range(20):
        run(500, seed)
    for num_tokens in (500, 2048):
        time.sleep(0.1)  # who is stopped amid a message to us is another fault: see test_blocked
        first.process.send_signal(signal.SIGSTOP)
        failovers = dispatcher.failovers
        for seed in range(100):
            run(num_tokens, seed)
            if dispatcher.failovers > failovers:
                break
        assert {late.worker_id for late in dispatcher.peers.take_late()} == {"w0"}
        first.process.send_signal(signal.SIGCONT)
        # It is tried again as seldom as it was slow, and then used as it deserves.
        small = random_step(4, seed=3)
        while dispatcher._abandoned or slowness() > 4:
            dispatcher.begin_step(1)
            dispatcher.dispatch(0, *small).combine()
    assert dispatcher.peers.take_lost() == []
    mesh.close()


def test_a_worker_frees_the_session_of_a_dead_gateway() -> None:
    worker = Process("w", ALL)
    worker.wait_started()
    gateway = Process("not-a-worker", [])
    gateway.wait_started()
    worker.ask(connect=gateway.address.hex(), reply_session=1)
    # UCX connects lazily: a first message opens the way by which a death is noticed.
    transport = UcxTransport()
    session = worker.ask(connect=gateway.address.hex(), reply_session=2)
    endpoint = transport.connect(worker.address)
    rows = transport.wrap(torch.zeros(1, HIDDEN_SIZE))
    request = endpoint.send(rows, wire.encode(wire.Kind.DISPATCH, session, 0, 0, 0, 1))
    while not request.completed:
        transport.progress()
    gateway.kill()
    until = time.monotonic() + 20
    while worker.ask(stats=1)["sessions"] > 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert worker.ask(stats=1)["sessions"] <= 1
    endpoint.close()
    transport.close()
    worker.kill()


def test_noise_of_any_size_is_dropped_and_the_worker_serves_on(pair: Mesh) -> None:
    stranger = pair.transport.connect(pair.workers[0].address)
    noise = [
        pair.transport.wrap(torch.zeros(nbytes, dtype=torch.uint8))
        for nbytes in (1, 100, 10_000, 3_000_000)
    ]
    requests = [
        stranger.send(buffer, tag)
        for buffer in noise
        for tag in (0, 2**64 - 1, wire.encode(wire.Kind.DISPATCH, 1, 2, 3, 4, 5))
    ]
    while not all(request.completed for request in requests):
        pair.transport.progress()
    step = random_step(64)
    pair.dispatcher.begin_step(1)
    torch.testing.assert_close(pair.dispatcher.dispatch(0, *step).combine(), expected(0, *step))
    refused = pair.workers[0].ask(stats=1)["refused"]
    assert refused == {"malformed": 8, "unknown_session": 4}


class Stranger:
    """Who is connected to a worker of two experts, and sends it what it likes."""

    def __init__(self, load: Callable[[ExpertId], Any]) -> None:
        self.experts = {expert: load(expert) for expert in ALL[:2]}
        self.worker = Worker("w", UcxTransport, self.experts, load=self.experts.__getitem__)
        self.buffers: list[torch.Tensor] = []
        self.transport = UcxTransport()
        self.endpoint = self.transport.connect(self.worker.address)
        self.session = self.worker.plane.connect("stranger", self.transport.address, 7)

    @property
    def refused(self) -> Counter[str]:
        return Counter(self.worker.plane.stats().refused)

    @property
    def by_compiled_code(self) -> bool:
        """Whether any rows were computed without a line of Python."""
        answering = self.worker.plane._answering
        assert answering is not None
        return any(rows for _, rows, _ in answering.counts())

    def finish(self, *requests: Any) -> None:
        while not all(request.completed for request in requests):
            self.transport.progress()
        assert [self.transport.failure(request) for request in requests] == [None] * len(requests)

    def send(self, payload: torch.Tensor, tag: int) -> None:
        self.finish(self.endpoint.send(self.transport.wrap(payload), tag))

    def receive(self, buffer: torch.Tensor, tag: int) -> Any:
        self.buffers.append(buffer)  # UCX writes there, and keeps nothing alive
        return self.endpoint.post_receive(self.transport.wrap(buffer), tag)

    def is_served(self) -> None:
        """A good dispatch gets its answer."""
        x_RD, y_RD = random_step(2)[0], torch.zeros(2, HIDDEN_SIZE)
        reply = self.receive(y_RD, wire.encode(wire.Kind.REPLY, 7, 6, 0, 1, 2))
        self.send(x_RD, wire.encode(wire.Kind.DISPATCH, self.session, 6, 0, 1, 2))
        self.finish(reply)
        torch.testing.assert_close(y_RD, self.experts[ALL[1]](x_RD))

    def close(self) -> None:
        self.worker.plane.stop()
        self.endpoint.close()
        self.transport.close()


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "python"])
def stranger(request: pytest.FixtureRequest) -> Iterator[Stranger]:
    """Of a worker whose experts compiled code answers for, or Python."""
    stranger = Stranger(compiled if request.param else lambda expert: times(factor_of(expert)))
    stranger.is_served()
    while request.param and not stranger.by_compiled_code:
        stranger.is_served()  # the first may have come while Python had the turn
    yield stranger
    assert stranger.by_compiled_code is request.param
    stranger.close()


@pytest.mark.parametrize(
    ("change", "num_floats", "reason"),
    [
        ({"session": 1}, 16, "unknown_session"),
        ({"expert": 2}, 16, "unknown_expert"),
        ({"expert": wire.SEVERAL - 1}, 16, "unknown_expert"),
        ({"layer": 9}, 16, "unknown_expert"),
        ({"layer": wire.MAX_LAYERS - 1, "expert": wire.SEVERAL - 1}, 16, "unknown_expert"),
        ({"rows": 3}, 16, "wrong_length"),
        ({"rows": 1}, 16, "wrong_length"),
        ({}, 15, "wrong_length"),
        ({}, 0, "wrong_length"),
        ({}, 100_000, "wrong_length"),
        ({"expert": wire.SEVERAL}, 16, "wrong_length"),
        ({"rows": 0}, 16, "malformed"),
        ({"rows": 65}, 65 * 8, "too_many_rows"),
        ({"rows": wire.MAX_ROWS}, 16, "too_many_rows"),
        ({"kind": 0}, 16, "malformed"),
        ({"kind": wire.Kind.REPLY}, 16, "malformed"),
        ({"kind": wire.Kind.REFUSE}, 16, "malformed"),
        ({"kind": wire.Kind.ARENAS}, 16, "malformed"),
        ({"kind": 15}, 16, "malformed"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_by_name(
    stranger: Stranger, change: dict[str, int], num_floats: int, reason: str
) -> None:
    fields = {"kind": wire.Kind.DISPATCH, "session": stranger.session, "slot": 5, "layer": 0}
    fields |= {"expert": 1, "rows": 2} | change
    if change.get("session"):
        fields["session"] = (stranger.session + 1) % wire.MAX_SESSIONS
    before = stranger.refused
    stranger.send(torch.ones(num_floats), wire.encode(**fields))
    if fields["kind"] == wire.Kind.DISPATCH and "session" not in change:  # it is told why
        told = fields | {"kind": wire.Kind.REFUSE, "session": 7}
        told["rows"] = wire.Refusal[reason.upper()]
        stranger.finish(stranger.receive(torch.zeros(16), wire.encode(**told)))
    stranger.is_served()
    assert stranger.refused - before == {reason: 1}


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((-1, 3, 0, 0), "bad_counts"),
        ((1, 0, 0, 0), "bad_counts"),
        ((2**31 - 1, 2**31 - 1, 4, 0), "bad_counts"),
        ((1, 0, 1, 0), "unknown_expert"),
    ],
)
def test_counts_that_do_not_fit_are_refused_by_name(
    stranger: Stranger, counts: tuple[int, ...], reason: str
) -> None:
    rows = torch.zeros(3, HIDDEN_SIZE)
    rows[0].view(torch.int32)[:4] = torch.tensor(counts)
    before = stranger.refused
    stranger.send(rows, wire.encode(wire.Kind.DISPATCH, stranger.session, 5, 0, wire.SEVERAL, 2))
    tag = wire.encode(wire.Kind.REFUSE, 7, 5, 0, wire.SEVERAL, wire.Refusal[reason.upper()])
    stranger.finish(stranger.receive(torch.zeros(16), tag))
    stranger.is_served()
    assert stranger.refused - before == {reason: 1}


def test_random_frames_are_all_refused(stranger: Stranger) -> None:
    """Of any kind but the two about weights, half of them in a session of ours."""
    chance, sent, before = random.Random(5), 0, stranger.refused
    while sent < 300:
        tag = chance.getrandbits(64)
        if chance.random() < 0.5:
            tag = wire.encode(*wire.decode(tag)._replace(session=stranger.session))
        if chance.random() < 0.5:
            tag = wire.encode(*wire.decode(tag)._replace(kind=wire.Kind.DISPATCH))
        if tag >> 60 not in (wire.Kind.FETCH, wire.Kind.WEIGHTS):
            stranger.send(torch.zeros(chance.randrange(1, 4096), dtype=torch.uint8), tag)
            sent += 1
    stranger.is_served()
    refused = stranger.refused - before
    assert refused.total() == sent
    assert refused.keys() >= {"malformed", "unknown_session", "too_many_rows"}


def test_a_receive_that_nobody_answers_can_be_taken_back(pair: Mesh) -> None:
    endpoint = pair.transport.connect(pair.workers[0].address)
    buffer = pair.transport.wrap(torch.zeros(4))
    request = endpoint.post_receive(buffer, 12345)
    assert not request.completed
    pair.transport.cancel(request)
    while not request.completed:
        pair.transport.progress()


def test_a_longer_message_than_its_buffer_is_an_error(pair: Mesh) -> None:
    endpoint = pair.transport.connect(pair.transport.address)
    small, large = (pair.transport.wrap(torch.zeros(n)) for n in (4, 100_000))
    request = endpoint.post_receive(small, 1)
    sent = endpoint.send(large, 1)
    while not (request.completed and sent.completed):
        pair.transport.progress()
    assert isinstance(pair.transport.failure(request), MessageTruncated)


def test_an_address_that_leads_nowhere_is_an_error_and_not_a_crash(pair: Mesh) -> None:
    with pytest.raises(PeerLost, match="UCX cannot reach"):
        pair.transport.connect(b"no address at all")


def test_idle_workers_sleep(pair: Mesh) -> None:
    before = [worker.ask(cpu=1) for worker in pair.workers]
    time.sleep(3)
    used = [worker.ask(cpu=1) - b for worker, b in zip(pair.workers, before, strict=True)]
    # A tenth of a core each would be polling; asleep it is a tenth of a percent.
    assert max(used) < 0.3


def test_sleeping_workers_wake_for_a_single_row(pair: Mesh) -> None:
    for round_ in range(20):
        step = random_step(1, seed=round_)
        pair.dispatcher.begin_step(1)
        y_TD = pair.dispatcher.dispatch(0, *step).combine()
        torch.testing.assert_close(y_TD, expected(0, *step))
        time.sleep(0.01)
