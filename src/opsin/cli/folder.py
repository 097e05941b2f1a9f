"""`classify` and `embed` into a folder: any number of images, in parts, stopped and gone on with at will."""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import (
    ALL_GOOD,
    INTERRUPTED,
    SOME_FAILED,
    USAGE,
    not_written,
    progress,
    say,
    stdin_paths,
)

if TYPE_CHECKING:
    from opsin.data.inputs import Block
    from opsin.pipeline import Classifier

FORMATS = ("parquet", "jsonl", "csv")
CLUSTER = ("workers", "gpus_per_worker", "cpus_per_worker")  # that only a cluster takes
OPTIONS = (
    "resume",
    "shard",
    "on_error",
    "errors",
    "format",
    "part_rows",
    "cluster",
    *CLUSTER,
)  # that only a folder does


class Shard(click.ParamType):
    """`3/8`: the fourth of eight, counted from 0."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
        index, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if index >= count:
            self.fail(f'"{value}" is not i/n with i from 0 to n − 1, such as 0/8.', param, ctx)
        return index, count


class Workers(click.ParamType):
    """`2:64`, at least and at most; `8`, no more and no fewer."""

    name = "workers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", value)
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            self.fail(f'"{value}" is not MIN:MAX with MIN from 1 to MAX, such as 2:64 or 8.', param, ctx)
        return least, most


def folder_options(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(
        [
            click.option("--resume", is_flag=True, help="Go on with the folder that a stopped run left."),
            click.option("--shard", type=Shard(), metavar="I/N", help="Of a folder: do the I-th of N shares only, I "
                         "from 0; all shares write into one folder."),
            click.option("--on-error", type=click.Choice(["record", "fail"]), default=None, show_default="record",
                         help="Of a folder: stop at the first image that cannot be read, or keep it as a row."),
            click.option("--errors", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
                         help="Of a folder: list in a .jsonl file, in the end, what could not be read."),
            click.option("--format", type=click.Choice(FORMATS), default=None, show_default="parquet",
                         help="Of a folder: what its parts are."),
            click.option("--part-rows", type=click.IntRange(1), default=None, show_default="1000", metavar="N",
                         help="Of a folder: rows of a part; what a killed run has to do again."),
            click.option("--cluster", metavar="ADDRESS",
                         help="Of a folder: run on Ray: auto (the cluster that this machine is in), local or "
                         "ray://head:10001."),
            click.option("--workers", type=Workers(), metavar="MIN:MAX", help="Of a cluster: at least and at most."),
            click.option("--gpus-per-worker", type=click.FloatRange(0), default=None,
                         show_default="1 where the model runs on CUDA"),
            click.option("--cpus-per-worker", type=click.IntRange(1), default=None,
                         show_default="a worker's share of the machine"),
        ]
    ):  # fmt: skip
        command = decorate(command)
    return command


def is_folder(out: Path) -> bool:
    return out.is_dir() or not out.suffix


def check_no_folder(options: dict[str, Any]) -> None:
    """Refuse what goes with a folder only."""
    for name in OPTIONS:
        if options[name]:
            raise click.UsageError(f"{flag(name)} goes with a folder of parts: --out labels/, a name without a suffix.")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def write_folder(
    classifier: "Classifier",
    paths: tuple[str, ...],
    out: Path,
    run: dict[str, Any],
    *,
    resume: bool,
    shard: tuple[int, int] | None,
    on_error: str | None,
    errors: Path | None,
    format: str | None,
    part_rows: int | None,
    cluster: str | None,
    workers: tuple[int, int] | None,
    gpus_per_worker: float | None,
    cpus_per_worker: int | None,
    load: dict[str, Any],
    **answers: Any,
) -> None:
    """Inputs → parts in a folder, then the exit code.

    Args:
        run: what made the rows, for the manifest; with "batch_size".
        load: of `opsin.load`, what gives this classifier: for the workers of a cluster.
        answers: of `Classifier.stream`.
    """
    import torch

    from opsin import bulk
    from opsin.errors import BulkError, DataError, MissingExtra, ModelError
    from opsin.results import json_line

    if errors is not None and not errors.parent.is_dir():
        raise click.BadParameter(f'the folder "{errors.parent}" does not exist.', param_hint="--errors")
    if cluster is not None and shard is not None:
        raise click.UsageError("--cluster shares the work out by itself; --shard is for other schedulers.")
    if cluster is None and any((workers, gpus_per_worker, cpus_per_worker)):
        raise click.UsageError(f"{', '.join(map(flag, CLUSTER))} go with --cluster.")
    rows = part_rows or 1000
    # a part is whole batches, so that a run that goes on makes the same ones
    manifest = run | {"inputs": list(paths), "format": format or "parquet", "part_rows": rows}
    if classifier.device.type == "cpu":  # the sums of a product depend on them, by a millionth
        manifest["threads"] = torch.get_num_threads() if cluster is None else cpus_per_worker
    stopping = Stop()
    try:
        # a shard goes on with what other shards have begun
        parts = bulk.Parts(
            out, manifest, blocks(paths, rows), resume=resume or shard is not None, shard=shard or (0, 1)
        )
        sizes = [len(block.paths) for block in parts.blocks() if block.kind == "files"]
        total = sum(sizes) if len(sizes) == parts.num_blocks and shard is None else None
        done = parts.num_done
        if done:
            say(f"{done:,} rows are in {out} already")
    except KeyboardInterrupt:
        say("interrupted; nothing is begun")
        sys.exit(INTERRUPTED)
    except (BulkError, DataError, MissingExtra) as error:
        say(str(error))
        sys.exit(USAGE)
    except OSError as error:
        not_written(error, out)
    try:
        with progress(None if total is None else total - done) as advance, stopping:
            how: dict[str, Any] = {"batch_size": run["batch_size"], "part_rows": rows, "stop": stopping} | answers
            how["on_error"] = "fail" if on_error == "fail" else "record"

            def show(counts: bulk.Counts) -> None:
                advance({"images": counts.images, "failed": counts.failed})

            if cluster is None:
                counts = bulk.run(classifier, parts, parts.to_do(), on_batch=show, **how)
            else:
                from opsin import cluster as ray

                gpus = gpus_per_worker if gpus_per_worker is not None else int(classifier.device.type == "cuda")
                counts = ray.run(
                    load,
                    parts,
                    parts.to_do(),
                    address=cluster,
                    workers=workers,
                    gpus_per_worker=gpus,
                    cpus_per_worker=cpus_per_worker,
                    on_counts=show,
                    **how,
                )
    except KeyboardInterrupt:
        say(f"interrupted; the last part is not written. Go on with: {again()}")
        sys.exit(INTERRUPTED)
    except BulkError as error:  # --on-error fail, or what stops a cluster
        say(f"{error}\nGo on with: {again()}")
        sys.exit(SOME_FAILED)
    except (DataError, MissingExtra, ModelError) as error:
        say(str(error))
        sys.exit(USAGE)
    except OSError as error:
        say(f"go on with: {again()}")
        not_written(error, out)
    if errors is not None:
        try:
            with errors.open("w", encoding="utf-8") as file:
                file.writelines(f"{json_line(row)}\n" for row in bulk.errors(out))
        except OSError as error:
            not_written(error, errors)
    if stopping.asked:
        say(f"stopped after {counts.images:,} images; go on with: {again()}")
        sys.exit(INTERRUPTED)
    if not parts.num_blocks:
        say(f"no images in {', '.join(paths)}")
    say(f"{counts.images:,} images, {counts.failed:,} of them errors, in {out}")
    sys.exit(SOME_FAILED if counts.failed else ALL_GOOD)


def blocks(paths: tuple[str, ...], rows: int) -> "Iterator[Block]":
    from opsin.data.inputs import Block, plan

    if paths == ("-",):
        lines = stdin_paths()
        return (Block("files", some) for some in iter(lambda: tuple(islice(lines, rows)), ()))
    return plan(paths, rows=rows)


def again() -> str:
    """The command that goes on."""
    words = ["opsin", *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


class Stop:
    """The first Ctrl-C or SIGTERM asks to stop after the batch in hand, the second interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("stopping after the images in hand; again to stop at once")

    def __call__(self) -> bool:
        return self.asked
