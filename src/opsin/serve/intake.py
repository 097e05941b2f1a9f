"""A request's images → the model → their answers: what the protocols share."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import anyio
import numpy as np
import orjson
from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from opsin.errors import ImageError
from opsin.labels import Labels, Prediction
from opsin.preprocess import ImageSource
from opsin.serve.batching import Answer, Want
from opsin.serve.fetch import fetch
from opsin.serve.fleet import Fleet, Model
from opsin.serve.refusals import BadRequest, BodyTimeout, Refusal, TooLarge, Unprocessable, WrongMediaType, nearest
from opsin.serve.settings import Settings

MAX_VALUES = 4_000_000  # of a JSON body: 25 images of 224 × 224 pixels, written as numbers
LARGE = 2**18  # bytes: work on more is done beside the event loop

Scores = Literal["softmax", "sigmoid", "none"]
Lang = Annotated[Literal["en", "zh"], Query(description="Of the names of labels.")]
TopK = Annotated[int, Query(ge=1, description="How many labels.")]

P = ParamSpec("P")
T = TypeVar("T")

# for the OpenAPI document
IMAGE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request cannot be understood."},
    401: {"description": "No key, or a wrong one."},
    404: {"description": "No such model."},
    408: {"description": "The body took too long."},
    413: {"description": "Body, items or pixels over a limit."},
    415: {"description": "A body of a kind that is not read here."},
    422: {"description": "Understood, but an image cannot be read."},
    429: {"description": "The queue is full."},
    503: {"description": "The model is not ready."},
}


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def fleet(request: Request) -> Fleet:
    found: Fleet = request.app.state.fleet
    return found


def settings(request: Request) -> Settings:
    found: Settings = request.app.state.settings
    return found


async def infer(
    request: Request, model: Model, sources: Sequence[ImageSource | Tensor | ImageError], want: Want
) -> list[Answer | Refusal]:
    """As `Batcher.infer`, for a client that may leave: its images are then taken out of the queue.

    Raises:
        TooLarge: more images than a request may have.
        Unprocessable: labels are asked of a model without a head.
        ClientLeft: it has.
    """
    request.state.model = model.name  # for the log
    check_count(request, len(sources))
    if want == "logits" and model.classifier.labels is None:
        raise Unprocessable(f"{model.name} has no classifier: it gives embeddings. `POST /v1/embeddings` has them.")
    assert model.batcher is not None
    return await while_there(request, model.batcher.infer(sources, want))


def check_count(request: Request, count: int) -> None:
    """
    Raises:
        TooLarge: more images than a request may have.
    """
    limit = settings(request).max_items
    if count > limit:
        raise TooLarge(f"{count} images are more than the {limit} that one request may have. Send several.")


def raise_if_alone(answers: Sequence[Answer | Refusal]) -> None:
    """
    Raises:
        Refusal: that of the only image of its request; of several, each has its place in the answer.
    """
    if len(answers) == 1 and isinstance(answers[0], Refusal):
        raise answers[0]


async def while_there(request: Request, answer: Any) -> Any:
    """What a coroutine gives; it is cancelled when the client leaves.

    Raises:
        ClientLeft: it has.
    """
    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientLeft
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parse_json(body: bytes) -> Any:
    """
    Raises:
        BadRequest: it is not JSON.
        TooLarge: it would take many times its size in memory.
    """
    if body.count(b",") > MAX_VALUES or body.count(b"[") + body.count(b"{") > MAX_VALUES // 4:
        raise TooLarge(f"the JSON has more than {MAX_VALUES:,} values. Send images as files, tensors as binary data.")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}.") from None


def from_base64(text: str, name: str) -> bytes:
    """The bytes of a data URL, or of plain base64.

    Raises:
        Unprocessable: it is neither.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise Unprocessable(f"{name} is a data URL without `;base64,`. Write data:image/jpeg;base64,…")
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise Unprocessable(
            f"{name} is not base64: {text[:40]!r}. Send the bytes of an image file in base64."
        ) from None


async def image_of(request: Request, text: Any, name: str, *, max_bytes: int | None = None) -> bytes:
    """The bytes of an image file: of base64, a data URL, or a URL whose host is allowed.

    Args:
        name: of the image, for what is said about it.
        max_bytes: of what is fetched; without it, as many as a body may have.
    Raises:
        BadRequest: it is no string.
        Refusal: it is none of these, or cannot be fetched, or must not be.
    """
    if not isinstance(text, str):
        raise BadRequest(f"{name} is {shown(text)}; it must be a string: base64, a data URL or a URL.")
    if not text[:8].lower().startswith(("http://", "https://")):
        return await aside(len(text), from_base64, text, name)
    limits = settings(request)
    limit = limits.max_body_bytes if max_bytes is None else max_bytes
    found: bytes = await while_there(request, fetch(text, allow_hosts=limits.allow_url_hosts, max_bytes=limit))
    return found


