"""`opsin export`: a model as a file of another runtime or library."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import DEFAULT_MODEL, NOT_WRITTEN, answering, fail, load_model, parts, printable, say

if TYPE_CHECKING:
    from opsin.export import Exported


@click.command(short_help="Write a model for another runtime or library.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="Hub id, folder or file.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
@click.option(
    "--to",
    required=True,
    metavar="FORMAT",
    help="onnx, openvino or torch: a graph from photos to probabilities. transformers, timm, npz, pystate or "
    "opsin: weights as that library reads them.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="m.onnx, m.xml or m.pt2; a folder or file for the libraries.",
)
@click.option(
    "--dtype", default="fp32", show_default=True, metavar="TYPE", help="fp32, fp16, or int8 (onnx, openvino)."
)
@click.option(
    "--images",
    "photos",
    metavar="PHOTOS",
    help="A folder, file or pattern of images like those to come, to compare on and to calibrate int8 with. "
    "Without it, parts of three photos.",
)
@click.option("--tolerance", type=click.FloatRange(0, 1), metavar="SHARE", show_default="0.01",
              help="Of images whose best label may differ.")  # fmt: skip
def export(
    model: str, revision: str | None, to: str, out: Path, dtype: str, photos: str | None, tolerance: float | None
) -> None:
    """Write a model for another runtime or library, run it on 100 images and more, and keep it if it agrees.

    A graph takes upright RGB images, uint8 (batch, height, width, 3), of any size, and gives probabilities and logits:
    resize, crop and normalisation are inside, byte for byte those of opsin; labels are in its metadata. Prints what was
    measured, as JSON in a pipe.
    """
    from opsin import export as exports
    from opsin.data.files import find_images
    from opsin.errors import ExportError, MissingExtra, ModelError
    from opsin.results import json_line

    try:
        classifier = load_model("embed", model=model, revision=revision, dtype="fp32", device="cpu")
        images = list(find_images([photos])) if photos else None
        if images == []:
            raise click.BadParameter(f'no images in "{photos}".', param_hint="--images")
        with answering(out), parts("images") as progress:
            done = exports.export(
                classifier, out, to=to, dtype=dtype, images=images, tolerance=tolerance, progress=progress
            )
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=_option(str(error))) from None
    except ExportError as error:
        say(str(error))
        sys.exit(NOT_WRITTEN)
    except (ModelError, MissingExtra) as error:
        fail(error)
    if sys.stdout.isatty():
        for line in rows(done):
            click.echo(printable(line))
    else:
        print(json_line(summary(done)), flush=True)


def _option(message: str) -> str:
    """Which option a message is about."""
    starts = {"to is": "--to", "dtype is": "--dtype", "int8 needs": "--images", "images": "--images",
              "tolerance": "--tolerance"}  # fmt: skip
    return next((option for start, option in starts.items() if message.startswith(start)), "--out")


def summary(done: "Exported") -> dict[str, Any]:
    record: dict[str, Any] = {"path": str(done.path), "to": done.to, "dtype": done.dtype, "bytes": done.bytes}
    if done.comparison is not None:
        found = done.comparison
        record |= {
            "images": found.images,
            "agreement": round(found.agreement, 4),
            "drift_max": float(f"{found.drift_max:.3g}"),
            "drift_mean": float(f"{found.drift_mean:.3g}"),
            "network_drift_relative": float(f"{found.network_drift_relative:.3g}"),
            "pixels_drift_max": round(found.pixels_drift_max, 3),
            "pixels_drift_share": float(f"{found.pixels_drift_share:.3g}"),
            "left_out": list(done.left_out),
        }
    return record


def rows(done: "Exported") -> list[str]:
    """The same for people."""
    lines = [f"{done.path}  {done.to} {done.dtype}, {done.bytes / 1e6:.1f} MB"]
    if done.comparison is None:
        return [*lines, f"next: opsin classify photos/ --model {done.path}"]
    found = done.comparison
    lines += [
        f"  best label   {found.agreement:.1%} as opsin's fp32, on {found.images} images",
        f"  logits       {found.drift_max:.2g} off at most, {found.drift_mean:.2g} on average",
        f"  network      {found.network_drift_relative:.1e} of the largest logit, from the same pixels",
        f"  pixels       {found.pixels_drift_max:.2g} of 255 off at most, {found.pixels_drift_share:.2%} differ",
    ]
    if done.left_out:
        lines.append(f"  fp32         {', '.join(done.left_out)}")
    return lines
