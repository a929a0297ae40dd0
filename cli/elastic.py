"""``scale``, ``roll``, ``drain`` and ``rebalance``: changing a mesh while it serves."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import control
from cli.placement_client import (
    DEFAULT_TARGET,
    AsJson,
    PlacementClient,
    Target,
    TlsCa,
    TlsCert,
    TlsKey,
)
from mesh.errors import PlacementError

if TYPE_CHECKING:
    from protos import placement_pb2 as pb

AsJsonLines = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
MeshName = Annotated[
    str | None, typer.Option("--mesh", help="Name of the `up`, where several run here.")
]
PlacementOfMesh = Annotated[
    str | None, typer.Option("--target", help="host:port of its placement, instead of its name.")
]


def scale(
    workers: Annotated[int, typer.Argument(help="How many expert workers there should be.")],
    mesh: MeshName = None,
    target: PlacementOfMesh = None,
    as_json: AsJsonLines = False,
) -> None:
    """Give a running `up` more or fewer workers, while it serves."""
    _ask({"do": "scale", "workers": workers}, mesh, target, as_json)


def roll(
    mesh: MeshName = None, target: PlacementOfMesh = None, as_json: AsJsonLines = False
) -> None:
    """Restart every worker of a running `up`, one after another, while it serves."""
    _ask({"do": "roll"}, mesh, target, as_json)


def _ask(wish: dict[str, Any], mesh: str | None, target: str | None, as_json: bool) -> None:
    from rich.console import Console

    from cli.report import describe

    events = control.ask(control.find(mesh, target), wish)
    if as_json:
        for event in events:
            typer.echo(json.dumps(event))
        return
    console = Console(highlight=False)
    with console.status("working"):
        for event in events:
            console.print(describe(event), markup=False, soft_wrap=True)


def drain(
    worker: Annotated[str, typer.Argument(help="Its id, as `status` shows it.")],
    target: Target = DEFAULT_TARGET,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for its end.")] = 120.0,
    force: Annotated[
        bool, typer.Option("--force", help="Even where its experts then are nowhere.")
    ] = False,
    as_json: AsJson = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Move everything away from a worker, and let it end."""
    with PlacementClient(target, tls_cert, tls_key, tls_ca) as placement:
        if not force and (lack := lack_without(placement.status(), worker)):
            raise PlacementError(f"{lack}; --force drains it all the same")
        reply = placement.drain(worker, timeout_s)
    if as_json:
        typer.echo(json.dumps({"worker": worker, "epoch": reply.epoch}))
    else:
        typer.echo(f"{worker} has left; epoch {reply.epoch}")


def lack_without(mesh: pb.MeshStatus, worker_id: str) -> str:
    """What cannot be without this worker, in words; empty where the others are enough."""
    others = [w for w in mesh.workers if w.worker.worker_id != worker_id and w.state != "draining"]
    crowd = max(mesh.plan.experts_per_worker, 1)
    in_layer = Counter(e.expert.layer for e in mesh.plan.experts)
    needed = -(-max(in_layer.values(), default=0) // crowd)
    if len(others) < needed:
        return (
            f"without {worker_id} there are {len(others)} workers, and every expert needs {needed} "
            f"with {crowd} of a layer on each: start another first"
        )
    seats = sum(_seats(w.worker, mesh.plan, len(in_layer)) for w in others)
    if seats < in_layer.total():
        rule = "one expert in all" if mesh.plan.strict else f"{crowd} of a layer"
        return (
            f"without {worker_id} there are seats for {seats} of {in_layer.total()} experts, by "
            f"the memory of the {len(others)} other workers and {rule} on each: start another "
            "first, or give them more --memory-bytes"
        )
    return ""


def _seats(worker: pb.WorkerInfo, plan: pb.Plan, num_layers: int) -> int:
    """How many experts, or slices, a worker may hold and has memory for."""
    allowed = 1 if plan.strict else num_layers * max(plan.experts_per_worker, 1)
    unit_bytes = -(-worker.expert_bytes // max(plan.expert_shards, 1))
    return min(allowed, worker.memory_bytes // unit_bytes) if unit_bytes else allowed


def rebalance(
    target: Target = DEFAULT_TARGET,
    as_json: AsJson = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Place every expert anew, by the load that was seen, and move what that asks for."""
    with PlacementClient(target, tls_cert, tls_key, tls_ca) as placement:
        reply = placement.rebalance()
    if as_json:
        typer.echo(json.dumps({"moves": reply.moves, "epoch": reply.epoch}))
    else:
        typer.echo(f"{reply.moves} experts move; `expert-mesh status --watch` shows them")
