"""A classifier → a file that takes photos: uint8 images of any size in, label probabilities out, without opsin.

    pixels.py    PreprocessConfig as a graph, whose bytes are Pillow's
    onnx.py      one .onnx file        archive.py  a torch.export archive (.pt2)
    openvino.py  .xml and .bin         check.py    the file beside opsin, on a hundred images and more

Resize, crop, normalisation and softmax are inside. Decoding is not: give upright RGB, EXIF orientation applied.
Nothing is written that was not run and compared.
"""

import difflib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin import __version__, checkpoints, engine
from opsin.checkpoints.catalog import CATALOG
from opsin.device import has_int8
from opsin.errors import ExportError, ImageError
from opsin.export.check import Comparison, Run, compare, photos, varied
from opsin.export.pixels import Pixels
from opsin.models.layers import TransformerLayer
from opsin.models.perceiver_io import ImagePerceiver
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource, decode

__all__ = ["DTYPES", "FORMATS", "SUFFIXES", "Comparison", "Exported", "Pixels", "export"]

DTYPES = {"onnx": ("fp32", "fp16", "int8"), "openvino": ("fp32", "fp16", "int8"), "torch": ("fp32", "fp16")}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
WRITERS = ("transformers", "timm", "npz", "pystate", "opsin")  # of checkpoints: weights alone
FORMATS = (*DTYPES, *WRITERS)

NUM_IMAGES = 100  # at least, that a file is checked on
MAX_IMAGES, MAX_CALIBRATION = 512, 128
TOLERANCE = 0.01  # share of images whose best label may differ
SAME = 1e-4  # of the largest logit: how far fp32's may be off, given the same pixels
ATTEMPTS = (0, 2, 4)  # halves of layers, the noisiest, that int8 leaves in fp32 besides, until it agrees


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written, and how it compares."""

    path: Path
    to: str
    dtype: str
    bytes: int  # of all its files
    left_out: tuple[str, ...]  # dense layers that int8 leaves in fp32, besides those that it always does
    comparison: Comparison | None  # None of a format that holds weights alone


def export(
    classifier: Classifier,
    path: str | os.PathLike[str],
    *,
    to: str,
    dtype: str = "fp32",
    images: Sequence[ImageSource] | None = None,
    tolerance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a classifier as a file of another runtime, run it on 100 images and more, and keep it if it agrees.

    Args:
        classifier: on the CPU; it computes what the file is compared with, in fp32, whatever its own dtype.
        path: .onnx, .xml (with a .bin beside it) or .pt2; for the other libraries a folder or what they call it.
        to: one of `FORMATS`.
        dtype: "int8" of onnx and openvino needs `images`.
        images: like those to come; up to 512 are compared, and for int8 one in four calibrates instead, up to 128.
            Parts of them fill up to 100. Without images, parts of three photos that come with opsin.
        tolerance: share of images whose best label may differ, 0.01 without it. fp32 must be within 1e-4 of the
            largest logit besides, given the same pixels.
        progress: called with (images done, images in all).
    Raises:
        ExportError: the format cannot hold the model, or the file does not agree: nothing is written then.
        CheckpointError: a format of weights cannot hold the model.
        MissingExtra: the format's package is not installed.
        ValueError: an unknown format or dtype, a suffix that is not the format's, int8 without images, images or a
            tolerance for a format of weights.
    """
    path = Path(path)
    check_arguments(classifier, path, to=to, dtype=dtype, calibrated=bool(images), tolerance=tolerance)
    model, preprocess = classifier.model, classifier.preprocess
    if to in WRITERS:
        written = checkpoints.write_as(to, path, model, preprocess, classifier.labels)
        return Exported(path=path, to=to, dtype="fp32", bytes=_bytes(written), left_out=(), comparison=None)

    pixels = Pixels(preprocess)
    shown, calibration = _divide(images or (), dtype == "int8")
    shown += varied(shown or photos(), max(0, NUM_IMAGES - len(shown)))
    batches = [preprocess.normalise_batch([preprocess.resize(image)]) for image in calibration]
    limit = TOLERANCE if tolerance is None else tolerance
    with tempfile.TemporaryDirectory(prefix=".opsin-export-", dir=path.parent) as folder:
        work = Path(folder, path.name)
        for leave in _attempts(model, batches, to, dtype):
            run = _write(work, classifier, pixels, to, dtype, batches, leave)
            found = compare(run, model, preprocess, shown, progress)
            if 1 - found.agreement <= limit:
                break
        _judge(found, to, dtype, limit)
        del run
        files = [file for file in Path(folder).iterdir() if file.is_file()]
        size = _bytes(files)
        for file in sorted(files, key=lambda file: file == work):  # the one that names the others last
            file.replace(path.parent / file.name)
    return Exported(path=path, to=to, dtype=dtype, bytes=size, left_out=leave, comparison=found)


