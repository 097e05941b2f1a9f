"""Perceiver IO on ImageNet-1k (Jaegle et al. 2021, App. A.1; deepmind-research `perceiver/train`).

    opsin train --recipe perceiver_conv_in1k --data DIR
    torchrun --nproc-per-node 8 -m opsin train --recipe perceiver_conv_in1k --data DIR

Cost: three forward passes of 110 · 1,281,167 images, 137,625 steps of 1024, counted in matrix products only; hours of
one H100 at 40 % of its 989 TFLOP/s (dense bf16), an assumption.
Expected: ImageNet top-1 at 224 pixels (Table 7).
Measured: not measured here: no ImageNet at hand.

    recipe                  parameters    GMAC  exaFLOP  H100 hours  expected
    perceiver_conv_in1k     48,646,522  184.70      156         110      82.1
    perceiver_fourier_in1k  48,440,627  203.05      172         121      79.0
    perceiver_learned_in1k  62,255,848  239.00      202         142      72.7

Where the sources disagree:
- FLOPs of `learned`: 478 G by our count, 407 G in Table 7, which does not come out of the released shape; the others
  agree with the paper's 369 G and 407 G.
- The residual of the decoder's query, in `learned`: off, as in DeepMind's notebook; on in transformers.
- CutMix: the release draws the box's share uniformly, which is α = 1; MixUp has α = 0.2, on the other half of a batch.
- Evaluation: the notebook's resize (OpenCV's bicubic, on bytes) and not that of the training code (TensorFlow's, floats
  beyond 0..255), since the published weights are used with the former.
- Weight decay 0.1 is also of positions and latents, not of biases and norms; LAMB's trust ratio is of all tensors.
Not as the original: RandAugment comes after resizing, at 224 pixels, and not before; crops are resized with
antialiasing; MixUp's λ is one for each micro-batch, and not one an image. Batch norm has the
statistics of a micro-batch, 32 images here, 16 on the 64 TPUs of the paper.

JFT-300M (App. A.2) has no recipe, as the data are not public: LAMB at 3e-4, cosine, 14 epochs, decay 0.1, batch 8192,
16 layers that are not shared, with an MLP of ratio 4. Such a model is fine-tuned with this file's settings but for
`--method finetune --model FILE --steps 131000 --set flat_share=0.534`, and for `conv` `--lr 2e-4` (84.5 and 86.4 %).
"""

from opsin.models.perceiver_io import ImagePerceiverConfig
from opsin.preprocess import PreprocessConfig
from opsin.recipes.shapes import IMAGENET_1K
from opsin.train.config import TrainConfig


def _recipe(model: ImagePerceiverConfig) -> TrainConfig:
    return TrainConfig(
        method="pretrain",
        model=model,
        preprocess=PreprocessConfig.deepmind_perceiver(),
        num_images=IMAGENET_1K,
        holdout=0.01,
        min_crop_area=0.08,
        crop_by="side",
        rand_augment=(4, 5),
        mixup=0.2,
        cutmix=1.0,
        loss="softmax",
        label_smoothing=0.1,
        optimizer="lamb",
        lr=2e-3,  # 5e-4 · 1024 / 256
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.1,
        decay_positions=True,
        clip_norm=10.0,
        schedule="flat_cosine",
        flat_share=0.5,
        warmup_steps=0,
        epochs=110,
        batch_size=1024,
        micro_batch_size=32,  # what 80 GB hold
        compile=True,
        save_every=1000,
    )


def perceiver_conv_in1k() -> TrainConfig:
    return _recipe(ImagePerceiverConfig())


def perceiver_fourier_in1k() -> TrainConfig:
    return _recipe(ImagePerceiverConfig(front_end="pixels", max_resolution=(224, 224)))


def perceiver_learned_in1k() -> TrainConfig:
    return _recipe(ImagePerceiverConfig(front_end="conv1x1", embed_dim=256, decoder_residual=False))
