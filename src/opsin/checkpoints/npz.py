"""Google's .npz files: vision_transformer (original and AugReg) and big_vision."""

import logging
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from opsin.checkpoints import files
from opsin.checkpoints.native import model_config_of
from opsin.checkpoints.rules import TRANSPOSE, Rule, State, Transform, invert, load
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.position import sincos_2d
from opsin.models.resnet import stem_stride
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

log = logging.getLogger(__name__)

FORMAT = "npz"
PREFIXES = ("opt/target/", "params/img/", "params/", "img/")  # optimiser wrap of BiT days, LiT's image tower, flax


def _heads(t: Tensor, config: ViTConfig) -> Tensor:
    return t.unflatten(-1, (config.num_heads, -1))


CONV = Transform(lambda t, _: t.permute(3, 2, 0, 1), lambda t, _: t.permute(2, 3, 1, 0))  # H W in out
INTO_HEADS = Transform(lambda t, _: t.flatten(1).mT, lambda t, config: _heads(t.mT, config))  # D heads d
OUT_OF_HEADS = Transform(  # heads d D
    lambda t, _: t.flatten(0, 1).mT, lambda t, config: t.mT.unflatten(0, (config.num_heads, -1))
)
HEADS_BIAS = Transform(lambda t, _: t.flatten(), _heads)  # heads d
BEFORE_CLASS_TOKEN = Transform(  # N D: added to the patches before the class token joins them, which has no position
    lambda t, config: nn.functional.pad(t, (0, 0, config.num_positioned, 0)),
    lambda t, config: t[:, config.num_positioned :],
)


def _norm(native: str, foreign: str) -> list[Rule]:
    return [Rule(f"{native}.weight", f"{foreign}/scale"), Rule(f"{native}.bias", f"{foreign}/bias")]


def _dense(native: str, foreign: str, transform: Transform = TRANSPOSE) -> list[Rule]:
    return [Rule(f"{native}.weight", f"{foreign}/kernel", transform), Rule(f"{native}.bias", f"{foreign}/bias")]


def _attention(native: str, foreign: str) -> list[Rule]:
    rules = _dense(f"{native}.out", f"{foreign}/out", OUT_OF_HEADS)
    for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += [
            Rule(f"{native}.{ours}.weight", f"{foreign}/{theirs}/kernel", INTO_HEADS),
            Rule(f"{native}.{ours}.bias", f"{foreign}/{theirs}/bias", HEADS_BIAS),
        ]
    return rules


def _mlp(native: str, foreign: str) -> list[Rule]:
    return _dense(f"{native}.fc1", f"{foreign}/Dense_0") + _dense(f"{native}.fc2", f"{foreign}/Dense_1")


class Block(NamedTuple):
    """Names of the modules in a layer: flax numbers them."""

    attention: str
    norm2: str
    mlp: str


OLD = Block("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")  # all modules of a layer together
NEW = Block("MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")  # big_vision: each kind by itself

OLD_POSITIONS = "Transformer/posembed_input/pos_embedding"
POSITIONS = "pos_embedding"


FLAT = Transform(lambda t, _: t.flatten(), lambda t, _: t)  # group norms stand as (1, 1, 1, C) in some files


def _group_norm(native: str, foreign: str) -> list[Rule]:
    return [Rule(f"{native}.weight", f"{foreign}/scale", FLAT), Rule(f"{native}.bias", f"{foreign}/bias", FLAT)]


def stem_rules(stem: tuple[int, ...] | None) -> list[Rule]:
    if stem is None:
        return []
    rules = [Rule("stem.root.weight", "conv_root/kernel", CONV), *_group_norm("stem.root_norm", "gn_root")]
    for stage, num_units in enumerate(stem):
        for unit in range(num_units):
            ours, theirs = f"stem.stages.{stage}.{unit}", f"block{stage + 1}/unit{unit + 1}"
            for i in (1, 2, 3):
                rules.append(Rule(f"{ours}.conv{i}.weight", f"{theirs}/conv{i}/kernel", CONV))
                rules += _group_norm(f"{ours}.norm{i}", f"{theirs}/gn{i}")
            rules.append(Rule(f"{ours}.proj.weight", f"{theirs}/conv_proj/kernel", CONV))
            rules += _group_norm(f"{ours}.proj_norm", f"{theirs}/gn_proj")
    return rules


