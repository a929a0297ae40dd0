"""``expert-mesh up``: a whole mesh on one machine, from the first process to the last.

Placement comes first, since all others ask it; then workers and gateways at once. They end
the other way round, so that every request in flight finds its experts. In between, ``scale``
and ``roll`` tell it what to change (:mod:`cli.control`).
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import mps
from cli.mesh_spec import MeshSpec
from mesh.errors import MeshError

if TYPE_CHECKING:
    from cli.local_mesh import Mesh
    from cli.report import JsonReport, TextReport
    from cli.supervisor import Process

_PRELOAD = (
    "torch",
    "ucxx._lib.libucxx",
    "grpc.aio",
    "placement.service",
    "expert_worker.service",
    "gateway.service",
    "gateway.engine_process",
)


def up(values: dict[str, Any]) -> None:
    """Serve a checkpoint on this machine: placement, expert workers and gateways."""
    from cli.report import JsonReport, TextReport

    spec = MeshSpec.of(values)
    asyncio.run(_run(spec, JsonReport() if spec.up.json else TextReport(hints=True)))


async def _run(spec: MeshSpec, report: JsonReport | TextReport) -> None:
    from cli.control import listening

    with suppress(asyncio.CancelledError), listening(spec.up.name) as control:
        async with serving(spec, report) as mesh, control.serving(mesh):
            report.ready(mesh.ready)
            await mesh.watch()


@asynccontextmanager
async def serving(spec: MeshSpec, report: JsonReport | TextReport) -> AsyncIterator[Mesh]:
    """A mesh that is ready. On every way out it is drained, and no process of it is left.

    Raises DeadlineExceeded or Unavailable when it cannot start. SIGINT and SIGTERM cancel the
    task that entered; a second one cuts the draining short.
    """
    from cli.local_mesh import Mesh
    from cli.supervisor import Supervisor

    ended: asyncio.Queue[Process] = asyncio.Queue()
    with ExitStack() as at_end:
        log_dir = spec.up.log_dir
        if log_dir is None:
            log_dir = Path(tempfile.mkdtemp(prefix="expert-mesh-"))
            at_end.callback(shutil.rmtree, log_dir)
        log_dir.mkdir(parents=True, exist_ok=True)
        if spec.shares_gpus and not at_end.enter_context(mps.sharing()):
            print(f"warning: {mps.OFF}", file=sys.stderr)
        async with Supervisor(_PRELOAD, log_dir, on_exit=ended.put_nowait) as supervisor:
            mesh = Mesh(spec, supervisor, report, ended)
            _on_signals(asyncio.current_task(), mesh)
            try:
                await mesh.start()
                yield mesh
            except MeshError:
                at_end.pop_all()  # The logs may say more.
                raise
            finally:
                await mesh.drain()


def _on_signals(task: asyncio.Task[Any] | None, mesh: Mesh) -> None:
    def told_to_end() -> None:
        if mesh.draining or task is None:
            mesh.kill()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end)
