"""Data sets of the hub, or on disk as the `datasets` library saves them, through that library.

Its cache, mirrors (HF_ENDPOINT), tokens (HF_TOKEN) and offline switch (HF_HUB_OFFLINE) are the user's own; it runs no
code of a data set. The images are not decoded by it.
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opsin.data.samples import Samples, check_size, choose, digest, encode, enumerated, held_out_rows
from opsin.data.table import CLASSES
from opsin.errors import DataError, ImageUnreadable, MissingExtra
from opsin.labels import Labels


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of the `datasets` library writes."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def open_dataset(name: str, split: str | None = None) -> "HubDataset":
    """A data set by its id, `owner/name` or `owner/name:configuration`, or a folder.

    Args:
        split: which to read; None: all to train on, and validation, else test, held out.
    Raises:
        DataError: it is not there, or has no column of images or of classes.
        MissingExtra: the `datasets` library is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "datasets") from error
    try:
        if is_saved(Path(name)):
            loaded: Any = datasets.load_from_disk(name)
        else:
            path, _, configuration = name.partition(":")
            loaded = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of datasets, huggingface_hub, fsspec, pyarrow
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise DataError(
            f'the data set "{name}" cannot be loaded: {said} Check its id (owner/name, or owner/name:configuration) '
            "and the connection; HF_ENDPOINT names a mirror, HF_TOKEN opens private ones. Or give a local path."
        ) from error
    parts = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    chosen = choose(list(parts), split, f'the data set "{name}"')
    kept = {part: rows for (part, rows), held_out in zip(parts.items(), chosen, strict=True) if held_out is not None}
    features = next(iter(kept.values())).features
    image_column, class_column = _columns(features, name)
    kept = {
        part: rows.select_columns([image_column, class_column]).cast_column(image_column, datasets.Image(decode=False))
        for part, rows in kept.items()
    }
    names = _class_names(features[class_column])
    values: Iterator[Any] = itertools.chain.from_iterable(
        rows.data.column(class_column).to_pylist() if rows._indices is None else list(rows[class_column])
        for rows in kept.values()
    )
    targets, labels = encode(values, name, names=names)
    counts = [len(rows) for rows in kept.values()]
    held_out = held_out_rows([value for value in chosen if value is not None], counts)
    return HubDataset(targets, labels, held_out, name=name, parts=kept, column=image_column)


def _columns(features: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Columns of images and of classes."""
    images = [column for column, kind in features.items() if type(kind).__name__ == "Image"]
    named = [column for column, kind in features.items() if _class_names(kind) is not None]
    classes = [column for column in CLASSES if column in features] or named
    there = [f"{column} ({type(kind).__name__})" for column, kind in features.items()]
    if not images or not classes or (len(classes) > 1 and classes == named):
        raise DataError(
            f'the data set "{name}" has no column of images or none of classes: looked for an Image, and for '
            f"{', '.join(CLASSES)} or one ClassLabel; there are {enumerated(there)}. "
            "Rename its columns and save it with save_to_disk, then give that folder."
        )
    return ("image" if "image" in images else images[0]), classes[0]


def _class_names(kind: Any) -> list[str] | None:
    while kind is not None:
        if isinstance(kind, list):
            kind = kind[0] if kind else None
        elif type(kind).__name__ == "ClassLabel":
            return None if kind.names is None else list(kind.names)
        else:
            kind = getattr(kind, "feature", None)  # of a list
    return None


class HubDataset(Samples):
    """Images that are rows of data sets of the `datasets` library, which maps their files into memory.

    Args:
        parts: split → rows, in order.
        column: of images, not decoded.
    """

    def __init__(
        self,
        targets: np.ndarray,
        labels: Labels,
        held_out: np.ndarray | None,
        *,
        name: str,
        parts: Mapping[str, Any],
        column: str,
    ) -> None:
        super().__init__(targets, labels, held_out)
        self.name, self.column = name, column
        self.splits, self.parts = tuple(parts), tuple(parts.values())
        self.ends = list(itertools.accumulate(len(rows) for rows in self.parts))

    def _place(self, index: int) -> tuple[int, int]:
        """Split, and row in it."""
        part = bisect.bisect_right(self.ends, index)
        return part, index - (self.ends[part] - len(self.parts[part]))

    def key(self, index: int) -> str:
        part, row = self._place(index)
        return f"{self.name}::{self.splits[part]}/{row}"

    def source(self, index: int) -> str | bytes:
        part, row = self._place(index)
        name = self.key(index)
        cell = self.parts[part][row][self.column] or {}
        if (data := cell.get("bytes")) is not None:
            check_size(len(data), name)
            return data
        path = cell.get("path")
        if not isinstance(path, str) or "://" in path:
            raise ImageUnreadable(f"{name}: the cell holds no bytes{f', and the address {path}' if path else ''}.")
        return path

    def identity(self) -> str:
        files = [
            (Path(file["filename"]).name, found.st_size, found.st_mtime_ns)
            for rows in self.parts
            for file in rows.cache_files
            for found in [Path(file["filename"]).stat()]
        ]
        return digest([self.name, self.splits, self.ends, files or [rows._fingerprint for rows in self.parts]])
