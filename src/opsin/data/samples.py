"""A labelled set of images, read one at a time, whatever it is stored in; and how it is divided.

Samples            what training, evaluation and the doctor see
├── Files              a file each: folder.py, table.py, tiny_imagenet.py
├── Archived           a byte range of an archive each: tar.py
│   └── Zipped             compressed, maybe: folder.py, tiny_imagenet.py
├── Parquet            a cell of a table each: table.py
└── HubDataset         a row of a `datasets` set each: hub.py
"""

import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from opsin.errors import DataError, ImageCorrupt, ImageNotFound, ImageTooLarge, ImageUnreadable
from opsin.labels import Labels, match

MAX_IMAGE_BYTES = 64 * 2**20  # of one image file inside an archive or a table


class Samples(ABC):
    """N images with their classes; a subclass per layout says where the bytes are.

    Nothing is decoded here: `source` gives what `opsin.preprocess.decode` takes. Instances are pickled to the
    processes that read them, so they hold paths and offsets, no open files.

    Args:
        targets: (N,) int64, the class of each image; (N, K) uint8, 0 or 1, where an image may have several.
        labels: the K classes. `labels.multi_label` says which of the two `targets` is.
        held_out: (N,) bool, the images that the set itself keeps apart for validation; None where it says nothing.
    """

    def __init__(self, targets: np.ndarray, labels: Labels, held_out: np.ndarray | None = None) -> None:
        self.targets, self.labels, self.held_out = targets, labels, held_out

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def key(self, index: int) -> str:
        """Name of an image for people and records: a path, or `archive::member`. No two are equal."""

    @abstractmethod
    def source(self, index: int) -> str | bytes:
        """A path, or the bytes of the file; whatever is wrong with them shows when they are decoded.

        Raises:
            ImageError: the bytes cannot be reached.
        """

    @abstractmethod
    def identity(self) -> str:
        """Changes when the files do: names, sizes and times of modification, as hex. Features are cached under it."""


@dataclass(frozen=True, slots=True, eq=False)
class Strings:
    """Many names in two arrays: a quarter of the memory of as many `str`, and processes made by a fork share it.

    Args:
        packed: (bytes of all,) uint8, UTF-8, one after the other.
        ends: (N + 1,) int64, 0 and where each of the N ends.
    """

    packed: np.ndarray
    ends: np.ndarray

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "Strings":
        packed, ends = bytearray(), array("q", [0])
        for string in strings:
            packed += string.encode("utf-8", "surrogateescape")  # the names of files need not be UTF-8
            ends.append(len(packed))
        return cls(np.frombuffer(packed, np.uint8), np.frombuffer(ends, np.int64))

    @classmethod
    def join(cls, parts: Sequence["Strings"]) -> "Strings":
        """All strings of all parts, in order."""
        starts = np.cumsum([0, *(len(part.packed) for part in parts)])
        ends = [part.ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            np.concatenate([np.zeros(0, np.uint8), *(part.packed for part in parts)]),
            np.concatenate([np.zeros(1, np.int64), *ends]),
        )

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"no string {index}: there are {len(self)}.")
        return bytes(self.packed[self.ends[index] : self.ends[index + 1]]).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Files(Samples):
    """Images that are files of their own.

    Args:
        root: what the names are relative to; "": the names are paths already.
    """

    def __init__(
        self, targets: np.ndarray, labels: Labels, held_out: np.ndarray | None, *, root: str, names: Strings
    ) -> None:
        super().__init__(targets, labels, held_out)
        self.root, self.names = root, names

    def key(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])  # noqa: PTH118, called for every image

    def source(self, index: int) -> str:
        return self.key(index)

    def identity(self) -> str:
        return digest(self._state(index) for index in range(len(self)))

    def _state(self, index: int) -> tuple[str, int, int]:
        try:
            found = os.stat(self.key(index))  # noqa: PTH116
        except (OSError, ValueError):
            return self.names[index], -1, -1
        return self.names[index], found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Archive:
    """A file that holds images, as it was when it was indexed."""

    name: str  # for people: the path or URL that was asked for
    path: str  # on this machine
    version: str  # changes when the content does

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> "Archive":
        """A file of this machine.

        Raises:
            DataError: it cannot be read.
        """
        try:
            found = Path(path).stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}. Check the path and its permissions.") from error
        return cls(os.fspath(path), os.fspath(path), f"{Path(path).name} {found.st_size} {found.st_mtime_ns}")


