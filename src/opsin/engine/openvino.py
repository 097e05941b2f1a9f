"""pixels → logits through OpenVINO (extra `openvino`): the whole network as one graph, int8 by NNCF's calibration.

    model ── trace ──▶ graph ── NNCF, images ──▶ int8 graph ── compile ──▶ OpenVINONet
                                                  └── kept in `cache`

Attention stays one operator, which OpenVINO fuses. Neither package is let send the usage data that it sends by default:
openvino_telemetry is out of reach while they are first imported. A program that has imported openvino by itself has
settled that for its process.
"""

import copy
import dataclasses
import hashlib
import importlib
import logging
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opsin.device import has_bf16
from opsin.engine.packed import Precision
from opsin.errors import MissingExtra
from opsin.models.position import resize_pos_embed
from opsin.models.vit import ViT

log = logging.getLogger(__name__)

_lock = threading.Lock()  # imports, tracing and NNCF change what belongs to the whole process


class OpenVINONet:
    """float32 pixels (B, 3, H, W), any B → logits (B, K); the features where the model has no head. Threads take turns.

    Args:
        compiled: openvino's CompiledModel, with outputs features and, if `has_head`, logits.
    """

    def __init__(self, compiled: Any, image_size: tuple[int, int], *, has_head: bool) -> None:
        self.image_size, self.has_head = image_size, has_head
        self._request, self._lock = compiled.create_infer_request(), threading.Lock()

    def __call__(self, pixels: Tensor) -> Tensor:
        return self._run(pixels, 1 if self.has_head else 0)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D)."""
        return self._run(pixels, 0)

    def _run(self, pixels: Tensor, output: int) -> Tensor:
        """
        Raises:
            ValueError: pixels of another shape or type.
        """
        _check(pixels, "pixels", self.image_size)
        array = pixels.detach().contiguous().numpy()
        with self._lock:  # OpenVINO computes one batch at a time as it is compiled here, and its outputs are reused
            self._request.infer({0: array}, share_inputs=True, share_outputs=True)
            return torch.from_numpy(self._request.get_output_tensor(output).data.copy())


def compile(
    model: nn.Module,
    precision: Precision,
    *,
    image_size: tuple[int, int],
    calibration: Sequence[Tensor] | None = None,
    cache: Path | None = None,
) -> OpenVINONet:
    """A model on the CPU through OpenVINO, on `torch.get_num_threads()` threads.

    Args:
        model: a plain ViT or ImagePerceiver, fp32, in evaluation mode. Its weights are shared: they must not change
            afterwards.
        precision: "fp32" is computed in fp32 and nothing else. "int8" computes what is not quantised in bf16 where the
            CPU has it, else in fp32.
        image_size: (H, W) pixels, the only size that the net takes.
        calibration: for int8, batches (B, 3, H, W) of preprocessed images like those to come, a hundred or so in all.
        cache: a folder where int8 graphs are kept. The same weights, images and versions are not calibrated again.
    Raises:
        MissingExtra: openvino, or for int8 nncf, is not installed.
        ValueError: bf16 on a CPU without it, int8 without images to calibrate with or with such of another shape, a
            model in training mode.
    """
    if precision not in ("fp32", "bf16", "int8"):
        raise ValueError(f'precision is "{precision}". Known: fp32, bf16, int8.')
    if precision == "bf16" and not has_bf16():
        raise ValueError('this CPU does not multiply bf16 (it lacks AVX512-BF16 and AMX): take "fp32" or "int8".')
    if model.training:
        raise ValueError("the model is in training mode. Call model.eval() first.")
    if precision == "int8":
        if not calibration or not sum(map(len, calibration)):
            raise ValueError("int8 needs images to calibrate with: calibration=[pixels (B, 3, H, W), …].")
        for batch in calibration:
            _check(batch, "a batch of calibration", image_size)
    with _lock:
        if calibration is None or precision != "int8":
            graph = _convert(model, image_size)
        else:
            graph = _quantised(model, image_size, calibration, cache)
    low = precision == "bf16" or (precision == "int8" and has_bf16())
    compiled = _core().compile_model(
        graph,
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if low else "f32",
            "ENABLE_CPU_PINNING": False,  # a pinned thread cannot make way for another process's
        },
    )
    return OpenVINONet(compiled, image_size, has_head=len(graph.outputs) == 2)


def _check(pixels: Tensor, name: str, image_size: tuple[int, int]) -> None:
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *image_size):
        height, width = image_size
        raise ValueError(f"{name} has shape {tuple(pixels.shape)}; it must be (B, 3, {height}, {width}).")
    if pixels.dtype != torch.float32:
        raise ValueError(f"{name} is {pixels.dtype}; it must be torch.float32.")


# ── graph ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Outputs(nn.Module):
    """pixels → (features, logits) in one pass; features alone of a model without a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        model = self.model
        tokens = self._encode(model.embed(pixels))
        features = model.pool(tokens)
        if not model.config.num_classes:
            return features
        logits = model.classify(features)
        if getattr(model, "head_dist", None) is not None:
            logits = (logits + model.head_dist(tokens[:, 1])) / 2
        return features, logits

    def _encode(self, tokens: Tensor) -> Tensor:
        """As `model.encode`; where only the class token is read, the last layer of a ViT computes no other."""
        model = self.model
        if not isinstance(model, ViT) or model.config.pool != "token":
            return model.encode(tokens)
        for layer in model.layers[:-1]:
            tokens = layer(tokens)
        last: Any = model.layers[-1]
        read = model.config.num_positioned  # the class token, and that of distillation
        y = last.norm1(tokens)
        x = last.attn(y[:, :read], y)
        x = tokens[:, :read] + (x if last.attn_scale is None else x * last.attn_scale)
        y = last.mlp(last.norm2(x))
        x = x + (y if last.mlp_scale is None else y * last.mlp_scale)
        return x if model.config.norm_after_pool else model.norm(x)


