"""Training on small planted data: what a step does, how it can be stopped and resumed, what it refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sae import (
    FVU,
    SAE,
    BatchTopKConfig,
    BatchTopKSAE,
    StepMetrics,
    StopTraining,
    TopKConfig,
    Trainer,
    TrainerConfig,
    TranscoderConfig,
    build,
)
from sae.kernels import reference
from sae.losses import reconstruction_loss, total_variance
from sae.normalise import Normaliser
from sae.parallel import Group
from sae.sparse_objective import decode_dead
from sae.trainer import DivergedError

D_IN, D_SAE, K, BATCH = 16, 64, 4, 256


def planted(n_batches: int, seed: int = 0, batch: int = BATCH) -> Iterator[torch.Tensor]:
    """Sums of four of 32 directions, on a large mean."""
    directions = torch.randn(32, D_IN, generator=torch.Generator().manual_seed(99))
    directions /= directions.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_batches):
        active = torch.rand(batch, 32, generator=generator).argsort(dim=1) < K
        strength = 1 + torch.rand(batch, 32, generator=generator)
        yield (active * strength) @ directions + 10


def trainer(architecture: str = "batchtopk", n_steps: int = 20, **settings: Any) -> Trainer:
    scale = settings.pop("input_scale", 1.0)
    config = (BatchTopKConfig if architecture == "batchtopk" else TopKConfig)(d_in=D_IN, d_sae=D_SAE, k=K)
    return Trainer(
        build(config, seed=0),
        TrainerConfig(**settings),
        n_steps,
        normalisers=[Normaliser(torch.zeros(D_IN), torch.tensor(scale))],
    )


def fvu(sae: SAE, batches: Iterator[torch.Tensor]) -> float:
    metric = FVU(D_IN)
    for x in batches:
        metric.update(x, sae(x).x_hat)
    return metric.compute()


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_fit_learns_planted_directions(architecture: str) -> None:
    run = trainer(architecture, 150, lr=5e-3)
    history: list[StepMetrics] = []
    run.fit(planted(150), history.append)
    sae = run.export()
    if isinstance(sae, BatchTopKSAE):
        sae.calibrate_threshold(planted(4, seed=1))
    assert fvu(sae, planted(8, seed=2)) < 0.3
    assert history[-1].batch_fvu < 0.5 * history[0].batch_fvu
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_step_metrics_report_the_step() -> None:
    run = trainer(n_steps=3, warmup_fraction=0.0, decay_fraction=0.0, lr=1e-3)
    history: list[StepMetrics] = []
    run.fit(planted(3), history.append)
    assert [m.step for m in history] == [1, 2, 3]
    assert [m.n_tokens for m in history] == [BATCH, 2 * BATCH, 3 * BATCH]
    assert all(m.l0 == K and m.lr == 1e-3 and 0 < m.batch_fvu <= m.loss for m in history)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_first_loss_and_update_equal_dense_autograd(architecture: str) -> None:
    settings = {"warmup_fraction": 0.0, "decay_fraction": 0.0, "auxk_alpha": 0.0, "grad_clip": None}
    run = trainer(architecture, 1, **settings)
    x = next(planted(1))
    run.initialise(x)
    dense = build(run.sae.config, seed=0)
    with torch.no_grad():
        dense.b_dec.copy_(run.sae.b_dec)
        pre_acts = dense.pre_acts(x)
        mask = (
            reference.topk_mask(pre_acts, K)
            if architecture == "topk"
            else reference.batchtopk_mask(pre_acts, K * BATCH)
        )
    x_hat = reference.forward(x, dense.W_enc, dense.b_enc, dense.W_dec, dense.b_dec, mask)
    loss = reconstruction_loss(x, x_hat, total_variance(x), BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    assert dense.W_dec.grad is not None
    dense.W_dec.grad -= (dense.W_dec.grad * dense.W_dec).sum(1, keepdim=True) * dense.W_dec.detach()
    torch.optim.Adam(dense.parameters(), lr=run.sae.adam_lr).step()
    with torch.no_grad():
        dense.W_dec /= dense.W_dec.norm(dim=1, keepdim=True)

    history: list[StepMetrics] = []
    run.fit([x], history.append)
    assert history[0].loss == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in run.sae.named_parameters():
        torch.testing.assert_close(parameter, dense.get_parameter(name), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("centre", ["mean", "geometric_median"])
def test_initialise_puts_b_dec_at_the_centre(centre: Any) -> None:
    run = trainer()
    x = next(planted(1))
    x[0] += 1e4
    run.initialise(x, centre)
    if centre == "mean":
        torch.testing.assert_close(run.sae.b_dec.detach(), x.mean(dim=0))
    else:
        torch.testing.assert_close(run.sae.b_dec.detach(), x[1:].mean(dim=0), atol=0.5, rtol=0)


def test_auxk_revives_dead_latents() -> None:
    def dead_after(alpha: float) -> int:
        run = trainer(n_steps=60, auxk_alpha=alpha, dead_threshold_tokens=5 * BATCH, lr=3e-3)
        with torch.no_grad():
            run.sae.b_enc[: D_SAE // 2] = -1.5
        history: list[StepMetrics] = []
        run.fit(planted(60), history.append)
        return history[-1].dead

    without = dead_after(0.0)
    assert without > D_SAE // 4
    assert dead_after(1 / 32) <= 0.7 * without


def test_auxk_sends_gradients_to_dead_latents_only() -> None:
    run = trainer()
    x = next(planted(1))
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[1, 5, 9, 11, 60]] = True
    decode_dead(run.sae, x - 5, dead, 3, Group()).square().sum().backward()  # type: ignore[no-untyped-call]
    for parameter, dimension in ((run.sae.W_enc, 1), (run.sae.W_dec, 0), (run.sae.b_enc, 0)):
        assert parameter.grad is not None
        touched = parameter.grad.movedim(dimension, 0).reshape(D_SAE, -1).abs().sum(1) > 0
        assert bool(touched.any())
        assert not bool((touched & ~dead).any())


def test_auxk_gradient_equals_that_of_the_plain_formula() -> None:
    run = trainer()
    x = next(planted(1))
    dead = torch.arange(D_SAE) % 5 == 0
    sae = run.sae
    parameters = list(sae.parameters())
    ours = torch.autograd.grad(decode_dead(run.sae, x, dead, 3, Group()).square().sum(), parameters)
    pre_acts = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc)[:, dead]
    chosen = torch.zeros_like(pre_acts).scatter(1, pre_acts.topk(3, dim=1).indices, 1.0)
    plain = ((pre_acts.relu() * chosen) @ sae.W_dec[dead]).square().sum()
    for mine, theirs in zip(ours, torch.autograd.grad(plain, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [0.05, 1.0, 7.0])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_export_folds_the_input_scale_exactly(architecture: str, scale: float) -> None:
    run = trainer(architecture, 20, input_scale=scale)
    run.fit(planted(20))
    exported = run.export()
    x = next(planted(1, seed=3))
    torch.testing.assert_close(exported(x).x_hat, run.sae(x * scale).x_hat / scale, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exported.W_dec, run.sae.W_dec)
    assert exported is not run.sae


def test_fit_is_reproducible() -> None:
    def weights() -> torch.Tensor:
        run = trainer(n_steps=10)
        run.fit(planted(10))
        return run.sae.W_dec.detach()

    assert torch.equal(weights(), weights())


def test_screening_in_bfloat16_trains_the_same_sae() -> None:
    exact, screened = trainer(n_steps=10), trainer(n_steps=10, autocast_bf16=True)
    exact.fit(planted(10))
    screened.fit(planted(10))
    torch.testing.assert_close(screened.sae.W_dec, exact.sae.W_dec, atol=1e-3, rtol=0)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_resume_equals_an_uninterrupted_run_bit_for_bit(architecture: str) -> None:
    settings: dict[str, Any] = {"dead_threshold_tokens": 3 * BATCH}
    whole = trainer(architecture, 12, **settings)
    whole.fit(planted(12))

    first = trainer(architecture, 12, **settings)
    first.fit(planted(12), lambda metrics: metrics.step < 5)
    second = trainer(architecture, 12, **settings)
    second.load_state_dict(first.state_dict())
    assert second.step == 5
    second.fit(list(planted(12))[5:])

    for name, tensor in whole.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, second.state_dict()[name]), name
        else:
            assert tensor == second.state_dict()[name], name


def test_resume_refuses_the_state_of_another_run() -> None:
    state = trainer(n_steps=12).state_dict()
    with pytest.raises(ValueError, match=r"same run settings\. n_steps: saved 12, now 13"):
        trainer(n_steps=13).load_state_dict(state)
    with pytest.raises(ValueError, match="trainer_config: saved"):
        trainer(n_steps=12, lr=0.5).load_state_dict(state)


@pytest.mark.parametrize("how", ["false", "raise"])
def test_fit_stops_cleanly_when_asked_and_goes_on_later(how: str) -> None:
    def on_step(metrics: StepMetrics) -> bool:
        if metrics.step == 4 and how == "raise":
            raise StopTraining
        return metrics.step != 4

    run = trainer(n_steps=8)
    run.fit(planted(8), on_step)
    assert run.step == 4
    run.fit(planted(8))
    assert run.step == 8


def test_fit_of_a_finished_run_reads_nothing() -> None:
    run = trainer(n_steps=2)
    run.fit(planted(2))
    run.fit(iter([]))
    assert run.step == 2


def test_fit_refuses_a_stream_that_ends_early() -> None:
    with pytest.raises(ValueError, match="needs 5 batches, but they ended after step 3"):
        trainer(n_steps=5).fit(planted(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fit_refuses_bad_numbers_before_it_touches_the_weights(bad: float) -> None:
    run = trainer(n_steps=5)
    run.fit(planted(2), lambda metrics: metrics.step < 2)
    before = {name: tensor.clone() for name, tensor in run.sae.state_dict().items()}
    x = next(planted(1))
    x[7, 3] = bad
    with pytest.raises(ValueError, match="got 1 of 256 rows with NaN or infinity at step 2"):
        run.fit([x])
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.sae.state_dict().items())


def test_fit_refuses_a_loss_that_is_not_finite_before_it_touches_the_weights() -> None:
    run = trainer(n_steps=5)
    before = run.sae.W_enc.detach().clone()
    with pytest.raises(ValueError, match=r"at least two different rows, got 8 of variance 0 at step 0"):
        run.fit([torch.ones(8, D_IN)])
    with pytest.raises(DivergedError, match=r"The loss must be finite, got .* at step 0 \(batch variance"):
        run.fit([1e25 * next(planted(1))])
    assert torch.equal(run.sae.W_enc, before)


@pytest.mark.parametrize("shape", [(8, D_IN + 1), (0, D_IN)])
def test_fit_refuses_another_width_and_an_empty_batch(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"A batch must have shape \(batch, 16\)"):
        trainer().fit([torch.zeros(shape)])


def test_fit_refuses_tensors_that_do_not_belong_together_before_it_touches_the_weights() -> None:
    config = TranscoderConfig(d_in=D_IN, d_out=5, d_sae=D_SAE, k=K)
    run = Trainer(build(config, seed=0), TrainerConfig(), 5)
    before = run.sae.W_enc.detach().clone()
    x, y = torch.randn(8, D_IN), torch.randn(8, 5)
    with pytest.raises(ValueError, match=r"share one float dtype, got torch\.bfloat16, torch\.float32 at step 0"):
        run.fit([(x, y.bfloat16())])
    with pytest.raises(ValueError, match=r"shape \(batch, 16\), \(batch, 5\) .*, got \(8, 16\), \(7, 5\)"):
        run.fit([(x, y[:7])])
    with pytest.raises(ValueError, match=r"shape \(batch, 16\), \(batch, 5\) .*, got \(8, 16\) at"):
        run.fit([x])
    assert torch.equal(run.sae.W_enc, before)


def test_resume_refuses_another_normalisation_or_sae_naming_it() -> None:
    state = trainer(n_steps=12).state_dict()
    with pytest.raises(ValueError, match=r"normaliser_scales: saved \[1\.0\], now \[2\.0\]"):
        trainer(n_steps=12, input_scale=2.0).load_state_dict(state)
    centred = Trainer(
        build(BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=K), seed=0),
        TrainerConfig(),
        12,
        normalisers=[Normaliser(torch.ones(D_IN), torch.tensor(1.0))],
    )
    with pytest.raises(ValueError, match=r"normaliser_shift\.0: the saved values are others"):
        centred.load_state_dict(state)
    with pytest.raises(ValueError, match="sae_config: saved"):
        trainer("topk", n_steps=12).load_state_dict(state)


def test_trainer_refuses_an_empty_run_and_a_scale_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="`n_steps` must be at least 1, got 0"):
        trainer(n_steps=0)
    with pytest.raises(ValueError, match="scales of `normalisers` must be positive, got"):
        trainer(input_scale=-1.0)


def test_trainer_config_lists_everything_that_is_wrong() -> None:
    with pytest.raises(
        ValueError, match=r"`lr` must be positive, got -1\.0; `decay_fraction` must lie between 0 and 1"
    ):
        TrainerConfig(lr=-1.0, decay_fraction=1.5)
    with pytest.raises(ValueError, match=r"`auxk_alpha` must not be negative.*`k_aux` must be positive or None, got 0"):
        TrainerConfig(auxk_alpha=-1.0, k_aux=0)
