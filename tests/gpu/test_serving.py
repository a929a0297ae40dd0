"""A whole mesh on one GPU: a gateway and sixteen workers share it and answer as the CPU does."""

from __future__ import annotations

import pytest

from expert_mesh import Client
from tests.running import DEMO_MODEL, running_mesh

PROMPTS = [
    "In the beginning",
    "The old man said",
    "She",
    "It was a dark and stormy night, and " * 8,
]
NUM_TOKENS = 48


def _answers(target: str) -> list[list[int]]:
    with Client(target) as client:
        return [
            list(
                client.complete(
                    prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
                ).token_ids
            )
            for prompt in PROMPTS
        ]


@pytest.fixture(scope="module")
def cpu_answers() -> list[list[int]]:
    with running_mesh("--model", DEMO_MODEL) as mesh:
        return _answers(mesh.gateway)


@pytest.mark.parametrize("flags", [[], ["--experts-per-worker", "4"], ["--overlap-tokens", "1"]])
def test_greedy_tokens_in_float32_are_those_of_the_cpu(
    cpu_answers: list[list[int]], flags: list[str]
) -> None:
    with running_mesh(
        "--model", DEMO_MODEL, "--device", "cuda", "--dtype", "float32", *flags
    ) as mesh:
        assert _answers(mesh.gateway) == cpu_answers
        with Client(mesh.gateway) as client:
            # Left in the middle: its blocks and rows are others' afterwards.
            for _ in zip(range(3), client.generate(PROMPTS[3], max_tokens=200), strict=False):
                pass
        assert _answers(mesh.gateway) == cpu_answers


def test_bfloat16_begins_as_float32_does(cpu_answers: list[list[int]]) -> None:
    """Rounding parts them sooner or later, but not at once and not everywhere."""
    with running_mesh("--model", DEMO_MODEL, "--device", "cuda", "--dtype", "bfloat16") as mesh:
        answers = _answers(mesh.gateway)
    assert all(ours[0] == theirs[0] for ours, theirs in zip(answers, cpu_answers, strict=True))
    equal = sum(
        a == b
        for ours, theirs in zip(answers, cpu_answers, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert equal > NUM_TOKENS
