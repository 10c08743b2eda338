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
Classification and Regression Trees, section 4.2). For the words that occurred earlier in a document, of which a token
has many, S holds where any of them did.

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
_CLOSE = 0.95
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
    """Ascending."""
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
        families = views.families
        train = views.table.rows("train")
        self._n_train = len(train)
        counts = [np.bincount(f.code[train], minlength=len(f.names)) for f in families]
        nameable = [max(int((count >= settings.min_documents).sum()), 2) for count in counts]
        self._n_views = len(families) + 1
        sizes = np.array([len(f.names) for f in families] + [len(views.mentions.names)])
        self._start = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._stride = int(self._start[-1]) + 1
        k = np.arange(settings.max_categories + 1)
        V = np.array([*nameable, max(len(views.mentions.names), 2)], np.float64)[:, None]
        k_named = np.minimum(k, V)
        ways = gammaln(V + 1) - gammaln(k_named + 1) - gammaln(V - k_named + 1)
        self._cost: Floats = ways / np.log(2) + np.log2(settings.max_categories) + np.log2(self._n_views)

    def fit(self, sample: Sample, firing: NDArray[np.int64]) -> Learned:
        """The rule of one latent.

        Args:
            firing: train token rows on which it fires, ascending.
        """
        learned = self._fit_once(sample, len(firing) / self._n_train)
        wrong = self._counter_examples(learned.rule, firing, int((sample.kind == 0).sum()))
        if len(wrong) < _FEWEST:
            return learned
        row = np.concatenate([sample.row, wrong])
        by = np.argsort(row, kind="stable")
        kind = np.concatenate([sample.kind, np.full(len(wrong), _COUNTER_EXAMPLE, np.int8)])
        document = np.concatenate([sample.document, self._views.table.document[wrong]])
        return self._fit_once(Sample(row[by], kind[by], document[by]), len(firing) / self._n_train)

    def _counter_examples(self, rule: Rule, firing: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
        """Silent tokens of the natural sample on which a rule holds; `limit` of them, evenly spread."""
        if not rule:
            return np.zeros(0, np.int64)
        holds = self._natural[self._views.score(rule, self._natural) > 0]
        at = np.minimum(np.searchsorted(firing, holds), len(firing) - 1)
        silent: NDArray[np.int64] = holds[firing[at] != holds]
        if len(silent) > limit:
            silent = silent[np.linspace(0, len(silent) - 1, limit).astype(np.int64)]
        return silent

    def _fit_once(self, sample: Sample, density: float) -> Learned:
        positive = sample.kind == 0
        if not positive.any() or positive.all():
            return Learned((), 0.0, 0.0)
        weight = _weights(sample.kind)
        search = _Search(self, sample, positive)
        fires, silent = np.where(positive, weight, 0.0), np.where(positive, 0.0, weight)
        left = np.ones(len(positive), bool)
        clauses: list[Clause] = []
        held: list[NDArray[np.bool_]] = []
        bits = 0.0
        for _ in range(self._settings.max_clauses):
            if not fires[left].any():
                break
            atoms, inside, saved = self._clause(search, fires, silent, left)
            on, off = fires[inside].sum(), silent[inside].sum()
            if not atoms or on <= off or on < _LEAST_SHARE * fires.sum():
                break
            left = left & ~inside
            clause = Clause(atoms, float(on / (on + off)))
            if self._precision(clause, on / fires.sum(), density) >= self._settings.min_precision:
                clauses.append(clause)
                held.append(inside)
                bits += saved
        total = float(_code_length(np.array(fires.sum() + silent.sum()), np.array(fires.sum())))
        kept = _best_length(held, sample.kind)
        return Learned(tuple(clauses[:kept]), bits, bits / total if total else 0.0)

    def _clause(
        self, search: "_Search", fires: Floats, silent: Floats, left: NDArray[np.bool_]
    ) -> tuple[tuple[Atom, ...], NDArray[np.bool_], float]:
        atoms: tuple[Atom, ...] = ()
        inside, total = left, 0.0
        while len(atoms) < self._settings.max_atoms:
            p, q = np.where(inside, fires, 0.0), np.where(inside, silent, 0.0)
            if atoms and q.sum() == 0:
                break
            found = search.best(p, q, negated=False)
            if atoms:
                found = max(found, search.best(p, q, negated=True), key=lambda f: f.saved)
            if found.saved <= (_LEAST_SAVED * (p.sum() + q.sum()) if atoms else 0):
                break
            atoms = (*atoms, found.atom)
            inside = inside & (~found.inside if found.atom.negated else found.inside)
            total += found.saved
        return atoms, inside, total

    def _precision(self, clause: Clause, share: float, density: float) -> float:
        """Share of natural tokens where the clause holds that fire, from its share of the firings."""
        rows = self._natural
        for atom in clause.atoms:
            rows = rows[self._views.hold(atom, rows)]
        return float(min(1.0, share * density * len(self._natural) / max(len(rows), 1)))


class _Found(NamedTuple):
    saved: float
    atom: Atom
    inside: NDArray[np.bool_]
    """The questions whose category is named."""


class _Search:
    """One latent's questions with their nameable categories, renumbered."""

    def __init__(self, learner: Learner, sample: Sample, positive: NDArray[np.bool_]) -> None:
        self._learner = learner
        views, start = learner._views, learner._start
        n_families, n = len(views.families), len(sample.row)
        self._n_families, self._n = n_families, n
        code = np.stack([f.code[sample.row] + start[i] for i, f in enumerate(views.families)])
        which, word = views.mentions.before(sample.row)
        word = word + start[n_families]

        # Nameable: fires in enough documents, or (as an exception) is silent often enough.
        width = int(sample.document.max(initial=0)) + 1
        here = np.flatnonzero(positive)
        own = positive[which]
        key = np.concatenate(
            [
                (code[:, here].astype(np.int64) * width + sample.document[here]).reshape(-1),
                word[own].astype(np.int64) * width + sample.document[which[own]],
            ]
        )
        n_documents = np.bincount(_distinct(key) // width, minlength=learner._stride)
        named = n_documents >= learner._settings.min_documents
        n_silent = np.bincount(code[:, ~positive].reshape(-1), minlength=learner._stride)
        excepted = n_silent >= _FEWEST
        known = np.flatnonzero(named | excepted)
        local = np.zeros(learner._stride, np.int32)
        local[known] = np.arange(1, len(known) + 1)
        self._global = np.concatenate([[-1], known])
        self._view = np.searchsorted(start, self._global, side="right") - 1  # of each local number
        self._named = np.concatenate([[False], named[known]])
        self._excepted = np.concatenate([[False], excepted[known]])
        self._code = local[code]
        kept = named[word]
        self._which, self._word = which[kept], local[word[kept]]
        self._mentioning = np.flatnonzero(np.bincount(self._which, minlength=n))
        self._begins = np.searchsorted(self._which, self._mentioning)

    def best(self, fires: Floats, silent: Floats, *, negated: bool) -> _Found:
        """The set that saves most among questions of these weights (0 = not asked)."""
        learner, n_families, size = self._learner, self._n_families, len(self._global)
        n_fires, n_silent = float(fires.sum()), float(silent.sum())
        mass = self._sum(fires, size)
        other = self._sum(silent, size)
        n, total = mass + other, n_fires + n_silent
        base = n_fires / total
        if negated:
            candidate = self._excepted & (other >= 1) & (mass < base * n)
        else:
            candidate = self._named & (mass >= 1) & (mass > base * n)
        at = np.flatnonzero(candidate)
        nothing = _Found(-np.inf, Atom(0, ()), np.zeros(0, bool))
        if not len(at):
            return nothing
        rate = (mass[at] + _SHRINK * base) / (n[at] + _SHRINK)
        at = at[np.lexsort((rate if negated else -rate, self._view[at]))]
        view = self._view[at]
        begins = np.searchsorted(view, np.arange(n_families + 2))
        limit = learner._settings.max_categories
        rank = np.full(size, limit + 1, np.int64)
        rank[at] = np.minimum(np.arange(len(at)) - begins[view] + 1, limit + 1)

        of_question = rank[self._code]  # [n_families, n]
        inside_fires = np.zeros((n_families + 1, limit + 2))
        inside_silent = np.zeros((n_families + 1, limit + 2))
        key = (of_question + (np.arange(n_families) * (limit + 2))[:, None]).reshape(-1)
        shape, cells = (n_families, limit + 2), n_families * (limit + 2)
        inside_fires[:-1] = np.bincount(key, np.tile(fires, n_families), minlength=cells).reshape(shape)
        inside_silent[:-1] = np.bincount(key, np.tile(silent, n_families), minlength=cells).reshape(shape)
        earliest = np.full(self._n, limit + 1, np.int64)
        if not negated and len(self._mentioning):
            earliest[self._mentioning] = np.minimum.reduceat(rank[self._word], self._begins)
            inside_fires[-1] = np.bincount(earliest, fires, minlength=limit + 2)
            inside_silent[-1] = np.bincount(earliest, silent, minlength=limit + 2)
        a = np.cumsum(inside_fires[:, : limit + 1], axis=1)
        m = a + np.cumsum(inside_silent[:, : limit + 1], axis=1)
        saved = (
            _code_length(np.array(total), np.array(n_fires))
            - _code_length(m, a)
            - _code_length(total - m, n_fires - a)
            - learner._cost
            - 0.5 * np.log2(total)
        )
        k = np.arange(limit + 1)
        saved[(k[None] == 0) | (k[None] > np.diff(begins)[:, None])] = -np.inf
        best = saved.max(1)
        if best.max() <= 0:
            return nothing
        view_index = int(np.flatnonzero(best >= _CLOSE * best.max())[0])
        n_named = int(saved[view_index].argmax())
        chosen = at[begins[view_index] : begins[view_index] + n_named]
        by_mass = chosen[np.argsort(-(other if negated else mass)[chosen], kind="stable")]
        codes = (self._global[by_mass] - learner._start[view_index]).tolist()
        of = earliest if view_index == n_families else of_question[view_index]
        return _Found(float(best[view_index]), Atom(view_index, tuple(codes), negated), of <= n_named)

    def _sum(self, weight: Floats, size: int) -> Floats:
        flat = self._code.reshape(-1)
        by_category: Floats = np.bincount(flat, np.tile(weight, self._n_families), minlength=size).astype(np.float64)
        if len(self._word):
            by_category += np.bincount(self._word, weight[self._which], minlength=size)
        return by_category


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


def _distinct(key: NDArray[np.int64]) -> NDArray[np.int64]:
    key = np.sort(key)
    first = np.concatenate([np.ones(min(1, len(key)), bool), key[1:] != key[:-1]])
    return np.asarray(key[first], np.int64)


def _code_length(n: Floats, mass: Floats) -> Floats:
    """L(n, a) of the module docstring, in bits; 0 for an empty group."""
    p = np.clip(np.divide(mass, n, out=np.zeros(np.shape(n)), where=n > 0), 1e-12, 1 - 1e-12)
    return np.asarray(np.maximum(n, 0) * -(p * np.log2(p) + (1 - p) * np.log2(1 - p)), np.float64)
