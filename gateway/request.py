"""One request as the engine knows it."""

from __future__ import annotations

import math
import secrets
from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple

from gateway.kv_blocks import BlockTable, TokenIds
from mesh.errors import ExpertUnavailable, MeshError
from protos import engine_pb2, inference_pb2

GREEDY_TEMPERATURE = 1e-5
"""Below it the softmax is the argmax in float32, and dividing by it may overflow."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop. The front checked the values."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = field(default_factory=lambda: secrets.randbits(64))
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()
    """Empty where the end of sequence is to be ignored."""
    min_tokens: int = 0
    logprobs: int | None = None
    """How many of the likeliest tokens to report beside the chosen one; None: no logprobs."""

    @staticmethod
    def from_proto(
        message: inference_pb2.SamplingParams, eos_token_ids: tuple[int, ...]
    ) -> Sampling:
        """Read what the front checked and filled in; an absent seed becomes a random one."""
        return Sampling(
            max_tokens=message.max_tokens,
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            seed=message.seed if message.HasField("seed") else secrets.randbits(64),
            stop_token_ids=frozenset(message.stop_token_ids),
            eos_token_ids=frozenset(() if message.ignore_eos else eos_token_ids),
            min_tokens=message.min_tokens,
            logprobs=message.logprobs if message.HasField("logprobs") else None,
        )

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """All that end a request from its min_tokens on."""
        return self.eos_token_ids | self.stop_token_ids

    @cached_property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @cached_property
    def has_penalties(self) -> bool:
        """Whether tokens that were seen before are weighed differently."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class State(Enum):
    """Where a request is in its life."""

    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class End(NamedTuple):
    """How a request ended. Exactly one for each request."""

    finish_reason: str
    """stop, length, cancelled or error."""
    stop_reason: str = ""
    """The stop token id that ended it."""
    error: MeshError | None = None


class Stall(NamedTuple):
    """A request that no expert answers for the time being."""

    since_s: float
    until_s: float
    """When it ends with ``error``."""
    retry_at_s: float
    """It is not scheduled before."""
    error: ExpertUnavailable
    """What it ends with if that does not change."""


@dataclass(eq=False)
class Request:
    """A prompt on its way to its output. Mutated by the scheduler alone."""

    request_id: str
    token_ids: TokenIds
    """Prompt, then output."""
    sampling: Sampling
    deadline_s: float = math.inf
    num_prompt_tokens: int = field(init=False)
    num_computed: int = 0
    """Leading tokens whose keys and values are in the blocks of ``table``."""
    table: BlockTable = field(default_factory=BlockTable)
    state: State = State.WAITING
    end: End | None = None
    num_cached_tokens: int = 0
    """Of the prompt, found in the prefix cache when it was first scheduled."""
    scheduled_s: float | None = None
    """When it was first scheduled."""
    stall: Stall | None = None
    """Set while its rows come back void."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @staticmethod
    def from_proto(message: engine_pb2.Submit, eos_token_ids: tuple[int, ...]) -> Request:
        """Take over what the front submits."""
        return Request(
            request_id=message.request_id,
            token_ids=array("q", message.prompt_token_ids),
            sampling=Sampling.from_proto(message.sampling, eos_token_ids),
            deadline_s=message.deadline_s or math.inf,
        )

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far; also the position of the next one in its random stream."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Known tokens that are still to be computed; at least 1 while it lives."""
        return len(self.token_ids) - self.num_computed

    def append(self, token_id: int) -> End | None:
        """Take the next output token; how the request ends with it, if it does."""
        token_ids, sampling = self.token_ids, self.sampling
        token_ids.append(token_id)
        num_outputs = len(token_ids) - self.num_prompt_tokens
        if token_id in sampling.end_token_ids and num_outputs >= sampling.min_tokens:
            if token_id in sampling.eos_token_ids:
                return End("stop")
            return End("stop", str(token_id))
        return End("length") if num_outputs >= sampling.max_tokens else None
