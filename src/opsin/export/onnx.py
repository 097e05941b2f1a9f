"""A model → one ONNX file: images → preprocessing → network → scores. int8 by ONNX Runtime's static quantisation."""

import logging
import warnings
from collections.abc import Callable, Sequence, Set
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opsin.device import has_int8
from opsin.errors import MissingExtra
from opsin.export.archive import DYNAMIC, Network
from opsin.export.pixels import Pixels

OPSET = 20  # the first with Gelu
IR_VERSION = 10  # the oldest that has it: more runtimes read it
ONE_FILE = 2**31 - 2**24  # bytes that a protobuf may have, less the description's


def write(
    path: Path,
    model: nn.Module,
    pixels: Pixels,
    dtype: str,
    scores: str | None,
    metadata: dict[str, str],
    calibration: Sequence[Tensor] = (),
    dense: Set[str] = frozenset(),
) -> None:
    """
    Args:
        path: with weights above 2 GB they lie beside it, in a file of this name and ".data".
        scores: "softmax" or "sigmoid"; None of a model without a head.
        calibration: for int8, batches of pixels (B, 3, h, w).
        dense: for int8, names of the dense layers that it is for.
    Raises:
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    onnx = _import("onnx")
    height, width = pixels.image_size
    output = "features" if scores is None else "logits"
    example = torch.zeros(2, height + 5, width + 11, 3, dtype=torch.uint8)
    front = _graph(pixels, example, (0, 1, 2), "images", "pixels")
    network = _graph(Network(model, pixels.image_size), torch.zeros(2, 3, height, width), (0,), "pixels", output)
    if dtype == "fp16":
        half = _import("onnxruntime.transformers.float16")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers below fp16's smallest become it, or zero
            network = half.convert_float_to_float16(network, keep_io_types=True, disable_shape_infer=True)
    elif dtype == "int8":
        network = _quantised(network, path.parent, calibration, dense)

    merged = onnx.ModelProto(ir_version=IR_VERSION, producer_name="opsin", producer_version=metadata["opsin_version"])
    domains: dict[str, int] = {}
    for part in (front, network):
        for opset in part.opset_import:
            domains[opset.domain] = max(domains.get(opset.domain, 0), opset.version)
    for domain, number in domains.items():
        merged.opset_import.add(domain=domain, version=number)
    graph = merged.graph
    graph.name = metadata["name"]
    for part, prefix in ((front, "preprocess/"), (network, "network/")):
        names = {"images": "images", "pixels": "pixels", output: output, "": ""}
        for tensor in part.graph.initializer:
            new = graph.initializer.add()
            new.CopyFrom(tensor)
            new.name = names[tensor.name] = prefix + tensor.name
        for node in part.graph.node:
            new = graph.node.add()
            new.CopyFrom(node)
            new.name = prefix + node.name
            del new.metadata_props[:], new.input[:], new.output[:]
            new.doc_string = ""
            new.input.extend(names.setdefault(name, prefix + name) for name in node.input)
            new.output.extend(names.setdefault(name, prefix + name) for name in node.output)
    make = onnx.helper
    graph.input.append(make.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", "height", "width", 3]))
    length = network.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    results = [(output, length)]
    if scores is not None:
        kind = {"softmax": "Softmax", "sigmoid": "Sigmoid"}[scores]
        attributes = {"axis": 1} if scores == "softmax" else {}
        graph.node.append(make.make_node(kind, ["logits"], ["probabilities"], name="probabilities", **attributes))
        results.insert(0, ("probabilities", length))
    for name, size in results:
        graph.output.append(make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", size]))
    make.set_model_props(merged, metadata)

    weights = sum(len(tensor.raw_data) for tensor in graph.initializer)
    beside = {"save_as_external_data": True, "location": f"{path.name}.data"} if weights > ONE_FILE else {}
    onnx.save_model(merged, path, **beside)


def read(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """images (B, H, W, 3) → outputs by name; `pixels` by the same file with one more output, left beside it."""
    onnx = _import("onnx")
    copy = onnx.load(path, load_external_data=False)
    outputs = [output.name for output in copy.graph.output]
    del copy.graph.output[:]
    copy.graph.output.append(onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, None))
    whole, front = _session(path), _session_of_copy(onnx, copy, path)

    def call(images: np.ndarray) -> dict[str, np.ndarray]:
        values = dict(zip(outputs, whole.run(outputs, {"images": images}), strict=True))
        return values | {"pixels": front.run(None, {"images": images})[0]}

    return call


def _session_of_copy(onnx: Any, copy: Any, path: Path) -> Any:
    beside = path.with_name(f"pixels-{path.name}")
    onnx.save_model(copy, beside)
    try:
        return _session(beside)
    finally:
        beside.unlink()


def _session(path: Path) -> Any:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _graph(module: nn.Module, example: Tensor, dynamic: tuple[int, ...], given: str, output: str) -> Any:
    """A module of one tensor as a ModelProto."""
    _import("onnxscript")
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own parts
            program: Any = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=(dict.fromkeys(dynamic, DYNAMIC),),
                input_names=[given],
                output_names=[output],
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    return program.model_proto


# ── int8 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _quantised(network: Any, folder: Path, calibration: Sequence[Tensor], dense: Set[str]) -> Any:
    """The dense layers of these names in int8, a scale for each of their outputs; all else in fp32.

    Activations are uint8, from the smallest to the largest value met. Without VNNI such products can overflow 16 bits,
    so weights then have 7 bits.
    """
    onnx, quantization = _import("onnx"), _import("onnxruntime.quantization")
    nodes = [node.name for node in network.graph.node if node.op_type in ("MatMul", "Gemm") and _module(node) in dense]
    rows = iter([{"pixels": row[None].numpy()} for batch in calibration for row in batch])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(rows, None)

    source, target = folder / "fp32.onnx", folder / "int8.onnx"
    onnx.save_model(network, source)
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises, on the root logger
    try:
        quantization.quantize_static(
            source,
            target,
            Reader(),
            nodes_to_quantize=nodes,
            per_channel=True,
            reduce_range=not has_int8(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            # or the results of products are rounded to uint8 too
            extra_options={"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]},
        )
        return onnx.load(target)
    finally:
        logger.setLevel(level)
        source.unlink()
        target.unlink(missing_ok=True)


def _module(node: Any) -> str:
    """Name of the module in the model that a node comes from: layers.0.attn.q."""
    import ast

    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            names = [name for name in ast.literal_eval(entry.value) if name.startswith("outputs.model.")]
            return names[-1].removeprefix("outputs.model.") if names else ""
    return ""


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtra(name.split(".")[0], "onnx") from None
