"""`opsin doctor`: each kind of finding on images made for it, and nothing on images that are in order."""

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mutations import broken_files
from opsin import doctor
from opsin.data.samples import Samples
from opsin.doctor import KINDS, Finding, contact_sheet, examine
from opsin.errors import ImageUnreadable
from opsin.labels import Labels
from opsin.preprocess import IMAGE_EXTENSIONS, decode


class InMemory(Samples):
    def __init__(
        self,
        files: dict[str, bytes],
        targets: Sequence[object],
        names: Sequence[str] = ("cat", "dog"),
        held_out: Sequence[bool] | None = None,
        *,
        multi_label: bool = False,
    ) -> None:
        labels = Labels(tuple(names), multi_label=multi_label)
        super().__init__(np.array(targets), labels, None if held_out is None else np.array(held_out))
        self.files = files

    def key(self, index: int) -> str:
        return list(self.files)[index]

    def source(self, index: int) -> bytes:
        data = self.files[self.key(index)]
        if not data:
            raise ImageUnreadable("the archive is gone.")
        return data

    def identity(self) -> str:
        return "0"


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(seed: int, size: tuple[int, int] = (67, 53)) -> Image.Image:
    """A picture of large soft spots, as unlike that of another seed as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def found(report: doctor.Report, kind: str) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(finding.key, finding.detail, finding.related) for finding in report.findings if finding.kind == kind]


def write(folder: Path, **files: bytes) -> list[str]:
    """Files under the names of the arguments, `__` for the dot."""
    paths = []
    for name, data in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(data)
        paths.append(str(path))
    return paths


def test_photographs_in_order_give_no_finding(photos: Path) -> None:
    paths = sorted(str(path) for path in photos.glob("*.[jp]*g"))
    seen: list[str] = []
    report = examine(paths, on_image=seen.append, workers=3)
    assert len(paths) == 3
    assert seen == paths
    assert (report.images, report.findings, report.counts) == (3, (), {})
    assert (report.held_out, report.classes, report.balance) == (None, None, None)
    assert report.to_markdown() == "# 3 images, 0 findings\n\n"


def test_every_broken_file_is_named_with_what_decode_says(tmp_path: Path) -> None:
    paths = [str(path) for path in broken_files(tmp_path, 60, seed=5)]
    unreadable = {}
    for path in paths:
        try:
            decode(path)
        except doctor.ImageError as error:
            unreadable[path] = f"{error.kind}: {error}"
    report = examine(paths)
    assert {key: detail for key, detail, _ in found(report, "unreadable")} == unreadable
    assert len(unreadable) > 10
    assert report.images == 60


def test_a_source_that_cannot_be_reached_is_a_finding_too() -> None:
    report = examine(InMemory({"a": b"", "b": encode(noise(0))}, [0, 1]))
    assert found(report, "unreadable") == [("a", "unreadable: the archive is gone.", ())]


def test_max_pixels() -> None:
    (finding,) = examine(InMemory({"a.png": encode(noise(0))}, [0]), max_pixels=3000).findings[:1]
    assert finding.kind == "unreadable"
    assert finding.detail.startswith("too_large: image of")


def test_exact_duplicates(tmp_path: Path) -> None:
    one, two = encode(noise(1)), encode(noise(2))
    paths = write(tmp_path, a__png=one, b__png=two, c__png=one, d__png=one)
    report = examine(paths)
    assert found(report, "duplicate") == [(paths[0], "the same bytes", (paths[2], paths[3]))]
    assert report.counts == {"duplicate": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda image: encode(image, "JPEG", quality=40),
        lambda image: encode(image, "WEBP", quality=60),
        lambda image: encode(image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)),
        lambda image: encode(image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC), "BMP"),
        lambda image: encode(image.point(lambda value: min(255, int(value * 1.05)))),
        lambda image: encode(image.convert("L")),
    ],
    ids=["jpeg", "webp", "half", "twice", "brighter", "grey"],
)
def test_a_photograph_saved_anew_is_a_near_duplicate(
    photos: Path, tmp_path: Path, change: Callable[[Image.Image], bytes]
) -> None:
    originals = [str(photos / name) for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    copies = []
    for path in originals:
        copies.append(str(tmp_path / Path(path).stem))
        Path(copies[-1]).write_bytes(change(decode(path)))
    report = examine([*originals, *copies])
    pairs = zip(originals, copies, strict=True)
    assert found(report, "near_duplicate") == [(path, "the same picture", (copy,)) for path, copy in pairs]
    assert not found(report, "duplicate")


def test_an_upright_copy_of_a_turned_photograph_is_found() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image = noise(3, (300, 200))
    files = {"a.jpg": encode(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned), "b.png": encode(image)}
    report = examine(InMemory(files, [0, 0]))
    assert found(report, "turned") == [("a.jpg", "EXIF orientation 6: stored on its side", ())]
    assert found(report, "near_duplicate") == [("a.jpg", "the same picture", ("b.png",))]


def test_plain_colours_are_told_apart_by_their_pixels() -> None:
    colours = ["white", "black", "#fefefe", "red", "#8f8f8f"]
    files = {f"{colour}.png": encode(Image.new("RGB", (40, 40), colour)) for colour in colours}
    files["red again.bmp"] = encode(Image.new("RGB", (40, 40), "red"), "BMP")
    files["red wide.bmp"] = encode(Image.new("RGB", (50, 32), "red"), "BMP")
    report = examine(InMemory(files, [0] * 7))
    assert found(report, "near_duplicate") == [("red.png", "the same picture", ("red again.bmp",))]


def test_pictures_of_one_layout_are_not_duplicates() -> None:
    """Different things on the same white ground: equal in most bits of any hash."""
    files = {}
    for number in range(40):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(noise(100 + number, (32, 28)), (16, 18))
        files[f"{number}.png"] = encode(image)
    assert examine(InMemory(files, [0] * 40, ["cat"])).counts == {}


def test_hundreds_of_copies_are_one_group() -> None:
    image = np.asarray(noise(4)).copy()
    files = {}
    for number in range(300):
        image[number // 53, number % 53] ^= 1  # other bytes each time
        files[f"{number}.bmp"] = encode(Image.fromarray(image), "BMP")
    ((key, _, related),) = found(examine(InMemory(files, [0] * 300)), "near_duplicate")
    assert [key, *related] == list(files)


def test_near_pairs_are_those_of_comparing_all() -> None:
    grids = [np.rint(doctor._greys(noise(seed))).astype(np.uint8) for seed in range(60)]
    rng = np.random.default_rng(0)
    for seed in range(0, 60, 3):  # a little noise, as of another codec
        grids.append(np.clip(grids[seed] + rng.integers(-1, 2, (16, 18)), 0, 255).astype(np.uint8))
    greys = np.stack(grids)
    expected = {
        (i, j) for i in range(80) for j in range(i + 1, 80) if doctor.alike(greys[i : i + 1], greys[j : j + 1])[0]
    }
    assert set(doctor._near_pairs(greys)) == expected
    assert len(expected) == 20


def test_near_pairs_sorted_in_several_shares_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    greys = np.stack([np.rint(doctor._greys(noise(seed % 10))).astype(np.uint8) for seed in range(20)])
    monkeypatch.setattr(doctor, "SORTED", 20)  # 65 shares, few of which see a given pair
    assert set(doctor._near_pairs(greys)) == {(i, i + 10) for i in range(10)}


def test_pictures_of_one_hash_are_told_apart_by_their_greys() -> None:
    """Two pictures whose neighbours compare alike everywhere, as a motorcycle's before white do with another's."""
    slope = np.tile(np.linspace(20, 200, 18), (16, 1))
    other = slope.copy()
    other[6:10] += 35
    greys = np.rint(np.stack([slope, other, np.clip(slope * 1.04, 0, 255)])).astype(np.uint8)
    codes, _ = doctor._hashes(greys)
    assert len(set(codes.tolist())) == 1
    assert list(doctor.alike(greys[[0, 0, 1]], greys[[1, 2, 2]])) == [False, True, False]
    assert set(doctor._near_pairs(greys)) == {(0, 2)}
    assert not doctor.alike(greys[:1], greys[:1] + np.uint8(40))[0]  # as well correlated, but much brighter


def test_tiny_and_thin() -> None:
    files = {
        "a.png": encode(noise(1, (31, 47))),
        "b.png": encode(noise(2, (32, 160))),
        "c.png": encode(noise(3, (161, 32))),
    }
    report = examine(InMemory(files, [0] * 3))
    assert found(report, "tiny") == [("a.png", "31 × 47 pixels", ())]
    assert found(report, "thin") == [("c.png", "161 × 32 pixels, 5.0 to 1", ())]


def test_unusual_modes() -> None:
    image = noise(1)
    sixteen = np.arange(60 * 60, dtype=np.uint16).reshape(60, 60) * 18
    palette, seen_through = noise(9).quantize(16), noise(10).quantize(16)
    files = {
        "rgb.png": encode(noise(0)),
        "cmyk.jpg": encode(image.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(noise(2).convert("L"), "JPEG"),
        "alpha.png": encode(noise(3).convert("RGBA")),
        "sixteen.png": encode(Image.fromarray(sixteen)),
        "palette.png": encode(palette),
        "transparent.png": encode(seen_through, transparency=3),
        "bits.png": encode(noise(6).convert("1")),
        "film.webp": encode(noise(7), "WEBP", save_all=True, append_images=[noise(8)], lossless=True),
        "pages.tif": encode(noise(11), "TIFF", save_all=True, append_images=[noise(12)]),
    }
    assert {key: detail for key, detail, _ in found(examine(InMemory(files, [0] * 10)), "mode")} == {
        "cmyk.jpg": "CMYK",
        "grey.jpg": "greyscale",
        "alpha.png": "alpha",
        "sixteen.png": "16 bits a channel",
        "palette.png": "palette",
        "transparent.png": "palette, with a transparent colour",
        "bits.png": "black and white, 1 bit",
        "film.webp": "animated",
        "pages.tif": "several pages",
    }


def test_sixteen_bit_colour() -> None:
    """Pillow writes none, and reads it as 8 bits."""
    rows = b"".join(b"\0" + np.random.default_rng(y).bytes(40 * 6) for y in range(36))
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 40, 36, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    assert found(examine(InMemory({"a.png": png}, [0])), "mode") == [("a.png", "16 bits a channel", ())]


def test_extension_that_contradicts_the_bytes() -> None:
    files = {
        "a.jpg": encode(noise(1)),
        "b.JPEG": encode(noise(2), "JPEG"),
        "c.tar::d/e.png": encode(noise(3), "WEBP"),
        "no extension": encode(noise(4)),
        "f.parquet": encode(noise(5)),
    }
    assert found(examine(InMemory(files, [0] * 5)), "extension") == [
        ("a.jpg", "PNG under the name of .jpg", ()),
        ("c.tar::d/e.png", "WebP under the name of .png", ()),
    ]
    assert {f".{extension}" for names in doctor._EXTENSIONS.values() for extension in names.split()} == IMAGE_EXTENSIONS
    assert doctor._EXTENSIONS.keys() == doctor.READERS.keys()


def test_leaks_between_splits() -> None:
    files = {
        "train/a.png": encode(noise(1)),
        "train/b.png": encode(noise(2)),
        "train/a2.png": encode(noise(1)),
        "val/a.png": encode(noise(1)),
        "val/b.jpg": encode(noise(2), "JPEG", quality=70),
        "val/c.png": encode(noise(3)),
        "val/c2.png": encode(noise(3)),
    }
    report = examine(InMemory(files, [0, 1, 0, 0, 1, 0, 0], held_out=[False] * 3 + [True] * 4))
    assert found(report, "leak") == [
        ("val/a.png", "held out; the same bytes in the training images", ("train/a.png", "train/a2.png")),
        ("val/b.jpg", "held out; the same picture in the training images", ("train/b.png",)),
    ]
    assert report.held_out == 4


def test_leaks_in_the_division_that_training_would_make() -> None:
    files = {f"{i}.png": encode(noise(i)) for i in range(9)} | {"9.png": encode(noise(3))}
    report = examine(InMemory(files, [0] * 10))
    assert found(report, "leak") == [("9.png", "held out; the same bytes in the training images", ("3.png",))]
    assert report.held_out == 1


def test_one_picture_under_two_labels() -> None:
    files = {"cat/a.png": encode(noise(1)), "dog/b.png": encode(noise(1)), "cat/c.png": encode(noise(2))}
    assert found(examine(InMemory(files, [0, 1, 0])), "two_classes") == [("cat/a.png", "cat / dog", ("dog/b.png",))]
    assert not found(examine(InMemory(files, [0, 0, 0])), "two_classes")
    several = InMemory(files, [[1, 1], [0, 0], [1, 0]], multi_label=True)
    assert found(examine(several), "two_classes") == [("cat/a.png", "cat + dog / none", ("dog/b.png",))]


def test_classes() -> None:
    files = {f"{i}.png": encode(noise(i)) for i in range(23)}
    names = ("cat", "Dog", "dog", "empty", "école", "e\u0301cole")
    report = examine(InMemory(files, [0] * 11 + [1] * 9 + [2, 4, 5], names))
    assert found(report, "same_class") == [
        ("Dog", "but for case the same name as", ("dog",)),
        ("école", "but for case the same name as", ("e\u0301cole",)),
    ]
    assert [(key, detail) for key, detail, _ in found(report, "small_class")] == [
        ("Dog", "9 images"),
        ("dog", "1 image"),
        ("empty", "0 images"),
        ("école", "1 image"),
        ("e\u0301cole", "1 image"),
    ]
    assert (report.classes, report.balance) == (6, (0, 1.0, 11))


def test_balance_of_several_labels_per_image() -> None:
    files = {f"{i}.png": encode(noise(i)) for i in range(3)}
    report = examine(InMemory(files, [[1, 1], [1, 0], [0, 0]], multi_label=True))
    assert report.balance == (1, 1.5, 2)


def test_no_images_at_all() -> None:
    assert examine([]).to_dict()["images"] == 0
    assert examine(InMemory({}, np.zeros(0, np.int64))).balance == (0, 0.0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1."):
        examine([], workers=0)


def test_an_interrupted_run_stops(tmp_path: Path) -> None:
    paths = write(tmp_path, **{f"a{i}__png": encode(noise(i)) for i in range(30)})
    drawn: list[str] = []

    def reading() -> object:
        for path in paths:
            drawn.append(path)
            yield path

    def stop(key: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examine(reading(), on_image=stop, workers=2)  # type: ignore[arg-type]
    assert len(drawn) <= 6  # no more is read ahead than the threads need


REPORT = doctor.Report(
    images=1234,
    held_out=100,
    classes=3,
    balance=(2, 20.5, 700),
    findings=(
        Finding("unreadable", "a`b\udcff\n.jpg", "corrupt: cut\nshort"),
        Finding("duplicate", "x.png", "the same bytes", tuple(f"{i}.png" for i in range(7))),
        Finding("tiny", "1.png", "2 × 3 pixels"),
        Finding("tiny", "2.png", "2 × 3 pixels"),
        Finding("tiny", "3.png", "2 × 3 pixels"),
    ),
)


def test_markdown() -> None:
    assert REPORT.to_markdown(limit=2).splitlines() == [
        "# 1,234 images, 5 findings",
        "",
        "3 classes of 2 to 700 images, 20.5 in the median; 100 images held out.",
        "",
        "| found | number | meaning |",
        "|---|---:|---|",
        "| Unreadable | 1 | cannot be decoded; training leaves them out |",
        "| Exact duplicates | 1 | the same bytes more than once |",
        "| Tiny | 3 | shorter side below 32 pixels: little to see once enlarged |",
        "",
        "## Unreadable",
        "",
        "- `` a`b��.jpg ``: corrupt: cut�short",
        "",
        "## Exact duplicates",
        "",
        "- `x.png`: the same bytes: `0.png`, `1.png`, `2.png`, `3.png`, `4.png` and 2 more",
        "",
        "## Tiny",
        "",
        "- `1.png`: 2 × 3 pixels",
        "- `2.png`: 2 × 3 pixels",
        "- … 1 more",
    ]


def test_json() -> None:
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["counts"] == {"unreadable": 1, "duplicate": 1, "tiny": 3}
    assert data["balance"] == {"min": 2, "median": 20.5, "max": 700}
    assert data["findings"][2] == {"kind": "tiny", "key": "1.png", "detail": "2 × 3 pixels", "related": []}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_contact_sheet(tmp_path: Path, suffix: str) -> None:
    def load(key: str) -> Image.Image:
        if "broken" in key:
            raise ImageUnreadable(f"{key}: gone.")
        return Image.new("RGB", (300, 200), key.split("/")[-1])

    findings = [
        Finding("thin", "d/blue", "long"),
        Finding(
            "unreadable",
            "d/broken 照片\udcff",
            "unreadable: d/broken 照片\udcff: " + "very long words " * 30 + "x" * 300,
        ),
        Finding("near_duplicate", "d/red", "the same picture", ("d/lime", "d/yellow")),
        Finding("small_class", "cat", "3 images"),
        *(Finding("tiny", "d/cyan", "2 × 3 pixels") for _ in range(9)),
    ]
    path = tmp_path / f"sheet{suffix}"
    assert contact_sheet(path, findings, load, per_kind=7) == 1 + 1 + 1 + 7
    with Image.open(path) as sheet:
        image = np.asarray(sheet.convert("RGB")).astype(int)
    areas = {
        name: np.argwhere(np.abs(image - colour).sum(2) < 60)
        for name, colour in (
            ("red", (255, 0, 0)),
            ("lime", (0, 255, 0)),
            ("cyan", (0, 255, 255)),
            ("blue", (0, 0, 255)),
        )
    }
    one = 180 * 120
    assert {name: round(len(area) / one) for name, area in areas.items()} == {"red": 1, "lime": 1, "cyan": 7, "blue": 1}
    assert not (np.abs(image - (255, 255, 0)).sum(2) < 60).any()  # only the first of the related is drawn
    assert areas["red"][:, 0].min() == areas["lime"][:, 0].min()  # side by side
    assert areas["red"][:, 0].max() < areas["cyan"][:, 0].min() < areas["blue"][:, 0].min()  # in the order of KINDS


def test_contact_sheet_of_nothing_and_of_too_much(tmp_path: Path) -> None:
    assert contact_sheet(tmp_path / "a.png", [Finding("small_class", "cat", "3 images")], decode) == 0
    assert not (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match='"a.gif" ends in ".gif". A contact sheet is a .png or a .jpg.'):
        contact_sheet(tmp_path / "a.gif", [], decode)
    many = [Finding("tiny", "a", "")] * 2000
    with pytest.raises(ValueError, match="JPEG ends at 65,535. Draw fewer pictures, or name a .png."):
        contact_sheet(tmp_path / "a.jpg", many, lambda key: Image.new("RGB", (1, 1)), per_kind=2000)


def test_kinds_are_all_explained() -> None:
    report = doctor.Report(
        images=1, held_out=None, classes=None, balance=None, findings=tuple(Finding(kind, "k", "d") for kind in KINDS)
    )
    assert list(report.counts) == list(KINDS)
    assert all(f"## {title}\n" in report.to_markdown() for title, _ in KINDS.values())
