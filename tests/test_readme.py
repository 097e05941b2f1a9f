"""What the READMEs and docs show is run or parsed, and compared with what they say it prints."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch

from opsin import __version__
from opsin.cli import main
from opsin.doctor import KINDS
from opsin.recipes import NAMES
from opsin.train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
DOCS = (
    *READMES,
    "docs/training.md",
    "docs/results.md",
    "docs/performance.md",
    "docs/explain.md",
    "docs/export.md",
    "docs/trust.md",
    "docs/cluster.md",
    "docs/scale.md",
    "docs/serving.md",
)


def commands(readme: str) -> Iterator[tuple[str, str]]:
    """(command, output) of every `$` line in a console block; the output is empty where none is shown."""
    for block in re.findall(r"```console\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL):
        block = re.sub(r"\\\n\s*", "", block)
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command.split("  # ")[0].strip(), output


def python_block(readme: str) -> str:
    """The block that shows the API."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "opsin.load(" in block)


SHOWN = [(readme, command, output) for readme in DOCS for command, output in commands(readme)]


@pytest.mark.parametrize(("readme", "command", "output"), [row for row in SHOWN if row[2].strip()])
def test_output_is_what_is_printed(readme: str, command: str, output: str, on_a_terminal: Callable[..., str]) -> None:
    assert command.startswith("opsin ")
    if command.endswith(" | cat"):
        shell = command.replace("opsin", f"{sys.executable} -m opsin", 1)
        seen = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    else:
        seen = on_a_terminal(*shlex.split(command)[1:])
    assert comparable(seen) == comparable(output)


def comparable(text: str) -> str:
    """Without times and rates, which differ from run to run; scores to two digits, for other processors' rounding."""
    text = re.sub(r'"ms": [\d.]+', '"ms": …', text)
    text = re.sub(r"[\d.]+ images/s", "… images/s", text)
    return re.sub(r'("score": 0\.\d\d)\d+', r"\1", text).strip()


@pytest.mark.parametrize(("readme", "command"), [(readme, command) for readme, command, _ in SHOWN])
def test_every_command_exists(readme: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the files are that options want to exist
    (tmp_path / "runs" / "1").mkdir(parents=True)
    (tmp_path / "real.json").touch()
    (tmp_path / "photos").mkdir()
    for part in command.split(" | "):
        words = shlex.split(part.split(" > ")[0])
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file()
        elif words[0] == "opsin":
            verb = main.commands[words[1]]
            with click.Context(main) as parent:
                verb.make_context(words[1], words[2:], parent=parent)


@pytest.mark.parametrize("readme", READMES)
def test_the_python_block_runs(readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    """Line by line as shown, but with the embedded model."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes((photos / "chelsea.png").read_bytes())
    names = {"images": ["a.jpg", "b.jpg"], "paths": ["a.jpg", "none.jpg"], "pixels": torch.zeros(1, 3, 64, 64)}
    exec(python_block(readme).replace("google/vit-large-patch16-224", "opsin/vit-tiny"), names)
    assert names["record"]["ok"] is False  # type: ignore[index]


def test_both_readmes_show_the_same_commands() -> None:
    def verbs(readme: str) -> set[str]:
        return {command.replace(" --lang zh", "") for command, _ in commands(readme)}

    english = {command for command in verbs("README.md") if command.startswith(("opsin", "make", "torchrun", "pip"))}
    assert len(english) > 8
    assert english <= verbs("README.zh-CN.md")


def table_rows(path: str) -> Iterator[list[str]]:
    """Cells of every row of every table."""
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_every_setting_is_documented_with_its_default() -> None:
    """And nothing that is no setting."""
    rows = [cells for cells in table_rows("docs/training.md") if len(cells) == 3]
    starts = [i for i, cells in enumerate(rows) if cells[0] == "setting"]
    assert len(starts) == 5
    shown = {cells[0].strip(" `"): cells[1] for cells in rows[starts[0] :] if cells[0].startswith("`")}
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert shown.keys() == fields.keys()
    for name, default in fields.items():
        if default is None or isinstance(default, str):
            assert shown[name] == (default or "–"), name
        else:
            assert json.loads(shown[name]) == (list(default) if isinstance(default, tuple) else default), name


def test_every_recipe_and_finding_is_documented() -> None:
    cells = [cells[0] for cells in table_rows("docs/training.md")]
    behind = cells[cells.index("recipes") : cells.index("setting")]
    assert sorted(name for cell in behind for name in re.findall(r"`(\w+)`", cell)) == sorted(NAMES)
    assert [title for title, _ in KINDS.values() if title not in cells] == []


def test_the_package_says_one_version() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
