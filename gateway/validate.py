"""The door: what a client may ask for. Pure checks; what passes is trusted from here on.

Every check raises InvalidInput (or ModelNotFound) with a sentence that names the field, its
value and the bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh.errors import InvalidInput, ModelNotFound
from protos import inference_pb2 as pb

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SEEDS = 1 << 64
_DEFAULTS = pb.SamplingParams(
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    n=1,
    skip_special_tokens=True,
)


@dataclass(frozen=True)
class Limits:
    """What this gateway serves."""

    model: str
    vocab_size: int
    max_model_len: int
    """Tokens of prompt and output together."""
    max_characters: int
    """Of a text: no longer one fits the context. 0: there is no tokenizer, and no text."""
    defaults: pb.SamplingParams = field(default_factory=pb.SamplingParams)
    """The checkpoint's own, before ours."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidInput(message)


def check_request(request: pb.GenerateRequest, limits: Limits) -> pb.SamplingParams:
    """Check all that needs no tokens; the sampling parameters with their defaults filled in."""
    check_request_id(request.request_id)
    check_model(request.model, limits)
    check_input(request, limits)
    return check_sampling(request.sampling, limits)


def check_request_id(request_id: str) -> None:
    """Empty (the server makes one), or a name that is safe in logs and metrics."""
    _require(
        request_id == "" or _REQUEST_ID.fullmatch(request_id) is not None,
        f"request_id {request_id[:128]!r} must be 1 to 128 of letters, digits and . _ : -",
    )


def check_model(model: str, limits: Limits) -> None:
    """Empty, or the served model's name. Raises ModelNotFound."""
    if model not in ("", limits.model):
        raise ModelNotFound(
            f"model {model[:128]!r} is not served here; ask for {limits.model!r} "
            "or leave model empty"
        )


def check_input(request: pb.GenerateRequest, limits: Limits) -> None:
    """One of prompt and prompt_token_ids, not empty, and of a kind this gateway can read."""
    kind = request.WhichOneof("input")
    _require(kind is not None, "the request has no input; give prompt or prompt_token_ids")
    if kind == "prompt":
        check_text(request.prompt, "prompt", limits)
        _require(request.prompt != "", "prompt is empty; give at least one token")


def check_text(text: str, field: str, limits: Limits) -> None:
    """A text that is worth the work of tokenizing it."""
    require_tokenizer(limits, field)
    _require(
        len(text) <= limits.max_characters,
        f"{field} has {len(text)} characters; the context of {limits.max_model_len} tokens holds "
        f"{limits.max_characters} at the very most: shorten it",
    )


def require_tokenizer(limits: Limits, field: str) -> None:
    """Refuse what cannot be done with token ids alone."""
    _require(
        limits.max_characters > 0,
        f"{field} needs a tokenizer and {limits.model!r} has no tokenizer.json; "
        "send prompt_token_ids and stop_token_ids instead",
    )


def check_prompt(token_ids: Sequence[int], sampling: pb.SamplingParams, limits: Limits) -> int:
    """Check the prompt and that its output fits behind it; the max_tokens to generate."""
    _require(len(token_ids) > 0, "the prompt has no tokens; give at least one")
    largest = max(token_ids)
    _require(
        largest < limits.vocab_size,
        f"prompt_token_ids has {largest}, outside the vocabulary of 0 to {limits.vocab_size - 1}",
    )
    room = limits.max_model_len - len(token_ids)
    _require(
        room >= 1,
        f"the prompt has {len(token_ids)} tokens and the context {limits.max_model_len}; "
        f"shorten the prompt to at most {limits.max_model_len - 1}",
    )
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else room
    _require(
        max_tokens <= room,
        f"max_tokens {max_tokens} does not fit: the prompt has {len(token_ids)} of the context's "
        f"{limits.max_model_len} tokens, which leaves {room}",
    )
    _require(
        sampling.min_tokens <= max_tokens,
        f"min_tokens {sampling.min_tokens} must not be above max_tokens {max_tokens}",
    )
    return max_tokens


def check_sampling(sampling: pb.SamplingParams, limits: Limits) -> pb.SamplingParams:
    """Check each field by itself; a copy with every default filled in but max_tokens."""
    checked = filled(limits.defaults, sampling)
    check_numbers(checked)
    check_stop(checked, limits)
    checked.top_k = max(checked.top_k, 0)
    return checked


def filled(*given: pb.SamplingParams) -> pb.SamplingParams:
    """What the last one says, else the one before it, else our defaults."""
    merged = pb.SamplingParams()
    for one in (_DEFAULTS, *given):
        merged.MergeFrom(one)
    return merged


def check_numbers(sampling: pb.SamplingParams) -> None:
    """The ranges of the numbers. Written so that NaN fails each of them."""
    temperature = sampling.temperature
    _require(
        0 <= temperature < math.inf,
        f"temperature {temperature:g} must be 0 (greedy) or more, and finite",
    )
    _require(0 < sampling.top_p <= 1, f"top_p {sampling.top_p:g} must be above 0 and at most 1")
    _require(sampling.top_k >= -1, f"top_k {sampling.top_k} must be 1 or more, or 0 or -1 for all")
    _require(0 <= sampling.min_p <= 1, f"min_p {sampling.min_p:g} must be 0 to 1")
    _require(
        0 < sampling.repetition_penalty < math.inf,
        f"repetition_penalty {sampling.repetition_penalty:g} must be above 0, and finite",
    )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        _require(-2 <= value <= 2, f"{name} {value:g} must be -2 to 2")
    _require(1 <= sampling.n <= MAX_CHOICES, f"n {sampling.n} must be 1 to {MAX_CHOICES}")
    _require(
        not sampling.HasField("max_tokens") or sampling.max_tokens >= 1,
        f"max_tokens {sampling.max_tokens} must be 1 or more",
    )
    _require(
        sampling.logprobs <= MAX_LOGPROBS,
        f"logprobs {sampling.logprobs} must be at most {MAX_LOGPROBS}",
    )


def check_stop(sampling: pb.SamplingParams, limits: Limits) -> None:
    """Bounds of the stop strings and stop token ids."""
    count = len(sampling.stop)
    _require(count <= MAX_STOP_STRINGS, f"stop has {count} strings, more than {MAX_STOP_STRINGS}")
    for stop in sampling.stop:
        _require(stop != "", "stop has an empty string; leave it out")
        _require(
            len(stop) <= MAX_STOP_CHARACTERS,
            f"stop has a string of {len(stop)} characters, more than {MAX_STOP_CHARACTERS}",
        )
    if count > 0:
        require_tokenizer(limits, "stop")
    count = len(sampling.stop_token_ids)
    _require(
        count <= MAX_STOP_TOKEN_IDS,
        f"stop_token_ids has {count} ids, more than {MAX_STOP_TOKEN_IDS}",
    )
    for token_id in sampling.stop_token_ids:
        _require(
            token_id < limits.vocab_size,
            f"stop_token_ids has {token_id}, outside the vocabulary of 0 to "
            f"{limits.vocab_size - 1}",
        )


def choice_sampling(sampling: pb.SamplingParams, index: int, max_tokens: int) -> pb.SamplingParams:
    """What the engine gets for choice ``index``: one choice, its own seed, no stop strings."""
    choice = pb.SamplingParams()
    choice.CopyFrom(sampling)
    choice.n = 1
    choice.max_tokens = max_tokens
    del choice.stop[:]
    if choice.HasField("seed"):
        choice.seed = (choice.seed + index) % _SEEDS
    return choice
