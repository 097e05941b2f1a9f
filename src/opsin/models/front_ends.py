"""Front ends of a Perceiver: inputs of one kind → tokens (B, N, C), content and position side by side.

    Pixels           every pixel as it is
    Conv1x1          every pixel through a dense layer, learned positions
    ConvDownsample   7×7 convolutions, batch norm, max-pooling: a quarter of the side per stage
    Patches          squares of pixels (and frames) as they are: images, video
    FlowPatches      the 3×3 neighbourhood of each pixel in both of two frames
    Bytes            embeddings of bytes and of their places
    AudioPatches     short stretches of samples
    OneHot           one token that is the input
    Multimodal       several of these at once, padded to one width, parts of them masked

Every one has `dim`, the width C of its tokens.
Source: deepmind-research `perceiver/io_processors.py`; what transformers does otherwise is behind `numerics`.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.models.perceiver import init_weights, padding_vectors
from opsin.models.position import FourierPositions, TrainablePositions

Numerics = Literal["deepmind", "transformers"]
"""Whose arithmetic a checkpoint's outputs are to reproduce: the two releases of the same weights compute differently.

`deepmind`      GELU by tanh; convolution and pooling padded as "SAME", 224 → 56 × 56 tokens
`transformers`  exact GELU; convolution padded by 3 on every side, pooling not at all, 224 → 55 × 55 tokens
"""

Grid = tuple[int, int]


def with_positions(content: Tensor, positions: Tensor) -> Tensor:
    """(B, N, C), (N, F) → (B, N, C + F)."""
    return torch.cat([content, positions.expand(content.shape[0], -1, -1)], dim=2)


class Pixels(nn.Module):
    """(B, C, H, W) → (B, H·W, C + F), row by row."""

    def __init__(self, image_size: Grid, *, num_channels: int = 3, num_bands: int, max_resolution: Grid) -> None:
        super().__init__()
        self.positions = FourierPositions(image_size, num_bands, max_resolution)
        self.dim = num_channels + self.positions.dim

    def forward(self, pixels: Tensor) -> Tensor:
        return with_positions(pixels.flatten(2).transpose(1, 2), self.positions(pixels.shape[-2:], like=pixels))


class Conv1x1(nn.Module):
    """(B, C, H, W) → (B, H·W, 2·dim): a dense layer on each pixel beside learned, projected positions.

    For another image size the positions are interpolated.
    """

    def __init__(self, image_size: Grid, *, num_channels: int = 3, embed_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, embed_dim, 1)
        self.positions = TrainablePositions(image_size, embed_dim)
        self.pos_proj = nn.Linear(embed_dim, embed_dim)
        self.dim = 2 * embed_dim
        init_weights(self)

    def forward(self, pixels: Tensor) -> Tensor:
        content = self.conv(pixels).flatten(2).transpose(1, 2)
        return with_positions(content, self.pos_proj(self.positions(pixels.shape[-2:])))


def _pad_same(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """TensorFlow's and JAX's "SAME": outputs ⌈n / stride⌉, the odd one of the padding behind."""
    sides = []
    for n in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(n / stride) - 1) * stride + kernel_size - n, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class ConvStage(nn.Module):
    """7×7 convolution by 2 → batch norm → ReLU → 3×3 max-pool by 2."""

    def __init__(self, in_channels: int, out_channels: int, numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        self.conv = nn.Conv2d(in_channels, out_channels, 7, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.numerics == "transformers":
            return F.max_pool2d(F.relu(self.norm(self.conv(F.pad(x, (3, 3, 3, 3))))), 3, stride=2)
        x = F.relu(self.norm(self.conv(_pad_same(x, 7, 2))))
        return F.max_pool2d(_pad_same(x, 3, 2), 3, stride=2)  # zeros are as good as -inf behind a ReLU


class ConvDownsample(nn.Module):
    """(B, C, H, W) → (B, N, embed_dim + F) on a grid of about a quarter of the sides per stage."""

    def __init__(
        self,
        image_size: Grid,
        *,
        num_channels: int = 3,
        embed_dim: int = 64,
        num_stages: int = 1,
        num_bands: int,
        max_resolution: Grid,
        numerics: Numerics = "deepmind",
    ) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *(ConvStage(embed_dim if i else num_channels, embed_dim, numerics) for i in range(num_stages))
        )
        grid = image_size
        for _ in range(num_stages):
            grid = (_downsampled(grid[0], numerics), _downsampled(grid[1], numerics))
        self.positions = FourierPositions(grid, num_bands, max_resolution)
        self.dim = embed_dim + self.positions.dim
        init_weights(self)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stages(pixels)
        return with_positions(x.flatten(2).transpose(1, 2), self.positions(x.shape[-2:], like=x))


def _downsampled(side: int, numerics: Numerics) -> int:
    halved = (side + 1) // 2  # ⌈n / 2⌉, under either padding of the convolution
    return (halved - 3) // 2 + 1 if numerics == "transformers" else (halved + 1) // 2


class Patches(nn.Module):
    """(B, T, C, H, W) video → (B, T·H/p·W/p, p·p·C + F); channels of a patch are row, column, colour.

    Args:
        index_dims: (T, H/p, W/p), the grid of patches.
    """

    def __init__(
        self,
        index_dims: tuple[int, int, int],
        *,
        patch_size: int,
        num_channels: int = 3,
        num_bands: int,
        max_resolution: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.positions = FourierPositions(index_dims, num_bands, max_resolution)
        self.dim = num_channels * patch_size**2 + self.positions.dim

    def forward(self, video: Tensor) -> Tensor:
        b, t, c, h, w = video.shape
        p = self.patch_size
        x = video.reshape(b, t, c, h // p, p, w // p, p).permute(0, 1, 3, 5, 4, 6, 2)  # B T H/p W/p p p C
        return with_positions(x.reshape(b, -1, p * p * c), self.positions((t, h // p, w // p), like=x))


def flow_patches(frames: Tensor) -> Tensor:
    """(B, 2, 3, H, W) → (B, 2, 27, H, W): the 3×3 neighbourhood of each pixel, zeros outside; row, column, colour.

    Source: deepmind-research `perceiver/io_processors.py` `patches_for_flow`.
    """
    height, width = frames.shape[-2:]
    padded = F.pad(frames, (1, 1, 1, 1))
    shifts = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.cat(shifts, dim=2)


class FlowPatches(nn.Module):
    """Patches (B, 2, 27, H, W) of two frames, from `flow_patches` → (B, H·W, embed_dim + F)."""

    def __init__(self, image_size: Grid, *, embed_dim: int = 64, num_bands: int, max_resolution: Grid) -> None:
        super().__init__()
        self.proj = nn.Linear(54, embed_dim)
        self.positions = FourierPositions(image_size, num_bands, max_resolution)
        self.dim = embed_dim + self.positions.dim
        init_weights(self)

    def forward(self, patches: Tensor) -> Tensor:
        content = self.proj(patches.flatten(1, 2).flatten(2).transpose(1, 2))  # channels: frame, row, column, colour
        return with_positions(content, self.positions(patches.shape[-2:], like=content))


class Bytes(nn.Module):
    """Token ids (B, N), N up to `max_length` → (B, N, dim): embedding plus learned position."""

    def __init__(self, vocab_size: int, max_length: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.positions = TrainablePositions((max_length,), dim)
        self.dim = dim
        init_weights(self)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.positions()[: ids.shape[1]]


class AudioPatches(nn.Module):
    """Samples (B, S) → (B, S/p, p + F)."""

    def __init__(self, num_samples: int, *, samples_per_patch: int, num_bands: int) -> None:
        super().__init__()
        self.samples_per_patch = samples_per_patch
        self.positions = FourierPositions((num_samples // samples_per_patch,), num_bands, (num_samples,))
        self.dim = samples_per_patch + self.positions.dim

    def forward(self, samples: Tensor) -> Tensor:
        x = samples.unflatten(1, (-1, self.samples_per_patch))
        return with_positions(x, self.positions((x.shape[1],), like=x))


class OneHot(nn.Module):
    """(B, K) → (B, 1, K), without a position."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.dim = num_classes

    def forward(self, labels: Tensor) -> Tensor:
        return labels[:, None]


