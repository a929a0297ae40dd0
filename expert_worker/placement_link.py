"""A worker's side of its lease: register, beat, obey; and again whenever placement is back.

Serving never waits for any of it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from contextlib import suppress

import grpc
import structlog

from mesh.errors import AlreadyExists, InvalidInput, MeshError, ModelMismatch
from mesh.grpc_server import TlsFiles, open_channel
from mesh.plan import ExpertId, expert_to_proto
from protos import placement_pb2 as pb
from protos import placement_pb2_grpc as rpc

log = structlog.get_logger()

_REGISTER_TIMEOUT_S = 5.0
# Below placement's settle_s: all workers of an earlier life must be back in time.
_LONGEST_PAUSE_S = 1.0
_REFUSALS: dict[grpc.StatusCode, type[MeshError]] = {
    grpc.StatusCode.FAILED_PRECONDITION: ModelMismatch,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
}


class PlacementLink:
    """``make_report`` gives a heartbeat, all but its lease; ``on_order`` takes what comes back."""

    def __init__(
        self,
        target: str,
        tls: TlsFiles | None,
        info: pb.WorkerInfo,
        resident: Callable[[], Iterable[ExpertId]],
        expert_shards: Callable[[], int],
        make_report: Callable[[], pb.WorkerReport],
        on_order: Callable[[pb.WorkerOrder], None],
    ) -> None:
        self._target = target
        self._tls = tls
        self._info = info
        self._resident = resident
        self._expert_shards = expert_shards
        self._make_report = make_report
        self._on_order = on_order
        self._due = asyncio.Event()
        self._epoch = 0
        self._was_accepted = False
        self._away = asyncio.Event()
        self._away.set()

    @property
    def connected(self) -> bool:
        """Placement knows this worker and hears from it."""
        return not self._away.is_set()

    async def wait_away(self) -> None:
        """Until placement no longer does."""
        await self._away.wait()

    def report_soon(self) -> None:
        """Send the next heartbeat now."""
        self._due.set()

    async def run(self) -> None:
        """Keep the lease for ever.

        Raises what placement says when it refuses the worker the first time; later refusals are
        tried again, because a worker that serves must not die of them.
        """
        pause_s = 0.05
        told: str | None = None
        async with open_channel(self._target, self._tls) as channel:
            stub = rpc.PlacementStub(channel)
            while True:
                try:
                    lease = await self._register(stub)
                    pause_s, told = 0.05, None
                    await self._beat(stub.Heartbeat(), lease)
                    log.warning("placement_left", placement=self._target)
                except grpc.aio.AioRpcError as error:
                    refusal = _REFUSALS.get(error.code())
                    if refusal and not self._was_accepted:
                        raise refusal(error.details()) from error
                    if error.details() != told:
                        told = error.details()
                        log.warning("placement_away", placement=self._target, reason=told)
                finally:
                    self._away.set()
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _register(self, stub: rpc.PlacementStub) -> pb.RegisterReply:
        request = pb.RegisterRequest(
            worker=self._info,
            resident=map(expert_to_proto, self._resident()),
            last_epoch=self._epoch,
            expert_shards=self._expert_shards(),
        )
        lease: pb.RegisterReply = await stub.Register(request, timeout=_REGISTER_TIMEOUT_S)
        self._epoch = max(self._epoch, lease.epoch)
        self._was_accepted = True
        self._away.clear()
        log.info("registered", placement=self._target, epoch=lease.epoch)
        return lease

    async def _beat(
        self,
        call: grpc.aio.StreamStreamCall[pb.WorkerReport, pb.WorkerOrder],
        lease: pb.RegisterReply,
    ) -> None:
        """Until the stream ends."""
        reporting = asyncio.create_task(self._send_reports(call, lease))
        try:
            async for order in call:
                if order.epoch < self._epoch:
                    log.warning("old_order_ignored", epoch=order.epoch, ours=self._epoch)
                    continue
                self._epoch = order.epoch
                self._on_order(order)
        finally:
            reporting.cancel()
            call.cancel()
            await asyncio.gather(reporting, return_exceptions=True)

    async def _send_reports(
        self,
        call: grpc.aio.StreamStreamCall[pb.WorkerReport, pb.WorkerOrder],
        lease: pb.RegisterReply,
    ) -> None:
        while not call.done():
            self._due.clear()
            report = self._make_report()
            report.lease_id = lease.lease_id
            await call.write(report)
            with suppress(TimeoutError):
                async with asyncio.timeout(lease.heartbeat_interval_s):
                    await self._due.wait()
