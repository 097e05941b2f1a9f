"""The page: whole, self-contained, safe from names, and complete for each kind of model."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opsin
from opsin.checkpoints import Checkpoint, Source
from opsin.errors import NoHead, NoMask, NotAnImage
from opsin.explain import METHODS, TextExplanation, attention, pictures
from opsin.explain.report import report, text_report
from opsin.labels import Labels
from opsin.models.perceiver_io import TextPerceiver, TextPerceiverConfig
from opsin.pipeline import Classifier
from opsin.text import TextModel

HOSTILE = "<script>alert(1)</script>\"'&<img src=x>"


EMPTY = {"meta", "input", "use", "image", "path", "rect"}  # tags that nothing closes


class Page(HTMLParser):
    """Tags, headings, what is linked, and whether every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.langs: list[str] = []
        self.headings: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.links += [values[name] for name in ("href", "src", "xlink:href", "srcset", "action") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        self.langs += [values["lang"]] if "lang" in values else []
        assert not any(name.startswith("on") for name in values), "an event handler in the markup"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            return
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        self.words += data


def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert all(link.startswith(("#", "data:image/")) for link in page.links), "something is loaded from elsewhere"
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= {*page.ids}
    assert "$" not in re.sub(r"data:[^\"]*", "", text), "a placeholder is left"
    return page


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 255, (33, 47, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_page_of_a_vit_has_everything(classifier: Classifier, photo: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    main, score = report(tmp_path / "why.html", classifier, photo, on_part=lambda *part: seen.append(part))
    page = read(tmp_path / "why.html")
    best = classifier(photo)
    assert page.headings == [
        f"{best[0]['label']}, {pictures.percent(best[0]['score'])}",
        "What speaks for each label", "Every method", "Is it true?", "Attention, head by head", "How far heads look",
        "Positions", "Patch filters", "What made this page",
    ]  # fmt: skip
    assert (main.label, main.method) == (best[0]["label"], "relevance")
    assert page.tags.count("image") >= 1 + 1 + 3 + len(METHODS)  # the photo once, a layer for each map
    assert page.tags.count("script") == 1
    assert "Left out" not in page.words
    for row in best:
        assert row["label"] in page.words
    for method in METHODS:
        assert method in page.words
    for value in (score.deletion_auc, score.random_insertion_auc):
        assert pictures.number(value) in page.words
    assert f"{47} × {33} pixels, taken as 32 × 32" in page.words
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] <= seen[-1][1]
    assert [file.name for file in tmp_path.glob("*why*")] == ["why.html"]


def test_the_page_begins_with_what_was_asked_for(classifier: Classifier, photo: Path, tmp_path: Path) -> None:
    asked = {"target": "class 2", "method": "attention", "layer": 1, "head": 0}
    main, _ = report(tmp_path / "why.html", classifier, photo, name="a name", **asked)  # type: ignore[arg-type]
    assert (main.target, main.layer, main.head) == (2, 1, 0)
    page = read(tmp_path / "why.html")
    assert page.headings[0].startswith("class 2, ")
    assert "The map is of attention, layer 1, head 0" in page.words
    assert "a name" in page.words
    assert "By relevance; each map has its own scale." in page.words
    with pytest.raises(ValueError, match='no class "class 9"'):
        report(tmp_path / "other.html", classifier, photo, target="class 9")
    assert not (tmp_path / "other.html").exists()


def test_a_map_of_nothing_has_no_place(
    classifier: Classifier, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "relevance", lambda *_: np.zeros((2, 2)))
    report(tmp_path / "why.html", classifier, photo)
    text = (tmp_path / "why.html").read_text(encoding="utf-8")
    assert "It is the same everywhere: it says nothing of this label." in text
    assert "It is highest" not in text


def test_names_of_files_and_labels_are_text(noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    labels = Labels.from_names([f"{HOSTILE}{i}" for i in range(7)])
    classifier = Classifier(replace(noisy_checkpoint, labels=labels), dtype="fp32")
    photo = tmp_path / (HOSTILE.replace("/", "∕") + "\udcff\n.png")
    Image.new("RGB", (40, 30), "red").save(photo)
    report(tmp_path / "why.html", classifier, photo)
    page = read(tmp_path / "why.html")
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert HOSTILE in page.words
    assert "<img src=x>\N{REPLACEMENT CHARACTER}" in page.words


def test_chinese_labels_are_marked_as_such(photo: Path, tmp_path: Path, noisy_checkpoint: Checkpoint) -> None:
    labels = Labels(tuple(f"class {i}" for i in range(7)), None, ("猫", "狗", "鸟", "鱼", "虎", "马", "牛"))
    classifier = Classifier(replace(noisy_checkpoint, labels=labels), dtype="fp32", lang="zh")
    main, _ = report(tmp_path / "why.html", classifier, photo)
    page = read(tmp_path / "why.html")
    assert page.langs[0] == "en"
    assert set(page.langs[1:]) == {"zh"}
    assert main.label in "猫狗鸟鱼虎马牛"
    assert page.words.count(main.label) >= 4


def test_a_perceiver_has_no_filters_and_no_distances(photos: Path, tmp_path: Path) -> None:
    report(tmp_path / "why.html", opsin.load("opsin/perceiver-tiny", dtype="fp32"), photos / "coffee.png")
    page = read(tmp_path / "why.html")
    assert page.words.count("Left out: ") == 2
    assert "Left out: filters are those of a ViT" in page.words
    assert "Left out: attention_distance is for a ViT" in page.words
    assert page.headings[0] == "espresso, 80 %"
    assert "are cropped away: the model never sees them" in page.words


def test_a_model_without_known_attention_is_explained_by_occlusion(
    classifier: Classifier, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = classifier.model.config
            self.inner = classifier.model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.inner(pixels)

    monkeypatch.setattr(classifier, "model", Other())
    with pytest.raises(ValueError, match='method="occlusion" works for any model'):
        report(tmp_path / "why.html", classifier, photo)
    main, _ = report(tmp_path / "why.html", classifier, photo, method="occlusion")
    assert main.method == "occlusion"
    page = read(tmp_path / "why.html")
    assert "rollout" not in page.words
    assert page.words.count("Left out: ") == 4


def test_what_cannot_be_explained(noisy_checkpoint: Checkpoint, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    classifier = Classifier(noisy_checkpoint, dtype="fp32")
    with pytest.raises(NotAnImage):
        report(tmp_path / "why.html", classifier, tmp_path / "notes.txt")
    headless = Classifier(replace(noisy_checkpoint, labels=None), dtype="fp32")
    with pytest.raises(NoHead):
        report(tmp_path / "why.html", headless, photo)
    assert not list(tmp_path.glob("*why*"))


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def text_model() -> TextModel:
    config = TextPerceiverConfig(
        num_latents=5, latent_dim=12, layers_per_block=2, num_heads=2, num_cross_heads=2, qk_dim=6, v_dim=14,
        embed_dim=10, max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = TextPerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return TextModel(Checkpoint(model.eval(), None, None, Source("test/noise", None, "", "opsin")))


def test_a_page_of_a_text(text_model: TextModel, tmp_path: Path) -> None:
    found = text_report(tmp_path / "why.html", text_model, "a <b>bold</b> 中[MASK:3] & one[MASK].")
    page = read(tmp_path / "why.html")
    assert page.headings[0] == found.filled
    assert page.tags.count("ins") == 2
    assert page.tags.count("h2") == 2
    assert "a <b>bold</b> 中[MASK:3] & one[MASK]." in page.words
    assert page.tags.count("mark") > 4
    with pytest.raises(NoMask):
        text_report(tmp_path / "other.html", text_model, "nothing to fill")


def explained() -> TextExplanation:
    weights = np.array([[0.1, 0.2, 0.05, 0.0, 0.3, 0.3, 0.05]], np.float32)
    return TextExplanation(
        tokens=("[CLS]", "h", "i", " ", "<0xC3>", "<0xA9>", "[MASK]"), places=(6,), gaps=((0,),), answers=("x",),
        filled="hi éx", weights=weights,
    )  # fmt: skip


def test_words_are_put_together_from_bytes() -> None:
    words = pictures.best_words(explained(), 0)
    assert [word for word, _ in words] == ["é", "hi"]
    assert [share for _, share in words] == pytest.approx([0.6, 0.25])


def test_shades_leave_gaps_out() -> None:
    [shades] = pictures.shades(explained())
    assert shades[6] == 0
    assert shades.argmax() == 4
    assert shades.max() == 1
    assert shades.min() == 0
    only = replace(explained(), tokens=("[MASK]",), places=(0,), weights=np.ones((1, 1), np.float32))
    assert pictures.shades(only).tolist() == [[0]]
