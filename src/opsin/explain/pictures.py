"""Explanations → pictures: a map over its photo, and the figures of the ViT paper's appendix.

`overlay` and `glow` give images, `draw` a PNG of several maps beside their photo; `grid`, `similarity`, `filter_bank`,
`distance` and `curves` give a matplotlib figure, which `save` writes as PNG and `svg` turns into text for a page.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from opsin.errors import MissingExtra
from opsin.plots import BLUE, FAINT, GREY, INK, ORANGE, _figure, _fonts, _save, _short, _tidy, _width
from opsin.text import SPECIAL_TOKENS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from opsin.explain import Explanation, Faithfulness, TextExplanation

MAX_SIDE = 1024  # pixels of a picture with a map over it; larger photos are reduced
PANEL_SIDE = 560  # pixels of a picture beside others
MAX_CELLS = 56  # along a side, of a map among many; of finer ones the mean of several is shown
COLUMNS = 5  # pictures in a row of `draw`
MAX_NAME = 24  # Latin letters of a label in a title; a Chinese one takes two
ENDS = {False: ("matters least", "most"), True: ("against the label", "for it")}  # of the colours, by two signs
UNSEEN = (0.07, 0.07, 0.09, 0.72)  # RGBA

# of a figure on a page: variables that its style sheet sets, for light and dark
PAGE_COLOURS = {
    INK: "currentColor",
    GREY: "var(--muted)",
    FAINT: "var(--line)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
}

save = _save  # a figure → PNG, whole or not at all


def require() -> None:
    """
    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "explain") from None


# ── a map over its photo ─────────────────────────────────────────────────────────────────────────────────────────────


def glow(explanation: "Explanation", size: tuple[int, int]) -> Image.Image:
    """The map as a layer to lay over the photo, of 256 colours with alpha.

    Low values are a thin shade, high ones glow (inferno); of a map with two signs what speaks for the label glows
    warm, what speaks against it cold. What the model does not see is dark. Each map has a scale of its own, so that
    one extreme cell does not hide the others: from the 10th to the 99th percentile of its cells; with two signs, from
    zero.

    Args:
        size: (width, height) of the layer, with the proportions of the photo.
    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require()
    (width, height), (full_width, full_height) = size, explanation.size
    left, top, right, bottom = explanation.region
    x, y = width / full_width, height / full_height
    values = replace(explanation, size=size, region=(left * x, top * y, right * x, bottom * y)).on_image()
    low, high = span(explanation)
    level = np.rint(254 * np.clip((values - low) / (high - low), 0, 1))
    places = np.where(np.isfinite(level), np.nan_to_num(level), 255).astype(np.uint8)
    layer = Image.frombytes("P", size, places.tobytes())
    colours = np.concatenate([_colours(signed(explanation)), [UNSEEN]])
    layer.putpalette(np.rint(255 * colours).astype(np.uint8).tobytes(), "RGBA")
    return layer


@cache
def _colours(two_signs: bool) -> np.ndarray:
    """(255, 4) RGBA, 0 to 1, from the low end to the high one."""
    from matplotlib import colormaps

    strength = np.abs(np.linspace(-1, 1, 255)) if two_signs else np.linspace(0, 1, 255)
    colours = colormaps["inferno"](0.1 + 0.82 * strength)
    if two_signs:
        colours[:127] = colours[:127, [2, 1, 0, 3]]  # red for blue: a cold glow as light as the warm one
    colours[:, 3] = 0.2 + 0.52 * strength**0.9
    return colours


def span(explanation: "Explanation") -> tuple[float, float]:
    """Values at the two ends of the colours; the lower one is negative where the map has two signs."""
    cells = explanation.map.astype(np.float64)
    if signed(explanation):
        end = float(np.percentile(np.abs(cells), 99)) or 1.0
        return -end, end
    low, high = np.percentile(cells, [10, 99])
    if high - low <= 1e-6 * abs(high):  # all cells alike: nothing glows
        return float(low), float(low) + max(abs(float(low)), 1.0)
    return float(low), float(high)


def signed(explanation: "Explanation") -> bool:
    """Whether the map tells for from against: that of occlusion does."""
    return bool((explanation.map < 0).any())


def overlay(image: Image.Image, explanation: "Explanation", *, max_side: int = MAX_SIDE) -> Image.Image:
    """The photo with the map over it, RGB, its longer side at most `max_side` pixels.

    Args:
        image: the upright photo that was explained.
    Raises:
        ValueError: a photo of another size.
        MissingExtra: matplotlib is not installed.
    """
    if image.size != tuple(explanation.size):
        raise ValueError(
            f"the image is {image.width} × {image.height} pixels; the explanation is of one of "
            f"{explanation.size[0]} × {explanation.size[1]}. Give the image that was explained, upright."
        )
    photo = reduced(image, max_side)
    layer = glow(explanation, photo.size).convert("RGBA")
    return Image.alpha_composite(photo.convert("RGBA"), layer).convert("RGB")


def reduced(image: Image.Image, max_side: int) -> Image.Image:
    """RGB, the longer side at most `max_side` pixels, a sliver one pixel at least."""
    scale = min(1.0, max_side / max(image.size))
    if scale == 1:
        return image.convert("RGB")
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def peak(explanation: "Explanation") -> tuple[int, int] | None:
    """(x, y) in the original photo: the middle of the map's highest cell; None where all cells are alike."""
    if explanation.map.min() == explanation.map.max():
        return None
    row, column = np.unravel_index(int(explanation.map.argmax()), explanation.map.shape)
    left, top, right, bottom = explanation.region
    x = left + (column + 0.5) / explanation.map.shape[1] * (right - left)
    y = top + (row + 0.5) / explanation.map.shape[0] * (bottom - top)
    left, top, right, bottom = seen(explanation)
    return int(np.clip(x, left, right - 1)), int(np.clip(y, top, bottom - 1))


