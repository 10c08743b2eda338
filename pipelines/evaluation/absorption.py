"""Absorption: texts of a concept on which the concept's own latents are silent, because another latent took them over.

For a concept with a dense probe of unit direction p, documents of it that the probe finds, and main latents S (those
that a sparse probe needs), with activations and latents relative to their means over training documents without the
concept:

    projection_j = (f_j - f̄_j) * (W_dec_j · p)          what latent j says along the probe
    total        = (x - x̄) · p                          what there is to be said

    full      1 if all of S are silent, the latent with the largest projection has cosine ≥ 0.025 with p, and its
              projection is ≥ 0.4 of the total
    fraction  with A the ≤ 3 latents outside of S with the largest projections, all with cosine ≥ 0.1:
              0 if ΣA < 0.4 total or main ≥ total; 1 if main ≤ 0; else a / (a + main) with a = min(ΣA, total - main)

S is chosen as in the reference, by adding latents while F1 rises by more than 0.03, on training documents. Lower is
better. References: Chanin et al. 2024, arXiv:2409.14507; SAEBench 0.6.0. Differs: any concept in place of first
letters, a document's mean in place of one token, projections relative to the concept's absence (the mean of a residual
stream has a projection of its own), decoder rows of any norm, and no choice on test documents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.evaluation.intervals import interval
from pipelines.evaluation.pools import Pool
from pipelines.evaluation.probes import Probes, f1, fit_probes
from pipelines.evaluation.probing import rank_columns
from pipelines.evaluation.record import Figure

MOST_MAIN = 10
MIN_F1_GAIN = 0.03
MIN_PROBE_F1 = 0.6
"""A concept whose dense probe does worse on held-back training documents is left out: there is nothing to absorb."""
MIN_DOCUMENTS = 5
MIN_SHARE = 0.4
MIN_COSINE_FULL = 0.025
MIN_COSINE_FRACTION = 0.1
MOST_ABSORBING = 3


@dataclass(frozen=True)
class Absorbed:
    """Absorption of one concept; rows are the test documents of it that the dense probe finds."""

    main: tuple[int, ...]
    """The concept's own latents."""
    absorbing: tuple[int, ...]
    """Latents that took over, most frequent first."""
    full: Bool[np.ndarray, " n"]
    fraction: Float[np.ndarray, " n"]
    probe_f1: float


def absorption(
    train: Pool,
    test: Pool,
    labels: Bool[np.ndarray, " n_train"],
    test_labels: Bool[np.ndarray, " n_test"],
    fold: Int[np.ndarray, " n_train"],
    probe: Probes,
    task: int,
    W_dec: Float[np.ndarray, "d_sae d_in"],
) -> Absorbed | str:
    """Absorption of one concept, or why it cannot be measured.

    Args:
        probe: the dense probes; `task` is the concept's.
    """
    score = f1(probe.held_out[task] > 0, labels)
    if score <= MIN_PROBE_F1:
        return f"the dense probe's F1 on held-back training documents is {score:.2f}, {MIN_PROBE_F1} is needed"
    direction = probe.weight[task] / np.linalg.norm(probe.weight[task])
    found = test_labels & (test.x.astype(np.float64) @ probe.weight[task] + probe.bias[task] > 0)
    total = (test.x[found].astype(np.float64) - train.x[~labels].mean(axis=0, dtype=np.float64)) @ direction
    rows = np.flatnonzero(found)[total > 0]
    if len(rows) < MIN_DOCUMENTS:
        return f"the dense probe finds {len(rows)} test documents of it, {MIN_DOCUMENTS} are needed"
    main = main_latents(train.latents, labels, fold)
    along = W_dec.astype(np.float64) @ direction
    cosine = along / np.maximum(np.linalg.norm(W_dec, axis=1), 1e-12)
    latents = test.latents[rows].astype(np.float64)
    projection = (latents - train.latents[~labels].mean(axis=0, dtype=np.float64)) * along
    full, fraction, took = absorbed(latents, projection, cosine, total[total > 0], np.array(main, np.int64))
    counts = np.bincount(took[took >= 0], minlength=len(W_dec))
    most = np.argsort(-counts, kind="stable")[:MOST_ABSORBING]
    return Absorbed(main, tuple(int(j) for j in most if counts[j]), full, fraction, float(score))


