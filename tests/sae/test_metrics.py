import numpy as np
import pytest
import torch

from sae import FVU, L0, ActivationFrequency, SparseLatents
from sae.metrics import Reconstruction


def fvu_of(x: torch.Tensor, x_hat: torch.Tensor, n_batches: int = 1) -> float:
    metric = FVU(x.shape[-1])
    for part, part_hat in zip(x.chunk(n_batches), x_hat.chunk(n_batches), strict=True):
        metric.update(part, part_hat)
    return metric.compute()


DATA = torch.randn(1000, 12, generator=torch.Generator().manual_seed(0)) + 1000


def test_fvu_of_a_perfect_reconstruction_is_zero() -> None:
    assert fvu_of(DATA, DATA) == 0.0


def test_fvu_of_the_mean_is_one_on_data_with_a_large_mean() -> None:
    mean = DATA.double().mean(0).expand(DATA.shape)
    assert fvu_of(DATA, mean) == pytest.approx(1.0, abs=1e-9)


def test_fvu_of_one_batch_and_of_ten_are_the_same() -> None:
    x_hat = DATA + torch.randn(DATA.shape)
    assert fvu_of(DATA, x_hat, 10) == pytest.approx(fvu_of(DATA, x_hat), rel=1e-10)


def test_fvu_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    x_hat = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    assert fvu_of(x, x_hat) == pytest.approx(5 / 10)


def test_fvu_takes_sequences_bfloat16_and_empty_batches() -> None:
    metric = FVU(12)
    metric.update(DATA[:0], DATA[:0])
    metric.update(DATA.view(10, 100, 12).bfloat16(), DATA.view(10, 100, 12).bfloat16())
    assert metric.n_tokens == 1000


def test_fvu_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"one shape that ends in d_in=4, got \(3, 4\) and \(2, 4\)"):
        FVU(4).update(torch.zeros(3, 4), torch.zeros(2, 4))


def test_fvu_refuses_data_without_variance() -> None:
    with pytest.raises(ValueError, match="needs tokens that differ, got 0"):
        FVU(4).compute()


LATENTS = torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]])


def sparse(latents: torch.Tensor) -> SparseLatents:
    row, latent = latents.nonzero(as_tuple=True)
    return SparseLatents(row, latent, latents[row, latent])


def test_l0_by_hand_dense_and_sparse() -> None:
    dense, from_sparse = L0(), L0()
    dense.update(LATENTS)
    from_sparse.update(sparse(LATENTS), n_tokens=2)
    assert dense.compute() == from_sparse.compute() == 1.5


def test_l0_refuses_sparse_latents_without_their_tokens_and_no_tokens() -> None:
    with pytest.raises(ValueError, match="Pass `n_tokens`"):
        L0().update(sparse(LATENTS))
    with pytest.raises(ValueError, match="L0 needs at least one token"):
        L0().compute()


def test_activation_frequency_by_hand_dense_and_sparse() -> None:
    dense, from_sparse = ActivationFrequency(4), ActivationFrequency(4)
    dense.update(LATENTS)
    from_sparse.update(sparse(LATENTS), n_tokens=2)
    assert dense.counts.tolist() == from_sparse.counts.tolist() == [1, 2, 0, 0]
    assert dense.compute().tolist() == [0.5, 1.0, 0.0, 0.0]
    assert dense.dead_share() == 0.5


def test_activation_frequency_histogram_counts_every_live_latent_once() -> None:
    metric = ActivationFrequency(4)
    metric.update(LATENTS)
    histogram = metric.log10_histogram(n_bins=4, lowest=-4.0)
    assert histogram.edges == [-4.0, -3.0, -2.0, -1.0, 0.0]
    assert histogram.counts == [0, 0, 0, 2]


def test_activation_frequency_refuses_sparse_latents_without_their_tokens_and_no_tokens() -> None:
    with pytest.raises(ValueError, match="Pass `n_tokens`"):
        ActivationFrequency(4).update(sparse(LATENTS))
    with pytest.raises(ValueError, match="ActivationFrequency needs at least one token"):
        ActivationFrequency(4).compute()


# -- reconstruction ----------------------------------------------------------------------------------------------------


def reconstruction_of(x: torch.Tensor, x_hat: torch.Tensor, n_batches: int = 1) -> dict[str, float]:
    metric = Reconstruction(x.double().mean(0) + 3)  # a centre that is only near the mean
    active = torch.arange(len(x)) % 4
    parts = (part.chunk(n_batches) for part in (x, x_hat, active))
    for a, b, n in zip(*parts, strict=True):
        metric.update(a, b, n, torch.zeros(len(a), dtype=torch.long))
    return {name: float(value) for name, value in metric.compute().items()}


def test_a_perfect_reconstruction_has_every_figure_at_its_end() -> None:
    found = reconstruction_of(DATA, DATA)
    assert found["fvu"] == found["mse"] == 0
    for name in ("cosine", "norm_ratio", "relative_bias"):
        assert found[name] == pytest.approx(1, abs=1e-12)
    assert found["l0"] == 1.5


def test_predicting_the_mean_explains_nothing_and_is_not_shrunk() -> None:
    found = reconstruction_of(DATA, DATA.double().mean(0).expand(DATA.shape))
    assert found["fvu"] == pytest.approx(1, abs=1e-9)
    assert found["relative_bias"] == pytest.approx(1, abs=1e-9)


def test_a_reconstruction_of_half_length_is_half() -> None:
    found = reconstruction_of(DATA, DATA / 2)
    assert found["norm_ratio"] == found["relative_bias"] == pytest.approx(0.5)
    assert found["cosine"] == pytest.approx(1)


def test_reconstruction_figures_do_not_depend_on_batches() -> None:
    x_hat = DATA + torch.randn(DATA.shape, generator=torch.Generator().manual_seed(1))
    assert reconstruction_of(DATA, x_hat, 10) == pytest.approx(reconstruction_of(DATA, x_hat), rel=1e-10)
    assert reconstruction_of(DATA, x_hat)["fvu"] == pytest.approx(fvu_of(DATA, x_hat), rel=1e-9)


def test_scaling_activations_scales_the_squared_error_and_nothing_else() -> None:
    x_hat = DATA + torch.randn(DATA.shape, generator=torch.Generator().manual_seed(1))
    one, eight = reconstruction_of(DATA, x_hat), reconstruction_of(8 * DATA, 8 * x_hat)
    assert eight.pop("mse") == pytest.approx(64 * one.pop("mse"))
    assert eight == pytest.approx(one, rel=1e-6)


def test_resampled_groups_are_the_groups_said_more_often() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    x_hat, active, group = x * 0.9 + 0.1, torch.arange(60) % 7, torch.arange(60) % 3
    metric = Reconstruction(torch.zeros(5), n_groups=4)
    metric.update(x, x_hat, active, group)
    drawn = metric.compute(torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 1, 0]], dtype=torch.float64))
    for row, groups in enumerate(([0], [0, 0, 2])):
        rows = torch.cat([(group == g).nonzero()[:, 0] for g in groups])
        alone = Reconstruction(torch.zeros(5))
        alone.update(x[rows], x_hat[rows], active[rows], torch.zeros(len(rows), dtype=torch.long))
        for name, value in alone.compute().items():
            assert float(drawn[name][row]) == pytest.approx(float(value)), name


def test_a_reconstruction_of_what_does_not_vary_has_no_fvu() -> None:
    assert np.isnan(reconstruction_of(torch.ones(9, 4), torch.ones(9, 4))["fvu"])
