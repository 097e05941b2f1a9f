"""How fast a classifier runs on this machine, beside other libraries with the same weights, and what speed costs.

    name → contenders → interleaved rounds → Report

Contenders see whole batches of float32 pixels and give logits. One turn each, A B C A B C, in one process, so that what
slows the machine down slows all of them; the medians are compared. In the same rounds the largest matrix product of a
ViT-L/16 is timed in each precision: the peak that an engine's rate is a share of.
"""

import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opsin import __version__, checkpoints, engine
from opsin.checkpoints import native, rules
from opsin.checkpoints import timm as timm_names
from opsin.device import has_bf16, has_int8
from opsin.errors import CheckpointError, DataError, ImageError, MissingExtra, ModelError, NoHead
from opsin.models.vit import ViT
from opsin.models.vt import VT
from opsin.pipeline import Classifier, load
from opsin.preprocess import ImageSource, decode

Net = Callable[[Tensor], Tensor]  # float32 pixels (B, 3, H, W) → logits (B, K) of any float type

MAX_CALIBRATION = 128  # images, none of those
TURN_SECONDS = 0.05  # at least: a shorter batch is run several times in a turn
PRODUCT = (1576, 1024, 4096)  # rows, in, out: fc1 of ViT-L/16 for eight images of 197 tokens
SAME = 1e-3  # of the logits' deviation: an fp32 contender that drifts further computes something else
PLAIN = "opsin plain"  # the model as it is; the reference of agreement
BASELINE = "transformers"  # of the ratios, in fp32, where it takes part; else the plain model


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured of a contender. Quartiles are (first, third)."""

    name: str
    precision: str
    images_per_s: float  # median
    images_per_s_quartiles: tuple[float, float]
    ratio: float  # its speed over the baseline's in the same round, median
    ratio_quartiles: tuple[float, float]
    peak_share: float | None  # of the matrix product's rate; what it computes in vain does not count; None: no peak
    agreement: float | None  # share of the images with the plain model's best label; None: no images
    drift: float  # largest difference of a logit from the plain model's
    drift_relative: float  # the same over the standard deviation of the plain model's logits
    memory_bytes: int | None  # peak of a process of its own; None: not asked for, or it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `bench` measured: the contenders in the order in which they ran."""

    model: str
    batch_size: int
    rounds: int
    image_size: tuple[int, int]  # (H, W)
    images: int  # that agreement was measured on; 0: pixels are noise, and only drift was
    calibration_images: int  # that int8 took its ranges from
    gflops: float  # that an image's logits depend on: dense layers, attention, convolutions; an addition counts
    peaks: dict[str, float]  # precision → GFLOP/s of the matrix product
    baseline: str
    contenders: tuple[Result, ...]
    skipped: tuple[dict[str, str], ...]  # name, precision, reason
    unreadable: tuple[str, ...]  # messages of images that were left out
    notes: tuple[str, ...]
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return json.loads(json.dumps(asdict(self)))


