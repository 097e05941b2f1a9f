"""The page: one HTML file, one style sheet, one script, served as they are."""

import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from opsin.serve.refusals import NotFound

FOLDER = Path(__file__).parent / "page"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "Cache-Control": "no-cache",  # asked again each time: a newer opsin has another ETag
    "Referrer-Policy": "no-referrer",
}

router = APIRouter()


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """What a browser shows."""
    return _answer(request, "index.html")


@router.get("/static/{file}", include_in_schema=False)
@router.head("/static/{file}", include_in_schema=False)
async def part(request: Request, file: str) -> Response:
    """The page's style sheet and script."""
    if file not in TYPES:
        raise NotFound(f'no file "{file[:200]}". The page has {", ".join(TYPES)}.')
    return _answer(request, file)


@cache
def _read(file: str) -> tuple[bytes, str]:
    """Bytes and ETag."""
    content = (FOLDER / file).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def _answer(request: Request, file: str) -> Response:
    content, etag = _read(file)
    headers = HEADERS | {"ETag": etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    if etag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[file])
