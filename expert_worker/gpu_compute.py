"""A GPU: batches are queued on a stream of their own and asked about, never waited for.

UCX moves rows on its own streams meanwhile, so receiving, computing and sending overlap. What a
GPU does in microseconds, Python takes longer to launch: small batches run from CUDA graphs, one
for each expert and buffer (a buffer's size is a power of two of rows, so that these are few).

Legend: R rows of a buffer, D hidden size.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import structlog
import torch

from expert_worker.compute import Part, run
from expert_worker.expert_store import Expert
from mesh.errors import Unavailable
from mesh.mlp import StackedMlps
from mesh.replay import ReplayDevice, Replays, slot_rows, slots_of

log = structlog.get_logger()

_GRAPH_ROWS = 256
"""Larger batches keep the GPU busy for longer than their launches take."""
_CAPTURE_AT_USE = 3
"""A buffer that an expert meets this often will come again."""


@dataclass
class _Graph:
    """What runs one expert on one buffer, once it was captured."""

    uses: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    refused: bool = False


class GpuTicket:
    """Two events around a batch."""

    __slots__ = ("_counts_E", "_end", "_pool", "_start", "_stream")

    def __init__(
        self, stream: torch.cuda.Stream, pool: list[tuple[torch.cuda.Event, torch.cuda.Event]]
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._start, self._end = pool.pop() if pool else (_event(), _event())
        self._counts_E: torch.Tensor | None = None
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
        self._uses: WeakKeyDictionary[Any, Counter[int]] = WeakKeyDictionary()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._graphs: WeakKeyDictionary[Any, dict[int, _Graph]] = WeakKeyDictionary()
        self._stacks: dict[tuple[int, ...], StackedMlps | None] = {}
        self._counts: dict[int, torch.Tensor] = {}

    def open(self) -> None:
        """Make the stream of this thread the one that computes."""
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)
        torch.cuda.set_stream(self._stream)
        self._pool = torch.cuda.graph_pool_handle()
        self._out = self._stream
        try:
            self.replays = ReplayDevice(self._stream.cuda_stream)
        except Unavailable as error:
            log.warning("turns_not_compiled", reason=str(error))
        else:
            self._out = torch.cuda.ExternalStream(self.replays.out, self._device)

    def native(self, expert: Expert) -> Replays | None:
        """See :class:`expert_worker.compute.Compute`; :meth:`start` captures into it."""
        if self.replays is None:
            return None
        known = self._replays.get(expert, lambda: None)()
        if known is None:
            known = Replays(expert)
            self._replays[expert] = ref(known)
        return known

    def mark(self) -> GpuTicket:
        """See :class:`expert_worker.compute.Compute`."""
        return GpuTicket(self._out, self._events).ends_here()

    def start(self, expert: Expert, parts: Sequence[Part]) -> GpuTicket:
        """See :class:`expert_worker.compute.Compute`."""
        ticket = GpuTicket(self._stream, self._events)
        first = parts[0]
        if len(parts) == 1 and first.start == 0 and len(first.buffer_RD) <= _GRAPH_ROWS:
            # Rows past the message's own are computed too, and read by nobody.
            whole = [Part(first.buffer_RD, 0, len(first.buffer_RD))]
            self._replay(expert, first.buffer_RD, lambda: run(expert, whole))
            if self.replays is not None:
                self._hand_over(expert, first, self.replays)
        else:
            run(expert, parts)
        return ticket.ends_here()

    def start_several(
        self, experts: Mapping[int, Expert], part: Part, num_experts: int
    ) -> GpuTicket | None:
        """One grouped GEMM a matrix over all experts of the layer that are here."""
        stack = self._stack(experts)
        if stack is None:
            return None
        buffer_RD = part.buffer_RD
        counts_E = buffer_RD[: part.start].reshape(-1).view(torch.int32)[:num_experts]
        on_host_E = self._counts.get(buffer_RD.data_ptr())
        if on_host_E is None or len(on_host_E) != num_experts:
            on_host_E = torch.zeros(num_experts, dtype=torch.int32, pin_memory=True)
            self._counts[buffer_RD.data_ptr()] = on_host_E
        small = len(buffer_RD) <= _GRAPH_ROWS
        rows_RD = buffer_RD[part.start :] if small else part.x_RD

        def compute() -> None:
            on_host_E.copy_(counts_E, non_blocking=True)
            rows_RD.copy_(stack(rows_RD, counts_E))

        ticket = GpuTicket(self._stream, self._events)
        if small:
            self._replay(stack, buffer_RD, compute)
        else:
            compute()
        return ticket.ends_here(on_host_E)

    def _replay(self, owner: object, buffer_RD: torch.Tensor, compute: Callable[[], None]) -> None:
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

    def _hand_over(self, expert: Expert, part: Part, replays: ReplayDevice) -> None:
        """Have the transport compute batches of this size, once they come often."""
        uses = self._uses.setdefault(expert, Counter())
        slots = slots_of(part.num_rows)
        uses[slots.start] += 1
        graphs = self._replays.get(expert, lambda: None)()
        if uses[slots.start] != _CAPTURE_AT_USE or graphs is None:
            return
        try:
            for slot in slots:
                buffer_RD = self._slot(slot, part.buffer_RD, replays)
                whole = [Part(buffer_RD, 0, len(buffer_RD))]
                graph = capture(functools.partial(run, expert, whole), self._pool)
                graphs.add(slot, graph.raw_cuda_graph_exec(), graph)
        except (RuntimeError, AttributeError) as error:
            # An older torch has no handles to give; these batches stay with `start`.
            log.warning("graph_not_handed_over", rows=part.num_rows, error=str(error))

    def _slot(self, slot: int, like_RD: torch.Tensor, replays: ReplayDevice) -> torch.Tensor:
        if slot not in replays.buffers:
            buffer_RD = like_RD.new_zeros(slot_rows(slot), like_RD.shape[1])
            self._stream.synchronize()  # the transport writes on a stream of its own
            replays.lend(slot, buffer_RD)
        return replays.buffers[slot]

    def _stack(self, experts: Mapping[int, Expert]) -> StackedMlps | None:
        key = tuple(id(expert) for expert in experts.values())
        if key not in self._stacks:
            # A layer whose experts have changed has another key; the old stack goes with it.
            gone = set(key)
            self._stacks = {k: s for k, s in self._stacks.items() if not gone.intersection(k)}
            self._stacks[key] = StackedMlps.of(experts)
        return self._stacks[key]


def capture(compute: Callable[[], None], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of what ``compute`` launches on this thread's stream, which must not be the default
    one. Whatever it launches must have run before; other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        compute()
    finally:
        graph.capture_end()
    return graph
