"""A server on loopback, with a model small enough to be fast and real enough to be right."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="opsin[serve] is not installed")
import httpx
import uvicorn

from opsin import checkpoints
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig
from opsin.serve.app import create_app
from opsin.serve.guard import Protocol
from opsin.serve.settings import Settings

NAMES = ("tabby cat", "espresso", "rocket", "otter", "lamp", "bridge", "plum")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ViT of two layers and three heads, 7 classes, whose weights are noise."""
    torch.manual_seed(8)
    shape = ViTConfig(
        image_size=(32, 32), patch_size=8, embed_dim=36, num_layers=2, num_heads=3, mlp_dim=22, num_classes=7
    )
    model = ViT(shape)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    checkpoints.write(folder, model, PreprocessConfig(size=(32, 32)), Labels(NAMES))
    return folder


@pytest.fixture
def serve(tiny: Path) -> Iterator[Callable[..., str]]:
    """`serve(**settings)` → the base URL of a server that is ready; without `models` it has one called "org/tiny"."""
    with contextlib.ExitStack() as stack:

        def start(*, wait: bool = True, load: Callable[..., Any] | None = None, **settings: Any) -> str:
            settings.setdefault("models", (f"org/tiny={tiny}",))
            options = {} if load is None else {"load": load}
            app = create_app(Settings(dtype="fp32", **settings), **options)
            server = uvicorn.Server(uvicorn.Config(app, port=0, http=Protocol, log_level="warning", lifespan="on"))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            _until(lambda: server.started)
            url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
            if wait:
                _until(lambda: not app.state.fleet.problems)
            return url

        yield start


@pytest.fixture
def client(serve: Callable[..., str]) -> Iterator[httpx.Client]:
    """Talks to a server of the tiny model."""
    with httpx.Client(base_url=serve()) as found:
        yield found


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline, "the server did not come up"
        time.sleep(0.01)
