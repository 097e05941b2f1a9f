"""compat's Perceivers against transformers in the same run, and the documented snippets against a hub on loopback."""

import io
import os
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
from opsin.errors import CheckpointError, NoHead, UnknownModel
from test_compat import HEADING, README, assert_same, noise, photo

ENCODER: dict[str, Any] = {
    "num_latents": 6,
    "d_latents": 16,
    "num_blocks": 2,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
    "self_attention_widening_factor": 2,
    "cross_attention_widening_factor": 3,
    "attention_probs_dropout_prob": 0.0,
}

CARD = """\
from transformers import PerceiverFeatureExtractor, PerceiverForImageClassificationConvProcessing
import requests
from PIL import Image

feature_extractor = PerceiverFeatureExtractor.from_pretrained("deepmind/vision-perceiver-conv")
model = PerceiverForImageClassificationConvProcessing.from_pretrained("deepmind/vision-perceiver-conv")

url = "http://images.cocodataset.org/val2017/000000039769.jpg"
image = Image.open(requests.get(url, stream=True).raw)

# prepare input
inputs = feature_extractor(image, return_tensors="pt").pixel_values
# forward pass
outputs = model(inputs)
logits = outputs.logits
print("Predicted class:", model.config.id2label[logits.argmax(-1).item()])
"""

OTHERS = """\
import torch
from transformers import PerceiverForMaskedLM, PerceiverForMultimodalAutoencoding, PerceiverForOpticalFlow
from transformers import PerceiverForImageClassificationFourier, PerceiverForImageClassificationLearned
from transformers import PerceiverImageProcessor, PerceiverTokenizer

torch.manual_seed(0)
values = []
processor = PerceiverImageProcessor.from_pretrained("deepmind/vision-perceiver-learned")
image = torch.randint(256, (3, 300, 260), dtype=torch.uint8)
inputs = processor(images=image, return_tensors="pt").pixel_values
for kind, name in (
    (PerceiverForImageClassificationLearned, "deepmind/vision-perceiver-learned"),
    (PerceiverForImageClassificationFourier, "deepmind/vision-perceiver-fourier"),
):
    model = kind.from_pretrained(name)
    values.append(model(inputs=inputs).logits)

tokenizer = PerceiverTokenizer.from_pretrained("deepmind/language-perceiver")
model = PerceiverForMaskedLM.from_pretrained("deepmind/language-perceiver")
encoding = tokenizer("This is an incomplete sentence where some words are missing.", padding="max_length",
                     return_tensors="pt")
encoding["input_ids"][0, 52:61] = tokenizer.mask_token_id
with torch.no_grad():
    values.append(model(**encoding).logits[:, :62])
print(repr(tokenizer.decode(values[-1][0, 52:61].argmax(dim=-1).tolist())))

model = PerceiverForOpticalFlow.from_pretrained("deepmind/optical-flow-perceiver")
with torch.no_grad():
    values.append(model(inputs=torch.randn(1, 2, 27, 368, 496)).logits)

model = PerceiverForMultimodalAutoencoding.from_pretrained("deepmind/multimodal-perceiver")
inputs = {"image": torch.randn(1, 16, 3, 224, 224), "audio": torch.randn(1, 30720, 1), "label": torch.zeros(1, 700)}
points = {"image": torch.arange(6272, 12544), "audio": torch.arange(15, 30), "label": None}
with torch.no_grad():
    logits = model(inputs=inputs, subsampled_output_points=points).logits
values += [logits["image"], logits["audio"], logits["label"]]
torch.save([value.detach() for value in values], OUT)
"""


def fill(model: Any) -> Any:
    """Noise also where batch norm keeps what it saw."""
    noise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def labels(num: int) -> dict[str, Any]:
    return {"id2label": {i: f"class {i}" for i in range(num)}, "label2id": {f"class {i}": i for i in range(num)}}


def conv(num_labels: int = 5) -> Any:
    config = transformers.PerceiverConfig(**ENCODER, d_model=322, **labels(num_labels))
    return fill(transformers.PerceiverForImageClassificationConvProcessing(config))


def learned(image_size: int = 12) -> Any:
    config = transformers.PerceiverConfig(**ENCODER, d_model=512, image_size=image_size, **labels(5))
    return fill(transformers.PerceiverForImageClassificationLearned(config))


def fourier() -> Any:
    config = transformers.PerceiverConfig(**ENCODER, d_model=261, **labels(5))
    return fill(transformers.PerceiverForImageClassificationFourier(config))


