import numpy as np
import pytest
from label_corpus import fire_on, spell, to_firings, zipf_table
from pipelines.labels.heldout import HeldOut
from pipelines.labels.predicates import firing_weights, fit_predicates

from pipelines.labels.contexts import order_by_strength
from pipelines.labels.families import build_families

N = 12


@pytest.fixture(scope="module")
def scored():
    """Twelve latents on different rules and families, fitted, with their held-out arrangement."""
    rng = np.random.default_rng(0)
    table = zipf_table(rng)
    families = build_families(table, spell(2000))
    columns = []
    for i in range(N):
        if i % 3 == 0:
            holds = families[2].code == families[2].code[5 + i]
        elif i % 3 == 1:
            holds = np.isin(table.token, 20 + i + np.arange(4))
        else:
            holds = families[4].code == i % 5 + 1
        columns.append(fire_on(rng, holds, table, recall=0.7, noise=0.002))
    firings = to_firings(*zip(*columns, strict=True))
    train = firings.where(np.isin(firings.row, table.rows("train")))
    weight, strong = firing_weights(train, order_by_strength(train))
    rules = fit_predicates(train, weight, families, table.rows("train"), table.document)
    assert rules.found.all()
    assert len(set(rules.family.tolist())) == 3
    return table, families, firings, rules, strong, HeldOut(table, families)


def holds(families, rules, latent):
    codes = rules.code[rules.indptr[latent] : rules.indptr[latent + 1]]
    return np.isin(families[rules.family[latent]].code, codes)


def test_predictions_per_document_agree_with_running_the_rule_on_every_token(scored):
    table, families, _, rules, _, heldout = scored
    rows = table.rows("heldout")
    documents = np.unique(table.document[rows])
    predicted = heldout.predicted_by_document(rules)
    for latent in range(N):
        runs = holds(families, rules, latent)[rows]
        naive = [(runs & (table.document[rows] == d)).sum() for d in documents]
        assert predicted[latent].tolist() == naive
    assert heldout.tokens.sum() == len(rows)


def test_scores_agree_with_running_the_rule_on_every_token(scored):
    table, families, firings, rules, strong, heldout = scored
    tested = heldout.select(firings)
    scores = heldout.score(tested, rules, strong)
    rows = table.rows("heldout")
    for latent in range(N):
        mine = tested.latent == latent
        value = np.zeros(table.n_tokens)
        value[tested.row[mine]] = tested.value[mine]
        fires, runs, is_strong = value[rows] > 0, holds(families, rules, latent)[rows], value[rows] >= strong[latent]
        tpr, fpr = runs[fires].mean(), runs[~fires].mean()
        found = scores.detection
        assert found.n_firing[latent] == fires.sum()
        assert found.tpr[latent] == pytest.approx(tpr)
        assert found.fpr[latent] == pytest.approx(fpr)
        assert found.balanced_accuracy[latent] == pytest.approx((tpr + 1 - fpr) / 2)
        assert found.precision[latent] == pytest.approx(fires[runs].mean())
        assert scores.tpr_strong[latent] == pytest.approx(runs[is_strong].mean())
        assert found.low[latent] <= found.balanced_accuracy[latent] <= found.high[latent]


def test_scores_on_others_agree_with_scoring_the_dealt_rule(scored):
    _, _, firings, rules, strong, heldout = scored
    tested = heldout.select(firings)
    others = heldout.score_on_others(tested, rules)
    assert np.allclose(np.diag(others), heldout.score(tested, rules, strong).detection.balanced_accuracy)
    for shift in (1, 5):
        dealt = (np.arange(N) + shift) % N
        scores = heldout.score(tested, rules.take(dealt), strong)
        assert np.allclose(others[dealt, np.arange(N)], scores.detection.balanced_accuracy)


def test_scores_are_undefined_without_a_rule_or_without_firings(scored):
    _, _, firings, rules, strong, heldout = scored
    tested = heldout.select(firings)
    index = np.arange(N)
    index[0] = -1
    scores = heldout.score(tested.where(tested.latent != 1), rules.take(index), strong)
    assert np.isnan(scores.detection.balanced_accuracy[:2]).all()
    assert np.isnan(scores.auroc[:2]).all()
    assert not np.isnan(scores.detection.balanced_accuracy[2:]).any()
    assert np.isnan(heldout.score_on_others(tested.where(tested.latent != 1), rules)[:, 1]).all()


def test_selection_leaves_train_tokens_and_sinks_out(scored):
    table, _, _, _, _, heldout = scored
    everything = to_firings([np.arange(table.n_tokens)], [np.ones(table.n_tokens)])
    assert np.array_equal(heldout.select(everything).row, table.rows("heldout"))
