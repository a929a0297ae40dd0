"""The worker's metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expert_worker.data_plane import DataPlane
from expert_worker.expert_reader import Paces
from expert_worker.expert_store import ExpertStore
from mesh.telemetry import METRIC_PREFIX, bound_expert_series


class WorkerMetrics(Collector):
    """Read from the data plane when they are scraped: serving pays nothing for them."""

    def __init__(self, plane: DataPlane, store: ExpertStore, paces: Paces) -> None:
        self._plane = plane
        self._paces = paces
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        stats = self._plane.stats()
        for name, text, by_expert in (
            ("expert_rows", "Rows computed.", stats.rows),
            ("expert_compute_seconds", "Time spent computing.", stats.compute_s),
        ):
            counter = CounterMetricFamily(METRIC_PREFIX + name, text, labels=["layer", "expert"])
            for labels, total in bound_expert_series(by_expert).items():
                counter.add_metric(labels, total)
            yield counter
        refused = CounterMetricFamily(
            METRIC_PREFIX + "dispatches_refused", "Dispatches refused.", labels=["reason"]
        )
        for reason, count in stats.refused.items():
            refused.add_metric([reason], count)
        yield refused
        pace = GaugeMetricFamily(
            METRIC_PREFIX + "expert_read_bytes_per_second",
            "Of late, by where experts were read from.",
            labels=["way"],
        )
        for way, bytes_per_s in self._paces.bytes_per_s.items():
            pace.add_metric([way], bytes_per_s)
        yield pace
        for name, text, value in (
            ("queue_rows", "Rows that wait.", stats.queue_rows),
            ("sessions", "Gateways connected.", stats.sessions),
            ("resident_experts", "Experts loaded.", len(self._store.experts)),
            ("expert_memory_bytes", "Taken by experts.", self._store.memory_used_bytes),
        ):
            yield GaugeMetricFamily(METRIC_PREFIX + name, text, value=value)