class Archived(Samples):
    """Images that are byte ranges of archives. The archive is opened for each image: nothing is shared or kept open.

    Args:
        archives: the A files.
        which: (N,) the archive of each image, 0 to A − 1.
        names: of the N members.
        offsets: (N,) int64, bytes from the begin of the archive.
        sizes: (N,) int64, bytes, as the archive states them.
    """

    def __init__(
        self,
        targets: np.ndarray,
        labels: Labels,
        held_out: np.ndarray | None,
        *,
        archives: Sequence[Archive],
        which: np.ndarray,
        names: Strings,
        offsets: np.ndarray,
        sizes: np.ndarray,
    ) -> None:
        super().__init__(targets, labels, held_out)
        self.archives, self.which, self.names = tuple(archives), which.astype(np.int32), names
        self.offsets, self.sizes = offsets, sizes

    def key(self, index: int) -> str:
        return f"{self.archives[self.which[index]].name}::{self.names[index]}"

    def source(self, index: int) -> bytes:
        archive = self.archives[self.which[index]]
        return read_range(archive.path, int(self.offsets[index]), int(self.sizes[index]), self.key(index))

    def identity(self) -> str:
        ranges = (array.tobytes() for array in (self.which, self.offsets, self.sizes))
        return digest([*(archive.version for archive in self.archives), *map(hashlib.sha256, ranges)])


def read_range(path: str, offset: int, size: int, name: str) -> bytes:
    """`size` bytes of a file. No more memory is taken than the file, and `MAX_IMAGE_BYTES`, can account for.

    Args:
        name: of the image, for errors.
    Raises:
        ImageError: too many bytes, or not all of them are there.
    """
    check_size(size, name)
    try:
        with Path(path).open("rb") as file:
            whole = os.fstat(file.fileno()).st_size
            if not 0 <= offset <= offset + size <= whole:
                raise ImageCorrupt(
                    f"{name}: its bytes are to be {offset:,} to {offset + size:,} of {path}, which has {whole:,}. "
                    "The archive is damaged, or has changed since it was opened."
                )
            file.seek(offset)
            data = file.read(size)
    except FileNotFoundError as error:
        raise ImageNotFound(f"{name}: {path} is gone.") from error
    except OSError as error:
        raise ImageUnreadable(f"{name}: {error.strerror or error}.") from error
    if len(data) < size:
        raise ImageCorrupt(f"{name}: {len(data):,} bytes of {size:,} could be read.")
    return data


def check_size(size: int, name: str) -> None:
    """
    Raises:
        ImageTooLarge: more than `MAX_IMAGE_BYTES`.
    """
    if size > MAX_IMAGE_BYTES:
        raise ImageTooLarge(
            f"{name}: {size:,} bytes; the limit for an image in an archive or a table is {MAX_IMAGE_BYTES:,}. "
            "Save it smaller, or as a file of its own."
        )


def digest(parts: Iterable[object]) -> str:
    """32 hex digits of some values' text, or of a hash's value: for `Samples.identity`."""
    hasher = hashlib.sha256()
    for part in parts:
        text = part.hexdigest() if hasattr(part, "hexdigest") else repr(part)
        hasher.update(text.encode("utf-8", "surrogateescape") + b"\n")
    return hasher.hexdigest()[:32]


# ── classes: what the files say → targets and labels ─────────────────────────────────────────────────────────────────

_INTEGER = re.compile(r"[+-]?\d{1,18}")


