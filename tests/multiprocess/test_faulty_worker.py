"""A worker that is well, and gets one expert wrong."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.multiprocess.test_elastic import load, until
from tests.running import RunningMesh, running_mesh
from tests.token_is_expert import make_token_is_expert

WRONG = "wrong"


@contextmanager
def worker_out_of_memory(mesh: RunningMesh, model: Path, index: int) -> Iterator[None]:
    """A worker that joins, and cannot compute the experts of an index."""
    flags = ("--model", str(model), "--placement", mesh.placement, "--worker-id", WRONG)
    command = [sys.executable, "-m", "tests.worker_out_of_memory", str(index), *flags]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def kinds(status: dict[str, Any]) -> set[str]:
    return {event["kind"] for event in status["events"]}


def experts_of(status: dict[str, Any], worker_id: str) -> list[list[int]] | None:
    return next((w["experts"] for w in status["workers"] if w["id"] == worker_id), None)


async def test_an_expert_that_its_worker_cannot_compute_is_loaded_by_another(
    tmp_path: Path,
) -> None:
    model = make_token_is_expert(tmp_path / "model")
    flags = ("--max-replicas", "1", "--expert-patience-s", "60")
    with running_mesh("--model", model, *flags) as mesh, worker_out_of_memory(mesh, model, 3):
        await until(mesh, lambda status: experts_of(status, WRONG) is not None)
        async with load(mesh):
            # Nobody else has a seat for what this worker has: it stays until somebody is right.
            home = mesh.home_of(layer=0, index=3)
            drain = ("drain", home, "--target", mesh.placement)
            leaving = asyncio.create_task(asyncio.to_thread(mesh.expert_mesh, *drain))
            await until(mesh, lambda status: "faulty_expert_stays" in kinds(status))

            await asyncio.to_thread(mesh.ask, "scale", "5")
            await until(mesh, lambda status: experts_of(status, WRONG) == [])
            await leaving
        status = mesh.status()
        assert status["complete"]
        assert "expert_faulty" in kinds(status)
