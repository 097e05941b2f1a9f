"""Open Inference Protocol v2 (KServe, Triton): tensors in, tensors out.

    input    image           UINT8 (B, H, W, 3)   images of any size: the whole preprocessing
                             FP32 (B, 3, H, W)    pixels that are normalised already, of the model's size
                             BYTES (B) or (B, 1)  image files; in JSON base64, data URLs or URLs
    outputs  logits          FP32 (B, K)
             probabilities   FP32 (B, K)
             features        FP32 (B, D)          where it is asked for; of a model without a head the only one

Triton's extensions for binary tensors, raw binary requests and `classification` are there, gzip and deflate both ways.
`tritonclient.http` speaks it. A tensor has no place for an error: one bad image refuses its request, and names itself.

Source: kserve/open-inference-protocol, specification/protocol/inference_rest.md; triton-inference-server/server,
docs/protocol/extension_binary_data.md, extension_classification.md, extension_parameters.md.
"""

import array
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import orjson
import torch
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from opsin import __version__
from opsin.errors import ImageError
from opsin.labels import Labels
from opsin.pipeline import Classifier
from opsin.serve.batching import Answer
from opsin.serve.fleet import Model
from opsin.serve.health import problems
from opsin.serve.intake import (
    REFUSALS,
    Scores,
    activated,
    aside,
    check_count,
    check_names,
    fleet,
    highest,
    images_of,
    infer,
    parse_json,
    settings,
    shown,
)
from opsin.serve.refusals import BadRequest, NotFound, NotReady, Refusal, TooLarge, WrongMediaType

HEADER_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"
ENCODERS = {"gzip": partial(gzip.compress, compresslevel=1, mtime=0), "deflate": partial(zlib.compress, level=1)}
DATATYPES = {"UINT8": "[B, H, W, 3]", "FP32": "[B, 3, {}, {}]", "BYTES": "[B] or [B, 1]"}  # and their shapes

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"], responses=REFUSALS)

_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"enum": ["image"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
        "datatype": {"enum": list(DATATYPES)},
        "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
        "data": {"type": "array", "items": {}},
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"enum": ["logits", "probabilities", "features"]},
        "parameters": {
            "type": "object",
            "properties": {
                "binary_data": {"type": "boolean"},
                "classification": {"type": "integer", "minimum": 0},
            },
        },
    },
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}},
                        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
                        "outputs": {"type": "array", "items": _OUTPUT},
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


# Of two paths above one function the lower is tried first: a model's name takes all that is left to it.

# ── what is there ────────────────────────────────────────────────────────────────────────────────────────────────────


@router.get("")
async def server() -> dict[str, Any]:
    """The server and its extensions."""
    return {"name": "opsin", "version": __version__, "extensions": ["binary_tensor_data", "classification"]}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """It answers."""
    return {"live": True}


@router.get("/health/ready")
async def ready(request: Request) -> dict[str, bool]:
    """Its models answer, or 503 with the reason."""
    for name, problem in problems(request.app.state).items():
        raise NotReady(f"{name} is not ready: {problem}.")
    return {"ready": True}


@router.get("/models/{model:path}/ready")
@router.get("/models/{model:path}/versions/{version}/ready")
async def model_ready(request: Request, model: str, version: str = VERSION) -> dict[str, Any]:
    """A model answers, or 503 with the reason. To ask loads no model: that might push out one in use."""
    found = _find(request, model, version)
    if problem := found.problem:
        raise NotReady(f"{found.name} is not ready: {problem}.")
    return {"name": found.name, "ready": True}


@router.get("/models/{model:path}")
@router.get("/models/{model:path}/versions/{version}")
async def metadata(request: Request, model: str, version: str = VERSION) -> dict[str, Any]:
    """What a model takes and gives."""
    found = fleet(request).get(_find(request, model, version).name)
    classifier = found.classifier
    width = _width(classifier)
    return {
        "name": found.name,
        "versions": [VERSION],
        "platform": "opsin",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1, width]} for name in _outputs(classifier)],
    }


