"""Contact sheets: what is drawn where, and that no name or picture breaks them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin import sheets
from opsin.errors import ImageUnreadable
from opsin.sheets import Block, Cell, draw


def areas(path: Path, **colours: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Of each colour the places (row, column)."""
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    return {name: np.argwhere(np.abs(pixels - colour).sum(2) < 60) for name, colour in colours.items()}


def load(key: str) -> Image.Image:
    if "broken" in key:
        raise ImageUnreadable(f"{key}: gone.")
    return Image.new("RGB", (300, 200), key.split("/")[-1])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_cells_stand_side_by_side_and_blocks_below_each_other(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"sheet{suffix}"
    note = (("said of it", "#1f5fa8"), ("and " * 200 + "x" * 300, sheets.PALE))
    first = Block("One", "of seven", "#00ff00", [Cell(("d/red", "d/blue"), note), *[Cell(("d/red",), note)] * 5])
    draw(path, [first, Block("Two 照片", "broken", "#00ffff", [Cell(("d/broken 照片\udcff",), ())])], load)
    found = areas(path, red=(255, 0, 0), blue=(0, 0, 255), lime=(0, 255, 0), cyan=(0, 255, 255), cross=(198, 40, 40))
    one = 180 * 120
    assert [round(len(found[name]) / one) for name in ("red", "blue")] == [6, 1]
    assert found["red"][:, 0].min() == found["blue"][:, 0].min()
    assert found["red"][:, 0].max() - found["red"][:, 0].min() > 180  # seven pictures are two lines
    assert found["lime"][:, 0].max() < found["red"][:, 0].min()  # the bar is in the head
    assert found["red"][:, 0].max() < found["cyan"][:, 0].min() < found["cross"][:, 0].max()
    assert found["red"][:, 1].max() < 1240 - 30


def test_a_block_without_cells_is_its_head(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", [Block("None", "nothing to show", "#00ff00", [])], load)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size == (1240, 30 + 62 + 30)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='"a.gif" ends in ".gif". A contact sheet is a .png or a .jpg.'):
        draw(tmp_path / "a.gif", [], load)
    many = [Block("t", "m", "red", [Cell(("red", "red", "red", "red", "red", "red"), ())] * 320)]
    with pytest.raises(ValueError, match="the sheet would be 72,422 pixels high, and JPEG ends at 65,535"):
        draw(tmp_path / "a.jpg", many, lambda key: Image.new("RGB", (1, 1)))
    assert not list(tmp_path.iterdir())


def test_a_tiny_image_is_enlarged_by_whole_pixels() -> None:
    image = Image.new("RGB", (21, 10), "red")
    assert sheets._thumb(image).size == (84, 40)
    assert sheets._thumb(Image.new("RGB", (900, 60))).size == (180, 12)
    assert sheets._thumb(Image.new("RGB", (1, 9000))).size == (1, 180)
    assert sheets._thumb(Image.new("RGB", (150, 90))).size == (150, 90)


def test_shortened_names_keep_their_end() -> None:
    short = sheets._shorten("a/long/way/to/the/picture-0001.jpg", 120, 13)
    assert short.startswith("…") and short.endswith("picture-0001.jpg")
    assert sheets._shorten("a.jpg", 120, 13) == "a.jpg"
    assert sheets._folder(["a/b/c.jpg", "a/b/d/e.jpg", "a/bc.jpg"]) == "a/"
    assert sheets._folder(["a/b/c.jpg"]) == "a/b/"
    assert sheets._folder(["c.jpg", "d.jpg"]) == sheets._folder([]) == ""


def test_wrapped_text_ends_with_dots() -> None:
    lines = sheets._wrap("very long words " * 30 + "x" * 300, 180, 13)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert sheets._wrap("x" * 300, 180, 13)[0].endswith("…")
    assert sheets._wrap("two\nlines \udcff", 180, 13) == ["two�lines �"]
