"""The worker process: opens what it needs, in order, and closes it in the other.

The event loop speaks gRPC (:mod:`expert_worker.control`), one thread loads experts
(:mod:`expert_worker.residency`), one serves rows (:mod:`expert_worker.data_plane`). Serving needs
neither placement nor the loop.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from contextlib import AbstractContextManager, nullcontext

import structlog
import torch
from prometheus_client import CollectorRegistry

from expert_worker import host
from expert_worker.control import SERVICE_NAME, WorkerService
from expert_worker.data_plane import DataPlane
from expert_worker.expert_reader import ExpertReader
from expert_worker.expert_store import ExpertStore
from expert_worker.metrics import WorkerMetrics
from mesh import telemetry
from mesh.checkpoint import Checkpoint, has_weights
from mesh.config import WorkerConfig, default_name, resolve_dtype
from mesh.device import open_device
from mesh.grpc_server import GrpcServer, TlsFiles, stop_signals
from mesh.http import HttpServer
from mesh.model_config import ModelConfig
from mesh.transport.ucx import UcxTransport
from mesh.transport.waiting import SPIN_S
from protos import placement_pb2
from protos import worker_pb2_grpc as rpc

log = structlog.get_logger()

# A gateway that died costs a worker a session and no request: there is no hurry to notice.
_KEEPALIVE_MS = 3000


async def serve(config: WorkerConfig) -> None:
    """The worker process: :func:`run` until a signal, with its events on stderr."""
    worker_id = config.worker_id or default_name("worker")
    telemetry.configure_logging("worker", worker_id, config.log_level)
    await run(config, worker_id, stop_signals())


async def run(config: WorkerConfig, worker_id: str, stop: asyncio.Event) -> None:
    """Serve until ``stop``, which a drain or placement's leave set too.

    Raises MeshError when the worker cannot start, is refused, or loses its data plane.
    """
    model = ModelConfig.from_hf(config.model)
    device = open_device(config.device, behind=True)
    dtype = resolve_dtype(config.dtype, config.device, model.dtype)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    config = config.for_rows(model.hidden_size * torch_dtype.itemsize)
    info = placement_pb2.WorkerInfo(
        worker_id=worker_id,
        host=socket.gethostname(),
        device=str(device),
        device_name=host.device_name(device),
        memory_bytes=config.memory_bytes or host.free_bytes(device),
        pid=os.getpid(),
        model_fingerprint=model.fingerprint,
        nics=host.rdma_nics(),
        links=host.nic_facts(),
        gpu=host.gpu_facts(device),
        expert_bytes=model.expert_bytes(dtype),
    )
    with _open_checkpoint(config) as checkpoint:
        reader = ExpertReader(
            checkpoint,
            model,
            device=device,
            dtype=torch_dtype,
            worker_id=worker_id,
            tls=TlsFiles.of(config),
            loop=asyncio.get_running_loop(),
        )
        store = ExpertStore(
            reader,
            expert_bytes=info.expert_bytes,
            memory_bytes=info.memory_bytes,
            worker_id=worker_id,
        )
        plane = DataPlane(
            functools.partial(UcxTransport, cuda=device.type == "cuda", keepalive_ms=_KEEPALIVE_MS),
            store,
            hidden_size=model.hidden_size,
            dtype=torch_dtype,
            device=device,
            num_experts=model.num_experts,
            max_rows=config.max_rows,
            merge_rows=config.merge_rows,
            spin_s=SPIN_S[device.type],
            threads=config.threads,
        )
        reader.plane = plane
        registry = telemetry.new_registry()
        registry.register(WorkerMetrics(plane, store, reader.paces))
        plane.start()
        try:
            info.ucx_address = await asyncio.to_thread(plane.wait_started)
            service = WorkerService(config, model, info, dtype, store, reader, plane, stop)
            await _listen(config, service, info, registry)
        finally:
            await asyncio.to_thread(plane.stop)


def _open_checkpoint(config: WorkerConfig) -> AbstractContextManager[Checkpoint | None]:
    if has_weights(config.model):
        return Checkpoint(config.model)
    log.warning("no_weights_here", model=str(config.model), remedy="experts come from other hosts")
    return nullcontext()


async def _listen(
    config: WorkerConfig,
    service: WorkerService,
    info: placement_pb2.WorkerInfo,
    registry: CollectorRegistry,
) -> None:
    """Open the ports, put them into ``info``, and run the service between them."""
    server = GrpcServer(config, [(rpc.add_ExpertWorkerServicer_to_server, service)], [SERVICE_NAME])
    http = HttpServer(
        config,
        registry,
        why_not_ready=service.why_not_ready,
        why_not_alive=service.why_not_alive,
    )
    async with server, http:
        info.grpc_address, info.http_address = server.address, http.address
        log.info("worker_listening", grpc=server.address, http=http.address)
        telemetry.announce_ready(
            config,
            {
                "id": info.worker_id,
                "grpc": server.address,
                "http": http.address,
                "pid": info.pid,
            },
        )
        await service.run(server.set_ready)
        log.info("worker_stopping")
