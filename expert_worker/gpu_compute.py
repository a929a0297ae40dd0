"""A GPU: batches are queued on a stream of their own and asked about, never waited for.

UCX moves rows on its own streams meanwhile, so receiving, computing and sending overlap. What a
GPU does in microseconds, Python takes longer to launch: small batches run from CUDA graphs, one
for each expert, or layer of experts, and buffer (a buffer's size is a power of two of rows, so that
these are few).

Legend: R rows of a buffer, D hidden size.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import structlog
import torch

from expert_worker.compute import Part, run
from expert_worker.expert_store import Expert
from mesh import native, wire
from mesh.errors import Unavailable
from mesh.mlp import StackedMlps
from mesh.plan import ExpertId
from mesh.replay import (
    CAPTURED_AHEAD,
    DELIVERY,
    MAX_TOGETHER,
    WHOLE,
    ReplayDevice,
    Replays,
    slot_rows,
    slots_of,
    step_of,
)

log = structlog.get_logger()

_GRAPH_ROWS = 256
"""Up to here the rows that fill a buffer up take the GPU little: the weights take it longer."""
_GRAPH_ROWS_OF_SEVERAL = 1024
"""Of many experts, the same; the transport's graphs, which are few, go further."""
_GRAPH_ROWS_OF_PARTS = 2048
"""Of messages of several experts that are computed together."""
_RING_ROWS = 1024
"""Of larger buffers as many as are under way at once, for what they take."""
_CAPTURE_AT_USE = 3
"""A buffer that an expert meets this often will come again."""
_AHEAD = -1
"""Of a stream's priorities, the next to the least."""
_ROWS_OF_ONE = 8
"""Where a layer has several experts here, more are seldom for one of them alone."""


class _Layer:
    """The experts of one layer that are here at once."""

    def __init__(self, experts: Mapping[int, Expert]) -> None:
        self.experts = experts
        self.stack: StackedMlps | None = None
        """All of them as one, once several were asked for; None also where that cannot be."""
        self.stacked = False
        self.prepared = False
        """Or queued for it."""
        self.replays = Replays(here=experts)
        """Of the stack."""


@dataclass
class _Graph:
    """What runs one expert on one buffer, once it was captured."""

    uses: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    refused: bool = False


class _Moves(NamedTuple):
    """Which launches that move rows a graph has of its own."""

    bring: bool
    take_away: bool


