"""Every method finds the patch that decides; deletion and insertion agree; figures and texts; messages."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opsin.checkpoints import Checkpoint, Source
from opsin.errors import ImageNotFound, NoHead, NoMask
from opsin.explain import (
    METHODS,
    attention_distance,
    explain,
    explain_text,
    faithfulness,
    filters,
    find_class,
    heads,
    perturb,
    position_similarity,
)
from opsin.labels import Labels
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig, TextPerceiver, TextPerceiverConfig
from opsin.models.vit import ViT, ViTConfig
from opsin.pipeline import Classifier
from opsin.preprocess import PreprocessConfig
from opsin.text import TextModel

LABELS = Labels(("grey", "red, scarlet", "crane", "blue", "crane"), None, ("灰", "红", "", "", ""))


def of(model: Any, labels: Labels | None = LABELS, **preprocess: Any) -> Classifier:
    config = PreprocessConfig(**({"size": model.config.image_size} | preprocess))
    checkpoint = Checkpoint(
        model=model.eval(), preprocess=config, labels=labels, source=Source("test/planted", None, "", "opsin")
    )
    return Classifier(checkpoint, dtype="fp32")


# ── models made for it: class 1 if somewhere there is red, whatever the rest shows ───────────────────────────────────


def look_for_red(attn: Any, red: int, *, into: int) -> None:
    """All queries look where channel `red` is above the next one, and take the difference over to channel `into`."""
    for parameter in attn.parameters():
        nn.init.zeros_(parameter)
    attn.q.bias.data[0] = 4.0
    for weight, row, size in ((attn.k.weight, 0, 2.0), (attn.v.weight, 1, 1.0)):
        weight.data[row, red], weight.data[row, red + 1] = size, -size
    attn.out.weight.data[into, 1] = 1.0


@torch.no_grad()
def red_vit(**values: Any) -> Any:
    shape: dict[str, Any] = {
        "image_size": (16, 24),
        "patch_size": 4,
        "embed_dim": 8,
        "num_layers": 2,
        "num_heads": 1,
        "mlp_dim": 4,
    }
    model: Any = ViT(ViTConfig(**(shape | {"num_classes": 5} | values)))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.zeros_(parameter)
    model.patch_embed.weight[0, 0], model.patch_embed.weight[0, 1] = 1 / 16, -1 / 16  # red without green
    model.pos_embed[..., 4:] = torch.randn(model.pos_embed[..., 4:].shape, generator=torch.Generator().manual_seed(3))
    for layer in model.layers:
        look_for_red(layer.attn, 0, into=2)
    if model.attn_pool is not None:
        look_for_red(model.attn_pool.attn, 0, into=2)
    model.head.weight[1, 2] = 3.0
    return model


@torch.no_grad()
def red_perceiver(front_end: Any = "pixels") -> Any:
    config = ImagePerceiverConfig(
        front_end=front_end,
        image_size=(16, 24), num_latents=3, latent_dim=8, num_blocks=2, layers_per_block=1, num_heads=1, num_bands=1,
        max_resolution=(2, 2), embed_dim=4, num_classes=5,
    )  # fmt: skip
    model: Any = ImagePerceiver(config)
    for name, parameter in (*model.encoder.named_parameters(), *model.decoder.named_parameters()):
        if "norm" not in name:
            nn.init.zeros_(parameter)
    if front_end == "conv":
        nn.init.zeros_(model.front_end.stages[0].conv.weight)
        kernel = model.front_end.stages[0].conv.weight
        kernel[0, :2, :4, :4] = torch.tensor([1 / 16, -1 / 16])[:, None, None]  # 4 × 4 pixels, as wide as the square
    model.encoder.latents[:, 4:] = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    look_for_red(model.encoder.cross.attn, 0, into=2)
    look_for_red(model.encoder.layers[0].attn, 2, into=2)
    look_for_red(model.decoder.cross.attn, 2, into=2)
    model.decoder.out.weight[1, 2] = 3.0
    return model


def planted(place: tuple[int, int]) -> np.ndarray:
    """48 × 72 of grey noise with one red square of 12 × 12, its corner at `place` times 12."""
    picture = np.repeat(np.random.default_rng(5).integers(110, 146, (48, 72, 1), dtype=np.uint8), 3, axis=2)
    y, x = (12 * at for at in place)
    picture[y : y + 12, x : x + 12] = (250, 5, 120)
    return picture


PLANTED: dict[str, Callable[[], Any]] = {
    "vit": red_vit,
    "vit, mean": lambda: red_vit(class_token=False, pool="mean"),
    "vit, pool": lambda: red_vit(pool="map", num_registers=2),
    "vit, distilled": lambda: red_vit(distillation_token=True, distillation_head=False),
    "perceiver, pixels": red_perceiver,
    "perceiver, conv": lambda: red_perceiver("conv"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PLANTED)
def test_the_patch_that_decides_is_found(name: str, method: str) -> None:
    classifier = of(PLANTED[name]())
    for place in ((1, 4), (3, 0)):
        picture = planted(place)
        found = explain(classifier, picture, target="scarlet", method=method)
        image = found.on_image()
        y, x = np.unravel_index(np.nanargmax(image), image.shape)
        assert (int(y) // 12, int(x) // 12) == place
        assert image.shape == (48, 72)
        assert (found.target, found.label, found.method) == (1, "red, scarlet", method)
        assert found.score == pytest.approx(classifier(picture)[0]["score"])
        assert found.map.dtype == np.float32


@pytest.mark.parametrize("name", ["vit", "perceiver, conv"])
def test_faithful_maps_beat_random_ones(name: str) -> None:
    classifier, picture = of(PLANTED[name]()), planted((2, 3))
    found = faithfulness(classifier, picture, explain(classifier, picture, target=1, method="occlusion"), random_maps=3)
    assert found.deletion_auc < found.random_deletion_auc - 0.05
    assert found.shares.tolist() == np.linspace(0, 1, 17).tolist()
    score = explain(classifier, picture, target=1).score
    assert found.deletion[0] == found.insertion[-1] == pytest.approx(score)
    grey = np.full((48, 72, 3), 128, np.uint8)
    assert found.deletion[-1] == pytest.approx(explain(classifier, grey, target=1).score, abs=0.01)
    for curve, area in ((found.deletion, found.deletion_auc), (found.insertion, found.insertion_auc)):
        assert area == pytest.approx(sum(a + b for a, b in itertools.pairwise(curve)) / 32)
    worst = explain(classifier, picture, target=1, method="occlusion")
    reversed_map = type(worst)(**{name: getattr(worst, name) for name in worst.__slots__} | {"map": -worst.map})
    other = faithfulness(classifier, picture, reversed_map, random_maps=0)
    assert other.deletion_auc > found.random_deletion_auc
    assert other.insertion_auc < found.insertion_auc
    assert np.isnan(other.random_deletion_auc)
    with pytest.raises(ValueError, match="the image is 20 × 10 and the explanation is of one of 72 × 48. Give"):
        faithfulness(classifier, np.zeros((10, 20, 3), np.uint8), worst)
    with pytest.raises(ValueError, match="random_maps is -1; it must be 0 or more"):
        faithfulness(classifier, picture, worst, random_maps=-1)


class Redness(nn.Module):
    """No attention at all, and its cells can be counted: logit 1 is the red of the left half."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_channels=3, stride=1, num_classes=5, image_size=(16, 24), feature_dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        left = pixels[:, 0, :, :12].mean(dim=(1, 2))
        return torch.stack([left * 0, left, left * 0, left * 0, left * 0], dim=1)


