"""WebDataset shards, here and on a server, and ILSVRC 2012 in small."""

import contextlib
import csv
import io
import json
import logging
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from opsin.data import open_samples, tar
from opsin.data import samples as samples_module
from opsin.errors import DataError, ImageCorrupt, ImageTooLarge
from opsin.labels import Labels

Picture = Callable[[int], bytes]


def packed(path: Path | io.BytesIO, members: dict[str, bytes], **options: object) -> Path | io.BytesIO:
    mode = options.pop("mode", "w")
    where = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode=mode, **where, **options) as file:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def shard(path: Path, picture: Picture, seeds: range) -> Path:
    members: dict[str, bytes] = {}
    for i in seeds:
        members |= {f"{i:04}.png": picture(i), f"{i:04}.cls": str(i % 3).encode()}
    path.parent.mkdir(parents=True, exist_ok=True)
    packed(path, members)
    return path


def test_members_are_read_by_seek(tmp_path: Path, picture: Picture, caplog: pytest.LogCaptureFixture) -> None:
    members = {
        "a/1.cls": b"dog\n",
        "a/1.png": picture(1),
        "a/1.mask.png": picture(9),
        "b/1.PNG": picture(2),
        "b/1.json": b'{"label": "cat", "size": [3, 5]}',
        "2.jpg": picture(3),
        "2.txt": "Füchse ".encode(),
        "only.png": picture(4),
        "none.cls": b"dog",
        "bad.png": picture(5),
        "bad.json": b'{"label": {"a": 1}}',
        "worse.png": picture(6),
        "worse.cls": b"\xff",
        ".hidden.png": picture(7),
    }
    path = packed(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        found = pickle.loads(pickle.dumps(open_samples(str(path))))
    assert "4 of 7 samples have no image or no class and are left out" in caplog.text
    assert found.labels.names == ("Füchse", "cat", "dog")
    assert found.targets.tolist() == [2, 1, 0]
    assert [found.source(i) for i in range(3)] == [picture(1), picture(2), picture(3)]
    assert [found.key(i) for i in range(3)] == [f"{path}::{name}" for name in ("a/1.png", "b/1.PNG", "2.jpg")]
    assert found.identity() == open_samples(str(path)).identity()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_form(tmp_path: Path, picture: Picture, form: int) -> None:
    folder = "/".join(["d" * 50] * 3)
    path = packed(tmp_path / "0.tar", {f"{folder}/1.png": picture(1), f"{folder}/1.cls": b"0"}, format=form)
    found = open_samples(str(path))
    assert (found.source(0), found.key(0)) == (picture(1), f"{path}::{folder}/1.png")


def test_ranges_patterns_and_folders(tmp_path: Path, picture: Picture) -> None:
    for i in range(4):
        shard(tmp_path / f"x-{i:03}.tar", picture, range(5 * i, 5 * i + 5))
    whole = open_samples(str(tmp_path))
    assert whole.targets.tolist() == [i % 3 for i in range(20)]
    assert [whole.source(i) for i in range(20)] == [picture(i) for i in range(20)]
    for data, count in (
        (f"{tmp_path}/x-{{000..003}}.tar", 20),
        (f"{tmp_path}/*.tar", 20),
        (f"{tmp_path}/x-{{001,003}}.tar", 10),
    ):
        found = open_samples(data)
        assert len(found) == count, data
    assert found.key(5) == f"{tmp_path}/x-003.tar::0015.png"
    assert len(open_samples([f"{tmp_path}/x-000.tar", f"{tmp_path}/x-00{{2..3}}.tar"])) == 15
    with pytest.raises(DataError, match=r"there is no .*x-004\.tar\. Check the path, or the range"):
        open_samples(f"{tmp_path}/x-{{003..004}}.tar")


def test_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    def urls(pattern: str) -> list[str]:
        return tar.expand(f"https://x/{pattern}")

    assert urls("{08..11}.tar") == [f"https://x/{i}.tar" for i in ("08", "09", "10", "11")]
    assert urls("{a,b}/{1..2}.tar") == [f"https://x/{i}.tar" for i in ("a/1", "a/2", "b/1", "b/2")]
    assert urls("{2..0}.tar?v=1") == [f"https://x/{i}.tar?v=1" for i in (2, 1, 0)]
    assert urls("{x}.tar") == ["https://x/{x}.tar"]
    monkeypatch.setattr(tar, "_MAX_SHARDS", 10)
    with pytest.raises(DataError, match=r"stands for more than 10 shards"):
        urls("{0..99999999999}.tar")


def test_shards_of_splits(tmp_path: Path, picture: Picture) -> None:
    shard(tmp_path / "set-train-0.tar", picture, range(4))
    shard(tmp_path / "set-val-0.tar", picture, range(10, 13))
    found = open_samples(str(tmp_path))
    assert found.held_out is not None and found.held_out.tolist() == [False] * 4 + [True] * 3
    assert open_samples(str(tmp_path), split="val").source(0) == picture(10)
    shard(tmp_path / "b" / "cat" / "9.tar", picture, range(2))  # in another folder: not looked for
    shard(tmp_path / "b" / "train" / "0.tar", picture, range(2))
    shard(tmp_path / "b" / "test" / "0.tar", picture, range(3))
    found = open_samples(str(tmp_path / "b"))
    assert found.held_out is not None and found.held_out.tolist() == [True] * 3 + [False] * 2


def test_names_beside_the_shards(tmp_path: Path, picture: Picture) -> None:
    path = shard(tmp_path / "0.tar", picture, range(4))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    found = open_samples(str(path))
    assert (found.labels.names, found.targets.tolist()) == (("ant", "bee", "cow", "dog"), [0, 1, 2, 0])
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match="row 3 has the class 2; 2 names are given, for 0 to 1"):
        open_samples(str(path))


