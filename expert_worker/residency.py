"""Which experts are loaded: orders carried out on a thread beside serving."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import structlog

from expert_worker.expert_store import ExpertStore
from mesh.errors import MeshError
from mesh.plan import ExpertId, expert_from_proto
from protos import placement_pb2 as pb

log = structlog.get_logger()


class Residency:
    """Lives on the event loop; ``on_change`` is called there after every change or failure."""

    def __init__(self, store: ExpertStore, on_change: Callable[[], None]) -> None:
        self._store = store
        self._on_change = on_change
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._order = pb.WorkerOrder()
        self._ordered = asyncio.Event()
        self.error = ""
        """Why the last order failed; empty when it did not."""

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
                await self.unload(map(expert_from_proto, order.unload))
                for expert in map(expert_from_proto, order.load):
                    if self._ordered.is_set():
                        break
                    await self.load([expert])
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
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def _change(
        self, change: Callable[[list[ExpertId]], None], experts: list[ExpertId]
    ) -> None:
        if not experts:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._loader, change, experts)
        finally:
            self._on_change()
