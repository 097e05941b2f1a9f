"""Google's files, written: a ViT in flax.linen, an independent account of Dosovitskiy et al. 2021, takes them.

Every name in the parameters is one that flax gives, or that the release gives in its place. The releases before Linen
numbered all modules of a layer together ("MlpBlock_3"); flax brings the function that renames them, as the release uses
it. Nothing here is opsin's but the file.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from opsin import checkpoints
from opsin.labels import Labels
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of flax's own imports
    import flax.linen as linen
    import jax
    import jax.numpy as jnp
    from flax.training.checkpoints import convert_pre_linen
    from flax.traverse_util import flatten_dict, unflatten_dict

Noise = Callable[[nn.Module], None]
Near = Callable[[Tensor, Tensor], None]

PATCH, DIM, HEADS, MLP, LAYERS, CLASSES, GRID = 5, 44, 4, 29, 2, 7, 3


# ── the model, in flax ───────────────────────────────────────────────────────────────────────────────────────────────


class MlpBlock(linen.Module):
    hidden: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        hidden = linen.gelu(linen.Dense(self.hidden)(x))
        return linen.Dense(x.shape[-1])(hidden)


class Layer(linen.Module):
    heads: int
    hidden: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        normed = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(self.heads)(normed, normed)
        return x + MlpBlock(self.hidden)(linen.LayerNorm()(x))


class Positions(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return x + self.param("pos_embedding", linen.initializers.zeros, (1, *x.shape[1:]))


class Transformer(linen.Module):
    layers: int
    heads: int
    hidden: int
    positions: bool

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = Positions(name="posembed_input")(x) if self.positions else x
        for i in range(self.layers):
            x = Layer(self.heads, self.hidden, name=f"encoderblock_{i}")(x)
        return linen.LayerNorm(name="encoder_norm")(x)


class MAPHead(linen.Module):
    heads: int
    hidden: int

    @linen.compact
    def __call__(self, x: Any) -> Any:
        probe = self.param("probe", linen.initializers.zeros, (1, 1, x.shape[-1]))
        x = linen.MultiHeadDotProductAttention(self.heads)(jnp.tile(probe, (len(x), 1, 1)), x)
        return (x + MlpBlock(self.hidden)(linen.LayerNorm()(x)))[:, 0]


class Network(linen.Module):
    """(B, H, W, 3) → logits: vision_transformer, and with pool "map" big_vision."""

    pool: str
    pre_logits: bool = False

    @linen.compact
    def __call__(self, images: Any) -> Any:
        x = linen.Conv(DIM, (PATCH, PATCH), strides=(PATCH, PATCH), padding="VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, DIM)
        if self.pool == "map":  # positions of its own, before the transformer
            x = x + self.param("pos_embedding", linen.initializers.zeros, (1, *x.shape[1:]))
        if self.pool == "token":
            token = self.param("cls", linen.initializers.zeros, (1, 1, DIM))
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = Transformer(LAYERS, HEADS, MLP, positions=self.pool != "map", name="Transformer")(x)
        if self.pool == "map":
            x = MAPHead(HEADS, MLP)(x)
        elif self.pool == "token":
            x = x[:, 0]
        else:
            x = x.mean(axis=1)
        if self.pre_logits:
            x = jnp.tanh(linen.Dense(DIM, name="pre_logits")(x))
        return linen.Dense(CLASSES, name="head")(x)


# ── the file, from opsin ─────────────────────────────────────────────────────────────────────────────────────────────


def build(noise: Noise, pool: str, pre_logits: bool = False) -> ViT:
    config = ViTConfig(
        image_size=(PATCH * GRID, PATCH * GRID),
        patch_size=PATCH,
        embed_dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        mlp_dim=MLP,
        num_classes=CLASSES,
        activation="gelu_tanh",
        pos_resize="bilinear_corners",
        class_token=pool == "token",
        pool=pool,  # type: ignore[arg-type]
        pre_logits=pre_logits,
    )
    model = ViT(config)
    noise(model)
    return model.eval()


def write(path: Path, model: ViT) -> dict[str, Any]:
    """Write the file; its arrays as the tree that flax calls parameters."""
    preprocess = PreprocessConfig.jax_squash(model.config.image_size)
    assert checkpoints.write_as("npz", path, model, preprocess, Labels.numbered(CLASSES)) == [path]
    with np.load(path) as arrays:
        return convert_pre_linen(unflatten_dict({tuple(name.split("/")): arrays[name] for name in arrays}))


def images(grid: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, PATCH * grid, PATCH * grid, 3)).astype(np.float32)


def ours(model: ViT, pixels: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def theirs(network: Network, params: dict[str, Any], pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(jax.jit(network.apply)({"params": params}, pixels)))


FORMS: dict[str, dict[str, Any]] = {
    "class token": {"pool": "token"},
    "class token, pre-logits": {"pool": "token", "pre_logits": True},
    "mean": {"pool": "mean"},
    "big_vision, attention pooling": {"pool": "map"},
}


@pytest.mark.parametrize("form", FORMS)
def test_logits(form: str, noise: Noise, near: Near, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flax finds each parameter that it would make, in the shape that it would make it, and no other."""
    model, network = build(noise, **FORMS[form]), Network(**FORMS[form])
    params = write(tmp_path / "weights.npz", model)
    made = jax.eval_shape(network.init, jax.random.PRNGKey(0), images(GRID))["params"]
    shapes = {name: leaf.shape for name, leaf in flatten_dict(made).items()}
    assert {name: leaf.shape for name, leaf in flatten_dict(params).items()} == shapes
    near(ours(model, images(GRID)), theirs(network, params, images(GRID)))
    again = checkpoints.read(tmp_path / "weights.npz")
    assert again.model.config == model.config
    assert all(torch.equal(again.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not caplog.text


@pytest.mark.parametrize("grid", [2, 7])
def test_logits_on_another_grid(grid: int, noise: Noise, near: Near, tmp_path: Path) -> None:
    """As the release before it fine-tunes at 384 pixels: positions without the class token's, zoomed by scipy."""
    model = build(noise, "token")
    params = write(tmp_path / "weights.npz", model)
    positions = params["Transformer"]["posembed_input"]["pos_embedding"]
    table = positions[0, 1:].reshape(GRID, GRID, DIM)
    table = ndimage.zoom(table, (grid / GRID, grid / GRID, 1), order=1).reshape(1, grid * grid, DIM)
    params["Transformer"]["posembed_input"]["pos_embedding"] = np.concatenate([positions[:, :1], table], axis=1)
    near(ours(model, images(grid)), theirs(Network("token"), params, images(grid)))


def test_names_of_the_release(noise: Noise, tmp_path: Path) -> None:
    """In the file they are those of 2020, from before Linen, as vision_transformer reads and renames them."""
    write(tmp_path / "weights.npz", build(noise, "token"))
    block = "Transformer/encoderblock_1"
    with np.load(tmp_path / "weights.npz") as arrays:
        assert arrays[f"{block}/MultiHeadDotProductAttention_1/query/kernel"].shape == (DIM, HEADS, DIM // HEADS)
        assert arrays[f"{block}/MultiHeadDotProductAttention_1/out/kernel"].shape == (HEADS, DIM // HEADS, DIM)
        assert arrays[f"{block}/MlpBlock_3/Dense_0/kernel"].shape == (DIM, MLP)
        assert {name.split("/")[2] for name in arrays if name.startswith(block)} == {
            "LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3",
        }  # fmt: skip
        assert sum(math.prod(arrays[name].shape) for name in arrays) == 25_673
        assert {arrays[name].dtype for name in arrays} == {np.dtype("float32")}
