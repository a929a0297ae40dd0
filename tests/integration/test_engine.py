"""The engine with a real decoder: first with its experts at hand, then as a process over UCX."""

from __future__ import annotations

import functools
import itertools
import math
import socket
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expert_worker.data_plane import DataPlane
from expert_worker.expert_mlp import load_expert
from expert_worker.expert_store import ExpertStore
from gateway.engine import MAX_FAILURES, Engine, Forward
from gateway.engine_outputs import message_of
from gateway.engine_process import EngineLoop, run_engine
from gateway.ipc import EngineChannel, FrameReader, encode_frame
from gateway.kv_blocks import BlockAllocator
from gateway.model.batch import Experts, ForwardBatch, PendingExperts
from gateway.model.decoder import Decoder
from gateway.model.kv_cache import KvCache
from gateway.model.scores import Likeliest, Scores, likeliest
from gateway.peers import Peers
from gateway.request import Request, Sampling
from gateway.sampler import Sampler
from gateway.scheduler import Limits, Scheduler
from mesh.checkpoint import Checkpoint
from mesh.config import GatewayConfig
from mesh.errors import ConfigError, EngineDied, ExpertUnavailable, Unavailable
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId
from mesh.transport.loopback import LoopbackHub
from mesh.transport.ucx import UcxTransport
from protos import engine_pb2 as pb
from protos import inference_pb2, placement_pb2
from tests.families import PLAIN, make_checkpoint
from tests.local_experts import LocalExperts
from tests.token_is_expert import make_token_is_expert

CPU = torch.device("cpu")
SIZE = 4


@dataclass
class Away:
    """Rows that are waited for, which gives the engine time."""

    experts: LosableExperts
    pending: PendingExperts

    def combine(self) -> Tensor:
        for _ in range(self.experts.turns):
            self.experts.on_away()
        return self.pending.combine()


class LosableExperts:
    """The experts of this process as the dispatcher has them; ``lost`` ones answer nothing. The
    engine has so many ``turns`` in each layer, as if there were more layers."""

    def __init__(self, local: LocalExperts) -> None:
        self._local = local
        self._void: dict[tuple[int, int], ExpertUnavailable] = {}
        self._calls: Counter[int] = Counter()
        self._num_micro_batches = 1
        self.lost: set[ExpertId] = set()
        self.turns = 3
        self.epoch = self.refused = self.replayed_rows = self.failovers = 0
        self.expert_wait_s = self.pause_s = 0.0
        self.on_away: Callable[[], None] = lambda: None
        self.rows_by_expert: Counter[ExpertId] = Counter()

    def begin_step(self, num_micro_batches: int, *, away: bool = False) -> None:
        self._num_micro_batches = num_micro_batches
        self._void.clear()
        self._calls.clear()

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> PendingExperts:
        micro_batch = self._calls[layer] % self._num_micro_batches
        self._calls[layer] += 1
        for row, indices in enumerate(expert_ids_TK.tolist()):
            self.rows_by_expert.update(ExpertId(layer, index) for index in indices)
            for expert in {ExpertId(layer, index) for index in indices} & self.lost:
                self._void[micro_batch, row] = ExpertUnavailable(*expert, "it was lost")
                weights_TK[row] = math.inf  # whatever is made of a void row is garbage
        return Away(self, self._local.dispatch(layer, x_TD, expert_ids_TK, weights_TK))

    def void_rows(self) -> dict[tuple[int, int], ExpertUnavailable]:
        return self._void

    def paces(self) -> list[inference_pb2.WorkerPace]:
        return []

    def set_routing(self, routing: pb.Routing) -> None:
        self.lost.clear()
        self.epoch = routing.epoch


@dataclass
class Model:
    """A tiny checkpoint, loaded once."""

    config: ModelConfig
    decoder: Decoder
    local: LocalExperts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    torch.set_num_threads(1)
    directory = make_checkpoint(PLAIN, tmp_path_factory.mktemp("model") / PLAIN)
    config = ModelConfig.from_hf(directory)
    with Checkpoint(directory) as checkpoint:
        decoder = Decoder.load(config, checkpoint, CPU, torch.float32)
    return Model(config, decoder, LocalExperts(directory, config))


class Unreadable:
    """Tokens of a device that failed."""

    def __getitem__(self, rows: slice) -> Unreadable:
        return self

    def tolist(self) -> list[int]:
        raise RuntimeError("illegal memory access")


