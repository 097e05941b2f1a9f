"""The Perceiver's parts on their own; against the references they are compared in `parity/`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.models.front_ends import AudioPatches, ConvDownsample, Multimodal, OneHot, flow_patches
from opsin.models.layers import Attention
from opsin.models.perceiver import ClassificationDecoder, DenseDecoder, Encoder, Perceiver, ProjectionDecoder
from opsin.models.perceiver_io import (
    FlowPerceiver,
    FlowPerceiverConfig,
    ImagePerceiver,
    ImagePerceiverConfig,
    MultimodalPerceiver,
    MultimodalPerceiverConfig,
    TextPerceiver,
    TextPerceiverConfig,
)
from opsin.models.position import FourierPositions, TrainablePositions, linear_positions, point_positions

SMALL: dict[str, Any] = {
    "num_latents": 6,
    "latent_dim": 16,
    "num_blocks": 2,
    "layers_per_block": 2,
    "num_heads": 4,
    "num_classes": 5,
    "image_size": (20, 28),
    "num_bands": 3,
}


def noise(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        assert count(ImagePerceiver(ImagePerceiverConfig())) == 48_646_522
        pixels = ImagePerceiverConfig(front_end="pixels", max_resolution=(224, 224))
        assert count(ImagePerceiver(pixels)) == 48_440_627
        assert count(ImagePerceiver(ImagePerceiverConfig(front_end="conv1x1", embed_dim=256))) == 62_255_848
        assert count(TextPerceiver(TextPerceiverConfig())) == 201_108_230
        assert count(FlowPerceiver(FlowPerceiverConfig())) == 41_057_134
        assert count(MultimodalPerceiver(MultimodalPerceiverConfig())) == 19_858_855


@pytest.mark.parametrize(("numerics", "grid"), [("deepmind", (56, 56)), ("transformers", (55, 55))])
def test_tokens_of_the_conv_model(numerics: Any, grid: tuple[int, int]) -> None:
    front_end = ConvDownsample((224, 224), num_bands=2, max_resolution=(56, 56), numerics=numerics)
    assert front_end.positions.index_dims == grid
    tokens = front_end(torch.zeros(1, 3, 224, 224))
    assert tokens.shape == (1, grid[0] * grid[1], 64 + 10)


@pytest.mark.parametrize("numerics", ["deepmind", "transformers"])
@pytest.mark.parametrize("size", [(20, 28), (33, 17), (50, 41)])
def test_predicted_grid_is_the_one_that_comes_out(numerics: Any, size: tuple[int, int]) -> None:
    front_end = ConvDownsample(size, num_stages=1, num_bands=2, max_resolution=(8, 8), numerics=numerics)
    height, width = front_end.stages(torch.zeros(1, 3, *size)).shape[-2:]
    assert front_end.positions.index_dims == (height, width)


def test_stages_each_make_a_quarter() -> None:
    model = noise(ImagePerceiver(ImagePerceiverConfig(**SMALL | {"num_stages": 2, "image_size": (64, 80)})))
    assert model.embed(torch.zeros(1, 3, 64, 80)).shape[1] == 4 * 5
    assert model(torch.randn(2, 3, 64, 80)).shape == (2, 5)


@pytest.mark.parametrize("front_end", ["conv", "pixels", "conv1x1"])
def test_any_image_size_is_taken(front_end: Any) -> None:
    model = noise(ImagePerceiver(ImagePerceiverConfig(**SMALL, front_end=front_end)))
    native, other = model(torch.randn(2, 3, 20, 28)), model(torch.randn(2, 3, 36, 24))
    assert native.shape == other.shape == (2, 5)
    table = model.front_end.positions
    assert not torch.equal(table((6, 7))[:42], table()[:42])


def test_steps_make_up_the_forward_pass() -> None:
    model, pixels = noise(ImagePerceiver(ImagePerceiverConfig(**SMALL))), torch.randn(3, 3, 20, 28)
    features = model.pool(model.encode(model.embed(pixels)))
    assert features.shape == (3, model.config.feature_dim)
    assert torch.equal(model.features(pixels), features)
    assert torch.equal(model(pixels), model.classify(features))


def test_without_classes_it_gives_features() -> None:
    model = noise(ImagePerceiver(ImagePerceiverConfig(**SMALL | {"num_classes": 0})))
    assert model(torch.randn(2, 3, 20, 28)).shape == (2, 16)
    with pytest.raises(ValueError, match="no head"):
        model.classify(torch.zeros(1, 16))


def test_wrong_pixels_are_named() -> None:
    model = ImagePerceiver(ImagePerceiverConfig(**SMALL))
    with pytest.raises(ValueError, match=r"shape \(1, 1, 20, 28\); this model takes \(B, 3, H, W\)"):
        model(torch.zeros(1, 1, 20, 28))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"numerics": "jax"}, 'numerics is "jax". Known: deepmind, transformers'),
     ({"front_end": "resnet"}, 'front_end is "resnet". Known: conv, pixels, conv1x1'),
     ({"image_size": (4, 224)}, "too small"),
     ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
     ({"num_blocks": -1}, "num_blocks is -1; it must be at least 1"),
     ({"num_blocks": 10**12}, "1,000 is the most that is taken")],
)  # fmt: skip
def test_config_is_checked(setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ImagePerceiverConfig(**setting)


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_heads \(3\) does not divide qk_dim \(16\)"):
        ImagePerceiver(ImagePerceiverConfig(**SMALL | {"num_heads": 3}))


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(8, 8), (8, 20), (20, 8)])
def test_fused_attention_equals_its_definition(qk_dim: int, v_dim: int) -> None:
    attention = noise(Attention(12, 4, kv_dim=10, qk_dim=qk_dim, v_dim=v_dim))
    queries, tokens = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    weights = attention.weights(queries, tokens)
    values = attention.v(tokens).unflatten(-1, (4, -1)).transpose(1, 2)
    expected = attention.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(queries, tokens), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(8, 8), (8, 20), (20, 8)])
def test_one_head_reads_many_tokens_without_making_keys(qk_dim: int, v_dim: int) -> None:
    attention = noise(Attention(12, 1, kv_dim=10, qk_dim=qk_dim, v_dim=v_dim))
    queries, tokens, mask = torch.randn(3, 5, 12), torch.randn(3, 40, 10), torch.rand(3, 40) < 0.6
    mask[1] = False
    short = attention(queries, tokens, mask)
    attention.train()  # keys and values are made, as their gradients are wanted
    torch.testing.assert_close(short, attention(queries, tokens, mask), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.eval()(queries, tokens), attention.train()(queries, tokens))


@pytest.mark.parametrize("num_heads", [1, 4])
def test_masked_tokens_are_not_read(num_heads: int) -> None:
    attention = noise(Attention(12, num_heads, kv_dim=10))
    queries, tokens = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    mask = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    masked = attention(queries, tokens, mask)
    torch.testing.assert_close(masked[:1], attention(queries[:1], tokens[:1, :4]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked[1:], attention(queries[1:], tokens[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_rows_that_may_read_nothing_read_zeros(num_heads: int) -> None:
    attention = noise(Attention(12, num_heads, kv_dim=10))
    queries, tokens = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    mask = torch.stack([torch.zeros(7), torch.ones(7)]).bool()
    bias = attention.out.bias.expand(5, -1)  # all that is left of a context of zeros
    assert torch.equal(attention(queries, tokens, mask)[0], bias)
    query_mask = torch.ones(2, 5).bool()
    query_mask[1, 3] = False
    result = attention(queries, tokens, None, query_mask)
    assert torch.equal(result[1, 3], bias[0])
    assert torch.equal(result[0], attention(queries, tokens)[0])


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("front_end", ["pixels", "conv1x1"])
def test_no_attention_matrix_is_ever_stored(front_end: Any) -> None:
    config = ImagePerceiverConfig(
        **SMALL | {"num_latents": 128, "image_size": (48, 60), "latent_dim": 16, "num_bands": 2, "embed_dim": 8},
        front_end=front_end,
    )
    model, pixels = noise(ImagePerceiver(config)), torch.randn(1, 3, 48, 60)
    with torch.inference_mode(), LargestTensor() as largest:
        model(pixels)
    tokens, width = 48 * 60, model.front_end.dim
    assert tokens * width <= largest.numel <= 4 * tokens * width < tokens * config.num_latents


# ── training and compiling ───────────────────────────────────────────────────────────────────────────────────────────


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = noise(ImagePerceiver(ImagePerceiverConfig(**SMALL))).train()
        model.encoder.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        model(torch.randn(2, 3, 20, 28)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def networks() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    encoder: dict[str, Any] = {key: SMALL[key] for key in ("num_latents", "latent_dim", "layers_per_block")}
    ids, mask = torch.randint(262, (2, 11)), torch.ones(2, 11)
    mask[0, 7:] = 0
    text = TextPerceiverConfig(**encoder, num_cross_heads=2, qk_dim=8, v_dim=16, embed_dim=12, max_length=16)
    flow = FlowPerceiverConfig(**encoder, num_heads=4, image_size=(12, 20), num_bands=3)
    return {
        "conv": (ImagePerceiver(ImagePerceiverConfig(**SMALL)), (torch.randn(2, 3, 20, 28),)),
        "text": (TextPerceiver(text), (ids, mask)),
        "flow": (FlowPerceiver(flow), (torch.randn(1, 2, 3, 12, 20),)),
    }


@pytest.mark.parametrize("name", ["conv", "text", "flow"])
def test_compiles_without_a_graph_break(name: str) -> None:
    model, inputs = networks()[name]
    noise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


# ── positions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_full_grids_reach_both_ends_and_points_do_not() -> None:
    full = linear_positions((3, 5))
    assert full[0].tolist() == [-1, -1] and full[-1].tolist() == [1, 1] and full[1].tolist() == [-1, -0.5]
    points = point_positions(torch.tensor([0, 1, 14]), (3, 5))
    torch.testing.assert_close(points, torch.tensor([[-1, -1], [-1, -0.6], [1 / 3, 0.6]]))


def test_fourier_table_is_not_saved_and_moves_with_the_model() -> None:
    positions = FourierPositions((3, 4), 2, (7, 9))
    assert positions.state_dict() == {}
    assert positions.double()(like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert positions((5, 6)).shape == (30, 10)


def test_learned_positions_of_one_axis_are_not_resized() -> None:
    with pytest.raises(ValueError, match=r"learned for a grid of \(7,\) do not fit \(8,\)"):
        TrainablePositions((7,), 4)((8,))


# ── other inputs and outputs ─────────────────────────────────────────────────────────────────────────────────────────


def test_flow_patches_are_the_neighbourhood_in_reading_order() -> None:
    frames = torch.arange(2 * 3 * 4 * 5.0).reshape(1, 2, 3, 4, 5)
    patches = flow_patches(frames)
    assert patches.shape == (1, 2, 27, 4, 5)
    inner = patches[0, 1, :, 2, 3].reshape(3, 3, 3)  # row, column, colour
    assert torch.equal(inner, frames[0, 1, :, 1:4, 2:5].permute(1, 2, 0))
    assert patches[0, 0, :9, 0, 0].eq(0).all()  # the row above the first is zeros


def test_networks_of_other_parts() -> None:
    front_end = AudioPatches(48, samples_per_patch=6, num_bands=4)
    encoder = Encoder(front_end.dim, num_latents=5, latent_dim=8, num_blocks=2, layers_per_block=1, num_heads=2)
    audio = torch.randn(3, 48)
    for decoder, shape in (
        (ClassificationDecoder(4, query_dim=10, latent_dim=8), (3, 4)),
        (ProjectionDecoder(4, latent_dim=8), (3, 4)),
        (DenseDecoder(query_dim=front_end.dim, latent_dim=8, out_dim=2), (3, 8, 2)),
    ):
        assert Perceiver(front_end, encoder, decoder)(audio).shape == shape


def test_multimodal_tokens_are_padded_masked_and_in_order_of_name() -> None:
    parts = {"label": OneHot(7), "audio": AudioPatches(2000, samples_per_patch=5, num_bands=1)}
    front_end = noise(Multimodal(parts, mask_rates={"label": 1.0, "audio": 0.5}, min_padding=2))
    inputs = {"label": torch.eye(7)[:2], "audio": torch.randn(2, 2000)}
    tokens = front_end(inputs)
    assert tokens.shape == (2, 400 + 1, 10)
    assert torch.equal(tokens[:, 400], front_end.mask["label"].expand(2, -1))
    front_end.mask_rates = {}
    plain = front_end(inputs)
    assert torch.equal(plain[:, :400, :5], inputs["audio"].reshape(2, 400, 5))
    assert torch.equal(plain[:, 400, :7], inputs["label"])
    assert torch.equal(plain[0, 400, 7:], front_end.padding["label"][0])
    hidden = tokens[:, :400].eq(front_end.mask["audio"]).all(-1)
    assert 300 < hidden.sum() < 500  # half of 800, give or take seven deviations
    assert torch.equal(tokens[:, :400][~hidden], plain[:, :400][~hidden])


def test_decoding_in_parts_equals_decoding_at_once() -> None:
    config = MultimodalPerceiverConfig(
        num_latents=6, latent_dim=16, layers_per_block=2, num_heads=4, num_frames=3, image_size=(8, 12),
        image_bands=2, samples_per_frame=8, samples_per_patch=4, audio_bands=3, num_classes=5, label_dim=9,
        output_dim=16,
    )  # fmt: skip
    model = noise(MultimodalPerceiver(config))
    latents = model.encode(torch.rand(2, 3, 3, 8, 12), torch.randn(2, 24))
    image, audio = torch.arange(3 * 8 * 12), torch.arange(6)
    whole = model.decode(latents, image_points=image, audio_points=audio)
    assert {name: tuple(part.shape) for name, part in whole.items()} == {
        "audio": (2, 24), "image": (2, 288, 3), "label": (2, 5),
    }  # fmt: skip
    part = model.decode(latents, image_points=image[100:130], audio_points=audio[2:4])
    torch.testing.assert_close(part["image"], whole["image"][:, 100:130], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part["audio"], whole["audio"][:, 8:16], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part["label"], whole["label"], atol=1e-5, rtol=1e-5)


def test_text_may_be_shorter_than_the_table_and_not_longer() -> None:
    model, (ids, mask) = networks()["text"]
    noise(model)
    padded = model(ids, mask)
    torch.testing.assert_close(model(ids[:1, :7])[0], padded[0, :7], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="17 tokens; this model takes up to 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
