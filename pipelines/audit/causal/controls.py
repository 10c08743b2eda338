"""Latents to compare a feature with: like it in how often they fire and how they push, unrelated to the concept."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.errors import UsageError

NEUTRAL_AUROC = 0.1
"""A control's AUROC for the concept lies this close to one half."""


class Traits(NamedTuple):
    """What latents are matched on; arrays over one dictionary, so that the layer agrees by itself."""

    density: Float[np.ndarray, " d_sae"]
    """Share of corpus tokens on which it fires."""
    decoder_norm: Float[np.ndarray, " d_sae"]
    strength: Float[np.ndarray, " d_sae"]
    """The dose that an intervention uses, such as the 99th percentile of its activations: the push is this times the
    decoder norm."""
    auroc: Float[np.ndarray, " d_sae"]
    """For the concept."""


class Controls(NamedTuple):
    """The controls of one feature in random order, and how near they are."""

    latents: Int[np.ndarray, " n"]
    distance: Float[np.ndarray, " n"]
    """Root mean square over the traits, in robust standard deviations of all eligible latents."""


def match_controls(traits: Traits, latent: int, n: int, *, exclude: Bool[np.ndarray, " d_sae"], seed: int) -> Controls:
    """The `n` eligible latents nearest to `latent` in log-density, log decoder norm and log push.

    Eligible: fires at all, has a positive strength, an AUROC within 0.1 of one half, and is not excluded (the
    candidates of any concept of the family). Their order is random, as a test that may stop early needs.

    Raises:
        UsageError: fewer eligible latents than `n`.
    """
    eligible = (traits.density > 0) & (traits.strength > 0) & (np.abs(traits.auroc - 0.5) <= NEUTRAL_AUROC) & ~exclude
    eligible[latent] = False
    pool = np.flatnonzero(eligible)
    if len(pool) < n:
        raise UsageError(
            f"Latent {latent} needs {n} matched controls, but only {len(pool)} latents fire and are unrelated to the "
            "concept. Test fewer features, raise alpha, or use a wider dictionary."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        table = np.log(
            np.stack([traits.density, traits.decoder_norm, traits.strength * traits.decoder_norm], axis=1) + 1e-12
        )
    centre = np.median(table[pool], axis=0)
    spread = 1.4826 * np.median(np.abs(table[pool] - centre), axis=0)
    spread = np.where(spread > 1e-6, spread, 1.0)  # unit-norm decoders: that trait says nothing
    distance = np.sqrt((((table[pool] - table[latent]) / spread) ** 2).mean(axis=1))
    nearest = np.random.default_rng([seed, latent]).permutation(np.argsort(distance, kind="stable")[:n])
    return Controls(pool[nearest], distance[nearest])


def random_directions(n: int, d_in: int, norm: float, seed: int) -> Float[np.ndarray, "n d_in"]:
    """Directions uniform on the sphere of radius `norm`, float32."""
    drawn = np.random.default_rng(seed).standard_normal((n, d_in))
    scaled: Float[np.ndarray, "n d_in"] = norm * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return scaled.astype(np.float32)
