"""What happens to an answer when parts of the image are hidden: a map of its own, and a test of all maps.

Only `Classifier.forward` is called, in whatever dtype and engine it runs, so that any classifier will do.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from opsin.explain.place import Explanation, cell_of_pixel, cell_place, on_cells
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource, PreprocessConfig

BATCH_SIZE = 32
STEPS = 16  # of a curve: its 17 points are 0, 1/16, … of the cells
BLUR = 5 / 224  # of the side: standard deviation of the blurred picture that insertion starts from


def resized(classifier: Classifier, image: ImageSource) -> tuple[np.ndarray, tuple[int, int]]:
    """(H, W, 3) as `forward` takes it, and (width, height) of the upright original."""
    return classifier.preprocess.load(image, max_pixels=classifier.max_pixels, exact_resize=True)


def probabilities(classifier: Classifier, logits: Tensor) -> np.ndarray:
    """(B, K) float64: softmax, or sigmoid where an image may have several labels."""
    many = classifier.labels is not None and classifier.labels.multi_label
    return (logits.double().sigmoid() if many else logits.double().softmax(dim=1)).numpy()


def grey(preprocess: PreprocessConfig) -> np.ndarray:
    """(3,) the colour that is 0 once it is normalised: the data's mean, or the middle of the range."""
    scale = preprocess.rescale_factor or 1.0
    return np.array(preprocess.mean or (127.5 * scale,) * 3) / scale


def occlusion(classifier: Classifier, pixels: np.ndarray, target: int) -> np.ndarray:
    """How much the target's log-probability falls when a cell is grey: (h, w) float32; below 0 where it rises.

    The cells are a ViT's patches (`cell_place`), next to one another. The logarithm keeps what a probability near one
    hides, and unlike the logit it sees when other classes gain.

    Args:
        pixels: (H, W, 3), of `resized`.
    Source: Zeiler & Fergus 2014, §4.2 "Occlusion Sensitivity".
    """
    place = cell_place(classifier.model, pixels.shape[:2])
    cells, colour = cell_of_pixel(place, pixels.shape[:2]), grey(classifier.preprocess)
    number = place.grid[0] * place.grid[1]
    pictures = (_mixed(pixels, colour, cells == cell) for cell in (-1, *range(number)))
    scores = _target_probability(classifier, pictures, target)
    scores = np.log(np.maximum(scores, np.finfo(np.float64).tiny))
    return (scores[0] - scores[1:]).reshape(place.grid).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Faithfulness:
    """Whether what a map points at is what the answer rests on; `faithfulness` says how it is measured."""

    shares: np.ndarray  # (n,) of the cells that are hidden, or shown; 0 to 1
    deletion: np.ndarray  # (n,) probability of the target; the faster it falls the better
    insertion: np.ndarray  # (n,) the faster it rises the better
    deletion_auc: float  # mean height of the curve, 0 to 1
    insertion_auc: float
    random_deletion_auc: float  # of the same cells in random order, mean of several
    random_insertion_auc: float


def faithfulness(
    classifier: Classifier, image: ImageSource, explanation: Explanation, *, random_maps: int = 8, seed: int = 0
) -> Faithfulness:
    """Deletion and insertion curves of a map, and how far random orders get.

    Deletion makes the cells of highest value grey first; insertion shows them first, on a blurred picture. The cells
    are those of `occlusion` for every map, which is averaged over each of them, so that the areas of a model's maps
    compare with one another: finer grids would destroy a picture sooner, whatever their order.

    Args:
        image: the one that was explained.
        random_maps: how many random orders; 0 makes their areas NaN.
    Raises:
        ValueError: random_maps below 0, or an image of another size than the explained one.
    Source: Petsiuk et al. 2018 (RISE), §4.3; blur and grey as in its published code, the blur in proportion to the
        side (5 pixels of 224). There are 17 points on a curve.
    """
    if random_maps < 0:
        raise ValueError(f"random_maps is {random_maps}; it must be 0 or more.")
    pixels, size = resized(classifier, image)
    if size != tuple(explanation.size):
        raise ValueError(
            f"the image is {size[0]} × {size[1]} and the explanation is of one of {explanation.size[0]} × "
            f"{explanation.size[1]}. Give the image that was explained."
        )
    image_size = (pixels.shape[0], pixels.shape[1])
    place = cell_place(classifier.model, image_size)
    cells, number = cell_of_pixel(place, image_size), place.grid[0] * place.grid[1]
    shares = np.linspace(0, 1, STEPS + 1)
    counts = np.rint(shares * number)[:, None, None]
    random = np.random.default_rng(seed)
    values = on_cells(explanation, classifier.preprocess, place).ravel()
    orders = [np.argsort(-values, kind="stable"), *(random.permutation(number) for _ in range(random_maps))]
    colour, blurred = grey(classifier.preprocess), _blurred(pixels)

    def pictures() -> Iterator[np.ndarray]:
        for order in orders:
            hidden = np.argsort(order)[cells] < counts  # n H W: by the rank of each pixel's cell
            yield from (_mixed(pixels, colour, mask) for mask in hidden)
            yield from (_mixed(blurred, pixels, mask) for mask in hidden)

    curves = _target_probability(classifier, pictures(), explanation.target).reshape(len(orders), 2, -1)
    areas = (curves[..., 1:] + curves[..., :-1]).mean(axis=2) / 2
    deletion, insertion = areas[1:].mean(axis=0) if random_maps else (np.nan, np.nan)
    return Faithfulness(
        shares=shares,
        deletion=curves[0, 0],
        insertion=curves[0, 1],
        deletion_auc=float(areas[0, 0]),
        insertion_auc=float(areas[0, 1]),
        random_deletion_auc=float(deletion),
        random_insertion_auc=float(insertion),
    )


def _target_probability(classifier: Classifier, pictures: Iterator[np.ndarray], target: int) -> np.ndarray:
    """(n,) float64."""
    found = []
    while batch := list(itertools.islice(pictures, BATCH_SIZE)):
        found.append(probabilities(classifier, classifier.forward(batch))[:, target])
    return np.concatenate(found)


def _mixed(pixels: np.ndarray, other: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) `pixels`, but `other` (H, W, 3) or (3,) where `mask` (H, W) is."""
    mixed = np.where(mask[:, :, None], other, pixels)
    return np.rint(mixed).astype(np.uint8) if pixels.dtype == np.uint8 else mixed.astype(np.float32)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3), the same type."""
    sigma = max(pixels.shape[:2]) * BLUR
    reach = max(int(np.ceil(3 * sigma)), 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    blurred = pixels.astype(np.float64)
    for axis in (0, 1):
        padding = [(reach, reach) if each == axis else (0, 0) for each in range(3)]
        padded = np.pad(blurred, padding, mode="edge")
        length = blurred.shape[axis]
        blurred = sum(weight * padded.take(range(start, start + length), axis) for start, weight in enumerate(kernel))
    return np.rint(blurred).astype(np.uint8) if pixels.dtype == np.uint8 else blurred.astype(np.float32)
