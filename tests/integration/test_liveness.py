"""What counts as an answer to whether a process lives."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from cli.liveness import is_live
from mesh.config import ServerConfig
from mesh.http import HttpServer


@pytest.mark.parametrize("trouble", [None, "the data plane has ended"])
async def test_it_lives_when_it_says_so(trouble: str | None) -> None:
    registry = CollectorRegistry()
    async with HttpServer(
        ServerConfig(), registry, why_not_ready=lambda: "not yet", why_not_alive=lambda: trouble
    ) as http:
        assert await is_live(http.address, 60.0) is (trouble is None)
    assert not await is_live(http.address, 60.0)


async def test_who_only_listens_does_not_live() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        assert not await is_live(f"{host}:{port}", 0.2)
