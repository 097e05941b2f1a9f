"""PreprocessConfig ↔ the `preprocessor_config.json` of Hugging Face and the `pretrained_cfg` of timm."""

import math
from typing import Any

from opsin.preprocess import IMAGENET_MEAN, IMAGENET_STD, RESAMPLES, PreprocessConfig, Resample

_HALF = [0.5, 0.5, 0.5]
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_RESIZED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CROPPED = _RESIZED | {"resample": 3, "do_center_crop": True, "crop_size": 224}

# What the classes of transformers 5 assume where a file is silent. The oldest files name a "…FeatureExtractor".
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _RESIZED | {"size": 224, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
    "DeiTImageProcessor": _CROPPED | {"size": 256, "image_mean": _HALF, "image_std": _HALF},
    "BitImageProcessor": _CROPPED  # DINOv2
    | {"size": {"shortest_edge": 224}, "default_to_square": False, "image_mean": _CLIP_MEAN, "image_std": _CLIP_STD},
    "PerceiverImageProcessor": _CROPPED
    | {"size": 224, "crop_size": 256, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)},
}
_DEFAULTS["CLIPImageProcessor"] = _DEFAULTS["BitImageProcessor"]


def read_hf(preprocessor_config: dict[str, Any]) -> PreprocessConfig:
    """The preprocessing of a transformers image processor, of any generation.

    Alpha is dropped whatever `do_convert_rgb` says, as transformers' pipelines do; a processor of transformers 5.23
    that is handed an RGBA image itself, with `do_convert_rgb` on, blends it onto white.

    Args:
        preprocessor_config: the parsed file. Without `image_processor_type` or `feature_extractor_type` it is read
            as a ViT's. As in transformers unknown keys mean nothing and null switches a `do_…` step off; elsewhere null
            is the default of the class, as in transformers 4 (5 fails there).
    Raises:
        ValueError: another processor, or one of the known asked for something that opsin does not do.
    """
    kind = preprocessor_config.get("image_processor_type") or preprocessor_config.get("feature_extractor_type")
    family = (kind or "ViTImageProcessor").removesuffix("Fast").removesuffix("Pil")
    family = family.replace("FeatureExtractor", "ImageProcessor")
    if family not in _DEFAULTS:
        raise ValueError(f'image processor "{kind}" is not known. Known: {", ".join(_DEFAULTS)}.')
    values = _DEFAULTS[family] | {
        key: value for key, value in preprocessor_config.items() if value is not None or key.startswith("do_")
    }
    if values.get("do_pad"):
        raise ValueError(f"{family} with do_pad is not supported; only resize, centre crop, rescale and normalise are.")

    size = _size(values["size"], "size", square=values.get("default_to_square", True)) if values["do_resize"] else None
    crop_size: tuple[int, int] | None = None
    source_crop: tuple[float, float] | None = None
    if values.get("do_center_crop"):
        if "crop_size" not in values:
            raise ValueError(f"{family} with do_center_crop needs a crop_size.")
        crop_size = _pair(values["crop_size"], "crop_size")
        if family == "PerceiverImageProcessor":  # the two sizes are only a ratio, cut before the resize
            target = _pair(values["size"], "size")
            source_crop, crop_size = (target[0] / crop_size[0], target[1] / crop_size[1]), None
    return PreprocessConfig(
        source_crop=source_crop,
        size=size,
        resample=_resample(values["resample"]),
        crop_size=crop_size,
        rescale_factor=values["rescale_factor"] if values["do_rescale"] else None,
        mean=_colours(values["image_mean"]) if values["do_normalize"] else None,
        std=_colours(values["image_std"]) if values["do_normalize"] else None,
    )


