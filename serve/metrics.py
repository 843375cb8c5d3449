"""Prometheus metrics of one replica. Names are those of vLLM where the meaning is the same, with the prefix `kraken:`.

What happens to requests is counted as it happens. What the engine knows of itself is read when somebody asks.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kraken.engine.protocol import Engine
from serve.record import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TTFT_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
ITL_BUCKETS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
QUEUE_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, *REQUEST_BUCKETS[2:])
"""Upper bounds in seconds."""


class EndpointMetrics:
    """The metrics in a registry of their own, so that nothing of Ray or of another model in the process is among them.

    Args:
        labels: on every series: the model, and the replica, since each replica counts for itself.
    """

    def __init__(self, engine: Engine, labels: dict[str, str]):
        self._labels = labels
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, labels))
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to a choice's first token.", TTFT_BUCKETS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds",
            "From a token of a choice to the next, at the engine.",
            ITL_BUCKETS,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds", "From a completion's arrival to the end of its response.", REQUEST_BUCKETS
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "A choice's time in the engine's queue.", QUEUE_BUCKETS
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens; a prompt of several choices counts once.")
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up in the cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens that were found in the cache.")
        self._finished = self._counter(
            "request_success", "Choices that ended, by reason: stop, length, abort or error.", "finished_reason"
        )
        self._errors = self._counter("request_errors", "Refused and failed requests, by error code.", "code")
        self._http = self._counter("http_requests", "HTTP requests.", "method", "handler", "status")

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def first_token(self, ttft_s: float) -> None:
        self._ttft.observe(ttft_s)

    def later_token(self, since_last_s: float) -> None:
        self._itl.observe(since_last_s)

    def tokens(self, count: int) -> None:
        self._generation_tokens.inc(count)

    def admitted(self, queue_s: float) -> None:
        """A choice left the queue."""
        self._queue.observe(queue_s)

    def prompt(self, num_tokens: int, num_cached_tokens: int | None) -> None:
        """A prompt was computed; with several choices the first of them counts."""
        self._prompt_tokens.inc(num_tokens)
        if num_cached_tokens is not None:
            self._cache_queries.inc(num_tokens)
            self._cache_hits.inc(num_cached_tokens)

    def choice_ended(self, reason: str) -> None:
        self._finished.labels(*self._labels.values(), reason).inc()

    def completion_ended(self, duration_s: float) -> None:
        self._e2e.observe(duration_s)

    def error(self, code: str | None) -> None:
        self._errors.labels(*self._labels.values(), code or "server_error").inc()

    def http_request(self, record: RequestRecord) -> None:
        handler = record.route or "unknown"
        self._http.labels(*self._labels.values(), record.method, handler, str(record.status)).inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"kraken:{name}", text, [*self._labels], registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels.values())

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        counter = Counter(f"kraken:{name}", text, [*self._labels, *labels], registry=self._registry)
        return counter if labels else counter.labels(*self._labels.values())


class _EngineCollector(Collector):
    """Reads the engine's statistics for every scrape."""

    def __init__(self, engine: Engine, labels: dict[str, str]):
        self._engine, self._labels = engine, labels

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        num_used = stats.num_blocks - stats.num_free_blocks
        usage = num_used / (stats.num_blocks or 1)
        gauges = (
            ("num_requests_running", "Requests in the engine's batch.", stats.num_running),
            ("num_requests_waiting", "Requests in the engine's queue.", stats.num_queued),
            ("kv_cache_usage_perc", "Share of the KV cache's blocks that requests hold, 0 to 1.", usage),
            ("kv_blocks_used", "Blocks of the KV cache that requests hold.", num_used),
            ("kv_blocks", "Blocks of the KV cache.", stats.num_blocks),
            ("engine_healthy", "1 if the engine can serve, else 0.", int(stats.healthy)),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"kraken:{name}", text, labels=[*self._labels])
            gauge.add_metric([*self._labels.values()], value)
            yield gauge
        preemptions = CounterMetricFamily(
            "kraken:num_preemptions", "Times that a request lost its cache blocks.", labels=[*self._labels]
        )
        preemptions.add_metric([*self._labels.values()], stats.num_preempted)
        yield preemptions
