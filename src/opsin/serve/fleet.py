"""The models of a server: loaded beside its event loop, found by name, unloaded when memory is short."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from opsin.device import find_device
from opsin.errors import ModelError, OpsinError
from opsin.pipeline import Classifier, load
from opsin.serve.batching import Batcher
from opsin.serve.metrics import Metrics
from opsin.serve.refusals import NotFound, NotReady, nearest
from opsin.serve.settings import Settings

RETRY_SECONDS = 60.0  # until a model that could not be loaded is tried again
LANE_SECONDS = 0.01  # a model that is quicker with an image on one core gets a thread on each
MAX_LANES = 8  # more would wait for Python
LOAD_SECONDS = 5.0  # what a load is taken to last until one has been seen

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Model:
    """One model of the fleet, loaded or not."""

    name: str
    source: str
    batcher: Batcher | None = None
    loading: "asyncio.Task[None] | None" = None
    error: str | None = None  # why it could not be loaded
    failed_at: float = 0.0
    used_at: float = 0.0  # time.monotonic()
    memory_bytes: int = 0  # known once it has been loaded
    load_seconds: float = LOAD_SECONDS

    @property
    def classifier(self) -> Classifier:
        """Of a loaded model."""
        assert self.batcher is not None
        return self.batcher.classifier

    @property
    def problem(self) -> str | None:
        """Why it would not answer now; None: it would."""
        if self.batcher is not None:
            return self.batcher.problem
        if self.error is not None:
            return self.error
        return "it is loading" if self.loading is not None else "it is not loaded"


class Fleet:
    """Made on the event loop that it serves.

    Args:
        settings: its models, limits and device.
        metrics: are told of batches and memory.
        load: NAME, options → `Classifier`: `opsin.load`, or a stand-in.
    """

    def __init__(self, settings: Settings, metrics: Metrics, load: Callable[..., Any] = load) -> None:
        self.settings = settings
        self.models = {name: Model(name, source) for name, source in settings.sources.items()}
        self.default = next(iter(self.models))
        self.arriving = 0  # requests whose bodies are being read
        self._metrics = metrics
        self._load = load
        self._decoders = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="opsin-decode")
        self._cores = torch.get_num_threads()
        self._computer = ThreadPoolExecutor(1, "opsin-compute", torch.set_num_threads, (self._cores,))
        self._loading = asyncio.Lock()

    def find(self, name: str | None) -> Model:
        """A model by its name, loaded or not; the default one without a name.

        Raises:
            NotFound: there is none; the nearest is named.
        """
        if name is None:
            return self.models[self.default]
        if name not in self.models:
            hint = nearest(name, self.models)
            raise NotFound(f'no model "{name[:200]}". {hint}`GET /v1/models` lists those served here.')
        return self.models[name]

    def get(self, name: str | None) -> Model:
        """A loaded model, which is then the one used last; one that is not loaded begins to load.

        Raises:
            NotFound: no such model.
            NotReady: it is not loaded yet, or could not be.
        """
        model = self.find(name)
        model.used_at = time.monotonic()
        if model.batcher is None:
            wait = self._wait(model)
            reason = "is loading." if model.loading is not None else f"could not be loaded: {model.error}"
            raise NotReady(f"{model.name} {reason} Try again in {max(1, round(wait))} s.", retry_after=wait)
        if problem := model.batcher.problem:
            raise NotReady(f"{model.name} is not ready: {problem}. Try again.")
        return model

    def _wait(self, model: Model) -> float:
        """Seconds until it may be there."""
        since = time.monotonic() - model.failed_at
        if model.error is not None and model.loading is None and since < RETRY_SECONDS:
            return RETRY_SECONDS - since
        self.start(model)
        return model.load_seconds

    def start(self, model: Model) -> "asyncio.Task[None]":
        """Begin to load a model, unless it is being loaded."""
        if model.loading is None:
            model.loading = asyncio.create_task(self._load_model(model))
        return model.loading

    async def load_all(self) -> None:
        """Load them in order.

        Raises:
            OpsinError: one that cannot be loaded.
        """
        for model in self.models.values():
            if model.batcher is None:  # else a request has had it loaded, while others were
                await self.start(model)
            if model.error is not None:
                raise ModelError(f"{model.name}: {model.error}")

    async def _load_model(self, model: Model) -> None:
        settings = self.settings
        began = time.monotonic()
        try:
            async with self._loading:
                await self._make_room(model)
                classifier = await self._loaded(model.source)
            lanes = await self._lanes(classifier)
            model.memory_bytes, model.error = classifier.memory_bytes, None
            model.batcher = Batcher(
                classifier,
                decoders=self._decoders,
                computer=self._computer,
                lanes=lanes,
                max_batch=settings.max_batch,
                max_wait_ms=settings.max_wait_ms,
                max_queue=settings.max_queue,
                observer=self._metrics.of_model(model.name),
                arriving=lambda: self.arriving,
            )
            model.load_seconds = time.monotonic() - began
            model.used_at = time.monotonic()
            log.info("%s is loaded: %.0f MB, %.1f s", model.name, model.memory_bytes / 1e6, model.load_seconds)
            await self._make_room(model)
        except Exception as error:
            expected = isinstance(error, OpsinError | ValueError)
            reason = str(error) if expected else f"{type(error).__name__}, which the log explains."
            model.error, model.failed_at = reason, time.monotonic()
            log.error("%s could not be loaded: %s", model.name, error, exc_info=None if expected else error)
        finally:
            model.loading = None
            self._metrics.memory({each.name: each.memory_bytes for each in self.models.values() if each.batcher})

    async def _loaded(self, source: str) -> Classifier:
        settings, loop = self.settings, asyncio.get_running_loop()
        options = {
            "dtype": settings.dtype,
            "engine": settings.engine,
            "decode": settings.decode,
            "device": str(find_device(settings.device)),
            "max_pixels": settings.max_pixels,
        }
        loader = ThreadPoolExecutor(1, "opsin-load", torch.set_num_threads, (self._cores,))
        try:
            classifier = await loop.run_in_executor(loader, lambda: self._load(source, **options))
        finally:
            loader.shutdown(wait=False)  # OpenMP's team of that thread ends with it
        if not isinstance(classifier, Classifier):
            raise ModelError(f"{source} is a {type(classifier).__name__}; the server is for models of images.")
        first = np.zeros((*classifier.image_size, 3), np.uint8)  # packs and compiles: no request should wait for that
        await loop.run_in_executor(self._computer, lambda: classifier.forward([first], embed=True))
        return classifier

    async def _lanes(self, classifier: Classifier) -> int:
        """How many threads of one core each suit a model (`Batcher`); 1: one with all cores."""
        if classifier.device.type != "cpu" or classifier.engine != "torch" or self.settings.dtype == "fp32":
            return 1  # MKL, which computes plain fp32, has one number of threads for all

        def image_seconds() -> float:
            image = np.zeros((*classifier.image_size, 3), np.uint8)
            torch.set_num_threads(1)
            try:
                times = []
                for _ in range(3):
                    began = time.perf_counter()
                    classifier.forward([image], embed=True)
                    times.append(time.perf_counter() - began)
                return min(times)
            finally:
                torch.set_num_threads(self._cores)

        seconds = await asyncio.get_running_loop().run_in_executor(self._computer, image_seconds)
        return min(self._cores, MAX_LANES) if seconds < LANE_SECONDS else 1

    async def _make_room(self, wanted: Model) -> None:
        """Unload what was not used for longest, until all fit in memory or `wanted` is alone."""
        limit = self.settings.max_memory_bytes
        if limit is None:
            return
        while True:
            there = [model for model in self.models.values() if model.batcher is not None and model is not wanted]
            total = wanted.memory_bytes + sum(model.memory_bytes for model in there)
            if total <= limit:
                return
            if not there:
                log.warning("%s alone takes %.0f MB of memory, over the limit", wanted.name, total / 1e6)
                return
            await self.unload(min(there, key=lambda model: model.used_at))

    async def unload(self, model: Model) -> None:
        """Answer what waits for a model, and let it go."""
        batcher, model.batcher = model.batcher, None
        if batcher is not None:
            log.info("%s is unloaded", model.name)
            await batcher.close()

    @property
    def problems(self) -> dict[str, str]:
        """Of models that should answer and would not: name → why. One that is away until it is asked for is none."""
        return {
            model.name: problem
            for model in self.models.values()
            if (problem := model.problem) is not None and not self._may_be_away(model)
        }

    def _may_be_away(self, model: Model) -> bool:
        was_there = model.memory_bytes > 0 and model.error is None
        return model.batcher is None and (self.settings.lazy or was_there)

    async def close(self) -> None:
        """Answer all that was taken; what is being loaded, nobody waits for."""
        for model in self.models.values():
            if model.loading is not None:
                model.loading.cancel()
            await self.unload(model)
        for pool in (self._computer, self._decoders):
            pool.shutdown(wait=True)
