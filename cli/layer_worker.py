"""A worker of ``expert-mesh bench layer``: a data plane with random experts of one layer.

It says where it is, is told of each gateway that asks, and serves until its standard input ends.
One JSON object a line: ``{"address": hex}`` out; ``{"gateway": name, "address": hex, "session":
n}`` in, ``{"session": n}`` out; ``{"served": true}`` in, ``{"served": [stages of each dispatch
since it was asked before]}`` out.
"""

from __future__ import annotations

import functools
import json
import sys

import torch

from expert_worker.data_plane import DataPlane
from expert_worker.expert_store import ExpertStore
from mesh.device import open_device
from mesh.mlp import GatedMlp, Mlp, PlainMlp
from mesh.plan import ExpertId
from mesh.telemetry import configure_logging
from mesh.transport.base import Trail
from mesh.transport.ucx import UcxTransport
from mesh.transport.waiting import SPIN_S

LAYER = 0
_PREPARED_S = 120.0
"""Until then graphs that are captured hold up what is measured."""


def random_expert(
    index: int, hidden: int, mlp_hidden: int, kind: str, device: torch.device, dtype: torch.dtype
) -> Mlp:
    """The same weights for the same index wherever it is made."""
    generator = torch.Generator(device).manual_seed(1000 + index)
    up_rows = 2 * mlp_hidden if kind == "gated" else mlp_hidden

    def weight(rows: int, columns: int) -> torch.Tensor:
        made = torch.empty(rows, columns, device=device, dtype=dtype)
        return made.normal_(std=columns**-0.5, generator=generator)

    up, down = weight(up_rows, hidden), weight(hidden, mlp_hidden)
    return GatedMlp(up, down, "silu") if kind == "gated" else PlainMlp(up, down, "gelu")


def main() -> None:
    order = json.loads(sys.argv[1])
    configure_logging("bench-worker", order["worker_id"], "warning")
    device, dtype = open_device(order["device"], behind=True), getattr(torch, order["dtype"])
    torch.set_num_threads(order["threads"])
    sizes = (order["hidden"], order["mlp_hidden"], order["kind"])
    store = ExpertStore(
        lambda e: random_expert(e.index, *sizes, device, dtype),
        expert_bytes=1,
        memory_bytes=1 << 40,
        worker_id=order["worker_id"],
    )
    store.load([ExpertId(LAYER, index) for index in order["experts"]])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    answer_asked(
        store,
        hidden_size=order["hidden"],
        dtype=dtype,
        device=device,
        num_experts=order["num_experts"],
        max_rows=order["max_rows"],
        threads=order["threads"],
    )


def answer_asked(
    store: ExpertStore,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_experts: int,
    max_rows: int,
    threads: int,
) -> None:
    """Serve what is in the store until standard input ends; the lines are this module's."""
    plane = DataPlane(
        functools.partial(UcxTransport, cuda=device.type == "cuda"),
        store,
        hidden_size=hidden_size,
        dtype=dtype,
        device=device,
        num_experts=num_experts,
        max_rows=max_rows,
        merge_rows=max_rows,
        spin_s=SPIN_S[device.type],
        threads=threads,
    )
    served: list[Trail] | None = None
    plane.start()
    address = plane.wait_started()
    plane.prepared.wait(_PREPARED_S)
    print(json.dumps({"address": address.hex()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "served" in asked:
            if served is None:
                served = []
                plane.trace(served.append)
            plane.weights(lambda transfers: None)  # a turn of its thread: it has told of all
            taken, served[:] = served[:], []
            print(json.dumps({"served": [one._asdict() for one in taken]}), flush=True)
            continue
        address = bytes.fromhex(asked["address"])
        session = plane.connect(asked["gateway"], address, asked["session"])
        print(json.dumps({"session": session}), flush=True)
    plane.stop()


if __name__ == "__main__":
    main()
