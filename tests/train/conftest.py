"""A small labelled set, in memory and as folders, and a run on it that takes a second."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.data.samples import Samples, split
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig
from opsin.train.augment import augment_of
from opsin.train.config import TrainConfig
from opsin.train.loop import Training
from opsin.train.process import Process
from opsin.train.state import StateFolder

NAMES = ("amber", "blue", "coral")
SHAPE = ViTConfig(
    image_size=(16, 16), patch_size=4, embed_dim=24, num_layers=2, num_heads=2, mlp_dim=40, num_classes=3,
    class_token=False, pool="mean",
)  # fmt: skip
CONFIG = TrainConfig(
    method="pretrain", model=SHAPE, optimizer="adamw", lr=3e-3, batch_size=6, steps=12, precision="fp32",
    min_crop_area=0.5, log_every=1, eval_every=5, save_every=4, workers=0, warmup_steps=2,
)  # fmt: skip


def pictures(num: int, side: int = 16, seed: int = 0) -> tuple[list[bytes], np.ndarray]:
    """PNG files of noisy single colours, and the class of each."""
    rng = np.random.default_rng(seed)
    targets = np.arange(num) % 3
    colours = np.eye(3)[targets][:, None, None, :] * 200 + rng.integers(0, 50, (num, side, side, 3))
    files = []
    for pixels in colours.astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files, targets


class InMemory(Samples):
    """Files in a list."""

    def __init__(self, files: list[bytes], targets: np.ndarray, labels: Labels) -> None:
        super().__init__(targets, labels)
        self.files = files

    def key(self, index: int) -> str:
        return f"image-{index:03}.png"

    def source(self, index: int) -> bytes:
        return self.files[index]

    def identity(self) -> str:
        return str(len(self.files))


@pytest.fixture
def samples() -> InMemory:
    return InMemory(*pictures(60), Labels(NAMES))


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """photos/amber/000.png, …: twenty of each class."""
    files, targets = pictures(60)
    for number, (data, target) in enumerate(zip(files, targets, strict=True)):
        path = tmp_path / "photos" / NAMES[target] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "photos"


@pytest.fixture
def training(samples: InMemory, tmp_path: Path) -> Callable[..., Training]:
    """`training(name, lr=…)`: CONFIG with changes, ready to run, on `network` if given; metrics are in `.records`."""

    def make(name: str = "run", *, data: Samples = samples, network: Any = None, **changes: Any) -> Training:
        config = replace(CONFIG, **changes)
        torch.manual_seed(config.seed)
        preprocess = PreprocessConfig(size=(16, 16))
        rows, val_rows = split(data, 0.2)
        made = Training(
            model=network or ViT(config.model),  # type: ignore[arg-type]
            config=config,
            samples=data,
            rows=rows,
            val_rows=val_rows,
            preprocess=preprocess,
            augment=augment_of(config, preprocess),
            steps=config.steps or 0,
            image_size=(16, 16),
            process=Process(0, 1, torch.device("cpu")),
            states=StateFolder(tmp_path / name),
            on_metrics=lambda record: records.append(record),
            on_best=lambda: None,
            on_bad=lambda bad: bads.__setitem__(slice(None), bad),
        )
        records: list[dict] = []
        bads: list = []
        made.records, made.bads = records, bads  # type: ignore[attr-defined]
        made.restore()
        return made

    return make
