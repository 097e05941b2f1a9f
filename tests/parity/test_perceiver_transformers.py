"""The same Perceiver in transformers and here gives the same outputs; and back again."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import hf_perceiver
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.perceiver import Encoder
from opsin.models.perceiver_io import (
    FlowPerceiver,
    ImagePerceiver,
    ImagePerceiverConfig,
    MultimodalPerceiver,
    TextPerceiver,
    TextPerceiverConfig,
)
from opsin.models.position import FourierPositions, fourier_features, linear_positions, point_positions
from opsin.pipeline import Classifier
from opsin.preprocess import PreprocessConfig

Noise = Callable[[nn.Module], None]
Near = Callable[[Tensor, Tensor], None]

ENCODER: dict[str, Any] = {
    "num_latents": 7, "d_latents": 24, "num_blocks": 2, "num_self_attends_per_block": 3, "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1, "self_attention_widening_factor": 3, "cross_attention_widening_factor": 2,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {  # class → config; every size its own
    hf_perceiver.CONV: ENCODER | {"num_labels": 11},
    hf_perceiver.FOURIER: ENCODER | {"num_labels": 11},
    hf_perceiver.LEARNED: ENCODER | {"num_labels": 11, "image_size": 9, "num_cross_attention_heads": 2},
    hf_perceiver.TEXT: ENCODER
    | {
        "d_model": 16, "vocab_size": 19, "max_position_embeddings": 13, "qk_channels": 8, "v_channels": 24,
        "num_cross_attention_heads": 2,
    },
    hf_perceiver.FLOW: ENCODER | {"train_size": [10, 14]},
    hf_perceiver.MULTIMODAL: ENCODER
    | {
        "num_labels": 11, "num_frames": 3, "audio_samples_per_frame": 20, "samples_per_patch": 5, "image_size": 4,
        "output_shape": [1, 3, 8, 12], "output_num_channels": 10, "_label_trainable_num_channels": 21,
    },
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {  # where transformers' defaults differ
    hf_perceiver.CONV: {
        "num_latents": 512, "d_latents": 1024, "num_blocks": 8, "num_self_attends_per_block": 6,
        "num_cross_attention_heads": 1, "num_labels": 1000,
    },
    hf_perceiver.TEXT: {"qk_channels": 256, "v_channels": 1280},
    hf_perceiver.MULTIMODAL: {
        "num_latents": 784, "d_latents": 512, "num_self_attends_per_block": 8, "num_cross_attention_heads": 1,
        "num_labels": 700,
    },
}  # fmt: skip
COUNTS = {hf_perceiver.CONV: 48_646_522, hf_perceiver.TEXT: 201_108_230, hf_perceiver.MULTIMODAL: 19_858_855}
PIXELS = {hf_perceiver.CONV: (50, 34), hf_perceiver.FOURIER: (10, 14), hf_perceiver.LEARNED: (9, 9)}


def build(noise: Noise, kind: str, **changes: Any) -> Any:
    """A transformers model, all noise: parameters, and the running mean and variance of a batch norm."""
    model = getattr(transformers, kind)(transformers.PerceiverConfig(**TINY[kind] | changes))
    fill(noise, model)
    return model.eval()


def fill(noise: Noise, model: nn.Module) -> None:
    noise(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and ("latents" in name or "position" in name or "padding" in name or "mask" in name):
                parameter.normal_(std=0.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.3, 2, generator=generator)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)


def save(model: Any, folder: Path, size: tuple[int, int] | None = None) -> Path:
    """`save_pretrained`, with preprocessing to `size` (H, W) where the model takes images."""
    model.save_pretrained(folder)
    if size is not None:
        height, width = size
        processor = {
            "image_processor_type": "PerceiverImageProcessor",
            "size": {"height": height, "width": width},
            "crop_size": {"height": height + 2, "width": width + 3},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def inputs_of(kind: str) -> tuple[Any, ...]:
    """Inputs for our model, at its own size; batch 2."""
    if kind in PIXELS:
        return (draw(2, 3, *PIXELS[kind]),)
    if kind == hf_perceiver.TEXT:
        ids = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(2))
        mask = torch.ones(2, 11, dtype=torch.int64)
        mask[0, 6:] = 0
        return ids, mask
    if kind == hf_perceiver.FLOW:
        return (draw(2, 2, 27, 10, 14),)
    return draw(2, 3, 3, 8, 12), draw(2, 60, seed=2)


IMAGE_POINTS, AUDIO_POINTS = torch.tensor([0, 5, 100, 211, 287]), torch.tensor([11, 2, 7])


def ours(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(model, FlowPerceiver):
            return [model.from_patches(*inputs) * model.RESCALE]  # else they are hundredths
        if isinstance(model, MultimodalPerceiver):
            outputs = model.decode(model.encode(*inputs), image_points=IMAGE_POINTS, audio_points=AUDIO_POINTS)
            return [outputs[name] for name in ("audio", "image", "label")]
        return [model(*inputs)]


def theirs(model: Any, inputs: tuple[Any, ...], **options: Any) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(model, transformers.PerceiverForMaskedLM):
            ids, mask = inputs
            return [model(inputs=ids, attention_mask=mask).logits[:, : ids.shape[1]]]  # it decodes every place it has
        if isinstance(model, transformers.PerceiverForMultimodalAutoencoding):
            video, audio = inputs
            label = torch.full((video.shape[0], model.config.num_labels), 3.0)  # hidden: any will do
            points = {"image": IMAGE_POINTS, "audio": AUDIO_POINTS, "label": None}
            everything = {"image": video, "audio": audio[:, :, None], "label": label}
            logits = model(inputs=everything, subsampled_output_points=points).logits
            return [logits[name] for name in ("audio", "image", "label")]
        logits = model(inputs=inputs[0], **options).logits
        return [logits * FlowPerceiver.RESCALE if logits.ndim == 4 else logits]


def compare(near: Near, one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        near(a, b)


# ── the same outputs ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", TINY)
def test_outputs(kind: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference = build(noise, kind)
    checkpoint = checkpoints.read(save(reference, tmp_path, PIXELS.get(kind)))
    inputs = inputs_of(kind)
    compare(near, ours(checkpoint.model, inputs), theirs(reference, inputs))
    assert checkpoint.source.format == "transformers"
    assert (checkpoint.preprocess is not None) == (kind in PIXELS)
    labelled = kind in PIXELS or kind == hf_perceiver.MULTIMODAL
    assert checkpoint.labels == (Labels.numbered(11) if labelled else None)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no query residual": (hf_perceiver.FOURIER, {"use_query_residual": False}),
    "own attention widths": (hf_perceiver.CONV, {"qk_channels": 20, "v_channels": 24, "num_cross_attention_heads": 2}),
    "flow with own widths": (hf_perceiver.FLOW, {"qk_channels": 8, "v_channels": 24}),
    "multimodal with own widths": (hf_perceiver.MULTIMODAL, {"qk_channels": 8, "v_channels": 24}),
    "text without widths": (hf_perceiver.TEXT, {"qk_channels": None, "v_channels": None}),
    "wide label": (hf_perceiver.MULTIMODAL, {"num_labels": 450, "_label_trainable_num_channels": 400}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_of_other_settings(name: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    kind, changes = VARIANTS[name]
    reference = build(noise, kind, **changes)
    model = checkpoints.read(save(reference, tmp_path, PIXELS.get(kind))).model
    compare(near, ours(model, inputs_of(kind)), theirs(reference, inputs_of(kind)))


@pytest.mark.parametrize("kind", [hf_perceiver.CONV, hf_perceiver.FOURIER])
@pytest.mark.parametrize("height, width", [(41, 38), (23, 52)])
def test_outputs_at_another_size(kind: str, height: int, width: int, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference = build(noise, kind)
    model = checkpoints.read(save(reference, tmp_path, PIXELS[kind])).model
    images = (draw(2, 3, height, width),)
    compare(near, ours(model, images), theirs(reference, images))


@pytest.mark.parametrize("height, width", [(12, 12), (5, 16), (9, 7)])
def test_learned_positions_at_another_size(height: int, width: int, noise: Noise, near: Near, tmp_path: Path) -> None:
    reference = build(noise, hf_perceiver.LEARNED)
    model = checkpoints.read(save(reference, tmp_path, (9, 9))).model
    images = (draw(2, 3, height, width),)
    compare(near, ours(model, images), theirs(reference, images, interpolate_pos_encoding=True))


def test_features_are_what_the_head_reads(noise: Noise, near: Near, tmp_path: Path) -> None:
    reference = build(noise, hf_perceiver.CONV)
    model: Any = checkpoints.read(save(reference, tmp_path, (50, 34))).model
    images = draw(2, 3, 50, 34)
    with torch.no_grad():
        near(model.encode(model.embed(images)), reference(inputs=images, output_hidden_states=True).hidden_states[-1])
        near(reference.perceiver.decoder.decoder.final_layer(model.features(images)), reference(inputs=images).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_outputs_at_published_shape(kind: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = getattr(transformers, kind)(transformers.PerceiverConfig(**PUBLISHED[kind]))
    reference = empty.to_empty(device="cpu").eval()  # its own random start takes longer than the test
    fill(noise, reference)
    assert sum(parameter.numel() for parameter in reference.parameters()) == COUNTS[kind]
    model = checkpoints.read(save(reference, tmp_path, (224, 224) if kind == hf_perceiver.CONV else None)).model
    if kind == hf_perceiver.TEXT:
        assert isinstance(model, TextPerceiver)
        mask = torch.ones(1, 2048)
        mask[:, 1900:] = 0
        inputs: tuple[Any, ...] = (torch.randint(262, (1, 2048), generator=torch.Generator().manual_seed(2)), mask)
    elif kind == hf_perceiver.CONV:
        assert isinstance(model, ImagePerceiver) and model.config == ImagePerceiverConfig(
            numerics="transformers", cross_mlp_ratio=1
        )
        inputs = (draw(1, 3, 224, 224),)
    else:
        assert isinstance(model, MultimodalPerceiver)
        inputs = (draw(1, 16, 3, 224, 224), draw(1, 30_720, seed=2))
    compare(near, ours(model, inputs), theirs(reference, inputs))


# ── written and read again ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", TINY)
def test_written_folder_loads_in_transformers(kind: str, noise: Noise, near: Near, tmp_path: Path) -> None:
    checkpoint = checkpoints.read(save(build(noise, kind), tmp_path / "theirs", PIXELS.get(kind)))
    model = checkpoint.model
    labels = checkpoint.labels and Labels.from_names([f"class {i}" for i in range(len(checkpoint.labels))])
    checkpoints.write_hf(tmp_path / "ours", model, checkpoint.preprocess, labels)
    again, info = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    compare(near, theirs(again.eval(), inputs_of(kind)), ours(model, inputs_of(kind)))
    if labels:
        assert again.config.id2label == dict(enumerate(labels.names))
    back = checkpoints.read(tmp_path / "ours")
    assert back.model.config == model.config and back.preprocess == checkpoint.preprocess and back.labels == labels
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    if checkpoint.preprocess is not None:
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
        assert (processor.size["height"], processor.size["width"]) == checkpoint.preprocess.size


@pytest.mark.parametrize("kind", TINY)
def test_own_form_keeps_it_all(kind: str, noise: Noise, tmp_path: Path) -> None:
    checkpoint = checkpoints.read(save(build(noise, kind), tmp_path / "theirs", PIXELS.get(kind)))
    checkpoints.write(tmp_path / "ours", checkpoint.model, checkpoint.preprocess, checkpoint.labels)
    back = checkpoints.read(tmp_path / "ours")
    assert back.model.config == checkpoint.model.config
    assert (back.preprocess, back.labels) == (checkpoint.preprocess, checkpoint.labels)
    inputs = inputs_of(kind)
    for one, other in zip(ours(back.model, inputs), ours(checkpoint.model, inputs), strict=True):
        assert torch.equal(one, other)


DIFFERENCES = {
    hf_perceiver.CONV: "exact GELU, .* pads the convolution by 3 on every side",
    hf_perceiver.FOURIER: "exact GELU, not the one by tanh. Its",
    hf_perceiver.LEARNED: "exact GELU, .* adds the decoder's query",
    hf_perceiver.TEXT: "exact GELU, .* queries of padded places",
    hf_perceiver.FLOW: "exact GELU, not the one by tanh. Its",
    hf_perceiver.MULTIMODAL: "exact GELU, not the one by tanh. Its",
}


@pytest.mark.parametrize("kind", TINY)
def test_deepmind_numerics_are_not_written(kind: str, noise: Noise, tmp_path: Path) -> None:
    checkpoint = checkpoints.read(save(build(noise, kind), tmp_path / "theirs", PIXELS.get(kind)))
    network, config = type(checkpoint.model), cast(Any, checkpoint.model.config)
    changes = {"decoder_residual": False} if kind == hf_perceiver.LEARNED else {}
    model = network(dataclasses.replace(config, numerics="deepmind", **changes))
    with pytest.raises(CheckpointError, match=f"computes as DeepMind's release does .*{DIFFERENCES[kind]}"):
        checkpoints.write_hf(tmp_path / "ours", model, checkpoint.preprocess, checkpoint.labels)
    assert not (tmp_path / "ours").exists()
    if kind != hf_perceiver.MULTIMODAL:  # whose points are few, and near
        other = network(dataclasses.replace(config, numerics="deepmind"))
        other.load_state_dict(checkpoint.model.state_dict())
        one, two = (ours(model.eval(), inputs_of(kind))[0] for model in (checkpoint.model, other))
        assert (one - two).abs().max() > 3e-5 * one.abs().max()


IMAGE: dict[str, Any] = {
    "num_latents": 3, "latent_dim": 8, "num_heads": 2, "num_classes": 5, "image_size": (32, 32),
    "numerics": "transformers",
}  # fmt: skip

TEXT: dict[str, Any] = {
    "num_latents": 3, "latent_dim": 8, "num_cross_heads": 2, "v_dim": 8, "embed_dim": 6, "numerics": "transformers",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (ImagePerceiverConfig(**IMAGE, num_bands=9), r"num_bands 9 \(it has 64\)"),
        (ImagePerceiverConfig(**IMAGE, max_resolution=(8, 8)), r"max_resolution \(8, 8\) \(it has \(56, 56\)\)"),
        (ImagePerceiverConfig(**IMAGE | {"image_size": (64, 64)}, num_stages=2), r"num_stages 2 \(it has 1\)"),
        (ImagePerceiverConfig(**IMAGE, decoder_residual=False), r"decoder_residual False \(it has True\)"),
        (ImagePerceiverConfig(**IMAGE | {"num_classes": 0}), "cannot have no head"),
        (ImagePerceiverConfig(**IMAGE | {"num_heads": 3, "qk_dim": 6, "v_dim": 6}), "its 3 heads do not divide"),
        (
            ImagePerceiverConfig(**IMAGE | {"image_size": (9, 7)}, front_end="conv1x1", embed_dim=256),
            r"positions for \(9, 7\) \(its are square\)",
        ),
        (TextPerceiverConfig(**TEXT), r"decoder_heads 2 \(it has 8\)"),
    ],
)  # fmt: skip
def test_what_transformers_has_not_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    model = checkpoints.rules.MODELS[type(config)](config)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.write_hf(tmp_path, model, None, None)
    assert not list(tmp_path.iterdir())


# ── configs and files ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder_of(noise: Noise, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def folder(kind: str) -> Path:
        return save(build(noise, kind), tmp_path_factory.mktemp("perceiver"), PIXELS.get(kind))

    return folder


def change(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", TINY)
def test_class_is_known_by_its_tensors(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    expected = checkpoints.read(folder).model.config
    assert checkpoints.read(change(folder, architectures="absent")).model.config == expected
    assert checkpoints.read(change(folder, architectures=None)).model.config == expected


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        (hf_perceiver.CONV, {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'. opsin's Perceivers have 'gelu'"),
        (hf_perceiver.CONV, {"cross_attention_shape_for_attention": "q"}, "for_attention is 'q'. opsin has 'kv'"),
        (hf_perceiver.CONV, {"architectures": ["PerceiverModel"]}, "is a PerceiverModel. Of Perceivers opsin reads"),
        (hf_perceiver.CONV, {"num_latents": "many"}, "does not describe a Perceiver"),
        (
            hf_perceiver.CONV,
            {"num_latents": 8},
            r"perceiver.embeddings.latents \(7, 24\) gives .* the model has \(8, 24",
        ),
        (hf_perceiver.CONV, {"num_self_attends_per_block": 4}, r"missing \(1[0-9]\): perceiver.encoder.self_attends.3"),
        (hf_perceiver.CONV, {"num_self_attends_per_block": 10**9}, "1000000000 layers by the config"),
        (hf_perceiver.CONV, {"num_self_attention_heads": 5}, r"num_heads \(5\) does not divide"),
        (hf_perceiver.LEARNED, {"image_size": [9, 9]}, "does not describe a Perceiver"),
        (hf_perceiver.FLOW, {"train_size": [10]}, "does not describe a Perceiver"),
        (hf_perceiver.FLOW, {"train_size": [10**5, 10**5]}, "asks for 1 × 100000 × 100000 positions; opsin takes 1 to"),
        (hf_perceiver.FLOW, {"train_size": [0, 10]}, "asks for 1 × 0 × 10 positions"),
        (hf_perceiver.MULTIMODAL, {"audio_samples_per_frame": 10**8}, "asks for 3 × 100000000 × 1 positions"),
        (hf_perceiver.MULTIMODAL, {"num_frames": 4}, "output_shape has 3 frames, num_frames is 4"),
        (hf_perceiver.MULTIMODAL, {"output_shape": [1, 3, 8, 13]}, r"patch_size \(4\) does not divide"),
        (
            hf_perceiver.TEXT,
            {"architectures": ["PerceiverForSequenceClassification"]},
            "is a PerceiverForSequenceClassification. Of Perceivers opsin reads Perceiver",
        ),
    ],
)
def test_configs_that_do_not_work(
    kind: str, changes: dict[str, Any], reason: str, folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.read(change(folder_of(kind), **changes))


def test_sequence_classifiers_are_known_by_their_tensors(noise: Noise, tmp_path: Path) -> None:
    settings = transformers.PerceiverConfig(**TINY[hf_perceiver.TEXT], num_labels=3)
    transformers.PerceiverForSequenceClassification(settings).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a PerceiverForSequenceClassification"):
        checkpoints.read(change(tmp_path, architectures=None))
    transformers.PerceiverModel(settings).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a PerceiverModel"):
        checkpoints.read(change(tmp_path, architectures=None))


OLDEST = {  # as the files of 2021 are
    "crop_size": 256, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
    "feature_extractor_type": "PerceiverFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def test_preprocessing(folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture, photos: Path) -> None:
    folder = folder_of(hf_perceiver.FOURIER)
    published = PreprocessConfig(
        source_crop=(0.875, 0.875), size=(224, 224), resample="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(OLDEST))
    assert checkpoints.read(folder).preprocess == published
    (folder / "preprocessor_config.json").unlink()
    assert not caplog.text
    checkpoint = checkpoints.read(folder)
    assert checkpoint.preprocess == published
    assert "no preprocessor_config.json: taking what perceiver models use" in caplog.text
    assert isinstance(checkpoint.model, ImagePerceiver) and checkpoint.model.config.image_size == (224, 224)
    (folder / "preprocessor_config.json").write_text(json.dumps(OLDEST | {"size": 20, "crop_size": 24}))
    assert Classifier(checkpoints.read(folder)).image_size == (20, 20)


def test_default_preprocessing_of_learned_positions(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(hf_perceiver.LEARNED)
    (folder / "preprocessor_config.json").unlink()
    preprocess = checkpoints.read(folder).preprocess
    assert preprocess and preprocess.size == (9, 9) and preprocess.source_crop == (0.9, 0.9)


def test_a_photo_gets_the_logits_of_transformers(folder_of: Callable[[str], Path], near: Near, photos: Path) -> None:
    folder = folder_of(hf_perceiver.CONV)
    classifier = Classifier(checkpoints.read(folder), dtype="fp32")
    assert len(classifier(photos / "coffee.png", top_k=3)) == 3
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with Image.open(photos / "coffee.png") as image:
        pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    reference = getattr(transformers, hf_perceiver.CONV).from_pretrained(folder).eval()
    with torch.no_grad():
        near(classifier.logits(photos / "coffee.png"), reference(inputs=pixels).logits)


# ── positions, against the formula ───────────────────────────────────────────────────────────────────────────────────


def formula(coordinates: np.ndarray, num_bands: int, max_resolution: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Fourier features of (N, d) coordinates in float64, and the largest angle behind each column, by the paper."""
    angles = [
        np.pi * (1 + (n / 2 - 1) * k / (num_bands - 1)) * coordinates[:, axis]
        for axis, n in enumerate(max_resolution)
        for k in range(num_bands)
    ]
    table = np.stack(angles, axis=1)
    largest = np.abs(table).max(axis=0)
    ones = np.ones(coordinates.shape[1])
    return np.concatenate([coordinates, np.sin(table), np.cos(table)], axis=1), np.concatenate([ones, largest, largest])


