"""int8: ranges from images, what of a network is too noisy for it, and how far its answers are from fp32's."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import opsin
from opsin import engine
from opsin.device import has_bf16, has_int8
from opsin.engine import packed
from opsin.models.vit import ViT, ViTConfig

pytestmark = pytest.mark.skipif(not has_int8(), reason="this CPU does not multiply int8: NOT checked is int8")

CONFIG = ViTConfig(
    image_size=(32, 48), patch_size=8, embed_dim=24, num_layers=3, num_heads=3, mlp_dim=40, num_classes=7
)


def noise_model(config: ViTConfig = CONFIG) -> ViT:
    torch.manual_seed(0)
    model = ViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def crops(photos: Any, names: tuple[str, ...], size: int, step: int) -> list[Image.Image]:
    """Squares of the photos, `step` pixels apart."""
    squares = []
    for name in names:
        with Image.open(photos / name) as photo:
            image = photo.convert("RGB")
        for top in range(0, image.height - size, step):
            for left in range(0, image.width - size, step):
                squares.append(image.crop((left, top, left + size, top + size)))
    return squares


@pytest.mark.parametrize("name", ["opsin/vit-tiny", "opsin/perceiver-tiny"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_agreement_and_drift_on_real_images(name: str, precision: packed.Precision, photos: Any) -> None:
    """Of the embedded models: the bounds that a user is told."""
    classifier = opsin.load(name, dtype="fp32")
    images = crops(photos, ("coffee.png", "rocket.jpg"), 120, 37)
    pixels = torch.stack([classifier.preprocess(image) for image in images])
    ranges = engine.calibrate(classifier.model, [pixels[::2]]) if precision == "int8" else None
    twin = engine.pack(classifier.model, precision, ranges)
    with torch.inference_mode():
        expected, given = classifier.model(pixels[1::2]), twin(pixels[1::2])
    assert len(expected) > 50
    agreement = (expected.argmax(1) == given.argmax(1)).float().mean()
    drift = (given - expected).abs().max() / expected.std()
    agreed, drifted = {"fp32": (1, 1e-4), "bf16": (0.98, 0.08), "int8": (0.94, 0.35)}[precision]
    assert agreement >= agreed and drift <= drifted, f"{agreement:.3f}, {drift:.3f}"
    assert precision == "fp32" or drift > 1e-4, "the fast path did not run"


def test_ranges_are_the_means_over_batches_of_what_the_layers_see() -> None:
    model = noise_model()
    batches = [torch.randn(2, 3, 32, 48), 2 * torch.randn(3, 3, 32, 48)]
    seen: list[Tensor] = []
    hook = model.layers[1].mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    ranges = engine.calibrate(model, batches)
    hook.remove()
    low, high = ranges["layers.1"]["fc2"]
    expected = [part.flatten(0, 1) for part in seen[:2]]
    torch.testing.assert_close(low, (expected[0].amin(0) + expected[1].amin(0)) / 2)
    torch.testing.assert_close(high, (expected[0].amax(0) + expected[1].amax(0)) / 2)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_is_too_noisy_for_int8_is_left_out() -> None:
    """One channel a thousand times as large as the others, behind the GELU, where nothing can smooth it."""
    model = noise_model(replace(CONFIG, num_layers=6))
    mlp: Any = model.layers[2].mlp
    with torch.no_grad():
        mlp.fc1.bias[5] = 4000.0
        mlp.fc2.weight[:, 5] *= 0.01
    pixels = torch.randn(4, 3, 32, 48)
    ranges = engine.calibrate(model, [pixels])
    assert set(ranges["layers.2"]) == {"qkv", "out"}
    assert all(len(sites) == 4 for name, sites in ranges.items() if name != "layers.2")
    order = engine.noisiest(model, ranges, pixels)
    assert len(order) == 11 and ("layers.2", ("fc1", "fc2")) not in order
    rest = engine.without(ranges, order[:2])
    assert sum(map(len, rest.values())) == 18
    with torch.inference_mode():
        expected = model(pixels)
        noise = [(engine.pack(model, "int8", some)(pixels) - expected).abs().mean() for some in (ranges, rest, {})]
    assert noise[0] > noise[2] and noise[1] > noise[2]


def test_the_order_is_that_of_the_noise() -> None:
    model = noise_model()
    pixels = torch.randn(4, 3, 32, 48)
    ranges = engine.calibrate(model, [pixels])
    wide = {name: dict(sites) for name, sites in ranges.items()}
    low, high = wide["layers.1"]["qkv"]
    wide["layers.1"]["qkv"] = (50 * low, 50 * high)  # so coarse that it is the worst by far
    assert engine.noisiest(model, wide, pixels)[0] == ("layers.1", ("qkv", "out"))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"activation": "gelu_tanh"},
        {"activation": "silu"},
        {"gated_mlp": True, "layer_scale": True},
        {"qkv_bias": False, "class_token": False, "pool": "mean"},
        {"distillation_token": True},
    ],
    ids=str,
)
def test_every_kind_of_layer_in_int8(change: dict[str, Any]) -> None:
    config = ViTConfig(
        image_size=(32, 48), patch_size=8, embed_dim=64, num_layers=3, num_heads=4, mlp_dim=96, num_classes=7, **change
    )
    model = noise_model(config)
    with torch.no_grad():
        for layer in model.layers:
            for dense in (layer.attn.q, layer.attn.k):  # type: ignore[union-attr]
                dense.weight *= 0.3  # type: ignore[union-attr, operator]  # attention that is not all on one token
    pixels = torch.randn(5, 3, 32, 48)
    twin: Any = engine.pack(model, "int8", engine.calibrate(model, [pixels, torch.randn(5, 3, 32, 48)]))
    with torch.inference_mode():
        expected, given = model(pixels), twin(pixels)
        error = (given - expected).square().mean().sqrt() / expected.std()
        assert 1e-4 < error < 0.1
        error = (twin.features(pixels) - model.features(pixels)).square().mean().sqrt() / model.features(pixels).std()
        assert 1e-4 < error < 0.1


def test_an_image_alone_is_as_in_a_batch() -> None:
    """Ranges are fixed beforehand, so that neighbours do not count."""
    model = noise_model()
    pixels = torch.randn(3, 3, 32, 48)
    pixels[2] *= 100
    twin = engine.pack(model, "int8", engine.calibrate(model, [pixels[:2]]))
    with torch.inference_mode():
        whole, alone = twin(pixels), torch.cat([twin(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=0.02 * float(whole.std()))


def test_int8_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noise_model()
    with pytest.raises(ValueError, match=r"int8 needs the ranges of the activations: ranges=calibrate"):
        engine.pack(model, "int8")
    with pytest.raises(ValueError, match="no images to calibrate with; give at least one batch"):
        engine.calibrate(model, [])
    with pytest.raises(ValueError, match="Linear has no transformer layers to calibrate"):
        engine.calibrate(torch.nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match='precision is "torch.bfloat16". Known: fp32, bf16, int8.'):
        engine.pack(model, torch.bfloat16)  # type: ignore[arg-type]
    monkeypatch.setattr(packed, "has_int8", lambda: False)
    with pytest.raises(ValueError, match=r"this CPU does not multiply int8 \(it lacks AVX512-VNNI\): take"):
        engine.pack(model, "int8", {})


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 63, 64, 65, 1000, 4099])
def test_numbers_become_the_bytes_below(count: int) -> None:
    """Every width of vector and its rest; nothing wraps around."""
    x = torch.linspace(-300, 600, count) if count > 1 else torch.tensor([200.5])
    expected = np.clip(np.floor(np.clip(x.numpy(), 0, None)), 0, 255).astype(np.uint8)
    assert np.array_equal(packed._to_bytes(x.clone()).numpy(), expected)


@pytest.mark.skipif(not has_bf16(), reason="this CPU does not multiply bf16")
def test_attention_beyond_what_exp_can_hold_and_not_a_number() -> None:
    """Rows whose exponentials overflow, or all vanish, take the careful way; a bad image harms itself only."""
    q, k, v = (torch.randn(3, 5, 16).bfloat16() for _ in range(3))
    q[1] *= 100
    k[0, :, 0], q[0, :, 0] = 30, -30  # every logit about -900
    expected = torch.softmax((q @ k.transpose(1, 2)).float(), dim=-1) @ v.float()
    mixed, sums = packed._mix(q, k, v)
    torch.testing.assert_close(mixed.float() / sums, expected, rtol=0.02, atol=0.03)
    v[2, 0, 0] = q[2, 1, 1] = float("nan")
    mixed, sums = packed._mix(q, k, v)
    assert (mixed.float() / sums)[:2].isfinite().all() and not (mixed.float() / sums)[2].isfinite().all()
