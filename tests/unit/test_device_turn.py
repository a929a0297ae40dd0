"""The compiled turn of a GPU's worker, on a stand-in for the driver that computes on the host.

Rows have four floats. The graphs of expert (0, e) multiply their buffer by e + 2, and those of
several experts each one's rows by that. The counts of five experts take two rows.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from weakref import ref

import pytest
import torch

from expert_worker.compute import CpuCompute, Done, Part
from expert_worker.data_plane import DataPlane, DataPlaneStats
from expert_worker.expert_store import Expert, ExpertStore
from expert_worker.gpu_compute import GpuCompute
from mesh import native, wire
from mesh.errors import Unavailable
from mesh.plan import ExpertId
from mesh.replay import (
    DELIVERY,
    MAX_TOGETHER,
    WHOLE,
    ReplayDevice,
    Replays,
    slot_rows,
    slots_of,
    step_of,
)
from mesh.transport.base import Request
from mesh.transport.ucx import UcxTransport
from tests.stand_in import FAILS_AT_LAUNCH, FAILS_LATER, ROW_COPIES, Graph, Knobs, Sharing, compiled

WIDTH = 4
NUM_EXPERTS, HEADER_ROWS = 5, 2
SESSION, REPLY_SESSION = 7, 9
UNDER_WAY = native.UNDER_WAY


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("driver"))


class Worker:
    """A gateway's transport and a worker's, which answers for experts 0 and 1 of layer 0.

    ``moves``: its graphs have launches of their own that bring and take away.
    """

    def __init__(self, driver: str, moves: bool) -> None:
        self.moves = moves
        self.knobs = ctypes.CDLL(driver)
        self.allow(0)
        for name in ("launched", "ran", "mapped"):
            ctypes.c_int32.in_dll(self.knobs, name).value = 0
        self.gateway, self.transport = UcxTransport(), UcxTransport()
        self.device = ReplayDevice(0, driver)
        self.answering = self.transport.answering(
            row_bytes=4 * WIDTH, max_rows=1024, device=self.device
        )
        assert self.answering is not None
        self.to_worker = self.gateway.connect(self.transport.address)
        self.to_gateway = self.transport.connect(self.gateway.address)
        self.answering.open(SESSION, self.to_gateway, REPLY_SESSION)
        self.graphs: list[Graph] = []
        self.replays = {e: Replays() for e in (0, 1)}
        self.replays[wire.SEVERAL] = Replays(here=(0, 1))
        self.answering.cut(NUM_EXPERTS, HEADER_ROWS)
        self.answering.serve({ExpertId(0, e): r for e, r in self.replays.items()})
        self.awake = os.eventfd(1)

    def capture(self, expert: int, num_rows: int, fails: int = 0) -> None:
        step = WHOLE if expert == wire.SEVERAL else step_of(num_rows)
        for slot in slots_of(num_rows):
            if slot not in self.device.buffers:
                self.device.lend(slot, torch.zeros(slot_rows(slot), WIDTH))
            rows_RD = self.device.buffers[slot][: slot_rows(slot, step)]
            graph = Graph(rows_RD.data_ptr(), rows_RD.numel(), expert + 2, fails)
            if expert == wire.SEVERAL:
                graph = together(self.device, slot, fails)
            self.add(self.replays[expert], slot, graph, expert == wire.SEVERAL, step)

    def add(self, to: Replays, slot: int, graph: Graph, delivers: bool, step: int = WHOLE) -> None:
        copies, graph.nodes = native.Captured(), [ROW_COPIES(), ROW_COPIES()]
        if self.moves:
            graph.brings = copies.brings = ctypes.addressof(graph.nodes[0])
        if self.moves and not delivers:
            graph.takes_away = copies.takes_away = ctypes.addressof(graph.nodes[1])
        self.graphs.append(graph)
        to.add(slot, ctypes.addressof(graph), step=step, copies=copies)

    def copies(self, count: int) -> int:
        """Of so many that move something, the launches that are no graph's."""
        return 0 if self.moves else count

    def capture_parts(self, parts: int, num_rows: int) -> None:
        """For so many messages of several experts, in slots of so many rows."""
        for slot in slots_of(num_rows):
            if slot not in self.device.buffers:
                self.device.lend(slot, torch.zeros(slot_rows(slot), WIDTH))
            of_parts = self.replays[wire.SEVERAL].of_parts(parts)
            self.add(of_parts, slot, together(self.device, slot, parts=parts), delivers=True)

    def allow(self, graphs: int) -> None:
        """Let so many of all that were launched run."""
        ctypes.c_int32.in_dll(self.knobs, "allowed").value = graphs

    @property
    def launched(self) -> int:
        return ctypes.c_int32.in_dll(self.knobs, "launched").value

    def dispatch(self, slot: int, expert: int, x_RD: torch.Tensor) -> Dispatch:
        return Dispatch(self, slot, expert, x_RD)

    @property
    def mapped(self) -> int:
        return ctypes.c_int32.in_dll(self.knobs, "mapped").value

    def refer(self, slot: int, expert: int, first: int, count: int) -> Dispatch:
        """A dispatch of rows that stay in the arena."""
        return Dispatch(self, slot, expert, torch.tensor([first]), count)

    @property
    def counted(self) -> dict[int, tuple[int, float]]:
        """Rows and milliseconds of each expert of the layer."""
        return {e.index: (n, 1e3 * s) for e, n, s in self.answering.counts()}

    def refusals(self) -> list[tuple[wire.Refusal, int, int, int, int]]:
        """The next that come: why, and slot, layer, expert and rows of what is refused."""
        self.turn_until(lambda: bool(self.answering._record.failed))
        return [(reason, *wire.decode(tag)[2:]) for tag, reason in self.answering.failed()]

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.gateway.progress()
            self.answering.run(spin_s=0, wake_fd=self.awake)
            self.transport.progress()

    def turn_until(self, true: Callable[[], bool]) -> None:
        for _ in range(5000):
            if true():
                return
            self.turn()
        raise AssertionError("it never came to that")

    def close(self) -> None:
        os.close(self.awake)
        self.to_worker.close()
        self.to_gateway.close()
        self.gateway.close()
        self.transport.close()


class Dispatch:
    """Rows on their way, and their reply; ``count`` of them where they are referred to."""

    def __init__(
        self, worker: Worker, slot: int, expert: int, x_RD: torch.Tensor, count: int = 0
    ) -> None:
        ahead = HEADER_ROWS if expert == wire.SEVERAL else 0
        self.y_RD = x_RD.new_zeros(0) if count else torch.zeros_like(x_RD[ahead:])
        key = (slot, 0, expert, count or len(self.y_RD))
        tag = wire.encode(wire.Kind.REPLY, REPLY_SESSION, *key)
        self.reply = worker.to_worker.post_receive(worker.gateway.wrap(self.y_RD), tag)
        self.x_RD = x_RD
        kind = wire.Kind.REFERENCE if count else wire.Kind.DISPATCH
        tag = wire.encode(kind, SESSION, *key)
        self.sent = worker.to_worker.send(worker.gateway.wrap(self.x_RD), tag)

    @property
    def answered(self) -> bool:
        return self.reply.completed


