"""What goes wrong on the way, by the command: each a clear record or error, and the run goes on when it is mended."""

import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from opsin import bulk, checkpoints, preprocess
from opsin.checkpoints import Checkpoint
from opsin.cli import main
from opsin.pipeline import Classifier

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(scope="module")
def model(noisy_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write(folder, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Callable[..., Result]:
    """`run(*arguments)`: `opsin classify` into tmp_path/out, in batches of 4 and parts of 8."""

    def run(*arguments: object, out: Path | None = None) -> Result:
        words = ["classify", *arguments, "--model", model, "--out", out or tmp_path / "out", "--dtype", "fp32"]
        words += ["--batch-size", 4, "--part-rows", 8, "--top-k", 7]
        result = CliRunner().invoke(main, [str(word) for word in words])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def holiday(tmp_path: Path) -> Path:
    folder = tmp_path / "holiday"
    folder.mkdir()
    for i in range(29):
        (folder / f"{i:02}.png").write_bytes(noise(i))
    return folder


def noise(seed: int) -> bytes:
    file = io.BytesIO()
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (5 + seed, 40 - seed % 31, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def packed(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as file:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(noise(i))
            file.addfile(info, io.BytesIO(noise(i)))


def table(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in bulk.files(folder))


def rows(folder: Path) -> list[dict[str, Any]]:
    return table(folder).to_pylist()


def meanwhile(monkeypatch: pytest.MonkeyPatch, what: Callable[[], object]) -> None:
    """`what` happens when the inputs are listed and the first batch is done."""
    whole = bulk.run

    def interrupted(*arguments: Any, on_batch: Callable[[bulk.Counts], None], **options: Any) -> bulk.Counts:
        happened: list[object] = []

        def then(counts: bulk.Counts) -> None:
            on_batch(counts)
            if not happened:
                happened.append(what())

        return whole(*arguments, on_batch=then, **options)

    monkeypatch.setattr(bulk, "run", interrupted)


# ── the disk that is written to ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not sys.platform.startswith("linux") or not ROOT or shutil.which("mount") is None:
        pytest.skip("a full disk is NOT TESTED: to mount a small one takes root and Linux")
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a full disk is NOT TESTED: no small one can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("form", bulk.FORMATS)
def test_a_full_disk(run: Callable[..., Result], holiday: Path, disk: Path, tmp_path: Path, form: str) -> None:
    out = disk / "out"
    run(holiday, "--format", form)
    whole = [path.read_bytes() for path in bulk.files(tmp_path / "out")]
    room = 5000 + len(whole[0]) + len(whole[1]) // 2 + (tmp_path / "out" / "_inputs.jsonl").stat().st_size
    filler = disk / "filler"
    filler.write_bytes(bytes((256 * 1024 - room) // 4096 * 4096 - 8192))
    result = run(holiday, "--format", form, out=out)
    assert result.exit_code == 1, result.stderr
    assert f"opsin: {out} cannot be written: " in result.stderr and "No space left on device" in result.stderr
    assert "go on with: opsin " in result.stderr and result.stderr.count("--resume") == 1
    done = bulk.files(out)
    assert 1 <= len(done) < 4 and [path.read_bytes() for path in done] == whole[: len(done)]  # whole ones
    assert not list(out.glob(".part-*"))
    assert run(holiday, "--format", form, "--resume", out=out).exit_code == 1  # still no room
    filler.unlink()
    assert run(holiday, "--format", form, "--resume", out=out).exit_code == 0
    assert [path.read_bytes() for path in bulk.files(out)] == whole


def test_a_disk_too_small_to_begin(run: Callable[..., Result], holiday: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(256 * 1024))
    for _ in range(2):
        result = run(holiday, out=disk / "out")
        assert result.exit_code == 1 and "No space left on device" in result.stderr
    (disk / "filler").unlink()
    assert run(holiday, out=disk / "out").exit_code == 0
    assert len(rows(disk / "out")) == 29


def test_a_disk_that_becomes_read_only(
    run: Callable[..., Result], holiday: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

    with monkeypatch.context() as patched:
        meanwhile(patched, lambda: remount("ro"))
        result = run(holiday, out=disk / "out")
    for each in (result, run(holiday, "--resume", out=disk / "out"), run(holiday, out=disk / "other")):
        assert each.exit_code == 1 and "cannot be written: Read-only file system" in each.stderr
    remount("rw")
    assert run(holiday, "--resume", out=disk / "out").exit_code == 0
    run(holiday)
    assert table(disk / "out").equals(table(tmp_path / "out"))


@pytest.mark.skipif(ROOT, reason="root writes everywhere; the disk that becomes read-only stands for it")
def test_a_folder_that_may_not_be_written(run: Callable[..., Result], holiday: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    result = run(holiday)
    assert result.exit_code == 1 and "out cannot be written: Permission denied" in result.stderr
    (tmp_path / "out").chmod(0o755)
    assert run(holiday).exit_code == 0


def test_a_folder_that_vanishes(
    run: Callable[..., Result], holiday: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        meanwhile(patched, lambda: shutil.rmtree(tmp_path / "out"))
        result = run(holiday)
    assert result.exit_code == 1 and "out cannot be written: " in result.stderr
    assert "No such file or directory" in result.stderr
    assert run(holiday, "--resume").exit_code == 0 and len(rows(tmp_path / "out")) == 29


# ── files that are read ──────────────────────────────────────────────────────────────────────────────────────────────


def test_files_that_cannot_be_read(run: Callable[..., Result], holiday: Path, tmp_path: Path) -> None:
    run(holiday, out=tmp_path / "before")
    (holiday / "03.png").chmod(0)  # root reads it all the same
    if Path("/proc/self/mem").exists():
        (holiday / "05.png").unlink()
        (holiday / "05.png").symlink_to("/proc/self/mem")  # opens, and answers "Input/output error"
    result = run(holiday)
    assert result.exit_code == 3
    before, after = rows(tmp_path / "before"), rows(tmp_path / "out")
    assert len(after) == 29
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if i == 3 and not ROOT:
            assert (new["error_type"], new["error_message"]) == ("unreadable", f"{holiday}/03.png: Permission denied.")
        elif i == 5 and Path("/proc/self/mem").exists():
            assert (new["error_type"], new["error_message"]) == ("unreadable", f"{holiday}/05.png: Input/output error.")
        else:
            assert (new["path"], new["label"]) == (old["path"], old["label"])
            assert new["score"] == pytest.approx(old["score"], abs=1e-6)


def test_files_that_vanish_or_change_while_it_runs(
    run: Callable[..., Result], holiday: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """A row is of the file that was there when its turn came: of the old one, the new one or half of it."""

    def change() -> None:
        (holiday / "20.png").unlink()
        (holiday / "21.png").write_bytes(noise(7))
        (holiday / "22.png").write_bytes(noise(22)[:100])
        (holiday / "00.png").write_bytes(noise(9))  # has been read
        (holiday / "new.png").write_bytes(noise(1))  # is not on the list

    classifier = Classifier(checkpoints.read(model), dtype="fp32")
    old = dict(zip(sorted(holiday.iterdir()), classifier([*map(str, sorted(holiday.iterdir()))]), strict=True))
    seven = classifier(noise(7))
    with monkeypatch.context() as patched:
        meanwhile(patched, change)
        assert run(holiday).exit_code == 3
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found] == [str(path) for path in old]
    assert [(i, row["error_type"]) for i, row in enumerate(found) if not row["ok"]] == [
        (20, "not_found"),
        (22, "corrupt"),
    ]
    assert (found[21]["width"], found[21]["height"]) == (33, 12)
    for i, (row, best) in enumerate(zip(found, old.values(), strict=True)):
        if row["ok"]:
            wanted = seven if i == 21 else best
            assert (row["label"], row["score"]) == (wanted[0]["label"], pytest.approx(wanted[0]["score"], abs=1e-6))
    again = run(holiday, "--resume")
    assert again.exit_code == 0 and "29 rows are in" in again.stderr and len(rows(tmp_path / "out")) == 29


def test_a_tar_that_is_cut_or_replaced(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    packed(path, [f"{i:02}.png" for i in range(29)])
    whole = path.read_bytes()
    run(path, out=tmp_path / "whole")

    def replace() -> None:
        packed(tmp_path / "new.tar", ["other.png"])
        (tmp_path / "new.tar").replace(path)

    with monkeypatch.context() as patched:
        meanwhile(patched, replace)
        assert run(path, out=tmp_path / "replaced").exit_code == 0
    assert table(tmp_path / "replaced").equals(table(tmp_path / "whole"))  # what was opened is read to its end
    path.write_bytes(whole[: len(whole) // 2])
    result = run(path)
    assert result.exit_code == 3
    found, wanted = rows(tmp_path / "out"), rows(tmp_path / "whole")
    count = len(found) - 1
    assert 5 < count < 25 and [row["ok"] for row in found] == [True] * count + [False]
    assert [(row["path"], row["label"]) for row in found[:-1]] == [
        (row["path"], row["label"]) for row in wanted[:count]
    ]
    assert found[-1]["path"] == str(path) and found[-1]["error_type"] == "corrupt"
    assert f"x.tar: cut short or damaged after {count} images" in found[-1]["error_message"]


def test_a_tar_that_is_another_when_the_run_goes_on(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.tar"
    packed(path, [f"{i:02}.png" for i in range(29)])
    run(path, out=tmp_path / "whole")
    for part in bulk.files(tmp_path / "whole")[1:]:
        part.unlink()
    old, stamp = path.read_bytes(), path.stat()
    packed(path, [f"{i:02}.png" for i in range(1, 29)])
    result = run(path, "--resume", out=tmp_path / "whole")
    assert result.exit_code == 2
    assert "x.tar has changed since its first 8 rows were written" in result.stderr
    path.write_bytes(old)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a backup puts it back
    assert run(path, "--resume", out=tmp_path / "whole").exit_code == 0
    assert [Path(row["path"]).name for row in rows(tmp_path / "whole")] == [f"x.tar::{i:02}.png" for i in range(29)]


def test_names_twice_and_names_that_are_not_utf_8(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["a.png", "latin\udce9.png", "line\nbreak.png", "猫.png"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(noise(i))
    packed(tmp_path / "x.tar", ["a.png", "a.png", "latin\udce9.png"])
    odd = f"{folder}/latin\udce9.png"
    arguments = [folder, odd, odd, tmp_path / "x.tar"]
    for form in bulk.FORMATS:
        out = tmp_path / form
        assert run(*arguments, "--format", form, out=out).exit_code == 0
        assert run(*arguments, "--format", form, "--resume", out=out).exit_code == 0  # the same run
    found = rows(tmp_path / "parquet")
    assert [row["path"].removeprefix(f"{tmp_path}/") for row in found] == [
        "in/a.png", "in/latin\\udce9.png", "in/line\nbreak.png", "in/猫.png", "in/latin\\udce9.png",
        "in/latin\\udce9.png", "x.tar::a.png", "x.tar::a.png", "x.tar::latin\\udce9.png",
    ]  # fmt: skip
    labels = [row["topk"] for row in found]
    for same in ((1, 4, 5), (0, 6), (1, 7)):  # of one image
        scores = [[best["score"] for best in labels[i]] for i in same]
        assert all(each == pytest.approx(scores[0], abs=1e-6) for each in scores)
    lines = b"".join(path.read_bytes() for path in bulk.files(tmp_path / "jsonl")).decode().splitlines()
    assert len(lines) == 9 and "latin\\udce9.png" in lines[1]
    cells = b"".join(path.read_bytes() for path in bulk.files(tmp_path / "csv"))
    assert cells.count(b"latin\xe9.png") == 4


@pytest.mark.slow
def test_a_folder_of_ten_thousand_beside_one_of_one(run: Callable[..., Result], tmp_path: Path) -> None:
    for name, count in (("a", 10_000), ("b", 1)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "in" / name / f"{i:05}.png").touch()
    (tmp_path / "in" / "b" / "00000.png").write_bytes(noise(3))
    result = CliRunner().invoke(
        main, ["classify", f"{tmp_path}/in", "--out", f"{tmp_path}/out", "--top-k", "1", "--batch-size", "250"]
    )
    assert result.exit_code == 3 and "10,001 images, 10,000 of them errors" in result.stderr
    found = table(tmp_path / "out")
    assert found["path"].to_pylist() == [f"{tmp_path}/in/a/{i:05}.png" for i in range(10_000)] + [
        f"{tmp_path}/in/b/00000.png"
    ]
    assert found["ok"].to_pylist() == [False] * 10_000 + [True]
    assert len(bulk.files(tmp_path / "out")) == 11


# ── servers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Bucket(BaseHTTPRequestHandler):
    """An S3 with one object, which answers 500 for one bucket and nothing for another while it is not mended."""

    protocol_version = "HTTP/1.1"
    mended: threading.Event
    over: threading.Event
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.path.startswith("/hang") and not self.mended.is_set():
            self.over.wait(20)
            self.close_connection = True
            return
        fails = self.path.startswith("/fails") and not self.mended.is_set()
        data = noise(3)
        self.send_response(500 if fails else 200)
        self.send_header("Content-Length", "0" if fails else str(len(data)))
        self.end_headers()
        if not fails and self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def bucket(aws: Callable[[str], Any]) -> Iterator[type[_Bucket]]:
    handler: type[_Bucket] = type(
        "Handler", (_Bucket,), {"mended": threading.Event(), "over": threading.Event(), "asked": []}
    )

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        aws(f"http://127.0.0.1:{http.server_address[1]}")
        yield handler
        handler.over.set()
        http.shutdown()
        thread.join()


def test_s3_that_fails_and_hangs(
    run: Callable[..., Result],
    bucket: type[_Bucket],
    holiday: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preprocess, "DOWNLOAD_SECONDS", 1)
    remote = ["s3://fails/1.png", "s3://hang/1.png", "s3://good/1.png"]
    arguments = [f"{holiday}/0*.png", *remote, f"{holiday}/1*.png"]
    result = run(*arguments)
    assert result.exit_code == 3
    found = rows(tmp_path / "out")
    assert [row["path"] for row in found[10:13]] == remote and len(found) == 23
    assert [row["ok"] for row in found] == [True] * 10 + [False, False] + [True] * 11
    assert [row["error_type"] for row in found[10:12]] == ["unreadable"] * 2
    assert "s3://fails/1.png: cannot be read: " in found[10]["error_message"]
    assert "Internal Server Error" in found[10]["error_message"]
    assert found[11]["error_message"] == "s3://hang/1.png: cannot be read: no answer within 1 seconds."
    assert found[12]["label"] == found[3]["label"] and found[12]["width"] == found[3]["width"]  # the same image
    # with --on-error fail it goes on where it stopped, when the server is well again
    stopped = run(*arguments, "--on-error", "fail", out=tmp_path / "fail")
    assert stopped.exit_code == 3 and "s3://fails/1.png: cannot be read" in stopped.stderr
    assert len(rows(tmp_path / "fail")) == 8
    bucket.mended.set()
    assert run(*arguments, "--on-error", "fail", "--resume", out=tmp_path / "fail").exit_code == 0
    assert [row["path"] for row in rows(tmp_path / "fail")] == [row["path"] for row in found]
    assert all(row["ok"] for row in rows(tmp_path / "fail"))


@pytest.mark.slow
def test_s3_by_moto(run: Callable[..., Result], aws: Callable[[str], Any], tmp_path: Path) -> None:
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        fs = aws(f"http://{host}:{port}")
        fs.mkdir("bucket")
        packed(tmp_path / "x.tar", [f"{i}.png" for i in range(11)])
        fs.call_s3("put_object", Bucket="bucket", Key="shards/x.tar", Body=(tmp_path / "x.tar").read_bytes())
        for i in range(13):
            fs.call_s3("put_object", Bucket="bucket", Key=f"photos/{i:02}.png", Body=noise(i))
        arguments = ["s3://bucket/photos/**/*.png", "s3://bucket/photos/none.png", "s3://bucket/shards/{x,y}.tar"]
        assert run(*arguments).exit_code == 3
        found = rows(tmp_path / "out")
        assert [row["path"] for row in found] == [
            *(f"s3://bucket/photos/{i:02}.png" for i in range(13)),
            "s3://bucket/photos/none.png",
            *(f"s3://bucket/shards/x.tar::{i}.png" for i in range(11)),
            "s3://bucket/shards/y.tar",
        ]
        assert [row["path"] for row in found if row["error_type"] == "not_found"] == [
            found[13]["path"],
            found[25]["path"],
        ]
        assert [row["label"] for row in found[:11]] == [row["label"] for row in found[14:25]]
        for part in bulk.files(tmp_path / "out")[1:]:
            part.unlink()
        assert run(*arguments, "--resume").exit_code == 3
        assert rows(tmp_path / "out") == found
    finally:
        server.stop()