def test_several_classes_an_image(tmp_path: Path, picture: Picture) -> None:
    labels = {"1": ["b", "a"], "2": [], "3": ["a"]}
    members: dict[str, bytes] = {}
    for i, value in labels.items():
        members |= {f"{i}.png": picture(int(i)), f"{i}.json": json.dumps({"label": value}).encode()}
    found = open_samples(str(packed(tmp_path / "0.tar", members)))
    assert found.labels.multi_label and found.targets.tolist() == [[1, 1], [0, 0], [1, 0]]


def test_damaged_and_compressed_shards(tmp_path: Path, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "0.tar", picture, range(5))
    data = path.read_bytes()
    header = data.index(b"0002.png")
    path.write_bytes(data[:header] + b"\xff" * 512 + data[header + 512 :])
    with pytest.raises(
        DataError, match=rf"0\.tar is no whole tar file of .*: the header at byte {header:,} is damaged"
    ):
        open_samples(str(path))
    for cut in (header + 100, header + 520):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match=r"0\.tar is no whole tar file of .* Fetch it again"):
            open_samples(str(path))
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="is no whole tar file of 1,300 bytes"):
        open_samples(str(path))
    packed(path, {"1.png": picture(1), "1.cls": b"0"}, mode="w:gz")
    with pytest.raises(DataError, match="It is compressed, and is read at random: unpack it to a plain .tar"):
        open_samples(str(path))
    packed(path, {"1.wav": b"x", "1.cls": b"0"})
    with pytest.raises(DataError, match="hold no labelled images: looked for KEY.jpg"):
        open_samples(str(path))
    path.write_bytes(data)
    found = open_samples(str(path))
    path.write_bytes(data[:header])
    with pytest.raises(
        ImageCorrupt, match=r"0\.tar::0004\.png: its bytes are to be .* has changed since it was opened"
    ):
        found.source(4)
    monkeypatch.setattr(samples_module, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ImageTooLarge, match=r"0\.tar::0000\.png: \d+ bytes; the limit"):
        found.source(0)


def test_a_size_past_the_end_is_seen_before_anything_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("1.png")
    info.size = 2**40
    (tmp_path / "0.tar").write_bytes(info.tobuf() + b"\0" * 1024)
    with pytest.raises(DataError, match="1.png is to end at byte 1,099,511,62"):
        open_samples(str(tmp_path / "0.tar"))


