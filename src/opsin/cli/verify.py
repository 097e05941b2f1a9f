"""`opsin verify` and `compare`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import (
    ALL_GOOD,
    SOME_FAILED,
    USAGE,
    answering,
    fail,
    load_model,
    parts,
    printable,
    say,
    stdin_paths,
)

if TYPE_CHECKING:
    from opsin.compare import Comparison
    from opsin.verify import Certificate


@click.command(short_help="Check a model against what was published of it.")
@click.argument("model", metavar="NAME")
@click.option("--as", "published_as", metavar="NAME", help="The hub id that a local copy is a copy of.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
@click.option("--picture", metavar="FILE", help="A copy of the reference picture, COCO val2017 39769; else fetched.")
@click.option("--data", multiple=True, metavar="DATA", help="The labelled images that the accuracy was published for.")
@click.option(
    "--real",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="ImageNet ReaL's real.json.",
)
@click.option("--protocol", metavar="NAME", help="squash, timm-crop, …: the preprocessing. [default: the first known]")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the certificate, JSON."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
def verify(
    model: str, data: tuple[str, ...], out: Path | None, device: str, **options: Any
) -> None:  # fmt: skip
    """Check a model against what its authors published: values on a picture, accuracy on ImageNet.

    \b
    opsin verify google/vit-base-patch16-224
    opsin verify google/vit-large-patch16-224 --data /imagenet/val --protocol timm-crop --out certificate.json
    opsin verify ./copy --as facebook/deit-base-distilled-patch16-224 --picture 000000039769.jpg
    opsin verify opsin/vit-tiny --data 'tiny-imagenet-200-train-shard*.zip'

    Everything runs in exact fp32. The certificate says what was checked, of which files and with which software. A
    table on a terminal, JSON in a pipe. Exit code 0: a check passed and none failed; 3: one failed, or none could be
    decided.
    """
    from opsin.checkpoints.files import replacing
    from opsin.data import open_samples
    from opsin.device import find_device
    from opsin.errors import DataError, MissingExtra, ModelError, NoHead
    from opsin.results import json_line
    from opsin.verify import verify as measure

    try:
        find_device(device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--device") from None
    try:
        samples = open_samples(list(data)) if data else None
        with answering(out):
            with parts("images") as advance:
                certificate = measure(model, data=samples, device=device, on_batch=advance, **options)
            if out is not None:
                text = json.dumps(certificate.to_dict(), ensure_ascii=False, indent=2) + "\n"
                with replacing(out) as part:
                    part.write_text(text, encoding="utf-8", errors="backslashreplace")
            if sys.stdout.isatty():
                show_certificate(certificate)
            else:
                print(json_line(certificate.to_dict()), flush=True)
    except (ModelError, NoHead) as error:
        fail(error)
    except (DataError, MissingExtra) as error:
        say(str(error))
        sys.exit(USAGE)
    unreadable = (certificate.facts["data"] or {}).get("unreadable", [])
    for bad in unreadable[:5]:
        say(bad["message"])
    if unreadable:
        say(f"{len(unreadable)} images could not be read")
    sys.exit(ALL_GOOD if certificate.verdict == "passed" else SOME_FAILED)


def show_certificate(certificate: "Certificate") -> None:
    """Each check with what was published, by whom, and what was found."""
    facts = certificate.facts
    origin = f"revision {facts['revision']}, " if facts["revision"] else ""
    click.secho(printable(f"{facts['model']}, {origin}sha256 {facts['sha256']}"), bold=True)
    if facts["protocol"] is not None:
        data = facts["data"]
        click.echo(f"{facts['protocol']['name']} on {data['images']:,} images, digest {data['digest'][:16]}")
    colours = {"passed": "green", "failed": "red", "no verdict": "yellow"}
    for check in certificate.checks:
        score = isinstance(check.found, float)
        off, allowed = (
            "–" if value is None else f"{value:.2f}" if score else f"{value:.1g}"
            for value in (check.difference, check.tolerance)
        )
        click.echo(f"{check.name:20} {click.style(check.verdict, fg=colours[check.verdict])}", nl=False)
        click.echo(f"  off by {off}{' points' if score else ''}, allowed {allowed}")
        for value, source in check.published:
            click.echo(f"  published  {figures(value)}  ({source})")
        click.echo(f"  found      {figures(check.found)}")
        if check.note:
            click.echo(f"  {printable(check.note)}")
    click.secho(certificate.verdict, bold=True, fg=colours[certificate.verdict])


def figures(value: Any) -> str:
    """A score in per cent, an array's values, labels with their probabilities."""
    if value is None:
        return "–"
    if not isinstance(value, list):
        return f"{value:g} %"
    if isinstance(value[0], list):
        return " | ".join(map(figures, value))
    if isinstance(value[0], dict):
        return ", ".join(f"{each['label'].split(',')[0]} {each['score']:.4f}" for each in value)
    return " ".join(f"{each:.4f}" for each in value)


