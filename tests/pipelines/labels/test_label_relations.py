"""Relations of latents against counting on sets, and planted families that must be found."""

import numpy as np
from label_corpus import to_firings

from pipelines.labels.relations import relate

N_TOKENS = 2000


def by_sets(rows, neighbours, cosine, holes):
    """The module docstring of `relations`, read naively."""
    near, into, of, absorbed = ([[] for _ in rows] for _ in range(4))
    for i, mine in enumerate(rows):
        for j, similar in zip(neighbours[i], cosine[i], strict=True):
            theirs = rows[j]
            if min(len(mine), len(theirs)) < 10:
                continue
            both = len(mine & theirs)
            if similar >= 0.9 or both >= 0.7 * len(mine | theirs):
                near[i].append(j)
            elif both >= 0.9 * len(theirs) and len(mine) >= 2 * len(theirs):
                into[i].append(j)
                of[j].append(i)
            elif len(holes[i]) >= 10 and len(theirs) < len(mine):
                taken = len(holes[i] & theirs)
                if taken >= 0.5 * len(holes[i]) and taken + both >= 0.5 * len(theirs):
                    absorbed[i].append(j)
    return near, into, of, absorbed


def related(rows, neighbours, cosine, holes):
    firings = to_firings([sorted(r) for r in rows], [np.ones(len(r)) for r in rows])
    found = relate(
        firings, np.array(neighbours), np.array(cosine, np.float32), [np.array(sorted(h), np.int64) for h in holes]
    )
    return tuple(found)


def test_planted_families_are_told_apart():
    parent = set(range(0, 400))
    twin = set(range(5, 405))
    part = set(range(100, 180))
    child = set(range(1000, 1060))  # fires where the parent's label holds and the parent is silent
    other = set(range(1500, 1700))
    silent = set()
    rows = [parent, twin, part, child, other, silent]
    neighbours = [[j for j in range(6) if j != i] for i in range(6)]
    cosine = [[0.2] * 5 for _ in range(6)]
    holes = [set(range(1000, 1070)), set(), set(), set(), set(), set()]
    near, into, of, absorbed = related(rows, neighbours, cosine, holes)
    assert near == [[1], [0], [], [], [], []]
    assert into == [[2], [2], [], [], [], []]
    assert of == [[], [], [0, 1], [], [], []]
    assert absorbed == [[3], [], [], [], [], []]


def test_relations_agree_with_counting_on_sets():
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        if i % 3 and rows and len(rows[-1]) > 20:
            base = np.array(sorted(rows[-1]))
            kept = set(rng.choice(base, int(len(base) * rng.choice([0.3, 0.6, 0.95])), replace=False).tolist())
            rows.append(kept | set(rng.integers(0, N_TOKENS, int(rng.integers(0, 20))).tolist()))
        else:
            rows.append(set(rng.choice(N_TOKENS, int(rng.integers(0, 300)), replace=False).tolist()))
    neighbours = [[j for j in range(max(0, i - 5), min(60, i + 6)) if j != i][:6] for i in range(60)]
    neighbours = [(near + [j for j in range(60) if j != i and j not in near])[:6] for i, near in enumerate(neighbours)]
    cosine = np.where(rng.random((60, 6)) < 0.05, 0.95, 0.3)
    holes = [
        set(rng.choice(sorted(rows[n[0]] - rows[i]) or [0], min(12, len(rows[n[0]] - rows[i])), replace=False).tolist())
        for i, n in enumerate(neighbours)
    ]
    found = related(rows, neighbours, cosine.tolist(), holes)
    assert found == by_sets(rows, neighbours, np.float32(cosine), holes)
    assert all(any(each) for each in found)


def test_unrelated_latents_have_no_relations():
    rng = np.random.default_rng(1)
    rows = [set(rng.choice(N_TOKENS, 100, replace=False).tolist()) for _ in range(20)]
    neighbours = [[j for j in range(20) if j != i] for i in range(20)]
    holes = [set(rng.choice(N_TOKENS, 100, replace=False).tolist()) - rows[i] for i in range(20)]
    assert not any(any(kind) for kind in related(rows, neighbours, [[0.1] * 19] * 20, holes))
