"""Where maps lie: through resize and crop, behind convolutions, and back in the photo."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from opsin.explain.place import Explanation, Place, cell_of_pixel, cell_place, in_original, on_cells, token_place
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

CONFIGS = (
    PreprocessConfig(size=(24, 40)),
    PreprocessConfig(size=26, crop_size=(23, 21), resample="bicubic"),
    PreprocessConfig(size=26, crop_size=(23, 21), crop_rounding="half_even"),
    PreprocessConfig(size=21, crop_size=(31, 26), crop_rounding="half_even"),  # black around it
    PreprocessConfig(source_crop=(0.875, 0.7), size=(24, 40), crop_rounding="up"),
    PreprocessConfig(source_crop=(0.875, 0.875), size=(24, 24), crop_rounding="up", antialias=False),
)


def centre(weights: np.ndarray) -> tuple[float, float]:
    """(y, x) of the middle of what is bright."""
    y, x = (np.arange(side) + 0.5 for side in weights.shape)
    return float((weights.sum(1) * y).sum() / weights.sum()), float((weights.sum(0) * x).sum() / weights.sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(CONFIGS), st.integers(30, 90), st.integers(30, 90), st.floats(0.2, 0.8), st.floats(0.2, 0.8))
@example(CONFIGS[1], 31, 90, 0.5, 0.5)
def test_a_marked_square_lands_where_the_region_says(
    config: PreprocessConfig, width: int, height: int, across: float, down: float
) -> None:
    left, top, right, bottom = config.region((width, height))
    x, y = (int(a + share * (b - a)) for a, b, share in ((left, right, across), (top, bottom, down)))
    marked = np.zeros((height, width, 3), np.uint8)
    marked[max(y - 3, 0) : y + 3, max(x - 3, 0) : x + 3] = 255
    pixels = config.resize(Image.fromarray(marked))[..., 0].astype(float)
    scale = pixels.shape[0] / (bottom - top), pixels.shape[1] / (right - left)
    expected = centre(marked[..., 0].astype(float)) if marked.any() else (0, 0)
    place = (expected[0] - top) * scale[0], (expected[1] - left) * scale[1]
    inside = all(4 * s < at < side - 4 * s for at, s, side in zip(place, scale, pixels.shape, strict=True))
    if marked.any() and inside and pixels.sum() > 0:
        tolerance = 0.1 if config.antialias else 0.5  # of a pixel; without antialiasing parts of the square are skipped
        assert centre(pixels) == pytest.approx(place, abs=tolerance)


@pytest.mark.parametrize("rounding", ["down", "half_even", "up"])
@pytest.mark.parametrize("size", [(17, 30), (31, 12), (8, 9)])
def test_without_a_resize_the_region_is_exact(rounding: Any, size: tuple[int, int]) -> None:
    """Both odd margins and padding, in each rounding: the original's own pixels, counted."""
    config = PreprocessConfig(size=None, crop_size=(13, 22), crop_rounding=rounding)
    width, height = size
    numbered = np.stack([*np.mgrid[1 : height + 1, 1 : width + 1], np.zeros((height, width))], axis=2).astype(np.uint8)
    pixels = config.resize(Image.fromarray(numbered)).astype(int)
    left, top, right, bottom = config.region(size)
    assert (bottom - top, right - left) == (13, 22)
    rows, columns = pixels[..., 0].max(axis=1), pixels[..., 1].max(axis=0)
    assert [row for row in rows if row] == [y + 1 for y in range(int(top), int(bottom)) if 0 <= y < height]
    assert [column for column in columns if column] == [x + 1 for x in range(int(left), int(right)) if 0 <= x < width]
    assert int(np.argmax(rows > 0)) == max(0, -top)
    assert int(np.argmax(columns > 0)) == max(0, -left)


def test_regions_of_the_usual_kinds() -> None:
    assert PreprocessConfig(size=(224, 224)).region((640, 480)) == (0, 0, 640, 480)
    assert PreprocessConfig(size=256, crop_size=(224, 224)).region((512, 1024)) == pytest.approx((32, 288, 480, 736))
    assert PreprocessConfig.deepmind_perceiver().region((640, 480)) == (110, 30, 530, 450)
    assert PreprocessConfig(size=64, crop_size=(96, 64)).region((64, 64)) == (0, -16, 64, 80)


