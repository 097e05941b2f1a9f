"""The folder that a bulk run writes: parts that appear whole, whose names say which rows they hold.

    labels/
      _manifest.json                               what made the rows; a run that goes on must be the same
      _inputs.jsonl                                the blocks of the inputs, a line each
      part-000012-00000000-00001000.parquet        rows 0 to 999 of block 12
      part-000012-00001000-00001437-end.parquet    the others, of which there are no more

A part is written under another name, forced to the disk and renamed. So what a killed run leaves is whole parts, and
the rows that none of them holds are the rows still to do. There is no other record of what is done.
"""

import csv
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from opsin.data.inputs import Block
from opsin.data.tar import is_url
from opsin.errors import BulkError, DataError
from opsin.results import Record, json_line, write_part

FORMATS = ("parquet", "jsonl", "csv")
MANIFEST, INPUTS = "_manifest.json", "_inputs.jsonl"  # a leading _: pandas and pyarrow pass over them
NAME = re.compile(r"part-(\d{6,})-(\d{8,})-(\d{8,})(-end)?\.(?:parquet|jsonl|csv)")


class Parts:
    """A folder of parts, new or gone on with, or one share of it.

    Args:
        folder: made where it is not there.
        manifest: what decides the rows: JSON values.
        blocks: of the inputs, where the folder is new; the folder's own are read else.
        resume: go on with a folder that has a manifest. Without it such a folder is refused.
        shard: (i, n): of the blocks i, i + n, i + 2·n, … only. Others may write theirs at the same time.
    Raises:
        BulkError: the folder holds another run, one that was not to be resumed, or a damaged one; or files of no run
            at all; or an archive is not the one that its first parts are of.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Record,
        blocks: Iterable[Block],
        *,
        resume: bool,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.folder, self.manifest, self.shard = Path(folder), manifest, shard
        self.format: str = manifest["format"]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        with _alone(self.folder):
            if path.exists():
                self._check(path, resume)
            else:
                self._begin(path, blocks)
        self._next = self._state()
        self.num_blocks = 0
        for values in self._listed():
            row = self._next.get(self.num_blocks)
            if row and values.get("stamp") != _stamp(Block.from_json(values)):
                raise BulkError(
                    f"{values['paths'][0]} has changed since its first {row:,} rows were written, so that the others "
                    "may be missing in it or come twice. Put the old file back, or name another folder."
                )
            self.num_blocks += 1

    def _begin(self, path: Path, blocks: Iterable[Block]) -> None:
        for file in list(self.folder.iterdir()):
            if file.name.startswith((f".{INPUTS}.", f".{MANIFEST}.")):  # half written
                file.unlink(missing_ok=True)
            elif file.name != INPUTS and not file.name.startswith("."):
                raise BulkError(
                    f'{self.folder} holds "{file.name}" and is no folder of a run. Name a new or an empty folder.'
                )
        _write_whole(self.folder / INPUTS, (json_line(_line(block)) for block in blocks))
        _write_whole(path, [json.dumps(self.manifest, indent=2)])

    def _check(self, path: Path, resume: bool) -> None:
        if not resume:
            raise BulkError(f"{self.folder} holds a run already. Go on with it by --resume, or name another folder.")
        try:
            old = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise BulkError(f"{path} is damaged: {error}. Name another folder.") from error
        differ = [key for key in sorted({*old, *self.manifest}) if old.get(key) != self.manifest.get(key)]
        if differ:
            lines = "".join(
                f"\n  {key}: {_short(old.get(key))} there, {_short(self.manifest.get(key))} now" for key in differ
            )
            raise BulkError(
                f"{self.folder} was begun by another run:{lines}\nRun as it was begun, or name another folder."
            )

    def _state(self) -> dict[int, int | None]:
        """Block → the first row that no part holds; None where all are held. What overlaps or is half written goes.

        Only of the own blocks: to those of other shards parts are added meanwhile, and a list of a folder that grows
        may show a later one without an earlier one.
        """
        parts: dict[int, dict[int, list[tuple[int, bool, str]]]] = defaultdict(lambda: defaultdict(list))
        for entry in os.scandir(self.folder):
            if not (found := NAME.match(entry.name.removeprefix("."))):
                continue
            block, start, stop = map(int, found.groups()[:3])
            if block % self.shard[1] != self.shard[0]:
                continue
            if entry.name.startswith("."):
                Path(entry.path).unlink(missing_ok=True)
            elif found.end() == len(entry.name):
                parts[block][start].append((stop, bool(found[4]), entry.name))
        state: dict[int, int | None] = {}
        for block, starts in parts.items():
            row, kept, ended = 0, set(), False
            while row in starts and not ended:
                stop, ended, name = max(starts[row])
                if stop < row or (stop == row and not ended):
                    break
                kept.add(name)
                row = stop
            state[block] = None if ended else row
            for _, _, name in (part for group in starts.values() for part in group):
                if name not in kept:
                    (self.folder / name).unlink(missing_ok=True)
        return state

    def blocks(self) -> Iterator[Block]:
        """All of them.

        Raises:
            BulkError: the list is damaged or gone.
        """
        return map(Block.from_json, self._listed())

    def _listed(self) -> Iterator[Record]:
        path = self.folder / INPUTS
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    values = json.loads(line)
                    Block.from_json(values)
                    yield values
        except (FileNotFoundError, ValueError, AttributeError, DataError) as error:
            raise BulkError(f"{path} is damaged: {error}. Name another folder.") from error

    def to_do(self) -> Iterator[tuple[int, Block, int]]:
        """(number, block, first row to do) of the blocks of this shard that are not done."""
        index, count = self.shard
        for number, block in islice(enumerate(self.blocks()), index, None, count):
            row = self._next.get(number, 0)
            if row is not None:
                yield number, block, row

    @property
    def num_done(self) -> int:
        """Rows that parts hold."""
        return sum(stop - start for _, start, stop in self._ranges())

    def write(self, block: int, start: int, records: Sequence[Record], *, end: bool) -> None:
        """Rows `start` and following of a block; `end`: there are no more.

        Raises:
            OSError: they cannot be written; nothing of them is in the folder.
        """
        name = f"part-{block:06d}-{start:08d}-{start + len(records):08d}{'-end' if end else ''}.{self.format}"
        part = _beside(self.folder / name)
        try:
            write_part(part, self.manifest, records)
            _sync(part)
            part.replace(self.folder / name)
            _sync_folder(self.folder)
        finally:
            part.unlink(missing_ok=True)
        self._next[block] = None if end else start + len(records)

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        for entry in os.scandir(self.folder):
            if found := NAME.fullmatch(entry.name):
                block, start, stop = map(int, found.groups()[:3])
                yield block, start, stop


def errors(folder: Path) -> Iterator[Record]:
    """The rows of a folder that are errors, in the order of the inputs: {"path", "error": {"type", "message"}}."""
    for path in files(folder):
        for row in _rows(path):
            if not row["ok"]:
                error = row.get("error") or {"type": row["error_type"], "message": row["error_message"]}
                yield {"path": row["path"], "error": error}


def _rows(path: Path) -> Iterator[Record]:
    """The rows of a part; of Parquet and CSV what says whether they are errors."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            yield from (row | {"ok": row["ok"] == "True"} for row in csv.DictReader(file))
    else:
        import pyarrow.parquet as pq

        yield from pq.read_table(path, columns=["path", "ok", "error_type", "error_message"]).to_pylist()


def files(folder: Path) -> list[Path]:
    """The parts of a folder, in the order of the inputs."""
    named = ((NAME.fullmatch(entry.name), entry.path) for entry in os.scandir(folder))
    found = [(int(name[1]), int(name[2]), Path(path)) for name, path in named if name]
    return [path for _, _, path in sorted(found)]


def _line(block: Block) -> Record:
    stamp = _stamp(block)
    return block.to_json() | ({} if stamp is None else {"stamp": stamp})


def _stamp(block: Block) -> list[int] | None:
    """What tells an archive from another of its name: bytes and time of change. None: not known, or no archive."""
    if block.kind == "files" or is_url(block.paths[0]):
        return None
    try:
        found = Path(block.paths[0]).stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Shards that begin a folder at the same moment do so one after the other: the first makes the plan of all."""
    with (folder / ".lock").open("a") as file:
        with suppress(OSError, ImportError):  # some systems have no locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _beside(path: Path) -> Path:
    """What a file is called until it is whole: no two machines agree on it."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}")


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    part = _beside(path)
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        _sync(part)
        part.replace(path)
        _sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot
        _sync(path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