@pytest.fixture(params=[False, True], ids="moves={}".format)
def worker(driver: str, request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = Worker(driver, request.param)
    yield worker
    worker.close()


def rows(count: int, first: float = 1.0) -> torch.Tensor:
    return torch.arange(count * WIDTH, dtype=torch.float32).reshape(count, WIDTH) + first


def together(
    device: ReplayDevice,
    slot: int,
    fails: int = 0,
    times: Sequence[float] = (),
    parts: int = 1,
) -> Graph:
    """A graph of several experts, for so many messages in a slot."""
    buffer_RD = device.buffers[slot]
    factors_E = torch.tensor(times or [e + 2.0 for e in range(NUM_EXPERTS)])
    stride = len(buffer_RD) // parts
    shares = Sharing(
        buffer_RD.data_ptr(),
        device.counts[slot].data_ptr(),
        factors_E.data_ptr(),
        NUM_EXPERTS,
        WIDTH,
        parts,
        stride * WIDTH,
        device.deliveries[slot].data_ptr(),
    )
    rows_RD = buffer_RD[HEADER_ROWS:stride]
    graph = Graph(rows_RD.data_ptr(), rows_RD.numel(), 0, fails, shares=ctypes.pointer(shares))
    graph.kept = factors_E
    return graph


def headed(counts: Sequence[int], x_RD: torch.Tensor) -> torch.Tensor:
    """Rows with their counts ahead."""
    header = torch.zeros(HEADER_ROWS * WIDTH, dtype=torch.int32)
    header[: len(counts)] = torch.tensor(counts, dtype=torch.int32)
    return torch.cat([header.view(torch.float32).view(HEADER_ROWS, WIDTH), x_RD])


def by_expert(counts: Sequence[int], x_RD: torch.Tensor) -> torch.Tensor:
    """What comes back of rows of several experts."""
    factors = torch.tensor([float(e + 2) for e, n in enumerate(counts) for _ in range(n)])
    return factors[:, None] * x_RD


def test_slots_have_the_next_power_of_two_of_rows() -> None:
    assert [slot_rows(slots_of(n).start) for n in (1, 2, 3, 5, 1024)] == [1, 2, 4, 8, 1024]
    assert not slots_of(8193)
    text = (Path(native.__file__).parent / "native.h").read_text()
    assert f"RING = {native.RING}, SIZES = {native.SIZES}," in text
    assert f"STEPS = {native.STEPS}, STEPPED = {native.STEPPED}," in text
    assert f"UNDER_WAY = {native.UNDER_WAY}," in text


@pytest.mark.parametrize(
    ("count", "computed"),
    [(3, 4), (129, 256), (256, 256), (257, 272), (272, 272), (273, 288), (512, 512), (513, 544)],
)
def test_of_large_buffers_no_more_is_computed_than_a_step(
    worker: Worker, count: int, computed: int
) -> None:
    assert slot_rows(slots_of(count).start, step_of(count)) == computed
    worker.capture(0, count)
    if count > 256:
        worker.capture(0, 2 * computed)  # of another size
        worker.capture(0, 1 << (count - 1).bit_length())  # the whole of the buffer
    buffers = [worker.device.buffers[slot] for slot in slots_of(count)]
    for buffer_RD in buffers:
        buffer_RD.fill_(1)
    worker.allow(9)
    one = worker.dispatch(1, 0, rows(count))
    worker.turn_until(lambda: one.answered)
    assert torch.equal(one.y_RD, 2 * rows(count))
    behind = [buffer_RD[count:].sum() for buffer_RD in buffers]
    assert max(behind) == (computed - count) * 2 * WIDTH + (len(buffers[0]) - computed) * WIDTH


class Captured:
    def raw_cuda_graph_exec(self) -> int:
        return 1


class Doubles:
    def __init__(self) -> None:
        self.weights = {"down": torch.zeros(WIDTH, 9)}

    def __call__(self, x_RD: torch.Tensor) -> torch.Tensor:
        return 2 * x_RD

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.weights


def preparing(driver: str, monkeypatch: pytest.MonkeyPatch) -> GpuCompute:
    monkeypatch.setattr("expert_worker.gpu_compute.capture", lambda compute, pool: Captured())
    gpu = GpuCompute(torch.device("cpu"))
    gpu._stream, gpu._pool = SimpleNamespace(synchronize=lambda: None), None
    gpu._nobodys = torch.zeros(MAX_TOGETHER * NUM_EXPERTS, dtype=torch.int32)
    gpu._nowhere = torch.zeros(MAX_TOGETHER, DELIVERY, dtype=torch.int64)
    gpu.replays = ReplayDevice(0, driver)
    return gpu


def test_small_batches_and_what_is_merged_of_them_find_graphs_before_any_was_seen(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One size of one expert at a time. Who goes meanwhile is not captured."""
    gpu = preparing(driver, monkeypatch)
    experts = {ExpertId(layer, 0): Doubles() for layer in range(3)}
    served = gpu.serve(experts)
    assert gpu.prepare(NUM_EXPERTS, HEADER_ROWS)
    assert [slots_of(1).start in served[ExpertId(layer, 0)] for layer in range(3)] == [1, 0, 0]
    gone = ref(experts[ExpertId(1, 0)])
    experts = {expert: mlp for expert, mlp in experts.items() if expert.layer != 1}
    served = gpu.serve(experts)
    while gpu.prepare(NUM_EXPERTS, HEADER_ROWS):
        pass
    for expert in experts:
        for count in range(1, 257):
            slots = slots_of(count)[: native.UNDER_WAY]
            assert all(slot in served[expert] for slot in slots), count
        assert slots_of(257).start not in served[expert]
    assert gone() is None
    assert not gpu.prepare(NUM_EXPERTS, HEADER_ROWS)


def test_graphs_are_captured_with_what_brings_their_rows_and_takes_them_away(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(compute: Callable[[], object], pool: object) -> Captured:
        knobs["capturing"] = 1
        compute()
        knobs["capturing"] = 0
        return Captured()

    class Stack:
        def deliver(self, *several: object) -> None: ...

    knobs = Knobs(driver)
    gpu = preparing(driver, monkeypatch)
    monkeypatch.setattr("expert_worker.gpu_compute.capture", capture)
    monkeypatch.setattr("expert_worker.gpu_compute.StackedMlps.of", lambda mlps: Stack())
    experts = {ExpertId(0, 0): Doubles(), ExpertId(1, 0): Doubles(), ExpertId(1, 1): Doubles()}
    served = gpu.serve(experts)
    while gpu.prepare(NUM_EXPERTS, HEADER_ROWS):
        pass

    def moves_of(replays: Replays, rows: int) -> tuple[bool, bool]:
        address = replays._record.graphs[slots_of(rows).start * native.STEPS + WHOLE]
        one = native.Captured.from_address(address)
        assert one.brings != one.takes_away
        return bool(one.brings), bool(one.takes_away)

    one, several = served[ExpertId(0, 0)], served[ExpertId(1, wire.SEVERAL)]
    assert all(moves_of(one, rows) == (True, True) for rows in (1, 4, 16, 256))
    for parts in (1, 2, 4, 8):
        assert moves_of(several.of_parts(parts), 8 * parts) == (True, False)


def test_what_cannot_be_captured_is_tried_once(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = preparing(driver, monkeypatch)
    monkeypatch.setattr("expert_worker.gpu_compute.capture", lambda compute, pool: object())
    gpu.serve({ExpertId(layer, 0): Doubles() for layer in range(3)})
    assert not gpu.prepare(NUM_EXPERTS, HEADER_ROWS)


def test_of_many_experts_none_is_captured_before_it_is_asked_for(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = preparing(driver, monkeypatch)
    gpu.serve({ExpertId(layer, 0): Doubles() for layer in range(257)})
    assert not gpu.prepare(NUM_EXPERTS, HEADER_ROWS)


def test_of_several_experts_those_that_are_merged_find_graphs_before_any_was_seen(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = []

    class Stack:
        def deliver(
            self, rows_RD: torch.Tensor, ahead: int, on_host_PE: torch.Tensor, to_P4: torch.Tensor
        ) -> None:
            answered.append((len(rows_RD), ahead, *on_host_PE.shape))

    gpu = preparing(driver, monkeypatch)
    stacks = lambda mlps: Stack()  # noqa: E731
    monkeypatch.setattr("expert_worker.gpu_compute.StackedMlps.of", stacks)
    several = gpu.serve({ExpertId(0, index): Doubles() for index in range(257)})
    several = several[ExpertId(0, wire.SEVERAL)]
    while gpu.prepare(NUM_EXPERTS, HEADER_ROWS):
        pass
    assert slots_of(HEADER_ROWS).start not in several
    for count in range(HEADER_ROWS + 1, 513):
        for parts in (1, 2, 4, 8):
            slots = slots_of(parts * slot_rows(slots_of(count).start))[: native.UNDER_WAY]
            if slot_rows(slots.start) <= 2048:
                assert all(slot in several.of_parts(parts) for slot in slots), (count, parts)
    assert (8, HEADER_ROWS, 2, NUM_EXPERTS) in answered
    assert {ahead for _, ahead, *_ in answered} == {HEADER_ROWS}


def test_a_stack_that_finds_no_memory_is_tried_once(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(mlps: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    gpu = preparing(driver, monkeypatch)
    monkeypatch.setattr("expert_worker.gpu_compute.StackedMlps.of", of)
    gpu.serve({ExpertId(0, index): Doubles() for index in range(3)})
    assert not gpu.prepare(NUM_EXPERTS, HEADER_ROWS)


def test_a_machine_without_a_driver_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="is missing"):
        ReplayDevice(0, str(tmp_path / "libcuda.so.1"))


def test_it_answers_what_was_captured_and_counts_it(worker: Worker) -> None:
    worker.capture(0, 3)
    worker.allow(9)
    one = worker.dispatch(1, 0, rows(3))
    worker.turn_until(lambda: one.answered)
    assert worker.gateway.failure(one.reply) is None
    assert torch.equal(one.y_RD, 2 * rows(3))
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    assert list(worker.answering.counts()) == [(ExpertId(0, 0), 3, 0.0005)]
    assert worker.answering.last_progress_s > 0


def test_it_takes_the_next_while_this_one_computes_and_replies_in_order(worker: Worker) -> None:
    worker.capture(0, 2)
    worker.capture(1, 2)
    sent = [worker.dispatch(n, n % 2, rows(2, n)) for n in range(3)]
    worker.turn_until(lambda: worker.answering.computing == 3)
    assert worker.launched == UNDER_WAY
    for done in range(1, 4):
        worker.allow(done)
        worker.turn_until(lambda: sent[done - 1].answered)  # noqa: B023
        worker.turn(20)
        assert [one.answered for one in sent] == [n < done for n in range(3)]
    for n, one in enumerate(sent):
        assert torch.equal(one.y_RD, (2 + n % 2) * rows(2, n))


def test_what_finds_no_free_buffer_waits_for_one(worker: Worker) -> None:
    worker.capture(0, 1)
    sent = [worker.dispatch(n, 0, rows(1, n)) for n in range(3 * native.RING)]
    worker.turn_until(lambda: worker.answering.computing == native.RING)
    worker.turn(20)
    assert worker.answering.in_hand == native.RING
    worker.allow(len(sent))
    worker.turn_until(lambda: all(one.answered for one in sent))
    assert [one.y_RD[0, 0].item() for one in sent] == [2.0 * n for n in range(len(sent))]
    assert worker.launched == len(sent)


def test_what_waits_for_one_expert_is_computed_together(worker: Worker) -> None:
    for expert, count in ((0, 1), (0, 4), (0, 6), (1, 1)):
        worker.capture(expert, count)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    # Both are under way while the others come: referred rows, two in a slot of their own, and one
    # of another expert ahead of some of them.
    first = [worker.dispatch(n, 0, rows(1, n)) for n in range(UNDER_WAY)]
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY)
    referred = worker.refer(10, 0, first=2, count=1)
    own = worker.dispatch(11, 0, rows(4, 50))
    other = worker.dispatch(12, 1, rows(1, 60))
    last = worker.refer(13, 0, first=7, count=1)
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY + 4)
    worker.allow(1000)
    every = [*first, referred, own, other, last]
    worker.turn_until(lambda: all(one.answered for one in every))
    assert all(worker.gateway.failure(one.reply) is None for one in every)
    for row in (2, 7):
        assert torch.equal(arenas.reply_RD[row], 2 * arenas.send_RD[row])
    assert arenas.reply_RD.isnan().sum() == (ARENA_ROWS - 2) * WIDTH
    assert torch.equal(own.y_RD, 2 * rows(4, 50))
    assert torch.equal(other.y_RD, 3 * rows(1, 60))
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    assert worker.counted == {0: (8, 1.5 + 0.5 * worker.copies(2)), 1: (1, 0.5)}
    graphs = 2 + 1 + 1
    # Three are brought there and back; who is alone in a slot of its own is not.
    assert worker.launched == graphs + worker.copies(2)


def test_more_than_any_graph_holds_is_not_computed_together(worker: Worker) -> None:
    worker.capture(0, 1)
    worker.capture(0, 2)
    sent = [worker.dispatch(n, 0, rows(1, n)) for n in range(native.RING)]
    worker.turn_until(lambda: worker.answering.computing == native.RING)
    sent += [worker.dispatch(10 + n, 0, rows(2, n)) for n in range(2)]
    worker.allow(1000)
    worker.turn_until(lambda: all(one.answered for one in sent))
    assert [one.y_RD[0, 0].item() for one in sent] == [0, 2, 4, 6, 0, 2]


def test_where_others_may_send_more_it_is_waited_for_until_the_device_is_about_to_be_free(
    worker: Worker,
) -> None:
    """The device takes ten seconds."""
    worker.capture(0, 1)
    worker.capture(0, 2)
    worker.answering.open(SESSION + 1, worker.to_gateway, REPLY_SESSION + 1)
    slowly = ctypes.c_float.in_dll(worker.knobs, "milliseconds")
    slowly.value = 1e4
    worker.allow(1)
    known = worker.dispatch(0, 0, rows(1))
    worker.turn_until(lambda: known.answered and not worker.answering.in_hand)
    slowly.value = 0.5
    sent = [worker.dispatch(2, 0, rows(1, 2))]
    worker.turn_until(lambda: worker.answering.computing == 1)
    sent += [worker.dispatch(3 + n, 0, rows(1, 3 + n)) for n in range(2)]
    worker.turn_until(lambda: worker.answering.computing == 3)
    worker.turn(20)
    assert worker.launched == 2
    worker.answering.close(SESSION + 1)
    worker.turn_until(lambda: worker.launched > 2)
    worker.allow(1000)
    worker.turn_until(lambda: all(one.answered for one in sent))
    # Both were computed as one, brought there and back.
    assert worker.launched == 2 + 1 + worker.copies(2)
    assert [one.y_RD[0, 0].item() for one in sent] == [4, 6, 8]


def test_one_of_sixteen_alike_is_timed_and_the_others_count_as_long(worker: Worker) -> None:
    worker.capture(0, 1)
    worker.allow(99)
    took = ctypes.c_float.in_dll(worker.knobs, "milliseconds")
    for n in range(17):
        one = worker.dispatch(n, 0, rows(1))
        worker.turn_until(lambda: one.answered and not worker.answering.in_hand)  # noqa: B023
        took.value = 2.0
    took.value = 0.5
    assert worker.counted == {0: (17, 16 * 0.5 + 2.0)}


def test_rows_that_need_a_slot_do_not_wait_for_ever_for_those_that_wait_behind_them_in_theirs(
    worker: Worker,
) -> None:
    """What is referred to waits for a slot; before it can have one, all are taken by what comes in,
    which waits for its turn behind it."""
    for expert in (0, 1):
        worker.capture(expert, 3)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    first = [worker.dispatch(n, 0, rows(3)) for n in range(UNDER_WAY)]
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY)
    referred = worker.refer(10, 1, first=4, count=3)
    behind = [worker.dispatch(20 + n, 0, rows(3)) for n in range(native.RING)]
    worker.turn_until(lambda: worker.answering.in_hand == native.RING + 1)
    worker.allow(99)
    every = [*first, referred, *behind]
    worker.turn_until(lambda: all(one.answered for one in every))
    assert all(worker.gateway.failure(one.reply) is None for one in every)
    assert torch.equal(arenas.reply_RD[4:7], 3 * arenas.send_RD[4:7])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("several", [False, True])
def test_whatever_comes_and_however_is_answered(worker: Worker, several: bool, seed: int) -> None:
    """Messages of all lengths, sent or referred to, while the device is now quick and now slow."""
    random = Random(seed)
    expert = wire.SEVERAL if several else 0
    for num_rows in (2, 4, 8, 16, 32):
        worker.capture(expert, num_rows)
        if several:
            worker.capture_parts(2, num_rows)
    arenas = Arenas(worker.device, 4096)
    assert worker.answering.borrow(SESSION, arenas.said)
    allowed, place, waiting = 0, 0, []

    def unanswered() -> list[tuple[Dispatch, torch.Tensor, torch.Tensor]]:
        for one, got_RD, want_RD in waiting:
            assert not one.answered or torch.equal(got_RD, want_RD)
        return [each for each in waiting if not each[0].answered]

    for _ in range(400):
        while len(waiting) < 12:
            count = random.choice((2, 3, 12, 14, 25, 29))
            of_first = random.randint(0, count)
            counts = (of_first, count - of_first)
            slot, place = place % 64, place + 1
            first = 40 * slot + HEADER_ROWS
            x_RD = rows(count, place)
            want_RD = by_expert(counts, x_RD) if several else 2 * x_RD
            sent_RD = headed(counts, x_RD) if several else x_RD
            if random.random() < 0.4:
                arenas.send_RD[first + count - len(sent_RD) : first + count] = sent_RD
                one = worker.refer(slot, expert, first, count)
                got_RD = arenas.reply_RD[first : first + count]
            else:
                one = worker.dispatch(slot, expert, sent_RD)
                got_RD = one.y_RD
            waiting.append((one, got_RD, want_RD))
        allowed += random.choice((0, 0, 1, 2, 9))
        worker.allow(allowed)
        worker.turn()
        waiting = unanswered()
    worker.allow(1 << 20)
    worker.turn_until(lambda: not unanswered())
    assert place > 100


def test_trails_say_when_a_dispatch_went_through_its_stages(worker: Worker) -> None:
    worker.capture(0, 300)
    worker.allow(99)
    arenas = Arenas(worker.device, num_rows=400)
    assert worker.answering.borrow(SESSION, arenas.said)
    untold = worker.refer(1, 0, first=0, count=300)
    worker.turn_until(lambda: untold.answered and not worker.answering.in_hand)
    worker.answering.trace()
    began_s = time.monotonic()
    one = worker.refer(2, 0, first=50, count=300)
    worker.turn_until(lambda: one.answered and not worker.answering.in_hand)
    assert torch.equal(arenas.reply_RD[50:350], 2 * arenas.send_RD[50:350])
    (trail,) = worker.answering.trails()
    assert not list(worker.answering.trails())
    assert wire.decode(trail.tag)[2:] == (2, 0, 0, 300)
    assert began_s - 1e-6 <= trail.found_s <= trail.received_s <= trail.sent_s[1]
    # Half a millisecond each, as the stand-in has it.
    for start_s, end_s in (trail.fetched_s, trail.computed_s):
        assert end_s - start_s == pytest.approx(0.0005)
    assert trail.fetched_s[1] <= trail.computed_s[0]
    # So many rows come and go beside what is computed, not with the graph.
    assert not any(any(copies) for graph in worker.graphs for copies in graph.nodes)
    assert trail.computed_s[1] == trail.sent_s[0]


def test_many_rows_leave_with_the_next_launch_or_once_they_are_computed(worker: Worker) -> None:
    """Nothing waits for that in a queue which the next rows would wait in, too."""
    worker.capture(0, 300)
    arenas = Arenas(worker.device, num_rows=700)
    assert worker.answering.borrow(SESSION, arenas.said)
    one = worker.refer(0, 0, first=0, count=300)
    worker.turn_until(lambda: worker.launched == 2)  # what brings it, and its graph
    worker.turn(9)
    assert worker.launched == 2
    other = worker.refer(1, 0, first=350, count=300)
    worker.turn_until(lambda: worker.launched == 5)  # the same, and what takes the first away
    worker.allow(5)
    worker.turn_until(lambda: one.answered)
    assert torch.equal(arenas.reply_RD[:300], 2 * arenas.send_RD[:300])
    worker.turn_until(lambda: worker.launched == 6)
    assert arenas.reply_RD[350:].isnan().all()
    assert not other.answered
    worker.allow(6)
    worker.turn_until(lambda: other.answered)
    assert torch.equal(arenas.reply_RD[350:650], 2 * arenas.send_RD[350:650])


def test_many_rows_that_a_device_fails_at_are_refused_and_take_nothing_away(worker: Worker) -> None:
    worker.capture(0, 300, FAILS_LATER)
    arenas = Arenas(worker.device, num_rows=300)
    assert worker.answering.borrow(SESSION, arenas.said)
    worker.refer(1, 0, first=0, count=300)
    worker.turn_until(lambda: worker.launched == 2)
    worker.allow(99)
    assert worker.refusals() == [(wire.Refusal.FAILED, 1, 0, 0, 300)]
    worker.answering.close(SESSION)
    assert worker.launched == 2
    assert arenas.reply_RD.isnan().all()


def test_one_that_computes_for_long_has_its_caller_look_around(worker: Worker) -> None:
    worker.capture(0, 1)
    one = worker.dispatch(1, 0, rows(1))
    worker.turn_until(lambda: worker.answering.computing == 1)
    sleeps = os.eventfd(0)
    worker.answering.run(spin_s=0, wake_fd=sleeps)  # else it would not return
    os.close(sleeps)
    worker.allow(1)
    worker.turn_until(lambda: one.answered)


@pytest.mark.parametrize(("expert", "count"), [(1, 2), (0, 5), (0, 300)])
def test_what_has_no_graph_is_left_to_be_probed(worker: Worker, expert: int, count: int) -> None:
    worker.capture(0, 2)
    one = worker.dispatch(1, expert, rows(count))
    found = []

    def probed() -> bool:
        worker.transport.progress()
        found.append(worker.transport.probe())
        return found[-1] is not None

    worker.turn_until(probed)
    assert wire.decode(found[-1].tag)[2:] == (1, 0, expert, count)
    assert worker.launched == 0
    into = torch.zeros_like(one.x_RD)
    taken = found[-1].receive(worker.transport.wrap(into))
    worker.turn_until(lambda: taken.completed)
    assert torch.equal(into, rows(count))


@pytest.mark.parametrize("fails", [FAILS_AT_LAUNCH, FAILS_LATER])
def test_what_the_device_fails_at_is_named_and_not_launched_again(
    worker: Worker, fails: int
) -> None:
    worker.capture(0, 1, fails)
    worker.capture(1, 2)
    worker.allow(9)
    one = worker.dispatch(5, 0, rows(1))
    assert worker.refusals() == [(wire.Refusal.FAILED, 5, 0, 0, 1)]
    assert worker.answering.in_hand == 0
    assert not one.answered
    assert not list(worker.answering.counts())
    assert sum(slot in worker.replays[0] for slot in slots_of(1)) == native.RING - 1
    other = worker.dispatch(6, 1, rows(2))
    worker.turn_until(lambda: other.answered)
    assert torch.equal(other.y_RD, 3 * rows(2))


def test_a_gateway_that_goes_meanwhile_gets_nothing_and_its_buffer_comes_back(
    worker: Worker,
) -> None:
    worker.capture(0, 1)
    gone = [worker.dispatch(n, 0, rows(1)) for n in range(native.RING)]
    worker.turn_until(lambda: worker.answering.computing == native.RING)
    worker.answering.close(SESSION)
    worker.turn(20)
    assert worker.answering.in_hand == native.RING  # the device still writes there
    worker.allow(99)
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    worker.turn(20)
    assert not any(one.answered for one in gone)
    worker.answering.open(SESSION, worker.to_gateway, REPLY_SESSION)
    back = [worker.dispatch(n + 50, 0, rows(1)) for n in range(native.RING)]
    worker.turn_until(lambda: all(one.answered for one in back))


def test_looking_brings_what_is_in_hand_to_its_end_and_takes_nothing_new(worker: Worker) -> None:
    worker.capture(0, 1)
    one = worker.dispatch(1, 0, rows(1))
    worker.turn_until(lambda: worker.answering.computing == 1)
    late = worker.dispatch(2, 0, rows(1))
    worker.allow(9)
    for _ in range(5000):
        worker.gateway.progress()
        worker.transport.progress()
        worker.answering.look()
        if one.answered and not worker.answering.in_hand:
            break
    assert one.answered
    assert not late.answered
    assert worker.launched == 1
    worker.turn_until(lambda: late.answered)


def stats_of(plane: DataPlane, num_rows: dict[ExpertId, int]) -> DataPlaneStats:
    """With so many rows, which are counted behind the reply."""
    until = time.monotonic() + 20
    while plane.stats().rows != num_rows and time.monotonic() < until:
        time.sleep(0.001)
    return plane.stats()


class HandsOver(CpuCompute):
    """As the GPU's, with every graph captured before the first dispatch."""

    def __init__(self, driver: str, fails: int) -> None:
        self._driver, self._fails = driver, fails
        self._graphs: list[Graph] = []

    def open(self) -> None:
        self.replays = ReplayDevice(0, self._driver)

    def serve(self, experts: Mapping[ExpertId, Expert]) -> dict[ExpertId, Replays]:
        replays = {expert: Replays(mlp) for expert, mlp in experts.items()}
        for slot in slots_of(1):
            rows_RD = torch.zeros(1, WIDTH)
            self.replays.lend(slot, rows_RD)
            self._graphs.append(Graph(rows_RD.data_ptr(), WIDTH, 2, self._fails))
            for of_expert in replays.values():
                of_expert.add(slot, ctypes.addressof(self._graphs[-1]))
        return replays


@pytest.mark.parametrize("fails", [0, FAILS_AT_LAUNCH, FAILS_LATER])
def test_a_data_plane_counts_what_the_device_did_and_refuses_what_it_failed_at(
    driver: str, fails: int
) -> None:
    knobs = ctypes.CDLL(driver)
    for name, value in {"launched": 0, "ran": 0, "allowed": 9}.items():
        ctypes.c_int32.in_dll(knobs, name).value = value
    store = ExpertStore(
        lambda expert: lambda x_RD: 2 * x_RD, expert_bytes=1, memory_bytes=9, worker_id="w"
    )
    store.load([ExpertId(0, 0)])
    plane = DataPlane(
        UcxTransport,
        store,
        hidden_size=WIDTH,
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_experts=2,
        max_rows=8,
        merge_rows=8,
        spin_s=0.0,
        threads=1,
    )
    plane._compute_on = HandsOver(driver, fails)
    plane._accept = lambda: False  # what comes between two compiled turns, too, is for the next
    plane.start()
    gateway = UcxTransport()
    endpoint = gateway.connect(plane.wait_started())
    session = plane.connect("g", gateway.address, REPLY_SESSION)
    x_RD, y_RD = rows(1), torch.zeros(1, WIDTH)
    key = (3, 0, 0, 1)
    tag = wire.encode(wire.Kind.REPLY, REPLY_SESSION, *key)
    reply = endpoint.post_receive(gateway.wrap(y_RD), tag)
    endpoint.send(gateway.wrap(x_RD), wire.encode(wire.Kind.DISPATCH, session, *key))
    refused = None
    until = time.monotonic() + 20
    while not reply.completed and refused is None and time.monotonic() < until:
        gateway.progress()
        refused = gateway.probe()
    stats = stats_of(plane, {} if fails else {ExpertId(0, 0): 1})
    if fails:
        frame = wire.decode(refused.tag)
        assert (frame.kind, *frame[2:]) == (wire.Kind.REFUSE, 3, 0, 0, wire.Refusal.FAILED)
        assert stats.refused == {"failed": 1}
        assert not stats.rows
        gateway.cancel(reply)
        refused.receive(gateway.wrap(torch.zeros(64, dtype=torch.uint8)))
    else:
        assert torch.equal(y_RD, 2 * x_RD)
        assert stats.rows == {ExpertId(0, 0): 1}
        assert stats.compute_s == {ExpertId(0, 0): 0.0005}
    plane.drain(5)
    plane.stop()
    assert plane.failure is None
    assert not stats.busy
    endpoint.close()
    gateway.close()


ARENA_ROWS = 12
WANTED = 77


class Arenas:
    """What a gateway lends; the rows of the one are numbers, those of the other NaN."""

    def __init__(
        self, device: ReplayDevice, num_rows: int = ARENA_ROWS, said_rows: int | None = None
    ) -> None:
        self.send_RD = rows(num_rows)
        self.reply_RD = torch.full_like(self.send_RD, torch.nan)
        self.permit = torch.tensor([WANTED])
        self.said = bytes(
            native.LentArenas(
                device.share(self.send_RD),
                device.share(self.reply_RD),
                device.share(self.permit),
                num_rows if said_rows is None else said_rows,
                WANTED,
            )
        )

    def head(self, counts: Sequence[int], first: int) -> torch.Tensor:
        """Write counts ahead of this row; the rows themselves."""
        x_RD = self.send_RD[first : first + 3].clone()
        self.send_RD[first - HEADER_ROWS : first + 3] = headed(counts, x_RD)
        return x_RD


def test_referred_rows_are_read_and_answered_where_they_are(worker: Worker) -> None:
    worker.capture(0, 3)
    worker.allow(9)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    one = worker.refer(1, 0, first=4, count=3)
    worker.turn_until(lambda: one.answered)
    assert worker.gateway.failure(one.reply) is None
    assert torch.equal(arenas.reply_RD[4:7], 2 * arenas.send_RD[4:7])
    assert arenas.reply_RD.isnan().sum() == (ARENA_ROWS - 3) * WIDTH
    assert torch.equal(arenas.send_RD, rows(ARENA_ROWS))
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    assert [(e, n) for e, n, _ in worker.answering.counts()] == [(ExpertId(0, 0), 3)]


def test_what_a_graph_moved_is_not_moved_again_for_who_is_computed_where_he_came(
    worker: Worker,
) -> None:
    worker.capture(0, 1)
    worker.allow(99)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    for first in range(native.RING):  # with each of its slots
        one = worker.refer(first, 0, first, count=1)
        worker.turn_until(lambda: one.answered and not worker.answering.in_hand)  # noqa: B023
    arenas.reply_RD.fill_(torch.nan)
    own = [worker.dispatch(9 + n, 0, rows(1, 50 + n)) for n in range(native.RING)]
    worker.turn_until(lambda: all(one.answered for one in own))
    assert [one.y_RD[0, 0].item() for one in own] == [2.0 * (50 + n) for n in range(native.RING)]
    assert arenas.reply_RD.isnan().all()


def test_a_graph_that_cannot_be_told_what_to_move_is_refused_by_name(driver: str) -> None:
    worker = Worker(driver, moves=True)
    worker.capture(0, 1)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    worker.allow(9)
    knobs = Knobs(driver)
    knobs["refuses"] = 1
    worker.refer(4, 0, first=0, count=1)
    assert worker.refusals() == [(wire.Refusal.FAILED, 4, 0, 0, 1)]
    knobs["refuses"] = 0
    assert worker.launched == 0
    other = worker.refer(5, 0, first=1, count=1)
    worker.turn_until(lambda: other.answered)
    assert torch.equal(arenas.reply_RD[1:2], 2 * rows(ARENA_ROWS)[1:2])
    worker.close()


@pytest.mark.parametrize("referred", [True, False])
def test_what_waits_for_graphs_that_all_fail_is_refused(worker: Worker, referred: bool) -> None:
    worker.capture(0, 1, FAILS_AT_LAUNCH)
    worker.lent = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, worker.lent.said)
    count = native.RING + 2 if referred else native.RING
    for n in range(count):
        if referred:
            worker.refer(n, 0, first=n, count=1)
        else:
            worker.dispatch(n, 0, rows(1))
    refused: list[tuple[wire.Refusal, int, int, int, int]] = []
    while len(refused) < count:
        refused += worker.refusals()
    assert sorted(refused) == [(wire.Refusal.FAILED, n, 0, 0, 1) for n in range(count)]
    assert worker.answering.in_hand == 0


def test_a_permit_that_was_taken_back_meanwhile_keeps_the_answer_out(worker: Worker) -> None:
    worker.capture(0, 1)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    one = worker.refer(1, 0, first=0, count=1)
    worker.turn_until(lambda: worker.answering.computing == 1)
    arenas.permit[0] = 0
    worker.allow(9)
    worker.turn_until(lambda: one.answered)
    assert arenas.reply_RD.isnan().all()


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (ARENA_ROWS - 1, 2), (1 << 60, 1)])
def test_rows_outside_what_was_lent_are_refused(worker: Worker, first: int, count: int) -> None:
    worker.capture(0, count)
    worker.allow(9)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    worker.refer(3, 0, first, count)
    assert worker.refusals() == [(wire.Refusal.MALFORMED, 3, 0, 0, count)]
    assert worker.launched == 0
    other = worker.refer(4, 0, first=0, count=count)
    worker.turn_until(lambda: other.answered)
    assert torch.equal(arenas.reply_RD[:count], 2 * rows(count))


