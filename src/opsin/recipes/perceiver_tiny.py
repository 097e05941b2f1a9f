"""The embedded Perceiver: 5.9M parameters, 64-pixel images, trained on Tiny-ImageNet (200 everyday classes).

python -m opsin.recipes.perceiver_tiny DATA_FOLDER OUT_FOLDER        # OUT_FOLDER/model is assets/perceiver-tiny
"""

import sys
from pathlib import Path

import torch

from opsin import checkpoints
from opsin.data.tiny_imagenet import read_shards
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiverConfig
from opsin.recipes.vit_tiny import PREPROCESS
from opsin.train.loop import Phase, TrainConfig, train


def recipe() -> TrainConfig:
    return TrainConfig(
        model=ImagePerceiverConfig(
            image_size=(64, 64),
            max_resolution=(16, 16),
            num_bands=16,
            num_latents=32,
            latent_dim=256,
            num_blocks=1,
            layers_per_block=6,
            num_heads=4,
            num_cross_heads=4,
            qk_dim=256,
            v_dim=256,
            mlp_ratio=4,
            num_classes=200,
        ),
        phases=(
            Phase(steps=1700, image_size=48, keep_tokens=96),
            Phase(steps=600, image_size=64, keep_tokens=160),
            Phase(steps=200, image_size=64, keep_tokens=256),
        ),
    )


if __name__ == "__main__":
    data_folder, out_folder = map(Path, sys.argv[1:])
    model = train(recipe(), read_shards(data_folder), out_folder)
    checkpoints.write(out_folder / "model", model, PREPROCESS, Labels.tiny_imagenet(), dtype=torch.float16)
