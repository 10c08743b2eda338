"""Audit one concept: manifest, discover, confirm, baselines, verdict; writes audit.json and report.html.

1. Judge the design, split the examples by group and write manifest.json, before any statistic is computed.
2. Discover: AUROC of every latent on one part; the `max_candidates` with the largest z go on. Tune: their thresholds.
3. Open the confirm part, which the ledger records, and confirm them there: Holm, intervals, and the whole search
   repeated on shuffled labels.
4. Baselines on the same texts: words alone, length, dense probes.
5. The verdict, in one sentence, with what this design could not have seen.
"""

import dataclasses
import datetime
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.audit import baselines
from pipelines.audit.concepts import Concept
from pipelines.audit.examples import Example
from pipelines.audit.intervals import auroc_interval, minimum_detectable_auroc
from pipelines.audit.ledger import Ledger
from pipelines.audit.manifest import plan_audit
from pipelines.audit.preflight import prepare, require_possible
from pipelines.audit.report import render_report
from pipelines.audit.result import (
    AuditResult,
    Baseline,
    BaseRate,
    Candidate,
    ConceptRecord,
    Counts,
    Discover,
    ExampleRecord,
    Null,
)
from pipelines.audit.splits import PARTS, Split
from pipelines.audit.statistics import (
    Association,
    associate,
    auroc,
    benjamini_hochberg,
    holm,
    permutation_p,
    searched_null,
)
from pipelines.audit.verdict import claim_of, limits_of, verdict_on, words_explain
from pipelines.rundir import write_text

