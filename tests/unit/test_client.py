"""The client library and ``expert-mesh generate``, against a front with a scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from cli.main import main
from expert_mesh import AsyncClient, Client
from mesh.errors import InvalidInput, MeshError, ModelNotFound, Unavailable
from protos import engine_pb2
from tests.scripted_engine import Rig, scripted_front


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """An engine that says "yes" in two pieces to everything."""
    async with scripted_front() as rig:

        def answer(submit: engine_pb2.Submit) -> None:
            rig.engine.say(submit, b"ye")
            rig.engine.say(submit, b"s", "length")

        rig.engine.answer = answer
        yield rig


@pytest.fixture
async def silent_rig() -> AsyncIterator[Rig]:
    async with scripted_front() as rig:
        yield rig


def with_client(rig: Rig, use: Callable[[Client], Any]) -> Any:
    """Use the blocking client beside the event loop that the server needs."""

    def work() -> Any:
        with Client(rig.target) as client:
            return use(client)

    return asyncio.to_thread(work)


async def test_the_blocking_client_streams(rig: Rig) -> None:
    chunks = await with_client(rig, lambda client: list(client.generate("ab", max_tokens=3)))
    assert "".join(chunk.text for chunk in chunks) == "yes"
    assert [bool(chunk.finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.completion_tokens == 3


async def test_the_blocking_client_completes(rig: Rig) -> None:
    done = await with_client(rig, lambda client: client.complete([1, 2], n=2, request_id="r"))
    assert (done.request_id, done.text, done.finish_reason) == ("r", "yes", "length")
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.token_ids == tuple(b"yes")
    assert (done.usage, done.timing.queue_s) == ((2, 3, 0), pytest.approx(0.001))


async def test_closing_the_iterator_cancels(silent_rig: Rig) -> None:
    def first_chunk(client: Client) -> str:
        chunks = client.generate("ab")
        text = next(chunks).text
        chunks.close()
        return text

    using = asyncio.create_task(with_client(silent_rig, first_chunk))
    submit = await silent_rig.engine.submitted()
    silent_rig.engine.say(submit, b"x")
    assert await using == "x"
    assert await silent_rig.engine.cancelled() == submit.request_id


async def test_breaking_out_of_an_async_stream_cancels(silent_rig: Rig) -> None:
    async with AsyncClient(silent_rig.target) as client:
        chunks = client.generate("ab")
        first = asyncio.create_task(anext(chunks))
        submit = await silent_rig.engine.submitted()
        silent_rig.engine.say(submit, b"x")
        await first
        await chunks.aclose()
        assert await silent_rig.engine.cancelled() == submit.request_id


async def test_the_other_calls(rig: Rig) -> None:
    def use(client: Client) -> tuple[Any, ...]:
        return (
            client.tokenize("hé"),
            client.model_info().model,
            client.server_info().gateway_id,
            client.health(),
            client.cancel("nobody"),
        )

    assert await with_client(rig, use) == (list("hé".encode()), "tiny", "gateway-1", False, False)
    await rig.server.set_ready("expertmesh.v1.Inference", True)
    async with AsyncClient(rig.target) as client:
        assert await client.health()
        assert (await client.server_info()).num_workers == 3


async def test_errors_are_those_of_the_server(rig: Rig) -> None:
    for prompt, fields, error in (
        *(("", {}, InvalidInput), ("a", {"model": "x"}, ModelNotFound)),
        ("a", {"max_tokens": -1}, InvalidInput),
    ):
        with pytest.raises(error):
            await with_client(rig, lambda c, p=prompt, f=fields: c.complete(p, **f))


@pytest.mark.parametrize(
    ("prompt", "fields", "complaint"),
    [
        ("a", {"seed": -1}, "seed: -1 is not a whole number from 0 to 18446744073709551615"),
        ("a", {"max_tokens": 1 << 32}, "max_tokens: 4294967296 is not a .* 0 to 4294967295"),
        ("a", {"temperature": "hot"}, "temperature: 'hot' is not a number"),
        ("a", {"stop": ["a", 3]}, "stop: 3 is not text"),
        ("a", {"stop_token_ids": 5}, "stop_token_ids: 5 is not a list, each a whole number"),
        ("a", {"heat": 1}, "no option heat"),
        ([1, -2, 3], {}, "prompt: -2 is not a whole number from 0 to 4294967295"),
        ("\ud800", {}, "prompt: .* is not text in Unicode"),
    ],
)
async def test_what_cannot_be_sent_is_refused_by_name(
    rig: Rig, prompt: Any, fields: Any, complaint: str
) -> None:
    async with AsyncClient(rig.target) as client:
        with pytest.raises(InvalidInput, match=complaint):
            await client.complete(prompt, **fields)


async def test_a_status_without_an_error_of_its_own_keeps_its_status(rig: Rig) -> None:
    def use(client: Client) -> None:
        client._call(client._channel.unary_unary("/no.Such/Method"), b"")

    with pytest.raises(MeshError) as refused:
        await with_client(rig, use)
    assert refused.value.status == grpc.StatusCode.UNIMPLEMENTED


def test_nobody_there_is_said_with_the_address() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(Unavailable, match=r"at 127\.0\.0\.1:1"):
        client.health()


async def test_generate_streams_text_for_a_person(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--target", rig.target, "--prompt", "ab", "--stop", "!", "--top-k", "5"]
    assert await asyncio.to_thread(main, argv) == 0
    assert capsys.readouterr().out.endswith("yes\n")
    sampling = (await rig.engine.submitted()).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (62, 1.0, 5)


async def test_generate_prints_one_object_as_json(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--target", rig.target, "--token-ids", "1,2,3", "--max-tokens", "3"]
    assert await asyncio.to_thread(main, [*argv, "--temperature", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["text"], said["token_ids"], said["finish_reason"]) == (
        *("yes", list(b"yes"), "length"),
    )
    assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 0}
    assert set(said["timing"]) == {"queue_s", "ttft_s", "tpot_s", "e2e_s"}


async def test_generate_without_a_tokenizer_prints_ids(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with scripted_front(with_tokenizer=False) as rig:
        rig.engine.answer = lambda submit: rig.engine.say(submit, b"\x01\x02", "length")
        argv = ["generate", "--target", rig.target, "--token-ids", "7", "--max-tokens", "2"]
        assert await asyncio.to_thread(main, argv) == 0
    assert "1 2 \n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "line"),
    [
        (["--prompt", "a", "--top-p", "2"], 1, "error: top_p 2 must be above 0 and at most 1"),
        (["--token-ids", "1,x"], 2, "--token-ids wants numbers with commas between"),
        (["--prompt", "a", "--token-ids", "1"], 2, "give --prompt or --token-ids"),
        ([], 2, "give --prompt or --token-ids"),
    ],
)
async def test_what_went_wrong_is_one_line(
    rig: Rig, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, line: str
) -> None:
    assert await asyncio.to_thread(main, ["generate", "--target", rig.target, *argv]) == code
    assert line in capsys.readouterr().err
