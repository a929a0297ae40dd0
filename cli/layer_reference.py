"""The layer of ``expert-mesh bench layer`` over ``torch.distributed``: what a mesh is to beat.

Tokens are spread evenly over the ranks and experts dealt out by turns, as expert parallelism is
usually done: sort by expert, exchange counts, ``all_to_all_single`` there, experts, and back, sum.
Counts must come to the host, which sizes the exchange; so a step is no CUDA graph, unless there
are so few rows that every rank may send every other as many as it could have at most: then the
whole step is one, and no count is needed.

Legend: T tokens of a rank, K experts a token, R = T x K routed rows, N ranks, L experts of a
rank, E = N x L experts, C the most rows that a rank sends another, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cli import layer_times
from cli.layer_rows import exact_layer, rows_of
from cli.layer_shape import Shape
from cli.layer_worker import random_expert
from mesh.mlp import StackedMlps

_GRAPH_ROWS = 256


class Reference:
    """One rank of the layer."""

    def __init__(self, shape: Shape, rank: int, num_ranks: int, device: torch.device) -> None:
        if shape.num_experts % num_ranks:
            raise ValueError(
                f"{shape.num_experts} experts are not to be dealt to {num_ranks} ranks"
            )
        self._n, self._l = num_ranks, shape.num_experts // num_ranks
        dtype: torch.dtype = getattr(torch, shape.dtype)
        sizes = (shape.hidden, shape.mlp_hidden, shape.kind, device, dtype)
        mine = range(rank, shape.num_experts, num_ranks)
        self._mlps: dict[int, Any] = {n: random_expert(e, *sizes) for n, e in enumerate(mine)}
        self._stack = StackedMlps.of(self._mlps) if self._l > 1 else None

    def step(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """``y_TD``; counts come to the host."""
        order_R, expert_R = self._sorted(ids_TK)
        counts_NL = torch.bincount(expert_R, minlength=self._n * self._l).view(self._n, self._l)
        their_counts_NL = torch.empty_like(counts_NL)
        dist.all_to_all_single(their_counts_NL, counts_NL)
        both = torch.stack([counts_NL, their_counts_NL]).tolist()
        sends, receives = ([sum(row) for row in one] for one in both)
        x_RD = x_TD.index_select(0, order_R // ids_TK.shape[1])
        theirs_SD = x_TD.new_empty(sum(receives), x_TD.shape[1])
        dist.all_to_all_single(theirs_SD, x_RD, receives, sends)
        answers_SD = self._compute(theirs_SD, their_counts_NL, both[1])
        y_RD = torch.empty_like(x_RD)
        dist.all_to_all_single(y_RD, answers_SD, sends, receives)
        return self._summed(y_RD, order_R, weights_TK)

    def step_padded(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same where each rank has one expert, without a count: what a graph can hold."""
        num_rows, top_k = ids_TK.numel(), ids_TK.shape[1]
        room = len(x_TD)  # a token's experts differ: no rank gets two rows of one
        order_R, rank_R = self._sorted(ids_TK)
        first_N = torch.searchsorted(rank_R, torch.arange(self._n, device=x_TD.device))
        at_R = torch.arange(num_rows, device=x_TD.device) - first_N[rank_R] + rank_R * room
        x_PD = x_TD.new_zeros(self._n * room, x_TD.shape[1])
        x_PD.index_copy_(0, at_R, x_TD.index_select(0, order_R // top_k))
        theirs_PD = torch.empty_like(x_PD)
        dist.all_to_all_single(theirs_PD, x_PD)
        y_PD = torch.empty_like(x_PD)
        dist.all_to_all_single(y_PD, self._mlps[0](theirs_PD))
        return self._summed(y_PD.index_select(0, at_R), order_R, weights_TK)

    def _sorted(self, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """The routed rows in order of rank and of expert there, and of each which it is."""
        place_R = ids_TK.flatten() % self._n * self._l + ids_TK.flatten() // self._n
        expert_R, order_R = place_R.sort(stable=True)
        return order_R, expert_R

    def _compute(self, x_SD: Tensor, counts_NL: Tensor, on_host: list[list[int]]) -> Tensor:
        """Rows come by sender and of each by expert; the answers go back in the same order."""
        if self._l == 1:
            y_SD: Tensor = self._mlps[0](x_SD)
            return y_SD
        if self._stack is not None:
            runs = torch.arange(self._l, device=x_SD.device).repeat(self._n)
            expert_S = runs.repeat_interleave(counts_NL.flatten(), output_size=len(x_SD))
            order_S = expert_S.argsort(stable=True)
            computed_SD = self._stack(x_SD[order_S], counts_NL.sum(0).int())
            return torch.empty_like(computed_SD).index_copy_(0, order_S, computed_SD)
        runs_NL = torch.split(x_SD, [count for row in on_host for count in row])
        y_by_run = [torch.empty(0)] * len(runs_NL)
        for index in range(self._l):
            of_it = runs_NL[index :: self._l]
            answers = self._mlps[index](torch.cat(of_it)).split([len(run) for run in of_it])
            y_by_run[index :: self._l] = answers
        return torch.cat(y_by_run)

    def _summed(self, y_RD: Tensor, order_R: Tensor, weights_TK: Tensor) -> Tensor:
        back_RD = torch.empty_like(y_RD).index_copy_(0, order_R, y_RD)
        back_TKD = back_RD.view(*weights_TK.shape, y_RD.shape[1])
        return (back_TKD * weights_TK[..., None]).sum(1).to(y_RD.dtype)


def measure(rank: int, device: torch.device, order: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each size: microseconds of every step (the slowest rank's) and of one among many that the
    host does not wait for, and the error against float32, over all rows.

    A rank's part in :func:`cli.ranks.run_ranks`.
    """
    shape = Shape(**order["shape"])
    num_ranks = dist.get_world_size()
    reference = Reference(shape, rank, num_ranks, device)
    found = []
    for size in order["sizes"]:
        share = -(-size // num_ranks)
        whole = rows_of(shape, size, device)
        x_TD, ids_TK, weights_TK = (t[rank * share : (rank + 1) * share] for t in whole)
        graphed = shape.num_experts == num_ranks and size <= _GRAPH_ROWS
        # Padded, every rank must have as much room: rows that weigh nothing fill it.
        fill = share - len(x_TD) if graphed else 0
        if fill:
            x_TD = torch.cat([x_TD, x_TD.new_zeros(fill, x_TD.shape[1])])
            some = torch.arange(shape.top_k, device=device).expand(fill, -1)
            ids_TK = torch.cat([ids_TK, some])
            weights_TK = torch.cat([weights_TK, weights_TK.new_zeros(fill, shape.top_k)])
        step = reference.step_padded if graphed else reference.step
        run, output = _repeatable(partial(step, x_TD, ids_TK, weights_TK), device, graphed)
        run()
        want_TD = exact_layer(shape, x_TD, ids_TK, weights_TK)
        parts = torch.stack([(output().float() - want_TD).norm() ** 2, want_TD.norm() ** 2])
        dist.all_reduce(parts)
        error = float((parts[0] / parts[1]).sqrt())
        dist.barrier()  # the exchanges keep the ranks in step from here on
        times = torch.tensor(layer_times.each(run, device, order["repeat"]), device=device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX)
        dist.barrier()
        chained = torch.tensor(layer_times.chained(run, device, order["repeat"]), device=device)
        dist.all_reduce(chained, op=dist.ReduceOp.MAX)
        answer = {"times": times.tolist(), "chained": chained.item()}
        found.append({"rows": size, "error": error, **answer})
    return found


def _repeatable(
    step: Callable[[], Tensor], device: torch.device, graphed: bool
) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """What runs the step, and what it made last."""
    made: dict[str, Tensor] = {}

    def run() -> None:
        made["y"] = step()

    if device.type != "cuda" or not graphed:
        return run, lambda: made["y"]
    from expert_worker.gpu_compute import capture

    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        run()
        torch.cuda.synchronize(device)
        graph = capture(run)
    return graph.replay, lambda: made["y"]
