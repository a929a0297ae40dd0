"""``status --watch``: what is news to a program, and what fits on a person's screen."""

from __future__ import annotations

import io

from rich.console import Console, Group

from cli.status import status_as_dict
from cli.watch import Changes, ExpertLoad, heat_map, view
from mesh.plan import ExpertId
from protos import placement_pb2 as pb


def mesh_of(num_workers: int, num_events: int = 0) -> pb.MeshStatus:
    """Worker i serves expert i of two layers and computes i rows a second."""
    ids = [f"worker-{i:03}" for i in range(num_workers)]
    experts = [pb.ExpertId(layer=layer, index=i) for layer in (0, 1) for i in range(num_workers)]
    return pb.MeshStatus(
        plan=pb.Plan(
            epoch=7,
            complete=True,
            workers=[pb.WorkerInfo(worker_id=name) for name in ids],
            experts=[pb.ExpertPlacement(expert=e, worker_ids=[ids[e.index]]) for e in experts],
        ),
        workers=[
            pb.WorkerStatus(
                worker=pb.WorkerInfo(worker_id=name, device="cpu"),
                state="ready",
                resident=[e for e in experts if e.index == i],
                rows_per_s=i,
            )
            for i, name in enumerate(ids)
        ],
        gateways=[
            pb.GatewayStatus(
                gateway=pb.GatewayReport(
                    gateway_id="gateway-0",
                    epoch=7,
                    load=[pb.ExpertLoad(expert=experts[0], rows=40)],
                )
            )
        ],
        balancedness=0.5,
        events=[
            pb.MeshEvent(at_unix_s=i, kind="worker_gone", text=f"the {i}th " + 9 * "long story ")
            for i in range(num_events)
        ],
    )


def lines_of(mesh: pb.MeshStatus, width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    load = ExpertLoad()
    load.observe(mesh, now=0)
    with console.capture() as capture:
        console.print(Group(*view(mesh, load, width, height)))
    return capture.get().splitlines()


def test_load_alone_is_no_news_and_events_are_told_once() -> None:
    changes = Changes()
    mesh = mesh_of(2, num_events=1)
    first = changes.of(status_as_dict(mesh))
    assert first is not None
    assert len(first["events"]) == 1

    mesh.workers[0].rows_per_s = 99
    mesh.gateways[0].gateway.running = 3
    assert changes.of(status_as_dict(mesh)) is None

    mesh.workers[0].state = "draining"
    mesh.events.add(at_unix_s=5, kind="moved", text="away")
    second = changes.of(status_as_dict(mesh))
    assert second is not None
    assert [event["kind"] for event in second["events"]] == ["moved"]
    assert second["workers"][0]["rows_per_s"] == 99


def test_a_placement_that_comes_back_is_news_but_its_old_events_are_not() -> None:
    changes = Changes()
    status = status_as_dict(mesh_of(2, num_events=2))
    changes.of(status)
    assert changes.of({"error": "away"}) == {"error": "away", "events": []}
    assert changes.of({"error": "away"}) is None
    back = changes.of(status)
    assert back is not None
    assert back["events"] == []


def test_it_fits_on_eighty_columns_and_the_lines_there_are() -> None:
    for num_workers, height in ((4, 24), (18, 24), (18, 50), (300, 60)):
        lines = lines_of(mesh_of(num_workers, num_events=20), 80, height)
        assert len(lines) <= height
        assert max(map(len, lines)) <= 80
        assert any("worker-" in line for line in lines)
        assert lines[-1].split()[1:4] == ["worker_gone", "the", "19th"]


def test_where_not_all_workers_fit_those_in_trouble_are_shown() -> None:
    mesh = mesh_of(100)
    mesh.workers[3].state = "unreachable"
    lines = lines_of(mesh, 80, 24)
    shown = [line.split()[0] for line in lines if line.startswith("worker-")]
    assert "worker-003" in shown
    assert "worker-099" in shown
    assert f"and {100 - len(shown)} more" in " ".join(lines)


def test_the_map_shows_load_replicas_and_holes() -> None:
    mesh = mesh_of(4)
    mesh.plan.experts[1].worker_ids.append("worker-000")
    del mesh.plan.experts[2]
    load = {ExpertId(0, 0): 8.0, ExpertId(0, 1): 4.0, ExpertId(0, 2): 1.0}
    _, first, second = (str(line) for line in heat_map(mesh.plan, load, 80))
    assert first == "    0  █ ▄2x · "
    assert second == "    1  · · · · "


def test_load_is_smoothed_over_seconds() -> None:
    load = ExpertLoad()
    mesh = mesh_of(2)
    load.observe(mesh, now=0)
    assert load.rows_per_s == {ExpertId(0, 0): 40}
    del mesh.gateways[0].gateway.load[:]
    load.observe(mesh, now=3)
    assert 10 < load.rows_per_s[ExpertId(0, 0)] < 20