def grid(*sizes: int) -> np.ndarray:
    """Coordinates from -1 to 1, both included, the last axis fastest."""
    axes = [-1 + 2 * np.arange(n) / (n - 1) for n in sizes]
    return np.array([[axis[i] for axis, i in zip(axes, index, strict=True)] for index in np.ndindex(*sizes)])


def points(indices: list[int], *sizes: int) -> np.ndarray:
    """Coordinates of some of its points as a part of the outputs is asked for: the far end is never reached."""
    found = [np.unravel_index(index, sizes) for index in indices]
    return np.array([[-1 + 2 * i / n for i, n in zip(index, sizes, strict=True)] for index in found])


# fp32 rounds a coordinate, a frequency, their product, π and the angle: half a unit in the last place each, 2⁻²⁴ of the
# angle, and a unit more for the steps of linspace. Doubled, as a margin; a wrong grid is off by 1e-2 and more.
ROUNDING = 12 * 2.0**-24


@pytest.mark.parametrize(
    ("sizes", "num_bands", "max_resolution"),
    [
        ((55, 55), 64, (56, 56)),
        ((56, 56), 64, (56, 56)),
        ((23, 37), 64, (224, 224)),
        ((37, 29), 64, (368, 496)),
        ((3, 14, 11), 32, (16, 56, 56)),
        ((1920,), 192, (30_720,)),
    ],
)
def test_fourier_table_of_published_shapes(
    sizes: tuple[int, ...], num_bands: int, max_resolution: tuple[int, ...]
) -> None:
    table = FourierPositions(sizes, num_bands, max_resolution)().double().numpy()
    expected, angle = formula(grid(*sizes), num_bands, max_resolution)
    assert table.shape == expected.shape
    assert np.all(np.abs(table - expected) <= 1e-6 + ROUNDING * angle)
    indices = [0, 1, len(table) // 3, len(table) - 1]
    part = FourierPositions(sizes, num_bands, max_resolution, tabulate=False).at(torch.tensor(indices))
    expected, angle = formula(points(indices, *sizes), num_bands, max_resolution)
    assert np.all(np.abs(part.double().numpy() - expected) <= 1e-6 + ROUNDING * angle)


def test_fourier_table_where_fp32_is_exact() -> None:
    """Coordinates and frequencies that fp32 holds as they are: all that is left is rounding π·f·p, at most 4π."""
    sizes, num_bands, max_resolution = (5, 9), 4, (8, 2)
    table = FourierPositions(sizes, num_bands, max_resolution)().double().numpy()
    np.testing.assert_allclose(table, formula(grid(*sizes), num_bands, max_resolution)[0], rtol=0, atol=1e-6)
    some = [0, 13, 31, 63]
    part = FourierPositions((8, 8), num_bands, max_resolution).at(torch.tensor(some)).double().numpy()
    np.testing.assert_allclose(part, formula(points(some, 8, 8), num_bands, max_resolution)[0], rtol=0, atol=1e-6)


def test_parts_of_a_grid_lie_elsewhere_than_the_whole() -> None:
    whole, part = linear_positions((4, 5)), point_positions(torch.arange(20), (4, 5))
    scale = torch.tensor([3 / 4, 4 / 5])  # (n - 1) / n
    torch.testing.assert_close(part + 1, (whole + 1) * scale)


@pytest.mark.parametrize(("concat_pos", "sine_only"), [(False, False), (True, True), (False, True)])
def test_parts_of_fourier_features(concat_pos: bool, sine_only: bool) -> None:
    positions = linear_positions((3, 4))
    whole = fourier_features(positions, 5, (3, 4))
    kept = [*(range(2) if concat_pos else ()), *range(2, 12), *(() if sine_only else range(12, 22))]
    got = fourier_features(positions, 5, (3, 4), concat_pos=concat_pos, sine_only=sine_only)
    assert torch.equal(got, whole[:, kept])


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def encoder(noise: Noise) -> Encoder:
    model = Encoder(13, num_latents=5, latent_dim=12, num_blocks=2, layers_per_block=2, num_heads=3)
    fill(noise, model)
    return model.eval()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_tokens=st.integers(1, 40), batch=st.integers(1, 4))
def test_tokens_may_come_in_any_order_and_rows_do_not_mix(
    encoder: Encoder, seed: int, num_tokens: int, batch: int
) -> None:
    """Within what another order of fp32 sums does to latents of about one, a few layers on."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, num_tokens, 13, generator=generator)
    mask = torch.rand(batch, num_tokens, generator=generator) < 0.7
    order = torch.randperm(num_tokens, generator=generator)
    with torch.no_grad():
        latents = encoder(tokens, mask)
        torch.testing.assert_close(encoder(tokens[:, order], mask[:, order]), latents, rtol=1e-4, atol=1e-5)
        for i in range(batch):
            row = encoder(tokens[i : i + 1], mask[i : i + 1])
            torch.testing.assert_close(row, latents[i : i + 1], rtol=1e-4, atol=1e-5)
            nothing, kept = torch.zeros(1, 1, 13), tokens[i : i + 1, mask[i]]
            alone = encoder(kept) if mask[i].any() else encoder(nothing, torch.zeros(1, 1).bool())
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