# ── compare ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@click.command(short_help="Show where two models, engines or precisions disagree.")
@click.argument("a")
@click.argument("b")
@click.argument("photos", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write compare.json, disagreements.csv and a contact sheet, disagreements.png.",
)
@click.option("--limit", type=click.IntRange(0), default=24, show_default=True, help="Disagreements shown and drawn.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
def compare(
    a: str, b: str, photos: tuple[str, ...], out: Path | None, limit: int, batch_size: int, device: str
) -> None:
    """Show where two models, two engines or two precisions give photos different labels.

    \b
    opsin compare opsin/vit-tiny opsin/perceiver-tiny photos/
    opsin compare runs/1@fp32 runs/1@bf16 photos/ --out report/
    opsin compare google/vit-base-patch16-224@fp32 google/vit-base-patch16-224@openvino:bf16 'holiday/*.jpg'

    A and B are what `opsin classify` takes as --model, with @DTYPE or @ENGINE:DTYPE behind it; PHOTOS are files,
    folders, patterns or - as there, without labels. The widest disagreements come first. A table on a terminal, JSON in
    a pipe. A photo that cannot be read is named, and is in no figure.
    """
    from opsin.compare import compare as run
    from opsin.compare import report
    from opsin.data.files import find_images
    from opsin.errors import DataError, MissingExtra, ModelError, NoHead
    from opsin.results import json_line

    if photos.count("-") and len(photos) > 1:
        raise click.UsageError("- reads every path from standard input; give it alone.")
    try:
        models = [named_model(*each, device=device) for each in (("A", a), ("B", b))]
        with answering(out):
            with parts("photos") as advance:
                paths = stdin_paths() if photos == ("-",) else find_images(photos)
                found = run(models[0], models[1], paths, batch_size=batch_size, on_images=advance)
            names = [f"{model.source.name} ({model.engine}, {model.dtype})" for model in models]
            facts: dict[str, Any] = dict(zip(("a", "b"), names, strict=True))
            for key, model in zip(("a_sha256", "b_sha256"), models, strict=True):
                facts[key] = model.source.sha256
            if out is not None:
                report(out, found, facts, limit=limit)
            if sys.stdout.isatty():
                show_comparison(found, facts, limit)
            else:
                print(json_line(facts | found.to_dict(limit)), flush=True)
    except (ModelError, NoHead, MissingExtra) as error:
        fail(error)
    except (DataError, ValueError) as error:
        say(str(error))
        sys.exit(USAGE)
    for bad in found.errors[:5]:
        say(bad.message)
    if found.errors:
        say(f"{len(found.errors)} of {found.images + len(found.errors)} photos have no answer of both models")
    sys.exit(SOME_FAILED if found.errors else ALL_GOOD)


def named_model(argument: str, text: str, *, device: str) -> Any:
    """The model of `name@engine:dtype`, and errors that name the argument."""
    from opsin.compare import parse

    try:
        name, engine, dtype = parse(text)
        return load_model("embed", model=name, engine=engine, dtype=dtype, device=device)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=argument) from None
    except click.BadParameter as error:
        if error.param_hint in ("--engine", "--dtype"):  # which this command has in its arguments
            error.param_hint = argument
        raise


def show_comparison(found: "Comparison", facts: dict[str, Any], limit: int) -> None:
    """The figures, and the disagreements with the widest gaps."""
    for letter in "AB":
        click.echo(printable(f"{letter}  {facts[letter.lower()]}"))
    click.echo(f"{'photos':24} {found.images:,}, of {found.common_classes:,} common classes")
    click.echo(f"{'same answer':24} {found.same:,} ({found.same / found.images:.2%})")
    if found.kl_mean is not None:
        click.echo(f"{'drift of logits':24} {found.logit_drift_mean:.2g} mean, {found.logit_drift_max:.2g} at most")
        click.echo(
            f"{'drift of probabilities':24} {found.prob_drift_mean:.2g} mean, {found.prob_drift_max:.2g} at most"
        )
        click.echo(f"{'KL divergence':24} {found.kl_mean:.2g} nats")
    shown = found.disagreements[:limit]
    for each in shown:
        click.secho(printable(each.path), bold=True)
        for letter, label, score in (("A", each.a_label, each.a_score), ("B", each.b_label, each.b_score)):
            click.echo(f"  {letter} {score:6.1%}  {printable(label)}")
    if len(shown) < len(found.disagreements):
        click.echo(f"and {len(found.disagreements) - len(shown):,} more: --limit, or --out DIR for all of them")