def check_arguments(
    classifier: object, path: Path, *, to: str, dtype: str, calibrated: bool, tolerance: float | None
) -> None:
    """
    Raises:
        ExportError, ValueError: as `export`, of what can be told before any work.
    """
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, 1)
        hint = f'Did you mean "{near[0]}"? ' if near else ""
        raise ValueError(f'to is "{to}". {hint}Known: {", ".join(FORMATS)}.')
    if not isinstance(classifier, Classifier):
        raise ExportError(
            f"a {type(classifier).__name__} cannot be exported: classifiers and embedders of images can, which "
            "`opsin models` lists by task."
        )
    known = DTYPES.get(to, ("fp32",))
    if dtype not in known:
        raise ValueError(f'dtype is "{dtype}"; {to} has {", ".join(known)}.')
    if to in WRITERS and (calibrated or tolerance is not None):
        what = "images are" if calibrated else "tolerance is"
        raise ValueError(f"{what} of no use: {to} holds the weights as they are, so nothing is compared.")
    if to in DTYPES and not isinstance(classifier.model, ViT | ImagePerceiver):
        raise ExportError(
            f"a {type(classifier.model).__name__} cannot be written as a graph; a ViT and a Perceiver of images can. "
            "Its weights can be: opsin."
        )
    if to in SUFFIXES and path.suffix != SUFFIXES[to]:
        raise ValueError(f'"{path.name}" is no name for {to}; its files end in {SUFFIXES[to]}.')
    if not path.parent.is_dir():
        raise ValueError(f'the folder "{path.parent}" does not exist.')
    if dtype == "int8" and not calibrated:
        raise ValueError("int8 needs images like those to come, to take its ranges from: --images PHOTOS, or images=.")
    if tolerance is not None and not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance is {tolerance}; it is a share of the images, 0 to 1.")
    if classifier.device.type != "cpu":
        raise ValueError(f'the model is on {classifier.device}; load it with device="cpu" to export it.')


