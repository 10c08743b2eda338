"""The loops of the sparse training path, compiled by numba: scans, gathers and segment sums over NumPy arrays.

`sae.kernels.cpu` calls them where numba is installed (the extra `fast`) and states what each one computes; here is only
how: the same inputs give the same bits whatever the number of threads.

Selections compare *keys*: the bits of a positive float read as an integer sort like the float, in float32 (int32) and
in bfloat16 (int16), and every negative float has a negative key. Positive entries are those with a key of at least 1.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast, no_type_check

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

_FAST = {"reassoc", "contract", "nsz"}
"""Sums may be reordered into vector lanes and fused into multiply-adds; NaN and infinity keep their meaning."""

_VECTOR = 32
"""Integers that the compiler handles in one iteration of an unrolled vector loop."""


def _compiled(function: F) -> F:
    """`numba.njit` with this module's settings; the machine code is cached on disk where that is possible."""
    settings = {"nogil": True, "fastmath": _FAST, "error_model": "numpy"}
    try:
        return cast(F, numba.njit(cache=True, **settings)(function))
    except RuntimeError:  # no writable folder for the cache
        return cast(F, numba.njit(**settings)(function))


# ---- selection -------------------------------------------------------------------------------------------------------


@_compiled
@no_type_check
def _kth_largest(keys, n, k, lowest_bit):
    """The largest t, its bits below `lowest_bit` zero, that at least k of keys[:n] reach; at least 1."""
    t = np.int32(0)
    for bit in range(30, lowest_bit - 1, -1):
        candidate = t | np.int32(1 << bit)
        reached = np.int32(0)
        for i in range(n):
            reached += keys[i] >= candidate
        if reached >= k:
            t = candidate
    return max(t, np.int32(1))


@_compiled
@no_type_check
def _padded(n):
    """`n` rounded up to a whole number of vectors, so that loops over padded arrays have no remainder."""
    return (n + _VECTOR - 1) // _VECTOR * _VECTOR


@_compiled
@no_type_check
def select_rows(start, stop, keys, k, lowest, slack, latents, counts):
    """Entries of each row with keys of at least `lowest`, ascending; with k > 0 only the k largest of them.

    Of equal keys the lowest latents are kept. With `slack` > 0, entries up to that many keys below the k-th are kept
    too where all of them fit into `latents`.

    Columns are taken in n_groups groups, column c in group c mod n_groups, whose maxima cost one vector operation for
    every few columns. At least k groups reach the k-th largest maximum, so the k-th largest entry is not below it, and
    only groups that reach this bound are looked into: line by line, which gives ascending latents.

    Args:
        keys: (rows, d_sae) int32 or int16.
        lowest: at least 1.
        latents: (rows, capacity) with capacity >= k, written up to counts[row].
        counts: entries found in each row. More than `capacity`, possible for k = 0, means that the rest was left out.
    """
    width = keys.shape[1]
    capacity = latents.shape[1]
    n_groups = min(_padded(max(2 * k, int(np.sqrt(max(k, _VECTOR) * width)))), width)
    n_lines = (width + n_groups - 1) // n_groups
    maxima = np.zeros(n_groups, keys.dtype)
    largest = np.zeros(_padded(n_groups), np.int32)
    groups = np.zeros(n_groups, np.int64)
    found_key = np.zeros(_padded(width), np.int32)
    found_at = np.zeros(_padded(width), np.int32)
    for r in range(start, stop):
        row = keys[r]
        maxima[:] = row[:n_groups]
        for line in range(1, n_lines):
            part = row[line * n_groups : (line + 1) * n_groups]
            for g in range(len(part)):
                maxima[g] = max(maxima[g], part[g])
        bound = np.int32(lowest)
        if 0 < k < n_groups:
            for g in range(n_groups):
                largest[g] = maxima[g]
            bound = max(bound, _kth_largest(largest, len(largest), k, 12 if keys.itemsize == 4 else 0) - slack)
        n_hit = 0
        for g in range(n_groups):
            groups[n_hit] = g
            n_hit += maxima[g] >= bound
        n_found = 0
        for line in range(n_lines):
            for hit in range(n_hit):
                c = line * n_groups + groups[hit]
                if c < width:
                    key = np.int32(row[c])
                    if key >= bound:
                        found_key[n_found] = key
                        found_at[n_found] = c
                        n_found += 1
        if k == 0 or n_found <= k:
            for i in range(min(n_found, capacity)):
                latents[r, i] = found_at[i]
            counts[r] = n_found
            continue
        found_key[n_found : _padded(n_found)] = 0
        kth = _kth_largest(found_key, _padded(n_found), k, 0)
        least, n_ties, n_near = kth, k, 0
        for i in range(n_found):
            n_ties -= found_key[i] > kth
            n_near += found_key[i] >= kth - slack
        if slack > 0 and n_near <= capacity:
            least, n_ties = kth - slack, capacity
        n_kept = 0
        for i in range(n_found):
            key = found_key[i]
            if key > kth:
                latents[r, n_kept] = found_at[i]
                n_kept += 1
            elif key >= least and n_ties > 0:
                latents[r, n_kept] = found_at[i]
                n_kept += 1
                n_ties -= 1
        counts[r] = n_kept


