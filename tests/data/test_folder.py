"""Class folders, on disk and in zip files that may lie."""

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from opsin.data import open_samples
from opsin.data import samples as samples_module
from opsin.data.folder import open_zip
from opsin.errors import DataError, ImageCorrupt, ImageTooLarge, ImageUnreadable
from opsin.preprocess import decode

Fill = Callable[..., None]
Picture = Callable[[int], bytes]


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_class_folders(tmp_path: Path, fill: Fill, picture: Picture) -> None:
    fill(
        tmp_path, "dog/2.png", "cat/b/3.JPG", "cat/10.png", "Ant/1.webp", ".git/x.png", "cat/.hid.png", "cat/._d/1.png"
    )
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    fill(tmp_path, "loose.png")
    found = open_samples(str(tmp_path))
    assert found.labels.names == ("Ant", "cat", "dog")
    keys = [found.key(i) for i in range(len(found))]
    assert keys == [f"{tmp_path}/{name}" for name in ("Ant/1.webp", "cat/10.png", "cat/b/3.JPG", "dog/2.png")]
    assert found.targets.tolist() == [0, 1, 1, 2]
    assert found.held_out is None
    assert found.source(0) == keys[0]
    assert decode(found.source(1)).size == (7, 3)


def test_it_is_the_same_every_time_and_in_another_process(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, *(f"{c}/{i}.png" for i in (2, 10, 1) for c in "ba"))
    first, second = open_samples(str(tmp_path)), open_samples(str(tmp_path))
    copy = pickle.loads(pickle.dumps(first))
    for other in (second, copy):
        assert [other.key(i) for i in range(6)] == [first.key(i) for i in range(6)]
        assert other.identity() == first.identity()
        assert np.array_equal(other.targets, first.targets)


def test_wordnet_folders_get_names(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "n02123045/1.png", "n01443537/1.png")
    found = open_samples(str(tmp_path))
    assert found.labels.names == ("goldfish, Carassius auratus", "tabby, tabby cat")
    assert found.labels.wnids == ("n01443537", "n02123045")


@pytest.mark.parametrize("second", ["val", "validation", "valid", "test"])
def test_train_and_its_like(tmp_path: Path, fill: Fill, second: str) -> None:
    fill(tmp_path, "train/b/1.png", "train/a/2.png", "train/a/3.png", f"{second}/a/4.png", f"{second}/b/5.png")
    found = open_samples(str(tmp_path))
    assert found.held_out is not None
    assert (found.targets.tolist(), found.held_out.tolist()) == ([0, 0, 1, 0, 1], [False] * 3 + [True] * 2)
    assert found.key(3) == f"{tmp_path}/{second}/a/4.png"
    alone = open_samples(str(tmp_path), split="test" if second == "test" else "val")
    assert [alone.key(i) for i in range(len(alone))] == [found.key(3), found.key(4)]
    assert alone.held_out is None
    assert len(open_samples(str(tmp_path), split="train")) == 3
    with pytest.raises(DataError, match=f'no split "extra". There is: {", ".join(sorted((second, "train")))}.'):
        open_samples(str(tmp_path), split="extra")


def test_validation_comes_before_test(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "train/a/1.png", "val/a/1.png", "test/a/1.png", "test/b/1.png")
    found = open_samples(str(tmp_path))
    assert [Path(found.key(i)).parts[-3] for i in range(2)] == ["train", "val"] and len(found) == 2
    assert len(open_samples(str(tmp_path), split="test")) == 2


def test_a_class_may_be_called_train(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "train/1.png", "train/steam/2.png", "test/1.png", "car/1.png")
    assert open_samples(str(tmp_path)).labels.names == ("car", "test", "train")