def test_what_cannot_be_reached_is_not_borrowed_and_references_are_left_to_be_probed(
    worker: Worker,
) -> None:
    worker.capture(0, 1)
    worker.allow(9)
    assert not worker.answering.borrow(
        SESSION, Arenas(worker.device, said_rows=ARENA_ROWS + 1).said
    )
    assert not worker.answering.borrow(SESSION, bytes(ctypes.sizeof(native.LentArenas)))
    assert worker.mapped == 0
    worker.refer(1, 0, first=0, count=1)

    def probed() -> bool:
        worker.transport.progress()
        return (found := worker.transport.probe()) is not None and wire.decode(found.tag)[0] == 6

    worker.turn_until(probed)
    assert worker.launched == 0


def test_what_waits_by_reference_to_arenas_that_are_replaced_is_refused(worker: Worker) -> None:
    worker.capture(0, 1)
    first, second = Arenas(worker.device), Arenas(worker.device)
    assert worker.answering.borrow(SESSION, first.said)
    for n in range(UNDER_WAY + 2):
        worker.refer(n, 0, first=n, count=1)
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY + 2)
    assert worker.answering.borrow(SESSION, second.said)
    malformed = wire.Refusal.MALFORMED
    assert sorted(worker.refusals()) == [(malformed, n, 0, 0, 1) for n in (2, 3)]
    worker.allow(99)
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    assert second.reply_RD.isnan().all()


