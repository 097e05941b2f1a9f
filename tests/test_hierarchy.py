"""From probabilities to a kind of thing: by hand, and as properties of the tree."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin import hierarchy
from opsin.hierarchy import NoKinds, narrowest
from opsin.labels import Labels

IMAGENET, TINY = Labels.imagenet_1k(), Labels.tiny_imagenet()
WNIDS = IMAGENET.wnids or ()


def probs(labels: Labels = IMAGENET, **shares: float) -> np.ndarray:
    """`tabby=0.5, golden_retriever=0.5` as probabilities of the classes."""
    names = [name.split(", ")[0].replace(" ", "_") for name in labels.names]
    found = np.zeros(len(labels))
    for name, share in shares.items():
        found[names.index(name)] = share
    return found


@pytest.mark.parametrize(
    ("shares", "label", "score"),
    [
        ({"tabby": 0.95, "Egyptian_cat": 0.05}, "tabby, tabby cat", 0.95),
        ({"tabby": 0.4, "tiger_cat": 0.3, "Egyptian_cat": 0.25, "golden_retriever": 0.05}, "domestic cat", 0.95),
        ({"tabby": 0.5, "lynx": 0.45, "bagel": 0.05}, "cat", 0.95),
        ({"tabby": 0.5, "lion": 0.5}, "feline", 1),
        ({"tabby": 0.5, "golden_retriever": 0.5}, "domestic animal", 1),  # fewer of the classes than carnivores
        ({"tabby": 0.5, "goldfish": 0.5}, "vertebrate", 1),
        ({"sports_car": 0.5, "fire_engine": 0.5}, "motor vehicle", 1),
        ({"orange": 0.5, "banana": 0.5}, "edible fruit", 1),
        ({"container_ship": 0.6, "canoe": 0.4}, "vessel (watercraft)", 1),
    ],
)
def test_the_narrowest_kind_that_is_sure(shares: dict[str, float], label: str, score: float) -> None:
    kind = narrowest(probs(IMAGENET, **shares), IMAGENET, 0.9)
    assert kind is not None
    assert kind["label"] == label
    assert kind["score"] == pytest.approx(score)


def test_kinds_that_tell_nothing_are_no_answer() -> None:
    assert narrowest(probs(orange=0.5, sports_car=0.5), IMAGENET) is None  # physical objects
    assert narrowest(probs(tabby=0.5, wallet=0.5), IMAGENET) is None
    assert narrowest(probs(tabby=0.5, wallet=0.5), IMAGENET, 0.5) is not None


@pytest.mark.parametrize("best", ["tabby", "wallet"])
def test_of_kinds_as_narrow_the_surest(best: str) -> None:
    shares = {"tabby": 0.4, "wallet": 0.4, best: 0.6}
    kind = narrowest(probs(IMAGENET, **shares), IMAGENET, 0.3)
    assert kind is not None and kind["score"] == pytest.approx(0.6)


def test_a_kind_has_a_chinese_name() -> None:
    cats = probs(tabby=0.5, Persian_cat=0.5)
    assert narrowest(cats, IMAGENET, lang="zh") == {"label": "家猫", "wnid": "n02121808", "score": 1}
    tabby = narrowest(probs(tabby=1), IMAGENET, lang="zh")
    assert tabby is not None and tabby["label"] == "虎斑猫"
    strange = probs(coho=0.5, barracouta=0.5)
    assert narrowest(strange, IMAGENET, lang="zh")


def test_the_model_decides_what_is_narrow() -> None:
    """Of Tiny-ImageNet's classes three are domestic cats and no others are cats: the deepest kind of these three."""
    kind = narrowest(probs(TINY, tabby=0.5, Persian_cat=0.5), TINY)
    assert kind == {"label": "domestic cat", "wnid": "n02121808", "score": 1}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1))
