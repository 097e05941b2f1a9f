"""compat against transformers in the same run, and the model card's snippet against a hub on loopback."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hub_server import HubServer
from opsin import compat
from opsin.errors import NoHead
from opsin.labels import Labels
from opsin.preprocess import PreprocessConfig

README = Path(__file__).parents[1] / "README.md"
HEADING = "## The model card's snippet\n"

CARD = """\
from transformers import ViTFeatureExtractor, ViTForImageClassification
from PIL import Image
import requests

url = 'http://images.cocodataset.org/val2017/000000039769.jpg'
image = Image.open(requests.get(url, stream=True).raw)

feature_extractor = ViTFeatureExtractor.from_pretrained('google/vit-large-patch16-224')
model = ViTForImageClassification.from_pretrained('google/vit-large-patch16-224')

inputs = feature_extractor(images=image, return_tensors="pt")
outputs = model(**inputs)
logits = outputs.logits
# model predicts one of the 1000 ImageNet classes
predicted_class_idx = logits.argmax(-1).item()
print("Predicted class:", model.config.id2label[predicted_class_idx])
"""


def card_snippet(readme_text: str) -> str:
    """The ```python block under the README's heading of the model card's snippet."""
    assert HEADING in readme_text, f"README has no {HEADING!r}"
    section = readme_text.split(HEADING, 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block, "no ```python block under the heading"
    return block[1]


