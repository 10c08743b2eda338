"""Training jobs of several ranks: one stream of batches under both layouts, checkpoints that any number goes on from.

Ranks here are plain processes over gloo; Ray is left out.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import check_settings, make_job
from pipelines.train_worker import train_worker
from pipelines.training.interruption import Interrupted
from pipelines.training.job import TrainJob
from sae import Dictionary, latest_checkpoint, load_checkpoint
from storage import ActivationStore
from tests.sae.ranks import run_ranks

N_STEPS, HALF = 12, 6
SAES: dict[str, dict[str, Any]] = {
    "main": {"architecture": "topk", "d_sae": 65, "k": 4},
    "nested": {"architecture": "matryoshka_batchtopk", "d_sae": 65, "k": 4},
}


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def configured(collected: Run, **train: Any) -> RunConfig:
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = SAES
    raw["train"] |= {"n_tokens": N_STEPS * 256, "checkpoint_every": 4, "evaluate_every": 5, "normalize": "centre_scale"}
    raw["train"] |= train
    raw["collect"]["store"] = str(collected.dir.store_path)
    return RunConfig.model_validate(raw)


def job_in(folder: Path, collected: Run, store: ActivationStore, layout: str) -> TrainJob:
    return make_job(configured(collected, layout=layout), RunDir(folder), list(SAES), store)


def work(job: TrainJob, stop: int | None, rank: int = 0, world_size: int = 1) -> None:
    """`train_worker` to its end, or until it was interrupted after `stop` steps of this call."""
    taken = count(1)
    try:
        train_worker(job, rank=rank, world_size=world_size, interrupted=lambda: next(taken) == stop)
        assert stop is None
    except Interrupted:
        assert stop is not None


def rank_works(rank: int, world_size: int, jobs: list[tuple[TrainJob, int | None]]) -> dict[str, Any]:
    for job, stop in jobs:
        work(job, stop, rank, world_size)
    return {}


@pytest.fixture(scope="module")
def undisturbed(collected: Run, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process from the first step to the last."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    work(job_in(folder, collected, store, "data"), None)
    return folder


@pytest.fixture(scope="module")
def two(collected: Run, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: whole ones, those that stop halfway, and one that goes on from what one process did."""
    folder = tmp_path_factory.mktemp("two")
    work(job_in(folder / "one-features", collected, store, "data"), HALF)
    plan: list[tuple[str, str, int | None]] = [
        *(("whole-features", "features", None), ("one-features", "features", None)),
        *(("features-one", "features", HALF), ("data-one", "data", HALF)),
    ]
    jobs = [(job_in(folder / name, collected, store, layout), stop) for name, layout, stop in plan]
    run_ranks(rank_works, 2, tmp_path_factory.mktemp("ranks"), 2, jobs)
    return folder


def steps(run: Path, name: str) -> list[dict[str, Any]]:
    lines = (RunDir(run).checkpoints(name) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def assert_same_outcome(run: Path, expected: Path) -> None:
    for name in SAES:
        ours, theirs = steps(run, name), steps(expected, name)
        assert [step["step"] for step in ours] == list(range(1, N_STEPS + 1))
        assert "heldout_fvu" in ours[4]
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-4), name
        trained, one = (Dictionary.load(RunDir(folder).trained(name)).sae for folder in (run, expected))
        for key, tensor in one.state_dict().items():
            assert float((trained.state_dict()[key] - tensor).norm() / tensor.norm()) <= 1e-4, (name, key)


@pytest.mark.parametrize("run", ["whole-features", "one-features"])
def test_two_ranks_with_half_of_the_latents_train_what_one_process_trains(
    run: str, two: Path, undisturbed: Path
) -> None:
    assert_same_outcome(two / run, undisturbed)


@pytest.mark.parametrize("run", ["features-one", "data-one"])
def test_job_stopped_on_two_ranks_goes_on_with_one_process(
    run: str, two: Path, undisturbed: Path, collected: Run, store: ActivationStore
) -> None:
    work(job_in(two / run, collected, store, "data"), None)
    assert_same_outcome(two / run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "features"])
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_job_goes_on_with_any_number_of_ranks(
    layout: str,
    n_ranks: int,
    undisturbed: Path,
    collected: Run,
    store: ActivationStore,
    tmp_path: Path,
) -> None:
    other = "data" if layout == "features" else "features"
    for part, (which, stop) in enumerate([(layout, HALF), (other, None)]):
        folder = tmp_path / str(part)
        folder.mkdir()
        jobs = [(job_in(tmp_path / "run", collected, store, which), stop)]
        run_ranks(rank_works, n_ranks if part else 2, folder, n_ranks if part else 2, jobs)
    assert_same_outcome(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("run", ["whole-features", "data-one"])
def test_input_scale_and_centre_of_two_ranks_are_those_of_one(run: str, two: Path, undisturbed: Path) -> None:
    states = []
    for folder in (two / run, undisturbed):
        newest = latest_checkpoint(RunDir(folder).checkpoints("main"))
        assert newest is not None
        states.append(load_checkpoint(newest))
    ours, theirs = states
    assert ours["normaliser_scales"] == theirs["normaliser_scales"] != [1.0]
    assert torch.equal(ours["normaliser_shift.0"], theirs["normaliser_shift.0"])


@pytest.mark.parametrize(
    ("saes", "workers", "message"),
    [
        ({"main": {"architecture": "standard", "d_sae": 64}}, 2, r"saes\.main: Latents can be spread .* layout 'data'"),
        ({"main": {"architecture": "topk", "d_sae": 3, "k": 1}}, 4, "at least one latent, got 4 processes for d_sae=3"),
    ],
)
def test_settings_that_cannot_be_spread_are_refused(
    saes: dict[str, dict[str, Any]], workers: int, message: str, collected: Run, store: ActivationStore
) -> None:
    raw = configured(collected, layout="features", num_workers=workers).model_dump(mode="json") | {"saes": saes}
    raw["ray"]["num_cpus"] = 4
    with pytest.raises(UsageError, match=message):
        check_settings(RunConfig.model_validate(raw), {hook.name: hook.d_in for hook in store.spec.hooks})


def test_three_workers_may_share_latents_though_not_the_streams(collected: Run, store: ActivationStore) -> None:
    widths = {hook.name: hook.d_in for hook in store.spec.hooks}
    for layout in ("features", "data"):
        raw = configured(collected, layout=layout, num_workers=3).model_dump(mode="json")
        raw["ray"]["num_cpus"] = 4
        if layout == "features":
            check_settings(RunConfig.model_validate(raw), widths)
        else:
            with pytest.raises(UsageError, match=r"must be a multiple of train\.num_workers"):
                check_settings(RunConfig.model_validate(raw), widths)
