"""DeepMind's own Perceiver IO files, `.pystate` and `.pickle`: Haiku's names, read by `pickles.py`; and written.

Head and block counts are not in such a file, and neither is anything of the Fourier positions but their number: what
DeepMind published for the network that the names show is taken, unless a config is given.
"""

import dataclasses
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from opsin.checkpoints import files, hf_perceiver
from opsin.checkpoints.npz import CONV, default_labels, warn_of_losses
from opsin.checkpoints.rules import TRANSPOSE, Rule, State, Transform, invert, load
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.perceiver_io import (
    FlowPerceiverConfig,
    ImagePerceiverConfig,
    MultimodalPerceiverConfig,
    PerceiverConfig,
    TextPerceiverConfig,
)
from opsin.preprocess import PreprocessConfig

log = logging.getLogger(__name__)

FORMAT = "haiku"

PUBLISHED: dict[str, PerceiverConfig] = {
    "conv": ImagePerceiverConfig(),
    "learned": ImagePerceiverConfig(front_end="conv1x1", embed_dim=256, decoder_residual=False),
    "language": TextPerceiverConfig(),
    "flow": FlowPerceiverConfig(),
    "multimodal": MultimodalPerceiverConfig(),
    "fourier": ImagePerceiverConfig(front_end="pixels", max_resolution=(224, 224)),
}

QUERY = "trainable_position_encoding/pos_embs"
INPUTS = "image_preprocessor/~_build_network_inputs"
CLASSIFIER = "classification_decoder/~/basic_decoder"
SIGNATURES = {  # a tensor that tells each network from those below it
    "conv": "image_preprocessor/~/conv2_d_downsample/~/conv/w",
    "learned": "image_preprocessor/~/conv2_d/w",
    "language": "embed/embeddings",
    "flow": "image_preprocessor/patches_linear/w",
    "multimodal": f"encoder/~/{QUERY}",
    "fourier": f"{CLASSIFIER}/output/w",
}
MODULES: dict[type, tuple[str, str]] = {  # encoder and decoder
    ImagePerceiverConfig: ("perceiver_encoder", CLASSIFIER),
    TextPerceiverConfig: ("perceiver_encoder", "basic_decoder"),
    FlowPerceiverConfig: ("perceiver_encoder", "flow_decoder/~/basic_decoder"),
    MultimodalPerceiverConfig: ("encoder", "multimodal_decoder/~/basic_decoder"),
}
POSTPROCESSORS = {"audio": "audio", "image": "projection", "label": "classification"}

CHANNELS_LAST = Transform(lambda t, _: t.flatten(), lambda t, _: t[None, None, None])  # (1, 1, 1, C)
COUNT = Transform(lambda t, _: t.long(), lambda t, _: t.int())


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _norm(native: str, haiku: str) -> list[Rule]:
    return [Rule(f"{native}.weight", f"{haiku}/scale"), Rule(f"{native}.bias", f"{haiku}/offset")]


def _dense(native: str, haiku: str, transform: Transform = TRANSPOSE) -> list[Rule]:
    return [Rule(f"{native}.weight", f"{haiku}/w", transform), Rule(f"{native}.bias", f"{haiku}/b")]


def _numbered(name: str, i: int) -> str:
    """Haiku numbers modules of one name from the second on."""
    return f"{name}_{i}" if i else name


def _attention(native: str, haiku: str, norms: tuple[str, ...]) -> list[Rule]:
    """Cross- or self-attention with its MLP; `norms` are ours in the order in which Haiku makes them."""
    rules = []
    for i, norm in enumerate(norms):
        rules += _norm(f"{native}.{norm}", _numbered(f"{haiku}/layer_norm", i))
    for i, part in enumerate(("q", "k", "v", "out")):
        rules += _dense(f"{native}.attn.{part}", _numbered(f"{haiku}/attention/linear", i))
    for i, part in enumerate(("fc1", "fc2")):
        rules += _dense(f"{native}.mlp.{part}", _numbered(f"{haiku}/mlp/linear", i))
    return rules


def _cross(native: str, haiku: str) -> list[Rule]:
    return _attention(native, f"{haiku}/cross_attention", ("norm_q", "norm_kv", "norm_mlp"))


def _encoder(haiku: str, num_layers: int) -> list[Rule]:
    rules = [Rule("encoder.latents", f"{haiku}/~/{QUERY}"), *_cross("encoder.cross", f"{haiku}/~")]
    for i in range(num_layers):
        rules += _attention(f"encoder.layers.{i}", _numbered(f"{haiku}/~/self_attention", i), ("norm1", "norm2"))
    return rules


