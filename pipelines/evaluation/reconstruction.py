"""The pass over the held-out split: each activation is read once, and every dictionary of its hook is asked about it.

FVU, MSE, cosine, norms, L0, density and silent latents come from here. What else wants to see tokens and latents
together (pools for probes, windows for input scores) watches the same pass.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dictionaries import stored_input, stored_target
from pipelines.errors import RunError
from pipelines.evaluation.intervals import MAX_UNITS, Resampling, Z, mean_interval, unit_of
from pipelines.evaluation.record import Figure
from pipelines.progress import Bar
from pipelines.selection import Selection, kept, selected
from sae import FVU, L0, ActivationFrequency, Dictionary, SparseLatents
from sae.metrics import Reconstruction
from storage import ActivationStore

BLOCK_TOKENS = 4096
"""Tokens that are encoded at once, in whole contexts."""
BLOCK_LATENTS = 2**26
"""Most tokens times latents of a block."""
DENSE = 0.1
"""A latent that fires on a larger share of the tokens is dense."""


class Block(NamedTuple):
    """Tokens of some contexts that are selected and no sinks, and what one dictionary made of them."""

    x: Float[Tensor, "n d_in"]
    latents: SparseLatents
    """Rows are those of `x`."""
    token: Int[Tensor, " n"]
    document: Int[Tensor, " n"]
    place: Int[Tensor, " n"]
    """context * context_length + offset."""


Watcher = Callable[[Block], None]


class _Measured:
    """What is summed up of one dictionary."""

    def __init__(self, dictionary: Dictionary, centre: Tensor) -> None:
        sae = dictionary.sae
        self.fvu, self.fvu_all, self.l0_all = FVU(sae.d_out), FVU(sae.d_out), L0()
        self.frequency = ActivationFrequency(sae.d_sae)
        self.sums, self.sums_all = Reconstruction(centre, MAX_UNITS), Reconstruction(centre, MAX_UNITS)
        self.silent = _Silent(sae.d_sae)

    def figures(self, n_resamples: int, seed: int) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Figures with intervals, and facts."""
        n, n_all, d_sae = int(self.frequency.n_tokens), self.l0_all.n_tokens, len(self.frequency.counts)
        figures: dict[str, Figure] = {}
        for suffix, sums, n_tokens in (("", self.sums, n), ("_all", self.sums_all, n_all)):
            resampling = Resampling(sums.sums[:, 0] > 0, n_resamples, seed)
            drawn = sums.compute(resampling.weights.to(sums.sums.device))
            for name, value in sums.compute().items():
                if not suffix or name in ("fvu", "l0"):
                    figures[name + suffix] = Figure.of(float(value), resampling.interval(drawn[name].cpu()), n_tokens)
        for name, exact in (("fvu", self.fvu), ("fvu_all", self.fvu_all)):
            old = figures[name]
            figures[name] = Figure(exact.compute(), old.low, old.high, old.n)
        figures["density"] = figures["l0"].scaled(1 / d_sae)
        figures["dead_share"] = Figure.of(self.frequency.dead_share(), self.silent.interval(), n)
        dense = (self.frequency.compute() > DENSE).double()
        figures["dense_share"] = Figure.of(float(dense.mean()), mean_interval(dense, n_resamples, seed), n)
        histogram, edges = self.frequency.log10_histogram()
        facts = {
            "n_latents": d_sae,
            "n_heldout_tokens": n,
            "n_heldout_tokens_all": n_all,
            "activation_frequency_log10_edges": [round(float(edge), 6) for edge in edges],
            "activation_frequency_counts": [int(count) for count in histogram],
        }
        return figures, facts


class _Silent:
    """The share of silent latents, and how it would change if a document were left out.

    A bootstrap would leave out a third of the documents and call latents silent that are not; leaving out one document
    silences only the latents that fire in no other (delete-one jackknife, Efron and Tibshirani 1993, eq. 11.5).
    """

    def __init__(self, d_sae: int) -> None:
        self._first = np.full(d_sae, -1, np.int64)  # the unit that a latent fires in; -1 none yet, -2 several
        self._units: set[int] = set()

    def update(self, latent: NDArray[np.int64], unit: NDArray[np.int64], all_units: NDArray[np.int64]) -> None:
        """Add firings, each with its unit, and the units of all tokens."""
        self._units.update(np.unique(all_units).tolist())
        d_sae = len(self._first)
        units, latents = np.divmod(np.unique(unit * d_sae + latent), d_sae)
        n_units = np.bincount(latents, minlength=d_sae)
        self._first[n_units > 1] = -2
        once = n_units[latents] == 1
        latents, units = latents[once], units[once]
        first = self._first[latents]
        self._first[latents] = np.where((first == -1) | (first == units), units, -2)

    def interval(self) -> tuple[float, float] | None:
        n, d_sae = len(self._units), len(self._first)
        if n < 2:
            return None
        share = float((self._first == -1).mean())
        added = np.zeros(n)  # latents that only this unit keeps alive
        counts = np.bincount(self._first[self._first >= 0], minlength=1)
        alone = counts[counts > 0]
        added[: len(alone)] = alone / d_sae
        error = float(np.sqrt((n - 1) / n * np.square(added - added.mean()).sum()))
        return max(0.0, share - Z * error), min(1.0, share + Z * error)


