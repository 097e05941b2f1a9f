"""`/classify` and `/embed`: forms, raw images and JSON beside `Classifier.stream`; forms that are broken."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import opsin
from opsin.pipeline import Classifier
from opsin.serve import intake
from opsin.serve.classify import parse_form
from opsin.serve.refusals import Refusal, Unprocessable
from protocols import SIDES, photo, refused, same, text

FORM = "multipart/form-data; boundary=x7"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Classifier:
    loaded: Classifier = opsin.load(tiny, dtype="fp32")
    return loaded


def form(*parts: bytes, end: bytes = b"--x7--\r\n") -> bytes:
    return b"".join(b"--x7\r\n" + part + b"\r\n" for part in parts) + end


def file(data: bytes, name: bytes = b"a.png", field: bytes = b"file") -> bytes:
    return b'Content-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s' % (field, name, data)


def alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same record, but for its time and the rounding of scores."""
    assert list(found) == [key for key in expected if key != "ms"]
    for key in set(found) - {"score", "topk", "embedding"}:
        assert found[key] == expected[key], key
    same(found.get("topk", []), expected.get("topk", []))
    assert [row["index"] for row in found.get("topk", [])] == [row["index"] for row in expected.get("topk", [])]
    assert found.get("score") == pytest.approx(expected.get("score"), abs=1e-5)
    if "embedding" in expected:
        np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=1e-5)


@pytest.mark.parametrize("large", [0, intake.LARGE])
def test_a_form_of_several_images(
    client: httpx.Client, model: Classifier, tmp_path: Path, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "LARGE", large)  # 0: all is done on threads
    order = (2, 0, 1, 2)
    paths = [tmp_path / f"{place}-{photo_place}.png" for place, photo_place in enumerate(order)]
    for path, place in zip(paths, order, strict=True):
        path.write_bytes(photo(place))
    paths[2].write_bytes(photo(1)[:99])
    files = [(("file", "files")[place % 2], (str(path), path.read_bytes())) for place, path in enumerate(paths)]
    for route, embed in (("/classify?top_k=3&model=org/tiny", False), ("/embed?model=org%2Ftiny", True)):
        answer = client.post(route, files=files)
        assert answer.status_code == 200 and answer.json()["model"] == "org/tiny"
        expected = list(model.stream(map(str, paths), top_k=3, embed=embed))
        records = answer.json()["results"]
        assert records[2]["error"].pop("message").startswith("image[2]") and expected[2]["error"].pop("message")
        for found, record in zip(records, expected, strict=True):
            alike(found, record)
        sides = [(record["height"], record["width"]) for record in records if record["ok"]]
        assert sides == [SIDES[2], SIDES[0], SIDES[2]]


def test_one_image_as_it_is_and_in_json(client: httpx.Client, model: Classifier) -> None:
    (expected,) = model.stream([photo(1)])
    bodies: list[dict[str, Any]] = [
        {"content": photo(1)},
        {"content": photo(1), "headers": {"Content-Type": "image/png"}},
        {"json": {"input": text(photo(1)), "model": "org/tiny"}},
        {"json": {"input": [f"data:image/png;base64,{text(photo(1))}"]}},
    ]
    for body in bodies:
        (found,) = client.post("/classify", **body).json()["results"]
        alike(found, expected)
    several = client.post("/classify", json={"input": [text(photo(1)), "no!", text(photo(0))]}).json()["results"]
    alike(several[0], expected)
    assert several[1]["error"]["message"].startswith("image[1] is not base64: 'no!'") and several[2]["ok"]


def test_embeddings_of_length_one(client: httpx.Client, model: Classifier) -> None:
    (found,) = client.post("/embed?normalize=true", content=photo(0)).json()["results"]
    (plain,) = model.embed(photo(0))
    np.testing.assert_allclose(found["embedding"], plain / np.linalg.norm(plain), atol=1e-6)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(client: httpx.Client, model: Classifier, tmp_path: Path) -> None:
    (tmp_path / "猫 cat.png").write_bytes(photo(2))
    url = f"{client.base_url}/classify?top_k=2"
    command = ["curl", "-sS", "-F", "file=@猫 cat.png", "-F", "file=<猫 cat.png", url]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    found = json.loads(answer.stdout)["results"]
    assert [record["path"] for record in found] == ["猫 cat.png", "image[1]"]
    for record in found:
        same(record["topk"], model(photo(2), top_k=2))