def noise(model: Any) -> Any:
    """Every parameter: a zero bias or a unit norm would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def vit_config(num_labels: int = 5, image_size: int = 32, patch_size: int = 8) -> Any:
    config = transformers.ViTConfig(
        image_size=image_size, patch_size=patch_size, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, attn_implementation="eager",
    )  # fmt: skip
    config.id2label = {i: f"class {i}" for i in range(num_labels)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    return config


@pytest.fixture(scope="module")
def reference() -> Any:
    return noise(transformers.ViTForImageClassification(vit_config()))


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As save_pretrained leaves it."""
    path = tmp_path_factory.mktemp("vit")
    reference.save_pretrained(path)
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> compat.ViTForImageClassification:
    return compat.ViTForImageClassification.from_pretrained(folder)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same(ours: Any, theirs: Any) -> None:
    """Sums in another order: 1e-5 of values around one."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ── processor ────────────────────────────────────────────────────────────────────────────────────────────────────────


def photo(width: int = 50, height: int = 37, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
@pytest.mark.parametrize(
    "images", [photo(), [photo(), photo(61, 90, 1)], np.asarray(photo())], ids=["one", "list", "array"]
)
def test_pixels(images: Any, return_tensors: str | None, folder: Path) -> None:
    theirs = transformers.ViTImageProcessorPil.from_pretrained(folder)(images, return_tensors=return_tensors)
    for ours in (
        compat.ViTImageProcessor.from_pretrained(folder)(images, return_tensors=return_tensors),
        compat.ViTFeatureExtractor.from_pretrained(folder)(images=images, return_tensors=return_tensors),
    ):
        assert list(ours) == list(theirs)
        assert type(ours.pixel_values) is type(theirs.pixel_values)
        assert ours.pixel_values is ours["pixel_values"]
        for mine, other in zip(ours.pixel_values, theirs.pixel_values, strict=True):
            assert mine.dtype == other.dtype
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"height": 24, "width": 40}},
        {"size": 48, "resample": 3},
        {"do_resize": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ],
)
def test_fields_override(fields: dict[str, Any], folder: Path) -> None:
    """At construction, at loading and at the call."""
    theirs = transformers.ViTImageProcessorPil(**fields)(photo(), return_tensors="pt").pixel_values
    assert torch.equal(compat.ViTImageProcessor(**fields)(photo(), return_tensors="pt").pixel_values, theirs)
    theirs = transformers.ViTImageProcessorPil.from_pretrained(folder)(
        photo(), return_tensors="pt", **fields
    ).pixel_values
    processor = compat.ViTImageProcessor.from_pretrained(folder)
    assert torch.equal(processor(photo(), return_tensors="pt", **fields).pixel_values, theirs)
    processor = compat.ViTImageProcessor.from_pretrained(folder, **fields)
    assert torch.equal(processor.preprocess(photo(), return_tensors="pt").pixel_values, theirs)


def test_channels_first_or_last() -> None:
    """As transformers tells them apart; a batch is as many images."""
    processor = compat.ViTImageProcessor(size=16)
    expected = processor(photo(), return_tensors="pt").pixel_values
    last = np.asarray(photo())
    first = np.moveaxis(last, -1, 0)
    tensors = [torch.tensor(last), torch.tensor(first)]
    for image in [first, *tensors]:
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    for batch in (np.stack([first, first]), np.stack([last, last]), torch.stack([tensors[0]] * 2)):
        assert torch.equal(processor(batch, return_tensors="pt").pixel_values, expected.repeat(2, 1, 1, 1))


def test_processor_attributes_and_file(tmp_path: Path) -> None:
    processor = compat.ViTImageProcessor(size={"height": 24, "width": 40}, image_mean=0.25)
    assert processor.size == {"height": 24, "width": 40}
    assert processor.image_mean == [0.25, 0.25, 0.25]
    assert processor.resample == 2
    assert '"do_resize": true' in repr(processor)
    jax = compat.ViTImageProcessor()
    jax.preprocess_config = PreprocessConfig.jax_squash(32)  # transformers has no words for it
    assert '"antialias": false' in repr(jax)
    assert not hasattr(jax, "size")
    processor.save_pretrained(tmp_path)
    theirs = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)(photo(), return_tensors="pt").pixel_values
    assert torch.equal(processor(photo(), return_tensors="pt").pixel_values, theirs)


def test_inputs_move_and_cast() -> None:
    inputs = compat.ViTImageProcessor(size=16)(photo(), return_tensors="pt")
    assert inputs.to("cpu").to(torch.float16) is inputs
    assert inputs.pixel_values.dtype == torch.float16
    assert inputs.to("meta").pixel_values.device.type == "meta"
    with pytest.raises(AttributeError, match="no 'pixels' here; there is pixel_values"):
        _ = inputs.pixels


def test_processor_refuses() -> None:
    processor = compat.ViTImageProcessor()
    with pytest.raises(TypeError, match="unexpected argument 'colour'. An image processor has do_resize, size,"):
        compat.ViTImageProcessor(colour=True)
    with pytest.raises(ValueError, match='return_tensors is "tf". Known: "pt", "np", None'):
        processor(photo(), return_tensors="tf")
    with pytest.raises(ValueError, match="images of 37×50, 8×9 pixels cannot be stacked"):
        processor([photo(), photo(9, 8)], return_tensors="pt", do_resize=False)
    with pytest.raises(AttributeError, match="has no 'sizes'"):
        _ = processor.sizes


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_classifier_outputs(model: Any, reference: Any, pixels: torch.Tensor) -> None:
    """Everything asked for: same names, same order, same values; and the ways to take them."""
    asked = {"output_attentions": True, "output_hidden_states": True, "labels": torch.tensor([0, 4, 2])}
    ours, theirs = model(pixels, **asked), reference(pixels, **asked)
    assert list(ours) == list(theirs) == ["loss", "logits", "hidden_states", "attentions"]
    assert [len(ours.hidden_states), len(ours.attentions)] == [3, 2]
    for name in theirs:
        assert_same(ours[name], theirs[name])
    assert ours.logits is ours["logits"] is ours[1] is ours[:2][1] is ours.to_tuple()[1]
    plain, dropped = model(pixel_values=pixels), model(pixels, return_dict=False)
    assert list(plain) == list(reference(pixels)) == ["logits"]
    assert_same(plain.logits, theirs.logits)
    assert plain.loss is None
    assert plain.hidden_states is None
    assert type(dropped) is tuple
    assert_same(dropped[0], theirs.logits)
    with pytest.raises(AttributeError, match="no 'logit'. It has loss, logits, hidden_states, attentions"):
        _ = plain.logit


@torch.no_grad()
def test_outputs_asked_by_config(folder: Path, pixels: torch.Tensor) -> None:
    model = compat.ViTForImageClassification.from_pretrained(folder)
    model.config.output_hidden_states = True
    assert list(model(pixels)) == ["logits", "hidden_states"]
    assert list(model(pixels, output_hidden_states=False)) == ["logits"]


@pytest.mark.parametrize("kind", ["single", "multi", "regression"])
def test_losses_and_gradients(kind: str, pixels: torch.Tensor, tmp_path: Path) -> None:
    reference = noise(transformers.ViTForImageClassification(vit_config(1 if kind == "regression" else 5)))
    reference.save_pretrained(tmp_path)
    model = compat.ViTForImageClassification.from_pretrained(tmp_path)
    labels = {
        "single": torch.tensor([1, 0, 4]),
        "multi": torch.tensor([[0, 1, 0, 1, 1.0]] * 3),
        "regression": torch.tensor([0.5, -1, 2]),
    }[kind]
    ours, theirs = model(pixels, labels=labels).loss, reference(pixels, labels=labels).loss
    assert_same(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_same(model.model.pos_embed.grad, reference.vit.embeddings.position_embeddings.grad)
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match='problem_type is "ranking". Known: "regression"'):
        model(pixels, labels=labels)


@torch.no_grad()
def test_other_sizes(model: Any, reference: Any) -> None:
    larger = torch.randn(2, 3, 48, 40)
    ours = model(larger, interpolate_pos_encoding=True).logits
    assert_same(ours, reference(larger, interpolate_pos_encoding=True).logits)
    with pytest.raises(ValueError, match="pixel_values are 48×40; the positions of this model are for 32×32"):
        model(larger)


def test_config(model: Any, reference: Any) -> None:
    theirs = reference.config
    for name in set(model.config.to_dict()) - {"problem_type"}:
        assert getattr(model.config, name) == getattr(theirs, name), name
    assert model.config.id2label[3] == "class 3"
    assert model.config.label2id["class 3"] == 3
    assert model.config.num_labels == 5
    assert '"hidden_size": 24' in repr(model.config)


def test_is_a_module(model: Any, reference: Any, folder: Path) -> None:
    assert not model.training
    assert model.dtype == torch.float32
    assert model.device == torch.device("cpu")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in reference.parameters())
    moved = compat.ViTForImageClassification.from_pretrained(str(folder)).to("meta")
    assert moved.device.type == "meta"
    half = compat.ViTForImageClassification.from_pretrained(folder).to(torch.bfloat16)
    assert half(torch.zeros(1, 3, 32, 32)).logits.dtype == torch.bfloat16  # float pixels are cast, as in transformers


@torch.no_grad()
@pytest.mark.parametrize("pooler", [True, False])
def test_encoder(pooler: bool, pixels: torch.Tensor, tmp_path: Path) -> None:
    reference = noise(transformers.ViTModel(vit_config(), add_pooling_layer=pooler))
    reference.save_pretrained(tmp_path)
    model = compat.ViTModel.from_pretrained(tmp_path)
    ours, theirs = model(pixels, output_attentions=True), reference(pixels, output_attentions=True)
    assert list(ours) == list(theirs)
    for name in theirs:
        assert_same(ours[name], theirs[name])
    assert (ours.pooler_output is not None) == pooler
    assert_same(model(pixels, return_dict=False)[0], theirs[0])
    with pytest.raises(NoHead, match="has no classification head. Use ViTModel"):
        compat.ViTForImageClassification.from_pretrained(tmp_path)


@torch.no_grad()
def test_encoder_of_a_classifier(reference: Any, folder: Path, pixels: torch.Tensor, tmp_path: Path) -> None:
    """The head goes; no pooler is invented."""
    model = compat.ViTModel.from_pretrained(folder)
    output = model(pixels)
    assert_same(output.last_hidden_state, reference.vit(pixels).last_hidden_state)
    assert output.pooler_output is None
    model.save_pretrained(tmp_path)
    again = transformers.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same(output[0], again.eval()(pixels)[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["DeiT", "Dinov2", "Dinov2WithRegisters"])
def test_heads_of_other_families(family: str, pixels: torch.Tensor, tmp_path: Path) -> None:
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = getattr(transformers, f"{family}Config")(**shape, num_labels=5)
    teacher = "WithTeacher" if family == "DeiT" else ""
    reference = noise(getattr(transformers, f"{family}ForImageClassification{teacher}")(config))
    reference.save_pretrained(tmp_path)
    ours = compat.ViTForImageClassification.from_pretrained(tmp_path)(pixels).logits
    assert_same(ours, reference(pixels).logits)
    encoder = compat.ViTModel.from_pretrained(tmp_path)
    expected = getattr(reference, reference.base_model_prefix)(pixels).last_hidden_state
    assert_same(encoder(pixels).last_hidden_state, expected)
    encoder.save_pretrained(tmp_path / "encoder")
    again = getattr(transformers, f"{family}Model").from_pretrained(tmp_path / "encoder")
    assert_same(again.eval()(pixels).last_hidden_state, expected)


@torch.no_grad()
def test_save_pretrained(model: Any, pixels: torch.Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert_same(model(pixels).logits, again.eval()(pixels).logits)
    assert again.config.id2label == model.config.id2label
    processor = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)
    assert dict(processor.size) == {"height": 32, "width": 32}


# ── the model card ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_import_line_is_changed() -> None:
    snippet = card_snippet(README.read_text(encoding="utf-8"))
    assert snippet == CARD.replace("from transformers import", "from opsin.compat import")


def test_the_cards_snippet_runs(tmp_path: Path) -> None:
    """In a new process, from the hub's id to the printed label; weights and photo come over HTTP from loopback."""
    snippet = card_snippet(README.read_text(encoding="utf-8"))
    config = vit_config(image_size=224, patch_size=16)
    config.id2label = dict(enumerate(Labels.imagenet_1k().names))
    config.label2id = {name: i for i, name in config.id2label.items()}
    reference = noise(transformers.ViTForImageClassification(config))
    reference.save_pretrained(tmp_path / "model")
    processor = transformers.ViTImageProcessorPil()
    processor.save_pretrained(tmp_path / "model")
    jpeg = io.BytesIO()
    photo(640, 480).save(jpeg, "jpeg")
    with torch.no_grad():
        logits = reference(**processor(Image.open(jpeg), return_tensors="pt")).logits
    with HubServer() as hub:
        commit = hub.add("google/vit-large-patch16-224", tmp_path / "model")
        hub.web["http://images.cocodataset.org/val2017/000000039769.jpg"] = jpeg.getvalue()
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_"))}
        env |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "DO_NOT_TRACK": "1"}
        env |= {"http_proxy": hub.endpoint, "no_proxy": "127.0.0.1,localhost"}

        def run(code: str, **more: str) -> str:
            done = subprocess.run(
                [sys.executable, "-c", code], env=env | more, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        expected = f"Predicted class: {config.id2label[logits.argmax(-1).item()]}\n"
        assert run(snippet) == expected
        assert len(hub.bodies("model.safetensors")) == 1
        requested = [request.path for request in hub.requests if request.method == "GET"]
        assert "http://images.cocodataset.org/val2017/000000039769.jpg" in requested
        # and pinned to a revision, by then without a hub
        pinned = snippet.replace("-224')", f"-224', revision='{commit}')")
        assert pinned.count(commit) == 2
        assert run(pinned, HF_HUB_OFFLINE="1") == expected
