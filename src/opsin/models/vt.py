"""Visual Transformers (Wu et al. 2020): a ResNet whose last stage is a transformer over a few tokens of the image.

    pixels ── ResNet, stages 1–4 ──▶ map X ──┬── tokenizer ──▶ T ── transformer ──▶ T ── mean, head ──▶ logits
                                             └──────────── projector ◀──────────────┘
                                              X goes on to the next module, and so does T

What the paper prints (X of H·W places and C channels, T of L tokens), and what was read into it:

    filter tokenizer, first module     A = softmax_HW(X W_A)                    T = Aᵀ X
    recurrent tokenizer, the others    A = softmax_HW(X (T_in W_TR)ᵀ)           T = Aᵀ X
    transformer                        T' = T + softmax_L((T K)(T Q)ᵀ) T        T_out = T' + ReLU(T' F1) F2
    projector                          X_out = X + softmax_L((X W_Q)(T W_K)ᵀ) T

Printed like this T has the C channels of X. The networks are called VT-C512-L16-CT1024, of C = 512 and tokens of 1024
channels, and what is between is said to be in an appendix that was not at hand (arXiv 2006.03677; other people's
transcriptions were). Of its details these are taken, **unverified**, because the published sizes ask for them:

- 16 heads, products of queries and keys over √(channels of a head); one head and no scale in the filter tokenizer.
- X of 512 channels: a 1×1 convolution behind stage 4 makes them of 256 or 1024.
- Aᵀ X goes through a product in 16 groups, 512 → 1024. Beside it A itself, resized to 14×14 and convolved to 7×7, says
  where the token is; one product makes both a token. (A is taken times H·W, so that it does not shrink on larger maps.)
- K and Q are half as wide as T, and there are values; all three in 8 groups. F1 halves T too: F1 and F2 are then as
  large as the one convolution of the transcriptions, and as printed.
- The projector has values, 1024 → 512, and W_Q is in 16 groups.

Left out of the transcriptions: half of the tokens pass a recurrent tokenizer unchanged, and its X has a product of its
own; both contradict the printed formula. Left out of the paper: the last module's projector, whose map nothing reads
(dead weights, which stop data-parallel training), the clustering tokenizer, and VT-FPN.

Parameters in millions and 10⁹ multiplications, each with its addition, of a 224-pixel image. The second pair counts a
last projector in; the paper's are of its default and its advanced recipe.

               ours           with a last projector   paper
    VT-R18     10.42  1.546   11.49  1.570            11.6, 11.7   1.579, 1.569
    VT-R34     19.84  3.239   20.91  3.262            21.8, 19.2   3.299, 3.236
    VT-R50     20.61  3.573   21.67  3.596            21.4         3.412
    VT-R101    39.60  7.285   40.66  7.309            41.5         7.129

At the parameters of VT-R50 and -R101 the paper has 0.18 · 10⁹ multiplications less; how is not known.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Depth = Literal[18, 34, 50, 101]
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # of stages 2 to 5


@dataclass(frozen=True, slots=True, kw_only=True)
class VTConfig:
    """Shape of a Visual Transformer; the defaults are VT-R18. Without modules it is the ResNet, He et al. 2016."""

    image_size: tuple[int, int] = (224, 224)  # (H, W) pixels, after preprocessing
    num_channels: int = 3
    depth: Depth = 18  # of the ResNet; 18 and 34 have basic blocks, 50 and 101 bottlenecks
    width: int = 64  # channels of its first stage; each next one has twice as many
    small_stem: bool = False  # for small images: one 3×3 convolution, not 7×7 and pooling, so maps of twice the side
    num_modules: int = 2  # in place of stage 5; 0: the plain ResNet
    map_dim: int = 512  # C
    token_dim: int = 1024
    num_tokens: int = 16  # L
    num_heads: int = 16  # also the groups of tokenizer and projector
    num_groups: int = 8  # of the transformer's K, Q and values
    position_size: int = 14  # places: side of the square that says where a token comes from
    num_classes: int = 1000  # 0: no head, forward returns features

    def __post_init__(self) -> None:
        if self.depth not in get_args(Depth):
            raise ValueError(f"depth is {self.depth}. Known: {', '.join(map(str, get_args(Depth)))}.")
        for name in ("width", "map_dim", "token_dim", "num_tokens", "num_heads", "num_groups", "position_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_modules < 0:
            raise ValueError(f"num_modules is {self.num_modules}; it must be 0 (the plain ResNet) or more.")
        if self.map_dim % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) does not divide map_dim ({self.map_dim}).")
        for name in ("num_heads", "num_groups"):  # K, Q and F1 are half as wide
            if self.token_dim % (unit := 2 * getattr(self, name)):
                raise ValueError(f"token_dim is {self.token_dim}; it must be a multiple of twice {name} ({unit}).")
        if min(self.image_size) < (least := 2 * self.reduction):  # batch norm wants more than one place
            raise ValueError(f"image_size {self.image_size} is too small: this network takes {least} and more.")

    @property
    def num_layers(self) -> int:
        return self.num_modules

    @property
    def num_stages(self) -> int:
        """Of the ResNet: what the papers call stages 2 to 4, or 5."""
        return 3 if self.num_modules else 4

    @property
    def reduction(self) -> int:
        """Pixels per place of the last map."""
        return (2 if self.small_stem else 4) * 2 ** (self.num_stages - 1)

    @property
    def stride(self) -> int:
        """What the sides of an image are asked to be multiples of: any size can be taken."""
        return 1

    @property
    def trunk_dim(self) -> int:
        """Channels behind the ResNet's last stage."""
        return self.width * 2 ** (self.num_stages - 1) * (4 if self.depth >= 50 else 1)

    @property
    def feature_dim(self) -> int:
        return self.token_dim if self.num_modules else self.trunk_dim