def test_what_was_lent_is_returned_when_nothing_may_use_it_any_more(worker: Worker) -> None:
    worker.capture(0, 1)
    first, second = Arenas(worker.device), Arenas(worker.device)
    assert worker.answering.borrow(SESSION, first.said)
    assert worker.mapped == 3
    one = worker.refer(1, 0, first=2, count=1)
    worker.turn_until(lambda: worker.answering.computing == 1)
    assert worker.answering.borrow(SESSION, second.said)
    assert worker.mapped == 3
    assert torch.equal(first.reply_RD[2:3], 2 * rows(ARENA_ROWS)[2:3])
    worker.allow(99)
    worker.turn_until(lambda: one.answered)
    other = worker.refer(2, 0, first=5, count=1)
    worker.turn_until(lambda: other.answered and worker.answering.in_hand == 0)
    assert torch.equal(second.reply_RD[5:6], 2 * rows(ARENA_ROWS)[5:6])
    worker.answering.close(SESSION)
    assert worker.mapped == 0


def test_what_was_lent_is_returned_with_the_many_rows_that_were_to_go_there(worker: Worker) -> None:
    worker.capture(0, 300)
    first, second = (Arenas(worker.device, num_rows=300) for _ in range(2))
    assert worker.answering.borrow(SESSION, first.said)
    one = worker.refer(1, 0, first=0, count=300)
    worker.turn_until(lambda: worker.launched == 2)
    assert worker.answering.borrow(SESSION, second.said)
    assert torch.equal(first.reply_RD, 2 * first.send_RD)
    first.reply_RD.fill_(torch.nan)
    worker.turn_until(lambda: one.answered)
    assert worker.launched == 3
    assert first.reply_RD.isnan().all()
    assert second.reply_RD.isnan().all()