class Chain:
    """In place of the graphs of a device: see :class:`gateway.engine.Ahead`. What is begun has
    written its keys and values whether it proceeds or not, and the tokens of each step lie where
    those of the last one lay."""

    def __init__(self, forward: Forward, local: LocalExperts, experts: LosableExperts) -> None:
        self._forward, self._local, self._experts = forward, local, experts
        self._batch: ForwardBatch | None = None
        self._tables: list[tuple[int, ...]] | None = None
        self._begun: ForwardBatch | None = None
        self._ids = torch.zeros(8, dtype=torch.int64)
        self.on_host: Tensor | Unreadable = torch.zeros(8, dtype=torch.int64)
        self.holds = True
        """Whether what is begun may proceed."""
        self.num_begun = self.num_joined = self.num_proceeded = 0
        self._joins = False

    def forward(self, batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
        self._begun = self._batch = self._tables = None
        self._joins = False
        if len(batches) > 1:
            return self._forward(batches, experts)
        self._batch = batches[0]
        return [self._run(experts)]

    def _run(self, experts: Experts) -> Scores:
        assert self._batch is not None
        (scores,) = self._forward([self._batch], experts)
        logits_NV = scores.logits_NV
        count = len(logits_NV)
        self._ids[:count] = likeliest(logits_NV)
        if isinstance(self.on_host, Tensor):
            self.on_host[:count] = self._ids[:count]
        joins, self._joins = self._joins, False
        if joins and not self._experts.void_rows():
            self.num_joined += 1
            self._begin(self._ids[:count])
        return Scores(logits_NV, Likeliest(self._ids[:count], self.on_host[:count]))  # type: ignore[arg-type]

    def foresee(self, block_tables: Sequence[tuple[int, ...]], likeliest: bool) -> bool:
        assert self._batch is not None
        self._tables = list(block_tables)
        foreseen = all(
            position + 1 < len(table) * SIZE
            for position, table in zip(self._batch.num_cached, block_tables, strict=True)
        )
        self._joins = foreseen and likeliest
        return foreseen

    def go_on(self, token_ids_N: Tensor) -> bool:
        return self._begun is not None or self._begin(token_ids_N)

    def _begin(self, token_ids_N: Tensor) -> bool:
        assert self._batch is not None
        assert self._tables is not None
        positions = [position + 1 for position in self._batch.num_cached]
        tokens_N = token_ids_N.clamp(min=0)
        self._begun = ForwardBatch(
            positions, [1] * len(positions), self._tables, tokens_N, torch.arange(len(tokens_N))
        )
        self._tables = None
        self._forward([self._begun], self._local)
        self.num_begun += 1
        return True

    def proceed(self) -> Callable[[], Scores] | None:
        begun, self._begun = self._begun, None
        if not self.holds:
            return None
        assert begun is not None
        self._batch = begun
        self.num_proceeded += 1

        def run() -> Scores:
            self._experts.begin_step(1)
            return self._run(self._experts)

        return run


@dataclass
class Bench:
    """An engine, its clock, and what it said."""

    engine: Engine
    experts: LosableExperts
    blocks: BlockAllocator
    now: float = 0.0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, pb.Output] = field(default_factory=dict)
    logprobs: dict[str, list[float]] = field(default_factory=dict)
    chain: Chain | None = None

    def step(self) -> bool:
        self.now += 0.03
        did = self.engine.step()
        for each in self.engine.take_outputs():
            output = message_of([each])
            assert output.request_id not in self.ends
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            found = [position.chosen.logprob for position in output.logprobs]
            self.logprobs.setdefault(output.request_id, []).extend(found)
            if output.finish_reason:
                self.ends[output.request_id] = output
        return did

    def run(self) -> dict[str, list[int]]:
        """Until every request has ended."""
        while self.engine.num_requests:
            self.step()
        return self.tokens


