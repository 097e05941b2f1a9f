"""probabilities of classes → the narrowest kind of thing that is sure enough: "some kind of cat, 0.93".

The kinds are the hypernyms of WordNet 3.0, the tree that ImageNet's classes hang on. A class may have several (a dog is
a canine and a domestic animal); its probability counts once in each kind.
"""

import gzip
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TypedDict

import numpy as np

from opsin.labels import Labels

TOO_GENERAL = "-"  # the English name, in kinds.tsv, of a kind that tells nothing: entity, object, artifact, …


class NoKinds(ValueError):
    """Labels whose classes are in no hierarchy."""


class Kind(TypedDict):
    label: str
    wnid: str
    score: float  # probability that it is one of the classes of this kind


@dataclass(frozen=True, slots=True, eq=False)
class _Tree:
    """The kinds above some classes, from the fewest classes to the most; of one set of classes, the deepest first."""

    wnids: tuple[str, ...]
    sizes: np.ndarray  # (kinds,) classes of each
    members: np.ndarray  # (sum of sizes,) their indices, kind after kind


def narrowest(probs: np.ndarray, labels: Labels, at_least: float = 0.9, lang: str = "en") -> Kind | None:
    """The kind with the fewest of a model's classes whose probability is `at_least` that; it may be a class itself.

    Args:
        probs: (K,) probabilities of the classes, which sum to one.
        labels: of the K classes. One without a WordNet id belongs to no kind.
        at_least: above 0, up to 1.
        lang: of the name, "en" or "zh"; a kind without Chinese name has its English one.
    Returns:
        None where only kinds that tell nothing are as sure: `assets/labels/kinds.tsv` names them.
    Raises:
        NoKinds: labels without WordNet ids, or several labels an image.
        ValueError: probabilities that do not fit, or at_least out of range.
    """
    check(labels, at_least)
    if probs.shape != (len(labels),):
        raise ValueError(f"probs have shape {probs.shape}; {len(labels)} labels need ({len(labels)},).")
    assert labels.wnids is not None
    tree = _tree(labels.wnids)
    scores = np.add.reduceat(probs.astype(np.float64)[tree.members], np.cumsum(tree.sizes) - tree.sizes)
    sure = np.flatnonzero(scores >= at_least - 1e-9)
    if not len(sure):
        return None
    narrow = sure[tree.sizes[sure] == tree.sizes[sure[0]]]
    best = narrow[np.argmax(scores[narrow])]  # of equal scores the first, which is the deepest
    wnid = tree.wnids[best]
    if wnid in labels.wnids:
        name = labels.name(labels.wnids.index(wnid), lang)
    else:
        english, chinese = _names()[wnid]
        name = (lang == "zh" and chinese) or english
    return {"label": name, "wnid": wnid, "score": min(float(scores[best]), 1.0)}


def check(labels: Labels, at_least: float) -> None:
    """
    Raises:
        ValueError, NoKinds: what `narrowest` could do nothing with.
    """
    if not 0 < at_least <= 1:
        raise ValueError(f"at_least is {at_least}; a probability above 0, up to 1, is needed.")
    if labels.multi_label:
        raise NoKinds("kinds are for one class an image; this model gives several, whose scores do not add up.")
    if not any(wnid in _parents() for wnid in labels.wnids or ()):
        raise NoKinds(
            "the classes have no WordNet ids, so nothing says what they are kinds of. Models of ImageNet's classes "
            "have them, and what is trained on folders that are named by them (n02123045)."
        )


@cache
def _tree(wnids: tuple[str, ...]) -> _Tree:
    parents, names = _parents(), _names()
    members: dict[str, list[int]] = {}
    for i, wnid in enumerate(wnids):
        if wnid in parents:
            for kind in _above(wnid):
                members.setdefault(kind, []).append(i)
    kinds = [kind for kind in members if names[kind][0] != TOO_GENERAL]
    kinds.sort(key=lambda kind: (len(members[kind]), -_depth(kind), kind))
    sizes = np.array([len(members[kind]) for kind in kinds])
    return _Tree(tuple(kinds), sizes, np.concatenate([members[kind] for kind in kinds]))


@cache
def _above(wnid: str) -> frozenset[str]:
    """The synset and all its hypernyms."""
    return frozenset({wnid}).union(*(_above(parent) for parent in _parents()[wnid]))


@cache
def _depth(wnid: str) -> int:
    """Of the longest way to "entity"."""
    return 1 + max((_depth(parent) for parent in _parents()[wnid]), default=-1)


@cache
def _parents() -> dict[str, tuple[str, ...]]:
    return {wnid: tuple(parents.split()) for wnid, parents, _ in _hypernyms()}


@cache
def _names() -> dict[str, tuple[str, str]]:
    """WordNet id of a hypernym → English name, Chinese or ""."""
    names = {wnid: (name, "") for wnid, _, name in _hypernyms()}
    for line in (_FOLDER / "kinds.tsv").read_text(encoding="utf-8").splitlines():
        wnid, english, chinese = line.split("\t")
        names[wnid] = english or names[wnid][0], chinese
    return names


_FOLDER = files("opsin") / "assets" / "labels"


@cache
def _hypernyms() -> list[tuple[str, str, str]]:
    text = gzip.decompress((_FOLDER / "hypernyms.tsv.gz").read_bytes()).decode()
    return [(wnid, parents, name) for wnid, parents, name in (line.split("\t") for line in text.splitlines())]
