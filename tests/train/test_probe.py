"""Probes: scikit-learn's optimum, big_vision's few-shot head, and features that are computed once."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier

from opsin.checkpoints import Checkpoint
from opsin.device import has_bf16
from opsin.errors import DataError
from opsin.labels import Labels
from opsin.models.vit import ViT
from opsin.pipeline import Classifier
from opsin.train import probe as module
from opsin.train.probe import cross_validate, extract, few_shot, fewshot_weights, fit_logistic, fit_ridge, probe
from train.conftest import NAMES, InMemory, pictures


def blobs(num: int, dim: int, classes: int, *, seed: int = 0, spread: float = 1.3) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes of unequal size; the features are correlated, of unlike scales, and far from zero."""
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), rng.integers(0, rng.integers(1, classes + 1, num - classes))])
    centres = rng.normal(size=(classes, dim))
    raw = centres[targets] + spread * rng.normal(size=(num, dim))
    mixed = raw @ (np.eye(dim) + 0.5 * rng.normal(size=(dim, dim)))
    return (mixed * rng.uniform(0.1, 9, dim) + rng.normal(size=dim) * 20).astype(np.float32), targets


def tags(num: int, dim: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    features, _ = blobs(num, dim, classes)
    rng = np.random.default_rng(1)
    scores = (features - features.mean(0)) / features.std(0) @ rng.normal(size=(dim, classes))
    return features, (scores + rng.normal(size=scores.shape) > 0.8).astype(np.uint8)


def standardised(features: np.ndarray) -> np.ndarray:
    return (features - features.mean(0, dtype=np.float64)) / features.std(0, dtype=np.float64)


def scores(head: tuple[np.ndarray, np.ndarray], features: np.ndarray) -> np.ndarray:
    return features.astype(np.float64) @ head[0].T.astype(np.float64) + head[1]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ── logistic regression ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num", "dim", "l2"), [(97, 7, 0.3), (97, 7, 50.0), (23, 41, 2.0)])
def test_logistic_is_scikit_learns_optimum_folded(num: int, dim: int, l2: float, weighted: bool) -> None:
    x, y = blobs(num, dim, 5)
    weights = np.random.default_rng(2).uniform(0, 3, num) if weighted else None
    weight, bias = fit_logistic(x, y, 5, l2=l2, sample_weights=weights, tolerance=1e-10)
    assert weight.dtype == bias.dtype == np.float32
    theirs = LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000).fit(standardised(x), y, weights)
    assert np.allclose(weight * x.std(0), theirs.coef_, atol=1e-3)
    assert np.allclose(softmax(scores((weight, bias), x)), theirs.predict_proba(standardised(x)), atol=1e-3)


def test_logistic_of_two_classes_is_scikit_learns_of_half_the_penalty() -> None:
    x, y = blobs(61, 7, 2)
    theirs = LogisticRegression(C=2 / 5.0, tol=1e-8, max_iter=10_000).fit(standardised(x), y)
    ours = softmax(scores(fit_logistic(x, y, 2, l2=5.0, tolerance=1e-9), x))
    assert np.allclose(ours, theirs.predict_proba(standardised(x)), atol=1e-3)


def test_multi_label_is_scikit_learns_one_versus_rest() -> None:
    x, y = tags(97, 7, 3)
    theirs = OneVsRestClassifier(LogisticRegression(C=1 / 3.0, tol=1e-8, max_iter=10_000)).fit(standardised(x), y)
    head = fit_logistic(x, y, 3, l2=3.0, multi_label=True, tolerance=1e-9)
    assert np.allclose(1 / (1 + np.exp(-scores(head, x))), theirs.predict_proba(standardised(x)), atol=1e-3)


def test_tolerance_is_the_share_of_the_loss_that_is_left() -> None:
    x, y = blobs(397, 7, 5)
    z = standardised(x)

    def loss(tolerance: float) -> float:
        head = fit_logistic(x, y, 5, l2=1.0, tolerance=tolerance)
        logits = scores(head, x)
        penalty = np.square(head[0] * z.std(0) * x.std(0)).sum() / 2
        return float(penalty - np.log(softmax(logits)[np.arange(len(y)), y]).sum())

    least = loss(1e-11)
    for tolerance in (1e-3, 1e-5):
        assert loss(tolerance) / least - 1 < 5 * tolerance
    assert loss(1e-3) / least - 1 > 1e-6  # it does stop early