def encode(
    values: Iterable[Any], where: str, *, names: Sequence[str] | None = None, separators: str = ""
) -> tuple[np.ndarray, Labels]:
    """The classes of N images, as a column has them → targets and labels.

    Args:
        values: a name or a number each, or a list of them; None or "" for none. Where one has several, or is a list,
            all are taken for sets of classes.
        where: begins an error.
        names: of the classes by number; None: they are those that occur, numbers in order of size, names sorted.
        separators: characters that divide several classes in one text.
    Returns:
        targets (N,) int64 or (N, K) uint8, as `Samples` has them, and labels.
    Raises:
        DataError: an image without class, a number without name, a value that is neither; its row, from 1, is named.
    """
    splitter = re.compile(f"[{re.escape(separators)}]") if separators else None
    codes: dict[str | int, int] = {}  # class → order of first occurrence
    first_row: list[int] = []
    seen: dict[str | int, list[int]] = {}  # value → its codes: most values come many times
    flat, counts = array("q"), array("q")
    multi_label, empty_row = False, 0
    for row, value in enumerate(values, 1):
        plain = type(value) in (str, int)
        found = seen.get(value) if plain else None
        if found is None:
            is_list, classes = _classes(value, splitter, where, row)
            multi_label |= is_list or len(classes) > 1
            found = []
            for name in classes:
                if name not in codes:
                    codes[name] = len(codes)
                    first_row.append(row)
                found.append(codes[name])
            if plain:
                seen[value] = found
        if not found and not empty_row:
            empty_row = row
        flat.extend(found)
        counts.append(len(found))
    if empty_row and not multi_label:
        raise DataError(f"{where}: row {empty_row} has no class. Give it one, or remove the row.")
    if names is None:
        numeric = all(isinstance(name, int) or _INTEGER.fullmatch(name) for name in codes)
        ordered = sorted(codes, key=(lambda name: (int(name), str(name))) if numeric else str)
        labels = Labels.from_names(str(name) for name in ordered)
        place = {name: i for i, name in enumerate(ordered)}
    else:
        labels = Labels.from_names(names)
        by_name: dict[str, int] = {}
        for i, known in enumerate(names):
            by_name.setdefault(known, i)
        place = {name: _number(name, by_name, len(names), where, first_row[i]) for name, i in codes.items()}
    new = np.array([place[name] for name in codes], np.int64)
    indices = new[np.frombuffer(flat, np.int64)] if flat else np.zeros(0, np.int64)
    if not multi_label:
        return indices, labels
    targets = np.zeros((len(counts), len(labels)), np.uint8)
    targets[np.repeat(np.arange(len(counts)), np.frombuffer(counts, np.int64)), indices] = 1
    return targets, replace(labels, multi_label=True)


def _classes(
    value: Any, splitter: re.Pattern[str] | None, where: str, row: int
) -> tuple[bool, list[str | int]]:  # whether it is a list; its classes
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return True, [name for item in value for name in _classes(item, None, where, row)[1]]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False, []
    if isinstance(value, str):
        parts = (part.strip() for part in (splitter.split(value) if splitter else [value]))
        return False, [part for part in parts if part]
    if isinstance(value, int | float) and math.isfinite(value) and value == int(value):
        return False, [int(value)]
    raise DataError(f"{where}: row {row} has the class {str(value)[:40]!r}; right is a name or a whole number.")


def _number(name: str | int, by_name: dict[str, int], count: int, where: str, row: int) -> int:
    """Index of a class among those that have names, from its name or its number."""
    if isinstance(name, str):
        if name in by_name:
            return by_name[name]
        if not _INTEGER.fullmatch(name):
            raise DataError(f'{where}: row {row} has the class "{name}", which is not among the {count} named.')
    index = int(name)
    if not 0 <= index < count:
        missing = " (the mark of an image without a class)" if index == -1 else ""
        raise DataError(
            f"{where}: row {row} has the class {index}{missing}; {count} names are given, for 0 to {count - 1}. "
            "Mend the names, or leave the row out."
        )
    return index


# ── the set's own division ───────────────────────────────────────────────────────────────────────────────────────────

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLIT = {word: split for split, words in SPLITS.items() for word in words}


def split_of(name: str) -> str | None:
    """ "train", "val" or "test" if a word of a file's name, or its folder, says so: `validation-00000-of-00002.tar`."""
    path = PurePosixPath(name.replace("\\", "/"))
    words = (_SPLIT.get(word) for word in re.split("[^a-z]+", path.name.split(".")[0].lower()))
    return next((word for word in words if word), None) or split_word(path.parent.name)


def split_word(word: str | None) -> str | None:
    """ "train", "val" or "test", for any of their names; None for another word."""
    return _SPLIT.get((word or "").strip().lower())


def find_files(folder: Path, pattern: str) -> list[str]:
    """Files of a pattern in a folder and in its train/, val/ and test/; else in its data/ likewise. Sorted.

    Other folders are not looked into: they may be classes, with a million images each.
    """
    for base in (folder, folder / "data"):
        if not base.is_dir():
            continue
        places = [base, *(path for path in base.iterdir() if split_word(path.name) and path.is_dir())]
        if found := sorted(str(path) for place in places for path in place.glob(pattern) if path.is_file()):
            return found
    return []


