"""What an exported file computes, beside what opsin does from the same images.

image ──▶ opsin's pixels ──▶ the fp32 model ──▶ logits      whole: agreement, drift
   └────▶ the file's pixels ─────────────────▶ logits       pixels_drift: of the two kinds of pixels
                 └──▶ the fp32 model ──▶ logits             network_drift: of the file's logits from these
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opsin.device import exact_fp32
from opsin.preprocess import PreprocessConfig, decode

Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""images (B, H, W, 3) uint8 → `logits` and `probabilities`, or `features`; and `pixels`."""

PHOTOS = ("chelsea.jpg", "coffee.jpg", "rocket.jpg")
ALIKE = 0.99  # cosine of two features that are counted as agreeing


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Of logits, or of features where a model has no head. A relative drift is over the largest of opsin's values."""

    images: int
    agreement: float  # share with the same best label; of features, share with a cosine of 0.99 and more
    drift_max: float
    drift_mean: float
    drift_relative: float  # drift_max over the scale
    network_drift_relative: float  # of the network alone, given the file's own pixels
    pixels_drift_max: float  # in steps of a byte
    pixels_drift_share: float  # of the numbers, that are half a byte and more off


def photos() -> list[Image.Image]:
    """The three that come with opsin."""
    folder = files("opsin") / "assets" / "photos"
    return [decode((folder / name).read_bytes()) for name in PHOTOS]


def varied(images: Sequence[Image.Image], count: int) -> Iterator[Image.Image]:
    """`count` parts of images, of all sizes and shapes: a few pixels, much enlarged, one pixel wide, four to one."""
    random = np.random.default_rng(0)
    for i in range(count):
        image = images[i % len(images)]
        if i % 25 == 9:
            image = image.resize((image.width * 4, image.height * 4))
        width, height = image.size
        if i % 25 == 11:
            w, h = 1, min(height, 97)
        elif i % 25 == 13:
            w, h = min(width, 101), 1
        elif i % 5 == 2:  # a small part, which is enlarged
            w, h = (int(random.integers(min(9, side), min(48, side) + 1)) for side in (width, height))
        elif i % 5 == 3:  # wide or high
            w, h = max(1, width * 3 // 4), max(1, height // 6)
            w, h = (w, h) if i % 2 else (min(h, width), min(w, height))
        else:
            w, h = (int(random.integers(max(1, side // 2), side + 1)) for side in (width, height))
        left, top = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
        yield image.crop((left, top, left + w, top + h))


@torch.inference_mode()
def compare(
    run: Run,
    model: nn.Module,
    preprocess: PreprocessConfig,
    images: Sequence[Image.Image],
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run a file on images, one at a time, and the last together with its mirror image as a batch.

    Args:
        run: the file.
        model: plain, fp32, on the CPU.
        images: upright RGB.
    """
    model = model.eval()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []  # opsin's, the file's, opsin's from the file's pixels
    pixel_max, pixel_off, pixel_count = 0.0, 0, 0
    steps = _steps(preprocess)

    def net(pixels: Tensor) -> Tensor:
        with exact_fp32(pixels.device):
            return model(pixels)

    batches = [np.asarray(image)[None] for image in images]
    batches.append(np.concatenate([batches[-1], batches[-1][:, :, ::-1]]))
    for done, batch in enumerate(batches, 1):
        ours = preprocess.normalise_batch([preprocess.resize(Image.fromarray(image)) for image in batch])
        given = run(batch.copy())  # writable, and contiguous
        theirs = torch.from_numpy(given["pixels"])
        difference = (theirs - ours).abs() * steps
        pixel_max = max(pixel_max, difference.max().item())
        pixel_off += int((difference > 0.5).sum())
        pixel_count += difference.numel()
        values = torch.from_numpy(given["logits"] if "logits" in given else given["features"])
        rows.append((net(ours), values, net(theirs)))
        if progress is not None:
            progress(done, len(batches))
    right, found, through = (torch.cat(parts).double() for parts in zip(*rows, strict=True))
    scale = max(right.abs().max().item(), 1e-12)
    drift = torch.nan_to_num((found - right).abs(), nan=torch.inf)
    network = torch.nan_to_num((found - through).abs(), nan=torch.inf)
    config: Any = model.config
    if config.num_classes:
        same = found.argmax(dim=1) == right.argmax(dim=1)
    else:
        same = torch.cosine_similarity(found, right) >= ALIKE
    return Comparison(
        images=len(right),
        agreement=same.double().mean().item(),
        drift_max=drift.max().item(),
        drift_mean=drift.mean().item(),
        drift_relative=drift.max().item() / scale,
        network_drift_relative=network.max().item() / scale,
        pixels_drift_max=pixel_max,
        pixels_drift_share=pixel_off / pixel_count,
    )


def _steps(preprocess: PreprocessConfig) -> Tensor:
    """(3, 1, 1): what a normalised difference is multiplied by to be in steps of a byte."""
    std = torch.tensor(preprocess.std or (1.0, 1.0, 1.0)).reshape(3, 1, 1)
    return std / (1.0 if preprocess.rescale_factor is None else preprocess.rescale_factor)
