"""What a document has spoken of so far: the content words that occurred earlier in a token's document piece.

A document is about many words at a time, so these are no categories (see `families`) but a set per token. The piece of
a document that stands in one context is what the model sees, hence the unit here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.families import Family, TokenTable
from pipelines.labels.lexical import STOP_WORDS

NAME = "mentions"
_LEAST_LETTERS = 3
_LARGEST_SHARE = 0.1
"""A word that more than this share of the pieces holds says little about them."""


class Mentions(NamedTuple):
    """First occurrences of words in document pieces, ordered by piece and by word."""

    names: Sequence[str]
    piece: NDArray[np.int32]
    """Number of the document piece of every token row."""
    indptr: NDArray[np.int64]
    """Entries of piece i are `word[indptr[i]:indptr[i + 1]]` and `row[...]`."""
    word: NDArray[np.int32]
    row: NDArray[np.int64]
    """Token row at which the word is complete for the first time in its piece."""
    by_word: NDArray[np.int64]
    """Entries ordered by word."""
    word_indptr: NDArray[np.int64]
    """Entries of word w are `by_word[word_indptr[w]:word_indptr[w + 1]]`."""

    def before(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Words that occurred earlier than each row: index into `rows` (ascending) and word of each entry."""
        piece = self.piece[rows]
        size = self.indptr[piece + 1] - self.indptr[piece]
        which = np.repeat(np.arange(len(rows)), size)
        entry = np.arange(len(which)) - np.repeat(np.cumsum(size) - size, size) + self.indptr[piece][which]
        kept = self.row[entry] < rows[which]
        return which[kept], self.word[entry[kept]]

    def hold(self, words: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether one of the words occurred earlier than each row, in its piece."""
        entry = np.concatenate([self.by_word[self.word_indptr[w] : self.word_indptr[w + 1]] for w in words.tolist()])
        first = np.full(len(self.indptr) - 1, np.iinfo(np.int64).max)
        np.minimum.at(first, self.piece[self.row[entry]], self.row[entry])
        return np.asarray(first[self.piece[rows]] < rows, bool)


def find_mentions(table: TokenTable, words: Family, *, min_pieces: int = 1) -> Mentions:
    """Index the content words of a table.

    Args:
        words: the family `word`.
        min_pieces: pieces that a word must stand in.
    """
    rows = np.arange(table.n_tokens)
    start = rows - np.minimum(table.position, rows % table.context_length)
    piece = np.unique(start, return_inverse=True)[1].reshape(-1).astype(np.int32)
    n_pieces = int(piece.max(initial=-1)) + 1

    spoken = np.array([_is_content(text) for text in words.names], bool)
    # A word is complete where the next token does not carry it on; the word so far then begins anew.
    carried = np.zeros(table.n_tokens, bool)
    opened = np.array([text[:1].isspace() for text in words.names], bool)
    carried[:-1] = (piece[1:] == piece[:-1]) & ~opened[words.code[1:]] & spoken[words.code[1:]]
    whole = np.flatnonzero(spoken[words.code] & ~carried)

    stem: dict[str, int] = {}
    names: list[str] = []
    of_word = np.full(len(words.names), -1, np.int64)
    for code in np.unique(words.code[whole]).tolist():
        text = words.names[code].strip()
        of_word[code] = stem.setdefault(text.casefold(), len(stem))
        if of_word[code] == len(names):
            names.append(text)
    key = piece[whole].astype(np.int64) * max(len(names), 1) + of_word[words.code[whole]]
    unique, first = np.unique(key, return_index=True)  # the first of equal keys, so the first row
    found_piece, word = np.divmod(unique, max(len(names), 1))
    count = np.bincount(word, minlength=len(names))
    kept = (count >= min_pieces) & (count <= max(_LARGEST_SHARE * n_pieces, min_pieces))
    renumbered = np.cumsum(kept) - 1
    chosen = kept[word]
    found_piece, word, row = found_piece[chosen], renumbered[word[chosen]], whole[first[chosen]]
    by_word = np.argsort(word, kind="stable")
    n_words = int(kept.sum())
    return Mentions(
        [name for name, keep in zip(names, kept.tolist(), strict=True) if keep],
        piece,
        np.searchsorted(found_piece, np.arange(n_pieces + 1)),
        word.astype(np.int32),
        row,
        by_word,
        np.searchsorted(word[by_word], np.arange(n_words + 1)),
    )


_STOP = frozenset(STOP_WORDS.split())


def _is_content(text: str) -> bool:
    word = text.strip().casefold()
    return len(word) >= _LEAST_LETTERS and word.isalpha() and word not in _STOP
