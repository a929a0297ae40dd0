"""Clients of the public gRPC API, for code with an event loop and without.

Errors are those of :mod:`mesh.errors`, chosen by the status of the call.
"""

from __future__ import annotations

import reprlib
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expert_mesh.types import Chunk, Completion, Sampling, chunk_of, completion_of
from mesh.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    InvalidInput,
    MeshError,
    ModelNotFound,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from mesh.grpc_server import TlsFiles, open_channel, open_sync_channel
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

_SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_CALL_TIMEOUT_S = 30.0
"""Of every call but generate and complete, which take what time the caller gives them."""
_BY_STATUS = {
    error.status: error
    for error in (
        AlreadyExists,
        Cancelled,
        DeadlineExceeded,
        InvalidInput,
        ModelNotFound,
        Overloaded,
        Unauthenticated,
        Unavailable,
    )
}


class Options(TypedDict, total=False):
    """How to reach a gateway, beside its address.

    TLS is on when ``tls`` or any of its files says so; without ``tls_ca`` the system's
    authorities are trusted. ``tls_cert`` and ``tls_key`` are for servers that want mTLS.
    """

    api_key: str | None
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None


class _Base:
    """What both clients know: whom to call, and as whom."""

    def __init__(self, target: str, options: Options) -> None:
        self.target = target
        api_key = options.get("api_key")
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        files = TlsFiles(options.get("tls_cert"), options.get("tls_key"), options.get("tls_ca"))
        self._tls = files if options.get("tls") or files != TlsFiles() else None

    def _error(self, error: Any) -> MeshError:
        """The error that a status stands for."""
        status, details = error.code(), error.details()
        if status == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details:
            return Unavailable(
                f"no gateway answers at {self.target}: {details}; "
                "check the address, and whether the gateway wants TLS"
            )
        if status in _BY_STATUS:
            return _BY_STATUS[status](details)
        other = MeshError(details)
        other.status = status
        return other


def _request(
    prompt: str | Sequence[int], sampling: Sampling, stream: bool, request_id: str, model: str
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(stream=stream)
    _put(request, "request_id", request_id)
    _put(request, "model", model)
    for name, value in sampling.items():
        _put(request.sampling, name, value)
    if isinstance(prompt, str):
        _put(request, "prompt", prompt)
    else:
        _put(request.prompt_token_ids, "ids", prompt, called="prompt")
        request.prompt_token_ids.SetInParent()
    return request


_Field = FieldDescriptor
_WANTED = {
    _Field.CPPTYPE_INT32: "a whole number from -2147483648 to 2147483647",
    _Field.CPPTYPE_UINT32: "a whole number from 0 to 4294967295",
    _Field.CPPTYPE_UINT64: "a whole number from 0 to 18446744073709551615",
    _Field.CPPTYPE_FLOAT: "a number",
    _Field.CPPTYPE_BOOL: "true or false",
    _Field.CPPTYPE_STRING: "text in Unicode",
}


def _put(message: Message, name: str, value: object, called: str = "") -> None:
    """Set a field. InvalidInput, which names it and what it takes, where it cannot be sent."""
    values: Any = {name: value}
    try:
        message.MergeFrom(type(message)(**values))
    except (TypeError, ValueError) as error:
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is None:
            raise InvalidInput(f"there is no option {name}") from error
        wanted = _WANTED[field.cpp_type]
        if field.is_repeated and isinstance(value, Iterable):
            value = next((one for one in value if not _fits(message, {name: [one]})), value)
        elif field.is_repeated:
            wanted = f"a list, each {wanted}"
        raise InvalidInput(f"{called or name}: {reprlib.repr(value)} is not {wanted}") from error


def _fits(message: Message, values: Any) -> bool:
    try:
        type(message)(**values)
    except (TypeError, ValueError):
        return False
    return True


class Client(_Base):
    """Calls the gateway at ``target`` (host:port), from any number of threads.

    Close it, or use ``with``.
    """

    def __init__(self, target: str, **options: Unpack[Options]) -> None:
        super().__init__(target, options)
        self._channel = open_sync_channel(target, self._tls)
        self._stub = pb_grpc.InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Generator[Chunk, None, None]:
        """Stream the output of a text or of token ids. Closing the iterator cancels the request."""
        return self._chunks(_request(prompt, sampling, True, request_id, model), timeout_s)

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The whole output of a text or of token ids."""
        request = _request(prompt, sampling, False, request_id, model)
        return completion_of(self._chunks(request, timeout_s))

    def cancel(self, request_id: str) -> bool:
        """End a running request of anybody's; whether there was one."""
        reply = self._call(self._stub.Cancel, pb.CancelRequest(request_id=request_id))
        return bool(reply.found)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def model_info(self) -> pb.ModelInfo:
        """What is served."""
        info: pb.ModelInfo = self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())
        return info

    def server_info(self) -> pb.ServerInfo:
        """How the gateway is doing."""
        info: pb.ServerInfo = self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest())
        return info

    def health(self) -> bool:
        """Whether the gateway is ready to serve. Raises Unavailable where nobody listens."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        reply = self._call(check, health_pb2.HealthCheckRequest(service=_SERVICE_NAME))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Cancel what runs and hang up."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _chunks(
        self, request: pb.GenerateRequest, timeout_s: float | None
    ) -> Generator[Chunk, None, None]:
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for reply in call:
                yield chunk_of(reply)
        except grpc.RpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._error(error) from error


class AsyncClient(_Base):
    """Calls the gateway at ``target`` (host:port), on the event loop it was made on.

    Close it, or use ``async with``.
    """

    def __init__(self, target: str, **options: Unpack[Options]) -> None:
        super().__init__(target, options)
        self._channel = open_channel(target, self._tls)
        self._stub: Any = pb_grpc.InferenceStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncGenerator[Chunk, None]:
        """Stream the output of a text or of token ids. Closing the iterator cancels the request."""
        return self._chunks(_request(prompt, sampling, True, request_id, model), timeout_s)

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion:
        """The whole output of a text or of token ids."""
        request = _request(prompt, sampling, False, request_id, model)
        async with aclosing(self._chunks(request, timeout_s)) as chunks:
            return completion_of([chunk async for chunk in chunks])

    async def cancel(self, request_id: str) -> bool:
        """End a running request of anybody's; whether there was one."""
        reply = await self._call(self._stub.Cancel, pb.CancelRequest(request_id=request_id))
        return bool(reply.found)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        request = pb.TokenizeRequest(text=text, add_special_tokens=add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def model_info(self) -> pb.ModelInfo:
        """What is served."""
        info: pb.ModelInfo = await self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest())
        return info

    async def server_info(self) -> pb.ServerInfo:
        """How the gateway is doing."""
        info: pb.ServerInfo = await self._call(self._stub.GetServerInfo, pb.GetServerInfoRequest())
        return info

    async def health(self) -> bool:
        """Whether the gateway is ready to serve. Raises Unavailable where nobody listens."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        reply = await self._call(check, health_pb2.HealthCheckRequest(service=_SERVICE_NAME))
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Cancel what runs and hang up."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _chunks(
        self, request: pb.GenerateRequest, timeout_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for reply in call:
                yield chunk_of(reply)
        except grpc.RpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise self._error(error) from error
