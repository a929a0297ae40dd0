"""How the engine puts into messages what it has to say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.request import End, Request
from gateway.sampler import TokenLogprobs
from mesh.plan import ExpertId, expert_to_proto
from protos import engine_pb2 as pb
from protos import inference_pb2, placement_pb2


class Output(NamedTuple):
    """What there is to say of a request: its next token, if there is one, and its end, if it
    has ended."""

    request: Request
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    end: End | None = None


def message_of(outputs: Sequence[Output]) -> pb.Output:
    """Outputs of one request, in order, as one message."""
    request = outputs[0].request
    message = pb.Output(
        request_id=request.request_id,
        token_ids=[output.token_id for output in outputs if output.token_id is not None],
        cached_tokens=request.num_cached_tokens,
        scheduled_s=request.scheduled_s,
    )
    for _, token_id, logprobs, end in outputs:
        if token_id is not None and logprobs is not None:
            message.logprobs.append(_logprobs_of(token_id, logprobs))
        if end is not None:
            message.finish_reason, message.stop_reason, error = end
            if error is not None:
                message.error_code, message.error_message = error.code, str(error)
    return message


class Gathering:
    """Outputs on their way to the front, where each costs a message's share.

    A request's first and last go at once, and all others with them; what is between gathers for
    a time that grows with the number of requests, well below what the front lets replies gather.
    Pure: ``now`` is passed in.
    """

    _S_PER_REQUEST = 0.001
    _LONGEST_S = 0.02

    def __init__(self) -> None:
        self._outputs: dict[str, list[Output]] = {}
        self._begun: set[str] = set()
        self.due_s = math.inf
        """When to take what is here."""

    def add(self, outputs: Sequence[Output], num_requests: int, now: float) -> None:
        """Outputs of a step, of ``num_requests`` that are running or waiting."""
        gathered, begun, urgent = self._outputs, self._begun, False
        for output in outputs:
            request_id = output.request.request_id
            held = gathered.get(request_id)
            if held is None:
                gathered[request_id] = [output]
            else:
                held.append(output)
            if output.end is not None:
                begun.discard(request_id)
                urgent = True
            elif request_id not in begun:
                begun.add(request_id)
                urgent = True
        if urgent:
            self.due_s = min(self.due_s, now)
        elif outputs:
            gather_s = min(num_requests * self._S_PER_REQUEST, self._LONGEST_S)
            self.due_s = min(self.due_s, now + gather_s)

    def take(self) -> list[list[Output]]:
        """All that is here, by request."""
        outputs, self._outputs = list(self._outputs.values()), {}
        self.due_s = math.inf
        return outputs


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
