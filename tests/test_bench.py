"""The bench: order of turns, agreement, what is left out and why. No time is asserted."""

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from opsin import bench as benching
from opsin import checkpoints, engine
from opsin.bench import PLAIN, Report, bench, compare, interleaved, machine
from opsin.checkpoints import Checkpoint
from opsin.cli.bench import bench as bench_command
from opsin.cli.bench import show_report
from opsin.device import has_bf16, has_int8
from opsin.errors import DataError, MissingExtra, ModelError, NoHead
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

OWN = [(PLAIN, "fp32"), ("opsin", "fp32")]
OWN += [("opsin", "bf16")] if has_bf16() else []
pytestmark = pytest.mark.skipif(not engine.can_pack(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is looked at: turns of one call, a small product."""
    monkeypatch.setattr(benching, "TURN_SECONDS", 0)
    monkeypatch.setattr(benching, "PRODUCT", (5, 7, 11))


@pytest.fixture(scope="session")
def folder(noisy_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT for 32 × 32 pixels and 7 classes, on disk."""
    path = tmp_path_factory.mktemp("bench") / "vit"
    checkpoints.write(path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    return path


def pictures(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(3).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def found(report: Report) -> list[tuple[str, str]]:
    return [(result.name, result.precision) for result in report.contenders]


def work_of(model: torch.nn.Module, folder: Path, size: tuple[int, int] = (32, 32)) -> Any:
    work = benching._Work(name="tiny", folder=folder, batch_size=3, image_size=size)
    work.model = model
    return work


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_contenders_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only calls move: A takes 2 s, B 0.4, so of a turn of 1 s B makes three."""
    monkeypatch.setattr(benching, "TURN_SECONDS", 1.0)
    now, order = 0.0, ""
    turns: list[str] = []

    def call(name: str, seconds: float) -> None:
        nonlocal now, order
        now, order = now + seconds, order + name

    calls = {"A": lambda: call("A", 2.0), "B": lambda: call("B", 0.4), "C": lambda: call("C", 1.0)}
    seconds = interleaved(calls, 3, on_turn=turns.append, clock=lambda: now)
    assert order == "AABBCC" + 3 * "ABBBC"
    assert turns == list(3 * "ABC")
    assert {name: pytest.approx(times) for name, times in seconds.items()} == {
        "A": 3 * [2],
        "B": 3 * [0.4],
        "C": 3 * [1],
    }


def test_a_round_in_which_the_machine_is_slow_does_not_move_the_ratio(folder: Path) -> None:
    seconds = {(PLAIN, "fp32"): [1.0, 9.0, 1.2], ("opsin", "fp32"): [0.5, 3.0, 0.6], ("opsin", "bf16"): [1.0, 1.0, 1.0]}
    compared = benching.Compared(0.75, 0.5, 0.25)
    peak = {"fp32": 800.0}
    result = benching._result(("opsin", "fp32"), seconds, (PLAIN, "fp32"), 4, 50.0, peak, compared, True, None)
    assert result.ratio == 2.0  # of 2, 3 and 2
    assert result.ratio_quartiles == (2.0, 2.5)
    assert result.images_per_s == pytest.approx(4 / 0.6)
    assert result.images_per_s_quartiles == pytest.approx((4, 22 / 3))
    assert result.peak_share == pytest.approx(50 * 4 / 0.6 / 800)
    bf16 = benching._result(("opsin", "bf16"), seconds, (PLAIN, "fp32"), 4, 50.0, peak, compared, False, 17)
    assert (bf16.peak_share, bf16.agreement, bf16.drift, bf16.memory_bytes) == (None, None, 0.5, 17)


def test_a_contender_that_is_wrong_is_seen_to_be() -> None:
    logits = torch.tensor([[3.0, 1, 2], [1, 5, 0], [0, 1, 4], [2, 0, 1], [9, 0, 0], [9, 0, 0]])
    wrong = logits.clone()
    wrong[1] = torch.tensor([5.5, 5, 0])  # another label
    wrong[3, 0] += 0.25  # the same
    wrong[4:] = -wrong[4:]  # what fills the last batch up does not count
    batches = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]

    def net(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda pixels: values[pixels].bfloat16()

    ran: list[None] = []
    compared = compare({"right": net(logits), "wrong": net(wrong)}, "right", batches, 4, lambda: ran.append(None))
    assert len(ran) == 2
    assert compared["right"] == (1.0, 0.0, 0.0)
    assert compared["wrong"] == pytest.approx((0.75, 4.5, 4.5 / logits[:4].std().item()))


def test_products_that_are_needed_are_counted() -> None:
    """Dense layers, the fused attention and the patch convolution; an addition counts like a multiplication."""
    shape: dict[str, Any] = {"image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "num_layers": 2, "num_heads": 3}
    patches, dim, mlp_dim = 24, 24, 40

    def layer(tokens: int, read: int) -> int:
        return tokens * 2 * dim * dim + read * (2 * dim * dim + 2 * dim * mlp_dim + 2 * tokens * dim)

    ends = patches * dim * 3 * 64 + dim * 7
    token = ViT(ViTConfig(**shape, mlp_dim=mlp_dim, num_classes=7)).eval()
    assert benching.flops_of(token, (32, 48)) == 2 * (ends + layer(25, 25) + layer(25, 1))
    mean = ViT(ViTConfig(**shape, mlp_dim=mlp_dim, num_classes=7, pool="mean", class_token=False)).eval()
    assert benching.flops_of(mean, (32, 48)) == 2 * (ends + 2 * layer(24, 24))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_product_that_is_the_peak(precision: str) -> None:
    product = benching._product(precision)
    if precision == "int8" and not has_int8():
        assert product is None
    else:
        assert product is not None
        out: Any = product()
        assert out.shape == (5, 11)
        assert out.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert out.std() > 0


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_image_both_calibrates_and_is_agreed_on() -> None:
    for count in (1, 2, 5, 40, 3001):
        paths: list[Any] = [str(place) for place in range(count)]
        held_out, calibration = benching._divide(paths, 512)
        assert not set(held_out) & set(calibration)
        assert len(held_out) == min(count - math.ceil(count / 4), 512)
        assert len(calibration) == min(math.ceil(count / 4), 128)
    assert int(str(held_out[-1])) > 2980  # evenly, to the end
    assert int(str(calibration[-1])) > 2970


def test_the_last_batch_begins_again_at_the_first_image(classifier: Any) -> None:
    first, second, third = images = pictures(3)
    batches = benching._batches(classifier, images, 2)
    assert [batch.shape for batch in batches] == [(2, 3, 32, 32)] * 2
    expected = [classifier.preprocess.normalise(image) for image in (first, second, third, first)]
    assert torch.equal(torch.cat(batches), torch.stack(expected))


# ── bench ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_report_of_images(folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = bench(folder, batch_size=2, rounds=3, images=pictures(7), progress=lambda *step: steps.append(step))
    own = OWN + ([("opsin", "int8")] if has_int8() else [])
    assert found(report) == own
    assert (report.images, report.calibration_images, report.rounds, report.batch_size) == (5, 2, 3, 2)
    assert report.baseline == "opsin plain fp32"
    assert set(report.peaks) == {precision for _, precision in own}
    plain, packed, *_ = report.contenders
    assert (plain.agreement, plain.drift, plain.ratio, plain.ratio_quartiles) == (1.0, 0.0, 1.0, (1.0, 1.0))
    assert packed.agreement == 1.0
    assert 0 < packed.drift_relative < 1e-4
    for result in report.contenders:
        low, high = result.images_per_s_quartiles
        assert 0 < low <= result.images_per_s <= high
        assert result.memory_bytes is None
    assert steps[-1] == (4 * 5, 4 * 5)
    assert [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_a_report_is_json_with_all_of_its_fields(folder: Path) -> None:
    report = bench(folder, batch_size=1, rounds=1)
    record = report.as_dict()
    assert json.loads(json.dumps(record)) == record
    assert list(record) == [field.name for field in fields(Report)]
    assert list(record["contenders"][0]) == list(asdict(report.contenders[0]))
    assert record["image_size"] == [32, 32]
    assert record["machine"] == machine() | {"date": record["machine"]["date"]}
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["versions"] == {"torch": torch.__version__}
    assert set(machine(["onnxruntime"])["versions"]) <= {"torch", "onnxruntime", "onnx"}


def test_without_images_there_is_no_agreement_and_no_int8(folder: Path) -> None:
    report = bench(folder, batch_size=3, rounds=1)
    assert found(report) == OWN
    assert report.images == report.calibration_images == 0
    assert {result.agreement for result in report.contenders} == {None}
    assert report.contenders[1].drift > 0
    reasons = {(row["name"], row["precision"]): row["reason"] for row in report.skipped}
    if has_int8():
        assert reasons["opsin", "int8"] == "int8 needs images to take its ranges from"


def test_a_perceiver(noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_latents": 5, "latent_dim": 16, "num_blocks": 2, "layers_per_block": 2, "num_heads": 2}
    model = ImagePerceiver(ImagePerceiverConfig(**shape, image_size=(32, 32), num_bands=3, num_classes=7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    checkpoints.write(tmp_path, model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    report = bench(tmp_path, batch_size=2, rounds=1, images=pictures(3))
    assert len(found(report)) >= len(OWN)
    assert report.contenders[1].drift_relative < 1e-4
    assert 0 < report.gflops < 1


def test_a_cpu_without_bf16_and_int8(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "has_bf16", lambda: False)
    monkeypatch.setattr(benching, "has_int8", lambda: False)
    report = bench(folder, batch_size=1, rounds=1, images=pictures(2))
    assert found(report) == OWN[:2]
    assert [row["reason"] for row in report.skipped] == [
        "this CPU does not multiply bf16 by itself",
        "this CPU does not multiply int8 (it lacks AVX512-VNNI)",
    ]


def test_an_engine_that_computes_something_else_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "pack", lambda model, precision, ranges=None: lambda pixels: -model(pixels))
    report = bench(folder, batch_size=2, rounds=1, images=pictures(6))
    assert report.contenders[0].agreement == 1.0
    assert report.contenders[1].agreement == 0.0
    [note] = report.notes
    assert note.startswith("opsin fp32 does not compute the same: logits differ by up to ")


def test_what_another_library_cannot_do_leaves_the_others_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(work: Any, precision: str) -> Any:
        if precision == "fp32":
            raise RuntimeError("no such operator\nand a long story")
        return lambda pixels: pixels.wrong

    library = benching.Library(("fp32", "int8"), (), broken)
    monkeypatch.setitem(benching.LIBRARIES, "openvino", library)
    report = bench(folder, batch_size=1, rounds=1, versus=["openvino"], images=pictures(2))
    assert {"openvino"} == {row["name"] for row in report.skipped}
    first, second = (row["reason"] for row in report.skipped)
    assert first == "RuntimeError: no such operator"
    assert second == "AttributeError: 'Tensor' object has no attribute 'wrong'" or not has_int8()
    assert report.baseline == "opsin plain fp32"


def test_the_baseline_is_transformers_where_it_takes_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = benching.Library(("fp32",), (), lambda work, precision: work.model)
    monkeypatch.setitem(benching.LIBRARIES, "transformers", library)
    report = bench(folder, batch_size=1, rounds=2, versus=["transformers"])
    assert report.baseline == "transformers fp32"
    assert found(report)[-1] == ("transformers", "fp32")
    assert report.contenders[-1].ratio == 1.0
    assert report.contenders[0].ratio != 1.0


def test_images_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    report = bench(folder, batch_size=1, rounds=1, images=[*pictures(2), bad])
    assert (report.images, report.calibration_images) == (1, 1)
    assert [str(bad) in line for line in report.unreadable] == [True]
    with pytest.raises(DataError, match=r"none of 2 images can be read. The first: .*bad.png"):
        bench(folder, images=[bad, bad])


def test_messages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='versus has "tflite". Known: transformers, timm, openvino, onnxruntime.'):
        bench(folder, versus=["tflite"])
    with pytest.raises(ValueError, match='versus has "timm" more than once.'):
        bench(folder, versus=["timm", "timm"])
    with pytest.raises(ValueError, match="rounds is 0; it must be at least 1."):
        bench(folder, rounds=0)
    with pytest.raises(ValueError, match="batch_size is -2; it must be at least 1."):
        bench(folder, batch_size=-2)
    headless = tmp_path / "headless"
    config = ViTConfig(
        image_size=(16, 16), patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, num_classes=0
    )
    checkpoints.write(headless, ViT(config), PreprocessConfig(size=(16, 16)), None)
    with pytest.raises(NoHead, match="has no classification head: there are no labels to agree on"):
        bench(headless)
    monkeypatch.setattr(benching, "load", lambda name, **_: object())
    with pytest.raises(ModelError, match="language is no classifier of images; bench measures those"):
        bench("language")


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = {"transformers", "nncf"}
    monkeypatch.setattr(benching, "find_spec", lambda name: None if name in absent else real("json"))
    with pytest.raises(MissingExtra, match=r'transformers is not installed. .* "opsin\[bench\]"'):
        bench("no such model", versus=["onnxruntime", "transformers"])
    benching.check_libraries(["openvino"], calibrated=False)
    with pytest.raises(MissingExtra, match="nncf is not installed"):
        bench("no such model", versus=["openvino"], images=pictures(1))


# ── contenders ───────────────────────────────────────────────────────────────────────────────────────────────────────


def installed(name: str) -> None:
    for package in benching.LIBRARIES[name].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", benching.VERSUS)
def test_the_same_weights_give_the_same_logits(name: str, noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    installed(name)
    work, pixels = work_of(noisy_checkpoint.model, tmp_path), torch.randn(3, 3, 32, 32)
    for precision, bound in {"fp32": 1e-5, "bf16": 0.1}.items():
        if precision not in benching.LIBRARIES[name].precisions or (precision == "bf16" and not has_bf16()):
            continue
        with torch.inference_mode():
            net = benching._make(work, name, precision)
            assert not isinstance(net, str), net
            nets: dict[str, Any] = {PLAIN: noisy_checkpoint.model, name: net}
            assert compare(nets, PLAIN, [pixels], 3)[name].drift_relative < bound


@pytest.mark.parametrize("changes", [{"pool": "mean", "class_token": False}, {"pool": "map"}, {"layer_scale": True}])
def test_vits_of_other_kinds_in_timm(changes: dict[str, Any], tmp_path: Path) -> None:
    installed("timm")
    torch.manual_seed(0)
    shape = {"image_size": (32, 32), "patch_size": 8, "embed_dim": 24, "num_layers": 2, "num_heads": 2, "mlp_dim": 41}
    model = ViT(ViTConfig(**shape, num_classes=7, **changes)).eval()  # type: ignore[arg-type]
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        net = benching._make(work_of(model, tmp_path), "timm", "fp32")
        assert not isinstance(net, str), net
        pixels = torch.randn(3, 3, 32, 32)
        assert compare({0: model, 1: net}, 0, [pixels], 3)[1].drift_relative < 1e-5


def test_why_timm_and_transformers_leave_a_model_out(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_latents": 3, "latent_dim": 8, "num_blocks": 1, "layers_per_block": 1, "num_heads": 2}
    perceiver = ImagePerceiver(ImagePerceiverConfig(**shape, image_size=(16, 16), num_bands=2)).eval()
    work = work_of(perceiver, tmp_path, (16, 16))
    assert benching._make(work, "timm", "fp32") == "CheckpointError: it has no Perceiver"
    reason = benching._make(work, "transformers", "fp32")
    assert isinstance(reason, str)
    assert reason.startswith("CheckpointError: this model computes as DeepMind's release does")
    registers = ViTConfig(
        image_size=(16, 16), patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, num_registers=2
    )
    reason = benching._make(work_of(ViT(registers), tmp_path, (16, 16)), "timm", "fp32")
    assert reason == "CheckpointError: bench builds no timm model with registers"


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_is_that_of_a_process_of_its_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = benching._Work(name=str(folder), folder=tmp_path, batch_size=2, image_size=(32, 32))
    waste = np.ones(1 << 29, np.uint8)  # here, not there
    peak = benching._peak_memory(work, "opsin", "fp32", lambda: None)
    assert peak is not None
    assert 50e6 < peak < 500e6
    assert benching._high_water() > waste.nbytes
    monkeypatch.setattr("sys.executable", "false")
    assert benching._peak_memory(work, "opsin", "fp32", lambda: None) is None


def test_memory_that_could_not_be_measured_is_a_note(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "_peak_memory", lambda work, name, precision, step: 5 if name == PLAIN else None)
    report = bench(folder, batch_size=1, rounds=1, memory=True)
    assert [result.memory_bytes for result in report.contenders] == [5, *[None] * (len(OWN) - 1)]
    assert report.notes[0] == "opsin fp32 failed in a process of its own: its memory is not known."


# ── command ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(bench_command, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_pipe_gets_one_json_line(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for place, pixels in enumerate(pictures(3)):
        Image.fromarray(pixels).save(images / f"{place}.png")
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--model", folder, "--batch-size", 2, "--rounds", 1, "--images", images)
    result = run(*options, "--threads", torch.get_num_threads(), "--out", out, "--picture", picture)
    assert result.exit_code == 0
    [line] = result.stdout.splitlines()
    assert json.loads(line) == json.loads(out.read_text())
    assert json.loads(line)["images"] == 2
    with Image.open(picture) as image:
        assert image.format == "PNG"
    (images / "4.png").write_text("no image")
    result = run(*options)
    assert result.exit_code == 3
    assert "1 of 4 images were left out. The first: " in result.stderr


def test_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    record = bench(folder, batch_size=1, rounds=1).as_dict()
    show_report(record)
    text = capsys.readouterr().out
    assert "same label" not in text
    assert "memory" not in text
    assert "measured on noise" in text
    for row in record["contenders"]:
        row |= {
            "agreement": 0.9725,
            "memory_bytes": 1234 << 20,
            "images_per_s": 34.56,
            "ratio": 4.567,
            "peak_share": None,
        }
    record |= {"images": 400, "calibration_images": 100}
    show_report(record)
    text = capsys.readouterr().out
    first = next(line for line in text.splitlines() if line.startswith("opsin plain"))
    assert [first.split()[place] for place in (3, 5, 6, 7, 10)] == ["34.6", "4.57×", "–", "97.25%", "1,234"]
    assert "measured on 400 images, int8 calibrated on 100 others" in text


def test_what_is_wrong_with_an_option_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for options, message in (
        (("--vs", "transformers, tflite"), 'versus has "tflite". Known: transformers, timm'),
        (("--out", tmp_path / "no" / "x.json"), "does not exist"),
        (("--picture", tmp_path / "x.jpg"), "does not end in .png"),
        (("--images", empty), "no images in"),
        (("--rounds", 0), "0 is not in the range"),
    ):
        result = run("--model", "nowhere", *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    result = run("--model", tmp_path / "nowhere")
    assert result.exit_code == 4
    monkeypatch.setattr(benching, "find_spec", lambda name: None)
    result = run("--vs", "onnxruntime")
    assert result.exit_code == 2
    assert "onnxruntime is not installed" in " ".join(result.stderr.split())
