"""Maps over photos: colours where they belong, nothing cut, any label; and the figures, as PNG and for a page."""

import builtins
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.errors import MissingExtra
from opsin.explain import Explanation, Faithfulness, pictures

SIZE = (90, 60)  # width, height
PHOTO = Image.new("RGB", SIZE, (120, 130, 140))


def explanation(values: Any = None, **changes: Any) -> Explanation:
    """A map of 2 × 3 cells, the last of the first row highest, on the middle 60 × 60 pixels."""
    values = [[0, 0, 9], [0, 1, 2]] if values is None else values
    fields: dict[str, Any] = {
        "map": np.array(values, np.float32), "region": (15.0, 0.0, 75.0, 60.0), "size": SIZE, "method": "relevance",
        "layer": None, "head": None, "target": 3, "label": "tabby, tabby cat", "score": 0.614,
    }  # fmt: skip
    return Explanation(**fields | changes)


def faithfulness() -> Faithfulness:
    from opsin import explain

    model_free: dict[str, Any] = {
        "shares": np.linspace(0, 1, 5), "deletion": np.array([0.6, 0.3, 0.1, 0, 0]),
        "insertion": np.array([0, 0.4, 0.5, 0.6, 0.6]), "deletion_auc": 0.1234, "insertion_auc": 0.45,
        "random_deletion_auc": 0.31, "random_insertion_auc": 0.33,
    }  # fmt: skip
    return explain.Faithfulness(**model_free)


def at(image: Image.Image, x: int, y: int) -> np.ndarray:
    return np.asarray(image.convert("RGB"))[y, x].astype(int)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    figures: list[Any] = []
    save = pictures._save

    def keep(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(pictures, "_save", keep)
    return figures


def texts(figure: Any) -> list[str]:
    found = [axes.get_title(loc="left") for axes in figure.axes] + [text.get_text() for text in figure.texts]
    return [text for text in found if text]


# ── a map over its photo ─────────────────────────────────────────────────────────────────────────────────────────────


def test_high_values_glow_low_ones_stay_the_photo_and_the_unseen_is_dark() -> None:
    over = pictures.overlay(PHOTO, explanation())
    assert over.size == SIZE
    high, low, unseen = at(over, 72, 5), at(over, 18, 5), at(over, 5, 30)
    assert high[0] > 170
    assert high[0] - high[2] > 60, "not warm"
    assert np.abs(low - (120, 130, 140)).max() < 40
    assert unseen.max() < 70
    assert at(over, 89, 0).tolist() == unseen.tolist()


def test_of_two_signs_for_is_warm_and_against_cold() -> None:
    over = pictures.overlay(PHOTO, explanation([[-5, 0, 5]], region=(0, 0, 90, 60)))
    cold, middle, warm = at(over, 2, 30), at(over, 45, 30), at(over, 87, 30)
    assert cold.tolist() == warm[::-1].tolist() or cold[2] - cold[0] > 60
    assert warm[0] - warm[2] > 60
    assert np.abs(middle - (120, 130, 140)).max() < 40


def test_the_scale_is_of_percentiles_and_from_zero_with_two_signs() -> None:
    cells = np.arange(101, dtype=np.float32)[None]
    assert pictures.span(explanation(cells)) == (10, 99)
    assert pictures.span(explanation(cells - 50)) == (-50, 50)
    assert pictures.span(explanation([[0.25, 0.25]])) == (0.25, 1.25)
    assert pictures.span(explanation([[0.0, 0.0]])) == (0, 1)
    flat = np.asarray(pictures.glow(explanation([[0.25, 0.25]]), SIZE))
    assert set(np.unique(flat)) == {0, 255}, "a flat map glows"


def test_a_large_photo_is_reduced_with_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    enlarge = Explanation.on_image

    def note(self: Explanation) -> np.ndarray:
        sizes.append(self.size)
        return enlarge(self)

    monkeypatch.setattr(Explanation, "on_image", note)
    large = explanation(size=(9000, 6000), region=(1500, 0, 7500, 6000))
    over = pictures.overlay(Image.new("RGB", large.size, (120, 130, 140)), large, max_side=90)
    assert over.size == SIZE
    assert sizes == [SIZE], "the map was made as large as the photo"
    difference = np.asarray(over).astype(int) - np.asarray(pictures.overlay(PHOTO, explanation())).astype(int)
    assert np.abs(difference).max() <= 2
    assert pictures.overlay(Image.new("RGB", (4000, 1)), explanation(size=(4000, 1), region=(0, 0, 4000, 1))).size == (
        pictures.MAX_SIDE, 1,
    )  # fmt: skip


def test_a_photo_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"the image is 60 × 90 pixels; the explanation is of one of 90 × 60\. Give"):
        pictures.overlay(PHOTO.rotate(90, expand=True), explanation())


