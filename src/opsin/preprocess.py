"""image → pixels: decode anything to upright RGB, then resize, crop and normalise as the checkpoint's authors did.

    source ── decode ──▶ PIL RGB ── resize ──▶ uint8 H W 3 ── normalise ──▶ float32 3 H W
       └───────────────── load ────────────────────▲

Equal to the PIL backend of transformers bit for bit; `tests/parity/test_preprocess.py` holds it to that. `load` is the
quick way, for JPEG: by libjpeg-turbo without a copy in Pillow's layout, and resized by torch where that is quicker.
"""

import difflib
import hashlib
import http.client
import io
import json
import math
import os
import re
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    QoiImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import (
    ImageCorrupt,
    ImageError,
    ImageNotFound,
    ImageTooLarge,
    ImageUnreadable,
    MissingExtra,
    NotAnImage,
)

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray | Tensor
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]  # in the order of Pillow's enum

Decode = Literal["exact", "fast"]  # "fast": large JPEGs at a fraction of their size

RESAMPLES: tuple[Resample, ...] = get_args(Resample)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

QUICK_SHRINK = 1.5  # from here on torch's bilinear resize is within 1 of Pillow's; enlarging, it rarely is 2 off
LARGE_PIXELS = 4_000_000  # from here on Pillow resizes a JPEG of libjpeg-turbo's sooner than one of its own

MAX_PIXELS = 178_956_970  # where Pillow itself refuses: 512 MiB of RGB
MAX_DOWNLOAD_BYTES = 64 * 2**20
DOWNLOAD_SECONDS = 30  # for one URL, from the request to the last byte

# what a folder scan takes for an image; `decode` looks at the bytes alone
IMAGE_EXTENSIONS = frozenset(
    f".{extension}"
    for extensions in (
        "jpg jpeg jpe jfif png apng webp gif bmp tif tiff",
        "avif heic heif jp2 j2k jpx ppm pgm pbm pnm qoi",
    )
    for extension in extensions.split()
)


def is_image_name(path: str | os.PathLike[str]) -> bool:
    """Whether a file of this name is taken for an image when a folder is scanned."""
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


# ── decode: source → upright RGB ─────────────────────────────────────────────────────────────────────────────────────

