"""The same weights in transformers and here give the same tokens, logits and attention; and back again."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin import checkpoints
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.vit import ViT
from opsin.preprocess import PreprocessConfig

Noise = Callable[[nn.Module], None]
Near = Callable[[Tensor, Tensor], None]

TINY: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_labels": 7,
    "image_size": 40, "patch_size": 8,
}  # fmt: skip
VIT = TINY | {"intermediate_size": 44}
DINOV2 = TINY | {"mlp_ratio": 3}


def build(noise: Noise, kind: str, **config: Any) -> Any:
    """A transformers model, all noise, with attention that can be looked at."""
    family = next(f for f in ("Dinov2WithRegisters", "Dinov2", "DeiT", "ViT") if kind.startswith(f))
    settings = getattr(transformers, f"{family}Config")(**config)
    settings._attn_implementation = "eager"
    model = getattr(transformers, kind)(settings)
    noise(model)
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 40}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def load(folder: Path) -> ViT:
    model = checkpoints.read(folder).model
    assert isinstance(model, ViT)
    return model


def pixels(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", VIT),
    "vit, no qkv bias": ("ViTForImageClassification", VIT | {"qkv_bias": False}),
    "vit, tanh gelu": ("ViTForImageClassification", VIT | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
    "vit, not square": ("ViTForImageClassification", VIT | {"image_size": [40, 56]}),
    "deit": ("DeiTForImageClassification", VIT),
    "deit distilled": ("DeiTForImageClassificationWithTeacher", VIT),
    "dinov2": ("Dinov2ForImageClassification", DINOV2),
    "dinov2 swiglu": ("Dinov2ForImageClassification", DINOV2 | {"use_swiglu_ffn": True}),
    "dinov2 registers": ("Dinov2WithRegistersForImageClassification", DINOV2 | {"num_register_tokens": 5}),
    "dinov2 registers swiglu": ("Dinov2WithRegistersForImageClassification", DINOV2 | {"use_swiglu_ffn": True}),
}
HEADLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTModel", VIT),
    "deit": ("DeiTModel", VIT),
    "dinov2": ("Dinov2Model", DINOV2),
    "dinov2 registers": ("Dinov2WithRegistersModel", DINOV2),
}


@pytest.mark.parametrize("size", ["B/16", "L/16"])
def test_vit_of_full_width(size: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    dim, heads = {"B/16": (768, 12), "L/16": (1024, 16)}[size]
    reference = build(
        noise, "ViTForImageClassification",
        hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim, num_hidden_layers=2, num_labels=1000,
    )  # fmt: skip
    model = load(save(reference, tmp_path))
    with torch.no_grad():
        near(model(pixels(224, 224, 1)), reference(pixels(224, 224, 1)).logits)
        for height, width in ((384, 384), (160, 256)):
            images = pixels(height, width, 1)
            near(model(images), reference(images, interpolate_pos_encoding=True).logits)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_and_attention(name: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    kind, config = CLASSIFIERS[name]
    reference = build(noise, kind, **config)
    model = load(save(reference, tmp_path))
    images = pixels(*model.config.image_size)
    with torch.no_grad():
        expected = reference(images, output_attentions=True)
        near(model(images), expected.logits)
        for ours, theirs in zip(model.attention(images), expected.attentions, strict=True):
            near(ours, theirs)


@pytest.mark.parametrize("name", sorted(CLASSIFIERS.keys() - {"vit, not square"}))  # which transformers cannot resize
@pytest.mark.parametrize("height, width", [(56, 56), (24, 48)])
def test_logits_at_another_size(name: str, height: int, width: int, noise: Noise, near: Near, tmp_path: Path) -> None:
    kind, config = CLASSIFIERS[name]
    reference = build(noise, kind, **config)
    model = load(save(reference, tmp_path))
    options = {} if kind.startswith("Dinov2") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        near(model(pixels(height, width)), reference(pixels(height, width), **options).logits)


@pytest.mark.parametrize("name", HEADLESS)
def test_features_without_head(name: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    kind, config = HEADLESS[name]
    reference = build(noise, kind, **config)
    checkpoint = checkpoints.read(save(reference, tmp_path))
    model = checkpoint.model
    assert isinstance(model, ViT) and checkpoint.labels is None
    with torch.no_grad():
        expected = reference(pixels(40, 40))
        near(model(pixels(40, 40)), expected.last_hidden_state[:, 0])
        near(model.encode(model.embed(pixels(40, 40))), expected.last_hidden_state)
        if model.pre_logits is not None:
            near(torch.tanh(model.pre_logits(model(pixels(40, 40)))), expected.pooler_output)
    assert (model.pre_logits is not None) == (name in ("vit", "deit"))


def test_without_pooler(noise: Noise, near: Near, tmp_path: Path) -> None:
    reference = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False).eval()
    noise(reference)
    with torch.no_grad():
        near(load(save(reference, tmp_path))(pixels(40, 40)), reference(pixels(40, 40)).last_hidden_state[:, 0])


def test_masked_image_modelling_gives_its_encoder(noise: Noise, near: Near, tmp_path: Path) -> None:
    reference = build(noise, "ViTForMaskedImageModeling", **VIT, encoder_stride=8)
    with torch.no_grad():
        near(load(save(reference, tmp_path))(pixels(40, 40)), reference.vit(pixels(40, 40)).last_hidden_state[:, 0])


@pytest.mark.parametrize("name", [*CLASSIFIERS, "headless"])
def test_names_in_the_memory_of_version_5(name: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    kind, config = CLASSIFIERS.get(name, ("ViTModel", VIT))
    reference = build(noise, kind, **config)
    reference.config.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": [kind]}))
    state = reference.state_dict()
    assert any("q_proj" in key for key in state), "transformers no longer has these names"
    save_file(state, tmp_path / "model.safetensors")
    model = load(tmp_path)
    images = pixels(*model.config.image_size)
    with torch.no_grad():
        outputs = reference(images)
        near(model(images), outputs.last_hidden_state[:, 0] if kind == "ViTModel" else outputs.logits)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *(f"{name}, headless" for name in HEADLESS)])
def test_written_folder_loads_in_transformers(name: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    headless = name.endswith(", headless")
    kind, config = HEADLESS[name.removesuffix(", headless")] if headless else CLASSIFIERS[name]
    model = load(save(build(noise, kind, **config), tmp_path / "theirs"))
    names = None if headless else Labels.from_names([f"class {i}" for i in range(7)])
    preprocess = PreprocessConfig(size=model.config.image_size)
    checkpoints.write_hf(tmp_path / "ours", model, preprocess, names)
    auto = transformers.AutoModel if headless else transformers.AutoModelForImageClassification
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again).__name__ == kind
    assert not any(info.values()), info
    images = pixels(*model.config.image_size)
    with torch.no_grad():
        outputs = again.eval()(images)
        near(outputs.last_hidden_state[:, 0] if headless else outputs.logits, model(images))
    if names:
        assert again.config.id2label == dict(enumerate(names.names))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert (processor.size["height"], processor.size["width"]) == model.config.image_size
    ours = checkpoints.read(tmp_path / "ours")
    assert isinstance(ours.model, ViT) and ours.model.config == model.config
    assert ours.preprocess == preprocess and ours.labels == names


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"pool": "mean"}, 'pooling "mean"'),
        ({"pool": "map"}, 'pooling "map"'),
        ({"num_registers": 4}, "register tokens without layer scale"),
        ({"pre_logits": True}, "pre-logits layer under a head"),
        ({"layer_scale": True}, 'pooling "token"'),
        ({"layer_scale": True, "pool": "token_mean", "mlp_dim": 50}, "whole multiple of 24"),
    ],
)
def test_what_transformers_has_not_is_refused(
    changes: dict[str, Any], reason: str, noisy_checkpoint: checkpoints.Checkpoint, tmp_path: Path
) -> None:
    assert isinstance(noisy_checkpoint.model, ViT)
    model = ViT(dataclasses.replace(noisy_checkpoint.model.config, **changes))
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.write_hf(tmp_path, model, noisy_checkpoint.preprocess, None)
    assert not list(tmp_path.iterdir())
