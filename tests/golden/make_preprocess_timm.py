"""Writes preprocess_timm.json: what timm itself makes of pictures of noise. Run with timm and torchvision installed:

    python tests/golden/make_preprocess_timm.py

timm's transforms need torchvision, which the tests do without.
"""

import hashlib
import json
import random
from importlib.metadata import version
from pathlib import Path

from PIL import Image
from timm.data import create_transform, resolve_data_config

CONFIGS = [
    {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3},
    {"input_size": [3, 29, 29], "crop_pct": 0.875, "interpolation": "bilinear"},
    {"input_size": [3, 24, 24], "crop_pct": 1.0},
    {"input_size": [3, 23, 32], "crop_pct": 0.9, "crop_mode": "squash", "interpolation": "lanczos"},
    {"input_size": [3, 24, 40], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "nearest"},
]
SIZES = [(1, 50), (61, 37), (37, 61), (32, 32), (53, 59), (97, 35), (30, 30), (200, 101)]  # height, width


def noise(height: int, width: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(f"{height}x{width}").randbytes(height * width * 3))


if __name__ == "__main__":
    cases = []
    for config in CONFIGS:
        transform = create_transform(**resolve_data_config(pretrained_cfg=config))
        digests = {}
        for height, width in SIZES:
            pixels = transform(noise(height, width)).contiguous().numpy()
            digests[f"{height}x{width}"] = hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
        cases.append({"config": json.dumps(config), "sha256": digests})
    versions = {name: version(name) for name in ("timm", "torchvision", "pillow")}
    path = Path(__file__).with_name("preprocess_timm.json")
    path.write_text(json.dumps({"versions": versions, "cases": cases}, indent=1) + "\n")
