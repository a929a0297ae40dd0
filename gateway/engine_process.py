"""The engine's process: loads the model, then steps while there is work and sleeps while not."""

from __future__ import annotations

import gc
import math
import socket
import time
from collections.abc import Callable, Iterator

import structlog
import torch

from gateway.dispatch import Dispatcher
from gateway.engine import Engine
from gateway.engine_outputs import Gathering, message_of
from gateway.ipc import EngineChannel
from gateway.kv_blocks import BlockAllocator
from gateway.model.decoder import Decoder
from gateway.model.kv_cache import KvCache
from gateway.request import Request
from gateway.sampler import Sampler
from gateway.scheduler import Limits, Scheduler
from mesh.checkpoint import Checkpoint
from mesh.config import GatewayConfig, resolve_dtype
from mesh.device import open_device
from mesh.errors import ConfigError, Unavailable
from mesh.model_config import ModelConfig
from mesh.transport.ucx import UcxTransport
from mesh.transport.waiting import REPLY_SPIN_S, SPIN_S, Waiter
from protos import engine_pb2 as pb

log = structlog.get_logger()

_CPU_KV_BYTES = 256 << 20
_GPU_KV_FRACTION = 0.85
"""Of what is free behind the weights; the rest is for activations and dispatch."""
_STATS_INTERVAL_S = 0.5
_PROGRESS_INTERVAL_S = 1.0
_FLUSH_INTERVAL_S = 0.001
_TOLD_AT_ONCE = 32
"""Requests in one message to the front: what is said while rows are away should not outlast it."""


def run_engine(config: GatewayConfig, sock: socket.socket) -> int:
    """Be the engine at its end of ``sock`` until told to end, or the front is gone; 0 then.

    Raises MeshError when the model cannot be served as configured, EngineDied when step after
    step fails.
    """
    torch.set_num_threads(config.threads)
    model = ModelConfig.from_hf(config.model)
    device = open_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype_name = resolve_dtype(config.dtype, config.device, model.dtype)
    dtype: torch.dtype = getattr(torch, dtype_name)
    with Checkpoint(config.model) as checkpoint:
        decoder = Decoder.load(model, checkpoint, device, dtype, progress=_log_progress())
    blocks, max_model_len = size_kv(config, model, device, dtype)
    kv = KvCache(model, blocks.num_blocks, blocks.block_size, device, dtype)
    transport = UcxTransport(cuda=device.type == "cuda")
    dispatcher = Dispatcher(
        transport,
        model,
        device=device,
        dtype=dtype,
        max_tokens=config.max_batch_tokens,
        reply_timeout_s=config.reply_timeout_s,
        spin_s=REPLY_SPIN_S[device.type],
    )
    if device.type == "cuda":
        from gateway.model.decode_graphs import DecodeGraphs

        decoder.use_graphs(DecodeGraphs(decoder, kv, dispatcher, max_model_len))
    limits = Limits(
        config.max_batch_tokens,
        config.max_running,
        config.max_waiting,
        config.expert_patience_s,
        config.expert_loading_patience_s,
    )
    engine = Engine(
        Scheduler(blocks, limits),
        lambda batches, experts: decoder.forward(batches, kv, experts, engine.launching),
        dispatcher,
        Sampler(),
        overlap_tokens=config.overlap_tokens or None,
        ahead=decoder.ahead,
    )
    channel = EngineChannel(sock)
    waiter = Waiter(transport, spin_s=SPIN_S[device.type], descriptors=[channel.fileno()])
    started = pb.Started(
        ucx_address=transport.address,
        kv_blocks=blocks.num_blocks,
        kv_block_size=blocks.block_size,
        max_model_len=max_model_len,
        dtype=dtype_name,
    )
    channel.send(pb.FromEngine(started=started))
    log.info("engine_started", kv_blocks=blocks.num_blocks, max_model_len=max_model_len)
    # What is loaded stays: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    try:
        EngineLoop(engine, dispatcher, channel, waiter, model.eos_token_ids).run()
    finally:
        dispatcher.close()
        transport.close()
        channel.close()
    return 0