def text(max_length: int = 40) -> Any:
    config = transformers.PerceiverConfig(
        **ENCODER | {"num_cross_attention_heads": 8}, d_model=24, qk_channels=8, v_channels=16,
        max_position_embeddings=max_length,
    )  # fmt: skip
    return fill(transformers.PerceiverForMaskedLM(config))


def flow(train_size: tuple[int, int] = (10, 14)) -> Any:
    config = transformers.PerceiverConfig(**ENCODER, d_model=322, train_size=list(train_size))
    return fill(transformers.PerceiverForOpticalFlow(config))


def multimodal() -> Any:
    config = transformers.PerceiverConfig(
        **ENCODER, d_model=704, num_frames=16, audio_samples_per_frame=1920, samples_per_patch=16,
        output_shape=[1, 16, 224, 224], output_num_channels=16, image_size=40, **labels(700),
    )  # fmt: skip
    return fill(transformers.PerceiverForMultimodalAutoencoding(config))


def saved(reference: Any, folder: Path) -> Path:
    reference.save_pretrained(folder)
    transformers.PerceiverImageProcessorPil().save_pretrained(folder)
    return folder


def assert_outputs_equal(ours: Any, theirs: Any) -> None:
    assert list(ours) == list(theirs)
    for name in theirs:
        if isinstance(theirs[name], tuple):
            assert len(ours[name]) == len(theirs[name])
            for our, their in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5, msg=name)
        else:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


# ── processors ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fields", [{}, {"resample": 2}, {"size": {"height": 64, "width": 64}}])
def test_pixels(fields: dict[str, Any]) -> None:
    image = photo(130, 97)
    theirs = transformers.PerceiverImageProcessorPil(**fields)(image, return_tensors="pt").pixel_values
    assert torch.equal(compat.PerceiverFeatureExtractor(**fields)(image, return_tensors="pt").pixel_values, theirs)


def test_a_processor_of_another_class_is_read(tmp_path: Path) -> None:
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    processor = compat.PerceiverImageProcessor.from_pretrained(tmp_path)
    assert processor.size == {"height": 32, "width": 32}
    assert isinstance(processor, compat.PerceiverImageProcessor)


TEXTS = ["Now [MASK][MASK] is", "grüße 你好 🙂", "", "[CLS]a[SEP][PAD]b[BOS][EOS]"]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"padding": True}, {"padding": "max_length", "max_length": 30}, {"truncation": True, "max_length": 7},
     {"add_special_tokens": False}, {"padding": "longest", "return_tensors": "pt"},
     {"padding": True, "return_tensors": "np"}],
)  # fmt: skip
def test_tokenizer(arguments: dict[str, Any]) -> None:
    theirs, ours = (
        transformers.PerceiverTokenizer()(TEXTS, **arguments),
        compat.PerceiverTokenizer()(TEXTS, **arguments),
    )
    assert set(ours) == set(theirs)
    for name in theirs:
        assert type(ours[name]) is type(theirs[name])
        assert np.array_equal(ours[name], theirs[name]) if "return_tensors" in arguments else ours[name] == theirs[name]


def test_tokenizer_of_one_text() -> None:
    theirs, ours = transformers.PerceiverTokenizer(), compat.PerceiverTokenizer()
    assert ours(TEXTS[1])["input_ids"] == theirs(TEXTS[1])["input_ids"]
    assert ours(TEXTS[1], return_tensors="pt").input_ids.tolist() == [theirs(TEXTS[1])["input_ids"]]
    ids = theirs.encode(TEXTS[0])
    assert ours.encode(TEXTS[0]) == ids
    for skip in (False, True):
        assert ours.decode(torch.tensor(ids), skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.tokenize(TEXTS[1]) == theirs.tokenize(TEXTS[1])
    assert ours.convert_tokens_to_ids(["[MASK]", "a"]) == theirs.convert_tokens_to_ids(["[MASK]", "a"])
    assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert ours.batch_decode([ids, ids]) == [TEXTS[0].join(["[CLS]", "[SEP]"])] * 2
    assert (ours.mask_token_id, ours.pad_token_id, ours.vocab_size, len(ours)) == (
        theirs.mask_token_id, theirs.pad_token_id, theirs.vocab_size, len(theirs),
    )  # fmt: skip
    assert ours.model_max_length == theirs.model_max_length


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"max_length": 1, "truncation": True}, r"max_length is 1; \[CLS\] and \[SEP\] alone take 2"),
     ({"padding": "wide"}, 'padding is "wide"'), ({"return_tensors": "tf"}, 'return_tensors is "tf"'),
     ({"return_tensors": "pt"}, "different lengths cannot be stacked: use padding=True")],
)  # fmt: skip
def test_tokenizer_refuses(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        compat.PerceiverTokenizer()(["a", "bc"], **arguments)


def test_tokenizer_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="no such file or folder"):
        compat.PerceiverTokenizer.from_pretrained(tmp_path / "none" / "here")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": null}')
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        compat.PerceiverTokenizer.from_pretrained(tmp_path)


