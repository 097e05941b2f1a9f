"""Tiny-ImageNet as released and as zip shards."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from opsin.data import open_samples
from opsin.errors import DataError
from opsin.labels import Labels
from opsin.preprocess import decode

WNIDS = ("n01443537", "n01629819", "n04560804")


def test_shards(tmp_path: Path, picture: Callable[[int], bytes]) -> None:
    numbers = [0, 1, 20, 41]
    for shard in range(2):
        with zipfile.ZipFile(tmp_path / f"tiny-imagenet-200-train-shard{shard}of2.zip", "w") as file:
            file.writestr("classes.tsv", "".join(f"{wnid}\tx\n" for wnid in WNIDS))
            for k, wnid in enumerate(reversed(WNIDS)):
                for number in numbers[shard::2]:
                    file.writestr(f"{wnid}/{number:03}.webp", picture(k * 50 + number))
    found = open_samples(str(tmp_path))
    assert found.labels.wnids == WNIDS
    assert found.targets.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert found.held_out is not None and found.held_out.tolist() == [True, True] * 3 + [False, False] * 3
    assert found.source(1) == picture(2 * 50 + 20)
    val = open_samples(str(tmp_path), split="val")
    assert (len(val), val.held_out, val.key(0)) == (6, None, found.key(0))
    train = open_samples([str(path) for path in tmp_path.glob("*.zip")], split="train")
    assert [train.source(i) for i in range(6)] == [found.source(i) for i in range(6, 12)]
    (tmp_path / "tiny-imagenet-200-train-shard1of2.zip").write_bytes(
        (tmp_path / "tiny-imagenet-200-train-shard1of2.zip").read_bytes().replace(b".webp", b".jpeg")
    )
    with pytest.raises(DataError, match=r"shard1of2\.zip is named as a Tiny-ImageNet shard and has no WNID/NNN\.webp"):
        open_samples(str(tmp_path))


def test_as_released(tmp_path: Path, fill: Callable[..., None]) -> None:
    fill(tmp_path, *(f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in WNIDS[:2] for i in range(2)))
    fill(tmp_path, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    (tmp_path / "train" / WNIDS[0] / f"{WNIDS[0]}_boxes.txt").touch()
    (tmp_path / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn04560804\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n")
    found = open_samples(str(tmp_path))
    assert found.labels.wnids == WNIDS  # ascending, not in the order of the file
    assert found.targets.tolist() == [0, 0, 1, 1, 2, 0]
    assert found.held_out is not None and found.held_out.tolist() == [False] * 4 + [True] * 2
    assert found.source(4) == f"{tmp_path}/val/images/val_0.JPEG"
    assert open_samples(str(tmp_path), split="train").targets.tolist() == [0, 0, 1, 1]
    assert open_samples(str(tmp_path), split="val").targets.tolist() == [2, 0]
    annotations.write_text("val_0.JPEG\tn04560804\n../../secret.JPEG\tn01443537\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 2: '\.\./\.\./secret"):
        open_samples(str(tmp_path))
    (tmp_path / "wnids.txt").write_text(WNIDS[0])
    with pytest.raises(DataError, match=r"wnids\.txt does not list: n01629819"):
        open_samples(str(tmp_path), split="train")


@pytest.mark.shared
def test_the_shared_shards(shared: Path) -> None:
    found = open_samples(str(shared))
    assert len(found) == 100_000
    assert found.labels == Labels.tiny_imagenet()
    assert found.held_out is not None
    assert np.bincount(found.targets[found.held_out]).tolist() == [25] * 200
    assert np.bincount(found.targets).tolist() == [500] * 200
    assert decode(found.source(99_999)).size == (64, 64)
    assert len({found.key(i) for i in range(0, 100_000, 7)}) == 14_286
