"""JPEG file → 224 pixels: `PreprocessConfig.load`, exact and fast, against transformers' PIL processor; one thread.

python benchmarks/pixels.py [--rounds 15]

A photo of the repository, enlarged: as it is, and with grain, which makes files as large as a camera's. Both sides read
the file from disk, and end with float32 (1, 3, 224, 224). Drift is that of the bytes from `resize(decode(path))`.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import Image

from opsin.bench import import_library
from opsin.preprocess import PreprocessConfig, decode

PHOTO = Path(__file__).parent.parent / "examples" / "photos" / "coffee.png"
SIZES = {
    "12 MP": (4000, 3000, 0),
    "12 MP, grain": (4000, 3000, 8),
    "640 × 480": (640, 480, 0),
    "640 × 480, grain": (640, 480, 8),
}


def write(path: Path, width: int, height: int, grain: float) -> None:
    """A JPEG of quality 90, 4:2:0."""
    pixels = np.asarray(Image.open(PHOTO).convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    if grain:
        noise = np.random.default_rng(0).normal(0, grain, (height, width, 1))
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90, subsampling="4:2:0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    processor, config = (
        import_library("transformers").ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3),
        PreprocessConfig(),
    )
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height, grain) in SIZES.items():
            path = Path(folder) / "photo.jpg"
            write(path, width, height, grain)
            ways: dict[str, Callable[[Path], Any]] = {
                "transformers": lambda path: processor(Image.open(path), return_tensors="pt")["pixel_values"],
                "decode, resize": lambda path: config(path)[None],
                "load, exact resize": lambda path: config.normalise_batch([config.load(path, exact_resize=True)[0]]),
                "load": lambda path: config.normalise_batch([config.load(path)[0]]),
                "load, fast": lambda path: config.normalise_batch([config.load(path, decode="fast")[0]]),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(rounds + 1):
                for way, run in ways.items():
                    start = time.perf_counter()
                    run(path)
                    if turn:  # the first warms up
                        seconds[way].append(time.perf_counter() - start)
            reference = torch.from_numpy(np.array(config.resize(decode(path))))
            print(f"\n{name}, {path.stat().st_size / 1e6:.2f} MB")
            for way, run in ways.items():
                ratios = [them / us for them, us in zip(seconds["transformers"], seconds[way], strict=True)]
                low, ratio, high = np.percentile(ratios, [25, 50, 75])
                drift = ((run(path)[0].permute(1, 2, 0) + 1) * 127.5 - reference).abs()
                print(
                    f"  {way:19}{statistics.median(seconds[way]) * 1e3:8.2f} ms  {ratio:5.2f}× ({low:.2f}-{high:.2f})"
                    f"  drift {drift.mean():.3f}, at most {drift.max():.0f}"
                )


if __name__ == "__main__":
    main()
