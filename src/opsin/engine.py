"""pixels → logits, fast: a twin of a model whose layers are laid out for this CPU. Inference only.

The twin computes the same sums in another order: fp32 logits differ by rounding, about 1e-6 of their scale.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.models.layers import MLP, Attention, TransformerLayer

ROWS = 512  # tokens at once that the layout is made for; others are as right, a little slower


def can_pack() -> bool:
    """Whether this torch has oneDNN's dense layer with weights in its own layout."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pack(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A twin of a model on the CPU, with the dense layers of its transformer layers in oneDNN's layout.

    q, k and v become one product, GELU is applied while a product is still in the cache. oneDNN's fp32 product is
    faster than the one torch calls by itself (MKL), by a tenth to a fifth on AMD CPUs. Everything else, norms and
    positions, is shared with the model where the dtype is the same; the packed layers take their memory again.
    """
    if dtype == torch.float32:
        memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
        twin = copy.deepcopy(model, memo)
    else:
        twin = copy.deepcopy(model).to(dtype)
    for layer in twin.modules():
        if isinstance(layer, TransformerLayer):
            layer.attn = _SelfAttention(layer.attn)  # type: ignore[assignment]
            if not layer.mlp.gated and layer.mlp.activation in ("gelu", "gelu_tanh"):
                layer.mlp = _MLP(layer.mlp)  # type: ignore[assignment]
    return twin.eval()


class _Dense(nn.Module):
    """One or several dense layers of the same input, as one product; with GELU behind it if `gelu` says which."""

    def __init__(self, *layers: nn.Linear, gelu: str | None = None) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
        self.bias = torch.cat([bias.detach().to(weight.dtype) for bias in biases])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.post = ("none", "") if gelu is None else ("gelu", gelu)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.post[0], [], self.post[1])


class _SelfAttention(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.widths = [attention.q.out_features, attention.k.out_features, attention.v.out_features]
        self.qkv, self.out = _Dense(attention.q, attention.k, attention.v), _Dense(attention.out)

    def forward(self, tokens: Tensor, _: Tensor) -> Tensor:
        parts = self.qkv(tokens).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if tokens.dtype == torch.bfloat16 and tokens.shape[1] <= 1024:  # torch's fused kernel takes twice as long there
            x = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.fc1 = _Dense(mlp.fc1, gelu="tanh" if mlp.activation == "gelu_tanh" else "none")
        self.fc2 = _Dense(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))