def write_hf(config: PreprocessConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` with which transformers' `AutoImageProcessor` makes the same pixels.

    Raises:
        ValueError: transformers has no processor for it.
    """
    if not config.antialias:
        raise ValueError(
            "transformers cannot resize without antialiasing, as the JAX releases do. "
            "dataclasses.replace(config, antialias=True) comes close; it changes the pixels, so measure the accuracy."
        )
    if config.crop_size and config.crop_rounding != "down":
        even = isinstance(config.size, tuple) and all(
            size >= crop and (size - crop) % 4 != 3 for size, crop in zip(config.size, config.crop_size, strict=True)
        )
        if not even:
            raise ValueError(
                "transformers rounds an odd crop margin down, timm and torchvision to even. "
                'dataclasses.replace(config, crop_rounding="down") shifts some images by one pixel.'
            )
    size, crop_size = config.size, config.crop_size
    if config.source_crop:
        kind = "PerceiverImageProcessor"
        if config.crop_rounding != "down":
            raise ValueError(
                "transformers rounds an odd crop margin down, DeepMind up. "
                'dataclasses.replace(config, crop_rounding="down") shifts some images by one pixel.'
            )
        if crop_size or not isinstance(size, tuple):
            raise ValueError("transformers crops before the resize only for a Perceiver: to size (H, W), no crop_size.")
        crop_size = (round(size[0] / config.source_crop[0]), round(size[1] / config.source_crop[1]))
        if (size[0] / crop_size[0], size[1] / crop_size[1]) != config.source_crop:
            raise ValueError(
                f"source_crop {config.source_crop} is no ratio of whole pixels to size {size}, as transformers needs."
            )
    elif isinstance(size, int):
        kind = "BitImageProcessor"
    else:
        kind = "DeiTImageProcessor" if crop_size else "ViTImageProcessor"

    written: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": size is not None,
        "resample": RESAMPLES.index(config.resample),
        "do_center_crop": crop_size is not None,
        "do_rescale": config.rescale_factor is not None,
        "do_normalize": config.mean is not None,
    }
    if size is not None:
        written["size"] = {"shortest_edge": size} if isinstance(size, int) else _height_width(size)
    if crop_size is not None:
        written["crop_size"] = _height_width(crop_size)
    if config.rescale_factor is not None:
        written["rescale_factor"] = config.rescale_factor
    if config.mean is not None and config.std is not None:
        written |= {"image_mean": list(config.mean), "image_std": list(config.std)}
    return written


def read_timm(pretrained_cfg: dict[str, Any]) -> PreprocessConfig:
    """timm's evaluation preprocessing, as `timm.data.create_transform(**resolve_data_config(pretrained_cfg))`.

    Raises:
        ValueError: not three colours, the crop mode "border", or a centre crop that is not square.
    """
    given = {key: value for key, value in pretrained_cfg.items() if value}
    channels, height, width = given.get("input_size", (3, 224, 224))
    if channels != 3:
        raise ValueError(f"input_size is {given['input_size']}; opsin reads RGB images, 3 channels.")
    crop_pct, crop_mode = given.get("crop_pct", 0.875), given.get("crop_mode", "center")
    resample = given.get("interpolation", "bicubic")
    if resample not in RESAMPLES:
        raise ValueError(f'interpolation is "{resample}". Known: {", ".join(RESAMPLES)}.')
    mean, std = _colours(given.get("mean", IMAGENET_MEAN)), _colours(given.get("std", IMAGENET_STD))
    if crop_mode == "center" and height == width:
        return PreprocessConfig.timm_crop(height, crop_pct=crop_pct, resample=resample, mean=mean, std=std)
    if crop_mode != "squash":
        raise ValueError(
            f'crop_mode "{crop_mode}" to {height} × {width} is not supported. Known: "center" to a square, "squash".'
        )
    size = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    if size == (height, width):
        return PreprocessConfig(size=size, resample=resample, mean=mean, std=std)
    return PreprocessConfig(
        size=size, crop_size=(height, width), crop_rounding="half_even", resample=resample, mean=mean, std=std
    )


def write_timm(config: PreprocessConfig) -> tuple[dict[str, Any], list[str]]:
    """The `pretrained_cfg` with which timm's evaluation transform makes the same pixels, and in what they differ.

    Raises:
        ValueError: timm has nothing near.
    """
    if config.source_crop is not None or config.size is None:
        raise ValueError(
            f"timm resizes an image and then crops it; this model's preprocessing has source_crop {config.source_crop} "
            f"and size {config.size}."
        )
    height, width = config.image_size
    if isinstance(config.size, int) and height != width:
        raise ValueError(f"timm keeps the shape of an image only for a square crop, not for {height} × {width}.")
    sides = (config.size,) * 2 if isinstance(config.size, int) else config.size
    scale = 1 / (255 * (1 if config.rescale_factor is None else config.rescale_factor))
    mean, std = config.mean or (0.0,) * 3, config.std or (1.0,) * 3
    written = {
        "input_size": [3, height, width],
        "interpolation": config.resample,
        "crop_pct": _crop_pct(sides, (height, width)),
        "crop_mode": "center" if isinstance(config.size, int) else "squash",
        "mean": [value * scale for value in mean],
        "std": [value * scale for value in std],
    }
    differences = []
    if not config.antialias:
        differences.append("it resizes with antialiasing")
    if config.crop_size is not None and config.crop_rounding != "half_even":
        margins = [side - crop for side, crop in zip(sides, (height, width), strict=True)]
        rounded = {"down": math.floor, "up": math.ceil}[config.crop_rounding]
        if isinstance(config.size, int) or any(rounded(margin / 2) != round(margin / 2) for margin in margins):
            differences.append(
                f"it rounds an odd crop margin to even, not {config.crop_rounding}: a shift of one pixel"
            )
    return written, differences


def _crop_pct(sides: tuple[int, int], crop: tuple[int, int]) -> float:
    """timm's resize is to crop / crop_pct, rounded down: the shortest number that gives `sides`."""
    exact = crop[0] / sides[0]
    for digits in range(1, 18):
        for crop_pct in (round(exact, digits), math.floor(exact * 10**digits) / 10**digits):
            if crop_pct and all(math.floor(c / crop_pct) == side for c, side in zip(crop, sides, strict=True)):
                return crop_pct
    raise ValueError(f"timm has one crop_pct for both sides; this model crops {crop} out of {sides}.")


def _size(value: Any, name: str, *, square: bool) -> tuple[int, int] | int:
    """(H, W), or an int for the shorter edge; `square` says what a bare int in the file means."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value) if square else value
    if isinstance(value, list | tuple) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, dict):
        sides = {key: side for key, side in value.items() if side is not None}
        if sides.keys() == {"height", "width"}:
            return sides["height"], sides["width"]
        if sides.keys() == {"shortest_edge"}:
            return sides["shortest_edge"]
    raise ValueError(f"{name} is {value}; it must be an int, or have height and width, or shortest_edge alone.")


def _pair(value: Any, name: str) -> tuple[int, int]:
    size = _size(value, name, square=True)
    if isinstance(size, int):
        raise ValueError(f"{name} is {value}; here it must be an int or have height and width.")
    return size


def _resample(value: Any) -> Resample:
    if not isinstance(value, int) or not 0 <= value < len(RESAMPLES):
        known = ", ".join(f"{index} {name}" for index, name in enumerate(RESAMPLES))
        raise ValueError(f"resample is {value}; known are Pillow's: {known}.")
    return RESAMPLES[value]


def _colours(value: Any) -> tuple[float, float, float]:
    """One number per colour; a bare number is all three."""
    values = (value,) if isinstance(value, int | float) else tuple(value)
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise ValueError(f"mean or std is {value}; it must have one number per colour, 3.")
    return values


def _height_width(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
