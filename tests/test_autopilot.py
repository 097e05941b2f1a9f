"""A budget is kept, a choice is remembered for what it was made for, and a folder in int8 is written whole."""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import opsin
from opsin import autopilot, checkpoints, engine
from opsin.autopilot import Choice, choose, optimise, recall, remember
from opsin.checkpoints import Checkpoint
from opsin.cli import main
from opsin.device import has_int8
from opsin.errors import DataError, MissingExtra, ModelError, NoHead
from opsin.pipeline import Classifier

int8_only = pytest.mark.skipif(not has_int8(), reason="this CPU does not multiply int8: NOT checked is int8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autopilot, "ROUNDS", 1)
    return tmp_path / "cache"


@pytest.fixture
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(40)]


@pytest.fixture
def folder(noisy_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    checkpoints.write(tmp_path / "m", noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    return tmp_path / "m"


class Fake:
    """Logits of the model, wrong for the first `wrong` images of each batch of the probe."""

    def __init__(self, model: torch.nn.Module, wrong: int) -> None:
        self.model, self.wrong = model, wrong

    def __call__(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixels)
        logits[: self.wrong] = -logits[: self.wrong]
        return logits


@pytest.mark.parametrize(("wrong", "budget", "kept"), [(0, 0.0, "bf16"), (1, 0.05, "fp32"), (1, 0.15, "bf16")])
def test_the_fastest_within_the_budget(
    wrong: int,
    budget: float,
    kept: str,
    classifier: Classifier,
    images: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """30 images in batches of 8: one wrong in each batch is 4 of 30."""
    nets = {"fp32": Fake(classifier.model, 0), "bf16": Fake(classifier.model, wrong)}
    monkeypatch.setattr(autopilot, "_ways", lambda _: [("torch", "fp32"), ("torch", "bf16")])
    monkeypatch.setattr(engine, "pack", lambda _, precision="fp32", ranges=None: nets[precision])
    fast = {"plain": 3.0, 0: 2.0, 1: 1.0}
    monkeypatch.setattr(autopilot, "interleaved", lambda calls, rounds: {key: [fast[key]] for key in calls})
    steps: list[tuple[int, int]] = []
    choice = choose(classifier, images, budget, progress=lambda done, total: steps.append((done, total)))
    assert (choice.dtype, choice.images, steps) == (kept, 30, [(0, 2), (1, 2)])
    assert choice.speedup == {"bf16": 3.0, "fp32": 1.5}[kept]
    assert choice.agreed == (30 if kept == "fp32" else 30 - 4 * wrong)
    row = choice.tried[1]
    assert row.agreed == 30 - 4 * wrong
    assert bool(row.reason) == (kept == "fp32") and row.reason in ("", "disagrees on 4; the budget is 1")
    with pytest.raises(
        ModelError, match=r"nothing tried is within the budget of 1 of 30 images: torch bf16 disagrees on 30"
    ):
        nets["bf16"].wrong = 99
        choose(classifier, images, 0.05, dtype="bf16")


def test_a_candidate_that_fails_is_a_row(
    classifier: Classifier, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(autopilot, "_ways", lambda _: [("openvino", "fp32"), ("torch", "fp32")])
    monkeypatch.setattr(autopilot, "_openvino", broken)
    choice = choose(classifier, images, 0.0)
    assert (choice.engine, choice.tried[0].reason) == ("torch", "failed: no such operator")


def test_images_that_cannot_be_read_are_left_out(classifier: Classifier, images: list[Any], tmp_path: Path) -> None:
    bad = [tmp_path / f"none{i}.jpg" for i in range(12)]
    assert choose(classifier, [*images, *bad], 0.0, engine="torch", dtype="fp32").images == 30
    with pytest.raises(DataError, match="4 of 16 images can be read; a choice needs 16 at least"):
        choose(classifier, [*images[:4], *bad], 0.0)
    with pytest.raises(ModelError, match='nothing of engine "torch" and dtype "fp8" can run on this machine'):
        choose(classifier, images, 0.0, engine="torch", dtype="fp8")


def test_without_labels_there_is_no_choice(noisy_checkpoint: Checkpoint, images: list[Image.Image]) -> None:
    model: Any = noisy_checkpoint.model
    body = type(model)(dataclasses.replace(model.config, num_classes=0))
    with pytest.raises(NoHead, match="no labels to agree on"):
        choose(Classifier(dataclasses.replace(noisy_checkpoint, model=body, labels=None)), images, 0.0)


@int8_only
def test_int8_leaves_out_until_it_agrees(
    classifier: Classifier, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, four halves: the net with one half in int8 fewer agrees."""
    tries: list[int] = []
    real = engine.pack

    def pack(model: torch.nn.Module, precision: Any = "fp32", ranges: Any = None) -> Any:
        if precision != "int8":
            return real(model, precision)
        tries.append(sum(len(sites) for sites in ranges.values()))
        return Fake(model, 0 if len(tries) == 2 else 99)

    monkeypatch.setattr(engine, "pack", pack)
    choice = choose(classifier, images, 0.0, engine="torch", dtype="int8")
    assert tries == [8, 6]
    assert (choice.tried[0].left_out, choice.agreed) == (1, 30)
    assert choice.ranges is not None and sum(len(sites) for sites in choice.ranges.values()) == 6


def test_a_choice_is_remembered_for_what_it_was_made_for(
    folder: Path, images: list[Image.Image], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = opsin.load(folder, dtype="fp32")
    assert recall(classifier, 0.5) is None
    choice = choose(classifier, images, 0.5, engine="torch", dtype="int8" if has_int8() else "fp32")
    remember(classifier, choice)
    again = recall(opsin.load(folder, dtype="fp32"), 0.5)
    assert again is not None
    same = {f.name for f in dataclasses.fields(Choice)} - {"ranges"}
    assert all(getattr(again, name) == getattr(choice, name) for name in same)
    again.apply(classifier)
    choice.apply(other := opsin.load(folder, dtype="fp32"))
    assert classifier.dtype == other.dtype == choice.dtype
    torch.testing.assert_close(classifier.logits(images[0]), other.logits(images[0]), rtol=0, atol=1e-4)

    assert recall(classifier, 0.4) is None and recall(classifier, 0.5, "torch") is None
    monkeypatch.setattr(autopilot, "has_bf16", lambda: "other")
    assert recall(classifier, 0.5) is None
    monkeypatch.undo()
    monkeypatch.setenv("OPSIN_CACHE", str(cache))
    [kept] = (cache / "choices").iterdir()
    (kept / "choice.json").write_text((kept / "choice.json").read_text()[:-30])
    assert recall(classifier, 0.5) is None
    remember(classifier, choice)  # over the damaged one
    assert recall(classifier, 0.5) is not None
    assert [path.name for path in (cache / "choices").iterdir()] == [kept.name]


def test_openvino_in_int8_needs_no_images_again(
    folder: Path, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice carries those that calibrated it."""
    classifier = opsin.load(folder, dtype="fp32")
    monkeypatch.setattr(autopilot, "_ways", lambda _: [("openvino", "int8")])
    monkeypatch.setattr(autopilot, "_openvino", lambda clf, precision, pixels: Fake(clf.model, 0))
    remember(classifier, choose(classifier, images, 0.0))
    used: dict[str, Any] = {}
    monkeypatch.setattr(Classifier, "use", lambda self, dtype, **rest: used.update(rest, dtype=dtype))
    again = recall(classifier, 0.0)
    assert again is not None
    again.apply(classifier)
    expected = classifier.preprocess.normalise_batch([classifier.preprocess.load(image)[0] for image in images[::4]])
    assert torch.equal(torch.cat(used["calibration"]), expected)
    assert (used["engine"], used["dtype"]) == ("openvino", "int8")


@int8_only
def test_an_optimised_folder(folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    classifier = opsin.load(folder, dtype="fp32")
    out = tmp_path / "int8"
    choice = optimise(classifier, images, 0.2, out)
    loaded = opsin.load(out)
    assert loaded.dtype == "int8" and choice.ranges is not None
    near = engine.pack(classifier.model, "int8", choice.ranges)
    with torch.inference_mode():
        expected = near(classifier.preprocess(images[0])[None])
    torch.testing.assert_close(loaded.logits(images[0]), expected, rtol=0, atol=0.02 * float(expected.std()))
    state = opsin.load(out, dtype="fp32").model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.model.state_dict().items())
    with pytest.raises(DataError, match="is there already, and not empty"):
        optimise(classifier, images, 0.2, out)


@int8_only
def test_nothing_is_written_beyond_the_budget(
    folder: Path, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.pack
    wrong = lambda model, precision="fp32", ranges=None: Fake(model, 99) if precision == "int8" else real(model)  # noqa: E731
    monkeypatch.setattr(engine, "pack", wrong)
    with pytest.raises(ModelError, match="torch int8 disagrees on 30; the budget is 0"):
        optimise(opsin.load(folder), images, 0.0, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


@int8_only
def test_a_memory_without_a_part_is_none(folder: Path, images: list[Image.Image], cache: Path) -> None:
    classifier = opsin.load(folder, dtype="fp32")
    kept = remember(classifier, choose(classifier, images, 0.2, engine="torch", dtype="int8"))
    text = (kept / "choice.json").read_text()
    for good, bad in (('"batch_size": ', '"batch_size": -'), ('"dtype": "int8"', '"dtype": "int7"')):
        (kept / "choice.json").write_text(text.replace(good, bad, 1))
        assert recall(classifier, 0.2) is None
    (kept / "choice.json").write_text(text)
    assert recall(classifier, 0.2) is not None
    (kept / "int8.safetensors").unlink()
    assert recall(classifier, 0.2) is None


def test_models_that_came_from_no_file_are_told_apart(
    noisy_checkpoint: Checkpoint, images: list[Image.Image], cache: Path
) -> None:
    """So are the same weights in another shape, and another decode."""
    classifier = Classifier(noisy_checkpoint, dtype="fp32")
    remember(classifier, choose(classifier, images, 0.2, engine="torch", dtype="fp32"))
    assert recall(classifier, 0.2) is not None
    model: Any = copy.deepcopy(noisy_checkpoint.model)
    model.config = dataclasses.replace(model.config, norm_eps=1e-3)
    assert recall(Classifier(dataclasses.replace(noisy_checkpoint, model=model), dtype="fp32"), 0.2) is None
    model.config = classifier.model.config
    with torch.no_grad():
        model.head.bias[3] += 1
    assert recall(Classifier(dataclasses.replace(noisy_checkpoint, model=model), dtype="fp32"), 0.2) is None
    classifier.decode, before = "fast", classifier.decode
    assert (before, recall(classifier, 0.2)) == ("exact", None)


def test_what_the_fast_decode_changes_counts(
    noisy_checkpoint: Checkpoint, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 itself disagrees with fp32 on exact pixels; here the fast ones are nearly black."""
    classifier = Classifier(noisy_checkpoint, dtype="fp32", decode="fast")
    real = type(classifier.preprocess).load

    def load(self: Any, image: Any, *, decode: str = "exact", **rest: Any) -> Any:
        pixels, size = real(self, image, **rest)
        return (pixels // 8 if decode == "fast" else pixels), size

    monkeypatch.setattr(type(classifier.preprocess), "load", load)
    with pytest.raises(ModelError, match=r'torch fp32 disagrees on \d+; .* Or decode "exact": the fast one changes'):
        choose(classifier, images, 0.0, engine="torch", dtype="fp32")
    classifier.decode = "exact"
    assert choose(classifier, images, 0.0, engine="torch", dtype="fp32").agreed == 30


def test_without_onednn_there_is_the_plain_model(
    noisy_checkpoint: Checkpoint, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "can_pack", lambda: False)
    monkeypatch.setattr(engine, "pack", lambda *_: pytest.fail("this torch cannot pack"))
    classifier = Classifier(noisy_checkpoint, dtype="fp32")
    choice = choose(classifier, images, 0.0, engine="torch")
    assert (choice.dtype, len(choice.tried)) == ("fp32", 1)
    choice.apply(classifier)
    assert classifier.engine == "torch"


def test_an_engine_that_is_not_installed_is_named(
    classifier: Classifier, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autopilot, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'openvino is not installed\. .*"opsin\[openvino\]"'):
        choose(classifier, images, 0.0, engine="openvino")
    monkeypatch.setattr(autopilot, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(MissingExtra, match="nncf is not installed"):
        choose(classifier, images, 0.0, engine="openvino", dtype="int8")


def test_a_cache_that_cannot_be_written_stops_nobody(
    folder: Path, images: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "file"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(images[:20]):
        image.save(photos / f"{i}.png")
    arguments = ["classify", str(photos), "--model", str(folder), "--budget", "1%", "--engine", "torch"]
    result = CliRunner().invoke(main, [*arguments, "--dtype", "fp32", "--out", str(tmp_path / "r.jsonl")])
    assert result.exit_code == 0, result.stderr
    assert "not remembered: " in result.stderr and "cannot be told from none" in result.stderr
    run_data = json.loads((tmp_path / "r.jsonl.run.json").read_text())
    assert (run_data["budget"], run_data["agreed"], run_data["agreed_of"]) == (0.01, 15, 15)
    result = CliRunner().invoke(main, ["classify", "-", "--model", str(folder), "--budget", "1%"], input="a.jpg\n")
    assert result.exit_code == 2 and "run it once on a folder" in result.stderr


def run(*arguments: str) -> tuple[int, str, str]:
    import subprocess

    done = subprocess.run([sys.executable, "-m", "opsin", *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_commands(folder: Path, images: list[Image.Image], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(images):
        image.resize((400, 300)).save(photos / f"{i}.jpg")
    arguments = ("classify", str(photos), "--model", str(folder), "--budget", "20%", "--engine", "torch")
    code, out, err = run(*arguments, "--decode", "fast", "--out", str(tmp_path / "r.jsonl"))
    assert code == 0, err
    assert "chose" in err and "of 30 images (budget 20.00%)" in err
    assert "--decode fast: on 16 images bytes differ by" in err
    sidecar = json.loads((tmp_path / "r.jsonl.run.json").read_text())
    assert sidecar["engine"] == "torch" and sidecar["decode"] == "fast"
    code, out, err = run(*arguments)
    assert code == 0 and "remembered" in err and len(out.splitlines()) == 40

    assert run("classify", str(photos), "--budget", "30%")[0] == 2
    code, _, err = run("classify", str(photos / "0.jpg"), "--model", str(folder), "--budget", "1%")
    assert code == 2 and "1 of 1 images can be read; a choice needs 16" in err
    code, _, err = run("classify", str(photos), "--model", str(folder), "--dtype", "fp8", "--device", "cpu")
    assert code == 2 and 'dtype "fp8" is for CUDA' in err
    code, _, err = run("classify", str(photos), "--model", str(folder), "--dtype", "int8")
    assert code == 4 and "has no ranges for int8. `opsin optimize` makes a folder" in err
    if has_int8():
        target = str(tmp_path / "int8")
        code, out, err = run(
            "optimize", "--model", str(folder), "--calibrate", str(photos), "--out", target, "--budget", "20%"
        )
        assert code == 0, err
        assert json.loads(out)["images"] == 30 and opsin.load(target).dtype == "int8"
