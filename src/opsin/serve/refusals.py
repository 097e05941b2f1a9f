"""Every answer of the server that is not a result.

    Refusal                 status  error_type
    ├── BadRequest          400     validation      the request cannot be understood
    ├── Unauthorized        401     unauthorized    no key, or a wrong one
    ├── NotFound            404     not_found       no such path or model
    ├── NotAllowed          405     validation      a method that the path does not have
    ├── BodyTimeout         408     timeout         the body took too long
    ├── TooLarge            413     too_large       body, items or pixels over a limit
    ├── WrongMediaType      415     media_type      a body of a kind that is not read here
    ├── Unprocessable       422     (of the image)  understood, but an item cannot be read
    ├── Overloaded          429     overloaded      the queue is full: Retry-After
    ├── Failed              500     internal        ours: the cause is in the log, under the request's id
    └── NotReady            503     unavailable     the model is loading, stopped, or the server drains: Retry-After

`str(refusal)` says what is wrong, what would be right and what to do next; it names the item where there are several.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from starlette.responses import JSONResponse

from opsin.errors import ImageError, ImageTooLarge


class Refusal(Exception):
    """An answer other than 200; the protocols decide how its body is written."""

    status = 500
    kind = "internal"

    def __init__(self, message: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.kind
        self.headers = dict(headers or {})


class BadRequest(Refusal):
    status, kind = 400, "validation"


class Unauthorized(Refusal):
    status, kind = 401, "unauthorized"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class NotFound(Refusal):
    status, kind = 404, "not_found"


class NotAllowed(Refusal):
    status, kind = 405, "validation"


class BodyTimeout(Refusal):
    status, kind = 408, "timeout"


class TooLarge(Refusal):
    status, kind = 413, "too_large"


class WrongMediaType(Refusal):
    status, kind = 415, "media_type"


class Unprocessable(Refusal):
    status, kind = 422, "validation"


class _Later(Refusal):
    """Worth trying again."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, headers={"Retry-After": str(max(1, round(retry_after)))})
        self.retry_after = retry_after  # seconds


class Overloaded(_Later):
    status, kind = 429, "overloaded"


class Failed(Refusal):
    status, kind = 500, "internal"


class NotReady(_Later):
    status, kind = 503, "unavailable"


def of_image(error: ImageError) -> Refusal:
    """An image that cannot be read, as the answer to a request for it alone: 413 of a too large one, else 422."""
    if isinstance(error, ImageTooLarge):
        return TooLarge(str(error))
    return Unprocessable(str(error), kind=error.kind)


def nearest(name: str, known: Iterable[str]) -> str:
    """For the message on a name that is not known: `Did you mean "…"? `, or nothing.

    Of a long name the beginning: to compare one of megabytes takes seconds, and fifty times its size in memory.
    """
    near = get_close_matches(name[:100], known, 1)
    return f'Did you mean "{near[0]}"? ' if near else ""


def refusal_response(path: str, refusal: Refusal) -> JSONResponse:
    """As OpenAI writes errors where that protocol is spoken; elsewhere as Hugging Face, v2 and TEI do."""
    message = str(refusal)
    if path.startswith("/v1/"):
        error = {"message": message, "type": refusal.kind, "param": None, "code": refusal.status}
        return JSONResponse({"error": error}, refusal.status, refusal.headers)
    return JSONResponse({"error": message, "error_type": refusal.kind}, refusal.status, refusal.headers)
