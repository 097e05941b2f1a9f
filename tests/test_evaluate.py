"""Figures against scikit-learn and against sums done by hand; bad images fail alone and in order."""

import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import plots
from opsin.checkpoints import Checkpoint
from opsin.data.samples import Samples, digest
from opsin.errors import DataError, ImageNotFound, MissingExtra, NoHead
from opsin.evaluate import (
    Metrics,
    Predictions,
    agreement,
    align,
    fit_temperature,
    knn,
    load_real,
    mcnemar,
    metrics,
    predict,
    real_accuracy,
    real_sets,
    report,
    v2_labels,
)
from opsin.labels import Labels
from opsin.models.vit import ViT
from opsin.pipeline import Classifier

LETTERS = Labels(tuple("abcdefg"))


def encoded(seed: int) -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


class InMemory(Samples):
    def __init__(self, sources: Sequence[bytes | None], labels: Labels, targets: Sequence[int] | None = None) -> None:
        super().__init__(np.array(targets if targets is not None else [0] * len(sources), np.int64), labels)
        self.sources = sources

    def key(self, index: int) -> str:
        return f"photo-{index}"

    def source(self, index: int) -> bytes:
        found = self.sources[index]
        if found is None:
            raise ImageNotFound(f"photo-{index}: gone.")
        return found

    def identity(self) -> str:
        return digest([self.sources])


