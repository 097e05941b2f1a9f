"""The structure the README draws: who imports whom, what importing costs, and which names are public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import opsin

SOURCE = Path(opsin.__file__).parent

# Imports point down: a file may import what stands on a later row, or in its own folder.
ROWS = [
    {"__main__"},
    {"cli"},
    {"compat", "recipes"},
    {"train", "autopilot", "verify", "compare", "cluster", "serve"},
    {"bench", "evaluate", "doctor", "explain", "export", "bulk", "search"},
    {"pipeline", "results", "plots", "sheets"},
    {"text", "flow", "video", "unknown"},
    {"checkpoints", "data", "engine"},
    {"hierarchy"},
    {"models", "preprocess", "labels", "device"},
    {"errors"},
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}


def imports(path: Path) -> set[str]:
    """Top-level parts of opsin that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "opsin":
            found |= {*node.module.split(".")[1:2]} or {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports from opsin in full"
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("opsin.")}
    return found - {"__version__"}


def files() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def part(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    assert part(path) in ROW, f"{part(path)} has no row in the picture"
    for other in imports(path) - {part(path)}:
        assert ROW[other] > ROW[part(path)], f"{part(path)} imports {other}"


def test_models_import_only_torch() -> None:
    allowed = {"torch", "math", "dataclasses", "typing", "collections", "opsin"}
    for path in (SOURCE / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                assert not name.startswith("opsin.") or name.startswith("opsin.models"), f"{path.name} imports {name}"


def test_public_names_are_the_ones_handed_out() -> None:
    assert sorted(opsin.__all__) == sorted(opsin._HOME)
    for name in opsin.__all__:
        assert getattr(opsin, name).__module__.startswith(opsin._HOME[name])
    with pytest.raises(AttributeError, match="no attribute 'lod'. Public names: Classifier"):
        opsin.lod  # noqa: B018


@pytest.mark.parametrize(
    "code",
    ["import opsin", "from opsin.cli import main; main(['--help'], standalone_mode=False)",
     "from opsin.cli import main; main(['models'], standalone_mode=False)"],
)  # fmt: skip
def test_torch_is_not_imported(code: str) -> None:
    check = f"import sys\n{code}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