def rules(names: Block, stem: tuple[int, ...] | None = None) -> list[Rule]:
    positions = [Rule("pos_embed", OLD_POSITIONS), Rule("pos_embed", POSITIONS, BEFORE_CLASS_TOKEN)]
    layer, block = "layers.{i}", "Transformer/encoderblock_{i}"
    return [
        *stem_rules(stem),
        Rule("cls_token", "cls"),
        *(positions if names is OLD else reversed(positions)),
        *_dense("patch_embed", "embedding", CONV),
        *_norm(f"{layer}.norm1", f"{block}/LayerNorm_0"),
        *_attention(f"{layer}.attn", f"{block}/{names.attention}"),
        *_norm(f"{layer}.norm2", f"{block}/{names.norm2}"),
        *_mlp(f"{layer}.mlp", f"{block}/{names.mlp}"),
        *_norm("norm", "Transformer/encoder_norm"),
        Rule("attn_pool.probe", "MAPHead_0/probe"),
        *_attention("attn_pool.attn", "MAPHead_0/MultiHeadDotProductAttention_0"),
        *_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0"),
        *_mlp("attn_pool.mlp", "MAPHead_0/MlpBlock_0"),
        *_dense("pre_logits", "pre_logits"),
        *_dense("head", "head"),
    ]


def read(path: Path) -> tuple[ViT, PreprocessConfig, Labels | None]:
    """
    The shape is that of the tensors. GELU is flax's, the tanh approximation; the norm's epsilon 1e-6. Preprocessing is
    the release's squash. A head of zeros, as Google publishes its 21k pre-training, is no head.
    Raises:
        CheckpointError: not a Vision Transformer; tensors that do not fit.
    """
    state, prefix = normalise(files.read_tensors(path), path)
    names = NEW if any(name.startswith(f"Transformer/encoderblock_0/{NEW.mlp}/") for name in state) else OLD
    config = infer_config(state, names, path)
    model = load(state, rules(names, config.stem), config, str(path))
    labels = None if "img" in prefix else default_labels(config.num_classes)  # an image tower's head gives no classes
    return model, PreprocessConfig.jax_squash(config.image_size), labels


def default_labels(num_classes: int) -> Labels | None:
    """Of a format that names no classes: the two ImageNets are told by their number."""
    known = {0: lambda: None, 1000: Labels.imagenet_1k, 21_843: Labels.imagenet_21k}
    return known[num_classes]() if num_classes in known else Labels.numbered(num_classes)


def normalise(tensors: State, path: Path) -> tuple[State, str]:
    """One layout of names from the several that were in use; also the prefix that was taken off."""
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in tensors), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if len(state) < len(tensors):
        log.info('%s: reading the %d tensors under "%s" of %d', path, len(state), prefix, len(tensors))
    scanned = "Transformer/encoderblock/"  # all layers in one tensor, as `lax.scan` wants them
    for name in [name for name in state if name.startswith(scanned)]:
        for i, tensor in enumerate(state.pop(name)):
            state[f"Transformer/encoderblock_{i}/{name.removeprefix(scanned)}"] = tensor
    if "Transformer/pos_embedding" in state:  # big_vision before 2022
        state[OLD_POSITIONS] = state.pop("Transformer/pos_embedding")
    if "head/kernel" in state and not state["head/kernel"].any():
        log.warning("%s: its head is all zeros; reading it without a head, for features.", path)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head/")}
    return state, prefix


