"""pixels → logits, fast: a twin of a model whose layers are laid out for this CPU. Inference only.

    fp32  the same sums in another order: logits differ by rounding, about 1e-6 of their scale
    bf16  products and the layers' state in bf16; positions, last norm and head in fp32
    int8  the dense layers of the transformer layers in int8, attention in bf16 where the CPU has it, the rest in fp32

In all of them q, k and v are one product, GELU and the residual sum are applied while a product is in the cache, and
the last layer of a Vision Transformer computes only the tokens that are read.
"""

import copy
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.device import has_bf16, has_int8
from opsin.engine.pages import FilePages
from opsin.models.layers import ACTIVATIONS, CrossAttentionLayer, TransformerLayer
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.models.vt import VT

Precision = Literal["fp32", "bf16", "int8"]

Site = Literal["qkv", "out", "fc1", "fc2"]
"""A dense layer, by what it gives: q, k and v as one; the attention's result; the two of the MLP."""

Range = tuple[Tensor, Tensor]
"""Smallest and largest value of each channel of a dense layer's input, (C,) and (C,)."""

Ranges = Mapping[str, Mapping[str, Range]]
"""Name of a transformer layer in its model → `Site` → range of its input."""

ROWS = 512  # tokens at once that the layout is made for; others are as right, a little slower
SAFE_SUMS = (1e-20, 1e20)  # of a row's exponentials, where the largest need not be taken off first
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # activation → oneDNN's name of its approximation


def can_pack() -> bool:
    """Whether this torch has oneDNN's dense layer with weights in its own layout."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.no_grad()
def pack(model: nn.Module, precision: Precision = "fp32", ranges: Ranges | None = None) -> nn.Module:
    """A twin of a model on the CPU: float32 pixels (B, C, H, W) → float32 logits; its methods are the model's.

    What is not packed, norms and positions, is shared with the model. Of weights mapped from a file, what is packed
    leaves memory: the model reads it again if it is used. A VT in fp32 is the model itself.

    Args:
        model: plain, fp32.
        ranges: for int8, of `calibrate`; a dense layer that is not in it stays in bf16, or in fp32.
    Raises:
        ValueError: an unknown precision; int8 without ranges, or on a CPU that has no products of int8.
    """
    if precision not in get_args(Precision):
        raise ValueError(f'precision is "{precision}". Known: {", ".join(get_args(Precision))}.')
    if precision == "int8" and ranges is None:
        raise ValueError("int8 needs the ranges of the activations: ranges=calibrate(model, batches).")
    if precision == "int8" and not has_int8():
        raise ValueError('this CPU does not multiply int8 (it lacks AVX512-VNNI): take "fp32".')
    if isinstance(model, VT):
        return _pack_vt(model, _low(precision))
    pages = FilePages()
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    stacks = [part for part in twin.modules() if isinstance(part, nn.ModuleList)]
    names = {layer: name for name, layer in twin.named_modules() if isinstance(layer, TransformerLayer)}
    for stack in stacks:
        for i, layer in enumerate(stack):
            if not isinstance(layer, TransformerLayer):
                continue
            last = i == len(stack) - 1
            num_read = _num_read(twin) if last and isinstance(twin, ViT) else None
            found = ranges.get(names[layer]) if ranges is not None and precision == "int8" else None
            stack[i] = _Layer(layer, precision, found, pages, num_read=num_read, leave=last)
            pages.trim()
    if isinstance(twin, ViT):
        twin.patch_embed = _PatchEmbed(twin.patch_embed, _low(precision))  # type: ignore[assignment]
    if isinstance(twin, ImagePerceiver) and twin.encoder.cross.attn.num_heads == 1:
        cross = _CrossLayer(twin.encoder.cross, twin.encoder.latents, _low(precision))
        twin.encoder.cross = cross  # type: ignore[assignment]
    return twin.eval()


def _pack_vt(model: VT, low: torch.dtype) -> nn.Module:
    """Convolutions have no layout of their own here: in bf16 all but pooling and head is, in fp32 nothing changes."""
    if low == torch.float32:
        return model.eval()
    twin = copy.deepcopy(model).eval().to(low)
    twin.head = model.head
    twin.stem.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(low),))
    twin.pool = lambda tokens: VT.pool(twin, tokens.float())  # type: ignore[method-assign]
    return twin


def layer_with(layer: TransformerLayer, ranges: Mapping[str, Range]) -> nn.Module:
    """One layer as `pack` lays it out for int8: (B, N, D) → (B, N, D), float32."""
    return _Layer(layer, "int8", ranges, None, num_read=None, leave=True)


def _num_read(model: ViT) -> int | None:
    """How many of the last layer's tokens, from the first, the logits and features depend on; None for all."""
    return model.config.num_positioned if model.config.pool == "token" else None


