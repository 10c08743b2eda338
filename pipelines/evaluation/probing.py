"""k-sparse probing: how well a few latents tell what a document is about, and what does as well without the dictionary.

For every topic with enough documents, the columns with the largest standardised difference of class means are chosen on
training documents, a logistic probe is fitted on them there, and held-out documents are scored once. The same goes for
the baselines: coordinates of the activations ("neurons"), principal components, latents of random directions, latents
with shuffled topics, and the dense probe on all coordinates.

References: Gurnee et al. 2023, arXiv:2305.01610; SAEBench, arXiv:2503.09532, section 3; Kantamneni et al. 2025,
arXiv:2502.16681. Differs from SAEBench: classes keep their natural shares and count equally, and no choice (penalty,
columns, stopping) is made on test documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pipelines.evaluation.intervals import interval, weighted_aurocs
from pipelines.evaluation.pools import Pool
from pipelines.evaluation.probes import Probes, f1, fit_dense_probes, fit_probes, stratified_folds
from pipelines.evaluation.record import Figure
from pipelines.evaluation.schema import KS
from sae import Dictionary, TopKConfig, build

MIN_TRAIN, MIN_TEST = 10, 5
"""Documents of a topic without which it is left out."""
MOST_TOPICS = 20
"""The most frequent topics that are probed."""
N_COMPONENTS = 64
"""Principal components among which the k best are chosen."""


@dataclass(frozen=True)
class Task:
    """Which training and test documents are of which topic, with the folds of the training ones."""

    topics: tuple[str, ...]
    train: Bool[np.ndarray, "n_topics n_train"]
    test: Bool[np.ndarray, "n_topics n_test"]
    fold: Int[np.ndarray, " n_train"]
    weights: Float[np.ndarray, "n_resamples n_test"]
    """Resamples of the test documents."""

    @classmethod
    def of(cls, train: Sequence[str], test: Sequence[str], *, n_resamples: int, seed: int) -> "Task | None":
        """The task of some documents' topics; None if fewer than two topics have enough documents."""
        names, counts = np.unique(np.asarray(train, dtype=str), return_counts=True)
        held = np.asarray(test, dtype=str)
        enough = [
            (int(-count), str(name))
            for name, count in zip(names, counts, strict=True)
            if count >= MIN_TRAIN and (held == name).sum() >= MIN_TEST and len(train) - count >= MIN_TRAIN
        ]
        topics = tuple(sorted(name for _, name in sorted(enough)[:MOST_TOPICS]))
        if len(topics) < 2:
            return None
        index = np.searchsorted(names, np.asarray(train, dtype=str))
        rng = np.random.default_rng(seed)
        return cls(
            topics,
            np.stack([np.asarray(train, dtype=str) == topic for topic in topics]),
            np.stack([held == topic for topic in topics]),
            stratified_folds(index, seed),
            rng.multinomial(len(held), np.full(len(held), 1 / len(held)), size=n_resamples).astype(np.float64),
        )

    def shuffled(self, seed: int) -> "Task":
        """The topics of the training documents dealt anew; those of the test documents stay."""
        order = np.random.default_rng(seed).permutation(self.train.shape[1])
        return Task(self.topics, self.train[:, order], self.test, self.fold[order], self.weights)


@dataclass(frozen=True)
class Scored:
    """Test documents scored for every topic."""

    auroc: Figure
    accuracy: Figure
    f1: Figure
    by_topic: list[float | None]
    """AUROC of each topic."""


def rank_columns(
    x: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, "n_topics n"]
) -> Float[np.ndarray, "n_topics d"]:
    """(mean of the positives - mean of the others) / sd of every column for every topic; 0 for a constant column."""
    weights = labels / labels.sum(axis=1, keepdims=True) - ~labels / (~labels).sum(axis=1, keepdims=True)
    sd = x.std(axis=0)
    constant = sd <= 1e-9 * np.maximum(np.abs(x).max(axis=0), 1e-300)
    return np.where(constant, 0.0, (weights @ x) / np.where(constant, 1.0, sd))


def sparse_probe(
    train: Float[np.ndarray, "n_train d"], test: Float[np.ndarray, "n_test d"], task: Task, k: int
) -> tuple[Scored, Int[np.ndarray, "n_topics k"]]:
    """Probes on the k best columns of each topic, and which columns these are."""
    return sparse_probes(train, test, task, (k,))[k]


def sparse_probes(
    train: Float[np.ndarray, "n_train d"], test: Float[np.ndarray, "n_test d"], task: Task, ks: Sequence[int]
) -> dict[int, tuple[Scored, Int[np.ndarray, "n_topics k"]]]:
    """`sparse_probe` for several k, with one ranking."""
    order = np.argsort(-np.abs(rank_columns(train, task.train)), axis=1, kind="stable")
    found = {}
    for k in ks:
        chosen = order[:, : min(k, train.shape[1])]
        columns = train[:, chosen].transpose(1, 0, 2).astype(np.float64)
        probe = fit_probes(columns, task.train, task.fold)
        found[k] = (scored(probe.score(test[:, chosen].transpose(1, 0, 2).astype(np.float64)), task), chosen)
    return found


def dense_probe(
    train: Float[np.ndarray, "n_train d"], test: Float[np.ndarray, "n_test d"], task: Task
) -> tuple[Scored, Probes]:
    """Probes on all columns."""
    probes = fit_dense_probes(train.astype(np.float64), task.train, task.fold)
    scores = test.astype(np.float64) @ probes.weight.T + probes.bias
    return scored(scores.T, task), probes


