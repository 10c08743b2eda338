"""Settings of the tests that run the language model again; they belong to the run's configuration."""

from pydantic import Field

from pipelines.section import Section


class EditsConfig(Section):
    """Counterfactual edits of contexts (`counterfactual`)."""

    n_latents: int = Field(0, ge=0)
    """Latents to test, labelled ones first; 0 turns the test off. One costs about 4,000 tokens of forward passes up to
    the hook."""
    n_documents: int = Field(12, ge=2)
    """Held-out documents of each, with one firing each."""
    max_context: int = Field(64, ge=1)
    """Tokens before a firing that are run again."""
    kept: float = Field(0.5, gt=0, le=1)
    """Share of the activation with which a latent counts as on."""


class OutputTestConfig(Section):
    """Amplified latents and what they promise (`output_test`)."""

    n_latents: int = Field(0, ge=0)
    """Latents to test, labelled ones first; 0 turns the test off. All tests together cost n_latents + 3 * n_controls
    forward passes over the texts, from the hook on."""
    n_controls: int = Field(100, ge=1)
    """Latents that each tested one is compared with."""
    n_promised: int = Field(10, ge=1)
    """Tokens that a decoder row is held to promise."""
    n_texts: int = Field(8, ge=2)
    """Held-out texts in which latents are amplified."""
    n_tokens: int = Field(32, ge=2)
    """Tokens of each of them."""
