"""The public checkpoints that opsin is known to fit: name → shape, size, licence, published score.

Any other repository of these families loads by its hub id all the same; the catalogue is for `opsin models`, for
did-you-mean, and for checking that the shapes are right: a test builds every entry and counts its parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, Literal

Task = Literal["classify", "features", "fill-mask", "flow", "autoencode"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One published checkpoint.

    Args:
        name: hub id, or the name of the embedded model.
        architecture: family of the checkpoint: vit, deit, deit3, dino, dinov2; of Perceivers, the name that opsin's own
            files have for the network: perceiver, perceiver-text, perceiver-flow, perceiver-multimodal.
        params: of the model as opsin runs it: a pooler counts, so does the row of zeros that DeiT III's class token has
            for a position; DINOv2's mask token, used in training only, does not.
        image_size: pixels, the square that the position table is made for, None where it is none (text, flow); what a
            photo is resized to is for the checkpoint's own preprocessing to say (DINOv2: 224).
        licence: of the weights, as their repository states it.
        task: "classify", or "features" for a checkpoint without a head; else the name of its command.
        score: published ImageNet-1k top-1 in percent, by the protocol that `score_source` names; None where this
            project has seen no figure.
        url: where the weights are.
        revision, sha256: commit and digest of the file; None where not verified.
        config: arguments of the model's config; see `shape`.
    """

    name: str
    architecture: str
    params: int
    image_size: int | None
    licence: str
    task: Task
    score: float | None
    score_source: str | None
    url: str
    revision: str | None = None
    sha256: str | None = None
    config: dict[str, Any] = field(repr=False, hash=False)


def shape(name: str) -> Any:
    """The model shape of a catalogue entry, a config of `native.ARCHITECTURES`.

    Raises:
        KeyError: no such entry; `nearest` finds the ones alike.
    """
    from opsin.checkpoints.native import ARCHITECTURES  # listing the catalogue costs no torch

    entry = CATALOG[name]
    return ARCHITECTURES.get(entry.architecture, ARCHITECTURES["vit"])(**entry.config)


def nearest(name: str, n: int = 3) -> list[str]:
    """Up to `n` catalogue names like `name`, the likest first.

    Owner and timm's tag may be missing; upper or lower case, `_` or `-` make no difference.
    """

    def spellings(text: str) -> tuple[str, str, str]:
        full = text.lower().replace("_", "-")
        untagged = full.partition(".")[0]
        return untagged, full, untagged.rpartition("/")[2]

    def likeness(known: str) -> tuple[float, float]:
        ratios = [SequenceMatcher(None, *pair).ratio() for pair in zip(spellings(name), spellings(known), strict=True)]
        return max(ratios), ratios[0] if "/" in name else 0.0  # the owner, where one is named, decides among equals

    found = {known: likeness(known) for known in CATALOG}
    return sorted((known for known in found if found[known][0] >= 0.6), key=found.__getitem__, reverse=True)[:n]


SIZES = {
    size: {"embed_dim": dim, "num_layers": layers, "num_heads": heads, "mlp_dim": mlp_dim}
    for size, dim, layers, heads, mlp_dim in (
        ("tiny", 192, 12, 3, 768),
        ("small", 384, 12, 6, 1536),
        ("medium", 512, 12, 8, 2048),
        ("base", 768, 12, 12, 3072),
        ("large", 1024, 24, 16, 4096),
        ("huge", 1280, 32, 16, 5120),
        ("giant", 1536, 40, 24, 4096),  # DINOv2's, with a gated MLP
    )
}

# How a score was measured, on the 50,000 validation images of ImageNet-1k.
TIMM = "timm results: bicubic, centre crop of 0.9 at 224 pixels, of 1.0 at 384"
SQUASH = "transformers issue 28264: resized to 224 × 224"
JAX = "vision_transformer README: resized to 224 × 224"
PERCEIVER = "Jaegle et al. 2021, Perceiver IO, Table 7: centre crop of 0.875 at 224 pixels"

# Families: what their checkpoints share. transformers and timm differ in the norm and in how positions are resized.
HF: dict[str, Any] = {"norm_eps": 1e-12, "pos_resize": "bicubic"}
TIMM_VIT: dict[str, Any] = {"norm_eps": 1e-6, "pos_resize": "bicubic_antialias"}
DINOV2: dict[str, Any] = {"norm_eps": 1e-6, "layer_scale": True}