def test_rows_in_pieces_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(601, 7, 5)
    whole = fit_logistic(x, y, 5, l2=1.0)
    monkeypatch.setattr(module, "CHUNK", 1)  # 256 rows, the least
    for ours, theirs in zip(fit_logistic(x, y, 5, l2=1.0), whole, strict=True):
        assert np.allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_what_two_rows_share_and_what_never_changes_is_handled() -> None:
    x, y = blobs(97, 7, 3)
    more = np.concatenate([x, x[:, :2], np.full((97, 1), 123.4, np.float32)], axis=1)
    weight, bias = fit_logistic(more, y, 3, l2=1.0, tolerance=1e-9)
    assert np.isfinite(weight).all()
    assert not weight[:, 9].any()  # a constant feature
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=10_000).fit(standardised(more[:, :9]), y)
    assert np.allclose(
        softmax(scores((weight, bias), more)), theirs.predict_proba(standardised(more[:, :9])), atol=1e-3
    )


def test_class_without_images_is_never_the_answer() -> None:
    x, y = blobs(97, 7, 4)
    gap = np.array([0, 1, 3, 5])[y]  # of six classes, 2 and 4 have no image
    weight, bias = fit_logistic(x, gap, 6, l2=0.5, tolerance=1e-9)
    without = fit_logistic(x, y, 4, l2=0.5, tolerance=1e-9)
    assert np.allclose(weight[[0, 1, 3, 5]], without[0], atol=1e-4)
    assert not weight[[2, 4]].any()
    far = x + np.random.default_rng(3).normal(size=x.shape) * 1000
    assert not np.isin(scores((weight, bias), far).argmax(1), [2, 4]).any()
    middle = np.concatenate([x, x.mean(0, keepdims=True)])  # where no class is far ahead
    assert softmax(scores((weight, bias), middle))[:, [2, 4]].max() < 1e-8
    (ridge,) = fit_ridge(x, gap, 6, l2=[0.5])
    assert not np.isin(scores(ridge, far).argmax(1), [2, 4]).any()


def test_tag_that_no_image_or_every_image_has_keeps_its_odds() -> None:
    x, y = tags(97, 7, 3)
    y = np.concatenate([y, np.zeros((97, 1), np.uint8), np.ones((97, 1), np.uint8)], axis=1)
    weight, bias = fit_logistic(x, y, 5, l2=3.0, multi_label=True, tolerance=1e-9)
    assert not weight[3:].any()
    assert bias[3:] == pytest.approx([np.log(0.5 / 97.5), np.log(97.5 / 0.5)], rel=1e-5)
    assert np.allclose(weight[:3], fit_logistic(x, y[:, :3], 3, l2=3.0, multi_label=True, tolerance=1e-9)[0], atol=1e-4)


# ── ridge regression ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num", "dim"), [(97, 7), (23, 41)])
def test_ridge_is_scikit_learns_for_each_l2(num: int, dim: int, weighted: bool) -> None:
    x, y = blobs(num, dim, 5)
    weights = np.random.default_rng(2).uniform(0, 3, num) if weighted else None
    path = [0.1, 3.0, 700.0]
    for l2, (weight, bias) in zip(path, fit_ridge(x, y, 5, l2=path, sample_weights=weights), strict=True):
        theirs = Ridge(alpha=l2, solver="cholesky").fit(standardised(x), 2.0 * np.eye(5)[y] - 1, weights)
        assert np.allclose(weight * x.std(0), theirs.coef_, atol=1e-5)
        assert np.allclose(scores((weight, bias), x), theirs.predict(standardised(x)), atol=1e-4)


def test_ridge_of_tags() -> None:
    x, y = tags(97, 7, 3)
    (head,) = fit_ridge(x, y, 3, l2=[5.0], multi_label=True)
    theirs = Ridge(alpha=5.0).fit(standardised(x), 2.0 * y - 1)
    assert np.allclose(scores(head, x), theirs.predict(standardised(x)), atol=1e-4)


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folds_have_the_same_share_of_each_class() -> None:
    targets = np.repeat([0, 1, 2, 3, 4], [31, 10, 3, 1, 7])
    which = module._folds(targets, 5, 0)
    assert which[targets == 3] == -1  # the only one of its class
    for group in (0, 1, 2, 4):
        counts = np.bincount(which[targets == group], minlength=5)
        assert counts.max() - counts.min() <= 1
    counts = np.bincount(which[which >= 0], minlength=5)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(which, module._folds(targets, 5, 0))
    assert not np.array_equal(which, module._folds(targets, 5, 1))


