"""Names to checkpoints: the order of places, opsin's own form, labels and preprocessing, and what is refused."""

import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin import checkpoints
from opsin.checkpoints import Checkpoint, Source, hf, hub, timm
from opsin.errors import CheckpointError, UnknownModel
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig


@pytest.fixture
def folder(tmp_path: Path, noisy_checkpoint: Checkpoint) -> Path:
    checkpoints.write(tmp_path / "model", noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    return tmp_path / "model"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("labels", [Labels.tiny_imagenet(), Labels.numbered(7), None])
def test_native_round_trip(labels: Labels | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(15, 20), patch_size=5, embed_dim=12, num_layers=2, num_heads=3, mlp_dim=7,
        num_classes=len(labels) if labels else 0, pool="map", layer_scale=True, gated_mlp=True, num_registers=2,
        drop_path_rate=0.1, pos_resize="bilinear", activation="silu",
    )  # fmt: skip
    model = ViT(config)
    preprocess = PreprocessConfig(size=40, crop_size=(15, 20), resample="lanczos")
    checkpoints.write(tmp_path / "new" / "folder", model, preprocess, labels)
    again = checkpoints.read(str(tmp_path / "new" / "folder"))
    assert isinstance(again.model, ViT) and again.model.config == config and not again.model.training
    assert again.preprocess == preprocess and again.labels == labels
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert all(parameter.requires_grad for parameter in again.model.parameters())
    assert again.source.format == "opsin" and again.source.revision is None


def test_half_precision_files_give_fp32_models(tmp_path: Path, noisy_checkpoint: Checkpoint) -> None:
    model = noisy_checkpoint.model
    checkpoints.write(tmp_path, model, noisy_checkpoint.preprocess, None, dtype=torch.float16)
    assert all(tensor.dtype == torch.float16 for tensor in load_file(tmp_path / "model.safetensors").values())
    again = checkpoints.read(tmp_path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor.half().float())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which file an address is mapped from")
def test_weights_stay_in_the_file_until_they_are_used(folder: Path) -> None:
    """Nothing is copied on the way from disk into the model: every parameter lies in the mapped file."""
    model = checkpoints.read(folder).model
    path, mapped = os.fspath((folder / "model.safetensors").resolve()), []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, last = line.split(maxsplit=5)
        if last == path:
            mapped.append(range(*(int(end, 16) for end in addresses.split("-"))))
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in addresses for addresses in mapped), name


