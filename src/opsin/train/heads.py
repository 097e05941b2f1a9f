"""A trained model's body under a new head, at another image size."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from opsin.checkpoints.rules import Rule, load
from opsin.labels import Labels, match
from opsin.models.perceiver import ClassificationDecoder
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.position import resize_pos_embed
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.preprocess import PreprocessConfig

State = dict[str, Tensor]


def new_head(
    model: ViT | VT | ImagePerceiver,
    old_labels: Labels | None,
    labels: Labels,
    *,
    bias: float = 0.0,
    image_size: tuple[int, int] | None = None,
    dropout_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    for_features: bool = False,
) -> tuple[ViT | VT | ImagePerceiver, int]:
    """A copy of a model that tells other classes apart.

    Where no class is among the old ones, the whole head is new: of a ViT one linear layer of zeros, in place of any
    `pre_logits` too; of a Perceiver a decoder with its query, drawn at random but for the last layer, zeros. Where some
    are, their rows are copied, and the layers before them stay, without which the rows mean nothing; the other rows
    are zeros.

    Args:
        model: left as it is.
        old_labels: of the model's classes; None reuses nothing. Classes are the same as `labels.match` says.
        labels: K classes, one or more.
        bias: of new rows; −10 lets K sigmoids begin near zero.
        image_size: (H, W) pixels; None keeps the model's. A learned position table is resized once, by the method
            that the model's config names, so that the new model computes what the old one did at that size.
        dropout_rate, drop_path_rate: of the new model; only a ViT has them.
        for_features: a last linear layer of zeros for the features as they are: nothing is reused, a `pre_logits` is
            left out, and a Perceiver keeps its decoder, whose query reads the features.
    Returns:
        The new model, fp32, in evaluation mode, on the device of the old one; and how many rows were reused.
    Raises:
        ValueError: no classes, labels that do not fit the old head, a size that the model does not take, or dropout
            asked of what is no ViT.
    Source: Dosovitskiy et al. 2021, §3.2; Jaegle et al. 2021, Appendix A, and the model cards.
    """
    if not len(labels):
        raise ValueError("labels is empty; a head tells one class or more.")
    if not isinstance(model, ViT) and (dropout_rate or drop_path_rate):
        kind = "VT" if isinstance(model, VT) else "Perceiver"
        raise ValueError(
            f"dropout_rate is {dropout_rate} and drop_path_rate {drop_path_rate}; a {kind} has neither, so set 0."
        )
    num_classes = model.config.num_classes
    if old_labels is not None and len(old_labels) != num_classes:
        raise ValueError(f"old_labels has {len(old_labels)} classes, the model's head {num_classes}.")
    rows: list[int | None] = [None] * len(labels)
    if old_labels is not None and not for_features:
        rows = match(labels, old_labels)
    reused = len(rows) - rows.count(None)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    config: ViTConfig | VTConfig | ImagePerceiverConfig
    if isinstance(model, ViT):
        config = replace(
            model.config,
            num_classes=len(labels),
            image_size=image_size or model.config.image_size,
            pre_logits=model.config.pre_logits and bool(reused),
            dropout_rate=dropout_rate,
            drop_path_rate=drop_path_rate,
        )
        state["pos_embed"] = resize_pos_embed(
            state["pos_embed"],
            model.config.grid,
            config.grid,
            num_prefix=config.num_positioned,
            method=config.pos_resize,
        )
        if not config.pre_logits:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("pre_logits.")}
        heads = ["head", "head_dist"] if config.distillation_token and config.distillation_head else ["head"]
        for head in heads:
            state |= _rows(state, head, rows, config.feature_dim, bias)
    elif isinstance(model, VT):
        config = replace(model.config, num_classes=len(labels), image_size=image_size or model.config.image_size)
        state |= _rows(state, "head", rows, config.feature_dim, bias)
    else:
        config = replace(model.config, num_classes=len(labels), image_size=image_size or model.config.image_size)
        if config.front_end == "conv1x1":
            state["front_end.positions.table"] = model.front_end.positions(config.image_size).detach().clone()
        if not reused and not for_features:
            decoder = ClassificationDecoder(
                None,
                query_dim=config.latent_dim,
                latent_dim=config.latent_dim,
                query_residual=config.decoder_residual,
                activation=config.activation,
            )
            state |= {f"decoder.{name}": tensor.detach() for name, tensor in decoder.state_dict().items()}
        state |= _rows(state, "decoder.out", rows, config.latent_dim, bias)
    device = next(model.parameters()).device
    new = load(state, [Rule(name, name) for name in state], config, "the model with a new head")
    return new.to(device), reused


def _rows(state: State, head: str, rows: list[int | None], dim: int, bias: float) -> State:
    """Weight and bias of a head (K, dim): of the old one the rows that `rows` names, else zeros and `bias`."""
    weight, biases = torch.zeros(len(rows), dim), torch.full((len(rows),), bias)
    for new, old in enumerate(rows):
        if old is not None:
            weight[new], biases[new] = state[f"{head}.weight"][old], state[f"{head}.bias"][old]
    return {f"{head}.weight": weight, f"{head}.bias": biases}


def head_of(model: ViT | VT | ImagePerceiver) -> list[nn.Module]:
    """The modules that `new_head` may replace: those to train where the body is frozen. Empty without a head."""
    if isinstance(model, ImagePerceiver):
        return [model.decoder] if model.decoder.out is not None else []
    parts = [model.head] if isinstance(model, VT) else [model.pre_logits, model.head, model.head_dist]
    return [part for part in parts if part is not None] if model.head is not None else []


def preprocess_for(preprocess: PreprocessConfig, image_size: tuple[int, int]) -> PreprocessConfig:
    """The same geometry for pixels of another size: what was cut off stays cut off, what was squashed is squashed.

    Args:
        image_size: (H, W) pixels.
    Raises:
        ValueError: images keep sizes of their own.
    """
    height, width = preprocess.image_size
    if image_size == (height, width):
        return preprocess
    down, across = image_size[0] / height, image_size[1] / width
    if preprocess.crop_size is None:
        return replace(preprocess, size=image_size)
    if isinstance(preprocess.size, int):  # of the two, the one that leaves no black border
        return replace(preprocess, size=round(preprocess.size * max(down, across)), crop_size=image_size)
    if preprocess.size is None:
        return replace(preprocess, crop_size=image_size)
    size = round(preprocess.size[0] * down), round(preprocess.size[1] * across)
    return replace(preprocess, size=size, crop_size=image_size)
