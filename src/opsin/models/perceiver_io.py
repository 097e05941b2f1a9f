"""The published Perceiver IO networks, one class a task, put together from `perceiver.py` and `front_ends.py`.

    ImagePerceiver        pixels → class logits              vision-perceiver-conv, -fourier, -learned
    TextPerceiver         bytes → logits of each byte        language-perceiver
    FlowPerceiver         two frames → motion of each pixel  optical-flow-perceiver
    MultimodalPerceiver   video, audio → the same, and class logits   multimodal-perceiver

Source: Jaegle et al. 2021; shapes from the notebooks in deepmind-research `perceiver/colabs`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.models.front_ends import (
    AudioPatches,
    Bytes,
    Conv1x1,
    ConvDownsample,
    FlowPatches,
    Multimodal,
    Numerics,
    OneHot,
    Patches,
    Pixels,
    flow_patches,
)
from opsin.models.layers import Activation, Trace
from opsin.models.perceiver import ClassificationDecoder, Decoder, DenseDecoder, Encoder, MultimodalDecoder
from opsin.models.position import FourierPositions, TrainablePositions

FrontEnd = Literal["conv", "pixels", "conv1x1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerceiverConfig:
    """What the four networks share: the encoder; the defaults are those of the image classifiers."""

    num_latents: int = 512
    latent_dim: int = 1024
    num_blocks: int = 8  # share their layers
    layers_per_block: int = 6
    num_heads: int = 8
    num_cross_heads: int = 1
    qk_dim: int | None = None  # of the encoder; so is v_dim
    v_dim: int | None = None
    mlp_ratio: int = 1
    cross_mlp_ratio: int | None = None  # of the encoder's cross-attention; mlp_ratio without it
    query_residual: bool = True
    numerics: Numerics = "deepmind"

    def __post_init__(self) -> None:
        if self.numerics not in get_args(Numerics):
            raise ValueError(f'numerics is "{self.numerics}". Known: {", ".join(get_args(Numerics))}.')
        counts = (
            "num_latents",
            "latent_dim",
            "num_blocks",
            "layers_per_block",
            "num_heads",
            "num_cross_heads",
            "mlp_ratio",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_blocks > 1000:  # no tensor says how often the layers are run
            raise ValueError(f"num_blocks is {self.num_blocks}; 1,000 is the most that is taken.")

    @property
    def num_layers(self) -> int:
        """Distinct self-attention layers."""
        return self.layers_per_block

    @property
    def activation(self) -> Activation:
        return "gelu" if self.numerics == "transformers" else "gelu_tanh"

    def encoder(self, input_dim: int) -> Encoder:
        return Encoder(
            input_dim,
            num_latents=self.num_latents,
            latent_dim=self.latent_dim,
            num_blocks=self.num_blocks,
            layers_per_block=self.layers_per_block,
            num_heads=self.num_heads,
            num_cross_heads=self.num_cross_heads,
            qk_dim=self.qk_dim,
            v_dim=self.v_dim,
            mlp_ratio=self.mlp_ratio,
            cross_mlp_ratio=self.cross_mlp_ratio,
            activation=self.activation,
            query_residual=self.query_residual,
        )


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePerceiverConfig(PerceiverConfig):
    """Shape of an image classifier; the defaults are vision-perceiver-conv."""

    front_end: FrontEnd = "conv"
    image_size: tuple[int, int] = (224, 224)  # (H, W) pixels, after preprocessing
    num_channels: int = 3
    embed_dim: int = 64  # of a token's content: conv 64, conv1x1 256; pixels are as they are
    num_stages: int = 1  # conv: each makes a quarter of the side
    num_bands: int = 64
    max_resolution: tuple[int, int] = (56, 56)  # pixels: (224, 224)
    decoder_residual: bool = True  # DeepMind's release of the learned model: False
    num_classes: int = 1000  # 0: no head, forward returns features

    def __post_init__(self) -> None:
        PerceiverConfig.__post_init__(self)
        if self.front_end not in get_args(FrontEnd):
            raise ValueError(f'front_end is "{self.front_end}". Known: {", ".join(get_args(FrontEnd))}.')
        if self.front_end == "conv" and min(self.image_size) < (least := 2 * 4**self.num_stages):
            raise ValueError(f"image_size {self.image_size} is too small: the convolution takes {least} and more.")

    @property
    def stride(self) -> int:
        """What the sides of an image are asked to be multiples of: any size can be taken, for pixels are tokens."""
        return 1

    @property
    def feature_dim(self) -> int:
        return self.latent_dim


class ImagePerceiver(nn.Module):
    """pixels (B, C, H, W) → logits (B, K), or features (B, D) where there is no head.

    The path in four steps, each a method, as in `ViT`: `embed` (pixels → tokens), `encode` (tokens → latents), `pool`
    (latents → features: what the decoder's query reads), `classify` (features → logits). `encode` and `pool` take a
    `Trace`, which shows the attention on the way: input to latents, among latents, latents to query. Any image size is
    taken:
    Fourier positions are computed for it, learned ones interpolated.
    """

    def __init__(self, config: ImagePerceiverConfig) -> None:
        super().__init__()
        c = self.config = config
        self.front_end: Pixels | Conv1x1 | ConvDownsample
        if c.front_end == "conv":
            self.front_end = ConvDownsample(
                c.image_size,
                num_channels=c.num_channels,
                embed_dim=c.embed_dim,
                num_stages=c.num_stages,
                num_bands=c.num_bands,
                max_resolution=c.max_resolution,
                numerics=c.numerics,
            )
        elif c.front_end == "pixels":
            self.front_end = Pixels(
                c.image_size, num_channels=c.num_channels, num_bands=c.num_bands, max_resolution=c.max_resolution
            )
        else:
            self.front_end = Conv1x1(c.image_size, num_channels=c.num_channels, embed_dim=c.embed_dim)
        self.encoder = c.encoder(self.front_end.dim)
        self.decoder = ClassificationDecoder(
            c.num_classes or None,
            query_dim=c.latent_dim,
            latent_dim=c.latent_dim,
            query_residual=c.decoder_residual,
            activation=c.activation,
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → tokens (B, N, C), content and position side by side.

        Raises:
            ValueError: not four axes, or wrong channel count.
        """
        c = self.config
        if pixels.ndim != 4 or pixels.shape[1] != c.num_channels:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}; this model takes (B, {c.num_channels}, H, W).")
        return self.front_end(pixels)

    def encode(self, tokens: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, N, C) → latents (B, M, D)."""
        return self.encoder(tokens, trace=trace)

    def pool(self, latents: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, M, D) → features (B, D)."""
        return self.decoder.features(latents, trace)

    def classify(self, features: Tensor) -> Tensor:
        """Features (B, D) → logits (B, K)."""
        if self.decoder.out is None:
            raise ValueError("this checkpoint has no head (num_classes 0): it gives features, not logits.")
        return self.decoder.out(features)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D)."""
        return self.pool(self.encode(self.embed(pixels)))

    def forward(self, pixels: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, C, H, W) → logits (B, K); features (B, D) where there is no head."""
        features = self.pool(self.encode(self.embed(pixels), trace), trace)
        return features if self.decoder.out is None else self.decoder.out(features)


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPerceiverConfig(PerceiverConfig):
    """Shape of a masked language model on bytes; the defaults are language-perceiver."""

    num_latents: int = 256
    latent_dim: int = 1280
    num_blocks: int = 1
    layers_per_block: int = 26
    num_cross_heads: int = 8
    qk_dim: int | None = 256
    v_dim: int | None = 1280
    vocab_size: int = 262
    max_length: int = 2048  # bytes and special tokens
    embed_dim: int = 768
    decoder_heads: int | None = None  # num_cross_heads without it
    decoder_qk_dim: int | None = None  # qk_dim without it


