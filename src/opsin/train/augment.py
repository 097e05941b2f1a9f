"""Augmentation: of one image on its way to the model, then of a whole batch.

    image ── crop, resize, flip ── RandAugment or AutoAugment ──▶ uint8 H W 3         Augment, in the readers
    pixels, targets ── mix ── erase ──▶ pixels, soft targets                          mix, erase, on the device

Pillow, because the policies were found with its operations, on bytes. torchvision does not load beside every build of
torch, and kornia's RandAugment (0.9) is another one: floats, no Cutout, other ranges, no operation twice.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from opsin.preprocess import RESAMPLES, PreprocessConfig, Resample
from opsin.train.config import CropBy, TrainConfig

Box = tuple[int, int, int, int]  # left, top, right, bottom: Pillow's order

GREY = (128, 128, 128)
ASPECTS = (3 / 4, 4 / 3)  # width / height of a crop
CROP_TRIES = 10
ERASED_AREAS, ERASED_ASPECTS, ERASE_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10  # Zhong et al. 2017; DeiT


# ── one image ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """An image → what the model sees of it in one epoch: crop, resize, flip, then RandAugment or AutoAugment.

    The policies come after resizing, as in the release that defined them and in big_vision; the Perceiver's code has
    them before, where their pixel counts (moves, Cutout) are of the crop's own size and so mostly do less.
    """

    min_crop_area: float = 0.05  # share of the image, at least; 1: no crop, the view of `evaluation`
    crop_by: CropBy = "area"  # what is drawn uniformly, see `random_crop`
    flip_rate: float = 0.5
    rand_augment: tuple[int, int] | None = None  # (layers, magnitude 0–30)
    auto_augment: bool = False
    resample: Resample = "bilinear"
    evaluation: PreprocessConfig | None = None  # None: the whole image, squashed

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLES:
            raise ValueError(f'resample is "{self.resample}". Known: {", ".join(RESAMPLES)}.')
        if self.crop_by not in get_args(CropBy):
            raise ValueError(f'crop_by is "{self.crop_by}". Known: {", ".join(get_args(CropBy))}.')
        if self.rand_augment is not None:
            layers, magnitude = self.rand_augment
            if layers < 0 or not 0 <= magnitude <= 30:
                raise ValueError(
                    f"rand_augment is {self.rand_augment}; it must be (layers, magnitude), at least 0 and 0 to 30."
                )

    def __call__(self, image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """
        Args:
            image: upright RGB, as `decode` gives it.
            size: (H, W) of the result, pixels.
            rng: the only source of chance: one seeded by (seed, epoch, index) makes the result a function of these.
        Returns:
            (H, W, 3) uint8, contiguous, of its own memory.
        Raises:
            ValueError: not RGB.
            ImageTooLarge: as `PreprocessConfig.resize`, where `evaluation` is used.
        """
        if image.mode != "RGB":
            raise ValueError(f'the image is "{image.mode}"; it must be "RGB", as `decode` gives it.')
        if self.min_crop_area == 1 and self.evaluation is not None:
            pixels = _resized_to(self.evaluation, size).resize(image)
            image = Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8))
        else:
            box: Box = (0, 0, image.width, image.height)
            if self.min_crop_area < 1:
                box = random_crop(image.height, image.width, self.min_crop_area, rng, by=self.crop_by)
            # the filter reaches past the box into the image, where cropping first would end in a repeated border
            image = image.resize(size[::-1], Image.Resampling(RESAMPLES.index(self.resample)), box)
        if rng.random() < self.flip_rate:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            image = rand_augment(image, *self.rand_augment, rng)
        if self.auto_augment:
            image = auto_augment(image, rng)
        return np.array(image)


def augment_of(config: TrainConfig, preprocess: PreprocessConfig) -> Augment:
    """The augmentation of a run.

    Args:
        preprocess: of evaluation. Crops are resized with its filter, always antialiased.
    """
    return Augment(
        min_crop_area=config.min_crop_area,
        crop_by=config.crop_by,
        flip_rate=config.flip_rate,
        rand_augment=config.rand_augment,
        auto_augment=config.auto_augment,
        resample=preprocess.resample,
        evaluation=preprocess,
    )


def random_crop(height: int, width: int, min_area: float, rng: np.random.Generator, *, by: CropBy = "area") -> Box:
    """The Inception crop: a box of `min_area` to all of the image, its width / height between 3/4 and 4/3.

    "area": area and logarithm of the aspect are uniform (torchvision, timm, so DeiT's recipe). "side": the height,
    and the aspect itself (TensorFlow, so the recipes of the ViT release and the Perceiver); on a square image with
    `min_area` 0.05 its boxes cover 0.38 of the image on average, those of "area" 0.46.

    Returns:
        (left, top, right, bottom), inside the image and not empty. Where ten draws do not fit: the largest box of a
        permitted aspect at the centre; by "side" the whole image, as TensorFlow.
    Source: Szegedy et al. 2015, §6; torchvision `RandomResizedCrop`; TensorFlow `sample_distorted_bounding_box`.
    """
    for _ in range(CROP_TRIES):
        if by == "area":
            area = rng.uniform(min_area, 1) * height * width
            aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
            box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        else:
            aspect = rng.uniform(*ASPECTS)
            least = round(math.sqrt(min_area * height * width / aspect))
            most = min(round(math.sqrt(height * width / aspect)), int((width + 0.5) / aspect), height)
            box_height = int(rng.integers(min(least, most), most, endpoint=True))
            box_width = round(box_height * aspect)
            if box_height * box_width < min_area * height * width:
                box_height += 1
                box_width = round(box_height * aspect)
                if box_height * box_width < min_area * height * width:
                    continue
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(height - box_height, endpoint=True))
            left = int(rng.integers(width - box_width, endpoint=True))
            return left, top, left + box_width, top + box_height
    if by == "side":
        return 0, 0, width, height
    box_width = min(width, round(height * ASPECTS[1]))
    box_height = min(height, round(width / ASPECTS[0]))
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return left, top, left + box_width, top + box_height


def _resized_to(preprocess: PreprocessConfig, size: tuple[int, int]) -> PreprocessConfig:
    """The same view of an image at another size, (H, W)."""
    old = preprocess.image_size
    if size == old:
        return preprocess
    if preprocess.crop_size is None:
        return replace(preprocess, size=size)
    before = preprocess.size
    if isinstance(before, int):
        before = round(before * max(new / was for new, was in zip(size, old, strict=True)))
    elif before is not None:
        before = (round(before[0] * size[0] / old[0]), round(before[1] * size[1] / old[1]))
    return replace(preprocess, size=before, crop_size=size)


# ── the operations of RandAugment and AutoAugment ────────────────────────────────────────────────────────────────────
#
# `operation(image, level, rng)`. A level is a share of the range, in tenths, and may pass 10 where the range goes on.
# Source: tensorflow/tpu `efficientnet/autoaugment.py`, which big_vision and the Perceiver's code repeat. Deviations:
# - Its moves and Cutout count pixels (100 and 40 at most in RandAugment) of pictures of 224; here they are that share
#   of the side. AutoAugment moved by 250, which leaves nothing of a picture of 224 to be seen; it shares the 100.
# - Contrast is Pillow's, around the mean grey that its docstring means; its code computes pixels / 256 instead.
# - Posterize keeps a bit at least: below level 2.5 it would shift bytes by 8, which TensorFlow leaves undefined.

Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]
MOVED, CUT_OUT = 100 / 224, 40 / 224  # share of the side at level 10


def _either(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    # `matrix` is of pixel indices, as TensorFlow's; Pillow's is of pixel centres, half a pixel on
    a, b, c, d, e, f = matrix
    centred = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    return image.transform(image.size, Image.Transform.AFFINE, centred, Image.Resampling.NEAREST, fillcolor=GREY)


def _rotate(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return image.rotate(_either(level / 10 * 30, rng), Image.Resampling.NEAREST, fillcolor=GREY)


def _shear_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, _either(level / 10 * 0.3, rng), 0, 0, 1, 0))


def _shear_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, _either(level / 10 * 0.3, rng), 1, 0))


def _translate_x(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, _either(level / 10 * MOVED * image.width, rng), 0, 1, 0))


def _translate_y(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _either(level / 10 * MOVED * image.height, rng)))


def _cutout(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    x, y = int(rng.integers(image.width)), int(rng.integers(image.height))
    across, down = (int(level / 10 * CUT_OUT * side + 1e-9) for side in image.size)  # half of the box's sides
    image = image.copy()
    box = (max(x - across, 0), max(y - down, 0), min(x + across, image.width), min(y + down, image.height))
    image.paste(GREY, box)
    return image


def _posterize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.posterize(image, min(max(int(level / 10 * 4), 1), 8))


def _solarize(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(image, int(level / 10 * 256))


def _solarize_add(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
    added = int(level / 10 * 110)
    return image.point([min(value + added, 255) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, level, rng: kind(image).enhance(level / 10 * 1.8 + 0.1)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, rng: ImageOps.autocontrast(image),
    "Equalize": lambda image, level, rng: ImageOps.equalize(image),
    "Invert": lambda image, level, rng: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
_NAMES = tuple(OPERATIONS)

# AutoAugment's policy for ImageNet, "v0": in each row two of (operation, rate, level)
IMAGENET_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
    (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
    (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
    (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)


def rand_augment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """`layers` operations, each any of the 16 and all at level `magnitude`, one after the other (Cubuk et al. 2020)."""
    for index in rng.integers(len(_NAMES), size=layers):
        image = OPERATIONS[_NAMES[index]](image, magnitude, rng)
    return image


def auto_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of the 25 rows of the ImageNet policy (Cubuk et al. 2019), each of its two operations at its own rate."""
    for name, rate, level in IMAGENET_POLICY[rng.integers(len(IMAGENET_POLICY))]:
        if rng.random() < rate:
            image = OPERATIONS[name](image, level, rng)
    return image


# ── a batch ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def soft_targets(targets: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Targets as shares: (1 − s)·y + s/K of each class. Linear, so it may come before `mix` or after.

    Args:
        targets: (B,) int64, the class of each; or (B, K), the shares themselves.
    Returns:
        (B, K) float32.
    Raises:
        ValueError: neither of these shapes.
    """
    if targets.ndim == 1:
        targets = F.one_hot(targets, num_classes)
    elif targets.ndim != 2 or targets.shape[1] != num_classes:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; they must be (B,) or (B, {num_classes}).")
    return targets.float() * (1 - smoothing) + smoothing / num_classes


def mix(
    pixels: Tensor, targets: Tensor, *, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """MixUp, CutMix, or with both on MixUp in the first half of the batch and CutMix in the second, as the Perceiver.

    Images are paired with those of the reversed batch (of the reversed half), so the middle one of an odd number, and
    a batch of one, stay as they are. λ is drawn once a batch, from Beta(α, α).

    Args:
        pixels: (B, C, H, W).
        targets: (B, K) float, see `soft_targets`.
        mixup, cutmix: α; 0: off.
    Returns:
        New tensors of the same shapes, or the very same ones with both off.
    Raises:
        ValueError: targets that are class indices, or of another batch.
    Source: Zhang et al. 2018; Yun et al. 2019, whose λ is the share that the box, clipped by the border, leaves over.
    """
    if targets.ndim != 2 or len(targets) != len(pixels) or not targets.is_floating_point():
        raise ValueError(
            f"targets are {targets.dtype} of shape {tuple(targets.shape)}; to mix {len(pixels)} images they must be "
            f"float ({len(pixels)}, K). See `soft_targets`."
        )
    if mixup and cutmix:
        half = (len(pixels) + 1) // 2
        blended, blended_targets = _mixup(pixels[:half], targets[:half], mixup, generator)
        pasted, pasted_targets = _cutmix(pixels[half:], targets[half:], cutmix, generator)
        return torch.cat([blended, pasted]), torch.cat([blended_targets, pasted_targets])
    if mixup:
        return _mixup(pixels, targets, mixup, generator)
    if cutmix:
        return _cutmix(pixels, targets, cutmix, generator)
    return pixels, targets


def _beta(alpha: float, generator: torch.Generator) -> float:
    # torch's own Beta takes no generator
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed)).beta(alpha, alpha)


def _mixup(pixels: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    share = _beta(alpha, generator)
    return pixels * share + pixels.flip(0) * (1 - share), targets * share + targets.flip(0) * (1 - share)


def _cutmix(pixels: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    share = math.sqrt(1 - _beta(alpha, generator))  # of each side
    spans, area = [], 1.0
    for length, place in zip(pixels.shape[2:], _uniform((2,), generator).tolist(), strict=True):
        cut = int(length * share)
        start = int(place * length) - cut // 2
        spans.append(slice(max(start, 0), min(start + cut, length)))
        area *= (spans[-1].stop - spans[-1].start) / max(length, 1)
    pasted = pixels.clone()
    pasted[:, :, spans[0], spans[1]] = pixels.flip(0)[:, :, spans[0], spans[1]]
    return pasted, targets * (1 - area) + targets.flip(0) * area


def erase(pixels: Tensor, rate: float, *, generator: torch.Generator) -> Tensor:
    """In a share of the images, a rectangle of noise: N(0, 1) in every pixel and channel, as DeiT has it.

    Args:
        pixels: (B, C, H, W) float, normalised.
        rate: probability for each image. The rectangle's area is uniform in 0.02 to 1/3 of it, the logarithm of its
            height / width in ±log(1/0.3); an image where ten draws do not fit, as in very thin ones, is left alone.
    Returns:
        A new tensor, or the very same one with rate 0.
    Source: Zhong et al. 2017; timm `RandomErasing(mode="pixel")`.
    """
    if not rate:
        return pixels
    batch, channels, height, width = pixels.shape
    chosen = _uniform((batch,), generator) < rate
    low, high = ERASED_AREAS
    area = (low + (high - low) * _uniform((batch, ERASE_TRIES), generator)) * height * width
    low, high = (math.log(aspect) for aspect in ERASED_ASPECTS)
    aspect = (low + (high - low) * _uniform((batch, ERASE_TRIES), generator)).exp()
    places = _uniform((2, batch, 1), generator)
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(1, keepdim=True)  # the first draw that fits, if any does
    chosen &= fits.any(1)

    def inside(sides: Tensor, length: int, place: Tensor) -> Tensor:  # B L: within the rectangle, on one axis
        side = sides.gather(1, first)
        start = (place * (length - side + 1)).floor()
        at = torch.arange(length, device=side.device)
        return (at >= start) & (at < start + side)

    rows, columns = inside(heights, height, places[0]), inside(widths, width, places[1])
    mask = chosen[:, None, None] & rows[:, :, None] & columns[:, None, :]  # B H W
    noise = torch.randn(int(mask.sum()) * channels, generator=generator, device=generator.device)
    mask = mask[:, None].expand(-1, channels, -1, -1).to(pixels.device)
    return pixels.masked_scatter(mask, noise.to(pixels))


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def drop_tokens(tokens: Tensor, keep: int, *, generator: torch.Generator) -> Tensor:
    """Keep `keep` of N patch tokens, drawn per image (Liu et al. 2023, PatchDropout): (B, N, D) → (B, keep, D)."""
    batch, num, dim = tokens.shape
    if keep >= num:
        return tokens
    order = torch.rand(batch, num, generator=generator).argsort(dim=1)[:, :keep].to(tokens.device)
    return tokens.gather(1, order[:, :, None].expand(-1, -1, dim))