def noise(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that know something of the targets; every class has an image."""
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), random.integers(0, classes, n - classes)])
    logits = random.normal(size=(n, classes)) * 1.5
    logits[np.arange(n), targets] += 1.2
    return logits.astype(np.float32), targets


def answers(logits: np.ndarray, labels: Labels | None = LETTERS, ok: np.ndarray | None = None) -> Predictions:
    n = len(logits)
    return Predictions(
        keys=tuple(f"photo-{i}" for i in range(n)),
        rows=np.arange(n),
        ok=np.ones(n, bool) if ok is None else ok,
        logits=logits,
        features=np.empty((n, 0), np.float32),
        errors=(),
        labels=labels,
    )


# ── predict ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_come_in_the_order_asked_and_bad_images_fail_alone(classifier: Classifier) -> None:
    sources = [encoded(i) for i in range(11)]
    sources[2], sources[7] = b"", sources[7][:-60]
    samples = InMemory([*sources, None], classifier.labels or LETTERS)
    rows = [11, 10, 2, 0, 5, 7, 1, 3, 8]
    seen: list[tuple[int, int]] = []
    found = predict(classifier, samples, rows, features=True, batch_size=2, on_batch=lambda *x: seen.append(x))
    assert seen == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]
    assert found.keys == tuple(f"photo-{row}" for row in rows)
    assert found.rows.tolist() == rows
    assert found.ok.tolist() == [row not in (2, 7, 11) for row in rows]
    assert [(bad.key, bad.kind) for bad in found.errors] == [
        ("photo-11", "not_found"),
        ("photo-2", "not_an_image"),
        ("photo-7", "corrupt"),
    ]
    assert found.logits.dtype == found.features.dtype == np.float32
    assert found.logits.shape == (9, 7)
    assert found.features.shape == (9, 24)
    assert np.isnan(found.logits[~found.ok]).all()
    assert np.isnan(found.features[~found.ok]).all()
    for i in np.flatnonzero(found.ok):
        assert np.allclose(found.logits[i], classifier.logits(sources[rows[i]])[0], atol=1e-4)
        assert np.allclose(found.features[i], classifier.embed(sources[rows[i]])[0], atol=1e-4)
    assert found.labels is classifier.labels


def test_what_is_not_asked_for_has_no_columns(classifier: Classifier) -> None:
    samples = InMemory([encoded(0), encoded(1)], LETTERS)
    found = predict(classifier, samples)
    assert (found.logits.shape, found.features.shape) == ((2, 7), (2, 0))
    found = predict(classifier, samples, logits=False, features=True)
    assert (found.logits.shape, found.features.shape) == ((2, 0), (2, 24))
    bad = predict(classifier, InMemory([b"", b"x"], LETTERS), features=True)
    assert (bad.logits.shape, bad.features.shape, len(bad.errors)) == ((2, 7), (2, 24), 2)
    assert predict(classifier, samples, []).logits.shape == (0, 7)


def test_an_output_that_is_not_finite_is_an_error_of_its_image(noisy_checkpoint: Checkpoint) -> None:
    class Poisoned(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits = self.model(pixels)
            logits[pixels.flatten(1).std(1) < 0.01, 3] = float("inf")
            return logits

    flat = np.zeros((9, 9, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(flat).save(file, "PNG")
    poisoned = Classifier(replace(noisy_checkpoint, model=Poisoned(noisy_checkpoint.model)))
    found = predict(poisoned, InMemory([encoded(0), file.getvalue(), encoded(1)], LETTERS))
    assert found.ok.tolist() == [True, False, True]
    assert found.errors == (("photo-1", "not_finite", "photo-1: the model's output for it is not finite."),)
    assert np.isnan(found.logits[1]).all()


def test_images_are_read_no_further_ahead_than_two_batches(classifier: Classifier) -> None:
    read: list[int] = []

    class Counted(InMemory):
        def source(self, index: int) -> bytes:
            read.append(index)
            return super().source(index)

    def check(done: int, total: int) -> None:
        assert len(read) <= done + 3

    predict(classifier, Counted([encoded(i) for i in range(17)], LETTERS), batch_size=3, on_batch=check)
    assert sorted(read) == list(range(17))


def test_predict_says_what_cannot_be(classifier: Classifier, noisy_checkpoint: Checkpoint) -> None:
    samples = InMemory([encoded(0)], LETTERS)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        predict(classifier, samples, batch_size=0)
    with pytest.raises(ValueError, match="nothing would be computed"):
        predict(classifier, samples, logits=False)
    assert isinstance(noisy_checkpoint.model, ViT)
    body = ViT(replace(noisy_checkpoint.model.config, num_classes=0))
    embedder = Classifier(replace(noisy_checkpoint, model=body, labels=None))
    assert predict(embedder, samples, logits=False, features=True).features.shape == (1, 24)
    with pytest.raises(NoHead, match="test/noise has no classification head"):
        predict(embedder, samples)


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_class_an_image_as_scikit_learn_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support, top_k_accuracy_score

    monkeypatch.setattr("opsin.evaluate.CHUNK", 50)  # 7 rows at once, 211 is no multiple
    logits, targets = noise(211, 7)
    logits[:, 4] -= 30  # class 4 is never predicted: precision 0
    found = metrics(logits, targets, LETTERS)
    probs = torch.from_numpy(logits).double().softmax(1).numpy()
    best = logits.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(targets, best, zero_division=0)
    assert np.allclose(found.precision, precision)
    assert found.precision[4] == 0
    assert np.allclose(found.recall, recall)
    assert np.allclose(found.f1, f1)
    assert (found.support == support).all()
    macro = precision_recall_fscore_support(targets, best, average="macro", zero_division=0)[:3]
    assert np.allclose((found.macro_precision, found.macro_recall, found.macro_f1), macro)
    assert found.confusion is not None
    assert (found.confusion == confusion_matrix(targets, best)).all()
    assert found.top1 == found.score == pytest.approx((best == targets).mean())
    assert found.top5 == pytest.approx(top_k_accuracy_score(targets, logits, k=5))
    assert found.loss == pytest.approx(log_loss(targets, probs))
    assert found.brier == pytest.approx(((probs - np.eye(7)[targets]) ** 2).sum(1).mean())


def test_several_classes_an_image_as_scikit_learn_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, log_loss

    monkeypatch.setattr("opsin.evaluate.CHUNK", 50)
    random = np.random.default_rng(3)
    targets = (random.random((97, 5)) < 0.3).astype(np.uint8)
    logits = np.round(random.normal(size=(97, 5)) + 1.5 * targets - 1, 1).astype(np.float32)  # rounded: many ties
    found = metrics(logits, targets, Labels(tuple("abcde"), multi_label=True))
    said, probs = logits > 0, torch.from_numpy(logits).double().sigmoid().numpy()
    assert found.average_precision is not None
    assert np.allclose(found.average_precision, average_precision_score(targets, logits, average=None))
    assert found.mean_average_precision == found.score == pytest.approx(average_precision_score(targets, logits))
    assert np.allclose(found.f1, f1_score(targets, said, average=None))
    assert found.micro_f1 == pytest.approx(f1_score(targets, said, average="micro"))
    assert found.macro_f1 == pytest.approx(f1_score(targets, said, average="macro"))
    assert found.exact_match == pytest.approx((said == targets).all(1).mean())
    assert found.loss == pytest.approx(log_loss(targets.ravel(), probs.ravel()))
    assert found.brier == pytest.approx(brier_score_loss(targets.ravel(), probs.ravel()))
    assert sum(item["count"] for item in found.reliability) == 97 * 5
    assert (found.top1, found.top5, found.confusion) == (None, None, None)


def test_calibration_by_hand() -> None:
    """Two classes, so a logit of log(p / (1 − p)) is a confidence of p; four bins of a quarter."""
    confidence = np.array([0.6, 0.7, 0.75, 0.9, 0.8, 1 - 1e-9])
    right = np.array([True, False, True, True, False, True])
    logits = np.zeros((6, 2))
    logits[:, 1] = np.log(confidence / (1 - confidence))
    logits[2, 1] = math.log(3)  # 0.75 itself belongs below the edge
    found = metrics(logits, right.astype(int), Labels(("no", "yes")), bins=4)
    assert [item["count"] for item in found.reliability] == [0, 0, 3, 3]
    third, fourth = found.reliability[2:]
    assert (third["low"], third["high"]) == (0.5, 0.75)
    assert third["confidence"] == pytest.approx((0.6 + 0.7 + 0.75) / 3)
    assert third["accuracy"] == fourth["accuracy"] == pytest.approx(2 / 3)
    gaps = abs(2 / 3 - 2.05 / 3), abs(2 / 3 - 2.7 / 3)
    assert found.ece == pytest.approx(sum(gaps) / 2)
    assert found.mce == pytest.approx(max(gaps))
    assert found.reliability[0]["confidence"] is None


def test_of_equal_logits_the_lower_class_comes_first() -> None:
    found = metrics(np.zeros((5, 7)), np.array([0, 4, 0, 5, 0]), LETTERS)
    assert found.top1 == pytest.approx(3 / 5)
    assert found.top5 == pytest.approx(4 / 5)
    assert metrics(np.zeros((2, 3)), np.array([2, 1]), Labels(tuple("abc"))).top5 == 1


def test_a_class_without_an_image_is_not_in_the_means() -> None:
    logits, targets = noise(83, 7)
    keep = targets != 2
    found = metrics(logits[keep], targets[keep], LETTERS)
    assert np.isnan([found.precision[2], found.recall[2], found.f1[2]]).all()
    assert found.macro_recall == pytest.approx(np.delete(found.recall, 2).mean())
    assert found.to_dict()["classes"][2] == {
        "index": 2, "name": "c", "support": 0, "precision": None, "recall": None, "f1": None}  # fmt: skip
    assert "| c |" not in found.to_markdown()


def test_the_choice_is_restricted_only_when_asked() -> None:
    logits, targets = noise(120, 7)
    chosen = [5, 0, 3]
    rows = np.isin(targets, chosen)
    all_classes = metrics(logits[rows], targets[rows], LETTERS)
    few = metrics(logits[rows], targets[rows], LETTERS, classes=chosen)
    renumbered = np.array([chosen.index(i) for i in targets[rows]])
    alone = metrics(logits[rows][:, chosen], renumbered, Labels(("f", "a", "d")))
    assert few.top1 == alone.top1
    assert few.loss == pytest.approx(alone.loss)
    assert few.top1 is not None and all_classes.top1 is not None
    assert few.top1 > all_classes.top1
    assert few.names == ("f", "a", "d")
    assert few.classes.tolist() == chosen
    assert {cell[0] for cell in few.to_dict()["confusion"]} == {0, 3, 5}
    with pytest.raises(ValueError, match=r'row 1 is of class 1 \("b"\), which is not among the classes chosen'):
        metrics(logits, targets, LETTERS, classes=chosen)
    for wrong in ([], [0, 0], [7], [-1]):
        with pytest.raises(ValueError, match="classes must be different indices from 0 to 6"):
            metrics(logits[rows], targets[rows], LETTERS, classes=wrong)


def test_metrics_say_what_does_not_fit() -> None:
    logits, targets = noise(20, 7)
    with pytest.raises(ValueError, match=r"logits have shape \(20, 7\); 2 classes need \(n, 2\)"):
        metrics(logits, targets, Labels(("a", "b")))
    with pytest.raises(ValueError, match=r"logits have shape \(0, 7\)"):
        metrics(logits[:0], targets[:0], LETTERS)
    with pytest.raises(ValueError, match=r"targets have shape \(19,\); these logits need \(20,\)"):
        metrics(logits, targets[1:], LETTERS)
    with pytest.raises(ValueError, match="targets go from -1 to 6; they must be from 0 to 6"):
        metrics(logits, np.where(targets == 3, -1, targets), LETTERS)
    with pytest.raises(ValueError, match="bins is 0"):
        metrics(logits, targets, LETTERS, bins=0)
    logits[13, 2] = np.nan
    with pytest.raises(ValueError, match="the logits of row 13 are not finite"):
        metrics(logits, targets, LETTERS)


def test_markdown_lists_the_weakest_classes() -> None:
    logits, targets = noise(400, 41)
    labels = Labels((*(f"class {i}" for i in range(40)), "a|b"))
    logits[np.arange(400), targets] += 9
    logits[targets == 40] = np.eye(41, dtype=np.float32)[17] * 9  # the only class of mistakes: the first line
    found = metrics(logits, targets, labels)
    text = found.to_markdown()
    assert "The 30 classes of the lowest recall, of 41:" in text
    lines = [line for line in text.splitlines() if line.startswith(("| class ", "| a"))]
    assert lines[0] == "| class | images | recall | precision | F1 | most often taken for |"
    assert len(lines) == 31
    assert lines[1].startswith(r"| a\|b | ")
    assert lines[1].endswith(f"| 0.00 % | 0.00 % | 0.00 % | class 17 ({(targets == 40).sum()}) |")
    assert f"| top-1 | {100 * found.score:.2f} % |" in text
    assert len([line for line in found.to_markdown(None).splitlines() if line.startswith(("| class ", "| a"))]) == 42


# ── temperature ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.7])
@pytest.mark.parametrize("multi_label", [False, True])
def test_a_known_temperature_is_found(temperature: float, multi_label: bool) -> None:
    """Truth drawn from the probabilities of the logits, which are then scaled."""
    from scipy.optimize import minimize_scalar

    random = np.random.default_rng(1)
    logits = random.normal(size=(8_000, 5)) * 2
    if multi_label:
        targets = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.uint8)
    else:
        targets = (logits + random.gumbel(size=logits.shape)).argmax(1)
    found = fit_temperature((logits * temperature).astype(np.float32), targets, multi_label)
    assert found == pytest.approx(temperature, rel=0.02)
    labels = Labels(tuple("abcde"), multi_label=multi_label)
    if temperature == 3.7:
        best = minimize_scalar(
            lambda x: metrics(logits * temperature / math.exp(x), targets, labels).loss, options={"xtol": 1e-5}
        )
        assert math.log(found) == pytest.approx(best.x, abs=1e-4)
    before, after = (metrics(logits * temperature / t, targets, labels) for t in (1.0, found))
    assert after.ece < 0.02
    assert after.ece <= before.ece + 1e-3


def test_a_temperature_without_an_end(caplog: pytest.LogCaptureFixture) -> None:
    logits, targets = np.eye(3) * 2, np.arange(3)
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(logits, targets) == 1
        assert fit_temperature(-logits, targets) == 1
    assert "no temperature is best for these 3 images" in caplog.text
    assert fit_temperature(np.zeros((4, 3)), np.array([0, 1, 2, 2])) == 1  # nothing to gain: left alone
    with pytest.raises(ValueError, match=r"targets have shape \(3,\); these logits need \(3, 3\)"):
        fit_temperature(logits, targets, True)


# ── nearest neighbours ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 5, 500])
def test_neighbours_vote_as_scikit_learn_has_it(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr("opsin.evaluate.CHUNK", 1000)
    random = np.random.default_rng(2)
    centres = random.normal(size=(6, 13))
    targets = random.integers(0, 6, 131)
    train = (centres[targets] + random.normal(size=(131, 13)) * 1.5) * random.uniform(0.1, 9, (131, 1))
    queries = centres[random.integers(0, 6, 59)] + random.normal(size=(59, 13)) * 1.5
    reference = KNeighborsClassifier(
        min(k, 131), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train, targets)
    found = knn(train, targets, queries, k=k)
    assert found.dtype == np.int64
    assert (found == reference.predict(queries)).all()
    assert knn(train, targets, queries[:0]).shape == (0,)


def test_a_near_neighbour_outweighs_two_far_ones() -> None:
    train = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    query = np.array([[3.0, 1.0]])
    assert knn(train, np.array([4, 1, 1]), query, k=3).tolist() == [4]
    assert knn(train, np.array([4, 1, 1]), query, k=3, temperature=50).tolist() == [1]


def test_neighbours_say_what_does_not_fit() -> None:
    train, targets = np.ones((4, 3)), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"features have shapes \(4, 3\) and \(2, 5\)"):
        knn(train, targets, np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"train_targets have shape \(3,\) for 4 features"):
        knn(train, targets[:3], train)
    with pytest.raises(ValueError, match="k is 0 and temperature 0.07"):
        knn(train, targets, train, k=0)
    with pytest.raises(ValueError, match="the features of row 2 are not finite"):
        knn(train, targets, np.array([[1, 1, 1], [1, 1, 1], [1, np.nan, 1]]))


# ── ReaL, V2 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_real_labels(tmp_path: Path) -> None:
    """Found by the number in the name, not by place; images without a class are not counted."""
    (tmp_path / "real.json").write_text("[[5], [], [7, 9], [8]]")
    real = load_real(tmp_path / "real.json")
    keys = [
        "val/n01440764/ILSVRC2012_val_00000003.JPEG",
        "val.tar::ILSVRC2012_val_00000001_n01751748.JPEG",
        "ILSVRC2012_val_00000002.JPEG",
        "ILSVRC2012_val_00000004.JPEG",
    ]
    sets = real_sets(real, keys, Labels.imagenet_1k())
    assert sets == [{7, 9}, {5}, set(), {8}]
    assert real_accuracy(np.array([9, 4, 0, 8]), sets) == (pytest.approx(2 / 3), 3)
    assert real_sets(real, keys[:1], Labels.numbered(1000)) == [{7, 9}]
    turned = Labels.from_names(tuple(reversed(Labels.imagenet_1k().wnids or ())))
    assert real_sets(real, keys[:2], turned) == [{999 - 7, 999 - 9}, {999 - 5}]
    with pytest.raises(DataError, match='"cat.jpg" is none of the 4 validation images'):
        real_sets(real, ["cat.jpg"], Labels.imagenet_1k())
    with pytest.raises(DataError, match="ILSVRC2012_val_ and a number from 00000001 to 00000004"):
        real_sets(real, ["ILSVRC2012_val_00000005.JPEG"], Labels.imagenet_1k())
    with pytest.raises(DataError, match="the model lacks 800 of its 1,000 classes"):
        real_sets(real, keys, Labels.tiny_imagenet())
    with pytest.raises(DataError, match="none of the 1 images has a ReaL label"):
        real_accuracy(np.array([1]), [frozenset()])


@pytest.mark.parametrize("text", ["{}", "[]", "[[1], 2]", "[[1000]]", "[[-1]]", "[[true]]", '[["n01440764"]]'])
def test_another_file_than_real_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "real.json"
    path.write_text(text)
    with pytest.raises(DataError, match="real.json is not ReaL's real.json"):
        load_real(path)
    path.write_bytes(b"\x80[")
    with pytest.raises(DataError, match="is not JSON"):
        load_real(path)


def test_v2_folders_are_indices_not_places() -> None:
    names = sorted(map(str, range(1000)))  # "0", "1", "10", "100", …
    imagenet = Labels.imagenet_1k()
    found = v2_labels(names, imagenet)
    assert found is not None
    assert found.tolist() == [int(name) for name in names]
    samples = InMemory([b""] * 3, Labels(tuple(names)), [0, 2, 999])
    align(samples, imagenet)
    assert samples.targets.tolist() == [0, 10, 999]
    assert samples.labels is imagenet

    assert v2_labels(names[:-1], imagenet) is None
    assert v2_labels(names[:3], imagenet, partial=True) is not None
    assert v2_labels(["00", *names[1:]], imagenet) is None
    assert v2_labels(["1000", *names[1:]], imagenet) is None
    assert v2_labels(names, LETTERS) is None


def test_a_model_of_numbered_folders_keeps_its_own_order() -> None:
    """Trained on folders "0" to "11", whose indices went by text: the name decides."""
    names = tuple(sorted(map(str, range(12))))
    assert v2_labels(names[::-1], Labels(names)) is None
    samples = InMemory([b""] * 2, Labels(names[::-1]), [0, 11])
    align(samples, Labels(names))
    assert samples.targets.tolist() == [11, 0]


def test_classes_are_matched_by_name_otherwise() -> None:
    samples = InMemory([b""] * 3, Labels(("g", "b")), [0, 1, 0])
    with pytest.raises(DataError, match="5 classes of the model without an image"):
        align(samples, LETTERS)
    align(samples, LETTERS, partial=True)
    assert samples.targets.tolist() == [6, 1, 6]


# ── agreement ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_agreement_by_hand() -> None:
    eye = np.eye(7, dtype=np.float32) * 3
    targets = np.array([0, 1, 2, 3, 4, 5])
    a = answers(eye[[0, 1, 2, 6, 6, 5]], ok=np.array([True] * 5 + [False]))
    b = answers(eye[[0, 1, 5, 3, 6, 5]])
    found = agreement(a, b, targets)
    assert found["images"] == 5
    assert found["equal"] == pytest.approx(3 / 5)
    assert [found[name] for name in ("both_right", "only_a_right", "only_b_right", "both_wrong")] == [2, 1, 1, 1]
    assert found["mcnemar_p"] == 1
    assert found["disagreements"] == [["photo-2", "c", "f"], ["photo-3", "g", "d"]]
    assert found["logit_drift_max"] == pytest.approx(3)
    assert found["logit_drift_mean"] == pytest.approx(2 * 2 * 3 / (5 * 7))
    top, rest = math.exp(3) / (math.exp(3) + 6), 1 / (math.exp(3) + 6)
    assert found["kl_mean"] == pytest.approx(2 / 5 * (top * 3 - rest * 3))
    assert len(agreement(a, b, limit=1)["disagreements"]) == 1
    assert "mcnemar_p" not in agreement(a, b)
    json.dumps(found, allow_nan=False)


def test_models_with_their_classes_in_another_order() -> None:
    logits, targets = noise(60, 7)
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    turned = Labels(tuple(LETTERS.names[i] for i in order))
    found = agreement(answers(logits), answers(logits[:, order], turned), targets)
    assert (found["equal"], found["logit_drift_max"], found["kl_mean"]) == (1, 0, pytest.approx(0, abs=1e-12))
    assert found["only_a_right"] == found["only_b_right"] == 0
    fewer = agreement(answers(logits), answers(logits[:, order[:4]], Labels(turned.names[:4])), targets)
    assert "kl_mean" not in fewer
    known = np.isin(logits.argmax(1), order[:4])
    assert fewer["equal"] == pytest.approx(known.mean())  # where a's best is one of the four, it is b's too


def test_two_classes_of_one_name_are_two() -> None:
    cranes = Labels(("crane", "heron", "crane"))
    logits = np.eye(3, dtype=np.float32)
    found = agreement(answers(logits, cranes), answers(logits, Labels(cranes.names)), np.arange(3))
    assert found["equal"] == 1
    assert found["both_right"] == 3
    assert "kl_mean" in found


def test_multi_label_models_agree_on_all_classes_or_not() -> None:
    labels = Labels(tuple("abc"), multi_label=True)
    turned = Labels(("c", "a", "b"), multi_label=True)
    a = np.array([[1, -1, 2], [-1, -1, -1], [1, 1, -1]], np.float32)
    b = a.copy()
    b[2, 1] = -1
    found = agreement(answers(a, labels), answers(b[:, [2, 0, 1]], turned), (a > 0).astype(np.uint8))
    assert found["equal"] == pytest.approx(2 / 3)
    assert (found["both_right"], found["only_a_right"]) == (2, 1)
    assert found["disagreements"] == [["photo-2", "a; b", "a"]]
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    assert found["kl_mean"] == pytest.approx((p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 3)
    with pytest.raises(ValueError, match="only if they have the same classes"):
        agreement(answers(a, labels), answers(a, Labels(tuple("abx"), multi_label=True)))
    with pytest.raises(ValueError, match="one class an image, the other several"):
        agreement(answers(a, labels), answers(a, Labels(tuple("abc"))))


def test_agreement_says_what_cannot_be() -> None:
    logits, _ = noise(9, 7)
    with pytest.raises(ValueError, match="not of the same images"):
        agreement(answers(logits), answers(logits[:5]))
    with pytest.raises(ValueError, match="needs the logits of both"):
        agreement(answers(logits), answers(np.empty((9, 0), np.float32)))
    with pytest.raises(DataError, match="no image has an answer of both models"):
        agreement(answers(logits), answers(logits, ok=np.zeros(9, bool)))


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (3, 3), (2, 9), (30, 12), (1300, 1450), (0, 5000)])
def test_mcnemar_is_the_binomial_test(a: int, b: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-300)


# ── report ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: Path) -> dict:
    def constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=constant)


def test_report_writes_all_its_files(classifier: Classifier, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "1"
    samples = InMemory([*(encoded(i) for i in range(9)), b"no"], classifier.labels or LETTERS, [*range(7), 0, 1, 2])
    found = predict(classifier, samples)
    result = metrics(found.logits[found.ok], samples.targets[found.ok], samples.labels)
    against = agreement(found, found, samples.targets)
    facts = {"model": "test/noise", "temperature": 1.25, "environment": {"torch": "2"}}
    written = report(folder, result, found, facts=facts, against=against)
    assert sorted(path.name for path in written) == sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in written) == [
        "confusion.png", "errors.jsonl", "evaluation.json", "evaluation.md", "reliability.png"]  # fmt: skip
    data = read(folder / "evaluation.json")
    assert list(data)[:4] == ["model", "temperature", "environment", "bad_images"]
    assert {name: data[name] for name in result.to_dict()} == result.to_dict()
    assert data["agreement"]["equal"] == 1
    assert data["bad_images"] == 1
    bad = json.loads((folder / "errors.jsonl").read_text())
    assert bad == {"key": "photo-9", "error": {"type": "not_an_image", "message": found.errors[0].message}}
    text = (folder / "evaluation.md").read_text()
    for part in ("- model: test/noise\n", "- temperature: 1.25\n", "answer: 1 (errors.jsonl)", "| equal | 1 |"):
        assert part in text
    assert "environment" not in text
    assert "class 3" in text
    for name in ("confusion.png", "reliability.png"):
        with Image.open(folder / name) as image:
            image.load()


def multi_label_result() -> tuple[Metrics, Predictions]:
    random = np.random.default_rng(5)
    logits = random.normal(size=(20, 3)).astype(np.float32)
    targets = (random.random((20, 3)) < 0.5).astype(np.uint8)
    targets[:, 2] = 0
    labels = Labels(("vis", "bird", "x\udcff"), multi_label=True)
    return metrics(logits, targets, labels), answers(logits, labels)


def test_a_report_leaves_no_picture_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "confusion.png").write_text("of an earlier model")
    result, found = multi_label_result()
    written = report(tmp_path, result, found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert not (tmp_path / "confusion.png").exists()
    data = read(tmp_path / "evaluation.json")
    assert data["classes"][2]["average_precision"] is None
    assert data["classes"][2]["name"] == "x\udcff"
    assert "confusion" not in data
    assert "average precision |" in (tmp_path / "evaluation.md").read_text()
    assert (tmp_path / "errors.jsonl").read_text() == ""


def test_without_matplotlib_the_figures_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(*_: object) -> None:
        raise MissingExtra("matplotlib", "train")

    monkeypatch.setattr(plots, "reliability", absent)
    monkeypatch.setattr(plots, "confusion", absent)
    logits, targets = noise(30, 7)
    written = report(tmp_path, metrics(logits, targets, LETTERS), answers(logits))
    assert [path.name for path in written] == ["evaluation.json", "evaluation.md", "errors.jsonl"]
    assert 'no confusion.png: matplotlib is not installed. Install it with: pip install "opsin[train]"' in caplog.text


def test_the_picture_has_the_classes_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[np.ndarray, list[str]]] = []
    monkeypatch.setattr(plots, "reliability", lambda *_: None)
    monkeypatch.setattr(plots, "confusion", lambda path, counts, names: drawn.append((counts, names)))
    eye = np.eye(7, dtype=np.float32)
    report(tmp_path, metrics(eye[[1, 1, 4]], np.array([1, 4, 4]), LETTERS), answers(eye[:3]))
    [(counts, names)] = drawn
    assert names == ["b", "e"]
    assert counts.tolist() == [[1, 0], [1, 1]]


def test_a_failed_report_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evaluation.json").write_text("yesterday")

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result, found = multi_label_result()
    with pytest.raises(OSError, match="No space left"):
        report(tmp_path, result, found)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == "yesterday"
