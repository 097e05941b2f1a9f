"""What `/metrics` says, in Prometheus' format."""

import os
from collections.abc import Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

STAGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # images


class Metrics:
    """Counts and times; all methods may be called from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("opsin_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._errors = Counter("opsin_errors", "Requests refused.", ["type"], registry=registry)
        self._seconds = Histogram(
            "opsin_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=STAGES,
            registry=registry,
        )
        self._batches = Histogram(
            "opsin_batch_images", "Images of a batch.", ["model"], buckets=SIZES, registry=registry
        )
        self._stages = Histogram(
            "opsin_stage_seconds",
            "Of an image: queue. Of a batch: decode, forward.",
            ["model", "stage"],
            buckets=STAGES,
            registry=registry,
        )
        self._restarts = Counter("opsin_restarts", "Threads of models that died.", ["model"], registry=registry)
        self._memory = Gauge(
            "opsin_model_memory_bytes",
            "Of the weights of a loaded model.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._queue = Gauge(
            "opsin_queue_images", "Images that wait.", ["model"], registry=registry, multiprocess_mode="livesum"
        )

    def of_model(self, name: str) -> "ModelMetrics":
        return ModelMetrics(self, name)

    def request(self, *, route: str, status: int, seconds: float, error: str | None = None) -> None:
        """Of an answered request; `error` is the `kind` of a refusal."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)
        if error is not None:
            self._errors.labels(error).inc()

    def memory(self, models: Mapping[str, int]) -> None:
        """Bytes of the models that are loaded now: no others."""
        self._memory.clear()
        for name, count in models.items():
            self._memory.labels(name).set(count)

    def queue(self, models: Mapping[str, int]) -> None:
        """Images that wait for each model."""
        for name, count in models.items():
            self._queue.labels(name).set(count)

    def render(self) -> bytes:
        """The text; of all workers where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


class ModelMetrics:
    """What a `Batcher` tells of its model."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._size = metrics._batches.labels(name)
        self._queue, self._decode, self._forward = (
            metrics._stages.labels(name, stage) for stage in ("queue", "decode", "forward")
        )
        self._restarts = metrics._restarts.labels(name)

    def batch(self, size: int, *, waited: Sequence[float], decode: float, forward: float) -> None:
        self._size.observe(size)
        for seconds in waited:
            self._queue.observe(seconds)
        self._decode.observe(decode)
        self._forward.observe(forward)

    def died(self) -> None:
        self._restarts.inc()
