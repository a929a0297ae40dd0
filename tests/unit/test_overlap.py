"""What benchmarks/overlap.py counts as hidden."""

from __future__ import annotations

from benchmarks.overlap import covered_s, lanes, merged, shares


def test_intervals_are_counted_once() -> None:
    assert merged([(4, 5), (0, 2), (1, 3)]) == [(0, 3), (4, 5)]
    assert covered_s([(0, 3), (4, 5)], [(1, 2), (2.5, 4.5)]) == 2.0


def test_a_transfer_behind_computing_is_hidden_and_one_alone_is_not() -> None:
    first = {"found_s": 0, "received_s": 0.5, "fetched_s": [0.5, 1]}
    first |= {"computed_s": [1, 3], "sent_s": [3, 4]}
    second = {"found_s": 1, "received_s": 1.5, "fetched_s": [1.5, 2]}
    second |= {"computed_s": [3, 5], "sent_s": [5, 6]}
    found = shares([lanes([first, second])])
    # Moving: 0 to 2, 3 to 4 and 5 to 6; computing: 1 to 5.
    assert found == {"hidden": 0.5, "exposed_of_all": 2 / 6}
