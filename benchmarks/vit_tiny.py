"""Held-out accuracy of the embedded model, through the public path: file bytes → load() → stream().

python benchmarks/vit_tiny.py DATA_FOLDER      # the Tiny-ImageNet shards of `opsin.data.tiny_imagenet`
"""

import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import opsin


def held_out(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(WordNet id, WebP bytes) of every image whose number is a multiple of 20: the 5,000 that are never trained on."""
    for path in sorted(folder.glob("tiny-imagenet-200-train-shard*.zip")):
        with zipfile.ZipFile(path) as shard:
            for name in shard.namelist():
                if name.endswith(".webp") and int(Path(name).stem) % 20 == 0:
                    yield name.split("/")[0], shard.read(name)


if __name__ == "__main__":
    classifier = opsin.load(dtype="fp32")
    wnids, images = zip(*held_out(Path(sys.argv[1])), strict=True)
    start = time.perf_counter()
    top1 = top5 = 0
    for wnid, record in zip(wnids, classifier.stream(images), strict=True):
        best = [classifier.labels.wnids[row["index"]] for row in record["topk"]]
        top1, top5 = top1 + (best[0] == wnid), top5 + (wnid in best)
    rate = len(wnids) / (time.perf_counter() - start)
    print(f"{classifier!r}\nopsin {opsin.__version__}, {len(wnids)} held-out images, {rate:.0f} images/s")
    print(f"top-1 {top1 / len(wnids):.2%}  top-5 {top5 / len(wnids):.2%}")
