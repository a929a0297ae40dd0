"""A step in which every sequence decodes one token, from CUDA graphs.

Between two layers' experts lies a *segment*: the sum of what came back, attention, the router and
the sort of its rows; behind the last ones, the head and the choice of the likeliest token. Launched
one by one its kernels take longer to start than to run; a graph starts them at once. A graph's
addresses are fixed, so each size of batch (the next power of two) and each of the step's
micro-batches has buffers and graphs of its own, captured at first use.

Legend: B sequences, padded to the size of the graphs; T = B tokens; M blocks of the longest
sequence that may be; D hidden size, K experts a token, C pairs that turn; N rows that want a token,
V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from gateway.model.batch import Experts, ForwardBatch
from gateway.model.decode_facts import DecodeFacts
from gateway.model.kv_cache import KvCache
from gateway.model.scores import Likeliest, Scores, likeliest
from mesh.model_config import GroupedAttention

if TYPE_CHECKING:
    from gateway.dispatch import Placed
    from gateway.model.decoder import Decoder, Layer
    from gateway.model.norm import RmsNorm

log = structlog.get_logger()

_MIN_BATCH = 1
_MAX_BATCH = 256
_MAX_MICRO_BATCHES = 2


class DeviceExperts(Protocol):
    """Experts whose dispatch a graph can end with; see :class:`gateway.dispatch.Dispatcher`."""

    arena_version: int

    @property
    def arenas(self) -> tuple[Tensor, Tensor]: ...

    @property
    def layout(self) -> Any: ...

    def place(
        self, layer: int, micro_batch: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Placed: ...

    def plan_of(self, placed: Placed) -> int: ...

    def leave(self, placed: Placed, graph: torch.cuda.CUDAGraph, launched_by: int = 0) -> None: ...

    def turn(self, back: Placed, placed: Placed | None, graph: torch.cuda.CUDAGraph) -> None: ...

    def turn_at_once(
        self, back: Placed, placed: Placed | None, *graphs: torch.cuda.CUDAGraph
    ) -> bool: ...

    def is_away(self, placed: Placed) -> bool: ...

    def begin_step(self, num_micro_batches: int, *, away: bool = False) -> None: ...

    def void_rows(self) -> Mapping[tuple[int, int], Any]: ...


@dataclass
class _Segment:
    """From what came back for one layer up to where another's rows lie ready to leave."""

    graph: torch.cuda.CUDAGraph
    layer: int | None
    """Whose experts come next; None: the last segment."""
    x_TD: Tensor
    """The residual."""
    placed: Placed | None
    """What goes to the experts."""
    shared: torch.cuda.CUDAGraph | None
    """What runs while they are away; it adds to ``x_TD``."""


class _Batch(DecodeFacts):
    """The buffers and segments of one size and one micro-batch."""

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        super().__init__(size, width, device)
        self.segments: list[_Segment] = []
        self.kept: Tensor | None = None
        """What several segments read: were it freed, the next graph would overwrite it."""
        self.moves: torch.cuda.CUDAGraph | None = None
        """Moves each sequence on by its likeliest token."""
        self._head_BV = self._likeliest_B = torch.empty(0)
        pinned = device.type == "cuda"
        self._likeliest_on_host_B = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)

    def score(self, decoder: Decoder, x_BD: Tensor) -> None:
        """What a graph ends with: the next tokens on the host, for whom the likeliest will do."""
        self._head_BV = decoder.head(x_BD)
        self._likeliest_B = likeliest(self._head_BV)
        self._likeliest_on_host_B.copy_(self._likeliest_B, non_blocking=True)

    def move_on(self, block_size: int) -> None:
        """What a graph does between the last segment and the first of the next step."""
        self._move_on(self._likeliest_B, block_size)

    def scores(self, rows_N: Tensor | None) -> Scores:
        """What :meth:`score` leaves, of these sequences; None: of all."""
        count = self.count
        likeliest = Likeliest(self._likeliest_B[:count], self._likeliest_on_host_B[:count])
        scores = Scores(self._head_BV[:count], likeliest)
        if rows_N is None or len(rows_N) == count:
            return scores
        return scores.of_rows(rows_N.tolist())


class _Next(NamedTuple):
    """How far the next step is begun: each word of it replaces the one before."""

    joins: bool = False
    """Foreseen, it is to begin with the end of the last."""
    left: bool = False
    """It has: its first rows have left."""
    launched_by: int = 0
    """The plan by which :meth:`DecodeGraphs.go_on` has launched its first segment, or 0."""


