import math
import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from opsin.preprocess import PreprocessConfig
from opsin.train import augment
from opsin.train.augment import (
    IMAGENET_POLICY,
    OPERATIONS,
    Augment,
    CropBy,
    augment_of,
    auto_augment,
    drop_tokens,
    erase,
    mix,
    rand_augment,
    random_crop,
    soft_targets,
)
from opsin.train.config import TrainConfig

SURE = 1e-4  # p-value below which a fixed sample is not of the distribution


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise over a slope: every byte occurs, no channel is like another."""
    random = np.random.default_rng([height, width, seed])
    slope = np.linspace(0, 200, width)[None, :, None] * np.array([1.0, 0.6, 0.3])
    return Image.fromarray((slope + random.uniform(0, 55, (height, width, 3))).astype(np.uint8))


# ── the operations, restated ─────────────────────────────────────────────────────────────────────────────────────────


def enhance(degenerate: np.ndarray, pixels: np.ndarray, level: float) -> np.ndarray:
    factor = level / 10 * 1.8 + 0.1
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255).astype(np.uint8)


def grey_of(pixels: np.ndarray) -> np.ndarray:
    return np.round(pixels @ np.array([0.299, 0.587, 0.114]))[..., None]


def smooth(pixels: np.ndarray) -> np.ndarray:
    out = pixels.astype(float)
    height, width = pixels.shape[:2]
    total = sum(
        (5 if (y, x) == (1, 1) else 1) * pixels[y : y + height - 2, x : x + width - 2].astype(float)
        for y in range(3)
        for x in range(3)
    )
    out[1:-1, 1:-1] = np.round(np.asarray(total) / 13)
    return out


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    return np.clip(pixels * (255 / (high - low)) - low * (255 / (high - low)), 0, 255).astype(np.uint8)


def equalize(pixels: np.ndarray) -> np.ndarray:
    out = np.empty_like(pixels)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        table = (np.concatenate([[0], counts.cumsum()[:-1]]) + step // 2) // step
        out[..., channel] = table.clip(0, 255)[pixels[..., channel]]
    return out


# operation → (its definition on bytes and a level, how far Pillow's rounding may be off)
DEFINITIONS: dict[str, tuple[Any, int]] = {
    "AutoContrast": (lambda p, level: auto_contrast(p), 1),
    "Equalize": (lambda p, level: equalize(p), 0),
    "Invert": (lambda p, level: 255 - p, 0),
    "Posterize": (lambda p, level: p >> (8 - max(int(level / 10 * 4), 1)) << (8 - max(int(level / 10 * 4), 1)), 0),
    "Solarize": (lambda p, level: np.where(p < int(level / 10 * 256), p, 255 - p), 0),
    "SolarizeAdd": (lambda p, level: np.where(p < 128, np.minimum(p.astype(int) + int(level * 11), 255), p), 0),
    "Color": (lambda p, level: enhance(grey_of(p), p, level), 1),
    "Contrast": (lambda p, level: enhance(np.floor(grey_of(p).mean() + 0.5), p, level), 1),
    "Brightness": (lambda p, level: enhance(np.zeros(1), p, level), 1),
    "Sharpness": (lambda p, level: enhance(smooth(p), p, level), 1),
}


@pytest.mark.parametrize("level", [0, 3, 5, 10, 20])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_colour_operations_are_their_definitions(name: str, level: int) -> None:
    image = photo(53, 71)
    definition, off = DEFINITIONS[name]
    got = np.asarray(OPERATIONS[name](image, level, rng(0)))
    want = definition(np.asarray(image), level)
    # what is off before blending is magnified by a factor above 1
    assert np.abs(got.astype(int) - want.astype(int)).max() <= off * max(1, math.ceil(level / 10 * 1.8 + 0.1))


def moved(pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Pixels read at rounded places, TensorFlow's way; grey where there are none."""
    height, width = pixels.shape[:2]
    rows, columns = (np.floor(np.broadcast_to(at, (height, width)) + 0.5).astype(int) for at in (rows, columns))
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return np.where(inside[..., None], pixels[rows.clip(0, height - 1), columns.clip(0, width - 1)], 128)


