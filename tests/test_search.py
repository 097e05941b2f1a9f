"""Search: against distances computed directly, in every stored precision; groups; what is refused; the page."""

import builtins
import copy
import csv
import glob
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin import search
from opsin.checkpoints import Checkpoint
from opsin.errors import DataError, ImageError, ImageNotFound, MissingExtra, ModelError, NoHead
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.results import writer
from opsin.search import Features
from opsin.sheets import Block, Cell

pa = pytest.importorskip("pyarrow", reason="features are Parquet: pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="features are Parquet: pip install pyarrow")

DIM = 13
MANIFEST = {"task": "embed", "model": "test/noise", "sha256": "ab" * 32, "preprocess_hash": "cd" * 8}


def vectors_of(n: int, dim: int = DIM, seed: int = 0) -> np.ndarray:
    """With lengths from 0.1 to 10, which a cosine must not see."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, dim)) * 10 ** rng.uniform(-1, 1, (n, 1))
    return vectors.astype(np.float32)


def cosines(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(Q, D), (n, D) → (Q, n) float64."""
    queries, vectors = (each.astype(np.float64) for each in (queries, vectors))
    queries, vectors = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, vectors))
    return queries @ vectors.T


def put(
    path: Path,
    vectors: np.ndarray,
    *,
    dtype: str = "float32",
    holes: tuple[int, ...] = (),
    first: int = 0,
    made_by: dict[str, Any] | None = None,
    row_group: int = 7,
) -> np.ndarray:
    """Write one Parquet part; rows in `holes` have no embedding. Returns what is stored, (n, D) float32."""
    n, dim = vectors.shape
    scale = np.abs(vectors).max(1) / 127
    if dtype == "int8":
        numbers = np.rint(vectors / scale[:, None]).astype(np.int8)
        stored = numbers.astype(np.float32) * scale[:, None]
    else:
        numbers = vectors.astype(dtype)
        stored = numbers.astype(np.float32)
    kind = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[dtype]
    ok = [row not in holes for row in range(n)]
    lists = [row if there else None for row, there in zip(numbers, ok, strict=True)]
    columns = {
        "path": pa.array([f"photos/{first + row:04}.jpg" for row in range(n)]),
        "ok": pa.array(ok),
        "embedding": pa.array(lists, pa.list_(kind, dim)),
        "error_type": pa.array([None if there else "corrupt" for there in ok], pa.string()),
    }
    if dtype == "int8":
        columns["scale"] = pa.array(
            [float(s) if there else None for s, there in zip(scale, ok, strict=True)], pa.float32()
        )
    table = pa.table(columns)
    if made_by is not None:
        table = table.replace_schema_metadata({"opsin": json.dumps(made_by)})
    pq.write_table(table, path, row_group_size=row_group)
    return stored


