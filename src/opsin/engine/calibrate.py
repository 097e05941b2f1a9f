"""Images → the ranges of a model's activations, from which int8 takes its scales.

Inputs of the four dense layers of a transformer layer are looked at channel by channel: norms and attention spread
theirs unevenly, and what one channel has too much can be moved into the weights (SmoothQuant, Xiao et al. 2023).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from opsin.models.layers import TransformerLayer

Site = Literal["qkv", "out", "fc1", "fc2"]
"""A dense layer, by what it gives: q, k and v as one; the attention's result; the two of the MLP."""

SITES: tuple[Site, ...] = get_args(Site)


Range = tuple[Tensor, Tensor]
"""Smallest and largest value of each channel, (C,) and (C,): means over the batches, so that one outlier counts little."""

Ranges = Mapping[str, Mapping[str, Range]]
"""Name of a transformer layer in its model → `Site` → range of its input."""


@torch.inference_mode()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, dict[str, Range]]:
    """Run a plain model on batches of pixels (B, C, H, W) and look at its activations.

    A few batches do: 64 to 256 images like those to come.

    Raises:
        ValueError: no batches, or a model without transformer layers.
    """
    seen: dict[str, dict[Site, list[tuple[Tensor, Tensor]]]] = {}
    with ExitStack() as hooks:

        def watch(dense: nn.Module, values: list[tuple[Tensor, Tensor]]) -> None:
            def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                values.append(torch.aminmax(inputs[0].flatten(0, -2), dim=0))

            hooks.callback(dense.register_forward_pre_hook(look).remove)

        for name, layer in model.named_modules():
            if isinstance(layer, TransformerLayer):
                sites = {"qkv": layer.attn.q, "out": layer.attn.out, "fc1": layer.mlp.fc1, "fc2": layer.mlp.fc2}
                seen[name] = {site: [] for site in SITES}
                for site in SITES:
                    watch(sites[site], seen[name][site])
        if not seen:
            raise ValueError(f"{type(model).__name__} has no transformer layers to calibrate.")
        for pixels in batches:
            model(pixels)
    if any(not values for sites in seen.values() for values in sites.values()):
        raise ValueError("no images to calibrate with; give at least one batch.")
    return {
        name: {
            site: (torch.stack(lows).mean(dim=0), torch.stack(highs).mean(dim=0))
            for site, values in sites.items()
            for lows, highs in [zip(*values, strict=True)]
        }
        for name, sites in seen.items()
    }


def smoothing(range_: Range, weight: Tensor) -> Tensor:
    """(C,): what to divide the channels of an input by, and multiply the columns of its weight (out, C) with.

    The geometric mean of both spreads, α = 0.5 of the paper's equation 4.
    """
    low, high = range_
    spread = torch.maximum(low.abs(), high.abs()).clamp_min(1e-5)
    return (spread / weight.abs().amax(dim=0).clamp_min(1e-5)).sqrt()