def _find(request: Request, name: str, version: str) -> Model:
    """
    Raises:
        NotFound: no such model, or no such version of it.
    """
    found = fleet(request).find(name)
    if version != VERSION:
        raise NotFound(f'{found.name} has no version "{version[:100]}"; there is one, "{VERSION}".')
    return found


def _outputs(classifier: Classifier) -> tuple[str, ...]:
    """What a model gives unless it is asked for something else."""
    return ("features",) if classifier.labels is None else ("logits", "probabilities")


def _width(classifier: Classifier) -> int:
    """K, or D of a model without a head."""
    return classifier.feature_dim if classifier.labels is None else len(classifier.labels)


# ── inference ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Wanted(NamedTuple):
    """An output that is asked for."""

    name: str
    binary: bool  # after the JSON, and not in it
    classes: int  # so many of the highest, as strings; 0: the numbers


class Asked(NamedTuple):
    """A request, understood; its images are read."""

    id: str | None
    sources: Sequence[Any]
    wanted: list[Wanted]


@router.post("/models/{model:path}/infer", openapi_extra=_BODY)
@router.post("/models/{model:path}/versions/{version}/infer", openapi_extra=_BODY)
async def inference(request: Request, model: str, version: str = VERSION) -> Response:
    """The outputs for a tensor of images."""
    name = _find(request, model, version).name
    body = await _inflated(request, await request.body())
    classifier = fleet(request).get(name).classifier
    asked = await _read(request, classifier, body)
    rows: dict[str, np.ndarray] = {}
    wanted = {each.name for each in asked.wanted}
    if wanted & {"logits", "probabilities"}:
        found = await infer(request, fleet(request).get(name), asked.sources, "logits")
        rows["logits"] = _stacked(found)
    if "features" in wanted:
        found = await infer(request, fleet(request).get(name), asked.sources, "features")
        rows["features"] = _stacked(found)
    size = sum(values.nbytes for values in rows.values())
    return await aside(size, _response, request, name, asked, rows, classifier.labels)


def _stacked(answers: Sequence[Answer | Refusal]) -> np.ndarray:
    """(B, K) float32.

    Raises:
        Refusal: the first of them.
    """
    for answer in answers:
        if isinstance(answer, Refusal):
            raise answer
    return np.stack([answer.output for answer in answers if isinstance(answer, Answer)])


