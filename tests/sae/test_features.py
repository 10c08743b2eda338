"""Latents spread over processes: the same steps as one process, and states that any layout goes on from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sae import (
    BatchTopKConfig,
    CrosscoderConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    StepMetrics,
    TopKConfig,
    Trainer,
    TrainerConfig,
    TranscoderConfig,
    build,
)
from sae.base import SparseLatents
from sae.checkpoint import load_checkpoint, save_checkpoint
from sae.features import own_part, whole_state
from sae.kernels import reference, sharded
from sae.kernels.select import Encoder
from sae.optim import Optimizer
from sae.parallel import Group, Layout, LayoutName
from tests.sae.ranks import run_ranks

D_IN, D_SAE, BATCH, N_STEPS, HALF = 16, 65, 128, 16, 8
"""65 latents: no whole number for each process."""

RESUMED = ("batchtopk", "topk")

CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_in=D_IN, d_sae=D_SAE, k=4),
    "batchtopk": BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=4),
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=4),
    "transcoder": TranscoderConfig(d_in=D_IN, d_out=D_IN, d_sae=D_SAE, k=4, skip=True),
    "crosscoder": CrosscoderConfig(d_ins=(D_IN, D_IN), d_sae=D_SAE, k=4),
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(40, D_IN, generator=generator)
    return [torch.rand(BATCH, 40, generator=generator).pow(8) @ mixing + 10 for _ in range(N_STEPS)]


def trainer(architecture: str, layout: LayoutName) -> Trainer:
    """A third of the latents are too weak to be selected, so that they die; more of them than `k_aux` revives."""
    sae = build(CONFIGS[architecture], seed=dist.get_rank() if dist.is_initialized() else 0)
    with torch.no_grad():
        sae.W_enc[:, ::3] *= 0.1
    config = TrainerConfig(dead_threshold_tokens=2 * BATCH, k_aux=5, grad_clip=0.05)
    return Trainer(sae, config, N_STEPS, layout=layout)


def fit(run: Trainer, start: int = 0, stop: int = N_STEPS) -> list[StepMetrics]:
    rows = slice(run.layout.rows.rank, None, run.layout.rows.world_size)
    history: list[StepMetrics] = []

    def on_step(metrics: StepMetrics) -> bool:
        history.append(metrics)
        return metrics.step < stop

    several = len(run.sae.batch_widths) > 1
    run.fit([(x[rows], x[rows].flip(1)) if several else x[rows] for x in batches()[start:]], on_step)
    return history


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """All architectures to the end, and checkpoints of some of them halfway."""
    results: dict[str, Any] = {}
    selection_of_ties(rank)
    norm_counts_what_is_everywhere_once()
    for architecture in CONFIGS:
        run = trainer(architecture, "features")
        assert len(run.tokens_since_fired) == len(run.sae.W_dec) == 32 + rank
        history = fit(run)
        results[architecture] = {"state": dict(run.export().state_dict()), "history": [list(m) for m in history]}
        assert bool(run.state_dict()) == (rank == 0)
    for layout in ("data", "features"):
        for architecture in RESUMED:
            run = trainer(architecture, layout)
            fit(run, stop=HALF)
            state = run.state_dict()
            if rank == 0:
                save_checkpoint(folder / f"{architecture}-{layout}-2", HALF, state)
    results["resumed"] = resumed(folder, "one")
    results["refused"] = refused(rank)
    return results


def four_ranks(rank: int, folder: Path) -> dict[str, Any]:
    selection_of_ties(rank)
    return resumed(folder, "data-2", "features-2")


def resumed(folder: Path, *saved: str) -> dict[str, Any]:
    """The weights of runs that go on from the checkpoints, under both layouts."""
    results = {}
    for layout in ("data", "features"):
        for architecture in RESUMED:
            for name in saved:
                run = trainer(architecture, layout)
                run.load_state_dict(load_checkpoint(folder / f"{architecture}-{name}" / f"step-{HALF:08d}"))
                fit(run, start=HALF)
                results[f"{architecture} {name} {layout}"] = dict(run.export().state_dict())
    return results


def refused(rank: int) -> str:
    """What is said of a batch that is another in each process."""
    try:
        trainer("topk", "features").fit([batches()[0][rank::2]])
    except ValueError as error:
        return str(error)
    return "nothing"


def selection_of_ties(rank: int) -> None:
    """Small whole numbers, so that most values tie: the oracle's choice, and together exactly its entries."""
    group = Group()
    pre_acts = torch.randint(-2, 4, (23, D_SAE), generator=torch.Generator().manual_seed(1)).float()
    own = group.share(D_SAE)
    encoder = Encoder(pre_acts, torch.eye(D_SAE)[:, own].t().contiguous().t(), torch.zeros(own.stop - own.start))

    def dense(found: SparseLatents) -> torch.Tensor:
        chosen = torch.zeros(23, D_SAE, dtype=torch.bool)
        chosen[found.row, own.start + found.latent] = True
        assert torch.equal(found.value, pre_acts[:, own][found.row, found.latent])
        return group.any(chosen)

    for k in (1, 4, 20, D_SAE):
        assert torch.equal(dense(sharded.select_topk(encoder, k, group)), reference.topk_mask(pre_acts, k))
        selected, smallest = sharded.select_batchtopk(encoder, 23 * k, 0.0, group)
        mask = reference.batchtopk_mask(pre_acts, 23 * k)
        assert torch.equal(dense(selected), mask)
        assert smallest == float(pre_acts[mask].min())
        columns = own if rank else slice(own.start, own.start)  # one process has none, as of dead latents
        kept = sharded.keep_largest(pre_acts[:, columns], k, group)
        width = D_SAE - group.share(D_SAE, 0).stop
        expected = torch.where(reference.topk_mask(pre_acts[:, -width:], k), pre_acts[:, -width:], 0)
        whole = torch.zeros(23, D_SAE)
        whole[:, columns] = kept.relu()
        assert torch.equal(group.sum(whole)[:, -width:].sort(dim=1).values, expected.sort(dim=1).values)