def _convert(model: nn.Module, image_size: tuple[int, int]) -> Any:
    """A model as openvino's Model: pixels (?, 3, H, W) → features and, where there is a head, logits."""
    openvino = _import("openvino")
    with warnings.catch_warnings(), torch.no_grad():
        # tracing is told to fix what depends on the image size; torch.export takes three times as long
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        # two rows: of a batch of one, operators could take their numbers from the example
        traced = torch.jit.trace(
            _Outputs(_resized(model, image_size)), torch.zeros(2, 3, *image_size), check_trace=False
        )
        return openvino.convert_model(traced, input=openvino.PartialShape([-1, 3, *image_size]))


def _resized(model: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    """A ViT, its weights shared, with positions for this image size: OpenVINO's antialiased bicubic differs by 4e-4."""
    if not isinstance(model, ViT) or model.config.image_size == image_size:
        return model
    config = dataclasses.replace(model.config, image_size=image_size)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    twin.config, old = config, model.config
    positions = resize_pos_embed(
        model.pos_embed, old.grid, config.grid, num_prefix=old.num_positioned, method=old.pos_resize
    )
    twin.pos_embed = nn.Parameter(positions, requires_grad=False)
    return twin


# ── int8 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _quantised(model: nn.Module, image_size: tuple[int, int], calibration: Sequence[Tensor], cache: Path | None) -> Any:
    """The int8 graph: of the cache, where it lies there undamaged."""
    _import("nncf")
    if cache is None:
        return _quantise(_convert(model, image_size), calibration)
    path = Path(cache) / f"{_key(model, image_size, calibration)}.openvino"
    graph = _read(path)
    if graph is None:
        graph = _quantise(_convert(model, image_size), calibration)
        _write(graph, path)
    return graph


def _quantise(graph: Any, calibration: Sequence[Tensor], leave: Sequence[str] = ()) -> Any:
    """NNCF's post-training quantisation, closer to fp32 than its defaults, at the same speed.

    The convolutions that read the pixels and what comes behind the features stay as they are, ranges are the smallest
    and largest value met, and SmoothQuant moves less into the weights: on the embedded model the logits' error falls
    by half. Images go one at a time: NNCF takes the statistics of a batch for those of one image.

    Args:
        leave: names of more modules of the model that stay as they are.
    """
    nncf = _import("nncf")
    images = [row[None].contiguous().numpy() for batch in calibration for row in batch]
    ignored = nncf.IgnoredScope(
        types=["Convolution"],
        patterns=[
            r"__module\.model\.(head|head_dist|pre_logits|decoder\.out)/.*",
            *(rf"__module\.model\.{re.escape(name)}/.*" for name in leave),
        ],
        validate=False,  # a model may have neither
    )
    advanced = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=importlib.import_module(
            "nncf.quantization.range_estimator"
        ).RangeEstimatorParametersSet.MINMAX,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=0.6),
    )
    with _silent():
        return nncf.quantize(
            graph,
            nncf.Dataset(images),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            ignored_scope=ignored,
            advanced_parameters=advanced,
        )


