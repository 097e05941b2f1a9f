"""transformers: ViT, DeiT, DINOv2, with registers or without, and Perceiver; `save_pretrained` folders in, and out.

Files of transformers 4 and 5 carry the same names. What a transformers 5 model holds in memory, and a state dict
saved by hand therefore has, is named otherwise: those names are read too, and never written. (A Perceiver's are the
same; what there is to know about it is in `hf_perceiver.py`.)
"""

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsin.checkpoints import files, hf_perceiver, native, processors
from opsin.checkpoints.rules import Rule, State, invert, load, weight_and_bias, within, write_folder
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.perceiver_io import PerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

log = logging.getLogger(__name__)

FORMAT = "transformers"
PROCESSOR = "preprocessor_config.json"
MULTI_LABEL = "multi_label_classification"  # config.json's `problem_type` where an image may have several classes

EMBEDDINGS = [
    Rule("cls_token", "embeddings.cls_token"),
    Rule("dist_token", "embeddings.distillation_token"),
    Rule("registers", "embeddings.register_tokens"),
    Rule("pos_embed", "embeddings.position_embeddings"),
    *weight_and_bias("patch_embed", "embeddings.patch_embeddings.projection"),
    Rule((), "embeddings.mask_token"),  # pre-training only
]

ATTENTION = [  # under the name of a layer
    *weight_and_bias("attn.q", "attention.attention.query"),
    *weight_and_bias("attn.k", "attention.attention.key"),
    *weight_and_bias("attn.v", "attention.attention.value"),
    *weight_and_bias("attn.out", "attention.output.dense"),
]
ATTENTION_V5 = [
    *weight_and_bias("attn.q", "attention.q_proj"),
    *weight_and_bias("attn.k", "attention.k_proj"),
    *weight_and_bias("attn.v", "attention.v_proj"),
    *weight_and_bias("attn.out", "attention.o_proj"),
]
VIT_NORMS = [*weight_and_bias("norm1", "layernorm_before"), *weight_and_bias("norm2", "layernorm_after")]
VIT_LAYER = [
    *VIT_NORMS,
    *ATTENTION,
    *weight_and_bias("mlp.fc1", "intermediate.dense"),
    *weight_and_bias("mlp.fc2", "output.dense"),
]
VIT_LAYER_V5 = [
    *VIT_NORMS,
    *ATTENTION_V5,
    *weight_and_bias("mlp.fc1", "mlp.fc1"),
    *weight_and_bias("mlp.fc2", "mlp.fc2"),
]
DINOV2_LAYER = [
    *weight_and_bias("norm1", "norm1"),
    *ATTENTION,
    *ATTENTION_V5,
    Rule("attn_scale", "layer_scale1.lambda1"),
    *weight_and_bias("norm2", "norm2"),
    *weight_and_bias("mlp.fc1", "mlp.fc1"),
    *weight_and_bias("mlp.fc2", "mlp.fc2"),
    Rule("mlp_scale", "layer_scale2.lambda1"),
]
DINOV2_SWIGLU = [
    *weight_and_bias("mlp.fc1", "mlp.weights_in"),
    *weight_and_bias("mlp.fc2", "mlp.weights_out"),
    *weight_and_bias("mlp.fc1", ("mlp.gate_proj", "mlp.up_proj")),  # version 5
    *weight_and_bias("mlp.fc2", "mlp.down_proj"),
]
ENDS = [
    *weight_and_bias("norm", "layernorm"),
    *weight_and_bias("pre_logits", "pooler.dense"),
    Rule((), ("pooler.dense.weight", "pooler.dense.bias")),  # beside a classifier, which does not use it
    Rule((), ("decoder.0.weight", "decoder.0.bias")),  # ForMaskedImageModeling
]
HEAD = weight_and_bias("head", "classifier")
TEACHER_HEADS = [*weight_and_bias("head", "cls_classifier"), *weight_and_bias("head_dist", "distillation_classifier")]


