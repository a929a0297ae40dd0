"""Where a decode step's time goes: of each layer of the mesh, and between two steps.

    python -m benchmarks.stages --model one

Gateways and workers as in :mod:`benchmarks.papers`, whose *ours* this takes apart, or its *slices*
with ``--slices``. Workers say when each dispatch went through its stages. What passes between a
layer's last reply and the next layer's first dispatch is the gateway's; of its kernels, where there
is a GPU, a profiler says more, in steps of their own, as it slows what it watches. Rows of two
gateways that are computed apart cost both: *together* is the share of dispatches that were computed
with another gateway's. All are means, so that they add up: layers times away and gateway, and once
between, are a step.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gateways import gateways_of
from benchmarks.models import MODELS, model_of
from benchmarks.random_model import workers_of
from benchmarks.work import Work, say
from cli import mps
from mesh import wire
from mesh.device import open_device
from mesh.telemetry import configure_logging

_STEPS = 48
_PROFILED = range(20, 24)
_SAME_US = 3.0


class Served(NamedTuple):
    """One dispatch, times in microseconds."""

    worker: int
    gateway: str
    layer: int
    num_rows: int
    found_us: float
    done_us: float
    device_us: float
    """All of what its batch was with the device."""


@dataclass
class _Visit:
    """A gateway's dispatches of one layer."""

    layer: int
    served: list[Served] = field(default_factory=list)

    @property
    def came_us(self) -> float:
        return min(one.found_us for one in self.served)

    @property
    def done_us(self) -> float:
        return max(one.done_us for one in self.served)


def served_of(
    trails: Sequence[Iterable[Mapping[str, Any]]], gateways: Mapping[tuple[int, int], str]
) -> list[Served]:
    """What workers said (:func:`cli.layer_worker.answer_asked`), a sequence each; ``gateways`` by
    worker and session."""
    found = []
    for worker, of_worker in enumerate(trails):
        for trail in of_worker:
            frame = wire.decode(trail["tag"])
            began_s, ended_s = trail["fetched_s"][0], trail["computed_s"][1]
            found.append(
                Served(
                    worker,
                    gateways[worker, frame.session],
                    frame.layer,
                    frame.rows,
                    trail["found_s"] * 1e6,
                    trail["sent_s"][0] * 1e6,
                    (ended_s - began_s) * 1e6,
                )
            )
    return sorted(found, key=lambda one: one.found_us)


def stages(served: Sequence[Served], num_steps: int) -> dict[str, float]:
    """Means in microseconds over the last so many steps of each gateway: *away* from a layer's
    first dispatch to its last reply, of which *device* the longest batch; *gateway* from there to
    the next layer; *between* from the last layer to the first one of the next step."""
    visits: defaultdict[str, list[_Visit]] = defaultdict(list)
    for one in served:
        mine = visits[one.gateway]
        if not mine or mine[-1].layer != one.layer or one.worker in _workers_of(mine[-1]):
            mine.append(_Visit(one.layer))
        mine[-1].served.append(one)
    away, device, gateway, between = [], [], [], []
    kept: list[Served] = []
    for mine in visits.values():
        begins = [n for n, visit in enumerate(mine) if not n or visit.layer <= mine[n - 1].layer]
        last = mine[begins[-num_steps] if len(begins) >= num_steps else 0 :]
        for visit in last:
            away.append(visit.done_us - visit.came_us)
            device.append(max(one.device_us for one in visit.served))
            kept += visit.served
        for before, after in itertools.pairwise(last):
            on = gateway if after.layer > before.layer else between
            on.append(after.came_us - before.done_us)
    found = {"away_us": away, "device_us": device, "gateway_us": gateway, "between_us": between}
    means = {name: fmean(times) for name, times in found.items() if times}
    return means | {"together": _together(kept)}


def _workers_of(visit: _Visit) -> set[int]:
    return {one.worker for one in visit.served}


