"""Labelling on arrays: two passes over the sparse activations of a dictionary, block by block.

1. train documents      examples, counts, the rule that saves most bits             -> examples.parquet
2. held-out documents   every rule on its own latent, on a wrong one, on many       -> features.parquet
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.contexts import cut_windows, order_by_strength, select_examples
from pipelines.labels.families import Family, TokenTable, build_families
from pipelines.labels.features import EXAMPLES_FILE, Fitted, Tested, lens_words, top_tokens_of, write_features
from pipelines.labels.firings import Firings, block_ranges
from pipelines.labels.heldout import HeldOut, Scores
from pipelines.labels.predicates import Predicates, concatenate, firing_weights, fit_predicates
from pipelines.labels.settings import LabelSettings, LabelSummary
from pipelines.labels.tables import EXAMPLES, ParquetFile, example_columns
from pipelines.progress import Reporter


def label_latents(
    table: TokenTable,
    read_block: Callable[[int, int], Firings],
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
    families = build_families(table, token_strings)
    heldout = HeldOut(table, families)
    max_latents = max(1, min(512, 4_000_000 // heldout.n_documents))
    ranges = list(block_ranges(np.asarray(counts), config.max_firings_per_block, max_latents))
    rng = np.random.default_rng([seed, len(counts)])

    first = _fit(table, families, heldout, read_block, ranges, len(counts), token_strings, out_dir, ui, rng, config)
    second = _test(heldout, read_block, ranges, first, ui, rng, config)
    promotes, suppresses = lens_words(W_dec, unembedding, token_strings, config)
    return write_features(first, second, families, promotes, suppresses, table, out_dir, config)


def _fit(
    table: TokenTable,
    families: Sequence[Family],
    heldout: HeldOut,
    read_block: Callable[[int, int], Firings],
    ranges: Sequence[tuple[int, int]],
    n_latents: int,
    token_strings: Sequence[str],
    out_dir: Path,
    ui: Reporter,
    rng: np.random.Generator,
    config: LabelSettings,
) -> Fitted:
    train_rows = table.rows("train")
    in_train = np.zeros(table.n_tokens, bool)
    in_train[train_rows] = True
    predicates: list[Predicates] = []
    columns: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    top_tokens: list[list[str]] = []
    with (
        ui.stage("label", total=n_latents, unit="latents") as bar,
        ParquetFile(out_dir / EXAMPLES_FILE, EXAMPLES) as examples_file,
    ):
        for lo, hi in ranges:
            everything = read_block(lo, hi)
            train = everything.where(in_train[everything.row])
            order = order_by_strength(train)
            weight, strong = firing_weights(train, order)
            predicates.append(
                fit_predicates(
                    train,
                    weight,
                    families,
                    train_rows,
                    table.document,
                    max_categories=config.max_categories,
                    min_documents=config.min_documents,
                )
            )
            examples = select_examples(
                train,
                order,
                table.document,
                rng,
                n_top=config.n_top,
                n_quantiles=config.n_quantiles,
                n_per_quantile=config.n_per_quantile,
            )
            windows = cut_windows(examples, everything, table, config.window)
            examples_file.write(example_columns(examples, windows, lo, table, token_strings))
            tested = heldout.select(everything)
            columns.append((strong, train.n_firings, tested.n_firings, np.maximum(_largest(train), _largest(tested))))
            top_tokens += top_tokens_of(train, families[0], config.n_words)
            bar.advance(hi - lo)
    strong, n_train, n_heldout, largest = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Fitted(concatenate(predicates), strong, n_train, n_heldout, largest, top_tokens)


def _test(
    heldout: HeldOut,
    read_block: Callable[[int, int], Firings],
    ranges: Sequence[tuple[int, int]],
    first: Fitted,
    ui: Reporter,
    rng: np.random.Generator,
    config: LabelSettings,
) -> Tested:
    n_latents = first.predicates.n_latents
    testable = np.flatnonzero(first.n_heldout_active > 0)
    null_latents = np.sort(rng.permutation(testable)[: config.n_null])
    dealt_rule = deal_to_others(first.predicates.found & (first.n_heldout_active > 0), rng)
    null = np.full((n_latents, len(null_latents)), np.nan, np.float32)
    own, dealt = [], []
    with ui.stage("test labels", total=n_latents, unit="latents") as bar:
        for lo, hi in ranges:
            firings = heldout.select(read_block(lo, hi))
            strong = first.strong[lo:hi]
            own.append(heldout.score(firings, first.predicates.take(np.arange(lo, hi)), strong))
            dealt.append(heldout.score(firings, first.predicates.take(dealt_rule[lo:hi]), strong))
            here = np.flatnonzero((null_latents >= lo) & (null_latents < hi))
            null[:, here] = heldout.score_on_others(firings.take(null_latents[here] - lo), first.predicates)
            bar.advance(hi - lo)
    null[null_latents, np.arange(len(null_latents))] = np.nan
    return Tested(_join(own), _join(dealt), dealt_rule, null)


def deal_to_others(has_rule: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """For each latent with a rule, the latent whose rule it gets: a random cycle, so never its own. -1 elsewhere."""
    dealt = np.full(len(has_rule), -1, np.int64)
    cycle = rng.permutation(np.flatnonzero(has_rule))
    if len(cycle) > 1:
        dealt[cycle] = np.roll(cycle, 1)
    return dealt


def _join(parts: Sequence[Scores]) -> Scores:
    detections = zip(*(part.detection for part in parts), strict=True)
    return Scores(
        type(parts[0].detection)(*(np.concatenate(column) for column in detections)),
        np.concatenate([part.tpr_strong for part in parts]),
        np.concatenate([part.auroc for part in parts]),
    )


def _largest(firings: Firings) -> NDArray[np.float32]:
    largest = np.zeros(firings.n_latents, np.float32)
    live = firings.n_firings > 0
    if live.any():
        largest[live] = np.maximum.reduceat(firings.value, firings.indptr[:-1][live])
    return largest
