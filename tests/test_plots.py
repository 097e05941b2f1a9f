"""Pictures are drawn whole, for odd numbers and names too; what they show is checked where it can be read off."""

import builtins
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin import plots
from opsin.errors import MissingExtra
from opsin.labels import Labels
from opsin.plots import Bin, bars, confusion, curves, reliability, worst_pairs


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def counts(classes: int, images: int = 25) -> np.ndarray:
    random = np.random.default_rng(classes)
    return np.stack([random.multinomial(images, p) for p in 0.3 / classes + 0.7 * np.eye(classes)])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def texts(figure: Any) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


BINS = [
    Bin(low=0.0, high=0.5, count=0, confidence=None, accuracy=None),
    Bin(low=0.5, high=1.0, count=7, confidence=0.8, accuracy=0.6),
]
ROWS = [{"step": step, "loss": 3.0 / step, "lr": 1e-3, "images_per_s": 800.0} for step in range(1, 90)]


@pytest.mark.parametrize("classes", [1, 3, 12, 45, 61])
def test_a_confusion_picture_of_any_number_of_classes(classes: int, tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "new" / "confusion.png"
    matrix = counts(classes)
    confusion(path, matrix, [f"class {i}" for i in range(classes)])
    image = pixels(path)
    assert 300 < image.shape[0] < 2000
    assert 300 < image.shape[1] < 2000
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 255).all(), "something is cut at the edge"
    assert [file.name for file in path.parent.iterdir()] == ["confusion.png"]
    axes = drawn[0].axes[0]
    right = np.trace(matrix)
    assert axes.get_title() == f"{right:,} of {matrix.sum():,} images right ({100 * right / matrix.sum():.1f} %)"
    if classes <= 60:
        assert [label.get_text() for label in axes.get_yticklabels()] == [f"class {i}" for i in range(classes)]
        if classes <= 20:
            assert sorted(texts(drawn[0])) == sorted(map(str, matrix[matrix > 0]))
    else:
        true, predicted, count = worst_pairs(matrix, 1)[0]
        assert f"class {true} → class {predicted}" in texts(drawn[0])
        assert f"{count} of 25, {4 * count} %" in texts(drawn[0])
        assert all(not label.get_text().startswith("class") for label in axes.get_yticklabels())


def test_the_matrix_is_drawn_the_right_way_round(tmp_path: Path, drawn: list[Any]) -> None:
    """All of class a is taken for c: the cell in the first row, last column."""
    confusion(tmp_path / "c.png", np.array([[0, 0, 5], [0, 2, 2], [0, 0, 0]]), ["a", "b", "c"])
    axes = drawn[0].axes[0]
    [image] = axes.get_images()
    assert image.get_array().filled(-1).tolist() == [[0, 0, 1], [0, 0.5, 0.5], [-1, -1, -1]]
    assert image.origin == "upper"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert "grey: class without an image" in axes.get_title()
    places = {text.get_position(): text.get_text() for text in axes.texts}
    assert places == {(2, 0): "5", (1, 1): "2", (2, 1): "2"}


