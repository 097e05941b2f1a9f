"""Models in the forms of other programs: written whole or not at all, read again equal to the bit, or refused."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from opsin import checkpoints
from opsin.checkpoints import files, portable, rules
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.perceiver_io import (
    FlowPerceiverConfig,
    ImagePerceiverConfig,
    MultimodalPerceiverConfig,
    TextPerceiverConfig,
)
from opsin.models.vit import ViTConfig
from opsin.models.vt import VTConfig
from opsin.preprocess import PreprocessConfig

VIT: dict[str, Any] = {
    "image_size": (22, 22), "patch_size": 11, "embed_dim": 26, "num_layers": 2, "num_heads": 2, "mlp_dim": 37,
    "num_classes": 7,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {"num_latents": 3, "latent_dim": 16, "layers_per_block": 2, "num_heads": 8}
IMAGES: dict[str, Any] = PERCEIVER | {"num_classes": 7, "image_size": (32, 32)}
TRANSFORMERS: dict[str, Any] = {"numerics": "transformers", "cross_mlp_ratio": 1}
TEXT: dict[str, Any] = PERCEIVER | {"embed_dim": 8, "max_length": 13, "num_cross_heads": 8, "qk_dim": 256, "v_dim": 16}
VIDEO: dict[str, Any] = {"num_frames": 2, "image_size": (8, 8), "samples_per_frame": 16, "num_classes": 7}
SOUND: dict[str, Any] = PERCEIVER | VIDEO | {"max_resolution": (2, 2)}

HELD: list[tuple[Any, set[str]]] = [  # config → the formats that can hold it, all others refuse; opsin's can always
    (ViTConfig(**VIT), {"transformers", "timm"}),
    (ViTConfig(**VIT, activation="gelu_tanh"), {"transformers", "timm", "npz"}),
    (ViTConfig(**VIT, norm_eps=1e-12), {"transformers", "timm"}),
    (ViTConfig(**VIT, class_token=False, pool="mean"), {"timm"}),
    (ViTConfig(**VIT, class_token=False, pool="map", activation="gelu_tanh"), {"timm", "npz"}),
    (ViTConfig(**VIT, distillation_token=True), {"transformers", "timm"}),
    (ViTConfig(**VIT, num_registers=3), {"timm"}),
    (ViTConfig(**VIT | {"mlp_dim": 52}, layer_scale=True, num_registers=3, pool="token_mean"), {"transformers"}),
    (ViTConfig(**VIT, pre_logits=True, activation="gelu_tanh"), {"npz"}),
    (ViTConfig(**VIT | {"patch_size": 1, "image_size": (32, 32)}, stem=(), activation="gelu_tanh"), {"npz"}),
    (ViTConfig(**VIT | {"patch_size": 1, "image_size": (32, 32)}, stem=(), stem_maths="timm"), {"timm"}),
    (ViTConfig(**VIT, pool="token_mean"), set()),
    (VTConfig(width=8, map_dim=16, token_dim=16, num_tokens=3, num_heads=2, num_groups=2, num_classes=7), set()),
    (ImagePerceiverConfig(**IMAGES), {"pystate"}),
    (ImagePerceiverConfig(**IMAGES | TRANSFORMERS), {"transformers"}),
    (ImagePerceiverConfig(**IMAGES, front_end="conv1x1", embed_dim=8), {"pystate"}),
    (ImagePerceiverConfig(**IMAGES, front_end="pixels", num_bands=3), {"pystate"}),
    (ImagePerceiverConfig(**IMAGES | {"num_classes": 0}), set()),
    (TextPerceiverConfig(**TEXT), {"pystate"}),
    (TextPerceiverConfig(**TEXT, **TRANSFORMERS, decoder_heads=8, decoder_qk_dim=256), {"transformers"}),
    (FlowPerceiverConfig(**PERCEIVER | {"num_heads": 2}, image_size=(5, 7)), {"pystate"}),
    (FlowPerceiverConfig(**PERCEIVER | TRANSFORMERS | {"num_heads": 2}, image_size=(5, 7)), {"transformers"}),
    (MultimodalPerceiverConfig(**SOUND), {"pystate"}),
    (MultimodalPerceiverConfig(**SOUND | TRANSFORMERS), {"transformers"}),
]  # fmt: skip
CASES = [
    pytest.param(config, held, format, id=f"{number}-{type(config).__name__}-{format}")
    for number, (config, held) in enumerate(HELD)
    for format in portable.WRITERS
]


@cache
def build(config: Any) -> tuple[nn.Module, PreprocessConfig | None, Labels | None]:
    torch.manual_seed(0)
    model = rules.MODELS[type(config)](config).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randint(1, 9, tensor.shape) / 8)
    num_classes = getattr(config, "num_classes", 0)
    images = isinstance(config, ViTConfig | VTConfig | ImagePerceiverConfig)
    return model, PreprocessConfig(size=config.image_size) if images else None, Labels.numbered(num_classes) or None


def target(folder: Path, format: str) -> Path:
    return folder / f"model.{format}" if format in portable.SUFFIXES else folder / "model"


@pytest.mark.parametrize(("config", "held", "format"), CASES)
def test_held_or_refused(config: Any, held: set[str], format: str, tmp_path: Path) -> None:
    model, preprocess, labels = build(config)
    path = target(tmp_path, format)
    if format not in held | {"opsin"}:
        graph = ["onnx"] if isinstance(config, ViTConfig | ImagePerceiverConfig) else []
        fitting = ["opsin", *(name for name in portable.WRITERS if name in held), *graph]
        with pytest.raises(CheckpointError, match=f"[.] Formats that can hold this model: {', '.join(fitting)}[.]$"):
            checkpoints.write_as(format, path, model, preprocess, labels)
        assert not list(tmp_path.iterdir())
        return
    written = checkpoints.write_as(format, path, model, preprocess, labels)
    found = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(written) == sorted(found)
    back = checkpoints.read(path, config=config if format == "pystate" else None)
    assert back.source.format == {"pystate": "haiku"}.get(format, format)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    if format not in portable.SUFFIXES:
        assert back.preprocess == preprocess and (back.labels is None) == (labels is None or not len(labels))


@pytest.mark.parametrize("format", portable.WRITERS)
def test_whole_or_not_at_all(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in the middle of a file leaves the older one, and nothing beside it."""
    config = ImagePerceiverConfig(**IMAGES) if format == "pystate" else ViTConfig(**VIT, activation="gelu_tanh")
    model, preprocess, labels = build(config)
    path = target(tmp_path, format)
    written = checkpoints.write_as(format, path, model, preprocess, labels)
    before = {file: file.read_bytes() for file in written}

    def fail(*arguments: Any, **settings: Any) -> None:
        for argument in arguments:
            if isinstance(argument, Path):
                argument.write_bytes(b"half")
            elif hasattr(argument, "write"):
                argument.write(b"half")
        raise OSError("no space left")

    for name in ("opsin.checkpoints.files.save_file", "numpy.savez", "pickle.dump"):
        monkeypatch.setattr(name, fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoints.write_as(format, path, model, preprocess, labels)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("format", "name", "reason"),
    [
        (
            "tim",
            "x",
            'no checkpoint format "tim". Did you mean "timm"[?] Known: opsin, transformers, timm, npz, pystate',
        ),
        ("zzz", "x", 'no checkpoint format "zzz". Known: opsin'),
        ("npz", "x", "x should be a file that ends in .npz, as npz is read"),
        ("npz", "folder.npz", "folder.npz should be a file"),
        ("pystate", "x.npz", "x.npz should be a file that ends in .pystate or .pickle"),
        ("timm", "file", "file is a file; timm is written as a folder"),
        ("opsin", "file", "file is a file; opsin is written as a folder"),
    ],
)
def test_formats_and_paths_that_do_not_go_together(format: str, name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.write_as(format, tmp_path / name, *build(ViTConfig(**VIT)))


def test_preprocessing_that_is_refused_names_where_it_goes(tmp_path: Path) -> None:
    model, _, labels = build(ViTConfig(**VIT))
    with pytest.raises(CheckpointError, match="cannot resize without antialiasing.*this model: opsin, timm, onnx."):
        checkpoints.write_as("transformers", tmp_path, model, PreprocessConfig.jax_squash(22), labels)


def test_older_preprocessing_does_not_stay(tmp_path: Path) -> None:
    model, preprocess, labels = build(ViTConfig(**VIT))
    checkpoints.write_as("transformers", tmp_path, model, preprocess, labels)
    assert files.read_json(tmp_path / "preprocessor_config.json")["size"] == {"height": 22, "width": 22}
    checkpoints.write_as("transformers", tmp_path, model, None, labels)
    assert not (tmp_path / "preprocessor_config.json").exists()


@pytest.mark.parametrize("format", ["timm", "npz"])
def test_the_small_norm_eps_of_transformers_becomes_that_of_the_releases(
    format: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, preprocess, labels = build(ViTConfig(**VIT, norm_eps=1e-12, activation="gelu_tanh"))
    path = target(tmp_path, format)
    checkpoints.write_as(format, path, model, preprocess, labels)
    assert "adds 1e-06 to the variances, as the releases do; this model adds 1e-12" in caplog.text
    back, pixels = checkpoints.read(path).model, torch.rand(3, 3, 22, 22)
    with torch.no_grad():
        ours, theirs = model(pixels), back(pixels)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()