@pytest.mark.parametrize("counts", [(3, 2), (0, 1), (1, 0), (4, 0, 0, 0, 0)])
def test_rows_of_several_experts_come_back_each_from_its_own(
    worker: Worker, counts: tuple[int, ...]
) -> None:
    count = sum(counts)
    worker.capture(wire.SEVERAL, HEADER_ROWS + count)
    worker.allow(9)
    one = worker.dispatch(1, wire.SEVERAL, headed(counts, rows(count)))
    worker.turn_until(lambda: one.answered)
    assert worker.gateway.failure(one.reply) is None
    assert torch.equal(one.y_RD, by_expert(counts, rows(count)))
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    named = sum(n > 0 for n in counts)
    # Half a millisecond each: where the outputs are to be is told, then they are computed.
    took_ms = 0.5 + 0.5 * worker.copies(1)
    assert worker.counted == {e: (n, took_ms / named) for e, n in enumerate(counts) if n}


def test_messages_of_several_experts_are_computed_together_as_many_as_graphs_take(
    worker: Worker,
) -> None:
    """Five wait, of one to six rows: the first four by one graph, in equal parts of a slot, some
    of them brought there by reference; then the fifth."""
    for num_rows in (4, 8):
        worker.capture(wire.SEVERAL, num_rows)
    worker.capture_parts(2, 16)
    worker.capture_parts(4, 32)
    arenas = Arenas(worker.device)
    assert worker.answering.borrow(SESSION, arenas.said)
    first = [worker.dispatch(n, wire.SEVERAL, headed((1,), rows(1))) for n in range(UNDER_WAY)]
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY)
    referred_RD = arenas.head((1, 2), 4)
    referred = worker.refer(10, wire.SEVERAL, first=4, count=3)
    said = [(2, 4), (0, 1), (1, 1), (3, 0)]
    sent = [
        worker.dispatch(11 + n, wire.SEVERAL, headed(counts, rows(sum(counts), 9 * n)))
        for n, counts in enumerate(said)
    ]
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY + 5)
    before = worker.launched
    worker.allow(1000)
    every = [*first, referred, *sent]
    worker.turn_until(lambda: all(one.answered for one in every))
    assert all(worker.gateway.failure(one.reply) is None for one in every)
    for n, (one, counts) in enumerate(zip(sent, said, strict=True)):
        assert torch.equal(one.y_RD, by_expert(counts, rows(sum(counts), 9 * n)))
    assert torch.equal(arenas.reply_RD[4:7], by_expert((1, 2), referred_RD))
    assert arenas.reply_RD.isnan().sum() == (ARENA_ROWS - 3) * WIDTH
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    # Four brought and at once; the fifth, told where to.
    assert worker.launched - before == 2 + worker.copies(2)
    rows_of = {e: n for e, (n, _) in worker.counted.items()}
    assert rows_of == {0: UNDER_WAY + 1 + 2 + 0 + 1 + 3, 1: 2 + 4 + 1 + 1}


