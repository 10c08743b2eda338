"""What an audit looks at: the examples as arrays, and what each audited dictionary makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.audit.examples import Example
from pipelines.audit.splits import Split


@dataclass(frozen=True, kw_only=True)
class View:
    """One dictionary's reading of every example, a row each, in their order.

    Only `scores` is needed. Without the others, what is computed from them is left out.
    """

    identity: Mapping[str, Any]
    """What identifies the dictionary, JSON values: `name`, unique among the views, `hook`, `weights_sha256`, …"""
    scores: Float[np.ndarray, "n_texts d_sae"]
    """Largest activation of each latent over the counted tokens."""
    dense: Float[np.ndarray, "n_texts d_in"] | None = None
    """Mean activation of the model over the counted tokens."""
    mean_latents: Float[np.ndarray, "n_texts d_sae"] | None = None
    reconstruction: Float[np.ndarray, "n_texts d_out"] | None = None
    """Mean of what the dictionary makes of the activations."""
    error: Float[np.ndarray, "n_texts d_out"] | None = None
    """Mean of what it misses."""
    random: Float[np.ndarray, "n_texts d_random"] | None = None
    """As `scores`, of a dictionary of random directions that is as wide and as active."""
    corpus: Float[np.ndarray, "n_documents d_sae"] | None = None
    """`scores` of ordinary documents."""
    directions: Float[np.ndarray, "d_sae d_out"] | None = None
    """Rows of the decoder."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Label of a latent, where there is one."""

    @property
    def name(self) -> str:
        """Name of the dictionary."""
        return str(self.identity.get("name", "main"))

    @property
    def hook(self) -> str:
        """Where it reads."""
        return str(self.identity.get("hook", ""))

    def take(self, rows: Sequence[int]) -> "View":
        """Some of the examples."""
        arrays = ("scores", "dense", "mean_latents", "reconstruction", "error", "random")
        index = np.asarray(rows, dtype=np.int64)
        return replace(self, **{name: a[index] for name in arrays if (a := getattr(self, name)) is not None})

    def problems(self, n_examples: int) -> list[str]:
        """What does not fit the examples or each other."""
        told = []
        for name in ("scores", "dense", "mean_latents", "reconstruction", "error", "random"):
            array = getattr(self, name)
            if array is not None and (array.ndim != 2 or array.shape[0] != n_examples):
                told.append(f"{name} has shape {array.shape}")
            elif array is not None and not np.isfinite(array).all():
                told.append(f"{name} holds values that are not finite")
        if self.corpus is not None and (self.corpus.ndim != 2 or self.corpus.shape[1] != self.scores.shape[-1]):
            told.append(f"corpus has shape {self.corpus.shape} for scores {self.scores.shape}")
        return told


def check_views(views: Sequence[View], n_examples: int) -> None:
    """Refuse views that do not fit the examples.

    Raises:
        ValueError: all that is wrong, by view.
    """
    names = [view.name for view in views]
    problems = [f"{view.name}: {problem}" for view in views for problem in view.problems(n_examples)]
    problems += [f"two dictionaries are named {name}" for name in sorted(set(names)) if names.count(name) > 1]
    if not views:
        problems.append("there is no dictionary")
    if problems:
        raise ValueError(
            f"every array needs one row per example ({n_examples}), corpus one column per latent; "
            f"{'; '.join(problems)}. Encode the examples in their order."
        )


class Spot(NamedTuple):
    """A latent of one of the views."""

    view: int
    latent: int


@dataclass(frozen=True)
class Texts:
    """The examples as arrays, and the parts that they are split into."""

    examples: Sequence[Example]
    split: Split
    positive: Bool[np.ndarray, " n_texts"]
    hard: Bool[np.ndarray, " n_texts"]
    """Hard negatives."""
    groups: Int[np.ndarray, " n_texts"]

    @classmethod
    def of(cls, examples: Sequence[Example], split: Split) -> "Texts":
        """From examples in their order."""
        return cls(
            examples=examples,
            split=split,
            positive=np.array([e.positive for e in examples]),
            hard=np.array([e.role == "hard_negative" for e in examples]),
            groups=np.unique([e.group for e in examples], return_inverse=True)[1],
        )

    @property
    def fit(self) -> Int[np.ndarray, " n_fit"]:
        """Rows that probes are fitted on: discover and tune."""
        return np.concatenate([self.split.discover, self.split.tune])

    @property
    def against_hard(self) -> Int[np.ndarray, " n"]:
        """Positives and hard negatives of the confirm part; empty if it holds no two groups of hard negatives."""
        c = self.split.confirm
        if np.unique(self.groups[c[self.hard[c]]]).size < 2:
            return c[:0]
        return np.asarray(c[self.positive[c] | self.hard[c]])

    @property
    def ood(self) -> Int[np.ndarray, " n"]:
        """Out-of-distribution rows; empty if either class has fewer than two groups there."""
        rows = self.split.ood
        n_groups = [np.unique(self.groups[rows[self.positive[rows] == side]]).size for side in (True, False)]
        return rows if min(n_groups) >= 2 else np.empty(0, dtype=np.int64)

    def groups_of(self, rows: Int[np.ndarray, " n"]) -> tuple[int, int]:
        """Groups of positives and of negatives among some rows."""
        sides = (rows[self.positive[rows]], rows[~self.positive[rows]])
        return np.unique(self.groups[sides[0]]).size, np.unique(self.groups[sides[1]]).size


def joint_scores(views: Sequence[View]) -> Float[np.ndarray, "n_texts d_all"]:
    """The scores of all latents of all views, side by side."""
    return views[0].scores if len(views) == 1 else np.concatenate([view.scores for view in views], axis=1)


def spots_of(views: Sequence[View], columns: Int[np.ndarray, " n"]) -> list[Spot]:
    """Which latents the columns of `joint_scores` are."""
    ends = np.cumsum([view.scores.shape[1] for view in views])
    owner = np.searchsorted(ends, columns, side="right")
    starts = np.concatenate([[0], ends])
    return [Spot(int(v), int(c - starts[v])) for v, c in zip(owner, columns, strict=True)]