def infer_config(state: State, names: Block, path: Path) -> ViTConfig:
    stem = None
    if "conv_root/kernel" in state:
        stages = [name.split("/")[0] for name in state if re.fullmatch(r"block\d+/unit\d+/conv1/kernel", name)]
        stem = tuple(stages.count(stage) for stage in sorted(set(stages)))
    query = f"Transformer/encoderblock_0/{names.attention}/query/kernel"
    dense = f"Transformer/encoderblock_0/{names.mlp}/Dense_0/kernel"
    absent = [name for name in ("embedding/kernel", query, dense) if name not in state]
    if absent:
        found = ", ".join(sorted(state)[:5])
        raise CheckpointError(
            f"{path} is not a JAX Vision Transformer: it lacks {', '.join(absent)}. It has {found}, …"
        )
    layers = {name.split("/")[1] for name in state if name.startswith("Transformer/encoderblock_")}
    class_token = "cls" in state
    try:
        patch_height, patch_width, num_channels, embed_dim = state["embedding/kernel"].shape
        embed_dim, num_heads, _ = state[query].shape
        stride = patch_height * stem_stride(stem)
        if POSITIONS in state:
            _, num_patches, _ = state[POSITIONS].shape
        elif OLD_POSITIONS in state:
            _, num_patches, _ = state[OLD_POSITIONS].shape
            num_patches -= class_token
        else:  # fixed, and therefore not stored
            num_patches = (224 // stride) ** 2
            log.warning("%s has no positions: taking the sine-cosine table for 224×224 pixels.", path)
            state[POSITIONS] = sincos_2d((224 // stride,) * 2, embed_dim)
        _, mlp_dim = state[dense].shape
        num_classes = state["head/kernel"].shape[1] if "head/kernel" in state else 0
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a JAX Vision Transformer: a tensor has too few or many axes.") from error
    side = math.isqrt(num_patches)
    if side * side != num_patches or patch_height != patch_width:
        raise CheckpointError(
            f"{path} has {num_patches} positions of {patch_height}×{patch_width} pixels; "
            "only a square grid of square patches can be told without a config."
        )
    return model_config_of(
        ViTConfig,
        path,
        image_size=(side * stride, side * stride),
        patch_size=patch_height,
        num_channels=num_channels if stem is None else 3,
        stem=stem,
        embed_dim=embed_dim,
        num_layers=len(layers),
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        num_classes=num_classes,
        norm_eps=1e-6,
        activation="gelu_tanh",
        pos_resize="bilinear_corners",
        class_token=class_token,
        pool="map" if "MAPHead_0/probe" in state else "token" if class_token else "mean",
        pre_logits="pre_logits/kernel" in state,
    )


def contents(model: nn.Module) -> dict[str, np.ndarray]:
    """The arrays that `write` writes: the names of vision_transformer, or of big_vision with attention pooling.

    Raises:
        CheckpointError: the model has something that the format, which holds no settings, cannot tell a reader.
    """
    if not isinstance(model, ViT):
        raise CheckpointError(f"the JAX release has no {type(model).__name__}.")
    config = model.config
    pools = ("token",) if config.class_token else ("mean", "map")
    obstacles = [
        (config.pool not in pools, f'pool "{config.pool}" {"with" if config.class_token else "without"} a class token'),
        (config.norm_after_pool, "a norm after the pooling"),
        (config.stem is not None and config.stem_maths != "jax", "a stem with timm's constants"),
        (config.activation != "gelu_tanh", f'activation "{config.activation}" (it is always gelu_tanh)'),
        (config.gated_mlp, "a gated MLP"),
        (not config.qkv_bias, "queries, keys and values without bias"),
        (config.norm_eps > 1e-6, f"norm_eps {config.norm_eps} (it is always 1e-06)"),
        (config.grid[0] != config.grid[1], f"a grid of {config.grid} patches (it is always square)"),
        (model.head is not None and not model.head.weight.any(), "a head of zeros (to a reader it is no head)"),
    ]
    reasons = [reason for present, reason in obstacles if present]
    if reasons:
        raise CheckpointError(f"the JAX release has no model with {', nor with '.join(reasons)}.")
    foreign = invert(model.state_dict(), rules(NEW if config.pool == "map" else OLD, config.stem), config)
    return {name: tensor.float().cpu().numpy() for name, tensor in foreign.items()}


def write(
    path: Path, model: nn.Module, preprocess: PreprocessConfig | None = None, labels: Labels | None = None
) -> list[Path]:
    """Write a file that the JAX releases load, with equal outputs.

    It holds tensors and nothing else; where what `read` takes for the rest is not this model's, a warning says so.
    Raises:
        CheckpointError: the model has something that the format, which holds no settings, cannot tell a reader.
    """
    arrays = contents(model)
    with files.replacing(path) as part, part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    assert isinstance(model, ViT)
    warn_of_losses(
        path, model.config.num_classes, labels, preprocess, PreprocessConfig.jax_squash(model.config.image_size)
    )
    if model.config.pos_resize != "bilinear_corners":
        log.warning(
            "At sizes other than %s, a reader of %s will resize positions by bilinear_corners, not %s as here.",
            model.config.image_size, path, model.config.pos_resize,
        )  # fmt: skip
    return [path]


def warn_of_losses(
    path: Path, num_classes: int, labels: Labels | None, preprocess: PreprocessConfig | None, taken: PreprocessConfig
) -> None:
    """Say which labels and preprocessing a file of tensors alone will be read with, where they are not the model's."""
    assumed = default_labels(num_classes)
    if labels is not None and assumed is not None and labels != assumed:
        log.warning(
            "%s names no classes: a reader will call them %s, …, not %s, …", path, assumed.names[0], labels.names[0]
        )
    if preprocess is not None and preprocess != taken:
        log.warning("%s says nothing of preprocessing: a reader will take %s, not %s", path, taken, preprocess)
