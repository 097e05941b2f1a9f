"""The embedded models on the 5,000 held-out images: accuracy, parameters, images/s; the Perceiver at other sizes, and
under the other release's arithmetic.

python benchmarks/embedded.py DATA_FOLDER      # the Tiny-ImageNet shards of `opsin.data.tiny_imagenet`

Accuracy goes through the public path: file bytes → load() → stream(). Speed is that of the model alone, on batches of
32, the two models in turn.
"""

import dataclasses
import platform
import statistics
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

import opsin
from opsin.models.perceiver_io import ImagePerceiver

NAMES = ("opsin/vit-tiny", "opsin/perceiver-tiny")
SIZES = (32, 48, 56, 64, 80, 96, 128)


def held_out(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(WordNet id, WebP bytes) of every image whose number is a multiple of 20: the 5,000 that are never trained on."""
    for path in sorted(folder.glob("tiny-imagenet-200-train-shard*.zip")):
        with zipfile.ZipFile(path) as shard:
            for name in shard.namelist():
                if name.endswith(".webp") and int(Path(name).stem) % 20 == 0:
                    yield name.split("/")[0], shard.read(name)


def accuracy(classifier: opsin.Classifier, wnids: tuple[str, ...], images: tuple[bytes, ...]) -> tuple[float, float]:
    """Top-1 and top-5, per cent."""
    assert classifier.labels is not None and classifier.labels.wnids is not None
    top1 = top5 = 0
    for wnid, record in zip(wnids, classifier.stream(images), strict=True):
        best = [classifier.labels.wnids[row["index"]] for row in record["topk"]]
        top1, top5 = top1 + (best[0] == wnid), top5 + (wnid in best)
    return 100 * top1 / len(wnids), 100 * top5 / len(wnids)


def at_size(classifier: opsin.Classifier, image_size: int) -> opsin.Classifier:
    """The same model on images of another size."""
    classifier.preprocess = dataclasses.replace(
        classifier.preprocess, size=image_size, crop_size=(image_size, image_size)
    )
    return classifier


def gap(images: tuple[bytes, ...]) -> str:
    """The same weights in DeepMind's arithmetic, which they were trained in, and in transformers'."""
    classifier = opsin.load("opsin/perceiver-tiny", dtype="fp32")
    model = classifier.model
    assert isinstance(model, ImagePerceiver)
    other = ImagePerceiver(dataclasses.replace(model.config, numerics="transformers")).eval()
    other.load_state_dict(model.state_dict())
    pixels = torch.stack([classifier.preprocess(image) for image in images[::10]])
    with torch.inference_mode():
        right, wrong = model(pixels), other(pixels)
    agree = 100 * (right.argmax(1) == wrong.argmax(1)).float().mean()
    distance = (right - wrong).abs()
    return (
        f"logits differ by {distance.mean():.3f} on average, {distance.max():.2f} at most (their deviation is "
        f"{right.std():.2f}); the best label is the same for {agree:.1f} % of {len(pixels)} images"
    )


if __name__ == "__main__":
    wnids, images = zip(*held_out(Path(sys.argv[1])), strict=True)
    cores = f"{torch.get_num_threads()} threads"
    print(f"opsin {opsin.__version__}, torch {torch.__version__}, {platform.machine()}, {cores}, {len(wnids)} images")

    models = {name: opsin.load(name) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    batch = list(images[:32])
    pixels = {name: torch.stack([c.preprocess(image) for image in batch]) for name, c in models.items()}
    with torch.inference_mode():
        for _ in range(25):
            for name, classifier in models.items():
                start = time.perf_counter()
                classifier._net(pixels[name])
                seconds[name].append(time.perf_counter() - start)
    for name, classifier in models.items():
        params = sum(parameter.numel() for parameter in classifier.model.parameters())
        top1, top5 = accuracy(opsin.load(name, dtype="fp32"), wnids, images)
        rate = len(batch) / statistics.median(seconds[name])
        print(f"{name}: {params / 1e6:.2f}M parameters, top-1 {top1:.2f} %, top-5 {top5:.2f} %, {rate:.0f} images/s")

    print("opsin/perceiver-tiny by image size")
    for image_size in SIZES:
        top1, top5 = accuracy(at_size(opsin.load("opsin/perceiver-tiny", dtype="fp32"), image_size), wnids, images)
        print(f"{image_size:4} px: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    print(f"opsin/perceiver-tiny in transformers' arithmetic: {gap(images)}")
