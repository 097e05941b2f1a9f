"""A bulk run: nothing lost, nothing misattributed, no memory that grows; gone on with after kill -9; how fast.

python benchmarks/bulk.py soak PHOTOS [--images 100000]     # real images with 2 % broken ones among them: a row each?
python benchmarks/bulk.py kill PHOTOS [--rounds 20]         # kill -9 at random moments, then --resume
python benchmarks/bulk.py speed [--images 5000]             # against timm's inference loop and transformers' pipeline

PHOTOS is a folder of images. `soak` and `kill` run the command with a ViT of one layer and 32 pixels, whose weights are
noise, over small copies of them: what is tried is all that is around a model. `speed` wants opsin[bench].
"""

import argparse
import io
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps

import opsin
from opsin import bulk, checkpoints
from opsin.bench import import_library, machine
from opsin.data.inputs import plan
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

DISTINCT = 1000  # images; the inputs are these again and again, under names of their own
TAR_IMAGES = 10_000
TOLERANCE = 1e-6  # between the scores of an image in a batch and alone: the sums of a product depend on its size


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Sample(NamedTuple):
    """One file: its bytes, and what must be said of it."""

    suffix: str
    data: bytes
    error: str | None = None  # the type; None: it is an image
    same_as: bytes | None = None  # an image with the same answer, of a plainer kind; None: its own answer when alone


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def small_photos(folder: Path, count: int) -> list[Image.Image]:
    """Different crops of the photos, shorter edge 48."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not paths:
        sys.exit(f"no images in {folder}")
    rng = random.Random(0)
    images = []
    for i in range(count):
        with Image.open(paths[i % len(paths)]) as photo:
            width, height = photo.size
            left, top = rng.randrange(max(1, width // 4)), rng.randrange(max(1, height // 4))
            crop = photo.convert("RGB").crop((left, top, width - rng.randrange(9), height - rng.randrange(9)))
        images.append(ImageOps.contain(crop, (64, 48)))
    return images


def good(images: list[Image.Image]) -> list[Sample]:
    kinds = (
        ("jpg", "JPEG", {"quality": 90}), ("png", "PNG", {}), ("webp", "WEBP", {}), ("jpg", "JPEG", {"quality": 75}),
    )  # fmt: skip
    found = []
    for i, image in enumerate(images):
        suffix, kind, options = kinds[i % len(kinds)]
        found.append(Sample(suffix, encoded(image, kind, **options)))
    return found


def odd(image: Image.Image) -> dict[str, Sample]:
    """Images that others trip over, and that have an answer."""
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° to the right
    sixteen = np.asarray(image.convert("L")).astype(np.uint16) << 8
    return {
        "exif": Sample("png", encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif), same_as=png),
        "extension": Sample("png", jpeg, same_as=jpeg),
        "cmyk": Sample("jpg", encoded(image.convert("CMYK"), "JPEG", quality=95)),
        "16-bit": Sample("png", encoded(Image.fromarray(sixteen), "PNG"), same_as=encoded(image.convert("L"), "PNG")),
        "grey": Sample("png", encoded(image.convert("L"), "PNG")),
        "palette": Sample("gif", encoded(image.convert("P"), "GIF")),
        "alpha": Sample("png", encoded(Image.merge("RGBA", (*image.split(), image.split()[0])), "PNG")),
        "one row": Sample("png", encoded(image.resize((31, 1)), "PNG")),
        "trailing": Sample("jpg", jpeg + b"\0" * 999, same_as=jpeg),
    }


def broken(image: Image.Image) -> dict[str, Sample]:
    """Files without an answer."""
    jpeg, png, webp = (encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP"))
    huge = bytearray(jpeg)
    place = huge.index(b"\xff\xc0") + 5  # SOF0: marker, length, precision, then height and width
    huge[place : place + 4] = struct.pack(">HH", 65_500, 65_500)
    half = len(png) // 2
    return {
        "cut jpeg": Sample("jpg", jpeg[: len(jpeg) // 2], "corrupt"),
        "cut png": Sample("png", png[:half], "corrupt"),
        "cut webp": Sample("webp", webp[: len(webp) // 2], "corrupt"),
        "damaged png": Sample("png", png[:half] + b"\xff" * 200 + png[half + 200 :], "corrupt"),
        "head only": Sample("jpg", jpeg[:20], "corrupt"),
        "no bytes": Sample("jpg", b"", "not_an_image"),
        "zeros": Sample("jpg", bytes(5000), "not_an_image"),
        "text": Sample("jpg", b"not a picture\n", "not_an_image"),
        "html": Sample("jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
        "noise": Sample("png", random.Random(0).randbytes(3000), "not_an_image"),
        "bomb": Sample("png", bomb(60_000), "too_large"),
        "huge": Sample("jpg", bytes(huge), "too_large"),
    }


def bomb(side: int) -> bytes:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9999))),
        (b"IEND", b""),
    ]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# what a name on a disk may be without being a file with bytes
NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: None, "not_found"),
    "folder": (lambda path: path.mkdir(), "unreadable"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "not_found"),
    "loop": (lambda path: path.symlink_to(path.name), "unreadable"),
    "pipe": (os.mkfifo, "unreadable"),
}


class Expected(NamedTuple):
    error: str | None
    answer: bytes | None  # the image that has the same, alone


def write_inputs(folder: Path, count: int, images: list[Image.Image]) -> tuple[list[str], dict[str, Expected]]:
    """Half in folders, a list of them; half in tar files. Every 50th is broken, every 100th odd.

    Returns:
        (arguments for the command, what must be said of each name, in order).
    """
    plain = good(images)
    (folder / "good").mkdir(parents=True)
    for i, sample in enumerate(plain):
        (folder / "good" / f"{i}").write_bytes(sample.data)
    odds, bad, none = list(odd(images[0]).values()), list(broken(images[1]).values()), list(NO_FILES.values())
    expected: dict[str, Expected] = {}

    def sample(i: int, on_disk: bool) -> tuple[int | None, Any]:
        """(number of a plain one, or None; what it is)."""
        if i % 50 == 49:
            kinds = [*bad, *none] if on_disk else bad
            return None, kinds[i // 50 % len(kinds)]
        if i % 100 == 24:
            return None, odds[i // 100 % len(odds)]
        return i % len(plain), plain[i % len(plain)]

    half = count // 2
    with (folder / "list.txt").open("w") as names:
        for i in range(half):
            place = folder / "files" / f"{i // 10_000}"
            place.mkdir(parents=True, exist_ok=True)
            number, it = sample(i, True)
            path = place / f"{i:07}.{it.suffix if isinstance(it, Sample) else 'jpg'}"
            if number is not None:
                path.hardlink_to(folder / "good" / f"{number}")
            elif isinstance(it, Sample):
                path.write_bytes(it.data)
            else:
                it[0](path)
            names.write(f"{path}\n")
            expected[str(path)] = expectation(it)
    arguments = [f"@{folder / 'list.txt'}"]
    for start in range(half, count, TAR_IMAGES):
        path = folder / f"{start:07}.tar"
        arguments.append(str(path))
        with tarfile.open(path, "w") as tar:
            for i in range(start, min(start + TAR_IMAGES, count)):
                _, it = sample(i, False)
                info = tarfile.TarInfo(f"{i:07}.{it.suffix}")
                info.size = len(it.data)
                tar.addfile(info, io.BytesIO(it.data))
                expected[f"{path}::{info.name}"] = expectation(it)
    return arguments, expected


def expectation(it: Any) -> Expected:
    if not isinstance(it, Sample):
        return Expected(it[1], None)
    return Expected(it.error, None if it.error else it.same_as or it.data)


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(32, 32), patch_size=8, embed_dim=24, num_layers=1, num_heads=2, mlp_dim=40, num_classes=7
    )
    model = ViT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    labels = Labels.from_names([f"class {i}" for i in range(7)])
    checkpoints.write(folder, model.eval(), PreprocessConfig(size=(32, 32)), labels)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


# A child begins with the peak of the process that forks it, which is large here; so a small one stands between.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def command(arguments: list[str], model: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", str(model), "--out", str(out), "--dtype", "fp32", "--device", "cpu", "--top-k", "7", *more]
    return [sys.executable, "-m", "opsin", "classify", *arguments, *options]


def parts(folder: Path) -> list[Path]:
    return bulk.files(folder) if folder.is_dir() else []


def table(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in bulk.files(folder))


# ── soak ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def soak(photos: Path, count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        images = small_photos(photos, DISTINCT)
        peaks = {}
        for number in (1000, count):
            arguments, expected = write_inputs(folder / str(number), number, images)
            began = time.perf_counter()
            run = command(arguments, folder / "model", folder / f"out-{number}")
            done = subprocess.run([sys.executable, "-c", MEASURE, *run], capture_output=True, text=True)
            seconds = time.perf_counter() - began
            assert done.returncode == 3, done.stderr
            peaks[number] = int(done.stdout)
            row = {
                "images": number,
                "seconds": round(seconds, 1),
                "images_per_s": round(number / seconds, 1),
                "peak_MB": round(peaks[number] / 1e6, 1),
                **check(table(folder / f"out-{number}"), expected, folder / "model"),
            }
            print(json.dumps(row), flush=True)
        print(json.dumps({"peak_ratio": round(peaks[count] / peaks[1000], 4)}), flush=True)


def check(found: pa.Table, expected: dict[str, Expected], model: Path) -> dict[str, Any]:
    """One row each, in order, and each the right one."""
    names = found["path"].to_pylist()
    rows = list(zip(found["error_type"].to_pylist(), found["topk"].to_pylist(), strict=True))
    classifier = opsin.load(model, dtype="fp32", device="cpu")
    alone: dict[bytes, np.ndarray] = {}
    wrong, worst = [], 0.0
    for name, (error, topk) in zip(names, rows, strict=True):
        want = expected.get(name)
        if want is None or error != want.error:
            wrong.append((name, error, want and want.error))
        elif want.answer is not None:
            if want.answer not in alone:
                (best,) = classifier([want.answer], top_k=7)
                alone[want.answer] = scores(best)
            difference = float(np.abs(scores(topk) - alone[want.answer]).max())
            worst = max(worst, difference)
            if difference > TOLERANCE:
                wrong.append((name, f"off by {difference:.2g}", None))
    answers = np.stack(list(alone.values()))
    apart = np.abs(answers[:, None] - answers[None]).max(2) + np.eye(len(answers))
    assert names == list(expected), "rows are missing, doubled or out of order"
    assert not wrong, wrong[:5]
    return {
        "rows": len(names),
        "errors": sum(error is not None for error, _ in rows),
        "wrong": len(wrong),
        "distinct_images": len(alone),
        "largest_difference_from_alone": worst,
        "images_that_another_could_be_taken_for": int((apart.min(1) <= 2 * TOLERANCE).sum()),
    }


def scores(best: list[dict[str, Any]]) -> np.ndarray:
    """By class."""
    return np.array([each["score"] for each in sorted(best, key=lambda each: each["index"])])


# ── kill ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def kill(photos: Path, count: int, rounds: int) -> None:
    """Each round a new folder, killed one to three times: when a random number of parts is there, or before it begins.

    The moment is random within the time that a part takes.
    """
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        arguments, expected = write_inputs(folder / "in", count, small_photos(photos, DISTINCT))

        def run(out: Path, *more: str) -> "subprocess.Popen[bytes]":
            small = ["--part-rows", "100", "--batch-size", "7"]
            return subprocess.Popen(command(arguments, folder / "model", out, *small, *more), stderr=subprocess.PIPE)

        began = time.perf_counter()
        said = run(folder / "whole").communicate()[1]
        seconds = time.perf_counter() - began
        whole, names = table(folder / "whole"), [path.name for path in bulk.files(folder / "whole")]
        check(whole, expected, folder / "model")
        print(json.dumps({"images": count, "seconds": round(seconds, 1), "rows": whole.num_rows}), flush=True)
        for number in range(rounds):
            out = folder / f"round-{number}"
            rows: list[int] = []
            for _ in range(rng.randint(1, 3)):
                process = run(out, "--resume")
                if rng.random() < 0.2:
                    time.sleep(rng.uniform(0, 3))
                else:
                    wanted = rng.randint(min(len(parts(out)) + 1, len(names)), len(names))
                    while process.poll() is None and len(parts(out)) < wanted:
                        time.sleep(0.001)
                    time.sleep(rng.uniform(0, 0.1))
                process.kill()
                process.communicate()
                rows.append(sum(pq.read_metadata(path).num_rows for path in parts(out)))
            said = run(out, "--resume").communicate()[1]
            found = table(out)
            same = found.equals(whole) and [path.name for path in parts(out)] == names
            left = [path.name for path in out.iterdir() if path.name.startswith(".part")]
            print(json.dumps({"round": number, "rows_when_killed": rows, "same": same, "left": left}), flush=True)
            assert same and not left, said.decode()


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPE = {
    "image_size": 64, "patch_size": 8, "hidden_size": 256, "num_hidden_layers": 7, "num_attention_heads": 4,
    "intermediate_size": 1024,
}  # fmt: skip
BATCH_SIZES = {"opsin": 32, "timm": 256, "transformers": 32}  # timm's inference.py has 256; 32 is transformers' best


def by_opsin(folder: Path | str, paths: list[str], **options: Any) -> Callable[[], list[int]]:
    """The runner: parts in a folder, forced to the disk."""
    classifier = opsin.load(folder, device="cpu", **options)

    def call() -> list[int]:
        with tempfile.TemporaryDirectory() as out:
            manifest = {"task": "classify", "format": "parquet"}
            folder = bulk.Parts(Path(out), manifest, plan(paths), resume=False)
            bulk.run(classifier, folder, folder.to_do(), batch_size=BATCH_SIZES["opsin"])
            return table(Path(out))["index"].to_pylist()

    return call


def by_timm(folder: Path, paths: list[str]) -> Callable[[], list[int]]:
    """What timm's inference.py does, with its public functions: workers decode, rows are held until the end."""
    timm: Any = import_library("timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config(model=model)
    dataset = timm.data.ImageDataset(str(Path(paths[0]).parent))
    settings = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}

    def call() -> list[int]:
        loader = timm.data.create_loader(
            dataset, batch_size=BATCH_SIZES["timm"], use_prefetcher=False, num_workers=2, **settings
        )
        with torch.inference_mode():
            best = torch.cat([model(pixels).softmax(-1).topk(5).indices for pixels, _ in loader])
        return best[:, 0].tolist()

    return call


