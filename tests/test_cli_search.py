"""`opsin search`: records, tables, pages, exit codes; a model of noise made the features."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import opsin
from opsin import checkpoints
from opsin.checkpoints import Checkpoint
from opsin.cli.search import search as command
from opsin.labels import Labels
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.results import writer

pq = pytest.importorskip("pyarrow.parquet", reason="features are Parquet: pip install pyarrow")


def search(*arguments: object) -> Result:
    result = CliRunner().invoke(command, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def photos_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 pictures; 03 is again in 08, and 10 has a hostile name."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(10):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((47, 41), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    shutil.copy(folder / "03.png", folder / "08.png")
    shutil.copy(folder / "05.png", folder / "<b>10&.png")
    return folder


@pytest.fixture(scope="module")
def model(noisy_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    labels = Labels(tuple(f"class {i}" for i in range(7)), None, ("猫", "狗", "鸟", "鱼", "虎", "马", "牛"))
    checkpoints.write(folder, noisy_checkpoint.model, noisy_checkpoint.preprocess, labels)
    return str(folder)


@pytest.fixture(scope="module")
def features(photos_folder: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `opsin embed photos/ --out features.parquet` writes."""
    path = tmp_path_factory.mktemp("features") / "features.parquet"
    embed(path, opsin.load(model), photos_folder)
    return path


def embed(path: Path, classifier: Classifier, photos_folder: Path, **changed: Any) -> None:
    run = {
        "task": "embed",
        "model": classifier.source.name,
        "revision": None,
        "sha256": classifier.source.sha256,
        "preprocess_hash": classifier.preprocess.hash(),
        "decode": "exact",
        "embedding_dim": classifier.feature_dim,
    }
    with writer(path, run=run | changed) as write:
        for record in classifier.stream([*map(str, sorted(photos_folder.iterdir())), "nowhere.png"], embed=True):
            write(record)


