"""`opsin train`, `evaluate` and `doctor`."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import (
    ALL_GOOD,
    DEFAULT_MODEL,
    INTERRUPTED,
    NOT_WRITTEN,
    SOME_FAILED,
    USAGE,
    answering,
    fail,
    load_model,
    parts,
    printable,
    say,
)

if TYPE_CHECKING:
    from opsin.train.config import TrainConfig

# what a method does without --recipe
DEFAULT_RECIPES = {
    "probe": "linear_probe",
    "fewshot": "few_shot",
    "finetune": "photos",
    "lora": "lora",
    "pretrain": "vit_tiny",
}


@click.command(short_help="Train a classifier on a folder of photos, or by a paper's recipe.")
@click.argument("data", nargs=-1)
@click.option("--data", "more_data", multiple=True, metavar="DATA", help="The same as the argument.")
@click.option("--method", type=click.Choice(list(DEFAULT_RECIPES)), help="Without it a probe, or what --recipe says.")
@click.option("--recipe", "recipe_name", metavar="NAME", help="A paper's recipe; --list names all.")
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes.")
@click.option("--model", metavar="NAME", help="What to begin with: hub id, folder, file, or a name of `opsin models`.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of the run; without it runs/1, runs/2, …",
)
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Of a probe: iterations of its solver.")
@click.option("--steps", type=click.IntRange(1), help="Of the optimiser, instead of epochs.")
@click.option("--batch-size", type=click.IntRange(1))
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate of the whole batch.")
@click.option("--image-size", "--img-size", type=click.IntRange(1), metavar="PIXELS")
@click.option("--seed", type=click.IntRange(0))
@click.option(
    "--holdout",
    type=click.FloatRange(0, 0.5),
    metavar="SHARE",
    help="Of each class, to measure on, where the data have no division of their own.",
)
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Of the images may be unreadable before the run stops. [default: 1 %, or 5 images]",
)
@click.option("--workers", type=click.IntRange(0), help="Processes that read images.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other setting of the recipe.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--dry-run", is_flag=True, help="Print the plan, its memory and cost, and stop.")
@click.option(
    "--resume",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Go on with the run in this folder.",
)
def train(
    data: tuple[str, ...], more_data: tuple[str, ...], list_recipes: bool, resume: Path | None, out: Path | None,
    device: str, dry_run: bool, **options: Any,
) -> None:  # fmt: skip
    """Train a classifier of your own: on folders of photos, one a class, or by a paper's recipe.

    \b
    opsin train photos/                                          # a probe: minutes
    opsin train photos/ --method finetune --model google/vit-base-patch16-224 --image-size 384
    opsin train --recipe vit_l16_in21k --data /imagenet21k --dry-run
    torchrun --nproc-per-node 8 -m opsin train --recipe vit_l16_in21k --data 'shards/{0000..4095}.tar'
    opsin train --resume runs/1

    DATA is a folder with a folder for each class, a CSV or Parquet file, WebDataset or ImageNet tar files,
    Tiny-ImageNet, or the id of a data set on the hub. The run's folder is a model:
    `opsin classify x.jpg --model runs/1`.
    """
    if list_recipes:
        show_recipes()
        return
    from opsin.device import find_device
    from opsin.errors import DataError, MissingExtra, ModelError, OpsinError

    data = data + more_data
    given = [name for name, value in options.items() if value not in (None, ())]
    if resume is not None and (data or given or out or dry_run):
        raise click.UsageError("--resume goes on with the run as it is; it takes --device and nothing else.")
    try:
        find_device(device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    config = None if resume is not None else make_config(**options)
    if config is not None and not data and not dry_run:
        raise click.UsageError("no data: name a folder of photos with a folder for each class, or --data.")
    try:
        if dry_run:
            assert config is not None
            dry(config, list(data), device)
            return
        finished = run(config, list(data), resume, out, device)
    except ModelError as error:
        fail(error)
    except (DataError, MissingExtra) as error:
        say(str(error))
        sys.exit(USAGE)
    except OpsinError as error:
        say(str(error))
        sys.exit(NOT_WRITTEN)
    except OSError as error:
        say(f"the run cannot be written: {error.strerror or error}")
        sys.exit(NOT_WRITTEN)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)
    except (RuntimeError, MemoryError) as error:  # torch's own errors have many forms
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        say(f"not enough memory: {str(error).splitlines()[0]}")
        say(
            "use a smaller --batch-size, --set micro_batch_size=N (gradients are accumulated), "
            "--set gradient_checkpointing=true or a smaller --image-size"
        )
        sys.exit(NOT_WRITTEN)
    sys.exit(ALL_GOOD if finished else INTERRUPTED)


def make_config(
    *, method: str | None, recipe_name: str | None, model: str | None, epochs: float | None, steps: int | None,
    settings: tuple[str, ...], **options: Any,
) -> "TrainConfig":  # fmt: skip
    """The recipe, with what the command line says otherwise."""
    from opsin.errors import TrainError
    from opsin.recipes import recipe
    from opsin.train.config import with_settings

    if epochs is not None and steps is not None:
        raise click.UsageError("--epochs and --steps both say how long; give one.")
    try:
        config = recipe(recipe_name or DEFAULT_RECIPES[method or "probe"])
        changes = {name: value for name, value in options.items() if value is not None}
        changes |= {"method": method} if method else {}
        changes |= {"init": model} if model else {}
        if epochs is not None:
            changes |= {"epochs": epochs, "steps": None}
        if steps is not None:
            changes |= {"steps": steps, "epochs": None}
        return with_settings(replace(config, **changes), settings)
    except (ValueError, TrainError) as error:
        raise click.UsageError(str(error)) from None


def run(config: "TrainConfig | None", data: list[str], resume: Path | None, out: Path | None, device: str) -> bool:
    """Begin or go on with a run; True if it came to its end."""
    from opsin.train import run as runs
    from opsin.train.process import process

    with process(device) as this:
        folder = resume
        if folder is None:
            assert config is not None
            if this.is_main:
                folder = out or runs.next_folder(Path("runs"))
                runs.begin(folder, config, data)
            (folder,) = [path for path in this.gather([folder]) if path is not None]
        config, _ = runs.read(folder)
        began = resume is None and this.is_main
        with (
            taking_back(folder if began else None),
            stopping(config.method) as flag,
            reporting(config, this.is_main) as report,
        ):
            summary = runs.go(
                folder,
                this,
                cache=Path(os.environ.get("OPSIN_CACHE", "~/.cache/opsin")).expanduser() / "features",
                on_start=report.start,
                on_metrics=report.metrics,
                on_images=report.images,
                stopping=flag.is_set,
            )
        if this.is_main:
            show_summary(summary)
        return summary.finished


@contextmanager
def taking_back(folder: Path | None) -> Iterator[None]:
    """A run that failed before its first step leaves no folder that the corrected command would stumble over."""
    from opsin.errors import OpsinError
    from opsin.train.run import abandon

    try:
        yield
    except OpsinError:
        if folder is not None:
            abandon(folder)
        raise


@contextmanager
def stopping(method: str) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, so that a step is finished and its state written."""
    flag = threading.Event()
    if method in ("probe", "fewshot"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield flag
        return

    def handle(number: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        say("stopping after this step; once more to stop at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Report:
    """Progress of a run on standard error: a bar on a terminal; elsewhere a line an evaluation, and a minute."""

    def __init__(self, config: "TrainConfig", bar: Any, *, silent: bool = False) -> None:
        self.config, self.bar, self.silent = config, bar, silent
        self.steps = self.first = 0
        self.started = self.said = time.monotonic()
        self.seen, self.images_from = 0, (self.started, 0)  # of a pass over images: so many, since when, from how many
        self.task = None if bar is None else bar.add_task("", total=None)

    def start(self, facts: dict[str, Any]) -> None:
        self.steps, self.first, self.started = facts["steps"] or 0, facts["step"], time.monotonic()
        model = self.config.init or self.config.model.__class__.__name__.removesuffix("Config")
        text = f"{facts['method']} of {model}: {facts['images']:,} images of {facts['classes']} classes, "
        text += f"{facts['held_out']:,} held out"
        if facts.get("reused"):
            text += f"; {facts['reused']} classes of the old head reused"
        if facts["processes"] > 1:
            text += f"; {facts['processes']} processes"
        if facts["step"]:
            text += f"; going on from step {facts['step']}"
        say(text)

    def images(self, done: int, total: int) -> None:
        if done <= self.seen or not self.seen:  # the first batch of a pass: what follows is timed
            self.images_from = time.monotonic(), done
        (start, before), self.seen = self.images_from, done
        rate = max(done - before, 1) / max(time.monotonic() - start, 1e-3)
        self.show(done, total, f"{done:,} of {total:,} images, {rate:.0f} images/s, ETA {span((total - done) / rate)}")

    def metrics(self, record: dict[str, Any]) -> None:
        step, steps = record["step"], max(self.steps, record["step"])
        pace = (time.monotonic() - self.started) / max(step - self.first, 1)
        text = f"step {step:,} of {steps:,}, loss {record['loss']:.3f}"
        if "images_per_s" in record:
            text += f", {record['images_per_s']:.0f} images/s, ETA {span(pace * (steps - step))}"
        if "mfu" in record:
            text += f", MFU {record['mfu']:.0%}"
        if "val_loss" in record:
            text += f", held out: loss {record['val_loss']:.3f}"
        if "top1" in record:
            text += f", top-1 {record['top1']:.1%}"
        if record.get("bad_images"):
            text += f", {record['bad_images']} images unreadable"
        self.show(step, steps, text, now="val_loss" in record)

    def show(self, done: int, total: int, text: str, *, now: bool = False) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=text)
        if self.silent:
            return
        if now or (self.bar is None and time.monotonic() - self.said > 60):
            self.said = time.monotonic()
            say(text)


@contextmanager
def reporting(config: "TrainConfig", is_main: bool) -> Iterator[Report]:
    if not is_main or not sys.stderr.isatty():
        yield Report(config, None, silent=not is_main)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        yield Report(config, bar)


def span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def show_summary(summary: Any) -> None:
    folder = printable(str(summary.folder))
    if not summary.finished:
        say(f"stopped; go on with: opsin train --resume {folder}")
        return
    if not sys.stdout.isatty():
        record = {"run": str(summary.folder), "bad_images": summary.num_bad}
        for name in ("top1", "top5", "mean_average_precision"):
            if getattr(summary, name) is not None:
                record[name] = getattr(summary, name)
        print(json.dumps(record), flush=True)
        return
    if summary.top1 is not None:
        click.echo(f"top-1 {summary.top1:.1%}, top-5 {summary.top5:.1%} on the held-out images")
    if summary.mean_average_precision is not None:
        click.echo(f"mean average precision {summary.mean_average_precision:.1%} on the held-out images")
    click.echo(f"{folder} is a model:  opsin classify photo.jpg --model {folder}")


def dry(config: "TrainConfig", data: list[str], device: str) -> None:
    """Print what a run would be, without doing any of it."""
    from opsin.data import open_samples
    from opsin.data.samples import split
    from opsin.device import find_device
    from opsin.labels import Labels
    from opsin.train import run as runs
    from opsin.train.config import to_dict
    from opsin.train.plan import peak_flops

    world = int(os.environ.get("WORLD_SIZE", 1))
    if data:
        samples = open_samples(data)
        labels, num_images = samples.labels, len(split(samples, config.holdout)[0])
    elif config.num_images and config.model:
        labels, num_images = Labels.numbered(config.model.num_classes), config.num_images
    else:
        raise click.UsageError("no data, and the recipe alone does not give classes and images: name a folder.")
    cost = runs.estimate(config, labels, num_images, world)
    peak = peak_flops(find_device(device), config.precision)
    hours_here = cost.flops / (0.4 * peak * world) / 3600 if peak else None
    h100_hours = cost.flops / (0.4 * 989e12) / 3600
    plan = {
        "training_images": num_images,
        "classes": len(labels),
        **cost.to_dict(),
        "hours_here_at_40_percent": hours_here,
        "h100_hours_at_40_percent": h100_hours,
    }
    if not sys.stdout.isatty():
        print(json.dumps(plan | {"config": to_dict(config)}), flush=True)
        return
    rows = {
        "method": f"{config.method}, {config.optimizer}, learning rate {config.lr:g}, {config.schedule}",
        "data": f"{num_images:,} images of {len(labels):,} classes",
        "model": f"{cost.params / 1e6:.1f}M parameters",
        "length": f"{cost.steps:,} steps of {config.batch_size}, {cost.images / num_images:.1f} epochs",
        "operations": f"{cost.flops:.3g} FLOP",
        "memory": f"{cost.weight_bytes / 1e9:.2f} GB of weights and optimiser, "
        f"about {cost.activation_bytes / 1e9:.2f} GB of activations",
        "time here": f"{span(hours_here * 3600)}, at 40 % of the peak" if hours_here else "–",
        "H100": f"{h100_hours:,.1f} device-hours, at 40 % of its peak",
    }
    for name, value in rows.items():
        click.echo(f"{name:12} {value}")


def show_recipes() -> None:
    from opsin.recipes import summaries

    for name, text in summaries().items():
        click.echo(f"{name:28} {text}" if sys.stdout.isatty() else json.dumps({"recipe": name, "summary": text}))


@click.command("evaluate", short_help="Score a model on labelled images.")
@click.argument("data", nargs=-1, required=True)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="Also the folder of a run.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write evaluation.json, evaluation.md, confusion.png, reliability.png and errors.jsonl.",
)
@click.option("--split", metavar="NAME", help="train, val, … of data that are divided. [default: the held-out images]")
@click.option("--against", metavar="NAME", help="A second model: where do the two differ?")
@click.option("--train", "train_data", metavar="DATA", help="Labelled images for k-NN and few-shot scores.")
@click.option(
    "--real",
    "--real-labels",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="ImageNet ReaL's real.json.",
)
@click.option("--partial", is_flag=True, help="Allow classes of the model without an image.")
@click.option("--calibrate", is_flag=True, help="Fit a temperature and store it with the model, a folder here.")
@click.option("--unknown-from", multiple=True, metavar="PHOTOS",
              help="Images of none of the classes: learn what they look like to the model, a folder here, for "
              "`opsin classify --unknown`. A folder, file or pattern; may be given again.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
def evaluate_command(
    data: tuple[str, ...], model: str, out: Path | None, split: str | None, against: str | None,
    train_data: str | None, real: Path | None, partial: bool, calibrate: bool, unknown_from: tuple[str, ...],
    batch_size: int, **options: Any,
) -> None:  # fmt: skip
    """Score a model on labelled images: accuracy, errors by class, calibration.

    \b
    opsin evaluate photos/val --model runs/1 --out report/
    opsin evaluate /imagenet/val --model google/vit-large-patch16-224 --real real.json
    opsin evaluate photos/ --model runs/1 --against runs/2
    opsin evaluate photos/val --model runs/1 --unknown-from other_photos/

    DATA is what `opsin train` takes; its classes are the model's by name or WordNet id, never by order. Markdown on a
    terminal, JSON in a pipe. An image that cannot be read is named, and is in no figure.
    """
    from opsin import checkpoints, evaluate
    from opsin.data import open_samples
    from opsin.errors import DataError, MissingExtra, ModelError, NoHead
    from opsin.results import json_line

    if (calibrate or unknown_from) and not Path(model).is_dir():
        raise click.BadParameter(
            f'"{model}" is not a folder here, so nothing can be stored in it.', param_hint="--model"
        )
    try:
        samples = open_samples(list(data), split=split)
        second = load_model("classify", model=against, **options | {"revision": None}) if against else None
        classifier = load_model("classify", model=model, **options)
        if calibrate and classifier.source.format not in ("opsin", "transformers"):
            raise ModelError(f"{model} is a {classifier.source.format} model, which opsin reads and does not write.")
        if classifier.labels is None:
            raise NoHead(f"{model} has no classification head, so there is nothing to score: train one, `opsin train`.")
        if unknown_from and classifier.labels.multi_label:
            raise click.UsageError(
                "--unknown-from is for one class an image; a model of several says by itself that it sees none of "
                "them: no score above one half."
            )
        evaluate.align(samples, classifier.labels, partial=partial)
        rows = held_out_rows(samples) if split is None else range(len(samples))
        with answering(out), parts("images") as advance:
            found = evaluate.predict(
                classifier,
                samples,
                rows,
                batch_size=batch_size,
                features=train_data is not None or bool(unknown_from),
                on_batch=advance,
            )
            targets = samples.targets[found.rows]
            if not found.ok.any():
                raise DataError(f"none of the {len(found.ok)} images can be read; the first: {found.errors[0].message}")
            result = evaluate.metrics(found.logits[found.ok], targets[found.ok], classifier.labels)
            facts: dict[str, Any] = {"model": model, "sha256": classifier.source.sha256, "data": " ".join(data)}
            if real is not None:
                facts |= real_scores(real, found, classifier.labels)
            if train_data is not None:
                facts |= feature_scores(classifier, train_data, found, targets, batch_size, advance)
            shown = show_others(classifier, samples, found, unknown_from, batch_size, advance) if unknown_from else None
            if calibrate:
                facts["temperature"] = temperature = evaluate.fit_temperature(
                    found.logits[found.ok], targets[found.ok], multi_label=classifier.labels.multi_label
                )
                with keeping_unknown(Path(model), classifier.model, temperature):
                    evaluate.calibrate(classifier.model, temperature)
                    write = checkpoints.write if classifier.source.format == "opsin" else checkpoints.write_hf
                    write(Path(model), classifier.model, classifier.preprocess, classifier.labels)
            if shown is not None:
                facts["unknown"] = store_unknown(Path(model), classifier.model, shown, facts.get("temperature", 1.0))
            differences = None
            if second is not None:
                other = evaluate.predict(second, samples, rows, batch_size=batch_size, on_batch=advance)
                differences = evaluate.agreement(found, other, targets)
            if out is not None:
                evaluate.report(out, result, found, facts=facts, against=differences)
        with answering():
            if sys.stdout.isatty():
                click.echo(evaluate.markdown(facts, result, found, differences), nl=False)
                if unknown_from:
                    click.echo(unknown_markdown(facts["unknown"]), nl=False)
            else:
                record = facts | {"bad_images": len(found.errors)} | result.to_dict()
                print(json_line(record | ({} if differences is None else {"agreement": differences})), flush=True)
    except (ModelError, NoHead) as error:
        fail(error)
    except (DataError, MissingExtra) as error:
        say(str(error))
        sys.exit(USAGE)
    for bad in found.errors[:5]:
        say(bad.message)
    if found.errors:
        say(
            f"{len(found.errors)} of {len(found.ok)} images could not be read"
            + (f": {out}/errors.jsonl" if out else "")
        )
    sys.exit(SOME_FAILED if found.errors else ALL_GOOD)


def held_out_rows(samples: Any) -> Any:
    """The images that a set keeps apart for such a purpose; all, where it keeps none."""
    if samples.held_out is None or not samples.held_out.any():
        return range(len(samples))
    rows = samples.held_out.nonzero()[0]
    say(f"on the {len(rows):,} images that the data hold out; --split train for the others")
    return rows


def real_scores(path: Path, found: Any, labels: Any) -> dict[str, Any]:
    from opsin import evaluate

    sets = evaluate.real_sets(evaluate.load_real(path), found.keys, labels)
    kept = [each for each, ok in zip(sets, found.ok, strict=True) if ok]
    accuracy, counted = evaluate.real_accuracy(found.logits[found.ok].argmax(1), kept)
    return {"real_top1": accuracy, "real_images": counted}


def feature_scores(
    classifier: Any, train_data: str, found: Any, targets: Any, batch_size: int, advance: Callable[[int, int], None]
) -> dict[str, Any]:
    """k-NN and few-shot accuracy of the features alone."""
    from opsin import evaluate
    from opsin.data import open_samples
    from opsin.data.samples import split
    from opsin.train.probe import few_shot

    train_set = open_samples(train_data)
    if classifier.labels.multi_label:
        raise click.UsageError("--train is for one class an image; this model gives several.")
    evaluate.align(train_set, classifier.labels, partial=True)
    rows = split(train_set, 0)[0]
    bank = evaluate.predict(
        classifier, train_set, rows, logits=False, features=True, batch_size=batch_size, on_batch=advance
    )
    x, y = bank.features[bank.ok], train_set.targets[bank.rows[bank.ok]]
    test, truth = found.features[found.ok], targets[found.ok]
    nearest = evaluate.knn(x, y, test)
    return {"knn_top1": float((nearest == truth).mean()), "few_shot": few_shot(x, y, test, truth)}


def show_others(
    classifier: Any, samples: Any, found: Any, photos: tuple[str, ...], batch_size: int,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    """What `opsin.unknown.fit` takes. Means and neighbours come from images of the set that are not scored; where all
    are, from every other one of each class, and the rest measures."""
    import numpy as np

    from opsin import evaluate, unknown
    from opsin.data.files import find_images
    from opsin.data.samples import Files, Strings
    from opsin.labels import Labels

    paths = list(find_images(photos))
    nothing = Files(np.zeros(len(paths), np.int64), Labels(("none of them",)), None, root="", names=Strings.pack(paths))
    others = evaluate.predict(classifier, nothing, features=True, batch_size=batch_size, on_batch=advance)
    if others.errors:
        say(f"{len(others.errors)} of {len(paths)} images of other things cannot be read")
    rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(samples)), found.rows))
    if len(rest):
        rest = rest[unknown.places(samples.targets[rest]) < unknown.BANK_PER_CLASS]
        bank = evaluate.predict(
            classifier, samples, rest, logits=False, features=True, batch_size=batch_size, on_batch=advance
        )
        learn, measure = bank.ok, found.ok
    else:
        bank, even = found, unknown.places(samples.targets[found.rows]) % 2 == 0
        learn, measure = found.ok & even, found.ok & ~even
    return {
        "bank": bank.features[learn],
        "targets": samples.targets[bank.rows[learn]],
        "known": unknown.Answers(found.logits[measure], found.features[measure]),
        "others": unknown.Answers(others.logits[others.ok], others.features[others.ok]),
    }


