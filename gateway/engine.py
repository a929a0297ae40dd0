"""One step of the engine: schedule, forward, sample, publish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import structlog
import torch

from gateway.engine_outputs import Output, loads_of
from gateway.micro_batches import requests_of_rows, split, to_batch
from gateway.model.batch import Experts, ForwardBatch
from gateway.model.scores import NOT_A_NUMBER, Scores
from gateway.request import End, Request
from gateway.sampler import Chosen, Sampler
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


class _Computed(NamedTuple):
    """What came of a step."""

    wanting: list[Request]
    """Who wanted a token and gets one."""
    chosen: Chosen
    """Of each of them."""
    void: Mapping[Request, ExpertUnavailable]
    """Who had a row that no expert answered."""


class Engine:
    """Requests in, outputs out. One thread owns it.

    Each request brings exactly one output with an end, its last. A step of at least
    ``overlap_tokens`` (None: no step) is two micro-batches: one's attention hides the other's
    experts.

    Between a step's tokens and the next step a GPU has nothing to do, so what the next one does
    not need is left to :meth:`catch_up`, which the experts call while rows are away. Where the next
    step can be foreseen, ``go_on`` begins it as soon as the device knows the tokens (int64, one a
    row), before the host does; it says whether it could.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        forward: Forward,
        experts: MeshExperts,
        sampler: Sampler,
        *,
        overlap_tokens: int | None = None,
        go_on: Callable[[torch.Tensor], bool] | None = None,
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
        self._go_on = go_on
        self._to_foresee: tuple[Part, ...] = ()
        """The parts of the step that is under way, until somebody has looked what follows."""
        self._foreseen = False
        self._begun = False
        """Whether the device has begun the next step."""
        self._clock = clock
        self._outputs: list[Output] = []
        self._unsaid: tuple[_Computed, list[Request]] | None = None
        """The last step, and who ended with it, until :meth:`catch_up`."""
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
        for request_id in request_ids:
            request = self._scheduler.cancel(request_id)
            if request is not None:
                self._say_end(request)

    def fail_all(self, error: MeshError) -> None:
        """End every request with an error."""
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
        """What there is to say since the last call."""
        self.catch_up()
        outputs, self._outputs = self._outputs, []
        return outputs

    def step(self) -> bool:
        """Compute one step; False when there was nothing to do.

        A step that raises ends the requests that were in it. Raises EngineDied after
        MAX_FAILURES of these in a row.
        """
        started_s = self._clock()
        parts = self._scheduler.schedule(started_s)
        idle_since_s, self._idle_since_s = self._idle_since_s, None
        if parts:
            try:
                computed = self._compute(parts, started_s if idle_since_s is None else idle_since_s)
            except Exception as error:  # whatever it was, the other requests go on
                self._fail(parts, error)
            else:
                self._advance(parts, computed)
            self._num_steps += 1
            self._step_s += self._clock() - started_s
        expired = self._scheduler.expire(self._clock())
        for request in expired:
            self._say_end(request)
        return bool(parts or expired)

    def launching(self) -> None:
        """Say, amid the forward, that it is about to give the device its first work; what was
        before was the host's time. Where that is not said, it is when the forward begins."""
        self._launched_s = self._clock()

    @torch.inference_mode()
    def _compute(self, parts: tuple[Part, ...], idle_since_s: float) -> _Computed:
        """Forward and sample."""
        micro_batches, num_tokens = [parts], sum([num_tokens for _, num_tokens, _ in parts])
        if num_tokens >= self._overlap_tokens:
            micro_batches = split(parts)
        begun, self._begun, self._foreseen = self._begun, False, False
        alike = self._go_on is not None and num_tokens == len(parts) and len(micro_batches) == 1
        self._to_foresee = parts if alike else ()
        self._experts.begin_step(len(micro_batches))
        batches = [to_batch(micro_batch, self._scheduler.blocks) for micro_batch in micro_batches]
        self.launching()
        scores = Scores.joined(self._forward(batches, self._experts))
        if not begun:
            self._host_s += self._launched_s - idle_since_s
        self.catch_up()
        void = requests_of_rows(micro_batches, self._experts.void_rows())
        wanting = [part.request for part in parts if part.wants_token]
        if void:
            kept = [row for row, request in enumerate(wanting) if request not in void]
            scores, wanting = scores.of_rows(kept), [wanting[row] for row in kept]
        self._foreseen = self._foreseen and not void
        chosen = self._sampler.sample(scores, wanting, self._begin) if wanting else Chosen([], {})
        self._idle_since_s = self._clock()
        return _Computed(wanting, chosen, void)

    def _begin(self, token_ids_N: torch.Tensor) -> None:
        if self._foreseen and self._go_on is not None:
            self._begun = self._go_on(token_ids_N)

    def _advance(self, parts: tuple[Part, ...], computed: _Computed) -> None:
        self._failures = 0
        wanting, (token_ids, _), void = computed
        now = self._clock()
        for request, error in void.items():
            if request.stall is None:
                log.warning("request_stalled", request_id=request.request_id, why=str(error))
        tokens = dict(zip(wanting, token_ids, strict=True))
        ended = []
        if NOT_A_NUMBER in token_ids:
            ended = [request for request, token in tokens.items() if token == NOT_A_NUMBER]
            for request in ended:
                self._scheduler.fail(request, _nan_error(request))
        advanced = self._scheduler.advance(parts, tokens, void, now)
        for request, stalled_s in advanced.resumed:
            log.info("request_resumed", request_id=request.request_id, after_s=round(stalled_s, 3))
        self._unsaid = computed, ended + advanced.ended

    def catch_up(self) -> None:
        """Do what the last step left."""
        if self._unsaid is None:
            return
        (wanting, (token_ids, logprobs), _), ended = self._unsaid
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
        if self._unsaid is not None:
            self.catch_up()
        elif self._to_foresee:
            parts, self._to_foresee = self._to_foresee, ()
            self._foreseen = self._scheduler.foresee(parts)
        else:
            self.on_away()

    def _say_end(self, request: Request) -> None:
        self.catch_up()
        self._outputs.append(Output(request, end=request.end))
        _log_end(request)

    def _fail(self, parts: tuple[Part, ...], cause: Exception) -> None:
        log.exception("step_failed", requests=[part.request.request_id for part in parts])
        error = cause
        if not isinstance(error, MeshError):
            error = MeshError(f"the step of this request failed: {cause!r}; see the gateway's log")
        for part in parts:
            self._scheduler.fail(part.request, error)
            self._say_end(part.request)
        self._failures += 1
        if self._failures == MAX_FAILURES:
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