@contextmanager
def _silent() -> Iterator[None]:
    """NNCF without its progress bars, and its log lines where everybody's go instead of on stdout."""
    bars: Any = importlib.import_module("nncf.common.logging.track_progress")
    logger = logging.getLogger("nncf")
    progress, handlers, propagate, level = bars.Progress, logger.handlers, logger.propagate, logger.level
    bars.Progress = lambda *columns, **options: progress(*columns, **options | {"disable": True})
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        bars.Progress, logger.handlers, logger.propagate = progress, handlers, propagate
        logger.setLevel(level)


# ── cache ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _key(model: nn.Module, image_size: tuple[int, int], calibration: Sequence[Tensor]) -> str:
    """SHA-256 of all that an int8 graph comes from; how the images are divided into batches does not count."""
    versions = [f"{package} {version(package)}" for package in ("opsin", "torch", "openvino", "nncf")]
    config: Any = model.config
    digest = hashlib.sha256(repr((versions, type(model).__name__, config, image_size)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    for batch in calibration:
        digest.update(batch.contiguous().numpy().data)
    return digest.hexdigest()


def _write(graph: Any, path: Path) -> None:
    """SHA-256 of what follows, bytes of the description (8), description (XML), weights; moved into place complete."""
    with tempfile.TemporaryDirectory() as folder:
        xml, weights = Path(folder, "graph.xml"), Path(folder, "graph.bin")
        _import("openvino").serialize(graph, xml, weights)
        description = xml.read_bytes()
        content = len(description).to_bytes(8, "little") + description + weights.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> Any:
    """The graph in a file of `_write`; None where there is none, or a damaged one."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except FileNotFoundError:
        return None
    content = data[32:]
    if hashlib.sha256(content.data).digest() != data[:32].tobytes():
        log.warning("%s is damaged; it is made anew.", path)
        return None
    end = 8 + int.from_bytes(content[:8].tobytes(), "little")
    openvino = _import("openvino")
    weights = openvino.Tensor(content[end:].copy())  # aligned
    return _core().read_model(content[8:end].tobytes(), weights)


# ── packages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def _core() -> Any:
    """The one of this process, for as long as it lives.

    Each that compiles for the CPU gives the thread another stack for signals, and takes it away again when it goes:
    several that went in the order in which they came left the thread one that is no memory, and the next signal, be it
    that a child has ended, was a segmentation fault.
    """
    return _import("openvino").Core()


def _import(package: str) -> Any:
    """openvino or nncf, without the telemetry of either, and without NNCF's logger for everybody else."""
    if package in sys.modules and sys.modules[package] is not None:
        return sys.modules[package]
    telemetry, logger = "openvino_telemetry", logging.getLoggerClass()
    before = sys.modules.get(telemetry)
    sys.modules[telemetry] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtra(package, "openvino") from None
    finally:
        logging.setLoggerClass(logger)
        del sys.modules[telemetry]
        if before is not None:
            sys.modules[telemetry] = before
