"""Exported files beside the model: tiny networks of noise, images of odd sizes."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from opsin import export as exports
from opsin.checkpoints import Checkpoint, Source
from opsin.cli.export import export as command
from opsin.errors import ExportError
from opsin.export import Pixels, archive, onnx, openvino
from opsin.export.check import compare, photos, varied
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.models.vt import VT, VTConfig
from opsin.pipeline import Classifier, load
from opsin.preprocess import PreprocessConfig

PACKAGES = ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in PACKAGES), reason="no extras `onnx` and `openvino`"
)

SIZES = ((41, 61), (37, 53), (101, 57), (24, 40), (1, 97), (89, 7), (13, 11))  # (H, W)
VIT: dict[str, Any] = {
    "image_size": (24, 40), "patch_size": 8, "embed_dim": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40,
    "num_classes": 7,
}  # fmt: skip
PERCEIVER: dict[str, Any] = {
    "image_size": (24, 40), "num_latents": 7, "latent_dim": 24, "num_blocks": 2, "layers_per_block": 1, "num_heads": 4,
    "num_bands": 3, "num_classes": 5,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "vit": ViTConfig(**VIT, num_registers=2, layer_scale=True),
    "mean, other positions": ViTConfig(**VIT | {"image_size": (32, 32)}, pool="mean", class_token=False),
    "distilled": ViTConfig(**VIT, distillation_token=True, pre_logits=True),
    "map, no head": ViTConfig(**VIT | {"num_classes": 0}, pool="map", class_token=False, activation="gelu_tanh"),
    "hybrid": ViTConfig(**VIT | {"patch_size": 1}, stem=(1,)),
    "perceiver": ImagePerceiverConfig(**PERCEIVER, qk_dim=16, v_dim=32),
    "transformers' perceiver": ImagePerceiverConfig(**PERCEIVER, numerics="transformers"),
    "perceiver of pixels": ImagePerceiverConfig(**PERCEIVER, front_end="pixels"),
    "learned perceiver": ImagePerceiverConfig(**PERCEIVER, front_end="conv1x1", embed_dim=11, numerics="transformers"),
}
SQUASH = PreprocessConfig(size=(24, 40))
CONFIGS = {
    "shorter edge": PreprocessConfig(size=40, crop_size=(24, 40)),
    "timm": PreprocessConfig(size=43, resample="bicubic", crop_size=(31, 40), crop_rounding="half_even"),
    "lanczos": PreprocessConfig(size=(23, 31), resample="lanczos", rescale_factor=1 / 127.3),
    "hamming": PreprocessConfig(size=29, resample="hamming", crop_size=(24, 28), mean=None, std=None),
    "box": PreprocessConfig(size=(17, 19), resample="box"),
    "tensorflow": PreprocessConfig.jax_squash((24, 40)),
    "opencv": PreprocessConfig.deepmind_perceiver((24, 40)),
    "black around": PreprocessConfig(size=(20, 30), crop_size=(33, 31), crop_rounding="up"),
    "no resize": PreprocessConfig(size=None, crop_size=(41, 53), crop_rounding="half_even"),
    "source crop": PreprocessConfig(source_crop=(0.875, 0.75), size=31, crop_size=(28, 31), resample="bicubic"),
}  # fmt: skip


def slow_but(names: Iterable[str], *quick: str) -> list[Any]:
    """An exporter takes seconds: most shapes are for the slow run."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def noisy(config: Any, preprocess: PreprocessConfig = SQUASH, *, multi_label: bool = False) -> Classifier:
    torch.manual_seed(0)
    model = ViT(config) if isinstance(config, ViTConfig) else ImagePerceiver(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    names = tuple(f"Klasse {i} ü" for i in range(config.num_classes))
    labels = Labels(names, multi_label=multi_label) if names else None
    return Classifier(
        Checkpoint(model.eval(), preprocess, labels, Source("test/noise", None, "", "opsin")), dtype="fp32"
    )


def image(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "NUM_IMAGES", 15)


def outputs(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A file as a user runs it."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda images: dict(zip(names, session.run(None, {"images": images}), strict=True))
    if path.suffix == ".xml":
        return openvino.read(path)
    run: Any = torch.export.load(path).module()
    return lambda images: {name: value.detach().numpy() for name, value in run(torch.from_numpy(images)).items()}


def check(path: Path, classifier: Classifier, share: float, pixels_share: float = 0.0) -> None:
    """Every size, in batches of 1, 3 and 7, from one loaded file."""
    run = outputs(path)
    model: Any = classifier.model
    for count, size in zip((1, 3, 7, 1, 3, 1, 1), SIZES, strict=True):
        images = np.stack([image((size[0], size[1]))] * count)
        images[-1] = images[-1, ::-1]
        with torch.inference_mode():
            resized = [classifier.preprocess.resize(Image.fromarray(one)) for one in images]
            right = model(classifier.preprocess.normalise_batch(resized)).numpy()
        found = run(images)
        bar = share * np.abs(right).max()
        if classifier.labels is None:
            assert set(found) - {"pixels"} == {"features"}
            np.testing.assert_allclose(found["features"], right, rtol=0, atol=bar)
            continue
        assert set(found) - {"pixels"} == {"probabilities", "logits"}
        np.testing.assert_allclose(found["logits"], right, rtol=0, atol=bar)
        logits = torch.from_numpy(found["logits"])
        scores = logits.sigmoid() if classifier.labels.multi_label else logits.softmax(dim=1)
        np.testing.assert_allclose(found["probabilities"], scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", slow_but(MODELS, "perceiver of pixels", "learned perceiver"))
def test_networks_in_onnx(name: str) -> None:
    classifier = noisy(MODELS[name])
    import onnxruntime

    module = archive.Network(classifier.model, (24, 40))
    graph = onnx._graph(module, torch.zeros(2, 3, 24, 40), (0,), "pixels", "logits")
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 3, 7):
        pixels = torch.randn(count, 3, 24, 40)
        with torch.inference_mode():
            right = classifier.model(pixels)
        found = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        torch.testing.assert_close(found, right, rtol=0, atol=1e-4 * float(right.abs().max()))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Classifier, exports.Exported]]:
    """A classifier and its file in a format, made once."""

    @cache
    def make(to: str) -> tuple[Classifier, exports.Exported]:
        classifier = noisy(MODELS["distilled"], multi_label=to == "torch")
        path = tmp_path_factory.mktemp(to) / f"m{exports.SUFFIXES[to]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exports, "NUM_IMAGES", 15)
            return classifier, exports.export(classifier, path, to=to)

    return make