def choose(parts: Sequence[str | None], wanted: str | None, where: str) -> list[bool | None]:
    """What to do with each part of a set: False, train on it; True, hold it out; None, leave it.

    Args:
        parts: the name of each; None where it has none.
        wanted: the one to read, by name ("val" also finds "validation"), then nothing is held out; None: what there is
            to train on, and "val", else "test", held out.
    Raises:
        DataError: the wanted one is not there, or there is nothing to train on and a choice between the others.
    """
    kinds = [None if part is None else split_word(part) or part for part in parts]
    there = ", ".join(sorted({part for part in parts if part is not None})) or "none"
    if wanted is not None:
        exact = [part == wanted for part in parts]
        chosen = exact if any(exact) else [kind is not None and kind == split_word(wanted) for kind in kinds]
        if not any(chosen):
            raise DataError(
                f'{where} has no split "{wanted}". There is: {there}. Choose one of them, or give no split.'
            )
        return [False if kept else None for kept in chosen]
    if len(set(kinds)) == 1:
        return [False] * len(kinds)
    held_out = next((kind for kind in ("val", "test") if kind in kinds), None)
    if "train" not in kinds and None not in kinds:
        raise DataError(f"{where} has the splits {there} and none to train on. Choose one of them by name.")
    return [True if kind == held_out else False if kind in ("train", None) else None for kind in kinds]


def held_out_rows(chosen: Sequence[bool | None], counts: Sequence[int]) -> np.ndarray | None:
    """`Samples.held_out` of the parts that `choose` keeps, which have `counts` images each."""
    kept = [(held_out, count) for held_out, count in zip(chosen, counts, strict=True) if held_out is not None]
    if not any(held_out for held_out, _ in kept):
        return None
    return np.repeat([held_out for held_out, _ in kept], [count for _, count in kept]).astype(bool)


def split(samples: Samples, share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to validate on, both ascending.

    The set's own division where it has one; else of each class every n-th image in the order of the set, n = 1/share,
    so that the same folder is divided in the same way on every machine, and every class with n images is seen in both.

    Raises:
        DataError: nothing would be left to train on.
    """
    if samples.held_out is not None:
        held_out = samples.held_out
    else:
        held_out = np.zeros(len(samples), bool)
        if share > 0:
            every = max(round(1 / share), 2)
            groups = samples.targets.argmax(1) if samples.labels.multi_label else samples.targets
            for group in np.unique(groups):
                rows = np.flatnonzero(groups == group)
                held_out[rows[every - 1 :: every]] = True
    if held_out.all():
        raise DataError(f"all {len(samples)} images are held out: nothing is left to train on.")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def relabel(samples: Samples, labels: Labels, *, partial: bool = False) -> None:
    """Give a set the class indices of a model: by name or WordNet id, never by the order of folders.

    A model of several classes an image takes a set of one class an image: its targets become (N, K) uint8.

    Args:
        partial: allow that classes of the model have no image.
    Raises:
        DataError: a class of the set that the model does not know, or one of the model that the set has no image of;
            all are named. Or a set of several classes an image, and a model that gives one.
    """
    if samples.labels.multi_label and not labels.multi_label:
        raise DataError(
            "an image of this set may have several classes, and the model gives one an image. Take a model that was "
            "trained on several, or a set with one class an image."
        )
    indices = match(samples.labels, labels)
    unknown = [samples.labels.name(i) for i, index in enumerate(indices) if index is None]
    present = {index for index in indices if index is not None}
    absent = [] if partial else [labels.name(i) for i in range(len(labels)) if i not in present]
    if unknown or absent:
        parts = [
            f"{len(names)} classes {what}: {enumerated(names)}"
            for names, what in ((unknown, "that the model does not know"), (absent, "of the model without an image"))
            if names
        ]
        raise DataError(
            f"the classes of the data are not the model's: {'; '.join(parts)}. "
            "Rename or move the folders; to score on a part of the classes say so: --partial."
        )
    new = np.array(indices, dtype=np.int64)
    if labels.multi_label:
        targets = np.zeros((len(samples), len(labels)), np.uint8)
        if samples.labels.multi_label:
            targets[:, new] = samples.targets
        else:
            targets[np.arange(len(samples)), new[samples.targets]] = 1
        samples.targets = targets
    else:
        samples.targets = new[samples.targets]
    samples.labels = labels


def enumerated(names: Sequence[str], limit: int = 10) -> str:
    """Some names for an error: the first ten, and a sign that there are more."""
    return f"{', '.join(names[:limit])}{', …' if len(names) > limit else ''}"
