"""Google's files: the JAX forward pass stated anew, on the arrays as they are stored, against what opsin reads.

The restatement follows vision_transformer `models_vit.py` and big_vision `models/vit.py` at 64-bit precision, and
shares nothing with opsin: kernels stay (in, heads, d), positions and class token are joined where those files do it.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from opsin import checkpoints
from opsin.checkpoints import npz
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

Arrays = dict[str, np.ndarray]
Near = Callable[[Tensor, Tensor], None]

PATCH, DIM, HEADS, HEAD_DIM, MLP, LAYERS, CLASSES, GRID = 5, 44, 4, 11, 29, 2, 7, 3


def release(style: str, *, pool: str = "tok", pre_logits: bool = False) -> Arrays:
    """A file of noise as one of the releases stores it. All axes have lengths of their own."""
    rng = np.random.default_rng(0)
    old = style == "vision_transformer"
    arrays: Arrays = {}

    def add(name: str, *shape: int, fan_in: int = 0) -> None:
        arrays[name] = rng.normal(0, fan_in**-0.5 if fan_in else 0.3, shape).astype(np.float32)

    def norm(name: str) -> None:
        add(f"{name}/scale", DIM)
        arrays[f"{name}/scale"] += 1
        add(f"{name}/bias", DIM)

    def dense(name: str, width: int, out: int) -> None:
        add(f"{name}/kernel", width, out, fan_in=width)
        add(f"{name}/bias", out)

    def attention(name: str) -> None:
        for part in ("query", "key", "value"):
            add(f"{name}/{part}/kernel", DIM, HEADS, HEAD_DIM, fan_in=DIM)
            add(f"{name}/{part}/bias", HEADS, HEAD_DIM)
        add(f"{name}/out/kernel", HEADS, HEAD_DIM, DIM, fan_in=DIM)
        add(f"{name}/out/bias", DIM)

    add("embedding/kernel", PATCH, PATCH, 3, DIM, fan_in=3 * PATCH * PATCH)
    add("embedding/bias", DIM)
    if pool == "tok":
        add("cls", 1, 1, DIM)
    if old:
        add("Transformer/posembed_input/pos_embedding", 1, GRID * GRID + (pool == "tok"), DIM)
    else:
        add("pos_embedding", 1, GRID * GRID, DIM)
    for i in range(LAYERS):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        attention(f"{block}/MultiHeadDotProductAttention_{1 if old else 0}")
        norm(f"{block}/LayerNorm_{2 if old else 1}")
        dense(f"{block}/MlpBlock_{3 if old else 0}/Dense_0", DIM, MLP)
        dense(f"{block}/MlpBlock_{3 if old else 0}/Dense_1", MLP, DIM)
    norm("Transformer/encoder_norm")
    if pool == "map":
        add("MAPHead_0/probe", 1, 1, DIM)
        attention("MAPHead_0/MultiHeadDotProductAttention_0")
        norm("MAPHead_0/LayerNorm_0")
        dense("MAPHead_0/MlpBlock_0/Dense_0", DIM, MLP)
        dense("MAPHead_0/MlpBlock_0/Dense_1", MLP, DIM)
    if pre_logits:
        dense("pre_logits", DIM, DIM)
    dense("head", DIM, CLASSES)
    return arrays


def forward(arrays: Arrays, images: np.ndarray, pool: str = "tok") -> np.ndarray:
    """(B, H, W, 3) → logits, at 64 bits."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}/scale"] + w[f"{name}/bias"]

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def attention(name: str, queries: np.ndarray, x: np.ndarray) -> np.ndarray:
        def heads(part: str, tokens: np.ndarray) -> np.ndarray:
            return np.einsum("bnd,dhk->bnhk", tokens, w[f"{name}/{part}/kernel"]) + w[f"{name}/{part}/bias"]

        q, k, v = heads("query", queries), heads("key", x), heads("value", x)
        scores = np.exp(np.einsum("bqhk,bnhk->bhqn", q, k) / math.sqrt(HEAD_DIM))
        mixed = np.einsum("bhqn,bnhk->bqhk", scores / scores.sum(-1, keepdims=True), v)
        return np.einsum("bqhk,hkd->bqd", mixed, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]

    def mlp(name: str, x: np.ndarray) -> np.ndarray:
        x = dense(f"{name}/Dense_0", x)
        x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return dense(f"{name}/Dense_1", x)

    old = "Transformer/posembed_input/pos_embedding" in w
    batch, height, width, channels = images.shape
    patch = len(w["embedding/kernel"])
    patches = images.reshape(batch, height // patch, patch, width // patch, patch, channels).astype(np.float64)
    x = np.einsum("bipjqc,pqcd->bijd", patches, w["embedding/kernel"]).reshape(batch, -1, DIM) + w["embedding/bias"]
    if not old:
        x = x + w["pos_embedding"]
    if pool == "tok":
        x = np.concatenate([np.broadcast_to(w["cls"], (batch, 1, DIM)), x], axis=1)
    if old:
        x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(LAYERS):
        block = f"Transformer/encoderblock_{i}"
        y = norm(f"{block}/LayerNorm_0", x)
        x = x + attention(f"{block}/MultiHeadDotProductAttention_{1 if old else 0}", y, y)
        x = x + mlp(f"{block}/MlpBlock_{3 if old else 0}", norm(f"{block}/LayerNorm_{2 if old else 1}", x))
    x = norm("Transformer/encoder_norm", x)
    if pool == "map":
        probe = np.broadcast_to(w["MAPHead_0/probe"], (batch, 1, DIM))
        x = attention("MAPHead_0/MultiHeadDotProductAttention_0", probe, x)
        x = (x + mlp("MAPHead_0/MlpBlock_0", norm("MAPHead_0/LayerNorm_0", x)))[:, 0]
    else:
        x = x[:, 0] if pool == "tok" else x.mean(axis=1)
    if "pre_logits/kernel" in w:
        x = np.tanh(dense("pre_logits", x))
    return dense("head", x)


IMAGES = np.random.default_rng(1).normal(size=(2, PATCH * GRID, PATCH * GRID, 3)).astype(np.float32)


def write_npz(path: Path, arrays: Arrays) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return path


def read(path: Path) -> ViT:
    model = checkpoints.read(path).model
    assert isinstance(model, ViT)
    return model


def logits(model: nn.Module, images: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2))


