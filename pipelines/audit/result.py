"""What an audit found: the schema of audit.json, from which the report is rendered without anything else."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines.audit.examples import Role
from pipelines.audit.ledger import Opening
from pipelines.audit.preflight import Preflight
from pipelines.audit.splits import Part

Claim = Literal["not_confirmed", "associated", "detects"]
Level = Literal["nothing_found", "associated", "detects"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptRecord(_Record):
    """Which concept was audited."""

    name: str
    title: str
    description: str
    kind: Literal["text", "behaviour"]
    redacted: bool


class Counts(_Record):
    """Texts of one part of the split."""

    positive: int
    hard_negative: int
    negative: int
    groups: int


class Verdict(_Record):
    """The answer, with its uncertainty."""

    level: Level
    confounded: bool
    """Words alone separate the confirm texts as well as the model's activations do."""
    sentence: str
    latent: int | None
    """Of the candidates on the highest rung, the one with the largest z on the discover half; its figures follow."""
    auroc: float | None
    low: float | None
    high: float | None
    minimum_detectable_auroc: float
    """True AUROC that a design of this size confirms about 80 times of 100; a guide that ignores ties."""


class Discover(_Record):
    """Search over all latents on the discover half; lists run over the tested latents, in the order of `latent`."""

    n_latents: int
    n_tested: int
    n_familywise: int
    """Latents with a max-T p-value at or below alpha."""
    n_fdr: int
    """Latents with a Benjamini-Hochberg adjusted pooled p-value at or below alpha."""
    z_familywise: float
    """z that the best of all latents exceeds in a share alpha of shuffled labellings."""
    latent: list[int]
    auroc: list[float]
    z: list[float]
    fires: list[float]


class BaseRate(_Record):
    """Precision where the concept is this common, with the corpus's firing rate taken as the false-positive rate."""

    base_rate: float
    precision: float


class Candidate(_Record):
    """One latent that was taken to the confirm half."""

    latent: int
    label: str | None
    discover_auroc: float
    discover_z: float
    discover_p_familywise: float
    discover_q: float
    auroc: float
    low: float
    high: float
    low_familywise: float
    """Lower bound that holds for all candidates at once: one-sided, at alpha / number of candidates (Bonferroni)."""
    hard_negative_auroc: float | None
    p: float
    p_holm: float
    threshold: float
    """Frozen on the tune part; the latent detects where its score exceeds it."""
    true_positive_rate: float
    false_positive_rate: float
    corpus_rate: float | None
    """Share of corpus documents above the threshold: an upper bound on the false-positive rate there."""
    precision: list[BaseRate] | None
    claim: Claim
    scores: list[float]
    """Pooled activation on every example, in the order of `examples`."""


class Null(_Record):
    """The same search on shuffled labels: AUROC on the confirm half of the latent found best on the discover half."""

    n: int
    mean: float
    upper: float
    """The quantile 1 - alpha."""
    histogram: list[int]
    """Counts in 40 equal bins over AUROC 0..1."""


class Baseline(_Record):
    """What separates the confirm texts without the dictionary."""

    name: str
    title: str
    auroc: float
    low: float
    high: float
    scores: list[float]
    """On the confirm texts, in the order of `examples`."""


class ExampleRecord(_Record):
    """One text; `text` is null when the concept is redacted."""

    digest: str
    role: Role
    group: str
    part: Part
    n_characters: int
    text: str | None


class AuditResult(_Record):
    """audit.json, schema version 2."""

    schema_version: Literal[2] = 2
    created: str
    concept: ConceptRecord
    dictionary: dict[str, Any]
    settings: dict[str, Any]
    manifest_sha256: str
    preflight: Preflight
    opening: Opening
    """The ledger's record of this opening of the confirm part, and of earlier ones."""
    counts: dict[Part, Counts]
    verdict: Verdict
    discover: Discover
    candidates: list[Candidate]
    shuffled_null: Null
    baselines: list[Baseline]
    unseen_share: float | None
    """Share of confirm positives on which no confirmed latent exceeds its threshold; null if none is confirmed."""
    examples: list[ExampleRecord]
    limits: list[str]
    command: str
    seconds: float
    causal: None = None
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
            f"{path} is not an audit of schema version 2; wrong or missing: {keys}. Run the audit again."
        ) from None
