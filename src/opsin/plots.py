"""Numbers → PNG: the course of a run, a confusion matrix, a reliability diagram, speeds beside one another.

Drawn through matplotlib's objects, never through pyplot: no window, no state that another thread could see.
"""

import os
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from opsin.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
INK, GREY, FAINT = "#222222", "#767676", "#d9d9d9"
BLUE, ORANGE, GREEN, PURPLE = "#2f6db3", "#d1741f", "#2d8a57", "#7a5aa6"  # told apart by the colour-blind too
LABELLED_CLASSES = 60  # as many names can be read along an axis
COUNTED_CLASSES = 20  # as many cells can hold their number
MAX_CELLS = 600  # along an axis; of more classes a cell shows the largest value of several
PAIRS = 24  # listed beside a matrix without names

# Chinese, Japanese and Korean names are drawn with the first of these that is installed
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)


class Bin(TypedDict):
    """An interval of confidences (low, high], and the predictions in it."""

    low: float
    high: float
    count: int
    confidence: float | None  # mean; None where the bin is empty
    accuracy: float | None


def curves(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The course of a run: loss, held-out accuracy, and learning rate with speed, above one another.

    Args:
        path: of the PNG.
        rows: of metrics.jsonl, in any order: `step`, and any of `loss`, `val_loss`, `top1`, `top5`, `map` (shares),
            `lr`, `images_per_s`. What is None or not finite is left out; of two rows with a step and a value the later
            one counts, as a resumed run writes them. A panel without values is not drawn.
    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require()
    series = {name: _series(rows, name) for name in ("loss", "val_loss", "top1", "top5", "map", "lr", "images_per_s")}
    groups = (("loss", "val_loss"), ("top1", "top5", "map"), ("lr", "images_per_s"))
    panels = [group for group in groups if any(len(series[name][0]) for name in group)]
    heights = [0.62 if "lr" in group else 1.0 for group in panels] or [1.0]
    figure = _figure(8.0, 1.0 + 2.7 * sum(heights))
    if not panels:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no step has been logged yet", ha="center", va="center", color=GREY)
        _save(figure, path)
        return
    stacked: Any = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, group in zip(stacked[:, 0], panels, strict=True):
        _tidy(axes, grid=True)
        drawn = {name: series[name] for name in group if len(series[name][0])}
        if "loss" in group:
            _loss(axes, drawn)
        elif "top1" in group:
            _accuracy(axes, drawn)
        else:
            _rates(axes, drawn)
    from matplotlib.ticker import EngFormatter, MaxNLocator

    bottom = stacked[-1, 0]
    steps = np.concatenate([x for x, _ in series.values()])
    if np.ptp(steps):
        bottom.set_xlim(steps.min(), steps.max() + 0.02 * np.ptp(steps))
    else:
        bottom.set_xlim(steps[0] - 1, steps[0] + 1)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    if steps.max() >= 10_000:
        bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.align_ylabels()
    _save(figure, path)


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, ascending, and values, finite."""
    values = {row["step"]: row[name] for row in rows if row.get("step") is not None and row.get(name) is not None}
    steps = np.array(sorted(values), dtype=np.float64)
    numbers = np.array([values[step] for step in sorted(values)], dtype=np.float64)
    return steps[np.isfinite(numbers)], numbers[np.isfinite(numbers)]


def _loss(axes: "Axes", drawn: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    lowest, highest = 0.0, 0.0
    if "loss" in drawn:
        steps, values = drawn["loss"]
        lowest, highest = float(values.min()), float(values.max())
        smooth = _smoothed(values)
        if len(values) >= 20:
            axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=BLUE, linewidth=1.6, label=f"training: {smooth[-1]:.4g}", **_dot(values))
    if "val_loss" in drawn:
        steps, values = drawn["val_loss"]
        lowest = min(lowest, float(values.min())) if "loss" in drawn else float(values.min())
        highest = max(highest, float(values.max()))
        label = f"held out: {values[-1]:.4g}, lowest {values.min():.4g}"
        axes.plot(steps, values, color=ORANGE, linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set_ylabel("loss")
    if lowest > 0 and highest > 30 * lowest:
        axes.set_yscale("log")
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _accuracy(axes: "Axes", drawn: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    looks = {"top1": ("top-1", GREEN), "top5": ("top-5", PURPLE), "map": ("mAP", GREEN)}
    for name, (steps, values) in drawn.items():
        label, colour = looks[name]
        label = f"{label}: {100 * values[-1]:.1f} %, highest {100 * values.max():.1f} %"
        axes.plot(steps, 100 * values, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set_ylabel("held out, %")
    axes.legend(frameon=False, loc="best", fontsize=9)


def _rates(axes: "Axes", drawn: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    if "lr" in drawn:
        steps, values = drawn["lr"]
        axes.plot(steps, values, color=INK, linewidth=1.4, **_dot(values))
        axes.set_ylabel("learning rate", color=INK)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        axes.set_ylim(bottom=0)
    if "images_per_s" in drawn:
        right: Any = axes.twinx() if "lr" in drawn else axes
        steps, values = drawn["images_per_s"]
        right.plot(steps, values, color=ORANGE, linewidth=1.0, alpha=0.8, **_dot(values))
        right.set_ylim(0, 1.15 * max(values.max(), 1e-9))
        right.set_ylabel("images/s")
        if right is not axes:
            _tidy(right)
            right.yaxis.label.set_color(ORANGE)
            right.spines["right"].set_visible(True)
            right.spines["right"].set_color(FAINT)
            right.tick_params(axis="y", colors=ORANGE)


def _dot(values: np.ndarray) -> dict[str, Any]:
    """A single value has no line."""
    return {"marker": "o", "markersize": 3.5} if len(values) == 1 else {}


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a fiftieth of the run around each value; narrow where the run begins, as losses fall there
    fast, one-sided where it ends, so that the last point is a mean too."""
    half = max(len(values) // 100, 2) if len(values) >= 20 else 0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, place)
    start, stop = place - reach, np.minimum(place + reach + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def confusion(path: Path, counts: np.ndarray, names: Sequence[str]) -> None:
    """What the images of each class were taken for, as shares of the class; beyond 60 classes the worst pairs by name.

    Args:
        path: of the PNG.
        counts: (K, K) images; the true class is the row.
        names: of the K classes; of "tabby, tabby cat" the first synonym is drawn.
    Raises:
        ValueError: counts that are not (K, K).
        MissingExtra: matplotlib is not installed.
    """
    if counts.shape != (len(names), len(names)) or not len(names):
        raise ValueError(f"counts have shape {counts.shape}; {len(names)} names need ({len(names)}, {len(names)}).")
    require()
    total, size = counts.sum(1), len(names)
    shares = np.where(total[:, None] > 0, counts / np.maximum(total, 1)[:, None], np.nan)
    shown = _short(names)
    right, images = int(np.trace(counts)), int(total.sum())
    title = f"{right:,} of {images:,} images right ({100 * right / max(images, 1):.1f} %)"
    if not total.all():
        title += "; grey: class without an image"
    if size <= LABELLED_CLASSES:
        _labelled(path, counts, shares, shown, title)
    else:
        _listed(path, counts, shares, shown, title)


def _labelled(path: Path, counts: np.ndarray, shares: np.ndarray, names: list[str], title: str) -> None:
    size = len(names)
    letters = 7.5 if size > COUNTED_CLASSES else 9
    margin = 0.9 + max(map(_width, names)) * letters / 72 * 0.62  # inches for the names
    side = max(3.0, size * (0.5 if size <= COUNTED_CLASSES else 0.18))
    figure = _figure(side + margin + 1.1, side + margin + 0.3)
    axes = figure.add_subplot()
    _matrix(figure, axes, shares, title, gamma=1.0 if size <= COUNTED_CLASSES else 0.5)
    axes.set_xticks(range(size), names, rotation=90 if max(map(_width, names)) > 3 else 0)
    axes.set_yticks(range(size), names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set(parse_math=False, fontsize=letters, fontfamily=_fonts()[0])
    if size <= COUNTED_CLASSES:
        small = 9 if counts.max() < 1000 else 6.5
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = INK if shares[row, column] > 0.55 else "white"
            text = f"{counts[row, column]}" if counts[row, column] < 100_000 else f"{counts[row, column]:.0e}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=small)
    _save(figure, path)


def _listed(path: Path, counts: np.ndarray, shares: np.ndarray, names: list[str], title: str) -> None:
    figure = _figure(13.2, 7.4)
    axes, beside = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.42, 1]})
    _matrix(figure, axes, _pooled(shares, MAX_CELLS), title, gamma=0.5, classes=len(names))
    beside.set_axis_off()
    beside.set_xlim(0, 1)
    beside.set_ylim(PAIRS + 2.2, -1.2)
    font: dict[str, Any] = {"parse_math": False, "fontfamily": _fonts()[0], "va": "center", "fontsize": 9}
    pairs = worst_pairs(counts, PAIRS)
    head = "most often confused: true class → prediction" if pairs else "no image was confused with another class"
    beside.text(0, -0.6, head, **(font | {"fontsize": 10}), color=INK)
    for place, (true, predicted, count) in enumerate(pairs):
        share = 100 * shares[true, predicted]
        beside.text(0, place + 0.8, f"{names[true]} → {names[predicted]}", **font, color=INK)
        beside.text(1, place + 0.8, f"{count} of {counts[true].sum()}, {share:.0f} %", **font, ha="right", color=GREY)
    _save(figure, path)


def worst_pairs(counts: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the commonest mistakes, most first."""
    true, predicted = np.nonzero(counts)
    wrong = true != predicted
    true, predicted = true[wrong], predicted[wrong]
    amount = counts[true, predicted]
    share = amount / counts.sum(1)[true]
    order = np.lexsort((predicted, true, -share, -amount))[:limit]
    return [(int(true[i]), int(predicted[i]), int(amount[i])) for i in order]


def _matrix(
    figure: "Figure", axes: "Axes", shares: np.ndarray, title: str, *, gamma: float, classes: int | None = None
) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    colours = colormaps["viridis"].with_extremes(bad=FAINT)
    norm = PowerNorm(gamma, 0, 1)  # below 1: a rare mistake among many classes stays visible
    extent = None if classes is None else (-0.5, classes - 0.5, classes - 0.5, -0.5)
    image = axes.imshow(shares, cmap=colours, norm=norm, interpolation="nearest", extent=extent)
    _tidy(axes)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=11, color=INK, pad=10)
    axes.set_xlabel("predicted class" if classes is None else f"predicted class, 0 to {classes - 1}")
    axes.set_ylabel("true class" if classes is None else f"true class, 0 to {classes - 1}")
    beside = axes.inset_axes((1.03, 0, 0.035, 1))  # as high as the matrix, whatever the layout makes of that
    bar = figure.colorbar(image, cax=beside, ticks=[0, 0.25, 0.5, 0.75, 1] if gamma == 1 else [0, 0.05, 0.25, 0.5, 1])
    bar.ax.set_yticklabels([f"{100 * tick:.0f} %" for tick in bar.get_ticks()])
    bar.ax.tick_params(labelsize=8, length=0, colors=GREY)
    bar.set_label("of the true class", fontsize=9, color=GREY)
    bar.outline.set_visible(False)


def _pooled(shares: np.ndarray, limit: int) -> np.ndarray:
    """The largest of neighbouring cells, at most `limit` a side: no mistake falls between two pixels."""
    step = -(-len(shares) // limit)
    if step == 1:
        return shares
    starts = np.arange(0, len(shares), step)
    filled = np.where(np.isnan(shares), -1.0, shares)
    pooled = np.maximum.reduceat(np.maximum.reduceat(filled, starts, axis=0), starts, axis=1)
    return np.where(pooled < 0, np.nan, pooled)


def reliability(path: Path, bins: Sequence[Bin], ece: float) -> None:
    """Accuracy over confidence, with the number of predictions in each bin below (Guo et al. 2017, figure 1).

    Args:
        path: of the PNG.
        bins: ascending and adjoining, as `opsin.evaluate.metrics` gives them.
        ece: expected calibration error, a share.
    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require()
    figure = _figure(5.6, 6.6)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
    low = np.array([100 * item["low"] for item in bins])
    width = np.array([100 * (item["high"] - item["low"]) for item in bins])
    count = np.array([item["count"] for item in bins])
    full = [i for i, item in enumerate(bins) if item["count"]]
    accuracy = np.array([100 * (bins[i]["accuracy"] or 0.0) for i in full])
    confidence = np.array([100 * (bins[i]["confidence"] or 0.0) for i in full])
    for axes in (upper, lower):
        _tidy(axes, grid=True)
    place: dict[str, Any] = {"x": low[full], "width": width[full], "align": "edge", "linewidth": 0.8}
    upper.bar(height=accuracy, color=BLUE, edgecolor="white", label="accuracy", **place)
    gap: dict[str, Any] = {"facecolor": "#f4dec9", "edgecolor": "#e3ac78", "hatch": "///"}
    upper.bar(height=confidence - accuracy, bottom=accuracy, label="gap to mean confidence", **gap, **place)
    upper.hlines(accuracy, low[full], low[full] + width[full], color=BLUE, linewidth=2.2)  # above confidence or below
    upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy, %")
    upper.legend(frameon=False, loc="upper left", fontsize=9)
    upper.set_title(f"expected calibration error {100 * ece:.1f} %", fontsize=11, color=INK, pad=10)
    lower.bar(low, 100 * count / max(count.sum(), 1), width, align="edge", color=GREY, edgecolor="white", linewidth=0.8)
    if count.sum():
        means = (count[full] @ confidence / count.sum(), count[full] @ accuracy / count.sum())
        for mean, colour, name in zip(means, (ORANGE, BLUE), ("confidence", "accuracy"), strict=True):
            lower.axvline(mean, color=colour, linewidth=1.6, label=f"mean {name} {mean:.1f} %")
        lower.legend(frameon=False, loc="upper left" if means[0] > 50 else "upper right", fontsize=8)
    lower.set(xlabel="confidence, %", ylabel="predictions, %")
    figure.align_ylabels()
    _save(figure, path)


def bars(path: Path, rows: Sequence[dict[str, Any]], *, title: str, baseline: str) -> None:
    """Speeds beside one another, grouped by precision: medians, whiskers from quartile to quartile, ratios at the ends.

    Args:
        path: of the PNG.
        rows: contenders as `opsin.bench.Report.as_dict` has them: `name`, `precision`, `images_per_s`,
            `images_per_s_quartiles`, `ratio`. Groups and bars keep their order. opsin's bars are blue, the plain
            model's paler, the others grey.
        title: model, batch and machine; may have several lines.
        baseline: what the ratios are to.
    Raises:
        ValueError: no rows.
        MissingExtra: matplotlib is not installed.
    """
    if not rows:
        raise ValueError("no contenders: there is nothing to draw.")
    require()
    groups = {precision: [row for row in rows if row["precision"] == precision] for precision in _precisions(rows)}
    figure = _figure(8.4, 1.5 + 0.34 * len(rows) + 0.24 * len(groups))
    axes = figure.add_subplot()
    _tidy(axes)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    longest = max(row["images_per_s_quartiles"][1] for row in rows)
    place, ticks = 0.0, []
    for precision, members in groups.items():
        axes.text(-0.005, place - 0.66, precision, transform=axes.get_yaxis_transform(), ha="right", va="center",
                  color=INK, fontsize=9, fontweight="bold")  # fmt: skip
        for row in members:
            low, high = row["images_per_s_quartiles"]
            own, plain = row["name"].startswith("opsin"), row["name"] == "opsin plain"
            colour = "#a9c3e2" if plain else BLUE if own else "#a6a6a6"
            axes.barh(place, row["images_per_s"], 0.72, color=colour)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.1, marker="|", markersize=6)
            end = max(high, row["images_per_s"]) + 0.012 * longest
            text = f"{_digits(row['images_per_s'])}   {_digits(row['ratio'])}×"
            weight = "bold" if own and not plain else "normal"
            axes.text(end, place, text, va="center", color=INK, fontsize=9, fontweight=weight)
            ticks.append((place, row["name"]))
            place += 1
        place += 0.7
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, 1.2 * longest), ylim=(place - 0.9, -1.1), xlabel=f"images/s, and × {baseline}")
    axes.set_title(title, fontsize=11, color=INK, pad=10, loc="left", parse_math=False)
    _save(figure, path)


