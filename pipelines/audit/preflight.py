"""Before any activation is computed: is this a design that could show anything, and would words alone explain it?

Looks at texts, labels and groups only. `prepare` is what every audit starts with; `sae audit preflight CONCEPT` prints
the same without a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines.audit.baselines import cross_validated_bag_of_words, text_length
from pipelines.audit.examples import NGRAM, Example, join_near_duplicates
from pipelines.audit.intervals import minimum_detectable_auroc
from pipelines.audit.splits import PARTS, Part, Split, split_by_group
from pipelines.audit.statistics import auroc
from pipelines.errors import UsageError

WORDS_LIMIT = 0.75
"""AUROC of words alone (or of length alone, either way round) from which a concept's texts are stamped CONFOUNDED."""
HOPELESS = 0.999
"""A design that misses even a latent of this AUROC more than 20 times of 100 is refused."""
WIDTHS = (1024, 4096, 16_384, 65_536)
"""Dictionary widths of the power table."""
FOLDINGS = 3


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartCounts(_Record):
    """One part of the split."""

    positive: int
    hard_negative: int
    negative: int
    positive_groups: int
    negative_groups: int


class PowerRow(_Record):
    """The smallest effect that a dictionary of this width would show."""

    n_latents: int
    minimum_detectable_auroc: float
    groups_for_080: int | None
    """Groups of each class with which an AUROC of 0.8 is found 80 times of 100; null if above 2,000."""


class Preflight(_Record):
    """What texts, labels and groups say before the model is asked."""

    parts: dict[Part, PartCounts]
    n_joined: int
    """Texts that share a group only because they share eight words with a text of another origin."""
    n_repeated: int
    n_contradictory: int
    n_ood_seen: int
    """Left out of the out-of-distribution set, because the other texts hold near duplicates of them."""
    positive_words: float
    negative_words: float
    """Median words per text."""
    length_auroc: float
    """Of the number of words, positives against all negatives."""
    words_auroc: float
    """Of a bag of words, positives against all negatives; cross-validated by group."""
    words_hard_auroc: float | None
    """As `words_auroc`, against hard negatives only."""
    power: list[PowerRow]
    stamps: list[str]
    """What explains the labels without the model: CONFOUNDED by words, by length."""
    notes: list[str]
    refusals: list[str]
    """Why the design can detect nothing, with what is needed; empty for one that is audited."""


class Design(NamedTuple):
    """Examples that are ready to be audited."""

    kept: list[int]
    """Rows of the given examples that `examples` consists of."""
    examples: list[Example]
    split: Split
    preflight: Preflight


def prepare(
    examples: Sequence[Example],
    *,
    seed: int,
    discover_fraction: float = 0.5,
    tune_fraction: float = 0.2,
    n_latents: int | None = None,
    n_candidates: int = 10,
    alpha: float = 0.05,
    by_vocabulary: bool = False,
) -> Design:
    """Remove repeats, join near duplicates, split, and judge the design.

    Args:
        n_latents: width of the dictionary, where it is known: the design is judged for it.
        by_vocabulary: the concept is one of vocabulary (a topic), so words may explain it.
    Raises:
        UsageError: the design can detect nothing; the message says how many examples and groups are needed.
    """
    joined = join_near_duplicates(examples)
    try:
        split = split_by_group(
            joined.examples, seed=seed, discover_fraction=discover_fraction, tune_fraction=tune_fraction
        )
    except ValueError as error:
        raise UsageError(f"{error}{_joined_hint(joined.n_joined)}") from error
    parts = {name: _counts(joined.examples, rows) for name, rows in zip(PARTS, split, strict=True)}

    def smallest(width: int) -> float:
        d, c = parts["discover"], parts["confirm"]
        return minimum_detectable_auroc(
            (d.positive_groups, c.positive_groups),
            (d.negative_groups, c.negative_groups),
            n_latents=width,
            n_candidates=min(n_candidates, width),
            alpha=alpha,
        )

    def enough(width: int, effect: float) -> int | None:
        return _groups_needed(width, effect, discover_fraction, tune_fraction, min(n_candidates, width), alpha)

    power = [
        PowerRow(
            n_latents=width,
            minimum_detectable_auroc=round(smallest(width), 4),
            groups_for_080=enough(width, 0.8),
        )
        for width in ((n_latents,) if n_latents else WIDTHS)
    ]
    refusals = []
    width = power[0].n_latents
    if power[0].minimum_detectable_auroc > HOPELESS:
        have = [sum(getattr(p, f"{side}_groups") for p in parts.values()) for side in ("positive", "negative")]
        refusals.append(
            f"{have[0]} groups of positives and {have[1]} of negatives can detect nothing: even a nearly perfect "
            f"latent would be missed more often than 20 times of 100 among {width} latents. Write "
            f"{enough(width, HOPELESS)} or more independent texts (groups) of each class; {enough(width, 0.8)} show an "
            f"AUROC of 0.8{_joined_hint(joined.n_joined)}"
        )
    preflight = _judge(joined.examples, parts, power, refusals, by_vocabulary).model_copy(
        update={
            "n_joined": joined.n_joined,
            "n_repeated": joined.n_repeated,
            "n_contradictory": joined.n_contradictory,
            "n_ood_seen": joined.n_ood_seen,
        }
    )
    preflight = preflight.model_copy(update={"notes": [*preflight.notes, *_removed(preflight)]})
    return Design(joined.kept, joined.examples, split, preflight)


