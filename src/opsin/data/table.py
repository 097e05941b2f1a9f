"""Tables of images: paths and classes in CSV, TSV, JSON lines or Parquet; or the bytes themselves in Parquet.

    path,label,split                path,label                  file_name,person,bicycle
    a/1.jpg,cat,train               1.jpg,cat;indoors           1.jpg,0,1
    a/2.jpg,dog,val                 2.jpg,dog                   2.jpg,1,1

A relative path is relative to the table. Where a cell has several classes, apart by ";" or "|", or a list, or where
columns of 0 and 1 stand for a class column, every image has a set of classes. Tables named `metadata.*` may lie in a
folder of images, or in its `train/` and `val/`, as the hub has it.
"""

import csv
import itertools
import json
import logging
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np

from opsin.data.samples import (
    Archive,
    Files,
    Samples,
    Strings,
    check_size,
    choose,
    digest,
    encode,
    enumerated,
    find_files,
    held_out_rows,
    split_of,
)
from opsin.errors import DataError, ImageCorrupt, ImageNotFound, ImageUnreadable, MissingExtra

log = logging.getLogger(__name__)

PATHS = ("path", "file_name", "filename", "filepath", "image", "file")
CLASSES = ("label", "labels", "class", "classes", "target", "targets")
SPLIT = "split"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = ";|"

_MAX_GROUP_BYTES = 2 * 2**30  # of images in a row group, which is read as a whole
_CACHE_BYTES = 128 * 2**20  # row groups kept by a process
_FIRST_ROWS = 100  # of which one at least has to exist
_BINARY = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


# ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_table(paths: Sequence[str], split: str | None = None) -> Files:
    """One or several tables of paths and classes, with the same columns.

    Args:
        split: which to read: by the column `split`, else by a word of the table's name or its folder's (`val.csv`).
    Raises:
        DataError: a table that cannot be read, has no such columns, names an image twice, or whose images are missing.
        MissingExtra: pyarrow is needed for Parquet.
    """
    names: list[str] = []
    values: list[Any] = []
    parts: list[str | None] = []  # name of the split of each row
    class_names: tuple[str, ...] | None = None
    for i, path in enumerate(paths):
        header = _header(path)
        wanted = _columns(header, path)
        table = _read(path, header, [name for name in wanted if name is not None])
        path_column, class_column, split_column = wanted
        if class_column is None:
            found, rows = _binary_columns(path, header, {path_column, split_column})
            if i and class_names != found:
                raise DataError(
                    f"{path} has the class columns {found}, and {paths[0]} {class_names}. Make them the same."
                )
            class_names = found
        else:
            rows = table[class_column]
        if i and (class_column is None) != (class_names is not None):
            raise DataError(f"{path} and {paths[0]} differ in how they give classes. Make their columns the same.")
        folder = os.path.dirname(path)  # noqa: PTH120, keeps "./" as given
        names += _located(table[path_column], folder, path)
        values += rows
        if split_column is None:
            word = split_of(path)
            parts += [word] * len(table[path_column])
        else:
            parts += [str(value).strip() if value not in (None, "") else None for value in table[split_column]]
    where = enumerated(list(paths), 3)
    if not names:
        raise DataError(f"{where} has no rows. Right is a header, then one row an image.")
    targets, labels = encode(values, where, names=class_names, separators=SEPARATORS)
    kinds = list(dict.fromkeys(parts))
    chosen = dict(zip(kinds, choose(kinds, split, where), strict=True))
    _report_unread(where, chosen)
    status = [chosen[part] for part in parts]
    rows_kept = np.flatnonzero([held_out is not None for held_out in status])
    kept = [names[row] for row in rows_kept]
    _check_distinct(kept, where)
    if not any(Path(name).exists() for name in kept[:_FIRST_ROWS]):
        raise DataError(
            f"none of the first {min(len(kept), _FIRST_ROWS)} images of {where} is there; the first is {kept[0]}. "
            "Paths have to be relative to the table's folder, or absolute, with the file's extension."
        )
    held_out = np.array([status[row] for row in rows_kept], bool)
    return Files(targets[rows_kept], labels, held_out if held_out.any() else None, root="", names=Strings.pack(kept))