BASE_RATES = (1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Choices of an audit; all of them are in the manifest."""

    seed: int = 0
    """Of the split and of every shuffle."""
    discover_fraction: float = 0.5
    """Share of each kind of group that goes to the discover part."""
    tune_fraction: float = 0.2
    """Share that goes to the tune part, where thresholds are chosen; the rest is the confirm part."""
    n_permutations: int = 1000
    """Shuffled labellings of the search."""
    n_confirm_permutations: int = 9999
    """Shuffled labellings of each confirmation."""
    max_candidates: int = 20
    """Latents that are taken to the confirm half."""
    min_texts: int = 4
    """A latent that fires on fewer discover texts is not tested."""
    alpha: float = 0.05
    """Family-wise error over the candidates of one concept, and false-discovery rate of the search."""
    detects_above: float = 0.7
    """A latent detects the concept only if its lower bound exceeds this AUROC, at `alpha` over all candidates."""

    def __post_init__(self) -> None:
        """Refuse values that make no test."""
        at_least = {"n_permutations": 100, "n_confirm_permutations": 100, "max_candidates": 1, "min_texts": 1}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"audit setting {name} must be at least {low}; got {getattr(self, name)}.")
        for name in ("discover_fraction", "tune_fraction", "alpha", "detects_above"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"audit setting {name} must lie between 0 and 1; got {getattr(self, name)}.")


def audit_concept(
    concept: Concept,
    examples: Sequence[Example],
    scores: Float[np.ndarray, "n_texts d_sae"],
    out_dir: str | Path,
    *,
    dictionary: Mapping[str, Any],
    dense: Float[np.ndarray, "n_texts d_in"] | None = None,
    corpus: Float[np.ndarray, "n_documents d_sae"] | None = None,
    labels: Mapping[int, str] | None = None,
    settings: AuditSettings | None = None,
    command: str = "",
    ledger: Ledger | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> AuditResult:
    """Audit one concept and write manifest.json, audit.json and report.html into `out_dir`, each atomically.

    Args:
        scores: largest activation of each latent over the non-sink tokens of each example, in the order of `examples`.
        dictionary: what identifies the audited dictionary (name, hook, model, hash), JSON values; in the manifest.
        dense: activations of the model pooled over each example (mean over non-sink tokens), for the dense probes.
        corpus: `scores` of ordinary documents, for the firing rate outside these examples.
        labels: label of a latent, where there is one.
        command: how to reproduce the audit; printed in the report.
        ledger: where the opening of the confirm part is recorded; the user's own by default.
        say: told the manifest's hash before the confirm part is opened, and whether it was opened before.
    Raises:
        ValueError: arrays that do not fit the examples.
        UsageError: a design that can detect nothing.
        LedgerError: the ledger was edited or cannot be written.
    """
    started = time.perf_counter()
    settings = settings or AuditSettings()
    ledger = ledger or Ledger.default()
    _check_rows(examples, scores, dense, corpus)
    kept, examples, split, preflight = prepare(
        examples,
        seed=settings.seed,
        discover_fraction=settings.discover_fraction,
        tune_fraction=settings.tune_fraction,
        n_latents=scores.shape[1],
        n_candidates=settings.max_candidates,
        alpha=settings.alpha,
        by_vocabulary=concept.topic is not None,
    )
    require_possible(preflight)
    scores, dense = scores[kept], None if dense is None else dense[kept]
    chosen_settings = dataclasses.asdict(settings)
    manifest = plan_audit(
        examples,
        split,
        concept={"name": concept.name, "kind": concept.kind},
        dictionaries=[dict(dictionary)],
        settings=chosen_settings,
        planned_tests=[
            "discover: AUROC of every latent that fires on enough texts, one-sided, max-T over shuffled labels",
            "tune: one threshold for each candidate, largest TPR - FPR",
            f"confirm: the {settings.max_candidates} latents with the largest z, one-sided permutation p, Holm",
        ],
    )
    out = Path(out_dir)
    manifest.write(out / "manifest.json")

    positive = np.array([e.positive for e in examples])
    _, groups = np.unique([e.group for e in examples], return_inverse=True)
    d, c = split.discover, split.confirm
    found = associate(
        scores[d],
        positive[d],
        groups[d],
        n_permutations=settings.n_permutations,
        min_texts=settings.min_texts,
        seed=settings.seed + 1,
    )
    say(f"{concept.name}: manifest {manifest.sha256} is written; deposit it elsewhere for proof of what was planned")
    opening = ledger.open_confirm(manifest, name=out.name)
    if opening.stamp:
        say(f"{concept.name}: {opening.stamp}: these confirm texts were opened before with this dictionary")
    shuffled = searched_null(scores[c], positive[c], groups[c], found.null_best, seed=settings.seed + 2)
    upper = float(np.quantile(shuffled, 1 - settings.alpha))
    beside = _baselines(examples, positive, groups, split, dense)
    taken = _confirm(examples, scores, positive, groups, split, found, settings, corpus, labels or {})
    confounded = words_explain(concept, beside, taken, settings.alpha)
    candidates = [
        candidate.model_copy(
            update={
                "claim": claim_of(
                    candidate,
                    null_upper=upper,
                    confounded=confounded,
                    reused=opening.reused,
                    alpha=settings.alpha,
                    detects_above=settings.detects_above,
                )
            }
        )
        for candidate in taken
    ]
    smallest = minimum_detectable_auroc(
        n_pos=(_n_groups(groups[d][positive[d]]), _n_groups(groups[c][positive[c]])),
        n_neg=(_n_groups(groups[d][~positive[d]]), _n_groups(groups[c][~positive[c]])),
        n_latents=int(found.tested.sum()),
        n_candidates=settings.max_candidates,
        alpha=settings.alpha,
    )
    unseen = _unseen_share(candidates, positive, c)
    part_of = split.part_of()

    result = AuditResult(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        concept=ConceptRecord(
            name=concept.name,
            title=concept.display,
            description=concept.description,
            kind=concept.kind,
            redacted=concept.redact,
        ),
        dictionary=dict(dictionary),
        settings=chosen_settings,
        manifest_sha256=manifest.sha256,
        preflight=preflight,
        opening=opening,
        counts={name: _counts(examples, rows) for name, rows in zip(PARTS, split, strict=True)},
        verdict=verdict_on(concept, candidates, confounded=confounded, reused=opening.reused, smallest=smallest),
        discover=_discover(found, settings.alpha),
        candidates=candidates,
        shuffled_null=Null(
            n=shuffled.size,
            mean=_round(shuffled.mean()),
            upper=_round(upper),
            histogram=np.histogram(shuffled, bins=40, range=(0, 1))[0].tolist(),
        ),
        baselines=beside,
        unseen_share=unseen,
        examples=[
            ExampleRecord(
                digest=example.digest,
                role=example.role,
                group=example.group,
                part=part_of[i],
                n_characters=len(example.text),
                text=None if concept.redact else example.text,
            )
            for i, example in enumerate(examples)
        ],
        limits=limits_of(
            concept,
            candidates,
            beside,
            confounded=confounded,
            reused=opening.reused,
            unseen=unseen,
            has_corpus=corpus is not None,
        ),
        command=command,
        seconds=round(time.perf_counter() - started, 3),
    )
    write_text(out / "report.html", render_report(result))
    written = result.model_dump_json(indent=1) + "\n"
    write_text(out / "audit.json", written)  # after the report: its presence means a whole audit
    ledger.finish(opening, level=result.verdict.level, result_sha256=hashlib.sha256(written.encode()).hexdigest())
    return result


def youden_threshold(scores: Float[np.ndarray, " n_texts"], labels: Bool[np.ndarray, " n_texts"]) -> float:
    """The t >= 0 whose rule `score > t` has the largest TPR - FPR (Youden 1950); the smallest of several."""
    values = np.unique(np.append(scores, 0.0))
    above = scores[None, :] > values[:, None]
    gain = above[:, labels].mean(axis=1) - above[:, ~labels].mean(axis=1)
    return float(values[int(gain.argmax())])


def _discover(found: Association, alpha: float) -> Discover:
    tested = np.flatnonzero(found.tested)
    adjusted = benjamini_hochberg(found.p_pooled[tested])
    return Discover(
        n_latents=found.auroc.size,
        n_tested=tested.size,
        n_familywise=int((found.p_familywise <= alpha).sum()),
        n_fdr=int((adjusted <= alpha).sum()),
        z_familywise=_round(np.quantile(found.null_max_z, 1 - alpha)) if tested.size else 0.0,
        latent=tested.tolist(),
        auroc=_rounded(found.auroc[tested]),
        z=_rounded(found.z[tested]),
        fires=_rounded(found.fires[tested]),
    )


def _confirm(
    examples: Sequence[Example],
    scores: Float[np.ndarray, "n_texts d_sae"],
    positive: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    split: Split,
    found: Association,
    settings: AuditSettings,
    corpus: Float[np.ndarray, "n_documents d_sae"] | None,
    labels: Mapping[int, str],
) -> list[Candidate]:
    """Take the best tested latents of discover to confirm; their claims are decided later."""
    c, tune = split.confirm, split.tune
    ranked = np.argsort(-np.where(found.tested, found.z, -np.inf), kind="stable")[: settings.max_candidates]
    chosen = ranked[found.tested[ranked] & (found.z[ranked] > 0)]
    if not chosen.size:
        return []
    tested = np.flatnonzero(found.tested)
    q = dict(zip(tested.tolist(), benjamini_hochberg(found.p_pooled[tested]), strict=True))
    held_out = scores[np.ix_(c, chosen)]
    interval = auroc_interval(held_out, positive[c], groups[c])
    # One-sided at alpha / m for each of m candidates: all m bounds lie below their true AUROCs with 1 - alpha or more.
    together = auroc_interval(held_out, positive[c], groups[c], level=1 - 2 * settings.alpha / chosen.size)
    p = permutation_p(
        held_out, positive[c], groups[c], n_permutations=settings.n_confirm_permutations, seed=settings.seed + 3
    )
    adjusted = holm(p)
    hard = np.array([e.role == "hard_negative" for e in examples])[c]
    against_hard = positive[c] | hard
    hard_area = auroc(held_out[against_hard], positive[c][against_hard]) if hard.any() else None
    out = []
    for k, latent in enumerate(chosen.tolist()):
        threshold = youden_threshold(scores[tune, latent], positive[tune])
        above = held_out[:, k] > threshold
        tpr = float(above[positive[c]].mean())
        rate = None if corpus is None else float((corpus[:, latent] > threshold).mean())
        out.append(
            Candidate(
                latent=latent,
                label=labels.get(latent),
                discover_auroc=_round(found.auroc[latent]),
                discover_z=_round(found.z[latent]),
                discover_p_familywise=_round(found.p_familywise[latent]),
                discover_q=_round(q[latent]),
                auroc=_round(interval.auroc[k]),
                low=_round(interval.low[k]),
                high=_round(interval.high[k]),
                low_familywise=_round(together.low[k]),
                hard_negative_auroc=None if hard_area is None else _round(hard_area[k]),
                p=_round(p[k]),
                p_holm=_round(adjusted[k]),
                threshold=threshold,
                true_positive_rate=_round(tpr),
                false_positive_rate=_round(above[~positive[c]].mean()),
                corpus_rate=None if rate is None else _round(rate),
                precision=None if rate is None else [_precision(base, tpr, rate) for base in BASE_RATES],
                claim="not_confirmed",
                scores=_rounded(scores[:, latent]),
            )
        )
    return out


def _baselines(
    examples: Sequence[Example],
    positive: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    split: Split,
    dense: Float[np.ndarray, "n_texts d_in"] | None,
) -> list[Baseline]:
    """Fit each baseline on the discover texts and score the confirm texts."""
    d, c = split.discover, split.confirm
    fit_texts, texts = [examples[i].text for i in d], [examples[i].text for i in c]
    longer = auroc(baselines.text_length(fit_texts)[:, None], positive[d])[0] >= 0.5
    columns: list[tuple[str, str, Float[np.ndarray, " n_confirm"]]] = []
    if dense is not None:
        probe = baselines.dense_logistic(dense[d], positive[d], dense[c])
        direction = baselines.mean_difference(dense[d], positive[d], dense[c])
        columns += [
            ("dense_logistic", "Dense probe (logistic)", probe),
            ("dense_mean_difference", "Dense probe (mean difference)", direction),
        ]
    columns += [
        ("bag_of_words", "Words alone (bag of words)", baselines.bag_of_words(fit_texts, positive[d], texts)),
        ("length", "Text length alone", baselines.text_length(texts) * (1 if longer else -1)),
    ]
    interval = auroc_interval(np.stack([column for _, _, column in columns], axis=1), positive[c], groups[c])
    return [
        Baseline(
            name=name,
            title=title,
            auroc=_round(interval.auroc[k]),
            low=_round(interval.low[k]),
            high=_round(interval.high[k]),
            scores=_rounded(column),
        )
        for k, (name, title, column) in enumerate(columns)
    ]


def _check_rows(
    examples: Sequence[Example], scores: np.ndarray, dense: np.ndarray | None, corpus: np.ndarray | None
) -> None:
    problems = [
        f"{name} has shape {array.shape}"
        for name, array in (("scores", scores), ("dense", dense))
        if array is not None and (array.ndim != 2 or array.shape[0] != len(examples))
    ]
    if corpus is not None and (corpus.ndim != 2 or corpus.shape[1] != scores.shape[-1]):
        problems.append(f"corpus has shape {corpus.shape} for scores {scores.shape}")
    if dense is not None and not np.isfinite(dense).all():
        problems.append("dense holds values that are not finite")
    if problems:
        raise ValueError(
            f"scores and dense need one row per example ({len(examples)}), corpus one column per latent; "
            f"{'; '.join(problems)}. Encode the examples in their order."
        )


def _unseen_share(
    candidates: Sequence[Candidate], positive: Bool[np.ndarray, " n_texts"], c: Int[np.ndarray, " n_confirm"]
) -> float | None:
    confirmed = [x for x in candidates if x.claim != "not_confirmed"]
    if not confirmed:
        return None
    rows = c[positive[c]]
    seen = np.array([np.array(x.scores)[rows] > x.threshold for x in confirmed]).any(axis=0)
    return _round(1 - seen.mean())


def _precision(base: float, tpr: float, fpr: float) -> BaseRate:
    hits, alarms = base * tpr, (1 - base) * fpr
    return BaseRate(base_rate=base, precision=_round(hits / (hits + alarms)) if hits + alarms > 0 else 0.0)


def _counts(examples: Sequence[Example], rows: Int[np.ndarray, " n"]) -> Counts:
    roles = [examples[i].role for i in rows]
    return Counts(
        positive=roles.count("positive"),
        hard_negative=roles.count("hard_negative"),
        negative=roles.count("negative"),
        groups=len({examples[i].group for i in rows}),
    )


def _n_groups(groups: Int[np.ndarray, " n"]) -> int:
    return int(np.unique(groups).size)


def _round(value: Any) -> float:
    return round(float(value), 6)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(v, 6) for v in values.astype(np.float64).tolist()]
