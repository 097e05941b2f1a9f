"""Whether the server lives, is ready, and computes what it did before; and its numbers.

/livez     the process answers: restart it when not
/readyz    every model that should answer would: send nothing when not
/health    each loaded model computes a small image, finite and as it did the first time
/metrics   Prometheus
"""

import asyncio
import time
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from fastapi import APIRouter
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from opsin.serve.batching import Batcher
from opsin.serve.fleet import Fleet
from opsin.serve.metrics import Metrics
from opsin.serve.refusals import NotReady, Overloaded, Refusal

CANARY_SECONDS = 10.0  # until a model that has not answered is taken for one that does not
FRESH_SECONDS = 1.0  # that an answer of /health is given again
TOLERANCE = 0.02  # of the largest number of an answer: bf16 in another batch

UNREADY: dict[int | str, dict[str, Any]] = {503: {"description": "Which model would not answer, and why."}}

router = APIRouter(tags=["operations"])


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez() -> Response:
    """Whether the process answers."""
    return JSONResponse({"status": "alive"})


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=UNREADY)
async def readyz(request: Request) -> Response:
    """Whether every model that should answer would."""
    found = problems(request.app.state)
    return JSONResponse({"status": "ready"}) if not found else _unready(found)


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=UNREADY)
async def health(request: Request) -> Response:
    """Whether every loaded model computes, shown by an image that it is given now."""
    state = request.app.state
    if not hasattr(state, "canary"):
        state.canary = Canary(state.fleet)
    sung = await state.canary.sing()
    if sung.problems:
        return _unready(sung.problems)
    return JSONResponse({"status": "healthy", "models": {name: {"ms": ms} for name, ms in sung.ms.items()}})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counts and times, as Prometheus reads them."""
    told: Metrics = request.app.state.metrics
    tell_queues(request.app.state)
    return Response(await asyncio.to_thread(told.render), media_type=told.content_type)


def problems(state: State) -> dict[str, str]:
    """Why the server should be sent nothing now, by model; empty: it is ready. While it drains, of each model.

    Args:
        state: the application's.
    """
    fleet: Fleet = state.fleet
    if getattr(state, "draining", False):
        return dict.fromkeys(fleet.models, "the server is shutting down")
    return fleet.problems


def tell_queues(state: State) -> None:
    """How many images wait is not counted but looked at: for a scrape, and of several workers every second."""
    fleet: Fleet = state.fleet
    state.metrics.queue({model.name: model.batcher.queued if model.batcher else 0 for model in fleet.models.values()})


def _unready(found: dict[str, str]) -> Response:
    """As every refusal, with the models by name beside it."""
    name, why = next(iter(found.items()))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    body = {"error": f"{name}: {why}{more}", "error_type": NotReady.kind, "models": found}
    return JSONResponse(body, NotReady.status, {"Retry-After": "1"})


class Sung(NamedTuple):
    """What the canaries did."""

    problems: dict[str, str]  # by model
    ms: dict[str, float]  # of the models that answered
    at: float  # time.monotonic()


class Canary:
    """One image through every loaded model; whoever asks meanwhile, or soon after, is told the same."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._first: WeakKeyDictionary[Batcher, np.ndarray] = WeakKeyDictionary()
        self._last: Sung | None = None
        self._singing: asyncio.Task[Sung] | None = None

    async def sing(self) -> Sung:
        last = self._last
        if last is not None and time.monotonic() - last.at < FRESH_SECONDS:
            return last
        if self._singing is None:
            self._singing = asyncio.create_task(self._sing())
        return await asyncio.shield(self._singing)  # one who leaves does not end it for the others

    async def _sing(self) -> Sung:
        try:
            found, took = self._fleet.problems, {}
            loaded = {model: model.batcher for model in self._fleet.models.values() if model.batcher is not None}
            answers = await asyncio.gather(*map(self._of, loaded.values()))
            for (model, batcher), (problem, ms) in zip(loaded.items(), answers, strict=True):
                if model.batcher is batcher:  # else it was unloaded meanwhile
                    took[model.name] = ms
                    if problem is not None:
                        found[model.name] = problem
            self._last = Sung(found, took, time.monotonic())
            return self._last
        finally:
            self._singing = None

    async def _of(self, batcher: Batcher) -> tuple[str | None, float]:
        """Why the model's answer is none, None where it is as it was the first time; and after how many ms it came."""
        began = time.monotonic()
        problem = await self._problem(batcher)
        return problem, round(1e3 * (time.monotonic() - began), 3)

    async def _problem(self, batcher: Batcher) -> str | None:
        want: Any = "logits" if batcher.classifier.labels is not None else "features"
        try:
            answer = (await asyncio.wait_for(batcher.infer([_image()], want), CANARY_SECONDS))[0]
        except asyncio.TimeoutError:
            return f"it has not answered in {CANARY_SECONDS:g} seconds"
        except Overloaded:
            return None  # so much asked of it that this found no room: it computes
        except Refusal as error:
            return str(error)
        if isinstance(answer, Refusal):
            return str(answer)
        if not np.isfinite(answer.output).all():
            return "its answer is not finite"
        first = self._first.setdefault(batcher, answer.output)
        off = float(np.abs(answer.output - first).max())
        if off > TOLERANCE * max(1e-6, float(np.abs(first).max())):
            return f"its answer to one and the same image has changed, by {off:.3g}"
        return None


def _image() -> np.ndarray:
    """(37, 53, 3) uint8, of slopes: no two rows, columns or channels of it are equal."""
    rows, columns, channels = np.ogrid[:37, :53, :3]
    return ((5 * rows + 3 * columns + 71 * channels) % 256).astype(np.uint8)