def seen(explanation: "Explanation") -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of what the model looks at, in pixels of the original."""
    left, top, right, bottom = explanation.region
    (x0, y0, x1, y1), (width, height) = explanation.seen, explanation.size
    return (
        max(left + x0 * (right - left), 0.0),
        max(top + y0 * (bottom - top), 0.0),
        min(left + x1 * (right - left), float(width)),
        min(top + y1 * (bottom - top), float(height)),
    )


def method_name(explanation: "Explanation") -> str:
    """`attention, layer 5, head 2`; without the numbers that it was not asked for."""
    name = explanation.method
    if explanation.layer is not None:
        name += f", layer {explanation.layer}"
    if explanation.head is not None:
        name += f", head {explanation.head}"
    return name


def draw(
    path: Path, image: Image.Image, explanations: Sequence["Explanation"], scores: Sequence["Faithfulness"] = ()
) -> None:
    """Write a PNG: the photo, and beside it each map over it, with titles, colour bar and faithfulness.

    Args:
        image: the upright photo that was explained, of any size.
        scores: as many as explanations, or none.
    Raises:
        ValueError: no explanations, another number of scores, or a photo of another size.
        MissingExtra: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if not explanations:
        raise ValueError("no explanations: there is nothing to draw.")
    if scores and len(scores) != len(explanations):
        raise ValueError(f"{len(scores)} faithfulness scores for {len(explanations)} explanations; one each is needed.")
    require()
    one = len({(each.target, each.label) for each in explanations}) == 1
    panels = [(reduced(image, PANEL_SIDE), headline(explanations[0]) if one else "photo", "")]
    for place, each in enumerate(explanations):
        title = method_name(each) if one else f"{headline(each)}\n{method_name(each)}"
        panels.append((overlay(image, each, max_side=PANEL_SIDE), title, _areas(scores[place]) if scores else ""))

    # inches; laid out by hand, so that pictures of any shape stand in rows
    wide, gap, margin = 3.0, 0.2, 0.1
    columns = min(len(panels), COLUMNS)
    high = min(max(wide * image.height / image.width, 0.4), 4.2)
    above, below, legend = (0.36 if one else 0.54), (0.46 if scores else 0.14), 0.5
    width = 2 * margin + columns * (wide + gap) - gap
    height = 2 * margin + -(-len(panels) // columns) * (above + high + below) + legend
    figure = _figure(width, height)
    figure.set_layout_engine("none")
    font: dict[str, Any] = {"parse_math": False, "fontfamily": _fonts()[0], "color": INK, "loc": "left"}
    for place, (picture, title, note) in enumerate(panels):
        left = margin + place % columns * (wide + gap)
        top = margin + place // columns * (above + high + below) + above
        axes = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height), anchor="NW")
        axes.set_axis_off()
        axes.imshow(picture, interpolation="antialiased")
        axes.set_title(title, fontsize=10.5, fontweight="bold" if one and not place else "normal", **font)
        figure.text(left / width, 1 - (top + high + 0.07) / height, note, va="top", color=GREY, fontsize=8.5,
                    linespacing=1.4)  # fmt: skip
    left, bottom = margin, margin + 0.18
    for two_signs in sorted({signed(each) for each in explanations}):
        axes = figure.add_axes((left / width, bottom / height, wide / width, 0.1 / height))
        _bar(axes, two_signs)
        left += wide + gap
    if scores:
        left = min(left, margin + (columns - 1) * (wide + gap))
        note = "deletion: lower is better\ninsertion: higher is better"
        figure.text(left / width, (bottom + 0.12) / height, note, va="top", color=GREY, fontsize=8, linespacing=1.4)
    _save(figure, path)


