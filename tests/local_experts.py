"""All experts of a model in this process: the mesh without a mesh.

Legend: T tokens, D hidden size, K experts of a token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from expert_worker.expert_mlp import load_expert
from gateway.model.batch import PendingExperts
from mesh.checkpoint import Checkpoint
from mesh.model_config import ModelConfig


class _Done:
    """Rows that came back at once."""

    def __init__(self, y_TD: Tensor) -> None:
        self._y_TD = y_TD

    def combine(self) -> Tensor:
        return self._y_TD


class LocalExperts:
    """Keeps every routed expert and notes how many rows each was sent."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        with Checkpoint(directory) as checkpoint:
            self.mlps = {
                (layer, index): load_expert(checkpoint, config, layer, index, device, dtype)
                for layer in config.moe_layers
                for index in range(config.num_experts)
            }
        self.rows: dict[tuple[int, int], int] = dict.fromkeys(self.mlps, 0)

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> PendingExperts:
        y_TKD = x_TD.new_zeros(*expert_ids_TK.shape, x_TD.shape[1])
        for index in expert_ids_TK.unique().tolist():
            tokens, places = torch.where(expert_ids_TK == index)
            y_TKD[tokens, places] = self.mlps[layer, index](x_TD[tokens])
            self.rows[layer, index] += len(tokens)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for place in range(expert_ids_TK.shape[1]):
            y_TD += weights_TK[:, place, None] * y_TKD[:, place]
        return _Done(y_TD.to(x_TD.dtype))
