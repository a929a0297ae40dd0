"""The gRPC server that all three services run, and the channels that reach them.

Errors become status in one place here: a handler raises a :class:`mesh.errors.MeshError` and
the client sees its status and its sentence; anything else is our bug, logged in full and told
to the client in one sentence. Handlers that stream are asynchronous generators.
"""

from __future__ import annotations

import asyncio
import hmac
import resource
import signal
import socket
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mesh.config import ServerConfig
from mesh.errors import Cancelled, ConfigError, InvalidInput, MeshError, Unauthenticated
from mesh.health import SERVICE_NAME as HEALTH_NAME
from mesh.health import Health

if TYPE_CHECKING:  # generic in the type stubs alone
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()

MAX_MESSAGE_BYTES = 4 << 20
_HEALTH_PREFIX = f"/{HEALTH_NAME}/"
_MAX_CONNECTIONS = 4096
# A client that leaves its stream unread for so long loses what the stream holds of the server.
_LONGEST_WRITE_S = 30.0

# A client may ping as often as every 5 s, ours do every 20 s and only while a call is open, so
# that nobody is ever sent away for too many pings.
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a taken port must be an error, not half of the clients
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.bdp_probe", 0),  # a ping with every heartbeat; no stream here is that wide
)
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.enable_http_proxy", 0),  # the mesh is on this host or a private network
)


def _size_options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one side of a link. Without ``ca`` a client trusts the system's authorities."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @classmethod
    def of(cls, config: ServerConfig) -> TlsFiles | None:
        """What a process was configured with; None: plaintext."""
        if config.tls_cert is None:
            return None
        return cls(config.tls_cert, config.tls_key, config.tls_ca)

    def server_credentials(self) -> grpc.ServerCredentials:
        """With ``ca``, clients without a certificate from it are refused (mTLS)."""
        key, cert, ca = self._contents()
        if key is None or cert is None:
            raise ConfigError("a TLS server needs a certificate and its key")
        return grpc.ssl_server_credentials(
            [(key, cert)], root_certificates=ca, require_client_auth=ca is not None
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Shows the certificate, if there is one, and demands one that the authority signed."""
        key, cert, ca = self._contents()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        try:
            key, cert, ca = (
                path.read_bytes() if path else None for path in (self.key, self.cert, self.ca)
            )
        except OSError as error:
            raise ConfigError(
                f"cannot read {error.filename}: {error.strerror}; "
                "check the path and that this user may read it"
            ) from error
        return key, cert, ca


def open_channel(
    target: str, tls: TlsFiles | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.aio.Channel:
    """A channel for the running event loop. It connects on its first call, and again for ever."""
    options = (*_CHANNEL_OPTIONS, *_size_options(max_message_bytes))
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, tls.channel_credentials(), options=options)


def open_sync_channel(
    target: str, tls: TlsFiles | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> grpc.Channel:
    """The same for code without an event loop."""
    options = (*_CHANNEL_OPTIONS, *_size_options(max_message_bytes))
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, tls.channel_credentials(), options=options)


def join_host_port(host: str, port: int) -> str:
    """``host:port``, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised_address(config: ServerConfig, port: int) -> str:
    """How others reach a port of this process."""
    host = config.advertise_host or config.host
    return join_host_port(socket.gethostname() if host in ("0.0.0.0", "::") else host, port)


def stop_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set from now on, in place of killing the process."""
    requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, requested.set)
    return requested


async def until_first_ends(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Run these side by side until one ends, cancel the others, raise what it raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class GrpcServer:
    """One process's server: its services, health, reflection, TLS, bounds and a graceful end.

    ``services`` pairs each generated ``add_XServicer_to_server`` with its servicer.
    ``service_names`` are full names; each starts NOT_SERVING, while ``""`` (liveness) is
    SERVING from the start. Where ``tokens`` are given, every RPC but health must carry one of
    them as ``authorization: Bearer <token>``.
    """

    def __init__(
        self,
        config: ServerConfig,
        services: Sequence[tuple[Callable[[Any, grpc.aio.Server], None], Any]],
        service_names: Sequence[str],
        *,
        tokens: Sequence[str] = (),
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_concurrent_rpcs: int = 10_000,
        longest_write_s: float = _LONGEST_WRITE_S,
    ) -> None:
        self._config = config
        self._services = services
        self._service_names = service_names
        self._tokens = tuple(token.encode() for token in tokens)
        self._max_message_bytes = max_message_bytes
        self._max_concurrent_rpcs = max_concurrent_rpcs
        self._longest_write_s = longest_write_s
        self._server: grpc.aio.Server | None = None
        self._health = Health()
        self.port = 0
        self.address = ""
        """``host:port`` to reach it by, valid after :meth:`start`."""

    async def start(self) -> None:
        """Bind and serve. ConfigError when the port is taken or the TLS files don't fit."""
        server = grpc.aio.server(
            interceptors=[_Interceptor(self._tokens, self._longest_write_s)],
            options=[
                *_SERVER_OPTIONS,
                *_size_options(self._max_message_bytes),
                ("grpc.max_allowed_incoming_connections", _max_connections()),
            ],
            maximum_concurrent_rpcs=self._max_concurrent_rpcs,
        )
        for add_to, servicer in self._services:
            add_to(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            [*self._service_names, HEALTH_NAME, reflection.SERVICE_NAME], server
        )
        for name in self._service_names:
            await self.set_ready(name, False)
        self.port = self._bind(server)
        await server.start()
        self._server = server
        self.address = advertised_address(self._config, self.port)

    def _bind(self, server: grpc.aio.Server) -> int:
        config = self._config
        if config.port == 0 and config.preferred_port:
            with suppress(RuntimeError):
                return self._listen(server, config.preferred_port)
        try:
            return self._listen(server, config.port)
        except RuntimeError as error:
            listen = join_host_port(config.host, config.port)
            raise ConfigError(
                f"cannot listen for gRPC on {listen}: {_why_bind_failed(config)}; "
                "choose another --port (0 takes a free one) or --host"
            ) from error

    def _listen(self, server: grpc.aio.Server, port: int) -> int:
        listen = join_host_port(self._config.host, port)
        tls = TlsFiles.of(self._config)
        if tls is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, tls.server_credentials())

    async def set_ready(self, service_name: str, ready: bool) -> None:
        """What ``grpc.health.v1`` says of a name from now on. New names may come at any time."""
        self._health.set_ready(service_name, ready)

    async def stop(self, grace_s: float = 2.0) -> None:
        """Say NOT_SERVING, take no new call, give those that run ``grace_s``, then cut them."""
        if self._server is not None:
            server, self._server = self._server, None
            self._health.end()
            await server.stop(grace_s)

    async def __aenter__(self) -> GrpcServer:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()


