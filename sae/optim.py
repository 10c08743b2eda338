"""The optimizer's step, the learning-rate schedule and the unit norm of the decoder's rows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE
from sae.features import own_part
from sae.kernels.update import clip_gradients, fused_update
from sae.parallel import Layout


class Optimizer:
    """The one place where weights change: gradients summed over processes, projected, clipped; Adam; unit norm again.

    Args:
        sae: with this process's latents, under a layout that spreads them.
        betas: Adam's decay rates; None takes the architecture's own.
        grad_clip: largest norm of the whole gradient; None turns clipping off.
    """

    def __init__(
        self, sae: SAE, layout: Layout, lr: float, betas: tuple[float, float] | None, grad_clip: float | None
    ) -> None:
        self.sae = sae
        self.layout = layout
        self.grad_clip = grad_clip
        self.adam = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas or sae.adam_betas, fused=True)

    def update(self, loss: Float[Tensor, ""], lr: float, check: Callable[[], None] | None = None) -> None:
        """One step of Adam on the gradient of `loss`.

        Args:
            check: called before the weights change, may raise. By then a GPU has the gradients to compute, and need not
                wait while the host looks at the loss.
        """
        parameters = list(self.sae.parameters())
        self.adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.layout.rows.sum_gradients(parameters)
        if check is not None:
            check()
        assert self.sae.W_dec.grad is not None
        for param_group in self.adam.param_groups:
            param_group["lr"] = lr
        if not fused_update(self.sae, self.adam, self.grad_clip, self.layout.latents):
            self._update_in_steps()
        self.sae.after_update()

    def _update_in_steps(self) -> None:
        W_dec = self.sae.W_dec
        if self.sae.unit_norm_decoder and W_dec.grad is not None:
            project_gradient(W_dec.data, W_dec.grad)
        if self.grad_clip is not None:
            clip_gradients(self.sae, self.grad_clip, self.layout.latents)
        for state in self.adam.state.values():  # where torch's fused Adam keeps it; the other forms keep it on the CPU
            state["step"] = state["step"].to(W_dec.device)
        self.adam.step()
        if self.sae.unit_norm_decoder:
            normalise_rows(W_dec.data)

    def state_dict(self) -> dict[str, Any]:
        """The moments, flat: `adam.PARAMETER.KEY`. Tensors are not copies."""
        return {
            f"adam.{name}.{key}": value
            for name, parameter in self.sae.named_parameters()
            for key, value in self.adam.state[parameter].items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the moments from `state`; other keys are ignored."""
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.adam.state[parameter] = {
                key: value.clone()
                if key == "step"
                else torch.empty_like(parameter).copy_(own_part(name, value, self.layout.latents))
                for key, value in saved.items()
            }


def schedule(step: int, n_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Multiplier of the learning rate at `step` (0-based): linear warm-up, constant, linear decay towards zero.

    The first step has a multiplier above 0 and the last one too, so no step is wasted.

        warm-up   (step + 1) / n_warmup          for step < n_warmup
        decay     (n_steps − step) / (n_decay + 1)   for the last n_decay steps
    """
    n_warmup = round(warmup_fraction * n_steps)
    n_decay = round(decay_fraction * n_steps)
    warmup = (step + 1) / n_warmup if step < n_warmup else 1.0
    decay = (n_steps - step) / (n_decay + 1) if step >= n_steps - n_decay else 1.0
    return min(warmup, decay)


@torch.no_grad()
def project_gradient(W_dec: Float[Tensor, "d_sae d_in"], gradient: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove, in place, the part of the gradient along each unit-norm decoder row, which renormalisation would undo.

    Reference: Bricken et al. 2023, Towards Monosemanticity, appendix "Advice for training sparse autoencoders".
    """
    along = torch.linalg.vecdot(gradient, W_dec).unsqueeze(1)
    gradient.addcmul_(W_dec, along, value=-1)


@torch.no_grad()
def normalise_rows(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale each row, in place, to norm 1."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))