def require_possible(preflight: Preflight) -> None:
    """Refuse a design that can detect nothing.

    Raises:
        UsageError: with what is needed.
    """
    if preflight.refusals:
        raise UsageError("; ".join(preflight.refusals))


def words_alone(examples: Sequence[Example]) -> float:
    """AUROC of a bag of words, cross-validated over whole groups, mean over `FOLDINGS` ways of dealing them."""
    labels = np.array([e.positive for e in examples])
    texts, groups = [e.text for e in examples], [e.group for e in examples]
    scores = [cross_validated_bag_of_words(texts, labels, groups, seed=seed) for seed in range(FOLDINGS)]
    return float(auroc(np.stack(scores, axis=1), labels).mean())


def _judge(
    examples: Sequence[Example],
    parts: dict[Part, PartCounts],
    power: list[PowerRow],
    refusals: list[str],
    by_vocabulary: bool,
) -> Preflight:
    inside = [e for e in examples if not e.ood]
    labels = np.array([e.positive for e in inside])
    lengths = text_length([e.text for e in inside])
    length_auroc = float(auroc(lengths[:, None], labels)[0])
    words_auroc = words_alone(inside)
    hard = [e for e in inside if e.role != "negative"]
    if len(hard) == len(inside):
        hard_auroc: float | None = words_auroc
    else:
        hard_auroc = None if all(e.positive for e in hard) else words_alone(hard)
    against = words_auroc if hard_auroc is None else hard_auroc
    stamps = []
    if not by_vocabulary and against > WORDS_LIMIT:
        which = "negatives" if hard_auroc is None else "hard negatives"
        stamps.append(
            f"CONFOUNDED by words: a bag of words reaches an AUROC of {against:.2f} against the {which}. A latent is "
            "credited with more than association only if the model does clearly better; write negatives with the same "
            "words"
        )
    if not by_vocabulary and abs(length_auroc - 0.5) > WORDS_LIMIT - 0.5:
        stamps.append(
            f"CONFOUNDED by length: the number of words alone reaches {max(length_auroc, 1 - length_auroc):.2f} "
            f"(medians {np.median(lengths[labels]):.0f} and {np.median(lengths[~labels]):.0f}). Make both classes "
            "equally long"
        )
    notes = []
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    if max(n_pos, n_neg) > 4 * min(n_pos, n_neg):
        notes.append(f"{n_pos} positives stand against {n_neg} negatives: the smaller class decides the power")
    if hard_auroc is None and not by_vocabulary:
        notes.append("there are no hard negatives: a latent for the subject passes as one for the concept")
    if not parts["ood"].positive:
        notes.append("there is no out-of-distribution set: nothing can be called robust")
    return Preflight(
        parts=parts,
        n_joined=0,
        n_repeated=0,
        n_contradictory=0,
        n_ood_seen=0,
        positive_words=float(np.median(lengths[labels])),
        negative_words=float(np.median(lengths[~labels])),
        length_auroc=round(length_auroc, 4),
        words_auroc=round(words_auroc, 4),
        words_hard_auroc=None if hard_auroc is None else round(hard_auroc, 4),
        power=power,
        stamps=stamps,
        notes=notes,
        refusals=refusals,
    )


def _removed(p: Preflight) -> list[str]:
    told = [
        (p.n_repeated, f"{p.n_repeated} repeated text(s) count once"),
        (p.n_contradictory, f"{p.n_contradictory} text(s) that stand there with both labels are left out"),
        (p.n_joined, f"{p.n_joined} text(s) share {NGRAM} words with a text of another group and now share its group"),
        (p.n_ood_seen, f"{p.n_ood_seen} out-of-distribution text(s) resemble the others and are left out"),
    ]
    return [text for n, text in told if n]


def _joined_hint(n_joined: int) -> str:
    return (
        f". {n_joined} texts share {NGRAM} consecutive words with others and count as one group with them: word them "
        "independently"
        if n_joined
        else ""
    )


def _counts(examples: Sequence[Example], rows: np.ndarray) -> PartCounts:
    part = [examples[i] for i in rows]
    roles = [e.role for e in part]
    return PartCounts(
        positive=roles.count("positive"),
        hard_negative=roles.count("hard_negative"),
        negative=roles.count("negative"),
        positive_groups=len({e.group for e in part if e.positive}),
        negative_groups=len({e.group for e in part if not e.positive}),
    )


def _groups_needed(
    n_latents: int, effect: float, discover: float, tune: float, n_candidates: int, alpha: float
) -> int | None:
    """Groups of each class with which `effect` is found 80 times of 100, by bisection; None above 2,000."""

    def shows(n: int) -> bool:
        sizes = round(n * discover), n - round(n * (discover + tune))
        return min(sizes) > 0 and (
            minimum_detectable_auroc(sizes, sizes, n_latents=n_latents, n_candidates=n_candidates, alpha=alpha)
            <= effect
        )

    low, high = 1, 2000
    if not shows(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high