def rotated(pixels: np.ndarray, degrees: float) -> np.ndarray:
    (height, width), angle = pixels.shape[:2], math.radians(degrees)
    y, x = np.mgrid[:height, :width]
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    return moved(
        pixels,
        math.sin(angle) * x + math.cos(angle) * y + (height - 1) / 2,
        math.cos(angle) * x - math.sin(angle) * y + (width - 1) / 2,
    )


MOVES: dict[str, Any] = {
    "Rotate": lambda p, x, y, level: rotated(p, level / 10 * 30),
    "ShearX": lambda p, x, y, level: moved(p, y, x + level / 10 * 0.3 * y),
    "ShearY": lambda p, x, y, level: moved(p, y + level / 10 * 0.3 * x, x),
    "TranslateX": lambda p, x, y, level: moved(p, y, x + level / 10 * p.shape[1] * 100 / 224),
    "TranslateY": lambda p, x, y, level: moved(p, y + level / 10 * p.shape[0] * 100 / 224, x),
}


@pytest.mark.parametrize("level", [1, 4, 9, 20])  # 5 would shear rows to halfway between two pixels
@pytest.mark.parametrize("name", MOVES)
def test_moves_read_the_nearest_pixel_and_go_either_way(name: str, level: int) -> None:
    image = photo(53, 71)
    pixels, (y, x) = np.asarray(image), np.mgrid[:53, :71]
    wanted = [MOVES[name](pixels, x, y, signed) for signed in (level, -level)]
    seen = Counter[int]()
    for seed in range(20):
        got = np.asarray(OPERATIONS[name](image, level, rng(seed)))
        # Pillow counts in 1/65536 pixels: near the middle between two it may take the other
        same = [(got == want).all(2).mean() for want in wanted]
        seen[int(np.argmax(same))] += 1
        assert max(same) > 0.98
    assert set(seen) == {0, 1}


def test_moves_of_a_picture_of_224_are_the_originals_in_pixels() -> None:
    image = photo(224, 224)
    pixels = np.asarray(image)
    for seed in range(4):
        got = np.asarray(OPERATIONS["TranslateX"](image, 10, rng(seed)))
        left, right = got[:, :100], got[:, -100:]
        assert ((left == 128).all() and (got[:, 100:] == pixels[:, :-100]).all()) or (
            (right == 128).all() and (got[:, :-100] == pixels[:, 100:]).all()
        )


@pytest.mark.parametrize(("height", "width", "down", "across"), [(224, 224, 20, 20), (112, 56, 10, 5), (7, 3, 0, 0)])
def test_cutout_is_a_grey_box_around_any_pixel(height: int, width: int, down: int, across: int) -> None:
    image = Image.new("RGB", (width, height), (1, 2, 3))
    centres = set()
    for seed in range(60):
        cut = np.asarray(OPERATIONS["Cutout"](image, 5, rng(seed)))
        grey = (cut == 128).all(2)
        assert (grey | (cut == (1, 2, 3)).all(2)).all()
        rows, columns = (np.flatnonzero(grey.any(axis)) for axis in (1, 0))
        assert grey.sum() == len(rows) * len(columns)
        assert len(rows) <= 2 * down
        assert len(columns) <= 2 * across
        centres.add((len(rows), len(columns)))
    assert (2 * down, 2 * across) in centres  # whole somewhere
    assert not down or len(centres) > 2  # clipped elsewhere
    assert (np.asarray(image) == (1, 2, 3)).all()


