"""Pixels equal transformers' (PIL backend) and timm's bit for bit, and TensorFlow's resize to rounding."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from opsin.checkpoints.processors import read_hf, read_timm, write_hf
from opsin.preprocess import RESAMPLES, PreprocessConfig, decode

# height, width: larger, smaller and thinner than every crop below, odd and even margins
SIZES = [(61, 97), (97, 61), (32, 32), (7, 53), (23, 19), (24, 31), (101, 30), (1, 3)]
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def file(family: str, **values: Any) -> dict[str, Any]:
    return {"image_processor_type": f"{family}ImageProcessor", **values}


def old_file(family: str, **values: Any) -> dict[str, Any]:
    return {"feature_extractor_type": f"{family}FeatureExtractor", "do_resize": True, "do_normalize": True, **values}


CONFIGS = {
    "vit 2021": old_file("ViT", size=24, resample=2, **HALF),
    "vit": file("ViT", size={"height": 24, "width": 40}),
    "vit fast": {"image_processor_type": "ViTImageProcessorFast", "size": 24, "crop_size": None, "do_pad": None},
    "vit nulls": file("ViT", size=24, do_rescale=None, do_center_crop=None, crop_size=None, do_pad=None),
    "deit nulls": file("DeiT", size=24, crop_size=22, do_resize=None, do_normalize=None),
    "vit list": file("ViT", size=[24, 32]),
    "vit shortest edge": file("ViT", size={"shortest_edge": 24}),
    "vit crop": file("ViT", size=33, do_center_crop=True, crop_size=28),
    "vit as it is": file("ViT", do_resize=False, **IMAGENET),
    "vit bytes": file("ViT", size=24, do_rescale=False, image_mean=[127.5] * 3, image_std=[127.5] * 3),
    "vit not normalised": file("ViT", size=24, do_normalize=False),
    "vit other factor": file("ViT", size=24, rescale_factor=0.0078125),
    "vit one mean": file("ViT", size=24, image_mean=0.4, image_std=0.3),
    "deit": file("DeiT", size=37, crop_size=32, **IMAGENET),
    "deit 2021": old_file("DeiT", size=256, crop_size=224, resample=3, do_center_crop=True, **IMAGENET),
    "deit pads": file("DeiT", size=29, crop_size={"height": 32, "width": 28}),
    "dinov2": file("Bit", size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}, **IMAGENET),
    "bit int": file("Bit", size=30, crop_size={"height": 25, "width": 28}),
    "bit no resize": file("Bit", do_resize=False, crop_size=27),
    "bit square": file("Bit", size=30, default_to_square=True, crop_size=27),
    "clip": old_file("CLIP", size=30, crop_size=27, resample=3),
    "perceiver": file("Perceiver", size=24, crop_size=28, **IMAGENET),
    "perceiver 2021": old_file("Perceiver", size=224, crop_size=256),
    "perceiver uncropped": file("Perceiver", do_center_crop=False, size=24),
    "perceiver unresized": file("Perceiver", do_resize=False),
    "perceiver oblong": file("Perceiver", size={"height": 24, "width": 30}, crop_size={"height": 27, "width": 29}),
    # what a file may leave out
    **{f"{family} default": file(family) for family in ("ViT", "DeiT", "Bit", "CLIP", "Perceiver")},
    **{f"resample {index}": file("Bit", size=29, crop_size=28, resample=index) for index in range(6)},
}


def noise(height: int, width: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(f"{height}x{width}").randbytes(height * width * 3))


def transformers_pixels(folder: Path, config: dict[str, Any], image: Image.Image) -> Tensor:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    ours = read_hf(config)
    for size in SIZES:
        if size == (1, 3) and ours.source_crop:
            continue  # transformers cuts this to nothing and fails; opsin keeps one pixel
        image = noise(*size)
        expected = transformers_pixels(tmp_path, config, image)
        got = ours(image)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected), size


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_for_transformers_gives_equal_pixels(config: dict[str, Any], tmp_path: Path) -> None:
    ours = read_hf(config)
    if ours.source_crop and ours.size is None:
        with pytest.raises(ValueError, match="crops before the resize only for a Perceiver"):
            write_hf(ours)
        return
    assert read_hf(write_hf(ours)) == ours
    for mode in ("RGB", "L"):
        image = noise(61, 97).convert(mode)
        assert torch.equal(transformers_pixels(tmp_path, write_hf(ours), image), ours(image))


def test_half_even_squash_is_written_where_no_margin_tells(tmp_path: Path) -> None:
    ours = PreprocessConfig(size=(33, 33), crop_size=(32, 28), crop_rounding="half_even")
    image = noise(61, 97)
    assert torch.equal(transformers_pixels(tmp_path, write_hf(ours), image), ours(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_decodes_as_transformers_pipelines(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x"
    noise(19, 31).save(path, kind, exif=exif.tobytes())
    assert np.array_equal(np.asarray(decode(path)), np.asarray(load_image(str(path))))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
)
def test_modes_as_transformers_pipelines(mode: str) -> None:
    bands = len(Image.new(mode, (1, 1)).getbands()) * (4 if mode in "IF" else 1)
    size = (16, 17)  # whole bytes a row, for mode "1"
    image = Image.frombytes(mode, size, random.Random(mode).randbytes(16 * 17 * bands // (8 if mode == "1" else 1)))
    if mode in ("P", "PA"):
        image.putpalette(random.Random(0).randbytes(768))
    assert np.array_equal(np.asarray(decode(image)), np.asarray(load_image(image)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loads_jpegs_as_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    """To the bit with Pillow's resize; a step of a byte off, here and there, with torch's."""
    ours = read_hf(config)
    path = tmp_path / "x.jpg"
    noise(61, 97).save(path, quality=90)
    expected = transformers_pixels(tmp_path, config, load_image(str(path)))
    assert torch.equal(ours.normalise(ours.load(path, exact_resize=True)[0]), expected)
    step = (ours.normalise(np.ones((1, 1, 3), np.uint8)) - ours.normalise(np.zeros((1, 1, 3), np.uint8))).max()
    assert (ours.normalise(ours.load(path)[0]) - expected).abs().max() <= 1.001 * step


def golden_cases() -> list[tuple[dict[str, Any], str, str]]:
    golden = Path(__file__).parent.parent / "golden" / "preprocess_timm.json"
    cases = json.loads(golden.read_text())["cases"]
    return [(json.loads(case["config"]), size, digest) for case in cases for size, digest in case["sha256"].items()]


@pytest.mark.parametrize(("config", "size", "digest"), golden_cases())
def test_equals_timm(config: dict[str, Any], size: str, digest: str) -> None:
    height, width = map(int, size.split("x"))
    pixels = read_timm(config)(noise(height, width))
    assert hashlib.sha256(pixels.numpy().astype("<f4").tobytes()).hexdigest() == digest


@pytest.mark.parametrize("margin", range(-7, 9))
def test_crop_margins_as_torchvision(margin: int) -> None:
    """Its rules, restated: a margin is cut at `round(margin / 2)`; of a lack, the odd pixel goes behind."""
    image = np.asarray(noise(20 + margin, 20))
    got = PreprocessConfig(size=None, crop_size=(20, 20), crop_rounding="half_even").resize(Image.fromarray(image))
    if margin >= 0:
        top = int(round(margin / 2.0))  # noqa: RUF046 - as written there
        expected = image[top : top + 20]
    else:
        expected = np.pad(image, ((-margin // 2, (-margin + 1) // 2), (0, 0), (0, 0)))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", [(24, 24), (24, 40), (120, 110), (1, 1)])
def test_jax_squash_is_plain_bilinear(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Torch's bilinear without antialiasing is TensorFlow's up to rounding: 1e-3 of one step of a byte."""
    image = noise(*size)
    config = PreprocessConfig.jax_squash(target)
    floats = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    expected = F.interpolate(floats, target, mode="bilinear", align_corners=False, antialias=False)[0]
    resized = torch.from_numpy(config.resize(image)).permute(2, 0, 1)
    assert resized.dtype == torch.float32
    assert (resized - expected).abs().max() < 1e-3
    assert (config(image) - (expected - 127.5) / 127.5).abs().max() < 1e-5


@pytest.mark.shared
def test_the_picture_of_the_model_cards(shared: Path, tmp_path: Path) -> None:
    path = shared / "coco_000000039769.png"
    for name in ("vit 2021", "deit 2021", "dinov2", "perceiver 2021"):
        expected = transformers_pixels(tmp_path, CONFIGS[name], load_image(str(path)))
        assert torch.equal(read_hf(CONFIGS[name])(path), expected)


def test_resample_names_are_in_the_order_of_pillow() -> None:
    assert [Image.Resampling[name.upper()].value for name in RESAMPLES] == list(range(6))
