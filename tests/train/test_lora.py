"""LoRA begins as the model it is put on, trains only what it should, and folds back into a plain model."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.train.lora import LowRank, Target, add_lora, merge

CONFIG = ViTConfig(
    image_size=(24, 40), patch_size=8, embed_dim=12, num_layers=2, num_heads=2, mlp_dim=20, num_classes=5
)
PERCEIVER = ImagePerceiverConfig(
    image_size=(20, 28), num_latents=6, latent_dim=16, num_blocks=2, layers_per_block=3, num_heads=4, num_bands=3,
    max_resolution=(5, 7), num_classes=5,
)  # fmt: skip
CONFIGS = {
    "vit": CONFIG,
    "deit": replace(CONFIG, distillation_token=True, qkv_bias=False),
    "dinov2": replace(CONFIG, layer_scale=True, num_registers=3, pool="token_mean", gated_mlp=True),
    "map": replace(CONFIG, pool="map", class_token=False),
    "perceiver": PERCEIVER,
    "pixels": replace(PERCEIVER, front_end="pixels"),
}
ALL: tuple[Target, ...] = ("q", "k", "v", "out", "fc1", "fc2")


def noise(config: ViTConfig | ImagePerceiverConfig) -> Any:
    torch.manual_seed(0)
    model: nn.Module = ViT(config) if isinstance(config, ViTConfig) else ImagePerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def pixels(config: ViTConfig | ImagePerceiverConfig) -> torch.Tensor:
    return torch.randn(2, 3, *config.image_size, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, x: torch.Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_begins_as_the_model_and_merges_into_one_of_the_same_names(config: ViTConfig | ImagePerceiverConfig) -> None:
    model, x = noise(config), pixels(config)
    names, before = {n: t.shape for n, t in model.state_dict().items()}, model(x)
    add_lora(model, rank=3, alpha=5.0, targets=ALL)
    assert torch.allclose(model(x), before, rtol=1e-6, atol=1e-6)
    train(model, x)
    after = model(x)
    assert (after - before).abs().max() > 0.1
    trained = copy.deepcopy(model)
    merge(model)
    assert {n: t.shape for n, t in model.state_dict().items()} == names
    assert not any(isinstance(module, LowRank) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model(x) - after).abs().max() <= 1e-5 * after.abs().max()
    assert torch.equal(trained(x), after)  # the copy goes on as it was
    fresh = type(model)(config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_trains_and_what_does_not(config: ViTConfig | ImagePerceiverConfig) -> None:
    model, x = noise(config), pixels(config)
    add_lora(model, rank=3, alpha=5.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, x)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = ("head.", "head_dist.", "decoder.")
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable
    assert {name for name in trainable if name.endswith(".b")} <= changed <= trainable
    assert all(name.startswith(head) or name.endswith((".a", ".b")) for name in trainable)
    assert {name for name in before if name.startswith(head)} <= trainable


def test_the_share_of_the_product_is_alpha_over_rank() -> None:
    base = nn.Linear(7, 5)
    layer = LowRank(base, 2, 3.0)
    assert layer.a.shape == (2, 7) and layer.b.shape == (5, 2)
    assert 0 < layer.a.abs().max() <= 7**-0.5  # Kaiming uniform, a = √5
    with torch.no_grad():
        layer.b.normal_()
    x = torch.randn(3, 7)
    expected = F.linear(x, base.weight + 1.5 * layer.b @ layer.a, base.bias)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(F.linear(x, layer.weight, base.bias), expected, atol=1e-6)


def test_how_many_train() -> None:
    head = 12 * 5 + 5
    assert add_lora(noise(CONFIG), rank=3) == head + 2 * 4 * 3 * (12 + 12)
    assert add_lora(noise(CONFIG), rank=2, targets=("q", "v")) == head + 2 * 2 * 2 * (12 + 12)
    assert add_lora(noise(CONFIG), rank=1, targets=("fc1", "fc2")) == head + 2 * 2 * (12 + 20)
    model = noise(PERCEIVER)
    decoder = sum(parameter.numel() for parameter in model.decoder.parameters())
    tokens = model.front_end.dim
    cross = (16 + tokens) + 2 * (tokens + tokens) + (tokens + 16)
    assert add_lora(model, rank=3) == decoder + 3 * (cross + 3 * 4 * (16 + 16))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="rank is 0; it must be at least 1."):
        add_lora(noise(CONFIG), rank=0)
    with pytest.raises(ValueError, match='targets has "qkv". Known: q, k, v, out, fc1, fc2.'):
        add_lora(noise(CONFIG), targets=("q", "qkv"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"this model has no head to train: give it one with new_head\(\)."):
        add_lora(noise(replace(CONFIG, num_classes=0)))
    model = noise(CONFIG)
    add_lora(model)
    with pytest.raises(ValueError, match=r"this model has LoRA already: merge\(\) it first."):
        add_lora(model)
