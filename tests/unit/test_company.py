"""Which gateways a GPU's worker waits for: ``native/company.c``, in a simulation of one worker.

A gateway attends for a while, asks, and goes on when it is answered, layer after layer; between two
steps it samples. Microseconds.
"""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

import pytest

from mesh import native

LAYERS, ATTEND, EXPERT, SAMPLE, TICK = 16, 500, 180, 700, 10


@dataclass(eq=False)
class Gateway:
    asks_at: int
    attend: int = ATTEND
    sample: int = SAMPLE
    layer: int = 0
    pace: native.Pace = field(default_factory=native.Pace)
    steps: list[int] = field(default_factory=list)
    """When each ended."""
    asked_at: int | None = None

    def answered(self, now: int, jitter: int) -> None:
        self.asked_at = None
        self.layer = (self.layer + 1) % LAYERS
        self.asks_at = now + self.attend + jitter
        if self.layer == 0:
            self.steps.append(now)
            self.asks_at += self.sample


@dataclass
class Mesh:
    """A worker that computes one batch at a time, and its gateways."""

    gateways: list[Gateway]
    waits: bool = True
    merged: list[int] = field(default_factory=list)
    """Gateways of each batch."""
    held: int = 0

    def run(self, until: int) -> Mesh:
        rng = random.Random(1)
        paces = (ctypes.c_void_p * len(self.gateways))(
            *(ctypes.addressof(gateway.pace) for gateway in self.gateways)
        )
        computing: list[Gateway] = []
        done_at = 0
        for now in range(TICK, until, TICK):
            for one in self.gateways:
                if one.asked_at is None and now >= one.asks_at and one not in computing:
                    one.asked_at = now
                    native.short.company_came(one.pace, one.layer, now)
            if computing and now >= done_at:
                for one in computing:
                    one.answered(now, rng.randrange(40))
                computing = []
            asking = sorted(
                (one for one in self.gateways if one.asked_at is not None),
                key=lambda one: one.asked_at or 0,
            )
            if computing or not asking:
                continue
            held = {
                one.layer for one in asking if self.waits and now < self._until(one, paces, now)
            }
            ripe = [one for one in asking if one.layer not in held]
            if not ripe:
                self.held += TICK
                continue
            computing = [one for one in asking if one.layer == ripe[0].layer]
            for one in computing:
                native.short.company_left(one.pace, len(self.merged) + 1)
                one.asked_at = None
                one.asks_at = until
            self.merged.append(len(computing))
            done_at = now + EXPERT
        return self

    def _until(self, one: Gateway, paces: ctypes.Array[ctypes.c_void_p], now: int) -> int:
        until: int = native.short.company_until(one.pace, paces, len(paces), EXPERT, now)
        return until

    def pace_of(self, number: int) -> float:
        """Of its last ten steps."""
        steps = self.gateways[number].steps
        return (steps[-1] - steps[-11]) / 10


STEP = LAYERS * (ATTEND + EXPERT) + SAMPLE


@pytest.mark.parametrize("offset", [300, 1500, 4000, 5500, 8000, 11000])
def test_gateways_of_one_pace_come_together_and_stay(offset: int) -> None:
    mesh = Mesh([Gateway(0), Gateway(offset)]).run(40 * STEP)
    assert set(mesh.merged[-100:]) == {2}
    assert mesh.pace_of(0) < 1.05 * STEP


def test_four_come_together_too() -> None:
    mesh = Mesh([Gateway(offset) for offset in (0, 2000, 5000, 9000)]).run(80 * STEP)
    assert sum(mesh.merged[-100:]) / 100 > 3
    alone = Mesh([Gateway(offset) for offset in (0, 2000, 5000, 9000)], waits=False).run(80 * STEP)
    assert max(map(mesh.pace_of, range(4))) < min(map(alone.pace_of, range(4)))


def test_one_alone_is_never_held() -> None:
    assert Mesh([Gateway(0)]).run(20 * STEP).held == 0


def test_who_has_gone_is_not_waited_for() -> None:
    mesh = Mesh([Gateway(0), Gateway(300)]).run(30 * STEP)
    mesh.gateways[1].asks_at = 1 << 60
    mesh.gateways[1].asked_at = None
    held, mesh.held = mesh.held, 0
    later = Mesh([mesh.gateways[0], mesh.gateways[1]])
    assert held
    later.run(2 * STEP)
    assert later.held <= STEP // 16 + EXPERT


@pytest.mark.parametrize("attend", [60, 700, 900, 1700, 5000])
def test_who_has_another_pace_costs_little(attend: int) -> None:
    gateways = [(0, ATTEND), (3000, attend)]
    mesh = Mesh([Gateway(*one) for one in gateways]).run(60 * STEP)
    alone = Mesh([Gateway(*one) for one in gateways], waits=False).run(60 * STEP)
    assert mesh.pace_of(0) < 1.02 * alone.pace_of(0)


def test_a_step_that_took_half_as_long_again_is_no_other_pace() -> None:
    """Two that were out of step for once: the early one still waits for the other."""
    early, late = native.Pace(), native.Pace()
    paces = (ctypes.c_void_p * 2)(ctypes.addressof(early), ctypes.addressof(late))
    for began in (1000, 15000, 29000):
        native.short.company_came(early, 0, began)
        native.short.company_came(late, 0, began + 500)
        native.short.company_came(early, 1, began + 800)
        native.short.company_came(late, 1, began + 1300)
    native.short.company_came(late, 0, 50500)
    native.short.company_came(late, 1, 51300)
    native.short.company_came(early, 0, 64000)
    assert native.short.company_until(early, paces, 2, EXPERT, 64000) > 64000
