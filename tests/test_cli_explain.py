"""`opsin explain`: records, exit codes, pictures and pages; the embedded model answers."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from opsin import checkpoints
from opsin import explain as maps
from opsin.checkpoints import Checkpoint
from opsin.cli import main
from opsin.labels import Labels
from opsin.models.perceiver_io import TextPerceiver, TextPerceiverConfig

FIELDS = {
    "path", "ok", "label", "index", "score", "method", "layer", "head", "peak", "deletion_auc", "insertion_auc",
    "random_deletion_auc", "random_insertion_auc", "width", "height", "out", "report",
}  # fmt: skip


def opsin(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["explain", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def coffee(photos: Path) -> str:
    return str(photos / "coffee.png")


@pytest.fixture(scope="session")
def tiny(noisy_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of two layers, two heads and seven classes."""
    folder = tmp_path_factory.mktemp("tiny")
    labels = Labels(tuple(f"class {i}" for i in range(7)), None, ("猫", "狗", "鸟", "鱼", "虎", "马", "牛"))
    checkpoints.write(folder, noisy_checkpoint.model, noisy_checkpoint.preprocess, labels)
    return str(folder)


def test_a_pipe_gets_one_json_line(coffee: str) -> None:
    result = opsin(coffee)
    assert result.exit_code == 0
    [line] = result.stdout.splitlines()
    row = json.loads(line)
    assert set(row) == FIELDS
    assert (row["path"], row["ok"], row["label"], row["method"]) == (coffee, True, "espresso", "relevance")
    assert (row["layer"], row["head"], row["out"], row["report"]) == (None, None, None, None)
    assert (row["width"], row["height"]) == (600, 400)
    assert 100 <= row["peak"][0] < 500
    assert 0 <= row["peak"][1] < 400
    assert row["deletion_auc"] < row["random_deletion_auc"]


def test_a_picture_and_a_page(coffee: str, tiny: str, tmp_path: Path) -> None:
    out, page = tmp_path / "why.png", tmp_path / "why.html"
    asked = ["--method", "attention", "--layer", "1", "--head", "0", "--target", "class 4", "--lang", "zh"]
    result = opsin(coffee, "--model", tiny, "--out", out, "--report", page, *asked)
    assert result.exit_code == 0
    row = json.loads(result.stdout)
    assert (row["method"], row["layer"], row["head"], row["index"]) == ("attention", 1, 0, 4)
    assert (row["out"], row["report"], row["label"]) == (str(out), str(page), "虎")
    with Image.open(out) as image:
        assert image.format == "PNG"
    text = page.read_text(encoding="utf-8")
    assert '<h1><span lang="zh">虎</span>' in text
    assert coffee in text


