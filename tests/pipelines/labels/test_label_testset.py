import numpy as np
import pytest
import torch
from label_corpus import fire_on, to_firings, zipf_table

from pipelines.labels.draws import integers_below, uniforms
from pipelines.labels.neighbours import nearest_neighbours
from pipelines.labels.testset import NEGATIVES, SplitIndex, draw_test_set


@pytest.fixture(scope="module")
def drawn():
    """Latents 0-7 fire on tokens of their own, 8 in train text alone, 9 on every token 50, 10 everywhere."""
    rng = np.random.default_rng(0)
    table = zipf_table(rng, n_contexts=800)
    columns = [fire_on(rng, np.isin(table.token, (20 + i, 60 + i)), table, recall=0.6, noise=0.01) for i in range(8)]
    columns.append((np.arange(5), np.ones(5)))
    columns.append(fire_on(rng, table.token == 50, table, recall=1.0, noise=0))
    columns.append((np.arange(table.n_tokens), rng.random(table.n_tokens) + 0.1))
    everything = to_firings(*zip(*columns, strict=True))
    firings = everything.where(np.isin(everything.row, table.rows("heldout")))
    neighbours = (np.arange(11)[:, None] + np.array([1, 2])) % 8
    index = SplitIndex(table, window=5)
    test = draw_test_set(firings, np.arange(11), index, neighbours, seed=3, n_per_decile=20, n_negatives=150)
    return table, firings, neighbours, index, test


def of(test, latent, kind):
    return test.where((test.latent == latent) & (test.kind == (0 if kind == "positive" else NEGATIVES.index(kind) + 1)))


def fires(firings, latent, row):
    return np.isin(row, firings.row[firings.indptr[latent] : firings.indptr[latent + 1]])


def test_every_question_is_on_a_held_out_document(drawn):
    table, _, _, _, test = drawn
    assert np.isin(test.row, table.rows("heldout")).all()
    train = np.unique(table.document[table.rows("train")])
    assert not np.isin(test.document, train).any()
    assert (test.document == table.document[test.row]).all()


def test_positives_fire_and_negatives_do_not(drawn):
    _, firings, _, _, test = drawn
    for latent in range(11):
        mine = test.where(test.latent == latent)
        assert np.array_equal(fires(firings, latent, mine.row), mine.kind == 0)


def test_positives_cover_the_tenths_of_strength_equally(drawn):
    _, firings, _, _, test = drawn
    positives = of(test, 3, "positive")
    assert np.bincount(positives.decile).tolist() == [20] * 10
    values = np.sort(firings.value[firings.indptr[3] : firings.indptr[4]])
    rank = np.searchsorted(values, positives.value)
    edges = len(values) * np.arange(11) // 10
    assert (edges[positives.decile] <= rank).all()
    assert (rank < edges[positives.decile + 1]).all()


def test_same_token_negatives_share_a_token_with_a_positive(drawn):
    table, _, _, _, test = drawn
    for latent in range(8):
        negatives, positives = of(test, latent, "same_token"), of(test, latent, "positive")
        assert len(negatives.row) > 20
        assert np.isin(table.token[negatives.row], table.token[positives.row]).all()


def test_same_token_negatives_come_at_the_natural_rate(drawn):
    # On its two tokens a latent fires 60 % of the time, elsewhere 1 %: draws on the others are nearly always kept.
    table, _, _, _, test = drawn
    kept = []
    for latent in range(8):
        own = np.isin(table.token[of(test, latent, "same_token").row], (20 + latent, 60 + latent)).mean()
        among = np.isin(table.token[of(test, latent, "positive").row], (20 + latent, 60 + latent)).mean()
        kept.append(own * (1 - among) / (among * (1 - own)))
    assert np.mean(kept) == pytest.approx(0.4, abs=0.1)


def test_a_latent_that_always_fires_on_its_token_has_no_same_token_negatives(drawn):
    test = drawn[4]
    assert len(of(test, 9, "positive").row) > 30
    assert len(of(test, 9, "same_token").row) == 0
    assert len(of(test, 9, "same_document").row) > 30


def test_same_document_and_same_window_negatives_stand_beside_a_positive(drawn):
    table, _, _, _, test = drawn
    for latent in range(8):
        positives = of(test, latent, "positive")
        assert np.isin(of(test, latent, "same_document").document, positives.document).all()
        wrong = of(test, latent, "same_window")
        assert len(wrong.row) > 100
        assert np.isin(wrong.centre, positives.row).all()
        assert (np.abs(wrong.row - wrong.centre) <= 5).all()
        assert (table.position[wrong.row] - table.position[wrong.centre] == wrong.row - wrong.centre).all()
        assert (table.document[wrong.row] == table.document[wrong.centre]).all()


