"""`opsin bench`."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from opsin.cli.output import ALL_GOOD, DEFAULT_MODEL, SOME_FAILED, USAGE, answering, fail, parts, say

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Measure how fast a model runs here, beside other libraries.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="Hub id, folder or file.")
@click.option(
    "--vs",
    default="",
    metavar="LIST",
    help="Libraries to run the same weights in: transformers, timm, openvino, onnxruntime, with commas.",
)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Turns of each contender.")
@click.option(
    "--images",
    type=click.Path(exists=True),
    metavar="FOLDER",
    help="Photos: some calibrate int8, on the others agreement with fp32 is measured. Without them no int8.",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Without it, what torch takes: every core.")
@click.option("--memory", is_flag=True, help="Also the peak of each contender, in a process of its own.")
@click.option("--out", type=FILE, metavar="FILE", help="Write everything measured as JSON, too.")
@click.option("--picture", type=FILE, metavar="FILE", help="Draw the speeds: a .png file.")
def bench(
    model: str,
    vs: str,
    batch_size: int,
    rounds: int,
    images: str | None,
    threads: int | None,
    memory: bool,
    out: Path | None,
    picture: Path | None,
) -> None:
    """Measure how fast a model runs on this CPU, plain and in each precision, beside other libraries.

    The contenders take turns in one process; medians are compared, and what speed costs is measured: how often the best
    label is that of the plain fp32 model, and how far logits move. A table on a terminal, a JSON line in a pipe.
    """
    versus = tuple(name.strip() for name in vs.split(",") if name.strip())
    for option, path in (("--out", out), ("--picture", picture)):
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f'the folder "{path.parent}" does not exist.', param_hint=option)
    if picture is not None and picture.suffix.lower() != ".png":
        raise click.BadParameter(f'"{picture}" does not end in .png.', param_hint="--picture")

    import torch

    from opsin import plots
    from opsin.bench import bench as measure
    from opsin.bench import check_libraries
    from opsin.data.files import find_images
    from opsin.errors import DataError, MissingExtra, ModelError, NoHead
    from opsin.results import json_line

    try:
        check_libraries(versus, calibrated=images is not None)
    except (ValueError, MissingExtra) as error:
        raise click.BadParameter(str(error), param_hint="--vs") from None
    try:
        if picture is not None:
            plots.require()
    except MissingExtra as error:
        raise click.BadParameter(str(error), param_hint="--picture") from None
    files = [] if images is None else list(find_images([images]))
    if images is not None and not files:
        say(f"no images in {images}")
        sys.exit(USAGE)
    if threads is not None:
        torch.set_num_threads(threads)
    with answering(out or picture):
        try:
            with parts("steps") as advance:
                report = measure(
                    model, versus=versus, batch_size=batch_size, rounds=rounds, images=files, memory=memory,
                    progress=advance,
                )  # fmt: skip
        except (ModelError, NoHead) as error:
            fail(error)
        except DataError as error:
            say(str(error))
            sys.exit(USAGE)
        record = report.as_dict()
        if out is not None:
            out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            plots.bars(picture, record["contenders"], title=heading(record), baseline=record["baseline"])
        if sys.stdout.isatty():
            show_report(record)
        else:
            print(json_line(record), flush=True)
        for row in record["skipped"]:
            say(f"{row['name']} {row['precision']} was left out: {row['reason']}")
        for line in record["notes"]:
            say(line)
        unreadable = record["unreadable"]
        if unreadable:
            say(f"{len(unreadable)} of {len(files)} images were left out. The first: {unreadable[0]}")
    sys.exit(SOME_FAILED if unreadable else ALL_GOOD)


def heading(record: dict[str, Any]) -> str:
    """Two lines: what was measured, and on what."""
    machine, (height, width) = record["machine"], record["image_size"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return (
        f"{record['model']}, {height} × {width} pixels, batch {record['batch_size']}, {record['rounds']} rounds\n"
        f"{machine['cpu']}, {threads}, torch {machine['versions']['torch']}"
    )


def show_report(record: dict[str, Any]) -> None:
    """The table for people, and what its figures mean."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = record["contenders"]
    agreed, measured = record["images"] > 0, any(row["memory_bytes"] for row in rows)
    table = Table(box=None, pad_edge=False)
    table.add_column("contender")
    table.add_column("precision")
    for column in ("images/s", "quartiles", "ratio", "of peak"):
        table.add_column(column, justify="right")
    if agreed:
        table.add_column("same label", justify="right")
    table.add_column("drift", justify="right")
    table.add_column("of σ", justify="right")
    if measured:
        table.add_column("memory", justify="right")
    for row in rows:
        low, high = row["images_per_s_quartiles"]
        cells = [row["name"], row["precision"], f"{row['images_per_s']:.1f}", f"{low:.1f}–{high:.1f}"]
        cells += [f"{row['ratio']:.2f}×", "–" if row["peak_share"] is None else f"{row['peak_share']:.0%}"]
        if agreed:
            cells.append(f"{row['agreement']:.2%}")
        cells += [f"{row['drift']:.2g}", f"{row['drift_relative']:.2%}"]
        if measured:
            cells.append("–" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f} MiB")
        table.add_row(*cells, style="bold" if row["name"] == "opsin" else "")
    peaks = ", ".join(f"{precision} {rate:,.0f}" for precision, rate in record["peaks"].items())
    console = Console()
    console.print(Text(heading(record)))
    console.print(table)
    lines = [
        f"ratio: to {record['baseline']}",
        f"peak: of one matrix product, GFLOP/s: {peaks}; logits depend on {record['gflops']:.1f} GFLOP an image",
        "drift: largest difference of a logit from the plain fp32 model's; σ is their standard deviation",
        f"measured on {record['images']} images, int8 calibrated on {record['calibration_images']} others"
        if agreed
        else "measured on noise; --images FOLDER also tells how often the best label is the same",
    ]
    for line in lines:
        console.print(Text(line, style="dim"))
