"""The papers' sides of several processes on CPUs: they write what one process writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.baselines.shards import Split
from benchmarks.models import MODELS
from benchmarks.papers import monolith, ours, parallel, sides_on, transformers, transformers_tp
from benchmarks.random_model import checkpoint_on, save_random, workers_of
from benchmarks.work import Work
from expert_worker.expert_mlp import load_expert
from gateway.model.decoder import Decoder
from mesh.checkpoint import Checkpoint
from mesh.errors import ConfigError
from mesh.model_config import ModelConfig

WORK = Work(3, 40, 20, 8, (1, 3), 128)
SETTINGS = MODELS["tiny"][0]
GROUPED = SETTINGS | {"num_key_value_heads": 2, "num_hidden_layers": 3}
DEEP = MODELS["deep"][0] | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "dense_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 256,
    "num_local_experts": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "split"),
    [(SETTINGS, "tp1pp2"), (GROUPED, "tp2pp2"), (GROUPED, "tp4pp1"), (DEEP, "tp2pp2")],
    ids=["two stages", "two stages of two", "more ranks than heads of keys", "a dense stage"],
)
def test_tokens_are_those_of_one_process_and_of_transformers(
    settings: dict[str, Any], split: str
) -> None:
    with torch.inference_mode():
        alone = monolith(settings, WORK, "cpu")
        has_peer = settings["model_type"] == "mixtral"
        peer = transformers(settings, WORK, "cpu") if has_peer else alone
    found = parallel(settings, WORK, Split.parse(split), "cpu")
    assert len(alone["tokens"]) == WORK.num_new
    assert found["tokens"] == alone["tokens"] == peer["tokens"]
    assert found["batch_tokens"] == alone["batch_tokens"]
    assert found["prefill_tokens_per_s"] > 0
    assert all(found["tpot_ms"][str(batch)] > 0 for batch in WORK.batches)


@pytest.mark.slow
def test_two_gateways_on_four_workers_write_what_one_process_writes() -> None:
    with torch.inference_mode():
        alone = monolith(SETTINGS, WORK, "cpu")
    found = ours(SETTINGS, 4, WORK, 1, "cpu", gateways=2)
    assert len(found["batch_tokens"]) == 3
    assert found["batch_tokens"] == alone["batch_tokens"]
    assert found["tokens"] == alone["tokens"]
    assert found["gateways_of_batch"] == {1: 1, 3: 2}


@pytest.mark.slow
@pytest.mark.parametrize("gateways", [1, 2])
def test_slices_of_each_expert_on_every_worker_write_what_whole_experts_write(
    gateways: int,
) -> None:
    with torch.inference_mode():
        whole, cut = (ours(SETTINGS, 3, WORK, 1, "cpu", gateways, shards) for shards in (1, 4))
    assert cut["batch_tokens"] == whole["batch_tokens"]
    assert cut["imbalance"] == pytest.approx(whole["imbalance"])


@pytest.mark.slow
def test_two_gateways_serve_a_model_with_a_dense_layer_and_plain_experts() -> None:
    with torch.inference_mode():
        alone = monolith(DEEP, WORK, "cpu")
    found = ours(DEEP, 4, WORK, 1, "cpu", gateways=2)
    assert found["batch_tokens"] == alone["batch_tokens"]


@pytest.mark.parametrize("settings", [SETTINGS, DEEP], ids=["gated", "plain, one layer dense"])
def test_a_random_model_on_disk_is_the_one_in_memory(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    device = torch.device("cpu")
    save_random(settings, tmp_path, device)
    config = ModelConfig.from_hf(tmp_path)
    found = []
    for checkpoint in (Checkpoint(tmp_path), checkpoint_on(device)):
        decoder = Decoder.load(config, checkpoint, device, torch.float32)
        expert = load_expert(checkpoint, config, config.moe_layers[-1], 3, device, torch.float32)
        x_TD = torch.ones(1, config.hidden_size)
        dense = decoder.layers[0].dense
        routers = [layer.router(x_TD)[1] for layer in decoder.layers if layer.router is not None]
        found.append([*routers, expert(x_TD), x_TD if dense is None else dense(x_TD)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_transformers_by_its_tensor_plan_writes_what_it_writes_alone() -> None:
    with torch.inference_mode():
        alone = transformers(SETTINGS, WORK, "cpu")
    found = transformers_tp(SETTINGS, WORK, 2, "cpu")
    assert found["tokens"] == alone["tokens"]


def test_several_gpus_compare_whole_experts_and_slices_of_them() -> None:
    assert sides_on(2) == ["ours", "slices", "two", "tp2pp1", "tp1pp2", "transformers-tp2"]
    assert "slices" not in sides_on(1)


def test_what_cannot_be_cut_is_refused() -> None:
    settings = SETTINGS | {"num_local_experts": 512}
    with (
        pytest.raises(ConfigError, match="512 experts a layer cannot be cut into 2"),
        workers_of(settings, 2, torch.device("cpu"), shards=2),
    ):
        pass


def test_a_split_that_does_not_go_is_refused() -> None:
    assert [split.name for split in Split.all_of(4)] == ["tp4pp1", "tp2pp2", "tp1pp4"]
    with pytest.raises(ConfigError, match="two ranks a layer"):
        Split.parse("tp0pp2")
