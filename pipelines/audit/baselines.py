"""What separates the same texts without the dictionary: words alone, length alone, dense probes of the activations.

Every baseline is fitted on the discover texts and scores the confirm texts, as the latents do. If words alone do as
well as the model's activations, the texts test vocabulary and not the concept.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import optimize

from pipelines.audit.examples import words

PENALTY = 0.1
"""Ridge penalty per text for rows of about unit length (scikit-learn's C = 10)."""


def bag_of_words(
    fit_texts: Sequence[str], fit_labels: Bool[np.ndarray, " n_fit"], texts: Sequence[str]
) -> Float[np.ndarray, " n_texts"]:
    """Scores of a ridge-penalised logistic regression on tf-idf words (words of at least two fitting texts)."""
    counts = Counter(word for text in fit_texts for word in set(words(text)))
    vocabulary = {word: i for i, word in enumerate(sorted(w for w, c in counts.items() if c >= 2))}
    if not vocabulary:
        return np.zeros(len(texts))
    idf = np.array([np.log(len(fit_texts) / counts[word]) + 1 for word in vocabulary])

    def rows(some: Sequence[str]) -> Float[np.ndarray, "n d"]:
        out = np.zeros((len(some), len(vocabulary)))
        for i, text in enumerate(some):
            for word, count in Counter(words(text)).items():
                if word in vocabulary:
                    out[i, vocabulary[word]] = count
        out *= idf
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]

    weights, _ = logistic(rows(fit_texts), fit_labels)
    return rows(texts) @ weights  # type: ignore[no-any-return]


def text_length(texts: Sequence[str]) -> Float[np.ndarray, " n_texts"]:
    """Words per text."""
    return np.array([len(words(text)) for text in texts], dtype=np.float64)


def mean_difference(
    fit: Float[np.ndarray, "n_fit d_in"], fit_labels: Bool[np.ndarray, " n_fit"], x: Float[np.ndarray, "n_texts d_in"]
) -> Float[np.ndarray, " n_texts"]:
    """Projection on mean(positives) - mean(negatives), every dimension scaled to unit variance first.

    Without the scaling a single dimension that holds a third of a residual stream's variance decides alone.
    """
    fit, x = _standardised(fit, x)
    return x @ (fit[fit_labels].mean(axis=0) - fit[~fit_labels].mean(axis=0))  # type: ignore[no-any-return]


def dense_logistic(
    fit: Float[np.ndarray, "n_fit d_in"], fit_labels: Bool[np.ndarray, " n_fit"], x: Float[np.ndarray, "n_texts d_in"]
) -> Float[np.ndarray, " n_texts"]:
    """Scores of a ridge-penalised logistic regression on the standardised activations."""
    fit, x = _standardised(fit, x)
    weights, _ = logistic(fit, fit_labels)
    return x @ weights  # type: ignore[no-any-return]


def probe_direction(
    fit: Float[np.ndarray, "n_fit d_in"], fit_labels: Bool[np.ndarray, " n_fit"]
) -> tuple[Float[np.ndarray, " d_in"], float]:
    """Weights of raw activations and bias of `dense_logistic`'s probe; it finds what x @ weights + bias > 0."""
    fit = fit.astype(np.float64)
    mean, scale = _scale(fit)
    weights, bias = logistic((fit - mean) / scale, fit_labels)
    return weights / scale, bias - float(mean @ (weights / scale))


def logistic(
    x: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, " n"], *, penalty: float = PENALTY
) -> tuple[Float[np.ndarray, " d"], float]:
    """Weights and bias of  min  sum log(1 + exp(-y (x.w + b))) + penalty / 2 |w|^2,  y in {-1, 1}, by L-BFGS."""
    y = np.where(labels, 1.0, -1.0)

    def objective(parameters: Float[np.ndarray, " d1"]) -> tuple[float, Float[np.ndarray, " d1"]]:
        w, b = parameters[:-1], parameters[-1]
        margin = y * (x @ w + b)
        slope = -y / (1 + np.exp(np.clip(margin, -500, 500)))
        loss = np.logaddexp(0, -margin).sum() + penalty / 2 * (w @ w)
        return float(loss), np.concatenate([x.T @ slope + penalty * w, [slope.sum()]])

    found = optimize.minimize(objective, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B")
    return found.x[:-1], float(found.x[-1])


def cross_validated_bag_of_words(
    texts: Sequence[str],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Sequence[str] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> Float[np.ndarray, " n_texts"]:
    """Out-of-fold bag-of-words scores of every text, standardised within each fold so that folds compare.

    Folds are of whole groups, dealt evenly over groups of positives, of negatives and of both.
    """
    names = np.arange(len(texts)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    n_groups = int(names.max()) + 1
    has_positive = np.bincount(names, labels, n_groups) > 0
    has_negative = np.bincount(names, ~labels, n_groups) > 0
    rng = np.random.default_rng(seed)
    fold_of = np.empty(n_groups, dtype=int)
    for kind in (has_positive & ~has_negative, has_negative & ~has_positive, has_positive & has_negative):
        rows = rng.permutation(np.flatnonzero(kind))
        fold_of[rows] = np.arange(rows.size) % folds
    fold = fold_of[names]
    out = np.zeros(len(texts))
    for f in range(folds):
        inside = fold == f
        if not inside.any() or np.unique(labels[~inside]).size < 2:
            continue
        scores = bag_of_words([t for t, i in zip(texts, inside, strict=True) if not i], labels[~inside],
                              [t for t, i in zip(texts, inside, strict=True) if i])  # fmt: skip
        out[inside] = (scores - scores.mean()) / max(float(scores.std()), 1e-12)
    return out


def _standardised(
    fit: Float[np.ndarray, "n_fit d_in"], x: Float[np.ndarray, "n_texts d_in"]
) -> tuple[Float[np.ndarray, "n_fit d_in"], Float[np.ndarray, "n_texts d_in"]]:
    """Both in units of the fitting texts' standard deviation, divided by sqrt(d_in): rows of about unit length."""
    fit, x = fit.astype(np.float64), x.astype(np.float64)
    mean, scale = _scale(fit)
    return (fit - mean) / scale, (x - mean) / scale


def _scale(fit: Float[np.ndarray, "n_fit d_in"]) -> tuple[Float[np.ndarray, " d_in"], Float[np.ndarray, " d_in"]]:
    return fit.mean(axis=0), np.maximum(fit.std(axis=0), 1e-12) * np.sqrt(fit.shape[1])
