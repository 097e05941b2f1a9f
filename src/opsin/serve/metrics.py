"""What `/metrics` says, in Prometheus' format; of all workers together where there are several.

Workers are told by PROMETHEUS_MULTIPROC_DIR, a folder where each keeps its numbers. It has to be set before
prometheus_client is imported: run.py does so.
"""

import os
from collections.abc import Mapping, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from opsin import __version__

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # images


class Metrics:
    """Counts and times; all methods may be called from any thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.several = "PROMETHEUS_MULTIPROC_DIR" in os.environ  # workers
        self._registry = registry = CollectorRegistry()
        if not self.several:
            ProcessCollector(registry=registry)
        info = Gauge("opsin_info", "The server.", ["version"], multiprocess_mode="livemax", registry=registry)
        info.labels(__version__).set(1)
        self._requests = Counter("opsin_requests", "Requests answered.", ["route", "status"], registry=registry)
        self._errors = Counter("opsin_errors", "Requests refused.", ["type"], registry=registry)
        self._seconds = Histogram(
            "opsin_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._images = Counter("opsin_images", "Images that a model was given.", ["model"], registry=registry)
        self._batches = Histogram(
            "opsin_batch_images", "Images of a batch.", ["model"], buckets=SIZES, registry=registry
        )
        self._stages = Histogram(
            "opsin_stage_seconds",
            "Of an image: queue. Of a batch: decode, forward.",
            ["model", "stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._restarts = Counter("opsin_restarts", "Threads of models that died.", ["model"], registry=registry)
        self._memory = Gauge(
            "opsin_model_memory_bytes",
            "Of the weights of a model; 0: it is not loaded.",
            ["model"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._queue = Gauge(
            "opsin_queue_images", "Images that wait.", ["model"], multiprocess_mode="livesum", registry=registry
        )
        self._seen: set[str] = set()  # models whose memory was told

    def of_model(self, name: str) -> "ModelMetrics":
        return ModelMetrics(self, name)

    def request(self, *, route: str, status: int, seconds: float, error: str | None = None) -> None:
        """Of an answered request: `route` is one of the application's, `error` the `kind` of a refusal."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)
        if error is not None:
            self._errors.labels(error).inc()

    def memory(self, models: Mapping[str, int]) -> None:
        """Bytes of the models that are loaded now: of all others 0."""
        self._seen |= models.keys()
        for name in self._seen:
            self._memory.labels(name).set(models.get(name, 0))

    def queue(self, models: Mapping[str, int]) -> None:
        """Images that wait for each model, loaded or not."""
        for name, count in models.items():
            self._queue.labels(name).set(count)

    def render(self) -> bytes:
        """The text."""
        if not self.several:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


class ModelMetrics:
    """What a `Batcher` tells of its model, once for each batch and on the model's thread."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._images = metrics._images.labels(name)
        self._size = metrics._batches.labels(name)
        self._queue, self._decode, self._forward = (
            metrics._stages.labels(name, stage) for stage in ("queue", "decode", "forward")
        )
        self._restarts = metrics._restarts.labels(name)

    def batch(self, size: int, *, waited: Sequence[float], decode: float, forward: float) -> None:
        self._images.inc(size)
        self._size.observe(size)
        for seconds in waited:
            self._queue.observe(seconds)
        self._decode.observe(decode)
        self._forward.observe(forward)

    def died(self) -> None:
        self._restarts.inc()
