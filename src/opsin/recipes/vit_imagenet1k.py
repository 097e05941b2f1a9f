"""ViT from scratch on ImageNet-1k (Dosovitskiy et al. 2021, Table 3): what the paper shows not to be enough data.

    opsin train --recipe vit_b16_in1k --data DIR

Cost: three forward passes of 300 · 1,281,167 images, counted in matrix products only; hours of one H100 at 40 % of its
989 TFLOP/s (dense bf16), an assumption.
Expected: ImageNet top-1 after fine-tuning at 384 pixels (Table 5); at 224, before it, the paper gives none.
Measured: not measured here: no ImageNet at hand.

    recipe          parameters   GMAC  exaFLOP  H100 hours  expected
    vit_b16_in1k    87,158,248  17.56     40.5        28.4     77.91
    vit_b32_in1k    88,814,824   4.41     10.2        7.14     73.38
    vit_l16_in1k   305,376,232  61.55      142        99.7     76.53
    vit_l32_in1k   307,585,000  15.38     35.5        24.9     71.16

Where the sources disagree:
- The head has a hidden layer of width D, `pre_logits`: the paper says so of pre-training (§3.1), big_vision's config of
  ImageNet has it, and the published counts, of fine-tuned models, are smaller by its D² + D.
- Softmax and global-norm clip 1, as the paper; big_vision's later config of the same data takes sigmoids.
- 300 epochs at 3e-3 with decay 0.3; for better scores on the same data see `augreg_*_in1k` and `deit_*`.
Not as the original: crops are resized with antialiasing. Evaluation is the release's (`jax_squash`).
"""

from opsin.preprocess import PreprocessConfig
from opsin.recipes.shapes import IMAGENET_1K, Size, jax_vit
from opsin.train.config import TrainConfig


def _recipe(size: Size, patch_size: int) -> TrainConfig:
    return TrainConfig(
        method="pretrain",
        model=jax_vit(size, patch_size, num_classes=1000, pre_logits=True),
        preprocess=PreprocessConfig.jax_squash(224),
        dropout_rate=0.1,
        num_images=IMAGENET_1K,
        holdout=0.01,
        min_crop_area=0.05,
        crop_by="side",
        loss="softmax",
        optimizer="adam",
        lr=3e-3,
        betas=(0.9, 0.999),
        weight_decay=0.3,
        decay_all=True,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=10_000,
        epochs=300,
        batch_size=4096,
        micro_batch_size=128 if size == "large" else 256,  # what 80 GB hold
        compile=True,
        save_every=1000,
    )


def vit_b16_in1k() -> TrainConfig:
    return _recipe("base", 16)


def vit_b32_in1k() -> TrainConfig:
    return _recipe("base", 32)


def vit_l16_in1k() -> TrainConfig:
    return _recipe("large", 16)


def vit_l32_in1k() -> TrainConfig:
    return _recipe("large", 32)
