"""One layer over worker processes on a GPU: answers, buffers, graphs' edges, a death."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from cli import bench_layer, mps
from cli.layer_rows import exact_expert
from cli.layer_shape import Shape
from cli.layer_worker import random_expert

HIDDEN, MLP_HIDDEN = 256, 512
_OF_SEVERAL = pytest.mark.parametrize(
    ("dtype", "kind"), [("bfloat16", "gated"), ("float16", "plain")]
)
"""With the activation in the grouped product, and behind it."""
_LIMITS = {"float16": 3e-3, "bfloat16": 2e-2, "float32": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def shared_gpu() -> Iterator[None]:
    with mps.sharing():
        yield


def _shape(dtype: str, kind: str = "gated", workers: int = 2, experts: int = 4) -> Shape:
    return Shape(HIDDEN, MLP_HIDDEN, kind, experts, 2, workers, "cuda", dtype)


class Layer:
    """What a layer's answers are held against."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.device = torch.device("cuda", 0)
        self.dtype = getattr(torch, shape.dtype)
        sizes = (HIDDEN, MLP_HIDDEN, shape.kind, self.device, self.dtype)
        self._experts = [random_expert(n, *sizes) for n in range(shape.num_experts)]

    def batch(self, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(tokens, HIDDEN, generator=generator).to(self.device, self.dtype)
        scores = torch.rand(tokens, self.shape.num_experts, generator=generator)
        weights, ids = scores.topk(self.shape.top_k, dim=-1)
        return x_TD, ids.to(self.device), weights.to(self.device)

    def error(
        self, got_TD: torch.Tensor, x_TD: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> float:
        want_TD = torch.zeros(x_TD.shape, device=self.device)
        for index, expert in enumerate(self._experts):
            tokens, ranks = (ids == index).nonzero(as_tuple=True)
            y_RD = exact_expert(expert, x_TD[tokens])
            want_TD.index_add_(0, tokens, y_RD * weights[tokens, ranks, None])
        worst = (got_TD.float() - want_TD).norm(dim=1) / want_TD.norm(dim=1)
        return float(worst.max())


@pytest.mark.parametrize("kind", ["gated", "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_answers_at_the_edges_of_graphs_and_buffers(dtype: str, kind: str) -> None:
    """Each size often enough for its graph to be captured and replayed."""
    shape = _shape(dtype, kind, workers=4)
    sizes = [1, 2, 3, 31, 32, 33, 255, 256, 257, 600]
    for line in bench_layer.run(shape, sizes, repeat=6):
        assert line.error < _LIMITS[dtype]


@pytest.mark.parametrize("most", [150, 3000])
@pytest.mark.parametrize("workers", [1, 4])
@_OF_SEVERAL
def test_no_row_of_a_batch_is_in_anothers_reply(
    dtype: str, kind: str, workers: int, most: int
) -> None:
    """With one worker, messages carry several experts and their counts. Large ones are fetched,
    computed and delivered beside each other, some of them from graphs."""
    layer = Layer(_shape(dtype, kind, workers))
    with (
        torch.inference_mode(),
        bench_layer.layer_mesh(layer.shape, layer.device, layer.dtype, 2 * most) as mesh,
    ):
        dispatcher = mesh.dispatcher
        for seed in range(100):
            batches = [
                layer.batch(1 + (seed * 37 + part * 91) % most, 2 * seed + part) for part in (0, 1)
            ]
            dispatcher.begin_step(2)
            away = [dispatcher.dispatch(0, *batch) for batch in batches]
            for pending, batch in zip(away, batches, strict=True):
                assert layer.error(pending.combine(), *batch) < 0.05
        assert dispatcher.void_rows() == {}
        assert all(peer.by_reference for peer in dispatcher.peers)


@_OF_SEVERAL
def test_an_expert_is_asked_alone_before_and_after_it_is_asked_with_others(
    dtype: str, kind: str
) -> None:
    """Its weights move in between, and what was captured of it is not used any more."""
    layer = Layer(_shape(dtype, kind, workers=1))
    with (
        torch.inference_mode(),
        bench_layer.layer_mesh(layer.shape, layer.device, layer.dtype, 300) as mesh,
    ):
        for alone in (True, False, True, False):
            for seed in range(20):
                x_TD, ids_TK, weights_TK = layer.batch(5, seed)
                if alone:
                    ids_TK = torch.full_like(ids_TK, seed % layer.shape.num_experts)
                mesh.dispatcher.begin_step(1)
                got_TD = mesh.dispatcher.dispatch(0, x_TD, ids_TK, weights_TK).combine()
                assert layer.error(got_TD, x_TD, ids_TK, weights_TK) < 0.05
        assert mesh.dispatcher.void_rows() == {}


@pytest.mark.parametrize("workers", [1, 4])
def test_a_graphed_layer_leaves_by_its_seat(workers: int) -> None:
    layer = Layer(_shape("bfloat16", workers=workers))
    with (
        torch.inference_mode(),
        bench_layer.layer_mesh(layer.shape, layer.device, layer.dtype, 300) as mesh,
    ):
        for tokens in (1, 7, 128):
            batches = [layer.batch(tokens, 2 * tokens + part) for part in (0, 1)]
            step = bench_layer.Step(mesh.dispatcher, batches)
            for _ in range(6):
                mesh.dispatcher.begin_step(2)
                away = [step._leave(part) for part in (0, 1)]
                assert [placed.pending for placed in away] == [None, None]
                for part, (placed, batch) in enumerate(zip(away, batches, strict=True)):
                    assert layer.error(step._return(part, placed), *batch) < 0.05


def test_a_worker_killed_with_rows_in_hand_voids_those_and_no_others() -> None:
    layer = Layer(_shape("bfloat16"))
    with (
        torch.inference_mode(),
        bench_layer.layer_mesh(layer.shape, layer.device, layer.dtype, 300, 4.0) as mesh,
    ):
        dispatcher = mesh.dispatcher
        x_TD, _, weights = layer.batch(64, 0)
        ids = torch.tensor([[0, 2], [1, 3]], device=layer.device).repeat(32, 1)
        dispatcher.begin_step(1)
        dispatcher.dispatch(0, x_TD, ids, weights).combine()
        dispatcher.begin_step(1)
        pending = dispatcher.dispatch(0, x_TD, ids, weights)
        mesh.processes[1].kill()
        began_s = time.monotonic()
        got_TD = pending.combine()
        lost = sorted(token for _, token in dispatcher.void_rows())
        assert lost in ([], list(range(1, 64, 2))), "the reply may have been quicker"
        alive = [n for n in range(64) if n not in lost]
        assert layer.error(got_TD[alive], x_TD[alive], ids[alive], weights[alive]) < 0.05
        print(f"over after {time.monotonic() - began_s:.2f} s, {len(lost)} rows void")
        dispatcher.begin_step(1)
        got_TD = dispatcher.dispatch(0, x_TD, ids, weights).combine()
        assert len(dispatcher.void_rows()) == 32
        assert layer.error(got_TD[::2], x_TD[::2], ids[::2], weights[::2]) < 0.05
