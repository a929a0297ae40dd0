"""``expert-mesh up``: a whole mesh on one machine, from the first process to the last.

Placement comes first, since all others ask it; then workers and gateways at once. They end
the other way round, so that every request in flight finds its experts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import mps
from cli.gpu_memory import reserved_bytes
from cli.options import build, options_of, to_argv
from mesh.config import GatewayConfig, PlacementConfig, WorkerConfig, option
from mesh.errors import ConfigError, DeadlineExceeded, MeshError, PlacementError, Unavailable

if TYPE_CHECKING:
    from cli.report import JsonReport, TextReport
    from cli.supervisor import Process, Supervisor
    from mesh.grpc_server import TlsFiles
    from protos import placement_pb2 as pb

_MANAGED = (
    "http_port",
    "placement",
    "worker_id",
    "gateway_id",
    "ready_fd",
    "reserved_bytes",
    "gateways_on_device",
)
_PRELOAD = (
    "torch",
    "ucxx._lib.libucxx",
    "grpc.aio",
    "placement.service",
    "expert_worker.service",
    "gateway.service",
    "gateway.engine_process",
)
_INFERENCE = "expertmesh.v1.Inference"
_POLL_S = 0.1
_RPC_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class UpConfig:
    """How many processes, and how they are watched."""

    model: Path = option(Path("."), "Checkpoint directory.")
    workers: int = option(0, "Expert workers; 0: as many as the placement rules need.")
    gateways: int = option(1, "Gateways, each with an engine of its own.")
    port: int = option(0, "gRPC port of the first gateway; 0 takes a free one.")
    json: bool = option(False, "Print JSON objects: one when all is ready, one for each death.")
    log_dir: Path | None = option(None, "Where processes log; if absent, a temporary directory.")
    timeout_s: float = option(120.0, "How long all may take to be ready.")
    drain_s: float = option(40.0, "How long requests in flight may take once told to end.")

    def __post_init__(self) -> None:
        if self.workers < 0 or self.gateways < 1:
            raise ConfigError("workers must be 0 or more, gateways 1 or more")
        if not (0 < self.timeout_s < math.inf and 0 <= self.drain_s < math.inf):
            raise ConfigError("timeout_s must be positive, drain_s must not be negative")


UP_OPTIONS = options_of(UpConfig, PlacementConfig, WorkerConfig, GatewayConfig, without=_MANAGED)


@dataclass(frozen=True)
class MeshSpec:
    """Every process of one mesh, checked before the first of them starts."""

    up: UpConfig
    placement: PlacementConfig
    workers: tuple[WorkerConfig, ...]
    gateways: tuple[GatewayConfig, ...]
    num_experts: int
    """Of all layers."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MeshSpec:
        """From the command line's values. Raises ConfigError, CheckpointError, PlacementError."""
        from mesh.model_config import ModelConfig
        from placement.rules import Rules

        config = build(UpConfig, values)
        placement = build(PlacementConfig, {**values, "port": 0})
        model = ModelConfig.from_hf(placement.model)
        rules = Rules(
            model.moe_layers,
            model.num_experts,
            placement.rule,
            placement.experts_per_worker,
            placement.expert_shards or 1,
        )
        worker = build(WorkerConfig, {**values, "port": 0})
        gateway = build(GatewayConfig, {**values, "port": 0})
        num_workers = config.workers or rules.workers_needed
        if num_workers < rules.workers_needed:
            raise PlacementError(
                f"{num_workers} workers cannot hold {model.num_experts} experts a layer under the "
                f"rule {rules.rule!r} with {rules.experts_per_worker} of a layer on each: give "
                f"--workers {rules.workers_needed} or more, or --experts-per-worker "
                f"{-(-model.num_experts // num_workers)}"
            )
        digits = len(str(num_workers - 1))  # so that sorting them by name is by number
        device_of = _devices(worker.device)
        gateway_devices = [device_of(i) for i in range(config.gateways)]
        worker_devices = [device_of(config.gateways + i) for i in range(num_workers)]
        reserved = reserved_bytes(
            model, gateway, gateway_devices, worker_devices, rules.experts_per_worker
        )
        return cls(
            config,
            placement,
            workers=tuple(
                dataclasses.replace(worker, worker_id=f"worker-{i:0{digits}}", device=device)
                for i, device in enumerate(worker_devices)
            ),
            gateways=tuple(
                dataclasses.replace(
                    gateway,
                    gateway_id=f"gateway-{i}",
                    device=device,
                    port=config.port if i == 0 else 0,
                    reserved_bytes=reserved[i],
                    gateways_on_device=gateway_devices.count(device),
                )
                for i, device in enumerate(gateway_devices)
            ),
            num_experts=len(rules.experts),
        )

    @property
    def shares_gpus(self) -> bool:
        """Whether some GPU has several processes of this mesh."""
        devices = [one.device for one in self.workers] + [one.device for one in self.gateways]
        gpus = [device for device in devices if device.startswith("cuda")]
        return len(gpus) > len(set(gpus))


