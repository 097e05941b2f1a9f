"""Linear probes on frozen features: extracted once and cached, fitted in closed form or by L-BFGS, cross-validated.

Every fit standardises the features and turns them into their principal axes, where both objectives are nearly
separable: ridge regression becomes a division, and the curvature of logistic regression is known well enough along
each axis that L-BFGS needs tens of passes instead of hundreds. What comes back is folded into one weight and bias for
the features as they are.
"""

import dataclasses
import hashlib
import json
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from opsin import evaluate
from opsin.checkpoints.files import replacing
from opsin.data.samples import Samples, digest
from opsin.errors import DataError
from opsin.evaluate import Bad
from opsin.labels import Labels
from opsin.pipeline import Classifier

log = logging.getLogger(__name__)

Array = np.ndarray | Tensor
Row = dict[str, Any]
Head = tuple[np.ndarray, np.ndarray]  # weight (K, D), bias (K,), float32: logits = features @ weight.T + bias

PATH = tuple(4.0**power for power in range(8, -4, -1))  # 65,536 … 1/64: every l2 that is tried, from strong to weak
CHUNK = 2**19  # logits at once: they stay in the processor's cache between their softmax and its gradient
FORMAT = "opsin features 1"  # of a cache file
NEVER = -20.0  # bias of a class without images. Logits sum to 0 over the others, so that the best is 0 or more


# ── images → features ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a model makes of n images, in the order they were asked for."""

    features: np.ndarray  # (n, D) float32, NaN where not ok
    ok: np.ndarray  # (n,) bool
    errors: tuple[Bad, ...]  # (key, kind, message) of the others


def extract(
    classifier: Classifier,
    samples: Samples,
    rows: Sequence[int] | np.ndarray,
    *,
    cache: Path | None,
    batch_size: int = 32,
    on_batch: Callable[[int, int], None] | None = None,
) -> Features:
    """The features of images of a set, from a file of `cache` if they were computed before.

    The file is named by what the features depend on: weights and shape of the model below its head, preprocessing,
    arithmetic, the set and the rows. A damaged file is computed again. A folder that cannot be written is a warning.

    Args:
        rows: of the set, in the order wanted.
        cache: folder, made if need be; None: compute, keep nothing.
        on_batch: called with (images done, n) after every batch; not called where the cache answers.
    """
    wanted = np.asarray(rows, np.int64)
    path = None if cache is None else Path(cache) / f"{_fingerprint(classifier, samples, wanted)}.safetensors"
    if path is not None and (found := _read(path, len(wanted))) is not None:
        return found
    predictions = evaluate.predict(
        classifier, samples, wanted, logits=False, features=True, batch_size=batch_size,
        on_batch=on_batch,
    )  # fmt: skip
    features = Features(predictions.features, predictions.ok, predictions.errors)
    if path is not None:
        try:
            _write(path, features)
        except OSError as error:
            log.warning("the features are not kept: %s cannot be written: %s.", path, error.strerror or error)
    return features


def _fingerprint(classifier: Classifier, samples: Samples, rows: np.ndarray) -> str:
    """32 hex digits. The weights as they are in memory, without the head: a new head leaves the features alone."""
    model: Any = classifier.model
    config = dataclasses.asdict(model.config)
    config.pop("num_classes", None)
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(("head.", "head_dist.", "decoder.out.")):
            weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            weights.update(_bytes(tensor.detach().cpu().contiguous().numpy()))
    parts = [FORMAT, type(model).__name__, sorted(config.items()), weights.hexdigest(), classifier.preprocess.hash()]
    return digest(
        [
            *parts,
            classifier.dtype,
            classifier.engine,
            classifier.max_pixels,
            samples.identity(),
            hashlib.sha256(rows.tobytes()).hexdigest(),
        ]
    )


def _bytes(array: np.ndarray) -> memoryview:
    """Without a copy; `array` is contiguous."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # before Python 3.12 it has no type


def _write(path: Path, features: Features) -> None:
    tensors = {"features": np.ascontiguousarray(features.features), "ok": features.ok}
    facts = {"format": FORMAT, "errors": json.dumps(features.errors), "crc32": str(_crc32(tensors))}
    with replacing(path) as part:
        save_file(tensors, part, metadata=facts)


def _read(path: Path, num_rows: int) -> Features | None:
    """None: not there, or not what `_write` wrote."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("features", "ok")}
        errors = tuple(Bad(*error) for error in json.loads(facts["errors"]))
        sound = facts["crc32"] == str(_crc32(tensors)) and len(tensors["features"]) == len(tensors["ok"]) == num_rows
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged (%s): its features are computed again.", path, error)
        return None
    if not sound:
        log.warning("%s is damaged (its checksum differs): its features are computed again.", path)
        return None
    return Features(tensors["features"], tensors["ok"], errors)


