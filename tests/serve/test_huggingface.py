"""Hugging Face's protocol: through its own client and by hand, beside `opsin.load`; what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import opsin
from opsin.errors import NoHead
from opsin.pipeline import Classifier
from protocols import photo, refused, same, text

hub = pytest.importorskip("huggingface_hub", reason="the client that speaks this protocol")

PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Classifier:
    loaded: Classifier = opsin.load(tiny, dtype="fp32")
    return loaded


def test_their_client_as_it_is(serve: Callable[..., str], model: Classifier, tmp_path: Path) -> None:
    url = serve()
    named = hub.InferenceClient(base_url=f"{url}/models/org/tiny")
    default = hub.InferenceClient(model=url)
    path = tmp_path / "noise.jpg"
    path.write_bytes(photo(1, "JPEG"))
    same([vars(row) for row in named.image_classification(str(path))], model(path))
    same([vars(row) for row in named.image_classification(photo(2))], model(photo(2)))
    same([vars(row) for row in default.image_classification(photo(0), top_k=3)], model(photo(0), top_k=3))
    raw = model.logits(photo(0))[0].sort(descending=True).values
    for function, scores in (("none", raw), ("sigmoid", raw.sigmoid()), ("softmax", raw.softmax(0))):
        rows = named.image_classification(photo(0), function_to_apply=function, top_k=7)
        assert [row.score for row in rows] == pytest.approx(scores.tolist(), abs=1e-5), function
    with pytest.raises(hub.errors.HfHubHTTPError, match="not_an_image"):
        named.image_classification(b"\x00not an image")


@pytest.mark.parametrize(
    "type", [None, "image/png", "image/x-unheard-of", "application/octet-stream", "application/x-www-form-urlencoded"]
)
def test_an_image_as_it_is_by_any_of_its_types(client: httpx.Client, model: Classifier, type: str | None) -> None:
    headers = {} if type is None else {"Content-Type": type}
    answer = client.post("/models/org%2Ftiny?top_k=2", content=photo(1), headers=headers)
    assert answer.status_code == 200 and answer.headers["content-type"] == "application/json"
    same(answer.json(), model(photo(1), top_k=2))
    assert set(answer.json()[0]) == {"label", "score"}


@pytest.mark.parametrize("type", ["application/json; charset=utf-8", "application/x-www-form-urlencoded", ""])
def test_json_by_its_type_or_its_first_byte(client: httpx.Client, model: Classifier, type: str) -> None:
    body = f'\n {{"inputs": "data:image/png;base64,{text(photo(2))}", "parameters": {{"top_k": 3}}, "options": null}}'
    answer = client.post("/?top_k=1", content=body.encode(), headers={"Content-Type": type} if type else {})
    same(answer.json(), model(photo(2), top_k=3))


def test_a_list_has_an_answer_in_each_place(client: httpx.Client, model: Classifier) -> None:
    order = (2, 0, 1, 0)
    inputs = [text(photo(place)) for place in order]
    inputs[1:1] = ["no base64!", text(photo(1)[:100])]
    answer = client.post("/models/org/tiny", json={"inputs": inputs, "parameters": None})
    rows = answer.json()
    assert answer.status_code == 200 and len(rows) == 6
    for row, place in zip([rows[0], *rows[3:]], order, strict=True):
        same(row, model(photo(place)))
    assert rows[1] == {
        "error": "image[1] is not base64: 'no base64!'. Send the bytes of an image file in base64.",
        "error_type": "validation",
    }
    assert rows[2]["error_type"] == "corrupt" and rows[2]["error"].startswith("image[2]")
    alone = client.post("/", json={"inputs": inputs[:1]})
    assert len(alone.json()) == 1 and len(alone.json()[0]) == 5


def test_names_in_chinese(serve: Callable[..., str]) -> None:
    photo = (PHOTOS / "coffee.png").read_bytes()
    with httpx.Client(base_url=serve(models=("opsin/vit-tiny",)), timeout=60) as client:
        rows = client.post("/?lang=zh&top_k=3", content=photo).json()
    same(rows, opsin.load("opsin/vit-tiny", dtype="fp32", lang="zh")(photo, top_k=3))
    assert not rows[0]["label"].isascii()


def test_json_that_is_refused(client: httpx.Client) -> None:
    for body, says in [
        ({}, 'no "inputs"'),
        ([1, 2], "the JSON is a list of 2; it must be an object with inputs, parameters"),
        ({"inputs": 7}, "the image is 7; it must be a string"),
        ({"inputs": []}, "no images: the list is empty"),
        ({"inputs": ["AAAA", {"a": 1}]}, r"image\[1\] is an object of 1; it must be a string"),
        ({"inputs": "AAAA", "parameter": {}}, 'no field "parameter". Did you mean "parameters"'),
        ({"inputs": "AAAA", "parameters": [1]}, '"parameters" is a list of 1'),
        ({"inputs": "AAAA", "parameters": {"topk": 3}}, 'no parameter "topk". Did you mean "top_k"'),
        ({"inputs": "AAAA", "parameters": {"top_k": 0}}, '"top_k" is 0; it must be a whole number, 1 or more'),
        ({"inputs": "AAAA", "parameters": {"top_k": True}}, '"top_k" is true'),
        ({"inputs": "AAAA", "parameters": {"top_k": "3"}}, '"top_k" is "3"'),
        ({"inputs": "AAAA", "parameters": {"function_to_apply": "relu"}}, '"relu". Known: softmax, sigmoid, none'),
        ({"inputs": "AAAA", "parameters": {"function_to_apply": [1]}}, "is a list of 1. Known: softmax"),
    ]:
        refused(client.post("/models/org/tiny", json=body), 400, says)


def test_what_is_refused(client: httpx.Client, model: Classifier) -> None:
    for path, body, type, status, says in [
        ("/", b"", "image/png", 400, "the body is empty"),
        ("/", b"{", "application/json", 400, "the body is not JSON"),
        ("/", b'{"inputs": ' * 5000, "", 400, "the body is not JSON"),
        ("/", b'{"inputs": "\xff\xfe"}', "", 400, "the body is not JSON"),
        ("/", b'{"inputs": NaN}', "", 400, "the body is not JSON"),
        ("/", b"<html>", "text/html", 415, 'of type "text/html" is not read here. Send image/'),
        ("/", b"--x", "multipart/form-data; boundary=x", 415, "`POST /classify` reads forms"),
        ("/?lang=de", b"x", "", 400, "lang"),
        ("/?top_k=none", b"x", "", 400, "top_k"),
        ("/?top_k=0", b"x", "", 400, "top_k"),
        ("/?topk=1", b"x", "", 400, 'no query parameter "topk". Did you mean "top_k"'),
        ("/models/org/tiney", b"x", "", 404, 'no model "org/tiney". Did you mean "org/tiny"'),
        ("/models/%2e%2e%2fetc%2fpasswd%C3%A4", b"x", "", 404, "no model"),
        ("/models/", b"x", "", 404, 'no model ""'),
        ("/", b"GIF89a", "image/gif", 422, "the image"),
        ("/", photo(0)[:200], "image/png", 422, "the image"),
        ("/", b'{"inputs": "file:///etc/passwd"}', "", 422, "the image is not base64: 'file:///etc/passwd'"),
        ("/", b'{"inputs": "/etc/passwd"}', "", 422, "the image"),
        ("/", b'{"inputs": "data:image/png,abc"}', "", 422, "a data URL without `;base64,`"),
        ("/", '{"inputs": "ÄÖ"}'.encode(), "", 422, "the image is not base64"),
    ]:
        refused(client.post(path, content=body, headers={"Content-Type": type} if type else {}), status, says)
    same(client.post("/", content=photo(0)).json(), model(photo(0)))


def test_too_much_is_refused(serve: Callable[..., str]) -> None:
    with httpx.Client(base_url=serve(max_items=2, max_pixels=3000)) as client:
        refused(client.post("/", json={"inputs": ["AAAA"] * 3}), 413, "3 images are more than the 2")
        refused(client.post("/", content=photo(0)), 413, "the image")
        rows = client.post("/", json={"inputs": [text(photo(0)), text(photo(1))]}).json()
        assert rows[0]["error_type"] == "too_large" and len(rows[1]) == 5
        refused(client.post("/", content=b'{"inputs": [' + b"1," * 4_000_001), 413, "more than 4,000,000 values")


def test_a_url_of_no_allowed_host_is_refused(client: httpx.Client) -> None:
    answer = client.post("/", json={"inputs": "http://127.0.0.1/cat.jpg"})
    refused(answer, answer.status_code, "allow")
    assert 400 <= answer.status_code < 500


def test_a_model_without_a_head_has_no_labels(serve: Callable[..., str], tiny: Path) -> None:
    def load(*args: Any, **options: Any) -> Classifier:
        found: Classifier = opsin.load(*args, **options)
        found.labels = None
        return found

    with httpx.Client(base_url=serve(load=load)) as client:
        refused(client.post("/", content=photo(0)), 422, "org/tiny has no classifier: it gives embeddings")
    with pytest.raises(NoHead):
        load(tiny)(photo(0))


def test_several_labels_have_sigmoids(serve: Callable[..., str], model: Classifier) -> None:
    def load(*args: Any, **options: Any) -> Classifier:
        found: Classifier = opsin.load(*args, **options)
        assert found.labels is not None
        found.labels = replace(found.labels, multi_label=True)
        return found

    with httpx.Client(base_url=serve(load=load)) as client:
        rows = client.post("/", content=photo(2)).json()
    scores = model.logits(photo(2))[0].sigmoid().sort(descending=True).values[:5]
    assert [row["score"] for row in rows] == pytest.approx(scores.tolist(), abs=1e-5)


def test_equal_scores_stand_by_index(serve: Callable[..., str]) -> None:
    def load(*args: Any, **options: Any) -> Classifier:
        found: Classifier = opsin.load(*args, **options)
        head: Any = found.model.head
        torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
        return found

    with httpx.Client(base_url=serve(load=load)) as client:
        rows = client.post("/?top_k=99", content=photo(0)).json()
    assert [row["label"] for row in rows][:3] == ["tabby cat", "espresso", "rocket"] and len(rows) == 7
