"""What the confirmed latents miss: absorption, the concept's direction carried by other latents where they are silent.

The definition of SAEBench (Karvonen et al. 2025, arXiv:2503.09532, after Chanin et al. 2024, arXiv:2409.14507) without
its spelling task, for any concept with a dense probe, and on means over a text's tokens, in which reconstructions are
linear. With p the probe's direction, dx a positive's mean activation less that of the fitting negatives, and df_j the
same of latent j:

    t = dx . p                     what the probe sees                c_j = df_j (d_j . p)       latent j's part of it
    main = sum of c_j, confirmed   other = sum of the three largest c_j of others with cos(d_j, p) >= 0.1
    fraction = 0 if other < 0.4 t or main >= t;   1 if main <= 0;   else min(other, t - main) / (that + main)
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.audit.numbers import figure
from pipelines.audit.result import Absorber, Absorption
from pipelines.audit.views import Texts, View

MIN_COSINE, MIN_SHARE, N_OTHERS, SHOWN = 0.1, 0.4, 3, 10


def absorption(
    view: View,
    texts: Texts,
    confirmed: Sequence[int],
    direction: Float[np.ndarray, " d_in"],
    found: Bool[np.ndarray, " n_texts"],
) -> Absorption | None:
    """Absorption on the confirm positives that the probe finds.

    Args:
        confirmed: latents of this view.
        direction: of the dense probe, in raw activations.
        found: texts that the probe takes for positives.
    Returns: None where the view lacks what is needed, or there is no such text.
    """
    c = texts.split.confirm
    rows = c[texts.positive[c] & found[c]]
    if view.dense is None or view.mean_latents is None or view.directions is None or not rows.size or not confirmed:
        return None
    if view.directions.shape[1] != direction.size:
        return None  # it writes elsewhere than it reads
    p = direction / np.linalg.norm(direction)
    negatives = texts.fit[~texts.positive[texts.fit]]
    t = (view.dense[rows] - view.dense[negatives].mean(axis=0)) @ p
    along = view.directions @ p
    cosine = along / np.maximum(np.linalg.norm(view.directions, axis=1), 1e-12)
    parts = (view.mean_latents[rows] - view.mean_latents[negatives].mean(axis=0)) * along
    keep = t > 0
    rows, t, parts = rows[keep], t[keep], parts[keep]
    if not rows.size:
        return None
    ours = np.zeros(along.size, dtype=bool)
    ours[list(confirmed)] = True
    main = parts[:, ours].sum(axis=1)
    eligible = np.where(~ours & (cosine >= MIN_COSINE), parts, 0.0)
    n = min(N_OTHERS, eligible.shape[1])
    other = np.maximum(np.partition(eligible, -n, axis=1)[:, -n:], 0).sum(axis=1)
    silent = (view.scores[np.ix_(rows, np.flatnonzero(ours))] <= 0).all(axis=1)
    full = silent & (eligible.max(axis=1) >= MIN_SHARE * t)
    share = eligible.mean(axis=0) / t.mean()
    top = np.argsort(-share, kind="stable")[:SHOWN]
    return Absorption(
        dictionary=view.name,
        n_texts=int(rows.size),
        fraction=figure(absorption_fraction(t, main, other).mean()),
        full=figure(full.mean()),
        absorbers=[
            Absorber(latent=int(j), label=view.labels.get(int(j)), cosine=figure(cosine[j]), share=figure(share[j]))
            for j in top
            if share[j] > 0
        ],
    )


def absorption_fraction(
    t: Float[np.ndarray, " n"], main: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The fraction of each text, from what the probe sees, the confirmed latents' part and that of the others."""
    missing = np.minimum(other, t - main)
    partly = np.divide(missing, missing + main, out=np.zeros_like(t), where=missing + main > 0)
    return np.where((other < MIN_SHARE * t) | (main >= t), 0.0, np.where(main <= 0, 1.0, partly))


def unseen_share(
    seen: Bool[np.ndarray, "n_texts n_confirmed"],
    positive: Bool[np.ndarray, " n_texts"],
    rows: Int[np.ndarray, " n_confirm"],
) -> float | None:
    """Share of some rows' positives on which no confirmed latent exceeds its threshold; None if none is confirmed."""
    if not seen.shape[1]:
        return None
    return figure(1 - seen[rows[positive[rows]]].any(axis=1).mean())
