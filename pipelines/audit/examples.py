"""Labelled examples, and which of them are so alike that no split may separate them."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

Role = Literal["positive", "hard_negative", "negative"]
Position = Literal["all", "user", "assistant", "last_prompt_token"]
"""Which tokens of a chat count: all, those that users or the assistant wrote, or the last one before the answer."""

NGRAM = 8
"""Texts of different origin that share so many consecutive words are near duplicates."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One labelled text or chat."""

    text: str
    """The text; of a chat the contents of its messages, one a paragraph: what words and lengths are taken from."""
    role: Role
    group: str
    """Examples of one group (source, template, pair) stay on one side of every split."""
    ood: bool = False
    """Out of distribution: looked at once, after everything else, and never to choose anything."""
    messages: tuple[tuple[str, str], ...] | None = None
    """Role and content of each message, if it is a chat."""
    position: Position = "all"

    @property
    def positive(self) -> bool:
        """Whether the concept is present."""
        return self.role == "positive"

    @property
    def digest(self) -> str:
        """Identity of what the model reads: the first 16 hex digits of a SHA-256; of a chat with its position rule."""
        content = self.text if self.messages is None else json.dumps([self.position, self.messages], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


class Joined(NamedTuple):
    """Examples whose near duplicates share a group, and what was done for that."""

    kept: list[int]
    """Rows of the given examples that are left, ascending."""
    examples: list[Example]
    """Those examples, with their groups."""
    n_joined: int
    """Texts that share a group only because they are near duplicates of another group's text."""
    n_repeated: int
    """Left out: a text that stands there twice with one label counts once."""
    n_contradictory: int
    """Left out: a text that stands there with both labels counts not at all."""
    n_ood_seen: int
    """Left out: out-of-distribution texts that are near duplicates of the others."""


def words(text: str) -> list[str]:
    """Case-folded words, apostrophes kept inside."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.casefold())


def shared_ngrams(texts: Sequence[str], groups: Sequence[str], n: int = NGRAM) -> list[tuple[int, int]]:
    """Pairs of texts from different groups that share n consecutive words (first pair per text): near duplicates."""
    seen: dict[tuple[str, ...], int] = {}
    pairs = []
    for i, text in enumerate(texts):
        for gram in ngrams(text, n):
            j = seen.setdefault(gram, i)
            if groups[j] != groups[i]:
                pairs.append((j, i))
                break
    return pairs


def ngrams(text: str, n: int = NGRAM) -> list[tuple[str, ...]]:
    """The different runs of n consecutive words, in order of appearance."""
    w = words(text)
    return list(dict.fromkeys(tuple(w[k : k + n]) for k in range(len(w) - n + 1)))


def join_near_duplicates(examples: Sequence[Example]) -> Joined:
    """Leave repeated texts out, and put texts that share `NGRAM` consecutive words into one group.

    Joining is transitive: a boilerplate phrase makes one group of everything that holds it, which is what it is worth.
    """
    kept, n_repeated, n_contradictory = _distinct(examples)
    chosen = [examples[i] for i in kept]
    inside = [k for k, e in enumerate(chosen) if not e.ood]
    first: dict[tuple[str, ...], int] = {}
    owner = {chosen[k].group: chosen[k].group for k in inside}

    def root(group: str) -> str:
        while owner[group] != group:
            owner[group] = owner[owner[group]]
            group = owner[group]
        return group

    touched: set[int] = set()
    for k in inside:
        for gram in ngrams(chosen[k].text):
            j = first.setdefault(gram, k)
            if chosen[j].group != chosen[k].group:
                touched |= {j, k}
                low, high = sorted((root(chosen[j].group), root(chosen[k].group)))
                owner[high] = low
    is_new = [not e.ood or not any(gram in first for gram in ngrams(e.text)) for e in chosen]
    out = [
        e if e.ood else replace(e, group=root(e.group)) for e, new in zip(chosen, is_new, strict=True) if new
    ]  # fmt: skip
    return Joined(
        kept=[i for i, new in zip(kept, is_new, strict=True) if new],
        examples=out,
        n_joined=len(touched),
        n_repeated=n_repeated,
        n_contradictory=n_contradictory,
        n_ood_seen=is_new.count(False),
    )


def _distinct(examples: Sequence[Example]) -> tuple[list[int], int, int]:
    """Rows of the first copy of every text whose copies agree; how many copies, and how many contradictions, went."""
    copies: dict[object, list[int]] = {}
    for i, example in enumerate(examples):
        copies.setdefault(_normal(example), []).append(i)
    kept, n_repeated, n_contradictory = [], 0, 0
    for rows in copies.values():
        if len({examples[i].positive for i in rows}) > 1:
            n_contradictory += len(rows)
        else:
            # A copy outside the out-of-distribution set is the one that counts.
            kept.append(min(rows, key=lambda i: (examples[i].ood, i)))
            n_repeated += len(rows) - 1
    return sorted(kept), n_repeated, n_contradictory


def _normal(example: Example) -> object:
    if example.messages is not None:
        return tuple((role, normalised(content)) for role, content in example.messages)
    return normalised(example.text)


def normalised(text: str) -> str:
    """What two copies of a text have in common: their words; of a text without any, its characters."""
    return " ".join(words(text)) or text.strip()
