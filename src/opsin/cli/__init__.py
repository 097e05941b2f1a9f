"""Arguments in, one function called, text or JSON out. The only package that parses, prints and exits."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from opsin import __version__
from opsin.cli.bench import bench
from opsin.cli.explain import explain
from opsin.cli.export import export
from opsin.cli.folder import OPTIONS as FOLDER_OPTIONS
from opsin.cli.folder import check_no_folder, folder_options, is_folder, write_folder
from opsin.cli.output import (
    ALL_GOOD,
    DEFAULT_MODEL,
    FLOW_MODEL,
    INTERRUPTED,
    SOME_FAILED,
    TEXT_MODEL,
    VIDEO_MODEL,
    answering,
    cell,
    check_out,
    fail,
    load_model,
    not_written,
    parts,
    progress,
    say,
    show,
    show_filled,
    stdin_paths,
    stdin_texts,
)
from opsin.cli.search import search
from opsin.cli.serve import serve
from opsin.cli.speed import RATE, autopilot, optimize, say_drift, speed_options
from opsin.cli.training import doctor, evaluate_command, train
from opsin.cli.verify import compare, verify

if TYPE_CHECKING:
    from opsin.pipeline import Classifier


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "OPSIN", "max_content_width": 100},
    epilog="Exit codes: 0 all good, 1 the result could not be written, 2 usage, 3 some inputs or checks failed, "
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
    opsin classify photos/ --out labels/ --resume
    opsin search features/ --like cat.jpg --html result.html
    opsin fill-mask "some words are[MASK:8]."
    opsin flow frame1.png frame2.png --out flow.png
    opsin autoencode clip.mp4 --out rebuilt.mp4
    opsin train photos/
    opsin evaluate photos/val --model runs/1
    opsin explain photo.jpg --out why.png
    opsin compare runs/1@fp32 runs/1@bf16 photos/
    opsin verify google/vit-base-patch16-224
    opsin export --model runs/1 --to onnx --out m.onnx
    opsin optimize --calibrate photos/ --out m-int8
    opsin bench --vs transformers,openvino
    opsin serve --port 8000
    opsin models
    """
    click.get_current_context().color = False if os.environ.get("NO_COLOR") else None
    logging.basicConfig(level=logging.WARNING, format="opsin: %(message)s")
    warnings.filterwarnings("ignore", module="PIL")  # damaged metadata of a file whose pixels are whole