def metadata_tables(folder: Path) -> list[str]:
    """`metadata.*` with a class column, in a folder or in its train/, val/ and test/."""
    tables = [path for path in find_files(folder, "metadata.*") if Path(path).name in METADATA]
    if not all(_has_classes(path) for path in tables):
        log.info("%s: %s holds no classes; the folders' names are taken", folder, enumerated(tables, 3))
        return []
    return tables


def _has_classes(path: str) -> bool:
    header = _header(path)
    if _find(header, CLASSES) is not None:
        return True
    try:
        return bool(_binary_columns(path, header, {_find(header, PATHS), _find(header, (SPLIT,))}))
    except DataError:
        return False


def _report_unread(where: str, chosen: dict[str | None, bool | None]) -> None:
    for part, held_out in chosen.items():
        if held_out is None:
            log.info('%s: the split "%s" is left unread', where, part)


def _find(header: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of some columns that is there, upper or lower case."""
    lower = {name.strip().lower(): name for name in reversed(header)}
    return next((lower[name] for name in names if name in lower), None)


def _columns(header: Sequence[str], path: str) -> tuple[str, str | None, str | None]:
    """Columns of paths, of classes and of splits."""
    path_column = _find(header, PATHS)
    if path_column is None:
        raise DataError(
            f"{path} has no column of paths: looked for {', '.join(PATHS)}; there are {enumerated(list(header))}. "
            "Give one of the columns such a name, in the first line."
        )
    return path_column, _find(header, CLASSES), _find(header, (SPLIT,))


def _binary_columns(
    path: str, header: Sequence[str], others: set[str | None]
) -> tuple[tuple[str, ...], list[list[int]]]:
    """The columns of 0 and 1, and of each row those that are 1, by number."""
    table = _read(path, header, [name for name in header if name not in others])
    columns: dict[str, list[int]] = {}
    for name, cells in table.items():
        bits = [_BINARY.get(str(cell).strip().lower()) for cell in cells]
        if bits and None not in bits:
            columns[name] = [bit for bit in bits if bit is not None]
    if len(columns) < 2:
        raise DataError(
            f"{path} has no column of classes: looked for {', '.join(CLASSES)}, or two columns and more of 0 and 1; "
            f"there are {enumerated(list(header))}. Give one of the columns such a name."
        )
    rows = [[i for i, bit in enumerate(bits) if bit] for bits in zip(*columns.values(), strict=True)]
    return tuple(columns), rows


def _located(cells: Sequence[Any], folder: str, table: str) -> Iterator[str]:
    for row, cell in enumerate(cells, 1):
        if not isinstance(cell, str) or not cell.strip():
            raise DataError(f"{table}: row {row} has the path {cell!r}. Give it one, or remove the row.")
        if "://" in cell:
            raise DataError(f"{table}: row {row} has the address {cell[:80]}. Fetch the images and give their paths.")
        yield os.path.join(folder, cell.strip())  # noqa: PTH118, called for every image


def _check_distinct(names: Sequence[str], where: str) -> None:
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    order = np.argsort(hashes, kind="stable")
    for i in np.flatnonzero(np.diff(hashes[order]) == 0):
        first, second = names[order[i]], names[order[i + 1]]
        if first == second:
            raise DataError(
                f"{where} names {first} twice. Give an image one row; several classes go into its one cell, apart by "
                '";".'
            )


def _header(path: str) -> list[str]:
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return list(_arrow(path, lambda pq: pq.read_schema(path)).names)
    if suffix == ".jsonl":
        return list(next(_json_rows(path), {}))
    for row in _csv_rows(path):
        return row
    raise DataError(f"{path} is empty. Right is a first line with the names of the columns, then one line an image.")


def _read(path: str, header: Sequence[str], columns: Sequence[str]) -> dict[str, list[Any]]:
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        table = _arrow(path, lambda pq: pq.read_table(path, columns=list(columns), use_threads=False))
        return {name: table.column(name).to_pylist() for name in columns}
    cells: dict[str, list[Any]] = {name: [] for name in columns}
    if suffix == ".jsonl":
        for record in _json_rows(path):
            for name in columns:
                cells[name].append(record.get(name))
        return cells
    places = [(cells[name], header.index(name)) for name in columns]
    shared: dict[str, str] = {}  # a class is one text, not one a row
    for row in _csv_cells(path, header):
        for column, place in places:
            column.append(shared.setdefault(row[place], row[place]) if len(row[place]) < 80 else row[place])
    return cells


def read_paths(path: str) -> Iterator[str]:
    """What a table says in its column of paths, row by row, as it stands there; "" where it says nothing.

    Raises:
        DataError: the table cannot be read, or has no such column.
        MissingExtra: pyarrow is needed for Parquet.
    """
    header = _header(path)
    column = _columns(header, path)[0]
    suffix = Path(path).suffix.lower()
    cells: Iterator[Any]
    if suffix == ".parquet":
        cells = _parquet_cells(path, column)
    elif suffix == ".jsonl":
        cells = (record.get(column) for record in _json_rows(path))
    else:
        place = header.index(column)
        cells = (row[place] for row in _csv_cells(path, header))
    for cell in cells:
        yield cell.strip() if isinstance(cell, str) else ""


def _parquet_cells(path: str, column: str) -> Iterator[Any]:
    with _arrow(path, lambda pq: pq.ParquetFile(path)) as file:
        batches = file.iter_batches(columns=[column], use_threads=False)
        while (batch := _arrow(path, lambda _: next(batches, None))) is not None:
            yield from batch.column(0).to_pylist()


def _csv_cells(path: str, header: Sequence[str]) -> Iterator[list[str]]:
    """The rows below the header, all as long as it."""
    for number, row in enumerate(itertools.islice(_csv_rows(path), 1, None), 1):
        if len(row) != len(header):
            raise DataError(
                f"{path}: row {number} has {len(row)} cells, the header {len(header)}. Put cells that contain the "
                "separator into quotes."
            )
        yield row


def _csv_rows(path: str) -> Iterator[list[str]]:
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(",\t;", key=first.count)
            yield from (row for row in csv.reader(file, delimiter=delimiter) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV in UTF-8: {error}. Save it as that.") from error


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"{str(record)[:40]} is no object")
                    yield record
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: {error}. Right is one JSON object a line.") from error


def require_pyarrow() -> ModuleType:
    """pyarrow.parquet.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet") from error
    return cast(ModuleType, pq)


def _arrow(path: str, read: Callable[[ModuleType], Any]) -> Any:
    """What `read` gives, which is called with pyarrow.parquet.

    Raises:
        MissingExtra: pyarrow is not installed.
        DataError: pyarrow cannot read the file.
    """
    pq = require_pyarrow()
    import pyarrow as pa

    try:
        return read(pq)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Fetch or make it again.") from error


# ── image bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def has_image_bytes(path: str) -> bool:
    """Whether a Parquet file has a column of images themselves, not of their paths."""
    return image_column(_arrow(path, lambda pq: pq.read_schema(path))) is not None


def parquet_files(folder: Path) -> list[str]:
    """The Parquet files with image bytes of a folder, its data/, or their train/, val/ and test/."""
    return [path for path in find_files(folder, "*.parquet") if has_image_bytes(path)]


def open_parquet(paths: Sequence[str], split: str | None = None) -> "Parquet":
    """Parquet files with image bytes, in the hub's layout: a column `image` of {bytes, path}, and one of classes.

    Args:
        split: which to read, by a word of the files' names or their folder's: train-00000-of-00004.parquet.
    Raises:
        DataError: a file that cannot be read, or has no such columns, or row groups too large to read at random.
        MissingExtra: pyarrow is not installed.
    """
    where = enumerated(list(paths), 3)
    chosen = choose([split_of(path) for path in paths], split, where)
    _report_unread(where, {split_of(path): held_out for path, held_out in zip(paths, chosen, strict=True)})
    kept = [path for path, held_out in zip(paths, chosen, strict=True) if held_out is not None]
    classes: list[Any] = []
    class_names: list[str] | None = None
    groups: list[tuple[int, int, int]] = []  # file, row group in it, rows
    columns: list[str] = []
    for i, path in enumerate(kept):
        file = _arrow(path, lambda pq, path=path: pq.ParquetFile(path))  # type: ignore[misc]
        with file:
            schema = file.schema_arrow
            images, class_column = image_column(schema), _class_column(schema)
            if images is None or class_column is None:
                raise DataError(
                    f"{path} has no column of {'images' if images is None else 'classes'}: looked for image "
                    f"bytes and for {', '.join(CLASSES)}; there are {enumerated(list(schema.names))}. Give the columns "
                    "such names."
                )
            found = _class_names(schema, class_column)
            if i and found != class_names:
                raise DataError(f"{path} names other classes than {kept[0]}. Take files of one data set.")
            class_names = found
            columns.append(images)
            _check_groups(file.metadata, images, path)
            groups += [(i, g, file.metadata.row_group(g).num_rows) for g in range(file.metadata.num_row_groups)]
            column = _arrow(path, lambda _, file=file, name=class_column: file.read([name], use_threads=False))  # type: ignore[misc]
            classes += column.column(class_column).to_pylist()
    if not classes:
        raise DataError(f"{where} has no rows. Fetch or make the files again.")
    targets, labels = encode(classes, where, names=class_names)
    rows = array("q", [0] * len(kept))
    for i, _, count in groups:
        rows[i] += count
    held_out = held_out_rows([held_out for held_out in chosen if held_out is not None], rows)
    archives = [Archive.at(path) for path in kept]
    return Parquet(targets, labels, held_out, files=archives, columns=columns, groups=np.array(groups, np.int64))


def _features(schema: Any) -> dict[str, Any]:
    """What the `datasets` library wrote into a schema about its columns; empty where it did not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features if isinstance(features, dict) else {}
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}


def image_column(schema: Any) -> str | None:
    """The column of a Parquet file that has the bytes of images, plain or as {bytes, path}; None: there is none."""
    import pyarrow as pa

    def has_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            place = kind.get_field_index("bytes")
            return place >= 0 and has_bytes(kind.field(place).type)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if has_bytes(field.type)]
    declared = [
        name for name, kind in _features(schema).items() if isinstance(kind, dict) and kind.get("_type") == "Image"
    ]
    for name in ("image", *declared, "img"):
        if name in found:
            return name
    return found[0] if found else None


def _class_column(schema: Any) -> str | None:
    named = [name for name in schema.names if _class_names(schema, name) is not None]
    return _find(schema.names, CLASSES) or (named[0] if len(named) == 1 else None)


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The names that the `datasets` library gives to a column's numbers."""
    kind = _features(schema).get(column)
    while isinstance(kind, dict | list) and kind:  # a list of ClassLabel, in its older and newer spelling
        if isinstance(kind, list):
            kind = kind[0]
        elif kind.get("_type") == "ClassLabel":
            names = kind.get("names")
            return [str(name) for name in names] if isinstance(names, list) else None
        else:
            kind = kind.get("feature")
    return None


def _check_groups(metadata: Any, column: str, path: str) -> None:
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        leaves = (group.column(i) for i in range(group.num_columns))
        num_bytes = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == column)
        if num_bytes > _MAX_GROUP_BYTES:
            raise DataError(
                f"{path}: row group {number} holds {num_bytes / 1e9:.1f} GB of images, and to read one of them all are "
                f"read; at most {_MAX_GROUP_BYTES / 1e9:.1f} GB will do. Write the file again with row_group_size=100."
            )