@contextmanager
def keeping_unknown(folder: Path, model: Any, temperature: float) -> Iterator[None]:
    """What was stored for `--unknown` goes on to hold when the model's logits are divided by a temperature."""
    from opsin import unknown
    from opsin.errors import CheckpointError

    try:
        detector = unknown.read(folder, model)
    except CheckpointError as error:
        say(str(error))
        detector = None
    yield
    if detector is not None:
        unknown.write(folder, unknown.rescaled(detector, temperature, unknown.fingerprint(model)))


def store_unknown(folder: Path, model: Any, shown: dict[str, Any], temperature: float) -> dict[str, Any]:
    """Fit, write into the model's folder, and say what was measured."""
    from opsin import unknown

    for name in ("known", "others"):
        shown[name] = shown[name]._replace(logits=shown[name].logits / temperature)
    detector, qualities = unknown.fit(**shown, head=unknown.fingerprint(model))
    unknown.write(folder, detector)
    return {
        "method": detector.method,
        "images": detector.num_known,
        "other_images": detector.num_others,
        "detectors": {method: quality._asdict() for method, quality in qualities.items()},
        "false_reject": {str(rate): detector.false_reject(rate) for rate in (0.01, 0.05, 0.1, 0.2)},
    }


def unknown_markdown(facts: dict[str, Any]) -> str:
    lines = ["", "## Images of none of the classes", "", "| | AUROC | FPR95 |", "|---|---:|---:|"]
    for method, quality in facts["detectors"].items():
        stored = ", stored" if method == facts["method"] else ""
        lines.append(f"| {method}{stored} | {quality['auroc']:.3f} | {quality['fpr95']:.1%} |")
    lines += ["", "| `--unknown`: others taken for known | known taken for others |", "|---:|---:|"]
    lines += [f"| {float(rate):.0%} | {share:.1%} |" for rate, share in facts["false_reject"].items()]
    count = f"{facts['images']:,} images of the classes and {facts['other_images']:,} others"
    return "\n".join([*lines, "", f"Measured on {count}, which had no part in the fit."]) + "\n"