@_compiled
@no_type_check
def select_above_each(start, stop, pre_acts, lower, latents, counts):
    """The entries of each row above the bound of their own latent, ascending.

    Args:
        lower: (d_sae) float32, one bound a latent.
        latents: (rows, capacity), written up to counts[row].
        counts: entries found; more than `capacity` means that the rest was left out.
    """
    width, capacity = pre_acts.shape[1], latents.shape[1]
    n_whole = width // _VECTOR
    for r in range(start, stop):
        row = pre_acts[r]
        n = 0
        for s in range(n_whole + 1):
            part = row[s * _VECTOR : min((s + 1) * _VECTOR, width)]
            bounds = lower[s * _VECTOR : min((s + 1) * _VECTOR, width)]
            n_above = np.int32(0)
            for c in range(len(part)):
                n_above += part[c] > bounds[c]
            if n_above == 0:
                continue
            for c in range(len(part)):
                if part[c] > bounds[c]:
                    if n < capacity:
                        latents[r, n] = s * _VECTOR + c
                    n += 1
        counts[r] = n


@_compiled
@no_type_check
def nth_largest(keys, n_keep):
    """The n_keep-th largest of int32 keys of at least 0, and how many keys lie above it; needs n_keep <= len(keys)."""
    kth = np.int64(0)
    above = 0
    for shift, n_bits in ((20, 11), (10, 10), (0, 10)):
        histogram = np.zeros(1 << n_bits, np.int64)
        prefix = kth >> (shift + n_bits)
        for key in keys:
            if np.int64(key) >> (shift + n_bits) == prefix:
                histogram[(np.int64(key) >> shift) & ((1 << n_bits) - 1)] += 1
        digit = (1 << n_bits) - 1
        while above + histogram[digit] < n_keep:
            above += histogram[digit]
            digit -= 1
        kth |= np.int64(digit) << shift
    return kth, above


@_compiled
@no_type_check
def take(start, stop, table, latents, counts, values):
    """values[row, i] = table[row, latents[row, i]] for i below counts[row]."""
    for row in range(start, stop):
        for i in range(counts[row]):
            values[row, i] = table[row, latents[row, i]]


@_compiled
@no_type_check
def recompute(start, stop, x, W_enc, b_enc, latents, counts, values):
    """values[row, i] = x[row] . W_enc[j] + b_enc[j] for each latent j = latents[row, i], i below counts[row].

    Args:
        W_enc: (d_sae, d_in).
    """
    width = x.shape[1]
    for row in range(start, stop):
        for i in range(counts[row]):
            j = latents[row, i]
            total = np.float32(0)
            for c in range(width):
                total += x[row, c] * W_enc[j, c]
            values[row, i] = total + b_enc[j]


@_compiled
@no_type_check
def prune(start, stop, latents, values, counts, k, bound):
    """Drop, in place, candidates not above `bound`, then all but the k largest of a row (k = 0: none).

    Of equal values the first candidates stay.
    """
    for row in range(start, stop):
        n = 0
        for i in range(counts[row]):
            if values[row, i] > bound:
                latents[row, n] = latents[row, i]
                values[row, n] = values[row, i]
                n += 1
        if 0 < k < n:
            keys = np.zeros(_padded(n), np.float32)
            keys[:n] = values[row, :n]
            kth = _kth_largest(keys.view(np.int32), len(keys), k, 0)
            n_ties = k
            for i in range(n):
                n_ties -= keys.view(np.int32)[i] > kth
            kept = 0
            for i in range(n):
                key = keys.view(np.int32)[i]
                if key > kth or (key == kth and n_ties > 0):
                    n_ties -= key == kth
                    latents[row, kept] = latents[row, i]
                    values[row, kept] = keys[i]
                    kept += 1
            n = kept
        counts[row] = n


@_compiled
@no_type_check
def flatten(start, stop, latents, values, counts, offsets, first_row, row_out, latent_out, value_out):
    """The entries of (rows, capacity) tables one after the other, from offsets[row] on; rows count from `first_row`."""
    for row in range(start, stop):
        at = offsets[row]
        for i in range(counts[row]):
            row_out[at + i] = first_row + row
            latent_out[at + i] = latents[row, i]
            value_out[at + i] = values[row, i]


