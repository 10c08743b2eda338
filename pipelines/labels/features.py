"""From fitted and tested rules to features.parquet: which latents count as labelled, and the row of each.

A latent is *labelled* if the balanced accuracy of its rule on held-out documents has a lower bound above
`min_detection`, and if the rule fits at most 5 % of other random latents as well as its own (`detection_mismatch_p`).
Otherwise the rule stays as `candidate` with its scores and the latent is unlabelled. Mean scores in the summary are
over all candidates, passed or not: choosing by score would flatter them. `null_share` is the share of latents that
would count as labelled if every rule were dealt to a wrong latent and met the same bar.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.families import Family, TokenTable
from pipelines.labels.firings import Firings
from pipelines.labels.heldout import Scores
from pipelines.labels.logit_lens import logit_lens
from pipelines.labels.predicates import Predicates, describe
from pipelines.labels.scores import mismatch_p
from pipelines.labels.settings import LabelSettings, LabelSummary
from pipelines.labels.tables import FEATURES, ParquetFile, nullable

FEATURES_FILE = "features.parquet"
EXAMPLES_FILE = "examples.parquet"
MISMATCH_LEVEL = 0.05


class Fitted(NamedTuple):
    """What the pass over train documents leaves, an entry per latent."""

    predicates: Predicates
    strong: NDArray[np.float32]
    """Half of the train activation lies in firings this strong."""
    n_train_active: NDArray[np.int64]
    n_heldout_active: NDArray[np.int64]
    max_activation: NDArray[np.float32]
    top_tokens: list[list[str]]


class Tested(NamedTuple):
    """What the pass over held-out documents leaves."""

    own: Scores
    dealt: Scores
    """Each rule on a wrong latent; entry i is about latent i."""
    dealt_rule: NDArray[np.int64]
    """Which latent's rule that was; -1 where none."""
    null: NDArray[np.float32]
    """`[d_sae, n_null]` balanced accuracy of every rule on the null latents; NaN on its own."""


def top_tokens_of(firings: Firings, family: Family, n_shown: int) -> list[list[str]]:
    """Spellings of the token forms with most activation mass, for each latent of the block."""
    width = len(family.names)
    key, index = np.unique(firings.latent * width + family.code[firings.row], return_inverse=True)
    mass = np.bincount(index.reshape(-1), weights=firings.value, minlength=len(key))
    owner, code = key // width, key % width
    by = np.lexsort((code, -mass, owner))
    begins = np.searchsorted(owner[by], np.arange(firings.n_latents))
    shown = np.flatnonzero(np.arange(len(by)) - begins[owner[by]] < n_shown)
    words: list[list[str]] = [[] for _ in range(firings.n_latents)]
    for latent, category in zip(owner[by][shown].tolist(), code[by][shown].tolist(), strict=True):
        words[latent].append(family.names[category])
    return words


def lens_words(
    W_dec: Float[Tensor, "d_sae d_in"],
    unembedding: tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model vocab"]] | None,
    token_strings: Sequence[str],
    config: LabelSettings,
) -> tuple[list[list[str] | None], list[list[str] | None]]:
    """Promoted and suppressed tokens of each latent; None without an unembedding."""
    if unembedding is None:
        return [None] * len(W_dec), [None] * len(W_dec)
    lens = logit_lens(W_dec, *unembedding, n_top=min(config.n_words, unembedding[1].shape[1]))
    promotes: list[list[str] | None] = [[_spell(token_strings, t) for t in row] for row in lens.promoted.tolist()]
    suppresses: list[list[str] | None] = [[_spell(token_strings, t) for t in row] for row in lens.suppressed.tolist()]
    return promotes, suppresses


def _spell(token_strings: Sequence[str], token: int) -> str:
    """A model may have more output rows than its tokenizer has tokens."""
    return token_strings[token] if token < len(token_strings) else f"<unused {token}>"


