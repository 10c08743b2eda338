"""The questions that every label has to answer, whoever made it: held-out tokens, half of which the latent fires on.

A *question* is a token: does the latent fire here? Of each latent are asked

    positives       its firings, equally many of each tenth of their strength (decile 9 is the strongest)
    random          any tokens on which it is silent
    same_token      tokens that a positive fires on, elsewhere, where the latent is silent
    same_document   silent tokens of the documents of the positives
    neighbour       silent tokens on which one of the latents with the most similar decoder rows fires
    same_window     silent tokens within a window around a positive: the wrong tokens of token-level fuzzing

Negatives of the last four kinds are drawn for the positives one by one, at the natural rate: for `same_token`, some
occurrence of the positive's token, kept if the latent is silent there. A token on which the latent always fires hence
gives no such negatives, one on which it fires nine times of ten gives few. Every question is on a held-out document
(checked here), none is asked twice of one latent and kind, and a latent's questions depend on the seed and its own
firings alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.draws import integers_below, uniforms
from pipelines.labels.families import TokenTable
from pipelines.labels.firings import Firings

NEGATIVES = ("random", "same_token", "same_document", "neighbour", "same_window")
_Drawn = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
N_DECILES = 10
_MAX_DRAWS = 8
"""Negatives of a kind drawn for one positive, at most."""


class Questions(NamedTuple):
    """Does the latent that label `label` describes fire on token `row`? One entry per question."""

    label: NDArray[np.int64]
    row: NDArray[np.int64]
    """Token row in the table: the token that is asked about."""
    centre: NDArray[np.int64]
    """Middle of the window to show. It is `row` except for wrong tokens, whose window is that of the positive."""


class Judge(Protocol):
    """Answers questions with the label as its only knowledge of the latent."""

    def __call__(self, questions: Questions) -> NDArray[np.float32]:
        """Probability, or any score of which at least 0.5 means yes, per question; NaN = no answer, counted as wrong.

        A judge of whole windows answers whether the latent fires within the window and should be asked about quiet
        negatives only (`quiet_only`).
        """
        ...


class Exam(NamedTuple):
    """The test set: questions of some latents with their true answers, ordered by latent, then kind, then row."""

    latent: NDArray[np.int64]
    kind: NDArray[np.int8]
    """0 = positive, k = a negative of `NEGATIVES[k - 1]`."""
    row: NDArray[np.int64]
    centre: NDArray[np.int64]
    decile: NDArray[np.int8]
    """Tenth of the latent's held-out firings by strength, 9 = strongest; -1 for negatives."""
    value: NDArray[np.float32]
    """Activation; 0 for negatives."""
    document: NDArray[np.int32]
    quiet: NDArray[np.bool_]
    """Whether the latent is silent on every token of the window around `centre`."""

    def questions(self) -> Questions:
        """What a judge may see."""
        return Questions(self.latent, self.row, self.centre)

    def where(self, keep: NDArray[np.bool_]) -> "Exam":
        """The questions for which `keep` holds."""
        return Exam(
            self.latent[keep],
            self.kind[keep],
            self.row[keep],
            self.centre[keep],
            self.decile[keep],
            self.value[keep],
            self.document[keep],
            self.quiet[keep],
        )


