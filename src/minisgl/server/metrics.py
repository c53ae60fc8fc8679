"""What `/metrics` tells Prometheus: the engine's counts after its last step, and latencies as the server sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minisgl.messages import EngineStats
from minisgl.types import FinishReason

_Value = Callable[[EngineStats], float]

GAUGES: dict[str, tuple[str, _Value]] = {
    "minisgl_requests_waiting": ("Sequences in the engine's queue.", lambda s: s.num_waiting),
    "minisgl_requests_running": ("Sequences being computed.", lambda s: s.num_running),
    "minisgl_kv_usage_ratio": (
        "Part of the KV pages that running sequences hold.",
        lambda s: 1 - (s.num_free_pages + s.num_evictable_pages) / max(s.num_pages, 1),
    ),
    "minisgl_prefix_hit_ratio": (
        "Part of all prompt tokens that came from the prefix cache.",
        lambda s: s.cached_tokens / max(s.prompt_tokens, 1),
    ),
}
COUNTERS: dict[str, tuple[str, _Value]] = {
    "minisgl_prompt_tokens": ("Prompt tokens of admitted sequences.", lambda s: s.prompt_tokens),
    "minisgl_cached_tokens": ("Those of them that came from the prefix cache.", lambda s: s.cached_tokens),
    "minisgl_output_tokens": ("Tokens generated.", lambda s: s.output_tokens),
    "minisgl_preemptions": ("Running sequences that were put back for want of memory.", lambda s: s.preemptions),
    "minisgl_steps": ("Steps of the engine.", lambda s: s.steps),
}
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # seconds, as below
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics(Collector):
    """Args: stats: gives the engine's latest counts."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats
        self.registry = CollectorRegistry()
        self.registry.register(self)
        histogram = partial(Histogram, registry=self.registry)
        text = "From a sequence's entry into the queue to its first token."
        self._first = histogram("minisgl_time_to_first_token_seconds", text, buckets=TTFT_BUCKETS)
        text = "Between two outputs of a sequence."
        self._next = histogram("minisgl_inter_token_latency_seconds", text, buckets=ITL_BUCKETS)
        self._ended = Counter("minisgl_requests", "Sequences that ended.", ["reason"], registry=self.registry)

    def token(self, since: float, first: bool) -> float:
        """Notes an output; `since` is when the one before came, or the sequence. Returns the time, `perf_counter`'s."""
        now = time.perf_counter()
        (self._first if first else self._next).observe(now - since)
        return now

    def ended(self, reason: FinishReason) -> None:
        self._ended.labels(reason.value).inc()

    def collect(self) -> Iterator[Metric]:
        """The engine's part; called by the registry."""
        stats = self._stats()
        for name, (text, value) in GAUGES.items():
            yield GaugeMetricFamily(name, text, value(stats))
        for name, (text, value) in COUNTERS.items():
            yield CounterMetricFamily(name, text, value(stats))
