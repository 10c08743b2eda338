import numpy as np
import pytest
from scipy import stats

from pipelines.labels.scores import clustered_rate
from pipelines.labels.testset import NEGATIVES, Exam
from pipelines.labels.verdicts import paired_auroc, score_verdicts


def questions(rng, n_latents=4, n_positive=200, n_negative=150, n_documents=40):
    latent = np.repeat(np.arange(n_latents), n_positive + 5 * n_negative)
    kind = np.tile(np.repeat(np.arange(6), [n_positive] + [n_negative] * 5), n_latents).astype(np.int8)
    n = len(latent)
    row = np.arange(n)
    decile = np.where(kind == 0, rng.integers(0, 10, n), -1).astype(np.int8)
    document = rng.integers(0, n_documents, n).astype(np.int32)
    return Exam(latent, kind, row, row, decile, np.ones(n, np.float32), document, np.ones(n, bool))


@pytest.fixture(scope="module")
def judged():
    rng = np.random.default_rng(0)
    test = questions(rng)
    share = np.where(test.kind == 0, 0.7, 0.1 * test.kind)
    verdict = np.where(rng.random(len(share)) < share, 0.5 + rng.random(len(share)) / 2, rng.random(len(share)) / 2.1)
    return test, verdict.astype(np.float32)


def score(test, verdict, density=0.01, n=4):
    return score_verdicts(test, verdict.astype(np.float32), np.arange(n), np.full(n, density))


def test_scores_agree_with_a_computation_latent_by_latent(judged):
    test, verdict = judged
    found = score(test, verdict)
    for i in range(4):
        mine = test.latent == i
        positive = verdict[mine & (test.kind == 0)]
        tpr = np.mean(positive >= 0.5)
        assert found.tpr.rate[i] == pytest.approx(tpr)
        for kind, name in enumerate(NEGATIVES, start=1):
            negative = verdict[mine & (test.kind == kind)]
            fpr, scores = np.mean(negative >= 0.5), found.by_kind[name]
            assert scores.fpr[i] == pytest.approx(fpr)
            assert scores.balanced_accuracy[i] == pytest.approx((tpr + 1 - fpr) / 2)
            assert scores.low[i] < scores.balanced_accuracy[i] < scores.high[i]
            area = stats.mannwhitneyu(positive, negative).statistic / len(positive) / len(negative)
            assert scores.auroc[i] == pytest.approx(area)
            assert scores.n[i] == 150
        for decile in range(10):
            yes = verdict[mine & (test.decile == decile)] >= 0.5
            assert found.tpr_by_decile[i, decile] == pytest.approx(yes.mean())
        fpr = found.by_kind["random"].fpr[i]
        assert found.precision.rate[i] == pytest.approx(tpr * 0.01 / (tpr * 0.01 + fpr * 0.99))
        assert found.precision.low[i] < found.precision.rate[i] < found.precision.high[i]


def test_rates_and_intervals_agree_with_the_dense_formula(judged):
    test, verdict = judged
    found = score(test, verdict)
    asked, yes = np.zeros((4, 40), np.int64), np.zeros((4, 40), np.int64)
    positive = test.kind == 0
    np.add.at(asked, (test.latent[positive], test.document[positive]), 1)
    np.add.at(yes, (test.latent[positive], test.document[positive]), verdict[positive] >= 0.5)
    for mine, dense in zip(found.tpr, clustered_rate(yes, asked, 0.95), strict=True):
        np.testing.assert_allclose(mine, dense)


def test_perfect_and_empty_labels_score_one_and_half(judged):
    test, _ = judged
    perfect = score(test, (test.kind == 0).astype(np.float32))
    assert (perfect.by_kind["same_token"].balanced_accuracy == 1).all()
    assert (perfect.by_kind["same_token"].p < 1e-6).all()
    assert (perfect.precision.rate == 1).all()
    for constant in (0.0, 1.0):
        useless = score(test, np.full(len(test.row), constant))
        assert (useless.by_kind["random"].balanced_accuracy == 0.5).all()
        assert (useless.by_kind["random"].auroc == 0.5).all()
        assert (useless.by_kind["random"].p >= 0.5).all()


def test_failures_count_as_wrong_and_are_counted(judged):
    test, verdict = judged
    perfect = (test.kind == 0).astype(np.float32)
    failing = np.where(test.latent == 1, np.nan, perfect)
    found = score(test, failing)
    assert found.n_failed.tolist() == [0, 950, 0, 0]
    assert found.by_kind["random"].balanced_accuracy.tolist() == [1, 0, 1, 1]
    assert found.by_kind["random"].auroc.tolist() == [1, 0, 1, 1]
    assert found.by_kind["random"].p[1] > 0.99
    some = np.where(np.random.default_rng(0).random(len(verdict)) < 0.2, np.nan, perfect)
    assert (score(test, some).by_kind["random"].balanced_accuracy < 0.9).all()


def test_p_values_are_uniform_when_the_label_knows_only_the_document():
    """Documents differ in how often the label says yes; within one, firing has nothing to do with it."""
    rng = np.random.default_rng(1)
    p = []
    for _ in range(40):
        test = questions(rng, n_latents=25, n_positive=60, n_negative=60, n_documents=20)
        often = rng.beta(0.5, 0.5, (25, 20))
        yes = rng.random(len(test.row)) < often[test.latent, test.document]
        p.append(score(test, yes.astype(np.float32), n=25).by_kind["same_document"].p)
    p = np.concatenate(p)
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.025)
    assert np.mean(p < 0.5) == pytest.approx(0.5, abs=0.05)


def test_p_values_count_documents_not_questions():
    rng = np.random.default_rng(2)
    test = questions(rng, n_documents=1)
    assert (score(test, (test.kind == 0).astype(np.float32)).by_kind["random"].p == 1).all()
    test = questions(rng, n_documents=3)
    few = score(test, (test.kind == 0).astype(np.float32))
    assert (few.by_kind["random"].p > 0.01).all()
    assert (few.by_kind["random"].low < 0.75).all()


def test_latents_without_questions_are_undefined(judged):
    test, verdict = judged
    keep = (test.latent != 2) & ~((test.latent == 1) & (test.kind == 2))
    found = score(test.where(keep), verdict[keep])
    assert np.isnan(found.tpr.rate[2])
    assert np.isnan([found.by_kind[name].balanced_accuracy[2] for name in NEGATIVES]).all()
    assert np.isnan(found.by_kind["same_token"].p[1])
    assert found.by_kind["same_token"].n.tolist() == [150, 0, 0, 150]
    assert not np.isnan(found.by_kind["same_document"].p[1])


def test_auroc_of_ties_is_half():
    area = paired_auroc(np.zeros(3, int), np.ones(3), np.zeros(2, int), np.ones(2), 2)
    assert area[0] == 0.5
    assert np.isnan(area[1])


def test_verdicts_of_another_length_are_refused(judged):
    test, verdict = judged
    with pytest.raises(ValueError, match="must answer every question"):
        score(test, verdict[:-1])
