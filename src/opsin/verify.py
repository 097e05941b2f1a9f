"""Is this the model that its authors published? Their numbers, measured here, in a certificate.

picture ── logits, hidden states, best labels ──▶ Check ─┐
images  ── predict, by the protocol's preprocessing ─────┴──▶ Certificate

Everything runs in exact fp32. The values on the picture (`assets/expected.json`, which names their sources) were found
with the image processor of each checkpoint, so they go through the checkpoint's own preprocessing, which is what
`Classifier.preprocess` is; those of dino-vits8 with that processor's size set to 480. Accuracy depends on the
preprocessing as much as on the weights: a `Protocol` names it. No published figure is repeated here that the catalogue
has.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

from opsin import __version__, bench, evaluate
from opsin.checkpoints.catalog import CATALOG, JAX, PERCEIVER, SQUASH, TIMM, nearest
from opsin.data.samples import Samples
from opsin.device import exact_fp32
from opsin.errors import DataError, ImageError, ModelError, NoHead
from opsin.models.vit import ViT
from opsin.pipeline import Classifier, load
from opsin.preprocess import ImageSource, PreprocessConfig, decode

log = logging.getLogger(__name__)

Verdict = Literal["passed", "failed", "no verdict"]

WHOLE_TOLERANCE = 0.1  # points, where the very images of the publication were measured: decoders and resizes move a few
OTHER_ENCODING = "another encoding of the picture: its pixels are not those that the values were published for"


class Published(NamedTuple):
    value: Any
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One published figure, or several sources' for the same, and what was measured."""

    name: str
    published: tuple[Published, ...]  # none: the figure was asked for, and nobody has published it
    found: Any  # None: not measured
    difference: float | None  # largest absolute one, from the nearest of the published
    tolerance: float | None
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was checked, of which files, on what, and how it ended."""

    facts: Mapping[str, Any]
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """Failed if any check failed; passed if then any passed."""
        verdicts = {check.verdict for check in self.checks}
        return "failed" if "failed" in verdicts else "passed" if "passed" in verdicts else "no verdict"

    def to_dict(self) -> dict[str, Any]:
        checks = [asdict(check) | {"published": [p._asdict() for p in check.published]} for check in self.checks]
        return {**self.facts, "checks": checks, "verdict": self.verdict}


# ── what was published ───────────────────────────────────────────────────────────────────────────────────────────────


class DataSet(NamedTuple):
    name: str
    images: int
    classes: int  # of equally many images each


IMAGENET = DataSet("the validation set of ImageNet-1k", 50_000, 1_000)
TINY = DataSet("the held-out images of Tiny-ImageNet", 5_000, 200)


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How scores were measured, and which came out."""

    name: str
    data_set: DataSet = IMAGENET
    crop_pct: float | None = None  # of timm's bicubic resize and centre crop; None: the checkpoint's own preprocessing
    scores: Mapping[str, tuple[Published, ...]]  # top-1, top-5, ReaL top-1, ReaL top-5 → per cent

    def preprocess(self, own: PreprocessConfig) -> PreprocessConfig:
        """
        Args:
            own: of the checkpoint; its pixels keep their number and their mean and deviation.
        """
        if self.crop_pct is None or own.mean is None or own.std is None:
            return own
        return PreprocessConfig.timm_crop(own.image_size[0], crop_pct=self.crop_pct, mean=own.mean, std=own.std)


_NAMES = {SQUASH: "squash", JAX: "squash", PERCEIVER: "centre-crop", TIMM: "timm-crop"}  # any other: "held-out"

