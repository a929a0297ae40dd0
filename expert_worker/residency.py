"""Which experts are loaded: orders carried out on a thread beside serving."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from expert_worker.expert_reader import ExpertReader
from expert_worker.expert_store import ExpertStore
from mesh.errors import MeshError
from mesh.plan import ExpertId, expert_from_proto, shards_of
from protos import placement_pb2 as pb

log = structlog.get_logger()
T = TypeVar("T")


class Residency:
    """Lives on the event loop; ``on_change`` is called there after every change or failure.

    ``cut`` makes the worker's indices count another number of slices to an expert, on the
    thread that loads.
    """

    def __init__(
        self,
        store: ExpertStore,
        reader: ExpertReader,
        cut: Callable[[int], None],
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._reader = reader
        self._cut = cut
        self._on_change = on_change
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._order = pb.WorkerOrder()
        self._ordered = asyncio.Event()
        self.error = ""
        """Why the last order failed; empty when it did not."""
        self.expert_shards = 0
        """What indices count, as in an order; 0 before the first."""

    @property
    def awaits_first(self) -> bool:
        """Nothing is loaded yet, and something is to be."""
        return bool(self._order.load) and not self._store.experts

    def take(self, order: pb.WorkerOrder) -> None:
        """Carry this out in place of what is left of the order before."""
        self._order = order
        self._ordered.set()

    async def obey(self) -> None:
        """Carry out orders, for ever. Each expert serves as soon as it is in."""
        while True:
            await self._ordered.wait()
            self._ordered.clear()
            order = self._order
            try:
                await self._adopt(order)
                await self.unload(map(expert_from_proto, order.unload))
                for number, expert in enumerate(map(expert_from_proto, order.load), start=1):
                    if self._ordered.is_set():
                        break
                    await self.load([expert])
                    log.info("loading_experts", done=number, of=len(order.load))
                self.error = ""
            except (MeshError, RuntimeError, OSError) as error:  # a device out of memory, for one
                log.exception("order_failed")
                self.error = str(error)
            self._on_change()

    async def load(self, experts: Iterable[ExpertId]) -> None:
        """See :meth:`ExpertStore.load`."""
        await self._change(self._store.load, list(experts))

    async def unload(self, experts: Iterable[ExpertId]) -> None:
        """See :meth:`ExpertStore.unload`."""
        await self._change(self._store.unload, list(experts))

    def close(self) -> None:
        """Load nothing more."""
        self._reader.close()
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def _adopt(self, order: pb.WorkerOrder) -> None:
        """Take over what an order says of all experts: what ids count, who has which."""
        shards = shards_of(order)
        if shards != max(1, self.expert_shards):
            await self._run(self._cut, shards)
        self.expert_shards = shards
        sources: defaultdict[ExpertId, list[str]] = defaultdict(list)
        for source in order.sources:
            sources[expert_from_proto(source.expert)].append(source.grpc_address)
        self._reader.sources = sources

    async def _change(
        self, change: Callable[[list[ExpertId]], None], experts: list[ExpertId]
    ) -> None:
        if experts:
            await self._run(change, experts)

    async def _run(self, change: Callable[[T], None], subject: T) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._loader, change, subject)
        finally:
            self._on_change()