def _crc32(tensors: dict[str, np.ndarray]) -> int:
    return zlib.crc32(_bytes(tensors["ok"]), zlib.crc32(_bytes(tensors["features"])))


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def fit_logistic(
    features: Array,
    targets: Array,
    num_classes: int,
    *,
    l2: float,
    sample_weights: Array | None = None,
    max_iter: int = 1000,
    tolerance: float = 1e-6,
    multi_label: bool = False,
) -> Head:
    """Logistic regression on standardised features: softmax, or a sigmoid per class with `multi_label`.

    Minimises Σ weightᵢ·lossᵢ + l2/2·‖W‖², W for standardised features, the bias free. That is scikit-learn's
    `LogisticRegression(C=1/l2)` behind its `StandardScaler`; of two classes scikit-learn fits one row instead of a
    softmax over two, so there it is C = 2/l2.

    Args:
        features: (N, D), numpy or torch; a CUDA tensor is fitted where it is.
        targets: (N,) class indices; with `multi_label` (N, K) of 0 and 1.
        sample_weights: (N,), or with `multi_label` (N, K).
        max_iter: steps of L-BFGS.
        tolerance: stop when about this share of the loss is left to gain. scikit-learn's own leaves 1e-7 to 5e-4.
    Returns:
        Weight and bias for the features as given. A class without images gets zeros and a bias so low that it is
        never the answer; with `multi_label` a class that no image has, or all have, the log-odds of its frequency.
    Raises:
        ValueError: shapes, values or an l2 that cannot be.
    """
    data = _Data.of(features, targets, num_classes, sample_weights, multi_label)
    _check_l2([l2])
    rows = [slice(0, len(data.z))]
    return data.head(_logistic(data, rows, l2, None, max_iter=max_iter, tolerance=tolerance)[0])


def fit_ridge(
    features: Array,
    targets: Array,
    num_classes: int,
    *,
    l2: Sequence[float],
    sample_weights: Array | None = None,
    multi_label: bool = False,
) -> list[Head]:
    """Ridge regression of ±1 targets on standardised features: a head for each of `l2`, by one eigendecomposition.

    Minimises Σ weightᵢ·‖W·xᵢ + b − yᵢ‖² + l2·‖W‖², the bias free: scikit-learn's `Ridge(alpha=l2)` behind its
    `StandardScaler`. Arguments and errors are those of `fit_logistic`, `sample_weights` are (N,).
    """
    data = _Data.of(features, targets, num_classes, sample_weights, multi_label)
    _check_l2(l2)
    return [data.head(theta) for theta in _ridge(_Moments.of(data, slice(0, len(data.z))), l2)]


@dataclass(frozen=True, slots=True)
class _Data:
    """Standardised features in their principal axes, with targets; and the way back."""

    z: Tensor  # N R float32, centred; R: min(N, D) at most
    power: Tensor  # R float64, sum of squares along each axis
    basis: Tensor  # D R float64, axes as columns, already divided by the features' deviations
    mean: Tensor  # D float64
    targets: Tensor  # N int64 | N K float32
    weights: Tensor | None  # N | N K float32
    num_classes: int

    @classmethod
    def of(cls, features: Array, targets: Array, num_classes: int, weights: Array | None, multi_label: bool) -> "_Data":
        x = _tensor(features).float()
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(f"features have shape {tuple(x.shape)}; they must be (N, D) with N at least 1.")
        y = _tensor(targets).to(x.device)
        y = y.float() if multi_label else y.long()
        if y.shape != ((len(x), num_classes) if multi_label else (len(x),)):
            wanted = f"({len(x)}, {num_classes}) of 0 and 1" if multi_label else f"({len(x)},)"
            raise ValueError(f"targets have shape {tuple(y.shape)}; {len(x)} rows of features need {wanted}.")
        low, high = y.min().item(), y.max().item()
        if low < 0 or high >= (2 if multi_label else num_classes):
            what = "0 and 1" if multi_label else f"0 to {num_classes - 1}"
            raise ValueError(f"targets go from {low:g} to {high:g}; they must be {what}.")
        w = None if weights is None else _tensor(weights).to(x.device).float()
        if w is not None and w.shape != y.shape and w.shape != (len(x),):
            raise ValueError(f"sample_weights have shape {tuple(w.shape)}; {len(x)} images need ({len(x)},).")
        if w is not None and not (w.isfinite().all() and w.min() >= 0 and w.max() > 0):
            raise ValueError("sample_weights must be finite, 0 or more, and not all 0.")
        return cls(*_principal_axes(x), y, w, num_classes)

    @property
    def multi_label(self) -> bool:
        return self.targets.ndim == 2

    def head(self, theta: Tensor, scale: float = 1.0) -> Head:
        """The weights (K, R + 1) for `z` as weight and bias for the features."""
        weight = theta[:, :-1] @ self.basis.T
        bias = theta[:, -1] - weight @ self.mean
        return (weight * scale).float().cpu().numpy(), (bias * scale).float().cpu().numpy()

    def scores(self, theta: Tensor, rows: slice) -> Tensor:
        """(rows, K) float32."""
        weight = theta.float()
        return torch.addmm(weight[:, -1], self.z[rows], weight[:, :-1].T)


