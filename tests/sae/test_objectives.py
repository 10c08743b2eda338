"""The training objective of every architecture: its value and gradients by plain formulas, and what training does."""

import math
from typing import Any

import pytest
import torch
from architectures import ALL, D_SAE, K, batch, random_sae
from torch import Tensor

from sae import (
    SAE,
    Crosscoder,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaBatchTopKConfig,
    MatryoshkaBatchTopKSAE,
    Normaliser,
    SAEConfig,
    StandardSAE,
    StepMetrics,
    Trainer,
    TrainerConfig,
    Transcoder,
    build,
    fit_normaliser,
    jumprelu,
)
from sae.kernels import loops, reference
from sae.losses import total_variance
from sae.normalise import Normalisation
from sae.objective import StepContext, StepLosses
from sae.parallel import Group

every = pytest.mark.parametrize("config", ALL.values(), ids=ALL)


def context(target: Tensor, dead: Tensor | None = None, **changes: Any) -> StepContext:
    values: dict[str, Any] = {
        "group": Group(),
        "n_tokens": len(target),
        "variance": total_variance(target),
        "dead": torch.zeros(D_SAE, dtype=torch.bool) if dead is None else dead,
        "step": 9,
        "n_steps": 10,
        "smallest_kept": 0.0,
        "auxk_alpha": 1 / 32,
        "k_aux": 3,
        "bf16": False,
    }
    return StepContext(**(values | changes))


