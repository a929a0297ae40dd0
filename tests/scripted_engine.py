"""A front with a gRPC server, and an engine that says what a test tells it to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.engine_link import EngineLink
from gateway.front import Front
from gateway.ipc import AsyncChannel, FrameReader, encode_frame
from gateway.metrics import GatewayMetrics
from mesh.config import GatewayConfig
from mesh.grpc_server import GrpcServer
from mesh.model_config import ModelConfig
from protos import engine_pb2 as pb
from protos import inference_pb2
from protos.inference_pb2_grpc import add_InferenceServicer_to_server
from tests.byte_tokenizer import EOS, VOCAB_SIZE, byte_tokenizer

MODEL = replace(
    ModelConfig.from_hf(Path(__file__).parent.parent / "models" / "demo"),
    vocab_size=VOCAB_SIZE,
    eos_token_ids=(EOS,),
)
MAX_MODEL_LEN = 64


class ScriptedEngine:
    """The other end of the front's socket: notes what it hears, says what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._submitted: asyncio.Queue[pb.Submit] = asyncio.Queue()
        self._cancelled: asyncio.Queue[str] = asyncio.Queue()
        self.routings: asyncio.Queue[pb.Routing] = asyncio.Queue()
        self.drops: asyncio.Queue[pb.DropPeer] = asyncio.Queue()
        self.pings: asyncio.Queue[int] = asyncio.Queue()
        self.answer: Callable[[pb.Submit], None] | None = None
        """Called with each request, where a test wants no say in each."""
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        frames = FrameReader()
        while chunk := await self._reader.read(1 << 16):
            for payload in frames.feed(chunk):
                self._take(pb.ToEngine.FromString(payload))

    def _take(self, message: pb.ToEngine) -> None:
        match message.WhichOneof("body"):
            case "submit":
                self._submitted.put_nowait(message.submit)
                if self.answer is not None:
                    self.answer(message.submit)
            case "cancel":
                for request_id in message.cancel.request_ids:
                    self._cancelled.put_nowait(request_id)
            case "routing":
                self.routings.put_nowait(message.routing)
            case "drop_peer":
                self.drops.put_nowait(message.drop_peer)
            case "ping":
                self.pings.put_nowait(message.ping.sequence)
            case "shutdown":
                self._writer.close()

    async def submitted(self) -> pb.Submit:
        """The next request."""
        return await self._submitted.get()

    @property
    def nothing_new(self) -> bool:
        """Whether every request so far was taken by :meth:`submitted`."""
        return self._submitted.empty()

    async def cancelled(self) -> str:
        """The next cancellation."""
        return await self._cancelled.get()

    def send(self, message: pb.FromEngine) -> None:
        self._writer.write(encode_frame(message))

    def start(self) -> None:
        """Say that the model is loaded."""
        self.send(
            pb.FromEngine(
                started=pb.Started(
                    ucx_address=b"engine",
                    kv_blocks=100,
                    kv_block_size=16,
                    max_model_len=MAX_MODEL_LEN,
                    dtype="float32",
                )
            )
        )

    def say(self, submit: pb.Submit, tokens: bytes, finish_reason: str = "", **fields: str) -> None:
        """An output with one token a byte."""
        output = pb.Output(
            request_id=submit.request_id,
            token_ids=tokens,
            finish_reason=finish_reason,
            scheduled_s=submit.arrival_s + 0.001,
            **fields,
        )
        self.send(pb.FromEngine(outputs=pb.Outputs(outputs=[output])))

    def die(self) -> None:
        """End without a word, as a killed process does."""
        self._writer.close()

    async def close(self) -> None:
        self._writer.close()
        await self._listening


@dataclass
class Rig:
    """A running front."""

    engine: ScriptedEngine
    link: EngineLink
    front: Front
    server: GrpcServer
    registry: CollectorRegistry
    events: list[Any]
    """What was logged."""

    @property
    def target(self) -> str:
        return self.server.address


@asynccontextmanager
async def linked_engine() -> AsyncIterator[tuple[ScriptedEngine, EngineLink]]:
    """Both ends of a socket pair; the engine has not started."""
    ours, theirs = socket.socketpair()
    link = EngineLink(await AsyncChannel.open(ours))
    engine = ScriptedEngine(*await asyncio.open_unix_connection(sock=theirs))
    reading = asyncio.create_task(link.run())
    try:
        yield engine, link
    finally:
        await engine.close()
        await reading
        await link.close()


@asynccontextmanager
async def scripted_front(
    *,
    started: bool = True,
    with_tokenizer: bool = True,
    defaults: inference_pb2.SamplingParams | None = None,
    max_running: int = 64,
    max_waiting: int = 8,
    **of_server: Any,
) -> AsyncIterator[Rig]:
    """A front behind a real gRPC socket, its engine scripted."""
    config = GatewayConfig(port=0, max_running=max_running, max_waiting=max_waiting)
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        events = stack.enter_context(capture_logs())  # and keeps stdout for what is tested
        engine, link = await stack.enter_async_context(linked_engine())
        front = Front(
            config,
            MODEL,
            model_name="tiny",
            gateway_id="gateway-1",
            tokenizer=byte_tokenizer() if with_tokenizer else None,
            defaults=defaults or inference_pb2.SamplingParams(),
            link=link,
            metrics=GatewayMetrics(registry, "tiny", lambda: link.stats),
            num_workers=lambda: 3,
        )
        services = [(add_InferenceServicer_to_server, front)]
        server = GrpcServer(config, services, ["expertmesh.v1.Inference"], **of_server)
        await stack.enter_async_context(server)
        if started:
            engine.start()
            await link.started
        yield Rig(engine, link, front, server, registry, events)
        front.close()
