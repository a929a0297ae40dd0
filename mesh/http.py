"""``/healthz`` (alive), ``/readyz`` (may serve) and ``/metrics`` over plain HTTP, in a thread."""

from __future__ import annotations

import asyncio
import json
import socketserver
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socket import AF_INET, AF_INET6, SHUT_RDWR, socket
from types import TracebackType
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from mesh.config import ServerConfig
from mesh.errors import ConfigError
from mesh.grpc_server import advertised_address

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Trouble = Callable[[], str | None]
"""Says in words what is wrong; None when nothing is. Called from the HTTP threads."""

_MAX_CONNECTIONS = 32
_LONGEST_REQUEST_S = 10.0


class HttpServer:
    """The endpoint of one process. Listens once :meth:`start` returns, until :meth:`stop`."""

    def __init__(
        self,
        config: ServerConfig,
        registry: CollectorRegistry,
        *,
        why_not_ready: Trouble,
        why_not_alive: Trouble = lambda: None,
    ) -> None:
        self._config = config
        self._metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._probes = {"/healthz": why_not_alive, "/readyz": why_not_ready}
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.address = ""
        """``host:port`` to reach it by, valid after :meth:`start`."""

    def start(self) -> None:
        """Bind and serve. ConfigError when the port is taken or the host is not ours."""
        config = self._config
        try:
            server = _Server(config.host, config.http_port)
        except OSError as error:
            raise ConfigError(
                f"cannot listen for HTTP on {config.host}:{config.http_port}: {error.strerror}; "
                "choose another --http-port (0 takes a free one) or --host"
            ) from error
        server.set_app(self._answer)
        self.address = advertised_address(config, server.server_port)
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": None}, name="http", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; requests in hand are answered by threads that nobody waits for."""
        if self._server is not None and self._thread is not None:
            # Wakes the thread for good, which sleeps without a timeout: idle costs nothing.
            self._server.socket.shutdown(SHUT_RDWR)
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    async def __aenter__(self) -> HttpServer:
        self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.stop)

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        if path not in self._probes:
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /healthz, /readyz and /metrics\n"]
        trouble = self._probes[path]()
        start_response(
            "200 OK" if trouble is None else "503 Service Unavailable",
            [("Content-Type", "application/json"), ("Cache-Control", "no-store")],
        )
        return [json.dumps({"ok": trouble is None, "reason": trouble}).encode() + b"\n"]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread a connection, for as many connections as are allowed at once."""

    daemon_threads = True
    allow_reuse_port = False

    def __init__(self, host: str, port: int) -> None:
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self.address_family = AF_INET6 if ":" in host else AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # The standard one looks the host's name up, which can take as long as DNS likes.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._slots.acquire(blocking=False)

    def process_request_thread(
        self, request: socket | tuple[bytes, socket], client_address: Any
    ) -> None:
        # Of all of it: whoever sends a byte now and then would hold a slot for ever.
        deadline = threading.Timer(_LONGEST_REQUEST_S, _cut, [request])
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nobody's error."""


def _cut(connection: socket) -> None:
    with suppress(OSError):  # It has ended meanwhile.
        connection.shutdown(SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: no event."""
