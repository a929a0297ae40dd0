"""Which experts, how much of each: with logits one can read off the input."""

from __future__ import annotations

import math

import pytest
import torch

from gateway.model.router import Router
from mesh.model_config import RouterConfig


def route(config: RouterConfig, logits: list[float], top_k: int, **extra: torch.Tensor):
    """Route one row whose logits are given: the router's weight is the identity."""
    router = Router(config, top_k, torch.eye(len(logits)), **extra)
    ids_TK, weights_TK = router(torch.tensor([logits]))
    assert ids_TK.dtype == torch.int64
    assert weights_TK.dtype == torch.float32
    return ids_TK[0].tolist(), weights_TK[0].tolist()


def test_softmax_keeps_the_probability_among_all():
    logits = [math.log(p) for p in (0.1, 0.4, 0.3, 0.2)]
    ids, weights = route(RouterConfig(), logits, 2)
    assert ids == [1, 2]
    assert weights == pytest.approx([0.4, 0.3])


def test_normalized_softmax_sums_to_one_over_the_chosen():
    logits = [math.log(p) for p in (0.1, 0.4, 0.4, 0.1)]
    _, weights = route(RouterConfig(normalize=True), [*logits[:2], logits[2] - 1e-3, 0.0], 2)
    assert sum(weights) == pytest.approx(1)
    ids, weights = route(RouterConfig(normalize=True), [0.0, math.log(3), -5.0, -6.0], 2)
    assert ids == [1, 0]
    assert weights == pytest.approx([0.75, 0.25])


def test_the_router_bias_moves_logits():
    ids, _ = route(
        RouterConfig(normalize=True, bias=True), [0.0, 1.0], 1, bias_E=torch.tensor([2.0, 0.0])
    )
    assert ids == [0]


def test_the_correction_bias_chooses_but_does_not_weigh():
    config = RouterConfig(scoring="sigmoid", correction_bias=True, scale=2.0)
    ids, weights = route(config, [0.0, 1.0, -1.0], 1, correction_E=torch.tensor([0.0, 0.0, 9.0]))
    assert ids == [2]
    assert weights == pytest.approx([2 / (1 + math.exp(1))])


def test_normalized_sigmoid_is_scaled_after_it_is_normalized():
    config = RouterConfig(scoring="sigmoid", normalize=True, scale=2.5)
    _, weights = route(config, [0.0, 0.0, -9.0], 2)
    assert weights == pytest.approx([1.25, 1.25])


def test_groups_are_ranked_by_their_best_expert():
    """Expert 3 is the second best of all, but its group comes third."""
    config = RouterConfig(num_groups=3, groups_per_token=2, group_score="best")
    ids, _ = route(config, [5.0, 0.0, 4.0, 3.9, 3.95, 3.0], 2)
    assert ids == [0, 2]
    ids, _ = route(config, [5.0, 0.0, 1.0, 0.9, 4.0, 3.0], 3)
    assert ids == [0, 4, 5]


def test_groups_are_ranked_by_their_two_best_experts():
    """One bright expert among dim ones loses to a pair of good ones."""
    config = RouterConfig(
        scoring="sigmoid", num_groups=2, groups_per_token=1, group_score="two_best"
    )
    ids, _ = route(config, [3.0, -9.0, 1.0, 1.0], 2)
    assert sorted(ids) == [2, 3]


def test_half_precision_rows_are_scored_in_float32():
    router = Router(RouterConfig(), 1, torch.eye(2, dtype=torch.bfloat16))
    _, weights_TK = router(torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16))
    assert weights_TK.dtype == torch.float32


def test_rows_that_are_not_there_are_nobodys() -> None:
    router = Router(RouterConfig(normalize=True), 2, torch.eye(3))
    there_T = torch.tensor([5, 0, 1], dtype=torch.int32)
    ids_TK, _ = router(torch.tensor([[3.0, 1, 2]] * 3), there_T)
    assert ids_TK.tolist() == [[0, 2], [3, 3], [0, 2]]
