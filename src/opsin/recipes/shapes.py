"""What recipes of several papers share: the models' shapes and how many images the data sets have."""

from typing import Any, Literal

from opsin.checkpoints.catalog import SIZES
from opsin.models.vit import ViTConfig

Size = Literal["tiny", "small", "base", "large"]

IMAGENET_1K = 1_281_167  # images to train on, ILSVRC2012
IMAGENET_21K = 14_197_122  # images of the release of autumn 2011; the papers round to 14M
CLASSES_21K = 21_843


def jax_vit(size: Size, patch_size: int, **changes: Any) -> ViTConfig:
    """A ViT as the JAX release computes it: GELU by tanh, norm epsilon 1e-6, positions resized on aligned corners."""
    shape: dict[str, Any] = {
        **SIZES[size],
        "patch_size": patch_size,
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "pos_resize": "bilinear_corners",
    }
    return ViTConfig(**shape | changes)