def test_a_model_without_attention() -> None:
    """Occlusion, by hand; deletion by hand on floats, which a resize without antialiasing gives."""
    classifier = of(Redness(), antialias=False)
    picture = np.full((16, 24, 3), 255, np.uint8)
    found = explain(classifier, picture, target=1, method="occlusion")
    assert found.map.shape == (8, 8)

    def probability(left: float) -> float:
        return float(np.exp(left) / (4 + np.exp(left)))

    drop = np.log(probability(1)) - np.log(probability(1 - 1 / 32))
    assert found.map[:, :4] == pytest.approx(drop, rel=1e-4)
    assert found.map[:, 4:] == pytest.approx(0, abs=1e-6)
    measured = faithfulness(classifier, picture, found, random_maps=1)
    assert measured.deletion == pytest.approx([probability(1 - min(2 * share, 1)) for share in measured.shares])
    for method in ("relevance", "rollout", "attention"):
        with pytest.raises(ValueError, match=f'method "{method}" looks at .* is a Redness. method="occlusion" works'):
            explain(classifier, picture, method=method)
    with pytest.raises(ValueError, match="heads looks at the attention of a ViT or a Perceiver"):
        heads(classifier, picture)
    with pytest.raises(ValueError, match="attention_distance is for a ViT.* test/planted is a Redness"):
        attention_distance(classifier, [picture])
    with pytest.raises(ValueError, match="position_similarity is for a ViT or an image Perceiver, not for a Redness"):
        position_similarity(classifier.model)
    with pytest.raises(ValueError, match="filters are those of a ViT's patch embedding; this is a Redness"):
        filters(classifier.model)


