"""What a mesh must not lose is not drained: by seats, by the rule and by memory."""

from __future__ import annotations

from cli.elastic import lack_without
from protos import placement_pb2 as pb


def mesh(rooms: dict[str, int], **plan: int | bool) -> pb.MeshStatus:
    """Two layers of two experts of 10 bytes; workers with memory for so many."""
    experts = [
        pb.ExpertPlacement(expert=pb.ExpertId(layer=layer, index=index))
        for layer in range(2)
        for index in range(2)
    ]
    workers = [
        pb.WorkerStatus(
            worker=pb.WorkerInfo(worker_id=name, memory_bytes=10 * room, expert_bytes=10)
        )
        for name, room in rooms.items()
    ]
    values = {"experts_per_worker": 1, **plan}
    return pb.MeshStatus(plan=pb.Plan(experts=experts, **values), workers=workers)


def test_a_spare_worker_may_go() -> None:
    assert lack_without(mesh({"a": 9, "b": 9, "c": 9}), "a") == ""
    assert lack_without(mesh({"a": 9, "b": 9}, experts_per_worker=2), "a") == ""


def test_too_few_workers_are_too_few() -> None:
    assert "there are 1 workers, and every expert needs 2" in lack_without(
        mesh({"a": 9, "b": 9}), "a"
    )


def test_one_expert_in_all_needs_a_worker_for_each() -> None:
    five = dict.fromkeys("abcde", 9)
    assert lack_without(mesh(five, strict=True), "a") == ""
    del five["e"]
    lack = lack_without(mesh(five, strict=True), "a")
    assert "seats for 3 of 4 experts" in lack
    assert "one expert in all" in lack


def test_memory_limits_what_the_others_can_take() -> None:
    assert lack_without(mesh({"a": 2, "b": 2, "c": 2}), "a") == ""
    assert "seats for 3 of 4 experts" in lack_without(mesh({"a": 2, "b": 2, "c": 1}), "a")
    # Slices are half as large.
    assert lack_without(mesh({"a": 2, "b": 1, "c": 1}, expert_shards=2), "a") == ""


def test_a_worker_that_is_leaving_offers_no_seat() -> None:
    status = mesh({"a": 9, "b": 9, "c": 9})
    status.workers[2].state = "draining"
    assert "there are 1 workers" in lack_without(status, "a")
