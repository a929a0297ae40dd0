"""How often a worker does what can wait."""

from __future__ import annotations

from expert_worker.pacing import Pacing


def share_of(rows_every_s: float, piece_s: float, until_s: float = 10.0) -> float:
    """Of the time that pieces of so long take beside rows that come so often."""
    pacing, now_s, spent_s = Pacing(), 0.0, 0.0
    while now_s < until_s:
        rows_s = now_s // rows_every_s * rows_every_s
        if pacing.may_begin(now_s, rows_s):
            pacing.ended(now_s, now_s + piece_s)
            spent_s += piece_s
            now_s += piece_s
        now_s += 0.0005
    return spent_s / now_s


def test_beside_rows_it_is_a_fifth_of_the_time_however_long_a_piece_takes() -> None:
    for piece_s in (0.003, 0.02, 0.1):
        assert 0.17 < share_of(rows_every_s=0.001, piece_s=piece_s) <= 0.2


def test_without_rows_nothing_is_held_up() -> None:
    assert share_of(rows_every_s=100.0, piece_s=0.02) > 0.95


def test_the_first_piece_waits_for_nothing() -> None:
    assert Pacing().may_begin(5.0, rows_s=5.0)
