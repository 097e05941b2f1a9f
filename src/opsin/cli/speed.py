"""What runs a model fast: the options that `classify` and `embed` share, the autopilot, `opsin optimize`."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import DEFAULT_MODEL, answering, fail, load_model, parts, say

if TYPE_CHECKING:
    from opsin.autopilot import Choice
    from opsin.pipeline import Classifier

MAX_BUDGET = 0.2
DRIFT_IMAGES = 16  # that --decode fast is compared on


class Share(click.ParamType):
    """`1%` or `0.01`, of which `fits` says whether it is in range."""

    name = "share"

    def __init__(self, fits: Callable[[float], bool], expected: str) -> None:
        self.fits, self.expected = fits, expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(%?)", value.strip())
        share = float(found[1]) / (100 if found[2] else 1) if found else -1.0
        if not self.fits(share):
            self.fail(f'"{value}" is not a share {self.expected}', param, ctx)
        return share


BUDGET = Share(lambda share: 0 <= share <= MAX_BUDGET, f"between 0 and {MAX_BUDGET:.0%}, such as 1% or 0.01.")
RATE = Share(  # of an option that may stand without a value, and so takes the next word for one
    lambda share: 0 < share < 1,
    "between 0 and 100%, such as 5% or 0.05. Without a share, the option stands behind the images.",
)


def speed_options(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(
        [
            click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "int8", "fp16", "fp8"]), default="auto",
                         show_default=True,
                         help="fp32 is the exact reference; auto is bf16 where the CPU has it, equal to two digits."),
            click.option("--engine", type=click.Choice(["auto", "torch", "openvino"]), default="auto",
                         show_default=True, help="What computes."),
            click.option("--decode", type=click.Choice(["exact", "fast"]), default="exact", show_default=True,
                         help="fast reads large JPEGs at a fraction of their size."),
            click.option("--budget", type=BUDGET, metavar="SHARE",
                         help="Try what is fast here, and take the fastest whose best label differs from fp32's on at "
                         "most this share of the images: 1% or 0.01. Remembered."),
        ]
    ):  # fmt: skip
        command = decorate(command)
    return command


def autopilot(
    classifier: "Classifier", images: Callable[[], Sequence[str]], budget: float, *, engine: str, dtype: str
) -> "Choice":
    """The remembered choice, or a new one from some of the images; the classifier runs so from now on."""
    from opsin.autopilot import choose, recall, remember
    from opsin.errors import DataError

    choice = recall(classifier, budget, engine, dtype)
    remembered = choice is not None
    try:
        if choice is None:
            with parts("candidates") as progress:
                choice = choose(classifier, images(), budget, engine=engine, dtype=dtype, progress=progress)
    except DataError as error:
        raise click.BadParameter(str(error), param_hint="--budget") from None
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    if not remembered:
        for line in rows(choice):
            say(line)
        try:
            say(f"remembered in {remember(classifier, choice, engine, dtype)}")
        except OSError as error:  # a full disk, no home folder: it is measured again the next time
            say(f"not remembered: {error}")
    choice.apply(classifier)
    say(
        f"{'remembered' if remembered else 'chose'} {choice.dtype} ({choice.engine}), batches of {choice.batch_size}: "
        f"{choice.speedup:.1f}× the speed of plain fp32, its best label on {choice.agreed} of {choice.images} images "
        f"(budget {budget:.2%})"
    )
    if budget * choice.images < 1:
        say(f"on {choice.images} images a share below {3 / choice.images:.1%} cannot be told from none")
    return choice


def rows(choice: "Choice") -> list[str]:
    """What was tried, a line each."""
    lines = []
    for row in choice.tried:
        rate = "–" if row.images_per_s is None else f"{row.images_per_s:.1f} images/s"
        kept = f", {row.left_out} halves of layers not in int8" if row.left_out else ""
        lines.append(
            f"  {row.engine:8} {row.dtype:4}  {rate:>16}  agreed {row.agreed}/{choice.images}{kept}"
            + (f"  {row.reason}" if row.reason else "")
        )
    return lines


def say_drift(classifier: "Classifier", images: Sequence[str]) -> None:
    """How far the bytes of fast decoding are from exact ones, on some of the images."""
    from opsin.preprocess import drift

    count = min(len(images), DRIFT_IMAGES)
    some = [images[i * len(images) // count] for i in range(count)]
    try:
        found = drift(some, classifier.preprocess, max_pixels=classifier.max_pixels)
    except ValueError:  # none can be read: each will be a record
        return
    say(
        f"--decode fast: on {found.images} images bytes differ by {found.mean:.2f} on average, {found.max:g} at most "
        "(of 255)"
    )


@click.command(short_help="Write a folder that runs in int8.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="Hub id, folder or file.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
@click.option("--calibrate", "photos", required=True, metavar="PHOTOS",
              help="A folder, file or pattern of images like those to come; up to 256 are read.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="Must be new, or empty.")
@click.option("--budget", type=BUDGET, default=0.01, show_default="1%", metavar="SHARE",
              help="Of images whose best label may differ from fp32's.")  # fmt: skip
def optimize(model: str, revision: str | None, photos: str, out: Path, budget: float) -> None:
    """Write a folder that runs in int8 on CPUs that multiply it, measured on your photos.

    The weights stay the exact ones, so that --dtype fp32 is still the reference, and other CPUs run bf16 or fp32;
    beside them lie the ranges of the activations. Layers that lose too much stay in bf16. Prints what was measured, as
    JSON in a pipe; nothing is written if int8 is not within the budget.
    """
    from opsin.autopilot import optimise
    from opsin.data.files import find_images
    from opsin.errors import DataError, ModelError, NoHead

    try:
        classifier = load_model("embed", model=model, revision=revision, dtype="fp32", device="cpu")
        with answering(out), parts("candidates") as progress:
            choice = optimise(classifier, list(find_images([photos])), budget, out, progress=progress)
    except DataError as error:
        raise click.BadParameter(
            str(error), param_hint="--out" if "not empty" in str(error) else "--calibrate"
        ) from None
    except (ModelError, NoHead) as error:
        fail(error)
    kept = choice.tried[0]
    summary = {
        "out": str(out),
        "images": choice.images,
        "agreed": choice.agreed,
        "speedup": round(choice.speedup, 2),
        "images_per_s": round(kept.images_per_s or 0, 1),
        "halves_not_in_int8": kept.left_out,
    }
    if not sys.stdout.isatty():
        print(json.dumps(summary), flush=True)
        return
    click.echo(f"  best label of fp32 on {choice.agreed} of {choice.images} images that did not calibrate")
    click.echo(f"  {choice.speedup:.1f}× the speed of plain fp32, {kept.images_per_s:.1f} images/s in batches of 8")
    click.echo(f"  {kept.left_out} halves of layers stay in bf16 or fp32")
    click.echo(f"next: opsin classify photos/ --model {out}")
