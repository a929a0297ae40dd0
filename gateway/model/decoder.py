"""The decoder: everything of the model but its routed experts.

Legend: T tokens of a batch, N rows whose scores are wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.model.attention import AttentionBlock, PagedAttention
from gateway.model.batch import Experts, ForwardBatch, PendingExperts
from gateway.model.families import Weights, load_attention, load_router, load_shared_expert
from gateway.model.kv_cache import KvCache
from gateway.model.norm import RmsNorm
from gateway.model.rope import Rope
from gateway.model.router import Router
from gateway.model.scores import Scores
from mesh.checkpoint import Checkpoint
from mesh.linear import Linear
from mesh.mlp import Mlp
from mesh.model_config import GroupedAttention, ModelConfig

if TYPE_CHECKING:
    from gateway.model.decode_graphs import DecodeGraphs


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token goes to; it stays on the gateway."""

    mlp: Mlp
    gate_1D: Tensor | None

    def __call__(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp(x_TD)
        return y_TD if self.gate_1D is None else y_TD.mul_(F.linear(x_TD, self.gate_1D).sigmoid_())


@dataclass(frozen=True)
class Layer:
    """One decoder layer: attention, then experts (or, in dense layers, one MLP)."""

    attention_norm: RmsNorm
    attention: AttentionBlock
    mlp_norm: RmsNorm
    dense: Mlp | None = None
    router: Router | None = None
    shared: SharedExpert | None = None


class Flight(Protocol):
    """A batch on its way through the layers, and its rows that are away at their experts."""

    def begin(self, index: int, layer: Layer, experts: Experts) -> None:
        """Run a layer up to where its rows are away at their experts."""
        ...

    def finish(self, rows_N: Tensor) -> Scores:
        """Wait for the rows that are away; what the last layer and the head make of these."""
        ...


class _MicroBatch:
    """See :class:`Flight`. Any batch, one call after the other."""

    def __init__(
        self, decoder: Decoder, x_TD: Tensor, cis_T1C: Tensor, paged: PagedAttention
    ) -> None:
        self._decoder = decoder
        self._x_TD = x_TD
        self._cis_T1C = cis_T1C
        self._paged = paged
        self._pending: PendingExperts | None = None

    def _come_back(self) -> Tensor:
        """``x_TD`` behind the last layer that was begun."""
        if self._pending is not None:
            self._x_TD = self._x_TD + self._pending.combine()
            self._pending = None
        return self._x_TD

    def finish(self, rows_N: Tensor) -> Scores:
        """See :class:`Flight`."""
        return self._decoder.score(self._come_back(), rows_N)

    def begin(self, index: int, layer: Layer, experts: Experts) -> None:
        """See :class:`Flight`."""
        x_TD = self._come_back()
        x_TD = layer.attention(index, layer.attention_norm(x_TD), x_TD, self._cis_T1C, self._paged)
        if layer.router is not None:
            normed_TD, *chosen = layer.router.behind(layer.mlp_norm, x_TD)
            self._pending = experts.dispatch(index, normed_TD, *chosen)
        else:
            normed_TD = layer.mlp_norm(x_TD)
        here = layer.dense or layer.shared
        self._x_TD = x_TD if here is None else x_TD + here(normed_TD)


class Decoder:
    """The layers of a model on one device. Not thread-safe; holds no state between steps."""

    def __init__(
        self,
        config: ModelConfig,
        embedding_VD: Tensor,
        layers: Sequence[Layer],
        norm: RmsNorm,
        head_VD: Tensor,
    ) -> None:
        self.config = config
        self.embedding_VD = embedding_VD
        self.layers = layers
        self._norm = norm
        self._head = Linear(head_VD)
        self.rope = Rope(config.rope, embedding_VD.device)
        self._windows = frozenset(config.windows)
        attention = config.attention
        self._sinks = isinstance(attention, GroupedAttention) and attention.sinks
        self._graphs: DecodeGraphs | None = None
        self._paged: type[PagedAttention] = PagedAttention
        if embedding_VD.is_cuda and isinstance(attention, GroupedAttention):
            from gateway.model.gpu_attention import MAX_KEY_DIM, GpuPagedAttention

            if attention.head_dim <= MAX_KEY_DIM:
                self._paged = GpuPagedAttention

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Decoder:
        """Read every weight but the routed experts.

        ``progress`` is told how many layers are read, and of how many. Raises CheckpointError
        naming a tensor that is absent, of another shape, or that the config does not explain.
        """
        weights = Weights(config, checkpoint, device, dtype)
        vocab = (config.vocab_size, config.hidden_size)
        embedding_VD = head_VD = weights("model.embed_tokens.weight", *vocab)
        if not config.tie_word_embeddings:
            head_VD = weights("lm_head.weight", *vocab)
        norm = weights.norm("model.norm.weight", config.hidden_size, config.norm_eps)
        layers = []
        for index in range(config.num_layers):
            layers.append(_load_layer(weights, index))
            if progress is not None:
                progress(index + 1, config.num_layers)
        weights.refuse_unread()
        return cls(config, embedding_VD, layers, norm, head_VD)

    @torch.inference_mode()
    def forward(
        self,
        batches: Sequence[ForwardBatch],
        kv: KvCache,
        experts: Experts,
        launching: Callable[[], None] = lambda: None,
    ) -> list[Scores]:
        """One step: the scores of each batch's ``logit_rows_N``. ``launching`` is called when all
        is laid out and the device gets its first work.

        Batches are micro-batches: while one's rows are away at their experts, the next one's
        attention runs. Keys and values of a layer are written before they are read, so a chunk
        of a prompt sees all of the prompt that came before it, in this step or an earlier one.
        """
        flights = [self._start(n, batch, kv) for n, batch in enumerate(batches)]
        launching()
        for index, layer in enumerate(self.layers):
            for flight in flights:
                flight.begin(index, layer, experts)
        return [
            flight.finish(batch.logit_rows_N)
            for flight, batch in zip(flights, batches, strict=True)
        ]

    @property
    def ahead(self) -> DecodeGraphs | None:
        """What begins a step before the host knows its tokens, where there are graphs: see
        :class:`gateway.engine.Ahead`."""
        return self._graphs

    def use_graphs(self, graphs: DecodeGraphs) -> None:
        """Take batches through these graphs from here on, where they are made for them."""
        self._graphs = graphs

    def _start(self, micro_batch: int, batch: ForwardBatch, kv: KvCache) -> Flight:
        if self._graphs is not None:
            graphed = self._graphs.start(batch, micro_batch)
            if graphed is not None:
                return graphed
        paged = self._paged(batch.slices, kv, self._windows, self._sinks)
        token_ids_T = batch.token_ids_T.to(self.embedding_VD.device)
        x_TD = F.embedding(token_ids_T, self.embedding_VD)
        return _MicroBatch(self, x_TD, self.rope(paged.positions_T), paged)

    def score(self, x_TD: Tensor, rows_N: Tensor) -> Scores:
        """Of these rows behind the last layer."""
        if len(rows_N) < len(x_TD):
            x_TD = x_TD.index_select(0, rows_N.to(x_TD.device))
        return Scores(self.head(x_TD))

    def head(self, x_ND: Tensor) -> Tensor:
        """What the head makes of rows behind the last layer, ``(N, V)``."""
        return self._head(self._norm(x_ND))


def _load_layer(weights: Weights, index: int) -> Layer:
    config = weights.config
    prefix = f"model.layers.{index}"

    def norm(name: str) -> RmsNorm:
        return weights.norm(f"{prefix}.{name}.weight", config.hidden_size, config.norm_eps)

    attention_norm, attention = norm("input_layernorm"), load_attention(weights, index)
    mlp_norm = norm("post_attention_layernorm")
    if index not in config.moe_layers:
        dense = weights.mlp(f"{prefix}.mlp", config.dense_hidden_size)
        return Layer(attention_norm, attention, mlp_norm, dense=dense)
    router = load_router(weights, index)
    shared = (
        SharedExpert(*load_shared_expert(weights, index)) if config.shared_hidden_size else None
    )
    return Layer(attention_norm, attention, mlp_norm, router=router, shared=shared)
