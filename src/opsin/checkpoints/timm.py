"""timm's names: its hub folders, in and out, and files; the original DeiT, DeiT III, DINO, DINOv2 and MAE files.

A bare file carries no settings. Its shape is that of its tensors, which leave open: the number of heads (`num_heads`),
the pooling of a file with both a class token and a plain final norm (the class token), and the preprocessing (a log
line says what was taken).
"""

import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsin.checkpoints import files, processors
from opsin.checkpoints.native import model_config_of
from opsin.checkpoints.npz import default_labels
from opsin.checkpoints.rules import Rule, State, Transform, invert, load, weight_and_bias, within, write_folder
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.resnet import stem_stride
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessConfig

log = logging.getLogger(__name__)

FORMAT = "timm"
PREPROCESS = "opsin_preprocess"  # in config.json, where timm's words do not say all of it
REGISTERS = ("reg_token", "register_tokens")  # timm, DINOv2


def _class_rows(t: Tensor, config: ViTConfig) -> Tensor:
    """Where positions are added before the class token joins (`no_embed_class`), it has none: a row of zeros."""
    rows = config.num_positioned if t.shape[1] == math.prod(config.grid) else 0
    return nn.functional.pad(t, (0, 0, rows, 0))


POSITIONS = Transform(_class_rows, lambda t, _: t)

BLOCK = [  # under the name of a layer
    *weight_and_bias("norm1", "norm1"),
    *weight_and_bias(("attn.q", "attn.k", "attn.v"), "attn.qkv"),
    *weight_and_bias("attn.out", "attn.proj"),
    Rule("attn_scale", "ls1.gamma"),
    Rule("attn_scale", "gamma_1"),  # DeiT III
    *weight_and_bias("norm2", "norm2"),
    *weight_and_bias("mlp.fc1", "mlp.fc1"),
    *weight_and_bias("mlp.fc2", "mlp.fc2"),
    *weight_and_bias("mlp.fc1", "mlp.w12"),  # DINOv2 giant
    *weight_and_bias("mlp.fc2", "mlp.w3"),
    Rule("mlp_scale", "ls2.gamma"),
    Rule("mlp_scale", "gamma_2"),
]

UNIT = [  # of the ResNet stem
    *(Rule(f"conv{i}.weight", f"conv{i}.weight") for i in (1, 2, 3)),
    *(rule for i in (1, 2, 3) for rule in weight_and_bias(f"norm{i}", f"norm{i}")),
    Rule("proj.weight", "downsample.conv.weight"),
    *weight_and_bias("proj_norm", "downsample.norm"),
]


def stem_rules(config: ViTConfig) -> list[Rule]:
    if config.stem is None:
        return []
    root = "patch_embed.backbone.stem" if config.stem else "patch_embed.backbone"
    rules = [Rule("stem.root.weight", f"{root}.conv.weight"), *weight_and_bias("stem.root_norm", f"{root}.norm")]
    for stage, num_units in enumerate(config.stem):
        for unit in range(num_units):
            rules += within(f"stem.stages.{stage}.{unit}.", f"patch_embed.backbone.stages.{stage}.blocks.{unit}.", UNIT)
    return rules


def rules(config: ViTConfig) -> list[Rule]:
    return [
        *stem_rules(config),
        Rule("cls_token", "cls_token"),
        Rule("dist_token", "dist_token"),
        *(Rule("registers", name) for name in REGISTERS),
        Rule("pos_embed", "pos_embed", POSITIONS),
        *weight_and_bias("patch_embed", "patch_embed.proj"),
        Rule((), "mask_token"),
        *within("layers.{i}.", "blocks.{i}.", BLOCK),
        *weight_and_bias("norm", "fc_norm" if config.norm_after_pool else "norm"),
        Rule("attn_pool.probe", "attn_pool.latent"),
        *weight_and_bias("attn_pool.attn.q", "attn_pool.q"),
        *weight_and_bias(("attn_pool.attn.k", "attn_pool.attn.v"), "attn_pool.kv"),
        *weight_and_bias("attn_pool.attn.out", "attn_pool.proj"),
        *weight_and_bias("attn_pool.norm", "attn_pool.norm"),
        *weight_and_bias("attn_pool.mlp.fc1", "attn_pool.mlp.fc1"),
        *weight_and_bias("attn_pool.mlp.fc2", "attn_pool.mlp.fc2"),
        *weight_and_bias("pre_logits", "pre_logits.fc"),
        *weight_and_bias("head", "head"),
        *weight_and_bias("head_dist", "head_dist"),
    ]


