"""`opsin train`: what a run's folder holds, that it is a model, and what is said when something is wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForImageClassification

import opsin
from opsin import checkpoints
from opsin.checkpoints import Checkpoint, Source
from opsin.cli import main
from opsin.errors import TrainError
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.preprocess import PreprocessConfig
from opsin.recipes import recipe
from opsin.train.config import Phase, TrainConfig
from opsin.train.run import _fitted, build
from train.conftest import NAMES

FILES = {
    "config.json", "model.safetensors", "last", "train.json", "data.json", "environment.json", "held_out.txt",
    "metrics.jsonl", "curves.png", "evaluation.json", "evaluation.md", "confusion.png", "reliability.png",
    "errors.jsonl", "tensorboard",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def vit(tmp_path: Path) -> str:
    """A folder that transformers wrote the like of: 16 pixels, random weights, two of the photos' classes."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 16), patch_size=4, embed_dim=24, num_layers=2, num_heads=2, mlp_dim=40, num_classes=4
    )
    model = ViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    labels = Labels(("coral", "dune", "elm", "amber"))
    checkpoints.write_hf(tmp_path / "vit", model.eval(), PreprocessConfig(size=(16, 16)), labels)
    return str(tmp_path / "vit")


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def metrics(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["probe", "fewshot", "finetune", "lora"])
def test_a_run_is_a_model_that_classifies(method: str, photo_folder: Path, vit: str) -> None:
    steps = ["--steps", "12", "--batch-size", "8", "--workers", "0"] if method in ("finetune", "lora") else []
    result = run("train", photo_folder, "--method", method, "--model", vit, "--holdout", "0.2", "--lr", "0.01", *steps)
    said = json.loads(result.stdout)
    assert said["run"] == "runs/1"
    assert said["bad_images"] == 0
    found = {path.name for path in Path("runs/1").iterdir()}
    assert found >= FILES
    assert ("probe.json" in found) == (method == "probe")
    lines = metrics("runs/1")
    assert all({"step", "loss"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert len((Path("runs/1") / "held_out.txt").read_text().splitlines()) == 12

    clf = opsin.load("runs/1")
    assert clf.labels.names == NAMES
    assert clf(photo_folder / "blue" / "001.png")[0]["label"] == "blue"
    assert said["top1"] == 1
    theirs = AutoModelForImageClassification.from_pretrained("runs/1")
    pixels = clf.preprocess(photo_folder / "coral" / "002.png")[None]
    with torch.no_grad():
        assert torch.allclose(theirs(pixels).logits, clf.model(pixels), atol=1e-4)
    assert theirs.config.id2label[2] == "coral"
    assert opsin.load("runs/1/last").labels.names == NAMES

    run("train", photo_folder, "--model", vit)  # the next is runs/2
    assert Path("runs/2/config.json").exists()
    scores = json.loads(run("evaluate", photo_folder, "--model", "runs/1", "--against", "runs/2").stdout)
    assert scores["n"] == 60
    assert scores["agreement"]["images"] == 60


def test_rows_of_the_old_head_are_reused_by_name(photo_folder: Path, vit: str) -> None:
    common = (
        "--model",
        vit,
        "--steps",
        1,
        "--workers",
        0,
        "--set",
        "probe_head=false",
        "--lr",
        1e-12,
        "--batch-size",
        4,
    )
    result = run("train", photo_folder, "--method", "finetune", *common)
    assert "2 classes of the old head reused" in result.stderr
    old, new = opsin.load(vit).model.head, opsin.load("runs/1/last").model.head
    assert torch.allclose(new.weight[[0, 2]], old.weight[[3, 0]], atol=1e-6)  # amber, coral
    assert new.weight[1].abs().max() < 1e-6
    assert new.bias[1].abs() < 1e-6


def test_a_perceiver_is_probed_through_its_own_decoder_and_fine_tuned_with_a_new_one(photo_folder: Path) -> None:
    torch.manual_seed(0)
    config = ImagePerceiverConfig(
        image_size=(16, 16), max_resolution=(4, 4), num_bands=3, num_latents=5, latent_dim=16, num_blocks=2,
        layers_per_block=1, num_heads=2, num_classes=4, embed_dim=8,
    )  # fmt: skip
    model: Any = ImagePerceiver(config).eval()
    checkpoints.write(Path("perceiver"), model, PreprocessConfig(size=(16, 16)), Labels(("a", "b", "c", "d")))
    run("train", photo_folder, "--model", "perceiver")
    probed: Any = opsin.load("runs/1").model
    assert torch.equal(probed.decoder.positions.table, model.decoder.positions.table)
    assert probed.decoder.out.weight.shape == (3, 16)
    short = ("--method", "finetune", "--steps", 1, "--workers", 0, "--set", "probe_head=false", "--lr", 1e-12)
    run("train", photo_folder, "--model", "perceiver", *short, "--batch-size", 4)
    tuned: Any = opsin.load("runs/2").model
    assert not torch.allclose(tuned.decoder.positions.table, model.decoder.positions.table, atol=1e-3)
    assert torch.allclose(tuned.encoder.latents, model.encoder.latents, atol=1e-6)


VISUAL = VTConfig(
    image_size=(16, 16), width=4, small_stem=True, map_dim=6, token_dim=12, num_tokens=3, num_heads=3, num_groups=2,
    position_size=3, num_classes=4,
)  # fmt: skip


def test_a_vt_is_probed_and_fine_tuned_but_not_by_lora(photo_folder: Path) -> None:
    torch.manual_seed(0)
    checkpoints.write(Path("vt"), VT(VISUAL).eval(), PreprocessConfig(size=(16, 16)), Labels(("a", "b", "c", "d")))
    run("train", photo_folder, "--model", "vt")
    probed: Any = opsin.load("runs/1").model
    assert probed.config == replace(VISUAL, num_classes=3)
    assert float(probed.head.weight.detach().abs().max()) > 0
    short = ("--steps", 8, "--workers", 0, "--batch-size", 8)
    said = json.loads(run("train", photo_folder, "--model", "vt", "--method", "finetune", *short).stdout)
    assert said["run"] == "runs/2"
    tuned, before = opsin.load("runs/2/last").model, opsin.load("vt").model
    for name in (
        "stem.norm.running_mean",
        "layers.1.tokenizer.query.weight",
    ):  # statistics are written too
        assert not torch.equal(tuned.state_dict()[name], before.state_dict()[name])
    stderr = run("train", photo_folder, "--model", "vt", "--method", "lora", *short, code=1).stderr
    assert "LoRA is for matrices of attention; a VT is mostly convolutions. Use --method finetune." in stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout_rate": 0.1}, "a VT has no dropout and no stochastic depth: set both rates to 0."),
        ({"drop_path_rate": 0.1}, "a VT has no dropout and no stochastic depth"),
        ({"gradient_checkpointing": True}, "a VT is trained without gradient_checkpointing and keep_tokens"),
        ({"phases": (Phase(share=0.5, image_size=16, keep_tokens=2),)}, "its tokens are few already"),
    ],
)
def test_what_a_vt_cannot_be_trained_with(changes: dict[str, Any], message: str) -> None:
    config = TrainConfig(method="pretrain", model=VISUAL, steps=2, **changes)
    with pytest.raises(TrainError, match=message):
        build(config, Labels(NAMES))


