"""Hugging Face's inference API for image classification: an image as it is, or JSON with base64.

`huggingface_hub.InferenceClient(base_url=…/models/NAME).image_classification` speaks it. Ours beyond it: a list of
inputs gives a list of answers, an image that cannot be read among them `{"error", "error_type"}`.

Source: huggingface.js, packages/tasks/src/tasks/image-classification/spec.
"""

from typing import Any, get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from opsin.serve.fleet import Model
from opsin.serve.intake import (
    IMAGE,
    REFUSALS,
    Lang,
    Scores,
    TopK,
    aside,
    best,
    check_names,
    check_query,
    fleet,
    images_of,
    infer,
    is_json,
    json_response,
    object_of,
    parse_json,
    raise_if_alone,
    shown,
)
from opsin.serve.refusals import BadRequest, Refusal

TOP_K = 5

router = APIRouter(tags=["Hugging Face"], responses=REFUSALS)

_INPUT = {"type": "string", "description": "An image file in base64, a data URL, or a URL of an allowed host."}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": IMAGE,
            "application/octet-stream": IMAGE,
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "inputs": {"oneOf": [_INPUT, {"type": "array", "items": _INPUT, "minItems": 1}]},
                        "parameters": {
                            "type": "object",
                            "properties": {
                                "top_k": {"type": "integer", "minimum": 1, "default": TOP_K},
                                "function_to_apply": {"enum": list(get_args(Scores))},
                            },
                        },
                    },
                }
            },
        },
    }
}


@router.post("/", openapi_extra=_BODY)
async def classify_by_default(request: Request, lang: Lang = "en", top_k: TopK = TOP_K) -> Response:
    """Labels of an image, by the default model: `[{"label", "score"}, …]`, best first."""
    return await _classify(request, None, lang, top_k)


@router.post("/models/{model:path}", openapi_extra=_BODY)
async def classify(request: Request, model: str, lang: Lang = "en", top_k: TopK = TOP_K) -> Response:
    """Labels of an image: `[{"label", "score"}, …]`, best first; `parameters` of JSON go before the query's."""
    return await _classify(request, model, lang, top_k)


async def _classify(request: Request, name: str | None, lang: str, top_k: int) -> Response:
    check_query(request, "lang", "top_k")
    fleet(request).find(name)
    body = await request.body()
    sources: list[Any] = [body]
    scores: Scores | None = None
    several = False
    if is_json(request, body):
        inputs, top_k, scores = _read(await aside(len(body), parse_json, body), top_k)
        several = isinstance(inputs, list)
        sources = list(await images_of(request, inputs if several else [inputs]))
    model = fleet(request).get(name)
    answers = await _answers(request, model, sources, lang, top_k, scores)
    return json_response(answers if several else answers[0])


async def _answers(
    request: Request, model: Model, sources: list[Any], lang: str, top_k: int, scores: Scores | None
) -> list[Any]:
    labels = model.classifier.labels  # now: the model may be unloaded while its last answers are on their way
    found = await infer(request, model, sources, "logits")
    raise_if_alone(found)
    assert labels is not None

    def rows() -> list[Any]:
        return [
            {"error": str(each), "error_type": each.kind}
            if isinstance(each, Refusal)
            else [
                {"label": row["label"], "score": row["score"]} for row in best(each.output, labels, top_k, lang, scores)
            ]
            for each in found
        ]

    return await aside(4 * len(labels) * len(found), rows)


def _read(asked: Any, top_k: int) -> tuple[Any, int, Scores | None]:
    """JSON → inputs, how many labels, and what becomes of logits; null is as good as nothing.

    Raises:
        BadRequest: names or values that are not known.
    """
    asked = object_of(asked, ("inputs", "parameters", "options"))  # options: of the API's own cache, ignored
    if asked.get("inputs") is None:
        raise BadRequest('no "inputs". Send {"inputs": "<an image file in base64>"}.')
    parameters = asked.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise BadRequest(f'"parameters" is {shown(parameters)}; it must be an object.')
    check_names(parameters, ("top_k", "function_to_apply"), "parameter")
    k, scores = parameters.get("top_k"), parameters.get("function_to_apply")
    if k is not None and (type(k) is not int or k < 1):
        raise BadRequest(f'"top_k" is {shown(k)}; it must be a whole number, 1 or more.')
    known = get_args(Scores)
    if scores is not None and scores not in known:
        raise BadRequest(f'"function_to_apply" is {shown(scores)}. Known: {", ".join(known)}.')
    return asked["inputs"], top_k if k is None else k, scores
