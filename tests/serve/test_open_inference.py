"""Open Inference Protocol v2: through Triton's own client and by hand, beside `opsin.load`; what is refused."""

import asyncio
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import opsin
from opsin.pipeline import Classifier
from opsin.serve import intake
from protocols import SIDES, photo, pixels, refused, text

triton = pytest.importorskip("tritonclient.http", reason="the client that speaks this protocol")

INFER = "/v2/models/org/tiny/infer"


@pytest.fixture(scope="module")
def model(tiny: Path) -> Classifier:
    loaded: Classifier = opsin.load(tiny, dtype="fp32")
    return loaded


@pytest.fixture
def theirs(serve: Callable[..., str]) -> Iterator[Any]:
    with triton.InferenceServerClient(serve().removeprefix("http://")) as client:
        yield client


def sent(array: np.ndarray, datatype: str, **options: Any) -> list[Any]:
    tensor = triton.InferInput("image", list(array.shape), datatype)
    tensor.set_data_from_numpy(array, **options)
    return [tensor]


def files(*places: int) -> np.ndarray:
    return np.array([photo(place) for place in places], dtype=np.object_)


def normalised(model: Classifier, *places: int) -> np.ndarray:
    """(B, 3, 32, 32)"""
    return model.preprocess.normalise_batch([model.preprocess.load(photo(place))[0] for place in places]).numpy()


def body(data: Any = None, *, shape: Any = (1, 2, 3, 3), datatype: Any = "UINT8", **more: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": list(shape), "datatype": datatype, "data": data}
    return {"inputs": [tensor | more.pop("tensor", {})], **more}


def test_their_client_asks_what_is_there(theirs: Any) -> None:
    assert theirs.is_server_live() and theirs.is_server_ready()
    assert theirs.is_model_ready("org/tiny") and theirs.is_model_ready("org/tiny", "1")
    assert not theirs.is_model_ready("org/tiny", "2") and not theirs.is_model_ready("org/other")
    assert theirs.get_server_metadata() == {
        "name": "opsin",
        "version": opsin.__version__,
        "extensions": ["binary_tensor_data", "classification"],
    }
    expected = {
        "name": "org/tiny",
        "versions": ["1"],
        "platform": "opsin",
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 7]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 7]},
        ],
    }
    assert theirs.get_model_metadata("org/tiny") == theirs.get_model_metadata("org/tiny", "1") == expected
    with pytest.raises(triton.InferenceServerException, match='org/tiny has no version "3"; there is one, "1"'):
        theirs.get_model_metadata("org/tiny", "3")


@pytest.mark.parametrize(("binary", "large"), [(True, 0), (False, 0), (True, intake.LARGE), (False, intake.LARGE)])
def test_their_client_sends_every_kind_of_tensor(
    theirs: Any, model: Classifier, binary: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "LARGE", large)  # 0: all is done on threads
    order = [2, 0, 1]
    encoded = files(*order) if binary else np.array([text(photo(place)).encode() for place in order], np.object_)
    same_size = np.stack([pixels(1), pixels(1)[::-1], pixels(1)[:, ::-1]])
    for tensor, datatype, images in (
        (same_size, "UINT8", list(same_size)),
        (normalised(model, *order), "FP32", [photo(place) for place in order]),
        (encoded, "BYTES", [photo(place) for place in order]),
        (encoded[:, None], "BYTES", [photo(place) for place in order]),
    ):
        answer = theirs.infer("org/tiny", sent(tensor, datatype, binary_data=binary), request_id="a/7")
        logits = model.logits(images)
        np.testing.assert_allclose(answer.as_numpy("logits"), logits, atol=1e-5)
        np.testing.assert_allclose(answer.as_numpy("probabilities"), logits.softmax(1), atol=1e-5)
        response = answer.get_response()
        assert (response["model_name"], response["model_version"], response["id"]) == ("org/tiny", "1", "a/7")
        assert [output["name"] for output in response["outputs"]] == ["logits", "probabilities"]
        assert response["outputs"][0]["parameters"] == {"binary_data_size": 3 * 7 * 4}