def bench(
    name: str | os.PathLike[str],
    *,
    versus: Sequence[str] = (),
    batch_size: int = 8,
    rounds: int = 10,
    images: Sequence[ImageSource] = (),
    max_images: int = 512,
    memory: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Time a classifier of images on the CPU, plain and in each precision of opsin's engine, and in other libraries.

    Threads are torch's (`torch.set_num_threads`).

    Args:
        name: of the model, as `load` takes it.
        versus: of "transformers", "timm", "openvino", "onnxruntime": what runs the same weights.
        batch_size: images at once.
        rounds: turns of each contender.
        images: what is timed, and what agreement is measured on. One in four, at most 128, calibrates int8 and takes no
            part in agreement, which is measured on the others. Without images the pixels are noise: no agreement, no
            int8.
        max_images: that agreement is measured on, taken evenly.
        memory: also the peak of each contender alone: a fresh process that loads or converts it and runs two batches.
        progress: called with (steps done, steps in all).
    Raises:
        ModelError, NoHead: not to be loaded, or no classifier of images.
        MissingExtra: a library of `versus` is not installed; before any work.
        DataError: images were given, and none can be read.
        ValueError: an unknown library, fewer than one image or round.
    """
    check_libraries(versus, calibrated=bool(images))
    for what, value in (("batch_size", batch_size), ("rounds", rounds), ("max_images", max_images)):
        if value < 1:
            raise ValueError(f"{what} is {value}; it must be at least 1.")
    classifier = load(name, dtype="fp32", device="cpu")
    if not isinstance(classifier, Classifier):
        raise ModelError(f"{name} is no classifier of images; bench measures those.")
    if classifier.labels is None:
        raise NoHead(f"{classifier.source.name} has no classification head: there are no labels to agree on.")

    held_out, calibration = _divide(images, max_images)
    shown, errors = _read(classifier, held_out)
    ranged, more_errors = _read(classifier, calibration)
    if images and not shown and not ranged:
        raise DataError(f"none of {len(images)} images can be read. The first: {(errors + more_errors)[0]}")
    size = classifier.image_size
    batches = _batches(classifier, shown or _noise(batch_size, size), batch_size)

    wanted = [(PLAIN, "fp32"), *(("opsin", precision) for precision in LIBRARIES["opsin"].precisions)]
    wanted += [(library, precision) for library in versus for precision in LIBRARIES[library].precisions]
    steps = len(wanted) * (2 + rounds + memory)
    done = 0

    def step(skipped_steps: int = 0) -> None:
        nonlocal done
        done += 1 + skipped_steps
        if progress is not None:
            progress(done, steps)

    with tempfile.TemporaryDirectory(prefix="opsin-bench-") as folder, torch.inference_mode():
        work = _Work(name=os.fspath(name), folder=Path(folder), batch_size=batch_size, image_size=size)
        work.model = classifier.model
        if ranged:
            torch.save(_batches(classifier, ranged, batch_size), work.calibration_file)
        nets, skipped = {}, []
        for key in wanted:
            made = _make(work, *key)
            if isinstance(made, str):
                skipped.append({"name": key[0], "precision": key[1], "reason": made})
                step(1 + rounds + memory)
            else:
                nets[key] = made
                step()
        compared = compare(nets, (PLAIN, "fp32"), batches, len(shown) or batch_size, step)
        precisions = dict.fromkeys(precision for _, precision in nets)
        products = {precision: product for precision in precisions if (product := _product(precision))}
        calls: dict[tuple[str, str], Callable[[], object]] = {
            key: partial(net, batches[0]) for key, net in nets.items()
        }
        calls |= {("product", precision): product for precision, product in products.items()}
        seconds = interleaved(calls, rounds, on_turn=lambda key: step() if key in nets else None)
        peaks_of = {key: _peak_memory(work, *key, step) for key in nets} if memory else dict.fromkeys(nets)

    flops = flops_of(classifier.model, size)
    peak = {
        precision: 2 * math.prod(PRODUCT) / statistics.median(seconds["product", precision]) for precision in products
    }
    baseline = (BASELINE, "fp32") if (BASELINE, "fp32") in nets else (PLAIN, "fp32")
    results = [
        _result(key, seconds, baseline, batch_size, flops, peak, compared[key], bool(shown), peaks_of[key])
        for key in nets
    ]
    return Report(
        model=classifier.source.name,
        batch_size=batch_size,
        rounds=rounds,
        image_size=size,
        images=len(shown),
        calibration_images=len(ranged),
        gflops=flops / 1e9,
        peaks={precision: rate / 1e9 for precision, rate in peak.items()},
        baseline=" ".join(baseline),
        contenders=tuple(results),
        skipped=tuple(skipped),
        unreadable=tuple(errors + more_errors),
        notes=tuple(_notes(results, memory)),
        machine=machine(versus),
    )


def _result(
    key: tuple[str, str],
    seconds: Mapping[tuple[str, str], list[float]],
    baseline: tuple[str, str],
    batch_size: int,
    flops: float,
    peak: Mapping[str, float],
    compared: "Compared",
    labelled: bool,
    memory_bytes: int | None,
) -> Result:
    rates = [batch_size / turn for turn in seconds[key]]
    ratios = [theirs / ours for ours, theirs in zip(seconds[key], seconds[baseline], strict=True)]
    rate = statistics.median(rates)
    return Result(
        name=key[0],
        precision=key[1],
        images_per_s=rate,
        images_per_s_quartiles=_quartiles(rates),
        ratio=statistics.median(ratios),
        ratio_quartiles=_quartiles(ratios),
        peak_share=rate * flops / peak[key[1]] if key[1] in peak else None,
        agreement=compared.agreement if labelled else None,
        drift=compared.drift,
        drift_relative=compared.drift_relative,
        memory_bytes=memory_bytes,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    first, third = np.quantile(values, [0.25, 0.75])
    return float(first), float(third)


def _notes(results: Iterable[Result], memory: bool) -> Iterable[str]:
    for result in results:
        if result.precision == "fp32" and result.drift_relative > SAME:
            yield (
                f"{result.name} fp32 does not compute the same: logits differ by up to {result.drift:.3g}, "
                f"{result.drift_relative:.1%} of their deviation."
            )
        if memory and result.memory_bytes is None:
            yield f"{result.name} {result.precision} failed in a process of its own: its memory is not known."


def machine(libraries: Sequence[str] = ()) -> dict[str, Any]:
    """What a figure has to be read with: CPU, threads, versions, date and command."""
    versions = {}
    for package in dict.fromkeys(("torch", *(package for name in libraries for package in LIBRARIES[name].packages))):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "opsin": __version__,
        "versions": versions,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _divide(images: Sequence[ImageSource], max_images: int) -> tuple[list[ImageSource], list[ImageSource]]:
    """(to measure agreement on, to calibrate with): none is in both."""
    calibration = images[::4]
    held_out = [image for place, image in enumerate(images) if place % 4]
    return _evenly(held_out, max_images), _evenly(calibration, MAX_CALIBRATION)


def _evenly(items: Sequence[Any], limit: int) -> list[Any]:
    if len(items) <= limit:
        return list(items)
    return [items[place * len(items) // limit] for place in range(limit)]


def _read(classifier: Classifier, images: Iterable[ImageSource]) -> tuple[list[np.ndarray], list[str]]:
    """Resized images (H, W, 3), and the messages of those that cannot be read."""
    resized, errors = [], []
    for image in images:
        try:
            resized.append(classifier.preprocess.resize(decode(image)))
        except ImageError as error:
            errors.append(str(error))
    return resized, errors


def _noise(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def _batches(classifier: Classifier, resized: Sequence[np.ndarray], batch_size: int) -> list[Tensor]:
    """Whole batches of pixels, for networks that are compiled for one size; the last begins again at the first."""
    count = math.ceil(len(resized) / batch_size) * batch_size
    pixels = [classifier.preprocess.normalise(resized[place % len(resized)]) for place in range(count)]
    return [torch.stack(pixels[start : start + batch_size]) for start in range(0, count, batch_size)]


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def interleaved(
    calls: Mapping[Any, Callable[[], object]],
    rounds: int,
    *,
    on_turn: Callable[[Any], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds of a call, for each of `calls` and each round: A B C A B C, after a warm-up of two calls each.

    A turn takes at least `TURN_SECONDS`: what is faster is called several times, and the mean taken.
    """
    repeats = {}
    for key, call in calls.items():
        call()
        start = clock()
        call()
        repeats[key] = max(1, math.ceil(TURN_SECONDS / max(clock() - start, 1e-6)))
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start = clock()
            for _ in range(repeats[key]):
                call()
            seconds[key].append((clock() - start) / repeats[key])
            if on_turn is not None:
                on_turn(key)
    return seconds


class Compared(NamedTuple):
    agreement: float  # share with the reference's best label
    drift: float  # largest difference of a logit
    drift_relative: float  # the same over the standard deviation of the reference's logits


def compare(
    nets: Mapping[Any, Net],
    reference: Any,
    batches: Sequence[Tensor],
    count: int,
    on_net: Callable[[], None] | None = None,
) -> dict[Any, Compared]:
    """Each net beside the net `reference`, on the first `count` images of the batches."""
    logits = {}
    for key, net in nets.items():
        logits[key] = torch.cat([net(pixels).float() for pixels in batches])[:count]
        if on_net is not None:
            on_net()
    right = logits[reference]
    deviation = max(right.std().item(), 1e-12)
    compared = {}
    for key, values in logits.items():
        drift = (values - right).abs().max().item()
        agreement = (values.argmax(dim=1) == right.argmax(dim=1)).double().mean().item()
        compared[key] = Compared(agreement, drift, drift / deviation)
    return compared


def flops_of(model: nn.Module, size: tuple[int, int]) -> float:
    """Of one image, what its logits depend on; a multiplication and an addition are two."""
    total = _count(lambda: model(torch.zeros(1, 3, *size)))
    if isinstance(model, ViT) and model.config.pool == "token":  # of the last layer's tokens no other is read
        layer: Any = model.layers[-1]
        read = model.config.num_positioned
        tokens = torch.zeros_like(model.embed(torch.zeros(1, 3, *size)))
        total -= _count(lambda: layer(tokens))
        total += _count(lambda: (layer.attn(tokens[:, :read], tokens), layer.mlp(tokens[:, :read])))
    return total


def _count(call: Callable[[], object]) -> float:
    # the fused attention of CPUs is not counted, its parts are; without gradients the counter fails on a Perceiver
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _product(precision: str) -> Callable[[], object] | None:
    """The matrix product that is the peak, by the library that the engine uses; None where it has none."""
    rows, inputs, outputs = PRODUCT
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.zeros(outputs)
    if precision == "int8":
        if not has_int8():  # elsewhere the operator takes minutes; so it does with signed activations, everywhere
            return None
        codes = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
        weight = torch.ops.onednn.qlinear_prepack(weight.mul(40).clamp(-127, 127).to(torch.int8), [rows, inputs])
        scale, zeros = torch.full((outputs,), 0.01), torch.zeros(outputs, dtype=torch.int32)
        out: tuple[Any, ...] = (1.0, 0, torch.bfloat16, "none", [], "")
        return partial(torch.ops.onednn.qlinear_pointwise, codes, 0.02, 128, weight, scale, zeros, bias, *out)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    if not engine.can_pack():
        return partial(F.linear, x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, engine.packed.ROWS)
    return partial(torch.ops.mkldnn._linear_pointwise, x, packed, bias, "none", [], "")


# ── contenders ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class _Work:
    """What contenders are made of. What is exported lies in `folder`, where a process of its own finds it again."""

    name: str
    folder: Path
    batch_size: int
    image_size: tuple[int, int]

    @property
    def calibration_file(self) -> Path:
        return self.folder / "calibration.pt"

    @cached_property
    def model(self) -> nn.Module:
        return load(self.name, dtype="fp32", device="cpu").model

    @cached_property
    def calibration(self) -> list[Tensor]:
        return torch.load(self.calibration_file, weights_only=True)

    @cached_property
    def ranges(self) -> engine.Ranges:
        ranges = native.read_ranges(self.folder, self.model)
        if ranges is None:
            ranges = engine.calibrate(self.model, torch.cat(self.calibration).split(32))
            native.write_ranges(self.folder, ranges)
        return ranges


def _opsin(work: _Work, precision: str) -> Net:
    ranges = work.ranges if precision == "int8" else None
    return engine.pack(work.model, precision, ranges)  # type: ignore[arg-type]  # one of LIBRARIES


def _transformers(work: _Work, precision: str) -> Net:
    folder = work.folder / "transformers"
    if not folder.exists():  # without preprocessing, which it may not have: the model alone is timed
        checkpoints.write_hf(folder, work.model, None, None)
    transformers = import_library("transformers")
    transformers.utils.logging.disable_progress_bar()
    dtype = _DTYPES[precision]
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=dtype).eval()
    return lambda pixels: model(pixel_values=pixels.to(dtype)).logits


