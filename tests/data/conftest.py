"""Small pictures, each of its own size and bytes, and a cache that is not the user's."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Picture = Callable[[int], bytes]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5 + seed % 7, 3 + seed // 7), (seed % 256, 3 * seed % 256, 11)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Picture:
    """`picture(seed)`: the bytes of a PNG file; two seeds never give the same."""
    return png


@pytest.fixture(scope="session")
def fill(picture: Picture) -> Callable[..., None]:
    """`fill(folder, "a/1.png", …)`: files below a folder, the i-th with the bytes of `picture(i)`."""

    def fill(folder: Path, *names: str) -> None:
        for i, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(picture(i))

    return fill


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OPSIN_DATA_CACHE", str(folder))
    return folder
