"""kill -9 in the middle of each stage of a real run; the same command then ends as if nothing had happened.

A kill hits the driver alone, its process group as a closed terminal would, or every process as a lost machine would.
The moments are found by watching the run directory. What the survivor found must equal an undisturbed run's: digests of
shards, every training step, weights bit for bit, metrics, labels and audits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from command_line import Driver, FinishedRun, Victims, events, must, sae, same_outcome, shard_digests, stages

from pipelines.run import STAGES


def n_shards(out: Path) -> int:
    """Shards that the driver has heard of."""
    return sum(line["event"] == "shard" for line in events(out))


def n_steps(out: Path) -> int:
    """Training steps that are written down."""
    return (out / "checkpoints/main/metrics.jsonl").read_bytes().count(b"\n")


def has(out: Path, pattern: str) -> bool:
    return any(out.glob(pattern))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "collect": lambda out: n_shards(out) >= 12,
    "train": lambda out: has(out, "checkpoints/main/step-00000100"),
    "evaluate": lambda out: "evaluate" in stages(out, "stage started"),
    "label, encoding": lambda out: has(out, "latents/main/commits/000004.json"),
    "label, labelling": lambda out: has(out, "latents/main/seal.json"),
    "export": lambda out: has(out, "dictionaries/.main.*.partial"),
    "audit": lambda out: has(out, "audit/birds/audit.json"),
}
"""The middle of each stage, as the run directory shows it."""


@dataclass
class Survivor:
    """A run that was killed on its way."""

    out: Path
    agents: list[psutil.Process] = field(default_factory=list)
    """Processes of killed drivers that take a minute to go."""
    shards_at_kill: int = 0
    steps_at_kill: int = 0
    replaced: bool = False
    """Whether a second harvester took the place of the killed one within the same session."""


@pytest.fixture(scope="module")
def survivor(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Survivor:
    """One run: a harvester killed, then the driver's group in collect, then everything in training."""
    folder = tmp_path_factory.mktemp("survivor")
    run = Survivor(folder / "run")
    command = ("run", finished.config, "--out", run.out)

    driver = Driver(*command, log=folder / "first.log")
    driver.wait_until(lambda: n_shards(run.out) >= 3)
    (harvester,) = driver.descendants("ray::Harvester")
    harvester.kill()
    seen = n_shards(run.out)
    driver.wait_until(lambda: n_shards(run.out) >= seen + 5)
    (successor,) = driver.descendants("ray::Harvester")
    run.replaced = successor.pid != harvester.pid
    run.agents += driver.kill("group")
    run.shards_at_kill = n_shards(run.out)

    driver = Driver(*command, log=folder / "second.log")
    driver.wait_until(lambda: MOMENTS["train"](run.out))
    run.agents += driver.kill("machine")
    run.steps_at_kill = n_steps(run.out)

    must_end_well = Driver(*command, log=folder / "third.log")
    must_end_well.finish()
    return run


def test_killed_harvester_is_replaced_within_the_run(survivor: Survivor):
    assert survivor.replaced


@pytest.mark.slow
def test_killed_drivers_leave_no_process_behind(survivor: Survivor):
    _, alive = psutil.wait_procs(survivor.agents, timeout=75)
    assert not alive


def test_run_killed_in_collect_and_train_continues_where_it_was(survivor: Survivor, finished: FinishedRun):
    n_all = len(shard_digests(finished.out / "activations"))
    assert survivor.shards_at_kill < n_all, "the kill came too late to show anything"
    assert 100 <= survivor.steps_at_kill < 400, "the kill came too late to show anything"
    assert stages(survivor.out, "stage started")[:4] == ["collect", "collect", "train", "train"]
    # A shard that was committed when the driver died, but not yet reported, is not done again either.
    assert n_all - 2 <= n_shards(survivor.out) <= n_all


def test_run_killed_in_collect_and_train_finds_what_an_undisturbed_run_finds(survivor: Survivor, finished: FinishedRun):
    assert same_outcome(survivor.out, finished.out)


def kill_and_rerun(command: tuple[object, ...], out: Path, moment: str, whom: Victims) -> None:
    """Run `command`, kill it at the moment, and run it again to its end."""
    stage = moment.partition(",")[0]
    driver = Driver(*command, log=out.with_suffix(".killed.log"))
    driver.wait_until(lambda: MOMENTS[moment](out))
    driver.kill(whom)
    assert stage in stages(out, "stage started")
    assert stage not in stages(out, "stage finished"), "the kill came too late to show anything"
    must_end_well = Driver(*command, log=out.with_suffix(".rerun.log"))
    must_end_well.finish()
    rerun = stages(out, "stage started")
    assert rerun == [*STAGES[STAGES.index(rerun[0]) : STAGES.index(stage)], stage, *STAGES[STAGES.index(stage) :]]


def after_training(moment: str, *, fast: bool) -> object:
    return pytest.param(moment, id=moment, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(
    "moment",
    [
        after_training("evaluate", fast=False),
        after_training("label, encoding", fast=False),
        after_training("label, labelling", fast=False),
        after_training("export", fast=False),
        after_training("audit", fast=True),
    ],
)
def test_run_killed_after_training_finds_what_an_undisturbed_run_finds(moment, finished: FinishedRun, tmp_path):
    # Ray has no part in these stages, so the run starts from a finished training.
    run = finished.copy(tmp_path / "run", without=STAGES[2:])
    kill_and_rerun(("run", run.out), run.out, moment, "driver")
    assert same_outcome(run.out, finished.out)
    assert not [path for path in run.out.rglob("*") if path.suffix in (".partial", ".old", ".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["driver", "group", "machine"])
@pytest.mark.parametrize("moment", ["collect", "train"])
def test_run_killed_with_ray_at_work_finds_what_an_undisturbed_run_finds(moment, whom, finished: FinishedRun, tmp_path):
    out = tmp_path / "run"
    kill_and_rerun(("run", finished.config, "--out", out), out, moment, whom)
    assert same_outcome(out, finished.out)


@pytest.mark.slow
def test_run_killed_again_and_again_in_training_finds_what_an_undisturbed_run_finds(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    for step in (25, 150, 300):
        driver = Driver("train", run.out, log=tmp_path / f"{step}.log")
        driver.wait_until(lambda step=step: has(run.out, f"checkpoints/main/step-{step:08d}"))
        driver.kill("machine")
        assert step <= n_steps(run.out) < 400, "the kill came too late to show anything"
    must(sae("run", run.out))
    assert same_outcome(run.out, finished.out)
