"""logits, features → is it any of the classes? "None of these", at a rate of errors that the user picks.

    energy       log Σ exp(logit)                                     Liu et al. 2020
    knn          cosine to the k-th nearest of known images           Sun et al. 2022
    mahalanobis  − squared distance to the nearest mean of a class    Lee et al. 2018

Each gives a score, higher for images of the classes. What a score means is read off two sets of images that had no part
in making it: images of the classes, and images of other things.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from opsin.checkpoints import files
from opsin.errors import CheckpointError, DataError

Method = Literal["energy", "knn", "mahalanobis"]
Parts = Mapping[str, np.ndarray]  # float32 numbers that a score needs, by name

FILE = "unknown.safetensors"  # in the folder of a model
BANK_PER_CLASS = 50  # images that means and neighbours come from; more change little
MAX_BANK = 10_000  # of all classes, for neighbours: what is kept, and compared with every image
MIN_IMAGES = 20  # of each of the two sets
KEPT = 1000  # scores of each that are stored, evenly spread over the sorted ones
HEADS = ("head.", "head_dist.", "decoder.out.")
AGAIN = "Fit it again: opsin evaluate DATA --model FOLDER --unknown-from PHOTOS"


class Answers(NamedTuple):
    """What a model says of n images."""

    logits: np.ndarray  # (n, K)
    features: np.ndarray  # (n, D)


class Quality(NamedTuple):
    """How well scores tell images of the classes from others."""

    auroc: float  # probability that a known image scores higher than another
    fpr95: float  # share of others that are taken for known where 95 % of the known are


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unknown:
    """A detector of images that are none of a model's classes, as `fit` makes it and `read` finds it."""

    method: Method
    parts: Parts
    known: np.ndarray  # (at most KEPT,) scores of images of the classes, ascending
    others: np.ndarray  # (at most KEPT,) of images of other things, ascending
    num_known: int  # images measured
    num_others: int
    head: str  # `fingerprint` of the model

    def scores(self, logits: np.ndarray, features: np.ndarray) -> np.ndarray:
        """(B, K), (B, D) → (B,) float64, higher for images of the classes."""
        return _score(self.method, self.parts, Answers(logits, features))

    def ranks(self, scores: np.ndarray) -> np.ndarray:
        """Scores → the share of the other images that scored lower, 0 to 1. 0.95: more known than 95 % of them."""
        return np.searchsorted(self.others, scores, side="left") / len(self.others)

    def accepts(self, ranks: np.ndarray, rate: float) -> np.ndarray:
        """Which images are taken for known, if of other things this share may be: the false-accept rate.

        Raises:
            ValueError: not a share from 0 up to, but not, 1.
        """
        check(rate)
        return ranks >= 1 - rate - 1e-9

    def false_accept(self, rate: float) -> float:
        """The share of the other images that are taken for known at that rate: as close as their number allows."""
        return float(self.accepts(self.ranks(self.others), rate).mean())

    def false_reject(self, rate: float) -> float:
        """What the rate costs: the share of images of the classes that are taken for others."""
        return 1 - float(self.accepts(self.ranks(self.known), rate).mean())


def check(rate: float) -> None:
    """
    Raises:
        ValueError: not a share from 0 up to, but not, 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"a false-accept rate of {rate} is no share of images: 0.05 takes 5 % of others for known.")


def fingerprint(model: nn.Module) -> str:
    """64 hex digits of a classifier's head: a detector that was fitted to another one says nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(HEADS):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ── fit ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fit(
    bank: np.ndarray,
    targets: np.ndarray,
    known: Answers,
    others: Answers,
    *,
    head: str,
    methods: tuple[Method, ...] = get_args(Method),
) -> tuple[Unknown, dict[Method, Quality]]:
    """The best of the detectors, and how good each is.

    Every other image of `known` and of `others` chooses, by AUROC; the rest give what is stored and returned.

    Args:
        bank, targets: (n, D) features of images of the classes, (n,) their classes: means and neighbours.
        known: images of the classes that are not in the bank, nor were trained on.
        others: images of other things.
        head: `fingerprint` of the model.
        methods: to choose from.
    Raises:
        DataError: fewer than 20 images in a set; no class with two images in the bank.
    """
    for name, count in (("the classes", len(known.logits)), ("other things", len(others.logits))):
        if count < MIN_IMAGES:
            raise DataError(f'{count} images of {name} are there to learn "unknown" from; {MIN_IMAGES} are needed.')
    found: dict[Method, tuple[Parts, np.ndarray, np.ndarray]] = {}
    for method in methods:
        parts = _make(method, bank, np.asarray(targets))
        found[method] = parts, _score(method, parts, known), _score(method, parts, others)
    best = max(methods, key=lambda method: quality(*(scores[::2] for scores in found[method][1:])).auroc)
    parts, *scores = found[best]
    measured = [np.sort(part[1::2]) for part in scores]
    detector = Unknown(
        method=best,
        parts=parts,
        known=_thinned(measured[0]),
        others=_thinned(measured[1]),
        num_known=len(measured[0]),
        num_others=len(measured[1]),
        head=head,
    )
    return detector, {method: quality(a[1::2], b[1::2]) for method, (_, a, b) in found.items()}


def quality(known: np.ndarray, others: np.ndarray) -> Quality:
    """Of scores (n,) and (m,), in any order; equal ones count half."""
    known, others = np.sort(known), np.sort(others)
    below = [np.searchsorted(others, known, side=side) for side in ("left", "right")]
    threshold = known[int(0.05 * len(known))]
    return Quality(float(np.mean(below) / len(others)), float((others >= threshold).mean()))


