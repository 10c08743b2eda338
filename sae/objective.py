"""What a training objective is: each architecture answers a batch with `StepLosses`; Trainer knows no more of it.

    losses = sae.objective(x, target, context)      # in the architecture's own file
    optimizer.update(losses.total, lr)              # the one place where weights change (`sae.optim`)

Every loss is normalised over the global batch, so that the losses and the gradients of several processes add up.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.parallel import Group


class StepContext(NamedTuple):
    """What an objective may depend on besides the weights and the batch. Equal in all processes, `dead` excepted."""

    group: Group
    """The processes that hold the rows of the batch."""
    n_tokens: int
    """Tokens of the global batch."""
    variance: Float[Tensor, ""]
    """Total variance of the targets of the global batch (`losses.total_variance`)."""
    dead: Bool[Tensor, " d_sae"]
    """Own latents silent for `TrainerConfig.dead_threshold_tokens`."""
    step: int
    """Steps finished."""
    n_steps: int
    """Length of the run."""
    smallest_kept: float
    """What the step before returned under this name; 0 at first."""
    auxk_alpha: float
    """Weight of the AuxK loss."""
    k_aux: int
    """Dead latents that each token uses in it."""
    bf16: bool
    """Search for the candidates of a selection in bfloat16."""
    any_dead: bool | None = None
    """Whether there are dead latents anywhere, where that is known already: asking a GPU takes time."""
    latents: Group = Group(alone=True)
    """The processes that the latents are spread over."""


class StepLosses(NamedTuple):
    """What an objective returns, of this process's share of the batch and its own latents."""

    total: Float[Tensor, ""]
    """What is minimised."""
    reconstruction: Float[Tensor, ""]
    """Squared error over variance: this share's part of the batch's FVU."""
    fired: Bool[Tensor, " d_sae"]
    """Latents active on at least one token."""
    n_active: Int[Tensor, ""]
    """Nonzero latent activations."""
    smallest_kept: float = 0.0
    """The smallest activation that a selection over the global batch kept; 0 for other rules."""
