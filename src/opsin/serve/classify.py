"""`/classify` and `/embed`: files of a form, an image as it is, or JSON; the records of `opsin classify --out`.

    curl -F file=@cat.jpg 'localhost:8000/classify?top_k=3'

An image alone that cannot be read is a refusal; one of several is its record, `{"path", "ok": false, "error"}`.
"""

from typing import Annotated, NamedTuple

import numpy as np
from fastapi import APIRouter, Query
from python_multipart.multipart import parse_options_header
from starlette.requests import Request
from starlette.responses import Response

from opsin.errors import ImageError
from opsin.pipeline import Record
from opsin.serve.batching import Answer
from opsin.serve.intake import (
    IMAGE,
    REFUSALS,
    Lang,
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
    media_type,
    object_of,
    parse_json,
    raise_if_alone,
    settings,
    shown,
)
from opsin.serve.refusals import BadRequest, Refusal, TooLarge

MAX_HEAD = 2**13  # bytes: headers of one part of a form

ModelName = Annotated[str | None, Query(description="The default one without it.")]

router = APIRouter(tags=["opsin"], responses=REFUSALS)

_INPUT = {"type": "string", "description": "A data URL, an image file in base64, or a URL of an allowed host."}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": {"type": "object", "properties": {"file": _FILES, "files": _FILES}}},
            "image/*": IMAGE,
            "application/octet-stream": IMAGE,
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["input"],
                    "properties": {
                        "input": {"oneOf": [_INPUT, {"type": "array", "items": _INPUT, "minItems": 1}]},
                        "model": {"type": "string"},
                    },
                }
            },
        },
    }
}


class Upload(NamedTuple):
    """An image of a request."""

    path: str  # its file's name, or image[i]
    source: bytes | ImageError


@router.post("/classify", openapi_extra=_BODY)
async def classify(request: Request, model: ModelName = None, top_k: TopK = 5, lang: Lang = "en") -> Response:
    """Labels: `{"model", "results": [{"path", "ok", "label", "index", "score", "topk", "width", "height"}, …]}`."""
    check_query(request, "model", "top_k", "lang")
    name, uploads = await _read(request, model)
    found = fleet(request).get(name)
    labels = found.classifier.labels  # now: the model may be unloaded while its last answers are on their way
    answers = await infer(request, found, [upload.source for upload in uploads], "logits")
    raise_if_alone(answers)
    assert labels is not None

    def facts(output: np.ndarray) -> Record:
        top = best(output, labels, top_k, lang)
        return {"label": top[0]["label"], "index": top[0]["index"], "score": top[0]["score"], "topk": top}

    def records() -> list[Record]:
        return [
            _record(upload, answer, facts(answer.output) if isinstance(answer, Answer) else {})
            for upload, answer in zip(uploads, answers, strict=True)
        ]

    results = await aside(4 * len(labels) * len(answers), records)
    return json_response({"model": found.name, "results": results})


@router.post("/embed", openapi_extra=_BODY)
async def embed(request: Request, model: ModelName = None, normalize: bool = False) -> Response:
    """Embeddings: `{"model", "results": [{"path", "ok", "embedding", "width", "height"}, …]}`.

    `normalize` gives them length 1, so that their product is the cosine.
    """
    check_query(request, "model", "normalize")
    name, uploads = await _read(request, model)
    found = fleet(request).get(name)
    answers = await infer(request, found, [upload.source for upload in uploads], "features")
    raise_if_alone(answers)
    results = []
    for upload, answer in zip(uploads, answers, strict=True):
        facts = {}
        if isinstance(answer, Answer):
            length = np.linalg.norm(answer.output) if normalize else 0
            facts = {"embedding": answer.output / length if length else answer.output}
        results.append(_record(upload, answer, facts))
    return json_response({"model": found.name, "results": results})


def _record(upload: Upload, answer: Answer | Refusal, facts: Record) -> Record:
    """As `Classifier.stream` gives it; without `ms`, which images of many requests share."""
    if isinstance(answer, Refusal):
        return {"path": upload.path, "ok": False, "error": {"type": answer.kind, "message": str(answer)}}
    width, height = answer.size
    return {"path": upload.path, "ok": True, **facts, "width": width, "height": height}


async def _read(request: Request, name: str | None) -> tuple[str | None, list[Upload]]:
    """The model's name and the images.

    Raises:
        Refusal: no such model, or a body that cannot be understood.
    """
    fleet(request).find(name)
    body = await request.body()
    if media_type(request) == "multipart/form-data":
        limit = settings(request).max_items
        return name, await aside(len(body), parse_form, body, request.headers["content-type"], limit)
    if not is_json(request, body):
        return name, [Upload("image[0]", body)]
    asked = object_of(await aside(len(body), parse_json, body), ("input", "model"))
    if asked.get("model") is not None:
        name = asked["model"]
        if not isinstance(name, str):
            raise BadRequest(f'"model" is {shown(name)}; it must be a string.')
        fleet(request).find(name)
    if asked.get("input") is None:
        raise BadRequest('no "input". Send {"input": "data:image/jpeg;base64,…"}, or a list of them.')
    texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
    sources = await images_of(request, texts)
    return name, [Upload(f"image[{place}]", source) for place, source in enumerate(sources)]


def parse_form(body: bytes, content_type: str, max_files: int) -> list[Upload]:
    """The files of a form's fields `file` and `files`, in order.

    It is cut in memory, where the body is already: nothing goes to a disk, and no byte is looked at by Python.

    Raises:
        BadRequest: no form, one that is cut short, without files, or with other fields.
        TooLarge: more files than a request may have.
    Source: RFC 7578, RFC 2046 §5.1.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequest("the form has no boundary in its Content-Type. Let the client write that header.")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary, max_files + 2)
    if len(parts) > max_files + 1:
        raise TooLarge(f"the form has more than the {max_files} files that one request may have. Send several.")
    if not parts or not parts.pop().startswith(b"--"):
        raise BadRequest("the form is cut short: the boundary that ends it is missing.")
    uploads = []
    for place, part in enumerate(parts):
        head, blank, data = part.partition(b"\r\n\r\n")
        if not blank or len(head) > MAX_HEAD:
            raise BadRequest(f"part {place} of the form has no end of its headers, or over {MAX_HEAD} bytes of them.")
        options = _disposition(head)
        check_names([_text(options.get(b"name", b""))], ("file", "files"), "field")
        uploads.append(Upload(_text(options.get(b"filename", b""))[:255] or f"image[{place}]", data))
    if not uploads:
        raise BadRequest("the form has no files. `curl -F file=@cat.jpg` sends one.")
    return uploads


def _disposition(head: bytes) -> dict[bytes, bytes]:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            return parse_options_header(value)[1]
    return {}


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