def test_where_a_map_peaks_is_said_in_pixels_of_the_photo() -> None:
    assert pictures.peak(explanation()) == (65, 15)
    assert pictures.peak(explanation([[9, 0], [0, 0]], region=(-60, 0, 120, 60), seen=(1 / 3, 0, 5 / 6, 1))) == (0, 15)
    assert pictures.peak(explanation(np.zeros((2, 3)))) is None
    assert pictures.seen(explanation(region=(-60, 0, 120, 60), seen=(0.5, 0, 5 / 6, 1))) == (30, 0, 90, 60)


@pytest.mark.parametrize(
    ("label", "score", "line"),
    [
        ("tabby, tabby cat", 0.614, "tabby, 61 %"),
        ("crane", 0.0312, "crane, 3.1 %"),
        ("", 1.0, ", 100 %"),
        ("a name of more than twenty-four letters", 0.5, "a name of more than twe…, 50 %"),
        ("$x_{1}$", 0.5, "$x_{1}$, 50 %"),
    ],
)
def test_headlines(label: str, score: float, line: str) -> None:
    assert pictures.headline(explanation(label=label, score=score)) == line


# ── draw ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_drawing_has_titles_and_faithfulness(tmp_path: Path, drawn: list[Any]) -> None:
    several = [
        explanation(),
        explanation(method="attention", layer=5, head=2),
        explanation([[-1, 2]], method="occlusion"),
    ]
    pictures.draw(tmp_path / "why.png", PHOTO, several, [faithfulness()] * 3)
    areas = "deletion 0.12, of random maps 0.31\ninsertion 0.45, of random maps 0.33"
    assert texts(drawn[0]) == [
        "tabby, 61 %", "relevance", "attention, layer 5, head 2", "occlusion", areas, areas, areas,
        "deletion: lower is better\ninsertion: higher is better",
    ]  # fmt: skip
    bars = [[text.get_text() for text in axes.texts] for axes in drawn[0].axes[-2:]]
    assert bars == [["matters least", "most"], ["against the label", "for it"]]
    with Image.open(tmp_path / "why.png") as image:
        assert image.format == "PNG"
        assert 1500 < image.width < 1900
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "something is cut at the edge"


def test_several_labels_stand_over_their_maps(tmp_path: Path, drawn: list[Any]) -> None:
    pictures.draw(tmp_path / "why.png", PHOTO, [explanation(), explanation(target=4, label="虎斑猫" * 9, score=0.02)])
    photo, first, second = (axes.get_title(loc="left") for axes in drawn[0].axes[:3])
    assert (photo, first) == ("photo", "tabby, 61 %\nrelevance")
    assert re.fullmatch(r"(.{11})…, 2.0 %\nrelevance", second)


@pytest.mark.parametrize("size", [(600, 20), (20, 600), (1, 1), (64, 64)])
def test_photos_of_any_shape_are_drawn(size: tuple[int, int], tmp_path: Path) -> None:
    each = explanation(size=size, region=(0, 0, *size))
    pictures.draw(tmp_path / "why.png", Image.new("RGB", size), [each] * 6)
    with Image.open(tmp_path / "why.png") as image:
        assert image.width < 2300
        assert image.height < 1600


def test_drawings_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no explanations: there is nothing to draw"):
        pictures.draw(tmp_path / "why.png", PHOTO, [])
    with pytest.raises(ValueError, match="1 faithfulness scores for 2 explanations; one each"):
        pictures.draw(tmp_path / "why.png", PHOTO, [explanation()] * 2, [faithfulness()])


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

