"""One SAE of a training job: its trainer, its checkpoints and its figures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.architectures import sae_config
from pipelines.training.calibration import write_trained
from pipelines.training.job import MemberJob, TrainJob
from pipelines.training.metrics import METRICS_FILE, MetricsFile
from pipelines.training.trackers import Trackers
from pipelines.training.warm_start import start_from
from sae import SAE, Dictionary, Normaliser, StepMetrics, Trainer, TrainerConfig, build
from sae.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sae.normalise import fit_normaliser
from sae.trainer import DivergedError
from storage import ActivationStore

Evaluate = Callable[[SAE, Sequence[Normaliser]], dict[str, Any]]
"""Held-out figures of an SAE of normalised activations."""


class Member:
    """Trains one SAE, from its last checkpoint on.

    Ranks that train it together, as the job's layout says, have one each and call the same methods.

    Args:
        sample: `starting_sample` of its hooks.
        writes: whether this rank writes its files.
        evaluate: asked where it is given, every `TrainJob.evaluate_every` steps.
    """

    def __init__(
        self,
        own: MemberJob,
        job: TrainJob,
        store: ActivationStore,
        sample: Sequence[Float[Tensor, "n_tokens _"]],
        *,
        evaluate: Evaluate | None = None,
        writes: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        train = job.config
        self.job = own
        self.failure: str | None = None
        """Why it was stopped, and where it can go on from."""
        self._whole = job
        self._store = store
        self._evaluate = evaluate
        self._writes = writes
        self._checkpoints = Path(own.checkpoints)
        sae = build(sae_config(own.spec, [store.spec.hook(hook).d_in for hook in own.hooks]), seed=own.seed)
        normalisers = [fit_normaliser(part, train.normalize) for part in sample]
        found = latest_checkpoint(self._checkpoints)
        if found is None and own.init_from is not None:
            start_from(sae, Dictionary.load(own.init_from), normalisers)
        self.trainer = Trainer(
            sae,
            TrainerConfig(
                lr=train.lr,
                warmup_fraction=train.warmup_fraction,
                decay_fraction=train.decay_fraction,
                auxk_alpha=train.auxk_alpha,
            ),
            job.n_steps,
            device=device,
            normalisers=normalisers,
            layout="alone" if train.layout == "saes" else train.layout,
        )
        if found is not None:
            self.trainer.load_state_dict(load_checkpoint(found))
        elif own.init_from is not None:
            self.trainer.initialised = True
        else:
            self.trainer.initialise(sample)
        self._metrics = MetricsFile(self._checkpoints / METRICS_FILE, self.step) if self._writes else None
        self._trackers = Trackers(
            train.trackers if self._writes else (),
            self._checkpoints,
            title=own.title,
            settings=_settings(own, job),
            step=self.step,
        )

    @property
    def step(self) -> int:
        """Steps finished."""
        return self.trainer.step

    def train_on(self, batch: Sequence[Float[Tensor, "batch _"]], same_context: float) -> None:
        """One step.

        Args:
            same_context: `expected_same_context` of the batch, for the record.
        Raises: as `Trainer.fit`.
        """
        taken: list[StepMetrics] = []

        def on_step(metrics: StepMetrics) -> bool:
            taken.append(metrics)
            return False

        self.trainer.fit([batch], on_step)
        heldout = self._heldout()
        if self._metrics is not None:
            (metrics,) = taken
            figures = {**metrics._asdict(), "expected_same_context": round(same_context, 3)}
            figures |= heldout
            self._metrics.write(figures)
            self._trackers.log(figures)

    def _heldout(self) -> dict[str, Any]:
        """Held-out figures, if this step is one for them: each `evaluate_every`-th, and the last."""
        every = self._whole.evaluate_every
        if not every or (self.step % every and self.step != self._whole.n_steps):
            return {}
        sae = self.trainer.whole()  # on every rank, since each may have a part of it
        return {} if self._evaluate is None else self._evaluate(sae, self.trainer.normalisers)

    def save(self) -> None:
        """Write a checkpoint. Every rank calls it, since each may have a part of the state."""
        state = self.trainer.state_dict()
        if self._writes:
            save_checkpoint(self._checkpoints, self.step, state, keep=self._whole.config.checkpoints_kept)

    def stop(self, error: DivergedError) -> None:
        """Train no further: the weights have gone astray, and are not saved."""
        self.failure = f"{error} {self.last_good()}"

    def last_good(self) -> str:
        """Where training can go on from, as a sentence."""
        found = latest_checkpoint(self._checkpoints)
        return "No checkpoint was saved yet." if found is None else f"The last good checkpoint is {found}."

    def finish(self) -> None:
        """Calibrate the inference threshold and write the trained dictionary. Every rank calls it, as `save`."""
        sae = self.trainer.export()
        if not self._writes:
            return
        write_trained(
            sae,
            self.job.output,
            store=self._store,
            hooks=self.job.hooks,
            sinks=self._whole.sinks,
            selection=self._whole.selection,
            provenance=self.job.provenance,
        )

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()
        self._trackers.close()


def _settings(own: MemberJob, job: TrainJob) -> dict[str, Any]:
    """What a tracker records of a run: flat, JSON values."""
    spec = own.spec.model_dump(mode="json", exclude_none=True)
    train = job.config.model_dump(mode="json", exclude_none=True, exclude={"trackers", "select", "init_from"})
    known = ("model_name", "hook_name", "store_fingerprint")
    return {**train, **spec, "seed": own.seed, **{key: own.provenance.get(key) for key in known}}
