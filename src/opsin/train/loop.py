"""The training loop, in plain PyTorch.

    draws ── read, augment ──▶ pixels ── student ──▶ logits ── loss ──▶ gradients ── clip, step ──▶ weights, EMA
             (loader.py)                                                                            (state.py)

A step's random numbers are functions of the seed and the step, so a run that was killed and resumed gives the same
weights, to the bit on a CPU, as one that was not.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from opsin.data.samples import Samples
from opsin.errors import TrainError
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.models.vt import VT
from opsin.preprocess import PreprocessConfig
from opsin.train.augment import Augment, drop_tokens, erase, mix, soft_targets
from opsin.train.config import TrainConfig
from opsin.train.loader import Bad, Batch, EvalSet, Normalise, Plan, TrainSet, eval_batches, loader
from opsin.train.optim import EMA, lr_factor, make_optimizer, set_lr
from opsin.train.process import Process, synchronising
from opsin.train.state import StateFolder, restore, restore_optimizer
from opsin.train.teacher import Teacher

Model = ViT | VT | ImagePerceiver
NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Progress:
    """What a run knows of itself beside its weights; part of its state."""

    step: int = 0
    best_score: float = -math.inf  # top-1; of several labels an image, minus the loss
    bad: dict[str, Bad] = field(default_factory=dict)  # by key: an image is bad once, however often it is drawn
    loss_sum: float | Tensor = 0.0  # since the last line of metrics, as is the rest; on the device, read when asked for
    loss_count: int = 0


@dataclass(kw_only=True)
class Training:
    """A run that is ready to go.

    Args:
        model: to train, on the device.
        rows, val_rows: of `samples`.
        preprocess: of evaluation; its mean and standard deviation also of training.
        steps: of the optimiser, all in all.
        image_size: (H, W) pixels, after the phases.
        on_metrics: gets a record of each logged step, in the main process.
        on_best: called with the weights of an evaluation that beats all before in place, in every process.
        on_bad: gets all images that could not be read so far, in the main process, when there are new ones.
        stopping: asked after each step.
    """

    model: Model
    config: TrainConfig
    samples: Samples
    rows: np.ndarray
    val_rows: np.ndarray
    preprocess: PreprocessConfig
    augment: Augment
    steps: int
    image_size: tuple[int, int]
    process: Process
    states: StateFolder
    teacher: Teacher | None = None
    flops: float = 0.0  # of an image's forward and backward pass, for the MFU
    peak_flops: float = 0.0  # of the device, per second
    on_metrics: Callable[[dict[str, Any]], None]
    on_best: Callable[[], None]
    on_bad: Callable[[list[Bad]], None]
    stopping: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        c, process = self.config, self.process
        share, left = divmod(c.batch_size, process.world)
        self.micro_batch_size = min(c.micro_batch_size or share, share)
        if left or not share or share % self.micro_batch_size:
            unit = process.world * max(self.micro_batch_size, 1)
            raise TrainError(
                f"batch_size {c.batch_size} is not a multiple of {process.world} processes × micro_batch_size "
                f"{self.micro_batch_size}. Nearest that is: {max(round(c.batch_size / unit), 1) * unit}."
            )
        self.accumulation = share // self.micro_batch_size
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # on a CPU the model wants the cores itself
        spare = cores // process.local_world if process.device.type != "cpu" else cores // process.local_world // 2
        self.workers = min(max(spare, 1), 16) if c.workers is None else c.workers
        self.student = _Student(self.model, with_teacher=self.teacher is not None)
        if c.compile and c.strategy == "ddp":
            self.student.compile()
        self.wrapped = process.wrap(self.student, c.strategy)
        if c.compile and c.strategy == "fsdp":
            self.wrapped.compile()
        self.optimizers = make_optimizer(self.model, c)
        self.ema = EMA(self.model, c.ema_decay) if c.ema_decay else None
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=c.precision == "fp16")
        self.normalise = Normalise(self.preprocess, process.device)
        self.progress = Progress()
        weights = np.ones(len(self.samples.labels))
        if c.class_weights:
            targets = self.samples.targets[self.rows]
            counts = targets.sum(0) if targets.ndim == 2 else np.bincount(targets, minlength=len(weights))
            weights = counts.sum() / np.maximum(counts, 1) / len(weights)
        self.class_weights = torch.tensor(weights, dtype=torch.float32, device=process.device)
        self.eval_every = c.eval_every or max(math.ceil(self.steps / 10), 1)
        self.save_every = c.save_every or self.eval_every

    # ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> bool:
        """Train to the end; False if it was asked to stop before.

        Raises:
            TrainError: the loss is not finite, or too many images are unreadable.
        """
        c, progress = self.config, self.progress
        batches, timer = self._batches(), _Timer()
        while progress.step < self.steps:
            factor = lr_factor(progress.step, self.steps, c)
            set_lr(self.optimizers, factor)
            self._train_mode()
            found: list[Bad] = []
            for micro in range(self.accumulation):
                batch = next(batches)
                found += batch.bad
                # checkpointed layers are computed again in the backward pass: in the same arithmetic
                with (
                    synchronising(self.wrapped, micro == self.accumulation - 1),
                    arithmetic(self.process.device, "fp32"),
                ):
                    loss = self._loss(batch, micro)
                    self.scaler.scale(loss * (self.process.world / c.batch_size)).backward()
                progress.loss_sum = progress.loss_sum + loss.detach()
                progress.loss_count += len(batch.targets)
            grad_norm = self._update()
            progress.step += 1
            timer.images += c.batch_size
            finished = progress.step == self.steps
            ending = finished or self.process.any(self.stopping())
            evaluating = progress.step % self.eval_every == 0 or finished
            self._note_bad(found)
            if evaluating or progress.step % c.log_every == 0:
                record = self._train_record(grad_norm, factor, timer)
                if evaluating and len(self.val_rows):
                    record |= self._evaluate()
                if self.process.is_main:
                    self.on_metrics(record)
                timer.restart()
            if ending or progress.step % self.save_every == 0:
                self.states.save(progress.step, self._state())
            if ending:
                break
        self.states.wait()
        return progress.step == self.steps

    def _train_mode(self) -> None:
        """Dropout and stochastic depth on; batch norms that are frozen keep the statistics they were trained with."""
        self.wrapped.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()

    def _batches(self) -> Iterator[Batch]:
        c = self.config
        plan = Plan(
            rows=self.rows,
            batch_size=c.batch_size,
            micro_batch_size=self.micro_batch_size,
            seed=c.seed,
            rank=self.process.rank,
            world=self.process.world,
            size_of=lambda step: self._phase(step)[0],
            first=self.progress.step,
            last=self.steps,
        )
        dataset = TrainSet(self.samples, self.augment, c.seed)
        return iter(loader(dataset, self.samples, plan, workers=self.workers, pin=self.process.device.type == "cuda"))

    def _phase(self, step: int) -> tuple[tuple[int, int], int | None]:
        """(H, W) of a step's images, and how many of their tokens are kept."""
        end = 0.0
        for phase in self.config.phases:
            end += phase.share * self.steps
            if step < round(end):
                return (phase.image_size, phase.image_size), phase.keep_tokens
        return self.image_size, None

    def _loss(self, batch: Batch, micro: int) -> Tensor:
        """The sum of the losses of a micro-batch's images."""
        c, process, step = self.config, self.process, self.progress.step
        seed = int(np.random.SeedSequence([c.seed, step, process.rank, micro]).generate_state(1)[0])
        torch.manual_seed(seed)  # dropout, stochastic depth
        generator = torch.Generator().manual_seed(seed)
        size, keep = self._phase(step)
        raw, targets = batch.pixels, batch.targets.to(process.device, non_blocking=True)
        if not len(raw):  # all of them unreadable: the other processes wait for this one's gradients all the same
            raw = torch.zeros(1, 3, *size, dtype=torch.uint8)
            targets = targets.new_zeros(1, *targets.shape[1:])
        raw = raw.to(process.device, non_blocking=True)
        pixels = self.normalise(raw)
        # a sigmoid has nothing to be smoothed towards
        smoothing = c.label_smoothing if c.loss == "softmax" else 0.0
        targets = soft_targets(targets, len(self.samples.labels), smoothing)
        if c.mixup or c.cutmix:
            pixels, targets = mix(pixels, targets, mixup=c.mixup, cutmix=c.cutmix, generator=generator)
        if c.erase_rate:
            pixels = erase(pixels, c.erase_rate, generator=generator)
        teacher_logits = self.teacher(self.normalise.inverse(pixels)) if self.teacher else None  # sees what it teaches
        with arithmetic(process.device, c.precision):
            logits, distilled = self.wrapped(pixels, keep, generator)
        losses = self._classification_loss(logits.float(), targets)
        if teacher_logits is not None:
            weight = c.distillation_weight
            losses = (1 - weight) * losses + weight * self._distillation_loss(distilled.float(), teacher_logits)
        return losses.sum() * bool(len(batch.targets))

    def _classification_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,): cross-entropy, or the sum of the classes' binary ones (the ViT release's ImageNet-21k runs)."""
        if self.config.loss == "sigmoid":
            parts = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            return (parts * self.class_weights).sum(dim=1)
        return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1) * (targets @ self.class_weights)

    def _distillation_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """(B,): the teacher's best class as a label, or its softened probabilities (Touvron et al. 2021, §4)."""
        if self.config.distillation == "hard":
            return F.cross_entropy(logits, teacher.argmax(dim=1), reduction="none")
        t = self.config.distillation_temperature
        student, teacher = F.log_softmax(logits / t, dim=1), F.log_softmax(teacher / t, dim=1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1) * t * t

    def _update(self) -> Tensor:
        """One step of the optimisers; returns the norm of the gradient before it was clipped."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or math.inf)
        # fp16 overflows at times: then nothing is stepped, also not the one of two optimisers that looks sound
        overflowed = self.scaler.is_enabled() and not torch.isfinite(norm)
        for optimizer in self.optimizers:
            if not overflowed:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        if self.ema and not overflowed:
            self.ema.update(self.model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    # ── what it says and keeps ───────────────────────────────────────────────────────────────────────────────────────

    def _train_record(self, grad_norm: Tensor, factor: float, timer: "_Timer") -> dict[str, Any]:
        progress = self.progress
        sums = torch.as_tensor(progress.loss_sum, dtype=torch.float64).cpu()
        device = self.process.device
        both = self.process.total(torch.stack([sums.float(), torch.tensor(float(progress.loss_count))]).to(device))
        loss = float(both[0] / both[1].clamp(min=1))
        progress.loss_sum, progress.loss_count = 0.0, 0
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {loss} at step {progress.step}. Begin again with a lower --lr ({self.config.lr}), or "
                "longer --set warmup_steps."
            )
        rate = timer.images / timer.seconds()
        record = {
            "step": progress.step,
            "epoch": round(progress.step * self.config.batch_size / len(self.rows), 3),
            "loss": loss,
            "lr": self.config.lr * factor,
            "grad_norm": float(grad_norm),
            "images_per_s": round(rate, 1),
        }
        if self.peak_flops and not self.config.phases:
            record["mfu"] = round(rate * self.flops / (self.peak_flops * self.process.world), 4)
        if progress.bad:
            record["bad_images"] = len(progress.bad)
        return record

    def _note_bad(self, found: list[Bad]) -> None:
        """Count images that could not be read; stop when they are too many."""
        if self.process.any(bool(found)):
            new = [bad for bad in self.process.gather(found) if bad.key not in self.progress.bad]
            self.progress.bad |= {bad.key: bad for bad in new}
            if self.process.is_main and new:
                self.on_bad(list(self.progress.bad.values()))
        check_bad(list(self.progress.bad.values()), len(self.rows), self.config.max_bad)

    def _evaluate(self) -> dict[str, Any]:
        """Score the averaged weights, or the weights, on the held-out images; hand on the best so far."""
        with averaged(self.model, self.ema):
            record = self.score()
            score = -record["val_loss"] if self.samples.labels.multi_label else record["top1"]
            if score > self.progress.best_score:
                self.progress.best_score = score
                self.on_best()
        return record

    @torch.no_grad()
    def score(self) -> dict[str, Any]:
        """Loss on the held-out images; with one label an image also top-1 and top-5."""
        process = self.process
        for buffer in self.model.buffers():  # the statistics of batch norms: those of the process that writes models
            process.broadcast(buffer)
        own = self.val_rows[process.rank :: process.world]
        batch_size = min(self.micro_batch_size, 256)
        dataset = EvalSet(self.samples, self.preprocess)
        batches = iter(loader(dataset, self.samples, eval_batches(own, batch_size), workers=self.workers, pin=False))
        self.student.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        # under FSDP the forward pass is done together, so each process does it as often as the first
        for _ in range(math.ceil(math.ceil(len(self.val_rows) / process.world) / batch_size)):
            batch = next(batches, None)
            pixels = torch.zeros(1, 3, *self.image_size) if batch is None or not len(batch.pixels) else batch.pixels
            with arithmetic(process.device, self.config.precision):
                logits = self.student(self.normalise(pixels)).float().cpu()
            if batch is None or not len(batch.pixels):
                continue
            targets = soft_targets(batch.targets, logits.shape[1], 0.0)
            best = logits.topk(min(5, logits.shape[1])).indices
            hits = targets.gather(1, best) > 0
            loss = self._classification_loss(logits.to(process.device), targets.to(process.device)).sum()
            sums += torch.tensor([len(logits), float(loss), int(hits[:, 0].sum()), int(hits.any(1).sum())])
        count, loss_sum, top1, top5 = process.total(sums).tolist()
        if not count:
            raise TrainError("none of the held-out images can be read: there is nothing to measure by.")
        record = {"val_loss": loss_sum / count}
        if not self.samples.labels.multi_label:
            record |= {"top1": top1 / count, "top5": top5 / count}
        return record

    def _state(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict() if self.ema else {},
            "scaler": self.scaler.state_dict(),
            "best_score": progress.best_score,
            "bad": [asdict(bad) for bad in progress.bad.values()],
            "loss": [torch.as_tensor(progress.loss_sum), progress.loss_count],
        }

    def restore(self) -> None:
        """Go on from the newest saved state, if there is one."""
        state = self.states.load()
        if state is None:
            return
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError) as error:
            raise TrainError(f"the saved state is not of this run ({error!r}). Begin a new one.") from error

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            restore(self.model.state_dict(), state["model"])
            if self.ema:
                restore(self.ema.state_dict(), state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            restore_optimizer(optimizer, saved)
        self.scaler.load_state_dict(state["scaler"])
        bad = {each["key"]: Bad(**each) for each in state["bad"]}
        loss_sum, loss_count = state["loss"]
        self.progress = Progress(state["step"], state["best_score"], bad, loss_sum.to(self.process.device), loss_count)


def check_bad(bad: Sequence[Bad], num_images: int, share: float | None) -> None:
    """
    Raises:
        TrainError: more images are unreadable than may be: a share of them, or without one 1 %, or 5.
    """
    limit = max(0.01 * num_images, 5) if share is None else share * num_images
    if len(bad) > limit:
        raise TrainError(
            f"{len(bad)} of {num_images} training images could not be read, more than the {limit:.0f} allowed; "
            f"the last: {bad[-1].message} bad_images.jsonl names them, `opsin doctor` finds all. "
            "Mend or remove them, or allow more: --max-bad 0.1"
        )


class _Student(nn.Module):
    """A model's forward pass: logits for the labels; while it is trained, those for the teacher beside them.

    A model with a second head has it for a teacher (Touvron et al. 2021); without one, both heads learn the labels
    together, as they are used.
    """

    def __init__(self, model: Model, *, with_teacher: bool = False) -> None:
        super().__init__()
        self.model, self.with_teacher = model, with_teacher

    def forward(self, pixels: Tensor, keep_tokens: int | None = None, generator: torch.Generator | None = None) -> Any:
        model: Any = self.model
        if not self.training:
            return model(pixels)
        tokens = model.embed(pixels)
        if keep_tokens is not None:
            assert generator is not None
            prefix = getattr(model.config, "num_prefix", 0)
            kept = drop_tokens(tokens[:, prefix:], keep_tokens, generator=generator)
            tokens = torch.cat([tokens[:, :prefix], kept], dim=1)
        tokens = model.encode(tokens)
        logits = model.classify(model.pool(tokens))
        head_dist = getattr(model, "head_dist", None)
        if head_dist is None:
            return logits, logits
        distilled = head_dist(tokens[:, 1])
        if self.with_teacher:
            return logits, distilled
        logits = (logits + distilled) / 2
        return logits, logits


class _Timer:
    """Seconds and images since the last line of metrics, without evaluation."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start, self.images = time.monotonic(), 0

    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)


@contextmanager
def averaged(model: nn.Module, ema: EMA | None) -> Iterator[None]:
    """The averaged weights in place of the model's own, for the length of the block."""
    if ema is None:
        yield
        return
    state = model.state_dict()
    own = {name: tensor.clone() for name, tensor in state.items()}
    ema.copy_to(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(own[name])


@contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast of bf16 and fp16; on a CPU also plain attention, for the backward pass too.

    torch's fused attention has a slow backward on CPUs, half of the whole step at 64 tokens, and the plain one goes
    through fp32 unless told otherwise.
    """
    with ExitStack() as stack:
        if device.type == "cpu":
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if precision != "fp32":
            stack.enter_context(torch.autocast(device.type, dtype=NUMBERS[precision]))
        yield
