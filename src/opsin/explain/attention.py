"""The attention of one image, from the tokens to the answer: raw, rolled out, weighted with gradients.

    ViT        tokens ──▶ layers ──▶ class token, mean token or attention pool ──▶ answer
    Perceiver  tokens ──▶ latents ──▶ layers ──▶ decoder's query ──▶ answer

The pass is the model's own, with its fused attention; a `Trace` takes note of it, and the weights are computed beside
it, one layer at a time. All maps follow one row back through the layers, from what the answer reads to the tokens, so
that no product of two N × N matrices is made.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from opsin.device import exact_fp32
from opsin.explain.place import token_place
from opsin.models.layers import Attended, Trace
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT

Weigh = Callable[[Attended], Tensor]
"""An attention of one image → weights (M, N), heads taken together."""


class Pass:
    """One image through a `ViT` or `ImagePerceiver`, with every attention on the way.

    Args:
        pixels: (1, C, H, W), on the model's device.
        grad: keep what gradients need, whatever mode the caller is in and whether the parameters want any.
    """

    def __init__(self, model: nn.Module, pixels: Tensor, *, grad: bool = False) -> None:
        assert isinstance(model, ViT | ImagePerceiver)
        self.model = model
        self.grid = token_place(model, (pixels.shape[-2], pixels.shape[-1])).grid
        trace = Trace()
        with torch.set_grad_enabled(grad), exact_fp32(pixels.device):
            self.output = model(pixels.clone().requires_grad_(grad), trace)  # 1 K
        uses = trace.attended
        self.read: Attended | None  # the latents read the tokens
        self.answer: Attended | None  # a learned query reads what the layers give
        if isinstance(model, ImagePerceiver):
            self.num_prefix = 0
            self.read, *self.layers, self.answer = uses
        else:
            self.num_prefix = model.config.num_prefix
            self.read, self.answer = None, uses.pop() if model.attn_pool is not None else None
            self.layers = uses

    @property
    def uses(self) -> list[Attended]:
        """Every attention, from the tokens to the answer."""
        return [use for use in (self.read, *self.layers, self.answer) if use is not None]

    def first_row(self, weigh: Weigh) -> Tensor:
        """(M,): how much of the answer each of the last layer's tokens or latents is."""
        if self.answer is not None:
            row = weigh(self.answer)[0]
            return torch.cat([row.new_zeros(self.num_prefix), row])  # a pool looks at the patches only
        assert isinstance(self.model, ViT)
        pool, count = self.model.config.pool, self.layers[0].tokens.shape[1]
        row = self.output.new_zeros(count)
        if pool in ("mean", "token_mean"):
            row[self.num_prefix :] = 1 / (count - self.num_prefix)
        if pool in ("token", "token_mean"):
            row[0] = 1
        row /= row.sum()
        if self.model.head_dist is not None:  # the answer is the mean of what two heads say
            row /= 2
            row[1] += 1 / 2
        return row

    def to_tokens(self, rows: Tensor, weigh: Weigh) -> Tensor:
        """(…, M) over what the first layer is given → (…, h, w) over the image."""
        if self.read is not None:
            rows = rows @ weigh(self.read)
        return rows[..., self.num_prefix :].unflatten(-1, self.grid)


def weights(use: Attended) -> Tensor:
    """(heads, M, N) of the only image."""
    return use.weights()[0]


def mean_weights(use: Attended) -> Tensor:
    return weights(use).mean(dim=0)


# ── methods ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def rollout(model: nn.Module, pixels: Tensor) -> np.ndarray:
    """Attention rollout: (h, w) float32, sum at most one (what is missing went to class token and registers).

    A of each layer is the mean of its heads; half of it and half of the identity, for the residual, are multiplied
    through all layers. The first factor is what the answer reads: the class token's row, the mean of the patches' rows
    under mean pooling, both under `token_mean`, those of class and distillation token where both have a head, the
    weights of an attention pool. A Perceiver has its decoder's weights there, and the latents' weights on the input as
    the last factor. Its residuals at both ends carry nothing of the input, so there is no identity in them.

    Source: Abnar & Zuidema 2020, §3 "Attention rollout"; Dosovitskiy et al. 2021, Appendix D.8.
    """
    with torch.inference_mode():
        path = Pass(model, pixels)
        row = path.first_row(mean_weights)
        for use in reversed(path.layers):
            row = (row + row @ mean_weights(use)) / 2  # both have rows that sum to one, and so has their mean
        return path.to_tokens(row, mean_weights).cpu().numpy()


