"""Heads are exchanged and positions resized without a change in what the body computes."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import nn

from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.position import FourierPositions, PosResize
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.preprocess import PreprocessConfig
from opsin.train import heads
from opsin.train.heads import head_of, preprocess_for

OLD = Labels(("tabby, tabby cat", "goose", "wolf", "crane", "drake"))
NEW = Labels(("wolf", "dingo", "tabby"))  # rows 2, none, 0
OTHER = Labels(("rose", "tulip"))
CONFIG = ViTConfig(
    image_size=(24, 40), patch_size=8, embed_dim=12, num_layers=2, num_heads=2, mlp_dim=20, num_classes=5
)
PERCEIVER = ImagePerceiverConfig(
    image_size=(20, 28), num_latents=6, latent_dim=16, num_blocks=2, layers_per_block=2, num_heads=4, num_bands=3,
    max_resolution=(5, 7), num_classes=5,
)  # fmt: skip
VISUAL = VTConfig(
    image_size=(24, 40), width=4, small_stem=True, map_dim=6, token_dim=12, num_tokens=3, num_heads=3, num_groups=2,
    position_size=3, num_classes=5,
)  # fmt: skip
PERCEIVERS = {
    "conv": PERCEIVER,
    "conv as transformers": replace(PERCEIVER, numerics="transformers"),
    "pixels": replace(PERCEIVER, front_end="pixels", max_resolution=(20, 28)),
    "conv1x1": replace(PERCEIVER, front_end="conv1x1", embed_dim=6, decoder_residual=False),
}
VITS = {
    "vit": CONFIG,
    "deit": replace(CONFIG, distillation_token=True),
    "deit without its head": replace(CONFIG, distillation_token=True, distillation_head=False),
    "dinov2": replace(CONFIG, layer_scale=True, num_registers=3, pool="token_mean", gated_mlp=True),
    "map": replace(CONFIG, pool="map", class_token=False),
    "fc_norm": replace(CONFIG, pool="mean", norm_after_pool=True),
    "hybrid": replace(CONFIG, image_size=(48, 80), patch_size=2, stem=()),
}


def noise(config: ViTConfig | VTConfig | ImagePerceiverConfig, seed: int = 0) -> Any:
    kinds: dict[type, Any] = {ViTConfig: ViT, VTConfig: VT, ImagePerceiverConfig: ImagePerceiver}
    model: nn.Module = kinds[type(config)](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.3, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 2, generator=generator)
            elif isinstance(module, FourierPositions):
                module.reset()
    return model.eval()


def new_head(*arguments: Any, **options: Any) -> tuple[Any, int]:
    return heads.new_head(*arguments, **options)


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max())


@pytest.mark.parametrize(
    "config", [*VITS.values(), VISUAL, replace(VISUAL, num_modules=0, image_size=(32, 40))], ids=str
)
def test_the_features_are_kept_under_a_head_of_zeros(config: ViTConfig | VTConfig) -> None:
    old = noise(config)
    model, reused = new_head(old, OLD, OTHER, bias=-3.0)
    x = pixels(*config.image_size)
    assert reused == 0
    assert torch.equal(model.features(x), old.features(x))
    assert torch.equal(model(x), torch.full((2, 2), -3.0))
    assert model.config == replace(config, num_classes=2)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", get_args(PosResize))
@pytest.mark.parametrize("config", [CONFIG, VITS["deit"], VITS["dinov2"], VITS["map"]], ids=str)
def test_a_vit_at_another_size_computes_what_it_did_there(config: ViTConfig, method: PosResize) -> None:
    old = noise(replace(config, pos_resize=method))
    model, _ = new_head(old, None, NEW, image_size=(56, 32))
    x = pixels(56, 32)
    assert model.config.image_size == (56, 32)
    assert model.pos_embed.shape == (1, config.num_positioned + 7 * 4, 12)
    assert equal(model.features(x), old.features(x))


def test_the_scipy_rule_of_the_jax_release() -> None:
    """vision_transformer `checkpoint.py`: `scipy.ndimage.zoom`, order 1, on the table as a grid."""
    ndimage = pytest.importorskip("scipy.ndimage")
    old = noise(replace(CONFIG, pos_resize="bilinear_corners"))
    model, _ = new_head(old, None, NEW, image_size=(56, 72))
    grid = old.pos_embed[0, 1:].reshape(3, 5, 12).detach().numpy()
    expected = torch.from_numpy(ndimage.zoom(grid, (7 / 3, 9 / 5, 1), order=1)).reshape(63, 12)
    assert torch.allclose(model.pos_embed[0, 1:], expected, atol=1e-6)
    assert torch.equal(model.pos_embed[0, 0], old.pos_embed[0, 0])


def test_the_pre_logits_layer_goes_with_the_head() -> None:
    old = noise(replace(CONFIG, pre_logits=True))
    model, reused = new_head(old, OLD, OTHER)
    assert (reused, model.pre_logits, model.config.pre_logits) == (0, None, False)


@pytest.mark.parametrize(
    "config",
    [CONFIG, VITS["deit"], VITS["dinov2"], replace(CONFIG, pre_logits=True), VISUAL, *PERCEIVERS.values()],
    ids=str,
)
def test_rows_are_reused_by_class(config: ViTConfig | VTConfig | ImagePerceiverConfig) -> None:
    old = noise(config)
    model, reused = new_head(old, OLD, NEW, bias=-3.0)
    x = pixels(*config.image_size)
    logits, before = model(x), old(x)
    assert reused == 2
    assert torch.allclose(logits[:, 0], before[:, 2], rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits[:, 2], before[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(logits[:, 1], torch.full((2,), -3.0))


@pytest.mark.parametrize("config", PERCEIVERS.values(), ids=PERCEIVERS)
def test_a_perceiver_gets_a_new_decoder(config: ImagePerceiverConfig) -> None:
    old = noise(config)
    model, reused = new_head(old, OLD, OTHER, bias=-3.0)
    x = pixels(20, 28)
    assert reused == 0
    assert torch.equal(model.encode(model.embed(x)), old.encode(old.embed(x)))
    assert torch.equal(model(x), torch.full((2, 2), -3.0))
    assert model.config == replace(config, num_classes=2)
    for name in ("positions.table", "cross.attn.q.weight", "cross.mlp.fc2.weight"):
        new = model.decoder.get_parameter(name)
        assert 0 < new.std() < 0.6
        assert not torch.equal(new, old.decoder.get_parameter(name))
    assert torch.equal(model.decoder.cross.norm_q.weight, torch.ones(16))


@pytest.mark.parametrize("config", PERCEIVERS.values(), ids=PERCEIVERS)
def test_a_perceiver_at_another_size_computes_what_it_did_there(config: ImagePerceiverConfig) -> None:
    old = noise(config)
    model, _ = new_head(old, OLD, NEW, image_size=(36, 24))
    x = pixels(36, 24)
    assert model.config.image_size == (36, 24)
    assert model.config.max_resolution == config.max_resolution
    assert equal(model.features(x), old.features(x))


def test_a_body_without_a_head() -> None:
    old = noise(replace(CONFIG, num_classes=0, pool="token_mean"))
    model, reused = new_head(old, None, NEW)
    assert (reused, tuple(model.head.weight.shape)) == (0, (3, 24))
    assert torch.equal(model.features(pixels(24, 40)), old(pixels(24, 40)))
    perceiver, _ = new_head(noise(replace(PERCEIVER, num_classes=0)), None, NEW)
    assert perceiver(pixels(20, 28)).shape == (2, 3)


@pytest.mark.parametrize("config", [CONFIG, VISUAL, PERCEIVER], ids=["vit", "vt", "perceiver"])
def test_the_old_model_is_left_alone(config: ViTConfig | VTConfig | ImagePerceiverConfig) -> None:
    old = noise(config)
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    model, _ = new_head(old, OLD, NEW)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())


def test_half_precision_becomes_fp32_and_rates_are_set() -> None:
    model, _ = new_head(noise(CONFIG).half(), OLD, NEW, dropout_rate=0.1, drop_path_rate=0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.dropout_rate, model.layers[1].drop_path_rate) == (0.1, 0.2)
    assert new_head(model, NEW, OTHER)[0].config.dropout_rate == 0


def test_what_does_not_fit_is_said() -> None:
    old = noise(CONFIG)
    with pytest.raises(ValueError, match="labels is empty; a head tells one class or more."):
        new_head(old, OLD, Labels(()))
    with pytest.raises(ValueError, match="old_labels has 3 classes, the model's head 5."):
        new_head(old, NEW, OTHER)
    with pytest.raises(
        ValueError, match=r"patch_size \(8\) does not divide image_size \(50\). Nearest that fit: 48, 56"
    ):
        new_head(old, OLD, NEW, image_size=(56, 50))
    with pytest.raises(
        ValueError, match="dropout_rate is 0.1 and drop_path_rate 0.0; a Perceiver has neither, so set 0."
    ):
        new_head(noise(PERCEIVER), OLD, NEW, dropout_rate=0.1)
    with pytest.raises(ValueError, match="dropout_rate is 0.0 and drop_path_rate 0.2; a VT has neither, so set 0."):
        new_head(noise(VISUAL), OLD, NEW, drop_path_rate=0.2)


def test_head_of() -> None:
    deit = noise(replace(CONFIG, distillation_token=True, pre_logits=True))
    assert head_of(deit) == [deit.pre_logits, deit.head, deit.head_dist]
    vt = noise(VISUAL)
    assert head_of(vt) == [vt.head]
    assert head_of(noise(replace(VISUAL, num_classes=0))) == []
    perceiver = noise(PERCEIVER)
    assert head_of(perceiver) == [perceiver.decoder]
    assert head_of(noise(replace(CONFIG, num_classes=0, pre_logits=True))) == []
    assert head_of(noise(replace(PERCEIVER, num_classes=0))) == []


@pytest.mark.parametrize(
    ("before", "image_size", "after"),
    [
        (PreprocessConfig.jax_squash(224), (384, 384), PreprocessConfig.jax_squash(384)),
        (PreprocessConfig.jax_squash(224), (160, 96), PreprocessConfig.jax_squash((160, 96))),
        (PreprocessConfig.deepmind_perceiver(), (64, 64), PreprocessConfig.deepmind_perceiver((64, 64))),
        (
            PreprocessConfig(size=256, crop_size=(224, 224)),
            (384, 384),
            PreprocessConfig(size=439, crop_size=(384, 384)),
        ),
        (PreprocessConfig(size=256, crop_size=(224, 224)), (112, 56), PreprocessConfig(size=128, crop_size=(112, 56))),
        (
            PreprocessConfig(size=(256, 320), crop_size=(224, 280)),
            (448, 140),
            PreprocessConfig(size=(512, 160), crop_size=(448, 140)),
        ),
        (PreprocessConfig(size=None, crop_size=(64, 64)), (96, 96), PreprocessConfig(size=None, crop_size=(96, 96))),
    ],
    ids=["squash", "squash to a strip", "perceiver", "shorter edge", "shorter edge, strip", "both sides", "crop alone"],
)
def test_preprocess_for(before: PreprocessConfig, image_size: tuple[int, int], after: PreprocessConfig) -> None:
    assert preprocess_for(before, image_size) == after
    assert preprocess_for(before, before.image_size) is before
    assert after.image_size == image_size


def test_preprocess_without_a_size() -> None:
    with pytest.raises(ValueError, match="with size=256 and no crop_size every image keeps a size of its own"):
        preprocess_for(PreprocessConfig(size=256), (64, 64))
