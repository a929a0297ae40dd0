"""Where the planner seats experts on made-up clusters, and how long that takes.

    python -m benchmarks.placement

Each cluster has hosts with NVLink inside and a network between, gateways on its first host, and a
Mixture of Experts whose experts are busy by Zipf's law, 1.2, another one in each layer. For every
placement the same model says

* how much of a token's rows crosses between hosts, there and back, and
* the slowest path: in each layer the worker, or the host's link, that is done last; all layers.

Beside ours: random seats, round robin, and first-fit (each expert, and then each replica, to the
first worker with a free seat). All keep the rules: one expert of a layer on a worker, its memory.

Balance is compared with no replicas, round robin and the greedy of DeepSeek's load balancer
(``tests/balancers.py``): mean over maximum of the workers' load, when planned, and when the load
has drifted, with what had to be loaded somewhere for it.

Then planning is timed: 58 layers of 256 experts on 256 workers, on one core; every plan is checked
against the rules before its time counts. *A whole turn* is all that the service computes from the
report of a death until its last plan lies in the gateway's stream: who is routed around, the new
target, two plans, all orders. *Routed around* is the part of it until the first plan is out.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from mesh.config import PlacementConfig
from mesh.plan import ExpertId, expert_to_proto
from placement.coordinator import Coordinator
from placement.improve import Budget
from placement.planner import plan
from placement.rules import Rules, Target, WorkerSpec
from placement.topology import Topology
from protos import placement_pb2 as pb
from tests import balancers

Traffic = Mapping[ExpertId, float]

ROW_BYTES = 7168 * 2
"""One row there, and as much back."""
INSIDE_GBIT_PER_S = 3600.0
ROWS_PER_S = 5e6
"""What a worker computes."""
EXPERT_BYTES = 1


@dataclass(frozen=True)
class Cluster:
    """Hosts of workers, and the links from the gateways' host, ``host-0``, to each of them."""

    name: str
    gbit_per_s: tuple[float, ...]
    """Of the link to each host; of the first, inside it."""
    workers_per_host: int
    num_experts: int
    memory: tuple[int, ...] = ()
    """Experts that the workers of a host have room for, host by host; absent: enough."""

    @property
    def hosts(self) -> list[str]:
        return [f"host-{i}" for i in range(len(self.gbit_per_s))]

    def workers(self) -> list[WorkerSpec]:
        topology = Topology(
            {
                frozenset({"host-0", host}): 1.0 if host == "host-0" else 1.0 + 400.0 / speed
                for host, speed in zip(self.hosts, self.gbit_per_s, strict=True)
            }
        )
        room = self.memory or (1 << 20,) * len(self.hosts)
        return [
            WorkerSpec(
                f"{host}-{i}",
                memory_bytes=room[h] * EXPERT_BYTES,
                expert_bytes=EXPERT_BYTES,
                link_cost=topology.link_cost(pb.WorkerInfo(host=host), ["host-0"]),
                host=host,
            )
            for h, host in enumerate(self.hosts)
            for i in range(self.workers_per_host)
        ]


NUM_LAYERS = 8
CLUSTERS = (
    Cluster("2 x 8, NVLink, 400 Gb/s", (INSIDE_GBIT_PER_S, 400), 8, 12),
    Cluster("4 x 8, NVLink, 400 Gb/s", (INSIDE_GBIT_PER_S, 400, 400, 400), 8, 28),
    Cluster("8 x 8, one link of 100 Gb/s", (INSIDE_GBIT_PER_S, *[400] * 6, 100), 8, 56),
    Cluster("4 x 8, uneven memory", (INSIDE_GBIT_PER_S, 400, 400, 400), 8, 24, (8, 8, 6, 4)),
)


def zipf(layers: Collection[int], num_experts: int, seed: int, power: float = 1.2) -> Traffic:
    """Rows of each expert, of 1000 in all a layer; chance decides which expert is how busy."""
    rng = np.random.default_rng(seed)
    rates = 1.0 / np.arange(1, num_experts + 1) ** power
    rates *= 1000.0 / rates.sum()
    return {
        ExpertId(layer, int(i)): float(rate)
        for layer in layers
        for i, rate in zip(rng.permutation(num_experts), rates, strict=True)
    }