ARCHITECTURE = re.compile(r"(vit|deit|deit3)_\w+")
OTHER_MATHS = ("clip", "siglip", "rpn", "relpos", "rope", "naflex")  # same names in part, other formulas
FROM_SHAPE = (  # model_args that the tensors or the rest of config.json tell as well
    "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "init_values",
    "class_token", "no_embed_class", "reg_tokens", "fc_norm", "dynamic_img_size", "dynamic_img_pad",
    "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate",
    "weight_init", "fix_init",
)  # fmt: skip
POOLS = {"token": "token", "avg": "mean", "map": "map"}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}


WNID = re.compile(r"n\d{8}")
HEADS = {"vit_base_patch16_gap_224": 16}  # the one architecture whose heads neither width nor `model_args` tells


def num_heads(embed_dim: int, num_layers: int) -> int:
    """Heads of the published architectures: 64 channels each, but for the few listed.

    Raises:
        ValueError: no published width.
    """
    if (embed_dim, num_layers) == (768, 8):
        return 8  # vit_small_patch16_224 of 2020
    wide = {1152: 72, 1280: 80, 1408: 88, 1664: 104, 1792: 112}  # So400m, H, g, G, e: 16 heads all
    if embed_dim not in wide and embed_dim % 64:
        raise ValueError(
            f"{embed_dim} channels do not split into heads of 64. "
            'Say how many heads: a config.json beside it with "model_args": {"num_heads": …}.'
        )
    return embed_dim // wide.get(embed_dim, 64)


def claims(config: dict[str, Any]) -> bool:
    return "architecture" in config and "model_type" not in config


def read(folder: Path, config: dict[str, Any], weights: Path) -> tuple[ViT, PreprocessConfig, Labels | None]:
    """A folder as timm pushes it to the hub.

    Raises:
        CheckpointError: an architecture or setting that opsin does not have; tensors that do not fit.
    """
    path, architecture, args = folder / "config.json", str(config["architecture"]), config.get("model_args") or {}
    if not ARCHITECTURE.fullmatch(architecture) or any(part in architecture for part in OTHER_MATHS):
        raise CheckpointError(
            f"{path} is the timm architecture {architecture!r}. opsin reads vit_* and deit*, "
            f"and of these not {', '.join(OTHER_MATHS)}."
        )
    unknown = sorted(set(args) - {*FROM_SHAPE, "num_heads", "act_layer", "global_pool"})
    if unknown:
        raise CheckpointError(f"{path}: opsin does not know the model_args {', '.join(unknown)} of timm.")
    pool, activation = args.get("global_pool", config.get("global_pool")), args.get("act_layer", "gelu")
    if pool not in (*POOLS, None) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: global_pool {pool!r} with act_layer {activation!r}. "
            f"opsin has {', '.join(POOLS)}, and {', '.join(ACTIVATIONS)}."
        )
    pretrained = config.get("pretrained_cfg") or {}
    state = files.read_tensors(weights)
    model = _load(
        state,
        folder,
        grid_of=_sides(args.get("img_size")) or tuple(pretrained.get("input_size") or ())[1:],
        heads=args.get("num_heads") or HEADS.get(architecture),
        pool=POOLS[pool] if pool else None,
        activation=ACTIVATIONS[activation],
    )
    try:
        if PREPROCESS in config:
            preprocess = PreprocessConfig.from_spec(config[PREPROCESS])
        elif pretrained:
            preprocess = processors.read_timm(pretrained)
        else:
            preprocess = _default_preprocess(architecture, state, model.config, folder)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f'{path}: "pretrained_cfg" or "{PREPROCESS}" {error}') from error
    return model, preprocess, _read_labels(config, model.config.num_classes)


def _sides(img_size: Any) -> tuple[int, ...]:
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size or ())


