"""Records → one file: JSON lines, CSV or Parquet, with a sidecar that says what made it."""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from opsin.errors import MissingExtra

Record = dict[str, Any]
Write = Callable[[Record], None]
FORMATS = (".jsonl", ".csv", ".parquet")
STORES = ("float32", "float16", "int8")  # what the numbers of an embedding are kept in
UNTIMED = ("width", "height")
TIMED = (*UNTIMED, "ms")
ROW_GROUP = 4096  # records per Parquet row group; what a writer holds in memory


def json_line(value: Any) -> str:
    """One value as one line of JSON. Names stay readable; a path that is not UTF-8 is escaped, not lost."""
    line = json.dumps(value, ensure_ascii=False, default=np.ndarray.tolist)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=np.ndarray.tolist)
    return line


@contextmanager
def writer(path: Path, *, run: Record) -> Iterator[Write]:
    """Open `path` for records; the suffix decides the format.

    The file appears under its name when the block ends well, or by Ctrl-C: then with the records written so far, all
    of them whole. After any other error an older file of that name is still there. `run` is stored beside it as
    `<name>.run.json`, in Parquet also in the schema.

    Raises:
        ValueError: an unknown suffix.
        MissingExtra: .parquet without pyarrow.
        OSError: the folder does not exist or cannot be written.
    """
    check_format(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        stopped: KeyboardInterrupt | None = None
        with WRITERS[path.suffix](temporary, run, TIMED) as write:
            try:
                yield write
            except KeyboardInterrupt as interrupt:
                stopped = interrupt
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        sidecar = json.dumps(run, ensure_ascii=False, indent=2) + "\n"
        path.with_name(f"{path.name}.run.json").write_text(sidecar, encoding="utf-8")
        temporary.replace(path)
        if stopped:
            raise stopped
    finally:
        temporary.unlink(missing_ok=True)


def write_part(path: Path, run: Record, records: Iterable[Record]) -> None:
    """One part of a bulk run, in the form that `run["format"]` names; times are left out, since no two runs share them.

    Raises:
        MissingExtra: Parquet without pyarrow.
        OSError: it cannot be written.
    """
    with WRITERS[f".{run['format']}"](path, run, UNTIMED) as write:
        for record in records:
            write(record)


def check_format(path: Path) -> None:
    """Raise before any work is done if `path` could not be written."""
    if path.suffix not in FORMATS:
        raise ValueError(f'"{path.name}" ends in "{path.suffix}". Known: {", ".join(FORMATS)}.')
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise MissingExtra("pyarrow", "parquet") from None


@contextmanager
def _jsonl(path: Path, run: Record, facts: Sequence[str]) -> Iterator[Write]:
    encode = _encoder(run)
    dropped = set(TIMED) - set(facts)

    def write(record: Record) -> None:
        print(json_line({key: value for key, value in encode(record).items() if key not in dropped}), file=file)

    with path.open("w", encoding="utf-8", buffering=1) as file:  # a line at a time
        yield write


@contextmanager
def _csv(path: Path, run: Record, facts: Sequence[str]) -> Iterator[Write]:
    encode = _encoder(run)
    tail = [*facts, "error_type", "error_message"]
    head = ["path", "ok"] + (["embedding"] if run["task"] == "embed" else ["label", "index", "score", "topk"])
    head += ["scale"] if run.get("store") == "int8" else []
    head += ["known", "known_score"] if "unknown" in run else []
    head += ["kind"] if "kind" in run else []
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.DictWriter(file, head + tail)
        rows.writeheader()

        def write(record: Record) -> None:
            row = _flat(encode(record))
            for key in ("topk", "embedding", "kind"):
                if row.get(key) is not None:
                    row[key] = json_line(row[key])
            rows.writerow({key: row.get(key) for key in head + tail})

        yield write


def _encoder(run: Record) -> Callable[[Record], Record]:
    """Embeddings as `run` wants them stored: "normalize"d or not, and in "store": float32, float16 or int8."""
    store, normalize = run.get("store", "float32"), run.get("normalize", False)
    if run["task"] != "embed" or (store == "float32" and not normalize):
        return lambda record: record

    def encode(record: Record) -> Record:
        if not record["ok"]:
            return record
        vector = np.asarray(record["embedding"], np.float32)
        if normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        if store != "int8":
            return record | {"embedding": vector.astype(store)}
        scale = float(np.abs(vector).max()) / 127 or 1.0
        return record | {"embedding": np.rint(vector / scale).astype(np.int8), "scale": scale}

    return encode


def _flat(record: Record) -> Record:
    error = record.get("error") or {}
    return {**record, "error_type": error.get("type"), "error_message": error.get("message")}


@contextmanager
def _parquet(path: Path, run: Record, facts: Sequence[str]) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encode = _encoder(run)
    if run["task"] == "embed":
        store = run.get("store", "float32")
        number = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[store]
        answer = [("embedding", pa.list_(number, run["embedding_dim"]))]
        answer += [("scale", pa.float32())] if store == "int8" else []
    else:
        best = pa.struct([("label", pa.string()), ("score", pa.float32()), ("index", pa.int32())])
        answer = [("label", pa.string()), ("index", pa.int32()), ("score", pa.float32()), ("topk", pa.list_(best))]
    if "unknown" in run:
        answer += [("known", pa.bool_()), ("known_score", pa.float32())]
    if "kind" in run:
        kind = pa.struct([("label", pa.string()), ("wnid", pa.string()), ("score", pa.float32())])
        answer += [("kind", kind)]
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("ok", pa.bool_()),
            *answer,
            *((name, pa.float32() if name == "ms" else pa.int32()) for name in facts),
            ("error_type", pa.string()),
            ("error_message", pa.string()),
        ],
        metadata={"opsin": json.dumps(run)},
    )
    held: list[Record] = []
    with pq.ParquetWriter(path, schema) as file:

        def flush() -> None:
            rows, held[:] = held[:], []  # before writing: a Ctrl-C that arrives meanwhile must not write them twice
            columns = [[row.get(field.name) for row in rows] for field in schema]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            file.write_table(pa.Table.from_arrays(arrays, schema=schema))

        def write(record: Record) -> None:
            row = _flat(encode(record))
            for key in ("path", "error_message"):  # Parquet text is UTF-8; a file name need not be
                if row[key] is not None:
                    row[key] = row[key].encode("utf-8", "backslashreplace").decode()
            held.append(row)
            if len(held) == ROW_GROUP:
                flush()

        yield write
        if held:
            flush()


WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
