"""Every family served by real workers, against its oracle: what a client gets, token by token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from expert_mesh import AsyncClient, Client
from expert_mesh.types import Choice
from tests.families import FAMILIES, PLAIN, make_checkpoint
from tests.integration.test_families import TOLERANCE, make_prompts, oracle, plain_oracle
from tests.running import running_mesh

NUM_TOP = 20
GREEDY = {"temperature": 0.0, "ignore_eos": True, "logprobs": NUM_TOP}
# One expert of a layer on each of 16 workers; four on each of 4, prefill in chunks; all on one.
EP16: tuple[str, ...] = ("--workers", "16")
EP4 = ("--workers", "4", "--experts-per-worker", "4", "--max-batch-tokens", "24")
EP4 += ("--max-running", "8")
EP1 = ("--workers", "1", "--experts-per-worker", "16")


async def all_at_once(target: str, prompts: list[list[int]], num_new: int) -> list[Choice]:
    async with AsyncClient(target) as client:
        done = await asyncio.gather(
            *(client.complete(prompt, max_tokens=num_new, **GREEDY) for prompt in prompts)
        )
    return [completion.choices[0] for completion in done]


def one_by_one(target: str, prompts: list[list[int]], num_new: int) -> list[Choice]:
    with Client(target) as client:
        return [
            client.complete(prompt, max_tokens=num_new, **GREEDY).choices[0] for prompt in prompts
        ]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
def test_served_tokens_and_logits_are_the_oracles(family: str, tmp_path: Path) -> None:
    directory = make_checkpoint(family, tmp_path, seed=2)
    plain = family == PLAIN
    prompts, num_new = make_prompts((5, 12, 1) if plain else (5, 37, 1, 64)), 12 if plain else 64
    answer = plain_oracle if plain else oracle
    expected = [answer(directory, prompt, num_new) for prompt in prompts]

    served = {}
    for name, flags in (("EP16", EP16), ("EP4", EP4), ("EP1", EP1)):
        with running_mesh("--model", directory, *flags) as mesh:
            served[name] = one_by_one(mesh.gateway, prompts, num_new)
            together = asyncio.run(all_at_once(mesh.gateway, prompts, num_new))
        for choices in (served[name], together):
            for choice, (_, tokens) in zip(choices, expected, strict=True):
                assert list(choice.token_ids) == tokens, f"{family} {name}"

    for choice, prompt, (logits_TV, _) in zip(served["EP16"], prompts, expected, strict=True):
        rows_NV = logits_TV[len(prompt) - 1 : -1].log_softmax(dim=-1)
        scale = float(logits_TV.abs().max())
        for position, row_V in zip(choice.logprobs, rows_NV, strict=True):
            for token_id, logprob in position.top:
                assert abs(logprob - float(row_V[token_id])) < TOLERANCE * scale
    # Where the experts are does not change a bit: equal batches give equal floats.
    for one, sixteen in zip(served["EP1"], served["EP16"], strict=True):
        assert one.logprobs == sixteen.logprobs