def read_file(path: Path) -> tuple[ViT, PreprocessConfig, Labels | None]:
    """A bare weight file.

    Raises:
        CheckpointError: other names than timm's; tensors that do not fit.
    """
    state = files.read_tensors(path)
    if "patch_embed.proj.weight" not in state:
        found = ", ".join(list(state)[:5])
        raise CheckpointError(
            f"{path} does not have timm's names (patch_embed.proj.weight, …) but {found}, … "
            "For weights of transformers or of opsin, give the folder with config.json and the weights."
        )
    model = _load(state, path)
    preprocess = _default_preprocess(path.name.lower(), state, model.config, path)
    return model, preprocess, _read_labels({}, model.config.num_classes)


def _load(
    state: State,
    path: Path,
    *,
    grid_of: tuple[int, ...] = (),
    heads: int | None = None,
    pool: str | None = None,
    activation: str = "gelu",
) -> ViT:
    config = infer_config(state, path, grid_of=grid_of, heads=heads, pool=pool, activation=activation)
    return load(fold_register_positions(state, config), rules(config), config, str(path))


def fold_register_positions(state: State, config: ViTConfig) -> State:
    """Where register tokens have positions, too, put them into the tokens: the sum is all that the model sees."""
    sizes = [config.num_positioned, config.num_registers, math.prod(config.grid)]
    if not config.num_registers or state["pos_embed"].shape[1] != sum(sizes):
        return state
    front, positions, patches = state["pos_embed"].split(sizes, dim=1)
    name = next(name for name in REGISTERS if name in state)
    return state | {name: state[name] + positions, "pos_embed": torch.cat([front, patches], dim=1)}