def _timm(work: _Work, precision: str) -> Net:
    model: Any = work.model
    config = model.config
    if not isinstance(model, ViT):
        raise CheckpointError("it has no Perceiver")
    obstacles = {
        "a ResNet stem": config.stem is not None,
        "a gated MLP": config.gated_mlp,
        "a distillation token": config.distillation_token,
        "registers": config.num_registers,
        "a pre-logits layer": config.pre_logits,
        f"pooling {config.pool!r}": config.pool not in timm_names.POOLS.values(),
    }
    if any(obstacles.values()):
        reasons = ", ".join(reason for reason, present in obstacles.items() if present)
        raise CheckpointError(f"bench builds no timm model with {reasons}")
    import_library("timm")
    theirs = import_module("timm.models.vision_transformer").VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=config.num_classes,
        global_pool=next(name for name, pool in timm_names.POOLS.items() if pool == config.pool),
        embed_dim=config.embed_dim,
        depth=config.num_layers,
        num_heads=config.num_heads,
        mlp_ratio=(config.mlp_dim + 0.5) / config.embed_dim,  # which timm multiplies by the width and rounds down
        qkv_bias=config.qkv_bias,
        init_values=1.0 if config.layer_scale else None,
        class_token=config.class_token,
        fc_norm=config.norm_after_pool,
        norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
        act_layer=config.activation,
    )
    theirs.load_state_dict(rules.invert(model.state_dict(), timm_names.rules(config), config))
    dtype = _DTYPES[precision]
    theirs = theirs.to(dtype).eval()
    return lambda pixels: theirs(pixels.to(dtype))