def test_a_vt_begins_at_the_bias_that_is_asked_for() -> None:
    built = build(TrainConfig(method="pretrain", model=VISUAL, steps=2, head_bias=-3.0), Labels(NAMES))
    assert isinstance(built.model, VT)
    with torch.no_grad():
        assert torch.equal(built.model(torch.randn(2, 3, 16, 16)), torch.full((2, 3), -3.0))
    assert built.preprocess.image_size == (16, 16)


def test_another_image_size(photo_folder: Path, vit: str) -> None:
    run("train", photo_folder, "--model", vit, "--image-size", 24)
    assert opsin.load("runs/1").image_size == (24, 24)
    result = run("train", photo_folder, "--model", vit, "--image-size", 18, code=1)
    assert "patch_size (4) does not divide image_size (18). Nearest that fit: 16, 20." in result.stderr


def test_features_are_computed_once(photo_folder: Path, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", photo_folder, "--model", vit)
    first = (Path("runs/1") / "model.safetensors").read_bytes()
    calls = 0
    forward = opsin.Classifier.forward

    def counted(self: opsin.Classifier, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(opsin.Classifier, "forward", counted)
    run("train", photo_folder, "--model", vit)
    assert calls == 1  # the held-out images
    assert (Path("runs/2") / "model.safetensors").read_bytes() == first


def test_scores_are_calibrated_and_the_temperature_is_in_the_weights(tmp_path: Path) -> None:
    """An overconfident model: its logits are ten times what its accuracy warrants."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(240):
        path = tmp_path / "photos" / ("dark", "light")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = np.clip(rng.normal((100, 150)[i % 2], 30), 0, 255)  # the two overlap
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(path)
    run("train", tmp_path / "photos", "--holdout", "0.5", "--out", "run")
    checkpoint = checkpoints.read("run")
    with torch.no_grad():
        checkpoint.model.head.weight *= 10  # type: ignore[union-attr, operator]
        checkpoint.model.head.bias *= 10  # type: ignore[union-attr, operator]
    checkpoints.write(Path("sure"), checkpoint.model, checkpoint.preprocess, checkpoint.labels)
    before = json.loads(run("evaluate", tmp_path / "photos", "--model", "sure", "--calibrate").stdout)
    after = json.loads(run("evaluate", tmp_path / "photos", "--model", "sure").stdout)
    assert before["temperature"] > 5
    assert after["ece"] < before["ece"] / 2
    assert after["top1"] == before["top1"]


def test_unreadable_photos_are_named_and_skipped(photo_folder: Path, vit: str) -> None:
    (photo_folder / "blue" / "cut.png").write_bytes((photo_folder / "blue" / "001.png").read_bytes()[:70])
    result = run("train", photo_folder, "--model", vit)
    assert json.loads(result.stdout)["bad_images"] == 1
    (bad,) = [json.loads(line) for line in (Path("runs/1") / "bad_images.jsonl").read_text().splitlines()]
    assert bad["key"].endswith("cut.png")
    assert bad["type"] == "corrupt"
    for name in range(6):
        (photo_folder / "amber" / f"x{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for more in ((), ("--method", "finetune", "--epochs", "3", "--workers", "0", "--batch-size", "8")):
        result = run("train", photo_folder, "--model", vit, *more, code=1)
        assert "training images could not be read, more than the 5 allowed" in result.stderr
        assert "bad_images.jsonl names them" in result.stderr
    run("train", photo_folder, "--model", vit, "--max-bad", "0.2")


def test_a_finished_or_stopped_run_is_resumed_and_nothing_else(photo_folder: Path, vit: str) -> None:
    short = ("--method", "finetune", "--steps", "4", "--workers", "0", "--batch-size", "8")
    run("train", photo_folder, "--model", vit, *short, "--out", "run")
    before = metrics("run")
    assert json.loads(run("train", "--resume", "run").stdout)["run"] == "run"
    assert metrics("run") == before
    assert "holds a run. Go on with it" in run("train", photo_folder, "--out", "run", code=1).stderr
    assert "takes --device and nothing else" in run("train", "--resume", "run", "--lr", "1", code=2).stderr
    (photo_folder / "blue" / "new.png").write_bytes((photo_folder / "blue" / "001.png").read_bytes())
    assert "the data are not those that run began with" in run("train", "--resume", "run", code=1).stderr
    assert "holds no run" in run("train", "--resume", photo_folder, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "no data: name a folder of photos"),
        (["train", "photos", "--recipe", "vit_l16_in22k"], "vit_l16_in21k"),
        (["train", "photos", "--epochs", "1", "--steps", "2"], "--epochs and --steps both say how long"),
        (["train", "photos", "--set", "weight_dekay=1"], 'no setting "weight_dekay". Did you mean "weight_decay"?'),
        (["train", "photos", "--set", "weight_decay"], '"weight_decay" is no setting. Write key=value'),
        (["train", "photos", "--set", "optimizer=adam2"], 'optimizer is "adam2". Known: sgd, adam, adamw'),
        (["train", "photos", "--method", "guess"], "'guess' is not one of"),
        (["train", "photos", "--lr", "0"], "0.0 is not in the range"),
        (["train", "photos", "--device", "quantum"], 'device "quantum" cannot be used'),
        (["train", "nowhere"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "photos", "--calibrate"], "is not a folder"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, photo_folder: Path) -> None:
    assert message in run(*arguments, code=2).stderr


def test_an_unknown_model_and_one_without_images_are_refused(photo_folder: Path) -> None:
    assert "no model" in run("train", photo_folder, "--model", "opsin/vit-tony", code=4).stderr


def test_classes_that_do_not_fit_fail_loudly(photo_folder: Path, vit: str) -> None:
    run("train", photo_folder, "--model", vit, "--out", "run")
    (photo_folder / "blue").rename(photo_folder / "bleu")
    result = run("evaluate", photo_folder, "--model", "run", code=2)
    assert "that the model does not know: bleu" in result.stderr
    assert "blue" in result.stderr.replace("bleu", "")
    (photo_folder / "bleu").rename(photo_folder.parent / "elsewhere")
    assert "without an image" in run("evaluate", photo_folder, "--model", "run", code=2).stderr
    assert json.loads(run("evaluate", photo_folder, "--model", "run", "--partial").stdout)["n"] == 40


def test_class_order_of_the_folders_does_not_matter_once_a_model_knows_its_classes(
    photo_folder: Path, vit: str
) -> None:
    """A missing folder would shift every index after it, if classes were counted anew."""
    run("train", photo_folder, "--model", vit, "--out", "run")
    (photo_folder / "amber").rename(photo_folder.parent / "away")
    scores = json.loads(run("evaluate", photo_folder, "--model", "run", "--partial").stdout)
    assert scores["top1"] == 1
    assert {row["name"]: row["support"] for row in scores["classes"]} == {"amber": 0, "blue": 20, "coral": 20}


def test_evaluation_is_written_with_its_pictures(photo_folder: Path, vit: str) -> None:
    run("train", photo_folder, "--model", vit, "--out", "run")
    (photo_folder / "blue" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = run("evaluate", photo_folder, "--model", "run", "--out", "report", "--train", photo_folder, code=3)
    scores = json.loads(result.stdout)
    assert scores["knn_top1"] == 1
    assert scores["few_shot"]
    assert scores["bad_images"] == 1
    assert {path.name for path in Path("report").iterdir()} == {
        "evaluation.json", "evaluation.md", "errors.jsonl", "confusion.png", "reliability.png",
    }  # fmt: skip
    assert json.loads((Path("report") / "evaluation.json").read_text())["top1"] == scores["top1"] == 1
    assert "cut.png" in result.stderr


def test_dry_run_prints_a_plan_and_does_nothing(photo_folder: Path) -> None:
    plan = json.loads(run("train", "--recipe", "vit_l16_in21k", "--dry-run").stdout)
    assert plan["classes"] == 21_843
    assert plan["params"] == 326_740_307
    assert plan["steps"] == pytest.approx(plan["training_images"] * 90 / 4096, rel=1e-4)
    assert plan["flops"] == pytest.approx(3 * 2 * 61.6e9 * plan["steps"] * 4096, rel=0.02)
    assert plan["config"]["weight_decay"] == 0.03
    plan = json.loads(run("train", photo_folder, "--method", "finetune", "--dry-run", "--epochs", "2").stdout)
    assert plan["training_images"] == 54
    assert not Path("runs").exists()


def test_recipes_are_listed() -> None:
    names = [json.loads(line)["recipe"] for line in run("train", "--list").stdout.splitlines()]
    assert {"vit_l16_in21k", "perceiver_conv_in1k", "photos", "linear_probe"} <= set(names)


def test_doctor_finds_what_is_wrong(photo_folder: Path) -> None:
    (photo_folder / "blue" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (photo_folder / "amber" / "copy.png").write_bytes((photo_folder / "blue" / "001.png").read_bytes())
    result = run("doctor", photo_folder, "--out", "report", code=3)
    counts = json.loads(result.stdout)["counts"]
    assert counts["unreadable"] == 1
    assert counts["two_classes"] == 1
    assert {path.name for path in Path("report").iterdir()} == {"doctor.json", "doctor.md", "contact_sheet.jpg"}
    loose = run("doctor", photo_folder / "blue", code=3)
    assert "examined without labels" in loose.stderr


def test_a_teacher_teaches_by_the_names_of_the_classes(photo_folder: Path, vit: str) -> None:
    run("train", photo_folder, "--model", vit, "--out", "teacher")
    common = ("--method", "finetune", "--model", vit, "--steps", "3", "--workers", "0", "--batch-size", "6")
    run("train", photo_folder, *common, "--set", "teacher=teacher", "--set", "distillation=soft", "--set", "mixup=0.5")
    result = run("train", photo_folder, *common, "--set", f"teacher={vit}", code=1)
    assert "cannot teach 1 of the 3 classes, which it does not know: blue" in result.stderr


def test_the_command_is_in_the_environment_file(photo_folder: Path, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["opsin", "train", "photos"])
    run("train", photo_folder, "--model", vit)
    facts = json.loads((Path("runs/1") / "environment.json").read_text())
    assert facts["command"] == ["opsin", "train", "photos"]
    assert facts["opsin"] == opsin.__version__


def test_a_distilled_models_probe_counts_through_both_heads(photo_folder: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 16), patch_size=4, embed_dim=24, num_layers=1, num_heads=2, mlp_dim=40, num_classes=3,
        distillation_token=True,
    )  # fmt: skip
    model = ViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    source = Checkpoint(model, PreprocessConfig(size=(16, 16)), Labels(("x", "y", "z")), Source("t", None, "", "opsin"))
    checkpoints.write(Path("distilled"), source.model, source.preprocess, source.labels)
    run("train", photo_folder, "--model", "distilled")
    clf = opsin.load("runs/1")
    features = torch.from_numpy(clf.embed([photo_folder / "blue" / "001.png"]))
    half = features @ clf.model.head.weight.T + clf.model.head.bias
    assert torch.allclose(clf.logits([photo_folder / "blue" / "001.png"]), half / 2, atol=1e-4)


def test_several_labels_an_image_from_a_table(photo_folder: Path, vit: str) -> None:
    """A table that calls every coral picture amber as well: scores are sigmoids, each class by itself."""
    rows = ["path,label"]
    for path in sorted(photo_folder.glob("*/*.png")):
        names = {"coral": "coral;amber"}.get(path.parent.name, path.parent.name)
        rows.append(f"{path.relative_to(photo_folder.parent)},{names}")
    table = photo_folder.parent / "table.csv"
    table.write_text("\n".join(rows))
    for more in ((), ("--method", "finetune", "--epochs", "6", "--batch-size", "8", "--workers", "0", "--lr", "3e-3")):
        said = json.loads(run("train", table, "--model", vit, *more).stdout)
        clf = opsin.load(said["run"])
        assert clf.labels.multi_label
        scores = {best["label"]: best["score"] for best in clf(next((photo_folder / "coral").iterdir()))}
        assert min(scores["coral"], scores["amber"]) > 0.5 > scores["blue"]
        found = json.loads(run("evaluate", table, "--model", said["run"]).stdout)
        assert found["mean_average_precision"] > 0.9


def test_a_start_that_failed_leaves_the_folder_free(photo_folder: Path, vit: str) -> None:
    run("train", "nowhere", "--out", "run", code=2)
    run("train", photo_folder, "--model", "opsin/vit-tony", "--out", "run", code=4)
    run("train", photo_folder, "--model", vit, "--out", "run")
    run("train", "nowhere", code=2)
    assert list(Path("runs").iterdir()) == []


def test_killed_before_its_first_state_was_whole_a_run_begins_again(photo_folder: Path, vit: str) -> None:
    """With the head that the probe finds, as at first."""
    short = ("--method", "finetune", "--steps", 2, "--workers", 0, "--batch-size", 8, "--set", "log_every=1")
    run("train", photo_folder, "--model", vit, *short, "--out", "run")
    before = [line["loss"] for line in metrics("run")]
    (state,) = Path("run").glob("state/*/rank-0.pt")
    state.rename(state.with_suffix(".part"))
    run("train", "--resume", "run")
    assert [line["loss"] for line in metrics("run")] == before
    assert not list(Path("run").glob("state/*/*.part"))


def test_a_finished_run_is_left_as_it_is(photo_folder: Path, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another folder, though the model was named by a relative path."""
    short = ("--method", "finetune", "--steps", 2, "--workers", 0, "--batch-size", 8)
    said = json.loads(run("train", photo_folder, "--model", "vit", *short, "--out", "run").stdout)
    before = (Path("run") / "model.safetensors").read_bytes()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    again = json.loads(run("train", "--resume", "../run").stdout)
    assert again["top1"] == said["top1"]
    assert (Path("../run") / "model.safetensors").read_bytes() == before


def test_a_recipe_is_fitted_to_the_length_and_image_size_of_the_run(caplog: pytest.LogCaptureFixture) -> None:
    config = recipe("vit_tiny")
    assert _fitted(config, 4500, (64, 64)) == config
    fitted = _fitted(config, 100, (32, 32))
    assert fitted.warmup_steps == 20
    assert "a warm-up of 200 steps is too long for 100: it takes 20." in caplog.text
    assert [(phase.image_size, phase.keep_tokens) for phase in fitted.phases] == [(24, 6), (32, 8)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("weight_decay=lots", "weight_decay is 0.05, a number, and cannot become 'lots'"),
        ("mixup=-1", "mixup is -1; it must be a number from 0 on"),
        ("rand_augment=[2,40]", "magnitude from 0 to 30"),
        ("phases=[{}]", "phases is [{}]; it is"),
        ("holdout=0.9", "at most half of the images can be held out"),
        ("label_smoothing=2", "it is a share, from 0 to 1"),
        ("model.num_layers=3", "model is None and has no parts"),
        ("compile=1", "compile is False and cannot become 1"),
    ],
)
def test_settings_that_cannot_be(setting: str, message: str, photo_folder: Path) -> None:
    assert message in run("train", photo_folder, "--method", "finetune", "--set", setting, code=2).stderr


def test_phases_can_be_set(photo_folder: Path) -> None:
    phases = 'phases=[{"share": 0.5, "image_size": 32}]'
    plan = json.loads(run("train", photo_folder, "--method", "pretrain", "--set", phases, "--dry-run").stdout)
    assert plan["config"]["phases"] == [{"share": 0.5, "image_size": 32, "keep_tokens": None}]
    assert "a probe has no steps to plan" in run("train", photo_folder, "--dry-run", code=1).stderr