class EngineLoop:
    """Messages in, steps, messages out.

    What a step gave is told while the next one's rows are away, in pieces; the device waits for
    none of it. Where no step follows, it is told at once.
    """

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        channel: EngineChannel,
        waiter: Waiter,
        eos_token_ids: tuple[int, ...],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._channel = channel
        self._waiter = waiter
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._heard: list[pb.ToEngine] = []
        """What was said in the middle of a step and is acted on behind it."""
        self._gathering = Gathering()
        self._telling: Iterator[None] = iter(())
        """What is left to tell, a piece at a time."""
        self._ending = False
        self._transport_number = 0
        """Of the transport that the front knows."""
        self._stats_due_s = math.inf
        """When to send statistics; never while nothing has changed."""
        self._pong = 0
        """The last ping that is to be answered with them."""
        engine.on_away = self._tell_a_piece
        dispatcher.on_late = self._attend

    def run(self) -> None:
        """Until the front closes its end, or a shutdown is complete and said."""
        while not self._channel.closed:
            heard, self._heard = self._heard, []
            for message in (*heard, *self._channel.recv_all()):
                self._take(message)
            self._telling = self._tell()
            try:
                stepped = self._engine.step()
            finally:
                self._tell_rest()
            if stepped:
                self._note_change()
                continue
            moved = self._dispatcher.poll()
            self._tell_outputs()
            self._tell_of_peers()
            if self._ending and self._engine.num_requests == 0 and self._channel.flush():
                return
            if moved:
                self._note_change()
            else:
                self._waiter.wait(self._wait_s())

    def _take(self, message: pb.ToEngine) -> None:
        match message.WhichOneof("body"):
            case "submit":
                self._engine.submit(Request.from_proto(message.submit, self._eos_token_ids))
            case "cancel":
                self._engine.cancel(message.cancel.request_ids)
            case "routing":
                self._engine.set_routing(message.routing)
                log.info("routing_changed", epoch=message.routing.epoch)
            case "drop_peer":
                self._dispatcher.peers.drop(message.drop_peer)
            case "ping":
                self._pong = message.ping.sequence
                self._stats_due_s = 0.0
            case "shutdown":
                self._ending = True
                if not message.shutdown.drain:
                    self._engine.fail_all(
                        Unavailable("the gateway is shutting down; ask another gateway")
                    )

    def _tell(self) -> Iterator[None]:
        """Send what there is to say and is due."""
        now = self._clock()
        outputs = self._engine.take_outputs()
        yield
        self._gathering.add(outputs, self._engine.num_requests, now)
        if now >= self._gathering.due_s:
            yield from self._outputs_told()
        self._tell_of_peers()
        if now >= self._stats_due_s:
            yield
            self._send_stats()
        elif outputs:
            self._note_change()

    def _note_change(self) -> None:
        """Statistics are others now."""
        self._waiter.busy()
        if self._stats_due_s == math.inf:
            self._stats_due_s = self._clock() + _STATS_INTERVAL_S

    def _tell_a_piece(self) -> None:
        next(self._telling, None)

    def _tell_rest(self) -> None:
        for _ in self._telling:
            pass

    def _tell_outputs(self) -> None:
        for _ in self._outputs_told():
            pass

    def _outputs_told(self) -> Iterator[None]:
        gathered = self._gathering.take()
        for start in range(0, len(gathered), _TOLD_AT_ONCE):
            if start:
                yield
            messages = [message_of(each) for each in gathered[start : start + _TOLD_AT_ONCE]]
            self._channel.send(pb.FromEngine(outputs=pb.Outputs(outputs=messages)))

    def _tell_of_peers(self) -> None:
        peers = self._dispatcher.peers
        if peers.transport_number != self._transport_number:
            self._transport_number = peers.transport_number
            reopened = pb.TransportReopened(
                ucx_address=self._dispatcher.address, transport_number=peers.transport_number
            )
            self._channel.send(pb.FromEngine(transport_reopened=reopened))
        for lost in peers.take_lost():
            self._channel.send(pb.FromEngine(peer_lost=lost))
        for late in peers.take_late():
            self._channel.send(pb.FromEngine(peer_late=late))
        for fault in peers.take_expert_faults():
            self._channel.send(pb.FromEngine(expert_fault=fault))

    def _attend(self) -> None:
        """Amid a step that waits for a late worker: say so, and hear whether to go on without."""
        self._tell_rest()
        self._tell_outputs()
        self._tell_of_peers()
        for message in self._channel.recv_all():
            if message.WhichOneof("body") == "drop_peer":
                self._take(message)
            else:
                self._heard.append(message)
        self._channel.flush()

    def _send_stats(self) -> None:
        self._stats_due_s = math.inf
        stats = self._engine.stats()
        stats.pong, self._pong = self._pong, 0
        stats.transport_number = self._dispatcher.peers.transport_number
        self._channel.send(pb.FromEngine(stats=stats))

    def _wait_s(self) -> float | None:
        """How long nothing is to be done, if nobody says anything; None: for ever."""
        now = self._clock()
        until_s = min(self._engine.next_event_s(), self._stats_due_s)
        if not self._channel.flush():
            until_s = min(until_s, now + _FLUSH_INTERVAL_S)
        return None if until_s == math.inf else max(0.0, until_s - now)


def size_kv(
    config: GatewayConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[BlockAllocator, int]:
    """Blocks for the memory that there is, and the longest sequence that is served with them.

    Raises ConfigError when no block fits, or more tokens are asked for than the model has
    positions.
    """
    longest = config.max_model_len or model.max_model_len
    if longest > model.max_model_len:
        raise ConfigError(
            f"max_model_len {longest} is more than the {model.max_model_len} positions that the "
            "model was made for; ask for fewer"
        )
    memory_bytes = config.kv_memory_bytes or _CPU_KV_BYTES
    if device.type == "cuda" and not config.kv_memory_bytes:
        free, total = torch.cuda.mem_get_info(device)
        # Workers that share the GPU may not have loaded yet, or may: what they take counts once.
        share = (total - config.reserved_bytes) // config.gateways_on_device
        ours = min(free, share - torch.cuda.memory_reserved(device))
        memory_bytes = int(ours * _GPU_KV_FRACTION)
    block_bytes = KvCache.bytes_per_block(model, config.kv_block_size, dtype)
    num_blocks = memory_bytes // block_bytes
    if num_blocks <= 0:
        raise ConfigError(
            f"one KV block takes {block_bytes} bytes and there are {memory_bytes} for all; raise "
            "kv_memory_bytes, or lower kv_block_size"
        )
    blocks = BlockAllocator(num_blocks, config.kv_block_size, prefix_cache=config.prefix_cache)
    return blocks, min(longest, num_blocks * config.kv_block_size)


def _log_progress() -> Callable[[int, int], None]:
    """Says how far loading is, now and then."""
    said_s = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_s
        if done == total or time.monotonic() - said_s >= _PROGRESS_INTERVAL_S:
            said_s = time.monotonic()
            log.info("loading_model", layers=done, of=total)

    return progress
