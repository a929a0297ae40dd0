"""When a process that ended is started again."""

from __future__ import annotations

from cli.backoff import Backoff


def test_at_once_then_ever_later_but_once_a_minute() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_s(ran_s=0.5) for _ in range(10)]
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert backoff.num_ends == 10


def test_a_minute_of_life_is_a_clean_slate() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.pause_s(ran_s=0.5)
    assert [backoff.pause_s(ran_s=60), backoff.pause_s(ran_s=0.5)] == [0, 1]
