"""Image files, damaged in every way that the wild knows, with whole ones among them.

A name says what was done to the file, `0012-truncated.gif`; one that ends in six hex digits, `0012-good-5090b0.gif`,
is a whole picture of that one colour, whatever its extension claims.
"""

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "WEBP": {"lossless": True},
    "TIFF": {"compression": "tiff_lzw"},
}


def broken_files(folder: Path, count: int, seed: int) -> list[Path]:
    """Write exactly `count` files (or directories, or links) into `folder`; one third are whole."""
    rng = random.Random(seed)
    # 4096 colours, so far apart that no codec confuses two
    colours = rng.sample(
        [(r, g, b) for r in range(8, 256, 16) for g in range(8, 256, 16) for b in range(8, 256, 16)], 4096
    )
    paths = []
    for index in range(count):
        kind = rng.choice(list(FORMATS))
        if rng.random() < 1 / 3:
            paths.append(_whole(folder, index, kind, colours[index % len(colours)], rng))
        else:
            damage = rng.choice(list(DAMAGES))
            path = folder / f"{index:04}-{damage}.{FORMATS[kind]}"
            DAMAGES[damage](path, kind, rng)
            paths.append(path)
    return paths


def _encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **OPTIONS.get(kind, {}))
    return file.getvalue()


def _noise(kind: str, rng: random.Random) -> bytes:
    """A file whose bytes are nearly all pixels, so that a random hit strikes them."""
    size = rng.randint(5, 31), rng.randint(5, 31)
    return _encode(Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)), kind)


def _whole(folder: Path, index: int, kind: str, colour: tuple[int, int, int], rng: random.Random) -> Path:
    renamed = rng.random() < 1 / 4
    extension = rng.choice([*FORMATS.values(), "txt"]) if renamed else FORMATS[kind]
    path = folder / f"{index:04}-{'renamed' if renamed else 'good'}-{bytes(colour).hex()}.{extension}"
    path.write_bytes(_encode(Image.new("RGB", (rng.randint(5, 31), rng.randint(5, 31)), colour), kind))
    return path


def _truncated(path: Path, kind: str, rng: random.Random) -> None:
    data = _noise(kind, rng)
    path.write_bytes(data[: rng.randint(1, len(data) * 3 // 4)])


def _flipped(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(_noise(kind, rng))
    for _ in range(rng.choice([1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _flipped_header(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(_noise(kind, rng))
    for _ in range(rng.choice([1, 2, 4])):
        data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    path.write_bytes(data)


def _spliced(path: Path, kind: str, rng: random.Random) -> None:
    """A run of bytes zeroed, doubled or dropped, or rubbish after the end."""
    data = _noise(kind, rng)
    start, stop = sorted(rng.randrange(len(data)) for _ in range(2))
    middle = rng.choice([b"\0" * (stop - start), data[start:stop] * 2, b""])
    path.write_bytes(data[:start] + middle + data[stop:] + rng.choice([b"", rng.randbytes(99)]))


def _empty(path: Path, kind: str, rng: random.Random) -> None:
    path.write_bytes(b"")


def _zeros(path: Path, kind: str, rng: random.Random) -> None:
    path.write_bytes(b"\0" * rng.randint(1, 999))


def _text(path: Path, kind: str, rng: random.Random) -> None:
    path.write_text(
        rng.choice(["not a picture\n", "<html>404</html>", "{}", "P3 of the ninth", "BM, GIF89a and so on"])
    )


def _random(path: Path, kind: str, rng: random.Random) -> None:
    path.write_bytes(rng.choice([b"", _noise(kind, rng)[:16]]) + rng.randbytes(rng.randint(1, 999)))


def _directory(path: Path, kind: str, rng: random.Random) -> None:
    path.mkdir()


def _unreadable(path: Path, kind: str, rng: random.Random) -> None:
    """Whole, but not to be opened; root opens it all the same."""
    path.write_bytes(_noise(kind, rng))
    path.chmod(0)


def _dangling(path: Path, kind: str, rng: random.Random) -> None:
    path.symlink_to(path.with_name("nowhere") if rng.random() < 1 / 2 else path)


def _pipe(path: Path, kind: str, rng: random.Random) -> None:
    os.mkfifo(path)


def _bomb(path: Path, kind: str, rng: random.Random) -> None:
    """A small file whose header claims billions of pixels."""
    path.write_bytes(_claims(kind, rng.choice([60_000, 65_500]), rng))


def _claims(kind: str, side: int, rng: random.Random) -> bytes:
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 9999)), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        return b"\x89PNG\r\n\x1a\n" + body
    if kind == "WEBP":  # an extended header, 24 bits a side less one, then the frame of a small picture
        frame = _noise(kind, rng)[12:]
        canvas = (side - 1).to_bytes(3, "little") * 2
        body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + canvas + frame
        return b"RIFF" + struct.pack("<I", len(body)) + body
    data = bytearray(_noise(kind, rng))
    if kind == "JPEG":  # SOF0: marker, length, precision, then height and width
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", side, side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    else:  # TIFF: the first two entries of the directory, ImageWidth and ImageLength
        place = struct.unpack("<I", data[4:8])[0] + 2
        for entry, tag in enumerate((256, 257)):
            data[place + entry * 12 : place + entry * 12 + 12] = struct.pack("<HHII", tag, 4, 1, side)
    return bytes(data)


DAMAGES: dict[str, Callable[[Path, str, random.Random], None]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "flipped_header": _flipped_header,
    "spliced": _spliced,
    "empty": _empty,
    "zeros": _zeros,
    "text": _text,
    "random": _random,
    "directory": _directory,
    "unreadable": _unreadable,
    "dangling": _dangling,
    "pipe": _pipe,
    "bomb": _bomb,
}