# The peers.


def fill(
    rules: Rules,
    workers: Sequence[WorkerSpec],
    order: Callable[[list[int]], list[int]],
) -> Target:
    """Experts one after another, each to the first worker with a seat and room; then copies the
    same way until every seat is taken. ``order`` says in which order each layer asks."""
    room = [rules.room(w) for w in workers]
    placed: dict[ExpertId, list[int]] = {e: [] for e in rules.experts}
    taken: set[tuple[int, int]] = set()
    for is_copy in (False, True):
        for layer in rules.layers:
            asked = order(list(range(len(workers))))
            free = [w for w in asked if room[w] and (layer, w) not in taken]
            if not is_copy:
                # What first-fit must be told, or it runs into a corner: the roomiest first.
                free = sorted(free, key=lambda w: -min(room[w], len(rules.layers)))
            experts = [e for e in rules.experts if e.layer == layer]
            spare = sum(room) - (0 if is_copy else len(experts))
            count = min(len(free), spare) if is_copy else len(experts)
            for i, w in enumerate(free[:count]):
                placed[experts[i % len(experts)]].append(w)
                taken.add((layer, w))
                room[w] -= 1
    return Target({e: tuple(workers[w].worker_id for w in at) for e, at in placed.items()})


def first_fit(rules: Rules, workers: Sequence[WorkerSpec], traffic: Traffic) -> Target:
    return fill(rules, workers, lambda asked: asked)


def round_robin(rules: Rules, workers: Sequence[WorkerSpec], traffic: Traffic) -> Target:
    """Each layer goes on where the layer before ended."""
    start = [0]

    def turn(asked: list[int]) -> list[int]:
        start[0] = (start[0] + rules.num_experts) % len(asked)
        return asked[start[0] :] + asked[: start[0]]

    return fill(rules, workers, turn)


def at_random(seed: int) -> Callable[[Rules, Sequence[WorkerSpec], Traffic], Target]:
    rng = random.Random(seed)
    return lambda rules, workers, traffic: fill(
        rules, workers, lambda asked: rng.sample(asked, len(asked))
    )


def ours(rules: Rules, workers: Sequence[WorkerSpec], traffic: Traffic) -> Target:
    return plan(rules, workers, traffic=traffic)


# The model.


def check(rules: Rules, workers: Sequence[WorkerSpec], target: Target) -> None:
    """Raises ValueError where a plan breaks the rules or serves less than all."""
    by_worker = target.experts_by_worker()
    for worker in workers:
        experts = by_worker.pop(worker.worker_id, set())
        if len(experts) > rules.room(worker) or len({e.layer for e in experts}) < len(experts):
            raise ValueError(f"{worker.worker_id} holds more than it may")
    if by_worker or any(not target.workers_by_expert.get(e) for e in rules.experts):
        raise ValueError("not every expert has a worker")


def judge(cluster: Cluster, target: Target, traffic: Traffic) -> dict[str, float]:
    """Bytes between hosts of all layers, and the time of the slowest path."""
    hosts = {w.worker_id: w.host for w in cluster.workers()}
    speed = dict(zip(cluster.hosts, cluster.gbit_per_s, strict=True))
    crossing, slowest_s = 0.0, 0.0
    for layer in sorted({e.layer for e in traffic}):
        rows_of_worker: dict[str, float] = {}
        for expert, ids in target.workers_by_expert.items():
            if expert.layer == layer:
                for worker_id in ids:
                    share = traffic[expert] / len(ids)
                    rows_of_worker[worker_id] = rows_of_worker.get(worker_id, 0.0) + share
        done_s, rows_of_host = 0.0, dict.fromkeys(cluster.hosts, 0.0)
        for worker_id, rows in rows_of_worker.items():
            host = hosts[worker_id]
            rows_of_host[host] += rows
            done_s = max(done_s, rows / ROWS_PER_S + _on_link_s(rows, speed[host]))
        for host, rows in rows_of_host.items():
            if host != "host-0":
                crossing += 2 * rows * ROW_BYTES
                done_s = max(done_s, _on_link_s(rows, speed[host]))
        slowest_s += done_s
    return {"cross_host_bytes": crossing, "slowest_path_s": slowest_s}


