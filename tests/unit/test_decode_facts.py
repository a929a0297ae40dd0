"""What graphs read of a batch that decodes is what the batch says, however it came about."""

from __future__ import annotations

import random

import torch

from gateway.model.batch import ForwardBatch, SequenceSlice
from gateway.model.decode_facts import DecodeFacts

SIZE = 4
CPU = torch.device("cpu")


def batch_of(*sequences: tuple[int, tuple[int, ...]]) -> ForwardBatch:
    """Of sequences by position and blocks; the token of each is 100 + its row."""
    slices = tuple(SequenceSlice(position, 1, table) for position, table in sequences)
    rows = torch.arange(len(slices))
    return ForwardBatch.of(slices, rows + 100, rows)


def check(facts: DecodeFacts, batch: ForwardBatch) -> None:
    count = len(batch.slices)
    for row, (position, _, table) in enumerate(batch.slices):
        assert facts.tokens_B[row] == 100 + row
        assert facts.positions_B[row] == position
        assert facts.slots_B[row] == table[position // SIZE] * SIZE + position % SIZE
        assert facts.lengths_B[row] == position + 1
        assert tuple(facts.tables_BM[row, : len(table)].tolist()) == table
    assert (facts.slots_B[count:] == -1).all()
    assert (facts.lengths_B[count:] == 0).all()


def test_sequences_go_on_get_blocks_leave_and_are_others() -> None:
    facts = DecodeFacts(4, 8, CPU)
    a, b = (7, 2), (5,)
    for batch in (
        batch_of((6, a), (3, b)),
        batch_of((7, a), (4, (*b, 1))),
        batch_of((8, (*a, 6)), (5, (*b, 1))),
        batch_of((6, (*b, 1))),
        batch_of((6, (5, 1)), (0, (3,)), (31, (0, 4, 8, 9, 10, 11, 12, 13))),
        batch_of((1, (2,)), (1, (3,)), (2, (4,)), (3, (6,))),
    ):
        facts.fill(batch, SIZE)
        check(facts, batch)


def test_random_lives() -> None:
    rng = random.Random(5)
    facts = DecodeFacts(8, 16, CPU)
    running: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(400):
        if len(running) < 8 and rng.random() < 0.3:
            length = rng.randrange(1, 40)
            blocks = rng.sample(range(500), -(-length // SIZE))
            running.insert(rng.randrange(len(running) + 1), (length - 1, tuple(blocks)))
        if running and rng.random() < 0.1:
            del running[rng.randrange(len(running))]
        if not running:
            continue
        batch = batch_of(*running)
        facts.fill(batch, SIZE)
        check(facts, batch)
        running = [
            (p + 1, t if (p + 1) // SIZE < len(t) else (*t, rng.randrange(500)))
            for p, t in running
            if p + 1 < 16 * SIZE
        ]


class Device(DecodeFacts):
    """Goes on as the kernel does; see ``tests/gpu/test_kernels.py``."""

    def _move_on(self, tokens_N: torch.Tensor, block_size: int) -> None:
        for row, token in enumerate(tokens_N.tolist()):
            position = int(self.positions_B[row]) + 1
            block = int(self.tables_BM[row, position // block_size])
            self.facts_4B[:, row] = torch.tensor(
                [token, position, block * block_size + position % block_size, position + 1]
            )


def test_sequences_go_on_by_the_blocks_that_were_foreseen() -> None:
    facts = Device(4, 8, CPU)
    a, b = (7, 2), (5, 3)
    facts.fill(batch_of((5, a), (3, b)), SIZE)
    tokens_N = torch.tensor([100, 101])
    assert not facts.go_on(tokens_N, SIZE)  # nobody has looked for blocks
    for step in (
        batch_of((6, a), (4, b)),
        batch_of((7, a), (5, (*b, 6))),  # blocks come before they are needed
        batch_of((8, (*a, 1)), (6, (*b, 6))),
    ):
        assert facts.foresee(step.block_tables, SIZE)
        assert not facts.go_on(tokens_N[:1], SIZE)
        assert facts.go_on(tokens_N, SIZE)
        assert not facts.go_on(tokens_N, SIZE)
        check(facts, step)
    facts.fill(batch_of((6, a), (7, b)), SIZE)
    assert not facts.foresee([a, b], SIZE)  # the second has no block for it
    assert not facts.go_on(tokens_N, SIZE)


def test_another_batch_may_come_in_place_of_what_was_foreseen_or_begun() -> None:
    a, b = (7, 2), (5, 3)
    tokens_N = torch.tensor([100, 101])
    for begun in (False, True):
        for other in (
            batch_of((6, a)),
            batch_of((5, a), (4, b)),
            batch_of((4, b), (6, a)),
            batch_of((6, a), (4, (5, 4))),
            batch_of((6, a), (4, b), (0, (1,))),
        ):
            facts = Device(4, 8, CPU)
            facts.fill(batch_of((5, a), (3, b)), SIZE)
            assert facts.foresee([a, (*b, 9)], SIZE)
            if begun:
                assert facts.go_on(tokens_N, SIZE)
            facts.fill(other, SIZE)
            check(facts, other)
            assert not facts.go_on(tokens_N[: facts.count], SIZE)
