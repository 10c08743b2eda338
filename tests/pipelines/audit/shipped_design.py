"""Simulated audits of the size of a shipped concept: whether intervals cover, and whether what is planted is found.

Latents are drawn as `pipelines.audit.power` draws them (zero on most texts, with a known true AUROC) and go through the
code of an audit: split, search, choice, confirm. Used by the tests of validity and by the benchmark.
"""

from typing import NamedTuple

import numpy as np

from pipelines.audit.concepts import concept_from_dict
from pipelines.audit.confirm import confirm
from pipelines.audit.discover import choose, search
from pipelines.audit.examples import Example
from pipelines.audit.intervals import auroc_interval
from pipelines.audit.power import Design, Power, draw_scores, shift_for, simulate_power
from pipelines.audit.result import Candidate
from pipelines.audit.settings import AuditSettings
from pipelines.audit.splits import split_by_group
from pipelines.audit.views import Texts, View

N_POSITIVE, N_HARD, N_EASY = 88, 88, 80
"""Texts of a shipped concept, each its own group, and what the corpus adds."""
N_LATENTS = 512
LEAST_RATE, MOST_RATE = 0.04, 0.9
"""Shares of negatives on which latents fire."""
SETTINGS = AuditSettings(max_candidates=10, n_permutations=300, n_confirm_permutations=1999)
CONCEPT = concept_from_dict(
    {
        "name": "simulated",
        "positives": [f"text {i}" for i in range(N_POSITIVE)],
        "hard_negatives": [f"text {i}" for i in range(N_POSITIVE, N_POSITIVE + N_HARD)],
    }
)
TRUTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def shipped_texts(seed: int = 0) -> Texts:
    """The split of a shipped concept: 26 positives and 50 negatives to confirm."""
    roles = ["positive"] * N_POSITIVE + ["hard_negative"] * N_HARD + ["negative"] * N_EASY
    examples = [Example(text=f"text {i}", role=role, group=f"g{i}") for i, role in enumerate(roles)]
    return Texts.of(examples, split_by_group(examples, seed=seed))


def coverage(truth: float, n: int, *, seed: int = 0) -> float:
    """Share of n intervals of the confirm part that hold the true AUROC, over latents of all firing rates."""
    rng = np.random.default_rng(seed)
    texts = shipped_texts()
    counts = texts.groups_of(texts.split.confirm)
    rate = rng.uniform(LEAST_RATE, MOST_RATE, n)
    scores = draw_scores(counts, rate, shift_for(truth, rate), rng)
    found = auroc_interval(scores, np.arange(sum(counts)) < counts[0], np.arange(sum(counts)))
    return float(((found.low <= truth) & (truth <= found.high)).mean())


class Audits(NamedTuple):
    """What many simulated audits found."""

    covered: np.ndarray
    """Of every candidate, whether its interval holds its true AUROC."""
    associated: np.ndarray
    """Of every audit, the share of planted latents that are confirmed; the next: that are detected."""
    detects: np.ndarray
    false: np.ndarray
    """Of every audit, whether a latent that carries nothing was confirmed."""


def audits(n: int, truths: list[float], *, seed: int = 0) -> Audits:
    """n audits of 512 latents, the first of which have these true AUROCs."""
    rng = np.random.default_rng(seed)
    truth = np.full(N_LATENTS, 0.5)
    truth[: len(truths)] = truths
    covered, associated, detects, false = [], [], [], []
    for number in range(n):
        texts = shipped_texts(number)
        candidates = _audited(rng, texts, truth, number)
        covered += [c.low <= truth[c.latent] <= c.high for c in candidates]
        confirmed = {c.latent for c in candidates if c.p_holm <= SETTINGS.alpha}
        detected = {c.latent for c in candidates if c.low_familywise > SETTINGS.detects_above} & confirmed
        planted = set(range(len(truths)))
        associated.append(len(planted & confirmed) / max(1, len(planted)))
        detects.append(len(planted & detected) / max(1, len(planted)))
        false.append(bool(confirmed - planted))
    return Audits(*(np.array(values) for values in (covered, associated, detects, false)))


def promised() -> Power:
    """The power table of this design, as an audit makes it."""
    texts = shipped_texts()
    return simulate_power(
        Design(
            discover=texts.groups_of(texts.split.discover),
            confirm=texts.groups_of(texts.split.confirm),
            n_latents=N_LATENTS,
            n_candidates=SETTINGS.max_candidates,
            alpha=SETTINGS.alpha,
            detects_above=SETTINGS.detects_above,
        ),
        np.random.default_rng(1).uniform(LEAST_RATE, MOST_RATE, N_LATENTS),
        n_simulated=SETTINGS.n_simulated,
    )


def _audited(rng: np.random.Generator, texts: Texts, truth: np.ndarray, seed: int) -> list[Candidate]:
    rate = rng.uniform(LEAST_RATE, MOST_RATE, truth.size)
    order = np.argsort(~texts.positive, kind="stable")  # positives first, as they are drawn
    scores = np.empty((texts.positive.size, truth.size), dtype=np.float32)
    counts = int(texts.positive.sum()), int((~texts.positive).sum())
    scores[order] = draw_scores(counts, rate, shift_for_each(truth, rate), rng)
    views = [View(identity={}, scores=scores)]
    found = search(views, texts, n_permutations=SETTINGS.n_permutations, min_texts=SETTINGS.min_texts, seed=seed)
    choices = choose(found, views, CONCEPT, max_candidates=SETTINGS.max_candidates, max_proposed=0)
    return confirm(
        choices,
        np.zeros(len(choices)),
        found,
        views,
        texts,
        CONCEPT,
        n_permutations=SETTINGS.n_confirm_permutations,
        alpha=SETTINGS.alpha,
        detects_above=SETTINGS.detects_above,
        seed=seed,
    )


def shift_for_each(truth: np.ndarray, rate: np.ndarray) -> np.ndarray:
    """The shift of positives that gives every latent its own true AUROC."""
    out = np.zeros(truth.size)
    for value in np.unique(truth[truth != 0.5]):
        same = truth == value
        out[same] = shift_for(float(value), rate[same])
    return out
