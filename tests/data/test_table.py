"""Tables of paths, and images inside Parquet files."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin.data import open_samples, table
from opsin.data import samples as samples_module
from opsin.errors import DataError, ImageCorrupt, ImageNotFound, ImageTooLarge, ImageUnreadable, MissingExtra

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

Fill = Callable[..., None]
Picture = Callable[[int], bytes]


def written(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return str(path)


# ---- paths


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "Path,Label\nb/2.png,dog\na/1.png,cat\n\nc 3.png,dog\n"),
        ("t.csv", "label;file_name\ndog;b/2.png\ncat;a/1.png\ndog;c 3.png\n"),
        ("t.tsv", "filepath\tx\ttarget\nb/2.png\t\tdog\na/1.png\t\tcat\nc 3.png\t\tdog\n"),
        ("t.csv", '\ufeffimage,class\n"b/2.png","dog"\na/1.png,cat\nc 3.png,dog'),
        ("t.jsonl", '{"image": "b/2.png", "label": "dog"}\n{"label": "cat", "image": "a/1.png"}\n\n'
                    '{"image": "c 3.png", "label": "dog"}'),
    ],
)  # fmt: skip
def test_paths_and_classes(tmp_path: Path, fill: Fill, name: str, text: str) -> None:
    fill(tmp_path, "b/2.png", "a/1.png", "c 3.png")
    found = pickle.loads(pickle.dumps(open_samples(written(tmp_path / name, text))))
    assert found.labels.names == ("cat", "dog")
    assert found.targets.tolist() == [1, 0, 1]
    assert [found.source(i) for i in range(3)] == [f"{tmp_path}/{image}" for image in ("b/2.png", "a/1.png", "c 3.png")]
    assert found.held_out is None


def test_parquet_of_paths(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "1.png", "2.png")
    columns = {"path": ["1.png", "2.png"], "label": [[3, 5], [5]], "split": ["train", "validation"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = open_samples(str(tmp_path / "t.parquet"))
    assert (found.targets.tolist(), found.labels.names) == ([[1, 1], [0, 1]], ("3", "5"))
    assert found.held_out is not None and found.held_out.tolist() == [False, True]


def test_split_column(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, *(f"{i}.png" for i in range(5)))
    rows = ["0.png,10,train", "1.png,9,val", "2.png,9,test", "3.png,2,train", "4.png,10,val"]
    path = written(tmp_path / "t.csv", "\n".join(["path,label,split", *rows]))
    found = open_samples(path)
    assert [Path(found.key(i)).name for i in range(len(found))] == ["0.png", "1.png", "3.png", "4.png"]
    assert found.labels.names == ("2", "9", "10")  # by size
    assert (found.targets.tolist(), found.held_out.tolist()) == ([2, 1, 0, 2], [False, True, False, True])  # type: ignore[union-attr]
    test = open_samples(path, split="test")
    assert (len(test), test.targets.tolist(), test.labels.names) == (1, [1], ("2", "9", "10"))  # the table's classes
    with pytest.raises(DataError, match='no split "holdout". There is: test, train, val'):
        open_samples(path, split="holdout")


def test_several_tables_are_splits_by_their_names(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "x/1.png", "y/1.png")
    paths = [written(tmp_path / "x" / "train.csv", "path,label\n1.png,a\n"),
             written(tmp_path / "y" / "val.csv", "label,path\nb,1.png\n")]  # fmt: skip
    found = open_samples(paths)
    assert [found.key(i) for i in range(2)] == [f"{tmp_path}/x/1.png", f"{tmp_path}/y/1.png"]
    assert (found.targets.tolist(), found.labels.names) == ([0, 1], ("a", "b"))
    assert found.held_out is not None and found.held_out.tolist() == [False, True]


def test_several_classes_an_image(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "1.png", "2.png", "3.png")
    cells = open_samples(written(tmp_path / "a.csv", "path,label\n1.png,cat; dog\n2.png,\n3.png,bird|dog\n"))
    assert cells.labels.multi_label and cells.labels.names == ("bird", "cat", "dog")
    assert cells.targets.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 1]]
    text = "path,width,dog,bird,cat\n1.png,640,1,0,1\n2.png,480,0,0.0,0\n3.png,333,TRUE,1,0\n"
    columns = open_samples(written(tmp_path / "b.csv", text))
    assert columns.labels.names == ("dog", "bird", "cat")  # in the order of the columns; width is none
    assert columns.targets.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert columns.labels.multi_label and columns.targets.dtype == np.uint8


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_in_a_folder_of_images(tmp_path: Path, fill: Fill, suffix: str) -> None:
    fill(tmp_path, "train/1.png", "train/2.png", "val/1.png")
    for part, rows in (("train", [("2.png", "b"), ("1.png", "a")]), ("val", [("1.png", "a")])):
        path = tmp_path / part / f"metadata.{suffix}"
        if suffix == "csv":
            written(path, "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
        elif suffix == "jsonl":
            written(path, "\n".join(json.dumps({"file_name": name, "label": label}) for name, label in rows))
        else:
            pq.write_table(pa.table({"file_name": [n for n, _ in rows], "label": [c for _, c in rows]}), path)
    found = open_samples(str(tmp_path))
    assert [found.key(i) for i in range(3)] == [f"{tmp_path}/{n}" for n in ("train/2.png", "train/1.png", "val/1.png")]
    assert (found.targets.tolist(), found.held_out.tolist()) == ([1, 0, 0], [False, False, True])  # type: ignore[union-attr]
    assert open_samples(str(tmp_path), split="val").targets.tolist() == [0]


def test_metadata_without_classes_leaves_the_folders(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "a/1.png", "b/1.png")
    written(tmp_path / "metadata.csv", "file_name,caption\na/1.png,an ant\nb/1.png,a bee\n")
    assert open_samples(str(tmp_path)).labels.names == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty. Right is a first line with the names"),
        ("path,label\n", "has no rows. Right is a header"),
        ("1.png,cat\n2.png,dog\n", r"no column of paths: looked for path, .*; there are 1\.png, cat\. Give one"),
        ("path,kind\n1.png,cat\n", "no column of classes: looked for label, .* columns and more of 0 and 1; there are"),
        ("path,a,b\n1.png,1,2\n", "no column of classes"),
        ("path,label\n1.png,cat,x\n", r"row 1 has 3 cells, the header 2\. Put cells"),
        ("path,label\n1.png,cat\n,dog\n", "row 2 has the path ''. Give it one"),
        ("path,label\n1.png,cat\n2.png, \n", "row 2 has no class"),
        ("path,label\n1.png,cat\n2.png,cat\n1.png,dog\n", r"names .*/1\.png twice. Give an image one row; several"),
        ("path,label\nhttp://x.org/1.png,cat\n", r"row 1 has the address http://x\.org/1\.png\. Fetch"),
        ("path,label\ngone1,cat\ngone2,cat\n", r"none of the first 2 images of .* is there; the first is .*/gone1\."),
        ("path,label,split\n1.png,cat,fold1\n2.png,cat,fold2\n", "has the splits fold1, fold2 and none to train on"),
        ("path,label\n\"" + "x" * 140_000, "cannot be read as CSV in UTF-8: field larger"),
    ],
)  # fmt: skip
def test_a_table_that_will_not_do(tmp_path: Path, fill: Fill, text: str, message: str) -> None:
    fill(tmp_path, "1.png", "2.png")
    with pytest.raises(DataError, match=message):
        open_samples(written(tmp_path / "t.csv", text))


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as CSV in UTF-8: .* Save it as that"):
        open_samples(written(tmp_path / "t.csv", "path,label\né.png,a", encoding="latin-1"))
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: .* Right is one JSON object a line"):
        open_samples(written(tmp_path / "t.jsonl", '{"path": "1", "label": "a"}\n{"path"'))
    with pytest.raises(DataError, match=r"line 1: \[1\] is no object"):
        open_samples(written(tmp_path / "t.jsonl", "[1]"))
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as Parquet: .* Fetch or make it again"):
        open_samples(written(tmp_path / "t.parquet", "PAR1 but not"))


# ---- image bytes


def parquet(
    path: Path, images: list[bytes | None], labels: list[Any], *, names: list[str] | None = None, group: int = 2,
    paths: list[str | None] | None = None,
) -> Path:  # fmt: skip
    cells = [{"bytes": data, "path": at} for data, at in zip(images, paths or [None] * len(images), strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"image": pa.array(cells, kind), "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        rows = rows.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=group)
    return path


def test_image_bytes(tmp_path: Path, picture: Picture) -> None:
    path = parquet(tmp_path / "x.parquet", [picture(i) for i in range(5)], [1, 0, 1, 1, 0], names=["cat", "dog"])
    found = pickle.loads(pickle.dumps(open_samples(str(path))))
    assert (found.labels.names, found.targets.tolist()) == (("cat", "dog"), [1, 0, 1, 1, 0])
    for i in (4, 0, 3, 1, 2, 4):
        assert found.source(i) == picture(i)
    assert [found.key(i) for i in (0, 4)] == [f"{path}::0", f"{path}::4"]
    assert found.held_out is None and found.identity() == open_samples(str(path)).identity()


@pytest.mark.parametrize("place", ["", "data/"])
def test_a_folder_of_parquet_files(tmp_path: Path, picture: Picture, place: str) -> None:
    def part(name: str, seeds: range) -> None:
        parquet(tmp_path / f"{place}{name}.parquet", [picture(i) for i in seeds], [f"c{i % 3}" for i in seeds])

    part("train-00000-of-00002", range(5))
    part("train-00001-of-00002", range(5, 8))
    part("validation-00000-of-00001", range(8, 11))
    part("test-00000-of-00001", range(20, 23))
    found = open_samples(str(tmp_path))
    assert len(found) == 11 and found.labels.names == ("c0", "c1", "c2")
    assert found.held_out is not None and found.held_out.tolist() == [False] * 8 + [True] * 3
    assert [found.source(i) for i in range(11)] == [picture(i) for i in range(11)]
    assert found.key(6).endswith("train-00001-of-00002.parquet::1")
    assert found.targets.tolist() == [i % 3 for i in range(11)]
    test = open_samples(str(tmp_path), split="test")
    assert [test.source(i) for i in range(3)] == [picture(i) for i in range(20, 23)]
    assert len({found.key(i) for i in range(11)}) == 11


def test_lists_of_classes_and_plain_bytes(tmp_path: Path, picture: Picture) -> None:
    features = {"label": {"_type": "Sequence", "feature": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}}
    rows = pa.table({"jpg": [picture(0), picture(1)], "label": [[2], [0, 1]]})
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(rows.replace_schema_metadata(meta), tmp_path / "x.parquet")
    found = open_samples(str(tmp_path / "x.parquet"))
    assert found.targets.tolist() == [[0, 0, 1], [1, 1, 0]] and found.labels.multi_label
    assert found.source(1) == picture(1)


def test_cells_without_bytes(tmp_path: Path, picture: Picture) -> None:
    paths = ["in/1.png", None, "https://x.org/1.png", None]
    found = open_samples(
        str(parquet(tmp_path / "x.parquet", [None, None, None, picture(3)], [0, 0, 0, 0], paths=paths))
    )
    assert found.source(0) == f"{tmp_path}/in/1.png"
    with pytest.raises(ImageUnreadable, match=r"x\.parquet::1: the cell holds no bytes\."):
        found.source(1)
    with pytest.raises(ImageUnreadable, match=r"x\.parquet::2: the cell holds no bytes, and the address https://x"):
        found.source(2)
    assert found.source(3) == picture(3)


def test_the_cache_of_row_groups_does_not_grow(
    tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        reads.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr(table, "_groups", type(table._groups)())
    images: list[bytes | None] = [picture(i).ljust(1000, b"\0") for i in range(12)]
    found = open_samples(str(parquet(tmp_path / "x.parquet", images, [0] * 12, group=3)))
    monkeypatch.setattr(table, "_CACHE_BYTES", 7000)  # two groups of 3 × 1000
    for i in (0, 1, 3, 2, 6, 0, 4):
        found.source(i)
    assert reads == [0, 1, 2, 1]  # a group that is used again stays
    assert len(table._groups) == 2
    monkeypatch.setattr(table, "_CACHE_BYTES", 1)
    assert found.source(9) == images[9] and len(table._groups) == 1


def test_a_parquet_file_that_changes_or_lies(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "x.parquet", [picture(i) for i in range(4)], [0, 0, 1, 1])
    found = open_samples(str(path))
    monkeypatch.setattr(samples_module, "MAX_IMAGE_BYTES", 50)
    with pytest.raises(ImageTooLarge, match=r"x\.parquet::0: \d+ bytes; the limit"):
        found.source(0)
    monkeypatch.undo()
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises((ImageCorrupt, ImageUnreadable), match=r"x\.parquet::0: row group 0 of .* cannot be read"):
        open_samples(str(path)).source(0)
    path.unlink()
    with pytest.raises(ImageNotFound, match=r"x\.parquet::2: .*x\.parquet is gone"):
        found.source(2)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, -1], ["a", "b"], r"row 2 has the class -1 \(the mark of an image without a class\); 2 names"),
        ([0, None], ["a", "b"], "row 2 has no class"),
        ([0, 2], ["a", "b"], "row 2 has the class 2; 2 names"),
    ],
)
def test_classes_that_will_not_do(
    tmp_path: Path, picture: Picture, labels: list, names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_samples(str(parquet(tmp_path / "x.parquet", [picture(0), picture(1)], labels, names=names)))


def test_parquet_files_that_will_not_do(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": [picture(0)], "kind": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match="has no column of classes: looked for image bytes and for label, .* image, kind"
    ):
        open_samples(str(tmp_path / "a.parquet"))
    first = parquet(tmp_path / "b.parquet", [picture(0)], [0], names=["a", "b"])
    second = parquet(tmp_path / "c.parquet", [picture(0)], [0], names=["b", "a"])
    with pytest.raises(DataError, match=r"c\.parquet names other classes than .*b\.parquet"):
        open_samples([str(first), str(second)])
    monkeypatch.setattr(table, "_MAX_GROUP_BYTES", 10)
    with pytest.raises(DataError, match=r"row group 0 holds .* Write the file again with row_group_size=100"):
        open_samples(str(first))


def test_pyarrow_is_optional(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "x.parquet", [picture(0)], [0])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        MissingExtra, match=r'pyarrow is not installed. Install it with: pip install "opsin\[parquet\]"'
    ):
        open_samples(str(path))