def _openvino(work: _Work, precision: str) -> Net:
    calibration = work.calibration if precision == "int8" else None
    return import_module("opsin.engine.openvino").compile(
        work.model, precision, image_size=work.image_size, calibration=calibration, cache=work.folder / "openvino"
    )


def _onnxruntime(work: _Work, precision: str) -> Net:
    onnxruntime = import_module("onnxruntime")
    path = work.folder / "model.onnx"
    if not path.exists():
        _export_onnx(work, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads take the next one's time
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])


def _export_onnx(work: _Work, path: Path) -> None:
    with warnings.catch_warnings():  # that this exporter is the old one, and that a trace has fixed sizes, as meant
        warnings.simplefilter("ignore")
        pixels = torch.zeros(work.batch_size, 3, *work.image_size)
        torch.onnx.export(work.model, (pixels,), path, input_names=["pixels"], dynamo=False)


def import_library(package: str) -> Any:
    """transformers or timm, also beside a torchvision that was built for another torch, and so cannot be imported.

    Both import it, neither calls its operators here: that they are declared is enough.
    """
    try:
        import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    return import_module(package)


_KEPT: list[Any] = []  # operators are declared for as long as their library is there
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Library(NamedTuple):
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    open: Callable[[_Work, str], Net]


LIBRARIES = {
    "opsin": Library(("fp32", "bf16", "int8"), (), _opsin),
    "transformers": Library(("fp32", "bf16"), ("transformers",), _transformers),
    "timm": Library(("fp32", "bf16"), ("timm",), _timm),
    "openvino": Library(("fp32", "bf16", "int8"), ("openvino", "nncf"), _openvino),
    "onnxruntime": Library(("fp32",), ("onnxruntime", "onnx"), _onnxruntime),
}
VERSUS = tuple(name for name in LIBRARIES if name != "opsin")


