"""The one tree of errors. Every message names the thing and the remedy.

UCX errors become these at the transport, these become gRPC status in one interceptor
(:mod:`mesh.grpc_server`), and the engine sends them to its front by ``code``.
"""

from __future__ import annotations

import grpc


class MeshError(Exception):
    """Base of all errors that a client or an operator may see."""

    status = grpc.StatusCode.INTERNAL

    @property
    def code(self) -> str:
        """The name by which the error crosses a process boundary."""
        return type(self).__name__


class InvalidInput(MeshError):
    """A request that no retry can make right."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(MeshError):
    """A name that nothing here has."""

    status = grpc.StatusCode.NOT_FOUND


class ModelNotFound(NotFound):
    """A model name that this gateway does not serve."""


class AlreadyExists(MeshError):
    """A name that is taken: a request id in flight, a worker id that lives."""

    status = grpc.StatusCode.ALREADY_EXISTS


class ModelMismatch(MeshError):
    """Two processes that were started on different weights."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class Overloaded(MeshError):
    """A bounded queue is full."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unauthenticated(MeshError):
    """No bearer token, or a wrong one."""

    status = grpc.StatusCode.UNAUTHENTICATED


class DeadlineExceeded(MeshError):
    """The request's own deadline passed."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(MeshError):
    """The client took its request back."""

    status = grpc.StatusCode.CANCELLED


class Unavailable(MeshError):
    """Something that this request needs is away; another try may succeed."""

    status = grpc.StatusCode.UNAVAILABLE


class ExpertUnavailable(Unavailable):
    """No worker serves an expert that a row needs.

    ``coming`` says that one may soon: it is being loaded, or placement does not know yet.
    """

    def __init__(self, layer: int, index: int, reason: str, *, coming: bool = False) -> None:
        super().__init__(
            f"expert {index} of layer {layer} is unavailable: {reason}; "
            "start a worker for it, or try again once `expert-mesh status` shows it ready"
        )
        self.layer = layer
        self.index = index
        self.coming = coming


class EngineDied(Unavailable):
    """The gateway's engine process ended."""


class CheckpointError(MeshError):
    """A model directory that cannot be served as it is."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class UnsupportedModel(CheckpointError):
    """An architecture or a setting that would change the numbers and is not implemented."""


class PlacementError(MeshError):
    """The placement rules cannot be met."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class ConfigError(MeshError):
    """A flag, variable or file that makes no sense, found at start."""

    status = grpc.StatusCode.FAILED_PRECONDITION


class TransportError(MeshError):
    """A send or receive that did not complete."""

    status = grpc.StatusCode.UNAVAILABLE


class PeerLost(TransportError):
    """The other side of an endpoint is gone."""


class MessageTruncated(TransportError):
    """A message longer than the buffer that was posted for it."""


def _subclasses(cls: type[MeshError]) -> list[type[MeshError]]:
    return [cls] + [leaf for sub in cls.__subclasses__() for leaf in _subclasses(sub)]


def error_from_code(code: str, message: str) -> MeshError:
    """Rebuild an error that came over a process boundary as its class name and message."""
    for cls in _subclasses(MeshError):
        if cls.__name__ == code:
            error = cls.__new__(cls)
            Exception.__init__(error, message)
            return error
    return MeshError(message)
