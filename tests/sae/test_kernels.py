"""The sparse training path against its dense oracle: which entries are kept, what they reconstruct, every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import BatchTopKConfig, build
from sae.base import SAE, SparseLatents
from sae.kernels import cpu, errors, loops, reference, select
from sae.kernels.update import fused_update
from sae.optim import Optimizer
from sae.parallel import Group, Layout

N, D_IN, D_SAE, K = 60, 12, 48, 5


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops compiled by numba, or torch operations."""
    if request.param == "torch":
        monkeypatch.setattr(loops, "_compiled", lambda: None)
    elif loops.usable() is None:
        pytest.skip("numba is not installed: only torch operations run here")


def problem(seed: int = 0) -> tuple[SAE, torch.Tensor, cpu.Encoder]:
    sae = build(BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=K), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D_IN, generator=generator) * 3 + 5
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(D_IN, D_SAE, generator=generator))
        sae.b_enc.copy_(torch.randn(D_SAE, generator=generator))
        sae.b_dec.copy_(x.mean(dim=0))
    return sae, x, cpu.Encoder(x - sae.b_dec.detach(), sae.W_enc.detach(), sae.b_enc.detach())


def as_mask(latents: SparseLatents, shape: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[latents.row, latents.latent] = True
    return mask


def dense_pre_acts(encoder: cpu.Encoder) -> torch.Tensor:
    return encoder.x_centred @ encoder.W_enc + encoder.b_enc


@pytest.mark.parametrize("last_smallest", [0.0, 0.5, 2.0, 4.0, 8.0, 1e6])
@pytest.mark.parametrize("block_elements", [1, 7 * D_SAE, 10**9])
def test_batchtopk_selection_equals_the_oracle_whatever_the_bracket(
    last_smallest: float, block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_BLOCK_ELEMENTS", block_elements)
    _, _, encoder = problem()
    pre_acts = dense_pre_acts(encoder)
    latents, smallest = cpu.select_batchtopk(encoder, K * N, last_smallest, Group())
    expected = reference.batchtopk_mask(pre_acts, K * N)
    assert torch.equal(as_mask(latents, (N, D_SAE)), expected)
    assert len(latents.value) == K * N
    torch.testing.assert_close(latents.value, pre_acts[expected])
    assert smallest == pytest.approx(float(pre_acts[expected].min()), rel=1e-5)


def test_batchtopk_selection_keeps_only_positives_when_they_are_few() -> None:
    _, _, encoder = problem()
    encoder = encoder._replace(b_enc=encoder.b_enc - 12)
    pre_acts = dense_pre_acts(encoder)
    n_positive = int((pre_acts > 0).sum())
    assert 0 < n_positive < K * N
    latents, _ = cpu.select_batchtopk(encoder, K * N, 3.0, Group())
    assert torch.equal(as_mask(latents, (N, D_SAE)), pre_acts > 0)


def test_batchtopk_selection_of_nothing_positive_is_empty() -> None:
    _, _, encoder = problem()
    latents, smallest = cpu.select_batchtopk(encoder._replace(b_enc=encoder.b_enc - 1e4), K * N, 0.0, Group())
    assert len(latents.value) == 0
    assert smallest == 0.0


def test_batchtopk_screening_in_bfloat16_gives_the_float32_selection_and_values() -> None:
    _, _, encoder = problem()
    exact, _ = cpu.select_batchtopk(encoder, K * N, 3.0, Group())
    screened, _ = cpu.select_batchtopk(encoder, K * N, 3.0, Group(), bf16=True)
    assert torch.equal(screened.row, exact.row)
    assert torch.equal(screened.latent, exact.latent)
    torch.testing.assert_close(screened.value, exact.value)


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    n_keep=st.integers(1, 50),
)
@settings(deadline=None)
def test_largest_breaks_ties_towards_the_lowest_index(values: list[int], n_keep: int) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:n_keep]
    kept = cpu.largest(torch.tensor(values, dtype=torch.float32), n_keep).nonzero().flatten().tolist()
    assert kept == sorted(expected)


