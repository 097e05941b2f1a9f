"""Perceiver IO (Jaegle et al. 2021): a fixed set of latents reads any input, queries write any output.

    inputs ── front end ──▶ tokens B N C ── encoder ──▶ latents B M D ── decoder ──▶ outputs B Q K
                            (front_ends.py)                               ▲
                                                              queries B Q F

Each of the three can be replaced: `examples/audio_digits.py` builds a network for a new modality from these parts.
The published networks, put together from them, are in `perceiver_io.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opsin.models.layers import Activation, CrossAttentionLayer, Trace, TransformerLayer
from opsin.models.position import FourierPositions, TrainablePositions

NORM_EPS = 1e-5  # Haiku's, and in effect transformers', whose config field of this name is never read


def linear_init_(weight: Tensor) -> None:
    """Normal, cut off at two standard deviations, variance 1/fan-in: Haiku's default for dense layers and kernels."""
    nn.init.trunc_normal_(weight, std=(std := weight[0].numel() ** -0.5 / 0.87962566), a=-2 * std, b=2 * std)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Random start as the original: dense layers and kernels by `linear_init_`, their biases 0, embeddings σ 0.02."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            linear_init_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)


class Encoder(nn.Module):
    """Latents read the tokens once, then attend to themselves, `num_blocks` times through the same layers.

    Args:
        input_dim: C, width of the tokens.
        num_latents, latent_dim: M and D.
        num_blocks, layers_per_block: the block's layers are distinct, the blocks share them.
        qk_dim, v_dim: widths of queries and keys, and of values, in every layer. Without them the cross-attention
            takes those of the tokens, the self-attention those of the latents.
        mlp_ratio, cross_mlp_ratio: hidden width of the MLPs, in widths of their input; that of the cross-attention's is
            as the others' without the second.
        gradient_checkpointing: while training, keep the inputs of the layers only and compute the rest again.
    Source: deepmind-research `perceiver/perceiver.py` `PerceiverEncoder`.
    """

    def __init__(
        self,
        input_dim: int,
        *,
        num_latents: int = 512,
        latent_dim: int = 1024,
        num_blocks: int = 8,
        layers_per_block: int = 6,
        num_heads: int = 8,
        num_cross_heads: int = 1,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        mlp_ratio: int = 1,
        cross_mlp_ratio: int | None = None,
        activation: Activation = "gelu_tanh",
        query_residual: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.num_blocks, self.gradient_checkpointing = latent_dim, num_blocks, gradient_checkpointing
        self.latents = nn.Parameter(torch.empty(num_latents, latent_dim))
        nn.init.trunc_normal_(self.latents, std=0.02, a=-0.04, b=0.04)
        self.cross = CrossAttentionLayer(
            latent_dim,
            input_dim,
            num_cross_heads,
            (cross_mlp_ratio or mlp_ratio) * latent_dim,
            norm_eps=NORM_EPS,
            activation=activation,
            qk_dim=qk_dim,
            v_dim=v_dim,
            query_residual=query_residual,
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                latent_dim,
                num_heads,
                mlp_ratio * latent_dim,
                norm_eps=NORM_EPS,
                activation=activation,
                qk_dim=qk_dim,
                v_dim=v_dim,
            )
            for _ in range(layers_per_block)
        )
        init_weights(self)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        """(B, N, C) → latents (B, M, D).

        Args:
            mask: (B, N) bool, which tokens are real; where none is, the latents read zeros.
            trace: gets the latents before each layer and once more after each block, and every attention.
        """
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        latents = self._run(self.cross, latents, tokens, mask, trace=trace)
        for _ in range(self.num_blocks):
            for layer in self.layers:
                latents = self._run(layer, latents, trace=trace)
            if trace is not None:
                trace.states.append(latents)
        return latents

    def _run(self, layer: nn.Module, *inputs: Tensor | None, trace: Trace | None) -> Tensor:
        if trace is not None:
            return layer(*inputs, trace=trace)
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class Decoder(nn.Module):
    """Queries read the latents: (B, Q, F) → (B, Q, K).

    Args:
        positions: what the queries are; None where a subclass makes them.
        query_dim: F.
        latent_dim: D.
        out_dim: K; None leaves the queries' width, without a last projection.
        qk_dim, v_dim: `latent_dim` without them.
    Source: deepmind-research `perceiver/perceiver.py` `BasicDecoder`.
    """

    def __init__(
        self,
        positions: FourierPositions | TrainablePositions | None,
        *,
        query_dim: int,
        latent_dim: int,
        out_dim: int | None,
        num_heads: int = 1,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        query_residual: bool = False,
        activation: Activation = "gelu_tanh",
    ) -> None:
        super().__init__()
        self.positions = positions
        self.cross = CrossAttentionLayer(
            query_dim,
            latent_dim,
            num_heads,
            query_dim,
            norm_eps=NORM_EPS,
            activation=activation,
            qk_dim=qk_dim,
            v_dim=v_dim,
            query_residual=query_residual,
        )
        self.out = None if out_dim is None else nn.Linear(query_dim, out_dim)
        init_weights(self)

    def queries(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) of the input → queries (B, Q, F): here their positions, the same for every input."""
        assert self.positions is not None
        return self.positions(like=tokens).expand(tokens.shape[0], -1, -1)

    def read(
        self, queries: Tensor, latents: Tensor, query_mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """(B, Q, F), before the last projection. `query_mask` (B, Q) bool: the others read zeros."""
        return self.cross(queries, latents, None, query_mask, trace)

    def forward(
        self, queries: Tensor, latents: Tensor, query_mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """(B, Q, F), (B, M, D) → (B, Q, K)."""
        x = self.read(queries, latents, query_mask, trace)
        return x if self.out is None else self.out(x)


class ClassificationDecoder(Decoder):
    """One trainable query: latents → logits (B, K)."""

    def __init__(self, num_classes: int | None, *, query_dim: int, latent_dim: int, **rest: Any) -> None:
        super().__init__(
            TrainablePositions((1,), query_dim), query_dim=query_dim, latent_dim=latent_dim, out_dim=num_classes, **rest
        )

    def features(self, latents: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, M, D) → what the query read, (B, F)."""
        return self.read(self.queries(latents), latents, trace=trace)[:, 0]

    def forward(
        self, queries: Tensor, latents: Tensor, query_mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        return super().forward(queries, latents, trace=trace)[:, 0]


class ProjectionDecoder(nn.Module):
    """No queries: the mean latent, projected; the head of the first Perceiver (Jaegle et al. 2021, 2103.03206)."""

    def __init__(self, num_classes: int, *, latent_dim: int) -> None:
        super().__init__()
        self.out = nn.Linear(latent_dim, num_classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def queries(self, tokens: Tensor) -> None:
        return None

    def forward(self, queries: None, latents: Tensor) -> Tensor:
        return self.out(latents.mean(dim=1))


class DenseDecoder(Decoder):
    """One output per token: the tokens themselves are the queries. Optical flow is read out in this way."""

    def __init__(self, *, query_dim: int, latent_dim: int, out_dim: int, **rest: Any) -> None:
        super().__init__(None, query_dim=query_dim, latent_dim=latent_dim, out_dim=out_dim, **rest)
        assert self.out is not None
        nn.init.zeros_(self.out.weight)  # the network begins with no motion anywhere

    def queries(self, tokens: Tensor) -> Tensor:
        return tokens


class MultimodalDecoder(Decoder):
    """One cross-attention for all modalities: each one's queries, padded with a learned vector to a common width.

    Args:
        modalities: name → positions of its outputs; they are decoded in the order of their names.
        min_padding: the widest is padded with this many.
    Source: deepmind-research `perceiver/perceiver.py` `MultimodalDecoder`.
    """

    def __init__(
        self,
        modalities: Mapping[str, FourierPositions | TrainablePositions],
        *,
        latent_dim: int,
        out_dim: int,
        min_padding: int = 2,
        **rest: Any,
    ) -> None:
        width = max(positions.dim for positions in modalities.values()) + min_padding
        super().__init__(None, query_dim=width, latent_dim=latent_dim, out_dim=out_dim, **rest)
        self.modalities = nn.ModuleDict({name: modalities[name] for name in sorted(modalities)})
        self.padding = padding_vectors({name: width - part.dim for name, part in modalities.items()})

    def queries(self, tokens: Tensor, points: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, Q, F), modality by modality.

        Args:
            points: name → flat indices (n,) of the outputs wanted of a modality with Fourier positions; all of its
                outputs without it. Coordinates differ slightly between the two: see `point_positions`.
        """
        parts = []
        for name, positions in self.modalities.items():
            chosen = None if points is None else points.get(name)
            assert isinstance(positions, FourierPositions | TrainablePositions)
            if chosen is None or isinstance(positions, TrainablePositions):
                table = positions(like=tokens)
            else:
                table = positions.at(chosen).to(tokens)
            parts.append(torch.cat([table, self.padding[name].expand(table.shape[0], -1)], dim=1))
        return torch.cat(parts).expand(tokens.shape[0], -1, -1)


def padding_vectors(widths: Mapping[str, int]) -> nn.ParameterDict:
    """Name → a learned vector (1, width)."""
    vectors = nn.ParameterDict()
    for name in sorted(widths):
        vectors[name] = nn.Parameter(torch.empty(1, widths[name]))
        nn.init.trunc_normal_(vectors[name], std=0.02, a=-0.04, b=0.04)
    return vectors


class Perceiver(nn.Module):
    """A front end, an encoder and a decoder: any inputs → any outputs.

    Args:
        front_end: inputs → tokens (B, N, C); one of `front_ends.py` or any module with that result.
        encoder: tokens → latents.
        decoder: has `queries(tokens)` and gives outputs for (queries, latents).
    """

    def __init__(self, front_end: nn.Module, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.front_end, self.encoder, self.decoder = front_end, encoder, decoder

    def forward(self, inputs: Any, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            inputs: whatever the front end takes.
            mask: (B, N) bool, which tokens are real.
        """
        tokens = self.front_end(inputs)
        return self.decoder(self.decoder.queries(tokens), self.encoder(tokens, mask))  # type: ignore[operator]
