"""The encoder rules against values computed by hand and against a plain loop."""

import pytest
import torch
from architectures import ALL, random_sae

from sae import SAE, BatchTopKConfig, BatchTopKSAE, JumpReLUSAE, SAEConfig, TopKConfig, TopKSAE, build

CONFIGS = [ALL["topk"], ALL["batchtopk"], ALL["jumprelu"]]
every = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


def randomised(config: SAEConfig) -> SAE:
    sae = build(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (sae.b_enc, sae.b_dec):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        if isinstance(sae, BatchTopKSAE | JumpReLUSAE):
            sae.threshold.fill_(0.4)
    return sae


def test_pre_acts_of_a_two_latent_sae_by_hand() -> None:
    sae = build(TopKConfig(d_in=2, d_sae=2, k=1), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        sae.b_enc.copy_(torch.tensor([0.5, -0.5]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    x = torch.tensor([[2.0, 3.0]])
    # (x - b_dec) = [1, 2]; @ W_enc = [7, 10]; + b_enc = [7.5, 9.5]; top 1 is the second latent
    torch.testing.assert_close(sae.pre_acts(x), torch.tensor([[7.5, 9.5]]))
    torch.testing.assert_close(sae.encode(x), torch.tensor([[0.0, 9.5]]))
    torch.testing.assert_close(sae(x).x_hat, torch.tensor([[1.0, 10.5]]))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)
def test_encode_agrees_with_a_loop_over_tokens_and_latents(config: SAEConfig) -> None:
    sae = randomised(config)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(5, 24)
    with torch.no_grad():
        for row in range(5):
            pre = [float((x[row] - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j]) for j in range(24)]
            kept = sorted(range(24), key=lambda j: -pre[j])[:3] if isinstance(sae, TopKSAE) else range(24)
            for j in kept:
                if pre[j] > (0.0 if isinstance(sae, TopKSAE) else 0.4):
                    expected[row, j] = pre[j]
    assert expected.count_nonzero() > 5
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-5, rtol=1e-5)


@every
def test_forward_is_decode_of_encode_for_any_leading_shape(config: SAEConfig) -> None:
    sae = random_sae(config)
    x = torch.randn(2, 3, config.d_in)
    output = sae(x)
    torch.testing.assert_close(output.latent_acts, sae.encode(x))
    torch.testing.assert_close(output.x_hat, sae.decode(sae.encode(x)) + sae.bypass(x))
    torch.testing.assert_close(sae.encode(x)[1, 2], sae.encode(x[1, 2]))


@every
def test_encode_sparse_lists_the_nonzeros_of_encode_in_row_major_order(config: SAEConfig) -> None:
    sae = random_sae(config)
    x = torch.randn(50, config.d_in)
    found = sae.encode_sparse(x)
    dense = torch.zeros(50, 24)
    dense[found.row, found.latent] = found.value.detach()
    torch.testing.assert_close(dense, sae.encode(x).detach())
    flat = found.row * 24 + found.latent
    assert len(flat) == dense.count_nonzero()
    assert bool((flat.diff() > 0).all())


def test_topk_keeps_at_most_k_and_never_a_negative_value() -> None:
    sae = randomised(TopKConfig(d_in=6, d_sae=24, k=20))
    latent_acts = sae.encode(torch.randn(100, 6)).detach()
    assert int(latent_acts.count_nonzero(dim=1).max()) <= 20
    assert float(latent_acts.min()) == 0.0


@pytest.mark.parametrize("config", CONFIGS[1:], ids=lambda c: c.architecture)
def test_threshold_is_strict(config: SAEConfig) -> None:
    sae = build(config, seed=0)
    assert isinstance(sae, BatchTopKSAE | JumpReLUSAE)
    sae.threshold.data.fill_(1.0)
    pre_acts = torch.full((24,), 1.0)
    pre_acts[3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert sae.activate(pre_acts).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_encode_takes_any_float_dtype_and_answers_in_that_of_the_weights(dtype: torch.dtype) -> None:
    sae = randomised(CONFIGS[0])
    assert sae.encode(torch.randn(3, 6).to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.architecture)
def test_encode_refuses_another_width(config: SAEConfig) -> None:
    with pytest.raises(ValueError, match=r"last dimension of `x` must be d_in=6, got shape \(3, 5\)"):
        build(config, seed=0).encode(torch.randn(3, 5))


def test_build_ties_the_encoder_to_unit_norm_decoder_rows() -> None:
    sae = build(CONFIGS[0], seed=4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24))
    assert torch.equal(sae.W_enc, sae.W_dec.t())
    assert int(sae.b_enc.count_nonzero()) == int(sae.b_dec.count_nonzero()) == 0


def test_build_gives_equal_weights_for_equal_seeds_only() -> None:
    assert torch.equal(build(CONFIGS[0], seed=4).W_dec, build(CONFIGS[0], seed=4).W_dec)
    assert not torch.equal(build(CONFIGS[0], seed=4).W_dec, build(CONFIGS[0], seed=5).W_dec)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_calibrate_threshold_makes_the_mean_l0_of_the_data_equal_k(k: int) -> None:
    sae = build(BatchTopKConfig(d_in=16, d_sae=64, k=3), seed=0)
    assert isinstance(sae, BatchTopKSAE)
    x = torch.randn(4000, 16) * 30
    threshold = sae.calibrate_threshold(x.split(700), k)
    assert threshold == float(sae.threshold)
    assert float(sae.encode(x).count_nonzero()) / len(x) == pytest.approx(k, rel=2e-3)


def test_calibrate_threshold_does_not_depend_on_how_the_data_is_split() -> None:
    sae = build(BatchTopKConfig(d_in=16, d_sae=64, k=3), seed=0)
    assert isinstance(sae, BatchTopKSAE)
    x = torch.randn(1000, 16)
    assert sae.calibrate_threshold([x]) == pytest.approx(sae.calibrate_threshold(x.split(130)), rel=1e-3)


def test_calibrate_threshold_keeps_every_positive_when_there_are_too_few() -> None:
    sae = build(BatchTopKConfig(d_in=4, d_sae=8, k=8), seed=0)
    assert isinstance(sae, BatchTopKSAE)
    x = torch.randn(100, 4)
    assert sae.calibrate_threshold([x]) == 0.0
    assert int(sae.encode(x).count_nonzero()) == int((sae.pre_acts(x) > 0).sum())


def test_calibrate_threshold_refuses_no_data() -> None:
    sae = build(BatchTopKConfig(d_in=4, d_sae=8, k=2), seed=0)
    assert isinstance(sae, BatchTopKSAE)
    with pytest.raises(ValueError, match="needs at least one token"):
        sae.calibrate_threshold([])
