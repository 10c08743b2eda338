"""Training through Ray Train: one worker or two, killed or not, and without Ray."""

import dataclasses
import json
import re

import psutil
import pytest
import torch
from command_line import Driver, FinishedRun, must, sae, same_outcome, sentence

from pipelines.collect import open_store
from pipelines.configio import load_config
from pipelines.evaluation import evaluate_reconstruction
from pipelines.progress import SilentReporter
from pipelines.run import STAGES
from pipelines.rundir import RunDir
from pipelines.train import make_job
from pipelines.train_worker import train_worker
from sae import Dictionary


def weights(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def steps(out):
    """Every training step without its time."""
    lines = (out / "checkpoints/main/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def train_inline(finished: FinishedRun, tmp_path):
    """Train the finished run's SAE in this process, elsewhere."""
    config, run = load_config(finished.config), RunDir(finished.out)
    job = make_job(config, run, "main", open_store(config, run))
    (member,) = job.members
    elsewhere = {"checkpoints": str(tmp_path / "checkpoints/main"), "output": str(tmp_path / "dictionary")}
    job = dataclasses.replace(job, members=(dataclasses.replace(member, **elsewhere),))
    threads = torch.get_num_threads()
    try:
        train_worker(job)
    finally:
        torch.set_num_threads(threads)
    return tmp_path


def test_train_worker_without_ray_equals_the_ray_run_bit_for_bit(finished: FinishedRun, tmp_path):
    inline = train_inline(finished, tmp_path)
    assert steps(inline) == steps(finished.out)
    assert weights(inline / "dictionary") == weights(finished.out / "checkpoints/main/dictionary")


@pytest.fixture(scope="module")
def two_workers(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The finished run trained again, by two workers over gloo."""
    run = finished.copy(tmp_path_factory.mktemp("two") / "run", without=STAGES[1:])
    must(sae("train", run.out, "--set", "train.num_workers=2"))
    return run


def test_two_workers_train_close_to_what_one_trains(two_workers: FinishedRun, finished: FinishedRun):
    ours, theirs = steps(two_workers.out), steps(finished.out)
    assert [step["n_tokens"] for step in ours] == [step["n_tokens"] for step in theirs]
    # The first step differs by the order of summation; from there on rounding grows, as the selection is discrete.
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=0.03)
    assert ours[-1]["l0"] == theirs[-1]["l0"] == 8


def test_two_workers_train_as_good_a_dictionary_as_one(two_workers: FinishedRun, finished: FinishedRun):
    store = open_store(load_config(finished.config), RunDir(finished.out))
    with SilentReporter().stage("evaluate", total=1, unit="tokens") as bar:
        ours, theirs = (
            evaluate_reconstruction(
                store, Dictionary.load(run.out / "checkpoints/main/dictionary"), sink_multiple=3.0, bar=bar
            )
            for run in (two_workers, finished)
        )
    assert ours["fvu"] == pytest.approx(theirs["fvu"], rel=0.05)
    assert ours["l0"] == pytest.approx(theirs["l0"], rel=0.05)


def kill_a_worker_in_training(run: FinishedRun, tmp_path, *settings: str) -> None:
    """Train, with one worker killed at step 100; the same session must end well."""
    driver = Driver("train", run.out, *settings, log=tmp_path / "log")
    driver.wait_until(lambda: (run.out / "checkpoints/main/step-00000100").exists())
    worker = driver.descendants("ray::RayTrainWorker")[-1]
    worker.kill()
    assert len(steps(run.out)) < 400, "the kill came too late to show anything"
    driver.finish()


@pytest.mark.slow
def test_killed_training_worker_is_restarted_from_the_checkpoint(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    kill_a_worker_in_training(run, tmp_path)
    assert steps(run.out) == steps(finished.out)
    must(sae("run", run.out))
    assert same_outcome(run.out, finished.out)


@pytest.mark.slow
def test_killed_worker_of_two_is_restarted_from_the_checkpoint(
    two_workers: FinishedRun, finished: FinishedRun, tmp_path
):
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    kill_a_worker_in_training(run, tmp_path, "--set", "train.num_workers=2")
    assert steps(run.out) == steps(two_workers.out)
    trained = "checkpoints/main/dictionary"
    assert weights(run.out / trained) == weights(two_workers.out / trained)


@pytest.mark.slow
def test_training_that_diverges_ends_with_one_sentence_and_no_second_attempt(finished: FinishedRun, tmp_path):
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    settings = ("train.lr=1e25", "train.warmup_fraction=0", "train.checkpoint_every=1")
    told = sentence(sae("train", run.out, *(word for each in settings for word in ("--set", each))), 1)
    assert re.fullmatch(
        r"training main failed: The loss must be finite, got \w+ at step 1 .*"
        r"The last good checkpoint is .*checkpoints/main/step-00000001\.",
        told,
    )
    assert [step["step"] for step in steps(run.out)] == [1]


@pytest.mark.slow
def test_finished_sessions_leave_no_process_behind(two_workers: FinishedRun):
    ours = [p for p in psutil.process_iter(["cmdline"]) if str(two_workers.out) in " ".join(p.info["cmdline"] or [])]
    assert not ours
