"""A worker that has no memory to compute experts of one index with: ``INDEX`` and its own flags."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from cli.main import app
from expert_worker import service
from expert_worker.expert_store import Expert, ExpertStore
from mesh.plan import ExpertId


class _Store(ExpertStore):
    def __init__(self, load_expert: Callable[[ExpertId], Expert], **options: Any) -> None:
        super().__init__(lambda expert: _loaded(load_expert(expert), expert), **options)


def _loaded(mlp: Any, expert: ExpertId) -> Expert:
    if expert.index == _INDEX:
        mlp.native = None
        mlp.__class__ = type("Starved", (type(mlp),), {"__call__": _starve})
    return mlp  # type: ignore[no-any-return]


def _starve(mlp: object, x_RD: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory left")


if __name__ == "__main__":
    _INDEX = int(sys.argv.pop(1))
    service.ExpertStore = _Store  # type: ignore[misc]
    app(["worker", *sys.argv[1:]])
