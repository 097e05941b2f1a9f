"""Arguments → blocks → items, on disk, in archives and on servers that answer, refuse, fail and hang."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import socket
import struct
import tarfile
import threading
import tracemalloc
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin import preprocess
from opsin.data import archives, inputs, remote, samples, table, tar
from opsin.data.inputs import Block, Item, items, plan
from opsin.errors import (
    DataError,
    ImageCorrupt,
    ImageError,
    ImageNotFound,
    ImageTooLarge,
    ImageUnreadable,
    MissingExtra,
)

Picture = Callable[[int], bytes]

ODD = ("plain.png", "with space.png", "hash#1?.png", "line\nbreak.png", "猫.png", "latin\udce9.png", "[1]*.png")


def paths(*arguments: str, rows: int = 1000) -> list[str]:
    return [path for block in plan(arguments, rows=rows) for path in block.paths]


def names(found: list[Item]) -> list[str]:
    return [item.name for item in found]


def content(item: Item) -> bytes | str:
    """The bytes of an item; of one that is an error its kind."""
    if isinstance(item.source, ImageError):
        return item.source.kind
    try:
        found = item.source() if callable(item.source) else item.source
    except ImageError as error:
        return error.kind
    assert isinstance(found, bytes | str)
    return Path(found).read_bytes() if isinstance(found, str) else found


def all_of(kind: Any, path: Path | str) -> list[Item]:
    """The items of an archive; from every place on they are the same."""
    block = Block(kind, (str(path),))
    whole = list(items(block))
    for start in range(len(whole) + 2):
        part = list(items(block, start))
        assert names(part) == names(whole[start:])
        assert list(map(content, part)) == list(map(content, whole[start:]))
    return whole


def packed(path: Path | io.BytesIO, members: dict[str, bytes], mode: str = "w", **options: Any) -> None:
    where = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode=mode, **where, **options) as file:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_in_blocks_in_the_order_of_the_arguments(tmp_path: Path, fill: Callable[..., None]) -> None:
    fill(tmp_path, "a/2.png", "a/b/1.png", "a/b.jpg", "a/notes.txt", "c.png", "x.tar", "d.gif")
    arguments = [f"{tmp_path}/a", f"{tmp_path}/c.png", f"{tmp_path}/x.tar", f"{tmp_path}/d.gif", f"{tmp_path}/c.png"]
    found = list(plan(arguments, rows=3))
    assert [(block.kind, [str(Path(path).relative_to(tmp_path)) for path in block.paths]) for block in found] == [
        ("files", ["a/2.png", "a/b/1.png", "a/b.jpg"]),
        ("files", ["c.png"]),  # the order is that of the arguments
        ("tar", ["x.tar"]),
        ("files", ["d.gif", "c.png"]),
    ]
    assert list(plan(arguments, rows=3)) == found
    with pytest.raises(ValueError, match="rows is 0; it must be at least 1"):
        plan(arguments, rows=0)


def test_odd_names_survive_planning_storing_and_reading(tmp_path: Path, picture: Picture) -> None:
    for i, name in enumerate(ODD):
        (tmp_path / name).write_bytes(picture(i))
    (block,) = plan([str(tmp_path)])
    again = Block.from_json(json.loads(json.dumps(block.to_json())))
    assert again == block
    assert {Path(item.name).name: content(item) for item in items(again)} == {
        name: picture(i) for i, name in enumerate(ODD)
    }
    assert names(list(items(again, 3))) == list(block.paths[3:])
    assert paths(f"{tmp_path}/[[]1]*.png") == [f"{tmp_path}/[1]*.png"]
    assert paths(f"{tmp_path}/[1]*.png") == [f"{tmp_path}/[1]*.png"]  # a file before it is a pattern


def test_a_damaged_plan_is_refused() -> None:
    for values in ({}, {"kind": "rar", "paths": []}, {"kind": "tar", "paths": "x"}, {"kind": "tar", "paths": [1]}):
        with pytest.raises(DataError, match="is no block of inputs: right is a kind of files, tar, zip, parquet"):
            Block.from_json(values)


def test_what_is_not_there_is_one_item(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    gone = [f"{tmp_path}/gone.jpg", f"{tmp_path}/*.jpg", f"@{tmp_path}/list.txt", "", "a\0b.png", "x" * 300 + ".png"]
    assert paths(*gone, f"{tmp_path}/empty") == gone
    for kind, suffix in (("tar", "tar"), ("zip", "zip"), ("parquet", "parquet"), ("tar", "tar.gz")):
        path = f"{tmp_path}/gone.{suffix}"
        (block,) = plan([path])
        assert block == Block(kind, (path,))  # type: ignore[arg-type]
        (item,) = items(block)
        assert item.name == path
        with pytest.raises(ImageNotFound, match=rf"gone\.{suffix}: no such file"):
            raise item.source  # type: ignore[misc]
        assert list(items(block, 1)) == []


def test_archives_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")  # to open it would wait for its writer
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    (tmp_path / "folder.zip").mkdir()
    for kind, name, reason in (
        ("tar", "pipe.tar", "a device or pipe, not a file"),
        ("tar", "loop.tar", "Too many levels"),
        ("zip", "folder.zip", "a directory, not a file"),
    ):
        (item,) = items(Block(kind, (f"{tmp_path}/{name}",)))  # type: ignore[arg-type]
        with pytest.raises(ImageUnreadable, match=f"{name}: {reason}"):
            raise item.source  # type: ignore[misc]
    (item,) = items(Block("tar", ("a\0b.tar",)))
    with pytest.raises(ImageNotFound, match="the name itself is impossible"):
        raise item.source  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["1.png", "2.png"]),
        ("**/*.png", ["1.png", "2.png", "a/3.png", "a/b/4.png", "c/b/6.png"]),
        ("**", ["1.png", "2.png", "a/3.png", "a/b/4.png", "a/b/5.jpg", "c/.h.png", "c/b/6.png"]),
        ("*/", ["a/3.png", "a/b/4.png", "a/b/5.jpg", "c/.h.png", "c/b/6.png"]),
        ("*", ["1.png", "2.png", "a/3.png", "a/b/4.png", "a/b/5.jpg", "c/.h.png", "c/b/6.png", "n.txt"]),
        ("**/b/*", ["a/b/4.png", "a/b/5.jpg", "c/b/6.png"]),
        ("?/b/**/*.png", ["a/b/4.png", "c/b/6.png"]),
        ("**/**/*.jpg", ["a/b/5.jpg"]),
        ("*/.h.png", ["c/.h.png"]),
        ("{a,c}/b/*.png", ["a/b/4.png", "c/b/6.png"]),
        ("{2..1}.png", ["2.png", "1.png"]),
        ("{1..3}.png", ["1.png", "2.png", "3.png"]),
        ("*.gif", ["*.gif"]),
        ("n.*", ["n.txt"]),
    ],
)
def test_patterns(tmp_path: Path, fill: Callable[..., None], pattern: str, expected: list[str]) -> None:
    fill(tmp_path, "1.png", "2.png", "a/3.png", "a/b/4.png", "a/b/5.jpg", "c/b/6.png", "c/.h.png", "n.txt")
    assert [str(Path(path).relative_to(tmp_path)) for path in paths(f"{tmp_path}/{pattern}")] == expected


def test_patterns_from_here_and_links(
    tmp_path: Path, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    assert paths("*/*.png") == ["a/1.png", "a/gone.png", "b/2.png"]
    assert paths("**/*.png") == ["a/1.png", "a/gone.png", "b/2.png"]  # and not round and round
    assert paths("a/up/*/2.png") == ["a/up/b/2.png"]
    assert paths("a") == ["a/1.png", "a/gone.png"]
    assert paths(".") == paths("**") == paths("./**") == ["./a/1.png", "./a/gone.png", "./b/2.png"]
    assert paths(f"{str(tmp_path)[:-1]}?/b/**") == [f"{tmp_path}/b/2.png"]


def test_a_folder_without_images_gives_its_archives(
    tmp_path: Path, fill: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "s/1.tar", "s/0.tar", "s/more/x.zip", "s/classes.txt")
    assert [block.kind for block in plan([f"{tmp_path}/s"])] == ["tar", "tar", "zip"]
    assert paths(f"{tmp_path}/s") == [f"{tmp_path}/s/{name}" for name in ("0.tar", "1.tar", "more/x.zip")]
    fill(tmp_path, "s/more/1.png")
    with caplog.at_level(logging.WARNING):
        assert paths(f"{tmp_path}/s") == [f"{tmp_path}/s/more/1.png"]
    assert "3 archives beside the images are left unread" in caplog.text


def test_a_folder_that_cannot_be_listed_is_one_item(
    tmp_path: Path, fill: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for argument in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/**/*.png"):
        assert paths(argument) == [f"{tmp_path}/a", f"{tmp_path}/b/2.png"]


def test_shards_by_number(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in (8, 9, 11):
        packed(tmp_path / f"{i:03}.tar", {f"{i}.png": picture(i)})
    blocks = list(plan([f"{tmp_path}/{{008..011}}.tar"]))
    assert [block.paths[0][-7:] for block in blocks] == ["008.tar", "009.tar", "010.tar", "011.tar"]
    assert [content(item) for block in blocks for item in items(block)] == [
        picture(8),
        picture(9),
        "not_found",
        picture(11),
    ]
    monkeypatch.setattr(tar, "_MAX_SHARDS", 10)
    with pytest.raises(DataError, match="stands for more than 10 shards"):
        list(plan([f"{tmp_path}/{{0..99999999999}}.tar"]))


def test_lists(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    lines = ["a.png", "", " b.png", "/abs/c.png", "s3://bucket/d.png", "latin\udce9.png", "s.tar", "e.png"]
    data = os.fsencode("\n".join(lines))
    expected = [f"{tmp_path}/a.png", f"{tmp_path}/ b.png", "/abs/c.png", "s3://bucket/d.png"]
    expected += [f"{tmp_path}/latin\udce9.png", f"{tmp_path}/s.tar", f"{tmp_path}/e.png"]
    for text in (data, data + b"\n", data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\0")):
        (tmp_path / "list.txt").write_bytes(text)
        found = list(inputs._in_list(f"@{tmp_path}/list.txt"))
        assert found == expected
    (tmp_path / "list.txt").write_bytes(b"x\ny.png\0" + b"z" * 70_000 + b"\0last")
    assert paths(f"@{tmp_path}/list.txt") == [f"{tmp_path}/{name}" for name in ("x\ny.png", "z" * 70_000, "last")]
    (tmp_path / "list.txt").write_bytes("a.png\r\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"list\.txt is no list that can be read: it is UTF-16; save it as UTF-8"):
        paths(f"@{tmp_path}/list.txt")
    with pytest.raises(DataError, match="is no list that can be read: .*Is a directory"):
        paths(f"@{tmp_path}")
    (tmp_path / "@odd.png").touch()
    assert paths(f"{tmp_path}/@odd.png") == [f"{tmp_path}/@odd.png"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_of_paths(tmp_path: Path, suffix: str) -> None:
    cells = ["a/1.png", "", "/abs/2.png", "https://x/3.png", " 猫, 4.png "]
    path = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"id": list(range(5)), "filename": [cell or None for cell in cells]}), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps({"filename": cell or None, "id": 1}) + "\n" for cell in cells))
    else:
        comma = "," if suffix == "csv" else "\t"
        path.write_text("".join(f'{i}{comma}"{cell}"\n' for i, cell in zip(["id", *range(5)], ["Filename", *cells])))  # noqa: B905
    expected = [f"{tmp_path}/a/1.png", "", "/abs/2.png", "https://x/3.png", f"{tmp_path}/猫, 4.png"]
    assert paths(str(path)) == paths(f"@{path}") == expected  # a row each, also of an empty cell
    assert names(list(items(next(plan([str(path)], rows=3)), 1))) == expected[1:3]


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text("id,score\n1,2\n")
    with pytest.raises(DataError, match="has no column of paths: looked for path, file_name"):
        paths(str(path))
    path.write_text("path,id\na.png,1\nb.png\n")
    with pytest.raises(DataError, match="row 2 has 1 cells, the header 2"):
        paths(str(path))
    path.write_text("")
    with pytest.raises(DataError, match=r"list\.csv is empty"):
        paths(str(path))


def test_a_large_listing_stays_small(tmp_path: Path) -> None:
    with (tmp_path / "list.txt").open("w") as file:
        for i in range(20_000):
            file.write(f"some/folder/of/images/{i:07}.jpg\n")
    with (tmp_path / "list.csv").open("w") as file:
        file.write("path,label\n")
        for i in range(20_000):
            file.write(f"some/folder/of/images/{i:07}.jpg,{i}\n")
    for argument in (f"@{tmp_path}/list.txt", f"{tmp_path}/list.csv"):
        tracemalloc.start()
        try:
            assert sum(len(block.paths) for block in plan([argument])) == 20_000
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000, argument  # all the names are 3 MB


# ── tar ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


PACKS = {"tar": lambda data: data, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKS)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_tar_files(tmp_path: Path, picture: Picture, suffix: str, form: int) -> None:
    members = {
        "0.png": picture(0),
        "0.cls": b"3",
        "0.mask.png": picture(1),
        "broken.jpg": b"\xff\xd8\xffnothing",
        "none.jpg": b"",
        "/".join(["d" * 50] * 3) + "/1.png": picture(2),
        "../../etc/up.png": picture(3),
        "猫 #?\n.png": picture(4),
        "latin\udce9.png": picture(5),
        "._0.png": b"macOS",
        "notes.txt": b"x" * 700,
    }
    buffer = io.BytesIO()
    packed(buffer, members, format=form)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer, mode="a", format=form) as file:
        file.add("/", "folder.png", recursive=False)
        info = tarfile.TarInfo("0.png")  # again
        info.size = len(picture(6))
        file.addfile(info, io.BytesIO(picture(6)))
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(PACKS[suffix](buffer.getvalue()))
    (block,) = plan([str(path)])
    assert block.kind == "tar"
    found = all_of("tar", path)
    images = [(name, data) for name, data in members.items() if name.endswith(("png", "jpg")) and "._" not in name]
    assert [(item.name, content(item)) for item in found] == [
        *((f"{path}::{name}", data) for name, data in images),
        (f"{path}::0.png", picture(6)),
        (f"{path}::link.png", "unreadable"),
    ]
    with pytest.raises(ImageUnreadable, match=r"link\.png: a link to /etc/passwd, which is not followed"):
        raise found[-1].source  # type: ignore[misc]


@pytest.mark.parametrize("suffix", PACKS)
def test_a_tar_cut_anywhere_loses_nothing_before(tmp_path: Path, picture: Picture, suffix: str) -> None:
    buffer = io.BytesIO()
    long = "d" * 120 + "/3.png"  # has headers of its own
    members = {"1.png": picture(1), "2.png": picture(2) * 9, "2.cls": b"1", long: picture(3), "e.png": b""}
    packed(buffer, members, format=tarfile.PAX_FORMAT)
    data = buffer.getvalue()
    ends = []
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        for member in file:
            if member.name.endswith(".png"):
                ends.append(member.offset_data + member.size)
        end = file.offset  # where the zeros begin
    path = tmp_path / f"x.{suffix}"
    for cut in (*range(0, len(data), 512), *range(100, len(data), 3 * 512)):
        path.write_bytes(PACKS[suffix](data[:cut]))
        found = all_of("tar", path) if cut % 7 == 0 else list(items(Block("tar", (str(path),))))
        whole = sum(cut >= stop and cut > 0 for stop in ends) if cut >= 512 else 0
        errors = [item for item in found if isinstance(item.source, ImageError)]
        assert len(found) - len(errors) == whole, cut
        assert [content(item) for item in found[:whole]] == _pictures(members)[:whole]
        if cut >= end + 512:
            assert not errors, cut
        else:
            assert names(errors) == [str(path)] == names(found[-1:])
            with pytest.raises(ImageCorrupt, match=rf"cut short or damaged after {whole} images: "):
                raise errors[0].source  # type: ignore[misc]


def _pictures(members: dict[str, bytes]) -> list[bytes]:
    return [data for name, data in members.items() if name.endswith(".png")]


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_compressed_tar_whose_stream_is_cut(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).bytes(150_000)
    buffer = io.BytesIO()
    packed(buffer, {f"{i}.png": noise[i * 7000 :][:7000] for i in range(20)})
    data = PACKS[suffix](buffer.getvalue())
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    found = all_of("tar", path)
    assert names(found[-1:]) == [str(path)] and isinstance(found[-1].source, ImageCorrupt)
    assert [content(item) for item in found[:-1]] == [noise[i * 7000 :][:7000] for i in range(len(found) - 1)]
    assert suffix == "tar.bz2" or len(found) > 8
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 600)
    (item,) = items(Block("tar", (str(path),)))
    with pytest.raises(ImageUnreadable, match="compressed by Zstandard, which is not read"):
        raise item.source  # type: ignore[misc]


def test_what_is_no_tar(tmp_path: Path) -> None:
    for data in (b"", b"x", b"no tar at all" * 100, b"\x1f\x8b" + b"x" * 600, os.urandom(2000)):
        (tmp_path / "x.tar").write_bytes(data)
        (item,) = all_of("tar", tmp_path / "x.tar")
        with pytest.raises(ImageCorrupt, match=r"x\.tar: cut short or damaged after 0 images: "):
            raise item.source  # type: ignore[misc]


def test_a_plain_tar_that_begins_like_a_compressed_one(tmp_path: Path, picture: Picture) -> None:
    packed(tmp_path / "x.tar", {"BZh.png": picture(1)})
    assert [content(item) for item in all_of("tar", tmp_path / "x.tar")] == [picture(1)]


def test_hostile_headers(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    for size, kind in ((2**40, tarfile.REGTYPE), (2**40, tarfile.GNUTYPE_LONGNAME), (2**40, tarfile.XHDTYPE)):
        info = tarfile.TarInfo("1.png")
        info.size, info.type = size, kind
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
        (item,) = all_of("tar", path)
        assert isinstance(item.source, ImageCorrupt)
    info = tarfile.TarInfo("1.png")
    header = bytearray(info.tobuf())
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # minus 512: the same header again, for ever
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(header + b"\0" * 1024)
    (item,) = all_of("tar", path)
    assert isinstance(item.source, ImageCorrupt)
    pax = tarfile.TarInfo("p")
    pax.type = tarfile.XHDTYPE
    path.write_bytes(pax.tobuf() * 3000)  # each header in the next one
    (item,) = all_of("tar", path)
    assert isinstance(item.source, ImageCorrupt)


def test_noise_in_a_tar_never_raises(tmp_path: Path, picture: Picture) -> None:
    buffer, random = io.BytesIO(), np.random.default_rng(0)
    packed(buffer, {f"{'d' * (i * 40)}/{i}.png": picture(i) for i in range(5)}, format=tarfile.PAX_FORMAT)
    for suffix in PACKS:
        data = PACKS[suffix](buffer.getvalue())
        for _ in range(60):
            broken = bytearray(data)
            for place in random.integers(0, len(data), 4):
                broken[place] = random.integers(256)
            (tmp_path / f"x.{suffix}").write_bytes(broken)
            found = list(items(Block("tar", (f"{tmp_path}/x.{suffix}",))))
            assert all(isinstance(content(item), bytes | str) for item in found) and len(found) <= 6


def test_tar_of_tars(tmp_path: Path, picture: Picture) -> None:
    train = {}
    for k, wnid in enumerate(("n01440764", "n01443537", "n02123045")):
        inner = io.BytesIO()
        packed(inner, {f"{wnid}_{i}.JPEG": picture(10 * k + i) for i in range(3)})
        train[f"{wnid}.tar"] = inner.getvalue()
    train["n01443537.tar"] = train["n01443537.tar"][: 2 * 1024 + 530]
    for suffix in ("tar", "tar.gz"):
        path = tmp_path / f"train.{suffix}"
        packed(path, train, "w:gz" if suffix == "tar.gz" else "w")
        found = all_of("tar", path)
        assert names(found) == [
            *(f"{path}::n01440764.tar/n01440764_{i}.JPEG" for i in range(3)),
            *(f"{path}::n01443537.tar/n01443537_{i}.JPEG" for i in range(2)),
            f"{path}::n01443537.tar",
            *(f"{path}::n02123045.tar/n02123045_{i}.JPEG" for i in range(3)),
        ]
        pictures = [picture(i) for i in (0, 1, 2, 10, 11, 20, 21, 22)]
        assert [content(item) for item in found] == [*pictures[:5], "corrupt", *pictures[5:]]


def test_too_large_members_are_not_read(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"1.png": picture(1), "2.png": b"x" * 3000, "3.png": picture(3)}
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 2000)
    for suffix in ("tar", "tar.gz"):
        packed(tmp_path / f"x.{suffix}", members, "w:gz" if suffix == "tar.gz" else "w")
        found = all_of("tar", tmp_path / f"x.{suffix}")
        assert [content(item) for item in found] == [picture(1), "too_large", picture(3)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    found = all_of("zip", tmp_path / "x.zip")
    assert [content(item) for item in found] == [picture(1), "too_large", picture(3)]
    with pytest.raises(ImageTooLarge, match=r"x\.zip::2\.png: 3,000 bytes; the limit"):
        found[1].source()  # type: ignore[operator]


def test_an_archive_that_is_replaced_stays_what_was_opened(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "x.tar"
    packed(path, {f"{i}.png": picture(i) for i in range(3)})
    rest = items(Block("tar", (str(path),)))
    first = next(rest)
    packed(tmp_path / "new.tar", {f"{i}.png": picture(i) for i in range(10, 13)})
    (tmp_path / "new.tar").replace(path)
    second = next(rest)
    path.unlink()
    found = [first, second, *rest]
    del rest
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(content, found)) == [picture(i) for i in range(3)]
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 1  # noqa: PTH208
    del first, second, found
    assert open_files == 1 or len(os.listdir("/proc/self/fd")) == open_files - 1  # noqa: PTH208


# ── zip ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def zipped(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_zip_files(tmp_path: Path, picture: Picture, method: int) -> None:
    members = [
        ("a/1.png", picture(1)),
        ("a/", b""),
        ("../../up.png", picture(2)),
        ("/abs.png", picture(3)),
        ("猫 #\n.png", picture(4)),
        ("__MACOSX/a/._1.png", b"macOS"),
        ("none.jpg", b""),
        ("broken.jpg", b"\xff\xd8\xffnothing"),
        ("notes.txt", b"x"),
        ("a/1.png", picture(5)),
    ]
    path = tmp_path / "x.zip"
    data = zipped(path, members, method)
    expected = [
        (f"{path}::{name}", data) for name, data in members if name.endswith(("png", "jpg")) and "MACOSX" not in name
    ]
    assert [(item.name, content(item)) for item in all_of("zip", path)] == expected
    path.write_bytes(b"#!/bin/sh\n" + data + b"")  # what stands before shifts all offsets
    assert [(item.name, content(item)) for item in all_of("zip", path)] == expected


def test_zip_names_in_other_codes(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "x.zip"
    data = zipped(path, [("aXX.png", picture(1)), ("bX.png", picture(2)), ("猫Y.png", picture(3))])
    data = data.replace(b"aXX.png", "aé.png".encode()).replace(b"bX.png", b"b\x82.png")  # of macOS; of DOS
    data = data.replace("猫Y.png".encode(), b"\xe7\x8c\xe9Y.png")  # is to be UTF-8 and is not
    path.write_bytes(data)
    found = all_of("zip", path)
    assert names(found) == [f"{path}::{name}" for name in ("aé.png", "bé.png", "\udce7\udc8c\udce9Y.png")]
    assert [content(item) for item in found] == [picture(i) for i in (1, 2, 3)]


def test_zip64(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(3):
            with file.open(f"{i}.png", "w", force_zip64=True) as member:
                member.write(picture(i) * 20)  # shorter when packed
    data = bytearray(path.read_bytes())
    # the directory as of a file beyond 4 GB
    place = data.index(b"PK\1\2")
    entries = bytearray()
    for i in range(3):
        head = bytearray(data[place : place + 46])
        length = int.from_bytes(head[28:30], "little")
        packed_size, size, offset = (int.from_bytes(head[k : k + 4], "little") for k in (20, 24, 42))
        for k in (20, 24, 42):
            head[k : k + 4] = b"\xff" * 4
        extra = struct.pack("<HHH", 9, 2, 7) + struct.pack("<2H3Q", 1, 24, size, packed_size, offset)
        head[30:32] = len(extra).to_bytes(2, "little")
        entries += head + data[place + 46 : place + 46 + length] + extra
        place += 46 + length + int.from_bytes(data[place + 30 : place + 32], "little")
        assert data[place:][:4] == (b"PK\1\2" if i < 2 else b"PK\5\6")
    begin = data.index(b"PK\1\2")
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(entries), begin)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(entries), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:begin] + entries + wide + locator + end)
    with zipfile.ZipFile(path) as file:
        assert file.read("2.png") == picture(2) * 20  # made right
    assert [content(item) for item in all_of("zip", path)] == [picture(i) * 20 for i in range(3)]


def test_zip_files_that_lie(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "x.zip"
    data = zipped(path, [("1.png", picture(1)), ("2.png", bytes(10**6)), ("3.png", picture(3))])
    place = data.rindex(b"PK\1\2", 0, data.rindex(b"2.png"))

    def broken(at: int, new: bytes) -> Item:
        path.write_bytes(data[: place + at] + new + data[place + at + len(new) :])
        found = list(items(Block("zip", (str(path),))))
        assert [content(item) for item in (found[0], found[2])] == [picture(1), picture(3)]
        return found[1]

    for at, new, error, message in (
        (24, (1000).to_bytes(4, "little"), ImageCorrupt, r"2\.png: 1,001 bytes with checksum .* says 1,000"),
        (16, b"\1\2\3\4", ImageCorrupt, "says 1,000,000 and 04030201"),
        (24, (2**31).to_bytes(4, "little"), ImageTooLarge, "2,147,483,648 bytes; the limit"),
        (20, (2**31).to_bytes(4, "little"), ImageTooLarge, "2,147,483,648 bytes; the limit"),
        (20, (10**6).to_bytes(4, "little"), ImageCorrupt, "bytes of 1,000,000 are there"),
        (8, b"\1", ImageUnreadable, "it is encrypted"),
        (10, b"\x0e", ImageUnreadable, r"compressed by method 14; stored \(0\) and deflated \(8\)"),
        (42, b"\1", ImageCorrupt, "no member begins at byte"),
    ):
        with pytest.raises(error, match=message):
            broken(at, new).source()  # type: ignore[operator]
    end = data.rindex(b"PK\5\6")
    for damaged in (data[:end], data[: len(data) // 2], b"", b"x", data[:end] + b"x" * 22):
        path.write_bytes(damaged)
        (item,) = all_of("zip", path)
        with pytest.raises(ImageCorrupt, match="after 0 images: no directory at its end: cut short, or no zip file"):
            raise item.source  # type: ignore[misc]
    path.write_bytes(data[:place] + b"xx" + data[place + 2 :])
    assert [content(item) for item in all_of("zip", path)] == [picture(1), "corrupt"]


def test_noise_in_a_zip_never_raises(tmp_path: Path, picture: Picture) -> None:
    path, random = tmp_path / "x.zip", np.random.default_rng(0)
    data = zipped(path, [(f"{i}.png", picture(i)) for i in range(5)])
    for _ in range(200):
        broken = bytearray(data)
        for place in random.integers(data.index(b"PK\1\2"), len(data), 3):
            broken[place] = random.integers(256)
        path.write_bytes(broken)
        found = list(items(Block("zip", (str(path),))))
        assert all(isinstance(content(item), bytes | str) for item in found) and len(found) <= 6


# ── Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parquet(path: Path, cells: list[Any], rows: int, **options: Any) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if isinstance(cells[0], dict) else pa.binary()
    table = pa.table({"label": list(range(len(cells))), "image": pa.array(cells, kind)})
    pq.write_table(table, path, row_group_size=rows, **options)


def test_rows_of_parquet(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    (tmp_path / "beside.png").write_bytes(picture(99))
    cells: list[Any] = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(23)]
    cells[3] = {"bytes": None, "path": "beside.png"}
    cells[5], cells[7] = None, {"bytes": None, "path": None}
    cells[11] = {"bytes": b"", "path": None}
    cells[13] = {"bytes": b"x" * 3000, "path": None}
    parquet(path, cells, 7)
    monkeypatch.setattr(archives, "_BATCH_ROWS", 3)
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 2000)
    (block,) = plan([str(path)])
    assert block == Block("parquet", (str(path),))
    expected: list[bytes | str] = [picture(i) for i in range(23)]
    expected[3], expected[5], expected[7], expected[11], expected[13] = (
        picture(99),
        "unreadable",
        "unreadable",
        b"",
        "too_large",
    )
    found = all_of("parquet", path)
    assert names(found) == [f"{path}::{i}" for i in range(23)]
    assert [content(item) for item in found] == expected
    parquet(path, [picture(i) for i in range(5)], 2)
    assert [content(item) for item in all_of("parquet", path)] == [picture(i) for i in range(5)]


def test_damaged_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    noise = np.random.default_rng(0)
    cells = [noise.bytes(2000) for _ in range(12)]
    parquet(path, cells, 4, compression="snappy", data_page_size=1, use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    place = data.index(cells[5][:50])
    path.write_bytes(data[: place - 200] + b"\xff" * 200 + data[place:])
    monkeypatch.setattr(archives, "_BATCH_ROWS", 1)
    found = all_of("parquet", path)
    assert names(found) == [f"{path}::{i}" for i in range(12)]
    kinds = [content(item) for item in found]
    assert kinds[:4] + kinds[8:] == cells[:4] + cells[8:] and "corrupt" in kinds[4:8]
    error = next(item.source for item in found if isinstance(item.source, ImageCorrupt))
    with pytest.raises(ImageCorrupt, match=r"::\d: row group 1 cannot be read: "):
        raise error
    for broken in (b"", b"PAR1", data[:-100], b"no parquet at all" * 9):
        path.write_bytes(broken)
        assert paths(str(path)) == [str(path)]
        (item,) = all_of("parquet", path)
        assert item.name == str(path) and isinstance(item.source, ImageCorrupt)


def test_parquet_without_images_or_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"embedding": [1.0]}), path)
    with pytest.raises(DataError, match="has no column of paths"):
        paths(str(path))
    (item,) = all_of("parquet", path)
    with pytest.raises(ImageUnreadable, match=r"x\.parquet: no column of image bytes; there are embedding"):
        raise item.source  # type: ignore[misc]

    def missing() -> None:
        raise MissingExtra("pyarrow", "parquet")

    monkeypatch.setattr(table, "require_pyarrow", missing)
    with pytest.raises(MissingExtra, match="pyarrow is not installed"):
        paths(str(path))
    (item,) = items(Block("parquet", (str(path),)))
    with pytest.raises(ImageUnreadable, match="pyarrow is not installed"):
        raise item.source  # type: ignore[misc]


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def memory(picture: Picture) -> Iterator[Any]:
    """memory://: a file system of fsspec that is not asynchronous, as hf:// and sftp:// are not."""
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    for i, name in enumerate(("p/1.png", "p/sub/2.png", "p/sub/3.jpg", "p/猫 #?.png", "p/notes.txt")):
        fs.pipe_file(f"/bucket/{name}", picture(i))
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_folders_and_patterns_on_a_server(memory: Any, picture: Picture) -> None:
    root = "memory://bucket"
    everything = ["p/1.png", "p/sub/2.png", "p/sub/3.jpg", "p/猫 #?.png"]
    for argument in ("p", "p/", "p/**", ""):
        assert paths(f"{root}/{argument}") == [f"{root}/{name}" for name in everything], argument
    assert paths(f"{root}/p/**/*.png") == [f"{root}/{name}" for name in everything if name.endswith("png")]
    assert paths(f"{root}/p/{{1,x}}.png", f"{root}/gone/", f"{root}/p/*.gif") == [
        f"{root}/p/1.png",
        f"{root}/p/x.png",
        f"{root}/gone/",
        f"{root}/p/*.gif",
    ]
    assert paths(f"{root}/p/notes.txt") == [f"{root}/p/notes.txt"]
    found = list(items(next(plan([f"{root}/p", f"{root}/gone.png"]))))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(content, found)) == [*(picture(i) for i in (0, 1, 2, 3)), "not_found"]
    with pytest.raises(ImageNotFound, match=r"memory://bucket/gone\.png: no such file"):
        found[-1].source()  # type: ignore[operator]


