"""What the tests of the server's protocols share: images, and what an answer is compared with."""

import base64
import io
import re
from collections.abc import Iterable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

SIDES = ((45, 67), (29, 101), (83, 37))  # (H, W) of each photo


def pixels(place: int) -> np.ndarray:
    """Noise (H, W, 3), of a size of its own."""
    return np.random.default_rng(place).integers(0, 256, (*SIDES[place], 3), dtype=np.uint8)


def photo(place: int, format: str = "PNG") -> bytes:
    """A file of these pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels(place)).save(file, format)
    return file.getvalue()


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def same(found: Iterable[Any], expected: Iterable[Any]) -> None:
    """The same labels, and scores to 1e-5."""
    found, expected = list(found), list(expected)
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-5)


def refused(answer: httpx.Response, status: int, says: str) -> None:
    """The answer is this status, with a message in its protocol's form that a pattern matches, and nothing else."""
    body = answer.json()
    message = body["error"]["message"] if answer.url.path.startswith("/v1/") else body["error"]
    assert (answer.status_code, re.search(says, message) is not None) == (status, True), (says, status, answer.text)
    assert message.endswith((".", ")", "…")) and "Traceback" not in message and len(message) < 500, message
