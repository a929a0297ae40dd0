"""What the engine says gathers on its way to the front."""

from __future__ import annotations

import math
from array import array

from gateway.engine_outputs import Gathering, Output, message_of
from gateway.request import End, Request, Sampling
from gateway.sampler import TokenLogprobs
from protos import engine_pb2 as pb

A, B = (Request(name, array("q", [1]), Sampling(9)) for name in "ab")
LENGTH = End("length")


def take(gathering: Gathering) -> list[pb.Output]:
    return [message_of(outputs) for outputs in gathering.take()]


def test_first_and_last_go_at_once_and_what_is_between_gathers() -> None:
    gathering = Gathering()
    gathering.add([Output(A, 1)], num_requests=10, now=100.0)
    assert gathering.due_s == 100.0
    assert [list(o.token_ids) for o in take(gathering)] == [[1]]
    assert gathering.due_s == math.inf

    gathering.add([Output(A, 2)], num_requests=10, now=101.0)
    gathering.add([Output(A, 3)], num_requests=10, now=101.002)
    assert 101.0 < gathering.due_s <= 101.02
    gathering.add([Output(B, 9)], num_requests=10, now=101.003)
    assert gathering.due_s == 101.003
    a, b = take(gathering)
    assert (a.request_id, list(a.token_ids)) == ("a", [2, 3])
    assert (b.request_id, list(b.token_ids)) == ("b", [9])

    gathering.add([Output(A, 4)], num_requests=10, now=102.0)
    gathering.add([Output(A, 5, end=LENGTH)], num_requests=9, now=102.001)
    assert gathering.due_s == 102.001
    (last,) = take(gathering)
    assert (list(last.token_ids), last.finish_reason) == ([4, 5], "length")


def test_an_id_that_is_used_again_begins_anew() -> None:
    gathering = Gathering()
    for now in (1.0, 2.0):
        gathering.add([Output(A, end=LENGTH)], num_requests=1, now=now)
        assert gathering.due_s == now
        assert len(take(gathering)) == 1


def test_logprobs_stay_beside_their_tokens_and_nothing_said_is_nothing_due() -> None:
    gathering = Gathering()
    gathering.add([], num_requests=1, now=1.0)
    assert (gathering.due_s, take(gathering)) == (math.inf, [])
    for token_id in (7, 8):
        logprobs = TokenLogprobs(-token_id, [(token_id, -1.0)])
        gathering.add([Output(A, token_id, logprobs)], num_requests=1, now=1.0)
    (a,) = take(gathering)
    assert list(a.token_ids) == [7, 8]
    assert [position.chosen.logprob for position in a.logprobs] == [-7, -8]
    assert [position.top[0].token_id for position in a.logprobs] == [7, 8]
