"""One step of the engine: schedule, forward, sample, publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import structlog
import torch

from gateway.engine_outputs import Output, loads_of
from gateway.micro_batches import MicroBatch, requests_of_rows, split, to_batch
from gateway.model.batch import Experts, ForwardBatch
from gateway.model.scores import NOT_A_NUMBER, Scores
from gateway.request import End, Request, State
from gateway.sampler import Chosen, Sampled, Sampler
from gateway.scheduler import Part, Scheduler
from mesh.errors import EngineDied, ExpertUnavailable, MeshError
from mesh.plan import ExpertId
from protos import engine_pb2 as pb
from protos import inference_pb2

log = structlog.get_logger()

MAX_FAILURES = 3
"""Steps that may fail in a row before the engine gives up."""

Forward = Callable[[Sequence[ForwardBatch], Experts], list[Scores]]
"""The decoder with its KV cache: the scores of each micro-batch."""


class MeshExperts(Experts, Protocol):
    """What the engine needs of :class:`gateway.dispatch.Dispatcher`."""

    epoch: int
    refused: int
    replayed_rows: int
    failovers: int
    expert_wait_s: float
    pause_s: float
    on_away: Callable[[], None]

    @property
    def rows_by_expert(self) -> Mapping[ExpertId, int]: ...

    def begin_step(self, num_micro_batches: int) -> None: ...

    def void_rows(self) -> Mapping[tuple[int, int], ExpertUnavailable]: ...

    def set_routing(self, routing: pb.Routing) -> None: ...

    def paces(self) -> Sequence[inference_pb2.WorkerPace]: ...


class Ahead(Protocol):
    """A device that runs a step before the host knows the tokens of the one before; see
    :class:`gateway.model.decode_graphs.DecodeGraphs`."""

    def foresee(self, block_tables: Sequence[tuple[int, ...]], likeliest: bool) -> bool:
        """Asked while a step is under way whose every sequence decodes on, each with these blocks:
        whether :meth:`go_on` may be called behind it. Where each is to go on with its ``likeliest``
        token, that may come about by itself."""
        ...

    def go_on(self, token_ids_N: torch.Tensor) -> bool:
        """Begin the next step of the same sequences with these tokens (int64, on the device), one
        each. Whether it was begun; it may be dropped for another step."""
        ...

    def proceed(self) -> Callable[[], Scores] | None:
        """What runs the step that was begun, experts and all, and gives the scores of all
        sequences; they may lie where the last step's lay, and are made after the experts'
        ``on_away`` was called. None where it cannot be run any more."""
        ...


class _Computed(NamedTuple):
    """What came of a step whose tokens the host need not know yet."""

    parts: tuple[Part, ...]
    wanting: list[Request]
    """Who wanted a token and gets one."""
    sampled: Sampled | None
    """Of each of them; None: of nobody."""
    void: Mapping[Request, ExpertUnavailable]
    """Who had a row that no expert answered."""


class _Unsaid(NamedTuple):
    """What a step gave, until it is said."""

    wanting: list[Request]
    chosen: Chosen
    ended: list[Request]


class Engine:
    """Requests in, outputs out. One thread owns it.

    Each request brings exactly one output with an end, its last. A step of at least
    ``overlap_tokens`` (None: no step) is two micro-batches: one's attention hides the other's
    experts.

    Between a step's tokens and the next step a GPU has nothing to do, so what the next one does
    not need is left to :meth:`catch_up`, which the experts call while rows are away. Where the next
    step can be foreseen, ``ahead`` begins it as soon as the device knows the tokens. The host
    *settles* a step, takes in its tokens, while rows of the next are away: rows of who ended with
    them are wanted by nobody then. Whatever changes requests in between settles first, and what
    was begun is dropped.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        forward: Forward,
        experts: MeshExperts,
        sampler: Sampler,
        *,
        overlap_tokens: int | None = None,
        ahead: Ahead | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._forward = forward
        self._experts = experts
        experts.on_away = self._while_away
        self.on_away: Callable[[], None] = lambda: None
        """Called in every layer while rows are away, once this engine has caught up: time for a
        little of what nobody waits for."""
        self._sampler = sampler
        self._overlap_tokens = math.inf if overlap_tokens is None else overlap_tokens
        self._ahead = ahead
        self._to_foresee: tuple[Part, ...] = ()
        """The parts of the step that is under way, until somebody has looked what follows."""
        self._foreseen = False
        """Whether the step behind that is of the same parts, of which none has ended."""
        self._unsettled: _Computed | None = None
        """The last step, if the next of the same parts is begun, until its tokens are taken in."""
        self._clock = clock
        self._outputs: list[Output] = []
        self._unsaid: _Unsaid | None = None
        """The last step that is settled, until :meth:`catch_up`."""
        self._num_steps = 0
        self._step_s = 0.0
        self._host_s = 0.0
        self._launched_s = 0.0
        self._idle_since_s: float | None = None
        """When the last step's tokens came, if another follows directly."""
        self._failures = 0

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return self._scheduler.num_running + self._scheduler.num_waiting

    def submit(self, request: Request) -> None:
        """Queue a request; if it is refused, that is its output."""
        try:
            self._scheduler.add(request)
        except MeshError as error:
            self._outputs.append(Output(request, end=End("error", error=error)))
        else:
            log.info("request_queued", request_id=request.request_id)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End requests; ids that are not known have ended already."""
        self._settle()
        for request_id in request_ids:
            request = self._scheduler.cancel(request_id)
            if request is not None:
                self._say_end(request)

    def fail_all(self, error: MeshError) -> None:
        """End every request with an error."""
        self._settle()
        for request in self._scheduler.fail_all(error):
            self._say_end(request)

    def set_routing(self, routing: pb.Routing) -> None:
        """Route by another epoch from the next step on."""
        self._experts.set_routing(routing)
        self._scheduler.routing_changed()

    def next_event_s(self) -> float:
        """When to call :meth:`step` again after it had nothing to do, if nothing else happens."""
        return self._scheduler.next_event_s()

    def take_outputs(self) -> list[Output]:
        """What there is to say since the last call; of a step behind which the next is begun, only
        once that is under way."""
        self.catch_up()
        outputs, self._outputs = self._outputs, []
        return outputs

    def step(self) -> bool:
        """Compute one step; False when there was nothing to do.

        A step that raises ends the requests that were in it. Raises EngineDied after
        MAX_FAILURES of these in a row.
        """
        started_s = self._clock()
        proceed = self._what_was_begun()
        if self._unsettled is None:
            parts = self._scheduler.schedule(started_s)
        else:
            parts = self._unsettled.parts
        idle_since_s, self._idle_since_s = self._idle_since_s, None
        if parts:
            try:
                if proceed is None:
                    self._compute(parts, started_s if idle_since_s is None else idle_since_s)
                else:
                    self._proceed(parts, proceed)
            except EngineDied:
                raise
            except Exception as error:  # whatever it was, the other requests go on
                self._settle()
                self._fail(parts, error)
            self._num_steps += 1
            self._step_s += self._clock() - started_s
        expired: list[Request] = []
        if self._clock() >= self._scheduler.next_expiry_s:
            self._settle()
            expired = self._scheduler.expire(self._clock())
        for request in expired:
            self._say_end(request)
        return bool(parts or expired)

    def launching(self) -> None:
        """Say, amid the forward, that it is about to give the device its first work; what was
        before was the host's time. Where that is not said, it is when the forward begins."""
        self._launched_s = self._clock()

    def _what_was_begun(self) -> Callable[[], Scores] | None:
        """What runs it. None, and all steps are settled: there is nothing, it cannot be run, or a
        newcomer would have to wait for it."""
        if self._unsettled is None or self._ahead is None:
            return None
        proceed = None if self._scheduler.num_waiting else self._ahead.proceed()
        if proceed is None:
            self._settle()
        return proceed

    @torch.inference_mode()
    def _compute(self, parts: tuple[Part, ...], idle_since_s: float) -> None:
        """A step that was scheduled."""
        micro_batches, num_tokens = [parts], sum([num_tokens for _, num_tokens, _ in parts])
        if num_tokens >= self._overlap_tokens:
            micro_batches = split(parts)
        alike = self._ahead is not None and num_tokens == len(parts) and len(micro_batches) == 1
        self._to_foresee, self._foreseen = parts if alike else (), False
        self._experts.begin_step(len(micro_batches))
        batches = [to_batch(micro_batch, self._scheduler.blocks) for micro_batch in micro_batches]
        self.launching()
        scores = Scores.joined(self._forward(batches, self._experts))
        self._host_s += self._launched_s - idle_since_s
        wanting = [part.request for part in parts if part.wants_token]
        self._sample(parts, wanting, micro_batches, scores)

    @torch.inference_mode()
    def _proceed(self, parts: tuple[Part, ...], proceed: Callable[[], Scores]) -> None:
        """A step that was begun, of the same parts as the one before."""
        assert self._unsettled is not None
        wanting = self._unsettled.wanting
        self._to_foresee, self._foreseen = parts, False
        scores = proceed()
        self._settle()
        self._sample(parts, wanting, [parts], scores)

    def _sample(
        self,
        parts: tuple[Part, ...],
        wanting: list[Request],
        micro_batches: list[MicroBatch],
        scores: Scores,
    ) -> None:
        """Choose the tokens, and begin the next step with them where it is foreseen."""
        rows = self._experts.void_rows()
        void = requests_of_rows(micro_batches, rows) if rows else {}
        if void or not self._foreseen:
            kept = [
                row
                for row, request in enumerate(wanting)
                if request.state is State.RUNNING and request not in void
            ]
            if len(kept) < len(wanting):
                scores, wanting = scores.of_rows(kept), [wanting[row] for row in kept]
        sampled = self._sampler.sample(scores, wanting) if wanting else None
        begun = (
            self._ahead is not None
            and sampled is not None
            and self._foreseen
            and not void
            and self._ahead.go_on(sampled.token_ids_N)
        )
        self._unsettled = _Computed(parts, wanting, sampled, void)
        if not begun:
            self._settle()

    def _settle(self) -> None:
        """Take in the tokens of the last step, if that is still to be done. Where a device does not
        give them, that step has failed."""
        computed, self._unsettled = self._unsettled, None
        if computed is None:
            return
        self.catch_up()
        sampled = computed.sampled
        try:
            chosen = Chosen([], {}) if sampled is None else sampled.chosen()
        except Exception as error:
            self._fail(computed.parts, error)
        else:
            self._idle_since_s = self._clock()
            self._advance(computed, chosen)

    def _advance(self, computed: _Computed, chosen: Chosen) -> None:
        parts, wanting, _, void = computed
        if wanting:
            self._failures = 0
        now = self._clock()
        for request, error in void.items():
            if request.stall is None and request.state is State.RUNNING:
                log.warning("request_stalled", request_id=request.request_id, why=str(error))
        tokens = dict(zip(wanting, chosen.token_ids, strict=True))
        ended = []
        if NOT_A_NUMBER in chosen.token_ids:
            ended = [request for request, token in tokens.items() if token == NOT_A_NUMBER]
            for request in ended:
                self._scheduler.fail(request, _nan_error(request))
        advanced = self._scheduler.advance(parts, tokens, void, now)
        for request, stalled_s in advanced.resumed:
            log.info("request_resumed", request_id=request.request_id, after_s=round(stalled_s, 3))
        self._unsaid = _Unsaid(wanting, chosen, ended + advanced.ended)

    def catch_up(self) -> None:
        """Do what the last step left."""
        if self._unsaid is None:
            return
        wanting, (token_ids, logprobs), ended = self._unsaid
        self._unsaid = None
        said = [
            Output(request, token_id) for request, token_id in zip(wanting, token_ids, strict=True)
        ]
        if logprobs or ended:
            ending = set(ended)
            for row, (request, token_id, _, _) in enumerate(said):
                if token_id == NOT_A_NUMBER:
                    said[row] = Output(request, end=request.end)
                elif row in logprobs or request in ending:
                    end = request.end if request in ending else None
                    said[row] = Output(request, token_id, logprobs.get(row), end)
        self._outputs += said
        for request in ended:
            _log_end(request)
        self._scheduler.publish()

    def _while_away(self) -> None:
        if self._unsettled is not None:
            self._settle()
        elif self._unsaid is not None:
            self.catch_up()
        elif self._to_foresee:
            parts, self._to_foresee = self._to_foresee, ()
            self._foreseen = self._scheduler.foresee(parts) and self._foresee(parts)
        else:
            self.on_away()

    def _foresee(self, parts: tuple[Part, ...]) -> bool:
        requests = [part.request for part in parts]
        tables = [request.table.blocks for request in requests]
        likeliest = self._sampler.takes_likeliest(requests)
        return self._ahead is not None and self._ahead.foresee(tables, likeliest)

    def _say_end(self, request: Request) -> None:
        self.catch_up()
        self._outputs.append(Output(request, end=request.end))
        _log_end(request)

    def _fail(self, parts: tuple[Part, ...], cause: Exception) -> None:
        log.exception("step_failed", requests=[part.request.request_id for part in parts])
        error = cause
        if not isinstance(error, MeshError):
            error = MeshError(f"the step of this request failed: {cause!r}; see the gateway's log")
        for request in [part.request for part in parts if part.request.state is State.RUNNING]:
            self._scheduler.fail(request, error)
            self._say_end(request)
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise EngineDied(f"{MAX_FAILURES} steps in a row failed, the last with {cause!r}")

    def stats(self) -> pb.EngineStats:
        """What happened since the start, and what there is now."""
        scheduler, counts = self._scheduler, self._scheduler.counts
        return pb.EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_usage=scheduler.blocks.usage,
            steps=self._num_steps,
            prompt_tokens=counts.prompt_tokens,
            generation_tokens=counts.generation_tokens,
            preemptions=counts.preemptions,
            prefix_queries=counts.prefix_queries,
            prefix_hits=counts.prefix_hits,
            load=loads_of(self._experts.rows_by_expert),
            step_s=self._step_s,
            host_s=self._host_s,
            expert_wait_s=self._experts.expert_wait_s,
            epoch=self._experts.epoch,
            refused=self._experts.refused,
            replayed_rows=self._experts.replayed_rows,
            failovers=self._experts.failovers,
            pause_s=self._experts.pause_s,
            paces=self._experts.paces(),
            stalled_s=counts.stalled_s,
        )


def _log_end(request: Request) -> None:
    if request.end is not None:
        reason = request.end.finish_reason
        log.info("request_ended", request_id=request.request_id, reason=reason)


def _nan_error(request: Request) -> MeshError:
    return MeshError(
        f"the model's output for request {request.request_id!r} is not a number; "
        "if it goes on, serve it with --dtype bfloat16 or float32"
    )