def by_transformers(folder: Path, paths: list[str]) -> Callable[[], list[int]]:
    transformers: Any = import_library("transformers")
    pipe = transformers.pipeline("image-classification", model=str(folder))
    place = pipe.model.config.label2id
    return lambda: [place[answer[0]["label"]] for answer in pipe(paths, batch_size=BATCH_SIZES["transformers"])]


def contenders(folder: Path, paths: list[str]) -> dict[str, dict[str, Callable[[], list[int]]]]:
    """The embedded model, which transformers cannot run for want of a class token; and one of its shape that all can.

    Each set has the same weights and the same preprocessing.
    """
    transformers: Any = import_library("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=200, **SHAPE))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder / "twin")
    side = {"height": 64, "width": 64}
    transformers.ViTImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        folder / "twin"
    )
    found: dict[str, dict[str, Callable[[], list[int]]]] = {}
    for name, source in (("opsin/vit-tiny", "opsin/vit-tiny"), ("its shape, class token, noise", folder / "twin")):
        checkpoint = checkpoints.read(source)
        as_timm = folder / f"timm-{len(found)}"
        checkpoints.write_as("timm", as_timm, checkpoint.model, checkpoint.preprocess, checkpoint.labels)
        found[name] = {
            "timm": by_timm(as_timm, paths),
            "opsin fp32": by_opsin(source, paths, dtype="fp32"),
            "opsin auto": by_opsin(source, paths),
            "opsin auto, decode fast": by_opsin(source, paths, decode="fast"),
        }
    found[name]["transformers"] = by_transformers(folder / "twin", paths)
    return found