@pytest.mark.parametrize("numerics", ["deepmind", "transformers"])
@pytest.mark.parametrize(("num_stages", "sides"), [(1, (24, 27)), (1, (26, 33)), (2, (96, 75))])
def test_tokens_lie_in_the_middle_of_what_they_read(numerics: Any, num_stages: int, sides: tuple[int, int]) -> None:
    """A column of pixels is changed at a time: each token lies in the middle of the columns that change it."""
    config = ImagePerceiverConfig(
        image_size=sides, num_latents=2, latent_dim=8, num_blocks=1, layers_per_block=1, embed_dim=2,
        num_stages=num_stages, num_bands=2, numerics=numerics, num_classes=2,
    )  # fmt: skip
    model = ImagePerceiver(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("conv.weight"):
            nn.init.constant_(parameter, 0.1)
    place = token_place(model, sides)
    (rows, columns), (left, top, right, bottom) = place
    with torch.inference_mode():
        plain = model.embed(torch.ones(1, 3, *sides))[0, :, :2]
        assert len(plain) == rows * columns
        for axis, (count, start, stop) in enumerate(((rows, top, bottom), (columns, left, right))):
            changed = torch.ones(sides[axis], 3, *sides)
            for at in range(sides[axis]):
                changed[at].select(1 + axis, at).fill_(1000)
            tokens = model.embed(changed)[:, :, :2]
            moved = (tokens != plain).any(2).unflatten(1, place.grid).any(2 - axis).numpy()  # side, count
            for token in range(2, count - 2):
                read = np.flatnonzero(moved[:, token])
                middle = (read[0] + read[-1]) / 2 + 0.5
                assert start + (token + 0.5) * (stop - start) / count == pytest.approx(middle)


def test_tokens_of_other_front_ends_share_the_pixels() -> None:
    small: dict[str, Any] = {"num_latents": 2, "latent_dim": 8, "num_blocks": 1, "layers_per_block": 1, "num_bands": 2}
    pixels = ImagePerceiver(ImagePerceiverConfig(front_end="pixels", image_size=(6, 10), **small))
    assert token_place(pixels, (6, 10)) == ((6, 10), (0, 0, 10, 6))
    vit = ViT(ViTConfig(image_size=(24, 40), patch_size=8, embed_dim=8, num_heads=2, num_layers=1, mlp_dim=8))
    assert token_place(vit, (24, 40)) == ((3, 5), (0, 0, 40, 24))
    conv = ImagePerceiver(ImagePerceiverConfig(image_size=(224, 224), **small))
    assert token_place(conv, (224, 224)) == ((56, 56), (1.5, 1.5, 225.5, 225.5))


def test_cells() -> None:
    shape: dict[str, Any] = {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "mlp_dim": 8}
    vit = ViT(ViTConfig(image_size=(24, 40), patch_size=8, **shape))
    assert cell_place(vit, (24, 40)) == ((3, 5), (0, 0, 40, 24))
    many = ViT(ViTConfig(image_size=(74, 40), patch_size=2, **shape))  # 37 × 20 patches: three in one
    assert cell_place(many, (74, 40)) == ((13, 7), (0, 0, 42, 78))
    assert cell_place(nn.Identity(), (30, 20)) == ((8, 7), (0, 0, 21, 32))
    numbers = cell_of_pixel(cell_place(many, (74, 40)), (74, 40))
    assert numbers.shape == (74, 40)
    assert numbers[5, 5] == 0
    assert numbers[6, 0] == 7
    assert numbers[73, 39] == 13 * 7 - 1
    assert len(np.unique(numbers)) == 13 * 7


# ── a map in its photo ───────────────────────────────────────────────────────────────────────────────────────────────


def explanation(values: np.ndarray, place: Place, config: PreprocessConfig, size: tuple[int, int]) -> Explanation:
    return Explanation(
        map=values.astype(np.float32), method="rollout", layer=None, head=None, target=0, label="cat", score=0.5,
        **in_original(place, config, size),
    )  # fmt: skip


def test_a_map_on_its_photo() -> None:
    config = PreprocessConfig(size=16, crop_size=(16, 16))
    values = np.arange(16.0).reshape(4, 4)
    found = explanation(values, Place((4, 4), (0, 0, 16, 16)), config, (96, 48))
    assert found.region == (24, 0, 72, 48)
    image = found.on_image()
    assert image.shape == (48, 96)
    assert image.dtype == np.float32
    assert np.isnan(image[:, :24]).all()
    assert np.isnan(image[:, 72:]).all()
    inside = image[:, 24:72]
    assert np.isfinite(inside).all()
    means = inside[[5, 17, 29, 41]][:, [5, 17, 29, 41]] + inside[[6, 18, 30, 42]][:, [6, 18, 30, 42]]
    assert means / 2 == pytest.approx(values, abs=0.1)  # around the centres of the cells: their own values
    assert (np.diff(inside, axis=1) >= 0).all()
    assert inside[0, 0] == 0  # constant beyond the outermost centres
    assert inside[-1, -1] == 15


def test_a_map_whose_grid_reaches_beyond_the_pixels() -> None:
    """A convolution's grid lies to the right: nothing that the model sees is left out, and nothing else is shown."""
    config = PreprocessConfig(size=(16, 16))
    found = explanation(np.eye(4), Place((4, 4), (1.5, 1.5, 17.5, 17.5)), config, (32, 64))
    assert found.region == (3, 6, 35, 70)
    image = found.on_image()
    assert np.isfinite(image).all()
    assert np.unravel_index(image[:32, :16].argmax(), (32, 16)) == (0, 0)
    padded = explanation(np.eye(4), Place((4, 4), (0, 0, 16, 16)), PreprocessConfig(size=8, crop_size=(16, 16)), (8, 8))
    assert padded.region == (-4, -4, 12, 12)
    assert np.isfinite(padded.on_image()).all()


def test_a_map_on_other_cells() -> None:
    config = PreprocessConfig(size=20, crop_size=(16, 16))
    values = np.arange(64.0).reshape(8, 8)
    found = explanation(values, Place((8, 8), (0, 0, 16, 16)), config, (50, 61))
    means = values.reshape(2, 4, 4, 2).mean(axis=(1, 3))
    assert on_cells(found, config, Place((2, 4), (0, 0, 16, 16))) == pytest.approx(means)
    same = on_cells(found, config, Place((8, 8), (0, 0, 16, 16)))
    assert np.array_equal(same, found.map)