class SplitIndex:
    """The tokens of one split by token id and by document, for drawing.

    Labels are tested on the split `heldout`; the same questions about the split `train` are what rules are fitted to.

    Raises:
        ValueError: a document of a held-out token has train tokens too (checked by `TokenTable`).
    """

    def __init__(self, table: TokenTable, *, window: int = 16, split: str = "heldout") -> None:
        self.table = table
        self.window = window
        self.split = split
        self.rows = table.rows(split)
        self._by_token, self._token_start = _postings(table.token[self.rows])
        self._by_document, self._document_start = _postings(table.document[self.rows])

    def occurrences(self, row: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where `occurrence` finds the held-out tokens with the same id as each row: first and how many."""
        return _span(self._token_start, self.table.token[row])

    def in_document(self, row: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The same for held-out tokens of the same document."""
        return _span(self._document_start, self.table.document[row])

    def occurrence(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token rows at positions given by `occurrences`."""
        return self.rows[self._by_token[at]]

    def document_token(self, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token rows at positions given by `in_document`."""
        return self.rows[self._by_document[at]]


def draw_test_set(
    firings: Firings,
    latents: NDArray[np.int64],
    index: SplitIndex,
    neighbours: NDArray[np.int64],
    *,
    seed: int,
    n_per_decile: int = 50,
    n_negatives: int = 500,
    quiet_only: bool = False,
    kinds: Sequence[str] = NEGATIVES,
) -> Exam:
    """Draw the questions of some latents.

    Args:
        firings: of every latent of the dictionary on usable held-out tokens.
        latents: whose questions to draw, ascending.
        neighbours: `[d_sae, k]` latents with the most similar decoder rows; k may be 0.
        n_per_decile: positives of each tenth; a latent with fewer firings gives all of them.
        n_negatives: most negatives of each kind.
        kinds: of negatives to draw.
        quiet_only: only negatives in whose window the latent never fires (dense latents may have none).

    Raises:
        ValueError: a firing that is not on a usable held-out token.
    """
    table = index.table
    held = np.zeros(table.n_tokens, bool)
    held[index.rows] = True
    wrong = np.flatnonzero(~held[firings.row])
    if len(wrong):
        raise ValueError(
            f"Questions may be about {index.split} tokens only, but {len(wrong)} firings are elsewhere (first: "
            f"token row {firings.row[wrong[0]]}). Pass the firings on usable {index.split} tokens."
        )
    mine = firings.take(latents)
    fires = _Membership(mine, table.n_tokens)
    positives = _draw_positives(mine, latents, seed, n_per_decile)
    owner, anchor = positives[0], mine.row[positives[1]]
    per_positive = _draws_per_positive(owner, len(latents), n_negatives)
    again = np.repeat(np.arange(len(owner)), per_positive[owner])
    number = np.arange(len(again)) - np.repeat(
        np.cumsum(per_positive[owner]) - per_positive[owner], per_positive[owner]
    )
    asked = _Asked(owner[again], anchor[again], latents[owner[again]], anchor[again] * _MAX_DRAWS + number, seed)
    draw: dict[str, Callable[[], _Drawn]] = {
        "random": lambda: _random_negatives(index, latents, seed, n_negatives),
        "same_token": lambda: asked.from_span(1, *index.occurrences(asked.anchor), index.occurrence),
        "same_document": lambda: asked.from_span(2, *index.in_document(asked.anchor), index.document_token),
        "neighbour": lambda: _neighbour_negatives(firings, neighbours, latents, seed, n_negatives),
        "same_window": lambda: asked.wrong_tokens(4, index, held),
    }
    columns = [(owner, np.zeros(len(owner), np.int8), anchor, anchor, positives[2], mine.value[positives[1]])]
    for kind, name in enumerate(NEGATIVES, start=1):
        if name not in kinds:
            continue
        who, row, centre = draw[name]()
        keep = ~fires(who, row)
        if quiet_only:
            keep &= fires.quiet(who, centre, table, index.window)
        chosen = _first_distinct(who[keep], row[keep], table.n_tokens, n_negatives)
        who, row, centre = who[keep][chosen], row[keep][chosen], centre[keep][chosen]
        n = len(who)
        columns.append((who, np.full(n, kind, np.int8), row, centre, np.full(n, -1, np.int8), np.zeros(n, np.float32)))
    who, kind_, row, centre, decile, value = (np.concatenate(column) for column in zip(*columns, strict=True))
    by = np.lexsort((row, kind_, who))
    who, row, centre = who[by], row[by], centre[by]
    quiet = fires.quiet(who, centre, table, index.window)
    return Exam(latents[who], kind_[by], row, centre, decile[by], value[by], table.document[row], quiet)


class _Membership:
    """Whether a latent of the block fires on a token."""

    def __init__(self, firings: Firings, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._keys = firings.latent * n_tokens + firings.row

    def __call__(self, who: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.bool_]:
        if not len(self._keys):
            return np.zeros(len(who), bool)
        wanted = who * self._n_tokens + row
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.asarray(self._keys[at] == wanted, bool)

    def quiet(
        self, who: NDArray[np.int64], centre: NDArray[np.int64], table: TokenTable, window: int
    ) -> NDArray[np.bool_]:
        """No firing on the part of [centre - window, centre + window] that belongs to the centre's document piece."""
        first, last = window_bounds(centre, table, window)
        start = np.searchsorted(self._keys, who * self._n_tokens + first)
        stop = np.searchsorted(self._keys, who * self._n_tokens + last, side="right")
        return np.asarray(start == stop, bool)


def window_bounds(
    centre: NDArray[np.int64], table: TokenTable, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last token row of the window around each centre, cut at the document piece and the context."""
    piece_start = centre - np.minimum(table.position[centre], centre % table.context_length)
    first = np.maximum(centre - window, piece_start)
    return first, np.minimum(centre + window, table.piece_end[centre])


class _Asked(NamedTuple):
    """Draws for positives: one entry per draw."""

    who: NDArray[np.int64]
    anchor: NDArray[np.int64]
    """The positive's token row."""
    latent: NDArray[np.int64]
    number: NDArray[np.int64]
    seed: int

    def from_span(
        self, stream: int, first: NDArray[np.int64], size: NDArray[np.int64], find: "_Find"
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        row = find(first + integers_below(size, self.seed, stream, self.latent, self.number))
        return self.who, row, row

    def wrong_tokens(
        self, stream: int, index: SplitIndex, held: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        first, last = window_bounds(self.anchor, index.table, index.window)
        row = first + integers_below(last - first + 1, self.seed, stream, self.latent, self.number)
        usable = held[row]
        return self.who[usable], row[usable], self.anchor[usable]


class _Find(Protocol):
    def __call__(self, at: NDArray[np.int64]) -> NDArray[np.int64]: ...


def _draw_positives(
    firings: Firings, latents: NDArray[np.int64], seed: int, n_per_decile: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    """Owner, entry and decile of the positives: a systematic sample of each tenth of the ranks."""
    by = np.lexsort((firings.row, firings.value, firings.latent))  # weakest first
    edges = firings.n_firings[:, None] * np.arange(N_DECILES + 1)[None] // N_DECILES
    size = np.diff(edges, axis=1)
    n_drawn = np.minimum(size, n_per_decile)
    owner, decile = np.divmod(np.repeat(np.arange(n_drawn.size), n_drawn.reshape(-1)), N_DECILES)
    first = np.cumsum(n_drawn.reshape(-1)) - n_drawn.reshape(-1)
    number = np.arange(len(owner)) - np.repeat(first, n_drawn.reshape(-1))
    shift = uniforms(seed, 10, latents[owner], decile)
    step = ((number + shift) * size[owner, decile] / n_drawn[owner, decile]).astype(np.int64)
    rank = edges[owner, decile] + np.minimum(step, size[owner, decile] - 1)
    return owner, by[firings.indptr[owner] + rank], decile.astype(np.int8)


def _draws_per_positive(owner: NDArray[np.int64], n_latents: int, n_negatives: int) -> NDArray[np.int64]:
    n_positives = np.bincount(owner, minlength=n_latents).astype(np.int64)
    return np.asarray(np.minimum(-(-n_negatives // np.maximum(n_positives, 1)), _MAX_DRAWS), np.int64)


def _random_negatives(
    index: SplitIndex, latents: NDArray[np.int64], seed: int, n_negatives: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    n_draws = n_negatives + n_negatives // 4 + 8
    who = np.repeat(np.arange(len(latents)), n_draws)
    number = np.tile(np.arange(n_draws), len(latents))
    row = index.rows[integers_below(np.full(len(who), len(index.rows)), seed, 0, latents[who], number)]
    return who, row, row


def _neighbour_negatives(
    firings: Firings, neighbours: NDArray[np.int64], latents: NDArray[np.int64], seed: int, n_negatives: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    k = neighbours.shape[1]
    if k == 0 or not len(firings.row):
        return (np.zeros(0, np.int64),) * 3
    n_draws = n_negatives + n_negatives // 4 + 8
    who = np.repeat(np.arange(len(latents)), n_draws)
    number = np.tile(np.arange(n_draws), len(latents))
    whose = neighbours[latents[who], integers_below(np.full(len(who), k), seed, 3, latents[who], number)]
    size = firings.n_firings[whose]
    drawn = firings.indptr[whose] + integers_below(size, seed, 5, latents[who], number)
    row = firings.row[np.minimum(drawn, len(firings.row) - 1)]
    fired = size > 0
    return who[fired], row[fired], row[fired]


def _first_distinct(who: NDArray[np.int64], row: NDArray[np.int64], n_tokens: int, limit: int) -> NDArray[np.int64]:
    """Entries without repeats of (who, row), the first `limit` of each `who` in the order drawn."""
    first = np.sort(np.unique(who * n_tokens + row, return_index=True)[1])
    by = first[np.argsort(who[first], kind="stable")]
    owner = who[by]
    begins = np.searchsorted(owner, owner)
    return np.asarray(by[np.arange(len(by)) - begins < limit], np.int64)


def _postings(code: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions ordered by code, and where each code begins."""
    order = np.argsort(code, kind="stable")
    return order, np.searchsorted(code[order], np.arange(int(code.max(initial=-1)) + 2))


def _span(start: NDArray[np.int64], code: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first: NDArray[np.int64] = start[code]
    return first, start[code + 1] - first
