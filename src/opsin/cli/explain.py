"""`opsin explain`."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import (
    ALL_GOOD,
    DEFAULT_MODEL,
    SOME_FAILED,
    answering,
    fail,
    load_model,
    parts,
    printable,
    say,
    show,
    show_filled,
)

if TYPE_CHECKING:
    from opsin.explain import Explanation, Faithfulness, TextExplanation
    from opsin.pipeline import Classifier
    from opsin.text import TextModel

METHODS = ("relevance", "rollout", "attention", "occlusion")  # of opsin.explain, which would import torch
FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Show what in an image a model goes by.")
@click.argument("image")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME", help="Hub id, folder or file.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
@click.option("--target", metavar="LABEL", help="Label or index to explain, instead of the best one.")
@click.option("--method", type=click.Choice(METHODS), default="relevance", show_default=True, help="How.")
@click.option("--layer", type=int, metavar="N", help="With --method attention: of this layer, from 0.")
@click.option("--head", type=int, metavar="N", help="With --method attention: of this head, from 0.")
@click.option("--out", type=FILE, metavar="FILE", help="Draw the map over the image: a .png file.")
@click.option("--report", "page", type=FILE, metavar="FILE", help="Write all there is to see as one .html page.")
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Language of labels.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
@click.option("--max-pixels", type=click.IntRange(1), metavar="N", help="Refuse a larger image before decoding it.")
def explain(
    image: str,
    target: str | None,
    method: str,
    layer: int | None,
    head: int | None,
    out: Path | None,
    page: Path | None,
    **options: Any,
) -> None:
    """Show what in an image speaks for a label: a file or URL; with a model of text, what a gap is filled by.

    Prints where the map peaks and how faithful it is, as JSON in a pipe: deletion is the mean probability of the label
    while what matters most is taken from the image first, insertion while it is put back; of random maps beside them.
    """
    for name, value in (("--layer", layer), ("--head", head)):
        if value is not None and method != "attention":
            raise click.UsageError(f"{name} is for --method attention; {method} takes all layers and heads.")
    _check_file(out, "--out", ".png")
    _check_file(page, "--report", ".html")
    with suppress(OSError, ValueError):
        if out is not None and out.samefile(image):
            raise click.BadParameter(f'"{out}" is the image itself.', param_hint="--out")

    from opsin.errors import ModelError, NoHead
    from opsin.text import TextModel

    try:
        model = load_model("explain", dtype="fp32", **options)
        asked = {"target": target, "method": method, "layer": layer, "head": head}
        if isinstance(model, TextModel):
            if out is not None or target is not None or method != METHODS[0]:
                raise click.UsageError(
                    "a text is explained by rollout, for its gaps, in a --report; the rest is for images."
                )
            record = _of_text(model, image, page)
        else:
            record = _of_image(model, image, asked, out, page)
    except (ModelError, NoHead) as error:
        fail(error)
    sys.exit(ALL_GOOD if record["ok"] else SOME_FAILED)


def _check_file(path: Path | None, option: str, suffix: str) -> None:
    """Refuse what could not be written, before a model is loaded for it."""
    if path is None:
        return
    from opsin.errors import MissingExtra
    from opsin.explain import pictures

    if path.suffix.lower() != suffix:
        raise click.BadParameter(f'"{path}" does not end in {suffix}.', param_hint=option)
    if not path.parent.is_dir():
        raise click.BadParameter(f'the folder "{path.parent}" does not exist.', param_hint=option)
    try:
        pictures.require()
    except MissingExtra as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _of_image(
    classifier: "Classifier", path: str, asked: dict[str, Any], out: Path | None, page: Path | None
) -> dict[str, Any]:
    """Explain, draw, print; the record of it."""
    from opsin import explain as maps
    from opsin.errors import ImageError
    from opsin.explain import pictures
    from opsin.explain.report import report
    from opsin.preprocess import decode

    with answering(out or page):
        try:
            photo = decode(path, max_pixels=classifier.max_pixels)
        except ImageError as error:
            record = {"path": path, "ok": False, "error": {"type": error.kind, "message": str(error)}}
            _print(record)
            return record
        try:
            if page is not None:
                with parts("maps") as on_part:
                    found, score = report(page, classifier, photo, name=path, on_part=on_part, **asked)
            else:
                found = maps.explain(classifier, photo, **asked)
                score = maps.faithfulness(classifier, photo, found)
        except ValueError as error:  # no such label, layer or head
            raise click.UsageError(str(error)) from None
        if out is not None:
            pictures.draw(out, photo, [found], [score])
        record = _record(path, found, score, out, page)
        _print(record)
        if record["peak"] is None:
            say(
                f'by {found.method} the map is the same everywhere, so it says nothing of "{found.label}". '
                f"Try --method {'rollout' if found.method == 'occlusion' else 'occlusion'}."
            )
    return record


def _record(
    path: str, found: "Explanation", score: "Faithfulness", out: Path | None, page: Path | None
) -> dict[str, Any]:
    from opsin.explain.pictures import peak

    where = peak(found)
    return {
        "path": path,
        "ok": True,
        "label": found.label,
        "index": found.target,
        "score": found.score,
        "method": found.method,
        "layer": found.layer,
        "head": found.head,
        "peak": where and list(where),
        "deletion_auc": score.deletion_auc,
        "insertion_auc": score.insertion_auc,
        "random_deletion_auc": score.random_deletion_auc,
        "random_insertion_auc": score.random_insertion_auc,
        "width": found.size[0],
        "height": found.size[1],
        "out": out and str(out),
        "report": page and str(page),
    }


def _print(record: dict[str, Any]) -> None:
    if not sys.stdout.isatty():
        from opsin.results import json_line

        print(json_line(record), flush=True)
        return
    if not record["ok"]:
        show(record)
        return
    show(record | {"topk": [{"label": record["label"], "score": record["score"]}]})
    numbers = "".join(f", {name} {record[name]}" for name in ("layer", "head") if record[name] is not None)
    rows = {
        "method": record["method"] + numbers,
        "peak": record["peak"] and "{}, {} of {width} × {height} pixels".format(*record["peak"], **record),
        "deletion": _beside(record, "deletion_auc", "lower"),
        "insertion": _beside(record, "insertion_auc", "higher"),
        "out": record["out"],
        "report": record["report"],
    }
    for name, value in rows.items():
        if value is not None:
            click.echo(f"  {name:9}  {printable(value)}")


def _beside(record: dict[str, Any], name: str, better: str) -> str:
    from opsin.explain.pictures import number

    return f"{number(record[name])} against {number(record[f'random_{name}'])} of random maps: {better} is better"


def _of_text(model: "TextModel", text: str, page: Path | None) -> dict[str, Any]:
    """Explain, write, print; the record of it."""
    from opsin.errors import TextError
    from opsin.explain import explain_text
    from opsin.explain.report import text_report
    from opsin.results import json_line

    with answering(page):
        record: dict[str, Any]
        try:
            found = explain_text(model, text) if page is None else text_report(page, model, text)
        except TextError as error:
            record = {"text": text, "ok": False, "error": {"type": error.kind, "message": str(error)}}
        else:
            gaps = [
                {"text": answer, "weights": [round(weight, 6) for weight in weights]}
                for answer, weights in zip(found.answers, found.by_gap().tolist(), strict=True)
            ]
            record = {"text": text, "ok": True, "filled": found.filled, "tokens": list(found.tokens), "gaps": gaps}
            record["report"] = page and str(page)
        if not sys.stdout.isatty():
            print(json_line(record), flush=True)
        elif not record["ok"]:
            show_filled(record)
        else:
            _show_text(found, record)
    return record


def _show_text(found: "TextExplanation", record: dict[str, Any]) -> None:
    """The text for each gap, its bytes shaded by what the gap reads, and the words that it reads most."""
    from opsin.explain.pictures import best_words, percent, shades

    click.secho(printable(found.filled), bold=True)
    for gap, (answer, row) in enumerate(zip(found.answers, shades(found).tolist(), strict=True)):
        click.echo(printable(f'  "{answer}" from'))
        cells = [
            click.style("_", bold=True) if place in found.places
            else click.style(printable(token), bg=(int(250 * shade), int(150 * shade), 40), fg="black")
            if shade > 0.1
            else printable(token)
            for place, (token, shade) in enumerate(zip(found.tokens, row, strict=True))
        ]  # fmt: skip
        click.echo("    " + "".join(cells))
        click.echo("    " + ", ".join(f"{printable(word)} {percent(share)}" for word, share in best_words(found, gap)))
    if record["report"]:
        click.echo(f"  report  {printable(record['report'])}")