def _decoder(haiku: str) -> list[Rule]:
    """Where a network has no query or no last projection of its own, the rule finds no place and does nothing."""
    return [
        Rule("decoder.positions.table", f"{haiku}/~/{QUERY}"),
        *_cross("decoder.cross", haiku),
        *_dense("decoder.out", f"{haiku}/output"),
    ]


def _conv_stage(native: str, haiku: str, i: int) -> list[Rule]:
    norm = _numbered(f"{haiku}/batchnorm", i)
    rules = [
        Rule(f"{native}.conv.weight", f"{_numbered(f'{haiku}/conv', i)}/w", CONV),
        Rule(f"{native}.norm.weight", f"{norm}/scale", CHANNELS_LAST),
        Rule(f"{native}.norm.bias", f"{norm}/offset", CHANNELS_LAST),
        Rule(f"{native}.norm.num_batches_tracked", f"{norm}/~/mean_ema/counter", COUNT),
        Rule((), f"{norm}/~/var_ema/counter"),
    ]
    for ours, theirs in (("running_mean", "mean_ema"), ("running_var", "var_ema")):
        rules.append(Rule(f"{native}.norm.{ours}", f"{norm}/~/{theirs}/average", CHANNELS_LAST))
        rules.append(Rule((), f"{norm}/~/{theirs}/hidden"))  # the average before it is rid of its start at zero
    return rules


def rules(config: PerceiverConfig) -> list[Rule]:
    """The table of one network."""
    encoder, decoder = MODULES[type(config)]
    return [*_front_end(config), *_encoder(encoder, config.layers_per_block), *_decoder(decoder)]


def _front_end(config: PerceiverConfig) -> list[Rule]:
    """What stands before the encoder, and what only one network has behind it."""
    if isinstance(config, TextPerceiverConfig):
        return [
            Rule("front_end.embed.weight", "embed/embeddings"),
            Rule("front_end.positions.table", QUERY),
            Rule("bias", "embedding_decoder/bias"),
        ]
    if isinstance(config, FlowPerceiverConfig):
        return _dense("front_end.proj", "image_preprocessor/patches_linear")
    found = []
    if isinstance(config, MultimodalPerceiverConfig):
        for name, postprocessor in POSTPROCESSORS.items():
            found += [
                Rule(f"front_end.padding.{name}", f"multimodal_preprocessor/{name}_padding/pos_embs"),
                Rule(f"front_end.mask.{name}", f"multimodal_preprocessor/{name}_mask_token/pos_embs"),
                Rule(f"decoder.padding.{name}", f"multimodal_decoder/~decoder_query/{name}_padding/pos_embs"),
                *_dense(f"outputs.{name}", f"{postprocessor}_postprocessor/linear"),
            ]
        return [*found, Rule("decoder.modalities.label.table", f"{CLASSIFIER}/~/{QUERY}")]
    assert isinstance(config, ImagePerceiverConfig)
    if config.front_end == "conv1x1":
        return [
            *_dense("front_end.conv", "image_preprocessor/~/conv2_d", CONV),
            Rule("front_end.positions.table", f"{INPUTS}/{QUERY}"),
            *_dense("front_end.pos_proj", f"{INPUTS}/position_encoding_projector/linear"),
        ]
    if config.front_end == "conv":
        for i in range(config.num_stages):
            found += _conv_stage(f"front_end.stages.{i}", "image_preprocessor/~/conv2_d_downsample/~", i)
    return found


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path, config: PerceiverConfig | None = None) -> tuple[nn.Module, PreprocessConfig | None, Labels | None]:
    """
    Args:
        config: the shape of the network; without it widths and counts are those of the tensors, and what tensors do not
            show (heads, blocks, image size, resolution of the positions) is as DeepMind published it.
    Raises:
        CheckpointError: none of the six networks; tensors that do not fit; a config of other numerics.
        UnsafeCheckpoint: see `pickles.py`.
    """
    state = files.read_tensors(path)
    config = infer_config(state, path) if config is None else config
    if type(config) not in MODULES:
        known = ", ".join(kind.__name__ for kind in MODULES)
        raise CheckpointError(
            f"{path} is a Perceiver IO; its config cannot be a {type(config).__name__}. Known: {known}."
        )
    if config.numerics != "deepmind":
        raise CheckpointError(
            f'{path} was trained in DeepMind\'s arithmetic; with numerics "{config.numerics}" its results would differ '
            'without notice. Give a config with numerics "deepmind".'
        )
    try:
        model = load(state, rules(config), config, str(path))
    except (ValueError, RuntimeError) as error:  # heads that do not divide a width; sizes beyond all measure
        raise CheckpointError(
            f"{path} does not fit its config, in part the published one where none is given: {error} "
            "Give that of this network: opsin.checkpoints.read(path, config=…)"
        ) from error
    if isinstance(config, ImagePerceiverConfig):
        return model, PreprocessConfig.deepmind_perceiver(config.image_size), default_labels(config.num_classes)
    if isinstance(config, MultimodalPerceiverConfig):
        return model, None, Labels.numbered(config.num_classes)
    return model, None, None