def _low(precision: Precision) -> torch.dtype:
    """Of products that are not int8."""
    if precision == "bf16" or (precision == "int8" and has_bf16()):
        return torch.bfloat16
    return torch.float32


class _Dense:
    """A dense layer in fp32 or bf16, its weight in oneDNN's layout, GELU and a residual sum fused.

    Args:
        weight, bias: (out, in), (out,), fp32.
        gelu: the approximation, "none" or "tanh"; without it no GELU.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, gelu: str | None = None) -> None:
        self.dtype, self.post = dtype, ("none", "") if gelu is None else ("gelu", gelu)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), ROWS)
        self.bias = bias.to(dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in), (…, out) → (…, out), of the residual's type or the layer's."""
        x = x.to(self.dtype)
        if residual is not None and residual.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.post[0], [], self.post[1])
        return y if residual is None else residual + y


class _Codes:
    """Real numbers ↔ codes 0..255: code = number / scale + zero."""

    def __init__(self, low: float, high: float) -> None:
        low, high = min(low, 0.0), max(high, 1e-6)
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)

    def __call__(self, x: Tensor) -> Tensor:
        """Numbers already divided by the scale → codes."""
        return _to_bytes(torch.add(x.float(), self.zero + 0.5))


def _to_bytes(x: Tensor) -> Tensor:
    """Numbers, overwritten, rounded down, to 0..255; through int8, which keeps the low byte on x86 and is faster."""
    return x.clamp_(0, 255).to(torch.int8).view(torch.uint8)


class _Int8Dense:
    """A dense layer on codes of its input, weights in int8 with a scale for each output.

    Args:
        weight, bias: (out, in), (out,), fp32.
        codes: of the input.
        dtype: of the output.
        gelu, out_codes: apply GELU and give codes: the input of a next `_Int8Dense`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        codes: _Codes,
        dtype: torch.dtype,
        gelu: str | None = None,
        out_codes: _Codes | None = None,
    ) -> None:
        self.codes, self.bias = codes, bias.float()
        self.scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        quantised = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(quantised, [ROWS, weight.shape[1]])
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.out = (1.0, 0, dtype) if out_codes is None else (out_codes.scale, out_codes.zero, torch.uint8)
        self.post = ("none", "") if gelu is None else ("gelu", gelu)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(…, in) codes or real numbers, (…, out) float32 → (…, out)."""
        x = x if x.dtype == torch.uint8 else self.codes(x)
        inputs = (x, self.codes.scale, self.codes.zero, self.weight, self.scale, self.zeros)
        if residual is None:
            return torch.ops.onednn.qlinear_pointwise(*inputs, self.bias, *self.out, self.post[0], [], self.post[1])
        return torch.ops.onednn.qlinear_pointwise.binary(
            *inputs, residual, self.bias, 1.0, 0, torch.float32, 1.0, 0, "add", 1.0, "none", [], ""
        )


