"""Counters and latency histograms of the server, exposed to Prometheus. They hold no prompt and no token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from extraction.serving.batch_queue import Event, Finished, PendingRow

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


class Metrics:
    """The metrics of one server, in a registry of its own. Any thread may count; Prometheus' counters lock."""

    def __init__(self) -> None:
        self.started = time.time()
        self._registry = CollectorRegistry()
        counter, kind = self._counter, ("kind",)
        self.requests = counter("requests", "HTTP requests by path and status.", ("path", "status"))
        self.rows = counter("rows", "Rows that ended, by kind of generation and reason.", ("kind", "end"))
        self.rows_cancelled = counter("rows_cancelled", "Rows cancelled: the client left or the request timed out.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished rows.", kind)
        self.tokens = counter("tokens", "Response tokens of finished rows.", kind)
        self.proposed_tokens = counter("proposed_tokens", "Tokens proposed by speculation.", kind)
        self.accepted_tokens = counter("accepted_tokens", "Proposed tokens that the model accepted.", kind)
        self.steps = counter("steps", "Decode steps.", kind)
        self.step_seconds = counter("step_seconds", "Seconds spent in decode steps.", kind)
        self.out_of_memory = counter("out_of_memory", "Batches rebuilt after running out of memory.", kind)
        self.row_seconds = self._histogram("row_seconds", "Seconds from acceptance of a row to its end.")
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "Seconds from acceptance of a row to its first token."
        )
        self.add_gauge("start_time_seconds", "Start of the server, in Unix time.", lambda: self.started)

    def add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape."""
        Gauge(name, description, namespace="traitline", registry=self._registry).set_function(read)

    def count_step(self, kind: str, seconds: float, n_out_of_memory: int) -> None:
        """Count one decode step of a batch."""
        self.steps.labels(kind).inc()
        self.step_seconds.labels(kind).inc(seconds)
        if n_out_of_memory:
            self.out_of_memory.labels(kind).inc(n_out_of_memory)

    def count_end(self, row: PendingRow, event: Event) -> None:
        """Count a row that ended, with its tokens and latencies where it finished."""
        kind = row.queue.kind
        if not isinstance(event, Finished):
            return self.rows.labels(kind, "failed").inc()
        completion = event.completion
        self.rows.labels(kind, completion.finish_reason).inc()
        self.prompt_tokens.labels(kind).inc(len(row.request.token_ids))
        self.tokens.labels(kind).inc(len(completion.token_ids))
        self.row_seconds.labels(kind).observe(event.seconds)
        if event.first_seconds is not None:
            self.first_token_seconds.labels(kind).observe(event.first_seconds)
        if completion.speculation is not None:
            self.proposed_tokens.labels(kind).inc(completion.speculation.proposed)
            self.accepted_tokens.labels(kind).inc(completion.speculation.accepted)

    def exposition(self) -> bytes:
        """Return every metric in Prometheus' text format 0.0.4."""
        return generate_latest(_WithoutCreated(self._registry))

    def _counter(self, name: str, description: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, description, labels, namespace="traitline", registry=self._registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, ("kind",), namespace="traitline", registry=self._registry, buckets=BUCKETS)


class _WithoutCreated(Collector):
    """A registry without the `_created` series, which the text format has no use for.

    The library's own switch is global to the process.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Yield every metric of the registry."""
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
