"""One run of chaos: a quiet mesh is asked, then everything happens to it, then it must be whole."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil

from mesh.errors import MeshError, Unavailable
from tests.chaos.events import Event, Shape
from tests.chaos.fleet import BLOCKED, Fleet, Violation, ids_of, running_fleet
from tests.chaos.load import Asked, Load, learn
from tests.chaos.memory import Memory

_KV_MB = 16
"""So few blocks that all are used at once, and some have to be taken back."""
FLAGS: dict[str, Sequence[str]] = {"gateway": ("--kv-memory-bytes", f"{_KV_MB << 20}")}
_NUM_QUESTIONS = 24
_ANSWER_TOKENS = (16, 64)
_LEAVE_SHARE = 0.05
_WHOLE_S = 40.0
_POLL_S = 0.5
_SAMPLE_S = 2.0
# Errors that what we do must bring about: everything else that is one is a bug.
_EXPECTED_ERRORS = ("engine_died",)


@dataclass
class Outcome:
    """What came of a run."""

    seed: int
    violations: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    left: int = 0
    cut_short: int = 0
    """Ended by the end of their gateway, which is allowed."""
    tokens: int = 0
    longest_gap_s: float = 0.0
    slopes: dict[str, float] = field(default_factory=dict)
    log_dir: str = ""

    def as_json(self) -> str:
        return json.dumps({**vars(self), "ok": not self.violations})

    def __str__(self) -> str:
        return (
            f"{self.answered} answered, {self.left} left by their clients, {self.cut_short} cut "
            f"short by the end of their gateway, {self.tokens} tokens; longest gap "
            f"{self.longest_gap_s:.2f} s; "
            + ", ".join(f"{n} x {k}" for k, n in self.events.items())
        )


async def run_chaos(
    seed: int,
    duration_s: float,
    shape: Shape,
    events: Sequence[Event],
    *,
    rate: float,
    say: Callable[[str], None] = lambda line: None,
    log_dir: Path | None = None,
) -> Outcome:
    """Make the events happen under load. Stops at the first violation, with all that is known."""
    outcome = Outcome(seed)
    broken = asyncio.Event()

    def violate(what: str) -> None:
        outcome.violations.append(what)
        broken.set()

    async with running_fleet(
        shape, on_unexpected_end=violate, flags=FLAGS, log_dir=log_dir
    ) as fleet:
        outcome.log_dir = str(fleet.log_dir)
        try:
            run = _Run(fleet, outcome, violate, say, seed, rate)
            await run.through(events, duration_s, broken)
        except (Violation, MeshError, OSError, grpc.aio.AioRpcError) as error:
            violate(f"{type(error).__name__}: {error}")
    _look_for_survivors(fleet, violate)
    _look_into_logs(fleet.log_dir, violate)
    if log_dir is None and not outcome.violations:
        shutil.rmtree(fleet.log_dir)
    return outcome


class _Run:
    """The parts of a run that go on at the same time."""

    def __init__(
        self,
        fleet: Fleet,
        outcome: Outcome,
        violate: Callable[[str], None],
        say: Callable[[str], None],
        seed: int,
        rate: float,
    ) -> None:
        self._fleet = fleet
        self._outcome = outcome
        self._note = violate
        self._say = say
        self._rng = random.Random(f"load {seed}")
        self._rate = rate
        self._memory = Memory(fills_mb=_KV_MB)
        self._happening: list[Event] = []
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def through(
        self, events: Sequence[Event], duration_s: float, broken: asyncio.Event
    ) -> None:
        """Quiet, chaos, quiet."""
        client = next(iter(self._fleet.serving.values()))
        questions = await learn(client, self._rng, _NUM_QUESTIONS, _ANSWER_TOKENS)
        self._say(f"{len(questions)} questions; {len(events)} events; logs: {self._fleet.log_dir}")
        self._load = Load(
            questions,
            self._fleet.serving,
            self._rng,
            rate=self._rate,
            leave_share=_LEAVE_SHARE,
            on_end=self._judge,
        )
        self._began_s = time.monotonic()
        beside = [
            asyncio.create_task(self._guard(part))
            for part in (self._load.run(), self._sample(), self._report())
        ]
        chaos = asyncio.create_task(self._guard(self._all_happen(events, duration_s)))
        stop = asyncio.create_task(broken.wait())
        await asyncio.wait({chaos, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (*beside, chaos, stop):
            task.cancel()
        await asyncio.gather(*beside, chaos, stop, return_exceptions=True)
        if broken.is_set():
            return
        self._say("the storm is over: waiting for what runs")
        await self._load.finish()
        await self._expect_whole()
        self._outcome.slopes = self._memory.slopes()
        (self._fleet.log_dir / "memory.json").write_text(self._memory.as_json())
        for name, slope in self._memory.growing():
            self._violate(f"the memory of {name} grows by {slope:.1f} MB a minute")
        await self._fleet.close()

    def _violate(self, what: str) -> None:
        meanwhile = ", ".join(f"{event.kind} {event.target}" for event in self._happening)
        self._note(f"{what} (meanwhile: {meanwhile or 'nothing'})")

    async def _guard(self, part: Any) -> None:
        try:
            await part
        except (Violation, MeshError, OSError, LookupError, TimeoutError) as error:
            self._violate(f"{type(error).__name__}: {error}")
        except Exception as error:
            self._violate(f"the harness: {error!r}")
            raise

    async def _all_happen(self, events: Sequence[Event], duration_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            for event in events:
                await asyncio.sleep(max(self._began_s + event.at_s - time.monotonic(), 0.0))
                group.create_task(self._guard(self._happen(event)))
            await asyncio.sleep(max(self._began_s + duration_s - time.monotonic(), 0.0))

    async def _happen(self, event: Event) -> None:
        """Once those before it are done with its targets: that can take longer than planned."""
        async with AsyncExitStack() as stack:
            for target in sorted(event.targets(self._fleet.shape)):
                await stack.enter_async_context(self._busy[target])
            self._say(f"{event}")
            self._happening.append(event)
            self._outcome.events[event.kind] += 1
            await event.act(self._fleet)
            self._happening.remove(event)

    def _judge(self, asked: Asked) -> None:
        """Every request must end as the contract says."""
        outcome = self._outcome
        outcome.tokens += len(asked.tokens)
        times = [at_s for at_s, _ in asked.arrivals]
        gaps = [after - before for before, after in pairwise(times)]
        outcome.longest_gap_s = max([outcome.longest_gap_s, *gaps])
        if wrong := asked.wrong():
            self._violate(f"wrong answer of {asked.gateway}: {wrong}")
        elif asked.error is None:
            outcome.answered += asked.whole
            outcome.left += not asked.whole
        elif isinstance(asked.error, Unavailable) and self._fleet.killed_between(
            asked.gateway, asked.sent_s, asked.ended_s
        ):
            outcome.cut_short += 1
        else:
            waited_s = asked.ended_s - asked.sent_s
            self._violate(
                f"a request to {asked.gateway} failed after {waited_s:.1f} s and "
                f"{len(asked.tokens)} tokens: {asked.error.code}: {asked.error}"
            )

    async def _sample(self) -> None:
        while True:
            self._memory.sample(
                {
                    name: process.pid
                    for name, process in self._fleet.members.items()
                    if process.started.done()
                },
                time.monotonic(),
            )
            await asyncio.sleep(_SAMPLE_S)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(10.0)
            at_s = time.monotonic() - self._began_s
            outcome = self._outcome
            self._say(
                f"{at_s:7.1f} s  {outcome.answered} answered, {outcome.left} left, "
                f"{outcome.cut_short} cut short, {self._load.num_running} running, "
                f"longest gap {outcome.longest_gap_s:.2f} s"
            )

    async def _expect_whole(self) -> None:
        """Quiet again, everything has to be as if nothing had been."""
        until_s = time.monotonic() + _WHOLE_S
        while (wrong := await self._what_is_not_whole()) is not None:
            if time.monotonic() > until_s:
                raise Violation(f"{_WHOLE_S:.0f} s after the storm: {wrong}")
            await asyncio.sleep(_POLL_S)

    async def _what_is_not_whole(self) -> str | None:
        fleet = self._fleet
        status = await fleet.status()
        if not status.plan.complete:
            return f"the plan is not complete: {status.plan.note}"
        workers = fleet.members.keys() - set(fleet.shape.gateway_names) - {"placement"}
        alive = set(map(fleet.id_of, workers))
        if ids_of(status) != alive:
            return f"registered: {sorted(ids_of(status))}, alive: {sorted(alive)}"
        for name, client in fleet.serving.items():
            info = await client.server_info()
            if info.running or info.waiting or info.kv_usage:
                return f"{name} holds: {info.running} running, {info.kv_usage:.4f} of its blocks"
        planned = {worker.worker_id for worker in status.plan.workers}
        for name in workers:
            sessions = int(await fleet.metric(name, "sessions"))
            expected = len(fleet.serving) if fleet.id_of(name) in planned else 0
            if sessions != expected:
                return f"{name} has {sessions} sessions for {expected} gateways"
            if queued := await fleet.metric(name, "queue_rows"):
                return f"{name} holds {queued:.0f} rows"
        for name in fleet.members:
            if (code := await fleet.readyz(name)) != 200:
                return f"/readyz of {name} says {code}"
        return None


def _look_for_survivors(fleet: Fleet, violate: Callable[[str], None]) -> None:
    left = []
    for process in fleet.ever:
        with suppress(psutil.NoSuchProcess):
            if process.is_running():
                left.append(f"{process.pid} {' '.join(process.cmdline())}")
    if left:
        violate(f"left over: {left}")


def _look_into_logs(log_dir: Path, violate: Callable[[str], None]) -> None:
    """Nobody may have logged an error that nothing explains."""
    for path in sorted(log_dir.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                expected = event["event"] in _EXPECTED_ERRORS or BLOCKED in line
                if event["level"] == "error" and not expected:
                    violate(f"{path.name}: {line[:2000]}")
                    break
