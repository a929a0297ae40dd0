"""The processes of one mesh on this machine: started, started again, scaled, rolled and ended."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.backoff import Backoff
from cli.liveness import LOOKS, is_live
from cli.mesh_spec import MAX_WORKERS, MeshSpec
from cli.options import to_argv
from cli.report import JsonReport, Ready, TextReport
from cli.supervisor import Process, Supervisor
from mesh.config import GatewayConfig, PlacementConfig, WorkerConfig
from mesh.errors import DeadlineExceeded, InvalidInput, Overloaded, PlacementError, Unavailable
from mesh.grpc_server import TlsFiles, open_channel, until_first_ends
from protos import placement_pb2 as pb
from protos.placement_pb2_grpc import PlacementStub

Config = PlacementConfig | WorkerConfig | GatewayConfig
Listener = Callable[[dict[str, Any]], None]
"""Is told each event, as JSON has it."""

_INFERENCE = "expertmesh.v1.Inference"
_POLL_S = 0.1
_RPC_TIMEOUT_S = 5.0
# A worker ends by itself within drain_s; past that and this it is hung.
_LATE_S = 10.0


@dataclass(eq=False)
class Member:
    """One process that there should be, whichever process it is by now."""

    name: str
    config: Config
    process: Process
    num_started: int = 1
    began_s: float = field(default_factory=time.monotonic)
    backoff: Backoff = field(default_factory=Backoff)
    restarting: asyncio.Task[None] | None = None
    silent_looks: int = 0
    """In a row, of this process: how often it was asked whether it lives and did not say so."""
    rolling: bool = False
    """A successor is on its way, so its end is nobody else's care."""

    def became(self, process: Process) -> None:
        self.process = process
        self.began_s = time.monotonic()
        self.silent_looks = 0


