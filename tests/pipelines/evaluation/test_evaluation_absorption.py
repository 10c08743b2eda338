import numpy as np
import pytest

from pipelines.evaluation.absorption import Absorbed, absorbed, absorption, absorption_figures
from pipelines.evaluation.pools import Pool
from pipelines.evaluation.probes import fit_dense_probes, stratified_folds

D = 40
CONCEPT, CHILDREN, TOKENS = 0, range(1, 11), range(11, 30)
"""Latents: the concept's own, those that take over on a few documents each, and others that have nothing to do with it.
"""


def world(n: int, seed: int, absorbed_share: float, *, partly: float = 0.0) -> tuple[Pool, np.ndarray, np.ndarray]:
    """Documents with and without a concept. On a share of those with it, its latent is silent (or lowered to `partly`
    of its strength), and one of ten children, whose directions hold the concept's too, fires."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    taken = labels & (rng.random(n) < absorbed_share)
    latents = np.zeros((n, 30))
    latents[:, list(TOKENS)] = np.maximum(rng.normal(size=(n, len(TOKENS))), 0)
    latents[:, CONCEPT] = labels * rng.uniform(3, 5, size=n) * np.where(taken, partly, 1)
    child = rng.choice(CHILDREN, size=n)
    latents[np.arange(n), child] = taken * rng.uniform(3, 5, size=n) * (1 - partly) * 1.5
    x = latents @ decoder() + 0.05 * rng.normal(size=(n, D)) + 7
    return Pool(np.arange(n), x.astype(np.float32), latents.astype(np.float32)), labels, taken


def decoder() -> np.ndarray:
    W = np.eye(30, D)
    W[CHILDREN] = (W[[CONCEPT]] + W[CHILDREN]) / np.sqrt(2)
    return W


def measured(share: float, scale: float = 1.0, order: np.ndarray | None = None, **kwargs: float) -> Absorbed:
    train, labels, _ = world(400, 0, share, **kwargs)
    test, test_labels, _ = world(400, 1, share, **kwargs)
    W, order = decoder(), np.arange(30) if order is None else order
    train, test = (Pool(p.document, p.x, p.latents[:, order] * scale) for p in (train, test))
    fold = stratified_folds(labels.astype(int), 0)
    probe = fit_dense_probes(train.x.astype(np.float64), labels[None], fold)
    found = absorption(train, test, labels, test_labels, fold, probe, 0, W[order] / scale)
    assert isinstance(found, Absorbed), found
    return found


def test_planted_absorption_is_found_at_its_rate() -> None:
    found = measured(0.3)
    assert found.main == (CONCEPT,)
    assert set(found.absorbing) <= set(CHILDREN)
    assert len(found.absorbing) == 3
    _, labels, taken = world(400, 1, 0.3)
    assert len(found.full) == pytest.approx(labels.sum(), abs=5)
    assert found.full.mean() == pytest.approx(taken[labels].mean(), abs=0.03)
    assert found.fraction.mean() == pytest.approx(taken[labels].mean(), abs=0.06)


def test_without_absorption_there_is_none() -> None:
    found = measured(0.0)
    assert not found.full.any()
    assert found.fraction.mean() < 0.01
    assert found.absorbing == ()


def test_a_latent_that_is_only_lowered_is_absorbed_in_part() -> None:
    found = measured(1.0, partly=0.4)
    assert not found.full.any()
    assert 0.5 < found.fraction.min() <= found.fraction.max() < 0.9  # by the concept's direction alone it would be 0.6


def test_absorption_does_not_depend_on_decoder_norms_or_the_order_of_latents() -> None:
    one = measured(0.3)
    order = np.random.default_rng(3).permutation(30)
    other = measured(0.3, scale=4.0, order=order)
    assert other.full.tolist() == one.full.tolist()
    assert other.fraction == pytest.approx(one.fraction, abs=1e-5)
    assert [order[j] for j in other.main] == list(one.main)


def test_the_formula_by_hand() -> None:
    cosine = np.array([0.9, 0.5, 0.05, 0.02])
    main, total = np.array([0]), np.array([10.0, 10.0, 10.0, 10.0, 10.0])
    latents = np.array([[0, 5, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9], [4, 6, 0, 0], [10, 5, 0, 0]], float)
    projection = np.array([[0, 5, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4], [4, 5, 0, 0], [10, 5, 0, 0]], float)
    full, fraction, took = absorbed(latents, projection, cosine, total, main)
    # silent and carried; carried by a latent too askew for the fraction; too askew for both; in part; main says it all
    assert full.tolist() == [True, True, False, False, False]
    assert fraction.tolist() == pytest.approx([1.0, 0.0, 0.0, 5 / 9, 0.0])
    assert took.tolist() == [1, 2, -1, 1, -1]


def test_a_concept_that_the_model_does_not_hold_is_not_measured() -> None:
    train, _, _ = world(400, 0, 0.1)
    labels = np.random.default_rng(5).random(400) < 0.4
    fold = stratified_folds(labels.astype(int), 0)
    probe = fit_dense_probes(train.x.astype(np.float64), labels[None], fold)
    assert "0.6 is needed" in str(absorption(train, train, labels, labels, fold, probe, 0, decoder()))
    figures, details = absorption_figures({"noise": "why"}, 100, 0)
    assert figures == {}
    assert details == {"noise": "why"}


def test_mean_over_concepts_has_an_interval() -> None:
    figures, details = absorption_figures({"a": measured(0.3), "b": measured(0.0), "c": "why not"}, 300, 0)
    figure = figures["absorption_full"]
    assert figure.low < figure.value < figure.high
    assert figure.value == pytest.approx((details["a"]["full"] + details["b"]["full"]) / 2, abs=1e-6)
    assert figure.n == details["a"]["n_documents"] + details["b"]["n_documents"]
