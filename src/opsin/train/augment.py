"""Augmentation of a whole batch of equally sized images in two tensor operations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_resized_crop(
    images: Tensor, image_size: int, *, min_area: float, generator: torch.Generator, flip_rate: float = 0.5
) -> Tensor:
    """Inception crop and horizontal flip: one box per image, area in [min_area, 1], aspect 3/4 to 4/3, bilinear.

    Args:
        images: (B, C, H, W) float, all of one size.
        image_size: side of the result, pixels.
    Returns:
        (B, C, image_size, image_size). Boxes that would stick out are moved inside, so no border is invented.
    """
    batch, device = images.shape[0], images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    area, log_ratio = uniform(min_area, 1.0), uniform(math.log(3 / 4), math.log(4 / 3))
    width = (area.sqrt() * (log_ratio / 2).exp()).clamp(max=1.0)  # share of the image's side
    height = (area.sqrt() * (-log_ratio / 2).exp()).clamp(max=1.0)
    sign = torch.where(uniform(0, 1) < flip_rate, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * sign, height
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - width), uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta.to(device), [batch, images.shape[1], image_size, image_size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def drop_tokens(tokens: Tensor, keep: int, *, generator: torch.Generator) -> Tensor:
    """Keep `keep` of N patch tokens, drawn per image (Liu et al. 2023, PatchDropout): (B, N, D) → (B, keep, D)."""
    batch, num, dim = tokens.shape
    if keep >= num:
        return tokens
    order = torch.rand(batch, num, generator=generator).argsort(dim=1)[:, :keep].to(tokens.device)
    return tokens.gather(1, order[:, :, None].expand(-1, -1, dim))