def test_every_operation_is_tested() -> None:
    assert set(OPERATIONS) == {*DEFINITIONS, *MOVES, "Cutout"}
    assert len(OPERATIONS) == 16


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Every operation writes down its name and level, and does nothing else."""
    seen: list[tuple[str, float]] = []

    def recorder(name: str) -> Any:
        def operation(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
            seen.append((name, level))
            return image

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, recorder(name))
    return seen


def test_rand_augment_draws_operations_evenly_and_with_repetition(calls: list[tuple[str, float]]) -> None:
    random = rng(1)
    for _ in range(800):
        rand_augment(Image.new("RGB", (1, 1)), 3, 15, random)
    assert len(calls) == 2400
    assert {level for _, level in calls} == {15}
    counts = Counter(name for name, _ in calls)
    assert stats.chisquare([counts[name] for name in OPERATIONS]).pvalue > SURE
    layers = [[name for name, _ in calls[i : i + 3]] for i in range(0, 2400, 3)]
    assert 80 < sum(len(set(names)) < 3 for names in layers) < 220  # expected 800 · (1 − 15/16 · 14/16) = 144


def test_auto_augment_draws_rows_evenly_and_each_operation_at_its_rate(calls: list[tuple[str, float]]) -> None:
    random, times = rng(2), 10_000
    for _ in range(times):
        auto_augment(Image.new("RGB", (1, 1)), random)
    expected = Counter[tuple[str, float]]()
    for name, rate, level in (operation for row in IMAGENET_POLICY for operation in row):
        expected[name, level] += rate * times / 25  # type: ignore[assignment]
    counts = Counter(calls)
    for operation in expected | counts:
        assert abs(counts[operation] - expected[operation]) <= 5 * math.sqrt(expected[operation]), operation


def test_the_imagenet_policy_has_25_rows_of_known_operations() -> None:
    assert len(IMAGENET_POLICY) == len(set(IMAGENET_POLICY)) == 25
    assert {name for row in IMAGENET_POLICY for name, _, _ in row} <= set(OPERATIONS)


# ── the crop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def boxes(height: int, width: int, min_area: float, by: CropBy, num: int = 4000) -> np.ndarray:
    """(N, 4): top, left, height, width."""
    random = rng(3)
    drawn = np.array([random_crop(height, width, min_area, random, by=by) for _ in range(num)])
    left, top, right, bottom = drawn.T
    return np.stack([top, left, bottom - top, right - left], 1)


def test_crops_by_area_are_uniform_in_area_and_in_the_logarithm_of_the_aspect() -> None:
    top, left, height, width = boxes(1501, 1499, 0.1, "area").T
    area, aspect = height * width / (1501 * 1499), width / height
    fits = area < 0.74  # whatever the aspect; of the larger ones, some are drawn again
    assert stats.kstest(area[fits], stats.uniform(0.1, 0.64).cdf).pvalue > SURE
    assert stats.kstest(np.log(aspect[fits]), stats.uniform(math.log(3 / 4), 2 * math.log(4 / 3)).cdf).pvalue > SURE
    assert stats.kstest(top / (1501 - height + 1), "uniform").pvalue > SURE
    assert stats.kstest(left / (1499 - width + 1), "uniform").pvalue > SURE


def test_crops_by_side_are_uniform_in_height_and_aspect() -> None:
    top, left, height, width = boxes(1501, 1499, 0.1, "side").T
    aspect = width / height
    assert stats.kstest(aspect, stats.uniform(3 / 4, 4 / 3 - 3 / 4).cdf).pvalue > SURE
    low, high = np.sqrt(0.1 * 1501 * 1499 / aspect), np.minimum(1501, 1499 / aspect)
    assert stats.kstest((height - low) / (high - low), "uniform").pvalue > SURE
    assert stats.kstest(top / (1501 - height + 1), "uniform").pvalue > SURE
    assert stats.kstest(left / (1499 - width + 1), "uniform").pvalue > SURE


def test_means_of_the_two_crops_are_the_documented_ones() -> None:
    for by, mean in (("area", 0.46), ("side", 0.38)):
        _, _, height, width = boxes(503, 503, 0.05, by, 8000).T  # type: ignore[arg-type]
        assert abs((height * width / 503**2).mean() - mean) < 0.012


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    min_area=st.floats(0.001, 1),
    by=st.sampled_from(["area", "side"]),
    seed=st.integers(0, 99),
)
def test_crops_lie_inside_and_keep_to_area_and_aspect(
    height: int, width: int, min_area: float, by: CropBy, seed: int
) -> None:
    left, top, right, bottom = random_crop(height, width, min_area, rng(seed), by=by)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    box_height, box_width = bottom - top, right - left
    if (box_height, box_width) == (height, width):
        return
    # by the half pixel that rounding takes or gives on each side
    assert (box_width + 0.5) / (box_height - 0.5) >= 3 / 4
    assert (box_width - 0.5) / (box_height + 0.5) <= 4 / 3
    if by == "side":
        assert box_height * box_width >= min_area * height * width


def test_crops_that_never_fit_fall_back() -> None:
    assert random_crop(10, 101, 0.5, rng(0)) == (44, 0, 57, 10)
    assert random_crop(101, 10, 0.5, rng(0)) == (0, 44, 10, 57)
    assert random_crop(10, 101, 0.5, rng(0), by="side") == (0, 0, 101, 10)


# ── Augment ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_crop_is_resized_from_its_box_by_pillow() -> None:
    image = photo(83, 61)
    for seed in range(5):
        got = Augment(min_crop_area=0.2, flip_rate=0, resample="bicubic")(image, (11, 13), rng(seed))
        box = random_crop(83, 61, 0.2, rng(seed))
        assert np.array_equal(got, np.asarray(image.resize((13, 11), Image.Resampling.BICUBIC, box)))
        # the border aside, where the filter reads past the box, as if cropped before
        cropped = np.asarray(image.crop(box).resize((13, 11), Image.Resampling.BICUBIC))
        assert np.array_equal(got[2:-2, 2:-2], cropped[2:-2, 2:-2])


def test_crops_follow_crop_by() -> None:
    image = photo(83, 61)
    by_side = Augment(min_crop_area=0.2, flip_rate=0, crop_by="side")(image, (29, 31), rng(5))
    box = random_crop(83, 61, 0.2, rng(5), by="side")
    assert np.array_equal(by_side, np.asarray(image.resize((31, 29), Image.Resampling.BILINEAR, box)))


def test_flips_mirror_left_and_right_at_their_rate() -> None:
    image = photo(11, 13)
    whole, pixels = Augment(min_crop_area=1, flip_rate=0.3), np.asarray(image)
    flipped = 0
    for seed in range(400):
        got = whole(image, (11, 13), rng(seed))
        mirrored = np.array_equal(got, pixels[:, ::-1])
        assert mirrored or np.array_equal(got, pixels)
        flipped += mirrored
    assert 80 < flipped < 160
    assert np.array_equal(Augment(min_crop_area=1, flip_rate=1)(image, (11, 13), rng(0)), pixels[:, ::-1])


@settings(max_examples=60, deadline=None)
@given(
    source=st.tuples(st.integers(1, 41), st.integers(1, 41)),
    size=st.tuples(st.integers(1, 37), st.integers(1, 37)),
    policy=st.sampled_from([{}, {"rand_augment": (4, 5)}, {"rand_augment": (3, 30)}, {"auto_augment": True}]),
    seed=st.integers(0, 999),
)
def test_any_image_gets_the_asked_size(
    source: tuple[int, int], size: tuple[int, int], policy: dict[str, Any], seed: int
) -> None:
    pixels = Augment(**policy)(photo(*source), size, rng(seed))
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert pixels.flags.owndata


@pytest.mark.parametrize("policy", [{"rand_augment": (2, 15)}, {"auto_augment": True}])
def test_a_sample_is_a_function_of_seed_epoch_and_index(policy: dict[str, Any]) -> None:
    image = photo(47, 59)
    here = Augment(**policy)
    elsewhere = pickle.loads(pickle.dumps(here))  # in another process
    seen = set()
    for seed, epoch, index in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        np.random.seed(index)  # must not matter
        first = here(image, (23, 29), rng(seed, epoch, index))
        np.random.seed(7)
        assert np.array_equal(first, elsewhere(image, (23, 29), rng(seed, epoch, index)))
        seen.add(first.tobytes())
    assert len(seen) == 4
    assert np.array_equal(np.asarray(image), np.asarray(photo(47, 59)))


VIEWS = {
    "squash": PreprocessConfig(size=(32, 48)),
    "crop": PreprocessConfig(size=40, crop_size=(32, 32), resample="bicubic"),
    "crop of a squash": PreprocessConfig(size=(40, 60), crop_size=(32, 48)),
    "source crop": PreprocessConfig(size=(32, 48), source_crop=(0.875, 0.875)),
    "no resize": PreprocessConfig(size=None, crop_size=(32, 48)),
    "floats": PreprocessConfig.jax_squash((32, 48)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_without_a_crop_the_view_is_that_of_evaluation(name: str) -> None:
    preprocess, image = VIEWS[name], photo(83, 71)
    config = TrainConfig(init="x", steps=1, min_crop_area=1, flip_rate=0)
    plain = augment_of(config, preprocess)
    got = plain(image, preprocess.image_size, rng(0))
    assert np.array_equal(got, np.rint(preprocess.resize(image)))
    height, width = preprocess.image_size
    larger = plain(image, (2 * height, 2 * width), rng(0))
    assert larger.shape == (2 * height, 2 * width, 3)
    if preprocess.size is not None:  # else there is no scale to keep
        halved = np.asarray(Image.fromarray(larger).resize((width, height), Image.Resampling.BOX))
        assert np.abs(halved.astype(int) - got).mean() < 12  # noise aside the same view: a shifted one is 20 off
        shifted = np.roll(halved, 4, axis=1)
        assert np.abs(shifted.astype(int) - got).mean() > 1.3 * np.abs(halved.astype(int) - got).mean()


def test_augment_of_takes_every_field_of_the_config() -> None:
    config = TrainConfig(init="x", steps=1, min_crop_area=0.3, flip_rate=0.25, rand_augment=(2, 15))
    preprocess = PreprocessConfig(resample="bicubic")
    wanted = Augment(min_crop_area=0.3, flip_rate=0.25, rand_augment=(2, 15), resample="bicubic", evaluation=preprocess)
    assert augment_of(config, preprocess) == wanted
    config = TrainConfig(init="x", steps=1, auto_augment=True)
    assert augment_of(config, preprocess) == Augment(auto_augment=True, resample="bicubic", evaluation=preprocess)


def test_policies_are_applied_after_resizing(calls: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def operation(image: Image.Image, level: float, rng: np.random.Generator) -> Image.Image:
        sizes.append(image.size)
        return image

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, operation)
    Augment(rand_augment=(3, 5))(photo(83, 61), (29, 31), rng(0))
    assert sizes == [(31, 29)] * 3


def test_messages_of_augment() -> None:
    with pytest.raises(ValueError, match=r'resample is "cubic"\. Known: nearest, lanczos, bilinear, '):
        Augment(resample="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'crop_by is "size"\. Known: area, side\.'):
        Augment(crop_by="size")  # type: ignore[arg-type]
    for value in ((2, 31), (-1, 5), (2, -0.5)):
        with pytest.raises(ValueError, match=r"rand_augment is \(.*\); it must be \(layers, magnitude\), at least 0 "):
            Augment(rand_augment=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'the image is "L"; it must be "RGB", as `decode` gives it\.'):
        Augment()(Image.new("L", (3, 2)), (5, 7), rng(0))


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def batch(num: int, height: int = 13, width: int = 17, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Image i is filled with i; its target is its own."""
    pixels = torch.arange(num).float()[:, None, None, None].expand(-1, 3, height, width).contiguous()
    return pixels, soft_targets(torch.arange(num) % classes, classes)