# Beside the catalogue's score: protocol, figure, per cent, source. Spec of ViT, §6.5.
_ORIGINAL_B16 = [
    ("timm-crop", "top-1", 81.78, TIMM), ("timm-crop", "top-5", 96.12, TIMM), ("timm-crop", "ReaL top-1", 86.75, TIMM),
]  # fmt: skip
_MORE: dict[str, list[tuple[str, str, float, str]]] = {
    "google/vit-base-patch16-224": [("squash", "top-1", 81.2, JAX), *_ORIGINAL_B16],
    "google/vit-large-patch16-224": [
        ("timm-crop", "top-1", 83.06, TIMM),
        ("timm-crop", "top-5", 96.44, TIMM),
        ("timm-crop", "ReaL top-1", 87.01, TIMM),
        ("timm-crop", "ReaL top-5", 97.69, TIMM),
    ],
    "google/vit-large-patch16-384": [("timm-crop", "top-5", 97.36, TIMM), ("timm-crop", "ReaL top-1", 88.41, TIMM)],
    "google/vit-large-patch32-384": [("timm-crop", "top-5", 96.09, TIMM)],
    "google/vit-base-patch16-384": [("timm-crop", "top-5", 97.21, TIMM)],
    "google/vit-base-patch32-384": [("timm-crop", "top-5", 96.13, TIMM)],
    "timm/vit_base_patch16_224.orig_in21k_ft_in1k": _ORIGINAL_B16[1:],
    "timm/vit_base_patch16_384.orig_in21k_ft_in1k": [("timm-crop", "top-5", 97.21, TIMM)],
    "timm/vit_large_patch32_384.orig_in21k_ft_in1k": [("timm-crop", "top-5", 96.09, TIMM)],
    "timm/vit_base_r50_s16_384.orig_in21k_ft_in1k": [("timm-crop", "top-5", 97.29, TIMM)],
}


def protocols(name: str) -> dict[str, Protocol]:
    """The protocols by which scores of a catalogue entry were published, by name; that of its own score is first."""
    entry = CATALOG.get(name)
    if entry is None or entry.score is None or entry.score_source is None:
        return {}
    rows = [(_NAMES.get(entry.score_source, "held-out"), "top-1", entry.score, entry.score_source)]
    rows += _MORE.get(name, [])
    found: dict[str, Protocol] = {}
    for protocol in dict.fromkeys(row[0] for row in rows):
        scores: dict[str, tuple[Published, ...]] = {}
        for _, figure, value, source in (row for row in rows if row[0] == protocol):
            scores[figure] = (*scores.get(figure, ()), Published(value, source))
        crop_pct = None if protocol != "timm-crop" else 1.0 if entry.image_size == 384 else 0.9
        data_set = TINY if protocol == "held-out" else IMAGENET
        found[protocol] = Protocol(name=protocol, data_set=data_set, crop_pct=crop_pct, scores=scores)
    return found


