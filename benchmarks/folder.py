"""Folder of 640 × 480 JPEGs → labels: `Classifier.stream` against `transformers.pipeline("image-classification")`.

python benchmarks/folder.py [--images 96] [--rounds 5]     # wants opsin[bench]

The same files and the same random weights, written by transformers: ViT-B/16, and a ViT of the size of the embedded
one (64 pixels, patches of 8, 7 layers of width 256), which transformers cannot run, since it has no class token.
transformers runs as its users run it, in fp32, with the batch size that is best for it; opsin exact, with `auto`
(bf16), and in int8. Whole runs in turn, medians; files are in the system's cache.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import opsin
from opsin import engine
from opsin.bench import import_library
from opsin.device import has_int8

PHOTOS = sorted(
    path for path in (Path(__file__).parent.parent / "examples" / "photos").iterdir() if path.suffix != ".md"
)
SHAPES: dict[str, dict[str, int]] = {
    "ViT-B/16": {},
    "as opsin/vit-tiny": {
        "image_size": 64, "patch_size": 8, "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
}  # fmt: skip


def write_photos(folder: Path, count: int) -> list[str]:
    """Parts of the repository's photos, enlarged to 640 × 480, with a little grain."""
    generator = np.random.default_rng(0)
    paths = []
    for i in range(count):
        with Image.open(PHOTOS[i % len(PHOTOS)]) as photo:
            width, height = photo.size
            left, top = generator.integers(0, width // 4), generator.integers(0, height // 4)
            image = photo.convert("RGB").resize((640, 480), Image.Resampling.BICUBIC, (left, top, width, height))
        pixels = np.asarray(image) + generator.normal(0, 4, (480, 640, 1))
        paths.append(str(folder / f"{i:04}.jpg"))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def contenders(folder: Path, shape: dict[str, int], paths: list[str]) -> dict[str, Callable[[], list[str]]]:
    transformers: Any = import_library("transformers")
    config = transformers.ViTConfig(num_labels=1000, **shape)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    side = {"height": config.image_size, "width": config.image_size}
    transformers.ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    pipe = transformers.pipeline("image-classification", model=str(folder))

    def theirs(batch_size: int) -> Callable[[], list[str]]:
        return lambda: [answer[0]["label"] for answer in pipe(paths, batch_size=batch_size)]

    def ours(**options: Any) -> Callable[[], list[str]]:
        classifier = opsin.load(folder, **options)
        return lambda: [record["label"] for record in classifier.stream(paths)]

    found: dict[str, Callable[[], list[str]]] = {f"transformers, batch {size}": theirs(size) for size in (1, 8, 32)}
    found |= {"opsin fp32": ours(dtype="fp32"), "opsin auto": ours(), "opsin auto, decode fast": ours(decode="fast")}
    if has_int8():
        classifier = opsin.load(folder, dtype="fp32")
        pixels = torch.stack([classifier.preprocess(path) for path in paths[:32]])
        classifier.use("int8", ranges=engine.calibrate(classifier.model, pixels.split(8)))
        found["opsin int8"] = lambda: [record["label"] for record in classifier.stream(paths)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.images} images"
    )
    with tempfile.TemporaryDirectory() as name:
        paths = write_photos(Path(name), arguments.images)
        for shape, settings in SHAPES.items():
            runs = contenders(Path(name, shape.replace("/", "-")), settings, paths)
            labels = {contender: run() for contender, run in runs.items()}
            seconds: dict[str, list[float]] = {contender: [] for contender in runs}
            for _ in range(arguments.rounds):
                for contender, run in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds[contender].append(time.perf_counter() - start)
            medians = {contender: statistics.median(times) for contender, times in seconds.items()}
            best = min((c for c in runs if c.startswith("transformers")), key=lambda c: medians[c])
            for contender, median in medians.items():
                same = sum(a == b for a, b in zip(labels[contender], labels[best], strict=True))
                row = {
                    "model": shape,
                    "contender": contender,
                    "images_per_s": round(len(paths) / median, 1),
                    "ratio": round(statistics.median(np.divide(seconds[best], seconds[contender])), 2),
                    "same_label_as_transformers": f"{same}/{len(paths)}",
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