async def _inflated(request: Request, body: bytes) -> bytes:
    """The body without its Content-Encoding, no longer than a body may be.

    Raises:
        WrongMediaType: an encoding that is not read here.
        BadRequest: it is damaged or cut short.
        TooLarge: it would be longer.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise WrongMediaType(f'content encoding "{encoding[:100]}" is not read here. Take gzip, deflate or none.')
    limit = settings(request).max_body_bytes
    inflater = zlib.decompressobj(31 if encoding == "gzip" else 15)
    try:
        found = await aside(1032 * len(body), inflater.decompress, body, limit + 1)  # so much may come of it
    except zlib.error as error:
        raise BadRequest(f"the body is not {encoding}: {error}.") from None
    if len(found) > limit:
        raise TooLarge(f"the body is over {limit} bytes when it is inflated. Send fewer images.")
    if not inflater.eof or inflater.unused_data:
        raise BadRequest(f"the {encoding} of the body is cut short, or has more behind its end.")
    return found


async def _read(request: Request, classifier: Classifier, body: bytes) -> Asked:
    """
    Raises:
        BadRequest: anything that is not as the protocol has it.
        TooLarge: more images or pixels than a request may have.
        Refusal: an image that cannot be had.
    """
    length = _header_length(request, body)
    if length == 0:  # a raw binary request
        return Asked(None, [body], [Wanted(name, True, 0) for name in _outputs(classifier)])
    binary = b"" if length is None else memoryview(body)[length:]
    head = body if length is None else body[:length]
    asked = await aside(len(head), parse_json, head)
    if not isinstance(asked, dict):
        raise BadRequest(f'the JSON is {shown(asked)}; it must be an object with "inputs".')
    request_id = asked.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise BadRequest(f'"id" is {shown(request_id)}; it must be a string.')
    wanted = _wanted(asked.get("outputs"), _flag(_parameters(asked, "the request"), "binary_data_output"), classifier)
    shape, datatype, data = _input(asked.get("inputs"), binary, length is not None)
    check_count(request, shape[0] if shape else 0)
    if datatype == "BYTES":
        return Asked(request_id, await _files(request, shape, data), wanted)
    limit = settings(request).max_pixels
    images = await aside(len(body), _images, shape, datatype, data, classifier.image_size, limit)
    return Asked(request_id, images, wanted)


def _header_length(request: Request, body: bytes) -> int | None:
    """Bytes of JSON before binary tensors; None: there are none.

    Raises:
        BadRequest: no number, or more than the body has.
    """
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    length = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if not 0 <= length <= len(body):
        raise BadRequest(f'{HEADER_LENGTH} is "{text[:40]}"; it must be a number from 0 to {len(body)}, the body\'s.')
    return length


def _parameters(of: dict[str, Any], name: str) -> dict[str, Any]:
    found = of.get("parameters") or {}
    if not isinstance(found, dict):
        raise BadRequest(f'"parameters" of {name} is {shown(found)}; it must be an object.')
    if "shared_memory_region" in found:
        raise BadRequest(f"{name} is in shared memory, which is not offered here. Send it in the body.")
    return found


def _flag(parameters: dict[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f'"{name}" is {shown(value)}; it must be true or false.')
    return value


def _wanted(outputs: Any, binary: bool, classifier: Classifier) -> list[Wanted]:
    """
    Raises:
        BadRequest: outputs that the model does not have, twice the same, or parameters of a wrong kind.
    """
    if outputs is None or outputs == []:
        return [Wanted(name, binary, 0) for name in _outputs(classifier)]
    if not isinstance(outputs, list):
        raise BadRequest(f'"outputs" is {shown(outputs)}; it must be a list of objects.')
    found: list[Wanted] = []
    for output in outputs:
        if not isinstance(output, dict) or not isinstance(output.get("name"), str):
            raise BadRequest(f'an output is {shown(output)}; it must be an object with "name".')
        name = output["name"]
        check_names([name], tuple(dict.fromkeys((*_outputs(classifier), "features"))), "output")
        if any(each.name == name for each in found):
            raise BadRequest(f'output "{name}" is asked for twice.')
        parameters = _parameters(output, f'output "{name}"')
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            raise BadRequest(f'"classification" is {shown(classes)}; it must be a whole number, how many classes.')
        found.append(Wanted(name, _flag(parameters, "binary_data", binary), classes))
    return found


def _input(inputs: Any, binary: bytes | memoryview, has_length: bool) -> tuple[list[int], str, Any]:
    """Shape, datatype, and a list of JSON or the tensor's bytes, of the one input.

    Raises:
        BadRequest: it is not there, is of another kind, or its bytes are not those behind the JSON.
    """
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise BadRequest(f'"inputs" is {shown(inputs)}; it must be a list of one object, the input "image".')
    (given,) = inputs
    if not isinstance(given.get("name"), str):
        raise BadRequest('the input has no "name"; it must be "image".')
    check_names([given["name"]], ("image",), "input")
    datatype, shape = given.get("datatype"), given.get("shape")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise BadRequest(f'"datatype" of "image" is {shown(datatype)}. Known: {", ".join(DATATYPES)}.')
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(side) is int and side > 0 for side in shape):
        text = orjson.dumps(shape).decode()[:100]
        raise BadRequest(f'"shape" of "image" is {text}; it must be a list of whole numbers, 1 or more, at most eight.')
    size = _parameters(given, '"image"').get("binary_data_size")
    if size is None:
        if len(binary):
            raise BadRequest(f'{len(binary)} bytes follow the JSON, and "image" has no "binary_data_size".')
        if not isinstance(given.get("data"), list):
            raise BadRequest('"image" has no "data", a list, and no "binary_data_size" for bytes after the JSON.')
        return shape, datatype, given["data"]
    if "data" in given:
        raise BadRequest('"image" has both "data" and "binary_data_size". Send one of them.')
    if type(size) is not int or size != len(binary):
        hint = "" if has_length else f" Its length goes into the header {HEADER_LENGTH}."
        raise BadRequest(f'"binary_data_size" is {shown(size)}; {len(binary)} bytes follow the JSON.{hint}')
    return shape, datatype, binary


async def _files(request: Request, shape: list[int], data: Any) -> Sequence[bytes | ImageError]:
    """The image files of a tensor of BYTES.

    Raises:
        BadRequest: shape and data do not fit.
        Refusal: one that cannot be had.
    """
    if len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise _wrong_shape(shape, "BYTES", DATATYPES["BYTES"])
    if not isinstance(data, list):
        return _split(data, shape[0])
    return await images_of(request, _flat(data, shape))


def _split(data: memoryview, count: int) -> list[bytes]:
    """Each behind its length.

    Raises:
        BadRequest: the lengths do not add up to the data.
    """
    found = []
    at = 0
    for place in range(count):
        if at + 4 > len(data):
            raise BadRequest(f'"image" of {len(data)} bytes ends before the length of image[{place}].')
        (length,) = struct.unpack_from("<I", data, at)
        at += 4 + length
        if at > len(data):
            raise BadRequest(f'image[{place}] has a length of {length} bytes, more than "image" has left.')
        found.append(bytes(data[at - length : at]))
    if at != len(data):
        raise BadRequest(f'"image" has {len(data) - at} bytes behind its {count} images.')
    return found


def _images(
    shape: list[int], datatype: str, data: Any, image_size: tuple[int, int], max_pixels: int
) -> Sequence[np.ndarray | Tensor]:
    """The images of a tensor of UINT8, (H, W, 3) each, or the pixels of one of FP32, (3, H, W).

    Raises:
        BadRequest: shape and data do not fit, or numbers out of range.
        TooLarge: more pixels than an image may have.
    """
    pixels = datatype == "FP32"
    if pixels and (len(shape) != 4 or shape[1:] != [3, *image_size]):
        raise _wrong_shape(shape, datatype, DATATYPES[datatype].format(*image_size))
    if not pixels and (len(shape) != 4 or shape[3] != 3):
        raise _wrong_shape(shape, datatype, DATATYPES[datatype])
    if not pixels and shape[1] * shape[2] > max_pixels:
        raise TooLarge(f"images of {shape[1]}×{shape[2]} pixels are over the {max_pixels:,} that one may have.")
    if isinstance(data, list):
        data = _numbers(_flat(data, shape), datatype)
    expected = math.prod(shape) * (4 if pixels else 1)  # before anything of that size is made
    if len(data) != expected:
        raise BadRequest(f'"image" of shape {shape} and {datatype} has {expected} bytes; {len(data)} are there.')
    if not pixels:
        return list(np.frombuffer(data, np.uint8).reshape(shape))
    values = np.frombuffer(data, "<f4").reshape(shape).astype(np.float32)  # a copy, which torch may write to
    finite = np.isfinite(values).all(axis=(1, 2, 3))
    if not finite.all():
        raise BadRequest(f"image[{int(finite.argmin())}] has pixels that are not finite: NaN or infinity.")
    return list(torch.from_numpy(values))


def _flat(data: list[Any], shape: list[int]) -> list[Any]:
    """The values of a JSON tensor, written flat or in lists of lists.

    Raises:
        BadRequest: they do not have that shape.
    """
    if data and not isinstance(data[0], list):
        if len(data) != math.prod(shape):
            raise BadRequest(f'"data" of "image" has {len(data)} values; shape {shape} has {math.prod(shape)}.')
        return data
    rows: list[Any] = [data]
    for axis, side in enumerate(shape):
        if not all(isinstance(row, list) and len(row) == side for row in rows):
            raise BadRequest(f'"data" of "image" has lists that are not {side} long at axis {axis} of {shape}.')
        rows = list(chain.from_iterable(rows))
    return rows


def _numbers(values: list[Any], datatype: str) -> bytes:
    """As binary tensors have them.

    Raises:
        BadRequest: others than the datatype has.
    """
    try:
        return bytes(values) if datatype == "UINT8" else np.array(array.array("f", values), "<f4").tobytes()
    except (TypeError, ValueError, OverflowError):
        known = "whole numbers from 0 to 255" if datatype == "UINT8" else "numbers"
        raise BadRequest(f'"data" of "image" has values that are not {datatype}: {known}.') from None


def _wrong_shape(shape: list[int], datatype: str, expected: str) -> BadRequest:
    axes = {"UINT8": ": rows, columns, channels last", "FP32": ": channels first, of the model's size"}
    return BadRequest(f'"image" has shape {shape}; of {datatype} it is {expected}{axes.get(datatype, "")}.')


# ── the answer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _response(
    request: Request, name: str, asked: Asked, rows: dict[str, np.ndarray], labels: Labels | None
) -> Response:
    outputs, binaries = [], []
    for wanted in asked.wanted:
        values = _probabilities(rows["logits"], labels) if wanted.name == "probabilities" else rows[wanted.name]
        output: dict[str, Any] = {"name": wanted.name, "datatype": "FP32", "shape": list(values.shape)}
        data: Any = values.ravel()
        if wanted.classes:
            data = _classes(values, wanted.classes, None if wanted.name == "features" else labels)
            output |= {"datatype": "BYTES", "shape": [len(values), len(data) // len(values)]}
        if wanted.binary:
            packed = b"".join(map(_packed, data)) if wanted.classes else values.astype("<f4").tobytes()
            binaries.append(packed)
            output["parameters"] = {"binary_data_size": len(packed)}
        else:
            output["data"] = data
        outputs.append(output)
    content: dict[str, Any] = {"model_name": name, "model_version": VERSION}
    if asked.id is not None:
        content["id"] = asked.id
    body = orjson.dumps(content | {"outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"Vary": "Accept-Encoding"}
    if binaries:
        headers[HEADER_LENGTH] = str(len(body))
        body += b"".join(binaries)
    if encoding := _encoding(request):
        headers["Content-Encoding"] = encoding
        body = ENCODERS[encoding](body)
    return Response(body, headers=headers, media_type=f"application/{'octet-stream' if binaries else 'json'}")


def _probabilities(logits: np.ndarray, labels: Labels | None) -> np.ndarray:
    scores: Scores = "sigmoid" if labels and labels.multi_label else "softmax"
    return activated(logits.astype(np.float64), scores).astype(np.float32)


def _classes(values: np.ndarray, count: int, labels: Labels | None) -> list[str]:
    """(B, K) → "value:index:label" of the highest of each row, as Triton writes them."""
    return [
        f"{row[index]:f}:{index}" + (f":{labels.name(index)}" if labels else "")
        for row in values
        for index in highest(row, count).tolist()
    ]


def _packed(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


def _encoding(request: Request) -> str | None:
    """How the client would have its answer; however small that is, since it asked."""
    accepted = {}
    for each in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, quality = each.replace(" ", "").partition(";q=")
        accepted[name] = quality.strip("0.") != "" or not quality
    return next((name for name in ENCODERS if accepted.get(name)), None)
