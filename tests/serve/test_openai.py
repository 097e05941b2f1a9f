"""OpenAI's protocol: through its own client and by hand, beside `opsin.load`; what is refused."""

import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import opsin
from opsin.pipeline import Classifier
from protocols import photo, refused, text

openai = pytest.importorskip("openai", reason="the client that speaks this protocol")


@pytest.fixture(scope="module")
def model(tiny: Path) -> Classifier:
    loaded: Classifier = opsin.load(tiny, dtype="fp32")
    return loaded


@pytest.fixture
def theirs(client: httpx.Client) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as found:
        yield found


def url(place: int) -> str:
    return f"data:image/png;base64,{text(photo(place))}"


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_their_client_as_it_is(theirs: Any, model: Classifier, options: dict[str, Any]) -> None:
    order = (2, 0, 1, 0)
    found = theirs.embeddings.create(model="org/tiny", input=[url(place) for place in order], user="me", **options)
    assert (found.object, found.model, found.usage.total_tokens) == ("list", "org/tiny", 0)
    assert [(item.object, item.index) for item in found.data] == [("embedding", place) for place in range(4)]
    vectors = [item.embedding for item in found.data]
    if options.get("encoding_format") == "base64":  # they decode only what they have not asked for
        vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
    np.testing.assert_allclose(vectors, model.embed([photo(place) for place in order]), atol=1e-5)
    one = theirs.embeddings.create(model="org/tiny", input=text(photo(1)), dimensions=36, **options)
    assert len(one.data) == 1


def test_their_client_lists_models(theirs: Any) -> None:
    (found,) = theirs.models.list().data
    assert found.id == "org/tiny" and found.object == "model" and found.owned_by == "opsin"
    assert 0 <= time.time() - found.created < 3600
    facts = found.model_dump()
    assert facts == theirs.models.retrieve("org/tiny").model_dump()
    assert {key: facts[key] for key in ("loaded", "classes", "embedding_dim", "image_size", "attention")} == {
        "loaded": True,
        "classes": 7,
        "embedding_dim": 36,
        "image_size": [32, 32],
        "attention": True,
    }
    with pytest.raises(openai.NotFoundError, match='no model "org/tin". Did you mean "org/tiny"'):
        theirs.models.retrieve("org/tin")


def test_a_model_that_is_not_loaded_says_so(serve: Callable[..., str]) -> None:
    with httpx.Client(base_url=serve(lazy=True)) as client:
        (facts,) = client.get("/v1/models").json()["data"]
        assert facts["loaded"] is False and "classes" not in facts
        refused(client.post("/v1/embeddings", json={"input": url(0)}), 503, "org/tiny is loading")


def test_images_in_objects(client: httpx.Client, model: Classifier) -> None:
    items = [{"image": url(1)}, {"image_url": url(2)}, {"image_url": {"url": text(photo(0))}}, url(1)]
    for asked, expected in ((items, (1, 2, 0, 1)), (items[2], (0,))):
        answer = client.post("/v1/embeddings", json={"input": asked, "modality": "image", "model": None})
        vectors = [item["embedding"] for item in answer.json()["data"]]
        np.testing.assert_allclose(vectors, model.embed([photo(place) for place in expected]), atol=1e-5)


def test_one_bad_image_refuses_its_request_and_no_other(client: httpx.Client, theirs: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=r"image\[1\] is not base64"):
        theirs.embeddings.create(model="org/tiny", input=[url(0), "a photo of a cat", url(1)])
    with pytest.raises(openai.UnprocessableEntityError, match=r"image\[2\]"):
        theirs.embeddings.create(model="org/tiny", input=[url(0), url(1), text(photo(2)[:80])])
    assert len(theirs.embeddings.create(model="org/tiny", input=url(0)).data) == 1


def test_what_is_refused(client: httpx.Client) -> None:
    for asked, status, says in [
        ([], 400, "the JSON is a list of 0; it must be an object with model, input"),
        ({}, 400, 'no "input"'),
        ({"input": []}, 400, "the list is empty"),
        ({"input": [1, 2, 3]}, 400, r'"input"\[0\] is 1; it must be an image.*Tokens are of text'),
        ({"input": [[1, 2]]}, 400, "Tokens are of text"),
        ({"input": {"text": "a"}}, 400, '"input" is an object of 1; it must be an image'),
        ({"input": {"image_url": {"url": None}}}, 400, '"input" is null; it must be an image'),
        ({"input": "AAAA", "model": 3}, 400, '"model" is 3; it must be a string'),
        ({"input": "AAAA", "model": "org/tin"}, 404, 'no model "org/tin". Did you mean "org/tiny"'),
        ({"input": "AAAA", "modality": "text"}, 400, '"modality" is "text"; the models served here embed images'),
        ({"input": "AAAA", "encoding_format": "int8"}, 400, '"encoding_format" is "int8". Known: float, base64'),
        ({"input": "AAAA", "encoding_format": ["float"]}, 400, '"encoding_format" is a list of 1'),
        ({"input": url(0), "dimensions": 12}, 400, '"dimensions" is 12; embeddings of org/tiny have 36. Leave it out'),
        ({"input": url(0), "dimensions": 36.0}, 400, '"dimensions" is 36.0'),
        (
            {"input": "AAAA", "encodingformat": "float"},
            400,
            'no field "encodingformat". Did you mean "encoding_format"',
        ),
        ({"input": ["AAAA"] * 257}, 413, "257 images are more than the 256"),
        ({"input": "AAAA"}, 422, "the image"),
        ({"input": "hello world"}, 422, "the image is not base64: 'hello world'"),
    ]:
        refused(client.post("/v1/embeddings", json=asked), status, says)
    for body, type, status, says in [
        (b"", "application/json", 400, "the body is not JSON"),
        (b'{"input": ' * 3000, "application/json", 400, "the body is not JSON"),
        (photo(0), "image/png", 415, 'a body of type "image/png" is not read here. Send application/json'),
    ]:
        refused(client.post("/v1/embeddings", content=body, headers={"Content-Type": type}), status, says)


def test_a_list_that_is_too_long_is_refused_before_it_is_looked_at(client: httpx.Client) -> None:
    answer = client.post("/v1/embeddings", json={"input": [7] * 257})
    refused(answer, 413, "257 images are more than the 256 that one request may have. Send several.")
