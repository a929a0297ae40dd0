"""Frames between front and engine over a real socket pair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ipc import MAX_FRAME_BYTES, AsyncChannel, EngineChannel, FrameReader, encode_frame
from mesh.errors import TransportError
from protos import engine_pb2 as pb


def submit(name: str, num_tokens: int = 3) -> pb.ToEngine:
    return pb.ToEngine(submit=pb.Submit(request_id=name, prompt_token_ids=range(num_tokens)))


def outputs(name: str, num_tokens: int = 1) -> pb.FromEngine:
    output = pb.Output(request_id=name, token_ids=range(num_tokens))
    return pb.FromEngine(outputs=pb.Outputs(outputs=[output]))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@given(
    sizes=st.lists(st.integers(0, 40), max_size=8),
    cuts=st.lists(st.integers(1, 30), max_size=30),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    sizes: list[int], cuts: list[int]
) -> None:
    messages = [submit(str(i), size) for i, size in enumerate(sizes)]
    stream = b"".join(map(encode_frame, messages))
    reader = FrameReader()
    payloads: list[bytes] = []
    for cut in cuts:
        payloads += reader.feed(stream[:cut])
        stream = stream[cut:]
    payloads += reader.feed(stream)
    assert [pb.ToEngine.FromString(payload) for payload in payloads] == messages


def test_a_length_that_cannot_be_is_refused_before_anything_is_kept() -> None:
    with pytest.raises(TransportError, match="not one of ours"):
        FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(TransportError, match="send less at once"):
        encode_frame(pb.ToEngine(submit=pb.Submit(request_id="x" * (MAX_FRAME_BYTES + 1))))


def test_the_engine_reads_what_is_whole_and_sees_the_end(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    front, sock = pair
    channel = EngineChannel(sock)
    assert channel.recv_all() == []
    second = encode_frame(submit("b"))
    front.sendall(encode_frame(submit("a")) + second[:5])
    assert channel.recv_all() == [submit("a")]
    front.sendall(second[5:])
    front.close()
    assert channel.recv_all() == [submit("b")]
    assert channel.closed


def test_the_engine_does_not_wait_for_a_front_that_reads_late(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    front, sock = pair
    channel = EngineChannel(sock)
    sent = [outputs(str(i), 10_000) for i in range(60)]
    for message in sent:
        channel.send(message)
    assert not channel.flush()
    front.setblocking(False)
    reader, received = FrameReader(), []
    while len(received) < len(sent):
        received += map(pb.FromEngine.FromString, reader.feed(front.recv(1 << 16)))
        channel.flush()
    assert received == sent


def test_sending_to_a_front_that_is_gone_is_no_error(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    front, sock = pair
    channel = EngineChannel(sock)
    front.close()
    channel.send(outputs("a"))
    channel.send(outputs("a"))
    assert channel.closed
    assert channel.flush()


async def test_front_and_engine_talk_until_one_closes(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    theirs = EngineChannel(pair[1])
    front = await AsyncChannel.open(pair[0])
    large = submit("large", 300_000)
    front.send(large)
    front.send(submit("small"))
    received: list[pb.ToEngine] = []
    while len(received) < 2:
        received += theirs.recv_all()
        await asyncio.sleep(0)
    assert received == [large, submit("small")]
    theirs.send(outputs("a"))
    theirs.send(outputs("b"))
    theirs.close()
    assert [message async for message in front] == [outputs("a"), outputs("b")]
    front.send(submit("late"))
    await front.close()


async def test_an_engine_that_died_with_our_messages_unread_ends_the_stream(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    front = await AsyncChannel.open(pair[0])
    front.send(submit("unread"))
    await asyncio.sleep(0)
    pair[1].close()
    assert [message async for message in front] == []
    await front.close()
