"""Categorical views of a token: the vocabulary in which a label may be stated.

A family gives every token of the corpus one category. A label is a set of categories of one family, so it can be run
on any text:

    token      the token, case-folded and stripped of white space        ' Battalion', ' battalion' -> battalion
    word       the word so far: the pieces since the word began, joined   ' batt', 'alion' -> battalion
    previous   the token before this one
    shape      capitalised word, number, punctuation, inside a word …
    position   distance from the start of the document piece

A causal model cannot know more of a word than has been read, hence the word *so far*. A new kind of label (topic,
part of speech) is one more family: an integer per token and a name per category.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FAMILY_NAMES = ("token", "word", "previous", "shape", "position")
SHAPES = (
    "capitalised words",
    "lower-case words",
    "words in capitals",
    "pieces inside a word",
    "numbers",
    "punctuation",
    "white space",
    "other symbols",
)
_CAPITALISED, _LOWER, _CAPITALS, _INSIDE, _NUMBER, _PUNCTUATION, _SPACE, _OTHER = range(len(SHAPES))
_POSITION_EDGES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)
_MAX_PIECES = 8


class Family(NamedTuple):
    """One categorical view: `code[t]` is the category of token `t`, `names[c]` how category `c` reads."""

    name: str
    code: NDArray[np.int32]
    names: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """The corpus, one entry per token row (row = context * context_length + offset).

    Rows before `n_train` belong to train documents, the rest to held-out ones; the two share no document.
    """

    token: NDArray[np.int32]
    document: NDArray[np.int32]
    """Row of the document table; negative for padding."""
    position: NDArray[np.int32]
    """Distance from the start of the document piece."""
    usable: NDArray[np.bool_]
    """False for attention sinks and padding: such tokens take no part in fitting or scoring."""
    context_length: int
    n_train: int

    def __post_init__(self) -> None:
        n = len(self.token)
        sizes = {"document": len(self.document), "position": len(self.position), "usable": len(self.usable)}
        if any(size != n for size in sizes.values()):
            raise ValueError(
                f"Every column needs one entry per token: token has {n}, {sizes}. Rebuild the table from one store."
            )
        if self.context_length < 1 or n % self.context_length:
            raise ValueError(
                f"{n} tokens are not whole contexts of {self.context_length}. Pass the store's context length."
            )
        shared = np.intersect1d(self._documents(0, self.n_train), self._documents(self.n_train, n))
        if len(shared):
            raise ValueError(
                f"Train and held-out tokens must not share documents, but {len(shared)} are in both (first: row "
                f"{shared[0]}). A label would be tested on text it was fitted to; give each document one split before "
                "packing."
            )
        for split, start, stop in (("train", 0, self.n_train), ("held-out", self.n_train, n)):
            found = len(self._documents(start, stop))
            if found < 2:
                raise ValueError(
                    f"Labels need at least 2 {split} documents with usable tokens, but there are {found}. "
                    "Collect more text or change the held-out share."
                )

    def _documents(self, start: int, stop: int) -> NDArray[np.int32]:
        return np.unique(self.document[start:stop][self.usable[start:stop]])

    @property
    def n_tokens(self) -> int:
        return len(self.token)

    @cached_property
    def piece_end(self) -> NDArray[np.int64]:
        """Last token row of the document piece of each token; a piece ends with its context at the latest."""
        row = np.arange(self.n_tokens)
        ends = np.ones(self.n_tokens, bool)
        follows = (self.document[1:] == self.document[:-1]) & (self.position[1:] == self.position[:-1] + 1)
        ends[:-1] = ~follows | (row[1:] % self.context_length == 0)
        return np.asarray(np.minimum.accumulate(np.where(ends, row, self.n_tokens)[::-1])[::-1], np.int64)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Usable token rows of `train` or `heldout`, ascending."""
        if split not in ("train", "heldout"):
            raise ValueError(f"A split is 'train' or 'heldout', got {split!r}.")
        start, stop = (0, self.n_train) if split == "train" else (self.n_train, self.n_tokens)
        return start + np.flatnonzero(self.usable[start:stop])


