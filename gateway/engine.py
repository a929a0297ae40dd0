"""One step of the engine: schedule, forward, sample, publish.

Legend: N rows that want a token, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog
import torch

from gateway.engine_outputs import loads_of, output_of, refusal_of
from gateway.micro_batches import requests_of_rows, split, to_batch
from gateway.model.batch import Experts, ForwardBatch
from gateway.request import Request
from gateway.sampler import Choice, Sampler
from gateway.scheduler import Part, Scheduler
from mesh.errors import EngineDied, ExpertUnavailable, MeshError
from mesh.plan import ExpertId
from protos import engine_pb2 as pb
from protos import inference_pb2

log = structlog.get_logger()

MAX_FAILURES = 3
"""Steps that may fail in a row before the engine gives up."""

Forward = Callable[[Sequence[ForwardBatch], Experts], list[torch.Tensor]]
"""The decoder with its KV cache: float32 logits_NV of each micro-batch."""


class MeshExperts(Experts, Protocol):
    """What the engine needs of :class:`gateway.dispatch.Dispatcher`."""

    epoch: int
    refused: int
    replayed_rows: int
    failovers: int
    expert_wait_s: float
    pause_s: float

    @property
    def rows_by_expert(self) -> Mapping[ExpertId, int]: ...

    def begin_step(self, num_micro_batches: int) -> None: ...

    def void_rows(self) -> Mapping[tuple[int, int], ExpertUnavailable]: ...

    def set_routing(self, routing: pb.Routing) -> None: ...

    def paces(self) -> Sequence[inference_pb2.WorkerPace]: ...


class Engine:
    """Requests in, outputs out. One thread owns it.

    Each request brings exactly one output with a finish reason, its last. A step of at least
    ``overlap_tokens`` (None: no step) is two micro-batches: one's attention hides the other's
    experts.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        forward: Forward,
        experts: MeshExperts,
        sampler: Sampler,
        *,
        overlap_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._forward = forward
        self._experts = experts
        self._sampler = sampler
        self._overlap_tokens = math.inf if overlap_tokens is None else overlap_tokens
        self._clock = clock
        self._outputs: list[pb.Output] = []
        self._num_steps = 0
        self._step_s = 0.0
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
            self._outputs.append(refusal_of(request.request_id, error))
        else:
            log.info("request_queued", request_id=request.request_id)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """End requests; ids that are not known have ended already."""
        for request_id in request_ids:
            request = self._scheduler.cancel(request_id)
            if request is not None:
                self._tell(request)

    def fail_all(self, error: MeshError) -> None:
        """End every request with an error."""
        for request in self._scheduler.fail_all(error):
            self._tell(request)

    def set_routing(self, routing: pb.Routing) -> None:
        """Route by another epoch from the next step on."""
        self._experts.set_routing(routing)
        self._scheduler.routing_changed()

    def next_event_s(self) -> float:
        """When to call :meth:`step` again after it had nothing to do, if nothing else happens."""
        return self._scheduler.next_event_s()

    def take_outputs(self) -> list[pb.Output]:
        """What there is to say since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def step(self) -> bool:
        """Compute one step; False when there was nothing to do.

        A step that raises ends the requests that were in it. Raises EngineDied after
        MAX_FAILURES of these in a row.
        """
        started_s = self._clock()
        parts = self._scheduler.schedule(started_s)
        if parts:
            try:
                choices, void = self._compute(parts)
            except Exception as error:  # whatever it was, the other requests go on
                self._fail(parts, error)
            else:
                self._advance(parts, choices, void)
            self._num_steps += 1
            self._step_s += self._clock() - started_s
        expired = self._scheduler.expire(self._clock())
        for request in expired:
            self._tell(request)
        return bool(parts or expired)

    @torch.inference_mode()
    def _compute(
        self, parts: tuple[Part, ...]
    ) -> tuple[dict[Request, Choice | None], dict[Request, ExpertUnavailable]]:
        """Forward and sample: the chosen tokens, and the requests with void rows."""
        num_tokens = sum(part.num_tokens for part in parts)
        micro_batches = split(parts) if num_tokens >= self._overlap_tokens else [parts]
        self._experts.begin_step(len(micro_batches))
        batches = [to_batch(micro_batch, self._scheduler.blocks) for micro_batch in micro_batches]
        logits = self._forward(batches, self._experts)
        void = requests_of_rows(micro_batches, self._experts.void_rows())
        logits_NV = logits[0] if len(logits) == 1 else torch.cat(logits)
        wanting = [part.request for part in parts if part.wants_token]
        if void:
            kept = [row for row, request in enumerate(wanting) if request not in void]
            logits_NV, wanting = logits_NV[kept], [wanting[row] for row in kept]
        if not wanting:
            return {}, void
        choices = self._sampler.sample(logits_NV, wanting)
        return dict(zip(wanting, choices, strict=True)), void

    def _advance(
        self,
        parts: tuple[Part, ...],
        choices: Mapping[Request, Choice | None],
        void: Mapping[Request, ExpertUnavailable],
    ) -> None:
        self._failures = 0
        now = self._clock()
        for request, error in void.items():
            if request.stall is None:
                log.warning("request_stalled", request_id=request.request_id, why=str(error))
        for request, _ in parts:
            if request.stall is not None and request not in void:
                stalled_s = round(now - request.stall.since_s, 3)
                log.info("request_resumed", request_id=request.request_id, after_s=stalled_s)
        tokens = {}
        for request, choice in choices.items():
            if choice is None:
                self._scheduler.fail(request, _nan_error(request))
            else:
                tokens[request] = choice.token_id
        self._scheduler.advance(parts, tokens, void, now)
        for request, choice in choices.items():
            self._tell(request, choice)

    def _tell(self, request: Request, choice: Choice | None = None) -> None:
        self._outputs.append(output_of(request, choice))
        if request.end is not None:
            reason = request.end.finish_reason
            log.info("request_ended", request_id=request.request_id, reason=reason)

    def _fail(self, parts: tuple[Part, ...], cause: Exception) -> None:
        log.exception("step_failed", requests=[part.request.request_id for part in parts])
        error = cause
        if not isinstance(error, MeshError):
            error = MeshError(f"the step of this request failed: {cause!r}; see the gateway's log")
        for request, _ in parts:
            self._scheduler.fail(request, error)
            self._tell(request)
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
            expert_wait_s=self._experts.expert_wait_s,
            epoch=self._experts.epoch,
            refused=self._experts.refused,
            replayed_rows=self._experts.replayed_rows,
            failovers=self._experts.failovers,
            pause_s=self._experts.pause_s,
            paces=self._experts.paces(),
            stalled_s=counts.stalled_s,
        )


def _nan_error(request: Request) -> MeshError:
    return MeshError(
        f"the model's output for request {request.request_id!r} is not a number; "
        "if it goes on, serve it with --dtype bfloat16 or float32"
    )