def main_latents(
    latents: Float[np.ndarray, "n d_sae"], labels: Bool[np.ndarray, " n"], fold: Int[np.ndarray, " n"]
) -> tuple[int, ...]:
    """The concept's own latents: the one that separates best, and others as long as each raises F1 by 0.03.

    F1 is that of held-back training documents.
    """
    order = np.argsort(-rank_columns(latents, labels[None])[0], kind="stable")[:MOST_MAIN]
    before = 0.0
    for k in range(1, len(order) + 1):
        probe = fit_probes(latents[:, order[:k]][None].astype(np.float64), labels[None], fold)
        now = float(f1(probe.held_out[0] > 0, labels))
        if k > 1 and now - before <= MIN_F1_GAIN:
            return tuple(order[: k - 1].tolist())
        before = now
    return tuple(order.tolist())


def absorbed(
    latents: Float[np.ndarray, "n d_sae"],
    projection: Float[np.ndarray, "n d_sae"],
    cosine: Float[np.ndarray, " d_sae"],
    total: Float[np.ndarray, " n"],
    main: Int[np.ndarray, " n_main"],
) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Full absorption, absorption fraction, and the latent with the largest projection outside of `main`, by document.

    The latent is -1 where nothing is absorbed.
    """
    n = np.arange(len(latents))
    silent = (latents[:, main] <= 0).all(axis=1)
    top = projection.argmax(axis=1)
    full = silent & (cosine[top] >= MIN_COSINE_FULL) & (projection[n, top] >= MIN_SHARE * total)
    others = np.where(cosine >= MIN_COSINE_FRACTION, np.maximum(projection, 0), 0.0)
    others[:, main] = 0
    largest = -np.sort(-others, axis=1)[:, :MOST_ABSORBING]
    by_others, by_main = largest.sum(axis=1), projection[:, main].sum(axis=1)
    part = np.minimum(by_others, total - by_main)
    share = np.divide(part, part + by_main, out=np.zeros_like(part), where=(part + by_main) > 0)
    fraction = np.where(by_main <= 0, 1.0, np.clip(share, 0, 1))
    fraction = np.where((by_others < MIN_SHARE * total) | (by_main >= total), 0.0, fraction)
    took = np.where(fraction > 0, others.argmax(axis=1), np.where(full, top, -1))
    return full, fraction, took


def absorption_figures(
    found: dict[str, Absorbed | str], n_resamples: int, seed: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Means over concepts with intervals over their documents, and what was found of each concept."""
    measured = {name: result for name, result in found.items() if isinstance(result, Absorbed)}
    details = {
        name: result
        if isinstance(result, str)
        else {
            "main_latents": list(result.main),
            "absorbing_latents": list(result.absorbing),
            "full": round(float(result.full.mean()), 6),
            "fraction": round(float(result.fraction.mean()), 6),
            "n_documents": len(result.full),
            "probe_f1": round(result.probe_f1, 6),
        }
        for name, result in found.items()
    }
    if not measured:
        return {}, details
    rng = np.random.default_rng(seed)
    n = sum(len(result.full) for result in measured.values())
    figures = {}
    for name in ("full", "fraction"):
        drawn = []
        for result in measured.values():
            values = np.asarray(getattr(result, name), dtype=np.float64)
            index = rng.integers(len(values), size=(n_resamples, len(values)))
            drawn.append(values[index].mean(axis=1))
        point = float(np.mean([getattr(result, name).mean() for result in measured.values()]))
        figures[f"absorption_{name}"] = Figure.of(point, interval(np.mean(drawn, axis=0)), n)
    return figures, details
