"""What a process says of itself: events, metrics, and the line that says it is ready.

Metrics are named ``expert_mesh:<what>_<unit>``. Each process has a registry of its own rather
than the library's global one, so that several services can live in one test process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from structlog.typing import Processor

from mesh.config import ServerConfig
from mesh.plan import ExpertId

METRIC_PREFIX = "expert_mesh:"
MAX_EXPERT_SERIES = 512
"""Label sets of one per-expert metric; a large model has thousands of experts."""

_SECRET_KEYS = frozenset({"token", "api_key", "authorization", "tls_key", "password"})


def configure_logging(service: str, instance_id: str, level: str) -> None:
    """Send structlog's and the libraries' events to stderr, each with who says it.

    A person at a terminal gets text, everything else one JSON object a line.
    """

    def add_identity(
        _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        return {**event, "service": service, "id": instance_id}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        add_identity,
        _mask_secrets,
    ]
    finish: list[Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    numeric_level = getattr(logging, level.upper())
    structlog.configure(
        processors=[*shared, *finish],
        wrapper_class=structlog.make_filtering_bound_logger(numeric_level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish],
        )
    )
    logging.basicConfig(level=max(numeric_level, logging.WARNING), handlers=[handler], force=True)


def _mask_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    for key in _SECRET_KEYS & event.keys():
        event[key] = "***"
    return event


def new_registry() -> CollectorRegistry:
    """A registry with the process's own CPU, memory and garbage collection in it."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def bound_expert_series(
    by_expert: Mapping[ExpertId, float], limit: int = MAX_EXPERT_SERIES
) -> dict[tuple[str, str], float]:
    """``(layer, expert)`` labels for the first ``limit`` experts; the rest is one sum, "other"."""
    experts = sorted(by_expert)
    series = {(str(e.layer), str(e.index)): float(by_expert[e]) for e in experts[:limit]}
    if len(experts) > limit:
        series["other", "other"] = float(sum(by_expert[e] for e in experts[limit:]))
    return series


def announce_ready(config: ServerConfig, payload: Mapping[str, Any]) -> None:
    """Write one JSON line to the descriptor a supervisor gave us, if one did, and close it."""
    if config.ready_fd is not None:
        with os.fdopen(config.ready_fd, "w") as ready:
            ready.write(json.dumps(payload) + "\n")