@pytest.mark.parametrize(("to", "share", "files"), [
    ("onnx", 1e-4, ["m.onnx"]), ("torch", 1e-4, ["m.pt2"]), ("openvino", 0.02, ["m.bin", "m.xml"]),
])  # fmt: skip
def test_a_whole_file(to: str, share: float, files: list[str], exported: Any) -> None:
    """OpenVINO's bytes may be one off, and so its logits further."""
    classifier, done = exported(to)
    assert done.comparison.images == 17 and done.comparison.network_drift_relative < 1e-5
    assert done.comparison.pixels_drift_max <= (1.01 if to == "openvino" else 0)
    written = sorted(done.path.parent.iterdir())
    assert [path.name for path in written] == files and done.bytes == sum(path.stat().st_size for path in written)
    check(done.path, classifier, share)


@pytest.mark.parametrize("name", ["mean, other positions", "map, no head", "perceiver"])
def test_openvino(name: str, tmp_path: Path) -> None:
    classifier = noisy(MODELS[name])
    done = exports.export(classifier, tmp_path / "m.xml", to="openvino")
    assert done.comparison is not None and done.comparison.network_drift_relative < 1e-5
    check(tmp_path / "m.xml", classifier, 0.02)


def test_an_archive_needs_no_opsin(exported: Any) -> None:
    code = (
        "import sys, torch\n"
        f"run = torch.export.load({str(exported('torch')[1].path)!r}).module()\n"
        "print(sorted(run(torch.zeros(2, 33, 20, 3, dtype=torch.uint8))), 'opsin' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "['logits', 'probabilities'] False\n"


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_are_those_of_preprocess(name: str) -> None:
    """To the bit, at every size."""
    config = CONFIGS[name]
    graph = Pixels(config)
    for size in SIZES:
        pixels = image(size)
        right = config.resize(Image.fromarray(pixels))
        found = graph.resize(torch.from_numpy(pixels)[None])[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, right)
        np.testing.assert_array_equal(graph(torch.from_numpy(pixels)[None])[0], config.normalise(right))


@pytest.mark.parametrize("name", slow_but(CONFIGS, "source crop", "opencv"))
def test_pixels_in_the_runtimes(name: str) -> None:
    config = CONFIGS[name]
    graph = Pixels(config)
    example = torch.zeros(2, 50, 70, 3, dtype=torch.uint8)
    import onnxruntime

    front = onnx._graph(graph, example, (0, 1, 2), "images", "pixels")
    session = onnxruntime.InferenceSession(front.SerializeToString(), providers=["CPUExecutionProvider"])
    engine = openvino.engine
    compiled = engine._core().compile_model(
        openvino._converted(engine._import("openvino"), graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    steps = np.array(config.std or (1, 1, 1)).reshape(3, 1, 1) / (config.rescale_factor or 1)
    for size in SIZES:
        images = image(size)[None]
        right = graph(torch.from_numpy(images)).numpy()
        np.testing.assert_array_equal(session.run(None, {"images": images})[0], right)
        off = np.abs(compiled(images)[0] - right) * steps
        assert off.max() < 1.01 and (off > 0.5).mean() < 0.02


@pytest.mark.parametrize("to", exports.SUFFIXES)
def test_metadata(to: str, exported: Any) -> None:
    classifier, done = exported(to)
    path = done.path
    if to == "onnx":
        import onnx as package

        model = package.load(path)
        package.checker.check_model(model, full_check=True)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [
            "batch", "height", "width", 3,
        ]  # fmt: skip
        assert [output.name for output in model.graph.output] == ["probabilities", "logits"]
    elif to == "openvino":
        graph = openvino.engine._core().read_model(path)
        facts = {key: graph.get_rt_info(["opsin", key]).value for key in exports._metadata(classifier, "fp32")}
    else:
        extra = {archive.METADATA: ""}
        torch.export.load(path, extra_files=extra)
        facts = json.loads(extra[archive.METADATA])
    assert json.loads(facts["labels"]) == [f"Klasse {i} ü" for i in range(7)]
    assert PreprocessConfig.from_spec(json.loads(facts["preprocess"])) == SQUASH
    assert facts["preprocess_hash"] == SQUASH.hash() and facts["name"] == "test/noise" and facts["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("to", "dtype"),
    [("onnx", "int8"), ("openvino", "fp16"), *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("onnx", "fp16"), ("openvino", "int8"), ("torch", "fp16")))],
)  # fmt: skip
def test_small_types(to: str, dtype: str, tmp_path: Path) -> None:
    """Logits of a network of noise say little of its labels: here a file is only smaller, runs and is near."""
    classifier = noisy(ViTConfig(**VIT | {"embed_dim": 96, "mlp_dim": 384}))
    images = list(varied(photos(), 24))
    done = exports.export(
        classifier, tmp_path / f"m{exports.SUFFIXES[to]}", to=to, dtype=dtype, images=images, tolerance=0.5
    )
    weights = 4 * sum(parameter.numel() for parameter in classifier.model.parameters())
    assert done.comparison is not None and 1e-5 < done.comparison.network_drift_relative < 0.3
    assert done.bytes < 0.9 * weights


@pytest.mark.slow
def test_weights_beside_a_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "ONE_FILE", 1000)
    classifier = noisy(ViTConfig(**VIT | {"embed_dim": 48}))
    done = exports.export(classifier, tmp_path / "m.onnx", to="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert done.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    check(tmp_path / "m.onnx", classifier, 1e-4)


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, path = noisy(MODELS["vit"]), tmp_path / "m.pt2"
    path.write_bytes(b"what was there")

    class Wrong(archive.Network):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels) * 1.001

    with monkeypatch.context() as patch:
        patch.setattr(archive, "Network", Wrong)
        with pytest.raises(
            ExportError, match=r"the torch file does not compute what the model does: .* 1e-04 is allowed"
        ):
            exports.export(classifier, path, to="torch")
    monkeypatch.setattr(exports, "_write", nonsense)
    with pytest.raises(ExportError, match=r"of 17 images .* 99.0% is asked for.*Take fp32.*--tolerance [01]\."):
        exports.export(classifier, path, to="torch", dtype="fp16")
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"] and path.read_bytes() == b"what was there"


