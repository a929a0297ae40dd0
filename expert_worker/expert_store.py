"""The experts that a worker holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from mesh.errors import PlacementError
from mesh.mlp import Mlp
from mesh.plan import ExpertId

Expert = Mlp
"""y_RD = expert(x_RD), same dtype and device."""


class ExpertStore:
    """Loads and unloads beside serving. One writer at a time; readers take no lock.

    ``load_expert`` reads one expert's weights, ``expert_bytes`` is what one takes, and
    ``memory_bytes`` what all together may take.
    """

    def __init__(
        self,
        load_expert: Callable[[ExpertId], Expert],
        *,
        expert_bytes: int,
        memory_bytes: int,
        worker_id: str,
    ) -> None:
        self._load_expert = load_expert
        self._expert_bytes = expert_bytes
        self._memory_bytes = memory_bytes
        self._worker_id = worker_id
        self._writing = threading.Lock()
        self._experts: Mapping[ExpertId, Expert] = MappingProxyType({})
        self.on_change: Callable[[], None] = lambda: None
        """Called by whoever writes, when :attr:`experts` is another."""

    @property
    def experts(self) -> Mapping[ExpertId, Expert]:
        """An immutable snapshot."""
        return self._experts

    @property
    def resident(self) -> list[ExpertId]:
        """What is loaded, ascending."""
        return sorted(self._experts)

    @property
    def memory_used_bytes(self) -> int:
        """Of the experts' weights."""
        return len(self._experts) * self._expert_bytes

    def load(self, experts: Iterable[ExpertId]) -> None:
        """Load what is not yet resident; each serves as soon as it is in.

        Raises PlacementError when they do not fit, CheckpointError when they cannot be read.
        """
        with self._writing:
            missing = [e for e in experts if e not in self._experts]
            needed = (len(self._experts) + len(missing)) * self._expert_bytes
            if needed > self._memory_bytes:
                raise PlacementError(
                    f"worker {self._worker_id} has {self._memory_bytes} bytes for experts and "
                    f"would need {needed} with {len(missing)} more of {self._expert_bytes} each; "
                    "give it more with --memory-bytes, or start more workers"
                )
            for expert in missing:
                loaded = self._load_expert(expert)
                self._become({**self._experts, expert: loaded})

    def cut(self, expert_bytes: int) -> None:
        """Forget every expert: ids name other slices from here on, of so many bytes each."""
        with self._writing:
            self._become({})
            self._expert_bytes = expert_bytes

    def unload(self, experts: Iterable[ExpertId]) -> None:
        """Forget experts; batches that hold them finish."""
        gone = set(experts)
        with self._writing:
            self._become({e: x for e, x in self._experts.items() if e not in gone})

    def _become(self, experts: dict[ExpertId, Expert]) -> None:
        self._experts = MappingProxyType(experts)
        self.on_change()
