"""The processes of a mesh, to be broken and mended by name."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil

from cli.local_mesh import Member, Mesh
from cli.mesh_spec import MeshSpec
from cli.report import JsonReport
from cli.supervisor import Process, Supervisor
from cli.up import _PRELOAD as PRELOAD
from expert_mesh import AsyncClient
from mesh.errors import MeshError
from mesh.grpc_server import open_channel
from protos import placement_pb2 as pb
from protos.placement_pb2_grpc import PlacementStub
from tests.chaos.events import SETTLE_S, Shape
from tests.netns import Network
from tests.running import DEMO_MODEL

_START_S = 60.0
_END_S = 40.0
_RPC_S = 10.0
_POLL_S = 0.1
_HOME = "home"
BLOCKED = "nothing has come in over shared memory"
"""A worker that says so ends by itself."""
"""The host of placement and the gateways."""


class Violation(Exception):
    """The mesh did what it must not do."""


class Fleet:
    """Every process of one mesh. :func:`running_fleet` makes it; events call its methods.

    ``serving`` has the gateways that clients may ask, by name.
    """

    def __init__(
        self,
        shape: Shape,
        supervisor: Supervisor,
        network: Network | None,
        *,
        model: Path = DEMO_MODEL,
        flags: dict[str, Sequence[str]] | None = None,
    ) -> None:
        self.shape = shape
        self.serving: dict[str, AsyncClient] = {}
        self.members: dict[str, Process] = {}
        """Those that should be there, by the name that a plan has for them."""
        self._ids: dict[str, str] = {}
        """Of who was rolled, the name of the process that came last."""
        self._rolls = itertools.count(2)
        self.ever: list[psutil.Process] = []
        """Every process there was; psutil tells it from another that has its number now."""
        self._supervisor = supervisor
        self._network = network
        self._model = model
        self._flags = flags or {}
        self._addresses: dict[str, str] = {}
        self._ports: dict[str, int] = {}
        self._kills: list[tuple[str, float]] = []
        """Who was killed, and when."""
        self._stopped: set[int] = set()
        self._restarts: list[asyncio.Task[None]] = []

    @property
    def log_dir(self) -> Path:
        return self._supervisor.log_dir

    # Starting.

    async def start(self) -> None:
        """Placement, then all others at once, until every gateway is ready."""
        await self.start_placement()
        async with asyncio.TaskGroup() as group:
            for name in self.shape.worker_names:
                group.create_task(self.start_worker(name))
            for name in self.shape.gateway_names:
                group.create_task(self.start_gateway(name))

    async def start_placement(self) -> None:
        """Always at the same address."""
        await self._spawn("placement", "placement")

    async def start_worker(self, name: str) -> None:
        """Until placement knows it."""
        await self._spawn(name, "worker", "--worker-id", name)
        await self._until(lambda s: name in ids_of(s), _START_S, f"{name} is not registered")

    async def start_gateway(self, name: str) -> None:
        """Until it is ready to serve."""
        await self._spawn(name, "gateway", "--gateway-id", name)
        client = AsyncClient(self._addresses[name])
        until_s = time.monotonic() + _START_S
        while True:
            with suppress(MeshError):
                if await client.health():
                    break
            if time.monotonic() > until_s:
                raise Violation(f"{name} is not ready {_START_S:.0f} s after its start")
            await asyncio.sleep(_POLL_S)
        self.serving[name] = client

    async def _spawn(self, name: str, command: str, *words: str) -> None:
        inside: list[str] = []
        host = "127.0.0.1"
        if self._network is not None:
            home = self.shape.host_of(name) if name in self.shape.worker_names else _HOME
            host = self._network.address(home)
            inside = [self._network.namespace(home)]
        argv = [*inside, command, *words, "--model", str(self._model), "--host", host]
        # Who comes back is found where it was; placement and gateways are looked for there.
        port = self._ports.setdefault(name, _free_port(set(self._ports.values())))
        argv += ["--port", str(port)]
        if command == "placement":
            argv += ["--experts-per-worker", str(self.shape.experts_per_worker)]
        else:
            argv += ["--placement", self._addresses["placement"]]
        process = self._supervisor.spawn(name, [*argv, *self._flags.get(command, ())])
        self._ids.pop(name, None)
        self.members[name] = process
        async with asyncio.timeout(_START_S):
            ready = await self._supervisor.wait_ready(process)
        self._addresses[name] = ready["grpc"]
        self._remember(process)

    def _remember(self, process: Process) -> None:
        with suppress(psutil.NoSuchProcess):
            self.ever.append(psutil.Process(process.pid))

    # Breaking.

    async def kill(self, name: str) -> None:
        """``kill -9`` of the process and of what it started."""
        process = self._leaving(name)
        self._kills.append((name, time.monotonic()))
        self._supervisor.signal(process, signal.SIGKILL)
        await process.exited

    async def kill_engine(self, name: str) -> None:
        """``kill -9`` of a gateway's engine; the front has to end by itself."""
        engine_pid = self.engine_pid(name)
        process = self._leaving(name)
        self._kills.append((name, time.monotonic()))
        os.kill(engine_pid, signal.SIGKILL)
        await self._wait_end(process, code=1)

    async def end(self, name: str) -> None:
        """SIGTERM; it has to end well."""
        process = self._leaving(name)
        await asyncio.sleep(2 * _POLL_S)  # What clients have sent to it is there.
        self._supervisor.signal(process, signal.SIGTERM)
        await self._wait_end(process, code=0)

    async def drain(self, worker: str) -> None:
        """Have placement send a worker away; it has to end well."""
        process = self._leaving(worker)
        async with self.placement() as placement:
            await placement.Drain(pb.DrainRequest(worker_id=process.name), timeout=_RPC_S)
        await self._wait_end(process, code=0)

    async def rebalance(self) -> int:
        """How many experts move."""
        async with self.placement() as placement:
            request = pb.RebalanceRequest()
            reply: pb.RebalanceReply = await placement.Rebalance(request, timeout=_RPC_S)
            return reply.moves

    async def stop_for(self, name: str, for_s: float, *, engine: bool = False) -> None:
        """SIGSTOP, and SIGCONT later."""
        pid = self.engine_pid(name) if engine else self.members[name].pid
        os.kill(pid, signal.SIGSTOP)
        self._stopped.add(pid)
        try:
            await asyncio.sleep(for_s)
        finally:
            self._stopped.discard(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def cut_for(self, host: str, for_s: float) -> None:
        """Cut a host's link, and heal it later."""
        assert self._network is not None
        await asyncio.to_thread(self._network.cut, host)
        try:
            await asyncio.sleep(for_s)
        finally:
            self._network.heal(host)

    @asynccontextmanager
    async def scaled_by(self, count: int) -> AsyncIterator[None]:
        """So many workers more, by what ``expert-mesh scale`` calls, for the length of a block."""
        workers = [n for n in self.members if n not in self.shape.gateway_names]
        mesh = self._mesh([name for name in workers if name != "placement"])
        before = len(mesh.workers)
        await mesh.scale(before + count, lambda event: None)
        comers = mesh.workers[before:]
        for comer in comers:
            self.members[comer.name] = comer.process
            self._addresses[comer.name] = comer.process.ready.result()["grpc"]
            self._remember(comer.process)
        yield
        processes = [self._leaving(comer.name) for comer in comers]
        await mesh.scale(before, lambda event: None)
        for process in processes:
            await self._wait_end(process, code=0)

    async def roll(self, name: str) -> None:
        """Replace one worker by what ``expert-mesh roll`` calls."""
        before = self.members[name]
        mesh = self._mesh([name])
        (member,) = mesh.workers
        member.num_started = next(self._rolls)

        def leaves(process: Process) -> None:
            if process is before:
                successor = member.process
                self.members[name] = successor
                self._ids[name] = successor.name
                self._addresses[name] = successor.ready.result()["grpc"]
                self._remember(successor)

        mesh.on_leave = leaves
        await mesh.roll(lambda event: None)
        await self._wait_end(before, code=0)

    def _mesh(self, names: Sequence[str]) -> Mesh:
        """What ``up`` would know of these workers."""
        values = {"model": self._model, "experts_per_worker": self.shape.experts_per_worker}
        spec = MeshSpec.of({**values, "timeout_s": _START_S, "drain_s": _END_S})
        mesh = _FleetMesh(spec, self._supervisor, self._addresses["placement"], self.shape.workers)
        for name in names:
            mesh.workers.append(Member(name, spec.worker(0), self.members[name]))
        return mesh

    def id_of(self, name: str) -> str:
        """What placement calls the worker that a plan of events calls ``name``."""
        return self._ids.get(name, name)

    def _leaving(self, name: str) -> Process:
        """Ask it nothing more, and expect its end."""
        self.serving.pop(name, None)
        return self.members.pop(name)

    async def _wait_end(self, process: Process, code: int) -> None:
        try:
            async with asyncio.timeout(_END_S):
                end = await asyncio.shield(process.exited)
        except TimeoutError as error:
            raise Violation(f"{process.name} has not ended within {_END_S:.0f} s") from error
        if end.code != code:
            raise Violation(process.describe_end())

    def ended(self, process: Process) -> str | None:
        """What is wrong with the end of a process; None when it was expected."""
        name = next((n for n, member in self.members.items() if member is process), None)
        if name is None:
            return None
        if name in self.shape.worker_names and BLOCKED in process.describe_end():
            # By one that was killed amid a message to it: whoever runs a worker starts it again.
            self._restarts.append(asyncio.create_task(self.start_worker(name)))
            return None
        return f"nobody ended it: {process.describe_end()}"

    # Looking.

    def killed_between(self, name: str, since_s: float, until_s: float) -> bool:
        """Whether a process was killed in that time."""
        return any(name == killed and since_s <= at_s <= until_s for killed, at_s in self._kills)

    def engine_pid(self, gateway: str) -> int:
        (engine,) = psutil.Process(self.members[gateway].pid).children()
        return engine.pid

    @asynccontextmanager
    async def placement(self) -> AsyncIterator[PlacementStub]:
        """A stub on a channel of its own: one that failed would wait before it tries again."""
        async with open_channel(self._addresses["placement"]) as channel:
            yield PlacementStub(channel)

    async def status(self) -> pb.MeshStatus:
        """What placement knows."""
        async with self.placement() as placement:
            request = pb.GetStatusRequest()
            status: pb.MeshStatus = await placement.GetStatus(
                request, timeout=_RPC_S, wait_for_ready=True
            )
            return status

    async def _until(
        self, holds: Callable[[pb.MeshStatus], bool], within_s: float, otherwise: str
    ) -> None:
        until_s = time.monotonic() + within_s
        while True:
            with suppress(grpc.aio.AioRpcError):
                if holds(await self.status()):
                    return
            if time.monotonic() > until_s:
                raise Violation(f"{otherwise} after {within_s:.0f} s")
            await asyncio.sleep(_POLL_S)

    async def expect_unplanned(self, worker: str) -> None:
        """No plan may name a worker for long that is dead or silent."""

        worker_id = self.id_of(worker)

        def unplanned(status: pb.MeshStatus) -> bool:
            return worker_id not in {w.worker_id for w in status.plan.workers}

        await self._until(unplanned, SETTLE_S, f"the plan names {worker}, which is gone,")

    async def expect_complete(self) -> None:
        """Every expert is served."""
        await self._until(lambda s: s.plan.complete, SETTLE_S, "an expert is not served")

    async def expect_not_ready(self, name: str, within_s: float) -> None:
        """Health has to turn red."""
        until_s = time.monotonic() + within_s
        while await self.readyz(name) == 200:
            if time.monotonic() > until_s:
                raise Violation(f"{name} is ready {within_s:.0f} s after it was stopped")
            await asyncio.sleep(5 * _POLL_S)

    async def readyz(self, name: str) -> int:
        """The HTTP status of a process's readiness."""
        return (await self._get(name, "readyz"))[0]

    async def metric(self, name: str, metric: str) -> float:
        """The sum of a metric's series."""
        _, text = await self._get(name, "metrics")
        lines = [line for line in text.splitlines() if line.startswith(f"expert_mesh:{metric}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def _get(self, name: str, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(_http_get, self.members[name].ready.result()["http"], path)

    def continue_all(self) -> None:
        """Nothing stays stopped."""
        for pid in self._stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def close(self) -> None:
        """End all in order: gateways, workers, placement. Each has to end well."""
        self.continue_all()
        for client in self.serving.values():
            await client.close()
        gateways = [n for n in self.members if n in self.shape.gateway_names]
        workers = [n for n in self.members if n not in (*gateways, "placement")]
        for names in (gateways, workers, ["placement"]):
            await asyncio.gather(*(self.end(name) for name in names if name in self.members))


class _FleetMesh(Mesh):
    """A mesh that is there already, as ``up`` would scale and roll it."""

    def __init__(
        self, spec: MeshSpec, supervisor: Supervisor, placement: str, first_number: int
    ) -> None:
        super().__init__(spec, supervisor, _Silent(), asyncio.Queue())
        self._address = placement
        self._first_number = first_number
        self.on_leave: Callable[[Process], None] = lambda process: None
        """Told of each process that is about to be told to leave."""

    def _free_number(self) -> int:
        """None of a worker of the plan, which may be away for a while only."""
        taken = self._supervisor.processes.keys()
        numbers = itertools.count(self._first_number)
        return next(n for n in numbers if self._spec.worker(n).worker_id not in taken)

    def _end(self, process: Process) -> asyncio.Task[None]:
        self.on_leave(process)
        return super()._end(process)


class _Silent(JsonReport):
    """The run itself says what happens."""

    def happened(self, event: Mapping[str, Any], text: str) -> None:
        """Nothing."""


def ids_of(status: pb.MeshStatus) -> set[str]:
    """Of the workers that are registered."""
    return {w.worker.worker_id for w in status.workers}


def _free_port(besides: set[int]) -> int:
    """One that the kernel gives to nobody by itself: it must be there for who comes back."""
    while True:
        port = random.randrange(12000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in besides:
                return port


def _http_get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@asynccontextmanager
async def running_fleet(
    shape: Shape,
    *,
    on_unexpected_end: Callable[[str], None],
    log_dir: Path | None = None,
    flags: dict[str, Sequence[str]] | None = None,
) -> AsyncIterator[Fleet]:
    """A mesh that serves. On every way out no process of it is left.

    Its logs are in ``log_dir``, or in a temporary directory that whoever has read them deletes.
    """
    log_dir = log_dir or Path(tempfile.mkdtemp(prefix="expert-mesh-chaos-"))
    log_dir.mkdir(parents=True, exist_ok=True)
    fleet: Fleet | None = None

    def on_exit(process: Process) -> None:
        wrong = fleet.ended(process) if fleet else None
        if wrong:
            on_unexpected_end(wrong)

    async with AsyncExitStack() as stack:
        network = None
        entry = "cli.main:main"
        if shape.hosts:
            network = stack.enter_context(Network([_HOME, *shape.host_names]))
            entry = "tests.netns:main"
        supervisor = await stack.enter_async_context(
            Supervisor([*PRELOAD, "tests.netns"], log_dir, on_exit, entry=entry)
        )
        fleet = Fleet(shape, supervisor, network, flags=flags)
        try:
            await fleet.start()
            yield fleet
        finally:
            fleet.continue_all()
            fleet.members = {}  # From here on their ends are expected.
