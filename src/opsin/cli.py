"""Arguments in, one function called, text or JSON out. The only file that parses, prints and exits."""

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from opsin import __version__

if TYPE_CHECKING:
    from opsin.pipeline import Classifier

# exit codes; 2, usage, is click's own
ALL_GOOD, NOT_WRITTEN, SOME_FAILED, MODEL_FAILED, INTERRUPTED = 0, 1, 3, 4, 130
DEFAULT_MODEL = "opsin/vit-tiny"  # equal to pipeline.DEFAULT_MODEL, which would import torch


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "OPSIN", "max_content_width": 100},
    epilog="Exit codes: 0 all good, 1 the result could not be written, 2 usage, 3 some inputs failed, "
    "4 the model could not be loaded, 130 interrupted. "
    "Every option can be set by an environment variable: OPSIN_CLASSIFY_TOP_K=3.",
)
@click.version_option(__version__, message="opsin %(version)s")
def main() -> None:
    """Image understanding with attention models.

    \b
    opsin classify photo.jpg holiday/ 'more/*.png' --top-k 5
    find . -name '*.jpg' | opsin classify - > labels.jsonl
    opsin embed holiday/ --out features.parquet
    opsin models
    """
    click.get_current_context().color = False if os.environ.get("NO_COLOR") else None
    logging.basicConfig(level=logging.WARNING, format="opsin: %(message)s")
    warnings.filterwarnings("ignore", module="PIL")  # damaged metadata of a file whose pixels are whole


