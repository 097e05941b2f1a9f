"""Weights mapped from a file give their memory back, and lose nothing by it."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from opsin import checkpoints, engine
from opsin.engine.pages import FilePages
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are a file's")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(32, 32), patch_size=8, embed_dim=96, num_layers=3, num_heads=3, mlp_dim=416, num_classes=7
    )
    checkpoints.write(tmp_path / "model", ViT(config), None, Labels.numbered(7))
    return tmp_path / "model"


def resident_kb(folder: Path) -> int:
    """Of the weight file, in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str((folder / "model.safetensors").resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_released_weights_are_read_again(folder: Path) -> None:
    model = checkpoints.read(folder).model
    before, full = weights(model), resident_kb(folder)
    FilePages().release(model)
    assert full > 1000 and resident_kb(folder) < full / 4  # what shares a page with a neighbour stays
    assert equal(weights(model), before)
    assert resident_kb(folder) == full


def test_what_was_written_is_kept(folder: Path) -> None:
    """One changed number, and the whole mapping is left alone."""
    model = checkpoints.read(folder).model
    with torch.no_grad():
        model.layers[1].mlp.fc1.weight[200, 50] = 5  # type: ignore[union-attr, index]
    before = weights(model)
    pages = FilePages()
    pages.release(model)
    assert equal(weights(model), before)
    address = model.layers[1].mlp.fc1.weight.data_ptr()  # type: ignore[union-attr, index]
    assert not any(address in file for file in pages.unwritten)


def test_memory_that_is_no_files_is_kept() -> None:
    model = nn.Sequential(nn.Linear(301, 499), nn.Linear(2003, 3001))  # from the heap, and mapped by malloc
    before = weights(model)
    pages = FilePages()
    pages.release(model)
    pages.trim()
    assert equal(weights(model), before)


@pytest.mark.skipif(not engine.can_pack(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packing_leaves_the_file_out_of_memory(precision: str, folder: Path) -> None:
    model = checkpoints.read(folder).model
    before, full = weights(model), resident_kb(folder)
    twin = engine.pack(model, precision)  # type: ignore[arg-type]
    assert resident_kb(folder) < full / 4
    pixels = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(twin(pixels), model(pixels), atol=0.05, rtol=0)
    assert equal(weights(model), before)
