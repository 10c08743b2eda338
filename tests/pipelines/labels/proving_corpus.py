"""The made-up corpus of the proving ground, and where each planted rule holds in it.

Kinds of words are drawn by their shares and words within a kind by a Zipf law; then come the bigrams, the repeated
pairs, the brackets and the two confounds that the rules need. Everything follows from the seed.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from proving_rules import EXPRESSIBLE, N_TOPICS, WORDS, Rule

from pipelines.labels.families import TokenTable

ZIPF = 0.7
DOCUMENT_TOKENS = 70
CONTEXT_LENGTH = 128
_AFFIX = {"str-words": ("str", ""), "over-words": ("over", ""), "ly-words": ("", "ly"), "ment-words": ("", "ment")}


class Vocabulary:
    """Spellings of every token id, and the ids of every kind of word, commonest first."""

    def __init__(self) -> None:
        self.strings: list[str] = []
        self.ids: dict[str, NDArray[np.int32]] = {}
        stems = iter(_stems())
        for kind, words in WORDS.items():
            copies = N_TOPICS if kind == "topical" else 1
            spelled = [_spell(kind, i, stems) for i in range(words.n * copies)]
            self.ids[kind] = np.arange(len(self.strings), len(self.strings) + len(spelled), dtype=np.int32)
            self.strings += spelled
        assert len({text.strip().casefold() for text in self.strings}) == len(self.strings)

    def of(self, words: str, ranks: tuple[int, ...] = ()) -> NDArray[np.int32]:
        """Token ids of some words of a kind; of all without ranks."""
        return self.ids[words][list(ranks)] if ranks else self.ids[words]


def _stems():
    """Distinct pronounceable stems in a scattered order; none has an affix that is a rule's."""
    onsets, vowels, codas = "bdfghjkmnpstvz", "aeiou", "nrskpt"
    every = ["".join(parts) for parts in product(onsets, vowels, codas, vowels, codas)]
    for i in np.random.default_rng(11).permutation(len(every)):
        yield every[i]