def test_tokenizer_file(tmp_path: Path) -> None:
    compat.PerceiverTokenizer(100).save_pretrained(tmp_path)
    assert compat.PerceiverTokenizer.from_pretrained(tmp_path).model_max_length == 100
    assert transformers.PerceiverTokenizer.from_pretrained(tmp_path).model_max_length == 100


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CLASSES = {
    "conv": (conv, compat.PerceiverForImageClassificationConvProcessing, (2, 3, 40, 52)),
    "fourier": (fourier, compat.PerceiverForImageClassificationFourier, (2, 3, 9, 13)),
    "learned": (learned, compat.PerceiverForImageClassificationLearned, (2, 3, 12, 12)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_image_classifiers(name: str, tmp_path: Path) -> None:
    make, kind, shape = CLASSES[name]
    reference, pixels = make(), torch.randn(*shape)
    model: Any = kind.from_pretrained(saved(reference, tmp_path / "model"))
    asked: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        for arguments in (asked, {}, {"labels": torch.tensor([1, 4])}):
            assert_outputs_equal(model(pixels, **arguments), reference(inputs=pixels, **arguments))
        by_name = model(pixel_values=pixels, return_dict=False)[0]
        torch.testing.assert_close(by_name, reference(pixel_values=pixels, return_dict=False)[0], rtol=1e-4, atol=1e-4)
    expected = reference.config.to_dict()
    given = model.config.to_dict()
    for field in ENCODER.keys() | {"qk_channels", "v_channels", "hidden_act", "use_query_residual", "id2label"}:
        assert given[field] == expected[field], field
    assert model.config.num_labels == reference.config.num_labels
    assert model.config.d_model == reference.config.d_model
    with pytest.raises(AttributeError, match="config has no 'patch_size'. It has model_type"):
        _ = model.config.patch_size
    model.save_pretrained(tmp_path / "again")
    again = type(reference).from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(inputs=pixels).logits, reference(inputs=pixels).logits)


def test_learned_positions_at_another_size(tmp_path: Path) -> None:
    reference = learned()
    model: Any = compat.PerceiverForImageClassificationLearned.from_pretrained(saved(reference, tmp_path))
    pixels = torch.randn(1, 3, 16, 20)
    with pytest.raises(ValueError, match="16×20; the positions of this model are for 12×12"):
        model(pixels)
    with torch.no_grad():
        theirs = reference(inputs=pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model(pixels, interpolate_pos_encoding=True).logits, theirs, rtol=1e-4, atol=1e-4)


def test_masked_language_model(tmp_path: Path) -> None:
    reference = text()
    model: Any = compat.PerceiverForMaskedLM.from_pretrained(saved(reference, tmp_path))
    batch = compat.PerceiverTokenizer()(["one [MASK]wo", "three four"], padding="max_length", max_length=40,
                                        return_tensors="pt")  # fmt: skip
    labels_ = torch.where(batch.attention_mask.bool(), batch.input_ids, -100)
    with torch.no_grad():
        for arguments in ({"labels": labels_}, {"output_attentions": True, "output_hidden_states": True}):
            assert_outputs_equal(model(**batch, **arguments), reference(**batch, **arguments))
    with pytest.raises(ValueError, match="41 tokens; this model takes up to 40"):
        model(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="give either inputs or input_ids"):
        model()


def test_optical_flow(tmp_path: Path) -> None:
    reference = flow()
    model: Any = compat.PerceiverForOpticalFlow.from_pretrained(saved(reference, tmp_path))
    patches = torch.randn(1, 2, 27, 10, 14)
    asked: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        assert_outputs_equal(model(inputs=patches, **asked), reference(inputs=patches, **asked))
    assert model.config.train_size == [10, 14]


def test_multimodal_wants_to_know_what_to_decode(tmp_path: Path) -> None:
    model: Any = compat.PerceiverForMultimodalAutoencoding.from_pretrained(saved(multimodal(), tmp_path))
    assert (model.config.num_labels, model.config.image_size) == (700, 40)
    with pytest.raises(ValueError, match='subsampled_output_points needs "image" and "audio"'):
        model(inputs={"image": torch.zeros(1, 16, 3, 224, 224), "audio": torch.zeros(1, 30720, 1)})


def test_another_class_is_named(tmp_path: Path) -> None:
    folder = saved(fourier(), tmp_path)
    with pytest.raises(CheckpointError, match='has the front end "pixels", PerceiverForImageClassificationConv'):
        compat.PerceiverForImageClassificationConvProcessing.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="is a ImagePerceiver, not a TextPerceiver. opsin.load takes it"):
        compat.PerceiverForMaskedLM.from_pretrained(folder)


