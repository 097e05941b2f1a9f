"""Linear probes on frozen features: extracted once and cached, fitted in closed form or by L-BFGS, cross-validated.

Every fit standardises the features and turns them into their principal axes, where both objectives are nearly
separable: ridge regression becomes a division, and the curvature of logistic regression is known well enough along
each axis that L-BFGS needs tens of passes instead of hundreds. What comes back is folded into one weight and bias for
the features as they are.
"""

import dataclasses
import json
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from opsin.checkpoints.files import replacing
from opsin.data.samples import Samples, digest
from opsin.errors import DataError
from opsin.pipeline import Classifier

log = logging.getLogger(__name__)

Array = np.ndarray | Tensor
Row = dict[str, Any]
Head = tuple[Tensor, Tensor]  # weight (K, D), bias (K,), float32: logits = features @ weight.T + bias

PATH = tuple(4.0**power for power in range(8, -4, -1))  # 65,536 … 1/64: every l2 that is tried, from strong to weak
CHUNK = 2**19  # logits at once: they stay in the processor's cache between their softmax and its gradient
NEVER = -20.0  # bias of a class without images. Logits sum to 0 over the others, so that the best is 0 or more


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A head for frozen features, and how it was found."""

    weight: Tensor  # (K, D) float32
    bias: Tensor  # (K,) float32
    method: Literal["logistic", "ridge"]
    l2: float  # of standardised features; see `fit_logistic` and `fit_ridge`
    cv_accuracy: float | None  # of images while they were held out; None: no class has two images
    table: list[Row]  # {"method", "l2", "accuracy"} of everything that was tried
    history: list[Row]  # {"step", "loss"} of the last fit: mean loss per image, penalty included
    scale: float = 1.0  # what ridge regression's scores were multiplied by, to be read as logits; it is in the weights


# ── objectives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def fit_logistic(
    features: Array,
    targets: Array,
    num_classes: int,
    *,
    l2: float,
    sample_weights: Array | None = None,
    max_iter: int = 1000,
    tolerance: float = 1e-8,
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
        tolerance: stop when about this share of the loss is left to gain.
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
    def of(
        cls, features: Array, targets: Array, num_classes: int, weights: Array | None, multi_label: bool
    ) -> "_Data":
        x = torch.as_tensor(features).float()
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(f"features have shape {tuple(x.shape)}; they must be (N, D) with N at least 1.")
        y = torch.as_tensor(targets).to(x.device)
        y = y.float() if multi_label else y.long()
        if y.shape != ((len(x), num_classes) if multi_label else (len(x),)):
            wanted = f"({len(x)}, {num_classes}) of 0 and 1" if multi_label else f"({len(x)},)"
            raise ValueError(f"targets have shape {tuple(y.shape)}; {len(x)} rows of features need {wanted}.")
        low, high = y.min().item(), y.max().item()
        if low < 0 or high >= (2 if multi_label else num_classes):
            what = "0 and 1" if multi_label else f"0 to {num_classes - 1}"
            raise ValueError(f"targets go from {low:g} to {high:g}; they must be {what}.")
        w = None if weights is None else torch.as_tensor(weights).to(x.device).float()
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
        return (weight * scale).float().cpu(), (bias * scale).float().cpu()

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
    solution, history = _minimise(objective, first, max_iter=max_iter, tolerance=tolerance)
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
        step, low, high = 1.0, 0.0, math.inf
        for _ in range(30):
            there = x + step * direction
            new_value, new_gradient, new_hessian = objective(there)
            if not new_value <= value + 1e-4 * step * slope + 1e-9 * abs(value):
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
