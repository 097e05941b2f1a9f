"""Three detectors against other libraries' figures, rates that are what they say, a file that is whole or refused."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from opsin import evaluate, unknown
from opsin.checkpoints import Checkpoint
from opsin.errors import CheckpointError, DataError
from opsin.models.perceiver_io import ImagePerceiver, ImagePerceiverConfig
from opsin.unknown import Answers, Unknown

CLASSES, WIDTH = 7, 24  # those of the `noisy_checkpoint`
HEAD = "ab" * 32


def cloud(seed: int, count: int, apart: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, WIDTH) around a centre for each class, and the classes."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH)) * apart
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, CLASSES, count)
    return (centres[targets] + rng.normal(size=(count, WIDTH))).astype(np.float32), targets


def answers(seed: int, count: int, *, known: bool) -> Answers:
    """Of images of the classes: features near a centre, a logit that stands out. Of others: neither."""
    rng = np.random.default_rng(seed)
    features, targets = cloud(seed, count)
    logits = rng.normal(size=(count, CLASSES)).astype(np.float32)
    if known:
        logits[np.arange(count), targets] += 3
    else:
        features = rng.normal(size=features.shape).astype(np.float32) * 3
    return Answers(logits, features)


def fitted(*methods: unknown.Method, known: int = 101, others: int = 61) -> Unknown:
    bank, targets = cloud(1, 211)
    given_methods = {"methods": methods} if methods else {}
    found, _ = unknown.fit(
        bank, targets, answers(2, known, known=True), answers(3, others, known=False), head=HEAD, **given_methods
    )
    return found


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_energy_is_the_log_sum_of_exponentials() -> None:
    found = answers(5, 11, known=True)
    expected = torch.from_numpy(found.logits).double().logsumexp(1)
    assert fitted("energy").scores(*found) == pytest.approx(expected.numpy(), rel=1e-12)
    huge = Answers(np.array([[1000, -1000, 0]], np.float32), found.features[:1])
    assert fitted("energy").scores(*huge) == pytest.approx([1000])


def test_knn_is_the_cosine_of_the_neighbour_a_class_away() -> None:
    bank, _ = cloud(1, 211)
    found = answers(5, 11, known=False)
    k = 211 // CLASSES
    distance, _ = NearestNeighbors(n_neighbors=k, metric="cosine").fit(bank).kneighbors(found.features)
    assert fitted("knn").scores(*found) == pytest.approx(1 - distance[:, -1], abs=1e-5)


def test_a_large_bank_is_thinned_evenly_over_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unknown, "MAX_BANK", 3 * CLASSES)
    targets = np.sort(cloud(1, 211)[1])
    parts = unknown._make("knn", np.eye(CLASSES, WIDTH)[targets], targets)
    assert parts["bank"].sum(0)[:CLASSES].tolist() == [3] * CLASSES
    assert parts["k"].tolist() == [3]


def test_mahalanobis_is_the_distance_under_a_shrunk_covariance() -> None:
    bank, targets = cloud(1, 211)
    few = unknown.places(targets) < 6
    bank, targets = bank[few], targets[few]  # 42, fewer than the numbers of a covariance
    means = np.stack([bank[targets == i].mean(0) for i in range(CLASSES)]).astype(np.float64)
    spread = bank - means[targets]
    theirs = LedoitWolf(assume_centered=True).fit(spread)
    assert unknown._covariance(spread) == pytest.approx(theirs.covariance_, rel=1e-9)
    found = answers(5, 11, known=True)
    apart = found.features[:, None] - means  # n K D
    expected = -np.einsum("nkd,de,nke->nk", apart, theirs.precision_, apart).min(1)
    parts = unknown._make("mahalanobis", bank, targets)
    assert unknown._score("mahalanobis", parts, found) == pytest.approx(expected, rel=1e-4)
    alone = unknown._make("mahalanobis", np.concatenate([bank, 9 * bank[:1]]), np.append(targets, CLASSES))
    assert np.array_equal(alone["whiten"], parts["whiten"]), "one image says nothing of how far those of a class differ"
    assert len(alone["means"]) == CLASSES + 1


@pytest.mark.parametrize("method", ["energy", "knn", "mahalanobis"])
def test_every_score_is_higher_for_images_of_the_classes(method: unknown.Method) -> None:
    found = fitted(method)
    known, others = (found.scores(*answers(seed, 97, known=seed == 7)) for seed in (7, 8))
    assert unknown.quality(known, others).auroc > 0.85
    alone = [found.scores(*(part[i : i + 1] for part in answers(7, 97, known=True))).item() for i in range(5)]
    assert alone == pytest.approx(known[:5], rel=1e-5)


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-5, 9), min_size=1, max_size=53), st.lists(st.integers(-9, 5), min_size=1, max_size=31))
def test_quality_is_that_of_scikit_learn(known: list[int], others: list[int]) -> None:
    found = unknown.quality(np.array(known, float), np.array(others, float))
    truth = [1] * len(known) + [0] * len(others)
    assert found.auroc == pytest.approx(roc_auc_score(truth, known + others))
    threshold = max(t for t in known if np.mean(np.array(known) >= t) >= 0.95)
    assert found.fpr95 == pytest.approx(np.mean(np.array(others) >= threshold))


def test_fpr95_leaves_out_one_known_image_in_twenty() -> None:
    assert unknown.quality(np.arange(100.0), np.arange(100.0)).fpr95 == 0.95


@pytest.mark.parametrize("rate", [0, 0.01, 0.05, 0.1, 0.25, 0.9])
def test_a_rate_is_the_share_of_others_that_pass(rate: float) -> None:
    found = fitted("energy", others=2 * 40)
    assert found.num_others == 40
    scores = found.scores(*answers(3, 80, known=False))[1::2]  # those that measured
    passed = found.accepts(found.ranks(scores), rate)
    assert passed.sum() == math.floor(rate * 40 + 1e-9) == pytest.approx(40 * found.false_accept(rate))
    assert passed.sum() == 0 or scores[passed].min() > scores[~passed].max()
    known = found.scores(*answers(2, 101, known=True))[1::2]
    assert found.false_reject(rate) == pytest.approx(1 - found.accepts(found.ranks(known), rate).mean())


def test_a_rate_holds_on_images_that_were_never_seen() -> None:
    found = fitted("mahalanobis", known=2001, others=2001)
    others = found.scores(*answers(11, 3000, known=False))
    known = found.scores(*answers(12, 3000, known=True))
    assert found.accepts(found.ranks(others), 0.2).mean() == pytest.approx(0.2, abs=0.04)
    assert 1 - found.accepts(found.ranks(known), 0.2).mean() == pytest.approx(found.false_reject(0.2), abs=0.04)
    assert len(found.known) == len(found.others) == unknown.KEPT == found.num_known  # every other image


def test_the_best_detector_is_chosen_by_images_that_do_not_measure_it() -> None:
    bank, targets = cloud(1, 211)
    known, others = answers(2, 120, known=True), answers(3, 120, known=False)
    noise = np.random.default_rng(4).normal(size=(240, CLASSES)).astype(np.float32)
    found, table = unknown.fit(
        bank, targets, known._replace(logits=noise[:120]), others._replace(logits=noise[120:]), head=HEAD
    )
    assert set(table) == {"energy", "knn", "mahalanobis"}
    assert found.method != "energy" and table["energy"].auroc < 0.7 < table[found.method].auroc
    assert table[found.method] == unknown.quality(found.known, found.others)
    turned = others._replace(logits=others.logits.copy(), features=others.features.copy())
    turned.logits[::2] += 100  # what chooses now says that energy is worst; what measures is as it was
    again, same = unknown.fit(bank, targets, known, turned, head=HEAD)
    assert again.method != "energy"
    assert same == unknown.fit(bank, targets, known, others, head=HEAD)[1]


def test_too_few_images_are_said() -> None:
    bank, targets = cloud(1, 30)
    known, few = answers(2, 40, known=True), answers(3, 19, known=False)
    with pytest.raises(DataError, match='19 images of other things are there to learn "unknown" from; 20 are needed'):
        unknown.fit(bank, targets, known, few, head=HEAD)
    with pytest.raises(DataError, match="19 images of the classes"):
        unknown.fit(bank, targets, few, known, head=HEAD)
    with pytest.raises(DataError, match="no class has two images"):
        unknown.fit(bank[:3], np.arange(3), known, known, head=HEAD)
    with pytest.raises(ValueError, match="rate of 1 is no share of images: 0.05 takes 5 % of others for known"):
        fitted("energy").accepts(np.zeros(1), 1)


# ── file ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["energy", "knn", "mahalanobis"])
def test_what_is_written_is_read(method: unknown.Method, noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = noisy_checkpoint.model
    assert unknown.read(tmp_path, model) is None
    found = replace(fitted(method), head=unknown.fingerprint(model))
    assert unknown.write(tmp_path, found) == tmp_path / "unknown.safetensors"
    again = unknown.read(tmp_path, model)
    assert again is not None
    assert (again.method, again.num_known, again.num_others, again.head) == (method, 50, 30, found.head)
    few = answers(5, 11, known=True)
    assert np.array_equal(again.scores(*few), found.scores(*few))
    assert np.array_equal(again.ranks(again.scores(*few)), found.ranks(found.scores(*few)))


def test_a_file_of_another_model_is_refused(noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    unknown.write(tmp_path, fitted("energy"))
    with pytest.raises(CheckpointError, match="was made for another model, or for this one before it changed. Fit it"):
        unknown.read(tmp_path, noisy_checkpoint.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mahalanobis.means": None}, "holds head, images, known, mahalanobis.whiten, others, which is not what opsin"),
        ({"knn.bank": torch.ones(2, 2)}, "which is not what opsin writes"),
        ({"known": None}, "which is not what opsin writes"),
        ({"mahalanobis.whiten": torch.ones(24, 23)}, r"mahalanobis.whiten \(24, 23\) does not fit the model"),
        ({"mahalanobis.means": torch.full((7, 24), math.nan)}, "mahalanobis.means .* does not fit"),
        ({"mahalanobis.means": torch.ones(0, 24)}, "mahalanobis.means .* does not fit"),
        ({"others": torch.tensor([2.0, 1.0])}, "others must be finite scores in ascending order"),
        ({"known": torch.tensor([1.0, math.inf])}, "known must be finite scores"),
        ({"images": torch.ones(3)}, "images must be two counts"),
        ({"head": torch.zeros(5)}, "was made for another model"),
    ],
)
def test_damage_is_named(change: dict, message: str, noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = unknown.write(tmp_path, replace(fitted("mahalanobis"), head=unknown.fingerprint(noisy_checkpoint.model)))
    tensors = load_file(path) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CheckpointError, match=message):
        unknown.read(tmp_path, noisy_checkpoint.model)


def test_a_truncated_file_is_damaged(noisy_checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = unknown.write(tmp_path, fitted("knn"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"unknown\.safetensors is damaged"):
        unknown.read(tmp_path, noisy_checkpoint.model)


def test_the_fingerprint_is_that_of_the_head(noisy_checkpoint: Checkpoint) -> None:
    def perceiver(seed: int) -> ImagePerceiver:
        torch.manual_seed(seed)
        config = ImagePerceiverConfig(
            image_size=(16, 16),
            num_classes=3,
            num_latents=5,
            latent_dim=8,
            num_blocks=1,
            layers_per_block=1,
            num_heads=2,
        )
        return ImagePerceiver(config)

    assert unknown.fingerprint(perceiver(0)) == unknown.fingerprint(perceiver(0)) != unknown.fingerprint(perceiver(1))
    assert unknown.fingerprint(noisy_checkpoint.model) == unknown.fingerprint(noisy_checkpoint.model)


def test_a_temperature_changes_no_answer(noisy_checkpoint: Checkpoint) -> None:
    model = copy.deepcopy(noisy_checkpoint.model)
    few = answers(5, 11, known=True)
    for method in ("energy", "knn"):
        before = replace(fitted(method), head=unknown.fingerprint(model))
        evaluate.calibrate(model, 1.7)
        after = unknown.rescaled(before, 1.7, unknown.fingerprint(model))
        assert after.head != before.head
        assert after.scores(few.logits / np.float32(1.7), few.features) == pytest.approx(before.scores(*few), rel=1e-5)
