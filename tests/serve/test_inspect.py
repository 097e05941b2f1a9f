"""POST /explain: its maps are those of `opsin.explain.heads`, where that says they lie."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import opsin
from opsin import checkpoints, explain
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.preprocess import PreprocessConfig
from opsin.serve import inspect

NAMES = ("tabby cat", "espresso", "rocket", "otter", "lamp")


def written(folder: Path, model: Any, preprocess: PreprocessConfig, labels: Labels | None) -> Path:
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    checkpoints.write(folder, model, preprocess, labels)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Perceiver whose cross-attention has fewer heads than the others, and that crops; a headless ViT; a ResNet."""
    folder = tmp_path_factory.mktemp("inspect")
    latent = ImagePerceiverConfig(
        image_size=(32, 40), num_latents=3, latent_dim=12, num_blocks=2, layers_per_block=1, num_heads=2, num_bands=1,
        max_resolution=(2, 2), embed_dim=4, num_classes=5,
    )  # fmt: skip
    headless = ViTConfig(
        image_size=(24, 24), patch_size=8, embed_dim=8, num_layers=3, num_heads=2, mlp_dim=6, num_classes=0
    )
    residual = VTConfig(image_size=(64, 64), num_modules=0, width=8, num_classes=5)
    crop = PreprocessConfig(size=48, crop_size=(32, 40))
    return {
        "latent": written(folder / "latent", ImagePerceiver(latent), crop, Labels(NAMES)),
        "headless": written(folder / "headless", ViT(headless), PreprocessConfig(size=(24, 24)), None),
        "residual": written(folder / "residual", VT(residual), PreprocessConfig(size=(64, 64)), Labels(NAMES)),
    }


@pytest.fixture
def client(serve: Callable[..., str], tiny: Path, models: dict[str, Path]) -> Iterator[httpx.Client]:
    """Talks to a server of all of them."""
    names = (f"org/tiny={tiny}", *(f"org/{name}={path}" for name, path in models.items()))
    with httpx.Client(base_url=serve(models=names, max_pixels=10_000)) as found:
        yield found


