"""`classify` and `embed` into a folder: stopped by Ctrl-C, by kill -9 and by shares, and gone on with."""

import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from opsin import bulk, checkpoints
from opsin.bulk import Parts
from opsin.checkpoints import Checkpoint
from opsin.cli import main
from opsin.pipeline import Classifier


@pytest.fixture(scope="module")
def model(noisy_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write(folder, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """31 images in a folder, one of them broken, and 11 in a tar, one of them empty."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    with tarfile.open(folder / "x.tar", "w") as tar:
        for i in range(42):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (5 + i, 50 - i, 3), dtype=np.uint8)).save(file, "PNG")
            data = b"not a picture" if i == 13 else b"" if i == 37 else file.getvalue()
            if i < 31:
                (folder / "photos" / f"{i:02}.png").write_bytes(data)
            else:
                info = tarfile.TarInfo(f"{i}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [f"{folder}/photos", f"{folder}/x.tar"]


def words(task: str, sources: list[str], model: Path, out: Path, *more: object) -> list[str]:
    common = ["--model", model, "--out", out, "--dtype", "fp32", "--batch-size", 3, "--part-rows", 7]
    return [str(word) for word in (task, *sources, *common, *(["--top-k", 7] if task == "classify" else []), *more)]


def opsin(*arguments: object, stdin: str | None = None) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in arguments], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def classify(sources: list[str], model: Path, tmp_path: Path) -> Callable[..., Result]:
    """`classify(*more, out=)`: the sources into a folder."""
    return lambda *more, out=tmp_path / "out": opsin(*words("classify", sources, model, out, *more))


def table(folder: Path) -> pa.Table:
    """All columns of all rows."""
    return pa.concat_tables(pq.read_table(path) for path in bulk.files(folder))


@pytest.fixture(scope="module")
def whole(sources: list[str], model: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = opsin(*words("classify", sources, model, out))
    assert result.exit_code == 3 and f"42 images, 2 of them errors, in {out}" in result.stderr
    return table(out)


def test_a_folder_holds_a_row_each_and_what_made_them(
    classify: Callable[..., Result], sources: list[str], whole: pa.Table, tmp_path: Path, model: Path
) -> None:
    folder, archive = sources
    names = [f"{folder}/{i:02}.png" for i in range(31)] + [f"{archive}::{i}.png" for i in range(31, 42)]
    assert whole["path"].to_pylist() == names
    assert [i for i, ok in enumerate(whole["ok"].to_pylist()) if not ok] == [13, 37]
    classifier = Classifier(checkpoints.read(model), dtype="fp32")
    for i in (0, 12, 14, 30):
        row = whole.slice(i, 1).to_pylist()[0]
        (best, *_) = classifier(names[i])
        assert (row["label"], row["score"]) == (best["label"], pytest.approx(best["score"], abs=1e-6))
    assert classify().exit_code == 3
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    wanted = {"task": "classify", "inputs": sources, "format": "parquet", "part_rows": 7, "batch_size": 3, "top_k": 7}
    wanted |= {"model": str(model), "dtype": "fp32", "engine": "torch", "device": "cpu"}
    assert wanted.items() <= manifest.items() and {"sha256", "preprocess_hash", "opsin", "revision"} <= set(manifest)
    assert pq.read_table(tmp_path / "out").equals(table(tmp_path / "out"))  # in one line, by others
    again = classify("--resume")
    assert again.exit_code == 0 and "42 rows are in" in again.stderr and "0 images, 0 of them errors" in again.stderr
    assert table(tmp_path / "out").equals(whole)


# ── stopped ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("after", "done"), [(1, 3), (4, 10), (9, 24)])  # of 7 images a part, 3 a batch
def test_a_signal_ends_the_batch_and_says_how_to_go_on(
    classify: Callable[..., Result], whole: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals, after: int, done: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["opsin", "classify", "some photos/", "--out", "out"])
    _signal_in_batch(monkeypatch, {after: number})
    result = classify()
    assert result.exit_code == 130
    assert "stopping after the images in hand; again to stop at once" in result.stderr
    assert f"stopped after {done} images; go on with: opsin classify 'some photos/' --out out --resume" in result.stderr
    assert table(tmp_path / "out").equals(whole.slice(0, done))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert classify("--resume").exit_code == 3
    assert table(tmp_path / "out").equals(whole)


def test_a_second_signal_stops_at_once(
    classify: Callable[..., Result], whole: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(parts: Parts, block: int, start: int, records: Any, *, end: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        if block == 2:
            os.kill(os.getpid(), signal.SIGINT)
        write(parts, block, start, records, end=end)

    write = Parts.write
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "write", ask)
        _signal_in_batch(patched, {2: signal.SIGINT, 3: signal.SIGINT})
        patched.setattr("opsin.cli.folder.Stop.__call__", lambda self: False)  # the batch does not end
        result = classify()
    assert result.exit_code == 130 and "interrupted; the last part is not written. Go on with: " in result.stderr
    assert not list((tmp_path / "out").glob(".part*"))
    assert classify("--resume").exit_code == 3
    assert table(tmp_path / "out").equals(whole)


def _signal_in_batch(monkeypatch: pytest.MonkeyPatch, signals: dict[int, signal.Signals]) -> None:
    """The command gets a signal while it computes its n-th batch."""
    forward, count = Classifier._forward, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in signals:
            os.kill(os.getpid(), signals[count])
        return forward(*arguments)

    monkeypatch.setattr(Classifier, "_forward", interrupted)


def test_interrupted_before_it_has_begun(
    classify: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("opsin.data.inputs.plan", listing)
        result = classify()
    assert result.exit_code == 130 and "interrupted; nothing is begun" in result.stderr
    assert classify().exit_code == 3


def test_the_command_that_is_said_goes_on(sources: list[str], model: Path, whole: pa.Table, tmp_path: Path) -> None:
    """In a process of its own, as a person does it: Ctrl-C, then what standard error said."""
    command = words("classify", sources * 30, model, tmp_path / "out")
    with subprocess.Popen([sys.executable, "-m", "opsin", *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        deadline = time.monotonic() + 60
        while not (tmp_path / "out").is_dir() or not bulk.files(tmp_path / "out"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait() == 130
    (line,) = [line for line in said.splitlines() if "go on with: " in line]
    name, *again = shlex.split(line.partition("go on with: ")[2])
    assert name == "opsin" and again == [*command, "--resume"]
    done = table(tmp_path / "out")
    assert 0 < done.num_rows < 30 * 42 and f"stopped after {done.num_rows:,} images" in line
    assert opsin(*again).exit_code == 3
    assert table(tmp_path / "out").equals(pa.concat_tables([whole] * 30))


def test_killed_at_any_moment(sources: list[str], model: Path, whole: pa.Table, tmp_path: Path) -> None:
    _kill(sources, model, whole, tmp_path, rounds=1)


@pytest.mark.slow
def test_killed_at_many_moments(sources: list[str], model: Path, whole: pa.Table, tmp_path: Path) -> None:
    _kill(sources, model, whole, tmp_path, rounds=7)


def _kill(sources: list[str], model: Path, whole: pa.Table, tmp_path: Path, rounds: int) -> None:
    """kill -9 when some parts are there and a random moment later; then another, which goes on."""
    rng = random.Random(rounds)
    out, command = tmp_path / "out", words("classify", sources * 20, model, tmp_path / "out", "--resume")
    before = 0
    for _ in range(rounds):
        with subprocess.Popen([sys.executable, "-m", "opsin", *command], stderr=subprocess.DEVNULL) as process:
            wanted = before + rng.randint(1, max(1, 120 // rounds))
            while process.poll() is None and (not out.is_dir() or len(bulk.files(out)) < wanted):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
        before = len(bulk.files(out))
    assert 0 < table(out).num_rows < 20 * 42
    assert opsin(*command).exit_code in (0, 3)
    assert table(out).equals(pa.concat_tables([whole] * 20))
    assert not list(out.glob(".part*"))


# ── shares ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_write_what_one_run_writes(
    classify: Callable[..., Result], whole: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for i in (2, 0, 1):  # in any order, none of them told to go on
        result = classify("--shard", f"{i}/3")
        assert result.exit_code in (0, 3), result.stderr
        counts.append(int(result.stderr.rsplit("opsin: ", 1)[1].split(" images")[0]))
    assert sum(counts) == 42 and min(counts) > 0
    assert table(tmp_path / "out").equals(whole)
    _signal_in_batch(monkeypatch, {2: signal.SIGINT})
    assert classify("--shard", "0/2", out=tmp_path / "cut").exit_code == 130
    assert classify("--shard", "1/2", out=tmp_path / "cut").exit_code in (0, 3)
    assert classify("--shard", "0/2", out=tmp_path / "cut").exit_code in (0, 3)
    assert table(tmp_path / "cut").equals(whole)
    more = classify("--shard", "99/100", out=tmp_path / "cut")
    assert more.exit_code == 0 and "0 images, 0 of them errors" in more.stderr


@pytest.mark.parametrize("shard", ["3/3", "0/0", "-1/3", "1", "1/", "a/b", "1/3/5"])
def test_shards_that_are_none(classify: Callable[..., Result], shard: str) -> None:
    result = classify("--shard", shard)
    assert result.exit_code == 2
    assert f'"{shard}" is not i/n with i from 0 to n − 1, such as 0/8.' in " ".join(result.stderr.split())


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors_are_listed(classify: Callable[..., Result], sources: list[str], tmp_path: Path) -> None:
    listed = tmp_path / "errors.jsonl"
    assert classify("--errors", listed).exit_code == 3
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["path"], row["error"]["type"]) for row in rows] == [
        (f"{sources[0]}/13.png", "not_an_image"), (f"{sources[1]}::37.png", "not_an_image"),
    ]  # fmt: skip
    assert "13.png: not an image" in rows[0]["error"]["message"]
    listed.unlink()
    assert classify("--resume", "--errors", listed).exit_code == 0  # all of the folder, not of this run
    assert [json.loads(line) for line in listed.read_text().splitlines()] == rows
    result = classify("--resume", "--errors", tmp_path / "gone" / "errors.jsonl")
    assert result.exit_code == 2 and f'the folder "{tmp_path}/gone" does not exist' in result.stderr
    if Path("/dev/full").exists():
        result = classify("--resume", "--errors", "/dev/full")
        assert result.exit_code == 1 and "/dev/full cannot be written: No space left on device" in result.stderr


def test_on_error_fail(classify: Callable[..., Result], whole: pa.Table, sources: list[str], tmp_path: Path) -> None:
    for more in ((), ("--resume",)):
        result = classify("--on-error", "fail", *more)
        assert result.exit_code == 3
        assert f"opsin: {sources[0]}/13.png: not an image" in result.stderr
        assert "Stopped there, by --on-error fail." in result.stderr and "Go on with: opsin " in result.stderr
        assert table(tmp_path / "out").equals(whole.slice(0, 13))  # 7, then batches of 3; the next holds it
    assert classify("--resume").exit_code == 3  # and keep it as a row
    assert table(tmp_path / "out").equals(whole)


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_gone_on_with_by_the_same_run_only(
    classify: Callable[..., Result], sources: list[str], model: Path, tmp_path: Path
) -> None:
    assert classify().exit_code == 3
    result = classify()
    assert result.exit_code == 2 and "holds a run already. Go on with it by --resume" in result.stderr
    for more, line in (
        (("--batch-size", 4), "batch_size: 3 there, 4 now"),
        (("--part-rows", 8), "part_rows: 7 there, 8 now"),
        (("--format", "csv"), 'format: "parquet" there, "csv" now'),
        (("--lang", "zh"), 'lang: "en" there, "zh" now'),
        (("--kind", "0.9"), "kind: "),
    ):
        result = classify("--resume", *more)
        if more[0] != "--kind":  # these classes have none
            assert result.exit_code == 2 and line in result.stderr, result.stderr
    result = opsin(*words("embed", sources, model, tmp_path / "out", "--resume"))
    assert result.exit_code == 2 and 'task: "classify" there, "embed" now' in result.stderr
    result = opsin(*words("classify", sources[:1], model, tmp_path / "out", "--resume"))
    assert result.exit_code == 2 and "  inputs: [" in result.stderr
    assert classify("--resume", "--format", "parquet", "--on-error", "record").exit_code == 0  # what it is anyhow


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume goes with a folder of parts: --out labels/, a name without a suffix."),
        (["--shard", "0/3"], "--shard goes with a folder"),
        (["--on-error", "fail"], "--on-error goes with a folder"),
        (["--errors", "e.jsonl", "--out", "r.jsonl"], "--errors goes with a folder"),
        (["--format", "csv", "--out", "r.csv"], "--format goes with a folder"),
        (["--part-rows", "5", "--out", "r.csv"], "--part-rows goes with a folder"),
        (["--part-rows", "0", "--out", "labels"], "0 is not in the range x>=1"),
        (["--format", "xlsx", "--out", "labels"], "'xlsx' is not one of 'parquet', 'jsonl', 'csv'"),
        (["-", "--out", "labels"], "give it alone"),
    ],
)
def test_usage(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = opsin("classify", "a.jpg", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_none(classify: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = classify(out=tmp_path / "file")
    assert result.exit_code == 1 and "file cannot be written: File exists" in result.stderr
    (tmp_path / "with.suffix").mkdir()  # there already, so it is one
    assert classify(out=tmp_path / "with.suffix").exit_code == 3
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "thesis.odt").touch()
    result = classify(out=tmp_path / "old")
    assert result.exit_code == 2 and 'holds "thesis.odt" and is no folder of a run' in result.stderr
    assert [path.name for path in (tmp_path / "old").glob("[!.]*")] == ["thesis.odt"]


def test_paths_on_standard_input(sources: list[str], model: Path, tmp_path: Path) -> None:
    """They come once; the folder remembers them."""
    paths = [f"{sources[0]}/{i:02}.png" for i in range(31)]
    arguments = words("classify", ["-"], model, tmp_path / "out")
    assert opsin(*arguments, stdin="\n".join(paths) + "\n\n").exit_code == 3
    before = table(tmp_path / "out")
    assert before["path"].to_pylist() == paths
    for part in bulk.files(tmp_path / "out")[2:]:
        part.unlink()
    assert opsin(*arguments, "--resume", stdin="").exit_code == 0  # the broken one is done
    assert table(tmp_path / "out").equals(before)


def test_nothing_to_do_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    result = opsin(*words("classify", [f"{tmp_path}/empty/"], model, tmp_path / "out"))
    assert result.exit_code == 0 and f"no images in {tmp_path}/empty/" in result.stderr


def test_inputs_that_cannot_be_listed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("id\n7\n")
    result = opsin(*words("classify", [f"{tmp_path}/list.csv"], model, tmp_path / "out"))
    assert result.exit_code == 2 and "has no column of paths" in result.stderr
    (tmp_path / "list.csv").write_text("path\ngone.png\n")
    result = opsin(*words("classify", [f"{tmp_path}/list.csv"], model, tmp_path / "out"))
    assert result.exit_code == 3 and "1 images, 1 of them errors" in result.stderr


def test_a_terminal_sees_how_far_it_is(
    sources: list[str], model: Path, tmp_path: Path, on_a_terminal: Callable[..., str]
) -> None:
    seen = on_a_terminal(*words("classify", sources[1:], model, tmp_path / "out"))
    assert "11 images, 1 failed" in seen and "11 images, 1 of them errors, in" in seen.replace("\n", "")
    assert "ETA" not in seen.splitlines()[-1]


@pytest.mark.parametrize("store", [None, "float16", "int8"])
def test_embeddings(sources: list[str], model: Path, tmp_path: Path, store: str | None) -> None:
    more = ["--store", store, "--normalize"] if store else []
    assert opsin(*words("embed", sources, model, tmp_path / "out", *more)).exit_code == 3
    found = pq.read_table(tmp_path / "out")
    kind = {None: "float", "float16": "halffloat", "int8": "int8"}[store]
    assert str(found.schema.field("embedding").type) == f"fixed_size_list<element: {kind}>[24]"
    assert ("scale" in found.column_names) == (store == "int8")
    row = found.slice(5, 1).to_pylist()[0]
    exact = Classifier(checkpoints.read(model), dtype="fp32").embed(row["path"])[0]
    exact = exact / (np.linalg.norm(exact) if store else 1)
    assert np.allclose(np.array(row["embedding"], "f8") * row.get("scale", 1), exact, atol=0.01 if store else 1e-5)
    result = opsin(*words("embed", sources, model, tmp_path / "out", "--resume", "--store", "float32", "--normalize"))
    assert result.exit_code == 2 and "was begun by another run" in result.stderr
