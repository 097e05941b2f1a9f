"""`opsin serve`: its flags become settings; what it serves is in tests/serve."""

import subprocess
import sys
from dataclasses import MISSING, fields
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi", reason="opsin[serve] is not installed")
from opsin.cli import main
from opsin.cli.output import MODEL_FAILED, USAGE
from opsin.serve import run as running
from opsin.serve.run import run
from opsin.serve.settings import Settings

ALL = Settings(
    models=("cats=runs/1", "opsin/vit-tiny"), dtype="bf16", engine="torch", device="cpu", decode="fast", lazy=True,
    max_memory_bytes=4 * 2**30, max_batch=5, max_wait_ms=0.5, max_queue=11, max_items=7, max_body_bytes=3 * 2**20,
    max_pixels=13, body_seconds=17, api_keys=("one", "two"), cors_origins=("https://a.example",),
    allow_url_hosts=("b.example",),
)  # fmt: skip
ALL_OPTIONS = {"host": "::1", "port": 9000, "workers": 2, "drain_seconds": 0}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, dict[str, Any]]]:
    """What `run` was asked for; it serves nothing."""
    calls: list[tuple[Settings, dict[str, Any]]] = []

    def run(settings: Settings, **options: Any) -> int:
        calls.append((settings, options))
        return 0

    monkeypatch.setattr(running, "run", run)
    return calls


def invoke(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["serve", *arguments], env=env, auto_envvar_prefix="OPSIN")
    return done.exit_code, done.output


def test_defaults_are_those_of_settings(served: list[Any]) -> None:
    assert invoke() == (0, "")
    settings, options = served[0]
    assert settings == Settings()
    assert options == run.__kwdefaults__


def test_every_setting_has_a_flag(served: list[Any]) -> None:
    flags = (
        "--model cats=runs/1 --model opsin/vit-tiny --dtype bf16 --engine torch --device cpu --decode fast --lazy "
        "--max-memory 4G --max-batch 5 --max-wait-ms 0.5 --max-queue 11 --max-items 7 --max-body 3M --max-pixels 13 "
        "--body-seconds 17 --api-key one --api-key two --cors-origin https://a.example --allow-url-host b.example "
        "--host ::1 --port 9000 --workers 2 --drain-seconds 0"
    )
    assert invoke(*flags.split()) == (0, "")
    assert served == [(ALL, ALL_OPTIONS)]
    for field in fields(Settings):  # a new setting fails here until it has a flag
        assert field.default is not MISSING and getattr(ALL, field.name) != field.default, field.name


def test_every_flag_has_an_environment_variable(served: list[Any]) -> None:
    command = main.commands["serve"]
    values = {
        "MODEL": "cats=runs/1 opsin/vit-tiny", "HOST": "::1", "PORT": "9000", "WORKERS": "2", "DTYPE": "bf16",
        "ENGINE": "torch", "DEVICE": "cpu", "DECODE": "fast", "LAZY": "1", "MAX_MEMORY": "4G", "MAX_BATCH": "5",
        "MAX_WAIT_MS": "0.5", "MAX_QUEUE": "11", "MAX_ITEMS": "7", "MAX_BODY": "3M", "MAX_PIXELS": "13",
        "BODY_SECONDS": "17", "API_KEY": "one two", "CORS_ORIGIN": "https://a.example", "ALLOW_URL_HOST": "b.example",
        "DRAIN_SECONDS": "0",
    }  # fmt: skip
    flags = {option.opts[0].removeprefix("--").upper().replace("-", "_") for option in command.params}
    assert flags == set(values)
    env = {f"OPSIN_SERVE_{name}": value for name, value in values.items()}
    assert invoke(env=env) == (0, "")
    assert served == [(ALL, ALL_OPTIONS)]


@pytest.mark.parametrize("name", ["API_KEY", "MAX_MEMORY", "MODEL"])
def test_an_empty_variable_is_none(served: list[Any], name: str) -> None:
    assert invoke(env={f"OPSIN_SERVE_{name}": ""}) == (0, "")
    assert served[0][0] == Settings()


@pytest.mark.parametrize(
    ("text", "size"),
    [("33554432", 2**25), ("32M", 2**25), ("1.5g", 3 * 2**29), ("4GiB", 2**32), ("512 KB", 2**19), ("7B", 7)],
)
def test_sizes(served: list[Any], text: str, size: int) -> None:
    assert invoke("--max-body", text) == (0, "")
    assert served[0][0].max_body_bytes == size


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--max-body 32X", '"32X" is not a size. Write bytes, or 512K, 32M, 4G.'),
        ("--max-memory 0", '"0" is not a size.'),
        ("--port 70000", "70000 is not in the range 0<=x<=65535"),
        ("--workers 0", "0 is not in the range x>=1"),
        ("--model a=x --model a=y", 'two models are called "a". Name one of them otherwise: OTHER=y'),
        ("--model a=", '"a=" is not a model. Write NAME=SOURCE, or the source alone.'),
    ],
)
def test_what_cannot_be_is_refused(served: list[Any], flags: str, message: str) -> None:
    code, output = invoke(*flags.split())
    assert (code, served) == (USAGE, [])
    assert message in output


def test_the_exit_code_is_that_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run", lambda *_, **__: 130)
    assert invoke()[0] == 130


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opsin.serve.run")
    monkeypatch.delattr("opsin.serve.run")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, output = invoke()
    assert code == MODEL_FAILED
    assert output == 'opsin: uvicorn is not installed. Install it with: pip install "opsin[serve]"\n'


def test_help_is_there_without_torch_and_fastapi() -> None:
    check = """
import sys
from opsin.cli import main
main(["serve", "--help"], standalone_mode=False)
assert not {"torch", "fastapi", "uvicorn", "prometheus_client"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    assert "OPSIN_SERVE_PORT=9000" in done.stdout