def test_archives_lists_and_tables_on_a_server(
    memory: Any, picture: Picture, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_PIECE_BYTES", 1000)
    packed(tmp_path / "x.tar", {f"{i}.png": picture(i) for i in range(4)})
    memory.pipe_file("/bucket/s/x.tar", (tmp_path / "x.tar").read_bytes())
    memory.pipe_file("/bucket/s/x.zip", zipped(tmp_path / "x.zip", [("7.png", picture(7))]))
    parquet(tmp_path / "x.parquet", [{"bytes": None, "path": "../p/1.png"}, {"bytes": picture(8), "path": None}], 1)
    memory.pipe_file("/bucket/s/x.parquet", (tmp_path / "x.parquet").read_bytes())
    blocks = list(plan(["memory://bucket/s"]))
    assert [block.kind for block in blocks] == ["parquet", "tar", "zip"]
    assert blocks == list(plan(["memory://bucket/s/*"]))
    tars = all_of("tar", "memory://bucket/s/x.tar")
    assert names(tars) == [f"memory://bucket/s/x.tar::{i}.png" for i in range(4)]
    assert [content(item) for item in tars] == [picture(i) for i in range(4)]
    assert [content(item) for item in all_of("zip", "memory://bucket/s/x.zip")] == [picture(7)]
    assert [content(item) for item in all_of("parquet", "memory://bucket/s/x.parquet")][1] == picture(8)
    assert not [path for path in cache.rglob("*") if path.is_file()]  # nothing is left of the copies
    memory.pipe_file("/bucket/list.csv", b"path,label\np/1.png,3\ns3x/2.png,4\n")
    memory.pipe_file("/bucket/list.txt", b"p/1.png\n/abs.png\n")
    expected = ["memory://bucket/p/1.png", "memory://bucket/s3x/2.png"]
    assert paths("memory://bucket/list.csv") == paths("@memory://bucket/list.csv") == expected
    assert paths("@memory://bucket/list.txt") == ["memory://bucket/p/1.png", "/abs.png"]
    assert paths("@memory://bucket/gone.txt", "memory://bucket/gone.csv") == [
        "@memory://bucket/gone.txt",
        "memory://bucket/gone.csv",
    ]
    memory.pipe_file("/bucket/list.csv", b"a,b\n1,2\n")
    with pytest.raises(DataError, match=r"memory://bucket/list\.csv has no column of paths"):
        paths("memory://bucket/list.csv")


def test_what_goes_wrong_with_a_copy(memory: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/x.tar", b"\0" * 10_240)
    block = Block("tar", ("memory://bucket/x.tar",))

    def reason() -> str:
        (item,) = items(block)
        assert isinstance(item.source, ImageUnreadable) and item.name == block.paths[0]
        return str(item.source)

    with monkeypatch.context() as patched:
        patched.setattr(remote, "_piece", lambda *_: b"12")
        assert "2 bytes of 10,240 arrived" in reason()
        calls: list[int] = []

        def failing(*_: object) -> bytes:
            calls.append(1)
            raise OSError("reset")

        patched.setattr(remote, "_piece", failing)
        assert "memory://bucket/x.tar: cannot be read: reset." in reason() and len(calls) == 3

        def changing(*_: object) -> bytes:
            memory.pipe_file("/bucket/x.tar", b"\0" * 20_480)
            return b"\0" * 10_240

        patched.setattr(remote, "_piece", changing)
        assert "it has changed while it was fetched" in reason()
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPSIN_DATA_CACHE", f"{tmp_path}/file")
    assert "Set OPSIN_DATA_CACHE to a folder of yours" in reason()


def test_limits_of_a_remote_image(memory: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/bucket/1.png", b"x" * 100)
    monkeypatch.setattr(preprocess, "MAX_DOWNLOAD_BYTES", 100)
    assert remote.read_address("memory://bucket/1.png") == b"x" * 100
    memory.pipe_file("/bucket/1.png", b"x" * 101)
    with pytest.raises(ImageTooLarge, match=r"memory://bucket/1\.png: more than 100 bytes, the limit for a download"):
        remote.read_address("memory://bucket/1.png")
    monkeypatch.setattr(preprocess, "DOWNLOAD_SECONDS", 0.1)
    hang = threading.Event()
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **__: hang.wait(20))
    with pytest.raises(ImageUnreadable, match=r"memory://bucket/1\.png: cannot be read: no answer within 0\.1 seconds"):
        remote.read_address("memory://bucket/1.png")
    hang.set()


def test_addresses_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = items(next(plan(["nowhere://x/1.png"])))
    with pytest.raises(ImageUnreadable, match="nowhere://x/1.png: cannot be read: Protocol not known: nowhere"):
        item.source()  # type: ignore[operator]
    with pytest.raises(DataError, match="nowhere://x/folder cannot be fetched: ValueError: Protocol not known"):
        paths("nowhere://x/folder")
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    for argument in ("s3://bucket/1.png", "s3://bucket/*.png", "s3://bucket/x.tar"):
        with pytest.raises(DataError, match="a package that reads s3:// is not installed: pip install s3fs"):
            paths(argument)


class _Server(BaseHTTPRequestHandler):
    """/status/NNN answers that; /cut ends early; /hang says nothing; anything else is in `files`."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    over: threading.Event

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/hang" in path:
            self.over.wait(20)
            self.close_connection = True
            return
        if "/reset" in path:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        # S3 lists /status?prefix=403/
        status = next((code for code in (403, 500) if f"/{code}" in path or f"={code}" in self.path), 200)
        data = self.files.get(path)
        if data is None and status == 200 and "/cut" not in path:
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", "1000" if "/cut" in path else str(len(data or b"")))
        self.end_headers()
        self.wfile.write(data or b"")
        if "/cut" in path:
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    over = threading.Event()
    handler = type("Handler", (_Server,), {"files": files, "over": over})

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", files
        over.set()
        http.shutdown()
        thread.join()


def test_http(
    server: tuple[str, dict[str, bytes]], picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, files = server
    packed(tmp_path / "x.tar", {"1.png": picture(1)})
    files["/s/0.tar"] = (tmp_path / "x.tar").read_bytes()
    files["/list.csv"] = b"url,path\n1,a/1.png\n"
    one = f"{url}/a.png?size=*&x={{1,2}}"
    assert paths(f"{url}/a*.png?size=1") == [f"{url}/a*.png?size=1"]  # no pattern
    (item,) = items(Block("files", (one,)))
    assert item == Item(one, one)  # `decode` fetches it
    (shard, gone) = plan([f"{url}/s/{{0..1}}.tar?key=s"])
    assert (shard.kind, shard.paths) == ("tar", (f"{url}/s/0.tar?key=s",))
    assert [content(item) for item in items(shard)] == [picture(1)]
    assert [content(item) for item in items(gone)] == ["not_found"]
    assert paths(f"{url}/list.csv") == [f"{url}/a/1.png"]
    assert paths(f"{url}/gone.csv") == [f"{url}/gone.csv"]
    with pytest.raises(DataError, match="status 403, Forbidden. It is a list of images"):
        paths(f"{url}/status/403/list.csv")
    monkeypatch.setattr(preprocess, "DOWNLOAD_SECONDS", 0.2)
    for path, reason in (
        ("status/403/x.tar", "status 403, Forbidden"),
        ("status/500/x.tar", "status 500, Internal Server Error"),
        ("cut/x.tar", "0 bytes of 1,000 arrived"),
        ("hang/x.tar", "timed out"),
        ("reset/x.tar", "reset|closed"),
    ):
        (item,) = items(Block("tar", (f"{url}/{path}",)))
        with pytest.raises(ImageUnreadable, match=rf"{path}: cannot be read: .*({reason})"):
            raise item.source  # type: ignore[misc]


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_s3(aws: Callable[[str], Any], picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        fs = aws(f"http://{host}:{port}")
        clear = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")  # of other tests' servers
        urllib.request.urlopen(clear).close()
        fs.mkdir("bucket")
        packed(tmp_path / "x.tar", {f"{i}.png": picture(i) for i in range(3)})
        keys = {
            "photos/": b"",  # as the console marks a folder
            "photos/1.png": picture(1),
            "photos/a b#c ?[1].png": picture(2),
            "photos/none.png": b"",
            "photos/sub/2.png": picture(3),
            "photos/sub/3.jpg": picture(4),
            "photos/猫.png": picture(5),
            "photos/notes.txt": b"x",
            "shards/0.tar": (tmp_path / "x.tar").read_bytes(),
        }
        for key, data in keys.items():
            fs.call_s3("put_object", Bucket="bucket", Key=key, Body=data)
        root = "s3://bucket/photos"
        expected = ["1.png", "a b#c ?[1].png", "none.png", "sub/2.png", "sub/3.jpg", "猫.png"]
        for argument in (root, f"{root}/", "s3://bucket/"):
            assert paths(argument) == [f"{root}/{name}" for name in expected], argument
        assert paths(f"{root}/**/*.jpg") == [f"{root}/sub/3.jpg"]
        assert paths(f"{root}/notes.txt", f"{root}/gone", "s3://none/*.png", f"{root}/x*.png") == [
            f"{root}/notes.txt",
            f"{root}/gone",
            "s3://none/*.png",
            f"{root}/x*.png",
        ]
        found = list(items(next(plan([root, f"{root}/gone.png", "s3://none/1.png"]))))
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(content, found)) == [
                *(keys[f"photos/{name}"] for name in expected),
                "not_found",
                "not_found",
            ]
        fs.call_s3("put_object", Bucket="bucket", Key="photos//odd.png", Body=b"x")
        assert f"{root}/" in paths(root)  # cannot be listed, so a record says it
        blocks = list(plan(["s3://bucket/shards/{0..1}.tar"]))
        assert [content(item) for block in blocks for item in items(block)] == [*map(picture, range(3)), "not_found"]
        monkeypatch.setattr(preprocess, "MAX_DOWNLOAD_BYTES", 10)
        assert content(found[0]) == "too_large"
    finally:
        server.stop()


def test_s3_that_refuses_fails_and_hangs(
    aws: Callable[[str], Any], server: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    monkeypatch.setattr(preprocess, "DOWNLOAD_SECONDS", 1)
    for place, reason in (
        ("status/403", "Forbidden|Access Denied"),
        ("status/500", "Internal Server Error"),
        ("reset", "reset|closed|disconnected"),
        ("hang", "no answer within 1 seconds"),
    ):
        aws(url)
        (item,) = items(next(plan([f"s3://{place}/1.png"])))
        with pytest.raises(ImageUnreadable, match=rf"s3://{place}/1\.png: cannot be read: .*({reason})"):
            item.source()  # type: ignore[operator]
    with pytest.raises(DataError, match=r"s3://status/403 cannot be fetched: .*Check the address and your access"):
        paths("s3://status/403/*.png")
    with pytest.raises(DataError, match=r"s3://status/500 cannot be fetched"):
        paths("s3://status/500")
