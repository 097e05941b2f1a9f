"""Tables of names: convert and invert undo each other, and what does not fit is named."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsin import checkpoints
from opsin.checkpoints import hf, npz, timm
from opsin.checkpoints.rules import SAME, TRANSPOSE, Report, Rule, convert, invert, shapes
from opsin.errors import CheckpointError
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

Table = Callable[[ViTConfig], Sequence[Rule]]

# each table with what it has names for
FORMATS: dict[str, tuple[Table, dict[str, st.SearchStrategy]]] = {
    "transformers ViT, DeiT": (
        hf.rules,
        {
            "distillation_token": st.booleans(),
            "distillation_head": st.booleans(),
            "qkv_bias": st.booleans(),
            "num_classes": st.sampled_from([0, 7]),
        },
    ),
    "transformers DINOv2": (
        hf.rules,
        {
            "layer_scale": st.just(True),
            "gated_mlp": st.booleans(),
            "num_registers": st.sampled_from([0, 3]),
            "pool": st.sampled_from(["token", "token_mean"]),
            "num_classes": st.sampled_from([0, 7]),
        },
    ),
    "timm": (
        timm.rules,
        {
            "distillation_token": st.booleans(),
            "layer_scale": st.booleans(),
            "gated_mlp": st.booleans(),
            "num_registers": st.sampled_from([0, 3]),
            "pool": st.sampled_from(["token", "mean", "map"]),
            "norm_after_pool": st.booleans(),
            "pre_logits": st.booleans(),
            "qkv_bias": st.booleans(),
            "num_classes": st.sampled_from([0, 7]),
        },
    ),
    "vision_transformer": (
        lambda config: npz.rules(npz.OLD),
        {
            "pool": st.sampled_from(["token", "mean"]),
            "pre_logits": st.booleans(),
            "num_classes": st.sampled_from([0, 7]),
        },
    ),
    "big_vision": (
        lambda config: npz.rules(npz.NEW),
        {
            "class_token": st.just(False),
            "pool": st.sampled_from(["mean", "map"]),
            "pre_logits": st.booleans(),
            "num_classes": st.sampled_from([0, 7]),
        },
    ),
}
BASE: dict[str, Any] = {"image_size": (15, 10), "patch_size": 5, "embed_dim": 22, "num_heads": 2, "mlp_dim": 13}


def noise(config: ViTConfig) -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes(config).items()}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_convert_undoes_invert(name: str, data: st.DataObject) -> None:
    table, fields = FORMATS[name]
    config = ViTConfig(**BASE, num_layers=data.draw(st.integers(1, 3)), **{f: data.draw(s) for f, s in fields.items()})
    native = noise(config)
    foreign = invert(native, table(config), config)
    again, report = convert(foreign, table(config), config)
    assert not report, str(report)
    assert again.keys() == native.keys()
    assert all(torch.equal(again[key], native[key]) for key in native)
    back = invert(again, table(config), config)
    assert back.keys() == foreign.keys()
    assert all(torch.equal(back[key], foreign[key]) for key in foreign)


CONFIG = ViTConfig(**BASE, num_layers=2, num_classes=7)


def test_what_does_not_fit_is_named() -> None:
    foreign = invert(noise(CONFIG), timm.rules(CONFIG), CONFIG)
    del foreign["blocks.1.attn.qkv.weight"], foreign["norm.bias"]
    foreign |= {
        "blocks.0.attn.gate": torch.ones(1),
        "head.weight": torch.ones(9, 22),
        "blocks.0.norm1.bias": torch.ones(()),
        "blocks.0.attn.qkv.bias": torch.ones(()),
    }
    _, report = convert(foreign, timm.rules(CONFIG), CONFIG)
    assert report.missing == ("blocks.1.attn.qkv.weight", "norm.bias")
    assert report.unexpected == ("blocks.0.attn.gate",)
    assert report.reshaped == (
        "blocks.0.norm1.bias () gives (), the model has (22,)",
        "blocks.0.attn.qkv.bias () cannot be laid out as (22,)",
        "head.weight (9, 22) gives (9, 22), the model has (7, 22)",
    )


def test_a_tensor_with_too_few_axes_is_named() -> None:
    foreign = invert(noise(CONFIG), npz.rules(npz.OLD), CONFIG)
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel"
    foreign[name] = torch.ones(3)
    _, report = convert(foreign, npz.rules(npz.OLD), CONFIG)
    assert report == Report(reshaped=(f"{name} (3,) cannot be laid out as (22, 22)",))


def test_long_lists_are_cut() -> None:
    text = str(Report(missing=tuple(f"blocks.{i}.norm1.bias" for i in range(150)), unexpected=("x",)))
    assert text == (
        "missing (150): " + ", ".join(f"blocks.{i}.norm1.bias" for i in range(8))
        + ", … 141 more …, blocks.149.norm1.bias; unexpected (1): x"
    )  # fmt: skip


def test_invert_names_what_the_format_has_not() -> None:
    config = dataclasses.replace(CONFIG, num_registers=3)
    with pytest.raises(CheckpointError, match="no place for registers"):
        invert(noise(config), npz.rules(npz.OLD), config)


def test_a_shared_tensor_must_divide() -> None:
    rules = [Rule(("a", "b"), "ab"), Rule("c", ("c1", "c2"), TRANSPOSE), Rule((), "known"), Rule("d", "d", SAME)]
    parts = {"a": torch.ones(2, 3), "b": torch.zeros(2, 3), "c": torch.ones(4, 5), "d": torch.ones(1)}
    foreign = invert(parts, rules, CONFIG)
    assert {name: tuple(tensor.shape) for name, tensor in foreign.items()} == {
        "ab": (4, 3), "c1": (5, 2), "c2": (5, 2), "d": (1,)
    }  # fmt: skip


def test_the_error_names_the_file(tmp_path: Path, noisy_checkpoint: checkpoints.Checkpoint) -> None:
    assert isinstance(noisy_checkpoint.model, ViT)
    checkpoints.write_hf(tmp_path, noisy_checkpoint.model, PreprocessConfig(size=(32, 32)), noisy_checkpoint.labels)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(
        CheckpointError,
        match=re.escape(f"{tmp_path} does not fit the model that its config describes. missing (16): encoder.layer.2."),
    ):
        checkpoints.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="1000000000 layers by the config, 40 tensors in the file"):
        checkpoints.read(tmp_path)
