"""Which labellings are as likely as the observed one if labels do not matter, and the statistic's size under them.

Groups are the unit. A group that holds both classes keeps its counts and exchanges labels inside; groups of one class
exchange their label as wholes. With r_i the midrank of text i, less the mean rank, and T_g its sum over group g:

    W = sum over positives of r_i                          AUROC = 1/2 + W / (n_pos n_neg)
    z = (W - E0[W]) / sd                                   cluster-robust: sd comes from the totals of groups

sd is the exact one over the exchanges where every group of one class has as many texts as the next. Where sizes differ
(five templates of twenty positives against a hundred negatives from as many sources, say) exchanging groups moves
variance from one class to the other, so each labelling is divided by its own estimate instead, from the groups of each
class (the cluster-robust Welch statistic of ranks). Permuting a studentised statistic is exact where groups are
exchangeable and right in the limit where they are not (Janssen 1997; Chung and Romano 2013, Annals of Statistics 41).
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

FLOOR = 1e-4
"""Least studentising variance, in units of the exact one: keeps z finite where all groups of a class agree."""


class Moments(NamedTuple):
    """Mean and variance of W over the exchanges, per latent."""

    mean: Float[np.ndarray, " d_sae"]
    variance: Float[np.ndarray, " d_sae"]


class Exchange:
    """The observed labelling and `n_permutations` exchanges of it, and z under each.

    Attributes:
        columns: 0 or 1 for every text and labelling; column 0 is what was observed.
    """

    def __init__(
        self, labels: Bool[np.ndarray, " n_texts"], groups: Int[np.ndarray, " n_texts"], n_permutations: int, seed: int
    ) -> None:
        self._labels = labels
        self._pure, self._mixed = pure_and_mixed(labels, groups)
        drawn = permuted_labels(labels, groups, n_permutations, seed)
        self.columns: Float32[np.ndarray, "n_texts n_labellings"] = np.concatenate(
            [labels.astype(np.float32)[:, None], drawn], axis=1
        )
        self._drawn = torch.from_numpy(self.columns)
        sizes = np.array([rows.size for rows in self._pure], dtype=np.float32)
        n_positive = sum(bool(labels[rows[0]]) for rows in self._pure)
        self.studentised = bool(sizes.size and sizes.min() != sizes.max() and 2 <= n_positive <= sizes.size - 2)
        if self.studentised:
            self._member = np.zeros((labels.size, sizes.size), dtype=np.float32)
            for g, rows in enumerate(self._pure):
                self._member[rows, g] = 1
            self._groups_drawn = self._drawn[[rows[0] for rows in self._pure]]
            self._sizes = torch.from_numpy(sizes)
            self._n_groups = (n_positive, sizes.size - n_positive)

    def z(self, centred: Float32[np.ndarray, "n_latents n_texts"]) -> Float32[Tensor, "n_latents n_labellings"]:
        """The statistic of every latent under every labelling; 0 where nothing can vary.

        Args:
            centred: midranks less (n_texts + 1) / 2. They are multiples of 1/2 and their sums stay below 2^23, so the
                float32 matrix product is exact, in whatever order it adds: equal labellings give equal W.
        """
        ranks = torch.from_numpy(centred)
        if self.studentised:
            return self._welch(ranks, centred)
        mean, variance = moments(centred, self._pure, self._mixed, self._labels)
        sd = np.sqrt(variance)
        scale = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
        w = ranks @ self._drawn
        w -= torch.from_numpy(mean.astype(np.float32))[:, None]
        w *= torch.from_numpy(scale.astype(np.float32))[:, None]
        return w

    def _welch(
        self, ranks: Float32[Tensor, "n_latents n_texts"], centred: Float32[np.ndarray, "n_latents n_texts"]
    ) -> Float32[Tensor, "n_latents n_labellings"]:
        """Groups of one class by the difference of their class means, over its own estimated sd; mixed ones as ever.

        With s_g texts in group g, n1 and n0 texts and G1 and G0 groups of each class, m1 and m0 their mean ranks:

            u = n1 n0 / (n1 + n0) (m1 - m0)        the part of W that groups of one class decide
            v = (n1 n0 / (n1 + n0))^2 sum over classes c of  Gc / (Gc - 1) sum_g (T_g - s_g mc)^2 / nc^2
        """
        totals, drawn, sizes = ranks @ torch.from_numpy(self._member), self._groups_drawn, self._sizes
        sums = [(totals**power * sizes**other) for power, other in ((1, 0), (2, 0), (1, 1))]
        in_one = [part @ drawn for part in sums]
        in_other = [part.sum(1, keepdim=True) - one for part, one in zip(sums, in_one, strict=True)]
        n1, square1 = sizes @ drawn, sizes.square() @ drawn
        n0, square0 = sizes.sum() - n1, sizes.square().sum() - square1
        share = n1 * n0 / sizes.sum()
        variance = torch.zeros_like(in_one[0])
        for (total, square, cross), n, sizes_squared, g in zip(
            (in_one, in_other), (n1, n0), (square1, square0), self._n_groups, strict=True
        ):
            mean = total / n
            variance += g / (g - 1) * (square - 2 * mean * cross + mean.square() * sizes_squared) / n.square()
        variance *= share.square()
        w = share * (in_one[0] / n1 - in_other[0] / n0)
        exact = moments(centred, self._pure, [], self._labels).variance
        variance = torch.maximum(variance, torch.from_numpy((FLOOR * exact).astype(np.float32))[:, None])
        if self._mixed:
            rows = np.concatenate(self._mixed)
            mean_, variance_ = moments(centred, [], self._mixed, self._labels)
            w += ranks[:, rows] @ self._drawn[rows] - torch.from_numpy(mean_.astype(np.float32))[:, None]
            variance += torch.from_numpy(variance_.astype(np.float32))[:, None]
        return torch.where(variance > 0, w / variance.clamp_min(1e-20).sqrt(), 0.0)


def permuted_labels(
    labels: Bool[np.ndarray, " n_texts"], groups: Int[np.ndarray, " n_texts"], n_permutations: int, seed: int
) -> Float32[np.ndarray, "n_texts n_permutations"]:
    """Exchanges of the labels, as columns of 0 and 1.

    Groups with both classes keep their counts and shuffle inside; groups of one class swap their label as a whole.
    """
    rng = np.random.default_rng(seed)
    out = np.empty((labels.size, n_permutations), dtype=np.float32)
    pure, mixed = pure_and_mixed(labels, groups)
    if pure:
        of_group = np.array([labels[rows[0]] for rows in pure], dtype=np.float32)
        shuffled = rng.permuted(np.repeat(of_group[:, None], n_permutations, axis=1), axis=0)
        for rows, row_labels in zip(pure, shuffled, strict=True):
            out[rows] = row_labels
    for rows in mixed:
        own = labels[rows].astype(np.float32)
        out[rows] = rng.permuted(np.repeat(own[:, None], n_permutations, axis=1), axis=0)
    return out


def moments(
    centred: Float[np.ndarray, "d_sae n_texts"],
    pure: list[np.ndarray],
    mixed: list[np.ndarray],
    labels: Bool[np.ndarray, " n_texts"],
) -> Moments:
    """Exact mean and variance of W over the exchanges of `permuted_labels`.

    A sum of m draws without replacement from values v_1..v_N has mean m * mean(v) and variance
    m (N - m) / (N (N - 1)) * sum (v - mean(v))^2; here the v are texts inside a mixed group, or sums over pure groups.
    """
    mean = np.zeros(centred.shape[0])
    variance = np.zeros(centred.shape[0])
    strata: list[tuple[Float[np.ndarray, "d_sae n_units"], int]] = []
    if pure:
        singles = all(rows.size == 1 for rows in pure)
        totals = (
            centred[:, np.concatenate(pure)]
            if singles
            else np.stack([centred[:, rows].sum(axis=1) for rows in pure], axis=1)
        )
        strata.append((totals, sum(bool(labels[rows[0]]) for rows in pure)))
    strata += [(centred[:, rows], int(labels[rows].sum())) for rows in mixed]
    for values, drawn in strata:
        size = values.shape[1]
        centre = values.mean(axis=1, dtype=np.float64)
        mean += drawn * centre
        if size > 1:
            spread = np.square(values - centre[:, None]).sum(axis=1)
            variance += drawn * (size - drawn) / (size * (size - 1)) * spread
    return Moments(mean, variance)


def pure_and_mixed(
    labels: Bool[np.ndarray, " n_texts"], groups: Int[np.ndarray, " n_texts"]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of each group with one class, and rows of each group with both."""
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order])) + 1
    pure: list[np.ndarray] = []
    mixed: list[np.ndarray] = []
    for rows in np.split(order, bounds):
        (pure if labels[rows].all() or not labels[rows].any() else mixed).append(rows)
    return pure, mixed
