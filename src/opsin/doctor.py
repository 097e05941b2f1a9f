"""Is a set of images fit to train on? One pass finds what is broken, doubled, mislabelled, odd or lopsided in it."""

import hashlib
import io
import itertools
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from opsin import sheets
from opsin.data.samples import Samples, split
from opsin.errors import ImageError, ImageUnreadable
from opsin.preprocess import IMAGE_EXTENSIONS, MAX_PIXELS, READERS, avif_reader, decode, exif_orientation, heic_reader
from opsin.sheets import plain

TINY = 32  # pixels; a shorter side below it
THIN = 5  # longer side over shorter
SMALL_CLASS = 10  # images

# kind of finding: title, and what it means; the gravest first
KINDS = {
    "unreadable": ("Unreadable", "cannot be decoded; training leaves them out"),
    "leak": ("Leaks between splits", "held out and trained on: the scores would be too good"),
    "two_classes": ("One picture, several labels", "at most one of the labels is right"),
    "duplicate": ("Exact duplicates", "the same bytes more than once"),
    "near_duplicate": ("Near-duplicates", "one picture saved, scaled or brightened anew"),
    "same_class": ("Classes alike but for case", "as a rule one class in two folders"),
    "small_class": ("Small classes", f"fewer than {SMALL_CLASS} images"),
    "extension": ("Wrong extension", "opsin goes by the bytes; other programs may not"),
    "turned": ("Turned by EXIF", "opsin sets them upright; other programs may not"),
    "mode": ("Unusual mode", "opsin makes them RGB: alpha is dropped, the first of several pictures taken"),
    "tiny": ("Tiny", f"shorter side below {TINY} pixels: little to see once enlarged"),
    "thin": ("Thin", f"one side over {THIN} times the other: squashed or mostly cropped away"),
}
OF_CLASSES = ("same_class", "small_class")  # their keys are names of classes, not of images


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with an image, a group of images or a class."""

    kind: str  # of KINDS
    key: str  # the image, or the class
    detail: str
    related: tuple[str, ...] = ()  # the others of the group


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `examine` found; `findings` are sorted by kind, then in the order of the set."""

    images: int
    held_out: int | None  # images to validate on; None where nothing is labelled
    classes: int | None
    balance: tuple[int, float, int] | None  # images of a class: least, median, most
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each kind there is, the gravest first."""
        numbers = {kind: sum(finding.kind == kind for finding in self.findings) for kind in KINDS}
        return {kind: number for kind, number in numbers.items() if number}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it, with the counts."""
        data = asdict(self) | {"counts": self.counts}
        data["balance"] = (
            None if self.balance is None else dict(zip(("min", "median", "max"), self.balance, strict=True))
        )
        data["findings"] = [finding | {"related": list(finding["related"])} for finding in data["findings"]]
        return data

    def to_markdown(self, *, limit: int = 20) -> str:
        """A summary and, of each kind, the first `limit` findings."""
        lines = [f"# {_count(self.images, 'image')}, {_count(len(self.findings), 'finding')}", ""]
        if self.balance is not None and self.classes is not None:
            least, median, most = self.balance
            lines += [
                f"{_count(self.classes, 'class', 'classes')} of {least} to {most} images, {median:g} in the median; "
                f"{self.held_out} images held out.",
                "",
            ]
        if self.findings:
            lines += ["| found | number | meaning |", "|---|---:|---|"]
            lines += [f"| {KINDS[kind][0]} | {number} | {KINDS[kind][1]} |" for kind, number in self.counts.items()]
        for kind, number in self.counts.items():
            lines += ["", f"## {KINDS[kind][0]}", ""]
            for finding in itertools.islice((f for f in self.findings if f.kind == kind), limit):
                others = ", ".join(_code(key) for key in finding.related[:5])
                more = f" and {len(finding.related) - 5} more" if len(finding.related) > 5 else ""
                lines.append(f"- {_code(finding.key)}: {plain(finding.detail)}{f': {others}' if others else ''}{more}")
            if number > limit:
                lines.append(f"- … {number - limit} more")
        return "\n".join(lines) + "\n"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _code(text: str) -> str:
    text = plain(text)
    return f"`` {text} ``" if "`" in text else f"`{text}`"


# ── examine: images → report ─────────────────────────────────────────────────────────────────────────────────────────