def _principal_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`z`, `power`, `basis` and `mean` of `_Data`; the sums in float64, a few rows at a time."""
    parts = x.split(max(1, 2**22 // x.shape[1]))
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(x)
    if not mean.isfinite().all():
        bad = int((~x.isfinite().all(1)).nonzero()[0])
        raise ValueError(f"the features of row {bad} are not finite. Leave such rows out.")
    variance = torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / len(x)
    # a constant feature is left at 0, as scikit-learn leaves it; its deviation is rounding
    std = torch.where(variance > (1e-7 * mean).square(), variance.sqrt(), torch.inf)
    if len(x) >= x.shape[1]:
        gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for part in parts:
            standard = (part.double() - mean) / std
            gram += standard.T @ standard
        power, axes = torch.linalg.eigh(gram)
        keep = power > 1e-10 * power[-1]
        power, axes = power[keep], axes[:, keep]
    else:  # the images span less than the space
        standard = (x.double() - mean) / std
        power, axes = torch.linalg.eigh(standard @ standard.T)
        keep = power > 1e-10 * power[-1]
        power = power[keep]
        axes = standard.T @ (axes[:, keep] / power.sqrt())
    basis = axes / std[:, None]
    z = torch.cat([((part.double() - mean) @ basis).float() for part in parts])
    return z, power, basis, mean


def _tensor(values: Array) -> Tensor:
    if isinstance(values, np.ndarray) and not values.flags.writeable:  # torch warns of these
        values = values.copy()
    return torch.as_tensor(values)


def _check_l2(values: Sequence[float]) -> None:
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"l2 is {value}; it must be above 0.")


# ── logistic regression ──────────────────────────────────────────────────────────────────────────────────────────────


def _logistic(
    data: _Data,
    blocks: Sequence[slice],
    l2: float,
    start: Tensor | None,
    *,
    max_iter: int,
    tolerance: float,
    first_step: float = 1.0,
) -> tuple[Tensor, list[float]]:
    """Weights (K, R + 1) float64, the bias last, for the rows in `blocks`; and the mean loss after each step."""
    counts, total = _class_sums(data, blocks)
    present = (counts > 0) & (counts < total) if data.multi_label else counts > 0
    theta = torch.zeros(data.num_classes, data.z.shape[1] + 1, dtype=torch.float64, device=data.z.device)
    share = (counts + 0.5) / (total + 1)
    theta[:, -1] = share.logit() if data.multi_label else NEVER
    if int(present.sum()) < (1 if data.multi_label else 2):
        theta[present, -1] = 0.0 if not data.multi_label else theta[present, -1]
        return theta, []
    inside = _restricted(data, present)
    if start is not None:
        first = start[present]
    else:
        first = theta[present]
        if not data.multi_label:
            first[:, -1] = share[present].log()
    objective = _Objective(inside, blocks, l2)
    solution, history = _minimise(objective, first, max_iter=max_iter, tolerance=tolerance, first_step=first_step)
    if not data.multi_label:  # what all classes share says nothing; the penalty has nearly removed it already
        solution = solution - solution.mean(0)
    theta[present] = solution
    return theta, [loss / objective.total for loss in history]


def _class_sums(data: _Data, blocks: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Weight of each class's images (K,), and of all: (), or (K,) with several labels an image."""
    counts = torch.zeros(data.num_classes, dtype=torch.float64, device=data.z.device)
    total = torch.zeros_like(counts) if data.multi_label else torch.zeros((), dtype=torch.float64, device=counts.device)
    for rows in blocks:
        y = data.targets[rows]
        w = torch.ones(len(y), device=y.device) if data.weights is None else data.weights[rows]
        if data.multi_label:
            w = w.double().reshape(len(y), -1).expand(y.shape)
            counts += (y * w).sum(0)
            total += w.sum(0)
        else:
            counts.index_add_(0, y, w.double())
            total += w.double().sum()
    return counts, total