@cache
def expected() -> dict[str, Any]:
    """`picture`: where it is and its digests; `models`: name → what was published of it on the picture."""
    return json.loads((files("opsin") / "assets" / "expected.json").read_bytes())


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def verify(
    name: str,
    *,
    published_as: str | None = None,
    revision: str | None = None,
    picture: ImageSource | None = None,
    data: Samples | None = None,
    real: Path | None = None,
    protocol: str | None = None,
    device: str = "auto",
    batch_size: int = 32,
    references: Mapping[str, Any] | None = None,
    known: Mapping[str, Protocol] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Measure a checkpoint against what was published of it.

    Args:
        name: as `opsin.load` takes it.
        published_as: the hub id of what a local copy is a copy of.
        picture: the reference picture; None: it is fetched. With other pixels than the reference has, values within
            the tolerance pass, with a note, and others get no verdict.
        data: the labelled images of the protocol; of these the held-out ones, where some are held out. Classes are
            matched by name; `data` are relabelled by it. None: accuracy is not checked.
        real: ImageNet ReaL's real.json.
        protocol: of `protocols`; None: the first.
        references, known: instead of `expected()` and of the protocols of the model.
    Raises:
        ModelError: the model cannot be loaded, or takes no images.
        DataError: nothing to check against, no such protocol, a picture or data that cannot be read.
        NoHead: scores are asked of a checkpoint without a classifier.
    """
    references = expected() if references is None else references
    claim = published_as or name
    values = references["models"].get(claim, {})
    known = protocols(claim) if known is None else known
    _check_request(claim, values, known, has_data=data is not None, of_data=(real, protocol))
    if known and protocol is not None and protocol not in known:
        raise DataError(f'{claim} has no protocol "{protocol}". It has {", ".join(known)}.')
    image: Image.Image | None = None
    seen: dict[str, Any] | None = None
    if values:
        image, seen = _picture(picture, references["picture"], needed=data is None)
    elif picture is not None:
        log.warning("nothing was published of %s on the picture, so it is of no use here.", claim)
    classifier = load(name, revision=revision, dtype="fp32", device=device)
    if not isinstance(classifier, Classifier):
        raise ModelError(f"{name} is not a model of single images, and nothing that it gives was published to check.")
    checks = [_on_picture(kind, wanted, classifier, image, seen) for kind, wanted in values.items()]
    facts: dict[str, Any] = {
        "opsin": __version__,
        "model": name,
        "published_as": claim,
        "revision": classifier.source.revision,
        "sha256": classifier.source.sha256,
        "format": classifier.source.format,
        "preprocess": classifier.preprocess.spec(),
        "preprocess_hash": classifier.preprocess.hash(),
        "picture": seen,
        "protocol": None,
        "data": None,
    }
    if data is not None:
        chosen = known[protocol] if protocol is not None else next(iter(known.values()))
        preprocess = chosen.preprocess(classifier.preprocess)
        found, facts["data"] = _accuracy(
            classifier, preprocess, chosen, data, real, batch_size=batch_size, on_batch=on_batch
        )
        checks += found
        facts["protocol"] = {
            "name": chosen.name,
            "data_set": chosen.data_set.name,
            "preprocess": preprocess.spec(),
            "preprocess_hash": preprocess.hash(),
        }
    machine = bench.machine()
    facts["time"] = machine.pop("date")
    machine["versions"] |= {"numpy": np.__version__, "pillow": PIL.__version__}
    ran = {"device": str(classifier.device), "dtype": classifier.dtype, "engine": classifier.engine}
    facts["environment"] = machine | ran
    return Certificate(facts=facts, checks=tuple(checks))


def _check_request(
    claim: str, values: Mapping[str, Any], known: Mapping[str, Protocol], *, has_data: bool, of_data: tuple[Any, ...]
) -> None:
    """
    Args:
        of_data: what goes with data only.
    """
    if not values and not known:
        pictured = ", ".join(expected()["models"])
        scored = [each for each in CATALOG if protocols(each)]
        near = [each for each in nearest(claim) if each in scored or each in expected()["models"]]
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(
            f'nothing was published of "{claim}" that opsin could check.{hint} For a copy of a published model, name '
            f"the original: --as {near[0] if near else 'google/vit-base-patch16-224'}. Values on a picture are known "
            f"of {pictured}; accuracy of {len(scored)} models, those that `opsin models` lists with a top-1."
        )
    if not values and not has_data:
        figures = ", ".join(
            f"{value} % ({source})" for each in known.values() for value, source in each.scores["top-1"]
        )
        raise DataError(
            f"of {claim} only accuracy was published: {figures}. To check it, give the images, "
            f"{next(iter(known.values())).data_set.name}: --data FOLDER."
        )
    if has_data and not known:
        raise DataError(f"no accuracy was published of {claim}; without data its values on the picture are checked.")
    if not has_data and any(each is not None for each in of_data):
        raise DataError("a protocol and ReaL's labels are for measuring accuracy: give the images too, --data FOLDER.")


# ── on the picture ───────────────────────────────────────────────────────────────────────────────────────────────────


def _picture(
    source: ImageSource | None, reference: Mapping[str, Any], *, needed: bool
) -> tuple[Image.Image | None, dict[str, Any]]:
    """The picture and what is said of it; without it, if it cannot be fetched and is not all there is to check."""
    given = reference["url"] if source is None else source
    name = str(given) if isinstance(given, str | Path) else type(given).__name__
    try:
        image = decode(given)
    except ImageError as error:
        if source is not None:
            raise DataError(f"the picture cannot be read: {error}") from error
        message = (
            f"the reference picture ({reference['name']}) cannot be fetched: {error} Give a copy of it: --picture FILE."
        )
        if needed:
            raise DataError(message) from error
        return None, {"source": name, "error": message}
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    return image, {
        "source": name,
        "size": list(image.size),
        "pixels_sha256": digest,
        "is_reference": digest == reference["pixels_sha256"],
    }


def _on_picture(
    kind: str,
    wanted: Mapping[str, Any],
    classifier: Classifier,
    image: Image.Image | None,
    seen: Mapping[str, Any] | None,
) -> Check:
    """One entry of a model in `expected()`: "logits" or "hidden" as arrays, "top5" as labels with scores."""
    name = {"logits": "first logits", "hidden": "first hidden states", "top5": "best labels"}[kind]
    published = (Published(wanted["values"], wanted["source"]),)
    assert seen is not None
    if image is None:
        return Check(
            name=name, published=published, found=None, difference=None, tolerance=wanted["tolerance"],
            verdict="no verdict", note=seen["error"],
        )  # fmt: skip
    note = ""
    if kind == "top5":
        labels = [each["label"] for each in wanted["values"]]
        names = classifier.labels.names if classifier.labels is not None else ()
        probs = torch.softmax(classifier.logits(image)[0].double(), 0).numpy()
        measured = np.array([probs[names.index(label)] if label in names else 0.0 for label in labels])
        difference = _distance(measured, [each["score"] for each in wanted["values"]])
        scores = _rounded(measured)
        found = scores and [{"label": label, "score": score} for label, score in zip(labels, scores, strict=True)]
        if missing := [label for label in labels if label not in names]:
            note = f'the model has no class "{missing[0]}"'
    elif kind == "logits":
        logits = classifier.logits(image)[0].double().numpy()[: len(wanted["values"])]
        found, difference = _rounded(logits), _distance(logits, wanted["values"])
    else:
        hidden = _hidden(classifier, image, wanted.get("image_size"))
        corner = hidden[: len(wanted["values"]), : len(wanted["values"][0])]
        found, difference = _rounded(corner), _distance(corner, wanted["values"])
        if [1, *hidden.shape] != wanted["shape"]:
            note = "{} tokens of {}, published {} of {}".format(*hidden.shape, *wanted["shape"][1:])
    verdict: Verdict = "passed" if difference <= wanted["tolerance"] and not note else "failed"
    if not seen["is_reference"]:
        note = f"{note}; {OTHER_ENCODING}" if note else OTHER_ENCODING
        verdict = "passed" if verdict == "passed" else "no verdict"
    return Check(
        name=name,
        published=published,
        found=found,
        difference=difference if math.isfinite(difference) else None,
        tolerance=wanted["tolerance"],
        verdict=verdict,
        note=note,
    )


def _hidden(classifier: Classifier, image: Image.Image, image_size: int | None) -> np.ndarray:
    """Tokens (P + N, D) after the last norm, of the picture at `image_size` or at the checkpoint's own."""
    model, preprocess = classifier.model, classifier.preprocess
    if not isinstance(model, ViT):
        raise ModelError(f"{classifier.source.name} is no Vision Transformer; its hidden states are others.")
    if image_size is not None:
        preprocess = replace(preprocess, size=(image_size, image_size))
    with torch.inference_mode(), exact_fp32(classifier.device):
        pixels = preprocess.normalise(preprocess.resize(image))[None].to(classifier.device)
        return model.encode(model.embed(pixels))[0].double().cpu().numpy()


def _rounded(values: np.ndarray) -> Any:
    """As JSON has it, which has no NaN."""
    return np.round(values, 6).tolist() if np.isfinite(values).all() else None


def _distance(found: np.ndarray, values: Any) -> float:
    """Largest difference; infinite where the shapes differ or a value is not finite."""
    if found.shape != np.shape(values) or not np.isfinite(found).all():
        return math.inf
    return float(np.abs(found - np.array(values)).max())


# ── accuracy ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _accuracy(
    classifier: Classifier,
    preprocess: PreprocessConfig,
    protocol: Protocol,
    samples: Samples,
    real: Path | None,
    *,
    batch_size: int,
    on_batch: Callable[[int, int], None] | None,
) -> tuple[list[Check], dict[str, Any]]:
    """The protocol's scores, and what is said of the data."""
    labels = classifier.labels
    if labels is None:
        raise NoHead(f"{classifier.source.name} has no classification head, so it has no accuracy.")
    evaluate.align(samples, labels, partial=True)
    rows = np.arange(len(samples))
    if samples.held_out is not None and samples.held_out.any():
        rows = np.flatnonzero(samples.held_out)
    sets = None
    if real is not None:  # before hours are spent on the images
        sets = evaluate.real_sets(evaluate.load_real(real), [samples.key(int(row)) for row in rows], labels)
    own, classifier.preprocess = classifier.preprocess, preprocess
    try:
        found = evaluate.predict(classifier, samples, rows, batch_size=batch_size, on_batch=on_batch)
    finally:
        classifier.preprocess = own
    if not found.ok.any():
        raise DataError(f"none of the {len(rows)} images can be read; the first: {found.errors[0].message}")
    logits, targets = found.logits[found.ok], samples.targets[rows[found.ok]]
    result = evaluate.metrics(logits, targets, labels)
    if result.top1 is None or result.top5 is None:
        raise DataError("the model gives several classes an image, so it has no top-1; nothing was published of such.")
    scores = {"top-1": result.top1, "top-5": result.top5}
    if sets is not None:
        kept = [each for each, ok in zip(sets, found.ok, strict=True) if ok]
        scores["ReaL top-1"], _ = evaluate.real_accuracy(logits.argmax(1), kept)
        scores["ReaL top-5"], _ = evaluate.real_accuracy(_best_accepted(logits, kept), kept)
    keys = [key for key, ok in zip(found.keys, found.ok, strict=True) if ok]
    exact, note = _standing(protocol.data_set, keys, targets, len(found.errors))
    checks = [
        _score_check(figure, 100 * score, len(targets), protocol.scores.get(figure, ()), exact, note)
        for figure, score in scores.items()
        if figure in protocol.scores or figure.startswith("ReaL")
    ]
    facts = {
        "images": len(targets),
        "unreadable": [{"path": bad.key, "type": bad.kind, "message": bad.message} for bad in found.errors],
        "classes": len(np.unique(targets)),
        "digest": data_digest(samples, rows[found.ok]),
        "scores": {figure: round(100 * score, 4) for figure, score in scores.items()},
    }
    return checks, facts