def test_of_those_that_are_computed_together_only_whose_counts_are_wrong_is_refused(
    worker: Worker,
) -> None:
    worker.capture(wire.SEVERAL, 4)
    worker.capture_parts(2, 8)
    first = [worker.dispatch(n, wire.SEVERAL, headed((1,), rows(1))) for n in range(UNDER_WAY)]
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY)
    wrong = worker.dispatch(8, wire.SEVERAL, headed((5, 1), rows(2)))
    right = worker.dispatch(9, wire.SEVERAL, headed((1, 1), rows(2)))
    worker.turn_until(lambda: worker.answering.computing == UNDER_WAY + 2)
    worker.allow(1000)
    assert worker.refusals() == [(wire.Refusal.BAD_COUNTS, 8, 0, wire.SEVERAL, 2)]
    worker.turn_until(lambda: right.answered and not worker.answering.in_hand)
    assert torch.equal(right.y_RD, by_expert((1, 1), rows(2)))
    assert not wrong.answered
    assert all(one.answered for one in first)
    assert {e: n for e, (n, _) in worker.counted.items()} == {0: UNDER_WAY + 1, 1: 1}


@pytest.mark.parametrize("first", [HEADER_ROWS, 5, ARENA_ROWS - 3])
def test_referred_rows_of_several_experts_have_their_counts_ahead(
    worker: Worker, first: int
) -> None:
    worker.capture(wire.SEVERAL, HEADER_ROWS + 3)
    worker.allow(9)
    arenas = Arenas(worker.device)
    x_RD = arenas.head((1, 2), first)
    assert worker.answering.borrow(SESSION, arenas.said)
    one = worker.refer(1, wire.SEVERAL, first, count=3)
    worker.turn_until(lambda: one.answered)
    assert worker.gateway.failure(one.reply) is None
    assert torch.equal(arenas.reply_RD[first : first + 3], by_expert((1, 2), x_RD))
    assert arenas.reply_RD.isnan().sum() == (ARENA_ROWS - 3) * WIDTH
    worker.turn_until(lambda: worker.answering.in_hand == 0)
    assert {e: n for e, (n, _) in worker.counted.items()} == {0: 1, 1: 2}


