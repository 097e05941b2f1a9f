"""What the page asks beside labels: where each head of each layer looks."""

import base64
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from opsin.errors import ImageError
from opsin.explain import attention, perturb
from opsin.explain.place import in_original, token_place
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.serve.classify import ModelName, parse_form
from opsin.serve.intake import (
    IMAGE,
    REFUSALS,
    Lang,
    TopK,
    aside,
    best,
    check_query,
    fleet,
    json_response,
    media_type,
    while_there,
)
from opsin.serve.refusals import BadRequest, Unprocessable, WrongMediaType, of_image

MAX_BYTES = 4_000_000  # of an answer's maps, one byte a cell; where the heads take more, their means are sent
KINDS = ("", "application/octet-stream", "application/x-www-form-urlencoded", "multipart/form-data")  # and image/*

router = APIRouter(tags=["opsin"], responses=REFUSALS)

_FORM = {"schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}}
_KINDS = {"image/*": IMAGE, "application/octet-stream": IMAGE, "multipart/form-data": _FORM}


@router.post("/explain", openapi_extra={"requestBody": {"required": True, "content": _KINDS}})
async def explain(
    request: Request,
    model: ModelName = None,
    top_k: TopK = 5,
    lang: Lang = "en",
) -> Response:
    """Where each head of each layer looks for the answer to an image: maps, where they lie in it, and its labels.

    `maps` has a byte for each cell of `grid`, of every head of every layer, in base64: 0 at the lowest value of a map,
    255 at its highest; `ranges` says which values those are. They fill `region` (left, top, right, bottom in pixels of
    the upright image, `size` wide and high), of which the model looks at `seen`, in shares of it.
    """
    check_query(request, "model", "top_k", "lang")
    image = await _image(request)
    found = fleet(request).get(model)
    if not isinstance(found.classifier.model, ViT | ImagePerceiver):
        raise Unprocessable(
            f"{found.name} is neither a ViT nor a Perceiver, whose attention is shown here. "
            "`opsin explain --method occlusion` works for any model."
        )
    assert found.batcher is not None
    try:
        looking = found.batcher.call(partial(looked, image=image, k=top_k, lang=lang))
        answer = await while_there(request, looking)
    except ImageError as error:
        raise of_image(error) from None
    return json_response({"model": found.name, **answer})


async def _image(request: Request) -> bytes:
    """The bytes of an image file: the body, or the only file of a form.

    Raises:
        Refusal: it is neither.
    """
    kind = media_type(request)
    if kind not in KINDS and not kind.startswith("image/"):
        raise WrongMediaType(f'a body of type "{kind[:100]}" is not read here. Send the bytes of an image file.')
    body = await request.body()
    if not body:
        raise BadRequest("the body is empty. Send the bytes of an image file.")
    if kind != "multipart/form-data":
        return body
    [upload] = await aside(len(body), parse_form, body, request.headers["content-type"], 1)
    assert isinstance(upload.source, bytes)
    return upload.source


def looked(classifier: Classifier, image: bytes, k: int, lang: str) -> dict[str, Any]:
    """The answer of `POST /explain`, without the model's name.

    Raises:
        ImageError: the image cannot be read.
    """
    pixels, size = perturb.resized(classifier, image)
    batch = classifier.preprocess.normalise_batch([pixels]).to(classifier.device)
    layers = [maps[~np.isnan(maps).all(axis=(1, 2))] for maps in attention.heads(classifier.model, batch)]
    are_means = sum(maps.size for maps in layers) > MAX_BYTES
    if are_means:
        layers = [maps.mean(axis=0, keepdims=True) for maps in layers]
    maps = np.concatenate(layers)  # (of all layers, h, w)
    values, ranges = as_bytes(maps)
    labels = classifier.labels
    return {
        "kind": "vit" if isinstance(classifier.model, ViT) else "perceiver",
        "grid": maps.shape[1:],
        "layers": len(layers),
        "heads": [len(maps) for maps in layers],
        "heads_shown": "mean" if are_means else "each",
        "maps": base64.b64encode(values.tobytes()).decode(),
        "ranges": ranges,
        "best": [] if labels is None else best(classifier.forward([pixels])[0].numpy(), labels, k, lang),
        **in_original(token_place(classifier.model, classifier.image_size), classifier.preprocess, size),
    }


def as_bytes(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, h, w) → each stretched over 0 to 255, uint8, and (n, 2): the values at both ends. A flat map is 0."""
    low, high = (end(axis=(1, 2), keepdims=True) for end in (maps.min, maps.max))
    scale = np.divide(255, high - low, out=np.zeros_like(high), where=high > low)
    return np.rint((maps - low) * scale).astype(np.uint8), np.concatenate([low, high], axis=2)[:, 0]
