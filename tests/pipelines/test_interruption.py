"""SIGTERM, as a preempted machine sends it: the step is finished and saved, and the same command goes on from there."""

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT, Driver, FinishedRun, must, sae, same_outcome

from pipelines.cluster.training import live_line, now_and_then
from pipelines.config import RunConfig
from pipelines.run import STAGES, Run
from pipelines.rundir import RunDir
from pipelines.train import make_job
from pipelines.train_worker import train_worker
from pipelines.training.interruption import Interrupted, Notice
from sae import latest_checkpoint
from storage import ActivationStore

N_STEPS, EVERY = 60, 1000
SAES = {"main": {"d_sae": 64, "k": 8}, "second": {"d_sae": 64, "k": 4}}
WORKER = """
import pickle, sys
from pipelines.train_worker import train_worker
from pipelines.training.interruption import Interrupted, notice
job = pickle.loads(open(sys.argv[1], "rb").read())
notice.install()
with notice.heeded() as terminated:
    try:
        train_worker(job, interrupted=terminated)
    except Interrupted as error:
        print(error, flush=True)
notice.deliver()
"""


def lines(run: RunDir, name: str) -> list[dict[str, Any]]:
    path = run.checkpoints(name) / "metrics.jsonl"
    found = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in found]


def wait_for_steps(run: RunDir, name: str, n: int) -> None:
    deadline = time.monotonic() + 60
    while len(lines(run, name)) < n:
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.01)


@pytest.fixture
def config(collected: Run) -> RunConfig:
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = SAES
    raw["train"] |= {"n_tokens": N_STEPS * 256, "checkpoint_every": EVERY}
    raw["collect"]["store"] = str(collected.dir.store_path)
    return RunConfig.model_validate(raw)


def train_here(config: RunConfig, run: RunDir, store: ActivationStore, **settings: Any) -> None:
    threads = torch.get_num_threads()
    try:
        train_worker(make_job(config, run, list(SAES), store), **settings)
    finally:
        torch.set_num_threads(threads)


def same(run: RunDir, other: RunDir) -> bool:
    for name in SAES:
        assert lines(run, name) == lines(other, name)
        ours, theirs = (r.trained(name) / "sae_weights.safetensors" for r in (run, other))
        assert ours.read_bytes() == theirs.read_bytes()
    return True


def test_process_that_gets_sigterm_saves_every_sae_and_the_same_command_goes_on(
    config: RunConfig, store: ActivationStore, tmp_path: Path
) -> None:
    run, undisturbed = RunDir(tmp_path / "run"), RunDir(tmp_path / "undisturbed")
    (tmp_path / "job").write_bytes(pickle.dumps(make_job(config, run, list(SAES), store)))
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path / "job")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_for_steps(run, "second", 5)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, "once it is saved, the signal does what it always did"
    n_done = len(lines(run, "main"))
    assert told == f"stopped after step {n_done} of {N_STEPS}, which is saved\n"
    assert 5 <= n_done < N_STEPS, "the signal came too late to show anything"
    for name in SAES:
        found = latest_checkpoint(run.checkpoints(name))
        assert found is not None
        assert found.name == f"step-{n_done:08d}"
    train_here(config, run, store)
    train_here(config, undisturbed, store)
    assert same(run, undisturbed)


def test_notice_outside_a_heeded_block_lets_the_signal_do_what_it_did() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    notice = Notice()
    notice.install()
    notice.install()  # again changes nothing
    try:
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with notice.heeded() as given:
            assert not given()
            signal.raise_signal(signal.SIGTERM)
            assert given()
            assert heard == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)  # the second time it is meant at once
            assert len(heard) == 2
        notice.deliver()
        assert len(heard) == 3
    finally:
        notice.uninstall()
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None)
        signal.signal(signal.SIGTERM, before)


def test_answer_of_now_and_then_is_kept_for_a_while() -> None:
    answers = iter([False, True])
    ask = now_and_then(lambda: next(answers), every_s=0.05)
    assert [ask(), ask()] == [False, False]
    time.sleep(0.06)
    assert [ask(), ask()] == [True, True]


def test_live_line_tells_the_range_of_several_saes() -> None:
    line = {"loss": 0.25, "batch_fvu": 0.125, "l0": 8.0, "dead": 3}
    assert live_line([line]) == "loss 0.250  FVU 0.125  L0 8.0  dead 3"
    other = {"loss": 0.5, "batch_fvu": 0.0625, "l0": 8.0, "dead": 4608}
    assert live_line([line, other]) == "loss 0.250–0.500  FVU 0.062–0.125  L0 8.0  dead 3–4,608"


def test_interrupted_at_the_first_step_is_saved_there(
    config: RunConfig, store: ActivationStore, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped after step 1 of 60, which is saved"):
        train_here(config, run, store, interrupted=lambda: True)
    assert (run.checkpoints("second") / "step-00000001").is_dir()


# -- under Ray -----------------------------------------------------------------------------------------------------


def last_step(out: Path) -> int:
    return max(int(folder.name.removeprefix("step-")) for folder in (out / "checkpoints/main").glob("step-*"))


@pytest.mark.slow
def test_driver_that_gets_sigterm_ends_with_143_and_the_same_command_goes_on(
    finished: FinishedRun, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    driver = Driver("train", run.out, log=tmp_path / "log")
    metrics = run.out / "checkpoints/main/metrics.jsonl"
    driver.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 60)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.wait(60) == 143, (tmp_path / "log").read_text()
    told = (tmp_path / "log").read_text()
    assert "sae: training main stopped after step" in told
    assert "the same command continues from there" in told
    saved = last_step(run.out)
    assert 60 <= saved < 400
    assert metrics.read_bytes().count(b"\n") == saved, "no step was taken that is not saved"
    must(sae("run", run.out))
    assert same_outcome(run.out, finished.out)


@pytest.mark.slow
def test_worker_that_gets_sigterm_saves_and_is_started_again(finished: FinishedRun, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "run", without=STAGES[1:])
    driver = Driver("train", run.out, log=tmp_path / "log")
    checkpoints = run.out / "checkpoints/main"
    driver.wait_until(lambda: (checkpoints / "step-00000050").exists())
    worker = driver.descendants("ray::RayTrainWorker")[-1]
    worker.terminate()
    worker.wait(60)
    saved = last_step(run.out)
    assert saved < 400, "the signal came too late to show anything"
    assert saved % 25, "saved at a step of its own (one run in 25 may fail here)"
    driver.finish()
    must(sae("run", run.out))
    assert same_outcome(run.out, finished.out)
