"""Choices of an audit."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Choices of an audit; all of them are in the manifest."""

    seed: int = 0
    """Of the split and of every shuffle."""
    discover_fraction: float = 0.5
    """Share of each kind of group that goes to the discover part."""
    tune_fraction: float = 0.2
    """Share that goes to the tune part, where thresholds and sets are chosen; the rest is the confirm part."""
    n_permutations: int = 1000
    """Shuffled labellings of the search."""
    n_confirm_permutations: int = 9999
    """Shuffled labellings of each confirmation."""
    n_simulated: int = 400
    """Latents that are simulated for each effect of the power table."""
    max_candidates: int = 20
    """Latents that are taken to the confirm part for their z."""
    max_proposed: int = 5
    """Latents that are taken there besides, because their labels hold words of the concept."""
    min_texts: int = 4
    """A latent that fires on fewer discover texts is not tested."""
    alpha: float = 0.05
    """Family-wise error over the candidates of one concept, and false-discovery rate of the search."""
    detects_above: float = 0.7
    """A latent detects the concept only if its lower bound exceeds this AUROC, at `alpha` over all candidates."""

    def __post_init__(self) -> None:
        """Refuse values that make no test."""
        at_least = {
            "n_permutations": 100,
            "n_confirm_permutations": 100,
            "n_simulated": 50,
            "max_candidates": 1,
            "max_proposed": 0,
            "min_texts": 1,
        }
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"audit setting {name} must be at least {low}; got {getattr(self, name)}.")
        for name in ("discover_fraction", "tune_fraction", "alpha", "detects_above"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"audit setting {name} must lie between 0 and 1; got {getattr(self, name)}.")
