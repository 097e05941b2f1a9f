"""Where two models, two engines or two precisions disagree, on photos without labels.

photos ── predict, agreement, 512 at a time ──▶ Comparison ── report ──▶ compare.json, disagreements.csv, .png
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from opsin import sheets
from opsin.checkpoints.files import replacing
from opsin.data.samples import Files, Strings
from opsin.errors import DataError, NoHead
from opsin.evaluate import Bad, Predictions, agreement, predict
from opsin.labels import Labels, match
from opsin.pipeline import DTYPES, ENGINES, Classifier
from opsin.preprocess import decode

CHUNK = 512  # images whose logits are in memory
LISTED = 24  # four lines of a contact sheet
A_COLOUR, B_COLOUR = "#1f5fa8", "#b3541e"


class Contender(NamedTuple):
    """A model and how to run it; the names are those of `opsin.load`."""

    name: str
    engine: str = "auto"
    dtype: str = "auto"


def parse(text: str) -> Contender:
    """`name`, `name@dtype` or `name@engine:dtype`: `opsin/vit-tiny@fp32`, `runs/1@openvino:bf16`.

    What exists here under the whole text, and an @ with a / behind it, belong to the name.

    Raises:
        ValueError: no such dtype or engine.
    """
    name, at, suffix = text.rpartition("@")
    if not at or "/" in suffix or Path(text).exists():
        return Contender(text)
    known = {dtype: Contender(name, "auto", dtype) for dtype in DTYPES}
    known |= {f"{engine}:{dtype}": Contender(name, engine, dtype) for engine in ENGINES for dtype in DTYPES}
    if suffix not in known or not name:
        near = difflib.get_close_matches(suffix, known, 1, cutoff=0.5)
        hint = f'Did you mean "{name}@{near[0]}"? ' if near else ""
        raise ValueError(
            f'"{text}" ends in "@{suffix}". {hint}Right is NAME, NAME@DTYPE or NAME@ENGINE:DTYPE, with the dtypes '
            f"{', '.join(DTYPES)} and the engines {', '.join(ENGINES)}."
        )
    return known[suffix]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """A photo to which two models give different answers.

    A score is the probability that a model gives its own answer. `gap` is how much surer each is of its own answer than
    of the other's, the mean of both: 1 where each is certain, near 0 where both waver between the two.
    """

    path: str
    a_label: str
    a_score: float
    b_label: str
    b_score: float
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What `compare` found. An image that either model has no answer for is in `errors` and in no figure."""

    images: int
    same: int  # images with the same answer
    common_classes: int
    # of b from a, over all classes; None where the models do not have the same ones
    logit_drift_max: float | None
    logit_drift_mean: float | None
    prob_drift_max: float | None
    prob_drift_mean: float | None
    kl_mean: float | None  # nats, mean over images
    disagreements: tuple[Disagreement, ...]  # the widest gap first
    errors: tuple[Bad, ...]

    def to_dict(self, limit: int | None = None) -> dict[str, Any]:
        """As JSON has it, with the first `limit` disagreements."""
        data = asdict(self) | {"equal": self.same / self.images}
        listed, errors = data.pop("disagreements")[:limit], data.pop("errors")
        data["errors"] = [{"path": key, "type": kind, "message": message} for key, kind, message in errors]
        return data | {"different": self.images - self.same, "disagreements": list(listed)}


