"""Properties of decode and PreprocessConfig that hold for any image and any configuration."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mutations import broken_files
from opsin.checkpoints.processors import read_hf, write_hf
from opsin.errors import ImageError
from opsin.preprocess import RESAMPLES, PreprocessConfig, decode

MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16L I;16B I;16N".split()  # noqa: SIM905 - one line for twenty
CONFIGS = [
    PreprocessConfig(size=(24, 24)),
    PreprocessConfig(size=(33, 33), crop_size=(24, 24), resample="bicubic"),
    PreprocessConfig(size=20, crop_size=(24, 24), resample="lanczos"),
    PreprocessConfig(source_crop=(0.875, 0.875), size=(24, 24), resample="bicubic"),
    PreprocessConfig(source_crop=(1.5, 0.01), size=(24, 24), resample="nearest"),
    PreprocessConfig(size=None, crop_size=(24, 24), crop_rounding="half_even", mean=None, std=None),
    PreprocessConfig.jax_squash(24),
    PreprocessConfig.timm_crop(24),
]


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    """Any mode, 1 to 300 pixels a side, of noise."""
    width, height = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    mode = draw(st.sampled_from(MODES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if mode == "F":
        values = rng.normal(128, 1000, (height, width)).astype(np.float32)
        return Image.fromarray(values)
    if mode == "La":  # no raw reader in Pillow
        return Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8)).convert("LA").convert("La")
    if mode.startswith("I;16"):
        return Image.frombytes(mode, (width, height), rng.bytes(2 * width * height))
    image = Image.new(mode, (width, height))
    size = len(image.tobytes())
    image = Image.frombytes(mode, (width, height), rng.bytes(size))
    if mode in ("P", "PA"):
        image.putpalette(rng.bytes(768))
        if draw(st.booleans()):
            image.info["transparency"] = draw(st.sampled_from([3, rng.bytes(256)]))
    return image


@settings(max_examples=120, deadline=None)
@given(image=images(), config=st.sampled_from(CONFIGS))
def test_any_image_gives_finite_pixels(image: Image.Image, config: PreprocessConfig) -> None:
    before = image.tobytes()
    pixels = config(image)
    assert pixels.shape == (3, 24, 24)
    assert pixels.dtype == torch.float32
    assert torch.isfinite(pixels).all()
    assert image.tobytes() == before
    upright = decode(image)
    assert upright.size == image.size
    assert np.array_equal(np.asarray(decode(upright)), np.asarray(upright))


sides = st.integers(1, 500)
pairs = st.tuples(sides, sides)
numbers = st.floats(0.01, 300, allow_nan=False)
colours = st.tuples(numbers, numbers, numbers)


@st.composite
def configs(draw: st.DrawFn) -> PreprocessConfig:
    normalised = draw(st.booleans())
    return PreprocessConfig(
        size=draw(st.none() | sides | pairs),
        resample=draw(st.sampled_from(RESAMPLES)),
        crop_size=draw(st.none() | pairs),
        rescale_factor=draw(st.none() | numbers),
        mean=draw(colours) if normalised else None,
        std=draw(colours) if normalised else None,
    )


@st.composite
def perceiver_configs(draw: st.DrawFn) -> PreprocessConfig:
    size, crop = draw(pairs), draw(pairs)
    return PreprocessConfig(source_crop=(size[0] / crop[0], size[1] / crop[1]), size=size, resample="bicubic")


@given(config=configs() | perceiver_configs())
def test_what_is_written_for_transformers_reads_back(config: PreprocessConfig) -> None:
    assert read_hf(json.loads(json.dumps(write_hf(config)))) == config


@given(config=configs() | perceiver_configs() | st.sampled_from(CONFIGS))
def test_specs_read_back(config: PreprocessConfig) -> None:
    again = PreprocessConfig.from_spec(json.loads(json.dumps(config.spec())))
    assert again == config
    assert again.hash() == config.hash()


@given(one=configs(), other=configs())
def test_different_configs_have_different_hashes(one: PreprocessConfig, other: PreprocessConfig) -> None:
    assert (one.hash() == other.hash()) == (one == other)


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=200), start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a"])
)
def test_any_bytes_are_an_image_or_an_image_error(data: bytes, start: bytes) -> None:
    try:
        assert decode(start + data).mode == "RGB"
    except ImageError as error:
        assert str(error)


# a damaged file may warn, which is then its error; as by default, warnings are not errors here
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("seed", [1, 2])
def test_two_thousand_broken_files(seed: int, tmp_path: Path) -> None:
    """Every file is an image or an ImageError; a whole one is its own colour; a hopeless one has the right kind."""
    expected: dict[str, set[str]] = {
        "good": {"ok"},
        "renamed": {"ok"},
        "truncated": {"corrupt", "not_an_image"},
        "empty": {"not_an_image"},
        "zeros": {"not_an_image"},
        "text": {"not_an_image", "corrupt"},
        "directory": {"unreadable"},
        "pipe": {"unreadable"},
        "dangling": {"not_found", "unreadable"},
        "bomb": {"too_large"},
        "unreadable": {"ok", "unreadable"},
    }
    seen: dict[str, set[str]] = {}
    paths = broken_files(tmp_path, 2000, seed)
    assert len(set(paths)) == 2000
    for path in paths:
        _, damage, *colour = path.stem.split("-")
        try:
            image = decode(path)
            outcome = "ok"
        except ImageError as error:
            outcome = error.kind
            assert str(error)
        if colour:
            assert outcome == "ok", path.name
            found: Any = image.getpixel((image.width // 2, image.height // 2))
            assert max(abs(a - b) for a, b in zip(found, bytes.fromhex(colour[0]), strict=True)) < 8, path.name
        seen.setdefault(damage, set()).add(outcome)
    for damage, outcomes in expected.items():
        assert seen[damage] <= outcomes, damage
    assert {"ok", "not_found", "unreadable", "not_an_image", "corrupt", "too_large"} == set().union(*seen.values())
