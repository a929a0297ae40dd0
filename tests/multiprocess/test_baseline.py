"""The papers' sides of several processes on CPUs: they write what one process writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.baselines.shards import Split
from benchmarks.papers import MODELS, monolith, ours, parallel, transformers, transformers_tp
from benchmarks.work import Work
from mesh.errors import ConfigError

WORK = Work(3, 40, 20, 8, (1, 3), 128)
SETTINGS = MODELS["tiny"][0]
GROUPED = SETTINGS | {"num_key_value_heads": 2, "num_hidden_layers": 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "split"),
    [(SETTINGS, "tp1pp2"), (GROUPED, "tp2pp2"), (GROUPED, "tp4pp1")],
    ids=["two stages", "two stages of two", "more ranks than heads of keys"],
)
def test_tokens_are_those_of_one_process_and_of_transformers(
    settings: dict[str, Any], split: str
) -> None:
    with torch.inference_mode():
        alone = monolith(settings, WORK, "cpu")
        peer = transformers(settings, WORK, "cpu")
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
def test_transformers_by_its_tensor_plan_writes_what_it_writes_alone() -> None:
    with torch.inference_mode():
        alone = transformers(SETTINGS, WORK, "cpu")
    found = transformers_tp(SETTINGS, WORK, 2, "cpu")
    assert found["tokens"] == alone["tokens"]


def test_a_split_that_does_not_go_is_refused() -> None:
    assert [split.name for split in Split.all_of(4)] == ["tp4pp1", "tp2pp2", "tp1pp4"]
    with pytest.raises(ConfigError, match="two ranks a layer"):
        Split.parse("tp0pp2")
