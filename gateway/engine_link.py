"""The front's end of the engine: requests in, outputs out, and whether it is still there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from gateway.ipc import AsyncChannel
from mesh.errors import EngineDied
from protos import engine_pb2 as pb

log = structlog.get_logger()

PING_INTERVAL_S = 1.0
SILENT_AFTER_S = 10.0
DEAD_AFTER_S = 120.0
"""No step takes that long; an engine that is silent for longer is ended."""

Deliver = Callable[[pb.Output, float], None]
"""Takes one output of a request and when it came (CLOCK_MONOTONIC)."""


class EngineLink:
    """Everything said to and by the engine process. Lives on one event loop.

    Each submitted request is delivered exactly one output with a finish reason, unless it is
    forgotten before: also when the engine dies.
    """

    def __init__(self, channel: AsyncChannel) -> None:
        self._channel = channel
        self._deliver: dict[str, Deliver] = {}
        self._heard_s = time.monotonic()
        self._num_pings = 0
        self.started: asyncio.Future[pb.Started] = asyncio.get_running_loop().create_future()
        self.ended = False
        self._news = asyncio.Event()
        self.stats = pb.EngineStats()
        self.on_peer_lost: Callable[[pb.PeerLost], None] = lambda lost: None
        self.on_peer_late: Callable[[pb.PeerLate], None] = lambda late: None
        self.on_expert_fault: Callable[[pb.ExpertFault], None] = lambda fault: None
        self.on_transport_reopened: Callable[[pb.TransportReopened], None] = lambda reopened: None

    def submit(self, submit: pb.Submit, deliver: Deliver) -> None:
        """Hand a request to the engine. Raises EngineDied when there is none."""
        if self.ended:
            raise EngineDied(_DIED)
        if not self._deliver:
            self._heard_s = time.monotonic()  # it owed us nothing until now
        self._deliver[submit.request_id] = deliver
        self._send(pb.ToEngine(submit=submit))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ask for the end of requests; their last outputs still come."""
        known = [request_id for request_id in request_ids if request_id in self._deliver]
        if known:
            self._send(pb.ToEngine(cancel=pb.CancelRequests(request_ids=known)))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Cancel requests whose further outputs nobody wants."""
        request_ids = list(request_ids)
        self.cancel(request_ids)
        for request_id in request_ids:
            self._deliver.pop(request_id, None)

    def route(self, routing: pb.Routing) -> None:
        """Replace the engine's routing between two steps; stats with its epoch come then."""
        self._send(pb.ToEngine(routing=routing))
        self._ping()

    def drop_peer(self, drop: pb.DropPeer) -> None:
        """Have the engine do without a worker at once, in the middle of a step if need be."""
        self._send(pb.ToEngine(drop_peer=drop))

    def shutdown(self) -> None:
        """Ask the engine to end now; :meth:`run` returns when it has."""
        self._send(pb.ToEngine(shutdown=pb.Shutdown(drain=False)))

    async def close(self) -> None:
        """Close our end, which ends an engine that has not ended."""
        await self._channel.close()

    async def until_epoch(self, epoch: int) -> None:
        """Wait until the engine routes by ``epoch`` or a later one, or has ended."""
        while self.stats.epoch < epoch and not self.ended:
            self._news.clear()
            await self._news.wait()

    def silent_s(self) -> float:
        """How long the engine has said nothing while it owes us something; 0 while it is idle."""
        return time.monotonic() - self._heard_s if self._deliver else 0.0

    async def run(self) -> None:
        """Read until the engine ends, then end every request that it left."""
        try:
            async with asyncio.TaskGroup() as tasks:
                pings = tasks.create_task(self._ping_while_it_owes())
                async for message in self._channel:
                    self._take(message)
                pings.cancel()
        finally:
            self._end()

    async def _ping_while_it_owes(self) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            if self._deliver:
                self._ping()

    def _ping(self) -> None:
        """The engine answers between two steps, with stats."""
        self._num_pings += 1
        self._send(pb.ToEngine(ping=pb.Ping(sequence=self._num_pings)))

    def _send(self, message: pb.ToEngine) -> None:
        if not self.ended:
            self._channel.send(message)

    def _take(self, message: pb.FromEngine) -> None:
        self._heard_s = now = time.monotonic()
        match message.WhichOneof("body"):
            case "outputs":
                for output in message.outputs.outputs:
                    self._deliver_one(output, now)
            case "stats":
                self.stats = message.stats
                self._news.set()
            case "peer_lost":
                self.on_peer_lost(message.peer_lost)
            case "peer_late":
                self.on_peer_late(message.peer_late)
            case "expert_fault":
                self.on_expert_fault(message.expert_fault)
            case "transport_reopened":
                self.on_transport_reopened(message.transport_reopened)
            case "started":
                self.started.set_result(message.started)

    def _deliver_one(self, output: pb.Output, now: float) -> None:
        ends = output.finish_reason != ""
        take = self._deliver.pop if ends else self._deliver.get
        deliver = take(output.request_id, None)
        if deliver is not None:
            deliver(output, now)

    def _end(self) -> None:
        self.ended = True
        self._news.set()
        if not self.started.done():
            self.started.set_exception(EngineDied(_DIED))
        for request_id in list(self._deliver):
            last = pb.Output(
                request_id=request_id,
                finish_reason="error",
                error_code=EngineDied.__name__,
                error_message=_DIED,
            )
            self._deliver_one(last, time.monotonic())


_DIED = "the gateway's engine process ended; try again once the gateway is back"
