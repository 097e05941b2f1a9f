"""DeepMind's files: Haiku networks with the module structure, and so the names, of the release; read, and written.

The networks below are an independent account of Jaegle et al. 2021 in JAX. Each is made with tiny sizes, all different,
filled with noise, pickled as Haiku gives it, and read; and given what opsin writes. Both sides then see equal inputs.
"""

import dataclasses
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

from opsin import checkpoints
from opsin.checkpoints import haiku as reader
from opsin.checkpoints import pickles, rules
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.perceiver_io import (
    FlowPerceiverConfig,
    ImagePerceiverConfig,
    MultimodalPerceiverConfig,
    PerceiverConfig,
    TextPerceiverConfig,
)
from opsin.models.position import FourierPositions
from opsin.preprocess import PreprocessConfig

# ── the original, in Haiku ───────────────────────────────────────────────────────────────────────────────────────────


def norm(x: Any) -> Any:
    return hk.LayerNorm(-1, True, True)(x)


def fourier(positions: np.ndarray, num_bands: int, resolution: tuple[int, ...]) -> np.ndarray:
    """(N, d) → (N, d + 2·d·K), in float64."""
    waves = [
        np.pi * positions[:, axis] * frequency
        for axis, side in enumerate(resolution)
        for frequency in np.linspace(1, side / 2, num_bands)
    ]
    return np.concatenate([positions, np.sin(waves).T, np.cos(waves).T], axis=1)


def grid(sides: tuple[int, ...]) -> np.ndarray:
    """(N, d) in [-1, 1], both ends included, the last axis fastest."""
    axes = [np.linspace(-1, 1, side) for side in sides]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(sides))


def beside(content: Any, positions: Any) -> Any:
    positions = jnp.asarray(positions, jnp.float32)
    return jnp.concatenate([content, jnp.broadcast_to(positions, (content.shape[0], *positions.shape))], axis=-1)


class TrainablePositionEncoding(hk.Module):
    def __init__(self, length: int, dim: int, name: str | None = None) -> None:
        super().__init__(name)
        self.shape = (length, dim)

    def __call__(self) -> Any:
        return hk.get_parameter("pos_embs", self.shape, init=jnp.zeros)


class Attention(hk.Module):
    def __call__(self, queries: Any, tokens: Any, heads: int, qk: int, v: int, out: int, mask: Any) -> Any:
        (b, m, _), n = queries.shape, tokens.shape[1]
        q = hk.Linear(qk)(queries).reshape(b, m, heads, -1).transpose(0, 2, 1, 3)
        k = hk.Linear(qk)(tokens).reshape(b, n, heads, -1).transpose(0, 2, 3, 1)
        values = hk.Linear(v)(tokens).reshape(b, n, heads, -1).transpose(0, 2, 1, 3)
        logits = q @ k / np.sqrt(qk // heads)
        if mask is None:
            read = jax.nn.softmax(logits) @ values
        else:  # (B, M, N); what may read nothing reads zeros
            read = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30)) @ values
            read = jnp.where(mask.any(axis=2)[:, None, :, None], read, 0.0)
        return hk.Linear(out)(read.transpose(0, 2, 1, 3).reshape(b, m, v))


class MLP(hk.Module):
    def __call__(self, x: Any, hidden: int) -> Any:
        widened = jax.nn.gelu(hk.Linear(hidden)(x), approximate=True)  # a line of its own: Haiku numbers as it makes
        return hk.Linear(x.shape[-1])(widened)


class SelfAttention(hk.Module):
    def __call__(self, x: Any, heads: int, qk: int | None, v: int | None, ratio: int) -> Any:
        y, dim = norm(x), x.shape[-1]
        x = x + Attention()(y, y, heads, qk or dim, v or qk or dim, dim, None)
        return x + MLP()(norm(x), ratio * dim)


class CrossAttention(hk.Module):
    def __call__(
        self,
        queries: Any,
        tokens: Any,
        heads: int,
        qk: int | None,
        v: int | None,
        ratio: int,
        residual: bool,
        mask: Any,
    ) -> Any:
        dim, qk = queries.shape[-1], qk or tokens.shape[-1]
        x = Attention()(norm(queries), norm(tokens), heads, qk, v or qk, dim, mask)
        x = queries + x if residual else x
        return x + MLP()(norm(x), ratio * dim)