def examine(
    data: Samples | Iterable[str],
    *,
    max_pixels: int = MAX_PIXELS,
    on_image: Callable[[str], None] | None = None,
    workers: int = 2,
) -> Report:
    """Decode every image once, and report what is wrong with it, with pairs of images, and with the labels.

    Near-duplicates are pictures whose 16 × 18 greys agree (see `alike`), found without comparing all pairs. Of an
    image no more than these greys and a hash is kept, half a kilobyte in all.

    Args:
        data: a labelled set; or paths, of which only the images are examined. Where a labelled set says nothing about
            held-out images, leaks are looked for in the division that training would make.
        max_pixels: larger images count as unreadable.
        on_image: called with the key of each image once it has been looked at, in the order of the set.
        workers: threads that decode. `Samples.source` is called from the calling thread only.
    Raises:
        ValueError: fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1.")
    findings: list[Finding] = []
    keys: list[str] = []
    looks: list[_Look | None] = []
    for key, looked in _look_at_all(data, max_pixels, workers):
        keys.append(key)
        if isinstance(looked, ImageError):
            findings.append(Finding("unreadable", key, f"{looked.kind}: {looked}"))
            looks.append(None)
        else:
            findings += [Finding(kind, key, detail) for kind, detail in looked.notes]
            looked.notes.clear()
            looks.append(looked)
        if on_image is not None:
            on_image(key)

    groups = _groups(looks)
    findings += _duplicates(groups, looks, keys)
    held_out = classes = balance = None
    if isinstance(data, Samples):
        held_rows = _held_out(data)
        findings += _leaks(groups, looks, keys, held_rows)
        findings += _contradictions(groups, data, keys)
        numbers = (
            data.targets.sum(0) if data.labels.multi_label else np.bincount(data.targets, minlength=len(data.labels))
        )
        findings += _of_classes(data.labels.names, [int(number) for number in numbers])
        held_out, classes = int(held_rows.sum()), len(data.labels)
        if len(numbers):
            balance = int(numbers.min()), float(np.median(numbers)), int(numbers.max())
    order = {kind: place for place, kind in enumerate(KINDS)}
    findings.sort(key=lambda finding: order[finding.kind])
    return Report(images=len(keys), held_out=held_out, classes=classes, balance=balance, findings=tuple(findings))


@dataclass(slots=True)
class _Look:
    """What is kept of an image."""

    notes: list[tuple[str, str]]  # (kind, detail)
    file: bytes  # hash of the bytes
    greys: np.ndarray | None  # (16, 18) uint8; None: too flat to say
    pixels: bytes | None  # hash of the pixels, where it is that flat


def _look_at_all(
    data: Samples | Iterable[str], max_pixels: int, workers: int
) -> Iterator[tuple[str, "_Look | ImageError"]]:
    """Key and look of each image, in order; a few images beyond the one that is given are in memory."""
    waiting: deque[tuple[str, Future[_Look | ImageError]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for key, source in _sources(data):
            if isinstance(source, ImageError):
                future: Future[_Look | ImageError] = Future()
                future.set_result(source)
            else:
                future = pool.submit(_look, source, key, max_pixels)
            waiting.append((key, future))
            if len(waiting) > 2 * workers:
                key, future = waiting.popleft()
                yield key, future.result()
        for key, future in waiting:
            yield key, future.result()


def _sources(data: Samples | Iterable[str]) -> Iterator[tuple[str, str | bytes | ImageError]]:
    if not isinstance(data, Samples):
        for path in data:
            yield path, path
        return
    for index in range(len(data)):
        key = data.key(index)
        try:
            yield key, data.source(index)
        except ImageError as error:
            yield key, error


def _look(source: str | bytes, key: str, max_pixels: int) -> "_Look | ImageError":
    try:
        image = decode(source, max_pixels=max_pixels)
        if isinstance(source, str) and not Path(source).is_file():  # a URL: the pixels are all there is
            notes, digest = [], hashlib.sha256(image.tobytes()).digest()
        else:
            with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as stream:
                notes, digest = _header_notes(stream, key), _sha256(stream)
    except ImageError as error:
        return error
    except OSError as error:  # it was there when it was decoded
        return ImageUnreadable(f"{key}: {error.strerror or error}.")
    short, long = sorted(image.size)
    if short < TINY:
        notes.append(("tiny", f"{image.width} × {image.height} pixels"))
    if long > THIN * short:
        notes.append(("thin", f"{image.width} × {image.height} pixels, {long / short:.1f} to 1"))
    look = _Look(notes, digest, None, None)
    greys = _greys(image)
    if np.ptp(greys) < FLAT:
        look.pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
    else:
        look.greys = np.rint(greys).astype(np.uint8)
    return look


def _sha256(stream: Any) -> bytes:
    stream.seek(0)
    hasher = hashlib.sha256()
    while piece := stream.read(2**20):
        hasher.update(piece)
    return hasher.digest()


# Extensions that a format may have, where they are names of images at all.
_EXTENSIONS = {
    "JPEG": "jpg jpeg jpe jfif",
    "PNG": "png apng",
    "WebP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif tiff",
    "AVIF": "avif heif",
    "HEIC": "heic heif",
    "JPEG 2000": "jp2 j2k jpx",
    "PPM": "ppm pgm pbm pnm",
    "QOI": "qoi",
}
_TURNS = {
    2: "mirrored",
    3: "upside down",
    4: "mirrored and upside down",
    5: "mirrored and on its side",
    6: "on its side",
    7: "mirrored and on its side",
    8: "on its side",
}
_MODES = {
    "1": "black and white, 1 bit",
    "L": "greyscale",
    "LA": "greyscale with alpha",
    "La": "greyscale with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "alpha",
    "RGBa": "alpha",
    "CMYK": "CMYK",
    "I": "32-bit integers",
    "F": "floats",
}


def _header_notes(stream: Any, key: str) -> list[tuple[str, str]]:
    """What the file says of itself, beside its pixels; `decode` has read it before."""
    head, notes = stream.read(64), []
    kind = next(kind for kind, (signature, _) in READERS.items() if signature.match(head))
    suffix = PurePosixPath(key.rsplit("::", 1)[-1]).suffix.lower()
    if suffix in IMAGE_EXTENSIONS and suffix[1:] not in _EXTENSIONS[kind].split():
        notes.append(("extension", f"{kind} under the name of {suffix}"))
    reader = READERS[kind][1] or {"AVIF": avif_reader, "HEIC": heic_reader}[kind](key)
    stream.seek(0)
    with reader(stream, "") as image:
        # of a PNG the chunks before the pixels: to see those behind, Pillow would decode it once more
        turned = (
            1
            if kind == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()
            else exif_orientation(image)
        )
        if turned in _TURNS:
            notes.append(("turned", f"EXIF orientation {turned}: stored {_TURNS[turned]}"))
        odd = []
        # Pillow reads 16-bit colour to 8 bits; only the decoder's arguments still tell
        if image.mode.startswith("I;16") or (kind in ("PNG", "TIFF") and ";16" in str(image.tile)):
            odd.append("16 bits a channel")
        elif image.mode != "RGB":
            odd.append(_MODES.get(image.mode, image.mode))
        if image.mode in ("P", "L", "RGB") and "transparency" in image.info:
            odd.append("with a transparent colour")
        if getattr(image, "is_animated", False):
            odd.append("several pages" if kind == "TIFF" else "animated")
        if odd:
            notes.append(("mode", ", ".join(odd)))
    return notes


# ── duplicates ───────────────────────────────────────────────────────────────────────────────────────────────────────

FLAT = 16  # grey levels from darkest to lightest: below it nothing tells pictures apart but the pixels themselves
STEP = 2.0  # grey levels: a neighbour is lighter from here on; flat areas, however noisy, then give zeros
DOUBTFUL = 6  # bits
CORRELATION = 0.997
DIFFERENCE = 32  # grey levels, in the mean
MOST_COMPARED = 512  # images with one hash in common
SORTED = 2**22  # hashes at once, some 100 MB


def _greys(image: Image.Image) -> np.ndarray:
    """(16, 18) float32, 0 to 255: the picture averaged to a grid."""
    grey = image.convert("L")
    if (factor := min(grey.size) // 128) > 1:
        grey = grey.reduce(factor)
    return np.asarray(grey.convert("F").resize((18, 16), Image.Resampling.BILINEAR))


def _hashes(greys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of grids (n, 16, 18): the dHash (n,) uint64, and its most uncertain bits (n, DOUBTFUL) uint64.

    On 8 × 9 means, a bit for each two neighbours of a row: the right one is lighter.
    """
    means = greys.reshape(-1, 8, 2, 9, 2).mean((2, 4), dtype=np.float32)
    margins = (means[:, :, 1:] - means[:, :, :-1] - STEP).reshape(-1, 64)
    codes = np.packbits(margins > 0, axis=1).view(">u8").astype(np.uint64)[:, 0]
    places = np.argpartition(np.abs(margins), DOUBTFUL, axis=1)[:, :DOUBTFUL]
    return codes, np.uint64(1) << (63 - places).astype(np.uint64)


def alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether grids of greys (n, 16, 18) show the same pictures: (n,) bool.

    They correlate to `CORRELATION` and differ by at most `DIFFERENCE` in the mean. Copies of lower JPEG quality,
    other size or brightness do (99.9 % and more, most of them); different motorcycles before the same white do not
    (99.2 %), nor do different handwritten digits (99.6 %).
    """
    first, second = (greys.reshape(-1, 288).astype(np.float32) for greys in (first, second))
    near = np.abs(first - second).mean(1) <= DIFFERENCE
    first, second = (greys - greys.mean(1, keepdims=True) for greys in (first, second))
    sizes = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    return near & ((first * second).sum(1) >= CORRELATION * sizes)


def _groups(looks: Sequence[_Look | None]) -> list[list[int]]:
    """Rows that show the same picture, each group ascending, two rows or more.

    A dHash flips the bits where two neighbours are nearly equal. So each image is filed under its hash with the
    `DOUBTFUL` most uncertain bits set in all ways, and those that share a place are compared by their greys. Of 300
    Tiny-ImageNet images saved again as JPEG of quality 50 or 20, or at half the size, 98 %, 90 % and 99.7 % are found.
    A plain dHash within a Hamming distance of 2 finds 86 % and 71 % of the first two, and of 82 pairs that it gave
    among 50,000 images 78 had nothing in common; here none of 100,000 images is given a wrong partner.
    """
    parent = np.arange(len(looks))
    seen: dict[bytes, int] = {}
    for row, look in enumerate(looks):
        for digest in () if look is None else (look.file, look.pixels):
            if digest is not None:
                _join(parent, row, seen.setdefault(digest, row))
    rows, greys = [], []
    for row, look in enumerate(looks):
        if look is not None and look.greys is not None and parent[row] == row:  # one of each file
            rows.append(row)
            greys.append(look.greys)
    if rows:
        for i, j in _near_pairs(np.stack(greys)):
            _join(parent, rows[i], rows[j])
    groups: dict[int, list[int]] = {}
    for row in range(len(looks)):
        groups.setdefault(_root(parent, row), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def _join(parent: np.ndarray, first: int, second: int) -> None:
    first, second = sorted((_root(parent, first), _root(parent, second)))
    parent[second] = first


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _near_pairs(greys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Of grids (n, 16, 18), pairs that are alike: enough of them to connect every group."""
    pieces = [_hashes(greys[start : start + 2**14]) for start in range(0, len(greys), 2**14)]
    codes, bits = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    readings = np.arange(2**DOUBTFUL, dtype=np.uint64)
    group = np.arange(len(greys))  # joined so far, so that a thousand copies are not compared each with each
    shares = len(greys) * len(readings) // SORTED + 1  # looked through one after the other
    for share in range(shares):
        parts = []
        for reading in readings:
            chosen = np.bitwise_xor.reduce(
                bits * (reading >> np.arange(DOUBTFUL, dtype=np.uint64) & np.uint64(1)), axis=1
            )
            places = codes ^ chosen
            owners = np.flatnonzero(places % np.uint64(shares) == share)
            parts.append((places[owners], owners))
        place, owner = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(place, kind="stable")
        place, owner = place[order], owner[order]
        start = np.arange(len(place))
        for lag in range(1, MOST_COMPARED):
            start = start[start + lag < len(place)]
            start = start[place[start + lag] == place[start]]
            if not len(start):
                break
            first, second = owner[start], owner[start + lag]
            new = group[first] != group[second]
            pairs = np.unique(np.sort(np.stack([first[new], second[new]], axis=1), axis=1), axis=0)
            for piece in np.split(pairs, range(2**14, len(pairs), 2**14)):
                for i, j in piece[alike(greys[piece[:, 0]], greys[piece[:, 1]])].tolist():
                    yield i, j
                    _join(group, i, j)
            while (group != group[group]).any():
                group = group[group]


