"""Dividing and relabelling sets, matching classes by name, and the parts that all readers share."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.data import samples as module
from opsin.data.samples import (
    Archive,
    Archived,
    Files,
    Samples,
    Strings,
    choose,
    digest,
    encode,
    held_out_rows,
    read_range,
    relabel,
    split,
    split_of,
)
from opsin.errors import DataError, ImageCorrupt, ImageNotFound, ImageTooLarge
from opsin.labels import Labels, match


def listed(targets: list[int], classes: tuple[str, ...], held_out: list[bool] | None = None) -> Samples:
    names = Strings.pack(f"{i}.png" for i in range(len(targets)))
    held = None if held_out is None else np.array(held_out)
    return Files(np.array(targets), Labels(classes), held, root="", names=names)


# ---- split


def test_every_nth_image_of_each_class_is_held_out() -> None:
    found = listed([0, 1] * 11 + [2] * 4, ("a", "b", "c"))
    train, val = split(found, 0.2)
    assert val.tolist() == [8, 9, 18, 19]  # the 5th and 10th of a and of b; c has too few
    assert sorted([*train, *val]) == list(range(26))
    assert split(found, 0)[1].size == 0


def test_the_sets_own_division_comes_first() -> None:
    train, val = split(listed([0, 1, 0], ("a", "b"), [False, True, False]), 0.5)
    assert (train.tolist(), val.tolist()) == ([0, 2], [1])
    with pytest.raises(DataError, match="all 2 images are held out: nothing is left to train on"):
        split(listed([0, 1], ("a", "b"), [True, True]))


def test_a_set_of_several_classes_an_image_is_divided_by_the_first() -> None:
    targets, labels = encode(["b;a", "b", "a"] * 5, "t", separators=";")
    found = Files(targets, labels, None, root="", names=Strings.pack(map(str, range(15))))
    assert split(found, 0.5)[1].tolist() == [2, 4, 5, 8, 10, 11, 14]


# ---- relabel, match


def test_relabel_goes_by_name_not_by_order() -> None:
    found = listed([0, 1, 2, 1], ("ant", "bee", "cat"))
    model = Labels(("cat", "ant", "bee"))
    relabel(found, model)
    assert found.targets.tolist() == [1, 2, 0, 2]
    assert found.labels is model


def test_relabel_finds_imagenet_classes_by_their_ids() -> None:
    found = listed([0, 1], ("n02012849", "n03126707"))  # the two cranes, the bird first
    relabel(found, Labels.imagenet_1k(), partial=True)
    assert found.targets.tolist() == [134, 517]


def test_classes_that_do_not_match_are_named() -> None:
    with pytest.raises(DataError, match=r"1 classes that the model does not know: bee; 2 classes of the model without "
                                        r"an image: cow, dog\. Rename .* --partial"):  # fmt: skip
        relabel(listed([0, 1], ("ant", "bee")), Labels(("ant", "cow", "dog")))
    with pytest.raises(DataError, match="that the model does not know: bee. Rename"):
        relabel(listed([0, 1], ("ant", "bee")), Labels(("ant", "cow")), partial=True)
    many = tuple(f"c{i:02}" for i in range(13))
    with pytest.raises(DataError, match="13 classes that the model does not know: c00, .*, c09, …;"):
        relabel(listed([0], many), Labels(("ant",)))


def test_relabel_between_one_class_and_several() -> None:
    found = listed([1, 0, 1], ("ant", "bee"))
    relabel(found, Labels(("cow", "bee", "ant"), multi_label=True), partial=True)
    assert found.targets.dtype == np.uint8
    assert found.targets.tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0]]
    targets, labels = encode([["bee"], ["ant", "bee"]], "t")
    several = Files(targets, labels, None, root="", names=Strings.pack("01"))
    relabel(several, Labels(("bee", "cow", "ant"), multi_label=True), partial=True)
    assert several.targets.tolist() == [[1, 0, 0], [1, 0, 1]]
    with pytest.raises(DataError, match="may have several classes, and the model gives one"):
        relabel(several, Labels(("bee", "cow", "ant")))


def test_match_by_id_then_name_then_a_synonym_of_one_class_alone() -> None:
    imagenet = Labels.imagenet_1k()
    assert match(Labels(("tabby",)), imagenet) == [281]
    assert match(Labels(("Egyptian_cat", "grand-piano")), imagenet) == [285, 579]
    assert match(Labels(("crane",)), imagenet) == [134]  # the whole name: of two the first
    assert match(Labels(("n03126707", "goldfish")), imagenet) == [517, 1]
    assert match(Labels(("x", "y"), ("n03126707", "")), imagenet) == [517, None]
    theirs = Labels(("cat, pet", "dog, pet"))
    assert match(Labels(("pet", "Cat", "cat")), theirs) == [None, 0, None]  # two never share one
    assert match(imagenet, imagenet) == list(range(1000))
    # an id that they do not have is not looked for by name: there are two cranes
    assert match(Labels(("crane",), ("n00000001",)), imagenet) == [None]


# ---- classes


def test_names_are_sorted_and_numbers_go_by_size() -> None:
    targets, labels = encode(["b", " a ", "b", "C"], "t")
    assert (targets.tolist(), labels.names) == ([2, 1, 2, 0], ("C", "a", "b"))
    assert targets.dtype == np.int64
    targets, labels = encode(["10", "9", 9, 2.0, "-1"], "t")
    assert labels.names == ("-1", "2", "9", "9", "10") or labels.names == ("-1", "2", "9", "10")
    assert [labels.names[t] for t in targets] == ["10", "9", "9", "2", "-1"]


def test_wordnet_ids_become_names() -> None:
    assert encode(["n02012849", "n01443537"], "t")[1].names == ("goldfish, Carassius auratus", "crane")


def test_several_classes_in_a_cell() -> None:
    targets, labels = encode(["cat;dog", "", "bird", " dog | bird ;"], "t", separators=";|")
    assert (labels.names, labels.multi_label) == (("bird", "cat", "dog"), True)
    assert targets.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert targets.dtype == np.uint8
    assert encode(["cat;dog", "cat"], "t")[1].names == ("cat", "cat;dog")  # no separators, no list
    assert encode([[2], [2, 0]], "t", names=("x", "y", "z"))[0].tolist() == [[0, 0, 1], [1, 0, 1]]
    assert encode([np.array([1]), np.array([])], "t", names=("x", "y"))[0].tolist() == [[0, 1], [0, 0]]


def test_numbers_find_their_names() -> None:
    targets, labels = encode([1, "0", "y", np.int8(1)], "t", names=("x", "y", "z"))
    assert (targets.tolist(), labels.names) == ([1, 0, 1, 1], ("x", "y", "z"))


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (["a", None], None, "t: row 2 has no class"),
        (["a", float("nan")], None, "t: row 2 has no class"),
        ([0, 1, -1], ("x", "y"), r"row 3 has the class -1 \(the mark of an image without a class\); 2 names .* 0 to 1"),
        ([0, 2], ("x", "y"), "row 2 has the class 2; 2 names are given"),
        (["x", "w"], ("x", "y"), 'row 2 has the class "w", which is not among the 2 named'),
        ([0.5], None, "row 1 has the class '0.5'; right is a name or a whole number"),
        ([1, float("inf")], None, "row 2 has the class 'inf'"),
        ([{"a": 1}], None, "row 1 has the class"),
    ],
)
def test_what_is_no_class_is_named(values: list, names: tuple | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode(values, "t", names=names)


# ---- splits by name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("data/validation-00000-of-00003.parquet", "val"),
        ("imagenet-TRAIN-000.tar", "train"),
        ("s3://bucket/dev/0001.tar", "val"),
        ("x/test/part.csv", "test"),
        ("evaluated.csv", None),
        ("pytest-of-me/test_it0/0.tar", None),
        ("0.train.tar", None),
    ],
)
def test_split_of(name: str, kind: str | None) -> None:
    assert split_of(name) == kind


def test_choose() -> None:
    parts = ["train", "test", "validation", "extra"]
    assert choose(parts, None, "x") == [False, None, True, None]
    assert choose(parts, "val", "x") == [None, None, False, None]
    assert choose(parts, "extra", "x") == [None, None, None, False]
    assert choose(["train", "test"], None, "x") == [False, True]
    assert choose(["val", None], None, "x") == [True, False]
    assert choose(["val", "valid"], None, "x") == [False, False]  # one kind: all there is
    assert choose([None, None], None, "x") == [False, False]
    with pytest.raises(DataError, match='x has no split "dev2". There is: extra, test, train, validation. Choose one'):
        choose(parts, "dev2", "x")
    with pytest.raises(DataError, match='x has no split "train". There is: none'):
        choose([None], "train", "x")
    with pytest.raises(DataError, match="x has the splits test, val and none to train on"):
        choose(["test", "val"], None, "x")
    assert held_out_rows([False, None, True], [2, 5, 1]) is not None
    assert np.array_equal(held_out_rows([False, None, True], [2, 5, 1]), [False, False, True])  # type: ignore[arg-type]
    assert held_out_rows([False, False], [2, 3]) is None


# ---- names, bytes, identity


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5)), st.lists(st.text("aé字", max_size=3)))
def test_strings_give_back_what_was_packed(first: list[str], second: list[str]) -> None:
    packed = Strings.pack(first)
    assert list(packed) == first and len(packed) == len(first)
    assert list(Strings.join([packed, Strings.pack([]), Strings.pack(second)])) == first + second
    assert list(pickle.loads(pickle.dumps(packed))) == first
    with pytest.raises(IndexError, match=f"there are {len(first)}"):
        packed[len(first)]


def test_a_name_that_is_not_utf8_survives() -> None:
    assert Strings.pack([b"a\xff.png".decode("utf-8", "surrogateescape")])[0] == "a\udcff.png"


def test_a_million_names_are_small() -> None:
    names = Strings.pack(f"n01440764/n01440764_{i}.JPEG" for i in range(10_000))
    assert (names.packed.nbytes + names.ends.nbytes) / 10_000 < 40


def test_ranges_are_checked_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"0123456789")
    assert read_range(str(path), 3, 4, "x") == b"3456"
    with pytest.raises(ImageCorrupt, match=r"x: its bytes are to be 7 to 11 of .*a\.tar, which has 10"):
        read_range(str(path), 7, 4, "x")
    with pytest.raises(ImageCorrupt, match="damaged, or has changed"):
        read_range(str(path), -1, 4, "x")
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 5)
    with pytest.raises(ImageTooLarge, match="x: 6 bytes; the limit for an image in an archive or a table is 5"):
        read_range(str(path), 0, 6, "x")
    path.unlink()
    with pytest.raises(ImageNotFound, match=r"a\.tar is gone"):
        read_range(str(path), 0, 1, "x")


def test_identity_follows_names_sizes_and_times(tmp_path: Path) -> None:
    def identity(*names: str) -> str:
        packed = Strings.pack(names)
        return Files(np.zeros(len(names)), Labels(("a",)), None, root=str(tmp_path), names=packed).identity()

    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"abc")
    first = identity("1.png", "2.png")
    assert first == identity("1.png", "2.png") and len(first) == 32
    assert identity("2.png", "1.png") != first
    (tmp_path / "1.png").write_bytes(b"abcd")
    second = identity("1.png", "2.png")
    assert second != first
    (tmp_path / "1.png").unlink()
    assert identity("1.png", "2.png") not in (first, second)
    assert digest([1, "1"]) != digest(["1", 1])


def test_archived_identity_follows_the_archive_and_the_choice(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"0123456789")

    def identity(offsets: list[int]) -> str:
        rows = np.zeros(len(offsets), np.int64)
        return Archived(
            rows,
            Labels(("a",)),
            archives=[Archive.at(path)],
            held_out=None,
            which=rows,
            names=Strings.pack("x" * len(offsets)),
            offsets=np.array(offsets),
            sizes=rows + 1,
        ).identity()

    first = identity([1, 5])
    assert identity([1, 5]) == first != identity([1, 6])
    path.write_bytes(b"01234567890")
    assert identity([1, 5]) != first
    with pytest.raises(DataError, match="gone.tar: No such file or directory. Check the path"):
        Archive.at(tmp_path / "gone.tar")