FORMS: dict[str, dict[str, Any]] = {
    "original": {"style": "vision_transformer"},
    "original, pre-logits": {"style": "vision_transformer", "pre_logits": True},
    "original, gap": {"style": "vision_transformer", "pool": "gap"},
    "big_vision": {"style": "big_vision"},
    "big_vision, gap, pre-logits": {"style": "big_vision", "pool": "gap", "pre_logits": True},
    "big_vision, map": {"style": "big_vision", "pool": "map"},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits(form: str, near: Near, tmp_path: Path) -> None:
    arrays = release(**FORMS[form])
    checkpoint = checkpoints.read(write_npz(tmp_path / "weights.npz", arrays))
    expected = forward(arrays, IMAGES, FORMS[form].get("pool", "tok"))
    near(logits(checkpoint.model, IMAGES).double(), torch.from_numpy(expected))
    assert checkpoint.labels == Labels.numbered(CLASSES)
    assert checkpoint.preprocess == PreprocessConfig.jax_squash((PATCH * GRID, PATCH * GRID))


def test_logits_at_another_size(near: Near, tmp_path: Path) -> None:
    """Positions are resized as the release does it before fine-tuning, with scipy."""
    arrays = release("vision_transformer")
    model = read(write_npz(tmp_path / "weights.npz", arrays))
    images = np.random.default_rng(2).normal(size=(1, PATCH * 7, PATCH * 7, 3)).astype(np.float32)
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    table = positions[0, 1:].reshape(GRID, GRID, DIM)
    table = ndimage.zoom(table, (7 / GRID, 7 / GRID, 1), order=1).reshape(1, 49, DIM)
    resized = arrays | {"Transformer/posembed_input/pos_embedding": np.concatenate([positions[:, :1], table], axis=1)}
    near(logits(model, images).double(), torch.from_numpy(forward(resized, images)))


@pytest.mark.parametrize("prefix", npz.PREFIXES)
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    arrays = release("vision_transformer")
    plain = read(write_npz(tmp_path / "plain.npz", arrays))
    wrapped = {f"{prefix}{name}": array for name, array in arrays.items()} | {"opt/state/step": np.zeros(1, np.float32)}
    checkpoint = checkpoints.read(write_npz(tmp_path / "wrapped.npz", wrapped))
    assert torch.equal(logits(checkpoint.model, IMAGES), logits(plain, IMAGES))
    assert (checkpoint.labels is None) == ("img" in prefix)


def test_layers_stacked_for_scan(tmp_path: Path) -> None:
    arrays = release("big_vision")
    block = "Transformer/encoderblock"
    stacked = {name: array for name, array in arrays.items() if not name.startswith(block)}
    for name in [name for name in arrays if name.startswith(f"{block}_0/")]:
        layers = [arrays[name.replace("block_0", f"block_{i}")] for i in range(LAYERS)]
        stacked[name.replace("block_0", "block")] = np.stack(layers)
    model, again = (read(write_npz(tmp_path / f"{i}.npz", a)) for i, a in enumerate((arrays, stacked)))
    assert torch.equal(logits(model, IMAGES), logits(again, IMAGES))


def test_bfloat16(tmp_path: Path) -> None:
    arrays = release("vision_transformer")
    halved = {name: (array.view(np.uint32) >> 16).astype(np.uint16).view("V2") for name, array in arrays.items()}
    model = read(write_npz(tmp_path / "weights.npz", halved))
    kernel = (arrays["embedding/kernel"].view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert torch.equal(model.patch_embed.weight, torch.from_numpy(kernel).permute(3, 2, 0, 1))
    assert model.patch_embed.weight.dtype == torch.float32


def test_positions_of_big_vision_before_2022(near: Near, tmp_path: Path) -> None:
    arrays = release("vision_transformer")
    moved = {name.replace("posembed_input/", ""): array for name, array in arrays.items()}
    model = read(write_npz(tmp_path / "weights.npz", moved))
    near(logits(model, IMAGES).double(), torch.from_numpy(forward(arrays, IMAGES)))


def test_fixed_positions_are_not_stored(near: Near, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = release("big_vision", pool="gap")
    del arrays["pos_embedding"]
    model = read(write_npz(tmp_path / "weights.npz", arrays))
    assert model.config.image_size == (220, 220) and "sine-cosine table" in caplog.text
    images = np.random.default_rng(2).normal(size=(1, 220, 220, 3)).astype(np.float32)
    y, x = np.divmod(np.arange(44 * 44), 44)
    omega = 10_000.0 ** -(np.arange(DIM // 4) / (DIM // 4 - 1))
    table = np.concatenate([f(a[:, None] * omega) for a in (x, y) for f in (np.sin, np.cos)], axis=1)
    near(
        logits(model, images).double(),
        torch.from_numpy(forward(arrays | {"pos_embedding": table[None]}, images, "gap")),
    )


def test_head_of_zeros_is_no_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = release("vision_transformer", pre_logits=True)
    arrays["head/kernel"][:] = 0
    checkpoint = checkpoints.read(write_npz(tmp_path / "weights.npz", arrays))
    assert checkpoint.labels is None and "all zeros" in caplog.text
    assert logits(checkpoint.model, IMAGES).shape == (2, DIM)


@pytest.mark.parametrize("classes, labels", [(1000, Labels.imagenet_1k()), (21_843, Labels.imagenet_21k())])
def test_labels_of_the_two_imagenets(classes: int, labels: Labels, tmp_path: Path) -> None:
    arrays = release("vision_transformer")
    arrays |= {"head/kernel": np.ones((DIM, classes), np.float32), "head/bias": np.ones(classes, np.float32)}
    assert checkpoints.read(write_npz(tmp_path / "weights.npz", arrays)).labels == labels


@pytest.mark.parametrize("form", sorted(FORMS))
def test_written_file_holds_the_same_arrays(form: str, tmp_path: Path) -> None:
    arrays = release(**FORMS[form])
    model = read(write_npz(tmp_path / "read.npz", arrays))
    npz.write(tmp_path / "written.npz", model)
    if form in ("big_vision", "big_vision, gap, pre-logits"):  # written under the older names
        assert torch.equal(logits(read(tmp_path / "written.npz"), IMAGES), logits(model, IMAGES))
        return
    with np.load(tmp_path / "written.npz") as written:
        assert set(written) == set(arrays)
        for name, array in arrays.items():
            assert np.array_equal(written[name], array), name


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"activation": "gelu"}, 'activation "gelu"'),
        ({"norm_eps": 1e-5}, "norm_eps 1e-05"),
        ({"pool": "mean"}, 'pool "mean" with a class token'),
        ({"image_size": (24, 32)}, "always square"),
        ({"num_registers": 4}, "no place for registers"),
        ({"gated_mlp": True}, "a gated MLP"),
        ({"qkv_bias": False}, "queries, keys and values without bias"),
        ({"norm_after_pool": True, "activation": "gelu"}, "a norm after the pooling, nor with activation"),
        ({"stem": (), "patch_size": 1, "stem_maths": "timm"}, "a stem with timm's constants"),
        ({"stem": (), "patch_size": 1, "num_classes": 0, "layer_scale": True}, "no place for layers.0.attn_scale"),
    ],
)
def test_what_the_release_has_not_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "image_size": (24, 24),
        "patch_size": 8,
        "embed_dim": 8,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_dim": 9,
    }
    model = ViT(ViTConfig(**settings | {"activation": "gelu_tanh"} | changes))
    if model.head is not None:
        nn.init.ones_(model.head.weight)
    with pytest.raises(CheckpointError, match=f"{reason}.*Formats that can hold this model: opsin"):
        checkpoints.write_as("npz", tmp_path / "weights.npz", model, None, None)
    assert not list(tmp_path.iterdir())


