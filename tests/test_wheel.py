"""The wheel holds what it needs: installed into an empty folder, it classifies from outside the repository."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 24e6
    with zipfile.ZipFile(wheel) as archive:
        assert all(name.startswith(("opsin/", "opsin-")) for name in archive.namelist())
        for name in ("vit-tiny", "perceiver-tiny"):
            assert archive.getinfo(f"opsin/assets/{name}/model.safetensors").file_size <= 12e6
        archive.extractall(tmp_path / "site")
    photo = str(ROOT / "examples" / "photos" / "coffee.png")
    code = "import opsin, sys; print(opsin.__file__); from opsin.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "classify", photo, "--top-k", "1"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    home, record = result.stdout.splitlines()
    assert home.startswith(str(tmp_path / "site"))
    assert json.loads(record)["label"] == "espresso"
