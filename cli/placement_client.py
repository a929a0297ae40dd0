"""Asking placement, for the commands that do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh.config import PlacementConfig

if TYPE_CHECKING:
    from protos.placement_pb2_grpc import PlacementStub

Target = Annotated[str, typer.Option(help="host:port of the placement service.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM certificate to show (mTLS).")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM key of the certificate.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM authority to trust; turns TLS on.")]

DEFAULT_TARGET = f"127.0.0.1:{PlacementConfig.port}"
TIMEOUT_S = 10.0


@contextmanager
def placement_at(
    target: str, tls_cert: Path | None, tls_key: Path | None, tls_ca: Path | None
) -> Iterator[PlacementStub]:
    """A stub whose errors are ours: PlacementError for what it refuses, else Unavailable."""
    import grpc

    from mesh.errors import DeadlineExceeded, PlacementError, Unavailable
    from mesh.grpc_server import TlsFiles, open_sync_channel
    from protos.placement_pb2_grpc import PlacementStub

    tls = TlsFiles(tls_cert, tls_key, tls_ca) if tls_cert or tls_ca else None
    with open_sync_channel(target, tls) as channel:
        try:
            yield PlacementStub(channel)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise PlacementError(error.details()) from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"placement at {target} is not done in time") from error
            raise Unavailable(
                f"placement at {target} does not answer: {error.details()}; "
                "check --target, and --tls-ca where the mesh uses TLS"
            ) from error
