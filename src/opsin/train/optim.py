"""Optimisers and the learning-rate schedule."""

import math

import torch
from torch import nn


def muon_and_adamw(
    model: nn.Module, *, muon_lr: float, adamw_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings, norms, biases and heads.

    Decay applies to matrices only, not to norms, biases, positions and latents.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        if (".attn." in name or ".mlp." in name) and parameter.ndim == 2:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith(("pos_embed", "latents", "positions.table")):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=adamw_lr,
        betas=(0.9, 0.99),
    )
    return [muon, adamw]


def warmup_cosine(step: int, *, steps: int, warmup_steps: int) -> float:
    """Factor on the base learning rate: linear from 0 over `warmup_steps`, then half a cosine to 0 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(steps - warmup_steps, 1)))
