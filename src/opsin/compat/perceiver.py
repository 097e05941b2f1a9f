"""The published Perceiver IO networks under transformers' names."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from opsin.checkpoints import Checkpoint
from opsin.compat.pretrained import Config, ModelOutput, Pretrained
from opsin.errors import CheckpointError, NoHead
from opsin.labels import Labels
from opsin.models.layers import Trace
from opsin.models.perceiver_io import (
    FlowPerceiver,
    FrontEnd,
    ImagePerceiver,
    MultimodalPerceiver,
    PerceiverConfig,
    TextPerceiver,
)


class PerceiverClassifierOutput(ModelOutput):
    names = ("loss", "logits", "hidden_states", "attentions", "cross_attentions")


class PerceiverMaskedLMOutput(PerceiverClassifierOutput):
    pass


def config_of(config: PerceiverConfig, labels: Labels | None, **values: Any) -> Config:
    return Config(
        labels,
        model_type="perceiver",
        num_latents=config.num_latents,
        d_latents=config.latent_dim,
        num_blocks=config.num_blocks,
        num_self_attends_per_block=config.layers_per_block,
        num_self_attention_heads=config.num_heads,
        num_cross_attention_heads=config.num_cross_heads,
        qk_channels=config.qk_dim,
        v_channels=config.v_dim,
        cross_attention_shape_for_attention="kv",
        self_attention_widening_factor=config.mlp_ratio,
        cross_attention_widening_factor=config.cross_mlp_ratio or config.mlp_ratio,
        hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        attention_probs_dropout_prob=0.0,
        use_query_residual=config.query_residual,
        **values,
    )


class _Asked:
    """What a caller wants to see of the way from inputs to outputs; `trace` goes along, None where nothing is asked."""

    def __init__(self, config: Config, output_attentions: bool | None, output_hidden_states: bool | None) -> None:
        self.attentions = config.output_attentions if output_attentions is None else output_attentions
        self.states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self.trace = Trace() if self.attentions or self.states else None

    def outputs(self) -> dict[str, tuple[Tensor, ...]]:
        """`hidden_states` before each layer and once more at the end of each block, `attentions` of the latents
        (B, heads, M, M), `cross_attentions` of the latents to the tokens (B, heads, M, N), of the decoder's queries."""
        found: dict[str, tuple[Tensor, ...]] = {}
        if self.trace is not None and self.states:
            found["hidden_states"] = tuple(self.trace.states)
        if self.trace is not None and self.attentions:
            read, *inner, decoded = (use.weights() for use in self.trace.attended)
            found |= {"attentions": tuple(inner), "cross_attentions": (read, decoded)}
        return found


class _Perceiver(Pretrained):
    """`forward` of each: inputs → tokens → latents → outputs, and what was asked for on the way."""

    def _asked(self, output_attentions: bool | None, output_hidden_states: bool | None) -> _Asked:
        return _Asked(self.config, output_attentions, output_hidden_states)

    def _output(self, return_dict: bool | None, **values: Any) -> Any:
        output = PerceiverClassifierOutput(**values)
        return output.to_tuple() if return_dict is False else output


def _one_of(inputs: Any, other: Any, name: str) -> Any:
    if (inputs is None) == (other is None):
        raise ValueError(f"give either inputs or {name}.")
    return other if inputs is None else inputs


def _bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class _ImageClassifier(_Perceiver):
    kind = ImagePerceiver
    front_end: FrontEnd

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.model.config
        if config.front_end != self.front_end:
            raise CheckpointError(
                f'{checkpoint.source.name} has the front end "{config.front_end}", {type(self).__name__} is for '
                f'"{self.front_end}": use the class of the other one.'
            )
        if not config.num_classes:
            raise NoHead(f"{checkpoint.source.name} has no classification head. opsin.load(…).embed gives features.")
        height, width = config.image_size
        self.config = config_of(
            config,
            checkpoint.labels,
            d_model=self.model.front_end.dim,
            image_size=height if height == width else [height, width],
            num_labels=config.num_classes,
        )

    def forward(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        pixel_values: Tensor | None = None,
    ) -> Any:
        """Logits (B, K) of pixels (B, 3, H, W), and the loss where `labels` are given: indices (B,), or floats (B, K).

        Args:
            attention_mask: (B, N), nonzero for tokens that may be read.
            interpolate_pos_encoding: allow sizes other than the model's where positions are learned.
        """
        model, pixels = self.model, _one_of(inputs, pixel_values, "pixel_values").to(self.dtype)
        size, learned = tuple(pixels.shape[-2:]), model.config.image_size
        if self.front_end == "conv1x1" and size != learned and not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values are {size[0]}×{size[1]}; the positions of this model are for {learned[0]}×{learned[1]}. "
                "Resize the images, or pass interpolate_pos_encoding=True."
            )
        asked = self._asked(output_attentions, output_hidden_states)
        latents = model.encoder(model.embed(pixels), _bool(attention_mask), asked.trace)
        logits = model.decoder(model.decoder.queries(latents), latents, trace=asked.trace)
        loss = None if labels is None else self._loss(logits, labels.to(logits.device))
        return self._output(return_dict, loss=loss, logits=logits, **asked.outputs())