class Encoder(hk.Module):
    def __init__(self, config: PerceiverConfig, name: str = "perceiver_encoder") -> None:
        super().__init__(name)
        self.config = config
        self.latents = TrainablePositionEncoding(config.num_latents, config.latent_dim)
        self.cross = CrossAttention()
        self.layers = [SelfAttention() for _ in range(config.layers_per_block)]

    def __call__(self, tokens: Any, mask: Any = None) -> Any:
        c = self.config
        latents = jnp.broadcast_to(self.latents(), (tokens.shape[0], c.num_latents, c.latent_dim))
        if mask is not None:
            mask = jnp.broadcast_to(mask[:, None, :], (len(tokens), c.num_latents, tokens.shape[1]))
        ratio = c.cross_mlp_ratio or c.mlp_ratio
        latents = self.cross(latents, tokens, c.num_cross_heads, c.qk_dim, c.v_dim, ratio, c.query_residual, mask)
        for _ in range(c.num_blocks):
            for layer in self.layers:
                latents = layer(latents, c.num_heads, c.qk_dim, c.v_dim, c.mlp_ratio)
        return latents


class BasicDecoder(hk.Module):
    def __init__(self, queries: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.positions = queries and TrainablePositionEncoding(*queries)

    def queries(self, batch: int) -> Any:
        assert self.positions
        return jnp.broadcast_to(self.positions(), (batch, *self.positions.shape))

    def __call__(self, queries: Any, latents: Any, out: int | None, residual: bool = False, mask: Any = None,
                 heads: int = 1, qk: int | None = None, v: int | None = None) -> Any:  # fmt: skip
        x = CrossAttention()(queries, latents, heads, qk, v, 1, residual, mask)
        return x if out is None else hk.Linear(out, name="output")(x)


class Conv2DDownsample(hk.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = hk.Conv2D(channels, 7, stride=2, with_bias=False, padding="SAME", name="conv")
        self.norm = hk.BatchNorm(True, True, 0.9, name="batchnorm")

    def __call__(self, x: Any) -> Any:
        x = jax.nn.relu(self.norm(self.conv(x), is_training=hk.running_init()))
        return hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")


class PositionEncodingProjector(hk.Module):
    def __call__(self, positions: Any, out: int) -> Any:
        return hk.Linear(out)(positions)


class ImagePreprocessor(hk.Module):
    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        if kind == "conv":
            self.net = Conv2DDownsample(config.embed_dim)
        elif kind == "conv1x1":
            self.net = hk.Conv2D(config.embed_dim, 1)

    def _build_network_inputs(self, x: Any) -> Any:
        c, (b, *sides, _) = self.config, x.shape
        if self.kind == "conv1x1":
            table = TrainablePositionEncoding(int(np.prod(sides)), c.embed_dim)()
            positions = PositionEncodingProjector()(table, c.embed_dim)
        else:
            positions = fourier(grid(tuple(sides)), c.num_bands, getattr(c, "max_resolution", c.image_size))
        return beside(x.reshape(b, -1, x.shape[-1]), positions)

    def __call__(self, x: Any) -> Any:
        if self.kind in ("conv", "conv1x1"):
            x = self.net(x)
        elif self.kind == "patches":
            x = hk.Linear(self.config.embed_dim, name="patches_linear")(x)
        return self._build_network_inputs(x)


class ClassificationDecoder(hk.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.decoder = BasicDecoder((1, dim))

    def __call__(self, latents: Any, classes: int, residual: bool) -> Any:
        return self.decoder(self.decoder.queries(len(latents)), latents, classes, residual)[:, 0]


def image_network(c: ImagePerceiverConfig, pixels: Any) -> Any:
    tokens = ImagePreprocessor(c, c.front_end)(pixels.transpose(0, 2, 3, 1))
    encoder, decoder = Encoder(c), ClassificationDecoder(c.latent_dim)
    return decoder(encoder(tokens), c.num_classes, c.decoder_residual)


class EmbeddingDecoder(hk.Module):
    def __call__(self, x: Any, table: Any) -> Any:
        return x @ table.T + hk.get_parameter("bias", table.shape[:1], init=jnp.zeros)


def text_network(c: TextPerceiverConfig, ids: Any, mask: Any) -> Any:
    embed = hk.Embed(c.vocab_size, c.embed_dim)
    tokens = embed(ids) + TrainablePositionEncoding(c.max_length, c.embed_dim)()[: ids.shape[1]]
    encoder, decoder = Encoder(c), BasicDecoder((c.max_length, c.embed_dim))
    query_mask = jnp.broadcast_to(mask[:, :, None], (*mask.shape, c.num_latents))
    queries = decoder.queries(len(ids))[:, : ids.shape[1]]
    x = decoder(queries, encoder(tokens, mask), None, False, query_mask, c.num_cross_heads, c.qk_dim, c.embed_dim)
    return EmbeddingDecoder()(x, embed.embeddings)


class FlowDecoder(hk.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = BasicDecoder()

    def __call__(self, queries: Any, latents: Any) -> Any:
        return self.decoder(queries, latents, 2) / 100


def flow_network(c: FlowPerceiverConfig, frames: Any) -> Any:
    b, _, _, height, width = frames.shape
    padded = jnp.pad(frames.transpose(0, 1, 3, 4, 2), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [
        padded[:, frame, y : y + height, x : x + width] for frame in range(2) for y in range(3) for x in range(3)
    ]
    tokens = ImagePreprocessor(c, "patches")(jnp.concatenate(patches, axis=-1))
    encoder, decoder = Encoder(c), FlowDecoder()
    return decoder(tokens, encoder(tokens)).reshape(b, height, width, 2)


class MultimodalPreprocessor(hk.Module):
    def __call__(self, parts: dict[str, Any]) -> Any:
        width, padded = max(part.shape[2] for part in parts.values()) + 4, []
        for name, part in parts.items():
            padding = TrainablePositionEncoding(1, width - part.shape[2], f"{name}_padding")()
            x = beside(part, jnp.broadcast_to(padding, (part.shape[1], padding.shape[1])))
            token = TrainablePositionEncoding(1, width, f"{name}_mask_token")()
            padded.append(jnp.broadcast_to(token, x.shape) if name == "label" else x)  # hidden with probability 1
        return jnp.concatenate(padded, axis=1)


class MultimodalDecoder(hk.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = BasicDecoder()

    def decoder_query(self, parts: dict[str, Any]) -> Any:
        width, padded = max(part.shape[1] for part in parts.values()) + 2, []
        for name, part in parts.items():
            padding = TrainablePositionEncoding(1, width - part.shape[1], f"{name}_padding")()
            padding = jnp.broadcast_to(padding, (len(part), padding.shape[1]))
            padded.append(jnp.concatenate([jnp.asarray(part, jnp.float32), padding], axis=1))
        return jnp.concatenate(padded)

    def __call__(self, queries: Any, latents: Any, out: int) -> Any:
        return self.decoder(jnp.broadcast_to(queries, (len(latents), *queries.shape)), latents, out)


class Postprocessor(hk.Module):
    def __call__(self, x: Any, out: int) -> Any:
        return hk.Linear(out)(x)


class LabelDecoder(hk.Module):
    def __init__(self, dim: int) -> None:
        super().__init__(name="classification_decoder")
        self.decoder = BasicDecoder((1, dim))


def multimodal_network(c: MultimodalPerceiverConfig, video: Any, audio: Any, points: Any, places: Any) -> Any:
    b, p, (t, height, width), samples = len(video), c.patch_size, c.patch_grid, c.samples_per_patch
    patches = video.reshape(b, t, 3, height, p, width, p).transpose(0, 1, 3, 5, 4, 6, 2).reshape(b, -1, p * p * 3)
    stretches = audio.reshape(b, -1, samples)
    tokens = MultimodalPreprocessor()(
        {
            "audio": beside(stretches, fourier(grid(stretches.shape[1:2]), c.audio_bands, (c.num_samples,))),
            "image": beside(patches, fourier(grid(c.patch_grid), c.image_bands, c.patch_grid)),
            "label": jnp.zeros((b, 1, c.num_classes)),
        }
    )
    encoder, decoder, label = Encoder(c, "encoder"), MultimodalDecoder(), LabelDecoder(c.label_dim)
    sides = (t, *c.image_size)
    pixels = np.stack([-1 + 2 * i / side for i, side in zip(np.unravel_index(points, sides), sides, strict=True)], 1)
    queries = decoder.decoder_query(
        {
            "audio": fourier((-1 + 2 * places / stretches.shape[1])[:, None], c.audio_bands, (c.num_samples,)),
            "image": fourier(pixels, c.image_bands, c.patch_grid),
            "label": label.decoder.queries(1)[0],
        }
    )
    x = decoder(queries, encoder(tokens), c.output_dim)
    sound, picture = Postprocessor("audio_postprocessor"), Postprocessor("projection_postprocessor")
    return {
        "audio": sound(x[:, : len(places)], samples).reshape(b, -1),
        "image": picture(x[:, len(places) : -1], 3),
        "label": Postprocessor("classification_postprocessor")(x[:, -1], c.num_classes),
    }


# ── tiny copies, with the heads and blocks of the published ones ─────────────────────────────────────────────────────

SMALL: dict[str, Any] = {"num_latents": 11, "latent_dim": 24, "layers_per_block": 2}
IMAGES: dict[str, Any] = {**SMALL, "num_classes": 13}
CONFIGS: dict[str, Any] = {
    "conv": ImagePerceiverConfig(**IMAGES, embed_dim=5, num_bands=3, image_size=(37, 26), max_resolution=(10, 7)),
    "fourier": ImagePerceiverConfig(
        **IMAGES, front_end="pixels", num_bands=3, image_size=(7, 5), max_resolution=(9, 4)
    ),
    "learned": ImagePerceiverConfig(
        **IMAGES, front_end="conv1x1", embed_dim=10, image_size=(7, 7), decoder_residual=False
    ),
    "language": TextPerceiverConfig(**SMALL, qk_dim=16, v_dim=32, vocab_size=29, max_length=17, embed_dim=40),
    "flow": FlowPerceiverConfig(**{**SMALL, "latent_dim": 48}, image_size=(7, 5), embed_dim=6, num_bands=3),
    "multimodal": MultimodalPerceiverConfig(
        **SMALL,
        num_frames=3,
        image_size=(10, 6),
        patch_size=2,
        image_bands=2,
        samples_per_frame=20,
        samples_per_patch=5,
        audio_bands=7,
        num_classes=19,
        label_dim=26,
        output_dim=9,
    ),
}
NETWORKS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("conv", "fourier", "learned"), image_network),
    "language": text_network,
    "flow": flow_network,
    "multimodal": multimodal_network,
}


def inputs(network: str) -> dict[str, np.ndarray]:
    c, rng = CONFIGS[network], np.random.default_rng(5)
    if network == "language":
        mask = np.arange(13) < np.array([[13], [6], [0]])  # whole, padded, nothing but padding
        return {"ids": rng.integers(0, c.vocab_size, (3, 13)), "mask": mask}
    if network == "flow":
        return {"frames": rng.normal(size=(2, 2, 3, *c.image_size)).astype("f4")}
    if network == "multimodal":
        return {
            "video": rng.random((2, c.num_frames, 3, *c.image_size), "f4"),
            "audio": rng.normal(size=(2, c.num_samples)).astype("f4"),
            "points": np.array([3, 100, 179, 0, 61]),
            "places": np.array([11, 2, 7]),
        }
    return {"pixels": rng.normal(size=(2, 3, *c.image_size)).astype("f4")}


def noisy(tree: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every tensor, as JAX arrays: scales around one, variances above zero, small weights."""
    rng = np.random.default_rng(7)

    def fill(name: str, value: Any) -> Any:
        noise = rng.normal(size=value.shape)
        if name == "counter":
            noise = np.array(23)
        elif name == "w":
            noise = noise / np.sqrt(np.prod(value.shape[:-1]))
        elif name in ("scale", "average", "hidden"):
            noise = np.abs(1 + 0.3 * noise)
        elif name in ("b", "offset", "bias"):
            noise = 0.3 * noise
        return jnp.asarray(noise, value.dtype)

    return {module: {name: fill(name, value) for name, value in leaves.items()} for module, leaves in tree.items()}


@cache
def transformed(network: str) -> tuple[Callable[..., Any], Callable[..., Any], dict[str, np.ndarray]]:
    """The network as two pure functions, `init` and `apply`, the latter compiled; and what it is given."""
    given = inputs(network)
    # points are counted with NumPy, so they are no part of what JAX traces
    fixed = {name: given.pop(name) for name in ("points", "places") if name in given}
    model = hk.transform_with_state(lambda **x: NETWORKS[network](CONFIGS[network], **x, **fixed))
    return model.init, jax.jit(model.apply), given


@pytest.fixture(scope="module", params=CONFIGS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Network, the pickle of its parameters, its outputs."""
    network = request.param
    init, apply, given = transformed(network)
    params, state = jax.eval_shape(init, jax.random.PRNGKey(0), **given)
    params, state = noisy(params), noisy(state)
    path = tmp_path_factory.mktemp(network) / f"{network}.pystate"
    # the three image files hold both, the others the parameters alone; Haiku gave them as immutable mappings
    content = {"params": params, "state": state} if network in ("conv", "fourier", "learned") else params
    path.write_bytes(pickle.dumps(hk.data_structures.to_immutable_dict(content)))
    outputs, _ = apply(params, state, None, **given)
    return network, path, outputs


def test_same_outputs(original: tuple[str, Path, Any], near: Callable[[Tensor, Tensor], None]) -> None:
    network, path, outputs = original
    config = CONFIGS[network]
    read = checkpoints.read(path, config=config)
    assert read.source.format == "haiku" and read.model.config == config and not read.model.training
    compare(near, network, read.model, outputs)


def compare(near: Callable[[Tensor, Tensor], None], network: str, model: Any, outputs: Any) -> None:
    given = {name: torch.from_numpy(value) for name, value in inputs(network).items()}
    with torch.inference_mode():
        if network == "multimodal":
            latents = model.encode(given["video"], given["audio"])
            found = model.decode(latents, image_points=given["points"], audio_points=given["places"])
        else:
            found = {"": model(**given) if network == "language" else model(*given.values())}
            outputs = {"": outputs * 100 if network == "flow" else outputs}
            found = {"": found[""] * 100} if network == "flow" else found
    assert found.keys() == outputs.keys()
    for name, values in found.items():
        near(values, torch.from_numpy(np.array(outputs[name])))


def test_nothing_but_heads_blocks_and_positions_must_be_said(original: tuple[str, Path, Any]) -> None:
    """The rest of the config is read from the tensors; what is not is what DeepMind published."""
    network, path, _ = original
    untold: dict[str, dict[str, Any]] = {
        "conv": {"image_size": (224, 224), "max_resolution": (56, 56)},
        "fourier": {"image_size": (224, 224), "max_resolution": (224, 224)},
        "learned": {},
        "language": {},
        "flow": {"image_size": (368, 496)},
        "multimodal": {"image_size": (224, 224), "num_frames": 16, "samples_per_frame": 1920},
    }
    published = checkpoints.read(path)
    assert published.model.config == dataclasses.replace(CONFIGS[network], **untold[network])
    assert (published.preprocess is not None) == (network in ("conv", "fourier", "learned"))
    expected = {"multimodal": 19, "language": None, "flow": None}.get(network, 13)
    assert (None if published.labels is None else len(published.labels)) == expected


def test_table_is_invertible(original: tuple[str, Path, Any]) -> None:
    """All that a model needs comes back; the running averages before their correction, and a second count, do not."""
    network, path, _ = original
    config, foreign = CONFIGS[network], pickles.read_tensors(path)
    native, report = rules.convert(foreign, reader.rules(config), config)
    assert not report
    back = rules.invert(native, reader.rules(config), config)
    dropped = {f"{BATCH_NORM}/{name}" for name in ("mean_ema/hidden", "var_ema/hidden", "var_ema/counter")}
    assert foreign.keys() - back.keys() == (dropped if network == "conv" else set())
    for name, tensor in back.items():
        assert tensor.dtype == foreign[name].dtype and torch.equal(tensor, foreign[name]), name


BATCH_NORM = "image_preprocessor/~/conv2_d_downsample/~/batchnorm/~"


@pytest.mark.parametrize(
    ("sides", "num_bands", "resolution"),
    [((56, 56), 64, (56, 56)), ((17, 23), 64, (368, 496)), ((16, 7, 5), 32, (16, 56, 56)), ((1920,), 192, (30720,))],
)
def test_fourier_tables(sides: tuple[int, ...], num_bands: int, resolution: tuple[int, ...]) -> None:
    """Against the formula in float64, to twice what rounding to fp32 does to the angle, π·f, of each column.

    JAX is no nearer: it rounds otherwise with `jit` than without, by as much.
    """
    table = FourierPositions(sides, num_bands, resolution)().double().numpy()
    expected = fourier(grid(sides), num_bands, resolution)
    frequencies = np.concatenate([np.linspace(1, side / 2, num_bands) for side in resolution])
    angles = np.pi * np.concatenate([np.ones(len(sides)), frequencies, frequencies])
    assert (np.abs(table - expected).max(axis=0) <= 2**-22 * angles).all()


# ── written ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ELSEWHERE = {  # what the tensors do not tell and is not as published, as the warning has it
    "conv": "image_size=(37, 26), max_resolution=(10, 7)",
    "fourier": "image_size=(7, 5), max_resolution=(9, 4)",
    "flow": "image_size=(7, 5)",
    "multimodal": "num_frames=3, image_size=(10, 6), samples_per_frame=20",
}


def shapes(tree: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    leaves = {f"{module}/{name}": leaf for module, part in tree.items() for name, leaf in part.items()}
    return {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


def own_model(config: PerceiverConfig) -> Any:
    """Noise of opsin's own making, not from any file."""
    torch.manual_seed(3)
    model = rules.MODELS[type(config)](config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(5)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            else:
                fan_in = tensor[0].numel() if name.endswith("weight") and tensor.ndim > 1 else 10
                tensor.normal_(mean=float("norm" in name and name.endswith("weight")), std=fan_in**-0.5)
    return model


@pytest.mark.parametrize("network", CONFIGS)
def test_written_file(
    network: str, near: Callable[[Tensor, Tensor], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain pickle.load gives what Haiku would make itself, name for name and shape for shape, and the same outputs."""
    config, path = CONFIGS[network], tmp_path / f"{network}.pystate"
    model, preprocess = own_model(config), None
    if network in ("conv", "fourier", "learned"):
        preprocess = PreprocessConfig.deepmind_perceiver(config.image_size)
    assert checkpoints.write_as("pystate", path, model, preprocess, None) == [path]
    content = pickle.loads(path.read_bytes())
    assert path.read_bytes()[1] == 4  # the protocol
    assert (set(content) == {"params", "state"}) == (preprocess is not None)
    params, state = (content["params"], content["state"]) if preprocess else (content, {})
    init, apply, given = transformed(network)
    made = jax.eval_shape(init, jax.random.PRNGKey(0), **given)
    for ours, theirs in zip((params, state), made, strict=True):
        assert type(ours) is dict and all(type(leaves) is dict for leaves in ours.values())
        assert shapes(ours) == shapes(theirs)
    outputs, _ = apply(params, state, None, **given)
    compare(near, network, model, outputs)

    back = checkpoints.read(path, config=config)
    assert back.model.config == config and back.preprocess == preprocess
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    if network in ELSEWHERE:
        assert f"does not hold {ELSEWHERE[network]}; without being told" in caplog.text
    else:
        assert not caplog.text
        assert checkpoints.read(path).model.config == config


def test_written_averages_go_on(tmp_path: Path) -> None:
    """Haiku divides what it has summed up by 1 − 0.9ⁿ: what it would give back is the average that was written."""
    model = own_model(CONFIGS["conv"])
    checkpoints.write_as("pystate", tmp_path / "x.pystate", model, None, None)
    state = pickle.loads((tmp_path / "x.pystate").read_bytes())["state"]
    assert set(state) == {f"{BATCH_NORM}/mean_ema", f"{BATCH_NORM}/var_ema"}
    for leaves in state.values():
        assert leaves["counter"] == 5 and leaves["counter"].dtype == np.int32
        assert np.allclose(leaves["hidden"] / (1 - 0.9**5), leaves["average"], rtol=1e-6)


@pytest.mark.parametrize("network", CONFIGS)
def test_numerics_of_transformers_are_not_written(network: str, tmp_path: Path) -> None:
    changes = {"decoder_residual": True} if network == "learned" else {}
    model = own_model(dataclasses.replace(CONFIGS[network], numerics="transformers", **changes))
    reason = r"as transformers does \(numerics 'transformers'\), and DeepMind's release would not.* exact GELU"
    with pytest.raises(CheckpointError, match=rf"{reason}.*Formats that can hold this model: opsin"):
        checkpoints.write_as("pystate", tmp_path / "x.pystate", model, None, None)
    assert not list(tmp_path.iterdir())


def test_a_classifier_without_head_is_not_written(tmp_path: Path) -> None:
    model = own_model(dataclasses.replace(CONFIGS["fourier"], num_classes=0))
    with pytest.raises(CheckpointError, match="DeepMind's image classifiers cannot have no head.*: opsin."):
        checkpoints.write_as("pystate", tmp_path / "x.pystate", model, None, None)


def test_labels_and_preprocessing_that_are_lost_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, labels = own_model(CONFIGS["learned"]), Labels(tuple("abcdefghijklm"))
    checkpoints.write_as("pystate", tmp_path / "x.pystate", model, PreprocessConfig(size=(7, 7)), labels)
    assert "x.pystate names no classes: a reader will call them LABEL_0, …, not a, …" in caplog.text
    assert "x.pystate says nothing of preprocessing: a reader will take PreprocessConfig(source_crop" in caplog.text