RANDOM = np.random.default_rng(0)
FIGURES = {
    "grid": lambda: pictures.grid(RANDOM.random((3, 2, 5, 7))),
    "similarity": lambda: pictures.similarity(RANDOM.random((5, 7, 5, 7))),
    "filters": lambda: pictures.filter_bank(RANDOM.random((10, 5, 5, 3))),
    "distance": lambda: pictures.distance(RANDOM.random((3, 2))),
    "curves": lambda: pictures.curves(faithfulness(), "relevance"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_drawn_whole(name: str, tmp_path: Path) -> None:
    pictures.save(FIGURES[name](), tmp_path / "new" / "figure.png")
    with Image.open(tmp_path / "new" / "figure.png") as image:
        assert 250 < image.width < 900
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "something is cut at the edge"


@pytest.mark.parametrize("name", FIGURES)
def test_figures_for_a_page_take_its_colours_and_keep_to_themselves(name: str) -> None:
    text = pictures.svg(FIGURES[name](), "x")
    assert text.startswith('<svg style="max-width:')
    assert text.endswith("</svg>")
    assert not re.search(r"https?:|<!--|<metadata|#222222|#767676", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"x\d+", each) for each in ids)
    assert {*re.findall(r'(?:url\(#|href="#)([^")]+)', text)} <= {*ids}


def test_layers_go_down_and_heads_across() -> None:
    maps = np.zeros((3, 2, 5, 7))
    maps[2, 0, 0, 6] = 1
    maps[0, 1] = np.nan  # a head that there is not
    [axes] = pictures.grid(maps).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2"]
    [image] = axes.get_images()
    sheet = np.asarray(image.get_array())
    factor = sheet.shape[1] // 15  # two maps of seven and a gap
    brightest = np.unravel_index(sheet[..., :3].sum(-1).argmax(), sheet.shape[:2])
    assert (brightest[0] // factor, brightest[1] // factor) == (12, 6)
    assert (sheet[: 5 * factor, 8 * factor :, 3] == 0).all()
    assert (sheet[: 5 * factor, : 7 * factor, 3] == 1).all()


def test_many_positions_are_thinned() -> None:
    [axes] = pictures.similarity(np.zeros((30, 3, 30, 3))).axes
    rows = [int(text.get_text()) for text in axes.get_yticklabels()]
    assert len(rows) == 14
    assert (rows[0], rows[-1]) == (0, 29)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]


def test_filters_stand_in_rows_of_seven() -> None:
    bank = np.full((8, 5, 5, 3), 0.5)
    bank[7, 0, 0] = (1, 0.5, 0)
    [image] = pictures.filter_bank(bank).axes[0].get_images()
    sheet = np.asarray(image.get_array())
    factor = sheet.shape[1] // 41
    assert sheet[0, 0].tolist() == [0.5, 0.5, 0.5, 1]
    assert sheet[6 * factor, 0].tolist() == [1, 0.5, 0, 1]
    assert sheet[-1, -1, 3] == 0, "a place without a filter is drawn"


def test_distances_and_curves_show_their_numbers() -> None:
    figure: Any = pictures.distance(np.array([[1.0, 3.0], [2.0, 6.0], [5.0, 5.0]]))
    [axes] = figure.axes
    assert axes.collections[0].get_offsets().tolist() == [[0, 1], [0, 3], [1, 2], [1, 6], [2, 5], [2, 5]]
    assert axes.get_lines()[0].get_ydata().tolist() == [2, 4, 5]
    figure = pictures.curves(faithfulness(), "rollout")
    left, right = figure.axes
    assert left.get_lines()[0].get_ydata().tolist() == [60, 30, 10, 0, 0]
    assert right.get_lines()[0].get_xdata().tolist() == [0, 25, 50, 75, 100]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["rollout: 0.12", "random maps: 0.31"]


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def absent(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r'matplotlib is not installed. .* "opsin\[explain\]"'):
        pictures.draw(tmp_path / "why.png", PHOTO, [explanation()])
    with pytest.raises(MissingExtra, match=r"opsin\[explain\]"):
        pictures.overlay(PHOTO, replace(explanation(), score=0.5))