class Mesh:
    """What a :class:`MeshSpec` says, and whatever it was scaled to since."""

    def __init__(
        self,
        spec: MeshSpec,
        supervisor: Supervisor,
        report: JsonReport | TextReport,
        ended: asyncio.Queue[Process],
    ) -> None:
        self.placement: list[Member] = []
        self.workers: list[Member] = []
        self.gateways: list[Member] = []
        self.draining = False
        self._spec = spec
        self._tls = TlsFiles.of(spec.placement)
        self._supervisor = supervisor
        self._report = report
        self._ended = ended
        self._progress: dict[str, tuple[int, int]] = {}
        self._note = ""
        self._busy = ""
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def processes(self) -> list[Process]:
        """Of each that there should be, the one that was started last."""
        return [m.process for m in (*self.placement, *self.workers, *self.gateways)]

    @property
    def patience_s(self) -> float:
        """The longest that :meth:`scale` or :meth:`roll` may have nothing to tell."""
        return self._spec.up.timeout_s + self._spec.up.drain_s + 2 * _LATE_S

    def describe(self) -> dict[str, Any]:
        """Which mesh this is."""
        return {
            "mesh": self._spec.up.name,
            "placement": self.ready.placement["grpc"],
            "workers": len(self.workers),
            "patience_s": self.patience_s,
        }

    # From the first process to ready.

    async def start(self) -> None:
        """Start everything; when it returns, all of it serves and :attr:`ready` says where.

        Raises Unavailable if a process ends, DeadlineExceeded if it takes too long.
        """
        starting = asyncio.create_task(self._start())
        death = asyncio.create_task(self._ended.get())
        try:
            await asyncio.wait(
                {starting, death},
                timeout=self._spec.ready_within_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if death.done():
                raise Unavailable(death.result().describe_end())
            if not starting.done():
                raise DeadlineExceeded(self._describe_missing())
            starting.result()
        finally:
            starting.cancel()
            death.cancel()
            await asyncio.gather(starting, death, return_exceptions=True)

    async def _start(self) -> None:
        began_s = time.monotonic()
        spec = self._spec
        self.placement = [self._first("placement", spec.placement)]
        self._address = (await self._supervisor.wait_ready(self.placement[0].process))["grpc"]
        self.workers = [self._first_worker(number) for number in range(spec.num_workers)]
        self.gateways = [self._first(str(g.gateway_id), g) for g in spec.gateways]
        plan = await self._wait_serving()
        for member in (*self.placement, *self.gateways):
            # Others know it by its address, so when it is started again it is there.
            member.config = dataclasses.replace(
                member.config,
                port=_port(member.process, "grpc"),
                http_port=_port(member.process, "http"),
            )
        self.ready = Ready(
            mesh=spec.up.name,
            placement=self.placement[0].process.ready.result(),
            gateways=[member.process.ready.result() for member in self.gateways],
            workers=[member.process.ready.result() for member in self.workers],
            plan=plan,
            log_dir=self._supervisor.log_dir,
            took_s=time.monotonic() - began_s,
        )

    def _first_worker(self, number: int) -> Member:
        config = self._spec.worker(number)
        return self._first(str(config.worker_id), config)

    def _first(self, name: str, config: Config) -> Member:
        return Member(name, config, self._spawn(name, config))

    def _next(self, member: Member) -> Process:
        """Another process for a member, under another name: the one before may not be gone."""
        member.num_started += 1
        return self._spawn(f"{member.name}.{member.num_started}", member.config)

    def _spawn(self, name: str, config: Config) -> Process:
        match config:
            case PlacementConfig():
                argv = ["placement", *to_argv(config)]
            case WorkerConfig():
                worker = dataclasses.replace(config, worker_id=name, placement=self._address)
                argv = ["worker", *to_argv(worker)]
            case GatewayConfig():
                gateway = dataclasses.replace(config, gateway_id=name, placement=self._address)
                argv = ["gateway", *to_argv(gateway)]
        return self._supervisor.spawn(name, argv)

    async def _wait_serving(self) -> pb.Plan:
        """Report progress until every worker holds its experts and every gateway serves."""
        serving = [asyncio.create_task(self._serves(member.process)) for member in self.gateways]
        try:
            async for mesh in self._statuses():
                self._note = mesh.plan.note
                resident = {(e.layer, e.index) for w in mesh.workers for e in w.resident}
                self._progress = {
                    "processes up": (
                        sum(p.ready.done() for p in self.processes),
                        len(self.processes),
                    ),
                    "workers registered": (len(mesh.workers), len(self.workers)),
                    "experts loaded": (len(resident), len(self._spec.rules.experts)),
                    "gateways serving": (sum(map(_succeeded, serving)), len(serving)),
                }
                self._report.progress(self._progress)
                if mesh.plan.complete and all(n >= of for n, of in self._progress.values()):
                    return mesh.plan
            raise AssertionError("statuses never end")
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)

    async def _statuses(self) -> AsyncIterator[pb.MeshStatus]:
        """What placement knows, again and again; nothing while it is away."""
        async with open_channel(self._address, self._tls) as channel:
            placement = PlacementStub(channel)
            while True:
                with suppress(grpc.aio.AioRpcError):
                    yield await placement.GetStatus(pb.GetStatusRequest(), timeout=_RPC_TIMEOUT_S)
                await asyncio.sleep(_POLL_S)

    async def _serves(self, gateway: Process) -> None:
        """Returns once the gateway's health says that it may be used."""
        address = (await self._supervisor.wait_ready(gateway))["grpc"]
        async with open_channel(address, self._tls) as channel:
            request = health_pb2.HealthCheckRequest(service=_INFERENCE)
            async for reply in health_pb2_grpc.HealthStub(channel).Watch(request):
                if reply.status == reply.SERVING:
                    return

    def _describe_missing(self) -> str:
        """What a start that took too long was waiting for."""
        missing = [f"{n} of {of} {what}" for what, (n, of) in self._progress.items() if n < of]
        note = f"; placement says: {self._note}" if self._note else ""
        return (
            f"not ready after {self._spec.ready_within_s:.0f} s: "
            f"{', '.join(missing) or 'placement is not up'}{note}; "
            f"the logs are in {self._supervisor.log_dir}"
        )

    # While it serves.

    async def watch(self) -> None:
        """Report each end and start again what died or hangs, for ever.

        Raises Unavailable when no gateway is left, and none is to come.
        """
        await until_first_ends(self._take_ends(), self._look_after_all())

    async def _take_ends(self) -> None:
        while True:
            self._take_end(await self._ended.get())
            if self._supervisor.ended:
                raise Unavailable(
                    "the process that starts all others has ended, and they with it; "
                    f"the logs are in {self._supervisor.log_dir}"
                )
            if not (self._spec.up.restart or any(g.process.alive for g in self.gateways)):
                raise Unavailable(f"no gateway is left; the logs are in {self._supervisor.log_dir}")

    async def _look_after_all(self) -> None:
        """Kill what hangs, which is then started again as what died is."""
        up = self._spec.up
        if not (up.restart and up.hung_after_s):
            await asyncio.Event().wait()
        while True:
            await asyncio.sleep(up.hung_after_s / LOOKS)
            members = (*self.placement, *self.workers, *self.gateways)
            await asyncio.gather(*map(self._look_after, members))

    async def _look_after(self, member: Member) -> None:
        process = member.process
        if member.rolling or not process.alive or not process.started.done():
            return
        up = self._spec.up
        if process.ready.done():
            lives = await is_live(process.ready.result()["http"], up.hung_after_s / LOOKS)
        else:
            lives = time.monotonic() - member.began_s < up.timeout_s
        if member.process is not process or not process.alive:
            return
        member.silent_looks = 0 if lives else member.silent_looks + 1
        if member.silent_looks == LOOKS:
            self._say("hung", name=process.name, pid=process.pid, silent_s=up.hung_after_s)
            self._supervisor.signal(process, signal.SIGKILL)

    def _take_end(self, process: Process) -> None:
        members = (*self.placement, *self.workers, *self.gateways)
        member = next((m for m in members if m.process is process), None)
        end = process.exited.result()
        if end.was_asked_for and (member is None or member in self.workers):
            # By us, by an operator's drain or by a signal: somebody wants one fewer.
            if member and not member.rolling:
                self.workers.remove(member)
            self._say("left", name=process.name, pid=process.pid, workers=len(self.workers))
            return
        self._say(
            "exited",
            process.describe_end(),
            name=process.name,
            pid=process.pid,
            code=end.code,
            signal=end.signal,
        )
        if member:
            self._tend(member)

    def _tend(self, member: Member) -> None:
        """Start a member again if it is dead and nobody else does."""
        cared_for = member.process.alive or member.rolling or member.restarting
        if cared_for or not self._spec.up.restart or self.draining or self._supervisor.ended:
            return
        pause_s = member.backoff.pause_s(time.monotonic() - member.began_s)
        self._say(
            "restarting", name=member.process.name, ends=member.backoff.num_ends, pause_s=pause_s
        )
        member.restarting = self._in_background(self._restart(member, pause_s))

    async def _restart(self, member: Member, pause_s: float) -> None:
        before = member.process
        try:
            await asyncio.sleep(pause_s)
            member.became(self._next(member))
        finally:
            member.restarting = None
        with suppress(Unavailable):  # It ended: that is told as every end is.
            await self._supervisor.wait_ready(member.process)
            self._say_joined(member, replaces=before.name)

    async def scale(self, num_workers: int, listener: Listener) -> None:
        """Start or drain workers, the youngest first, until there are ``num_workers``.

        Returns once placement knows those that came, and those that left have ended. Raises
        PlacementError for fewer than the rules need, Overloaded while another is at it, and what
        befell a worker that did not come up.
        """
        rules = self._spec.rules
        if not 0 < num_workers <= MAX_WORKERS:
            raise InvalidInput(f"workers must be 1 to {MAX_WORKERS}")
        if num_workers < rules.workers_needed:
            raise PlacementError(
                f"{num_workers} workers cannot hold every expert under the rule {rules.rule!r} "
                f"with {rules.experts_per_worker} of a layer on each: {rules.workers_needed} can"
            )
        with self._only(f"scaling to {num_workers} workers", listener):
            if (more := num_workers - len(self.workers)) > 0:
                await self._grow(more)
            else:
                leaving = self.workers[num_workers:]
                del self.workers[num_workers:]
                await asyncio.gather(*map(self._let_go, leaving))

    async def _grow(self, count: int) -> None:
        comers: list[Member] = []
        for _ in range(count):
            comers.append(self._first_worker(self._free_number()))

        async def join(member: Member) -> None:
            await self._joined(member.process)
            self.workers.append(member)
            self._say_joined(member)

        for result in await asyncio.gather(*map(join, comers), return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _free_number(self) -> int:
        """The first that no worker has, nor one that is on its way in or out."""
        taken = {member.name for member in self.workers} | self._supervisor.processes.keys()
        return next(n for n in itertools.count() if self._spec.worker(n).worker_id not in taken)

    async def _let_go(self, member: Member) -> None:
        if member.restarting:
            member.restarting.cancel()
        await self._end(member.process)

    async def roll(self, listener: Listener) -> None:
        """Replace every worker by a new process, one after another, without a pause.

        The next one starts only when the one before has taken over. Raises like :meth:`scale`;
        what is not replaced by then serves on.
        """
        with self._only("rolling", listener):
            members = list(self.workers)
            for done, member in enumerate(members, 1):
                if member not in self.workers:
                    continue  # It left in the meantime.
                began_s = time.monotonic()
                before = member.process
                await self._replace(member)
                self._say(
                    "replaced",
                    name=before.name,
                    by=member.process.name,
                    pid=member.process.pid,
                    took_s=round(time.monotonic() - began_s, 3),
                    done=done,
                    of=len(members),
                )

    async def _replace(self, member: Member) -> None:
        """Successor in, predecessor out; what dies in between is started again afterwards."""
        member.rolling = True
        try:
            if member.restarting:
                member.restarting.cancel()
            before, successor = member.process, self._next(member)
            mesh = await self._joined(successor, whole=True)
            if lack := _lack_of_room(mesh, before.name, successor.name):
                await self._end(successor)
                raise PlacementError(lack)
            member.became(successor)
            await self._end(before)
        finally:
            member.rolling = False
            self._tend(member)

    async def _joined(self, process: Process, *, whole: bool = False) -> pb.MeshStatus:
        """Wait until placement knows a worker; if ``whole``, until every expert is served too.

        On every other way out the worker is ended again.
        """
        limit_s = self._spec.up.timeout_s
        lack = "it did not register"
        try:
            async with asyncio.timeout(limit_s):
                await self._supervisor.wait_ready(process)
                async for mesh in self._statuses():
                    if not process.alive:
                        raise Unavailable(process.describe_end())
                    if any(w.worker.worker_id == process.name for w in mesh.workers):
                        if mesh.plan.complete or not whole:
                            return mesh
                        lack = f"not every expert is served ({mesh.plan.note})"
            raise AssertionError("placement is asked for ever")
        except BaseException as error:
            self._end(process)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(
                    f"{process.name} was stopped after {limit_s:.0f} s: {lack}; "
                    f"its log is {process.log}"
                ) from None
            raise

    def _end(self, process: Process) -> asyncio.Task[None]:
        """Tell a worker to leave; done when it has, which needs nobody to wait for it."""

        async def end() -> None:
            limit_s = self._spec.up.drain_s + _LATE_S
            for number in (signal.SIGTERM, signal.SIGKILL):
                if process.alive:
                    self._supervisor.signal(process, number)
                    await asyncio.wait([process.exited], timeout=limit_s)

        return self._in_background(end())

    @contextmanager
    def _only(self, what: str, listener: Listener) -> Iterator[None]:
        """One at a time, and its listener hears every event."""
        if self._busy:
            raise Overloaded(f"the mesh is {self._busy}: try again when that is done")
        self._busy = what
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)
            self._busy = ""

    def _say_joined(self, member: Member, *, replaces: str | None = None) -> None:
        self._say(
            "joined",
            name=member.process.name,
            pid=member.process.pid,
            address=member.process.ready.result()["grpc"],
            replaces=replaces,
            took_s=round(time.monotonic() - member.began_s, 3),
        )

    def _say(self, event: str, text: str = "", /, **fields: Any) -> None:
        told = {"event": event, **fields}
        self._report.happened(told, text)
        for listener in self._listeners:
            listener(told)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # From draining to the last process.

    async def drain(self) -> None:
        """End gateways, then workers, then placement, each kind within ``drain_s``."""
        self.draining = True
        self._report.draining()
        for task in self._tasks:
            task.cancel()
        placement, gateways = (
            {member.process.name for member in members}
            for members in (self.placement, self.gateways)
        )
        workers = self._supervisor.processes.keys() - placement - gateways
        for names in (gateways, workers, placement):
            processes = [p for name, p in self._supervisor.processes.items() if name in names]
            for process in processes:
                self._supervisor.signal(process, signal.SIGTERM)
            if processes:
                await asyncio.wait([p.exited for p in processes], timeout=self._spec.up.drain_s)
            for process in processes:
                self._supervisor.signal(process, signal.SIGKILL)

    def kill(self) -> None:
        """Cut :meth:`drain` short."""
        for process in self._supervisor.processes.values():
            self._supervisor.signal(process, signal.SIGKILL)


def _succeeded(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _port(process: Process, kind: str) -> int:
    return int(process.ready.result()[kind].rpartition(":")[2])


def _lack_of_room(mesh: pb.MeshStatus, before: str, successor: str) -> str:
    """Why a worker cannot hold what another does, in words; empty if it can."""
    known = {w.worker.worker_id: w for w in mesh.workers}
    if before not in known or successor not in known:
        return ""
    old, new = known[before], known[successor].worker
    needed = len(old.resident) * new.expert_bytes
    if needed <= new.memory_bytes:
        return ""
    return (
        f"{successor} has {new.memory_bytes} bytes on {new.device} for experts, {before} holds "
        f"{needed}: there is no room for both at once. Start a worker on another device, then "
        f"`expert-mesh drain {before}`"
    )