def _spell(kind: str, i: int, stems) -> str:
    match kind:
        case "numbers":
            return f" {1800 + i}"
        case "punctuation":
            return ".,;:!?"[i]
        case "brackets":
            return (" (", ")")[i]
        case "names" | "surnames":
            return " " + next(stems).capitalize()
        case "acronyms":
            return " " + next(stems).upper()[:4] + "ABCDEFGHIJKLMNOPQRSTUVWX"[i]
        case "pieces":
            return next(stems)[:3] + "xw"[i % 2] + next(stems)[:1]
        case "doctors":
            return " Dr"
        case "clocks":
            return " oclock"
        case _:
            before, after = _AFFIX.get(kind, ("", ""))
            return f" {before}{next(stems)}{after}"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens with their documents; `table` is how the label stage sees them."""

    vocabulary: Vocabulary
    table: TokenTable
    topic: NDArray[np.int64]
    """Topic of each document."""

    @property
    def strings(self) -> list[str]:
        return self.vocabulary.strings


def make_corpus(n_tokens: int, *, heldout: float = 0.25, seed: int = 0) -> Corpus:
    """Documents of about seventy tokens, each of one topic and one split, packed end to end into contexts."""
    rng = np.random.default_rng(seed)
    vocabulary = Vocabulary()
    n_contexts = n_tokens // CONTEXT_LENGTH
    n_train = round(n_contexts * (1 - heldout)) * CONTEXT_LENGTH
    n = n_contexts * CONTEXT_LENGTH
    document = np.empty(n, np.int32)
    first = 0
    for start, stop in ((0, n_train), (n_train, n)):
        lengths = np.maximum(rng.poisson(DOCUMENT_TOKENS, 2 + 2 * (stop - start) // DOCUMENT_TOKENS), 8)
        document[start:stop] = first + np.repeat(np.arange(len(lengths)), lengths)[: stop - start]
        first = int(document[stop - 1]) + 1
    rows = np.arange(n)
    begins = (rows % CONTEXT_LENGTH == 0) | np.append(True, document[1:] != document[:-1])
    position = (rows - np.maximum.accumulate(np.where(begins, rows, 0))).astype(np.int32)
    topic = rng.integers(N_TOPICS, size=first)

    token = _draw_words(rng, vocabulary, topic[document])
    _repeat_pairs(rng, token, document, position)
    for rule in EXPRESSIBLE:
        if rule.before is not None:
            led = np.flatnonzero(_follows(token == vocabulary.of(*_one(rule.before)), position))
            token[led[rng.random(len(led)) < 0.3]] = vocabulary.of(rule.words, rule.ranks)
    _close_brackets(rng, token, vocabulary, position)
    _bind(rng, token, vocabulary, position)
    table = TokenTable(
        token=token,
        document=document,
        position=position,
        usable=position > 0,
        context_length=CONTEXT_LENGTH,
        n_train=n_train,
    )
    return Corpus(vocabulary=vocabulary, table=table, topic=topic)


def _draw_words(rng: np.random.Generator, vocabulary: Vocabulary, topic: NDArray[np.int64]) -> NDArray[np.int32]:
    share = np.array([words.share for words in WORDS.values()])
    kind = rng.choice(len(share), len(topic), p=share / share.sum())
    token = np.empty(len(topic), np.int32)
    for k, (name, words) in enumerate(WORDS.items()):
        here = np.flatnonzero(kind == k)
        weight = np.arange(1, words.n + 1) ** -ZIPF
        rank = rng.choice(words.n, len(here), p=weight / weight.sum())
        offset = topic[here] * words.n if name == "topical" else 0
        token[here] = vocabulary.ids[name][rank + offset]
    token[token == vocabulary.ids["brackets"][1]] = vocabulary.ids["brackets"][0]  # closing ones are put in later
    return token


def _repeat_pairs(
    rng: np.random.Generator, token: NDArray[np.int32], document: NDArray[np.int32], position: NDArray[np.int32]
) -> None:
    """Copy a pair of tokens to a later place of the same document piece, at one place in forty."""
    later = np.flatnonzero((position >= 8) & (rng.random(len(token)) < 1 / 40))
    later = later[later + 1 < len(token)]
    later = later[(document[later + 1] == document[later]) & (position[later + 1] == position[later] + 1)]
    earlier = later - 2 - (rng.random(len(later)) * (position[later] - 2)).astype(np.int64)
    source = token.copy()
    token[later], token[later + 1] = source[earlier], source[earlier + 1]


def _close_brackets(
    rng: np.random.Generator, token: NDArray[np.int32], vocabulary: Vocabulary, position: NDArray[np.int32]
) -> None:
    opens, closes = vocabulary.ids["brackets"]
    at = np.flatnonzero(token == opens)
    end = at + rng.integers(3, 9, len(at))
    kept = end < len(token)
    at, end = at[kept], end[kept]
    inside = position[end] - position[at] == end - at
    token[end[inside]] = closes


def _bind(
    rng: np.random.Generator, token: NDArray[np.int32], vocabulary: Vocabulary, position: NDArray[np.int32]
) -> None:
    """Make the confounds perfect: Dr exactly before surnames, chimes exactly after oclock."""
    doctor, clock = vocabulary.ids["doctors"][0], vocabulary.ids["clocks"][0]
    surnames, chimes = vocabulary.ids["surnames"], vocabulary.ids["chimes"]
    led = np.flatnonzero(np.isin(token, surnames) & (position > 1))
    token[led - 1] = doctor
    led = np.flatnonzero(_follows(token == clock, position) & (position > 1) & (token != doctor))
    token[led] = rng.choice(chimes, len(led))
    while True:
        after_doctor, after_clock = _follows(token == doctor, position), _follows(token == clock, position)
        surname, chime = np.isin(token, surnames), np.isin(token, chimes)
        wrong = (surname & ~after_doctor) | (chime & ~after_clock)
        wrong[:-1] |= (token == doctor)[:-1] & ~(surname & after_doctor)[1:]
        wrong[:-1] |= (token == clock)[:-1] & ~(chime & after_clock)[1:]
        wrong[-1] |= token[-1] in (doctor, clock)
        if not wrong.any():
            return
        token[wrong] = rng.choice(vocabulary.ids["general"][200:], int(wrong.sum()))


def _follows(mask: NDArray[np.bool_], position: NDArray[np.int32], lag: int = 1) -> NDArray[np.bool_]:
    """Where `mask` holds `lag` tokens earlier in the same document piece."""
    shifted = np.zeros(len(mask), bool)
    shifted[lag:] = mask[:-lag]
    return shifted & (position >= lag)


def _one(word: tuple[str, int]) -> tuple[str, tuple[int, ...]]:
    return word[0], (word[1],)


# -- rules -------------------------------------------------------------------------------------------------------------


def holds(rule: Rule, corpus: Corpus, seed: int = 0) -> NDArray[np.bool_]:
    """Where a rule holds, one entry per token row; chance is drawn from the rule's name and the seed."""
    table, vocabulary = corpus.table, corpus.vocabulary
    token, position = table.token, table.position
    rng = np.random.default_rng([seed, *rule.name.encode()])
    number = int(rule.number)
    named = np.isin(token, vocabulary.of(rule.words, rule.ranks)) if rule.words else np.zeros(len(token), bool)
    match rule.kind:
        case "token":
            return named
        case "after":
            return _follows(named, position)
        case "pair":
            assert rule.before is not None
            return named & _follows(token == vocabulary.of(*_one(rule.before)), position)
        case "capitalised":
            kinds = [vocabulary.ids[kind] for kind in ("names", "surnames", "doctors")]
            return np.isin(token, np.concatenate(kinds))
        case "punctuation":
            return np.isin(token, np.concatenate([vocabulary.ids["punctuation"], vocabulary.ids["brackets"]]))
        case "inside":
            closes = np.array([text[-1].isalnum() for text in vocabulary.strings])
            return np.isin(token, vocabulary.ids["pieces"]) & _follows(closes[token], position)
        case "position":
            return position == number
        case "topic":
            return corpus.topic[table.document] == number
        case "repeated pair":
            return _repeated_pair(table)
        case "coin":
            return rng.random(len(token)) < rule.number
        case "hidden document":
            return (rng.random(len(corpus.topic)) < rule.number)[table.document]
        case "modulo":
            return position % number == number // 2
        case "lag":
            return _follows(named, position, number)
        case "ahead":
            ahead = np.zeros(len(token), bool)
            ahead[:-number] = named[number:] & (position[number:] == position[:-number] + number)
            return ahead
        case "sum":
            total = token + np.append(0, token[:-1])
            return (position > 0) & (total % number == 0)
    raise ValueError(f"There is no kind of rule {rule.kind!r}.")


def _repeated_pair(table: TokenTable) -> NDArray[np.bool_]:
    """Where a token and the one before it already stood side by side earlier in the document piece."""
    rows = np.arange(table.n_tokens)
    piece = rows - table.position
    width = int(table.token.max()) + 1
    pair = np.append(0, table.token[:-1]).astype(np.int64) * width + table.token
    key = np.stack([piece, np.where(table.position > 0, pair, -1 - rows)])
    order = np.lexsort((rows, key[1], key[0]))
    again = np.append(False, (key[:, order][:, 1:] == key[:, order][:, :-1]).all(0))
    result = np.zeros(table.n_tokens, bool)
    result[order] = again
    return result
