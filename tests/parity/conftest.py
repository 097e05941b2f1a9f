"""References, filled with noise, and how near is near enough."""

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


def fill_with_noise(model: nn.Module) -> None:
    """Every parameter: zero biases and unit norms would hide swapped rows. Scaled so that activations stay near one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 1
            std = 0.3 if parameter.ndim in (1, 3) else fan_in**-0.5
            parameter.normal_(std=std, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the scale: what two orders of fp32 summation cost; a wrong layout or formula is off by 1e-3 up."""
    assert actual.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0.1, "a reference of zeros proves nothing"
    difference = (actual - expected).abs().max().item()
    assert difference <= 1e-5 * scale, f"{difference / scale:.1e} of the scale"


@pytest.fixture(scope="session")
def noise() -> Callable[[nn.Module], None]:
    return fill_with_noise


@pytest.fixture(scope="session")
def near() -> Callable[[Tensor, Tensor], None]:
    return assert_near


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return importlib.import_module("timm")
