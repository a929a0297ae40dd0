"""The baseline on one GPU: the same decoder with its experts in the same process.

TP = 1 and PP = 1. Every kernel is the mesh's own; a decode step is one CUDA graph from embedding
to the next token, so nothing of it waits for Python. Experts are dense GEMMs where a layer has
one, grouped ones where it has several; of many rows in float16, for which torch has no grouped
one, a dense GEMM an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expert_worker.expert_mlp import load_expert
from expert_worker.gpu_compute import capture
from gateway.model.batch import Experts, ForwardBatch
from gateway.model.decoder import Decoder
from gateway.model.kv_cache import KvCache
from gateway.model.scores import Likeliest, Scores
from mesh.checkpoint import Checkpoint
from mesh.mlp import Mlp, StackedMlps
from mesh.model_config import ModelConfig

if TYPE_CHECKING:
    from gateway.model.decode_graphs import _Batch


_TURNS = 3
"""To settle a step, to say what it gave, and to foresee the next."""
_GROUPED_ROWS = 1024
"""More than a decode step has, whose graph cannot ask the device how many rows an expert has."""


class Computed:
    """What is there already; see :class:`gateway.model.batch.PendingExperts`."""

    def __init__(self, y_TD: Tensor) -> None:
        self._y_TD = y_TD

    def combine(self) -> Tensor:
        return self._y_TD


class ExpertsHere:
    """See :class:`gateway.engine.MeshExperts`: nothing is ever away."""

    epoch = refused = replayed_rows = 0
    expert_wait_s = 0.0
    rows_by_expert: Mapping[Any, int] = {}

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        shard: int = 0,
        shards: int = 1,
    ) -> None:
        """With ``shards``, slice ``shard`` of each expert's hidden units."""
        self.on_away: Callable[[], None] = lambda: None
        self._num_experts = config.num_experts
        self._layers: dict[int, tuple[Mapping[int, Mlp], StackedMlps | None]] = {}
        self._grouped_rows = _GROUPED_ROWS if dtype == torch.float16 else math.inf
        for layer in config.moe_layers:
            mlps = {
                index: load_expert(
                    checkpoint, config, layer, index * shards + shard, device, dtype, shards
                )
                for index in range(config.num_experts)
            }
            self._layers[layer] = mlps, StackedMlps.of(mlps) if len(mlps) > 1 else None

    def begin_step(self, num_micro_batches: int) -> None: ...

    def void_rows(self) -> Mapping[tuple[int, int], Any]:
        return {}

    def set_routing(self, routing: Any) -> None: ...

    def dispatch(self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Computed:
        mlps, stack = self._layers[layer]
        if self._num_experts == 1:
            return Computed((mlps[0](x_TD) * weights_TK).to(x_TD.dtype))
        num_rows = ids_TK.numel()
        if stack is None or num_rows > self._grouped_rows:
            return Computed(_one_by_one(mlps, x_TD, ids_TK, weights_TK))
        from gateway import gpu_kernels

        new = {"dtype": torch.int32, "device": x_TD.device}
        positions_R, counts_E = torch.empty(num_rows, **new), torch.empty(self._num_experts, **new)
        gpu_kernels.sort_by_expert(ids_TK.reshape(-1), positions_R, counts_E)
        rows_TK = torch.empty_like(ids_TK)
        x_RD = x_TD.new_empty(num_rows, x_TD.shape[1])
        identity_R = torch.arange(num_rows, **new)
        gpu_kernels.scatter(x_TD, positions_R, identity_R, rows_TK, x_RD)
        return Computed(gpu_kernels.combine(stack(x_RD, counts_E), rows_TK, weights_TK))


def _one_by_one(
    mlps: Mapping[int, Mlp], x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Where no grouped kernel takes them, or none as quick."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for index in ids_TK.unique().tolist():
        tokens, ranks = (ids_TK == index).nonzero(as_tuple=True)
        y_TD.index_add_(0, tokens, mlps[index](x_TD[tokens]) * weights_TK[tokens, ranks, None])
    return y_TD.to(x_TD.dtype)


def through_layers(
    decoder: Decoder, experts: Experts, x_TD: Tensor, cis_T1C: Tensor, paged: Any
) -> Tensor:
    """What comes out behind the last layer of those that are here."""
    for index, layer in enumerate(decoder.layers):
        x_TD = layer.attention(index, layer.attention_norm(x_TD), x_TD, cis_T1C, paged)
        if layer.router is not None:
            y_TD = experts.dispatch(index, *layer.router.behind(layer.mlp_norm, x_TD)).combine()
        else:
            assert layer.dense is not None
            y_TD = layer.dense(layer.mlp_norm(x_TD))
        x_TD = x_TD + y_TD
    return x_TD


class WholeStep:
    """In place of :class:`gateway.model.decode_graphs.DecodeGraphs`. What the mesh does while rows
    are away is done while the step is computed."""

    def __init__(
        self, decoder: Decoder, kv: KvCache, experts: ExpertsHere, max_model_len: int
    ) -> None:
        self._decoder, self._kv, self._experts = decoder, kv, experts
        self._max_model_len = max_model_len
        self._found: dict[int, tuple[_Batch, torch.cuda.CUDAGraph]] = {}
        self._last: _Flight | None = None

    def start(self, batch: ForwardBatch, micro_batch: int) -> _Flight | None:
        self._last = None
        count = len(batch.num_tokens)
        if len(batch.token_ids_T) > count:
            return None
        size = 1 << (count - 1).bit_length()
        if size not in self._found:
            self._found[size] = self._capture(size)
        filled, graph = self._found[size]
        filled.fill(batch, self._kv.block_size)
        self._last = _Flight(graph, filled, self._experts)
        return self._last

    def foresee(self, block_tables: Sequence[tuple[int, ...]], likeliest: bool) -> bool:
        last = self._last
        return last is not None and last.batch.foresee(block_tables, self._kv.block_size)

    def go_on(self, tokens_N: Tensor) -> bool:
        return self._last is not None and self._last.batch.go_on(tokens_N, self._kv.block_size)

    def proceed(self) -> Callable[[], Scores] | None:
        return None if self._last is None else self._last.finish

    def _capture(self, size: int) -> tuple[_Batch, torch.cuda.CUDAGraph]:
        from gateway.model.decode_graphs import _Batch
        from gateway.model.gpu_attention import Decoding

        device = self._kv.rows[0].device
        batch = _Batch(size, -(-self._max_model_len // self._kv.block_size), device)
        decoding = Decoding(
            self._kv, batch.slots_B, batch.tables_BM, batch.lengths_B, self._max_model_len
        )

        def run() -> None:
            decoder = self._decoder
            cis = decoder.rope(batch.positions_B)
            x_TD = F.embedding(batch.tokens_B, decoder.embedding_VD)
            batch.score(decoder, through_layers(decoder, self._experts, x_TD, cis, decoding))

        torch.cuda.synchronize(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            run()
            torch.cuda.synchronize(device)
            graph = capture(run)
        return batch, graph


class _Flight:
    def __init__(self, graph: torch.cuda.CUDAGraph, batch: _Batch, experts: ExpertsHere) -> None:
        self._graph, self.batch, self._experts = graph, batch, experts

    def begin(self, index: int, layer: Any, experts: Any) -> None: ...

    def finish(self, rows_N: Tensor | None = None) -> Scores:
        self._graph.replay()
        scores = self.batch.scores(rows_N)
        if scores.likeliest is not None:
            # The next step is launched before these are read.
            ids_N = scores.likeliest.ids_N
            scores.likeliest = Likeliest(ids_N, ids_N.to("cpu", non_blocking=True))
        for _ in range(_TURNS):
            self._experts.on_away()
        return scores
