"""The public API over a real socket, with an engine that says what the test tells it to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from expert_mesh import AsyncClient, Chunk
from gateway.calls import Call, Choice
from gateway.metrics import GatewayMetrics
from gateway.text import ChoiceText
from mesh.errors import (
    AlreadyExists,
    DeadlineExceeded,
    ExpertUnavailable,
    InvalidInput,
    MeshError,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from mesh.grpc_server import open_channel
from protos import engine_pb2, placement_pb2
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.byte_tokenizer import EOS
from tests.scripted_engine import MAX_MODEL_LEN, Rig, scripted_front
from tests.unread import Unread


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with scripted_front() as rig:
        yield rig


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(rig.target) as client:
        yield client


async def collect(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


async def test_what_a_request_leaves_out_is_the_checkpoints() -> None:
    defaults = pb.SamplingParams(top_k=7, temperature=0.5)
    async with scripted_front(defaults=defaults) as rig, AsyncClient(rig.target) as client:
        first = asyncio.create_task(anext(client.generate("ab", max_tokens=1, temperature=0)))
        submit = await rig.engine.submitted()
        assert (submit.sampling.top_k, submit.sampling.temperature) == (7, 0.0)
        first.cancel()


async def test_tokens_stream_as_text(rig: Rig, client: AsyncClient) -> None:
    stream = client.generate("ab", request_id="r1", max_tokens=3, temperature=0)
    first = asyncio.create_task(anext(stream))
    submit = await rig.engine.submitted()
    assert list(submit.prompt_token_ids) == list(b"ab")
    assert (submit.sampling.max_tokens, submit.sampling.top_p) == (3, 1.0)
    rig.engine.say(submit, b"x")
    chunk = await first
    assert (chunk.request_id, chunk.text, chunk.token_ids, chunk.finish_reason) == (
        *("r1", "x", (ord("x"),), ""),
    )
    rig.engine.say(submit, b"yz", "length")
    (last,) = await collect(stream)
    assert (last.text, last.finish_reason) == ("yz", "length")
    assert last.usage == (2, 3, 0)
    assert last.timing is not None
    assert last.timing.queue_s == pytest.approx(0.001)
    assert 0 < last.timing.ttft_s <= last.timing.e2e_s


async def test_what_comes_while_a_message_is_on_its_way_goes_in_one(
    rig: Rig, client: AsyncClient
) -> None:
    stream = asyncio.create_task(collect(client.generate("ab", max_tokens=50)))
    submit = await rig.engine.submitted()
    outputs = [engine_pb2.Output(request_id=submit.request_id, token_ids=[c]) for c in b"x" * 50]
    outputs[-1].finish_reason = "length"
    rig.engine.send(engine_pb2.FromEngine(outputs=engine_pb2.Outputs(outputs=outputs)))
    (chunk,) = await stream
    assert (chunk.text, len(chunk.token_ids)) == ("x" * 50, 50)


async def test_without_stream_there_is_one_message_a_choice(rig: Rig, client: AsyncClient) -> None:
    whole = asyncio.create_task(client.complete("ab", max_tokens=2))
    submit = await rig.engine.submitted()
    rig.engine.say(submit, b"x")
    rig.engine.say(submit, b"y", "length")
    assert (await whole).text == "xy"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_too_long_for_one_message_comes_in_several(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.calls._FULL_BYTES", 500)
    async with (
        scripted_front(max_message_bytes=2000) as rig,
        AsyncClient(rig.target) as client,
    ):
        top = [pb.TokenLogprob(token_id=i, logprob=-1.5) for i in range(20)]

        def answer(submit: engine_pb2.Submit) -> None:
            outputs = [
                engine_pb2.Output(
                    request_id=submit.request_id,
                    token_ids=[c],
                    logprobs=[pb.PositionLogprobs(chosen=top[0], top=top)],
                )
                for c in b"x" * 50
            ]
            outputs[-1].finish_reason = "length"
            rig.engine.send(engine_pb2.FromEngine(outputs=engine_pb2.Outputs(outputs=outputs)))

        rig.engine.answer = answer
        request = pb.GenerateRequest(prompt="ab", stream=stream)
        request.sampling.max_tokens, request.sampling.logprobs = 50, 20
        async with open_channel(rig.target) as channel:
            replies = await collect(InferenceStub(channel).Generate(request))
        assert len(replies) > 2
        assert [reply.finish_reason for reply in replies[-2:]] == ["", "length"]
        assert b"".join(bytes(reply.token_ids) for reply in replies) == b"x" * 50
        assert sum(len(reply.logprobs) for reply in replies) == 50
        assert (await client.complete("ab", max_tokens=50, logprobs=20)).text == "x" * 50


async def test_half_a_character_waits_for_the_other_half(rig: Rig, client: AsyncClient) -> None:
    stream = client.generate("ab")
    first = asyncio.create_task(anext(stream))
    submit = await rig.engine.submitted()
    rig.engine.say(submit, "é".encode()[:1])
    assert (await first).text == ""
    rig.engine.say(submit, "é".encode()[1:], "length")
    assert [chunk.text for chunk in await collect(stream)] == ["é"]


async def test_the_end_of_sequence_is_not_text(rig: Rig, client: AsyncClient) -> None:
    whole = asyncio.create_task(client.complete("ab"))
    submit = await rig.engine.submitted()
    output = engine_pb2.Output(
        request_id=submit.request_id, token_ids=[*b"ok", EOS], finish_reason="stop"
    )
    rig.engine.send(engine_pb2.FromEngine(outputs=engine_pb2.Outputs(outputs=[output])))
    completion = await whole
    assert (completion.text, completion.token_ids) == ("ok", (*b"ok", EOS))


async def test_three_choices_are_three_seeded_requests(rig: Rig, client: AsyncClient) -> None:
    whole = asyncio.create_task(client.complete("ab", n=3, seed=7, max_tokens=1))
    submits = [await rig.engine.submitted() for _ in range(3)]
    assert [submit.sampling.seed for submit in submits] == [7, 8, 9]
    assert len({submit.request_id for submit in submits}) == 3
    for submit, letter in reversed(list(zip(submits, (b"x", b"y", b"z"), strict=True))):
        rig.engine.say(submit, letter, "length")
    completion = await whole
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        *((0, "x"), (1, "y"), (2, "z")),
    ]


async def test_a_stop_string_over_tokens_ends_the_request_in_the_engine(
    rig: Rig, client: AsyncClient
) -> None:
    stream = asyncio.create_task(collect(client.generate("ab", stop=["END"])))
    submit = await rig.engine.submitted()
    assert len(submit.sampling.stop) == 0
    for letter in (b"g", b"o", b"E", b"N", b"D", b"!"):
        rig.engine.say(submit, letter)
    chunks = await stream
    assert "".join(chunk.text for chunk in chunks) == "go"
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", "END")
    assert chunks[-1].usage == (2, 5, 0)
    assert await rig.engine.cancelled() == submit.request_id


async def test_logprobs_ride_along(rig: Rig, client: AsyncClient) -> None:
    whole = asyncio.create_task(client.complete("ab", logprobs=1, max_tokens=1))
    submit = await rig.engine.submitted()
    assert submit.sampling.logprobs == 1
    position = pb.PositionLogprobs(
        chosen=pb.TokenLogprob(token_id=120, logprob=-0.5),
        top=[pb.TokenLogprob(token_id=121, logprob=-0.25)],
    )
    output = engine_pb2.Output(
        request_id=submit.request_id, token_ids=b"x", logprobs=[position], finish_reason="length"
    )
    rig.engine.send(engine_pb2.FromEngine(outputs=engine_pb2.Outputs(outputs=[output])))
    assert (await whole).choices[0].logprobs == (((120, -0.5), ((121, -0.25),)),)


async def test_a_client_that_vanishes_frees_its_request(rig: Rig, client: AsyncClient) -> None:
    async with aclosing(client.generate("ab", n=2)) as stream:
        first = asyncio.create_task(anext(stream))
        submits = [await rig.engine.submitted() for _ in range(2)]
        rig.engine.say(submits[0], b"x")
        await first
    cancelled = {await rig.engine.cancelled(), await rig.engine.cancelled()}
    assert cancelled == {submit.request_id for submit in submits}
    # Whatever the engine still had to say of them harms nobody.
    rig.engine.say(submits[0], b"y", "cancelled")
    whole = asyncio.create_task(client.complete("cd", max_tokens=1))
    rig.engine.say(await rig.engine.submitted(), b"z", "length")
    assert (await whole).text == "z"


async def test_cancel_ends_the_stream_with_a_last_message(rig: Rig, client: AsyncClient) -> None:
    stream = asyncio.create_task(collect(client.generate("ab", request_id="mine")))
    submit = await rig.engine.submitted()
    rig.engine.say(submit, b"x")
    assert await client.cancel("mine")
    assert await rig.engine.cancelled() == submit.request_id
    rig.engine.say(submit, b"", "cancelled")
    chunks = await stream
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (
        *("x", "cancelled"),
    )
    assert not await client.cancel("mine")


async def test_an_id_in_flight_is_taken_and_free_again_afterwards(
    rig: Rig, client: AsyncClient
) -> None:
    first = asyncio.create_task(client.complete("ab", request_id="mine"))
    submit = await rig.engine.submitted()
    with pytest.raises(AlreadyExists, match="'mine' is in flight"):
        await client.complete("ab", request_id="mine")
    rig.engine.say(submit, b"x", "length")
    await first
    again = asyncio.create_task(client.complete("ab", request_id="mine"))
    second = await rig.engine.submitted()
    assert second.request_id != submit.request_id
    rig.engine.say(second, b"y", "length")
    assert (await again).text == "y"


async def test_the_deadline_of_the_call_is_the_deadline_of_the_request(
    rig: Rig, client: AsyncClient
) -> None:
    before_s = time.monotonic()
    whole = asyncio.create_task(client.complete("ab", timeout_s=100))
    submit = await rig.engine.submitted()
    assert before_s + 90 < submit.deadline_s < time.monotonic() + 101
    rig.engine.say(*(submit, b"", "error"), error_code="DeadlineExceeded", error_message="too late")
    with pytest.raises(DeadlineExceeded, match="too late"):
        await whole


async def test_without_a_deadline_there_is_none(rig: Rig, client: AsyncClient) -> None:
    whole = asyncio.create_task(client.complete("ab"))
    submit = await rig.engine.submitted()
    assert submit.deadline_s == 0
    rig.engine.say(submit, b"x", "length")
    await whole


async def test_a_deadline_that_passes_frees_the_request(rig: Rig, client: AsyncClient) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.complete("ab", timeout_s=0.2)
    submit = await rig.engine.submitted()
    assert await rig.engine.cancelled() == submit.request_id


async def test_an_error_of_the_engine_is_the_status_of_the_call(
    rig: Rig, client: AsyncClient
) -> None:
    whole = asyncio.create_task(client.complete("ab", n=2))
    submits = [await rig.engine.submitted() for _ in range(2)]
    lost = ExpertUnavailable(3, 5, "its worker died")
    rig.engine.say(*(submits[0], b"", "error"), error_code=lost.code, error_message=str(lost))
    with pytest.raises(Unavailable, match="expert 5 of layer 3 is unavailable: its worker died"):
        await whole
    assert await rig.engine.cancelled() == submits[1].request_id


async def test_the_death_of_the_engine_ends_every_stream(rig: Rig, client: AsyncClient) -> None:
    streams = [asyncio.create_task(collect(client.generate("ab"))) for _ in range(3)]
    for _ in streams:
        rig.engine.say(await rig.engine.submitted(), b"x")
    rig.engine.die()
    for stream in streams:
        with pytest.raises(Unavailable, match="engine process ended"):
            await stream
    with pytest.raises(Unavailable, match="engine process ended"):
        await client.complete("ab")
    assert rig.link.ended


async def test_past_the_queue_requests_are_refused_at_the_door() -> None:
    async with (
        scripted_front(max_running=2, max_waiting=1) as rig,
        AsyncClient(rig.target) as client,
    ):
        running = [asyncio.create_task(client.complete("ab")) for _ in range(3)]
        submits = [await rig.engine.submitted() for _ in running]
        with pytest.raises(Overloaded, match="3 requests are in flight and the gateway takes 3"):
            await client.complete("ab")
        rig.engine.say(submits[0], b"x", "length")
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(Overloaded):
            await client.complete("ab", n=2)
        fits = asyncio.create_task(client.complete("ab"))
        for submit in (*submits[1:], await rig.engine.submitted()):
            rig.engine.say(submit, b"x", "length")
        await asyncio.gather(*running, fits)


async def test_a_client_that_does_not_read_frees_its_request() -> None:
    async with (
        scripted_front(max_running=1, max_waiting=0, longest_write_s=0.05) as rig,
        AsyncClient(rig.target) as client,
    ):
        rig.engine.answer = lambda submit: rig.engine.say(submit, b"x")
        with closing(Unread(rig.target)) as unread:
            request = pb.GenerateRequest(prompt="ab", stream=True)
            unread.call("/expertmesh.v1.Inference/Generate", request.SerializeToString())
            submit = await rig.engine.submitted()
            assert await asyncio.wait_for(rig.engine.cancelled(), 10) == submit.request_id
            rig.engine.answer = lambda submit: rig.engine.say(submit, b"y", "length")
            assert (await client.complete("ab")).text == "y"


async def test_until_the_model_is_loaded_calls_are_told_to_come_back() -> None:
    async with (
        scripted_front(started=False) as rig,
        AsyncClient(rig.target) as client,
    ):
        with pytest.raises(Unavailable, match="loading its model"):
            await client.complete("ab")
        with pytest.raises(Unavailable, match="loading its model"):
            await client.model_info()


async def test_a_draining_front_finishes_what_runs_and_takes_nothing_new(
    rig: Rig, client: AsyncClient
) -> None:
    running = asyncio.create_task(client.complete("ab"))
    submit = await rig.engine.submitted()
    draining = asyncio.create_task(rig.front.drain(timeout_s=60))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="shutting down"):
        await client.complete("ab")
    assert not draining.done()
    rig.engine.say(submit, b"x", "length")
    assert (await running).text == "x"
    assert await draining


BAD_REQUESTS: list[tuple[Any, dict[str, Any], type[MeshError], str]] = [
    ("", {}, InvalidInput, "prompt is empty"),
    ([], {}, InvalidInput, "the prompt has no tokens"),
    ([1] * MAX_MODEL_LEN, {}, InvalidInput, "has 64 tokens and the context 64"),
    ("x" * 300, {}, InvalidInput, "has 300 tokens and the context 64"),
    ("x" * 100_000, {}, InvalidInput, "has 100000 characters; the context of 64 tokens holds 320"),
    ([257], {}, InvalidInput, "257, outside the vocabulary of 0 to 256"),
    ("a", {"temperature": -1.0}, InvalidInput, "temperature -1"),
    ("a", {"temperature": float("nan")}, InvalidInput, "temperature nan"),
    ("a", {"top_p": 0.0}, InvalidInput, "top_p 0"),
    ("a", {"n": 100_000}, InvalidInput, "n 100000 must be 1 to 16"),
    ("a", {"max_tokens": 4_000_000_000}, InvalidInput, "max_tokens 4000000000"),
    ("a", {"stop": ["x"] * 1_000_000}, InvalidInput, "stop has 1000000 strings"),
    ("a", {"model": "other"}, ModelNotFound, "'other' is not served here; ask for 'tiny'"),
    ("a", {"request_id": "no spaces"}, InvalidInput, "request_id 'no spaces'"),
]


@pytest.mark.parametrize(("prompt", "fields", "error", "message"), BAD_REQUESTS)
async def test_bad_input_is_refused_by_name(
    prompt: Any, fields: dict[str, Any], error: type[MeshError], message: str
) -> None:
    async with scripted_front() as rig, AsyncClient(rig.target) as client:
        with pytest.raises(error, match=message):
            await client.complete(prompt, **fields)
        await serves_on(rig, client)


async def serves_on(rig: Rig, client: AsyncClient) -> None:
    """The next request is served as if nothing had been."""
    whole = asyncio.create_task(client.complete("ab", max_tokens=1))
    rig.engine.say(await rig.engine.submitted(), b"z", "length")
    assert (await whole).text == "z"


@pytest.mark.parametrize(
    "body", [b"\x1a\x02\xff\xfe", b"\xff\xff\xff\xff"], ids=["not-utf8", "not-protobuf"]
)
async def test_bytes_that_are_no_request_are_refused_by_name(
    rig: Rig, client: AsyncClient, body: bytes
) -> None:
    async with open_channel(rig.target) as channel:
        call = channel.unary_stream(
            "/expertmesh.v1.Inference/Generate", request_serializer=lambda body: body
        )
        with pytest.raises(grpc.aio.AioRpcError, match="Error parsing message") as refused:
            await call(body).read()
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    await serves_on(rig, client)


async def test_a_message_over_the_limit_is_refused(rig: Rig, client: AsyncClient) -> None:
    async with open_channel(rig.target, max_message_bytes=64 << 20) as channel:
        call = channel.unary_stream(
            "/expertmesh.v1.Inference/Generate", request_serializer=lambda body: body
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(pb.GenerateRequest(prompt="x" * (5 << 20)).SerializeToString()).read()
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (refused.value.details() or "")
    await serves_on(rig, client)


async def test_without_a_tokenizer_ids_are_served_and_text_names_the_remedy() -> None:
    async with scripted_front(with_tokenizer=False) as rig, AsyncClient(rig.target) as client:
        for refused in (client.complete("ab"), client.tokenize("ab")):
            with pytest.raises(InvalidInput, match="send prompt_token_ids"):
                await refused
        whole = asyncio.create_task(client.complete([1, 2], max_tokens=1))
        rig.engine.say(await rig.engine.submitted(), b"\x05", "length")
        completion = await whole
        assert (completion.text, completion.token_ids) == ("", (5,))
        assert not (await client.model_info()).has_tokenizer


async def test_a_thousand_clients_at_once() -> None:
    async with scripted_front(max_running=256, max_waiting=1000) as rig:

        def answer(submit: engine_pb2.Submit) -> None:
            prompt = bytes(submit.prompt_token_ids)
            rig.engine.say(submit, prompt[:1])
            rig.engine.say(submit, prompt[1:], "length")

        rig.engine.answer = answer
        clients = [AsyncClient(rig.target) for _ in range(4)]
        calls = [clients[i % 4].complete(f"number {i}") for i in range(1000)]
        completions = await asyncio.gather(*calls)
        assert [completion.text for completion in completions] == [
            f"number {i}" for i in range(1000)
        ]
        for client in clients:
            await client.close()


async def test_tokenize_and_what_is_served(rig: Rig, client: AsyncClient) -> None:
    assert await client.tokenize("hé") == list("hé".encode())
    model = await client.model_info()
    assert (model.model, model.family, model.num_experts) == ("tiny", "mixtral", 16)
    assert (model.max_model_len, model.dtype, model.has_tokenizer) == (
        MAX_MODEL_LEN,
        "float32",
        True,
    )


async def test_the_server_says_how_it_is_doing(rig: Rig, client: AsyncClient) -> None:
    load = placement_pb2.ExpertLoad(expert=placement_pb2.ExpertId(layer=1, index=2), rows=40)
    stats = engine_pb2.EngineStats(running=2, waiting=1, kv_usage=0.5, epoch=7, load=[load])
    stats.failovers, stats.replayed_rows, stats.pause_s, stats.stalled_s = 2, 9, 0.5, 1.5
    stats.paces.add(worker_id="w3", dispatch_s=0.25, row_s=0.125)
    rig.engine.send(engine_pb2.FromEngine(stats=stats))
    await rig.link.until_epoch(7)
    info = await client.server_info()
    assert (info.gateway_id, info.epoch, info.num_workers) == ("gateway-1", 7, 3)
    assert (info.running, info.waiting, info.kv_usage, info.kv_blocks) == (2, 1, 0.5, 100)
    assert [(rows.layer, rows.index, rows.rows) for rows in info.expert_rows] == [(1, 2, 40)]
    assert (info.failovers, info.replayed_rows, info.pause_s, info.stalled_s) == (2, 9, 0.5, 1.5)
    assert [(w.worker_id, w.dispatch_s, w.row_s) for w in info.workers] == [("w3", 0.25, 0.125)]
    labels = {"model_name": "tiny", "layer": "1", "expert": "2"}
    value = rig.registry.get_sample_value
    assert value("expert_mesh:expert_dispatched_rows_total", labels) == 40
    assert value("expert_mesh:num_requests_running", {"model_name": "tiny"}) == 2
    assert value("expert_mesh:failovers_total", {"model_name": "tiny"}) == 2
    assert value("expert_mesh:failover_pause_seconds_total", {"model_name": "tiny"}) == 0.5
    labels = {"model_name": "tiny", "worker_id": "w3"}
    assert value("expert_mesh:worker_dispatch_seconds", labels) == 0.25


async def test_finished_requests_are_counted_and_timed(rig: Rig, client: AsyncClient) -> None:
    whole = asyncio.create_task(client.complete("ab", max_tokens=2))
    submit = await rig.engine.submitted()
    rig.engine.say(submit, b"x")
    rig.engine.say(submit, b"y", "length")
    await whole
    value = rig.registry.get_sample_value
    model = {"model_name": "tiny"}
    assert value("expert_mesh:request_success_total", {**model, "finished_reason": "length"}) == 1
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ):
        assert value(f"expert_mesh:{name}_count", model) == 1, name


async def test_a_finished_request_is_one_event_without_its_text(
    rig: Rig, client: AsyncClient
) -> None:
    whole = asyncio.create_task(client.complete("a secret", request_id="mine", max_tokens=1))
    submit = await rig.engine.submitted()
    rig.engine.say(submit, b"x", "length")
    await whole
    (event,) = [event for event in rig.events if event["event"] == "request_finished"]
    assert (event["request_id"], event["engine_id"]) == ("mine", submit.request_id)
    assert (event["prompt_tokens"], event["completion_tokens"]) == (8, 1)
    assert (event["finish_reason"], event["error"]) == ("length", "")
    assert "secret" not in str(event)


async def test_an_engine_that_owes_something_is_pinged_and_its_silence_is_known(
    rig: Rig, client: AsyncClient
) -> None:
    assert rig.link.silent_s() == 0.0
    whole = asyncio.create_task(client.complete("ab"))
    submit = await rig.engine.submitted()
    await rig.engine.pings.get()
    assert rig.link.silent_s() > 0
    rig.engine.say(submit, b"x", "length")
    await whole
    assert rig.link.silent_s() == 0.0


async def test_in_a_pause_tokens_gather_and_the_end_is_told_at_once() -> None:
    now = time.monotonic()
    call = Call("r", [1], arrival_s=now)
    choice = Choice(0, "r#1", ChoiceText(None, [1], pb.SamplingParams()), call)
    choice.deliver(engine_pb2.Output(token_ids=[5]), now)
    await call.news()
    call.pause(3600)
    told = asyncio.create_task(call.news())
    choice.deliver(engine_pb2.Output(token_ids=[6]), now)
    await asyncio.sleep(0)
    assert not told.done()
    choice.deliver(engine_pb2.Output(token_ids=[7], finish_reason="length"), now)
    await told
    choice.advance(GatewayMetrics(CollectorRegistry(), "tiny", engine_pb2.EngineStats))
    assert list(choice.take_replies()[0].token_ids) == [5, 6, 7]
    call.close()


async def test_after_a_pause_what_gathered_is_told() -> None:
    call = Call("r", [1], arrival_s=time.monotonic())
    call.pause(0.01)
    call.note_arrival(time.monotonic(), ends=False)
    await call.news()


async def test_a_long_text_is_tokenized_beside_the_event_loop(
    rig: Rig, client: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.front._INLINE_CHARACTERS", 4)
    assert await client.tokenize("longer") == list(b"longer")
