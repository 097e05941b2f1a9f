"""The page, in a real browser: what a person does with it, and what it then shows."""

import base64
import contextlib
import io
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from opsin import checkpoints
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig
from opsin.serve.page import FOLDER, TYPES

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
NAMES = ("tabby, tabby cat", "espresso", "rocket, projectile", "otter", "lamp", "bridge", "plum")
CLASSIFY = re.compile(r"/classify\?")
NAMES_ZH = ("虎斑猫", "浓缩咖啡", "火箭", "水獭", "灯", "桥", "李子")

Open = Callable[..., Any]


# ── without a browser ────────────────────────────────────────────────────────────────────────────────────────────────


def test_files(client: httpx.Client) -> None:
    for path, file in (("/", "index.html"), *((f"/static/{file}", file) for file in TYPES)):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, (FOLDER / file).read_bytes())
        assert answer.headers["content-type"] == TYPES[file]
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob: data:;")
        again = client.get(path, headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("name", ["page.py", "..%2Fpage.py", "%2e%2e%2finspect.py", "app.js.map", ""])
def test_no_other_file(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/static/{name}")
    assert answer.status_code == 404
    assert "def " not in answer.text


def test_message_names_the_files(client: httpx.Client) -> None:
    answer = client.get("/static/logo.png")
    assert answer.json()["error"] == 'no file "logo.png". The page has index.html, style.css, app.js.'


def test_nothing_is_asked_of_another_host_and_nothing_is_inline() -> None:
    page, style, script = ((FOLDER / file).read_text() for file in TYPES)
    for text in (page, style, script):
        assert set(re.findall(r"https?://[\w./-]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r'\s(style|on\w+)="', page)
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write\b|\beval\(", script)


# ── a browser ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")  # Playwright's event loop runs in this thread until it is closed
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the page is not tested"
    )
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there: the page is not tested. Install it: apt-get install chromium")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A ViT that crops; a Perceiver; one that always says "lamp"; one without labels."""
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("page")
    shape = ViTConfig(
        image_size=(32, 32), patch_size=8, embed_dim=36, num_layers=2, num_heads=3, mlp_dim=22, num_classes=7
    )
    latent = ImagePerceiverConfig(
        image_size=(32, 32), num_latents=3, latent_dim=12, num_blocks=2, layers_per_block=1, num_heads=2, num_bands=1,
        max_resolution=(2, 2), embed_dim=4, num_classes=7,
    )  # fmt: skip
    lamp, mute = ViT(shape), ViT(replace(shape, num_classes=0))
    nets = {"vit": ViT(shape), "latent": ImagePerceiver(latent), "lamp": lamp, "mute": mute}
    for name, net in nets.items():
        for parameter in net.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
        if name == "lamp":
            lamp.head.bias.data[4] = 1000.0  # type: ignore[union-attr]
        crop = PreprocessConfig(size=32, crop_size=(32, 32))
        checkpoints.write(folder / name, net, crop, None if name == "mute" else Labels(NAMES, None, NAMES_ZH))
    return tuple(f"org/{name}={folder / name}" for name in nets)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures, 96 × 48 and 40 × 60, and one file that is none, whose name is markup."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(1)
    for name, (width, height) in {"wide.png": (96, 48), "high.png": (40, 60)}.items():
        coarse = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / name)
    (folder / "<img src=x onerror=alert(1)>.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return [folder / "wide.png", folder / "high.png", folder / "<img src=x onerror=alert(1)>.png"]


@pytest.fixture
def url(serve: Callable[..., str], models: tuple[str, ...]) -> str:
    return serve(models=models)


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """`visit(url, **context)` → the page. In the end it must have asked no one else and had no complaint."""
    with contextlib.ExitStack() as stack:

        def visit(url: str, **options: Any) -> Any:
            context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1200, "height": 900}} | options)
            stack.callback(context.close)
            page = context.new_page()
            complaints: list[str] = []
            page.on("console", lambda said: complaints.extend([said.text] if said.type in ("error", "warning") else []))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))

            def check() -> None:
                # the browser itself notes every answer that is an error
                assert [text for text in complaints if not text.startswith("Failed to load resource")] == []
                assert [each for each in asked if not each.startswith((url, "blob:", "data:"))] == []

            stack.callback(check)
            page.goto(url)
            page.wait_for_selector("#model option, #key:not([hidden]), #problem:not([hidden])", state="attached")
            return page

        yield visit