def test_no_mistake_is_lost_among_many_classes() -> None:
    shares = np.eye(1201)
    shares[700, 3] = 0.04
    shares[5] = np.nan
    pooled = plots._pooled(shares, 600)
    assert pooled.shape == (401, 401)
    assert pooled[700 // 3, 1] == 0.04
    assert (np.diag(pooled) == 1).all()
    assert np.isnan(plots._pooled(np.full((4, 4), np.nan), 2)).all()


def test_worst_pairs_are_the_commonest_mistakes() -> None:
    matrix = np.array([[90, 3, 7], [0, 0, 3], [1, 0, 0]])
    assert worst_pairs(matrix, 9) == [(0, 2, 7), (1, 2, 3), (0, 1, 3), (2, 0, 1)]  # of equal counts the larger share
    assert worst_pairs(matrix, 1) == [(0, 2, 7)]
    assert worst_pairs(np.eye(3, dtype=int), 5) == []


@pytest.mark.parametrize(
    "names",
    [["$x$", "a_b^{", "\\frac"], ["猫", "狗", "虎斑猫"], ["x\udcff", "", "a\nb"], ["x" * 300, "crane", "crane"]],
)
def test_any_name_can_be_drawn(names: list[str], tmp_path: Path) -> None:
    confusion(tmp_path / "c.png", counts(3), names)
    confusion(tmp_path / "many.png", counts(66), [*names, *map(str, range(63))])


def test_names_are_cut_to_the_first_synonym_where_it_is_the_only_one() -> None:
    names = ["tabby, tabby cat", "crane, bird", "crane, machine", "a name of more than twenty-six letters"]
    assert plots._short(names) == ["tabby", "crane, bird", "crane, machine", "a name of more than twent…"]
    assert max(map(len, plots._short(Labels.imagenet_1k().names))) == 26


def test_names_that_do_not_fit_the_counts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts have shape \(3, 3\); 2 names need \(2, 2\)"):
        confusion(tmp_path / "c.png", counts(3), ["a", "b"])
    with pytest.raises(ValueError, match="0 names need"):
        confusion(tmp_path / "c.png", np.zeros((0, 0), int), [])


def test_curves_show_what_was_logged(tmp_path: Path, drawn: list[Any]) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in ROWS]
    rows[40] |= {"val_loss": 0.9, "top1": 0.25, "top5": 0.5}
    rows[80] |= {"val_loss": 0.5, "top1": 0.75, "top5": float("nan")}
    rows[10]["loss"] = float("inf")
    rows.append({"step": 81, "val_loss": 0.4})  # after a resume: the later row counts
    rows.append({"step": 90, "loss": None})
    curves(tmp_path / "curves.png", rows[::1])
    pixels(tmp_path / "curves.png")
    loss, accuracy, rate, speed = drawn[0].axes
    raw, smooth, held_out = loss.get_lines()
    assert len(raw.get_xdata()) == 88
    assert 11 not in raw.get_xdata()
    assert len(smooth.get_xdata()) == 88
    assert held_out.get_xdata().tolist() == [41, 81]
    assert held_out.get_ydata().tolist() == [0.9, 0.4]
    assert [line.get_ydata().tolist() for line in accuracy.get_lines()] == [[25, 75], [50]]
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == ["top-1: 75.0 %, highest 75.0 %", "top-5: 50.0 %, highest 50.0 %"]
    assert rate.get_lines()[0].get_ydata().tolist() == [1e-3] * 89
    assert speed.get_ylabel() == "images/s"
    assert loss.get_yscale() == "log"  # from 3 to 3/89


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        ([], ["no step has been logged yet"]),
        ([{"step": 3}], ["no step has been logged yet"]),
        ([{"step": 3, "loss": float("nan")}], ["no step has been logged yet"]),
        ([{"step": 1, "loss": 2.5}], ["loss"]),
        ([{"step": 1, "val_loss": 2.5}], ["loss"]),
        ([{"step": 1, "loss": -2.5}, {"step": 2, "loss": 0.0}], ["loss"]),
        ([{"step": 20_000, "loss": 2.5, "lr": 0.0}, {"step": 40_000, "loss": 1}], ["loss", "learning rate"]),
        ([{"step": 5, "top1": 0.5}, {"step": 5, "images_per_s": 0}], ["held out, %", "images/s"]),
        ([{"step": 5, "map": 0.5}], ["held out, %"]),
    ],
)
def test_curves_of_little(rows: list[dict[str, Any]], panels: list[str], tmp_path: Path, drawn: list[Any]) -> None:
    curves(tmp_path / "c.png", rows)
    pixels(tmp_path / "c.png")
    assert [axes.get_ylabel() for axes in drawn[0].axes] == panels or texts(drawn[0]) == panels


def test_smoothing_is_a_mean_around_each_value() -> None:
    line = np.arange(300.0)
    assert np.allclose(plots._smoothed(line)[:-3], line[:-3])  # a straight line stays one
    assert plots._smoothed(line)[-1] == np.mean([296, 297, 298, 299])
    noise = np.random.default_rng(0).normal(size=3000)
    assert plots._smoothed(noise).std() < 0.2
    assert plots._smoothed(np.array([1.0, 9.0])).tolist() == [1, 9]