def _on_link_s(rows: float, gbit_per_s: float) -> float:
    return 2 * rows * ROW_BYTES * 8 / (gbit_per_s * 1e9)


def compare(cluster: Cluster, seeds: int = 5) -> dict[str, dict[str, float]]:
    """The mean over traffics of what each way to place comes to."""
    rules = Rules(tuple(range(NUM_LAYERS)), cluster.num_experts)
    workers = cluster.workers()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        traffic = zipf(rules.layers, rules.num_experts, seed)
        ways = {
            "ours": ours,
            "random": at_random(seed),
            "round robin": round_robin,
            "first-fit": first_fit,
        }
        for name, way in ways.items():
            target = way(rules, workers, traffic)
            check(rules, workers, target)
            found.setdefault(name, []).append(judge(cluster, target, traffic))
    return {
        name: {key: statistics.mean(r[key] for r in results) for key in results[0]}
        for name, results in found.items()
    }


def compare_balance() -> dict[str, dict[str, dict[str, float]]]:
    """Of each case and each way to balance."""
    return {name: dict(_balanced(*case)) for name, case in balancers.CASES.items()}


def _balanced(
    then: balancers.Traffic, now: balancers.Traffic, num_workers: int
) -> Iterator[tuple[str, dict[str, float]]]:
    rules, workers = balancers.rules_and_workers(then, num_workers)
    first = balancers.ours(rules, then, workers)
    plans = {"ours": (first, balancers.ours(rules, now, workers, first))}
    plans |= {
        name: (way(then, workers), way(now, workers)) for name, way in balancers.PEERS.items()
    }
    for name, (before, after) in plans.items():
        yield (
            name,
            {
                "balancedness": balancers.balance(before, then, workers),
                "drifted": balancers.balance(after, now, workers),
                "loads": balancers.loads_to_make(before, after),
            },
        )


# The clock.


def timed(rounds: int) -> list[dict[str, Any]]:
    """How long plans take, each checked first: CPU seconds of one core."""
    rules = Rules(tuple(range(58)), 256)
    traffic, later = (zipf(rules.layers, 256, seed) for seed in (0, 1))
    return [
        {"workers": num_workers, "what": what, **figures}
        for num_workers in (256, 288)
        for what, figures in _timed(rules, num_workers, traffic, later, rounds).items()
    ]


def _timed(
    rules: Rules, num_workers: int, traffic: Traffic, later: Traffic, rounds: int
) -> dict[str, dict[str, float]]:
    workers = [
        WorkerSpec(f"w{i:03}", 1 << 20, 1, 1.0 if i < 8 else 2.0, f"host-{i // 8}")
        for i in range(num_workers)
    ]
    survivors = workers[:100] + workers[101:]
    first = plan(rules, workers, traffic=traffic)
    check(rules, workers, first)
    homes = first.experts_by_worker()

    def repair() -> Target:
        return plan(rules, survivors, traffic=traffic, homes=homes, partial=True)

    def rebalance() -> Target:
        return plan(rules, workers, traffic=later, homes=homes, budget=Budget(moves=64))

    repaired = repair()
    if len(survivors) >= rules.num_experts:
        check(rules, survivors, repaired)
    check(rules, workers, rebalance())
    moved = sum(
        len(set(ids) - set(first.workers_by_expert[e]))
        for e, ids in repaired.workers_by_expert.items()
    )
    return {
        "first plan": _clock(lambda: plan(rules, workers, traffic=traffic), rounds),
        "after one death": _clock(repair, rounds) | {"moved": moved},
        "rebalance, other traffic": _clock(rebalance, rounds),
        **turn_after_death(rules, workers, traffic, rounds),
    }


def _clock(way: Callable[[], Any], rounds: int) -> dict[str, float]:
    taken = []
    for _ in range(rounds):
        began = time.thread_time()
        way()
        taken.append(time.thread_time() - began)
    return _summary(taken)


def _summary(taken: list[float]) -> dict[str, float]:
    return {"p50_s": statistics.median(taken), "max_s": max(taken)}


