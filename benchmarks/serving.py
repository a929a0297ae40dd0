"""Serving under load: a whole mesh, as ``expert-mesh up`` starts it, asked by its public API.

    python -m benchmarks.serving --model demo --model one

``demo`` is the demo checkpoint; else a model of the papers (:data:`benchmarks.models.MODELS`) with
random weights, which are written to a temporary directory first. Each load is warmed up, then run:
its requests in flight at all times, prompts of random token ids, greedy. A line for each:
throughput, times as a client sees them, the shares of the engines' step time in which they had
given nothing to anybody (host) or waited for workers, how busy the busiest client was (near 100 %
it is the client that is measured), and throughput over the best so far: below 1 is a cliff.

First one request is asked twice, alone, of every gateway, which must be the same tokens; then among
the load that warms up, where they may differ in bfloat16: a batch of another size rounds elsewhere.

With ``--device cpu`` the papers' models are narrow and shallow, and in float32.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from benchmarks.clients import Asked, Clients, clients_of
from benchmarks.models import MODELS, model_of
from benchmarks.random_model import save_random
from benchmarks.report import agreeing, panels
from benchmarks.work import prompt
from cli import engine_time
from cli.bench import loads_table, parse_loads
from cli.child import command_of
from expert_mesh import Client
from mesh.config import GatewayConfig
from mesh.device import open_device

DEMO = "demo"
_DEMO_MODEL = Path(__file__).parents[1] / "models" / "demo"
_MAX_REQUESTS = 512
_WARM_UP_INPUT = (8, 8)
"""All of a load is to decode together before the first has ended, whatever its prompts take."""
_END_S = 30.0
_ANSWER_S = 30.0
_PROMPT_SEED = 7


@dataclass(frozen=True)
class Plan:
    """What is asked of a model."""

    loads: Sequence[int]
    input_len: int
    output_len: int

    def asked(self, load: int) -> Asked:
        """The run of one load: twice as many requests as are in flight."""
        requests = min(max(2 * load, 8), max(load, _MAX_REQUESTS))
        lengths = (self.input_len, self.input_len), (self.output_len, self.output_len)
        return Asked(requests, load, *lengths, seed=load)

    def warm_ups(self, load: int) -> tuple[Asked, Asked]:
        """So many that decode, ever fewer of them; then some prompts as long as they will be."""
        decoding = (min(8, self.output_len), self.output_len)
        prompts = (self.input_len, self.input_len)
        return (
            Asked(load, load, _WARM_UP_INPUT, decoding, seed=-load),
            Asked(min(load, 16), min(load, 16), prompts, (2, 2), seed=-load),
        )


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A mesh for the length of a block; what it says when it is ready. No process of it is left."""
    command = command_of("cli.main", "up", "--json", *flags)
    up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    root = psutil.Process(up.pid)
    family = {root}
    try:
        assert up.stdout is not None
        for line in up.stdout:
            said = json.loads(line)
            if said["event"] == "ready":
                break
        else:
            raise SystemExit(f"the mesh did not start: up ended with {up.wait()}")
        family |= {*root.children(recursive=True)}
        yield said
    finally:
        if up.poll() is None:
            family |= {*root.children(recursive=True)}
            up.terminate()
        _end(up, family)