def rules(config: ViTConfig) -> list[Rule]:
    """The table for a model: without the prefix of its class (`vit.`, `deit.`, …)."""
    if config.layer_scale:
        layer = DINOV2_SWIGLU + DINOV2_LAYER if config.gated_mlp else DINOV2_LAYER
        layers = within("layers.{i}.", "encoder.layer.{i}.", layer)
    else:
        layers = within("layers.{i}.", "encoder.layer.{i}.", VIT_LAYER)
        layers += within("layers.{i}.", "layers.{i}.", VIT_LAYER_V5)
    heads = TEACHER_HEADS if config.distillation_token and config.distillation_head else HEAD
    return [*EMBEDDINGS, *layers, *ENDS, *heads]


VIT_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")  # each also the prefix of its tensors, all but heads
MODEL_TYPES = (*VIT_TYPES, hf_perceiver.MODEL_TYPE)
CLASSIFIERS = ("ForImageClassification", "ForImageClassificationWithTeacher")

ACTIVATIONS = {  # theirs → ours; the first of each of ours is written
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def claims(config: dict[str, Any]) -> bool:
    return "model_type" in config


def read(
    folder: Path, config: dict[str, Any], weights: Path
) -> tuple[nn.Module, PreprocessConfig | None, Labels | None]:
    """
    Raises:
        CheckpointError: a model type or setting that opsin does not have; tensors that do not fit.
    """
    path = folder / "config.json"
    model_type = config["model_type"]
    if model_type not in MODEL_TYPES:
        raise CheckpointError(f"{path} is of type {model_type!r}. opsin reads {', '.join(MODEL_TYPES)}.")
    tensors, model_config, preprocess = files.read_tensors(weights), None, None
    if model_type == hf_perceiver.MODEL_TYPE:
        architecture = hf_perceiver.model_class(config, tensors, path)
        if architecture in hf_perceiver.IMAGE_CLASSES:
            learned = architecture == hf_perceiver.LEARNED
            preprocess = _read_preprocess(folder, model_type, _pair(config.get("image_size", 56) if learned else 224))
        num_labels = _num_labels(config)
        model_config = hf_perceiver.read_config(config, architecture, preprocess, num_labels, path)
        table = hf_perceiver.rules(model_config)
    else:
        tensors = files.strip_prefix(tensors, f"{model_type}.")
        model_config = read_config(config, tensors, path)
        preprocess = _read_preprocess(folder, model_type, model_config.image_size)
        table = rules(model_config)
    model = load(tensors, table, model_config, str(folder))
    return model, preprocess, _read_labels(config, getattr(model_config, "num_classes", 0), path)


def _read_preprocess(folder: Path, model_type: str, image_size: tuple[int, int]) -> PreprocessConfig:
    path = folder / PROCESSOR
    if path.is_file():
        processor = files.read_json(path)
    else:
        processor = default_processor(model_type, image_size)
        log.warning("%s has no preprocessor_config.json: taking what %s models use, %s", folder, model_type, processor)
    try:
        return processors.read_hf(processor)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_config(config: dict[str, Any], names: Collection[str], path: Path) -> ViTConfig:
    """config.json → ViTConfig. The names in the weight file, without prefix, tell what the config leaves open.

    Dropout of attention weights has no counterpart here; it matters only for training.
    """
    model_type, get = config["model_type"], config.get
    dino = model_type.startswith("dinov2")
    architecture = next(iter(get("architectures") or []), "")
    if architecture:
        classifies = architecture.endswith(CLASSIFIERS)
    else:
        classifies = any(name.endswith("classifier.weight") for name in names)
    activation = get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"{path}: hidden_act is {activation!r}. opsin has {', '.join(ACTIVATIONS)}.")
    pooler = "pooler.dense.weight" in names and not classifies
    if pooler and get("pooler_act", "tanh") != "tanh":
        raise CheckpointError(f"{path}: pooler_act is {get('pooler_act')!r}. opsin's pooler ends in tanh.")
    try:
        embed_dim = int(get("hidden_size", 768))
        gated = dino and bool(get("use_swiglu_ffn", False))
        mlp_dim = int(embed_dim * get("mlp_ratio", 4)) if dino else int(get("intermediate_size", 3072))
        patch_height, patch_width = _pair(get("patch_size", 14 if model_type == "dinov2" else 16))
        if patch_height != patch_width:
            raise CheckpointError(f"{path}: patches of {patch_height}×{patch_width}; opsin's are square.")
        return native.model_config_of(
            ViTConfig,
            path,
            image_size=_pair(get("image_size", 224)),
            patch_size=patch_height,
            num_channels=int(get("num_channels", 3)),
            embed_dim=embed_dim,
            num_layers=int(get("num_hidden_layers", 12)),
            num_heads=int(get("num_attention_heads", 12)),
            mlp_dim=_swiglu_dim(mlp_dim) if gated else mlp_dim,
            num_classes=_num_labels(config) if classifies else 0,
            norm_eps=float(get("layer_norm_eps", 1e-6 if dino else 1e-12)),
            activation=ACTIVATIONS[activation],
            gated_mlp=gated,
            qkv_bias=bool(get("qkv_bias", True)),
            layer_scale=dino,
            pos_resize="bicubic_antialias" if model_type == "dinov2_with_registers" else "bicubic",
            distillation_token=model_type == "deit",
            distillation_head=architecture.endswith("WithTeacher") or "distillation_classifier.weight" in names,
            num_registers=int(get("num_register_tokens", 4)) if model_type == "dinov2_with_registers" else 0,
            pool="token_mean" if dino and classifies else "token",
            pre_logits=pooler,
            dropout_rate=float(get("hidden_dropout_prob", 0.0)),
            drop_path_rate=float(get("drop_path_rate", 0.0)) if dino else 0.0,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a ViT: {error}") from error


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _swiglu_dim(mlp_dim: int) -> int:
    """Two thirds of the plain MLP's width, up to a multiple of 8: three matrices then weigh what two did."""
    return (int(mlp_dim * 2 / 3) + 7) // 8 * 8


def _num_labels(config: dict[str, Any]) -> int:
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels", 2))


def _read_labels(config: dict[str, Any], num_classes: int, path: Path) -> Labels | None:
    if not num_classes:
        return None
    id2label = config.get("id2label")
    if not id2label:
        return Labels.numbered(num_classes)
    try:
        names = {int(index): str(name) for index, name in id2label.items()}
        labels = Labels.from_names([names[index] for index in range(num_classes)])
        return replace(labels, multi_label=config.get("problem_type") == MULTI_LABEL)
    except (AttributeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: id2label does not name the classes 0 to {num_classes - 1}: {error}") from error


def default_processor(model_type: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """What the image processor of a family does when nothing is written down, at the model's own size."""
    (height, width), common = image_size, {"do_resize": True, "do_rescale": True, "do_normalize": True}
    if model_type == "vit":
        half = [0.5, 0.5, 0.5]
        size = {"height": height, "width": width}
        kind = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2}
        return kind | common | {"image_mean": half, "image_std": half}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if model_type == "deit":
        kind = {"image_processor_type": "DeiTImageProcessor"}
        size = {"height": round(height / 0.875), "width": round(width / 0.875)}
    elif model_type == hf_perceiver.MODEL_TYPE:  # a crop of size / crop_size first, then the resize
        kind, size = {"image_processor_type": "PerceiverImageProcessor"}, {"height": height, "width": width}
        height, width = round(height / 0.875), round(width / 0.875)
    else:
        kind = {"image_processor_type": "BitImageProcessor"}
        size, height, width = {"shortest_edge": 256}, 224, 224  # whatever the size of the position table, 518 as a rule
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return kind | {"size": size, "resample": 3} | crop | common | imagenet


def contents(model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> dict[str, Any]:
    """The files that `write` writes: name → tensors, or JSON.

    Raises:
        CheckpointError: transformers has no such model; the message says what stands in the way.
    """
    config: Any = model.config
    if isinstance(model, ViT):
        state, config_json = _write_vit(config, model)
    elif isinstance(config, PerceiverConfig):
        state, config_json = hf_perceiver.write(model)
    else:
        raise CheckpointError(f"transformers has no {type(model).__name__}.")
    try:
        processor = None if preprocess is None else processors.write_hf(preprocess)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    num_classes = getattr(config, "num_classes", 0)
    if num_classes:
        names = [labels.name(i) if labels else f"LABEL_{i}" for i in range(num_classes)]
        config_json["id2label"] = {str(i): name for i, name in enumerate(names)}
        config_json["label2id"] = {name: i for i, name in enumerate(names)}
        if labels and labels.multi_label:
            config_json["problem_type"] = MULTI_LABEL
    tensors = {name: tensor.cpu() for name, tensor in state.items()}
    floats = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    found = {"model.safetensors": tensors | floats, "config.json": config_json}
    return found if processor is None else found | {PROCESSOR: processor}


def write(folder: Path, model: nn.Module, preprocess: PreprocessConfig | None, labels: Labels | None) -> list[Path]:
    """Write a folder that `transformers` loads, with equal outputs at the model's image size.

    At other sizes transformers resizes positions by the rule of its model class; a warning says when that differs.
    Raises:
        CheckpointError: transformers has no such model; the message says what stands in the way.
    """
    folder, found = Path(folder), contents(model, preprocess, labels)
    if isinstance(model, ViT):
        resize = "bicubic_antialias" if found["config.json"]["model_type"] == "dinov2_with_registers" else "bicubic"
        if model.config.pos_resize != resize:
            log.warning(
                "At sizes other than %s, transformers will resize positions by %s, not %s as this model does.",
                model.config.image_size, resize, model.config.pos_resize,
            )  # fmt: skip
    if PROCESSOR not in found:
        (folder / PROCESSOR).unlink(missing_ok=True)  # of an older model in the same folder
    return write_folder(folder, found)


def _write_vit(config: ViTConfig, model: ViT) -> tuple[State, dict[str, Any]]:
    """Tensors and config.json, all but the labels."""
    model_type, architecture = _model_class(config)
    state = invert(model.state_dict(), rules(config), config)
    if model_type.startswith("dinov2"):
        state["embeddings.mask_token"] = torch.zeros(1, config.embed_dim)
    if config.num_classes:
        state = {name if "classifier." in name else f"{model_type}.{name}": tensor for name, tensor in state.items()}
    return state, _write_config(config, model_type, architecture)


def _model_class(config: ViTConfig) -> tuple[str, str]:
    """(model_type, class) of the transformers model that computes the same."""
    dino = config.layer_scale
    head = "ForImageClassification" if config.num_classes else "Model"
    pool = "token_mean" if dino and config.num_classes else "token"
    obstacles = [
        (config.stem is not None, "a ResNet stem"),
        (config.pool != pool, f'pooling "{config.pool}" (it has "{pool}" here)'),
        (config.num_registers and not dino, "register tokens without layer scale"),
        (config.gated_mlp and not dino, "a gated MLP without layer scale"),
        (config.distillation_token and dino, "a distillation token together with layer scale"),
        (config.pre_logits and (dino or config.num_classes), "a pre-logits layer under a head, or with layer scale"),
    ]
    reasons = [reason for present, reason in obstacles if present]
    if reasons:
        raise CheckpointError(f"transformers has no model with {'; nor with '.join(reasons)}.")
    if dino and config.num_registers:
        return "dinov2_with_registers", f"Dinov2WithRegisters{head}"
    if dino:
        return "dinov2", f"Dinov2{head}"
    if config.distillation_token:
        teacher = "WithTeacher" if config.num_classes and config.distillation_head else ""
        return "deit", f"DeiT{head}{teacher}"
    return "vit", f"ViT{head}"


def _write_config(config: ViTConfig, model_type: str, architecture: str) -> dict[str, Any]:
    height, width = config.image_size
    data: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.norm_eps,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "qkv_bias": config.qkv_bias,
        "dtype": "float32",
    }
    if config.layer_scale:
        ratios = [n for n in range(1, 65) if _written_mlp_dim(config, n) == config.mlp_dim]
        if not ratios:
            raise CheckpointError(
                f"transformers' DINOv2 takes an MLP of a whole multiple of {config.embed_dim}, "
                f"{'two thirds of it when gated, ' if config.gated_mlp else ''}not {config.mlp_dim}."
            )
        data |= {"mlp_ratio": ratios[0], "use_swiglu_ffn": config.gated_mlp, "drop_path_rate": config.drop_path_rate}
    else:
        data["intermediate_size"] = config.mlp_dim
    if config.num_registers:
        data["num_register_tokens"] = config.num_registers
    return data


def _written_mlp_dim(config: ViTConfig, ratio: int) -> int:
    return _swiglu_dim(config.embed_dim * ratio) if config.gated_mlp else config.embed_dim * ratio
