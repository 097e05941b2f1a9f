"""One HTML page that explains what a model says of a picture or a text: nothing is loaded from elsewhere."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from PIL import Image

from opsin import explain as maps
from opsin.explain import pictures
from opsin.preprocess import ImageSource, decode

if TYPE_CHECKING:
    from opsin.explain import Explanation, Faithfulness, TextExplanation
    from opsin.pipeline import Classifier
    from opsin.text import TextModel

CLASSES = 3  # the best, with a map each
GLOW_SIDE = 360  # pixels of a map, which the browser enlarges smoothly
METHOD_NOTES = {
    "relevance": "attention weighted by the gradient of the label: what speaks for this label",
    "rollout": "attention multiplied through all layers: where information comes from, whatever the label",
    "attention": "what one layer reads for its answer, whatever the label",
    "occlusion": "how much the label loses when a patch is covered: measured, not inferred",
}


def report(
    path: str | Path,
    classifier: "Classifier",
    image: ImageSource,
    *,
    name: str | None = None,
    target: int | str | None = None,
    method: str = "relevance",
    layer: int | None = None,
    head: int | None = None,
    on_part: Callable[[int, int], None] | None = None,
) -> tuple["Explanation", "Faithfulness"]:
    """Write one self-contained HTML page on what the model sees in a picture.

    On it: the best labels, a map for each of the best three, every method side by side with its faithfulness, and of a
    model that has them the attention of all heads, attention distances, position similarity and patch filters. It is
    readable in light and dark, on a phone, without scripts and without a network.

    Args:
        path: of the page.
        name: of the picture, on the page; its path without it.
        target, method, layer, head: of the map that the page begins with, as `explain` takes them.
        on_part: called with the parts that are done and the number of all.
    Returns:
        The map that the page begins with, and its faithfulness.
    Raises:
        MissingExtra: matplotlib is not installed.
        ImageError: the image cannot be read.
        ValueError: what `explain` refuses: no such label or method.
        NoHead: the checkpoint has no classifier.
        OSError: the page cannot be written.
    """
    pictures.require()
    photo = decode(image, max_pixels=classifier.max_pixels)
    name = name or (os.fspath(image) if isinstance(image, str | os.PathLike) else "a picture")
    page = _Page(classifier, photo, name, on_part or (lambda done, total: None))
    main, score = page.fill(target=target, method=method, layer=layer, head=head)
    _write(Path(path), title=f"{pictures.headline(main)} – {Path(name).name}", body="\n".join(page.parts))
    return main, score


def text_report(path: str | Path, model: "TextModel", text: str) -> "TextExplanation":
    """Write one self-contained HTML page on what the gaps of a text were filled from.

    Returns:
        What is on it.
    Raises:
        TextError: as `TextModel.fill_mask`.
        OSError: the page cannot be written.
    """
    found = maps.explain_text(model, text)
    parts = [f"<header><h1>{_text(found.filled)}</h1><p class=muted>{_text(text)}</p></header>"]
    for gap, (answer, shades) in enumerate(zip(found.answers, pictures.shades(found), strict=True)):
        words = "".join(
            f"<li><span>{_text(word)}<b>{pictures.percent(share)}</b></span>"
            f'<i style="--share:{100 * share:.1f}%"></i></li>'
            for word, share in pictures.best_words(found, gap)
        )
        parts.append(
            f"<section><h2>What “{_text(answer)}” was read from</h2>"
            f'<pre class="chart bytes">{_shaded(found, gap, shades.tolist())}</pre>'
            f"<p class=muted>Words by their share of the attention:</p><ol class=bars>{words}</ol></section>"
        )
    parts.append(
        "<p class=muted>Attention from the gap back to the bytes, through all layers (rollout): where information "
        f"comes from, not what it is used for. Model: {_text(model.source.name)}.</p>"
    )
    _write(Path(path), title=found.filled, body="\n".join(parts))
    return found


def _shaded(found: "TextExplanation", gap: int, shades: Sequence[float]) -> str:
    """The tokens, each behind its shade; in place of each gap its answer, underlined where it is this one."""
    first = {found.places[rows[0]]: number for number, rows in enumerate(found.gaps)}
    pieces = []
    for place, (token, shade) in enumerate(zip(found.tokens, shades, strict=True)):
        if place in first:
            answer = _text(found.answers[first[place]])
            pieces.append(f"<ins>{answer}</ins>" if first[place] == gap else answer)
        elif place not in found.places:
            pieces.append(
                f'<mark style="--w:{100 * shade:.0f}">{_text(token)}</mark>' if shade > 0.02 else _text(token)
            )
    return "".join(pieces)


class _Page:
    """The sections of a page, in order."""

    def __init__(
        self, classifier: "Classifier", photo: Image.Image, name: str, on_part: Callable[[int, int], None]
    ) -> None:
        self.classifier, self.photo, self.name = classifier, photo, name
        self.shown = pictures.reduced(photo, pictures.MAX_SIDE)
        self.parts: list[str] = []
        self._on_part, self._done, self._all = on_part, 0, 2 * len(maps.METHODS) + CLASSES

    def fill(self, *, method: str, **asked: Any) -> tuple["Explanation", "Faithfulness"]:
        best = self.classifier(self.photo, top_k=5)
        main = self._explain(method=method, **asked)
        every = {main.method: main}
        for each in maps.METHODS:
            if each not in every:
                try:
                    every[each] = self._explain(target=main.target, method=each)
                except ValueError:  # a model without attention that is known: the page has what there is
                    self._advance()
        several = [every[each] for each in maps.METHODS if each in every]
        scores = self._faithfulness(several)
        self._head(main, best)
        self._classes(every.get("relevance", every["occlusion"]), best)
        self._methods(main, several, scores)
        self._inside()
        self._foot()
        return main, scores[method]

    # ── computing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _explain(self, **options: Any) -> "Explanation":
        found = maps.explain(self.classifier, self.photo, **options)
        self._advance()
        return found

    def _faithfulness(self, several: Sequence["Explanation"]) -> dict[str, "Faithfulness"]:
        """By method; the random maps are the same for all, so they are run once."""
        scores: dict[str, Faithfulness] = {}
        for each in several:
            score = maps.faithfulness(self.classifier, self.photo, each, random_maps=0 if scores else 8)
            if scores:
                first = next(iter(scores.values()))
                score = replace(
                    score,
                    random_deletion_auc=first.random_deletion_auc,
                    random_insertion_auc=first.random_insertion_auc,
                )
            scores[each.method] = score
            self._advance()
        return scores

    def _advance(self) -> None:
        self._done += 1
        self._on_part(self._done, self._all)

    # ── sections ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _head(self, main: "Explanation", best: Sequence[dict[str, Any]]) -> None:
        peak = pictures.peak(main)
        highest = "the same everywhere: it says nothing of this label"
        if peak is not None:
            highest = f"highest at {peak[0]}, {peak[1]} (pixels from the left and from the top)"
        bars = "".join(
            f"<li><span>{self._label(row['label'])}<b>{pictures.percent(row['score'])}</b></span>"
            f'<i style="--share:{100 * row["score"]:.1f}%"></i></li>'
            for row in best
        )
        self.parts.append(
            f"<header><h1>{self._label(main.label)}, {pictures.percent(main.score)}</h1>"
            f'<div class="muted">{_text(self.name)}</div></header>'
            f'<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>{self._image(self.shown)}'
            "</defs></svg>"
            f'<div class="first"><div>{self._map(main)}'
            '<label class="slider" hidden>photo <input type="range" min="0" max="100" value="100" '
            'aria-label="opacity of the maps, percent"> map</label>'
            f"{_scale(pictures.signed(main))}</div>"
            f'<div><ol class="bars">{bars}</ol>'
            f"<p>The map is of <b>{escape(pictures.method_name(main))}</b>: {METHOD_NOTES[main.method]}. It is "
            f"{highest}.{self._unseen(main)}</p></div></div>"
        )

    def _unseen(self, main: "Explanation") -> str:
        left, top, right, bottom = pictures.seen(main)
        share = 1 - (right - left) * (bottom - top) / (main.size[0] * main.size[1])
        return "" if share < 0.005 else f" The dark {100 * share:.0f} % are cropped away: the model never sees them."

    def _classes(self, first: "Explanation", best: Sequence[dict[str, Any]]) -> None:
        """By a method that tells labels apart; `first` is of it."""
        several = [
            first if row["index"] == first.target else self._explain(target=row["index"], method=first.method)
            for row in best[:CLASSES]
        ]
        figures = "".join(
            f"<figure>{self._map(each)}<figcaption>{self._label(each.label)}, {pictures.percent(each.score)}"
            "</figcaption></figure>"
            for each in several
        )
        self._section("What speaks for each label", f"By {first.method}; each map has its own scale.", figures)

    def _methods(
        self, main: "Explanation", several: Sequence["Explanation"], scores: dict[str, "Faithfulness"]
    ) -> None:
        figures = "".join(
            f"<figure>{self._map(each)}<figcaption>{escape(pictures.method_name(each))}<small>{METHOD_NOTES[each.method]}</small>"
            "</figcaption></figure>"
            for each in several
        )
        signs = sorted({pictures.signed(each) for each in several})
        scales = "".join(f"<div>{_scale(two_signs)}</div>" for two_signs in signs)
        self._section(
            "Every method", f"For {self._label(main.label)}.", figures + scales if signs == [False, True] else figures
        )
        rows = ""
        for each in several:
            score = scores[each.method]
            cells = _cell(score.deletion_auc, score.deletion_auc < score.random_deletion_auc)
            cells += _cell(score.random_deletion_auc)
            cells += _cell(score.insertion_auc, score.insertion_auc > score.random_insertion_auc)
            cells += _cell(score.random_insertion_auc)
            rows += f"<tr><td>{escape(each.method)}</td>{cells}</tr>"
        self._section(
            "Is it true?",
            "What a map calls important is taken away from the picture first (deletion), or put back first "
            "(insertion), and the model is asked again each time. A faithful map makes the label fall fast and rise "
            "fast; a random one is the measure. Figures are areas under the curves.",
            '<div class="two">',
            _chart(pictures.curves(scores[main.method], main.method), "c", "curves of deletion and insertion"),
            "<div><table><tr><th>map</th><th>deletion</th><th>random</th><th>insertion</th><th>random</th></tr>"
            f"{rows}</table><p class=muted>Blue: better than random.</p></div></div>",
            row=False,
        )

    def _inside(self) -> None:
        model = self.classifier.model
        self.parts.append('<div class="two">')
        for place, (title, note, what, draw) in enumerate(
            (
                ("Attention, head by head", "What each head of each layer reads of this picture.",
                 lambda: maps.heads(self.classifier, self.photo), pictures.grid),
                ("How far heads look", "Mean distance between a place and those that it reads, on this picture.",
                 lambda: maps.attention_distance(self.classifier, [self.photo]), pictures.distance),
                ("Positions", "How alike the position embedding of each place is to all others: bright is alike.",
                 lambda: maps.position_similarity(model), pictures.similarity),
                ("Patch filters", "The main components of what the first layer looks for in a patch.",
                 lambda: maps.filters(model, min(28, getattr(model.config, "embed_dim", 28))), pictures.filter_bank),
            )
        ):  # fmt: skip
            try:
                chart = _chart(draw(what()), f"i{place}-", title)
            except (ValueError, TypeError) as error:
                self._section(title, f"Left out: {_text(str(error))}", row=False)
            else:
                self._section(title, note, chart, row=False)
        self.parts.append("</div>")

    def _foot(self) -> None:
        source, (width, height) = self.classifier.source, self.photo.size
        from opsin import __version__

        rows, columns = self.classifier.image_size
        facts = {
            "model": source.name + (f" at {source.revision}" if source.revision else ""),
            "sha256": source.sha256,
            "input": f"{width} × {height} pixels, taken as {columns} × {rows}",
            "preprocessing": self.classifier.preprocess.hash(),
            "made by": f"opsin {__version__}",
        }
        lines = "".join(f"<dt>{name}</dt><dd>{_text(str(value))}</dd>" for name, value in facts.items() if value)
        self._section("What made this page", "", f"<dl>{lines}</dl>", row=False)

    # ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _section(self, title: str, note: str, *content: str, row: bool = True) -> None:
        inner = "".join(content)
        inner = f'<div class="row">{inner}</div>' if row else inner
        self.parts.append(f"<section><h2>{title}</h2><p class=muted>{note}</p>{inner}</section>")

    def _label(self, label: str) -> str:
        return f'<span lang="zh">{_text(label)}</span>' if self.classifier.lang == "zh" else _text(label)

    def _map(self, explanation: "Explanation") -> str:
        """The photo, which the page holds once, and the map over it."""
        width, height = self.shown.size
        small = pictures.reduced(self.shown, GLOW_SIDE).size
        layer = _data_url(pictures.glow(explanation, small), "png")
        title = f"{explanation.label}: map by {pictures.method_name(explanation)}"
        return (
            f'<svg class="map" viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">'
            f'<use href="#photo"/><image class="glow" width="{width}" height="{height}" '
            f'preserveAspectRatio="none" href="{layer}"/></svg>'
        )

    def _image(self, photo: Image.Image) -> str:
        return f'<image id="photo" width="{photo.width}" height="{photo.height}" href="{_data_url(photo, "jpeg")}"/>'


def _scale(two_signs: bool) -> str:
    colours = pictures.ramp(two_signs)
    steps = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours[:: len(colours) // 16])
    low, high = pictures.ENDS[two_signs]
    return (
        f'<div class="scale" style="background:linear-gradient(90deg, {steps})"></div>'
        f'<div class="ends"><span>{low}</span><span>{high}</span></div>'
    )


def _cell(area: float, better: bool = False) -> str:
    text = pictures.number(area)
    return f"<td><b>{text}</b></td>" if better else f"<td>{text}</td>"


def _chart(figure: Any, name: str, title: str) -> str:
    return f'<div class="chart" role="img" aria-label="{_text(title)}">{pictures.svg(figure, name)}</div>'


def _data_url(image: Image.Image, kind: str) -> str:
    data = io.BytesIO()
    image.save(data, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _text(text: str) -> str:
    """For a page in UTF-8, whatever a file or a label is called."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _write(path: Path, *, title: str, body: str, lang: str = "en") -> None:
    """Whole or not at all."""
    from opsin import __version__

    page = Template((files("opsin.explain") / "page.html").read_text(encoding="utf-8"))
    text = page.substitute(lang=lang, version=__version__, title=_text(title), body=body)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
