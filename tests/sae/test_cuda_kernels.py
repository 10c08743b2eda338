"""The Triton kernels against plain formulas: on a GPU, or with TRITON_INTERPRET=1 on a CPU."""

import os
from types import ModuleType

import pytest
import torch

from sae import TopKConfig, build
from sae.kernels import cpu, reference, select

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
    starts = torch.tensor([0, 2, 2, 5], device=DEVICE)
    members = torch.tensor([1, 4, 0, 2, 4], device=DEVICE)
    left, right = tensor(3, 37), tensor(5, 37, seed=1)
    rows = torch.tensor([0, 0, 2, 2, 2], device=DEVICE)
    torch.testing.assert_close(cuda.dots(starts, members, left, right), (left[rows] * right[members]).sum(1))


def test_selection_decoding_and_gradients_through_these_kernels_equal_the_dense_oracle(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cpu, select):
        monkeypatch.setattr(module, "triton_kernels", lambda *_: cuda)
        monkeypatch.setattr(module, "usable", lambda *_: None)
    sae = build(TopKConfig(d_in=12, d_sae=48, k=5), seed=0).to(DEVICE)
    x = tensor(20, 12) * 3
    encoder = cpu.Encoder(x - sae.b_dec.detach(), sae.W_enc, sae.b_enc)
    with torch.no_grad():
        latents = cpu.select_topk(encoder, 5)
    sparse = cpu.decode(cpu.differentiable(latents, encoder, sae.b_dec), sae.W_dec, sae.b_dec, 20)
    mask = reference.topk_mask(sae.pre_acts(x).detach(), 5)
    assert torch.equal(mask.nonzero().t(), torch.stack([latents.row, latents.latent]))
    dense = reference.forward(x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, mask)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    parameters, upstream = list(sae.parameters()), tensor(20, 12, seed=4)
    for ours, theirs in zip(
        torch.autograd.grad(sparse, parameters, upstream), torch.autograd.grad(dense, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


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
