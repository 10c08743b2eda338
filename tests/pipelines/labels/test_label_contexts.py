import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_corpus import to_firings, zipf_table

from pipelines.labels.contexts import cut_windows, order_by_strength, select_examples
from pipelines.labels.firings import block_ranges


@pytest.fixture
def table():
    return zipf_table(np.random.default_rng(0), n_contexts=40, context_length=64, document_length=40)


def random_firings(table, n_latents=6, seed=1):
    rng = np.random.default_rng(seed)
    counts = [0, 1, 3, 40, 400, 900][:n_latents]
    rows = [rng.choice(table.n_train, n, replace=False) for n in counts]
    return to_firings(rows, [rng.gamma(2, 1, n) + 0.01 for n in counts])


def select(firings, table, seed=0, **kw):
    options = {"n_top": 10, "n_quantiles": 5, "n_per_quantile": 2} | kw
    return select_examples(firings, order_by_strength(firings), table.document, seed, **options)


def test_order_by_strength_sorts_each_latent_from_strong_to_weak(table):
    firings = random_firings(table)
    value, latent = firings.value[order_by_strength(firings)], firings.latent[order_by_strength(firings)]
    assert (latent == firings.latent).all()
    assert ((np.diff(value) <= 0) | (np.diff(latent) > 0)).all()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_order_by_strength_refuses_what_is_no_activation(value):
    with pytest.raises(
        ValueError, match=r"positive and finite where it fires; the block's latent 1 has .* at token row 7"
    ):
        order_by_strength(to_firings([[1], [7]], [[1.0], [value]]))


def test_top_examples_are_the_strongest_of_different_documents(table):
    firings = random_firings(table)
    examples = select(firings, table)
    for latent in range(firings.n_latents):
        span = slice(firings.indptr[latent], firings.indptr[latent + 1])
        best = {}
        for row, value in zip(firings.row[span], firings.value[span], strict=True):
            document = table.document[row]
            best[document] = max(best.get(document, (0.0, 0)), (value, row))
        want = [row for _, row in sorted(best.values(), reverse=True)[:10]]
        mine = (examples.latent == latent) & (examples.kind == 0)
        assert examples.row[mine].tolist() == want
        assert examples.rank[mine].tolist() == list(range(len(want)))


def test_quantile_examples_come_from_their_rank_of_strength(table):
    firings = random_firings(table)
    examples = select(firings, table)
    mine = (examples.latent == 5) & (examples.kind == 1)
    values = np.sort(firings.value[firings.indptr[5] :])
    stratum = np.searchsorted(values, examples.value[mine]) * 10 // len(values)
    assert stratum.tolist() == examples.rank[mine].tolist()


def test_examples_never_show_one_firing_twice_and_cover_rare_latents(table):
    firings = random_firings(table)
    examples = select(firings, table)
    pairs = list(zip(examples.latent.tolist(), examples.row.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert set(examples.latent.tolist()) == {1, 2, 3, 4, 5}
    assert (examples.latent == 1).sum() == 1


def test_examples_are_reproducible_from_the_seed(table):
    firings = random_firings(table)
    same = [np.array_equal(a, b) for a, b in zip(select(firings, table), select(firings, table), strict=True)]
    assert all(same)
    assert not np.array_equal(select(firings, table).row, select(firings, table, seed=1).row)


def test_windows_stay_inside_the_document_piece_and_the_context(table):
    firings = random_firings(table)
    examples = select(firings, table)
    windows = cut_windows(examples, firings, table, 16)
    for i, row in enumerate(examples.row):
        expected = [
            r
            for r in range(row - 16, row + 17)
            if 0 <= r < table.n_tokens
            and r // 64 == row // 64
            and table.document[r] == table.document[row]
            and table.position[r] - r == table.position[row] - row
        ]
        assert windows.row[i][windows.inside[i]].tolist() == expected
        assert windows.row[i, 16] == row


def test_windows_carry_the_activations_of_the_latent(table):
    firings = random_firings(table)
    examples = select(firings, table)
    windows = cut_windows(examples, firings, table, 16)
    dense = np.zeros((firings.n_latents, table.n_tokens), np.float32)
    dense[firings.latent, firings.row] = firings.value
    expected = np.where(windows.inside, dense[examples.latent[:, None], windows.row], 0)
    assert np.array_equal(windows.value, expected)
    assert np.array_equal(windows.value[:, 16], examples.value)


def test_windows_of_nothing_are_empty(table):
    nothing = to_firings([[], []], [[], []])
    examples = select(nothing, table)
    assert cut_windows(examples, nothing, table, 4).row.shape == (0, 9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 80), st.integers(1, 20))
def test_blocks_cover_every_latent_once_within_their_bounds(counts, max_firings, max_latents):
    counts = np.array(counts, np.int64)
    ranges = list(block_ranges(counts, max_firings, max_latents))
    assert [i for lo, hi in ranges for i in range(lo, hi)] == list(range(len(counts)))
    assert all(0 < hi - lo <= max_latents for lo, hi in ranges)
    assert all(counts[lo:hi].sum() <= max_firings or hi - lo == 1 for lo, hi in ranges)


def test_firings_filter_and_take_agree_with_a_dense_matrix(table):
    firings = random_firings(table)
    keep = firings.row % 2 == 0
    filtered = firings.where(keep)
    assert np.array_equal(filtered.latent, firings.latent[keep])
    taken = firings.take(np.array([4, 0, 2]))
    assert taken.n_firings.tolist() == firings.n_firings[[4, 0, 2]].tolist()
    assert np.array_equal(taken.row[:400], firings.row[firings.indptr[4] : firings.indptr[5]])