@pytest.mark.parametrize("block_elements", [1, 7 * D_SAE, 10**9])
def test_topk_selection_equals_the_oracle(block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_BLOCK_ELEMENTS", block_elements)
    _, _, encoder = problem()
    latents = cpu.select_topk(encoder, K)
    assert torch.equal(as_mask(latents, (N, D_SAE)), reference.topk_mask(dense_pre_acts(encoder), K))
    assert bool(((latents.row * D_SAE + latents.latent).diff() > 0).all())


@pytest.mark.parametrize("selection", ["topk", "batchtopk"])
def test_reconstruction_and_every_gradient_equal_the_dense_oracle(selection: str) -> None:
    sae, x, encoder = problem()
    latents = (
        cpu.select_topk(encoder, K)
        if selection == "topk"
        else cpu.select_batchtopk(encoder, K * N, 0.0, Group()).latents
    )
    upstream = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(9))
    live = cpu.differentiable(latents, cpu.Encoder(encoder.x_centred, sae.W_enc, sae.b_enc), sae.b_dec)
    sparse = cpu.decode(live, sae.W_dec, sae.b_dec, N)
    mask = as_mask(latents, (N, D_SAE))
    dense = reference.forward(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, mask)
    torch.testing.assert_close(sparse, dense)

    parameters = list(sae.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(sparse, parameters, upstream), torch.autograd.grad(dense, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_decode_gives_b_dec_to_tokens_without_latents() -> None:
    sae, _, _ = problem()
    none = SparseLatents(torch.tensor([1]), torch.tensor([4]), torch.tensor([2.0]))
    x_hat = cpu.decode(none, sae.W_dec, sae.b_dec, 3)
    torch.testing.assert_close(x_hat[0], sae.b_dec)
    torch.testing.assert_close(x_hat[1], sae.b_dec + 2 * sae.W_dec[4])
    torch.testing.assert_close(x_hat[2], sae.b_dec)


def test_latents_that_were_not_selected_get_no_gradient() -> None:
    sae, _, encoder = problem()
    latents = cpu.select_topk(encoder._replace(b_enc=encoder.b_enc.where(torch.arange(D_SAE) % 4 > 0, -1e4)), K)
    live = cpu.differentiable(latents, cpu.Encoder(encoder.x_centred, sae.W_enc, sae.b_enc), sae.b_dec)
    cpu.decode(live, sae.W_dec, sae.b_dec, N).square().sum().backward()  # type: ignore[no-untyped-call]
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None
    assert sae.b_enc.grad is not None
    for grad in (sae.W_enc.grad.t(), sae.W_dec.grad, sae.b_enc.grad):
        assert not bool(grad[::4].any())
        assert bool(grad[1::4].any())


def test_one_sort_serves_both_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, _, encoder = problem()
    live = cpu.differentiable(
        cpu.select_topk(encoder, K), cpu.Encoder(encoder.x_centred, sae.W_enc, sae.b_enc), sae.b_dec
    )
    x_hat = cpu.decode(live, sae.W_dec, sae.b_dec, N)
    layout = cpu._layout(live.row, live.latent)
    x_hat.sum().backward()  # type: ignore[no-untyped-call]
    first = layout.by_latent
    assert cpu._layout(live.row, live.latent) is layout
    starts, order, rows = first
    assert torch.equal(live.latent[order], live.latent.sort(stable=True).values)
    assert torch.equal(rows, live.row[live.latent.argsort(stable=True)])
    assert starts[-1] == len(live.latent)
    assert layout.by_latent is first


@pytest.mark.parametrize("rows", [1, N])
def test_squared_errors_equal_the_plain_formula(rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(N, D_IN, generator=generator), torch.randn(rows, D_IN, generator=generator)
    torch.testing.assert_close(errors.squared_distance(x, y), (x - y).square().sum())
    x_hat = x.clone().requires_grad_()
    errors.squared_error(x_hat, x + 1).mul(3).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x_hat.grad, torch.full_like(x, -6.0))


def test_fused_update_equals_the_steps_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(fused: bool, grad_clip: float | None) -> dict[str, torch.Tensor]:
        sae, x, _ = problem()
        optimizer = Optimizer(sae, Layout.of("data"), lr=1e-2, betas=None, grad_clip=grad_clip)
        monkeypatch.setattr("sae.optim.fused_update", fused_update if fused else lambda *_: False)
        for step in range(5):
            optimizer.update((sae.pre_acts(x).relu() @ sae.W_dec + sae.b_dec - x).square().mean(), 1e-2 / (step + 1))
        return dict(sae.named_parameters()) | optimizer.state_dict()

    if loops.usable() is None:
        pytest.skip("there is no fused update without the compiled loops")
    for grad_clip in (None, 0.01):
        fused, plain = trained(True, grad_clip), trained(False, grad_clip)
        assert fused.keys() == plain.keys()
        for name, tensor in fused.items():
            torch.testing.assert_close(
                tensor, plain[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