@pytest.mark.parametrize("num", [1, 2, 5, 6])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixing_keeps_shapes_sums_and_its_input(num: int, alphas: tuple[float, float]) -> None:
    pixels, targets = batch(num)
    before = pixels.clone(), targets.clone()
    for seed in range(8):
        mixed, shares = mix(pixels, targets, mixup=alphas[0], cutmix=alphas[1], generator=generator(seed))
        again, _ = mix(pixels, targets, mixup=alphas[0], cutmix=alphas[1], generator=generator(seed))
        assert mixed.shape == pixels.shape
        assert mixed.dtype == shares.dtype == torch.float32
        assert torch.allclose(shares.sum(1), torch.ones(num))
        assert shares.min() >= 0
        assert torch.equal(mixed, again)
        assert torch.equal(pixels, before[0])
        assert torch.equal(targets, before[1])
        if num == 1:
            assert torch.allclose(mixed, pixels)
            assert torch.allclose(shares, targets)


def test_nothing_is_mixed_where_both_are_off() -> None:
    pixels, targets = batch(3)
    mixed, shares = mix(pixels, targets, mixup=0, cutmix=0, generator=generator(0))
    assert mixed is pixels
    assert shares is targets


def weights(shares: torch.Tensor, partner: list[int]) -> list[float]:
    return [float(row[j]) for row, j in zip(shares, partner, strict=True)]


