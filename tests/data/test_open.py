"""Telling layouts apart, and what is said where there is none."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opsin.data import open_samples
from opsin.errors import DataError


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no data is given. Give a folder"),
        ("gone", r"there is no gone\. Give a folder, a table"),
        ("gone/t.csv", r"there is no gone/t\.csv"),
        ("a/b/c", "there is no a/b/c"),
        ("x.tar.gz", "a compressed tar file, which cannot be read at random. Unpack it"),
        ("https://x.org/a.zip", "not the address of a .tar shard, the only kind that is read from a server"),
        ("gone-{0..3}.tar", r"there is no gone-0\.tar"),
    ],
)
def test_nothing_there(data: str | list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        open_samples(data)


def test_kinds_that_do_not_go_together(tmp_path: Path, fill: Callable[..., None]) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "t.csv").write_text("path,label\na/1.png,x\n")
    (tmp_path / "t.md").touch()
    with pytest.raises(DataError, match=r"2 paths are given, of the kinds table, tar: .*t\.csv, x\.tar\. Several can"):
        open_samples([str(tmp_path / "t.csv"), "x.tar"])
    with pytest.raises(DataError, match="is a folder, and a folder is given alone"):
        open_samples([str(tmp_path), str(tmp_path)])
    with pytest.raises(DataError, match=r"t\.md is no labelled set. Right is"):
        open_samples(str(tmp_path / "t.md"))
    assert len(open_samples([str(tmp_path)])) == 2
    assert len(open_samples(tmp_path)) == 2  # type: ignore[arg-type]


def test_torch_is_not_imported_by_the_package() -> None:
    code = "import sys, opsin.data, opsin.data.samples; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_patterns_of_tables(tmp_path: Path, fill: Callable[..., None]) -> None:
    fill(tmp_path, "1.png", "2.png", "3.png")
    for i, name in enumerate(("train-0", "train-1", "val-0"), 1):
        (tmp_path / f"{name}.csv").write_text(f"path,label\n{i}.png,{'ab'[i % 2]}\n")
    assert open_samples(f"{tmp_path}/*.csv").targets.tolist() == [1, 0, 1]
    assert open_samples(f"{tmp_path}/train-{{1..0}}.csv").targets.tolist() == [0, 1]


def test_other_folders_are_not_searched_for_shards(tmp_path: Path, fill: Callable[..., None]) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "0.tar").touch()
    (tmp_path / "b" / "0.parquet").touch()
    assert open_samples(str(tmp_path)).labels.names == ("a", "b")
