"""The Triton kernels against plain formulas: on a GPU, or with TRITON_INTERPRET=1 on a CPU."""

import os
from types import ModuleType

import pytest
import torch

from sae import BatchTopKConfig, TopKConfig, Trainer, TrainerConfig, build
from sae.base import SparseLatents
from sae.kernels import cpu, errors, reference, select, update
from sae.optim import Optimizer
from sae.parallel import Group, Layout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or TRITON_INTERPRET=1 with Triton"
    ),
]


@pytest.fixture
def cuda() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    from sae.kernels import cuda

    return cuda


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("width", "k"), [(7, 3), (64, 5), (100, 40), (33, 33)])
@pytest.mark.parametrize("tied", [False, True])
def test_topk_equals_the_oracle(cuda: ModuleType, width: int, k: int, tied: bool) -> None:
    pre_acts = (tensor(9, width) * 3).round() if tied else tensor(9, width)
    pre_acts[4] = -1.0
    latents, values, counts = cuda.topk(pre_acts, k)
    found = torch.zeros_like(pre_acts)
    for row, n in enumerate(counts.tolist()):
        assert latents[row, :n].tolist() == sorted(latents[row, :n].tolist())
        found[row, latents[row, :n]] = values[row, :n]
    assert torch.equal(found, torch.where(reference.topk_mask(pre_acts, k), pre_acts, 0))


@pytest.mark.parametrize("with_base", [False, True])
def test_weighted_sums_equal_the_plain_formula(cuda: ModuleType, with_base: bool) -> None:
    starts = torch.tensor([0, 3, 3, 10], device=DEVICE)
    members = torch.randint(6, (10,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights, table, base = tensor(10), tensor(6, 37, seed=2), tensor(37, seed=3)
    out = cuda.weighted_sums(starts, members, weights, table, base if with_base else None)
    for i in range(3):
        own = slice(int(starts[i]), int(starts[i + 1]))
        expected = (weights[own, None] * table[members[own]]).sum(0) + (base if with_base else 0)
        torch.testing.assert_close(out[i], expected, rtol=1e-5, atol=1e-5)


def test_dots_equal_the_plain_formula(cuda: ModuleType) -> None:
    members = torch.tensor([1, 4, 0, 2, 4], device=DEVICE)
    left, right = tensor(3, 37), tensor(5, 37, seed=1)
    rows = torch.tensor([0, 0, 2, 2, 2], device=DEVICE)
    torch.testing.assert_close(cuda.pair_dots(rows, members, left, right), (left[rows] * right[members]).sum(1))


@pytest.mark.parametrize("n_rows", [1, 6])
def test_squared_distances_equal_the_plain_formula(cuda: ModuleType, n_rows: int) -> None:
    x, y = tensor(6, 37), tensor(n_rows, 37, seed=1)
    torch.testing.assert_close(cuda.squared_distances(x, y), (x - y).square().sum(1))


@pytest.fixture
def everywhere(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """These kernels in all places that may use them; interpreted, on tensors of the CPU."""
    for module in (cpu, select, update, errors):
        monkeypatch.setattr(module, "triton_kernels", lambda *_: cuda)
        monkeypatch.setattr(module, "usable", lambda *_: None)
    return cuda


def dense(latents: SparseLatents, shape: torch.Size) -> torch.Tensor:
    found = torch.zeros(shape, device=DEVICE)
    found[latents.row, latents.latent] = latents.value
    return found


def encoder_with(pre_acts: torch.Tensor) -> cpu.Encoder:
    """An encoder whose pre-activations are exactly these."""
    width = pre_acts.shape[1]
    return cpu.Encoder(pre_acts, torch.eye(width, device=DEVICE), torch.zeros(width, device=DEVICE))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (33, 33), (48, 5), (200, 40), (1500, 8)])
def test_selections_equal_the_oracle_where_most_values_tie(width: int, k: int, bf16: bool) -> None:
    whole = torch.randint(-4, 4, (23, width), generator=torch.Generator().manual_seed(width)).to(DEVICE, torch.float32)
    whole[3] = -1.0
    by_token = select.select_topk(encoder_with(whole), k, bf16=bf16)
    assert torch.equal(dense(by_token, whole.shape), torch.where(reference.topk_mask(whole, k), whole, 0))
    for last_smallest in (0.0, 2.9, 100.0):
        by_batch = select.select_batchtopk(encoder_with(whole), 23 * k, last_smallest, Group(), bf16=bf16).latents
        expected = torch.where(reference.batchtopk_mask(whole, 23 * k), whole, 0)
        assert torch.equal(dense(by_batch, whole.shape), expected)
        assert bool(((by_batch.row * width + by_batch.latent).diff() > 0).all())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(12, 48, 5), (300, 40, 40)])
