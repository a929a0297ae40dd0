"""Steps of a decoder that the one before begins, with graphs that do nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gateway.model.decode_graphs import DecodeGraphs, GraphedBatch, _Batch, _Next, _Segment

BLOCK = 4
TABLES = [(0, 1, 2, 3, 4, 5)]


class Launches:
    """A graph."""

    def __init__(self, launched: list[str], name: str) -> None:
        self._launched, self._name = launched, name

    def replay(self) -> None:
        self._launched.append(self._name)


class Experts:
    """Rows come back at once; while they are away, the host does what it has to do."""

    arena_version = 0

    def __init__(self) -> None:
        self.to_do: list[Any] = []
        self._away: Any = None

    def begin_step(self, num_micro_batches: int, *, away: bool = False) -> None:
        assert num_micro_batches == 1
        assert away == (self._away is not None)

    def void_rows(self) -> dict[Any, Any]:
        return {}

    def plan_of(self, placed: Any) -> int:
        return 1

    def is_away(self, placed: Any) -> bool:
        return self._away is placed

    def leave(self, placed: Any, graph: Launches, launched_by: int = 0) -> None:
        if not launched_by:
            graph.replay()
        self._away = placed

    def turn(self, back: Any, placed: Any, graph: Launches) -> None:
        assert self.turn_at_once(back, placed, graph)

    def turn_at_once(self, back: Any, placed: Any, *graphs: Launches) -> bool:
        assert self._away is back
        if self.to_do:
            self.to_do.pop(0)()
        for graph in graphs:
            graph.replay()
        self._away = placed
        return True


def graphs_of(num_layers: int, experts: Any, launched: list[str]) -> DecodeGraphs:
    """One sequence at position 5."""
    batch = _Batch(1, len(TABLES[0]), torch.device("cpu"))
    batch._tables = list(TABLES)
    batch._positions = [5]
    names = [*map(str, range(num_layers)), "head"]
    batch.segments = [
        _Segment(
            graph=Launches(launched, name),  # type: ignore[arg-type]
            layer=None if name == "head" else int(name),
            x_TD=torch.empty(0),
            placed=None if name == "head" else SimpleNamespace(name=name),  # type: ignore[arg-type]
            shared=None,
        )
        for name in names
    ]
    batch.moves = Launches(launched, "move")  # type: ignore[assignment]
    batch._move_on = lambda *what: launched.append("move")  # type: ignore[method-assign]
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._experts, graphs._kv = experts, SimpleNamespace(block_size=BLOCK)  # type: ignore[assignment]
    graphs._version, graphs._last, graphs._next = 0, batch, _Next()
    return graphs


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7])
def test_no_step_is_begun_that_was_not_foreseen_in_the_one_before(num_layers: int) -> None:
    """As the engine has it: while rows are away the last step is settled, then told of, and then
    the next one is foreseen, for which few layers leave no time behind a step that was begun."""
    launched: list[str] = []
    experts = Experts()
    graphs = graphs_of(num_layers, experts, launched)
    batch = graphs._last
    assert batch is not None
    foreseen, last = False, False

    def foresee() -> None:
        nonlocal foreseen
        foreseen = not last and graphs.foresee(TABLES, likeliest=True)

    left = [lambda: None, lambda: None]
    position, was_begun = 5, False
    for step in range(9):
        foreseen, last = False, step == 8
        experts.to_do = [*left, foresee] if was_begun else [foresee]
        proceed = graphs.proceed()
        if proceed is None:
            assert not was_begun
            experts._away = None
            batch._positions, batch._next_positions = [position], []
            graphs._next = _Next()
            GraphedBatch(batch, experts, graphs._join).finish()  # type: ignore[arg-type]
        else:
            assert was_begun
            proceed()
        was_begun = foreseen and graphs.go_on(torch.zeros(1, dtype=torch.int64))
        position += 1
        assert batch.count == 1
        assert batch._positions == [position if was_begun else position - 1]
    assert not was_begun
    forward = [*map(str, range(num_layers)), "head"]
    assert [name for name in launched if name != "move"] == 9 * forward
