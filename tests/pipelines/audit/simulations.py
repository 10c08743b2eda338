"""Audits on texts that never were: scores with a known truth, drawn as pooled activations behave, and the real code.

Used by the tests of validity and by the benchmark.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from pipelines.audit.statistics import associate, benjamini_hochberg

Q = 0.05


@dataclass(frozen=True)
class World:
    """What the scores of one audit's discover part look like."""

    n_texts: int = 80
    n_latents: int = 512
    planted: float = 0.0
    """Share of latents that carry the concept, with true AUROCs from 0.75 to 0.95."""
    correlated: bool = False
    """Latents share five factors of the text: topic, length, register."""
    silent: bool = False
    """Most latents are exactly zero on most texts: firing shares from 4 to 90 %."""
    groups: Literal["alone", "equal", "unequal", "by_class", "pairs"] = "alone"
    """Groups of one text; of four; of one to eight; of six positives or one negative; of one text of each class."""


WORLDS = {
    "global null": World(),
    "5 % planted among correlated nulls": World(planted=0.05, correlated=True),
    "groups of four": World(groups="equal", correlated=True),
    "groups of one to eight": World(groups="unequal"),
    "groups of six positives, negatives alone": World(groups="by_class", n_texts=120),
    "pairs": World(groups="pairs", planted=0.05),
    "zero-inflated": World(silent=True),
    "zero-inflated, 5 % planted, groups of one to eight": World(silent=True, planted=0.05, groups="unequal"),
}


class Draw(NamedTuple):
    scores: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    planted: np.ndarray


def draw(rng: np.random.Generator, world: World) -> Draw:
    """One audit's scores, labels and groups, and which latents carry the concept."""
    n, d = world.n_texts, world.n_latents
    labels, groups = _design(rng, world)
    latent = rng.standard_normal((n, d), dtype=np.float32)
    if world.groups not in ("alone", "pairs"):  # half of the variance belongs to the group
        of_group = rng.standard_normal((groups.max() + 1, d), dtype=np.float32)
        latent = np.sqrt(np.float32(0.5)) * (latent + of_group[groups])
    if world.groups == "pairs":
        latent += rng.standard_normal((groups.max() + 1, d), dtype=np.float32)[groups]
    if world.correlated:
        loads = 0.5 * rng.standard_normal((5, d), dtype=np.float32)
        factors = rng.standard_normal((groups.max() + 1, 5), dtype=np.float32)[groups]
        latent += factors @ loads
    planted = np.zeros(d, bool)
    planted[: round(world.planted * d)] = True
    sd = latent[:, planted].std(axis=0) if planted.any() else 1.0
    effect = np.sqrt(2) * stats.norm.ppf(rng.uniform(0.75, 0.95, int(planted.sum())))
    latent[np.ix_(labels, planted)] += (effect * sd).astype(np.float32)
    if world.silent:
        share = rng.uniform(0.04, 0.9, d)
        latent -= (stats.norm.isf(share) * latent.std(axis=0)).astype(np.float32)
        latent = np.maximum(latent, 0)
    return Draw(latent, labels, groups, planted)


def false_discovery_proportions(world: World, n: int, *, seed: int = 0, n_permutations: int = 1000) -> np.ndarray:
    """FDP of Benjamini-Hochberg at q = 0.05 on the pooled p-values, one for each of n simulated searches."""
    rng = np.random.default_rng(seed)
    out = np.zeros(n)
    for i in range(n):
        scores, labels, groups, planted = draw(rng, world)
        found = associate(scores, labels, groups, n_permutations=n_permutations, seed=int(rng.integers(1 << 30)))
        tested = np.flatnonzero(found.tested)
        rejected = tested[benjamini_hochberg(found.p_pooled[tested]) <= Q]
        out[i] = (~planted[rejected]).sum() / max(1, rejected.size)
    return out


def holds(proportions: np.ndarray, q: float = Q) -> bool:
    """Whether the mean is at most q + 2 standard errors."""
    return bool(proportions.mean() <= q + 2 * proportions.std() / np.sqrt(proportions.size))


def _design(rng: np.random.Generator, world: World) -> tuple[np.ndarray, np.ndarray]:
    n = world.n_texts
    match world.groups:
        case "alone":
            return rng.permutation(n) < n // 2, np.arange(n)
        case "pairs":
            return np.arange(n) % 2 == 0, np.arange(n) // 2
        case "equal":
            groups = np.arange(n) // 4
        case "unequal":
            sizes = rng.integers(1, 9, n)
            groups = np.repeat(np.arange(n), sizes)[:n]
        case "by_class":
            half = n // 2
            labels = np.arange(n) < half
            return labels, np.where(labels, np.arange(n) // 6, np.arange(n))
    _, groups = np.unique(groups, return_inverse=True)
    n_groups = int(groups.max()) + 1
    return (rng.permutation(n_groups) < n_groups // 2)[groups], groups
