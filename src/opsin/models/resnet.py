"""The ResNet stem of the hybrid Vision Transformers: pixels → a feature map, cut into patches afterwards."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

StemMaths = Literal["jax", "timm"]
"""Where the small constants stand: added to the deviation (1e-5), norms 1e-6; or to the variance (1e-8), norms 1e-5."""


def stem_stride(stages: tuple[int, ...] | None) -> int:
    """Pixels per place of the feature map; 1 without a stem. The root halves twice: "R+Ti/16" has 32-pixel patches."""
    return 1 if stages is None else 4 * 2 ** max(len(stages) - 1, 0)


def pad_same(x: Tensor, kernel_size: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's "SAME": ceil(side / stride) places, an odd pixel of padding behind."""
    pads = []
    for side in (x.shape[-1], x.shape[-2]):
        total = max((-(-side // stride) - 1) * stride + kernel_size - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class StdConv2d(nn.Conv2d):
    """Convolution without bias whose kernel is standardised, per output channel, each time it is used."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, maths: StemMaths
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=False)
        self.maths = maths

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = 1 / (var.sqrt() + 1e-5) if self.maths == "jax" else torch.rsqrt(var + 1e-8)
        x = pad_same(x, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, (self.weight - mean) * scale, stride=self.stride)


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride, 1×1 to four times the width; group norm after each; ReLU after the sum."""

    def __init__(self, in_channels: int, width: int, stride: int, *, maths: StemMaths) -> None:
        super().__init__()
        eps, out = (1e-6 if maths == "jax" else 1e-5), 4 * width
        self.conv1 = StdConv2d(in_channels, width, 1, maths=maths)
        self.norm1 = nn.GroupNorm(32, width, eps=eps)
        self.conv2 = StdConv2d(width, width, 3, stride, maths=maths)
        self.norm2 = nn.GroupNorm(32, width, eps=eps)
        self.conv3 = StdConv2d(width, out, 1, maths=maths)
        self.norm3 = nn.GroupNorm(32, out, eps=eps)
        changes = in_channels != out or stride != 1
        self.proj = StdConv2d(in_channels, out, 1, stride, maths=maths) if changes else None
        self.proj_norm = nn.GroupNorm(32, out, eps=eps) if changes else None
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.proj is not None and self.proj_norm is not None:
            x = self.proj_norm(self.proj(x))
        return F.relu(x + y)


class ResNetStem(nn.Module):
    """(B, C, H, W) → (B, D, H / s, W / s), s = 4 for the root and twice that for each stage after the first.

    Source: vision_transformer `models_resnet.py`; Dosovitskiy et al. 2021, §3.1 "Hybrid Architecture".
    """

    def __init__(self, num_channels: int, stages: tuple[int, ...], *, maths: StemMaths) -> None:
        super().__init__()
        self.root = StdConv2d(num_channels, 64, 7, 2, maths=maths)
        self.root_norm = nn.GroupNorm(32, 64, eps=1e-6 if maths == "jax" else 1e-5)
        self.out_channels = 64
        self.stages = nn.ModuleList()
        for stage, num_units in enumerate(stages):
            units = nn.Sequential()
            for unit in range(num_units):
                stride = 2 if stage > 0 and unit == 0 else 1
                units.append(Bottleneck(self.out_channels, 64 * 2**stage, stride, maths=maths))
                self.out_channels = 256 * 2**stage
            self.stages.append(units)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.root_norm(self.root(pixels)))
        x = F.max_pool2d(pad_same(x, 3, 2, value=-torch.inf), 3, 2)
        for stage in self.stages:
            x = stage(x)
        return x