class Parquet(Samples):
    """Images that are cells of Parquet files. A row group is read as a whole; a process keeps the last few.

    Args:
        files: the F files.
        columns: of images, one a file.
        groups: (G, 3) int64: file, number of the row group in it, and its rows; the N images in order.
    """

    def __init__(
        self,
        targets: np.ndarray,
        labels: Any,
        held_out: np.ndarray | None,
        *,
        files: Sequence[Archive],
        columns: Sequence[str],
        groups: np.ndarray,
    ) -> None:
        super().__init__(targets, labels, held_out)
        self.files, self.columns, self.groups = tuple(files), tuple(columns), groups
        self.ends = np.cumsum(groups[:, 2])
        self.first_group = np.searchsorted(groups[:, 0], np.arange(len(files)))  # of each file

    def _place(self, index: int) -> tuple[int, int, int]:
        """File, row group in it and row in that."""
        place = int(np.searchsorted(self.ends, index, side="right"))
        file, group, rows = (int(value) for value in self.groups[place])
        return file, group, index - (int(self.ends[place]) - rows)

    def key(self, index: int) -> str:
        file = self._place(index)[0]
        first = self.first_group[file]
        return f"{self.files[file].name}::{index - int(self.ends[first] - self.groups[first, 2])}"  # row of the file

    def source(self, index: int) -> str | bytes:
        name = self.key(index)
        file, group, row = self._place(index)
        cells = _row_group(self.files[file], self.columns[file], group, name)
        if row >= len(cells):
            raise ImageCorrupt(f"{name}: its row group has {len(cells)} rows. The file has changed; open it again.")
        image = in_cell(cells[row], name)
        return image if isinstance(image, bytes) else str(Path(self.files[file].path).parent / image)

    def identity(self) -> str:
        return digest([*(file.version for file in self.files), self.columns, self.groups.tolist()])


