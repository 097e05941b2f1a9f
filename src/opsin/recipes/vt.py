"""Visual Transformers from scratch on ImageNet, and the ResNets that they are compared with (Wu et al. 2020).

    opsin train --recipe vt_r18_in1k --data DIR

Cost: 90 · 1,281,167 images of 224 pixels, matrix products and convolutions only; hours of one H100 at 40 % of its
989 TFLOP/s (dense bf16), an assumption.
Expected: ImageNet top-1 at 224 pixels, the paper's "default recipe", of its own runs on eight V100.
Measured: not measured here: no ImageNet at hand. Small ones are: see `vt_tiny`.

    recipe         parameters   GMAC  exaFLOP  H100 hours  expected
    vt_r18_in1k    10,421,953  1.546     1.07       0.751      72.0
    vt_r34_in1k    19,841,105  3.239     2.24       1.574      74.8
    resnet18_in1k  11,689,512  1.814     1.26       0.881      69.9
    resnet34_in1k  21,797,672  3.664     2.53       1.780      73.3

Where the sources disagree:
- Details of the modules, and so their sizes, are partly guesses: `models/vt.py` says which.
- Decay: 4e-5 that torch adds to the gradient, where momentum 0.9 makes ten times as much of it; here, decoupled, 4e-4.
- Crops from 8 % of the image on and the view of evaluation (256, then 224 in the middle) are torchvision's; the paper
  says nothing of either.
Left out: the advanced recipe (VT-R18 76.8, R34 79.9, R50 80.6, R101 82.3). It has RMSProp, a rate that falls by 0.9875
an epoch, stochastic depth, dropout, batch norms that count over all devices, and FBNetV3-G for a teacher; opsin has
none of these for a VT. VT-R50 and -R101 have no published score without it.
"""

from opsin.models.vt import VTConfig, vt_r18, vt_r34
from opsin.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessConfig
from opsin.recipes.shapes import IMAGENET_1K
from opsin.train.config import TrainConfig


def vt_r18_in1k() -> TrainConfig:
    return _default(vt_r18())


def vt_r34_in1k() -> TrainConfig:
    return _default(vt_r34())


def resnet18_in1k() -> TrainConfig:
    return _default(VTConfig(depth=18, num_modules=0))


def resnet34_in1k() -> TrainConfig:
    return _default(VTConfig(depth=34, num_modules=0))


def _default(model: VTConfig) -> TrainConfig:
    return TrainConfig(
        method="pretrain",
        model=model,
        preprocess=PreprocessConfig(size=256, crop_size=(224, 224), mean=IMAGENET_MEAN, std=IMAGENET_STD),
        num_images=IMAGENET_1K,
        holdout=0.01,
        min_crop_area=0.08,
        optimizer="sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=4e-4,
        decay_all=True,
        clip_norm=None,
        schedule="step",
        epochs=90,
        batch_size=256,
    )