def test_neighbour_negatives_are_where_a_neighbour_fires(drawn):
    _, firings, neighbours, _, test = drawn
    for latent in range(8):
        negatives = of(test, latent, "neighbour")
        assert len(negatives.row) > 50
        assert (
            fires(firings, neighbours[latent, 0], negatives.row) | fires(firings, neighbours[latent, 1], negatives.row)
        ).all()


def test_latents_that_never_or_always_fire_get_what_there_is(drawn):
    test = drawn[4]
    assert len(of(test, 8, "positive").row) == 0
    assert len(of(test, 8, "random").row) == 150
    always = test.where(test.latent == 10)
    assert (always.kind == 0).all()
    assert len(always.row) == 200


def test_nothing_is_asked_twice_and_limits_hold(drawn):
    test = drawn[4]
    assert np.unique(np.stack([test.latent, test.kind, test.row]), axis=1).shape[1] == len(test.row)
    for latent in range(11):
        assert np.bincount(test.kind[(test.latent == latent) & (test.kind > 0)], minlength=6).max() <= 150


def test_quiet_means_silent_in_the_whole_window(drawn):
    table, firings, neighbours, index, test = drawn
    for i in range(0, len(test.row), 37):
        window = np.arange(max(test.centre[i] - 5, 0), min(test.centre[i] + 6, table.n_tokens))
        window = window[
            (window // table.context_length == test.centre[i] // table.context_length)
            & (table.position[window] - window == table.position[test.centre[i]] - test.centre[i])
            & (table.document[window] == table.document[test.centre[i]])
        ]
        assert test.quiet[i] == (not fires(firings, test.latent[i], window).any())
    calm = draw_test_set(firings, np.arange(11), index, neighbours, seed=3, n_negatives=50, quiet_only=True)
    assert calm.quiet[calm.kind > 0].all()
    assert (calm.kind == 1).sum() >= 8 * 50
    assert not (calm.kind == NEGATIVES.index("same_window") + 1).any()


def test_a_latent_gets_the_same_questions_alone_and_among_others(drawn):
    _, firings, neighbours, index, test = drawn
    alone = draw_test_set(firings, np.array([4]), index, neighbours, seed=3, n_per_decile=20, n_negatives=150)
    for a, b in zip(alone, test.where(test.latent == 4), strict=True):
        assert np.array_equal(a, b)
    other = draw_test_set(firings, np.array([4]), index, neighbours, seed=4, n_per_decile=20, n_negatives=150)
    assert not np.array_equal(other.row, alone.row)


def test_train_firings_are_refused(drawn):
    table, _, neighbours, index, _ = drawn
    train = to_firings([table.rows("train")[:3]], [np.ones(3)])
    with pytest.raises(ValueError, match=r"heldout tokens only, but 3 firings are elsewhere \(first: token row"):
        draw_test_set(train, np.array([0]), index, neighbours[:1], seed=0)


def test_draws_are_uniform_and_independent_of_the_order():
    latent, number = np.repeat(np.arange(50), 2000), np.tile(np.arange(2000), 50)
    u = uniforms(7, 1, latent, number)
    assert abs(u.mean() - 0.5) < 0.005
    assert np.histogram(u, 20, (0, 1))[0].min() > 4500
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(u, uniforms(7, 2, latent, number))[0, 1]) < 0.02
    back = np.arange(len(u))[::-1]
    assert np.array_equal(uniforms(7, 1, latent[back], number[back]), u[back])
    whole = integers_below(np.array([0, 1, 5]), 0, 0, np.arange(3), np.arange(3))
    assert whole[0] == whole[1] == 0
    assert set(integers_below(np.full(500, 5), 0, 0, np.zeros(500, int), np.arange(500)).tolist()) == {0, 1, 2, 3, 4}


def test_nearest_neighbours_agree_with_sorting_all_cosines():
    W_dec = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    found, cosine = nearest_neighbours(W_dec, 5, rows_at_once=7)
    unit = (W_dec / W_dec.norm(dim=1, keepdim=True)).numpy()
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    assert np.array_equal(found, np.argsort(-similarity, axis=1)[:, :5])
    np.testing.assert_allclose(cosine, -np.sort(-similarity, axis=1)[:, :5], rtol=1e-5)
    assert nearest_neighbours(W_dec[:3], 5)[0].shape == (3, 2)
