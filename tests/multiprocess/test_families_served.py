"""Every family served by real workers, against its oracle: what a client gets, token by token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from torch import Tensor

from expert_mesh import AsyncClient, Client
from expert_mesh.types import Choice
from tests.families import FAMILIES, make_checkpoint
from tests.integration.test_families import NUM_GREEDY, TOLERANCE, make_prompts, oracle_of
from tests.running import running_mesh

NUM_TOP = 20
GREEDY = {"temperature": 0.0, "ignore_eos": True, "logprobs": NUM_TOP}
# One expert of a layer on each of 16 workers; four on each of 4; all on one; prefill in chunks.
LAYOUTS = {
    "16 workers": ["--workers", "16"],
    "4 workers": ["--workers", "4", "--experts-per-worker", "4"],
    "1 worker": ["--workers", "1", "--experts-per-worker", "16"],
}
IN_CHUNKS = [*LAYOUTS["4 workers"], "--max-batch-tokens", "24", "--max-running", "8"]
# Whose rows do not depend on the rows beside them. Of the others a tensor library multiplies
# some, and who happens to be in a batch may change a last bit.
ROW_BY_ROW = ("mixtral", "qwen3_moe", "olmoe")


async def all_at_once(target: str, prompts: list[list[int]]) -> list[Choice]:
    async with AsyncClient(target) as client:
        done = await asyncio.gather(
            *(client.complete(prompt, max_tokens=NUM_GREEDY, **GREEDY) for prompt in prompts)
        )
    return [completion.choices[0] for completion in done]


def one_by_one(target: str, prompts: list[list[int]]) -> list[Choice]:
    with Client(target) as client:
        return [
            client.complete(prompt, max_tokens=NUM_GREEDY, **GREEDY).choices[0]
            for prompt in prompts
        ]


def assert_logprobs(choice: Choice, logits_NV: Tensor, how: str) -> None:
    """Those of a choice's tokens, and of the likeliest at each position, are the oracle's."""
    scale = float(logits_NV.abs().max())
    for position, row_V in zip(choice.logprobs, logits_NV.log_softmax(dim=-1), strict=True):
        assert len(position.top) == NUM_TOP
        for token_id, logprob in position.top:
            assert abs(logprob - float(row_V[token_id])) < TOLERANCE * scale, how


@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", FAMILIES)
def test_served_tokens_and_logits_are_the_oracles(family: str, tmp_path: Path) -> None:
    directory = make_checkpoint(family, tmp_path, seed=2)
    prompts = make_prompts()
    expected = [oracle_of(family)(directory, prompt, NUM_GREEDY) for prompt in prompts]

    alone: dict[str, list[Choice]] = {}
    together: dict[str, list[Choice]] = {}
    for layout, flags in (LAYOUTS | {"in chunks": IN_CHUNKS}).items():
        with running_mesh("--model", directory, *flags) as mesh:
            alone[layout] = one_by_one(mesh.gateway, prompts)
            together[layout] = asyncio.run(all_at_once(mesh.gateway, prompts))

    for served in (alone, together):
        for layout, choices in served.items():
            for choice, prompt, (logits_TV, tokens) in zip(choices, prompts, expected, strict=True):
                assert list(choice.token_ids) == tokens, layout
                assert_logprobs(choice, logits_TV[len(prompt) - 1 : -1], layout)
    # Where the experts are does not change a bit: equal batches give equal floats.
    for served in (alone, together) if family in ROW_BY_ROW else (alone,):
        for layout in LAYOUTS:
            for choice, other in zip(served[layout], served["16 workers"], strict=True):
                assert choice.logprobs == other.logprobs, layout
