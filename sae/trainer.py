"""Trainer: batches of activations in, a trained SAE out. Knows tensors, never files or language models.

    trainer = Trainer(build(BatchTopKConfig(d_in=576, d_sae=4608, k=32), seed=0), TrainerConfig(), n_steps=225)
    trainer.fit(batches)
    sae = trainer.export()

One step, read from top to bottom: `fit` → `_step` → `_losses`. The same code trains on one process and on several
(`sae.parallel`); several processes with a share of each batch take the step that one process takes with all of it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.architectures import empty
from sae.base import SAE, SparseLatents
from sae.batchtopk import BatchTopKSAE
from sae.kernels import cpu as kernels
from sae.losses import auxk_loss, reconstruction_loss
from sae.optim import normalise_rows, project_gradient, schedule
from sae.parallel import Group
from sae.topk import TopKSAE


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How an SAE is trained; what it is lives in its own configuration."""

    lr: float = 1e-3
    """Peak learning rate of Adam."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moments."""

    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""

    decay_fraction: float = 0.3
    """Share of the steps, at the end, in which it falls linearly towards zero."""

    auxk_alpha: float = 1 / 32
    """Weight of the loss that revives dead latents; 0 turns it off."""

    k_aux: int | None = None
    """Dead latents used per token in that loss; None means d_in // 2."""

    dead_threshold_tokens: int | None = None
    """A latent silent for this many tokens counts as dead; None means 20 % of the run, at most 10 million."""

    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; None turns clipping off."""

    autocast_bf16: bool = False
    """BatchTopK only: find the candidates of the selection in bfloat16. Their values and all gradients stay float32."""

    def __post_init__(self) -> None:
        wrong = []
        if not self.lr > 0:
            wrong.append(f"`lr` must be positive, got {self.lr!r}")
        for name in ("warmup_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"`{name}` must lie between 0 and 1, got {getattr(self, name)!r}")
        if not self.auxk_alpha >= 0:
            wrong.append(f"`auxk_alpha` must not be negative, got {self.auxk_alpha!r}")
        for name in ("k_aux", "dead_threshold_tokens", "grad_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                wrong.append(f"`{name}` must be positive or None, got {value!r}")
        if wrong:
            raise ValueError("TrainerConfig: " + "; ".join(wrong) + ". Change these settings.")


class StepMetrics(NamedTuple):
    """What one training step did, over the global batch."""

    step: int
    """Steps finished, so 1 after the first."""
    loss: float
    batch_fvu: float
    l0: float
    dead: int
    """Latents silent for `dead_threshold_tokens`."""
    lr: float
    n_tokens: int
    """Tokens trained on since the start of the run."""


class StopTraining(Exception):
    """Raised by an `on_step` callback to end `fit` cleanly after the current step."""


class _Losses(NamedTuple):
    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    latents: SparseLatents
    smallest_kept: float


class Trainer:
    """Trains a TopK or BatchTopK SAE with Adam, unit-norm decoder rows and AuxK.

    Args:
        sae: trained in place, in the units of the scaled activations; `export` returns the one to use.
        n_steps: length of the whole run, which the schedule needs.
        device: where the SAE and the batches are moved.
        input_scale: activations are multiplied by it during training; `export` folds it away. Adam moves every
            parameter by about `lr` per step, so this sets how fast the biases move relative to the data.
    """

    def __init__(
        self,
        sae: SAE,
        config: TrainerConfig,
        n_steps: int,
        *,
        device: torch.device | str = "cpu",
        input_scale: float = 1.0,
    ) -> None:
        if not isinstance(sae, TopKSAE | BatchTopKSAE):
            raise ValueError(
                f"Trainer trains topk and batchtopk, got {sae.config.architecture}. "
                "Build the SAE from one of those configurations."
            )
        if n_steps < 1:
            raise ValueError(f"`n_steps` must be at least 1, got {n_steps}. Give the length of the whole run.")
        if not input_scale > 0:
            raise ValueError(f"`input_scale` must be positive, got {input_scale}. Use 1.0 for no scaling.")
        self.sae: TopKSAE | BatchTopKSAE = sae.to(device)
        self.config = config
        self.n_steps = n_steps
        self.device = torch.device(device)
        self.input_scale = input_scale
        self.group = Group()
        self.group.broadcast(list(self.sae.state_dict().values()))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.lr, betas=config.betas, fused=True)
        self.step = 0
        self.n_tokens = 0
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.device)
        self.initialised = False
        self._smallest_kept = 0.0

    # ---- the loop -------------------------------------------------------------------------------------------------

    def initialise(
        self, batch: Float[Tensor, "batch width"], centre: Literal["mean", "geometric_median"] = "mean"
    ) -> None:
        """Set `b_dec` to the centre of `batch`, so that the latents need not learn the mean.

        Several processes pass each their share; the centre is that of all of it.
        """
        x = self._checked(batch)
        with torch.no_grad():
            self.sae.b_dec.copy_(self._mean(x) if centre == "mean" else self._geometric_median(x))
        self.initialised = True

    def fit(
        self,
        batches: Iterable[Float[Tensor, "_ width"]],
        on_step: Callable[[StepMetrics], bool | None] | None = None,
    ) -> None:
        """Train from the current step to `n_steps`. The first batch of a run sets `b_dec` unless `initialise` did.

        Args:
            batches: this process's rows of each global batch, any float dtype. Not modified.
            on_step: called after each step; returning False or raising StopTraining ends the run after that step.
        Raises:
            ValueError: if a batch has the wrong width or holds NaN or infinity, if the loss is not finite (in each case
                before the weights change), or if `batches` ends early.
        """
        if self.step >= self.n_steps:
            return
        for batch in batches:
            if not self.initialised:
                self.initialise(batch)
            metrics = self._step(self._checked(batch))
            try:
                proceed = on_step is None or on_step(metrics) is not False
            except StopTraining:
                proceed = False
            if self.step >= self.n_steps or not proceed:
                return
        raise ValueError(
            f"Training needs {self.n_steps} batches, but they ended after step {self.step}. "
            "Pass a longer stream (more epochs) or lower `n_steps`."
        )

    def _step(self, x: Float[Tensor, "batch d_in"]) -> StepMetrics:
        variance, n_tokens = self.group.total_variance(x)
        dead = self._dead()
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(x, variance, n_tokens, dead)
        loss, batch_fvu, n_active = self.group.sum(
            torch.stack(
                [
                    losses.total.detach(),
                    losses.reconstruction.detach(),
                    losses.total.new_tensor(len(losses.latents.value)),
                ]
            )
        ).tolist()
        if not (loss == loss and abs(loss) != float("inf")):
            raise ValueError(
                f"The loss must be finite, got {loss} at step {self.step} (batch variance {float(variance):.4g}). "
                "The weights were left as they were; look for constant batches, or lower `lr`."
            )
        losses.total.backward()  # type: ignore[no-untyped-call]
        lr = self._update()
        self._count(losses, n_tokens)
        self.step += 1
        self.n_tokens += n_tokens
        return StepMetrics(self.step, loss, batch_fvu, n_active / n_tokens, int(dead.sum()), lr, self.n_tokens)

    def _losses(
        self, x: Float[Tensor, "batch d_in"], variance: Float[Tensor, ""], n_tokens: int, dead: Bool[Tensor, " d_sae"]
    ) -> _Losses:
        sae = self.sae
        latents, smallest_kept = self._select(x, n_tokens)
        x_hat = kernels.decode(latents, sae.W_dec, sae.b_dec, len(x))
        reconstruction = reconstruction_loss(x, x_hat, variance, n_tokens)
        total = reconstruction
        if self.config.auxk_alpha > 0 and bool(dead.any()):
            residual = (x - x_hat).detach()
            residual_variance, _ = self.group.total_variance(residual)
            residual_hat = self._decode_dead(x, dead)
            total = total + self.config.auxk_alpha * auxk_loss(residual, residual_hat, residual_variance, n_tokens)
        return _Losses(total, reconstruction, latents, smallest_kept)

    def _select(self, x: Float[Tensor, "batch d_in"], n_tokens: int) -> tuple[SparseLatents, float]:
        """The latents that this step keeps, with gradients, and the smallest value among them."""
        sae = self.sae
        encoder = kernels.Encoder(x - sae.b_dec.detach(), sae.W_enc, sae.b_enc)
        with torch.no_grad():
            if isinstance(sae, BatchTopKSAE):
                latents, smallest_kept = kernels.select_batchtopk(
                    encoder, sae.config.k * n_tokens, self._smallest_kept, self.group, bf16=self.config.autocast_bf16
                )
            else:
                latents, smallest_kept = kernels.select_topk(encoder, sae.config.k), 0.0
        return kernels.differentiable(latents, encoder, sae.b_dec), smallest_kept

    def _decode_dead(self, x: Float[Tensor, "batch d_in"], dead: Bool[Tensor, " d_sae"]) -> Float[Tensor, "batch d_in"]:
        """What the k_aux largest dead latents of each token reconstruct, without b_dec (see `losses.auxk_loss`)."""
        sae = self.sae
        k_aux = self.config.k_aux or sae.d_in // 2
        W_enc = sae.W_enc[:, dead]
        shift = (sae.b_dec - sae.b_dec.detach()) @ W_enc  # zero: it carries the gradient to b_dec without one of x
        pre_acts = (x - sae.b_dec.detach()) @ W_enc + (sae.b_enc[dead] - shift)
        if pre_acts.shape[1] > k_aux:
            top = pre_acts.topk(k_aux, dim=1, sorted=False)
            pre_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)
        return pre_acts.relu() @ sae.W_dec[dead]

    def _update(self) -> float:
        """One step of Adam on the summed gradients, decoder rows kept at norm 1. Returns the learning rate."""
        parameters = list(self.sae.parameters())
        self.group.sum_gradients(parameters)
        assert self.sae.W_dec.grad is not None
        project_gradient(self.sae.W_dec.data, self.sae.W_dec.grad)
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        lr = self.config.lr * schedule(self.step, self.n_steps, self.config.warmup_fraction, self.config.decay_fraction)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = lr
        self.optimizer.step()
        normalise_rows(self.sae.W_dec.data)
        return lr

    # ---- dead latents and the inference threshold -----------------------------------------------------------------

    def _count(self, losses: _Losses, n_tokens: int) -> None:
        fired = torch.zeros(self.sae.d_sae, dtype=torch.bool, device=self.device)
        fired[losses.latents.latent] = True
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[self.group.any(fired)] = 0
        if isinstance(self.sae, BatchTopKSAE):
            threshold = losses.smallest_kept
            if self.step > 0:
                threshold = 0.9 * float(self.sae.threshold) + 0.1 * threshold
            self.sae.threshold.fill_(threshold)
            self._smallest_kept = losses.smallest_kept

    def _dead(self) -> Bool[Tensor, " d_sae"]:
        limit = self.config.dead_threshold_tokens
        if limit is None:
            tokens_per_step = self.n_tokens / self.step if self.step else 0
            limit = min(10_000_000, int(0.2 * self.n_steps * tokens_per_step))
        return self.tokens_since_fired >= max(limit, 1)

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def _checked(self, batch: Float[Tensor, "batch width"]) -> Float[Tensor, "batch d_in"]:
        """The batch on the device in float32 and scaled. Raises: ValueError if it cannot be trained on."""
        if batch.ndim != 2 or batch.shape[1] != self.sae.d_in or len(batch) == 0:
            raise ValueError(
                f"A batch must have shape (batch, d_in={self.sae.d_in}) and at least one row, got {tuple(batch.shape)} "
                f"at step {self.step}. Check the hook that the activations come from."
            )
        x = batch.to(self.device, torch.float32)
        if not bool(torch.isfinite(x.sum())):
            n_bad = int((~torch.isfinite(x)).any(dim=1).sum())
            raise ValueError(
                f"A batch must hold finite numbers, got {n_bad} of {len(x)} rows with NaN or infinity at step "
                f"{self.step}. The weights were left as they were; look for the shard that these rows come from."
            )
        return x * self.input_scale if self.input_scale != 1.0 else x

    def _mean(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " d_in"]:
        sums = self.group.sum(
            torch.cat([x.sum(dim=0, dtype=torch.float64), x.new_tensor([len(x)], dtype=torch.float64)])
        )
        return (sums[:-1] / sums[-1]).to(x.dtype)

    def _geometric_median(self, x: Float[Tensor, "batch d_in"], n_iterations: int = 30) -> Float[Tensor, " d_in"]:
        """The point with the least summed distance to the rows, by Weiszfeld's iteration from the mean."""
        centre = self._mean(x)
        for _ in range(n_iterations):
            weight = 1 / (x - centre).norm(dim=1, keepdim=True).clamp_min(1e-6)
            sums = self.group.sum(torch.cat([(weight * x).sum(dim=0), weight.sum(dim=0)]))
            centre = sums[:-1] / sums[-1]
        return centre

    # ---- results and state ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def export(self) -> SAE:
        """A new SAE on the CPU that maps raw activations: the input scale s is folded in exactly.

            relu((s·x − b_dec) @ W_enc + b_enc) / s = relu((x − b_dec / s) @ W_enc + b_enc / s)

        so the biases and the threshold are divided by s, and the decoder keeps its unit-norm rows.
        """
        sae = empty(self.sae.config)
        sae.load_state_dict(self.sae.state_dict())
        for name, tensor in sae.state_dict().items():
            if name in ("b_enc", "b_dec", "threshold"):
                tensor.div_(self.input_scale)
        return sae

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, flat: tensors, and plain JSON values. Tensors are not copies."""
        state: dict[str, Any] = {
            "step": self.step,
            "n_steps": self.n_steps,
            "n_tokens": self.n_tokens,
            "initialised": self.initialised,
            "input_scale": self.input_scale,
            "smallest_kept": self._smallest_kept,
            "sae_config": asdict(self.sae.config),
            "trainer_config": asdict(self.config),
            "tokens_since_fired": self.tokens_since_fired,
        }
        state |= {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            state |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Keys that others added are ignored.

        Raises: ValueError if the state belongs to another SAE, trainer configuration, length or scale, listing what
            differs.
        """
        expected = {
            "n_steps": self.n_steps,
            "input_scale": self.input_scale,
            "sae_config": asdict(self.sae.config),
            "trainer_config": asdict(self.config) | {"betas": list(self.config.betas)},
        }
        found = {key: state.get(key) for key in expected}
        if isinstance(found["trainer_config"], Mapping):
            found["trainer_config"] = dict(found["trainer_config"]) | {"betas": list(found["trainer_config"]["betas"])}
        differs = [
            f"{key}: saved {found[key]!r}, now {expected[key]!r}" for key in expected if found[key] != expected[key]
        ]
        if differs:
            raise ValueError(
                "The saved state must come from the same run settings. "
                + "; ".join(differs)
                + ". Restore them or start afresh."
            )
        for name, tensor in self.sae.state_dict().items():
            tensor.copy_(state[f"sae.{name}"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.step, self.n_tokens = int(state["step"]), int(state["n_tokens"])
        self.initialised, self._smallest_kept = bool(state["initialised"]), float(state["smallest_kept"])
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            saved = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {
                key: torch.empty_like(parameter).copy_(value) if key != "step" else value.clone()
                for key, value in saved.items()
            }
