"""The training loop: one frozen config in, a folder with metrics.jsonl and a checkpoint out; resumes to the bit."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from opsin.data.tiny_imagenet import TinyImageNet
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.position import sincos_2d
from opsin.models.vit import ViT, ViTConfig
from opsin.train.augment import drop_tokens, random_resized_crop
from opsin.train.optim import muon_and_adamw, warmup_cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of steps at one image size; `keep_tokens` of its patches reach the layers, the rest is dropped."""

    steps: int
    image_size: int
    keep_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What a recipe returns. Short sequences first: most of the training at a fraction of the cost."""

    model: ViTConfig | ImagePerceiverConfig
    phases: tuple[Phase, ...]
    batch_size: int = 256
    muon_lr: float = 3e-3
    adamw_lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 200
    clip_norm: float = 1.0
    min_crop_area: float = 0.35
    label_smoothing: float = 0.1
    ema_decay: float = 0.995
    seed: int = 0
    save_every: int = 500  # steps; also how often the held-out accuracy is measured

    def __post_init__(self) -> None:
        if not isinstance(self.model, ViTConfig):
            return
        if self.model.num_prefix:
            raise ValueError("token dropping would drop the class token: train a model with class_token=False.")
        if self.model.dropout_rate or self.model.drop_path_rate:
            raise ValueError("dropout draws from a random state that a resumed run does not have. Set it to 0.")

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> Phase:
        """The phase that `step` (counted from 0) belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise ValueError(f"step is {step} past the end of the {self.steps} planned.")


def normalise(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [-1, 1], the ViT release's range."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def batches(data: TinyImageNet, config: TrainConfig, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Training batches from `step` on: every epoch its own shuffle, a function of seed and epoch alone."""
    rows = np.flatnonzero(~data.held_out)
    per_epoch = len(rows) // config.batch_size
    while True:
        epoch, offset = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(rows)
        picked = np.sort(order[offset * config.batch_size : (offset + 1) * config.batch_size])
        yield data.images[picked], data.labels[picked]
        step += 1


@torch.inference_mode()
def accuracy(model: nn.Module, data: TinyImageNet, *, batch_size: int = 250) -> tuple[float, float]:
    """Top-1 and top-5 on the held-out images, fp32."""
    rows, hits1, hits5 = np.flatnonzero(data.held_out), 0, 0
    model.eval()
    for start in range(0, len(rows), batch_size):
        picked = rows[start : start + batch_size]
        logits = model(normalise(data.images[picked]))
        top5 = logits.topk(min(5, logits.shape[1])).indices
        hits = top5 == torch.from_numpy(data.labels[picked])[:, None]
        hits1, hits5 = hits1 + int(hits[:, 0].sum()), hits5 + int(hits.any(dim=1).sum())
    return hits1 / len(rows), hits5 / len(rows)


def build(config: ViTConfig | ImagePerceiverConfig) -> ViT | ImagePerceiver:
    """A model with its random start."""
    if isinstance(config, ImagePerceiverConfig):
        return ImagePerceiver(config)
    model = ViT(config)
    with torch.no_grad():  # a learned table that starts from sine-cosine positions saves the first epochs
        model.pos_embed.copy_(sincos_2d(config.grid, config.embed_dim) * 0.1)
    return model


def train(config: TrainConfig, data: TinyImageNet, out: Path) -> ViT | ImagePerceiver:
    """Train on the CPU from scratch, or go on from `out/checkpoint.pt` if it is there; returns the EMA model.

    The random numbers of a step (order, crops, dropped tokens) depend on seed and step only, so a run that was
    killed and resumed gives the same weights as one that was not.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = build(config.model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizers = muon_and_adamw(
        model, muon_lr=config.muon_lr, adamw_lr=config.adamw_lr, weight_decay=config.weight_decay
    )
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    step, checkpoint = 0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)

    def save() -> None:
        state = {
            "step": step,
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    start, first = time.monotonic(), step
    with (out / "metrics.jsonl").open("a") as metrics:
        for images, labels in batches(data, config, step):
            if step == config.steps:
                break
            phase = config.phase(step)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            factor = warmup_cosine(step, steps=config.steps, warmup_steps=config.warmup_steps)
            for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = lr * factor

            model.train()
            pixels = random_resized_crop(
                normalise(images), phase.image_size, min_area=config.min_crop_area, generator=generator
            )
            # torch's fused attention has a slow backward on CPUs, half of the whole step at 64 tokens; the plain one
            # goes through fp32 unless told otherwise
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                tokens = drop_tokens(model.embed(pixels), phase.keep_tokens, generator=generator)
                logits = model.classify(model.pool(model.encode(tokens)))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(labels), label_smoothing=config.label_smoothing)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.update_parameters(model)
            step += 1

            saving = step % config.save_every == 0 or step == config.steps
            if saving or step % 20 == 0:
                rate = (step - first) / (time.monotonic() - start)
                record = {
                    "step": step,
                    "loss": round(loss.item(), 4),
                    "grad_norm": round(float(grad_norm), 3),
                    "images_per_s": round(rate * config.batch_size, 1),
                }
                if saving:
                    top1, top5 = accuracy(average.module, data)
                    record |= {"top1": round(top1, 4), "top5": round(top5, 4)}
                print(json.dumps(record), file=metrics, flush=True)
                eta = (config.steps - step) / rate / 60
                print(f"{record}  ETA {eta:.0f} min", file=sys.stderr, flush=True)
            if saving:
                save()
    trained = average.module.eval()
    assert isinstance(trained, ViT | ImagePerceiver)
    return trained
