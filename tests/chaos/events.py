"""What can happen to a mesh: one small class for each kind.

An event is a value (when, to whom, for how long) that a plan is made of; ``act`` makes it happen to
a :class:`tests.chaos.fleet.Fleet` and returns once it is over. The class says what it takes away,
so that a plan never takes more than the mesh is built to lose.
"""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from tests.chaos.fleet import Fleet

SETTLE_S = 8.0
"""After a loss or a return: a lease's end, a spare's load, a plan's way to every gateway."""


@dataclass(frozen=True)
class Shape:
    """How large the mesh is: what a plan may name, and how much of it may be away at once."""

    workers: int = 20
    gateways: int = 2
    experts_per_worker: int = 1
    num_experts: int = 16
    """Of a layer."""
    hosts: int = 0
    """Network namespaces with workers, beside that of placement and gateways; 0: none at all."""

    @property
    def worker_names(self) -> tuple[str, ...]:
        return tuple(f"worker-{i:02}" for i in range(self.workers))

    @property
    def gateway_names(self) -> tuple[str, ...]:
        return tuple(f"gateway-{i}" for i in range(self.gateways))

    @property
    def host_names(self) -> tuple[str, ...]:
        return tuple(f"host-{i}" for i in range(self.hosts))

    @property
    def spare_workers(self) -> int:
        """How many may be away while every expert of a layer has a seat."""
        return self.workers - -(-self.num_experts // self.experts_per_worker)

    def host_of(self, worker: str) -> str:
        """Workers take the hosts in turn."""
        return self.host_names[self.worker_names.index(worker) % self.hosts]

    def workers_on(self, host: str) -> tuple[str, ...]:
        """The other way round."""
        return tuple(w for w in self.worker_names if self.host_of(w) == host)


@dataclass(frozen=True)
class Event(ABC):
    """Something that happens at ``at_s`` to ``target`` and is over ``for_s`` later."""

    at_s: float
    target: str
    for_s: float

    kind: ClassVar[str]
    weight: ClassVar[float] = 1.0
    """How often it is drawn, relative to the others."""
    takes_target: ClassVar[bool] = True
    """The target serves nothing meanwhile."""
    needs_placement: ClassVar[bool] = True
    """Placement has to be there when it begins and when it is over, to make good what it takes."""

    @classmethod
    @abstractmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        """One of this kind."""

    @abstractmethod
    async def act(self, fleet: Fleet) -> None:
        """Make it happen. Returns when it is over; raises Violation when the mesh denies it."""

    @property
    def end_s(self) -> float:
        return self.at_s + self.for_s

    def targets(self, shape: Shape) -> frozenset[str]:
        """Every process that it touches."""
        return frozenset({self.target})

    def __str__(self) -> str:
        return f"{self.at_s:7.1f} s  {self.kind:16} {self.target:12} for {self.for_s:.1f} s"


def _any(rng: random.Random, names: tuple[str, ...]) -> str:
    return names[rng.randrange(len(names))]


class WorkerEvent(Event):
    """Something that happens to one worker, for a time between ``least_s`` and ``most_s``."""

    least_s: ClassVar[float]
    most_s: ClassVar[float]

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, _any(rng, shape.worker_names), rng.uniform(cls.least_s, cls.most_s))


class KillWorker(WorkerEvent):
    """``kill -9``, and started again later."""

    kind = "kill worker"
    weight = 3.0
    least_s, most_s = 1.0, 12.0

    async def act(self, fleet: Fleet) -> None:
        await fleet.kill(self.target)
        gone = asyncio.create_task(fleet.expect_unplanned(self.target))
        await asyncio.sleep(self.for_s)
        await gone
        await fleet.start_worker(self.target)


class HangWorker(WorkerEvent):
    """Alive, and silent for longer than its lease: SIGSTOP, and SIGCONT much later."""

    kind = "hang worker"
    least_s, most_s = 10.0, 20.0

    async def act(self, fleet: Fleet) -> None:
        gone = asyncio.create_task(fleet.expect_unplanned(self.target))
        await fleet.stop_for(self.target, self.for_s)
        await gone


class PauseWorker(WorkerEvent):
    """Silent for a moment: less than a lease."""

    kind = "pause worker"
    least_s, most_s = 0.1, 2.0

    async def act(self, fleet: Fleet) -> None:
        await fleet.stop_for(self.target, self.for_s)


class SlowWorker(WorkerEvent):
    """Runs two fifths of the time only."""

    kind = "slow worker"
    weight = 0.5
    takes_target = False
    needs_placement = False
    least_s, most_s = 2.0, 10.0

    async def act(self, fleet: Fleet) -> None:
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self.for_s
        while loop.time() < until_s:
            await fleet.stop_for(self.target, 0.03)
            await asyncio.sleep(0.02)