def infer_config(
    state: State, path: Path, *, grid_of: tuple[int, ...], heads: int | None, pool: str | None, activation: str
) -> ViTConfig:
    stem = None
    if any(name.startswith("patch_embed.backbone.") for name in state):
        units = re.compile(r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.weight")
        stages = [match[1] for match in map(units.fullmatch, state) if match]
        stem = tuple(stages.count(stage) for stage in sorted(set(stages), key=int))
    fc1 = state.get("blocks.0.mlp.fc1.weight", state.get("blocks.0.mlp.w12.weight"))
    fc2 = state.get("blocks.0.mlp.fc2.weight", state.get("blocks.0.mlp.w3.weight"))
    patch, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patch is None or positions is None or fc1 is None or fc2 is None:
        wanted = "patch_embed.proj.weight, pos_embed, blocks.0.mlp.fc1.weight, blocks.0.mlp.fc2.weight"
        raise CheckpointError(f"{path} is not a Vision Transformer that opsin reads. It should have {wanted}.")
    layers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    registers = next((state[name] for name in REGISTERS if name in state), None)
    class_token, distillation = "cls_token" in state, "dist_token" in state
    after_pool = "fc_norm.weight" in state
    if pool is None:
        pool = "map" if "attn_pool.latent" in state else "mean" if after_pool or not class_token else "token"
    try:
        embed_dim, num_channels, patch_height, patch_width = patch.shape
        num_registers = 0 if registers is None else registers.shape[1]
        _, rows, _ = positions.shape
        _, mlp_dim = fc2.shape
        stride = patch_height * stem_stride(stem)
        image_size = _image_size(rows, class_token + distillation, num_registers, stride, grid_of)
        if patch_height != patch_width:
            raise ValueError(f"its patches are {patch_height}×{patch_width}, not square.")
        heads = heads or num_heads(embed_dim, len(layers))
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a Vision Transformer that opsin reads: {error}") from error
    return model_config_of(
        ViTConfig,
        path,
        image_size=image_size,
        patch_size=patch_height,
        num_channels=num_channels if stem is None else 3,
        stem=stem,
        stem_maths="timm",
        embed_dim=embed_dim,
        num_layers=len(layers),
        num_heads=heads,
        mlp_dim=mlp_dim,
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
        norm_eps=1e-6,
        activation=activation,
        gated_mlp=len(fc1) == 2 * mlp_dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        layer_scale=any(f"blocks.0.{name}" in state for name in ("ls1.gamma", "gamma_1")),
        # of the DINOv2 files, those without registers were used without antialiasing
        pos_resize="bicubic" if "mask_token" in state and not num_registers else "bicubic_antialias",
        class_token=class_token,
        distillation_token=distillation,
        distillation_head="head_dist.weight" in state,
        num_registers=num_registers,
        pool=pool,
        norm_after_pool=after_pool,
        pre_logits="pre_logits.fc.weight" in state,
    )


def _image_size(
    rows: int, num_positioned: int, num_registers: int, patch_size: int, grid_of: tuple[int, ...]
) -> tuple[int, int]:
    """Pixels (H, W) of a position table: what the config says if it fits, else a square.

    Raises:
        ValueError: neither fits.
    """
    counts = [rows - prefix for prefix in (num_positioned, 0, num_positioned + num_registers)]
    if len(grid_of) == 2 and (grid_of[0] // patch_size) * (grid_of[1] // patch_size) in counts:
        return grid_of[0], grid_of[1]
    for count in counts:
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return side * patch_size, side * patch_size
    raise ValueError(
        f"{rows} positions are no square grid, with or without class token; config.json should say its size."
    )


def _default_preprocess(name: str, state: State, config: ViTConfig, where: Path) -> PreprocessConfig:
    """DeiT, DINO and MAE were trained on ImageNet's mean and 224 of 256 pixels, timm's own ViTs on 0.5 and 90 %."""
    dinov2 = "mask_token" in state or "register_tokens" in state
    original = dinov2 or "dist_token" in state or any(word in name for word in ("deit", "dino", "mae"))
    side = 224 if dinov2 else config.image_size[0]  # DINOv2's table is for 518, its evaluation at 224
    crop_pct = 1.0 if side >= 384 else 0.875 if original else 0.9
    if original:
        preprocess = PreprocessConfig.timm_crop(side, crop_pct=crop_pct, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    else:
        preprocess = PreprocessConfig.timm_crop(side, crop_pct=crop_pct)
    log.warning("%s says nothing of preprocessing: taking what its kind was trained with, %s", where, preprocess)
    return preprocess


def _read_labels(config: dict[str, Any], num_classes: int) -> Labels | None:
    names = config.get("label_names")
    if not num_classes or not names:
        return default_labels(num_classes)
    if not isinstance(names, list) or len(names) != num_classes:
        raise CheckpointError(f'"label_names" of config.json should be a list of {num_classes} names.')
    descriptions = config.get("label_descriptions") or {}
    labels = Labels.from_names([str(descriptions.get(name, name)) for name in names])
    if labels.wnids is None and all(WNID.fullmatch(str(name)) for name in names):
        labels = replace(labels, wnids=tuple(names))
    return labels


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = {  # channels, layers, heads; the MLP is four times as wide
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "giant": (1536, 40, 24),  # DINOv2's
}


def _shape(size: str, patch_size: int, image_size: int = 224, **settings: Any) -> ViTConfig:
    embed_dim, num_layers, num_heads = SIZES[size]
    settings = {"mlp_dim": 4 * embed_dim} | settings
    return ViTConfig(
        image_size=(image_size, image_size),
        patch_size=patch_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        stem_maths="timm",
        **settings,
    )


PLAIN: dict[tuple[str, int], tuple[int, ...]] = {  # size, side of the image → patches
    ("tiny", 224): (16,),
    ("small", 224): (32, 16, 8),
    ("base", 224): (32, 16, 8),
    ("large", 224): (32, 16, 14),
    ("huge", 224): (14,),
    ("tiny", 384): (16,),
    ("small", 384): (32, 16),
    ("base", 384): (32, 16),
    ("large", 384): (32, 16),
}
HYBRIDS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "vit_tiny_r_s16_p8": ("tiny", 8, ()),
    "vit_small_r26_s32": ("small", 1, (2, 2, 2, 2)),
    "vit_base_r50_s16": ("base", 1, (3, 4, 9)),
    "vit_large_r50_s32": ("large", 1, (3, 4, 6, 3)),
}
SWIGLU: dict[str, Any] = {"gated_mlp": True, "mlp_dim": 4096}
DINOV2: dict[str, dict[str, Any]] = {"small": {}, "base": {}, "large": {}, "giant": SWIGLU}

ARCHITECTURES: dict[str, ViTConfig] = {  # what timm builds under a name when nothing else is said
    **{
        f"vit_{size}_patch{patch}_{side}": _shape(size, patch, side)
        for (size, side), patches in PLAIN.items()
        for patch in patches
    },
    **{
        f"deit_{size}_distilled_patch16_{side}": _shape(size, 16, side, distillation_token=True)
        for size, side in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
    },
    **{
        f"deit3_{size}_patch{patch}_{side}": _shape(size, patch, side, layer_scale=True)
        for size, patch, sides in (("small", 16, (224, 384)), ("base", 16, (224, 384)), ("large", 16, (224, 384)),
                                   ("huge", 14, (224,)))
        for side in sides
    },
    **{
        f"vit_{size}_patch14_{registers}dinov2": _shape(size, 14, 518, layer_scale=True, num_registers=count, **mlp)
        for size, mlp in DINOV2.items()
        for registers, count in (("", 0), ("reg4_", 4))
    },
    **{
        f"{name}_{side}": _shape(size, patch, side, stem=stem)
        for name, (size, patch, stem) in HYBRIDS.items()
        for side in (224, 384)
    },
}  # fmt: skip
BEFORE_CLASS_TOKEN = ("deit3_", "reg4_dinov2")  # in their names: positions are of patches alone (`no_embed_class`)

SAME_ARGUMENT = {
    "patch_size": "patch_size", "num_channels": "in_chans", "embed_dim": "embed_dim", "num_layers": "depth",
    "num_heads": "num_heads", "qkv_bias": "qkv_bias", "class_token": "class_token", "num_registers": "reg_tokens",
}  # fmt: skip


def contents(model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> dict[str, Any]:
    """The files that `write` writes: name → tensors, or JSON.

    Raises:
        CheckpointError: timm has no such model, or none of such images; the message says what stands in the way.
    """
    if not isinstance(model, ViT):
        raise CheckpointError(f"timm has no {type(model).__name__}.")
    config = model.config
    architecture, args = _architecture(config)
    pretrained: dict[str, Any] = {"input_size": [3, *config.image_size]}
    if preprocess is not None:
        try:
            pretrained, _ = processors.write_timm(preprocess)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if preprocess.image_size != config.image_size:  # as DINOv2: positions for 518 pixels, images of 224
            args |= {"img_size": list(config.image_size), "dynamic_img_size": True}
    foreign = invert(model.state_dict(), rules(config), config)
    state = {name: tensor.cpu().float() for name, tensor in foreign.items()}
    state["pos_embed"], whole = _positions(state["pos_embed"], architecture, config)
    if whole:
        args["no_embed_class"] = False
    data: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": config.num_classes,
        "num_features": config.embed_dim,
        "global_pool": args.get("global_pool", "token"),
        "model_args": args,
        "pretrained_cfg": pretrained
        | {"fixed_input_size": "dynamic_img_size" not in args, "num_classes": config.num_classes, "custom_load": False},
    }
    if config.num_classes and labels is not None:
        data |= _write_labels(labels)
    if preprocess is not None and processors.read_timm(pretrained) != preprocess:
        data[PREPROCESS] = preprocess.spec()
    return {"model.safetensors": state, "config.json": data}


def write(folder: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> list[Path]:
    """Write a folder that `timm.create_model("local-dir:…", pretrained=True)` loads, with equal outputs.

    So does the architecture that config.json names, with the arguments of its `model_args` (often none):
    `timm.create_model(architecture, checkpoint_path=…/model.safetensors, num_classes=…, **model_args)`.
    Where timm's preprocessing is near to this model's and not the same, a warning says in what; opsin reads its own.
    Raises:
        CheckpointError: timm has no such model, or none of such images; the message says what stands in the way.
    """
    found = contents(model, preprocess, labels)
    assert isinstance(model, ViT)
    _, differences = ({}, []) if preprocess is None else processors.write_timm(preprocess)
    if differences:
        log.warning("The pixels that timm makes are near to this model's and not the same: %s.", "; ".join(differences))
    if labels is not None and labels.multi_label:
        log.warning("timm's files cannot say that an image may have several classes: use a sigmoid, not a softmax.")
    if model.config.pos_resize != "bicubic_antialias":
        log.warning(
            "At sizes other than %s, timm will resize positions by bicubic_antialias, not %s as this model does.",
            model.config.image_size, model.config.pos_resize,
        )  # fmt: skip
    return write_folder(Path(folder), found)


def _architecture(config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """timm's name of the nearest shape, and what `timm.create_model` must be told beside it."""
    distilled = config.distillation_token
    heads = config.distillation_head and config.num_classes
    obstacles = [
        (config.pool not in POOLS.values(), f'pooling "{config.pool}" (it has {", ".join(POOLS.values())})'),
        (config.pre_logits, "a pre-logits layer"),
        (config.norm_eps > 1e-6, f"norm_eps {config.norm_eps} (it is always 1e-06)"),
        (distilled and not heads, "a distillation token without a head"),
        (distilled and config.pool != "token", f'a distillation token and pooling "{config.pool}"'),
        (distilled and config.norm_after_pool, "a distillation token and a norm after the pooling"),
        (distilled and config.num_registers, "a distillation token and registers"),
        (config.gated_mlp and config.pool == "map", "a gated MLP and attention pooling"),
        (config.stem is not None and config.stem_maths != "timm", "a stem with the JAX release's constants"),
    ]
    reasons = [reason for present, reason in obstacles if present]
    if reasons:
        raise CheckpointError(f"timm has no model with {', nor with '.join(reasons)}.")
    found = {name: _model_args(config, shape) for name, shape in ARCHITECTURES.items()}
    possible = {name: args for name, args in found.items() if args is not None}
    if not possible:
        parts = [f"a stem of {config.stem} units"] if config.stem is not None else []
        parts += [
            part for part, there in (("a distillation token", distilled), ("a gated MLP", config.gated_mlp)) if there
        ]
        raise CheckpointError(f"timm has no model with {' and '.join(parts)}.")
    return min(possible.items(), key=lambda item: len(item[1]))


def _model_args(config: ViTConfig, shape: ViTConfig) -> dict[str, Any] | None:
    """What makes an architecture of `shape` one of `config`; None: no argument does."""
    fixed = ("stem", "gated_mlp", "distillation_token")
    if any(getattr(config, name) != getattr(shape, name) for name in fixed) or shape.layer_scale > config.layer_scale:
        return None
    args = {
        theirs: getattr(config, ours)
        for ours, theirs in SAME_ARGUMENT.items()
        if getattr(config, ours) != getattr(shape, ours)
    }
    if "embed_dim" in args or "depth" in args:
        args["num_heads"] = config.num_heads  # a reader takes those of the published widths
    if config.image_size != shape.image_size:
        args["img_size"] = list(config.image_size)
    if config.mlp_dim * shape.embed_dim != shape.mlp_dim * config.embed_dim:
        hidden = config.mlp_dim * (2 if config.gated_mlp else 1)
        ratio = hidden / config.embed_dim
        args["mlp_ratio"] = ratio if int(config.embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf)
    if config.layer_scale > shape.layer_scale:
        args["init_values"] = 1e-5
    if config.activation != "gelu" and not config.gated_mlp:
        args["act_layer"] = config.activation
    if config.pool != "token":
        args["global_pool"] = next(theirs for theirs, ours in POOLS.items() if ours == config.pool)
    if config.norm_after_pool != (config.pool == "mean"):
        args["fc_norm"] = config.norm_after_pool
    return args


def _positions(table: Tensor, architecture: str, config: ViTConfig) -> tuple[Tensor, bool]:
    """The table as the architecture has it: of patches alone, or with the rows of all tokens, of registers too.

    Returns:
        The table, and whether it is whole where the architecture's own has patches alone.
    """
    if config.distillation_token or not (config.class_token or config.num_registers):
        return table, False
    front, patches = table[:, : config.num_positioned], table[:, config.num_positioned :]
    of_patches = any(part in architecture for part in BEFORE_CLASS_TOKEN)
    if of_patches and not front.any():
        return patches.contiguous(), False
    return torch.cat([front, torch.zeros(1, config.num_registers, config.embed_dim), patches], dim=1), of_patches


def _write_labels(labels: Labels) -> dict[str, Any]:
    wnids = labels.wnids or ()
    if len(set(wnids) - {""}) < len(labels):  # a name of its own for each, as `label_descriptions` needs
        return {"label_names": list(labels.names)}
    return {"label_names": list(wnids), "label_descriptions": dict(zip(wnids, labels.names, strict=True))}
