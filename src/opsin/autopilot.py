"""Images and a budget → the fastest way to run a classifier on this machine that answers closely enough.

choose    try fp32, bf16 and int8, and OpenVINO where it is installed, on the user's own images
remember, recall    a choice holds for this machine, these weights and this budget until one of them changes
apply     have a classifier run so
"""

import dataclasses
import hashlib
import json
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from opsin import engine as engines
from opsin import unknown
from opsin.bench import interleaved, machine
from opsin.checkpoints import native
from opsin.device import cache_folder, has_bf16, has_int8
from opsin.errors import DataError, ImageError, MissingExtra, ModelError, NoHead
from opsin.pipeline import Classifier
from opsin.preprocess import ImageSource

log = logging.getLogger(__name__)

MAX_IMAGES = 256  # that are tried; one in four calibrates int8, agreement is counted on the others
MIN_IMAGES = 16
ROUNDS = 5
BATCH_SIZES = (1, 4, 8, 16, 32)
TRIED_BATCH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One candidate, and what came of it."""

    engine: str
    dtype: str
    agreed: int  # images with fp32's best label
    images_per_s: float | None = None  # of the model alone, in batches of 8; None: not timed
    left_out: int = 0  # halves of layers that stay in bf16 or fp32 in int8
    reason: str = ""  # why it is out; empty: it could be taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    engine: str
    dtype: str
    batch_size: int
    agreed: int  # of `images`, that have fp32's best label
    images: int
    budget: float  # share of images whose best label may differ
    speedup: float  # over the plain fp32 model
    tried: tuple[Tried, ...]
    ranges: engines.Ranges | None = None  # torch, int8
    calibration: np.ndarray | None = None  # OpenVINO, int8: images (N, H, W, 3) as `PreprocessConfig.load` gives them

    def apply(self, classifier: Classifier) -> None:
        """Have the classifier run in this way from now on."""
        pixels = None
        if self.calibration is not None:
            pixels = classifier.preprocess.normalise_batch(list(self.calibration)).split(1)
        classifier.use(self.dtype, engine=self.engine, exact=False, ranges=self.ranges, calibration=pixels)


def choose(
    classifier: Classifier,
    images: Sequence[ImageSource],
    budget: float,
    *,
    engine: str = "auto",
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Try what this CPU can do on some of the images, and take the fastest within the budget.

    At most 256 images are read, taken evenly; one in four calibrates int8, on the others best labels are compared with
    those of fp32, which sees what `decode="exact"` gives, whatever the classifier's own is. int8 that disagrees too
    often is tried again with its noisiest halves of layers in bf16, up to half of them. Speeds are medians of
    interleaved turns.

    Args:
        classifier: on the CPU, with a head.
        budget: share of images whose best label may differ from fp32's: 0.01 is one in a hundred.
        engine, dtype: "auto", or the only one to try.
        progress: called with (candidates done, candidates in all).
    Raises:
        DataError: fewer than 16 of the images can be read.
        MissingExtra: OpenVINO is asked for and not installed.
        ModelError: nothing is within the budget, or nothing of this engine and dtype can run here.
        NoHead: without labels there is no best one.
    """
    if classifier.labels is None:
        raise NoHead(f"{classifier.source.name} has no classification head: there are no labels to agree on.")
    if classifier.device.type != "cpu":
        raise ModelError(f"a budget is for CPUs; the model is on {classifier.device}.")
    if engine == "openvino":
        for package in ("openvino", *(["nncf"] if dtype == "int8" else [])):
            if find_spec(package) is None:
                raise MissingExtra(package, "openvino")
    both = list(_read(classifier, images))
    resized = [used for _, used in both]
    if len(resized) < MIN_IMAGES:
        raise DataError(f"{len(resized)} of {len(images)} images can be read; a choice needs {MIN_IMAGES} at least.")
    calibration = resized[::4]
    probe = classifier.preprocess.normalise_batch([image for i, image in enumerate(resized) if i % 4])
    pixels = classifier.preprocess.normalise_batch(calibration)
    exact = classifier.preprocess.normalise_batch([image for i, (image, _) in enumerate(both) if i % 4])
    reference = _best(_pack(classifier, "fp32"), exact)
    del both, exact
    most = int(budget * len(probe))  # that may disagree

    ways = [way for way in _ways(classifier) if engine in ("auto", way[0]) and dtype in ("auto", way[1])]
    if not ways:
        raise ModelError(f'nothing of engine "{engine}" and dtype "{dtype}" can run on this machine.')
    tried: list[Tried] = []
    nets: dict[int, Any] = {}  # place in `tried` → net
    ranges: engines.Ranges | None = None
    for done, (kind, precision) in enumerate(ways):
        if progress is not None:
            progress(done, len(ways))
        left_out = 0
        try:
            if (kind, precision) == ("torch", "int8"):
                net, ranges, left_out = _int8(classifier, probe, pixels, reference, most)
            elif kind == "torch":
                net = _pack(classifier, precision)
            else:
                net = _openvino(classifier, precision, pixels)
            agreed = int((_best(net, probe) == reference).sum())
        except Exception as error:  # another library's, of which anything may come; the others go on
            log.info("%s %s failed", kind, precision, exc_info=True)
            tried.append(Tried(engine=kind, dtype=precision, agreed=0, reason=f"failed: {error}"))
            continue
        reason = "" if len(probe) - agreed <= most else f"disagrees on {len(probe) - agreed}; the budget is {most}"
        if not reason:
            nets[len(tried)] = net
        tried.append(Tried(engine=kind, dtype=precision, agreed=agreed, left_out=left_out, reason=reason))
    if not nets:
        raise ModelError(
            f"nothing tried is within the budget of {most} of {len(probe)} images: "
            + "; ".join(f"{row.engine} {row.dtype} {row.reason}" for row in tried)
            + ". Raise the budget, or give more images: with few of them one counts much."
            + ("" if classifier.decode == "exact" else ' Or decode "exact": the fast one changes labels, too.')
        )
    batch = probe[:TRIED_BATCH]
    with torch.inference_mode():
        calls: dict[Any, Callable[[], object]] = {place: _call(net, batch) for place, net in nets.items()}
        seconds = interleaved({"plain": _call(classifier.model, batch), **calls}, ROUNDS)
        median = {place: statistics.median(times) for place, times in seconds.items()}
        fastest = min(nets, key=lambda place: median[place])
        batch_size = _batch_size(nets[fastest], probe)
    for place in nets:
        tried[place] = dataclasses.replace(tried[place], images_per_s=len(batch) / median[place])
    kept = tried[fastest]
    in_torch = kept.engine == "torch"
    return Choice(
        engine=kept.engine,
        dtype=kept.dtype,
        batch_size=batch_size,
        agreed=kept.agreed,
        images=len(probe),
        budget=budget,
        speedup=median["plain"] / median[fastest],
        tried=tuple(tried),
        ranges=ranges if in_torch and kept.dtype == "int8" else None,
        calibration=None if in_torch or kept.dtype != "int8" else np.stack(calibration),
    )


