"""Which gateways a GPU's worker waits for: ``native/company.c``, in simulations.

A gateway attends for a while, asks, and goes on when it is answered, layer after layer; between two
steps it samples. Microseconds. First of one worker that has a GPU of its own, then of two GPUs,
each of a gateway and a worker, which share its bandwidth.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import pytest

from mesh import native

LAYERS, ATTEND, EXPERT, SAMPLE, TICK = 16, 500, 180, 700, 10


def pointers(paces: Sequence[native.Pace]) -> ctypes.Array[ctypes.c_void_p]:
    """What ``company_until`` takes; the paces are the caller's to keep."""
    return (ctypes.c_void_p * len(paces))(*map(ctypes.addressof, paces))


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
        paces = pointers([gateway.pace for gateway in self.gateways])
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
    paces = pointers([early, late])
    for began in (1000, 15000, 29000):
        native.short.company_came(early, 0, began)
        native.short.company_came(late, 0, began + 500)
        native.short.company_came(early, 1, began + 800)
        native.short.company_came(late, 1, began + 1300)
    native.short.company_came(late, 0, 50500)
    native.short.company_came(late, 1, 51300)
    native.short.company_came(early, 0, 64000)
    assert native.short.company_until(early, paces, 2, EXPERT, 64000) > 64000


@dataclass(eq=False)
class Decoding:
    """A gateway on the GPU of its number."""

    begins_at: float
    layer: int = -1
    left: float = 0.0
    """What it has yet to attend; 0: it waits for replies, or samples."""
    replies: int = 0
    steps: list[float] = field(default_factory=list)