def turn_after_death(
    rules: Rules, workers: Sequence[WorkerSpec], traffic: Traffic, rounds: int
) -> dict[str, dict[str, float]]:
    """Everything that the placement service computes from a death until all is told."""
    around, taken = [], []
    config = PlacementConfig()
    home = plan(rules, workers, traffic=traffic).experts_by_worker()
    for _ in range(rounds):
        gc.collect()
        gc.freeze()  # as the service does when it starts: what is there already is no garbage
        mesh = Coordinator(rules, "f" * 16, config)
        for w in workers:
            info = pb.WorkerInfo(
                worker_id=w.worker_id,
                grpc_address=f"{w.host}:1",
                host=w.host,
                memory_bytes=w.memory_bytes,
                expert_bytes=w.expert_bytes,
                ucx_address=b"x" * 200,
            )
            resident = map(expert_to_proto, sorted(home[w.worker_id]))
            mesh.register(pb.RegisterRequest(worker=info, resident=resident), w.worker_id, 0.0)
        load = [pb.ExpertLoad(expert=expert_to_proto(e), rows=int(r)) for e, r in traffic.items()]
        mesh.gateway_report(pb.GatewayReport(gateway_id="g", host="host-0", load=load), 0.0)
        listening = {w.worker_id for w in workers}
        _turn(mesh, listening)
        mesh.gateway_report(pb.GatewayReport(gateway_id="g", host="host-0", epoch=mesh.epoch), 0.5)
        dead = workers[100].worker_id
        began = time.thread_time()
        mesh.drop(dead, 1.0)
        around.append(_turn(mesh, listening - {dead}) - began)
        taken.append(time.thread_time() - began)
        gc.unfreeze()
        if mesh.plan is None or any(dead in e.worker_ids for e in mesh.plan.experts):
            raise ValueError("rows still go to the dead")
    return {
        "routed around one death": _summary(around),
        "a whole turn after one death": _summary(taken),
    }


def _turn(mesh: Coordinator, listening: Collection[str]) -> float:
    """Returns when the first plan was out."""
    _tell(mesh, listening)
    told_s = time.thread_time()
    if compute := mesh.next_target(1.0):
        mesh.adopt(compute(), 1.0)
        _tell(mesh, listening)
    return told_s


def _tell(mesh: Coordinator, listening: Collection[str]) -> None:
    if mesh.publish(1.0):
        mesh.current_plan().SerializeToString()
    for _, order in mesh.orders(1.0, listening):
        order.SerializeToString()


def main(
    rounds: Annotated[int, typer.Option(help="Times that each plan is made.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compare, time, and print tables."""
    placed = {cluster.name: compare(cluster) for cluster in CLUSTERS}
    balanced = compare_balance()
    clocked = timed(rounds)
    if as_json:
        print(json.dumps({"placements": placed, "balance": balanced, "times": clocked}))
        return
    table = Table("traffic", "placement", title="Balance: mean over maximum of the workers' load")
    for title in ("as planned", "load drifted", "experts loaded for it"):
        table.add_column(title, justify="right")
    for case, ways in balanced.items():
        for way, found in ways.items():
            figures = (f"{found['balancedness']:.3f}", f"{found['drifted']:.3f}")
            table.add_row(case if way == "ours" else "", way, *figures, f"{found['loads']:.0f}")
    Console().print(table)
    table = Table("cluster", "placement", title="Where experts are; ours is 1")
    for title in ("cross-host bytes", "slowest path"):
        table.add_column(title, justify="right")
    for name, ways in placed.items():
        for way, found in ways.items():
            ratios = [found[k] / ways["ours"][k] for k in ("cross_host_bytes", "slowest_path_s")]
            table.add_row(name if way == "ours" else "", way, *(f"{r:.2f}" for r in ratios))
    Console().print(table)
    table = Table("58 layers x 256 experts", title="How long a plan takes, CPU time of one core")
    for title in ("workers", "p50 ms", "max ms"):
        table.add_column(title, justify="right")
    for clock in clocked:
        figures = (f"{clock[key] * 1e3:.0f}" for key in ("p50_s", "max_s"))
        table.add_row(clock["what"], str(clock["workers"]), *figures)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
