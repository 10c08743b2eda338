"""The first label: "fires on tokens whose category is in S", fitted by description length.

For one latent and one family, let category c occur n_c times among N usable train tokens, with firing mass a_c = sum
of w over its firings. w = min(1, value / scale) weighs a firing, so that the noise floor of a sparse autoencoder counts
for little; the scale of a latent is the value above which half of its total activation lies. Coding the firings of a
group of n tokens with mass a takes

    L(n, a) = n * H(a / n)  bits,   H(p) = -p log2 p - (1 - p) log2(1 - p)

and a set S of k categories out of V splits the tokens in two, so that it is worth

    saved(S) = L(N, A) - L(n_S, a_S) - L(N - n_S, A - a_S) - cost(k)
    cost(k)  = log2 C(V, k) + log2(V) + 1/2 log2(N) + log2(number of families)

(which set, how large, one more rate, which family).

Categories are taken in the order of their log-odds of firing (shrunk towards the base rate), the best first; for two
groups some prefix of this order is optimal up to the cost (Breiman et al. 1984, Classification and Regression Trees,
section 4.2). The set with the most saved bits over all families is the label; with none above zero the latent gets
none. A category counts only if it fires in at least `min_documents` documents: tokens of one document are not
independent, and one odd document is no rule.

Reference: two-part codes, Rissanen 1978, Automatica 14, 465-471.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from pipelines.labels.families import Family
from pipelines.labels.firings import Firings

_SHRINK = 1.0


class Predicates(NamedTuple):
    """One rule per latent: the categories `code[indptr[i]:indptr[i + 1]]` (ascending) of family `family[i]`."""

    family: NDArray[np.int8]
    """-1 where the latent has no rule."""
    bits: NDArray[np.float32]
    """Description length saved on train documents; 0 without a rule."""
    explained: NDArray[np.float32]
    """`bits` as a share of the description length without a rule."""
    indptr: NDArray[np.int64]
    code: NDArray[np.int32]
    rate: NDArray[np.float32]
    """Weighted share of the category's train tokens on which the latent fires."""
    mass: NDArray[np.float32]
    """Weighted number of train firings in the category."""

    @property
    def n_latents(self) -> int:
        return len(self.family)

    @property
    def found(self) -> NDArray[np.bool_]:
        return self.family >= 0

    @property
    def owner(self) -> NDArray[np.int64]:
        """Latent of each entry of `code`."""
        return np.repeat(np.arange(self.n_latents), np.diff(self.indptr))

    def take(self, index: NDArray[np.int64]) -> "Predicates":
        """The rules of the given latents, in that order; -1 gives no rule."""
        given = index >= 0
        size = np.where(given, np.diff(self.indptr)[index], 0)
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(size, dtype=np.int64)])
        entry = np.arange(indptr[-1]) + np.repeat(self.indptr[:-1][index] - indptr[:-1], size)
        return Predicates(
            np.where(given, self.family[index], -1).astype(np.int8),
            np.where(given, self.bits[index], 0).astype(np.float32),
            np.where(given, self.explained[index], 0).astype(np.float32),
            indptr,
            self.code[entry],
            self.rate[entry],
            self.mass[entry],
        )


class _Sets(NamedTuple):
    """Best set of one family for each latent of a block; entries are ordered by latent."""

    bits: NDArray[np.float64]
    owner: NDArray[np.int64]
    code: NDArray[np.int32]
    rate: NDArray[np.float64]
    mass: NDArray[np.float64]