class LeaveWorker(WorkerEvent):
    """Told to end, and joins again later."""

    kind = "leave worker"
    least_s, most_s = 1.0, 10.0

    async def act(self, fleet: Fleet) -> None:
        await fleet.end(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.start_worker(self.target)


class DrainWorker(WorkerEvent):
    """Sent away by placement, and joins again later."""

    kind = "drain worker"
    least_s, most_s = 1.0, 10.0

    async def act(self, fleet: Fleet) -> None:
        await fleet.drain(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.start_worker(self.target)


class JoinWorker(Event):
    """One more worker for a while; then it leaves."""

    kind = "join worker"
    weight = 0.5
    takes_target = False

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, f"extra-{rng.randrange(1000):03}", rng.uniform(5.0, 15.0))

    async def act(self, fleet: Fleet) -> None:
        await fleet.start_worker(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.end(self.target)


class Scale(Event):
    """``expert-mesh scale`` to more workers, and back to as many as there were."""

    kind = "scale"
    weight = 0.5
    takes_target = False
    most: ClassVar[int] = 3

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, f"by {rng.randint(1, cls.most)}", rng.uniform(5.0, 15.0))

    def targets(self, shape: Shape) -> frozenset[str]:
        return frozenset({"scale"})

    async def act(self, fleet: Fleet) -> None:
        async with fleet.scaled_by(int(self.target.split()[1])):
            await asyncio.sleep(self.for_s)


class RollWorker(WorkerEvent):
    """What ``expert-mesh roll`` does to each worker: a successor takes over, then it ends."""

    kind = "roll worker"
    takes_target = False
    least_s, most_s = 5.0, 5.0

    async def act(self, fleet: Fleet) -> None:
        await fleet.roll(self.target)


class Rebalance(Event):
    """Placement is asked for a better target: experts move."""

    kind = "rebalance"
    takes_target = False

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, "placement", 0.0)

    async def act(self, fleet: Fleet) -> None:
        await fleet.rebalance()


class KillPlacement(Event):
    """``kill -9``, and started again later; nothing that serves may notice."""

    kind = "kill placement"
    needs_placement = False

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, "placement", rng.uniform(0.0, 8.0))

    async def act(self, fleet: Fleet) -> None:
        await fleet.kill(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.start_placement()


class GatewayEvent(Event):
    """Something that happens to one gateway."""

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, _any(rng, shape.gateway_names), rng.uniform(0.0, 8.0))


class KillGateway(GatewayEvent):
    """``kill -9`` of front and engine, and started again later. Its own streams end."""

    kind = "kill gateway"

    async def act(self, fleet: Fleet) -> None:
        await fleet.kill(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.start_gateway(self.target)


class KillEngine(GatewayEvent):
    """``kill -9`` of the engine alone: the gateway ends by itself."""

    kind = "kill engine"

    async def act(self, fleet: Fleet) -> None:
        await fleet.kill_engine(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.start_gateway(self.target)


class HangEngine(GatewayEvent):
    """The engine is silent for longer than health may stay green; its requests go on afterwards."""

    kind = "hang engine"
    weight = 0.5
    needs_placement = False

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        return cls(at_s, _any(rng, shape.gateway_names), rng.uniform(15.0, 20.0))

    async def act(self, fleet: Fleet) -> None:
        red = asyncio.create_task(fleet.expect_not_ready(self.target, within_s=14.0))
        await fleet.stop_for(self.target, self.for_s, engine=True)
        await red


class RestartGateway(GatewayEvent):
    """Told to end: what runs there is served to its end. Started again later."""

    kind = "restart gateway"

    async def act(self, fleet: Fleet) -> None:
        await fleet.end(self.target)
        await asyncio.sleep(self.for_s)
        await fleet.start_gateway(self.target)


class CutHost(Event):
    """The link of a host is down for a while: nobody there is told, nobody there ends."""

    kind = "cut host"
    durations_s: ClassVar[tuple[float, ...]] = (1.0, 10.0, 60.0)

    @classmethod
    def draw(cls, rng: random.Random, at_s: float, shape: Shape) -> Event:
        for_s = rng.choices(cls.durations_s, (4, 2, 1))[0]
        return cls(at_s, _any(rng, shape.host_names), for_s)

    def targets(self, shape: Shape) -> frozenset[str]:
        return frozenset({self.target, *shape.workers_on(self.target)})

    async def act(self, fleet: Fleet) -> None:
        await fleet.cut_for(self.target, self.for_s)


ON_ONE_HOST: tuple[type[Event], ...] = (
    *(KillWorker, HangWorker, PauseWorker, SlowWorker, LeaveWorker, DrainWorker, JoinWorker),
    *(Rebalance, KillPlacement, KillGateway, KillEngine, HangEngine, RestartGateway),
)
"""The kinds that need nothing but processes."""
ELASTIC: tuple[type[Event], ...] = (Scale, RollWorker)
"""The kinds that go through the code of ``up``, which starts processes on its own host."""
