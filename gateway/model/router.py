"""Which experts a token goes to, and how much each of them counts.

Legend: T tokens, D hidden size, E experts, K experts of a token, G groups of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mesh.linear import Linear
from mesh.model_config import RouterConfig

if TYPE_CHECKING:
    from gateway.model.norm import RmsNorm


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
        self._weight_ED = weight_ED.float()
        self._bias_E = None if bias_E is None else bias_E.float()
        self._score = Linear(self._weight_ED, self._bias_E)
        self._correction_E = None if correction_E is None else correction_E.float()
        # A softmax over all, normalized over the chosen, is the softmax over the chosen.
        self._softmax_of_chosen = (
            config.scoring == "softmax" and config.normalize and config.num_groups == 1
        )
        self._narrow_ED: Tensor | None = None
        """The same weights on a GPU, where bfloat16 has them all: products are exact in float32."""
        if weight_ED.is_cuda:
            narrow_ED = self._weight_ED.bfloat16()
            if torch.equal(narrow_ED.float(), self._weight_ED):
                self._narrow_ED = narrow_ED
            from gateway.model.gpu_kernels import MAX_SCORED

            most_tokens = MAX_SCORED // weight_ED.numel()
            self._arrived_T = torch.zeros(most_tokens, dtype=torch.int32, device=weight_ED.device)
            """See ``choose``: of as many tokens as it scores."""

    def __call__(self, x_TD: Tensor, there_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``expert_ids_TK`` (int64) and ``weights_TK`` (float32).

        Rows whose ``there_T`` (int32) is 0 are nobody's: their ids are past the experts.
        """
        if x_TD.is_cuda and self._config.num_groups == 1:
            ids_TK, weights_TK, _ = self._choose_on_gpu(x_TD, there_T)
            return ids_TK, weights_TK
        ids_TK, weights_TK = self._choose_by_torch(self._logits(x_TD))
        if there_T is not None:
            ids_TK = ids_TK.where(there_T[:, None] > 0, len(self._weight_ED))
        return ids_TK, weights_TK

    def behind(
        self, norm: RmsNorm, x_TD: Tensor, there_T: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``norm(x_TD)``, and what its rows choose: in one pass where a kernel does both."""
        if self._scores_here(x_TD) and norm.goes_by_kernel(x_TD):
            ids_TK, weights_TK, normed_TD = self._choose_on_gpu(x_TD, there_T, norm)
            return normed_TD, ids_TK, weights_TK
        normed_TD = norm(x_TD)
        return normed_TD, *self(normed_TD, there_T)

    def _scores_here(self, x_TD: Tensor) -> bool:
        return x_TD.is_cuda and self._config.num_groups == 1 and len(x_TD) <= len(self._arrived_T)

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self._narrow_ED is None or x_TD.dtype != self._narrow_ED.dtype:
            return self._score(x_TD.float())
        logits_TE = torch.mm(x_TD, self._narrow_ED.t(), out_dtype=torch.float32)
        return logits_TE if self._bias_E is None else logits_TE.add_(self._bias_E)

    def _choose_on_gpu(
        self, x_TD: Tensor, there_T: Tensor | None, norm: RmsNorm | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from gateway.model import gpu_kernels

        config, score_here = self._config, self._scores_here(x_TD)
        weight_ED = self._weight_ED if self._narrow_ED is None else self._narrow_ED
        return gpu_kernels.choose(
            x_TD.contiguous() if score_here else self._logits(x_TD),
            weight_ED if score_here else None,
            self._top_k,
            scoring=config.scoring,
            normalize=config.normalize,
            softmax_of_chosen=self._softmax_of_chosen,
            scale=config.scale,
            num_experts=len(weight_ED),
            arrived_T=self._arrived_T,
            bias_E=self._bias_E,
            correction_E=self._correction_E,
            there_T=there_T,
            norm=norm,
        )

    def _choose_by_torch(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
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