def test_folds_go_by_the_rarest_tag() -> None:
    targets = np.zeros((40, 3), np.uint8)
    targets[:30, 0] = 1
    targets[:10, 2] = 1
    which = module._folds(targets, 5, 0)
    assert np.array_equal(np.bincount(which[:10]), [2, 2, 2, 2, 2])
    assert np.array_equal(np.bincount(which[30:]), [2, 2, 2, 2, 2])  # those without any


def test_accuracies_of_the_table_are_those_of_fits_without_the_fold() -> None:
    x, y = blobs(97, 7, 4)
    best, table = cross_validate(x, y, 4, seed=3)
    which, z = module._folds(y, 5, 3), standardised(x)
    makers: dict[str, Callable[[float], Any]] = {
        "ridge": lambda l2: Ridge(alpha=l2),
        "logistic": lambda l2: LogisticRegression(C=1 / l2, tol=1e-8, max_iter=10_000),
    }
    for method, slack in (("ridge", 0.0), ("logistic", 2.1 / 97)):  # logistic fits of the table stop early
        rows = [row for row in table if row["method"] == method]
        assert [row["l2"] for row in rows] == list(module.PATH[: len(rows)])
        for row in rows[::5]:
            hits = 0
            for fold in range(5):
                train = which != fold
                model = makers[method](row["l2"])
                model.fit(z[train], 2 * np.eye(4)[y[train]] - 1 if method == "ridge" else y[train])
                said = model.predict(z[~train])
                hits += ((said.argmax(1) if method == "ridge" else said) == y[~train]).sum()
            assert row["accuracy"] == pytest.approx(hits / 97, abs=slack + 1e-9)
    assert best is not None
    assert best["accuracy"] == max(row["accuracy"] for row in table)


def test_probe_takes_the_best_and_fits_it_on_all_images() -> None:
    x, y = blobs(197, 7, 4)
    rows: list[dict] = []
    result = probe(x, y, 4, on_row=rows.append)
    assert (result.method, result.scale) == ("logistic", 1.0)
    assert rows == result.table
    assert result.cv_accuracy == max(row["accuracy"] for row in rows) > 0.6
    weight, bias = fit_logistic(x, y, 4, l2=result.l2)
    assert np.allclose(result.weight, weight, atol=2e-3 * np.abs(weight).max())
    assert [record["step"] for record in result.history] == list(range(1, len(result.history) + 1))
    losses = [record["loss"] for record in result.history]
    assert losses == sorted(losses, reverse=True)
    logits = scores((weight, bias), x)
    penalty = result.l2 / 2 * np.square(weight * x.std(0)).sum()
    final = (penalty - np.log(softmax(logits)[np.arange(197), y]).sum()) / 197
    assert losses[-1] == pytest.approx(final, rel=1e-4)
    json.dumps([result.table, result.history])


def test_probe_is_deterministic_and_heeds_its_seed() -> None:
    x, y = blobs(97, 7, 4)
    first, again, other = probe(x, y, 4), probe(x, y, 4), probe(x, y, 4, seed=1)
    assert np.array_equal(first.weight, again.weight)
    assert np.array_equal(first.bias, again.bias)
    assert first.table == again.table
    assert first.table != other.table


def test_length_of_the_first_step_and_number_of_steps() -> None:
    x, y = blobs(197, 7, 4)
    usual = probe(x, y, 4)
    assert usual.method == "logistic"
    assert np.allclose(probe(x, y, 4, lr=0.01).weight, usual.weight, atol=5e-3 * np.abs(usual.weight).max())
    assert len(usual.history) > 3
    assert len(probe(x, y, 4, max_iter=3).history) == 3


def test_one_image_of_a_class_is_learned_and_not_judged() -> None:
    x, y = blobs(97, 7, 4, spread=0.3)
    x, y = np.concatenate([x, x.mean(0, keepdims=True) + 5 * x.std(0)]), np.append(y, 4)
    result = probe(x.astype(np.float32), y, 5)
    assert result.cv_accuracy == 1.0  # it would be 97 of 98, were it judged
    assert scores((result.weight, result.bias), x[-1:]).argmax() == 4


