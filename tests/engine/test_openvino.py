"""OpenVINO's networks against the plain model."""

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.engine import openvino as engine
from opsin.errors import MissingExtra
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import decode

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("openvino", "nncf")), reason="no extra `openvino`"
)

VIT: dict[str, Any] = {
    "image_size": (32, 48), "patch_size": 8, "embed_dim": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40,
    "num_classes": 7,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "image_size": (32, 48), "num_latents": 7, "latent_dim": 24, "num_blocks": 2, "layers_per_block": 2, "num_heads": 4,
    "num_bands": 3, "num_classes": 5,
}  # fmt: skip
SHAPES: dict[str, Any] = {
    "vit": ViTConfig(**VIT | {"qkv_bias": False, "num_heads": 1}),
    "distilled": ViTConfig(**VIT, distillation_token=True, pre_logits=True),
    "distilled, one head": ViTConfig(**VIT, distillation_token=True, distillation_head=False),
    "gated": ViTConfig(**VIT, gated_mlp=True, layer_scale=True, num_registers=3),
    "mean": ViTConfig(**VIT, pool="mean", class_token=False, norm_after_pool=True),
    "map": ViTConfig(**VIT, pool="map", class_token=False, activation="gelu_tanh"),
    "token_mean, no head": ViTConfig(**VIT | {"num_classes": 0}, pool="token_mean"),
    "hybrid": ViTConfig(**VIT | {"patch_size": 1}, stem=(1, 1), norm_after_pool=True),
    "perceiver": ImagePerceiverConfig(**PERCEIVER, qk_dim=16, v_dim=32),
    "transformers' perceiver": ImagePerceiverConfig(**PERCEIVER, numerics="transformers"),
    "perceiver of pixels, no head": ImagePerceiverConfig(**PERCEIVER | {"num_classes": 0}, front_end="pixels"),
    "learned perceiver": ImagePerceiverConfig(**PERCEIVER, front_end="conv1x1", embed_dim=11),
}


def noisy(config: Any) -> Any:
    torch.manual_seed(0)
    model = ViT(config) if isinstance(config, ViTConfig) else ImagePerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def vit() -> Any:
    return noisy(ViTConfig(**VIT))


def assert_same(given: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize("name", SHAPES)
def test_fp32_gives_the_same(name: str) -> None:
    model = noisy(SHAPES[name])
    net = engine.compile(model, "fp32", image_size=(32, 48))
    pixels = torch.randn(3, 3, 32, 48)
    with torch.inference_mode():
        logits, features = model(pixels), model.features(pixels)
        assert_same(net(pixels), logits)
        assert_same(net.features(pixels), features)
        assert_same(net(pixels[1:2]), logits[1:2])  # another batch size through the same net
        assert not torch.equal(net(pixels + 0.01), logits)


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(**VIT, pos_resize="bicubic_antialias", distillation_token=True),
        ViTConfig(**VIT, pos_resize="bilinear_corners"),
        ImagePerceiverConfig(**PERCEIVER),
        ImagePerceiverConfig(**PERCEIVER, front_end="conv1x1", embed_dim=11),
    ],
    ids=["bicubic_antialias", "bilinear_corners", "fourier", "learned"],
)
def test_another_image_size(config: Any) -> None:
    model = noisy(config)
    before = model.config, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    net = engine.compile(model, "fp32", image_size=(56, 40))
    pixels = torch.randn(2, 3, 56, 40)
    with torch.inference_mode():
        assert_same(net(pixels), model(pixels))
    assert model.config is before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())


def test_attention_stays_one_operator(vit: Any) -> None:
    types = [op.get_type_name() for op in engine._convert(vit, (32, 48)).get_ops()]
    assert types.count("ScaledDotProductAttention") == 2
    assert "Softmax" not in types


def test_results_are_copies(vit: Any) -> None:
    net = engine.compile(vit, "fp32", image_size=(32, 48))
    pixels = torch.randn(2, 3, 32, 48)
    first = net(pixels)
    kept = first.clone()
    net(-pixels)
    assert torch.equal(first, kept)
    spread = torch.randn(3, 2, 32, 48).transpose(0, 1)  # strides that are not those of a new tensor
    assert torch.equal(net(spread), net(spread.contiguous()))