def _same_bytes(rows: Sequence[int], looks: Sequence[_Look | None]) -> bool:
    return len({look.file for row in rows if (look := looks[row]) is not None}) == 1


def _likeness(rows: Sequence[int], looks: Sequence[_Look | None]) -> str:
    return "the same bytes" if _same_bytes(rows, looks) else "the same picture"


def _duplicates(groups: list[list[int]], looks: Sequence[_Look | None], keys: list[str]) -> Iterator[Finding]:
    for group in groups:
        files: dict[bytes, list[int]] = {}
        for row in group:
            look = looks[row]
            assert look is not None
            files.setdefault(look.file, []).append(row)
        for rows in files.values():
            if len(rows) > 1:
                related = tuple(keys[row] for row in rows[1:])
                yield Finding("duplicate", keys[rows[0]], "the same bytes", related)
        if len(files) > 1:
            first, *others = (keys[rows[0]] for rows in files.values())
            yield Finding("near_duplicate", first, "the same picture", tuple(others))


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _held_out(data: Samples) -> np.ndarray:
    """(N,) bool, as training takes them."""
    if data.held_out is not None:
        return data.held_out.astype(bool)
    rows = np.zeros(len(data), bool)
    if len(data):
        rows[split(data)[1]] = True
    return rows


def _leaks(
    groups: list[list[int]], looks: Sequence[_Look | None], keys: list[str], held_out: np.ndarray
) -> Iterator[Finding]:
    for group in groups:
        inside = [row for row in group if not held_out[row]]
        for row in group:
            if held_out[row] and inside:
                same = [other for other in inside if _same_bytes([row, other], looks)] or inside
                detail = f"held out; {_likeness([row, *same], looks)} in the training images"
                yield Finding("leak", keys[row], detail, tuple(keys[other] for other in same))


