"""The gateway process: starts its engine, serves the public API, ends both in order."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import structlog

from gateway.engine_link import DEAD_AFTER_S, SILENT_AFTER_S, EngineLink
from gateway.front import Front
from gateway.generation import read_defaults
from gateway.ipc import AsyncChannel
from gateway.metrics import GatewayMetrics
from gateway.rehearsal import Rehearsal
from gateway.routing import Router
from gateway.text import load_tokenizer
from mesh.config import GatewayConfig, default_name, read_lines
from mesh.errors import ConfigError, MeshError
from mesh.grpc_server import GrpcServer, stop_signals
from mesh.http import HttpServer
from mesh.model_config import ModelConfig
from mesh.telemetry import announce_ready, configure_logging, new_registry
from protos import inference_pb2, placement_pb2
from protos.inference_pb2 import SamplingParams
from protos.inference_pb2_grpc import add_InferenceServicer_to_server

log = structlog.get_logger()

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
DRAIN_TIMEOUT_S = 30.0
_ENGINE_END_TIMEOUT_S = 5.0
_WATCH_INTERVAL_S = 1.0
_REHEARSES = "the engine rehearses: what a GPU computes for the first time is compiled first"


def main(config: GatewayConfig) -> int:
    """Run a gateway until it is told to stop; the exit code: 1 when its engine died.

    Raises CheckpointError or ConfigError for what cannot be served or bound.
    """
    gateway_id = config.gateway_id or default_name("gateway")
    configure_logging("gateway", gateway_id, config.log_level)
    model = ModelConfig.from_hf(config.model)
    ours, theirs = socket.socketpair()
    # Before anything of gRPC or asyncio exists: neither survives a fork.
    engine = EngineProcess(_fork_engine(config, ours, theirs))
    try:
        return asyncio.run(_run(config, gateway_id, model, engine, ours))
    finally:
        engine.kill()
        engine.reap()


async def _run(
    config: GatewayConfig,
    gateway_id: str,
    model: ModelConfig,
    engine: EngineProcess,
    engine_socket: socket.socket,
) -> int:
    link = EngineLink(await AsyncChannel.open(engine_socket))
    return await Gateway(config, gateway_id, model, engine, link).run()


def _fork_engine(config: GatewayConfig, ours: socket.socket, theirs: socket.socket) -> int:
    """Start the engine on its end of the socket pair; its process id."""
    pid = os.fork()
    if pid:
        theirs.close()
        return pid
    code = 1
    try:
        # The front decides when the engine ends, and its death is the end of the socket: a
        # Ctrl-C goes to the whole process group and must not cut streams that drain.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ours.close()
        if config.ready_fd is not None:
            os.close(config.ready_fd)
        from gateway.engine_process import run_engine  # loads torch: in this process alone

        code = run_engine(config, theirs)
    except MeshError as error:
        log.error("engine_failed", error=str(error))
    except Exception:
        log.exception("engine_failed")
    finally:
        sys.stderr.flush()
        os._exit(code)


class EngineProcess:
    """The engine's process, as its parent sees it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._pid_fd = os.pidfd_open(pid)
        self._exit_code: int | None = None

    async def wait(self, timeout_s: float) -> int:
        """Its exit code; it is killed where it takes longer than ``timeout_s``."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pid_fd, ended.set)
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            log.error("engine_killed", pid=self._pid, after_s=timeout_s)
            self.kill()
            await ended.wait()
        finally:
            loop.remove_reader(self._pid_fd)
        return self.reap()

    def kill(self) -> None:
        """End it now, unless it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)

    def reap(self) -> int:
        """Wait for its end; its exit code."""
        if self._exit_code is None:
            _, status = os.waitpid(self._pid, 0)
            self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code


