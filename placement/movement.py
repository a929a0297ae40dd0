"""From where experts are to where they should be, with each served all the way. Pure.

An expert moves by being loaded there, published there, and unloaded here once every gateway has
that plan. Meanwhile a worker holds one expert of a layer more than the rules let it, never two: so
full workers can swap, which takes no third. Where a worker's memory has no room for that, the
replicas that others serve too go first; where nobody else has what must go, a worker with room
takes it in as a guest until its new home has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mesh.plan import ExpertId
from placement.faults import Pair
from placement.membership import Worker
from placement.rules import Rules, Target


@dataclass(frozen=True)
class Steps:
    """What one worker may do now, in this order."""

    unload: tuple[ExpertId, ...] = ()
    load: tuple[ExpertId, ...] = ()


class Movement:
    """One look at the mesh: the target, and what workers that rows can reach hold.

    ``faulty`` are workers and the experts that they get wrong: these go elsewhere at once, if
    anybody else can have them. With ``before``, the look before this one, the work is in proportion
    to what has changed since.
    """

    def __init__(
        self,
        rules: Rules,
        target: Target,
        workers: Collection[Worker],
        guests: Mapping[ExpertId, str],
        faulty: frozenset[Pair] = frozenset(),
        before: Movement | None = None,
    ) -> None:
        self._rules = rules
        self._target = target.workers_by_expert
        self._faulty = faulty
        self._workers = {w.worker_id: w for w in sorted(workers, key=lambda w: w.worker_id)}
        self._seen = {w: (worker.resident, worker.draining) for w, worker in self._workers.items()}
        self.wanted = target.experts_by_worker()
        """By worker: what it should hold, guests included."""
        for expert, worker_id in guests.items():
            self.wanted[worker_id] = self.wanted.get(worker_id, frozenset()) | {expert}
        self._pressed = {
            worker_id
            for worker_id, worker in self._workers.items()
            if not worker.draining
            and self._missing(worker)
            and not self._fits(worker, worker.resident | self._wanted(worker))
        }
        self.holders: dict[ExpertId, tuple[str, ...]] = dict(before.holders) if before else {}
        self.serving: dict[ExpertId, tuple[str, ...]] = dict(before.serving) if before else {}
        """Where rows may go, best first: where the expert should be, and until all of these have
        it, where else it is, unless that worker has to let go of it."""
        for expert in self._changed_holders(before) | self._changed_otherwise(before):
            if serving := self._serving(expert, self.holders.get(expert, ())):
                self.serving[expert] = serving
            else:
                self.serving.pop(expert, None)

    def _changed_holders(self, before: Movement | None) -> set[ExpertId]:
        """Bring :attr:`holders` up to date. Returns those of others, or of draining workers now."""
        changed: set[ExpertId] = set()
        nobody: tuple[frozenset[ExpertId], bool] = (frozenset(), False)
        earlier = before._seen if before else {}
        for worker_id in earlier.keys() | self._seen.keys():
            had, was_draining = earlier.get(worker_id, nobody)
            has, is_draining = self._seen.get(worker_id, nobody)
            for expert in had - has:
                self.holders[expert] = tuple(w for w in self.holders[expert] if w != worker_id)
            for expert in has - had:
                self.holders[expert] = tuple(sorted((*self.holders.get(expert, ()), worker_id)))
            changed |= (had | has) if was_draining != is_draining else (had ^ has)
        for expert in changed:
            if not self.holders.get(expert):
                self.holders.pop(expert, None)
        return changed

    def _changed_otherwise(self, before: Movement | None) -> set[ExpertId]:
        """What has another target, a holder that is or was pressed, or one that gets it wrong."""
        changed = {expert for _, expert in self._faulty}
        if before is None:
            return changed
        changed |= {expert for _, expert in before._faulty}
        for worker_id in self._pressed ^ before._pressed:
            changed |= self._seen.get(worker_id, (frozenset(), False))[0]
        target, earlier = self._target, before._target
        if target is not earlier:
            changed |= {e for e, ids in target.items() if earlier.get(e) != ids}
            changed |= earlier.keys() - target.keys()
        return changed

    @property
    def is_done(self) -> bool:
        """Everything is where it should be."""
        return not any(self._missing(w) for w in self._workers.values() if not w.draining)

    def _serving(self, expert: ExpertId, at: tuple[str, ...]) -> tuple[str, ...]:
        target = self._target.get(expert, ())
        well = tuple(w for w in at if (w, expert) not in self._faulty) if self._faulty else at
        if well or any(w in self._workers and (w, expert) not in self._faulty for w in target):
            at = well  # else nobody else can have it
        if len(at) <= 1 or target == at:
            return at
        planned = [w for w in target if w in at and not self._workers[w].draining]
        if planned and len(planned) == len(target):
            return tuple(planned)
        others = [w for w in at if w not in planned]
        staying = [w for w in others if not self._workers[w].draining and w not in self._pressed]
        return tuple(planned + staying or others)

    def steps(self, worker: Worker, routed: Collection[ExpertId]) -> Steps:
        """What a worker may do while gateways may send it rows of ``routed``."""
        if worker.draining:
            return Steps()
        unload = worker.resident - self._wanted(worker) - set(routed)
        # What it gets wrong and nobody else has yet may have to be fetched from it.
        unload -= {e for e in unload if e in self._target and len(self.holders[e]) == 1}
        held = set(worker.resident - unload)
        load = []
        for expert in sorted(self._missing(worker), key=lambda e: (e in self.holders, e)):
            if self._fits(worker, held | {expert}):
                held.add(expert)
                load.append(expert)
        return Steps(tuple(sorted(unload)), tuple(load))

    def source(self, expert: ExpertId, worker: Worker) -> Worker | None:
        """Another worker that has an expert, on the same host if there is one; if it can be, one
        that gets it right."""
        others = [self._workers[w] for w in self.holders.get(expert, ()) if w != worker.worker_id]
        return min(
            others,
            key=lambda w: ((w.worker_id, expert) in self._faulty, w.info.host != worker.info.host),
            default=None,
        )

    def detour(self) -> tuple[ExpertId, str] | None:
        """An expert that nobody else has and that is in the way, and who has room for it."""
        for worker_id in sorted(self._pressed):
            worker = self._workers[worker_id]
            for expert in sorted(worker.resident - self._wanted(worker)):
                if len(self.holders[expert]) > 1:
                    continue
                for host_id, host in self._workers.items():
                    will_hold = host.resident | self._wanted(host) | {expert}
                    if host_id != worker_id and not host.draining and self._fits(host, will_hold):
                        return expert, host_id
        return None

    @property
    def is_stuck(self) -> bool:
        """A worker has no room for what it should hold beside what it has to keep."""
        return bool(self._pressed)

    def where_it_is(self) -> dict[ExpertId, tuple[str, ...]]:
        """The target less the moves that are in each other's way: these experts stay."""
        pressed = [self._workers[w] for w in self._pressed]
        stuck = {e for w in pressed for e in w.resident ^ self._wanted(w)}
        stay = {e: self.holders[e] for e in stuck if e in self.holders}
        return {**self._target, **stay}

    def _wanted(self, worker: Worker) -> frozenset[ExpertId]:
        return self.wanted.get(worker.worker_id, frozenset())

    def _missing(self, worker: Worker) -> frozenset[ExpertId]:
        return self._wanted(worker) - worker.resident

    def _fits(self, worker: Worker, held: Collection[ExpertId]) -> bool:
        """In memory, and with one expert of a layer at most beyond the rules."""
        rules = self._rules
        unit_bytes = -(-worker.info.expert_bytes // rules.shards)
        if len(held) * unit_bytes > worker.info.memory_bytes:
            return False
        if rules.rule == "strict":
            return len(held) <= 2
        crowd = Counter(expert.layer for expert in held)
        return max(crowd.values(), default=0) <= rules.experts_per_worker + 1
