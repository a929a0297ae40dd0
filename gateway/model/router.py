"""Which experts a token goes to, and how much each of them counts.

Legend: T tokens, D hidden size, E experts, K experts of a token, G groups of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mesh.linear import Linear
from mesh.model_config import RouterConfig


class Router:
    """Scores experts in float32, whatever the model's dtype is."""

    def __init__(
        self,
        config: RouterConfig,
        experts_per_token: int,
        weight_ED: Tensor,
        bias_E: Tensor | None = None,
        correction_E: Tensor | None = None,
    ) -> None:
        self._config = config
        self._top_k = experts_per_token
        self._score = Linear(weight_ED.float(), None if bias_E is None else bias_E.float())
        self._correction_E = None if correction_E is None else correction_E.float()
        # A softmax over all, normalized over the chosen, is the softmax over the chosen.
        self._softmax_of_chosen = (
            config.scoring == "softmax" and config.normalize and config.num_groups == 1
        )

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """``expert_ids_TK`` (int64) and ``weights_TK`` (float32)."""
        logits_TE = self._score(x_TD.float())
        if self._softmax_of_chosen:
            chosen_TK, ids_TK = logits_TE.topk(self._top_k, dim=-1)
            weights_TK = chosen_TK.softmax(dim=-1)
        else:
            softmax = self._config.scoring == "softmax"
            scores_TE = logits_TE.softmax(dim=-1) if softmax else logits_TE.sigmoid()
            ids_TK = self._choose(scores_TE)
            weights_TK = scores_TE.gather(1, ids_TK)
            if self._config.normalize:
                # DeepSeek-V3's own guard against a row of zeros.
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if self._config.scale != 1:
            weights_TK = weights_TK * self._config.scale
        return ids_TK, weights_TK

    def _choose(self, scores_TE: Tensor) -> Tensor:
        """The K best experts among those of the best groups."""
        if self._correction_E is not None:
            scores_TE = scores_TE + self._correction_E
        config = self._config
        if config.num_groups > 1:
            scores_TGe = scores_TE.view(len(scores_TE), config.num_groups, -1)
            best = 1 if config.group_score == "best" else 2
            group_scores_TG = scores_TGe.topk(best, dim=-1).values.sum(dim=-1)
            groups = group_scores_TG.topk(config.groups_per_token, dim=-1).indices
            others_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(
                1, groups, False
            )
            scores_TE = scores_TGe.masked_fill(others_TG[:, :, None], -torch.inf).flatten(1)
        return scores_TE.topk(self._top_k, dim=-1).indices
