"""Samples in: one file per layout, and `open_samples`, which tells them apart."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsin.errors import DataError

if TYPE_CHECKING:
    from opsin.data.samples import Samples

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


def open_samples(data: str | Sequence[str], *, split: str | None = None) -> "Samples":
    """A labelled set of images, whatever it is stored in; what that is is found by looking.

        photos/                             class folders, also below train/ and val/, or with metadata.csv
        photos.zip                          the same in a zip file
        table.csv .tsv .jsonl .parquet      paths and classes
        train-00000-of-00004.parquet        image bytes and classes; or a folder of them
        shards/{0000..0063}.tar             WebDataset, here or at a URL (s3://, hf://, https://); patterns; a folder
        ilsvrc/                             ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and the devkit
        tiny-imagenet-200/                  as released, or its zip shards
        owner/name                          a data set of the hub; or a folder that `datasets` saved

    Args:
        data: one of these; or several tables, Parquet files or shards of one kind.
        split: "train", "val", "test" or another name that the set has: that part alone. None: what there is to train
            on, and the validation part, else the test part, `held_out`.
    Raises:
        DataError: nothing labelled was found there; the message says what was looked for.
        MissingExtra: pyarrow or datasets is needed and not installed.
    """
    paths = [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(path) for path in data]
    if not paths:
        raise DataError("no data is given. Give a folder, a table, shards or the id of a data set.")
    paths = [match for path in paths for match in _expanded(path)]
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return _open_folder(paths[0], split)
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1 or (len(paths) > 1 and not kinds <= {"table", "parquet", "tar", "tiny"}):
        raise DataError(
            f"{len(paths)} paths are given, of the kinds {', '.join(sorted(kinds))}: {', '.join(paths[:5])}. Several "
            "can be read together if all are tables, Parquet files with images, or tar shards."
        )
    kind = kinds.pop()
    if kind == "zip":
        from opsin.data.folder import open_zip

        return open_zip(paths[0], split)
    if kind == "tiny":
        from opsin.data.tiny_imagenet import open_shards as open_tiny_shards

        return open_tiny_shards(paths, split)
    if kind == "table":
        from opsin.data.table import open_table

        return open_table(paths, split)
    if kind == "parquet":
        from opsin.data.table import open_parquet

        return open_parquet(paths, split)
    if kind == "tar":
        from opsin.data.tar import open_shards

        return open_shards(paths, split)
    from opsin.data.hub import open_dataset

    return open_dataset(paths[0], split)


def _open_folder(path: str, split: str | None) -> "Samples":
    from opsin.data import hub, table, tar, tiny_imagenet
    from opsin.data.folder import open_folder
    from opsin.data.samples import find_files

    folder = Path(path)
    if shards := sorted(map(str, folder.glob(tiny_imagenet.SHARDS))):
        return tiny_imagenet.open_shards(shards, split)
    if tar.is_ilsvrc(folder):
        return tar.open_ilsvrc(folder, split)
    if tiny_imagenet.is_original(folder):
        return tiny_imagenet.open_original(folder, split)
    if tables := table.metadata_tables(folder):
        return table.open_table(tables, split)
    if shards := find_files(folder, "*.tar"):
        return tar.open_shards(shards, split)
    if hub.is_saved(folder):
        return hub.open_dataset(path, split)
    if files := table.parquet_files(folder):
        return table.open_parquet(files, split)
    try:
        return open_folder(path, split)
    except DataError as error:
        tables = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in table.SUFFIXES)
        if not tables or "holds no labelled images" not in str(error):
            raise
        raise DataError(
            f"{error} It holds {', '.join(tables[:5])}: if that names the images, give its path."
        ) from error


def _expanded(path: str) -> list[str]:
    """The files that a pattern or a range on this machine stands for; anything else is itself."""
    if "://" in path or not set(path) & set("*?[{") or os.path.lexists(path):
        return [path]
    from opsin.data.tar import expand

    return expand(path)


def _kind(path: str) -> str:
    """Which reader a path, pattern or id that is no folder belongs to."""
    lower = path.lower()
    if lower.endswith(".tar") or ("://" in path and ".tar" in lower.partition("?")[0]):
        return "tar"
    if re.search(r"\.(tar\.\w+|tgz)$", lower):
        raise DataError(f"{path} is a compressed tar file, which cannot be read at random. Unpack it to a plain .tar.")
    if "://" in path:
        raise DataError(
            f"{path} is not the address of a .tar shard, the only kind that is read from a server. Fetch it."
        )
    if Path(path).is_dir():
        raise DataError(f"{path} is a folder, and a folder is given alone. Put what belongs together into one.")
    if Path(path).is_file():
        if lower.endswith(".zip"):
            return "tiny" if re.fullmatch(r"tiny-imagenet-200-train-shard.*\.zip", Path(path).name) else "zip"
        if lower.endswith(".parquet"):
            from opsin.data.table import has_image_bytes

            return "parquet" if has_image_bytes(path) else "table"
        if lower.endswith((".csv", ".tsv", ".jsonl")):
            return "table"
        raise DataError(
            f"{path} is no labelled set. Right is a folder of class folders, or a .zip, .csv, .tsv, .jsonl, .parquet "
            "or .tar file."
        )
    if _HUB_ID.fullmatch(path) and not lower.endswith((".zip", ".csv", ".parquet")):
        return "dataset"
    raise DataError(
        f"there is no {path}. Give a folder, a table (.csv, .tsv, .jsonl, .parquet), a .zip, .tar shards, or the id of "
        "a data set on the hub, owner/name."
    )