def _read(classifier: Classifier, images: Sequence[ImageSource]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(exactly decoded, as the classifier decodes), evenly, as many as are tried, without what cannot be read."""
    load = partial(classifier.preprocess.load, max_pixels=classifier.max_pixels)
    count = min(len(images), MAX_IMAGES)
    for i in range(count):
        try:
            image = images[i * len(images) // count]
            exact = load(image)[0]
            yield exact, exact if classifier.decode == "exact" else load(image, decode=classifier.decode)[0]
        except ImageError as error:
            log.info("left out: %s", error)


def _ways(classifier: Classifier) -> list[tuple[str, engines.Precision]]:
    """(engine, dtype) that can run here."""
    here = {"fp32": True, "bf16": has_bf16(), "int8": has_int8()}
    precisions = [precision for precision in get_args(engines.Precision) if here[precision]]
    ways = [("torch", precision) for precision in precisions if precision == "fp32" or engines.can_pack()]
    if find_spec("openvino") is not None:
        ways += [("openvino", p) for p in precisions if p != "int8" or find_spec("nncf") is not None]
    return ways


def _pack(classifier: Classifier, precision: Any) -> Any:
    return engines.pack(classifier.model, precision) if engines.can_pack() else classifier.model


def _call(net: Any, batch: Tensor) -> Callable[[], object]:
    return lambda: net(batch)


@torch.inference_mode()
def _best(net: Any, pixels: Tensor) -> Tensor:
    """(N,) index of the best label."""
    return torch.cat([net(batch).argmax(dim=1) for batch in pixels.split(TRIED_BATCH)])


def _int8(
    classifier: Classifier, probe: Tensor, pixels: Tensor, reference: Tensor, most: int
) -> tuple[Any, engines.Ranges, int]:
    """The net with the most in int8 that disagrees on `most` images or fewer; else the last one tried."""
    whole = engines.calibrate(classifier.model, pixels.split(TRIED_BATCH))
    order = engines.noisiest(classifier.model, whole, pixels[:TRIED_BATCH])
    count = 0
    while True:
        ranges = engines.without(whole, order[:count])
        net = engines.pack(classifier.model, "int8", ranges)
        following = max(1, 2 * count)
        if int((_best(net, probe) != reference).sum()) <= most or following > len(order) // 2:
            sites = sum(len(found) for found in ranges.values())
            return net, ranges, len(ranges) * 2 - sites // 2
        count = following


def _openvino(classifier: Classifier, precision: engines.Precision, pixels: Tensor) -> Any:
    from opsin.engine import openvino

    return openvino.compile(
        classifier.model,
        precision,
        image_size=classifier.image_size,
        calibration=pixels.split(1) if precision == "int8" else None,
        cache=cache_folder(),
    )


def _batch_size(net: Any, pixels: Tensor) -> int:
    """The smallest of `BATCH_SIZES` whose rate is within 3 % of the best."""
    rates = {}
    for size in BATCH_SIZES:
        if size <= len(pixels):
            batch, times = pixels[:size], []
            net(batch)
            for _ in range(3):
                start = time.perf_counter()
                net(batch)
                times.append(time.perf_counter() - start)
            rates[size] = size / statistics.median(times)
    return min(size for size, rate in rates.items() if rate >= 0.97 * max(rates.values()))


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def remember(classifier: Classifier, choice: Choice, engine: str = "auto", dtype: str = "auto") -> Path:
    """Keep a choice for the next time, under `cache_folder()`: whole, or not at all. Returns where."""
    folder = _folder(classifier, choice.budget, engine, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fields = {
        field.name: getattr(choice, field.name)
        for field in dataclasses.fields(choice)
        if field.name not in ("tried", "ranges", "calibration")
    }
    new = Path(tempfile.mkdtemp(dir=folder.parent))
    if choice.ranges is not None:
        native.write_ranges(new, choice.ranges)
    if choice.calibration is not None:
        save_file({"images": choice.calibration}, new / "calibration.safetensors")
    fields["tried"] = [dataclasses.asdict(row) for row in choice.tried]
    (new / "choice.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        new.replace(folder)
    except OSError:  # another process was first, with as good a choice
        shutil.rmtree(new, ignore_errors=True)
    return folder


def recall(classifier: Classifier, budget: float, engine: str = "auto", dtype: str = "auto") -> Choice | None:
    """What was remembered for these weights, this machine and this budget; None where nothing was, or it is damaged."""
    folder = _folder(classifier, budget, engine, dtype)
    try:
        fields = json.loads((folder / "choice.json").read_text(encoding="utf-8"))
        tried = tuple(Tried(**row) for row in fields.pop("tried"))
        ranges = native.read_ranges(folder, classifier.model)
        images = folder / "calibration.safetensors"
        calibration = load_file(images)["images"] if images.is_file() else None
        choice = Choice(**fields, tried=tried, ranges=ranges, calibration=calibration)
        if not _is_whole(choice, classifier):
            raise ValueError("a part is missing, or not what belongs there")
        return choice
    except FileNotFoundError:
        return None
    except Exception as error:  # half a file, another version's: anything
        log.warning("what was remembered in %s cannot be used: %s", folder, error)
        return None


def _is_whole(choice: Choice, classifier: Classifier) -> bool:
    """Whether `apply` will do."""
    images = choice.calibration
    if choice.dtype == "int8" and choice.engine == "torch" and choice.ranges is None:
        return False
    shape = (*classifier.image_size, 3)
    fits = images is not None and images.dtype == np.uint8 and images.shape[1:] == shape
    if choice.dtype == "int8" and choice.engine == "openvino" and not fits:
        return False
    known = any((choice.engine, choice.dtype) == (row.engine, row.dtype) and not row.reason for row in choice.tried)
    return known and isinstance(choice.batch_size, int) and choice.batch_size in BATCH_SIZES


def _weights(classifier: Classifier) -> str:
    """SHA-256 of the weights: of their file, else of themselves."""
    if classifier.source.files:
        return classifier.source.sha256
    digest = hashlib.sha256()
    for name, tensor in classifier.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _folder(classifier: Classifier, budget: float, engine: str, dtype: str) -> Path:
    versions = []
    for package in ("opsin", "torch", "openvino", "nncf"):
        try:
            versions.append(version(package))
        except PackageNotFoundError:
            versions.append("")
    here = machine()
    facts = [
        _weights(classifier), repr(classifier.model.config), classifier.preprocess.hash(), classifier.decode,
        here["cpu"], here["threads"], has_bf16(), has_int8(), versions, budget, engine, dtype,
    ]  # fmt: skip
    return cache_folder() / "choices" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


# ── a folder that needs no images again ──────────────────────────────────────────────────────────────────────────────


def optimise(
    classifier: Classifier,
    images: Sequence[ImageSource],
    budget: float,
    out: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """Write a folder that `opsin.load` runs in int8: the exact weights, and the ranges that int8 needs beside them.

    Args:
        out: must not exist, or be empty.
    Raises:
        DataError: fewer than 16 images can be read, or `out` holds something.
        ModelError: int8 is not within the budget, or this CPU does not multiply it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is there already, and not empty. Give another folder.")
    choice = choose(classifier, images, budget, engine="torch", dtype="int8", progress=progress)
    assert choice.ranges is not None
    native.write(out, classifier.model, classifier.preprocess, classifier.labels)
    if Path(classifier.source.path, unknown.FILE).is_file():
        unknown.write(out, classifier.unknown)
    native.write_ranges(out, choice.ranges)  # the last: without it the folder is an ordinary one
    return choice