def _restricted(data: _Data, present: Tensor) -> _Data:
    """Only the classes that there is something to learn about."""
    if present.all():
        return data
    if data.multi_label:
        weights = data.weights if data.weights is None or data.weights.ndim == 1 else data.weights[:, present]
        return dataclasses.replace(
            data, targets=data.targets[:, present], weights=weights, num_classes=int(present.sum())
        )
    index = present.cumsum(0) - 1  # of a class without images in these rows: another's, which no row there asks for
    return dataclasses.replace(data, targets=index[data.targets], num_classes=int(present.sum()))


class _Objective:
    """Loss, gradient and curvature of logistic regression; the products in float32, the sums over rows in float64."""

    def __init__(self, data: _Data, blocks: Sequence[slice], l2: float) -> None:
        self.data, self.l2 = data, l2
        size = max(256, CHUNK // data.num_classes)
        self.chunks = [
            slice(start, min(start + size, rows.stop))
            for rows in blocks
            for start in range(rows.start, rows.stop, size)
        ]
        self.count = sum(rows.stop - rows.start for rows in self.chunks)
        weights = data.weights
        parts = [
            float(self.count if weights is None else weights[rows].double().sum())
            for rows in (self.chunks if weights is not None else self.chunks[:1])
        ]
        self.total = sum(parts) / (data.num_classes if weights is not None and weights.ndim == 2 else 1)
        self.power = data.power * (self.count / len(data.z))  # of these rows, nearly

    def __call__(self, theta: Tensor) -> tuple[float, Tensor, Tensor]:
        """Loss, gradient (K, R + 1) and an estimate of the Hessian's diagonal (K, R + 1), for weights (K, R + 1)."""
        data = self.data
        weight, bias = theta[:, :-1].float(), theta[:, -1].float()
        gradient = torch.zeros_like(theta)
        loss = torch.zeros((), dtype=torch.float64, device=theta.device)
        curvature = torch.zeros_like(theta[:, -1])
        for rows in self.chunks:
            z, y = data.z[rows], data.targets[rows]
            w = None if data.weights is None else data.weights[rows].reshape(len(y), -1)
            p = torch.addmm(bias, z, weight.T)  # logits, then probabilities, then their gradient
            if data.multi_label:
                losses = torch.nn.functional.softplus(p) - y * p
                p.sigmoid_()
            else:
                p -= p.amax(1, keepdim=True)
                picked = p.gather(1, y[:, None])
                total = p.exp_().sum(1, keepdim=True)
                losses = total.log() - picked
                p /= total
            loss += (losses if w is None else losses * w).sum(dtype=torch.float64)
            if w is None:
                curvature += p.sum(0) - torch.linalg.vector_norm(p, dim=0).square()
            else:
                curvature += ((p - p.square()) * w).sum(0)
            if data.multi_label:
                p -= y
            else:
                p.scatter_add_(1, y[:, None], torch.full_like(picked, -1.0))
            if w is not None:
                p *= w
            gradient[:, :-1] += p.T @ z
            gradient[:, -1] += p.sum(0)
        loss += 0.5 * self.l2 * theta[:, :-1].square().sum()
        gradient[:, :-1] += self.l2 * theta[:, :-1]
        # as if an image's probabilities had nothing to do with its place along an axis
        hessian = torch.cat([torch.outer(curvature / self.count, self.power) + self.l2, curvature[:, None]], 1)
        return float(loss), gradient, hessian.clamp_(min=1e-12 * self.count)


def _minimise(
    objective: Callable[[Tensor], tuple[float, Tensor, Tensor]],
    x: Tensor,
    *,
    max_iter: int,
    tolerance: float,
    first_step: float = 1.0,
    memory: int = 10,
) -> tuple[Tensor, list[float]]:
    """L-BFGS on a convex function, which begins each direction from the diagonal of the Hessian at that place.

    Returns:
        The place, and the value at the start and after each step.
    Source: Nocedal and Wright 2006, algorithm 7.4; the line search is that of Lewis and Overton 2013, §3.
    """
    value, gradient, hessian = objective(x)
    history, pairs = [value], list[tuple[Tensor, Tensor, float]]()
    for _ in range(max_iter):
        # the gradient in the norm of the inverse Hessian: twice what is left to gain
        if float((gradient.square() / hessian).sum()) <= 2 * tolerance * abs(value):
            break
        direction = -_inverse_hessian(gradient, hessian, pairs)
        slope = float((direction * gradient).sum())
        if slope >= 0:  # rounding has the last word
            pairs, direction = [], -gradient / hessian
            slope = float((direction * gradient).sum())
        step, low, high = first_step if len(history) == 1 else 1.0, 0.0, math.inf
        for _ in range(30):
            there = x + step * direction
            new_value, new_gradient, new_hessian = objective(there)
            if not new_value <= value + 1e-4 * step * slope + 1e-7 * abs(value):
                high = step
            elif float((new_gradient * direction).sum()) < 0.9 * slope:
                low = step
            else:
                break
            step = 2 * step if math.isinf(high) else (low + high) / 2
        else:
            break
        change, bend = there - x, new_gradient - gradient
        product = float((change * bend).sum())
        if product > 0:
            pairs = [*pairs[-memory + 1 :], (change, bend, product)]
        x, value, gradient, hessian = there, new_value, new_gradient, new_hessian
        history.append(value)
    return x, history


def _inverse_hessian(gradient: Tensor, hessian: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The two-loop recursion."""
    q, shares = gradient.clone(), []
    for change, bend, product in reversed(pairs):
        share = float((change * q).sum()) / product
        q -= share * bend
        shares.append(share)
    q /= hessian
    if pairs:
        _, bend, product = pairs[-1]
        q *= product / float((bend.square() / hessian).sum())
    for (change, bend, product), share in zip(pairs, reversed(shares), strict=True):
        q += (share - float((bend * q).sum()) / product) * change
    return q


# ── ridge regression ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Moments:
    """Weighted sums over rows, float64: all that ridge regression sees of them. Those of two blocks add up."""

    count: Tensor  # ()
    z: Tensor  # R
    zz: Tensor  # R R
    y: Tensor  # K
    yz: Tensor  # K R

    @classmethod
    def of(cls, data: _Data, rows: slice) -> "_Moments":
        num_classes, num_axes = data.num_classes, data.z.shape[1]
        zero = torch.zeros((), dtype=torch.float64, device=data.z.device)
        sums = cls(zero, *(zero.new_zeros(shape) for shape in (
            (num_axes,), (num_axes, num_axes), (num_classes,), (num_classes, num_axes)
        )))  # fmt: skip
        if data.weights is not None and data.weights.ndim == 2:
            raise ValueError("ridge regression takes one sample weight an image, (N,), not one a class.")
        size = max(256, 2**22 // max(num_axes, num_classes))
        for start in range(rows.start, rows.stop, size):
            part = slice(start, min(start + size, rows.stop))
            z, t = data.z[part].double(), data.targets[part]
            w = z.new_ones(len(z)) if data.weights is None else data.weights[part].double()
            y = t.double() if data.multi_label else torch.nn.functional.one_hot(t, num_classes).double()
            wz, wy = z * w[:, None], (2 * y - 1) * w[:, None]
            sums += cls(w.sum(), wz.sum(0), wz.T @ z, wy.sum(0), wy.T @ z)
        return sums

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def __sub__(self, other: "_Moments") -> "_Moments":
        return _Moments(*(getattr(self, name) - getattr(other, name) for name in self.__slots__))


def _ridge(sums: _Moments, l2: Sequence[float]) -> list[Tensor]:
    """Weights (K, R + 1) for each of `l2`, the bias last."""
    z, y = sums.z / sums.count, sums.y / sums.count
    power, axes = torch.linalg.eigh(sums.zz - sums.count * torch.outer(z, z))
    power = power.clamp(min=0)
    along = (sums.yz - sums.count * torch.outer(y, z)) @ axes
    thetas = []
    for value in l2:
        weight = (along / (power + value)) @ axes.T
        thetas.append(torch.cat([weight, (y - weight @ z)[:, None]], 1))
    return thetas


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, eq=False)
class ProbeResult:
    """A head for frozen features, and how it was found."""

    weight: np.ndarray  # (K, D) float32
    bias: np.ndarray  # (K,) float32
    method: Literal["logistic", "ridge"]
    l2: float  # for standardised features; see `fit_logistic` and `fit_ridge`
    cv_accuracy: float | None  # see `cross_validate`; None: no class has two images
    table: list[Row]  # of `cross_validate`
    history: list[Row]  # {"step", "loss"} of the last fit: mean over the images, the penalty's share included
    scale: float = 1.0  # what ridge regression's scores were multiplied by, to be read as logits; it is in the weights


def probe(
    features: Array,
    targets: Array,
    num_classes: int,
    *,
    multi_label: bool = False,
    class_weights: bool | Array | None = None,
    seed: int = 0,
    max_iter: int | None = None,
    lr: float = 1.0,
    folds: int = 5,
    on_row: Callable[[Row], None] | None = None,
) -> ProbeResult:
    """The best linear head that cross-validation finds, fitted on all images.

    Args:
        features: (N, D).
        targets: (N,) class indices; with `multi_label` (N, K) of 0 and 1.
        class_weights: (K,), what each class's images, or with `multi_label` its column, count; True: inverse to its
            number of images, 1 on average over the images. Accuracies then count the images alike.
        max_iter: steps of L-BFGS; None: until it is done.
        lr: length of the first step of the last fit, 1 being Newton's; the line search mends what is not right.
        on_row: called with each row of the table as it is found.
    Raises:
        DataError: fewer than two classes have images, so that there is nothing to tell apart.
        ValueError: shapes or values that cannot be.
    """
    data, order = _in_folds(features, targets, num_classes, multi_label, class_weights, folds, seed)
    limit = 1000 if max_iter is None else max_iter
    table, best, scores = _cross_validate(data, order, limit, on_row)
    method, l2, accuracy = (best["method"], best["l2"], best["accuracy"]) if best else ("logistic", 1.0, None)
    everything = slice(0, len(data.z))
    if method == "logistic":
        theta, losses = _logistic(data, [everything], l2, None, max_iter=limit, tolerance=1e-6, first_step=lr)
        history = [{"step": step, "loss": loss} for step, loss in enumerate(losses) if step or len(losses) == 1]
        weight, bias = data.head(theta)
        return ProbeResult(weight, bias, "logistic", l2, accuracy, table, history)
    sums = _Moments.of(data, everything)
    (theta,) = _ridge(sums, [l2])
    assert scores is not None
    judged = data.targets[: len(scores)].cpu().numpy()
    scale = 1 / evaluate.fit_temperature(scores.cpu().numpy(), judged, multi_label)
    weight, bias = data.head(theta, scale)
    # Σ (Wz + b − y)², all y being ±1
    extended = torch.cat([torch.cat([sums.zz, sums.z[:, None]], 1), torch.cat([sums.z, sums.count[None]])[None]])
    cross = torch.cat([sums.yz, sums.y[:, None]], 1)
    squares = ((theta @ extended) * theta).sum() - 2 * (theta * cross).sum() + num_classes * sums.count
    loss = float((squares + l2 * theta[:, :-1].square().sum()) / sums.count)
    return ProbeResult(weight, bias, "ridge", l2, accuracy, table, [{"step": 1, "loss": loss}], scale)


def cross_validate(
    features: Array,
    targets: Array,
    num_classes: int,
    *,
    multi_label: bool = False,
    class_weights: bool | Array | None = None,
    folds: int = 5,
    seed: int = 0,
    max_iter: int = 1000,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[Row | None, list[Row]]:
    """Logistic and ridge regression along `PATH`, each image judged by a fit that did not see it.

    The folds have the same share of each class, as near as may be. The one image of a class is in every training part
    and is not judged. Features are standardised once, over all images. The logistic fits begin from those of the
    stronger l2 and stop at a thousandth of the loss; once two in a row better neither accuracy nor loss, no weaker l2
    is tried.

    Returns:
        The best row, and all of them: {"method", "l2", "accuracy"}, of logistic regression also the "loss" of the
        judged images. Accuracy is top-1; with `multi_label` the mean average precision. Of equals the logistic one of
        the lowest loss is the best, for its scores are the most apt; then the stronger l2. None where no image can be
        judged.
    """
    data, order = _in_folds(features, targets, num_classes, multi_label, class_weights, folds, seed)
    table, best, _ = _cross_validate(data, order, max_iter, on_row)
    return best, table


def _in_folds(
    features: Array,
    targets: Array,
    num_classes: int,
    multi_label: bool,
    class_weights: bool | Array | None,
    folds: int,
    seed: int,
) -> tuple[_Data, list[slice]]:
    """The data with the rows of each fold side by side, behind them the rows that are not judged; and the folds."""
    if folds < 2:
        raise ValueError(f"folds is {folds}; it must be at least 2.")
    x, y = _tensor(features), _tensor(targets)
    weights = None
    if class_weights is not None and class_weights is not False:
        weights = _image_weights(y, num_classes, multi_label, class_weights)
    data = _Data.of(x, y, num_classes, weights, multi_label)
    seen, total = _class_sums(data, [slice(0, len(x))])
    if int(((seen > 0) & (seen < total) if multi_label else seen > 0).sum()) < (1 if multi_label else 2):
        names = "no class that some images have and others have not" if multi_label else "only one class has images"
        raise DataError(f"there is nothing to tell apart: {names}. Give images of two classes at least.")
    which = _folds(data.targets.cpu().numpy(), folds, seed)
    order = np.argsort(np.where(which < 0, folds, which), kind="stable")
    ends = np.cumsum(np.bincount(which[which >= 0], minlength=folds))
    slices = [slice(int(start), int(end)) for start, end in zip([0, *ends[:-1]], ends, strict=True) if end > start]
    at = torch.from_numpy(order).to(data.z.device)
    weights = None if data.weights is None else data.weights[at]
    return dataclasses.replace(data, z=data.z[at], targets=data.targets[at], weights=weights), slices


def _image_weights(y: Tensor, num_classes: int, multi_label: bool, class_weights: bool | Array) -> Tensor:
    if isinstance(class_weights, bool):
        counts = y.double().sum(0) if multi_label else torch.bincount(y.long(), minlength=num_classes).double()
        weights = (counts.sum() / counts.clamp(min=1) / num_classes).float()
    else:
        weights = _tensor(class_weights).float()
    if weights.shape != (num_classes,):
        raise ValueError(
            f"class_weights have shape {tuple(weights.shape)}; {num_classes} classes need ({num_classes},)."
        )
    return weights.expand(len(y), -1) if multi_label else weights.to(y.device)[y.long()]


def _folds(targets: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(N,) the fold of each row; −1: in every training part. Of several classes an image is of its rarest."""
    if targets.ndim == 2:
        rarity = np.where(targets > 0, targets.sum(0), np.inf)
        targets = np.where(targets.any(1), rarity.argmin(1), targets.shape[1])
    rng = np.random.default_rng(seed)
    which, dealt = np.full(len(targets), -1), 0
    for group in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == group))
        if len(rows) > 1:
            which[rows] = (dealt + np.arange(len(rows))) % folds
            dealt += len(rows)
    return which


