"""The pass over train documents: examples, counts and a rule for each latent of a block."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.contexts import Examples, Windows, cut_windows, order_by_strength, select_examples, top_tokens_of
from pipelines.labels.firings import Firings
from pipelines.labels.learn import Learned, Learner, Sample
from pipelines.labels.rules import Rule, Views
from pipelines.labels.settings import LabelSettings
from pipelines.labels.testset import N_DECILES, SplitIndex, draw_test_set

_KINDS = ("random", "same_token", "same_document")
_TOGETHER = 64
"""Latents whose questions are drawn at a time."""


class Fitted(NamedTuple):
    """What fitting says, an entry per latent."""

    learned: list[Learned]
    strong: NDArray[np.float32]
    """Half of the train activation lies in firings this strong."""
    n_train_active: NDArray[np.int64]
    n_heldout_active: NDArray[np.int64]
    max_activation: NDArray[np.float32]
    top_tokens: list[list[str]]

    @property
    def rules(self) -> list[Rule]:
        return [learned.rule for learned in self.learned]

    @property
    def has_rule(self) -> NDArray[np.bool_]:
        return np.array([bool(learned.rule) for learned in self.learned], bool)


class FittedBlock(NamedTuple):
    """What the pass leaves of a block."""

    fitted: Fitted
    heldout: Firings
    """Firings on usable held-out tokens."""
    examples: Examples
    windows: Windows


def join_fitted(parts: Sequence[Fitted]) -> Fitted:
    """What fitting says of consecutive blocks as of one dictionary."""
    return Fitted(
        [learned for part in parts for learned in part.learned],
        np.concatenate([part.strong for part in parts]),
        np.concatenate([part.n_train_active for part in parts]),
        np.concatenate([part.n_heldout_active for part in parts]),
        np.concatenate([part.max_activation for part in parts]),
        [words for part in parts for words in part.top_tokens],
    )


class Fitting:
    """Fits blocks of latents."""

    def __init__(self, views: Views, settings: LabelSettings, seed: int, n_latents: int) -> None:
        table = views.table
        self._views, self._settings, self._seed, self._n_latents = views, settings, seed, n_latents
        self._index = SplitIndex(table, split="train", window=settings.window)
        self._n_train = len(self._index.rows)
        self._in_train = np.zeros(table.n_tokens, bool)
        self._in_train[self._index.rows] = True
        self._in_heldout = np.zeros(table.n_tokens, bool)
        self._in_heldout[table.rows("heldout")] = True
        rng = np.random.default_rng([seed, 4])
        drawn = rng.choice(self._index.rows, min(settings.n_natural, self._n_train), replace=False)
        self._learner = Learner(views, np.sort(drawn), settings)

    def block(self, lo: int, everything: Firings) -> FittedBlock:
        """Latents `lo, lo + 1 …` from all their firings."""
        s, table = self._settings, self._views.table
        train = everything.where(self._in_train[everything.row])
        heldout = everything.where(self._in_heldout[everything.row])
        order = order_by_strength(train)
        examples = select_examples(
            train,
            order,
            table.document,
            self._seed,
            first_latent=lo,
            n_top=s.n_top,
            n_quantiles=s.n_quantiles,
            n_per_quantile=s.n_per_quantile,
        )
        fitted = Fitted(
            self._learn(lo, train),
            _strong_level(train, order),
            train.n_firings,
            heldout.n_firings,
            np.maximum(_largest(train), _largest(heldout)),
            top_tokens_of(train, self._views.families[0], s.n_words),
        )
        return FittedBlock(fitted, heldout, examples, cut_windows(examples, everything, table, s.window))

    def _learn(self, lo: int, train: Firings) -> list[Learned]:
        learned: list[Learned] = []
        for start in range(0, train.n_latents, _TOGETHER):
            stop = min(start + _TOGETHER, train.n_latents)
            part = train.take(np.arange(start, stop))
            exam = draw_test_set(
                _at(part, lo + start, self._n_latents),
                np.arange(lo + start, lo + stop),
                self._index,
                np.zeros((self._n_latents, 0), np.int64),
                seed=self._seed + 1_000_003,  # other questions than those of the tests
                n_per_decile=-(-self._settings.n_fitted // N_DECILES),
                n_negatives=self._settings.n_hard,
                kinds=_KINDS,
            )
            bounds = np.searchsorted(exam.latent, np.arange(lo + start, lo + stop + 1))
            for i in range(stop - start):
                mine = slice(bounds[i], bounds[i + 1])
                sample = Sample(exam.row[mine], exam.kind[mine], exam.document[mine])
                learned.append(self._learner.fit(sample, part.row[part.indptr[i] : part.indptr[i + 1]]))
        return learned


def _strong_level(firings: Firings, order: NDArray[np.int64]) -> NDArray[np.float32]:
    """Half of a latent's total activation lies in firings at least this strong.

    Args:
        order: `contexts.order_by_strength(firings)`.
    """
    total = np.concatenate([np.zeros(1), np.cumsum(firings.value[order], dtype=np.float64)])
    start, stop = firings.indptr[:-1], firings.indptr[1:]
    live = stop > start
    middle = np.searchsorted(total, (total[start] + total[stop]) / 2) - 1
    level = np.zeros(firings.n_latents, np.float32)
    level[live] = firings.value[order[np.clip(middle, start, stop - 1)[live]]]
    return level


def _largest(firings: Firings) -> NDArray[np.float32]:
    """Strongest firing of each latent; 0 where there is none."""
    found = np.zeros(firings.n_latents, np.float32)
    live = firings.n_firings > 0
    if live.any():
        found[live] = np.maximum.reduceat(firings.value, firings.indptr[:-1][live])
    return found


def _at(part: Firings, lo: int, n_latents: int) -> Firings:
    """The same firings as latents `lo …` of a dictionary whose other latents are silent: draws depend on the number."""
    before, after = np.zeros(lo, np.int64), np.full(n_latents - lo - part.n_latents, part.indptr[-1])
    return Firings(np.concatenate([before, part.indptr, after]), part.row, part.value)
