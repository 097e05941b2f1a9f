"""Every entry built and counted; the counts against those that were published."""

import subprocess
import sys
from collections import Counter
from typing import get_args

import pytest
import torch

from opsin import checkpoints
from opsin.checkpoints import catalog
from opsin.checkpoints.catalog import CATALOG, Entry, Task, nearest, shape
from opsin.checkpoints.reader import EMBEDDED
from opsin.checkpoints.rules import MODELS
from opsin.models.perceiver_io import ImagePerceiverConfig
from opsin.models.vit import ViTConfig
from opsin.recipes import perceiver_tiny, vit_tiny

# Parameters with 1,000 classes, without pre_logits: (width, patch, image size) → count. Source: vision_transformer
# `models_test.py`, and instantiation of its variants.
PUBLISHED = {
    (192, 16, 224): 5_717_416,
    (192, 16, 384): 5_790_376,
    (384, 32, 224): 22_878_952,
    (384, 32, 384): 22_915_432,
    (384, 16, 224): 22_050_664,
    (384, 16, 384): 22_196_584,
    (768, 32, 224): 88_224_232,
    (768, 32, 384): 88_297_192,
    (768, 16, 224): 86_567_656,
    (768, 16, 384): 86_859_496,
    (768, 8, 224): 86_576_872,
    (1024, 32, 384): 306_632_680,
    (1024, 16, 224): 304_326_632,
    (1024, 16, 384): 304_715_752,
}
PUBLISHED_BY_NAME = {  # ViTModel with its pooler; AugReg's heads of 21,843 classes; Perceivers of transformers
    "google/vit-base-patch16-224-in21k": 86_389_248,
    "google/vit-large-patch16-224-in21k": 304_351_232,
    "google/vit-huge-patch14-224-in21k": 632_404_480,
    "timm/vit_tiny_patch16_224.augreg_in21k": 9_740_115,
    "timm/vit_small_patch16_224.augreg_in21k": 30_075_219,
    "timm/vit_base_patch16_224.augreg_in21k": 102_595_923,
    "timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k": 6_337_704,
    "timm/vit_small_r26_s32_224.augreg_in21k_ft_in1k": 36_431_912,
    "timm/vit_large_r50_s32_224.augreg_in21k_ft_in1k": 328_994_856,
    "deepmind/vision-perceiver-conv": 48_646_522,
    "deepmind/vision-perceiver-fourier": 48_440_627,
    "deepmind/vision-perceiver-learned": 62_255_848,
    "deepmind/language-perceiver": 201_108_230,
    "deepmind/optical-flow-perceiver": 41_057_134,
    "deepmind/multimodal-perceiver": 19_858_855,
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_every_entry_builds_with_its_count(entry: Entry) -> None:
    config = shape(entry.name)
    with torch.device("meta"):
        model = MODELS[type(config)](config)
    assert count(model) == entry.params
    if entry.image_size is not None:
        assert config.image_size == (entry.image_size, entry.image_size)
    if isinstance(config, ViTConfig | ImagePerceiverConfig):
        assert (config.num_classes > 0) == (entry.task == "classify")
    plain = isinstance(config, ViTConfig) and config.stem is None and not config.distillation_token
    if entry.architecture in ("vit", "deit") and config.num_classes == 1000 and plain:
        assert entry.params == PUBLISHED[config.embed_dim, config.patch_size, config.image_size[0]]
    assert entry.params == PUBLISHED_BY_NAME.get(entry.name, entry.params)


def test_every_published_count_is_met() -> None:
    shapes = [shape(name) for name, entry in CATALOG.items() if entry.architecture in ("vit", "deit")]
    assert PUBLISHED.keys() <= {(c.embed_dim, c.patch_size, c.image_size[0]) for c in shapes}
    assert PUBLISHED_BY_NAME.keys() <= CATALOG.keys()


def test_deit3_is_a_vit_with_two_scales_per_layer() -> None:
    for name, entry in CATALOG.items():
        config = shape(name)
        if entry.architecture != "deit3":
            continue
        published = PUBLISHED.get((config.embed_dim, config.patch_size, config.image_size[0]))
        assert not published or entry.params == published + 2 * config.num_layers * config.embed_dim


def test_counts_of_the_reference_models() -> None:
    """Families that the published table leaves out, against transformers."""
    from transformers import (
        DeiTConfig,
        DeiTForImageClassificationWithTeacher,
        Dinov2Config,
        Dinov2ForImageClassification,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTModel,
    )

    small = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    giant = {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "image_size": 518,
        "patch_size": 14,
    }
    with torch.device("meta"):
        deit = DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=1000))
        dino = ViTModel(ViTConfig(patch_size=8), add_pooling_layer=False)
        dinov2 = Dinov2ForImageClassification(Dinov2Config(**giant, use_swiglu_ffn=True, num_labels=1000))
        registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small))
    assert CATALOG["facebook/deit-base-distilled-patch16-224"].params == count(deit)
    assert CATALOG["facebook/dino-vitb8"].params == count(dino)
    mask_token = 1536
    assert CATALOG["facebook/dinov2-giant-imagenet1k-1-layer"].params == count(dinov2) - mask_token
    mask_token = 384
    assert CATALOG["facebook/dinov2-with-registers-small"].params == count(registers) - mask_token


