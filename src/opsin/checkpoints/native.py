"""opsin's own form: model.safetensors under the model's own names, and a config.json that holds everything else."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from opsin.checkpoints import files, rules
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

C = TypeVar("C")

FORMAT = "opsin"
VERSION = 1
ARCHITECTURES: dict[str, type] = {
    "vit": ViTConfig,
    "vt": VTConfig,
    "perceiver": ImagePerceiverConfig,
    "perceiver-text": TextPerceiverConfig,
    "perceiver-flow": FlowPerceiverConfig,
    "perceiver-multimodal": MultimodalPerceiverConfig,
}
RANGES = "int8.safetensors"
INPUTS = {"qkv": "attn.q", "out": "attn.out", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # site → the layer whose input it is
KEYS = ("format", "version", "architecture", "model", "preprocess", "labels")


def claims(config: dict[str, Any]) -> bool:
    return config.get("format") == FORMAT


def read(
    folder: Path, config: dict[str, Any], weights: Path
) -> tuple[nn.Module, PreprocessConfig | None, Labels | None]:
    """
    Raises:
        CheckpointError: an unknown version, architecture or key; tensors that do not fit.
    """
    path = folder / "config.json"
    if config.get("version") != VERSION or config.get("architecture") not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} is version {config.get('version')} of architecture {config.get('architecture')!r}; "
            f"this opsin reads version {VERSION} of {', '.join(ARCHITECTURES)}. "
            "A newer opsin wrote it: pip install -U opsin"
        )
    if set(config) != set(KEYS):
        odd = ", ".join(sorted(set(config) ^ set(KEYS)))
        raise CheckpointError(f"{path} should have exactly the keys {', '.join(KEYS)}; too many or missing: {odd}.")
    if not isinstance(config["model"], dict) or "path" in config["model"]:
        raise CheckpointError(f'{path}: "model" is not what opsin writes.')
    model_config: Any = model_config_of(ARCHITECTURES[config["architecture"]], path, **config["model"])
    try:
        spec = config["preprocess"]
        preprocess = None if spec is None else PreprocessConfig.from_spec(spec)
        labels = None if config["labels"] is None else _labels(**config["labels"])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f'{path}: "preprocess" or "labels" is not what opsin writes: {error}') from error
    num_classes = getattr(model_config, "num_classes", 0)
    if labels is not None and len(labels) != num_classes:
        raise CheckpointError(f"{path} has {len(labels)} labels for {num_classes} classes.")
    tensors = files.read_tensors(weights)
    own_names = [rules.Rule(name, name) for name in tensors]
    return rules.load(tensors, own_names, model_config, str(folder)), preprocess, labels


def read_ranges(folder: Path, model: nn.Module) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] | None:
    """What `write_ranges` wrote beside the weights: layer → dense layer → range of its input's channels; None: nothing.

    Raises:
        CheckpointError: of layers that the model does not have, of another width, or not finite.
    """
    path = folder / RANGES
    if not path.is_file():
        return None
    ranges: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, tensor in files.read_tensors(path).items():
        layer, _, rest = name.partition(":")
        site, _, side = rest.partition(".")
        if site not in INPUTS or side not in ("low", "high"):
            raise CheckpointError(f"{path}: {name} is not the range of a dense layer.")
        ranges.setdefault(layer, {}).setdefault(site, {})[side] = tensor.float()
    for layer, sites in ranges.items():
        for site, sides in sites.items():
            try:
                width = model.get_submodule(f"{layer}.{INPUTS[site]}").in_features
            except AttributeError:
                raise CheckpointError(f"{path}: the model has no layer {layer}.") from None
            whole = set(sides) == {"low", "high"} and all(tuple(side.shape) == (width,) for side in sides.values())
            if not whole or not all(side.isfinite().all() for side in sides.values()):
                raise CheckpointError(f"{path}: {layer}:{site} needs a low and a high of {width} finite numbers each.")
    return {
        layer: {site: (sides["low"], sides["high"]) for site, sides in sites.items()} for layer, sites in ranges.items()
    }


def write_ranges(folder: Path, ranges: Mapping[str, Mapping[str, tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Write what int8 needs beside the weights."""
    files.write_tensors(
        folder / RANGES,
        {
            f"{layer}:{site}.{side}": values
            for layer, sites in ranges.items()
            for site, pair in sites.items()
            for side, values in zip(("low", "high"), pair, strict=True)
        },
    )


def model_config_of(kind: type[C], path: Path, **fields: Any) -> C:
    """`kind(**fields)`, a config of `ARCHITECTURES`, with the file's name on what is wrong with it."""
    assert dataclasses.is_dataclass(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = ", ".join(sorted(fields.keys() - known))
    if unknown:
        raise CheckpointError(f"{path} has unknown model settings: {unknown}. Known: {', '.join(sorted(known))}.")
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} does not describe a {kind.__name__.removesuffix('Config')}: {error}") from error


def _labels(
    names: list[str], wnids: list[str] | None = None, names_zh: list[str] | None = None, multi_label: bool = False
) -> Labels:
    return Labels(tuple(names), tuple(wnids) if wnids else None, tuple(names_zh) if names_zh else None, multi_label)


def write(
    folder: Path,
    model: nn.Module,
    preprocess: PreprocessConfig | None,
    labels: Labels | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model so that `opsin.load(folder)` gives it back: to the bit in fp32; fp16 takes half the room.

    Each file appears whole or not at all.
    """
    config: Any = model.config
    architecture = next(name for name, kind in ARCHITECTURES.items() if type(config) is kind)
    folder = Path(folder)
    tensors = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else None)
        for name, tensor in model.state_dict().items()
    }
    files.write_tensors(folder / "model.safetensors", tensors)
    files.write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "version": VERSION,
            "architecture": architecture,
            "model": dataclasses.asdict(config),
            "preprocess": None if preprocess is None else preprocess.spec(),
            "labels": None if labels is None else dataclasses.asdict(labels),
        },
    )