class Multimodal(nn.Module):
    """name → inputs of that modality, to tokens of one width, modality after modality in the order of their names.

    Args:
        modalities: name → its front end.
        mask_rates: name → share of its tokens, drawn at random, that a learned token replaces: while training and
            after. 1 hides the modality, as the label is hidden from a network that is to guess it.
        min_padding: the widest modality is padded with this many learned numbers, narrower ones with more.
    """

    def __init__(
        self, modalities: Mapping[str, nn.Module], *, mask_rates: Mapping[str, float], min_padding: int = 2
    ) -> None:
        super().__init__()
        self.modalities = nn.ModuleDict({name: modalities[name] for name in sorted(modalities)})
        self.mask_rates = dict(mask_rates)
        dims: dict[str, int] = {name: part.dim for name, part in modalities.items()}  # type: ignore[misc]
        self.dim = max(dims.values()) + min_padding
        self.padding = padding_vectors({name: self.dim - dim for name, dim in dims.items()})
        self.mask = padding_vectors(dict.fromkeys(mask_rates, self.dim))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name, part in self.modalities.items():
            x = part(inputs[name])
            x = torch.cat([x, self.padding[name].to(x.dtype).expand(*x.shape[:2], -1)], dim=2)
            if rate := self.mask_rates.get(name):
                hidden = torch.rand(x.shape[:2], device=x.device)[:, :, None] < rate
                x = torch.where(hidden, self.mask[name].to(x.dtype), x)
            parts.append(x)
        return torch.cat(parts, dim=1)
