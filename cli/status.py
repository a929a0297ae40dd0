"""``expert-mesh status`` and ``expert-mesh plan``: what placement knows, for people and for jq."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.placement_client import (
    DEFAULT_TARGET,
    AsJson,
    PlacementClient,
    Target,
    TlsCa,
    TlsCert,
    TlsKey,
)

_WIDE = 110
_MOST_EVENTS = 6
_STYLES = {"draining": "yellow", "loading": "yellow", "unreachable": "bold red"}

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from protos import placement_pb2 as pb


def status(
    target: Target = DEFAULT_TARGET,
    watch: Annotated[bool, typer.Option("--watch", help="Go on, showing what changes.")] = False,
    as_json: AsJson = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Show the epoch, the gateways, the workers, their load and their experts."""
    with PlacementClient(target, tls_cert, tls_key, tls_ca) as placement:
        if watch:
            from cli.watch import watch as show

            show(placement.status, as_json)
            return
        mesh = placement.status()
    if as_json:
        typer.echo(json.dumps(status_as_dict(mesh)))
    else:
        from rich.console import Console

        width = Console().width
        parts = [summary(mesh), "", gateways_table(mesh, width), ""]
        parts.append(workers_table(mesh, width))
        if mesh.events:
            parts += ["", events_table(mesh.events[-_MOST_EVENTS:])]
        _print(*parts)


def plan(
    target: Target = DEFAULT_TARGET,
    as_json: AsJson = False,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Show which worker serves each expert."""
    with PlacementClient(target, tls_cert, tls_key, tls_ca) as placement:
        mesh = placement.status()
    if as_json:
        typer.echo(json.dumps(plan_as_dict(mesh.plan)))
    else:
        from rich.console import Console

        _print(*plan_tables(mesh.plan, Console().width), _plan_summary(mesh.plan))


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
        "balancedness_before": mesh.balancedness_before,
        "rebalanced_at_unix_s": round(mesh.rebalanced_at_unix_s, 3),
        "moves": mesh.moves,
        "replicas": mesh.replicas,
        "events": [
            {"at_unix_s": round(e.at_unix_s, 3), "kind": e.kind, "text": e.text}
            for e in mesh.events
        ],
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
                "faulty": [[e.layer, e.index] for e in w.faulty],
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


def _plan_summary(plan: pb.Plan) -> str:
    from rich.markup import escape

    serving = sum(bool(expert.worker_ids) for expert in plan.experts)
    parts = [f"epoch {plan.epoch}", f"{serving} experts on {len(plan.workers)} workers"]
    if plan.experts_per_worker > 1:
        parts.append(f"colocated: up to {plan.experts_per_worker} of a layer on one worker")
    parts.append("complete" if plan.complete else "[bold red]incomplete[/]")
    if plan.note:
        parts.append(f"[yellow]{escape(plan.note)}[/]")
    return " · ".join(parts)


def summary(mesh: pb.MeshStatus) -> str:
    """The plan in a line, and its balance in another."""
    parts = [f"balance {mesh.balancedness:.2f}"]
    if mesh.balancedness_before:
        at = clock(mesh.rebalanced_at_unix_s)
        parts[0] += f" ({mesh.balancedness_before:.2f} before the rebalance of {at})"
    parts += [f"{mesh.replicas} replicas", f"{mesh.moves} moves"]
    return _plan_summary(mesh.plan) + "\n" + " · ".join(parts)


def clock(unix_s: float) -> str:
    """The time of day here."""
    return time.strftime("%H:%M:%S", time.localtime(unix_s))


def gateways_table(mesh: pb.MeshStatus, width: int) -> Table:
    """One a line."""
    from rich.text import Text

    from cli.tables import plain_table

    wide = ("address", "host", "device") if width >= _WIDE else ()
    gateways = plain_table("gateway", *wide, "epoch")
    for title in ("running", "waiting", "KV in use"):
        gateways.add_column(title, justify="right", no_wrap=True)
    gateways.add_column("cannot reach")
    for g in mesh.gateways:
        where = (g.gateway.grpc_address, g.gateway.host, g.gateway.device) if wide else ()
        gateways.add_row(
            g.gateway.gateway_id,
            *where,
            str(g.gateway.epoch),
            str(g.gateway.running),
            str(g.gateway.waiting),
            f"{g.gateway.kv_usage:.0%}",
            Text(" ".join(g.gateway.unreachable_worker_ids), style="red"),
        )
    return gateways


def workers_table(mesh: pb.MeshStatus, width: int, most: int | None = None) -> Table:
    """One a line; where only ``most`` fit, those in trouble and the busiest."""
    from rich.text import Text

    from cli.tables import plain_table

    wide = ("address", "host", "device") if width >= _WIDE else ("device",)
    workers = plain_table("worker", *wide, "state")
    for title in ("rows/s", "queued"):
        workers.add_column(title, justify="right", no_wrap=True)
    workers.add_column("load", no_wrap=True)
    workers.add_column("layers.expert")
    busiest = max((w.rows_per_s for w in mesh.workers), default=0.0)
    shown = list(mesh.workers)
    if most is not None and len(shown) > most:

        def is_well(w: pb.WorkerStatus) -> bool:
            return w.state not in _STYLES and not w.error and not w.faulty

        shown.sort(key=lambda w: (is_well(w), -w.rows_per_s))
        shown = sorted(shown[: most - 1], key=lambda w: w.worker.worker_id)
    for w in shown:
        where = (w.worker.grpc_address, w.worker.host, w.worker.device)
        workers.add_row(
            w.worker.worker_id,
            *(where if len(wide) == 3 else where[-1:]),
            Text(w.state, style=_STYLES.get(w.state, "")),
            f"{w.rows_per_s:.0f}",
            str(w.queue_rows),
            _bar(w.rows_per_s / busiest if busiest else 0.0),
            _experts_of(w),
        )
    if len(shown) < len(mesh.workers):
        workers.add_row(f"and {len(mesh.workers) - len(shown)} more")
    return workers


def _experts_of(worker: pb.WorkerStatus) -> Text:
    """What it has, or why not, and what it gets wrong."""
    from rich.text import Text

    if worker.error:
        return Text(worker.error, style="red")
    text = Text(_ranges(worker.resident, 4))
    if worker.faulty:
        text.append(f" not used for {_ranges(worker.faulty, 4)}".lstrip(), style="red")
    return text


def events_table(events: Sequence[pb.MeshEvent]) -> Table:
    """When, what kind, and in words, cut where the line ends; the newest last."""
    from rich.text import Text

    from cli.tables import plain_table

    table = plain_table()
    table.show_header = False
    rows = [(clock(event.at_unix_s), event.kind, event.text) for event in events]
    for column in (0, 1):
        table.add_column(no_wrap=True, min_width=max(len(row[column]) for row in rows))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _bar(share: float) -> str:
    """``share`` of eight characters, 0 to 1."""
    eighths = round(share * 8 * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).strip().ljust(8)


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