def relevance(model: nn.Module, pixels: Tensor, target: int) -> np.ndarray:
    """Gradient-weighted relevance of the tokens for one logit: (h, w) float32, 0 and more.

    Of each attention Ā = mean over heads of (∇A ⊙ A)⁺, ∇A the gradient of the target's logit. R starts as the identity
    and becomes R + Ā·R in each layer (eq. 5, 6); read is the row of the class token, or that of the other read-outs as
    in `rollout`. An attention pool is a cross-attention, Ā·R̄, R̄ with its rows normalised (eq. 8 to 10). In a Perceiver
    the latents begin with Ā of the input's cross-attention (eq. 10, nothing before it), carry it through their layers
    (eq. 7), and the decoder's query takes it over from the latents it attends to, Ā·R (eq. 11).

    Where every gradient at the read-out of a Perceiver or an attention pool is negative, as for a class that an image
    does not resemble, nothing is left: the map is 0.

    Source: Chefer et al. 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers", §3.
    """
    with torch.inference_mode(False):
        path = Pass(model, pixels, grad=True)
        uses = path.uses
        grads = torch.autograd.grad(path.output[0, target], [use.context for use in uses])
        by_use = {id(use): grad for use, grad in zip(uses, grads, strict=True)}

        @torch.no_grad()
        def weigh(use: Attended) -> Tensor:
            return (use.weights_grad(by_use[id(use)]) * use.weights()).clamp(min=0)[0].mean(dim=0)

        with torch.no_grad(), exact_fp32(pixels.device):
            row = path.first_row(weigh)
            if path.read is None and path.answer is not None:
                share = row / _row_sums(path.layers, weigh, row)
                row = _carry(share, path.layers, weigh) - share + row
            else:
                row = _carry(row, path.layers, weigh)
            return path.to_tokens(row, weigh).cpu().numpy()


def _carry(row: Tensor, layers: Sequence[Attended], weigh: Weigh) -> Tensor:
    """row · R, R the product of I + Ā over the layers."""
    for use in reversed(layers):
        row = row + row @ weigh(use)
    return row


def _row_sums(layers: Sequence[Attended], weigh: Weigh, like: Tensor) -> Tensor:
    """(M,) sums of the rows of R - I; 1 where a row is empty, which then stays so."""
    ones = torch.ones_like(like)
    sums = ones
    for use in layers:
        sums = sums + weigh(use) @ sums
    return torch.where(sums > ones, sums - ones, ones)


def heads(model: nn.Module, pixels: Tensor) -> np.ndarray:
    """What each head of each layer attends to for the answer: (layers, heads, h, w) float32.

    Of a ViT, the rows of the attention that the answer reads, weighted as in `rollout`, on the patches; layers before
    the last are shown as if the answer read them directly.

    Of a Perceiver, layer 0 is the input's cross-attention: where the latents look that the decoder's query reads.
    Layers 1 and up are the self-attentions, every use of a shared layer one: those latents look at other latents, which
    are placed by where they look themselves (mean of the cross-attention's heads). Where the cross-attention has fewer
    heads than the others, or more, what is not there is NaN.

    Source: the maps of the class token in Caron et al. 2021 (DINO), fig. 1 and 3; Jaegle et al. 2021 (Perceiver),
    fig. 3, composed with the layers behind it.
    """
    with torch.inference_mode():
        path = Pass(model, pixels)
        row = path.first_row(mean_weights)
        maps = [path.to_tokens(row @ weights(use), mean_weights) for use in path.layers]
        if path.read is not None:
            maps.insert(0, (row @ weights(path.read)).unflatten(-1, path.grid))
        count = max(map(len, maps))
        found = np.full((len(maps), count, *path.grid), np.nan, np.float32)
        for layer, values in zip(found, maps, strict=True):
            layer[: len(values)] = values.cpu().numpy()
        return found
