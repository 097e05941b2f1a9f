"""A model in a form that other programs read."""

import difflib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from opsin.checkpoints import files, haiku, hf, native, npz, timm
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.preprocess import PreprocessConfig

log = logging.getLogger(__name__)

Writer = Callable[[Path, nn.Module, PreprocessConfig | None, Labels | None], list[Path]]


def _write_own(
    folder: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None
) -> list[Path]:
    native.write(folder, model, preprocess, labels)
    return [folder / "model.safetensors", folder / "config.json"]


WRITERS: dict[str, Writer] = {
    "opsin": _write_own,
    "transformers": hf.write,
    "timm": timm.write,
    "npz": npz.write,
    "pystate": haiku.write,
}
SUFFIXES = {"npz": (".npz",), "pystate": files.HAIKU_SUFFIXES}  # of the formats that are a file; others are a folder


def write_as(
    format: str, path: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None
) -> list[Path]:
    """Write a model for another program; what was written before is replaced whole, file by file.

    Args:
        format: opsin | transformers | timm, each a folder; npz (vision_transformer, big_vision) | pystate (DeepMind's
            Perceiver IO), each a file. These two hold tensors and no labels, preprocessing or settings: where opsin
            would take others than this model's when it reads them, a warning says so.
        path: of the folder, or of a file that ends in .npz, or in .pystate or .pickle.
        model: on any device; written in fp32.
    Returns:
        The files written. `opsin.load(path)` has equal logits, and weights equal to the bit; a norm_eps below 1e-6
        becomes 1e-6 in timm and npz, which have no other, with a warning.
    Raises:
        CheckpointError: an unknown format, or a path that is not one for it; a model that the format cannot hold,
            with the formats that can.
    """
    path = Path(path)
    if format not in WRITERS:
        near = difflib.get_close_matches(format, WRITERS, 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise CheckpointError(f'no checkpoint format "{format}".{hint} Known: {", ".join(WRITERS)}.')
    suffixes = SUFFIXES.get(format, ())
    if suffixes and (path.suffix.lower() not in suffixes or path.is_dir()):
        raise CheckpointError(f"{path} should be a file that ends in {' or '.join(suffixes)}, as {format} is read.")
    if not suffixes and path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; {format} is written as a folder.")
    try:
        written = WRITERS[format](path, model, preprocess, labels)
    except CheckpointError as error:
        fitting = ", ".join(_holders(model, preprocess, labels))
        raise CheckpointError(f"{error} Formats that can hold this model: {fitting}.") from error
    config: Any = model.config
    if format in ("timm", "npz") and config.norm_eps < 1e-6:
        log.warning(
            "A reader of %s adds 1e-06 to the variances, as the releases do; this model adds %g, as transformers does. "
            "Outputs move by a millionth of their size.", path, config.norm_eps,
        )  # fmt: skip
    return written


def _holders(model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> list[str]:
    """Names of the formats in which the model can be written."""
    found = ["opsin"]
    for name, contents in (
        ("transformers", lambda: hf.contents(model, preprocess, labels)),
        ("timm", lambda: timm.contents(model, preprocess, labels)),
        ("npz", lambda: npz.contents(model)),
        ("pystate", lambda: haiku.contents(model)),
    ):
        try:
            contents()
        except CheckpointError:
            continue
        found.append(name)
    graph = preprocess is not None and isinstance(model, ViT | ImagePerceiver)
    return [*found, "onnx"] if graph else found


def write_hf(folder: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> None:
    """Write a folder that transformers loads.

    Raises:
        CheckpointError: it has no such model; the message says why, and names formats that do.
    """
    write_as("transformers", folder, model, preprocess, labels)


def write(folder: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> str:
    """Write a folder that transformers loads too, where it has such a model; else one in opsin's own form.

    Returns:
        Which, as `Source.format` has it.
    """
    try:
        hf.write(folder, model, preprocess, labels)
    except CheckpointError:
        native.write(folder, model, preprocess, labels)
        (folder / hf.PROCESSOR).unlink(missing_ok=True)  # of an older model in the same folder
        return native.FORMAT
    return hf.FORMAT
