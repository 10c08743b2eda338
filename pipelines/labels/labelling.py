"""Labelling on arrays: two passes over the sparse activations of a dictionary, block by block.

1. train documents      examples, counts, a rule for each latent              -> examples.parquet
2. held-out documents   every test of every rule                              -> features.parquet, counter_examples

Blocks run in parallel (`forked`), and what they give depends neither on the blocks nor on the number of processes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.contexts import Examples, Windows
from pipelines.labels.families import TokenTable
from pipelines.labels.features import (
    COUNTER_EXAMPLES_FILE,
    EXAMPLES_FILE,
    Fitted,
    Tested,
    decide,
    lens_words,
    summarise,
    write_features,
)
from pipelines.labels.firings import Firings, block_ranges
from pipelines.labels.fitting import Fitting
from pipelines.labels.forked import run_blocks
from pipelines.labels.neighbours import nearest_neighbours
from pipelines.labels.relations import relate
from pipelines.labels.rules import Views
from pipelines.labels.settings import LabelSettings, LabelSummary
from pipelines.labels.tables import EXAMPLES, ParquetFile, example_columns
from pipelines.labels.testing import TestedBlock, Testing, join, join_scores
from pipelines.progress import Reporter

ReadBlock = Callable[[int, int], Firings]
_LATENTS_PER_BLOCK = 256
_FEW_FIRINGS = 500_000
"""Below this, processes cost more than they save."""


def label_latents(
    table: TokenTable,
    read_block: ReadBlock,
    counts: NDArray[np.int64],
    W_dec: Float[Tensor, "d_sae d_in"],
    token_strings: Sequence[str],
    unembedding: tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model vocab"]] | None,
    out_dir: Path,
    ui: Reporter,
    *,
    seed: int,
    config: LabelSettings | None = None,
) -> LabelSummary:
    """`label_dictionary` on arrays.

    Args:
        read_block: firings of latents `lo..hi` over all token rows.
        counts: firings of each latent, to cut the dictionary into blocks.
    """
    config = config or LabelSettings()
    W_U = None if unembedding is None else unembedding[1]
    views = Views(table, token_strings, W_U=W_U)
    neighbours, cosine = nearest_neighbours(W_dec, config.n_others)
    with ParquetFile(out_dir / EXAMPLES_FILE, EXAMPLES) as file:
        first, heldout = fit_rules(views, read_block, counts, ui, _writer(file, table, token_strings), seed, config)
    with ParquetFile(out_dir / COUNTER_EXAMPLES_FILE, EXAMPLES) as file:
        second, holes = test_rules(
            views, first, heldout, neighbours, ui, _writer(file, table, token_strings), seed, config
        )
    decided = decide(second, config.min_detection)
    promotes, suppresses = lens_words(W_dec, unembedding, token_strings, config)
    relations = relate(heldout, neighbours, cosine, holes)
    write_features(first, second, decided, relations, views, promotes, suppresses, out_dir)
    return summarise(first, second, decided, config.min_detection)


Write = Callable[[Examples, Windows, int], None]


def _writer(file: ParquetFile, table: TokenTable, token_strings: Sequence[str]) -> Write:
    def write(examples: Examples, windows: Windows, lo: int) -> None:
        file.write(example_columns(examples, windows, lo, table, token_strings))

    return write


def fit_rules(
    views: Views,
    read_block: ReadBlock,
    counts: NDArray[np.int64],
    ui: Reporter,
    write: Write | None,
    seed: int,
    config: LabelSettings,
) -> tuple[Fitted, Firings]:
    """The first pass; also the firings of the whole dictionary on usable held-out tokens."""
    fitting = Fitting(views, config, seed, len(counts))
    ranges = list(block_ranges(np.asarray(counts), config.max_firings_per_block, _LATENTS_PER_BLOCK))
    blocks = ((lo, read_block(lo, hi)) for lo, hi in ranges)
    parts = []
    with ui.stage("label", total=len(counts), unit="latents") as bar:
        found = run_blocks(fitting.block, blocks, n_workers=_workers(counts, config))
        for (lo, hi), part in zip(ranges, found, strict=True):
            if write is not None and part.examples is not None and part.windows is not None:
                write(part.examples, part.windows, lo)
            parts.append(part._replace(examples=None, windows=None))  # they take the most room
            bar.advance(hi - lo)
    heldout = Firings(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([p.heldout.n_firings for p in parts]))]),
        np.concatenate([p.heldout.row for p in parts]),
        np.concatenate([p.heldout.value for p in parts]),
    )
    fitted = Fitted(
        [learned for part in parts for learned in part.learned],
        np.concatenate([part.strong for part in parts]),
        np.concatenate([part.n_train_active for part in parts]),
        heldout.n_firings,
        np.concatenate([part.max_activation for part in parts]),
        [words for part in parts for words in part.top_tokens],
    )
    return fitted, heldout


def test_rules(
    views: Views,
    first: Fitted,
    heldout: Firings,
    neighbours: NDArray[np.int64],
    ui: Reporter,
    write: Write | None,
    seed: int,
    config: LabelSettings,
) -> tuple[Tested, list[NDArray[np.int64]]]:
    """The second pass; also, of each latent, held-out rows on which its rule holds and it is silent."""
    n_latents = len(first.learned)
    rng = np.random.default_rng([seed, n_latents])
    null_latents = np.sort(rng.permutation(np.flatnonzero(first.n_heldout_active > 0))[: config.n_null])
    dealt_to = deal_to_others(first.has_rule & (first.n_heldout_active > 0), rng)
    testing = Testing(views, first.rules, heldout, neighbours, first.strong, dealt_to, null_latents, config, seed)
    step = min(_LATENTS_PER_BLOCK, max(1, 2_000_000 // testing.n_documents))
    ranges = [(lo, min(lo + step, n_latents)) for lo in range(0, n_latents, step)]
    parts: list[TestedBlock] = []
    holes: list[NDArray[np.int64]] = []
    with ui.stage("test labels", total=n_latents, unit="latents") as bar:
        found = run_blocks(testing.block, ranges, n_workers=_workers(heldout.n_firings, config))
        for (lo, hi), part in zip(ranges, found, strict=True):
            if write is not None and part.examples is not None and part.windows is not None:
                write(part.examples, part.windows, lo)
            holes += part.holes
            parts.append(part._replace(examples=None, windows=None, holes=[]))
            bar.advance(hi - lo)
    return _join(parts), holes


test_rules.__test__ = False  # type: ignore[attr-defined]  # no test of ours, whatever pytest thinks


def _workers(counts: NDArray[np.int64], config: LabelSettings) -> int:
    return 1 if counts.sum() < _FEW_FIRINGS else config.n_workers


def deal_to_others(has_rule: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each latent with a rule, the latent that gets it: a random cycle, so never itself. -1 elsewhere."""
    dealt = np.full(len(has_rule), -1, np.int64)
    cycle = rng.permutation(np.flatnonzero(has_rule))
    if len(cycle) > 1:
        dealt[cycle] = np.roll(cycle, 1)
    return dealt


def _join(parts: Sequence[TestedBlock]) -> Tested:
    return Tested(
        join([p.natural for p in parts]),
        np.concatenate([p.tpr_strong for p in parts]),
        join_scores([p.scores for p in parts]),
        join([p.ranks for p in parts]),
        np.concatenate([p.null for p in parts]),
        join([p.dealt for p in parts]),
    )
