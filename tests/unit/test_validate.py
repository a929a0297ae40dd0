"""Each thing a client may get wrong, and the sentence it gets back."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gateway.validate import (
    Limits,
    check_prompt,
    check_request,
    check_sampling,
    choice_sampling,
)
from mesh.errors import InvalidInput, ModelNotFound
from protos import inference_pb2 as pb

LIMITS = Limits(model="tiny", vocab_size=100, max_model_len=16, max_characters=64)
IDS_ONLY = Limits(model="tiny", vocab_size=100, max_model_len=16, max_characters=0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.5, "temperature -0.5 must be 0"),
        ("temperature", math.nan, "temperature nan"),
        ("temperature", math.inf, "temperature inf"),
        ("top_p", 0.0, "top_p 0 must be above 0 and at most 1"),
        ("top_p", 1.5, "top_p 1.5"),
        ("top_p", math.nan, "top_p nan"),
        ("top_k", -2, "top_k -2 must be 1 or more"),
        ("min_p", -0.1, "min_p -0.1 must be 0 to 1"),
        ("min_p", math.nan, "min_p nan"),
        ("repetition_penalty", 0.0, "repetition_penalty 0 must be above 0"),
        ("repetition_penalty", math.inf, "repetition_penalty inf"),
        ("presence_penalty", 2.5, "presence_penalty 2.5 must be -2 to 2"),
        ("frequency_penalty", -math.inf, "frequency_penalty -inf must be -2 to 2"),
        ("n", 0, "n 0 must be 1 to 16"),
        ("n", 16384, "n 16384 must be 1 to 16"),
        ("max_tokens", 0, "max_tokens 0 must be 1 or more"),
        ("logprobs", 21, "logprobs 21 must be at most 20"),
        ("stop", ["x"] * 1_000_000, "stop has 1000000 strings, more than 16"),
        ("stop", ["x" * 257], "stop has a string of 257 characters, more than 256"),
        ("stop", [""], "stop has an empty string"),
        ("stop_token_ids", range(65), "stop_token_ids has 65 ids, more than 64"),
        ("stop_token_ids", [100], "stop_token_ids has 100, outside the vocabulary of 0 to 99"),
    ],
)
def test_sampling_out_of_bounds_is_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_sampling(pb.SamplingParams(**{field: value}), LIMITS)


def test_defaults_are_filled_in_and_bounds_are_inclusive() -> None:
    checked = check_sampling(pb.SamplingParams(), LIMITS)
    assert (checked.temperature, checked.top_p, checked.top_k, checked.n) == (1.0, 1.0, 0, 1)
    assert (checked.repetition_penalty, checked.skip_special_tokens) == (1.0, True)
    assert not checked.HasField("max_tokens")
    assert not checked.HasField("seed")
    edge = pb.SamplingParams(
        temperature=0, top_k=-1, n=16, logprobs=20, presence_penalty=-2, skip_special_tokens=False
    )
    checked = check_sampling(edge, LIMITS)
    assert (checked.top_k, checked.n, checked.skip_special_tokens) == (0, 16, False)


@pytest.mark.parametrize(
    ("token_ids", "sampling", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([5, 100], {}, "prompt_token_ids has 100, outside the vocabulary of 0 to 99"),
        ([1] * 16, {}, "the prompt has 16 tokens and the context 16; shorten .* at most 15"),
        ([1] * 10, {"max_tokens": 7}, "max_tokens 7 does not fit: .* 10 .* 16 .* leaves 6"),
        ([1], {"max_tokens": 4_000_000_000}, "max_tokens 4000000000 does not fit"),
        ([1], {"max_tokens": 4, "min_tokens": 5}, "min_tokens 5 .* max_tokens 4"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_named(
    token_ids: list[int], sampling: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_prompt(token_ids, pb.SamplingParams(**sampling), LIMITS)


def test_max_tokens_is_what_the_context_leaves_unless_given() -> None:
    assert check_prompt([1] * 10, pb.SamplingParams(), LIMITS) == 6
    assert check_prompt([1] * 10, pb.SamplingParams(max_tokens=6), LIMITS) == 6


@pytest.mark.parametrize(
    ("request_fields", "message"),
    [
        ({}, "the request has no input"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x" * 65}, "prompt has 65 characters; the context of 16 tokens holds 64"),
        ({"prompt": "x", "request_id": "a b"}, "request_id 'a b' must be"),
        ({"prompt": "x", "request_id": "a" * 129}, "request_id"),
        ({"prompt": "x", "request_id": "né"}, "request_id"),
    ],
)
def test_a_request_that_makes_no_sense_is_named(
    request_fields: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        check_request(pb.GenerateRequest(**request_fields), LIMITS)


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="'big' is not served here; ask for 'tiny'"):
        check_request(pb.GenerateRequest(prompt="x", model="big"), LIMITS)
    check_request(pb.GenerateRequest(prompt="x", model="tiny"), LIMITS)


def test_text_without_a_tokenizer_names_the_remedy() -> None:
    with pytest.raises(InvalidInput, match=r"prompt needs a tokenizer .* send prompt_token_ids"):
        check_request(pb.GenerateRequest(prompt="x"), IDS_ONLY)
    with pytest.raises(InvalidInput, match="stop needs a tokenizer"):
        check_sampling(pb.SamplingParams(stop=["x"]), IDS_ONLY)
    check_request(pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1])), IDS_ONLY)


def test_each_choice_has_its_own_seed_and_the_engine_sees_no_stop_strings() -> None:
    sampling = pb.SamplingParams(n=3, seed=2**64 - 1, stop=["x"])
    choices = [choice_sampling(sampling, index, max_tokens=4) for index in range(3)]
    assert [choice.seed for choice in choices] == [2**64 - 1, 0, 1]
    assert all((choice.n, choice.max_tokens, len(choice.stop)) == (1, 4, 0) for choice in choices)
    assert not choice_sampling(pb.SamplingParams(), 1, 4).HasField("seed")