@click.command(short_help="Look for what is wrong with a folder of images.")
@click.argument("data", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write doctor.json, doctor.md and a contact sheet.",
)
@click.option("--max-pixels", type=click.IntRange(1), metavar="N", help="Count larger images as unreadable.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that decode.")
def doctor(data: tuple[str, ...], out: Path | None, max_pixels: int | None, workers: int) -> None:
    """Look for what is wrong with images: unreadable, doubled, tiny, turned by EXIF, of odd modes.

    Of labelled data (what `opsin train` takes) also pictures that are both trained on and held out, pictures with two
    labels, and classes that are small or doubled. Other folders, files and patterns are looked through as they are.
    Markdown on a terminal, JSON in a pipe.
    """
    from opsin.data import open_samples
    from opsin.data.files import find_images
    from opsin.doctor import contact_sheet, examine
    from opsin.errors import DataError, MissingExtra
    from opsin.preprocess import MAX_PIXELS, decode
    from opsin.results import json_line

    limit = max_pixels or MAX_PIXELS
    try:
        samples: Any = open_samples(list(data))
        total = len(samples)
    except DataError as error:
        samples = list(find_images(data))
        total = len(samples)
        if not samples:
            say(str(error))
            sys.exit(USAGE)
        say("no classes here: the images are examined without labels")
    except MissingExtra as error:
        say(str(error))
        sys.exit(USAGE)
    with answering(out):
        done = 0

        with parts("images") as advance:

            def looked_at(key: str) -> None:
                nonlocal done
                done += 1
                advance(done, total)

            report = examine(samples, max_pixels=limit, workers=workers, on_image=looked_at)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "doctor.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
            (out / "doctor.md").write_text(report.to_markdown(), encoding="utf-8")
            keys = {} if isinstance(samples, list) else {samples.key(i): i for i in range(len(samples))}
            contact_sheet(
                out / "contact_sheet.jpg",
                report.findings,
                lambda key: decode(samples.source(keys[key]) if keys else key, max_pixels=limit),
            )
        print(report.to_markdown() if sys.stdout.isatty() else json_line(report.to_dict()), flush=True)
    sys.exit(SOME_FAILED if report.counts.get("unreadable") else ALL_GOOD)