def _rank(row: Row) -> tuple[float, float]:
    return row["accuracy"], -row.get("loss", math.inf)


def _cross_validate(
    data: _Data, folds: Sequence[slice], max_iter: int, on_row: Callable[[Row], None] | None
) -> tuple[list[Row], Row | None, Tensor | None]:
    """The table, its best row, and that row's scores of the judged rows."""
    table: list[Row] = []
    best: Row | None = None
    kept: Tensor | None = None

    def add(row: Row, scores: Tensor) -> bool:
        nonlocal best, kept
        table.append(row)
        if on_row is not None:
            on_row(row)
        if best is not None and _rank(row) <= _rank(best):
            return False
        best, kept = row, scores
        return True

    if len(folds) < 2:
        return table, None, None
    training = [
        [rows for rows in (slice(0, fold.start), slice(fold.stop, len(data.z))) if rows.stop > rows.start]
        for fold in folds
    ]
    starts: list[Tensor | None] = [None] * len(folds)
    worse, least = 0, math.inf
    for l2 in PATH:
        thetas = [
            _logistic(data, rows, l2, start, max_iter=max_iter, tolerance=1e-3)[0]
            for rows, start in zip(training, starts, strict=True)
        ]
        starts = list(thetas)
        scores = torch.cat([data.scores(theta, fold) for theta, fold in zip(thetas, folds, strict=True)])
        loss = _loss(data, scores)
        better = add({"method": "logistic", "l2": l2, "accuracy": _accuracy(data, scores), "loss": loss}, scores)
        worse = 0 if better or loss < least else worse + 1
        least = min(least, loss)
        if worse == 2:
            break
    if data.weights is None or data.weights.ndim == 1:  # weights of columns are another l2 for each
        parts = [_Moments.of(data, fold) for fold in folds]
        rest = _Moments.of(data, slice(folds[-1].stop, len(data.z)))
        whole = sum(parts, rest)
        heads = [_ridge(whole - part, PATH) for part in parts]
        for i, l2 in enumerate(PATH):
            scores = torch.cat([data.scores(thetas[i], fold) for thetas, fold in zip(heads, folds, strict=True)])
            add({"method": "ridge", "l2": l2, "accuracy": _accuracy(data, scores)}, scores)
    return table, best, kept


