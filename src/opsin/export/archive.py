"""A model → a torch.export archive (.pt2), which loads without opsin: `torch.export.load(path).module()`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opsin.engine.openvino import _Outputs, _resized
from opsin.errors import ExportError
from opsin.export.pixels import Pixels

DYNAMIC = torch.export.Dim.DYNAMIC
METADATA = "opsin.json"  # the archive's extra file


class Network(nn.Module):
    """pixels (B, 3, H, W) float32 → logits (B, K); features (B, D) of a model without a head."""

    def __init__(self, model: nn.Module, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.outputs = _Outputs(_resized(model, image_size))

    def forward(self, pixels: Tensor) -> Tensor:
        outputs = self.outputs(pixels)
        return outputs[-1] if isinstance(outputs, tuple) else outputs


class Whole(nn.Module):
    """images (B, H, W, 3) uint8 → {"probabilities", "logits"} or {"features"}."""

    def __init__(self, pixels: Pixels, network: nn.Module, dtype: torch.dtype, scores: str | None) -> None:
        super().__init__()
        self.pixels, self.network, self.dtype, self.scores = pixels, network, dtype, scores

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        values = self.network(self.pixels(images).to(self.dtype)).float()
        if self.scores is None:
            return {"features": values}
        scores = values.softmax(dim=1) if self.scores == "softmax" else values.sigmoid()
        return {"probabilities": scores, "logits": values}


def write(
    path: Path, model: nn.Module, pixels: Pixels, dtype: str, scores: str | None, metadata: dict[str, str]
) -> None:
    """
    Args:
        dtype: "fp32" or "fp16".
        scores: "softmax" or "sigmoid"; None of a model without a head.
    """
    network: nn.Module = Network(model, pixels.image_size)
    kind = torch.float32
    if dtype == "fp16":
        kind, network = torch.float16, copy.deepcopy(network).half()
    whole = Whole(pixels, network, kind, scores).eval()
    height, width = pixels.image_size
    example = torch.zeros(2, height + 5, width + 11, 3, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(whole, (example,), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC},))
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata, ensure_ascii=False)})


def read(path: Path, pixels: Pixels) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """images (B, H, W, 3) → outputs by name, and `pixels`, by the same operators as the archive's."""
    try:
        run: Any = torch.export.load(path).module()
    except Exception as error:
        raise ExportError(f"{path} does not load again: {error}") from error

    def call(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = torch.from_numpy(images)
        with torch.inference_mode():
            outputs = run(batch) | {"pixels": pixels(batch)}
        return {name: value.numpy() for name, value in outputs.items()}

    return call
