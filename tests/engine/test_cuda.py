"""The twin for GPUs against the plain model: its arithmetic on the CPU, its graphs where there is a GPU."""

import logging
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opsin.device import exact_fp32
from opsin.engine import cuda
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.preprocess import PreprocessConfig

CPU = torch.device("cpu")
WITHOUT_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: NOT checked are CUDA graphs, compiling and fp8 on a GPU"
)


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(WITHOUT_GPU(test))


# widths that 16 divides, as fp8 asks
VIT: dict[str, Any] = {
    "image_size": (32, 48), "patch_size": 8, "embed_dim": 48, "num_layers": 2, "num_heads": 3, "mlp_dim": 80,
    "num_classes": 17,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "num_latents": 7, "latent_dim": 48, "num_blocks": 2, "layers_per_block": 2, "num_heads": 3, "image_size": (32, 48),
    "num_bands": 3, "num_classes": 17,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "vit": {},
    "vit without biases": {"qkv_bias": False, "num_classes": 0},
    "gated": {"gated_mlp": True, "layer_scale": True, "class_token": False, "pool": "mean", "norm_after_pool": True},
    "registers": {"num_registers": 2, "pool": "token_mean", "activation": "gelu_tanh", "layer_scale": True},
    "attention pool": {"pool": "map"},
    "distilled": {"distillation_token": True},
    "distilled, one head": {"distillation_token": True, "distillation_head": False, "pre_logits": True},
    "hybrid": {"image_size": (64, 96), "patch_size": 1, "stem": (1, 1)},
    "perceiver": {"numerics": "transformers", "qk_dim": 24, "v_dim": 48},
    "perceiver of two stages": {"num_stages": 2, "cross_mlp_ratio": 2},
    "perceiver of several heads": {
        "num_cross_heads": 3, "qk_dim": 24, "v_dim": 48, "query_residual": False, "decoder_residual": False,
        "num_classes": 0,
    },
    "perceiver of pixels": {"front_end": "pixels"},
    "perceiver of learned positions": {"front_end": "conv1x1", "embed_dim": 16},
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    if name.startswith("perceiver"):
        model: Any = ImagePerceiver(ImagePerceiverConfig(**PERCEIVER | SHAPES[name]))
    else:
        model = ViT(ViTConfig(**VIT | SHAPES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def noise(model: Any, count: int) -> Tensor:
    return torch.randn(count, 3, *model.config.image_size, generator=torch.Generator().manual_seed(count))


def error(given: Tensor, expected: Tensor) -> float:
    """Largest, in standard deviations of what is expected."""
    assert given.dtype == torch.float32 and given.shape == expected.shape
    return float((given.cpu() - expected).abs().max() / expected.std())


def count_fp8(net: cuda.CudaNet) -> int:
    return sum(isinstance(part, cuda._Fp8Dense) for part in net.twin.modules())


# ── the twin ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SHAPES)
def test_twin_in_float32_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused products, the last layer's shortcut, folded norms and constant queries are the same sums, reordered."""
    monkeypatch.setitem(cuda.DTYPES, "bf16", torch.float32)
    model = build(name)
    pixels = noise(model, 3)
    net = cuda.pack(model, "bf16", CPU)
    assert any(isinstance(part, cuda._Layer) for part in net.twin.modules())
    with torch.inference_mode():
        assert error(net(pixels), model(pixels)) < 2e-5
        assert error(net.features(pixels), model.features(pixels)) < 2e-5


@pytest.mark.parametrize("name", SHAPES)
def test_low_precisions_are_close(name: str) -> None:
    """On noise, and at the logits: fp16 has 11 bits, bf16 8, e4m3 4."""
    model = build(name)
    pixels = noise(model, 3)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.inference_mode():
        logits, features = model(pixels), model.features(pixels)
    for precision, limit in (("fp16", 0.01), ("bf16", 0.06), ("fp8", 0.4)):
        net = cuda.pack(model, precision, CPU)  # type: ignore[arg-type]
        assert 1e-5 < error(net(pixels), logits) < limit
        assert 1e-5 < error(net.features(pixels), features) < limit
        assert (count_fp8(net) > 0) == (precision == "fp8")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fp32_is_the_model_to_the_bit() -> None:
    for name in ("vit", "perceiver"):
        model = build(name)
        pixels = noise(model, 3)
        net = cuda.pack(model, "fp32", CPU)
        assert net.twin is not model
        assert next(net.twin.parameters()) is next(model.parameters())  # in memory once
        with torch.inference_mode():
            assert torch.equal(net(pixels), model(pixels))
            assert torch.equal(net.features(pixels), model.features(pixels))


def test_all_dense_layers_of_the_layers_are_fp8_where_they_fit() -> None:
    assert count_fp8(cuda.pack(build("vit"), "fp8", CPU)) == 4 + 5  # the last keeps q apart
    assert count_fp8(cuda.pack(build("perceiver"), "fp8", CPU)) == 4 + 4
    narrow = ViT(ViTConfig(**VIT | {"mlp_dim": 40}))
    assert count_fp8(cuda.pack(narrow, "fp8", CPU)) == 2 + 3


# ── fp8 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fp8_codes() -> None:
    rows = torch.randn(5, 31) * torch.tensor([[1e-4], [1.0], [1e4], [3.0], [0.0]])
    codes, scale = cuda._to_fp8(rows)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (5, 1)
    assert torch.equal(codes[:4].float().abs().amax(dim=1), torch.full((4,), 448.0))  # the whole range is used
    near = (codes.float() * scale - rows).abs()
    assert bool((near <= (rows.abs() / 16).maximum(scale * 2**-10)).all())  # three bits behind the point; subnormals
    assert not codes[4].float().any()
    for i in range(5):
        alone, alone_scale = cuda._to_fp8(rows[i : i + 1])
        assert torch.equal(alone.float(), codes[i : i + 1].float()) and torch.equal(alone_scale, scale[i : i + 1])


@pytest.mark.parametrize("bias", [True, False])
def test_fp8_dense_is_the_product_of_what_its_codes_mean(bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32), torch.randn(2, 3, 32)
    offset = torch.randn(48) if bias else None
    y = cuda._Fp8Dense(weight, offset)(x)
    (codes, scale), (codes_x, scale_x) = cuda._to_fp8(weight), cuda._to_fp8(x.flatten(0, 1))
    expected = (codes_x.float() * scale_x) @ (codes.float() * scale).T
    expected = expected if offset is None else expected + offset.bfloat16()
    torch.testing.assert_close(y, expected.bfloat16().unflatten(0, (2, 3)), rtol=2e-2, atol=2e-2)
    exact = torch.nn.functional.linear(x, weight, offset)
    assert (y - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("name", ["vit", "distilled", "registers", "perceiver"])
def test_fp8_products_are_of_the_form_that_gpus_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch asks this on a GPU and not on a CPU: `_check_scaled_mm_sizes` of torch/_meta_registrations.py."""
    multiply, seen = torch._scaled_mm, []

    def checked(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **rest: Any) -> Tensor:
        assert a.stride(0) > a.stride(1) == 1 and b.stride(1) > b.stride(0) == 1
        assert not any(side % 16 for side in (*b.shape, a.shape[1]))
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.dtype == scale_b.dtype == torch.float32 and scale_a.is_contiguous() and scale_b.is_contiguous()
        assert rest["out_dtype"] == torch.bfloat16 and (rest["bias"] is None or rest["bias"].dtype == torch.bfloat16)
        seen.append(a.shape)
        return multiply(a, b, scale_a, scale_b, **rest)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    model = build(name)
    cuda.pack(model, "fp8", CPU)(noise(model, 3))
    assert len(seen) >= 8


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_buckets() -> None:
    assert [cuda.bucket(count) for count in (0, 1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 97, 500)] == [
        2, 2, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 128, 512,
    ]  # fmt: skip
    assert all(count <= cuda.bucket(count) <= max(2, 1.5 * count) for count in range(1, 2000))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("name", ["vit", "perceiver"])
def test_an_image_does_not_depend_on_its_batch(name: str, precision: Any) -> None:
    model = build(name)
    pixels = noise(model, 7)
    net = cuda.pack(model, precision, CPU)
    logits = net(pixels)
    for i in (0, 6):
        assert error(net(pixels[i : i + 1]), logits[i : i + 1]) < 0.05
    wild = pixels.clone()
    wild[:6] *= 100
    assert error(net(wild)[6:], logits[6:]) < 0.05
    with torch.inference_mode():
        assert error(logits, model(pixels)) < 0.3


def test_what_pads_a_batch_is_thrown_away() -> None:
    model = build("vit")
    pixels = noise(model, 5)
    net = cuda.pack(model, "bf16", CPU)
    expected = net(pixels)
    key = "logits", torch.Size((6, 3, 32, 48))
    assert list(net.slots) == [key]
    place, run = net.slots[key]
    outputs = run()
    net.slots[key] = place, lambda: outputs.copy_(run())  # in place, as a CUDA graph
    net(torch.full((6, 3, 32, 48), torch.nan))  # stays in the sixth row
    given = net(pixels)
    assert bool(place[5].isnan().all()) and bool(outputs[5].isnan().all())
    assert torch.equal(given, expected) and bool(given.isfinite().all())
    net(pixels + 1)
    assert torch.equal(given, expected)


def test_large_batches_are_run_in_parts_and_empty_ones_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_BATCH", 4)
    model = build("vit")
    pixels = noise(model, 11)
    net = cuda.pack(model, "bf16", CPU)
    with torch.inference_mode():
        assert error(net(pixels), model(pixels)) < 0.06
    assert {shape[0] for _, shape in net.slots} == {3, 4}
    assert net(pixels[:0]).shape == (0, 17)
    assert net.features(pixels[:0]).shape == (0, 48)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unknown_precisions_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match='precision is "int8". Known on a GPU: fp32, bf16, fp16, fp8.'):
        cuda.pack(build("vit"), "int8", CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no fast form on a GPU; ViT and ImagePerceiver have."):
        cuda.pack(nn.Linear(2, 3), "bf16", CPU)


def test_gpus_are_asked_only_for_what_they_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(
        ValueError, match='^fp8 needs a GPU of compute capability 8.9 or later; .* Some GPU, has 8.6. Take "bf16".$'
    ):
        cuda.pack(build("vit"), "fp8", device)
    cuda.check("bf16", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for precision, needed in (("fp8", "8.9"), ("bf16", "8.0")):
        with pytest.raises(ValueError, match=f'^{precision} needs .* {needed} or later; .*, has 7.5. Take "fp16".$'):
            cuda.check(precision, device)
    cuda.check("fp16", device)
    cuda.check("fp32", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    cuda.check("fp8", device)


# ── compiling ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["vit", "perceiver"])
def test_twin_is_one_graph_for_all_batches(name: str) -> None:
    """What `CudaNet` relies on; the back end, which only a GPU has, is left out."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build(name)
    net = cuda.pack(model, "fp8", CPU)
    compiled = torch.compile(net.functions["logits"], fullgraph=True, backend=backend)
    with torch.inference_mode():
        for count in (4, 2, 12):
            pixels = noise(model, count).bfloat16()
            torch._dynamo.mark_dynamic(pixels, 0)
            assert error(compiled(pixels), net(pixels)) < 1e-6
    assert len(graphs) == 1


def test_what_cannot_be_compiled_runs_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    def fail(pixels: Tensor) -> Tensor:
        raise RuntimeError("no triton\nand more")

    net = cuda.pack(build("vit"), "bf16", CPU)
    net.compiled = {"logits": fail, "features": fail}
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        with pytest.raises(ValueError, match="pixels have shape"):  # not a reason to stop compiling
            net._compiled("logits", torch.zeros(2, 5, 32, 48))
        assert not caplog.records and net.compiled["logits"] is fail
        assert net._compiled("logits", torch.zeros(2, 3, 32, 48)) is net.functions["logits"]
        assert net._compiled("features", torch.zeros(2, 3, 32, 48)) is net.functions["features"]
    assert [record.getMessage() for record in caplog.records] == [
        "the model runs uncompiled, which is slower. RuntimeError: no triton"
    ]


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CONFIGS = {
    "transformers": PreprocessConfig(),
    "imagenet": PreprocessConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "bytes": PreprocessConfig(rescale_factor=None, mean=None, std=None),
    "odd factor": PreprocessConfig(rescale_factor=0.0047, mean=(0.1, 0.2, 0.3), std=(0.7, 0.5, 0.3)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_normalised_to_the_bit(name: str) -> None:
    config = CONFIGS[name]
    rng = np.random.default_rng(0)
    upload = cuda.Uploader(config, CPU)
    batches = [list(rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)) for count, size in (
        (3, (17, 19)), (5, (17, 19)), (2, (17, 19)), (1, (23, 29)),
    )]  # fmt: skip
    given = [upload(batch) for batch in batches]  # all before the first is looked at: buffers are used again
    for batch, pixels in zip(batches, given, strict=True):
        assert torch.equal(pixels, config.normalise_batch(batch))
    half = cuda.Uploader(config, CPU, torch.bfloat16)(batches[0])
    assert torch.equal(half, config.normalise_batch(batches[0]).bfloat16())


def test_floats_are_normalised_before_they_are_sent() -> None:
    config = PreprocessConfig()
    resized = list(np.random.default_rng(0).uniform(0, 255, (3, 17, 19, 3)).astype(np.float32))
    assert torch.equal(cuda.Uploader(config, CPU)(resized), config.normalise_batch(resized))
    with pytest.raises(ValueError, match="no images"):
        cuda.Uploader(config, CPU)([])


# ── on a GPU ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("name", ["vit", "gated", "perceiver"])  # each is compiled twice
def test_graphs_give_what_the_cpu_gives(name: str, precision: Any, caplog: pytest.LogCaptureFixture) -> None:
    device = torch.device("cuda")
    try:
        cuda.check(precision, device)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    model = build(name)
    limit = {"fp16": 0.01, "bf16": 0.06, "fp8": 0.4}[precision]
    net = cuda.pack(model, precision, device)
    for count in (5, 6, 1, 5, 9):  # the same graph on other pixels, other graphs, back
        pixels = noise(model, count)
        with torch.inference_mode():
            logits, features = model(pixels), model.features(pixels)
        assert error(net(pixels.to(device)), logits) < limit
        assert error(net.features(pixels.to(device)), features) < limit
    assert net.compiled is not net.functions, caplog.text
    assert len(net.slots) == 2 * 3


@on_gpu
def test_fp32_on_a_gpu_is_exact() -> None:
    for name in ("vit", "perceiver"):
        model = build(name)
        pixels = noise(model, 3)
        net = cuda.pack(model, "fp32", torch.device("cuda"))
        with torch.inference_mode(), exact_fp32(net.device):
            assert error(net(pixels), model(pixels)) < 1e-4


@on_gpu
def test_threads_and_streams_take_turns() -> None:
    device = torch.device("cuda")
    model = build("vit")
    net = cuda.pack(model, "fp16", device)
    batches = [noise(model, count).to(device) for count in (2, 3, 7, 12)]
    expected = [net(pixels) for pixels in batches]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(net(batches[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@on_gpu
def test_bytes_are_normalised_on_the_gpu_to_the_bit() -> None:
    config = CONFIGS["imagenet"]
    upload = cuda.Uploader(config, torch.device("cuda"))
    rng = np.random.default_rng(0)
    batches = [list(rng.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)) for count in (64, 3, 64, 64, 7)]
    given = [upload(batch) for batch in batches]
    for batch, pixels in zip(batches, given, strict=True):
        assert torch.equal(pixels.cpu(), config.normalise_batch(batch))
