"""What docs/serving.md shows is run as it is shown, but on another port."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from protocols import photo

DOC = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture
def url(serve: Callable[..., str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a server of a model called as the embedded one; cat.jpg is in the folder."""
    monkeypatch.chdir(tmp_path)
    Path("cat.jpg").write_bytes(photo(1, "JPEG"))
    return serve(models=(f"opsin/vit-tiny={tiny}",), api_keys=()).removeprefix("http://")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # clients that the snippets leave open
def test_the_clients_run(url: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        *lines, last = snippet.strip().replace("localhost:8000", url).splitlines()
        names: dict[str, object] = {}
        exec("\n".join(lines), names)
        found = eval(last.split("  # ")[0], names)
        assert len(found) in (3, 36, 1)


def test_curl_runs(url: str) -> None:
    commands = re.findall(r"^\$ (curl .*?)(?:  # .*)?$", DOC, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("localhost:8000", url))
        answer = orjson.loads(subprocess.run([*words, "--silent", "--fail"], check=True, capture_output=True).stdout)
        rows = answer if isinstance(answer, list) else answer["results"][0]["topk"]
        assert [set(row) >= {"label", "score"} for row in rows] == [True] * len(rows) != []


def test_every_limit_is_named() -> None:
    from opsin.cli.serve import serve

    flags = {option for parameter in serve.params for option in parameter.opts}
    for flag in re.findall(r"`(--[a-z-]+)", DOC):
        assert flag in flags, flag