def _best_accepted(logits: np.ndarray, accepted: Iterable[frozenset[int]]) -> np.ndarray:
    """Of each image's five best classes the first that is accepted, else the best."""
    best = torch.from_numpy(logits).topk(min(5, logits.shape[1])).indices.numpy()
    return np.array(
        [next((k for k in row if int(k) in some), row[0]) for row, some in zip(best, accepted, strict=True)]
    )


def _standing(data_set: DataSet, keys: list[str], targets: np.ndarray, bad: int) -> tuple[bool | None, str]:
    """Whether these are the images of a publication: all of them (True), some (False), or others (None); and a note.

    All: as many images, of as many classes, equally many each. Some can be told only of ImageNet's validation set, by
    the ILSVRC2012_val_ in their names; of fewer than half of the classes that so many images could show they are no
    sample of it.
    """
    counts = np.bincount(targets)
    counts = counts[counts > 0]
    each = data_set.images // data_set.classes
    if not bad and len(counts) == data_set.classes and (counts == each).all():
        return True, f"all {len(targets):,} images: {data_set.name}"
    named = data_set is IMAGENET and all(evaluate.REAL_NUMBER.search(key) for key in keys)
    if named and len(targets) < data_set.images and 2 * len(counts) >= min(len(targets), data_set.classes):
        return False, f"{len(targets):,} of the {data_set.images:,} images; the tolerance is the 95 % interval"
    unread = f", {bad} more could not be read" if bad else ""
    return None, (
        f"not {data_set.name} ({data_set.images:,} images of {data_set.classes:,} classes) but {len(targets):,} images "
        f"of {len(counts):,} classes{unread}: the score says nothing of the published one"
    )


