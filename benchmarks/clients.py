"""Clients in processes of their own: one alone, in Python, is slower than a mesh on GPUs.

Each is ``python -m benchmarks.clients ORDER`` and speaks one JSON object a line: what to ask in,
``{"ready": true}`` out, ``{"go": true}`` in, what became of it out. It ends when its standard input
does.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.work import shares
from cli.bench import Record, random_tasks, run, summarize
from cli.bench_mesh import Child, children
from expert_mesh import AsyncClient


@dataclass(frozen=True)
class Asked:
    """Requests of random tokens, so many of them in flight. Lengths are from and to."""

    requests: int
    concurrency: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    seed: int


class Clients:
    """They share what is asked as evenly as can be."""

    def __init__(self, processes: Sequence[Child]) -> None:
        self._processes = processes
        self._busy: list[Child] = []

    def start(self, asked: Asked) -> None:
        """Ask; all begin at a word."""
        self._busy = list(self._processes[: asked.concurrency])
        requests = shares(asked.requests, len(self._busy))
        concurrency = shares(asked.concurrency, len(self._busy))
        for number, client in enumerate(self._busy):
            mine = {"requests": len(requests[number]), "concurrency": len(concurrency[number])}
            client.tell(asdict(asked) | mine | {"seed": f"{asked.seed}.{number}"})
        for client in self._busy:
            client.hear()
        for client in self._busy:
            client.tell({"go": True})

    def finish(self) -> dict[str, Any]:
        """:func:`cli.bench.summarize` of all, and ``client_share``: how much of a core the busiest
        client took. Near 1, it is what was measured."""
        answers = [client.hear() for client in self._busy]
        records = [Record(**record) for answer in answers for record in answer["records"]]
        began_s = min(answer["began_s"] for answer in answers)
        ended_s = max(answer["began_s"] + answer["took_s"] for answer in answers)
        share = max(answer["cpu_s"] / answer["took_s"] for answer in answers)
        return summarize(records, ended_s - began_s, None) | {"client_share": share}

    def ask(self, asked: Asked) -> dict[str, Any]:
        """Start and finish."""
        self.start(asked)
        return self.finish()


@contextmanager
def clients_of(targets: Sequence[str], count: int) -> Iterator[Clients]:
    """So many, each of which asks all the gateways. They end with the block."""
    # Of two gateways with as few requests it takes the first: not all clients the same.
    turned = [[*targets[n:], *targets[:n]] for n in range(len(targets))]
    orders = [{"targets": turned[n % len(targets)]} for n in range(count)]
    with children("benchmarks.clients", orders) as processes:
        yield Clients(processes)


async def _serve(targets: Sequence[str]) -> None:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(target)) for target in targets]
        model = await clients[0].model_info()
        for line in sys.stdin:
            asked = json.loads(line)
            lengths = asked["input_len"], asked["output_len"]
            rng = random.Random(asked["seed"])
            tasks = random_tasks(asked["requests"], *lengths, model.vocab_size, rng)
            print(json.dumps({"ready": True}), flush=True)
            sys.stdin.readline()
            began_s, cpu_s = time.perf_counter(), time.process_time()
            records, took_s = await run(clients, tasks, concurrency=asked["concurrency"])
            answer = {
                "began_s": began_s,
                "took_s": took_s,
                "cpu_s": time.process_time() - cpu_s,
                "records": [asdict(record) for record in records],
            }
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])["targets"]))