class DecodeGraphs:
    """The graphs of one decoder, its cache and its experts. One thread owns it."""

    def __init__(
        self, decoder: Decoder, kv: KvCache, experts: DeviceExperts, max_model_len: int
    ) -> None:
        # Here, as in what captures: it needs Triton, which who only steps through graphs does not.
        from gateway.model.gpu_attention import MAX_KEY_DIM

        self._decoder = decoder
        self._kv = kv
        self._experts = experts
        self._max_model_len = max_model_len
        self._device = kv.rows[0].device
        # Graphs of two micro-batches run by turns: what one keeps must not be another's scratch.
        self._pools = [torch.cuda.graph_pool_handle() for _ in range(_MAX_MICRO_BATCHES)]
        self._batches: dict[tuple[int, int], _Batch] = {}
        self._version = experts.arena_version
        attention = decoder.config.attention
        self._possible = (
            isinstance(attention, GroupedAttention) and attention.head_dim <= MAX_KEY_DIM
        )
        self._stream = torch.cuda.Stream(self._device)
        self._last: _Batch | None = None
        """Of the last step, where that is one batch."""
        self._next = _Next()

    def start(self, batch: ForwardBatch, micro_batch: int) -> GraphedBatch | None:
        """The batch on its way through graphs; None where it is none for them."""
        self._last, self._next = None, _Next()
        count = len(batch.num_tokens)
        if not self._possible or count > _MAX_BATCH:
            return None
        if len(batch.token_ids_T) > count:
            return None
        if self._version != self._experts.arena_version:
            self._batches.clear()
            self._version = self._experts.arena_version
        size = max(_MIN_BATCH, 1 << (count - 1).bit_length())
        key = (size, micro_batch)
        found = self._batches.get(key)
        if found is None:
            found = self._batches[key] = self._capture(size, micro_batch)
        found.fill(batch, self._kv.block_size)
        if micro_batch == 0:
            self._last = found
        return GraphedBatch(found, self._experts, self._join)

    def foresee(self, block_tables: Sequence[tuple[int, ...]], likeliest: bool) -> bool:
        """See :class:`gateway.engine.Ahead`."""
        foreseen = self._last is not None and self._last.foresee(block_tables, self._kv.block_size)
        self._next = _Next(joins=foreseen and likeliest)
        return foreseen

    def go_on(self, tokens_N: Tensor) -> bool:
        """See :class:`gateway.engine.Ahead`. Launches the next step's first segment. Should that
        be another step after all, what was computed is read by nobody: keys and values lie past the
        end of all that is known."""
        if self._next.left:
            return True
        if self._last is None:
            return False
        first = self._last.segments[0]
        plan = 0 if first.placed is None else self._experts.plan_of(first.placed)
        if not plan or not self._last.go_on(tokens_N, self._kv.block_size):
            return False
        first.graph.replay()
        self._next = _Next(launched_by=plan)
        return True

    def _join(self, away: Placed) -> bool:
        """End a step whose last rows are away, and begin the next: all of it is launched at once,
        without a word of ours in between. Whether that could be."""
        batch, joins = self._last, self._next.joins
        self._next = _Next()
        if not joins or batch is None or batch.moves is None or self._experts.void_rows():
            return False
        first, last = batch.segments[0], batch.segments[-1]
        left = first.placed is not None and self._experts.turn_at_once(
            away, first.placed, last.graph, batch.moves, first.graph
        )
        if left:
            self._next = _Next(left=True)
            batch.went_on()
        return left

    def proceed(self) -> Callable[[], Scores] | None:
        """See :class:`gateway.engine.Ahead`. None where the graphs are void by now, too."""
        (_, left, launched_by), self._next = self._next, _Next()
        batch = self._last
        if batch is None or self._version != self._experts.arena_version:
            return None
        first = batch.segments[0]
        if left and first.placed is not None and self._experts.is_away(first.placed):
            flight = GraphedBatch(batch, self._experts, self._join, away=first.placed)
        elif launched_by:
            flight = GraphedBatch(batch, self._experts, self._join, launched_by=launched_by)
        else:
            return None

        def run() -> Scores:
            self._experts.begin_step(1, away=left)
            if left and first.shared is not None:
                first.shared.replay()
            return flight.finish()

        return run

    def _capture(self, size: int, micro_batch: int) -> _Batch:
        began_s = time.monotonic()
        width = -(-self._max_model_len // self._kv.block_size)
        batch = _Batch(size, width, self._device)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            # Once for real: kernels are compiled and libraries set up. It writes nowhere.
            _Capturing(self, batch, micro_batch, _call).run()
            self._stream.synchronize()
            captured = partial(self._captured, self._pools[micro_batch])
            _Capturing(self, batch, micro_batch, captured).run()
            move_on = partial(batch.move_on, self._kv.block_size)
            move_on()  # nobody is there to be moved
            batch.moves = captured(move_on)
        log.info(
            "decode_graphs_captured",
            batch=size,
            micro_batch=micro_batch,
            graphs=len(batch.segments),
            seconds=round(time.monotonic() - began_s, 3),
        )
        return batch

    @staticmethod
    def _captured(pool: Any, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        return graph


def _call(run: Callable[[], None]) -> Any:
    run()


class _Capturing:
    """Walks the layers once and makes the segments of a batch by ``capture``."""

    def __init__(
        self,
        graphs: DecodeGraphs,
        batch: _Batch,
        micro_batch: int,
        capture: Callable[[Callable[[], None]], Any],
    ) -> None:
        from gateway.model.gpu_attention import Decoding

        self._decoder = graphs._decoder
        self._experts = graphs._experts
        self._batch = batch
        self._micro_batch = micro_batch
        self._capture = capture
        longest = graphs._max_model_len
        self._decoding = Decoding(
            graphs._kv, batch.slots_B, batch.tables_BM, batch.lengths_B, longest
        )
        self._cis_T1C = torch.empty(0)

    def run(self) -> None:
        """Leaves the segments in the batch."""
        self._batch.segments = []
        layers = list(enumerate(self._decoder.layers))
        while True:
            taken: list[tuple[int, Layer]] = []
            while layers:
                taken.append(layers.pop(0))
                if taken[-1][1].router is not None:
                    break
            self._segment(taken)
            if not taken or taken[-1][1].router is None:
                return

    def _segment(self, layers: Sequence[tuple[int, Layer]]) -> None:
        made: dict[str, Any] = {}
        before = self._batch.segments[-1] if self._batch.segments else None
        index, last = layers[-1] if layers else (None, None)
        routed = last is not None and last.router is not None

        def attend() -> None:
            norm = layers[0][1].attention_norm if layers else None
            x_TD, normed_TD = self._begin(before, norm)
            for number, layer in layers:
                if normed_TD is None:
                    normed_TD = layer.attention_norm(x_TD)
                x_TD = layer.attention(number, normed_TD, x_TD, self._cis_T1C, self._decoding)
                normed_TD = None
                if layer.router is not None:
                    chosen = layer.router.behind(layer.mlp_norm, x_TD, self._batch.lengths_B)
                    made["placed"] = self._experts.place(number, self._micro_batch, *chosen)
                elif layer.dense is not None:
                    x_TD = x_TD + layer.dense(layer.mlp_norm(x_TD))
            if not routed:
                self._batch.score(self._decoder, x_TD)
            made["x"] = x_TD

        graph = self._capture(attend)
        shared_graph = None
        if last is not None and routed and last.shared is not None:
            shared = last.shared
            shared_graph = self._capture(lambda: made["x"].add_(shared(made["placed"].x_TD)))
        self._batch.segments.append(
            _Segment(
                graph=graph,
                layer=index if routed else None,
                x_TD=made["x"],
                placed=made.get("placed"),
                shared=shared_graph,
            )
        )

    def _begin(self, before: _Segment | None, norm: RmsNorm | None) -> tuple[Tensor, Tensor | None]:
        """The residual with what the experts of the segment before made, and its norm where that
        comes with it; of the first segment embeddings, and rotations for all."""
        batch = self._batch
        if before is None:
            self._cis_T1C = batch.kept = self._decoder.rope(batch.positions_B)
            return F.embedding(batch.tokens_B, self._decoder.embedding_VD), None
        placed = before.placed
        if placed is None:
            return before.x_TD, None
        layout, reply_ND = self._experts.layout, self._experts.arenas[1]
        came = reply_ND, placed.rows_TK, placed.weights_TK, before.x_TD
        if norm is None:
            return layout.combine(*came), None
        summed_TD, normed_TD = layout.combine_and_norm(*came, norm)
        return summed_TD, normed_TD


class GraphedBatch:
    """See :class:`gateway.model.decoder.Flight`."""

    def __init__(
        self,
        batch: _Batch,
        experts: DeviceExperts,
        join: Callable[[Placed], bool],
        *,
        launched_by: int = 0,
        away: Placed | None = None,
    ) -> None:
        """``join`` ends it, where it says so. ``launched_by``: the plan by which the first segment
        was launched already, or 0; ``away``: its rows, which have left."""
        self._batch = batch
        self._experts = experts
        self._join = join
        self._launched_by = launched_by
        self._next = 0 if away is None else 1
        self._away = away

    def begin(self, index: int, layer: Layer, experts: Experts) -> None:
        """See :class:`gateway.model.decoder.Flight`."""
        segment = self._batch.segments[self._next]
        if segment.layer != index:
            return  # a dense layer, in one graph with the next one that has experts
        self._advance()

    def finish(self, rows_N: Tensor | None = None) -> Scores:
        """See :class:`gateway.model.decoder.Flight`. Runs the layers that were not begun; None:
        the scores of all rows."""
        while self._next < len(self._batch.segments):
            self._advance()
        return self._batch.scores(rows_N)

    def _advance(self) -> None:
        segment = self._batch.segments[self._next]
        self._next += 1
        away, self._away = self._away, segment.placed
        if away is not None:
            ends = segment is self._batch.segments[-1]
            if not (ends and self._join(away)):
                self._experts.turn(away, segment.placed, segment.graph)
        elif segment.placed is not None:
            self._experts.leave(segment.placed, segment.graph, self._launched_by)
            self._launched_by = 0
        else:
            segment.graph.replay()
        if segment.shared is not None:
            segment.shared.replay()
