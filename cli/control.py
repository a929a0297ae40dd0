"""How ``scale`` and ``roll`` reach a running ``up``: a Unix socket, one JSON object a line.

A client says ``{"do": "describe"}``, ``{"do": "scale", "workers": N}`` or ``{"do": "roll"}``,
once. It is told what happens, an event a line, and last ``{"event": "done", ...}`` or
``{"event": "error", "error": CODE, "message"}``. A client that goes takes its wish along: what
was done stays done, no more is.

The sockets of a user's meshes lie in a folder that nobody else may enter.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import (
    ConfigError,
    InvalidInput,
    MeshError,
    Overloaded,
    Unavailable,
    error_from_code,
)

if TYPE_CHECKING:
    from cli.local_mesh import Mesh

_MAX_LINE_BYTES = 1 << 16
_MAX_CLIENTS = 16
_MAX_UNREAD_BYTES = 1 << 20
_ANSWER_TIMEOUT_S = 5.0
_YOUNG_S = 60.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")


def _folder() -> Path:
    """Where this user's sockets lie. ConfigError when it is somebody else's."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        folder = Path(runtime) / "expert-mesh"
    else:
        folder = Path(tempfile.gettempdir()) / f"expert-mesh-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a folder of yours alone: remove it, or chmod 700")
    return folder


class Control:
    """A bound socket that takes no client yet."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._num_clients = 0

    @asynccontextmanager
    async def serving(self, mesh: Mesh) -> AsyncIterator[None]:
        """Carry out for ``mesh`` what clients ask."""

        async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._num_clients += 1
            try:
                await _serve_client(mesh, reader, writer, self._num_clients > _MAX_CLIENTS)
            finally:
                self._num_clients -= 1
                writer.close()

        async with await asyncio.start_unix_server(
            client, sock=self._listener, limit=_MAX_LINE_BYTES
        ):
            yield


@contextmanager
def listening(name: str) -> Iterator[Control]:
    """The socket of the mesh of this name. ConfigError when there is one already."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"--mesh {name!r}: 1 to 48 letters, digits, '.', '_' or '-'")
    folder = _folder()
    for old in folder.glob("*.sock"):
        # Of an `up` that was killed. A young one may be about to listen, and one that ends
        # takes its own away.
        with suppress(FileNotFoundError):
            if time.time() - old.lstat().st_mtime > _YOUNG_S and not _answers(old):
                old.unlink()
    path = folder / f"{name}.sock"
    if _answers(path):
        raise ConfigError(f"a mesh {name} is running already: choose another --mesh")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(_MAX_CLIENTS)
        try:
            yield Control(listener)
        finally:
            path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
        probe.connect(os.fspath(path))
        return True
    return False


async def _serve_client(
    mesh: Mesh, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_one_too_many: bool
) -> None:
    from mesh.grpc_server import until_first_ends

    began_s = time.monotonic()

    def tell(event: dict[str, Any]) -> None:
        if writer.transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            writer.transport.abort()  # Nobody reads it.
        else:
            writer.write(json.dumps(event).encode() + b"\n")

    async def until_gone() -> None:
        while await reader.read(_MAX_LINE_BYTES):
            pass

    try:
        if is_one_too_many:
            raise Overloaded(f"{_MAX_CLIENTS} others are connected, which is the limit")
        wish = await _read_wish(reader)
        await until_first_ends(_carry_out(mesh, wish, tell), until_gone())
        took_s = round(time.monotonic() - began_s, 3)
        tell({"event": "done", **mesh.describe(), "took_s": took_s})
    except MeshError as error:
        tell({"event": "error", "error": error.code, "message": str(error)})


async def _read_wish(reader: asyncio.StreamReader) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            wish = json.loads(await reader.readline())
    except (TimeoutError, ValueError) as error:  # ValueError: a line too long, no JSON, no UTF-8
        raise InvalidInput("expected one JSON object in one line") from error
    if not isinstance(wish, dict):
        raise InvalidInput("expected a JSON object")
    return wish


async def _carry_out(mesh: Mesh, wish: dict[str, Any], tell: Callable[[Any], None]) -> None:
    match wish:
        case {"do": "scale", "workers": int(num_workers)}:
            await mesh.scale(num_workers, tell)
        case {"do": "roll"}:
            await mesh.roll(tell)
        case {"do": "describe"}:
            pass
        case _:
            raise InvalidInput(f"none of describe, scale with workers, roll: {wish}")


# The other side.


def find(mesh: str | None, target: str | None) -> Path:
    """The socket of the running mesh of this name, or with its placement there, or the only one.

    Unavailable when there is none, ConfigError when there are several.
    """
    folder = _folder()
    paths = [folder / f"{mesh}.sock"] if mesh else sorted(folder.glob("*.sock"))
    running = {path: description for path in paths if (description := _describe(path))}
    if target:
        running = {path: d for path, d in running.items() if d["placement"] == target}
    if len(running) == 1:
        return next(iter(running))
    if running:
        names = ", ".join(f"{d['mesh']} ({d['placement']})" for d in running.values())
        raise ConfigError(f"several meshes run here: say which with --mesh, of {names}")
    which = f" {mesh}" if mesh else f" with placement at {target}" if target else ""
    raise Unavailable(
        f"no `expert-mesh up`{which} of this user runs on this machine; what runs otherwise is "
        "scaled by starting and stopping `expert-mesh worker`"
    )


def _describe(path: Path) -> dict[str, Any] | None:
    """What the mesh behind a socket says of itself; None when there is none, or not yet."""
    try:
        return next(ask(path, {"do": "describe"}, _ANSWER_TIMEOUT_S))
    except MeshError:
        return None


def ask(
    path: Path, wish: dict[str, Any], patience_s: float | None = None
) -> Iterator[dict[str, Any]]:
    """Send one wish and yield the events, the last of which is ``done``.

    Raises the error that the mesh answers, Unavailable when it goes or says nothing for longer
    than it should.
    """
    if patience_s is None:
        (description,) = ask(path, {"do": "describe"}, _ANSWER_TIMEOUT_S)
        patience_s = float(description["patience_s"])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(patience_s)
        try:
            connection.connect(os.fspath(path))
            connection.sendall(json.dumps(wish).encode() + b"\n")
            for line in connection.makefile("rb"):
                event = json.loads(line)
                if event["event"] == "error":
                    raise error_from_code(event["error"], event["message"])
                yield event
                if event["event"] == "done":
                    return
        except OSError as error:
            raise Unavailable(f"the mesh behind {path} does not answer: {error}") from error
    raise Unavailable(f"the mesh behind {path} ended")
