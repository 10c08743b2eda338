"""Fit a latent's rule to questions on train documents: a decision list that is worth its description.

The questions are those that the label has to answer later on other documents (`testset`): firings, and silent tokens
that are hard to tell from them (the same token elsewhere, other tokens of the same documents) or easy (any). To these
come counter-examples: silent tokens of a natural sample on which a first rule holds, and the rule is fitted again. The
negatives of each kind weigh the same, at most 1 each, and all together as much as the firings. Coding which of n
tokens (weighted) fire, of which a do, takes

    L(n, a) = n * H(a / n)  bits,   H(p) = -p log2 p - (1 - p) log2(1 - p)

and an atom that splits them by a set S of k of the V categories of a view is worth

    saved(S) = L(n, a) - L(n_S, a_S) - L(n - n_S, a - a_S) - cost(k)
    cost(k)  = log2 C(V, k) + log2(k_max) + 1/2 log2(n) + log2(number of views)

(which set, how large, one more rate, which view). Categories are taken in the order of their rate of firing, shrunk
towards the mean; for two groups some prefix of this order is optimal up to the cost (Breiman et al. 1984,
Classification and Regression Trees, section 4.2).

A clause grows by the atom that saves most among the tokens on which it holds so far, a set to be in or a set to be out
of; a rule grows by clauses fitted to what the earlier ones left (as in RIPPER, Cohen 1995, ICML). Both stop where
nothing is saved. A category may be named only if the latent fires on it in at least `min_documents` documents: tokens
of one document are not independent, and one odd document is no rule. A clause must also be right on at least
`min_precision` of the tokens of a natural sample on which it holds. Of the clauses so found the rule keeps the first
few that do best on the hardest kind of negative.

Reference: two-part codes, Rissanen 1978, Automatica 14, 465-471.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from pipelines.labels.rules import Atom, Clause, Rule, Views
from pipelines.labels.settings import LabelSettings
from pipelines.labels.testset import NEGATIVES

Floats = NDArray[np.float64]
_SHRINK = 1.0
_CLOSE = 0.9
"""Views that save nearly as much as the best one: the first, which is the plainest, is taken."""
_LEAST_SAVED = 0.04
"""Bits per question that a further condition must save to be worth reading."""
_COUNTER_EXAMPLE = len(NEGATIVES) + 1
_FEWEST = 5
"""Silent tokens of a category that may be named as an exception; of a rule, that are worth another fit."""
_LEAST_SHARE = 0.02
"""Of the firings: a clause that holds on fewer is not worth reading."""


class Sample(NamedTuple):
    """Questions about one latent on train documents."""

    row: NDArray[np.int64]
    kind: NDArray[np.int8]
    """0 = the latent fires; k = silent, a negative of kind k of `testset.NEGATIVES`, or a counter-example."""
    document: NDArray[np.int32]


class Learned(NamedTuple):
    """What fitting a latent gives."""

    rule: Rule
    bits: float
    """Description length saved by all clauses."""
    explained: float
    """The same as a share of the description length without a rule."""


class Learner:
    """Fits rules; holds what all latents share."""

    def __init__(self, views: Views, natural: NDArray[np.int64], settings: LabelSettings) -> None:
        """Args:
        natural: train token rows drawn at random.
        """
        self._views, self._natural, self._settings = views, natural, settings
        families, train = views.families, views.table.rows("train")
        self._n_train = len(train)
        # One numbering of all categories that a rule may ever name; 0 is every other one.
        columns, occurrences, start = [], [np.zeros(1, np.int64)], [1]
        self._category: list[NDArray[np.int64]] = []
        for family in families:
            count = np.bincount(family.code[train], minlength=len(family.names))
            nameable = np.flatnonzero(count >= settings.min_documents)
            number = np.zeros(len(family.names), np.int32)
            number[nameable] = start[-1] + np.arange(len(nameable))
            columns.append(number[family.code])
            occurrences.append(count[nameable])
            start.append(start[-1] + len(nameable))
            self._category.append(nameable)
        self._code = np.stack(columns, axis=1)
        self._occurrences = np.concatenate(occurrences)
        self._start = np.array(start)
        k = np.arange(settings.max_categories + 1)
        V = np.maximum(np.diff(self._start), 2).astype(np.float64)[:, None]
        k_named = np.minimum(k, V)
        ways = gammaln(V + 1) - gammaln(k_named + 1) - gammaln(V - k_named + 1)
        self._cost: Floats = ways / np.log(2) + np.log2(settings.max_categories) + np.log2(len(families))

    def fit(self, sample: Sample, firing: NDArray[np.int64]) -> Learned:
        """The rule of one latent.

        Args:
            firing: train token rows on which it fires, ascending.
        """
        positive = sample.kind == 0
        if not positive.any() or positive.all():
            return Learned((), 0.0, 0.0)
        density = len(firing) / self._n_train
        search = _Search(self, sample, len(firing))
        learned, holds = self._fit_once(search, sample.kind, density)
        wrong = _counter_examples(holds, firing, int(positive.sum()))
        if len(wrong) < _FEWEST:
            return learned
        search.ask(wrong)
        kind = np.concatenate([sample.kind, np.full(len(wrong), _COUNTER_EXAMPLE, np.int8)])
        return self._fit_once(search, kind, density)[0]

    def _fit_once(self, search: "_Search", kind: NDArray[np.int8], density: float) -> tuple[Learned, NDArray[np.int64]]:
        """Also the tokens of the natural sample on which the rule holds, ascending."""
        positive, weight = kind == 0, _weights(kind)
        fires, silent = np.where(positive, weight, 0.0), np.where(positive, 0.0, weight)
        left = np.ones(len(positive), bool)
        clauses: list[Clause] = []
        held: list[NDArray[np.bool_]] = []
        natural: list[NDArray[np.int64]] = []
        bits = 0.0
        any_token = kind == 1 + NEGATIVES.index("random")
        per_token = float(silent[any_token].sum()) / self._n_train
        for _ in range(self._settings.max_clauses):
            if not fires[left].any():
                break
            atoms, inside, saved = self._clause(search, fires, silent, left, any_token, per_token)
            on, off = fires[inside].sum(), silent[inside].sum()
            if not atoms or on <= off or on < _LEAST_SHARE * fires.sum():
                break
            left = left & ~inside
            rows = self._natural
            for atom in atoms:
                rows = rows[self._views.hold(atom, rows)]
            expected = on / fires.sum() * density * len(self._natural)  # firings of the clause in a natural sample
            if expected >= self._settings.min_precision * len(rows):
                clauses.append(Clause(atoms, float(on / (on + off))))
                held.append(inside)
                natural.append(rows)
                bits += saved
        total = float(_code_length(np.array(fires.sum() + silent.sum()), np.array(fires.sum())))
        kept = _best_length(held, kind)
        holds = _distinct(np.concatenate([np.zeros(0, np.int64), *natural[:kept]]))
        return Learned(tuple(clauses[:kept]), bits, bits / total if total else 0.0), holds

    def _clause(
        self,
        search: "_Search",
        fires: Floats,
        silent: Floats,
        left: NDArray[np.bool_],
        any_token: NDArray[np.bool_],
        per_token: float,
    ) -> tuple[tuple[Atom, ...], NDArray[np.bool_], float]:
        atoms: tuple[Atom, ...] = ()
        inside, total = left, 0.0
        while len(atoms) < self._settings.max_atoms:
            p, q = np.where(inside, fires, 0.0), np.where(inside, silent, 0.0)
            if atoms and q.sum() == 0:
                break
            if atoms:
                found = (search.best(p, q), search.best(p, q, negated=True))
                best = max(found, key=lambda f: f.saved)
            else:  # how often a category occurs is known: no need to draw tokens for it
                best = search.best(p, np.where(any_token, 0.0, q), per_token=per_token)
            if best.saved <= (_LEAST_SAVED * (p.sum() + q.sum()) if atoms else 0):
                break
            atoms = (*atoms, best.atom)
            inside = inside & (~best.inside if best.atom.negated else best.inside)
            total += best.saved
        return atoms, inside, total


class _Found(NamedTuple):
    saved: float
    atom: Atom
    inside: NDArray[np.bool_]
    """The questions whose category is named."""


_NOTHING = _Found(-np.inf, Atom(0, ()), np.zeros(0, bool))


class _Search:
    """One latent's questions with their nameable categories, renumbered from 1; 0 is every other category."""

    def __init__(self, learner: Learner, sample: Sample, n_firing: int) -> None:
        self._learner = learner
        positive = sample.kind == 0
        self._scale = n_firing / positive.sum()
        self._n_families = learner._code.shape[1]
        code, stride = learner._code[sample.row], int(learner._start[-1])  # [n, n_families]
        # Nameable: fires in enough documents, or (as an exception) is silent often enough.
        enough = learner._settings.min_documents
        fired = code[positive]
        often = np.bincount(fired.reshape(-1), minlength=stride) >= enough
        often[0] = False
        width = int(sample.document.max(initial=0)) + 1
        key = fired.astype(np.int64) * width + sample.document[positive][:, None]
        n_documents = np.bincount(_distinct(key[often[fired]]) // width, minlength=stride)
        named = n_documents >= enough
        excepted = np.bincount(code[~positive].reshape(-1), minlength=stride) >= _FEWEST
        excepted[0] = False
        known = np.flatnonzero(named | excepted)
        self._local = np.zeros(stride, np.int32)
        self._local[known] = np.arange(1, len(known) + 1)
        self._global = np.concatenate([[0], known])
        self._view = np.searchsorted(learner._start, self._global, side="right") - 1  # of each local number
        self._named = np.concatenate([[False], named[known]])
        self._excepted = np.concatenate([[False], excepted[known]])
        self._occurrences = learner._occurrences[self._global]
        self._occurrences[0] = 0
        self._code = self._local[np.ascontiguousarray(code.T)]

    def ask(self, rows: NDArray[np.int64]) -> None:
        """Further questions, about silent tokens, after those that there are."""
        more = self._local[np.ascontiguousarray(self._learner._code[rows].T)]
        self._code = np.concatenate([self._code, more], axis=1)

    def best(self, fires: Floats, silent: Floats, *, per_token: float = 0.0, negated: bool = False) -> _Found:
        """The set of one view that saves most among questions of these weights (0 = not asked).

        Args:
            per_token: weight of every train token as a negative, on top of the questions.
        """
        learner, size = self._learner, len(self._global)
        flat = self._code.reshape(-1)
        mass = np.bincount(flat, np.tile(fires, self._n_families), minlength=size).astype(np.float64)
        other = np.bincount(flat, np.tile(silent, self._n_families), minlength=size) + per_token * self._occurrences
        n_fires = float(fires.sum())
        total = n_fires + float(silent.sum()) + per_token * learner._n_train
        n, base = mass + other, n_fires / total
        if negated:
            candidate = self._excepted & (other >= 1) & (mass < base * n)
        else:
            candidate = self._named & (mass >= 1) & (mass > base * n)
            if per_token:  # a natural sample would have this share of firings
                candidate &= self._scale * mass >= learner._settings.min_precision * self._occurrences
        at = np.flatnonzero(candidate)
        if not len(at):
            return _NOTHING
        rate = (mass[at] + _SHRINK * base) / (n[at] + _SHRINK)
        at = at[np.lexsort((rate if negated else -rate, self._view[at]))]
        view = self._view[at]
        first = np.flatnonzero(np.concatenate([[True], view[1:] != view[:-1]]))
        begins = np.repeat(first, np.diff(np.append(first, len(at))))
        k = np.arange(len(at)) - begins + 1
        a, m = (_restarting_sum(x[at], first, begins) for x in (mass, n))
        saved = _saved(total, n_fires, m, a) - learner._cost[view, np.minimum(k, learner._settings.max_categories)]
        saved[k > learner._settings.max_categories] = -np.inf
        best = np.maximum.reduceat(saved, first)
        if best.max() <= 0:
            return _NOTHING
        group = int(np.flatnonzero(best >= _CLOSE * best.max())[0])
        start, stop = first[group], np.append(first, len(at))[group + 1]
        chosen = at[start : start + int(saved[start:stop].argmax()) + 1]
        inside = np.zeros(size, bool)
        inside[chosen] = True
        which = int(view[start])
        atom = self._atom(which, chosen, other if negated else mass, negated=negated)
        return _Found(float(best[group]), atom, inside[self._code[which]])

    def _atom(self, view: int, chosen: NDArray[np.int64], mass: Floats, *, negated: bool = False) -> Atom:
        by_mass = chosen[np.argsort(-mass[chosen], kind="stable")]
        category = self._learner._category[view]
        return Atom(view, tuple(category[self._global[by_mass] - self._learner._start[view]].tolist()), negated)


def _counter_examples(holds: NDArray[np.int64], firing: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Tokens on which a rule holds and the latent is silent; `limit` of them, evenly spread."""
    silent = np.setdiff1d(holds, firing, assume_unique=True)
    return silent[np.linspace(0, len(silent) - 1, limit).astype(np.int64)] if len(silent) > limit else silent


def _weights(kind: NDArray[np.int8]) -> Floats:
    """1 for a firing; negatives of each kind weigh the same and all together as much as the firings."""
    count = np.bincount(kind)
    n_kinds = int((count[1:] > 0).sum())
    weight = np.divide(count[0] / max(n_kinds, 1), count, out=np.zeros(len(count)), where=count > 0)
    weight[0] = 1.0
    # Few negatives of a kind are not to count as more than they are.
    return np.asarray(np.minimum(weight, 1.0)[kind], np.float64)


def _best_length(held: list[NDArray[np.bool_]], kind: NDArray[np.int8]) -> int:
    """How many clauses do best on the kind of negative on which they do worst."""
    if not held:
        return 0
    union = np.logical_or.accumulate(np.stack(held), axis=0)
    count = np.bincount(kind)
    yes = np.stack([np.bincount(kind, weights=u, minlength=len(count)) for u in union])
    share = yes / np.maximum(count, 1)
    gap = np.where(count[1:] >= _FEWEST, share[:, :1] - share[:, 1:], np.inf).min(1)
    return int(gap.argmax()) + 1


def _saved(total: float, n_fires: float, n: Floats, mass: Floats) -> Floats:
    """Bits that splitting off groups of n questions with `mass` firings saves, before the cost of naming them."""
    whole = _code_length(np.array(total), np.array(n_fires))
    return np.asarray(
        whole - _code_length(n, mass) - _code_length(total - n, n_fires - mass) - 0.5 * np.log2(total), np.float64
    )


def _restarting_sum(x: Floats, first: NDArray[np.int64], begins: NDArray[np.int64]) -> Floats:
    """Cumulative sum that restarts at each index in `first`; `begins` is the start of each entry's group."""
    total = np.cumsum(x)
    before = np.where(first > 0, total[first - 1], 0.0)
    return np.asarray(total - before[np.searchsorted(first, begins)], np.float64)


def _distinct(key: NDArray[np.int64]) -> NDArray[np.int64]:
    key = np.sort(key)
    first = np.concatenate([np.ones(min(1, len(key)), bool), key[1:] != key[:-1]])
    return np.asarray(key[first], np.int64)


def _code_length(n: Floats, mass: Floats) -> Floats:
    """L(n, a) of the module docstring, in bits; 0 for an empty group."""
    p = np.clip(np.divide(mass, n, out=np.zeros(np.shape(n)), where=n > 0), 1e-12, 1 - 1e-12)
    return np.asarray(np.maximum(n, 0) * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)), np.float64)
