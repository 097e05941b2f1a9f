"""Vision Transformer (Dosovitskiy et al. 2021), and the checkpoints that share its shape: DeiT, DINO, DINOv2,
and the hybrids with a ResNet in front."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opsin.models.layers import Activation, AttentionPool, Trace, TransformerLayer
from opsin.models.position import PosResize, resize_pos_embed
from opsin.models.resnet import ResNetStem, StemMaths, stem_stride

Pool = Literal["token", "mean", "map", "token_mean"]
"""Tokens → features: the class token, the mean patch, learned attention, or CLS ⊕ mean patch (DINOv2's linear head)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """Shape of a Vision Transformer; the defaults are ViT-B/16 (Dosovitskiy et al. 2021, Table 1)."""

    image_size: tuple[int, int] = (224, 224)  # (H, W) pixels, after preprocessing; the size of the position table
    patch_size: int = 16  # pixels; behind a stem, places of its feature map
    num_channels: int = 3
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000  # 0: no head, forward returns features

    norm_eps: float = 1e-6  # JAX release and timm; transformers configs carry 1e-12
    activation: Activation = "gelu"  # JAX release: gelu_tanh
    gated_mlp: bool = False  # SwiGLU (DINOv2 giant)
    qkv_bias: bool = True
    layer_scale: bool = False  # CaiT, DINOv2
    pos_resize: PosResize = "bicubic"
    stem: tuple[int, ...] | None = None  # hybrid: units per stage of a ResNet in front; (): its root alone
    stem_maths: StemMaths = "jax"

    class_token: bool = True
    distillation_token: bool = False  # DeiT: a second token
    distillation_head: bool = True  # a head of its own on that token; logits are then the mean of the two
    num_registers: int = 0  # DINOv2 with registers: extra tokens without positions
    pool: Pool = "token"
    norm_after_pool: bool = False  # timm's `fc_norm`: pool first, then normalise
    pre_logits: bool = False  # dense + tanh before the head (JAX pre-training), transformers' pooler

    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0  # of the last layer; grows linearly from 0

    def __post_init__(self) -> None:
        for name, known in (
            ("activation", Activation),
            ("pos_resize", PosResize),
            ("pool", Pool),
            ("stem_maths", StemMaths),
        ):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f'{name} is "{getattr(self, name)}". Known: {", ".join(get_args(known))}.')
        for size in self.image_size:
            check_divides(self.stride, size)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads ({self.num_heads}) does not divide embed_dim ({self.embed_dim}).")
        if not self.class_token and (self.distillation_token or self.pool in ("token", "token_mean")):
            raise ValueError(f'pool "{self.pool}" needs a class token. Without one, pool is "mean" or "map".')

    @property
    def stride(self) -> int:
        """Pixels from one patch to the next: the patch size, times what the stem shrinks."""
        return self.patch_size * stem_stride(self.stem)

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the position table, in patches."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def num_positioned(self) -> int:
        """Leading tokens that own a row of the position table: class and distillation token."""
        return self.class_token + self.distillation_token

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches: class, distillation, registers."""
        return self.num_positioned + self.num_registers

    @property
    def feature_dim(self) -> int:
        return self.embed_dim * (2 if self.pool == "token_mean" else 1)


def check_divides(patch_size: int, image_size: int) -> None:
    if image_size % patch_size or image_size < patch_size:
        low = image_size // patch_size * patch_size
        fit = f"{low}, {low + patch_size}" if low else f"{patch_size}"
        raise ValueError(
            f"patch_size ({patch_size}) does not divide image_size ({image_size}). Nearest that fit: {fit}."
        )


class ViT(nn.Module):
    """pixels (B, C, H, W) → logits (B, K), or features (B, D) where there is no head.

    The path in four steps, each a method: `embed` (pixels → tokens), `encode` (tokens → tokens), `pool`
    (tokens → features), `classify` (features → logits). `encode` and `pool` take a `Trace`, which shows tokens and
    attention of every layer on the way. Any H and W that the patch size divides are taken: the
    position table is resized to the new grid by the method of the checkpoint's family.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.gradient_checkpointing = False  # while training, keep the layers' inputs only and compute the rest again
        self.stem = None if c.stem is None else ResNetStem(c.num_channels, c.stem, maths=c.stem_maths)
        channels = c.num_channels if self.stem is None else self.stem.out_channels
        self.patch_embed = nn.Conv2d(channels, c.embed_dim, c.patch_size, stride=c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim)) if c.class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim)) if c.distillation_token else None
        self.registers = nn.Parameter(torch.zeros(1, c.num_registers, c.embed_dim)) if c.num_registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, c.num_positioned + math.prod(c.grid), c.embed_dim))
        self.layers = nn.ModuleList(
            TransformerLayer(
                c.embed_dim,
                c.num_heads,
                c.mlp_dim,
                norm_eps=c.norm_eps,
                activation=c.activation,
                gated_mlp=c.gated_mlp,
                qkv_bias=c.qkv_bias,
                layer_scale=c.layer_scale,
                dropout_rate=c.dropout_rate,
                drop_path_rate=c.drop_path_rate * i / max(c.num_layers - 1, 1),
            )
            for i in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.attn_pool = (
            AttentionPool(c.embed_dim, c.num_heads, c.mlp_dim, norm_eps=c.norm_eps, activation=c.activation)
            if c.pool == "map"
            else None
        )
        self.pre_logits = nn.Linear(c.embed_dim, c.embed_dim) if c.pre_logits else None
        self.head = nn.Linear(c.feature_dim, c.num_classes) if c.num_classes else None
        self.head_dist = (
            nn.Linear(c.feature_dim, c.num_classes)
            if c.num_classes and c.distillation_token and c.distillation_head
            else None
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random start as the JAX release: Xavier dense kernels, positions N(0, 0.02), zero class token and head.

        Source: vision_transformer `models_vit.py`; spec table "Initialisation".
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    if ".mlp." in name:
                        nn.init.normal_(module.bias, std=1e-6)
                    else:
                        nn.init.zeros_(module.bias)
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.weight, std=fan_in**-0.5 / 0.87962566, a=-2, b=2)  # lecun_normal
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.pos_embed, std=0.02)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        if self.attn_pool is not None:
            nn.init.xavier_uniform_(self.attn_pool.probe[0])
        for head in (self.head, self.head_dist):
            if head is not None:
                nn.init.zeros_(head.weight)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → tokens (B, P + N, D) with positions: class, distillation, registers, then patches row by row.

        Raises:
            ValueError: not four axes, wrong channel count, or a side that the patch size does not divide.
        """
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1] != c.num_channels:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; this model takes (B, {c.num_channels}, H, W).")
        height, width = pixels.shape[-2:]
        check_divides(c.stride, height)
        check_divides(c.stride, width)
        grid = height // c.stride, width // c.stride
        x = self.patch_embed(pixels if self.stem is None else self.stem(pixels)).flatten(2).transpose(1, 2)  # B N D
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.dist_token) if t is not None]
        x = torch.cat([*prefix, x], dim=1)
        x = x + resize_pos_embed(self.pos_embed, c.grid, grid, num_prefix=c.num_positioned, method=c.pos_resize)
        if self.registers is not None:
            front, patches = x[:, : c.num_positioned], x[:, c.num_positioned :]
            x = torch.cat([front, self.registers.expand(x.shape[0], -1, -1), patches], dim=1)
        return nn.functional.dropout(x, c.dropout_rate, self.training)

    def encode(self, tokens: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, P + N, D) → (B, P + N, D): all layers and, unless it comes after the pooling, the final norm."""
        for layer in self.layers:
            if trace is not None:
                tokens = layer(tokens, trace)
            elif self.gradient_checkpointing and self.training:
                tokens = checkpoint(layer, tokens, use_reentrant=False)
            else:
                tokens = layer(tokens)
        if trace is not None:
            trace.states.append(tokens)
        return tokens if self.config.norm_after_pool else self.norm(tokens)

    def pool(self, tokens: Tensor, trace: Trace | None = None) -> Tensor:
        """Encoded tokens (B, P + N, D) → features (B, D); (B, 2·D) for `token_mean`."""
        c = self.config
        if self.attn_pool is not None:
            patches = tokens[:, c.num_prefix :]
            x = self.attn_pool(patches) if trace is None else self.attn_pool(patches, trace)  # an engine's takes none
        elif c.pool == "token":
            x = tokens[:, 0]
        else:
            x = tokens[:, c.num_prefix :].mean(dim=1)
            if c.pool == "token_mean":
                x = torch.cat([tokens[:, 0], x], dim=1)
        return self.norm(x) if c.norm_after_pool else x

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D) → logits (B, K). A model with a distillation token has a second head: see `forward`."""
        if self.head is None:
            raise ValueError("this checkpoint has no head (num_classes 0): it gives features, not logits.")
        if self.pre_logits is not None:
            features = torch.tanh(self.pre_logits(features))
        return self.head(features)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D), before any `pre_logits`."""
        return self.pool(self.encode(self.embed(pixels)))

    def forward(self, pixels: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, C, H, W) → logits (B, K); features (B, D) where there is no head.

        With a distillation token, the mean of the two heads' logits (Touvron et al. 2021, §4).
        """
        tokens = self.encode(self.embed(pixels), trace)
        features = self.pool(tokens, trace)
        if self.head is None:
            return features
        logits = self.classify(features)
        return logits if self.head_dist is None else (logits + self.head_dist(tokens[:, 1])) / 2

    def attention(self, pixels: Tensor) -> list[Tensor]:
        """Softmax attention of every layer, (B, heads, P + N, P + N) each, computed beside the fused forward path."""
        self.encode(self.embed(pixels), trace := Trace())
        return [use.weights() for use in trace.attended]
