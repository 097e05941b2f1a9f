"""The parameters of every published variant, to the last one: Dosovitskiy et al. 2021, Steiner et al. 2021, DeiT."""

import math
from typing import Any

import pytest

from opsin.checkpoints.rules import shapes
from opsin.models.vit import ViTConfig

WIDTHS = {  # embed_dim, num_layers, num_heads, mlp_dim
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
    "old timm small": (768, 8, 8, 2304),
}


def count(variant: str, size: int = 224, **changes: Any) -> int:
    name, patch = variant.split("/")
    dim, layers, heads, mlp_dim = WIDTHS[name]
    settings = {
        "embed_dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "mlp_dim": mlp_dim,
        "patch_size": int(patch),
    }
    return sum(
        math.prod(shape) for shape in shapes(ViTConfig(**settings | {"image_size": (size, size)} | changes)).values()
    )


@pytest.mark.parametrize(
    "variant, at_224, at_384",
    [
        ("Ti/16", 5_717_416, 5_790_376),
        ("S/32", 22_878_952, 22_915_432),
        ("S/16", 22_050_664, 22_196_584),
        ("B/32", 88_224_232, 88_297_192),
        ("B/16", 86_567_656, 86_859_496),
        ("B/8", 86_576_872, 87_744_232),
        ("L/32", 306_535_400, 306_632_680),
        ("L/16", 304_326_632, 304_715_752),
        ("L/14", 304_203_752, None),
        ("H/14", 632_045_800, None),
        ("g/14", 1_012_611_432, None),
        ("G/14", 1_844_440_680, None),
        ("old timm small/16", 48_772_840, 49_064_680),
    ],
)
def test_with_1000_classes(variant: str, at_224: int, at_384: int | None) -> None:
    assert count(variant) == at_224
    if at_384:
        assert count(variant, 384) == at_384


def test_without_head() -> None:
    assert count("L/16", num_classes=0) == 303_301_632


@pytest.mark.parametrize("variant, params", [("B/16", 86_389_248), ("L/16", 304_351_232), ("H/14", 632_404_480)])
def test_with_pooler(variant: str, params: int) -> None:
    assert count(variant, num_classes=0, pre_logits=True) == params


@pytest.mark.parametrize(
    "variant, params",
    [("B/16", 103_186_515), ("B/32", 104_843_091), ("L/16", 326_740_307), ("L/32", 328_949_075), ("H/14", 660_385_363)],
)
def test_original_21k(variant: str, params: int) -> None:
    assert count(variant, num_classes=21_843, pre_logits=True) == params


@pytest.mark.parametrize("variant, params", [("Ti/16", 9_740_115), ("S/16", 30_075_219), ("B/16", 102_595_923)])
def test_augreg_21k(variant: str, params: int) -> None:
    assert count(variant, num_classes=21_843) == params


@pytest.mark.parametrize(
    "variant, params", [("B/16", 86_566_120), ("B/32", 88_222_696), ("S/16", 22_049_896), ("S/32", 22_878_184)]
)
def test_without_class_token(variant: str, params: int) -> None:
    assert count(variant, class_token=False, pool="mean") == params


@pytest.mark.parametrize(
    "variant, stem, expected",
    [  # spec of the hybrids: Steiner et al. 2021, Table 2
        ("Ti/8", (), 6_337_704),
        ("S/1", (2, 2, 2, 2), 36_431_912),
        ("B/1", (2, 2, 2, 2), 101_383_976),
        ("B/1", (3, 4, 9), 98_659_112),
        ("L/1", (3, 4, 6, 3), 328_994_856),
    ],
)
def test_hybrids(variant: str, stem: tuple[int, ...], expected: int) -> None:
    assert count(variant, stem=stem) == expected
