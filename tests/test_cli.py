"""The command: records, exit codes, streams; the embedded model answers."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from hub_server import HubServer
from mutations import broken_files
from opsin import checkpoints
from opsin.checkpoints import Checkpoint
from opsin.cli import DEFAULT_MODEL, main
from opsin.labels import Labels
from opsin.models.vit import ViT
from opsin.pipeline import DEFAULT_MODEL as PIPELINE_DEFAULT
from opsin.pipeline import Classifier

CATS = {"tabby, tabby cat", "Persian cat", "Egyptian cat"}


def opsin(*arguments: object, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def records(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def holiday(photos: Path, tmp_path: Path) -> Path:
    """A folder with a good photo, a cut one, and something else."""
    folder = tmp_path / "holiday"
    folder.mkdir()
    data = (photos / "rocket.jpg").read_bytes()
    (folder / "1-good.jpg").write_bytes(data)
    (folder / "2-cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "notes.txt").write_text("not asked for")
    return folder


def test_a_pipe_gets_one_json_line_per_image(photos: Path) -> None:
    result = opsin("classify", photos, "--top-k", 2)
    assert result.exit_code == 0
    rows = records(result)
    assert [Path(row["path"]).name for row in rows] == ["chelsea.png", "coffee.png", "rocket.jpg"]
    for row in rows:
        assert set(row) == {"path", "ok", "label", "index", "score", "topk", "width", "height", "ms"}
        assert len(row["topk"]) == 2
    assert f"using the embedded {DEFAULT_MODEL}" in result.stderr
    assert "--model google/vit-large-patch16-224" in result.stderr


def test_the_embedded_model_knows_an_espresso(photos: Path) -> None:
    (row,) = records(opsin("classify", photos / "coffee.png"))
    assert row["label"] == "espresso"
    (row,) = records(opsin("classify", photos / "coffee.png", "--lang", "zh"))
    assert row["label"] == Labels.tiny_imagenet().name(row["index"], "zh") != "espresso"


def test_none_of_these_classes(photos: Path, tmp_path: Path, on_a_terminal: Callable[..., str]) -> None:
    """The embedded model knows an espresso, and that a rocket is none of its classes."""
    result = opsin("classify", photos / "coffee.png", photos / "rocket.jpg", "--unknown", "20%", "--dtype", "fp32")
    coffee, rocket = records(result)
    assert coffee["label"] == "espresso" and coffee["known"] is True and coffee["known_score"] > 0.9
    assert rocket["known"] is False and rocket["topk"][0]["label"] == rocket["label"]
    said = (
        "--unknown 20%: of 239 images of other things 19.7% were taken for one of the classes, of 2,500 images of the"
    )
    assert said in result.stderr
    opsin("classify", photos / "rocket.jpg", "--unknown", "1%", "--out", tmp_path / "r.csv")
    (row,) = csv.DictReader((tmp_path / "r.csv").read_text().splitlines())
    assert (row["known"], json.loads((tmp_path / "r.csv.run.json").read_text())["unknown"]) == ("False", 0.01)
    seen = on_a_terminal("classify", str(photos / "rocket.jpg"), "--unknown")
    assert "--unknown 10%: of 239" in seen
    assert f"rocket.jpg: none of these classes (looks most like {rocket['label']})" in seen.replace("\n", "")


def test_some_kind_of_thing(photos: Path, on_a_terminal: Callable[..., str]) -> None:
    coffee, rocket = records(opsin("classify", photos / "coffee.png", photos / "rocket.jpg", "--kind"))
    assert coffee["kind"] == {"label": "espresso", "wnid": "n07920052", "score": pytest.approx(coffee["score"])}
    assert rocket["kind"] is None or rocket["kind"]["score"] >= 0.9
    seen = on_a_terminal("classify", str(photos / "rocket.jpg"), str(photos / "coffee.png"), "--kind", "0.62")
    assert "rocket.jpg: some kind of " in seen
    assert "coffee.png\n" in seen  # of the class itself the table says so already


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unknown", "1.5"], '"1.5" is not a share between 0 and 100%, such as 5% or 0.05'),
        (["--unknown", "none"], "Without a share, the option stands behind the images"),
        (["--kind", "100%"], '"100%" is not a share'),
    ],
)
def test_shares_that_are_none(arguments: list[str], message: str) -> None:
    result = opsin("classify", "photo.jpg", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.fixture
def shown(noisy_checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A model of seven classes in m/, 6 pictures of noise for each in data/, and 24 flat ones in others/."""
    checkpoints.write(tmp_path / "m", noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    rng = np.random.default_rng(0)
    for i in range(42):
        folder = tmp_path / "data" / f"class {i % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "others").mkdir()
    for i in range(24):
        Image.new("RGB", (32, 32), (10 * i, 200, 7)).save(tmp_path / "others" / f"{i:02}.png")
    return tmp_path


def test_a_model_is_shown_other_things(shown: Path, on_a_terminal: Callable[..., str]) -> None:
    model, others = shown / "m", shown / "others"
    result = opsin("evaluate", shown / "data", "--model", model, "--unknown-from", others, "--dtype", "fp32")
    assert result.exit_code == 0
    found = json.loads(result.stdout)["unknown"]
    # a half of the pictures for means, of the others a half chooses: 42 → 21 → 10, 24 → 12
    assert (found["images"], found["other_images"]) == (10, 12)
    assert set(found["detectors"]) == {"energy", "knn", "mahalanobis"}
    assert found["detectors"][found["method"]]["auroc"] > 0.9
    assert set(found["false_reject"]) == {"0.01", "0.05", "0.1", "0.2"}
    rows = records(opsin("classify", others, "--model", model, "--unknown", "10%", "--dtype", "fp32"))
    assert sum(row["known"] for row in rows) <= 4
    result = opsin("classify", others, "--model", model, "--unknown", "5%")
    assert "on 12 images a share below 25.0% cannot be told from none" in result.stderr
    seen = on_a_terminal("evaluate", str(shown / "data"), "--model", str(model), "--unknown-from", str(others))
    assert f"{found['method']}, stored |" in seen and "Measured on 10 images of the classes and 12 others" in seen


def test_a_calibrated_model_still_says_none_of_these(shown: Path) -> None:
    model, others = shown / "m", shown / "others"

    def ask() -> list[dict]:
        return records(opsin("classify", others, shown / "data", "--model", model, "--unknown", "--dtype", "fp32"))

    evaluate = ["evaluate", shown / "data", "--model", model, "--dtype", "fp32"]
    opsin(*evaluate, "--unknown-from", others)
    before = ask()
    temperature = json.loads(opsin(*evaluate, "--calibrate").stdout)["temperature"]
    after = ask()
    assert temperature != 1 and before[0]["score"] != after[0]["score"]
    scores = [[row["known_score"] for row in rows] for rows in (before, after)]
    assert scores[0] == pytest.approx(scores[1], abs=1.01 / 12)  # one of the twelve is itself, but for rounding
    both = json.loads(opsin(*evaluate, "--calibrate", "--unknown-from", others / "*.png").stdout)
    assert both["unknown"]["other_images"] == 12 and {row["known"] for row in ask()} == {True, False}


def test_showing_other_things_needs_a_folder_and_enough_of_them(shown: Path) -> None:
    result = opsin("evaluate", shown / "data", "--model", DEFAULT_MODEL, "--unknown-from", shown / "others")
    assert result.exit_code == 2 and "is not a folder here, so nothing can be stored" in result.stderr
    few = shown / "others" / "1*.png"
    result = opsin("evaluate", shown / "data", "--model", shown / "m", "--unknown-from", few)
    assert result.exit_code == 2 and '10 images of other things are there to learn "unknown" from' in result.stderr
    assert not (shown / "m" / "unknown.safetensors").exists()
    result = opsin("classify", shown / "others", "--model", shown / "m", "--unknown")
    assert result.exit_code == 4 and "has never been shown images of other things" in result.stderr
    result = opsin("classify", shown / "others", "--model", shown / "m", "--kind")
    assert result.exit_code == 4 and "the classes have no WordNet ids" in result.stderr


@pytest.mark.shared
def test_the_embedded_model_sees_a_cat_on_the_cards_picture(shared: Path) -> None:
    (row,) = records(opsin("classify", shared / "coco_000000039769.png"))
    assert CATS.intersection(best["label"] for best in row["topk"])


def test_a_bad_image_fails_alone(holiday: Path) -> None:
    result = opsin("classify", holiday, "gone.jpg", holiday / "notes.txt")
    assert result.exit_code == 3
    rows = records(result)
    assert [row["ok"] for row in rows] == [True, False, False, False]
    assert [row["error"]["type"] for row in rows[1:]] == ["corrupt", "not_found", "not_an_image"]
    assert "4 images, 3 failed" in result.stderr


def test_paths_on_standard_input(holiday: Path) -> None:
    lines = f"{holiday}/1-good.jpg\n\n{holiday}\r\n{holiday}/2-cut.jpg\n".encode() + b"odd\xff.jpg\n"
    result = opsin("classify", "-", stdin=lines)
    assert result.exit_code == 3
    rows = records(result)
    assert [row["path"] for row in rows] == [
        f"{holiday}/1-good.jpg", str(holiday), f"{holiday}/2-cut.jpg", "odd\udcff.jpg"]  # fmt: skip
    assert rows[1]["error"]["type"] == "unreadable"  # a folder named by a line is one input, not many


def test_result_files(holiday: Path, tmp_path: Path) -> None:
    assert opsin("classify", holiday, "--out", tmp_path / "r.csv").exit_code == 3
    with (tmp_path / "r.csv").open() as file:
        assert [row["ok"] for row in csv.DictReader(file)] == ["True", "False"]
    result = opsin("embed", holiday, "--out", tmp_path / "f.parquet")
    assert result.exit_code == 3
    assert result.stdout == ""
    vectors = pq.read_table(tmp_path / "f.parquet")["embedding"].to_pylist()
    assert len(vectors[0]) == 256
    assert vectors[1] is None
    run = json.loads((tmp_path / "f.parquet.run.json").read_text())
    assert run["model"] == DEFAULT_MODEL
    assert run["task"] == "embed"
    assert len(run["sha256"]) == 64
    assert run["preprocess_hash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify"], "Missing argument"),
        (["classify", "a.jpg", "--out", "r.xlsx"], 'ends in ".xlsx". Known: .jsonl, .csv, .parquet'),
        (["classify", "a.jpg", "--out", "no/such/folder/r.csv"], "does not exist"),
        (["classify", "-", "a.jpg"], "give it alone"),
        (["classify", "a.jpg", "--top-k", "0"], "0 is not in the range"),
        (["classify", "a.jpg", "--dtype", "int3"], "'int3' is not one of"),
        (["classify", "a.jpg", "--device", "quantum"], 'device "quantum" cannot be used'),
        (["classify", "a.jpg", "--device", "cuda:77"], 'device "cuda:77" cannot be used'),
        (["classify", "a.jpg", "--device", "meta"], 'device "meta" holds no numbers'),
    ],
)
def test_usage_errors(arguments: list[str], message: str) -> None:
    result = opsin(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_that_cannot_be_loaded(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.npz").write_text("<html>")
    result = opsin("classify", photos, "--model", tmp_path / "m.npz")
    assert result.exit_code == 4
    assert result.stderr.startswith("opsin: ")
    result = opsin("classify", photos, "--model", "opsin/vit-tony")
    assert result.exit_code == 4
    assert DEFAULT_MODEL in result.stderr


def test_a_model_without_head_cannot_classify(noisy_checkpoint: Checkpoint, photos: Path, tmp_path: Path) -> None:
    assert isinstance(noisy_checkpoint.model, ViT)
    body = ViT(replace(noisy_checkpoint.model.config, num_classes=0))
    checkpoints.write(tmp_path / "body", body, noisy_checkpoint.preprocess, None)
    (tmp_path / "r.jsonl").write_text("yesterday")
    result = opsin("classify", photos, "--model", tmp_path / "body", "--out", tmp_path / "r.jsonl")
    assert result.exit_code == 4
    assert "has no classification head" in result.stderr
    assert (tmp_path / "r.jsonl").read_text() == "yesterday"
    assert opsin("embed", photos, "--model", tmp_path / "body").exit_code == 0


def test_two_thousand_broken_files_through_the_command(tmp_path: Path) -> None:
    paths = broken_files(tmp_path, 2000, 1)
    result = opsin("classify", "-", "--top-k", 1, stdin="\n".join(map(str, paths)).encode())
    assert result.exit_code == 3
    assert [row["path"] for row in records(result)] == [str(path) for path in paths]


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    result = opsin("classify", tmp_path)
    assert result.exit_code == 0
    assert "no images in" in result.stderr


def test_options_from_the_environment(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_CLASSIFY_TOP_K", "1")
    assert len(records(opsin("classify", photos / "coffee.png"))[0]["topk"]) == 1


def test_models_lists_the_catalogue() -> None:
    rows = records(opsin("models"))
    names = [row["name"] for row in rows]
    assert DEFAULT_MODEL == PIPELINE_DEFAULT
    assert {DEFAULT_MODEL, "google/vit-large-patch16-224", "deepmind/vision-perceiver-conv"} <= set(names)
    assert set(rows[0]) == {"name", "task", "params", "licence", "top-1 %", "cached", "source"}


def test_a_model_found_on_the_hub_classifies(noisy_checkpoint: Checkpoint, photos: Path, tmp_path: Path) -> None:
    """`models --hub` → `classify --model`, online through a mirror, then offline from the cache."""
    assert noisy_checkpoint.labels
    folder = tmp_path / "flowers"
    checkpoints.write_hf(folder, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "DO_NOT_TRACK": "1"} | environment
        return subprocess.run([sys.executable, "-m", "opsin", *arguments], env=env, capture_output=True, text=True)

    classify = ("classify", str(photos / "rocket.jpg"), "--model", "me/flowers")
    with HubServer() as hub:
        tags = ["transformers", "safetensors", "vit"]
        commit = hub.add("me/flowers", folder, tags=tags, pipeline_tag="image-classification", downloads=7)
        found = run("models", "--hub", "flowers", HF_ENDPOINT=hub.endpoint)
        (row,) = map(json.loads, found.stdout.splitlines())
        assert (row["name"], row["architecture"], row["downloads"]) == ("me/flowers", "vit", 7)
        online = run(*classify, "--out", str(tmp_path / "r.jsonl"), HF_ENDPOINT=hub.endpoint)
        assert online.returncode == 0, online.stderr
        assert json.loads((tmp_path / "r.jsonl.run.json").read_text())["revision"] == commit
    offline = run(*classify, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    expected = Classifier(noisy_checkpoint)(photos / "rocket.jpg")
    for answer in (json.loads((tmp_path / "r.jsonl").read_text()), json.loads(offline.stdout)):
        assert [best["label"] for best in answer["topk"]] == [best["label"] for best in expected]
    unreachable = run("classify", "x.jpg", "--model", "me/cats", HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == 4
    assert "HF_ENDPOINT=https://hf-mirror.com" in unreachable.stderr


def test_a_terminal_gets_a_table(photos: Path, on_a_terminal: Callable[..., str]) -> None:
    seen = on_a_terminal("classify", str(photos / "chelsea.png"), str(photos / "coffee.png"), "--top-k", "2")
    assert "chelsea.png" in seen
    assert "%" in seen
    assert '{"path"' not in seen
    assert "2 images, 0 failed" in seen


def test_a_closed_pipe_is_no_error(photos: Path) -> None:
    classify = f"{sys.executable} -m opsin classify {photos} {photos} {photos} --batch-size 1"
    command = f"{classify} | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    line, status = result.stdout.splitlines()
    assert json.loads(line)["ok"]
    assert status == "0"
    assert "Traceback" not in result.stderr


def test_ctrl_c_keeps_the_records_so_far(photos: Path, tmp_path: Path) -> None:
    """The second path never comes: the command waits on standard input when the signal arrives."""
    out = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "opsin", "classify", "-", "--batch-size", "1", "--out", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(f"{photos}/rocket.jpg\n".encode() * 4)
        process.stdin.flush()
        process.stderr.readline()  # the model is loaded
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in tmp_path.glob(".r.jsonl.*")) and time.monotonic() < deadline:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        process.stdin = None
        message = process.stderr.read().decode()
        assert process.wait() == 130
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) >= 1
    assert all(row["ok"] for row in rows)
    assert f"interrupted after {len(rows)} images; their records are in {out}" in message


def test_a_result_file_that_cannot_be_written_is_said(photos: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full, the disk that is always full")
    command = f"{sys.executable} -m opsin classify {photos} > /dev/full"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 1
    assert "standard output cannot be written: No space left on device" in result.stderr


def test_interrupted_while_the_model_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("opsin.pipeline.load", load)
    for arguments in (["classify", "a.jpg"], ["fill-mask", "a [MASK]"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 130
        assert "opsin: interrupted" in result.stderr