def plain_loss(sae: SAE, x: Tensor, target: Tensor) -> Tensor:
    """Each objective once more, densely, from its docstring."""
    variance, n = total_variance(target), len(x)

    def error(y_hat: Tensor) -> Tensor:
        return (target - y_hat).square().sum() / (n * variance)

    pre_acts = (x - sae.b_dec if sae.subtracts_b_dec else x) @ sae.W_enc + sae.b_enc
    l1 = 1 / math.sqrt(float(variance) * sae.d_out)
    if isinstance(sae, StandardSAE):
        f = pre_acts.relu()
        return error(f @ sae.W_dec + sae.b_dec) + 5 * l1 * f.sum() / n
    if isinstance(sae, GatedSAE):
        f = (pre_acts > 0) * ((pre_acts - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu()
        gate = pre_acts.relu()
        alone = error(gate @ sae.W_dec.detach() + sae.b_dec.detach())
        return error(f @ sae.W_dec + sae.b_dec) + 5 * l1 * gate.sum() / n + alone
    if isinstance(sae, Crosscoder) and sae.config.sparsity == "l1":
        f = pre_acts.relu()
        norms = sae.W_dec[:, :6].norm(dim=1) + sae.W_dec[:, 6:].norm(dim=1)
        return error(f @ sae.W_dec + sae.b_dec) + 2 * l1 * (f * norms).sum() / n
    topk = (isinstance(sae, Transcoder) and sae.config.activation == "topk") or sae.config.architecture == "topk"
    mask = reference.topk_mask(pre_acts, K) if topk else reference.batchtopk_mask(pre_acts, K * n)
    f = torch.where(mask, pre_acts, 0)
    if isinstance(sae, MatryoshkaBatchTopKSAE):
        errors = [error(f[:, :m] @ sae.W_dec[:m] + sae.b_dec) for m in sae.prefixes(9)]
        return sum(errors, torch.zeros(())) / len(errors)
    skip = x @ sae.W_skip.t() if isinstance(sae, Transcoder) and sae.config.skip else 0
    return error(f @ sae.W_dec + sae.b_dec + skip)


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("jumprelu")])
def test_objective_and_every_gradient_equal_the_plain_formula(name: str) -> None:
    sae = random_sae(ALL[name])
    x, target = sae.input_and_target(batch(ALL[name]))
    losses = sae.objective(x, target, context(target))
    plain = plain_loss(sae, x, target)
    torch.testing.assert_close(losses.total, plain, rtol=1e-5, atol=1e-6)
    parameters = list(sae.parameters())
    ours = torch.autograd.grad(losses.total, parameters)
    for mine, theirs in zip(ours, torch.autograd.grad(plain, parameters), strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("penalty", ["jumprelu", "jumprelu_tanh"])
def test_jumprelu_threshold_gradient_is_the_papers_pseudo_derivative(penalty: str) -> None:
    """Entry by entry: the incoming gradient where a pre-activation lies within half a bandwidth of its threshold."""
    sae = random_sae(ALL[penalty])
    assert isinstance(sae, JumpReLUSAE)
    x, target = sae.input_and_target(batch(ALL[penalty], 4096))
    losses = sae.objective(x, target, context(target))
    (grad,) = torch.autograd.grad(losses.total, [sae.threshold])
    config, n, variance = sae.config, len(x), total_variance(target)
    with torch.no_grad():
        pre_acts, theta = sae.pre_acts(x), sae.threshold
        f = torch.where(pre_acts > theta, pre_acts, 0)
        upstream = -2 * (target - f @ sae.W_dec - sae.b_dec) @ sae.W_dec.t() / (n * variance)
        if penalty == "jumprelu_tanh":
            upstream += 1e-3 * config.tanh_scale * (1 - torch.tanh(config.tanh_scale * f).square()) / n
        near = (pre_acts - theta).abs() < config.window / 2
        expected = torch.where(near, -theta / config.window * upstream, 0).sum(0)
        if penalty == "jumprelu":
            expected += -1e-3 / (n * config.window) * near.sum(0)
        else:
            expected += 3e-6 * (pre_acts < theta).sum(0) / (n * variance)
    assert int(near.sum()) > 3
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ["compiled", "torch"])
def test_jumprelu_sparse_path_equals_the_dense_one(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, counts and every gradient, with thresholds below half a bandwidth too; the density decides on the path."""
    if form == "torch":
        monkeypatch.setattr(loops, "_compiled", lambda: None)
    sae = random_sae(ALL["jumprelu"])
    assert isinstance(sae, JumpReLUSAE)
    with torch.no_grad():
        sae.threshold[::2] = 0.3 * sae.config.window
    x, target = sae.input_and_target(batch(ALL["jumprelu"], 512))
    parameters = list(sae.parameters())

    def taken(max_density: float) -> tuple[StepLosses, tuple[torch.Tensor, ...]]:
        monkeypatch.setattr(jumprelu, "_MAX_DENSITY", max_density)
        losses = sae.objective(x, target, context(target))
        return losses, torch.autograd.grad(losses.total, parameters)

    assert sae._sparse_objective(x, target, context(target)) is None
    (sparse, sparse_grads), (dense, dense_grads) = taken(1.0), taken(0.0)
    assert sae._sparse_objective(x, target, context(target)) is None
    torch.testing.assert_close(sparse.total, dense.total)
    torch.testing.assert_close(sparse.reconstruction, dense.reconstruction)
    assert torch.equal(sparse.fired, dense.fired)
    assert int(sparse.n_active) == int(dense.n_active)
    for mine, theirs in zip(sparse_grads, dense_grads, strict=True):
        assert float(theirs.abs().max()) > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_jumprelu_loss_by_hand() -> None:
    sae = random_sae(ALL["jumprelu"])
    x, target = sae.input_and_target(batch(ALL["jumprelu"]))
    losses = sae.objective(x, target, context(target))
    assert int(losses.n_active) == int(sae.encode(x).count_nonzero()) > 0
    torch.testing.assert_close(losses.total, losses.reconstruction + 1e-3 * losses.n_active / len(x))


def test_sparsity_weight_rises_over_the_warm_up() -> None:
    sae = random_sae(ALL["standard"])
    (x,) = batch(ALL["standard"])
    first, last = (
        sae.objective(x, x, context(x, step=step, n_steps=100)).total
        - sae.objective(x, x, context(x, step=step, n_steps=100)).reconstruction
        for step in (0, 5)
    )
    torch.testing.assert_close(first, last / 5)


SELECTING = [name for name in ALL if any(rule in name for rule in ("topk", "matryoshka", "transcoder"))]


@pytest.mark.parametrize("name", SELECTING)
def test_auxk_reaches_the_encoder_of_dead_latents(name: str) -> None:
    sae = random_sae(ALL[name])
    x, target = sae.input_and_target(batch(ALL[name]))
    with torch.no_grad():
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        dead[[2, 7, 20]] = True
        sae.b_enc[dead] -= 3 * float(sae.pre_acts(x).max())  # never selected
        sae.b_enc[dead] += (3 * sae.pre_acts(x).max() - sae.pre_acts(x)[:, dead].max()) - 3  # a little above zero

    def gradients(alpha: float) -> list[Tensor]:
        total = sae.objective(x, target, context(target, dead, auxk_alpha=alpha)).total
        return list(torch.autograd.grad(total, [sae.W_enc, sae.b_enc, sae.W_dec]))

    for without, with_auxk, dimension in zip(gradients(0.0), gradients(1 / 32), (1, 0, 0), strict=True):
        added = (with_auxk - without).movedim(dimension, 0).reshape(D_SAE, -1).abs().sum(1)
        assert bool((added[dead] > 0).any())
        assert float(added[~dead].max()) < 1e-7


def test_sampled_prefixes_differ_between_steps_and_not_between_runs() -> None:
    config = MatryoshkaBatchTopKConfig(d_in=4, d_sae=4096, k=2, n_sampled_prefixes=10)
    sae = MatryoshkaBatchTopKSAE(config)
    assert sae.prefixes(3) == MatryoshkaBatchTopKSAE(config).prefixes(3) != sae.prefixes(4)
    for step in range(50):
        sizes = sae.prefixes(step)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[0] >= 1
        assert sizes[-1] == 4096


def test_default_prefixes_are_those_of_the_paper() -> None:
    config = MatryoshkaBatchTopKConfig(d_in=2304, d_sae=65536, k=32)
    assert config.fixed_prefixes == (2048, 6144, 14336, 30720, 65536)


@every
def test_training_lowers_the_loss_and_keeps_the_decoder_where_it_belongs(config: SAEConfig) -> None:
    run = Trainer(build(config, seed=0), TrainerConfig(lr=3e-3), 40)
    history: list[StepMetrics] = []
    data = batch(config, 4096)
    run.fit([tuple(part[i * 128 : (i + 1) * 128] for part in data) for i in range(32)] * 2, history.append)
    assert history[-1].batch_fvu < 0.8 * history[0].batch_fvu
    assert all(torch.isfinite(tensor).all() for tensor in run.sae.state_dict().values())
    norms = run.sae.W_dec.detach().norm(dim=1)
    if run.sae.unit_norm_decoder:
        torch.testing.assert_close(norms, torch.ones(D_SAE))
    else:
        assert float((norms - 1).abs().max()) > 1e-3


@pytest.mark.parametrize("how", ["none", "scale", "centre", "centre_scale"])
@every
def test_export_folds_the_normalisation_exactly(config: SAEConfig, how: Normalisation) -> None:
    """The exported SAE on raw activations is the trained one on normalised activations, mapped back."""
    data = batch(config, 512)
    normalisers = [fit_normaliser(part, how) for part in data]
    run = Trainer(random_sae(config), TrainerConfig(), 10, normalisers=normalisers)
    exported = run.export()
    trained = run.sae.double()
    exported = exported.double()
    wide = [Normaliser(n.shift.double(), n.scale.double()) for n in normalisers]
    raw = [part.double() for part in data]
    x, _ = trained.input_and_target([n.apply(part) for n, part in zip(wide, raw, strict=True)])
    x_raw, target_raw = trained.input_and_target(raw)
    with torch.no_grad():
        inside, outside = trained(x), exported(x_raw)
    of_outputs = wide[-1:] if target_raw is not x_raw else wide
    scale = torch.cat([n.scale.expand(len(n.shift)) for n in of_outputs])
    shift = torch.cat([n.shift for n in of_outputs])
    expected = inside.x_hat / scale + shift
    assert float((outside.x_hat - expected).norm() / expected.norm()) < 1e-5
    latent_scale = 1.0 if isinstance(trained, Crosscoder) else 1 / float(wide[-1].scale)
    assert int(inside.latent_acts.count_nonzero()) > 0
    difference = outside.latent_acts - inside.latent_acts * latent_scale
    assert float(difference.norm() / outside.latent_acts.norm()) < 1e-5
    assert how == "none" or run.normalisers[0].is_identity is False


@every
def test_resume_is_exact(config: SAEConfig) -> None:
    data = batch(config, 1024)
    steps = [tuple(part[i * 128 : (i + 1) * 128] for part in data) for i in range(8)]

    def trainer() -> Trainer:
        return Trainer(build(config, seed=0), TrainerConfig(dead_threshold_tokens=256), 8)

    whole, first, second = trainer(), trainer(), trainer()
    whole.fit(steps)
    first.fit(steps, lambda metrics: metrics.step < 3)
    second.load_state_dict(first.state_dict())
    second.fit(steps[3:])
    for name, tensor in whole.sae.state_dict().items():
        assert torch.equal(tensor, second.sae.state_dict()[name]), name


@every
def test_thresholds_stay_float32(config: SAEConfig) -> None:
    sae = random_sae(config)
    threshold = getattr(sae, "threshold", None)
    before = None if threshold is None else threshold.detach().clone()
    sae.to(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    if before is not None:
        assert torch.equal(sae.threshold.detach(), before)
