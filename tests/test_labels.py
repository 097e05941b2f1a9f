"""Names and ids against WordNet's tables, Chinese names whole, and the properties of `top_k`."""

import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opsin.labels import Labels, top_k

IMAGENET = Labels.imagenet_1k()
TINY = Labels.tiny_imagenet()
GOOGLE = Labels.imagenet_21k()


def wordnet(name: str) -> list[str]:
    """Lines of one of timm's tables; read as a file, since the package needs torchvision to import."""
    spec = importlib.util.find_spec("timm")
    assert spec and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "data" / "_info" / name).read_text().splitlines()


@pytest.mark.parametrize(
    ("labels", "count", "source"),
    [(IMAGENET, 1000, "imagenet_synsets.txt"), (GOOGLE, 21_843, "imagenet21k_goog_synsets.txt")],
    ids=["1k", "21k"],
)
def test_ids_and_names_are_wordnets(labels: Labels, count: int, source: str) -> None:
    lemmas = dict(line.split("\t") for line in wordnet("imagenet_synset_to_lemma.txt"))
    assert len(labels) == count
    assert labels.wnids == tuple(wordnet(source))
    assert labels.names == tuple(lemmas[wnid] for wnid in labels.wnids)


@pytest.mark.parametrize("labels", [IMAGENET, GOOGLE, TINY], ids=["1k", "21k", "tiny"])
def test_ids_ascend_and_nothing_is_empty(labels: Labels) -> None:
    assert labels.wnids
    assert all(a < b for a, b in pairwise(labels.wnids))
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in labels.wnids)
    assert all(name and name == name.strip() for name in labels.names)


@pytest.mark.parametrize(
    ("index", "wnid", "name", "chinese"),
    [
        (0, "n01440764", "tench, Tinca tinca", "丁鱥"),
        (134, "n02012849", "crane", "鹤"),
        (281, "n02123045", "tabby, tabby cat", "虎斑猫"),
        (285, "n02124075", "Egyptian cat", "埃及猫"),
        (517, "n03126707", "crane", "起重机"),
        (638, "n03710637", "maillot", "紧身连体衣"),
        (639, "n03710721", "maillot, tank suit", "连体泳衣"),
        (999, "n15075141", "toilet tissue, toilet paper, bathroom tissue", "卫生纸"),
    ],
)
def test_known_classes(index: int, wnid: str, name: str, chinese: str) -> None:
    assert IMAGENET.wnids and IMAGENET.wnids[index] == wnid
    assert (IMAGENET.name(index), IMAGENET.name(index, "zh")) == (name, chinese)


def test_google_has_the_two_ids_that_others_drop() -> None:
    assert GOOGLE.wnids
    assert (GOOGLE.wnids[0], GOOGLE.wnids[9205], GOOGLE.wnids[15027], GOOGLE.wnids[21842]) == (
        "n00004475", "n03931044", "n09859684", "n15102894",
    )  # fmt: skip
    tabby = GOOGLE.wnids.index("n02123045")
    assert GOOGLE.name(tabby, "zh") == "虎斑猫"
    assert GOOGLE.name(0, "zh") == "organism, being"  # no Chinese known: English


def test_tiny_imagenet_is_a_part_of_imagenet() -> None:
    assert TINY.wnids and IMAGENET.wnids
    assert len(TINY) == 200
    indices = [IMAGENET.wnids.index(wnid) for wnid in TINY.wnids]
    assert TINY.names == tuple(IMAGENET.names[i] for i in indices)
    assert TINY.names_zh == tuple(IMAGENET.name(i, "zh") for i in indices)
    assert TINY.name(TINY.wnids.index("n02123045")) == "tabby, tabby cat"


@pytest.mark.shared
def test_tiny_imagenet_is_the_data_set(shared: Path) -> None:
    import zipfile

    with zipfile.ZipFile(shared / "tiny-imagenet-200-train-shard0of4.zip") as shard:
        lines = shard.read("classes.tsv").decode().splitlines()
    assert list(zip(TINY.wnids or (), TINY.names, strict=True)) == [tuple(line.split("\t")) for line in lines]


def test_every_imagenet_class_has_its_own_chinese_name() -> None:
    assert IMAGENET.names_zh and len(set(IMAGENET.names_zh)) == len(IMAGENET.names_zh) == 1000
    latin = {name for name in IMAGENET.names_zh if not re.fullmatch(r"[\u3400-\u9fff]+", name)}
    assert latin == {"CD播放机", "iPod", "T恤衫", "福特T型车"}


def test_names_outside_the_labels_are_errors() -> None:
    with pytest.raises(IndexError, match="no class 1000: these labels go from 0 to 999"):
        IMAGENET.name(1000)
    with pytest.raises(IndexError, match="no class -1"):
        IMAGENET.name(-1)
    with pytest.raises(ValueError, match=r'no labels in language "fr"\. There are "en" and "zh"'):
        IMAGENET.name(0, "fr")
    with pytest.raises(ValueError, match="wnids has 1 entries for 2 names"):
        Labels(("a", "b"), wnids=("n00000001",))