def test_sums_are_those_of_the_classes_below_each_counted_once(seed: int, at_least: float) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(1000, 0.01))
    sums = {
        wnid: sum(p[i] for i, leaf in enumerate(WNIDS) if wnid in hierarchy._above(leaf))
        for wnid in (hierarchy._tree(WNIDS).wnids[seed % 1500], "n00001740", "n02084071", "n00015388")
    }
    assert sums["n00001740"] == pytest.approx(1)
    assert sums["n02084071"] <= sums["n00015388"] + 1e-12
    kind = narrowest(p, IMAGENET, at_least)
    if kind is not None:
        own = [i for i, leaf in enumerate(WNIDS) if kind["wnid"] in hierarchy._above(leaf)]
        assert kind["score"] == pytest.approx(p[own].sum()) and kind["score"] >= at_least - 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_the_surer_the_wider(seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(1000, 0.02))
    found = [narrowest(p, IMAGENET, at_least) for at_least in (0.2, 0.4, 0.6, 0.8, 1)]
    tree = hierarchy._tree(WNIDS)
    sizes = [1001 if kind is None else int(tree.sizes[tree.wnids.index(kind["wnid"])]) for kind in found]
    assert sizes == sorted(sizes)


def test_probabilities_grow_up_the_tree() -> None:
    """Whatever is of a kind is of every kind above it: a sum over more classes."""
    below: dict[str, set[int]] = {}
    for i, leaf in enumerate(WNIDS):
        for kind in hierarchy._above(leaf):
            below.setdefault(kind, set()).add(i)
    for kind, classes in below.items():
        assert all(classes <= below[parent] for parent in hierarchy._parents()[kind])
    assert len(below["n00001740"]) == 1000


def test_imagenet_21k_has_kinds_that_are_classes() -> None:
    labels = Labels.imagenet_21k()
    wnids = labels.wnids or ()
    p = np.zeros(len(labels))
    p[[wnids.index("n02084071"), wnids.index("n02099601")]] = 0.5  # dog, golden retriever
    assert narrowest(p, labels) == {"label": "dog, domestic dog, Canis familiaris", "wnid": "n02084071", "score": 1}


def test_classes_without_a_place_in_the_tree() -> None:
    wnids = tuple("" if i == 281 else wnid for i, wnid in enumerate(WNIDS))
    assert narrowest(probs(tabby=1), replace(IMAGENET, wnids=wnids)) is None
    with pytest.raises(NoKinds, match="the classes have no WordNet ids, so nothing says what they are kinds of"):
        narrowest(np.ones(3) / 3, Labels.numbered(3))
    with pytest.raises(NoKinds, match="no WordNet ids"):
        narrowest(np.ones(2) / 2, Labels(("a", "b"), wnids=("", "n00000000")))
    with pytest.raises(NoKinds, match="kinds are for one class an image"):
        narrowest(probs(tabby=1), replace(IMAGENET, multi_label=True))


def test_misfits_are_errors() -> None:
    with pytest.raises(ValueError, match=r"probs have shape \(1, 1000\); 1000 labels need \(1000,\)"):
        narrowest(np.ones((1, 1000)), IMAGENET)
    for share in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"at_least is {share}; a probability above 0, up to 1, is needed"):
            narrowest(probs(tabby=1), IMAGENET, share)


def test_the_tables_are_whole() -> None:
    parents, names = hierarchy._parents(), hierarchy._names()
    assert set(WNIDS) | set(Labels.imagenet_21k().wnids or ()) <= set(parents)
    assert [wnid for wnid, above in parents.items() if not above] == ["n00001740"]  # one root, entity
    assert {parent for above in parents.values() for parent in above} <= set(parents)
    assert all(names[parent][0] for above in parents.values() for parent in above)
    lines = (hierarchy._FOLDER / "kinds.tsv").read_text(encoding="utf-8").splitlines()
    ids = [line.split("\t")[0] for line in lines]
    assert ids == sorted(set(ids)) and set(ids) <= {parent for above in parents.values() for parent in above}
    chinese = [name for _, name in (names[wnid] for wnid in ids) if name]
    assert len(chinese) > 500 and all(re.fullmatch(r"[\u3400-\u9fff（）]+", name) for name in chinese)
    kinds = [wnid for wnid, size in zip(*_kinds(), strict=True) if size > 2]
    missing = [wnid for wnid in kinds if not names[wnid][1]]
    assert not missing  # every kind of three classes and more


def _kinds() -> tuple[tuple[str, ...], np.ndarray]:
    tree = hierarchy._tree(WNIDS)
    return tree.wnids, tree.sizes