async def images_of(request: Request, texts: Sequence[Any]) -> list[bytes | ImageError]:
    """`image_of` each; what is wrong with one of several is an error in its place.

    All that is fetched together is no more, and takes no longer, than a body may.

    Raises:
        BodyTimeout: it does.
        BadRequest: none, or one that is no string.
        TooLarge: more than a request may have.
        Refusal: what is wrong with the only one.
    """
    if not texts:
        raise BadRequest("no images: the list is empty. Send at least one.")
    check_count(request, len(texts))
    if len(texts) == 1:
        return [await image_of(request, texts[0], "the image")]
    found: list[bytes | ImageError] = []
    left, seconds = settings(request).max_body_bytes, settings(request).body_seconds
    try:
        with anyio.fail_after(seconds):
            for place, text in enumerate(texts):
                await asyncio.sleep(0)  # others may want the event loop
                try:
                    image = await image_of(request, text, f"image[{place}]", max_bytes=left)
                except BadRequest:
                    raise
                except Refusal as refusal:
                    found.append(_unread(refusal))
                else:
                    found.append(image)
                    left -= len(image) if text[:4].lower() == "http" else 0
    except TimeoutError:
        message = f"of {len(texts)} images {len(found)} were there after {seconds:g} s. Send fewer URLs, or the bytes."
        raise BodyTimeout(message) from None
    return found


def _unread(refusal: Refusal) -> ImageError:
    error = ImageError(str(refusal))
    error.kind = refusal.kind
    return error


async def aside(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function gives; of much data on a thread, so that others are answered meanwhile.

    Args:
        size: of the data, in bytes.
    """
    if size <= LARGE:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(request: Request, body: bytes) -> bool:
    """Whether a body is JSON, or else an image: by its type; where that says nothing, by its first byte.

    Raises:
        BadRequest: it is empty.
        WrongMediaType: it is neither.
    """
    if not body:
        raise BadRequest("the body is empty. Send the bytes of an image file, or JSON.")
    kind = media_type(request)
    if kind == "application/json":
        return True
    if kind.startswith("image/"):
        return False
    if kind in ("", "application/octet-stream", "application/x-www-form-urlencoded"):  # the last: what curl calls all
        return body[:64].lstrip().startswith(b"{")
    hint = " `POST /classify` reads forms." if kind == "multipart/form-data" else ""
    raise WrongMediaType(
        f'a body of type "{kind[:100]}" is not read here.{hint} Send image/*, application/octet-stream or '
        "application/json."
    )


def check_names(given: Iterable[str], known: Sequence[str], what: str) -> None:
    """
    Raises:
        BadRequest: one that is not known; the nearest is named.
    """
    for name in given:
        if name not in known:
            raise BadRequest(f'no {what} "{name[:100]}". {nearest(name, known)}Known: {", ".join(known)}.')


def check_query(request: Request, *known: str) -> None:
    """
    Raises:
        BadRequest: a name in the query that is not known.
    """
    check_names(request.query_params, known, "query parameter")


def shown(value: Any) -> str:
    """A value of JSON, for a message: cut short."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = orjson.dumps(value).decode()
    return text if len(text) <= 60 else f"{text[:60]}…"


def object_of(asked: Any, known: Sequence[str]) -> dict[str, Any]:
    """A request's JSON, checked to be an object with these fields.

    Raises:
        BadRequest: it is not.
    """
    if not isinstance(asked, dict):
        raise BadRequest(f"the JSON is {shown(asked)}; it must be an object with {', '.join(known)}.")
    check_names(asked, known, "field")
    return asked


def best(logits: np.ndarray, labels: Labels, k: int, lang: str, scores: Scores | None = None) -> list[Prediction]:
    """As `opsin.labels.top_k`, of one image, in NumPy: of so few numbers torch would take longer.

    Args:
        logits: (K,) float32, finite.
        scores: what becomes of logits; without it, what the model was trained for.
    """
    logits = logits.astype(np.float64)
    values = activated(logits, scores or ("sigmoid" if labels.multi_label else "softmax"))
    return [
        {"label": labels.name(index, lang), "score": float(values[index]), "index": index}
        for index in highest(logits, k).tolist()
    ]


def highest(values: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k highest of (K,), best first; of equal ones the lower index comes first."""
    k = min(k, len(values))
    indices = np.flatnonzero(values >= np.partition(values, -k)[-k])  # k, or more where some are equal
    return indices[np.argsort(-values[indices], kind="stable")][:k]


def activated(logits: np.ndarray, scores: Scores) -> np.ndarray:
    """(…, K) float64 → scores of that shape."""
    if scores == "none":
        return logits
    if scores == "sigmoid":
        return np.exp(-np.logaddexp(0, -logits))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def json_response(content: Any) -> Response:
    """Of JSON with NumPy's arrays in it."""
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