def make_bench(
    model: Model,
    *,
    num_blocks: int = 64,
    max_batch_tokens: int = 64,
    overlap_tokens: int | None = None,
    forward: Callable[[Forward], Forward] = lambda forward: forward,
    ahead: bool = False,
) -> Bench:
    blocks = BlockAllocator(num_blocks, SIZE)
    kv = KvCache(model.config, num_blocks, SIZE, CPU, torch.float32)
    experts = LosableExperts(model.local)

    def real(batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
        return model.decoder.forward(batches, kv, experts)

    chain = Chain(real, model.local, experts) if ahead else None
    engine = Engine(
        Scheduler(blocks, Limits(max_batch_tokens, 8, 8, 0.4, 60.0)),
        forward(real if chain is None else chain.forward),
        experts,
        Sampler(),
        overlap_tokens=overlap_tokens,
        ahead=chain,
        clock=lambda: bench.now,
    )
    bench = Bench(engine, experts, blocks, chain=chain)
    return bench


def request(name: str, prompt: Sequence[int], max_tokens: int = 12, **options: object) -> Request:
    sampling = Sampling(max_tokens, **{"temperature": 0.0, **options})  # type: ignore[arg-type]
    return Request(name, array("q", prompt), sampling)


def four_requests() -> list[Request]:
    return [
        request("long", range(3, 30)),
        request("same start", [*range(3, 20), 99]),
        request("one token", [200]),
        request("seeded", range(40, 49), temperature=0.7, top_p=0.9, seed=5, frequency_penalty=0.2),
    ]


@pytest.fixture(scope="module")
def alone(model: Model) -> dict[str, list[int]]:
    """What each of the four gives with an engine to itself."""
    tokens: dict[str, list[int]] = {}
    for each in four_requests():
        bench = make_bench(model)
        bench.engine.submit(each)
        tokens |= bench.run()
    assert all(len(outputs) == 12 for outputs in tokens.values())
    return tokens


@pytest.mark.parametrize("overlap_tokens", [None, 1])
@pytest.mark.parametrize("max_batch_tokens", [64, 8])
@pytest.mark.parametrize("num_blocks", [64, 16])
def test_tokens_do_not_depend_on_what_runs_beside_chunks_or_preemption(
    model: Model,
    alone: dict[str, list[int]],
    overlap_tokens: int | None,
    max_batch_tokens: int,
    num_blocks: int,
) -> None:
    bench = make_bench(
        model,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        overlap_tokens=overlap_tokens,
    )
    for each in four_requests():
        bench.engine.submit(each)
    assert bench.run() == alone
    assert (bench.engine.stats().preemptions > 0) == (num_blocks == 16)
    assert bench.blocks.num_free == num_blocks


def test_a_prefix_that_was_computed_before_gives_the_same_tokens(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = make_bench(model)
    for each in four_requests():
        bench.engine.submit(each)
        bench.run()
    assert bench.tokens == alone
    assert bench.ends["same start"].cached_tokens == 16


@pytest.mark.parametrize("overlap_tokens", [None, 1])
def test_requests_wait_for_an_expert_that_comes_back(
    model: Model, alone: dict[str, list[int]], overlap_tokens: int | None
) -> None:
    bench = make_bench(model, overlap_tokens=overlap_tokens)
    for each in four_requests():
        bench.engine.submit(each)
    layer = model.config.moe_layers[-1]
    for _ in range(4):
        bench.step()
        bench.experts.lost = {ExpertId(layer, index) for index in range(0, 16, 3)}
        bench.step()
        bench.engine.set_routing(pb.Routing(epoch=bench.experts.epoch + 1))
    assert bench.run() == alone
    assert bench.engine.stats().epoch == 4
    assert bench.engine.stats().stalled_s > 0


def test_an_expert_that_stays_away_ends_who_needs_it_and_no_other(
    model: Model, alone: dict[str, list[int]]
) -> None:
    needed: dict[str, set[ExpertId]] = {}
    for each in four_requests():
        bench = make_bench(model)
        bench.engine.submit(each)
        bench.run()
        needed[each.request_id] = set(bench.experts.rows_by_expert)
    lost = next(
        expert
        for expert in sorted(needed["long"])
        if 0 < sum(expert in experts for experts in needed.values()) < len(needed)
    )
    bench = make_bench(model)
    bench.experts.lost = {lost}
    for each in four_requests():
        bench.engine.submit(each)
    bench.run()
    for name, end in bench.ends.items():
        if lost in needed[name]:
            assert end.error_code == "ExpertUnavailable"
            assert f"expert {lost.index} of layer {lost.layer}" in end.error_message
        else:
            assert (end.finish_reason, bench.tokens[name]) == ("length", alone[name])
    assert 0.4 <= bench.now < 1.0


def test_a_step_that_raises_ends_its_requests_and_the_next_goes_well(
    model: Model, alone: dict[str, list[int]]
) -> None:
    failures = iter([None, RuntimeError("out of memory")])

    def flaky(forward: Forward) -> Forward:
        def call(batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
            failure = next(failures, None)
            if failure is not None:
                raise failure
            return forward(batches, experts)

        return call

    bench = make_bench(model, forward=flaky)
    bench.engine.submit(four_requests()[0])
    bench.step()
    bench.step()
    assert bench.ends["long"].error_code == "MeshError"
    assert "out of memory" in bench.ends["long"].error_message
    bench.engine.submit(four_requests()[1])
    bench.run()
    assert bench.tokens["same start"] == alone["same start"]


def test_an_engine_whose_every_step_fails_gives_up(model: Model) -> None:
    def broken(batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
        raise RuntimeError("no device")

    bench = make_bench(model, forward=lambda _: broken)
    for number in range(MAX_FAILURES - 1):
        bench.engine.submit(request(str(number), [1]))
        bench.step()
    bench.engine.submit(request("last", [1]))
    with pytest.raises(EngineDied, match="no device"):
        bench.step()


def test_a_row_that_is_not_a_number_ends_its_request_alone(
    model: Model, alone: dict[str, list[int]]
) -> None:
    def spoil(forward: Forward) -> Forward:
        def call(batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
            (scores,) = forward(batches, experts)
            logits_NV = scores.logits_NV
            if len(logits_NV) > 1:
                logits_NV[0, 7] = math.nan
            return [Scores(logits_NV)]

        return call

    bench = make_bench(model, forward=spoil)
    first, second = four_requests()[:2]
    bench.engine.submit(first)
    bench.engine.submit(second)
    bench.run()
    assert "not a number" in bench.ends["long"].error_message
    assert bench.tokens["same start"] == alone["same start"]


def test_cancelling_and_refusing_are_said_once(model: Model) -> None:
    bench = make_bench(model)
    bench.engine.submit(request("a", range(9)))
    bench.engine.submit(request("a", range(9)))
    bench.engine.submit(request("too long", range(9), max_tokens=999))
    outputs = [message_of([output]) for output in bench.engine.take_outputs()]
    refused = {output.request_id: output.error_code for output in outputs}
    assert refused == {"a": "AlreadyExists", "too long": "InvalidInput"}
    bench.step()
    bench.engine.cancel(["a", "unknown", "a"])
    bench.step()
    assert bench.ends["a"].finish_reason == "cancelled"
    assert len(bench.tokens["a"]) == 1
    assert not bench.step()


def test_what_a_step_gave_is_said_while_the_rows_of_the_next_are_away(
    model: Model, alone: dict[str, list[int]]
) -> None:
    said: list[tuple[int, bool, int]] = []

    def watched(forward: Forward) -> Forward:
        def call(batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
            bench.experts.on_away()
            said.extend((o.token_id, o.end is not None, step) for o in bench.engine._outputs)
            bench.engine._outputs.clear()
            return forward(batches, experts)

        return call

    bench = make_bench(model, forward=watched)
    bench.engine.submit(request("long", range(3, 30), max_tokens=4))
    bench.engine.submit(request("one token", [200], max_tokens=9))
    for step in range(6):  # noqa: B007
        bench.engine.step()
    first, second = alone["long"], alone["one token"]
    assert sorted(said) == sorted(
        [(first[n], n == 3, n + 1) for n in range(4)]
        + [(second[n], False, n + 1) for n in range(5)]
    )
    assert [output.token_id for output in bench.engine.take_outputs()] == [second[5]]


def test_the_time_of_the_host_ends_with_the_launch(model: Model) -> None:
    """A step's ends when the forward says so; the next one's begins with the step's tokens."""

    def slow(forward: Forward) -> Forward:
        def call(batches: Sequence[ForwardBatch], experts: Experts) -> list[Scores]:
            bench.now += 2.0
            bench.engine.launching()
            bench.now += 100.0
            return forward(batches, experts)

        return call

    bench = make_bench(model, forward=slow)
    bench.engine.submit(request("a", [5], max_tokens=9))
    bench.now += 50.0
    bench.engine.step()
    assert bench.engine.stats().host_s == 2.0
    bench.now += 0.5
    bench.engine.step()
    assert bench.engine.stats().host_s == 4.5
    bench.engine.cancel(["a"])
    assert not bench.engine.step()
    bench.now += 50.0
    bench.engine.submit(request("b", [5], max_tokens=9))
    bench.engine.step()
    assert bench.engine.stats().host_s == 6.5


# A device that runs a step before the host knows the tokens of the one before.


def chain_of(bench: Bench) -> Chain:
    assert bench.chain is not None
    return bench.chain


def begun(model: Model, *requests: Request, steps: int = 4) -> Bench:
    """A bench in the middle of a chain: the host does not know the last step's tokens yet."""
    bench = make_bench(model, ahead=True)
    for each in requests:
        bench.engine.submit(each)
    for _ in range(steps):
        bench.step()
    assert chain_of(bench).num_begun > chain_of(bench).num_proceeded
    for each in requests:
        assert each.num_outputs == len(bench.tokens[each.request_id]) == steps - 1
    return bench


def one_step_on(bench: Bench) -> int:
    """Whether that step was the one that had been begun."""
    before = chain_of(bench).num_proceeded
    bench.step()
    return chain_of(bench).num_proceeded - before


def test_the_first_rows_of_a_step_leave_before_the_last_ones_tokens_are_known(
    model: Model, alone: dict[str, list[int]]
) -> None:
    known: list[int] = []
    bench = make_bench(model, ahead=True)
    dispatch = bench.experts.dispatch

    def watched(layer: int, *of_rows: Tensor) -> PendingExperts:
        if layer == model.config.moe_layers[0]:
            known.append(each.num_outputs)
        return dispatch(layer, *of_rows)

    bench.experts.dispatch = watched  # type: ignore[method-assign]
    each = four_requests()[0]
    bench.engine.submit(each)
    for _ in range(2):
        bench.step()
    host_s = bench.engine.stats().host_s
    assert bench.run()["long"] == alone["long"]
    # The prompt and what follows it; from there on one ahead.
    assert known == [0, 1, *range(1, 11)]
    assert chain_of(bench).num_begun == chain_of(bench).num_proceeded == 10
    assert bench.engine.stats().host_s == host_s
    assert bench.blocks.num_free == 64


def wishes(alone: dict[str, list[int]]) -> list[list[Request]]:
    """Requests that end at different steps, in different ways."""
    stops = {name: frozenset({tokens[5]}) for name, tokens in alone.items()}
    logprobs = four_requests()
    logprobs[0] = request("long", range(3, 30), logprobs=2)
    logprobs[2] = request("one token", [200], 7, logprobs=0, stop_token_ids=stops["one token"])
    return [
        four_requests(),
        logprobs,
        [
            request("long", range(3, 30), 30, stop_token_ids=stops["long"]),
            request("same start", [*range(3, 20), 99], 9, repetition_penalty=1.3),
            request("one token", [200], 3),
            request("early", [7, 8, 9], 40, min_tokens=20, stop_token_ids=frozenset(range(150))),
            request("seeded", range(40, 49), 17, temperature=1.1, top_k=40, seed=9, logprobs=1),
            request("seeded, too", range(40, 49), 17, temperature=0.8, min_p=0.01, seed=10),
        ],
        [request(n, alone[n], 30, stop_token_ids=stops[n]) for n in ("long", "one token")],
    ]


@pytest.mark.parametrize("num_blocks", [64, 16])
@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("which", range(4))
def test_a_step_ahead_of_its_tokens_the_tokens_are_the_same(
    model: Model, alone: dict[str, list[int]], which: int, turns: int, num_blocks: int
) -> None:
    benches = [make_bench(model, num_blocks=num_blocks, ahead=ahead) for ahead in (False, True)]
    for bench in benches:
        bench.experts.turns = turns
        for each in wishes(alone)[which]:
            bench.engine.submit(each)
        bench.run()
    behind, ahead = benches
    assert ahead.tokens == behind.tokens
    assert ahead.ends.keys() == behind.ends.keys()
    for name, end in ahead.ends.items():
        assert end.finish_reason == behind.ends[name].finish_reason
        assert end.stop_reason == behind.ends[name].stop_reason
        assert ahead.logprobs[name] == pytest.approx(behind.logprobs[name], abs=1e-4)
    assert (chain_of(ahead).num_proceeded > 2) == (turns > 0)
    assert ahead.blocks.num_free == num_blocks


def test_what_is_left_of_a_chain_in_the_cache_is_as_it_was_said(
    model: Model, alone: dict[str, list[int]]
) -> None:
    """Of a step that nobody waited for nothing is found."""
    bench = make_bench(model, ahead=True)
    bench.engine.submit(request("long", range(3, 30), stop_token_ids=frozenset({alone["long"][5]})))
    bench.run()
    bench.engine.submit(request("more", [*range(3, 30), *alone["long"][:9]], 3))
    assert bench.run()["more"] == alone["long"][9:]
    assert bench.ends["more"].cached_tokens >= 28


def test_a_step_in_which_there_was_no_time_settles_the_last_one_behind_it(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, four_requests()[3])
    bench.experts.turns = 0
    assert one_step_on(bench) == 1
    assert bench.tokens["seeded"] == alone["seeded"][:5]
    bench.experts.turns = 3
    assert bench.run()["seeded"] == alone["seeded"]


def test_what_is_cancelled_amid_a_chain_has_all_its_tokens(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, *four_requests()[:2])
    bench.engine.cancel(["long", "unknown"])
    assert one_step_on(bench) == 0
    assert bench.tokens["long"] == alone["long"][:4]
    assert bench.ends["long"].finish_reason == "cancelled"
    assert bench.run()["same start"] == alone["same start"]


def test_what_ends_with_tokens_that_nobody_knew_is_not_cancelled(
    model: Model, alone: dict[str, list[int]]
) -> None:
    stop = frozenset({alone["long"][3]})
    assert alone["long"].index(alone["long"][3]) == 3
    bench = begun(model, request("long", range(3, 30), stop_token_ids=stop))
    bench.engine.cancel(["long"])
    assert not bench.step()
    assert bench.tokens["long"] == alone["long"][:4]
    assert bench.ends["long"].finish_reason == "stop"
    assert bench.engine.num_requests == 0


def test_a_deadline_ends_a_request_amid_a_chain(model: Model, alone: dict[str, list[int]]) -> None:
    each = request("long", range(3, 30), 99)
    each.deadline_s = 0.03 * 9.5
    bench = make_bench(model, ahead=True)
    bench.engine.submit(each)
    bench.engine.submit(four_requests()[1])
    bench.run()
    assert chain_of(bench).num_proceeded > 5
    assert bench.ends["long"].error_code == "DeadlineExceeded"
    assert "after 10 tokens" in bench.ends["long"].error_message
    assert bench.tokens["long"] == alone["long"][:10]
    assert bench.tokens["same start"] == alone["same start"]


def test_all_fail_amid_a_chain_with_all_their_tokens(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, *four_requests()[:2])
    bench.engine.fail_all(Unavailable("the gateway is shutting down"))
    assert not bench.step()
    for name in ("long", "same start"):
        assert bench.tokens[name] == alone[name][:4]
        assert bench.ends[name].error_code == "Unavailable"
    assert bench.engine.num_requests == 0
    assert bench.blocks.num_free == 64


def test_a_newcomer_does_not_wait_for_the_step_that_is_begun(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, four_requests()[0])
    bench.engine.submit(four_requests()[1])
    assert one_step_on(bench) == 0
    assert bench.tokens == {"long": alone["long"][:5], "same start": alone["same start"][:1]}
    bench.run()
    assert {name: alone[name] for name in bench.tokens} == bench.tokens


def test_what_cannot_proceed_is_scheduled_in_the_same_step(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, *four_requests()[:2])
    chain_of(bench).holds = False
    assert one_step_on(bench) == 0
    assert bench.tokens["long"] == alone["long"][:4]
    chain_of(bench).holds = True
    bench.run()
    assert {name: alone[name] for name in bench.tokens} == bench.tokens


@pytest.mark.parametrize("turns", [0, 3])
def test_a_step_that_raises_amid_a_chain_takes_no_token_of_the_last_one(
    model: Model, alone: dict[str, list[int]], turns: int
) -> None:
    stop = frozenset({alone["long"][3]})
    bench = begun(model, request("long", range(3, 30), stop_token_ids=stop), four_requests()[1])
    dispatch, bench.experts.turns = bench.experts.dispatch, turns

    def raising(layer: int, *of_rows: Tensor) -> PendingExperts:
        if layer == model.config.moe_layers[1]:
            raise RuntimeError("out of memory")
        return dispatch(layer, *of_rows)

    bench.experts.dispatch = raising  # type: ignore[method-assign]
    assert one_step_on(bench) == 1
    for name in ("long", "same start"):
        assert bench.tokens[name] == alone[name][:4]
    assert bench.ends["long"].finish_reason == "stop"
    assert "out of memory" in bench.ends["same start"].error_message
    assert bench.engine.num_requests == 0
    bench.experts.dispatch, bench.experts.turns = dispatch, 3  # type: ignore[method-assign]
    bench.engine.submit(four_requests()[2])
    assert bench.run()["one token"] == alone["one token"]


@pytest.mark.parametrize("between", [False, True])
def test_tokens_that_cannot_be_read_fail_their_requests(
    model: Model, alone: dict[str, list[int]], between: bool
) -> None:
    chain = chain_of(bench := begun(model, *four_requests()[:2]))
    assert bench.engine._unsettled is not None
    assert bench.engine._unsettled.sampled is not None
    bench.engine._unsettled.sampled._on_host_N = Unreadable()  # type: ignore[assignment]
    if between:
        bench.engine.cancel(["long"])
    bench.step()
    for name in ("long", "same start"):
        assert bench.tokens[name] == alone[name][:3]
        assert "illegal memory access" in bench.ends[name].error_message
    assert bench.engine.num_requests == 0
    # Time and again, and it is no use to go on.
    chain.on_host = Unreadable()
    for n in range(MAX_FAILURES - 2):
        bench.engine.submit(request(str(n), [1]))
        bench.run()
    bench.engine.submit(request("last", [1]))
    with pytest.raises(EngineDied, match=r"^3 steps in a row failed, the last with Runtime"):
        bench.run()
    assert bench.engine.num_requests == 0


def test_rows_that_nobody_answers_amid_a_chain_come_again(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, *four_requests())
    layer = model.config.moe_layers[0]
    for _ in range(3):
        bench.experts.lost = {ExpertId(layer, index) for index in range(0, 16, 3)}
        proceeded = one_step_on(bench)
        stalled = [name for name in bench.tokens if len(bench.tokens[name]) < 12]
        assert proceeded == 1
        assert stalled
        bench.engine.set_routing(pb.Routing(epoch=bench.experts.epoch + 1))
        for _ in range(2):
            bench.step()
    assert bench.run() == alone
    assert bench.engine.stats().stalled_s > 0


def test_a_row_that_is_not_a_number_ends_its_request_amid_a_chain(
    model: Model, alone: dict[str, list[int]]
) -> None:
    bench = begun(model, *four_requests()[:2])
    dispatch = bench.experts.dispatch

    def spoiling(layer: int, *of_rows: Tensor) -> PendingExperts:
        if layer == model.config.moe_layers[-1] and len(of_rows[2]) == 2:
            of_rows[2][0] = math.nan
        return dispatch(layer, *of_rows)

    bench.experts.dispatch = spoiling  # type: ignore[method-assign]
    bench.run()
    assert bench.tokens["long"] == alone["long"][:4]
    assert "not a number" in bench.ends["long"].error_message
    assert bench.tokens["same start"] == alone["same start"]


LIVES = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.integers(1, 5)),
        st.tuples(st.just("submit"), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 5)),
        st.tuples(st.just("lose"), st.integers(0, 15)),
        st.tuples(st.just("route"), st.just(0)),
    ),
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(lives=LIVES)
def test_whatever_happens_between_steps_happens_alike_a_step_ahead(
    model: Model, alone: dict[str, list[int]], lives: list[tuple[str, int]]
) -> None:
    benches = [make_bench(model, num_blocks=99, ahead=ahead) for ahead in (False, True)]
    kinds = wishes(alone)[2]
    for bench in benches:
        names: list[str] = []
        for number, (what, n) in enumerate([*lives, ("route", 0)]):
            if what == "step":
                for _ in range(n):
                    bench.step()
            elif what == "submit":
                each = kinds[n]
                prompt = each.token_ids[: each.num_prompt_tokens]
                new = Request(f"{each.request_id} {number}", array("q", prompt), each.sampling)
                bench.engine.submit(new)
                names.insert(0, new.request_id)
            elif what == "cancel":
                bench.engine.cancel(names[n : n + 1])
            elif what == "lose":
                bench.experts.lost.add(ExpertId(model.config.moe_layers[0], n))
            elif what == "route":
                bench.engine.set_routing(pb.Routing(epoch=bench.experts.epoch + 1))
        bench.run()
        bench.step()
    behind, ahead = benches
    assert ahead.tokens == behind.tokens
    assert {name: end.finish_reason for name, end in ahead.ends.items()} == {
        name: end.finish_reason for name, end in behind.ends.items()
    }
    assert ahead.blocks.num_free == 99


class Connected(LosableExperts):
    """What the engine's loop needs of a dispatcher, beside its experts."""

    address = b""

    def __init__(self, local: LocalExperts) -> None:
        super().__init__(local)
        self.peers = Peers(LoopbackHub().transport())
        self.on_late: Callable[[], None] = lambda: None

    def poll(self) -> bool:
        return False


class NeverIdle:
    """In place of a waiter, where there is something to do until the end."""

    def busy(self) -> None: ...


@pytest.mark.parametrize("ahead", [False, True])
def test_the_front_hears_of_a_step_while_the_next_waits_for_its_rows_and_of_the_last_at_once(
    model: Model, ahead: bool
) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reader = FrameReader()
    experts = Connected(model.local)
    heard: list[list[pb.Output]] = []

    def hear() -> list[pb.Output]:
        try:
            payloads = reader.feed(ours.recv(1 << 20))
        except BlockingIOError:
            return []
        messages = map(pb.FromEngine.FromString, payloads)
        return [output for message in messages for output in message.outputs.outputs]

    def step(num_rows: int) -> Scores:
        heard.append(hear())
        for _layer in range(9):
            experts.on_away()
        heard.append(hear())
        if len(heard) == 2 * 3:
            raise RuntimeError("out of memory")
        logits_NV = torch.zeros(num_rows, 9)
        logits_NV[:, 7] = 1
        return Scores(logits_NV)

    class Always:
        """Goes on, whatever it is."""

        def foresee(self, block_tables: Sequence[tuple[int, ...]], likeliest: bool) -> bool:
            return True

        def go_on(self, token_ids_N: Tensor) -> bool:
            self.num_rows = len(token_ids_N)
            return True

        def proceed(self) -> Callable[[], Scores]:
            return lambda: step(self.num_rows)

    blocks = BlockAllocator(999, SIZE)
    engine = Engine(
        Scheduler(blocks, Limits(999, 99, 99, 1.0, 1.0)),
        lambda batches, _: [step(len(batches[0].logit_rows_N))],
        experts,
        Sampler(),
        ahead=Always() if ahead else None,
    )
    ticks = itertools.count()  # so that all that was said is due
    loop = EngineLoop(engine, experts, EngineChannel(theirs), NeverIdle(), (), lambda: next(ticks))  # type: ignore[arg-type]
    for n in range(70):
        sampling = inference_pb2.SamplingParams(max_tokens=2 if n == 0 else 9, repetition_penalty=1)
        submit = pb.Submit(request_id=str(n), prompt_token_ids=[1], sampling=sampling)
        ours.sendall(encode_frame(pb.ToEngine(submit=submit)))
    ours.sendall(encode_frame(pb.ToEngine(shutdown=pb.Shutdown(drain=True))))
    loop.run()
    names = [str(n) for n in range(70)]
    before, amid = heard[::2], heard[1::2]
    assert before == [[], [], []]
    assert [[o.request_id for o in outputs] for outputs in amid] == [[], names, names]
    assert {tuple(o.token_ids) for outputs in amid for o in outputs} == {(7,)}
    assert [o.request_id for outputs in amid for o in outputs if o.finish_reason] == ["0"]
    assert {o.request_id: o.error_code for o in hear()} == dict.fromkeys(names[1:], "MeshError")


# The engine's process, in a thread, with one real worker behind UCX.


class EngineThread:
    """Talks to :func:`run_engine` as the front does."""

    def __init__(self, config: GatewayConfig) -> None:
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(30)
        self._reader = FrameReader()
        self._received: list[pb.FromEngine] = []
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(config, theirs))
        self._thread.start()
        self.started = self.next("started").started

    def _run(self, config: GatewayConfig, sock: socket.socket) -> None:
        self.exit_code = run_engine(config, sock)

    def send(self, **body: object) -> None:
        self._sock.sendall(encode_frame(pb.ToEngine(**body)))  # type: ignore[arg-type]

    def next(self, kind: str) -> pb.FromEngine:
        """The next message of a kind, dropping those of others before it."""
        while True:
            while not self._received:
                chunk = self._sock.recv(1 << 16)
                assert chunk, "the engine ended"
                self._received += map(pb.FromEngine.FromString, self._reader.feed(chunk))
            message = self._received.pop(0)
            if message.WhichOneof("body") == kind:
                return message

    def submit(self, name: str, prompt: list[int], **options: object) -> None:
        sampling = inference_pb2.SamplingParams(temperature=0, top_p=1, repetition_penalty=1)
        sampling.MergeFrom(inference_pb2.SamplingParams(**options))  # type: ignore[arg-type]
        self.send(submit=pb.Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling))

    def finish(self, names: set[str]) -> dict[str, pb.Output]:
        """Whole outputs of requests, each put together."""
        whole: dict[str, pb.Output] = {}
        while not all(name in whole and whole[name].finish_reason for name in names):
            for output in self.next("outputs").outputs.outputs:
                whole.setdefault(output.request_id, pb.Output()).MergeFrom(output)
        return whole

    def hang_up(self) -> int | None:
        self._sock.close()
        self._thread.join(timeout=30)
        return self.exit_code


class WorkerThread:
    """A data plane with all experts of a model."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self.model = model
        self._checkpoint = Checkpoint(directory)
        self.experts = [ExpertId(x, e) for x in model.moe_layers for e in range(model.num_experts)]
        store = ExpertStore(
            lambda e: load_expert(self._checkpoint, model, e.layer, e.index, CPU, torch.float32),
            expert_bytes=1,
            memory_bytes=1 << 20,
            worker_id="w",
        )
        store.load(self.experts)
        self.plane = DataPlane(
            functools.partial(UcxTransport, cuda=False),
            store,
            hidden_size=model.hidden_size,
            dtype=torch.float32,
            device=CPU,
            num_experts=model.num_experts,
            max_rows=64,
            merge_rows=64,
            spin_s=0.0,
            threads=1,
        )
        self.plane.start()
        self.address = self.plane.wait_started()
        self.session: int | None = None
        self.reply_session = 6

    def routing(
        self, engine: EngineThread, epoch: int, without: Collection[int] = ()
    ) -> pb.Routing:
        """A plan of all experts ``without`` those of some indices; connects the engine once."""
        if self.session is None:
            self.reply_session += 1
            self.session = self.plane.connect(
                "gateway", engine.started.ucx_address, self.reply_session
            )
        routing = pb.Routing(epoch=epoch)
        routing.peers.add(
            worker_id="w",
            ucx_address=self.address,
            session=self.session,
            reply_session=self.reply_session,
            max_rows=64,
        )
        for layer, index in self.experts:
            if index not in without:
                expert = placement_pb2.ExpertId(layer=layer, index=index)
                routing.experts.add(expert=expert, worker_ids=["w"])
        return routing

    def stop(self) -> None:
        self.plane.stop()
        self._checkpoint.close()


@pytest.fixture
def token_is_expert(tmp_path: Path) -> Path:
    return make_token_is_expert(tmp_path / "model")


@pytest.fixture
def worker(token_is_expert: Path) -> Iterator[WorkerThread]:
    worker = WorkerThread(token_is_expert, ModelConfig.from_hf(token_is_expert))
    yield worker
    worker.stop()


@pytest.fixture
def engine(token_is_expert: Path) -> Iterator[EngineThread]:
    engine = EngineThread(
        GatewayConfig(model=token_is_expert, kv_memory_bytes=1 << 20, max_model_len=512)
    )
    yield engine
    assert engine.hang_up() == 0


def test_it_says_what_it_has(engine: EngineThread) -> None:
    assert engine.started.max_model_len == 512
    assert engine.started.kv_blocks * 2 * 16 * 2 * 16 * 4 == 1 << 20
    assert engine.started.dtype == "float32"


def test_requests_go_through_and_statistics_follow(
    engine: EngineThread, worker: WorkerThread
) -> None:
    engine.send(routing=worker.routing(engine, epoch=3))
    engine.submit("a", [3, 3], max_tokens=5, logprobs=1)
    engine.submit("b", [1], max_tokens=2)
    whole = engine.finish({"a", "b"})
    assert list(whole["a"].token_ids) == [3] * 5
    assert list(whole["b"].token_ids) == [1] * 2
    assert [position.top[0].token_id for position in whole["a"].logprobs] == [3] * 5
    stats = engine.next("stats").stats
    assert (stats.prompt_tokens, stats.generation_tokens, stats.epoch) == (3, 7, 3)
    assert {(load.expert.layer, load.expert.index): load.rows for load in stats.load} == {
        (layer, index): rows for layer in (0, 1) for index, rows in ((3, 6), (1, 2))
    }
    engine.send(ping=pb.Ping(sequence=9))
    assert engine.next("stats").stats.pong == 9


def test_an_unserved_expert_ends_its_requests_and_a_new_plan_helps(
    engine: EngineThread, worker: WorkerThread
) -> None:
    engine.send(routing=worker.routing(engine, epoch=1, without={2}))
    engine.submit("stuck", [2], max_tokens=4)
    engine.submit("fine", [0], max_tokens=4)
    whole = engine.finish({"stuck", "fine"})
    assert whole["stuck"].error_code == "ExpertUnavailable"
    assert "expert 2 of layer" in whole["stuck"].error_message
    assert list(whole["fine"].token_ids) == [0] * 4
    engine.send(routing=worker.routing(engine, epoch=2))
    engine.submit("again", [2], max_tokens=4)
    assert list(engine.finish({"again"})["again"].token_ids) == [2] * 4


def test_a_worker_that_hangs_can_be_dropped_amid_a_step_and_its_requests_go_on(
    engine: EngineThread, worker: WorkerThread
) -> None:
    engine.send(routing=worker.routing(engine, epoch=1))
    engine.submit("before", [1], max_tokens=2)
    engine.finish({"before"})
    hangs, goes_on = threading.Event(), threading.Event()
    hang = functools.partial(worker.plane._call, lambda: (hangs.set(), goes_on.wait()))
    threading.Thread(target=hang).start()
    hangs.wait()
    engine.submit("a", [3, 3], max_tokens=5)
    late = engine.next("peer_late").peer_late
    assert (late.worker_id, late.reply_session) == ("w", 7)
    engine.send(ping=pb.Ping(sequence=9))  # is answered behind the step
    engine.send(drop_peer=pb.DropPeer(worker_id="w", reply_session=7, reason="it hangs"))
    lost = engine.next("peer_lost").peer_lost
    assert (lost.worker_id, lost.reply_session, lost.reason) == ("w", 7, "it hangs")
    while engine.next("stats").stats.pong != 9:
        pass
    goes_on.set()
    worker.session = None
    engine.send(routing=worker.routing(engine, epoch=2))
    assert list(engine.finish({"a"})["a"].token_ids) == [3] * 5
    stats = engine.next("stats").stats
    assert stats.failovers > 0
    assert stats.pause_s > 0
    assert stats.stalled_s > 0


def test_a_worker_that_cannot_be_reached_is_reported(engine: EngineThread) -> None:
    peer = pb.Peer(worker_id="w", ucx_address=b"no address", max_rows=64)
    engine.send(routing=pb.Routing(epoch=1, peers=[peer]))
    lost = engine.next("peer_lost").peer_lost
    assert lost.worker_id == "w"
    assert "no worker address" in lost.reason


def test_shutdown_ends_what_runs_and_the_process(
    engine: EngineThread, worker: WorkerThread
) -> None:
    engine.send(routing=worker.routing(engine, epoch=1))
    engine.submit("a", [2], max_tokens=500)
    engine.next("outputs")
    engine.send(
        cancel=pb.CancelRequests(request_ids=["b"]),
    )
    engine.send(shutdown=pb.Shutdown(drain=False))
    assert engine.finish({"a"})["a"].error_code == "Unavailable"


def test_draining_finishes_what_runs(engine: EngineThread, worker: WorkerThread) -> None:
    engine.send(routing=worker.routing(engine, epoch=1))
    engine.submit("a", [2], max_tokens=50)
    engine.send(shutdown=pb.Shutdown(drain=True))
    assert len(engine.finish({"a"})["a"].token_ids) == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_memory_bytes": 9}, "one KV block takes 4096 bytes and there are 9"),
        ({"max_model_len": 8193}, "max_model_len 8193 is more than the 8192 positions"),
    ],
)
def test_memory_or_lengths_that_cannot_be_are_refused(
    token_is_expert: Path, options: dict[str, int], message: str
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ConfigError, match=message):
        run_engine(GatewayConfig(model=token_is_expert, **options), theirs)  # type: ignore[arg-type]
