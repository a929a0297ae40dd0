"""The command line of Expert Mesh.

Commands import what they run only when they run: ``--help``, ``generate`` and ``status`` never
load torch.
"""

from __future__ import annotations

import asyncio
import faulthandler
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from cli.bench import serve as bench_serve
from cli.bench_layer import layer as bench_layer
from cli.doctor import doctor
from cli.elastic import drain, rebalance, roll, scale
from cli.generate import generate
from cli.mesh_spec import UP_OPTIONS
from cli.options import build, command, options_of
from cli.status import plan, status
from cli.up import up
from mesh.config import GatewayConfig, PlacementConfig, WorkerConfig
from mesh.errors import ConfigError, MeshError

_STDERR = 2
_OPEN_FILES = 65536

app = typer.Typer(
    name="expert-mesh",
    help="Serve Mixture-of-Experts language models with every expert as a service.",
    epilog="An option can also be said by the variable EXPERT_MESH_<OPTION>, or in a file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure a running mesh.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")


def _placement(values: dict[str, Any]) -> None:
    """Decide which expert lives on which worker."""
    config = build(PlacementConfig, values)
    from placement.service import serve

    asyncio.run(serve(config))


def _worker(values: dict[str, Any]) -> None:
    """Serve experts to gateways."""
    config = build(WorkerConfig, values)
    from expert_worker.service import serve

    asyncio.run(serve(config))


def _gateway(values: dict[str, Any]) -> None:
    """Serve the public API: attention, routing and sampling of a model."""
    config = build(GatewayConfig, values)
    from gateway.service import main as serve

    raise typer.Exit(serve(config))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("expert-mesh"))
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("up")(command(UP_OPTIONS, up))
app.command("placement")(command(options_of(PlacementConfig), _placement))
app.command("worker")(command(options_of(WorkerConfig), _worker))
app.command("gateway")(command(options_of(GatewayConfig), _gateway))
for tool in (generate, status, plan, scale, roll, drain, rebalance, doctor):
    app.command()(tool)
bench.command("serve")(bench_serve)
bench.command("layer")(bench_layer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What a person did wrong is one line, no traceback."""
    # A crash in compiled code says where it was; processes that are forked from this one do too.
    faulthandler.enable(_STDERR)
    _allow_open_files()
    try:
        app(args=argv, prog_name="expert-mesh")
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(f"error: {exit.code}", file=sys.stderr)
        return exit.code if isinstance(exit.code, int) else 1
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _allow_open_files() -> None:
    """As many as the system lets us have: the usual 1024 are not enough for a thousand clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
