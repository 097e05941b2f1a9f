"""The same weights in timm and here give the same logits; and back again. And the original files with timm's names."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import rules
from opsin.checkpoints import timm as names
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.vit import ViT

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
