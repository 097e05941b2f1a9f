"""How good a classifier is: accuracy, errors by class, calibration, and where two models differ.

    samples ── predict ──▶ Predictions ── metrics ──▶ Metrics ── report ──▶ evaluation.json, .md, pictures

All figures are computed in float64, in chunks, whatever the logits are.
"""

import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from opsin import plots
from opsin.checkpoints.files import replacing
from opsin.data.archives import Item
from opsin.data.samples import Samples, relabel
from opsin.errors import DataError, MissingExtra
from opsin.labels import Labels, match
from opsin.models.perceiver_io import ImagePerceiver
from opsin.pipeline import Classifier
from opsin.plots import Bin
from opsin.results import json_line

log = logging.getLogger(__name__)

CHUNK = 2**22  # numbers at once: 32 MiB of float64
LISTED_CLASSES = 30  # in Markdown
PICTURED_CLASSES = 4096  # a confusion picture of more takes more memory than it is worth
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
REAL_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")


# ── images → logits ──────────────────────────────────────────────────────────────────────────────────────────────────


class Bad(NamedTuple):
    """An image without an answer."""

    key: str
    kind: str  # of its ImageError, or "not_finite"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """What a model said of n images, in the order they were asked for."""

    keys: tuple[str, ...]
    rows: np.ndarray  # (n,) int64, of the set
    ok: np.ndarray  # (n,) bool; where not, the numbers below are NaN
    logits: np.ndarray  # (n, K) float32; (n, 0) where they were not asked for
    features: np.ndarray  # (n, D) float32; (n, 0) where they were not asked for
    errors: tuple[Bad, ...]
    labels: Labels | None  # of the K classes