def infer_config(state: State, path: Path) -> PerceiverConfig:
    """The published config with the widths and counts of the tensors.

    Raises:
        CheckpointError: none of the six networks, or one with other parts.
    """
    network, told = _told(state, path)
    try:
        return dataclasses.replace(PUBLISHED[network], **told)
    except ValueError as error:
        raise CheckpointError(f"{path} looks like the {network} network, and is not: {error}") from error


def _told(state: State, path: Path) -> tuple[str, dict[str, Any]]:
    """Which network, and the fields of its config that tensors show."""
    network = next((network for network, name in SIGNATURES.items() if name in state), None)
    if network is None:
        raise CheckpointError(
            f"{path} is none of DeepMind's Perceiver IO networks ({', '.join(PUBLISHED)}): it has none of "
            f"{', '.join(SIGNATURES.values())}. It has {', '.join(sorted(state)[:5])}, …"
        )
    try:
        encoder, input_dim = _encoder_fields(state, MODULES[type(PUBLISHED[network])][0])
        return network, encoder | _fields(state, network, input_dim)
    except KeyError as error:
        raise CheckpointError(f"{path} looks like the {network} network, and lacks {error}.") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:  # too few axes, or empty ones
        raise CheckpointError(f"{path} looks like the {network} network, and is not: {error}") from error


