"""The pass over held-out documents: every test of every rule, from one run of the rule over all held-out tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.contexts import FALSE_ALARM, MISS, Examples, Windows, cut_windows
from pipelines.labels.firings import Firings
from pipelines.labels.rules import Rule, Views
from pipelines.labels.scores import Detection, detection
from pipelines.labels.settings import LabelSettings
from pipelines.labels.testset import N_DECILES, SplitIndex, draw_test_set
from pipelines.labels.verdicts import LabelScores, score_verdicts

_TOGETHER = 64
_WINDOWS_PER_OTHER = 100
_MOST_HOLES = 2000
_Shown = tuple[int, int, int, int, float]
"""A counter-example: latent within the block, kind, rank, token row, activation."""


class Ranks(NamedTuple):
    """Where the true latent stands under its own label, 1 = best; ties count against it. 0 where there is no rule."""

    random: NDArray[np.int32]
    n_random: NDArray[np.int32]
    neighbour: NDArray[np.int32]
    n_neighbour: NDArray[np.int32]


class Tested(NamedTuple):
    """What the tests say, an entry per latent."""

    natural: Detection
    """Over all held-out tokens."""
    tpr_strong: NDArray[np.float64]
    """Over firings at least as strong as `strong` only."""
    scores: LabelScores
    ranks: Ranks
    null: NDArray[np.float32]
    """`[n, n_null]` balanced accuracy of every rule on the null latents; NaN on its own."""
    dealt: Detection
    """Each rule on the latent that it was dealt to; entry i is about rule i."""


class TestedBlock(NamedTuple):
    """What the pass leaves of a block."""

    tested: Tested
    examples: Examples
    """Counter-examples, from held-out documents."""
    windows: Windows
    holes: list[NDArray[np.int64]]
    """Of each latent, held-out token rows on which its rule holds and it is silent; at most `_MOST_HOLES` of them."""


class Testing:
    """Tests the rules of a dictionary."""

    __test__ = False

    def __init__(
        self,
        views: Views,
        rules: list[Rule],
        firings: Firings,
        neighbours: NDArray[np.int64],
        strong: NDArray[np.float32],
        dealt_to: NDArray[np.int64],
        null_latents: NDArray[np.int64],
        settings: LabelSettings,
        seed: int,
    ) -> None:
        """Args:
        firings: of the whole dictionary on usable held-out tokens.
        neighbours: `[d_sae, k]` latents with the most similar decoder rows.
        strong: activation from which a firing of each latent counts as strong.
        dealt_to: latent on which each rule is tried as a wrong one; -1 = none.
        null_latents: random latents on which every rule is tried; each fires on held-out tokens.
        """
        table = views.table
        self._views, self._rules, self._firings, self._settings = views, rules, firings, settings
        self._neighbours, self._strong, self._dealt_to, self._seed = neighbours, strong, dealt_to, seed
        self._null = null_latents
        self._index = SplitIndex(table, window=settings.window)
        self._rows = self._index.rows
        self._at = np.zeros(table.n_tokens, np.int64)
        self._at[self._rows] = np.arange(len(self._rows))
        documents, of_row = np.unique(table.document[self._rows], return_inverse=True)
        self._document, self.n_documents = of_row.reshape(-1), len(documents)
        self._tokens = np.bincount(self._document, minlength=self.n_documents)
        self._where = self._at[firings.row]
        found = [self._of(i) for i in null_latents.tolist()]
        self._null_size = np.array([len(where) for where in found], np.int64)
        self._null_start = np.cumsum(self._null_size) - self._null_size
        self._null_where = np.concatenate([*found, np.zeros(0, np.int64)])
        self._pool = np.flatnonzero(firings.n_firings > 0)
        self._drawn = self._draw_windows()

    def block(self, lo: int, hi: int) -> TestedBlock:
        """Latents `lo` to `hi` and their rules."""
        n, n_docs = hi - lo, self.n_documents
        counts = {k: np.zeros((n, n_docs), np.int64) for k in ("hit", "fire", "say", "dealt hit", "dealt fire")}
        tpr_strong = np.full(n, np.nan)
        null = np.full((n, len(self._null)), np.nan, np.float32)
        ranks = Ranks(*(np.zeros(n, np.int32) for _ in range(4)))
        examples: list[_Shown] = []
        parts: list[LabelScores] = []
        holes = [np.zeros(0, np.int64) for _ in range(n)]
        for start in range(lo, hi, _TOGETHER):
            latents = np.arange(start, min(start + _TOGETHER, hi))
            exam = draw_test_set(
                self._firings,
                latents,
                self._index,
                self._neighbours,
                seed=self._seed,
                n_per_decile=-(-self._settings.n_tested // N_DECILES),
                n_negatives=self._settings.n_tested,
            )
            asked = np.searchsorted(exam.latent, np.append(latents, latents[-1] + 1))
            verdict = np.zeros(len(exam.row), np.float32)
            for k, latent in enumerate(latents.tolist()):
                i, rule = latent - lo, self._rules[latent]
                here = self._of(latent)
                counts["fire"][i] = self._by_document(here)
                if not rule:
                    continue
                score = self._views.score(rule, self._rows)
                says = score > 0
                questions = slice(asked[k], asked[k + 1])
                verdict[questions] = score[self._at[exam.row[questions]]]
                counts["say"][i] = self._by_document(np.flatnonzero(says))
                counts["hit"][i] = self._by_document(here[says[here]])
                if len(here):
                    value = self._firings.value[self._span(latent)]
                    strong = value >= self._strong[latent]
                    if strong.any():
                        tpr_strong[i] = says[here[strong]].mean()
                    missed = np.flatnonzero(~says[here])
                    silent = says.copy()
                    silent[here] = False
                    wrong = np.flatnonzero(silent)
                    holes[i] = self._rows[wrong[:_MOST_HOLES]]
                    examples += self._misses(i, here[missed], value[missed])
                    examples += self._false_alarms(i, latent, wrong, score[wrong])
                null[i] = self._on_null(latent, says)
                self._rank(i, latent, says, here, ranks)
                victim = int(self._dealt_to[latent])
                if victim >= 0:
                    there = self._of(victim)
                    counts["dealt fire"][i] = self._by_document(there)
                    counts["dealt hit"][i] = self._by_document(there[says[there]])
            density = self._firings.n_firings[latents] / max(len(self._rows), 1)
            parts.append(score_verdicts(exam, verdict, latents, density))
        has_rule = np.array([bool(self._rules[i]) for i in range(lo, hi)])
        natural = detection(counts["hit"], counts["fire"], counts["say"], self._tokens)
        dealt = detection(counts["dealt hit"], counts["dealt fire"], counts["say"], self._tokens)
        found = _as_examples(examples)
        tested = Tested(
            _only(natural, has_rule),
            tpr_strong,
            _only_scores(_join_scores(parts), has_rule),
            ranks,
            null,
            _only(dealt, has_rule & (self._dealt_to[lo:hi] >= 0)),
        )
        return TestedBlock(
            tested,
            found,
            cut_windows(found, self._firings.take(np.arange(lo, hi)), self._views.table, self._settings.window),
            holes,
        )

    def _span(self, latent: int) -> slice:
        return slice(int(self._firings.indptr[latent]), int(self._firings.indptr[latent + 1]))

    def _of(self, latent: int) -> NDArray[np.int64]:
        """Firings of a latent as indices into the held-out rows."""
        return self._where[self._span(latent)]

    def _by_document(self, where: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(self._document[where], minlength=self.n_documents)

    def _on_null(self, latent: int, says: NDArray[np.bool_]) -> NDArray[np.float32]:
        if not len(self._null):
            return np.zeros(0, np.float32)
        n_said, n = int(says.sum()), len(says)
        hits = np.add.reduceat(says[self._null_where].astype(np.int64), self._null_start)
        silent = n - self._null_size
        fpr = np.divide(n_said - hits, silent, out=np.full(len(hits), np.nan), where=silent > 0)
        found = (hits / self._null_size + 1 - fpr) / 2
        return np.where(self._null == latent, np.nan, found).astype(np.float32)

    def _draw_windows(self) -> list[NDArray[np.int64]]:
        """Of each latent some firings, the same whoever is compared with it."""
        drawn = []
        for latent in range(self._firings.n_latents):
            where = self._of(latent)
            if len(where) > _WINDOWS_PER_OTHER:
                rng = np.random.default_rng([self._seed, 3, latent])
                where = where[np.sort(rng.choice(len(where), _WINDOWS_PER_OTHER, replace=False))]
            drawn.append(where)
        return drawn

    def _rank(self, i: int, latent: int, says: NDArray[np.bool_], here: NDArray[np.int64], ranks: Ranks) -> None:
        n = self._settings.n_others
        near = self._neighbours[latent]
        near = near[self._firings.n_firings[near] > 0][:n]
        rng = np.random.default_rng([self._seed, 2, latent])
        far = rng.choice(self._pool, min(len(self._pool), n + len(near) + 1), replace=False)
        far = far[(far != latent) & ~np.isin(far, near)][:n]
        own = says[here].mean() if len(here) else 0.0
        for others, rank, count in ((far, ranks.random, ranks.n_random), (near, ranks.neighbour, ranks.n_neighbour)):
            shares = np.array([says[self._drawn[j]].mean() for j in others.tolist()])
            count[i] = len(others)
            rank[i] = 1 + int((shares >= own).sum())

    def _misses(self, i: int, where: NDArray[np.int64], value: NDArray[np.float32]) -> list[_Shown]:
        """The strongest firings on which the rule does not hold."""
        strongest = np.argsort(-value, kind="stable")[: self._settings.n_counter_examples]
        return [(i, MISS, k, int(self._rows[where[at]]), float(value[at])) for k, at in enumerate(strongest.tolist())]

    def _false_alarms(self, i: int, latent: int, where: NDArray[np.int64], score: NDArray[np.float32]) -> list[_Shown]:
        """Silent tokens of which the rule is surest, drawn at random among equals."""
        order = np.random.default_rng([self._seed, 5, latent]).permutation(len(where))
        surest = order[np.argsort(-score[order], kind="stable")][: self._settings.n_counter_examples]
        return [(i, FALSE_ALARM, k, int(self._rows[where[at]]), 0.0) for k, at in enumerate(surest.tolist())]


def _as_examples(found: list[_Shown]) -> Examples:
    def column(k: int, kind: type[np.generic]) -> NDArray[Any]:
        return np.array([each[k] for each in found], kind)

    return Examples(
        column(0, np.int64), column(1, np.int8), column(2, np.int16), column(3, np.int64), column(4, np.float32)
    )


def _only(found: Detection, has_rule: NDArray[np.bool_]) -> Detection:
    """NaN where there is no rule."""
    scores = {f: np.where(has_rule, getattr(found, f), np.nan) for f in Detection._fields if f != "n_firing"}
    return Detection(n_firing=found.n_firing, **scores)


def _only_scores(found: LabelScores, has_rule: NDArray[np.bool_]) -> LabelScores:
    def only(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(has_rule if x.ndim == 1 else has_rule[:, None], x, np.nan)

    kinds = {}
    for kind, by in found.by_kind.items():
        scores: dict[str, Any] = {f: only(getattr(by, f)) for f in by._fields if f not in ("n", "n_documents")}
        kinds[kind] = by._replace(**scores)
    return found._replace(
        tpr=type(found.tpr)(*map(only, found.tpr)),
        tpr_by_decile=only(found.tpr_by_decile),
        by_kind=kinds,
        precision=type(found.precision)(*map(only, found.precision)),
    )


T = TypeVar("T", bound=tuple[Any, ...])


def _join(parts: Sequence[T]) -> T:
    """Named tuples of arrays, an entry per latent, of consecutive latents as one of all of them."""
    return type(parts[0])(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _join_scores(parts: Sequence[LabelScores]) -> LabelScores:
    return LabelScores(
        _join([p.tpr for p in parts]),
        np.concatenate([p.tpr_by_decile for p in parts]),
        {kind: _join([p.by_kind[kind] for p in parts]) for kind in parts[0].by_kind},
        _join([p.precision for p in parts]),
        np.concatenate([p.n_positive for p in parts]),
        np.concatenate([p.n_failed for p in parts]),
    )


def join_tested(parts: Sequence[Tested]) -> Tested:
    """The tests of consecutive blocks as those of one dictionary."""
    return Tested(
        _join([p.natural for p in parts]),
        np.concatenate([p.tpr_strong for p in parts]),
        _join_scores([p.scores for p in parts]),
        _join([p.ranks for p in parts]),
        np.concatenate([p.null for p in parts]),
        _join([p.dealt for p in parts]),
    )
