"""The embedded model: a 5.6M-parameter ViT for 64-pixel images, trained on Tiny-ImageNet (200 everyday classes).

    opsin train --recipe vit_tiny --data DIR               # the run's folder is assets/vit-tiny

Cost: 4,500 steps of 256 images, 12.1 epochs of 95,000, on two CPU cores; 1.1 petaFLOP. Short sequences first: 60 % of
the steps at 48 pixels and 24 of 36 tokens, 34 % at 64 pixels and 32 of 64, the rest on all.

    recipe      parameters  petaFLOP
    vit_tiny     5,646,024      1.15

Expected: more than the 41.1 % of the first weights shipped, of a run of 3,600 such steps.
Measured on the 5,000 held-out images: MEASURED-BY-OWNER
Where the sources disagree: nothing is published of this model; its parts are Muon (Jordan et al. 2024), PatchDropout
(Liu et al. 2023), and learned positions that begin as sine and cosine, which saves the first epochs.
"""

from opsin.models.vit import ViTConfig
from opsin.preprocess import PreprocessConfig
from opsin.train.config import Phase, TrainConfig

# Photos are scaled to 64 pixels on the shorter side and cropped in the middle, as is usual for ImageNet classes.
PREPROCESS = PreprocessConfig(size=64, crop_size=(64, 64))


def recipe() -> TrainConfig:
    return TrainConfig(
        method="pretrain",
        model=ViTConfig(
            image_size=(64, 64),
            patch_size=8,
            embed_dim=256,
            num_layers=7,
            num_heads=4,
            mlp_dim=1024,
            num_classes=200,
            class_token=False,
            pool="mean",
        ),
        preprocess=PREPROCESS,
        sincos_positions=True,
        num_images=95_000,
        holdout=0.05,
        min_crop_area=0.35,
        label_smoothing=0.1,
        optimizer="muon",
        muon_lr=3e-3,
        lr=2e-3,
        betas=(0.9, 0.99),
        weight_decay=0.05,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=200,
        steps=4500,
        batch_size=256,
        phases=(
            Phase(share=0.6, image_size=48, keep_tokens=24),
            Phase(share=0.34, image_size=64, keep_tokens=32),
        ),
        precision="bf16",
        ema_decay=0.995,
        eval_every=500,
    )
