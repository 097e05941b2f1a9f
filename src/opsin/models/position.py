"""Position embeddings: sine-cosine tables, and resizing a learned table to a new patch grid."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PosResize = Literal["bilinear_corners", "bilinear", "bicubic", "bicubic_antialias"]
"""How a family of checkpoints resizes its position table:

`bilinear_corners`   JAX release (`scipy.ndimage.zoom`, order 1) = bilinear with aligned corners
`bilinear`           timm's reader of `.npz` files
`bicubic`            transformers ViT, DeiT and DINOv2 (a = -0.75)
`bicubic_antialias`  timm; transformers DINOv2 with registers (a = -0.5)

They differ by up to the size of the table itself (0.8 for a N(0, 1) table, 14 → 24): never a default to guess.
"""


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    grid: tuple[int, int],
    *,
    num_prefix: int,
    method: PosResize,
) -> Tensor:
    """Resize a learned position embedding to a new patch grid.

    Args:
        pos_embed: (1, P + H·W, D).
        old_grid: (H, W) of the table, in patches, not pixels.
        grid: new (H, W), in patches.
        num_prefix: P, leading rows copied unchanged (class token, distillation token).
        method: see `PosResize`.
    Returns:
        (1, P + H'·W', D), same dtype and device; the input itself when the grid is unchanged.
    Source: Dosovitskiy et al. 2021, §3.2; the methods are those of the releases named in `PosResize`.
    """
    if grid == old_grid:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    table = patches.unflatten(1, old_grid).permute(0, 3, 1, 2).float()  # 1 D H W
    table = F.interpolate(
        table,
        size=grid,
        mode=method.split("_")[0],
        align_corners=method == "bilinear_corners",
        antialias=method == "bicubic_antialias",
    )
    return torch.cat([prefix, table.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def sincos_2d(grid: tuple[int, int], dim: int, *, temperature: float = 10_000.0) -> Tensor:
    """Fixed two-dimensional sine-cosine positions.

    Returns:
        (1, H·W, dim), float32; channels are sin x, cos x, sin y, cos y, a quarter of `dim` each.
    Raises:
        ValueError: dim is not a multiple of 4.
    Source: MoCo v3; big_vision `models/vit.py` `posemb_sincos_2d`.
    """
    if dim % 4:
        raise ValueError(f"dim ({dim}) must be a multiple of 4. Nearest that fits: {math.ceil(dim / 4) * 4}.")
    y, x = torch.meshgrid(torch.arange(grid[0]).float(), torch.arange(grid[1]).float(), indexing="ij")
    omega = temperature ** -(torch.arange(dim // 4) / max(dim // 4 - 1, 1))
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)[None]
