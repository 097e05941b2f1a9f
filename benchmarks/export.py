"""Exported files of the embedded models beside opsin's fp32, on 500 held-out images.

python benchmarks/export.py DATA_FOLDER [MODEL …]      # the Tiny-ImageNet shards of `opsin.data.tiny_imagenet`

int8 takes its ranges from 128 training images. What is compared are whole files, resize and softmax included: the
share of images with the same best label, the largest difference of a logit, and how far the pixels are off.
"""

import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

import opsin
from opsin import export as exports
from opsin.errors import ExportError

NAMES = ("opsin/vit-tiny", "opsin/perceiver-tiny")
NUM_IMAGES, NUM_CALIBRATION = 500, 128


def images(folder: Path, number: int) -> Iterator[bytes]:
    """WebP bytes of the images whose number is `number` more than a multiple of 20; with 0 they are held out."""
    for path in sorted(folder.glob("tiny-imagenet-200-train-shard*.zip")):
        with zipfile.ZipFile(path) as shard:
            for name in shard.namelist():
                if name.endswith(".webp") and int(Path(name).stem) % 20 == number:
                    yield shard.read(name)


def evenly(items: list[bytes], count: int) -> list[bytes]:
    return [items[place * len(items) // count] for place in range(count)]


def mixed(shown: list[bytes], calibration: list[bytes]) -> list[bytes]:
    """In the order in which `export` divides them: of the first 512 one in four calibrates."""
    rest = iter(shown)
    return [one for image in calibration for one in (image, *(next(rest) for _ in range(3)))] + list(rest)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    shown = evenly(list(images(folder, 0)), NUM_IMAGES)
    calibration = evenly(list(images(folder, 1)), NUM_CALIBRATION)
    print(f"opsin {opsin.__version__}, torch {torch.__version__}, {len(shown)} images")
    print(
        f"{'model':22} {'to':9} {'dtype':5} {'MB':>6} {'best label':>11} {'logit off':>10} {'pixels off':>11}  in fp32"
    )
    for name in sys.argv[2:] or NAMES:
        classifier = opsin.load(name, dtype="fp32", device="cpu")
        for to, dtypes in exports.DTYPES.items():
            for dtype in dtypes:
                given = mixed(shown, calibration) if dtype == "int8" else shown
                with tempfile.TemporaryDirectory() as out:
                    path = Path(out, f"m{exports.SUFFIXES[to]}")
                    try:
                        done = exports.export(classifier, path, to=to, dtype=dtype, images=given)
                    except ExportError as error:
                        print(f"{name:22} {to:9} {dtype:5} refused: {error}", flush=True)
                        continue
                found = done.comparison
                assert found is not None
                print(
                    f"{name:22} {to:9} {dtype:5} {done.bytes / 1e6:6.1f} {found.agreement:11.2%} "
                    f"{found.drift_max:10.2g} {found.pixels_drift_share:11.3%}  {len(done.left_out)}",
                    flush=True,
                )