def test_reliability_shows_the_bins(tmp_path: Path, drawn: list[Any]) -> None:
    reliability(tmp_path / "r.png", BINS, 0.2)
    pixels(tmp_path / "r.png")
    upper, lower = drawn[0].axes
    assert upper.get_title() == "expected calibration error 20.0 %"
    bar, gap = upper.patches
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == pytest.approx((50, 50, 60))
    assert (gap.get_y(), gap.get_height()) == pytest.approx((60, 20))
    assert [patch.get_height() for patch in lower.patches] == [0, 100]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == [
        "mean confidence 80.0 %",
        "mean accuracy 60.0 %",
    ]
    reliability(tmp_path / "r.png", BINS[:1], 0.0)


SPEEDS: list[dict[str, Any]] = [
    {"name": name, "precision": precision, "images_per_s": rate, "images_per_s_quartiles": [0.9 * rate, 1.1 * rate],
     "ratio": rate / 20}
    for name, precision, rate in [
        ("opsin plain", "fp32", 20.0), ("opsin", "fp32", 35.25), ("opsin", "int8", 1234.0), ("openvino", "fp32", 3.456),
    ]
]  # fmt: skip


def test_bars_show_the_contenders(tmp_path: Path, drawn: list[Any]) -> None:
    bars(tmp_path / "b.png", SPEEDS, title="$a model\nand a machine", baseline="opsin plain fp32")
    image = pixels(tmp_path / "b.png")
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 255).all(), "something is cut at the edge"
    [axes] = drawn[0].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["opsin plain", "opsin", "openvino", "opsin"]  # by precision
    assert [patch.get_width() for patch in axes.patches] == [20.0, 35.25, 3.456, 1234.0]
    at = [patch.get_y() + patch.get_height() / 2 for patch in axes.patches]
    assert at == pytest.approx(axes.get_yticks())
    assert at == sorted(at)
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first is not on top"
    plain, own, other, int8 = (patch.get_facecolor() for patch in axes.patches)
    assert own == int8
    assert len({plain, own, other}) == 3
    assert other[0] == other[1] == other[2], "another library is not grey"
    assert [line.get_xdata().tolist() for line in axes.get_lines()][1] == pytest.approx([31.725, 38.775])
    assert texts(drawn[0]) == ["fp32", "20.0   1.00×", "35.2   1.76×", "3.46   0.17×", "int8", "1,234   61.7×"]
    assert axes.get_xlabel() == "images/s, and × opsin plain fp32"
    assert axes.get_title(loc="left") == "$a model\nand a machine"


def test_bars_of_nothing(tmp_path: Path) -> None:
    bars(tmp_path / "b.png", SPEEDS[:1], title="", baseline="opsin plain fp32")
    with pytest.raises(ValueError, match="no contenders: there is nothing to draw"):
        bars(tmp_path / "b.png", [], title="", baseline="")


DRAW: dict[str, Callable[[Path], None]] = {
    "curves": lambda path: curves(path, ROWS),
    "confusion": lambda path: confusion(path, counts(3), ["a", "b", "c"]),
    "reliability": lambda path: reliability(path, BINS, 0.2),
    "bars": lambda path: bars(path, SPEEDS, title="a model", baseline="opsin plain fp32"),
}


@pytest.mark.parametrize("name", DRAW)
def test_without_matplotlib_the_extra_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def absent(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r'matplotlib is not installed. .* "opsin\[train\]"'):
        DRAW[name](tmp_path / "x.png")


@pytest.mark.parametrize("name", DRAW)
def test_a_failed_picture_leaves_the_older_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = tmp_path / "x.png"
    path.write_text("yesterday")

    def full(self: FigureCanvasAgg, file: Any, **_: object) -> None:
        file.write(b"\x89PNG")
        raise OSError("No space left on device")

    monkeypatch.setattr(FigureCanvasAgg, "print_figure", full)
    with pytest.raises(OSError, match="No space left"):
        DRAW[name](path)
    assert path.read_text() == "yesterday"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_can_be_drawn_on_several_threads(tmp_path: Path) -> None:
    import sys

    names = ["reliability", "curves", "reliability"]
    threads = [
        threading.Thread(target=DRAW[name], args=(tmp_path / f"{place}.png",)) for place, name in enumerate(names)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, name in enumerate(names):
        DRAW[name](tmp_path / "alone.png")
        assert (pixels(tmp_path / f"{place}.png") == pixels(tmp_path / "alone.png")).all()
    assert "matplotlib.pyplot" not in sys.modules