# ── arguments ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_layers_and_heads() -> None:
    classifier, picture = of(red_vit(num_heads=2)), planted((0, 0))
    maps = heads(classifier, picture)
    assert maps.shape == (2, 2, 4, 6)
    last = explain(classifier, picture, method="attention")
    assert (last.layer, last.head) == (1, None)
    assert last.map == pytest.approx(maps[1].mean(axis=0))
    one = explain(classifier, picture, method="attention", layer=0, head=1)
    assert (one.layer, one.head) == (0, 1)
    assert np.array_equal(one.map, maps[0, 1])
    with pytest.raises(ValueError, match="no layer 2: this model has 2, 0 to 1"):
        explain(classifier, picture, method="attention", layer=2)
    with pytest.raises(ValueError, match="no layer -1: this model has 2"):
        explain(classifier, picture, method="attention", layer=-1)
    with pytest.raises(ValueError, match="no head 2: layer 1 of this model has 2, 0 to 1"):
        explain(classifier, picture, method="attention", head=2)
    with pytest.raises(ValueError, match='layer is for method "attention"; "rollout" takes all of them together'):
        explain(classifier, picture, method="rollout", layer=0)
    with pytest.raises(ValueError, match='head is for method "attention"; "relevance" takes'):
        explain(classifier, picture, head=0)
    perceiver = of(red_perceiver())
    assert heads(perceiver, picture).shape == (3, 1, 16, 24)  # the input's, and one layer in two blocks
    assert explain(perceiver, picture, method="attention").layer == 2


def test_methods_and_images() -> None:
    classifier = of(red_vit())
    with pytest.raises(ValueError, match='method is "rolout". Did you mean "rollout"\\? Known: relevance, rollout'):
        explain(classifier, planted((0, 0)), method="rolout")
    with pytest.raises(ImageNotFound, match="no such file"):
        explain(classifier, "nowhere.png")
    assert explain(classifier, planted((0, 0))).target == 1  # the best one
    headless = of(red_vit(num_classes=5), labels=None)
    with pytest.raises(NoHead, match="has no classification head"):
        explain(headless, planted((0, 0)))


def test_finding_a_class() -> None:
    for target in (1, "1", "red, scarlet", "Scarlet", " red ", "红"):
        assert find_class(LABELS, target) == 1
    assert find_class(Labels(("3", "x")), "3") == 0  # a name before a number
    tiny = Labels.tiny_imagenet()
    assert tiny.wnids is not None
    assert find_class(tiny, tiny.wnids[7]) == 7
    for target in (5, -1, "17"):
        with pytest.raises(ValueError, match=f"no class {target}: this model has 5, 0 to 4"):
            find_class(LABELS, target)
    with pytest.raises(ValueError, match='no class "scarlett" among the 5 of this model. Did you mean "red, scarlet"?'):
        find_class(LABELS, "scarlett")
    with pytest.raises(ValueError, match='no class "zebra" among the 5 of this model. Give its index'):
        find_class(LABELS, "zebra")
    with pytest.raises(ValueError, match='"crane" is 2 classes: 2 "crane", 4 "crane". Give the index of one'):
        find_class(LABELS, "crane")


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_attention_distance() -> None:
    """All attention on one patch: the mean distance to it. None anywhere in particular: the mean of all distances."""
    model = red_vit(num_registers=2)
    nn.init.zeros_(model.layers[1].attn.k.weight)
    model.layers[0].attn.q.bias.data[0] = 300.0
    found = attention_distance(of(model), [planted((1, 4)), planted((0, 0))])
    assert found.shape == (2, 1)
    y, x = np.mgrid[:4, :6] * 4.0
    to = [np.hypot(y - 4 * i, x - 4 * j).mean() for i in range(4) for j in range(6)]
    assert found[0, 0] == pytest.approx((to[1 * 6 + 4] + to[0]) / 2, rel=1e-4)
    assert found[1, 0] == pytest.approx(np.mean(to), rel=1e-4)
    with pytest.raises(ValueError, match="no images: the list is empty"):
        attention_distance(of(model), [])


def test_position_similarity() -> None:
    model = red_vit(distillation_token=True)
    found = position_similarity(model)
    assert found.shape == (4, 6, 4, 6)
    rows = model.pos_embed[0, 2:].detach().numpy()
    i, j = rows[1 * 6 + 2], rows[3 * 6 + 5]
    assert found[1, 2, 3, 5] == pytest.approx(i @ j / np.linalg.norm(i) / np.linalg.norm(j), abs=1e-6)
    perceiver = position_similarity(red_perceiver())
    assert perceiver.shape == (16, 24, 16, 24)
    assert perceiver[5, 7, 5, 7] == pytest.approx(1)
    shape: dict[str, Any] = {"num_latents": 2, "latent_dim": 8, "num_blocks": 1, "layers_per_block": 1, "embed_dim": 2}
    learned = ImagePerceiver(ImagePerceiverConfig(front_end="conv1x1", image_size=(130, 20), **shape))
    assert position_similarity(learned).shape == (44, 7, 44, 7)  # every third


