"""Fixtures shared by the suite: a tiny classifier without weights, the broken files, the optional shared data."""

import importlib
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.checkpoints import Checkpoint, Source
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.pipeline import Classifier
from opsin.preprocess import PreprocessConfig

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# timm and, where it is installed, transformers import torchvision, whose compiled part does not load beside a torch of
# another build (the CPU's). Of its operators, which no test calls, the declarations then suffice.
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
try:
    importlib.import_module("torchvision")
except RuntimeError:
    TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def photos() -> Path:
    return ROOT / "examples" / "photos"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's data folder, which is not in the repository: OPSIN_SHARED, or ../shared."""
    folder = Path(os.environ.get("OPSIN_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data: {folder} is not there. Set OPSIN_SHARED to the folder that holds data/.")
    return folder / "data"


@pytest.fixture(scope="session")
def noisy_checkpoint() -> Checkpoint:
    """Every parameter is noise: a zero bias or a unit norm would hide a mistake."""
    torch.manual_seed(0)
    model = ViT(
        ViTConfig(image_size=(32, 32), patch_size=8, embed_dim=24, num_layers=2, num_heads=2, mlp_dim=40, num_classes=7)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Checkpoint(
        model=model.eval(),
        preprocess=PreprocessConfig(size=(32, 32)),
        labels=Labels.from_names([f"class {i}" for i in range(7)]),
        source=Source("test/noise", None, "", "opsin"),
    )


@pytest.fixture(scope="session")
def classifier(noisy_checkpoint: Checkpoint) -> Classifier:
    return Classifier(noisy_checkpoint, dtype="fp32")


@pytest.fixture(scope="session")
def on_a_terminal() -> Callable[..., str]:
    """`on_a_terminal(*arguments)`: what a person sees of `opsin *arguments`, 100 columns wide, without colour."""

    def run(*arguments: str) -> str:
        outer, inner = pty.openpty()
        environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
        command = [sys.executable, "-m", "opsin", *arguments]
        seen = b""
        with subprocess.Popen(command, stdout=inner, stderr=inner, stdin=inner, env=environment, cwd=ROOT) as process:
            os.close(inner)
            while True:
                try:
                    piece = os.read(outer, 4096)
                except OSError:  # the other end is closed: how Linux ends a terminal
                    break
                if not piece:
                    break
                seen += piece
        os.close(outer)
        assert process.returncode in (0, 3), seen.decode()
        return seen.decode().replace("\r\n", "\n")

    return run


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """`aws(url)`: S3 is there from now on; its file system."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)

    def at(url: str) -> Any:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        return s3fs.S3FileSystem(use_listings_cache=False)

    yield at
    s3fs.S3FileSystem.clear_instance_cache()
    registry = pytest.importorskip("fsspec.registry")
    registry._registry.pop("s3", None)  # other tests play that s3fs is not installed
