"""The same weights in timm and here give the same logits; and back again. And the original files with timm's names."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import rules
from opsin.checkpoints import timm as names
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

Noise = Callable[[nn.Module], None]
Near = Callable[[Tensor, Tensor], None]

SMALL = {"img_size": 48, "depth": 2, "num_classes": 7}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "vit, not square": ("vit_tiny_patch16_224", SMALL | {"img_size": (32, 48)}),
    "vit, headless": ("vit_tiny_patch16_224", SMALL | {"num_classes": 0}),
    "mean, norm before": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "fc_norm": False}),
    "mean, norm after": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}),
    "mean, no class token": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "class_token": False}),
    "other heads and activation": ("vit_tiny_patch16_224", SMALL | {"num_heads": 6, "act_layer": "gelu_tanh"}),
    "map": ("vit_tiny_patch16_224", SMALL | {"global_pool": "map"}),
    "huge, heads of 80": ("vit_huge_patch14_224", SMALL | {"img_size": 28, "depth": 1}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "deit 3": ("deit3_small_patch16_224", SMALL),
    "registers with positions": ("vit_so150m_patch16_reg4_gap_256", SMALL | {"depth": 1}),
    "registers, map": ("vit_so150m_patch16_reg4_map_256", SMALL | {"depth": 1}),
    "registers, no qkv bias, layer scale": ("vit_so150m2_patch16_reg1_gap_256", SMALL | {"depth": 1}),
    "dinov2": ("vit_small_patch14_dinov2", SMALL | {"img_size": 42}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 42}),
    "hybrid, root alone": ("vit_tiny_r_s16_p8_224", SMALL | {"img_size": 64}),
    "hybrid, not square": ("vit_small_r26_s32_224", SMALL | {"img_size": (64, 96)}),
    "hybrid, three stages": ("vit_base_r50_s16_224", SMALL | {"depth": 1}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", SMALL | {"img_size": 28, "depth": 1}),
}
HYBRIDS = ("vit_tiny_r_s16_p8_384", "vit_small_r26_s32_384", "vit_base_r50_s16_384", "vit_large_r50_s32_224")
UNLIKE_OURS = ("deit 3", "registers with positions", "registers, map", "registers, no qkv bias, layer scale")
"""Their position tables leave out the class token, or have rows for registers: read, but written as a whole table."""


def build(timm: ModuleType, noise: Noise, name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    architecture, settings = MODELS[name]
    model = timm.create_model(architecture, **settings | changes)
    noise(model)
    return model.eval(), settings


def save(folder: Path, model: Any, name: str) -> Path:
    """As timm pushes a model to the hub."""
    architecture, settings = MODELS[name]
    size = settings["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pretrained = {"input_size": [3, height, width], "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
    config = {
        "architecture": architecture,
        "num_classes": settings["num_classes"],
        "global_pool": settings.get("global_pool", model.global_pool),
        "model_args": {key: value for key, value in settings.items() if key != "depth"},
        "pretrained_cfg": pretrained,
        "label_names": [f"wnid{i}" for i in range(settings["num_classes"])],
        "label_descriptions": {f"wnid{i}": f"class {i}" for i in range(settings["num_classes"])},
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def read(path: Path) -> ViT:
    model = checkpoints.read(path).model
    assert isinstance(model, ViT)
    return model


def pixels(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", MODELS)
def test_folder(name: str, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference, settings = build(timm, noise, name)
    checkpoint = checkpoints.read(save(tmp_path, reference, name))
    model = checkpoint.model
    assert isinstance(model, ViT)
    with torch.no_grad():
        images = pixels(model.config.image_size)
        near(model(images), reference(images))
    assert checkpoint.source.format == "timm"
    assert checkpoint.preprocess and checkpoint.preprocess.image_size == model.config.image_size
    assert checkpoint.labels == (
        Labels.from_names([f"class {i}" for i in range(7)]) if settings["num_classes"] else None
    )


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(UNLIKE_OURS) - {"dinov2 registers"}))
def test_inverted_state_loads_in_timm(name: str, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference, _ = build(timm, noise, name)
    model = read(save(tmp_path, reference, name))
    again, _ = build(timm, lambda _: None, name)
    foreign = rules.invert(model.state_dict(), names.rules(model.config), model.config)
    assert foreign.keys() == reference.state_dict().keys()
    again.load_state_dict(foreign)
    with torch.no_grad():
        assert torch.equal(again(pixels(model.config.image_size)), reference(pixels(model.config.image_size)))


@pytest.mark.parametrize("name", ["vit", "deit distilled", "deit 3", "mean, norm after"])
@pytest.mark.parametrize("size", [(80, 80), (32, 64)])
def test_another_size(
    name: str, size: tuple[int, int], timm: ModuleType, noise: Noise, near: Near, tmp_path: Path
) -> None:
    reference, _ = build(timm, noise, name, dynamic_img_size=True)
    with torch.no_grad():
        near(read(save(tmp_path, reference, name))(pixels(size)), reference(pixels(size)))


@pytest.mark.parametrize("name", ["vit", "deit distilled", "mean, norm after", "mean, no class token", "map", "dinov2"])
def test_bare_file(name: str, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    """Everything is told by the names and shapes of the tensors."""
    reference, _ = build(timm, noise, name)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    checkpoint = checkpoints.read(tmp_path / "weights.pth")
    assert isinstance(checkpoint.model, ViT)
    with torch.no_grad():
        images = pixels(checkpoint.model.config.image_size)
        near(checkpoint.model(images), reference(images))
    assert checkpoint.labels == Labels.numbered(7)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {
            "student": {},
            "teacher": {f"module.backbone.{key}": value for key, value in state.items()}
            | {"module.head.mlp.0.weight": torch.ones(2, 3)},
        },
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["deit", "timm training", "dino", "compiled"],
)
def test_nested_and_prefixed(wrap: Any, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference, _ = build(timm, noise, "vit, headless")
    torch.save(wrap(reference.state_dict()), tmp_path / "checkpoint.pth")
    with torch.no_grad():
        near(read(tmp_path / "checkpoint.pth")(pixels((48, 48))), reference(pixels((48, 48))))


@pytest.mark.parametrize("name", ["dinov2", "dinov2 registers", "dinov2 giant"])
def test_original_dinov2(name: str, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    """Meta's names for the same tensors; positions have the row of the class token, registers have none."""
    reference, _ = build(timm, noise, name, num_classes=0)
    state = reference.state_dict() | {"mask_token": torch.ones(1, reference.embed_dim)}
    if "reg_token" in state:
        class_position = torch.randn(1, 1, reference.embed_dim)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - class_position
        state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    if name == "dinov2 giant":
        state = {key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for key, value in state.items()}
    torch.save(state, tmp_path / "dinov2_pretrain.pth")
    checkpoint = checkpoints.read(tmp_path / "dinov2_pretrain.pth")
    model = checkpoint.model
    assert isinstance(model, ViT)
    assert model.config.pos_resize == ("bicubic_antialias" if model.config.num_registers else "bicubic")
    assert checkpoint.preprocess and checkpoint.preprocess.image_size == (224, 224)
    with torch.no_grad():
        near(model(pixels(model.config.image_size)), reference(pixels(model.config.image_size)))