def test_numbered() -> None:
    assert Labels.numbered(3).names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert Labels.numbered(3).name(2, "zh") == "LABEL_2"


# ---- from_names


@pytest.mark.parametrize("known", [IMAGENET, TINY], ids=["1k", "tiny"])
@pytest.mark.parametrize(
    "spell",
    [
        str,
        str.upper,
        lambda name: name.split(", ")[0],
        lambda name: name.split(", ")[-1],
        lambda name: name.split(", ")[0].replace(" ", "_"),
    ],
    ids=["full", "upper", "first", "last", "underscores"],
)
def test_imagenet_names_are_recognised_however_spelled(known: Labels, spell) -> None:
    given_names = [spell(name) for name in known.names]
    found = Labels.from_names(given_names)
    assert found.names == tuple(given_names)  # the checkpoint's own wording stays
    assert (found.wnids, found.names_zh) == (known.wnids, known.names_zh)


def test_names_said_twice_keep_their_places() -> None:
    found = Labels.from_names(name.split(", ")[0] for name in IMAGENET.names)
    assert [found.name(i) for i in (134, 517, 638, 639)] == ["crane", "crane", "maillot", "maillot"]
    assert [found.name(i, "zh") for i in (134, 517, 638, 639)] == ["鹤", "起重机", "紧身连体衣", "连体泳衣"]


def test_a_changed_class_keeps_its_name_and_gets_nothing_else() -> None:
    names = list(IMAGENET.names)
    names[279] = "raccoon"
    found = Labels.from_names(names)
    assert found.wnids and (found.wnids[278], found.wnids[279]) == ("n02119789", "")
    assert (found.name(278, "zh"), found.name(279, "zh")) == ("敏狐", "raccoon")


@pytest.mark.parametrize("names", [IMAGENET.names[::-1], IMAGENET.names[:10], [f"class {i}" for i in range(200)], []])
def test_other_classes_are_left_alone(names: list[str]) -> None:
    assert Labels.from_names(names) == Labels(tuple(names))


def test_wordnet_ids_give_way_to_names_in_any_order() -> None:
    found = Labels.from_names(["n03126707", "n02012849"])
    assert found == Labels(("crane", "crane"), ("n03126707", "n02012849"), ("起重机", "鹤"))


# ---- top_k


@settings(deadline=None)
@given(
    hnp.arrays(
        "float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=13), elements=st.floats(-200, 200, width=32)
    ),
    st.integers(1, 20),
)
def test_scores_are_sorted_probabilities_and_ties_go_to_the_lower_index(array, k: int) -> None:
    rows, classes = array.shape
    result = top_k(torch.from_numpy(array), Labels.numbered(classes), k)
    assert [len(best) for best in result] == [min(k, classes)] * rows
    for logits, best in zip(array.tolist(), result, strict=True):
        expected = sorted(range(classes), key=lambda i: (-logits[i], i))
        assert [item["index"] for item in best] == expected[:k]
        assert [item["label"] for item in best] == [f"LABEL_{i}" for i in expected[:k]]
        scores = [item["score"] for item in best]
        assert all(a >= b for a, b in pairwise(scores)) and all(0 <= score <= 1 for score in scores)
        assert sum(scores) <= 1 + 1e-9
        if k >= classes:
            assert sum(scores) == pytest.approx(1, abs=1e-6)


@settings(deadline=None)
@given(hnp.arrays("int64", (5, 11), elements=st.integers(0, 2)), st.integers(1, 11))
def test_many_ties(array, k: int) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        result = top_k(torch.from_numpy(array).to(dtype), Labels.numbered(11), k)
        for logits, best in zip(array.tolist(), result, strict=True):
            assert [item["index"] for item in best] == sorted(range(11), key=lambda i: (-logits[i], i))[:k]


def test_a_row_of_a_batch_equals_its_single_run() -> None:
    logits = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert top_k(logits, IMAGENET, 5) == [top_k(row[None], IMAGENET, 5)[0] for row in logits]
    assert top_k(logits[:0], IMAGENET, 5) == []


def test_label_language() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 281] = 9
    assert top_k(logits, IMAGENET, 1)[0][0]["label"] == "tabby, tabby cat"
    assert top_k(logits, IMAGENET, 1, "zh")[0][0]["label"] == "虎斑猫"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = torch.zeros(3, 7)
    logits[1, 5] = bad
    with pytest.raises(ValueError, match=rf"row 1 are not finite \(class 5 has {bad}\)"):
        top_k(logits, Labels.numbered(7), 2)


def test_misfits_are_errors() -> None:
    with pytest.raises(ValueError, match=r"k \(0\) is too small"):
        top_k(torch.zeros(1, 3), Labels.numbered(3), 0)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 5\); 3 labels need \(B, 3\)"):
        top_k(torch.zeros(2, 5), Labels.numbered(3), 1)
    with pytest.raises(ValueError, match=r"logits have shape \(3,\)"):
        top_k(torch.zeros(3), Labels.numbered(3), 1)


def test_names_are_read_without_torch() -> None:
    code = "import sys; from opsin.labels import Labels; Labels.imagenet_21k(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
