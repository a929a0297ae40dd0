"""``expert-mesh bench serve``: requests at gateways, and what became of them.

TTFT is the time to the first token, TPOT the mean time per token after it, ITL each time
between two tokens, E2EL the time to the end, all as the client sees them. Tokens that come in
one message share the time since the message before equally.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev, quantiles
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import engine_time
from cli.generate import DEFAULT_TARGET, ApiKey, TlsCa, TlsCert, TlsKey
from mesh.config import read_lines
from mesh.errors import ConfigError, MeshError, Unavailable

if TYPE_CHECKING:
    from rich.table import Table

    from expert_mesh import AsyncClient

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Task:
    """One request to make."""

    prompt: str | list[int]
    output_len: int


@dataclass
class Record:
    """One request that was made. Times are seconds since it was sent."""

    input_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float = 0.0
    last_s: float = 0.0
    e2el_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """None where there were fewer than two tokens."""
        return fmean(self.itl_s) if self.itl_s else None

    def add_tokens(self, count: int, now_s: float) -> None:
        """Note the tokens of one message that came at ``now_s``."""
        if self.output_tokens == 0:
            self.ttft_s = now_s
            self.itl_s += [0.0] * (count - 1)
        else:
            self.itl_s += [(now_s - self.last_s) / count] * count
        self.output_tokens += count
        self.last_s = now_s


@dataclass(frozen=True)
class Goal:
    """What a request must keep to count for goodput; None: anything."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, record: Record) -> bool:
        """Whether a completed request kept it."""
        return (self.ttft_s is None or record.ttft_s <= self.ttft_s) and (
            self.tpot_s is None or (record.tpot_s or 0.0) <= self.tpot_s
        )


def parse_length(text: str, flag: str) -> tuple[int, int]:
    """``64`` or ``64-256`` as the least and the most. ConfigError names the flag."""
    low, _, high = text.partition("-")
    try:
        bounds = int(low), int(high or low)
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r} must be a length (64) or a range (64-256)") from error
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"{flag} {text!r} must be 1 or more, the least before the most")
    return bounds


