"""``expert-mesh bench layer``: one MoE layer there and back, beside what no mesh can beat.

In one run and behind a check against float32: the *floor*, which is the busiest worker's expert
alone on the GPU that it has; ours with one micro-batch; ours with two, whose rows pass each other
under way; and the reference, the same layer by collectives over as many ranks. Each token goes to
``--top-k`` experts, drawn evenly.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median, quantiles
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cli import mps
from cli.bench_mesh import BenchMesh, bench_mesh
from cli.layer_shape import Shape
from mesh import wire
from mesh.errors import ConfigError
from mesh.plan import ExpertId

if TYPE_CHECKING:
    import torch

    from gateway.dispatch import Dispatcher, Placed

_MAX_ERROR = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Line:
    """One number of rows. Times in microseconds."""

    rows: int
    busiest: int
    """Rows of the busiest worker."""
    error: float
    """Against float32, by the norm: the worst of before and after."""
    floor: float
    ours: float
    ours_p99: float
    chained: float
    """One step behind the other and no wait of the host between them, as an engine's layers are:
    of each, the mean. The others are steps from the host's start to its end."""
    two: float
    """A step with two micro-batches of half the rows each, one after the other all the time."""
    two_p99: float
    peers: int
    """Workers that have rows."""
    post: float
    """Of a step's time, what posting to all of them took: their receives and sends."""
    reference: float = 0.0
    """The same layer by ``all_to_all_single``, see :mod:`cli.layer_reference`."""
    reference_p99: float = 0.0
    reference_chained: float = 0.0
    reference_error: float = 0.0
    reference_ranks: int = 0

    @property
    def over(self) -> float:
        """What the mesh adds to the floor, in a chain of steps."""
        return self.chained - self.floor


