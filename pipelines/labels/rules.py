"""Labels as programs: a rule over (token, context), its English and its JSON.

    rule     any of its clauses holds                     ' album' after ' debut'; or words ending in 'ography'
    clause   all of its atoms hold                        ' album'   and   after ' debut'
    atom     the token's category in one view is, or is not, one of a set

Views are the families of `families`. The score of a rule at a token is that of the first
clause that holds there, 0 where none does: a decision list (Rivest 1987, Machine Learning 2, 229-246).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from pipelines.labels.families import DOCUMENT_START, Family, TokenTable, build_families
from pipelines.labels.meanings import SIZES


class Atom(NamedTuple):
    """`family` is an index into `Views.names`; `codes` have those with most firings first."""

    family: int
    codes: tuple[int, ...]
    negated: bool = False


class Clause(NamedTuple):
    """All atoms must hold."""

    atoms: tuple[Atom, ...]
    score: float
    """Share of firings among the balanced train questions on which it holds."""


Rule = tuple[Clause, ...]
"""Empty: there is no rule."""


class Views:
    """Every view of the tokens of a table."""

    def __init__(
        self,
        table: TokenTable,
        token_strings: Sequence[str],
        *,
        W_U: Float[Tensor, "d_model vocab"] | None = None,
    ) -> None:
        """Args:
        W_U: unembedding, for the views of meaning; rules are read back without it.
        """
        self.table = table
        self.families: list[Family] = build_families(table, token_strings, W_U)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(family.name for family in self.families)

    def categories(self, family: int) -> Sequence[str]:
        """Names of the categories of a view."""
        return self.families[family].names

    def hold(self, atom: Atom, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether an atom holds at each token row."""
        family = self.families[atom.family]
        wanted = np.zeros(len(family.names), bool)
        wanted[np.asarray(atom.codes, np.int64)] = True
        inside = wanted[family.code[rows]]
        return ~inside if atom.negated else inside

    def score(self, rule: Rule, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The score of a rule at each token row."""
        result = np.zeros(len(rows), np.float32)
        for clause in rule:
            left = np.flatnonzero(result == 0)
            for atom in clause.atoms:
                left = left[self.hold(atom, rows[left])]
            result[left] = clause.score
        return result

    def english(self, rule: Rule, *, n_shown: int = 6) -> str:
        """A rule for people; the commonest categories first."""
        return "; or ".join(
            " ".join(self._say(atom, n_shown) for atom in sorted(clause.atoms, key=self._reading_order))
            for clause in rule
        )

    def data(self, rule: Rule) -> dict[str, Any]:
        """A rule as JSON; `of_data` reads it with the views of any text."""
        return {
            "any": [
                {
                    "all": [self._data_of(atom) for atom in clause.atoms],
                    "score": round(clause.score, 4),
                }
                for clause in rule
            ]
        }

    def of_data(self, data: Mapping[str, Any]) -> Rule:
        """A rule of JSON, in the codes of these views. A view or category that this text has not holds nowhere."""
        return tuple(
            Clause(tuple(self._atom_of(atom) for atom in clause["all"]), float(clause["score"]))
            for clause in data["any"]
        )

    def _data_of(self, atom: Atom) -> dict[str, Any]:
        """Groups are spelled out, so that a rule can be run without what made them."""
        family = self.families[atom.family]
        if family.of_form is None:
            names = self.categories(atom.family)
            view, values = self.names[atom.family], [names[code] for code in atom.codes]
        else:
            view, group = family.of_form
            names = self.categories(self.names.index(view))
            members = np.isin(group, atom.codes) & self._occurring[: len(group)]
            values = [names[i] for i in np.flatnonzero(members).tolist()]
        return {"view": view, "not_in" if atom.negated else "in": values}

    @cached_property
    def _occurring(self) -> NDArray[np.bool_]:
        """Which forms occur in the table."""
        token = self.families[0]
        return np.bincount(token.code, minlength=len(token.names) + 1) > 0

    @cached_property
    def _codes(self) -> dict[str, dict[str, int]]:
        return {
            name: {_key(text): code for code, text in enumerate(self.categories(i))}
            for i, name in enumerate(self.names)
        }

    def _atom_of(self, data: Mapping[str, Any]) -> Atom:
        if data["view"] not in self._codes:
            return Atom(0, ())
        negated, known = "not_in" in data, self._codes[data["view"]]
        named = (_key(value) for value in data["not_in" if negated else "in"])
        codes = sorted({known[value] for value in named if value in known})
        return Atom(self.names.index(data["view"]), tuple(codes), negated)

    def _reading_order(self, atom: Atom) -> tuple[bool, int]:
        return (atom.negated or self.names[atom.family] not in _NOUNS, atom.family)

    def _say(self, atom: Atom, n_shown: int) -> str:
        view, names = self.names[atom.family], self.categories(atom.family)
        words = [names[code] for code in atom.codes[: n_shown if view not in _GROUPS else n_shown // 2]]
        if view in _QUOTED:
            words = [word if word == DOCUMENT_START else repr(word) for word in words]
        more = len(atom.codes) - len(words)
        listing = ", ".join(words) + (f" and {more} more" if more > 0 else "")
        said = _PHRASES.get(view, "{}").format(listing)
        return f"but not {said}" if atom.negated else said


def _key(name: str) -> str:
    return name.strip().casefold() or name


_GROUPS = (*(f"meaning{size}" for size in SIZES), "previous_meaning")
_NOUNS = ("token", "word", "pair", "start", "end2", "end3", "end4", "shape", "repeated", *_GROUPS[:-1])
_QUOTED = ("token", "word", "previous", "earlier", "pair", "start", "end2", "end3", "end4")
_PHRASES = {
    "previous": "the token after {}",
    "earlier": "the second token after {}",
    "start": "words that begin with {}",
    "end2": "words that end in {}",
    "end3": "words that end in {}",
    "end4": "words that end in {}",
    **dict.fromkeys(_GROUPS[:-1], "tokens like {}"),
    "previous_meaning": "the token after one like {}",
    "position": "position {} of a document",
    "topic": "in documents about {}",
}