def parse_loads(text: str) -> list[int]:
    """``8`` or ``1,8,32``. Raises ConfigError."""
    try:
        loads = [int(load) for load in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--concurrency {text!r} must be a number or several: 1,8,32") from error
    if min(loads) < 1:
        raise ConfigError(f"--concurrency {text!r} must be 1 or more")
    return loads


def random_tasks(
    count: int,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
    vocab_size: int,
    rng: random.Random,
) -> list[Task]:
    """Requests with random token ids, their lengths even within the ranges."""
    return [
        Task(
            prompt=[rng.randrange(vocab_size) for _ in range(rng.randint(*input_len))],
            output_len=rng.randint(*output_len),
        )
        for _ in range(count)
    ]


async def run(
    clients: Sequence[AsyncClient],
    tasks: Sequence[Task],
    *,
    concurrency: int | None,
    rate: float | None = None,
    rng: random.Random | None = None,
    on_done: Callable[[Record], None] = lambda record: None,
) -> tuple[list[Record], float]:
    """Make the requests, each greedy and past every end of sequence; records and seconds taken.

    At most ``concurrency`` are in flight (None: any number), each by the client that has the
    fewest; with ``rate`` they start at random (Poisson), so many a second.
    """
    slots = asyncio.Semaphore(concurrency or len(tasks))
    in_flight = [0] * len(clients)
    began_s = time.perf_counter()

    async def one(task: Task) -> Record:
        async with slots:
            number = in_flight.index(min(in_flight))
            in_flight[number] += 1
            record = await _request(clients[number], task)
            in_flight[number] -= 1
        on_done(record)
        return record

    async with asyncio.TaskGroup() as group:
        running = []
        async for task in _arrivals(tasks, rate, rng or random.Random()):
            running.append(group.create_task(one(task)))
    return [task.result() for task in running], time.perf_counter() - began_s


async def _arrivals(
    tasks: Sequence[Task], rate: float | None, rng: random.Random
) -> AsyncIterator[Task]:
    due_s = time.perf_counter()
    for task in tasks:
        if rate is not None:
            due_s += rng.expovariate(rate)
            await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
        yield task


async def _request(client: AsyncClient, task: Task) -> Record:
    record = Record()
    sent_s = time.perf_counter()
    try:
        chunks = client.generate(
            task.prompt, max_tokens=task.output_len, temperature=0.0, ignore_eos=True
        )
        async for chunk in chunks:
            if chunk.token_ids:
                record.add_tokens(len(chunk.token_ids), time.perf_counter() - sent_s)
            if chunk.usage is not None:
                record.input_tokens = chunk.usage.prompt_tokens
    except MeshError as error:
        record.error = f"{error.code}: {error}"
    record.e2el_s = time.perf_counter() - sent_s
    return record


def summarize(records: Sequence[Record], duration_s: float, goal: Goal | None) -> dict[str, Any]:
    """The report: counts, rates per second, and each latency's spread in seconds."""
    completed = [record for record in records if not record.error]
    input_tokens = sum(record.input_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    report: dict[str, Any] = {
        "completed": len(completed),
        "failed": len(records) - len(completed),
        "duration_s": duration_s,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "request_throughput": len(completed) / duration_s,
        "output_token_throughput": output_tokens / duration_s,
        "total_token_throughput": (input_tokens + output_tokens) / duration_s,
        "ttft_s": spread([record.ttft_s for record in completed]),
        "tpot_s": spread([r.tpot_s for r in completed if r.tpot_s is not None]),
        "itl_s": spread([gap_s for record in completed for gap_s in record.itl_s]),
        "e2el_s": spread([record.e2el_s for record in completed]),
        "errors": dict(Counter(record.error for record in records if record.error)),
    }
    if goal is not None:
        report["goodput"] = sum(map(goal.met_by, completed)) / duration_s
    return report


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation and percentiles (interpolated); None of nothing."""
    if not values:
        return None
    # Needs two values before Python 3.13.
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99
    return {
        "mean": fmean(values),
        "std": pstdev(values),
        **{f"p{percent}": cuts[percent - 1] for percent in _PERCENTILES},
    }


def file_tasks(
    path: Path, count: int, output_len: tuple[int, int], rng: random.Random
) -> list[Task]:
    """Requests with the lines of a file as prompts, from the top again when they run out.

    Raises ConfigError for a file that holds none.
    """
    prompts = read_lines(path, "--prompt-file")
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: write one a line")
    return [Task(prompts[i % len(prompts)], rng.randint(*output_len)) for i in range(count)]


async def measure(
    clients: Sequence[AsyncClient],
    tasks: Sequence[Task],
    *,
    concurrency: int | None,
    rate: float | None = None,
    rng: random.Random | None = None,
    goal: Goal | None = None,
    metrics: Sequence[str] = (),
    on_done: Callable[[Record], None] = lambda record: None,
) -> dict[str, Any]:
    """:func:`run`, then :func:`summarize`; with the ``metrics`` of the gateways, the shares of
    their engines' time too."""
    before = await engine_time.read(metrics) if metrics else None
    records, duration_s = await run(
        clients, tasks, concurrency=concurrency, rate=rate, rng=rng, on_done=on_done
    )
    report = summarize(records, duration_s, goal)
    if before is not None:
        report |= (await engine_time.read(metrics)).shares_since(before)
    return report


def serve(
    target: Annotated[
        str, typer.Option(help="host:port of a gateway; several by commas.")
    ] = DEFAULT_TARGET,
    num_requests: Annotated[
        int, typer.Option(min=1, help="Requests to make, of each --concurrency.")
    ] = 100,
    concurrency: Annotated[
        str | None,
        typer.Option(
            help="Requests in flight; several by commas: a run of each.",
            show_default="8; any with rate",
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Requests that start a second (Poisson).")
    ] = None,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: 64 or 64-256.")] = "64",
    output_len: Annotated[str, typer.Option(help="Output tokens: 64 or 64-256.")] = "64",
    prompt_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Prompts, one a line, instead of random."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    goal_ttft_ms: Annotated[float | None, typer.Option(help="Goodput: most TTFT.")] = None,
    goal_tpot_ms: Annotated[float | None, typer.Option(help="Goodput: most TPOT.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="A gateway's HTTP /metrics: shows its engine's shares of time."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object, a line for each --concurrency.")
    ] = False,
    api_key: ApiKey = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_ca: TlsCa = None,
) -> None:
    """Measure throughput and latency of a gateway."""
    from expert_mesh import AsyncClient

    rng = random.Random(seed)
    lengths = parse_length(input_len, "--input-len"), parse_length(output_len, "--output-len")
    loads: list[int | None] = [None if rate is not None else 8]
    if concurrency is not None:
        loads = [*parse_loads(concurrency)]
    if len(loads) > 1 and num_requests < max(load or 0 for load in loads):
        raise ConfigError(f"--num-requests {num_requests} is less than --concurrency {concurrency}")
    goal = None
    if goal_ttft_ms is not None or goal_tpot_ms is not None:
        goal = Goal(*(ms / 1e3 if ms is not None else None for ms in (goal_ttft_ms, goal_tpot_ms)))
    options: Any = {"tls_cert": tls_cert, "tls_key": tls_key, "tls_ca": tls_ca}

    async def reports() -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(AsyncClient(one, api_key=api_key, **options))
                for one in target.split(",")
            ]
            model = await clients[0].model_info()
            for load in loads:
                if prompt_file is not None:
                    tasks = file_tasks(prompt_file, num_requests, lengths[1], rng)
                else:
                    if lengths[0][1] + lengths[1][1] > model.max_model_len:
                        raise ConfigError(
                            f"--input-len {input_len} and --output-len {output_len} do not fit "
                            f"the context of {model.max_model_len} tokens"
                        )
                    tasks = random_tasks(num_requests, *lengths, model.vocab_size, rng)
                with _progress(num_requests) as on_done:
                    report = await measure(
                        clients,
                        tasks,
                        concurrency=load,
                        rate=rate,
                        rng=rng,
                        goal=goal,
                        metrics=metrics or (),
                        on_done=on_done,
                    )
                yield {"concurrency": load, **report} if len(loads) > 1 else report

    async def show() -> list[dict[str, Any]]:
        found = []
        async for report in reports():
            found.append(report)
            if as_json:
                typer.echo(json.dumps(report))
        return found

    found = asyncio.run(show())
    if not as_json:
        _print(found)
    for report in found:
        if report["completed"] == 0:
            first = next(iter(report["errors"]))
            raise Unavailable(f"no request completed; the first error: {first}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr where that is a terminal; takes each record as it is done."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("requests", total=total)
        yield lambda record: progress.advance(bar)


def loads_table(reports: Sequence[dict[str, Any]]) -> Table:
    """A line for each load: latencies in ms, and of the engine's time what is known."""
    from rich.table import Table

    latencies = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL"}
    shares = {"host_share": "host", "expert_wait_share": "experts"}
    shown = {name: label for name, label in shares.items() if any(name in r for r in reports)}
    table = Table(title="bench serve, ms", title_justify="left")
    for column in (
        *("in flight", "completed", "failed", "tok/s"),
        *(f"{label} {p}" for label in latencies.values() for p in ("p50", "p99")),
        *shown.values(),
    ):
        table.add_column(column, justify="right")
    for report in reports:
        cells = [str(report[name]) for name in ("concurrency", "completed", "failed")]
        cells.append(f"{report['output_token_throughput']:.0f}")
        for name in latencies:
            times = report[name]
            cells += [f"{times[p] * 1e3:.2f}" if times else "" for p in ("p50", "p99")]
        cells += [_percent(report[name]) for name in shown]
        table.add_row(*cells)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _print(reports: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console

    if len(reports) == 1:
        _print_table(reports[0])
        return
    console = Console()
    if not console.is_terminal:
        console.width = 140  # columns that are cut tell nothing
    console.print(loads_table(reports))
    for error, times in sum((Counter(report["errors"]) for report in reports), Counter()).items():
        console.print(f"[red]{times} x {error}[/]", highlight=False)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = Table("", "value", title="bench serve", title_justify="left")
    counts.columns[1].justify = "right"
    for name, unit in (
        ("completed", ""),
        ("failed", ""),
        ("duration_s", " s"),
        ("input_tokens", ""),
        ("output_tokens", ""),
        ("request_throughput", " /s"),
        ("output_token_throughput", " tok/s"),
        ("total_token_throughput", " tok/s"),
        ("goodput", " /s"),
    ):
        if name in report:
            value = report[name]
            label = name.removesuffix("_s").replace("_", " ")
            counts.add_row(
                label, (f"{value:.2f}" if isinstance(value, float) else f"{value}") + unit
            )
    for name in ("host_share", "expert_wait_share"):
        if name in report:
            counts.add_row("engine's " + name.replace("_", " "), _percent(report[name]))
    latencies = Table("ms", title_justify="left")
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2el_s": "E2EL"}
    for column in ("mean", "std", "median", "p90", "p99"):
        latencies.add_column(column, justify="right")
    for name, label in names.items():
        if report[name] is not None:
            latencies.add_row(label, *(f"{value * 1e3:.2f}" for value in report[name].values()))
    console = Console()
    console.print(counts, latencies)
    for error, times in report["errors"].items():
        console.print(f"[red]{times} x {error}[/]", highlight=False)
