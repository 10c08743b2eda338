"""Stand-ins for the token that a label reads, in texts that end where the latent fires.

The *trigger* of a label is the token that it reads: the nearest one, at most `_FARTHEST` before the last, whose swap
for a token of like frequency makes the label false in more than half of the latent's texts. Swaps are tried on the
label, not on the model: what the label says must change is then changed in the model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.families import TokenTable
from pipelines.labels.rerun import Text

_FARTHEST = 3
_CANDIDATES = 8
_SCANNED = 4096
"""Commonest tokens of the corpus that are tried in a label of which too few texts are at hand."""


Holds = Callable[[NDArray[np.int64], Sequence[Text]], NDArray[np.bool_]]
"""Runs labels: whether that of `latents[i]` holds at the last token of `texts[i]`; False without a label."""


class Corpus(NamedTuple):
    """What edits are made from."""

    table: TokenTable
    strings: Sequence[str]
    """Readable text of every token id."""
    anchor: int
    """Token that stands first in a shortened text, where attention sinks."""
    counts: NDArray[np.int64]
    """Usable train tokens of every id."""
    form: NDArray[np.int64]
    """Number of the id's text without case and white space."""
    opens: NDArray[np.bool_]
    """Whether the id's text begins with white space."""

    @classmethod
    def of(cls, table: TokenTable, strings: Sequence[str], anchor: int) -> "Corpus":
        """From a table and the texts of its token ids."""
        counts = np.bincount(table.token[table.rows("train")], minlength=len(strings))
        form = np.unique([text.strip().casefold() for text in strings], return_inverse=True)[1].reshape(-1)
        opens = np.array([text[:1].isspace() for text in strings], bool)
        return cls(table, strings, anchor, counts, form, opens)


class Swapped(NamedTuple):
    """Edited texts: `texts[j]` is an edit of base text `which[j]`, and `said[j]` says which."""

    texts: list[Text]
    which: NDArray[np.int64]
    said: list[str]


class Swaps:
    """Stand-ins for the trigger token of base texts."""

    def __init__(
        self,
        corpus: Corpus,
        base: Sequence[Text],
        latents: NDArray[np.int64],
        rows: Sequence[int],
        holds: Holds,
        seed: int,
    ) -> None:
        """Args:
        base: texts whose last token is a firing of `latents[i]`, at token row `rows[i]`.
        """
        self._corpus, self._base, self._latents, self._holds = corpus, base, latents, holds
        self._rows, self._seed = rows, seed
        self._labelled = holds(latents, base)
        seen = np.flatnonzero(corpus.counts)
        self._by_count = seen[np.argsort(corpus.counts[seen], kind="stable")]

    def trigger(self) -> dict[int, int]:
        """By latent: how many tokens before the last one its label reads. Latents without such a token are left out."""
        found: dict[int, int] = {}
        for before in range(_FARTHEST + 1):
            open_ = [i for i in self._usable(before) if int(self._latents[i]) not in found]
            edited = [self._put(i, before, self._alike(i, before)[0]) for i in open_]
            false = ~self._holds(self._latents[open_], edited) if open_ else np.zeros(0, bool)
            for latent in np.unique(self._latents[open_]).tolist():
                if false[self._latents[open_] == latent].mean() > 0.5:
                    found[latent] = before
        return found

    def make(self, name: str, trigger: dict[int, int]) -> Swapped:
        """The first stand-in of each base text with which its label still holds (`same`), or does not (`other`)."""
        options: list[tuple[int, int, int]] = []  # base text, place before the last token, stand-in
        members = {latent: self._members(latent, trigger[latent]) for latent in trigger} if name == "same" else {}
        for before in range(_FARTHEST + 1):
            for i in self._usable(before):
                latent = int(self._latents[i])
                if trigger.get(latent) == before:
                    stand_ins = self._alike(i, before) if name == "other" else self._fitting(i, before, members[latent])
                    options += [(i, before, token) for token in stand_ins]
        texts = [self._put(*option) for option in options]
        which = np.array([option[0] for option in options], np.int64)
        holds = self._holds(self._latents[which], texts) if options else np.zeros(0, bool)
        fits = np.flatnonzero(holds == (name == "same"))
        chosen = fits[np.unique(which[fits], return_index=True)[1]].tolist()
        said = [
            f"{self._spell(int(self._base[i][-1 - before]))} → {self._spell(token)}"
            for i, before, token in (options[j] for j in chosen)
        ]
        return Swapped([texts[j] for j in chosen], which[chosen], said)

    def _usable(self, before: int) -> list[int]:
        """Base texts whose label holds and that have such a token, the first one (a sink) excepted."""
        return [i for i in np.flatnonzero(self._labelled).tolist() if len(self._base[i]) > before + 1]

    def _rng(self, i: int, before: int) -> np.random.Generator:
        """Of one text and place, so that a latent's swaps do not depend on which others are tested with it."""
        return np.random.default_rng([self._seed, int(self._latents[i]), self._rows[i], before])

    def _put(self, i: int, before: int, token: int) -> Text:
        text = self._base[i].copy()
        text[-1 - before] = token
        return text

    def _alike(self, i: int, before: int) -> list[int]:
        """Other tokens of like frequency that open a word if this one does, at most `_CANDIDATES`."""
        token = int(self._base[i][-1 - before])
        counts = self._corpus.counts[self._by_count]
        low, high = np.searchsorted(counts, [self._corpus.counts[token] / 2, self._corpus.counts[token] * 2 + 1])
        wide = slice(max(0, low - 16), high + 16)  # never empty, however rare or common the token is
        near = self._by_count[wide]
        near = near[(self._corpus.opens[near] == self._corpus.opens[token]) & self._differs(near, token)]
        if not len(near):
            near = self._by_count[self._differs(self._by_count, token)]
        return [int(t) for t in self._rng(i, before).permutation(near)[:_CANDIDATES]]

    def _members(self, latent: int, before: int) -> NDArray[np.int64]:
        """Tokens for the trigger's place: those of the latent's texts, and common ones with which the label holds."""
        mine = [i for i in self._usable(before) if self._latents[i] == latent]
        theirs = np.unique([self._base[i][-1 - before] for i in mine]).astype(np.int64)
        if len(np.unique(self._corpus.form[theirs])) >= _CANDIDATES:
            return theirs
        common = self._by_count[-_SCANNED:]
        end = self._base[mine[0]][-2 - _FARTHEST :]  # enough for a label that reads the trigger
        texts = np.tile(end, (len(common), 1))
        texts[:, -1 - before] = common
        holds = self._holds(np.full(len(common), latent), list(texts))
        return np.union1d(theirs, common[holds])

    def _fitting(self, i: int, before: int, members: NDArray[np.int64]) -> list[int]:
        """Other tokens among `members`, drawn by their frequency."""
        members = members[self._differs(members, int(self._base[i][-1 - before]))]
        weight = self._corpus.counts[members] + 1.0
        n = min(_CANDIDATES, len(members))
        drawn = self._rng(i, before).choice(members, n, replace=False, p=weight / weight.sum()) if n else members
        return [int(t) for t in drawn]

    def _differs(self, tokens: NDArray[np.int64], token: int) -> NDArray[np.bool_]:
        return np.asarray(self._corpus.form[tokens] != self._corpus.form[token], bool)

    def _spell(self, token: int) -> str:
        return repr(self._corpus.strings[token])
