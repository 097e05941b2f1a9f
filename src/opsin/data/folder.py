"""A folder of class folders, on disk or in a zip file, undivided or below `train/` and `val/`.

    photos/cat/1.jpg                photos/train/cat/1.jpg
    photos/cat/more/2.jpg           photos/val/cat/2.jpg
    photos/dog/3.png

The folders' names, sorted, are the classes. What is hidden (a name that begins with a dot) or no image by its name is
ignored, and so is a folder without images.
"""

import bisect
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from opsin.data.samples import (
    MAX_IMAGE_BYTES,
    Archive,
    Archived,
    Files,
    Strings,
    check_size,
    choose,
    enumerated,
    held_out_rows,
    read_range,
    split_word,
)
from opsin.errors import DataError, ImageCorrupt, ImageUnreadable
from opsin.labels import Labels
from opsin.preprocess import is_image_name

log = logging.getLogger(__name__)


def open_folder(path: str, split: str | None = None) -> Files:
    """A folder of class folders.

    A class folder may be a link to a folder elsewhere; links to folders below it are not followed.

    Raises:
        DataError: no class folder with an image, or the classes of the splits differ.
    """
    names, targets, labels, held_out = read_tree(_Disk(path), split)
    return Files(targets, labels, held_out, root=path, names=names)


def open_zip(path: str, split: str | None = None) -> "Zipped":
    """Class folders in a zip file, maybe inside one folder that holds them all.

    Raises:
        DataError: as `open_folder`, or no zip file.
    """
    archive = Archive.at(path)
    members = zip_members(path)
    tree = _Zip(path, list(members))
    names, targets, labels, held_out = read_tree(tree, split)
    infos = [members[tree.prefix + name] for name in names]
    return Zipped(targets, labels, held_out, archives=[archive], which=np.zeros(len(infos)), names=names, infos=infos)


# ── which folder is which ────────────────────────────────────────────────────────────────────────────────────────────


class Tree(Protocol):
    """Folders with images; paths are relative to its root, with slashes, and "" is the root."""

    where: str  # for errors

    def folders(self, path: str) -> list[str]:
        """Names of the folders in a folder, sorted; hidden ones left out."""

    def images(self, path: str) -> Iterator[str]:
        """Paths of the images in and below a folder, sorted folder by folder; hidden ones left out."""


def read_tree(tree: Tree, split: str | None) -> tuple[Strings, np.ndarray, Labels, np.ndarray | None]:
    """Paths of the images, targets, labels, held out: see `Samples`.

    Raises:
        DataError: no class folder with an image, a name that is not UTF-8, or the classes of the splits differ.
    """
    roots = _roots(tree)
    chosen = choose([root or None for root in roots], split, tree.where)
    found: dict[str, dict[str, list[str]]] = {}  # root → class → images
    for root, held_out in zip(roots, chosen, strict=True):
        if held_out is None:
            log.info('%s: the split "%s" is left unread', tree.where, root)
            continue
        paths = {name: list(tree.images(_join(root, name))) for name in tree.folders(root)}
        found[root] = {name: images for name, images in paths.items() if images}
    roots = list(found)
    for root in roots:
        if not found[root]:
            raise DataError(_nothing(tree, root))
    classes = sorted(found[roots[0]])
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{tree.where}: the folder {name!r} has a name that is not UTF-8. Rename it.") from error
    for root in roots[1:]:
        _check_same(tree.where, roots[0], classes, root, sorted(found[root]))
    per_class = [[len(found[root][name]) for name in classes] for root in roots]
    names = Strings.pack(path for root in roots for name in classes for path in found[root][name])
    targets = np.concatenate([np.repeat(np.arange(len(classes)), counts) for counts in per_class])
    kept = [held_out for held_out in chosen if held_out is not None]
    return names, targets, Labels.from_names(classes), held_out_rows(kept, [sum(counts) for counts in per_class])


def _roots(tree: Tree) -> list[str]:
    """The folders whose children are classes: `train` and its like, or the root."""
    top = tree.folders("")
    splits = [
        name for name in top if split_word(name) and any(_has_images(tree, _join(name, c)) for c in tree.folders(name))
    ]
    kinds = {split_word(name) for name in splits}
    if splits and (
        ("train" in kinds and len(kinds) > 1) or not any(_has_images(tree, n) for n in top if n not in splits)
    ):
        return sorted(splits, key=lambda name: (split_word(name) != "train", name))
    return [""]


def _has_images(tree: Tree, path: str) -> bool:
    return next(tree.images(path), None) is not None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _nothing(tree: Tree, root: str) -> str:
    loose = sum(1 for _ in tree.images(root))
    folders = tree.folders(root)
    there = f"There are {loose} images beside no class folder" if loose else "There is no image"
    there += f"; the folders are {enumerated(folders)}." if folders else ", and no folder."
    return (
        f"{_join(tree.where, root)} holds no labelled images: looked for class folders with images, as "
        f"{_join(root, 'cat')}/1.jpg, also below train/ and val/. {there} Sort the images into one folder a class, or "
        "give a table (CSV, Parquet) with a path and a label column."
    )


def _check_same(where: str, first: str, ours: Sequence[str], second: str, theirs: Sequence[str]) -> None:
    differences = [
        f"{len(names)} only in {root}/: {enumerated(names)}"
        for root, names in (
            (first, [name for name in ours if name not in set(theirs)]),
            (second, [name for name in theirs if name not in set(ours)]),
        )
        if names
    ]
    if differences:
        raise DataError(
            f"{where}: the classes of {first}/ and {second}/ differ: {'; '.join(differences)}. Rename or move the "
            "folders so that both have the same, or choose one split."
        )


