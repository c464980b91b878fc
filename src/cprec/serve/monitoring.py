"""The service's own measurements, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECOND_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters, histograms and gauges of one service, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        seconds: dict[str, Any] = {"buckets": SECOND_BUCKETS, "registry": registry}
        self._requests = Histogram(
            "cprec_request_seconds",
            "Time from the first byte of a request to the last of its answer",
            ("method", "route", "status"),
            **seconds,
        )
        self._batch_size = Histogram(
            "cprec_batch_queries", "Queries that an engine answered together", buckets=SIZE_BUCKETS, registry=registry
        )
        self._batch_seconds = Histogram("cprec_batch_seconds", "Time that an engine took for a batch", **seconds)
        self._answers = Counter(
            "cprec_lists", "Lists recommended, by how they were made", ("mode", "degraded"), registry=registry
        )
        self.refusals = Counter("cprec_shed", "Requests refused under overload", registry=registry)
        self.failures = Counter("cprec_engine_failures", "Calls of an engine that failed", registry=registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(method, route, str(status)).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch that an engine answered."""
        self._batch_size.observe(size)
        self._batch_seconds.observe(seconds)

    def answered(self, mode: str, degraded: bool) -> None:
        """Count a list that was recommended."""
        self._answers.labels(mode, str(degraded).lower()).inc()

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a value that is computed whenever the metrics are read."""
        Gauge(name, about, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
