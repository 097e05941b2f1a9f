"""The embedded model: a 5.6M-parameter ViT for 64-pixel images, trained on Tiny-ImageNet (200 everyday classes).

python -m opsin.recipes.vit_tiny DATA_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path

import torch

from opsin import checkpoints
from opsin.data.tiny_imagenet import read_shards
from opsin.labels import Labels
from opsin.models.vit import ViTConfig
from opsin.preprocess import PreprocessConfig
from opsin.train.loop import Phase, TrainConfig, train


def recipe() -> TrainConfig:
    return TrainConfig(
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
        phases=(
            Phase(steps=2000, image_size=48, keep_tokens=24),
            Phase(steps=1400, image_size=64, keep_tokens=32),
            Phase(steps=200, image_size=64, keep_tokens=64),
        ),
    )


# Photos are scaled to 64 pixels on the shorter side and cropped in the middle, as is usual for ImageNet classes.
PREPROCESS = PreprocessConfig(size=64, crop_size=(64, 64))


if __name__ == "__main__":
    data_folder, out_folder = map(Path, sys.argv[1:])
    model = train(recipe(), read_shards(data_folder), out_folder)
    checkpoints.write(out_folder / "model", model, PREPROCESS, Labels.tiny_imagenet(), dtype=torch.float16)
