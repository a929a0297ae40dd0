"""What is computed when: small stories, then random lives in a tiny pool of blocks."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.kv_blocks import BlockAllocator
from gateway.request import Request, Sampling, State
from gateway.scheduler import RETRY_INTERVAL_S, Limits, Part, Scheduler
from mesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidInput,
    MeshError,
    Overloaded,
)

SIZE = 2
UNAVAILABLE = ExpertUnavailable(3, 7, "no worker of the plan serves it")
COMING = ExpertUnavailable(3, 7, "its worker was lost", coming=True)


def make_scheduler(
    num_blocks: int = 64,
    max_batch_tokens: int = 8,
    max_running: int = 4,
    max_waiting: int = 8,
    patience_s: float = 0.4,
) -> Scheduler:
    limits = Limits(max_batch_tokens, max_running, max_waiting, patience_s, 60.0)
    return Scheduler(BlockAllocator(num_blocks, SIZE), limits)


def make_request(
    name: str, prompt: int | list[int] = 3, max_tokens: int = 4, **options: object
) -> Request:
    ids = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
    deadline_s = options.pop("deadline_s", math.inf)
    sampling = Sampling(max_tokens=max_tokens, **options)  # type: ignore[arg-type]
    return Request(name, array("q", ids), sampling, deadline_s=deadline_s)  # type: ignore[arg-type]


def shares(parts: tuple[Part, ...]) -> list[tuple[str, int]]:
    return [(part.request.request_id, part.num_tokens) for part in parts]


def run_step(
    scheduler: Scheduler, now: float = 0.0, void: set[str] = frozenset(), token: int = 9
) -> list[tuple[str, int]]:
    """Schedule and advance, as if every expert but those of ``void`` requests answered."""
    parts = scheduler.schedule(now)
    voided = {p.request: UNAVAILABLE for p in parts if p.request.request_id in void}
    tokens = {p.request: token for p in parts if p.wants_token and p.request not in voided}
    described = shares(parts)
    scheduler.advance(parts, tokens, voided, now)
    return described


def foreseen(scheduler: Scheduler) -> bool:
    """Whether the step behind the next one is foreseen while that is under way; it is made."""
    parts = scheduler.schedule(0.0)
    seen = scheduler.foresee(parts)
    if seen:
        for part in parts:
            assert part.request.table.num_positions >= len(part.request.token_ids) + 1
    scheduler.advance(parts, {p.request: 9 for p in parts if p.wants_token}, {}, 0.0)
    if seen:
        assert scheduler.schedule(0.0) == parts
    return seen


def test_a_step_is_foreseen_where_the_same_requests_decode_on() -> None:
    scheduler = make_scheduler(num_blocks=9)
    scheduler.add(make_request("a", prompt=1, max_tokens=9))
    scheduler.add(make_request("b", prompt=3, max_tokens=5))
    assert not foreseen(scheduler)  # a prompt
    assert [foreseen(scheduler) for _ in range(4)] == [True, True, True, False]  # "b" ends
    scheduler.add(make_request("c", prompt=2))
    assert not foreseen(scheduler)  # its prompt
    assert foreseen(scheduler)


def test_nothing_is_foreseen_that_nobody_has_blocks_for() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", prompt=2, max_tokens=7))
    scheduler.add(make_request("b", prompt=2, max_tokens=5))
    assert [foreseen(scheduler) for _ in range(3)] == [False, True, False]
    assert scheduler.blocks.num_free == 0
    assert scheduler.counts.preemptions == 0
    run_step(scheduler)
    assert scheduler.counts.preemptions == 1


def test_a_prompt_is_computed_in_chunks_then_one_token_a_step() -> None:
    scheduler = make_scheduler(max_batch_tokens=4)
    request = make_request("a", prompt=6, max_tokens=3)
    scheduler.add(request)
    assert run_step(scheduler) == [("a", 4)]
    assert request.num_outputs == 0
    assert run_step(scheduler) == [("a", 2)]
    assert run_step(scheduler) == [("a", 1)]
    assert run_step(scheduler) == [("a", 1)]
    assert request.end is not None
    assert request.end.finish_reason == "length"
    assert list(request.token_ids) == [1, 2, 3, 4, 5, 6, 9, 9, 9]
    assert run_step(scheduler) == []


def test_running_answers_go_before_prompts() -> None:
    scheduler = make_scheduler(max_batch_tokens=4)
    scheduler.add(make_request("a", prompt=2))
    run_step(scheduler)
    scheduler.add(make_request("b", prompt=9))
    assert run_step(scheduler) == [("a", 1), ("b", 3)]


def test_a_common_prompt_is_computed_once() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add(make_request("a", prompt=7))
    run_step(scheduler)
    second = make_request("b", prompt=7)
    scheduler.add(second)
    assert run_step(scheduler) == [("a", 1), ("b", 1)]
    assert second.num_cached_tokens == 6
    assert (scheduler.counts.prefix_queries, scheduler.counts.prefix_hits) == (14, 6)


def test_what_was_computed_is_found_also_when_it_was_given_back_at_once() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add(make_request("a", prompt=6, max_tokens=1))
    run_step(scheduler)
    scheduler.add(make_request("b", prompt=6))
    assert run_step(scheduler) == [("b", 2)]


def test_a_chunk_is_shared_only_once_it_was_computed() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    scheduler.add(make_request("a", prompt=7))
    scheduler.add(make_request("b", prompt=7))
    assert run_step(scheduler) == [("a", 7), ("b", 7)]


def test_the_newest_gives_way_when_blocks_run_out_and_comes_back() -> None:
    scheduler = make_scheduler(num_blocks=4)
    old = make_request("old", prompt=[1, 2, 3, 4], max_tokens=3)
    new = make_request("new", prompt=[5, 6, 7, 8], max_tokens=2)
    scheduler.add(old)
    scheduler.add(new)
    assert run_step(scheduler) == [("old", 4), ("new", 4)]
    # Both want a third block, and all four are held.
    assert run_step(scheduler) == [("old", 1)]
    assert (new.state, scheduler.counts.preemptions) == (State.WAITING, 1)
    while old.end is None:
        assert run_step(scheduler) == [("old", 1)]
    # Its first block is still in the cache: two prompt tokens, and the one it had chosen.
    assert run_step(scheduler) == [("new", 3)]
    assert new.end is not None
    assert new.num_outputs == 2
    assert scheduler.blocks.num_free == 4


def test_a_prompt_that_gave_way_is_not_in_the_same_step() -> None:
    scheduler = make_scheduler(num_blocks=4, max_batch_tokens=3)
    scheduler.add(make_request("old", prompt=[1, 2], max_tokens=2))
    scheduler.add(make_request("new", prompt=[3, 4, 5, 6, 7, 8], max_tokens=1))
    assert run_step(scheduler) == [("old", 2), ("new", 1)]
    assert run_step(scheduler) == [("old", 1)]
    assert run_step(scheduler) == [("new", 3)]


def test_a_retry_that_gave_way_is_not_in_the_same_step() -> None:
    scheduler = make_scheduler(num_blocks=2)
    scheduler.add(make_request("old", prompt=[1, 2], max_tokens=2))
    scheduler.add(make_request("new", prompt=[3], max_tokens=1))
    assert run_step(scheduler, void={"new"}) == [("old", 2), ("new", 1)]
    assert run_step(scheduler, now=1.0) == [("old", 1)]
    assert run_step(scheduler, now=1.0) == [("new", 1)]


def test_stop_tokens_count_only_from_min_tokens_on() -> None:
    scheduler = make_scheduler()
    eos, stop = frozenset({9}), frozenset({5})
    request = make_request("a", max_tokens=9, min_tokens=3, eos_token_ids=eos, stop_token_ids=stop)
    scheduler.add(request)
    for token in (9, 5, 7, 5):
        assert request.end is None
        run_step(scheduler, token=token)
    assert request.end == ("stop", "5", None)


def test_a_void_step_is_computed_again_and_others_go_on() -> None:
    scheduler = make_scheduler()
    stuck, fine = make_request("stuck", [1, 2, 3]), make_request("fine", [4, 5])
    scheduler.add(stuck)
    scheduler.add(fine)
    run_step(scheduler, now=0.0, void={"stuck"})
    assert (stuck.num_computed, fine.num_computed) == (0, 2)
    assert run_step(scheduler, now=0.01) == [("fine", 1)]
    assert scheduler.next_event_s() == RETRY_INTERVAL_S
    assert run_step(scheduler, now=RETRY_INTERVAL_S) == [("fine", 1), ("stuck", 3)]
    assert (stuck.num_outputs, stuck.stall) == (1, None)


def test_new_routing_ends_the_wait_of_a_stalled_request() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    run_step(scheduler, now=0.0, void={"a"})
    assert run_step(scheduler, now=0.01) == []
    scheduler.routing_changed()
    assert run_step(scheduler, now=0.01) == [("a", 3)]


def test_a_request_is_not_stalled_for_longer_than_the_patience() -> None:
    scheduler = make_scheduler(patience_s=0.4)
    request = make_request("a", deadline_s=9.0)
    scheduler.add(request)
    for tick in range(4):
        assert scheduler.expire(tick * 0.1) == []
        assert run_step(scheduler, now=tick * 0.1, void={"a"}) == [("a", 3)]
    assert scheduler.expire(0.4) == [request]
    assert request.end == ("error", "", UNAVAILABLE)
    assert scheduler.next_event_s() == math.inf


def test_a_request_waits_for_an_expert_that_is_being_loaded_until_nobody_does_any_more() -> None:
    scheduler = make_scheduler(patience_s=0.4)
    request = make_request("a")
    scheduler.add(request)
    for now in (0.0, 10.0, 59.0):
        parts = scheduler.schedule(now)
        scheduler.advance(parts, {}, {request: COMING}, now)
        assert scheduler.expire(now) == []
    assert scheduler.next_event_s() == 59.05
    for now in (59.1, 59.3):
        scheduler.advance(scheduler.schedule(now), {}, {request: UNAVAILABLE}, now)
    assert scheduler.expire(59.4) == []
    assert scheduler.expire(59.5) == [request]


def test_waiting_for_an_expert_that_is_being_loaded_has_an_end() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    scheduler.add(request)
    for now in (0.0, 59.9):
        scheduler.advance(scheduler.schedule(now), {}, {request: COMING}, now)
    assert scheduler.expire(60.0) == [request]
    assert request.end == ("error", "", COMING)


def test_the_deadline_ends_a_request_wherever_it_is() -> None:
    scheduler = make_scheduler(max_running=1)
    running, waiting = make_request("r", deadline_s=2.0), make_request("w", deadline_s=1.0)
    scheduler.add(running)
    scheduler.add(waiting)
    run_step(scheduler)
    assert scheduler.next_event_s() == 1.0
    assert scheduler.expire(1.0) == [waiting]
    assert scheduler.expire(1.5) == []
    assert scheduler.expire(2.0) == [running]
    for request in (running, waiting):
        assert request.end is not None
        assert isinstance(request.end.error, DeadlineExceeded)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_a_stalled_request_ends_at_its_deadline_naming_the_expert() -> None:
    scheduler = make_scheduler()
    request = make_request("a", deadline_s=0.1)
    scheduler.add(request)
    run_step(scheduler, void={"a"})
    assert scheduler.expire(0.1) == [request]
    assert request.end == ("error", "", UNAVAILABLE)


def test_a_full_queue_refuses() -> None:
    scheduler = make_scheduler(max_running=1, max_waiting=1)
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    with pytest.raises(Overloaded, match="0 requests run and 2 wait"):
        scheduler.add(make_request("c"))


def test_a_request_that_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("fits", prompt=5, max_tokens=4))
    with pytest.raises(InvalidInput, match="need 5 KV blocks and the gateway has 4"):
        scheduler.add(make_request("a", prompt=6, max_tokens=4))


def test_an_id_in_flight_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    with pytest.raises(AlreadyExists, match="'a'"):
        scheduler.add(make_request("a"))


def test_cancelling_frees_everything_and_a_late_result_is_dropped() -> None:
    scheduler = make_scheduler()
    request = make_request("a")
    scheduler.add(request)
    parts = scheduler.schedule(0.0)
    assert scheduler.cancel("a") is request
    scheduler.advance(parts, {request: 9}, {}, 0.0)
    assert (request.end, request.num_outputs) == (("cancelled", "", None), 0)
    assert scheduler.cancel("a") is None
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


# Random lives. A model of the KV cache remembers which prefix each position was computed from,
# so that a wrong, stale or void block is seen by whoever reads it.


@dataclass
class World:
    """A scheduler, the KV cache that its steps would write, and how each request ended."""

    scheduler: Scheduler
    written: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)

    def position(self, request: Request, position: int) -> tuple[int, int]:
        return request.table.blocks[position // SIZE], position % SIZE

    def step(self, now: float, void_seeds: frozenset[int]) -> None:
        limits = self.scheduler._limits
        parts = self.scheduler.schedule(now)
        requests = [part.request for part in parts]
        assert len(set(requests)) == len(requests)
        assert sum(part.num_tokens for part in parts) <= limits.max_batch_tokens
        assert self.scheduler.num_running <= limits.max_running
        tokens: dict[Request, int] = {}
        void: dict[Request, MeshError] = {}
        for request, num_tokens, wants_token in parts:
            assert num_tokens > 0
            stop = request.num_computed + num_tokens
            prefix = tuple(request.token_ids[:stop])
            for position in range(request.num_computed):
                written = self.written[self.position(request, position)]
                assert written == prefix[: position + 1]
            is_void = request.sampling.seed in void_seeds
            for position in range(request.num_computed, stop):
                value = (-1,) if is_void else prefix[: position + 1]
                self.written[self.position(request, position)] = value
            if is_void:
                void[request] = UNAVAILABLE
            assert wants_token == (stop == len(request.token_ids))
            if wants_token and not is_void:
                tokens[request] = next_token(prefix)
        self.scheduler.advance(parts, tokens, void, now)
        if len(parts) % 2:  # it may be done sooner than it must
            self.scheduler.publish()
        for request in {*requests, *self.scheduler.expire(now)}:
            self.note(request)

    def note(self, request: Request) -> None:
        if request.end is not None:
            self.ended[request.request_id] = self.ended.get(request.request_id, 0) + 1


def next_token(prefix: tuple[int, ...]) -> int:
    return sum(prefix) % 3


def expected(request: Request) -> list[int]:
    """The output by itself, one token after another."""
    prefix = list(request.token_ids[: request.num_prompt_tokens])
    outputs: list[int] = []
    while len(outputs) < request.sampling.max_tokens:
        outputs.append(next_token(tuple(prefix + outputs)))
        if outputs[-1] in request.sampling.eos_token_ids:
            break
    return outputs


@dataclass(frozen=True)
class Arrive:
    prompt: list[int]
    max_tokens: int
    patience_s: float
    ignore_eos: bool


@dataclass(frozen=True)
class Cancel:
    index: int


@dataclass(frozen=True)
class LoseExperts:
    """From now on, the rows of requests with these seeds come back void."""

    seeds: frozenset[int]


@dataclass(frozen=True)
class Reroute:
    pass


ARRIVE = st.builds(
    Arrive,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    max_tokens=st.integers(1, 8),
    patience_s=st.sampled_from([math.inf, math.inf, 0.3]),
    ignore_eos=st.booleans(),
)
ACTION = st.one_of(
    ARRIVE,
    ARRIVE,
    ARRIVE,
    st.builds(Cancel, st.integers(0, 9)),
    st.builds(LoseExperts, st.frozensets(st.integers(0, 3), max_size=3)),
    st.just(Reroute()),
)


@settings(max_examples=200)
@given(
    actions=st.lists(st.tuples(ACTION, st.integers(0, 3)), min_size=4, max_size=24),
    num_blocks=st.integers(8, 11),
    max_batch_tokens=st.integers(3, 9),
    max_running=st.integers(1, 4),
)
def test_every_request_ends_once_with_its_own_tokens(
    actions: list[tuple[object, int]], num_blocks: int, max_batch_tokens: int, max_running: int
) -> None:
    scheduler = make_scheduler(num_blocks, max_batch_tokens, max_running, max_waiting=99)
    world = World(scheduler)
    requests: list[Request] = []
    void_seeds: frozenset[int] = frozenset()
    now = 0.0
    for action, num_steps in actions:
        match action:
            case Arrive(prompt, max_tokens, patience_s, ignore_eos):
                request = make_request(
                    str(len(requests)),
                    prompt,
                    max_tokens,
                    deadline_s=now + patience_s,
                    eos_token_ids=frozenset(() if ignore_eos else (2,)),
                    seed=len(requests) % 4,
                )
                requests.append(request)
                scheduler.add(request)
            case Cancel(index):
                if (cancelled := scheduler.cancel(str(index))) is not None:
                    world.note(cancelled)
            case LoseExperts(seeds):
                void_seeds = seeds
            case Reroute():
                scheduler.routing_changed()
        for _ in range(num_steps):
            world.step(now, void_seeds)
            now += 0.03
    for _ in range(1000):
        if scheduler.num_running + scheduler.num_waiting == 0:
            break
        world.step(now, frozenset())
        now += 0.03
    assert world.ended == {request.request_id: 1 for request in requests}
    assert scheduler.blocks.num_free == num_blocks
    for request in requests:
        assert request.end is not None
        outputs = list(request.token_ids[request.num_prompt_tokens :])
        if request.end.finish_reason in ("stop", "length"):
            assert outputs == expected(request)
        else:
            assert outputs == expected(request)[: len(outputs)]
            error = request.end.error
            assert error is None or isinstance(error, DeadlineExceeded | ExpertUnavailable)