def test_mixup_weighs_pixels_and_targets_alike_against_the_reversed_batch() -> None:
    pixels, targets = batch(5)
    drawn = []
    for seed in range(600):
        mixed, shares = mix(pixels, targets, mixup=0.4, cutmix=0, generator=generator(seed))
        weight = float(shares[0, 0])
        drawn.append(weight)
        wanted = weight * pixels + (1 - weight) * pixels.flip(0)
        assert torch.allclose(mixed, wanted, atol=1e-5)
        assert torch.allclose(shares, weight * targets + (1 - weight) * targets.flip(0), atol=1e-6)
    assert stats.kstest(drawn, stats.beta(0.4, 0.4).cdf).pvalue > SURE


def test_cutmix_pastes_a_box_whose_share_is_the_weight() -> None:
    pixels, targets = batch(4)
    areas = []
    for seed in range(300):
        mixed, shares = mix(pixels, targets, mixup=0, cutmix=1.0, generator=generator(seed))
        for i in range(4):
            pasted = mixed[i] == 3 - i
            assert (pasted | (mixed[i] == i)).all()
            assert (pasted == pasted[0]).all()  # all channels
            rows, columns = pasted[0].any(1).nonzero()[:, 0], pasted[0].any(0).nonzero()[:, 0]
            count = int(pasted[0].sum())
            assert count == len(rows) * len(columns)
            assert float(shares[i, 3 - i]) == pytest.approx(count / (13 * 17), abs=1e-7)
            assert float(shares[i, i]) == pytest.approx(1 - count / (13 * 17), abs=1e-7)
        areas.append(count / (13 * 17))
    assert len(set(areas)) > 50
    # λ is uniform, so the share s of a side is √(1 − λ); of it the border takes s²/4 on average
    share = np.linspace(0, 1, 10_001)
    expected = float(((np.sqrt(share) - share / 4) ** 2).mean())
    assert abs(np.mean(areas) - expected) < 0.06


