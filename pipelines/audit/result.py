"""What an audit found: the schema of audit.json, from which the report is rendered without anything else.

Scores are written so that figures can be computed again from them: with nine digits, the order and the ties of float32
values stay. Scores of all latents lie beside it, in scores.safetensors.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.audit.causal.records import Causal
from pipelines.audit.examples import Role
from pipelines.audit.ledger import Opening
from pipelines.audit.preflight import Preflight
from pipelines.audit.splits import Part

SCHEMA_VERSION: Literal[2] = 2
Claim = Literal["not_confirmed", "mentioned", "associated", "detects", "robust", "causal"]
Level = Literal["nothing_found", "associated", "detects", "robust", "causal"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptRecord(_Record):
    """Which concept was audited."""

    name: str
    title: str
    description: str
    kind: Literal["text", "behaviour"]
    redacted: bool
    of_topic: bool
    """A topic of the corpus, a matter of vocabulary."""
    words: list[str]
    """Words by which labels mention it."""


class Counts(_Record):
    """Texts of one part of the split."""

    positive: int
    hard_negative: int
    negative: int
    groups: int


class Estimate(_Record):
    """An AUROC with its 95 % interval."""

    auroc: float
    low: float
    high: float


class Difference(_Record):
    """A difference of two AUROCs with its 95 % interval."""

    value: float
    low: float
    high: float


class Verdict(_Record):
    """The answer, with its uncertainty."""

    level: Level
    confounded: bool
    """Words or length alone separate the confirm texts as well as the model's activations do."""
    reused: int
    """How often these confirm texts had been opened with these dictionaries before; above 0, no more than associated.
    """
    sentence: str
    dictionary: str | None
    latent: int | None
    """Of the candidates on the highest rung, the one with the largest z on the discover part; its figures follow."""
    auroc: float | None
    low: float | None
    high: float | None
    minimum_detectable_auroc: float | None
    """Least true AUROC that this design confirms nine times of ten, simulated; null if it confirms none so often."""


class Discover(_Record):
    """Search over all latents of all dictionaries together; lists run over the tested latents."""

    n_latents: int
    n_tested: int
    n_familywise: int
    """Latents with a max-T p-value at or below alpha."""
    n_fdr: int
    """Latents with a Benjamini-Hochberg adjusted pooled p-value at or below alpha."""
    z_familywise: float
    """z that the best of all latents exceeds in a share alpha of shuffled labellings."""
    dictionary: list[int]
    """Position in `dictionaries`."""
    latent: list[int]
    auroc: list[float]
    z: list[float]
    fires: list[float]
    q: list[float]
    """Benjamini-Hochberg adjusted p-values."""


class PowerTable(_Record):
    """Chance that a latent of a given true AUROC is found by this design, from the observed firing rates."""

    auroc: list[float]
    associated: list[float]
    detects: list[float]
    n_simulated: int
    smallest_associated: float | None
    """Least AUROC that becomes associated nine times of ten."""
    smallest_detects: float | None


class BaseRate(_Record):
    """Precision where the concept is this common, with the corpus's firing rate taken as the false-positive rate."""

    base_rate: float
    precision: float
    low: float
    """With the upper end of the firing rate's interval."""


class Held(_Record):
    """AUROC of a candidate on a part of the held-out texts."""

    auroc: float
    low: float
    high: float
    low_tested: float
    """Lower bound at the candidate's `level`."""
    true_positive_rate: float
    false_positive_rate: float


class Recurrence(_Record):
    """The closest latent of another dictionary of the same hook."""

    dictionary: str
    latent: int
    cosine: float
    """Of the decoder directions."""
    mutual: bool
    """Each is the closest of its dictionary to the other."""
    auroc: float
    """Of the other latent on the confirm part."""
    recurs: bool
    """Cosine at least 0.7 and mutual."""


class Candidate(_Record):
    """One latent that was taken to the confirm part, in the order in which they were chosen."""

    dictionary: str
    latent: int
    label: str | None
    chosen_by: Literal["search", "label"]
    """`label`: proposed because its label holds words of the concept."""
    discover_auroc: float
    discover_z: float
    discover_p_familywise: float
    discover_q: float
    auroc: float
    low: float
    high: float
    level: float
    """One-sided level at which it is tested for `detects`; see `intervals.levels_in_order`."""
    low_familywise: float
    """Lower bound at that level."""
    hard_negatives: Held | None
    """Positives against hard negatives alone."""
    ood: Held | None
    ood_drop: Difference | None
    """AUROC on the confirm part less that on the out-of-distribution set."""
    p: float
    p_holm: float
    threshold: float
    """Frozen on the tune part; the latent detects where its score exceeds it."""
    true_positive_rate: float
    false_positive_rate: float
    corpus_rate: float | None
    """Share of corpus documents above the threshold: an upper bound on the false-positive rate there."""
    corpus_rate_high: float | None
    """Upper end of its 95 % interval (Clopper and Pearson)."""
    precision: list[BaseRate] | None
    recurrence: list[Recurrence]
    mentions: bool
    """Its label holds a word of the concept."""
    claim: Claim
    scores: list[float]
    """Pooled activation on every example, in the order of `examples`."""
    corpus_scores: list[float] | None
    """Pooled activations above zero over the corpus, largest first."""


