"""Categorical views of a token: the vocabulary in which a label may be stated.

A family gives every token of the corpus one category. A label is a set of categories of one family, so it can be run
on any text:

    token      the token, case-folded and stripped of white space        ' Battalion', ' battalion' -> battalion
    word       the word so far: the pieces since the word began, joined   ' batt', 'alion' -> battalion
    previous   the token before this one
    earlier    the token two before this one
    pair       the token before this one and this one
    start      the first three characters of the word so far
    end2, end3, end4    its last characters
    shape      capitalised word, number, punctuation, inside a word …
    position   distance from the start of the document piece
    meaning1024, meaning256, previous_meaning    groups of tokens that mean alike, see `meanings`
    repeated   whether the token, or the pair, stood before in the document piece (what induction reads)
    topic      of the document, where the text came with topics

A causal model cannot know more of a word than has been read, hence the word *so far*. A new kind of label (part of
speech) is one more family: an integer per token and a name per category.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.meanings import SIZES, cluster_forms

DOCUMENT_START = "the start of a document"
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
REPEATS = ("a token that is new in the document", "a token seen before", "a pair of tokens seen before")
_TOO_SHORT = "a word that is too short"


class Family(NamedTuple):
    """One categorical view: `code[t]` is the category of token `t`, `names[c]` how category `c` reads."""

    name: str
    code: NDArray[np.int32]
    names: Sequence[str]
    of_form: tuple[str, NDArray[np.int32]] | None = None
    """Set where a category is a group of categories of another view: that view and the group of each of them."""


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
    topic: NDArray[np.int16] | None = None
    """Index into `topics` of each token's document; None where the text has none."""
    topics: Sequence[str] = ()

    def __post_init__(self) -> None:
        n = len(self.token)
        sizes = {"document": len(self.document), "position": len(self.position), "usable": len(self.usable)}
        if self.topic is not None:
            sizes["topic"] = len(self.topic)
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


def build_families(
    table: TokenTable, token_strings: Sequence[str], W_U: Float[Tensor, "d_model vocab"] | None = None
) -> list[Family]:
    """The families of the module docstring, the plainest first.

    Args:
        token_strings: readable text of every token id, a leading space kept.
        W_U: unembedding; None leaves the families of meaning out.

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

    own = form[table.token].astype(np.int32)
    no_token = len(form_names)
    previous = _lagged(own, has_previous, 1, no_token)
    has_earlier = has_previous.copy()
    has_earlier[1:] &= has_previous[:-1]
    forms = [*form_names, DOCUMENT_START]
    pair, pair_names = _pairs(previous, own, forms)

    shape = np.array([_shape(text) for text in token_strings], np.int32)[table.token]
    shape[inside & np.isin(shape, (_CAPITALISED, _LOWER, _CAPITALS))] = _INSIDE

    position = np.digitize(table.position, _POSITION_EDGES).astype(np.int32)
    edges = (0, *_POSITION_EDGES)
    spans = [f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in pairwise(edges)]
    position_names = [*spans, f"{_POSITION_EDGES[-1]} and later"]
    families = [
        Family("token", own, form_names),
        Family("word", word, word_names),
        Family("previous", previous, forms),
        Family("earlier", _lagged(own, has_earlier, 2, no_token), forms),
        Family("pair", pair, pair_names),
        *(_affixes(word, word_names, name, cut) for name, cut in _AFFIXES.items()),
        Family("shape", shape, SHAPES),
        Family("position", position, position_names),
        Family("repeated", _repeated(own, pair, table), REPEATS),
    ]
    if W_U is not None:
        count = np.bincount(own, minlength=len(forms))
        for size in SIZES:
            of_form, names = cluster_forms(form, form_names, count[:-1], W_U, size)
            of_form = np.append(of_form, of_form.max(initial=0)).astype(np.int32)
            families.append(Family(f"meaning{size}", of_form[own], names, ("token", of_form)))
            if size == SIZES[-1]:
                families.append(Family("previous_meaning", of_form[previous], names, ("previous", of_form)))
    if table.topic is not None:
        families.append(Family("topic", table.topic.astype(np.int32), table.topics))
    return families


_AFFIXES = {"start": slice(3), "end2": slice(-2, None), "end3": slice(-3, None), "end4": slice(-4, None)}


class PairNames(Sequence[str]):
    """Names of pairs of forms, spelled when they are asked for: there are many."""

    def __init__(self, pairs: NDArray[np.int64], forms: Sequence[str]) -> None:
        self._pairs, self._forms = pairs, forms

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, second = divmod(int(self._pairs[index]), len(self._forms))
        before = self._forms[first]
        return f"{'' if before == DOCUMENT_START else before}{self._forms[second]}"


def _lagged(own: NDArray[np.int32], known: NDArray[np.bool_], lag: int, otherwise: int) -> NDArray[np.int32]:
    code = np.full(len(own), otherwise, np.int32)
    code[lag:] = np.where(known[lag:], own[:-lag], otherwise)
    return code


def _pairs(
    previous: NDArray[np.int32], own: NDArray[np.int32], forms: Sequence[str]
) -> tuple[NDArray[np.int32], PairNames]:
    unique, index = np.unique(previous.astype(np.int64) * len(forms) + own, return_inverse=True)
    return index.reshape(-1).astype(np.int32), PairNames(unique, forms)


def _affixes(word: NDArray[np.int32], names: Sequence[str], name: str, cut: slice) -> Family:
    """The beginnings or ends of words, of those alone that are longer."""
    least = abs(cut.start or cut.stop)
    known: dict[str, int] = {_TOO_SHORT: 0}
    of_word = np.zeros(len(names), np.int32)
    for i, text in enumerate(names):
        text = text.strip().casefold()
        if len(text) > least and text.isalpha():
            of_word[i] = known.setdefault(text[cut], len(known))
    return Family(name, of_word[word], list(known))


def _repeated(own: NDArray[np.int32], pair: NDArray[np.int32], table: TokenTable) -> NDArray[np.int32]:
    """0, 1 or 2 as in `REPEATS`."""
    rows = np.arange(table.n_tokens)
    piece = rows - np.minimum(table.position, rows % table.context_length)
    starts = piece == rows
    again = _seen_before(piece, own)
    # The pair of a piece's first token reaches over its edge.
    both = _seen_before(piece, np.where(starts, -1 - rows, pair))
    return np.where(both, 2, np.where(again, 1, 0)).astype(np.int32)


def _seen_before(piece: NDArray[np.int64], code: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    order = np.lexsort((np.arange(len(code)), code, piece))
    result = np.zeros(len(code), bool)
    result[order[1:]] = (piece[order[1:]] == piece[order[:-1]]) & (code[order[1:]] == code[order[:-1]])
    return result


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