def scored(scores: Float[np.ndarray, "n_topics n_test"], task: Task) -> Scored:
    """Macro averages over topics, with intervals over resampled test documents."""
    n, once = task.test.shape[1], np.ones((1, task.test.shape[1]))
    points, drawn = [], []
    for row, labels in zip(scores, task.test, strict=True):
        points.append([values[0] for values in _merits(row, labels, once)])
        drawn.append(_merits(row, labels, task.weights))
    point = np.array(points)
    # A resample without a topic's documents averages over the other topics.
    auroc, accuracy, f1_score = (
        Figure.of(float(np.mean(point[:, i])), interval(_nanmean(np.stack([d[i] for d in drawn]))), n) for i in range(3)
    )
    return Scored(auroc, accuracy, f1_score, [round(float(value), 6) for value in point[:, 0]])


def _merits(
    scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "n_resamples n"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """AUROC, balanced accuracy and F1 under each resample."""
    said = scores > 0
    positive, negative = weights @ labels, weights @ ~labels
    hits, false_alarms = weights @ (said & labels), weights @ (said & ~labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        balanced = (hits / positive + 1 - false_alarms / negative) / 2
        f = np.where(positive > 0, 2 * hits / np.maximum(hits + false_alarms + positive, 1), np.nan)
    return weighted_aurocs(scores, labels, weights), balanced, f


def _nanmean(values: Float[np.ndarray, "n_topics n_resamples"]) -> Float[np.ndarray, " n_resamples"]:
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(values.shape[1], np.nan), where=count > 0)  # type: ignore[no-any-return]


# -- what a dictionary is compared with --------------------------------------------------------------------------------


def random_directions(hook_name: str, d_in: int, d_sae: int, k: int, centre: Float[np.ndarray, " d_in"]) -> Dictionary:
    """A dictionary that learnt nothing: random unit directions around the data's mean, the k largest active."""
    sae = build(TopKConfig(d_in=d_in, d_sae=d_sae, k=k), seed=0)
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.t())
        sae.b_enc.zero_()
        sae.b_dec.copy_(torch.from_numpy(centre))
    return Dictionary(sae.requires_grad_(False), hook_name=hook_name)


def components(
    train: Float[np.ndarray, "n_train d"], test: Float[np.ndarray, "n_test d"]
) -> tuple[Float[np.ndarray, "n_train m"], Float[np.ndarray, "n_test m"]]:
    """Coordinates of both in the first principal components of the training documents."""
    mean = train.mean(axis=0, dtype=np.float64)
    _, s, vt = np.linalg.svd(train - mean, full_matrices=False)
    basis = vt[: min(N_COMPONENTS, int((s > 1e-9 * s[0]).sum()))].T
    return (train - mean) @ basis, (test - mean) @ basis


@dataclass(frozen=True)
class Baselines:
    """What all dictionaries of a hook share: figures, the dense probe, and AUROCs by topic."""

    figures: dict[str, Figure]
    by_topic: dict[str, list[float | None]]
    dense: Probes


def baselines(train: Pool, test: Pool, task: Task) -> Baselines:
    """Dense probe, neurons and principal components."""
    dense, probes = dense_probe(train.x, test.x, task)
    figures, by_topic = {"probe_dense_auroc": dense.auroc}, {"dense": dense.by_topic}
    for name, columns in (("neurons", (train.x, test.x)), ("pca", components(train.x, test.x))):
        for k, (result, _) in sparse_probes(*columns, task, KS).items():
            figures[f"probe_{name}_auroc_k{k}"] = result.auroc
            by_topic[f"{name}_k{k}"] = result.by_topic
    return Baselines(figures, by_topic, probes)


def probe_random(train: Pool, test: Pool, task: Task) -> tuple[dict[str, Figure], dict[str, list[float | None]]]:
    """Sparse probes on the latents of random directions."""
    found = sparse_probes(train.latents, test.latents, task, KS)
    return (
        {f"probe_random_auroc_k{k}": result.auroc for k, (result, _) in found.items()},
        {f"random_k{k}": result.by_topic for k, (result, _) in found.items()},
    )


def probe_latents(train: Pool, test: Pool, task: Task, seed: int) -> tuple[dict[str, Figure], Mapping[str, Any]]:
    """Sparse probes on a dictionary's latents, with true and with shuffled topics; the latents of each topic."""
    figures: dict[str, Figure] = {}
    details: dict[str, Any] = {"auroc": {}, "latents": {}}
    for k, (result, chosen) in sparse_probes(train.latents, test.latents, task, KS).items():
        figures[f"probe_latents_auroc_k{k}"] = result.auroc
        figures[f"probe_latents_accuracy_k{k}"] = result.accuracy
        figures[f"probe_latents_f1_k{k}"] = result.f1
        details["auroc"][f"latents_k{k}"] = result.by_topic
        if k == max(KS):
            details["latents"] = {t: row.tolist() for t, row in zip(task.topics, chosen, strict=True)}
    for k, (result, _) in sparse_probes(train.latents, test.latents, task.shuffled(seed + 1), KS).items():
        figures[f"probe_shuffled_auroc_k{k}"] = result.auroc
        details["auroc"][f"shuffled_k{k}"] = result.by_topic
    return figures, details


__all__ = ["Baselines", "Scored", "Task", "baselines", "dense_probe", "f1", "probe_latents", "probe_random"]
