"""Maps of the fused path against an explicit softmax, autograd through it, and the papers' matrices written out."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opsin.explain import attention
from opsin.models.layers import Attention, Trace
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig

TARGET = 3
VITS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean, no class token": {"class_token": False, "pool": "mean", "norm_after_pool": True},
    "mean beside a class token": {"pool": "mean"},
    "class token and mean, registers": {"pool": "token_mean", "num_registers": 2, "layer_scale": True},
    "attention pool": {"pool": "map"},
    "attention pool, no class token": {"class_token": False, "pool": "map"},
    "distilled": {"distillation_token": True},
    "distilled, one head": {"distillation_token": True, "distillation_head": False},
    "hybrid": {"stem": (), "patch_size": 2, "image_size": (24, 40)},
}
PERCEIVERS: dict[str, dict[str, Any]] = {
    "conv": {"front_end": "conv", "image_size": (12, 20), "embed_dim": 8},
    "conv, transformers": {"front_end": "conv", "image_size": (16, 24), "embed_dim": 8, "numerics": "transformers"},
    "pixels, two cross heads": {"front_end": "pixels", "image_size": (3, 5), "num_cross_heads": 2,
        "qk_dim": 12, "num_bands": 3},
    "learned, widths of its own": {
        "front_end": "conv1x1", "image_size": (3, 5), "embed_dim": 6, "qk_dim": 8, "v_dim": 24,
        "decoder_residual": False,
    },
}  # fmt: skip


def noisy(model: nn.Module, std: float) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def vit(**values: Any) -> ViT:
    shape: dict[str, Any] = {
        "image_size": (24, 40),
        "patch_size": 8,
        "embed_dim": 24,
        "num_layers": 3,
        "num_heads": 2,
        "mlp_dim": 20,
    }
    return noisy(ViT(ViTConfig(**(shape | {"num_classes": 7} | values))), 0.35)


def perceiver(**values: Any) -> ImagePerceiver:
    shape: dict[str, Any] = {
        "num_latents": 5,
        "latent_dim": 16,
        "num_blocks": 2,
        "layers_per_block": 2,
        "num_heads": 4,
        "num_bands": 2,
    }
    return noisy(ImagePerceiver(ImagePerceiverConfig(**(shape | {"num_classes": 7} | values))), 0.4)


MODELS = [
    *(pytest.param(vit, values, id=f"vit, {name}") for name, values in VITS.items()),
    *(pytest.param(perceiver, values, id=f"perceiver, {name}") for name, values in PERCEIVERS.items()),
]


def picture(model: Any, seed: int = 1) -> Tensor:
    height, width = model.config.image_size
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@contextmanager
def explicit_softmax() -> Iterator[list[Tensor]]:
    """Every attention by a softmax that is stored: (1, heads, M, N) each, with a gradient after `backward`."""
    seen: list[Tensor] = []

    def forward(self: Attention, queries: Tensor, tokens: Tensor, *_: Any, trace: None = None) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

        q, k, v = split(self.q(queries)), split(self.k(tokens)), split(self.v(tokens))
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=3)
        weights.retain_grad()
        seen.append(weights)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "forward", forward)
        yield seen


class Explicit:
    """A pass in float64: `weights` and `weighted` = mean over heads of (∇A ⊙ A)⁺, from the input to the answer."""

    def __init__(self, model: Any, pixels: Tensor, target: int = TARGET) -> None:
        twin = deepcopy(model).double()
        with explicit_softmax() as seen:
            twin(pixels.double())[0, target].backward()
        self.heads = [each[0].detach().numpy() for each in seen]
        self.weights = [each.mean(axis=0) for each in self.heads]
        grads = [each.grad[0].numpy() for each in seen if each.grad is not None]
        assert len(grads) == len(seen)
        self.weighted = [np.maximum(a * g, 0).mean(axis=0) for a, g in zip(self.heads, grads, strict=True)]
        self.config, self.is_vit = model.config, isinstance(model, ViT)
        self.two_heads = self.is_vit and model.head_dist is not None
        self.prefix = model.config.num_prefix if self.is_vit else 0

    def row(self, matrix: np.ndarray) -> np.ndarray:
        """What the answer reads of the rows of a matrix over the last layer's tokens."""
        patches = matrix[self.prefix :].mean(axis=0)
        if self.two_heads:
            return (matrix[0] + matrix[1]) / 2
        return {"token": matrix[0], "mean": patches, "token_mean": (matrix[0] + patches) / 2}[self.config.pool]


def rollout_written_out(found: Explicit) -> np.ndarray:
    """Abnar & Zuidema 2020, equation 1: A raised = normalised (A + I), multiplied."""
    *layers, last = found.weights
    if not found.is_vit:
        first, *layers = layers
    elif found.config.pool != "map":
        layers = found.weights
    product = np.eye(len(layers[0]))
    for a in layers:
        raised = a + np.eye(len(a))
        product = raised / raised.sum(axis=1, keepdims=True) @ product
    if not found.is_vit:
        return last[0] @ product @ first
    return last[0] @ product[found.prefix :] if found.config.pool == "map" else found.row(product)