def test_two_threads_take_turns(vit: Any) -> None:
    net = engine.compile(vit, "fp32", image_size=(32, 48))
    batches = [torch.randn(rows, 3, 32, 48) for rows in (1, 2, 3, 5)]
    expected = [(net(batch), net.features(batch)) for batch in batches]
    wrong: list[int] = []

    def run(shift: int) -> None:
        for i in range(200):
            which = (i + shift) % len(batches)
            output = (i // 3 + shift) % 2
            given = (net, net.features)[output](batches[which])
            if not torch.equal(given, expected[which][output]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(shift,)) for shift in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_and_precision_asked_of_openvino(vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    class Net(engine.OpenVINONet):
        def __init__(self, model: Any, *rest: Any, **options: Any) -> None:
            compiled.append(model)
            super().__init__(model, *rest, **options)

    monkeypatch.setattr(engine, "OpenVINONet", Net)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    engine.compile(vit, "fp32", image_size=(32, 48))
    properties = {name: compiled[0].get_property(name) for name in ("INFERENCE_NUM_THREADS", "PERFORMANCE_HINT")}
    assert properties["INFERENCE_NUM_THREADS"] == 2
    assert "LATENCY" in str(properties["PERFORMANCE_HINT"]).upper()
    assert compiled[0].get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"


# ── int8 and bf16, on photographs ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return opsin.load("opsin/vit-tiny", dtype="fp32").model


@pytest.fixture(scope="module")
def pixels(photos: Path) -> Tensor:
    """Squares of the photographs, every one with its neighbours at half a side: (N, 3, 64, 64)."""
    config = opsin.load("opsin/vit-tiny", dtype="fp32").preprocess
    squares = []
    for path in sorted(photos.glob("*.[jp][pn]g")):
        image = decode(path)
        for y in range(0, image.height - 127, 64):
            squares += [image.crop((x, y, x + 128, y + 128)) for x in range(0, image.width - 127, 64)]
    return torch.stack([config(square) for square in squares])


@pytest.mark.skipif(not engine.has_bf16(), reason="this CPU has no bf16")
def test_bf16_is_close(trained: Any, pixels: Tensor) -> None:
    with torch.inference_mode():
        expected = trained(pixels)
    given = engine.compile(trained, "bf16", image_size=(64, 64))(pixels)
    assert 0 < (given - expected).abs().max() < 0.08 * expected.std()  # measured 0.03
    assert (given.argmax(1) == expected.argmax(1)).float().mean() >= 0.98


def test_int8_is_close_and_kept(
    trained: Any, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibrated with every third square, compared on the others; then the cache, which spares a second calibration."""
    seen, rest = pixels[::3], torch.cat([pixels[1::3], pixels[2::3]])
    with torch.inference_mode():
        expected, features = trained(rest), trained.features(rest)
    net = engine.compile(trained, "int8", image_size=(64, 64), calibration=[seen], cache=tmp_path)
    given = net(rest)
    error = (given - expected) / expected.std()
    assert 0.001 < error.pow(2).mean().sqrt() < 0.03  # measured 0.014
    assert error.abs().max() < 0.2  # measured 0.07
    assert (given.argmax(1) == expected.argmax(1)).float().mean() >= 0.95  # measured 67 of 68
    assert (net.features(rest) - features).pow(2).mean().sqrt() < 0.04 * features.std()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated again")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["nncf"], "quantize", refuse)
        batches = [seen[:5], seen[5:]]  # the same images in other batches
        again = engine.compile(trained, "int8", image_size=(64, 64), calibration=batches, cache=tmp_path)
        assert torch.equal(again(rest), given)
        with pytest.raises(AssertionError, match="calibrated again"):
            engine.compile(trained, "int8", image_size=(64, 64), calibration=[seen[1:]], cache=tmp_path)
    (path,) = tmp_path.iterdir()
    assert 3_000_000 < path.stat().st_size < 12_000_000  # weights of 5.6 million numbers, a byte each
    assert not caplog.records


def test_what_int8_leaves_alone(vit: Any) -> None:
    graph = engine._quantise(engine._convert(vit, (32, 48)), [torch.randn(2, 3, 32, 48)])
    kinds = {op.get_friendly_name(): op.input_value(1).get_node().get_type_name() for op in graph.get_ops()
             if op.get_type_name() in ("MatMul", "Convolution")}  # fmt: skip
    plain = {name for name, kind in kinds.items() if kind == "Constant"}
    assert [sum(part in name for name in plain) for part in (".head/", ".patch_embed/")] == [1, 1]
    assert len(plain) == 2
    assert len(kinds) == 2 + 2 * 6  # two layers of q, k, v, out, fc1, fc2


def test_the_cache_knows_models_apart_and_survives_damage(
    vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def quantise(graph: Any, calibration: Any) -> Any:
        calls.append(len(calibration))
        return graph

    monkeypatch.setattr(engine, "_quantise", quantise)
    images = [torch.randn(2, 3, 32, 48)]

    def run(model: Any = vit, calibration: Any = images) -> Tensor:
        return engine.compile(model, "int8", image_size=(32, 48), calibration=calibration, cache=tmp_path)(images[0])

    first = run()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    assert torch.equal(run(), first)
    assert len(calls) == 1
    for damaged in (b"", content[:20], content[:-1], content[:-1] + bytes([content[-1] ^ 1]), bytes(40)):
        path.write_bytes(damaged)
        calls.clear()
        caplog.clear()
        assert torch.equal(run(), first)
        assert len(calls) == 1
        assert f"{path} is damaged; it is made anew." in caplog.text
        assert torch.equal(run(), first)
        assert len(calls) == 1
    calls.clear()
    other = noisy(ViTConfig(**VIT))
    with torch.no_grad():
        other.head.bias[3] += 1
    run(other)
    run(noisy(ViTConfig(**VIT, norm_eps=1e-12)))  # the same tensors, other arithmetic
    run(noisy(ImagePerceiverConfig(**PERCEIVER)))
    run(calibration=[images[0] + 1])
    assert len(calls) == 4
    monkeypatch.setattr(engine, "version", lambda package: f"next {package}")
    run()
    assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 6

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        run(calibration=[images[0] + 2])
    assert len(list(tmp_path.iterdir())) == 6


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_errors(vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size: Any = {"image_size": (32, 48)}
    with pytest.raises(ValueError, match='precision is "fp8". Known: fp32, bf16, int8.'):
        engine.compile(vit, "fp8", **size)  # type: ignore[arg-type]
    for missing in (None, [], [torch.zeros(0, 3, 32, 48)]):
        with pytest.raises(ValueError, match=r"int8 needs images to calibrate with: calibration=\[pixels"):
            engine.compile(vit, "int8", **size, calibration=missing)
    wrong = [torch.zeros(2, 3, 32, 48), torch.zeros(2, 3, 48, 32)]
    with pytest.raises(ValueError, match=r"a batch of calibration has shape \(2, 3, 48, 32\); it must be \(B, 3, 32,"):
        engine.compile(vit, "int8", **size, calibration=wrong)
    with pytest.raises(ValueError, match=r"patch_size \(8\) does not divide image_size \(36\)"):
        engine.compile(vit, "fp32", image_size=(36, 48))
    monkeypatch.setattr(engine, "has_bf16", lambda: False)
    with pytest.raises(ValueError, match="this CPU does not multiply bf16 .it lacks AVX512-BF16 and AMX."):
        engine.compile(vit, "bf16", **size)
    net = engine.compile(vit, "fp32", **size)
    with pytest.raises(ValueError, match=r"pixels has shape \(3, 32, 48\); it must be \(B, 3, 32, 48\)."):
        net(torch.zeros(3, 32, 48))
    with pytest.raises(ValueError, match="pixels is torch.bfloat16; it must be torch.float32."):
        net.features(torch.zeros(1, 3, 32, 48).bfloat16())
    training = noisy(ViTConfig(**VIT)).train()
    with pytest.raises(ValueError, match=r"the model is in training mode. Call model.eval\(\) first."):
        engine.compile(training, "fp32", **size)


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_named(vit: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf'{package} is not installed. Install it with: pip install "opsin\[open'):
        engine.compile(vit, "int8", image_size=(32, 48), calibration=[torch.zeros(1, 3, 32, 48)])
    assert sys.modules[package] is None
    assert logging.getLoggerClass() is logging.Logger


QUIET = """
import logging, socket, sys
import torch, torch.nn.functional as F
def refuse(*_): raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
def functions(): return [id(getattr(place, name)) for place in (torch, F, torch.Tensor) for name in NAMES[place]]
NAMES = {place: [name for name in dir(place) if not name.startswith("__")] for place in (torch, F, torch.Tensor)}
before = functions(), logging.getLoggerClass(), logging.root.level, logging.root.handlers[:], logging.root.filters[:]
from opsin.engine import openvino
from opsin.models.vit import ViT, ViTConfig
model = ViT(ViTConfig(image_size=(16, 16), patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8)).eval()
assert not {"openvino", "nncf"} & set(sys.modules)
openvino.compile(model, "int8", image_size=(16, 16), calibration=[torch.randn(2, 3, 16, 16)])
assert {"openvino", "nncf"} <= set(sys.modules)
assert not [name for name in sys.modules if name.split(".")[0] == "openvino_telemetry"]
after = functions(), logging.getLoggerClass(), logging.root.level, logging.root.handlers[:], logging.root.filters[:]
assert before == after
"""


def test_nothing_is_printed_sent_or_patched(tmp_path: Path) -> None:
    """In a process of its own: under pytest NNCF has no telemetry to begin with."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI", "NNCF_DEV")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUIET],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "intel").exists()  # where openvino_telemetry keeps its identifier


def test_nets_that_go_in_the_order_in_which_they_came() -> None:
    """The thread's stack for signals stays one that is memory: a child that ends is no segmentation fault."""
    code = """
import gc, signal, subprocess, sys
from opsin.engine import openvino
from opsin.models.vit import ViT, ViTConfig
config = ViTConfig(image_size=(16, 16), patch_size=8, embed_dim=8, num_layers=1, num_heads=2, mlp_dim=8, num_classes=3)
nets = [openvino.compile(ViT(config).eval(), "fp32", image_size=(16, 16)) for _ in range(3)]
while nets:
    del nets[0]
    gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: None)
for _ in range(3):
    subprocess.run([sys.executable, "-c", "pass"])
print("alive")
"""
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
