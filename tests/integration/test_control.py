"""The socket by which ``scale`` and ``roll`` reach ``up``, in front of a mesh that plays along."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cli import control
from mesh.errors import ConfigError, InvalidInput, PlacementError, Unavailable


class ScriptedMesh:
    """Tells two events when it is scaled, and rolls until it is told to stop."""

    def __init__(self, placement: str) -> None:
        self.placement = placement
        self.workers = 4
        self.rolling = asyncio.Event()
        self.stopped = asyncio.Event()

    def describe(self) -> dict[str, Any]:
        return {"mesh": "m", "placement": self.placement, "workers": self.workers, "patience_s": 9}

    async def scale(self, num_workers: int, listener: Any) -> None:
        if num_workers < 4:
            raise PlacementError("too few")
        listener({"event": "joined", "name": "a"})
        listener({"event": "joined", "name": "b"})
        self.workers = num_workers

    async def roll(self, listener: Any) -> None:
        listener({"event": "left", "name": "a"})
        self.rolling.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "expert-mesh"


@asynccontextmanager
async def running(name: str, placement: str = "here:1") -> AsyncIterator[ScriptedMesh]:
    mesh = ScriptedMesh(placement)
    with control.listening(name) as socket_:
        async with socket_.serving(mesh):  # type: ignore[arg-type]
            yield mesh


async def ask(path: Path, **wish: Any) -> list[dict[str, Any]]:
    return await asyncio.to_thread(lambda: list(control.ask(path, wish)))


async def find(mesh: str | None = None, target: str | None = None) -> str:
    return (await asyncio.to_thread(control.find, mesh, target)).stem


async def test_a_wish_is_answered_with_its_events_and_done(folder: Path) -> None:
    async with running("m"):
        assert await find() == "m"
        joined, _, done = await ask(folder / "m.sock", do="scale", workers=6)
    assert joined == {"event": "joined", "name": "a"}
    assert (done["event"], done["workers"]) == ("done", 6)


async def test_errors_arrive_as_what_they_are(folder: Path) -> None:
    async with running("m"):
        with pytest.raises(PlacementError, match="too few"):
            await ask(folder / "m.sock", do="scale", workers=3)
        for wrong in ({"do": "scale"}, {"do": "scale", "workers": "x"}, {"do": "dance"}, {}):
            with pytest.raises(InvalidInput, match="none of describe, scale"):
                await ask(folder / "m.sock", **wrong)


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"\xff\n", b"x" * (1 << 17) + b"\n"])
async def test_what_is_no_wish_is_refused(folder: Path, line: bytes) -> None:
    async with running("m"):
        reader, writer = await asyncio.open_unix_connection(folder / "m.sock")
        writer.write(line)
        answer = json.loads(await reader.readline())
        writer.close()
        assert answer["error"] == "InvalidInput"


async def test_a_wish_ends_with_the_client_who_had_it(folder: Path) -> None:
    async with running("m") as mesh:
        _, writer = await asyncio.open_unix_connection(folder / "m.sock")
        writer.write(b'{"do": "roll"}\n')
        await mesh.rolling.wait()
        writer.close()
        await mesh.stopped.wait()


def test_nobody_else_may_use_it(folder: Path) -> None:
    with control.listening("m"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "m.sock").stat().st_mode & 0o777 == 0o600
        folder.chmod(0o755)
        with pytest.raises(ConfigError, match="yours alone"):
            control.find(None, None)
    assert not (folder / "m.sock").exists()


async def test_several_meshes_are_told_apart_by_name_or_placement() -> None:
    async with running("a", "here:1"), running("b", "here:2"):
        with pytest.raises(ConfigError, match=r"--mesh, of m \(here:1\), m \(here:2\)"):
            await find()
        assert [await find("a"), await find(target="here:2")] == ["a", "b"]
        with pytest.raises(ConfigError, match="a mesh a is running already"):
            await asyncio.to_thread(control.listening("a").__enter__)
    with pytest.raises(Unavailable, match="no `expert-mesh up` of this user"):
        await find()


def test_what_a_killed_mesh_left_is_no_mesh(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for name in ("m", "other"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(folder / f"{name}.sock"))
        os.utime(folder / f"{name}.sock", (0, 0))
    with pytest.raises(Unavailable):
        control.find("m", None)
    with control.listening("m"):
        assert [path.name for path in folder.iterdir()] == ["m.sock"]


def test_a_mesh_that_ends_while_another_starts_takes_its_socket_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [folder / "gone.sock"])
    with control.listening("m"):
        assert (folder / "m.sock").exists()


@pytest.mark.parametrize("name", ["", "../m", "a b", "x" * 49])
def test_a_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"), control.listening(name):
        pass