@pytest.mark.parametrize("binary", [True, False])
def test_their_client_chooses_outputs(theirs: Any, model: Classifier, binary: bool) -> None:
    wanted = [
        triton.InferRequestedOutput("features", binary_data=not binary),
        triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3),
        triton.InferRequestedOutput("logits", binary_data=binary),
    ]
    images = [photo(1), photo(2)]
    answer = theirs.infer("org/tiny", sent(files(1, 2), "BYTES"), model_version="1", outputs=wanted)
    np.testing.assert_allclose(answer.as_numpy("logits"), model.logits(images), atol=1e-5)
    np.testing.assert_allclose(answer.as_numpy("features"), model.embed(images), atol=1e-5)
    classes = answer.as_numpy("probabilities")
    assert classes.shape == (2, 3)
    for row, expected in zip(classes, model(images, top_k=3), strict=True):
        for item, best in zip(row, expected, strict=True):
            value, index, label = (item.decode() if isinstance(item, bytes) else item).split(":")
            assert (int(index), label) == (best["index"], best["label"])
            assert float(value) == pytest.approx(best["score"], abs=1e-5) and len(value.split(".")[1]) == 6


def test_more_classes_than_there_are_and_of_features(client: httpx.Client, model: Classifier) -> None:
    outputs = [
        {"name": "logits", "parameters": {"classification": 10**9}},
        {"name": "features", "parameters": {"classification": 1}},
    ]
    answer = client.post(INFER, json=body(pixels(0).ravel().tolist(), shape=(1, *SIDES[0], 3), outputs=outputs)).json()
    logits, features = answer["outputs"]
    assert (logits["datatype"], logits["shape"], len(logits["data"])) == ("BYTES", [1, 7], 7)
    row = model.embed(pixels(0))[0]
    assert features["shape"] == [1, 1] and features["data"] == [f"{row.max():f}:{row.argmax()}"]


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_their_client_compresses_both_ways(theirs: Any, model: Classifier, name: str) -> None:
    seen = []
    post = theirs._post

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(post(*args, **options))
        return seen[-1]

    theirs._post = watched
    answer = theirs.infer(
        "org/tiny",
        sent(pixels(2)[None], "UINT8"),
        request_compression_algorithm=name,
        response_compression_algorithm=name,
    )
    assert seen[0].get("content-encoding") == name
    np.testing.assert_allclose(answer.as_numpy("logits"), model.logits(pixels(2)), atol=1e-5)


def test_nested_and_flat_json_are_the_same(client: httpx.Client, model: Classifier) -> None:
    images = np.stack([pixels(1), pixels(1)[::-1]])
    for array, datatype in ((images, "UINT8"), (normalised(model, 0, 2), "FP32")):
        flat, nested = (
            client.post(INFER, json=body(data, shape=array.shape, datatype=datatype)).json()["outputs"]
            for data in (array.ravel().tolist(), array.tolist())
        )
        assert flat == nested and flat[0]["shape"] == [2, 7] and len(flat[0]["data"]) == 14


def test_a_raw_binary_request_is_one_image_file(client: httpx.Client, model: Classifier) -> None:
    answer = client.post(INFER, content=photo(1), headers={"Inference-Header-Content-Length": "0"})
    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert len(json.loads(answer.content[:length])["outputs"]) == 2
    logits = np.frombuffer(answer.content[length:], "<f4")[:7]
    np.testing.assert_allclose(logits, model.logits(photo(1))[0], atol=1e-5)


def test_an_output_overrides_where_all_go(client: httpx.Client) -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}, {"name": "probabilities"}]
    asked = body([text(photo(0))], shape=(1,), datatype="BYTES", outputs=outputs)
    answer = client.post(INFER, json=asked | {"parameters": {"binary_data_output": True}})
    length = int(answer.headers["inference-header-content-length"])
    logits, probabilities = json.loads(answer.content[:length])["outputs"]
    assert len(logits["data"]) == 7 and "parameters" not in logits
    assert probabilities["parameters"] == {"binary_data_size": 28} and len(answer.content) == length + 28


def test_a_model_without_a_head_gives_features(serve: Callable[..., str], model: Classifier) -> None:
    def load(*args: Any, **options: Any) -> Classifier:
        found: Classifier = opsin.load(*args, **options)
        found.labels = None
        return found

    with httpx.Client(base_url=serve(load=load)) as client:
        outputs = client.get("/v2/models/org/tiny").json()["outputs"]
        assert outputs == [{"name": "features", "datatype": "FP32", "shape": [-1, 36]}]
        asked = body([text(photo(0))], shape=(1,), datatype="BYTES")
        (found,) = client.post(INFER, json=asked).json()["outputs"]
        np.testing.assert_allclose(found["data"], model.embed(photo(0))[0], atol=1e-5)
        refused(client.post(INFER, json=asked | {"outputs": [{"name": "logits"}]}), 400, "Known: features")


