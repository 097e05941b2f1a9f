"""ViT-B/16, ViT-L/16 and Perceiver conv beside every library, batches of 8, the model alone; the embedded models too.

python benchmarks/models.py OUT [DATA]      # wants opsin[bench]

Into OUT go a JSON file and a picture for each model. The large ones have random weights: their speed counts, not their
agreement. DATA is a folder with the Tiny-ImageNet shards of `opsin.data.tiny_imagenet`: on the held-out images, which
no training saw, the agreement of the embedded models is measured, and int8 is calibrated; without it on noise.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from embedded import NAMES, held_out
from torch import nn

from opsin import checkpoints, plots
from opsin.bench import VERSUS, bench
from opsin.cli.bench import heading, show_report
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

MODELS: dict[str, tuple[type[nn.Module], Any]] = {
    "ViT-B-16": (ViT, ViTConfig()),
    "ViT-L-16": (ViT, ViTConfig(embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096)),
    "Perceiver-conv": (ImagePerceiver, ImagePerceiverConfig(numerics="transformers")),  # or theirs is another model
}
SOME = 32  # images for a model of random weights: 8 calibrate


ROUNDS = 7


def write_random(folder: Path, kind: type[nn.Module], config: Any) -> None:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # a head begins at zero, and so would all logits be
                parameter.normal_(std=0.02)
    checkpoints.write(folder, model, PreprocessConfig(), Labels.numbered(config.num_classes))


def measure(name: str, model: str | Path, out: Path, images: list[Any]) -> None:
    report = bench(model, versus=VERSUS, rounds=ROUNDS, images=images, max_images=len(images)).as_dict() | {
        "model": name
    }
    show_report(report)
    for row in report["skipped"]:
        print(f"{row['name']} {row['precision']} was left out: {row['reason']}")
    print(*report["notes"], sep="\n", flush=True)
    file = out / name.replace("/", "-")
    file.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    plots.bars(file.with_suffix(".png"), report["contenders"], title=heading(report), baseline=report["baseline"])


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    noise = list(np.random.default_rng(0).integers(0, 256, (SOME, 224, 224, 3), dtype=np.uint8))
    images: list[Any] = [image for _, image in held_out(Path(sys.argv[2]))] if len(sys.argv) > 2 else noise
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, config) in MODELS.items():
            write_random(Path(folder, name), kind, config)
            measure(name, Path(folder, name), out, images[:: len(images) // SOME])
    for name in NAMES:
        measure(name, name, out, images)
