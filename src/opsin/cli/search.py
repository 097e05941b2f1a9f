"""`opsin search`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin.cli.output import SOME_FAILED, USAGE, answering, check_out, fail, load_model, parts, printable, say

if TYPE_CHECKING:
    from opsin.pipeline import Classifier
    from opsin.search import Features
    from opsin.sheets import Block

FILE = click.Path(dir_okay=False, path_type=Path)


class Similarity(click.ParamType):
    """A cosine above 0 and at most 1."""

    name = "similarity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            cosine = float(value)
        except ValueError:
            cosine = 0.0
        if not 0 < cosine <= 1:
            self.fail(
                f'"{value}" is not a similarity above 0 and at most 1, such as 0.97. Without one, --duplicates stands '
                "behind the features.",
                param,
                ctx,
            )
        return cosine


@click.command(short_help="Find images by their embeddings: like one, of a label, or nearly the same.")
@click.argument("features", metavar="FEATURES", type=click.Path(path_type=Path))
@click.option("--like", "photos", multiple=True, metavar="IMAGE",
              help="Nearest to this image, a file or URL; given several times, to the mean of them.")  # fmt: skip
@click.option("--label", metavar="LABEL", help="Nearest to a class of the model, by its name or index.")
@click.option("--duplicates", type=Similarity(), is_flag=False, flag_value="0.97", metavar="[COSINE]",
              help="Groups of images at least so similar to the first of them; 0.97 without a value.")  # fmt: skip
@click.option("--top-k", "--topk", type=click.IntRange(1), default=10, show_default=True, help="Nearest images.")
@click.option("--html", "page", type=FILE, metavar="FILE", help="Draw what was found as one .html page.")
@click.option("--out", type=FILE, metavar="FILE", help="Write a .jsonl, .csv or .parquet file.")
@click.option("--model", metavar="NAME", help="Where the model that made the features is. [default: as they say]")
@click.option("--index/--no-index", default=None,
              help="Ask an index kept beside the features, built where there is none; or compare every vector. "
              "[default: beyond a million images one that is there; --duplicates: beyond 100,000 one]")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …")
def search(
    features: Path,
    photos: tuple[str, ...],
    label: str | None,
    duplicates: float | None,
    top_k: int,
    page: Path | None,
    out: Path | None,
    model: str | None,
    index: bool | None,
    device: str,
) -> None:
    """Find images by their embeddings, as `opsin embed PHOTOS --out FEATURES` stores them.

    \b
    opsin search features/ --like cat.jpg --html result.html
    opsin search features/ --like one.jpg --like two.jpg --top-k 100 --out hits.csv
    opsin search features/ --label tabby
    opsin search features/ --duplicates 0.98 --html duplicates.html

    Similarity is the cosine, 1 for the same. A table on a terminal, JSON lines in a pipe. Of duplicates the first of
    each group is that to keep. An image to search by is embedded by the model that made the features; another is
    refused.
    """
    if sum((bool(photos), label is not None, duplicates is not None)) != 1:
        raise click.UsageError("give one of --like, --label and --duplicates: what is to be found.")
    if out is not None:
        check_out(out, "opsin.search")
    if page is not None:
        if page.suffix.lower() != ".html":
            raise click.BadParameter(f'"{page}" does not end in .html.', param_hint="--html")
        if not page.parent.is_dir():
            raise click.BadParameter(f'the folder "{page.parent}" does not exist.', param_hint="--html")

    from opsin import search as engine
    from opsin.errors import DataError, ImageError, MissingExtra, ModelError, NoHead

    try:
        found = engine.open(features)
        with answering(out or page):
            if duplicates is not None:
                with parts("images") as advance:
                    groups = found.duplicates(duplicates, index=index, on_rows=advance)
                records = engine.members(found, groups)
                columns = ("group", "similarity", "path", "row")
                title = f"{_count(len(groups), 'group')} of near-duplicates in {features}"
            else:
                classifier = _model(found, model, device)
                query = engine.like(classifier, photos) if photos else _prototype(classifier, label or "")
                with parts("images") as advance:
                    [rows], [similarities] = found.nearest(query, top_k, index=index, on_rows=advance)
                records = engine.hits(found, rows, similarities)
                columns = ("rank", "similarity", "path", "row")
                what = f'"{label}"' if label is not None else photos[0] if len(photos) == 1 else f"{len(photos)} images"
                title = f"Nearest to {what} in {features}"
            if out is not None:
                engine.write(out, records, columns)
            if page is not None:
                facts = {name: found.manifest.get(name, "unknown") for name in ("model", "sha256", "preprocess_hash")}
                facts |= {"images": f"{len(found):,}", "similarity": "cosine"}
                engine.gallery(page, title, facts, _blocks(records, photos, duplicates))
            if out is None:
                _print(records, columns)
    except (ModelError, NoHead, MissingExtra) as error:
        fail(error)
    except DataError as error:
        say(str(error))
        sys.exit(USAGE)
    except ImageError as error:
        say(str(error))
        sys.exit(SOME_FAILED)
    if duplicates is not None:
        say(f"{_count(len(groups), 'group')}; {_count(len(records) - len(groups), 'image')} beside the first of each")


def _model(found: "Features", model: str | None, device: str) -> "Classifier":
    """That which made the features, from where they say or from `model`."""
    from opsin.errors import DataError, ModelError
    from opsin.search import check_model

    made_by = found.manifest
    if "model" not in made_by:
        raise DataError(f"{found.path} does not say which model made it, so nothing can be compared with it.")
    options = {"model": model} if model else {"model": made_by["model"], "revision": made_by.get("revision")}
    try:
        classifier: Classifier = load_model("embed", device=device, decode=made_by.get("decode", "exact"), **options)
    except ModelError as error:
        if model:
            raise
        raise ModelError(f"{error} It made the features: if it is elsewhere now, say where with --model.") from error
    check_model(found, classifier)
    return classifier


def _prototype(classifier: "Classifier", label: str) -> Any:
    from opsin.errors import NoHead
    from opsin.explain import find_class
    from opsin.search import prototype

    if classifier.labels is None:
        raise NoHead(f"{classifier.source.name} has no classification head, so it knows no labels. Search by --like.")
    try:
        return prototype(classifier, find_class(classifier.labels, label))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--label") from None


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _blocks(records: list[dict[str, Any]], photos: tuple[str, ...], duplicates: float | None) -> "list[Block]":
    """What the page shows: the images asked for and those found, or a block for each group."""
    from opsin.sheets import PALE, Block, Cell

    def cell(record: dict[str, Any]) -> Cell:
        rank = f"{record['rank']} · " if "rank" in record else ""
        return Cell((record["path"],), ((f"{rank}{record['similarity']:.3f}", PALE),))

    if duplicates is None:
        asked = [Block("Asked for", "", PALE, [Cell((photo,), ()) for photo in photos])] if photos else []
        return [*asked, Block("Found", "rank and similarity", PALE, [cell(record) for record in records])]
    groups: dict[int, list[Cell]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(cell(record))
    return [
        Block(f"Group {number} · {len(cells)} images", "similarity to the first", PALE, cells)
        for number, cells in groups.items()
    ]


def _print(records: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if not sys.stdout.isatty():
        from opsin.results import json_line

        for record in records:
            print(json_line(record), flush=True)
        return
    click.secho(f"{columns[0]:>5}  similarity  path", bold=True)
    for record in records:
        click.echo(f"{record[columns[0]]:5}  {record['similarity']:10.4f}  {printable(record['path'])}")