def _end(up: subprocess.Popen[str], family: set[psutil.Process]) -> None:
    """What has been asked to: what has not after a while, or a second Ctrl-C, is killed."""
    signal.setitimer(signal.ITIMER_REAL, 0.0)  # no more than now can it be too late
    alive = [*family]
    try:
        _, alive = psutil.wait_procs(family, timeout=_END_S)
    finally:
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    up.wait()
    assert up.stdout is not None
    up.stdout.close()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block once it has lasted so long. SIGTERM ends it too."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    def told_to_end(number: int, frame: object) -> None:
        raise SystemExit("told to end")

    before = signal.signal(signal.SIGALRM, late), signal.signal(signal.SIGTERM, told_to_end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _write(settings: Mapping[str, Any], directory: Path, where: str) -> None:
    device = open_device(where)
    with torch.inference_mode():
        save_random(dict(settings), directory, device)


def write_model(settings: Mapping[str, Any], directory: Path, where: str) -> None:
    """In a process of its own: whoever has used a GPU before its service runs is none of that."""
    writer = multiprocessing.get_context("spawn").Process(
        target=_write, args=(settings, directory, where)
    )
    writer.start()
    try:
        writer.join()
    finally:
        writer.kill()
        writer.join()
    if writer.exitcode:
        raise SystemExit("the model could not be written; why is above")


def sweep(name: str, ready: Mapping[str, Any], plan: Plan, num_clients: int) -> dict[str, Any]:
    """Every load on a mesh that is ready; prints a line for each."""
    targets = ready["gateways"]
    metrics = ready["http"][1 : 1 + len(targets)]
    found: dict[str, Any] = {"gateways": len(targets), "workers": len(ready["workers"])}
    with ExitStack() as stack:
        asking = [stack.enter_context(Client(target)) for target in targets]
        pool = stack.enter_context(ThreadPoolExecutor(len(targets)))
        clients = stack.enter_context(clients_of(targets, num_clients))
        tokens = prompt(plan.input_len, asking[0].model_info().vocab_size, _PROMPT_SEED)

        def answer(client: Client) -> list[int]:
            said = client.complete(
                tokens,
                timeout_s=_ANSWER_S,
                max_tokens=plan.output_len,
                temperature=0.0,
                ignore_eos=True,
            )
            return list(said.token_ids)

        alone, again = ([answer(client) for client in asking] for _ in range(2))
        found["alone_again"] = agreeing(alone, again)
        found["same_alone"] = alone == again
        print(f"{name:10} alone, asked again: {found['alone_again']} tokens are equal", flush=True)
        lines = found["lines"] = []
        for load in plan.loads:
            first, second = plan.warm_ups(load)
            clients.start(first)
            among = list(pool.map(answer, asking))
            clients.finish()
            clients.ask(second)
            line = _measured(clients, plan.asked(load), metrics)
            line["among_load"] = agreeing(alone, among)
            lines.append(line)
            best = max(one["output_token_throughput"] for one in lines)
            line["of_best"] = line["output_token_throughput"] / best
            print(f"{name:10} {_words(line)}", flush=True)
    return found


def _measured(clients: Clients, asked: Asked, metrics: Sequence[str]) -> dict[str, Any]:
    before = asyncio.run(engine_time.read(metrics))
    report = clients.ask(asked)
    if report["failed"]:
        raise SystemExit(f"{report['failed']} requests failed: {report['errors']}")
    shares = asyncio.run(engine_time.read(metrics)).shares_since(before)
    return {"concurrency": asked.concurrency, **report, **shares}


def _words(line: Mapping[str, Any]) -> str:
    def ms(name: str) -> str:
        return f"{line[name]['p50'] * 1e3:.1f} / {line[name]['p99'] * 1e3:.1f}"

    def percent(name: str) -> str:
        return "?" if line[name] is None else f"{line[name]:.1%}"

    return (
        f"{line['concurrency']:4} in flight: {line['output_token_throughput']:8.0f} tok/s "
        f"({line['of_best']:.1%} of the best), ms p50 / p99: TTFT {ms('ttft_s')}, "
        f"TPOT {ms('tpot_s')}, ITL {ms('itl_s')}; host {percent('host_share')}, "
        f"experts {percent('expert_wait_share')}, client {percent('client_share')}, "
        f"as alone {line['among_load']}"
    )


def measure_model(
    name: str, plan: Plan, device: str, gateways: int, clients: int, flags: Sequence[str]
) -> dict[str, Any]:
    """One model, from its checkpoint to the last process."""
    most = max(plan.loads)
    with tempfile.TemporaryDirectory(prefix="serving-") as directory:
        model, workers, experts_each = _DEMO_MODEL, 0, 1  # as many as its experts
        if name != DEMO:
            settings, workers = model_of(name, device)
            experts_each = -(-settings["num_local_experts"] // workers)
            model = Path(directory)
            began_s = time.monotonic()
            write_model(settings, model, device)
            print(f"{name:10} written in {time.monotonic() - began_s:.1f} s", flush=True)
        began_s = time.monotonic()
        words = ["--model", str(model), "--device", device, "--workers", str(workers)]
        words += ["--experts-per-worker", str(experts_each), "--gateways", str(gateways)]
        usual = GatewayConfig(device=device)
        words += ["--max-running", str(max(usual.max_running, most))]
        words += ["--max-batch-tokens", str(max(usual.max_batch_tokens, most))]
        # Else a second answer would be computed another way than the first.
        words += ["--no-prefix-cache", *flags]
        with serving(words) as ready:
            ready_s = time.monotonic() - began_s
            print(f"{name:10} ready after {ready_s:.1f} s", flush=True)
            return {"ready_s": ready_s, "flags": words[2:], **sweep(name, ready, plan, clients)}


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Throughput, and times, over the requests in flight: a row for each model."""
    figure, axes = panels(len(results))
    for (name, found), (rate, times) in zip(results.items(), axes, strict=True):
        lines = found["lines"]
        loads = [line["concurrency"] for line in lines]
        rate.plot(loads, [line["output_token_throughput"] for line in lines], marker="o")
        rate.set_ylim(bottom=0)
        rate.set_ylabel(f"{name}: output tokens/s")
        for label, color in (("TTFT", "tab:orange"), ("TPOT", "tab:blue")):
            for part, style in (("p50", "-"), ("p99", ":")):
                values = [line[f"{label.lower()}_s"][part] * 1e3 for line in lines]
                times.plot(loads, values, style, color=color, marker=".", label=f"{label} {part}")
        times.set_yscale("log")
        times.set_ylabel("ms")
        times.legend(fontsize=8)
        for axis in (rate, times):
            axis.set_xscale("log", base=2)
            axis.set_xticks(loads, [str(load) for load in loads])
            axis.grid(alpha=0.3)
    figure.supxlabel("requests in flight", fontsize=9)
    figure.savefig(path, dpi=100)


def main(
    model: Annotated[list[str], typer.Option(help=", ".join((DEMO, *MODELS)))] = [DEMO],  # noqa: B006
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    concurrency: Annotated[str, typer.Option(help="Loads, by commas.")] = "1,8,32,64,128,256",
    gateways: Annotated[int, typer.Option(min=0, help="0: one a GPU, on a CPU one.")] = 0,
    clients: Annotated[int, typer.Option(min=0, help="Processes; 0: a quarter of the CPUs.")] = 0,
    quick: Annotated[bool, typer.Option(help="Small, to see that it runs.")] = False,
    up: Annotated[str, typer.Option(help="More flags for `expert-mesh up`.")] = "",
    limit_s: Annotated[float, typer.Option(help="Give a model up after so long.")] = 150.0,
    out: Annotated[Path | None, typer.Option(help="Directory for JSON and plot.")] = None,
) -> None:
    """Serve each model, and print a line for each load."""
    if unknown := set(model) - {DEMO, *MODELS}:
        raise typer.BadParameter(f"no such model: {', '.join(sorted(unknown))}")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    gateways = gateways or max(1, gpus)
    clients = clients or max(1, (os.cpu_count() or 1) // 4)
    loads = parse_loads(concurrency)
    results: dict[str, Any] = {}
    wrong = []
    for name in model:
        plan = Plan(loads, 64 if name == DEMO else 256, 64)
        if quick:
            plan = Plan([load for load in loads if load <= 8], 16, 8)
        began_s = time.monotonic()
        try:
            with limited(limit_s):
                found = measure_model(name, plan, device, gateways, clients, shlex.split(up))
        except Exception as error:  # the other models are still worth having
            print(f"{name:10} failed: {error!r}", file=sys.stderr, flush=True)
            wrong.append(f"{name}: {error}")
            continue
        if not found["same_alone"]:
            wrong.append(f"{name}: alone, it answers otherwise when it is asked again")
        results[name] = found | {"took_s": time.monotonic() - began_s}
        _print_table(name, results[name])
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "serving.json").write_text(json.dumps(results, indent=1))
            plot(results, out / "serving.png")
    if wrong:
        raise SystemExit("; ".join(wrong))


def _print_table(name: str, found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(loads_table(found["lines"]))
    print(f"{name:10} took {found['took_s']:.1f} s in all", flush=True)


if __name__ == "__main__":
    typer.run(main)