class PerceiverForImageClassificationConvProcessing(_ImageClassifier):
    """deepmind/vision-perceiver-conv, and what has its front end: `opsin/perceiver-tiny`."""

    front_end = "conv"


class PerceiverForImageClassificationFourier(_ImageClassifier):
    """deepmind/vision-perceiver-fourier."""

    front_end = "pixels"


class PerceiverForImageClassificationLearned(_ImageClassifier):
    """deepmind/vision-perceiver-learned."""

    front_end = "conv1x1"


# ── text, flow, video ────────────────────────────────────────────────────────────────────────────────────────────────


class PerceiverForMaskedLM(_Perceiver):
    """deepmind/language-perceiver."""

    kind = TextPerceiver

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.model.config
        self.config = config_of(
            config,
            None,
            d_model=config.embed_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
        )

    def forward(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        input_ids: Tensor | None = None,
    ) -> Any:
        """Logits (B, N, V) of ids (B, N), and the mean loss over the places whose label (B, N) is not -100."""
        model, ids, mask = self.model, _one_of(inputs, input_ids, "input_ids"), _bool(attention_mask)
        asked = self._asked(output_attentions, output_hidden_states)
        logits = model(ids, mask, asked.trace)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        output = PerceiverMaskedLMOutput(loss=loss, logits=logits, **asked.outputs())
        return output.to_tuple() if return_dict is False else output


class PerceiverForOpticalFlow(_Perceiver):
    """deepmind/optical-flow-perceiver."""

    kind = FlowPerceiver

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.config = config_of(
            self.model.config, None, d_model=self.model.front_end.dim, train_size=list(self.model.config.image_size)
        )

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Flow (B, H, W, 2) of patches (B, 2, 27, H, W), in units of 20 pixels: multiply by 20 as DeepMind's code does.

        `opsin.models.front_ends.flow_patches` makes the patches of two frames.
        """
        model = self.model
        tokens = model.front_end(inputs.to(self.dtype))
        asked = self._asked(output_attentions, output_hidden_states)
        latents = model.encoder(tokens, _bool(attention_mask), asked.trace)
        logits = model.decode(tokens, latents, asked.trace).unflatten(1, inputs.shape[-2:])
        return self._output(return_dict, logits=logits, **asked.outputs())


class PerceiverForMultimodalAutoencoding(_Perceiver):
    """deepmind/multimodal-perceiver."""

    kind = MultimodalPerceiver

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.model.config
        self.config = config_of(
            config,
            checkpoint.labels,
            d_model=self.model.front_end.dim,
            image_size=config.resolution[1],
            num_frames=config.num_frames,
            audio_samples_per_frame=config.samples_per_frame,
            samples_per_patch=config.samples_per_patch,
            output_shape=[1, config.num_frames, *config.image_size],
            output_num_channels=config.output_dim,
            num_labels=config.num_classes,
        )

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        attention_mask: Tensor | None = None,
        subsampled_output_points: Mapping[str, Tensor | None] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits by modality: image (B, n, 3), audio (B, m·16), label (B, K).

        Args:
            inputs: image (B, T, 3, H, W), audio (B, S, 1), label (B, K), which the network never sees.
            subsampled_output_points: flat indices of the pixels and audio patches to decode. All at once would take
                gigabytes, so it cannot be left out; `opsin.load(…).autoencode` does the parts.
        """
        points = subsampled_output_points or {}
        image_points, audio_points = points.get("image"), points.get("audio")
        if image_points is None or audio_points is None:
            raise ValueError(
                'subsampled_output_points needs "image" and "audio": flat indices of the outputs to decode, as '
                "torch.arange(6272) and torch.arange(15) for the first of 128 parts."
            )
        model = self.model
        tokens = model.embed(inputs["image"].to(self.dtype), inputs["audio"].flatten(1).to(self.dtype))
        asked = self._asked(output_attentions, output_hidden_states)
        latents = model.encoder(tokens, _bool(attention_mask), asked.trace)
        logits = model.decode(latents, image_points=image_points, audio_points=audio_points, trace=asked.trace)
        return self._output(return_dict, logits=logits, **asked.outputs())
