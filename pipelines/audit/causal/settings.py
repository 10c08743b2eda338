"""Settings of the causal tests; they belong to the run's configuration."""

from typing import Literal

from pydantic import Field

from pipelines.section import Section


class CausalConfig(Section):
    """Whether the strongest confirmed latents are switched off and turned up, and how."""

    enabled: bool = False
    n_features: int = Field(10, gt=0)
    """Single latents, those with the largest z on the discover part over all concepts; each concept adds one set."""
    n_prompts: int = Field(12, ge=4)
    n_tokens: int = Field(24, ge=4)
    """Of each prompt."""
    thorough: bool = False
    """Four times as many prompts."""
    outcome: Literal["probe", "tokens"] = "probe"
    """A probe of the concept at a later layer, or the log-odds of the concept's `outcome_tokens` coming next."""
    layers_later: int = Field(4, gt=0)
    """Where the probe reads, counted from the dictionary's layer."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Family-wise error rate over all tests of the run."""
    max_minutes: float = Field(60, gt=0)
    """The tests are refused if they could take longer."""
