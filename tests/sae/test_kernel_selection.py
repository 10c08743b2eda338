"""Which pre-activations a selection keeps: exactly those of the oracle, ties included, in both forms of the code."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae import BatchTopKConfig, StepMetrics, TopKConfig, Trainer, TrainerConfig, build
from sae.base import SparseLatents
from sae.kernels import loops, reference, select
from sae.kernels.select import Encoder, select_above, select_batchtopk, select_topk
from sae.parallel import Group


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loops compiled by numba, or torch operations."""
    name = str(request.param)
    if name == "torch":
        monkeypatch.setattr(loops, "_compiled", lambda: None)
    elif loops.usable() is None:
        pytest.skip("numba is not installed: only torch operations run here")
    return name


def encoder_with(pre_acts: torch.Tensor) -> Encoder:
    """An encoder whose pre-activations are exactly these."""
    return Encoder(pre_acts, torch.eye(pre_acts.shape[1]), torch.zeros(pre_acts.shape[1]))


def dense(latents: SparseLatents, shape: torch.Size) -> torch.Tensor:
    found = torch.zeros(shape)
    found[latents.row, latents.latent] = latents.value
    return found


def row_major(latents: SparseLatents, width: int) -> bool:
    return bool(((latents.row * width + latents.latent).diff() > 0).all())