def _divide(images: Sequence[ImageSource], calibrated: bool) -> tuple[list[Image.Image], list[Image.Image]]:
    """(to compare on, to calibrate with): none is in both. Images that cannot be read are left out.

    Raises:
        ExportError: images were given, and none can be read.
    """
    calibration = images[: 4 * MAX_CALIBRATION : 4] if calibrated else ()
    others = [image for place, image in enumerate(images) if place % 4 or place // 4 >= len(calibration)]
    if len(others) > MAX_IMAGES:
        others = [others[place * len(others) // MAX_IMAGES] for place in range(MAX_IMAGES)]
    errors: list[str] = []

    def read(some: Sequence[ImageSource]) -> list[Image.Image]:
        found = []
        for image in some:
            try:
                found.append(decode(image))
            except ImageError as error:
                errors.append(str(error))
        return found

    shown, ranged = read(others), read(calibration)
    if (images and not shown and not ranged) or (calibrated and not ranged):
        raise ExportError(f"none of {len(images)} images can be read. The first: {errors[0]}")
    return shown, ranged


def _attempts(model: nn.Module, batches: list[torch.Tensor], to: str, dtype: str) -> Sequence[tuple[str, ...]]:
    """Which dense layers stay in fp32: those that opsin's own int8 leaves, then more.

    For ONNX Runtime it is only about transformer layers: other dense layers are few, and never in int8. NNCF's choice
    comes first for OpenVINO, then that of the others.
    """
    outside = () if to == "onnx" else tuple(sorted(_linear(model) - _dense(model)))
    first = [()] if to == "openvino" else []
    # the noise of int8 is measured by int8 products
    if dtype != "int8" or not has_int8() or not engine.can_pack():
        return first or [()]
    some = list(torch.cat(batches).split(32))
    ranges = engine.calibrate(model, some)
    parts = {"qkv": ("attn.q", "attn.k", "attn.v"), "out": ("attn.out",), "fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}
    noisy = [
        f"{layer}.{part}" for layer, sites in ranges.items() for site in parts.keys() - sites for part in parts[site]
    ]
    attempts: list[tuple[str, ...]] = [*first]
    for count in ATTEMPTS:
        halves = engine.noisiest(model, ranges, some[0])[:count] if count else []
        more = [f"{layer}.{part}" for layer, half in halves for site in half for part in parts[site]]
        attempts.append((*outside, *noisy, *more))
    return attempts


def _linear(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _dense(model: nn.Module) -> set[str]:
    """Names of the dense layers of transformer layers: layers.0.attn.q, layers.0.mlp.fc1, …"""
    layers = {name for name, module in model.named_modules() if isinstance(module, TransformerLayer)}
    return {name for name in _linear(model) if name.rpartition(".")[0].rpartition(".")[0] in layers}


def _write(
    path: Path,
    classifier: Classifier,
    pixels: Pixels,
    to: str,
    dtype: str,
    calibration: list[torch.Tensor],
    leave: tuple[str, ...],
) -> Run:
    """Write the file; what runs it."""
    from opsin.export import archive, onnx, openvino

    model: Any = classifier.model
    labels = classifier.labels
    scores = None if not model.config.num_classes else "sigmoid" if labels and labels.multi_label else "softmax"
    metadata = _metadata(classifier, dtype)
    if to == "onnx":
        onnx.write(path, model, pixels, dtype, scores, metadata, calibration, _dense(model) - set(leave))
        return onnx.read(path)
    if to == "openvino":
        openvino.write(path, model, pixels, dtype, scores, metadata, calibration, leave)
        return openvino.read(path)
    archive.write(path, model, pixels, dtype, scores, metadata)
    return archive.read(path, pixels)


def _metadata(classifier: Classifier, dtype: str) -> dict[str, str]:
    """What goes along in the file: names → text, lists and objects as JSON."""
    source, labels = classifier.source, classifier.labels
    facts = {
        "name": source.name,
        "sha256": source.sha256,
        "preprocess": json.dumps(classifier.preprocess.spec()),
        "preprocess_hash": classifier.preprocess.hash(),
        "dtype": dtype,
        "opsin_version": __version__,
    }
    if labels is not None:
        facts["labels"] = json.dumps(labels.names, ensure_ascii=False)
        if labels.wnids is not None:
            facts["wnids"] = json.dumps(labels.wnids)
    if source.name in CATALOG:
        facts["licence"] = CATALOG[source.name].licence
    return facts


def _judge(found: Comparison, to: str, dtype: str, limit: float) -> None:
    """
    Raises:
        ExportError: the file does not agree.
    """
    if dtype == "fp32" and not found.network_drift_relative <= SAME:
        raise ExportError(
            f"the {to} file does not compute what the model does: from the same pixels its outputs are off by "
            f"{found.network_drift_relative:.1e} of the largest, {SAME:.0e} is allowed. It was not kept."
        )
    if 1 - found.agreement > limit:
        what = "have the best label, or like features, of opsin's fp32"
        raise ExportError(
            f"of {found.images} images {found.agreement:.1%} {what} in the {to} file in {dtype}; {1 - limit:.1%} "
            f"is asked for. It was not kept. Take {'fp32' if dtype == 'fp16' else 'fp16'}, or allow more: --tolerance "
            f"{1 - found.agreement + 0.001:.3f}."
        )


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file())