def test_a_head_of_zeros_is_not_written(tmp_path: Path) -> None:
    """It would be none to whoever reads it."""
    model = ViT(ViTConfig(image_size=(24, 24), patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=9,
                          activation="gelu_tanh"))  # fmt: skip
    with pytest.raises(CheckpointError, match="a head of zeros"):
        checkpoints.write_as("npz", tmp_path / "weights.npz", model, None, None)


def test_what_the_file_does_not_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = read(write_npz(tmp_path / "read.npz", release("vision_transformer")))
    own = ViT(replace(model.config, pos_resize="bicubic"))
    own.load_state_dict(model.state_dict())
    preprocess, labels = PreprocessConfig(size=(15, 15)), Labels(tuple("abcdefg"))
    checkpoints.write_as("npz", tmp_path / "written.npz", own, preprocess, labels)
    assert "written.npz names no classes: a reader will call them LABEL_0, …, not a, …" in caplog.text
    assert "written.npz says nothing of preprocessing: a reader will take PreprocessConfig(" in caplog.text
    assert "written.npz will resize positions by bilinear_corners, not bicubic as here" in caplog.text


STAGES = (1, 2)


def hybrid() -> Arrays:
    """The noise of `release` behind that of a ResNet stem, whose feature map has 512 channels and 8-pixel places."""
    rng = np.random.default_rng(1)
    arrays = release("vision_transformer")

    def conv(name: str, side: int, width: int, out: int) -> None:
        arrays[f"{name}/kernel"] = rng.normal(0.1, 1, (side, side, width, out)).astype(np.float32)

    def norm(name: str, width: int, shape: tuple[int, ...] = ()) -> None:
        arrays[f"{name}/scale"] = rng.normal(1, 0.3, (*shape, width)).astype(np.float32)
        arrays[f"{name}/bias"] = rng.normal(0, 0.3, (*shape, width)).astype(np.float32)

    conv("conv_root", 7, 3, 64)
    norm("gn_root", 64, (1, 1, 1))  # as some files have it
    width = 64
    for stage, units in enumerate(STAGES):
        inner = 64 * 2**stage
        for unit in range(units):
            name = f"block{stage + 1}/unit{unit + 1}"
            for i, (side, before, after) in enumerate(((1, width, inner), (3, inner, inner), (1, inner, 4 * inner))):
                conv(f"{name}/conv{i + 1}", side, before, after)
                norm(f"{name}/gn{i + 1}", after)
            if unit == 0:
                conv(f"{name}/conv_proj", 1, width, 4 * inner)
                norm(f"{name}/gn_proj", 4 * inner)
            width = 4 * inner
    arrays["embedding/kernel"] = rng.normal(0, width**-0.5, (1, 1, width, DIM)).astype(np.float32)
    return arrays