def speed(count: int, rounds: int) -> None:
    from folder import write_photos  # beside this file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        paths = write_photos(folder / "photos", count)
        for model, runs in contenders(folder, paths).items():
            seconds: dict[str, list[float]] = {contender: [] for contender in runs}
            labels = {}
            for number in range(rounds + 1):  # the first is to warm up
                for contender, call in runs.items():
                    began = time.perf_counter()
                    labels[contender] = call()
                    if number:
                        seconds[contender].append(time.perf_counter() - began)
            peers = [contender for contender in runs if not contender.startswith("opsin")]
            best = min(peers, key=lambda peer: statistics.median(seconds[peer]))
            for contender, times in seconds.items():
                row = {
                    "model": model,
                    "contender": contender,
                    "images_per_s": round(count / statistics.median(times), 1),
                    f"ratio_to_{best}": round(statistics.median(np.divide(seconds[best], times)), 2),
                    f"same_label_as_{best}": f"{np.equal(labels[contender], labels[best]).sum()}/{count}",
                }
                print(json.dumps(row), flush=True)
        busy(folder, paths[:500])


def busy(folder: Path, paths: list[str]) -> None:
    """The share of a run of ViT-B/16 that is spent in the engine."""
    torch.manual_seed(0)
    checkpoints.write(folder / "base", ViT(ViTConfig(num_classes=1000)), PreprocessConfig(size=(224, 224)), None)
    classifier: Any = opsin.load(folder / "base", device="cpu")
    forward, inside = classifier._forward, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal inside
        began = time.perf_counter()
        try:
            return forward(*arguments)
        finally:
            inside += time.perf_counter() - began

    classifier._forward = timed
    list(classifier.stream(paths[:32], embed=True))
    inside, began = 0.0, time.perf_counter()
    out = bulk.Parts(
        folder / "busy", {"task": "embed", "format": "parquet", "embedding_dim": 768}, plan(paths), resume=False
    )
    bulk.run(classifier, out, out.to_do(), embed=True)
    seconds = time.perf_counter() - began
    row = {
        "model": "ViT-B/16",
        "dtype": classifier.dtype,
        "images": len(paths),
        "images_per_s": round(len(paths) / seconds, 1),
        "share_of_time_in_engine": round(inside / seconds, 3),
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task, images in (("soak", 100_000), ("kill", 3000), ("speed", 5000)):
        options = tasks.add_parser(task)
        if task != "speed":
            options.add_argument("photos", type=Path)
        options.add_argument("--images", type=int, default=images)
        if task != "soak":
            options.add_argument("--rounds", type=int, default=20 if task == "kill" else 3)
    arguments = parser.parse_args()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    facts = machine(["timm", "transformers"] if arguments.task == "speed" else [])
    print(json.dumps(facts | {"commit": commit}), flush=True)
    if arguments.task == "soak":
        soak(arguments.photos, arguments.images)
    elif arguments.task == "kill":
        kill(arguments.photos, arguments.images, arguments.rounds)
    else:
        speed(arguments.images, arguments.rounds)


if __name__ == "__main__":
    main()