class TextPerceiver(nn.Module):
    """Token ids (B, N) → logits (B, N, V) of the byte in every place."""

    def __init__(self, config: TextPerceiverConfig) -> None:
        super().__init__()
        c = self.config = config
        self.front_end = Bytes(c.vocab_size, c.max_length, c.embed_dim)
        self.encoder = c.encoder(c.embed_dim)
        self.decoder = Decoder(
            TrainablePositions((c.max_length,), c.embed_dim),
            query_dim=c.embed_dim,
            latent_dim=c.latent_dim,
            out_dim=None,
            num_heads=c.decoder_heads or c.num_cross_heads,
            qk_dim=c.decoder_qk_dim or c.qk_dim,
            v_dim=c.embed_dim,
            activation=c.activation,
        )
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, ids: Tensor, mask: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        """
        Args:
            ids: (B, N) int64, N up to `max_length`.
            mask: (B, N), nonzero where a token is real.
        Returns:
            (B, N, V).
        Raises:
            ValueError: N is more than `max_length`.
        """
        mask = None if mask is None else mask.bool()
        return self.decode(self.queries(ids), self.encoder(self.embed(ids), mask, trace), mask, trace)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, N) → tokens (B, N, C)."""
        if ids.shape[1] > self.config.max_length:
            raise ValueError(f"{ids.shape[1]} tokens; this model takes up to {self.config.max_length}.")
        return self.front_end(ids)

    def queries(self, ids: Tensor) -> Tensor:
        """(B, N) → one query for each place, (B, N, F)."""
        assert self.decoder.positions is not None
        return self.decoder.positions()[: ids.shape[1]].expand(ids.shape[0], -1, -1)

    def decode(
        self, queries: Tensor, latents: Tensor, mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """(B, N, F), (B, M, D) → logits (B, N, V); the embedding matrix is also the last layer.

        Args:
            mask: (B, N) bool. The original masks the queries too, which changes padded places only.
        """
        x = self.decoder(queries, latents, mask if self.config.numerics == "deepmind" else None, trace)
        return F.linear(x, self.front_end.embed.weight, self.bias)


# ── optical flow ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowPerceiverConfig(PerceiverConfig):
    """Shape of an optical-flow network; the defaults are optical-flow-perceiver."""

    num_latents: int = 2048
    latent_dim: int = 512
    num_blocks: int = 1
    layers_per_block: int = 24
    num_heads: int = 16
    image_size: tuple[int, int] = (368, 496)  # (H, W) of a tile; also the resolution of the positions
    embed_dim: int = 64
    num_bands: int = 64


class FlowPerceiver(nn.Module):
    """Two frames → the motion of every pixel of the first, in units of 20 pixels (`PIXELS_PER_UNIT`)."""

    PIXELS_PER_UNIT = 20.0  # the release multiplies outside of the network
    RESCALE = 100.0

    def __init__(self, config: FlowPerceiverConfig) -> None:
        super().__init__()
        c = self.config = config
        self.front_end = FlowPatches(
            c.image_size, embed_dim=c.embed_dim, num_bands=c.num_bands, max_resolution=c.image_size
        )
        self.encoder = c.encoder(self.front_end.dim)
        self.decoder = DenseDecoder(
            query_dim=self.front_end.dim,
            latent_dim=c.latent_dim,
            out_dim=2,
            activation=c.activation,
        )

    def forward(self, frames: Tensor) -> Tensor:
        """(B, 2, 3, H, W), in [-1, 1] → (B, H, W, 2): x and y of the motion, in units of 20 pixels."""
        return self.from_patches(flow_patches(frames))

    def from_patches(self, patches: Tensor) -> Tensor:
        """(B, 2, 27, H, W), as `flow_patches` makes them → (B, H, W, 2)."""
        tokens = self.front_end(patches)
        return self.decode(tokens, self.encoder(tokens)).unflatten(1, patches.shape[-2:])

    def decode(self, tokens: Tensor, latents: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, H·W, C), which are the queries, (B, M, D) → (B, H·W, 2)."""
        return self.decoder(tokens, latents, trace=trace) / self.RESCALE


