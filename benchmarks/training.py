"""Training: our ViT beside transformers' in the same loop, and how fast it goes.

    python benchmarks/training.py curves DATA       # Tiny-ImageNet shards or any folder of classes; wants transformers
    python benchmarks/training.py speed             # ViT-B/16 and L/16 at 224: bf16, compiled; wants a GPU to be of use

`curves`: the same start, data, order and optimiser, three seeds; the two losses at each step. `speed`: whole steps
(forward, backward, AdamW) on random pixels, opsin's and transformers' model in turn, images/s and MFU.
"""

import importlib
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsin
from opsin import checkpoints
from opsin.data import open_samples
from opsin.data.samples import Samples
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig
from opsin.train import loop
from opsin.train.augment import augment_of
from opsin.train.config import TrainConfig
from opsin.train.loop import Training, arithmetic
from opsin.train.optim import make_optimizer
from opsin.train.plan import forward_flops, peak_flops
from opsin.train.process import Process
from opsin.train.state import StateFolder

SHAPES = {
    "B/16": ViTConfig(),
    "L/16": ViTConfig(embed_dim=1024, num_layers=24, num_heads=16, mlp_dim=4096),
}
CURVE = ViTConfig(image_size=(64, 64), patch_size=8, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=512)
CLASSES, STEPS, SEEDS = 10, 150, (0, 1, 2)
KEPT: list[Any] = []  # operators are there as long as their library is


class Theirs(nn.Module):
    """transformers' ViT with the four steps that the loop calls."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def embed(self, pixels: Tensor) -> Tensor:
        return pixels

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits

    def pool(self, logits: Tensor) -> Tensor:
        return logits

    def classify(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).logits


def theirs(model: ViT, labels: Labels) -> Theirs:
    """The same model, in transformers, by way of a folder."""
    if not KEPT:
        KEPT.append(torch.library.Library("torchvision", "FRAGMENT"))
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # built for another torch; its operators are not called
            KEPT[0].define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT[0].define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except ImportError:
            pass
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_hf(Path(folder), model, None, labels)
        return Theirs(transformers.ViTForImageClassification.from_pretrained(folder))


class Some(Samples):
    """The first classes of a set."""

    def __init__(self, samples: Samples, num_classes: int) -> None:
        self.rows, self.whole = np.flatnonzero(samples.targets < num_classes), samples
        super().__init__(samples.targets[self.rows], Labels(samples.labels.names[:num_classes]))

    def key(self, index: int) -> str:
        return self.whole.key(int(self.rows[index]))

    def source(self, index: int) -> str | bytes:
        return self.whole.source(int(self.rows[index]))

    def identity(self) -> str:
        return self.whole.identity()


def curve(model: Any, samples: Samples, seed: int, folder: Path) -> list[float]:
    config = TrainConfig(
        method="pretrain", model=CURVE, optimizer="adamw", lr=1e-3, batch_size=32, steps=STEPS, seed=seed,
        precision="fp32", min_crop_area=0.35, warmup_steps=20, log_every=1, eval_every=STEPS, workers=0,
    )  # fmt: skip
    preprocess = PreprocessConfig(size=64, crop_size=(64, 64))
    losses: list[float] = []
    Training(
        model=model, config=config, samples=samples, rows=np.arange(len(samples)), val_rows=np.arange(0),
        preprocess=preprocess, augment=augment_of(config, preprocess), steps=STEPS, image_size=(64, 64),
        process=Process(0, 1, torch.device("cpu")), states=StateFolder(folder),
        on_metrics=lambda record: losses.append(record["loss"]), on_best=lambda: None, on_bad=lambda bad: None,
    ).run()  # fmt: skip
    return losses


def curves(data: str) -> dict[str, Any]:
    samples = Some(open_samples(data), CLASSES)
    found: dict[str, list[list[float]]] = {"opsin": [], "transformers": []}
    ours_optimizer = loop.make_optimizer
    for seed in SEEDS:
        torch.manual_seed(seed)
        model = ViT(replace(CURVE, num_classes=CLASSES))
        other = theirs(model, samples.labels)
        with tempfile.TemporaryDirectory() as folder:
            found["opsin"].append(curve(model, samples, seed, Path(folder) / "ours"))
            loop.make_optimizer = _plain_adamw  # type: ignore[assignment]
            found["transformers"].append(curve(other, samples, seed, Path(folder) / "theirs"))
            loop.make_optimizer = ours_optimizer
    ours, others = (np.array(found[name]) for name in found)
    gap = np.abs(ours - others)
    print(f"{len(samples)} images of {CLASSES} classes, {STEPS} steps of 32, seeds {SEEDS}")
    print("step    opsin, mean of seeds    transformers    largest gap of a seed    deviation between seeds")
    for stop in range(25, STEPS + 1, 25):
        part = slice(stop - 25, stop)
        print(
            f"{stop:4}    {ours[:, part].mean():20.4f}    {others[:, part].mean():12.4f}    {gap[:, part].max():21.6f}"
            f"    {ours[:, part].mean(axis=1).std():23.4f}"
        )
    return {"max_gap": float(gap.max()), "final_opsin": ours[:, -25:].mean(1).tolist(),
            "final_transformers": others[:, -25:].mean(1).tolist()}  # fmt: skip


def _plain_adamw(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    optimizer.param_groups[0]["base_lr"] = config.lr
    return [optimizer]


def speed() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    peak = peak_flops(device, "bf16")
    results: dict[str, Any] = {"peak_tflops": peak / 1e12}
    for name, shape in SHAPES.items():
        batch_size, rounds = (256 if name == "B/16" else 128, 20) if on_gpu else (4, 3)
        ours = ViT(shape)
        flops = 3 * forward_flops(ours, (224, 224))
        contenders: dict[str, nn.Module] = {"opsin": ours, "transformers": theirs(ours, Labels.imagenet_1k())}
        steps = {}
        pixels = torch.randn(batch_size, 3, 224, 224, device=device)
        targets = torch.randint(1000, (batch_size,), device=device)
        config = TrainConfig(method="pretrain", model=shape, optimizer="adamw", steps=1)
        for who, model in contenders.items():
            model = model.to(device).train()
            make = make_optimizer if who == "opsin" else _plain_adamw
            (optimizer,) = make(model, config)
            forward = torch.compile(model) if on_gpu else model

            def step(forward: Any = forward, optimizer: Any = optimizer, x: Any = pixels, y: Any = targets) -> None:
                with arithmetic(device, "bf16"):
                    loss = F.cross_entropy(forward(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if on_gpu:
                    torch.cuda.synchronize()

            steps[who] = step
        seconds: dict[str, list[float]] = {who: [] for who in steps}
        for turn in range(rounds + 2):
            for who, step in steps.items():
                start = time.perf_counter()
                step()
                if turn >= 2:
                    seconds[who].append(time.perf_counter() - start)
        for who, times in seconds.items():
            rate = batch_size / statistics.median(times)
            results[f"{name} {who}"] = {"images_per_s": round(rate, 2), "mfu": round(rate * flops / peak, 3)}
            print(f"ViT-{name} {who:13} batch {batch_size}: {rate:8.1f} images/s, MFU {rate * flops / peak:.1%}")
    return results


if __name__ == "__main__":
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"opsin {opsin.__version__}, torch {torch.__version__}, {platform.machine()}, {where}")
    print(json.dumps(curves(sys.argv[2]) if sys.argv[1] == "curves" else speed()))