def until(is_so: Callable[[], Any]) -> Any:
    """What becomes true; Playwright's own waiting would need `eval`, which the page forbids."""
    deadline = time.monotonic() + 20
    while not (found := is_so()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def labels_of(url: str, photo: Path, **query: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{url}/classify", params=query, files={"file": photo.read_bytes()})
    found: list[dict[str, Any]] = answer.json()["results"][0]["topk"]
    return found


def add(page: Any, *photos: Path) -> None:
    """Choose files, and wait for what the cards then say."""
    page.set_input_files("#files", list(photos))
    count = len(photos)
    until(lambda: page.locator(".latency, .answer .problem").count() == count)


def pixels(page: Any, canvas: str = ".frame canvas") -> np.ndarray:
    """(H, W, 4) uint8 of a canvas."""
    url = page.locator(canvas).first.evaluate("canvas => canvas.toDataURL()")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def slide(page: Any, name: str, value: int) -> None:
    page.locator(name).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }", str(value)
    )


def test_several_pictures_of_which_one_is_broken(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    add(page, *photos)
    cards = page.locator(".card")
    assert cards.count() == 3
    for place, photo in enumerate(photos[:2]):
        expected = labels_of(url, photo, top_k=5)
        assert cards.nth(place).locator("h3").inner_text().startswith(photo.name)
        rows = cards.nth(place).locator(".bars li")
        assert rows.count() == 5
        for row, best in zip(rows.all(), expected, strict=True):
            assert row.locator(".name").get_attribute("title") == best["label"]
            assert row.locator(".name").inner_text().startswith(best["label"].split(",")[0])
            assert row.locator(".percent").inner_text() == f"{100 * best['score']:.1f}%"
        bar = rows.first.locator("i").evaluate("bar => bar.style.getPropertyValue('--share')")
        assert float(bar.rstrip("%")) == pytest.approx(100 * expected[0]["score"], rel=1e-3)
        assert re.fullmatch(r"[\d.]+ ms round trip.*", cards.nth(place).locator(".latency").inner_text())
    broken = httpx.post(f"{url}/classify", files={"file": photos[2].read_bytes()})
    assert broken.status_code == 422
    assert cards.nth(2).locator(".problem").text_content() == broken.json()["error"]
    assert cards.nth(2).locator("h3").inner_text() == photos[2].name
    assert page.locator("img[src=x]").count() == 0
    spoken = page.locator("#said").inner_text()
    assert photos[2].name in spoken
    assert NAMES[labels_of(url, photos[0])[0]["index"]].split(",")[0] in spoken

    cards.nth(2).locator("header button").click()
    assert cards.count() == 2
    page.click("#clear")
    assert cards.count() == 0
    assert page.evaluate("document.activeElement.id") == "choose"


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_paste_and_drop(visit: Open, url: str, photos: list[Path], way: str) -> None:
    page = visit(url)
    page.evaluate(
        """([way, base64]) => {
            const bytes = Uint8Array.from(atob(base64), byte => byte.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], 'image.png', {type: 'image/png'}));
            document.body.dispatchEvent(way === 'paste'
                ? new ClipboardEvent('paste', {clipboardData: carried, bubbles: true, cancelable: true})
                : new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true}));
        }""",
        [way, base64.b64encode(photos[0].read_bytes()).decode()],
    )
    until(lambda: page.locator(".latency").count() == 1)
    assert (
        page.locator(".card h3").inner_text().split("\n")[0].startswith("pasted-1.png" if way == "paste" else "image")
    )
    expected = labels_of(url, photos[0])[0]["label"]
    assert page.locator(".bars .name").first.get_attribute("title") == expected


def test_attention(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    asked: list[str] = []
    page.on("request", lambda request: asked.extend([request.url] if "/explain" in request.url else []))
    add(page, photos[0])
    assert page.locator(".frame canvas").is_hidden()
    page.check("#attention")
    until(lambda: page.locator(".frame canvas").is_visible())

    mean = pixels(page)
    assert mean.shape == (48, 96, 4)
    for crop in (mean[:, :24], mean[:, 72:]):  # what the model does not see
        assert (crop == [0, 0, 0, 140]).all()
    assert np.ptp(mean[:, 24:72, :3]) > 50
    answer = httpx.post(f"{url}/explain", content=photos[0].read_bytes()).json()
    maps = np.frombuffer(base64.b64decode(answer["maps"]), np.uint8).reshape(2, 3, 4, 4)
    slide(page, "#head-0", 2)
    alpha = pixels(page)[6::12, 30:72:12, 3].astype(int)  # at the centres of the cells
    assert np.unravel_index(alpha.argmax(), (4, 4)) == np.unravel_index(maps[1, 1].argmax(), (4, 4))
    assert np.corrcoef(alpha.ravel(), maps[1, 1].ravel())[0, 1] > 0.9

    head = pixels(page)
    assert (head != mean).any()
    slide(page, "#layer-0", 0)
    layer = pixels(page)
    assert (layer != head).any()
    assert page.locator("#layer-0").get_attribute("aria-valuetext") == "1 of 2"
    assert page.locator("#head-0").get_attribute("aria-valuetext") == "2 of 3"
    slide(page, "#strength", 20)
    assert pixels(page)[:, 24:72, 3].max() < layer[:, 24:72, 3].min() + 20
    assert len(asked) == 1
    page.uncheck("#attention")
    assert page.locator(".frame canvas").is_hidden()
    page.check("#attention")
    until(lambda: page.locator(".frame canvas").is_visible())
    assert len(asked) == 1


def test_attention_of_a_perceiver(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    page.select_option("#model", "org/latent")
    page.check("#attention")
    assert page.locator("#looks small").inner_text() == "appears with the first picture"
    add(page, photos[0])
    until(lambda: page.locator(".frame canvas").is_visible())
    slider = page.locator("#layer-0")
    assert slider.get_attribute("aria-valuetext") == "cross-attention"
    assert page.locator("#head-0").is_disabled()  # its cross-attention has one head
    cross = pixels(page)
    slide(page, "#layer-0", 2)
    assert slider.get_attribute("aria-valuetext") == "self 2 of 2"
    assert page.locator("#head-0").get_attribute("max") == "2"
    assert (pixels(page) != cross).any()


def test_compare(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    page.select_option("#beside", "org/lamp")
    page.set_input_files("#files", photos[:2])
    until(lambda: page.locator(".latency").count() == 4)
    for place, photo in enumerate(photos[:2]):
        ours, theirs = (labels_of(url, photo, model=model) for model in ("org/vit", "org/lamp"))
        assert theirs[0]["label"] == "lamp"
        card = page.locator(".card").nth(place)
        assert card.locator("h4").all_inner_texts() == ["org/vit", "org/lamp"]
        agree = ours[0]["label"] == "lamp"
        first = ours[0]["label"].split(",")[0]
        expected = "Both say lamp" if agree else f"They differ: {first} or lamp"
        assert card.locator(".verdict").inner_text() == expected
        shared = {best["label"] for best in ours} & {best["label"] for best in theirs}
        only = card.locator(".bars li:has(.only) .name").evaluate_all("names => names.map(name => name.title)")
        assert set(only) == {best["label"] for best in (*ours, *theirs)} - shared
        point = card.locator(".bars").nth(1).locator(".more").first.inner_text()
        twin = {best["label"]: best["score"] for best in ours}
        differences = [round(100 * (best["score"] - twin[best["label"]])) for best in theirs if best["label"] in twin]
        assert point == f"{next(each for each in differences if each):+d}".replace("-", "−")
    page.select_option("#beside", "")
    until(lambda: page.locator(".view").count() == 2)
    assert page.locator(".verdict:visible").count() == 0


def test_map(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    add(page, photos[0])
    until(lambda: page.locator(".point").count() == 1)
    page.set_input_files("#files", photos[1:])
    until(lambda: page.locator(".point").count() == 2)  # the third has no embedding
    first, second = page.locator(".point").all()
    one, other = (each.bounding_box() for each in (first, second))
    assert abs(one["x"] - other["x"]) > 300
    assert abs(one["y"] - other["y"]) < 1 + abs(one["x"] - other["x"])
    data = [f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}" for photo in photos[:2]]
    vectors = [
        np.array(each["embedding"])
        for each in httpx.post(f"{url}/v1/embeddings", json={"model": "org/vit", "input": data}).json()["data"]
    ]
    cosine = vectors[0] @ vectors[1] / np.linalg.norm(vectors[0]) / np.linalg.norm(vectors[1])
    second.focus()
    tip = second.locator("span")
    assert tip.is_visible()
    assert tip.inner_text() == f"high.png · most like wide.png ({cosine:.2f})"
    second.click()
    assert page.evaluate("document.activeElement.querySelector('h3').title") == "high.png"
    page.select_option("#beside", "org/latent")
    until(lambda: page.locator(".point").count() == 4)
    page.locator(".card header button").first.click()
    until(lambda: page.locator(".point").count() == 2)


def test_model_without_labels(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    page.select_option("#model", "org/mute")
    page.set_input_files("#files", photos[:2])
    until(lambda: page.locator(".point").count() == 2)
    assert page.locator(".answer .wait").first.inner_text().startswith("This model gives embeddings and no labels")


def test_main_directions_are_those_of_pca(visit: Open, url: str) -> None:
    page = visit(url)
    vectors = np.random.default_rng(0).standard_normal((11, 5)) * [3, 1, 7, 2, 1]
    run = "async ([vectors, before]) => (await import('./static/app.js')).mainDirections(vectors, before)"
    found = np.array(page.evaluate(run, [vectors.tolist(), []]))
    centred = vectors - vectors.mean(axis=0)
    left, lengths, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * lengths[:2]
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, atol=1e-3)
    flipped = np.array(page.evaluate(run, [vectors.tolist(), (-found).tolist()]))
    np.testing.assert_allclose(flipped, -found, atol=1e-6)
    for same in ([[1, 2, 3]], [[1, 2, 3]] * 4):
        assert page.evaluate(run, [same, []]) == [[0, 0]] * len(same)
    two = np.array(page.evaluate(run, [[[0, 3], [4, 0]], []]))
    np.testing.assert_allclose(np.abs(two), [[2.5, 0], [2.5, 0]], atol=1e-9)


def test_language(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    add(page, photos[0])
    page.check("#attention")
    page.click("#language")
    expected = labels_of(url, photos[0], lang="zh")[0]["label"]
    assert expected in NAMES_ZH
    until(lambda: page.locator(".bars .name").first.get_attribute("title") == expected)
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert page.locator("#choose").inner_text() == "选择图片"
    assert page.locator("#language").inner_text() == "English"
    assert "lang=zh" in page.locator("#code").inner_text()
    page.reload()
    assert page.locator("#choose").inner_text() == "选择图片"
    assert visit(url, locale="zh-CN").locator("#choose").inner_text() == "选择图片"


def test_every_word_is_there_in_both_languages(visit: Open, url: str) -> None:
    page = visit(url)
    keys, used = page.evaluate(
        """async () => {
            const {WORDS} = await import('./static/app.js');
            const used = [...document.querySelectorAll('[data-t], [data-label]')];
            return [Object.values(WORDS).map(words => Object.keys(words)),
                    used.map(element => element.dataset.t ?? element.dataset.label)];
        }"""
    )
    assert keys[0] == keys[1]
    assert set(used) <= set(keys[0])
    script = (FOLDER / "app.js").read_text()
    said = set(re.findall(r"\bt\('(\w+)'", script)) | set(used)
    assert said | {"snapshot", "pasted"} == set(keys[0])


def luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, or of the color() that Chromium gives for others. Source: WCAG 2.2."""
    values = np.array([float(each) for each in re.findall(r"[\d.]+", colour)[:3]]) / (255 if "rgb" in colour else 1)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit: Open, url: str, scheme: str) -> None:
    page = visit(url, color_scheme=scheme)
    assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.1) == (scheme == "dark")
    pairs = [(text, ground, 4.5) for text in ("ink", "muted", "accent", "bad") for ground in ("page", "card")]
    pairs += [("on-accent", "accent", 4.5), ("accent", "faint", 4.5), ("muted", "sunk", 4.5), ("edge", "card", 3)]
    for text, ground, least in pairs:
        one, other = page.evaluate(
            """names => names.map(name => {
                const probe = document.createElement('i');
                probe.style.color = `var(--${name})`;
                document.body.append(probe);
                const colour = getComputedStyle(probe).color;
                probe.remove();
                return colour;
            })""",
            [text, ground],
        )
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= least, (text, ground)


def test_theme_is_kept(visit: Open, url: str) -> None:
    page = visit(url, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    dark = page.evaluate(ground)
    assert luminance(dark) < 0.1 < luminance(light)
    page.reload()
    assert page.evaluate(ground) == dark


def test_every_control_has_a_name_and_the_phone_no_sideways_scrolling(
    visit: Open, url: str, photos: list[Path]
) -> None:
    page = visit(url, viewport={"width": 390, "height": 844})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.select_option("#beside", "org/latent")
    page.check("#attention")
    page.set_input_files("#files", photos)
    until(lambda: page.locator(".latency").count() == 4)
    until(lambda: page.locator(".point").count() == 4)
    until(lambda: page.locator("#looks input").count() == 5)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input:not([type=file]), [role]')].filter(element =>
            !(element.ariaLabel || element.getAttribute('aria-labelledby') || element.labels?.[0]?.textContent.trim()
              || element.textContent.trim() || element.id === 'said' || element.id === 'problem')
        ).map(element => element.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("kind", ["curl", "hub", "requests"])
def test_code_is_copied_and_runs(
    visit: Open,
    url: str,
    photos: list[Path],
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
    page.select_option("#model", "org/lamp")
    page.click(f"#tab-{kind}")
    page.click("#copy")
    until(lambda: page.locator("#copy").inner_text() == "Copied")
    code = page.evaluate("navigator.clipboard.readText()")
    assert code == page.locator("#code code").text_content()
    (tmp_path / "photo.jpg").write_bytes(photos[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    if kind == "curl":
        said = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True).stdout
    else:
        pytest.importorskip({"hub": "huggingface_hub"}.get(kind, kind))
        exec(code, {})
        said = capsys.readouterr().out
    assert "lamp" in said


def test_tabs_by_keyboard(visit: Open, url: str) -> None:
    page = visit(url)
    page.focus("#tab-curl")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.id") == "tab-requests"
    assert page.locator("#code").inner_text().startswith("import requests")
    assert page.locator("[role=tab][aria-selected=true]").count() == 1


@pytest.mark.parametrize("status", [429, 503])
def test_later(visit: Open, url: str, photos: list[Path], status: int) -> None:
    page = visit(url)
    best = [{"label": "plum", "score": 0.625, "index": 6}]
    answers = [
        {"status": status, "headers": {"Retry-After": "30"}, "json": {"error": "Full <b>house</b>."}},
        {"headers": {"Server-Timing": "app;dur=12.5"}, "json": {"results": [{"ok": True, "topk": best}]}},
    ]
    page.route(CLASSIFY, lambda route: route.fulfill(**answers.pop(0)))
    page.set_input_files("#files", photos[0])
    until(lambda: page.locator(".wait + button").count() == 1)
    said = page.locator(".wait").inner_text()
    assert re.fullmatch(r"Full <b>house</b>\. Trying again in (30|29) s\.", said)
    until(lambda: page.locator(".wait").inner_text() != said)  # it counts
    page.click("text=Try now")
    until(lambda: page.locator(".latency").count() == 1)
    assert page.locator(".latency").inner_text().endswith(" ms round trip, 13 ms in the server")
    assert page.locator(".bars li").inner_text().split() == ["plum", "62.5%"]
    assert answers == []


def test_a_server_that_is_gone(visit: Open, url: str, photos: list[Path]) -> None:
    page = visit(url)
    page.route(CLASSIFY, lambda route: route.abort())
    add(page, photos[0])
    assert page.locator(".answer .problem").inner_text() == "The server does not answer. Is it still running?"
    page.unroute(CLASSIFY)
    page.click(".answer button")
    until(lambda: page.locator(".latency").count() == 1)


def test_key(serve: Callable[..., str], visit: Open, models: tuple[str, ...], photos: list[Path]) -> None:
    url = serve(models=models, api_keys=("s3cret",))
    page = visit(url)
    until(lambda: page.locator("#key").is_visible())
    page.fill("#key-field", "wrong")
    page.keyboard.press("Enter")
    until(lambda: page.locator("#key").is_visible() and page.locator("#key-field").input_value() == "")
    page.fill("#key-field", "s3cret")
    page.keyboard.press("Enter")
    until(lambda: page.locator("#model option").count() == 4)
    assert page.locator("#key").is_hidden()
    add(page, photos[0])
    assert page.locator(".bars li").count() == 5
    assert page.evaluate("sessionStorage.getItem('opsin-key')") == "s3cret"
    assert page.evaluate("JSON.stringify(localStorage)") == "{}"
    assert "s3cret" not in page.content()
    assert "$OPSIN_API_KEY" in page.locator("#code").inner_text()


def test_camera(visit: Open, url: str) -> None:
    page = visit(url)
    page.click("#camera")
    until(lambda: page.locator("#booth .main").is_enabled())
    page.click("#booth .main")
    until(lambda: page.locator(".latency").count() == 1)
    page.click("#booth [data-t=done]")
    assert page.locator("#booth").is_hidden()
    until(lambda: page.evaluate("document.querySelector('video').srcObject === null"))
    assert page.locator(".card h3").inner_text().startswith("camera-1.jpg")


def test_attention_that_was_turned_off_while_it_was_computed_is_not_drawn(
    visit: Open, url: str, photos: list[Path]
) -> None:
    page = visit(url)
    held: list[Any] = []
    page.route("**/explain?**", lambda route: held.append(route))
    add(page, photos[0])
    with page.expect_request("**/explain?**"):
        page.check("#attention")
    page.uncheck("#attention")
    with page.expect_response("**/explain?**"):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert page.locator(".frame canvas").is_hidden()
    page.check("#attention")
    until(lambda: page.locator(".frame canvas").is_visible())
    assert len(held) == 1
