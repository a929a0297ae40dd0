"""Where an expert's weights come from: the checkpoint, or a worker that has them.

Whichever is faster: both are measured. An expert is made only of tensors that are complete; a
way that fails half way leaves nothing, and the next one starts anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar

import grpc
import structlog
import torch

from expert_worker.data_plane import DataPlane
from expert_worker.expert_mlp import empty_expert, load_expert, make_expert
from expert_worker.weights import Taking, chunks_of
from mesh.checkpoint import Checkpoint
from mesh.errors import CheckpointError, MeshError, ModelMismatch, PeerLost, Unavailable
from mesh.grpc_server import TlsFiles, open_channel
from mesh.mlp import Mlp
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId, expert_to_proto
from protos import worker_pb2, worker_pb2_grpc

log = structlog.get_logger()
Way = TypeVar("Way", bound=str)

_NEWEST_SHARE = 0.5
_LOOK_AGAIN_EVERY = 8
_ANSWER_TIMEOUT_S = 5.0
_LET_GO_S = 1.0
"""For the transport, of the memory of what was abandoned."""
_STALL_S = 5.0
_LOOK_INTERVAL_S = 0.5


class Paces:
    """Bytes a second of each way, as moving averages, and which way to try first. Pure."""

    def __init__(self) -> None:
        self.bytes_per_s: dict[str, float] = {}
        self._choices = 0

    def observe(self, way: str, num_bytes: int, seconds: float) -> None:
        """A try of ``way``; one that failed brought 0 bytes."""
        pace = num_bytes / max(seconds, 1e-9)
        before = self.bytes_per_s.get(way, pace)
        self.bytes_per_s[way] = before + _NEWEST_SHARE * (pace - before)

    def ranked(self, ways: Iterable[Way]) -> list[Way]:
        """``ways`` from the first to try to the last: the unmeasured as given, then by pace.

        Now and then the slowest leads: it may have become faster.
        """
        self._choices += 1
        ranked = sorted(ways, key=lambda way: -self.bytes_per_s.get(way, float("inf")))
        if self._choices % _LOOK_AGAIN_EVERY == 0:
            ranked.reverse()
        return ranked


class ExpertReader:
    """Reads experts on a thread that may wait; ``loop`` runs the calls to other workers.

    ``checkpoint`` is None on a host that has no weights. Indices count slices, ``shards`` to an
    expert; ``sources`` are the addresses of workers that have an expert.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        model: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        worker_id: str,
        tls: TlsFiles | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._device = device
        self._dtype = dtype
        self._worker_id = worker_id
        self._tls = tls
        self._loop = loop
        self._taking: Future[Mlp] | None = None
        self._closed = False
        self._failed_s: dict[str, float] = {}
        """Of each worker that failed last time, when; by address."""
        self.paces = Paces()
        self.shards = 1
        self.sources: Mapping[ExpertId, list[str]] = {}
        self.plane: DataPlane | None = None
        """What weights of other workers arrive at; without one they are not asked."""

    def __call__(self, expert: ExpertId) -> Mlp:
        """The expert, complete. Raises MeshError when no way leads to it."""
        ways: defaultdict[str, list[Callable[[ExpertId], Mlp]]] = defaultdict(list)
        if self._checkpoint is not None:
            ways["file"].append(partial(self._read, self._checkpoint))
        if self.plane is not None:
            # Who hangs costs seconds with each expert, unless another is asked first.
            known = self.sources.get(expert, ())
            for address in sorted(known, key=lambda source: self._failed_s.get(source, 0.0)):
                ways["peer"].append(partial(self._take, self.plane, address))
        failures: list[Exception] = []
        for way in self.paces.ranked(ways):
            for read in ways[way]:
                started = time.perf_counter()
                try:
                    mlp = read(expert)
                except (MeshError, OSError, RuntimeError) as error:
                    self.paces.observe(way, 0, time.perf_counter() - started)
                    log.warning("expert_not_read", expert=str(expert), way=way, reason=str(error))
                    failures.append(error)
                    continue
                if self._device.type == "cuda":
                    # The stream that computes does not wait for this thread's.
                    torch.cuda.current_stream(self._device).synchronize()
                seconds = time.perf_counter() - started
                num_bytes = sum(t.nbytes for t in mlp.tensors().values())
                self.paces.observe(way, num_bytes, seconds)
                log.info(
                    "expert_read", expert=str(expert), way=way, bytes=num_bytes, seconds=seconds
                )
                return mlp
        if len(failures) == 1:
            raise failures[0]
        raise CheckpointError(
            f"worker {self._worker_id} cannot get expert {expert}: "
            + (
                "; ".join(map(str, failures))
                or "it has no weights on its host, and no worker that has this expert is known; "
                "give it the checkpoint's files, or start a worker that has them"
            )
        )

    def close(self) -> None:
        """Wait for no other worker any more."""
        self._closed = True
        if self._taking is not None:
            self._taking.cancel()

    def _read(self, checkpoint: Checkpoint, expert: ExpertId) -> Mlp:
        return load_expert(
            checkpoint,
            self._model,
            expert.layer,
            expert.index,
            self._device,
            self._dtype,
            self.shards,
        )

    def _take(self, plane: DataPlane, address: str, expert: ExpertId) -> Mlp:
        if self._closed:
            raise Unavailable(f"worker {self._worker_id} is ending")
        self._taking = asyncio.run_coroutine_threadsafe(
            self._ask(plane, address, expert), self._loop
        )
        self._failed_s[address] = time.monotonic()
        mlp = self._taking.result()
        del self._failed_s[address]
        return mlp

    async def _ask(self, plane: DataPlane, address: str, expert: ExpertId) -> Mlp:
        """Have a worker give its expert, and watch over it."""
        session = await asyncio.to_thread(plane.weights, lambda w: w.reserve())
        request = worker_pb2.SendExpertRequest(
            worker_id=self._worker_id,
            ucx_address=plane.wait_started(),
            session=session,
            expert=expert_to_proto(expert),
            expert_shards=self.shards,
            model_fingerprint=self._model.fingerprint,
            dtype=str(self._dtype).removeprefix("torch."),
        )
        async with open_channel(address, self._tls) as channel:
            call = worker_pb2_grpc.ExpertWorkerStub(channel).SendExpert(request)
            try:
                offer = await _offer_of(call, address, expert)
                tensors = empty_expert(
                    self._model, expert.index, self._device, self._dtype, self.shards
                )
                if tensor_facts(tensors) != list(offer.tensors):
                    raise ModelMismatch(f"worker {address} has expert {expert} in other shapes")
                chunks = chunks_of(tensors, offer.chunk_bytes)
                taking = await asyncio.to_thread(
                    plane.weights,
                    lambda w: w.take(offer.ucx_address, offer.session, session, chunks),
                )
                await self._until_taken(plane, taking, call, address)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"worker {address}: {error.details()}") from error
            finally:
                call.cancel()
        return make_expert(self._model, tensors)

    async def _until_taken(
        self,
        plane: DataPlane,
        taking: Taking,
        call: grpc.aio.UnaryStreamCall[worker_pb2.SendExpertRequest, worker_pb2.ExpertOffer],
        address: str,
    ) -> None:
        """Until every byte is in. A giver that hangs up, or is silent for long, is left."""
        # Only ever waited for, never awaited: a cancellation must not reach the data plane.
        taken = asyncio.wrap_future(taking.result)
        hung_up = asyncio.ensure_future(call.read())
        received_bytes, since_s = 0, time.monotonic()
        reason = "the load was called off"
        try:
            while not taken.done():
                await asyncio.wait(
                    (taken, hung_up),
                    timeout=_LOOK_INTERVAL_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if taking.received_bytes > received_bytes:
                    received_bytes, since_s = taking.received_bytes, time.monotonic()
                elif time.monotonic() - since_s > _STALL_S:
                    reason = f"worker {address} sent nothing for {_STALL_S:g} s"
                    break
                if hung_up.done() and not taken.done():
                    reason = f"worker {address} hung up after {received_bytes} bytes"
                    break
        finally:
            hung_up.cancel()
            if not taken.done():
                lost = PeerLost(reason)
                with suppress(MeshError):
                    await asyncio.to_thread(plane.weights, lambda w: w.abandon(taking, lost))
        await asyncio.wait((taken,), timeout=_LET_GO_S)
        if not taken.done():
            with suppress(MeshError):
                await asyncio.to_thread(plane.weights, lambda w: w.leave(taking))
            taken.cancel()
            raise PeerLost(reason)
        taken.result()


async def _offer_of(
    call: grpc.aio.UnaryStreamCall[worker_pb2.SendExpertRequest, worker_pb2.ExpertOffer],
    address: str,
    expert: ExpertId,
) -> worker_pb2.ExpertOffer:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            offer = await call.read()
    except TimeoutError as error:
        words = f"worker {address} did not answer within {_ANSWER_TIMEOUT_S:g} s"
        raise Unavailable(words) from error
    if not isinstance(offer, worker_pb2.ExpertOffer):
        raise PeerLost(f"worker {address} hung up before it gave expert {expert}")
    return offer


def tensor_facts(tensors: Mapping[str, torch.Tensor]) -> list[worker_pb2.TensorFacts]:
    """Names and shapes, in the order in which the bytes go."""
    return [worker_pb2.TensorFacts(name=n, shape=t.shape) for n, t in sorted(tensors.items())]