def test_original_deit_3(timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference, _ = build(timm, noise, "deit 3")
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in reference.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "deit_3_small_224_1k.pth")
    checkpoint = checkpoints.read(tmp_path / "deit_3_small_224_1k.pth")
    assert checkpoint.preprocess and checkpoint.preprocess.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        near(checkpoint.model(pixels((48, 48))), reference(pixels((48, 48))))


@pytest.mark.parametrize(
    "dim, layers, heads",
    [
        (192, 12, 3), (384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 27, 16), (1280, 32, 16), (1408, 40, 16),
        (1536, 40, 24), (1664, 48, 16), (1792, 56, 16), (768, 8, 8),
    ],
)  # fmt: skip
def test_heads_of_published_widths(dim: int, layers: int, heads: int) -> None:
    assert names.num_heads(dim, layers) == heads


def test_every_architecture_is_read_right_or_refused(timm: ModuleType, tmp_path: Path) -> None:
    """What shapes do not show (heads, GELU, epsilon, the order of things) is as here, or the architecture refused."""
    read, refused = 0, 0
    for name in [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit"), *HYBRIDS]:
        if not names.ARCHITECTURE.fullmatch(name) or any(part in name for part in names.OTHER_MATHS):
            continue
        with torch.device("meta"):
            reference = timm.create_model(name, depth=1)
        state, size = reference.state_dict(), tuple(reference.default_cfg["input_size"][1:])
        pool = names.POOLS.get(reference.global_pool)
        try:
            config = names.infer_config(
                state, tmp_path, grid_of=size, heads=names.HEADS.get(name), pool=pool, activation="gelu"
            )
            state = names.fold_register_positions(state, config)
            _, report = rules.convert(state, names.rules(config), config)
        except CheckpointError:
            refused += 1
            continue
        if report:
            refused += 1
            continue
        read += 1
        block = reference.blocks[0]
        assert config.num_heads == block.attn.num_heads, name
        assert isinstance(block.mlp.act, nn.SiLU if config.gated_mlp else nn.GELU), name
        assert getattr(block.mlp.act, "approximate", "none") == "none", name
        assert (
            config.norm_eps == block.norm1.eps == (reference.fc_norm if config.norm_after_pool else reference.norm).eps
        )
        assert type(block).__name__ == "Block" and not reference.pool_include_prefix, name
        assert type(reference).__name__ in ("VisionTransformer", "VisionTransformerDistilled"), name
        assert reference.global_pool in names.POOLS, name
    assert read >= 70 and refused < read


# ── written ──────────────────────────────────────────────────────────────────────────────────────────────────────────


SLOW = ("huge, heads of 80", "hybrid, not square", "hybrid, three stages")
"""To build. What is their own, their tensors, is in `test_inverted_state_loads_in_timm`."""


def load_folder(timm: ModuleType, folder: Path) -> list[Any]:
    """The model of a folder, in the two ways that timm has: as a source, and by the name of its architecture."""
    config = json.loads((folder / "config.json").read_text())
    args = {"num_classes": config["num_classes"], **config["model_args"]}
    weights = folder / "model.safetensors"
    models = [
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(config["architecture"], checkpoint_path=str(weights), **args),
    ]
    models[1].load_state_dict(load_file(weights))
    return [model.eval() for model in models]


@pytest.mark.parametrize("name", sorted(MODELS.keys() - set(SLOW)))
def test_written_folder(name: str, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference, settings = build(timm, noise, name)
    checkpoint = checkpoints.read(save(tmp_path / "theirs", reference, name))
    written = checkpoints.write_as("timm", tmp_path / "ours", *checkpoint_parts(checkpoint))
    assert sorted(path.name for path in written) == ["config.json", "model.safetensors"]
    assert sorted(written) == sorted((tmp_path / "ours").iterdir())
    back = checkpoints.read(tmp_path / "ours")
    model, again = checkpoint.model, back.model
    assert isinstance(model, ViT) and isinstance(again, ViT) and again.config == model.config
    assert (back.preprocess, back.labels) == (checkpoint.preprocess, checkpoint.labels)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    images = pixels(model.config.image_size)
    with torch.no_grad():
        expected = reference(images)
        assert torch.equal(again(images), model(images))
        for theirs in load_folder(timm, tmp_path / "ours"):
            assert theirs.num_classes == settings["num_classes"]
            near(theirs(images), expected)


def checkpoint_parts(checkpoint: checkpoints.Checkpoint) -> tuple[nn.Module, PreprocessConfig | None, Labels | None]:
    return checkpoint.model, checkpoint.preprocess, checkpoint.labels


def test_published_shapes_are_those_of_timm(timm: ModuleType, tmp_path: Path) -> None:
    """Every one of the table: what timm builds under the name alone is the model of that config."""
    assert len(names.ARCHITECTURES) == 45
    for name, config in names.ARCHITECTURES.items():
        with torch.device("meta"), rules._SkipInitialisation():
            reference = timm.create_model(name, num_classes=1000)
        state, size = reference.state_dict(), tuple(reference.default_cfg["input_size"][1:])
        found = names.infer_config(state, tmp_path, grid_of=size, heads=None, pool="token", activation="gelu")
        expected: dict[str, Any] = {"pos_resize": "bicubic_antialias", "distillation_head": config.distillation_token}
        assert found == dataclasses.replace(config, **expected), name
        assert reference.no_embed_class == any(part in name for part in names.BEFORE_CLASS_TOKEN), name
        assert reference.blocks[0].attn.num_heads == config.num_heads
        if config.class_token and not config.num_registers:
            assert names._architecture(config) == (name, {})


SHAPE: dict[str, Any] = {
    "image_size": (33, 55), "patch_size": 11, "embed_dim": 26, "num_layers": 2, "num_heads": 2, "mlp_dim": 37,
    "num_classes": 7, "pos_resize": "bicubic_antialias", "stem_maths": "timm", "distillation_head": False,
}  # fmt: skip
DISTILLED = {"distillation_token": True, "distillation_head": True}
OTHER_SHAPES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "no class token, mean": {"class_token": False, "pool": "mean"},
    "class token, norm after": {"norm_after_pool": True},
    "relu, layer scale": {"activation": "relu", "layer_scale": True},
    "registers": {"num_registers": 3},
    "registers, no class token, norm after the mean": {
        "num_registers": 3, "class_token": False, "pool": "mean", "norm_after_pool": True,
    },
    "map": {"class_token": False, "pool": "map", "activation": "gelu_tanh"},
    "as DINOv2 with registers": {"num_registers": 4, "layer_scale": True, "patch_size": 1},
    "SwiGLU": {"gated_mlp": True, "layer_scale": True},
    "distilled": DISTILLED,
    "no bias": {"qkv_bias": False},
    "hybrid": {"stem": (), "image_size": (16, 24), "patch_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_shapes_without_a_name_of_their_own(
    name: str, timm: ModuleType, noise: Noise, near: Near, tmp_path: Path
) -> None:
    """The nearest architecture, and arguments for the rest."""
    config = ViTConfig(**SHAPE | OTHER_SHAPES[name])
    model = ViT(config)
    noise(model)
    preprocess = PreprocessConfig(size=config.image_size)
    labels = Labels.from_names([f"class {i}" for i in range(7)])
    checkpoints.write_as("timm", tmp_path, model.eval(), preprocess, labels)
    back = checkpoints.read(tmp_path)
    assert isinstance(back.model, ViT) and (back.preprocess, back.labels) == (preprocess, labels)
    assert back.model.config == config
    assert all(torch.equal(back.model.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        for theirs in load_folder(timm, tmp_path):
            near(theirs(pixels(config.image_size)), model(pixels(config.image_size)))


def test_positions_for_another_size_than_the_images(timm: ModuleType, noise: Noise, near: Near, tmp_path: Path) -> None:
    """As DINOv2: both sizes are kept, and timm's model takes any."""
    model = ViT(ViTConfig(**SHAPE))
    noise(model)
    preprocess = PreprocessConfig.timm_crop(44, crop_pct=0.875)
    checkpoints.write_as("timm", tmp_path, model.eval(), preprocess, None)
    back = checkpoints.read(tmp_path)
    assert back.model.config == model.config and back.preprocess == preprocess
    with torch.no_grad():
        for theirs in load_folder(timm, tmp_path):
            for size in ((44, 44), model.config.image_size):
                near(theirs(pixels(size)), model(pixels(size)))


def test_preprocessing_and_labels_in_timm(timm: ModuleType, noise: Noise, photos: Path, tmp_path: Path) -> None:
    """timm's transform, made of the folder, gives the same pixels; classes have their WordNet ids."""
    from PIL import Image

    model = ViT(ViTConfig(**SHAPE | {"image_size": (44, 44), "num_classes": 200}))
    noise(model)
    labels = Labels.tiny_imagenet()
    for preprocess in (
        PreprocessConfig.timm_crop(44, crop_pct=0.9),
        PreprocessConfig(size=47, crop_size=(44, 44), crop_rounding="half_even", resample="lanczos"),
        PreprocessConfig(size=(44, 44), rescale_factor=1 / 127.5, mean=(1.0, 1.0, 1.0), std=(1.0, 0.5, 2.0)),
    ):
        checkpoints.write_as("timm", tmp_path, model, preprocess, labels)
        theirs, *_ = load_folder(timm, tmp_path)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
        image = Image.open(photos / "coffee.png").convert("RGB")
        assert (transform(image) - preprocess(image)).abs().max() < 1e-6
        back = checkpoints.read(tmp_path)
        assert (back.preprocess, back.labels) == (preprocess, labels)
        assert tuple(theirs.pretrained_cfg["label_names"]) == labels.wnids
        assert theirs.pretrained_cfg["label_descriptions"]["n01443537"] == "goldfish, Carassius auratus"


def test_what_timm_has_otherwise_is_said_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The near preprocessing is for timm, opsin reads its own back."""
    model = ViT(ViTConfig(**SHAPE | {"image_size": (44, 44), "pos_resize": "bicubic"}))
    labels = Labels(tuple("abcdefg"), wnids=tuple(f"n0000000{i}" for i in range(7)), multi_label=True)
    squash = PreprocessConfig.jax_squash(44)
    down = PreprocessConfig(size=51, crop_size=(44, 44))
    for preprocess in (squash, down):
        checkpoints.write_as("timm", tmp_path, model, preprocess, labels)
        back = checkpoints.read(tmp_path)
        assert back.preprocess == preprocess and back.labels == dataclasses.replace(labels, multi_label=False)
    assert "near to this model's and not the same: it resizes with antialiasing." in caplog.text
    assert "it rounds an odd crop margin to even, not down: a shift of one pixel." in caplog.text
    assert "use a sigmoid, not a softmax" in caplog.text
    assert "timm will resize positions by bicubic_antialias, not bicubic" in caplog.text


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pool": "token_mean"}, r'pooling "token_mean" \(it has token, mean, map\)'),
        ({"pre_logits": True}, "a pre-logits layer"),
        ({"norm_eps": 1e-5}, r"norm_eps 1e-05 \(it is always 1e-06\)"),
        ({"distillation_token": True}, "a distillation token without a head"),
        ({**DISTILLED, "num_classes": 0}, "a distillation token without a head"),
        ({**DISTILLED, "pool": "mean"}, 'a distillation token and pooling "mean"'),
        ({**DISTILLED, "norm_after_pool": True}, "a distillation token and a norm after"),
        ({**DISTILLED, "num_registers": 3}, "a distillation token and registers"),
        ({"gated_mlp": True, "layer_scale": True, "pool": "map"}, "a gated MLP and attention pooling"),
        ({"gated_mlp": True}, "a gated MLP."),
        (
            {"stem": (), "stem_maths": "jax", "patch_size": 1, "image_size": (32, 32)},
            "a stem with the JAX release's constants",
        ),
        ({"stem": (1,), "patch_size": 1, "image_size": (32, 32)}, r"a stem of \(1,\) units"),
    ],
)
def test_what_timm_has_not_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = ViT(ViTConfig(**SHAPE | changes))
    with pytest.raises(CheckpointError, match=f"timm has no model with .*{reason}.* can hold this model: opsin"):
        checkpoints.write_as("timm", tmp_path, model, PreprocessConfig(size=model.config.image_size), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "preprocess, reason",
    [
        (PreprocessConfig.deepmind_perceiver(), r"has source_crop \(0.875, 0.875\)"),
        (PreprocessConfig(size=None, crop_size=(44, 44)), "has source_crop None and size None"),
        (PreprocessConfig(size=60, crop_size=(44, 33)), "only for a square crop, not for 44 × 33"),
        (PreprocessConfig(size=(60, 90), crop_size=(44, 44)), r"crops \(44, 44\) out of \(60, 90\)"),
    ],
)
def test_preprocessing_that_timm_cannot_do_is_refused(
    preprocess: PreprocessConfig, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.write_as("timm", tmp_path, ViT(ViTConfig(**SHAPE)), preprocess, None)
    assert not list(tmp_path.iterdir())