@pytest.mark.parametrize(("num", "half"), [(6, 3), (5, 3)])
def test_with_both_on_each_has_its_half_of_the_batch(num: int, half: int) -> None:
    pixels, targets = batch(num)
    pasted = 0
    for seed in range(30):
        mixed, shares = mix(pixels, targets, mixup=1.0, cutmix=1.0, generator=generator(seed))
        weight = float(shares[0, 0])
        assert torch.allclose(mixed[:half], weight * pixels[:half] + (1 - weight) * pixels[:half].flip(0), atol=1e-5)
        assert not shares[:half, half:].any()
        assert not shares[half:, :half].any()
        whole = torch.isin(mixed[half:], torch.arange(half, num).float())
        assert whole.all()
        pasted += bool((mixed[half] == num - 1).any())
    assert pasted > 20


def test_an_empty_batch_stays_empty() -> None:
    mixed, shares = mix(torch.empty(0, 3, 0, 0), torch.empty(0, 7), mixup=1, cutmix=1, generator=generator(0))
    assert mixed.shape == (0, 3, 0, 0)
    assert shares.shape == (0, 7)
    assert erase(torch.empty(0, 3, 0, 0), 1.0, generator=generator(0)).shape == (0, 3, 0, 0)


@pytest.mark.parametrize(
    "targets", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 7), torch.zeros(3, 7, dtype=torch.int64)]
)
def test_mix_takes_shares_only(targets: torch.Tensor) -> None:
    pixels, _ = batch(3)
    with pytest.raises(ValueError, match=r"to mix 3 images they must be float \(3, K\)\. See `soft_targets`\."):
        mix(pixels, targets, mixup=1, cutmix=0, generator=generator(0))