def _accuracy(data: _Data, scores: Tensor) -> float:
    y = data.targets[: len(scores)]
    if data.multi_label:
        labels = Labels(Labels.numbered(data.num_classes).names, multi_label=True)
        return evaluate.metrics(scores.cpu().numpy(), y.cpu().numpy(), labels).score
    hits = (scores.argmax(1) == y).double()
    w = torch.ones_like(hits) if data.weights is None else data.weights[: len(scores)].double()
    return float((hits * w).sum() / w.sum())


def _loss(data: _Data, scores: Tensor) -> float:
    y = data.targets[: len(scores)]
    if data.multi_label:
        return float(torch.nn.functional.binary_cross_entropy_with_logits(scores, y))
    losses = torch.nn.functional.cross_entropy(scores, y, reduction="none").double()
    w = torch.ones_like(losses) if data.weights is None else data.weights[: len(scores)].double()
    return float((losses * w).sum() / w.sum())


# ── few shots ────────────────────────────────────────────────────────────────────────────────────────────────────────


def fewshot_weights(
    features: Array, targets: Array, num_classes: int, *, l2: float = 2.0**10, bias: float = 100.0
) -> Head:
    """big_vision's few-shot head: whitened features and a constant one, ridge regression of ±1 targets.

    Features less their mean, divided by their standard deviation + 1e-5; to them a constant feature `bias` that stands
    for a bias, large so that the penalty hardly touches it; λ = `l2`. The scores are near ±1: they rank the classes,
    and as logits say less than they know.

    Returns:
        Weight and bias for the features as given.
    Raises:
        ValueError: shapes or values that cannot be.
    Source: big_vision `evaluators/fewshot_lsr.py`; Dosovitskiy et al. 2021, §4.1.
    """
    _check_l2([l2])
    x, y = _tensor(features).double(), _tensor(targets).long()
    if x.ndim != 2 or not len(x) or y.shape != x.shape[:1]:
        raise ValueError(f"features have shape {tuple(x.shape)}, targets {tuple(y.shape)}; right is (N, D) and (N,).")
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(f"targets go from {y.min()} to {y.max()}; they must be 0 to {num_classes - 1}.")
    if not x.isfinite().all():
        raise ValueError("the features are not all finite. Leave such rows out.")
    mean, std = x.mean(0), x.std(0, correction=0) + 1e-5
    x = torch.cat([(x - mean) / std, x.new_full((len(x), 1), bias)], 1)
    signs = 2 * torch.nn.functional.one_hot(y, num_classes).double() - 1
    if len(x) >= x.shape[1]:
        solution = torch.linalg.solve(x.T @ x + l2 * torch.eye(x.shape[1]).to(x), x.T @ signs)
    else:
        solution = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(len(x)).to(x), signs)
    weight = solution[:-1].T / std
    return weight.float().cpu().numpy(), (bias * solution[-1] - weight @ mean).float().cpu().numpy()


