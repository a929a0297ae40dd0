"""How ``status`` and ``plan`` show a mesh."""

from __future__ import annotations

from rich.console import Console

from cli.status import _ranges, plan_tables
from cli.tables import short_names
from protos import placement_pb2 as pb


def experts(*names: str) -> list[pb.ExpertId]:
    pairs = (name.split(".") for name in names)
    return [pb.ExpertId(layer=int(layer), index=int(index)) for layer, index in pairs]


def test_residency_is_shown_in_runs_of_layers() -> None:
    assert _ranges(experts()) == ""
    assert _ranges(experts("0.7", "1.7", "2.7", "5.7")) == "0-2.7 5.7"
    assert _ranges(experts("1.3", "0.2", "0.3")) == "0.2 0-1.3"
    assert _ranges(experts("0.0", "0.2", "0.4"), most=2) == "0.0 0.2 and 1 more"


def test_names_are_shortened_only_while_they_tell_workers_apart() -> None:
    assert short_names(["worker-1", "worker-2"]) == {"worker-1": "1", "worker-2": "2"}
    assert short_names(["worker-a-1", "worker-b-1"]) == {
        "worker-a-1": "worker-a-1",
        "worker-b-1": "worker-b-1",
    }


def test_a_wide_plan_is_cut_into_tables_and_names_replicas_and_holes() -> None:
    plan = pb.Plan(
        experts=[
            pb.ExpertPlacement(expert=e, worker_ids=[f"worker-{e.index:02}"])
            for e in experts(*(f"{layer}.{index}" for layer in (0, 1) for index in range(20)))
        ]
    )
    plan.experts[1].worker_ids.append("worker-00")
    del plan.experts[2]
    console = Console(width=60, color_system=None)
    with console.capture() as capture:
        for part in plan_tables(plan, console.width):
            console.print(part)
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[2][:5] == ["layer", "0", "1", "2", "3"]
    assert lines[3][:5] == ["0", "00", "01+00", "-", "03"]
    assert [line[0] for line in lines if line].count("layer") == 3
