"""Asking placement, for the commands that do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mesh.config import PlacementConfig

if TYPE_CHECKING:
    from protos import placement_pb2 as pb

Target = Annotated[str, typer.Option(help="host:port of the placement service.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object.")]
TlsCert = Annotated[Path | None, typer.Option(help="PEM certificate to show (mTLS).")]
TlsKey = Annotated[Path | None, typer.Option(help="PEM key of the certificate.")]
TlsCa = Annotated[Path | None, typer.Option(help="PEM authority to trust; turns TLS on.")]

DEFAULT_TARGET = f"127.0.0.1:{PlacementConfig.port}"
TIMEOUT_S = 10.0


class PlacementClient:
    """A channel whose errors are ours: PlacementError for what placement refuses, DeadlineExceeded,
    else Unavailable. It connects on its first call, and again whenever placement is back."""

    def __init__(
        self, target: str, tls_cert: Path | None, tls_key: Path | None, tls_ca: Path | None
    ) -> None:
        from mesh.grpc_server import TlsFiles, open_sync_channel
        from protos.placement_pb2_grpc import PlacementStub

        self._target = target
        tls = TlsFiles(tls_cert, tls_key, tls_ca) if tls_cert or tls_ca else None
        self._channel = open_sync_channel(target, tls)
        self._stub = PlacementStub(self._channel)

    def __enter__(self) -> PlacementClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def status(self) -> pb.MeshStatus:
        from protos import placement_pb2 as pb

        status: pb.MeshStatus = self._call(self._stub.GetStatus, pb.GetStatusRequest(), TIMEOUT_S)
        return status

    def drain(self, worker_id: str, timeout_s: float) -> pb.DrainReply:
        """Returns once the worker is gone."""
        from protos import placement_pb2 as pb

        request = pb.DrainRequest(worker_id=worker_id)
        reply: pb.DrainReply = self._call(self._stub.Drain, request, timeout_s)
        return reply

    def rebalance(self) -> pb.RebalanceReply:
        from protos import placement_pb2 as pb

        request = pb.RebalanceRequest()
        reply: pb.RebalanceReply = self._call(self._stub.Rebalance, request, 6 * TIMEOUT_S)
        return reply

    def _call(self, rpc: Callable[..., Any], request: Any, timeout_s: float) -> Any:
        import grpc

        from mesh.errors import DeadlineExceeded, PlacementError, Unavailable

        try:
            return rpc(request, timeout=timeout_s)
        except grpc.RpcError as error:
            details = error.details()
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise PlacementError(details) from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(
                    f"placement at {self._target} was not done after {timeout_s:.0f} s; "
                    "`expert-mesh status` shows how far it is"
                ) from error
            raise Unavailable(
                f"placement at {self._target} does not answer: {details}; "
                "check --target, and --tls-ca where the mesh uses TLS"
            ) from error