def _bar(axes: "Axes", two_signs: bool) -> None:
    axes.imshow(ramp(two_signs)[None], aspect="auto")
    axes.set_axis_off()
    for place, end in enumerate(ENDS[two_signs]):
        axes.text(
            place, -0.5, end, transform=axes.transAxes, ha=("left", "right")[place], va="top", color=GREY, fontsize=8
        )


def ramp(two_signs: bool) -> np.ndarray:
    """What the colours mean, as they are over a grey photo: (255, 3) uint8, from the low end to the high one."""
    colours = _colours(two_signs)
    over_grey = colours[:, 3:] * colours[:, :3] + (1 - colours[:, 3:]) * 0.75
    return np.rint(255 * over_grey).astype(np.uint8)


def headline(explanation: "Explanation") -> str:
    """`tabby, 61 %`: the label's first synonym, cut where it is long."""
    name = explanation.label.split(",")[0].strip() or explanation.label
    if _width(name) > MAX_NAME:
        while _width(name) >= MAX_NAME:
            name = name[:-1].rstrip()
        name += "…"
    return f"{_short([name], limit=len(name) or 1)[0]}, {percent(explanation.score)}"


def percent(share: float) -> str:
    """Whole percents; below ten, of one decimal."""
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def number(area: float) -> str:
    """Two digits: 0.31, 0.031, 0.0030."""
    return f"{area:.2f}" if area >= 0.0995 or area == 0 else f"{area:#.2g}"


def _areas(score: "Faithfulness") -> str:
    return (
        f"deletion {number(score.deletion_auc)}, of random maps {number(score.random_deletion_auc)}\n"
        f"insertion {number(score.insertion_auc)}, of random maps {number(score.random_insertion_auc)}"
    )


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def shades(explanation: "TextExplanation") -> np.ndarray:
    """(gaps, n) how strongly each token is shaded for each gap, 0 to 1.

    From the 10th to the 98th percentile of the tokens that are given; the gaps themselves are not shaded.
    """
    weights = explanation.by_gap().astype(np.float64)
    given = np.ones(weights.shape[1], bool)
    given[list(explanation.places)] = False
    if not given.any():
        return np.zeros_like(weights)
    low, high = (np.percentile(weights[:, given], at, axis=1, keepdims=True) for at in (10, 98))
    return np.where(given, np.clip((weights - low) / np.maximum(high - low, 1e-9), 0, 1), 0)


