"""Visual Transformers: the formulas in NumPy, the ResNet against timm's, the paper's sizes, the way to a classifier."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import opsin
from opsin import bench, checkpoints, engine
from opsin.errors import CheckpointError
from opsin.labels import Labels
from opsin.models.vt import VT, Projector, VTConfig, vt_r18, vt_r34, vt_r50, vt_r101
from opsin.preprocess import PreprocessConfig

TINY = VTConfig(
    image_size=(40, 56), width=4, small_stem=True, map_dim=12, token_dim=24, num_tokens=5, num_heads=3, num_groups=2,
    position_size=4, num_modules=3, num_classes=7,
)  # fmt: skip


def noise(model: nn.Module, seed: int = 0) -> Any:
    """Everything is noise, the statistics of batch norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
            parameter.normal_(std=(2 / fan) ** 0.5, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.running_mean.normal_(std=0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def pixels(num: int = 3, size: tuple[int, int] = (40, 56), seed: int = 0) -> Tensor:
    return torch.randn(num, 3, *size, generator=torch.Generator().manual_seed(seed))


# ── the ResNet ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("depth", "size", "grid"), [(18, (67, 96), 3 * 3), (50, (64, 75), 2 * 3)])
def test_without_modules_it_is_timms_resnet(depth: Any, size: tuple[int, int], grid: int) -> None:
    theirs = noise(timm.create_model(f"resnet{depth}", num_classes=7))
    ours = VT(VTConfig(depth=depth, num_modules=0, num_classes=7, image_size=size))
    state = {}
    for name, tensor in theirs.state_dict().items():
        parts = name.split(".")
        if parts[0].startswith("layer"):
            parts[:1] = ["stem", "stages", str(int(parts[0][-1]) - 1)]
            at = parts.index("downsample") if "downsample" in parts else None
            if at is not None:
                parts[at : at + 2] = ["proj" if parts[at + 1] == "0" else "proj_norm"]
            parts = [part.replace("bn", "norm") for part in parts]
        elif parts[0] in ("conv1", "bn1"):
            parts[:1] = ["stem", {"conv1": "conv", "bn1": "norm"}[parts[0]]]
        else:
            parts[0] = {"fc": "head"}[parts[0]]
        state[".".join(parts)] = tensor
    ours.load_state_dict(state)
    ours.eval()
    images = pixels(2, size)
    with torch.no_grad():
        features, logits = theirs.forward_head(theirs.forward_features(images), pre_logits=True), theirs(images)
        # the same convolutions in the same order: rounding alone
        torch.testing.assert_close(ours.features(images), features, rtol=1e-5, atol=1e-5 * float(features.std()))
        torch.testing.assert_close(ours(images), logits, rtol=1e-5, atol=1e-5 * float(logits.std()))
        assert ours.encode(ours.embed(images)).shape == (2, grid, ours.config.feature_dim)


def test_stems() -> None:
    for small, side in ((False, 4), (True, 8)):
        config = replace(TINY, small_stem=small, image_size=(64, 64))
        model = noise(VT(config))
        assert model.stem(pixels(1, (64, 64))).shape == (1, 16, side, side)
        assert config.reduction == 64 // side
        assert model.embed(pixels(1, (64, 64))).shape == (1, 12, side, side)


# ── the modules ──────────────────────────────────────────────────────────────────────────────────────────────────────


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def grouped(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(N, in) → (N, out), part by part."""
    return np.concatenate([part @ w.T for part, w in zip(np.split(x, len(weight), 1), weight, strict=True)], axis=1)


def by_heads(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """softmax(q kᵀ / √d) v of each head side by side, and the weights."""
    parts = list(zip(*(np.split(x, heads, 1) for x in (q, k, v)), strict=True))
    weights = [softmax(a @ b.T / np.sqrt(a.shape[1])) for a, b, _ in parts]
    return np.concatenate([w @ c for w, (_, _, c) in zip(weights, parts, strict=True)], axis=1), np.stack(weights)


def direct(model: VT, feature_map: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The formulas of `vt.py`, for one image: (C, 4, 4) → T of the last module, and A of each."""
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    heads = model.config.num_heads
    x, tokens, maps = feature_map.reshape(len(feature_map), -1).T, np.empty(0), []
    for i in range(model.config.num_modules):
        at = f"layers.{i}"
        if i == 0:
            a = softmax((x @ w[f"{at}.tokenizer.filters.weight"].T).T)[None]
            gathered = a[0] @ x
        else:
            gathered, a = by_heads(tokens @ w[f"{at}.tokenizer.query.weight"].T, x, x, heads)
        maps.append(a)
        kernel = w[f"{at}.tokenizer.place.weight"][0]  # heads 3 3
        padded = np.pad(a.reshape(*a.shape[:2], 4, 4) * 16, ((0, 0), (0, 0), (1, 1), (1, 1)))
        place = np.stack(
            [(padded[:, :, r : r + 3, c : c + 3] * kernel[:, None]).sum((0, 2, 3)) for r in (0, 2) for c in (0, 2)], 1
        )
        wide = np.concatenate([grouped(gathered, w[f"{at}.tokenizer.value.weight"]), place], axis=1)
        t = wide @ w[f"{at}.tokenizer.out.weight"].T
        q, k, v = (grouped(t, w[f"{at}.transformer.{name}.weight"]) for name in "qkv")
        t = t + by_heads(q, k, v, heads)[0]
        hidden = np.maximum(t @ w[f"{at}.transformer.fc1.weight"].T, 0)
        tokens = t + hidden @ w[f"{at}.transformer.fc2.weight"].T
        if i < model.config.num_modules - 1:
            k, v = (tokens @ w[f"{at}.projector.{name}.weight"].T for name in "kv")
            x = x + by_heads(grouped(x, w[f"{at}.projector.q.weight"]), k, v, heads)[0]
    return tokens, maps


def test_formulas() -> None:
    model = noise(VT(TINY)).double()
    feature_map = torch.randn(2, 12, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, attentions = model._encode(feature_map)
    for i in range(2):
        expected, maps = direct(model, feature_map[i].numpy())
        np.testing.assert_allclose(tokens[i].numpy(), expected, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(attentions, maps, strict=True):
            np.testing.assert_allclose(ours[i].flatten(2).numpy(), theirs, rtol=1e-9)


def test_attention_is_a_share_of_the_map() -> None:
    model = noise(VT(TINY))
    with torch.no_grad():
        maps = model.attention(pixels())
    assert [tuple(each.shape) for each in maps] == [(3, 1, 5, 5, 7), (3, 3, 5, 5, 7), (3, 3, 5, 5, 7)]
    for each in maps:
        assert float(each.min()) >= 0
        torch.testing.assert_close(each.sum((-2, -1)), torch.ones(each.shape[:3]))
        assert float(each.std()) > 1e-3


def test_place_of_a_token_does_not_depend_on_the_size_of_the_map() -> None:
    """The same attention over four times as many places says the same."""
    tokenizer = noise(VT(TINY)).layers[1].tokenizer
    coarse = torch.rand(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    coarse = coarse / coarse.sum((-2, -1), keepdim=True)
    fine = coarse.repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    with torch.no_grad():
        a, b = tokenizer._places(coarse.flatten(3), (4, 4)), tokenizer._places(fine.flatten(3), (8, 8))
    assert a.shape == (2, 5, 4)
    torch.testing.assert_close(a, b)


def test_every_weight_matters() -> None:
    """None is dead: all get a gradient, which data-parallel training asks for."""
    model = noise(VT(TINY)).train()
    model(pixels()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def test_it_begins_without_an_opinion() -> None:
    torch.manual_seed(0)
    model = VT(TINY).eval()
    with torch.no_grad():
        assert float(model(pixels()).abs().max()) == 0
        assert float(model.features(pixels()).std()) > 0


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────────

SIZES = {  # parameters and 10⁹ multiplications: ours; the paper's lowest and highest
    "vt_r18": (vt_r18(), 10_421_953, 1.5463, (11.6, 11.7), (1.569, 1.579)),
    "vt_r34": (vt_r34(), 19_841_105, 3.2392, (19.2, 21.8), (3.236, 3.299)),
    "vt_r50": (vt_r50(), 20_607_313, 3.5731, (21.4, 21.4), (3.412, 3.412)),
    "vt_r101": (vt_r101(), 39_599_441, 7.2854, (41.5, 41.5), (7.129, 7.129)),
}


def size_of(model: nn.Module, *inputs: Tensor) -> tuple[int, float]:
    """On "meta": parameters, and 10⁹ multiplications."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    config, params, flops, said_params, said_flops = SIZES[name]
    with torch.device("meta"):
        found = size_of(VT(config), torch.empty(1, 3, 224, 224))
        last = size_of(Projector(config), torch.empty(1, 196, 512), torch.empty(1, 16, 1024))
    assert found == (params, pytest.approx(flops, abs=1e-4))
    with_last = found[0] + last[0], found[1] + last[1]  # the paper's have it: near what it prints
    assert 0.975 * said_params[0] < with_last[0] / 1e6 < 1.02 * said_params[1]
    assert 0.999 * said_flops[0] < with_last[1] < 1.055 * said_flops[1]


def test_published_resnets() -> None:
    for depth, params in ((18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)):
        with torch.device("meta"):
            model = VT(VTConfig(depth=depth, num_modules=0))  # type: ignore[arg-type]
        assert sum(parameter.numel() for parameter in model.parameters()) == params


@pytest.mark.parametrize("num_modules", [0, 1, 3])
def test_an_image_is_classified_alone_as_in_a_batch(num_modules: int) -> None:
    model = noise(VT(replace(TINY, num_modules=num_modules)))
    images = pixels(4)
    with torch.no_grad():
        whole = model(images)
        assert whole.shape == (4, 7)
        torch.testing.assert_close(model(images[2:3]), whole[2:3], rtol=1e-5, atol=1e-5)
        assert float((whole[0] - whole[1]).abs().max()) > 1e-3
        torch.testing.assert_close(model.classify(model.pool(model.encode(model.embed(images)))), whole)


def test_any_size_and_channel_count() -> None:
    model = noise(VT(replace(TINY, num_channels=2)))
    for size in ((40, 56), (33, 71), (64, 32)):
        assert model(torch.randn(2, 2, *size)).shape == (2, 7)


def test_without_a_head() -> None:
    model = noise(VT(replace(TINY, num_classes=0)))
    assert model(pixels()).shape == (3, 24)
    assert model.config.feature_dim == 24
    with pytest.raises(ValueError, match=r"no head \(num_classes 0\)"):
        model.classify(torch.zeros(1, 24))


@pytest.mark.parametrize("shape", [(3, 40, 56), (1, 4, 40, 56)])
def test_pixels_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixels have shape .*; this model takes \(B, 3, H, W\)\."):
        VT(TINY)(torch.zeros(*shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 20}, "depth is 20. Known: 18, 34, 50, 101."),
        ({"num_tokens": 0}, "num_tokens is 0; it must be at least 1."),
        ({"num_modules": -1}, r"num_modules is -1; it must be 0 \(the plain ResNet\) or more."),
        ({"num_heads": 5}, r"num_heads \(5\) does not divide map_dim \(12\)."),
        ({"token_dim": 27}, r"token_dim is 27; it must be a multiple of twice num_heads \(6\)."),
        ({"num_groups": 5}, r"token_dim is 24; it must be a multiple of twice num_groups \(10\)."),
        ({"image_size": (15, 40)}, r"image_size \(15, 40\) is too small: this network takes 16 and more."),
        ({"small_stem": False, "image_size": (40, 31)}, "this network takes 32 and more."),
        ({"num_modules": 0, "image_size": (31, 40)}, "this network takes 32 and more."),
    ],
)
def test_shapes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


# ── with the rest of the package ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("num_modules", [0, 2])
def test_a_folder_is_a_classifier(num_modules: int, tmp_path: Path, photos: Path) -> None:
    model = noise(VT(replace(TINY, num_modules=num_modules)))
    labels = Labels(tuple(f"class {i}" for i in range(7)))
    assert checkpoints.write_portable(tmp_path, model, PreprocessConfig(size=(40, 56)), labels) == "opsin"
    clf = opsin.load(tmp_path, dtype="fp32")
    assert clf.model.config == model.config
    assert clf.model.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(clf.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    images = [photos / "coffee.png", photos / "chelsea.png"]
    batch = torch.stack([clf.preprocess(path) for path in images])
    with torch.no_grad():
        logits, features = model(batch), model.features(batch)
    torch.testing.assert_close(clf.logits(images), logits, rtol=1e-4, atol=1e-4)
    assert clf(images[0])[0]["index"] == int(logits[0].argmax())
    assert clf.embed(images).shape == (2, model.config.feature_dim)
    np.testing.assert_allclose(clf.embed(images), features.numpy(), rtol=1e-4, atol=1e-4)
    clf.use("auto")
    scale = float(logits.std())
    assert float((clf.logits(images) - logits).abs().max()) < 0.1 * scale


def test_in_bf16_the_weights_are_bf16_and_the_model_stays() -> None:
    model = noise(VT(TINY))
    images = pixels(5)
    twin: Any = engine.pack(model, "bf16")
    with torch.no_grad():
        logits = model(images)
        assert twin(images).dtype == twin.features(images).dtype == torch.float32
        off = float((twin(images) - logits).square().mean().sqrt() / logits.std())
        assert 1e-4 < off < 0.2  # eight bits of mantissa, thirty products in a row, and the sharp softmaxes of noise
        assert twin.stem.conv.weight.dtype == torch.bfloat16
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert torch.equal(engine.pack(model, "fp32")(images), logits)


def test_bench_leaves_int8_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "has_int8", lambda: True)
    work = bench._Work(name="a VT", folder=tmp_path, batch_size=2, image_size=TINY.image_size)
    work.model = noise(VT(TINY))
    work.calibration_file.touch()
    assert bench._make(work, "opsin", "int8") == "a VT has no transformer layers to run in int8"
    flops = bench.flops_of(work.model, TINY.image_size)
    with FlopCounterMode(display=False) as counter:
        work.model(pixels(1))
    assert flops == counter.get_total_flops()


def test_openvino_computes_the_same() -> None:
    pytest.importorskip("openvino")
    from opsin.engine import openvino

    model = noise(VT(TINY))
    net = openvino.compile(model, "fp32", image_size=TINY.image_size, calibration=None, cache=None)
    images = pixels()
    with torch.no_grad():
        logits = model(images)
    assert float((net(images) - logits).abs().max()) < 1e-4 * float(logits.std())


def test_transformers_has_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="transformers has no VT"):
        checkpoints.write_hf(tmp_path, VT(TINY), None, None)
