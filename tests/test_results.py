"""Every record of every kind comes back from every format."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from opsin.results import ROW_GROUP, json_line, writer

BEST = [{"label": "虎斑猫", "score": 0.75, "index": 281}, {"label": "b", "score": 0.25, "index": 3}]
GOOD = {"path": "a,\"b\".jpg", "ok": True, "label": "虎斑猫", "index": 281, "score": 0.75, "topk": BEST,
        "width": 4, "height": 3, "ms": 1.5}  # fmt: skip
BAD = {"path": "x\udcff.jpg", "ok": False, "error": {"type": "corrupt", "message": "cut\nshort"}}
VECTOR = {"path": "v.jpg", "ok": True, "embedding": np.array([0.5, -2.0], np.float32), "width": 4, "height": 3, "ms": 1}
RUN = {"task": "classify", "model": "m", "preprocess_hash": "abc"}


def write(path: Path, records: list[dict], run: dict) -> None:
    with writer(path, run=run) as put:
        for record in records:
            put(record)


def test_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "r.jsonl", [GOOD, BAD, VECTOR], RUN)
    lines = (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()
    assert "虎斑猫" in lines[0]
    assert [json.loads(line) for line in lines] == [GOOD, BAD, VECTOR | {"embedding": [0.5, -2.0]}]
    assert json.loads((tmp_path / "r.jsonl.run.json").read_text()) == RUN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.jsonl", "r.jsonl.run.json"]


def test_csv(tmp_path: Path) -> None:
    write(tmp_path / "r.csv", [GOOD, BAD], RUN)
    with (tmp_path / "r.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        good, bad = csv.DictReader(file)
    assert (good["path"], good["ok"], good["label"], good["index"]) == (GOOD["path"], "True", "虎斑猫", "281")
    assert json.loads(good["topk"]) == BEST
    assert (bad["path"], bad["ok"], bad["error_type"], bad["error_message"]) == (
        "x\udcff.jpg", "False", "corrupt", "cut\nshort")  # fmt: skip
    write(tmp_path / "e.csv", [VECTOR], RUN | {"task": "embed"})
    assert '"[0.5, -2.0]"' in (tmp_path / "e.csv").read_text()


def test_parquet(tmp_path: Path) -> None:
    many = [GOOD | {"index": i} for i in range(ROW_GROUP + 3)]
    write(tmp_path / "r.parquet", [BAD, *many], RUN)
    table = pq.read_table(tmp_path / "r.parquet")
    rows = table.to_pylist()
    assert [row["index"] for row in rows] == [None, *range(ROW_GROUP + 3)]
    assert rows[0]["error_type"] == "corrupt"
    assert rows[0]["path"] == "x\\udcff.jpg"
    assert rows[1]["topk"] == BEST
    assert json.loads(table.schema.metadata[b"opsin"]) == RUN
    write(tmp_path / "e.parquet", [VECTOR, BAD], RUN | {"task": "embed", "embedding_dim": 2})
    vectors = pq.read_table(tmp_path / "e.parquet")
    assert str(vectors.schema.field("embedding").type) == "fixed_size_list<element: float>[2]"
    assert vectors["embedding"].to_pylist() == [[0.5, -2.0], None]


def test_what_was_asked_for_has_columns(tmp_path: Path) -> None:
    """Known and kind, where `run` says so and nowhere else."""
    kind = {"label": "家猫", "wnid": "n02121808", "score": 0.5}
    rows = [GOOD | {"known": False, "known_score": 0.25, "kind": kind}, GOOD | {"kind": None}, BAD]
    asked = RUN | {"unknown": 0.05, "kind": 0.5}
    for name in ("r.csv", "r.parquet"):
        write(tmp_path / name, rows, asked)
        write(tmp_path / f"plain-{name}", rows, RUN)
    with (tmp_path / "r.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        first, second, bad = csv.DictReader(file)
    assert (first["known"], first["known_score"], json.loads(first["kind"])) == ("False", "0.25", kind)
    assert (second["kind"], bad["known"]) == ("", "")
    table = pq.read_table(tmp_path / "r.parquet")
    assert table["known"].to_pylist() == [False, None, None]
    assert table["known_score"].to_pylist() == [0.25, None, None]
    assert table["kind"].to_pylist() == [kind, None, None]
    assert not {"known", "known_score", "kind"} & set(pq.read_table(tmp_path / "plain-r.parquet").column_names)
    assert "known" not in (tmp_path / "plain-r.csv").read_text(errors="surrogateescape").splitlines()[0]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_interrupted_file_holds_the_records_so_far(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"r.{suffix}"
    with pytest.raises(KeyboardInterrupt), writer(path, run=RUN) as put:
        put(GOOD)
        raise KeyboardInterrupt
    rows = pq.read_table(path).num_rows if suffix == "parquet" else len(path.read_text().strip().splitlines())
    assert rows == (2 if suffix == "csv" else 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_unknown_format_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r'"r.xlsx" ends in ".xlsx". Known: .jsonl, .csv, .parquet.'),
        writer(tmp_path / "r.xlsx", run=RUN),
    ):
        pass


def test_a_path_that_is_not_utf8_survives_json() -> None:
    assert json.loads(json_line(BAD))["path"] == "x\udcff.jpg"
    json_line(BAD).encode()


def test_an_error_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("yesterday")
    with pytest.raises(RuntimeError, match="out of memory"), writer(path, run=RUN) as put:
        put(GOOD)
        raise RuntimeError("out of memory")
    assert path.read_text() == "yesterday"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_rows_are_written_doubles_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table = pq.ParquetWriter.write_table

    def interrupted(self: pq.ParquetWriter, table: object) -> None:
        write_table(self, table)
        monkeypatch.undo()
        raise KeyboardInterrupt  # where Python delivers a Ctrl-C that came during the call

    monkeypatch.setattr(pq.ParquetWriter, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "r.parquet", run=RUN) as put:
        for i in range(ROW_GROUP + 1):
            put(GOOD | {"index": i})
    assert pq.read_table(tmp_path / "r.parquet")["index"].to_pylist() == list(range(ROW_GROUP))