def in_cell(cell: Any, name: str) -> bytes | str:
    """The image in a cell of `image_column`: its bytes, else a path that is relative to the table.

    Args:
        name: of the image, for errors.
    Raises:
        ImageError: neither, or too many bytes.
    """
    path = None
    if hasattr(cell, "keys"):  # struct {bytes, path}
        path = cell["path"].as_py() if cell.is_valid and "path" in cell else None
        cell = cell["bytes"] if cell.is_valid else None
    if cell is not None and cell.is_valid:
        check_size(cell.as_buffer().size, name)
        return bytes(cell.as_buffer())
    if not isinstance(path, str) or "://" in path:
        raise ImageUnreadable(f"{name}: the cell holds no bytes{f', and the address {path}' if path else ''}.")
    return path


_groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()  # of this process, least recently used first
_groups_lock = threading.Lock()


def _row_group(file: Archive, column: str, group: int, name: str) -> Any:
    """The images of a row group, from memory if they were read lately."""
    key = (file.path + file.version, column, group)
    with _groups_lock:
        if key in _groups:
            _groups.move_to_end(key)
            return _groups[key]
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # without threads: a process made by a fork has none of its parent's
        with pq.ParquetFile(file.path, pre_buffer=False) as opened:
            cells = opened.read_row_group(group, columns=[column], use_threads=False).column(0)
    except FileNotFoundError as error:
        raise ImageNotFound(f"{name}: {file.path} is gone.") from error
    except pa.ArrowException as error:
        raise ImageCorrupt(f"{name}: row group {group} of {file.path} cannot be read: {error}.") from error
    except OSError as error:  # damaged pages too
        raise ImageUnreadable(f"{name}: row group {group} of {file.path} cannot be read: {error}.") from error
    with _groups_lock:
        _groups[key] = cells
        while len(_groups) > 1 and sum(kept.nbytes for kept in _groups.values()) > _CACHE_BYTES:
            _groups.popitem(last=False)
    return cells
