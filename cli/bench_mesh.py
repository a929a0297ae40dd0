"""Worker processes and a dispatcher that is connected to them, for benchmarks: no placement.

A worker is a module that is told its order as JSON and then answers as
:func:`cli.layer_worker.answer_asked` does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from mesh.errors import Unavailable
from mesh.plan import ExpertId

if TYPE_CHECKING:
    import torch

    from gateway.dispatch import Dispatcher

_END_S = 20.0


class LayerSizes(Protocol):
    """What a dispatcher asks of a model."""

    @property
    def num_experts(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def experts_per_token(self) -> int: ...


@dataclass(frozen=True)
class BenchMesh:
    """A dispatcher and the processes that it sends to."""

    dispatcher: Dispatcher
    processes: Sequence[subprocess.Popen[str]]

    def served(self) -> list[list[dict[str, float]]]:
        """Of each worker, the stages of each dispatch since the last time it was asked."""
        return [_ask(process, {"served": True})["served"] for process in self.processes]


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
    """A worker for each order, which holds what ``held`` says of it. They end with the block."""
    from gateway.dispatch import Dispatcher
    from mesh.model_config import ModelConfig
    from mesh.transport.ucx import UcxTransport
    from mesh.transport.waiting import SPIN_S
    from protos import engine_pb2 as pb
    from protos import placement_pb2

    transport = UcxTransport(cuda=device.type == "cuda")
    routing = pb.Routing(epoch=1)
    processes: list[subprocess.Popen[str]] = []
    try:
        for order in orders:
            command = [sys.executable, "-m", module, json.dumps({**order, "max_rows": max_rows})]
            pipe = subprocess.PIPE
            processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        for number, process in enumerate(processes):
            address = _ask(process, None)["address"]
            who = {"address": transport.address.hex(), "session": number}
            routing.peers.add(
                worker_id=f"worker-{number}",
                ucx_address=bytes.fromhex(address),
                session=_ask(process, who)["session"],
                reply_session=number,
                max_rows=max_rows,
            )
            for layer, index in held[number]:
                routing.experts.add(
                    expert=placement_pb2.ExpertId(layer=layer, index=index),
                    worker_ids=[f"worker-{number}"],
                )
        dispatcher = Dispatcher(
            transport,
            cast(ModelConfig, sizes),
            device=device,
            dtype=dtype,
            max_tokens=max_tokens,
            reply_timeout_s=reply_timeout_s,
            spin_s=SPIN_S[device.type],
        )
        dispatcher.set_routing(routing)
        yield BenchMesh(dispatcher, processes)
        dispatcher.close()
    finally:
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """End them by the end of their input, and whoever takes longer at once."""
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    for process in processes:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ask(process: subprocess.Popen[str], order: Mapping[str, Any] | None) -> dict[str, Any]:
    """The next line of a worker that starts with a brace."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a subprocess without the pipes that it was to have")
    if order is not None:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, Any] = json.loads(line)
            return answer
    raise Unavailable(f"a worker ended with {process.wait()}; its words are above")