def _contradictions(groups: list[list[int]], data: Samples, keys: list[str]) -> Iterator[Finding]:
    for group in groups:
        targets = [data.targets[row] for row in group]
        if any(not np.array_equal(target, targets[0]) for target in targets):
            names = dict.fromkeys(_label(data, row) for row in group)
            yield Finding("two_classes", keys[group[0]], " / ".join(names), tuple(keys[row] for row in group[1:]))


def _label(data: Samples, row: int) -> str:
    if not data.labels.multi_label:
        return data.labels.name(int(data.targets[row]))
    return " + ".join(data.labels.name(int(i)) for i in np.flatnonzero(data.targets[row])) or "none"


def _of_classes(names: Sequence[str], numbers: Sequence[int]) -> Iterator[Finding]:
    alike_names: dict[str, list[str]] = {}
    for name in names:
        alike_names.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    for first, *others in alike_names.values():
        if others:
            yield Finding("same_class", first, "but for case the same name as", tuple(others))
    for name, number in zip(names, numbers, strict=True):
        if number < SMALL_CLASS:
            yield Finding("small_class", name, _count(number, "image"))


# ── contact sheet ────────────────────────────────────────────────────────────────────────────────────────────────────

_COLOURS = {"unreadable": "#c62828", "leak": "#c62828", "two_classes": "#c62828"}  # the others: amber


def contact_sheet(
    path: str | Path,
    findings: Iterable[Finding],
    load: Callable[[str], Image.Image],
    *,
    per_kind: int = 12,
) -> int:
    """Draw the images of the findings with what was found, grouped by kind, the gravest first.

    Args:
        path: .png or .jpg.
        findings: as in a report. Those of classes have no image and are left out.
        load: key → upright RGB image, `decode` where the keys are paths; an ImageError leaves an empty frame.
        per_kind: at most so many findings of a kind; the title says how many there are.
    Returns:
        Findings drawn; without any, no file is written.
    Raises:
        ValueError: neither .png nor .jpg, or a sheet longer than JPEG takes.
        OSError: the file cannot be written.
    """
    sheets.check_format(path)
    groups: dict[str, list[Finding]] = {kind: [] for kind in KINDS if kind not in OF_CLASSES}
    for finding in findings:
        if finding.kind in groups:
            groups[finding.kind].append(finding)
    blocks = [_block(kind, found, per_kind) for kind, found in groups.items() if found]
    if blocks:
        sheets.draw(path, blocks, load)
    return sum(len(block.cells) for block in blocks)


def _block(kind: str, findings: Sequence[Finding], per_kind: int) -> sheets.Block:
    """The title of a kind and its findings; those with others to compare to show the first of them."""
    title, meaning = KINDS[kind]
    shown = findings[:per_kind]
    number = f"{len(findings):,}" if len(shown) == len(findings) else f"{len(shown)} of {len(findings):,}"
    cells = []
    for finding in shown:
        detail = finding.detail.replace(f"{finding.key}: ", "")
        if len(finding.related) > 1:
            detail += f" (and {len(finding.related) - 1} more)"
        cells.append(sheets.Cell((finding.key, *finding.related[:1]), ((detail, sheets.PALE),)))
    return sheets.Block(f"{title} · {number}", meaning, _COLOURS.get(kind, "#e09b1a"), cells)
