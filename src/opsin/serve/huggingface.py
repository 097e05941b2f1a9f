"""Hugging Face's inference API for image classification: an image as it is, or JSON with base64."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from opsin.labels import top_k
from opsin.serve.intake import fleet, from_base64, infer, parse_json
from opsin.serve.refusals import Refusal

router = APIRouter()


@router.post("/")
async def classify_by_default(request: Request) -> Response:
    """Labels of an image, by the default model."""
    return await classify(request, None)


@router.post("/models/{model:path}")
async def classify(request: Request, model: str | None) -> Response:
    """Labels of an image: `[{"label", "score"}, …]`, best first."""
    raise NotImplementedError
