"""transformers' names for opsin's models: a model card runs with only its import line changed.

    from opsin.compat import ViTFeatureExtractor, ViTForImageClassification

What model cards pass goes in, and comes out as in transformers: outputs, `config`. New heads, other dtypes and devices
at loading are not for here. Pixels are those of its PIL processors;
images are made upright RGB first, whatever their EXIF orientation and mode. New code is better off with `opsin.load`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import Checkpoint, files, processors, reader
from opsin.errors import CheckpointError, NoHead
from opsin.labels import Labels
from opsin.models import vit

__all__ = ["ViTFeatureExtractor", "ViTForImageClassification", "ViTImageProcessor", "ViTModel"]

P = TypeVar("P", bound="_Pretrained")

FIELDS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size",
    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
)  # fmt: skip
"""What may be set of an image processor."""


# ── processor ────────────────────────────────────────────────────────────────────────────────────────────────────────


class BatchFeature(dict[str, Any]):
    """Of a processor: `inputs["pixel_values"]`, `inputs.pixel_values`, `model(**inputs)`, `inputs.to("cuda")`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here; there is {', '.join(self)}.") from None

    def to(self, *args: Any, **kwargs: Any) -> "BatchFeature":
        """Move and cast the tensors in place, as `torch.Tensor.to`."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(*args, **kwargs)
        return self


class ViTImageProcessor:
    """Images → pixel_values. `preprocess_config` is opsin's own description of it.

    Args:
        fields: those of `preprocessor_config.json`; see `FIELDS`. What is not given is as in transformers: squash to
            224 × 224, bilinear, to −1..1.
    """

    def __init__(self, **fields: Any) -> None:
        self.preprocess_config = processors.read_hf(_known(fields))

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, revision: str | None = None, use_fast: bool | None = None, **fields: Any
    ) -> "ViTImageProcessor":
        """The processor of a model: hub id, local folder, or whatever `opsin.load` takes; `fields` override its own.

        `use_fast` is taken so that old calls run, and means nothing: there is one processor, equal to the slow one.

        Raises:
            UnknownModel, HubError, CheckpointError: as `opsin.load`.
        """
        name = os.fspath(name)
        folder = Path(os.path.expanduser(name))  # noqa: PTH111, Path.expanduser raises for an unknown user
        if not folder.exists() and reader.HUB_ID.fullmatch(name) and name not in reader.EMBEDDED:
            from opsin.checkpoints import hub  # brings huggingface_hub

            folder = hub.download(name, revision=revision, weights=False)
        described = folder / "preprocessor_config.json"
        processor = cls()
        if described.is_file():
            try:
                processor.preprocess_config = processors.read_hf(files.read_json(described))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{described}: {error}") from error
        else:  # opsin's own form and timm's keep it elsewhere
            processor.preprocess_config = checkpoints.read(name, revision=revision).preprocess
        return processor._with(fields) if fields else processor

    def _with(self, fields: dict[str, Any]) -> "ViTImageProcessor":
        processor = type(self)()
        processor.preprocess_config = processors.read_hf(self.to_dict() | _known(fields))
        return processor

    def __call__(self, images: Any, return_tensors: str | None = None, **fields: Any) -> BatchFeature:
        """One image or a list: PIL, path, bytes, uint8 array or tensor with channels first or last, or a batch of them.

        Args:
            return_tensors: "pt" or "np" stacks to (B, 3, H, W) float32; None gives a list of arrays (3, H, W).
            fields: override the processor's own for this call.
        Raises:
            ImageError: one of them is not an image, or damaged.
            ValueError: images that keep different sizes cannot be stacked.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f'return_tensors is "{return_tensors}". Known: "pt", "np", None.')
        config = (self._with(fields) if fields else self).preprocess_config
        pixels = [config(_channels_as_decode_takes_them(image)) for image in _images(images)]
        if return_tensors is None:
            return BatchFeature(pixel_values=[image.numpy() for image in pixels])
        if not pixels:
            raise ValueError("no images: the list is empty. Give at least one.")
        if len({image.shape for image in pixels}) > 1:
            sizes = ", ".join(f"{image.shape[1]}×{image.shape[2]}" for image in pixels[:4])
            raise ValueError(f"images of {sizes} pixels cannot be stacked. Resize them, or use return_tensors=None.")
        batch = torch.stack(pixels)
        return BatchFeature(pixel_values=batch if return_tensors == "pt" else batch.numpy())

    preprocess = __call__

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS and "preprocess_config" in self.__dict__:
            try:
                return self.to_dict().get(name)
            except ValueError as error:  # of a JAX or timm checkpoint: transformers has no words for it
                raise AttributeError(str(error)) from error
        raise AttributeError(f"{type(self).__name__} has no {name!r}. Fields: {', '.join(FIELDS)}.")

    def to_dict(self) -> dict[str, Any]:
        """As in `preprocessor_config.json`."""
        return processors.write_hf(self.preprocess_config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json`."""
        files.write_json(Path(folder) / "preprocessor_config.json", self.to_dict())

    def __repr__(self) -> str:
        try:
            fields = self.to_dict()
        except ValueError:  # transformers has no words for it
            fields = self.preprocess_config.spec()
        return f"{type(self).__name__} {json.dumps(fields, indent=2)}"


ViTFeatureExtractor = ViTImageProcessor
"""Its name until transformers 4.27, and on most model cards."""


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    for field in fields:
        if field not in FIELDS:
            raise TypeError(f"unexpected argument {field!r}. An image processor has {', '.join(FIELDS)}.")
    return fields


def _images(images: Any) -> Iterable[Any]:
    if isinstance(images, np.ndarray | Tensor):
        return images if images.ndim == 4 else [images]
    return images if isinstance(images, list | tuple) else [images]


def _channels_as_decode_takes_them(image: Any) -> Any:
    """transformers finds the channel axis by its length; `decode` wants it last in arrays and first in tensors."""
    if not isinstance(image, np.ndarray | Tensor) or image.ndim != 3:
        return image
    first, last = image.shape[0] in (1, 3), image.shape[-1] in (1, 3)
    if isinstance(image, np.ndarray):
        return np.moveaxis(image, 0, -1) if first and not last else image
    return image.movedim(-1, 0) if last and not first else image


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class ModelOutput(dict[str, Any]):
    """Outputs by attribute, key, index or slice; what was not computed is None by attribute and absent otherwise."""

    names: tuple[str, ...] = ()

    def __init__(self, **values: Any) -> None:
        super().__init__({name: values[name] for name in self.names if values.get(name) is not None})

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self.names:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}. It has {', '.join(self.names)}.")

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class ImageClassifierOutput(ModelOutput):
    names = ("loss", "logits", "hidden_states", "attentions")


class BaseModelOutputWithPooling(ModelOutput):
    names = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")


class Config:
    """`model.config` under transformers' names. A view: changing the shape here does not change the model."""

    def __init__(self, config: vit.ViTConfig, labels: Labels | None) -> None:
        height, width = config.image_size
        self.model_type = "vit"
        self.hidden_size = config.embed_dim
        self.num_hidden_layers = config.num_layers
        self.num_attention_heads = config.num_heads
        self.intermediate_size = config.mlp_dim
        self.hidden_act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
        self.hidden_dropout_prob = config.dropout_rate
        self.attention_probs_dropout_prob = 0.0
        self.layer_norm_eps = config.norm_eps
        self.image_size = height if height == width else [height, width]
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        self.qkv_bias = config.qkv_bias
        self.num_labels = config.num_classes
        self.id2label = dict(enumerate(labels.names)) if labels else {}
        self.label2id = {name: index for index, name in self.id2label.items()}
        self.problem_type: str | None = None
        self.output_attentions = False
        self.output_hidden_states = False

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __repr__(self) -> str:
        return f"Config {json.dumps(vars(self), indent=2)}"


HARMLESS = ("attn_implementation", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors")


class _Pretrained(nn.Module):
    """`model` is opsin's own; this wraps its inputs and outputs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        if not isinstance(checkpoint.model, vit.ViT):
            kind = type(checkpoint.model).__name__
            raise CheckpointError(f"{checkpoint.source.name} is a {kind}, not a ViT. opsin.load takes it.")
        self.model = checkpoint.model
        self.config = Config(self.model.config, checkpoint.labels)
        self._preprocess, self._labels = checkpoint.preprocess, checkpoint.labels

    @classmethod
    def from_pretrained(
        cls: type[P], name: str | os.PathLike[str], *, revision: str | None = None, **harmless: Any
    ) -> P:
        """Read a model: hub id, local folder, or whatever `opsin.load` takes. It comes in eval mode, fp32, on the CPU.

        Of transformers' other arguments those in `HARMLESS` are taken, and mean nothing here.

        Raises:
            UnknownModel, HubError, CheckpointError: as `opsin.load`.
            NoHead: a classifier was asked of a checkpoint without one. (transformers gives a random one.)
        """
        for argument in harmless:
            if argument not in HARMLESS:
                raise TypeError(f"unexpected argument {argument!r}. Known: revision, {', '.join(HARMLESS)}.")
        return cls(checkpoints.read(name, revision=revision)).eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model, labels and preprocessing so that transformers loads them.

        Raises:
            CheckpointError: transformers has no such model; the message says what stands in the way.
        """
        checkpoints.write_hf(Path(folder), self.model, self._preprocess, self._labels)

    @property
    def device(self) -> torch.device:
        return self.model.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.pos_embed.dtype

    def _encode(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        interpolate_pos_encoding: bool | None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...] | None]]:
        """Pixels (B, C, H, W) to encoded tokens (B, P + N, D), and what was asked for on the way.

        `hidden_states` are the tokens before the first layer and after each, without the final norm; `attentions` the
        softmax weights of each layer, (B, heads, P + N, P + N).
        """
        model, size = self.model, tuple(pixel_values.shape[-2:])
        if size != model.config.image_size and not interpolate_pos_encoding:
            given, right = ("×".join(map(str, sides)) for sides in (size, model.config.image_size))
            raise ValueError(
                f"pixel_values are {given}; the positions of this model are for {right}. Resize the images, or pass "
                "interpolate_pos_encoding=True."
            )
        with_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        tokens = model.embed(pixel_values.to(self.dtype))
        states, attentions = [tokens], []
        for layer in model.layers:
            if with_attentions:
                normed = layer.norm1(tokens)  # type: ignore[operator]
                attentions.append(layer.attn.weights(normed, normed))  # type: ignore[union-attr,operator]
            tokens = layer(tokens)
            states.append(tokens)
        if not model.config.norm_after_pool:
            tokens = model.norm(tokens)
        return tokens, {
            "hidden_states": tuple(states) if with_states else None,
            "attentions": tuple(attentions) if with_attentions else None,
        }


class ViTForImageClassification(_Pretrained):
    """Any checkpoint of opsin's ViT that has a head: ViT, DeiT, DINOv2."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        if self.model.head is None:
            raise NoHead(
                f"{checkpoint.source.name} has no classification head. Use ViTModel for its features, or a fine-tuned "
                "checkpoint: `opsin models` lists some."
            )

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Logits (B, K), and the mean loss where `labels` are given: class indices (B,), or floats (B, K)."""
        model = self.model
        tokens, asked = self._encode(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        logits = model.classify(model.pool(tokens))
        if model.head_dist is not None:
            logits = (logits + model.head_dist(tokens[:, 1])) / 2
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        output = ImageClassifierOutput(loss=loss, logits=logits, **asked)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """By `config.problem_type`; where that is None, by the number of classes and the type of the labels."""
        kind = self.config.problem_type
        if kind is None and self.config.num_labels == 1:
            kind = "regression"
        elif kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        if kind == "single_label_classification":
            return F.cross_entropy(logits, labels.flatten())
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        raise ValueError(
            f'config.problem_type is "{kind}". Known: "regression", "single_label_classification", '
            '"multi_label_classification", None.'
        )


class ViTModel(_Pretrained):
    """The encoder. A checkpoint's classification head is dropped; its pooler, the dense layer + tanh that some of the
    pre-trained ones have, gives `pooler_output`, which is None without one. (transformers makes a random pooler.)"""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        model, pool = self.model, self.model.config.pool
        model.head = model.head_dist = None
        model.config = dataclasses.replace(
            model.config, num_classes=0, pool="token" if pool == "token_mean" else pool, distillation_head=False
        )
        self.config, self._labels = Config(model.config, None), None

    def forward(
        self,
        pixel_values: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """`last_hidden_state` (B, P + N, D), after the final norm, and `pooler_output` (B, D)."""
        model = self.model
        tokens, asked = self._encode(pixel_values, output_attentions, output_hidden_states, interpolate_pos_encoding)
        pooled = None if model.pre_logits is None else torch.tanh(model.pre_logits(model.pool(tokens)))
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled, **asked)
        return output.to_tuple() if return_dict is False else output