def build_families(table: TokenTable, token_strings: Sequence[str]) -> list[Family]:
    """The families of the module docstring, in the order of `FAMILY_NAMES`.

    Args:
        token_strings: readable text of every token id, a leading space kept.

    Raises:
        ValueError: a token id has no string.
    """
    largest = int(table.token.max(initial=0))
    if largest >= len(token_strings):
        raise ValueError(
            f"Every token id needs a string, but the store holds id {largest} and the tokenizer has "
            f"{len(token_strings)}. Label with the tokenizer that the store was collected with."
        )
    form, form_names = _forms(table.token, token_strings)
    has_previous = (table.position > 0) & (np.arange(table.n_tokens) % table.context_length > 0)
    inside = _inside_word(table.token, has_previous, token_strings)
    word, word_names = _words_so_far(form[table.token], inside, form_names)

    no_previous = len(form_names)
    previous = np.full(table.n_tokens, no_previous, np.int32)
    previous[1:] = np.where(has_previous[1:], form[table.token[:-1]], no_previous)

    shape = np.array([_shape(text) for text in token_strings], np.int32)[table.token]
    shape[inside & np.isin(shape, (_CAPITALISED, _LOWER, _CAPITALS))] = _INSIDE

    position = np.digitize(table.position, _POSITION_EDGES).astype(np.int32)
    edges = (0, *_POSITION_EDGES)
    spans = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(edges)]
    position_names = [*spans, f"{_POSITION_EDGES[-1]} and later"]
    return [
        Family("token", form[table.token], form_names),
        Family("word", word, word_names),
        Family("previous", previous, [*form_names, "the start of a document"]),
        Family("shape", shape, SHAPES),
        Family("position", position, position_names),
    ]


def _forms(token: NDArray[np.int32], token_strings: Sequence[str]) -> tuple[NDArray[np.int32], list[str]]:
    """Form of every vocabulary id, and for each form its commonest spelling in the corpus.

    Tokens that are part of a character all read as the replacement character; each keeps a form of its own.
    """
    spelling_count = np.bincount(token, minlength=len(token_strings))
    form_of: dict[str, int] = {}
    form = np.empty(len(token_strings), np.int32)
    names: list[str] = []
    name_count: list[int] = []
    for token_id, text in enumerate(token_strings):
        text = f"<bytes {token_id}>" if "\ufffd" in text else text
        index = form_of.setdefault(text.strip().casefold() or text, len(form_of))
        form[token_id] = index
        if index == len(names):
            names.append(text)
            name_count.append(int(spelling_count[token_id]))
        elif spelling_count[token_id] > name_count[index]:
            names[index] = text
            name_count[index] = int(spelling_count[token_id])
    return form, names


def _inside_word(
    token: NDArray[np.int32], has_previous: NDArray[np.bool_], token_strings: Sequence[str]
) -> NDArray[np.bool_]:
    """Whether each token continues the word of the token before it: both sides of the seam are letters or digits."""
    opens = np.array([text[:1].isalnum() for text in token_strings], bool)
    closes = np.array([text[-1:].isalnum() for text in token_strings], bool)
    inside = has_previous.copy()
    inside[1:] &= opens[token[1:]] & closes[token[:-1]]
    inside[:1] = False
    return inside


def _words_so_far(
    form: NDArray[np.int32], inside: NDArray[np.bool_], form_names: Sequence[str]
) -> tuple[NDArray[np.int32], list[str]]:
    """Code and spelling of the word up to each token; a word of more than `_MAX_PIECES` pieces starts anew there."""
    rows = np.arange(len(form))
    start = np.maximum.accumulate(np.where(inside, 0, rows))
    depth = (rows - start) % _MAX_PIECES
    code = form.astype(np.int32)
    names = list(form_names)
    for pieces in range(1, _MAX_PIECES):
        here = np.flatnonzero(depth == pieces)
        if not len(here):
            break
        pair = code[here - 1].astype(np.int64) * len(form_names) + form[here]
        unique, index = np.unique(pair, return_inverse=True)
        code[here] = len(names) + index.reshape(-1)
        names += [names[p // len(form_names)] + form_names[p % len(form_names)].strip() for p in unique.tolist()]
    return code, names


def _shape(text: str) -> int:
    word = text.strip()
    if not word:
        return _SPACE
    if word.isdigit():
        return _NUMBER
    if word.isalpha():
        if word.isupper() and len(word) > 1:
            return _CAPITALS
        return _CAPITALISED if word[0].isupper() else _LOWER
    if all(character.isascii() and not character.isalnum() for character in word):
        return _PUNCTUATION
    return _OTHER
