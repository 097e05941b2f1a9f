"""Images → the ranges of a model's activations, from which int8 takes its scales.

Inputs of the four dense layers of a transformer layer are looked at channel by channel: norms and attention spread
theirs unevenly, and what one channel has too much can be moved into the weights (SmoothQuant, Xiao et al. 2023).
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import get_args

import torch
from torch import Tensor, nn

from opsin.engine.packed import Range, Ranges, Site, layer_with
from opsin.models.layers import TransformerLayer

HALVES: tuple[tuple[Site, ...], ...] = (("qkv", "out"), ("fc1", "fc2"))  # attention, MLP
TOO_NOISY = 3  # times the mean half of a layer; those stay in bf16


@torch.inference_mode()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, dict[str, Range]]:
    """Run a plain model on batches of pixels (B, C, H, W), and look at its activations.

    A few batches do: 64 to 256 images like those to come. A range is the mean over the batches, so that an outlier
    counts little. Left out is an attention or MLP that alone would bring in more than `TOO_NOISY` times the mean noise:
    in the embedded models one of 14, and one of 12, with half the noise.

    Raises:
        ValueError: no batches, or a model without transformer layers.
    """
    seen: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
    first = None
    with ExitStack() as hooks:

        def watch(dense: nn.Module, values: list[tuple[Tensor, Tensor]]) -> None:
            def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                values.append(torch.aminmax(inputs[0].flatten(0, -2), dim=0))

            hooks.callback(dense.register_forward_pre_hook(look).remove)

        for name, layer in model.named_modules():
            if isinstance(layer, TransformerLayer):
                sites = {"qkv": layer.attn.q, "out": layer.attn.out, "fc1": layer.mlp.fc1, "fc2": layer.mlp.fc2}
                seen[name] = {site: [] for site in get_args(Site)}
                for site, dense in sites.items():
                    watch(dense, seen[name][site])
        if not seen:
            raise ValueError(f"{type(model).__name__} has no transformer layers to calibrate.")
        for pixels in batches:
            first = pixels if first is None else first
            model(pixels)
    if first is None:
        raise ValueError("no images to calibrate with; give at least one batch.")
    ranges = {
        name: {
            site: (torch.stack(lows).mean(dim=0), torch.stack(highs).mean(dim=0))
            for site, values in sites.items()
            for lows, highs in [zip(*values, strict=True)]
        }
        for name, sites in seen.items()
    }
    noises = _noises(model, ranges, first)
    most = TOO_NOISY * sum(noises.values()) / len(noises)
    return without(ranges, [half for half, noise in noises.items() if noise > most])


def without(ranges: Ranges, halves: Iterable[tuple[str, tuple[Site, ...]]]) -> dict[str, dict[str, Range]]:
    """Ranges less those of some halves of layers, which then stay in bf16 or fp32."""
    gone = {(name, site) for name, sites in halves for site in sites}
    return {
        name: {site: range_ for site, range_ in sites.items() if (name, site) not in gone}
        for name, sites in ranges.items()
    }


def noisiest(model: nn.Module, ranges: Ranges, pixels: Tensor) -> list[tuple[str, tuple[Site, ...]]]:
    """Attention and MLP of each layer, of those in `ranges`, by the noise that int8 brings in, most first.

    Args:
        ranges: of `calibrate`.
        pixels: (B, C, H, W), of images like those to come.
    Returns:
        (name of the layer, dense layers of this half), as `without` takes them.
    """
    noises = _noises(model, ranges, pixels)
    return sorted(noises, key=lambda half: -noises[half])


@torch.inference_mode()
def _noises(model: nn.Module, ranges: Ranges, pixels: Tensor) -> dict[tuple[str, tuple[Site, ...]], float]:
    """Half of a layer → power of the noise in what leaves the layer, over its spread, which the next norm sees."""
    noises: dict[tuple[str, tuple[Site, ...]], float] = {}

    def watch(name: str, layer: TransformerLayer) -> Callable[..., None]:
        exact = layer_with(layer, {})
        twins = {
            half: layer_with(layer, {site: ranges[name][site] for site in half})
            for half in HALVES
            if all(site in ranges[name] for site in half)
        }

        def look(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
            y = exact(inputs[0])
            spread = y.var(dim=-1).mean()
            for half, twin in twins.items():
                noise = float((twin(inputs[0]) - y).square().mean() / spread)
                noises[name, half] = noises.get((name, half), 0.0) + noise  # a Perceiver's layers run several times

        return look

    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            if isinstance(layer, TransformerLayer) and name in ranges:
                hooks.callback(layer.register_forward_hook(watch(name, layer)).remove)
        model(pixels)
    return noises
