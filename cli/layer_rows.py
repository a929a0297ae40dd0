"""A layer to be measured: its shape, rows for it, and what is right for them.

Legend: T tokens, K experts a token, E experts, R rows, D hidden size, H hidden size of an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cli.layer_shape import Shape
from cli.layer_worker import random_expert
from mesh.mlp import Mlp


def rows_of(
    shape: Shape, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x_TD``, ``ids_TK`` and ``weights_TK``, the same for the same size everywhere."""
    generator = torch.Generator().manual_seed(size)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    x_TD = torch.randn(size, shape.hidden, generator=generator).to(device, dtype)
    scores_TE = torch.rand(size, shape.num_experts, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(shape.top_k, dim=-1)
    return x_TD, ids_TK.to(device), weights_TK.to(device)


def exact_layer(
    shape: Shape, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """``y_TD`` in float32, one expert in memory at a time."""
    want_TD = torch.zeros(x_TD.shape, device=x_TD.device)
    sizes = (shape.hidden, shape.mlp_hidden, shape.kind, x_TD.device, x_TD.dtype)
    for index in range(shape.num_experts):
        tokens, ranks = (ids_TK == index).nonzero(as_tuple=True)
        if len(tokens):
            exact_RD = exact_expert(random_expert(index, *sizes), x_TD[tokens])
            want_TD.index_add_(0, tokens, exact_RD * weights_TK[tokens, ranks, None])
    return want_TD


def exact_expert(expert: Mlp, x_RD: torch.Tensor) -> torch.Tensor:
    """``y_RD`` in float32."""
    up, down = (tensor.float() for tensor in expert.tensors().values())
    hidden = F.linear(x_RD.float(), up)
    if up.shape[0] == 2 * down.shape[1]:
        gate, up_RH = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up_RH
    else:
        hidden = F.gelu(hidden)
    return F.linear(hidden, down)


def error_of(got_TD: torch.Tensor, want_TD: torch.Tensor) -> float:
    """By the norm, of the whole."""
    return float((got_TD.float() - want_TD).norm() / want_TD.norm())
