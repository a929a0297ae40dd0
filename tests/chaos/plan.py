"""From a seed to a list of events. Pure: the same seed, duration and shape give the same plan."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.chaos.events import ELASTIC, ON_ONE_HOST, SETTLE_S, CutHost, Event, KillPlacement, Shape

_FIRST_S = 3.0
_MEAN_GAP_S = 2.5
_LARGE: dict[type[Event], float] = {KillPlacement: 45.0, CutHost: 30.0}
"""Those that take the most away, and their mean gap in seconds."""
_TRIES = 20


def make_plan(
    seed: int,
    duration_s: float,
    shape: Shape,
    kinds: Sequence[type[Event]] | None = None,
) -> tuple[Event, ...]:
    """Events by their time, each over by ``duration_s``, that together the mesh can survive."""
    if kinds is None:
        kinds = (*ON_ONE_HOST, *([CutHost] if shape.hosts else ELASTIC))
    rng = random.Random(seed)
    events: list[Event] = []
    # First what needs the most room, or it would find none.
    for kind, mean_gap_s in _LARGE.items():
        if kind in kinds:
            _fill(events, rng, [kind], mean_gap_s, duration_s, shape)
    small = [kind for kind in kinds if kind not in _LARGE]
    if small:
        _fill(events, rng, small, _MEAN_GAP_S, duration_s, shape)
    return tuple(sorted(events, key=lambda event: event.at_s))


def _fill(
    events: list[Event],
    rng: random.Random,
    kinds: Sequence[type[Event]],
    mean_gap_s: float,
    duration_s: float,
    shape: Shape,
) -> None:
    """Add events at random times, each of the first kind drawn that fits in."""
    weights = [kind.weight for kind in kinds]
    at_s = _FIRST_S + rng.expovariate(1 / mean_gap_s)
    while at_s < duration_s:
        near = [other for other in events if _may_overlap(other, at_s)]
        for kind in rng.choices(kinds, weights, k=_TRIES):
            event = kind.draw(rng, round(at_s, 1), shape)
            if event.end_s < duration_s and survivable(event, near, shape):
                events.append(event)
                break
        at_s += rng.expovariate(1 / mean_gap_s)


def survivable(event: Event, others: Sequence[Event], shape: Shape) -> bool:
    """Whether the mesh, as it is during the other events, can take this one as well.

    That is: nothing happens twice to one process at a time; every expert has a seat on what is
    left; one gateway is left; placement is there whenever something is to be made good.
    """
    beside = [other for other in others if _overlap(event, other)]
    if any(event.targets(shape) & other.targets(shape) for other in beside):
        return False
    away = {t for e in [event, *beside] if e.takes_target for t in e.targets(shape)}
    if len(away.intersection(shape.worker_names)) > shape.spare_workers:
        return False
    if away.issuperset(shape.gateway_names):
        return False
    return not any(_unsettled_without_placement(*pair) for b in beside for pair in _both(event, b))


def _may_overlap(other: Event, at_s: float) -> bool:
    """Whether it may overlap an event at that time, which lasts a minute at most."""
    return at_s - SETTLE_S - 1.0 <= other.end_s and other.at_s <= at_s + 60.0 + SETTLE_S + 1.0


def _overlap(event: Event, other: Event) -> bool:
    return event.at_s <= other.end_s + SETTLE_S and other.at_s <= event.end_s + SETTLE_S


def _both(event: Event, other: Event) -> tuple[tuple[Event, Event], tuple[Event, Event]]:
    return (event, other), (other, event)


def _unsettled_without_placement(event: Event, other: Event) -> bool:
    """Whether ``event`` begins or ends while ``other`` keeps placement away."""
    if not event.needs_placement or other.target != "placement" or not other.takes_target:
        return False
    away = other.at_s, other.end_s + SETTLE_S
    return any(
        away[0] <= change_s + SETTLE_S and change_s <= away[1]
        for change_s in (event.at_s, event.end_s)
    )
