"""Weights from worker to worker over a network that can drop, truncate and die."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from expert_worker.weights import Allowance, Giving, Taking, WeightTransfers, chunks_of
from mesh import wire
from mesh.errors import MessageTruncated, Overloaded, PeerLost
from mesh.transport.loopback import LoopbackHub

CHUNK_BYTES = 16
TENSORS = {
    "up": torch.arange(30.0).view(5, 6),  # 120 bytes: eight chunks, the last of eight bytes
    "bias": torch.arange(3, dtype=torch.bfloat16),
}


class Pair:
    """A giver and a taker, turned by hand."""

    def __init__(self) -> None:
        hub = LoopbackHub()
        self.giver_transport, self.taker_transport = hub.transport(), hub.transport()
        self.giver = WeightTransfers(self.giver_transport)
        self.taker = WeightTransfers(self.taker_transport)
        self.taken = {name: torch.full_like(tensor, -1) for name, tensor in TENSORS.items()}

    def start(self, chunks: list[torch.Tensor] | None = None) -> tuple[Giving, Taking]:
        session = self.taker.reserve()
        giving = self.giver.give(
            self.taker_transport.address,
            session,
            chunks_of(TENSORS, CHUNK_BYTES) if chunks is None else chunks,
        )
        taking = self.taker.take(
            self.giver_transport.address,
            giving.session,
            session,
            chunks_of(self.taken, CHUNK_BYTES),
        )
        return giving, taking

    def turn(self) -> bool:
        """One turn of each loop."""
        moved = False
        for transfers, transport in (
            (self.giver, self.giver_transport),
            (self.taker, self.taker_transport),
        ):
            transport.progress()
            while (message := transport.probe()) is not None:
                assert transfers.accept(message)
            moved |= transfers.turn()
        return moved

    def run(self) -> None:
        while self.turn():
            pass


def test_every_byte_arrives_and_nothing_is_left() -> None:
    pair = Pair()
    giving, taking = pair.start()
    pair.run()
    assert taking.result.result(0) is None
    assert taking.received_bytes == 126
    for name, tensor in TENSORS.items():
        assert torch.equal(pair.taken[name], tensor)
    pair.giver.end(giving)
    pair.run()
    assert not pair.giver.any
    assert not pair.taker.any


def test_few_chunks_are_under_way_and_one_moves_a_turn() -> None:
    pair = Pair()
    _, taking = pair.start()
    received = []
    while not taking.result.done():
        pair.turn()
        assert len(taking.posted) <= 4
        received.append(taking.received_bytes)
    steps = [later - earlier for earlier, later in pairwise(received)]
    assert max(steps) == CHUNK_BYTES


def test_a_giver_that_dies_half_way_leaves_no_expert() -> None:
    pair = Pair()
    _, taking = pair.start()
    while taking.received_bytes < 64:
        pair.turn()
    pair.giver_transport.die()
    pair.run()
    with pytest.raises(PeerLost):
        taking.result.result(0)
    assert not pair.taker.any


def test_a_taker_that_dies_frees_the_giver() -> None:
    pair = Pair()
    giving, taking = pair.start()
    while taking.received_bytes < 64:
        pair.turn()
    pair.taker_transport.die()
    pair.giver_transport.progress()
    pair.giver.turn()
    assert giving.ended.done()
    assert not pair.giver.any


def test_chunks_of_another_length_end_the_transfer() -> None:
    pair = Pair()
    giving, taking = pair.start(chunks_of(TENSORS, CHUNK_BYTES - 1))
    pair.run()
    assert giving.ended.done()  # the giver found that what was asked for is not what it has
    assert not taking.result.done()  # what hears of that is the call beside, which hangs up
    pair.taker.abandon(taking, PeerLost("it hung up"))
    pair.run()
    with pytest.raises(PeerLost, match="it hung up"):
        taking.result.result(0)

    pair = Pair()
    _, taking = pair.start()
    pair.turn()
    endpoint = pair.giver_transport.connect(pair.taker_transport.address)
    short = pair.giver_transport.wrap(torch.zeros(8, dtype=torch.uint8))
    endpoint.send(short, wire.encode_chunk(wire.Kind.WEIGHTS, taking.session, 8, 0))
    pair.run()
    with pytest.raises(MessageTruncated, match="chunk 0 came with 8 bytes"):
        taking.result.result(0)


def test_strangers_and_the_greedy_get_nothing() -> None:
    pair = Pair()
    giving, _ = pair.start()
    endpoint = pair.taker_transport.connect(pair.giver_transport.address)
    nothing = pair.taker_transport.wrap(torch.zeros(1, dtype=torch.uint8))
    endpoint.send(nothing, wire.encode_chunk(wire.Kind.FETCH, giving.session + 1, 16, 0))
    pair.turn()
    assert not giving.ended.done()
    for _ in range(6):
        endpoint.send(nothing, wire.encode_chunk(wire.Kind.FETCH, giving.session, 16, 0))
    pair.turn()
    assert giving.ended.done()

    pair = Pair()
    for _ in range(8):
        pair.start()
    with pytest.raises(Overloaded, match="try again"):
        pair.start()


def test_what_the_header_cannot_number_is_refused() -> None:
    with pytest.raises(Overloaded, match="65536"):
        chunks_of({"up": torch.zeros(1 << 16), "down": torch.zeros(1)}, 4)


def test_weights_have_a_quarter_of_what_rows_took() -> None:
    allowance = Allowance()
    allowance.begin(1.0, rows_s=0.04)
    assert allowance.goes_on(1.009, moved=True)
    assert not allowance.goes_on(1.011, moved=True)
    assert allowance.saved_s == 0.0


def test_time_that_the_other_end_was_not_there_to_use_is_kept() -> None:
    allowance = Allowance()
    for turn in range(2):
        allowance.begin(float(turn), rows_s=0.02)
        assert not allowance.goes_on(turn + 0.001, moved=False)
    assert allowance.saved_s == pytest.approx(0.008)
    for turn in range(2, 100):
        allowance.begin(float(turn), rows_s=0.02)
        assert not allowance.goes_on(turn + 0.001, moved=False)
    assert allowance.saved_s <= 0.02


def test_what_a_giver_that_hangs_may_still_write_to_is_kept_but_not_waited_for() -> None:
    pair = Pair()
    _, taking = pair.start()
    pair.taker.turn()
    assert taking.posted
    pair.taker.leave(taking)
    assert pair.taker._left == [taking]
    while pair.turn():  # The giver comes to itself, and sends what it was asked for.
        pass
    pair.taker.turn()
    assert not pair.taker.any
    assert pair.taker._left == []
    assert not taking.result.done()
