"""Recipes: a function for each run that a paper or this project did, which returns its `TrainConfig`.

The files are families of experiments; a file's docstring holds command, cost, expected and measured score, and what was
chosen where the sources disagree.
"""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from opsin.errors import TrainError

if TYPE_CHECKING:
    from opsin.train.config import TrainConfig

RECIPES = {  # name → file and function, and one line for `opsin train --list`, which imports no torch
    "linear_probe": ("probe:linear_probe", "your photos: a linear head on frozen features"),
    "few_shot": ("probe:few_shot", "few photos a class: a ridge head on frozen features"),
    "photos": ("finetune:photos", "your photos: the whole model, from a trained one"),
    "lora": ("finetune:lora", "your photos: low-rank changes to a trained model"),
    "vit_tiny": ("vit_tiny:recipe", "the embedded ViT, 64 pixels, Tiny-ImageNet, from scratch"),
    "perceiver_tiny": ("perceiver_tiny:recipe", "the embedded Perceiver, 64 pixels, Tiny-ImageNet, from scratch"),
    "vt_r18_tiny": ("vt_tiny:vt_r18_tiny", "half-wide VT-R18, 64 pixels, Tiny-ImageNet, from scratch"),
    "resnet18_tiny": ("vt_tiny:resnet18_tiny", "the ResNet-18 that vt_r18_tiny is compared with"),
    "finetune_imagenet_224": ("finetune:finetune_imagenet_224", "ViT-L/16 from ImageNet-21k to ImageNet, 224 pixels"),
    "finetune_imagenet_384": ("finetune:finetune_imagenet_384", "ViT-L/16 from ImageNet-21k to ImageNet, 384 pixels"),
    "finetune_cifar": ("finetune:finetune_cifar", "ViT-L/16 from ImageNet-21k to CIFAR-10 or -100, 384 pixels"),
    "finetune_pets": ("finetune:finetune_pets", "ViT-L/16 from ImageNet-21k to Pets or Flowers, 384 pixels"),
    "vit_b16_in21k": ("vit_imagenet21k:vit_b16_in21k", "ViT-B/16 on ImageNet-21k, 90 epochs"),
    "vit_b32_in21k": ("vit_imagenet21k:vit_b32_in21k", "ViT-B/32 on ImageNet-21k, 90 epochs"),
    "vit_l16_in21k": ("vit_imagenet21k:vit_l16_in21k", "ViT-L/16 on ImageNet-21k, 90 epochs"),
    "vit_l32_in21k": ("vit_imagenet21k:vit_l32_in21k", "ViT-L/32 on ImageNet-21k, 90 epochs"),
    "vit_b16_in1k": ("vit_imagenet1k:vit_b16_in1k", "ViT-B/16 on ImageNet, 300 epochs"),
    "vit_b32_in1k": ("vit_imagenet1k:vit_b32_in1k", "ViT-B/32 on ImageNet, 300 epochs"),
    "vit_l16_in1k": ("vit_imagenet1k:vit_l16_in1k", "ViT-L/16 on ImageNet, 300 epochs"),
    "vit_l32_in1k": ("vit_imagenet1k:vit_l32_in1k", "ViT-L/32 on ImageNet, 300 epochs"),
    "augreg_ti16_in21k": ("augreg:augreg_ti16_in21k", "AugReg: ViT-Ti/16 on ImageNet-21k, 300 epochs"),
    "augreg_s32_in21k": ("augreg:augreg_s32_in21k", "AugReg: ViT-S/32 on ImageNet-21k, 300 epochs"),
    "augreg_s16_in21k": ("augreg:augreg_s16_in21k", "AugReg: ViT-S/16 on ImageNet-21k, 300 epochs"),
    "augreg_b32_in21k": ("augreg:augreg_b32_in21k", "AugReg: ViT-B/32 on ImageNet-21k, 300 epochs"),
    "augreg_b16_in21k": ("augreg:augreg_b16_in21k", "AugReg: ViT-B/16 on ImageNet-21k, 300 epochs"),
    "augreg_l16_in21k": ("augreg:augreg_l16_in21k", "AugReg: ViT-L/16 on ImageNet-21k, 300 epochs"),
    "augreg_ti16_in1k": ("augreg:augreg_ti16_in1k", "AugReg: ViT-Ti/16 on ImageNet, 300 epochs"),
    "augreg_s32_in1k": ("augreg:augreg_s32_in1k", "AugReg: ViT-S/32 on ImageNet, 300 epochs"),
    "augreg_s16_in1k": ("augreg:augreg_s16_in1k", "AugReg: ViT-S/16 on ImageNet, 300 epochs"),
    "augreg_b32_in1k": ("augreg:augreg_b32_in1k", "AugReg: ViT-B/32 on ImageNet, 300 epochs"),
    "augreg_b16_in1k": ("augreg:augreg_b16_in1k", "AugReg: ViT-B/16 on ImageNet, 300 epochs"),
    "augreg_l16_in1k": ("augreg:augreg_l16_in1k", "AugReg: ViT-L/16 on ImageNet, 300 epochs"),
    "deit_ti16": ("deit:deit_ti16", "DeiT-Ti on ImageNet, 300 epochs"),
    "deit_s16": ("deit:deit_s16", "DeiT-S on ImageNet, 300 epochs"),
    "deit_b16": ("deit:deit_b16", "DeiT-B on ImageNet, 300 epochs"),
    "deit_ti16_distilled": ("deit:deit_ti16_distilled", "DeiT-Ti on ImageNet, with a distillation token and a teacher"),
    "deit_s16_distilled": ("deit:deit_s16_distilled", "DeiT-S on ImageNet, with a distillation token and a teacher"),
    "deit_b16_distilled": ("deit:deit_b16_distilled", "DeiT-B on ImageNet, with a distillation token and a teacher"),
    "vt_r18_in1k": ("vt:vt_r18_in1k", "Visual Transformer VT-R18 on ImageNet, 90 epochs"),
    "vt_r34_in1k": ("vt:vt_r34_in1k", "Visual Transformer VT-R34 on ImageNet, 90 epochs"),
    "resnet18_in1k": ("vt:resnet18_in1k", "ResNet-18 on ImageNet, 90 epochs"),
    "resnet34_in1k": ("vt:resnet34_in1k", "ResNet-34 on ImageNet, 90 epochs"),
    "perceiver_conv_in1k": (
        "perceiver_imagenet:perceiver_conv_in1k",
        "Perceiver IO on ImageNet, behind a convolution",
    ),
    "perceiver_fourier_in1k": (
        "perceiver_imagenet:perceiver_fourier_in1k",
        "Perceiver IO on ImageNet, pixels with Fourier positions",
    ),
    "perceiver_learned_in1k": (
        "perceiver_imagenet:perceiver_learned_in1k",
        "Perceiver IO on ImageNet, pixels with learned positions",
    ),
}
NAMES = tuple(RECIPES)


def recipe(name: str) -> "TrainConfig":
    """
    Raises:
        TrainError: no such recipe.
    """
    if name not in RECIPES:
        near = [f'"{known}"' for known in difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, 3)]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise TrainError(f'no recipe "{name}".{hint} `opsin train --list` lists all.')
    place, _ = RECIPES[name]
    module, function = place.split(":")
    config: TrainConfig = getattr(import_module(f"opsin.recipes.{module}"), function)()
    return config


def summaries() -> dict[str, str]:
    """Name → one line, in the order in which they are listed."""
    return {name: summary for name, (_, summary) in RECIPES.items()}