def folder_of(
    folder: Path,
    vectors: np.ndarray,
    *,
    cuts: tuple[int, ...] = (),
    holes: tuple[int, ...] = (),
    dtype: str = "float32",
) -> np.ndarray:
    """A folder of parts as `opsin embed --out folder/` leaves it; returns what is stored."""
    folder.mkdir()
    (folder / "_manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "_inputs.jsonl").write_text("{}\n")
    stored = []
    for start, stop in zip((0, *cuts), (*cuts, len(vectors)), strict=True):
        mine = tuple(hole - start for hole in holes)
        name = folder / f"part-000000-{start:08d}-{stop:08d}.parquet"
        stored.append(put(name, vectors[start:stop], dtype=dtype, holes=mine, first=start))
    return np.concatenate(stored)


# ── nearest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_nearest_are_those_of_float64(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", 5 * DIM)  # blocks of five rows, across row groups of seven
    holes = (0, 3, 100, 101, 210)
    stored = folder_of(tmp_path / "f", vectors_of(211), cuts=(83, 90), holes=holes, dtype=dtype)
    features = search.open(tmp_path / "f")
    queries = vectors_of(7, seed=1)
    rows, similarities = features.nearest(queries, 11)
    expected = cosines(queries, stored)
    expected[:, list(holes)] = -2
    best = np.argsort(-expected, axis=1)[:, :11]
    assert rows.dtype == np.int64
    assert similarities.dtype == np.float32
    np.testing.assert_array_equal(rows, best)
    np.testing.assert_allclose(similarities, np.take_along_axis(expected, best, 1), atol=1e-6)
    assert features.paths(rows[2]) == [f"photos/{row:04}.jpg" for row in best[2]]


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", vectors_of(29), cuts=(11,), holes=(2, 17))
    features = search.open(tmp_path / "f")
    parts = sorted((tmp_path / "f").glob("*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    assert (len(features), features.dim) == (29, DIM)
    for row in (0, 3, 10, 11, 18, 28):
        vector = np.array(table["embedding"][row].as_py())
        assert features.nearest(vector, 1)[0].tolist() == [[row]]
        assert features.paths([row]) == [table["path"][row].as_py()]


def test_one_query_more_neighbours_than_images_and_equal_ones(tmp_path: Path) -> None:
    vectors = vectors_of(5)
    vectors[3] = 2 * vectors[1]
    vectors[4] = 0
    folder_of(tmp_path / "f", vectors, holes=(2,))
    rows, similarities = search.open(tmp_path / "f").nearest(vectors[1], 10)
    assert rows.shape == similarities.shape == (1, 4)
    assert rows[0, :2].tolist() == [1, 3]  # of equal ones the lower row
    assert similarities[0, :2] == pytest.approx([1, 1], abs=1e-6)
    assert similarities[0, rows[0] == 4] == [0]  # nothing is similar to zeros


def test_no_more_than_a_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "f.parquet", vectors_of(1009), row_group=1009)  # a row group is all there is
    features = search.open(tmp_path / "f.parquet")
    monkeypatch.setattr(search, "BLOCK", 101 * DIM)
    lengths = [len(rows) for rows, _ in features.blocks()]
    assert (max(lengths), sum(lengths)) == (101, 1009)
    steps: list[tuple[int, int]] = []
    features.nearest(vectors_of(3), 2, on_rows=lambda done, total: steps.append((done, total)))
    assert len(steps) == 10
    assert steps[-1] == (1009, 1009)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones(DIM), 0, "k is 0; it must be at least 1."),
        (np.ones((2, 11)), 3, r"queries are \(2, 11\); these features have 13 numbers, so \(Q, 13\)."),
        (np.zeros(DIM), 3, "a query is not finite, or is zero"),
        (np.full(DIM, np.nan), 3, "a query is not finite, or is zero"),
    ],
)
def test_queries_that_are_refused(tmp_path: Path, queries: np.ndarray, k: int, message: str) -> None:
    put(tmp_path / "f.parquet", vectors_of(3))
    with pytest.raises(ValueError, match=message):
        search.open(tmp_path / "f.parquet").nearest(queries, k)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_embed_writes_today_is_read(tmp_path: Path) -> None:
    vectors = vectors_of(17)
    run = MANIFEST | {"embedding_dim": DIM}
    with writer(tmp_path / "f.parquet", run=run) as write:
        for row, vector in enumerate(vectors):
            write({"path": f"{row}.png", "ok": True, "embedding": vector, "width": 3, "height": 5, "ms": 1.0})
        write({"path": "bad.png", "ok": False, "error": {"type": "corrupt", "message": "cut short"}})
    features = search.open(tmp_path / "f.parquet")
    assert features.manifest == run
    rows, _ = features.nearest(vectors[11], 17)
    assert rows[0, 0] == 11
    assert 17 not in rows  # the one without an embedding