# ── video, audio and label ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class MultimodalPerceiverConfig(PerceiverConfig):
    """Shape of an autoencoder of video with sound; the defaults are multimodal-perceiver (Kinetics-700)."""

    num_latents: int = 784
    latent_dim: int = 512
    num_blocks: int = 1
    layers_per_block: int = 8
    num_frames: int = 16
    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 4
    image_bands: int = 32
    max_resolution: tuple[int, int] | None = None  # of the image's positions, in patches; its own grid without it
    samples_per_frame: int = 1920  # 48 kHz at 25 frames a second
    samples_per_patch: int = 16
    audio_bands: int = 192
    num_classes: int = 700
    label_dim: int = 1024  # of the label's query
    output_dim: int = 512  # that one decoder gives, before each modality's own projection

    def __post_init__(self) -> None:
        PerceiverConfig.__post_init__(self)
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(f"patch_size ({self.patch_size}) does not divide image_size {self.image_size}.")
        if self.num_samples % self.samples_per_patch:
            raise ValueError(f"samples_per_patch ({self.samples_per_patch}) does not divide {self.num_samples}.")

    @property
    def num_samples(self) -> int:
        return self.num_frames * self.samples_per_frame

    @property
    def patch_grid(self) -> tuple[int, int, int]:
        """(T, H, W) in patches."""
        height, width = self.image_size
        return self.num_frames, height // self.patch_size, width // self.patch_size

    @property
    def resolution(self) -> tuple[int, int, int]:
        """(T, H, W) whose halves are the highest frequencies of the image's positions."""
        return self.num_frames, *(self.max_resolution or self.patch_grid[1:])