class _Norm:
    """Layer norm; with `codes`, straight to the codes of the dense layer behind it."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype, codes: _Codes | None, smooth: Tensor | None) -> None:
        weight, bias = norm.weight.detach(), norm.bias.detach()
        if smooth is not None:
            weight, bias = weight / smooth, bias / smooth
        if codes is not None:
            weight, bias = weight / codes.scale, bias / codes.scale + codes.zero + 0.5
        self.codes, self.eps = codes, norm.eps
        self.weight, self.bias = weight.to(dtype), bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x if self.codes is None else _to_bytes(x)


class _Layer(nn.Module):
    """A `TransformerLayer` laid out for the CPU: (B, N, D) → (B, N, D), or the first `num_read` tokens of it.

    Args:
        ranges: of its dense layers; None: no int8.
        pages: where to give back the layer's own weights, each when it is packed; None: nowhere.
        leave: give float32, whatever the layer's own type is: for what comes behind the last one.
    """

    def __init__(
        self,
        layer: TransformerLayer,
        precision: Precision,
        ranges: Mapping[str, Range] | None,
        pages: FilePages | None,
        *,
        num_read: int | None,
        leave: bool,
    ) -> None:
        super().__init__()
        attn, mlp = layer.attn, layer.mlp
        self.num_heads, self.num_read = attn.num_heads, num_read
        low = _low(precision)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # of what passes from layer to layer
        self.out_dtype = torch.float32 if leave else self.dtype
        ranges = ranges or {}

        (q, q_bias), (k, k_bias), (v, v_bias) = (_weights(part) for part in (attn.q, attn.k, attn.v))
        scale = (q.shape[0] // attn.num_heads) ** -0.5
        q, q_bias = q * scale, q_bias * scale
        out, out_bias = _weights(attn.out, layer.attn_scale)
        out_codes = None
        self.widths = [len(q), len(k), len(v)]
        if "out" in ranges:  # what attention gives is a mean of values: they are smoothed in its place
            smooth = _smoothing(ranges["out"], out)
            out_codes = _codes(ranges["out"], smooth)
            v, v_bias, out = v / smooth[:, None] / out_codes.scale, v_bias / smooth / out_codes.scale, out * smooth
        qkv, qkv_bias = torch.cat([q, k, v]), torch.cat([q_bias, k_bias, v_bias])
        self.norm1, qkv = _norm_before(layer.norm1, qkv, ranges.get("qkv"), self.dtype)
        if num_read is None:
            self.qkv = _dense(qkv, qkv_bias, self.norm1.codes, low)
        else:
            self.q = _dense(qkv[: len(q)], q_bias, self.norm1.codes, low)
            self.kv = _dense(qkv[len(q) :], qkv_bias[len(q) :], self.norm1.codes, low)
        self.out = _dense(out, out_bias, out_codes, low)
        del q, k, v, qkv, out  # copies, some of them
        release = pages.release if pages is not None else lambda _: None
        release(attn)

        (fc1, fc1_bias), (fc2, fc2_bias) = _weights(mlp.fc1), _weights(mlp.fc2, layer.mlp_scale)
        self.gated, self.activation = mlp.gated, ACTIVATIONS[mlp.activation]
        self.norm2, fc1 = _norm_before(layer.norm2, fc1, ranges.get("fc1"), self.dtype)
        self.hidden = hidden = _codes(ranges["fc2"]) if "fc2" in ranges else None
        self.gelu = None if mlp.gated else GELU.get(mlp.activation)  # what fc1 does itself
        if self.gelu is not None and self.norm2.codes is not None:
            self.fc1: _Dense | _Int8Dense = _Int8Dense(fc1, fc1_bias, self.norm2.codes, low, self.gelu, hidden)
        else:
            self.fc1 = _dense(fc1, fc1_bias, self.norm2.codes, low, self.gelu)
        release(mlp.fc1)
        self.fc2 = _dense(fc2, fc2_bias, hidden, low)
        release(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = self.norm1(x)
        if self.num_read is None:
            q, k, v = self.qkv(y).split(self.widths, dim=-1)
        else:
            x = x[:, : self.num_read].contiguous()
            q = self.q(y[:, : self.num_read].contiguous())
            k, v = self.kv(y).split(self.widths[1:], dim=-1)
        x = self.out(_attend(q, k, v, self.num_heads, self.dtype), x)
        y = self.fc1(self.norm2(x))
        if self.gated:
            gate, y = y.chunk(2, dim=-1)
            y = F.silu(gate) * y
        elif self.gelu is None:
            y = self.activation(y)
        if self.hidden is not None and y.dtype != torch.uint8:
            y = self.hidden(y / self.hidden.scale)
        return self.fc2(y, x).to(self.out_dtype)


def _weights(dense: nn.Linear, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, in) and (out,), of the layer times a layer scale (out,)."""
    weight = dense.weight.detach()
    bias = torch.zeros(len(weight)) if dense.bias is None else dense.bias.detach()
    return (weight, bias) if scale is None else (weight * scale.detach()[:, None], bias * scale.detach())


def _dense(
    weight: Tensor, bias: Tensor, codes: _Codes | None, dtype: torch.dtype, gelu: str | None = None
) -> _Dense | _Int8Dense:
    if codes is None:
        return _Dense(weight, bias, dtype, gelu)
    return _Int8Dense(weight, bias, codes, dtype, gelu)


def _codes(range_: Range, smooth: Tensor | float = 1.0) -> _Codes:
    low, high = range_
    return _Codes(float((low / smooth).min()), float((high / smooth).max()))


