"""uint8 images of any size → the pixels of a `PreprocessConfig`, as a torch module that every format can hold.

No format's own resize gives the bytes of Pillow's: of ONNX Runtime's some are 15 off, OpenVINO's costs seconds for each
new size. A resize is linear, though, axis by axis: here it is a matrix made from the image's size inside the graph, of
Pillow's weights in its 22-bit steps, with the crop as a choice of the matrix's rows. In float64 sums of such weights
and bytes are exact, and so the bytes are Pillow's.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opsin.errors import ExportError
from opsin.preprocess import PreprocessConfig, _divisor

STEP = 2**22  # Pillow's weights are multiples of its inverse
LONGEST = 32768  # pixels of a shorter edge up to which a crop's length is checked to be the exact one


class Axis(NamedTuple):
    """One side of the images, numbers as int64 tensors: those of a graph are known when it runs."""

    length: int
    start: Tensor  # the first of those kept by a crop of the source
    kept: Tensor  # how many they are
    resized: Tensor  # how many they become
    places: Tensor  # (out,), which of these are wanted


class Pixels(nn.Module):
    """images (B, H, W, 3) uint8, any H and W → pixels (B, 3, h, w) float32, h × w being `config.image_size`.

    Equal to the bit to what `config.resize` and `config.normalise` give with the Pillow that is installed. Very thin
    images cost no more than others.

    Raises:
        ExportError: resample "nearest", whose ties Pillow breaks by the rounding of a running sum; a crop of the source
            whose length is no simple share of the shorter edge, or larger than it.
    """

    def __init__(self, config: PreprocessConfig) -> None:
        super().__init__()
        if config.resample == "nearest" and config.size is not None:
            raise ExportError(
                'preprocessing with resample "nearest" has no exact form as a graph. Those that have: '
                f"{', '.join(FILTERS)}."
            )
        self.config, self.image_size = config, config.image_size
        self.share = None if config.source_crop is None else [_share(value) for value in config.source_crop]
        # bytes are divided in float32 where that is exact, as `normalise` does
        self.divisor = _divisor(config) if config.antialias or config.resample == "bicubic" else None
        # as a tensor: of a plain number ONNX's exporter keeps 24 bits
        factor = None if config.rescale_factor is None else torch.tensor(config.rescale_factor, dtype=torch.float64)
        self.register_buffer("factor", factor, persistent=False)
        for name in ("mean", "std"):
            values = getattr(config, name)
            table = None if values is None else torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1)
            self.register_buffer(name, table, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.normalise(self.resize(images))

    def resize(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 → (B, 3, h, w) float32, 0..255: whole numbers, but for bilinear without antialiasing."""
        c = self.config
        lengths = [torch.scalar_tensor(images.shape[axis], dtype=torch.int64) for axis in (1, 2)]
        kept, starts = lengths, [torch.zeros((), dtype=torch.int64)] * 2
        if self.share is not None:
            shorter = torch.minimum(*lengths)
            kept = [(shorter * p // q).clamp(min=1) for p, q in self.share]
            starts = [_start(n, k, c.crop_rounding) for n, k in zip(lengths, kept, strict=True)]
        if c.size is None:
            resized = kept
        elif isinstance(c.size, int):
            resized = [c.size * k // torch.minimum(*kept) for k in kept]
        else:
            resized = [torch.scalar_tensor(side, dtype=torch.int64) for side in c.size]

        x = images.permute(0, 3, 1, 2)
        axes, inside = [], None
        for axis, out in enumerate(self.image_size):
            first = torch.zeros((), dtype=torch.int64)
            if c.crop_size is not None:
                first = _start(resized[axis], torch.scalar_tensor(out, dtype=torch.int64), c.crop_rounding)
            places = first + torch.arange(out)  # of the resized image, that are kept
            axes.append(Axis(images.shape[1 + axis], starts[axis], kept[axis], resized[axis], places))
            if self._may_pad(axis):
                there = (places >= 0) & (places < resized[axis])
                there = there[:, None] if axis == 0 else there[None]
                inside = there if inside is None else inside & there
        x = self._resized(x, *axes)
        return x if inside is None else x * inside.float()

    def _may_pad(self, axis: int) -> bool:
        """Whether an image can be smaller than its crop, whose rest is then black."""
        c = self.config
        if c.crop_size is None:
            return False
        resized = c.size[axis] if isinstance(c.size, tuple) else c.size
        return resized is None or resized < c.crop_size[axis]

    def _resized(self, x: Tensor, down: Axis, across: Axis) -> Tensor:
        c = self.config
        if c.size is None:
            rows, columns = (_kept(axis) for axis in (down, across))
            return x.index_select(2, rows).index_select(3, columns).float()
        if c.antialias:
            x = x.double()
            rows, columns = (_weights(axis, FILTERS[c.resample]) for axis in (down, across))
            columns = columns.transpose(0, 1)
            width_first = _to_bytes(rows @ _to_bytes(x @ columns))
            if not pillow_chooses():
                return width_first.float()
            height_first = _to_bytes(_to_bytes(rows @ x) @ columns)
            fewer_rows, fewer_columns = (axis.kept - axis.resized for axis in (down, across))
            swap = (fewer_rows > 0) & (fewer_rows > 2 * fewer_columns)
            return torch.where(swap, height_first, width_first).float()
        if c.resample == "bilinear":
            (top, bottom, w_down), (left, right, w_across) = (_taps(axis) for axis in (down, across))

            def blend(rows: Tensor) -> Tensor:
                one, two = rows.index_select(3, left).float(), rows.index_select(3, right).float()
                return one + (two - one) * w_across

            upper, lower = blend(x.index_select(2, top)), blend(x.index_select(2, bottom))
            return upper + (lower - upper) * w_down[:, None]
        (rows, w_down), (columns, w_across) = (_cubic_taps(axis) for axis in (down, across))
        x = x.index_select(2, rows.flatten())  # 4·h rows: all that a small result reads of a large image
        lines = sum(x.index_select(3, columns[:, tap]).double() * w_across[:, tap] for tap in range(4))
        lines = lines.unflatten(2, (-1, 4))  # type: ignore[union-attr]
        values = sum(lines[:, :, :, tap] * w_down[:, tap, None] for tap in range(4))
        return values.round().clamp(0, 255).float()

    def normalise(self, values: Tensor) -> Tensor:
        """0..255 → pixels, in the operations and precisions of `PreprocessConfig.normalise`."""
        if self.divisor is not None:
            values = values if self.divisor == 1 else values / self.divisor
        elif self.factor is not None:
            values = (values.double() * self.factor).float()  # type: ignore[operator]
        return values if self.mean is None else (values - self.mean) / self.std  # type: ignore[operator]


@cache
def pillow_chooses() -> bool:
    """Whether this Pillow resizes the height before the width where that takes off more than twice as many rows.

    Pillow 13 does, earlier ones begin with the width; between the two, values are rounded to bytes.
    """
    image = np.random.default_rng(0).integers(0, 256, (60, 10, 3), dtype=np.uint8)
    whole = Image.fromarray(image).resize((20, 20), Image.Resampling.LANCZOS)
    width_first = Image.fromarray(image).resize((20, 60), Image.Resampling.LANCZOS)
    return whole.tobytes() != width_first.resize((20, 20), Image.Resampling.LANCZOS).tobytes()


# ── one axis ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _share(value: float) -> tuple[int, int]:
    """(p, q): `int(value · n)` is n·p // q for every length n of sense, in integers that no format rounds."""
    share = Fraction(value).limit_denominator(4096)
    p, q = share.numerator, share.denominator
    if value > 1 or any(int(value * n) != n * p // q for n in range(1, LONGEST)):
        raise ExportError(
            f"source_crop has {value}: a graph crops by a simple share of the shorter edge, at most all of it, such as "
            "0.875."
        )
    return p, q


def _start(length: Tensor, crop: Tensor, rounding: str) -> Tensor:
    """Where a crop begins, as `preprocess._centre`; no number that is halved is negative, whatever a format rounds."""
    over, under = (length - crop).clamp(min=0), (crop - length).clamp(min=0)
    if rounding == "down":
        return over // 2 - (under + 1) // 2
    if rounding == "up":
        return (over + 1) // 2 - under // 2
    half = over // 2
    return (over + (half - half // 2 * 2)) // 2 - under // 2  # half goes to the even side


def _kept(axis: Axis) -> Tensor:
    return torch.minimum(axis.places.clamp(min=0), axis.kept - 1) + axis.start


def _weights(axis: Axis, filter_: Callable[[Tensor], Tensor]) -> Tensor:
    """(out, length) float64: Pillow's weights in its steps. Distances are fractions of whole numbers, so exact."""
    source = torch.arange(axis.length) - axis.start
    distance = (2 * source + 1)[None] * axis.resized - (2 * axis.places + 1)[:, None] * axis.kept
    weights = filter_(distance.double() / (2 * torch.maximum(axis.kept, axis.resized)).double())
    weights = weights * ((source >= 0) & (source < axis.kept)).double()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9) * STEP
    return (weights.abs() + 0.5).floor() * weights.sign()


def _to_bytes(sums: Tensor) -> Tensor:
    return ((sums + STEP / 2) / STEP).floor().clamp(0, 255)


def _taps(axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """As `preprocess._taps`."""
    place = (axis.places.float() + 0.5) * (axis.kept.float() / axis.resized.float()) - 0.5
    low = place.floor()
    first, second = low.long().clamp(min=0), torch.minimum(place.ceil().long(), axis.kept - 1)
    return torch.minimum(first, axis.kept - 1) + axis.start, second.clamp(min=0) + axis.start, place - low


def _cubic_taps(axis: Axis) -> tuple[Tensor, Tensor]:
    """As `preprocess._cubic_taps`."""
    place = (axis.places.double() + 0.5) * (axis.kept.double() / axis.resized.double()) - 0.5
    low = place.floor()
    x, a = place - low, -0.75
    first, last = (((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (1 + x, 2 - x))
    second, third = (((a + 2) * t - (a + 3)) * t * t + 1 for t in (x, 1 - x))
    taps = torch.minimum((low.long()[:, None] + torch.arange(-1, 3)).clamp(min=0), axis.kept - 1)
    return taps + axis.start, torch.stack([first, second, third, last], dim=1)


# Pillow's filters, of the distance in source pixels, or in results where the image shrinks.


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((x - 5) * x + 8) * x * -0.5 + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def _box(x: Tensor) -> Tensor:
    return ((x > -0.5) & (x <= 0.5)).double()


def _sinc(x: Tensor) -> Tensor:
    y = math.pi * torch.where(x == 0, torch.ones_like(x), x)
    return torch.where(x == 0, torch.ones_like(x), y.sin() / y)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, _sinc(x) * (0.54 + 0.46 * (math.pi * x).cos()), torch.zeros_like(x))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), torch.zeros_like(x))


FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic, "box": _box, "hamming": _hamming, "lanczos": _lanczos}
