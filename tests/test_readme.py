"""What the READMEs show is run, and compared with what they say it prints."""

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

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")


def commands(readme: str) -> Iterator[tuple[str, str]]:
    """(command, output) of every `$` line in a console block; the output is empty where none is shown."""
    for block in re.findall(r"```console\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command.split("  # ")[0].strip(), output


def python_block(readme: str) -> str:
    """The block that shows the API."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "opsin.load(" in block)


SHOWN = [(readme, command, output) for readme in READMES for command, output in commands(readme)]


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
def test_every_command_exists(readme: str, command: str) -> None:
    for part in command.split(" | "):
        words = shlex.split(part.split(" > ")[0])
        if words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
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

    english = {command for command in verbs("README.md") if command.startswith(("opsin", "make"))}
    assert len(english) > 8
    assert english <= verbs("README.zh-CN.md")


def test_the_package_says_one_version() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