def test_the_embedded_models_have_the_shape_of_their_recipes() -> None:
    assert shape("opsin/vit-tiny") == vit_tiny.recipe().model
    assert shape("opsin/perceiver-tiny") == perceiver_tiny.recipe().model


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_models_are_their_entries(name: str) -> None:
    read = checkpoints.read(name)
    assert read.model.config == shape(name)
    assert count(read.model) == CATALOG[name].params
    assert read.labels is not None and len(read.labels) == 200
    assert sum(path.stat().st_size for path in read.source.files) <= 12e6


def test_entries_are_whole() -> None:
    for name, entry in CATALOG.items():
        assert entry.name == name
        assert entry.licence and entry.url
        assert (entry.score is None) == (entry.score_source is None)
        assert entry.score is None or 50 < entry.score < 95 or name in EMBEDDED
        assert name in EMBEDDED or entry.url == f"https://huggingface.co/{name}"
    assert next(iter(CATALOG)) == "opsin/vit-tiny"


def test_no_family_is_left_out() -> None:
    assert len(CATALOG) == 130
    owners = Counter(name.partition("/")[0] for name in CATALOG)
    assert owners == {"google": 11, "facebook": 28, "timm": 81, "deepmind": 6, "WinKawaks": 2, "opsin": 2}
    assert {entry.task for entry in CATALOG.values()} == set(get_args(Task))


def test_published_scores() -> None:
    large = CATALOG["google/vit-large-patch16-224"]
    assert (large.score, large.params) == (82.7, 304_326_632)
    assert large.score_source == "vision_transformer README: resized to 224 × 224"
    assert CATALOG["google/vit-base-patch16-224"].score == 81.31
    assert CATALOG["timm/vit_large_patch16_384.augreg_in21k_ft_in1k"].score == 87.096
    perceivers = {
        name: e.score for name, e in CATALOG.items() if e.architecture == "perceiver" and name not in EMBEDDED
    }
    assert perceivers == {
        "deepmind/vision-perceiver-conv": 82.1,
        "deepmind/vision-perceiver-fourier": 79.0,
        "deepmind/vision-perceiver-learned": 72.7,
    }


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("vit-base-p16-224", "google/vit-base-patch16-224"),
        ("google/vit-large-patch16", "google/vit-large-patch16-224"),
        ("Google/ViT_base_patch16_224", "google/vit-base-patch16-224"),
        ("timm/vit_large_patch16_384", "timm/vit_large_patch16_384.augreg_in21k_ft_in1k"),
        ("facebook/dino-v2-base", "facebook/dinov2-base"),
        ("vit-tiny", "opsin/vit-tiny"),
        ("perceiver-tiny", "opsin/perceiver-tiny"),
        ("deepmind/vision-perceiver", "deepmind/vision-perceiver-conv"),
    ],
)
def test_nearest(name: str, best: str) -> None:
    found = nearest(name)
    assert found[0] == best
    assert len(found) <= 3 and set(found) <= CATALOG.keys()


def test_nothing_is_near_to_something_else() -> None:
    assert nearest("") == nearest("a cat") == []
    assert len(nearest("vit", 1)) <= 1


def test_the_catalogue_itself_needs_no_torch() -> None:
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("catalog", {catalog.__file__!r})
module = sys.modules["catalog"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.CATALOG and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
