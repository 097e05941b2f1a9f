"""two images → the motion of every pixel, its pictures, its files and its error.

    frames ── tiles, overlapping ──▶ model ──▶ motion of each tile ── blended ──▶ (H, W, 2) pixels

Motion is x, then y: where a pixel of the first frame is in the second, relative to where it was; x grows to the right,
y downwards.
"""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opsin.checkpoints import Checkpoint
from opsin.checkpoints.files import replacing
from opsin.device import exact_fp32
from opsin.errors import CheckpointError, FlowError, FlowFileError, FramesDiffer
from opsin.models.perceiver_io import FlowPerceiver
from opsin.preprocess import MAX_PIXELS, ImageSource, decode

MIN_OVERLAP = 20  # pixels, of neighbouring tiles; as the release's notebook
UNKNOWN = 1e9  # .flo: motion above it is not known
FORMATS = (".png", ".flo", ".npy")

_FLO_MAGIC = b"PIEH"  # 202021.25 as a little-endian float32
_NORMALISED = (np.arange(256) / 255 * 2 - 1).astype(np.float32)


class FlowModel:
    """An optical-flow network. `model` is the plain fp32 `torch.nn.Module`, which sees one tile at a time."""

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu", max_pixels: int = MAX_PIXELS) -> None:
        if not isinstance(checkpoint.model, FlowPerceiver):
            raise CheckpointError(f"{checkpoint.source.name} is no model of optical flow.")
        self.tile_size = checkpoint.model.config.image_size  # (H, W) pixels
        if min(self.tile_size) <= MIN_OVERLAP:
            raise CheckpointError(
                f"{checkpoint.source.name} has tiles of {self.tile_size} pixels; each side must be over {MIN_OVERLAP}, "
                "by which they overlap."
            )
        self.model = checkpoint.model.eval().to(device)
        self.source = checkpoint.source
        self.device = torch.device(device)
        self.max_pixels = max_pixels

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        height, width = self.tile_size
        return f"<opsin {self.source.name}: {count / 1e6:.1f}M parameters, tiles of {height}×{width} pixels>"

    def flow(
        self, image1: ImageSource, image2: ImageSource, *, on_tile: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Motion (H, W, 2) float32 from the first image to the second, in pixels, x then y.

        An image larger than a tile is cut into overlapping ones, whose results are blended: each weighs in with the
        distance to its own edge. One that is smaller is continued to the right and below with its last column and row,
        and the motion of what was added is dropped. (Enlarging it would scale the motion too.)

        Args:
            on_tile: called with the number of tiles done and of all tiles, after each.
        Raises:
            ImageError: one of them cannot be read.
            FramesDiffer: they have different sizes.
        Source: deepmind-research `perceiver/colabs/optical_flow.ipynb`, whose tiles leave the image when a side is
            less than 20 pixels more than a multiple of the step; here the number of tiles is the least that covers it.
        """
        frames = read_frames(image1, image2, max_pixels=self.max_pixels)
        height, width = frames.shape[1:3]
        tile_height, tile_width = self.tile_size
        below, right = max(0, tile_height - height), max(0, tile_width - width)
        frames = np.pad(frames, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge")
        weights = tile_weights(self.tile_size)[:, :, None]
        motion = np.zeros((*frames.shape[1:3], 2), np.float32)
        total = np.zeros((*frames.shape[1:3], 1), np.float32)
        tops, lefts = (tile_starts(*sides) for sides in zip(frames.shape[1:3], self.tile_size, strict=True))
        for done, (top, left) in enumerate(itertools.product(tops, lefts), start=1):
            tile = slice(top, top + tile_height), slice(left, left + tile_width)
            motion[tile] += self._tile(frames[:, tile[0], tile[1]]) * weights
            total[tile] += weights
            if on_tile is not None:
                on_tile(done, len(tops) * len(lefts))
        motion /= total
        return np.ascontiguousarray(motion[:height, :width])

    def _tile(self, frames: np.ndarray) -> np.ndarray:
        """(2, H, W, 3) uint8, of `tile_size` → (H, W, 2) pixels."""
        pixels = torch.from_numpy(_NORMALISED[frames].transpose(0, 3, 1, 2))[None]
        with torch.inference_mode(), exact_fp32(self.device):
            motion = self.model(pixels.to(self.device))[0].float().cpu() * FlowPerceiver.PIXELS_PER_UNIT
        if not motion.isfinite().all():
            raise CheckpointError(f"{self.source.name} gives numbers that are not finite. Check its file.")
        return motion.numpy()


def read_frames(image1: ImageSource, image2: ImageSource, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Two images of one size → (2, H, W, 3) uint8, each of which `FlowModel.flow` takes.

    Raises:
        ImageError: one of them cannot be read.
        FramesDiffer: they have different sizes.
    """
    first, second = (np.asarray(decode(image, max_pixels=max_pixels)) for image in (image1, image2))
    if first.shape != second.shape:
        sizes = [f"{frame.shape[1]} × {frame.shape[0]}" for frame in (first, second)]
        raise FramesDiffer(
            f"the first image is {sizes[0]} pixels and the second {sizes[1]}. Motion is between two of one size: "
            "give frames of the same video, or crop them to the same part."
        )
    return np.stack([first, second])


def tile_starts(length: int, tile: int) -> list[int]:
    """Where the tiles along one side begin: as few as cover it, each overlapping the next by `MIN_OVERLAP` or more.

    The last ends at the end of the side, so it may overlap by more. `length` is at least `tile`.
    """
    step = tile - MIN_OVERLAP
    count = max(1, math.ceil((length - MIN_OVERLAP) / step))
    return [*range(0, step * (count - 1), step), length - tile]


def tile_weights(size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: the distance of each pixel to the nearest edge of its tile, 1 on the edge."""
    rows, columns = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in size)
    return np.minimum(rows[:, None], columns).astype(np.float32)


def end_point_error(flow: np.ndarray, truth: np.ndarray, valid: np.ndarray | None = None) -> float:
    """Mean distance in pixels between two motions (H, W, 2), over the pixels whose true motion is known.

    Args:
        valid: (H, W) bool, which pixels count. Those whose truth is NaN or above 1e9 never do.
    Raises:
        FlowError: the shapes differ, or no pixel counts.
    """
    if flow.shape != truth.shape or flow.ndim != 3 or flow.shape[2] != 2:
        raise FlowError(f"the motion is {flow.shape} and the truth {truth.shape}; both must be the same (H, W, 2).")
    counts = _known(truth)
    if valid is not None:
        if valid.shape != counts.shape:
            raise FlowError(f"valid is {valid.shape}; the motion has {counts.shape} pixels.")
        counts &= valid.astype(bool)
    if not counts.any():
        raise FlowError("the truth is known of no pixel, so there is no error to give.")
    return float(np.hypot(*(flow[counts].astype(np.float64) - truth[counts]).T).mean())


def _known(flow: np.ndarray) -> np.ndarray:
    """(H, W) bool; comparisons with NaN are false."""
    return (np.abs(flow) <= UNKNOWN).all(axis=2)


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# Hues of the colour wheel, red to red: more of them where the eye tells more apart.
_CORNERS = np.cumsum([0, 15, 6, 4, 11, 13, 6])
_WHEEL = {  # red, yellow, green, cyan, blue, magenta, red
    0: (1, 1, 0, 0, 0, 1, 1),
    1: (0, 1, 1, 1, 0, 0, 0),
    2: (0, 0, 0, 1, 1, 1, 0),
}


def flow_to_image(flow: np.ndarray, max_motion: float | None = None) -> np.ndarray:
    """Motion (H, W, 2) as a picture (H, W, 3) uint8: hue is the direction, saturation the speed.

    Still is white; to the right red, down yellow, left blue, up violet. What is not known is black.

    Args:
        max_motion: pixels, of the full colours; faster ones are darker. Without it, the fastest of this flow.
    Raises:
        ValueError: another shape, or a max_motion that is not above 0.
    Source: Baker et al. 2007, "A Database and Evaluation Methodology for Optical Flow".
    """
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow has shape {flow.shape}; it must be (H, W, 2).")
    if max_motion is not None and not 0 < max_motion < math.inf:
        raise ValueError(f"max_motion is {max_motion}; it must be a number of pixels above 0.")
    known = _known(flow)
    x, y = np.where(known[:, :, None], flow, 0).astype(np.float64).transpose(2, 0, 1)
    speed = np.hypot(x, y)
    speed /= max_motion or speed.max(initial=0) or 1
    hue = (np.arctan2(-y, -x) / math.pi + 1) / 2 * (_CORNERS[-1] - 1)
    picture = np.empty((*known.shape, 3), np.uint8)
    for channel, corners in _WHEEL.items():
        full = np.interp(hue, _CORNERS, corners)
        colour = np.where(speed <= 1, 1 - speed * (1 - full), 0.75 * full)
        picture[..., channel] = np.where(known, 255 * colour, 0)
    return picture


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise before any work is done if `write_flow` could not write there by the name.

    Raises:
        ValueError: an unknown suffix.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f'"{Path(path).name}" ends in "{Path(path).suffix}". Known: {", ".join(FORMATS)}.')


def write_flow(path: str | os.PathLike[str], flow: np.ndarray) -> None:
    """Write motion (H, W, 2): a .png is its picture, a .flo or .npy holds the numbers. The file appears whole.

    Raises:
        ValueError: an unknown suffix, another shape.
        OSError: it cannot be written.
    """
    check_format(path)
    if flow.ndim != 3 or flow.shape[2] != 2:
        raise ValueError(f"flow has shape {flow.shape}; it must be (H, W, 2).")
    with replacing(Path(path)) as part, part.open("wb") as file:
        if Path(path).suffix.lower() == ".png":
            Image.fromarray(flow_to_image(flow)).save(file, "PNG")
        elif Path(path).suffix.lower() == ".npy":
            np.save(file, flow.astype(np.float32), allow_pickle=False)
        else:
            height, width = flow.shape[:2]
            file.write(_FLO_MAGIC + np.array([width, height], "<i4").tobytes() + flow.astype("<f4").tobytes())


def read_flow(path: str | os.PathLike[str]) -> np.ndarray:
    """Motion (H, W, 2) float32 of a .flo or .npy file; unknown motion stays as it is, NaN or above 1e9.

    Raises:
        FlowFileError: no such file, or it is not what its name says.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".flo":
            return _read_flo(path)
        if path.suffix.lower() == ".npy":
            return _read_npy(path)
    except OSError as error:
        raise FlowFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    raise FlowFileError(f'{path} ends in "{path.suffix}". Motion is read from .flo and .npy files.')


def _read_flo(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != _FLO_MAGIC:
            raise FlowFileError(f"{path} is not a .flo file: it begins with {magic!r}, not {_FLO_MAGIC!r}.")
        width, height = np.frombuffer(file.read(8).ljust(8, b"\0"), "<i4").tolist()
        size, needed = path.stat().st_size, 12 + 8 * width * height
        if width < 1 or height < 1 or width * height > MAX_PIXELS or size != needed:
            raise FlowFileError(
                f"{path} is damaged or cut short: it says {width} × {height} pixels, which take {needed:,} bytes, and "
                f"has {size:,}."
            )
        return np.frombuffer(file.read(), "<f4").reshape(height, width, 2).astype(np.float32)


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # maps what is there; a wild shape in the header is refused
    except OSError:
        raise
    except Exception as error:  # numpy raises nearly anything on a damaged header
        raise FlowFileError(f"{path} is not a .npy file of numbers: {error}") from error
    if array.ndim != 3 or array.shape[2] != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise FlowFileError(f"{path} holds {array.dtype} of shape {array.shape}; motion is floats (H, W, 2).")
    with np.errstate(over="ignore"):  # a float64 that becomes infinite is above 1e9 all the same
        return np.array(array, np.float32)