def predict(
    classifier: Classifier,
    samples: Samples,
    rows: Sequence[int] | np.ndarray | None = None,
    *,
    logits: bool = True,
    features: bool = False,
    batch_size: int = 32,
    on_batch: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Run a classifier over images of a set; one that cannot be read, or has no finite answer, fails alone.

    Pixels are those of `Classifier.stream`: in all but exact fp32 a JPEG's may be one off. Memory grows by the results
    only.

    Args:
        rows: of the set, in the order wanted; None: all.
        logits, features: what to compute; both take two passes of the model.
        on_batch: called with (images done, n) after every batch.
    Raises:
        ValueError: batch_size below 1, or nothing is asked for.
        NoHead: logits are asked of a checkpoint without a classifier.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    if not (logits or features):
        raise ValueError("logits and features are both False: nothing would be computed.")
    wanted = np.arange(len(samples)) if rows is None else np.asarray(rows, np.int64)
    keys = tuple(samples.key(int(row)) for row in wanted)
    parts: dict[bool, np.ndarray] = {}  # embed → (n, K) or (n, D), made when the first batch says how wide
    ok = np.zeros(len(wanted), bool)
    errors: list[Bad] = []

    ahead = zip(wanted.tolist(), keys, strict=True)
    batches = iter(
        lambda: [Item(key, partial(samples.source, row)) for row, key in itertools.islice(ahead, batch_size)], []
    )
    done = 0
    with closing(classifier.load_batches(batches)) as loaded:
        for batch in loaded:
            good = [done + i for i, item in enumerate(batch) if item.error is None]
            pixels = [item.pixels for item in batch if item.error is None]
            sound = np.ones(len(good), bool)
            for embed in (False, True):
                if not (features if embed else logits) or not good:
                    continue
                output = classifier.forward(pixels, embed=embed).numpy()
                if embed not in parts:
                    parts[embed] = np.full((len(wanted), output.shape[1]), np.nan, np.float32)
                parts[embed][good] = output
                sound &= np.isfinite(output).all(1)
            ok[good] = sound
            for i, item in enumerate(batch, done):
                if item.error is not None:
                    errors.append(Bad(item.name, item.error.kind, str(item.error)))
                elif not ok[i]:
                    message = f"{item.name}: the model's output for it is not finite."
                    errors.append(Bad(item.name, "not_finite", message))
                    for part in parts.values():
                        part[i] = np.nan
            done += len(batch)
            if on_batch is not None:
                on_batch(done, len(wanted))
    widths = {False: len(classifier.labels or ()) if logits else 0, True: classifier.feature_dim if features else 0}
    for embed, width in widths.items():
        parts.setdefault(embed, np.full((len(wanted), width), np.nan, np.float32))
    return Predictions(
        keys=keys,
        rows=wanted,
        ok=ok,
        logits=parts[False],
        features=parts[True],
        errors=tuple(errors),
        labels=classifier.labels,
    )


# ── logits → figures ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metrics:
    """The figures of a model on n images with K classes. Shares are from 0 to 1.

    A figure of a class without an image is NaN and left out of the means; the precision of a class that was never
    predicted is 0. What goes with one kind of set only is None for the other.
    """

    n: int
    multi_label: bool
    names: tuple[str, ...]  # of the K classes
    classes: np.ndarray  # (K,) int64, their indices in the model
    support: np.ndarray  # (K,) int64, images of the class
    precision: np.ndarray  # (K,)
    recall: np.ndarray  # (K,)
    f1: np.ndarray  # (K,)
    loss: float  # mean negative log-likelihood, nats; multi-label: binary, mean over images and classes
    macro_precision: float
    macro_recall: float
    macro_f1: float
    ece: float  # expected calibration error
    mce: float  # maximum calibration error
    brier: float  # squared distance to the truth: summed over classes; multi-label: mean
    reliability: tuple[Bin, ...]  # of the predicted class; multi-label: of every class of every image
    # one class an image
    top1: float | None = None
    top5: float | None = None
    confusion: np.ndarray | None = None  # (K, K) int32 images, rows are the true classes
    # several
    mean_average_precision: float | None = None
    average_precision: np.ndarray | None = None  # (K,)
    micro_f1: float | None = None
    exact_match: float | None = None

    @property
    def score(self) -> float:
        """The figure to choose a model by: top-1, or the mean average precision."""
        score = self.mean_average_precision if self.multi_label else self.top1
        assert score is not None
        return score

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: NaN is None; `confusion` lists [true class, predicted class, images] of the cells in use."""
        data: dict[str, Any] = {"n": self.n, "multi_label": self.multi_label, "loss": self.loss}
        for name in ("top1", "top5", "mean_average_precision", "micro_f1", "exact_match"):
            if getattr(self, name) is not None:
                data[name] = _number(getattr(self, name))
        for name in ("macro_precision", "macro_recall", "macro_f1", "ece", "mce", "brier"):
            data[name] = _number(getattr(self, name))
        columns = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        if self.average_precision is not None:
            columns["average_precision"] = self.average_precision
        data["classes"] = [
            {"index": int(self.classes[i]), "name": name, "support": int(self.support[i])}
            | {column: _number(values[i]) for column, values in columns.items()}
            for i, name in enumerate(self.names)
        ]
        if self.confusion is not None:
            true, predicted = np.nonzero(self.confusion)
            cells = (self.classes[true], self.classes[predicted], self.confusion[true, predicted])
            data["confusion"] = np.stack(cells, axis=1).tolist()
        data["reliability"] = list(self.reliability)
        return data

    def to_markdown(self, max_classes: int | None = LISTED_CLASSES) -> str:
        """Two tables: the figures, and the classes by recall, lowest first; `max_classes` None lists all of them."""
        head = [("images", f"{self.n:,}"), ("loss", f"{self.loss:.4f}")]
        shares = (
            ("top-1", self.top1),
            ("top-5", self.top5),
            ("mean average precision", self.mean_average_precision),
            ("micro F1", self.micro_f1),
            ("exact match", self.exact_match),
            ("macro precision", self.macro_precision),
            ("macro recall", self.macro_recall),
            ("macro F1", self.macro_f1),
            ("expected calibration error", self.ece),
            ("maximum calibration error", self.mce),
        )
        head += [(name, _percent(value)) for name, value in shares if value is not None]
        head.append(("Brier score", f"{self.brier:.4f}"))
        lines = ["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in head), ""]
        present = np.flatnonzero(self.support)
        order = present[np.argsort(self.recall[present], kind="stable")]
        listed = order if max_classes is None else order[:max_classes]
        if len(listed) < len(order):
            lines += [f"The {len(listed)} classes of the lowest recall, of {len(order)}:", ""]
        last = "average precision" if self.multi_label else "most often taken for"
        lines += [f"| class | images | recall | precision | F1 | {last} |", "|---|---:|---:|---:|---:|---|"]
        for i in listed:
            shown = (_percent(values[i]) for values in (self.recall, self.precision, self.f1))
            cells = [_cell(self.names[i]), f"{self.support[i]:,}", *shown, self._remark(int(i))]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def _remark(self, i: int) -> str:
        if self.average_precision is not None:
            return _percent(self.average_precision[i])
        assert self.confusion is not None
        others = self.confusion[i].copy()
        others[i] = 0
        j = int(others.argmax())
        return f"{_cell(self.names[j])} ({others[j]:,})" if others[j] else ""


def metrics(
    logits: np.ndarray,
    targets: np.ndarray,
    labels: Labels,
    *,
    bins: int = 15,
    classes: Sequence[int] | np.ndarray | None = None,
) -> Metrics:
    """The figures of logits against the truth.

    Args:
        logits: (n, K), any float type. Of equal logits the lower class comes first.
        targets: (n,) class indices; where `labels.multi_label`, (n, K) of 0 and 1, and a class is predicted where its
            probability is above one half.
        labels: of the K classes.
        bins: equal intervals of confidence.
        classes: those that the model may choose from, softmax included; None: all. Figures are then theirs alone.
    Returns:
        Precision, recall and F1 as scikit-learn defines them; average precision too, as the sum over distinct scores.
    Raises:
        ValueError: shapes that do not fit, no image, logits that are not finite, a class that is not there.
    Source: Guo et al. 2017, §2, for the calibration errors; bins are (low, high].
    """
    targets = np.asarray(targets)
    _check(logits, targets, len(labels), labels.multi_label)
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1.")
    if classes is None:
        chosen = np.arange(len(labels))
    else:
        chosen = np.asarray(classes, np.int64)
        if not len(chosen) or len(np.unique(chosen)) < len(chosen) or chosen.min() < 0 or chosen.max() >= len(labels):
            raise ValueError(f"classes must be different indices from 0 to {len(labels) - 1}, one or more.")
        logits = logits[:, chosen]
        targets = targets[:, chosen] if labels.multi_label else _positions(targets, chosen, labels)
    names = tuple(labels.name(int(i)) for i in chosen)
    if labels.multi_label:
        return _several(logits, targets, names, chosen, bins)
    return _one(logits, targets, names, chosen, bins)


def _positions(targets: np.ndarray, chosen: np.ndarray, labels: Labels) -> np.ndarray:
    place = np.full(len(labels), -1)
    place[chosen] = np.arange(len(chosen))
    found = place[targets]
    if (found < 0).any():
        row = int(np.argmax(found < 0))
        name = labels.name(int(targets[row]))
        raise ValueError(f'row {row} is of class {targets[row]} ("{name}"), which is not among the classes chosen.')
    return found


def _one(logits: np.ndarray, targets: np.ndarray, names: tuple[str, ...], classes: np.ndarray, bins: int) -> Metrics:
    n, size = logits.shape
    best, ranks, confidence = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    loss = brier = 0.0
    for part in _chunks(n, size):
        z, true = logits[part].astype(np.float64), targets[part]
        place = np.arange(len(z))
        own = z[place, true][:, None]
        before = (z > own) | ((z == own) & (np.arange(size) < true[:, None]))
        ranks[part] = before.sum(1)
        best[part] = z.argmax(1)
        log_probs = _log_softmax(z)
        loss -= log_probs[place, true].sum()
        probs = np.exp(log_probs)
        confidence[part] = probs[place, best[part]]
        brier += (probs**2).sum() + (1 - 2 * probs[place, true]).sum()
    confusion = np.zeros((size, size), np.int32)
    cells, counts = np.unique(targets * size + best, return_counts=True)
    confusion.reshape(-1)[cells] = counts
    support, predicted = np.bincount(targets, minlength=size), np.bincount(best, minlength=size)
    table = _Calibration(bins)
    table.add(confidence, best == targets)
    return Metrics(
        n=n,
        multi_label=False,
        names=names,
        classes=classes,
        loss=float(loss / n),
        top1=float((ranks < 1).mean()),
        top5=float((ranks < 5).mean()),
        confusion=confusion,
        brier=float(brier / n),
        **table.figures(),
        **_by_class(confusion.diagonal(), predicted, support),
    )


def _several(
    logits: np.ndarray, targets: np.ndarray, names: tuple[str, ...], classes: np.ndarray, bins: int
) -> Metrics:
    n, size = logits.shape
    hits, predicted, support = np.zeros((3, size), np.int64)
    loss = brier = 0.0
    exact = 0
    table = _Calibration(bins)
    for part in _chunks(n, size):
        z, truth = logits[part].astype(np.float64), targets[part] > 0
        said = z > 0
        hits += (said & truth).sum(0)
        predicted += said.sum(0)
        support += truth.sum(0)
        exact += int((said == truth).all(1).sum())
        loss += (np.logaddexp(0, z) - truth * z).sum()
        probs = _sigmoid(z)
        brier += ((probs - truth) ** 2).sum()
        table.add(probs.ravel(), truth.ravel())
    precisions = np.array([_average_precision(logits[:, k], targets[:, k] > 0) for k in range(size)])
    return Metrics(
        n=n,
        multi_label=True,
        names=names,
        classes=classes,
        loss=float(loss / (n * size)),
        mean_average_precision=_mean(precisions),
        average_precision=precisions,
        micro_f1=float(2 * hits.sum() / max(predicted.sum() + support.sum(), 1)),
        exact_match=exact / n,
        brier=float(brier / (n * size)),
        **table.figures(),
        **_by_class(hits, predicted, support),
    )


def _by_class(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> dict[str, Any]:
    empty = support == 0
    precision = np.where(empty, np.nan, hits / np.maximum(predicted, 1))
    recall = np.where(empty, np.nan, hits / np.maximum(support, 1))
    f1 = np.where(empty, np.nan, 2 * hits / np.maximum(predicted + support, 1))
    macro = {"macro_precision": _mean(precision), "macro_recall": _mean(recall), "macro_f1": _mean(f1)}
    return {"support": support, "precision": precision, "recall": recall, "f1": f1, **macro}


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Σ (R_i − R_{i−1}) P_i over the distinct scores, highest first; NaN without a positive."""
    if not truth.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of equal scores
    hits = np.cumsum(truth[order])[ends]
    return float((np.diff(hits, prepend=0) / hits[-1]) @ (hits / (ends + 1)))


class _Calibration:
    """Sums by bin of confidence."""

    def __init__(self, bins: int) -> None:
        self.edges = np.linspace(0, 1, bins + 1)
        self.count, self.hits, self.confidence = np.zeros(bins, np.int64), np.zeros(bins), np.zeros(bins)

    def add(self, confidence: np.ndarray, hit: np.ndarray) -> None:
        bins = len(self.count)
        place = np.clip(np.searchsorted(self.edges, confidence, side="left") - 1, 0, bins - 1)
        self.count += np.bincount(place, minlength=bins)
        self.hits += np.bincount(place, hit, bins)
        self.confidence += np.bincount(place, confidence, bins)

    def figures(self) -> dict[str, Any]:
        full = self.count > 0
        safe = np.maximum(self.count, 1)
        accuracy, confidence = self.hits / safe, self.confidence / safe
        gaps = np.abs(accuracy - confidence)
        bins = tuple(
            Bin(
                low=float(self.edges[i]),
                high=float(self.edges[i + 1]),
                count=int(self.count[i]),
                confidence=float(confidence[i]) if full[i] else None,
                accuracy=float(accuracy[i]) if full[i] else None,
            )
            for i in range(len(full))
        )
        return {"ece": float(gaps @ self.count / self.count.sum()), "mce": float(gaps.max()), "reliability": bins}


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fit_temperature(logits: np.ndarray, targets: np.ndarray, multi_label: bool = False) -> float:
    """T for which logits / T have the lowest loss on images that the model was not trained on.

    The loss is convex in 1/T; Newton's method on log T, kept within a bracket, from 0.01 to 100. Where the loss falls
    up to one of these, as it does when every image is right, the images say nothing of T: it is 1, and a warning is
    logged.

    Args:
        logits: (n, K).
        targets: (n,) class indices; with `multi_label` (n, K) of 0 and 1.
    Raises:
        ValueError: shapes that do not fit, no image, logits that are not finite.
    Source: Guo et al. 2017, §4.2.
    """
    targets = np.asarray(targets)
    _check(logits, targets, logits.shape[-1], multi_label)

    def slope(x: float) -> tuple[float, float]:
        """First and second derivative of the summed loss by b = 1/T, at b = exp(x)."""
        first = second = 0.0
        for part in _chunks(*logits.shape):
            z, b = logits[part].astype(np.float64), math.exp(x)
            if multi_label:
                probs = _sigmoid(b * z)
                first += ((probs - (targets[part] > 0)) * z).sum()
                second += (probs * (1 - probs) * z**2).sum()
            else:
                probs = np.exp(_log_softmax(b * z))
                mean = (probs * z).sum(1)
                first += (mean - z[np.arange(len(z)), targets[part]]).sum()
                second += (probs * (z - mean[:, None]) ** 2).sum()
        return float(first), float(second)

    low, high = -math.log(MAX_TEMPERATURE), -math.log(MIN_TEMPERATURE)
    ends = slope(low)[0], slope(high)[0]
    if ends == (0, 0):  # the loss is the same at every temperature
        return 1.0
    if ends[1] <= 0 or ends[0] >= 0:  # 0 too: the slope of certainty is smaller than a float
        log.warning("no temperature is best for these %d images, so scores stay as they are; use more.", len(logits))
        return 1.0
    x = 0.0
    for _ in range(100):
        first, second = slope(x)
        low, high = (x, high) if first < 0 else (low, x)
        step = -first / (math.exp(x) * second) if second > 0 else math.inf
        new = x + step if low < x + step < high else (low + high) / 2
        if abs(new - x) < 1e-9 or first == 0:
            break
        x = new
    return math.exp(-x)


@torch.no_grad()
def calibrate(model: nn.Module, temperature: float) -> None:
    """Divide a classifier's logits by a temperature, in the weights of its heads, so that it is in every form of it."""
    two = [model.decoder.out] if isinstance(model, ImagePerceiver) else [model.head, getattr(model, "head_dist", None)]
    for head in two:
        if isinstance(head, nn.Linear):
            head.weight.div_(temperature)
            head.bias.div_(temperature)


# ── nearest neighbours ───────────────────────────────────────────────────────────────────────────────────────────────


def knn(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    features: np.ndarray,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Classes (m,) int64 by a vote of the k nearest of n images, each with weight exp(cosine / temperature).

    Args:
        train_features: (n, D).
        train_targets: (n,), one class each.
        features: (m, D), of the images to classify.
        k: more than n takes all n.
    Raises:
        ValueError: shapes that do not fit, features that are not finite, k below 1, temperature not above 0.
    Source: Wu et al. 2018, §3.4, with the temperature; DINO (Caron et al. 2021) uses it with k = 20.
    """
    train_targets = np.asarray(train_targets)
    if train_features.ndim != 2 or features.ndim != 2 or train_features.shape[1] != features.shape[1]:
        raise ValueError(f"features have shapes {train_features.shape} and {features.shape}; they must be (·, D).")
    if train_targets.shape != train_features.shape[:1] or not len(train_targets):
        raise ValueError(f"train_targets have shape {train_targets.shape} for {len(train_features)} features.")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and temperature {temperature}; k must be 1 or more, temperature above 0.")
    bank, queries = (_normalised(array) for array in (train_features, features))
    labels = torch.from_numpy(np.asarray(train_targets, np.int64))
    k, classes = min(k, len(bank)), int(train_targets.max()) + 1
    found = []
    for part in _chunks(len(queries), max(len(bank), classes)):
        similarity, nearest = (queries[part] @ bank.T).topk(k, dim=1)
        # less the largest, which changes no vote: exp(1 / 0.01) would overflow
        weights = ((similarity - similarity[:, :1]) / temperature).double().exp()
        votes = torch.zeros(len(weights), classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[nearest], weights)
        found.append(votes.argmax(1))
    return torch.cat(found).numpy() if found else np.empty(0, np.int64)


def _normalised(features: np.ndarray) -> torch.Tensor:
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(1)))
        raise ValueError(f"the features of row {row} are not finite; leave out the rows that are not ok.")
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(features, np.float32)), dim=1)


# ── ImageNet's other labels ──────────────────────────────────────────────────────────────────────────────────────────


def align(samples: Samples, labels: Labels, *, partial: bool = False) -> None:
    """`opsin.data.samples.relabel`, which also knows the numbered folders of ImageNet-V2 (`v2_labels`).

    Raises:
        DataError: classes of the set that the model does not know; without `partial` also those that have no image.
    """
    indices = None if samples.labels.multi_label else v2_labels(samples.labels.names, labels, partial=partial)
    if indices is None:
        relabel(samples, labels, partial=partial)
    else:
        log.info("the %d classes of the data are numbers: taken for the model's class indices.", len(indices))
        samples.targets, samples.labels = indices[samples.targets], labels


def v2_labels(names: Sequence[str], labels: Labels, *, partial: bool = False) -> np.ndarray | None:
    """Class indices (C,) of folders that are named by them, in any order: "10" is class 10 though it sorts before "2".

    None where that is not so: a name that is no number as Python writes it, with `partial` False not all of 0 to K − 1,
    or a model whose own classes have such names, as one has that was trained on such folders.

    Source: ImageNet-V2 (Recht et al. 2019), folders 0 to 999, in the order of ImageNet-1k.
    """
    numbers = {str(i): i for i in range(len(labels))}
    if not names or not all(name in numbers for name in names) or not (partial or len(names) == len(labels)):
        return None
    if any(index is not None for index in match(Labels(tuple(names)), labels)):
        return None
    return np.array([numbers[name] for name in names], np.int64)


def load_real(path: Path) -> list[list[int]]:
    """ImageNet ReaL's real.json: the ImageNet-1k classes of each validation image, in ILSVRC's order; some have none.

    Raises:
        DataError: another kind of file.
        OSError: it cannot be read.
    Source: Beyer et al. 2020; github.com/google-research/reassessed-imagenet.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    sets = data if isinstance(data, list) else []
    if not sets or not all(
        isinstance(one, list) and all(type(index) is int and 0 <= index < 1000 for index in one) for one in sets
    ):
        raise DataError(
            f"{path} is not ReaL's real.json: a list with, for each image, a list of indices from 0 to 999."
        )
    return sets


def real_sets(real: list[list[int]], keys: Sequence[str], labels: Labels) -> list[frozenset[int]]:
    """For each image the classes of the model that ReaL accepts; the number in ILSVRC2012_val_00000001 finds them.

    Args:
        real: of `load_real`.
        keys: of the images.
        labels: of the model; ImageNet-1k's classes in any order, or LABEL_0 to LABEL_999, taken to be in ImageNet's.
    Raises:
        DataError: a key without such a number, or a model without one of the 1,000 classes.
    """
    indices = _imagenet_indices(labels)
    sets = []
    for key in keys:
        found = REAL_NUMBER.search(key)
        number = int(found[1]) if found else 0
        if not 1 <= number <= len(real):
            raise DataError(
                f'"{key}" is none of the {len(real):,} validation images that real.json is for: its name must hold '
                f"ILSVRC2012_val_ and a number from 00000001 to {len(real):08d}."
            )
        sets.append(frozenset(indices[i] for i in real[number - 1]))
    return sets


def _imagenet_indices(labels: Labels) -> list[int]:
    """Of each class of ImageNet-1k in the model."""
    imagenet = Labels.imagenet_1k()
    if labels.names == imagenet.names or labels == Labels.numbered(len(imagenet)):
        return list(range(len(imagenet)))
    known = [index for index in match(imagenet, labels) if index is not None]
    if len(known) < len(imagenet):
        missing = len(imagenet) - len(known)
        raise DataError(f"ReaL's labels are of ImageNet-1k; the model lacks {missing} of its 1,000 classes.")
    return known


def real_accuracy(predicted: np.ndarray, sets: Sequence[frozenset[int]]) -> tuple[float, int]:
    """Share of images whose predicted class is accepted, and of how many: an image without a class is not counted.

    Raises:
        ValueError: not one prediction for each set.
        DataError: no image has a class.
    """
    hits = [int(guess) in accepted for guess, accepted in zip(predicted, sets, strict=True) if accepted]
    if not hits:
        raise DataError(f"none of the {len(sets)} images has a ReaL label.")
    return sum(hits) / len(hits), len(hits)


# ── two models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def agreement(
    a: Predictions,
    b: Predictions,
    targets: np.ndarray | None = None,
    *,
    limit: int = 50,
) -> dict[str, Any]:
    """Where two models answer alike, as JSON has it.

    An answer is the best class, of multi-label models the set of classes above one half. Classes are compared by name
    or WordNet id. Images that either model has no answer for are left out.

    Args:
        targets: (n,) or (n, K), in a's classes; None: nothing is said of who is right.
        limit: of the list of disagreements.
    Returns:
        `images`, `equal` (share); `disagreements`, the first `limit` of [key, a's label, b's label]. With targets the
        numbers `both_right`, `only_a_right`, `only_b_right`, `both_wrong`, and `mcnemar_p`, how likely a difference
        between the two middle ones as large or larger is if both models are equally good (exact, two-sided). Where both
        have the same classes `logit_drift_max` and `logit_drift_mean`, of absolute differences, and `kl_mean`, of b
        from a in nats, mean over images.
    Raises:
        ValueError: not the same images, predictions without logits, or models of different kinds.
        DataError: no image has an answer of both.
    """
    if a.keys != b.keys:
        raise ValueError("the two predictions are not of the same images in the same order.")
    if a.labels is None or b.labels is None or not a.logits.shape[1] or not b.logits.shape[1]:
        raise ValueError("agreement needs the logits of both models.")
    if a.labels.multi_label != b.labels.multi_label:
        raise ValueError("one model gives one class an image, the other several: their answers cannot be compared.")
    several = a.labels.multi_label
    rows = np.flatnonzero(a.ok & b.ok)
    if not len(rows):
        raise DataError("no image has an answer of both models.")
    to_b: Sequence[int | None] = range(len(a.labels))
    if a.labels.names != b.labels.names:  # `match` would not tell apart two classes of one name, as ImageNet's cranes
        to_b = match(a.labels, b.labels)
    same = None not in to_b and len(a.labels) == len(b.labels)
    if several and not same:
        raise ValueError("multi-label models can be compared only if they have the same classes.")
    to_a = np.full(len(b.labels), -1)
    for i, j in enumerate(to_b):
        if j is not None:
            to_a[j] = i
    if several:
        ours, theirs = a.logits[rows] > 0, b.logits[rows][:, np.argsort(to_a)] > 0
        equal = (ours == theirs).all(1)
    else:
        ours, best = a.logits[rows].argmax(1), b.logits[rows].argmax(1)
        theirs = to_a[best]
        equal = ours == theirs
    result: dict[str, Any] = {"images": len(rows), "equal": float(equal.mean())}
    if targets is not None:
        truth = np.asarray(targets)[rows]
        result |= _right_and_wrong(*((answers == truth).reshape(len(rows), -1).all(1) for answers in (ours, theirs)))
    if same:
        result |= _drift(a.logits[rows], b.logits[rows], np.argsort(to_a), several)

    def label(predictions: Predictions, i: int) -> str:
        assert predictions.labels is not None
        logits = predictions.logits[rows[i]]
        chosen = np.flatnonzero(logits > 0) if several else [logits.argmax()]
        return "; ".join(predictions.labels.name(int(j)) for j in chosen)

    different = np.flatnonzero(~equal)[:limit]
    result["disagreements"] = [[a.keys[rows[i]], label(a, i), label(b, i)] for i in different]
    return result


def _right_and_wrong(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    return {
        "both_right": int((a & b).sum()),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_wrong": int((~a & ~b).sum()),
        "mcnemar_p": mcnemar(only_a, only_b),
    }


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided probability of so uneven a split of only_a + only_b fair coins, or a more uneven one; exact."""
    total, less = only_a + only_b, min(only_a, only_b)
    ways = term = 1
    for i in range(less):
        term = term * (total - i) // (i + 1)
        ways += term
    return min(1.0, 2 * ways / 2**total)


def _drift(a: np.ndarray, b: np.ndarray, order: np.ndarray, several: bool) -> dict[str, float]:
    highest = total = divergence = 0.0
    for part in _chunks(*a.shape):
        x, y = a[part].astype(np.float64), b[part][:, order].astype(np.float64)
        drift = np.abs(x - y)
        highest, total = max(highest, float(drift.max())), total + float(drift.sum())
        if several:
            for sign in (1, -1):  # log σ(z), log(1 − σ(z))
                p, q = -np.logaddexp(0, -sign * x), -np.logaddexp(0, -sign * y)
                divergence += float((np.exp(p) * (p - q)).sum())
        else:
            p, q = _log_softmax(x), _log_softmax(y)
            divergence += float((np.exp(p) * (p - q)).sum())
    return {"logit_drift_max": highest, "logit_drift_mean": total / a.size, "kl_mean": divergence / len(a)}


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(
    folder: Path,
    result: Metrics,
    predictions: Predictions,
    *,
    facts: Mapping[str, Any] | None = None,
    against: Mapping[str, Any] | None = None,
    max_classes: int | None = LISTED_CLASSES,
) -> list[Path]:
    """Write evaluation.json, evaluation.md, errors.jsonl, confusion.png and reliability.png; each appears whole.

    Without matplotlib the pictures are left out and a warning says so; there is no confusion picture of a multi-label
    model. A picture of an earlier report that this one does not draw is removed.

    Args:
        facts: what else to say, as model, data, temperature; first in the JSON, and simple values in the Markdown.
        against: of `agreement`.
        max_classes: listed in the Markdown; None: all.
    Returns:
        The files written.
    """
    folder = Path(folder)
    facts = dict(facts or {})
    data = facts | {"bad_images": len(predictions.errors)} | result.to_dict()
    if against is not None:
        data["agreement"] = dict(against)
    _write(folder / "evaluation.json", _json(data))
    _write(folder / "evaluation.md", markdown(facts, result, predictions, against, max_classes))
    errors = (
        json_line({"key": bad.key, "error": {"type": bad.kind, "message": bad.message}}) for bad in predictions.errors
    )
    _write(folder / "errors.jsonl", "".join(f"{line}\n" for line in errors))
    written = [folder / name for name in ("evaluation.json", "evaluation.md", "errors.jsonl")]
    pictures: dict[str, Callable[[Path], None]] = {
        "reliability.png": lambda path: plots.reliability(path, result.reliability, result.ece)
    }
    counts = result.confusion
    if counts is not None and len(counts) <= PICTURED_CLASSES:
        used = np.flatnonzero(counts.any(0) | counts.any(1))  # of ImageNet's classes a small set has a few
        names = [result.names[i] for i in used]
        pictures["confusion.png"] = lambda path: plots.confusion(path, counts[np.ix_(used, used)], names)
    for name in ("confusion.png", "reliability.png"):
        try:
            if name in pictures:
                pictures[name](folder / name)
                written.append(folder / name)
                continue
        except MissingExtra as error:
            log.warning("no %s: %s", name, error)
        (folder / name).unlink(missing_ok=True)
    return written


def markdown(
    facts: Mapping[str, Any],
    result: Metrics,
    predictions: Predictions,
    against: Mapping[str, Any] | None = None,
    max_classes: int | None = LISTED_CLASSES,
) -> str:
    """What `report` writes into evaluation.md; its arguments are that function's."""
    lines = ["# Evaluation", ""]
    simple = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
    for name, value in simple.items():
        lines.append(f"- {name}: {f'{value:.4g}' if isinstance(value, float) else value}")
    if predictions.errors:
        lines.append(f"- images without an answer: {len(predictions.errors):,} (errors.jsonl), not in the figures")
    text = "\n".join([*lines, ""] if len(lines) > 2 else lines) + "\n" + result.to_markdown(max_classes)
    if against is None:
        return text
    rows = {name.replace("_", " "): value for name, value in against.items() if not isinstance(value, list)}
    shown = {name: f"{value:.4g}" if isinstance(value, float) else f"{value:,}" for name, value in rows.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    return f"{text}\n## Agreement of two models\n\n| | |\n|---|---:|\n{table}\n"


def _json(data: dict[str, Any]) -> str:
    """Indented; the long lists, of classes and cells, with an entry a line."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            entries = ",\n    ".join(json_line(entry) for entry in value)
            lines.append(f"  {json.dumps(name)}: [\n    {entries}\n  ]")
        else:
            lines.append(f"  {json.dumps(name)}: {json_line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(logits: np.ndarray, targets: np.ndarray, classes: int, multi_label: bool) -> None:
    if logits.ndim != 2 or logits.shape[1] != classes or not logits.size:
        raise ValueError(f"logits have shape {logits.shape}; {classes} classes need (n, {classes}), n at least 1.")
    shape = logits.shape if multi_label else logits.shape[:1]
    if targets.shape != shape:
        raise ValueError(f"targets have shape {targets.shape}; these logits need {shape}.")
    finite = np.isfinite(logits).all(1)
    if not finite.all():
        raise ValueError(f"the logits of row {int(np.argmin(finite))} are not finite; leave out the rows not ok.")
    top = 2 if multi_label else classes
    if targets.min() < 0 or targets.max() >= top:
        raise ValueError(f"targets go from {targets.min()} to {targets.max()}; they must be from 0 to {top - 1}.")


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(CHUNK // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN if none is."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.2f} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
