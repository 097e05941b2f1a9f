"""The packed twin against the plain model."""

from typing import Any

import pytest
import torch

from opsin import engine
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig

SHAPES: dict[str, Any] = {
    "vit": ViTConfig(image_size=(32, 48), patch_size=8, embed_dim=24, num_layers=3, num_heads=3, mlp_dim=40),
    "vit without biases": ViTConfig(
        image_size=(32, 48), patch_size=8, embed_dim=24, num_layers=2, num_heads=3, mlp_dim=40, qkv_bias=False
    ),
    "gated": ViTConfig(
        image_size=(32, 48), patch_size=8, embed_dim=24, num_layers=2, num_heads=3, mlp_dim=40, gated_mlp=True,
        layer_scale=True,
    ),
    "perceiver": ImagePerceiverConfig(
        num_latents=7, latent_dim=24, num_blocks=2, layers_per_block=2, num_heads=4, image_size=(32, 48), num_bands=3,
        qk_dim=16, v_dim=32,
    ),
    "transformers' perceiver": ImagePerceiverConfig(
        num_latents=7, latent_dim=24, num_blocks=2, layers_per_block=2, num_heads=4, image_size=(32, 48), num_bands=3,
        numerics="transformers",
    ),
}  # fmt: skip


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> Any:
    config = SHAPES[request.param]
    torch.manual_seed(0)
    model = ViT(config) if isinstance(config, ViTConfig) else ImagePerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.skipif(not engine.can_pack(), reason="this torch has no oneDNN")
def test_packed_model_gives_the_same(model: Any) -> None:
    pixels = torch.randn(3, 3, 32, 48)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin: Any = engine.pack(model)
    with torch.inference_mode():
        expected, given = model(pixels), twin(pixels)
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert not torch.equal(given, model(pixels + 0.01))
        torch.testing.assert_close(twin.features(pixels), model.features(pixels), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not engine.can_pack(), reason="this torch has no oneDNN")
def test_packed_bf16_is_close(model: Any) -> None:
    """bf16 has 8 bits: a few per cent of the logits' spread, on noise."""
    pixels = torch.randn(3, 3, 32, 48)
    twin = engine.pack(model, "bf16")
    with torch.inference_mode():
        expected, given = model(pixels), twin(pixels)
    assert (given - expected).abs().max() < 0.1 * expected.std()
    assert next(model.parameters()).dtype == torch.float32