def test_the_manifest_comes_from_the_folder_the_schema_or_the_sidecar(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", vectors_of(3))
    put(tmp_path / "schema.parquet", vectors_of(3), made_by=MANIFEST)
    put(tmp_path / "sidecar.parquet", vectors_of(3))
    (tmp_path / "sidecar.parquet.run.json").write_text(json.dumps(MANIFEST))
    for name in ("f", "schema.parquet", "sidecar.parquet"):
        assert search.open(tmp_path / name).manifest == MANIFEST
    put(tmp_path / "none.parquet", vectors_of(3))
    assert search.open(tmp_path / "none.parquet").manifest == {}


def bad_folders(path: Path) -> Iterator[tuple[str, str]]:
    """(name in `path`, what is said of it)"""
    yield "featurs", '"featurs" does not exist. Did you mean ".*features"\\? Features are made with: opsin embed'
    put(path / "a.csv", vectors_of(2))
    yield "a.csv", "is not .parquet, which search reads"
    (path / "none").mkdir()
    yield "none", "has no Parquet parts; search reads Parquet"
    (path / "jsonl").mkdir()
    (path / "jsonl" / "part-000000-00000000-00000003-end.jsonl").write_text("{}\n")
    yield "jsonl", "has .jsonl parts; search reads Parquet. Make it with: opsin embed PHOTOS --out DIR"
    pq.write_table(pa.table({"path": ["a"], "label": ["cat"]}), path / "labels.parquet")
    yield "labels.parquet", 'holds labels and no "embedding". Make embeddings with: opsin embed'
    pq.write_table(pa.table({"name": ["a"], "number": [3]}), path / "other.parquet")
    yield "other.parquet", 'holds the columns name, number and no "path"'
    put(path / "task.parquet", vectors_of(2), made_by={"task": "classify"})
    yield "task.parquet", "is of `opsin classify` and holds no embeddings"
    pq.write_table(pa.table({"path": ["a"], "embedding": [[1.0, 2.0]]}), path / "list.parquet")
    yield "list.parquet", "an embedding is list<.*double>; it has to be a list of a fixed size, of floats or int8"
    pq.write_table(
        pa.table({"path": ["a"], "embedding": pa.array([[1]], pa.list_(pa.int32(), 1))}), path / "int.parquet"
    )
    yield "int.parquet", "an embedding is fixed_size_list<.*int32>"
    (path / "widths").mkdir()
    put(path / "widths" / "part-0.parquet", vectors_of(2, 3))
    put(path / "widths" / "part-1.parquet", vectors_of(2, 5))
    yield (
        "widths",
        "part-0.parquet has embeddings of 3 numbers, .*part-1.parquet of 5. Features of one folder are of one",
    )
    folder_of(path / "models", vectors_of(2))
    put(path / "models" / "part-1.parquet", vectors_of(2), made_by=MANIFEST | {"sha256": "ef"})
    yield "models", "part-1.parquet has sha256 ef, and what is beside it (ab){32}: vectors of two models"
    put(path / "empty.parquet", vectors_of(0))
    yield "empty.parquet", "has no rows: there is nothing to search. Fill it with: opsin embed PHOTOS --out"
    (path / "cut.parquet").write_bytes((path / "task.parquet").read_bytes()[:-11])
    yield "cut.parquet", "cut.parquet cannot be read: "
    folder_of(path / "json", vectors_of(2))
    (path / "json" / "_manifest.json").write_text('["embed"]')
    pq.write_table(pa.table({"path": ["a"]}).replace_schema_metadata({"opsin": "{"}), path / "metadata.parquet")
    yield "metadata.parquet", "metadata.parquet cannot be read: Expecting property name"
    yield "json", "_manifest.json does not say what made the features: it is not an object"
    (path / "features").mkdir()


def test_what_is_not_features_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features").mkdir()
    generator = bad_folders(Path())
    (tmp_path / "features").rmdir()
    cases = list(generator)
    assert len(cases) == 15
    for name, message in cases:
        with pytest.raises(DataError, match=message):
            search.open(name)


def test_a_file_that_is_damaged_inside(tmp_path: Path) -> None:
    put(tmp_path / "f.parquet", vectors_of(997, 64), row_group=997)
    data = bytearray((tmp_path / "f.parquet").read_bytes())
    data[4:20_000] = bytes(19_996)
    (tmp_path / "f.parquet").write_bytes(data)
    features = search.open(tmp_path / "f.parquet")
    with pytest.raises(DataError, match="f.parquet cannot be read: .* Take its part away, or make it again."):
        features.nearest(np.ones(64))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    vectors = vectors_of(23)
    vectors[19, 5] = value
    folder_of(tmp_path / "f", vectors, cuts=(12,), holes=(14,))
    with pytest.raises(DataError, match=r"part-.*12-.*23.parquet: the embedding of photos/0019.jpg is not finite"):
        search.open(tmp_path / "f").nearest(np.ones(DIM))


def test_images_without_an_embedding(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", vectors_of(3), holes=(0, 1, 2))
    features = search.open(tmp_path / "f")
    with pytest.raises(DataError, match="none of the 3 images of .* has an embedding"):
        features.nearest(np.ones(DIM))
    with pytest.raises(DataError, match="none of the 3 images"):
        features.duplicates()


def test_pyarrow_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "f.parquet", vectors_of(3))
    without(monkeypatch, "pyarrow")
    with pytest.raises(MissingExtra, match=r'pip install "opsin\[parquet\]"'):
        search.open(tmp_path / "f.parquet")


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def fake(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", fake)


# ── duplicates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def with_copies(n: int, copies: dict[int, int], *, noise: float = 0.01) -> np.ndarray:
    """Random vectors; row → the row that it is nearly a copy of."""
    vectors = vectors_of(n)
    rng = np.random.default_rng(5)
    for row, of in copies.items():
        vectors[row] = (vectors[of] / np.linalg.norm(vectors[of]) + noise * rng.standard_normal(DIM)) * rng.uniform(
            1, 9
        )
    return vectors


def test_groups_of_near_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = {40: 3, 41: 3, 200: 3, 77: 76, 150: 149}
    stored = folder_of(tmp_path / "f", with_copies(211, copies), cuts=(50, 120), holes=(0, 9, 160))
    for block in (2**22, 50):  # all at once; and blocks of one row
        monkeypatch.setattr(search, "BLOCK", block)
        groups = search.open(tmp_path / "f").duplicates(0.97)
        assert [group.rows.tolist() for group in groups] == [[3, 40, 41, 200], [76, 77], [149, 150]]
        for group in groups:
            expected = cosines(stored[group.rows[:1]], stored[group.rows])[0]
            np.testing.assert_allclose(group.similarities, expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.floats(0.3, 0.99))
def test_the_first_of_each_group_and_the_others_are_a_set_without_duplicates(
    tmp_path_factory: pytest.TempPathFactory, seed: int, threshold: float
) -> None:
    path = tmp_path_factory.mktemp("groups") / "f.parquet"
    stored = put(path, vectors_of(61, 3, seed))  # in three dimensions many are close
    groups = search.open(path).duplicates(threshold)
    close = cosines(stored, stored)
    dropped = np.concatenate([np.empty(0, int), *(group.rows[1:] for group in groups)])
    assert len(np.unique(dropped)) == len(dropped)
    kept = np.setdiff1d(np.arange(61), dropped)
    between = close[np.ix_(kept, kept)] - 3 * np.eye(len(kept))
    assert between.max() < threshold + 2e-6
    for group in groups:
        assert (np.diff(group.rows) > 0).all()
        assert close[group.rows[0], group.rows].min() > threshold - 2e-6


def test_exact_copies_are_found_at_one(tmp_path: Path) -> None:
    vectors = vectors_of(7, 1021)
    put(tmp_path / "f.parquet", np.concatenate([vectors, 3 * vectors]))
    groups = search.open(tmp_path / "f.parquet").duplicates(1.0)
    assert [group.rows.tolist() for group in groups] == [[row, row + 7] for row in range(7)]


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_thresholds_that_are_refused(tmp_path: Path, threshold: float) -> None:
    put(tmp_path / "f.parquet", vectors_of(3))
    with pytest.raises(ValueError, match="a cosine above 0 and at most 1, such as 0.97"):
        search.open(tmp_path / "f.parquet").duplicates(threshold)


# ── index ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def usearch() -> Any:
    return pytest.importorskip("usearch", reason="the index is usearch's: pip install 'opsin[search]'")


def test_the_index_finds_what_comparing_finds(tmp_path: Path, usearch: Any) -> None:
    folder_of(tmp_path / "f", vectors_of(499), cuts=(211,), holes=(3, 400))
    features = search.open(tmp_path / "f")
    queries = vectors_of(11, seed=1)
    rows, similarities = features.nearest(queries, 5)
    near_rows, near = features.nearest(queries, 5, index=True)
    assert (near_rows == rows).mean() > 0.95
    np.testing.assert_allclose(near, similarities, atol=2e-3)
    one, _ = features.nearest(queries[4], 5, index=True)
    assert one.shape == (1, 5)
    assert not {3, 400} & set(features.nearest(queries, 600, index=True)[0].ravel())


def test_the_index_is_kept_and_built_again_when_the_parts_change(tmp_path: Path, usearch: Any) -> None:
    folder_of(tmp_path / "f", vectors_of(31), cuts=(17,))
    steps: list[int] = []
    features = search.open(tmp_path / "f")
    assert len(features.index(lambda done, total: steps.append(done))) == 31
    assert steps[-1] == 31
    [file] = (tmp_path / "f").glob(".search-*.usearch")
    made = file.stat().st_mtime_ns
    assert len(search.open(tmp_path / "f").index(lambda done, total: pytest.fail("built again"))) == 31
    assert file.stat().st_mtime_ns == made

    put(tmp_path / "f" / "part-000001-00000000-00000005.parquet", vectors_of(5, seed=3), first=31)
    features = search.open(tmp_path / "f")
    assert not features._index_path().is_file()
    assert len(features.index()) == 36
    [other] = (tmp_path / "f").glob(".search-*.usearch")
    assert other != file
    rows, _ = features.nearest(vectors_of(5, seed=3)[2], 1, index=True)
    assert rows.tolist() == [[33]]

    put(tmp_path / "one.parquet", vectors_of(3))
    search.open(tmp_path / "one.parquet").index()
    assert len(list(tmp_path.glob(".one.parquet-*.usearch"))) == 1


def test_the_index_is_asked_by_default_only_where_it_is_kept(
    tmp_path: Path, usearch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "f", vectors_of(31))
    features = search.open(tmp_path / "f")
    asked: list[int] = []
    ask = Features._ask

    def counted(self: Features, *arguments: Any) -> Any:
        asked.append(1)
        return ask(self, *arguments)

    monkeypatch.setattr(Features, "_ask", counted)
    monkeypatch.setattr(search, "EXACT", 31)
    features.index()
    features.nearest(np.ones(DIM))
    assert not asked
    monkeypatch.setattr(search, "EXACT", 30)
    features.nearest(np.ones(DIM), index=False)
    assert not asked
    features.nearest(np.ones(DIM))
    assert len(asked) == 1
    features._index_path().unlink()
    features.nearest(np.ones(DIM))
    assert len(asked) == 1
    monkeypatch.setattr(search, "EXACT_PAIRS", 30)
    features.duplicates()
    assert len(asked) == 2


def test_groups_by_the_index_are_those_of_comparing(tmp_path: Path, usearch: Any) -> None:
    # more copies than neighbours are asked for, and the first of them not in their middle
    copies = dict.fromkeys([3, *range(100, 200)], 306) | {40: 39, 250: 39}
    folder_of(tmp_path / "f", with_copies(307, copies, noise=0.001), cuts=(130,), holes=(0, 150))
    features = search.open(tmp_path / "f")
    exact, indexed = features.duplicates(0.99), features.duplicates(0.99, index=True)
    assert [group.rows.tolist() for group in indexed] == [group.rows.tolist() for group in exact]
    assert exact[0].rows.tolist() == [3, *(row for row in range(100, 200) if row != 150), 306]
    for a, b in zip(exact, indexed, strict=True):
        np.testing.assert_allclose(a.similarities, b.similarities, atol=1e-3)
    put(tmp_path / "none.parquet", vectors_of(101))
    assert search.open(tmp_path / "none.parquet").duplicates(0.99, index=True) == []


def test_an_index_that_is_damaged(tmp_path: Path, usearch: Any) -> None:
    put(tmp_path / "f.parquet", vectors_of(3))
    put(tmp_path / "g.parquet", vectors_of(3, 5))
    features, other = search.open(tmp_path / "f.parquet"), search.open(tmp_path / "g.parquet")
    other.index()
    other._index_path().rename(features._index_path())
    with pytest.raises(DataError, match=r"\.f\.parquet-.*usearch is damaged. Delete it: it is built again"):
        features.nearest(np.ones(DIM), index=True)


def test_usearch_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "f.parquet", vectors_of(3))
    without(monkeypatch, "usearch")
    with pytest.raises(MissingExtra, match=r'usearch is not installed. Install it with: pip install "opsin\[search\]"'):
        search.open(tmp_path / "f.parquet").nearest(np.ones(DIM), index=True)


def test_an_index_that_cannot_be_kept(tmp_path: Path, usearch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "f.parquet", vectors_of(3))
    features = search.open(tmp_path / "f.parquet")
    monkeypatch.setattr(Features, "_index_path", lambda self: Path("/proc/nowhere/.f.usearch"))
    with pytest.raises(DataError, match="/proc/nowhere/.f.usearch cannot be written: .* all vectors are compared"):
        features.nearest(np.ones(DIM), index=True)


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def features_by(classifier: Classifier, **changed: Any) -> Features:
    made_by = {
        "model": "test/other",
        "sha256": classifier.source.sha256,
        "preprocess_hash": classifier.preprocess.hash(),
    }
    made_by = {key: value for key, value in (made_by | changed).items() if value is not None}
    return Features(Path("features"), [search._Part(Path("x.parquet"), 0, 3, False)], made_by, dim=24)


def test_the_model_has_to_be_that_of_the_features(classifier: Classifier) -> None:
    search.check_model(features_by(classifier), classifier)
    with pytest.raises(
        ModelError, match="features was made by test/other with sha256 feed; test/noise has .* Vectors of"
    ):
        search.check_model(features_by(classifier, sha256="feed"), classifier)
    message = f"with preprocess_hash beef; test/noise has {classifier.preprocess.hash()}"
    with pytest.raises(ModelError, match=message):
        search.check_model(features_by(classifier, preprocess_hash="beef"), classifier)
    with pytest.raises(DataError, match="features does not say which model made it: there is no sha256 in a _manifest"):
        search.check_model(features_by(classifier, sha256=None), classifier)


def test_several_images_are_their_mean(classifier: Classifier, noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    images = [np.random.default_rng(i).integers(0, 256, (37, 41, 3), dtype=np.uint8) for i in range(3)]
    embedded = classifier.embed(images).astype(np.float64)
    unit = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    np.testing.assert_allclose(search.like(classifier, images), unit.mean(0), atol=1e-6)
    np.testing.assert_allclose(search.like(classifier, images[:1]), unit[0], atol=1e-6)
    broken = Classifier(replace(noisy_checkpoint, model=copy.deepcopy(noisy_checkpoint.model)), dtype="fp32")
    assert isinstance(broken.model, ViT)
    torch.nn.init.constant_(broken.model.pos_embed, float("nan"))
    with pytest.raises(ImageError, match="here.png: the model's output for it is not finite"):
        Image.fromarray(images[0]).save(tmp_path / "here.png")
        search.like(broken, [str(tmp_path / "here.png")])
    with pytest.raises(ValueError, match="no images: the list is empty"):
        search.like(classifier, [])
    with pytest.raises(ImageNotFound, match="nowhere.jpg"):
        search.like(classifier, ["nowhere.jpg"])


def test_a_prototype_is_the_class_in_the_head_less_what_all_share(classifier: Classifier) -> None:
    assert isinstance(classifier.model, ViT)
    assert classifier.model.head is not None
    weights = classifier.model.head.weight.detach().double().numpy()
    for index in (0, 6):
        direction = search.prototype(classifier, index)
        assert direction.dtype == np.float32
        np.testing.assert_allclose(direction, weights[index] - weights.mean(0), atol=1e-5)


def test_models_without_such_a_head(noisy_checkpoint: Checkpoint) -> None:
    headless = Classifier(replace(noisy_checkpoint, labels=None), dtype="fp32")
    with pytest.raises(NoHead, match="test/noise has no classification head, so it knows no labels"):
        search.prototype(headless, 0)
    model = copy.deepcopy(noisy_checkpoint.model)
    assert isinstance(model, ViT)
    assert model.head is not None
    torch.nn.init.ones_(model.head.weight)
    with pytest.raises(ModelError, match="test/noise has the same weights for all classes: it was not trained"):
        search.prototype(Classifier(replace(noisy_checkpoint, model=model), dtype="fp32"), 2)
    torch.manual_seed(3)
    deep = ViT(replace(model.config, pre_logits=True))
    for parameter in deep.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ModelError, match="the head of test/noise is not linear: a label has no direction"):
        search.prototype(Classifier(replace(noisy_checkpoint, model=deep), dtype="fp32"), 2)


# ── records and pages ────────────────────────────────────────────────────────────────────────────────────────────────


def test_records(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", with_copies(29, {17: 5, 23: 5}), cuts=(11,))
    features = search.open(tmp_path / "f")
    found = search.hits(features, np.array([17, 5, -1]), np.array([0.5, 0.25, -np.inf], np.float32))
    assert found == [
        {"rank": 1, "similarity": 0.5, "path": "photos/0017.jpg", "row": 17},
        {"rank": 2, "similarity": 0.25, "path": "photos/0005.jpg", "row": 5},
    ]
    members = search.members(features, features.duplicates())
    assert [(each["group"], each["path"], each["row"]) for each in members] == [
        (1, "photos/0005.jpg", 5),
        (1, "photos/0017.jpg", 17),
        (1, "photos/0023.jpg", 23),
    ]
    assert members[0]["similarity"] == 1
    assert search.members(features, []) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_tables(tmp_path: Path, suffix: str) -> None:
    records = [
        {"rank": 1, "similarity": 0.5, "path": 'a,"b"\n.jpg', "row": 17},
        {"rank": 2, "similarity": 0.25, "path": "猫.jpg", "row": 5},
    ]
    path = tmp_path / f"hits{suffix}"
    search.write(path, records, tuple(records[0]))
    if suffix == ".jsonl":
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records
    elif suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["rank"], row["similarity"], row["path"]) for row in rows] == [
            ("1", "0.5", 'a,"b"\n.jpg'),
            ("2", "0.25", "猫.jpg"),
        ]
    else:
        assert pq.read_table(path).to_pylist() == records
    search.write(path, [], ("rank", "similarity", "path", "row"))  # nothing found is an empty table
    with pytest.raises(ValueError, match='"hits.txt" ends in ".txt". Known: .jsonl, .csv, .parquet.'):
        search.write(tmp_path / "hits.txt", records, tuple(records[0]))