def test_a_target_by_its_name_and_by_its_number(coffee: str, tiny: str) -> None:
    by_name = json.loads(opsin(coffee, "--model", tiny, "--target", "class 3", "--method", "rollout").stdout)
    assert (by_name["label"], by_name["method"]) == ("class 3", "rollout")
    assert json.loads(opsin(coffee, "--model", tiny, "--target", 3, "--method", "rollout").stdout) == by_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "3"], "--layer is for --method attention; relevance takes all layers and heads"),
        (["--head", "3", "--method", "rollout"], "--head is for --method attention; rollout takes"),
        (["--method", "attention", "--layer", "2"], "no layer 2: this model has 2, 0 to 1"),
        (["--method", "attention", "--head", "2"], "no head 2: layer 1 of this model has 2, 0 to 1"),
        (["--target", "clas 3"], 'no class "clas 3" among the 7 of this model. Did you mean "class'),
        (["--target", "7"], "no class 7: this model has 7, 0 to 6"),
        (["--method", "gradcam"], "'gradcam' is not one of 'relevance', 'rollout', 'attention', 'occlusion'"),
        (["--out", "why.jpg"], '"why.jpg" does not end in .png'),
        (["--report", "why.pdf"], '"why.pdf" does not end in .html'),
        (["--out", "nowhere/why.png"], 'the folder "nowhere" does not exist'),
        (["--device", "tpu"], "--device"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, coffee: str, tiny: str) -> None:
    result = opsin(coffee, "--model", tiny, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_map_of_nothing_is_said(coffee: str, on_a_terminal: Callable[..., str]) -> None:
    result = opsin(coffee, "--model", "opsin/perceiver-tiny", "--target", "bison")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["peak"] is None
    assert 'by relevance the map is the same everywhere, so it says nothing of "bison". Try --method occlusion' in (
        " ".join(result.stderr.split())
    )
    seen = on_a_terminal("explain", coffee, "--model", "opsin/perceiver-tiny", "--target", "bison")
    assert not any(line.split()[:1] == ["peak"] for line in seen.splitlines())


def test_the_image_is_not_drawn_over(coffee: str, tiny: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(Path(coffee).read_bytes())
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, tmp_path / "link.png"):
        result = opsin(photo, "--model", tiny, "--out", out)
        assert result.exit_code == 2
        assert "is the image itself" in " ".join(result.stderr.split())
    assert photo.read_bytes() == Path(coffee).read_bytes()


@pytest.mark.parametrize("name", ["gone.jpg", "notes.txt"])
def test_a_bad_image_is_a_record(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    result = opsin(tmp_path / name, "--out", tmp_path / "why.png", "--report", tmp_path / "why.html")
    assert result.exit_code == 3
    row = json.loads(result.stdout)
    assert set(row) == {"path", "ok", "error"}
    assert not row["ok"]
    assert row["error"]["type"] == {"gone.jpg": "not_found", "notes.txt": "not_an_image"}[name]
    assert not list(tmp_path.glob("*why*"))


def test_a_photo_beyond_the_limit(coffee: str) -> None:
    result = opsin(coffee, "--max-pixels", 1000)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["type"] == "too_large"


def test_a_model_that_is_not_there(coffee: str, tmp_path: Path) -> None:
    result = opsin(coffee, "--model", tmp_path / "gone.safetensors")
    assert result.exit_code == 4
    assert not result.stdout


def test_the_methods_are_those_of_the_library() -> None:
    from opsin.cli.explain import METHODS

    assert METHODS == maps.METHODS


def test_without_matplotlib_no_model_is_loaded(
    coffee: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def absent(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", absent)
        patch.setattr(checkpoints, "read", unwanted)
        for option, name in (("--out", "why.png"), ("--report", "why.html")):
            result = opsin(coffee, option, tmp_path / name)
            assert result.exit_code == 2
            assert 'pip install "opsin[explain]"' in " ".join(result.stderr.split())
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", absent)
        assert opsin(coffee, "--model", tiny).exit_code == 0, "numbers need no matplotlib"


def test_a_page_that_cannot_be_written(coffee: str, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "why.html").write_text("yesterday")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        result = opsin(coffee, "--model", tiny, "--report", tmp_path / "why.html")
    assert result.exit_code == 1
    assert "why.html cannot be written: No space left" in " ".join(result.stderr.split())
    assert (tmp_path / "why.html").read_text() == "yesterday"


def test_a_terminal_gets_a_few_lines(coffee: str, tiny: str, on_a_terminal: Callable[..., str]) -> None:
    seen = on_a_terminal("explain", coffee, "--model", tiny)
    lines = [line.split() for line in seen.splitlines()]
    assert any(line[:1] == ["method"] and line[1:] == ["relevance"] for line in lines)
    assert any(line[:1] == ["peak"] and line[3:] == ["of", "600", "×", "400", "pixels"] for line in lines)
    assert any(line[:1] == ["deletion"] and line[-3:] == ["lower", "is", "better"] for line in lines)
    assert any(line[:1] == ["insertion"] and line[-3:] == ["higher", "is", "better"] for line in lines)
    assert "class " in seen
    assert "█" in seen


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A tiny model of text."""
    config = TextPerceiverConfig(
        num_latents=5, latent_dim=12, layers_per_block=2, num_heads=2, num_cross_heads=2, qk_dim=6, v_dim=14,
        embed_dim=10, max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TextPerceiver(config).eval()
    checkpoints.write(tmp_path / "text", model, None, None)
    return tmp_path / "text"


def test_a_text_is_explained_by_its_bytes(text_file: Path, tmp_path: Path) -> None:
    result = opsin("some <words> are[MASK:2].", "--model", text_file, "--report", tmp_path / "why.html")
    assert result.exit_code == 0
    row = json.loads(result.stdout)
    assert set(row) == {"text", "ok", "filled", "tokens", "gaps", "report"}
    [gap] = row["gaps"]
    assert len(gap["weights"]) == len(row["tokens"])
    assert sum(gap["weights"]) == pytest.approx(1, abs=1e-4)
    assert "some &lt;words&gt; are" in (tmp_path / "why.html").read_text(encoding="utf-8")


def test_a_text_without_a_gap_is_a_record(text_file: Path) -> None:
    result = opsin("no gap", "--model", text_file)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["error"]["type"] == "no_mask"


@pytest.mark.parametrize("option", [["--out", "why.png"], ["--target", "x"], ["--method", "rollout"]])
def test_options_for_images_are_not_for_texts(option: list[str], text_file: Path) -> None:
    result = opsin("a gap[MASK]", "--model", text_file, *option)
    assert result.exit_code == 2
    assert "a text is explained by rollout" in " ".join(result.stderr.split())


def test_a_terminal_gets_the_text_and_its_best_words(text_file: Path, on_a_terminal: Callable[..., str]) -> None:
    seen = on_a_terminal("explain", "some words are[MASK:2].", "--model", str(text_file))
    assert "    some words are__." in seen.replace("[CLS]", "").replace("[SEP]", "")
    assert "words" in seen.splitlines()[-1]
    assert "%" in seen.splitlines()[-1]