def test_selection_decoding_and_gradients_equal_the_dense_oracle(
    d_in: int, d_sae: int, k: int, rule: str, bf16: bool
) -> None:
    sae = build(TopKConfig(d_in=d_in, d_sae=d_sae, k=k), seed=0).to(DEVICE)
    sae.b_enc.data[::3] = -1e4  # dead latents
    n = 20
    x = tensor(n, d_in) * 3
    encoder = cpu.Encoder(x - sae.b_dec.detach(), sae.W_enc, sae.b_enc)
    with torch.no_grad():
        pre_acts = sae.pre_acts(x)
        if rule == "topk":
            latents = select.select_topk(encoder, k, bf16=bf16)
            mask = reference.topk_mask(pre_acts, k)
        else:
            latents = select.select_batchtopk(encoder, k * n, 0.0, Group(), bf16=bf16).latents
            mask = reference.batchtopk_mask(pre_acts, k * n)
    assert torch.equal(mask.nonzero().t(), torch.stack([latents.row, latents.latent]))
    sparse = cpu.decode(cpu.differentiable(latents, encoder, sae.b_dec), sae.W_dec, sae.b_dec, n)
    dense = reference.forward(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, mask)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    parameters, upstream = list(sae.parameters()), tensor(n, d_in, seed=4)
    for ours, theirs in zip(
        torch.autograd.grad(sparse, parameters, upstream), torch.autograd.grad(dense, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
        assert bool((ours.t() if ours.shape == sae.W_enc.shape else ours)[::3].eq(0).all()) or len(ours) == d_in


@pytest.mark.parametrize("d_sae", [5, 40_000, 70_000])
def test_sorting_by_latent_equals_a_stable_sort(cuda: ModuleType, d_sae: int) -> None:
    latent = torch.randint(d_sae, (300,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    row = torch.arange(300, device=DEVICE) // 4
    starts, order, rows = cuda.sort_by_latent(row, latent, d_sae)
    assert torch.equal(order, latent.argsort(stable=True))
    assert torch.equal(rows, row[order])
    assert torch.equal(starts[1:], torch.bincount(latent, minlength=d_sae).cumsum(0))
    assert int(starts[0]) == 0


@pytest.mark.skipif(INTERPRETED, reason="compares a GPU with the CPU")
@pytest.mark.parametrize("autocast_bf16", [False, True])
@pytest.mark.parametrize("config", [TopKConfig, BatchTopKConfig])
def test_training_on_the_gpu_follows_training_on_the_cpu_and_repeats(
    config: type[TopKConfig] | type[BatchTopKConfig], autocast_bf16: bool
) -> None:
    data = [tensor(512, 64, seed=seed).cpu() @ tensor(64, 64, seed=99).cpu() for seed in range(30)]

    def losses(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        settings = TrainerConfig(autocast_bf16=autocast_bf16, dead_threshold_tokens=2048)
        trainer = Trainer(build(config(d_in=64, d_sae=512, k=8), seed=0), settings, 30, device=device)
        found: list[float] = []
        trainer.fit(data, lambda metrics: found.append(metrics.loss))
        return torch.tensor(found), trainer.export().W_dec.detach()

    on_gpu, W_dec = losses("cuda")
    torch.testing.assert_close(on_gpu, losses("cpu")[0], rtol=0.01, atol=0)
    assert torch.equal(W_dec, losses("cuda")[1])


@pytest.mark.usefixtures("everywhere")
def test_the_fused_update_equals_the_update_in_steps() -> None:
    def weights(fused: bool) -> dict[str, torch.Tensor]:
        sae = build(TopKConfig(d_in=12, d_sae=48, k=5), seed=0).to(DEVICE)
        optimizer = Optimizer(sae, Layout.of("data"), 1e-2, None, 1e-3)
        for step in range(3):
            for i, parameter in enumerate(sae.parameters()):
                grad = tensor(*parameter.t().shape, seed=10 * step + i)
                parameter.grad = grad.t() if parameter.ndim == 2 else grad
                if parameter.is_contiguous():
                    parameter.grad = parameter.grad.contiguous()
            if fused:
                assert update.fused_update(sae, optimizer.adam, optimizer.grad_clip, Group())
            else:
                optimizer._update_in_steps()
        return sae.state_dict()

    in_steps = weights(fused=False)
    for name, weight in weights(fused=True).items():
        torch.testing.assert_close(weight, in_steps[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_projection_and_adam_equal_torch(cuda: ModuleType, unit_norm: bool) -> None:
    weight = torch.nn.functional.normalize(tensor(5, 37), dim=1)
    parameter = torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([parameter], lr=0.01)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in (1, 2, 3):
        grad = tensor(5, 37, seed=t)
        plain = grad.clone()
        if unit_norm:
            plain -= (plain * parameter.detach()).sum(1, keepdim=True) * parameter.detach()
        squares = cuda.project(weight, grad, along_rows=unit_norm)
        torch.testing.assert_close(grad, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(squares, plain.square().sum(1), rtol=1e-4, atol=1e-5)
        parameter.grad = plain * 0.5
        adam.step()
        if unit_norm:
            parameter.data /= parameter.data.norm(dim=1, keepdim=True)
        cuda.adam(
            weight,
            grad,
            mean,
            square,
            torch.tensor([0.5], device=DEVICE),
            step_size=0.01 / (1 - 0.9**t),
            betas=(0.9, 0.999),
            correction2=(1 - 0.999**t) ** -0.5,
            eps=1e-8,
            unit_norm=unit_norm,
        )
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-4, atol=1e-5)