def pictures(path: str) -> Image.Image:
    if "gone" in path:
        raise ImageNotFound(f"{path} does not exist.")
    return Image.new("RGB", (701, 499), "#336699")


def test_the_page_holds_all_it_shows(tmp_path: Path) -> None:
    hostile = 'x/<img src=x onerror="alert(1)">&.jpg'
    cells = [
        Cell((name,), ((f"{rank} · 0.9", "red"),)) for rank, name in enumerate([hostile, "gone.jpg", "a\udcff.jpg"])
    ]
    page = tmp_path / "page.html"
    drawn = search.gallery(
        page, f"Like {hostile}", {"model": "<b>"}, [Block("Found & more", "<i>", "", cells)], load=pictures
    )
    text = page.read_text(encoding="utf-8")
    assert drawn == 3
    assert text.count('src="data:image/jpeg;base64,') == text.count("<img") == 2
    assert "not found" in text
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;.jpg" in text
    assert "Found &amp; more" in text
    assert "<dd>&lt;b&gt;</dd>" in text
    assert not re.search(r"https?://|<script|<link|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert "$" not in text
    assert len(text) < 20_000  # of pictures of 701 × 499 only thumbnails
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_the_page_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST_PICTURES", 5)
    blocks = [Block(f"Group {i}", "", "", [Cell((f"{i}{j}.jpg",), ()) for j in range(3)]) for i in range(4)]
    assert search.gallery(tmp_path / "page.html", "Groups", {}, blocks, load=pictures) == 5
    text = (tmp_path / "page.html").read_text()
    assert "7 more pictures are not on this page." in text
    assert "Group 1" in text
    assert "Group 2" not in text
    assert search.gallery(tmp_path / "all.html", "Groups", {}, blocks[:1], load=pictures) == 3
    assert "more pictures" not in (tmp_path / "all.html").read_text()


def test_what_else_goes_wrong_with_a_picture_is_no_matter_of_the_page(tmp_path: Path) -> None:
    def load(path: str) -> Image.Image:
        raise ImageError("odd")

    search.gallery(tmp_path / "page.html", "t", {}, [Block("b", "", "", [Cell(("a",), ())])], load=load)
    assert 'title="odd">image</div>' in (tmp_path / "page.html").read_text()


# ── one line each ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("library", ["pandas", "polars", "duckdb", "lancedb"])
def test_one_line_of_others_reads_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, dtype: str
) -> None:
    """The lines of the module's docstring, run."""
    module = pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")
    [line] = re.findall(rf"^    ({library}\..*)$", search.__doc__ or "", re.MULTILINE)
    names = {"glob": glob, library: module}
    if "polars" in line:
        names["polars"] = pytest.importorskip("polars", reason="polars is not installed: pip install polars")
    monkeypatch.chdir(tmp_path)
    stored = folder_of(tmp_path / "features", vectors_of(29), cuts=(11,), holes=(2, 17), dtype=dtype)
    read = eval(line, names)
    if library == "lancedb":
        assert read.count_rows() == 27
        [hit] = read.search(stored[23].tolist()).limit(1).to_arrow().to_pylist()
        assert hit["path"] == "photos/0023.jpg"
        return
    frame = read.df() if library == "duckdb" else read
    assert len(frame) == 29
    if library == "polars":
        assert str(frame.schema["embedding"]).startswith("Array(Float")
    by_path = dict(zip(frame["path"], frame["embedding"], strict=True))
    np.testing.assert_array_equal(np.asarray(by_path["photos/0023.jpg"], np.float32), stored[23])
