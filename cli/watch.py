"""``expert-mesh status --watch``: a mesh as it lives, for people and for jq."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cli.status import events_table, gateways_table, status_as_dict, summary, workers_table
from mesh.errors import MeshError
from mesh.plan import ExpertId, expert_from_proto

if TYPE_CHECKING:
    from rich.console import RenderableType

    from protos import placement_pb2 as pb

_INTERVAL_S = 0.5
_SMOOTH_S = 3.0
_SHADES = "·▁▂▃▄▅▆▇█"
_MOST_LAYERS = 8
_FEWEST_WORKERS = 4
_MOST_EVENTS = 6
# What stays the same while nothing but load changes.
_VOLATILE = {"balancedness", "age_s", "rows_per_s", "queue_rows", "running", "waiting", "kv_usage"}


def watch(fetch: Callable[[], pb.MeshStatus], as_json: bool) -> None:
    """Show what ``fetch`` gives, again and again, until the terminal says stop.

    A placement that does not answer is shown as that: it may come back.
    """
    with suppress(KeyboardInterrupt):
        (_watch_as_json if as_json else _watch_live)(fetch)


def _watch_as_json(fetch: Callable[[], pb.MeshStatus]) -> None:
    changes = Changes()
    while True:
        try:
            line = changes.of(status_as_dict(fetch()))
        except MeshError as error:
            line = changes.of({"error": str(error)})
        if line:
            print(json.dumps({"at_unix_s": round(time.time(), 3), **line}), flush=True)
        time.sleep(_INTERVAL_S)


@dataclass
class Changes:
    """Of a sequence of statuses, those that say something new."""

    _seen: Any = None
    _last_events: list[Any] = field(default_factory=list)

    def of(self, status: dict[str, Any]) -> dict[str, Any] | None:
        """The status, its events only those that came since the last one; None if all is as it was.

        Load alone is no change.
        """
        lasting = _lasting(status)
        if lasting == self._seen:
            return None
        self._seen = lasting
        events = status.get("events", self._last_events)
        fresh = [event for event in events if event not in self._last_events]
        self._last_events = events
        return {**status, "events": fresh}


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in _VOLATILE}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def _watch_live(fetch: Callable[[], pb.MeshStatus]) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    console = Console()
    load = ExpertLoad()
    last: pb.MeshStatus | None = None
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                last = fetch()
                load.observe(last, time.monotonic())
            except MeshError as error:
                trouble = str(error)
            parts: list[RenderableType] = [Text(trouble, style="bold red")] if trouble else []
            if last is not None:
                parts += view(last, load, console.width, console.height - len(parts))
            live.update(Group(*parts), refresh=True)
            time.sleep(_INTERVAL_S)


class ExpertLoad:
    """Rows a second of each expert, as the gateways report them, smoothed."""

    def __init__(self) -> None:
        self.rows_per_s: dict[ExpertId, float] = {}
        self._observed_s = -math.inf

    def observe(self, mesh: pb.MeshStatus, now: float) -> None:
        """Gateways report once a second what they routed since."""
        weight = 1 - math.exp(-(now - self._observed_s) / _SMOOTH_S)
        self._observed_s = now
        rows: dict[ExpertId, float] = dict.fromkeys(self.rows_per_s, 0.0)
        for gateway in mesh.gateways:
            for load in gateway.gateway.load:
                expert = expert_from_proto(load.expert)
                rows[expert] = rows.get(expert, 0.0) + load.rows
        for expert, now_rows in rows.items():
            before = self.rows_per_s.get(expert, 0.0)
            self.rows_per_s[expert] = before + weight * (now_rows - before)


def view(mesh: pb.MeshStatus, load: ExpertLoad, width: int, height: int) -> Iterator[Any]:
    """What fits: balance, gateways, workers, the load of each expert, what happened last."""
    from rich.text import Text

    yield summary(mesh)
    yield ""
    yield gateways_table(mesh, width)
    yield ""
    left = height - 5 - len(mesh.gateways)
    events = mesh.events[-min(_MOST_EVENTS, max(2, left // 5)) :]
    left -= len(events) + 2 if events else 0
    heat = list(heat_map(mesh.plan, load.rows_per_s, width))
    if left - len(heat) - 1 < _FEWEST_WORKERS + 1:
        heat = []
    left -= len(heat) + 1 if heat else 0
    yield workers_table(mesh, width, most=max(_FEWEST_WORKERS, left - 2))
    if heat:
        yield ""
        yield from heat
    if events:
        yield ""
        yield Text("what happened last", style="bold")
        yield events_table(events)


def heat_map(plan: pb.Plan, rows_per_s: Mapping[ExpertId, float], width: int) -> Iterator[Any]:
    """A line a layer, a cell an expert: its load against the layer's busiest, and how many
    workers serve it where that is not one. Layers and experts that do not fit are left out."""
    from rich.text import Text

    num_workers = {expert_from_proto(e.expert): len(e.worker_ids) for e in plan.experts}
    known = num_workers.keys() | rows_per_s.keys()
    layers = sorted({expert.layer for expert in known})[:_MOST_LAYERS]
    num_experts = max((expert.index + 1 for expert in known), default=0)
    shown = min(num_experts, (width - 7) // 2)
    if not known:
        return
    title = f"load of experts 0 to {shown - 1} (2: two workers serve it, "
    yield Text(title, style="bold") + Text("x", style="bold red") + Text(": none)", style="bold")
    for layer in layers:
        experts = [ExpertId(layer, index) for index in range(shown)]
        most = max((rows_per_s.get(expert, 0.0) for expert in experts), default=0.0)
        line = Text(f"{layer:5}  ")
        for expert in experts:
            count = num_workers.get(expert, 0)
            if not count:
                line += Text("x ", style="bold red")
            else:
                shade = _SHADES[round(rows_per_s.get(expert, 0.0) / most * 8) if most else 0]
                line += Text(shade, style="green") + Text(str(min(count, 9)) if count > 1 else " ")
        yield line