def test_sparse_members_are_left_out(tmp_path: Path, picture: Picture) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as file:
        for name, data, kind in (
            ("1.png", picture(1), tarfile.GNUTYPE_SPARSE),  # its bytes are not the file's
            ("1.cls", b"0", tarfile.REGTYPE),
            ("2.png", picture(2), tarfile.REGTYPE),
            ("2.cls", b"0", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            file.addfile(info, io.BytesIO(data))
    found = open_samples(str(tmp_path / "0.tar"))
    assert len(found) == 1 and found.source(0) == picture(2)


def test_links_are_not_followed(tmp_path: Path, picture: Picture) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)
        info = tarfile.TarInfo("1.cls")
        info.size = 1
        file.addfile(info, io.BytesIO(b"0"))
    with pytest.raises(DataError, match="hold no labelled images"):
        open_samples(str(path))


def test_the_index_of_a_large_archive_is_kept(
    tmp_path: Path, picture: Picture, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard(tmp_path / "0.tar", picture, range(5))
    open_samples(str(path))
    assert not list(cache.iterdir())
    monkeypatch.setattr(tar, "_KEPT_INDEX_BYTES", 0)
    first = open_samples(str(path))
    (kept,) = (cache / "index").iterdir()
    builds: list[int] = []
    original = tar._index_shard
    monkeypatch.setattr(tar, "_index_shard", lambda archive: builds.append(1) or original(archive))  # type: ignore[func-returns-value]
    second = open_samples(str(path))
    assert not builds
    assert [second.source(i) for i in range(5)] == [first.source(i) for i in range(5)]
    assert (second.identity(), second.targets.tolist()) == (first.identity(), first.targets.tolist())
    kept.write_bytes(kept.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert len(open_samples(str(path))) == 5
    assert builds == [1] and "cannot be read" in caplog.text
    shard(path, picture, range(6))  # changed: another index
    assert len(open_samples(str(path))) == 6


# ---- from a server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The files of `tmp_path` over HTTP; its address and what was asked."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()
        thread.join()


def test_shards_over_http_are_fetched_once(
    tmp_path: Path, picture: Picture, server: tuple[str, list[str]], cache: Path
) -> None:
    url, _ = server
    for i in range(2):
        shard(tmp_path / "s" / f"{i}.tar", picture, range(5 * i, 5 * i + 5))
    (tmp_path / "s" / "classes.txt").write_text("ant\nbee\ncow\n")
    found = open_samples(f"{url}/s/{{0..1}}.tar")
    assert found.labels.names == ("ant", "bee", "cow")
    assert [found.source(i) for i in range(10)] == [picture(i) for i in range(10)]
    assert found.key(7) == f"{url}/s/1.tar::0007.png"
    files = sorted(path for path in (cache / "files").rglob("*") if path.is_file() and path.suffix != ".lock")
    times = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 3 and not [path for path in files if path.suffix]
    again = open_samples(f"{url}/s/{{0..1}}.tar")
    assert again.identity() == found.identity()
    assert [path.stat().st_mtime_ns for path in files] == times
    shard(tmp_path / "s" / "1.tar", picture, range(20, 40))  # of another size: another version
    assert open_samples(f"{url}/s/{{0..1}}.tar").source(5) == picture(20)
    with pytest.raises(DataError, match=r"/s/2\.tar does not exist. Check the address, or the range"):
        open_samples(f"{url}/s/{{0..2}}.tar")


def test_fsspec_addresses(picture: Picture, tmp_path: Path, cache: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    try:
        for i in range(3):
            data = shard(tmp_path / "x.tar", picture, range(4 * i, 4 * i + 4)).read_bytes()
            memory.pipe_file(f"/bucket/train-{i}.tar", data)
        found = open_samples("memory://bucket/train-*.tar")
        assert [found.source(i) for i in range(12)] == [picture(i) for i in range(12)]
        assert found.key(0).removeprefix("memory://").lstrip("/") == "bucket/train-0.tar::0000.png"
        assert len(open_samples("memory://bucket/train-{1..2}.tar", split="train")) == 8
        memory.pipe_file("/bucket/classes.txt", b"ant\nbee\ncow")
        assert open_samples("memory://bucket/train-0.tar").labels.names == ("ant", "bee", "cow")
        with pytest.raises(DataError, match="memory://bucket/train-7.tar does not exist"):
            open_samples("memory://bucket/train-7.tar")
        with pytest.raises(DataError, match=r"there is no memory://bucket/val-\*\.tar"):
            open_samples("memory://bucket/val-*.tar")
    finally:
        memory.store.clear()


def test_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/0\.tar cannot be fetched: .*refused"):
        open_samples("http://127.0.0.1:9/0.tar")
    with pytest.raises(DataError, match="nowhere://x/0.tar cannot be fetched: ValueError: Protocol not known"):
        open_samples("nowhere://x/0.tar")

    def cut(part: Path) -> None:
        part.write_bytes(b"123")

    with pytest.raises(DataError, match="x://a: 3 bytes of 4 arrived. Run again"):
        tar._keep("x://a", 4, [], cut)
    with pytest.raises(DataError, match=r"no room for x://a in .*: 4,000,000,000,000,000 bytes, .* OPSIN_DATA_CACHE"):
        tar._keep("x://a", 4 * 10**15, [], cut)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "s3fs", None)
        with pytest.raises(DataError, match="a package that reads s3:// is not installed: pip install s3fs"):
            open_samples("s3://bucket/{0..1}.tar")


# ---- ILSVRC 2012

SYNSETS = {3: "n01443537", 1: "n02123045", 2: "n01629819"}  # the devkit's numbers are not in the order of the ids


def meta(compressed: bool) -> bytes:
    savemat = pytest.importorskip("scipy.io").savemat
    fields = ("ILSVRC2012_ID", "WNID", "words", "num_children", "children", "wordnet_height")
    rows: list[tuple] = [(float(i), wnid, "words, of é", 0.0, [], 0.0) for i, wnid in SYNSETS.items()]
    rows.append((1001.0, "n00001740", "entity", 2.0, [1.0, 2.0], 19.0))
    table = np.zeros((len(rows), 1), [(name, object) for name in fields])
    for row, values in enumerate(rows):
        for name, value in zip(fields, values, strict=True):
            table[name][row, 0] = np.array(value) if isinstance(value, list) else value
    buffer = io.BytesIO()
    savemat(buffer, {"other": np.arange(7), "synsets": table}, do_compression=compressed)
    return buffer.getvalue()


@pytest.fixture
def ilsvrc(tmp_path: Path, picture: Picture) -> Path:
    train = {}
    for k, wnid in enumerate(("n01443537", "n02123045")):
        inner = packed(io.BytesIO(), {f"{wnid}_{i}.JPEG": picture(10 * k + i) for i in range(3)})
        assert isinstance(inner, io.BytesIO)
        train[f"{wnid}.tar"] = inner.getvalue()
    packed(tmp_path / tar.TRAIN_TAR, train)
    packed(tmp_path / tar.VAL_TAR, {f"ILSVRC2012_val_{i:08}.JPEG": picture(30 + i) for i in (2, 1, 3)})
    kit = {f"{tar.DEVKIT}/data/{tar.TRUTH}": b"1\n2\n3\n", f"{tar.DEVKIT}/data/{tar.META}": meta(True)}
    packed(tmp_path / f"{tar.DEVKIT}.tar.gz", kit, mode="w:gz")
    return tmp_path


def wnids(found: samples_module.Samples) -> list[str]:
    assert found.labels.wnids is not None
    return [found.labels.wnids[target] for target in found.targets]


def test_ilsvrc(ilsvrc: Path, picture: Picture) -> None:
    found = pickle.loads(pickle.dumps(open_samples(str(ilsvrc))))
    assert found.labels == Labels.imagenet_1k()
    val = ["n01629819", "n02123045", "n01443537"]  # images 2, 1, 3
    assert wnids(found) == ["n01443537"] * 3 + ["n02123045"] * 3 + val
    assert found.held_out.tolist() == [False] * 6 + [True] * 3
    assert [found.source(i) for i in range(9)] == [picture(i) for i in (0, 1, 2, 10, 11, 12, 32, 31, 33)]
    assert found.key(4) == f"{ilsvrc}/{tar.TRAIN_TAR}::n02123045.tar/n02123045_1.JPEG"
    assert wnids(open_samples(str(ilsvrc), split="val")) == val
    (ilsvrc / tar.TRAIN_TAR).unlink()
    assert wnids(open_samples(str(ilsvrc))) == val


@pytest.mark.parametrize("compressed", [True, False])
def test_numbers_of_the_devkit(compressed: bool) -> None:
    data = meta(compressed)
    assert tar.synsets(data, "x") == SYNSETS | {1001: "n00001740"}
    for broken in (b"", data[: len(data) // 2], b"MATLAB 7.3 MAT-file".ljust(200), data[:128]):
        with pytest.raises(DataError, match=r"x: meta\.mat cannot be read: it .* Fetch the devkit again"):
            tar.synsets(broken, "x")


def test_numbers_survive_noise() -> None:
    data, random = meta(False), np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for place in random.integers(128, len(data), 3):
            broken[place] = random.integers(256)
        with contextlib.suppress(DataError):
            tar.synsets(bytes(broken), "x")


def test_ilsvrc_with_an_unpacked_devkit_or_kaggles_table(ilsvrc: Path) -> None:
    whole = open_samples(str(ilsvrc)).targets.tolist()
    with tarfile.open(ilsvrc / f"{tar.DEVKIT}.tar.gz") as file:
        for member in file.getmembers():
            path = ilsvrc / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.extractfile(member).read())  # type: ignore[union-attr]
    (ilsvrc / f"{tar.DEVKIT}.tar.gz").unlink()
    assert open_samples(str(ilsvrc)).targets.tolist() == whole
    (ilsvrc / tar.DEVKIT / "data" / tar.TRUTH).write_text("1\n9\n3\n")
    with pytest.raises(DataError, match="has a line that is no ILSVRC2012_ID of meta.mat: 9"):
        open_samples(str(ilsvrc))
    (ilsvrc / tar.DEVKIT / "data" / tar.TRUTH).write_text("1\n2\n")
    with pytest.raises(DataError, match="has 1 images without a class in .*, the first is number 3; 2 have one"):
        open_samples(str(ilsvrc))
    (ilsvrc / tar.DEVKIT / "data" / tar.TRUTH).unlink()
    with pytest.raises(
        DataError, match=r"nothing that gives its images classes: looked for ILSVRC2012_devkit_t12\.tar"
    ):
        open_samples(str(ilsvrc))
    assert len(open_samples(str(ilsvrc), split="train")) == 6
    with (ilsvrc / tar.KAGGLE_TRUTH).open("w", newline="") as file:
        rows = [(f"ILSVRC2012_val_{i:08}", f"{SYNSETS[i]} 1 2 3 4 {SYNSETS[i]} 5 6 7 8") for i in (1, 2, 3)]
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows])
    assert open_samples(str(ilsvrc)).targets.tolist() == whole


def test_a_synset_without_an_end_does_not_run_into_the_next(ilsvrc: Path, picture: Picture) -> None:
    inner = {}
    for k, wnid in enumerate(("n01443537", "n02123045")):
        whole = packed(io.BytesIO(), {f"{wnid}_{i}.JPEG": picture(10 * k + i) for i in range(2)})
        inner[f"{wnid}.tar"] = whole.getvalue()[: 4 * 512]  # type: ignore[union-attr]
    packed(ilsvrc / tar.TRAIN_TAR, inner)
    found = open_samples(str(ilsvrc), split="train")
    assert [found.source(i) for i in range(4)] == [picture(i) for i in (0, 1, 10, 11)]


def test_ilsvrc_that_is_not_whole(ilsvrc: Path, picture: Picture) -> None:
    packed(ilsvrc / tar.TRAIN_TAR, {"n01443537.tar": b"\0" * 10240, "notes.txt": b"x"})
    with pytest.raises(DataError, match=r"img_train\.tar holds no images of the names that ILSVRC 2012 has"):
        open_samples(str(ilsvrc), split="train")
    inner = packed(io.BytesIO(), {"a_1.JPEG": picture(1)})
    packed(ilsvrc / tar.TRAIN_TAR, {"n00000001.tar": inner.getvalue()})  # type: ignore[union-attr]
    with pytest.raises(DataError, match="has classes that are not of ILSVRC 2012: n00000001"):
        open_samples(str(ilsvrc), split="train")
    packed(ilsvrc / tar.TRAIN_TAR, {"n01443537.tar": inner.getvalue()[:530]})  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"img_train\.tar::n01443537\.tar is no whole tar file of 530 bytes"):
        open_samples(str(ilsvrc), split="train")
    packed(ilsvrc / f"{tar.DEVKIT}.tar.gz", {f"x/{tar.TRUTH}": b"1"}, mode="w:gz")
    with pytest.raises(DataError, match=r"devkit_t12\.tar\.gz lacks meta\.mat. Fetch it again"):
        open_samples(str(ilsvrc), split="val")