def test_one_image_of_every_class() -> None:
    x, y = blobs(5, 7, 5)
    result = probe(x, y, 5)
    assert (result.cv_accuracy, result.table, result.method) == (None, [], "logistic")
    assert np.array_equal(scores((result.weight, result.bias), x).argmax(1), y)
    assert cross_validate(x, y, 5) == (None, [])


def test_ridge_scores_become_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(97, 7, 4)
    logistic = module._logistic
    monkeypatch.setattr(module, "_logistic", lambda *args, **kw: (torch.zeros_like(logistic(*args, **kw)[0]), [1.0]))
    result = probe(x, y, 4)
    assert result.method == "ridge"
    (plain,) = fit_ridge(x, y, 4, l2=[result.l2])
    assert result.scale > 1
    assert np.allclose(result.weight, result.scale * plain[0], rtol=1e-4, atol=1e-6)
    assert np.allclose(result.bias, result.scale * plain[1], rtol=1e-4, atol=1e-4)
    signs = 2 * np.eye(4)[y] - 1
    squares = np.square(scores(plain, x) - signs).sum() + result.l2 * np.square(plain[0] * x.std(0)).sum()
    assert result.history == [{"step": 1, "loss": pytest.approx(squares / 97, rel=1e-4)}]
    probs = softmax(scores((result.weight, result.bias), x))
    confidence, right = probs.max(1).mean(), (probs.argmax(1) == y).mean()
    assert abs(confidence - right) < 0.1  # unscaled scores would say 0.4


def test_probe_of_tags() -> None:
    x, y = tags(197, 7, 3)
    result = probe(x, y, 3, multi_label=True)
    assert result.cv_accuracy is not None
    assert result.cv_accuracy > y.mean() + 0.3  # the mean average precision of chance
    assert ((scores((result.weight, result.bias), x) > 0) == y).mean() > 0.8


def test_class_weights_count_the_rare_class() -> None:
    x, y = blobs(301, 7, 2, spread=3)
    y = np.where(np.arange(301) % 3 == 0, y, 0)  # few of class 1
    plain, balanced = probe(x, y, 2), probe(x, y, 2, class_weights=True)
    recall = [(scores((r.weight, r.bias), x).argmax(1)[y == 1] == 1).mean() for r in (plain, balanced)]
    assert recall[1] > recall[0] + 0.2
    counts = np.bincount(y)
    given = probe(x, y, 2, class_weights=301 / counts / 2)
    assert np.allclose(given.weight, balanced.weight, atol=1e-5)
    assert np.array_equal(probe(x, y, 2, class_weights=False).weight, plain.weight)


def test_class_weights_of_tags_are_their_penalty() -> None:
    x, y = tags(97, 7, 3)
    result = probe(x, y, 3, multi_label=True, class_weights=np.array([1.0, 5.0, 0.2]))
    assert {row["method"] for row in result.table} == {"logistic"}
    for k, share in enumerate((1.0, 5.0, 0.2)):
        weight, _ = fit_logistic(x, y[:, k : k + 1], 1, l2=result.l2 / share, multi_label=True)
        assert np.allclose(result.weight[k], weight[0], atol=5e-3 * np.abs(weight).max())