# ---- decoder and gradients -------------------------------------------------------------------------------------------


@_compiled
@no_type_check
def dot_products(start, stop, offsets, members, left, right, dots):
    """dots[e] = left[row] . right[members[e]] for the entries offsets[row] <= e < offsets[row + 1]."""
    width = left.shape[1]
    for row in range(start, stop):
        for e in range(offsets[row], offsets[row + 1]):
            m = members[e]
            total = np.float32(0)
            for c in range(width):
                total += left[row, c] * right[m, c]
            dots[e] = total


@_compiled
@no_type_check
def weighted_sums(start, stop, offsets, members, weights, table, base, out):
    """out[i] = base + sum over offsets[i] <= e < offsets[i + 1] of weights[e] * table[members[e]]."""
    width = table.shape[1]
    for i in range(start, stop):
        e, end = offsets[i], offsets[i + 1]
        for c in range(width):
            out[i, c] = base[c]
        while e + 4 <= end:
            w0, w1, w2, w3 = weights[e], weights[e + 1], weights[e + 2], weights[e + 3]
            m0, m1, m2, m3 = members[e], members[e + 1], members[e + 2], members[e + 3]
            for c in range(width):
                out[i, c] += (w0 * table[m0, c] + w1 * table[m1, c]) + (w2 * table[m2, c] + w3 * table[m3, c])
            e += 4
        while e < end:
            w0, m0 = weights[e], members[e]
            for c in range(width):
                out[i, c] += w0 * table[m0, c]
            e += 1


@_compiled
@no_type_check
def sort_by_latent(offsets, latents, starts, order, rows):
    """Counting sort of row-major entries by latent, then row.

    Args:
        starts: (d_sae + 1), written: where each latent's entries start.
        order: written: the entry that stands at each place.
        rows: written: its row.
    """
    starts[:] = 0
    for e in range(len(latents)):
        starts[latents[e] + 1] += 1
    for j in range(len(starts) - 1):
        starts[j + 1] += starts[j]
    free = starts.copy()
    for row in range(len(offsets) - 1):
        for e in range(offsets[row], offsets[row + 1]):
            place = free[latents[e]]
            free[latents[e]] = place + 1
            order[place] = e
            rows[place] = row


@_compiled
@no_type_check
def squared_distances(start, stop, x, y, squares):
    """squares[row] = norm² of x[row] − y[row]; y has as many rows as x, or one for all."""
    width = x.shape[1]
    for row in range(start, stop):
        other = row if len(y) == len(x) else 0
        total = np.float32(0)
        for c in range(width):
            d = x[row, c] - y[other, c]
            total += d * d
        squares[row] = total


# ---- optimizer -------------------------------------------------------------------------------------------------------


@_compiled
@no_type_check
def adam_rows(start, stop, weight, grad, mean, square, scale, step_size, beta1, beta2, correction2, eps, unit_norm):
    """One step of Adam on each row of `weight`, in place; with `unit_norm` the row is scaled to norm 1 after it.

    Args:
        scale: what the gradients are multiplied by first (clipping).
        step_size: learning rate over 1 − beta1^t.
        correction2: 1 / sqrt(1 − beta2^t).
    """
    width = weight.shape[1]
    one = np.float32(1)
    for row in range(start, stop):
        norm = np.float32(0)
        for c in range(width):
            g = grad[row, c] * scale
            m = mean[row, c] + (one - beta1) * (g - mean[row, c])
            v = beta2 * square[row, c] + (one - beta2) * g * g
            mean[row, c] = m
            square[row, c] = v
            w = weight[row, c] - step_size * m / (np.sqrt(v) * correction2 + eps)
            weight[row, c] = w
            norm += w * w
        if unit_norm and norm > 0:
            inverse = one / np.sqrt(norm)
            for c in range(width):
                weight[row, c] *= inverse


@_compiled
@no_type_check
def project_rows(start, stop, weight, grad, squares, project):
    """Remove from grad[row], in place, its part along the unit vector weight[row] if `project`;
    squares[row] = norm² of what is left."""
    width = grad.shape[1]
    for row in range(start, stop):
        if project:
            along = np.float32(0)
            for c in range(width):
                along += grad[row, c] * weight[row, c]
            for c in range(width):
                grad[row, c] -= along * weight[row, c]
        total = np.float32(0)
        for c in range(width):
            total += grad[row, c] * grad[row, c]
        squares[row] = total
