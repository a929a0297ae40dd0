"""Serving on a CPU beside ``transformers``, the same checkpoint and requests in the same run.

    python -m benchmarks.cpu_peers --model models/demo

Correctness comes first: greedy tokens of both must be equal. Then, at each concurrency, the same
requests go to

* the mesh: ``expert-mesh up`` with one worker per expert, asked over gRPC by a client that keeps
  that many requests in flight;
* ``transformers``: ``generate`` on static batches of that many requests, left-padded, each batch
  until its longest output is done, with the better of one and two threads;
* the floor: the gateway's own decoder with every expert called in place, decoding that many
  sequences at once. What the mesh adds to it is the price of its processes.

``equal`` has outputs of one length, which a static batch likes best; ``mixed`` has outputs of
16 to 112 tokens, as servers see them.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cli.bench import Task, random_tasks, run, summarize
from cli.child import command_of
from expert_mesh import AsyncClient, Client
from expert_worker.expert_mlp import load_expert
from gateway.model.batch import ForwardBatch, SequenceSlice
from gateway.model.decoder import Decoder
from gateway.model.kv_cache import KvCache
from mesh.checkpoint import Checkpoint
from mesh.model_config import ModelConfig
from mesh.plan import ExpertId

INPUT_LEN = 64
OUTPUT_LENS = {"equal": (64, 64), "mixed": (16, 112)}
BLOCK_SIZE = 16


class ExpertsInPlace:
    """The routed experts as plain calls: the floor has no transport."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._experts = {
            ExpertId(layer, index): load_expert(
                checkpoint, config, layer, index, "cpu", torch.float32
            )
            for layer in config.moe_layers
            for index in range(config.num_experts)
        }

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> ExpertsInPlace:
        y_TD = torch.zeros_like(x_TD)
        for index in expert_ids_TK.unique().tolist():
            tokens, ranks = (expert_ids_TK == index).nonzero(as_tuple=True)
            y_RD = self._experts[ExpertId(layer, index)](x_TD[tokens])
            y_TD.index_add_(0, tokens, y_RD * weights_TK[tokens, ranks, None])
        self._y_TD = y_TD
        return self

    def combine(self) -> torch.Tensor:
        return self._y_TD


def floor_tpot_s(model: Path, concurrency: int, steps: int) -> float:
    """Median time of a decode step of ``concurrency`` sequences behind their prompts."""
    config = ModelConfig.from_hf(model)
    with Checkpoint(model) as checkpoint, torch.inference_mode():
        decoder = Decoder.load(config, checkpoint, "cpu", torch.float32)
        experts = ExpertsInPlace(config, checkpoint)
        blocks = -(-(INPUT_LEN + steps) // BLOCK_SIZE)
        kv = KvCache(config, concurrency * blocks, BLOCK_SIZE, "cpu", torch.float32)
        tables = [tuple(range(n * blocks, (n + 1) * blocks)) for n in range(concurrency)]
        times_s = []
        for step in range(steps):
            cached, new = (0, INPUT_LEN) if step == 0 else (INPUT_LEN + step - 1, 1)
            batch = ForwardBatch.of(
                tuple(SequenceSlice(cached, new, table) for table in tables),
                torch.randint(config.vocab_size, (concurrency * new,)),
                torch.arange(new - 1, concurrency * new, new),
            )
            began_s = time.perf_counter()
            decoder.forward([batch], kv, experts)[0].logits_NV.argmax(dim=-1)
            times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s[1:])


class Transformers:
    """The peer: static batches through ``generate``."""

    def __init__(self, model: Path) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32
        ).eval()

    def batch(self, tasks: list[Task], num_new: int) -> torch.Tensor:
        """Greedy tokens, ``num_new`` for each prompt."""
        longest = max(len(task.prompt) for task in tasks)
        ids = torch.zeros(len(tasks), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, task in enumerate(tasks):
            ids[row, longest - len(task.prompt) :] = torch.tensor(task.prompt)
            mask[row, longest - len(task.prompt) :] = 1
        out = self._model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            pad_token_id=0,
        )
        return out[:, longest:]

    def run(self, tasks: list[Task], concurrency: int) -> dict[str, float]:
        """Output tokens per second that were asked for, and TPOT."""
        tpot_s = []
        began_s = time.perf_counter()
        for start in range(0, len(tasks), concurrency):
            batch = tasks[start : start + concurrency]
            longest = max(task.output_len for task in batch)
            batch_began_s = time.perf_counter()
            self.batch(batch, longest)
            tpot_s.append((time.perf_counter() - batch_began_s) / longest)
        duration_s = time.perf_counter() - began_s
        tokens = sum(task.output_len for task in tasks)
        return {"tokens_per_s": tokens / duration_s, "tpot_s": statistics.median(tpot_s)}