def few_shot(
    features: Array,
    targets: Array,
    test_features: Array,
    test_targets: Array,
    *,
    shots: Sequence[int] = (1, 5, 10, 25),
    seeds: int = 3,
    l2: float = 2.0**10,
    bias: float = 100.0,
) -> list[Row]:
    """Accuracy on the test images of heads fitted on a few images a class; a class with fewer gives what it has.

    Returns:
        For each of `shots` {"shots", "accuracy": mean over the seeds, "std", "accuracies": of each seed}.
    Raises:
        ValueError: shapes or values that cannot be.
    Source: big_vision `evaluators/fewshot_lsr.py`, whose choice of images for a seed this is.
    """
    x, y = np.asarray(features), np.asarray(targets)
    test, truth = np.asarray(test_features, np.float64), np.asarray(test_targets)
    if y.ndim != 1 or truth.ndim != 1 or not len(truth) or len(test) != len(truth):
        raise ValueError(f"targets have shapes {y.shape} and {truth.shape}; right is one class an image, (N,).")
    num_classes = int(max(y.max(), truth.max())) + 1
    found: dict[int, list[float]] = {count: [] for count in shots}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        rows = [rng.permutation(np.flatnonzero(y == index)) for index in range(num_classes)]
        for count in shots:
            chosen = np.concatenate([some[:count] for some in rows])
            weight, offset = fewshot_weights(x[chosen], y[chosen], num_classes, l2=l2, bias=bias)
            found[count].append(float(((test @ weight.T + offset).argmax(1) == truth).mean()))
    return [
        {"shots": count, "accuracy": float(np.mean(each)), "std": float(np.std(each)), "accuracies": each}
        for count, each in found.items()
    ]