class TwoGpus:
    """``rows`` a gateway, routed to the two workers by odds that each layer has of its own: the
    smaller ``evenness``, the more layers send nothing to one of the workers. The first ``prompts``
    steps take long; of all layers a share of ``hiccups`` is late for once. ``behind``: experts wait
    until who attends on their GPU is through, else they share its bandwidth."""

    def __init__(
        self,
        rows: int,
        attend: int,
        evenness: float,
        seed: int,
        waits: bool,
        *,
        expert: int = 154,
        sample: tuple[int, int] = (900, 200),
        prompts: int = 0,
        hiccups: float = 0.0,
        behind: bool = False,
    ) -> None:
        self._rng = random.Random(seed)
        self._rows, self._attend, self._waits = rows, attend, waits
        self._expert, self._sample, self._prompts = expert, sample, prompts
        self._hiccups, self._behind = hiccups, behind
        self._odds = [self._rng.betavariate(evenness, evenness) for _ in range(LAYERS)]
        self.gateways = [Decoding(0.0), Decoding(self._rng.uniform(0, 12000))]
        self._paces = [[native.Pace(), native.Pace()] for _ in "12"]
        self._arrays = [pointers(paces) for paces in self._paces]
        self._asking: list[dict[int, int]] = [{}, {}]
        """Of each worker: layers by gateway."""
        self._computing: list[tuple[float, list[int]]] = [(0.0, []), (0.0, [])]
        self._on_the_way: list[tuple[float, int, int]] = []
        """When a dispatch is there, its worker and its gateway."""
        self._batches = 0

    def step_ms(self, num_steps: int) -> float:
        """The median of the later half of so many."""
        now = 0
        while min(len(one.steps) for one in self.gateways) < num_steps:
            now += 5
            for gpu in (0, 1):
                self._attends(gpu, now)
                self._computes(gpu, now)
            self._arrive(now)
            for gpu in (0, 1):
                self._launch(gpu, now)
        later = (one.steps[num_steps // 2 :] for one in self.gateways)
        return median(b - a for steps in later for a, b in itertools.pairwise(steps)) / 1e3

    def _attends(self, gpu: int, now: int) -> None:
        one = self.gateways[gpu]
        if not one.left:
            if one.replies == 0 and now >= one.begins_at:
                one.layer = (one.layer + 1) % LAYERS
                one.left = self._attend * self._rng.gauss(1, 0.02)
                if one.layer == 0 and len(one.steps) < self._prompts:
                    one.left += 130_000
                if self._rng.random() < self._hiccups:
                    one.left += self._rng.uniform(100, 900)
            return
        one.left -= 2.5 if self._computing[gpu][1] and not self._behind else 5
        if one.left <= 0:
            one.left = 0.0
            first = sum(self._rng.random() < self._odds[one.layer] for _ in range(self._rows))
            to = [worker for worker, rows in enumerate((first, self._rows - first)) if rows]
            self._on_the_way += [(now + self._rng.uniform(10, 20), worker, gpu) for worker in to]
            one.replies = len(to)

    def _computes(self, gpu: int, now: int) -> None:
        left, whose = self._computing[gpu]
        left -= (0 if self._behind else 2.5) if self.gateways[gpu].left else 5
        if left > 0 or not whose:
            self._computing[gpu] = left, whose
            return
        self._computing[gpu] = 0.0, []
        for number in whose:
            one = self.gateways[number]
            one.replies -= 1
            one.begins_at = now + 15
            if one.replies == 0 and one.layer == LAYERS - 1:
                one.steps.append(now)
                one.begins_at += max(100, self._rng.gauss(*self._sample))

    def _arrive(self, now: int) -> None:
        for sent in [sent for sent in self._on_the_way if sent[0] <= now]:
            self._on_the_way.remove(sent)
            _, worker, number = sent
            self._asking[worker][number] = layer = self.gateways[number].layer
            native.short.company_came(self._paces[worker][number], layer, now)

    def _launch(self, worker: int, now: int) -> None:
        asking, paces = self._asking[worker], self._paces[worker]
        if not asking or self._computing[worker][1]:
            return
        held = {
            layer
            for number, layer in asking.items()
            if self._waits
            and now
            < native.short.company_until(paces[number], self._arrays[worker], 2, self._expert, now)
        }
        ripe = [layer for layer in asking.values() if layer not in held]
        if not ripe:
            return
        self._batches += 1
        whose = [number for number, layer in asking.items() if layer == ripe[0]]
        for number in whose:
            del asking[number]
            native.short.company_left(paces[number], self._batches)
        self._computing[worker] = self._expert * self._rng.gauss(1, 0.02), whose


@pytest.mark.parametrize(("rows", "attend"), [(64, 440), (16, 130)])
@pytest.mark.parametrize("evenness", [99.0, 1.0, 0.3, 0.1])
def test_two_meet_however_unevenly_layers_route(rows: int, attend: int, evenness: float) -> None:
    for seed in range(3):
        together = TwoGpus(rows, attend, evenness, seed, waits=True).step_ms(24)
        apart = TwoGpus(rows, attend, evenness, seed, waits=False).step_ms(24)
        ratio = 0.9 if (rows, evenness) in ((16, 0.3), (16, 0.1)) else 0.88
        assert together < ratio * apart, seed


@pytest.mark.parametrize(
    ("sample", "hiccups", "ratio"),
    [((450, 40), 0.0, 0.67), ((900, 400), 0.005, 0.74), ((1000, 200), 0.03, 0.75)],
)
def test_two_stay_together_though_hosts_are_late_for_once(
    sample: tuple[int, int], hiccups: float, ratio: float
) -> None:
    for seed in range(3):
        together, apart = (
            TwoGpus(
                *(64, 310, 99.0, seed, waits),
                expert=110,
                sample=sample,
                prompts=4,
                hiccups=hiccups,
                behind=True,
            ).step_ms(40)
            for waits in (True, False)
        )
        assert together < ratio * apart, seed


def paced(steps: list[list[int]], pace: native.Pace, begins: int = 1000) -> list[int]:
    """Periods that a worker learns of a gateway whose steps take 13500, a layer 800; of each step
    the layers that it has rows for."""
    periods = []
    for number, layers in enumerate(steps):
        for place, layer in enumerate(layers):
            again = place > 0 and layers[place - 1] == layer
            native.short.company_came(
                pace, layer, begins + number * 13500 + layer * 800 + 50 * again
            )
        periods.append(pace.period_us)
    return periods


@pytest.mark.parametrize("odds", [0.5, 0.2])
def test_a_pace_is_known_from_few_layers(odds: float) -> None:
    rng = random.Random(2)
    for _ in range(20):
        steps = [[n for n in range(LAYERS) if rng.random() < odds] for _ in range(60)]
        learnt = paced(steps, native.Pace())[20:]
        assert median(learnt) == pytest.approx(13500, rel=0.15)
        assert min(learnt) > 13500 / 3


def test_what_comes_twice_is_no_step_of_its_own() -> None:
    whole = list(range(LAYERS))
    halved = sorted(whole * 2)
    learnt = paced(
        [whole] * 3 + [halved, whole, sorted([*whole, 0, 7])] + [whole] * 3, native.Pace()
    )
    assert all(period == pytest.approx(13500, rel=0.01) for period in learnt[1:])


def test_one_odd_step_is_forgotten() -> None:
    """It was cut short by a stop, say, and another begun at once."""
    whole, pace = list(range(LAYERS)), native.Pace()
    paced([whole] * 4, pace)
    native.short.company_came(pace, 0, 1000 + 4 * 13500)
    native.short.company_came(pace, 0, 1000 + 4 * 13500 + 60)
    learnt = paced([whole] * 8, pace, begins=1000 + 5 * 13500)
    assert learnt[-1] == pytest.approx(13500, rel=0.02)


def test_who_was_quicker_before_has_another_pace_soon() -> None:
    """Shorter texts before these: no layer of a step now is taken for another step."""
    pace = native.Pace()
    for number in range(6):
        for layer in range(LAYERS):
            native.short.company_came(pace, layer, 1000 + number * 4500 + layer * 250)
    learnt = paced([list(range(LAYERS))] * 8, pace, begins=1_000_000)
    assert learnt[3:] == [pytest.approx(13500, rel=0.02)] * 5


def test_who_idles_is_not_held_for_long() -> None:
    """Two that take a step every ten seconds."""
    early, late = native.Pace(), native.Pace()
    paces = pointers([early, late])
    for began in range(1, 60_000_000, 10_000_000):
        for layer in range(LAYERS):
            for pace, behind in ((early, 0), (late, 500_000)):
                now = began + behind + layer * 800
                native.short.company_came(pace, layer, now)
                until = native.short.company_until(pace, paces, 2, EXPERT, now)
                assert until <= now + 5000
