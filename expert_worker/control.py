"""What gateways, placement and probes see of a worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

import structlog

from expert_worker.data_plane import DataPlane, DataPlaneStats
from expert_worker.expert_reader import ExpertReader, tensor_facts
from expert_worker.expert_store import ExpertStore
from expert_worker.placement_link import PlacementLink
from expert_worker.residency import Residency
from expert_worker.weights import CHUNK_BYTES, chunks_of
from mesh.config import WorkerConfig
from mesh.errors import InvalidInput, MeshError, ModelMismatch, Overloaded, Unavailable
from mesh.grpc_server import TlsFiles, until_first_ends
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_from_proto, expert_to_proto
from mesh.wire import HEALTH_NAME, MAX_SESSIONS
from protos import placement_pb2, worker_pb2
from protos import worker_pb2_grpc as rpc

log = structlog.get_logger()

SERVICE_NAME = worker_pb2.DESCRIPTOR.services_by_name["ExpertWorker"].full_name
_WATCH_INTERVAL_S = 1.0
_SILENCE_S = 2.0
_SILENCE_BATCHES = 4.0
"""Silence for longer than this many of the longest batches so far is no long batch."""
_LEAVE_TIMEOUT_S = 5.0
_MAX_GATEWAY_SESSIONS = 1024
_MAX_NAME_LENGTH = 256
_MAX_ADDRESS_BYTES = 1 << 16


class WorkerService(rpc.ExpertWorkerServicer):
    """One worker, as gateways, placement and probes see it. Lives on one event loop.

    ``stop`` is set when it should end: by a signal, an operator or placement.
    """

    def __init__(
        self,
        config: WorkerConfig,
        model: ModelConfig,
        info: placement_pb2.WorkerInfo,
        dtype: str,
        store: ExpertStore,
        reader: ExpertReader,
        plane: DataPlane,
        stop: asyncio.Event,
    ) -> None:
        self._model = model
        self._info = info
        self._dtype = dtype
        self._max_rows = config.max_rows
        self._drain_s = config.drain_s
        self._store = store
        self._reader = reader
        self._plane = plane
        self._stop = stop
        self._changed = asyncio.Event()
        self._may_leave = asyncio.Event()
        self._draining = False
        self._reported = plane.stats()
        self._link = PlacementLink(
            config.placement,
            TlsFiles.of(config),
            info,
            resident=lambda: store.resident,
            expert_shards=lambda: self._residency.expert_shards,
            make_report=self._make_report,
            on_order=self._take_order,
        )
        self._residency = Residency(store, reader, self._cut, self._on_change)

    async def run(self, set_ready: Callable[[str, bool], Awaitable[None]]) -> None:
        """Register, obey and watch until told to stop; end when what is in hand is served.

        ``set_ready`` is told of the service and of each expert that comes or goes. Raises what
        placement says when it refuses the worker, and Unavailable when the data plane ends.
        """
        try:
            await until_first_ends(
                self._link.run(),
                self._residency.obey(),
                self._watch(set_ready),
                self._drain_when_told(),
            )
        finally:
            self._residency.close()

    def why_not_alive(self) -> str | None:
        """In words; None while there is a data plane. Callable from any thread."""
        if self._plane.is_alive():
            return None
        return f"the data plane has ended: {self._plane.failure!r}"

    def why_stuck(self) -> str | None:
        """In words; None while rows that are here get answers. Callable from any thread."""
        if (dead := self.why_not_alive()) is not None:
            return dead
        stats = self._plane.stats()
        silent_s = time.monotonic() - stats.last_progress_s
        if stats.busy and silent_s > max(_SILENCE_S, _SILENCE_BATCHES * stats.longest_batch_s):
            return f"the data plane has been silent for {silent_s:.0f} s with work in hand"
        return None

    def why_not_ready(self) -> str | None:
        """In words; None while it may serve. Callable from any thread."""
        if (stuck := self.why_stuck()) is not None:
            return stuck
        if self._draining:
            return "draining"
        if self._store.experts:
            return None
        if self._residency.error:
            return self._residency.error
        if self._residency.awaits_first:
            return "loading its first expert"
        return None if self._link.connected else "not registered with placement"

    # RPCs.

    async def Connect(
        self, request: worker_pb2.ConnectRequest, context: Any
    ) -> worker_pb2.ConnectReply:
        if not 0 < len(request.gateway_id) <= _MAX_NAME_LENGTH:
            raise InvalidInput(f"gateway_id must have 1 to {_MAX_NAME_LENGTH} characters")
        if not 0 < len(request.ucx_address) <= _MAX_ADDRESS_BYTES:
            raise InvalidInput(f"ucx_address must have 1 to {_MAX_ADDRESS_BYTES} bytes")
        if not 0 <= request.reply_session < MAX_SESSIONS:
            raise InvalidInput(f"reply_session must be below {MAX_SESSIONS}")
        units = self._model.num_experts * max(1, request.expert_shards)
        theirs = (request.model_fingerprint, request.hidden_size, request.dtype)
        ours = (self._model.fingerprint, self._model.hidden_size, self._dtype)
        if theirs != ours:
            raise ModelMismatch(
                "gateway {} has model {} with rows of {} {}, this worker {} with rows of {} {}: "
                "start both with the same --model and --dtype".format(
                    request.gateway_id, *theirs, *ours
                )
            )
        if self._draining:
            raise Unavailable(f"worker {self._info.worker_id} is draining")
        if self._plane.stats().sessions >= _MAX_GATEWAY_SESSIONS:
            raise Overloaded(f"{_MAX_GATEWAY_SESSIONS} gateways are connected, which is the limit")
        session = await asyncio.to_thread(
            self._plane.connect,
            request.gateway_id,
            request.ucx_address,
            request.reply_session,
            units,
        )
        log.info("gateway_connected", gateway_id=request.gateway_id, session=session)
        return worker_pb2.ConnectReply(
            session=session, ucx_address=self._info.ucx_address, max_rows=self._max_rows
        )

    async def Disconnect(
        self, request: worker_pb2.DisconnectRequest, context: Any
    ) -> worker_pb2.DisconnectReply:
        await asyncio.to_thread(self._plane.disconnect, request.gateway_id, request.session)
        return worker_pb2.DisconnectReply()

    async def LoadExperts(
        self, request: worker_pb2.LoadExpertsRequest, context: Any
    ) -> worker_pb2.LoadExpertsReply:
        await self._residency.load(self._checked(request.experts))
        return worker_pb2.LoadExpertsReply(resident=map(expert_to_proto, self._store.resident))

    async def UnloadExperts(
        self, request: worker_pb2.UnloadExpertsRequest, context: Any
    ) -> worker_pb2.UnloadExpertsReply:
        await self._residency.unload(self._checked(request.experts))
        return worker_pb2.UnloadExpertsReply(resident=map(expert_to_proto, self._store.resident))

    async def SendExpert(
        self, request: worker_pb2.SendExpertRequest, context: Any
    ) -> AsyncIterator[worker_pb2.ExpertOffer]:
        expert = expert_from_proto(request.expert)
        # Before the check of what the id counts: a cut between them then shows.
        mlp = self._store.experts.get(expert)
        theirs = (request.model_fingerprint, request.dtype, max(1, request.expert_shards))
        ours = (self._model.fingerprint, self._dtype, self._reader.shards)
        if theirs != ours:
            raise ModelMismatch(
                "worker {} wants weights of model {} in {} and {} slices, this worker {} has model "
                "{} in {} and {} slices".format(
                    request.worker_id, *theirs, self._info.worker_id, *ours
                )
            )
        if mlp is None:
            raise Unavailable(f"worker {self._info.worker_id} does not have expert {expert}")
        tensors = mlp.tensors()
        device = next(iter(tensors.values())).device
        chunk_bytes = CHUNK_BYTES[device.type]
        chunks = chunks_of(tensors, chunk_bytes)
        giving = await asyncio.to_thread(
            self._plane.weights, lambda w: w.give(request.ucx_address, request.session, chunks)
        )
        log.info("giving_expert", expert=str(expert), worker_id=request.worker_id)
        try:
            yield worker_pb2.ExpertOffer(
                session=giving.session,
                ucx_address=self._info.ucx_address,
                chunk_bytes=chunk_bytes,
                tensors=tensor_facts(tensors),
            )
            await asyncio.wait((asyncio.wrap_future(giving.ended),))
        finally:
            with suppress(MeshError):
                await asyncio.to_thread(self._plane.weights, lambda w: w.end(giving))

    async def Info(
        self, request: worker_pb2.WorkerInfoRequest, context: Any
    ) -> worker_pb2.WorkerInfoReply:
        stats = self._plane.stats()
        return worker_pb2.WorkerInfoReply(
            worker=self._info,
            resident=map(expert_to_proto, self._store.resident),
            load=_load_between(None, stats),
            sessions=stats.sessions,
            refused=stats.refused,
            memory_used_bytes=self._store.memory_used_bytes,
        )

    async def Drain(
        self, request: worker_pb2.WorkerDrainRequest, context: Any
    ) -> worker_pb2.WorkerDrainReply:
        self._stop.set()
        return worker_pb2.WorkerDrainReply()

    # Between them.

    def _take_order(self, order: placement_pb2.WorkerOrder) -> None:
        if order.leave:
            self._may_leave.set()
            self._stop.set()
        if order.load or order.unload:
            self._residency.take(order)

    def _make_report(self) -> placement_pb2.WorkerReport:
        stats, before = self._plane.stats(), self._reported
        self._reported = stats
        return placement_pb2.WorkerReport(
            resident=map(expert_to_proto, self._store.resident),
            load=_load_between(before, stats),
            queue_rows=stats.queue_rows,
            error=self._residency.error,
            draining=self._draining,
        )

    def _cut(self, shards: int) -> None:
        """Ids count slices, so many to an expert, from here on. On the thread that loads.

        First nothing is resident, then rows of gateways that count otherwise are refused: none
        meets what its id was not.
        """
        log.info("cut", expert_shards=shards)
        self._store.cut(-(-self._info.expert_bytes // shards))
        self._plane.cut(self._model.num_experts * shards)
        self._reader.shards = shards

    def _on_change(self) -> None:
        self._changed.set()
        self._link.report_soon()

    async def _watch(self, set_ready: Callable[[str, bool], Awaitable[None]]) -> None:
        """Keep health true."""
        named: set[ExpertId] = set()
        while True:
            self._changed.clear()
            resident = set(self._store.experts)
            for expert in resident ^ named:
                await set_ready(f"expert/{expert}", expert in resident)
            named = resident
            await set_ready(HEALTH_NAME, self.why_stuck() is None)
            await set_ready(SERVICE_NAME, self.why_not_ready() is None)
            if (dead := self.why_not_alive()) is not None:
                raise Unavailable(f"{dead}; restart the worker")
            with suppress(TimeoutError):
                async with asyncio.timeout(_WATCH_INTERVAL_S):
                    await self._changed.wait()

    async def _drain_when_told(self) -> None:
        """Take no new session, wait for placement to route around, serve what is in hand."""
        await self._stop.wait()
        log.info("draining", resident=len(self._store.experts))
        self._draining = True
        self._on_change()
        with suppress(TimeoutError):
            # Others may have to load its experts first, which takes as long as it takes.
            async with asyncio.timeout(self._drain_s):
                await until_first_ends(self._may_leave.wait(), self._nobody_will_say())
        await asyncio.to_thread(self._plane.drain, _LEAVE_TIMEOUT_S)

    async def _nobody_will_say(self) -> None:
        """Until placement is away, and for long if gateways are there: it may come back."""
        while True:
            await self._link.wait_away()
            if self._plane.stats().sessions:
                await asyncio.sleep(_LEAVE_TIMEOUT_S)
            if not self._link.connected:
                return

    def _checked(self, experts: Iterable[placement_pb2.ExpertId]) -> list[ExpertId]:
        checked = sorted(set(map(expert_from_proto, experts)))
        for expert in checked:
            if (
                expert.layer not in self._model.moe_layers
                or expert.index >= self._model.num_experts * self._reader.shards
            ):
                raise InvalidInput(f"the model has no expert {expert} (layer.expert)")
        return checked


def _load_between(
    before: DataPlaneStats | None, after: DataPlaneStats
) -> list[placement_pb2.ExpertLoad]:
    """Rows and seconds of the experts that had any; since start where there is no before."""
    rows = before.rows if before else {}
    compute_s = before.compute_s if before else {}
    return [
        placement_pb2.ExpertLoad(
            expert=expert_to_proto(expert),
            rows=after.rows[expert] - rows.get(expert, 0),
            compute_s=after.compute_s.get(expert, 0.0) - compute_s.get(expert, 0.0),
        )
        for expert in sorted(after.rows)
        if after.rows[expert] > rows.get(expert, 0)
    ]
