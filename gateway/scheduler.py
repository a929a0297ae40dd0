"""Which tokens are computed in the next step. Pure: `now` comes in, decisions go out.

Decode rows go first, so that no prompt holds up a running answer; what is left of the token
budget goes to prompts, in chunks. A request that is admitted holds the blocks of all its
known tokens; when a running one needs a block more and none is free, the newest running
request gives its blocks back and waits at the head of the queue, to be computed again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gateway.kv_blocks import BlockAllocator
from gateway.request import End, Request, Stall, State
from mesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidInput,
    MeshError,
    Overloaded,
)

RETRY_INTERVAL_S = 0.05
"""How often a stalled request is tried again while the routing stays as it is."""


@dataclass(frozen=True)
class Limits:
    """What one step and one queue may hold."""

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    expert_patience_s: float
    """How long a request waits for an expert that nobody serves."""
    expert_loading_patience_s: float
    """How long in all while somebody may soon."""


class Part(NamedTuple):
    """One request's share of a step: its next ``num_tokens`` tokens."""

    request: Request
    num_tokens: int
    wants_token: bool
    """Whether the step reaches the end of what is known, so that a token can be chosen."""


class Advanced(NamedTuple):
    """What a step changed."""

    ended: list[Request]
    resumed: list[tuple[Request, float]]
    """Who was stalled before, and for how long."""