def check_libraries(names: Sequence[str], *, calibrated: bool) -> None:
    """
    Args:
        calibrated: whether int8 is wanted, for which OpenVINO needs NNCF.
    Raises:
        ValueError: an unknown library, or one twice.
        MissingExtra: one that is not installed.
    """
    for name in names:
        if name not in VERSUS:
            raise ValueError(f'versus has "{name}". Known: {", ".join(VERSUS)}.')
        if names.count(name) > 1:
            raise ValueError(f'versus has "{name}" more than once.')
        for package in LIBRARIES[name].packages:
            if find_spec(package) is None and (package != "nncf" or calibrated):
                raise MissingExtra(package, "bench")


def _make(work: _Work, name: str, precision: str) -> Net | str:
    """The contender, or why there is none."""
    if precision == "bf16" and not has_bf16():
        return "this CPU does not multiply bf16 by itself"
    if precision == "int8" and not has_int8():
        return "this CPU does not multiply int8 (it lacks AVX512-VNNI)"
    if precision == "int8" and not work.calibration_file.exists():
        return "int8 needs images to take its ranges from"
    if precision == "int8" and name == "opsin" and isinstance(work.model, VT):
        return "a VT has no transformer layers to run in int8"
    if name == PLAIN:
        return work.model
    if name == "opsin":
        return _opsin(work, precision) if engine.can_pack() else "this torch has no oneDNN"
    try:
        net = LIBRARIES[name].open(work, precision)
        net(torch.zeros(work.batch_size, 3, *work.image_size))
    except Exception as error:  # of another library: whatever it is, the others go on
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return net


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _peak_memory(work: _Work, name: str, precision: str, on_end: Callable[[], None]) -> int | None:
    """Peak of resident memory, bytes, of a fresh process that makes the contender and runs two batches.

    Exports and int8's calibration are done already. That opsin and OpenVINO lay out or compile the plain model is part
    of it, and for OpenVINO's int8 so are the images that it was calibrated with.
    """
    task = {
        "name": work.name, "folder": str(work.folder), "batch_size": work.batch_size, "image_size": work.image_size,
        "contender": [name, precision], "threads": torch.get_num_threads(),
    }  # fmt: skip
    code = "from opsin.bench import _child; _child()"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(task)], capture_output=True, text=True)
    on_end()
    return int(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _child() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task.pop("threads"))
    contender, folder = task.pop("contender"), Path(task.pop("folder"))
    work = _Work(folder=folder, **task | {"image_size": tuple(task["image_size"])})
    with torch.inference_mode():
        net = _make(work, *contender)
        assert not isinstance(net, str), net
        for _ in range(2):
            net(torch.zeros(work.batch_size, 3, *work.image_size))
    sys.stdout.write(f"\n{_high_water()}\n")


def _high_water() -> int:
    # `ru_maxrss` of a child begins at its parent's peak, on Linux
    path = Path("/proc/self/status")
    if path.is_file():
        line = next(line for line in path.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
