"""logits → labels: softmax, top-k, and the names of the ImageNet and Tiny-ImageNet classes."""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Literal, TypedDict, cast

if TYPE_CHECKING:  # `opsin models` and `opsin --help` read names without torch
    from torch import Tensor

Lang = Literal["en", "zh"]


class Prediction(TypedDict):
    label: str
    score: float  # probability
    index: int  # of the class


@dataclass(frozen=True, slots=True)
class Labels:
    """The names of a classifier's classes, by index.

    Args:
        names: English, or whatever the checkpoint carries.
        wnids: WordNet id of each class, "" where it is not known; None where no class has one.
        names_zh: Simplified Chinese, "" where it is not known; None where no class has one.
        multi_label: an image may have several of the classes, or none: scores are sigmoids, not a softmax.
    """

    names: tuple[str, ...]
    wnids: tuple[str, ...] | None = None
    names_zh: tuple[str, ...] | None = None
    multi_label: bool = False

    def __post_init__(self) -> None:
        for field in ("wnids", "names_zh"):
            values = getattr(self, field)
            if values is not None and len(values) != len(self.names):
                raise ValueError(f"{field} has {len(values)} entries for {len(self.names)} names; one each is needed.")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int, lang: str = "en") -> str:
        """Name of a class; with `lang="zh"` the Chinese one, or `names[index]` where none is known.

        Raises:
            ValueError: an unknown language.
            IndexError: no such class.
        """
        if lang not in ("en", "zh"):
            raise ValueError(f'no labels in language "{lang}". There are "en" and "zh".')
        if not 0 <= index < len(self):
            raise IndexError(f"no class {index}: these labels go from 0 to {len(self) - 1}.")
        return (lang == "zh" and self.names_zh is not None and self.names_zh[index]) or self.names[index]

    @classmethod
    def imagenet_1k(cls) -> "Labels":
        """The 1,000 classes of ILSVRC 2012 by ascending WordNet id; the names are those of transformers' `id2label`."""
        return _imagenet_1k()

    @classmethod
    def imagenet_21k(cls) -> "Labels":
        """The 21,843 classes of Google's ImageNet-21k heads by ascending WordNet id.

        Other projects' heads have 21,841: they lack n03931044 (index 9205) and n09859684 (15027).
        """
        return _imagenet_21k()

    @classmethod
    def tiny_imagenet(cls) -> "Labels":
        """The 200 classes of Tiny-ImageNet by ascending WordNet id; all are classes of ImageNet-1k."""
        return _tiny_imagenet()

    @classmethod
    def numbered(cls, num_classes: int) -> "Labels":
        """LABEL_0, LABEL_1, …: for a checkpoint that says nothing about its classes."""
        return cls(tuple(f"LABEL_{i}" for i in range(num_classes)))

    @classmethod
    def from_names(cls, names: Iterable[str]) -> "Labels":
        """Labels with the given names, plus ids and Chinese where they are ImageNet's classes in ImageNet's order.

        A list as long as ImageNet-1k or Tiny-ImageNet is taken to be it when at least half of the names fit their
        index, by any of their synonyms, upper or lower case, with spaces or underscores ("Egyptian_cat"). Order, not
        name, tells the two cranes apart. An entry whose name does not fit keeps it, without id and Chinese: somebody
        changed that class. Where all names are WordNet ids of ImageNet-1k, in any order, they give way to its names.
        """
        names = tuple(names)
        imagenet = _imagenet_1k()
        index = {wnid: i for i, wnid in enumerate(cast("tuple[str, ...]", imagenet.wnids))}
        if names and all(name in index for name in names):
            return _take(imagenet, [index[name] for name in names])
        for known in (imagenet, _tiny_imagenet()):
            if len(names) != len(known):
                continue
            fits = [not _synonyms(a).isdisjoint(_synonyms(b)) for a, b in zip(names, known.names, strict=True)]
            if 2 * sum(fits) >= len(names):
                return cls(names, _only(fits, known.wnids), _only(fits, known.names_zh))
        return cls(names)


