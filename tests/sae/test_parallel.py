"""Two processes with half of each batch take the steps that one process takes with all of it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sae import (
    BatchTopKConfig,
    CrosscoderConfig,
    GatedConfig,
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
from sae.parallel import Group
from tests.sae.ranks import run_ranks

D_IN, D_SAE, BATCH, N_STEPS = 16, 64, 128, 20


CONFIGS: dict[str, SAEConfig] = {
    "topk": TopKConfig(d_in=D_IN, d_sae=D_SAE, k=4),
    "batchtopk": BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=4),
    "standard": StandardConfig(d_in=D_IN, d_sae=D_SAE),
    "gated": GatedConfig(d_in=D_IN, d_sae=D_SAE),
    "jumprelu": JumpReLUConfig(d_in=D_IN, d_sae=D_SAE),
    "jumprelu_tanh": JumpReLUConfig(d_in=D_IN, d_sae=D_SAE, penalty="tanh"),
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=4),
    "transcoder": TranscoderConfig(d_in=D_IN, d_out=D_IN, d_sae=D_SAE, k=4, skip=True),
    "crosscoder": CrosscoderConfig(d_ins=(D_IN, D_IN), d_sae=D_SAE, k=4),
}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(40, D_IN, generator=generator)
    return [torch.rand(BATCH, 40, generator=generator).pow(8) @ mixing + 10 for _ in range(N_STEPS)]


def train(architecture: str, part: slice) -> tuple[Trainer, list[StepMetrics]]:
    config = CONFIGS[architecture]
    # A low threshold for "dead" exercises AuxK as well.
    run = Trainer(build(config, seed=dist_rank()), TrainerConfig(dead_threshold_tokens=2 * BATCH), N_STEPS)
    history: list[StepMetrics] = []
    several = len(run.sae.batch_widths) > 1
    run.fit([(x[part], x[part].flip(1)) if several else x[part] for x in batches()], history.append)
    return run, history


def dist_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rank_results(rank: int) -> dict[str, Any]:
    """Every architecture in turn: starting processes takes longer than the training."""
    return {name: rank_result(rank, name) for name in CONFIGS}


def rank_result(rank: int, architecture: str) -> dict[str, Any]:
    run, history = train(architecture, slice(rank, None, 2))
    values, own = Group().gather_values(torch.full((rank + 1,), float(rank)))
    assert values.tolist() == [0.0, 1.0, 1.0]
    assert own == slice(rank, 2 * rank + 1)
    return {"state": dict(run.sae.state_dict()), "history": [list(m) for m in history]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return list(run_ranks(rank_results, 2, tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_two_processes_equal_one(architecture: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (results[architecture] for results in ranks)
    one, history = train(architecture, slice(None))
    assert architecture not in ("topk", "batchtopk") or max(m.dead for m in history) > 0
    for name, tensor in one.sae.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        difference = (first["state"][name] - tensor).norm() / tensor.norm()
        # b_mag starts at zero with a vanishing gradient, whose rounding Adam turns into whole steps.
        assert float(difference) <= (2e-4 if name == "b_mag" else 1e-5), name
    torch.testing.assert_close(
        torch.tensor(first["history"], dtype=torch.float64),
        torch.tensor([list(m) for m in history], dtype=torch.float64),
        rtol=1e-3 if architecture == "gated" else 1e-4,  # a pre-activation at its gate may fall either way
        atol=1e-6,
    )


def test_one_process_exchanges_nothing() -> None:
    group = Group()
    x = torch.randn(5, 3)
    assert (group.rank, group.world_size) == (0, 1)
    assert group.sum(x) is x
    assert group.any(x) is x
    assert group.gather_values(x[:, 0])[1] == slice(0, 5)
    assert group.sum_int(7) == 7
    variance, n_tokens = group.total_variance(x)
    assert n_tokens == 5
    torch.testing.assert_close(variance, x.var(dim=0, correction=0).sum())
