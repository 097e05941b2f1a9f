"""`opsin compare`: its figures against direct ones, its files, and what it refuses."""

import copy
import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from opsin import checkpoints
from opsin import compare as module
from opsin.checkpoints import Checkpoint
from opsin.cli.verify import compare as command
from opsin.cli.verify import show_comparison
from opsin.compare import Comparison, Contender, Disagreement, compare, parse, report
from opsin.errors import DataError, NoHead
from opsin.labels import Labels
from opsin.models.vit import ViT
from opsin.pipeline import Classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures, and one that is none."""
    path = tmp_path_factory.mktemp("photos")
    for i in range(23):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((47, 41), Image.Resampling.BICUBIC).save(path / f"{i:02}.png")
    (path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return path


def centred(checkpoint: Checkpoint, folder: Path, noise: float) -> Checkpoint:
    """With other weights, and every class the best of some pictures: their mean logits are zero."""
    torch.manual_seed(1)
    model = copy.deepcopy(checkpoint.model)
    assert isinstance(model, ViT) and model.head is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        checkpoint = replace(checkpoint, model=model)
        model.head.bias.sub_(Classifier(checkpoint, dtype="fp32").logits(pictures(folder)[:-1]).mean(0))
    return checkpoint


@pytest.fixture(scope="module")
def one_checkpoint(noisy_checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    return centred(noisy_checkpoint, folder, 0)


@pytest.fixture(scope="module")
def other_checkpoint(noisy_checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    return centred(noisy_checkpoint, folder, 0.03)


@pytest.fixture(scope="module")
def one(one_checkpoint: Checkpoint) -> Classifier:
    return Classifier(one_checkpoint, dtype="fp32")


@pytest.fixture(scope="module")
def other(other_checkpoint: Checkpoint) -> Classifier:
    return Classifier(other_checkpoint, dtype="fp32")


def pictures(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.png"))


def relabelled(checkpoint: Checkpoint, names: Sequence[str], *, multi_label: bool = False) -> Classifier:
    return Classifier(replace(checkpoint, labels=Labels(tuple(names), multi_label=multi_label)), dtype="fp32")


def softmax(logits: torch.Tensor) -> np.ndarray:
    return torch.softmax(logits.double(), 1).numpy()


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("opsin/vit-tiny", Contender("opsin/vit-tiny", "auto", "auto")),
        ("opsin/vit-tiny@fp32", Contender("opsin/vit-tiny", "auto", "fp32")),
        ("m/@openvino:bf16", Contender("m/", "openvino", "bf16")),
        ("a@b/c@torch:int8", Contender("a@b/c", "torch", "int8")),
        ("/home/me@work/model", Contender("/home/me@work/model")),
    ],
)
def test_names(text: str, expected: Contender) -> None:
    assert parse(text) == expected


def test_a_path_with_an_at_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m@fp32").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse("m@fp32") == Contender("m@fp32")
    assert parse("m@fp32@bf16") == Contender("m@fp32", "auto", "bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m@fp23", '"m@fp23" ends in "@fp23". Did you mean "m@fp32"? Right is NAME, NAME@DTYPE or NAME@ENGINE:DTYPE'),
        ("m@openvno:bf16", 'Did you mean "m@openvino:bf16"?'),
        ("m@", 'ends in "@". Right is NAME'),
        ("@fp32", 'ends in "@fp32". '),
    ],
)
def test_unknown_suffixes(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [512, 5])
def test_figures_are_the_direct_ones(
    one: Classifier, other: Classifier, folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    paths = pictures(folder)
    seen: list[tuple[int, int]] = []
    found = compare(
        one, other, [*paths, paths[3]], batch_size=3, on_images=lambda done, total: seen.append((done, total))
    )
    good = [path for path in paths if "broken" not in path]
    x, y = one.logits(good), other.logits(good)
    p, q = softmax(x), softmax(y)
    drift = (x.double() - y.double()).abs().numpy()
    same = x.argmax(1) == y.argmax(1)
    assert (found.images, found.same, found.common_classes) == (23, int(same.sum()), 7)
    assert 0 < found.same < 23
    assert found.logit_drift_max == pytest.approx(drift.max())
    assert found.logit_drift_mean == pytest.approx(drift.mean())
    assert found.prob_drift_max == pytest.approx(np.abs(p - q).max(), rel=1e-5)
    assert found.prob_drift_mean == pytest.approx(np.abs(p - q).mean(), rel=1e-5)
    assert found.kl_mean == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-4)
    assert [bad.key for bad in found.errors] == [paths[-1]]
    assert seen[-1] == (24, 24)
    expected = []
    for row in np.flatnonzero(~same):
        i, j = p[row].argmax(), q[row].argmax()
        gap = (p[row, i] - p[row, j] + q[row, j] - q[row, i]) / 2
        expected.append((good[row], f"class {i}", p[row, i], f"class {j}", q[row, j], gap))
    expected.sort(key=lambda values: -values[-1])
    assert [each.path for each in found.disagreements] == [values[0] for values in expected]
    for each, values in zip(found.disagreements, expected, strict=True):
        assert (each.a_label, each.b_label) == (values[1], values[3])
        assert (each.a_score, each.b_score, each.gap) == pytest.approx((values[2], values[4], values[5]), abs=1e-6)


def test_a_model_agrees_with_itself_under_shuffled_classes(
    one: Classifier, one_checkpoint: Checkpoint, folder: Path
) -> None:
    order = [3, 0, 6, 1, 5, 2, 4]
    model = copy.deepcopy(one_checkpoint.model)
    assert isinstance(model, ViT) and model.head is not None
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight[order].clone())
        model.head.bias.copy_(model.head.bias[order].clone())
    shuffled = relabelled(replace(one_checkpoint, model=model), [f"class {i}" for i in order])
    found = compare(one, shuffled, pictures(folder)[:9])
    assert (found.same, found.images, found.disagreements) == (9, 9, ())
    assert found.prob_drift_max == pytest.approx(0, abs=1e-6)


def test_an_overlap_of_classes(one: Classifier, one_checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """The same model under other names: it differs wherever its answer is one of the renamed classes."""
    renamed = relabelled(one_checkpoint, ["class 0", "cat", "class 2", "dog", "class 4", "cow", "class 6"])
    found = compare(one, renamed, pictures(folder))
    best = one.logits(pictures(folder)[:-1]).argmax(1) % 2
    assert found.common_classes == 4
    assert len(found.disagreements) == int(best.sum()) == found.images - found.same > 0
    assert found.kl_mean is found.logit_drift_max is found.prob_drift_mean is None
    for each in found.disagreements:
        assert each.b_label in ("cat", "dog", "cow")
        assert each.gap == each.a_score == each.b_score  # neither has the other's answer at all
    files = report(tmp_path, found, {"a": "A", "b": "B"})
    assert json.loads(files[0].read_text())["kl_mean"] is None


def test_gaps() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.6, 0.3])
    assert module._scores(p, q, [0, 1, 2], False) == pytest.approx({"a_score": 0.7, "b_score": 0.6, "gap": 0.5})
    assert module._scores(p, q, [2, None, 1], False) == pytest.approx(  # b's best is a's third
        {"a_score": 0.7, "b_score": 0.6, "gap": (0.7 - 0.1 + 0.6 - 0.3) / 2}
    )
    p, q = np.array([0.9, 0.2]), np.array([0.7, 0.8])  # a says the first, b both: its own order is the other way
    assert module._scores(p, q, [1, 0], True) == pytest.approx(
        {"a_score": 0.9 * 0.8, "b_score": 0.8 * 0.7, "gap": (0.72 - 0.18 + 0.56 - 0.24) / 2}
    )


def test_several_classes_an_image(one_checkpoint: Checkpoint, other_checkpoint: Checkpoint, folder: Path) -> None:
    names = [f"class {i}" for i in range(7)]
    a, b = (relabelled(each, names, multi_label=True) for each in (one_checkpoint, other_checkpoint))
    good = pictures(folder)[:-1]
    found = compare(a, b, good)
    x, y = a.logits(good) > 0, b.logits(good) > 0
    assert found.same == int((x == y).all(1).sum()) < 23
    each = found.disagreements[0]
    row = good.index(each.path)
    assert each.a_label == ("; ".join(names[i] for i in np.flatnonzero(x[row].numpy())) or "none")
    probs = torch.sigmoid(a.logits(good[row]).double())[0]
    assert each.a_score == pytest.approx(float(torch.maximum(probs, 1 - probs).prod()), rel=1e-4)


def test_what_cannot_be_compared(one: Classifier, other: Classifier, one_checkpoint: Checkpoint, folder: Path) -> None:
    paths = pictures(folder)
    foreign = relabelled(one_checkpoint, ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"])
    with pytest.raises(DataError, match=r"\(7 classes, such as class 0\) and .* such as ant\) have no class in common"):
        compare(one, foreign, paths)
    several = relabelled(one_checkpoint, [f"class {i}" for i in range(7)], multi_label=True)
    with pytest.raises(ValueError, match="one model gives one class an image, the other several"):
        compare(one, several, paths)
    with pytest.raises(ValueError, match="multi-label models can be compared only if they have the same classes"):
        compare(several, relabelled(one_checkpoint, [*"abcdef", "class 6"], multi_label=True), paths)
    assert isinstance(one_checkpoint.model, ViT)
    body = replace(one_checkpoint, model=ViT(replace(one_checkpoint.model.config, num_classes=0)), labels=None)
    with pytest.raises(NoHead, match="test/noise has no classification head, so it has no answers to compare"):
        compare(one, Classifier(body, dtype="fp32"), paths)
    with pytest.raises(DataError, match="there are no photos to compare the models on"):
        compare(one, other, [])
    with pytest.raises(DataError, match="none of the 1 photos has an answer of both models; the first: .*broken.png"):
        compare(one, other, paths[-1:])


# ── files and the command ────────────────────────────────────────────────────────────────────────────────────────────


def differing(path: str, gap: float = 0.5) -> Disagreement:
    return Disagreement(path=path, a_label="cat", a_score=0.75, b_label="dog, hound", b_score=0.5, gap=gap)


FOUND = Comparison(
    images=9,
    same=6,
    common_classes=7,
    logit_drift_max=0.25,
    logit_drift_mean=0.03125,
    prob_drift_max=0.5,
    prob_drift_mean=0.125,
    kl_mean=0.0625,
    disagreements=(differing("red.png"), differing("blue\udcff.png"), differing("lime.png")),
    errors=(module.Bad("gone.png", "not_found", "gone.png: no such file."),),
)


def paint(path: str) -> Image.Image:
    return Image.new("RGB", (300, 200), path.split(".")[0].split("\udcff")[0])


def test_report(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report"
    files = report(out, FOUND, {"a": "one", "b": "two"}, limit=2, load=paint)
    assert files == [out / "compare.json", out / "disagreements.csv", out / "disagreements.png"]
    data = json.loads(files[0].read_text())
    assert list(data)[:2] == ["a", "b"]
    assert (data["different"], data["equal"], len(data["disagreements"])) == (3, pytest.approx(6 / 9), 2)
    assert data["disagreements"][1]["path"] == "blue\udcff.png"
    assert data["errors"] == [{"path": "gone.png", "type": "not_found", "message": "gone.png: no such file."}]
    with files[1].open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["red.png", "blue\udcff.png", "lime.png"]
    assert rows[0] == {"path": "red.png", "a_label": "cat", "a_score": "0.75", "b_label": "dog, hound",
                       "b_score": "0.5", "gap": "0.5"}  # fmt: skip
    with Image.open(files[2]) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    area = 180 * 120
    for colour, tiles in (((255, 0, 0), 1), ((0, 0, 255), 1), ((0, 255, 0), 0)):  # two of three
        assert round((np.abs(pixels - colour).sum(2) == 0).sum() / area) == tiles
    agreed = replace(FOUND, disagreements=(), same=9)
    assert report(out, agreed, {"a": "one", "b": "two"}) == files[:2]
    assert not files[2].exists()


def run(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(command, [str(each) for each in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def models(
    one_checkpoint: Checkpoint, other_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("models")
    for name, each in (("one@home", one_checkpoint), ("two", other_checkpoint)):
        checkpoints.write(base / name, each.model, each.preprocess, each.labels)
    return base / "one@home", base / "two"


def test_the_command(
    models: tuple[Path, Path], one: Classifier, other: Classifier, folder: Path, tmp_path: Path
) -> None:
    a, b = models
    result = run(f"{a}@fp32", f"{b}@torch:fp32", folder, "--out", tmp_path / "out", "--limit", 2)
    assert result.exit_code == 3
    assert f"{folder}/broken.png: " in result.stderr
    assert "1 of 24 photos have no answer of both models" in result.stderr
    record = json.loads(result.stdout)
    expected = compare(one, other, pictures(folder)).to_dict(2)
    assert record["a"] == f"{a} (torch, fp32)" and len(record["b_sha256"]) == 64
    assert {key: record[key] for key in expected} == json.loads(json.dumps(expected))
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == record
    assert len((tmp_path / "out" / "disagreements.csv").read_text().splitlines()) == record["different"] + 1
    assert (tmp_path / "out" / "disagreements.png").is_file()


def test_paths_on_standard_input(models: tuple[Path, Path], folder: Path) -> None:
    lines = "\n".join(pictures(folder)[:5])
    result = run(*models, "-", stdin=lines)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["images"] == 5


def test_refusals(models: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    a, b = models
    for arguments, code, message in (
        ((f"{a}@fp23", b, folder), 2, f'Did you mean "{a}@fp32"?'),
        ((a, f"{b}@fp8", folder), 2, "Invalid value for B: "),
        ((a, b, "-", folder), 2, "give it alone"),
        ((a, b, tmp_path), 2, "there are no photos to compare the models on"),
        ((a, b, folder / "broken.png"), 2, "none of the 1 photos has an answer of both models"),
        ((a, tmp_path / "gone", folder), 4, "no model "),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.stderr
        assert message in " ".join(result.stderr.split()), result.stderr


def test_what_a_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    facts: dict[str, Any] = {"a": "one (torch, fp32)", "b": "two\x1b (torch, bf16)"}
    show_comparison(FOUND, facts, 2)
    assert capsys.readouterr().out.splitlines() == [
        "A  one (torch, fp32)",
        "B  two\\x1b (torch, bf16)",
        "photos                   9, of 7 common classes",
        "same answer              6 (66.67%)",
        "drift of logits          0.031 mean, 0.25 at most",
        "drift of probabilities   0.12 mean, 0.5 at most",
        "KL divergence            0.062 nats",
        "red.png",
        "  A  75.0%  cat",
        "  B  50.0%  dog, hound",
        "blue\\udcff.png",
        "  A  75.0%  cat",
        "  B  50.0%  dog, hound",
        "and 1 more: --limit, or --out DIR for all of them",
    ]
