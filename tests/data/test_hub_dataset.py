"""Data sets through the `datasets` library, built here; nothing is fetched."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opsin.data import hub, open_samples
from opsin.errors import DataError, ImageUnreadable, MissingExtra

Picture = Callable[[int], bytes]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(module.config, "HF_DATASETS_OFFLINE", True)
    module.disable_progress_bars()
    return module


def rows(datasets: Any, picture: Picture, seeds: range, names: tuple[str, ...] = ("cat", "dog", "emu")) -> Any:
    features = datasets.Features({"label": datasets.ClassLabel(names=list(names)), "pic": datasets.Image()})
    cells = [{"bytes": picture(i), "path": None} for i in seeds]
    return datasets.Dataset.from_dict({"label": [i % len(names) for i in seeds], "pic": cells}, features=features)


def test_a_saved_set(tmp_path: Path, datasets: Any, picture: Picture) -> None:
    parts = {"train": rows(datasets, picture, range(5)), "test": rows(datasets, picture, range(7, 10))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    found = pickle.loads(pickle.dumps(open_samples(str(tmp_path / "set"))))
    assert found.labels.names == ("cat", "dog", "emu")
    assert found.targets.tolist() == [0, 1, 2, 0, 1, 1, 2, 0]
    assert found.held_out.tolist() == [False] * 5 + [True] * 3
    assert [found.source(i) for i in range(8)] == [picture(i) for i in (*range(5), *range(7, 10))]
    assert [found.key(i) for i in (4, 5)] == [f"{tmp_path}/set::train/4", f"{tmp_path}/set::test/0"]
    assert found.identity() == open_samples(str(tmp_path / "set")).identity()
    test = open_samples(str(tmp_path / "set"), split="test")
    assert (test.source(2), test.held_out) == (picture(9), None)
    with pytest.raises(DataError, match='no split "val". There is: test, train'):
        open_samples(str(tmp_path / "set"), split="val")


def test_a_shuffled_set_without_splits(tmp_path: Path, datasets: Any, picture: Picture) -> None:
    rows(datasets, picture, range(6)).select([4, 1, 3]).save_to_disk(tmp_path / "set")
    found = open_samples(str(tmp_path / "set"))
    assert found.targets.tolist() == [1, 1, 0]
    assert [found.source(i) for i in range(3)] == [picture(4), picture(1), picture(3)]


def test_a_shuffled_set_in_memory(datasets: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = rows(datasets, picture, range(6)).select([4, 1, 3])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: chosen)
    found = open_samples("me/photos")
    assert (found.targets.tolist(), found.source(2)) == ([1, 1, 0], picture(3))


def test_load_dataset(tmp_path: Path, datasets: Any, picture: Picture) -> None:
    (tmp_path / "me").mkdir()
    rows(datasets, picture, range(4)).to_parquet(tmp_path / "me" / "train-00000-of-00001.parquet")
    rows(datasets, picture, range(4, 6)).to_parquet(tmp_path / "me" / "validation-00000-of-00001.parquet")
    found = hub.open_dataset(str(tmp_path / "me"))
    assert found.held_out is not None and found.held_out.tolist() == [False] * 4 + [True] * 2
    assert [found.source(i) for i in range(6)] == [picture(i) for i in range(6)]
    # the same files without the library
    plain = open_samples(str(tmp_path / "me"))
    assert (plain.labels, plain.targets.tolist()) == (found.labels, found.targets.tolist())
    assert [plain.source(i) for i in range(6)] == [picture(i) for i in range(6)]


def test_an_id_reaches_the_library_as_it_is(datasets: Any, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Any:
        asked.append(arguments)
        return datasets.DatasetDict({"train": rows(datasets, picture, range(3))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(open_samples("me/photos")) == len(open_samples("me/photos:small")) == 3
    assert asked == [("me/photos", None), ("me/photos", "small")]


def test_lists_of_classes_and_images_elsewhere(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    )
    cells = [{"bytes": None, "path": path} for path in ("/in/1.png", "https://x.org/1.png")]
    data = {"image": cells, "labels": [[1], [0, 1]]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.Dataset.from_dict(data, features=features))
    found = open_samples("me/photos")
    assert found.labels.multi_label and found.targets.tolist() == [[0, 1], [1, 1]]
    assert found.source(0) == "/in/1.png"
    with pytest.raises(ImageUnreadable, match=r"me/photos::train/1: the cell holds no bytes, and the address https"):
        found.source(1)


def test_what_cannot_be_loaded(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"no column of images .* there are text \(Value\), label \(Value\)\. Rename"):
        open_samples(str(tmp_path / "set"))

    def offline(*_: Any) -> Any:
        raise ConnectionError("Couldn't reach 'me/photos' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r'the data set "me/photos" cannot be loaded: ConnectionError: .* HF_ENDPOINT'):
        open_samples("me/photos")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"opsin\[datasets\]"):
        open_samples("me/photos")
