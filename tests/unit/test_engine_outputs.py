"""What the engine says gathers on its way to the front."""

from __future__ import annotations

import math

from gateway.engine_outputs import Gathering
from protos import engine_pb2 as pb


def test_first_and_last_go_at_once_and_what_is_between_gathers() -> None:
    gathering = Gathering()
    gathering.add([pb.Output(request_id="a", token_ids=[1])], num_requests=10, now=100.0)
    assert gathering.due_s == 100.0
    assert [list(o.token_ids) for o in gathering.take()] == [[1]]
    assert gathering.due_s == math.inf

    gathering.add([pb.Output(request_id="a", token_ids=[2])], num_requests=10, now=101.0)
    gathering.add([pb.Output(request_id="a", token_ids=[3])], num_requests=10, now=101.002)
    assert 101.0 < gathering.due_s <= 101.02
    gathering.add([pb.Output(request_id="b", token_ids=[9])], num_requests=10, now=101.003)
    assert gathering.due_s == 101.003
    a, b = gathering.take()
    assert (a.request_id, list(a.token_ids)) == ("a", [2, 3])
    assert (b.request_id, list(b.token_ids)) == ("b", [9])

    gathering.add([pb.Output(request_id="a", token_ids=[4])], num_requests=10, now=102.0)
    end = pb.Output(request_id="a", token_ids=[5], finish_reason="length")
    gathering.add([end], num_requests=9, now=102.001)
    assert gathering.due_s == 102.001
    (last,) = gathering.take()
    assert (list(last.token_ids), last.finish_reason) == ([4, 5], "length")


def test_an_id_that_is_used_again_begins_anew() -> None:
    gathering = Gathering()
    for now in (1.0, 2.0):
        gathering.add([pb.Output(request_id="a", finish_reason="error")], num_requests=1, now=now)
        assert gathering.due_s == now
        assert len(gathering.take()) == 1