X, Y = blobs(29, 7, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit_logistic(X[0], Y, 3, l2=1),
            r"features have shape \(7,\); they must be \(N, D\) with N at least 1",
        ),
        (lambda: fit_logistic(X, Y[:-1], 3, l2=1), r"targets have shape \(28,\); 29 rows of features need \(29,\)"),
        (lambda: fit_logistic(X, Y, 3, l2=1, multi_label=True), r"need \(29, 3\) of 0 and 1"),
        (lambda: fit_logistic(X, Y, 2, l2=1), r"targets go from 0 to 2; they must be 0 to 1"),
        (lambda: fit_logistic(X, Y, 3, l2=0), "l2 is 0; it must be above 0"),
        (lambda: fit_logistic(X, Y, 3, l2=1, sample_weights=X), r"sample_weights have shape \(29, 7\); 29 images"),
        (lambda: fit_logistic(X, Y, 3, l2=1, sample_weights=-np.ones(29)), "must be finite, 0 or more, and not all 0"),
        (
            lambda: fit_logistic(np.where(np.arange(29)[:, None] == 4, np.nan, X), Y, 3, l2=1),
            "the features of row 4 are not finite",
        ),
        (lambda: probe(X, Y, 3, folds=1), "folds is 1; it must be at least 2"),
        (lambda: probe(X, Y, 3, class_weights=np.ones(2)), r"class_weights have shape \(2,\); 3 classes need \(3,\)"),
        (lambda: few_shot(X, np.eye(3)[Y], X, Y), r"targets have shapes \(29, 3\) and \(29,\)"),
        (lambda: fewshot_weights(X, Y, 2), r"targets go from 0 to 2; they must be 0 to 1"),
        (lambda: fewshot_weights(X, Y[1:], 3), r"features have shape \(29, 7\), targets \(28,\)"),
        (lambda: fewshot_weights(X * np.nan, Y, 3), "the features are not all finite"),
    ],
)
def test_what_cannot_be_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_tell_apart() -> None:
    with pytest.raises(DataError, match="nothing to tell apart: only one class has images"):
        probe(X, np.ones(29, np.int64), 3)
    with pytest.raises(DataError, match="no class that some images have and others have not"):
        probe(X, np.ones((29, 3)), 3, multi_label=True)


# ── few shots ────────────────────────────────────────────────────────────────────────────────────────────────────────


