import numpy as np
import pytest

from pipelines.audit.baselines import logistic
from pipelines.evaluation import probing
from pipelines.evaluation.pools import Pool
from pipelines.evaluation.probes import _newton, f1, fit_dense_probes, fit_probes, stratified_folds
from pipelines.evaluation.schema import KS

TOPICS = ["birds", "chess", "metals", "rivers"]


def planted(n: int, seed: int, d_sae: int = 60, strength: float = 3.0) -> tuple[Pool, list[str]]:
    """Latent 3 * t + 1 of topic t fires on its documents; the activations hold the same along random directions."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 4, size=n)
    latents = np.maximum(rng.normal(size=(n, d_sae)), 0)
    latents[np.arange(n), 3 * topic + 1] += strength
    directions = np.random.default_rng(99).normal(size=(d_sae, 20))
    x = latents @ directions + rng.normal(size=(n, 20)) + 50
    return Pool(np.arange(n), x.astype(np.float32), latents.astype(np.float32)), [TOPICS[t] for t in topic]


def task_of(train: list[str], test: list[str]) -> probing.Task:
    task = probing.Task.of(train, test, n_resamples=200, seed=0)
    assert task is not None
    return task


# -- the solver --------------------------------------------------------------------------------------------------------


def test_newton_finds_the_optimum_that_lbfgs_finds() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 80, 6))
    labels = np.arange(80) % 2 == 0  # balanced, so that the class weights are 1
    labels = np.stack([labels, labels[::-1], np.roll(labels, 1)])
    theta = _newton(x, labels, np.array([0.5, 2.0, 10.0]))
    for t, penalty in enumerate((0.5, 2.0, 10.0)):
        weight, bias = logistic(x[t], labels[t], penalty=penalty)
        np.testing.assert_allclose(theta[t], np.append(weight, bias), atol=2e-4)


def test_newton_survives_separable_classes_and_constant_columns() -> None:
    x = np.stack([np.linspace(-1, 1, 40), np.zeros(40)], axis=1)[None] * 1e3
    labels = x[:, :, 0] > 0
    fold = stratified_folds(labels[0].astype(int), 0)
    probe = fit_probes(x, labels, fold)
    assert np.isfinite(probe.weight).all()
    assert probe.weight[0, 1] == 0
    assert f1(probe.score(x) > 0, labels)[0] == 1


def test_dense_probe_is_the_sparse_one_on_all_columns() -> None:
    """Fewer columns than rows: the rotation into the rows' own space must change nothing."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(60, 8)) * np.arange(1, 9) + 5, rng.random((2, 60)) < 0.5
    fold = stratified_folds(np.zeros(60, int), 0)
    dense, sparse = fit_dense_probes(x, labels, fold), fit_probes(np.stack([x, x]), labels, fold)
    np.testing.assert_allclose(dense.weight, sparse.weight, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(dense.held_out, sparse.held_out, rtol=1e-4, atol=1e-6)


def test_folds_hold_their_share_of_every_stratum() -> None:
    stratum = np.repeat([0, 1, 2], [30, 9, 3])
    fold = stratified_folds(stratum, seed=5)
    for s, n in ((0, 10), (1, 3), (2, 1)):
        assert np.bincount(fold[stratum == s]).tolist() == [n, n, n]


# -- probing -----------------------------------------------------------------------------------------------------------


def test_probing_finds_planted_latents() -> None:
    (train, topics), (test, held) = planted(300, 0), planted(200, 1)
    figures, details = probing.probe_latents(train, test, task_of(topics, held), seed=0)
    for t, topic in enumerate(TOPICS):
        assert details["latents"][topic][0] == 3 * t + 1
    assert figures["probe_latents_auroc_k1"].value > 0.95
    assert figures["probe_latents_accuracy_k1"].value > 0.85
    assert figures["probe_latents_f1_k1"].value > 0.8
    assert figures["probe_latents_auroc_k1"].n == 200


def test_a_weaker_latent_has_a_lower_auroc_with_an_interval_around_it() -> None:
    (train, topics), (test, held) = planted(300, 0, strength=1.0), planted(200, 1, strength=1.0)
    figure = probing.probe_latents(train, test, task_of(topics, held), seed=0)[0]["probe_latents_auroc_k1"]
    assert 0.6 < figure.low < figure.value < figure.high < 0.95


def test_probing_nothing_is_chance_for_every_k_and_baseline() -> None:
    (train, topics), (test, held) = planted(300, 0, strength=0), planted(400, 1, strength=0)
    task = task_of(topics, held)
    found = probing.baselines(train, test, task).figures | probing.probe_random(train, test, task)[0]
    found |= probing.probe_latents(train, test, task, seed=0)[0]
    aurocs = [figure for name, figure in found.items() if "auroc" in name]
    assert len(aurocs) == 1 + 5 * len(KS)
    assert all(abs(figure.value - 0.5) < 0.08 for figure in aurocs)
    assert sum(figure.low <= 0.5 <= figure.high for figure in aurocs) >= 0.8 * len(aurocs)


def test_shuffled_topics_are_chance_where_true_topics_are_found() -> None:
    (train, topics), (test, held) = planted(300, 0), planted(200, 1)
    figures, _ = probing.probe_latents(train, test, task_of(topics, held), seed=0)
    for k in KS:
        assert abs(figures[f"probe_shuffled_auroc_k{k}"].value - 0.5) < 0.12
        assert figures[f"probe_latents_auroc_k{k}"].value > 0.95


def test_the_dense_probe_finds_what_no_coordinate_tells_alone() -> None:
    (train, topics), (test, held) = planted(300, 0), planted(200, 1)
    found = probing.baselines(train, test, task_of(topics, held)).figures
    assert found["probe_dense_auroc"].value > found["probe_neurons_auroc_k1"].value + 0.1


def test_probing_does_not_depend_on_scale_or_order_of_latents() -> None:
    (train, topics), (test, held) = planted(200, 0), planted(100, 1)
    task = task_of(topics, held)
    order = np.random.default_rng(0).permutation(60)
    scale = np.random.default_rng(1).uniform(0.5, 20, size=60).astype(np.float32)
    moved = [Pool(p.document, p.x, (p.latents * scale)[:, order]) for p in (train, test)]
    one, other = probing.probe_latents(train, test, task, 0)[0], probing.probe_latents(*moved, task, 0)[0]
    for name, figure in one.items():
        if "shuffled" not in name:
            assert other[name].value == pytest.approx(figure.value, abs=1e-6), name


def test_no_choice_depends_on_test_documents() -> None:
    (train, topics), (test, held) = planted(200, 0), planted(100, 1)
    poisoned = Pool(test.document, test.x, test.latents.copy())
    poisoned.latents[:, 40] = [TOPICS.index(t) for t in held]  # tells every topic, on test documents only
    for pool in (test, poisoned):
        _, details = probing.probe_latents(train, pool, task_of(topics, held), 0)
        assert 40 not in {row[0] for row in details["latents"].values()}


def test_topics_without_enough_documents_are_left_out() -> None:
    train, test = ["a"] * 30 + ["b"] * 30 + ["rare"] * 9, ["a"] * 10 + ["b"] * 10 + ["rare"] * 9
    assert task_of(train, test).topics == ("a", "b")
    assert probing.Task.of(["a"] * 50, ["a"] * 50, n_resamples=10, seed=0) is None
