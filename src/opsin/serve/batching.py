"""requests → batches → answers: one queue and one thread, or a few, for each model.

    infer ─▶ queue, by due time ─▶ batch of one kind ─▶ decode ─▶ forward ─▶ answers, in one wake-up
             on the event loop     on a thread of the model

On a CPU a batch is decoded by all cores and then computed by all of them, as `Classifier.load_batches` does: what is
decoded beside the model slows both. One thread computes for all models: every thread that torch computes in has its own
OpenMP team, and where there are more of those than cores they sleep between any two layers, three times as long for one
image.

A model that takes a few milliseconds for an image loses more by handing out its layers than it gains: at half load
twice the arithmetic. It gets *lanes*, threads of one core each, which decode and compute side by side.

On a GPU images are decoded as they come in.

An image has its own answer whatever its neighbours are: what cannot be decoded never reaches a batch, and a batch that
raises is halved until the one that is at fault is alone.
"""

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from opsin.errors import ImageError
from opsin.pipeline import Classifier, Loaded
from opsin.preprocess import ImageSource
from opsin.serve.refusals import Failed, NotReady, Overloaded, Refusal, TooLarge, Unprocessable, of_image

Want = Literal["logits", "features"]
SPACING_SECONDS = 0.01  # image k of a request is due so much after image k - 1: a large request lets small ones pass
RESTART_SECONDS = 0.5  # after a thread has died; doubled each time, up to a minute
STUCK_SECONDS = 120  # a batch that runs for so long: the model is not ready any more
_PENDING: Any = object()

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Of one image."""

    output: np.ndarray  # logits (K,) or features (D,), float32
    size: tuple[int, int]  # (width, height) of the upright original; of pixels (W, H)


class Observer(Protocol):
    """Who is told what each batch cost; called on the thread that computes."""

    def batch(self, size: int, *, waited: Sequence[float], decode: float, forward: float) -> None: ...

    def died(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Lane:
    """A thread of a model."""

    thread: threading.Thread | None = None
    hand: "list[_Job]" = field(default_factory=list)  # what it is at
    busy_since: float | None = None  # time.monotonic()

    @property
    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


@dataclass(slots=True, eq=False)
class _Request:
    kind: Any  # what may share a batch: (want, whether it is of pixels); of a function, which is alone, None
    sources: Sequence[Any]
    future: asyncio.Future[Any]
    arrived: float
    results: list[Any]  # _PENDING: not yet
    function: Callable[[Classifier], Any] | None = None


class _Job(NamedTuple):
    """One image of a request."""

    due: float
    number: int  # of equal ones the first
    place: int
    request: _Request
    decoded: Future[Loaded] | None
    again: bool = False  # the thread died while it had it


class Batcher:
    """Runs a model for many requests. Its methods are for the event loop's thread.

    Args:
        classifier: what computes.
        decoders: threads that decode, shared by all models.
        computer: one thread, which computes for all models without lanes.
        lanes: threads of one core each; 1: `computer` has all cores.
        max_batch, max_wait_ms, max_queue: as in `Settings`.
        observer: is told of each batch.
        arriving: how many requests are being read now; without any, no batch waits for more images.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        decoders: ThreadPoolExecutor,
        computer: ThreadPoolExecutor,
        lanes: int = 1,
        max_batch: int,
        max_wait_ms: float,
        max_queue: int,
        observer: Observer,
        arriving: Callable[[], int] = lambda: 0,
    ) -> None:
        self.classifier = classifier
        self._arriving = arriving
        self._decoders = decoders
        self._computer = computer
        self._lanes = [_Lane() for _ in range(lanes)]
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait_ms / 1e3, max_queue
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._decode_ahead = classifier.device.type != "cpu"
        self._changed = threading.Condition()
        self._heap: list[_Job] = []
        self._numbers = itertools.count()
        self._closing = False
        self._rate = 0.0  # images/s, of late
        self._restart_seconds = RESTART_SECONDS
        for lane in self._lanes:
            self._start(lane)

    # ── from the event loop ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def queued(self) -> int:
        """Images that wait."""
        return len(self._heap)

    @property
    def problem(self) -> str | None:
        """Why it would not answer now; None: it would."""
        if self._closing:
            return "it is being unloaded"
        if not all(lane.is_alive for lane in self._lanes):
            return "its thread has died and is being restarted"
        now = time.monotonic()
        longest = max(now - (lane.busy_since or now) for lane in self._lanes)
        if longest > STUCK_SECONDS:
            return f"a batch has been running for {longest:.0f} seconds"
        return None

    async def infer(self, sources: Sequence[ImageSource | Tensor | ImageError], want: Want) -> list[Answer | Refusal]:
        """The answer to each image of a request, in order; what cannot be answered is a `Refusal` in its place.

        Cancelled, it takes its images out of the queue.

        Args:
            sources: encoded bytes, uint8 arrays (H, W, 3), or normalised pixels (3, H, W) float32 of the model's size;
                an `ImageError` that was met on the way is that image's answer.
            want: "logits" or "features".
        Raises:
            TooLarge: more images than the queue has places.
            Overloaded: they do not fit in what is left of the queue.
            NotReady: the model is being unloaded.
        """
        return await self._submit(sources, lambda source: (want, isinstance(source, Tensor)))

    async def call(self, function: Callable[[Classifier], Any]) -> Any:
        """What a function of the model returns, computed alone where the model computes; what it raises is raised.

        Raises:
            Overloaded, NotReady: as `infer`; it takes one place of the queue.
        """
        return await self._submit([None], lambda _: None, function)

    async def _submit(
        self, sources: Sequence[Any], kind: Callable[[Any], Any], function: Callable[[Classifier], Any] | None = None
    ) -> Any:
        if self._closing:
            raise NotReady("the model is being unloaded. Try again.")
        if not sources:
            return []
        count, waiting = len(sources), len(self._heap)
        if count > self._max_queue:
            raise TooLarge(f"{count} images are more than the queue's {self._max_queue} places. Send fewer.")
        if count > self._max_queue - waiting:
            wait = waiting / self._rate if self._rate else 1.0
            raise Overloaded(
                f"the queue is full: {waiting} of {self._max_queue} places are taken, {count} more are wanted. "
                f"Try again in {max(1, round(wait))} s.",
                retry_after=wait,
            )
        now = time.monotonic()
        future = self._loop.create_future()
        request = _Request(kind(sources[0]), sources, future, now, [_PENDING] * count, function)
        ahead = self._decode_ahead and function is None and not isinstance(sources[0], Tensor)
        jobs = [
            _Job(
                now + place * SPACING_SECONDS,
                next(self._numbers),
                place,
                request,
                self._decoders.submit(self._decode, request, place) if ahead else None,
            )
            for place in range(count)
        ]
        with self._changed:
            for job in jobs:
                heapq.heappush(self._heap, job)
            self._changed.notify_all()
        try:
            return await future
        except asyncio.CancelledError:
            self._forget(request)
            raise

    def _forget(self, request: _Request) -> None:
        with self._changed:
            self._heap = [job for job in self._heap if job.request is not request]
            heapq.heapify(self._heap)

    async def close(self) -> None:
        """Take no more; end when all that was taken is answered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        while any(lane.is_alive or lane.hand for lane in self._lanes) or self._heap:  # one that died is started again
            await asyncio.sleep(0.01)

    # ── the threads ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, lane: _Lane) -> None:
        name = f"opsin-model {self.classifier.source.name}"
        lane.thread = threading.Thread(target=self._work, args=(lane,), name=name, daemon=True)
        lane.thread.start()

    def _work(self, lane: _Lane) -> None:
        is_narrow = len(self._lanes) > 1
        if is_narrow:
            torch.set_num_threads(1)  # in this thread, and those that say nothing
        try:
            while jobs := self._next(lane):
                lane.busy_since = time.monotonic()
                if is_narrow:
                    self._run(jobs)
                else:
                    self._computer.submit(self._run, jobs).result()
                lane.busy_since, lane.hand = None, []
                self._restart_seconds = RESTART_SECONDS
        except BaseException:
            log.exception("the thread of %s has died; it is started again", self.classifier.source.name)
            self._observer.died()
            lane.busy_since = None
            self._loop.call_soon_threadsafe(self._revive, lane)

    def _revive(self, lane: _Lane) -> None:
        """Put back what the thread had in hand, and start another after a while.

        What it has had twice is refused: it may be what kills it.
        """
        hand = lane.hand
        todo = [job for job in hand if job.request.results[job.place] is _PENDING]
        for job in todo:
            if job.again:
                self._give(job, Failed(f"{_name(job)}the model failed on it, twice."))
        with self._changed:
            for job in todo:
                if not job.again and not job.request.future.done():
                    heapq.heappush(self._heap, job._replace(again=True))
            lane.hand = []
            self._changed.notify_all()
        self._finish([job.request for job in hand])
        self._loop.call_later(self._restart_seconds, self._start, lane)
        self._restart_seconds = min(60.0, self._restart_seconds * 2)

    def _next(self, lane: _Lane) -> list[_Job]:
        """The jobs of the next batch, all of one kind, those due first; none: it is closed and nothing is left."""
        with self._changed:
            while True:
                while not self._heap:
                    if self._closing:
                        return []
                    self._changed.wait()
                self._wait_for_more()
                lane.hand = self._take()
                if lane.hand:
                    return lane.hand

    def _wait_for_more(self) -> None:
        deadline = self._heap[0].request.arrived + self._max_wait
        while self._heap and self._arriving() and len(self._heap) < self._max_batch and not self._closing:
            left = deadline - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                break

    def _take(self) -> list[_Job]:
        """Out of the queue; none where all that waited was cancelled."""
        batch: list[_Job] = []
        others: list[_Job] = []
        share = -(-len(self._heap) // len(self._lanes))  # rounded up
        while self._heap and len(batch) < min(self._max_batch, share):
            job = heapq.heappop(self._heap)
            if job.request.future.done():
                continue
            alone = job.request.function is not None or job.again  # so that the second time it is its own fault
            if batch and (alone or job.request.kind != batch[0].request.kind):
                others.append(job)
                continue
            batch.append(job)
            if alone:
                break
        for job in others:
            heapq.heappush(self._heap, job)
        return batch

    def _run(self, jobs: list[_Job]) -> None:
        start = time.monotonic()
        function = jobs[0].request.function
        if function is not None:
            self._give(jobs[0], self._called(function))
        else:
            decode, forward = self._images(jobs)
            seconds = time.monotonic() - start
            rate = len(self._lanes) * len(jobs) / max(seconds, 1e-6)
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
            waited = [start - job.request.arrived for job in jobs]
            self._observer.batch(len(jobs), waited=waited, decode=decode, forward=forward)
        requests = list({id(job.request): job.request for job in jobs}.values())
        self._loop.call_soon_threadsafe(self._finish, requests)

    def _images(self, jobs: list[_Job]) -> tuple[float, float]:
        """Answers all of a batch; gives the seconds of decoding and of the model."""
        start = time.monotonic()
        want, is_pixels = jobs[0].request.kind
        if is_pixels:
            loaded = [_as_pixels(job.request.sources[job.place]) for job in jobs]
        elif len(self._lanes) > 1:
            loaded = [self._decode(job.request, job.place) for job in jobs]
        else:
            futures = [job.decoded or self._decoders.submit(self._decode, job.request, job.place) for job in jobs]
            loaded = [future.result() for future in futures]
        decoded = time.monotonic()
        good = []
        for job, item in zip(jobs, loaded, strict=True):
            if item.error is not None:
                self._give(job, of_image(item.error))
            else:
                good.append((job, item))
        outputs = self._outputs([item.pixels for _, item in good], want, is_pixels) if good else []
        for (job, item), output in zip(good, outputs, strict=True):
            if isinstance(output, Exception):
                self._give(job, Failed(f"{_name(job)}the model failed on it."))
            elif not np.isfinite(output).all():
                message = f"{_name(job)}the model's output for it is not finite."
                self._give(job, Unprocessable(message, kind="not_finite"))
            else:
                self._give(job, Answer(output, item.size))
        return decoded - start, time.monotonic() - decoded

    def _outputs(self, pixels: list[Any], want: Want, is_pixels: bool) -> list[np.ndarray | Exception]:
        """A row for each; of a batch that raises, those of its halves."""
        embed, name = want == "features", self.classifier.source.name
        try:
            if is_pixels:
                output = self.classifier.forward_pixels(torch.from_numpy(np.stack(pixels)), embed=embed)
            else:
                output = self.classifier.forward(pixels, embed=embed)
            return list(output.numpy())
        except Exception as error:
            if len(pixels) == 1:
                log.exception("%s failed on an image", name)
                return [error]
            log.warning("%s failed on %d images; trying halves: %s", name, len(pixels), error)
        middle = len(pixels) // 2
        return self._outputs(pixels[:middle], want, is_pixels) + self._outputs(pixels[middle:], want, is_pixels)

    def _called(self, function: Callable[[Classifier], Any]) -> Any:
        try:
            return function(self.classifier)
        except Exception as error:
            return error

    def _decode(self, request: _Request, place: int) -> Loaded:
        if request.future.done():
            return Loaded("", error=ImageError("its client has left"))
        name = f"image[{place}]" if len(request.sources) > 1 else "the image"
        try:
            return self.classifier.load_image(request.sources[place], name)
        except Exception as error:  # a fault of a decoder's: it must not cost the neighbours their answers
            log.exception("%s could not be decoded", name)
            found = ImageError(f"{name} could not be decoded: {type(error).__name__}.")
            found.kind = "corrupt"
            return Loaded(name, error=found)

    @staticmethod
    def _give(job: _Job, result: Any) -> None:
        job.request.results[job.place] = result

    def _finish(self, requests: Sequence[_Request]) -> None:
        for request in requests:
            if request.future.done() or any(result is _PENDING for result in request.results):
                continue
            if request.function is None:
                request.future.set_result(request.results)
            elif isinstance(request.results[0], Exception):
                request.future.set_exception(request.results[0])
            else:
                request.future.set_result(request.results[0])


def _as_pixels(tensor: Tensor) -> Loaded:
    return Loaded("", tensor.numpy(), (tensor.shape[2], tensor.shape[1]))


def _name(job: _Job) -> str:
    return f"image[{job.place}]: " if len(job.request.sources) > 1 else ""