def test_several_labels_have_sigmoids(serve: Callable[..., str], model: Classifier) -> None:
    def load(*args: Any, **options: Any) -> Classifier:
        found: Classifier = opsin.load(*args, **options)
        assert found.labels is not None
        found.labels = replace(found.labels, multi_label=True)
        return found

    with httpx.Client(base_url=serve(load=load)) as client:
        asked = body([text(photo(0))], shape=(1,), datatype="BYTES")
        outputs = client.post(INFER, json=asked).json()["outputs"]
    np.testing.assert_allclose(outputs[1]["data"], model.logits(photo(0))[0].sigmoid(), atol=1e-5)


def test_json_that_is_refused(client: httpx.Client) -> None:
    good = pixels(0)[:2, :3].ravel().tolist()
    for asked, says in [
        ([], 'the JSON is a list of 0; it must be an object with "inputs"'),
        ({}, '"inputs" is null; it must be a list of one object'),
        ({"inputs": []}, '"inputs" is a list of 0'),
        ({"inputs": [1]}, '"inputs" is a list of 1'),
        ({"inputs": [{}]}, 'the input has no "name"'),
        (body(good, tensor={"name": "pixels"}), 'no input "pixels". Known: image'),
        (body(good, datatype="FP16"), '"datatype" of "image" is "FP16". Known: UINT8, FP32, BYTES'),
        (body(good, datatype=["UINT8"]), '"datatype" of "image" is a list of 1'),
        (body(good, shape=()), r'shape \[\]; of UINT8 it is \[B, H, W, 3\]'),
        (body(good, shape=(2, 3, 3)), r"\[2, 3, 3\]; of UINT8 it is \[B, H, W, 3\]: rows, columns, channels last"),
        (body(good, shape=(1, 3, 2, 3, 1)), r"it is \[B, H, W, 3\]"),
        (body(good, shape=(1, 3, 3, 2)), r"it is \[B, H, W, 3\]"),
        (body(good, shape=(1, -2, -3, 3)), r'"shape" of "image" is \[1,-2,-3,3\]; it must be a list of whole numbers'),
        (body(good, shape=(0, 2, 3, 3)), r"\[0,2,3,3\]; it must be"),
        (body(good, shape=(1,) * 9), r"\[1,1,1,1,1,1,1,1,1\]; it must be a list of .*, at most eight"),
        (body(good, shape=(1, 2.0, 3, 3)), "whole numbers, 1 or more"),
        (body(good, shape=(1, True, 3, 3)), "whole numbers, 1 or more"),
        (body(good, shape=(1, 2**70, 3, 3)), "whole numbers, 1 or more"),
        (body(good, tensor={"shape": "1,2,3,3"}), "whole numbers, 1 or more"),
        (body(good[:-1]), r'"data" of "image" has 17 values; shape \[1, 2, 3, 3\] has 18'),
        (body([]), "lists that are not 1 long at axis 0"),
        (body([good]), "lists that are not 2 long at axis 1"),
        (body([[[[1, 2, 3]] * 3] * 3]), "lists that are not 2 long at axis 1"),
        (body([[[[1, 2, 3]] * 3, [[1, 2, 3]] * 2]]), "lists that are not 3 long at axis 2"),
        (body([[[[1, 2, 3]] * 3, 7]]), "lists that are not 3 long at axis 2"),
        (body([*good[:-1], 256]), "values that are not UINT8: whole numbers from 0 to 255"),
        (body([*good[:-1], -1]), "values that are not UINT8"),
        (body([*good[:-1], 1.5]), "values that are not UINT8"),
        (body([*good[:-1], "1"]), "values that are not UINT8"),
        (body([*good[:-1], [1]]), "values that are not UINT8"),
        (body([*good[:-1], None]), "values that are not UINT8"),
        (body("AAAA"), '"image" has no "data", a list'),
        (body(None), '"image" has no "data", a list'),
        (body([0] * 3072, shape=(1, 3, 31, 32), datatype="FP32"), r"of FP32 it is \[B, 3, 32, 32\]: channels first"),
        (body(["1"] * 3072, shape=(1, 3, 32, 32), datatype="FP32"), "values that are not FP32: numbers"),
        (body([None] * 3072, shape=(1, 3, 32, 32), datatype="FP32"), "values that are not FP32: numbers"),
        (body([0] * 3071 + [1e39], shape=(1, 3, 32, 32), datatype="FP32"), r"image\[0\] has pixels that are not"),
        (body(["AAAA"], shape=(1, 2), datatype="BYTES"), r"of BYTES it is \[B\] or \[B, 1\]"),
        (body(["AAAA"], shape=(2,), datatype="BYTES"), "has 1 values; shape"),
        (body([7], shape=(1,), datatype="BYTES"), "the image is 7; it must be a string"),
        (body(good, tensor={"parameters": {"binary_data_size": 18}}), 'both "data" and "binary_data_size"'),
        (body(good, tensor={"parameters": {"shared_memory_region": "a"}}), '"image" is in shared memory'),
        (body(good, tensor={"parameters": 3}), '"parameters" of "image" is 3'),
        (body(good, id=7), '"id" is 7; it must be a string'),
        (body(good, parameters=[1]), '"parameters" of the request is a list of 1'),
        (body(good, parameters={"binary_data_output": "yes"}), '"binary_data_output" is "yes"; it must be true'),
        (body(good, outputs={}), '"outputs" is an object of 0'),
        (body(good, outputs=["logits"]), 'an output is "logits"; it must be an object with "name"'),
        (body(good, outputs=[{"name": "logit"}]), 'no output "logit". Did you mean "logits"'),
        (body(good, outputs=[{"name": "logits"}] * 2), 'output "logits" is asked for twice'),
        (body(good, outputs=[{"name": "logits", "parameters": {"classification": -1}}]), '"classification" is -1'),
        (body(good, outputs=[{"name": "logits", "parameters": {"classification": True}}]), '"classification" is true'),
        (body(good, outputs=[{"name": "logits", "parameters": {"binary_data": 1}}]), '"binary_data" is 1'),
    ]:  # fmt: skip
        refused(client.post(INFER, json=asked), 400, says)
    assert client.post(INFER, json=body(good)).status_code == 200


