"""Attention, MLP and transformer layer: the parts the models share."""

from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """What a forward pass leaves on its way: give `encode`, `pool` or `forward` an empty one, and read it afterwards.

    The pass itself is the usual, fused one; the attention, which it never stores, is computed beside it when asked for.
    """

    states: list[Tensor] = field(default_factory=list)  # before each transformer layer and after the last (of a block)
    attended: "list[Attended]" = field(default_factory=list)  # in the order of use; a shared layer is there each time


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """One use of an `Attention` in a forward pass."""

    attn: "Attention"
    queries: Tensor  # B M D
    tokens: Tensor  # B N C
    mask: Tensor | None  # B N
    context: Tensor  # what the heads have read, side by side, before the last projection: B M V

    def weights(self) -> Tensor:
        """The softmax weights A of this use, (B, heads, M, N)."""
        return self.attn.weights(self.queries, self.tokens, self.mask)

    def weights_grad(self, context_grad: Tensor) -> Tensor:
        """dL/dA (B, heads, M, N) of a dL/dcontext (B, M, V): a head's context is A·v, so that dL/dA = dL/dcontext·vᵀ.

        It equals what autograd gives for an explicit softmax, each weight taken as a variable of its own.
        """
        v = self.attn._split(self.attn.v(self.tokens))
        return self.attn._split(context_grad) @ v.transpose(-2, -1)


class Attention(nn.Module):
    """Multi-head attention; q, k and v apart, so that checkpoint tables read one row per tensor.

    Args:
        dim: width of the queries, and of the result.
        num_heads: divides both `qk_dim` and `v_dim`.
        kv_dim: width of what is attended to; `dim` without it.
        qk_dim: width that queries and keys are projected to; `dim` without it.
        v_dim: width that values are projected to; `qk_dim` without it.
    Source: Dosovitskiy et al. 2021, Appendix A; the four widths: deepmind-research `perceiver.py` `Attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        kv_dim = kv_dim or dim
        qk_dim = qk_dim or dim
        v_dim = v_dim or qk_dim
        for name, width in (("qk_dim", qk_dim), ("v_dim", v_dim)):
            if width % num_heads:
                raise ValueError(f"num_heads ({num_heads}) does not divide {name} ({width}).")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, qk_dim, bias=qkv_bias)
        self.k = nn.Linear(kv_dim, qk_dim, bias=qkv_bias)
        self.v = nn.Linear(kv_dim, v_dim, bias=qkv_bias)
        self.out = nn.Linear(v_dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # B h N d

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """(B, M, D) queries attend over (B, N, C) tokens → (B, M, D).

        Args:
            mask: (B, N) bool, which tokens may be attended to. Where none may, the context is zero.
            query_mask: (B, M) bool; the context of the others is zero.
            trace: takes note of this use.
        """
        readable = mask
        if mask is not None:
            some = mask.any(dim=1, keepdim=True)  # B 1
            query_mask = some if query_mask is None else query_mask & some
            mask = (mask | ~some)[:, None, None, :]  # B 1 1 N, every row with somewhere to look
        if self.num_heads == 1 and tokens.shape[1] > queries.shape[1] and not self.training:
            x = self._read_long(queries, tokens, mask)
        else:
            q, k, v = self._split(self.q(queries)), self._split(self.k(tokens)), self._split(self.v(tokens))
            scale, v_dim = q.shape[-1] ** -0.5, v.shape[-1]
            if q.shape[-1] < v_dim:  # fused kernels want one width; zeros add nothing to q·k
                q, k = (F.pad(x, (0, v_dim - x.shape[-1])) for x in (q, k))
            elif q.shape[-1] > v_dim:
                v = F.pad(v, (0, q.shape[-1] - v_dim))
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            x = x[..., :v_dim].transpose(1, 2).flatten(2)
        if query_mask is not None:
            x = x * query_mask[:, :, None]
        if trace is not None:
            trace.attended.append(Attended(self, queries, tokens, readable, x))
        return self.out(x)

    def _read_long(self, queries: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """One head, few queries, many tokens: keys and values, as large as the tokens each, are never made.

        q·(W t + b) is (Wᵀ q)·t and a number that is the same for every token, which the softmax does not see; weights
        that sum to one leave the values' W t + b as W (Σ w t) + b.
        """
        q = self.q(queries)
        x = F.scaled_dot_product_attention(
            (q @ self.k.weight)[:, None], tokens[:, None], tokens[:, None], attn_mask=mask, scale=q.shape[-1] ** -0.5
        )
        return self.v(x[:, 0])

    def weights(self, queries: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The softmax weights that `forward` uses without ever storing them: (B, heads, M, N), rows sum to one."""
        q, k = self._split(self.q(queries)), self._split(self.k(tokens))
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min)
        return torch.softmax(logits, dim=-1)


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
        qk_dim: int | None = None,
        v_dim: int | None = None,
        layer_scale: bool = False,
        dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout_rate, self.drop_path_rate = dropout_rate, drop_path_rate
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qk_dim=qk_dim, v_dim=v_dim, qkv_bias=qkv_bias)
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

    def forward(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, N, D) → (B, N, D)."""
        if trace is not None:
            trace.states.append(x)
        y = self.norm1(x)
        x = x + self._branch(self.attn(y, y, trace=trace), self.attn_scale)
        return x + self._branch(self.mlp(self.norm2(x)), self.mlp_scale)


class CrossAttentionLayer(nn.Module):
    """Queries read tokens, then an MLP: x = [queries +] attention(norm(queries), norm(tokens)); x + MLP(norm(x)).

    Args:
        dim: width of the queries, and of the result.
        kv_dim: width of the tokens; also of the projected queries, keys and values where `qk_dim` does not say.
        query_residual: add the queries to what they read. Leave it out where queries and outputs mean different
            things: positions in, pixels out.
    Source: Jaegle et al. 2021, §3.1; deepmind-research `perceiver/perceiver.py` `CrossAttention`.
    """

    def __init__(
        self,
        dim: int,
        kv_dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        norm_eps: float = 1e-5,
        activation: Activation = "gelu_tanh",
        qk_dim: int | None = None,
        v_dim: int | None = None,
        query_residual: bool = True,
    ) -> None:
        super().__init__()
        self.query_residual = query_residual
        self.norm_q = nn.LayerNorm(dim, eps=norm_eps)
        self.norm_kv = nn.LayerNorm(kv_dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, kv_dim=kv_dim, qk_dim=qk_dim or kv_dim, v_dim=v_dim)
        self.norm_mlp = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, mlp_dim, activation=activation)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """(B, M, D), (B, N, C) → (B, M, D); the masks as `Attention` takes them."""
        x = self.attn(self.norm_q(queries), self.norm_kv(tokens), mask, query_mask, trace)
        if self.query_residual:
            x = queries + x
        return x + self.mlp(self.norm_mlp(x))


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

    def forward(self, tokens: Tensor, trace: Trace | None = None) -> Tensor:
        x = self.attn(self.probe.expand(tokens.shape[0], -1, -1), tokens, trace=trace)
        return (x + self.mlp(self.norm(x)))[:, 0]
