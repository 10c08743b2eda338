"""Two processes with half of each batch take the steps that one process takes with all of it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sae import (
    BatchTopKConfig,
    BatchTopKSAE,
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
    gradients_of_any_layout_are_summed(rank)
    results = {name: rank_result(rank, name) for name in CONFIGS}
    return results | {"agreed": what_is_agreed(slice(rank * BATCH // 2, (rank + 1) * BATCH // 2))}


def gradients_of_any_layout_are_summed(rank: int) -> None:
    """Large and small, stored by row and by column."""
    group = Group()
    shapes = [(512, 256), (256, 512), (3, 2), (70_000,)]
    values = [torch.arange(float(torch.Size(shape).numel())).view(shape) for shape in shapes]
    values += [values[0].t(), values[2].t()]
    parameters = []
    for value in values:
        parameter = torch.zeros_like(value, requires_grad=True)
        parameter.grad = value.clone().mul_(rank + 1)
        parameters.append(parameter)
    group.sum_gradients(parameters)
    for parameter, value in zip(parameters, values, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 3 * value)
    assert group.bytes_sent == 4 * sum(value.numel() for value in values)


def what_is_agreed(part: slice) -> dict[str, torch.Tensor]:
    """What depends on all rows of batches whose two halves are very different, after three clipped steps on a part."""
    run = Trainer(build(CONFIGS["batchtopk"], seed=0), TrainerConfig(grad_clip=0.01, betas=(0.0, 0.0)), N_STEPS)
    stream = [torch.cat([x[: BATCH // 2], 3 * x[BATCH // 2 :].flip(1) - 40])[part] for x in batches()]
    run.initialise(stream[0])
    centre = run.sae.b_dec.detach().clone()
    run.fit(stream, lambda metrics: metrics.step < 3)
    moments = [run.optimizer.adam.state[parameter]["exp_avg"] for parameter in run.sae.parameters()]
    assert isinstance(run.sae, BatchTopKSAE)
    return {
        "geometric median": centre,
        "tokens since a latent fired": run.tokens_since_fired.double(),
        "threshold": run.sae.threshold.clone(),
        "clipped gradient": torch.cat([moment.reshape(-1) for moment in moments]),  # Adam without memory
        "norm after clipping": torch.stack([moment.norm() for moment in moments]).norm(),
    }


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


@pytest.mark.parametrize(
    "quantity",
    ["geometric median", "tokens since a latent fired", "threshold", "clipped gradient", "norm after clipping"],
)
def test_processes_with_different_rows_agree_on(quantity: str, ranks: list[dict[str, Any]]) -> None:
    one = what_is_agreed(slice(None))[quantity]
    for results in ranks:
        torch.testing.assert_close(results["agreed"][quantity], one, rtol=1e-4, atol=1e-6)
    own = [what_is_agreed(slice(0, BATCH // 2)), what_is_agreed(slice(BATCH // 2, None))]
    if quantity != "norm after clipping":  # whatever the rows, it is the norm that gradients are clipped to
        assert not any(torch.allclose(alone[quantity], one, rtol=1e-2) for alone in own)
    else:
        assert float(one) == pytest.approx(0.01, rel=1e-3)


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
