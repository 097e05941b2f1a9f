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
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from opsin.data.inputs import Block
from opsin.errors import BulkError
from opsin.results import Record, json_line, write_part

FORMATS = ("parquet", "jsonl", "csv")
MANIFEST, INPUTS = "_manifest.json", "_inputs.jsonl"  # a leading _: pandas and pyarrow pass over them
NAME = re.compile(r"part-(\d{6,})-(\d{8,})-(\d{8,})(-end)?\.(?:parquet|jsonl|csv)")


class Parts:
    """A folder of parts, new or gone on with.

    Args:
        folder: made where it is not there.
        manifest: what decides the rows: JSON values.
        blocks: of the inputs, where the folder is new; the folder's own are read else.
        resume: go on with a folder that has a manifest. Without it such a folder is refused.
    Raises:
        BulkError: the folder holds another run, or one that was not to be resumed; or files of no run at all.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, manifest: Record, blocks: Iterable[Block], *, resume: bool) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.format: str = manifest["format"]
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        if path.exists():
            self._check(path, resume)
        else:
            odd = next((entry.name for entry in os.scandir(self.folder) if not entry.name.startswith(".")), None)
            if odd is not None and odd != INPUTS:
                raise BulkError(
                    f'{self.folder} holds "{odd}" and is no folder of a run. Name a new or an empty folder.'
                )
            _write_whole(self.folder / INPUTS, (json_line(block.to_json()) for block in blocks))
            _write_whole(path, [json.dumps(manifest, indent=2, ensure_ascii=False)])
        self.num_blocks = sum(1 for _ in self.blocks())
        self._next = self._state()

    def _check(self, path: Path, resume: bool) -> None:
        if not resume:
            raise BulkError(f"{self.folder} holds a run already. Go on with it by --resume, or name another folder.")
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
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
        """Block → the first row that no part holds; None where all are held. What overlaps or is half written goes."""
        parts: dict[int, dict[int, list[tuple[int, bool, str]]]] = defaultdict(lambda: defaultdict(list))
        for entry in os.scandir(self.folder):
            if found := NAME.fullmatch(entry.name):
                block, start, stop = map(int, found.groups()[:3])
                parts[block][start].append((stop, bool(found[4]), entry.name))
            elif entry.name.startswith(".part-"):
                Path(entry.path).unlink(missing_ok=True)
        state: dict[int, int | None] = {}
        for block, starts in parts.items():
            row, kept, ended = 0, set(), False
            while row in starts and not ended:
                stop, ended, name = max(starts[row])
                kept.add(name)
                if stop == row and not ended:
                    break
                row = stop
            state[block] = None if ended else row
            for _, _, name in (part for group in starts.values() for part in group):
                if name not in kept:
                    (self.folder / name).unlink(missing_ok=True)
        return state

    def blocks(self) -> Iterator[Block]:
        with (self.folder / INPUTS).open(encoding="utf-8") as file:
            for line in file:
                yield Block.from_json(json.loads(line))

    def to_do(self, shard: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, Block, int]]:
        """(number, block, first row to do) of the blocks that are not done, of those i, i + n, i + 2·n, …"""
        index, count = shard
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
        part = self.folder / f".{name}.{os.getpid()}"
        try:
            write_part(part, self.manifest, records)
            _sync(part)
            part.replace(self.folder / name)
            _sync(self.folder)
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


def _write_whole(path: Path, lines: Iterable[str]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        _sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot of a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