@contextmanager
def mesh(model: Path, workers: int) -> Iterator[str]:
    """A mesh for the length of a block; its gateway's address."""
    command = command_of("cli.main", "up", "--json")
    command += ["--model", str(model), "--workers", str(workers), "--no-generation-config"]
    up = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert up.stdout is not None
        line = up.stdout.readline()
        if not line:
            raise SystemExit(f"the mesh did not start: exit code {up.wait()}")
        yield json.loads(line)["gateways"][0]
    finally:
        up.send_signal(signal.SIGTERM)
        up.wait()


def run_mesh(target: str, tasks: list[Task], concurrency: int) -> dict[str, float]:
    """The same two figures of the mesh, as its client sees them."""

    async def measure() -> dict[str, Any]:
        async with AsyncClient(target) as client:
            return summarize(*await run([client], tasks, concurrency=concurrency), None)

    report = asyncio.run(measure())
    if report["failed"]:
        raise SystemExit(f"{report['failed']} requests failed: {report['errors']}")
    return {
        "tokens_per_s": report["output_token_throughput"],
        "tpot_s": report["tpot_s"]["p50"],
        "tpot_p99_s": report["tpot_s"]["p99"],
        "ttft_s": report["ttft_s"]["p50"],
    }


def check_equal(target: str, peer: Transformers, tasks: list[Task]) -> None:
    """Both must give the same greedy tokens before either is timed."""
    with Client(target) as client:
        for task in tasks:
            ours = client.complete(task.prompt, max_tokens=32, temperature=0.0, ignore_eos=True)
            theirs = peer.batch([task], 32)[0].tolist()
            if list(ours.token_ids) != theirs:
                raise SystemExit(f"greedy tokens differ: {ours.token_ids} and {theirs}")


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = Path("models/demo"),
    workers: Annotated[int, typer.Option(help="Expert workers.")] = 16,
    concurrency: Annotated[list[int], typer.Option(help="Requests in flight.")] = [1, 8, 32],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Batches of each concurrency.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare, and print ratios."""
    vocab_size = ModelConfig.from_hf(model).vocab_size
    torch.set_num_threads(1)
    peer = Transformers(model)
    results: list[dict[str, Any]] = []
    with mesh(model, workers) as target:
        rng = random.Random(0)
        check_equal(target, peer, random_tasks(4, (5, 80), (32, 32), vocab_size, rng))
        for count in concurrency:
            for shape, output_len in OUTPUT_LENS.items():
                lengths = (INPUT_LEN, INPUT_LEN), output_len
                warm_up = random_tasks(count, *lengths, vocab_size, rng)
                run_mesh(target, warm_up, count)
                peer.run(warm_up[:count], count)
                tasks = random_tasks(count * rounds, *lengths, vocab_size, rng)
                ours = run_mesh(target, tasks, count)
                theirs: dict[str, float] = {}
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    found = peer.run(tasks, count)
                    if found["tokens_per_s"] > theirs.get("tokens_per_s", 0.0):
                        theirs = found | {"threads": threads}
                torch.set_num_threads(1)
                results.append(
                    {
                        "concurrency": count,
                        "outputs": shape,
                        "mesh": ours,
                        "transformers": theirs,
                        "floor_tpot_s": floor_tpot_s(model, count, 32),
                        "throughput_ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
                        "tpot_ratio": ours["tpot_s"] / theirs["tpot_s"],
                    }
                )
                if not as_json:
                    Console(stderr=True).print(results[-1])
    if as_json:
        print(json.dumps(results))
        return
    table = Table("in flight", "outputs", title=f"{model.name}, {workers} workers, CPU")
    columns = ("mesh tok/s", "transformers tok/s", "ratio", "mesh TPOT ms", "p99", "their TPOT ms")
    for name in (*columns, "ratio", "floor TPOT ms"):
        table.add_column(name, justify="right")
    for result in results:
        ours, theirs = result["mesh"], result["transformers"]
        table.add_row(
            str(result["concurrency"]),
            result["outputs"],
            f"{ours['tokens_per_s']:.0f}",
            f"{theirs['tokens_per_s']:.0f}",
            f"{result['throughput_ratio']:.2f}",
            f"{ours['tpot_s'] * 1e3:.1f}",
            f"{ours['tpot_p99_s'] * 1e3:.1f}",
            f"{theirs['tpot_s'] * 1e3:.1f}",
            f"{result['tpot_ratio']:.2f}",
            f"{result['floor_tpot_s'] * 1e3:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