def big_vision(x: np.ndarray, y: np.ndarray, test: np.ndarray, num_classes: int) -> np.ndarray:
    """Scores as the evaluator's text defines them, by the plainest means."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    whitened, test = ((np.c_[(a - mean) / std, np.full(len(a), 100.0)]) for a in (x, test))
    signs = np.full((len(y), num_classes), -1.0)
    signs[np.arange(len(y)), y] = 1
    return test @ np.linalg.inv(whitened.T @ whitened + 1024 * np.eye(whitened.shape[1])) @ whitened.T @ signs


@pytest.mark.parametrize(("num", "dim"), [(53, 7), (11, 41)])
def test_few_shot_head_is_big_visions(num: int, dim: int) -> None:
    x, y = blobs(num, dim, 4)
    x[:, 3] = 0.25  # what does not vary is divided by 1e-5
    test, _ = blobs(19, dim, 4, seed=1)
    test[:, 3] = 0.25
    expected = big_vision(x.astype(np.float64), y, test.astype(np.float64), 4)
    assert np.allclose(scores(fewshot_weights(x, y, 4), test), expected, atol=1e-4)


def test_few_shot_table() -> None:
    x, y = blobs(397, 7, 5)
    x = x.astype(np.float64)
    x, y, test, truth = x[:200], y[:200], x[200:], y[200:]
    table = few_shot(x, y, test, truth, shots=(1, 10), seeds=2)
    assert [row["shots"] for row in table] == [1, 10]
    for row in table:
        for seed, accuracy in enumerate(row["accuracies"]):
            rng = np.random.default_rng(seed)
            rows = np.concatenate([rng.permutation(np.where(y == k)[0])[: row["shots"]] for k in range(5)])
            said = big_vision(x[rows], y[rows], test, 5).argmax(1)
            assert accuracy == pytest.approx((said == truth).mean(), abs=1.1 / len(truth))
        assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]))
        assert row["std"] == pytest.approx(np.std(row["accuracies"]))
    json.dumps(table)


# ── features ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def samples() -> InMemory:
    return InMemory(*pictures(17, side=32), Labels(NAMES))


@pytest.fixture
def counted(noisy_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> tuple[Classifier, list[int]]:
    """A classifier, and the sizes of the batches it saw."""
    sizes: list[int] = []
    forward = Classifier.forward

    def count(self: Classifier, resized: list[np.ndarray], *, embed: bool = False) -> torch.Tensor:
        sizes.append(len(resized))
        return forward(self, resized, embed=embed)

    monkeypatch.setattr(Classifier, "forward", count)
    return Classifier(noisy_checkpoint), sizes


def test_features_are_computed_once(counted: tuple[Classifier, list[int]], samples: InMemory, tmp_path: Path) -> None:
    classifier, sizes = counted
    samples.files[5] = samples.files[5][:-30]
    rows, progress = np.array([2, 3, 5, 16, 7, 11, 0]), list[tuple[int, int]]()
    first = extract(
        classifier, samples, rows, cache=tmp_path / "new", batch_size=3, on_batch=lambda *done: progress.append(done)
    )
    assert progress == [(3, 7), (6, 7), (7, 7)]
    assert sizes == [2, 3, 1]
    assert first.features.dtype == np.float32
    assert first.ok.tolist() == [True, True, False, True, True, True, True]
    assert np.allclose(first.features[3], classifier.embed(samples.files[16])[0], atol=1e-5)
    ((key, kind, message),) = first.errors
    assert (key, kind) == ("image-005.png", "corrupt")
    assert "cut short" in message or "truncated" in message
    again = extract(classifier, samples, rows, cache=tmp_path / "new", on_batch=lambda *done: pytest.fail("computed"))
    assert len(sizes) == 3
    assert np.array_equal(first.features, again.features, equal_nan=True)
    assert np.array_equal(first.ok, again.ok)
    assert first.errors == again.errors
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


def test_cache_knows_what_features_depend_on(
    counted: tuple[Classifier, list[int]], noisy_checkpoint: Checkpoint, samples: InMemory, tmp_path: Path
) -> None:
    classifier, sizes = counted
    rows = np.arange(4)

    def computed(classifier: Classifier, samples: InMemory = samples, rows: np.ndarray = rows) -> bool:
        before = len(sizes)
        extract(classifier, samples, rows, cache=tmp_path)
        return len(sizes) > before

    assert computed(classifier)
    assert not computed(classifier)
    assert computed(classifier, rows=rows[::-1].copy())
    assert computed(classifier, samples=InMemory(samples.files[1:], samples.targets[1:], samples.labels))
    assert noisy_checkpoint.preprocess is not None
    nearest = replace(noisy_checkpoint.preprocess, resample="nearest")
    assert computed(Classifier(replace(noisy_checkpoint, preprocess=nearest)))
    assert computed(Classifier(noisy_checkpoint, dtype="fp32" if has_bf16() else "bf16"))  # the one that auto is not
    model = noisy_checkpoint.model
    assert isinstance(model, ViT)
    changed = ViT(model.config).eval()
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.norm.bias[3] += 0.01
    assert computed(Classifier(replace(noisy_checkpoint, model=changed)))
    headed = ViT(replace(model.config, num_classes=3)).eval()  # another head on the same body
    headed.load_state_dict({k: v for k, v in model.state_dict().items() if "head" not in k}, strict=False)
    assert not computed(Classifier(replace(noisy_checkpoint, model=headed, labels=Labels(NAMES))))
    mean = ViT(replace(model.config, pool="mean")).eval()
    mean.load_state_dict(model.state_dict())
    assert computed(Classifier(replace(noisy_checkpoint, model=mean)))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_damaged_cache_is_computed_again(
    damage: str, counted: tuple[Classifier, list[int]], samples: InMemory, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    classifier, sizes = counted
    first = extract(classifier, samples, np.arange(9), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "other":
        module.save_file({"features": np.ones((9, 2), np.float32)}, path)
    else:
        data[-5] ^= 1
        path.write_bytes(bytes(data[: {"cut": -20, "flip": None, "empty": 0}[damage]]))
    with caplog.at_level(logging.WARNING):
        again = extract(classifier, samples, np.arange(9), cache=tmp_path)
    assert len(sizes) == 2
    assert "is damaged" in caplog.text
    assert np.array_equal(first.features, again.features)
    assert np.array_equal(first.features, extract(classifier, samples, np.arange(9), cache=tmp_path).features)
    assert len(sizes) == 2


def test_without_a_cache_and_with_one_that_cannot_be_written(
    counted: tuple[Classifier, list[int]], samples: InMemory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier, sizes = counted
    assert len(extract(classifier, samples, np.arange(4), cache=None).features) == 4
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert extract(classifier, samples, np.arange(4), cache=tmp_path / "file").ok.all()
    assert "the features are not kept" in caplog.text
    assert len(sizes) == 2
    assert extract(classifier, samples, np.arange(0), cache=tmp_path / "c").features.shape == (0, 24)
    assert extract(classifier, samples, np.arange(0), cache=tmp_path / "c").features.shape == (0, 24)
