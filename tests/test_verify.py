"""`opsin verify`: the right weights pass, others fail, and what cannot be decided is not passed."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from hub_server import HubServer
from opsin import checkpoints
from opsin import verify as module
from opsin.checkpoints import Checkpoint
from opsin.checkpoints.catalog import CATALOG, TIMM
from opsin.cli.verify import show_certificate
from opsin.cli.verify import verify as command
from opsin.data import open_samples
from opsin.errors import DataError, ModelError, NoHead
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.pipeline import Classifier
from opsin.preprocess import PreprocessConfig
from opsin.verify import IMAGENET, TINY, Certificate, Check, DataSet, Protocol, Published, data_digest, verify

NAMES = [f"class {i}" for i in range(7)]
KEYS = {
    "opsin", "model", "published_as", "revision", "sha256", "format", "preprocess", "preprocess_hash", "picture",
    "protocol", "data", "time", "environment", "checks", "verdict",
}  # fmt: skip
STAND_IN = DataSet("the stand-in", 14, 7)


def picture(seed: int, size: tuple[int, int] = (61, 43)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, noisy_checkpoint: Checkpoint) -> Path:
    """right/ and wrong/, two models; reference.png; data/, two images of each class."""
    folder = tmp_path_factory.mktemp("verify")
    wrong = copy.deepcopy(noisy_checkpoint.model)
    assert isinstance(wrong, ViT)
    with torch.no_grad():
        wrong.get_parameter("layers.1.mlp.fc1.weight")[3, 5] += 0.5
    for name, model in (("right", noisy_checkpoint.model), ("wrong", wrong)):
        checkpoints.write(folder / name, model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    picture(99).save(folder / "reference.png")
    for i in range(14):
        path = folder / "data" / NAMES[i % 7] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


@pytest.fixture(scope="module")
def references(base: Path, classifier: Classifier) -> dict[str, Any]:
    """What "the authors" of right/ printed, to four decimals."""
    image = Image.open(base / "reference.png").convert("RGB")
    logits = classifier.logits(image)[0].double()
    probs = torch.softmax(logits, 0)
    model = classifier.model
    assert isinstance(model, ViT)
    large = replace(classifier.preprocess, size=(48, 48))
    with torch.inference_mode():
        hidden = model.encode(model.embed(large(image)[None]))[0].double()
    best = [{"label": NAMES[i], "score": round(float(probs[i]), 4)} for i in probs.argsort(descending=True)[:5]]
    return {
        "picture": {
            "name": "test picture",
            "url": "http://127.0.0.1:9/reference.jpg",
            "pixels_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        },
        "models": {
            "me/right": {
                "logits": {"values": logits[:3].round(decimals=4).tolist(), "tolerance": 1e-4, "source": "a test"},
                "hidden": {
                    "image_size": 48,
                    "shape": [1, 37, 24],
                    "values": hidden[:3, :3].numpy().round(4).tolist(),
                    "tolerance": 1e-4,
                    "source": "a test",
                },
                "top5": {"values": best, "tolerance": 0.01, "source": "a tutorial"},
            }
        },
    }


def measured(base: Path, classifier: Classifier, preprocess: PreprocessConfig | None = None) -> float:
    """Top-1 on data/, per cent."""
    right = 0
    for i in range(14):
        path = base / "data" / NAMES[i % 7] / f"{i}.png"
        pixels = (preprocess or classifier.preprocess)(path)[None]
        with torch.inference_mode():
            right += int(classifier.model(pixels).argmax()) == i % 7
    return 100 * right / 14


def protocol(top1: float, **more: Any) -> dict[str, Protocol]:
    scores = {"top-1": (Published(top1, "a paper"),)}
    return {"own": Protocol(**{"name": "own", "data_set": STAND_IN, "scores": scores} | more)}


def by_name(certificate: Certificate) -> dict[str, Check]:
    return {check.name: check for check in certificate.checks}


# ── what was published ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.shared
def test_the_values_are_those_of_the_sources(shared: Path) -> None:
    source = json.loads((shared / "expected_values.json").read_text())
    ours = module.expected()
    with Image.open(shared / source["image"]["file"]) as image:
        assert ours["picture"]["pixels_sha256"] == hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        assert tuple(ours["picture"]["size"]) == image.size
    assert ours["picture"]["file_sha256"] == source["image"]["sha256"]
    rest = copy.deepcopy(ours["models"])
    for name, wanted in source["logits_first3"].items():
        found = rest[name].pop("logits")
        assert (found["values"], found["tolerance"]) == (wanted["values"], wanted["atol"])
        assert wanted["source"] in found["source"]
    for name, wanted in source["hidden_first3x3"].items():
        name, _, size = name.partition("@")
        found = rest[name].pop("hidden")
        assert (found["values"], found["shape"], found["tolerance"]) == (
            wanted["values"],
            wanted["shape"],
            wanted["atol"],
        )
        assert str(found.get("image_size", "")) == size and wanted["source"] in found["source"]
    for name, wanted in source["top5_on_cats_jpg"].items():
        if name != "_source":
            assert [[each["score"], each["label"]] for each in rest[name].pop("top5")["values"]] == wanted
    assert not any(rest.values())


def test_the_values_are_of_models_that_have_them() -> None:
    imagenet = Labels.imagenet_1k().names
    for name, values in module.expected()["models"].items():
        entry = CATALOG[name]
        for kind, wanted in values.items():
            assert wanted["source"] and 0 < wanted["tolerance"] <= 0.01
            if kind == "top5":
                assert {each["label"] for each in wanted["values"]} <= set(imagenet)
            elif kind == "hidden":
                config = module.CATALOG[name].config
                side = wanted.get("image_size", 224) // config["patch_size"]
                assert wanted["shape"] == [1, side**2 + 1, config["embed_dim"]]
                assert entry.task == "features"
            else:
                assert kind == "logits" and entry.task == "classify"


def test_protocols_of_the_cards_models() -> None:
    own = PreprocessConfig()
    squash, crop = module.protocols("google/vit-large-patch16-224").values()
    assert (squash.name, squash.data_set, squash.preprocess(own)) == ("squash", IMAGENET, own)
    assert squash.scores == {"top-1": (Published(82.7, "vision_transformer README: resized to 224 × 224"),)}
    assert crop.name == "timm-crop"
    assert crop.preprocess(own) == PreprocessConfig.timm_crop(224, crop_pct=0.9)
    assert {figure: values[0].value for figure, values in crop.scores.items()} == {
        "top-1": 83.06,
        "top-5": 96.44,
        "ReaL top-1": 87.01,
        "ReaL top-5": 97.69,
    }
    (perceiver,) = module.protocols("deepmind/vision-perceiver-conv").values()
    assert (perceiver.name, perceiver.scores["top-1"][0].value) == ("centre-crop", 82.1)
    assert [value for value, _ in module.protocols("google/vit-base-patch16-224")["squash"].scores["top-1"]] == [
        81.31,
        81.2,
    ]


def test_timm_crop_keeps_size_and_colours() -> None:
    own = PreprocessConfig(size=(384, 384), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    (crop,) = module.protocols("facebook/deit-base-patch16-384").values()
    assert crop.preprocess(own) == PreprocessConfig.timm_crop(384, crop_pct=1.0, mean=own.mean, std=own.std)  # type: ignore[arg-type]


def test_every_score_of_the_catalogue_has_a_protocol() -> None:
    for name, entry in CATALOG.items():
        found = list(module.protocols(name).values())
        if entry.score is None:
            assert not found
            continue
        assert found[0].scores["top-1"][0] == (entry.score, entry.score_source)
        assert found[0].data_set == (TINY if name.startswith("opsin/") else IMAGENET)
        assert (found[0].crop_pct is not None) == (entry.score_source == TIMM)
        assert all(0 < value < 100 and source for each in found for s in each.scores.values() for value, source in s)
    assert module.protocols("no/such") == {}
    for name, rows in module._MORE.items():
        assert CATALOG[name].score not in [value for _, figure, value, _ in rows if figure == "top-1"]


# ── on the picture ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_right_weights_pass(base: Path, references: dict[str, Any]) -> None:
    certificate = verify(
        str(base / "right"), published_as="me/right", picture=base / "reference.png", references=references, known={}
    )
    assert certificate.verdict == "passed"
    assert [(check.name, check.verdict, check.note) for check in certificate.checks] == [
        ("first logits", "passed", ""),
        ("first hidden states", "passed", ""),
        ("best labels", "passed", ""),
    ]
    for check in certificate.checks:
        assert check.difference is not None and check.tolerance is not None and check.difference <= check.tolerance


def test_a_wrong_weight_fails(base: Path, references: dict[str, Any]) -> None:
    found = verify(
        str(base / "wrong"), published_as="me/right", picture=base / "reference.png", references=references, known={}
    )
    assert found.verdict == "failed"
    checks = by_name(found)
    assert checks["first logits"].verdict == checks["first hidden states"].verdict == "failed"
    assert checks["first logits"].difference and checks["first logits"].difference > 1e-4


def test_another_file_of_the_same_pixels_is_the_same_picture(
    base: Path, references: dict[str, Any], tmp_path: Path
) -> None:
    Image.open(base / "reference.png").save(tmp_path / "a.webp", lossless=True)
    found = verify(
        str(base / "right"), published_as="me/right", picture=tmp_path / "a.webp", references=references, known={}
    )
    assert found.facts["picture"]["is_reference"] and found.verdict == "passed"


def test_another_encoding_is_said_and_not_failed(base: Path, references: dict[str, Any], tmp_path: Path) -> None:
    Image.open(base / "reference.png").save(tmp_path / "a.jpg", quality=60)
    found = verify(
        str(base / "right"), published_as="me/right", picture=tmp_path / "a.jpg", references=references, known={}
    )
    assert not found.facts["picture"]["is_reference"]
    assert found.facts["picture"]["size"] == [61, 43]
    checks = by_name(found)
    assert checks["first logits"].verdict == "no verdict" and checks["first logits"].difference
    assert all(check.note == module.OTHER_ENCODING for check in found.checks)
    assert checks["best labels"].verdict in ("passed", "no verdict")


def test_a_model_without_the_published_class_or_tokens(
    base: Path, references: dict[str, Any], noisy_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    labels = Labels((*NAMES[:2], *"abcde"))
    checkpoints.write(tmp_path / "m", noisy_checkpoint.model, noisy_checkpoint.preprocess, labels)
    wanted = copy.deepcopy(references)
    wanted["models"]["me/right"]["hidden"]["shape"] = [1, 26, 24]
    found = by_name(
        verify(
            str(tmp_path / "m"), published_as="me/right", picture=base / "reference.png", references=wanted, known={}
        )
    )
    assert found["best labels"].verdict == "failed" and found["best labels"].note.startswith('the model has no class "')
    assert found["first hidden states"].note == "37 tokens of 24, published 26 of 24"
    assert found["first hidden states"].verdict == "failed"


def test_numbers_that_are_none_are_a_failure_and_valid_json(
    base: Path, references: dict[str, Any], noisy_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = copy.deepcopy(noisy_checkpoint.model)
    assert isinstance(model, ViT)
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    checkpoints.write(tmp_path / "m", model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    found = verify(
        str(tmp_path / "m"), published_as="me/right", picture=base / "reference.png", references=references, known={}
    )
    assert {check.verdict for check in found.checks} == {"failed"}
    json.dumps(found.to_dict(), allow_nan=False)


def test_without_network(base: Path, references: dict[str, Any], classifier: Classifier) -> None:
    arguments: dict[str, Any] = {"published_as": "me/right", "references": references}
    with pytest.raises(DataError, match=r"cannot be fetched: http://127.*Give a copy of it: --picture FILE"):
        verify(str(base / "right"), known={}, **arguments)
    data, known = open_samples(str(base / "data")), protocol(measured(base, classifier))
    found = verify(str(base / "right"), data=data, known=known, **arguments)  # accuracy needs no picture
    assert [check.verdict for check in found.checks] == ["no verdict"] * 3 + ["passed"]
    assert "--picture FILE" in found.checks[0].note and found.checks[0].found is None


# ── accuracy ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_accuracy(base: Path, classifier: Classifier) -> None:
    top1 = measured(base, classifier)
    for published, verdict in ((top1, "passed"), (top1 - 0.09, "passed"), (top1 + 0.11, "failed")):
        found = verify(str(base / "right"), data=open_samples(str(base / "data")), known=protocol(published))
        (check,) = found.checks
        assert check.verdict == found.verdict == verdict
        assert (check.found, check.tolerance) == (pytest.approx(top1, abs=1e-4), 0.1)
        assert check.note == "all 14 images: the stand-in"


def test_any_of_several_sources_will_do(base: Path, classifier: Classifier) -> None:
    top1 = measured(base, classifier)
    scores = {"top-1": (Published(top1 - 5, "one"), Published(top1 + 0.04, "another"))}
    found = verify(str(base / "right"), data=open_samples(str(base / "data")), known=protocol(0, scores=scores))
    assert found.verdict == "passed"
    assert found.checks[0].difference == pytest.approx(0.04, abs=1e-3)


def test_the_protocol_decides_the_pixels(base: Path, classifier: Classifier) -> None:
    crop = PreprocessConfig.timm_crop(32, crop_pct=0.5)
    scores = {"top-1": (Published(measured(base, classifier, crop), "a paper"),)}
    known = protocol(0) | {"crop": Protocol(name="crop", data_set=STAND_IN, crop_pct=0.5, scores=scores)}
    found = verify(str(base / "right"), data=open_samples(str(base / "data")), known=known, protocol="crop")
    assert found.verdict == "passed"
    assert found.facts["protocol"]["preprocess"] == crop.spec()
    assert found.facts["protocol"]["preprocess_hash"] == crop.hash() != found.facts["preprocess_hash"]
    assert found.facts["preprocess"] == classifier.preprocess.spec()


def test_other_data_give_a_score_and_no_verdict(base: Path, classifier: Classifier) -> None:
    known = protocol(50, data_set=DataSet("the stand-in", 70, 7))
    found = verify(str(base / "right"), data=open_samples(str(base / "data")), known=known)
    (check,) = found.checks
    assert found.verdict == "no verdict" and check.tolerance is None
    assert check.found == pytest.approx(measured(base, classifier), abs=1e-4)
    assert check.note == (
        "not the stand-in (70 images of 7 classes) but 14 images of 7 classes: the score says nothing of the published "
        "one"
    )


def test_standing() -> None:
    keys = [f"x/ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 2001)]
    spread = np.arange(2000) % 1000
    assert module._standing(IMAGENET, keys, spread, 0) == (
        False,
        "2,000 of the 50,000 images; the tolerance is the 95 % interval",
    )
    assert module._standing(IMAGENET, ["a.png", *keys[1:]], spread, 0)[0] is None
    assert module._standing(IMAGENET, keys, np.arange(2000) % 499, 0)[0] is None  # hardly a sample of 1,000 classes
    assert module._standing(IMAGENET, keys[:100], np.arange(100) % 50, 0)[0] is False
    whole = np.repeat(np.arange(1000), 50)
    assert module._standing(IMAGENET, ["a"] * 50_000, whole, 0)[0] is True
    assert module._standing(IMAGENET, ["a"] * 50_000, whole, 3)[1].startswith(
        "not the validation set of ImageNet-1k (50,000 images of 1,000 classes) but 50,000 images of 1,000 classes, 3 "
    )
    assert module._standing(IMAGENET, ["a"] * 50_000, np.repeat(np.arange(500), 100), 0)[0] is None
    lopsided = whole.copy()
    lopsided[0] = 1
    assert module._standing(IMAGENET, ["a"] * 50_000, lopsided, 0)[0] is None


def test_the_interval_of_a_part() -> None:
    published = (Published(80.0, "a paper"),)
    inside = module._score_check("top-1", 77.6, 1000, published, False, "")
    assert (inside.verdict, inside.tolerance) == ("passed", pytest.approx(196 * (0.8 * 0.2 / 1000) ** 0.5, abs=1e-3))
    assert module._score_check("top-1", 77.4, 1000, published, False, "").verdict == "failed"
    unknown = module._score_check("ReaL top-1", 77.4, 1000, (), True, "all")
    assert (unknown.verdict, unknown.note) == ("no verdict", "nothing was published of it by this protocol")


def test_unreadable_images_are_named_and_no_verdict(base: Path, tmp_path: Path) -> None:
    for i in range(14):
        path = tmp_path / NAMES[i % 7] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((base / "data" / NAMES[i % 7] / f"{i}.png").read_bytes() if i != 5 else b"\x89PNG\r\n\x1a\n")
    found = verify(str(base / "right"), data=open_samples(str(tmp_path)), known=protocol(50))
    assert found.verdict == "no verdict"
    assert [Path(bad["path"]).name for bad in found.facts["data"]["unreadable"]] == ["5.png"]
    assert "13 images of 7 classes, 1 more could not be read" in found.checks[0].note


def test_real_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViT(
        ViTConfig(image_size=(32, 32), patch_size=16, embed_dim=24, num_layers=1, num_heads=2, mlp_dim=40)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    labels = Labels.imagenet_1k()
    assert labels.wnids is not None
    checkpoints.write(tmp_path / "m", model, PreprocessConfig(size=(32, 32)), labels)
    sets: list[list[int]] = []
    with torch.inference_mode():
        for i in range(1, 12):
            path = tmp_path / "val" / labels.wnids[3 * i] / f"ILSVRC2012_val_{i:08}.png"
            path.parent.mkdir(parents=True)
            picture(i).save(path)
            best = model(PreprocessConfig(size=(32, 32))(path)[None])[0].argsort(descending=True).tolist()
            sets.append([[best[0]], [best[4], best[9]], [best[5]], []][i % 4])  # right, in five, in none, not counted
    (tmp_path / "real.json").write_text(json.dumps(sets))
    scores = {
        "top-1": (Published(0.1, "p"),), "ReaL top-1": (Published(25.0, "p"),), "ReaL top-5": (Published(62.5, "p"),),
    }  # fmt: skip
    known = {"own": Protocol(name="own", scores=scores)}
    found = verify(
        str(tmp_path / "m"), data=open_samples(str(tmp_path / "val")), real=tmp_path / "real.json", known=known
    )
    checks = by_name(found)
    assert checks["ReaL top-1"].found == 25.0  # 2 of the 8 with labels
    assert checks["ReaL top-5"].found == 62.5
    assert checks["ReaL top-1"].note == "11 of the 50,000 images; the tolerance is the 95 % interval"
    assert {checks["ReaL top-1"].verdict, checks["ReaL top-5"].verdict} == {"passed"}


def test_the_digest_is_of_the_images_and_their_classes(base: Path, tmp_path: Path) -> None:
    samples = open_samples(str(base / "data"))
    digest = data_digest(samples, range(14))
    lines = [
        f"{hashlib.sha256((base / 'data' / NAMES[i % 7] / f'{i}.png').read_bytes()).hexdigest()} {NAMES[i % 7]}\n"
        for i in range(14)
    ]
    assert digest == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in reversed(range(14)):
            archive.write(base / "data" / NAMES[i % 7] / f"{i}.png", f"{NAMES[i % 7]}/renamed {i}.png")
    assert data_digest(open_samples(str(tmp_path / "a.zip")), range(14)) == digest
    assert data_digest(samples, range(13)) != digest
    samples.targets[0] = 6 - samples.targets[0]
    assert data_digest(samples, range(14)) != digest


@pytest.mark.slow
@pytest.mark.shared
def test_the_embedded_model_verifies(shared: Path) -> None:
    data = open_samples(str(shared / "tiny-imagenet-200-train-shard*.zip"))
    certificate = verify("opsin/vit-tiny", data=data)
    (check,) = certificate.checks
    assert certificate.verdict == "passed"
    assert check.found == pytest.approx(41.1, abs=0.1)
    assert check.note == "all 5,000 images: the held-out images of Tiny-ImageNet"


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_refusals(base: Path, references: dict[str, Any], tmp_path: Path, noisy_checkpoint: Checkpoint) -> None:
    right = str(base / "right")
    data = open_samples(str(base / "data"))

    def refused(error: type[Exception], message: str, name: str = right, **arguments: Any) -> None:
        with pytest.raises(error, match=message):
            verify(name, **{"references": references} | arguments)

    refused(DataError, r"nothing was published of .*right\" .*--as google/vit-base-patch16-224\. Values on a picture")
    refused(DataError, r"Did you mean .*google/vit-base-patch16-384", name="google/vit-base-patch16-385")
    refused(
        DataError,
        r"of google/vit-large-patch16-224 only accuracy was published: 82\.7 % .*, 83\.06 % .*--data FOLDER",
        name="google/vit-large-patch16-224",
    )
    refused(
        DataError,
        "no accuracy was published of me/right; without data its values on the picture",
        published_as="me/right",
        data=data,
    )
    refused(DataError, 'has no protocol "square". It has own', known=protocol(1), data=data, protocol="square")
    refused(DataError, "a protocol and ReaL's labels are for measuring accuracy", known=protocol(1), real=tmp_path,
            published_as="me/right")  # fmt: skip
    (tmp_path / "a.png").write_bytes(b"no picture")
    refused(DataError, "the picture cannot be read: .*a.png", published_as="me/right", picture=tmp_path / "a.png")
    refused(ModelError, "no model", name="no/such/model", published_as="me/right", picture=base / "reference.png")
    assert isinstance(noisy_checkpoint.model, ViT)
    body = ViT(replace(noisy_checkpoint.model.config, num_classes=0))
    checkpoints.write(tmp_path / "body", body, noisy_checkpoint.preprocess, None)
    refused(NoHead, "has no classification head, so it has no accuracy", name=str(tmp_path / "body"), data=data,
            known=protocol(1))  # fmt: skip


def test_a_picture_of_no_use_is_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = open_samples(str(base / "data"))
    verify(str(base / "right"), picture=base / "reference.png", data=data, known=protocol(1))
    assert "on the picture, so it is of no use here" in caplog.text


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def complete(record: Mapping[str, Any]) -> None:
    """A certificate says all that is needed to repeat it."""
    assert set(record) == KEYS
    assert len(record["sha256"]) == 64 and len(record["preprocess_hash"]) == 16
    environment = record["environment"]
    assert {"python", "system", "cpu", "threads", "device", "dtype", "engine", "versions"} <= set(environment)
    assert {"torch", "numpy", "pillow"} <= set(environment["versions"])
    assert (environment["dtype"], environment["engine"]) == ("fp32", "torch")
    assert record["time"].endswith("+00:00")
    for check in record["checks"]:
        assert set(check) == {"name", "published", "found", "difference", "tolerance", "verdict", "note"}


def test_a_hub_model_that_is_not_what_it_is_called(base: Path, tmp_path: Path) -> None:
    """Random weights under the name of the card's base model: resolved through a hub, and found out."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(32, 32), patch_size=16, embed_dim=24, num_layers=1, num_heads=2, mlp_dim=40, norm_eps=1e-12
    )
    model = ViT(config).eval()
    checkpoints.write_hf(tmp_path / "m", model, PreprocessConfig(size=(32, 32)), Labels.imagenet_1k())
    code = "from opsin.cli.verify import verify; verify(prog_name='opsin verify')"
    name = "google/vit-base-patch16-224"
    with HubServer() as hub:
        commit = hub.add(name, tmp_path / "m")
        hub.web[module.expected()["picture"]["url"]] = (base / "reference.png").read_bytes()
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_"))}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "DO_NOT_TRACK": "1"}
        env |= {"http_proxy": hub.endpoint, "no_proxy": "127.0.0.1,localhost"}
        out = tmp_path / "certificate.json"
        done = subprocess.run(
            [sys.executable, "-c", code, name, "--out", str(out)], env=env, capture_output=True, text=True
        )
    assert done.returncode == 3, done.stderr
    record = json.loads(done.stdout)
    complete(record)
    assert record == json.loads(out.read_text())
    assert (record["revision"], record["format"], record["verdict"]) == (commit, "transformers", "no verdict")
    assert record["picture"]["source"] == module.expected()["picture"]["url"]  # fetched, and another
    assert {check["note"] for check in record["checks"]} == {module.OTHER_ENCODING}
    weights = (tmp_path / "m" / "model.safetensors").read_bytes()
    assert record["sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.shared
def test_another_model_under_a_name_fails_on_the_reference(base: Path, shared: Path, tmp_path: Path) -> None:
    picture = shared / "coco_000000039769.png"
    result = run(base / "right", "--as", "google/vit-base-patch16-224", "--picture", picture)
    assert result.exit_code == 3
    record = json.loads(result.stdout)
    complete(record)
    assert record["picture"]["is_reference"] and record["verdict"] == "failed"
    assert [check["verdict"] for check in record["checks"]] == ["failed", "failed"]


def test_data_of_another_set(base: Path, tmp_path: Path) -> None:
    """The catalogue's own protocol of an embedded model, on images that are not its data."""
    folder = tmp_path / "data" / "espresso"
    folder.mkdir(parents=True)
    picture(1).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = run("opsin/vit-tiny", "--data", tmp_path / "data", "--out", tmp_path / "c.json")
    assert result.exit_code == 3
    assert "b.png" in result.stderr and "1 images could not be read" in result.stderr
    record = json.loads(result.stdout)
    complete(record)
    assert record["protocol"]["name"] == "held-out" and record["data"]["images"] == 1
    assert "not the held-out images of Tiny-ImageNet (5,000 images of 200 classes)" in record["checks"][0]["note"]
    assert json.loads((tmp_path / "c.json").read_text()) == record


def test_usage(base: Path, tmp_path: Path) -> None:
    for arguments, code, message in (
        ((base / "right",), 2, "nothing was published of"),
        (("opsin/vit-tiny",), 2, "only accuracy was published: 41.1 %"),
        (("opsin/vit-tiny", "--data", tmp_path / "gone"), 2, "there is no"),
        (("opsin/vit-tiny", "--data", base / "data"), 2, "class 0"),
        (("opsin/vit-tiny", "--data", base / "data", "--device", "quantum"), 2, 'device "quantum" cannot be used'),
        (
            (tmp_path / "gone", "--as", "google/vit-base-patch16-224", "--picture", base / "reference.png"),
            4,
            "no model",
        ),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.stderr
        assert message in " ".join(result.stderr.split()), result.stderr


def test_what_a_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    best = [{"label": "Egyptian cat", "score": 0.93744}, {"label": "tabby, tabby cat", "score": 0.03844}]
    checks = (
        Check(
            name="first logits", published=(Published([-0.2744, 0.8215], "a test"),), found=[-0.27441, 0.82149],
            difference=1e-5, tolerance=1e-4, verdict="passed",
        ),
        Check(
            name="best labels", published=(Published(best, "a tutorial"),), found=None, difference=None,
            tolerance=0.01, verdict="no verdict", note="not fetched\x1b",
        ),
        Check(
            name="top-1", published=(Published(81.31, "an issue"), Published(81.2, "a README")), found=80.123,
            difference=1.077, tolerance=0.1, verdict="failed", note="all",
        ),
    )  # fmt: skip
    facts = {
        "model": "me/m", "revision": "abc", "sha256": "0123", "protocol": {"name": "squash"},
        "data": {"images": 50_000, "digest": "f" * 64},
    }  # fmt: skip
    show_certificate(Certificate(facts=facts, checks=checks))
    assert capsys.readouterr().out.splitlines() == [
        "me/m, revision abc, sha256 0123",
        "squash on 50,000 images, digest ffffffffffffffff",
        "first logits         passed  off by 1e-05, allowed 0.0001",
        "  published  -0.2744 0.8215  (a test)",
        "  found      -0.2744 0.8215",
        "best labels          no verdict  off by –, allowed 0.01",
        "  published  Egyptian cat 0.9374, tabby 0.0384  (a tutorial)",
        "  found      –",
        "  not fetched\\x1b",
        "top-1                failed  off by 1.08 points, allowed 0.10",
        "  published  81.31 %  (an issue)",
        "  published  81.2 %  (a README)",
        "  found      80.123 %",
        "  all",
        "failed",
    ]
