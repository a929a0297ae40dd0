"""``make demo``: one look at the whole of it. A mesh starts, answers a prompt through the public
API, shows where the tokens went, and ends without a trace.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cli.local_mesh import Mesh
from cli.mesh_spec import MeshSpec
from cli.report import TextReport
from cli.tables import expert_tables
from cli.up import serving
from expert_mesh import AsyncClient
from mesh.errors import MeshError
from mesh.plan import ExpertId

MODEL = Path(__file__).resolve().parents[1] / "models" / "demo"
PROMPT = "It was the opinion of Mr. Darcy that"
MAX_TOKENS = 96


async def demo(console: Console) -> None:
    """Raises MeshError when anything is not as it should be, a process left over included."""
    console.print(f"[bold]Serving {MODEL.name}[/] with every expert in a process of its own")
    spec = MeshSpec.of({"model": MODEL})
    report = TextReport(hints=False)
    async with serving(spec, report) as mesh:
        report.ready(mesh.ready)
        pids = [process.pid for process in mesh.processes]
        await _show_answer(console, mesh)
    left = [pid for pid in pids if _group_lives(pid)]
    if left:
        raise MeshError(f"left over: the process groups {left}; end them with kill -9")
    console.print(f"all {len(pids)} processes have ended", highlight=False)


async def _show_answer(console: Console, mesh: Mesh) -> None:
    async with AsyncClient(mesh.ready.gateways[0]["grpc"]) as client:
        console.print(Text(PROMPT, style="bold"), end="")
        async for chunk in client.generate(
            PROMPT, max_tokens=MAX_TOKENS, temperature=0.7, top_k=40, seed=7
        ):
            console.print(Text(chunk.text), end="", soft_wrap=True)
            if chunk.usage and chunk.timing:
                console.print(
                    f"\n\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens, "
                    f"TTFT {chunk.timing.ttft_s * 1e3:.1f} ms, "
                    f"TPOT {chunk.timing.tpot_s * 1e3:.2f} ms",
                    highlight=False,
                )
        info = await client.server_info()
    rows = {ExpertId(e.layer, e.index): e.rows for e in info.expert_rows}
    console.print("\n[bold]tokens per expert[/]")
    for table in expert_tables(rows, lambda e: str(rows[e]), console.width):
        console.print(table)


def _group_lives(pid: int) -> bool:
    """Whether anything is left of a child or of what it started: each led a group of its own."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    try:
        asyncio.run(demo(Console()))
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
