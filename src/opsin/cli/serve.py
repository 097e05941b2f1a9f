"""`opsin serve`: the flags of a server."""

import os
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import DEFAULT_MODEL, fail

if TYPE_CHECKING:
    from opsin.serve.settings import Settings

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}  # powers of two
NAMES = {  # of settings whose flags, and so environment variables, have others
    "model": "models",
    "max_memory": "max_memory_bytes",
    "max_body": "max_body_bytes",
    "api_key": "api_keys",
    "cors_origin": "cors_origins",
    "allow_url_host": "allow_url_hosts",
}
EXTRA = {"fastapi", "starlette", "uvicorn", "httptools", "python_multipart", "prometheus_client", "orjson"}


class Size(click.ParamType):
    """Bytes: 33554432, 32M, 1.5G, 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,15}\.?\d{0,6})\s*([KMGT]?)(?:I?B)?", value.strip().upper())
        if not found or not (size := int(float(found[1]) * 2 ** UNITS[found[2]])):
            self.fail(f'"{value}" is not a size. Write bytes, or 512K, 32M, 4G.', param, ctx)
        return size


SIZE = Size()


@click.command(short_help="Serve models over HTTP, with a page.")
@click.option(
    "--model",
    default=[DEFAULT_MODEL],
    show_default=True,
    multiple=True,
    metavar="[NAME=]SOURCE",
    help="What to serve, and its name in requests; repeat it for several. The first is the default one.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 is every address of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes, each with all models and its share of the cores.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "int8", "fp16", "fp8"]),
    default="auto",
    show_default=True,
    help="As in `opsin classify`.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "torch", "openvino"]),
    default="auto",
    show_default=True,
    help="What computes.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option(
    "--decode",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="fast reads large JPEGs at a fraction of their size.",
)
@click.option("--lazy", is_flag=True, help="Load a model when it is first asked for.")
@click.option(
    "--max-memory",
    type=SIZE,
    metavar="SIZE",
    help="Of all models together, such as 4G; the one not used for longest is unloaded.",
)
@click.option("--max-batch", type=click.IntRange(1), default=32, show_default=True, help="Images computed together.")
@click.option(
    "--max-wait-ms",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    help="For more images, while other requests are arriving.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Images that wait for one model; a request that finds no room is answered 429.",
)
@click.option("--max-items", type=click.IntRange(1), default=256, show_default=True, help="Images of one request.")
@click.option("--max-body", type=SIZE, default="32M", show_default=True, metavar="SIZE", help="Of one request.")
@click.option(
    "--max-pixels", type=click.IntRange(1), default=50_000_000, show_default=True, help="Of one image, decoded."
)
@click.option(
    "--body-seconds",
    type=click.FloatRange(1),
    default=30.0,
    show_default=True,
    help="From the first byte of a request to its last.",
)
@click.option(
    "--api-key",
    multiple=True,
    metavar="KEY",
    help="What requests must bring; repeat it for several. Other users of this machine can read command lines: "
    "set OPSIN_SERVE_API_KEY instead.",
)
@click.option("--cors-origin", multiple=True, metavar="URL", help="A site whose pages may send requests.")
@click.option("--allow-url-host", multiple=True, metavar="HOST", help="A host that images may be fetched from.")
@click.option("--drain-seconds", type=click.FloatRange(0), default=1.0, show_default=True,
              help="That connections are still taken after SIGTERM or Ctrl-C, while /readyz says 503.")  # fmt: skip
def serve(host: str, port: int, workers: int, drain_seconds: float, **options: Any) -> None:
    """Serve models over HTTP: a page to try them, and the protocols of Hugging Face, KServe and OpenAI.

    \b
    opsin serve --model google/vit-large-patch16-224 --model cats=runs/1
    curl --data-binary @cat.jpg localhost:8000/models/cats

    SIGTERM or Ctrl-C answers what was taken and ends; a second one ends at once. Every flag has an environment
    variable: OPSIN_SERVE_PORT=9000; of those that may be repeated, with blanks between: OPSIN_SERVE_MODEL="cats=runs/1
    opsin/vit-tiny".
    """
    from opsin.errors import MissingExtra

    # between two layers threads wait this many turns before they sleep: enough for a single image, and not, as by
    # default, so many that the threads of requests and of decoding find no core
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        from opsin.serve.run import run
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        fail(MissingExtra(error.name, "serve"))
    try:
        settings = as_settings(options)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    sys.exit(run(settings, host=host, port=port, workers=workers, drain_seconds=drain_seconds))


def as_settings(options: dict[str, Any]) -> "Settings":
    from opsin.serve.settings import Settings

    return Settings(**{NAMES.get(name, name): value for name, value in options.items()})


def settings_from_environment() -> "Settings":
    """Those of `opsin serve` without a flag, for a server that others start."""
    with serve.make_context("serve", [], auto_envvar_prefix="OPSIN_SERVE") as context:
        of_process = ("host", "port", "workers", "drain_seconds")
        return as_settings({name: value for name, value in context.params.items() if name not in of_process})
