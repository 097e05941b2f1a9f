"""A model → OpenVINO's .xml and .bin: images → preprocessing → network → scores. int8 by NNCF, as in the engine.

Where the CPU has bf16, OpenVINO computes in it unless told otherwise, the resize included: a byte in two or three is
then one off. `compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})` is what is measured here.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opsin.engine import openvino as engine
from opsin.export.pixels import Pixels


def write(
    path: Path,
    model: nn.Module,
    pixels: Pixels,
    dtype: str,
    scores: str | None,
    metadata: dict[str, str],
    calibration: Sequence[Tensor] = (),
    leave: Sequence[str] = (),
) -> None:
    """
    Args:
        path: the .xml; the weights go beside it, as .bin.
        scores: "softmax" or "sigmoid"; None of a model without a head.
        calibration: for int8, batches of pixels (B, 3, h, w).
        leave: for int8, names of dense layers that stay in fp32, besides convolutions and the head.
    Raises:
        MissingExtra: openvino, or for int8 nncf, is not installed.
    """
    openvino = engine._import("openvino")
    operators = openvino.opset13
    with engine._lock:
        network = engine._convert(model, pixels.image_size)
        if dtype == "int8":
            network = engine._quantise(network, calibration, leave)
        elif dtype == "fp16":
            network = _halved(openvino, network)
        front = _converted(openvino, pixels)
    whole = front.outputs[0].get_node().input_value(0)
    whole.get_tensor().set_names({"pixels"})
    network.inputs[0].replace(whole)
    values = network.outputs[-1].get_node().input_value(0)
    values.get_tensor().set_names({"features" if scores is None else "logits"})
    results = [values]
    if scores is not None:
        node = operators.softmax(values, 1) if scores == "softmax" else operators.sigmoid(values)
        node.output(0).get_tensor().set_names({"probabilities"})
        results.insert(0, node.output(0))
    front.inputs[0].get_tensor().set_names({"images"})
    joined = openvino.Model([operators.result(result) for result in results], front.get_parameters(), metadata["name"])
    for key, value in metadata.items():
        joined.set_rt_info(value, ["opsin", key])
    openvino.save_model(joined, path, compress_to_fp16=False)


def _converted(openvino: Any, pixels: Pixels) -> Any:
    height, width = pixels.image_size
    example = torch.zeros(2, height + 5, width + 11, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        traced = torch.jit.trace(pixels.eval(), example, check_trace=False)
        return openvino.convert_model(traced, input=openvino.PartialShape([-1, -1, -1, 3]))


def _halved(openvino: Any, network: Any) -> Any:
    """The network with its weights in fp16. The preprocessing, whose numbers fp16 does not hold, comes later."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.xml")
        openvino.save_model(network, path, compress_to_fp16=True)
        weights = openvino.Tensor(np.fromfile(path.with_suffix(".bin"), np.uint8))
        return engine._core().read_model(path.read_bytes(), weights)


def read(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """images (B, H, W, 3) → outputs by name, and `pixels`; computed in fp32 on the CPU."""
    graph = engine._core().read_model(path)
    graph.add_outputs("pixels")
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = engine._core().compile_model(graph, "CPU", options | {"ENABLE_CPU_PINNING": False})
    names = [output.get_any_name() for output in compiled.outputs]

    def call(images: np.ndarray) -> dict[str, np.ndarray]:
        values = compiled(images)
        return {name: values[place].copy() for place, name in enumerate(names)}

    return call