def test_classes_of_the_splits_have_to_agree(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png", "val/d/1.png")
    with pytest.raises(DataError, match=r"train/ and val/ differ: 1 only in train/: b; 2 only in val/: c, d\. Rename"):
        open_samples(str(tmp_path))
    assert open_samples(str(tmp_path), split="val").labels.names == ("a", "c", "d")


def test_an_empty_set_says_what_was_looked_for(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "cats").mkdir()
    looked = r"looked for class folders with images, as cat/1\.jpg, .* There are 2 images beside no class folder"
    with pytest.raises(DataError, match=rf"{looked}; the folders are cats\. Sort the images"):
        open_samples(str(tmp_path))
    (tmp_path / "labels.csv").write_text("path,label\n1.png,a\n")
    with pytest.raises(DataError, match="It holds labels.csv: if that names the images, give its path"):
        open_samples(str(tmp_path))


def test_a_class_folder_may_be_a_link_and_no_circle_is_followed(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path / "elsewhere", "1.png")
    fill(tmp_path / "set", "dog/1.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "dog" / "again").symlink_to(tmp_path / "set")
    assert open_samples(str(tmp_path / "set")).targets.tolist() == [0, 1]


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, fill: Fill) -> None:
    fill(tmp_path, "a/1.png", "b\udcff/1.png")
    with pytest.raises(DataError, match="has a name that is not UTF-8. Rename it"):
        open_samples(str(tmp_path))


# ---- zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("wrapper", ["", "photos/", "a/b/"])
def test_zip(tmp_path: Path, picture: Picture, method: int, wrapper: str) -> None:
    members = {f"{wrapper}{name}": picture(i) for i, name in enumerate(("dog/1.png", "cat/x/2.png", "cat/1.png"))}
    path = zipped(tmp_path / "set.zip", members | {"__MACOSX/cat/._1.png": b"", f"{wrapper}README.txt": b"x"}, method)
    found = pickle.loads(pickle.dumps(open_samples(str(path))))
    assert found.labels.names == ("cat", "dog")
    assert found.targets.tolist() == [0, 0, 1]
    assert [found.source(i) for i in range(3)] == [picture(2), picture(1), picture(0)]
    assert found.key(1) == f"{path}::cat/x/2.png"
    assert found.identity() == open_samples(str(path)).identity()


def test_zip_with_splits(tmp_path: Path, picture: Picture) -> None:
    names = ("train/a/1.png", "train/b/1.png", "val/b/1.png", "val/a/1.png")
    path = zipped(tmp_path / "set.zip", {name: picture(i) for i, name in enumerate(names)})
    found = open_samples(str(path))
    assert found.held_out is not None and found.held_out.tolist() == [False, False, True, True]
    assert found.source(2) == picture(3)
    assert len(open_samples(str(path), split="validation")) == 2
    with pytest.raises(DataError, match="holds no labelled images"):
        open_samples(str(zipped(tmp_path / "none.zip", {"1.png": b"", "a/notes.txt": b""})))
    (tmp_path / "no.zip").write_bytes(b"PK, but no zip")
    with pytest.raises(DataError, match=r"no\.zip is no readable zip file: File is not a zip file"):
        open_samples(str(tmp_path / "no.zip"))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_that_lies(tmp_path: Path, picture: Picture, method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "set.zip", {"a/1.png": b"\0" * 5000, "b/1.png": picture(1)}, method)
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")

    def patched(offset: int, value: int, form: str = "<I") -> Exception:
        broken = bytearray(data)
        struct.pack_into(form, broken, entry + offset, value)
        path.write_bytes(broken)
        with pytest.raises((ImageCorrupt, ImageTooLarge, ImageUnreadable)) as caught:
            open_zip(str(path)).source(0)
        assert open_zip(str(path)).source(1) == picture(1)  # its neighbour is not touched
        return caught.value

    deflated = method == zipfile.ZIP_DEFLATED
    if deflated:
        assert "1,001 bytes with checksum" in str(patched(24, 1000))  # inflated no further than the lie
        assert "0 bytes with checksum 00000000" in str(patched(20, 1))  # packed size: cut short
        broken = bytearray(data)
        broken[30 + len("a/1.png")] = 0xFF  # the first byte of the data: no such kind of block
        path.write_bytes(broken)
        with pytest.raises(ImageCorrupt, match="its compressed bytes are damaged: Error -3"):
            open_zip(str(path)).source(0)
    assert "directory says 5,001" in str(patched(24, 5001))
    assert "directory says 5,000 and 0000abcd" in str(patched(16, 0xABCD))
    assert "70,000,000 bytes; the limit" in str(patched(24, 70_000_000))
    assert "which has" in str(patched(20, 60_000_000))  # packed size past the end
    assert "no member begins at byte 7" in str(patched(42, 7))
    assert "encrypted" in str(patched(8, 1, "<H"))
    assert "compressed by method 14" in str(patched(10, 14, "<H"))
    path.write_bytes(data)
    monkeypatch.setattr(samples_module, "MAX_IMAGE_BYTES", 4999)
    with pytest.raises(ImageTooLarge, match="a/1.png: 5,000 bytes"):
        open_zip(str(path)).source(0)


@pytest.mark.shared
def test_caltech(shared: Path) -> None:
    found = open_samples(str(shared / "caltech-12.zip"))
    assert (len(found), len(found.labels)) == (599, 12)
    assert found.labels.names[:2] == ("Motorbikes", "accordion")
    assert np.bincount(found.targets).tolist() == [80, 28, 80, 46, 31, 34, 43, 50, 44, 40, 43, 80]
    assert min(decode(found.source(598)).size) == 160
