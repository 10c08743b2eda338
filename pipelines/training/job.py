"""What a training worker is told: plain values and paths, so that it can be sent to another process."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.config import ModelConfig, SAESpec, SinkConfig, TrainConfig
from pipelines.selection import Selection


@dataclass(frozen=True)
class MemberJob:
    """One SAE of a job."""

    name: str
    title: str
    """RUN/NAME, for trackers."""
    hooks: tuple[str, ...]
    """`RunConfig.hooks_of`; the first says which tokens are sinks."""
    spec: SAESpec
    seed: int
    """Of the initial weights."""
    checkpoints: str
    output: str
    provenance: dict[str, Any]
    init_from: str | None = None
    """Dictionary that gives the initial weights."""


@dataclass(frozen=True)
class TrainJob:
    """SAEs that are trained together, on the same batches."""

    store: str
    members: tuple[MemberJob, ...]
    config: TrainConfig
    sinks: SinkConfig
    seed: int
    """Of the order of the data."""
    n_threads: int
    selection: Selection = field(default_factory=dict)
    """Tokens to train on, as codes of the store's tables."""
    consumer: str | None = None
    """Name in the ring that the store is, if training goes on while it is filled."""
    capacity: int = 0
    """Shards that the ring may have on disk."""
    evaluate_every: int = 0
    """Steps between held-out figures; 0 for none."""
    model: ModelConfig | None = None
    """The language model, for held-out CE and KL scores; None for none."""
    failure: str | None = None
    """File that says why no more shards will come, once it exists."""

    @property
    def n_steps(self) -> int:
        """Length of the run."""
        return self.config.n_tokens // self.config.batch_size