def test_binary_tensors_that_are_refused(client: httpx.Client, model: Classifier) -> None:
    floats = normalised(model, 0, 1)
    floats[1, 2, 3, 5] = np.inf
    file = photo(0)
    packed = struct.pack("<I", len(file)) + file

    def asked(size: Any, shape: Any = (1, 2, 3, 3), datatype: str = "UINT8") -> bytes:
        tensor = {"name": "image", "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}
        return json.dumps({"inputs": [tensor]}).encode()

    for head, data, length, says in [
        (asked(18), bytes(18), None, "the body is not JSON"),
        (asked(18), b"", None, "0 bytes follow the JSON. Its length goes into the header Inference-Header-Content-Len"),
        (asked(18), bytes(17), 0, '"binary_data_size" is 18; 17 bytes follow the JSON'),
        (asked(-1), bytes(17), 0, '"binary_data_size" is -1'),
        (asked(2**62), bytes(17), 0, f'"binary_data_size" is {2**62}; 17 bytes'),
        (asked("18"), bytes(18), 0, '"binary_data_size" is "18"'),
        (asked(19), bytes(19), 0, r"shape \[1, 2, 3, 3\] and UINT8 has 18 bytes; 19 are there"),
        (asked(18, (1, 2**31, 2**31, 3)), bytes(18), 0, None),
        (asked(18, (2**62, 1, 1, 3)), bytes(18), 0, None),
        (asked(18), bytes(18), 10**6, "it must be a number from 0 to"),
        (asked(18), bytes(18), "-5", 'is "-5"; it must be a number'),
        (asked(18), bytes(18), "1_0", "it must be a number"),
        (asked(18), bytes(18), "9" * 5000, "it must be a number"),
        (json.dumps(body([0] * 18)).encode(), b"x", 0, '1 bytes follow the JSON, and "image" has no'),
        (asked(floats.nbytes, floats.shape, "FP32"), floats.tobytes(), 0, r"image\[1\] has pixels that are not finite"),
        (asked(floats.nbytes, (1, 3, 64, 32), "FP32"), floats.tobytes(), 0, r"of FP32 it is \[B, 3, 32, 32\]"),
        (asked(floats.nbytes - 4, floats.shape, "FP32"), floats.tobytes()[4:], 0, "has 24576 bytes; 24572 are there"),
        (asked(3, [1], "BYTES"), b"abc", 0, r"3 bytes ends before the length of image\[0\]"),
        (asked(len(packed), [2], "BYTES"), packed, 0, r"ends before the length of image\[1\]"),
        (asked(len(packed) - 1, [1], "BYTES"), packed[:-1], 0, r"image\[0\] has a length of \d+ bytes, more than"),
        (asked(len(packed) + 2, [1], "BYTES"), packed + b"ab", 0, "has 2 bytes behind its 1 images"),
        (asked(4, [1], "BYTES"), b"\xff\xff\xff\xff", 0, "a length of 4294967295 bytes"),
        (asked(8, [2**40], "BYTES"), bytes(8), 0, None),
    ]:
        headers = {} if length is None else {"Inference-Header-Content-Length": str(length or len(head))}
        answer = client.post(INFER, content=head + data, headers=headers)
        refused(answer, 400 if says else 413, says or "images are more than the 256|are over the 50,000,000")


def test_an_image_that_cannot_be_read_refuses_all_and_names_itself(theirs: Any, client: httpx.Client) -> None:
    some = files(0, 1, 2)
    some[1] = some[1][:90]
    with pytest.raises(triton.InferenceServerException, match=r"\[422\] image\[1\]"):
        theirs.infer("org/tiny", sent(some, "BYTES"))
    with pytest.raises(triton.InferenceServerException, match=r"\[422\] the image"):
        theirs.infer("org/tiny", sent(np.array([b"<svg/>"], np.object_), "BYTES"))
    data = [text(photo(0)), "no base64!"]
    refused(client.post(INFER, json=body(data, shape=(2, 1), datatype="BYTES")), 422, r"image\[1\] is not base64")


def test_compressed_bodies_that_are_refused(serve: Callable[..., str]) -> None:
    good = json.dumps(body([0] * 18)).encode()
    bomb = gzip.compress(bytes(3_000_000))
    with httpx.Client(base_url=serve(max_body_bytes=2_000_000)) as client:
        for encoding, data, status, says in [
            ("br", good, 415, 'content encoding "br" is not read here'),
            ("gzip", good, 400, "the body is not gzip"),
            ("deflate", gzip.compress(good), 400, "the body is not deflate"),
            ("gzip", gzip.compress(good)[:-9], 400, "the gzip of the body is cut short"),
            ("gzip", gzip.compress(good) * 2, 400, "has more behind its end"),
            ("gzip", bomb, 413, "over 2000000 bytes when it is inflated"),
            ("deflate", zlib.compress(bytes(3_000_000)), 413, "over 2000000 bytes"),
        ]:
            refused(client.post(INFER, content=data, headers={"Content-Encoding": encoding}), status, says)
        answer = client.post(
            INFER, content=good, headers={"Content-Encoding": "identity", "Accept-Encoding": "gzip;q=0"}
        )
        assert answer.status_code == 200 and "content-encoding" not in answer.headers


def test_too_much_is_refused(serve: Callable[..., str]) -> None:
    with httpx.Client(base_url=serve(max_items=2, max_pixels=3000)) as client:
        array = np.zeros((1, 55, 55, 3), np.uint8)
        large = body(array.ravel().tolist(), shape=array.shape)
        refused(client.post(INFER, json=large), 413, "images of 55×55 pixels are over the 3,000")
        many = body(["AAAA"] * 3, shape=(3,), datatype="BYTES")
        refused(client.post(INFER, json=many), 413, "3 images are more than the 2")
        file = io.BytesIO()
        Image.new("L", (56, 54)).save(file, "PNG")
        refused(client.post(INFER, json=body([text(file.getvalue())], shape=(1,), datatype="BYTES")), 413, "the image")


def test_paths(client: httpx.Client) -> None:
    good = body([0] * 18)
    for path in ("/v2/models/org%2Ftiny/infer", "/v2/models/org/tiny/versions/1/infer"):
        assert client.post(path, json=good).status_code == 200
    refused(client.post("/v2/models/org/tiny/versions/2/infer", json=good), 404, 'org/tiny has no version "2"')
    refused(client.post("/v2/models/org/tin/infer", json=good), 404, 'no model "org/tin". Did you mean "org/tiny"')
    refused(client.get("/v2/models/org/tin/ready"), 404, "no model")
    refused(client.get("/v2/models/org/tin"), 404, "no model")
    assert client.get("/v2/models/org/tiny/ready").json() == {"name": "org/tiny", "ready": True}
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


def test_a_lazy_model_is_not_ready_and_is_not_loaded_by_the_question(serve: Callable[..., str]) -> None:
    with httpx.Client(base_url=serve(lazy=True)) as client:
        refused(client.get("/v2/models/org/tiny/ready"), 503, "org/tiny is not ready: it is not loaded")
        refused(client.get("/v2/models/org/tiny/ready"), 503, "it is not loaded")
        answer = client.get("/v2/models/org/tiny")
        assert answer.status_code == 503 and answer.headers["retry-after"]


def test_what_is_small_and_becomes_large_is_not_worked_on_by_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[str] = []
    to_thread = asyncio.to_thread

    async def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        beside.append(function.__name__)
        return await to_thread(function, *args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    bomb = gzip.compress(bytes(2**20))
    refused(client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"}), 400, "not JSON")
    assert beside == ["decompress", "parse_json"]
    nested = np.zeros((1, 311, 301, 3), np.uint8)  # one item, of 281 thousand values
    asked = body(nested.tolist(), shape=nested.shape)
    assert client.post(INFER, json=asked).status_code == 200
    assert beside[2:] == ["parse_json", "_images"]