@pytest.fixture(scope="module")
def photo() -> bytes:
    """71 × 53 pixels."""
    pixels = np.random.default_rng(5).integers(0, 256, (53, 71, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def maps_of(answer: dict[str, Any]) -> list[np.ndarray]:
    """Of each layer (heads, h, w): the values, put back from bytes."""
    flat = np.frombuffer(base64.b64decode(answer["maps"]), np.uint8).reshape(-1, *answer["grid"])
    low, high = np.array(answer["ranges"]).T[..., None, None]
    return np.split(low + flat / 255 * (high - low), np.cumsum(answer["heads"])[:-1])


def test_vit(client: httpx.Client, tiny: Path, photo: bytes) -> None:
    answer = client.post("/explain", params={"model": "org/tiny", "top_k": 2}, content=photo).json()
    classifier = opsin.load(tiny, dtype="fp32")
    expected = explain.heads(classifier, photo)
    assert expected.shape == (2, 3, 4, 4)
    assert (answer["model"], answer["kind"], answer["heads_shown"]) == ("org/tiny", "vit", "each")
    assert (answer["grid"], answer["layers"], answer["heads"]) == ([4, 4], 2, [3, 3])
    for layer, found in zip(expected, maps_of(answer), strict=True):
        steps = np.ptp(layer, axis=(1, 2), keepdims=True) / 255
        assert (np.abs(found - layer) <= 0.51 * steps).all()
    flat = np.frombuffer(base64.b64decode(answer["maps"]), np.uint8).reshape(6, -1)
    assert (flat.min(axis=1) == 0).all() and (flat.max(axis=1) == 255).all()
    assert answer["size"] == [71, 53]
    assert answer["region"] == [0, 0, 71, 53]
    assert answer["seen"] == [0, 0, 1, 1]
    labels = classifier(photo, top_k=2)
    assert [(best["label"], best["index"]) for best in answer["best"]] == [
        (best["label"], best["index"]) for best in labels
    ]
    assert answer["best"][0]["score"] == pytest.approx(labels[0]["score"], rel=1e-4)


def test_perceiver(client: httpx.Client, models: dict[str, Path], photo: bytes) -> None:
    answer = client.post("/explain", params={"model": "org/latent"}, content=photo).json()
    classifier = opsin.load(models["latent"], dtype="fp32")
    expected = explain.heads(classifier, photo)
    assert np.isnan(expected[0, 1]).all()
    assert (answer["kind"], answer["layers"], answer["heads"]) == ("perceiver", 3, [1, 2, 2])
    for layer, found in zip(expected, maps_of(answer), strict=True):
        there = layer[: len(found)]
        assert (np.abs(found - there) <= 0.51 * np.ptp(there, axis=(1, 2), keepdims=True) / 255).all()
    place = explain.explain(classifier, photo, method="attention", layer=0)
    assert answer["region"] == list(place.region)
    assert answer["seen"] == list(place.seen)
    assert answer["seen"] != [0, 0, 1, 1]


def test_model_without_labels(client: httpx.Client, photo: bytes) -> None:
    answer = client.post("/explain", params={"model": "org/headless"}, content=photo).json()
    assert answer["best"] == []
    assert answer["heads"] == [2, 2, 2]


def test_chinese_labels(serve: Callable[..., str], tmp_path: Path, photo: bytes) -> None:
    shape = ViTConfig(
        image_size=(24, 24), patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=6, num_classes=2
    )
    labels = Labels(("cat", "dog"), None, ("猫", "狗"))
    path = written(tmp_path / "zh", ViT(shape), PreprocessConfig(size=(24, 24)), labels)
    answer = httpx.post(f"{serve(models=(f'zh={path}',))}/explain", params={"lang": "zh"}, content=photo).json()
    assert {best["label"] for best in answer["best"]} == {"猫", "狗"}


def test_means_where_all_heads_are_too_much(
    client: httpx.Client, tiny: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect, "MAX_BYTES", 2 * 3 * 16 - 1)
    answer = client.post("/explain", params={"model": "org/tiny"}, content=photo).json()
    assert (answer["heads_shown"], answer["layers"], answer["heads"]) == ("mean", 2, [1, 1])
    expected = explain.heads(opsin.load(tiny, dtype="fp32"), photo).mean(axis=1)
    np.testing.assert_allclose(np.concatenate(maps_of(answer)), expected, atol=np.ptp(expected) / 255)


def test_form(client: httpx.Client, photo: bytes) -> None:
    raw = client.post("/explain", content=photo, headers={"Content-Type": "image/png"}).json()
    assert client.post("/explain", files={"file": ("photo.png", photo)}).json() == raw


def large() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (101, 100)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("status", "message", "request_of"),
    [
        (422, "org/residual is neither a ViT nor a Perceiver", {"params": {"model": "org/residual"}}),
        (404, 'no model "org/tinny". Did you mean "org/tiny"?', {"params": {"model": "org/tinny"}}),
        (400, 'no query parameter "modle". Did you mean "model"?', {"params": {"modle": "org/tiny"}}),
        (400, "the body is empty", {"content": b""}),
        (415, 'a body of type "text/html" is not read here', {"headers": {"Content-Type": "text/html"}}),
        (422, "not an image: it begins with", {"content": b"no image at all"}),
        (413, "10,100 pixels", {"content": large()}),
        (413, "more than the 1 files", {"files": [("file", b"one"), ("file", b"two")]}),
    ],
)
def test_refused(client: httpx.Client, photo: bytes, status: int, message: str, request_of: dict[str, Any]) -> None:
    answer = client.post("/explain", **({} if "files" in request_of else {"content": photo}) | request_of)
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_flat_map_is_black() -> None:
    values, ranges = inspect.as_bytes(np.full((1, 2, 3), 0.25, np.float32))
    assert not values.any()
    assert ranges.tolist() == [[0.25, 0.25]]
