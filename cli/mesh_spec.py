"""What one mesh on one machine consists of: every process's configuration, checked before the
first of them starts."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.gpu_memory import reserved_bytes
from cli.options import build, options_of
from mesh.config import GatewayConfig, PlacementConfig, ServerConfig, WorkerConfig, option
from mesh.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from placement.rules import Rules

_MANAGED = (
    "preferred_port",
    "http_port",
    "placement",
    "worker_id",
    "gateway_id",
    "ready_fd",
    "reserved_bytes",
    "gateways_on_device",
)
MAX_WORKERS = 4096
# Requests wait so long for an expert that nobody serves: the worker that died is back in less.
_RESTART_PATIENCE_S = 5.0


@dataclass(frozen=True)
class UpConfig:
    """How many processes, and how they are watched."""

    model: Path = option(Path("."), "Checkpoint directory.")
    workers: int = option(0, "Expert workers; 0: as many as the placement rules need.")
    gateways: int = option(1, "Gateways, each with an engine of its own.")
    port: int | None = option(
        None, "gRPC port of the first gateway; 0 takes a free one, as where 50051 is taken."
    )
    mesh: str | None = option(
        None, "Name by which `scale` and `roll` find it; made from the pid if absent."
    )
    restart: bool = option(True, "Start a process that died again, ever later if it keeps dying.")
    hung_after_s: float = option(
        60.0,
        "Silence of its /healthz after which a process is killed and started again; 0: never.",
    )
    json: bool = option(False, "Print JSON objects: one when all is ready, one for each event.")
    log_dir: Path | None = option(None, "Where processes log; if absent, a temporary directory.")
    timeout_s: float = option(
        120.0, "How long all may take to be ready, but for what gateways rehearse."
    )
    drain_s: float = option(
        40.0, "How long requests in flight, and experts on a worker, have once it is told to end."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MAX_WORKERS or self.gateways < 1:
            raise ConfigError(f"workers must be 0 to {MAX_WORKERS}, gateways 1 or more")
        if not (0 < self.timeout_s < math.inf and 0 <= self.drain_s < math.inf):
            raise ConfigError("timeout_s must be positive, drain_s must not be negative")
        if not 0 <= self.hung_after_s < math.inf:
            raise ConfigError("hung_after_s must not be negative")

    @property
    def name(self) -> str:
        return self.mesh or f"mesh-{os.getpid()}"


UP_OPTIONS = options_of(UpConfig, PlacementConfig, WorkerConfig, GatewayConfig, without=_MANAGED)


@dataclass(frozen=True)
class MeshSpec:
    """The processes to start with, and what a later worker is like."""

    up: UpConfig
    placement: PlacementConfig
    gateways: tuple[GatewayConfig, ...]
    num_workers: int
    rules: Rules
    _worker: WorkerConfig
    _device_of: Callable[[int], str]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MeshSpec:
        """From the command line's values. Raises ConfigError, CheckpointError, PlacementError."""
        from mesh.model_config import ModelConfig
        from placement.rules import Rules

        config = build(UpConfig, values)
        # Where every command looks for a mesh, unless another one is there.
        preferred = {"port": 0, "preferred_port": PlacementConfig.port}
        inner = {**values, **_inside(values)}
        placement = build(PlacementConfig, {**inner, **preferred})
        model = ModelConfig.from_hf(placement.model)
        rules = Rules(
            model.moe_layers,
            model.num_experts,
            placement.rule,
            placement.experts_per_worker,
            placement.expert_shards or 1,
        )
        worker = build(WorkerConfig, {**inner, "port": 0, "drain_s": config.drain_s})
        patience = {"expert_patience_s": _RESTART_PATIENCE_S} if config.restart else {}
        gateway = build(GatewayConfig, {**patience, **values, "port": 0})
        num_workers = config.workers or rules.workers_needed
        if num_workers < rules.workers_needed:
            raise PlacementError(
                f"{num_workers} workers cannot hold {model.num_experts} experts a layer under the "
                f"rule {rules.rule!r} with {rules.experts_per_worker} of a layer on each: give "
                f"--workers {rules.workers_needed} or more, or --experts-per-worker "
                f"{-(-model.num_experts // num_workers)}"
            )
        device_of = _devices(worker.device)
        gateway_devices = [device_of(i) for i in range(config.gateways)]
        worker_devices = [device_of(config.gateways + i) for i in range(num_workers)]
        reserved = reserved_bytes(
            model,
            gateway,
            gateway_devices,
            worker_devices,
            rules.experts_per_worker,
            worker,
        )
        return cls(
            config,
            placement,
            gateways=tuple(
                dataclasses.replace(
                    gateway,
                    gateway_id=f"gateway-{i}",
                    device=device,
                    port=(config.port or 0) if i == 0 else 0,
                    preferred_port=GatewayConfig.port if i == 0 and config.port is None else 0,
                    reserved_bytes=reserved[i],
                    gateways_on_device=gateway_devices.count(device),
                )
                for i, device in enumerate(gateway_devices)
            ),
            num_workers=num_workers,
            rules=rules,
            _worker=worker,
            _device_of=device_of,
        )

    @property
    def ready_within_s(self) -> float:
        """How long the whole may take to be ready."""
        return self.up.timeout_s + max(gateway.rehearsal_s for gateway in self.gateways)

    @property
    def shares_gpus(self) -> bool:
        """Whether some GPU has several processes of this mesh from the start."""
        devices = [self.worker(number).device for number in range(self.num_workers)]
        devices += [gateway.device for gateway in self.gateways]
        gpus = [device for device in devices if device.startswith("cuda")]
        return len(gpus) > len(set(gpus))

    def worker(self, number: int) -> WorkerConfig:
        """The worker of this number, 0 or more."""
        return dataclasses.replace(
            self._worker,
            # Two digits at least, so that sorting them by name is by number.
            worker_id=f"worker-{number:0{max(2, len(str(self.num_workers - 1)))}}",
            device=self._device_of(self.up.gateways + number),
        )


def _inside(values: Mapping[str, Any]) -> dict[str, Any]:
    """Where placement and workers listen if not where gateways do: nobody asks them for a key, so
    strangers may not reach them. ConfigError where that cannot be had."""
    public = build(ServerConfig, {k: v for k, v in values.items() if k != "port"})
    if public.tls_ca is not None or _is_loopback(public.host):
        return {}
    if public.tls_cert is not None:
        raise ConfigError(
            f"--host {public.host} with --tls-cert but no --tls-ca leaves placement and workers "
            "open to strangers: give --tls-ca too, or let a proxy speak TLS with clients"
        )
    return {"host": ServerConfig.host, "advertise_host": None}


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _devices(device: str) -> Callable[[int], str]:
    """The device of the i-th process: with plain ``cuda``, the GPUs in turn."""
    if device != "cuda":
        return lambda _: device
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError("device cuda: no GPU here; `expert-mesh doctor` says what there is")
    return lambda i: f"cuda:{i % count}"
