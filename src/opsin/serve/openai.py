"""OpenAI's embeddings and list of models, with images for texts.

`openai.OpenAI(base_url=…/v1).embeddings.create(model=…, input="data:image/jpeg;base64,…")` speaks it; so do clients of
infinity, whose `modality` is taken, and those that send `{"image": …}` or `{"image_url": …}`.

An image that cannot be read refuses its whole request, and names itself: the protocol has an embedding in each place,
and no way to say that one is missing; a client would take what stood there for an embedding.
"""

import base64
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.serve.fleet import Model
from opsin.serve.intake import (
    REFUSALS,
    aside,
    check_count,
    fleet,
    images_of,
    infer,
    json_response,
    media_type,
    object_of,
    parse_json,
    shown,
)
from opsin.serve.refusals import BadRequest, Refusal, WrongMediaType

STARTED = int(time.time())
FIELDS = ("model", "input", "modality", "encoding_format", "dimensions", "user")

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=REFUSALS)

_IMAGE = {
    "oneOf": [
        {"type": "string", "description": "A data URL, an image file in base64, or a URL of an allowed host."},
        {"type": "object", "required": ["image"], "properties": {"image": {"type": "string"}}},
        {"type": "object", "required": ["image_url"], "properties": {"image_url": {}}},
    ]
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input"],
                    "properties": {
                        "model": {"type": "string", "description": "The default one without it."},
                        "input": {"oneOf": [*_IMAGE["oneOf"], {"type": "array", "items": _IMAGE, "minItems": 1}]},
                        "modality": {"enum": ["image"]},
                        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
                        "dimensions": {"type": "integer", "description": "The model's own; no other."},
                        "user": {"type": "string"},
                    },
                }
            }
        },
    }
}


@router.get("/models")
async def models(request: Request) -> Response:
    """The models served here; what is known of one only when it is loaded is left out until then."""
    return json_response({"object": "list", "data": [_facts(model) for model in fleet(request).models.values()]})


@router.get("/models/{model:path}")
async def model(request: Request, model: str) -> Response:
    """One of them."""
    return json_response(_facts(fleet(request).find(model)))


def _facts(model: Model) -> dict[str, Any]:
    facts: dict[str, Any] = {"id": model.name, "object": "model", "created": STARTED, "owned_by": "opsin"}
    if model.batcher is None:
        return facts | {"loaded": False}
    classifier = model.classifier
    return facts | {
        "loaded": True,
        "classes": len(classifier.labels or ()),
        "embedding_dim": classifier.feature_dim,
        "image_size": classifier.image_size,  # (H, W)
        "attention": isinstance(classifier.model, ViT | ImagePerceiver),  # which the page can draw
    }


@router.post("/embeddings", openapi_extra=_BODY)
async def embeddings(request: Request) -> Response:
    """The embedding of each image, in order; all of them or none."""
    body = await request.body()
    kind = media_type(request)
    if kind not in ("application/json", "", "application/x-www-form-urlencoded"):
        raise WrongMediaType(f'a body of type "{kind[:100]}" is not read here. Send application/json.')
    asked = object_of(await aside(len(body), parse_json, body), FIELDS)
    name, encoding = _options(asked)
    fleet(request).find(name)
    sources = await images_of(request, _texts(request, asked.get("input")))
    model = fleet(request).get(name)
    _check_dimensions(asked.get("dimensions"), model)
    outputs = []
    for answer in await infer(request, model, sources, "features"):
        if isinstance(answer, Refusal):
            raise answer
        outputs.append(answer.output)
    data = [
        {"object": "embedding", "index": place, "embedding": _encoded(output) if encoding == "base64" else output}
        for place, output in enumerate(outputs)
    ]
    usage = {"prompt_tokens": 0, "total_tokens": 0}  # an image has none
    return json_response({"object": "list", "data": data, "model": model.name, "usage": usage})


def _encoded(output: np.ndarray) -> str:
    return base64.b64encode(output.astype("<f4").tobytes()).decode()


def _options(asked: dict[str, Any]) -> tuple[str | None, str]:
    """The model's name and the encoding.

    Raises:
        BadRequest: values that are not known.
    """
    name = asked.get("model")
    if name is not None and not isinstance(name, str):
        raise BadRequest(f'"model" is {shown(name)}; it must be a string. `GET /v1/models` lists those served here.')
    modality = asked.get("modality")
    if modality not in (None, "image"):
        raise BadRequest(f'"modality" is {shown(modality)}; the models served here embed images: "image".')
    encoding = asked.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise BadRequest(f'"encoding_format" is {shown(encoding)}. Known: float, base64.')
    return name, encoding or "float"


def _check_dimensions(dimensions: Any, model: Model) -> None:
    dim = model.classifier.feature_dim
    if dimensions is not None and (type(dimensions) is not int or dimensions != dim):
        raise BadRequest(
            f'"dimensions" is {shown(dimensions)}; embeddings of {model.name} have {dim}. Leave it out: this model was '
            "not trained to be cut short, so the first numbers alone would mean nothing."
        )


def _texts(request: Request, asked: Any) -> list[str]:
    """The strings of an input: one or a list, bare or in objects.

    Raises:
        BadRequest: there is none, or an item of another kind.
        TooLarge: more than a request may have.
    """
    if asked is None:
        raise BadRequest('no "input". Send a data URL, data:image/jpeg;base64,…, or a list of them.')
    items = asked if isinstance(asked, list) else [asked]
    check_count(request, len(items))  # before millions are looked at
    return [_text(item, f'"input"[{place}]' if len(items) > 1 else '"input"') for place, item in enumerate(items)]


def _text(item: Any, name: str) -> str:
    for key in ("image", "image_url", "url"):  # the last: of OpenAI's own {"image_url": {"url": …}}
        if isinstance(item, dict) and key in item:
            item = item[key]
    if not isinstance(item, str):
        hint = " Tokens are of text, which is not embedded here." if isinstance(item, int | list) else ""
        raise BadRequest(f"{name} is {shown(item)}; it must be an image: a data URL, base64, or a URL.{hint}")
    return item