class SparseProbe(_Record):
    """A logistic probe on the k latents with the largest z: ordered on discover, fitted on discover and tune."""

    k: int
    latents: list[tuple[str, int]]
    weights: list[float]
    confirm: Estimate
    ood: Estimate | None
    scores: list[float | None]
    """On confirm and out-of-distribution texts, in the order of `examples`; null elsewhere."""


class Cover(_Record):
    """A set of latents, any of which exceeds its threshold on most positives; chosen greedily on tune."""

    latents: list[tuple[str, int]]
    thresholds: list[float]
    tune_recall: float
    tune_false_positive_rate: float
    recall: float
    """On the confirm part, as the next."""
    false_positive_rate: float
    seen: list[bool]
    """Whether any of them sees the text, in the order of `examples`."""


class Absorber(_Record):
    """A latent that is not among the confirmed ones and carries a share of the concept's direction."""

    latent: int
    label: str | None
    cosine: float
    """Of its decoder direction with the probe."""
    share: float
    """Of the positives' excess along the probe."""


class Absorption(_Record):
    """How much of the concept's direction other latents carry where the confirmed ones do not."""

    dictionary: str
    n_texts: int
    """Confirm positives that the dense probe finds."""
    fraction: float
    """Mean absorption fraction over them."""
    full: float
    """Share of them on which every confirmed latent is silent and one other carries 40 % or more."""
    absorbers: list[Absorber]


class Completeness(_Record):
    """What the confirmed latents miss."""

    unseen_share: float | None
    """Share of confirm positives on which no confirmed latent exceeds its threshold; null if none is confirmed."""
    absorption: Absorption | None


class Null(_Record):
    """The same search on shuffled labels: AUROC on the confirm part of the latent found best on the discover part."""

    n: int
    mean: float
    upper: float
    """The quantile 1 - alpha."""
    histogram: list[int]
    """Counts in 40 equal bins over AUROC 0..1."""


class Matched(_Record):
    """Latents that fire as often as the verdict's, on the confirm part."""

    n: int
    mean: float
    upper: float
    """The quantile 1 - alpha."""
    p: float
    """Share of them that reach the latent's AUROC, (1 + count) / (1 + n)."""
    latents: list[tuple[str, int]]


class Baseline(_Record):
    """What separates the confirm texts without a latent of the dictionary; fitted on discover and tune."""

    name: str
    title: str
    dictionary: str | None
    """Whose activations, reconstruction or error it reads."""
    auroc: float
    low: float
    high: float
    hard_auroc: float | None
    """Positives against hard negatives alone."""
    ood: Estimate | None
    scores: list[float | None]
    """On confirm and out-of-distribution texts, in the order of `examples`; null elsewhere."""


class ExampleRecord(_Record):
    """One text; `text` is null when the concept is redacted."""

    digest: str
    role: Role
    group: str
    part: Part
    n_characters: int
    chat: bool
    """It is a chat, whose digest is of its messages and position rule; `text` holds the contents."""
    text: str | None


class AuditResult(_Record):
    """audit.json, schema version 2."""

    schema_version: Literal[2] = SCHEMA_VERSION
    created: str
    concept: ConceptRecord
    dictionaries: list[dict[str, Any]]
    """What identifies each audited dictionary; `name` is unique."""
    settings: dict[str, Any]
    manifest_sha256: str
    scores_sha256: str
    """Of the file scores.safetensors."""
    preflight: Preflight
    opening: Opening
    """The ledger's record of this opening of the confirm part, and of earlier ones."""
    counts: dict[Part, Counts]
    verdict: Verdict
    discover: Discover
    power: PowerTable
    candidates: list[Candidate]
    sparse_probes: list[SparseProbe]
    cover: Cover | None
    completeness: Completeness
    shuffled_null: Null
    matched: Matched | None
    baselines: list[Baseline]
    gap: Difference | None
    """AUROC of the best dense probe less that of the verdict's latent, or of the first candidate, on the same texts."""
    examples: list[ExampleRecord]
    limits: list[str]
    command: str
    seconds: float
    causal: Causal | None = None
    """Null until causal tests have run."""
    suppression: None = None
    monitor: None = None
    comparison: None = None


def load_result(path: str | Path) -> AuditResult:
    """Read an audit.json.

    Raises:
        ValueError: the file does not follow this schema; the message names it and the keys.
    """
    try:
        return AuditResult.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        keys = ", ".join(".".join(str(part) for part in e["loc"]) or "the whole file" for e in error.errors()[:5])
        raise ValueError(
            f"{path} is not an audit of schema version {SCHEMA_VERSION}; wrong or missing: {keys}. Run the audit again."
        ) from None