def rescaled(detector: Unknown, temperature: float, head: str) -> Unknown:
    """The same detector for the same model whose logits were divided by a temperature since."""
    parts = detector.parts
    if detector.method == "energy":
        parts = {"scale": (parts["scale"] * temperature).astype(np.float32)}
    return replace(detector, parts=parts, head=head)


def _thinned(scores: np.ndarray) -> np.ndarray:
    return scores[np.linspace(0, len(scores) - 1, min(len(scores), KEPT)).round().astype(np.int64)]


def _make(method: Method, bank: np.ndarray, targets: np.ndarray) -> Parts:
    if method == "energy":
        return {"scale": np.ones(1, np.float32)}
    classes, rows = np.unique(targets, return_inverse=True)
    if method == "knn":
        kept = np.argsort(places(rows), kind="stable")[:MAX_BANK]
        per_class = max(len(kept) // len(classes), 1)  # so that a whole class can be nearest
        return {"bank": _unit(bank[kept]), "k": np.array([per_class], np.float32)}
    counts = np.bincount(rows)
    if counts.max(initial=0) < 2:
        raise DataError("no class has two images to learn from, so nothing says how far images of a class differ.")
    x = bank.astype(np.float64)
    means = np.stack([x[rows == i].mean(0) for i in range(len(classes))])
    spread = x - means[rows]
    whiten = np.linalg.cholesky(np.linalg.inv(_covariance(spread[counts[rows] > 1])))
    return {"whiten": whiten.astype(np.float32), "means": (means @ whiten).astype(np.float32)}


def places(targets: np.ndarray) -> np.ndarray:
    """(n,) classes → (n,) the how-many-th image of its class each is: 0, 1, …"""
    order = np.argsort(targets, kind="stable")
    place = np.empty(len(targets), np.int64)
    place[order] = np.arange(len(targets)) - np.searchsorted(targets[order], targets[order])
    return place


def _covariance(x: np.ndarray) -> np.ndarray:
    """(n, D) of mean zero → (D, D), drawn towards a multiple of one, so that few images do.

    Source: Ledoit and Wolf 2004.
    """
    n, width = x.shape
    sample = x.T @ x / n
    target = np.trace(sample) / width * np.eye(width)
    distance = ((sample - target) ** 2).sum()
    noise = (((x**2).sum(1) ** 2).sum() / n - (sample**2).sum()) / n
    share = min(max(noise / max(distance, 1e-300), 1e-6), 1.0)
    return share * target + (1 - share) * sample


def _score(method: Method, parts: Parts, answers: Answers) -> np.ndarray:
    logits, features = answers
    if method == "energy":
        z = logits.astype(np.float64) * parts["scale"]
        top = z.max(1, keepdims=True)
        return top[:, 0] + np.log(np.exp(z - top).sum(1))
    if method == "knn":
        k = min(int(parts["k"][0]), len(parts["bank"]))
        similar = _unit(features) @ parts["bank"].T
        return np.partition(similar, -k, axis=1)[:, -k].astype(np.float64)
    x, means = features.astype(np.float64) @ parts["whiten"], parts["means"].astype(np.float64)
    return -((x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)).min(1)


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


# ── file ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(folder: Path, detector: Unknown) -> Path:
    """Write it beside the weights of its model; the file appears whole, or not at all."""
    arrays = {
        **{f"{detector.method}.{name}": values for name, values in detector.parts.items()},
        "known": detector.known,
        "others": detector.others,
        "images": np.array([detector.num_known, detector.num_others], np.int64),
        "head": np.frombuffer(bytes.fromhex(detector.head), np.uint8),
    }
    path = Path(folder) / FILE
    files.write_tensors(path, {name: torch.from_numpy(values.copy()) for name, values in arrays.items()})
    return path


def read(folder: Path, model: nn.Module) -> Unknown | None:
    """What `write` wrote; None where nothing was.

    Raises:
        CheckpointError: a damaged file, or one that was fitted to another model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    arrays = {name: tensor.double().numpy() for name, tensor in files.read_tensors(path).items()}
    own = {name for name in arrays if "." in name}
    width: Any = model.config.feature_dim  # type: ignore[union-attr]
    shapes: dict[Method, dict[str, tuple[int | None, ...]]] = {
        "energy": {"scale": (1,)},
        "knn": {"bank": (None, width), "k": (1,)},
        "mahalanobis": {"whiten": (width, width), "means": (None, width)},
    }
    method = next((m for m, parts in shapes.items() if own == {f"{m}.{name}" for name in parts}), None)
    if method is None or set(arrays) - own != {"known", "others", "images", "head"}:
        raise CheckpointError(f"{path} holds {', '.join(sorted(arrays))}, which is not what opsin writes. {AGAIN}")
    head = arrays["head"].astype(np.uint8).tobytes().hex()
    if head != fingerprint(model):
        raise CheckpointError(f"{path} was made for another model, or for this one before it changed. {AGAIN}")
    parts = {name: arrays[f"{method}.{name}"].astype(np.float32) for name in shapes[method]}
    for name, shape in shapes[method].items():
        values = parts[name]
        fits = values.ndim == len(shape) and all(a in (None, b) for a, b in zip(shape, values.shape, strict=True))
        if not fits or not values.size or not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {method}.{name} {values.shape} does not fit the model. {AGAIN}")
    for name in ("known", "others"):
        scores = arrays[name]
        if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
            raise CheckpointError(f"{path}: {name} must be finite scores in ascending order. {AGAIN}")
    if arrays["images"].shape != (2,):
        raise CheckpointError(f"{path}: images must be two counts. {AGAIN}")
    num_known, num_others = map(int, arrays["images"])
    return Unknown(
        method=method, parts=parts, known=arrays["known"], others=arrays["others"],
        num_known=num_known, num_others=num_others, head=head,
    )  # fmt: skip
