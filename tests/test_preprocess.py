"""decode: whatever comes in is upright RGB or an ImageError. PreprocessConfig: what it refuses, and how it is named."""

import dataclasses
import http.server
import io
import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import AvifImagePlugin, Image, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin

from opsin import preprocess
from opsin.checkpoints.processors import read_hf, read_timm, write_hf
from opsin.errors import ImageCorrupt, ImageError, ImageNotFound, ImageTooLarge, ImageUnreadable, NotAnImage
from opsin.preprocess import Drift, PreprocessConfig, decode, drift, is_image_name

NOISE = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)
PICTURE = Image.fromarray(NOISE)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def array(source: Any) -> np.ndarray:
    image = decode(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# ── what an image may be ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_source_is_the_same_image(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.txt"
    path.write_bytes(encoded(PICTURE, "PNG"))
    chw = torch.from_numpy(NOISE).permute(2, 0, 1)
    alpha = np.dstack([NOISE, np.zeros((7, 11), np.uint8)])
    data = path.read_bytes()
    sources = [str(path), path, data, bytearray(data), memoryview(data), PICTURE, Image.open(path), NOISE, chw, alpha]
    sources += [NOISE.astype(np.uint16) * 257, torch.from_numpy(alpha).permute(2, 0, 1), NOISE[::-1][::-1]]
    for source in sources:
        assert np.array_equal(array(source), NOISE)


def test_grey_arrays_and_tensors() -> None:
    grey = NOISE[..., 0]
    expected = np.dstack([grey] * 3)
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        assert np.array_equal(array(source), expected)


def test_an_upright_rgb_image_is_not_copied() -> None:
    assert decode(PICTURE) is PICTURE


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_alpha_is_dropped_not_blended(mode: str) -> None:
    """All of it transparent, and the colours come through."""
    image = PICTURE.quantize(256) if mode == "P" else PICTURE.convert(mode)
    expected = np.asarray(image.convert("RGB"))
    if mode == "P":
        data = encoded(image, "PNG", transparency=bytes(256))
    else:
        image.putalpha(0)
        data = encoded(image, "PNG")
    assert np.array_equal(array(data), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str, order: str) -> None:
    values = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFEFF, 0xFFFF]], np.uint16)
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (4, 2), values.astype(f"{order}u2").tobytes())
    expected = (values >> 8).astype(np.uint8)
    if kind == "PPM":
        source: Any = b"P5 4 2 65535\n" + values.astype(">u2").tobytes()
    else:
        source = encoded(image, kind)
    for form in (source, image, values.astype(f"{order}u2"), torch.from_numpy(values)):
        assert np.array_equal(array(form), np.dstack([expected] * 3))


