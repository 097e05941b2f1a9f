"""Position embeddings: sine-cosine and Fourier tables, and resizing a learned table to a new grid."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def linear_positions(index_dims: Sequence[int], *, device: torch.device | None = None) -> Tensor:
    """Coordinates of a grid of any number of axes, -1 to 1 on each, both ends included.

    Returns:
        (N, d) float32, N the product of `index_dims`, d their number; the last axis varies fastest.
    Source: deepmind-research `perceiver/position_encoding.py` `build_linear_positions`.
    """
    axes = [torch.linspace(-1.0, 1.0, n, device=device) for n in index_dims]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def point_positions(points: Tensor, index_dims: Sequence[int]) -> Tensor:
    """Coordinates of some points of a grid, as outputs are asked for one part at a time: -1 + 2·i/n on each axis.

    This never reaches +1, where `linear_positions` does: a network decodes at the coordinates it was trained with.

    Args:
        points: (N,) int64, flat indices into the grid.
        index_dims: its sizes.
    Returns:
        (N, d) float32.
    Source: deepmind-research `perceiver/perceiver.py` `BasicDecoder.decoder_query`.
    """
    indices = torch.stack(torch.unravel_index(points, tuple(index_dims)), dim=1)
    return -1 + 2 * indices / torch.tensor(index_dims, device=points.device)


def fourier_features(
    positions: Tensor,
    num_bands: int,
    max_resolution: Sequence[int],
    *,
    concat_pos: bool = True,
    sine_only: bool = False,
) -> Tensor:
    """Sines and cosines of coordinates, at frequencies spaced evenly from 1 to half of the resolution.

    Args:
        positions: (N, d), in [-1, 1].
        num_bands: K, frequencies per axis.
        max_resolution: d numbers; half of each, its Nyquist frequency, is the highest on that axis.
    Returns:
        (N, F) float32: the d coordinates, d·K sines, d·K cosines, axis by axis and within an axis by frequency;
        without the coordinates or the cosines when `concat_pos` or `sine_only` say so.
    Source: Jaegle et al. 2021, §3.2; deepmind-research `perceiver/position_encoding.py` `generate_fourier_features`.
    """
    bands = torch.stack([torch.linspace(1.0, n / 2, num_bands, device=positions.device) for n in max_resolution])
    angles = math.pi * (positions[:, :, None] * bands).flatten(1)  # N d·K
    parts = [positions] if concat_pos else []
    parts += [angles.sin()] if sine_only else [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=1)


class FourierPositions(nn.Module):
    """A fixed table of Fourier features for a grid: computed once, and again only for another grid.

    Args:
        index_dims: the grid of the table.
        num_bands, max_resolution: see `fourier_features`. `max_resolution` stays what it was trained with whatever
            the grid; `index_dims` without it.
        tabulate: False for a grid too large to hold, which is asked for some of its points only.
    """

    table: Tensor | None

    def __init__(
        self,
        index_dims: Sequence[int],
        num_bands: int,
        max_resolution: Sequence[int] | None = None,
        *,
        tabulate: bool = True,
    ) -> None:
        super().__init__()
        self.index_dims, self.num_bands = tuple(index_dims), num_bands
        self.max_resolution = tuple(max_resolution or index_dims)
        self.dim = len(self.index_dims) * (2 * num_bands + 1)
        self.register_buffer("table", None, persistent=False)
        if tabulate:
            self.table = self._features(linear_positions(self.index_dims))

    def reset(self) -> None:
        """Compute the table anew on the CPU: for a model that was built without memory."""
        if self.table is not None:
            with torch.device("cpu"):
                self.table = self._features(linear_positions(self.index_dims))

    def _features(self, positions: Tensor) -> Tensor:
        return fourier_features(positions, self.num_bands, self.max_resolution)

    def forward(self, index_dims: Sequence[int] | None = None, *, like: Tensor | None = None) -> Tensor:
        """(N, F) for the table's own grid, or for another of as many axes; device and dtype of `like`."""
        index_dims = self.index_dims if index_dims is None else tuple(index_dims)
        if self.table is not None and index_dims == self.index_dims:
            features = self.table
        else:
            features = self._features(linear_positions(index_dims, device=None if like is None else like.device))
        return features if like is None else features.to(like)

    def at(self, points: Tensor) -> Tensor:
        """(n, F) of some points of the grid: see `point_positions`."""
        return self._features(point_positions(points, self.index_dims))


class TrainablePositions(nn.Module):
    """A learned table (N, F); a table of a two-dimensional grid is resized to another by bicubic interpolation."""

    def __init__(self, index_dims: Sequence[int], dim: int) -> None:
        super().__init__()
        self.index_dims, self.dim = tuple(index_dims), dim
        self.table = nn.Parameter(torch.empty(math.prod(index_dims), dim))
        nn.init.trunc_normal_(self.table, std=0.02, a=-0.04, b=0.04)

    def forward(self, index_dims: Sequence[int] | None = None, *, like: Tensor | None = None) -> Tensor:
        """(N, F); the dtype of `like`.

        Raises:
            ValueError: another grid, and the table's is not two-dimensional.
        """
        table = self.table if like is None else self.table.to(like.dtype)
        if index_dims is None or tuple(index_dims) == self.index_dims:
            return table
        if len(self.index_dims) != 2 or len(index_dims) != 2:
            raise ValueError(f"positions learned for a grid of {self.index_dims} do not fit {tuple(index_dims)}.")
        (old_height, old_width), (height, width) = self.index_dims, index_dims
        return resize_pos_embed(table[None], (old_height, old_width), (height, width), num_prefix=0, method="bicubic")[
            0
        ]
