"""What a gateway can be watched by, named as users of today's servers know it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.plan import expert_from_proto
from mesh.telemetry import METRIC_PREFIX, bound_expert_series
from protos import engine_pb2, inference_pb2

_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKEN_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0),
)
_REQUEST_BUCKETS_S = (
    *(0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8),
    *(1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
)


@dataclass
class Timeline:
    """When things happened to one choice (CLOCK_MONOTONIC); 0: not yet."""

    arrival_s: float
    scheduled_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    end_s: float = 0.0
    num_tokens: int = 0

    def add_tokens(self, count: int, now: float) -> float:
        """Note ``count`` new tokens; seconds since the ones before, 0 for the first."""
        gap_s = now - self.last_token_s if self.num_tokens > 0 else 0.0
        if self.num_tokens == 0:
            self.first_token_s = now
        self.num_tokens += count
        self.last_token_s = now
        return gap_s

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self.last_token_s - self.first_token_s

    def timing(self) -> inference_pb2.Timing:
        """As the client sees it; TTFT is 0 where no token came."""
        return inference_pb2.Timing(
            queue_s=(self.scheduled_s or self.end_s) - self.arrival_s,
            ttft_s=max(self.first_token_s - self.arrival_s, 0.0),
            tpot_s=self.decode_s / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0,
            e2e_s=self.end_s - self.arrival_s,
        )


class GatewayMetrics:
    """The metrics of one gateway. ``stats`` gives what the engine said last."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        stats: Callable[[], engine_pb2.EngineStats],
    ) -> None:
        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(
                METRIC_PREFIX + name, help, ["model_name"], buckets=buckets, registry=registry
            )
            return family.labels(model_name)

        self._model_name = model_name
        self._ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS_S
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens of a choice.", _TOKEN_BUCKETS_S
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_BUCKETS_S
        )
        self._queue = histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _REQUEST_BUCKETS_S
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "From the first step to the first token.",
            _REQUEST_BUCKETS_S,
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_BUCKETS_S
        )
        self._ends = Counter(
            METRIC_PREFIX + "request_success",
            "Choices by how they ended: stop, length, cancelled or error.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        registry.register(_EngineCollector(model_name, stats))

    def observe_inter_token(self, gap_s: float) -> None:
        """One gap between tokens of a choice."""
        self._inter_token.observe(gap_s)

    def observe_end(self, times: Timeline, finish_reason: str) -> None:
        """One choice that is over."""
        self._ends.labels(self._model_name, finish_reason).inc()
        timing = times.timing()
        self._e2e.observe(timing.e2e_s)
        self._queue.observe(timing.queue_s)
        if times.num_tokens > 0:
            self._ttft.observe(timing.ttft_s)
            self._prefill.observe(max(timing.ttft_s - timing.queue_s, 0.0))
            self._decode.observe(times.decode_s)


_GAUGES = {
    "num_requests_running": ("running", "Requests in the running batch."),
    "num_requests_waiting": ("waiting", "Requests in the queue."),
    "kv_cache_usage_perc": ("kv_usage", "Part of the KV blocks in use, 0 to 1."),
    "plan_epoch": ("epoch", "Epoch of the plan that rows are routed by."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens taken."),
    "generation_tokens": ("generation_tokens", "Tokens generated."),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache."),
    "num_preemptions": ("preemptions", "Requests whose blocks were taken, to be recomputed."),
    "engine_steps": ("steps", "Steps of the engine."),
    "engine_step_seconds": ("step_s", "Time in steps."),
    "engine_host_seconds": (
        "host_s",
        "Time from a step's tokens, or its start, to the next launch: the device had nothing.",
    ),
    "expert_wait_seconds": ("expert_wait_s", "Of it, waiting for replies of workers."),
    "refused_dispatches": ("refused", "Dispatches that a worker refused."),
    "replayed_rows": ("replayed_rows", "Rows sent again after a worker was lost or refused."),
    "failovers": ("failovers", "Dispatches whose rows were sent again, or had nowhere to go."),
    "failover_pause_seconds": ("pause_s", "Time of steps that waited for such rows."),
    "transport_reopened": ("transport_number", "Times that the transport was opened anew."),
    "stalled_request_seconds": ("stalled_s", "Time of requests that waited for an expert."),
}
_MAX_WORKER_SERIES = 512


class _EngineCollector(Collector):
    """Reads the engine's last stats when it is asked; called from HTTP threads."""

    def __init__(self, model_name: str, stats: Callable[[], engine_pb2.EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        model = [self._model_name]
        for name, (field, help) in _GAUGES.items():
            gauge = GaugeMetricFamily(METRIC_PREFIX + name, help, labels=["model_name"])
            gauge.add_metric(model, getattr(stats, field))
            yield gauge
        for name, (field, help) in _COUNTERS.items():
            counter = CounterMetricFamily(METRIC_PREFIX + name, help, labels=["model_name"])
            counter.add_metric(model, getattr(stats, field))
            yield counter
        rows = CounterMetricFamily(
            METRIC_PREFIX + "expert_dispatched_rows",
            "Rows dispatched to each expert.",
            labels=["model_name", "layer", "expert"],
        )
        by_expert = {expert_from_proto(load.expert): load.rows for load in stats.load}
        for (layer, expert), value in bound_expert_series(by_expert).items():
            rows.add_metric([*model, layer, expert], value)
        yield rows
        pace = GaugeMetricFamily(
            METRIC_PREFIX + "worker_dispatch_seconds",
            "From sending one row to a worker to its reply, moving average.",
            labels=["model_name", "worker_id"],
        )
        for worker in stats.paces[:_MAX_WORKER_SERIES]:
            pace.add_metric([*model, worker.worker_id], worker.dispatch_s)
        yield pace