@torch.inference_mode()
def measure(
    store: ActivationStore,
    dictionaries: Mapping[str, Dictionary],
    *,
    sink_multiple: float,
    bar: Bar,
    selection: Selection | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    watchers: Mapping[str, Sequence[Watcher]] | None = None,
) -> dict[str, tuple[dict[str, Figure], dict[str, Any]]]:
    """Figures and facts of every dictionary over the whole held-out split.

    Raises:
        RunError: no token is selected.
    """
    start, stop = store.spec.split_range("heldout")
    measured = {
        name: _Measured(d, torch.from_numpy(centre_of(store, d)).to(d.sae.W_dec.device))
        for name, d in dictionaries.items()
    }
    widest = max(d.d_sae for d in dictionaries.values())
    length = store.spec.context_length
    step = max(1, min(BLOCK_TOKENS, BLOCK_LATENTS // widest) // length)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        chosen = torch.from_numpy(selected(store, low, high, selection)).flatten()
        contexts = store.contexts(low, high)
        document = torch.from_numpy(np.asarray(contexts.document)).flatten().long()[chosen]
        token = torch.from_numpy(np.asarray(contexts.tokens)).flatten().long()[chosen]
        place = (torch.arange(low * length, high * length))[chosen]
        read: dict[tuple[str, ...], Tensor] = {}
        for name, dictionary in dictionaries.items():
            x = _read(read, store, dictionary, low, high, chosen, "input")
            target = _read(read, store, dictionary, low, high, chosen, "output")
            hook = dictionary.required_hook_name
            keep = torch.from_numpy(kept(store, hook, low, high, sink_multiple, selection)).flatten()[chosen]
            block = Block(x, dictionary.encode_sparse(x), token, document, place)
            _add(measured[name], dictionary, block, target, keep.to(x.device))
            for watch in (watchers or {}).get(name, ()):
                watch(_rows(block, keep.to(x.device)))
        bar.advance((high - low) * length)
    if not all(m.frequency.n_tokens for m in measured.values()):
        raise RunError("evaluate found no held-out token to count: correct evaluate.select, or collect more documents")
    return {name: m.figures(n_resamples, seed) for name, m in measured.items()}


def centre_of(store: ActivationStore, dictionary: Dictionary) -> NDArray[np.float64]:
    """Mean activations of the store's ordinary tokens at the hooks that are reconstructed, joined."""
    return np.concatenate([np.asarray(store.statistics(hook).mean) for hook in dictionary.output_hooks])


def evaluate_reconstruction(
    store: ActivationStore,
    dictionary: Dictionary,
    *,
    sink_multiple: float,
    bar: Bar,
    selection: Selection | None = None,
) -> dict[str, Any]:
    """Reconstruction, sparsity and density of one dictionary on the held-out tokens, without intervals; flat names.

    Raises:
        RunError: no token is selected.
    """
    found = measure(store, {"": dictionary}, sink_multiple=sink_multiple, bar=bar, selection=selection, n_resamples=1)
    figures, facts = found[""]
    return {name: figure.value for name, figure in figures.items()} | facts


def _read(
    read: dict[tuple[str, ...], Tensor],
    store: ActivationStore,
    dictionary: Dictionary,
    low: int,
    high: int,
    chosen: Bool[Tensor, " n_all"],
    side: str,
) -> Float[Tensor, "n _"]:
    """Activations of a block on the dictionary's device, read from the store once whoever asks."""
    hooks = dictionary.input_hooks if side == "input" else dictionary.output_hooks
    key = (*hooks, str(dictionary.sae.W_dec.device))
    if key not in read:
        stored = (stored_input if side == "input" else stored_target)(store, dictionary, low, high)
        read[key] = stored.flatten(0, 1)[chosen].float().to(dictionary.sae.W_dec.device)
    return read[key]


def _add(measured: _Measured, dictionary: Dictionary, block: Block, target: Tensor, keep: Bool[Tensor, " n"]) -> None:
    n, latents = len(block.x), block.latents
    x_hat = (dictionary.sae.decode_sparse(latents, n, block.x) + dictionary.sae.bypass(block.x)).float()
    active = torch.bincount(latents.row, minlength=n)
    unit = unit_of(block.document).to(block.x.device)
    measured.fvu_all.update(target, x_hat)
    measured.l0_all.update(latents, n)
    measured.sums_all.update(target, x_hat, active, unit)
    measured.fvu.update(target[keep], x_hat[keep])
    measured.sums.update(target[keep], x_hat[keep], active[keep], unit[keep])
    counted = keep[latents.row]
    measured.frequency.update(SparseLatents(*(part[counted] for part in latents)), int(keep.sum()))
    units = unit.cpu().numpy()
    measured.silent.update(
        latents.latent[counted].cpu().numpy(), units[latents.row[counted].cpu().numpy()], units[keep.cpu().numpy()]
    )


def _rows(block: Block, keep: Bool[Tensor, " n"]) -> Block:
    """The block without the tokens that are not kept."""
    place = keep.long().cumsum(0) - 1
    counted = keep[block.latents.row]
    latents = SparseLatents(
        place[block.latents.row[counted]], block.latents.latent[counted], block.latents.value[counted]
    )
    here = keep.cpu()
    return Block(block.x[keep], latents, block.token[here], block.document[here], block.place[here])