def layer(
    hidden: Annotated[int, typer.Option(help="Width of a row.")] = 4096,
    mlp_hidden: Annotated[int, typer.Option(help="Width inside an expert.")] = 16384,
    kind: Annotated[str, typer.Option(help="gated or plain.")] = "gated",
    workers: Annotated[int, typer.Option(help="Workers; on GPUs they take them in turn.")] = 0,
    experts: Annotated[int, typer.Option(help="Experts of the layer; 0: one a worker.")] = 0,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 1,
    rows: Annotated[str, typer.Option(help="Tokens of a step, several by commas.")] = (
        "1,8,32,128,512,2048,8192"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    repeat: Annotated[int, typer.Option(help="Steps of each size.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure one MoE layer over worker processes."""
    if kind not in ("gated", "plain") or dtype not in _MAX_ERROR:
        raise ConfigError("--kind is gated or plain, --dtype bfloat16, float16 or float32")
    with ExitStack() as stack:
        import torch

        gpus = torch.cuda.device_count() if device == "cuda" else 0
        if device == "cuda" and not gpus:
            raise ConfigError("device cuda: no GPU here; `expert-mesh doctor` says what there is")
        num_workers = workers or max(1, gpus)
        shape = Shape(
            hidden,
            mlp_hidden,
            kind,
            experts or num_workers,
            top_k,
            num_workers,
            device,
            dtype,
        )
        if gpus:
            shared = stack.enter_context(mps.sharing())
            if not shared:
                print(f"warning: {mps.OFF}", file=sys.stderr)
        sizes = [int(size) for size in rows.split(",")]
        found = run(shape, sizes, repeat)
    if as_json:
        typer.echo(json.dumps({**asdict(shape), "lines": [asdict(line) for line in found]}))
        return
    columns = "rows,busiest,floor us,ours us,p99,chained us,over,x floor,two us,p99"
    columns += ",peers,post us,reference us,p99,chained us,ours / ref,chained / ref,error"
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in columns.split(","):
        table.add_column(column, justify="right")
    for line in found:
        table.add_row(
            *(str(n) for n in (line.rows, line.busiest)),
            *(f"{t:.0f}" for t in (line.floor, line.ours, line.ours_p99, line.chained, line.over)),
            f"{line.chained / line.floor:.2f}",
            *(f"{t:.0f}" for t in (line.two, line.two_p99)),
            str(line.peers),
            f"{line.post:.1f}",
            *(f"{t:.0f}" for t in (line.reference, line.reference_p99, line.reference_chained)),
            f"{line.ours / line.reference:.2f}",
            f"{line.chained / line.reference_chained:.2f}",
            f"{line.error:.1e}",
        )
    console = Console()
    console.width = max(console.width, 165)  # columns that are cut tell nothing
    console.print(table)


def run(shape: Shape, sizes: Sequence[int], repeat: int) -> list[Line]:
    """Measure every size over one set of workers."""
    import torch

    from mesh.device import open_device

    device = open_device(shape.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    with torch.inference_mode(), layer_mesh(shape, device, dtype, max(sizes)) as mesh:
        lines = [_measure(shape, mesh.dispatcher, device, dtype, size, repeat) for size in sizes]
    return _beside_reference(shape, lines, repeat)


def _beside_reference(shape: Shape, lines: Sequence[Line], repeat: int) -> list[Line]:
    """The same sizes over a rank a worker, or a rank a GPU where there are fewer: NCCL takes no
    two ranks on one."""
    import torch

    from cli.layer_reference import measure
    from cli.ranks import run_ranks

    ranks = shape.workers
    if shape.device != "cpu":
        ranks = min(ranks, torch.cuda.device_count())
    if shape.num_experts % ranks:
        ranks = 1
    sizes = [line.rows for line in lines]
    order = {"shape": asdict(shape), "sizes": sizes, "repeat": repeat}
    found = []
    for line, answer in zip(lines, run_ranks(measure, ranks, shape.device, order), strict=True):
        error, times = answer["error"], answer["times"]
        if not error < _MAX_ERROR[shape.dtype]:
            raise SystemExit(f"the reference is wrong at {line.rows} rows: error {error:.1e}")
        theirs = {
            "reference": median(times),
            "reference_p99": _p99(times),
            "reference_chained": answer["chained"],
        }
        found.append(replace(line, reference_ranks=ranks, reference_error=error, **theirs))
    return found


@contextmanager
def layer_mesh(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    reply_timeout_s: float = 20.0,
) -> Iterator[BenchMesh]:
    """Workers with the experts of one layer, and a dispatcher that is connected to them."""
    from types import SimpleNamespace

    import torch

    from cli.layer_worker import LAYER

    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    held = [range(number, shape.num_experts, shape.workers) for number in range(shape.workers)]
    orders = [
        {
            "worker_id": f"worker-{number}",
            "device": f"cuda:{(number + 1) % gpus}" if gpus else "cpu",
            "dtype": shape.dtype,
            "threads": 1,
            "hidden": shape.hidden,
            "mlp_hidden": shape.mlp_hidden,
            "kind": shape.kind,
            "experts": list(mine),
            "num_experts": shape.num_experts,
        }
        for number, mine in enumerate(held)
    ]
    sizes = SimpleNamespace(
        num_experts=shape.num_experts,
        hidden_size=shape.hidden,
        experts_per_token=shape.top_k,
        experts_grouped=lambda itemsize: itemsize == 2,
    )
    with bench_mesh(
        "cli.layer_worker",
        orders,
        [[ExpertId(LAYER, index) for index in mine] for mine in held],
        sizes,
        device=device,
        dtype=dtype,
        max_tokens=max_tokens,
        max_rows=min(wire.MAX_ROWS, max_tokens),
        reply_timeout_s=reply_timeout_s,
    ) as mesh:
        yield mesh


def _measure(
    shape: Shape,
    dispatcher: Dispatcher,
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    repeat: int,
) -> Line:
    import torch

    from cli import layer_times
    from cli.layer_rows import error_of, exact_layer, rows_of
    from cli.layer_worker import random_expert

    x_TD, ids_TK, weights_TK = rows_of(shape, size, device)
    counts = torch.bincount(ids_TK.flatten(), minlength=shape.num_experts).tolist()
    by_worker = [sum(counts[n :: shape.workers]) for n in range(shape.workers)]

    step = Step(dispatcher, [(x_TD, ids_TK, weights_TK)])
    busiest = by_worker.index(max(by_worker))
    expert = random_expert(busiest, shape.hidden, shape.mlp_hidden, shape.kind, device, dtype)
    floor = _alone(expert, max(by_worker), shape, device, dtype)
    del expert
    exact_TD = exact_layer(shape, x_TD, ids_TK, weights_TK)

    def checked(step: Step) -> float:
        """What comes often goes another way than what is new: both are looked at."""
        error: float = error_of(torch.cat(step.run()), exact_TD)
        if not error < _MAX_ERROR[shape.dtype]:
            raise SystemExit(f"wrong at {size} rows: relative error {error:.1e} against float32")
        return error

    errors = [checked(step)]
    posts = []

    def noted() -> None:
        before_s = dispatcher.posted_s
        step.run()
        posts.append((dispatcher.posted_s - before_s) * 1e6)

    ours = layer_times.each(noted, device, repeat)
    errors.append(checked(step))
    chain = Step(dispatcher, [(x_TD, ids_TK, weights_TK)])
    chained = layer_times.chained(chain.run_on, device, repeat)
    chain.land()
    halves = [slice(0, size // 2), slice(size // 2, size)] if size > 1 else [slice(0, 1)]
    two = Step(dispatcher, [(x_TD[h], ids_TK[h], weights_TK[h]) for h in halves])
    passing = layer_times.each(two.run_on, device, repeat, wait=False)
    two.land()
    if size > 1:
        errors.append(checked(two))
    return Line(
        rows=size,
        busiest=max(by_worker),
        error=max(errors),
        floor=floor,
        ours=median(ours),
        ours_p99=_p99(ours),
        chained=chained,
        two=median(passing),
        two_p99=_p99(passing),
        peers=sum(rows > 0 for rows in by_worker),
        post=median(posts[-repeat:]),
    )


class _Graphs(NamedTuple):
    """What is captured of one micro-batch."""

    leave: Any
    back: Any
    turn: Any
    """The sum of what is back, then the same rows leave: between two layers of an engine, one."""
    placed: Placed
    y_TD: torch.Tensor


class Step:
    """One layer, over and over, with the rows of each micro-batch fixed.

    What the device does for itself runs from graphs: also of more rows than the engine has graphs
    for, where it launches while the device is busy, for which a layer alone gives no time.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    ) -> None:
        self._dispatcher = dispatcher
        self._micro_batches = micro_batches
        self._away: list[Any] = []
        self._graphs = [self._captured(n) for n in range(len(micro_batches))]

    def _captured(self, micro_batch: int) -> _Graphs | None:
        """None where what lays the rows out, and the sum, are launched one by one."""
        import torch

        x_TD, ids_TK, weights_TK = self._micro_batches[micro_batch]
        if not x_TD.is_cuda:
            return None
        from expert_worker.gpu_compute import capture
        from gateway.asking import MAX_ROWS

        if ids_TK.numel() > MAX_ROWS:
            return None

        dispatcher = self._dispatcher
        made: dict[str, Any] = {}

        def place() -> None:
            made["placed"] = dispatcher.place(0, micro_batch, x_TD, ids_TK, weights_TK)

        def combine() -> None:
            placed = made["placed"]
            made["y"] = dispatcher.layout.combine(
                dispatcher.arenas[1], placed.rows_TK, placed.weights_TK
            )

        stream = torch.cuda.Stream(x_TD.device)
        torch.cuda.synchronize(x_TD.device)
        with torch.cuda.stream(stream):
            for run in (place, combine):
                run()
            stream.synchronize()
            leave = capture(place)
            back = capture(combine)
            placed, y_TD = made["placed"], made["y"]

            def turn() -> None:
                combine()
                place()

            return _Graphs(leave, back, capture(turn), placed, y_TD)

    def _leave(self, micro_batch: int) -> Any:
        graphs = self._graphs[micro_batch]
        if graphs is None:
            return self._dispatcher.dispatch(0, *self._micro_batches[micro_batch])
        self._dispatcher.leave(graphs.placed, graphs.leave)
        return graphs.placed

    def _return(self, micro_batch: int, away: Any) -> torch.Tensor:
        graphs = self._graphs[micro_batch]
        if graphs is None:
            y_TD: torch.Tensor = away.combine()
            return y_TD
        self._dispatcher.turn(away, None, graphs.back)
        return graphs.y_TD

    def run(self) -> list[torch.Tensor]:
        """All away, all back."""
        self._dispatcher.begin_step(len(self._micro_batches))
        away = [self._leave(n) for n in range(len(self._micro_batches))]
        return [self._return(n, one) for n, one in enumerate(away)]

    def run_on(self) -> None:
        """Each micro-batch comes back and leaves again, while the others are under way."""
        if not self._away:
            self._dispatcher.begin_step(len(self._micro_batches))
            self._away = [self._leave(n) for n in range(len(self._micro_batches))]
        alone = len(self._graphs) == 1
        for n, graphs in enumerate(self._graphs):
            if graphs is None or not alone:  # beside another's experts one long graph waits longer
                self._return(n, self._away[n])
                self._away[n] = self._leave(n)
            else:
                self._dispatcher.turn(self._away[n], graphs.placed, graphs.turn)

    def land(self) -> None:
        """Bring back what is away."""
        for n, one in enumerate(self._away):
            self._return(n, one)
        self._away = []


def _alone(expert: Any, rows: int, shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Microseconds of the expert on so many rows with nothing around it."""
    import torch

    x_RD = torch.randn(rows, shape.hidden, device=device, dtype=dtype)
    if device.type != "cuda":
        from cli import layer_times

        return median(layer_times.each(lambda: expert(x_RD), device, 20))
    from expert_worker.gpu_compute import capture

    with torch.cuda.stream(torch.cuda.Stream(device)):
        for _ in range(3):
            expert(x_RD)
        graph = capture(lambda: expert(x_RD))
        times: list[float] = []
        for _ in range(30):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) * 1e3)
    return median(times[5:])


def _p99(times: Sequence[float]) -> float:
    return quantiles(times, n=100)[98] if len(times) > 1 else times[0]