def firing_weights(firings: Firings, order: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Weight of each firing and the scale of each latent: half of its total activation lies in firings this strong.

    Args:
        order: `contexts.order_by_strength(firings)`.
    """
    total = np.concatenate([np.zeros(1), np.cumsum(firings.value[order], dtype=np.float64)])
    start, stop = firings.indptr[:-1], firings.indptr[1:]
    live = stop > start
    middle = np.searchsorted(total, (total[start] + total[stop]) / 2) - 1
    scale = np.zeros(firings.n_latents, np.float32)
    scale[live] = firings.value[order[np.clip(middle, start, stop - 1)[live]]]
    return np.minimum(1.0, firings.value / scale[firings.latent].astype(np.float64)), scale


def fit_predicates(
    firings: Firings,
    weight: NDArray[np.float64],
    families: Sequence[Family],
    train_rows: NDArray[np.int64],
    document: NDArray[np.int32],
    *,
    max_categories: int = 32,
    min_documents: int = 3,
) -> Predicates:
    """The rule that saves most bits for each latent of the block.

    Args:
        firings: firings on usable train tokens.
        weight: of each firing, in [0, 1].
        train_rows: every usable train token row.
        document: document of each token row.
        max_categories: largest set that is still worth reading.
    """
    sets = [
        _fit_family(firings, weight, family, train_rows, document, len(families), max_categories, min_documents)
        for family in families
    ]
    bits = np.stack([s.bits for s in sets])
    best = np.argmax(bits, axis=0)
    saved = np.take_along_axis(bits, best[None], 0)[0]
    family = np.where(saved > 0, best, -1).astype(np.int8)

    owner, code, rate, mass = (
        np.concatenate([getattr(s, field)[family[s.owner] == f] for f, s in enumerate(sets)])
        for field in ("owner", "code", "rate", "mass")
    )
    by = np.lexsort((code, owner))
    indptr = np.searchsorted(owner[by], np.arange(firings.n_latents + 1)).astype(np.int64)
    without = _code_length(np.full(len(saved), float(len(train_rows))), _sum_by(firings.latent, weight, len(saved)))
    explained = np.divide(np.maximum(saved, 0), without, out=np.zeros_like(saved), where=without > 0)
    return Predicates(
        family,
        np.maximum(saved, 0).astype(np.float32),
        explained.astype(np.float32),
        indptr,
        code[by].astype(np.int32),
        rate[by].astype(np.float32),
        mass[by].astype(np.float32),
    )


def concatenate(parts: Sequence[Predicates]) -> Predicates:
    """Rules of consecutive blocks as the rules of one dictionary."""
    sizes = np.concatenate([np.diff(p.indptr) for p in parts])
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    columns = {f: np.concatenate([getattr(p, f) for p in parts]) for f in Predicates._fields if f != "indptr"}
    return Predicates(indptr=indptr, **columns)


def _fit_family(
    firings: Firings,
    weight: NDArray[np.float64],
    family: Family,
    train_rows: NDArray[np.int64],
    document: NDArray[np.int32],
    n_families: int,
    max_categories: int,
    min_documents: int,
) -> _Sets:
    n_categories, n_tokens = len(family.names), float(len(train_rows))
    occurrences = np.bincount(family.code[train_rows], minlength=n_categories).astype(np.float64)
    total = _sum_by(firings.latent, weight, firings.n_latents)
    base = total / n_tokens

    # Mass of each (latent, category) pair that occurs; one sort per family and block.
    key = firings.latent * n_categories + family.code[firings.row]
    by = np.argsort(key, kind="stable")
    sorted_key = key[by]
    first = np.flatnonzero(np.concatenate([np.ones(min(1, len(by)), bool), sorted_key[1:] != sorted_key[:-1]]))
    pair = sorted_key[first]
    owner, code = pair // n_categories, pair % n_categories
    mass = np.add.reduceat(weight[by], first) if len(first) else np.zeros(0)
    n = occurrences[code]

    # A category enters only if alone it pays for being named: n * KL(rate || base) > log2 V.
    rate = mass / n
    gain = n * _divergence(rate, base[owner])
    promising = np.flatnonzero((rate > base[owner]) & (gain > np.log2(n_categories)))
    if len(promising) and min_documents > 1:
        pair_of_firing = np.repeat(np.arange(len(pair)), np.diff(np.append(first, len(by))))
        n_documents = _documents_per_pair(pair_of_firing, document[firings.row[by]], promising, len(pair))
        promising = promising[n_documents >= min_documents]
    owner, code, mass, n = owner[promising], code[promising], mass[promising], n[promising]

    shrunk = (mass + _SHRINK * base[owner]) / (n + _SHRINK)
    by = np.lexsort((code, -shrunk, owner))
    owner, code, mass, n = owner[by], code[by], mass[by], n[by]
    begins = np.searchsorted(owner, np.arange(firings.n_latents + 1))
    size = np.arange(len(owner)) - begins[owner] + 1
    inside_n, inside_mass = _running_sum(n, begins, owner), _running_sum(mass, begins, owner)
    saved = (
        _code_length(np.full(len(owner), n_tokens), total[owner])
        - _code_length(inside_n, inside_mass)
        - _code_length(n_tokens - inside_n, total[owner] - inside_mass)
        - _set_cost(size, n_categories)
        - 0.5 * np.log2(n_tokens)
        - np.log2(n_families)
    )
    saved[size > max_categories] = -np.inf

    bits = np.full(firings.n_latents, -np.inf)
    best = np.zeros(firings.n_latents, np.int64)
    has = np.flatnonzero(np.diff(begins) > 0)
    if len(has):
        bits[has] = np.maximum.reduceat(saved, begins[has])
        hit = np.flatnonzero(saved == bits[owner])[::-1]  # on ties the smaller set wins: written last
        best[owner[hit]] = size[hit]
    keep = (size <= best[owner]) & (bits[owner] > 0)
    return _Sets(bits, owner[keep], code[keep].astype(np.int32), (mass / n)[keep], mass[keep])


def _documents_per_pair(
    pair_of_firing: NDArray[np.int64], document: NDArray[np.int32], wanted: NDArray[np.int64], n_pairs: int
) -> NDArray[np.int64]:
    """Number of distinct documents among the firings of each wanted (latent, category) pair."""
    is_wanted = np.zeros(n_pairs, bool)
    is_wanted[wanted] = True
    kept = is_wanted[pair_of_firing]
    width = int(document.max(initial=0)) + 1
    distinct = np.unique(pair_of_firing[kept] * width + document[kept])
    return np.bincount(distinct // width, minlength=n_pairs)[wanted]


def _sum_by(index: NDArray[np.int64], weight: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    return np.bincount(index, weights=weight, minlength=n).astype(np.float64)


def _running_sum(x: NDArray[np.float64], begins: NDArray[np.int64], owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cumulative sum that restarts at each owner."""
    total = np.concatenate([np.zeros(1), np.cumsum(x)])
    return np.asarray(total[1:] - total[begins[owner]], np.float64)


def _code_length(n: NDArray[np.float64], mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """L(n, a) of the module docstring, in bits; 0 for an empty group."""
    p = np.clip(np.divide(mass, n, out=np.zeros_like(n), where=n > 0), 0.0, 1.0)
    return np.maximum(n, 0) * (_xlog2(p, p) + _xlog2(1 - p, 1 - p)) * -1.0


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of two coins in bits."""
    return _xlog2(p, p) - _xlog2(p, q) + _xlog2(1 - p, 1 - p) - _xlog2(1 - p, 1 - q)


def _xlog2(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """x * log2(y), with 0 * log2(0) = 0."""
    return x * np.log2(np.where(x > 0, np.maximum(y, 1e-300), 1.0))


def _set_cost(size: NDArray[np.int64], n_categories: int) -> NDArray[np.float64]:
    """Bits to name a set of `size` out of `n_categories` and its size."""
    ways = gammaln(n_categories + 1) - gammaln(size + 1) - gammaln(n_categories - size + 1)
    return np.asarray(ways / np.log(2.0) + np.log2(max(n_categories, 2)), np.float64)


def describe(predicates: Predicates, latent: int, families: Sequence[Family], *, n_shown: int = 6) -> str:
    """The rule of one latent in English, its largest contributors first; empty without a rule."""
    which = int(predicates.family[latent])
    if which < 0:
        return ""
    span = slice(int(predicates.indptr[latent]), int(predicates.indptr[latent + 1]))
    codes = predicates.code[span][np.argsort(-predicates.mass[span], kind="stable")].tolist()
    family = families[which]
    names = [family.names[code] for code in codes[:n_shown]]
    if family.name in ("token", "word", "previous"):
        names = [name if name == "the start of a document" else repr(name) for name in names]
    more = f" and {len(codes) - n_shown} more" if len(codes) > n_shown else ""
    listing = ", ".join(names) + more
    if family.name == "previous":
        return f"the token after {listing}"
    if family.name == "position":
        return f"position {listing} of a document"
    return listing
