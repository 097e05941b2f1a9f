"""transformers' Perceiver: what `hf.py` needs to read and write the six published models.

    PerceiverForImageClassificationConvProcessing   ImagePerceiver        vision-perceiver-conv
    PerceiverForImageClassificationFourier          ImagePerceiver        vision-perceiver-fourier
    PerceiverForImageClassificationLearned          ImagePerceiver        vision-perceiver-learned
    PerceiverForMaskedLM                            TextPerceiver         language-perceiver
    PerceiverForOpticalFlow                         FlowPerceiver         optical-flow-perceiver
    PerceiverForMultimodalAutoencoding              MultimodalPerceiver   multimodal-perceiver

transformers computes otherwise than DeepMind's release of the same weights (see `Numerics`), so what is read here has
`numerics="transformers"`, and only that is written.
"""

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from opsin.checkpoints import native
from opsin.checkpoints.rules import Rule, State, invert, weight_and_bias, within
from opsin.errors import CheckpointError
from opsin.models.perceiver_io import (
    FlowPerceiverConfig,
    ImagePerceiverConfig,
    MultimodalPerceiverConfig,
    TextPerceiverConfig,
)
from opsin.preprocess import PreprocessConfig

MODEL_TYPE = "perceiver"
CONV = "PerceiverForImageClassificationConvProcessing"
FOURIER = "PerceiverForImageClassificationFourier"
LEARNED = "PerceiverForImageClassificationLearned"
TEXT = "PerceiverForMaskedLM"
FLOW = "PerceiverForOpticalFlow"
MULTIMODAL = "PerceiverForMultimodalAutoencoding"

IMAGE_CLASSES = {CONV: "conv", FOURIER: "pixels", LEARNED: "conv1x1"}  # class → front end

MODALITIES = ("audio", "image", "label")

