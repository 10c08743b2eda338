"""Does a feature come back in other dictionaries of the same hook: other seeds, widths, training?"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pipelines.audit.numbers import figure
from pipelines.audit.result import Candidate, Recurrence
from pipelines.audit.statistics import auroc
from pipelines.audit.views import Texts, View

SAME = 0.7
"""Cosine of decoder directions from which two latents count as one (Paulo and Belrose 2025, arXiv:2501.16615)."""


def recurrence_of(candidate: Candidate, views: Sequence[View], texts: Texts) -> list[Recurrence]:
    """The closest latent of each other view of the same hook, and whether it is the same feature."""
    own = next(view for view in views if view.name == candidate.dictionary)
    if own.directions is None:
        return []
    c = texts.split.confirm
    out = []
    for view in views:
        if view is own or view.hook != own.hook or view.directions is None:
            continue
        if view.directions.shape[1] != own.directions.shape[1]:
            continue
        there, cosine = _closest(view.directions, own.directions[candidate.latent])
        back, _ = _closest(own.directions, view.directions[there])
        mutual = back == candidate.latent
        out.append(
            Recurrence(
                dictionary=view.name,
                latent=there,
                cosine=figure(cosine),
                mutual=mutual,
                auroc=figure(auroc(view.scores[c][:, [there]], texts.positive[c])[0]),
                recurs=mutual and cosine >= SAME,
            )
        )
    return out


def _closest(directions: Float[np.ndarray, "d_sae d_out"], direction: Float[np.ndarray, " d_out"]) -> tuple[int, float]:
    """The row with the largest cosine, and that cosine."""
    norms = np.linalg.norm(directions, axis=1) * np.linalg.norm(direction)
    cosines = directions @ direction / np.maximum(norms, 1e-12)
    best = int(cosines.argmax())
    return best, float(cosines[best])
