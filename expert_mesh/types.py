"""What a client sends and gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from protos import inference_pb2 as pb


class Sampling(TypedDict, total=False):
    """How to choose tokens and when to stop; what is left out is the server's default."""

    max_tokens: int
    min_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    logprobs: int
    """How many of the likeliest tokens to report beside the chosen one."""
    n: int
    """Choices; choice i is sampled with seed + i."""


class TokenLogprob(NamedTuple):
    """A token and the logarithm of its probability."""

    token_id: int
    logprob: float


class PositionLogprobs(NamedTuple):
    """The chosen token of a position and the likeliest ones."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


class Usage(NamedTuple):
    """Tokens of a choice; ``cached_tokens`` of the prompt were in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Timing(NamedTuple):
    """Of a choice, in seconds: in the queue, to the first token, per later token, in all."""

    queue_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float


@dataclass(frozen=True)
class Chunk:
    """New text and tokens of one choice. The last one of a choice has a ``finish_reason``."""

    request_id: str
    index: int
    """Of the choice, 0 to n - 1."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: str
    """Empty, or stop, length or cancelled."""
    stop_reason: str
    """The stop string or token id that ended it."""
    usage: Usage | None
    """On the last chunk of a choice, as is ``timing``."""
    timing: Timing | None


@dataclass(frozen=True)
class Choice:
    """One whole output."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: str
    stop_reason: str
    usage: Usage
    timing: Timing


@dataclass(frozen=True)
class Completion:
    """All choices of a request. The properties are those of the first."""

    request_id: str
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def usage(self) -> Usage:
        return self.choices[0].usage

    @property
    def timing(self) -> Timing:
        return self.choices[0].timing


def chunk_of(reply: pb.GenerateReply) -> Chunk:
    """A message of the stream as the client gives it out."""
    usage, timing = reply.usage, reply.timing
    last = reply.finish_reason != ""
    return Chunk(
        request_id=reply.request_id,
        index=reply.index,
        text=reply.text,
        token_ids=tuple(reply.token_ids),
        logprobs=tuple(_logprobs_of(position) for position in reply.logprobs),
        finish_reason=reply.finish_reason,
        stop_reason=reply.stop_reason,
        usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        if last
        else None,
        timing=Timing(timing.queue_s, timing.ttft_s, timing.tpot_s, timing.e2e_s) if last else None,
    )


def _logprobs_of(position: pb.PositionLogprobs) -> PositionLogprobs:
    return PositionLogprobs(
        TokenLogprob(position.chosen.token_id, position.chosen.logprob),
        tuple(TokenLogprob(token.token_id, token.logprob) for token in position.top),
    )


def completion_of(chunks: Iterable[Chunk]) -> Completion:
    """All chunks of a stream that ended well, as one."""
    by_index: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_index.setdefault(chunk.index, []).append(chunk)
    choices = tuple(_choice_of(by_index[index]) for index in sorted(by_index))
    return Completion(by_index[0][0].request_id, choices)


def _choice_of(chunks: list[Chunk]) -> Choice:
    last = chunks[-1]
    if last.usage is None or last.timing is None:
        raise ValueError(f"choice {last.index} has no last chunk")
    return Choice(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        logprobs=tuple(position for chunk in chunks for position in chunk.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        usage=last.usage,
        timing=last.timing,
    )
