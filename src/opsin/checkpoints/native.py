"""opsin's own form: model.safetensors under the model's own names, and a config.json that holds everything else."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsin.checkpoints import files, rules
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

FORMAT = "opsin"
VERSION = 1
KEYS = ("format", "version", "architecture", "model", "preprocess", "labels")


def claims(config: dict[str, Any]) -> bool:
    return config.get("format") == FORMAT


def read(folder: Path, config: dict[str, Any], weights: Path) -> tuple[ViT, PreprocessConfig, Labels | None]:
    """
    Raises:
        CheckpointError: an unknown version, architecture or key; tensors that do not fit.
    """
    path = folder / "config.json"
    if config.get("version") != VERSION or config.get("architecture") != "vit":
        raise CheckpointError(
            f"{path} is version {config.get('version')} of architecture {config.get('architecture')!r}; "
            f'this opsin reads version {VERSION} of "vit". A newer opsin wrote it: pip install -U opsin'
        )
    if set(config) != set(KEYS):
        odd = ", ".join(sorted(set(config) ^ set(KEYS)))
        raise CheckpointError(f"{path} should have exactly the keys {', '.join(KEYS)}; too many or missing: {odd}.")
    if not isinstance(config["model"], dict) or "path" in config["model"]:
        raise CheckpointError(f'{path}: "model" is not what opsin writes.')
    model_config = vit_config(path, **config["model"])
    try:
        preprocess = PreprocessConfig.from_spec(config["preprocess"])
        labels = None if config["labels"] is None else _labels(**config["labels"])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f'{path}: "preprocess" or "labels" is not what opsin writes: {error}') from error
    if labels is not None and len(labels) != model_config.num_classes:
        raise CheckpointError(f"{path} has {len(labels)} labels for {model_config.num_classes} classes.")
    tensors = files.read_tensors(weights)
    own_names = [rules.Rule(name, name) for name in tensors]
    return rules.load(tensors, own_names, model_config, str(folder)), preprocess, labels


def vit_config(path: Path, **fields: Any) -> ViTConfig:
    """`ViTConfig(**fields)`, with the file's name on what is wrong with it."""
    known = {field.name for field in dataclasses.fields(ViTConfig)}
    unknown = ", ".join(sorted(fields.keys() - known))
    if unknown:
        raise CheckpointError(f"{path} has unknown model settings: {unknown}. Known: {', '.join(sorted(known))}.")
    try:
        tuples = {name: tuple(fields[name]) for name in ("image_size", "stem") if fields.get(name) is not None}
        return ViTConfig(**fields | tuples)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} does not describe a Vision Transformer: {error}") from error


def _labels(names: list[str], wnids: list[str] | None = None, names_zh: list[str] | None = None) -> Labels:
    return Labels(tuple(names), tuple(wnids) if wnids else None, tuple(names_zh) if names_zh else None)


def write(
    folder: Path,
    model: nn.Module,
    preprocess: PreprocessConfig,
    labels: Labels | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model so that `opsin.load(folder)` gives it back: to the bit in fp32; fp16 takes half the room.

    Each file appears whole or not at all.
    """
    assert isinstance(model, ViT)
    folder = Path(folder)
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in model.state_dict().items()}
    files.write_tensors(folder / "model.safetensors", tensors)
    files.write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "architecture": "vit",
            "model": dataclasses.asdict(model.config),
            "preprocess": preprocess.spec(),
            "labels": None if labels is None else dataclasses.asdict(labels),
        },
    )