class GpuTicket:
    """Two events around a batch."""

    __slots__ = ("_counts_E", "_end", "_pool", "_start", "_stream", "answers_RD")

    def __init__(
        self, stream: torch.cuda.Stream, pool: list[tuple[torch.cuda.Event, torch.cuda.Event]]
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._start, self._end = pool.pop() if pool else (_event(), _event())
        self._counts_E: torch.Tensor | None = None
        self.answers_RD: torch.Tensor | None = None
        """See :class:`expert_worker.compute.Ticket`."""
        self._start.record(stream)

    def ends_here(self, counts_E: torch.Tensor | None = None) -> GpuTicket:
        """The batch is all that was queued since; ``counts_E`` is on the host when it is done."""
        self._counts_E = counts_E
        self._end.record(self._stream)
        return self

    @property
    def done(self) -> bool:
        """See :class:`expert_worker.compute.Ticket`."""
        return bool(self._end.query())

    @property
    def seconds(self) -> float:
        """See :class:`expert_worker.compute.Ticket`. Asked once: the events go back."""
        seconds: float = self._start.elapsed_time(self._end) / 1e3
        self._pool.append((self._start, self._end))
        return seconds

    @property
    def counts(self) -> list[int]:
        """See :class:`expert_worker.compute.Ticket`."""
        return [] if self._counts_E is None else self._counts_E.tolist()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class GpuCompute:
    """See :class:`expert_worker.compute.Compute`."""

    depth = 2

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.replays: ReplayDevice | None = None
        self._replays: WeakKeyDictionary[Any, ref[Replays]] = WeakKeyDictionary()
        self._uses: WeakKeyDictionary[Any, Counter[tuple[int, int]]] = WeakKeyDictionary()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._graphs: WeakKeyDictionary[Any, dict[int, _Graph]] = WeakKeyDictionary()
        self._experts: Mapping[ExpertId, Expert] = {}
        self._layers: dict[int, _Layer] = {}
        """Of those experts."""
        self.version = 0
        self._counts: dict[int, torch.Tensor] = {}
        self._to_prepare: deque[tuple[ref[Any], int]] = deque()
        """Layers of several experts, and experts, with numbers of rows."""

    def open(self) -> None:
        """Make the stream of this thread the one that computes."""
        torch.cuda.set_device(self._device)
        # What is small here waits less for a gateway's large kernels.
        self._stream = torch.cuda.Stream(self._device, priority=_AHEAD)
        torch.cuda.set_stream(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._out = self._stream
        self._nobodys = torch.zeros(
            MAX_TOGETHER * wire.MAX_EXPERTS, dtype=torch.int32, pin_memory=True
        )
        """Counts of what is computed to no end but to have been, once."""
        self._nowhere = torch.zeros(MAX_TOGETHER, DELIVERY, dtype=torch.int64, device=self._device)
        try:
            self.replays = ReplayDevice(self._stream.cuda_stream)
        except Unavailable as error:
            log.warning("turns_not_compiled", reason=str(error))
        else:
            self._out = torch.cuda.ExternalStream(self.replays.out, self._device)

    def serve(self, experts: Mapping[ExpertId, Expert]) -> Mapping[ExpertId, Replays]:
        """See :class:`expert_worker.compute.Compute`; :meth:`start` and :meth:`start_several`
        capture into it."""
        if self.replays is None:
            return {}
        layers = self._layers_of(experts).items()
        new: list[Any] = [one for _, one in layers if len(one.experts) > 1 and not one.prepared]
        for layer in new:
            layer.prepared = True
        self._prepare_later(new, 2 * _GRAPH_ROWS)
        if len(experts) <= CAPTURED_AHEAD:
            ones: dict[int, list[Expert]] = {_ROWS_OF_ONE: [], _GRAPH_ROWS: []}
            for expert, mlp in experts.items():
                if mlp not in self._replays:
                    several = len(self._layers[expert.layer].experts) > 1
                    ones[_ROWS_OF_ONE if several else _GRAPH_ROWS].append(mlp)
            for most_rows, new_ones in ones.items():
                self._prepare_later(new_ones, most_rows)
        return {expert: self._replays_of(mlp) for expert, mlp in experts.items()} | {
            ExpertId(index, wire.SEVERAL): layer.replays for index, layer in layers
        }

    def _prepare_later(self, some: Sequence[Any], most_rows: int) -> None:
        sizes = [1 << n for n in range(most_rows.bit_length())]
        self._to_prepare += [(ref(one), num_rows) for num_rows in sizes for one in some]

    def _layers_of(self, experts: Mapping[ExpertId, Expert]) -> Mapping[int, _Layer]:
        if experts is not self._experts:
            by_layer: defaultdict[int, dict[int, Expert]] = defaultdict(dict)
            for expert in sorted(experts):
                by_layer[expert.layer][expert.index] = experts[expert]
            known = self._layers
            self._experts, self._layers = experts, {}
            for index, here in by_layer.items():
                same = index in known and known[index].experts == here
                self._layers[index] = known[index] if same else _Layer(here)
        return self._layers

    def _replays_of(self, expert: Expert) -> Replays:
        known = self._replays.get(expert, lambda: None)()
        if known is None:
            known = Replays(expert)
            self._replays[expert] = ref(known)
        return known

    def prepare(self, num_experts: int, header_rows: int) -> bool:
        """See :class:`expert_worker.compute.Compute`: graphs of one expert, or of several of a
        layer, for messages of one size or what is merged of those, as many as are under way at
        once."""
        captured = None
        while captured is None and self._to_prepare:
            of_one, num_rows = self._to_prepare.popleft()
            one, slots = of_one(), slots_of(num_rows)[: native.UNDER_WAY]
            try:
                if not isinstance(one, _Layer):
                    captured = None if one is None else self._prepare_one(one, slots)
                elif num_rows > header_rows and slots.start not in one.replays:
                    captured = self._capture_several(one, slots, num_experts, header_rows)
            except RuntimeError as error:
                log.warning("stack_refused", error=str(error))
                captured = False
        if captured is False:
            self._to_prepare.clear()
        return bool(self._to_prepare)

    def _prepare_one(self, expert: Expert, slots: range) -> bool | None:
        graphs = self._replays.get(expert, lambda: None)()
        if graphs is None or slots.start in graphs:
            return None
        return self._capture_one(expert, graphs, slots, WHOLE)

    def mark(self) -> GpuTicket:
        """See :class:`expert_worker.compute.Compute`."""
        return GpuTicket(self._out, self._events).ends_here()

    def start(self, expert: Expert, parts: Sequence[Part]) -> GpuTicket:
        """See :class:`expert_worker.compute.Compute`."""
        ticket = GpuTicket(self._stream, self._events)
        first = parts[0]
        alone = len(parts) == 1 and first.start == 0
        if alone and len(first.buffer_RD) <= _GRAPH_ROWS:
            # Rows past the message's own are computed too, and read by nobody.
            whole = [Part(first.buffer_RD, 0, len(first.buffer_RD))]
            self._replay(expert, first.buffer_RD, lambda: run(expert, whole))
        else:
            run(expert, parts)
        ticket.ends_here()
        graphs = self._replays.get(expert, lambda: None)()
        if alone and self.replays is not None and graphs is not None:
            step, slots = step_of(first.num_rows), slots_of(first.num_rows)
            if self._is_often(expert, slots, step):
                self._capture_one(expert, graphs, slots[: _ring_of(slots)], step)
        return ticket

    def start_several(
        self, experts: Mapping[ExpertId, Expert], layer: int, part: Part, num_experts: int
    ) -> GpuTicket | None:
        """One grouped GEMM a matrix over all experts of the layer that are here."""
        here = self._layers_of(experts).get(layer)
        stack = None if here is None else self._stack(here)
        if here is None or stack is None:
            return None
        buffer_RD, header_rows = part.buffer_RD, part.start
        on_host_E = self._counts.get(buffer_RD.data_ptr())
        if on_host_E is None or len(on_host_E) != num_experts:
            on_host_E = torch.zeros(num_experts, dtype=torch.int32, pin_memory=True)
            self._counts[buffer_RD.data_ptr()] = on_host_E
        ticket = GpuTicket(self._stream, self._events)
        if len(buffer_RD) <= _GRAPH_ROWS_OF_SEVERAL:
            self._replay(stack, buffer_RD, lambda: stack.answer(buffer_RD, header_rows, on_host_E))
        else:
            rows_RD = buffer_RD[: header_rows + part.num_rows]
            ticket.answers_RD = stack.answer(rows_RD, header_rows, on_host_E, in_place=False)
        ticket.ends_here(on_host_E)
        slots = slots_of(header_rows + part.num_rows)
        if self.replays is not None and self._is_often(stack, slots, WHOLE):
            self._capture_several(here, slots[: _ring_of(slots)], num_experts, header_rows)
        return ticket

    def _replay(
        self, owner: object, buffer_RD: torch.Tensor, compute: Callable[[], object]
    ) -> None:
        graphs = self._graphs.setdefault(owner, {})
        known = graphs.setdefault(buffer_RD.data_ptr(), _Graph())
        if known.graph is not None:
            known.graph.replay()
            return
        compute()
        known.uses += 1
        if known.uses == _CAPTURE_AT_USE and not known.refused:
            try:
                known.graph = capture(compute, self._pool)
            except RuntimeError as error:
                known.refused = True
                log.warning("graph_not_captured", rows=len(buffer_RD), error=str(error))

    def _is_often(self, owner: object, slots: range, step: int) -> bool:
        """Batches that the transport computes by itself from here on, once they come often."""
        if not slots:
            return False
        uses = self._uses.setdefault(owner, Counter())
        uses[slots.start, step] += 1
        return uses[slots.start, step] == _CAPTURE_AT_USE

    def _capture_one(self, expert: Expert, graphs: Replays, slots: range, step: int) -> bool:
        # With the weights themselves: those that the expert has move when it is stacked.
        kept = expert.tensors()

        def compute(slot: int | None, rows_RD: torch.Tensor) -> None:
            run(expert, [Part(rows_RD, 0, len(rows_RD))])

        # More rows come and go beside what is computed, by launches of their own.
        few = slot_rows(slots.start) <= _GRAPH_ROWS
        moves = _Moves(bring=few, take_away=few)
        return self._capture(graphs, kept["down"], slots, step, compute, kept, moves)

    def _capture_several(
        self, layer: _Layer, slots: range, num_experts: int, header_rows: int
    ) -> bool | None:
        """For messages of this size, and for those that are computed together; None: there is no
        stack. Their counts say how many rows are computed: that needs no graph for fewer."""
        stack, replays = self._stack(layer), self.replays
        if stack is None or replays is None:
            return None
        down_DH, rows = next(iter(layer.experts.values())).tensors()["down"], slots
        for parts in (1 << n for n in range(MAX_TOGETHER.bit_length())):

            def compute(slot: int | None, rows_RD: torch.Tensor, parts: int = parts) -> None:
                on_host = self._nobodys if slot is None else replays.counts[slot]
                on_host_PE = on_host[: parts * num_experts].view(parts, num_experts)
                to_P4 = self._nowhere if slot is None else replays.deliveries[slot]
                stack.deliver(rows_RD, header_rows, on_host_PE, to_P4)

            of_parts = layer.replays.of_parts(parts)
            moves = _Moves(bring=True, take_away=False)
            if not self._capture(of_parts, down_DH, rows, WHOLE, compute, stack, moves):
                return False
            together = 2 * parts * slot_rows(slots.start)
            if together > _GRAPH_ROWS_OF_PARTS:
                break
            rows = slots_of(together)[: native.UNDER_WAY]
        return True

    def _capture(
        self,
        graphs: Replays,
        down_DH: torch.Tensor,
        slots: range,
        step: int,
        compute: Callable[[int | None, torch.Tensor], None],
        kept: object,
        moves: _Moves,
    ) -> bool:
        """Graphs for these slots, which need what is ``kept``; False where that cannot be."""
        assert self.replays is not None
        replays = self.replays

        def moved(slot: int, rows_RD: torch.Tensor, copies: native.Captured) -> None:
            if moves.bring:
                copies.brings = replays.capture()
            compute(slot, rows_RD)
            if moves.take_away:
                copies.takes_away = replays.capture()

        try:
            for slot in slots:
                buffer_RD = self._slot(slot, down_DH, replays)
                rows_RD = buffer_RD[: slot_rows(slot, step)]
                if slot == slots.start:
                    # So many rows may be new to it; the slot may be somebody's.
                    compute(None, torch.zeros_like(rows_RD))
                copies = native.Captured()
                graph = capture(functools.partial(moved, slot, rows_RD, copies), self._pool)
                graphs.add(slot, graph.raw_cuda_graph_exec(), (graph, kept), step, copies)
        except (RuntimeError, AttributeError) as error:
            # An older torch has no handles to give; these batches stay with our own turns.
            log.warning("graph_not_handed_over", rows=slot_rows(slots.start), error=str(error))
            return False
        return True

    def _slot(self, slot: int, down_DH: torch.Tensor, replays: ReplayDevice) -> torch.Tensor:
        if slot not in replays.buffers:
            buffer_RD = down_DH.new_zeros(slot_rows(slot), len(down_DH))
            self._stream.synchronize()  # the transport writes on a stream of its own
            replays.lend(slot, buffer_RD)
        return replays.buffers[slot]

    def _stack(self, layer: _Layer) -> StackedMlps | None:
        if layer.stacked:
            return layer.stack
        layer.stacked = True
        before = [(expert, expert.tensors()) for expert in layer.experts.values()]
        try:
            layer.stack = StackedMlps.of(layer.experts)
        finally:
            # Weights have moved, all or, where memory ran out, some: what was captured reads where
            # they were, and so does what is queued.
            self._stream.synchronize()
            for expert, weights in before:
                if any(after is not weights[name] for name, after in expert.tensors().items()):
                    self.version += 1
                    for known in (self._graphs, self._uses, self._replays):
                        known.pop(expert, None)
        return layer.stack


def _ring_of(slots: range) -> int:
    return len(slots) if slot_rows(slots.start) <= _RING_ROWS else native.UNDER_WAY


def capture(compute: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of what ``compute`` launches on this thread's stream, which must not be the default
    one. Whatever it launches must have run before; other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # what is set of it later, is by its nodes
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        compute()
    finally:
        graph.capture_end()
    graph.instantiate()
    return graph