@pytest.mark.parametrize(
    ("first", "count"),
    [(HEADER_ROWS - 1, 2), (0, 2), (-1, 2), (-(1 << 63), 2), (ARENA_ROWS - 1, 2)],
)
def test_rows_or_counts_outside_what_was_lent_are_refused(
    worker: Worker, first: int, count: int
) -> None:
    worker.capture(wire.SEVERAL, HEADER_ROWS + count)
    worker.allow(9)
    assert worker.answering.borrow(SESSION, Arenas(worker.device).said)
    worker.refer(3, wire.SEVERAL, first, count)
    assert worker.refusals() == [(wire.Refusal.MALFORMED, 3, 0, wire.SEVERAL, count)]
    assert worker.launched == 0


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ((2, 2), wire.Refusal.BAD_COUNTS),
        ((1, 1), wire.Refusal.BAD_COUNTS),
        ((4, -1), wire.Refusal.BAD_COUNTS),
        ((1, 0, 2), wire.Refusal.UNKNOWN_EXPERT),
        ((0, 0, 0, 0, 3), wire.Refusal.UNKNOWN_EXPERT),
    ],
)
def test_counts_that_are_wrong_are_refused_by_name_and_nothing_is_counted(
    worker: Worker, counts: tuple[int, ...], reason: wire.Refusal, by_reference: bool
) -> None:
    worker.capture(wire.SEVERAL, HEADER_ROWS + 3)
    worker.allow(99)
    arenas = Arenas(worker.device)
    if by_reference:
        assert worker.answering.borrow(SESSION, arenas.said)
        arenas.head(counts, 4)
        one = worker.refer(2, wire.SEVERAL, first=4, count=3)
    else:
        one = worker.dispatch(2, wire.SEVERAL, headed(counts, rows(3)))
    assert worker.refusals() == [(reason, 2, 0, wire.SEVERAL, 3)]
    assert not one.answered
    assert worker.answering.in_hand == 0
    assert worker.counted == {}
    others = [
        worker.dispatch(3 + n, wire.SEVERAL, headed((1, 2), rows(3))) for n in range(native.RING)
    ]
    worker.turn_until(lambda: all(other.answered for other in others))
    assert all(torch.equal(other.y_RD, by_expert((1, 2), rows(3))) for other in others)


def test_several_that_no_buffer_holds_with_their_counts_are_left_to_be_probed(
    worker: Worker,
) -> None:
    worker.capture(wire.SEVERAL, 4)
    worker.dispatch(1, wire.SEVERAL, headed((1, 2), rows(3)))
    found = []

    def probed() -> bool:
        worker.transport.progress()
        found.append(worker.transport.probe())
        return found[-1] is not None

    worker.turn_until(probed)
    assert wire.decode(found[-1].tag)[2:] == (1, 0, wire.SEVERAL, 3)
    assert worker.launched == 0


def test_what_is_in_hand_when_the_experts_change_is_answered_by_those_before(
    worker: Worker,
) -> None:
    count = HEADER_ROWS + 2
    worker.capture(wire.SEVERAL, count)
    before = worker.dispatch(1, wire.SEVERAL, headed((1, 1), rows(2)))
    lost = worker.dispatch(2, wire.SEVERAL, headed((0, 0, 2), rows(2)))
    worker.turn_until(lambda: worker.answering.computing == 2)

    changed, graphs = Replays(here=(1, 2)), []
    for slot in slots_of(count):
        graphs.append(together(worker.device, slot, times=(0.0, 30.0, 40.0, 0.0, 0.0)))
        changed.add(slot, ctypes.addressof(graphs[-1]))
    experts = {ExpertId(0, 1): worker.replays[1], ExpertId(0, 2): Replays()}
    worker.answering.serve(experts | {ExpertId(0, wire.SEVERAL): changed})

    late = worker.dispatch(3, wire.SEVERAL, headed((0, 1, 1), rows(2)))
    gone = worker.dispatch(4, wire.SEVERAL, headed((1, 1), rows(2)))
    worker.turn_until(lambda: worker.answering.computing == 4)
    worker.allow(9)
    unknown = wire.Refusal.UNKNOWN_EXPERT
    refused = []
    worker.turn_until(
        lambda: refused.extend(worker.answering.failed()) or worker.answering.in_hand == 0
    )
    assert [(why, wire.decode(tag).slot) for tag, why in refused] == [(unknown, 2), (unknown, 4)]
    worker.turn_until(lambda: before.answered and late.answered)
    assert torch.equal(before.y_RD, by_expert((1, 1), rows(2)))
    assert torch.equal(late.y_RD, torch.tensor([[30.0], [40.0]]) * rows(2))
    assert not lost.answered
    assert not gone.answered


class Computes(CpuCompute):
    """At once, when all that the device was asked before is done."""

    def __init__(self, driver: str) -> None:
        self._driver = driver

    def open(self) -> None:
        self.replays = ReplayDevice(0, self._driver)

    def start(self, expert: Expert, parts: Sequence[Part]) -> Done:
        ctypes.CDLL(self._driver).cuStreamSynchronize(None)
        return super().start(expert, parts)

    def start_several(self, *several: object) -> None:
        ctypes.CDLL(self._driver).cuStreamSynchronize(None)

    def mark(self) -> Done:
        ctypes.CDLL(self._driver).cuStreamSynchronize(None)
        return super().mark()


