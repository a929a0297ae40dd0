"""What a client sees when something fails, for each row of the failure table.

    python -m benchmarks.failover --plot docs/failover.png

Each row has a mesh of its own: the demo checkpoint, real processes, ``--concurrency`` greedy
streams at all times. A quiet mesh is asked first; every answer, also of the streams that a failure
went through, must equal the quiet one token for token. The same thing happens ``--events`` times:

* *pause*: the longest gap between two messages of tokens, over all streams, from the event to the
  end of the window after it is over;
* *failed*: requests that ended with an error, of all;
* *throughput*: tokens a second in the window before the event, until it is over (what was ended
  is back, and every expert is served), in the window after that, and in the one that begins a
  second later, when the start of a process is over (*steady*): the medians over the events; the
  ratios are those two by the first, over all events together.

``--row NAME`` (repeatable) runs some of the rows; ``--json FILE`` adds their results to a file, and
``--plot`` draws every result that is in it.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from expert_worker.expert_mlp import load_expert
from mesh.checkpoint import Checkpoint
from mesh.errors import Unavailable
from mesh.model_config import ModelConfig
from tests.chaos.events import (
    DrainWorker,
    Event,
    HangWorker,
    KillGateway,
    KillPlacement,
    KillWorker,
    LeaveWorker,
    PauseWorker,
    Shape,
    SlowWorker,
)
from tests.chaos.fleet import Fleet, running_fleet
from tests.chaos.load import Asked, Load, learn
from tests.running import DEMO_MODEL

WINDOW_S = 3.0
STEADY_AFTER_S = 1.0
BIN_S = 0.25
SETTLE_S = 2.0
EXPERTS_PER_WORKER = 4
_NUM_QUESTIONS = 24
_ANSWER_TOKENS = (48, 96)
# Keeps spares spare.
_NO_REPLICAS = ("--max-replicas", "1")
_Choose = Callable[[Fleet, random.Random], Any]


class _OfTheMesh(Event):
    """Something that happens to nobody in particular."""

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, "mesh", 0.0)


class Nothing(_OfTheMesh):
    """The control: how far throughput goes up and down by itself."""

    kind = "nothing"

    async def act(self, fleet: Fleet) -> None:
        """Nothing."""


class LeaveClient(_OfTheMesh):
    """One of the clients goes away in the middle of its answer."""

    kind = "leave client"

    async def act(self, fleet: Fleet) -> None:
        """The load does it: see :func:`measure`."""


class RollWorkers(_OfTheMesh):
    """Every worker is told to end and started again, one after the other."""

    kind = "roll workers"

    async def act(self, fleet: Fleet) -> None:
        for worker in fleet.shape.worker_names:
            await LeaveWorker(0.0, worker, 0.0).act(fleet)


async def _holder(fleet: Fleet, rng: random.Random) -> str | None:
    """A worker that is the only home of some expert."""
    status = await fleet.status()
    alone = {e.worker_ids[0] for e in status.plan.experts if len(e.worker_ids) == 1}
    return rng.choice(sorted(alone)) if alone else None


async def _replicated(fleet: Fleet, rng: random.Random) -> str | None:
    """A worker each of whose experts has another home."""
    status = await fleet.status()
    holders = {w for e in status.plan.experts for w in e.worker_ids}
    alone = {e.worker_ids[0] for e in status.plan.experts if len(e.worker_ids) == 1}
    return rng.choice(sorted(holders - alone)) if holders - alone else None


async def _gateway(fleet: Fleet, rng: random.Random) -> str:
    return rng.choice(fleet.shape.gateway_names)


async def _placement(fleet: Fleet, rng: random.Random) -> str:
    return "placement"


@dataclass(frozen=True)
class Row:
    """One row of the table: what happens, to whom, in how large a mesh."""

    name: str
    kind: type[Event]
    choose: _Choose
    for_s: float = 2 * WINDOW_S
    workers: int = 5
    experts_per_worker: int = EXPERTS_PER_WORKER
    gateways: int = 1
    may_fail: str = ""
    """What the contract lets end with UNAVAILABLE, in words; empty: nothing."""


_NEEDED = 16 // EXPERTS_PER_WORKER
# Replicas never crowd: they take workers that have nothing else of a layer.
_DOUBLE: dict[str, Any] = {"workers": 32, "experts_per_worker": 1}
ROWS = (
    Row("nothing", Nothing, _placement, for_s=0.0),
    Row("worker, replica", KillWorker, _replicated, **_DOUBLE),
    Row("worker, spare", KillWorker, _holder),
    Row(
        "worker, neither",
        KillWorker,
        _holder,
        for_s=WINDOW_S / 2,
        workers=_NEEDED,
        may_fail="who needs its experts",
    ),
    Row("hung worker, replica", HangWorker, _replicated, for_s=10.0, **_DOUBLE),
    Row("hung worker, spare", HangWorker, _holder, for_s=10.0),
    Row("paused worker", PauseWorker, _holder, for_s=0.5),
    Row("slow worker", SlowWorker, _holder, for_s=WINDOW_S),
    Row("placement", KillPlacement, _placement, for_s=WINDOW_S / 2),
    Row("gateway", KillGateway, _gateway, gateways=2, may_fail="its own streams"),
    Row("client", LeaveClient, _placement, for_s=0.0),
    Row("move: drain", DrainWorker, _holder),
    Row("leave: SIGTERM", LeaveWorker, _holder),
    Row("roll: all workers", RollWorkers, _placement, for_s=0.0),
)


@dataclass
class Result:
    """What a row came to; JSON as it is."""

    name: str
    may_fail: str
    requests: int = 0
    failed: int = 0
    pauses_s: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    """Tokens a second, one for each event; as are the others."""
    during: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    steady: list[float] = field(default_factory=list)
    timeline: list[float] = field(default_factory=list)
    """Tokens a second in each BIN_S from WINDOW_S before the event on; the median over events."""
    skipped: str = ""

    @property
    def ratio(self) -> float:
        """Throughput after by before, over all events."""
        return sum(self.after) / sum(self.before)

    @property
    def steady_ratio(self) -> float:
        """Steady throughput by that before."""
        return sum(self.steady) / sum(self.before)


async def measure(row: Row, events: int, concurrency: int, seed: int) -> Result:
    """One row. Raises ValueError for an answer that is wrong or a failure that may not be."""
    result = Result(row.name, row.may_fail)
    shape = Shape(row.workers, row.gateways, row.experts_per_worker)
    rng = random.Random(seed)
    unexpected: list[str] = []
    flags = {"placement": () if row.choose is _replicated else _NO_REPLICAS}
    async with running_fleet(shape, on_unexpected_end=unexpected.append, flags=flags) as fleet:
        questions = await learn(
            next(iter(fleet.serving.values())), rng, _NUM_QUESTIONS, _ANSWER_TOKENS
        )
        load = Load(questions, fleet.serving, rng, rate=0.0)
        asking = asyncio.create_task(load.keep(concurrency))
        at: list[float] = []
        over: list[float] = []
        for _ in range(events):
            await asyncio.sleep(SETTLE_S + WINDOW_S)
            victim = await row.choose(fleet, rng)
            if victim is None:
                result.skipped = f"no worker to choose: {row.choose.__name__.strip('_')}"
                break
            at.append(time.monotonic())
            if row.kind is LeaveClient:
                load.leave()
            await row.kind(0.0, victim, row.for_s).act(fleet)
            await fleet.expect_complete()
            over.append(max(time.monotonic(), at[-1] + WINDOW_S))
            until_s = over[-1] + STEADY_AFTER_S + WINDOW_S
            await asyncio.sleep(max(until_s - time.monotonic(), 0.0))
        asking.cancel()
        await load.finish()
        _check(row, load.asked, fleet, unexpected)
        _fill(result, load.asked, at, over)
        await fleet.close()
    shutil.rmtree(fleet.log_dir)
    return result


def _check(row: Row, asked: Sequence[Asked], fleet: Fleet, unexpected: Sequence[str]) -> None:
    """Correctness comes before any figure."""
    for one in asked:
        if wrong := one.wrong():
            raise ValueError(f"{row.name}: {wrong}")
        if one.error and not (row.may_fail and isinstance(one.error, Unavailable)):
            raise ValueError(f"{row.name}: {one.error.code}: {one.error}")
        own = fleet.killed_between(one.gateway, one.sent_s, one.ended_s)
        if one.error and row.kind is KillGateway and not own:
            raise ValueError(f"{row.name}: a stream of another gateway: {one.error}")
    if unexpected:
        raise ValueError(f"{row.name}: {unexpected}")


def _fill(
    result: Result, asked: Sequence[Asked], at: Sequence[float], over: Sequence[float]
) -> None:
    result.requests = len(asked)
    result.failed = sum(one.error is not None for one in asked)
    arrivals = sorted(arrival for one in asked for arrival in one.arrivals)

    def rate(since_s: float, until_s: float) -> float:
        tokens = sum(count for at_s, count in arrivals if since_s <= at_s < until_s)
        return tokens / (until_s - since_s)

    for event_s, over_s in zip(at, over, strict=True):
        result.pauses_s.append(pause_s(asked, event_s, over_s + WINDOW_S))
        result.before.append(rate(event_s - WINDOW_S, event_s))
        result.during.append(rate(event_s, over_s))
        result.after.append(rate(over_s, over_s + WINDOW_S))
        steady_s = over_s + STEADY_AFTER_S
        result.steady.append(rate(steady_s, steady_s + WINDOW_S))
    num_bins = int(4 * WINDOW_S / BIN_S)
    offsets = [i * BIN_S - WINDOW_S for i in range(num_bins)]
    result.timeline = [
        median(rate(event_s + offset, event_s + offset + BIN_S) for event_s in at)
        for offset in (offsets if at else [])
    ]


def pause_s(asked: Sequence[Asked], since_s: float, until_s: float) -> float:
    """The longest gap between tokens of one stream that overlaps the time span."""
    gaps = (
        (before, after)
        for one in asked
        if not (one.error or one.leaves_after)
        for before, after in pairwise([one.sent_s, *(at_s for at_s, _ in one.arrivals)])
    )
    return max(
        (after - before for before, after in gaps if after >= since_s and before < until_s),
        default=0.0,
    )


def expert_load_s() -> float:
    """Reading all that one worker holds, from a checkpoint in the page cache."""
    model = ModelConfig.from_hf(DEMO_MODEL)
    began_s = time.perf_counter()
    with Checkpoint(DEMO_MODEL) as checkpoint:
        for layer in model.moe_layers:
            for index in range(EXPERTS_PER_WORKER):
                load_expert(checkpoint, model, layer, index, "cpu", torch.float32)
    return time.perf_counter() - began_s


def print_table(results: Sequence[Result]) -> None:
    """For a person."""
    table = Table(title="failover", title_justify="left")
    for name in ("what fails", "pause p50", "pause max", "failed", "of"):
        table.add_column(name, justify="left" if name == "what fails" else "right")
    for name in ("before", "during", "after", "after / before", "steady / before", "may fail"):
        table.add_column(name, justify="right")
    for result in results:
        if not result.pauses_s:
            table.add_row(result.name, *["-"] * 9, result.skipped)
            continue
        table.add_row(
            result.name,
            f"{median(result.pauses_s):.2f} s",
            f"{max(result.pauses_s):.2f} s",
            f"{result.failed}",
            f"{result.requests}",
            *(f"{median(r):.0f} tok/s" for r in (result.before, result.during, result.after)),
            f"{result.ratio:.1%}",
            f"{result.steady_ratio:.1%}" if result.steady else "-",
            result.may_fail or "nothing",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    console.print(f"loading what one worker holds takes {expert_load_s():.3f} s", highlight=False)


def plot(results: Sequence[Result], path: Path) -> None:
    """Throughput around the event, a small plot for each row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    drawn = [result for result in results if result.timeline]
    columns = 3
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(10, 2.1 * rows), sharex=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for result, axis in zip(drawn, axes.flat, strict=False):
        offsets = [(i + 0.5) * BIN_S - WINDOW_S for i in range(len(result.timeline))]
        axis.axhline(median(result.before), color="0.8", linewidth=1)
        axis.plot(offsets, result.timeline, linewidth=1.2)
        axis.axvline(0.0, color="tab:red", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_title(result.name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("seconds after the event", fontsize=9)
    figure.supylabel("tokens a second (median over the events)", fontsize=9)
    figure.savefig(path, dpi=100)


def failover(
    row: Annotated[list[str] | None, typer.Option(help="Rows to run; all if absent.")] = None,
    events: Annotated[int, typer.Option(min=1, help="How often each thing happens.")] = 10,
    concurrency: Annotated[int, typer.Option(min=1, help="Streams at all times.")] = 6,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Add the results here.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the results here.")] = None,
) -> None:
    """Measure what a client sees of each failure."""
    names = [r.name for r in ROWS]
    if unknown := set(row or ()) - set(names):
        raise typer.BadParameter(f"no such row: {', '.join(sorted(unknown))}; there are {names}")
    results: dict[str, Result] = {}
    if json_file and json_file.exists():
        results = {r["name"]: Result(**r) for r in json.loads(json_file.read_text())}
    for one in ROWS:
        if row is None or one.name in row:
            results[one.name] = asyncio.run(measure(one, events, concurrency, seed))
            if json_file:
                json_file.write_text(json.dumps([vars(r) for r in results.values()]))
    ordered = [results[name] for name in names if name in results]
    print_table(ordered)
    if plot_file:
        plot(ordered, plot_file)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(failover)
    app()
