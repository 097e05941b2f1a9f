"""Samples → batches on the device: which images a step sees, and how they are read.

Everything random about a sample is a function of (seed, epoch, row), and the order one of (seed, epoch): a run that is
resumed at a step, or spread over other numbers of processes and workers, sees the same pictures.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opsin.data.samples import Samples
from opsin.errors import ImageError
from opsin.preprocess import PreprocessConfig, decode
from opsin.train.augment import Augment

Draw = tuple[int, int, tuple[int, int]]  # row of the set, epoch, (H, W) in pixels


@dataclass(frozen=True, slots=True)
class Bad:
    """An image that could not be read, as `bad_images.jsonl` has it."""

    key: str
    type: str
    message: str


@dataclass(slots=True)
class Batch:
    """`pixels` (B, 3, H, W) uint8 or float and `targets` (B,) or (B, K) of the readable ones; the others in `bad`."""

    pixels: Tensor
    targets: Tensor
    bad: list[Bad] = field(default_factory=list)

    def pin_memory(self) -> "Batch":  # called by DataLoader
        return Batch(self.pixels.pin_memory(), self.targets.pin_memory(), self.bad)


@lru_cache(maxsize=2)
def _order(num: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num)


def drawn(num: int, start: int, stop: int, seed: int) -> Iterator[tuple[int, int]]:
    """(place in the set, epoch) of the draws `start` to `stop` of an endless run of shuffled epochs."""
    for position in range(start, stop):
        epoch, offset = divmod(position, num)
        yield int(_order(num, seed, epoch)[offset]), epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The micro-batches of one process from a step on: of every step's batch, this process takes a stretch.

    Args:
        rows: of the set, those trained on.
        size_of: step → (H, W) of its images.
        last: the step to stop before.
    """

    rows: np.ndarray
    batch_size: int
    micro_batch_size: int
    seed: int
    rank: int
    world: int
    size_of: Callable[[int], tuple[int, int]]
    first: int
    last: int

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.batch_size // self.world
        for step in range(self.first, self.last):
            size = self.size_of(step)
            begin = step * self.batch_size + self.rank * share
            draws = [
                (int(self.rows[place]), epoch, size)
                for place, epoch in drawn(len(self.rows), begin, begin + share, self.seed)
            ]
            for start in range(0, share, self.micro_batch_size):
                yield draws[start : start + self.micro_batch_size]


class TrainSet(Dataset):
    """Reads and augments one draw: (H, W, 3) uint8, or what is wrong with the file."""

    def __init__(self, samples: Samples, augment: Augment, seed: int) -> None:
        self.samples, self.augment, self.seed = samples, augment, seed

    def __getitem__(self, draw: Draw) -> tuple[int, np.ndarray | Bad]:
        row, epoch, size = draw
        try:
            image = decode(self.samples.source(row))
            return row, self.augment(image, size, np.random.default_rng([self.seed, epoch, row]))
        except ImageError as error:
            return row, Bad(self.samples.key(row), error.kind, str(error))


class EvalSet(Dataset):
    """Reads one image as the model will see it in use."""

    def __init__(self, samples: Samples, preprocess: PreprocessConfig) -> None:
        self.samples, self.preprocess = samples, preprocess

    def __getitem__(self, row: int) -> tuple[int, np.ndarray | Bad]:
        try:
            return row, self.preprocess.resize(decode(self.samples.source(row)))
        except ImageError as error:
            return row, Bad(self.samples.key(row), error.kind, str(error))


def collate(items: Sequence[tuple[int, np.ndarray | Bad]], *, targets: np.ndarray) -> Batch:
    good = [(row, pixels) for row, pixels in items if not isinstance(pixels, Bad)]
    bad = [pixels for _, pixels in items if isinstance(pixels, Bad)]
    if not good:
        return Batch(torch.empty(0, 3, 0, 0, dtype=torch.uint8), torch.from_numpy(targets[:0]), bad)
    stacked = torch.from_numpy(np.stack([pixels for _, pixels in good]))
    return Batch(stacked.permute(0, 3, 1, 2), torch.from_numpy(targets[[row for row, _ in good]]), bad)


def loader(dataset: Dataset, samples: Samples, batches: Any, *, workers: int, pin: bool) -> DataLoader:
    """`batches` yields lists of what the dataset is asked for; their order is kept whatever the number of workers."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate, targets=samples.targets),
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: the parent finishes its step, for which it needs this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def eval_batches(rows: np.ndarray, batch_size: int) -> list[list[int]]:
    return [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]


class Normalise:
    """Pixels 0..255 (B, 3, H, W) of any type → float32 in the range that a model takes, on the device."""

    def __init__(self, preprocess: PreprocessConfig, device: torch.device) -> None:
        self.device = device
        self.factor = 1.0 if preprocess.rescale_factor is None else preprocess.rescale_factor
        self.mean = torch.tensor(preprocess.mean or (0.0, 0.0, 0.0), device=device).view(3, 1, 1)
        self.std = torch.tensor(preprocess.std or (1.0, 1.0, 1.0), device=device).view(3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.device, non_blocking=True).float() * self.factor - self.mean) / self.std

    def inverse(self, pixels: Tensor) -> Tensor:
        """Back to 0..255, as floats."""
        return (pixels * self.std + self.mean) / self.factor