@dataclass
class Counts:
    """What happened since the start."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    stalled_s: float = 0.0
    """Summed over requests that went on again."""


class Scheduler:
    """Owns the requests from :meth:`add` until they end, and the blocks they hold.

    A step is a tuple of parts from :meth:`schedule`; :meth:`advance` says what came of it
    before the next is scheduled. Both lists are in the order of arrival, always: requests are
    admitted from the head of the queue and the newest is preempted back to it.
    """

    def __init__(self, blocks: BlockAllocator, limits: Limits) -> None:
        self.blocks = blocks
        self.counts = Counts()
        self._limits = limits
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._decoding: tuple[list[Request], list[Part]] = [], []
        """Who decoded in the last step, and its parts: they mostly do again."""
        self._unpublished: list[Request] = []
        """Who had blocks filled since the last :meth:`publish`."""
        self.next_expiry_s = math.inf
        """No deadline and no patience ends before; it may be early, never late."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises Overloaded when the queue is full, AlreadyExists for an id in flight, and
        InvalidInput for a request whose tokens exceed all KV blocks.
        """
        limits = self._limits
        if request.request_id in self._requests:
            raise AlreadyExists(f"request {request.request_id!r} is in flight; choose another id")
        if len(self._requests) >= limits.max_running + limits.max_waiting:
            raise Overloaded(
                f"{self.num_running} requests run and {self.num_waiting} wait, which is all this "
                "gateway takes; try again later, or raise max_waiting"
            )
        # The last output token is never an input.
        num_tokens = request.num_prompt_tokens + request.sampling.max_tokens - 1
        if (needed := self.blocks.blocks_for(num_tokens)) > self.blocks.num_blocks:
            raise InvalidInput(
                f"prompt and max_tokens need {needed} KV blocks and the gateway has "
                f"{self.blocks.num_blocks}; ask for fewer tokens, or raise kv_memory_bytes"
            )
        self._requests[request.request_id] = request
        self._waiting.append(request)
        self.next_expiry_s = min(self.next_expiry_s, request.deadline_s)

    def cancel(self, request_id: str) -> Request | None:
        """End a request now, wherever it is; None when there is no such request."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, End("cancelled"))
        return request

    def fail(self, request: Request, error: MeshError) -> None:
        """End a live request with an error."""
        self._end(request, End("error", error=error))

    def fail_all(self, error: MeshError) -> list[Request]:
        """End every request with an error."""
        requests = list(self._requests.values())
        for request in requests:
            self.fail(request, error)
        return requests

    def expire(self, now: float) -> list[Request]:
        """End what is past its deadline, or has been stalled for longer than the patience."""
        if now < self.next_expiry_s:
            return []
        expired = [r for r in self._requests.values() if self._expiry_s(r) <= now]
        for request in expired:
            self.fail(request, request.stall.error if request.stall else _deadline_error(request))
        self.next_expiry_s = min(map(self._expiry_s, self._requests.values()), default=math.inf)
        return expired

    def next_event_s(self) -> float:
        """When there may be something to do after an empty step, if nobody else calls before."""
        retries = (request.stall.retry_at_s for request in self._running if request.stall)
        return min(self.next_expiry_s, min(retries, default=math.inf))

    def routing_changed(self) -> None:
        """Try stalled requests again at once."""
        for request in self._running:
            if request.stall is not None:
                request.stall = request.stall._replace(retry_at_s=-math.inf)

    def schedule(self, now: float) -> tuple[Part, ...]:
        """The parts of the next step, at most one a request; empty when nothing can run."""
        budget = self._limits.max_batch_tokens
        num_preemptions = self.counts.preemptions
        decoding: list[Request] = []
        prefills: list[Request] = []
        running = State.RUNNING
        for request in tuple(self._running):
            if request.stall is not None and request.stall.retry_at_s > now:
                continue
            num_tokens = len(request.token_ids)
            if num_tokens - request.num_computed > 1:
                prefills.append(request)
            elif (
                budget > 0
                and request.state is running
                and (num_tokens <= request.table.num_positions or self._grow(request))
            ):
                decoding.append(request)
                budget -= 1
        if decoding != self._decoding[0]:
            self._decoding = decoding, [Part(request, 1, True) for request in decoding]
        parts = list(self._decoding[1])
        # A later one may have been preempted for the sake of an earlier one.
        for request in prefills:
            if budget > 0 and request.state is running:
                parts.append(_chunk(request, budget))
                budget -= parts[-1].num_tokens
        # Blocks are short after a preemption: a newcomer would only be the next to go.
        while budget > 0 and self.counts.preemptions == num_preemptions and self._admit(now):
            parts.append(_chunk(self._running[-1], budget))
            budget -= parts[-1].num_tokens
        return tuple(parts)

    def advance(
        self,
        parts: tuple[Part, ...],
        tokens: Mapping[Request, int],
        void: Mapping[Request, ExpertUnavailable],
        now: float,
    ) -> Advanced:
        """Take in what a step computed.

        ``tokens`` has the chosen token of each part that wants one; ``void`` the requests with
        a row that no expert answered. A void part did not happen: its keys and values are
        computed again, and it waits until it may be retried.
        """
        ended: list[Request] = []
        resumed: list[tuple[Request, float]] = []
        num_generated = 0
        block_size, running = self.blocks.block_size, State.RUNNING
        for request, num_tokens, wants_token in parts:
            if request.state is not running:
                continue
            if void and request in void:
                request.stall = self._stall(request.stall, void[request], now)
                self.next_expiry_s = min(self.next_expiry_s, self._expiry_s(request))
                continue
            if request.stall is not None:
                resumed.append((request, now - request.stall.since_s))
                request.stall = None
            num_computed = request.num_computed = request.num_computed + num_tokens
            if num_computed % block_size < num_tokens:
                self._unpublished.append(request)
            if wants_token:
                if num_computed == request.num_prompt_tokens:
                    self.counts.prompt_tokens += num_computed
                num_generated += 1
                end = request.append(tokens[request])
                if end is not None:
                    self._end(request, end)
                    ended.append(request)
        self.counts.generation_tokens += num_generated
        self.counts.stalled_s += sum(stalled_s for _, stalled_s in resumed)
        return Advanced(ended, resumed)

    def foresee(self, parts: tuple[Part, ...]) -> bool:
        """Whether the step behind this one, which is not through, is of the same requests with a
        token each, unless one ends that need not. They hold blocks for that token then."""
        if self._waiting or len(parts) != len(self._running):
            return False
        for request, num_tokens, wants_token in parts:
            last = request.num_outputs + 1 >= request.sampling.max_tokens
            if num_tokens > 1 or not wants_token or last or request.stall is not None:
                return False
            num_positions = len(request.token_ids) + 1
            if num_positions > request.table.num_positions and not request.table.grow(
                self.blocks, num_positions
            ):
                return False
        return True

    def publish(self) -> None:
        """Let newcomers find the blocks that were filled. It is done before anybody looks for
        them or they are given back, but may be done sooner, when there is time."""
        for request in self._unpublished:
            if request.state is State.RUNNING:
                request.table.publish(self.blocks, request.token_ids, request.num_computed)
        self._unpublished.clear()

    def _stall(self, before: Stall | None, error: ExpertUnavailable, now: float) -> Stall:
        """Patience without hope begins when hope ends; with it, when the request first stalled."""
        since_s = now if before is None else before.since_s
        until_s = since_s + self._limits.expert_loading_patience_s
        if not error.coming:
            if before is None or before.error.coming:
                until_s = min(until_s, now + self._limits.expert_patience_s)
            else:
                until_s = before.until_s
        return Stall(since_s, until_s, now + RETRY_INTERVAL_S, error)

    def _admit(self, now: float) -> bool:
        """Move the head of the queue to the running, if there is one and it has room."""
        if not self._waiting or len(self._running) >= self._limits.max_running:
            return False
        self.publish()
        request = self._waiting[0]
        num_cached = request.table.hold(self.blocks, request.token_ids)
        if num_cached is None:
            return False
        self._running.append(self._waiting.popleft())
        request.state = State.RUNNING
        request.num_computed = num_cached
        if request.scheduled_s is None:
            request.scheduled_s = now
            request.num_cached_tokens = num_cached
            self.counts.prefix_queries += request.num_prompt_tokens
            self.counts.prefix_hits += num_cached
        return True

    def _grow(self, request: Request) -> bool:
        """Hold blocks for all known tokens; False when the request itself had to give way."""
        while not request.table.grow(self.blocks, len(request.token_ids)):
            newest = self._running.pop()
            self.counts.preemptions += 1
            self._waiting.appendleft(newest)
            self._give_back(newest)
            newest.num_computed = 0
            newest.state = State.WAITING
            newest.stall = None  # From here on it waits for blocks, not for an expert.
            if newest is request:
                return False
        return True

    def _give_back(self, request: Request) -> None:
        """All its blocks; those that are full stay findable."""
        request.table.publish(self.blocks, request.token_ids, request.num_computed)
        request.table.release(self.blocks)

    def _expiry_s(self, request: Request) -> float:
        if request.stall is None:
            return request.deadline_s
        return min(request.deadline_s, request.stall.until_s)

    def _end(self, request: Request, end: End) -> None:
        if request.state is State.RUNNING:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        del self._requests[request.request_id]
        self._give_back(request)
        request.state = State.ENDED
        request.end = end


def _chunk(request: Request, budget: int) -> Part:
    """As much of what it has pending as the budget allows."""
    num_tokens = min(budget, request.num_pending)
    return Part(request, num_tokens, num_tokens == request.num_pending)


def _deadline_error(request: Request) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"request {request.request_id!r} ran into its deadline after {request.num_outputs} "
        "tokens; allow it more time, or ask for fewer tokens"
    )
