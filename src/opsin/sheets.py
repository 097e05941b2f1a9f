"""Contact sheets: thumbnails in titled blocks, with what there is to say under each. Pillow alone draws them."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from opsin.errors import ImageError

PALE = "#6a737d"  # of what is said by the way
_WIDTH, _MARGIN, _GAP = 1240, 30, 20  # pixels, as all below
_THUMB = 180
_HEAD = 62  # of a block
_INK, _PAPER, _TILE, _FRAME, _CROSS = "#1b1f24", "#ffffff", "#eef0f2", "#c9ced4", "#c62828"
_MOST_LINES = 3  # of a note
# tried where a name needs more than Pillow's own font has; by file name, in the folders of the system
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "DejaVuSans.ttf",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """One picture, or several side by side, and what there is to say under them."""

    keys: tuple[str, ...]
    notes: tuple[tuple[str, str], ...]  # (text, colour)


@dataclass(frozen=True, slots=True)
class Block:
    """Cells under a title."""

    title: str
    meaning: str
    colour: str  # of the bar before the title
    cells: Sequence[Cell]


def draw(path: str | Path, blocks: Iterable[Block], load: Callable[[str], Image.Image]) -> None:
    """Draw a sheet, its blocks one below the other.

    Args:
        path: .png or .jpg.
        load: key → upright RGB image, `decode` where the keys are paths; an ImageError leaves an empty frame.
    Raises:
        ValueError: neither .png nor .jpg, or a sheet longer than JPEG takes.
        OSError: the file cannot be written.
    """
    path = check_format(path)
    blocks = list(blocks)
    folder = _folder([key for block in blocks for cell in block.cells for key in cell.keys])
    drawn = [_block(block, load, folder) for block in blocks]
    height = _MARGIN + sum(image.height + _MARGIN for image in drawn)
    if path.suffix.lower() != ".png" and height > 65_500:
        raise ValueError(
            f"the sheet would be {height:,} pixels high, and JPEG ends at 65,535. Draw fewer pictures, or name a .png."
        )
    sheet = Image.new("RGB", (_WIDTH, height), _PAPER)
    top = _MARGIN
    for image in drawn:
        sheet.paste(image, (0, top))
        top += image.height + _MARGIN
    sheet.save(path, quality=90)  # which PNG does not mind


def check_format(path: str | Path) -> Path:
    """
    Raises:
        ValueError: neither .png nor .jpg.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f'"{path.name}" ends in "{path.suffix}". A contact sheet is a .png or a .jpg.')
    return path


def plain(text: str) -> str:
    """On one line and in valid Unicode, whatever a file is called."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def _folder(keys: Sequence[str]) -> str:
    """What all keys have in front, up to a slash: it need not be written under each."""
    first, last = min(keys, default=""), max(keys, default="")
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind("/", 0, same) + 1]


def _block(block: Block, load: Callable[[str], Image.Image], folder: str) -> Image.Image:
    """Title and cells, line by line; a cell of two pictures takes two columns."""
    lines: list[list[Image.Image]] = [[]]
    for cell in (_cell(cell, load, folder) for cell in block.cells):
        if sum(c.width + _GAP for c in lines[-1]) + cell.width > _WIDTH - 2 * _MARGIN:
            lines.append([])
        lines[-1].append(cell)
    height = _HEAD + sum(max((cell.height for cell in line), default=0) + _GAP for line in lines) - _GAP
    image = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(image)
    pen.rectangle((_MARGIN, 2, _MARGIN + 5, 44), fill=block.colour)
    _write(pen, (_MARGIN + 18, 0), block.title, 22, _INK)
    _write(pen, (_MARGIN + 18, 28), block.meaning, 15, PALE)
    top = _HEAD
    for line in lines:
        left = _MARGIN
        for cell in line:
            image.paste(cell, (left, top))
            left += cell.width + _GAP
        top += max((cell.height for cell in line), default=0) + _GAP
    return image


def _cell(cell: Cell, load: Callable[[str], Image.Image], folder: str) -> Image.Image:
    width = len(cell.keys) * (_THUMB + _GAP) - _GAP
    notes = [(text.replace("×", "x"), colour) for text, colour in cell.notes]  # which Pillow's font does not have
    lines = [(line, text, colour) for text, colour in notes for line in _wrap(text, width, 13)]
    image = Image.new("RGB", (width, _THUMB + 26 + 17 * len(lines)), _PAPER)
    pen = ImageDraw.Draw(image)
    for column, key in enumerate(cell.keys):
        left = column * (_THUMB + _GAP)
        try:
            thumb = _thumb(load(key))
        except ImageError:
            pen.rectangle((left, 0, left + _THUMB - 1, _THUMB - 1), fill=_TILE, outline=_FRAME)
            middle = left + _THUMB // 2, _THUMB // 2
            for slope in (-1, 1):
                ends = (middle[0] - 22, middle[1] - 22 * slope, middle[0] + 22, middle[1] + 22 * slope)
                pen.line(ends, fill=_CROSS, width=5)
        else:
            pen.rectangle((left, 0, left + _THUMB - 1, _THUMB - 1), fill=_TILE)
            image.paste(thumb, (left + (_THUMB - thumb.width) // 2, (_THUMB - thumb.height) // 2))
        _write(pen, (left, _THUMB + 5), _shorten(plain(key.removeprefix(folder)), _THUMB, 13), 13, _INK)
    for number, (line, text, colour) in enumerate(lines):
        pen.text((0, _THUMB + 23 + 17 * number), line, colour, _font_for(text, 13))
    return image


def _thumb(image: Image.Image) -> Image.Image:
    """Within the tile; a tiny image enlarged by whole pixels."""
    scale = _THUMB / max(image.size)
    if scale >= 2:
        factor = min(int(scale), 4)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * min(scale, 1))), max(1, round(image.height * min(scale, 1))))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


@cache
def _font(size: int, wide: bool) -> Any:
    for name in _WIDE_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _font_for(text: str, size: int) -> Any:
    return _font(size, not text.translate(dict.fromkeys(map(ord, "‘’“”…·"))).isascii())


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str) -> None:
    pen.text(place, text, colour, _font_for(text, size))


def _shorten(text: str, width: int, size: int) -> str:
    """The end of a path says most: cut from the front until it fits."""
    font = _font_for(text, size)
    if font.getlength(text) <= width:
        return text
    return next((cut for start in range(len(text)) if font.getlength(cut := "…" + text[start:]) <= width), "")


def _wrap(text: str, width: int, size: int) -> list[str]:
    """Lines of at most `width` pixels, no more than `_MOST_LINES`."""
    lines: list[str] = []
    rest, font = plain(text).split(), _font_for(text, size)
    while rest and len(lines) < _MOST_LINES:
        count = 1
        while count < len(rest) and font.getlength(" ".join(rest[: count + 1])) <= width:
            count += 1
        line = " ".join(rest[:count])
        while font.getlength(line) > width:  # a single word, too long
            line = line[:-2] + "…"
        lines.append(line)
        rest = rest[count:]
    if rest:
        lines[-1] = lines[-1][:-1].rstrip() + "…"
    return lines
