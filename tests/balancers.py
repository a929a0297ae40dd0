"""How others publish that they balance experts, and real and made-up traffic to compare on.

The peers: no replicas at all; round robin (the i-th copy goes to the i-th worker, hot or not); and
the greedy of DeepSeek's expert-parallel load balancer, from its description: give one copy more to
the expert with the most load per copy until the copies are used up; then hand copies out, heaviest
first, each to the least loaded GPU that has a free place, every GPU the same number of places.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mesh.plan import ExpertId
from placement.improve import Budget
from placement.load import balancedness
from placement.planner import plan
from placement.rules import Rules, Target, WorkerSpec

DEMO_BIBLE = [
    [333, 293, 165, 133, 366, 314, 365, 96, 297, 104, 163, 180, 387, 155, 416, 233],
    [374, 133, 189, 278, 127, 346, 180, 319, 266, 143, 232, 241, 226, 333, 317, 296],
    [302, 170, 177, 155, 371, 130, 266, 293, 360, 223, 337, 412, 138, 200, 264, 202],
    [203, 305, 291, 153, 166, 295, 171, 350, 113, 206, 231, 323, 343, 383, 278, 189],
]
DEMO_NOVEL = [
    [213, 326, 82, 206, 394, 294, 306, 134, 205, 153, 268, 291, 397, 197, 378, 300],
    [282, 115, 211, 238, 167, 303, 226, 353, 276, 210, 136, 278, 340, 373, 319, 317],
    [293, 185, 197, 160, 403, 184, 236, 275, 350, 292, 251, 415, 199, 177, 316, 211],
    [213, 306, 340, 147, 199, 250, 189, 343, 194, 259, 288, 376, 280, 245, 232, 283],
]
"""Rows that models/demo routes to each expert of each layer, top 2 of 16: eight texts of 120 tokens
for each of two beginnings, sampled at temperature 0.8 with seed 0 in float32 and read from
``output_router_logits`` of transformers' MixtralForCausalLM. "In the beginning" and "And the king
said unto him" made the first table, "CHAPTER I." and "My dear Mr. Holmes," the second."""

Traffic = dict[ExpertId, float]
Placement = dict[ExpertId, tuple[str, ...]]


def demo(table: list[list[int]]) -> Traffic:
    return {ExpertId(j, i): float(n) for j, row in enumerate(table) for i, n in enumerate(row)}


def zipf(num_layers: int, seed: int, num_experts: int = 256, power: float = 1.2) -> Traffic:
    """The i-th busiest expert has 1 / i^power of the traffic; which one that is, chance decides."""
    rng = np.random.default_rng(seed)
    rates = 1e4 / np.arange(1, num_experts + 1) ** power
    return {
        ExpertId(layer, int(i)): float(rate)
        for layer in range(num_layers)
        for i, rate in zip(rng.permutation(num_experts), rates, strict=True)
    }


def drifted(traffic: Traffic, seed: int) -> Traffic:
    """Every twentieth expert changes places with another."""
    rng = np.random.default_rng(seed)
    drifted = dict(traffic)
    for expert in list(traffic):
        if rng.random() < 0.05:
            other = ExpertId(expert.layer, int(rng.integers(0, len(traffic))) % _width(traffic))
            drifted[expert], drifted[other] = drifted[other], drifted[expert]
    return drifted


def _width(traffic: Traffic) -> int:
    return max(e.index for e in traffic) + 1


def layers_of(traffic: Traffic) -> dict[int, list[ExpertId]]:
    layers: dict[int, list[ExpertId]] = {}
    for expert in sorted(traffic):
        layers.setdefault(expert.layer, []).append(expert)
    return layers


def no_replicas(traffic: Traffic, workers: list[str]) -> Placement:
    return {expert: (workers[expert.index],) for expert in traffic}


def round_robin(traffic: Traffic, workers: list[str]) -> Placement:
    placed: dict[ExpertId, list[str]] = {expert: [] for expert in traffic}
    for experts in layers_of(traffic).values():
        for i, worker in enumerate(workers):
            placed[experts[i % len(experts)]].append(worker)
    return {expert: tuple(ids) for expert, ids in placed.items()}


def eplb(traffic: Traffic, workers: list[str]) -> Placement:
    placed: dict[ExpertId, list[str]] = {expert: [] for expert in traffic}
    for experts in layers_of(traffic).values():
        copies = dict.fromkeys(experts, 1)
        for _ in range(len(workers) - len(experts)):
            hottest = max(experts, key=lambda e: traffic[e] / copies[e])
            copies[hottest] += 1
        physical = [(traffic[e] / copies[e], e) for e in experts for _ in range(copies[e])]
        packs, free = dict.fromkeys(workers, 0.0), dict.fromkeys(workers, 1)
        for load, expert in sorted(physical, key=lambda p: -p[0]):
            worker = min((w for w in workers if free[w]), key=packs.__getitem__)
            packs[worker] += load
            free[worker] -= 1
            placed[expert].append(worker)
    return {expert: tuple(ids) for expert, ids in placed.items()}


def balance(placed: Placement, traffic: Traffic, workers: list[str]) -> float:
    loads = Target(placed).loads(traffic)
    return balancedness(loads.get(w, 0.0) for w in workers)


def slowest(placed: Placement, traffic: Traffic) -> float:
    """What the layers' busiest workers compute one after another."""
    return sum(
        max(traffic[e] / len(placed[e]) for e in experts) for experts in layers_of(traffic).values()
    )


def loads_to_make(before: Placement, after: Placement) -> int:
    """Experts that some worker has to load."""
    return sum(len(set(after[e]) - set(before[e])) for e in after)


CASES: dict[str, tuple[Traffic, Traffic, int]] = {
    "demo, 16 workers": (demo(DEMO_BIBLE), demo(DEMO_NOVEL), 16),
    "demo, 20 workers": (demo(DEMO_BIBLE), demo(DEMO_NOVEL), 20),
    "demo, 32 workers": (demo(DEMO_BIBLE), demo(DEMO_NOVEL), 32),
    "zipf, one layer, 288 workers": (zipf(1, 0), drifted(zipf(1, 0), 1), 288),
    "zipf, one layer, 320 workers": (zipf(1, 2), drifted(zipf(1, 2), 3), 320),
    "zipf, six layers, 288 workers": (zipf(6, 4), drifted(zipf(6, 4), 5), 288),
}


def rules_and_workers(traffic: Traffic, num_workers: int) -> tuple[Rules, list[str]]:
    """Of a mesh that serves this."""
    return Rules(tuple(layers_of(traffic)), _width(traffic)), [
        f"w{i:03}" for i in range(num_workers)
    ]


def ours(
    rules: Rules, traffic: Traffic, workers: list[str], before: Placement | None = None
) -> Placement:
    specs = [WorkerSpec(name, 1000, 1) for name in workers]
    homes = Target(before).experts_by_worker() if before else None
    target = plan(rules, specs, traffic=traffic, homes=homes, budget=Budget() if before else None)
    return dict(target.workers_by_expert)


PEERS: dict[str, Callable[[Traffic, list[str]], Placement]] = {
    "no replicas": no_replicas,
    "round robin": round_robin,
    "EPLB": eplb,
}
