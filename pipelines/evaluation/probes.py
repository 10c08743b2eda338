"""Logistic probes, many at once, with every choice made on training rows alone.

    probe = fit_probes(columns, labels, fold)      # columns [n_tasks, n, k], labels [n_tasks, n]
    scores = probe.score(other_columns)            # > 0: positive, classes weighted equally

The ridge penalty of each task is chosen by cross-validated loss. Nothing here ever sees a test row.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

PENALTIES = (0.01, 0.1, 1.0)
"""Ridge penalties that are tried, per column, for columns of unit variance."""
N_FOLDS = 3
NEWTON_STEPS = 25
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Probes:
    """One probe a task, in the units of the columns that it was fitted to."""

    weight: Float[np.ndarray, "n_tasks k"]
    bias: Float[np.ndarray, " n_tasks"]
    held_out: Float[np.ndarray, "n_tasks n"]
    """Score of each training row by the probe of the folds without it, under the chosen penalty."""

    def score(self, columns: Float[np.ndarray, "n_tasks n k"]) -> Float[np.ndarray, "n_tasks n"]:
        """Log-odds with the classes weighted equally."""
        return np.einsum("tnk,tk->tn", columns, self.weight) + self.bias[:, None]  # type: ignore[no-any-return]


def stratified_folds(stratum: Int[np.ndarray, " n"], seed: int, n_folds: int = N_FOLDS) -> Int[np.ndarray, " n"]:
    """A fold for each row, so that each fold has its share of every stratum."""
    order = np.lexsort((np.random.default_rng(seed).random(len(stratum)), stratum))
    fold = np.empty(len(stratum), np.int64)
    fold[order] = np.arange(len(stratum)) % n_folds
    return fold


def fit_probes(
    columns: Float[np.ndarray, "n_tasks n k"], labels: Bool[np.ndarray, "n_tasks n"], fold: Int[np.ndarray, " n"]
) -> Probes:
    """Fit one ridge-penalised logistic regression per task; see the module.

    Columns are standardised first, so that their scale does not matter; a constant column gets weight 0.
    """
    mean = columns.mean(axis=1, keepdims=True)
    scale = columns.std(axis=1, keepdims=True)
    scale = np.where(scale > 1e-12 * np.maximum(np.abs(mean), 1e-300), scale, np.inf)
    x = (columns - mean) / scale
    n_tasks, n, k = x.shape
    penalties = np.array(PENALTIES) * k
    folds = np.unique(fold)
    held_out = np.zeros((len(penalties), n_tasks, n))
    for f in folds:
        inside = fold != f
        for p, penalty in enumerate(penalties):
            theta = _newton(x[:, inside], labels[:, inside], np.full(n_tasks, penalty))
            held_out[p][:, ~inside] = _margin(x[:, ~inside], theta)
    weights = _balanced(labels)
    loss = (weights * np.logaddexp(0, np.where(labels, -held_out, held_out))).sum(axis=2)
    best = loss.argmin(axis=0)
    theta = _newton(x, labels, penalties[best])
    weight = theta[:, :-1] / scale[:, 0]
    bias = theta[:, -1] - (weight * mean[:, 0]).sum(axis=1)
    return Probes(weight, bias, held_out[best, np.arange(n_tasks)])


def fit_dense_probes(
    x: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, "n_tasks n"], fold: Int[np.ndarray, " n"]
) -> Probes:
    """Probes on all columns. A ridge penalty does not see rotations, so the rows' own space of rank ≤ n is enough."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-12 * np.maximum(np.abs(mean), 1e-300), scale, np.inf)
    u, s, vt = np.linalg.svd((x - mean) / scale, full_matrices=False)
    coordinates = u * s
    # `fit_probes` standardises, which would undo the spectrum: here the penalty belongs to the original columns.
    n_tasks, n_columns = len(labels), x.shape[1]
    penalties = np.array(PENALTIES) * n_columns
    held_out = np.zeros((len(penalties), n_tasks, len(x)))
    best, theta = np.zeros(n_tasks, np.int64), np.zeros((n_tasks, len(s) + 1))
    for t in range(n_tasks):
        y, one = labels[t : t + 1], coordinates[None]
        for f in np.unique(fold):
            inside = fold != f
            batch = np.broadcast_to(one[:, inside], (len(penalties), int(inside.sum()), len(s)))
            found = _newton(batch, np.broadcast_to(y[:, inside], batch.shape[:2]), penalties)
            held_out[:, t, ~inside] = _margin(one[:, ~inside], found)
        weights = _balanced(y)
        loss = (weights * np.logaddexp(0, np.where(y, -held_out[:, t], held_out[:, t]))).sum(axis=1)
        best[t] = loss.argmin()
        theta[t] = _newton(one, y, penalties[best[t] : best[t] + 1])[0]
    weight = (theta[:, :-1] @ vt) / scale
    return Probes(weight, theta[:, -1] - weight @ mean, held_out[best, np.arange(n_tasks)])