def nonsense(_: Path, classifier: Classifier, pixels: Pixels, *__: object) -> Callable[..., dict[str, np.ndarray]]:
    """For `_write`: it writes nothing, and what runs gives a label that the model never does."""

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        batch = pixels(torch.from_numpy(images))
        with torch.inference_mode():
            return {"logits": -classifier.model(batch).numpy(), "pixels": batch.numpy()}

    return run


def test_comparison_tells_pixels_from_network() -> None:
    classifier = noisy(MODELS["vit"])
    graph = Pixels(SQUASH)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = graph(torch.from_numpy(images))
        pixels[:, 1, 3, 5] += 2 / 127.5
        return {"pixels": pixels.numpy(), "logits": classifier.model(pixels).numpy()}

    found = compare(run, classifier.model, SQUASH, photos())
    assert found.images == 5 and found.pixels_drift_max == pytest.approx(2, abs=0.01)
    assert found.pixels_drift_share == pytest.approx(1 / (3 * 24 * 40))
    assert found.network_drift_relative == 0 and found.drift_max > 0


def test_images_of_the_check_are_of_all_kinds() -> None:
    sizes = [part.size for part in varied(photos(), 100)]
    assert len(sizes) == 100 and len(set(sizes)) > 75
    assert {width for width, _ in sizes} & {1} and {height for _, height in sizes} & {1}
    assert max(map(max, sizes)) > 800 and sum(max(size) < 49 for size in sizes) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onxx"}, r'to is "onxx"\. Did you mean "onnx"\? Known: onnx, openvino, torch, transformers, timm'),
        ({"to": "torch", "dtype": "int8"}, r'dtype is "int8"; torch has fp32, fp16\.'),
        ({"to": "timm", "dtype": "fp16"}, r'dtype is "fp16"; timm has fp32\.'),
        ({"to": "openvino"}, r'"m.onnx" is no name for openvino; its files end in \.xml\.'),
        ({"to": "onnx", "dtype": "int8"}, r"int8 needs images like those to come, .*--images PHOTOS"),
        ({"to": "onnx", "tolerance": 1.5}, r"tolerance is 1\.5; it is a share of the images, 0 to 1"),
        ({"to": "timm", "images": ["a.jpg"]}, "images are of no use: timm holds the weights as they are"),
        ({"to": "opsin", "tolerance": 0.1}, "tolerance is of no use: opsin holds the weights as they are"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        exports.export(noisy(MODELS["vit"]), tmp_path / "m.onnx", **options)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a str cannot be exported: classifiers and embedders of images can"):
        exports.export("text", tmp_path / "m.onnx", to="onnx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='the folder ".*nowhere" does not exist'):
        exports.export(noisy(MODELS["vit"]), tmp_path / "nowhere" / "m.onnx", to="onnx")
    with pytest.raises(ExportError, match="none of 1 images can be read. The first: missing.jpg: no such file"):
        exports.export(noisy(MODELS["vit"]), tmp_path / "m.onnx", to="onnx", images=["missing.jpg"])
    for config, message in (
        (PreprocessConfig(size=(24, 40), resample="nearest"), 'resample "nearest" has no exact form as a graph'),
        (
            PreprocessConfig(source_crop=(0.29, 1), size=(24, 40)),
            "source_crop has 0.29: a graph crops",
        ),
    ):
        with pytest.raises(ExportError, match=message):
            Pixels(config)
    classifier = noisy(MODELS["vit"])
    classifier.model = VT(VTConfig(image_size=(64, 64), num_modules=0, width=8, num_classes=7))
    for to, name in (("onnx", "m.onnx"), ("torch", "m.pt2")):
        with pytest.raises(ExportError, match=r"a VT cannot be written as a graph; .* weights can be: opsin\."):
            exports.export(classifier, tmp_path / name, to=to)
    exports.export(classifier, tmp_path / "vt", to="opsin")
    assert load(tmp_path / "vt").model.state_dict().keys() == classifier.model.state_dict().keys()


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is not installed.*opsin\[onnx\]"):
        exports.export(noisy(MODELS["vit"]), tmp_path / "m.onnx", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.pipeline.load", lambda *_, **__: noisy(ViTConfig(**VIT)))
    run = CliRunner().invoke
    done = run(command, ["--to", "torch", "--out", str(tmp_path / "m.pt2")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["images"] == 17 and record["agreement"] == 1 and record["pixels_drift_max"] == 0
    done = run(command, ["--to", "transformers", "--out", str(tmp_path / "theirs")])
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["dtype"] == "fp32" and record["bytes"] > (tmp_path / "theirs" / "config.json").stat().st_size
    odd = os.fsdecode(tmp_path / "\n".join(("a", "b"))) + "\udcff"  # a name that is no UTF-8
    done = run(command, ["--to", "opsin", "--out", odd], catch_exceptions=False)
    assert json.loads(done.stdout.splitlines()[-1])["path"] == odd
    (tmp_path / "none").mkdir()
    wrong = run(command, ["--to", "torch", "--images", str(tmp_path / "none"), "--out", str(tmp_path / "m2.pt2")])
    assert wrong.exit_code == 2 and "Invalid value for --images: no images in" in wrong.output
    wrong = run(command, ["--to", "timm", "--tolerance", "0.1", "--out", str(tmp_path / "m2")])
    assert wrong.exit_code == 2 and "Invalid value for --tolerance: tolerance is of no use" in wrong.output
    monkeypatch.setattr(exports, "_write", nonsense)
    wrong = run(command, ["--to", "torch", "--dtype", "fp16", "--out", str(tmp_path / "wrong.pt2")])
    assert wrong.exit_code == 1 and "99.0% is asked for" in wrong.output
    wrong = run(command, ["--to", "tensorrt", "--out", str(tmp_path / "m")])
    assert wrong.exit_code == 2 and "Invalid value for --to" in wrong.output
    wrong = run(command, ["--to", "onnx", "--out", str(tmp_path / "m.pb")])
    assert wrong.exit_code == 2 and "Invalid value for --out" in wrong.output