def image_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `classify` and `embed` share."""
    for decorate in reversed(
        [
            click.argument("paths", nargs=-1, required=True),
            click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME",
                         help="Hub id, folder, .safetensors/.npz/.pth file, or a name of `opsin models`."),
            click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub."),
            click.option("--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                         help="Write a .jsonl, .csv or .parquet file instead of standard output."),
            click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True),
            click.option("--dtype", type=click.Choice(["auto", "fp32"]), default="auto", show_default=True,
                         help="fp32 is the exact reference."),
            click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …"),
            click.option("--max-pixels", type=click.IntRange(1), metavar="N",
                         help="Refuse larger images before decoding them."),
        ]
    ):  # fmt: skip
        command = decorate(command)
    return command


@main.command(short_help="Name what is in images.")
@image_options
@click.option("--top-k", "--topk", type=click.IntRange(1), default=5, show_default=True, help="Labels per image.")
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Language of labels.")
def classify(paths: tuple[str, ...], top_k: int, **options: Any) -> None:
    """Name what is in images: files, folders, patterns, URLs, or - for a list of paths on standard input.

    A table on a terminal, JSON lines in a pipe: one record per input, in order; an image that cannot be read is a
    record with "ok": false, and the others are not touched.
    """
    run(paths, task="classify", top_k=top_k, **options)


@main.command(short_help="Turn images into feature vectors.")
@image_options
def embed(paths: tuple[str, ...], **options: Any) -> None:
    """Turn images into feature vectors, for search, clustering or a classifier of your own."""
    run(paths, task="embed", top_k=1, lang="en", **options)


@main.command(short_help="List the known models, or search the hub.")
@click.option("--hub", metavar="QUERY", help="Search the model hub for fine-tuned classifiers that load.")
def models(hub: str | None) -> None:
    """List the known models, or search the hub; any id listed loads with --model."""
    from opsin.errors import OpsinError

    try:
        rows = list(catalog_rows() if hub is None else hub_rows(hub))
    except OpsinError as error:
        fail(error)
    if not rows:
        say(f'nothing on the hub for "{hub}" that opsin can load')
    if not sys.stdout.isatty():
        from opsin.results import json_line

        for row in rows:
            click.echo(json_line(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else []:
        table.add_column(column, justify="right" if column in ("params", "downloads", "top-1 %") else "left")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    Console().print(table)


def cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value / 1e6:.1f}M" if value >= 100_000 else f"{value:,}"
    return str(value).removeprefix("https://").split("/")[0] if str(value).startswith("https://") else str(value)


def catalog_rows() -> Iterator[dict[str, Any]]:
    from opsin.checkpoints.catalog import CATALOG
    from opsin.checkpoints.hub import is_cached

    for name, entry in CATALOG.items():
        yield {
            "name": name,
            "task": entry.task,
            "params": entry.params,
            "licence": entry.licence,
            "top-1 %": entry.score,
            "cached": name == DEFAULT_MODEL or is_cached(name),
            "source": entry.url,
        }


def hub_rows(query: str) -> Iterator[dict[str, Any]]:
    from opsin.checkpoints.hub import search

    for model in search(query):
        yield {
            "name": model.name,
            "architecture": model.architecture,
            "downloads": model.downloads,
            "likes": model.likes,
            "licence": model.licence,
        }


def run(
    paths: tuple[str, ...], *, task: str, top_k: int, out: Path | None, batch_size: int, lang: str, **options: Any
) -> None:
    """`classify` and `embed`: inputs → records → terminal, pipe or file, then the exit code."""
    from opsin.data.files import find_images
    from opsin.errors import MissingExtra, ModelError, NoHead
    from opsin.results import check_format, json_line, writer

    if out is not None:
        try:
            check_format(out)
        except (ValueError, MissingExtra) as error:
            raise click.BadParameter(str(error), param_hint="--out") from None
        if not out.parent.is_dir():
            raise click.BadParameter(f'the folder "{out.parent}" does not exist.', param_hint="--out")
    if paths.count("-") and len(paths) > 1:
        raise click.UsageError("- reads every path from standard input; give it alone.")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop keeps the records too
    counts = {"images": 0, "failed": 0}
    try:
        classifier = load_model(lang=lang, **options)
        images: Iterable[str]
        if paths == ("-",):
            images, total = stdin_paths(), None
        else:
            images, total = find_images(paths), sum(1 for _ in find_images(paths))
        records = classifier.stream(images, batch_size=batch_size, top_k=top_k, embed=task == "embed")
    except (ModelError, NoHead, MissingExtra) as error:
        fail(error)
    try:
        with ExitStack() as stack:
            if out is not None:
                write = stack.enter_context(writer(out, run=describe(classifier, task=task)))
            elif sys.stdout.isatty():
                write = show
            else:
                sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]

                def write(record: dict[str, Any]) -> None:
                    print(json_line(record), flush=True)

            advance = stack.enter_context(progress(total))
            for record in records:
                write(record)
                counts["images"] += 1
                counts["failed"] += not record["ok"]
                advance(counts)
    except KeyboardInterrupt:
        where = f"; their records are in {out}" if out and counts["images"] else ""
        say(f"interrupted after {counts['images']} images{where}")
        sys.exit(INTERRUPTED)
    except OSError as error:  # an input that cannot be read is a record, so this is the output
        if isinstance(error, BrokenPipeError) and out is None:  # `opsin … | head`: the reader has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
            sys.exit(ALL_GOOD)
        say(f"{out or 'standard output'} cannot be written: {error.strerror or error}")
        sys.exit(NOT_WRITTEN)
    if not counts["images"]:
        say(f"no images in {', '.join(paths)}")
    sys.exit(SOME_FAILED if counts["failed"] else ALL_GOOD)


def say(text: str) -> None:
    """A line for people, on standard error; nobody there to read it is no reason to stop."""
    with suppress(OSError):
        click.echo(f"opsin: {text}", err=True)


def load_model(*, model: str, lang: str, max_pixels: int | None, **options: Any) -> "Classifier":
    from opsin.pipeline import find_device, load
    from opsin.preprocess import MAX_PIXELS

    try:
        find_device(options["device"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    classifier = load(model, lang=lang, max_pixels=max_pixels or MAX_PIXELS, **options)
    if model == DEFAULT_MODEL:
        from opsin.checkpoints.catalog import CATALOG

        score = CATALOG[DEFAULT_MODEL].score
        say(
            f"using the embedded {DEFAULT_MODEL} (200 everyday classes, {score} % top-1 on held-out images). "
            "For 1,000 classes: --model google/vit-large-patch16-224 (82.7 %, 1.2 GB)."
        )
    return classifier


def describe(classifier: "Classifier", *, task: str) -> dict[str, Any]:
    """What made a result file: enough to make it again."""
    source = classifier.source
    return {
        "task": task,
        "model": source.name,
        "revision": source.revision,
        "sha256": source.sha256,
        "preprocess": classifier.preprocess.spec(),
        "preprocess_hash": classifier.preprocess.hash(),
        "dtype": "fp32",
        "device": str(classifier.device),
        "opsin": __version__,
        **({"embedding_dim": classifier.feature_dim} if task == "embed" else {}),
    }


def stdin_paths() -> Iterator[str]:
    """One path a line; bytes that are not UTF-8 survive. A folder named here is one input, and so one error."""
    for line in sys.stdin.buffer:
        if path := line.rstrip(b"\r\n"):
            yield os.fsdecode(path)


def printable(text: str) -> str:
    """A file name may hold anything, also what would command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def show(record: dict[str, Any]) -> None:
    """One record for people."""
    click.secho(printable(record["path"]), bold=True)
    if not record["ok"]:
        click.secho(printable(f"  {record['error']['type']}: {record['error']['message']}"), fg="red")
    elif "embedding" in record:
        vector = record["embedding"]
        click.echo(f"  {len(vector)} numbers: {', '.join(f'{x:.3f}' for x in vector[:4])}, …")
    else:
        for best in record["topk"]:
            bar = "█" * round(20 * best["score"]) or "▏"
            click.echo(f"  {best['score']:6.1%}  {bar:20}  {best['label']}")


@contextmanager
def progress(total: int | None) -> Iterator[Callable[[dict[str, int]], None]]:
    """Images/s, errors and ETA on standard error: a bar on a terminal; a line a minute and a last one elsewhere."""
    start = last = time.monotonic()
    seen = {"images": 0, "failed": 0}

    def line() -> str:
        seconds = time.monotonic() - start
        rate = seen["images"] / max(seconds, 1e-9)
        text = f"{seen['images']} images, {seen['failed']} failed, {rate:.1f} images/s"
        if total is not None and seen["images"] < total:
            text += f", ETA {(total - seen['images']) / max(rate, 1e-9):.0f} s"
        return text

    if sys.stderr.isatty() and total != 1:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        with bar:
            task = bar.add_task("", total=total)

            def advance(counts: dict[str, int]) -> None:
                seen.update(counts)
                bar.update(task, completed=counts["images"], description=line())

            yield advance
    else:

        def advance(counts: dict[str, int]) -> None:
            nonlocal last
            seen.update(counts)
            if time.monotonic() - last > 60:
                last = time.monotonic()
                say(line())

        yield advance
    if seen["images"] > 1:
        say(line())


def fail(error: Exception) -> NoReturn:
    say(str(error))
    sys.exit(MODEL_FAILED)
