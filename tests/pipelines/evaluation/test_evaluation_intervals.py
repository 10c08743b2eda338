import numpy as np
import pytest
import torch

from pipelines.audit.statistics import auroc
from pipelines.evaluation.intervals import MAX_UNITS, Resampling, interval, mean_interval, unit_of, weighted_aurocs


def test_resamples_draw_as_many_units_as_there_are_and_only_those() -> None:
    occupied = torch.tensor([True, False, True, True, False])
    weights = Resampling(occupied, 200, seed=3).weights
    assert weights.shape == (200, 5)
    assert torch.equal(weights.sum(1), torch.full((200,), 3.0, dtype=torch.float64))
    assert not weights[:, ~occupied].any()
    assert torch.equal(weights, Resampling(occupied, 200, seed=3).weights)


def test_documents_beyond_the_limit_share_units() -> None:
    assert unit_of(torch.tensor([3, MAX_UNITS + 3, MAX_UNITS - 1])).tolist() == [3, 3, MAX_UNITS - 1]


def test_intervals_of_a_ratio_cover_the_truth_as_often_as_they_say() -> None:
    """Documents of different lengths, tokens of one document alike: what intervals over tokens would get wrong."""
    rng, covered, covered_by_tokens, n_runs = np.random.default_rng(0), 0, 0, 300
    for run in range(n_runs):
        length = rng.integers(5, 60, size=80)
        level = rng.normal(2.0, 1.0, size=80)  # every token of a document has its level; the mean over tokens is 2
        sums, n = torch.from_numpy(level * length), torch.from_numpy(length.astype(np.float64))
        resampling = Resampling(torch.ones(80, dtype=torch.bool), 300, seed=run)
        low, high = resampling.interval((resampling.weights @ sums) / (resampling.weights @ n)) or (0, 0)
        covered += low <= 2.0 <= high
        tokens = np.repeat(level, length)
        covered_by_tokens += abs(tokens.mean() - 2.0) <= 1.96 * tokens.std() / np.sqrt(len(tokens))
    assert 0.90 <= covered / n_runs <= 0.98
    assert covered_by_tokens / n_runs < 0.6


def test_one_document_has_no_interval_and_neither_has_what_cannot_be_computed() -> None:
    assert Resampling(torch.tensor([True, False]), 100).interval(torch.ones(100)) is None
    assert interval(np.full(100, np.nan)) is None
    assert interval(np.append(np.linspace(0, 1, 90), np.full(10, np.nan))) is None
    assert mean_interval(torch.ones(1), 100) is None


def test_interval_of_a_mean_is_one_for_few_and_for_many_items() -> None:
    values = torch.randn(MAX_UNITS, generator=torch.Generator().manual_seed(0)).double()
    few = mean_interval(values, 2000)
    many = mean_interval(torch.cat([values, values[:1]]), 2000)
    assert few is not None
    assert many is not None
    assert few == pytest.approx(many, abs=0.01)
    assert mean_interval(torch.cat([torch.ones(1), torch.zeros(MAX_UNITS)]), 100)[0] == 0  # a share, never below


def test_weighted_auroc_is_that_of_rows_said_as_often_as_drawn() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, size=40).astype(float), rng.random(40) < 0.4
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=25).astype(float)
    found = weighted_aurocs(scores, labels, weights)
    for value, row in zip(found, weights, strict=True):
        index = np.repeat(np.arange(40), row.astype(int))
        assert value == pytest.approx(float(auroc(scores[index][:, None], labels[index])[0]))
    assert np.isnan(weighted_aurocs(scores, labels, np.where(labels, 0.0, 1.0)[None]))[0]