class _Disk:
    def __init__(self, root: str) -> None:
        self.where = root.rstrip("/") or root

    def _entries(self, path: str) -> list[os.DirEntry[str]]:
        folder = Path(self.where, path)
        try:
            with os.scandir(folder) as entries:
                return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be listed: {error.strerror}. Check its permissions.") from error

    def folders(self, path: str) -> list[str]:
        return [entry.name for entry in self._entries(path) if entry.is_dir()]

    def images(self, path: str) -> Iterator[str]:
        for entry in self._entries(path):
            name = _join(path, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from self.images(name)
            elif is_image_name(entry.name):
                yield name


class _Zip:
    """The images of a zip file as a tree, whose root is below the one folder that holds everything, if there is one."""

    def __init__(self, path: str, members: Sequence[str]) -> None:
        self.where = path
        parts = sorted(
            tuple(name.split("/"))
            for name in members
            if is_image_name(name) and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
        )
        depth = 0
        while parts and len({p[depth] for p in parts}) == 1 and all(len(p) > depth + 2 for p in parts):
            depth += 1
        self.prefix = "".join(f"{name}/" for name in parts[0][:depth]) if parts else ""
        self._parts = [p[depth:] for p in parts]

    def _below(self, path: str) -> tuple[int, list[tuple[str, ...]]]:
        """The depth of a folder, and the images below it."""
        folder = tuple(path.split("/")) if path else ()
        start = bisect.bisect_left(self._parts, folder)
        stop = bisect.bisect_left(self._parts, True, start, key=lambda parts: parts[: len(folder)] > folder)
        return len(folder), self._parts[start:stop]

    def folders(self, path: str) -> list[str]:
        depth, below = self._below(path)
        return sorted({parts[depth] for parts in below if len(parts) > depth + 1})

    def images(self, path: str) -> Iterator[str]:
        return ("/".join(parts) for parts in self._below(path)[1])


# ── zip files ────────────────────────────────────────────────────────────────────────────────────────────────────────

_ENCRYPTED = 1  # bit of the flags
_LOCAL_HEADER_BYTES = 30


def zip_members(path: str) -> dict[str, zipfile.ZipInfo]:
    """The files in a zip file by name; of two with one name the later, as zip tools have it.

    Raises:
        DataError: it cannot be read as a zip file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return {info.filename: info for info in file.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is no readable zip file: {error}. Fetch or make it again.") from error


class Zipped(Archived):
    """Members of zip files, stored or deflated. What the directory says of size and checksum has to be true.

    Args:
        infos: N rows of the zip files' directories.
    """

    def __init__(
        self,
        targets: np.ndarray,
        labels: Labels,
        held_out: np.ndarray | None,
        *,
        infos: Sequence[zipfile.ZipInfo],
        **rest: Any,
    ) -> None:
        offsets = np.array([info.header_offset for info in infos], np.int64)
        sizes = np.array([info.file_size for info in infos], np.int64)
        super().__init__(targets, labels, held_out, offsets=offsets, sizes=sizes, **rest)
        self.packed_sizes = np.array([info.compress_size for info in infos], np.int64)
        self.methods = np.array([info.compress_type for info in infos], np.int32)
        self.encrypted = np.array([info.flag_bits & _ENCRYPTED for info in infos], bool)
        self.checksums = np.array([info.CRC for info in infos], np.uint32)

    def source(self, index: int) -> bytes:
        name, path = self.key(index), self.archives[self.which[index]].path
        offset, size, packed_size = (int(a[index]) for a in (self.offsets, self.sizes, self.packed_sizes))
        if self.encrypted[index]:
            raise ImageUnreadable(f"{name}: it is encrypted. Make the zip file without a password.")
        check_size(size, name)
        header = read_range(path, offset, _LOCAL_HEADER_BYTES, name)
        if not header.startswith(b"PK\x03\x04"):
            raise ImageCorrupt(f"{name}: no member begins at byte {offset:,} of the zip file, as its directory says.")
        # the lengths of name and extra field may differ from those in the directory
        start = (
            offset
            + _LOCAL_HEADER_BYTES
            + int.from_bytes(header[26:28], "little")
            + int.from_bytes(header[28:], "little")
        )
        data = read_range(path, start, packed_size, name)
        if self.methods[index] == zipfile.ZIP_DEFLATED:
            data = _inflate(data, size, name)
        elif self.methods[index] != zipfile.ZIP_STORED:
            raise ImageUnreadable(
                f"{name}: compressed by method {self.methods[index]}; stored (0) and deflated (8) can be read."
            )
        if len(data) != size or zlib.crc32(data) != self.checksums[index]:
            raise ImageCorrupt(
                f"{name}: {len(data):,} bytes with checksum {zlib.crc32(data):08x}; the zip file's directory says "
                f"{size:,} and {self.checksums[index]:08x}."
            )
        return data


def _inflate(data: bytes, size: int, name: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        return inflater.decompress(data, min(size, MAX_IMAGE_BYTES) + 1)  # one more than stated shows the lie
    except zlib.error as error:
        raise ImageCorrupt(f"{name}: its compressed bytes are damaged: {error}.") from error
