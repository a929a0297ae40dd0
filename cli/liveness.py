"""Whether a process lives, asked as an orchestrator would: ``/healthz`` over HTTP."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

LOOKS = 6
"""So many in a row without an answer mean that a process hangs. Counted and not timed: a pause of
whoever looks is no silence of who is looked at."""
_ANSWER_TIMEOUT_S = 5.0


async def is_live(address: str, within_s: float) -> bool:
    """Whether ``host:port`` says 200 for ``/healthz`` in time."""
    url = urlsplit(f"//{address}")
    try:
        async with asyncio.timeout(min(within_s, _ANSWER_TIMEOUT_S)):
            reader, writer = await asyncio.open_connection(url.hostname, url.port)
            try:
                writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, ValueError):  # Too late, no connection, or a line without end.
        return False
    return status.split()[1:2] == [b"200"]
