"""What a gateway asks of its own engine before it is ready."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from expert_mesh import Client
from gateway.engine_link import EngineLink
from gateway.rehearsal import Rehearsal, scenes
from mesh.config import GatewayConfig
from mesh.errors import EngineDied, ExpertUnavailable
from protos import engine_pb2 as pb
from tests.running import DEMO_MODEL, running_mesh
from tests.scripted_engine import MAX_MODEL_LEN, ScriptedEngine, linked_engine

VOCAB_SIZE = 300
SMALL = GatewayConfig(max_running=6, max_batch_tokens=100, rehearsal_s=30)


def sizes(config: GatewayConfig, started: pb.Started) -> list[tuple[int, int]]:
    """Requests of each scene, and their tokens of prompt together."""
    return [
        (len(scene.lengths), sum(prompt for prompt, _ in scene.lengths))
        for scene in scenes(config, started)
    ]


def test_every_size_of_batch_decodes_and_every_size_of_prompts_is_taken() -> None:
    config = GatewayConfig(device="cuda", max_running=200)
    started = pb.Started(kv_blocks=10_000, kv_block_size=16, max_model_len=20_000)
    all_sizes = sizes(config, started)
    together = [count for count, _ in all_sizes]
    assert together[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 200]
    tokens = [num_tokens for count, num_tokens in all_sizes if count == 16][1:]
    assert tokens == [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert all_sizes[-1] == (2, 4 + 12_288)  # in two pieces


@given(
    max_running=st.integers(1, 70),
    max_batch_tokens=st.integers(70, 3000),
    max_model_len=st.integers(2, 5000),
    kv_blocks=st.integers(1, 300),
)
def test_no_request_is_longer_than_there_is_room_for(
    max_running: int, max_batch_tokens: int, max_model_len: int, kv_blocks: int
) -> None:
    config = GatewayConfig(max_running=max_running, max_batch_tokens=max_batch_tokens)
    started = pb.Started(kv_blocks=kv_blocks, kv_block_size=16, max_model_len=max_model_len)
    for scene in scenes(config, started):
        assert 1 <= len(scene.lengths) <= max_running
        for prompt, output in scene.lengths:
            assert prompt >= 1
            assert output >= 1
            assert prompt + output <= min(max_model_len, 16 * kv_blocks)


async def rehearse(config: GatewayConfig, engine: ScriptedEngine, link: EngineLink) -> None:
    engine.start()
    await link.started
    rehearsal = Rehearsal(config, VOCAB_SIZE, link)
    assert not rehearsal.over
    await rehearsal.run()
    assert rehearsal.over


async def test_all_is_asked_a_scene_at_a_time_and_nothing_is_left() -> None:
    async with linked_engine() as (engine, link):
        asked: list[pb.Submit] = []

        def answer(submit: pb.Submit) -> None:
            asked.append(submit)
            engine.say(submit, b"x")
            engine.say(submit, b"y" * (submit.sampling.max_tokens - 1), "length")

        engine.answer = answer
        with capture_logs() as events:
            await rehearse(SMALL, engine, link)
        assert [event["event"] for event in events] == ["rehearsed"]
        of_scenes = [
            length for scene in scenes(SMALL, await link.started) for length in scene.lengths
        ]
        lengths = [(len(one.prompt_token_ids), one.sampling.max_tokens) for one in asked]
        assert lengths == of_scenes
        assert len({tuple(one.prompt_token_ids) for one in asked}) == len(asked)
        assert len({one.request_id for one in asked}) == len(asked)
        for one in asked:
            assert max(one.prompt_token_ids) < VOCAB_SIZE
            assert len(one.prompt_token_ids) + one.sampling.max_tokens <= MAX_MODEL_LEN
            assert one.sampling.ignore_eos
            assert one.sampling.top_p
            assert one.sampling.repetition_penalty
        arrivals = [one.arrival_s for one in asked]
        assert all(before <= after for before, after in pairwise(arrivals))
        assert link.silent_s() == 0  # it owes nothing


async def test_what_fails_breaks_it_off_and_says_why() -> None:
    async with linked_engine() as (engine, link):
        error = {"error_code": ExpertUnavailable.__name__, "error_message": "nobody has it"}
        engine.answer = lambda submit: engine.say(submit, b"", "error", **error)
        with capture_logs() as events:
            await rehearse(SMALL, engine, link)
        assert [event["event"] for event in events] == ["rehearsal_failed", "rehearsed"]
        assert "nobody has it" in events[0]["error"]
        await engine.submitted()
        assert engine.nothing_new


async def test_an_engine_that_dies_amid_it_ends_it() -> None:
    async with linked_engine() as (engine, link):
        engine.answer = lambda submit: engine.die()
        with capture_logs() as events:
            await rehearse(SMALL, engine, link)
        assert [event["event"] for event in events] == ["rehearsal_failed", "rehearsed"]
        with pytest.raises(EngineDied):
            link.submit(pb.Submit(request_id="later"), lambda output, now: None)


async def test_its_time_is_bounded_and_what_is_under_way_then_is_cancelled() -> None:
    async with linked_engine() as (engine, link):
        began_s = time.monotonic()
        with capture_logs() as events:
            await rehearse(GatewayConfig(rehearsal_s=0.2), engine, link)
        assert time.monotonic() - began_s >= 0.2
        assert [event["event"] for event in events] == ["rehearsal_cut_short", "rehearsed"]
        submit = await engine.submitted()
        assert await asyncio.wait_for(engine.cancelled(), 5) == submit.request_id


async def test_without_one_there_is_nothing_to_wait_for() -> None:
    async with linked_engine() as (_, link):
        assert Rehearsal(GatewayConfig(), VOCAB_SIZE, link).over


def has_computed(client: Client) -> bool:
    """As far as the engine has told, which it does twice a second."""
    return any(one.rows for one in client.server_info().expert_rows)


def test_a_gateway_is_ready_behind_its_rehearsal_and_answers_as_without() -> None:
    mesh_flags = ["--model", DEMO_MODEL, "--experts-per-worker", "8", "--no-prefix-cache"]
    answers = []
    for flags in ([], ["--rehearsal-s", "30"]):
        with running_mesh(*mesh_flags, *flags) as mesh, Client(mesh.gateway) as client:
            told_by_s = time.monotonic() + 2
            while not has_computed(client) and time.monotonic() < told_by_s:
                time.sleep(0.1)
            assert has_computed(client) is bool(flags)
            answers.append(client.complete("In the beginning", max_tokens=24, temperature=0.0).text)
    assert answers[0] == answers[1]