def test_12_bit_tiff_is_scaled_from_12_bits() -> None:
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}  # two pixels: 0xFFF, 0x800
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 12) + b"\xff\xf8\x00\0" + struct.pack("<H", len(tags)) + entries + b"\0" * 4
    assert array(data)[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (11, 7), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "MPO" else {}
    got = array(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.abs(got.astype(int) - [255, 0, 0]).max() < 3


def test_cmyk_jpeg() -> None:
    data = encoded(PICTURE.convert("CMYK"), "JPEG")
    assert np.array_equal(array(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_avif() -> None:
    if not AvifImagePlugin.SUPPORTED:
        pytest.skip("this Pillow is built without AVIF")
    smooth = Image.linear_gradient("L").resize((32, 24)).convert("RGB")
    got = array(encoded(smooth, "AVIF", quality=95))
    assert np.abs(got.astype(int) - np.asarray(smooth)).max() < 12


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra `heif` is not installed")
    stream = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 40, 90))).save(stream, quality=95)
    got = array(stream.getvalue())
    assert got.shape == (48, 64, 3)
    assert np.abs(got.astype(int) - (200, 40, 90)).max() < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int, tmp_path: Path) -> None:
    """Held as photographed, each of the eight ways gives the same upright picture: red top left, lime top right."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[:8, 12:], upright[8:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: np.rot90,  # stored a quarter turn against the clock
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(stored, kind, exif=exif.tobytes(), **options)
    image = decode(data)
    assert image.size == (24, 16)
    assert np.abs(np.asarray(image).astype(int) - upright).max() < 8
    assert np.array_equal(array(image), np.asarray(image)), "turned twice"
    assert np.array_equal(array(Image.open(io.BytesIO(data))), np.asarray(image))


def test_damaged_exif_leaves_the_pixels() -> None:
    data = encoded(PICTURE, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert np.array_equal(array(data), NOISE)


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    for index, kind in enumerate(("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")):
        (tmp_path / str(index)).write_bytes(encoded(PICTURE, kind))
    paths = sorted(tmp_path.iterdir()) * 20
    expected = {path: array(path) for path in paths}
    with ThreadPoolExecutor(8) as pool:
        for path, got in zip(paths, pool.map(array, paths), strict=True):
            assert np.array_equal(got, expected[path])


def test_image_names() -> None:
    names: list[str | Path] = ["a.jpg", "b.JPEG", Path("c/d.Webp"), "e.heic", "f.tiff", "g.avif"]
    assert all(is_image_name(name) for name in names)
    assert not any(
        is_image_name(name) for name in ["a.txt", "jpg", ".jpg", "a.jpg.part", "model.safetensors", "x.svg", "y.ico"]
    )


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def png_claiming(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels should begin."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return header + struct.pack(">I", 9) + b"IDAT"


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
AVIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif"
BAD: dict[str, tuple[Any, type[ImageError], str]] = {
    "empty path": ("", ImageNotFound, "the path is empty"),
    "no file": ("nowhere/cat.jpg", ImageNotFound, "nowhere/cat.jpg: no such file."),
    "file as folder": (f"{__file__}/cat.jpg", ImageNotFound, "no such file"),
    "impossible name": ("a\0b.jpg", ImageNotFound, "the name itself is impossible"),
    "long name": ("x" * 5000, ImageUnreadable, "name too long"),
    "directory": (Path(__file__).parent, ImageUnreadable, "a directory, not a file"),
    "device": ("/dev/null", ImageUnreadable, "a device or pipe, not a file"),
    "empty": (b"", NotAnImage, "image of 0 bytes: not an image: it is empty"),
    "text": (b"<html>not found", NotAnImage, r"begins with b'<html>not fo', as none of JPEG, PNG, .*QOI does"),
    "source code": (__file__, NotAnImage, "test_preprocess.py: not an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", NotAnImage, "not an image"),
    "header only": (png_claiming(5, 5), ImageCorrupt, "a PNG image, damaged or cut short"),
    "cut jpeg": (
        encoded(PICTURE, "JPEG")[:-20],
        ImageCorrupt,
        "a JPEG image, damaged or cut short: image file is trun",
    ),
    "cut avif": (AVIF, ImageCorrupt, "an? AVIF image, damaged"),
    "too large": (
        png_claiming(20_000, 10_000),
        ImageTooLarge,
        r"20000 × 10000 = 200,000,000 pixels; the limit is 178,9",
    ),
    "zero pixels": (Image.new("RGB", (0, 5)), NotAnImage, "0 × 5, no pixels at all"),
    "none": (None, NotAnImage, "NoneType is not an image. Give a path, a URL"),
    "list": ([[0]], NotAnImage, "list is not an image"),
    "float array": (NOISE / 255, NotAnImage, "the array is float64; an image is uint8, 0 to 255. Floats have been pre"),
    "int array": (NOISE.astype(int), NotAnImage, "the array is int64"),
    "CHW array": (NOISE.transpose(2, 0, 1), NotAnImage, r"the array has shape \(3, 7, 11\); one image is \(H, W, C\)"),
    "batch": (NOISE[None], NotAnImage, r"the array has shape \(1, 7, 11, 3\)"),
    "line": (NOISE[0, 0], NotAnImage, r"the array has shape \(3,\)"),
    "no rows": (NOISE[:0], NotAnImage, r"the array has shape \(0, 11, 3\)"),
    "HWC tensor": (torch.from_numpy(NOISE), NotAnImage, r"the tensor has shape \(7, 11, 3\); one image is \(C, H, W\)"),
    "float tensor": (torch.zeros(3, 7, 11), NotAnImage, "the tensor is float32; an image is uint8"),
    "bfloat16 tensor": (torch.zeros(3, 7, 11, dtype=torch.bfloat16), NotAnImage, "the tensor cannot be read"),
    "closed": (Image.open(io.BytesIO(encoded(PICTURE, "PNG")[:-40])), ImageCorrupt, "a PNG image, damaged or cut"),
}


@pytest.mark.parametrize(("source", "error", "message"), BAD.values(), ids=BAD)
def test_errors(source: Any, error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=f"(?i){message}") as caught:
        decode(source)
    assert type(caught.value) is error


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "dangling.jpg").symlink_to("gone.jpg")
    with pytest.raises(ImageNotFound, match="a link that leads nowhere"):
        decode(tmp_path / "dangling.jpg")


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(encoded(PICTURE, "PNG"))
    path.chmod(0)
    if os.geteuid() == 0:  # who may read it all the same

        def refuse(*args: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageUnreadable, match="x.png: Permission denied"):
        decode(path)


@pytest.mark.parametrize(
    "error",
    [SyntaxError, struct.error, ValueError, EOFError, zlib.error, IndexError, OSError, UserWarning, Exception],
)
def test_whatever_pillow_raises_is_corruption(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", fail)
    with pytest.raises(ImageCorrupt, match="a JPEG image, damaged or cut short: [a-zA-Z']+"):
        decode(encoded(PICTURE, "JPEG"))


def test_out_of_memory_and_failing_disks_are_not_corruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise errors.pop()

    errors = [OSError(5, "Input/output error"), MemoryError()]
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", fail)
    with pytest.raises(ImageTooLarge, match="not enough memory"):
        decode(encoded(PICTURE, "JPEG"))
    with pytest.raises(ImageUnreadable, match="Input/output error"):
        decode(encoded(PICTURE, "JPEG"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI"])
def test_a_raised_limit_holds_above_pillows_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(PICTURE, kind)
    for limit in (10, 50):  # Pillow would refuse above twice its limit, and warn above it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode(data, max_pixels=77).size == (11, 7)
        with pytest.raises(
            ImageTooLarge, match="11 × 7 = 77 pixels; the limit is 76. If the image is to be trusted, ra"
        ):
            decode(data, max_pixels=76)
        assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    "source", [NOISE, PICTURE, torch.from_numpy(NOISE).permute(2, 0, 1)], ids=["numpy", "pil", "pt"]
)
def test_the_limit_holds_for_images_in_memory(source: Any) -> None:
    assert decode(source, max_pixels=77).size == (11, 7)
    with pytest.raises(ImageTooLarge, match="77 pixels; the limit is 76"):
        decode(source, max_pixels=76)


@pytest.mark.parametrize(
    "options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=["lossy", "lossless", "extended"]
)
def test_webp_is_measured_before_its_canvas_is_allocated(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "_open", None)
    with pytest.raises(ImageTooLarge, match="11 × 7 = 77 pixels"):
        decode(encoded(PICTURE, "WEBP", **options), max_pixels=76)


def test_a_bomb_found_by_pillow_alone_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        Image._decompression_bomb_check((40_000, 40_000))

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", fail)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageTooLarge, match="1,600,000,000 pixels; the limit is 178,956,970"):
        decode(encoded(PICTURE, "TIFF"))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_heic_and_avif_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageUnreadable, match=r'a HEIC image. pillow-heif is not .* pip install "opsin\[heif\]"'):
        decode(HEIC)
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(ImageUnreadable, match="an AVIF image, and this Pillow is built without AVIF"):
        decode(AVIF)


@pytest.fixture
def site() -> Iterator[str]:
    """A web server with /picture.png, /short (which ends early) and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = encoded(PICTURE, "PNG")
            if self.path not in ("/picture.png", "/short"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if self.path == "/picture.png" else data[:50])

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.array_equal(array(f"{site}/picture.png"), NOISE)
    with pytest.raises(ImageNotFound, match=r"/gone.png: the download failed: HTTP Error 404: Not Found\.$"):
        decode(f"{site}/gone.png")
    with pytest.raises(ImageUnreadable, match="it ended after 50 of"):
        decode(f"{site}/short")
    with pytest.raises(ImageUnreadable, match="the download failed"):
        decode("http://127.0.0.1:1/x.png")
    with pytest.raises(ImageUnreadable, match="the download failed"):
        decode("http://[broken/x.png")
    monkeypatch.setattr(preprocess, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(ImageTooLarge, match="more than 100 bytes, the limit for a download"):
        decode(f"{site}/picture.png")
    monkeypatch.setattr(preprocess, "MAX_DOWNLOAD_BYTES", 10**6)
    monkeypatch.setattr(preprocess, "DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr("time.monotonic", iter(range(99)).__next__)
    with pytest.raises(ImageUnreadable, match=r"not complete after 0.05 seconds"):
        decode(f"{site}/picture.png")


# ── PreprocessConfig ─────────────────────────────────────────────────────────────────────────────────────────────────

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "zero size": ({"size": (0, 5)}, r"size is \(0, 5\); it must be \(H, W\) in pixels, each at least 1"),
    "float size": ({"size": (2.5, 5)}, r"size is \(2.5, 5\)"),
    "negative edge": ({"size": -3}, "size is"),
    "crop int": ({"crop_size": 224}, r"crop_size is 224; it must be \(H, W\)"),
    "resample": ({"resample": "bicubik"}, 'resample is "bicubik". Did you mean "bicubic"\\? Known: nearest, lanczos'),
    "antialias": (
        {"antialias": False, "resample": "lanczos"},
        'antialias=False goes with resample "bilinear" or "bicubic" and size',
    ),
    "antialias edge": ({"antialias": False, "size": 224}, r"and size \(H, W\), not .* and 224"),
    "rounding": ({"crop_rounding": "even"}, 'crop_rounding is "even". Known: down, half_even, up'),
    "mean alone": ({"std": None}, r"mean is \(0.5, 0.5, 0.5\) and std is None; give both or neither"),
    "two means": ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\); it must be 3 finite numbers"),
    "nan": ({"mean": (0.5, float("nan"), 0.5)}, "mean is .* it must be 3 finite numbers"),
    "zero std": ({"std": (1, 0, 1)}, r"std is \(1.0, 0.0, 1.0\); pixels cannot be divided by 0"),
    "source crop": ({"source_crop": (0.5, 0)}, r"source_crop is \(0.5, 0.0\); it must be fractions above 0"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_config_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreprocessConfig(**fields)


def test_spec_and_hash() -> None:
    """The hashes are written into result files: they may change only when the pixels do."""
    hashes = {
        "2ff3ef4a88ea55a8": PreprocessConfig(),
        "4004b35100641164": PreprocessConfig.jax_squash(384),
        "1190717eb3bf8291": PreprocessConfig.timm_crop(224),
    }
    for expected, config in hashes.items():
        assert config.hash() == expected
        assert PreprocessConfig.from_spec(json.loads(json.dumps(config.spec()))) == config
    whole, real = PreprocessConfig(mean=(0, 0, 0)), PreprocessConfig(mean=(0.0, 0.0, 0.0))
    assert whole.hash() == real.hash()
    code = "from opsin.preprocess import PreprocessConfig as P; print(P.timm_crop(224).hash())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == PreprocessConfig.timm_crop(224).hash()


def test_an_unknown_key_in_a_spec() -> None:
    with pytest.raises(
        ValueError, match='no preprocessing field "resampel". Did you mean "resample"\\? Known: source_crop'
    ):
        PreprocessConfig.from_spec({"resampel": "bicubic"})


def test_image_size() -> None:
    assert PreprocessConfig(size=(5, 7)).image_size == (5, 7)
    assert PreprocessConfig.jax_squash(9).image_size == (9, 9)
    assert PreprocessConfig.timm_crop(9).image_size == (9, 9)
    for size in (24, None):
        with pytest.raises(ValueError, match=f"with size={size} and no crop_size every image keeps a size of its own"):
            _ = PreprocessConfig(size=size).image_size


def test_thin_images_are_resized_only_where_the_crop_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    thin = Image.new("RGB", (1, 60_000), "#804020")
    for config in (PreprocessConfig.timm_crop(224), PreprocessConfig(size=64, crop_size=(80, 48)), PreprocessConfig()):
        assert config(thin).shape == (3, *config.image_size)
        height, width = config.image_size
        assert np.array_equal(config.resize(thin)[height // 2, width // 2], [128, 64, 32])
    with pytest.raises(
        ImageTooLarge, match="1 × 60000 pixels: with the shorter edge at 248 the longer would be 14,880,000"
    ):
        PreprocessConfig(size=248).resize(thin)
    noise = np.random.default_rng(0).integers(0, 256, (70, 41, 3), dtype=np.uint8)
    configs = [
        PreprocessConfig(size=30, crop_size=(37, 22), crop_rounding=rounding, resample=resample)
        for rounding in ("down", "half_even")
        for resample in ("bilinear", "bicubic", "lanczos")  # nearest and box jump where a place falls on an edge
    ]
    for picture in (Image.fromarray(noise), Image.fromarray(np.ascontiguousarray(noise.transpose(1, 0, 2)))):
        whole = [config.resize(picture).astype(int) for config in configs]
        monkeypatch.setattr(preprocess, "MAX_PIXELS", 1)
        for config, expected in zip(configs, whole, strict=True):
            assert np.abs(config.resize(picture) - expected).max() <= 1  # rounding of the filter's places
        monkeypatch.undo()


@pytest.mark.parametrize("resample", preprocess.RESAMPLES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (99, 2)])
def test_a_fraction_of_a_pixel_is_one_pixel(size: tuple[int, int], resample: preprocess.Resample) -> None:
    config = PreprocessConfig(source_crop=(0.875, 0.01), size=(4, 6), resample=resample)
    assert torch.equal(config(Image.new("RGB", size, "white")), torch.ones(3, 4, 6))


def test_jax_squash_by_hand() -> None:
    """Two pixels to four: half-pixel centres at -0.25, 0.25, 0.75, 1.25; the outer two are held at the edge."""
    image = Image.fromarray(np.array([[[0] * 3, [200] * 3]], np.uint8))
    assert PreprocessConfig.jax_squash((1, 4)).resize(image)[0, :, 0].tolist() == [0, 50, 150, 200]
    assert PreprocessConfig.jax_squash((1, 2))(image)[0, 0].tolist() == [-1, pytest.approx((200 - 127.5) / 127.5)]


def test_deepmind_perceiver_is_that_of_opencv() -> None:
    """Crop, its odd margins and the bicubic resize; see golden/make_preprocess_opencv.py. Ties may round apart."""
    differing = []
    with np.load(Path(__file__).parent / "golden" / "preprocess_opencv.npz") as golden:
        assert len(golden.files) == 6
        for size in golden.files:
            height, width = map(int, size.split("x"))
            noise = Image.frombytes("RGB", (width, height), random.Random(size).randbytes(height * width * 3))
            got = PreprocessConfig.deepmind_perceiver((23, 29)).resize(noise)
            assert (got.dtype, got.shape) == (np.uint8, (23, 29, 3))
            differing.append(np.abs(got.astype(int) - golden[size]))
    assert np.max(differing) <= 1 and np.mean(differing) < 1e-3
    white = PreprocessConfig.deepmind_perceiver()(Image.new("RGB", (300, 257), "white"))
    expected = [(1 - mean) / std for mean, std in zip(preprocess.IMAGENET_MEAN, preprocess.IMAGENET_STD, strict=True)]
    assert white.shape == (3, 224, 224) and white[:, 0, 0].tolist() == pytest.approx(expected)


def test_squash_without_antialias_then_crop() -> None:
    half = (127.5, 127.5, 127.5)
    whole = PreprocessConfig(size=(8, 8), antialias=False, rescale_factor=None, mean=half, std=half)
    cropped = PreprocessConfig(size=(8, 8), antialias=False, rescale_factor=None, mean=half, std=half, crop_size=(4, 6))
    assert torch.equal(cropped(PICTURE), whole(PICTURE)[:, 2:6, 1:7])


def test_pixels_are_float32_contiguous_and_the_bytes_are_bytes() -> None:
    config = PreprocessConfig.timm_crop(6)
    resized = config.resize(PICTURE)
    assert (resized.dtype, resized.shape) == (np.uint8, (6, 6, 3))
    pixels = config.normalise(resized)
    assert (pixels.dtype, tuple(pixels.shape), pixels.is_contiguous()) == (torch.float32, (3, 6, 6), True)
    assert torch.allclose(pixels, torch.from_numpy(resized / 255 - 0.5).permute(2, 0, 1).float() / 0.5)
    with pytest.raises(ValueError, match=r"pixels have shape \(3, 6, 6\); they must be \(H, W, 3\)"):
        config.normalise(pixels.numpy())


def test_pillow_limit_is_passed_through() -> None:
    with pytest.raises(ImageTooLarge):
        PreprocessConfig()(PICTURE, max_pixels=76)


# ── load: the quick way from a JPEG ──────────────────────────────────────────────────────────────────────────────────

ROOT = Path(__file__).parent.parent
COFFEE = Image.open(ROOT / "examples" / "photos" / "coffee.png").convert("RGB")
AS_IT_IS = PreprocessConfig(size=None)
KINDS: tuple[Any, Any] = ("exact", "fast")
JPEGS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "4:4:4": ((61, 47), {"subsampling": 0, "quality": 95}),
    "4:2:2": ((61, 47), {"subsampling": 1, "quality": 75}),
    "4:2:0": ((61, 47), {"subsampling": 2, "quality": 90}),
    "4:2:0 low": ((160, 113), {"subsampling": 2, "quality": 12}),
    "progressive": ((97, 83), {"progressive": True}),
    "restarts": ((97, 83), {"restart_marker_blocks": 3}),
    "rgb": ((53, 31), {"keep_rgb": True, "subsampling": 0}),
    "one pixel": ((1, 1), {}),
    "tall": ((1, 203), {}),
    "wide": ((203, 2), {}),
}
CONFIGS: dict[str, PreprocessConfig] = {
    "squash": PreprocessConfig(size=(23, 29)),
    "as it is": AS_IT_IS,
    "cropped": PreprocessConfig(size=None, crop_size=(31, 37)),
    "crop": PreprocessConfig(size=37, crop_size=(31, 29), crop_rounding="half_even"),
    "bicubic crop": PreprocessConfig.timm_crop(31),
    "enlarged": PreprocessConfig(size=(201, 203)),
    "source crop": PreprocessConfig(source_crop=(0.875, 0.75), size=(23, 29)),
    "bicubic source crop": PreprocessConfig(source_crop=(0.875, 0.75), size=(23, 29), resample="bicubic"),
    "source crop alone": PreprocessConfig(source_crop=(0.5, 0.75), size=None),
    "lanczos": PreprocessConfig(size=(23, 29), resample="lanczos"),
    "nearest": PreprocessConfig(size=(23, 29), resample="nearest"),
    "tensorflow": PreprocessConfig.jax_squash((23, 29)),
    "opencv": PreprocessConfig.deepmind_perceiver((23, 29)),
}


def jpeg(size: tuple[int, int], mode: str = "RGB", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(COFFEE.resize(size).convert(mode), "JPEG", exif=exif.tobytes(), **options)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that simplejpeg gives in this test."""
    shapes: list[tuple[int, ...]] = []
    original = simplejpeg.decode_jpeg

    def decode_jpeg(*args: Any, **kwargs: Any) -> np.ndarray:
        pixels = original(*args, **kwargs)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    return shapes


def outcome(function: Callable[[bytes], np.ndarray], data: bytes) -> Any:
    """What it gives, as a list, or the error that it raises."""
    try:
        return function(data).tolist()
    except ImageError as error:
        return type(error), str(error)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("size", "options"), JPEGS.values(), ids=JPEGS)
def test_turbo_decodes_as_pillow(
    size: tuple[int, int], options: dict[str, Any], mode: str, decoded: list[tuple[int, ...]]
) -> None:
    data = jpeg(size, mode, **options)
    pixels, (width, height) = AS_IT_IS.load(data)
    assert np.array_equal(pixels, array(data)) and pixels.flags.c_contiguous
    assert (width, height) == size and decoded == [(height, width, 3)]


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_other_samplings_and_cmyk_are_pillows(subsampling: str, decoded: list[tuple[int, ...]]) -> None:
    for data in (
        simplejpeg.encode_jpeg(np.array(COFFEE.resize((61, 47))), colorsubsampling=subsampling),
        jpeg((61, 47), "CMYK"),
    ):
        assert np.array_equal(AS_IT_IS.load(data)[0], array(data))
    assert not decoded


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_load_is_decode_then_resize(
    config: PreprocessConfig, orientation: int, decoded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess, "LARGE_PIXELS", 121 * 97)
    data = jpeg((121, 97), orientation=orientation)
    upright = decode(data)
    expected = config.resize(upright)
    exact, size = config.load(data, exact_resize=True)
    assert np.array_equal(exact, expected) and exact.dtype == expected.dtype and exact.flags.c_contiguous
    assert size == upright.size == ((97, 121) if 5 <= orientation <= 8 else (121, 97))
    pixels, size = config.load(data)
    assert size == upright.size and pixels.dtype == expected.dtype and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(np.float32) - expected).max() <= (config.resample == "bilinear" and config.antialias)
    assert [shape[2] for shape in decoded[:1]] == [3 if config.size is None or not config.antialias else 4]
    assert len(decoded) == 2, "Pillow decoded"
    monkeypatch.setattr(preprocess, "LARGE_PIXELS", 121 * 97 + 1)
    assert np.array_equal(config.load(data, exact_resize=True)[0], expected)
    assert len(decoded) == (3 if decoded[0][2] == 3 else 2), "Pillow resizes small ones of its own sooner"


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    shrink=st.tuples(st.floats(preprocess.QUICK_SHRINK, 12), st.floats(preprocess.QUICK_SHRINK, 12)),
    turn=st.sampled_from(sorted(preprocess._TURNED, key=str)),
    hard=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_torch_resizes_within_one_of_pillow(
    width: int, height: int, shrink: tuple[float, float], turn: Any, hard: bool, seed: int
) -> None:
    """On noise, grey and black-and-white: the worst that a picture can be."""
    shape = (math.ceil(height * shrink[0]), math.ceil(width * shrink[1]), 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    if hard:
        noise = np.where(noise < 128, 0, 255).astype(np.uint8)
    image = Image.fromarray(noise)
    upright = preprocess._TURNED[turn](noise)
    assert np.array_equal(upright, np.asarray(image if turn is None else image.transpose(turn)))
    size = (height, width) if upright.shape == shape else (width, height)
    expected = PreprocessConfig(size=size).resize(Image.fromarray(np.ascontiguousarray(upright)))
    assert np.abs(preprocess._resize_torch(upright, size).astype(int) - expected).max() <= 1


def test_most_bytes_of_a_photo_are_pillows() -> None:
    data = encoded(COFFEE, "JPEG")
    differing = PreprocessConfig().load(data)[0] != PreprocessConfig().resize(decode(data))
    assert 0 < differing.mean() < 5e-3


def test_load_takes_every_kind_of_source(tmp_path: Path, site: str) -> None:
    data = encoded(PICTURE, "JPEG")
    path = tmp_path / "misnamed.txt"
    path.write_bytes(data)
    pixels = array(data)
    sources: list[Any] = [path, str(path), data, bytearray(data), memoryview(data), Image.open(path), pixels]
    for source in sources:
        got, size = AS_IT_IS.load(source)
        assert np.array_equal(got, pixels) and size == (11, 7)
    for other in (f"{site}/picture.png", encoded(PICTURE, "PNG"), torch.from_numpy(NOISE).permute(2, 0, 1)):
        assert np.array_equal(AS_IT_IS.load(other)[0], NOISE)
    stream = AS_IT_IS.load(encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE]))[0]
    assert np.array_equal(stream, pixels)


@pytest.mark.parametrize(("source", "error", "message"), BAD.values(), ids=BAD)
def test_load_raises_as_decode(source: Any, error: type[ImageError], message: str) -> None:
    with pytest.raises(error, match=f"(?i){message}") as caught:
        PreprocessConfig().load(source)
    assert type(caught.value) is error


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_damage_is_judged_by_pillow(options: dict[str, Any]) -> None:
    """Bytes changed, cut off, put in or put behind: the same pixels or the same error as `decode`."""
    whole, draw = jpeg((61, 47), **options), random.Random(0)
    outcomes = []
    for _ in range(60):
        data = bytearray(whole)
        place = draw.randrange(3, len(data))
        data[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        for broken in (
            bytes(data),
            whole[:place],
            whole[: len(whole) - draw.randrange(4)],
            whole + bytes(data[place:]),
        ):
            outcomes.append(outcome(array, broken))
            assert outcome(lambda data: AS_IT_IS.load(data)[0], broken) == outcomes[-1]
    raised = [found for found in outcomes if isinstance(found, tuple)]
    assert 60 < len(raised) < 180 and {error for error, _ in raised} <= {ImageCorrupt, NotAnImage}


def test_large_jpegs_are_refused_before_they_are_decoded(decoded: list[tuple[int, ...]]) -> None:
    data = bytearray(jpeg((61, 47)))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 20_000, 10_000)
    for kind in KINDS:
        with pytest.raises(ImageTooLarge, match=r"10000 × 20000 = 200,000,000 pixels; the limit is 178,956,970"):
            PreprocessConfig().load(bytes(data), decode=kind)
        with pytest.raises(ImageTooLarge, match="2,867 pixels; the limit is 2,866"):
            PreprocessConfig().load(jpeg((61, 47)), max_pixels=2866, decode=kind)
    assert not decoded
    assert PreprocessConfig().load(jpeg((61, 47)), max_pixels=2867)[1] == (61, 47)


@pytest.mark.parametrize("wrong", [None, RuntimeError("no"), MemoryError(), np.zeros((5, 7, 3), np.uint8)], ids=repr)
def test_without_simplejpeg_the_pixels_are_the_same(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg((121, 97), orientation=6)
    expected = [config.load(data, exact_resize=True)[0] for config in CONFIGS.values()]

    def decode_jpeg(*args: Any, **kwargs: Any) -> np.ndarray:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    if wrong is None:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    else:
        monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    for kind in KINDS:
        for config, pixels in zip(CONFIGS.values(), expected, strict=True):
            assert np.array_equal(config.load(data, decode=kind)[0], pixels)


def test_thin_jpegs() -> None:
    data = encoded(Image.new("RGB", (1, 60_000), "#804020"), "JPEG")
    for config in (PreprocessConfig.timm_crop(224), PreprocessConfig(size=64, crop_size=(80, 48))):
        for kind in KINDS:
            assert np.array_equal(config.load(data, decode=kind)[0], config.resize(decode(data)))
    with pytest.raises(ImageTooLarge, match="1 × 60000 pixels: with the shorter edge at 248 the longer would be 14,88"):
        PreprocessConfig(size=248).load(data)


def test_many_threads_load_the_same() -> None:
    files = [jpeg((121, 97), orientation=orientation) for orientation in (1, 3, 6)] * 20
    for config in (PreprocessConfig(size=(23, 29)), PreprocessConfig.timm_crop(31)):
        expected = [config.load(data)[0] for data in files[:3]] * 20
        with ThreadPoolExecutor(8) as pool:
            for one, (got, _) in zip(expected, pool.map(config.load, files), strict=True):
                assert np.array_equal(got, one)


@pytest.mark.parametrize(
    ("config", "rows", "columns"),
    [
        (PreprocessConfig(size=(23, 20)), 51, 76),
        (PreprocessConfig(size=(48, 49)), 101, 151),
        (PreprocessConfig(size=48, resample="bicubic"), 101, 151),
        (PreprocessConfig.timm_crop(48), 202, 301),
        (PreprocessConfig(source_crop=(0.875, 0.75), size=(33, 40)), 202, 301),
    ],
    ids=["eighth", "squash", "bicubic", "timm", "source crop"],
)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_fast_reads_a_part_and_drifts_little(
    config: PreprocessConfig, rows: int, columns: int, orientation: int, decoded: list[tuple[int, ...]]
) -> None:
    """Sides that no eighth divides, so that what is rounded up must not stretch the picture.

    At the edge of a source crop the filter sees a little of what lies beyond.
    """
    data = jpeg((601, 403), orientation=orientation, quality=90)
    exact, fast = (config.load(data, decode=kind) for kind in KINDS)
    assert decoded[-1][:2] == (rows, columns)
    assert exact[1] == fast[1] and exact[0].shape == fast[0].shape
    difference = np.abs(exact[0].astype(int) - fast[0])
    assert 0 < difference.mean() < 0.8 and difference.max() < (25 if config.source_crop else 12)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_fast_does_not_shift_the_picture(orientation: int) -> None:
    """On a ramp a shift shows as a difference of one sign."""
    ramp = np.broadcast_to(np.linspace(0, 255, 993), (503, 993)).astype(np.uint8)
    data = encoded(Image.fromarray(np.dstack([ramp] * 3)), "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.open(io.BytesIO(data)), "JPEG", quality=95, exif=exif.tobytes())
    exact, fast = (PreprocessConfig(size=(40, 40)).load(data, decode=kind)[0].astype(int) for kind in KINDS)
    assert np.abs(exact - fast).max() <= 2 and abs((exact - fast).mean()) < 0.3


def test_fast_is_exact_where_nothing_is_to_be_gained() -> None:
    data = jpeg((601, 403))
    for config in (
        PreprocessConfig(size=(224, 224)),  # 403 is less than twice as much
        PreprocessConfig(size=(24, 24), resample="nearest"),
        PreprocessConfig.jax_squash(24),
        PreprocessConfig.deepmind_perceiver((24, 24)),
        PreprocessConfig(size=None, crop_size=(24, 24)),
    ):
        exact, fast = (config.load(data, decode=kind)[0] for kind in KINDS)
        assert np.array_equal(exact, fast)
    small = PreprocessConfig(size=(24, 24))
    exact, fast = (small.load(encoded(COFFEE, "PNG"), decode=kind)[0] for kind in KINDS)
    assert np.array_equal(exact, fast)
    with pytest.raises(ValueError, match='decode is "quick". Known: exact, fast'):
        small.load(data, decode="quick")  # type: ignore[arg-type]


def test_drift_of_real_photos(photos: Path) -> None:
    config = PreprocessConfig(size=(64, 64))
    files: list[Any] = [photos / "rocket.jpg", encoded(COFFEE, "JPEG", quality=90), b"no image"]
    found = drift(files, config)
    pairs = [[config.load(file, decode=kind)[0].astype(int) for kind in KINDS] for file in files[:2]]
    differences = np.abs([exact - fast for exact, fast in pairs])
    assert (found.images, found.max) == (2, differences.max()) and found.mean == pytest.approx(differences.mean())
    assert 0 < found.mean < 0.8 and found.max < 12
    assert drift([NOISE], config) == Drift(1, 0, 0)
    with pytest.raises(ValueError, match="no image could be read, so the drift of the fast decode is not known"):
        drift([b"no image"], config)


@pytest.mark.parametrize(
    "config",
    [
        PreprocessConfig(size=(5, 7)),
        PreprocessConfig(size=(5, 7), mean=preprocess.IMAGENET_MEAN, std=preprocess.IMAGENET_STD),
        PreprocessConfig(size=(5, 7), rescale_factor=0.0078125),
        PreprocessConfig(size=(5, 7), rescale_factor=0.7 / 255),
        PreprocessConfig(size=(5, 7), rescale_factor=0),
        PreprocessConfig(size=(5, 7), rescale_factor=None, mean=None, std=None),
        PreprocessConfig.jax_squash((5, 7)),
    ],
    ids=lambda config: f"{config.rescale_factor} {config.mean}",
)
def test_a_normalised_batch_is_its_images_normalised(config: PreprocessConfig) -> None:
    images = [config.resize(PICTURE), config.resize(COFFEE), config.resize(PICTURE.rotate(90))]
    batch = config.normalise_batch(images)
    assert batch.shape == (3, 3, 5, 7) and batch.dtype == torch.float32 and batch.is_contiguous()
    for image, row in zip(images, batch, strict=True):
        expected = torch.from_numpy(config._normalise(image.transpose(2, 0, 1)))
        assert torch.equal(row, expected) and torch.equal(config.normalise(image), expected)
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert torch.equal(config.normalise(every), torch.from_numpy(config._normalise(every.transpose(2, 0, 1))))


def test_a_normalised_batch_of_the_wrong_shapes() -> None:
    config = PreprocessConfig()
    with pytest.raises(ValueError, match="no images: the list is empty. Give at least one"):
        config.normalise_batch([])
    with pytest.raises(ValueError, match=r"image 1 of the batch has shape \(11, 7, 3\) and the first \(7, 11, 3\)"):
        config.normalise_batch([NOISE, NOISE.swapaxes(0, 1)])
    with pytest.raises(ValueError, match=r"pixels have shape \(7, 11\); they must be \(H, W, 3\)"):
        config.normalise_batch([NOISE[..., 0]])


def test_the_usual_bytes_are_divided_not_looked_up() -> None:
    for config in (PreprocessConfig(), PreprocessConfig.timm_crop(mean=preprocess.IMAGENET_MEAN)):
        assert preprocess._divisor(config) == 255
    assert preprocess._divisor(PreprocessConfig(rescale_factor=0.7 / 255)) is None


# ── checkpoints/processors.py ────────────────────────────────────────────────────────────────────────────────────────

BAD_PROCESSORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"image_processor_type": "DonutImageProcessor"},
        '"DonutImageProcessor" is not known. Known: ViTImagePro',
    ),
    "pad": ({"do_pad": True}, "ViTImageProcessor with do_pad is not supported"),
    "longest": (
        {"size": {"shortest_edge": 5, "longest_edge": 9}},
        "size is .*; it must be an int, or have height and w",
    ),
    "no crop": ({"do_center_crop": True}, "ViTImageProcessor with do_center_crop needs a crop_size"),
    "crop edge": (
        {"do_center_crop": True, "crop_size": {"shortest_edge": 5}},
        "crop_size is .*; here it must be an int",
    ),
    "resample": ({"resample": 6}, "resample is 6; known are Pillow's: 0 nearest, 1 lanczos, 2 bilinear"),
    "mean": ({"image_mean": [0.5, 0.5]}, r"mean or std is \[0.5, 0.5\]; it must have one number per colour"),
}


def test_a_null_value_is_the_default() -> None:
    nulls = dict.fromkeys(["size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std"])
    deit = {"image_processor_type": "DeiTImageProcessor"}
    assert read_hf(deit | nulls) == read_hf(deit)


@pytest.mark.parametrize(("config", "message"), BAD_PROCESSORS.values(), ids=BAD_PROCESSORS)
def test_processor_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_hf(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            PreprocessConfig.jax_squash(),
            r"transformers cannot resize without antialiasing.*replace\(config, antialias=Tr",
        ),
        (PreprocessConfig.timm_crop(), r'rounds an odd crop margin down, .*replace\(config, crop_rounding="down"\)'),
        (
            PreprocessConfig(size=(31, 31), crop_size=(28, 28), crop_rounding="half_even"),
            "rounds an odd crop margin down",
        ),
        (
            dataclasses.replace(PreprocessConfig.deepmind_perceiver(), antialias=True),
            'rounds an odd crop margin down, DeepMind up. .*crop_rounding="down"',
        ),
        (PreprocessConfig(source_crop=(0.9, 0.9), crop_size=(9, 9)), "crops before the resize only for a Perceiver"),
        (PreprocessConfig(source_crop=(0.123, 0.9)), "source_crop .* is no ratio of whole pixels"),
    ],
)
def test_what_transformers_cannot_express(config: PreprocessConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_hf(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"input_size": (1, 28, 28)}, r"input_size is \(1, 28, 28\); opsin reads RGB images"),
        ({"interpolation": "random"}, 'interpolation is "random". Known: nearest'),
        ({"crop_mode": "border"}, 'crop_mode "border" to 224 × 224 is not supported'),
        (
            {"input_size": (3, 224, 192)},
            'crop_mode "center" to 224 × 192 is not supported. Known: "center" to a square',
        ),
    ],
)
def test_timm_errors(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_timm(config)


def test_decoding_does_not_warn() -> None:
    """A palette with alpha per entry makes Pillow's convert warn; under `-W error` that would lose a good image."""
    image = PICTURE.quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encoded(image, "PNG", transparency=bytes(range(16))))
        image.info["transparency"] = bytes(16)
        decode(image)
    assert image.info["transparency"] == bytes(16), "the caller's image is not changed"


def test_signed_16_bit_tiff_is_scaled(tmp_path: Path) -> None:
    """Pillow opens it as 32-bit integers and would clip nearly all of it to white."""
    array = np.array([[-5, 0, 256, 32767]], np.int16)
    file = tmp_path / "signed.tif"
    tags = [(256, 3, 4), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1), (278, 3, 1),
            (279, 4, 8), (339, 3, 2)]  # fmt: skip
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, offset if tag == 273 else value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
    file.write_bytes(head + array.tobytes())
    assert np.asarray(decode(file))[0, :, 0].tolist() == [0, 0, 1, 127]