def norm_counts_what_is_everywhere_once() -> None:
    """A clipped gradient has the norm that it is clipped to, over all processes' latents and one b_dec."""
    layout = Layout.of("features")
    for fused in (True, False):
        run = trainer("topk", "features")
        optimizer = Optimizer(run.sae, layout, 1e-3, (0.0, 0.0), 0.25)
        if not fused:
            run.sae.double()
        loss = sum((p.sum() * 3 for p in run.sae.parameters()), torch.zeros(()))
        run.sae.unit_norm_decoder = False
        optimizer.update(loss, 1e-3)
        # Adam without memory keeps the clipped gradient as its first moment.
        moments = {name: optimizer.adam.state[p]["exp_avg"] for name, p in run.sae.named_parameters()}
        squares = {name: float(layout.latents.sum(moment.square().sum())) for name, moment in moments.items()}
        squares["b_dec"] /= layout.latents.world_size
        assert sum(squares.values()) == pytest.approx(0.25**2, rel=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one process, to which two add theirs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for architecture in RESUMED:
        run = trainer(architecture, "data")
        fit(run, stop=HALF)
        save_checkpoint(folder / f"{architecture}-one", HALF, run.state_dict())
    return folder


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return list(run_ranks(two_ranks, 2, tmp_path_factory.mktemp("two"), folder))


@pytest.fixture(scope="module")
def four(two: Sequence[object], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """After `two`, which saves what these go on from."""
    return list(run_ranks(four_ranks, 4, tmp_path_factory.mktemp("four"), folder))


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[Trainer, list[StepMetrics]]]:
    """One process from the first step to the last."""
    runs = {architecture: trainer(architecture, "data") for architecture in CONFIGS}
    return {architecture: (run, fit(run)) for architecture, run in runs.items()}


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert float((state[name] - tensor).norm() / tensor.norm()) <= 1e-5, name


@pytest.mark.parametrize("architecture", CONFIGS)
def test_two_processes_with_half_of_the_latents_equal_one(
    architecture: str, two: list[dict[str, Any]], undisturbed: dict[str, tuple[Trainer, list[StepMetrics]]]
) -> None:
    one, history = undisturbed[architecture]
    assert max(m.dead for m in history) > 5, "AuxK had nothing to choose from"
    first, second = (results[architecture] for results in two)
    assert first["history"] == second["history"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
    assert_close(first["state"], dict(one.sae.state_dict()))
    torch.testing.assert_close(
        torch.tensor(first["history"], dtype=torch.float64),
        torch.tensor([list(m) for m in history], dtype=torch.float64),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("architecture", RESUMED)
@pytest.mark.parametrize("layout", ["data", "features"])
def test_run_saved_by_one_process_goes_on_with_two(
    architecture: str,
    layout: str,
    two: list[dict[str, Any]],
    undisturbed: dict[str, tuple[Trainer, list[StepMetrics]]],
) -> None:
    for results in two:
        state = results["resumed"][f"{architecture} one {layout}"]
        assert_close(state, dict(undisturbed[architecture][0].sae.state_dict()))


@pytest.mark.parametrize("saved", ["data-2", "features-2"])
def test_run_saved_by_two_processes_goes_on_with_one(
    saved: str, two: object, folder: Path, undisturbed: dict[str, tuple[Trainer, list[StepMetrics]]]
) -> None:
    for name, state in resumed(folder, saved).items():
        assert_close(state, dict(undisturbed[name.split()[0]][0].sae.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", RESUMED)
@pytest.mark.parametrize("saved", ["data-2", "features-2"])
@pytest.mark.parametrize("layout", ["data", "features"])
def test_run_saved_by_two_processes_goes_on_with_four(
    architecture: str,
    saved: str,
    layout: str,
    four: list[dict[str, Any]],
    undisturbed: dict[str, tuple[Trainer, list[StepMetrics]]],
) -> None:
    for results in four:
        state = results[f"{architecture} {saved} {layout}"]
        assert_close(state, dict(undisturbed[architecture][0].sae.state_dict()))


def test_saved_state_is_that_of_the_whole_sae(two: object, folder: Path) -> None:
    one = load_checkpoint(folder / "topk-one" / f"step-{HALF:08d}")
    spread = load_checkpoint(folder / "topk-features-2" / f"step-{HALF:08d}")
    assert one.keys() == spread.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(spread[key], value, rtol=1e-4, atol=1e-6)
        else:
            assert spread[key] == value, key


def test_batches_that_differ_between_processes_are_refused_in_all_of_them(two: list[dict[str, Any]]) -> None:
    for results in two:
        assert "must be given the whole batch, got batches of 64, 64 rows with sums" in results["refused"]


@pytest.mark.parametrize(
    "config",
    [
        StandardConfig(d_in=4, d_sae=8),
        JumpReLUConfig(d_in=4, d_sae=8),
        CrosscoderConfig(d_ins=(4, 4), d_sae=8, sparsity="l1"),
    ],
)
def test_architectures_that_compute_every_latent_are_refused(config: SAEConfig) -> None:
    with pytest.raises(ValueError, match=r"Latents can be spread .* Choose the layout 'data'"):
        Trainer(build(config, seed=0), TrainerConfig(), 1, layout="features")


def test_largest_of_rows_takes_the_lowest_column_of_equal_values() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 0.0, 2.0, 1.0], [0.0, -1.0, 0.0, 0.5]])
    assert sharded.largest_of_rows(values, 2).int().tolist() == [[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert sharded.largest_of_rows(values, 4).int().tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1]]


def test_one_process_has_all_latents() -> None:
    alone = Group(alone=True)
    state = {"sae.W_enc": torch.ones(2, 3), "step": 4}
    assert alone.share(7) == slice(0, 7)
    assert own_part("sae.W_enc", state["sae.W_enc"], alone) is state["sae.W_enc"]  # type: ignore[arg-type]
    assert whole_state(state, alone) == state
    part = torch.ones(2, 3)
    assert alone.combine(part) is part
    assert alone.shared(part[0]) is not None
    assert alone.bytes_sent == 0
