"""Search over all latents of all dictionaries together, on the discover part: which of them become candidates."""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pipelines.audit.concepts import Concept
from pipelines.audit.examples import words
from pipelines.audit.numbers import figure, figures
from pipelines.audit.result import Discover
from pipelines.audit.statistics import Association, associate, benjamini_hochberg
from pipelines.audit.views import Spot, Texts, View, joint_scores, spots_of


class Search(NamedTuple):
    """What the discover part says."""

    found: Association
    q: Float[np.ndarray, " d_all"]
    """Benjamini-Hochberg adjusted pooled p-values; 1 where untested."""
    ranked: list[Spot]
    """Tested latents that fire more on positives, largest z first."""
    columns: Int[np.ndarray, " n_ranked"]
    """Their columns in `joint_scores`."""


class Choice(NamedTuple):
    """A latent that goes on to the confirm part."""

    spot: Spot
    column: int
    chosen_by: Literal["search", "label"]


def search(views: Sequence[View], texts: Texts, *, n_permutations: int, min_texts: int, seed: int) -> Search:
    """Associate all latents with the labels, jointly: one max-T and one pooled null over every dictionary."""
    rows = texts.split.discover
    found = associate(
        joint_scores(views)[rows],
        texts.positive[rows],
        texts.groups[rows],
        n_permutations=n_permutations,
        min_texts=min_texts,
        seed=seed,
    )
    q = np.ones(found.auroc.size)
    q[found.tested] = benjamini_hochberg(found.p_pooled[found.tested])
    order = np.argsort(-np.where(found.tested, found.z, -np.inf), kind="stable")
    columns = order[found.tested[order] & (found.z[order] > 0)]
    return Search(found, q, spots_of(views, columns), columns)


def choose(
    found: Search, views: Sequence[View], concept: Concept, *, max_candidates: int, max_proposed: int
) -> list[Choice]:
    """The latents with the largest z, then those that the concept's words propose by their labels.

    A label is no evidence: what it proposes is confirmed like the rest, and counts in the same correction.
    """
    chosen = [
        Choice(spot, int(column), "search")
        for spot, column in zip(found.ranked[:max_candidates], found.columns[:max_candidates], strict=True)
    ]
    if not max_proposed:
        return chosen
    taken, starts = {c.spot for c in chosen}, np.cumsum([0, *(view.scores.shape[1] for view in views)])
    proposals = []
    for v, view in enumerate(views):
        for latent, label in view.labels.items():
            spot, n = Spot(v, latent), len(mentioned(label, concept))
            column = int(starts[v]) + latent
            if n and spot not in taken and latent < view.scores.shape[1] and found.found.tested[column]:
                proposals.append((-n, -float(found.found.z[column]), Choice(spot, column, "label")))
    return chosen + [choice for *_, choice in sorted(proposals)[:max_proposed]]


def mentioned(label: str | None, concept: Concept) -> set[str]:
    """Words of the concept (its word list, query, title, name) that a label holds, whatever their endings."""
    return {w for w in words_of(concept) for other in words(label) if _same_stem(w, other)} if label else set()


def words_of(concept: Concept) -> set[str]:
    """Words by which a label mentions the concept."""
    given = (*concept.wordlist, concept.query or "", concept.display, re.sub(r"[_-]", " ", concept.name))
    return {w for text in given for w in words(text) if len(w) >= 4} - {"topic", "text", "texts", "about"}


def discover_record(found: Search, views: Sequence[View], alpha: float) -> Discover:
    """The part of the result."""
    tested = np.flatnonzero(found.found.tested)
    spots = spots_of(views, tested)
    return Discover(
        n_latents=found.found.auroc.size,
        n_tested=tested.size,
        n_familywise=int((found.found.p_familywise <= alpha).sum()),
        n_fdr=int((found.q[tested] <= alpha).sum()),
        z_familywise=figure(np.quantile(found.found.null_max_z, 1 - alpha)) if tested.size else 0.0,
        dictionary=[spot.view for spot in spots],
        latent=[spot.latent for spot in spots],
        auroc=figures(found.found.auroc[tested]),
        z=figures(found.found.z[tested]),
        fires=figures(found.found.fires[tested]),
        q=figures(found.q[tested]),
    )


def _same_stem(a: str, b: str) -> bool:
    """Equal, or alike but for an ending: deception and deceptive, weapon and weapons."""
    if a == b:
        return True
    short, long = sorted((a, b), key=len)
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(short))
    return shared >= max(5, len(long) - 4)
