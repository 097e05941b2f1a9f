"""What a user holds: single, batch and stream agree, and bad input fails alone."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import opsin
from mutations import broken_files
from opsin import checkpoints, engine, unknown
from opsin.checkpoints import Checkpoint, native
from opsin.device import has_bf16, has_int8
from opsin.errors import CheckpointError, ImageCorrupt, ImageNotFound, ModelError, NoHead
from opsin.hierarchy import narrowest
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource, PreprocessConfig


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def test_one_image_gives_its_best_labels(classifier: Classifier) -> None:
    best = classifier(picture(0), top_k=3)
    assert len(best) == 3
    assert set(best[0]) == {"label", "score", "index"}
    probs = classifier.model(classifier.preprocess(picture(0))[None]).detach().softmax(1)[0]
    assert best[0]["index"] == int(probs.argmax())
    assert best[0]["label"] == f"class {best[0]['index']}"
    assert best[0]["score"] == pytest.approx(float(probs.max()), abs=1e-6)


def test_a_list_gives_a_list_of_such_lists(classifier: Classifier) -> None:
    many = classifier([picture(0), picture(1)], top_k=2)
    assert len(many) == 2
    for got, single in zip(many, [classifier(picture(i), top_k=2) for i in (0, 1)], strict=True):
        assert [x["index"] for x in got] == [x["index"] for x in single]


def test_every_kind_of_image_is_the_same_image(classifier: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded(5))
    array = np.asarray(picture(5))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources: list[ImageSource] = [str(path), path, encoded(5), picture(5), array, tensor]
    logits = classifier.logits(sources)
    assert logits.dtype == torch.float32
    assert logits.shape == (6, 7)
    assert torch.equal(logits, logits[:1].expand(6, -1))
    assert torch.equal(classifier.logits(np.stack([array, array])), logits[:2])


@settings(max_examples=20, deadline=None)
@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=9), batch_size=st.integers(1, 5))
def test_batch_row_equals_single_run(classifier: Classifier, seeds: list[int], batch_size: int) -> None:
    pictures = [picture(seed) for seed in seeds]
    records = list(classifier.stream(pictures, batch_size=batch_size, embed=True))
    for row, image, record in zip(classifier.logits(pictures), pictures, records, strict=True):
        assert torch.allclose(row, classifier.logits(image)[0], atol=1e-5)
        assert np.allclose(record["embedding"], classifier.embed(image)[0], atol=1e-5)


def test_embed_is_the_final_norm_class_token(classifier: Classifier) -> None:
    model = classifier.model
    assert isinstance(model, ViT)
    with torch.inference_mode():
        tokens = model.encode(model.embed(classifier.preprocess(picture(3))[None]))
    features = classifier.embed(picture(3))
    assert features.shape == (1, 24)
    assert features.dtype == np.float32
    assert np.allclose(features, tokens[:, 0].numpy(), atol=1e-6)


def test_stream_gives_one_record_per_input_in_order(classifier: Classifier) -> None:
    records = list(classifier.stream([picture(1), b"", "nowhere.jpg", encoded(2)[:-40], picture(3)], batch_size=2))
    assert [record["path"] for record in records] == ["image[0]", "image[1]", "nowhere.jpg", "image[3]", "image[4]"]
    assert [record["ok"] for record in records] == [True, False, False, False, True]
    assert [record["error"]["type"] for record in records if not record["ok"]] == [
        "not_an_image",
        "not_found",
        "corrupt",
    ]
    for record, seed in ((records[0], 1), (records[4], 3)):
        assert record["index"] == classifier(picture(seed))[0]["index"]
        assert record["topk"][0]["score"] == record["score"]
        assert (record["width"], record["height"]) == (40, 30)


def test_stream_reads_no_further_ahead_than_two_batches(classifier: Classifier) -> None:
    taken = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal taken
        while True:
            taken += 1
            yield picture(taken % 7)

    stream = classifier.stream(endless(), batch_size=4)
    for _ in range(21):
        next(stream)
    stream.close()
    assert taken <= 24 + 2 * 4


def test_an_output_that_is_not_finite_is_a_record(noisy_checkpoint: Checkpoint) -> None:
    """One poisoned image of a batch; its neighbours keep their answers."""

    class Poisoned(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits = self.model(pixels)
            logits[pixels.flatten(1).std(1) < 0.01] = float("nan")
            return logits

    poisoned = Classifier(replace(noisy_checkpoint, model=Poisoned(noisy_checkpoint.model)))
    records = list(poisoned.stream([picture(0), Image.new("RGB", (9, 9)), picture(1)]))
    assert [record["ok"] for record in records] == [True, False, True]
    assert records[1]["error"]["type"] == "not_finite"
    for record, seed in ((records[0], 0), (records[2], 1)):
        assert record["topk"][0]["index"] == Classifier(noisy_checkpoint)(picture(seed))[0]["index"]


def test_a_bad_image_in_a_call_is_raised(classifier: Classifier) -> None:
    with pytest.raises(ImageNotFound, match="nowhere.jpg"):
        classifier("nowhere.jpg")
    with pytest.raises(ImageCorrupt):
        classifier([picture(0), encoded(2)[:-40]])
    with pytest.raises(ValueError, match="no images: the list is empty"):
        classifier([])
    with pytest.raises(ValueError, match="batch_size is 0"):
        classifier.stream([picture(0)], batch_size=0)


def test_without_a_head_there_are_features_and_no_labels(noisy_checkpoint: Checkpoint) -> None:
    assert isinstance(noisy_checkpoint.model, ViT)
    body = ViT(replace(noisy_checkpoint.model.config, num_classes=0))
    embedder = Classifier(replace(noisy_checkpoint, model=body, labels=None), dtype="fp32")
    pixels = embedder.preprocess(picture(0))[None]
    assert torch.equal(embedder.model(pixels).detach(), torch.from_numpy(embedder.embed(picture(0))))
    with pytest.raises(NoHead, match="test/noise has no classification head"):
        embedder(picture(0))
    with pytest.raises(NoHead):
        embedder.stream([picture(0)])


def test_load_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match='dtype is "int3". Known: auto, fp32, bf16, int8, fp16, fp8.'):
        opsin.load(dtype="int3")
    with pytest.raises(ValueError, match='engine is "onnx". Known: auto, torch, openvino.'):
        opsin.load(engine="onnx")
    with pytest.raises(ValueError, match='decode is "slow". Known: exact, fast.'):
        opsin.load(decode="slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='dtype "fp8" is for CUDA; the model is on cpu.'):
        opsin.load(dtype="fp8", device="cpu")
    with pytest.raises(ModelError, match="opsin/vit-tiny has no ranges for int8. `opsin optimize` makes a folder"):
        opsin.load(dtype="int8", device="cpu")
    with pytest.raises(ValueError, match='lang is "fr"'):
        opsin.load(lang="fr")


@pytest.mark.slow
def test_two_thousand_broken_files(classifier: Classifier, tmp_path: Path) -> None:
    """One record per file, in order, and every answer is the one its own bytes give alone."""
    paths = broken_files(tmp_path, 2000, 0)
    records = list(classifier.stream(paths, batch_size=32))
    assert [record["path"] for record in records] == [str(path) for path in paths]
    good = [record for record in records if record["ok"]]
    whole = [re.search("-good-([0-9a-f]{6})", path.name) for path in paths]
    assert sum(map(bool, whole)) > 400
    assert all(record["ok"] for record, colour in zip(records, whole, strict=True) if colour)
    for record in good:
        alone = classifier.logits(record["path"])[0].softmax(0)
        assert record["score"] == pytest.approx(float(alone.max()), abs=1e-5)
        assert float(alone[record["index"]]) == pytest.approx(float(alone.max()), abs=1e-5)
    for record in records:
        if not record["ok"]:
            assert record["error"]["type"] in {"not_found", "unreadable", "not_an_image", "corrupt", "too_large"}
            assert record["error"]["message"]


@pytest.mark.parametrize(
    ("channels", "size", "found"),
    [(1, (32, 32), "takes 1 channels"), (3, (32, 36), "gives 3 channels of 32×36 pixels")],
)
def test_a_model_that_cannot_take_its_pixels(
    channels: int, size: tuple[int, int], found: str, noisy_checkpoint: Checkpoint
) -> None:
    assert isinstance(noisy_checkpoint.model, ViT)
    model = ViT(replace(noisy_checkpoint.model.config, num_channels=channels))
    with pytest.raises(CheckpointError, match=found):
        Classifier(replace(noisy_checkpoint, model=model, preprocess=PreprocessConfig(size=size)))


def detector(classifier: Classifier) -> unknown.Unknown:
    """By nearest neighbours of pictures 0 to 40; of others, flat colours of grey, a half as known as the other."""
    assert classifier.labels is not None
    features = classifier.embed([picture(i) for i in range(42)])
    logits = classifier.logits([picture(i) for i in range(42)]).numpy()
    flat = [Image.new("RGB", (9, 9), (5 * i,) * 3) for i in range(42)]
    others = unknown.Answers(classifier.logits(flat).numpy(), classifier.embed(flat))
    head = unknown.fingerprint(classifier.model)
    return unknown.fit(features, np.arange(42) % 7, unknown.Answers(logits, features), others, head=head)[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_none_of_these(dtype: str, noisy_checkpoint: Checkpoint) -> None:
    classifier = Classifier(noisy_checkpoint, dtype=dtype)
    classifier.unknown = detector(classifier)
    images: list[Any] = [picture(3), b"", Image.new("RGB", (9, 9), (90, 90, 90)), picture(4)]
    plain = list(classifier.stream(images, batch_size=2))
    found = list(classifier.stream(images, batch_size=2, unknown=0.1))
    assert [record.get("known") for record in found] == [True, None, False, True]
    assert [record["ok"] for record in found] == [True, False, True, True]
    for before, after in zip(plain, found, strict=True):
        if after["ok"]:
            assert after["known"] is (after["known_score"] >= 0.9)
            assert after["topk"] == before["topk"]  # to the bit: what is answered does not depend on being asked
    good = [images[0], images[2]]
    first, second = classifier(good, unknown=0.1)
    assert first == classifier(good)[0] and second == []
    assert classifier(good[1], unknown=0.1) == [] and classifier(good[1], unknown=0.99) == classifier(good[1])
    with pytest.raises(ValueError, match="false-accept rate of 1 is no share of images"):
        classifier.stream(images, unknown=1)
    with pytest.raises(ValueError, match="unknown and kind are of labels; with embed there are none"):
        classifier.stream(images, unknown=0.1, embed=True)


def test_two_heads_give_the_logits_that_they_give_alone(noisy_checkpoint: Checkpoint) -> None:
    """DeiT's second head reads a token that is in no features."""
    torch.manual_seed(1)
    assert isinstance(noisy_checkpoint.model, ViT)
    model = ViT(replace(noisy_checkpoint.model.config, distillation_token=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    classifier = Classifier(replace(noisy_checkpoint, model=model), dtype="fp32")
    classifier.unknown = detector(classifier)
    records = list(classifier.stream([picture(i) for i in range(3)], unknown=0.1))
    assert [record["topk"] for record in records] == classifier([picture(i) for i in range(3)])


def test_a_model_that_was_shown_nothing_else(noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoints.write(tmp_path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    shown_nothing = opsin.load(tmp_path, dtype="fp32")
    with pytest.raises(ModelError, match="has never been shown images of other things, .* opsin evaluate DATA --model"):
        shown_nothing.stream([picture(0)], unknown=0.1)
    unknown.write(tmp_path, detector(shown_nothing))
    (record,) = shown_nothing.stream([picture(0)], unknown=0.1)
    assert record["known"]
    other = opsin.load(tmp_path, dtype="fp32")
    with torch.no_grad():
        other.model.head.bias.add_(1)
    with pytest.raises(CheckpointError, match="was made for another model"):
        other([picture(0)], unknown=0.1)


def test_kinds_of_the_embedded_classes() -> None:
    classifier = opsin.load(dtype="fp32", lang="zh")
    image = picture(0)
    sure, unsure = (next(classifier.stream([image], kind=share))["kind"] for share in (0.02, 1))
    assert unsure is None and set(sure) == {"label", "wnid", "score"} and sure["score"] >= 0.02
    probs = classifier.logits(image).double().softmax(1)[0].numpy()
    assert sure == narrowest(probs, classifier.labels, 0.02, "zh")
    with pytest.raises(ValueError, match="at_least is 1.1"):
        classifier.stream([image], kind=1.1)


def test_classes_of_no_kind(classifier: Classifier) -> None:
    with pytest.raises(ModelError, match="test/noise: the classes have no WordNet ids"):
        classifier.stream([picture(0)], kind=0.9)


def test_dtypes_agree(noisy_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    plain, half = (Classifier(noisy_checkpoint, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert ("does not multiply bf16" in caplog.text) is not has_bf16()  # never in silence
    images = [picture(i) for i in range(3)]
    expected = plain.logits(images)
    assert torch.equal(expected, plain.model(torch.stack([plain.preprocess(image) for image in images])))
    assert 0 < (half.logits(images) - expected).abs().max() < 0.1 * expected.std()
    assert half.logits(images).dtype == torch.float32
    assert next(half.model.parameters()).dtype == torch.float32
    assert (plain.dtype, half.dtype) == ("fp32", "bf16")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bf16_only_where_the_cpu_has_it(
    native: bool, noisy_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opsin.pipeline.has_bf16", lambda: native)
    auto = Classifier(noisy_checkpoint)
    expected = Classifier(noisy_checkpoint, dtype="fp32").logits(picture(0))
    drift = (auto.logits(picture(0)) - expected).abs().max() / expected.std()
    assert auto.dtype == ("bf16" if native else "fp32")
    assert (1e-4 < drift < 0.1) if native else drift < 1e-4


@pytest.mark.skipif(not engine.can_pack(), reason="this torch has no oneDNN")
def test_fp32_is_the_plain_model_unless_it_need_not_be_exact(noisy_checkpoint: Checkpoint) -> None:
    classifier = Classifier(noisy_checkpoint)
    classifier.use("fp32")
    assert classifier._net is classifier.model
    expected = classifier.logits(picture(0))
    classifier.use("fp32", exact=False)  # as the autopilot measured it
    assert classifier._net is not classifier.model and classifier.dtype == "fp32"
    torch.testing.assert_close(classifier.logits(picture(0)), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_used_changes_nothing(noisy_checkpoint: Checkpoint) -> None:
    classifier = Classifier(noisy_checkpoint, dtype="fp32")
    expected = classifier.logits(picture(0))
    for dtype, error in (("fp8", ValueError), ("int8", ModelError)):
        with pytest.raises(error):
            classifier.use(dtype)
        assert classifier.dtype == "fp32" and classifier._exact
        assert torch.equal(classifier.logits(picture(0)), expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.0:qkv.middle", (24,), "layers.0:qkv.middle is not the range of a dense layer"),
        ("layers.0:head.low", (24,), "layers.0:head.low is not the range of a dense layer"),
        ("layers.7:qkv.low", (24,), "the model has no layer layers.7"),
        ("layers.0:qkv.low", (23,), "layers.0:qkv needs a low and a high of 24 finite numbers each"),
        ("layers.0:qkv.low", (24,), "layers.0:qkv needs a low and a high of 24 finite numbers each"),  # no high
    ],
)
def test_ranges_that_do_not_fit(
    name: str, shape: tuple[int, ...], message: str, noisy_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoints.write(tmp_path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    save_file({name: torch.zeros(shape)}, tmp_path / "int8.safetensors")
    with pytest.raises(CheckpointError, match=message):
        opsin.load(tmp_path)
    pair = (torch.zeros(24), torch.full((24,), float("inf")))
    native.write_ranges(tmp_path, {"layers.0": {"qkv": pair}})
    with pytest.raises(CheckpointError, match="24 finite numbers each"):
        opsin.load(tmp_path)


@pytest.mark.skipif(not has_int8(), reason="this CPU does not multiply int8")
def test_an_optimised_folder_runs_in_int8(noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """`auto` takes int8 there, and only there; the weights are the exact ones."""
    model, preprocess = noisy_checkpoint.model, noisy_checkpoint.preprocess
    assert preprocess is not None
    pixels = torch.stack([preprocess(picture(i)) for i in range(8)])
    ranges = engine.calibrate(model, [pixels])
    checkpoints.write(tmp_path, model, preprocess, noisy_checkpoint.labels)
    assert opsin.load(tmp_path).dtype != "int8"
    native.write_ranges(tmp_path, ranges)
    int8 = opsin.load(tmp_path)
    assert (int8.dtype, int8.engine) == ("int8", "torch")
    with torch.inference_mode():
        near = engine.pack(model, "int8", ranges)(pixels[2:3])  # where memory lies may move a number to the next code
        torch.testing.assert_close(int8.logits(picture(2)), near, rtol=0, atol=0.02 * float(near.std()))
        exact = opsin.load(tmp_path, dtype="fp32").logits(picture(2))
        torch.testing.assert_close(exact, model(pixels[2:3]), rtol=0, atol=1e-5)
    assert 0.001 < (int8.logits(picture(2)) - exact).abs().max() / exact.std() < 0.5


def test_fast_decoding_and_exact_pixels(noisy_checkpoint: Checkpoint) -> None:
    """A photo many times as large as the pixels is read at a fraction; fp32 has the very pixels of Pillow."""
    file = io.BytesIO()
    x = np.linspace(0, 20, 900)
    wave = (np.sin(x[:, None] * 3) * np.cos(x[None, :600]) * 120 + 128).astype(np.uint8)
    Image.fromarray(np.stack([wave, wave[::-1], 255 - wave], axis=2)).save(file, "JPEG", quality=92)
    exact = Classifier(noisy_checkpoint, dtype="fp32")
    fast = Classifier(noisy_checkpoint, dtype="fp32", decode="fast")
    pixels = exact.preprocess(file.getvalue())[None]
    with torch.inference_mode():
        assert torch.equal(exact.logits(file.getvalue()), exact.model(pixels))
        drift = (fast.logits(file.getvalue()) - exact.logits(file.getvalue())).abs().max()
    assert 0 < drift < 0.2 * exact.logits(file.getvalue()).std()