def _encoder_fields(state: State, haiku: str) -> tuple[dict[str, Any], int]:
    """Fields of `PerceiverConfig`, and the width of the tokens."""
    cross, layer = f"{haiku}/~/cross_attention", f"{haiku}/~/self_attention"
    num_latents, latent_dim = state[f"{haiku}/~/{QUERY}"].shape
    input_dim, cross_v = state[f"{cross}/attention/linear_2/w"].shape
    _, cross_qk = state[f"{cross}/attention/linear/w"].shape
    _, layer_qk = state[f"{layer}/attention/linear/w"].shape
    _, layer_v = state[f"{layer}/attention/linear_2/w"].shape
    mlp_ratio, cross_mlp_ratio = (state[f"{part}/mlp/linear/w"].shape[1] // latent_dim for part in (layer, cross))
    return {
        "num_latents": num_latents,
        "latent_dim": latent_dim,
        "layers_per_block": sum(name.startswith(layer) and name.endswith("/attention/linear/w") for name in state),
        "qk_dim": None if (cross_qk, layer_qk) == (input_dim, latent_dim) else cross_qk,
        "v_dim": None if (cross_v, layer_v) == (cross_qk, layer_qk) else cross_v,
        "mlp_ratio": mlp_ratio,
        "cross_mlp_ratio": None if cross_mlp_ratio == mlp_ratio else cross_mlp_ratio,
    }, input_dim


def _fields(state: State, network: str, input_dim: int) -> dict[str, Any]:
    """Fields of one network's own config."""
    signature = state[SIGNATURES[network]].shape
    if network == "language":
        vocab_size, embed_dim = signature
        max_length, _ = state[QUERY].shape
        return {"vocab_size": vocab_size, "embed_dim": embed_dim, "max_length": max_length}
    if network == "flow":
        _, embed_dim = signature
        return {"embed_dim": embed_dim, "num_bands": _bands(input_dim - embed_dim, 2)}
    if network == "multimodal":
        output_dim, num_classes = state["classification_postprocessor/linear/w"].shape
        _, samples_per_patch = state["audio_postprocessor/linear/w"].shape
        _, label_dim = state[f"{CLASSIFIER}/~/{QUERY}"].shape
        padding = {name: state[f"multimodal_preprocessor/{name}_padding/pos_embs"].shape[1] for name in POSTPROCESSORS}
        query_dim, _ = state["multimodal_decoder/~/basic_decoder/output/w"].shape
        positions = query_dim - state["multimodal_decoder/~decoder_query/image_padding/pos_embs"].shape[1]
        return {
            "num_classes": num_classes,
            "output_dim": output_dim,
            "label_dim": label_dim,
            "samples_per_patch": samples_per_patch,
            "audio_bands": _bands(input_dim - padding["audio"] - samples_per_patch, 1),
            "image_bands": _bands(positions, 3),
            "patch_size": math.isqrt((input_dim - padding["image"] - positions) // 3),
        }
    _, num_classes = state[f"{CLASSIFIER}/output/w"].shape
    if network == "learned":
        _, _, num_channels, embed_dim = signature
        num_positions, _ = state[f"{INPUTS}/{QUERY}"].shape
        side = math.isqrt(num_positions)
        if side * side != num_positions:
            raise ValueError(f"its {num_positions} positions are no square. Give the config: read(path, config=…)")
        front_end = {"num_channels": num_channels, "embed_dim": embed_dim, "image_size": (side, side)}
    elif network == "conv":
        _, _, num_channels, embed_dim = signature
        front_end = {
            "num_channels": num_channels,
            "embed_dim": embed_dim,
            "num_bands": _bands(input_dim - embed_dim, 2),
        }
    else:
        front_end = {"num_bands": _bands(input_dim - 3, 2)}
    return {"num_classes": num_classes, **front_end}


def _bands(width: int, num_axes: int) -> int:
    """K of Fourier positions: each axis has a coordinate, K sines and K cosines."""
    bands, rest = divmod(width - num_axes, 2 * num_axes)
    if rest or bands < 1:
        raise ValueError(f"{width} is no width of Fourier positions on {num_axes} axes, {num_axes}·(1 + 2·K).")
    return bands


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

BATCH_NORM_DECAY = 0.9  # of the running averages


def contents(model: nn.Module) -> State:
    """The tensors that `write` writes, under "module/parameter", without those that only training needs.

    Raises:
        CheckpointError: none of DeepMind's six networks, or one of other arithmetic.
    """
    config: Any = model.config
    if type(config) not in MODULES:
        raise CheckpointError(f"DeepMind's Perceiver IO has no {type(model).__name__}.")
    if config.numerics != "deepmind":
        raise CheckpointError(
            f"this model computes as transformers does (numerics {config.numerics!r}), and DeepMind's release would "
            f"not. Of transformers: {hf_perceiver.differences(config)}. The outputs would be others, without any sign."
        )
    if isinstance(config, ImagePerceiverConfig) and not config.num_classes:
        raise CheckpointError("DeepMind's image classifiers cannot have no head.")
    return invert(model.state_dict(), rules(config), config)


def write(
    path: Path, model: nn.Module, preprocess: PreprocessConfig | None = None, labels: Labels | None = None
) -> list[Path]:
    """Write a pickle of plain dicts and NumPy arrays that DeepMind's code takes as `params` and `state`.

    As in the published files it is {params, state} for an image classifier, for the others `params` alone. What a
    model is beyond its tensors is not in it: where `read` would take otherwise, a warning names it.
    Raises:
        CheckpointError: none of DeepMind's six networks, or one of other arithmetic.
    """
    flat = contents(model)
    config: Any = model.config
    parts: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "state": {}}
    for name, tensor in flat.items():
        module, _, parameter = name.rpartition("/")
        values = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        parts["state" if module.endswith("_ema") else "params"].setdefault(module, {})[parameter] = values
    for module, leaves in parts["state"].items():  # Haiku asks for them, and uses them to go on training
        leaves.setdefault("counter", parts["state"][module.replace("var_ema", "mean_ema")]["counter"])
        started = 1 - BATCH_NORM_DECAY ** int(leaves["counter"])
        leaves["hidden"] = leaves["average"] * np.float32(started)
    tree = parts if isinstance(config, ImagePerceiverConfig) else parts["params"]
    with files.replacing(path) as part, part.open("wb") as file:
        pickle.dump(tree, file, protocol=4)
    _warn_of_what_is_not_told(path, flat, config)
    if isinstance(config, ImagePerceiverConfig):
        taken = PreprocessConfig.deepmind_perceiver(config.image_size)
        warn_of_losses(path, config.num_classes, labels, preprocess, taken)
    return [path]


def _warn_of_what_is_not_told(path: Path, flat: State, config: PerceiverConfig) -> None:
    network, told = _told(flat, path)
    published = PUBLISHED[network]
    untold = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in told and getattr(config, field.name) != getattr(published, field.name)
    }
    if untold:
        values = ", ".join(f"{name}={value!r}" for name, value in untold.items())
        log.warning(
            "%s does not hold %s; without being told, a reader takes what DeepMind published. Read it with "
            "opsin.checkpoints.read(path, config=%s(…)).", path, values, type(config).__name__,
        )  # fmt: skip
