"""Where the time of engines goes, by the metrics of their gateways."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mesh.errors import Unavailable
from mesh.telemetry import METRIC_PREFIX

_FRESH_S = 1.0
"""An engine says its counters every half second while it works, and once after."""
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class EngineTime:
    """Seconds since the start, of all gateways together; None: one of them does not count it."""

    engine_step_seconds: float | None = None
    """In steps."""
    engine_host_seconds: float | None = None
    """Of it, with nothing given to the device or to experts."""
    expert_wait_seconds: float | None = None
    """Of it, waiting for replies of workers."""

    def shares_since(self, before: EngineTime) -> dict[str, float | None]:
        """The parts of the time in steps since then, 0 to 1; None where that is not known."""
        step_s = _difference(self.engine_step_seconds, before.engine_step_seconds)
        parts = {
            "host_share": (self.engine_host_seconds, before.engine_host_seconds),
            "expert_wait_share": (self.expert_wait_seconds, before.expert_wait_seconds),
        }
        found = {name: _difference(*of) for name, of in parts.items()}
        return {
            name: part_s / step_s if part_s is not None and step_s else None
            for name, part_s in found.items()
        }


def parse(texts: Sequence[str]) -> EngineTime:
    """From what ``/metrics`` of each gateway says."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: list[dict[str, float]] = []
    for text in texts:
        totals.append({})
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals[-1][sample.name] = totals[-1].get(sample.name, 0.0) + sample.value

    def sum_of(counter: str) -> float | None:
        name = f"{METRIC_PREFIX}{counter}_total"
        return sum(t[name] for t in totals) if all(name in t for t in totals) else None

    return EngineTime(*(sum_of(field.name) for field in fields(EngineTime)))


async def read(urls: Sequence[str]) -> EngineTime:
    """Of gateways that have nothing to do, once they have said all. Raises Unavailable."""
    await asyncio.sleep(_FRESH_S)
    return parse([await asyncio.to_thread(_fetch, url) for url in urls])


def _fetch(url: str) -> str:
    full = url if "://" in url else f"http://{url}/metrics"
    try:
        with urllib.request.urlopen(full, timeout=_TIMEOUT_S) as answer:
            text: str = answer.read().decode()
    except (OSError, ValueError) as error:
        raise Unavailable(
            f"no metrics at {full}: {error}; it is the HTTP port of a gateway that has them"
        ) from error
    return text


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
