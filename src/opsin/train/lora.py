"""Low-rank adaptation (Hu et al. 2021): the body stays frozen, and small products are learned beside its matrices.

Not by `peft`, which brings transformers and accelerate, and keeps the trained head beside the adapters, where merging
can leave it behind (huggingface/trl#297). Here `merge` gives a plain model under its plain names, head
included. Nor by `torch.nn.utils.parametrize`, which is shorter: it forms W + BA in each step, whose gradient costs as
much as that of the whole matrix, a third of the step that LoRA is there to save.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.models.layers import MLP, Attention
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.models.vt import VT
from opsin.train.heads import head_of

Target = Literal["q", "k", "v", "out", "fc1", "fc2"]


class LowRank(nn.Module):
    """x → W x + bias + α/r · B A x; W and bias are `base`'s, frozen. It begins as `base`, for B begins as zeros."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scale

    @property
    def weight(self) -> Tensor:
        """The matrix in effect: `Attention` multiplies by that of its keys when it reads long inputs."""
        return self.base.weight + self.b @ self.a * self.scale


def add_lora(
    model: ViT | VT | ImagePerceiver,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[Target] = ("q", "k", "v", "out"),
) -> int:
    """Freeze a model but for its head, and put low-rank products beside the matrices of its layers, in place.

    Args:
        rank: r of A (r, in) and B (out, r).
        alpha: the product counts α/r times, so that the learning rate need not change with the rank.
        targets: which matrices. For one number of parameters, all four of the attention are at least as good as
            queries and values alone (Hu et al. 2021, Table 5); where data is plenty, the MLP's should be adapted too
            (Dettmers et al. 2023, Figure 2; Biderman et al. 2024).
    Returns:
        How many parameters are left to train.
    Raises:
        ValueError: a rank below 1, an unknown target, a model without a head, or one that has LoRA already.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1.")
    if unknown := [name for name in targets if name not in get_args(Target)]:
        raise ValueError(f'targets has "{unknown[0]}". Known: {", ".join(get_args(Target))}.')
    head = head_of(model)
    if not head:
        raise ValueError("this model has no head to train: give it one with new_head().")
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("this model has LoRA already: merge() it first.")
    model.requires_grad_(False)
    inside = {id(module) for part in head for module in part.modules()}
    for parent in list(model.modules()):
        if isinstance(parent, Attention | MLP) and id(parent) not in inside:
            for name in targets:
                if isinstance(base := getattr(parent, name, None), nn.Linear):
                    setattr(parent, name, LowRank(base, rank, alpha))
    for part in head:
        part.requires_grad_(True)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def merge(model: ViT | VT | ImagePerceiver) -> None:
    """Add the products to their matrices, in place: a plain model again, under plain names, every parameter trainable.

    To go on training, merge a `copy.deepcopy`.
    """
    for parent, name, part in list(_low_rank(model)):
        part.base.weight.copy_(part.weight)
        setattr(parent, name, part.base)
    model.requires_grad_(True)


def _low_rank(model: nn.Module) -> Iterator[tuple[nn.Module, str, LowRank]]:
    for parent in model.modules():
        for name, part in parent.named_children():
            if isinstance(part, LowRank):
                yield parent, name, part
