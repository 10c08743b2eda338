"""Trainer: batches of activations in, a trained SAE out. Knows tensors, never files or language models.

    trainer = Trainer(build(BatchTopKConfig(d_in=576, d_sae=4608, k=32), seed=0), TrainerConfig(), n_steps=225)
    trainer.fit(batches)
    sae = trainer.export()

One step, read from top to bottom: `fit` → `_step` → the architecture's `objective` → `Optimizer.update`. The same code
trains every architecture, on one process and on several (`sae.parallel`); several processes with a share of each batch
or of the latents take the step that one process takes with all of it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import empty
from sae.base import SAE
from sae.features import own_part, require_splittable, split_latents, whole_state
from sae.kernels.select import multiplies_bf16
from sae.normalise import Normaliser
from sae.objective import StepContext, StepLosses
from sae.optim import Optimizer, schedule
from sae.parallel import Layout, LayoutName
from sae.threshold import thresholded

Batch = Float[Tensor, "_ _"] | Sequence[Float[Tensor, "_ _"]]
"""One tensor (tokens, d_in), or one for each of `SAE.batch_widths`, rows of the same tokens."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How an SAE is trained; what it is lives in its own configuration."""

    lr: float | None = None
    """Peak learning rate of Adam; None takes the architecture's."""

    betas: tuple[float, float] | None = None
    """Adam's decay rates of the first and second moments; None takes the architecture's."""

    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises linearly to its peak."""

    decay_fraction: float = 0.3
    """Share of the steps, at the end, in which it falls linearly towards zero."""

    auxk_alpha: float = 1 / 32
    """Weight of the loss that revives dead latents, in the architectures that select k of them; 0 turns it off."""

    k_aux: int | None = None
    """Dead latents used per token in that loss; None means d_in // 2."""

    dead_threshold_tokens: int | None = None
    """A latent silent for this many tokens counts as dead; None means 20 % of the run, at most 10 million."""

    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; None turns clipping off."""

    autocast_bf16: bool | None = None
    """Find the candidates of a selection in bfloat16. Their values and all gradients stay float32. None means where the
    hardware multiplies bfloat16 faster: AMX, tensor cores."""

    def __post_init__(self) -> None:
        wrong = []
        if self.lr is not None and not self.lr > 0:
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
    """Latents silent for `dead_after_tokens`."""
    dead_after_tokens: int
    """`TrainerConfig.dead_threshold_tokens`, or what stands for it."""
    lr: float
    n_tokens: int
    """Tokens trained on since the start of the run."""


class DivergedError(ValueError):
    """The loss is not finite although the batch is: the weights have gone astray; go back to a checkpoint."""


class StopTraining(Exception):
    """Raised by an `on_step` callback to end `fit` cleanly after the current step."""


class Trainer:
    """Trains an SAE of any architecture with Adam.

    Args:
        sae: trained in place, in the units of the normalised activations; `export` returns the one to use. Under the
            layout "features" it keeps this process's latents only.
        n_steps: length of the whole run, which the schedule needs.
        device: where the SAE and the batches are moved.
        normalisers: one for each tensor of a batch, by default the identity; `export` folds them away. Adam moves every
            parameter by about `lr` per step, so a scale sets how fast the biases move relative to the data.
        layout: what each process has of the default torch.distributed group, where there is one: rows of the batch
            ("data") or latents ("features"); see `sae.parallel`.
    Raises:
        ValueError: if the normalisers do not fit the batches, or the layout the architecture.
    """

    def __init__(
        self,
        sae: SAE,
        config: TrainerConfig,
        n_steps: int,
        *,
        device: torch.device | str = "cpu",
        normalisers: Sequence[Normaliser] | None = None,
        layout: LayoutName = "data",
    ) -> None:
        if n_steps < 1:
            raise ValueError(f"`n_steps` must be at least 1, got {n_steps}. Give the length of the whole run.")
        self.device = torch.device(device)
        normalisers = [Normaliser.none(width) for width in sae.batch_widths] if normalisers is None else normalisers
        _check_normalisers(sae, normalisers)
        self.layout = Layout.of(layout)
        if layout == "features":
            require_splittable(sae.config, self.layout.latents.world_size)
        self.sae = sae.to(device)
        self.config = config
        self.n_steps = n_steps
        self.normalisers = tuple(normaliser.to(self.device) for normaliser in normalisers)
        self._applied = [None if normaliser.is_identity else normaliser for normaliser in self.normalisers]
        self.group = self.layout.rows
        for group in self.layout:
            group.broadcast(list(self.sae.state_dict().values()))
        if self.layout.latents.world_size > 1:
            split_latents(self.sae, self.layout.latents)
        self._peak_lr = self.sae.adam_lr if config.lr is None else config.lr
        self.optimizer = Optimizer(self.sae, self.layout, self._peak_lr, config.betas, config.grad_clip)
        self.step = 0
        self.n_tokens = 0
        self.tokens_since_fired = torch.zeros(len(self.sae.b_enc), dtype=torch.int64, device=self.device)
        """Of this process's latents."""
        self.initialised = False
        self._batch_compared = False
        self._smallest_kept = 0.0

    # ---- the loop -------------------------------------------------------------------------------------------------

    def initialise(self, batch: Batch, centre: Literal["mean", "geometric_median"] = "geometric_median") -> None:
        """Set the biases to the centre of `batch`, so that the latents need not learn it.

        Several processes pass each what they pass to `fit`; the centre is that of all of it. The geometric median (Gao
        et al. 2024, arXiv:2406.04093, appendix A.1) heeds outliers less than the mean.
        """
        x, target = self.sae.input_and_target(self._checked(batch))
        find = self._mean if centre == "mean" else self._geometric_median
        target_centre = find(target)
        self.sae.start_at(target_centre if x is target else find(x), target_centre)
        self.initialised = True

    def fit(self, batches: Iterable[Batch], on_step: Callable[[StepMetrics], bool | None] | None = None) -> None:
        """Train from the current step to `n_steps`. The first batch of a run sets `b_dec` unless `initialise` did.

        Args:
            batches: this process's rows of each global batch, any float dtype; under the layout "features" all rows, in
                every process. Not modified.
            on_step: called after each step; returning False or raising StopTraining ends the run after that step.
        Raises:
            ValueError: if a batch has the wrong width, mixed dtypes, NaN or infinity or no variance, before the weights
                change; if the processes must all have the first batch and do not; or if `batches` ends early.
            DivergedError: if the loss is not finite; the weights are those after the step before.
        """
        if self.step >= self.n_steps:
            return
        for batch in batches:
            if not self.initialised:
                self.initialise(batch)
            x, target = self.sae.input_and_target(self._checked(batch))
            if self.layout.latents.world_size > 1 and not self._batch_compared:
                self._require_same(x)
            metrics = self._step(x, target)
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

    def _step(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]) -> StepMetrics:
        config = self.config
        variance, n_tokens = self.group.total_variance(target)
        dead_after = self.dead_threshold_tokens
        dead = self.tokens_since_fired >= dead_after
        n_dead = self.layout.latents.sum_int(int(dead.sum()))
        context = StepContext(
            group=self.group,
            n_tokens=n_tokens,
            variance=variance,
            dead=dead,
            step=self.step,
            n_steps=self.n_steps,
            smallest_kept=self._smallest_kept,
            auxk_alpha=config.auxk_alpha,
            k_aux=config.k_aux or self.sae.d_in // 2,
            bf16=multiplies_bf16(self.device) if config.autocast_bf16 is None else config.autocast_bf16,
            any_dead=n_dead > 0,
            latents=self.layout.latents,
        )
        losses = self.sae.objective(x, target, context)
        n_active = self.layout.latents.sum(losses.n_active).to(losses.total.dtype)
        totals = _Reading(
            self.group.sum(torch.stack([losses.total.detach(), losses.reconstruction.detach(), n_active]))
        )
        lr = self._peak_lr * schedule(self.step, self.n_steps, config.warmup_fraction, config.decay_fraction)
        self.optimizer.update(losses.total, lr, lambda: self._check_finite(totals.read()[0], variance, n_tokens))
        loss, batch_fvu, total_active = totals.read()
        self._count(losses, n_tokens)
        self.step += 1
        self.n_tokens += n_tokens
        return StepMetrics(self.step, loss, batch_fvu, total_active / n_tokens, n_dead, dead_after, lr, self.n_tokens)

    def _check_finite(self, loss: float, variance: Float[Tensor, ""], n_tokens: int) -> None:
        """Refuse a loss that is NaN or infinite, before the weights change."""
        if loss == loss and abs(loss) != float("inf"):
            return
        if float(variance) == 0:
            raise ValueError(
                f"A batch must hold at least two different rows, got {n_tokens} of variance 0 at step {self.step}. "
                "The weights were left as they were; take larger batches, or look for constant activations."
            )
        raise DivergedError(
            f"The loss must be finite, got {loss} at step {self.step} (batch variance {float(variance):.4g}). "
            "The weights were left as they were; lower `lr`, or normalise the inputs."
        )

    # ---- dead latents and the inference threshold -----------------------------------------------------------------

    def _count(self, losses: StepLosses, n_tokens: int) -> None:
        self.tokens_since_fired += n_tokens
        self.tokens_since_fired[self.group.any(losses.fired)] = 0
        if (sae := thresholded(self.sae)) is not None:
            sae.follow_threshold(losses.smallest_kept, self.step)
        self._smallest_kept = losses.smallest_kept

    @property
    def dead_threshold_tokens(self) -> int:
        """Tokens of silence after which a latent counts as dead: as configured, or 20 % of the run, at most 10 M."""
        if self.config.dead_threshold_tokens is not None:
            return self.config.dead_threshold_tokens
        tokens_per_step = self.n_tokens / self.step if self.step else 0
        return max(1, min(10_000_000, int(0.2 * self.n_steps * tokens_per_step)))

    # ---- inputs ---------------------------------------------------------------------------------------------------

    def _checked(self, batch: Batch) -> list[Float[Tensor, "batch _"]]:
        """The tensors of a batch on the device, in float32, normalised. Raises: ValueError if they cannot be used."""
        tensors = [batch] if isinstance(batch, Tensor) else list(batch)
        _check_batch(tensors, self.sae.batch_widths, self.step)
        checked = []
        for tensor, normaliser in zip(tensors, self._applied, strict=True):
            x = tensor.to(self.device, torch.float32)
            if not bool(torch.isfinite(x.sum())):
                n_bad = int((~torch.isfinite(x)).any(dim=1).sum())  # 0 when finite numbers add up to infinity
                raise ValueError(
                    f"A batch must hold finite numbers of a finite sum, got {n_bad} of {len(x)} rows with NaN or "
                    f"infinity at step {self.step}. The weights were left as they were; look for the shard that these "
                    "rows come from."
                )
            checked.append(x if normaliser is None else normaliser.apply(x))
        return checked

    def _require_same(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Refuse, in every process, a first batch that is not the same everywhere: easily passed by mistake."""
        sums = torch.stack([x.sum(dtype=torch.float64), x.new_tensor(len(x), dtype=torch.float64)])
        everywhere = torch.stack(self.layout.latents.gather(sums)).tolist()
        if any(other != everywhere[0] for other in everywhere):
            raise ValueError(
                "Under the layout 'features' every process must be given the whole batch, got batches of "
                f"{', '.join(str(int(n)) for _, n in everywhere)} rows with sums "
                f"{', '.join(f'{total:.6g}' for total, _ in everywhere)}. Read all rows in each of them."
            )
        self._batch_compared = True

    def _mean(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, " width"]:
        sums = self.group.sum(
            torch.cat([x.sum(dim=0, dtype=torch.float64), x.new_tensor([len(x)], dtype=torch.float64)])
        )
        return (sums[:-1] / sums[-1]).to(x.dtype)

    def _geometric_median(self, x: Float[Tensor, "batch width"], n_iterations: int = 30) -> Float[Tensor, " width"]:
        """The point with the least summed distance to the rows, by Weiszfeld's iteration from the mean."""
        centre = self._mean(x)
        for _ in range(n_iterations):
            weight = 1 / (x - centre).norm(dim=1, keepdim=True).clamp_min(1e-6)
            sums = self.group.sum(torch.cat([(weight * x).sum(dim=0), weight.sum(dim=0)]))
            centre = sums[:-1] / sums[-1]
        return centre

    # ---- results and state ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def whole(self) -> SAE:
        """The SAE in training with all its latents, in the units of the normalised activations; not a copy.

        Under the layout "features" every process must call it, and gets a copy put together from all of them.
        """
        latents = self.layout.latents
        if latents.world_size == 1:
            return self.sae
        state = whole_state({f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}, latents)
        sae = empty(self.sae.config)
        if latents.rank == 0:
            sae.load_state_dict({name.removeprefix("sae."): tensor for name, tensor in state.items()})
        sae = sae.to(self.device)
        latents.broadcast(list(sae.state_dict().values()))
        return sae

    def export(self) -> SAE:
        """A new SAE on the CPU that maps raw activations: the normalisation is folded in exactly (`SAE.fold`).

        Under the layout "features" every process must call it, and gets all latents.
        """
        return folded(self.whole(), self.normalisers)

    def _settings(self) -> dict[str, Any]:
        """What a saved state must agree with, as JSON values."""
        settings = {
            "n_steps": self.n_steps,
            "sae_config": asdict(self.sae.config),
            "trainer_config": asdict(self.config),
            "normaliser_scales": [float(normaliser.scale) for normaliser in self.normalisers],
        }
        return dict(json.loads(json.dumps(settings)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, flat: tensors, and plain JSON values. Tensors are not copies.

        It does not depend on layout and number of processes. Under the layout "features" every process must call it;
        the first gets the state, the others nothing.
        """
        state: dict[str, Any] = {
            "step": self.step,
            "n_tokens": self.n_tokens,
            "initialised": self.initialised,
            "smallest_kept": self._smallest_kept,
            "tokens_since_fired": self.tokens_since_fired,
        }
        state |= self._settings()
        state |= {f"normaliser_shift.{i}": normaliser.shift for i, normaliser in enumerate(self.normalisers)}
        state |= {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        return whole_state(state | self.optimizer.state_dict(), self.layout.latents)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, under any layout. Keys that others added are ignored.

        Raises: ValueError if the state belongs to another SAE, trainer configuration, length or normalisation, listing
            what differs.
        """
        expected = self._settings()
        differs = [
            f"{key}: saved {state.get(key)!r}, now {value!r}"
            for key, value in expected.items()
            if state.get(key) != value
        ]
        differs += [
            f"normaliser_shift.{i}: the saved values are others"
            for i, normaliser in enumerate(self.normalisers)
            if not torch.equal(normaliser.shift.cpu(), state.get(f"normaliser_shift.{i}", torch.empty(0)).cpu())
        ]
        if differs:
            raise ValueError(
                "The saved state must come from the same run settings. "
                + "; ".join(differs)
                + ". Restore them or start afresh."
            )
        for name, tensor in self.sae.state_dict().items():
            tensor.copy_(own_part(name, state[f"sae.{name}"], self.layout.latents))
        self.tokens_since_fired.copy_(own_part("tokens_since_fired", state["tokens_since_fired"], self.layout.latents))
        self.step, self.n_tokens = int(state["step"]), int(state["n_tokens"])
        self.initialised, self._smallest_kept = bool(state["initialised"]), float(state["smallest_kept"])
        self.optimizer.load_state_dict(state)


@torch.no_grad()
def folded(sae: SAE, normalisers: Sequence[Normaliser]) -> SAE:
    """A copy on the CPU that maps raw activations, of an SAE of normalised ones."""
    copy = empty(sae.config)
    copy.load_state_dict(sae.state_dict())
    on_cpu = [normaliser.to(torch.device("cpu")) for normaliser in normalisers]
    if not all(normaliser.is_identity for normaliser in on_cpu):
        copy.fold(on_cpu)
    return copy


class _Reading:
    """Numbers on their way to the host: `read` waits for them, not for what the device was given to do after them."""

    def __init__(self, numbers: Float[Tensor, " n"]) -> None:
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = on_host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(number) for number in self._numbers.tolist()]


def _check_batch(tensors: Sequence[Tensor], widths: Sequence[int], step: int) -> None:
    """Refuse a batch that does not fit the SAE, before any of it is used."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    fits = [tensor.ndim == 2 and tensor.shape[1] == width for tensor, width in zip(tensors, widths, strict=False)]
    n_rows = {shape[0] for shape in shapes if shape}
    if len(tensors) != len(widths) or not all(fits) or len(n_rows) != 1 or n_rows == {0}:
        wanted = ", ".join(f"(batch, {width})" for width in widths)
        raise ValueError(
            f"A batch must have shape {wanted} and at least one row, got {', '.join(map(str, shapes))} at step {step}. "
            "Check the hook that the activations come from."
        )
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError(
            f"The tensors of a batch must share one float dtype, got {', '.join(sorted(map(str, dtypes)))} at step "
            f"{step}. Convert them before training."
        )


def _check_normalisers(sae: SAE, normalisers: Sequence[Normaliser]) -> None:
    widths = tuple(len(normaliser.shift) for normaliser in normalisers)
    if widths != sae.batch_widths:
        raise ValueError(
            f"`normalisers` must have the widths {sae.batch_widths} of a batch's tensors, got {widths}. "
            "Fit one to a sample of each."
        )
    if not all(float(normaliser.scale) > 0 for normaliser in normalisers):
        scales = [float(normaliser.scale) for normaliser in normalisers]
        raise ValueError(f"The scales of `normalisers` must be positive, got {scales}. Use 1.0 for no scaling.")