def f1(predicted: Bool[np.ndarray, "*tasks n"], labels: Bool[np.ndarray, "*tasks n"]) -> Float[np.ndarray, " *tasks"]:
    """F1 of each task: 2 TP / (2 TP + FP + FN)."""
    hits = (predicted & labels).sum(axis=-1)
    return 2 * hits / np.maximum(predicted.sum(axis=-1) + labels.sum(axis=-1), 1)  # type: ignore[no-any-return]


def _balanced(labels: Bool[np.ndarray, "n_tasks n"]) -> Float[np.ndarray, "n_tasks n"]:
    """Row weights under which both classes weigh n / 2."""
    n = labels.shape[1]
    positive = labels.sum(axis=1, keepdims=True)
    of_each = np.where(labels, positive, n - positive)
    return n / (2 * np.maximum(of_each, 1))  # type: ignore[no-any-return]


def _margin(x: Float[np.ndarray, "n_tasks n k"], theta: Float[np.ndarray, "n_tasks k1"]) -> np.ndarray:
    return (x @ theta[:, :-1, None])[..., 0] + theta[:, -1:]  # type: ignore[no-any-return]


def _newton(
    x: Float[np.ndarray, "n_tasks n k"], labels: Bool[np.ndarray, "n_tasks n"], penalty: Float[np.ndarray, " n_tasks"]
) -> Float[np.ndarray, "n_tasks k1"]:
    """Weights and bias of  min  Σ_i w_i log(1 + exp(-y_i (x_i·θ + b))) + penalty / 2 |θ|²,  classes weighted equally.

    Newton's method with halved steps; the bias is not penalised.
    """
    n_tasks, _, k = x.shape
    weights = _balanced(labels)
    sign = np.where(labels, 1.0, -1.0)
    ridge = np.broadcast_to(np.append(np.ones(k), 0.0), (n_tasks, k + 1)) * penalty[:, None]
    theta = np.zeros((n_tasks, k + 1))

    def loss(some: np.ndarray) -> np.ndarray:
        fit = (weights * np.logaddexp(0, -sign * _margin(x, some))).sum(axis=1)
        return fit + (ridge * some**2).sum(axis=1) / 2  # type: ignore[no-any-return]

    current = loss(theta)
    for _ in range(NEWTON_STEPS):
        margin = _margin(x, theta)
        p = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
        residual = weights * (p - labels)
        gradient = np.concatenate([(residual[:, None] @ x)[:, 0], residual.sum(axis=1, keepdims=True)], axis=1)
        gradient += ridge * theta
        curvature = np.maximum(weights * p * (1 - p), 1e-12)
        weighted = x * curvature[..., None]
        hessian = np.empty((n_tasks, k + 1, k + 1))
        hessian[:, :k, :k] = x.transpose(0, 2, 1) @ weighted
        hessian[:, :k, k] = hessian[:, k, :k] = weighted.sum(axis=1)
        hessian[:, k, k] = curvature.sum(axis=1)
        hessian[:, np.arange(k + 1), np.arange(k + 1)] += ridge + 1e-9
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones(n_tasks)
        for _ in range(30):
            after = loss(theta - size[:, None] * step)
            worse = after > current + 1e-12 * np.abs(current)
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        theta = theta - size[:, None] * step
        done = np.abs(current - after) <= TOLERANCE * np.maximum(np.abs(current), 1)
        current = after
        if done.all():
            break
    return theta
