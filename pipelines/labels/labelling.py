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
    decide,
    lens_words,
    summarise,
    write_features,
)
from pipelines.labels.firings import Firings, block_ranges, join_firings
from pipelines.labels.fitting import Fitted, Fitting, join_fitted
from pipelines.labels.forked import run_blocks
from pipelines.labels.neighbours import nearest_neighbours
from pipelines.labels.relations import relate
from pipelines.labels.rules import Views
from pipelines.labels.settings import LabelSettings, LabelSummary
from pipelines.labels.tables import EXAMPLES, ParquetFile, example_columns
from pipelines.labels.testing import Tested, Testing, join_tested
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
        first, heldout = _fit_rules(views, read_block, counts, ui, _writer(file, table, token_strings), seed, config)
    with ParquetFile(out_dir / COUNTER_EXAMPLES_FILE, EXAMPLES) as file:
        second, holes = _test_rules(
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


def _fit_rules(
    views: Views,
    read_block: ReadBlock,
    counts: NDArray[np.int64],
    ui: Reporter,
    write: Write,
    seed: int,
    config: LabelSettings,
) -> tuple[Fitted, Firings]:
    """The first pass; also the firings of the whole dictionary on usable held-out tokens."""
    fitting = Fitting(views, config, seed, len(counts))
    ranges = list(block_ranges(np.asarray(counts), config.max_firings_per_block, _LATENTS_PER_BLOCK))
    blocks = ((lo, read_block(lo, hi)) for lo, hi in ranges)
    parts: list[Fitted] = []
    heldout: list[Firings] = []
    with ui.stage("label", total=len(counts), unit="latents") as bar:
        found = run_blocks(fitting.block, blocks, n_workers=_workers(counts, config))
        for (lo, hi), block in zip(ranges, found, strict=True):
            write(block.examples, block.windows, lo)
            parts.append(block.fitted)
            heldout.append(block.heldout)
            bar.advance(hi - lo)
    return join_fitted(parts), join_firings(heldout)


def _test_rules(
    views: Views,
    first: Fitted,
    heldout: Firings,
    neighbours: NDArray[np.int64],
    ui: Reporter,
    write: Write,
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
    parts: list[Tested] = []
    holes: list[NDArray[np.int64]] = []
    with ui.stage("test labels", total=n_latents, unit="latents") as bar:
        found = run_blocks(testing.block, ranges, n_workers=_workers(heldout.n_firings, config))
        for (lo, hi), block in zip(ranges, found, strict=True):
            write(block.examples, block.windows, lo)
            parts.append(block.tested)
            holes += block.holes
            bar.advance(hi - lo)
    return join_tested(parts), holes


def _workers(counts: NDArray[np.int64], config: LabelSettings) -> int:
    return 1 if counts.sum() < _FEW_FIRINGS else config.n_workers


def deal_to_others(has_rule: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each latent with a rule, the latent that gets it: a random cycle, so never itself. -1 elsewhere."""
    dealt = np.full(len(has_rule), -1, np.int64)
    cycle = rng.permutation(np.flatnonzero(has_rule))
    if len(cycle) > 1:
        dealt[cycle] = np.roll(cycle, 1)
    return dealt
