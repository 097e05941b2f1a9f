"""A request's images → the model → their answers: what the protocols share."""

import asyncio
import base64
import binascii
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.requests import Request
from torch import Tensor

from opsin.preprocess import ImageSource
from opsin.serve.batching import Answer, Want
from opsin.serve.fleet import Fleet, Model
from opsin.serve.refusals import BadRequest, Refusal, TooLarge, Unprocessable
from opsin.serve.settings import Settings

MAX_VALUES = 4_000_000  # of a JSON body: 25 images of 224 × 224 pixels, written as numbers


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def fleet(request: Request) -> Fleet:
    found: Fleet = request.app.state.fleet
    return found


def settings(request: Request) -> Settings:
    found: Settings = request.app.state.settings
    return found


async def infer(
    request: Request, model: Model, sources: Sequence[ImageSource | Tensor], want: Want
) -> list[Answer | Refusal]:
    """As `Batcher.infer`, for a client that may leave: its images are then taken out of the queue.

    Raises:
        TooLarge: more images than a request may have.
        Unprocessable: labels are asked of a model without a head.
        ClientLeft: it has.
    """
    limit = settings(request).max_items
    if len(sources) > limit:
        raise TooLarge(f"{len(sources)} images are more than the {limit} that one request may have. Send several.")
    if want == "logits" and model.classifier.labels is None:
        raise Unprocessable(f"{model.name} has no classifier: it gives embeddings. `POST /v1/embeddings` has them.")
    assert model.batcher is not None
    return await while_there(request, model.batcher.infer(sources, want))


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