def vt_r18() -> VTConfig:
    return VTConfig()


def vt_r34() -> VTConfig:
    return VTConfig(depth=34, num_modules=3)


def vt_r50() -> VTConfig:
    return VTConfig(depth=50, num_modules=3)


def vt_r101() -> VTConfig:
    return VTConfig(depth=101, num_modules=3)


# ── the ResNet ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    """Two 3×3 convolutions, or a bottleneck of 1×1, 3×3, 1×1; batch norm after each, ReLU between and after the sum.

    The stride is in the first 3×3: in a bottleneck the "v1.5" that torchvision and timm have, not the paper's 1×1.
    """

    def __init__(self, in_channels: int, width: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        out = width * (4 if bottleneck else 1)
        size = 1 if bottleneck else 3
        self.conv1 = nn.Conv2d(in_channels, width, size, 1 if bottleneck else stride, padding=size // 2, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride if bottleneck else 1, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False) if bottleneck else None
        self.norm3 = nn.BatchNorm2d(out) if bottleneck else None
        changes = in_channels != out or stride != 1
        self.proj = nn.Conv2d(in_channels, out, 1, stride, bias=False) if changes else None
        self.proj_norm = nn.BatchNorm2d(out) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.conv3 is not None and self.norm3 is not None:
            y = self.norm3(self.conv3(F.relu(y)))
        if self.proj is not None and self.proj_norm is not None:
            x = self.proj_norm(self.proj(x))
        return F.relu(x + y)


class ResNet(nn.Module):
    """(B, C, H, W) → the map of its last stage, (B, trunk_dim, H / reduction, W / reduction), rounded up.

    Source: He et al. 2016, Table 1.
    """

    def __init__(self, config: VTConfig) -> None:
        super().__init__()
        self.small = config.small_stem
        size = 3 if self.small else 7
        self.conv = nn.Conv2d(config.num_channels, config.width, size, 2, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(config.width)
        self.stages = nn.ModuleList()
        bottleneck, channels = config.depth >= 50, config.width
        for stage, num_blocks in enumerate(BLOCKS[config.depth][: config.num_stages]):
            width, blocks = config.width * 2**stage, nn.Sequential()
            for block in range(num_blocks):
                blocks.append(Block(channels, width, 2 if stage and not block else 1, bottleneck=bottleneck))
                channels = width * (4 if bottleneck else 1)
            self.stages.append(blocks)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(pixels)))
        if not self.small:
            x = F.max_pool2d(x, 3, 2, padding=1)
        for stage in self.stages:
            x = stage(x)
        return x


# ── the modules ──────────────────────────────────────────────────────────────────────────────────────────────────────


class GroupedLinear(nn.Module):
    """(…, in_dim) → (…, out_dim): a product without bias for each of G equal parts of the channels."""

    def __init__(self, in_dim: int, out_dim: int, num_groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_dim // num_groups, in_dim // num_groups))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (len(self.weight), -1))
        return torch.einsum("...gi,goi->...go", parts, self.weight).flatten(-2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) → (B, heads, N, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, E) → (B, N, E): softmax over M of q kᵀ / √(D / heads), times v."""
    q, k, v = (split_heads(x, num_heads) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Tokenizer(nn.Module):
    """The map's places, and the tokens of the module before, if any → L tokens, and where they come from."""

    def __init__(self, config: VTConfig, *, recurrent: bool) -> None:
        super().__init__()
        c = config
        self.num_heads = c.num_heads if recurrent else 1
        self.position_size = c.position_size
        self.query = nn.Linear(c.token_dim, c.map_dim, bias=False) if recurrent else None  # W_TR
        self.filters = None if recurrent else nn.Linear(c.map_dim, c.num_tokens, bias=False)  # W_A
        self.value = GroupedLinear(c.map_dim, c.token_dim, c.num_heads)
        self.place = nn.Conv2d(self.num_heads, 1, 3, 2, padding=1, bias=False)
        self.out = nn.Linear(c.token_dim + (-(-c.position_size // 2)) ** 2, c.token_dim, bias=False)

    def forward(self, x: Tensor, tokens: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, H·W, C), (B, L, D) → (B, L, D), and A as (B, heads, L, H·W): each row of it sums to one."""
        if self.query is None:
            assert self.filters is not None
            logits = self.filters(x).transpose(-1, -2)[:, None]  # B 1 L HW
        else:
            keys, queries = split_heads(x, self.num_heads), split_heads(self.query(tokens), self.num_heads)
            logits = queries @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5
        attention = logits.softmax(dim=-1)
        gathered = (attention @ split_heads(x, self.num_heads)).transpose(1, 2).flatten(2)  # B L C
        return self.out(torch.cat([self.value(gathered), self._places(attention, grid)], dim=-1)), attention

    def _places(self, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, heads, L, H·W) → (B, L, P)."""
        maps = attention.transpose(1, 2).flatten(0, 1).unflatten(-1, grid) * math.prod(grid)  # BL heads H W
        square = (self.position_size, self.position_size)
        if grid != square:
            maps = F.interpolate(maps, square, mode="bilinear", align_corners=False)
        return self.place(maps).flatten(1).unflatten(0, (-1, attention.shape[2]))


class TokenTransformer(nn.Module):
    """(B, L, D) → (B, L, D)."""

    def __init__(self, config: VTConfig) -> None:
        super().__init__()
        dim, half = config.token_dim, config.token_dim // 2
        self.num_heads = config.num_heads
        self.q = GroupedLinear(dim, half, config.num_groups)
        self.k = GroupedLinear(dim, half, config.num_groups)
        self.v = GroupedLinear(dim, dim, config.num_groups)
        self.fc1 = nn.Linear(dim, half, bias=False)
        self.fc2 = nn.Linear(half, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens + attend(self.q(tokens), self.k(tokens), self.v(tokens), self.num_heads)
        return x + self.fc2(F.relu(self.fc1(x)))


class Projector(nn.Module):
    """What the tokens know, added to every place that asks: (B, H·W, C), (B, L, D) → (B, H·W, C)."""

    def __init__(self, config: VTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = GroupedLinear(config.map_dim, config.map_dim, config.num_heads)
        self.k = nn.Linear(config.token_dim, config.map_dim, bias=False)
        self.v = nn.Linear(config.token_dim, config.map_dim, bias=False)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x + attend(self.q(x), self.k(tokens), self.v(tokens), self.num_heads)


class VTModule(nn.Module):
    """Tokenizer, transformer and, but in the last module, projector."""

    def __init__(self, config: VTConfig, *, first: bool, last: bool) -> None:
        super().__init__()
        self.tokenizer = Tokenizer(config, recurrent=not first)
        self.transformer = TokenTransformer(config)
        self.projector = None if last else Projector(config)

    def forward(self, x: Tensor, tokens: Tensor | None, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H·W, C), (B, L, D) → the same two, and the tokenizer's attention."""
        tokens, attention = self.tokenizer(x, tokens, grid)
        tokens = self.transformer(tokens)
        return x if self.projector is None else self.projector(x, tokens), tokens, attention


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────────


class VT(nn.Module):
    """pixels (B, C, H, W) → logits (B, K), or features (B, D) where there is no head.

    The path in four steps, each a method, as in `ViT`: `embed` (pixels → feature map), `encode` (map → tokens; of the
    plain ResNet its places), `pool` (tokens → features), `classify` (features → logits). Any image size is taken.
    """

    def __init__(self, config: VTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.stem = ResNet(c)
        self.stem_proj = nn.Conv2d(c.trunk_dim, c.map_dim, 1, bias=False) if c.num_modules else None
        self.stem_norm = nn.BatchNorm2d(c.map_dim) if c.num_modules else None
        self.layers = nn.ModuleList(
            VTModule(c, first=i == 0, last=i == c.num_modules - 1) for i in range(c.num_modules)
        )
        self.head = nn.Linear(c.feature_dim, c.num_classes) if c.num_classes else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Convolutions as He et al. 2015, by fan-out; token products Xavier; residual branches and the head begin at 0.

        A zero norm at a block's end is Goyal et al. 2017, §5.1.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, GroupedLinear):
                nn.init.normal_(module.weight, std=(2 / sum(module.weight.shape[1:])) ** 0.5)
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.zeros_((module.norm3 or module.norm2).weight)
            elif isinstance(module, TokenTransformer):
                nn.init.zeros_(module.v.weight)
                nn.init.zeros_(module.fc2.weight)
            elif isinstance(module, Projector):
                nn.init.zeros_(module.v.weight)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → feature map (B, map_dim, H', W'); of the plain ResNet its last stage.

        Raises:
            ValueError: not four axes, or wrong channel count.
        """
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1] != c.num_channels:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; this model takes (B, {c.num_channels}, H, W).")
        x = self.stem(pixels)
        return x if self.stem_proj is None or self.stem_norm is None else self.stem_norm(self.stem_proj(x))

    def encode(self, feature_map: Tensor) -> Tensor:
        """(B, C, H', W') → tokens (B, L, D) of the last module; of the plain ResNet (B, H'·W', C)."""
        tokens, _ = self._encode(feature_map)
        return tokens

    def _encode(self, feature_map: Tensor) -> tuple[Tensor, list[Tensor]]:
        grid = feature_map.shape[-2], feature_map.shape[-1]
        x = feature_map.flatten(2).transpose(1, 2)  # B HW C
        tokens, attentions = None, []
        for layer in self.layers:
            x, tokens, attention = layer(x, tokens, grid)
            attentions.append(attention.unflatten(-1, grid))
        return x if tokens is None else tokens, attentions

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, L, D) → features (B, D)."""
        return tokens.mean(dim=1)

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D) → logits (B, K)."""
        if self.head is None:
            raise ValueError("this checkpoint has no head (num_classes 0): it gives features, not logits.")
        return self.head(features)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D)."""
        return self.pool(self.encode(self.embed(pixels)))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → logits (B, K); features (B, D) where there is no head."""
        features = self.features(pixels)
        return features if self.head is None else self.head(features)

    def attention(self, pixels: Tensor) -> list[Tensor]:
        """Where the tokens of each module come from: (B, heads, L, H', W'), each square of it summing to one."""
        return self._encode(self.embed(pixels))[1]
