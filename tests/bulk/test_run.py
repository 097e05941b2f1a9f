"""Blocks → parts: which images are computed together depends on the block alone, so that a run may end anywhere."""

import csv
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin import bulk
from opsin.bulk import Parts
from opsin.cli import describe
from opsin.data.inputs import Block, items
from opsin.errors import BulkError
from opsin.pipeline import Classifier
from opsin.results import Record

NUM_IMAGES = 23


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Noise, each image another; two that cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        size = (5 + i, 40 - i, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "03.png").write_bytes(b"not a picture")
    (folder / "17.png").unlink()
    return [f"{folder}/{i:02}.png" for i in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def archive(images: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "x.tar"
    with tarfile.open(path, "w") as file:
        for image in images:
            data = Path(image).read_bytes() if Path(image).exists() else b""
            info = tarfile.TarInfo(Path(image).name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def counting(classifier: Classifier) -> Iterator[list[int]]:
    """How many images each pass of the model had, so far."""
    sizes: list[int] = []
    forward = classifier._forward

    def counted(function: Any, resized: list[np.ndarray]) -> Any:
        sizes.append(len(resized))
        return forward(function, resized)

    classifier._forward = counted  # type: ignore[method-assign]
    yield sizes
    del classifier._forward


def folder_of(
    classifier: Classifier, folder: Path, blocks: list[Block], form: str = "jsonl", task: str = "classify", **run: Any
) -> Parts:
    manifest = describe(classifier, task=task) | {"format": form} | run
    return Parts(folder, manifest, blocks, resume=True)


def go(classifier: Classifier, folder: Path, blocks: list[Block], **options: Any) -> bulk.Counts:
    parts = folder_of(classifier, folder, blocks)
    return bulk.run(classifier, parts, parts.to_do(), **options)


def lines(folder: Path) -> list[str]:
    """All rows, to the bit."""
    return [line for path in bulk.files(folder) for line in path.read_text().splitlines()]


def after(count: int) -> Callable[[], bool]:
    """`stop` that says so after `count` batches."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) + 1 >= count


def test_a_row_each_in_order_as_the_stream_gives_them(
    classifier: Classifier, images: list[str], archive: Path, tmp_path: Path
) -> None:
    blocks = [Block("files", tuple(images[:11])), Block("tar", (str(archive),)), Block("files", tuple(images[11:]))]
    told: list[tuple[int, int]] = []
    parts = folder_of(classifier, tmp_path / "out", blocks)
    counts = bulk.run(
        classifier, parts, parts.to_do(), batch_size=4, part_rows=10, top_k=2,
        on_batch=lambda counts: told.append((counts.images, counts.failed)),
    )  # fmt: skip
    assert counts == bulk.Counts(2 * NUM_IMAGES, 4)
    assert told[:4] == [(4, 1), (8, 1), (10, 1), (11, 1)] and told[-1] == (46, 4)
    names = [*images[:11], *(f"{archive}::{Path(path).name}" for path in images), *images[11:]]
    rows = [json.loads(line) for line in lines(tmp_path / "out")]
    assert [row["path"] for row in rows] == names
    expected = {row["path"]: row for row in classifier.stream(images, top_k=2)}
    for row in rows[:11] + rows[-12:]:
        wanted: Record = expected[row["path"]]
        assert row["ok"] == wanted["ok"]
        if row["ok"]:
            assert (row["label"], row["width"], row["height"]) == (wanted["label"], wanted["width"], wanted["height"])
            assert row["score"] == pytest.approx(wanted["score"], abs=1e-6)
            assert set(row) == set(wanted) - {"ms"}  # no two runs agree on a time
        else:
            assert row["error"] == wanted["error"]
    assert [path.name for path in bulk.files(tmp_path / "out")] == [
        "part-000000-00000000-00000010.jsonl",
        "part-000000-00000010-00000011-end.jsonl",
        "part-000001-00000000-00000010.jsonl",
        "part-000001-00000010-00000020.jsonl",
        "part-000001-00000020-00000023-end.jsonl",
        "part-000002-00000000-00000010.jsonl",
        "part-000002-00000010-00000012-end.jsonl",
    ]


def test_batches_end_with_their_part(
    classifier: Classifier, images: list[str], counting: list[int], tmp_path: Path
) -> None:
    good = [image for image in images if image[-6:] not in ("03.png", "17.png")]  # 21
    counting.clear()
    go(classifier, tmp_path, [Block("files", tuple(good))], batch_size=4, part_rows=10)
    assert counting == [4, 4, 2, 4, 4, 2, 1]


class Killed(BaseException):
    """What no `except` expects."""


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 5),
    part_rows=st.integers(1, 7),
    ends=st.lists(st.tuples(st.sampled_from(["stop", "kill"]), st.integers(1, 6)), max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_wherever_a_run_ends_the_rows_are_the_same(
    classifier: Classifier,
    images: list[str],
    archive: Path,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    batch_size: int,
    part_rows: int,
    ends: list[tuple[str, int]],
) -> None:
    """By Ctrl-C after any batch, and by death at any moment of writing, when nobody tidies up."""
    place = iter(images * 2)
    blocks = [Block("files", tuple(next(place) for _ in range(size))) for size in sizes]
    blocks.insert(1, Block("tar", (str(archive),)))
    options: dict[str, Any] = {"batch_size": batch_size, "part_rows": part_rows, "top_k": 7}
    folder = tmp_path_factory.mktemp("run")
    whole = go(classifier, folder / "whole", blocks, **options)
    assert whole.images == sum(sizes) + NUM_IMAGES
    images_done = 0
    for how, when in ends:
        with pytest.MonkeyPatch.context() as patched:
            stop = after(when) if how == "stop" else lambda: False
            if how == "kill":
                _die(patched, when)
            try:
                images_done += go(classifier, folder / "cut", blocks, **options, stop=stop).images
            except Killed:
                assert how == "kill"
    assert go(classifier, folder / "cut", blocks, **options).images <= whole.images - images_done
    assert lines(folder / "cut") == lines(folder / "whole")
    assert not list((folder / "cut").glob(".part-*"))
    assert go(classifier, folder / "cut", blocks, **options).images == 0


def _die(patched: pytest.MonkeyPatch, when: int) -> None:
    """At the `when`-th of the steps that write: before or after a part is on the disk, or has its name."""
    steps = iter(range(1, 1_000_000))
    sync, replace = bulk.parts._sync, Path.replace
    patched.setattr(Path, "unlink", lambda *_, **__: None)

    def step() -> None:
        if next(steps) >= when:
            raise Killed

    def dying_sync(path: Path) -> None:
        step()
        sync(path)

    def dying_replace(path: Path, target: Path) -> Path:
        step()
        return replace(path, target)

    patched.setattr(bulk.parts, "_sync", dying_sync)
    patched.setattr(Path, "replace", dying_replace)


def test_a_stop_writes_what_is_done(classifier: Classifier, images: list[str], tmp_path: Path) -> None:
    blocks = [Block("files", tuple(images))]
    assert go(classifier, tmp_path, blocks, batch_size=3, part_rows=9, stop=after(4)).images == 12
    assert [path.name for path in bulk.files(tmp_path)] == [
        "part-000000-00000000-00000009.jsonl",
        "part-000000-00000009-00000012.jsonl",
    ]
    assert go(classifier, tmp_path, blocks, batch_size=3, part_rows=9).images == NUM_IMAGES - 12
    assert [json.loads(line)["path"] for line in lines(tmp_path)] == images


def test_no_more_is_read_than_two_batches_ahead(
    classifier: Classifier, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0

    def counted(block: Block, start: int) -> Iterator[Any]:
        nonlocal taken
        for item in items(block, start):
            taken += 1
            yield item

    ahead = []
    monkeypatch.setattr(sys.modules["opsin.bulk.run"], "items", counted)
    go(
        classifier, tmp_path, [Block("files", tuple(images))] * 3, batch_size=2,
        on_batch=lambda counts: ahead.append(taken - counts.images),
    )  # fmt: skip
    assert max(ahead) <= 3 and taken == 3 * NUM_IMAGES  # a batch, and the image after it


def test_fail_stops_at_the_first(classifier: Classifier, images: list[str], tmp_path: Path) -> None:
    """What is mended afterwards gets the rows that it would have had."""
    folder, good = tmp_path / "in", Path(images[0]).read_bytes()
    folder.mkdir()
    paths = [f"{folder}/{i}.png" for i in range(8)]
    for path, image in zip(paths, [images[i] for i in (0, 1, 2, 4, 5, 3, 6, 7)], strict=True):
        Path(path).write_bytes(Path(image).read_bytes())
    blocks = [Block("files", tuple(paths))]
    options: dict[str, Any] = {"batch_size": 3, "part_rows": 100, "top_k": 7}
    for _ in range(2):
        with pytest.raises(BulkError, match=r"/5\.png: not an image: .* Stopped there, by --on-error fail\."):
            go(classifier, tmp_path / "out", blocks, **options, on_error="fail")
        assert [json.loads(line)["path"] for line in lines(tmp_path / "out")] == paths[:3]  # the whole batch before
    Path(paths[5]).write_bytes(good)
    assert go(classifier, tmp_path / "out", blocks, **options, on_error="fail") == bulk.Counts(5, 0)
    go(classifier, tmp_path / "whole", blocks, **options)
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_fail_at_the_very_first_writes_nothing(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(BulkError, match=r"gone\.png: no such file"):
        go(classifier, tmp_path, [Block("files", ("gone.png",))], on_error="fail")
    assert bulk.files(tmp_path) == []


def test_blocks_without_images(classifier: Classifier, images: list[str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "none.tar", "w") as file:
        file.addfile(tarfile.TarInfo("notes.txt"))
    blocks = [Block("files", ()), Block("tar", (f"{tmp_path}/none.tar",)), Block("files", tuple(images[:2]))]
    assert go(classifier, tmp_path / "out", blocks) == bulk.Counts(2, 0)
    assert [path.name[5:] for path in bulk.files(tmp_path / "out")] == [
        "000000-00000000-00000000-end.jsonl", "000001-00000000-00000000-end.jsonl",
        "000002-00000000-00000002-end.jsonl",
    ]  # fmt: skip
    assert go(classifier, tmp_path / "out", blocks) == bulk.Counts(0, 0)
    assert go(classifier, tmp_path / "nothing", []) == bulk.Counts(0, 0)


def test_images_named_twice_are_two_rows(classifier: Classifier, images: list[str], tmp_path: Path) -> None:
    blocks = [Block("files", (images[0], images[1], images[0]))] * 2
    go(classifier, tmp_path, blocks)
    rows = lines(tmp_path)
    assert len(rows) == 6 and rows[0] == rows[2] == rows[3] == rows[5] != rows[1]


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_formats_say_the_same(classifier: Classifier, images: list[str], tmp_path: Path) -> None:
    for form in bulk.FORMATS:
        parts = folder_of(classifier, tmp_path / form, [Block("files", tuple(images))], form)
        bulk.run(classifier, parts, parts.to_do(), batch_size=4, part_rows=10, top_k=3)
        assert [path.suffix for path in bulk.files(tmp_path / form)] == [f".{form}"] * 3
    as_lines = [json.loads(line) for line in lines(tmp_path / "jsonl")]
    as_csv = [row for path in bulk.files(tmp_path / "csv") for row in csv.DictReader(path.read_text().splitlines())]
    as_parquet = [row for path in bulk.files(tmp_path / "parquet") for row in pq.read_table(path).to_pylist()]
    assert len(as_lines) == len(as_csv) == len(as_parquet) == NUM_IMAGES
    for a, b, c in zip(as_lines, as_csv, as_parquet, strict=True):
        assert a["path"] == b["path"] == c["path"] and str(a["ok"]) == b["ok"] == str(c["ok"])
        assert "ms" not in a and "ms" not in b and "ms" not in c
        if a["ok"]:
            assert a["topk"] == json.loads(b["topk"])
            assert [(best["label"], np.float32(best["score"])) for best in a["topk"]] == [
                (best["label"], best["score"]) for best in c["topk"]
            ]
        else:
            assert a["error"] == {"type": b["error_type"], "message": b["error_message"]}
            assert a["error"] == {"type": c["error_type"], "message": c["error_message"]} and c["topk"] is None
    errors = [list(bulk.errors(tmp_path / form)) for form in bulk.FORMATS]
    assert errors[0] == errors[1] == errors[2] and [Path(row["path"]).name for row in errors[0]] == ["03.png", "17.png"]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("store", "within"), [("float32", 0.0), ("float16", 2**-11), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_embeddings_are_what_was_asked_for_within_rounding(
    classifier: Classifier, images: list[str], tmp_path: Path, form: str, store: str, within: float, normalize: bool
) -> None:
    stored: dict[str, Any] = ({"store": store} if store != "float32" else {}) | (
        {"normalize": True} if normalize else {}
    )
    parts = folder_of(classifier, tmp_path, [Block("files", tuple(images))], form, "embed", **stored)
    bulk.run(classifier, parts, parts.to_do(), batch_size=5, part_rows=10, embed=True)
    if form == "parquet":
        tables = [pq.read_table(path) for path in bulk.files(tmp_path)]
        kind = {"float32": "float", "float16": "halffloat", "int8": "int8"}[store]
        assert str(tables[0].schema.field("embedding").type) == f"fixed_size_list<element: {kind}>[24]"
        rows = [row for table in tables for row in table.to_pylist()]
    else:
        rows = [json.loads(line) for line in lines(tmp_path)]
    assert [row["path"] for row in rows] == images
    for row in rows:
        if not row["ok"]:
            assert row.get("embedding") is None and row.get("scale") is None
            continue
        exact = classifier.embed(row["path"])[0]
        if normalize:
            exact = exact / np.linalg.norm(exact)
        found = np.asarray(row["embedding"], np.float64) * (row["scale"] if store == "int8" else 1)
        assert np.abs(found - exact).max() <= within * np.abs(exact).max() + 2e-6
        if store == "int8":
            assert np.abs(row["embedding"]).max() == 127 and ("scale" in row)
        if normalize:
            assert np.linalg.norm(found) == pytest.approx(1, abs=0.02 if store == "int8" else 1e-3)