class Gateway:
    """Everything of the front that lives on the event loop, and its order of rise and fall."""

    def __init__(
        self,
        config: GatewayConfig,
        gateway_id: str,
        model: ModelConfig,
        engine: EngineProcess,
        link: EngineLink,
    ) -> None:
        registry = new_registry()
        model_name = config.served_model_name or config.model.resolve().name
        self._config = config
        self._gateway_id = gateway_id
        self._engine = engine
        self._link = link
        self._stopping = stop_signals()
        self._recheck = asyncio.Event()
        link.started.add_done_callback(lambda _: self._recheck.set())
        self._router = Router(config, gateway_id, model, link, on_change=self._recheck.set)
        self._rehearsal = Rehearsal(config, model.vocab_size, link)
        self._front = Front(
            config,
            model,
            model_name=model_name,
            gateway_id=gateway_id,
            tokenizer=load_tokenizer(config.model),
            defaults=read_defaults(config.model) if config.generation_config else SamplingParams(),
            link=link,
            metrics=GatewayMetrics(registry, model_name, lambda: link.stats),
            num_workers=lambda: self._router.num_workers,
        )
        self._server = GrpcServer(
            config,
            [(add_InferenceServicer_to_server, self._front)],
            [SERVICE_NAME],
            tokens=read_tokens(config.api_key_file),
        )
        self._http = HttpServer(config, registry, why_not_ready=self.trouble)

    def trouble(self) -> str | None:
        """Why this gateway may not be sent requests. HTTP threads call it, too."""
        if self._link.ended:
            return "the engine process ended"
        if not self._link.started.done():
            return "the engine is loading the model"
        if self._stopping.is_set():
            return "the gateway is shutting down"
        silent_s = self._link.silent_s()
        if silent_s > SILENT_AFTER_S:
            return f"the engine is silent for {silent_s:.0f} s with work pending"
        if trouble := self._router.trouble():
            return trouble
        return None if self._rehearsal.over else _REHEARSES

    async def run(self) -> int:
        """Serve until told to stop or the engine dies; the exit code."""
        reading = asyncio.create_task(self._link.run())
        tasks = [reading]
        try:
            await self._listen()
            tasks += [asyncio.create_task(self._watch()), asyncio.create_task(self._route())]
            stop = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                await self._drain(reading)
                return 0
            if reading.done():
                code = await self._engine.wait(_ENGINE_END_TIMEOUT_S)
                log.error("engine_died", exit_code=code, exc_info=reading.exception())
                return 1
            await asyncio.gather(*(task for task in tasks if task.done()))
            return 1
        finally:
            await self._close(tasks)

    async def _listen(self) -> None:
        await self._server.start()
        self._http.start()
        where = {"grpc": self._server.address, "http": self._http.address}
        announce_ready(self._config, {"id": self._gateway_id, "pid": os.getpid(), **where})
        log.info("listening", **where)

    async def _watch(self) -> None:
        """Say ready or not as it changes; end an engine that hangs for good."""
        before: str | None = ""
        rehearsing: asyncio.Task[None] | None = None
        while True:
            self._recheck.clear()
            trouble = self.trouble()
            if trouble == _REHEARSES and rehearsing is None:
                rehearsing = asyncio.create_task(self._rehearsal.run())
                rehearsing.add_done_callback(lambda _: self._recheck.set())
            if trouble != before:
                log.info("readiness", ready=trouble is None, reason=trouble)
                await self._server.set_ready(SERVICE_NAME, trouble is None)
            before = trouble
            if self._link.silent_s() > DEAD_AFTER_S:
                log.error("engine_hangs", silent_s=round(self._link.silent_s()))
                self._engine.kill()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._recheck.wait(), _WATCH_INTERVAL_S)

    async def _route(self) -> None:
        await asyncio.wait({self._link.started})
        if self._link.started.exception() is None:
            await self._router.run(
                placement_pb2.GatewayReport(
                    gateway_id=self._gateway_id,
                    grpc_address=self._server.address,
                    http_address=self._http.address,
                    host=socket.gethostname(),
                    device=self._config.device,
                    pid=os.getpid(),
                )
            )

    async def _drain(self, reading: asyncio.Task[None]) -> None:
        """Let what runs come to its end: until the bound, a second signal, the engine's death."""
        log.info("draining", timeout_s=DRAIN_TIMEOUT_S)
        await self._server.set_ready(SERVICE_NAME, False)
        impatient = asyncio.create_task(stop_signals().wait())
        drained = asyncio.create_task(self._front.drain(DRAIN_TIMEOUT_S))
        await asyncio.wait({impatient, drained, reading}, return_when=asyncio.FIRST_COMPLETED)
        log.info("drained", complete=drained.done() and drained.result())
        impatient.cancel()
        drained.cancel()

    async def _close(self, tasks: list[asyncio.Task[None]]) -> None:
        """First the engine, which ends the streams that are left; then who told them."""
        self._link.shutdown()
        await self._engine.wait(_ENGINE_END_TIMEOUT_S)
        await asyncio.wait(tasks[:1])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._link.close()
        await self._server.stop()
        await self._router.close()
        await asyncio.to_thread(self._http.stop)
        self._front.close()


def read_tokens(path: Path | None) -> list[str]:
    """The API keys of a file, one a line. ConfigError when it holds none or cannot be read."""
    if path is None:
        return []
    tokens = [line.strip() for line in read_lines(path, "--api-key-file")]
    if not tokens:
        raise ConfigError(f"{path} holds no API key: write one a line, or drop --api-key-file")
    return tokens