def _succeeded(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _devices(device: str) -> Callable[[int], str]:
    """The device of the i-th process: with plain ``cuda``, the GPUs in turn."""
    if device != "cuda":
        return lambda _: device
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError("device cuda: no GPU here; `expert-mesh doctor` says what there is")
    return lambda i: f"cuda:{i % count}"


def up(values: dict[str, Any]) -> None:
    """Serve a checkpoint on this machine: placement, expert workers and gateways."""
    from cli.report import JsonReport, TextReport

    spec = MeshSpec.of(values)
    asyncio.run(_run(spec, JsonReport() if spec.up.json else TextReport(hints=True)))


async def _run(spec: MeshSpec, report: JsonReport | TextReport) -> None:
    with suppress(asyncio.CancelledError):
        async with serving(spec, report) as mesh:
            await mesh.watch()


@asynccontextmanager
async def serving(spec: MeshSpec, report: JsonReport | TextReport) -> AsyncIterator[Mesh]:
    """A mesh that is ready. On every way out it is drained, and no process of it is left.

    Raises DeadlineExceeded or Unavailable when it cannot start. SIGINT and SIGTERM cancel the
    task that entered; a second one cuts the draining short.
    """
    from cli.supervisor import Supervisor

    deaths: asyncio.Queue[Process] = asyncio.Queue()
    with ExitStack() as at_end:
        log_dir = spec.up.log_dir
        if log_dir is None:
            log_dir = Path(tempfile.mkdtemp(prefix="expert-mesh-"))
            at_end.callback(shutil.rmtree, log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        if spec.shares_gpus and not at_end.enter_context(mps.sharing()):
            print(f"warning: {mps.OFF}", file=sys.stderr)
        async with Supervisor(_PRELOAD, log_dir, on_exit=deaths.put_nowait) as supervisor:
            mesh = Mesh(spec, supervisor, report, deaths)
            _on_signals(asyncio.current_task(), mesh)
            try:
                await mesh.start()
                yield mesh
            except MeshError:
                at_end.pop_all()  # The logs may say more.
                raise
            finally:
                await mesh.drain()


def _on_signals(task: asyncio.Task[Any] | None, mesh: Mesh) -> None:
    def told_to_end() -> None:
        if mesh.draining or task is None:
            mesh.kill()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end)


class Mesh:
    """The processes of one :class:`MeshSpec`."""

    def __init__(
        self,
        spec: MeshSpec,
        supervisor: Supervisor,
        report: JsonReport | TextReport,
        deaths: asyncio.Queue[Process],
    ) -> None:
        self.placement: list[Process] = []
        self.workers: list[Process] = []
        self.gateways: list[Process] = []
        self.draining = False
        self._spec = spec
        self._supervisor = supervisor
        self._report = report
        self._deaths = deaths
        self._progress: dict[str, tuple[int, int]] = {}
        self._note = ""

    @property
    def processes(self) -> list[Process]:
        """All that were started."""
        return [*self.placement, *self.workers, *self.gateways]

    async def start(self) -> None:
        """Start everything, and report once all of it serves.

        Raises Unavailable if a process ends, DeadlineExceeded if it takes too long.
        """
        starting = asyncio.create_task(self._start())
        death = asyncio.create_task(self._deaths.get())
        try:
            await asyncio.wait(
                {starting, death},
                timeout=self._spec.up.timeout_s,
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

    async def watch(self) -> None:
        """Report deaths for ever. Raises Unavailable when no gateway is left."""
        while True:
            self._report.exited(await self._deaths.get())
            if not any(gateway.alive for gateway in self.gateways):
                raise Unavailable(f"no gateway is left; the logs are in {self._supervisor.log_dir}")

    async def _start(self) -> None:
        from cli.report import Ready

        began_s = time.monotonic()
        spec, supervisor = self._spec, self._supervisor
        self.placement = [supervisor.spawn("placement", ["placement", *to_argv(spec.placement)])]
        address = (await supervisor.wait_ready(self.placement[0]))["grpc"]
        for worker in spec.workers:
            argv = to_argv(dataclasses.replace(worker, placement=address))
            self.workers.append(supervisor.spawn(str(worker.worker_id), ["worker", *argv]))
        for gateway in spec.gateways:
            argv = to_argv(dataclasses.replace(gateway, placement=address))
            self.gateways.append(supervisor.spawn(str(gateway.gateway_id), ["gateway", *argv]))
        plan = await self._wait_serving(address)
        self.ready = Ready(
            placement=self.placement[0].ready.result(),
            gateways=[process.ready.result() for process in self.gateways],
            workers=[process.ready.result() for process in self.workers],
            plan=plan,
            log_dir=supervisor.log_dir,
            took_s=time.monotonic() - began_s,
        )
        self._report.ready(self.ready)

    async def _wait_serving(self, placement_address: str) -> pb.Plan:
        """Report progress until every worker holds its experts and every gateway serves."""
        import grpc

        from mesh.grpc_server import TlsFiles, open_channel
        from protos import placement_pb2 as pb
        from protos.placement_pb2_grpc import PlacementStub

        tls = TlsFiles.of(self._spec.placement)
        serving = [asyncio.create_task(self._serves(gateway, tls)) for gateway in self.gateways]
        try:
            async with open_channel(placement_address, tls) as channel:
                placement = PlacementStub(channel)
                while True:
                    mesh: pb.MeshStatus = await placement.GetStatus(
                        pb.GetStatusRequest(), timeout=_RPC_TIMEOUT_S
                    )
                    self._note = mesh.plan.note
                    resident = {(e.layer, e.index) for w in mesh.workers for e in w.resident}
                    self._progress = {
                        "processes up": (
                            sum(p.ready.done() for p in self.processes),
                            len(self.processes),
                        ),
                        "workers registered": (len(mesh.workers), len(self.workers)),
                        "experts loaded": (len(resident), self._spec.num_experts),
                        "gateways serving": (sum(map(_succeeded, serving)), len(serving)),
                    }
                    self._report.progress(self._progress)
                    if mesh.plan.complete and all(n >= of for n, of in self._progress.values()):
                        return mesh.plan
                    await asyncio.sleep(_POLL_S)
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"placement does not answer: {error.details()}") from error
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving, return_exceptions=True)

    async def _serves(self, gateway: Process, tls: TlsFiles | None) -> None:
        """Returns once the gateway's health says that it may be used."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from mesh.grpc_server import open_channel

        address = (await self._supervisor.wait_ready(gateway))["grpc"]
        async with open_channel(address, tls) as channel:
            request = health_pb2.HealthCheckRequest(service=_INFERENCE)
            async for reply in health_pb2_grpc.HealthStub(channel).Watch(request):
                if reply.status == reply.SERVING:
                    return

    def _describe_missing(self) -> str:
        """What a start that took too long was waiting for."""
        missing = [f"{n} of {of} {what}" for what, (n, of) in self._progress.items() if n < of]
        note = f"; placement says: {self._note}" if self._note else ""
        return (
            f"not ready after {self._spec.up.timeout_s:.0f} s: "
            f"{', '.join(missing) or 'placement is not up'}{note}; "
            f"the logs are in {self._supervisor.log_dir}"
        )

    async def drain(self) -> None:
        """End gateways, then workers, then placement, each kind within ``drain_s``."""
        self.draining = True
        self._report.draining()
        for processes in (self.gateways, self.workers, self.placement):
            self._signal_all(processes, signal.SIGTERM)
            ends = [process.exited for process in processes if process.alive]
            if ends:
                await asyncio.wait(ends, timeout=self._spec.up.drain_s)
            self._signal_all(processes, signal.SIGKILL)

    def kill(self) -> None:
        """Cut :meth:`drain` short."""
        self._signal_all(self.processes, signal.SIGKILL)

    def _signal_all(self, processes: Iterable[Process], number: int) -> None:
        for process in processes:
            if process.alive:
                self._supervisor.signal(process, number)
