"""A whole mesh on one GPU: a gateway and sixteen workers share it and answer as the CPU does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from expert_mesh import Client
from tests.running import DEMO_MODEL, RunningMesh, running_mesh

PROMPTS = [
    "In the beginning",
    "The old man said",
    "She",
    "It was a dark and stormy night, and " * 8,
]
NUM_TOKENS = 48


def _answers(target: str) -> list[list[int]]:
    with Client(target) as client:
        return [
            list(
                client.complete(
                    prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
                ).token_ids
            )
            for prompt in PROMPTS
        ]


@pytest.fixture(scope="module")
def cpu_answers() -> list[list[int]]:
    with running_mesh("--model", DEMO_MODEL) as mesh:
        return _answers(mesh.gateway)


@pytest.mark.parametrize("flags", [[], ["--experts-per-worker", "4"], ["--overlap-tokens", "1"]])
def test_greedy_tokens_in_float32_are_those_of_the_cpu(
    cpu_answers: list[list[int]], flags: list[str]
) -> None:
    with running_mesh(
        "--model", DEMO_MODEL, "--device", "cuda", "--dtype", "float32", *flags
    ) as mesh:
        assert _answers(mesh.gateway) == cpu_answers
        with Client(mesh.gateway) as client:
            # Left in the middle: its blocks and rows are others' afterwards.
            for _ in zip(range(3), client.generate(PROMPTS[3], max_tokens=200), strict=False):
                pass
        assert _answers(mesh.gateway) == cpu_answers


def test_bfloat16_begins_as_float32_does(cpu_answers: list[list[int]]) -> None:
    """Rounding parts them sooner or later, but not at once and not everywhere."""
    with running_mesh("--model", DEMO_MODEL, "--device", "cuda", "--dtype", "bfloat16") as mesh:
        answers = _answers(mesh.gateway)
    assert all(ours[0] == theirs[0] for ours, theirs in zip(answers, cpu_answers, strict=True))
    equal = sum(
        a == b
        for ours, theirs in zip(answers, cpu_answers, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    assert equal > NUM_TOKENS


def test_who_comes_first_waits_for_no_graph(tmp_path: Path) -> None:
    """Whatever the size of batch: the gateway has rehearsed it."""
    flags = ["--device", "cuda", "--log-dir", tmp_path]
    with running_mesh("--model", DEMO_MODEL, *flags) as mesh, Client(mesh.gateway) as client:

        def ask(length: int) -> None:
            client.complete(PROMPTS[0], max_tokens=length, ignore_eos=True)

        with ThreadPoolExecutor(48) as pool:
            list(pool.map(ask, range(1, 97)))
    log = (tmp_path / "gateway-0.log").read_text()
    before, rehearsed, after = log.partition('"event": "rehearsed"')
    assert rehearsed
    assert "decode_graphs_captured" in before
    assert "decode_graphs_captured" not in after


def _engines(mesh: RunningMesh) -> list[psutil.Process]:
    """The only processes that are an only child's: a front has no other."""
    parents = [process.parent() for process in mesh.processes]
    return [
        process
        for process, parent in zip(mesh.processes, parents, strict=True)
        if parents.count(parent) == 1
        and parent in mesh.processes
        and parent.parent().pid != mesh.up.pid
    ]


def test_a_killed_gateway_leaves_the_workers_and_the_other_gateway_serving(
    cpu_answers: list[list[int]],
) -> None:
    """Workers read and write in its memory: what they do there when it is gone hurts nobody."""
    flags = ["--device", "cuda", "--dtype", "float32", "--gateways", "2"]
    with running_mesh("--model", DEMO_MODEL, *flags) as mesh:
        workers = {mesh.pid_of(str(worker["id"])) for worker in mesh.ready["workers"]}
        engines = _engines(mesh)
        assert len(engines) == 2
        with Client(mesh.gateway) as client:
            for n, _ in enumerate(client.generate(PROMPTS[3], max_tokens=400, ignore_eos=True)):
                if n == 20:
                    for engine in engines:
                        if _front_is(engine, mesh.gateway):
                            engine.kill()
                    break
        assert _answers(mesh.ready["gateways"][1]) == cpu_answers
        assert {process.pid for process in mesh.processes if process.is_running()} >= workers


def _front_is(engine: psutil.Process, target: str) -> bool:
    port = int(target.rsplit(":", 1)[1])
    return any(c.laddr.port == port for c in engine.parent().net_connections(kind="tcp"))
