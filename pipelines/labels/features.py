"""From fitted and tested rules to features.parquet: which latents count as labelled, and the row of each.

A latent is *labelled* if the balanced accuracy of its rule on held-out documents has a lower bound above
`min_detection`, and if the rule fits at most 5 % of other random latents as well as its own (`detection_mismatch_p`).
Otherwise the rule stays as `candidate` with its scores and the latent is unlabelled. The label *survives* if it also
passes the hard tests (`verdicts.surviving`). Mean scores in the summary are over all candidates, passed or not:
choosing by score would flatter them. `null_share` is the share of latents that would count as labelled if every rule
were dealt to a wrong latent and met the same bar.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.fitting import Fitted
from pipelines.labels.logit_lens import logit_lens
from pipelines.labels.relations import Relations
from pipelines.labels.rules import Views
from pipelines.labels.scores import mismatch_p
from pipelines.labels.settings import LabelSettings, LabelSummary
from pipelines.labels.tables import FEATURES, ParquetFile, nullable
from pipelines.labels.testing import Tested
from pipelines.labels.testset import NEGATIVES
from pipelines.labels.verdicts import DECISIVE, decisive_p, surviving

FEATURES_FILE = "features.parquet"
EXAMPLES_FILE = "examples.parquet"
COUNTER_EXAMPLES_FILE = "counter_examples.parquet"
MISMATCH_LEVEL = 0.05


class Decided(NamedTuple):
    """Which labels passed, an entry per latent."""

    mismatch_p: NDArray[np.float64]
    p: NDArray[np.float64]
    labelled: NDArray[np.bool_]
    survives: NDArray[np.bool_]
    wrongly: NDArray[np.bool_]
    """Whether the latent's rule would count as a label of the wrong latent that it was dealt to."""
    monosemanticity: NDArray[np.float64]


def passes(low: NDArray[np.floating[Any]], p: NDArray[np.floating[Any]], min_detection: float) -> NDArray[np.bool_]:
    """Whether a rule labels its latent; not where a score is undefined.

    Args:
        low: lower bound of the balanced accuracy on held-out documents.
        p: `mismatch_p`.
    """
    return np.asarray((low > min_detection) & (p <= MISMATCH_LEVEL), bool)


def decide(second: Tested, min_detection: float) -> Decided:
    """Which labels passed."""
    p = mismatch_p(second.natural.balanced_accuracy, second.null)
    labelled = passes(second.natural.low, p, min_detection)
    wrongly = passes(second.dealt.low, mismatch_p(second.dealt.balanced_accuracy, second.null), min_detection)
    decisive = decisive_p(second.scores)
    survives = labelled & surviving(second.scores, decisive, second.ranks.random, min_detection)
    return Decided(p, decisive, labelled, survives, wrongly, monosemanticity(second))


