"""Experts read whole, in slices, and made again of their tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expert_worker.expert_mlp import load_expert, make_expert
from mesh.checkpoint import Checkpoint
from mesh.mlp import Mlp
from mesh.model_config import ModelConfig
from tests.families import PLAIN, make_checkpoint

# How each family stores its experts: apart or in one tensor, with a gate, with biases, without.
STORED = [("mixtral", False), ("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", False)]
STORED += [(PLAIN, False)]


@pytest.mark.parametrize(("family", "fused"), STORED)
def test_the_outputs_of_the_slices_sum_to_the_experts(
    family: str, fused: bool, tmp_path: Path
) -> None:
    directory = make_checkpoint(family, tmp_path, fused=fused)
    config = ModelConfig.from_hf(directory)
    layer, expert = config.moe_layers[-1], 3
    x_RD = torch.randn(5, config.hidden_size)
    with Checkpoint(directory) as checkpoint:

        def load(index: int, shards: int) -> Mlp:
            return load_expert(checkpoint, config, layer, index, "cpu", torch.float32, shards)

        whole = load(expert, 1)
        for shards in (2, 5):  # five do not divide the 48 or 96 hidden units
            slices = [load(expert * shards + part, shards) for part in range(shards)]
            total_RD = sum(mlp(x_RD) for mlp in slices)
            torch.testing.assert_close(total_RD, whole(x_RD), rtol=1e-4, atol=1e-5)
            for name, tensor in whole.tensors().items():
                elements = sum(mlp.tensors()[name].numel() for mlp in slices)
                assert elements == tensor.numel() * (shards if name == "down_bias" else 1)
        assert torch.equal(make_expert(config, whole.tensors())(x_RD), whole(x_RD))
