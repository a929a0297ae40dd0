"""Every family against its oracle: ``transformers`` on the same weights, in float32.

Of the plain family, which ``transformers`` does not have, the oracle is tests/reference_plain.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gateway.model.batch import ForwardBatch, SequenceSlice
from gateway.model.decoder import Decoder
from gateway.model.kv_cache import KvCache
from gateway.model.scores import Scores
from mesh.checkpoint import Checkpoint
from mesh.errors import CheckpointError
from mesh.model_config import ModelConfig
from tests.families import (
    FAMILIES,
    PLAIN,
    VOCAB_SIZE,
    as_old_config,
    edit_config,
    make_checkpoint,
)
from tests.local_experts import LocalExperts
from tests.reference_plain import PlainReference

BLOCK = 4
NUM_GREEDY = 64
LENGTHS = (5, 37, 1, 64)
TOLERANCE = 1e-4


def make_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Prompts of mixed lengths, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]


class Served:
    """A checkpoint served in this process, as the engine would serve it."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config = ModelConfig.from_hf(directory)
        self.experts = LocalExperts(directory, self.config, dtype=dtype)
        with Checkpoint(directory) as checkpoint:
            self.decoder = Decoder.load(self.config, checkpoint, "cpu", dtype)
        self.dtype = dtype

    def run(
        self, prompts: list[list[int]], num_new: int, chunk: int, micro_batches: int = 1
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Logits of every position, and ``num_new`` greedy tokens of each prompt.

        Each step takes up to ``chunk`` tokens of every prompt that is not yet read, and one of
        every sequence that is: prefill and decode meet in one batch. Blocks are taken from all
        over the cache as sequences grow.
        """
        needed = sum(-(-(len(prompt) + num_new) // BLOCK) for prompt in prompts)
        kv = KvCache(self.config, needed, BLOCK, "cpu", self.dtype)
        free = torch.randperm(needed, generator=torch.Generator().manual_seed(1)).tolist()
        tokens = [list(prompt) for prompt in prompts]
        tables: list[list[int]] = [[] for _ in prompts]
        logits: list[list[Tensor]] = [[] for _ in prompts]
        while True:
            going = [
                n for n, prompt in enumerate(prompts) if len(logits[n]) < len(prompt) + num_new
            ]
            if not going:
                break
            parts = [going[part::micro_batches] for part in range(micro_batches)]
            batches, counts = [], []
            for part in (part for part in parts if part):
                slices, ids = [], []
                for n in part:
                    cached = len(logits[n])
                    new = tokens[n][cached : cached + chunk]
                    while len(tables[n]) * BLOCK < cached + len(new):
                        tables[n].append(free.pop())
                    slices.append(SequenceSlice(cached, len(new), tuple(tables[n])))
                    ids.extend(new)
                    counts.append((n, len(new)))
                batches.append(
                    ForwardBatch.of(tuple(slices), torch.tensor(ids), torch.arange(len(ids)))
                )
            rows = Scores.joined(self.decoder.forward(batches, kv, self.experts)).logits_NV
            for n, count in counts:
                new_rows, rows = rows[:count], rows[count:]
                logits[n].extend(new_rows)
                if len(logits[n]) == len(tokens[n]) < len(prompts[n]) + num_new:
                    tokens[n].append(int(new_rows[-1].argmax()))
        new_tokens = [
            sequence[len(prompt) :] for sequence, prompt in zip(tokens, prompts, strict=True)
        ]
        return [torch.stack(rows) for rows in logits], new_tokens


def load_transformers(directory: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.inference_mode()
def oracle(directory: Path, prompt: list[int], num_new: int) -> tuple[Tensor, list[int]]:
    """What :meth:`Served.run` should say of one prompt; ``num_new`` steps of greedy choice."""
    model = load_transformers(directory)
    out = model(torch.tensor([prompt]), use_cache=True)
    rows, tokens = [out.logits[0]], []
    for _ in range(num_new):
        tokens.append(int(rows[-1][-1].argmax()))
        out = model(
            torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True
        )
        rows.append(out.logits[0])
    return torch.cat(rows), tokens


def plain_oracle(directory: Path, prompt: list[int], num_new: int) -> tuple[Tensor, list[int]]:
    """The same of the plain family, whose reference has no cache: every reading begins anew.

    So it reads a guess of the whole, and again with its own token wherever it chooses another:
    what it ends with is what it would have written by itself, whatever the guess was.
    """
    model = PlainReference(directory)
    tokens = Served(directory).run([prompt], num_new, 1000)[1][0]
    while True:
        logits_TV = model.logits(prompt + tokens)
        choices = logits_TV[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
        if choices == tokens:
            return logits_TV.float(), tokens
        wrong = next(n for n, token in enumerate(tokens) if choices[n] != token)
        tokens = tokens[:wrong] + choices[wrong:]


def oracle_of(family: str) -> Callable[[Path, list[int], int], tuple[Tensor, list[int]]]:
    """Who knows what a family's checkpoint should say."""
    return plain_oracle if family == PLAIN else oracle


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < TOLERANCE * theirs.abs().max()


@dataclass(frozen=True)
class Case:
    """A served checkpoint and what its oracle said."""

    served: Served
    prompts: list[list[int]]
    logits: list[Tensor]
    tokens: list[list[int]]


@pytest.fixture(
    scope="module",
    params=[(family, storage) for family in FAMILIES for storage in ("hub", "current")],
    ids=lambda param: "-".join(param),
)
def case(request, tmp_path_factory) -> Case:
    """``hub``: one file, a tensor for each expert, the old style of config.json.
    ``current``: several files, experts fused (where a family can be), the new style."""
    family, storage = request.param
    current = storage == "current"
    directory = make_checkpoint(
        family, tmp_path_factory.mktemp(family), fused=current, sharded=current, seed=2
    )
    if family != PLAIN and not current:
        as_old_config(directory)
    prompts = make_prompts()
    answers = [oracle_of(family)(directory, prompt, NUM_GREEDY) for prompt in prompts]
    logits, tokens = zip(*answers, strict=True)
    return Case(Served(directory), prompts, list(logits), list(tokens))


@pytest.mark.parametrize(
    ("chunk", "micro_batches"), [(1000, 1), (7, 1), (13, 2)], ids=["whole", "chunks", "two-batches"]
)
def test_logits_and_greedy_tokens_are_the_oracles(case, chunk, micro_batches):
    logits, tokens = case.served.run(case.prompts, NUM_GREEDY, chunk, micro_batches)
    assert tokens == case.tokens
    assert_close(logits, case.logits)


def test_the_oracle_is_worth_the_name(case):
    """Logits that differ, rows that go to many experts, tokens that are not all the same."""
    case.served.run(case.prompts, 0, 1000)
    rows = case.served.experts.rows.values()
    assert sum(count > 0 for count in rows) > 0.6 * len(rows)
    assert all(logits.std() > 1 for logits in case.logits)
    assert len({token for tokens in case.tokens for token in tokens}) > 20


VARIANTS = [
    ("mixtral", {"head_dim": 24, "hidden_act": "gelu", "tie_word_embeddings": True}),
    ("mixtral", {"num_key_value_heads": 1, "rms_norm_eps": 0.1, "sliding_window": None}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"tie_word_embeddings": True, "decoder_sparse_step": 1}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": False}),
    ("olmoe", {"attention_bias": True, "clip_qkv": None, "norm_topk_prob": True}),
    ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"rope_interleave": False, "attention_bias": True}),
    ("deepseek_v3", {"rope_interleave": False, "attention_bias": True, "q_lora_rank": None}),
    ("deepseek_v3", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
    ("gpt_oss", {"attention_bias": False, "layer_types": ["full_attention"] * 3}),
    ("gpt_oss", {"swiglu_alpha": 1.1, "swiglu_limit": 0.5, "sliding_window": 3}),
    (PLAIN, {"hidden_act": "relu", "norm_topk_prob": False, "first_k_dense_replace": 0}),
    (PLAIN, {"hidden_act": "silu", "num_key_value_heads": 2, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
def test_every_setting_is_honoured(tmp_path, family, settings):
    if "swiglu_limit" in settings:
        transformers = pytest.importorskip("transformers")
        if not hasattr(transformers.GptOssConfig(), "swiglu_limit"):
            pytest.skip("this version of transformers clamps at 7 whatever the config says")
    directory = make_checkpoint(family, tmp_path, **settings)
    prompts = make_prompts((9, 31))
    expected = [oracle_of(family)(directory, prompt, 0)[0] for prompt in prompts]
    assert_close(Served(directory).run(prompts, 0, 5)[0], expected)


ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-tuned": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.8,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0],
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 256,
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rope_is_honoured(tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 500.0} | ROPES[kind]
    directory = make_checkpoint("mixtral", tmp_path, head_dim=16, rope_parameters=rope)
    prompts = make_prompts((200, 3))
    expected = [oracle(directory, prompt, 0)[0] for prompt in prompts]
    assert_close(Served(directory).run(prompts, 0, 64)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_float32(tmp_path, family):
    """Half the bits: routing may differ, so the typical logit is compared, not the worst."""
    directory = make_checkpoint(family, tmp_path)
    exact = Served(directory).run(make_prompts(), 0, 1000)[0]
    half = Served(directory, torch.bfloat16).run(make_prompts(), 0, 13)[0]
    for ours, theirs in zip(half, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().median() < 0.15 * theirs.std()


def test_only_the_asked_rows_get_logits(tmp_path):
    served = Served(make_checkpoint(PLAIN, tmp_path))
    kv = KvCache(served.config, 3, BLOCK, "cpu", torch.float32)
    slices = (SequenceSlice(0, 3, (2,)), SequenceSlice(0, 2, (0,)))
    ids = torch.tensor([5, 6, 7, 8, 9])
    (rows,) = served.decoder.forward(
        [ForwardBatch.of(slices, ids, torch.tensor([2, 4]))], kv, served.experts
    )
    (all_rows,) = served.decoder.forward(
        [ForwardBatch.of(slices, ids, torch.arange(5))], kv, served.experts
    )
    torch.testing.assert_close(rows.logits_NV, all_rows.logits_NV[[2, 4]])
    none = ForwardBatch.of(slices, ids, torch.empty(0, dtype=torch.int64))
    assert served.decoder.forward([none], kv, served.experts)[0].logits_NV.shape == (0, VOCAB_SIZE)


def test_a_cached_prefix_is_read_not_made_again(tmp_path):
    """A second request with the same first block starts behind it, in the first one's block."""
    served = Served(make_checkpoint(PLAIN, tmp_path))
    kv = KvCache(served.config, 4, BLOCK, "cpu", torch.float32)
    prompt = [3, 1, 4, 1, 5, 9]

    def logits(one: SequenceSlice, ids: list[int]) -> Tensor:
        batch = ForwardBatch.of((one,), torch.tensor(ids), torch.tensor([len(ids) - 1]))
        return served.decoder.forward([batch], kv, served.experts)[0].logits_NV

    first = logits(SequenceSlice(0, 6, (1, 2)), prompt)
    second = logits(SequenceSlice(4, 2, (1, 3)), prompt[4:])
    torch.testing.assert_close(first, second)


def test_loading_tells_how_far_it_is(tmp_path):
    directory = make_checkpoint(PLAIN, tmp_path)
    seen: list[tuple[int, int]] = []
    Decoder.load(
        ModelConfig.from_hf(directory),
        Checkpoint(directory),
        "cpu",
        torch.float32,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def change_tensors(directory: Path, *remove: str, **add: Tensor) -> None:
    path = directory / "model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if name not in remove}
    save_file(tensors | add, path)


@pytest.mark.parametrize(
    ("remove", "add", "match"),
    [
        (["lm_head.weight"], {}, r"lacks tensor lm_head\.weight"),
        ([], {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, r"q_proj\.bias"),
        ([], {"lm_head.weight": torch.ones(255, 64)}, r"\[255, 64\], config.json asks for \[256"),
        (["model.layers.2.mlp.experts.7.up_proj.weight"], {}, r"experts\.7\.up_proj"),
        ([], {"model.layers.2.mlp.experts.7.up_proj.weight": torch.ones(1, 64)}, r"\[1, 64\]"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(tmp_path, remove, add, match):
    directory = make_checkpoint(PLAIN, tmp_path)
    change_tensors(directory, *remove, **add)
    with pytest.raises(CheckpointError, match=match):
        Served(directory)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    directory = make_checkpoint(PLAIN, tmp_path)
    expected = Served(directory).run([[1, 2, 3]], 0, 9)[0]
    change_tensors(directory, **{"model.layers.3.eh_proj.weight": torch.ones(2, 2)})
    assert torch.equal(Served(directory).run([[1, 2, 3]], 0, 9)[0][0], expected[0])


def test_storage_does_not_change_a_bit(tmp_path):
    """Fused or not, one file or many: the same numbers lead to the same bits."""
    hub = Served(make_checkpoint("qwen2_moe", tmp_path / "hub"))
    fused = Served(make_checkpoint("qwen2_moe", tmp_path / "fused", fused=True, sharded=True))
    for ours, theirs in zip(
        hub.run(make_prompts(), 2, 11)[0], fused.run(make_prompts(), 2, 11)[0], strict=True
    ):
        assert torch.equal(ours, theirs)


def test_edited_configs_are_seen(tmp_path):
    """The harness itself: a changed key reaches the numbers."""
    directory = make_checkpoint(PLAIN, tmp_path)
    before = Served(directory).run([[1, 2, 3]], 0, 9)[0][0]
    edit_config(directory, rope_theta=7.0)
    assert json.loads((directory / "config.json").read_text())["rope_theta"] == 7.0
    after = Served(directory).run([[1, 2, 3]], 0, 9)[0][0]
    assert not torch.allclose(before, after)