class Served:
    """A gateway, and a data plane with experts of layer 0 that it has a session with."""

    def __init__(self, driver: str, compute: CpuCompute, *indices: int) -> None:
        self.knobs = ctypes.CDLL(driver)
        for name, value in {"launched": 0, "ran": 0, "allowed": 99, "mapped": 0}.items():
            ctypes.c_int32.in_dll(self.knobs, name).value = value
        self.store = ExpertStore(
            lambda expert: lambda x_RD: (expert.index + 2) * x_RD,
            expert_bytes=1,
            memory_bytes=9,
            worker_id="w",
        )
        self.store.load(ExpertId(0, index) for index in indices)
        self.plane = DataPlane(
            UcxTransport,
            self.store,
            hidden_size=WIDTH,
            dtype=torch.float32,
            device=torch.device("cpu"),
            num_experts=NUM_EXPERTS,
            max_rows=8,
            merge_rows=8,
            spin_s=0.0,
            threads=1,
        )
        self.plane._compute_on = compute
        self.plane.start()
        self.gateway = UcxTransport()
        self.endpoint = self.gateway.connect(self.plane.wait_started())
        self.session = self.plane.connect("g", self.gateway.address, REPLY_SESSION)
        self.arenas = Arenas(ReplayDevice(0, driver))

    def lend(self) -> None:
        said = torch.frombuffer(bytearray(self.arenas.said), dtype=torch.uint8)
        tag = wire.encode(wire.Kind.ARENAS, self.session, 5, 0, 0, 0)
        self.endpoint.send(self.gateway.wrap(said), tag)
        assert self.heard() == (wire.Kind.ARENAS, REPLY_SESSION, 5, 0, 0, 1)

    def heard(self, reply: Request | None = None) -> wire.Frame | None:
        """What came that nobody waited for; None: the reply did first."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            self.gateway.progress()
            if (message := self.gateway.probe()) is not None:
                message.receive(self.gateway.wrap(torch.zeros(64, dtype=torch.uint8)))
                return wire.decode(message.tag)
            if reply is not None and reply.completed:
                return None
        raise AssertionError("nothing came")

    def refer(self, slot: int, first: int, count: int, expert: int = 0) -> wire.Frame | None:
        """What came of it; None: its reply."""
        key = (slot, 0, expert, count)
        tag = wire.encode(wire.Kind.REPLY, REPLY_SESSION, *key)
        reply = self.endpoint.post_receive(self.gateway.wrap(torch.zeros(0)), tag)
        where = self.gateway.wrap(torch.tensor([first]))
        self.endpoint.send(where, wire.encode(wire.Kind.REFERENCE, self.session, *key))
        return self.heard(reply)

    def close(self) -> None:
        self.plane.drain(5)
        self.plane.stop()
        assert self.plane.failure is None
        assert ctypes.c_int32.in_dll(self.knobs, "mapped").value == 0
        self.endpoint.close()
        self.gateway.close()


def refused(slot: int, expert: int, reason: wire.Refusal) -> tuple[int, ...]:
    return (wire.Kind.REFUSE, REPLY_SESSION, slot, 0, expert, reason)


def test_a_data_plane_serves_references_that_nothing_was_captured_for(driver: str) -> None:
    served = Served(driver, Computes(driver), 0, 1)
    arenas, malformed = served.arenas, wire.Refusal.MALFORMED
    assert served.refer(1, 0, 2) == refused(1, 0, malformed)
    served.lend()
    assert served.refer(2, 3, 2) is None
    assert torch.equal(arenas.reply_RD[3:5], 2 * arenas.send_RD[3:5])
    assert served.refer(3, ARENA_ROWS - 1, 2) == refused(3, 0, malformed)
    x_RD = arenas.head((2, 1), 8)
    assert served.refer(4, 8, 3, wire.SEVERAL) is None
    assert torch.equal(arenas.reply_RD[8:11], by_expert((2, 1), x_RD))
    for slot, first, reason in ((5, 1, malformed), (6, 4, wire.Refusal.BAD_COUNTS)):
        answer = served.refer(slot, first, 3, wire.SEVERAL)
        assert answer == refused(slot, wire.SEVERAL, reason)
    num_rows = {ExpertId(0, 0): 4, ExpertId(0, 1): 1}
    assert stats_of(served.plane, num_rows).rows == num_rows
    served.close()


class Elsewhere(Computes):
    """As torch's grouped GEMM: outputs of several experts are not where their rows were."""

    def start_several(
        self, experts: Mapping[ExpertId, Expert], layer: int, part: Part, num_experts: int
    ) -> Done:
        super().start_several()
        header = part.buffer_RD[: part.start].reshape(-1).view(torch.int32)
        counts = header[:num_experts].tolist()
        answers_RD = by_expert(counts, part.x_RD)
        part.buffer_RD.fill_(torch.nan)
        return Done(0.0, counts=counts, answers_RD=answers_RD)


def test_outputs_that_are_elsewhere_are_answered_from_there(driver: str) -> None:
    served = Served(driver, Elsewhere(driver), 0, 1)
    served.lend()
    arenas = served.arenas
    x_RD = arenas.head((2, 1), 4)
    assert served.refer(1, 4, 3, wire.SEVERAL) is None
    assert torch.equal(arenas.reply_RD[4:7], by_expert((2, 1), x_RD))
    for slot, counts in ((2, (1, 2)), (3, (3, 0))):
        y_RD = torch.zeros(3, WIDTH)
        key = (slot, 0, wire.SEVERAL, 3)
        tag = wire.encode(wire.Kind.REPLY, REPLY_SESSION, *key)
        reply = served.endpoint.post_receive(served.gateway.wrap(y_RD), tag)
        sent = served.gateway.wrap(headed(counts, x_RD))
        served.endpoint.send(sent, wire.encode(wire.Kind.DISPATCH, served.session, *key))
        assert served.heard(reply) is None
        assert torch.equal(y_RD, by_expert(counts, x_RD))
    num_rows = {ExpertId(0, 0): 6, ExpertId(0, 1): 3}
    assert stats_of(served.plane, num_rows).rows == num_rows
    served.close()


class Stacks(Computes):
    """As the GPU's: a layer's experts have graphs once several were asked for."""

    def __init__(self, driver: str) -> None:
        super().__init__(driver)
        self._graphs: list[Graph] = []
        self.num_asked = 0

    def serve(self, experts: Mapping[ExpertId, Expert]) -> dict[ExpertId, Replays]:
        here = Replays(here=[expert.index for expert in experts])
        for slot in slots_of(HEADER_ROWS + 3) if self.version else ():
            if slot not in self.replays.buffers:
                self.replays.lend(slot, torch.zeros(slot_rows(slot), WIDTH))
            self._graphs.append(together(self.replays, slot))
            here.add(slot, ctypes.addressof(self._graphs[-1]))
        return {expert: Replays() for expert in experts} | {ExpertId(0, wire.SEVERAL): here}

    def start_several(self, *several: object) -> None:
        super().start_several(*several)
        self.num_asked += 1
        self.version += 1


def test_a_data_plane_has_several_experts_answered_by_what_holds_of_them_now(driver: str) -> None:
    stacks = Stacks(driver)
    served = Served(driver, stacks, 0, 1)
    served.lend()
    arenas, unknown = served.arenas, wire.Refusal.UNKNOWN_EXPERT
    x_RD = arenas.head((2, 1), 4)
    for slot in range(4):
        arenas.reply_RD.zero_()
        assert served.refer(slot, 4, 3, wire.SEVERAL) is None
        assert torch.equal(arenas.reply_RD[4:7], by_expert((2, 1), x_RD))
    assert stacks.num_asked == 1
    num_rows = {ExpertId(0, 0): 8, ExpertId(0, 1): 4}
    assert stats_of(served.plane, num_rows).rows == num_rows

    arenas.head((1, 0, 2), 4)
    assert served.refer(5, 4, 3, wire.SEVERAL) == refused(5, wire.SEVERAL, unknown)
    served.store.load([ExpertId(0, 2)])
    served.store.unload([ExpertId(0, 1)])
    for slot in (6, 7):  # what is here now is known to the first that comes
        arenas.reply_RD.zero_()
        assert served.refer(slot, 4, 3, wire.SEVERAL) is None
        assert torch.equal(arenas.reply_RD[4:7], by_expert((1, 0, 2), x_RD))
    for counts, reason in (((2, 1), unknown), ((2, 0, 2), wire.Refusal.BAD_COUNTS)):
        arenas.head(counts, 4)
        assert served.refer(8, 4, 3, wire.SEVERAL) == refused(8, wire.SEVERAL, reason)
    assert stacks.num_asked == 2
    num_rows = {ExpertId(0, 0): 10, ExpertId(0, 1): 4, ExpertId(0, 2): 4}
    stats = stats_of(served.plane, num_rows)
    assert stats.rows == num_rows
    assert stats.refused == {"unknown_expert": 2, "bad_counts": 1}
    served.close()
