"""ViT under transformers' names."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from opsin.checkpoints import Checkpoint
from opsin.compat.pretrained import Config, ModelOutput, Pretrained
from opsin.errors import NoHead
from opsin.labels import Labels
from opsin.models import vit
from opsin.models.layers import Trace


class ImageClassifierOutput(ModelOutput):
    names = ("loss", "logits", "hidden_states", "attentions")


class BaseModelOutputWithPooling(ModelOutput):
    names = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")


def config_of(config: vit.ViTConfig, labels: Labels | None) -> Config:
    height, width = config.image_size
    return Config(
        labels,
        model_type="vit",
        hidden_size=config.embed_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_dim,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        hidden_dropout_prob=config.dropout_rate,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=config.norm_eps,
        image_size=height if height == width else [height, width],
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        qkv_bias=config.qkv_bias,
        num_labels=config.num_classes,
    )


class _ViT(Pretrained):
    kind = vit.ViT

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config = config_of(self.model.config, checkpoint.labels)

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
        trace = Trace() if with_attentions or with_states else None
        tokens = model.encode(model.embed(pixel_values.to(self.dtype)), trace)
        return tokens, {
            "hidden_states": tuple(trace.states) if trace and with_states else None,
            "attentions": tuple(use.weights() for use in trace.attended) if trace and with_attentions else None,
        }


class ViTForImageClassification(_ViT):
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


class ViTModel(_ViT):
    """The encoder. A checkpoint's classification head is dropped; its pooler, the dense layer + tanh that some of the
    pre-trained ones have, gives `pooler_output`, which is None without one. (transformers makes a random pooler.)"""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        model, pool = self.model, self.model.config.pool
        model.head = model.head_dist = None
        model.config = dataclasses.replace(
            model.config, num_classes=0, pool="token" if pool == "token_mean" else pool, distillation_head=False
        )
        self.config, self._labels = config_of(model.config, None), None

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