def _only(keep: Sequence[bool], values: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return values and tuple(value if kept else "" for kept, value in zip(keep, values, strict=True))


def _take(labels: Labels, indices: Sequence[int]) -> Labels:
    wnids, names_zh = (values and tuple(values[i] for i in indices) for values in (labels.wnids, labels.names_zh))
    return Labels(tuple(labels.names[i] for i in indices), wnids, names_zh)


def match(ours: Labels, theirs: Labels) -> list[int | None]:
    """For each of our classes the index of the same class in theirs, or None.

    The same WordNet id; else the same name; else a synonym ("tabby" of "tabby, tabby cat"; case, spaces, hyphens and
    underscores do not count) that only one of theirs has. Two of ours never share one of theirs: the later gets None.
    """
    by_wnid = {wnid: i for i, wnid in enumerate(theirs.wnids or ()) if wnid}
    by_name: dict[str, int] = {}
    for i, name in enumerate(theirs.names):
        by_name.setdefault(name, i)
    by_synonym: dict[str, int | None] = {}
    for i, name in enumerate(theirs.names):
        for word in _synonyms(name):
            by_synonym[word] = None if word in by_synonym else i
    found: list[int | None] = []
    taken: set[int | None] = set()
    for i, name in enumerate(ours.names):
        wnid = ours.wnids[i] if ours.wnids else ""
        index = by_wnid.get(wnid or name)  # a folder may be named by the id itself
        if index is None and not (wnid and by_wnid):
            index = by_name.get(name)
            if index is None:
                candidates = {by_synonym.get(word) for word in _synonyms(name)} - {None}
                index = candidates.pop() if len(candidates) == 1 else None
        found.append(None if index in taken else index)
        taken.add(index)
    return found


def _synonyms(name: str) -> set[str]:
    return {part.strip() for part in name.lower().replace("_", " ").replace("-", " ").split(",")}


def _table(name: str) -> list[list[str]]:
    data = (files("opsin") / "assets" / "labels" / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    return [line.split("\t") for line in text.splitlines()]


@cache
def _imagenet_1k() -> Labels:
    wnids, names, names_zh = zip(*_table("imagenet_1k.tsv"), strict=True)
    return Labels(names, wnids, names_zh)


@cache
def _imagenet_21k() -> Labels:
    wnids, names = zip(*_table("imagenet_21k.tsv.gz"), strict=True)
    imagenet = _imagenet_1k()
    chinese = dict(zip(imagenet.wnids or (), imagenet.names_zh or (), strict=True))
    return Labels(names, wnids, tuple(chinese.get(wnid, "") for wnid in wnids))


@cache
def _tiny_imagenet() -> Labels:
    return Labels.from_names(wnid for (wnid,) in _table("tiny_imagenet.txt"))


def top_k(logits: "Tensor", labels: Labels, k: int, lang: str = "en") -> list[list[Prediction]]:
    """The k most probable classes of each row, best first.

    Args:
        logits: (B, K), any float type. The softmax is computed in float64.
        labels: of the K classes.
        k: how many; more than K gives all K.
        lang: of the names, "en" or "zh".
    Returns:
        For each of the B rows, min(k, K) predictions by descending score; of equal logits the lower index comes first.
    Raises:
        ValueError: k < 1, logits that do not fit the labels, or logits that are not finite.
    """
    import torch

    if k < 1:
        raise ValueError(f"k ({k}) is too small: ask for 1 label or more.")
    if logits.ndim != 2 or logits.shape[1] != len(labels):
        raise ValueError(f"logits have shape {tuple(logits.shape)}; {len(labels)} labels need (B, {len(labels)}).")
    logits = logits.detach().cpu().double()
    finite = torch.isfinite(logits)
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the logits of row {row} are not finite (class {column} has {logits[row, column].item()}) and give no "
            "probabilities. Check the checkpoint and the pixels; a float16 model may overflow where float32 does not."
        )
    k = min(k, len(labels))
    # Of logits equal to the k-th, `topk` takes any. So take all of them (k or more), then sort these few exactly.
    count = int((logits >= logits.topk(k).values[:, -1:]).sum(dim=1).max()) if len(logits) else k
    indices = logits.topk(count).indices.sort(dim=1).values
    best = logits.gather(1, indices).argsort(dim=1, descending=True, stable=True)[:, :k]
    indices = indices.gather(1, best)
    scores = (logits.sigmoid() if labels.multi_label else logits.softmax(dim=1)).gather(1, indices)
    return [
        [{"label": labels.name(i, lang), "score": score, "index": i} for i, score in zip(*row, strict=True)]
        for row in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
