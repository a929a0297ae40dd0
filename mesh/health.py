"""``grpc.health.v1`` as every process serves it: what may be asked without a key.

A stranger may ask, so nothing here waits for a client: whoever says a status goes on at once,
and a watcher that reads slowly misses the states in between, never the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from mesh.errors import NotFound, Overloaded

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Health"].full_name
MAX_WATCHERS = 1000


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Liveness (``""``) is SERVING from the start; other names come as they are said."""

    def __init__(self) -> None:
        self._ready = {"": True}
        self._ended = False
        # A watcher's event is set when what it watches may have changed.
        self._watchers: dict[asyncio.Event, str] = {}

    def set_ready(self, name: str, ready: bool) -> None:
        """What is said of a name from now on. New names may come at any time."""
        ready = ready and not self._ended
        if self._ready.get(name) == ready:
            return
        self._ready[name] = ready
        for changed, watched in self._watchers.items():
            if watched == name:
                changed.set()

    def end(self) -> None:
        """NOT_SERVING for all names and for good; who watches is told, and its stream ends."""
        self._ended = True
        for name in self._ready:
            self.set_ready(name, False)
        for changed in self._watchers:
            changed.set()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        if request.service not in self._ready:
            raise NotFound(f"this process serves nothing of the name {request.service!r}")
        return pb.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: pb.HealthListRequest, context: Any) -> pb.HealthListResponse:
        statuses = {name: pb.HealthCheckResponse(status=self._status(name)) for name in self._ready}
        return pb.HealthListResponse(statuses=statuses)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: Any
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        if len(self._watchers) >= MAX_WATCHERS:
            raise Overloaded(
                f"{MAX_WATCHERS} clients watch the health of this process, which is the limit; "
                "use Check"
            )
        changed = asyncio.Event()
        self._watchers[changed] = request.service
        try:
            told = None
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != told:
                    yield pb.HealthCheckResponse(status=status)
                    told = status
                elif self._ended:
                    return
                else:
                    await changed.wait()
        finally:
            del self._watchers[changed]

    def _status(self, name: str) -> pb.HealthCheckResponse.ServingStatus:
        if name not in self._ready:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        return (
            pb.HealthCheckResponse.SERVING
            if self._ready[name]
            else pb.HealthCheckResponse.NOT_SERVING
        )
