"""What the papers' comparison makes of several engines that ran at once."""

from __future__ import annotations

import pytest

from benchmarks.report import agreeing
from benchmarks.sides import Ran, measure
from benchmarks.work import Work, shares

WORK = Work(
    prefill_prompts=3,
    prefill_len=100,
    decode_len=10,
    num_new=4,
    batches=(1, 3),
    max_batch_tokens=512,
)


def test_sequences_are_shared_out_and_one_goes_to_the_first() -> None:
    assert [list(share) for share in shares(5, 2)] == [[0, 2, 4], [1, 3]]
    assert [list(share) for share in shares(1, 4)] == [[0]]


def test_prefill_is_from_the_first_start_to_the_last_end_and_steps_are_each_engines_own() -> None:
    def run(count: int, length: int, num_new: int) -> list[Ran]:
        """The second engine starts 1 s later; steps with prompts take 9 s, others 1 and 2 s."""
        return [
            Ran(
                sequences=list(share),
                began_s=100.0 + engine,
                steps_s=[9.0] * 2 + [1.0 + engine] * (num_new - 2),
                tokens=[[sequence] * num_new for sequence in share],
            )
            for engine, share in enumerate(shares(count, 2))
        ]

    found = measure(run, WORK, 2)
    assert found["prefill_tokens_per_s"] == pytest.approx(300 / 19)
    assert found["tpot_ms"] == {1: 1000.0, 3: 1500.0}
    assert found["decode_tokens_per_s"] == {1: 1.0, 3: 2 / 1.0 + 1 / 2.0}
    assert found["tokens"] == [0] * 4
    assert found["batch_tokens"] == [[0] * 4, [1] * 4, [2] * 4]


def test_tokens_agree_up_to_the_first_of_a_sequence_that_differs() -> None:
    assert agreeing([[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 9], [4, 0, 6]]) == "4 of 6"