def _max_connections() -> int:
    """Clients may take half of this process's files; the rest is for itself and its peers."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _MAX_CONNECTIONS if files == resource.RLIM_INFINITY else min(_MAX_CONNECTIONS, files // 2)
    )


def _why_bind_failed(config: ServerConfig) -> str:
    """gRPC only says that it failed; the system says why."""
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
    except OSError as error:
        return str(error.strerror or error)
    return "the TLS files were not accepted" if config.tls_cert else "the address is not usable"


class _Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks for the token, for every RPC but health, turns errors into status, and ends streams
    that nobody reads."""

    def __init__(self, tokens: tuple[bytes, ...], longest_write_s: float) -> None:
        self._tokens = tokens
        self._longest_write_s = longest_write_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        is_health = method.startswith(_HEALTH_PREFIX)
        authorized = is_health or self._authorized(handler_call_details.invocation_metadata)
        behavior: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )

        @asynccontextmanager
        async def guard(context: _Context) -> AsyncIterator[None]:
            try:
                if not authorized:
                    raise Unauthenticated(
                        "this server wants an API key: send 'authorization: Bearer <key>'"
                    )
                yield
            except MeshError as error:
                await context.abort(error.status, str(error))
            except grpc.aio.BaseError:
                raise  # gRPC's own: aborted, or the client is gone
            except Exception:
                log.exception("rpc_failed", method=method)
                await context.abort(
                    grpc.StatusCode.INTERNAL,
                    f"{method} failed inside the server; its log says why",
                )

        async def answer(request: Any, context: _Context) -> Any:
            async with guard(context):
                return await behavior(_readable(request), context)

        async def stream(request: Any, context: _Context) -> None:
            # Closed here and now when the client vanishes, not when the collector comes by.
            async with guard(context), aclosing(behavior(_readable(request), context)) as replies:
                if is_health:  # A watcher keeps its place, of which there are so many, to the end.
                    async for reply in replies:
                        await context.write(reply)
                else:
                    await _write_all(replies, context, method, self._longest_write_s)

        wrap = _WRAPPERS[handler.request_streaming, handler.response_streaming]
        return wrap(
            stream if handler.response_streaming else answer,
            request_deserializer=(
                handler.request_deserializer
                if handler.request_streaming
                else _or_its_error(handler.request_deserializer)
            ),
            response_serializer=handler.response_serializer,
        )

    def _authorized(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        if not self._tokens:
            return True
        given = _bearer(metadata)
        # Every token is compared, in constant time, so that time tells nothing about any.
        return any([hmac.compare_digest(given, token) for token in self._tokens])


async def _write_all(
    replies: AsyncGenerator[Any, None], context: _Context, method: str, longest_write_s: float
) -> None:
    """Write what comes. Once a write takes too long, ``replies`` are closed, and with them what
    they hold; the client is told (Cancelled) when it reads again.

    gRPC can neither take a write back nor cut a call from this side: it stays until its client
    reads, or is gone.
    """
    loop = asyncio.get_running_loop()
    closing: list[asyncio.Task[None]] = []

    def give_up() -> None:
        log.warning("client_does_not_read", method=method, after_s=longest_write_s)
        closing.append(asyncio.create_task(replies.aclose()))

    async for reply in replies:
        timer = loop.call_later(longest_write_s, give_up)
        try:
            await context.write(reply)
        finally:
            timer.cancel()
            for closed in closing:
                await closed
        if closing:
            raise Cancelled(
                f"cancelled: for {longest_write_s:.0f} s the client read nothing of its stream"
            )


def _or_its_error(deserialize: Any) -> Callable[[bytes], Any]:
    """gRPC would answer UNKNOWN to bytes that are no message: the handler is to say it instead."""

    def read(message: bytes) -> Any:
        try:
            return deserialize(message)
        except DecodeError as error:
            return error

    return read


def _readable(request: Any) -> Any:
    if isinstance(request, DecodeError):
        raise InvalidInput(f"{request}; strings must be UTF-8, and the message a protobuf")
    return request


_WRAPPERS = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> bytes:
    values: Iterator[str | bytes] = (value for key, value in metadata if key == "authorization")
    value = next(values, "")
    scheme, _, token = (value.decode() if isinstance(value, bytes) else value).partition(" ")
    return token.strip().encode() if scheme.lower() == "bearer" else b""