def stem(arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """(B, H, W, 3) → feature map (B, H / 8, W / 8, 512), at 64 bits; after `models_resnet.py`."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def windows(x: np.ndarray, side: int, stride: int, fill: float) -> np.ndarray:
        pads = []
        for length in x.shape[1:3]:
            total = max((math.ceil(length / stride) - 1) * stride + side - length, 0)
            pads.append((total // 2, total - total // 2))
        x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill)
        return np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))[:, ::stride, ::stride]

    def conv(name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        kernel = w[f"{name}/kernel"]
        kernel = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
        return np.einsum("bhwcpq,pqcd->bhwd", windows(x, len(kernel), stride, 0.0), kernel)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        groups = x.reshape(*x.shape[:3], 32, -1)
        axes = (1, 2, 4)
        groups = (groups - groups.mean(axes, keepdims=True)) / np.sqrt(groups.var(axes, keepdims=True) + 1e-6)
        return groups.reshape(x.shape) * w[f"{name}/scale"].ravel() + w[f"{name}/bias"].ravel()

    x = np.maximum(norm("gn_root", conv("conv_root", images.astype(np.float64), 2)), 0)
    x = windows(x, 3, 2, -np.inf).max((-2, -1))
    for stage, units in enumerate(STAGES):
        for unit in range(units):
            name, stride = f"block{stage + 1}/unit{unit + 1}", 2 if stage and not unit else 1
            y = np.maximum(norm(f"{name}/gn1", conv(f"{name}/conv1", x)), 0)
            y = np.maximum(norm(f"{name}/gn2", conv(f"{name}/conv2", y, stride)), 0)
            y = norm(f"{name}/gn3", conv(f"{name}/conv3", y))
            if unit == 0:
                x = norm(f"{name}/gn_proj", conv(f"{name}/conv_proj", x, stride))
            x = np.maximum(x + y, 0)
    return x


def test_hybrid(near: Near, tmp_path: Path) -> None:
    arrays = hybrid()
    np.savez(tmp_path / "R_Ti.npz", **arrays)  # type: ignore[arg-type]
    checkpoint = checkpoints.read(tmp_path / "R_Ti.npz")
    assert checkpoint.preprocess and checkpoint.preprocess.image_size == (8 * GRID, 8 * GRID)
    images = np.random.default_rng(2).uniform(-1, 1, (2, 8 * GRID, 8 * GRID, 3)).astype(np.float32)
    expected = forward(arrays, stem(arrays, images))
    with torch.no_grad():
        near(checkpoint.model(torch.from_numpy(images).permute(0, 3, 1, 2)), torch.from_numpy(expected).float())
    npz.write(tmp_path / "again.npz", checkpoint.model)
    with np.load(tmp_path / "again.npz") as again:
        assert set(again) == set(arrays)
        assert all(np.array_equal(again[name].ravel(), arrays[name].ravel()) for name in arrays)
