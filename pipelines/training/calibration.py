"""Activations that a dictionary is fitted to besides its batches: its start, its scale, its inference threshold."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.config import SinkConfig
from pipelines.dictionaries import saelens_metadata
from pipelines.selection import Selection, kept, selected
from sae import SAE, Dictionary
from sae.threshold import thresholded
from storage import ActivationStore

CALIBRATION_TOKENS = 2**17
"""Tokens behind the inference threshold; a sixteenth of them is behind b_dec's start and the input scale."""


def calibration_batches(
    store: ActivationStore, hooks: tuple[str, ...], sinks: SinkConfig, selection: Selection, n_tokens: int
) -> Iterator[tuple[Float[Tensor, "batch _"], ...]]:
    """Activations of all hooks at about `n_tokens` tokens that training may use, in store order, which is shuffled."""
    start, stop = store.retained_range("train")
    step = max(1, 4096 // store.spec.context_length)
    found = 0
    for low in range(start, stop, step):
        high = min(low + step, stop)
        if found >= n_tokens:
            return
        chosen = selected(store, low, high, selection)
        found += int(chosen.sum())  # sinks too: contexts are read as whole as they are without a selection
        if not sinks.train_on_them:
            chosen = kept(store, hooks[0], low, high, sinks.multiple, selection)
        rows = torch.from_numpy(chosen)
        yield tuple(store.activations(hook, low, high).float()[rows] for hook in hooks)


def starting_sample(
    store: ActivationStore, hooks: tuple[str, ...], sinks: SinkConfig, selection: Selection
) -> list[Float[Tensor, "n_tokens _"]]:
    """The rows behind b_dec's start and the input scale, of each hook; the same on every rank.

    Raises:
        ValueError: training may use no token of the store.
    """
    parts = list(calibration_batches(store, hooks, sinks, selection, CALIBRATION_TOKENS // 16))
    if not sum(len(part[0]) for part in parts):
        raise ValueError(
            f"Training needs tokens that are selected and no sinks, got none in the {store.spec.n_train_contexts} "
            f"training contexts of {store.path} at {hooks[0]}. Collect more, or correct train.select and sinks."
        )
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def write_trained(
    sae: SAE,
    folder: str | Path,
    *,
    store: ActivationStore,
    hooks: tuple[str, ...],
    sinks: SinkConfig,
    selection: Selection,
    provenance: Mapping[str, Any],
) -> None:
    """Calibrate the inference threshold of a folded SAE, in place, and write its dictionary."""
    if (selecting := thresholded(sae)) is not None:
        selecting.calibrate_threshold(
            sae.input_and_target(batch)[0]
            for batch in calibration_batches(store, hooks, sinks, selection, CALIBRATION_TOKENS)
        )
    Dictionary(sae, hook_names=hooks, metadata=saelens_metadata(dict(provenance))).save(
        folder, provenance=provenance, overwrite=True
    )
