"""A folder of parts: what is done is in the names, whatever a killed run left."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsin import bulk
from opsin.bulk import parts as module
from opsin.bulk.parts import INPUTS, MANIFEST, Parts
from opsin.cli import folder as command
from opsin.data.inputs import Block
from opsin.errors import BulkError

RUN = {"task": "classify", "format": "jsonl", "model": "test/noise", "inputs": ["photos"]}
BLOCKS = [Block("files", ("a.png", "b.png", "c.png")), Block("tar", ("x.tar",)), Block("files", ("d.png",))]


def begun(folder: Path, *, resume: bool = True, shard: tuple[int, int] = (0, 1), **manifest: Any) -> Parts:
    return Parts(folder, RUN | manifest, iter(BLOCKS), resume=resume, shard=shard)


def record(block: int, row: int) -> dict[str, Any]:
    return {"path": f"{block}/{row}", "ok": True, "label": "cat", "index": 3, "score": 0.5, "topk": []}


def named(block: int, start: int, stop: int, end: bool = False) -> str:
    return f"part-{block:06d}-{start:08d}-{stop:08d}{'-end' if end else ''}.jsonl"


def put(folder: Path, block: int, start: int, stop: int, end: bool = False) -> None:
    lines = [json.dumps(record(block, row)) + "\n" for row in range(start, stop)]
    (folder / named(block, start, stop, end)).write_text("".join(lines))


def paths(folder: Path) -> list[str]:
    return [json.loads(line)["path"] for path in bulk.files(folder) for line in path.read_text().splitlines()]


def seen(folder: Path) -> set[str]:
    """What a person sees of a folder, but for what every run has."""
    return {path.name for path in folder.iterdir()} - {MANIFEST, INPUTS, ".lock"}


def test_a_new_folder_says_what_will_be_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "far" / "labels"
    parts = begun(folder, resume=False)
    assert json.loads((folder / MANIFEST).read_text()) == RUN
    assert (folder / INPUTS).read_text().splitlines()[1] == '{"kind": "tar", "paths": ["x.tar"]}'
    assert list(parts.blocks()) == BLOCKS and parts.num_blocks == 3 and parts.num_done == 0
    assert list(parts.to_do()) == [(0, BLOCKS[0], 0), (1, BLOCKS[1], 0), (2, BLOCKS[2], 0)]
    assert seen(folder) == set()


def test_parts_are_gone_on_with(tmp_path: Path) -> None:
    parts = begun(tmp_path)
    parts.write(0, 0, [record(0, 0), record(0, 1)], end=False)
    parts.write(1, 0, [], end=True)
    for each in (parts, begun(tmp_path)):
        assert [(number, row) for number, _, row in each.to_do()] == [(0, 2), (2, 0)]
        assert each.num_done == 2
    parts = begun(tmp_path)
    parts.write(2, 0, [record(2, 0)], end=True)
    parts.write(0, 2, [record(0, 2)], end=True)
    assert list(parts.to_do()) == list(begun(tmp_path).to_do()) == []
    assert paths(tmp_path) == ["0/0", "0/1", "0/2", "2/0"]
    assert seen(tmp_path) == {named(0, 0, 2), named(0, 2, 3, True), named(1, 0, 0, True), named(2, 0, 1, True)}


@pytest.mark.parametrize(
    ("left", "row", "kept"),
    [
        ([], 0, 0),
        ([(0, 3)], 3, 1),
        ([(0, 3), (3, 5, True)], None, 2),
        ([(0, 0, True)], None, 1),
        ([(3, 5)], 0, 0),  # without what comes before
        ([(0, 3), (5, 7, True)], 3, 1),
        ([(0, 5), (0, 3)], 5, 1),  # the longer one
        ([(0, 5), (3, 7, True)], 5, 1),
        ([(0, 5), (0, 3), (3, 7)], 5, 1),
        ([(0, 3, True), (3, 5)], None, 1),
        ([(0, 5, True), (0, 5)], None, 1),
        ([(0, 0)], 0, 0),
        ([(0, 5), (5, 3), (3, 5)], 5, 1),  # names that lead in a circle
    ],
)
def test_what_is_to_do_is_read_from_names(tmp_path: Path, left: list[Any], row: int | None, kept: int) -> None:
    begun(tmp_path)
    for part in left:
        put(tmp_path, 2, *part)
    parts = begun(tmp_path)
    assert {number: row for number, _, row in parts.to_do()} == {0: 0, 1: 0} | ({} if row is None else {2: row})
    assert seen(tmp_path) == {named(2, *part) for part in left[:kept]}  # what is kept stands first


def test_what_a_killed_run_left_half_written_goes_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    begun(tmp_path)
    ours = [f".{named(0, 0, 3)}.1a2b3c4d", f".{named(2, 0, 1, True)}.77"]
    others = [
        "notes.txt",
        f"{named(0, 0, 3)}.bak",
        "part-1-2-3.jsonl",
        ".part-x",
        ".nfs0001",
        "part-000000-00000000.csv",
    ]
    for name in (*ours, *others):
        (tmp_path / name).write_text("{}")
    assert [row for _, _, row in begun(tmp_path).to_do()] == [0, 0, 0]
    assert seen(tmp_path) == set(others)
    assert bulk.files(tmp_path) == []


@given(
    total=st.integers(0, 13),
    cuts=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=9),
    block=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parts_become_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, total: int, cuts: list[tuple[int, int]], block: int
) -> None:
    """Parts of one truth, overlapping and with gaps as no run should leave them."""
    folder = tmp_path_factory.mktemp("parts")
    begun(folder)
    for start, stop in cuts:
        if start <= stop <= total:
            put(folder, block, start, stop, end=stop == total and start % 2 == 0)
    parts = begun(folder)
    to_do = {number: row for number, _, row in parts.to_do()}
    row = to_do.get(block, total)
    assert paths(folder) == [f"{block}/{i}" for i in range(row)] and parts.num_done == row
    if block in to_do:
        parts.write(block, row, [record(block, i) for i in range(row, total)], end=True)
    assert paths(folder) == [f"{block}/{i}" for i in range(total)]
    assert block not in {number for number, _, _ in begun(folder).to_do()}


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(BulkError, match=r"holds a run already\. Go on with it by --resume, or name another folder"):
        begun(tmp_path, resume=False)
    with pytest.raises(BulkError) as caught:
        begun(tmp_path, model="test/other", inputs=["x" * 200], kind=0.9)
    assert str(caught.value).splitlines() == [
        f"{tmp_path} was begun by another run:",
        f'  inputs: ["photos"] there, ["{"x" * 75}… now',
        "  kind: null there, 0.9 now",
        '  model: "test/noise" there, "test/other" now',
        "Run as it was begun, or name another folder.",
    ]
    assert json.loads((tmp_path / MANIFEST).read_text()) == RUN


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    for _ in range(2):  # also beside what a run has begun
        with pytest.raises(BulkError, match=r'holds "holiday\.jpg" and is no folder of a run\. Name a new or an empty'):
            begun(tmp_path)
        assert not (tmp_path / MANIFEST).exists()
        (tmp_path / INPUTS).touch()
    (tmp_path / "holiday.jpg").rename(tmp_path / named(0, 0, 3))  # the manifest has been lost
    with pytest.raises(BulkError, match='holds "part-000000-'):
        begun(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        begun(tmp_path / "file")


def test_hidden_files_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    assert begun(tmp_path, resume=False).num_blocks == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b'{"task": "\xe9"}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    begun(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BulkError, match=r"_manifest\.json is damaged: .*\. Name another folder"):
        begun(tmp_path)


@pytest.mark.parametrize("content", [None, b"{", b"[1]\n", b'{"kind": "rar", "paths": []}\n', b"\xff\n"])
def test_a_damaged_list_of_inputs_is_refused(tmp_path: Path, content: bytes | None) -> None:
    begun(tmp_path)
    (tmp_path / INPUTS).unlink()
    if content is not None:
        (tmp_path / INPUTS).write_bytes(content)
    with pytest.raises(BulkError, match=r"_inputs\.jsonl is damaged: .*Name another folder"):
        begun(tmp_path)


def test_an_archive_that_is_another_is_refused_once_it_is_begun(tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(b"first")
    blocks = [Block("tar", (str(archive),)), Block("files", (str(archive),)), Block("tar", ("s3://bucket/x.tar",))]
    folder = tmp_path / "out"
    for number in range(3):
        Parts(folder, RUN, blocks, resume=True).write(number, 0, [record(number, 0)], end=False)
    assert len(list(Parts(folder, RUN, blocks, resume=True).to_do())) == 3
    for change in (lambda: archive.write_bytes(b"second"), archive.unlink):
        change()
        with pytest.raises(BulkError, match=r"x\.tar has changed since its first 1 rows were written.* Put the old"):
            Parts(folder, RUN, blocks, resume=True)
    Parts.write(parts := Parts(folder, RUN, blocks, resume=True, shard=(1, 2)), 1, 1, [], end=True)
    assert list(parts.to_do()) == []  # of the archive this shard has nothing
    put(folder, 0, 1, 5, end=True)
    assert [number for number, _, _ in Parts(folder, RUN, blocks, resume=True).to_do()] == [2]


# ── beginning ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_list_of_inputs_is_made_once(tmp_path: Path) -> None:
    begun(tmp_path)

    def later() -> Iterator[Block]:
        raise AssertionError("the folder has its list")
        yield

    assert list(Parts(tmp_path, RUN, later(), resume=True).blocks()) == BLOCKS


def test_a_run_that_died_before_its_manifest_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def die(path: Path, target: Path) -> Path:
        if target.name == MANIFEST:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        patched.setattr(Path, "unlink", lambda *_, **__: None)  # nobody is there to tidy up
        with pytest.raises(KeyboardInterrupt):
            begun(tmp_path)
    assert len(seen(tmp_path)) == 1  # half a manifest
    parts = Parts(tmp_path, RUN | {"inputs": ["more"]}, BLOCKS[:1], resume=False)
    assert list(parts.blocks()) == BLOCKS[:1]
    assert seen(tmp_path) == set()


def test_a_list_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[Block]:
        yield BLOCKS[0]
        raise ValueError("a table without paths")

    with pytest.raises(ValueError, match="a table without paths"):
        Parts(tmp_path, RUN, failing(), resume=False)
    assert seen(tmp_path) == set() and not (tmp_path / INPUTS).exists()
    assert begun(tmp_path, resume=False).num_blocks == 3


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    odd = Block("files", ("latin\udce9.png", "猫.png", "line\nbreak.png"))
    manifest = RUN | {"inputs": ["latin\udce9.png", "猫.png"]}
    for _ in range(2):
        assert list(Parts(tmp_path, manifest, [odd], resume=True).blocks()) == [odd]


def test_shards_that_begin_at_the_same_moment_share_one_list(tmp_path: Path) -> None:
    """Each would make another list, as when images arrive meanwhile."""
    count, gate, made = 7, threading.Barrier(7), []

    def blocks(i: int) -> Iterator[Block]:
        made.append(i)
        for k in range(20 + i):
            yield Block("files", (f"{i}/{k}.png",))

    def shard(i: int) -> None:
        gate.wait()
        shares[i] = Parts(tmp_path, RUN, blocks(i), resume=True, shard=(i, count))

    shares: dict[int, Parts] = {}
    threads = [threading.Thread(target=shard, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = made
    numbers = [number for i in range(count) for number, _, _ in shares[i].to_do()]
    assert sorted(numbers) == list(range(20 + winner))
    assert {block.paths[0].split("/")[0] for i in range(count) for _, block, _ in shares[i].to_do()} == {str(winner)}


def test_a_shard_touches_only_its_own(tmp_path: Path) -> None:
    begun(tmp_path)
    others = [named(1, 5, 7), f".{named(1, 0, 5)}.1a2b3c4d"]  # another shard is at work: its first part is on its way
    ours = [named(0, 5, 7), named(2, 5, 7), f".{named(2, 0, 5)}.1a2b3c4d"]
    for name in (*others, *ours):
        (tmp_path / name).touch()
    parts = begun(tmp_path, shard=(0, 2))
    assert seen(tmp_path) == set(others)
    assert [(number, row) for number, _, row in parts.to_do()] == [(0, 0), (2, 0)]
    assert [number for number, _, _ in begun(tmp_path / "new", shard=(4, 5)).to_do()] == []


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", bulk.FORMATS)
def test_a_part_that_cannot_be_written_is_not_there(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = begun(tmp_path, format=form)
    parts.write(0, 0, [record(0, 0)], end=False)
    before = seen(tmp_path)
    fsync = os.fsync

    def full(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            fsync(handle)
        raise OSError(28, "No space left on device")  # how network disks say it: when the bytes are to be there

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            parts.write(0, 1, [record(0, 1)], end=True)
    assert seen(tmp_path) == before
    assert [(number, row) for number, _, row in parts.to_do()] == [(0, 1), (1, 0), (2, 0)]

    def refuse(path: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module, "_sync", lambda path: refuse(path) if path.is_dir() else None)
    parts.write(0, 1, [record(0, 1)], end=True)  # a disk that forces no folders
    assert [number for number, _, _ in begun(tmp_path, format=form).to_do()] == [1, 2]


def test_records_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    parts = begun(tmp_path, format="parquet")
    with pytest.raises(Exception, match=r"(?i)convert|int"):
        parts.write(0, 0, [record(0, 0) | {"index": "three"}], end=True)
    assert seen(tmp_path) == set()


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", bulk.FORMATS)
def test_errors_in_the_order_of_the_inputs(tmp_path: Path, form: str) -> None:
    parts = begun(tmp_path, format=form)

    def bad(path: str) -> dict[str, Any]:
        return {"path": path, "ok": False, "error": {"type": "corrupt", "message": f'{path}: cut, "short"\nor so'}}

    parts.write(2, 0, [bad("z.png")], end=True)
    parts.write(0, 2, [record(0, 2), bad("猫, 1.png")], end=True)
    parts.write(0, 0, [bad("latin\udce9.png"), record(0, 1)], end=False)
    parts.write(1_000_000, 0, [bad("last.png")], end=True)  # a longer number is still the last
    latin = "latin\\udce9.png" if form == "parquet" else "latin\udce9.png"
    expected = [bad(path) for path in (latin, "猫, 1.png", "z.png", "last.png")]
    assert list(bulk.errors(tmp_path)) == [{"path": row["path"], "error": row["error"]} for row in expected]
    assert [path.name[5:11] for path in bulk.files(tmp_path)] == ["000000", "000000", "000002", "100000"]


def test_the_command_offers_the_formats_that_there_are() -> None:
    assert command.FORMATS == bulk.FORMATS