def compare(
    a: Classifier,
    b: Classifier,
    photos: Iterable[str],
    *,
    batch_size: int = 32,
    on_images: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Run two models over the same photos.

    An answer is the best class, of multi-label models the set of classes above one half; classes are the same by name
    or WordNet id. Memory grows by the paths and the disagreements, not by the logits.

    Args:
        photos: paths or URLs; one that is named twice counts once.
        on_images: called with (images done, of how many) after each batch of the second model.
    Raises:
        NoHead: a model without classes.
        ValueError: one model gives one class an image and the other several, or multi-label models of other classes.
        DataError: no class in common, no photos, or none with an answer of both models.
    """
    partners = _partners(a, b)
    paths = list(dict.fromkeys(photos))
    if not paths:
        raise DataError("there are no photos to compare the models on.")
    samples = Files(np.zeros(len(paths), np.int64), Labels(("",)), None, root="", names=Strings.pack(paths))
    tally = _Tally(partners)
    for start in range(0, len(paths), CHUNK):
        rows = range(start, min(start + CHUNK, len(paths)))
        first = predict(a, samples, rows, batch_size=batch_size)

        def advance(done: int, total: int, start: int = start) -> None:
            if on_images is not None:
                on_images(start + done, len(paths))

        tally.add(first, predict(b, samples, rows, batch_size=batch_size, on_batch=advance))
    return tally.result()


def _partners(a: Classifier, b: Classifier) -> list[int | None]:
    """For each class of a the index of the same in b, as `agreement` matches them."""
    for classifier in (a, b):
        if classifier.labels is None:
            raise NoHead(f"{classifier.source.name} has no classification head, so it has no answers to compare.")
    assert a.labels is not None and b.labels is not None
    ours, theirs = a.labels, b.labels
    if ours.multi_label != theirs.multi_label:
        raise ValueError("one model gives one class an image, the other several: their answers cannot be compared.")
    found: list[int | None] = list(range(len(ours))) if ours.names == theirs.names else match(ours, theirs)
    if not any(index is not None for index in found):
        raise DataError(
            f"{a.source.name} ({len(ours)} classes, such as {ours.names[0]}) and {b.source.name} ({len(theirs)}, such "
            f"as {theirs.names[0]}) have no class in common. Compare models of the same classes, or of an overlap."
        )
    if ours.multi_label and (None in found or len(ours) != len(theirs)):
        raise ValueError("multi-label models can be compared only if they have the same classes.")
    return found


class _Tally:
    """Figures over chunks of photos."""

    def __init__(self, partners: list[int | None]) -> None:
        self.partners = partners
        self.images = self.same = 0
        self.peaks: dict[str, float] = {}
        self.sums: dict[str, float] = {}  # of means over images
        self.disagreements: list[Disagreement] = []
        self.errors: dict[str, Bad] = {}

    def add(self, a: Predictions, b: Predictions) -> None:
        for bad in (*a.errors, *b.errors):
            self.errors.setdefault(bad.key, bad)
        if not (a.ok & b.ok).any():
            return
        assert a.labels is not None
        figures = agreement(a, b, limit=len(a.keys))
        different = {key: labels for key, *labels in figures.pop("disagreements")}
        images = figures.pop("images")
        self.images += images
        self.same += images - len(different)
        p, q = (_probs(each.logits, a.labels.multi_label) for each in (a, b))
        if "kl_mean" in figures:
            both = a.ok & b.ok
            drift = np.abs(p[both] - q[both][:, np.array(self.partners)])
            figures |= {"prob_drift_max": float(drift.max()), "prob_drift_mean": float(drift.mean())}
        for name, value in figures.items():
            if name.endswith("_max"):
                self.peaks[name] = max(self.peaks.get(name, 0.0), value)
            elif name.endswith("_mean"):
                self.sums[name] = self.sums.get(name, 0.0) + images * value
        for row, key in enumerate(a.keys):
            if key in different:
                scores = _scores(p[row], q[row], self.partners, a.labels.multi_label)
                a_label, b_label = (label or "none" for label in different[key])
                self.disagreements.append(Disagreement(path=key, a_label=a_label, b_label=b_label, **scores))

    def result(self) -> Comparison:
        if not self.images:
            first = next(iter(self.errors.values())).message
            raise DataError(f"none of the {len(self.errors)} photos has an answer of both models; the first: {first}")
        means = {name: total / self.images for name, total in self.sums.items()}
        drifts = ("logit_drift_max", "logit_drift_mean", "prob_drift_max", "prob_drift_mean", "kl_mean")
        return Comparison(
            images=self.images,
            same=self.same,
            common_classes=sum(index is not None for index in self.partners),
            **{name: (self.peaks | means).get(name) for name in drifts},
            disagreements=tuple(sorted(self.disagreements, key=lambda found: -found.gap)),
            errors=tuple(self.errors.values()),
        )


def _probs(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    z = logits.astype(np.float64)
    if multi_label:
        return np.exp(-np.logaddexp(0, -z))
    z = np.exp(z - z.max(1, keepdims=True))
    return z / z.sum(1, keepdims=True)


def _scores(p: np.ndarray, q: np.ndarray, partners: Sequence[int | None], multi_label: bool) -> dict[str, float]:
    """Of one photo, from the probabilities (K,) of a and (L,) of b."""
    if multi_label:  # the probability of exactly this set of classes
        q = q[np.array(partners)]
        own_a, own_b = np.maximum(p, 1 - p).prod(), np.maximum(q, 1 - q).prod()
        other_a, other_b = np.where(q > 0.5, p, 1 - p).prod(), np.where(p > 0.5, q, 1 - q).prod()
    else:
        i, j = int(p.argmax()), int(q.argmax())
        there, back = partners[i], partners.index(j) if j in partners else None
        own_a, own_b = p[i], q[j]
        other_a, other_b = 0.0 if back is None else p[back], 0.0 if there is None else q[there]
    gap = (own_a - other_a + own_b - other_b) / 2
    return {"a_score": float(own_a), "b_score": float(own_b), "gap": float(gap)}


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def report(
    folder: Path,
    found: Comparison,
    facts: Mapping[str, Any],
    *,
    limit: int = LISTED,
    load: Callable[[str], Image.Image] = decode,
) -> list[Path]:
    """Write compare.json, disagreements.csv with all of them, and disagreements.png with the first `limit`.

    Where the models agree on everything there is no picture, and one of an earlier report is removed.

    Args:
        facts: first in the JSON; "a" and "b" name the two models on the sheet.
        load: path → upright RGB image.
    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    summary, table, sheet = (folder / name for name in ("compare.json", "disagreements.csv", "disagreements.png"))
    text = json.dumps({**facts, **found.to_dict(limit)}, ensure_ascii=False, indent=2) + "\n"
    with replacing(summary) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # of the name of a file: JSON's own escape
    with replacing(table) as part, part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.DictWriter(file, list(Disagreement.__dataclass_fields__))
        rows.writeheader()
        rows.writerows(map(asdict, found.disagreements))
    shown = found.disagreements[:limit]
    if not shown:
        sheet.unlink(missing_ok=True)
        return [summary, table]
    cells = [
        sheets.Cell(
            (each.path,),
            (
                (f"A {each.a_score:.0%} {each.a_label}", A_COLOUR),
                (f"B {each.b_score:.0%} {each.b_label}", B_COLOUR),
            ),
        )
        for each in shown
    ]
    title = f"Different answers on {found.images - found.same:,} of {found.images:,} photos"
    if len(shown) < len(found.disagreements):
        title += f" · the {len(shown)} of the widest gap"
    sheets.draw(sheet, [sheets.Block(title, f"A {facts['a']} · B {facts['b']}", A_COLOUR, cells)], load)
    return [summary, table, sheet]
