"""The sampler against a slow one, row by row in plain Python and double precision."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.model.scores import NOT_A_NUMBER, Scores
from gateway.request import Request, Sampling
from gateway.sampler import Sampler, TokenLogprobs

V = 11
EOS = 3


def make_request(
    prompt: list[int] | None = None, outputs: list[int] | None = None, **options: object
) -> Request:
    sampling = Sampling(max_tokens=99, **{"seed": 0, **options})  # type: ignore[arg-type]
    request = Request("r", array("q", prompt or [1, 2]), sampling)
    request.token_ids.extend(outputs or [])
    return request


class Choice(NamedTuple):
    token_id: int
    logprobs: TokenLogprobs | None


def sample(
    logits: list[list[float]], requests: list[Request], sampler: Sampler | None = None
) -> list[Choice | None]:
    scores = Scores(torch.tensor(logits, dtype=torch.float32))
    chosen = (sampler or Sampler()).sample(scores, requests).chosen()
    assert set(chosen.logprobs) == {
        row for row, request in enumerate(requests) if request.sampling.logprobs is not None
    }
    return [
        None if token_id == NOT_A_NUMBER else Choice(token_id, chosen.logprobs.get(row))
        for row, token_id in enumerate(chosen.token_ids)
    ]


def sample_one(logits: list[float], request: Request) -> Choice:
    (choice,) = sample([logits], [request])
    assert choice is not None
    return choice


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [w / sum(weights) for w in weights]


def reference_logits(logits: list[float], request: Request) -> list[float]:
    """After min_tokens and penalties."""
    sampling = request.sampling
    logits = list(logits)
    outputs = Counter(request.token_ids[request.num_prompt_tokens :])
    if request.num_outputs < sampling.min_tokens:
        for token in sampling.eos_token_ids | sampling.stop_token_ids:
            logits[token] = -math.inf
    for token in set(request.token_ids):
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in outputs.items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return logits


def reference_probs(logits: list[float], request: Request) -> list[float]:
    """What a random row is drawn from."""
    sampling = request.sampling
    logits = [x / sampling.temperature for x in reference_logits(logits, request)]
    probs = softmax(logits)
    kept = {t for t in range(V) if probs[t] >= sampling.min_p * max(probs)}
    ranked = sorted(kept, key=lambda t: -probs[t])[: sampling.top_k or V]
    mass = sum(probs[t] for t in ranked)
    nucleus: list[int] = []
    while sum(probs[t] for t in nucleus) < sampling.top_p * mass * (1 - 1e-9):
        nucleus.append(ranked[len(nucleus)])
    total = sum(probs[t] for t in nucleus)
    return [probs[t] / total if t in nucleus else 0.0 for t in range(V)]


def uniform(seed: int, position: int) -> float:
    raw = np.random.Philox(key=seed).random_raw(position + 1)[position]
    return int(raw) / 2**64


TOKENS = st.lists(st.integers(0, V - 1), max_size=9)
OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
        "top_k": st.sampled_from([0, 1, 2, 5, V, 99]),
        "min_p": st.sampled_from([0.0, 0.05, 0.6, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.8]),
        "presence_penalty": st.sampled_from([0.0, -1.0, 0.8]),
        "frequency_penalty": st.sampled_from([0.0, -0.3, 0.4]),
        "min_tokens": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, None, 0, 1, 4, 99]),
        "seed": st.integers(0, 2**64 - 1),
        "eos_token_ids": st.just(frozenset({EOS})),
    }
)


@settings(max_examples=100)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**32 - 1), TOKENS, TOKENS, OPTIONS), min_size=1, max_size=5
    )
)
def test_a_mixed_batch_is_what_the_slow_sampler_gives(
    rows: list[tuple[int, list[int], list[int], dict[str, object]]],
) -> None:
    requests = [make_request(prompt, outputs, **options) for _, prompt, outputs, options in rows]
    logits = [(np.random.default_rng(seed).normal(size=V) * 3).tolist() for seed, *_ in rows]
    for row, request, choice in zip(logits, requests, sample(logits, requests), strict=True):
        assert choice is not None
        row = np.float32(row).tolist()
        sampling = request.sampling
        if sampling.is_greedy:
            scores = reference_logits(row, request)
            assert scores[choice.token_id] == pytest.approx(max(scores), abs=1e-5)
        else:
            probs = reference_probs(row, request)
            assert probs[choice.token_id] > 0
            u = uniform(sampling.seed, request.num_outputs)
            assert sum(probs[: choice.token_id]) <= u + 1e-5
            assert sum(probs[: choice.token_id + 1]) >= u - 1e-5
        check_logprobs(row, choice, sampling.logprobs)


def check_logprobs(logits: list[float], choice: Choice, count: int | None) -> None:
    if count is None:
        assert choice.logprobs is None
        return
    assert choice.logprobs is not None
    expected = [math.log(p) for p in softmax(logits)]
    assert choice.logprobs.chosen == pytest.approx(expected[choice.token_id], abs=1e-4)
    ranked = sorted(range(V), key=lambda t: -expected[t])[:count]
    assert [token for token, _ in choice.logprobs.top] == ranked
    assert [p for _, p in choice.logprobs.top] == pytest.approx(
        [expected[t] for t in ranked], abs=1e-4
    )


def generate(request: Request, sampler: Sampler, beside: list[Request], steps: int) -> list[int]:
    """Decode with logits that depend on the last token alone."""
    for _ in range(steps):
        batch = [*beside, request]
        logits = [(np.random.default_rng(r.token_ids[-1]).normal(size=V)).tolist() for r in batch]
        choices = sample(logits, batch, sampler)
        for each, choice in zip(batch, choices, strict=True):
            assert choice is not None
            each.token_ids.append(choice.token_id)
    return list(request.token_ids[request.num_prompt_tokens :])


def test_a_seeded_request_gives_the_same_tokens_whatever_runs_beside_it() -> None:
    options = {"seed": 7, "top_p": 0.95, "frequency_penalty": 0.3}
    alone = generate(make_request(**options), Sampler(), [], 80)
    others = [
        make_request([4], temperature=0.0),
        make_request([5, 6], seed=8, top_k=3),
        make_request([5, 6], seed=7, repetition_penalty=1.3, logprobs=2),
    ]
    assert generate(make_request(**options), Sampler(), others, 80) == alone
    assert len(set(alone)) > 3


def test_a_sampler_that_forgot_a_request_goes_on_as_if_it_had_not() -> None:
    options = {"seed": 7, "presence_penalty": 0.5}
    whole = generate(make_request(**options), Sampler(), [], 80)
    request = make_request(**options)
    generate(request, Sampler(), [], 70)
    assert generate(request, Sampler(), [], 10) == whole


def test_requests_that_come_and_go_do_not_change_what_others_wish() -> None:
    greedy, seeded = make_request(temperature=0.0, logprobs=1), make_request(seed=3, top_k=2)
    early = make_request(temperature=0.0, min_tokens=9, eos_token_ids=frozenset({EOS, V + 5}))
    punished = make_request([EOS], seed=4, repetition_penalty=1.5)
    sampler = Sampler()
    for batch in (
        [greedy],
        [greedy, early],
        [early],
        [seeded, early],
        [seeded, punished],
        [greedy],
    ):
        logits = [(np.random.default_rng(len(batch)).normal(size=V)).tolist() for _ in batch]
        assert sample(logits, batch, sampler) == sample(logits, batch)


def test_draws_follow_the_distribution() -> None:
    probs = [0.5, 0.25, 0.125, 0.0625, 0.0625]
    logits = [math.log(p) for p in probs]
    requests = [make_request(seed=seed) for seed in range(4000)]
    choices = sample([logits] * len(requests), requests)
    counts = Counter(choice.token_id for choice in choices if choice is not None)
    chi_squared = sum((counts[t] - 4000 * p) ** 2 / (4000 * p) for t, p in enumerate(probs))
    assert chi_squared < 13.28  # 99 % of true samplers, four degrees of freedom


def test_positions_of_one_seed_are_independent_draws() -> None:
    request = make_request(seed=3)
    tokens = []
    for _ in range(2000):
        tokens.append(sample_one([0.0, 0.0], request).token_id)
        request.token_ids.append(tokens[-1])
    assert abs(sum(tokens) - 1000) < 3 * math.sqrt(500)
    repeats = sum(a == b for a, b in pairwise(tokens))
    assert abs(repeats - 1000) < 3 * math.sqrt(500)


def test_equally_likely_tokens_at_the_edge_stay_together() -> None:
    requests = [make_request(seed=seed, top_k=2) for seed in range(200)]
    choices = sample([[2.0, 1.0, 1.0, 1.0, 0.0]] * 200, requests)
    assert {choice.token_id for choice in choices if choice is not None} == {0, 1, 2, 3}


def test_a_cold_request_takes_the_best_token_without_overflow() -> None:
    assert sample_one([1.0, 300.0, 299.0], make_request(temperature=1e-38)).token_id == 1
    assert sample_one([1.0, 300.0, 299.0], make_request(temperature=2e-5)).token_id == 1


def test_min_tokens_forbids_only_what_would_end_the_request() -> None:
    ends = {"eos_token_ids": frozenset({0}), "stop_token_ids": frozenset({1})}
    early = make_request(temperature=0.0, min_tokens=1, **ends)
    ignoring = make_request(temperature=0.0, min_tokens=1)
    assert sample_one([9.0, 8.0, 7.0], early).token_id == 2
    assert sample_one([9.0, 8.0, 7.0], ignoring).token_id == 0
    early.token_ids.append(2)
    assert sample_one([9.0, 8.0, 7.0], early).token_id == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_a_number_harms_no_other(temperature: float) -> None:
    requests = [make_request(temperature=temperature, top_p=0.9, logprobs=1) for _ in range(2)]
    broken, fine = sample([[1.0, math.nan, 0.0], [0.0, 0.0, 99.0]], requests)
    assert broken is None
    assert fine is not None
    assert fine.token_id == 2