def relevance_written_out(found: Explicit) -> np.ndarray:
    """Chefer et al. 2021, section 3, by its own equations, whole matrices."""
    *layers, last = found.weighted
    if not found.is_vit:
        first, *layers = layers
        latents_to_input = np.zeros_like(first) + np.eye(len(first)).T @ first @ np.eye(first.shape[1])  # 10
        for a in layers:
            latents_to_input = latents_to_input + a @ latents_to_input  # 7
        return last[0] @ latents_to_input  # 11
    if found.config.pool != "map":
        layers = found.weighted
    tokens = np.eye(len(layers[0]))
    for a in layers:
        tokens = tokens + a @ tokens  # 6
    if found.config.pool != "map":
        return found.row(tokens)
    rest = tokens - np.eye(len(tokens))
    normalised = rest / rest.sum(axis=1, keepdims=True) + np.eye(len(tokens))  # 8, 9
    return last[0] @ normalised[found.prefix :]  # 10


@pytest.mark.parametrize(("build", "values"), MODELS)
def test_maps_are_those_of_an_explicit_softmax(build: Any, values: dict[str, Any]) -> None:
    model = build(**values)
    pixels = picture(model)
    explicit = Explicit(model, pixels)
    trace = Trace()
    with torch.no_grad():
        assert torch.equal(model(pixels, trace), model(pixels))  # the pass itself is the usual one
        for use, expected in zip(trace.attended, explicit.heads, strict=True):
            assert use.weights()[0].numpy() == pytest.approx(expected, abs=1e-5)

    assert attention.rollout(model, pixels).dtype == attention.relevance(model, pixels, 0).dtype == np.float32
    spread = []
    exact, pixels = deepcopy(model).double(), pixels.double()  # in fp32 gradients cancel to a few digits
    for target in (None, *range(7)):
        if target is None:
            found, written_out = attention.rollout(exact, pixels), rollout_written_out(explicit)
        else:
            found = attention.relevance(exact, pixels, target)
            written_out = relevance_written_out(Explicit(model, pixels, target))
        expected = written_out[explicit.prefix :]
        assert found.dtype == np.float64  # as the model
        assert found.shape == attention.token_place(model, pixels.shape[2:]).grid  # type: ignore[arg-type]
        assert found.ravel() == pytest.approx(expected, rel=1e-5, abs=1e-5 * np.abs(expected).max())
        spread.append(np.ptp(expected) > 1e-3 * expected.max())
    assert spread[0] and sum(spread) >= 3  # nothing is left of a class all of whose gradients are negative


@pytest.mark.parametrize(("build", "values"), MODELS)
def test_heads_are_what_the_answer_reads(build: Any, values: dict[str, Any]) -> None:
    model = build(**values)
    explicit = Explicit(model, picture(model))
    *layers, last = explicit.heads
    if not explicit.is_vit:
        first, *layers = layers
        row = last.mean(axis=0)[0]
        expected = [row @ first, *(row @ a @ first.mean(axis=0) for a in layers)]
    elif model.config.pool == "map":
        row = last.mean(axis=0)[0]
        expected = [(row @ a[:, explicit.prefix :])[:, explicit.prefix :] for a in layers]
    else:
        expected = [np.stack([explicit.row(head)[explicit.prefix :] for head in a]) for a in explicit.heads]
    found = attention.heads(model, picture(model))
    assert found.shape[:2] == (len(expected), max(map(len, expected)))
    for layer, maps in zip(found, expected, strict=True):
        assert layer[: len(maps)].reshape(len(maps), -1) == pytest.approx(maps, abs=1e-5)
        assert np.isnan(layer[len(maps) :]).all()


def test_a_rollout_of_patches_alone_sums_to_one() -> None:
    model = vit(**VITS["mean, no class token"])
    assert attention.rollout(model, picture(model)).sum() == pytest.approx(1, abs=1e-6)
    assert attention.rollout(perceiver(**PERCEIVERS["conv"]), torch.randn(1, 3, 12, 20)).sum() == pytest.approx(1)


def test_another_image_size_than_the_models() -> None:
    model = vit()
    pixels = torch.randn(1, 3, 56, 16)
    explicit = Explicit(model, pixels)
    found = attention.relevance(model, pixels, TARGET)
    assert found.shape == (7, 2)
    assert found.ravel() == pytest.approx(relevance_written_out(explicit)[1:], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("build", [vit, perceiver])
def test_relevance_in_inference_mode_of_frozen_weights(build: Any) -> None:
    """And it leaves no gradient behind, on weights that want one."""
    model = build(image_size=(16, 24))
    pixels = picture(model)
    expected = attention.relevance(model, pixels, TARGET)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    with torch.inference_mode():
        assert np.array_equal(attention.relevance(model, pixels, TARGET), expected)
        made_inside = pixels.clone()
        assert np.array_equal(attention.relevance(model, made_inside, TARGET), expected)
    assert not np.allclose(attention.relevance(model, pixels, TARGET - 1), expected)  # it depends on the class


def test_the_states_of_a_trace() -> None:
    model = perceiver(image_size=(16, 24))
    trace = Trace()
    with torch.no_grad():
        latents = model.encode(model.embed(picture(model)), trace)
        assert len(trace.states) == 2 * (2 + 1)  # before each of two layers and after, in two blocks
        assert torch.equal(trace.states[-1], latents)
        assert torch.equal(trace.states[2], trace.states[3])
        network, trace = vit(), Trace()
        tokens = network.encode(network.embed(picture(network)), trace)
        assert len(trace.states) == 4
        assert torch.equal(network.norm(trace.states[-1]), tokens)
