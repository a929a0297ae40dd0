"""How the engine puts into messages what it has to say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gateway.request import Request
from gateway.sampler import Choice, TokenLogprobs
from mesh.errors import MeshError
from mesh.plan import ExpertId, expert_to_proto
from protos import engine_pb2 as pb
from protos import inference_pb2, placement_pb2


def output_of(request: Request, choice: Choice | None = None) -> pb.Output:
    """A request's news: its next token, if there is one, and its end, if it has ended."""
    output = pb.Output(
        request_id=request.request_id,
        cached_tokens=request.num_cached_tokens,
        scheduled_s=request.scheduled_s,
    )
    if choice is not None:
        output.token_ids.append(choice.token_id)
        if choice.logprobs is not None:
            output.logprobs.append(_logprobs_of(choice.token_id, choice.logprobs))
    if request.end is not None:
        output.finish_reason, output.stop_reason, error = request.end
        if error is not None:
            output.error_code, output.error_message = error.code, str(error)
    return output


class Gathering:
    """Outputs on their way to the front, where each costs a message's share.

    A request's first and last go at once, and all others with them; what is between gathers for
    a time that grows with the number of requests, well below what the front lets replies gather.
    Pure: ``now`` is passed in.
    """

    _S_PER_REQUEST = 0.001
    _LONGEST_S = 0.02

    def __init__(self) -> None:
        self._outputs: dict[str, pb.Output] = {}
        self._begun: set[str] = set()
        self.due_s = math.inf
        """When to take what is here."""

    def add(self, outputs: Sequence[pb.Output], num_requests: int, now: float) -> None:
        """Outputs of a step, of ``num_requests`` that are running or waiting."""
        for output in outputs:
            held = self._outputs.setdefault(output.request_id, output)
            if held is not output:
                held.MergeFrom(output)
            gather_s = min(num_requests * self._S_PER_REQUEST, self._LONGEST_S)
            if output.finish_reason:
                self._begun.discard(output.request_id)
                gather_s = 0.0
            elif output.request_id not in self._begun:
                self._begun.add(output.request_id)
                gather_s = 0.0
            self.due_s = min(self.due_s, now + gather_s)

    def take(self) -> list[pb.Output]:
        """All that is here, one output of each request."""
        outputs, self._outputs = list(self._outputs.values()), {}
        self.due_s = math.inf
        return outputs


def refusal_of(request_id: str, error: MeshError) -> pb.Output:
    """The only output of a request that was not taken."""
    return pb.Output(
        request_id=request_id,
        finish_reason="error",
        error_code=error.code,
        error_message=str(error),
    )


def loads_of(rows_by_expert: Mapping[ExpertId, int]) -> list[placement_pb2.ExpertLoad]:
    """Rows that were dispatched to each expert since the start."""
    return [
        placement_pb2.ExpertLoad(expert=expert_to_proto(expert), rows=rows)
        for expert, rows in rows_by_expert.items()
    ]


def _logprobs_of(token_id: int, logprobs: TokenLogprobs) -> inference_pb2.PositionLogprobs:
    return inference_pb2.PositionLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=token_id, logprob=logprobs.chosen),
        top=[inference_pb2.TokenLogprob(token_id=t, logprob=p) for t, p in logprobs.top],
    )