def _smoothing(range_: Range, weight: Tensor) -> Tensor:
    """(C,): what to divide the channels of an input by, and multiply the columns of its weight (out, C) with.

    The geometric mean of both spreads, α = 0.5 of the paper's equation 4.
    """
    low, high = range_
    spread = torch.maximum(low.abs(), high.abs()).clamp_min(1e-5)
    return (spread / weight.abs().amax(dim=0).clamp_min(1e-5)).sqrt()


def _norm_before(norm: nn.LayerNorm, weight: Tensor, range_: Range | None, dtype: torch.dtype) -> tuple[_Norm, Tensor]:
    """The norm before a dense layer, and that layer's weight; for int8 smoothed, and with codes between them."""
    if range_ is None:
        return _Norm(norm, dtype, None, None), weight
    smooth = _smoothing(range_, weight)
    codes = _codes(range_, smooth)
    return _Norm(norm, dtype, codes, smooth), weight * smooth


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, M, h·d), (B, N, h·d), (B, N, h·e) → (B, M, h·e) of `dtype`; q comes scaled."""
    q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    if q.dtype == torch.bfloat16 and k.shape[2] <= 1024:  # torch's fused kernel takes twice as long there
        batch = q.shape[:2]
        # copies: a product of views makes slower ones
        x, sums = (part.unflatten(0, batch) for part in _mix(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)))
        x = torch.div(x.transpose(1, 2), sums.transpose(1, 2), out=x.new_empty(x.transpose(1, 2).shape, dtype=dtype))
    else:
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)
    return x.flatten(2)


def _mix(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, d), (B, N, d), (B, N, e) in bf16 → sum of v (B, M, e), weighted, and of the weights (B, M, 1), fp32."""
    weights = (q @ k.transpose(1, 2)).exp_()
    sums = weights.sum(dim=-1, keepdim=True).float()
    if not SAFE_SUMS[0] < float(sums.min()) <= float(sums.max()) < SAFE_SUMS[1]:  # nor where one is not a number
        weights, sums = torch.softmax(q @ k.transpose(1, 2), dim=-1), torch.ones_like(sums)
    return weights @ v, sums


class _CrossLayer(nn.Module):
    """The cross-attention of a Perceiver's encoder: one head, no mask, and queries that never change.

    Keys and values are never made (see `Attention._read_long`): q·(W t) is (Wᵀ q)·t, computed here once, and the
    values' layer and the attention's last one, with nothing between them, are one.
    """

    def __init__(self, layer: CrossAttentionLayer, latents: Tensor, low: torch.dtype) -> None:
        super().__init__()
        attn, mlp = layer.attn, layer.mlp
        queries = attn.q(layer.norm_q(latents.detach()))
        self.queries = (queries @ attn.k.weight.detach() * queries.shape[-1] ** -0.5).to(low)[None]  # 1 M C
        self.residual = latents.detach() if layer.query_residual else None
        self.norm_kv, self.norm_mlp, self.low = layer.norm_kv, layer.norm_mlp, low
        (v, v_bias), (out, out_bias) = _weights(attn.v), _weights(attn.out)
        self.out = _Dense(out @ v, out @ v_bias + out_bias, low)
        self.gelu = GELU.get(mlp.activation)
        self.fc1 = _Dense(*_weights(mlp.fc1), low, self.gelu)
        self.fc2 = _Dense(*_weights(mlp.fc2), low)
        self.activation = ACTIVATIONS[mlp.activation]

    def forward(self, _: Tensor, tokens: Tensor, mask: None = None) -> Tensor:
        tokens = self.norm_kv(tokens).to(self.low)
        queries = self.queries.expand(len(tokens), -1, -1)
        if self.low == torch.bfloat16:
            x, sums = _mix(queries, tokens, tokens)
            x = x / sums
        else:
            x = F.scaled_dot_product_attention(queries[:, None], tokens[:, None], tokens[:, None], scale=1.0)[:, 0]
        x = self.out(x).float()
        x = x if self.residual is None else x + self.residual
        y = self.fc1(self.norm_mlp(x))
        return self.fc2(y if self.gelu is not None else self.activation(y), x)


class _PatchEmbed(nn.Module):
    """A convolution whose kernel is its stride, as a product: (B, C, H, W) → (B, D, H', W')."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = conv.kernel_size
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.dense = _Dense(conv.weight.detach().flatten(1), bias, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = self.patch_size
        patches = pixels.to(self.dense.dtype).unflatten(3, (-1, width)).unflatten(2, (-1, height))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # B H' W' C·h·w
        return self.dense(patches).permute(0, 3, 1, 2)