def records(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_an_image_finds_itself_first(features: Path, photos_folder: Path) -> None:
    rows = records(search(features, "--like", photos_folder / "04.png", "--top-k", 3))
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert rows[0]["path"] == str(photos_folder / "04.png")
    assert rows[0]["similarity"] == pytest.approx(1, abs=1e-3)
    assert rows[0]["similarity"] > rows[1]["similarity"] >= rows[2]["similarity"]
    assert set(rows[0]) == {"rank", "similarity", "path", "row"}
    table = pq.read_table(features)
    assert [table["path"][row["row"]].as_py() for row in rows] == [row["path"] for row in rows]


def test_the_copy_of_an_image_is_as_near(features: Path, photos_folder: Path) -> None:
    rows = records(search(features, "--like", photos_folder / "03.png", "--top-k", 2))
    assert {Path(row["path"]).name for row in rows} == {"03.png", "08.png"}


def test_several_images_are_one_query(features: Path, photos_folder: Path, model: str) -> None:
    names = [photos_folder / "01.png", photos_folder / "06.png"]
    rows = records(search(features, "--like", names[0], "--like", names[1]))
    vectors = opsin.load(model).embed([str(name) for name in names]).astype(np.float64)
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    mean /= np.linalg.norm(mean)
    table = pq.read_table(features)
    for row in rows:
        vector = np.array(table["embedding"][row["row"]].as_py())
        assert row["similarity"] == pytest.approx(vector @ mean / np.linalg.norm(vector), abs=2e-3)


def test_a_label_is_a_direction(features: Path, model: str) -> None:
    rows = records(search(features, "--label", "class 4", "--top-k", 5))
    assert records(search(features, "--label", "虎", "--top-k", 5)) == rows
    assert records(search(features, "--label", 4, "--top-k", 5)) == rows
    classifier = opsin.load(model)
    assert isinstance(classifier.model, ViT)
    assert classifier.model.head is not None
    weights = classifier.model.head.weight.detach().numpy()
    direction = weights[4] - weights.mean(0)
    vector = np.array(pq.read_table(features)["embedding"][rows[0]["row"]].as_py())
    cosine = vector @ direction / np.linalg.norm(vector) / np.linalg.norm(direction)
    assert rows[0]["similarity"] == pytest.approx(cosine, abs=1e-5)


def test_duplicates_stand_in_groups(features: Path) -> None:
    result = search(features, "--duplicates", 0.9999)
    rows = records(result)
    found = [(row["group"], Path(row["path"]).name) for row in rows]
    assert found == [(1, "03.png"), (1, "08.png"), (2, "05.png"), (2, "<b>10&.png")]
    assert "opsin: 2 groups; 2 images beside the first of each" in result.stderr
    assert records(search(features, "--duplicates")) == records(search(features, "--duplicates", 0.97))


def test_a_table_and_a_page(features: Path, photos_folder: Path, tmp_path: Path) -> None:
    page, out = tmp_path / "hits.html", tmp_path / "hits.csv"
    result = search(features, "--like", photos_folder / "05.png", "--html", page, "--out", out)
    assert (result.exit_code, result.stdout) == (0, "")
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    text = page.read_text(encoding="utf-8")
    assert text.count("<img") == 11  # the one asked for, too
    assert "&lt;b&gt;10&amp;.png" in text
    assert "<b>10&" not in text
    assert f"Nearest to {photos_folder / '05.png'} in {features}" in text


def test_a_page_of_groups_and_of_images_that_are_gone(model: str, photos_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(photos_folder, copy)
    embed(tmp_path / "f.parquet", opsin.load(model), copy)
    (copy / "08.png").unlink()
    result = search(tmp_path / "f.parquet", "--duplicates", 0.9999, "--html", tmp_path / "d.html")
    assert result.exit_code == 0
    text = (tmp_path / "d.html").read_text(encoding="utf-8")
    assert text.count("<section>") == 2
    assert "2 groups of near-duplicates in" in text
    assert (text.count("<img"), text.count('class="gone"')) == (3, 1)


def test_a_terminal_gets_a_table(
    features: Path, photos_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(SystemExit) as stop:
        command([str(features), "--like", str(photos_folder / "02.png"), "--top-k", "2"])
    assert stop.value.code == 0
    lines = click.unstyle(capsys.readouterr().out).splitlines()
    assert lines[0].split() == ["rank", "similarity", "path"]
    assert lines[1].split()[0] == "1"
    assert lines[1].endswith("02.png")
    assert len(lines) == 3


def test_the_model_may_have_moved(features: Path, photos_folder: Path, model: str, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    embed(moved.with_suffix(".parquet"), opsin.load(model), photos_folder, model=str(tmp_path / "was here"))
    photo = photos_folder / "02.png"
    result = search(moved.with_suffix(".parquet"), "--like", photo)
    assert result.exit_code == 4
    assert "It made the features: if it is elsewhere now, say where with --model." in result.stderr
    rows = records(search(moved.with_suffix(".parquet"), "--like", photo, "--model", model))
    assert rows == records(search(features, "--like", photo))


def test_another_model_is_refused(features: Path, photos_folder: Path, model: str) -> None:
    result = search(features, "--like", photos_folder / "02.png", "--model", "opsin/vit-tiny")
    assert result.exit_code == 4
    ours, theirs = opsin.load(model).source.sha256, opsin.load().source.sha256
    assert f"with sha256 {ours}; opsin/vit-tiny has {theirs}" in result.stderr


def test_features_that_do_not_say_what_made_them(model: str, photos_folder: Path, tmp_path: Path) -> None:
    embed(tmp_path / "f.parquet", opsin.load(model), photos_folder)
    table = pq.read_table(tmp_path / "f.parquet").replace_schema_metadata(None)
    pq.write_table(table, tmp_path / "bare.parquet")
    result = search(tmp_path / "bare.parquet", "--like", photos_folder / "02.png", "--model", model)
    assert result.exit_code == 2
    assert "bare.parquet does not say which model made it" in result.stderr
    assert search(tmp_path / "bare.parquet", "--duplicates").exit_code == 0  # which needs no model


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of --like, --label and --duplicates: what is to be found."),
        (["--label", "class 1", "--duplicates", "0.9"], 2, "give one of --like, --label and --duplicates"),
        (["--like", "nowhere.png"], 3, "nowhere.png"),
        (["--label", "clas 1"], 2, 'no class "clas 1" among the 7 of this model. Did you mean "class 1"'),
        (["--label", ""], 2, 'no class "" among the 7 of this model.'),
        (["--duplicates", "1.2"], 2, '"1.2" is not a similarity above 0 and at most 1, such as 0.97.'),
        (["--duplicates", "photos"], 2, "Without one, --duplicates stands behind the features."),
        (["--label", "1", "--html", "page.htm"], 2, '"page.htm" does not end in .html.'),
        (["--label", "1", "--html", "none/page.html"], 2, 'the folder "none" does not exist.'),
        (["--label", "1", "--out", "hits.txt"], 2, '"hits.txt" ends in ".txt". Known: .jsonl, .csv, .parquet.'),
        (["--label", "1", "--top-k", "0"], 2, "0 is not in the range x>=1"),
        (["--label", "1", "--device", "abacus"], 2, 'device "abacus" cannot be used'),
    ],
)
def test_what_is_refused(
    features: Path, arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = search(features, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_features(tmp_path: Path) -> None:
    result = search(tmp_path / "nowhere", "--duplicates")
    assert result.exit_code == 2
    assert 'nowhere" does not exist. Features are made with: opsin embed PHOTOS --out DIR' in result.stderr


def test_a_result_that_cannot_be_written(features: Path, tmp_path: Path) -> None:
    (tmp_path / "hits.csv").mkdir()
    (tmp_path / "hits.csv" / "in the way").touch()
    result = search(features, "--label", "1", "--out", tmp_path / "hits.csv")
    assert result.exit_code == 2  # a folder is no file
    result = search(features, "--label", "1", "--html", "/proc/page.html")
    assert result.exit_code == 1
    assert "/proc/page.html cannot be written" in result.stderr


def test_the_index_may_be_asked_for(features: Path, photos_folder: Path) -> None:
    pytest.importorskip("usearch", reason="the index is usearch's: pip install 'opsin[search]'")
    exact = records(search(features, "--like", photos_folder / "04.png", "--no-index"))
    asked = records(search(features, "--like", photos_folder / "04.png", "--index"))
    assert asked[0]["path"] == exact[0]["path"]
    assert len(list(features.parent.glob(".features.parquet-*.usearch"))) == 1


def test_help_does_not_import_torch() -> None:
    code = "import sys\nfrom opsin.cli.search import search\nsearch(['--help'], standalone_mode=False)\n"
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, capture_output=True)