def write_features(
    first: Fitted,
    second: Tested,
    families: Sequence[Family],
    promotes: list[list[str] | None],
    suppresses: list[list[str] | None],
    table: TokenTable,
    out_dir: Path,
    config: LabelSettings,
) -> LabelSummary:
    """Decide which latents are labelled, write features.parquet into `out_dir` and sum up."""
    rules, scores = first.predicates, second.own.detection
    n_latents, n_usable = rules.n_latents, int(table.usable.sum())
    p = mismatch_p(scores.balanced_accuracy, second.null)
    labelled = (scores.low > config.min_detection) & (p <= MISMATCH_LEVEL)
    dealt = second.dealt.detection
    dealt_p = np.ones(n_latents)
    got = second.dealt_rule >= 0
    dealt_p[got] = mismatch_p(dealt.balanced_accuracy[got], second.null[second.dealt_rule[got]])
    wrongly = (dealt.low > config.min_detection) & (dealt_p <= MISMATCH_LEVEL)

    n_active = first.n_train_active + first.n_heldout_active
    live = n_active > 0
    null_mean = _row_mean(second.null)
    candidate = [describe(rules, i, families) or None for i in range(n_latents)]
    kind = [
        "silent" if not live[i] else families[rules.family[i]].name if labelled[i] else "unlabelled"
        for i in range(n_latents)
    ]
    values = [
        [families[f].names[c] for c in rules.code[rules.indptr[i] : rules.indptr[i + 1]].tolist()] if f >= 0 else None
        for i, f in enumerate(rules.family.tolist())
    ]
    has_rule = rules.found
    with ParquetFile(out_dir / FEATURES_FILE, FEATURES) as features_file:
        features_file.write(
            {
                "latent": np.arange(n_latents, dtype=np.int32),
                "label": [text if ok else None for text, ok in zip(candidate, labelled, strict=True)],
                "label_source": ["predicate" if ok else None for ok in labelled],
                "label_kind": kind,
                "labelled": labelled,
                "candidate": candidate,
                "rule_family": [families[f].name if f >= 0 else None for f in rules.family.tolist()],
                "rule_values": values,
                "rule_bits": pa.array(rules.bits, mask=~has_rule),
                "rule_explained": pa.array(rules.explained, mask=~has_rule),
                "promotes": promotes,
                "suppresses": suppresses,
                "detection_balanced_accuracy": nullable(scores.balanced_accuracy),
                "detection_low": nullable(scores.low),
                "detection_high": nullable(scores.high),
                "detection_tpr": nullable(scores.tpr),
                "detection_tpr_strong": nullable(second.own.tpr_strong),
                "detection_fpr": nullable(scores.fpr),
                "detection_precision": nullable(scores.precision),
                "detection_auroc": nullable(second.own.auroc),
                "detection_null": nullable(np.where(has_rule, null_mean, np.nan)),
                "detection_mismatch_p": nullable(np.where(np.isnan(scores.balanced_accuracy), np.nan, p)),
                "n_train_active": first.n_train_active,
                "n_heldout_active": first.n_heldout_active,
                "density": n_active / n_usable,
                "max_activation": first.max_activation,
                "top_tokens": first.top_tokens,
            }
        )
    n_live = int(live.sum())
    return LabelSummary(
        n_latents=n_latents,
        n_live=n_live,
        n_candidates=int(has_rule.sum()),
        n_labelled=int(labelled.sum()),
        share_labelled=int(labelled.sum()) / max(n_live, 1),
        null_share=int(wrongly.sum()) / max(n_live, 1),
        mean_balanced_accuracy=_mean(scores.balanced_accuracy),
        mean_null_balanced_accuracy=_mean(np.where(has_rule, null_mean, np.nan)),
        mean_precision=_mean(scores.precision),
    )


def _row_mean(x: NDArray[np.float32]) -> NDArray[np.float64]:
    valid = ~np.isnan(x)
    n = valid.sum(1)
    total = np.where(valid, x, 0).sum(1, dtype=np.float64)
    return np.asarray(np.divide(total, n, out=np.full(len(x), np.nan), where=n > 0), np.float64)


def _mean(x: NDArray[np.float64]) -> float | None:
    defined = x[~np.isnan(x)]
    return float(defined.mean()) if len(defined) else None