# Format: its first bytes, and Pillow's reader. Formats without a signature (TGA) would take noise for a picture, and
# EPS runs a program: neither is here. The JPEG reader takes the first picture of an MPO too, which is the photo.
READERS: dict[str, tuple[re.Pattern[bytes], type[ImageFile.ImageFile] | None]] = {
    kind: (re.compile(signature, re.DOTALL), reader)
    for kind, signature, reader in (
        ("JPEG", rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
        ("PNG", rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
        ("WebP", rb"RIFF....WEBP", WebPImagePlugin.WebPImageFile),
        ("GIF", rb"GIF8[79]a", GifImagePlugin.GifImageFile),
        ("BMP", rb"BM", BmpImagePlugin.BmpImageFile),
        ("TIFF", rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]", TiffImagePlugin.TiffImageFile),
        ("AVIF", rb"....ftyp(....)*?avi[fs]", None),  # None: not in every Pillow
        ("HEIC", rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", None),
        ("JPEG 2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n", Jpeg2KImagePlugin.Jpeg2KImageFile),
        ("PPM", rb"P[1-6]\s", PpmImagePlugin.PpmImageFile),
        ("QOI", rb"qoif", QoiImagePlugin.QoiImageFile),
    )
}

# EXIF orientation → what undoes it
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))
# the same, on (H, W, C), without a copy
_TURNED: dict[Image.Transpose | None, Callable[[np.ndarray], np.ndarray]] = {
    None: lambda pixels: pixels,
    Image.Transpose.FLIP_LEFT_RIGHT: np.fliplr,
    Image.Transpose.ROTATE_180: partial(np.rot90, k=2),
    Image.Transpose.FLIP_TOP_BOTTOM: np.flipud,
    Image.Transpose.TRANSPOSE: lambda pixels: pixels.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: partial(np.rot90, k=3),
    Image.Transpose.TRANSVERSE: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    Image.Transpose.ROTATE_90: np.rot90,
}


def decode(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Any image as upright RGB. Safe to call from many threads.

    EXIF orientation is applied, alpha is dropped and modes are converted as Pillow's `convert("RGB")` does (as
    `transformers.image_utils.load_image`). 16-bit greyscale keeps its high byte, as Pillow keeps it of 16-bit RGB;
    32-bit integers and floats, whose range nothing states, are clipped to 0..255 as Pillow does. Of an animation the
    first frame is taken. The format is told by the bytes, never by the name.

    Args:
        source: path; http(s) URL (do not pass on URLs of strangers: it is fetched from this machine); bytes of a
            file; PIL image; numpy (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), uint8 or uint16; torch (H, W) or
            (C, H, W) with C 1, 3 or 4, uint8 or uint16.
        max_pixels: an image with more is refused before any pixel is decoded.
    Returns:
        The image itself when it was an upright RGB PIL image, a new one otherwise.
    Raises:
        ImageError: its subclass, and `kind`, say what is wrong. Nothing else is raised, whatever the source.
    """
    image = _decode(source, max_pixels, None)
    assert isinstance(image, Image.Image)
    return image


class _Jpeg(NamedTuple):
    """The pixels of a JPEG as the file has them, not yet upright."""

    pixels: np.ndarray  # uint8 (H, W, 3), or (H, W, 4) whose fourth byte means nothing
    eighths: int  # how large they are, in eighths of the picture's sides, rounded up
    turn: Image.Transpose | None  # what makes them upright
    size: tuple[int, int]  # (width, height) of the whole picture, upright


# (width, height) of an upright JPEG → "RGB" or "RGBX", and how large it is to be decoded, in eighths; None: by Pillow
_Plan = Callable[[tuple[int, int]], tuple[str, int] | None]


def _decode(source: ImageSource, max_pixels: int, plan: _Plan | None, name: str | None = None) -> Image.Image | _Jpeg:
    """`decode`; with a `plan`, a JPEG in a file that libjpeg-turbo takes is a _Jpeg instead. `name`: of bytes."""
    if isinstance(source, Image.Image):
        return _from_pillow(source, max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, "H, W, C", max_pixels)
    if isinstance(source, Tensor):
        try:
            array = source.detach().cpu().numpy()
        except Exception as error:  # sparse, meta, bfloat16
            raise NotAnImage(f"the tensor cannot be read as an image: {error}. Give (C, H, W), torch.uint8.") from error
        return _from_array(np.moveaxis(array, 0, -1) if array.ndim == 3 else array, "C, H, W", max_pixels)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_stream(io.BytesIO(source), name or f"image of {len(source)} bytes", max_pixels, plan)
    if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
        return _from_stream(io.BytesIO(download(source)), source, max_pixels, plan)
    if isinstance(source, str | os.PathLike):
        return _from_path(os.fsdecode(source), max_pixels, plan)
    raise NotAnImage(
        f"{type(source).__name__} is not an image. Give a path, a URL, the bytes of a file, a PIL image, "
        "a numpy array (H, W, C) or a torch tensor (C, H, W) of uint8."
    )


def _from_path(path: str, max_pixels: int, plan: _Plan | None) -> Image.Image | _Jpeg:
    if not path:
        raise ImageNotFound("the path is empty.")
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            raise ImageUnreadable(f"{path}: {'a directory' if stat.S_ISDIR(mode) else 'a device or pipe'}, not a file.")
        with Path(path).open("rb") as stream:
            return _from_stream(stream, path, max_pixels, plan)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "a link that leads nowhere" if Path(path).is_symlink() else "no such file"
        raise ImageNotFound(f"{path}: {reason}.") from error
    except OSError as error:
        raise ImageUnreadable(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL or a lone surrogate: no file can have this name
        raise ImageNotFound(f"{path!r}: no such file; the name itself is impossible ({error}).") from error


def _from_stream(stream: IO[bytes], name: str, max_pixels: int, plan: _Plan | None) -> Image.Image | _Jpeg:
    head = stream.read(64)
    kind = next((kind for kind, (signature, _) in READERS.items() if signature.match(head)), None)
    if kind is None:
        begin = f"it begins with {head[:12]!r}, as none of {', '.join(READERS)} does" if head else "it is empty"
        raise NotAnImage(f"{name}: not an image: {begin}.")
    reader = READERS[kind][1]
    if reader is None:
        reader = heic_reader(name) if kind == "HEIC" else avif_reader(name)

    def read() -> Image.Image | _Jpeg:
        if kind == "WebP":  # whose reader allocates the whole canvas on opening
            _check_pixels(_webp_size(head), name, max_pixels)
        stream.seek(0)
        # without a file name, so that Pillow does not map a file that may shrink meanwhile
        image = reader(stream, "")
        _check_pixels(image.size, name, max_pixels)
        if plan is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            jpeg = _turbo(image, stream, plan)
            if jpeg is not None:
                return jpeg
        image.load()
        return image

    return _upright_rgb(read, name, kind, max_pixels)


def _turbo(image: JpegImagePlugin.JpegImageFile, stream: IO[bytes], plan: _Plan) -> _Jpeg | None:
    """The pixels of an opened JPEG by simplejpeg, equal to Pillow's bit for bit.

    None where simplejpeg is missing, where the file is of a kind whose equality is not tested, or where there is
    anything at all to complain of: Pillow then decodes, and judges what is damage.
    """
    if image.mode != "L" and (image.mode != "RGB" or JpegImagePlugin.get_sampling(image) < 0):
        return None  # CMYK, 4:4:0, 4:1:1
    try:
        import simplejpeg
    except ImportError:
        return None
    width, height = image.size
    turn = _UPRIGHT.get(exif_orientation(image))
    size = (height, width) if turn in _QUARTER_TURNS else (width, height)
    planned = plan(size)
    if planned is None:
        return None
    colours, eighths = planned
    rows, columns = (math.ceil(side * eighths / 8) for side in (height, width))
    stream.seek(0)
    data = stream.read(4 * width * height + 2**24)  # no file of sense is longer; of one with gigabytes behind, a part
    try:
        pixels = simplejpeg.decode_jpeg(data, colours, min_height=rows, min_width=columns)
    except Exception:
        return None
    if pixels.shape[:2] != (rows, columns):
        return None
    return _Jpeg(pixels, eighths, turn, size)


def _from_pillow(image: Image.Image, max_pixels: int) -> Image.Image | _Jpeg:
    filename = getattr(image, "filename", "")
    name = os.fsdecode(filename) if filename else "the PIL image"

    def read() -> Image.Image:
        _check_pixels(image.size, name, max_pixels)
        image.load()  # may be open only
        return image

    return _upright_rgb(read, name, image.format or image.mode, max_pixels)


def _from_array(array: np.ndarray, axes: str, max_pixels: int) -> Image.Image:
    """`array` is H, W or H, W, C by now; `axes` are the ones to name in errors."""
    kind = "tensor" if axes == "C, H, W" else "array"
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        hint = " Floats have been preprocessed already: give those to the model." if array.dtype.kind == "f" else ""
        raise NotAnImage(f"the {kind} is {array.dtype}; an image is uint8, 0 to 255.{hint}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)) or 0 in array.shape:
        given = (*array.shape[-1:], *array.shape[:-1]) if kind == "tensor" and array.ndim == 3 else array.shape
        raise NotAnImage(f"the {kind} has shape {tuple(given)}; one image is ({axes}) with C 1, 3 or 4, or (H, W).")
    _check_pixels((array.shape[1], array.shape[0]), f"the {kind}", max_pixels)
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    if array.ndim == 3:
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _upright_rgb(read: Callable[[], Image.Image | _Jpeg], name: str, kind: str, max_pixels: int) -> Image.Image | _Jpeg:
    """Run `read`, which gives a loaded image, and make that upright RGB; whatever goes wrong becomes an ImageError."""
    try:
        try:
            image = read()
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            with _pillow_limit(max_pixels):
                image = read()
        if isinstance(image, _Jpeg):
            return image
        orientation = exif_orientation(image)
        image = _rgb(image)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
            image.info = {}  # or the next reader would turn it again
        return image
    except ImageError:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged input
        raise _image_error(error, name, kind, max_pixels) from error


def exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:
        return 1  # metadata that cannot be read, of pixels that are whole


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Pillow reads a 16-bit PNG or PGM as "I;16" or as "I", by version, and a signed TIFF as "I"
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF BitsPerSample: 12 in some
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM", "TIFF") and bits <= 16):
        return Image.fromarray((np.maximum(np.asarray(image), 0) >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info:  # dropped like any alpha; Pillow would warn about it
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height == 0:
        raise NotAnImage(f"{name}: {width} × {height}, no pixels at all.")
    if width * height > max_pixels:
        raise _too_large(name, f"{width} × {height} = {width * height:,}", max_pixels)


def _webp_size(head: bytes) -> tuple[int, int]:
    """(width, height) in the header: 24 bits each for the extended form, 14 for lossless and lossy."""
    if head[12:16] == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _too_large(name: str, pixels: str, max_pixels: int) -> ImageTooLarge:
    return ImageTooLarge(
        f"{name}: {pixels} pixels; the limit is {max_pixels:,}. "
        "If the image is to be trusted, raise max_pixels (--max-pixels)."
    )


def _image_error(error: Exception, name: str, kind: str, max_pixels: int) -> ImageError:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        found = re.search(r"(\d+) pixels", reason)  # the size is in Pillow's words only
        return _too_large(name, f"{int(found[1]):,}" if found else "too many", max_pixels)
    if isinstance(error, MemoryError):
        return ImageTooLarge(f"{name}: not enough memory to decode it.")
    if isinstance(error, OSError) and error.errno is not None:
        return ImageUnreadable(f"{name}: {error.strerror or reason}.")
    return ImageCorrupt(f"{name}: a {kind} image, damaged or cut short: {reason[:200]}.")


_limit_lock = threading.Lock()


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Raise Pillow's own, process-wide limit to `max_pixels` for one image; some of its readers know no other."""
    with _limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None:
            Image.MAX_IMAGE_PIXELS = max(limit, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def avif_reader(name: str) -> type[ImageFile.ImageFile]:
    try:
        from PIL import AvifImagePlugin
    except ImportError as error:
        raise ImageUnreadable(f"{name}: an AVIF image, which Pillow reads from 11.3 on: upgrade Pillow.") from error
    if not AvifImagePlugin.SUPPORTED:
        raise ImageUnreadable(f"{name}: an AVIF image, and this Pillow is built without AVIF.")
    return AvifImagePlugin.AvifImageFile


def heic_reader(name: str) -> type[ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageUnreadable(f"{name}: a HEIC image. {MissingExtra('pillow-heif', 'heif')}") from error
    return HeifImageFile


def download(url: str) -> bytes:
    """The bytes behind an http(s) URL, within limits of size and time.

    Raises:
        ImageNotFound, ImageTooLarge, ImageUnreadable: with the URL and the reason.
    """
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    data = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "opsin"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            promised = response.length or 0
            while chunk := response.read1(2**16):
                data += chunk
                if len(data) > MAX_DOWNLOAD_BYTES:
                    raise ImageTooLarge(
                        f"{url}: more than {MAX_DOWNLOAD_BYTES:,} bytes, the limit for a download. "
                        "Download the file and give its path."
                    )
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {DOWNLOAD_SECONDS} seconds")
        if len(data) < promised:
            raise ConnectionError(f"it ended after {len(data):,} of {promised:,} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        kind = ImageNotFound if error.code in (404, 410) else ImageUnreadable
        raise kind(f"{url}: the download failed: {error}.") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise ImageUnreadable(f"{url}: the download failed: {error or type(error).__name__}.") from error
    return bytes(data)


# ── PreprocessConfig: RGB → pixels ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessConfig:
    """How an image becomes pixels; the defaults are those of google/vit-base-patch16-224 on Hugging Face.

    Steps in order, each left out by None: `source_crop`, `size`, `crop_size`, `rescale_factor`, `mean` and `std`.
    """

    source_crop: tuple[float, float] | None = None  # (H, W) centre crop, as fractions of the shorter edge (Perceiver)
    size: tuple[int, int] | int | None = (224, 224)  # pixels: (H, W), aspect not kept; int: the shorter edge, kept
    resample: Resample = "bilinear"
    antialias: bool = True  # Pillow. False: bilinear as TensorFlow, floats, not rounded; bicubic as OpenCV, bytes
    crop_size: tuple[int, int] | None = None  # (H, W) pixels, centre crop, padded with black where the image is smaller
    crop_rounding: Literal["down", "half_even", "up"] = "down"  # of an odd margin: transformers, timm, DeepMind
    rescale_factor: float | None = 1 / 255
    mean: tuple[float, float, float] | None = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] | None = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("size", "crop_size"):
            sides = getattr(self, name)
            if isinstance(sides, list):  # as JSON has it
                object.__setattr__(self, name, sides := tuple(sides))
            if name == "size" and isinstance(sides, int):
                sides = (sides, sides)
            if sides is not None and not _is_size(sides):
                raise ValueError(f"{name} is {sides!r}; it must be (H, W) in pixels, each at least 1, or None.")
        for name, count in (("source_crop", 2), ("mean", 3), ("std", 3)):
            if (values := getattr(self, name)) is None:
                continue
            if len(values) != count or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} is {values}; it must be {count} finite numbers, or None.")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if self.rescale_factor is not None:
            object.__setattr__(self, "rescale_factor", float(self.rescale_factor))
        if self.source_crop is not None and min(self.source_crop) <= 0:
            raise ValueError(f"source_crop is {self.source_crop}; it must be fractions above 0, as (0.875, 0.875).")
        if self.resample not in RESAMPLES:
            near = difflib.get_close_matches(str(self.resample), RESAMPLES, 1)
            hint = f'Did you mean "{near[0]}"? ' if near else ""
            raise ValueError(f'resample is "{self.resample}". {hint}Known: {", ".join(RESAMPLES)}.')
        if not self.antialias and (self.resample not in PLAIN_RESIZES or not isinstance(self.size, tuple)):
            raise ValueError(
                f'antialias=False goes with resample "bilinear" or "bicubic" and size (H, W), not "{self.resample}" '
                f"and {self.size}."
            )
        if self.crop_rounding not in ("down", "half_even", "up"):
            raise ValueError(f'crop_rounding is "{self.crop_rounding}". Known: down, half_even, up.')
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean is {self.mean} and std is {self.std}; give both or neither.")
        if self.std is not None and 0 in self.std:
            raise ValueError(f"std is {self.std}; pixels cannot be divided by 0.")

    @classmethod
    def jax_squash(cls, image_size: int | tuple[int, int] = 224) -> "PreprocessConfig":
        """The JAX release: the whole image squashed to `image_size` without antialiasing, (x − 127.5) / 127.5."""
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        half = (127.5, 127.5, 127.5)
        return cls(size=size, antialias=False, rescale_factor=None, mean=half, std=half)

    @classmethod
    def timm_crop(
        cls,
        image_size: int = 224,
        *,
        crop_pct: float = 0.9,
        resample: Resample = "bicubic",
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    ) -> "PreprocessConfig":
        """timm's evaluation: the shorter edge to `image_size / crop_pct`, then the centre `image_size` square."""
        return cls(
            size=math.floor(image_size / crop_pct),
            crop_size=(image_size, image_size),
            crop_rounding="half_even",
            resample=resample,
            mean=mean,
            std=std,
        )

    @classmethod
    def deepmind_perceiver(cls, image_size: tuple[int, int] = (224, 224)) -> "PreprocessConfig":
        """DeepMind's Perceiver IO: the central square of ⅞ of the shorter edge, resized by OpenCV's bicubic.

        Source: deepmind-research `perceiver/colabs/imagenet_classification.ipynb`.
        """
        return cls(
            source_crop=(0.875, 0.875),
            crop_rounding="up",
            size=image_size,
            resample="bicubic",
            antialias=False,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the pixels.

        Raises:
            ValueError: the images keep sizes of their own, so they have no common one.
        """
        if self.crop_size is not None:
            return self.crop_size
        if isinstance(self.size, tuple):
            return self.size
        raise ValueError(
            f"with size={self.size} and no crop_size every image keeps a size of its own. "
            "Set size=(H, W) or crop_size=(H, W)."
        )

    def __call__(self, source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Pixels (3, H, W) float32 of one image; see `decode` for what an image may be, and for its errors."""
        return self.normalise(self.resize(decode(source, max_pixels=max_pixels)))

    def load(
        self,
        source: ImageSource,
        *,
        name: str | None = None,
        max_pixels: int = MAX_PIXELS,
        decode: Decode = "exact",
        exact_resize: bool = False,
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """What `resize` gives of what `decode` gives, and (width, height) of the upright original; quicker for JPEG.

        With simplejpeg (libjpeg-turbo) a JPEG's pixels are Pillow's to the bit. Where a bilinear resize makes each side
        at least 1.5 times smaller, torch computes it, and its bytes differ from Pillow's by at most 1 (about one in a
        thousand does). All else is to the bit what `resize(decode(source))` is.

        Args:
            source, max_pixels: as for `decode`.
            name: of an image that is bytes, in errors.
            decode: "fast" reads a large JPEG at a half, a quarter or the like, at least twice as large as what the
                resize makes of it; `drift` measures what that costs. Without antialiasing, which would then see another
                picture, with a filter that only picks pixels, and for other formats it is "exact".
            exact_resize: leave every resize to Pillow.
        Raises:
            ImageError: as `decode` and `resize`, whichever way is taken.
            ValueError: an unknown `decode`.
        """
        if decode not in ("exact", "fast"):
            raise ValueError(f'decode is "{decode}". Known: exact, fast.')
        plan = partial(self._plan, fast=decode == "fast", exact_resize=exact_resize)
        found = _decode(source, max_pixels, plan, name)
        if isinstance(found, Image.Image):
            return self.resize(found), found.size
        return np.ascontiguousarray(self._resize_jpeg(found)), found.size

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resized and cropped (H, W, 3): uint8, or float32 in 0..255 for bilinear without antialias.

        Args:
            image: upright RGB, as `decode` gives it.
        Raises:
            ImageTooLarge: without a crop, so thin an image that with its shorter edge at `size` it would have over
                MAX_PIXELS.
        """
        if self.source_crop is not None:
            # not Image.crop: it warns on large ones
            cropped = _centre_crop(np.asarray(image), self._cropped(image.size), self.crop_rounding)
            image = _pillow(np.ascontiguousarray(cropped))
        if self.size is None:
            pixels = np.asarray(image)
        elif not self.antialias:
            pixels = PLAIN_RESIZES[self.resample](np.asarray(image), self.size)  # type: ignore[arg-type]  # checked above
        else:
            height, width = self._resized(image.size)
            box = (0.0, 0.0, float(image.width), float(image.height))
            if height * width > MAX_PIXELS and self.crop_size is not None:
                (height, top, bottom), (width, left, right) = (
                    _kept(*lengths, self.crop_rounding)
                    for lengths in zip((image.height, image.width), (height, width), self.crop_size, strict=True)
                )
                box = (left, top, right, bottom)
            pixels = np.asarray(image.resize((width, height), Image.Resampling(RESAMPLES.index(self.resample)), box))
        if self.crop_size is not None:
            pixels = _centre_crop(pixels, self.crop_size, self.crop_rounding)
        return pixels

    def _plan(self, size: tuple[int, int], *, fast: bool, exact_resize: bool) -> tuple[str, int] | None:
        """A _Plan. RGB is for torch and numpy; of RGBX Pillow makes an image without a copy."""
        if self.size is None or not self.antialias:
            return "RGB", 8
        kept = size if self.source_crop is None else self._cropped(size)[::-1]
        height, width = self._resized(kept)
        shrink = min(kept[0] / width, kept[1] / height)
        whole = height * width <= MAX_PIXELS  # or only what the crop keeps of it may be made
        if fast and whole and self.resample != "nearest" and kept[0] <= size[0] and kept[1] <= size[1]:
            # 3/8, 5/8 and so on are slower than the next of these: their transforms are not vectorised
            eighths = next((count for count in (1, 2, 4) if 8 / count <= shrink / 2), 8)
            if eighths < 8:
                return "RGBX", eighths
        if whole and self.resample == "bilinear" and shrink >= QUICK_SHRINK and not exact_resize:
            return "RGB", 8
        return ("RGBX", 8) if size[0] * size[1] >= LARGE_PIXELS else None

    def _resize_jpeg(self, jpeg: _Jpeg) -> np.ndarray:
        """`resize`, as `_plan` planned it."""
        if jpeg.eighths < 8:
            pixels = self._resize_reduced(jpeg)
        elif jpeg.pixels.shape[2] == 4:
            return self.resize(_upright_pillow(jpeg))[..., :3]
        else:
            pixels = _TURNED[jpeg.turn](jpeg.pixels)
            if self.source_crop is not None:
                pixels = _centre_crop(pixels, self._cropped(jpeg.size), self.crop_rounding)
            if self.size is not None and self.antialias:
                pixels = _resize_torch(pixels, self._resized(pixels.shape[1::-1]))
            elif self.size is not None:
                pixels = PLAIN_RESIZES[self.resample](pixels, self.size)  # type: ignore[arg-type]  # checked above
        if self.crop_size is not None:
            pixels = _centre_crop(pixels, self.crop_size, self.crop_rounding)
        return pixels

    def _resize_reduced(self, jpeg: _Jpeg) -> np.ndarray:
        """The resize of a picture decoded at `jpeg.eighths`, from the very places that the whole one would be."""
        lengths = kept = jpeg.size[::-1]
        starts = [0, 0]
        if self.source_crop is not None:
            kept = self._cropped(jpeg.size)
            starts = [_centre(*sides, self.crop_rounding)[0] for sides in zip(lengths, kept, strict=True)]
        turned = _TURNED[jpeg.turn](jpeg.pixels)
        scale = jpeg.eighths / 8
        spans = []
        for axis in (0, 1):
            # A reduced side is rounded up at its far end, which is the near one where the picture is mirrored.
            surplus = turned.shape[axis] - lengths[axis] * scale if turned.strides[axis] < 0 else 0
            start = starts[axis] * scale + surplus
            spans.append((start, start + kept[axis] * scale))
        (top, bottom), (left, right) = spans
        height, width = self._resized(kept[::-1])
        resample = Image.Resampling(RESAMPLES.index(self.resample))
        resized = _upright_pillow(jpeg).resize((width, height), resample, (left, top, right, bottom))
        return np.asarray(resized)[..., :3]

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3), as `resize` gives it, to (3, H, W) float32, contiguous."""
        return self.normalise_batch([pixels])[0]

    def normalise_batch(self, images: Sequence[np.ndarray]) -> Tensor:
        """B images (H, W, 3), as `resize` or `load` gives them, to (B, 3, H, W) float32: `normalise` of each, stacked.

        Raises:
            ValueError: no images, or not all of one shape (H, W, 3).
        """
        if len(images) == 0:
            raise ValueError("no images: the list is empty. Give at least one.")
        shape = images[0].shape
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(f"pixels have shape {shape}; they must be (H, W, 3).")
        batch = np.empty((len(images), 3, *shape[:2]), np.float32)
        for index, (pixels, out) in enumerate(zip(images, batch, strict=True)):
            if pixels.shape != shape:
                raise ValueError(f"image {index} of the batch has shape {pixels.shape} and the first {shape}.")
            self._write_normalised(pixels, out)
        return torch.from_numpy(batch)

    def region(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Where the pixels lie in an image: left, top, right, bottom, in pixels of the upright original.

        Beyond the image where a crop pads: negative, or more than its width and height.

        Args:
            size: (width, height) of the upright original.
        """
        kept = size[::-1] if self.source_crop is None else self._cropped(size)
        resized = kept if self.size is None else self._resized(kept[::-1])
        spans = []
        for length, inner, side, crop in zip(size[::-1], kept, resized, self.crop_size or resized, strict=True):
            start, _ = _centre(length, inner, self.crop_rounding)
            spans.append([start + edge * inner / side for edge in _centre(side, crop, self.crop_rounding)])
        (top, bottom), (left, right) = spans
        return left, top, right, bottom

    def spec(self) -> dict[str, Any]:
        """Every field as JSON has it; `from_spec` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "PreprocessConfig":
        """
        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        for key in spec:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f'Did you mean "{near[0]}"? ' if near else ""
                raise ValueError(f'no preprocessing field "{key}". {hint}Known: {", ".join(known)}.')
        return cls(**spec)

    def hash(self) -> str:
        """16 hex digits, the same on every machine: results carry them to say how their pixels were made."""
        return hashlib.sha256(json.dumps(self.spec(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]

    def _cropped(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of what `source_crop` keeps of (width, height)."""
        assert self.source_crop is not None
        height, width = (max(1, int(fraction * min(size))) for fraction in self.source_crop)
        return height, width

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) that (width, height) is resized to."""
        if isinstance(self.size, tuple):
            return self.size
        assert self.size is not None
        short, long = sorted(size)
        grown = int(self.size * long / short)
        if self.size * grown > MAX_PIXELS and self.crop_size is None:
            raise ImageTooLarge(
                f"{size[0]} × {size[1]} pixels: with the shorter edge at {self.size} the longer would be "
                f"{grown:,}. Crop the image first."
            )
        return (grown, self.size) if size[0] <= size[1] else (self.size, grown)

    def _write_normalised(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """(H, W, 3) to `out`, (3, H, W) float32."""
        planes = pixels.transpose(2, 0, 1)
        if pixels.dtype != np.uint8:
            out[...] = self._normalise(planes)
        elif (divisor := _divisor(self)) is None:
            for plane, table, place in zip(planes, _normalised_bytes(self), out, strict=True):
                np.take(table, plane, out=place, mode="clip")  # "raise" would copy
        else:
            out[...] = planes
            _divide_normalise(out, divisor, self)

    def _normalise(self, values: np.ndarray) -> np.ndarray:
        """(3, …) of any real type to float32, in the operations and precisions of transformers."""
        if self.rescale_factor is not None:
            values = values.astype(np.float64) * self.rescale_factor
        values = values.astype(np.float32)
        if self.mean is not None:
            mean, std = (np.array(x, np.float32).reshape(3, *[1] * (values.ndim - 1)) for x in (self.mean, self.std))
            values = (values - mean) / std
        return values


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value)


@lru_cache(maxsize=32)
def _normalised_bytes(config: PreprocessConfig) -> np.ndarray:
    """(3, 256) float32: what each byte becomes. Looking it up is exact, and faster than computing."""
    return config._normalise(np.broadcast_to(np.arange(256), (3, 256)))


@lru_cache(maxsize=32)
def _divisor(config: PreprocessConfig) -> float | None:
    """What bytes are divided by, in float32, to be `_normalise`'s to the bit once mean and std are applied; or None.

    For 1/255 it is 255, and quicker than looking bytes up: one float32 operation at a time on whole planes.
    """
    divisor = 1.0 if config.rescale_factor is None else 1 / config.rescale_factor if config.rescale_factor else math.inf
    values = np.broadcast_to(np.arange(256, dtype=np.float32), (3, 1, 256)).copy()
    with np.errstate(all="ignore"):
        _divide_normalise(values, divisor, config)
    return divisor if np.array_equal(values[:, 0], _normalised_bytes(config)) else None


def _divide_normalise(values: np.ndarray, divisor: float, config: PreprocessConfig) -> None:
    """(3, H, W) float32, in place."""
    if divisor != 1:
        np.divide(values, np.float32(divisor), out=values)
    if config.mean is not None:
        mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (config.mean, config.std))
        np.subtract(values, mean, out=values)
        np.divide(values, std, out=values)


def _pillow(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) as RGB, or (H, W, 4) as RGBX, which shares the memory."""
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    return Image.frombuffer("RGBX", pixels.shape[1::-1], pixels, "raw", "RGBX", 0, 1)


def _upright_pillow(jpeg: _Jpeg) -> Image.Image:
    image = _pillow(jpeg.pixels)
    return image if jpeg.turn is None else image.transpose(jpeg.turn)


def _resize_torch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to (*size, 3) uint8: bilinear, antialiased, in integers. A turned view is turned afterwards."""
    flips = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in pixels.strides[:2])
    stored = pixels[flips]
    lying = stored.strides[0] < stored.strides[1]
    if lying:
        stored, size = stored.swapaxes(0, 1), size[::-1]
    planes = torch.from_numpy(stored).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return (resized.swapaxes(0, 1) if lying else resized)[flips]


def _centre_crop(pixels: np.ndarray, size: tuple[int, int], rounding: str) -> np.ndarray:
    """The centre of (H, W, C), a view; with black around it where the image is smaller."""
    (top, bottom), (left, right) = (
        _centre(length, crop, rounding) for length, crop in zip(pixels.shape[:2], size, strict=True)
    )
    inside = pixels[max(top, 0) : bottom, max(left, 0) : right]
    if inside.shape[:2] == size:
        return inside
    canvas = np.zeros((*size, pixels.shape[2]), pixels.dtype)
    top, left = max(-top, 0), max(-left, 0)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return canvas


def _kept(length: int, resized: int, crop: int, rounding: str) -> tuple[int, float, float]:
    """Of one axis that will be resized and cropped: how long what the crop keeps is, and where it comes from."""
    start, stop = _centre(resized, crop, rounding)
    start, stop = max(start, 0), min(stop, resized)
    return stop - start, start * length / resized, stop * length / resized


def _centre(length: int, crop: int, rounding: str) -> tuple[int, int]:
    """Start and stop of the crop on one axis; start is negative where the image is shorter."""
    margin = length - crop
    if rounding == "down":
        start = margin // 2
    elif rounding == "up":
        start = (margin + 1) // 2
    elif margin >= 0:
        start = round(margin / 2)  # half goes to the even side
    else:
        start = -(-margin // 2)  # torchvision pads the odd pixel behind
    return start, start + crop


def _resize_tensorflow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to (*size, 3) float32, as `tf.image.resize`: bilinear, half-pixel centres, no antialiasing."""
    (top, bottom, down), (left, right, across) = (
        _taps(length, out) for length, out in zip(pixels.shape[:2], size, strict=True)
    )
    down, across = down[:, None, None], across[:, None]

    def blend(rows: np.ndarray) -> np.ndarray:
        first, second = rows[:, left].astype(np.float32), rows[:, right].astype(np.float32)
        return first + (second - first) * across

    upper, lower = blend(pixels[top]), blend(pixels[bottom])
    return upper + (lower - upper) * down


def _taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output place on one axis: the two places read, and the weight of the second; float32 throughout."""
    scale = np.float32(length) / np.float32(out)
    place = (np.arange(out, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    low = np.floor(place)
    first = np.maximum(low, 0).astype(np.intp)
    second = np.minimum(np.ceil(place), length - 1).astype(np.intp)
    return first, second, place - low


def _resize_opencv(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to (*size, 3) uint8, as `cv2.resize` with INTER_CUBIC: a = -0.75, no antialiasing.

    To the bit, but for a few ties, what OpenCV computes on an x86 with Intel's library, which its packages bring.
    OpenCV's own code has weights in 2048ths instead: up to 5 % of its bytes differ, by one.
    """
    (rows, down), (columns, across) = (
        _cubic_taps(length, out) for length, out in zip(pixels.shape[:2], size, strict=True)
    )
    lines = pixels[rows.ravel()]  # 4·H' W 3: all that a small result reads of a large image
    lines = sum(lines[:, columns[:, tap]] * across[:, tap, None] for tap in range(4)).reshape(size[0], 4, size[1], 3)
    values = sum(lines[:, tap] * down[:, tap, None, None] for tap in range(4))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _cubic_taps(length: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """For each output place on one axis: the four places read (out, 4), repeating the edge, and their weights."""
    place = (np.arange(out) + 0.5) * (length / out) - 0.5
    low = np.floor(place)
    x, a = place - low, -0.75
    first, last = (((a * t - 5 * a) * t + 8 * a) * t - 4 * a for t in (1 + x, 2 - x))
    second, third = (((a + 2) * t - (a + 3)) * t * t + 1 for t in (x, 1 - x))
    taps = np.clip(low.astype(np.intp)[:, None] + np.arange(-1, 3), 0, length - 1)
    return taps, np.stack([first, second, third, last], axis=1)


PLAIN_RESIZES = {"bilinear": _resize_tensorflow, "bicubic": _resize_opencv}  # without antialiasing


# ── drift: what the fast decode costs ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the pixels of the fast decode are from those of the exact one, in steps of a byte."""

    images: int  # how many were read both ways
    mean: float  # over all their bytes
    max: float


def drift(sources: Iterable[ImageSource], config: PreprocessConfig, *, max_pixels: int = MAX_PIXELS) -> Drift:
    """Compare `load` of the two kinds of `decode`; sources that cannot be read are left out.

    Raises:
        ValueError: none of the sources can be read.
    """
    means, peaks = [], []
    for source in sources:
        try:
            exact, fast = (config.load(source, max_pixels=max_pixels, decode=kind)[0] for kind in ("exact", "fast"))
        except ImageError:
            continue
        difference = np.abs(exact.astype(np.float32) - fast)
        means.append((difference.mean(dtype=np.float64), difference.size))
        peaks.append(float(difference.max()))
    if not peaks:
        raise ValueError("no image could be read, so the drift of the fast decode is not known.")
    total = sum(size for _, size in means)
    return Drift(len(peaks), float(sum(mean * size for mean, size in means) / total), max(peaks))