ATTENTION = [  # under the name of a layer
    *weight_and_bias("attn.q", "attention.self.query"),
    *weight_and_bias("attn.k", "attention.self.key"),
    *weight_and_bias("attn.v", "attention.self.value"),
    *weight_and_bias("attn.out", "attention.output.dense"),
    *weight_and_bias("mlp.fc1", "mlp.dense1"),
    *weight_and_bias("mlp.fc2", "mlp.dense2"),
]
SELF_LAYER = [
    *weight_and_bias("norm1", "attention.self.layernorm1"),
    *weight_and_bias("norm2", "layernorm"),
    *ATTENTION,
]
CROSS_LAYER = [
    *weight_and_bias("norm_q", "attention.self.layernorm1"),
    *weight_and_bias("norm_kv", "attention.self.layernorm2"),
    *weight_and_bias("norm_mlp", "layernorm"),
    *ATTENTION,
]
ENCODER = [
    Rule("encoder.latents", "perceiver.embeddings.latents"),
    *within("encoder.cross.", "perceiver.encoder.cross_attention.", CROSS_LAYER),
    *within("encoder.layers.{i}.", "perceiver.encoder.self_attends.{i}.", SELF_LAYER),
]
DECODER = [
    *within("decoder.cross.", "perceiver.decoder.decoder.decoding_cross_attention.", CROSS_LAYER),
    *weight_and_bias("decoder.out", "perceiver.decoder.decoder.final_layer"),
]
IMAGE_DECODER = [
    Rule("decoder.positions.table", "perceiver.decoder.decoder.output_position_encodings.position_embeddings"),
    *DECODER,
]
BATCH_NORM = [Rule(name, name) for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

TABLES: dict[str, list[Rule]] = {
    CONV: [
        Rule("front_end.stages.0.conv.weight", "perceiver.input_preprocessor.convnet.conv.weight"),
        *within("front_end.stages.0.norm.", "perceiver.input_preprocessor.convnet.batchnorm.", BATCH_NORM),
        *ENCODER,
        *IMAGE_DECODER,
    ],
    FOURIER: [*ENCODER, *IMAGE_DECODER],
    LEARNED: [
        *weight_and_bias("front_end.conv", "perceiver.input_preprocessor.convnet_1x1"),
        Rule("front_end.positions.table", "perceiver.input_preprocessor.position_embeddings.position_embeddings"),
        *weight_and_bias("front_end.pos_proj", "perceiver.input_preprocessor.positions_projection"),
        *ENCODER,
        *IMAGE_DECODER,
    ],
    TEXT: [
        Rule("front_end.embed.weight", "perceiver.input_preprocessor.embeddings.weight"),
        Rule("front_end.positions.table", "perceiver.input_preprocessor.position_embeddings.weight"),
        *ENCODER,
        Rule("decoder.positions.table", "perceiver.decoder.output_position_encodings.position_embeddings"),
        *within("decoder.cross.", "perceiver.decoder.decoding_cross_attention.", CROSS_LAYER),
        Rule("bias", "embedding_decoder.bias"),
    ],
    FLOW: [
        *weight_and_bias("front_end.proj", "perceiver.input_preprocessor.conv_after_patches"),
        *ENCODER,
        *DECODER,
    ],
    MULTIMODAL: [
        *(Rule(f"front_end.padding.{name}", f"perceiver.input_preprocessor.padding.{name}") for name in MODALITIES),
        *(Rule(f"front_end.mask.{name}", f"perceiver.input_preprocessor.mask.{name}") for name in MODALITIES),
        *ENCODER,
        Rule(
            "decoder.modalities.label.table",
            "perceiver.decoder.modalities.label.decoder.output_position_encodings.position_embeddings",
        ),
        *(Rule(f"decoder.padding.{name}", f"perceiver.decoder.padding.{name}") for name in MODALITIES),
        *DECODER,
        *(
            rule
            for name in MODALITIES
            for rule in weight_and_bias(
                f"outputs.{name}", f"perceiver.output_postprocessor.modalities.{name}.classifier"
            )
        ),
    ],
}

# What the classes have in their code, and no config changes.
FIXED: dict[str, dict[str, Any]] = {
    CONV: {
        "num_channels": 3, "num_stages": 1, "embed_dim": 64, "num_bands": 64, "max_resolution": (56, 56),
        "decoder_residual": True,
    },
    FOURIER: {"num_channels": 3, "num_bands": 64, "max_resolution": (224, 224), "decoder_residual": True},
    LEARNED: {"num_channels": 3, "embed_dim": 256, "decoder_residual": True},
    TEXT: {"decoder_heads": 8, "decoder_qk_dim": 256},
    FLOW: {"embed_dim": 64, "num_bands": 64},
    MULTIMODAL: {"patch_size": 4, "image_bands": 32, "audio_bands": 192},
}  # fmt: skip

# A tensor that tells the class where config.json does not; the first that is there.
SIGNS = {
    "perceiver.input_preprocessor.convnet.conv.weight": CONV,
    "perceiver.input_preprocessor.convnet_1x1.weight": LEARNED,
    "perceiver.input_preprocessor.conv_after_patches.weight": FLOW,
    "perceiver.input_preprocessor.padding.audio": MULTIMODAL,
    "embedding_decoder.bias": TEXT,
    "perceiver.input_preprocessor.embeddings.weight": "PerceiverForSequenceClassification",
    "perceiver.decoder.decoder.final_layer.weight": FOURIER,
}

GELU = ("gelu", "gelu_python")  # one function

MAX_POSITIONS = 1 << 22  # 2048 × 2048; their table is 4 GB. No tensor's shape holds a config to its sizes.


def model_class(config: dict[str, Any], names: Collection[str], path: Path) -> str:
    """The class of a config.json, one of `TABLES`; the names in the weight file tell it where `architectures` does not.

    Raises:
        CheckpointError: another class.
    """
    signs = [kind for sign, kind in SIGNS.items() if sign in names]
    architecture = next(iter(config.get("architectures") or [*signs, "PerceiverModel"]))
    if architecture not in TABLES:
        raise CheckpointError(f"{path} is a {architecture}. Of Perceivers opsin reads {', '.join(TABLES)}.")
    return architecture


def rules(config: Any) -> list[Rule]:
    """The table for a model, by its config."""
    return TABLES[_class_of(config)]


def _class_of(config: Any) -> str:
    if isinstance(config, ImagePerceiverConfig):
        return next(kind for kind, front_end in IMAGE_CLASSES.items() if front_end == config.front_end)
    return {TextPerceiverConfig: TEXT, FlowPerceiverConfig: FLOW, MultimodalPerceiverConfig: MULTIMODAL}[type(config)]


def read_config(
    config: dict[str, Any], architecture: str, preprocess: PreprocessConfig | None, num_labels: int, path: Path
) -> Any:
    """config.json → the config of a model in `perceiver_io.py`.

    `layer_norm_eps` is in the file and means nothing: transformers builds its norms with 1e-5. Dropout of attention
    weights has no counterpart here; it matters only for training.

    Args:
        architecture: from `model_class`.
        preprocess: of an image model. Where no tensor depends on the image size, it is the size of these pixels.
    Raises:
        CheckpointError: a setting that opsin does not have, or sizes that do not make a model.
    """
    get = config.get
    if get("hidden_act", "gelu") not in GELU:
        raise CheckpointError(f"{path}: hidden_act is {get('hidden_act')!r}. opsin's Perceivers have {GELU[0]!r}.")
    if get("cross_attention_shape_for_attention", "kv") != "kv":
        raise CheckpointError(
            f"{path}: cross_attention_shape_for_attention is {get('cross_attention_shape_for_attention')!r}. "
            "opsin has 'kv': queries and keys as wide as what is attended to."
        )
    try:
        fields = FIXED[architecture] | {
            "num_latents": int(get("num_latents", 256)),
            "latent_dim": int(get("d_latents", 1280)),
            "num_blocks": int(get("num_blocks", 1)),
            "layers_per_block": int(get("num_self_attends_per_block", 26)),
            "num_heads": int(get("num_self_attention_heads", 8)),
            "num_cross_heads": int(get("num_cross_attention_heads", 8)),
            "qk_dim": _width(get("qk_channels")),
            "v_dim": _width(get("v_channels")),
            "mlp_ratio": int(get("self_attention_widening_factor", 1)),
            "cross_mlp_ratio": int(get("cross_attention_widening_factor", 1)),
            "query_residual": bool(get("use_query_residual", True)),
            "numerics": "transformers",
        }
        image_size = get("image_size", 56)
        if architecture in IMAGE_CLASSES:
            assert preprocess is not None
            sides = _sides(path, (image_size, image_size) if architecture == LEARNED else preprocess.image_size)
            return native.model_config_of(
                ImagePerceiverConfig,
                path,
                **fields,
                front_end=IMAGE_CLASSES[architecture],
                image_size=sides,
                num_classes=num_labels,
            )
        if architecture == TEXT:
            return native.model_config_of(
                TextPerceiverConfig,
                path,
                **fields,
                vocab_size=int(get("vocab_size", 262)),
                max_length=int(get("max_position_embeddings", 2048)),
                embed_dim=int(get("d_model", 768)),
            )
        if architecture == FLOW:
            sides = _sides(path, get("train_size", (368, 496)))
            return native.model_config_of(FlowPerceiverConfig, path, **fields, image_size=sides)
        num_frames, (_, frames, *size) = int(get("num_frames", 16)), get("output_shape", (1, 16, 224, 224))
        samples_per_frame = int(get("audio_samples_per_frame", 1920))
        if frames != num_frames:
            raise CheckpointError(f"{path}: output_shape has {frames} frames, num_frames is {num_frames}.")
        return native.model_config_of(
            MultimodalPerceiverConfig,
            path,
            **fields,
            num_frames=num_frames,
            image_size=_sides(path, size, num_frames),
            max_resolution=(int(image_size),) * 2,
            samples_per_frame=_sides(path, (samples_per_frame, 1), num_frames)[0],
            samples_per_patch=int(get("samples_per_patch", 16)),
            num_classes=num_labels,
            label_dim=int(get("_label_trainable_num_channels", 1024)),
            output_dim=int(get("output_num_channels", 512)),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} does not describe a Perceiver: {error}") from error


def _sides(path: Path, size: Any, num_frames: int = 1) -> tuple[int, int]:
    height, width = map(int, size)
    if min(height, width, num_frames) < 1 or math.prod((height, width, num_frames)) > MAX_POSITIONS:
        raise CheckpointError(
            f"{path} asks for {num_frames} × {height} × {width} positions; opsin takes 1 to {MAX_POSITIONS:,}."
        )
    return height, width


def _width(value: Any) -> int | None:
    return None if value is None else int(value)


def write(model: nn.Module) -> tuple[State, dict[str, Any]]:
    """Tensors and config.json, all but the labels, with which transformers computes the same.

    Raises:
        CheckpointError: it would not; the message says why.
    """
    config: Any = model.config
    architecture = _class_of(config)
    if config.numerics != "transformers":
        raise CheckpointError(
            f"this model computes as DeepMind's release does (numerics {config.numerics!r}), and transformers would "
            f"not: {differences(config)}. Its outputs would be others, without any sign of it."
        )
    reasons = _obstacles(config, architecture)
    if reasons:
        raise CheckpointError(f"{architecture} of transformers cannot have {'; nor '.join(reasons)}.")
    front_end: Any = model.front_end
    data = {
        "architectures": [architecture],
        "model_type": MODEL_TYPE,
        "num_latents": config.num_latents,
        "d_latents": config.latent_dim,
        "d_model": front_end.dim,
        "num_blocks": config.num_blocks,
        "num_self_attends_per_block": config.layers_per_block,
        "num_self_attention_heads": config.num_heads,
        "num_cross_attention_heads": config.num_cross_heads,
        "qk_channels": config.qk_dim,
        "v_channels": config.v_dim,
        "cross_attention_shape_for_attention": "kv",
        "self_attention_widening_factor": config.mlp_ratio,
        "cross_attention_widening_factor": config.cross_mlp_ratio or config.mlp_ratio,
        "hidden_act": GELU[0],
        "attention_probs_dropout_prob": 0.0,
        "use_query_residual": config.query_residual,
        "dtype": "float32",
    }
    return invert(model.state_dict(), rules(config), config), data | _own_fields(config, architecture)


def _own_fields(config: Any, architecture: str) -> dict[str, Any]:
    if architecture == LEARNED:
        return {"image_size": config.image_size[0]}
    if architecture == TEXT:
        return {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_length}
    if architecture == FLOW:
        return {"train_size": list(config.image_size)}
    if architecture == MULTIMODAL:
        return {
            "num_frames": config.num_frames,
            "output_shape": [1, config.num_frames, *config.image_size],
            "image_size": config.resolution[1],
            "audio_samples_per_frame": config.samples_per_frame,
            "samples_per_patch": config.samples_per_patch,
            "output_num_channels": config.output_dim,
            "_label_trainable_num_channels": config.label_dim,
        }
    return {}


def differences(config: Any) -> str:
    """What transformers computes otherwise than DeepMind's release of this model."""
    found = ["it has the exact GELU, not the one by tanh"]
    if isinstance(config, ImagePerceiverConfig) and config.front_end == "conv":
        found.append("pads the convolution by 3 on every side and the pooling not at all, for fewer tokens")
    if isinstance(config, ImagePerceiverConfig) and not config.decoder_residual:
        found.append("adds the decoder's query to what it read")
    if isinstance(config, TextPerceiverConfig):
        found.append("lets the queries of padded places read")
    return ", and ".join(found)


def _obstacles(config: Any, architecture: str) -> list[str]:
    if isinstance(config, TextPerceiverConfig):
        config = dataclasses.replace(
            config,
            decoder_heads=config.decoder_heads or config.num_cross_heads,
            decoder_qk_dim=config.decoder_qk_dim or config.qk_dim,
        )
    reasons = [
        f"{name} {getattr(config, name)} (it has {value})"
        for name, value in FIXED[architecture].items()
        if getattr(config, name) != value
    ]
    for heads in (config.num_heads, config.num_cross_heads):
        if config.latent_dim % heads:
            reasons.append(f"latents of width {config.latent_dim}, which its {heads} heads do not divide")
    if architecture == LEARNED and config.image_size[0] != config.image_size[1]:
        reasons.append(f"positions for {config.image_size} (its are square)")
    if architecture == MULTIMODAL and config.resolution[1] != config.resolution[2]:
        reasons.append(f"max_resolution {config.resolution[1:]} (its is square)")
    if architecture in IMAGE_CLASSES and not config.num_classes:
        reasons.append("no head")
    return reasons
