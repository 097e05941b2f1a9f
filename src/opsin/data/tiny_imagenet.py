"""Tiny-ImageNet (200 ImageNet classes, 64 × 64 pixels) from zip shards of `WNID/NNN.webp` and a `classes.tsv`."""

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyImageNet:
    """The decoded set, in memory (1.2 GB): images (N, 64, 64, 3) uint8, labels (N,) int64, and the class ids."""

    images: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray  # (N,) bool: image number % 20 == 0, 25 per class; for selection and reports, never trained on
    wnids: tuple[str, ...]  # WordNet id of each class, ascending


def _decode_shard(path: Path) -> tuple[list[np.ndarray], list[str]]:
    with zipfile.ZipFile(path) as shard:
        names = sorted(name for name in shard.namelist() if name.endswith(".webp"))
        return [np.asarray(Image.open(io.BytesIO(shard.read(name))).convert("RGB")) for name in names], names


def read_shards(folder: Path) -> TinyImageNet:
    """Decode every `tiny-imagenet-200-train-shard*.zip` in `folder`.

    Raises:
        FileNotFoundError: the folder holds no shard.
    """
    paths = sorted(folder.glob("tiny-imagenet-200-train-shard*.zip"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no tiny-imagenet-200-train-shard*.zip. Pass the folder that does.")
    with zipfile.ZipFile(paths[0]) as shard:
        lines = shard.read("classes.tsv").decode().splitlines()
    wnids = tuple(sorted(line.split("\t")[0] for line in lines))
    index = {wnid: i for i, wnid in enumerate(wnids)}
    with ThreadPoolExecutor() as pool:
        shards = list(pool.map(_decode_shard, paths))
    names = [name for _, shard_names in shards for name in shard_names]
    return TinyImageNet(
        images=np.stack([image for images, _ in shards for image in images]),
        labels=np.array([index[name.split("/")[0]] for name in names]),
        held_out=np.array([int(Path(name).stem) % 20 == 0 for name in names]),
        wnids=wnids,
    )