class MultimodalPerceiver(nn.Module):
    """Video, audio and label through one set of latents, and back."""

    def __init__(self, config: MultimodalPerceiverConfig) -> None:
        super().__init__()
        c = self.config = config
        self.front_end = Multimodal(
            {
                "audio": AudioPatches(c.num_samples, samples_per_patch=c.samples_per_patch, num_bands=c.audio_bands),
                "image": Patches(
                    c.patch_grid, patch_size=c.patch_size, num_bands=c.image_bands, max_resolution=c.resolution
                ),
                "label": OneHot(c.num_classes),
            },
            mask_rates={"audio": 0.0, "image": 0.0, "label": 1.0},
            min_padding=4,
        )
        self.encoder = c.encoder(self.front_end.dim)
        num_patches = c.num_samples // c.samples_per_patch
        self.decoder = MultimodalDecoder(
            {
                "audio": FourierPositions((num_patches,), c.audio_bands, (c.num_samples,)),
                "image": FourierPositions((c.num_frames, *c.image_size), c.image_bands, c.resolution, tabulate=False),
                "label": TrainablePositions((1,), c.label_dim),
            },
            latent_dim=c.latent_dim,
            out_dim=c.output_dim,
            activation=c.activation,
        )
        self.outputs = nn.ModuleDict(
            {
                "audio": nn.Linear(c.output_dim, c.samples_per_patch),
                "image": nn.Linear(c.output_dim, 3),
                "label": nn.Linear(c.output_dim, c.num_classes),
            }
        )

    def encode(self, video: Tensor, audio: Tensor) -> Tensor:
        """Latents (B, M, D) of (B, T, 3, H, W) in [0, 1] and samples (B, S) in [-1, 1]. The label stays hidden."""
        return self.encoder(self.embed(video, audio))

    def embed(self, video: Tensor, audio: Tensor) -> Tensor:
        """Tokens (B, N, C): audio, video, the hidden label."""
        label = video.new_zeros(video.shape[0], self.config.num_classes)
        return self.front_end({"audio": audio, "image": video, "label": label})

    def decode(
        self, latents: Tensor, *, image_points: Tensor, audio_points: Tensor, trace: Trace | None = None
    ) -> dict[str, Tensor]:
        """Some of the outputs, at flat indices: pixels of (T, H, W), and audio patches.

        Returns:
            image (B, n, 3), audio (B, m · samples_per_patch), label: logits (B, K).
        """
        points: Mapping[str, Tensor] = {"image": image_points, "audio": audio_points}
        x = self.decoder(self.decoder.queries(latents, points), latents, trace=trace)
        audio, image, label = x.split([len(audio_points), len(image_points), 1], dim=1)
        return {
            "audio": self.outputs["audio"](audio).flatten(1),
            "image": self.outputs["image"](image),
            "label": self.outputs["label"](label)[:, 0],
        }
