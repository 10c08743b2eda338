"""Input normalisation: an affine map per dimension that training sees and that an exported SAE does not.

    x_trained = (x − shift) · scale

`scale` makes the mean squared distance from the mean equal to the width, so that one learning rate and one sparsity
coefficient fit every model; `centre` takes each dimension's mean away. `SAE.fold` puts the map into the weights.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Normalisation = Literal["none", "scale", "centre", "centre_scale"]


class Normaliser(NamedTuple):
    """x ↦ (x − shift) · scale, both in float32."""

    shift: Float[Tensor, " width"]
    scale: Float[Tensor, ""]

    @classmethod
    def none(cls, width: int) -> "Normaliser":
        """The identity on activations of this width."""
        return cls(torch.zeros(width), torch.ones(()))

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed."""
        return float(self.scale) == 1.0 and not bool(self.shift.any())

    def apply(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """The normalised activations."""
        return (x - self.shift) * self.scale

    def to(self, device: torch.device) -> "Normaliser":
        """The same map on another device."""
        return Normaliser(self.shift.to(device), self.scale.to(device))


def fit_normaliser(sample: Float[Tensor, "n_tokens width"], how: Normalisation) -> Normaliser:
    """The map of one data set, from a sample of it.

    Raises: ValueError if the sample holds fewer than two different rows, so that no scale exists.
    """
    values = sample.double()
    mean = values.mean(dim=0)
    spread = (values - mean).square().sum(dim=1).mean()
    if how in ("scale", "centre_scale") and not float(spread) > 0:
        raise ValueError(
            f"A scale needs at least two different rows, got {len(sample)} rows of variance {float(spread)}. "
            "Pass a larger sample, or normalise with 'none'."
        )
    shift = mean if how in ("centre", "centre_scale") else torch.zeros_like(mean)
    scale = (sample.shape[1] / spread).sqrt() if how in ("scale", "centre_scale") else torch.ones_like(spread)
    return Normaliser(shift.float(), scale.float())