def _score_check(
    figure: str, found: float, images: int, published: tuple[Published, ...], exact: bool | None, note: str
) -> Check:
    """
    Args:
        found: per cent.
        exact, note: of `_standing`.
    """
    difference = min((found - value for value, _ in published), key=abs, default=None)
    tolerance, verdict = None, "no verdict"
    if difference is None:
        note = "nothing was published of it by this protocol"
    elif exact is not None:
        share = (found - difference) / 100
        tolerance = WHOLE_TOLERANCE if exact else 196 * math.sqrt(share * (1 - share) / images)
        verdict = "passed" if abs(difference) <= tolerance + 1e-9 else "failed"
    return Check(
        name=figure,
        published=published,
        found=round(found, 4),
        difference=None if difference is None else round(abs(difference), 4),
        tolerance=None if tolerance is None else round(tolerance, 4),
        verdict=verdict,  # type: ignore[arg-type]
        note=note,
    )


def data_digest(samples: Samples, rows: Iterable[int]) -> str:
    """sha256 of the sorted lines "sha256 of the file's bytes, class", in hex.

    The same for the same labelled images, whatever they are called and stored in: a folder, tar or zip files, Parquet.
    The class is its WordNet id, or its name where it has none. It costs a second reading of the files.
    """
    labels = samples.labels
    lines = []
    for row in rows:
        source = samples.source(int(row))
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        target = int(samples.targets[row])
        label = (labels.wnids and labels.wnids[target]) or labels.names[target]
        lines.append(f"{hashlib.sha256(data).hexdigest()} {label}\n")
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
