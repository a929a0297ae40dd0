"""A small mesh inside one process: real dispatcher, real data planes, loopback or UCX."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import cast

import torch

from expert_worker.data_plane import DataPlane
from expert_worker.expert_store import ExpertStore
from gateway.dispatch import Dispatcher
from mesh import wire
from mesh.mlp import GatedMlp
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId
from mesh.transport.base import Transport
from protos import engine_pb2, placement_pb2

HIDDEN_SIZE = 8
NUM_EXPERTS = 4
CPU = torch.device("cpu")


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """An expert whose output one can write down."""
    return lambda x_RD: x_RD * factor


def compiled(expert: ExpertId) -> GatedMlp:
    """An expert that UCX's transport answers for by compiled code; no two are the same."""
    generator = torch.Generator().manual_seed(wire.expert_key(*expert))
    mlp = GatedMlp(
        torch.randn(2 * HIDDEN_SIZE, HIDDEN_SIZE, generator=generator),
        torch.randn(HIDDEN_SIZE, HIDDEN_SIZE, generator=generator),
        "silu",
    )
    assert mlp.native is not None
    return mlp


def factor_of(expert: ExpertId) -> float:
    """What an expert of the rig multiplies by: never the same twice."""
    return 100.0 * expert.layer + expert.index + 1


class Worker:
    """A data plane with experts, as the worker process has it."""

    def __init__(
        self,
        worker_id: str,
        make_transport: Callable[[], Transport],
        experts: Iterable[ExpertId],
        *,
        max_rows: int = 64,
        load: Callable[[ExpertId], Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.max_rows = max_rows
        self.experts = list(experts)
        self.store = ExpertStore(
            load or (lambda expert: times(factor_of(expert))),
            expert_bytes=1,
            memory_bytes=1 << 20,
            worker_id=worker_id,
        )
        self.store.load(self.experts)
        self.plane = DataPlane(
            make_transport,
            self.store,
            hidden_size=HIDDEN_SIZE,
            dtype=torch.float32,
            device=CPU,
            num_experts=NUM_EXPERTS,
            max_rows=max_rows,
            merge_rows=4 * max_rows,
            spin_s=0.0,
            threads=1,
        )
        self.plane.start()
        self.address = self.plane.wait_started()


def make_dispatcher(
    transport: Transport,
    *,
    max_tokens: int = 64,
    k: int = 2,
    reply_timeout_s: float = 10.0,
    grouped: bool = False,
) -> Dispatcher:
    """A gateway's dispatcher for the rig's model."""
    config = SimpleNamespace(
        num_experts=NUM_EXPERTS,
        hidden_size=HIDDEN_SIZE,
        experts_per_token=k,
        experts_grouped=lambda itemsize: grouped and itemsize == torch.float32.itemsize,
    )
    return Dispatcher(
        transport,
        cast(ModelConfig, config),
        device=CPU,
        dtype=torch.float32,
        max_tokens=max_tokens,
        reply_timeout_s=reply_timeout_s,
    )


def connect(
    dispatcher: Dispatcher, transport: Transport, workers: Iterable[Worker], epoch: int = 1
) -> engine_pb2.Routing:
    """What the front does: connect to each worker, then hand the engine its routing."""
    routing = engine_pb2.Routing(epoch=epoch, transport_number=dispatcher.peers.transport_number)
    serving: dict[ExpertId, list[str]] = {}
    for number, worker in enumerate(workers, start=100 * epoch):
        session = worker.plane.connect("gateway", transport.address, number)
        routing.peers.add(
            worker_id=worker.worker_id,
            ucx_address=worker.address,
            session=session,
            reply_session=number,
            max_rows=worker.max_rows,
        )
        for expert in worker.experts:
            serving.setdefault(expert, []).append(worker.worker_id)
    for expert, worker_ids in sorted(serving.items()):
        routing.experts.add(
            expert=placement_pb2.ExpertId(layer=expert.layer, index=expert.index),
            worker_ids=worker_ids,
        )
    dispatcher.set_routing(routing)
    return routing


def expected(
    layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """The combine written as the sum that it is, row by row."""
    y_TD = torch.zeros_like(x_TD)
    for t in range(x_TD.shape[0]):
        for k in range(ids_TK.shape[1]):
            expert = ExpertId(layer, int(ids_TK[t, k]))
            y_TD[t] += weights_TK[t, k] * factor_of(expert) * x_TD[t]
    return y_TD


def random_step(
    num_tokens: int, *, k: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_TD, expert ids and weights of a made-up batch."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    scores_TE = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(k, dim=1)
    return x_TD, ids_TK, weights_TK