def image_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `classify` and `embed` share."""
    options: list[Callable[..., Any]] = [
        click.argument("paths", nargs=-1, required=True),
        click.option("--model", default=DEFAULT_MODEL, show_default=True, metavar="NAME",
                     help="Hub id, folder, .safetensors/.npz/.pth/.pystate file, or a name of `opsin models`."),
        click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub."),
        click.option("--out", type=click.Path(path_type=Path), metavar="PATH",
                     help="Write a .jsonl, .csv or .parquet file instead of standard output; or a folder of parts, for "
                     "any number of images."),
        folder_options,
        click.option("--batch-size", type=click.IntRange(1), show_default="32, or what --budget measures"),
        speed_options,
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …"),
        click.option("--max-pixels", type=click.IntRange(1), metavar="N",
                     help="Refuse larger images before decoding them."),
    ]  # fmt: skip
    for decorate in reversed(options):
        command = decorate(command)
    return command


@main.command(short_help="Name what is in images.")
@image_options
@click.option("--top-k", "--topk", type=click.IntRange(1), default=5, show_default=True, help="Labels per image.")
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en", show_default=True, help="Language of labels.")
@click.option(
    "--unknown",
    type=RATE,
    is_flag=False,
    flag_value="10%",
    metavar="[RATE]",
    help='Say "none of these": at most this share of images of other things is still taken for one of the '
    "classes; 10% without a value. What that costs is said first. Needs `opsin evaluate --unknown-from`.",
)
@click.option("--kind", type=RATE, is_flag=False, flag_value="90%", metavar="[SHARE]",
              help='Say "some kind of cat": the narrowest kind of thing that is at least so probable; 90% without a '
              "value. For classes with WordNet ids, as ImageNet's.")  # fmt: skip
def classify(paths: tuple[str, ...], top_k: int, **options: Any) -> None:
    """Name what is in images: files, folders, patterns, URLs, or - for a list of paths on standard input.

    A table on a terminal, JSON lines in a pipe: one record per input, in order; an image that cannot be read is a
    record with "ok": false, and the others are not touched.
    """
    run(paths, task="classify", top_k=top_k, **options)


@main.command(short_help="Turn images into feature vectors.")
@image_options
@click.option("--normalize", is_flag=True, help="Of length 1, as cosine similarity wants them.")
@click.option("--store", type=click.Choice(["float32", "float16", "int8"]), default=None, show_default="float32",
              help="What the numbers are kept in; int8 with a scale for each vector.")  # fmt: skip
def embed(paths: tuple[str, ...], **options: Any) -> None:
    """Turn images into feature vectors, for search, clustering or a classifier of your own."""
    run(paths, task="embed", top_k=1, lang="en", **options)


def model_options(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Which model, and where it runs, for a command of one task."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(
            [
                click.option("--model", default=default, show_default=True, metavar="NAME",
                             help="Hub id, folder or file."),
                click.option("--revision", metavar="REV", help="Branch, tag or commit on the hub."),
                click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, …"),
            ]
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


@main.command("fill-mask", short_help="Fill the gaps of a text.")
@click.argument("text")
@model_options(TEXT_MODEL)
@click.option("--top-k", "--topk", type=click.IntRange(1, 256), default=5, show_default=True, help="Bytes per mask.")
def fill_mask(text: str, top_k: int, **options: Any) -> None:
    """Fill the gaps of a text, or with - of each line on standard input.

    One [MASK] is one missing byte, a letter of English; [MASK:8] is eight of them. Begin a gap with the space before
    the word: "some words are[MASK:8]." A table on a terminal, JSON lines in a pipe: one record per text; one that
    cannot be filled is a record with "ok": false.
    """
    from opsin.errors import ModelError, TextError
    from opsin.results import json_line

    failed = False
    try:
        model = load_model("fill-mask", **options)
        with answering():
            for each in stdin_texts() if text == "-" else [text]:
                record: dict[str, Any]
                try:
                    answer = model.fill_mask(each, top_k=top_k)
                    record = {"text": each, "ok": True, "filled": answer["filled"], "gaps": answer["gaps"]}
                except TextError as error:
                    failed = True
                    record = {"text": each, "ok": False, "error": {"type": error.kind, "message": str(error)}}
                if sys.stdout.isatty():
                    show_filled(record)
                else:
                    print(json_line(record), flush=True)
    except ModelError as error:
        fail(error)
    sys.exit(SOME_FAILED if failed else ALL_GOOD)


@main.command(short_help="Measure the motion between two images.")
@click.argument("image1")
@click.argument("image2")
@model_options(FLOW_MODEL)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a picture in the colours of a wheel (.png), or the numbers (.flo, .npy).",
)
@click.option(
    "--truth",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The true motion (.flo, .npy): print the end-point error.",
)
@click.option("--max-pixels", type=click.IntRange(1), metavar="N", help="Refuse larger images before decoding them.")
def flow(
    image1: str, image2: str, out: Path | None, truth: Path | None, max_pixels: int | None, **options: Any
) -> None:
    """Measure the motion of every pixel from one image to the next, two of one size: files or URLs.

    Prints a summary, as JSON in a pipe: motion is in pixels, x to the right and y down. epe is the mean distance to
    the true motion, epe_still what it would be had nothing been seen to move. In the picture still is white, to the
    right red, down yellow, left blue, up violet.
    """
    if out is not None:
        check_out(out, "opsin.flow")
    from opsin.errors import FlowError, ImageError, ModelError
    from opsin.flow import end_point_error, read_flow, read_frames, write_flow
    from opsin.preprocess import MAX_PIXELS
    from opsin.results import json_line

    max_pixels = max_pixels or MAX_PIXELS
    try:
        frames = read_frames(image1, image2, max_pixels=max_pixels)
        true_motion = None if truth is None else read_flow(truth)
        still = None if true_motion is None else end_point_error(0 * frames[0, :, :, :2].astype("f4"), true_motion)
    except (ImageError, FlowError) as error:
        say(str(error))
        sys.exit(SOME_FAILED)
    try:
        model = load_model("flow", max_pixels=max_pixels, **options)
        with answering(out):
            with parts("tiles") as on_tile:
                motion = model.flow(*frames, on_tile=on_tile)
            if out is not None:
                write_flow(out, motion)
            speed = (motion.astype(float) ** 2).sum(axis=2) ** 0.5
            summary = {
                "width": motion.shape[1],
                "height": motion.shape[0],
                "mean_x": float(motion[:, :, 0].mean()),
                "mean_y": float(motion[:, :, 1].mean()),
                "mean_motion": float(speed.mean()),
                "max_motion": float(speed.max()),
            }
            if true_motion is not None:
                summary |= {"epe": end_point_error(motion, true_motion), "epe_still": still}
            if sys.stdout.isatty():
                for name, value in summary.items():
                    click.echo(f"{name:12} {value:.2f}" if isinstance(value, float) else f"{name:12} {value}")
            else:
                print(json_line(summary), flush=True)
    except ModelError as error:
        fail(error)


@main.command(short_help="Rebuild a video with its sound.")
@click.argument("clip")
@model_options(VIDEO_MODEL)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="The rebuilt clip, .mp4.",
)
@click.option("--silent", is_flag=True, help="Take a clip without sound for a silent one.")
@click.option("--max-pixels", type=click.IntRange(1), metavar="N", help="Refuse larger frames before decoding them.")
def autoencode(clip: str, out: Path, silent: bool, max_pixels: int | None, **options: Any) -> None:
    """Rebuild a video with its sound from what a model keeps of it, and name what it shows.

    The middle square is taken, 25 frames a second, and the first channel of the sound. Prints a summary, as JSON in a
    pipe: psnr_video and psnr_audio say how close the rebuilt clip is, in decibels, before it is compressed into FILE.
    """
    check_out(out, "opsin.video")
    with suppress(OSError, ValueError):
        if out.samefile(clip):
            raise click.BadParameter(f'"{out}" is the clip itself.', param_hint="--out")
    from opsin.errors import ModelError, VideoError
    from opsin.results import json_line
    from opsin.video import MAX_FRAME_PIXELS, Score, best_labels, read_clip, video_writer

    max_pixels = max_pixels or MAX_FRAME_PIXELS
    record: dict[str, Any]
    try:
        try:
            read_clip(clip, num_frames=2, max_pixels=max_pixels, silent=silent)  # before a model is downloaded for it
            model = load_model("autoencode", max_pixels=max_pixels, **options)
            with answering(out):
                score = Score()
                with parts("parts") as advance, video_writer(out, sample_rate=model.sample_rate) as write:
                    for chunk in model.stream(clip, silent=silent, progress=advance):
                        write(chunk.frames, chunk.audio)
                        score.add(chunk)
            best = best_labels(score.probs, model.labels, 5)
            record = {"path": clip, "ok": True, "out": str(out)}
            record |= {"frames": score.num_frames, "seconds": score.seconds}
            decibels = {"psnr_video": score.psnr_frames, "psnr_audio": score.psnr_audio}
            record |= {name: value if value < float("inf") else None for name, value in decibels.items()}  # as JSON
            record |= {"label": best[0]["label"], "index": best[0]["index"], "score": best[0]["score"], "topk": best}
        except VideoError as error:
            record = {"path": clip, "ok": False, "error": {"type": error.kind, "message": str(error)}}
    except ModelError as error:
        fail(error)
    with answering():
        if not sys.stdout.isatty():
            print(json_line(record), flush=True)
        else:
            show(record)
            if record["ok"]:
                for name in ("frames", "seconds", "psnr_video", "psnr_audio"):
                    value = record[name]
                    click.echo(f"  {name:10}  {f'{value:.2f}' if isinstance(value, float) else cell(value)}")
    sys.exit(ALL_GOOD if record["ok"] else SOME_FAILED)


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
            "cached": name.startswith("opsin/") or is_cached(name),
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
    paths: tuple[str, ...],
    *,
    task: str,
    top_k: int,
    out: Path | None,
    batch_size: int | None,
    budget: float | None,
    lang: str,
    unknown: float | None = None,
    kind: float | None = None,
    **options: Any,
) -> None:
    """`classify` and `embed`: inputs → records → terminal, pipe or file, then the exit code."""
    from opsin.data.files import find_images
    from opsin.errors import MissingExtra, ModelError, NoHead
    from opsin.results import check_format, json_line, writer

    in_folder = {name: options.pop(name) for name in FOLDER_OPTIONS}
    stored = {name: value for name in ("store", "normalize") if (value := options.pop(name, None))}
    if out is not None and is_folder(out):
        check_format(Path(f"part.{in_folder['format'] or 'parquet'}"))
    else:
        check_no_folder(in_folder)
        if out is not None:
            check_out(out, "opsin.results")
    if paths.count("-") and len(paths) > 1:
        raise click.UsageError("- reads every path from standard input; give it alone.")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop keeps the records too
    counts = {"images": 0, "failed": 0}
    try:
        engine, dtype = options["engine"], options["dtype"]
        if budget is not None:  # tries all, and begins with the reference
            options |= {"engine": "torch", "dtype": "fp32"}
        classifier = load_model(task, lang=lang, **options)
        if paths != ("-",) and options["decode"] == "fast":
            say_drift(classifier, list(find_images(paths)))
        agreed = {}
        if budget is not None:

            def some() -> list[str]:
                if paths == ("-",):
                    raise click.UsageError(
                        "--budget measures on some of the images, which - gives one at a time: run it once on a folder "
                        "of them; the choice is remembered."
                    )
                return list(find_images(paths))

            chosen = autopilot(classifier, some, budget, engine=engine, dtype=dtype)
            batch_size = batch_size or chosen.batch_size
            agreed = {"budget": budget, "agreed": chosen.agreed, "agreed_of": chosen.images}
        if unknown is not None:
            say_cost(classifier.unknown, unknown)
        batch_size = batch_size or 32
        asked = {name: value for name, value in (("unknown", unknown), ("kind", kind)) if value is not None}
        answers: dict[str, Any] = {"top_k": top_k, "embed": task == "embed", **asked}
        made_by = describe(classifier, task=task) | agreed | asked | stored
        if out is not None and is_folder(out):
            facts = {"batch_size": batch_size, "top_k": top_k, "lang": lang}
            load = options | {
                "name": options["model"],
                "lang": lang,
                "dtype": classifier.dtype,
                "engine": classifier.engine,
            }
            del load["model"]
            write_folder(classifier, paths, out, made_by | facts, load=load, **in_folder, **answers)
        images: Iterable[str]
        if paths == ("-",):
            images, total = stdin_paths(), None
        else:
            images, total = find_images(paths), sum(1 for _ in find_images(paths))
        records = classifier.stream(images, batch_size=batch_size, **answers)
    except (ModelError, NoHead, MissingExtra) as error:
        fail(error)
    try:
        with ExitStack() as stack:
            if out is not None:
                write = stack.enter_context(writer(out, run=made_by))
            elif sys.stdout.isatty():
                write = show_found
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
        not_written(error, out)
    if not counts["images"]:
        say(f"no images in {', '.join(paths)}")
    sys.exit(SOME_FAILED if counts["failed"] else ALL_GOOD)


def say_cost(detector: Any, rate: float) -> None:
    """What a false-accept rate means, in shares that were measured."""
    say(
        f"--unknown {100 * rate:.4g}%: of {detector.num_others:,} images of other things "
        f"{detector.false_accept(rate):.1%} were taken for one of the classes, of {detector.num_known:,} images of the "
        f"classes {detector.false_reject(rate):.1%} for none of them ({detector.method})"
    )
    if rate * detector.num_others < 1:
        say(f"on {detector.num_others} images a share below {3 / detector.num_others:.1%} cannot be told from none")


def show_found(record: dict[str, Any]) -> None:
    """`show`, with what --unknown and --kind found on the line of the path."""
    found = ""
    if record.get("known") is False:
        found = f": none of these classes (looks most like {record['label']})"
    elif (kind := record.get("kind")) is not None:
        certain = kind["label"] == record["label"]  # of a class itself the table says the same
        found = "" if certain else f": some kind of {kind['label']}, {kind['score']:.1%}"
    elif "kind" in record:
        found = ": of no kind that is so sure"
    show(record | {"path": f"{record['path']}{found}"})


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
        "dtype": classifier.dtype,
        "engine": classifier.engine,
        "decode": classifier.decode,
        "device": str(classifier.device),
        "opsin": __version__,
        **({"embedding_dim": classifier.feature_dim} if task == "embed" else {}),
    }


for command in (train, evaluate_command, doctor, search, explain, compare, verify, export, bench, optimize, serve):
    main.add_command(command)
