"""What the commands share: exit codes, messages and progress on standard error, loading a model, standard input."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

# exit codes; 2 is click's own
ALL_GOOD, NOT_WRITTEN, USAGE, SOME_FAILED, MODEL_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130
DEFAULT_MODEL = "opsin/vit-tiny"  # equal to pipeline.DEFAULT_MODEL, which would import torch
TEXT_MODEL, FLOW_MODEL = "deepmind/language-perceiver", "deepmind/optical-flow-perceiver"
VIDEO_MODEL = "deepmind/multimodal-perceiver"

# class of a loaded model: what it does, and the commands that take it
TASKS = {
    "Classifier": ("classifies images", ("classify", "embed", "explain")),
    "TextModel": ("fills gaps in text", ("fill-mask", "explain")),
    "FlowModel": ("measures motion between two images", ("flow",)),
    "VideoModel": ("rebuilds video with sound", ("autoencode",)),
}


def say(text: str) -> None:
    """A line for people, on standard error; nobody there to read it is no reason to stop."""
    with suppress(OSError):
        click.echo("\n".join(map(printable, f"opsin: {text}".splitlines())), err=True)


def fail(error: Exception) -> NoReturn:
    say(str(error))
    sys.exit(MODEL_FAILED)


def not_written(error: OSError, out: Path | None) -> NoReturn:
    if isinstance(error, BrokenPipeError) and out is None:  # `opsin … | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        sys.exit(ALL_GOOD)
    say(f"{out or 'standard output'} cannot be written: {error.strerror or error}")
    sys.exit(NOT_WRITTEN)


@contextmanager
def answering(out: Path | None = None) -> Iterator[None]:
    """The exit codes of a command that stores nothing until it ends: interrupted, or not written."""
    if not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)
    except OSError as error:  # an input that cannot be read is an OpsinError, so this is the output
        not_written(error, out)


def check_out(out: Path, module: str) -> None:
    """Refuse a file that could not be written, before any work is done; `module` knows its formats."""
    from opsin.errors import MissingExtra

    try:
        import_module(module).check_format(out)
    except (ValueError, MissingExtra) as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    if not out.parent.is_dir():
        raise click.BadParameter(f'the folder "{out.parent}" does not exist.', param_hint="--out")


def load_model(command: str, *, model: str, max_pixels: int | None = None, **options: Any) -> Any:
    """The model, of a class that `command` takes.

    Raises:
        ModelError: it cannot be loaded, or is for another command.
    """
    from opsin.device import find_device
    from opsin.errors import ModelError
    from opsin.pipeline import load

    try:
        find_device(options["device"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    try:
        loaded = load(model, max_pixels=max_pixels, **options)
    except ValueError as error:  # a dtype or engine that this machine lacks
        hint = "--engine" if str(error).startswith("engine") else "--dtype"
        raise click.BadParameter(str(error), param_hint=hint) from None
    except KeyboardInterrupt:  # a download may take minutes
        say("interrupted")
        sys.exit(INTERRUPTED)
    task, commands = TASKS[type(loaded).__name__]
    if command not in commands:
        raise ModelError(f"{model} {task}; {', '.join(f'`opsin {name}`' for name in commands)} can use it.")
    if model == DEFAULT_MODEL and command in ("classify", "explain"):
        from opsin.checkpoints.catalog import CATALOG

        score = CATALOG[DEFAULT_MODEL].score
        say(
            f"using the embedded {DEFAULT_MODEL} (200 everyday classes, {score} % top-1 on held-out images). "
            "For 1,000 classes: --model google/vit-large-patch16-224 (82.7 %, 1.2 GB)."
        )
    return loaded


def stdin_lines() -> Iterator[bytes]:
    """The lines that are not empty."""
    for line in sys.stdin.buffer:
        if stripped := line.rstrip(b"\r\n"):
            yield stripped


def stdin_paths() -> Iterator[str]:
    """One path a line; bytes that are not UTF-8 survive. A folder named here is one input, and so one error."""
    return map(os.fsdecode, stdin_lines())


def stdin_texts() -> Iterator[str]:
    """One text a line; bytes that are not UTF-8 become what a model refuses, so that one bad line is one error."""
    return (line.decode("utf-8", "surrogateescape") for line in stdin_lines())


def printable(text: str) -> str:
    """A file name may hold anything, also what would command the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value / 1e6:.1f}M" if value >= 100_000 else f"{value:,}"
    return str(value).removeprefix("https://").split("/")[0] if str(value).startswith("https://") else str(value)


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


def show_filled(record: dict[str, Any]) -> None:
    """One filled text for people: the text, then a line for each mask with its best bytes."""
    if not record["ok"]:
        click.secho(printable(f"{record['error']['type']}: {record['error']['message']}"), fg="red")
        return
    click.secho(printable(record["filled"]), bold=True)
    for gap in record["gaps"]:
        click.echo(printable(f'  "{gap["text"]}"'))
        for choices in gap["bytes"]:
            click.echo("    " + "  ".join(f"{best['token']} {best['score']:.1%}" for best in choices))


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


@contextmanager
def parts(noun: str) -> Iterator[Callable[[int, int], None]]:
    """Progress through the parts of one answer, on standard error: a bar on a terminal, a line a minute elsewhere."""
    start = last = time.monotonic()

    def line(done: int, total: int) -> str:
        rate = done / max(time.monotonic() - start, 1e-9)
        return f"{done} of {total} {noun}, {rate:.1f} {noun}/s, ETA {(total - done) / rate:.0f} s"

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        with Progress(
            BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
        ) as bar:
            task = bar.add_task(noun, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total, description=line(done, total))
    else:

        def advance(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 60:
                last = time.monotonic()
                say(line(done, total))

        yield advance
