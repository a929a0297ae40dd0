"""``expert-mesh status`` and ``expert-mesh plan``: what placement knows, for people and for jq."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cli.placement_client import (
    DEFAULT_TARGET,
    TIMEOUT_S,
    AsJson,
    Target,
    TlsCa,
    TlsCert,
    TlsKey,
    placement_at,
)

if TYPE_CHECKING:
    from rich.table import Table

    from protos import placement_pb2 as pb


def status(
    target: Target = DEFAULT_TARGET,
    as_json: AsJson = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Show the epoch, the gateways, the workers, their load and their experts."""
    mesh = _fetch(target, tls_cert, tls_key, tls_ca)
    if as_json:
        typer.echo(json.dumps(status_as_dict(mesh)))
    else:
        _print(_summary(mesh.plan), *_status_tables(mesh))


def plan(
    target: Target = DEFAULT_TARGET,
    as_json: AsJson = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Show which worker serves each expert."""
    mesh = _fetch(target, tls_cert, tls_key, tls_ca)
    if as_json:
        typer.echo(json.dumps(plan_as_dict(mesh.plan)))
    else:
        from rich.console import Console

        _print(*plan_tables(mesh.plan, Console().width), _summary(mesh.plan))


def _fetch(
    target: str, tls_cert: Path | None, tls_key: Path | None, tls_ca: Path | None
) -> pb.MeshStatus:
    from protos import placement_pb2 as pb

    with placement_at(target, tls_cert, tls_key, tls_ca) as placement:
        mesh: pb.MeshStatus = placement.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    return mesh


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console()
    for part in parts:
        console.print(part)


def status_as_dict(mesh: pb.MeshStatus) -> dict[str, Any]:
    """What ``status --json`` prints; experts are ``[layer, index]``."""
    return {
        "epoch": mesh.plan.epoch,
        "complete": mesh.plan.complete,
        "note": mesh.plan.note,
        "experts_per_worker": mesh.plan.experts_per_worker,
        "balancedness": mesh.balancedness,
        "gateways": [
            {
                "id": g.gateway.gateway_id,
                "address": g.gateway.grpc_address,
                "http": g.gateway.http_address,
                "host": g.gateway.host,
                "device": g.gateway.device,
                "pid": g.gateway.pid,
                "epoch": g.gateway.epoch,
                "running": g.gateway.running,
                "waiting": g.gateway.waiting,
                "kv_usage": g.gateway.kv_usage,
                "unreachable_workers": list(g.gateway.unreachable_worker_ids),
                "age_s": g.age_s,
            }
            for g in mesh.gateways
        ],
        "workers": [
            {
                "id": w.worker.worker_id,
                "address": w.worker.grpc_address,
                "http": w.worker.http_address,
                "host": w.worker.host,
                "device": w.worker.device,
                "device_name": w.worker.device_name,
                "pid": w.worker.pid,
                "state": w.state,
                "rows_per_s": w.rows_per_s,
                "queue_rows": w.queue_rows,
                "experts": [[e.layer, e.index] for e in w.resident],
                "age_s": w.age_s,
                "error": w.error,
            }
            for w in mesh.workers
        ],
    }


def plan_as_dict(plan: pb.Plan) -> dict[str, Any]:
    """What ``plan --json`` prints."""
    return {
        "epoch": plan.epoch,
        "complete": plan.complete,
        "note": plan.note,
        "experts_per_worker": plan.experts_per_worker,
        "experts": [
            {"layer": e.expert.layer, "index": e.expert.index, "workers": list(e.worker_ids)}
            for e in plan.experts
        ],
    }


def plan_tables(plan: pb.Plan, width: int) -> Iterator[Table | str]:
    """Layers down, experts across, in each cell the worker, or the replicas, best first."""
    from cli.tables import NOBODY, expert_tables, short_names
    from mesh.plan import expert_from_proto

    workers = {expert_from_proto(e.expert): tuple(e.worker_ids) for e in plan.experts}
    names = short_names(name for names in workers.values() for name in names)
    whole, short = next(iter(names.items()), ("", ""))
    yield f"\n[bold]worker of each expert[/] ({short} is {whole})"
    yield from expert_tables(
        workers, lambda e: "+".join(names[w] for w in workers[e]) or NOBODY, width
    )


def _summary(plan: pb.Plan) -> str:
    serving = sum(bool(expert.worker_ids) for expert in plan.experts)
    parts = [f"epoch {plan.epoch}", f"{serving} experts on {len(plan.workers)} workers"]
    if plan.experts_per_worker > 1:
        parts.append(f"colocated: up to {plan.experts_per_worker} of a layer on one worker")
    parts.append("complete" if plan.complete else "[bold red]incomplete[/]")
    if plan.note:
        parts.append(f"[yellow]{plan.note}[/]")
    return " · ".join(parts)


def _status_tables(mesh: pb.MeshStatus) -> Iterator[Table | str]:
    from cli.tables import plain_table

    yield ""
    gateways = plain_table("gateway", "address", "host", "device", "epoch")
    for title in ("running", "waiting", "KV in use"):
        gateways.add_column(title, justify="right", no_wrap=True)
    for g in mesh.gateways:
        gateways.add_row(
            g.gateway.gateway_id,
            g.gateway.grpc_address,
            g.gateway.host,
            g.gateway.device,
            str(g.gateway.epoch),
            str(g.gateway.running),
            str(g.gateway.waiting),
            f"{g.gateway.kv_usage:.0%}",
        )
    yield gateways
    yield ""

    workers = plain_table("worker", "address", "host", "device", "state")
    for title in ("rows/s", "queued"):
        workers.add_column(title, justify="right", no_wrap=True)
    workers.add_column("layers.expert")
    for w in mesh.workers:
        workers.add_row(
            w.worker.worker_id,
            w.worker.grpc_address,
            w.worker.host,
            w.worker.device,
            f"{w.state}: [red]{w.error}[/]" if w.error else w.state,
            f"{w.rows_per_s:.0f}",
            str(w.queue_rows),
            _ranges(w.resident),
        )
    yield workers


def _ranges(experts: Iterable[pb.ExpertId], most: int = 4) -> str:
    """``0-3.7 5.8``: expert 7 of layers 0 to 3, and 8 of layer 5."""
    layers_by_index: dict[int, list[int]] = {}
    for expert in sorted(experts, key=lambda e: (e.index, e.layer)):
        layers_by_index.setdefault(expert.index, []).append(expert.layer)
    runs = []
    for index, layers in layers_by_index.items():
        starts = [layer for layer in layers if layer - 1 not in layers]
        ends = [layer for layer in layers if layer + 1 not in layers]
        runs += [
            f"{start}.{index}" if start == end else f"{start}-{end}.{index}"
            for start, end in zip(starts, ends, strict=True)
        ]
    return " ".join(runs[:most]) + (f" and {len(runs) - most} more" if len(runs) > most else "")