# ── the snippets ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_the_import_line_is_changed() -> None:
    section = README.read_text(encoding="utf-8").split(HEADING, 1)[1].split("\n## ", 1)[0]
    assert CARD.replace("from transformers import", "from opsin.compat import") in section


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    with HubServer() as server:
        yield server


def run(code: str, hub: HubServer, folder: Path) -> str:
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_"))}
    env |= {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": hub.endpoint, "DO_NOT_TRACK": "1"}
    env |= {"http_proxy": hub.endpoint, "no_proxy": "127.0.0.1,localhost"}
    code = code.replace("from transformers import", "from opsin.compat import")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_cards_snippet_runs(hub: HubServer, tmp_path: Path) -> None:
    reference = conv(1000)
    hub.add("deepmind/vision-perceiver-conv", saved(reference, tmp_path / "model"))
    jpeg = io.BytesIO()
    photo(640, 480).save(jpeg, "jpeg")
    hub.web["http://images.cocodataset.org/val2017/000000039769.jpg"] = jpeg.getvalue()
    pixels = transformers.PerceiverImageProcessorPil()(Image.open(jpeg), return_tensors="pt").pixel_values
    with torch.no_grad():
        best = reference(inputs=pixels).logits.argmax(-1).item()
    assert run(CARD, hub, tmp_path) == f"Predicted class: class {best}\n"


@pytest.mark.slow
def test_the_documented_snippets_run(hub: HubServer, tmp_path: Path) -> None:
    """In a new process with the import changed; the same code beside it on transformers itself."""
    for name, reference in (
        ("vision-perceiver-learned", learned(224)),
        ("vision-perceiver-fourier", fourier()),
        ("language-perceiver", text(2048)),
        ("optical-flow-perceiver", flow((368, 496))),
        ("multimodal-perceiver", multimodal()),
    ):
        hub.add(f"deepmind/{name}", saved(reference, tmp_path / name))
    ours = OTHERS.replace("OUT", repr(str(tmp_path / "ours.pt")))
    theirs = OTHERS.replace("OUT", repr(str(tmp_path / "theirs.pt"))).replace('"deepmind/', f'"{tmp_path}/')
    theirs = theirs.replace("import PerceiverImageProcessor,", "import PerceiverImageProcessorPil,")
    theirs = theirs.replace("processor = PerceiverImageProcessor.", "processor = PerceiverImageProcessorPil.")
    printed = run(ours, hub, tmp_path)
    spelled: dict[str, Any] = {}
    exec(theirs.replace("print(", "printed = ("), spelled)
    assert printed == spelled["printed"] + "\n"
    for our, their in zip(torch.load(tmp_path / "ours.pt"), torch.load(tmp_path / "theirs.pt"), strict=True):
        assert_same(our / their.abs().max(), their / their.abs().max())


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path) -> None:
    from opsin.checkpoints import write
    from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
    from opsin.preprocess import PreprocessConfig

    config = ImagePerceiverConfig(
        num_latents=3, latent_dim=8, num_blocks=1, layers_per_block=1, num_heads=2, image_size=(16, 16), num_bands=2,
        num_classes=0,
    )  # fmt: skip
    write(tmp_path, ImagePerceiver(config), PreprocessConfig(size=(16, 16)), None)
    with pytest.raises(NoHead, match="has no classification head"):
        compat.PerceiverForImageClassificationConvProcessing.from_pretrained(tmp_path)
