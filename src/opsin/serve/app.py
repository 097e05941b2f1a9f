"""The application: every protocol on one port.

guard (limits, keys, ids, log) ─▶ protocol ─▶ intake ─▶ batching ─▶ protocol ─▶ answer
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from opsin import __version__, pipeline
from opsin.serve import classify, health, huggingface, inspect, open_inference, openai, page
from opsin.serve.fleet import Fleet
from opsin.serve.guard import Guard
from opsin.serve.intake import ClientLeft
from opsin.serve.metrics import Metrics
from opsin.serve.refusals import (
    BadRequest,
    Failed,
    NotAllowed,
    NotFound,
    Refusal,
    TooLarge,
    WrongMediaType,
    refusal_response,
)
from opsin.serve.settings import Settings

log = logging.getLogger(__name__)


def create_app(
    settings: Settings = Settings(),  # noqa: B008, it is frozen
    *,
    load: Callable[..., Any] = pipeline.load,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """The ASGI application of a server.

    Args:
        settings: its models and limits.
        load: gives the models: `opsin.load`, or a stand-in.
        on_failure: is told why the models could not be loaded at the start; without it the server answers 503.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.fleet = fleet = Fleet(settings, metrics, load)
        starting = None if settings.lazy else asyncio.create_task(_start(fleet, on_failure))
        yield
        if starting is not None:
            starting.cancel()
        await fleet.close()

    app = FastAPI(
        title="opsin",
        version=__version__,
        description="Image understanding with attention models.",
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to a host that the client names
    )
    app.state.settings, app.state.metrics = settings, metrics
    for protocol in (health, huggingface, classify, open_inference, openai, page, inspect):
        app.include_router(protocol.router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(ClientLeft, _refused)
    app.add_exception_handler(Exception, _refused)
    # outermost: `add_middleware` would put it inside what answers unforeseen errors
    app.middleware_stack = Guard(app.build_middleware_stack(), settings, metrics)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """What went wrong, as the protocol of the path writes it; nothing of our own code."""
    refusal = _as_refusal(request, error)
    request.state.error = refusal.kind  # for the log
    return refusal_response(request.scope["path"], refusal)


def _as_refusal(request: Request, error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ClientLeft):
        return BadRequest("the client has left.", kind="client_left")
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return BadRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {str(first['input'])[:60]!r}.")
    if isinstance(error, HTTPException):
        refusal = {404: NotFound, 405: NotAllowed, 413: TooLarge, 415: WrongMediaType}.get(
            error.status_code, BadRequest
        )
        what = f"{request.method} {request.scope['path'][:200]}: {error.detail}."
        return refusal(f"{what} `GET /openapi.json` lists what there is.", headers=error.headers)
    log.error("request %s: an error of our own", request.state.request_id, exc_info=error)
    return Failed("an error of the server's own; its log has the cause, under this request's id.")


async def _start(fleet: Fleet, on_failure: Callable[[Exception], None] | None) -> None:
    try:
        await fleet.load_all()
        gc.freeze()  # modules and models stay: not to be looked through again and again,
        gc.set_threshold(1000)  # so that a refused request, whose traceback holds its body, goes soon
    except Exception as error:
        if on_failure is not None:
            on_failure(error)
