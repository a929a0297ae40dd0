"""Which waiting rows are computed together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from expert_worker.batcher import Batcher
from mesh.plan import ExpertId

A, B = ExpertId(0, 0), ExpertId(0, 1)


def test_what_waits_for_one_expert_is_merged_up_to_the_budget() -> None:
    batcher: Batcher[str] = Batcher(merge_rows=10)
    for expert, rows, item in ((A, 4, "a1"), (B, 1, "b1"), (A, 6, "a2"), (A, 1, "a3")):
        batcher.put(expert, rows, item)
    assert batcher.take() == (A, ["a1", "a2"])
    assert batcher.take() == (B, ["b1"])
    assert batcher.take() == (A, ["a3"])
    assert batcher.queued_rows == 0


def test_a_single_item_above_the_budget_goes_alone() -> None:
    batcher: Batcher[str] = Batcher(merge_rows=2)
    batcher.put(A, 5, "large")
    batcher.put(A, 1, "small")
    assert batcher.take() == (A, ["large"])
    assert batcher.take() == (A, ["small"])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9))), st.integers(1, 12))
def test_every_item_comes_out_once_and_the_oldest_is_always_next(
    puts: list[tuple[int, int]], merge_rows: int
) -> None:
    batcher: Batcher[int] = Batcher(merge_rows)
    for number, (index, rows) in enumerate(puts):
        batcher.put(ExpertId(0, index), rows, number)
    assert batcher.queued_rows == sum(rows for _, rows in puts)
    taken: dict[ExpertId, list[int]] = {}
    waiting = list(range(len(puts)))
    while batcher.queued_rows:
        expert, items = batcher.take()
        assert items[0] == waiting[0]
        waiting = [item for item in waiting if item not in items]
        rows = [puts[item][1] for item in items]
        assert sum(rows) <= merge_rows or len(rows) == 1
        taken.setdefault(expert, []).extend(items)
    assert batcher.queued_rows == 0
    for expert, items in taken.items():
        assert items == [n for n, (index, _) in enumerate(puts) if index == expert.index]