def test_forms_that_are_refused(client: httpx.Client) -> None:
    good = file(photo(0))
    for body, type, status, says in [
        (form(good), "multipart/form-data", 400, "no boundary in its Content-Type"),
        (form(good), "multipart/form-data; boundary=", 400, "no boundary"),
        (b"", FORM, 400, "cut short: the boundary that ends it is missing"),
        (photo(0), FORM, 400, "cut short"),
        (form(good, end=b""), FORM, 400, "cut short"),
        (form(good)[:-5], FORM, 400, "cut short"),
        (form(good)[:200], FORM, 400, "cut short"),
        (form(), FORM, 400, "the form has no files"),
        (form(b"Content-Disposition: form-data"), FORM, 400, "part 0 of the form has no end of its headers"),
        (form(good, file(b"x", b"a" * 9000)), FORM, 400, "part 1 .* over 8192 bytes"),
        (form(good, b"\r\n\r\nx"), FORM, 400, 'no field ""'),
        (form(file(photo(0), field=b"image")), FORM, 400, 'no field "image". Known: file, files'),
        (form(file(photo(0), field=b"fil")), FORM, 400, 'no field "fil". Did you mean "file"'),
        (form(file(b"")), FORM, 422, "the image"),
        (form(file(photo(0)[:77])), FORM, 422, "the image"),
        (form(*[good] * 257), FORM, 413, "more than the 256 files"),
    ]:
        for route in ("/classify", "/embed"):
            refused(client.post(route, content=body, headers={"Content-Type": type}), status, says)
    odd = form(file(photo(0), b"\xff\xfe\x00.png"), file(photo(1), b"../../etc/passwd"))
    found = client.post("/classify", content=b"preamble\r\n" + odd, headers={"Content-Type": FORM}).json()["results"]
    assert [record["ok"] for record in found] == [True, True] and found[1]["path"] == "../../etc/passwd"


def test_what_is_refused(client: httpx.Client) -> None:
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("/classify", {"json": {}}, 400, 'no "input"'),
        ("/classify", {"json": {"input": []}}, 400, "the list is empty"),
        ("/classify", {"json": {"input": {"a": 1}}}, 400, "the image is an object of 1"),
        ("/classify", {"json": {"input": "AAAA", "model": 3}}, 400, '"model" is 3; it must be a string'),
        ("/classify", {"json": {"input": "AAAA", "model": "org/tin"}}, 404, 'Did you mean "org/tiny"'),
        ("/classify", {"json": {"input": "AAAA", "top_k": 3}}, 400, 'no field "top_k". Known: input, model'),
        ("/classify", {"json": {"input": ["AAAA"] * 257}}, 413, "257 images are more than the 256"),
        ("/classify", {"json": {"input": "AAAA"}}, 422, "the image"),
        ("/classify?model=nope", {"content": photo(0)}, 404, 'no model "nope"'),
        ("/classify?topk=1", {"content": photo(0)}, 400, 'Did you mean "top_k"'),
        ("/embed?top_k=1", {"content": photo(0)}, 400, 'no query parameter "top_k". Known: model, normalize'),
        ("/embed?normalize=2", {"content": photo(0)}, 400, "normalize"),
        ("/embed", {"content": b""}, 400, "the body is empty"),
        ("/embed", {"content": b"x", "headers": {"Content-Type": "audio/wav"}}, 415, '"audio/wav" is not read here'),
        ("/embed", {"content": b"x"}, 422, "the image"),
    ]
    for path, options, status, says in cases:
        refused(client.post(path, **options), status, says)


def test_urls_are_fetched_within_the_limit_of_a_body(
    serve: Callable[..., str], model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def fetch(url: str, *, allow_hosts: Sequence[str], max_bytes: int) -> bytes:
        asked.append((url, tuple(allow_hosts), max_bytes))
        if url.endswith("gone.png"):
            raise Unprocessable(f"{url} was not found.")
        return photo(1)

    monkeypatch.setattr(intake, "fetch", fetch)
    urls = ["https://a.example/1.png", "HTTP://a.example/gone.png", text(photo(0)), "http://a.example/2.png"]
    with httpx.Client(base_url=serve(allow_url_hosts=("a.example",), max_body_bytes=10**6)) as client:
        records = client.post("/classify", json={"input": urls}).json()["results"]
        refused(client.post("/embed", json={"input": urls[1]}), 422, "gone.png was not found")
    assert records[1] == {
        "path": "image[1]",
        "ok": False,
        "error": {"type": "validation", "message": "HTTP://a.example/gone.png was not found."},
    }
    for place, image in ((0, 1), (2, 0), (3, 1)):
        same(records[place]["topk"], model(photo(image)))
    left = 10**6 - len(photo(1))
    places = zip((0, 1, 3, 1), (10**6, left, left, 10**6), strict=True)
    assert asked == [(urls[place], ("a.example",), most) for place, most in places]


def test_urls_are_fetched_within_the_time_of_a_body(serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def fetch(url: str, *, allow_hosts: Sequence[str], max_bytes: int) -> bytes:
        await asyncio.sleep(0.7)
        return photo(1)

    monkeypatch.setattr(intake, "fetch", fetch)
    with httpx.Client(base_url=serve(allow_url_hosts=("a.example",), body_seconds=1)) as client:
        answer = client.post("/embed", json={"input": ["https://a.example/1.png"] * 5})
    refused(answer, 408, "of 5 images 1 were there after 1 s. Send fewer URLs, or the bytes")


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(0, 10_000), st.binary(max_size=6))
def test_a_damaged_form_is_read_or_refused(images: list[bytes], at: int, damage: bytes) -> None:
    body = form(*map(file, images))
    if all(b"\r\n--x7" not in image for image in images):
        assert [upload.source for upload in parse_form(body, FORM, 4)] == images
    at %= len(body)
    try:
        parse_form(body[:at] + damage + body[at + len(damage) :], FORM, 4)
    except Refusal as refusal:
        assert refusal.status in (400, 413)
