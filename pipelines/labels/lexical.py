"""A judge for labels in plain words where there is no language model: do the label's words occur in the text?

    window    yes if one of the label's content words occurs in it
    token     yes if the word that the token belongs to is one of them

Content words are the label's words without stop words and without the words by which labels speak about labels
("tokens", "references to"); case and a plural's s do not count. It knows no meaning: a label that paraphrases fails
here, which says little about the label. Rows judged so say `lexical`. A label without content words gets no answer.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.families import TokenTable
from pipelines.labels.testset import window_bounds

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_STOP_WORDS = """
a about after all also an and any are as at be been before being between both but by can could did do does for from had
has have he her his how i if in into is it its just like may more most not of off on one only or other our out over own
same she should so some such than that the their them then there these they this those through to too under up very was
we were what when where which while who whose will with within without would you your
"""
_TALK_WORDS = """
activate activating associated beginning character common concept contain containing context denote describe describing
discussion discussing eg end ending especially etc expression feature fire following form ie immediately include
including indicate indicating instance kind latent letter mark mention neuron occurrence often part particular
particularly passage pattern phrase place preceding prefix previous reference refer referring related relating respond
sentence sequence specific specifically start starting string suffix term text token topic type use used usage variant
various word
"""


def stem(word: str) -> str:
    """A word without case and without a plural's s."""
    word = re.sub(r"['’]s$", "", word.casefold())
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


_SILENT = {stem(word) for word in (_STOP_WORDS + _TALK_WORDS).split()}


def content_words(label: str) -> frozenset[str]:
    """Stems of the words that say something."""
    stems = {stem(word) for word in _WORD.findall(label)}
    return frozenset(stems - _SILENT)


class LexicalJudge:
    """Answers questions about token rows by the words of labels."""

    def __init__(self, table: TokenTable, token_strings: Sequence[str], rows: NDArray[np.int64], window: int) -> None:
        """Takes 4 bytes per token of the table.

        Args:
            rows: token rows that questions may be about, ascending; the pieces of documents around them are read.
            window: tokens on each side of the middle of a window.
        """
        self._table, self._window = table, window
        self._index: dict[str, int] = {}
        self._word = np.full(table.n_tokens, -1, np.int32)
        covered = -1
        for row in rows.tolist():
            if row <= covered:
                continue
            first = row - min(int(table.position[row]), row % table.context_length)
            covered = int(table.piece_end[row])
            self._read(first, covered, token_strings)

    def windows(
        self, labels: Sequence[str], label: NDArray[np.int64], centre: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """1 or 0 for each window: does `labels[label]` hold in it? NaN for a label without content words.

        Args:
            label: index into `labels` of each question.
            centre: token row in the middle of each window.
        """
        first, last = window_bounds(centre, self._table, self._window)
        row = first[:, None] + np.arange(2 * self._window + 1)[None]
        word = np.where(row <= last[:, None], self._word[np.minimum(row, self._table.n_tokens - 1)], -1)
        return self._holds(labels, label, word)

    def tokens(self, labels: Sequence[str], label: NDArray[np.int64], row: NDArray[np.int64]) -> NDArray[np.float32]:
        """The same for single tokens."""
        return self._holds(labels, label, self._word[row][:, None])

    def _holds(self, labels: Sequence[str], label: NDArray[np.int64], word: NDArray[np.int32]) -> NDArray[np.float32]:
        """Does one of the label's words stand among `word[i]`, for each question i?"""
        width = len(self._index) + 1
        codes, empty = [], np.zeros(len(labels), bool)
        for i, text in enumerate(labels):
            words = content_words(text)
            empty[i] = not words
            codes += [i * width + self._index[w] for w in words if w in self._index]
        wanted = label[:, None] * width + word
        found = np.isin(wanted, np.array(sorted(codes), np.int64)) & (word >= 0)
        return np.where(empty[label], np.float32(np.nan), found.any(1).astype(np.float32))

    def _read(self, first: int, last: int, token_strings: Sequence[str]) -> None:
        """Note for each token of a piece the last word that it takes part in."""
        pieces = [token_strings[token] for token in self._table.token[first : last + 1].tolist()]
        ends = np.cumsum([len(piece) for piece in pieces])
        for match in _WORD.finditer("".join(pieces)):
            code = self._index.setdefault(stem(match[0]), len(self._index))
            begin = int(np.searchsorted(ends, match.start(), side="right"))
            stop = int(np.searchsorted(ends, match.end() - 1, side="right"))
            self._word[first + begin : first + stop + 1] = code
