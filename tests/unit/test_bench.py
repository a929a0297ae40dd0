"""``expert-mesh bench serve``: its arithmetic, and a run against a scripted engine."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import start_http_server

from cli import engine_time
from cli.bench import (
    Goal,
    Record,
    file_tasks,
    parse_length,
    parse_loads,
    random_tasks,
    run,
    spread,
    summarize,
)
from cli.main import main
from expert_mesh import AsyncClient
from mesh.errors import ConfigError
from protos import engine_pb2
from tests.scripted_engine import Rig, scripted_front


def record(*message_times_s: float, tokens: int = 1, input_tokens: int = 4) -> Record:
    """A request whose messages of ``tokens`` tokens came at these times."""
    made = Record(input_tokens=input_tokens)
    for time_s in message_times_s:
        made.add_tokens(tokens, time_s)
    made.e2el_s = message_times_s[-1]
    return made


def test_tokens_of_one_message_share_the_time_since_the_one_before() -> None:
    made = record(0.5, 0.7, tokens=2)
    assert made.ttft_s == 0.5
    assert made.itl_s == pytest.approx([0.0, 0.1, 0.1])
    assert made.tpot_s == pytest.approx(0.2 / 3)


def test_a_single_token_has_no_time_per_later_token() -> None:
    assert record(0.5).tpot_s is None


def test_the_spread_of_hundred_and_one_values() -> None:
    values = spread([float(n) for n in range(101)])
    assert values is not None
    assert (values["mean"], values["p50"], values["p90"], values["p99"]) == (50, 50, 90, 99)
    assert values["std"] == pytest.approx(29.15, abs=0.01)
    assert spread([2.0]) == {"mean": 2.0, "std": 0.0, "p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert spread([]) is None


def test_the_report_counts_what_completed_and_names_what_failed() -> None:
    records = [record(0.1, 0.2), record(0.3, 0.4, 0.5), Record(error="Overloaded: full")]
    report = summarize(records, duration_s=2.0, goal=Goal(ttft_s=0.2))
    assert (report["completed"], report["failed"]) == (2, 1)
    assert (report["input_tokens"], report["output_tokens"]) == (8, 5)
    assert report["request_throughput"] == 1.0
    assert report["output_token_throughput"] == 2.5
    assert report["total_token_throughput"] == 6.5
    assert report["goodput"] == 0.5
    assert report["ttft_s"]["p50"] == pytest.approx(0.2)
    assert report["errors"] == {"Overloaded: full": 1}


def test_a_goal_is_kept_or_missed_on_each_side() -> None:
    slow_tokens = record(0.1, 0.9)
    assert Goal(ttft_s=0.2).met_by(slow_tokens)
    assert not Goal(ttft_s=0.2, tpot_s=0.5).met_by(slow_tokens)


def test_lengths_are_numbers_or_ranges() -> None:
    assert parse_length("64", "--input-len") == (64, 64)
    assert parse_length("8-16", "--input-len") == (8, 16)
    for text in ("", "x", "0", "9-3", "-4"):
        with pytest.raises(ConfigError, match="--input-len"):
            parse_length(text, "--input-len")


def test_loads_are_one_number_or_several() -> None:
    assert (parse_loads("8"), parse_loads("1,8,32")) == ([8], [1, 8, 32])
    for text in ("", "x", "0", "8,", "1,-4"):
        with pytest.raises(ConfigError, match="--concurrency"):
            parse_loads(text)


def seconds(step: float, wait: float, host: float | None = None) -> str:
    """What a gateway with a model of this name says of its engine."""
    parts = {"engine_step_seconds": step, "expert_wait_seconds": wait, "engine_host_seconds": host}
    return "".join(
        f'# TYPE expert_mesh:{name} counter\nexpert_mesh:{name}_total{{model_name="m"}} {value}\n'
        for name, value in parts.items()
        if value is not None
    )


def test_shares_of_the_engines_time_are_of_all_gateways_and_of_what_they_count() -> None:
    before = engine_time.parse([seconds(1, 0.5, 0), seconds(2, 1, 1)])
    after = engine_time.parse([seconds(5, 2.5, 1), seconds(8, 3, 2)])
    assert after.shares_since(before) == {"host_share": 0.2, "expert_wait_share": 0.4}
    older = engine_time.parse([seconds(5, 2.5, 1), seconds(8, 3)])
    assert older.shares_since(before) == {"host_share": None, "expert_wait_share": 0.4}
    assert after.shares_since(after) == {"host_share": None, "expert_wait_share": None}


def test_random_tasks_repeat_with_the_seed_and_keep_their_bounds() -> None:
    made = random_tasks(50, (2, 5), (1, 3), 10, random.Random(1))
    assert made == random_tasks(50, (2, 5), (1, 3), 10, random.Random(1))
    assert {len(task.prompt) for task in made} == {2, 3, 4, 5}
    assert {task.output_len for task in made} == {1, 2, 3}
    assert {token for task in made for token in task.prompt} == set(range(10))


def test_prompts_of_a_file_come_round_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("one\n\ntwo\n")
    prompts = [task.prompt for task in file_tasks(path, 3, (4, 4), random.Random(0))]
    assert prompts == ["one", "two", "one"]
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        file_tasks(path, 3, (4, 4), random.Random(0))
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="must be UTF-8 text"):
        file_tasks(path, 3, (4, 4), random.Random(0))


def answer_all(rig: Rig) -> None:
    def answer(submit: engine_pb2.Submit) -> None:
        assert submit.sampling.ignore_eos
        assert submit.sampling.temperature == 0
        rig.engine.say(submit, b"x" * submit.sampling.max_tokens, "length")

    rig.engine.answer = answer


async def test_no_more_are_in_flight_than_asked_for() -> None:
    async with scripted_front() as rig, AsyncClient(rig.target) as client:
        tasks = random_tasks(3, (2, 2), (1, 1), 10, random.Random(0))
        running = asyncio.create_task(run([client], tasks, concurrency=2))
        first, second = await rig.engine.submitted(), await rig.engine.submitted()
        await client.model_info()
        assert rig.engine.nothing_new
        rig.engine.say(first, b"x", "length")
        third = await rig.engine.submitted()
        for submit in (second, third):
            rig.engine.say(submit, b"x", "length")
        records, _ = await running
        assert [record.error for record in records] == [""] * 3


async def test_a_run_against_a_gateway_is_reported_as_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with scripted_front() as rig:
        answer_all(rig)
        argv = ["bench", "serve", "--target", rig.target, "--num-requests", "5", "--rate", "1000"]
        argv += ["--input-len", "4-8", "--output-len", "3", "--json"]
        assert await asyncio.to_thread(main, argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["completed"], report["failed"], report["output_tokens"]) == (5, 0, 15)
    assert 20 <= report["input_tokens"] <= 40
    assert set(report["ttft_s"]) == {"mean", "std", "p50", "p90", "p99"}


async def test_several_loads_are_a_run_each_with_shares_of_the_engines_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_time, "_FRESH_S", 0.0)
    async with scripted_front() as rig:
        server, thread = start_http_server(0, "127.0.0.1", rig.registry)
        stats = engine_pb2.EngineStats()

        def answer(submit: engine_pb2.Submit) -> None:
            stats.step_s += 1.0
            stats.expert_wait_s += 0.25
            rig.engine.send(engine_pb2.FromEngine(stats=stats))
            rig.engine.say(submit, b"x" * submit.sampling.max_tokens, "length")

        rig.engine.answer = answer
        argv = ["bench", "serve", "--target", f"{rig.target},{rig.target}", "--num-requests", "4"]
        argv += ["--input-len", "4", "--output-len", "3", "--concurrency", "1,4"]
        argv += ["--metrics", f"127.0.0.1:{server.server_port}"]
        assert await asyncio.to_thread(main, [*argv, "--json"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(line["concurrency"], line["completed"]) for line in lines] == [(1, 4), (4, 4)]
        assert [line["expert_wait_share"] for line in lines] == [0.25, 0.25]
        assert await asyncio.to_thread(main, argv) == 0
        shown = capsys.readouterr().out
        assert "in flight" in shown
        assert shown.count("25.0%") == 2
        too_few = [*argv, "--num-requests", "3"]
        assert await asyncio.to_thread(main, too_few) == 2
        assert "--num-requests 3 is less" in capsys.readouterr().err
        server.shutdown()
        thread.join()
        server.server_close()
        assert await asyncio.to_thread(main, argv) == 1
        assert "no metrics at http://127.0.0.1" in capsys.readouterr().err


async def test_a_table_for_a_person_and_refusals_for_nobody_served(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with scripted_front() as rig:
        answer_all(rig)
        argv = ["bench", "serve", "--target", rig.target, "--num-requests", "2"]
        assert await asyncio.to_thread(main, [*argv, "--input-len", "8", "--output-len", "4"]) == 0
        assert "TTFT" in capsys.readouterr().out
        assert await asyncio.to_thread(main, [*argv, "--input-len", "64"]) == 2
        assert "do not fit the context of 64" in capsys.readouterr().err
        rig.engine.answer = lambda submit: rig.engine.say(
            *(submit, b"", "error"), error_code="Overloaded", error_message="full"
        )
        assert await asyncio.to_thread(main, [*argv, "--input-len", "8", "--output-len", "4"]) == 1
        assert "no request completed; the first error: Overloaded: full" in capsys.readouterr().err


def test_what_a_worker_says_is_not_among_its_answers() -> None:
    """Nobody reads its standard output while it serves: full, that would hold it up for ever."""
    order = {"device": "cpu", "dtype": "float32", "threads": 1, "worker_id": "w", "experts": []}
    order |= {"hidden": 8, "mlp_hidden": 8, "kind": "plain", "num_experts": 1, "max_rows": 8}
    says = (
        "import sys, structlog; from cli import layer_worker; "
        "layer_worker.answer_asked = lambda *_, **__: structlog.get_logger().warning('refused'); "
        "layer_worker.main()"
    )
    command = [sys.executable, "-c", says, json.dumps(order)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == ""
    assert "refused" in said.stderr
