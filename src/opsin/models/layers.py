"""Attention, MLP and transformer layer: the parts the models share."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # flax `nn.gelu`: up to 4.7e-4 from the exact one
    "relu": F.relu,
    "silu": F.silu,
}


class Attention(nn.Module):
    """Multi-head attention; q, k and v apart, so that checkpoint tables read one row per tensor.

    Source: Dosovitskiy et al. 2021, Appendix A.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.out = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B h N d

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """(B, M, D) queries attend over (B, N, D) tokens → (B, M, D)."""
        q, k, v = self._split(self.q(queries)), self._split(self.k(tokens)), self._split(self.v(tokens))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """The softmax weights that `forward` uses without ever storing them: (B, heads, M, N), rows sum to one."""
        q, k = self._split(self.q(queries)), self._split(self.k(tokens))
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)


class MLP(nn.Module):
    """Dense → activation → dense; with `gated`, SwiGLU: silu(first half) · second half (DINOv2 giant)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "gelu",
        gated: bool = False,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.gated, self.dropout_rate = activation, gated, dropout_rate
        self.fc1 = nn.Linear(dim, 2 * hidden_dim if gated else hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        else:
            x = ACTIVATIONS[self.activation](x)
        return self.fc2(F.dropout(x, self.dropout_rate, self.training))


class TransformerLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)).

    `layer_scale` multiplies each branch by a learned vector (CaiT, DINOv2). `drop_path_rate` drops a branch for a
    whole sample while training (stochastic depth).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_eps: float,
        activation: Activation = "gelu",
        gated_mlp: bool = False,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout_rate, self.drop_path_rate = dropout_rate, drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_dim, activation=activation, gated=gated_mlp, dropout_rate=dropout_rate)
        self.attn_scale = nn.Parameter(torch.ones(dim)) if layer_scale else None
        self.mlp_scale = nn.Parameter(torch.ones(dim)) if layer_scale else None

    def _branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        x = F.dropout(x if scale is None else x * scale, self.dropout_rate, self.training)
        if self.training and self.drop_path_rate > 0:
            keep = 1 - self.drop_path_rate
            x = x * torch.empty(x.shape[0], 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep) / keep
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        y = self.norm1(x)
        x = x + self._branch(self.attn(y, y), self.attn_scale)
        return x + self._branch(self.mlp(self.norm2(x)), self.mlp_scale)


class AttentionPool(nn.Module):
    """One learned probe attends over the tokens, then a residual MLP: (B, N, D) → (B, D).

    Source: big_vision `models/vit.py` `MAPHead` (Zhai et al. 2022, "Scaling Vision Transformers").
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, norm_eps: float, activation: Activation) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_dim, activation=activation)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.attn(self.probe.expand(tokens.shape[0], -1, -1), tokens)
        return (x + self.mlp(self.norm(x)))[:, 0]