def _together(served: Iterable[Served]) -> float:
    """The share of dispatches that a worker was done with at the time of another gateway's."""
    by_layer: defaultdict[tuple[int, int], list[Served]] = defaultdict(list)
    for one in served:
        by_layer[one.worker, one.layer].append(one)
    shared = total = 0
    for those in by_layer.values():
        those.sort(key=lambda one: one.done_us)
        near = [
            a.gateway != b.gateway and b.done_us - a.done_us < _SAME_US
            for a, b in itertools.pairwise(those)
        ]
        shared += sum(map(max, zip([False, *near], [*near, False], strict=True)))
        total += len(those)
    return shared / total if total else 0.0


def measured(
    settings: dict[str, Any], workers: int, work: Work, where: str, gateways: int, shards: int
) -> dict[str, Any]:
    """By batch: the stages, and where there is a GPU each kernel's microseconds a step."""
    device = open_device(where)
    found: dict[str, Any] = {}
    with (
        workers_of(settings, workers, device, shards) as mesh,
        gateways_of(mesh, settings, work, 1, device.type, gateways) as run,
    ):
        for batch in work.batches:
            run(batch, work.decode_len, work.num_new)
            mesh.served()
            ran = run(batch, work.decode_len, work.num_new)
            served = served_of(mesh.served(), mesh.gateways)
            most = batch * settings.get("num_experts_per_tok", 1)  # of a step without prompts
            steps = [s for one in ran for s in one.steps_s[-work.decode_steps :]]
            found[str(batch)] = {
                "step_ms": fmean(steps) * 1e3,
                **stages([one for one in served if one.num_rows <= most], work.decode_steps),
            }
            if device.type == "cuda":
                ran = run(batch, work.decode_len, work.num_new, _PROFILED)
                found[str(batch)]["kernels_us"] = ran[0].kernels_us
            say(f"{batch}: {found[str(batch)]['step_ms']:.2f} ms a step")
    return found


def table_of(model: str, found: Mapping[str, Any], num_layers: int) -> Table:
    """A column for each batch; of a layer, but for the first and the last lines."""
    table = Table("us", title=f"{model}: decoding, by sequences", title_justify="left")
    for batch in found:
        table.add_column(batch, justify="right")
    for name, words in (
        ("away_us", "a layer: rows away"),
        ("device_us", "  of it with the worker's device"),
        ("gateway_us", "a layer: the gateway"),
        ("between_us", "between two steps"),
    ):
        table.add_row(words, *(f"{one.get(name, 0.0):,.0f}" for one in found.values()))
    kernels: Counter[str] = Counter()
    for one in found.values():
        kernels.update(one.get("kernels_us") or {})
    for name, _ in kernels.most_common(14):
        each = (one["kernels_us"].get(name, 0.0) / num_layers for one in found.values())
        table.add_row(f"  {name[:48]}", *(f"{us:,.1f}" for us in each))
    table.add_row("computed together", *(f"{one['together']:.0%}" for one in found.values()))
    table.add_row("a step, ms", *(f"{one['step_ms']:.2f}" for one in found.values()))
    return table


def main(
    model: Annotated[str, typer.Option(help=", ".join(MODELS))] = "one",
    device: Annotated[str, typer.Option(help="cpu: small, to see that it runs.")] = "cuda",
    quick: Annotated[bool, typer.Option(help="Small, to see that it runs.")] = False,
    layers: Annotated[int, typer.Option(min=0, help="Fewer than the model has; 0: all.")] = 0,
    gateways: Annotated[int, typer.Option(min=0, help="0: one a GPU, on a CPU two.")] = 0,
    slices: Annotated[
        bool, typer.Option("--slices", help="Of every expert one a worker, not whole experts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Take the decoding of one model apart, and print a table."""
    work = Work(0, 1_000, 1_000, _STEPS + 18, (1, 32, 128), 10_000)
    if quick:
        work = Work(0, 50, 50, 30, (1, 4), 512)
    configure_logging("benchmark", "stages", "warning")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    settings, workers = model_of(model, device, layers)
    with mps.sharing(), torch.inference_mode():
        shards = workers if slices else 1
        found = measured(settings, workers, work, device, gateways or gpus or 2, shards)
    if as_json:
        print(json.dumps({model: found}))
    else:
        Console().print(table_of(model, found, settings["num_hidden_layers"]))


if __name__ == "__main__":
    typer.run(main)
