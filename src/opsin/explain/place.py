"""Where a map lies: tokens → the model's pixels → the upright original.

    tokens h w ── front end ──▶ a box in the pixels ── resize, crop ──▶ a region of the original

Only places; what the numbers mean is said in `attention.py` and `perturb.py`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.preprocess import PreprocessConfig

MAX_CELLS = 16  # along each side, of what is hidden piece by piece: 256 passes of the model at most
CELLS = 8  # along each side, for a model without patches

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Place(NamedTuple):
    """A grid over the pixels that a model is given: the centre of a cell is the middle of its share of the box."""

    grid: tuple[int, int]  # (H, W)
    box: Box  # pixels of the model's input; may reach beyond it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Explanation:
    """A map of what mattered to an answer, and where it lies in the image."""

    map: np.ndarray  # (h, w) float32 on the model's grid (tokens or occlusion cells), raw values
    region: Box  # left, top, right, bottom of the map in the upright original, pixels; may reach beyond it
    seen: Box = (0.0, 0.0, 1.0, 1.0)  # what of the region the model looks at, in its widths and heights; or beyond it
    size: tuple[int, int]  # (width, height) of the upright original
    method: str
    layer: int | None
    head: int | None  # None: the mean of all
    target: int  # the class explained
    label: str
    score: float  # its probability

    def on_image(self) -> np.ndarray:
        """The map in image coordinates, (H, W) float32: cubic between the centres of its cells, constant beyond the
        outermost ones, NaN where the model does not look."""
        left, top, right, bottom = self.region
        height, width = self.map.shape
        down, rows = _enlarge(self.size[1], height, (top, bottom), self.seen[1::2])
        across, columns = _enlarge(self.size[0], width, (left, right), self.seen[::2])
        values = (down @ self.map.astype(np.float32) @ across.T).astype(np.float32)
        values[~rows] = np.nan
        values[:, ~columns] = np.nan
        return values


def _enlarge(
    length: int, cells: int, region: tuple[float, ...], seen: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """For one axis: weights (length, cells) of each pixel, and which pixels the model sees."""
    start, stop = region
    share = (np.arange(length) + 0.5 - start) / (stop - start)
    return interpolation(share * cells - 0.5, cells), (share >= seen[0]) & (share <= seen[1])


def interpolation(places: np.ndarray, cells: int) -> np.ndarray:
    """Weights (n, cells) float32 by which values at 0, 1, … become values at `places` (n,): cubic convolution.

    Source: Keys 1981, a = -1/2; the outermost values go on beyond their ends.
    """
    places = np.clip(places, 0, cells - 1)
    low = np.floor(places).astype(np.intp)
    x = places - low
    taps = (
        ((-0.5 * x + 1) * x - 0.5) * x,
        (1.5 * x - 2.5) * x * x + 1,
        ((-1.5 * x + 2) * x + 0.5) * x,
        (0.5 * x - 0.5) * x * x,
    )
    weights = np.zeros((len(places), cells), np.float32)
    for offset, tap in enumerate(taps, -1):
        np.add.at(weights, (np.arange(len(places)), np.clip(low + offset, 0, cells - 1)), tap)
    return weights


# ── grids over the pixels ────────────────────────────────────────────────────────────────────────────────────────────


def token_place(model: nn.Module, image_size: tuple[int, int]) -> Place:
    """Where the tokens of a `ViT` or `ImagePerceiver` lie, by the centres of what they read.

    A ViT's patches, and those behind a stem, share the pixels evenly. So do pixels that are tokens. Behind the
    Perceiver's convolution and pooling, tokens read around every fourth pixel, counted from an end that the padding
    sets: the grid of the deepmind numerics lies 1.5 pixels to the right and below, that of transformers is one row and
    one column smaller.

    Args:
        image_size: (H, W) of the model's input.
    """
    height, width = image_size
    if isinstance(model, ViT):
        stride = model.config.stride
        return Place((height // stride, width // stride), (0, 0, width, height))
    assert isinstance(model, ImagePerceiver)
    config = model.config
    if config.front_end != "conv":
        return Place(image_size, (0, 0, width, height))
    same = config.numerics == "deepmind"
    (rows, top, down), (columns, left, right) = (
        _downsampled(side, config.num_stages, same) for side in (height, width)
    )
    return Place((rows, columns), (left, top, right, down))


def _downsampled(side: int, num_stages: int, same: bool) -> tuple[int, float, float]:
    """For one axis behind `ConvStage`s: how many tokens, and the two ends of the axis that they share."""
    count, first, step = side, 0.5, 1.0  # the centre of the first place, and the distance to the next
    for _ in range(num_stages):
        for kernel_size, padding in ((7, 3), (3, 0)):
            if same:
                outputs = -(-count // 2)
                padding = max((outputs - 1) * 2 + kernel_size - count, 0) // 2
            else:
                outputs = (count + 2 * padding - kernel_size) // 2 + 1
            first += ((kernel_size - 1) / 2 - padding) * step
            count, step = outputs, 2 * step
    start = first - step / 2
    return count, start, start + count * step


def cell_place(model: nn.Module, image_size: tuple[int, int]) -> Place:
    """The cells that are hidden one by one: a ViT's patches, several in one where there are more than 16 along a side;
    an eighth of each side for other models. The last ones reach beyond the pixels where they do not fit."""
    if isinstance(model, ViT):
        stride = model.config.stride
        cell = (stride * -(-max(image_size) // (stride * MAX_CELLS)),) * 2
    else:
        cell = (-(-image_size[0] // CELLS), -(-image_size[1] // CELLS))
    rows, columns = (-(-side // length) for side, length in zip(image_size, cell, strict=True))
    return Place((rows, columns), (0, 0, columns * cell[1], rows * cell[0]))


def cell_of_pixel(place: Place, image_size: tuple[int, int]) -> np.ndarray:
    """(H, W) int64: the number of the cell that each pixel is in, or is nearest to."""
    (rows, columns), (left, top, right, bottom) = place
    row, column = (
        np.clip(((np.arange(side) + 0.5 - start) / (stop - start) * count).astype(np.int64), 0, count - 1)
        for side, start, stop, count in (
            (image_size[0], top, bottom, rows),
            (image_size[1], left, right, columns),
        )
    )
    return row[:, None] * columns + column


# ── pixels ↔ original ────────────────────────────────────────────────────────────────────────────────────────────────


def in_original(place: Place, preprocess: PreprocessConfig, size: tuple[int, int]) -> dict[str, Any]:
    """`region` and `seen` of an `Explanation` whose map is on this grid, of an original of (width, height)."""
    left, top, right, bottom = place.box
    height, width = preprocess.image_size
    x0, y0, x1, y1 = preprocess.region(size)
    across, down = (x1 - x0) / width, (y1 - y0) / height  # original pixels per pixel of the model
    region = (x0 + left * across, y0 + top * down, x0 + right * across, y0 + bottom * down)
    box_width, box_height = right - left, bottom - top
    seen = (-left / box_width, -top / box_height, (width - left) / box_width, (height - top) / box_height)
    return {"region": region, "seen": seen, "size": size}


def on_cells(explanation: Explanation, preprocess: PreprocessConfig, place: Place) -> np.ndarray:
    """The map's mean over each cell of another grid of the same pixels: (h, w) float32."""
    height, width = preprocess.image_size
    x0, y0, x1, y1 = preprocess.region(explanation.size)
    left, top, right, bottom = explanation.region
    rows, columns = explanation.map.shape
    y = y0 + (np.arange(height) + 0.5) / height * (y1 - y0)
    x = x0 + (np.arange(width) + 0.5) / width * (x1 - x0)
    row, column = (
        np.clip(((at - start) / (stop - start) * count).astype(np.intp), 0, count - 1)
        for at, start, stop, count in ((y, top, bottom, rows), (x, left, right, columns))
    )
    values = explanation.map[row[:, None], column].ravel().astype(np.float64)
    cells = cell_of_pixel(place, (height, width)).ravel()
    number = place.grid[0] * place.grid[1]
    sums, counts = np.bincount(cells, values, number), np.bincount(cells, minlength=number)
    return (sums / counts).reshape(place.grid).astype(np.float32)