def best_words(explanation: "TextExplanation", gap: int, count: int = 5) -> list[tuple[str, float]]:
    """The words that a gap reads most, and their shares of its attention; gaps and special tokens are none."""
    weights = explanation.by_gap()[gap]
    words: list[tuple[str, float]] = []
    word, share = b"", 0.0
    for token, weight in zip((*explanation.tokens, " "), (*weights.tolist(), 0.0), strict=True):
        if token == " " or token in SPECIAL_TOKENS:
            if word:
                words.append((word.decode(errors="replace"), share))
            word, share = b"", 0.0
        else:
            word += token.encode() if len(token) == 1 else bytes([int(token[1:-1], 16)])  # <0xE4>
            share += weight
    return sorted(words, key=lambda each: -each[1])[:count]


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def svg(figure: "Figure", name: str) -> str:
    """The figure as an <svg> element for a page: without background, its ink the colour of the page's text.

    Args:
        name: of letters; begins the ids within, which several figures of one page must not share.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    FigureCanvasSVG(figure).print_figure(stream, format="svg", bbox_inches="tight", pad_inches=0.05)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    ids = {each: f"{name}{place}" for place, each in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', text)))}
    text = re.sub(r'(\bid="|url\(#|href="#)([^")]+)', lambda found: found[1] + ids.get(found[2], found[2]), text)
    for colour, instead in PAGE_COLOURS.items():
        text = text.replace(colour, instead)
    width = float(re.findall(r'viewBox="0 0 ([0-9.]+)', text)[0])
    return re.sub(r"<svg[^>]*>", lambda found: _sized(found[0], round(width * 4 / 3)), text, count=1).strip()


def _sized(tag: str, width: int) -> str:
    """At most so many CSS pixels wide, and as narrow as the page."""
    tag = re.sub(r' (width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", tag)
    return tag.replace("<svg", f'<svg style="max-width:{width}px"')


def grid(heads: np.ndarray) -> "Figure":
    """Attention of every layer and head to the places of the image, layers downwards; each map by a scale of its own.

    Args:
        heads: (layers, heads, h, w); a map of NaN, a head that there is not, is left blank.
    """
    require()
    step = -(-max(heads.shape[2:]) // MAX_CELLS)
    rows, columns = (length // step for length in heads.shape[2:])
    blocks = heads[:, :, : rows * step, : columns * step].reshape(*heads.shape[:2], rows, step, columns, step)
    maps = blocks.mean(axis=(3, 5), dtype=np.float64)
    there = np.isfinite(maps).all(axis=(2, 3), keepdims=True)
    low, high = (np.percentile(np.where(there, maps, 0), at, axis=(2, 3), keepdims=True) for at in (1, 99))
    maps = np.clip((maps - low) / np.maximum(high - low, 1e-12), 0, 1)  # NaN stays NaN
    layers, num_heads = maps.shape[:2]
    return _tiles(maps, "layer", "head", range(layers), range(num_heads), "inferno")


def similarity(values: np.ndarray) -> "Figure":
    """How alike the position embedding of each place is to those of all others: a map for each place, where it lies.

    Of more than 14 rows or columns of places some are shown, evenly spaced.

    Args:
        values: (h, w, h, w) cosine similarities.
    """
    require()
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, 14)).round().astype(int)) for n in values.shape[:2])
    shown = values[np.ix_(rows, columns)]
    return _tiles(shown, "row of the place", "column of the place", rows.tolist(), columns.tolist(), "viridis")


def filter_bank(filters: np.ndarray) -> "Figure":
    """What the first layer looks for in a patch: its main components, the strongest first, seven in a row.

    Args:
        filters: (count, p, p, 3), 0 to 1, where 0.5 is zero.
    """
    require()
    count, size = len(filters), filters.shape[1]
    rows = -(-count // 7)
    tiles = np.full((rows * 7, size, size, 3), np.nan)
    tiles[:count] = filters
    return _tiles(tiles.reshape(rows, 7, size, size, 3), "", "", [], [], None)


def _tiles(
    tiles: np.ndarray, row_name: str, column_name: str, rows: Sequence[Any], columns: Sequence[Any], colours: str | None
) -> "Figure":
    """A table of small pictures (R, C, h, w) or, in colour, (R, C, h, w, 3), as one picture with numbers along it."""
    from matplotlib import colormaps

    if colours is not None:
        low, high = np.nanmin(tiles), np.nanmax(tiles)
        tiles = colormaps[colours]((tiles - low) / max(high - low, 1e-12))  # NaN: transparent
    else:
        tiles = np.concatenate([np.nan_to_num(tiles), np.isfinite(tiles).all(-1, keepdims=True)], axis=-1)
    num_rows, num_columns, height, width = tiles.shape[:4]
    gap = max(1, max(height, width) // 10)
    sheet = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))).swapaxes(1, 2)
    sheet = sheet.reshape(num_rows * (height + gap), num_columns * (width + gap), 4)[:-gap, :-gap]
    side = min(5.4, 0.62 * max(num_columns, num_rows * sheet.shape[0] / sheet.shape[1]) + 0.6)
    wide = side if sheet.shape[1] >= sheet.shape[0] else max(side * sheet.shape[1] / sheet.shape[0], 2.2)
    figure = _figure(wide, wide * sheet.shape[0] / sheet.shape[1] + 0.5)
    axes = figure.add_subplot()
    factor = max(1, 700 // max(sheet.shape[:2]))  # whole pixels of a tile stay squares, however it is enlarged
    axes.imshow(
        sheet.repeat(factor, 0).repeat(factor, 1),
        extent=(0, sheet.shape[1], sheet.shape[0], 0),
        interpolation="antialiased",
    )
    _tidy(axes)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks([place * (width + gap) + width / 2 for place in range(len(columns))], columns)
    axes.set_yticks([place * (height + gap) + height / 2 for place in range(len(rows))], rows)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel(column_name, fontsize=9)
    axes.set_ylabel(row_name, fontsize=9)
    return figure


def distance(values: np.ndarray) -> "Figure":
    """How far heads look, by layer: a dot for each head (Dosovitskiy et al. 2021, figure 7, right).

    Args:
        values: (layers, heads), pixels of the model's input.
    """
    require()
    from matplotlib.ticker import MaxNLocator

    figure = _figure(5.2, 3.2)
    axes = figure.add_subplot()
    _tidy(axes, grid=True)
    layers, heads = values.shape
    axes.scatter(np.repeat(np.arange(layers), heads), values.ravel(), s=22, color=BLUE, alpha=0.75, linewidths=0)
    axes.plot(range(layers), values.mean(1), color=ORANGE, linewidth=1.6, label="mean of the heads")
    axes.set(xlabel="layer", ylabel="mean attention distance, pixels", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY)
    return figure


def curves(score: "Faithfulness", name: str) -> "Figure":
    """The label's probability while what matters most is taken away from the image first, and while it is put back.

    Args:
        name: of the map, in the legend.
    """
    require()
    figure = _figure(5.6, 3.0)
    panels: Any = figure.subplots(1, 2, sharey=True)
    shares = 100 * np.asarray(score.shares)
    for axes, title, values, area, random_area in (
        (panels[0], "deletion, lower is better", score.deletion, score.deletion_auc, score.random_deletion_auc),
        (panels[1], "insertion, higher is better", score.insertion, score.insertion_auc, score.random_insertion_auc),
    ):
        _tidy(axes, grid=True)
        values = 100 * np.asarray(values)
        axes.fill_between(shares, values, color=BLUE, alpha=0.13, linewidth=0)
        axes.plot(shares, values, color=BLUE, linewidth=1.8, label=f"{name}: {number(area)}")
        axes.axhline(100 * random_area, color=ORANGE, linewidth=1.4, linestyle="--",
                     label=f"random maps: {number(random_area)}")  # fmt: skip
        axes.set_title(title, fontsize=9, color=INK)
        axes.set(xlim=(0, 100), xlabel="of the image, %")
        axes.legend(frameon=False, fontsize=7.5, labelcolor=GREY, loc="upper left")
    top = 100 * max(score.deletion.max(), score.insertion.max(), score.random_deletion_auc, score.random_insertion_auc)
    panels[0].set(
        ylabel="probability of the label, %", ylim=(0, max(1.35 * top, 1e-3))
    )  # the legend is above the lines
    return figure
