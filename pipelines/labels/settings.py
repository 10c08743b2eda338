"""Settings of the label stage and what it reports."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """Settings of the label stage."""

    n_top: int = 10
    """Strongest contexts kept per latent, at most one per document."""
    n_quantiles: int = 5
    """Equal ranks of strength from which further contexts are drawn."""
    n_per_quantile: int = 2
    window: int = 16
    """Tokens shown on each side of a firing."""
    max_categories: int = 512
    """Largest set of tokens that a rule may name."""
    min_documents: int = 3
    """Documents in which a category must fire before a rule may name it."""
    max_atoms: int = 3
    """Conditions that a clause may join."""
    max_clauses: int = 8
    """Alternatives that a rule may have."""
    min_precision: float = 0.05
    """Share of the train tokens on which a clause holds that must fire; fewer, and the clause says too much."""
    n_fitted: int = 10_000
    """Firings that a rule is fitted to, drawn evenly over their strength."""
    n_hard: int = 2000
    """Negatives of each kind that it is fitted to."""
    n_natural: int = 200_000
    """Train tokens by which the precision of clauses is measured and in which counter-examples are sought."""
    n_tested: int = 500
    """Firings that a rule is tested on, and negatives of each kind."""
    n_others: int = 20
    """Random latents, and nearest decoder neighbours, among which a rule must fit its own best."""
    n_counter_examples: int = 3
    """Strongest firings that a rule misses, and false alarms, that are shown."""
    n_workers: int = 0
    """Processes; 0 is one per core."""
    min_detection: float = 0.6
    """A label's balanced accuracy on held-out documents must have a 95 % lower bound above this; 0.5 is chance."""
    n_null: int = 100
    """Random latents on which every rule is tried for the mismatch null."""
    n_words: int = 10
    """Promoted, suppressed and top tokens kept per latent."""
    max_firings_per_block: int = 1_000_000
    """Bounds the memory of a pass."""

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(("n_top", "n_per_quantile", "max_categories", "min_documents", "n_null", "n_words"), 1)
        at_least |= dict.fromkeys(
            ("max_atoms", "max_clauses", "n_fitted", "n_hard", "n_natural", "n_tested", "n_others"), 1
        )
        at_least |= {"n_workers": 0, "n_counter_examples": 0, "n_quantiles": 0, "window": 0, "max_firings_per_block": 1}
        wrong = [
            f"{k} must be at least {v}, got {getattr(self, k)}" for k, v in at_least.items() if getattr(self, k) < v
        ]
        if not 0 <= self.min_precision < 1:
            wrong.append(f"min_precision must lie in [0, 1), got {self.min_precision}")
        if not 0.5 <= self.min_detection < 1:
            wrong.append(f"min_detection must lie in [0.5, 1), got {self.min_detection}")
        if wrong:
            raise ValueError("Not valid label settings: " + "; ".join(wrong) + ".")


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """What labelling found, for the run's table and metrics.json. Means are None over nothing."""

    n_latents: int
    n_live: int
    """Latents that fire on a usable token."""
    n_candidates: int
    """Live latents with a fitted rule."""
    n_labelled: int
    share_labelled: float
    """Of live latents."""
    null_share: float
    """The same when the rules are dealt to wrong latents."""
    mean_balanced_accuracy: float | None
    """Held-out, over all candidates that could be tested."""
    mean_null_balanced_accuracy: float | None
    """The same rules on other random latents."""
    mean_precision: float | None
    n_surviving: int
    share_surviving: float
    """Of live latents: the label passes every test (see `verdicts.surviving`)."""
    share_same_token: float
    """Of live latents: balanced accuracy against the same token elsewhere has a lower bound above the bar."""
    share_same_document: float
    share_first: float
    """Of live latents: the label fits its own latent better than any of the random others."""
    mean_same_token: float | None
    """Balanced accuracy over all candidates that could be tested."""
    mean_same_document: float | None
    mean_fuzz: float | None
    mean_monosemanticity: float
    """Over live latents."""
