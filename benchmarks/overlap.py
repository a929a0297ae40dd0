"""Do transfers hide behind computing? When each batch was received, computed and sent.

    python -m benchmarks.overlap --rows 512,2048 --out DIRECTORY

One MoE layer over worker processes with two micro-batches that pass each other all the time.
Writes a Chrome trace (chrome://tracing, ui.perfetto.dev) and, where matplotlib is installed, a
picture of the workers' three stages; prints the share of transfer time during which the same
worker computed, and communication that was not hidden as a share of the whole time.

A receive lasts from the moment a message is found to its last byte, and while a GPU fetches rows
that came by reference; a send from the end of the batch to the end of the transfer. What a GPU
does is timed by its own events.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cli import mps
from cli.bench_layer import Step, layer_mesh
from cli.layer_shape import Shape
from mesh.device import open_device

Interval = tuple[float, float]
_LANES = ("receive", "compute", "send")
_COLORS = {"receive": "tab:blue", "compute": "tab:orange", "send": "tab:green"}


def lanes(served: list[dict[str, Any]]) -> dict[str, list[Interval]]:
    """The intervals of each stage of one worker, in seconds and in order."""
    receive = [
        interval
        for one in served
        for interval in ((one["found_s"], one["received_s"]), (*one["fetched_s"],))
    ]
    return {
        "receive": sorted(receive),
        "compute": [(*one["computed_s"],) for one in served],
        "send": [(*one["sent_s"],) for one in served],
    }


def merged(intervals: list[Interval]) -> list[Interval]:
    """Their union, disjoint and ascending."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def covered_s(intervals: list[Interval], by: list[Interval]) -> float:
    """How long ``intervals`` lie under ``by``; both disjoint and ascending."""
    total, first = 0.0, 0
    for start, end in intervals:
        while first < len(by) and by[first][1] <= start:
            first += 1
        n = first
        while n < len(by) and by[n][0] < end:
            total += min(end, by[n][1]) - max(start, by[n][0])
            n += 1
    return total


def shares(workers: list[dict[str, list[Interval]]]) -> dict[str, float]:
    """Over all workers: how much of the transfers is hidden, and what is not, of all time."""
    moving_s = hidden_s = whole_s = 0.0
    for stages in workers:
        transfers = merged(stages["receive"] + stages["send"])
        compute = merged(stages["compute"])
        moving_s += sum(end - start for start, end in transfers)
        hidden_s += covered_s(transfers, compute)
        everything = transfers + compute
        whole_s += max(end for _, end in everything) - min(start for start, _ in everything)
    return {"hidden": hidden_s / moving_s, "exposed_of_all": (moving_s - hidden_s) / whole_s}


def trace(workers: list[dict[str, list[Interval]]]) -> dict[str, Any]:
    """Chrome's trace format: a process for each worker, a thread for each stage."""
    events = [
        {
            "name": lane,
            "ph": "X",
            "pid": f"worker {number}",
            "tid": lane,
            "ts": start * 1e6,
            "dur": (end - start) * 1e6,
        }
        for number, stages in enumerate(workers)
        for lane in _LANES
        for start, end in stages[lane]
    ]
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def picture(workers: list[dict[str, list[Interval]]], title: str, path: Path) -> bool:
    """Draw the last of each stage; False where there is nothing to draw with."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 1 + 1.2 * len(workers)))
    start_s = min(stages["receive"][-12][0] for stages in workers)
    labels = []
    for number, stages in enumerate(workers):
        for lane in _LANES:
            shown = [(s, e) for s, e in stages[lane] if s >= start_s]
            bars = [((s - start_s) * 1e3, (e - s) * 1e3) for s, e in shown]
            axes.broken_barh(bars, (len(labels), 0.8), color=_COLORS[lane])
            labels.append(f"worker {number} {lane}")
    axes.set_yticks([n + 0.4 for n in range(len(labels))], labels)
    axes.set_xlabel("ms")
    axes.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def main(
    rows: Annotated[str, typer.Option(help="Rows of a micro-batch, several by commas.")] = "512",
    hidden: Annotated[int, typer.Option(help="Width of a row.")] = 4096,
    mlp_hidden: Annotated[int, typer.Option(help="Width inside an expert.")] = 16384,
    workers: Annotated[int, typer.Option(help="Workers, one expert each; 0: one a GPU.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    steps: Annotated[int, typer.Option(help="Steps of each size.")] = 60,
    out: Annotated[Path, typer.Option(help="Where the traces and pictures go.")] = Path("."),
) -> None:
    """Trace, draw and print shares."""
    out.mkdir(parents=True, exist_ok=True)
    with mps.sharing(), torch.inference_mode():
        where = open_device(device)
        gpus = torch.cuda.device_count() if where.type == "cuda" else 0
        if gpus:
            torch.cuda.set_device(where)
        dtype_name, dtype = "bfloat16", torch.bfloat16
        count = workers or max(1, gpus)
        shape = Shape(hidden, mlp_hidden, "gated", count, 1, count, device, dtype_name)
        name = torch.cuda.get_device_name(where) if gpus else "CPU"
        sizes = [int(size) for size in rows.split(",")]
        with layer_mesh(shape, where, dtype, 2 * max(sizes)) as mesh:
            for size in sizes:
                batches = [
                    (
                        torch.randn(size, hidden, device=where, dtype=dtype),
                        torch.randint(count, (size, 1), device=where),
                        torch.ones(size, 1, device=where),
                    )
                    for _ in range(2)
                ]
                step = Step(mesh.dispatcher, batches)
                for _ in range(10):
                    step.run_on()
                mesh.workers.served()
                for _ in range(steps):
                    step.run_on()
                stages = [lanes(served) for served in mesh.workers.served()]
                step.land()
                found = shares(stages)
                stem = out / f"overlap-{size}"
                stem.with_suffix(".json").write_text(json.dumps(trace(stages)))
                title = f"{name}, {count} workers, 2 x {size} rows, {hidden} x {mlp_hidden}"
                drawn = picture(stages, title, stem.with_suffix(".png"))
                print(
                    f"{title}: {found['hidden']:.1%} of transfer time hidden, "
                    f"{found['exposed_of_all']:.1%} of all time is transfer that is not",
                    "" if drawn else "(no picture: matplotlib is not installed)",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)
