"""Loading beside serving, within a memory limit."""

from __future__ import annotations

import pytest
import torch

from expert_worker.expert_store import Expert, ExpertStore
from mesh.errors import CheckpointError, PlacementError
from mesh.plan import ExpertId

A, B, C = (ExpertId(0, index) for index in range(3))


def load(expert: ExpertId) -> Expert:
    if expert == C:
        raise CheckpointError("tensor of expert 2 is missing")
    return lambda x_RD: x_RD + expert.index


def make(memory_bytes: int = 20) -> ExpertStore:
    return ExpertStore(load, expert_bytes=10, memory_bytes=memory_bytes, worker_id="w7")


def test_load_and_unload() -> None:
    store = make()
    store.load([A, B])
    snapshot = store.experts
    store.unload([A])
    assert store.resident == [B]
    assert store.memory_used_bytes == 10
    assert torch.equal(snapshot[A](torch.ones(1, 1)), torch.ones(1, 1))


def test_loading_twice_takes_no_more_memory() -> None:
    store = make()
    store.load([A, B])
    store.load([A, B])
    assert store.resident == [A, B]


def test_too_little_memory_names_the_worker_and_the_bytes() -> None:
    store = make(memory_bytes=15)
    with pytest.raises(PlacementError, match=r"worker w7 has 15 bytes .* would need 20"):
        store.load([A, B])
    assert store.resident == []


def test_what_loaded_before_a_failure_stays() -> None:
    store = make()
    with pytest.raises(CheckpointError, match="expert 2 is missing"):
        store.load([A, C])
    assert store.resident == [A]
