"""What a run will cost, before it begins: operations, memory, time."""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opsin.train.config import TrainConfig

# dense bf16 products per second, by the vendor's data sheet; a part of the device's name → FLOP/s
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "A100": 312e12}
STATES = {"sgd": 1, "adam": 2, "adamw": 2, "lamb": 2, "muon": 2}  # numbers an optimiser keeps of each weight, at most


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a whole run."""

    params: int
    steps: int
    images: int  # seen, with repetition
    flops: float  # forward and backward, of all images
    weight_bytes: int  # weights, gradients, optimiser, averaged weights; in fp32
    activation_bytes: int  # what one micro-batch keeps for the backward pass

    def to_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


def cost(model: nn.Module, config: TrainConfig, *, steps: int, image_size: tuple[int, int], world: int = 1) -> Cost:
    """Counted on a copy of the model without memory, at the run's last image size.

    A backward pass is taken for two forward passes; with phases of smaller images the true figure is lower.
    """
    params = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = max(config.batch_size // world, 1)
    micro = min(config.micro_batch_size or share, share)
    numbers = params + trained * (1 + STATES[config.optimizer]) + (params if config.ema_decay else 0)
    if config.strategy == "fsdp":
        numbers = -(-numbers // world)
    activations = saved_bytes(model, image_size) * micro // (1 if config.precision == "fp32" else 2)
    images = steps * config.batch_size
    flops = 3 * forward_flops(model, image_size) * images
    return Cost(params, steps, images, flops, 4 * numbers, activations)


def forward_flops(model: nn.Module, image_size: tuple[int, int]) -> float:
    """Of one image; a multiplication and an addition are two."""
    twin = _without_memory(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.empty(1, 3, *image_size, device="meta"))
    return float(counter.get_total_flops())


def saved_bytes(model: nn.Module, image_size: tuple[int, int]) -> int:
    """What autograd keeps of one image's forward pass, in fp32, the weights apart."""
    twin = _without_memory(model)
    weights = {tensor.untyped_storage()._cdata for tensor in (*twin.parameters(), *twin.buffers())}
    kept: dict[int, Tensor] = {}  # by storage: views of one are kept once

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = twin(torch.empty(1, 3, *image_size, device="meta"))
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)


def _without_memory(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta").train()


def peak_flops(device: torch.device, precision: str) -> float:
    """Products per second at best: a GPU's by its data sheet, a CPU's measured; 0 where it is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAKS.items() if part in name), 0.0) if precision != "fp32" else 0.0
    if device.type != "cpu":
        return 0.0
    side = 1024
    left = torch.ones(side, side, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            left @ left
        best = min(best, time.perf_counter() - start)
    return 4 * 2 * side**3 / best
