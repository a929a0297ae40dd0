"""Where a worker's rows are computed: the seam between its loop and its device.

Legend: R rows of a buffer, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from expert_worker.expert_store import Expert
from mesh.mlp import NativeMlp, TwoMatrices
from mesh.plan import ExpertId
from mesh.replay import ReplayDevice, Replays


class Part(NamedTuple):
    """Rows of one message: ``num_rows`` from ``start`` of its buffer."""

    buffer_RD: torch.Tensor
    start: int
    num_rows: int

    @property
    def x_RD(self) -> torch.Tensor:
        """The rows themselves."""
        return self.buffer_RD[self.start : self.start + self.num_rows]


class Ticket(Protocol):
    """A batch that is being computed."""

    @property
    def done(self) -> bool:
        """Its rows are replaced by the outputs, for everybody to read."""
        ...

    @property
    def answers_RD(self) -> torch.Tensor | None:
        """The outputs of a message for several experts, where they are not in its rows' place."""
        ...

    @property
    def seconds(self) -> float:
        """How long the device took. Valid once done."""
        ...

    @property
    def counts(self) -> list[int]:
        """Of a message for several experts, what its counts said. Valid once done."""
        ...


class Compute(Protocol):
    """A device. One thread owns it, that of the data plane."""

    depth: int
    """Batches that should be under way at once: what waits longer can still be merged."""

    replays: ReplayDevice | None
    """Where the transport may compute without us, once opened; None: not on this device."""

    def open(self) -> None:
        """Called once on the owning thread, before anything else."""
        ...

    version: int
    """Changes when what :meth:`serve` has said does not hold any more."""

    def serve(self, experts: Mapping[ExpertId, Expert]) -> Mapping[ExpertId, NativeMlp | Replays]:
        """What the transport computes without us while these are here: by itself each, and by
        ``wire.SEVERAL`` those of a layer together. Kept by the caller."""
        ...

    def prepare(self, num_experts: int, header_rows: int) -> bool:
        """A little of what makes quick what was not asked for yet; messages of several experts have
        so many counts, in so many rows. Whether more is left."""
        ...

    def mark(self) -> Ticket:
        """Of all that was delivered before."""
        ...

    def start(self, expert: Expert, parts: Sequence[Part]) -> Ticket:
        """Replace the parts' rows by the expert's outputs. Raises RuntimeError if it cannot."""
        ...

    def start_several(
        self, experts: Mapping[ExpertId, Expert], layer: int, part: Part, num_experts: int
    ) -> Ticket | None:
        """The same for a message of several experts of a layer, whose ``num_experts`` counts
        (int32) lie at the start of the part's buffer, without waiting for them on the host. None:
        not here."""
        ...


@dataclass(frozen=True)
class Done:
    """The ticket of what is computed at once."""

    seconds: float
    done: bool = True
    counts: list[int] = field(default_factory=list)
    answers_RD: torch.Tensor | None = None


class CpuCompute:
    """Computes while its caller waits."""

    depth = 1
    replays: ReplayDevice | None = None
    version = 0

    def open(self) -> None:
        """Nothing to do."""

    def serve(self, experts: Mapping[ExpertId, Expert]) -> Mapping[ExpertId, NativeMlp | Replays]:
        """See :class:`Compute`: small experts."""
        small = ((expert, getattr(mlp, "native", None)) for expert, mlp in experts.items())
        return {expert: native for expert, native in small if native is not None}

    def prepare(self, num_experts: int, header_rows: int) -> bool:
        """Nothing to do."""
        return False

    def mark(self) -> Done:
        """See :class:`Compute`."""
        return Done(0.0)

    def start(self, expert: Expert, parts: Sequence[Part]) -> Done:
        """See :class:`Compute`."""
        started = time.perf_counter()
        run(expert, parts)
        return Done(time.perf_counter() - started)

    def start_several(
        self, experts: Mapping[ExpertId, Expert], layer: int, part: Part, num_experts: int
    ) -> Done | None:
        """Counts are on the host already."""
        return None


def run(expert: Expert, parts: Sequence[Part]) -> None:
    """All parts as one batch, and the outputs back into them."""
    rows = [part.x_RD for part in parts]
    if len(rows) == 1 and isinstance(expert, TwoMatrices):
        expert.replace(rows[0])
        return
    y_RD = expert(rows[0] if len(rows) == 1 else torch.cat(rows))
    start = 0
    for x_RD in rows:
        x_RD.copy_(y_RD[start : start + len(x_RD)])
        start += len(x_RD)