def test_a_read_model_can_be_written_again(folder: Path, tmp_path: Path) -> None:
    """Tensors that share storage, as parts of a fused one do, are written apart."""
    original = checkpoints.read(folder).model
    assert isinstance(original, ViT)
    state = checkpoints.rules.invert(original.state_dict(), timm.rules(original.config), original.config)
    config = {"architecture": "vit_x", "model_args": {"num_heads": 2}, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "timm").mkdir()
    save_file(state, tmp_path / "timm" / "model.safetensors")
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    fused = checkpoints.read(tmp_path / "timm")
    checkpoints.write(tmp_path / "again", fused.model, fused.preprocess, fused.labels)
    again = checkpoints.read(tmp_path / "again").model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in original.state_dict().items())


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"version": 2}, "version 2 of architecture 'vit'; .* A newer opsin wrote it"),
        ({"architecture": "resnet"}, "architecture 'resnet'"),
        ({"colour": "blue"}, "should have exactly the keys .*: colour"),
        ({"model": {"embed_dims": 3}}, "unknown model settings: embed_dims. Known: activation, class_token"),
        ({"model": {"patch_size": 3}}, r"patch_size \(3\) does not divide image_size \(224\)"),
        ({"model": {"num_heads": 0}}, "does not describe a ViT"),
        ({"model": {"embed_dim": "wide"}}, "does not describe a ViT"),
        ({"preprocess": {"sizes": 3}}, '"preprocess" or "labels"'),
        ({"labels": {"names": ["a"], "colours": []}}, '"preprocess" or "labels"'),
        ({"labels": {"names": ["a"], "wnids": None, "names_zh": None}}, "1 labels for 7 classes"),
    ],
)
def test_native_config_is_strict(changes: dict[str, Any], reason: str, folder: Path) -> None:
    change(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.read(folder)


def test_native_tensors_must_fit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.bias"]
    save_file(tensors | {"norm.bais": torch.ones(24)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(1\): norm.bias; unexpected \(1\): norm.bais"):
        checkpoints.read(folder)


def test_sha256_is_that_of_the_weights(folder: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoints.read(folder).source.sha256 == digest
    assert checkpoints.read(folder / "model.safetensors").source.sha256 == digest
    assert Source("x", None, "", "opsin", sha256="known").sha256 == "known"
    for name in ("1", "2"):
        (tmp_path / name).write_text(name)
    shards = Source("x", None, "", "opsin", (tmp_path / "1", tmp_path / "2"))
    listing = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in ("1", "2"))
    assert shards.sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_order_of_places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedded name, then a path that exists, then the hub."""
    asked: list[tuple[str, str | None]] = []
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir()
    folder.rename(snapshot)

    def download(repo_id: str, *, revision: str | None = None) -> Path:
        asked.append((repo_id, revision))
        return snapshot

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.chdir(tmp_path)
    source = checkpoints.read("owner/name", revision="main").source
    assert asked == [("owner/name", "main")]
    assert (source.name, source.revision, source.path) == ("owner/name", "0" * 40, str(snapshot))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(snapshot)
    assert checkpoints.read("owner/name").source.revision is None and len(asked) == 1


@pytest.mark.parametrize(
    "name", ["vit-base-p16-224", "google/vit/large", "./nothing", "owner/weights.pth", "x.npz", ""]
)
def test_unknown_names_do_not_reach_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UnknownModel, match=re.escape(f'no model "{name}": no such file or folder here')):
        checkpoints.read(name)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownModel, match='Did you mean .*"google/vit-base-patch16-224".*`opsin models` lists all'):
        checkpoints.read("vit-base-p16-224")
    with pytest.raises(UnknownModel, match="no such file or folder"):
        checkpoints.read(Path("nowhere"))


def test_other_model_types_are_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(CheckpointError, match="of type 'swin'. opsin reads vit, .*dinov2_with_registers, perceiver"):
        checkpoints.read(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
    with pytest.raises(CheckpointError, match="timm architecture 'resnet50'. opsin reads vit_"):
        checkpoints.read(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_x", "model_args": {"qk_norm": True}}))
    with pytest.raises(CheckpointError, match="does not know the model_args qk_norm"):
        checkpoints.read(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match='none of "format" .opsin., "architecture" .timm. and "model_type"'):
        checkpoints.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        checkpoints.read(folder)


def test_a_bare_file_of_ours_asks_for_its_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "lone.safetensors")
    with pytest.raises(CheckpointError, match="give the folder with config.json and the weights"):
        checkpoints.read(folder / "lone.safetensors")


HF_CONFIG = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'. opsin has gelu, gelu_pytorch_tanh"),
        ({"patch_size": [8, 16]}, "patches of 8×16; opsin's are square"),
        ({"hidden_size": "wide"}, "does not describe a ViT"),
        ({"num_attention_heads": 5}, "does not divide embed_dim"),
        ({"id2label": {"0": "a", "2": "c"}}, "id2label does not name the classes 0 to 1"),
        ({"image_size": None}, "does not describe a ViT"),
    ],
)
def test_transformers_configs_that_do_not_work(
    changes: dict[str, Any], reason: str, tmp_path: Path, noisy_checkpoint: Checkpoint
) -> None:
    checkpoints.write_hf(tmp_path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    if "id2label" in changes:
        tensors = load_file(tmp_path / "model.safetensors")
        save_file(
            tensors | {"classifier.weight": torch.ones(2, 24), "classifier.bias": torch.ones(2)},
            tmp_path / "model.safetensors",
        )
    change(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.read(tmp_path)


def test_transformers_labels_and_missing_preprocessing(
    tmp_path: Path, noisy_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints.write_hf(tmp_path, noisy_checkpoint.model, noisy_checkpoint.preprocess, noisy_checkpoint.labels)
    (tmp_path / "preprocessor_config.json").unlink()
    checkpoint = checkpoints.read(tmp_path)
    assert checkpoint.labels == noisy_checkpoint.labels
    assert checkpoint.preprocess == PreprocessConfig(size=(32, 32))
    assert "no preprocessor_config.json: taking what vit models use" in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"], config["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 7}))
    assert checkpoints.read(tmp_path).labels == Labels.numbered(7)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Strange"}')
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json: .*Strange"):
        checkpoints.read(tmp_path)


@pytest.mark.parametrize("model_type", hf.MODEL_TYPES)
def test_default_processors_read(model_type: str) -> None:
    preprocess = checkpoints.hf.processors.read_hf(hf.default_processor(model_type, (384, 384)))
    assert preprocess.image_size == ((224, 224) if "dino" in model_type else (384, 384))
    assert preprocess.mean == ((0.5, 0.5, 0.5) if model_type == "vit" else (0.485, 0.456, 0.406))


def test_writing_jax_preprocessing_for_transformers_is_refused(tmp_path: Path, noisy_checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="cannot resize without antialiasing"):
        checkpoints.write_hf(tmp_path, noisy_checkpoint.model, PreprocessConfig.jax_squash(32), None)
    assert not list(tmp_path.iterdir())


def test_other_resizing_of_positions_is_said(
    tmp_path: Path, noisy_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(noisy_checkpoint.model, ViT)
    model = ViT(dataclasses.replace(noisy_checkpoint.model.config, pos_resize="bilinear_corners"))
    checkpoints.write_hf(tmp_path, model, noisy_checkpoint.preprocess, None)
    assert "transformers will resize positions by bicubic, not bilinear_corners" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": ["gelu"]},
        {"architectures": [None]},
        {"id2label": "abc"},
        {"image_size": {"a": 1}},
        {"patch_size": None},
    ],
)
def test_a_config_of_other_types_is_a_checkpoint_error(changes: dict[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    with pytest.raises(CheckpointError):
        checkpoints.read(folder)