def test_soft_targets() -> None:
    hard = torch.tensor([2, 0])
    assert torch.equal(soft_targets(hard, 3), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    smooth = soft_targets(hard, 4, 0.1)
    assert torch.allclose(smooth, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    several = torch.tensor([[1, 0, 1, 0]], dtype=torch.uint8)
    assert torch.allclose(soft_targets(several, 4, 0.2), torch.tensor([[0.85, 0.05, 0.85, 0.05]]))
    assert soft_targets(several, 4).dtype == torch.float32
    for wrong in (torch.zeros(2, 5), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"targets have shape \(2, .*\); they must be \(B,\) or \(B, 3\)\."):
            soft_targets(wrong, 3)


def test_smoothing_and_mixing_commute() -> None:
    pixels, targets = batch(5)
    _, first = mix(pixels, soft_targets(targets, 7, 0.1), mixup=0.5, cutmix=1, generator=generator(4))
    _, shares = mix(pixels, targets, mixup=0.5, cutmix=1, generator=generator(4))
    assert torch.allclose(first, soft_targets(shares, 7, 0.1), atol=1e-7)


def test_erased_rectangles_have_the_papers_areas_aspects_and_rate() -> None:
    num, height, width = 1000, 83, 89
    pixels = torch.full((num, 2, height, width), 100.0)
    erased = erase(pixels, 0.4, generator=generator(0))
    assert (pixels == 100).all()
    changed = erased != 100
    assert (changed[:, 0] == changed[:, 1]).all()
    hit = changed[:, 0].flatten(1).any(1)
    assert stats.binomtest(int(hit.sum()), num, 0.4).pvalue > SURE
    heights, widths = changed[hit, 0].any(2).sum(1).numpy(), changed[hit, 0].any(1).sum(1).numpy()
    areas = changed[hit, 0].flatten(1).sum(1).numpy()
    assert np.array_equal(areas, heights * widths)
    assert areas.min() >= 0.018 * height * width
    assert areas.max() <= 0.345 * height * width
    # a large and flat one may be drawn again, so: the area of those that fit whatever their aspect
    small = areas / (height * width) < 0.27
    assert stats.kstest(areas[small] / (height * width), stats.uniform(0.02, 0.25).cdf).pvalue > SURE
    low = math.log(0.3)
    assert stats.kstest(np.log(heights / widths)[small], stats.uniform(low, -2 * low).cdf).pvalue > SURE
    first = changed[hit, 0].flatten(1).int().argmax(1).numpy()
    tops, lefts = first // width, first % width
    assert stats.kstest(tops / (height - heights + 1), "uniform").pvalue > SURE
    assert stats.kstest(lefts / (width - widths + 1), "uniform").pvalue > SURE
    noise = erased[changed]
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    a, b = erased[hit, 0][changed[hit, 0]], erased[hit, 1][changed[hit, 1]]
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.01


def test_erased_rectangles_lie_inside_and_reach_every_border() -> None:
    """In a flat image two draws in three are too high; the first that fits is taken, and never cut at a border."""
    pixels = torch.zeros(400, 1, 7, 61)
    changed = (erase(pixels, 1.0, generator=generator(1)) != 0)[:, 0]
    heights, widths, areas = changed.any(2).sum(1), changed.any(1).sum(1), changed.flatten(1).sum(1)
    assert torch.equal(heights * widths, areas)
    assert 375 < (areas > 0).sum() < 400  # expected 400 · (1 − (2/3)¹⁰) = 393
    assert heights.max() == 6
    assert areas[areas > 0].min() >= 0.02 * 7 * 61 - 4
    aspects = heights[areas > 0] / widths[areas > 0]
    assert aspects.min() > 0.2  # 0.3, and what rounding does to two rows
    assert aspects.max() < 1 / 0.2
    for border in (changed[:, 0], changed[:, -1], changed[..., 0], changed[..., -1]):
        assert border.any()


def test_erasing_is_repeatable_keeps_the_type_and_may_leave_thin_images() -> None:
    pixels = torch.zeros(5, 3, 11, 13, dtype=torch.bfloat16)
    first = erase(pixels, 1.0, generator=generator(3))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, erase(pixels, 1.0, generator=generator(3)))
    assert not torch.equal(first, erase(pixels, 1.0, generator=generator(4)))
    assert (first != 0).flatten(1).any(1).all()
    assert erase(pixels, 0.0, generator=generator(0)) is pixels
    thin = torch.zeros(5, 3, 1, 200)
    assert torch.equal(erase(thin, 1.0, generator=generator(0)), thin)


@pytest.mark.parametrize("seed", range(3))
def test_beta_is_drawn_from_the_generator(seed: int) -> None:
    source = generator(seed)
    first, second = augment._beta(1.0, source), augment._beta(1.0, source)
    assert first != second
    assert augment._beta(1.0, generator(seed)) == first


@given(keep=st.integers(1, 12), seed=st.integers(0, 9))
def test_kept_tokens_are_distinct_tokens_of_their_own_image(keep: int, seed: int) -> None:
    tokens = torch.arange(3 * 11).float().view(3, 11, 1)
    kept = drop_tokens(tokens, keep, generator=generator(seed))
    assert kept.shape == (3, min(keep, 11), 1)
    for image, row in enumerate(kept[:, :, 0]):
        assert len(set(row.tolist())) == len(row)
        assert ((row >= image * 11) & (row < image * 11 + 11)).all()