def tied(rows: int, width: int, seed: int, spread: int = 4) -> torch.Tensor:
    """Small whole numbers, so that most k-th values are tied; exact in bfloat16 too."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-spread, spread, (rows, width)).astype(np.float32))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (7, 3), (33, 33), (48, 5), (200, 40), (257, 8), (640, 200)])
def test_topk_equals_the_oracle_where_most_rows_tie(width: int, k: int, bf16: bool) -> None:
    pre_acts = tied(23, width, width)
    if bf16:  # more ties than candidates fit are cut by a rule of their own
        pre_acts += torch.arange(width) / 1024
    latents = select_topk(encoder_with(pre_acts), k, bf16=bf16)
    expected = torch.where(reference.topk_mask(pre_acts, k), pre_acts, 0)
    if bf16 and width > 4 * k:
        overlap = ((dense(latents, pre_acts.shape) > 0) & (expected > 0)).sum() / (expected > 0).sum()
        assert float(overlap) > 0.6
        assert bool((dense(latents, pre_acts.shape) > 0).sum(1).le(k).all())
    else:
        torch.testing.assert_close(dense(latents, pre_acts.shape), expected)
    assert row_major(latents, width)


@pytest.mark.usefixtures("form")
def test_topk_of_rows_with_few_positives_and_dead_latents() -> None:
    pre_acts = tied(40, 96, 1) - 2.5
    pre_acts[:, ::3] = -1e4
    pre_acts[5] = -1.0
    latents = select_topk(encoder_with(pre_acts), 60)
    assert torch.equal(dense(latents, pre_acts.shape), pre_acts.relu())
    assert not bool((latents.row == 5).any())


@pytest.mark.usefixtures("form")
def test_topk_of_nothing_positive_is_empty() -> None:
    latents = select_topk(encoder_with(torch.full((6, 40), -1.0)), 4)
    assert [len(tensor) for tensor in latents] == [0, 0, 0]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("width", [7, 96, 600])
@pytest.mark.parametrize("k", [1, 5])
def test_batchtopk_equals_the_oracle_where_the_last_kept_value_ties(width: int, k: int) -> None:
    pre_acts = tied(31, width, k)
    latents, smallest = select_batchtopk(encoder_with(pre_acts), k * 31, 1.0, Group())
    expected = torch.where(reference.batchtopk_mask(pre_acts, k * 31), pre_acts, 0)
    assert torch.equal(dense(latents, pre_acts.shape), expected)
    assert smallest == float(expected[expected > 0].min())
    assert row_major(latents, width)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0, 2.0, 99.0])
def test_select_above_is_strict_and_finds_rows_with_many_entries(bound: float) -> None:
    pre_acts = tied(9, 700, 3)
    pre_acts[4] = 3.0
    latents = select_above(encoder_with(pre_acts), bound)
    assert torch.equal(dense(latents, pre_acts.shape), torch.where(pre_acts > bound, pre_acts, 0))
    assert row_major(latents, 700)


@pytest.mark.usefixtures("form")
def test_a_search_in_bfloat16_finds_at_least_99_percent_of_the_float32_selection() -> None:
    generator = torch.Generator().manual_seed(0)
    encoder = Encoder(
        torch.randn(256, 64, generator=generator), torch.randn(64, 512, generator=generator), torch.zeros(512)
    )
    for found, exact in (
        (select_topk(encoder, 16, bf16=True), select_topk(encoder, 16)),
        (
            select_batchtopk(encoder, 16 * 256, 10.0, Group(), bf16=True).latents,
            select_batchtopk(encoder, 16 * 256, 10.0, Group()).latents,
        ),
    ):
        a, b = dense(found, torch.Size((256, 512))), dense(exact, torch.Size((256, 512)))
        both = (a > 0) & (b > 0)
        assert float(both.sum()) >= 0.99 * float((b > 0).sum())
        torch.testing.assert_close(a[both], b[both], rtol=1e-4, atol=1e-4)


@given(
    values=st.lists(st.lists(st.integers(-3, 3), min_size=9, max_size=9), min_size=1, max_size=5), k=st.integers(1, 9)
)
@settings(deadline=None, max_examples=60)
def test_topk_breaks_ties_towards_the_lowest_latent(values: list[list[int]], k: int) -> None:
    pre_acts = torch.tensor(values, dtype=torch.float32)
    expected = reference.topk_mask(pre_acts, k)
    assert torch.equal(dense(select_topk(encoder_with(pre_acts), k), pre_acts.shape) > 0, expected)


@pytest.mark.parametrize("selection", ["topk", "batchtopk"])
def test_a_step_gives_the_same_bits_with_one_thread_and_with_two(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_WORK_PER_THREAD", 1)
    monkeypatch.setattr(select, "_BLOCK_ELEMENTS", 5000)
    pre_acts = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))

    def selected(threads: int) -> SparseLatents:
        monkeypatch.setattr(loops.torch, "get_num_threads", lambda: threads)
        encoder = encoder_with(pre_acts)
        return select_topk(encoder, 7) if selection == "topk" else select_batchtopk(encoder, 448, 1.5, Group()).latents

    for one, two in zip(selected(1), selected(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_searching_in_bfloat16_keeps_the_loss_curve_within_one_percent(architecture: str) -> None:
    def losses(bf16: bool) -> list[float]:
        config = (TopKConfig if architecture == "topk" else BatchTopKConfig)(d_in=32, d_sae=128, k=4)
        history: list[StepMetrics] = []
        Trainer(build(config, seed=0), TrainerConfig(autocast_bf16=bf16), 30).fit(stream(30), history.append)
        return [metrics.loss for metrics in history]

    torch.testing.assert_close(torch.tensor(losses(True)), torch.tensor(losses(False)), rtol=0.01, atol=0)


def stream(n_batches: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(100, 32, generator=generator)
    for _ in range(n_batches):
        yield torch.rand(256, 100, generator=generator).pow(20) @ directions


@pytest.mark.slow
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("bf16", [False, True])
def test_selections_at_full_size_equal_the_oracle(bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W_enc = torch.randn(4096, 576, generator=generator), torch.randn(576, 4608, generator=generator) / 24
    encoder = Encoder(x, W_enc, torch.zeros(4608))
    pre_acts = x @ W_enc
    for latents, mask in (
        (select_topk(encoder, 32, bf16=bf16), reference.topk_mask(pre_acts, 32)),
        (
            select_batchtopk(encoder, 32 * 4096, 0.0, Group(), bf16=bf16).latents,
            reference.batchtopk_mask(pre_acts, 32 * 4096),
        ),
    ):
        assert float(mask[latents.row, latents.latent].sum()) >= (0.995 if bf16 else 0.9999) * 32 * 4096
        assert len(latents.value) == 32 * 4096
        torch.testing.assert_close(latents.value, pre_acts[latents.row, latents.latent], rtol=1e-4, atol=1e-4)
