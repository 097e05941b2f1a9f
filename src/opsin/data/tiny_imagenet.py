"""Tiny-ImageNet (200 ImageNet classes, 64 × 64 pixels), as it was released and as zip shards.

tiny-imagenet-200/wnids.txt                         tiny-imagenet-200-train-shard0of4.zip
tiny-imagenet-200/train/WNID/images/*.JPEG              WNID/NNN.webp
tiny-imagenet-200/val/images/*.JPEG                     classes.tsv
tiny-imagenet-200/val/val_annotations.txt
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from opsin.data.folder import Zipped, open_folder, zip_members
from opsin.data.samples import Archive, Files, Strings, choose, enumerated
from opsin.errors import DataError
from opsin.labels import Labels

SHARDS = "tiny-imagenet-200-train-shard*.zip"
_MEMBER = re.compile(r"(n\d{8})/(\d+)\.webp")
_HELD_OUT_EVERY = 20


def open_shards(paths: Sequence[str], split: str | None = None) -> Zipped:
    """Some or all of the zip shards.

    Args:
        split: "val" for the images held out, whose number is a multiple of 20 (25 of each class); "train" for the rest.
    Raises:
        DataError: no zip file, or one without such images.
    """
    archives: list[Archive] = []
    names: list[str] = []
    infos: list[zipfile.ZipInfo] = []
    which: list[int] = []
    for path in sorted(paths):
        members = zip_members(path)
        ours = sorted(name for name in members if _MEMBER.fullmatch(name))
        if not ours:
            raise DataError(
                f"{path} is named as a Tiny-ImageNet shard and has no WNID/NNN.webp among its {len(members)} members. "
                "Fetch it again, or rename it."
            )
        which += [len(archives)] * len(ours)
        archives.append(Archive.at(path))
        names += ours
        infos += [members[name] for name in ours]
    wnids = [name.split("/")[0] for name in names]
    classes = sorted(set(wnids))
    index = {wnid: i for i, wnid in enumerate(classes)}
    held_out = np.array([int(Path(name).stem) % _HELD_OUT_EVERY == 0 for name in names])
    rows = np.arange(len(names))
    if split is not None:
        train, val = choose(["train", "val"], split, SHARDS)
        rows = np.flatnonzero(held_out if val is not None else ~held_out)
        assert (train is None) != (val is None)
    return Zipped(
        np.array([index[wnid] for wnid in wnids])[rows],
        Labels.from_names(classes),
        held_out if split is None else None,
        archives=archives,
        which=np.array(which)[rows],
        names=Strings.pack(names[row] for row in rows),
        infos=[infos[row] for row in rows],
    )


def is_original(folder: Path) -> bool:
    """Whether a folder has the layout of the release."""
    return (folder / "wnids.txt").is_file() and (folder / "val" / "val_annotations.txt").is_file()


def open_original(folder: Path, split: str | None = None) -> Files:
    """The layout of the release; its validation images are held out, its test images have no classes and are not read.

    Raises:
        DataError: a line of the annotations that names no image and class, or a class folder that `wnids.txt` lacks.
    """
    wnids = sorted(set(_lines(folder / "wnids.txt")))
    train, val = choose(["train", "val"], split, str(folder))
    names: list[str] = []
    targets: list[int] = []
    index = {wnid: i for i, wnid in enumerate(wnids)}
    if train is not None:
        found = open_folder(str(folder / "train"))
        classes = found.labels.wnids or found.labels.names
        if unknown := sorted(set(classes) - set(wnids)):
            raise DataError(
                f"{folder}/train has classes that wnids.txt does not list: {enumerated(unknown)}. Add them."
            )
        names += (f"train/{name}" for name in found.names)
        targets += (index[classes[target]] for target in found.targets)
    num_train = len(names)
    if val is not None:
        path = folder / "val" / "val_annotations.txt"
        for number, line in enumerate(_lines(path), 1):
            image, _, rest = line.partition("\t")
            wnid = rest.split("\t")[0]
            if not image or "/" in image or wnid not in index:
                raise DataError(
                    f"{path}, line {number}: {line[:60]!r} is not the name of an image, a tab and a WordNet id of "
                    "wnids.txt. Fetch the file again."
                )
            names.append(f"val/images/{image}")
            targets.append(index[wnid])
    held_out = np.arange(len(names)) >= num_train if split is None else None
    return Files(
        np.array(targets, np.int64), Labels.from_names(wnids), held_out, root=str(folder), names=Strings.pack(names)
    )


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it again.") from error