Row = tuple[str, str, int, int, int, float | None]  # name, size, patch, image size, params, score

GOOGLE: list[Row] = [
    ("google/vit-base-patch16-384", "base", 16, 384, 86_859_496, 84.21),
    ("google/vit-base-patch32-384", "base", 32, 384, 88_297_192, 81.65),
    ("google/vit-large-patch16-384", "large", 16, 384, 304_715_752, 85.16),
    ("google/vit-large-patch32-384", "large", 32, 384, 306_632_680, 81.51),
]
GOOGLE_21K: list[Row] = [  # the heads were zeroed before release; what is left of them is the pooler
    ("google/vit-base-patch16-224-in21k", "base", 16, 224, 86_389_248, None),
    ("google/vit-base-patch32-224-in21k", "base", 32, 224, 88_045_824, None),
    ("google/vit-large-patch16-224-in21k", "large", 16, 224, 304_351_232, None),
    ("google/vit-large-patch32-224-in21k", "large", 32, 224, 306_560_000, None),
    ("google/vit-huge-patch14-224-in21k", "huge", 14, 224, 632_404_480, None),
]
WINKAWAKS: list[Row] = [
    ("WinKawaks/vit-tiny-patch16-224", "tiny", 16, 224, 5_717_416, None),
    ("WinKawaks/vit-small-patch16-224", "small", 16, 224, 22_050_664, None),
]
DEIT: list[Row] = [
    ("facebook/deit-tiny-patch16-224", "tiny", 16, 224, 5_717_416, 72.190),
    ("facebook/deit-small-patch16-224", "small", 16, 224, 22_050_664, 79.856),
    ("facebook/deit-base-patch16-224", "base", 16, 224, 86_567_656, 81.980),
    ("facebook/deit-base-patch16-384", "base", 16, 384, 86_859_496, 83.108),
]
DEIT_DISTILLED: list[Row] = [
    ("facebook/deit-tiny-distilled-patch16-224", "tiny", 16, 224, 5_910_800, 74.538),
    ("facebook/deit-small-distilled-patch16-224", "small", 16, 224, 22_436_432, 81.204),
    ("facebook/deit-base-distilled-patch16-224", "base", 16, 224, 87_338_192, 83.384),
    ("facebook/deit-base-distilled-patch16-384", "base", 16, 384, 87_630_032, 85.438),
]
DINO: list[Row] = [
    ("facebook/dino-vits16", "small", 16, 224, 21_665_664, None),
    ("facebook/dino-vits8", "small", 8, 224, 21_670_272, None),
    ("facebook/dino-vitb16", "base", 16, 224, 85_798_656, None),
    ("facebook/dino-vitb8", "base", 8, 224, 85_807_872, None),
]
TIMM_1K: list[Row] = [
    ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "tiny", 16, 224, 5_717_416, 75.452),
    ("timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k", "tiny", 16, 384, 5_790_376, 78.438),
    ("timm/vit_small_patch32_224.augreg_in21k_ft_in1k", "small", 32, 224, 22_878_952, 76.010),
    ("timm/vit_small_patch32_384.augreg_in21k_ft_in1k", "small", 32, 384, 22_915_432, 80.476),
    ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "small", 16, 224, 22_050_664, 81.402),
    ("timm/vit_small_patch16_384.augreg_in21k_ft_in1k", "small", 16, 384, 22_196_584, 83.814),
    ("timm/vit_base_patch32_224.augreg_in21k_ft_in1k", "base", 32, 224, 88_224_232, 80.732),
    ("timm/vit_base_patch32_384.augreg_in21k_ft_in1k", "base", 32, 384, 88_297_192, 83.358),
    ("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "base", 16, 224, 86_567_656, 84.534),
    ("timm/vit_base_patch16_384.augreg_in21k_ft_in1k", "base", 16, 384, 86_859_496, 86.010),
    ("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "base", 16, 224, 86_567_656, 85.108),
    ("timm/vit_base_patch8_224.augreg_in21k_ft_in1k", "base", 8, 224, 86_576_872, 85.838),
    ("timm/vit_base_patch8_224.augreg2_in21k_ft_in1k", "base", 8, 224, 86_576_872, 86.252),
    ("timm/vit_large_patch16_224.augreg_in21k_ft_in1k", "large", 16, 224, 304_326_632, 85.856),
    ("timm/vit_large_patch16_384.augreg_in21k_ft_in1k", "large", 16, 384, 304_715_752, 87.096),
    ("timm/vit_small_patch16_224.augreg_in1k", "small", 16, 224, 22_050_664, 78.842),
    ("timm/vit_small_patch16_384.augreg_in1k", "small", 16, 384, 22_196_584, 81.130),
    ("timm/vit_base_patch32_224.augreg_in1k", "base", 32, 224, 88_224_232, 74.908),
    ("timm/vit_base_patch32_384.augreg_in1k", "base", 32, 384, 88_297_192, 78.750),
    ("timm/vit_base_patch16_224.augreg_in1k", "base", 16, 224, 86_567_656, 79.154),
    ("timm/vit_base_patch16_384.augreg_in1k", "base", 16, 384, 86_859_496, 81.102),
    ("timm/vit_base_patch16_224.orig_in21k_ft_in1k", "base", 16, 224, 86_567_656, 81.78),
    ("timm/vit_base_patch16_384.orig_in21k_ft_in1k", "base", 16, 384, 86_859_496, 84.21),
    ("timm/vit_large_patch32_384.orig_in21k_ft_in1k", "large", 32, 384, 306_632_680, 81.51),
    ("timm/vit_base_patch16_224.sam_in1k", "base", 16, 224, 86_567_656, 80.246),
    ("timm/vit_base_patch32_224.sam_in1k", "base", 32, 224, 88_224_232, 73.704),
]
TIMM_21K: list[Row] = [
    ("timm/vit_tiny_patch16_224.augreg_in21k", "tiny", 16, 224, 9_740_115, None),
    ("timm/vit_small_patch32_224.augreg_in21k", "small", 32, 224, 30_903_507, None),
    ("timm/vit_small_patch16_224.augreg_in21k", "small", 16, 224, 30_075_219, None),
    ("timm/vit_base_patch32_224.augreg_in21k", "base", 32, 224, 104_252_499, None),
    ("timm/vit_base_patch16_224.augreg_in21k", "base", 16, 224, 102_595_923, None),
    ("timm/vit_base_patch8_224.augreg_in21k", "base", 8, 224, 102_605_139, None),
    ("timm/vit_large_patch16_224.augreg_in21k", "large", 16, 224, 325_690_707, None),
]
TIMM_FEATURES: list[Row] = [
    ("timm/vit_base_patch16_224.orig_in21k", "base", 16, 224, 85_798_656, None),
    ("timm/vit_base_patch32_224.orig_in21k", "base", 32, 224, 87_455_232, None),
    ("timm/vit_large_patch16_224.orig_in21k", "large", 16, 224, 303_301_632, None),
    ("timm/vit_large_patch32_224.orig_in21k", "large", 32, 224, 305_510_400, None),
    ("timm/vit_huge_patch14_224.orig_in21k", "huge", 14, 224, 630_764_800, None),
]
TIMM_DINO: list[Row] = [
    ("timm/vit_small_patch16_224.dino", "small", 16, 224, 21_665_664, None),
    ("timm/vit_small_patch8_224.dino", "small", 8, 224, 21_670_272, None),
    ("timm/vit_base_patch16_224.dino", "base", 16, 224, 85_798_656, None),
    ("timm/vit_base_patch8_224.dino", "base", 8, 224, 85_807_872, None),
]
TIMM_DEIT: list[Row] = [
    ("timm/deit_tiny_patch16_224.fb_in1k", "tiny", 16, 224, 5_717_416, 72.190),
    ("timm/deit_small_patch16_224.fb_in1k", "small", 16, 224, 22_050_664, 79.856),
    ("timm/deit_base_patch16_224.fb_in1k", "base", 16, 224, 86_567_656, 81.980),
    ("timm/deit_base_patch16_384.fb_in1k", "base", 16, 384, 86_859_496, 83.108),
]
TIMM_DEIT_DISTILLED: list[Row] = [
    ("timm/deit_tiny_distilled_patch16_224.fb_in1k", "tiny", 16, 224, 5_910_800, 74.538),
    ("timm/deit_small_distilled_patch16_224.fb_in1k", "small", 16, 224, 22_436_432, 81.204),
    ("timm/deit_base_distilled_patch16_224.fb_in1k", "base", 16, 224, 87_338_192, 83.384),
    ("timm/deit_base_distilled_patch16_384.fb_in1k", "base", 16, 384, 87_630_032, 85.438),
]
DEIT3: list[Row] = [  # each twice: trained on ImageNet-1k alone, and on ImageNet-22k first
    ("deit3_small_patch16_224", "small", 16, 224, 22_059_880, None),
    ("deit3_small_patch16_384", "small", 16, 384, 22_205_800, None),
    ("deit3_medium_patch16_224", "medium", 16, 224, 38_850_024, None),
    ("deit3_base_patch16_224", "base", 16, 224, 86_586_088, None),
    ("deit3_base_patch16_384", "base", 16, 384, 86_877_928, None),
    ("deit3_large_patch16_224", "large", 16, 224, 304_375_784, None),
    ("deit3_large_patch16_384", "large", 16, 384, 304_764_904, None),
    ("deit3_huge_patch14_224", "huge", 14, 224, 632_127_720, None),
]
HYBRIDS: list[tuple[Row, tuple[int, ...]]] = [  # with the stages of the ResNet in front
    (("timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k", "tiny", 8, 224, 6_337_704, 71.800), ()),
    (("timm/vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k", "tiny", 8, 384, 6_355_944, 75.962), ()),
    (("timm/vit_small_r26_s32_224.augreg_in21k_ft_in1k", "small", 1, 224, 36_431_912, 81.856), (2, 2, 2, 2)),
    (("timm/vit_small_r26_s32_384.augreg_in21k_ft_in1k", "small", 1, 384, 36_468_392, 84.066), (2, 2, 2, 2)),
    (("timm/vit_base_r50_s16_384.orig_in21k_ft_in1k", "base", 1, 384, 98_950_952, 84.98), (3, 4, 9)),
    (("timm/vit_large_r50_s32_224.augreg_in21k_ft_in1k", "large", 1, 224, 328_994_856, 84.434), (3, 4, 6, 3)),
    (("timm/vit_large_r50_s32_384.augreg_in21k_ft_in1k", "large", 1, 384, 329_092_136, 86.188), (3, 4, 6, 3)),
]
PERCEIVERS: list[tuple[str, str, Task, int, int | None, float | None, dict[str, Any]]] = [  # …, image size, score, …
    ("vision-perceiver-conv", "perceiver", "classify", 48_646_522, 224, 82.1, {}),
    (
        "vision-perceiver-fourier", "perceiver", "classify", 48_440_627, 224, 79.0,
        {"front_end": "pixels", "max_resolution": (224, 224)},
    ),
    (
        "vision-perceiver-learned", "perceiver", "classify", 62_255_848, 224, 72.7,
        {"front_end": "conv1x1", "embed_dim": 256},
    ),
    ("language-perceiver", "perceiver-text", "fill-mask", 201_108_230, None, None, {}),
    ("optical-flow-perceiver", "perceiver-flow", "flow", 41_057_134, None, None, {}),
    ("multimodal-perceiver", "perceiver-multimodal", "autoencode", 19_858_855, 224, None, {}),
]  # fmt: skip
DINOV2_PARAMS = {  # size → registers → backbone, and with the linear head over class token and mean patch
    "small": {0: (22_056_192, 22_825_192), 4: (22_057_728, 22_826_728)},
    "base": {0: (86_579_712, 88_116_712), 4: (86_582_784, 88_119_784)},
    "large": {0: (304_367_616, 306_416_616), 4: (304_371_712, 306_420_712)},
    "giant": {0: (1_136_479_232, 1_139_552_232), 4: (1_136_485_376, 1_139_558_376)},
}


def _entry(row: Row, family: str, source: str | None = TIMM, num_classes: int = 1000, **config: Any) -> Entry:
    name, size, patch_size, image_size, params, score = row
    return Entry(
        name=name,
        architecture=family,
        params=params,
        image_size=image_size,
        licence="Apache-2.0",
        task="classify" if num_classes else "features",
        score=score,
        score_source=None if score is None else source,
        url=f"https://huggingface.co/{name}",
        config=SIZES[size]
        | {"image_size": (image_size, image_size), "patch_size": patch_size, "num_classes": num_classes}
        | config,
    )


def _perceivers() -> Iterator[Entry]:
    for name, architecture, task, params, image_size, score, config in PERCEIVERS:
        yield Entry(
            name=f"deepmind/{name}",
            architecture=architecture,
            params=params,
            image_size=image_size,
            licence="Apache-2.0",
            task=task,
            score=score,
            score_source=None if score is None else PERCEIVER,
            url=f"https://huggingface.co/deepmind/{name}",
            config=config | {"numerics": "transformers"},
        )


def _dinov2() -> Iterator[Entry]:
    for registers in (0, 4):
        for size, counts in DINOV2_PARAMS.items():
            backbone, with_head = counts[registers]
            config = DINOV2 | {"gated_mlp": size == "giant", "num_registers": registers}
            hf = config | {"pos_resize": "bicubic_antialias" if registers else "bicubic"}
            name = f"facebook/dinov2-with-registers-{size}" if registers else f"facebook/dinov2-{size}"
            yield _entry((name, size, 14, 518, backbone, None), "dinov2", num_classes=0, **hf)
            head = (f"{name}-imagenet1k-1-layer", size, 14, 518, with_head, None)
            yield _entry(head, "dinov2", pool="token_mean", **hf)
            name = f"timm/vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
            timm = config | {"pos_resize": "bicubic_antialias"}
            yield _entry((name, size, 14, 518, backbone, None), "dinov2", num_classes=0, **timm)


def _entries() -> Iterator[Entry]:
    yield Entry(
        name="opsin/vit-tiny",
        architecture="vit",
        params=5_646_024,
        image_size=64,
        licence="Apache-2.0",
        task="classify",
        score=41.1,
        score_source="5,000 held-out Tiny-ImageNet training images, 200 classes: benchmarks/embedded.py",
        url="in the package",
        config={
            "image_size": (64, 64),
            "patch_size": 8,
            "embed_dim": 256,
            "num_layers": 7,
            "num_heads": 4,
            "mlp_dim": 1024,
            "num_classes": 200,
            "class_token": False,
            "pool": "mean",
        },
    )
    yield Entry(
        name="opsin/perceiver-tiny",
        architecture="perceiver",
        params=5_929_740,
        image_size=64,
        licence="Apache-2.0",
        task="classify",
        score=36.1,
        score_source="5,000 held-out Tiny-ImageNet training images, 200 classes: benchmarks/embedded.py",
        url="in the package",
        config={
            "image_size": (64, 64),
            "max_resolution": (16, 16),
            "num_bands": 16,
            "num_latents": 32,
            "latent_dim": 256,
            "num_blocks": 1,
            "layers_per_block": 6,
            "num_heads": 4,
            "num_cross_heads": 4,
            "qk_dim": 256,
            "v_dim": 256,
            "mlp_ratio": 4,
            "num_classes": 200,
        },
    )
    yield _entry(("google/vit-base-patch16-224", "base", 16, 224, 86_567_656, 81.31), "vit", SQUASH, **HF)
    yield _entry(("google/vit-large-patch16-224", "large", 16, 224, 304_326_632, 82.7), "vit", JAX, **HF)
    yield from (_entry(row, "vit", **HF) for row in GOOGLE)
    yield from (_entry(row, "vit", num_classes=0, pre_logits=True, **HF) for row in GOOGLE_21K)
    yield from (_entry(row, "vit", **HF) for row in WINKAWAKS)
    yield from (_entry(row, "deit", **HF) for row in DEIT)
    yield from (_entry(row, "deit", distillation_token=True, **HF) for row in DEIT_DISTILLED)
    yield from (_entry(row, "dino", num_classes=0, **HF) for row in DINO)
    yield from _dinov2()
    yield from (_entry(row, "vit", **TIMM_VIT) for row in TIMM_1K)
    yield from (_entry(row, "vit", num_classes=21_843, **TIMM_VIT) for row in TIMM_21K)
    yield from (_entry(row, "vit", num_classes=0, **TIMM_VIT) for row in TIMM_FEATURES)
    yield from (_entry(row, "dino", num_classes=0, **TIMM_VIT) for row in TIMM_DINO)
    yield from (_entry(row, "deit", **TIMM_VIT) for row in TIMM_DEIT)
    yield from (_entry(row, "deit", distillation_token=True, **TIMM_VIT) for row in TIMM_DEIT_DISTILLED)
    yield from (_entry(row, "vit", stem=stem, stem_maths="timm", **TIMM_VIT) for row, stem in HYBRIDS)
    for tag in ("fb_in1k", "fb_in22k_ft_in1k"):
        for row in DEIT3:
            yield _entry((f"timm/{row[0]}.{tag}", *row[1:]), "deit3", layer_scale=True, **TIMM_VIT)
    yield from _perceivers()


CATALOG: dict[str, Entry] = {entry.name: entry for entry in _entries()}
