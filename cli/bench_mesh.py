"""Worker processes and dispatchers that are connected to them, for benchmarks: no placement.

A worker is a module that is told its order as JSON and then answers as
:func:`cli.layer_worker.answer_asked` does. Gateways may be several, each with a dispatcher of its
own in whatever process: what each follows, :meth:`BenchWorkers.admit` says.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol, cast

from cli.child import command_of
from mesh.errors import Unavailable
from mesh.plan import ExpertId

if TYPE_CHECKING:
    import torch

    from gateway.dispatch import Dispatcher
    from protos import engine_pb2 as pb

_END_S = 20.0


class LayerSizes(Protocol):
    """What a dispatcher asks of a model."""

    @property
    def num_experts(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...

    def experts_grouped(self, itemsize: int) -> bool: ...


class Child:
    """A module in a process of its own, which is told and answers one JSON object a line."""

    def __init__(self, module: str, order: Mapping[str, Any]) -> None:
        command = command_of(module, json.dumps(order))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._module = module

    def tell(self, order: Mapping[str, Any]) -> None:
        """One that is gone hears nothing: :meth:`hear` says so."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next line that starts with a brace. Raises Unavailable when it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise Unavailable(f"{self._module} ended with {self.process.wait()}; its words are above")

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer."""
        self.tell(order)
        return self.hear()


@contextmanager
def children(module: str, orders: Sequence[Mapping[str, Any]]) -> Iterator[list[Child]]:
    """One for each order. They end with the block."""
    started: list[Child] = []
    try:
        for order in orders:
            started.append(Child(module, order))
        yield started
    finally:
        _end([child.process for child in started])


@dataclass(frozen=True)
class BenchWorkers:
    """Workers, each of which holds what ``held`` says of it: experts, or slices of them where each
    is cut into ``shards``."""

    children: Sequence[Child]
    held: Sequence[Sequence[ExpertId]]
    max_rows: int
    shards: int = 1
    gateways: dict[tuple[int, int], str] = field(default_factory=dict)
    """Who was admitted, by the number of a worker and the session there."""

    @cached_property
    def _addresses(self) -> list[str]:
        """Where they are, once all have loaded."""
        return [child.hear()["address"] for child in self.children]

    def admit(self, gateway: str, address: bytes) -> pb.Routing:
        """What a gateway at this address is to follow: it has a session at each from now on.

        ``gateway`` is its alone: another of the same name would end its sessions.
        """
        from protos import engine_pb2 as pb
        from protos import placement_pb2

        routing = pb.Routing(epoch=1, expert_shards=self.shards)
        for number, (child, held) in enumerate(zip(self.children, self.held, strict=True)):
            worker = self._addresses[number]
            who = {"gateway": gateway, "address": address.hex(), "session": number}
            session: int = child.ask(who)["session"]
            self.gateways[number, session] = gateway
            routing.peers.add(
                worker_id=f"worker-{number}",
                ucx_address=bytes.fromhex(worker),
                session=session,
                reply_session=number,
                max_rows=self.max_rows,
            )
            for layer, index in held:
                routing.experts.add(
                    expert=placement_pb2.ExpertId(layer=layer, index=index),
                    worker_ids=[f"worker-{number}"],
                )
        return routing

    def served(self) -> list[list[dict[str, Any]]]:
        """Of each worker, the stages of each dispatch since it was asked before. The first time
        none: to note them takes time, and is not done until somebody wants to know."""
        return [child.ask({"served": True})["served"] for child in self.children]


@contextmanager
def bench_workers(
    module: str,
    orders: Sequence[Mapping[str, Any]],
    held: Sequence[Sequence[ExpertId]],
    max_rows: int,
    shards: int = 1,
) -> Iterator[BenchWorkers]:
    """A worker for each order. They end with the block."""
    with children(module, [{**order, "max_rows": max_rows} for order in orders]) as started:
        yield BenchWorkers(started, held, max_rows, shards)


@contextmanager
def dispatcher_to(
    admit: Callable[[bytes], pb.Routing],
    sizes: LayerSizes,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    reply_timeout_s: float,
) -> Iterator[Dispatcher]:
    """A dispatcher that follows what ``admit`` makes of its address."""
    from gateway.dispatch import Dispatcher
    from mesh.model_config import ModelConfig
    from mesh.transport.ucx import UcxTransport
    from mesh.transport.waiting import SPIN_S

    transport = UcxTransport(cuda=device.type == "cuda")
    dispatcher = Dispatcher(
        transport,
        cast(ModelConfig, sizes),
        device=device,
        dtype=dtype,
        max_tokens=max_tokens,
        reply_timeout_s=reply_timeout_s,
        spin_s=SPIN_S[device.type],
    )
    dispatcher.set_routing(admit(transport.address))
    yield dispatcher
    dispatcher.close()


@dataclass(frozen=True)
class BenchMesh:
    """A dispatcher and the workers that it sends to."""

    dispatcher: Dispatcher
    workers: BenchWorkers

    @property
    def processes(self) -> list[subprocess.Popen[str]]:
        """Of the workers."""
        return [child.process for child in self.workers.children]


@contextmanager
def bench_mesh(
    module: str,
    orders: Sequence[Mapping[str, Any]],
    held: Sequence[Sequence[ExpertId]],
    sizes: LayerSizes,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    max_rows: int,
    reply_timeout_s: float,
) -> Iterator[BenchMesh]:
    """Workers and one gateway, in this process."""
    with (
        bench_workers(module, orders, held, max_rows) as workers,
        dispatcher_to(
            partial(workers.admit, "bench"),
            sizes,
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
            reply_timeout_s=reply_timeout_s,
        ) as dispatcher,
    ):
        yield BenchMesh(dispatcher, workers)


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End them by the end of their input, and whoever takes longer at once."""
    for process in processes:
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
    for process in processes:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