def test_filters() -> None:
    """A kernel of three patterns and their mixtures: those are the components, by strength."""
    model = red_vit(embed_dim=64, num_heads=1)
    generator = np.random.default_rng(0)
    patterns = np.linalg.qr(generator.normal(size=(48, 3)))[0].T  # of 3 · 4 · 4 numbers
    mixed = generator.normal(size=(64, 3)) * (5, 3, 1) @ patterns + 0.7
    with torch.no_grad():
        model.patch_embed.weight.copy_(torch.tensor(mixed).reshape(64, 3, 4, 4))
    found = filters(model, 3)
    assert found.shape == (3, 4, 4, 3)
    assert found.min() >= 0
    assert found.max(axis=(1, 2, 3)) == pytest.approx(1)
    centred = mixed - mixed.mean(axis=0)
    components = (found - 0.5).transpose(0, 3, 1, 2).reshape(3, -1)
    for component in components:
        image = centred.T @ (centred @ component)  # an eigenvector of the covariance
        assert image / np.linalg.norm(image) == pytest.approx(component / np.linalg.norm(component), abs=1e-4)
    lengths = [np.linalg.norm(centred @ component) / np.linalg.norm(component) for component in components]
    assert lengths == sorted(lengths, reverse=True)
    with pytest.raises(ValueError, match="count is 49; this model's patch embedding has 1 to 48 components"):
        filters(model, 49)
    with pytest.raises(ValueError, match="reads the feature map of a stem, not red, green and blue"):
        filters(ViT(ViTConfig(image_size=(32, 32), patch_size=2, stem=(), embed_dim=8, num_heads=1, num_layers=1)))


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_gap_was_filled_from() -> None:
    torch.manual_seed(0)
    model: Any = TextPerceiver(
        TextPerceiverConfig(
            num_latents=4, latent_dim=12, num_blocks=1, layers_per_block=2, num_heads=2, num_cross_heads=2, qk_dim=8,
            v_dim=12, max_length=40, embed_dim=10, decoder_heads=2, numerics="transformers",
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    text = TextModel(
        Checkpoint(model=model, preprocess=None, labels=None, source=Source("test/text", None, "", "opsin"))
    )
    found = explain_text(text, "a ü[MASK:2] b[MASK]")
    assert found.tokens == ("[CLS]", "a", " ", "<0xC3>", "<0xBC>", "[MASK]", "[MASK]", " ", "b", "[MASK]", "[SEP]")
    assert found.places == (5, 6, 9)
    assert found.gaps == ((0, 1), (2,))
    assert found.filled == text.fill_mask("a ü[MASK:2] b[MASK]")["filled"]
    assert found.answers == tuple(gap["text"] for gap in text.fill_mask("a ü[MASK:2] b[MASK]")["gaps"])
    assert found.weights.shape == (3, 11)
    assert found.weights.sum(axis=1) == pytest.approx(1)
    assert found.by_gap() == pytest.approx(np.stack([found.weights[:2].mean(axis=0), found.weights[2]]))

    with torch.no_grad():  # the definition, written out
        ids = torch.tensor([text._ids("a ü[MASK:2] b[MASK]")])
        tokens = model.embed(ids)
        cross, layers, decoder = model.encoder.cross, model.encoder.layers, model.decoder.cross
        latents = model.encoder.latents[None]
        read = cross.attn.weights(cross.norm_q(latents), cross.norm_kv(tokens))[0].mean(0)
        latents, rolled = cross(latents, tokens), torch.eye(4)
        for layer in layers:
            y = layer.norm1(latents)
            rolled = (layer.attn.weights(y, y)[0].mean(0) + torch.eye(4)) / 2 @ rolled
            latents = layer(latents)
        answer = decoder.attn.weights(decoder.norm_q(model.queries(ids)), decoder.norm_kv(latents))[0].mean(0)
        expected = (answer @ rolled @ read)[[5, 6, 9]]
    assert found.weights == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.ptp(found.weights) > 0.01
    with pytest.raises(NoMask, match="has no"):
        explain_text(text, "nothing missing")


def test_the_blur_of_insertion_is_that_of_rise() -> None:
    """Five pixels of 224, in every direction alike."""
    point = np.zeros((224, 224, 3), np.float32)
    point[112, 112] = 1
    spread = perturb._blurred(point)[:, :, 0].astype(np.float64)
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    for axis in (0, 1):
        assert ((np.arange(224) - 112) ** 2 @ spread.sum(axis)) ** 0.5 == pytest.approx(5, rel=0.03)
