"""Operations, policy, crops, erasing and mixing are those of timm where timm has the original's."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation

from opsin.train import augment
from opsin.train.augment import IMAGENET_POLICY, OPERATIONS, erase, mix, random_crop, soft_targets

# timm's default is a move of 250 pixels, bicubic or bilinear
HPARAMS = {"translate_const": 100, "img_mean": (128, 128, 128), "interpolation": Image.Resampling.NEAREST}
SURE = 1e-4


@pytest.fixture
def image(photos: Any) -> Image.Image:
    return Image.open(sorted(photos.glob("*.jpg"))[0]).convert("RGB").resize((224, 224))


def timm_op(name: str, image: Image.Image, level: float) -> np.ndarray:
    operation = timm_ops.AugmentOp(name, prob=1.0, magnitude=level, hparams={**HPARAMS, "magnitude_max": 30})
    return np.asarray(operation(image))


@pytest.mark.parametrize("level", [3, 5, 10])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"Cutout"}))
def test_operations(name: str, level: int, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 224 and level 3 or more all agree to the bit, shears aside, which timm counts from half a pixel further on.

    Above 10 timm cuts Solarize and SolarizeAdd off where the original does not; below 2.5 Posterize gives it black.
    """
    monkeypatch.setattr(random, "random", lambda: 0.0)  # timm's sign: plus
    theirs = timm_op(name, image, level)
    ours = [np.asarray(OPERATIONS[name](image, level, np.random.default_rng(seed))) for seed in range(8)]
    if name.startswith("Shear"):
        along = 1 if name == "ShearX" else 0
        nearby = [np.roll(theirs, step, along) for step in (-1, 0, 1)]
        # of pixels a move by one column either way accounts for all but the seam
        assert max(np.any([(own == near).all(2) for near in nearby], 0).mean() for own in ours) > 0.99
    else:
        assert any(np.array_equal(own, theirs) for own in ours)


def test_the_policy_is_timms_v0() -> None:
    theirs = [
        tuple((op.name.removesuffix("Rel"), op.prob, op.magnitude) for op in row)
        for row in timm_ops.auto_augment_policy_v0(HPARAMS)
    ]
    assert tuple(theirs) == IMAGENET_POLICY


def test_rand_augment_has_timms_operations_and_cutout() -> None:
    # timm left Cutout, which it has as random erasing, out of the list
    assert set(timm_ops._RAND_TRANSFORMS) - {"TranslateXRel", "TranslateYRel"} == set(OPERATIONS) - {
        "Cutout",
        "TranslateX",
        "TranslateY",
    }


@pytest.mark.parametrize(("height", "width"), [(301, 307), (101, 499), (499, 61)])
def test_crops_are_of_one_distribution(height: int, width: int) -> None:
    random.seed(0)
    torch.manual_seed(0)
    image, generator = Image.new("RGB", (width, height)), np.random.default_rng(0)
    theirs = np.array(
        [
            RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)
        ]  # top, left, height, width
    )
    boxes = np.array([random_crop(height, width, 0.08, generator) for _ in range(3000)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > SURE
    areas = [boxes[:, 2] * boxes[:, 3] for boxes in (ours, theirs)]
    assert stats.ks_2samp(*areas).pvalue > SURE


def test_erasing_is_of_one_distribution() -> None:
    random.seed(0)
    torch.manual_seed(0)
    pixels = torch.full((1200, 1, 37, 61), 100.0)
    theirs = RandomErasing(0.5, mode="pixel", device="cpu")(pixels.clone())
    ours = erase(pixels, 0.5, generator=torch.Generator().manual_seed(0))
    sides = []
    for erased in (ours, theirs):
        changed = (erased != 100)[:, 0]
        changed = changed[changed.flatten(1).any(1)]
        sides.append((len(changed), changed.any(2).sum(1), changed.any(1).sum(1), changed.flatten(1).sum(1)))
    assert abs(sides[0][0] - sides[1][0]) < 90
    for mine, other in zip(sides[0][1:], sides[1][1:], strict=True):
        assert stats.ks_2samp(mine, other).pvalue > SURE


@pytest.mark.parametrize("num", [2, 6])
def test_mixup(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, classes = torch.randn(num, 3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(num)
    monkeypatch.setattr(augment, "_beta", lambda alpha, generator: 0.3)
    theirs = Mixup(mixup_alpha=0.8, num_classes=11, label_smoothing=0.1)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.3, False))
    mixed, shares = mix(
        pixels, soft_targets(classes, 11, 0.1), mixup=0.8, cutmix=0, generator=torch.Generator().manual_seed(0)
    )
    their_pixels, their_shares = theirs(pixels.clone(), classes)
    torch.testing.assert_close(mixed, their_pixels)
    torch.testing.assert_close(shares, their_shares)


def test_soft_targets() -> None:
    classes = torch.tensor([3, 0, 6])
    torch.testing.assert_close(soft_targets(classes, 7, 0.1), mixup_target(classes, 7, lam=1.0, smoothing=0.1))


def test_cutmix_boxes_are_of_one_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "_beta", lambda alpha, generator: 0.55)
    theirs = Mixup(mixup_alpha=0, cutmix_alpha=1.0, num_classes=2, label_smoothing=0)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (0.55, True))
    np.random.seed(0)
    pixels, classes = torch.zeros(2, 1, 23, 31), torch.tensor([0, 1])
    pixels[1] = 1
    found: list[list[tuple[int, ...]]] = [[], []]
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        results = (
            mix(pixels, soft_targets(classes, 2), mixup=0, cutmix=1.0, generator=generator)[0],
            theirs(pixels.clone(), classes)[0],
        )
        for result, boxes in zip(results, found, strict=True):
            rows, columns = (result[0, 0].amax(axis).nonzero()[:, 0] for axis in (1, 0))
            boxes.append((int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])))
    for mine, other in zip(np.array(found[0]).T, np.array(found[1]).T, strict=True):
        assert stats.ks_2samp(mine, other).pvalue > SURE