def monosemanticity(second: Tested) -> NDArray[np.float64]:
    """How well one rule tells a latent's firings from the silent tokens that are hardest to tell from them, 0 to 1.

    The least of 2 b - 1 over the balanced accuracies b against the same token elsewhere, the same document and wrong
    tokens of the same window, times the share of random latents that the rule fits worse than its own; 0 without a
    rule. It is a lower bound: a latent with one meaning that no rule of the grammar states scores low as well.
    """
    b = np.stack([second.scores.by_kind[kind].balanced_accuracy for kind in (*DECISIVE, "same_window")])
    known = ~np.isnan(b)
    least = np.where(known.any(0), np.where(known, b, np.inf).min(0), 0.5)
    worse = 1 - (second.ranks.random - 1) / np.maximum(second.ranks.n_random, 1)
    return np.where(second.ranks.random > 0, np.clip(2 * least - 1, 0, 1) * np.clip(worse, 0, 1), 0.0)


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
    decided: Decided,
    relations: Relations,
    views: Views,
    promotes: list[list[str] | None],
    suppresses: list[list[str] | None],
    out_dir: Path,
) -> None:
    """Write features.parquet into `out_dir`."""
    rules, natural, has_rule = first.rules, second.natural, first.has_rule
    n_latents, n_usable = len(rules), int(views.table.usable.sum())
    n_active = first.n_train_active + first.n_heldout_active
    candidate = [views.english(rule) or None for rule in rules]
    family = [views.names[rule[0].atoms[0].family] if rule else None for rule in rules]
    kind = [
        "silent" if not n_active[i] else family[i] if decided.labelled[i] else "unlabelled" for i in range(n_latents)
    ]
    tests: dict[str, Any] = {}
    for kind_, name in (*((k, f"detection_{k}") for k in NEGATIVES if k != "same_window"), ("same_window", "fuzz")):
        by = second.scores.by_kind[kind_]
        tests |= {name: nullable(by.balanced_accuracy), f"{name}_low": nullable(by.low)}
        tests[f"{name}_high"] = nullable(by.high)
    ranks = second.ranks
    deciles = [
        None if not has_rule[i] else [None if np.isnan(x) else x for x in row.tolist()]
        for i, row in enumerate(second.scores.tpr_by_decile)
    ]
    with ParquetFile(out_dir / FEATURES_FILE, FEATURES) as features_file:
        features_file.write(
            {
                "latent": np.arange(n_latents, dtype=np.int32),
                "label": [text if ok else None for text, ok in zip(candidate, decided.labelled, strict=True)],
                "label_source": ["predicate" if ok else None for ok in decided.labelled],
                "label_kind": kind,
                "labelled": decided.labelled,
                "survives": decided.survives,
                "monosemanticity": decided.monosemanticity.astype(np.float32),
                "candidate": candidate,
                "rule": [json.dumps(views.data(rule), ensure_ascii=False) if rule else None for rule in rules],
                "rule_family": family,
                "rule_bits": pa.array([x.bits if x.rule else None for x in first.learned], pa.float32()),
                "rule_explained": pa.array([x.explained if x.rule else None for x in first.learned], pa.float32()),
                "promotes": promotes,
                "suppresses": suppresses,
                "detection_balanced_accuracy": nullable(natural.balanced_accuracy),
                "detection_low": nullable(natural.low),
                "detection_high": nullable(natural.high),
                "detection_tpr": nullable(natural.tpr),
                "detection_tpr_strong": nullable(second.tpr_strong),
                "detection_fpr": nullable(natural.fpr),
                "detection_precision": nullable(natural.precision),
                "detection_auroc": nullable(second.scores.by_kind["random"].auroc),
                "detection_null": nullable(np.where(has_rule, _row_mean(second.null), np.nan)),
                "detection_mismatch_p": nullable(
                    np.where(np.isnan(natural.balanced_accuracy), np.nan, decided.mismatch_p)
                ),
                **tests,
                "tpr_by_decile": deciles,
                "p_value": pa.array(decided.p, mask=np.isnan(decided.p)),
                "mismatch_rank": pa.array(ranks.random, mask=ranks.random == 0),
                "n_mismatch": pa.array(ranks.n_random, mask=ranks.random == 0),
                "neighbour_rank": pa.array(ranks.neighbour, mask=ranks.neighbour == 0),
                "n_neighbour": pa.array(ranks.n_neighbour, mask=ranks.neighbour == 0),
                **relations._asdict(),
                "n_train_active": first.n_train_active,
                "n_heldout_active": first.n_heldout_active,
                "density": n_active / n_usable,
                "max_activation": first.max_activation,
                "top_tokens": first.top_tokens,
            }
        )


def summarise(first: Fitted, second: Tested, decided: Decided, min_detection: float) -> LabelSummary:
    """What labelling found, over all latents."""
    live = first.n_train_active + first.n_heldout_active > 0
    n_live, by_kind = int(live.sum()), second.scores.by_kind
    has_rule = first.has_rule

    def share(passed: NDArray[np.bool_]) -> float:
        return int(passed.sum()) / max(n_live, 1)

    return LabelSummary(
        n_latents=len(live),
        n_live=n_live,
        n_candidates=int(has_rule.sum()),
        n_labelled=int(decided.labelled.sum()),
        share_labelled=share(decided.labelled),
        null_share=share(decided.wrongly),
        mean_balanced_accuracy=_mean(second.natural.balanced_accuracy),
        mean_null_balanced_accuracy=_mean(np.where(has_rule, _row_mean(second.null), np.nan)),
        mean_precision=_mean(second.natural.precision),
        n_surviving=int(decided.survives.sum()),
        share_surviving=share(decided.survives),
        share_same_token=share(by_kind["same_token"].low > min_detection),
        share_same_document=share(by_kind["same_document"].low > min_detection),
        share_first=share(second.ranks.random == 1),
        mean_same_token=_mean(by_kind["same_token"].balanced_accuracy),
        mean_same_document=_mean(by_kind["same_document"].balanced_accuracy),
        mean_fuzz=_mean(by_kind["same_window"].balanced_accuracy),
        mean_monosemanticity=float(decided.monosemanticity[live].mean()) if n_live else 0.0,
    )


def _row_mean(x: NDArray[np.float32]) -> NDArray[np.float64]:
    valid = ~np.isnan(x)
    n = valid.sum(1)
    total = np.where(valid, x, 0).sum(1, dtype=np.float64)
    return np.asarray(np.divide(total, n, out=np.full(len(x), np.nan), where=n > 0), np.float64)


def _mean(x: NDArray[np.float64]) -> float | None:
    defined = x[~np.isnan(x)]
    return float(defined.mean()) if len(defined) else None