def _precisions(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["precision"] for row in rows))


def _digits(value: float) -> str:
    """Three of them, or all before the point."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


# ── shared ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def require() -> None:
    """
    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtra("matplotlib", "train") from None


def _figure(width: float, height: float) -> "Figure":
    """Inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.11, h_pad=0.09)  # type: ignore[union-attr, call-arg]
    return figure


def _tidy(axes: "Axes", *, grid: bool = False) -> None:
    axes.set_axisbelow(True)
    if grid:
        axes.grid(color=FAINT, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(which="both", colors=GREY, labelsize=9, length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(10)


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            FigureCanvasAgg(figure).print_figure(file, dpi=DPI, format="png", bbox_inches="tight", pad_inches=0.12)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _short(names: Sequence[str], limit: int = 26) -> list[str]:
    """Names to draw: the first synonym, where no other class has the same one; cut, and without what no font holds."""
    held = _fonts()[1]
    first = [name.split(",")[0].strip() or name for name in names]
    uses = Counter(first)
    chosen = [short if uses[short] == 1 else name for short, name in zip(first, names, strict=True)]
    kept = ["".join(c if ord(c) in held else "\N{WHITE SQUARE}" for c in " ".join(name.split())) for name in chosen]
    return [name if len(name) <= limit else name[: limit - 1].rstrip() + "…" for name in kept]


def _width(name: str) -> int:
    """Of a name, in Latin letters: Chinese ones are twice as wide."""
    return sum(2 if ord(c) >= 0x2E80 else 1 for c in name)


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Families to draw names with, and the characters that they hold; others would be warned about at every turn."""
    from matplotlib import font_manager

    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(family for family in CJK_FONTS if family in installed)]
    held: set[int] = set()
    for family in families:
        held |= font_manager.get_font(font_manager.findfont(family)).get_charmap().keys()
    return families, frozenset(held)
