"""Collect and train at once: without Ray in threads, and (slow) as real runs that are killed."""

import itertools
import json
import statistics
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import Driver, FinishedRun, events, must, sae, shard_digests

from pipelines.collect import Harvester, open_store, prepare_store
from pipelines.config import RunConfig
from pipelines.encode import Reader, pool_documents
from pipelines.errors import RunError, UsageError
from pipelines.evaluation import evaluate_reconstruction
from pipelines.latents import compute_latents
from pipelines.progress import SilentReporter
from pipelines.rundir import RunDir
from pipelines.stream import CONSUMER, least_capacity, share_cpus, stream_problems
from pipelines.train import check_settings, make_job, train
from pipelines.train_worker import train_worker
from pipelines.training import member
from pipelines.training.job import TrainJob
from sae import Dictionary
from storage import ActivationStore, Consumer, Ring, verify
from tests.tiny import tiny_config, write_texts

CAPACITY = 15


def streaming(model: Path, texts: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run as a stream: 34 shards in a ring of 15, 4 retained for training and the held-out ones."""
    raw = tiny_config(model, texts)
    raw["collect"] |= {"contexts_per_shard": 8, "batch_contexts": 8, "mode": "stream", "capacity_shards": CAPACITY}
    raw["train"] |= {"n_tokens": 7936, "checkpoint_every": 4, "shuffle_contexts": 32, "max_same_context": 20}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return raw


@pytest.fixture(scope="module")
def config(tiny_model: Path, tiny_texts: Path) -> RunConfig:
    return RunConfig.model_validate(streaming(tiny_model, tiny_texts))


def on_disk(store: Path) -> set[int]:
    return {int(file.parent.name) for file in store.glob("data.zarr/hooks/*/activations/c/*/0")}


class Crash(BaseException):
    """Ends a worker as a kill would: nothing of it runs afterwards."""


class InThreads:
    """One streamed run without Ray: the harvester in a thread, the trainer here."""

    def __init__(self, config: RunConfig, resolved, out: Path, delay_s: float = 0.0) -> None:
        self.config, self.run, self.delay_s = config, RunDir(out), delay_s
        self.writer = prepare_store(config, self.run, resolved, SilentReporter())
        self.path = self.run.store_path
        self.ring = Ring.open(self.path)
        collect = config.collect
        self.capacity = collect.capacity_shards
        self.harvester = Harvester(self.path, resolved, config.model, collect.batch_contexts, n_threads=1)
        for shard in self.ring.retained_train:
            self.harvester.harvest(shard)
        self.most = 0
        self.stop = threading.Event()

    def job(self) -> TrainJob:
        job = make_job(self.config, self.run, list(self.config.saes), ActivationStore.open(self.path, tail=True))
        return replace(job, consumer=CONSUMER, capacity=self.capacity, n_threads=1)

    def _harvest(self) -> None:
        for shard in [shard for shard in self.ring.writing_order() if shard in set(self.writer.missing())]:
            while not self.ring.may_write(shard, self.capacity):
                if self.stop.wait(0.01):
                    return
                self.ring.sweep()
            self.harvester.harvest(shard)
            ring = {shard for shard in on_disk(self.path) if shard < self.ring.first_retained}
            self.most = max(self.most, len(ring))
            if self.stop.wait(self.delay_s):
                return

    def train(self) -> None:
        consumer = Consumer(self.ring, CONSUMER, capacity=self.capacity)
        thread = threading.Thread(target=self._harvest)
        thread.start()
        try:
            train_worker(self.job())
            consumer.finish()
            thread.join()
        finally:
            self.stop.set()
            thread.join()
            self.stop.clear()
        self.ring.sweep()
        self.writer.seal()


class Stored:
    """The same run with a store that keeps everything."""

    def __init__(self, config: RunConfig, resolved, out: Path) -> None:
        self.config, self.run = config, RunDir(out)
        writer = prepare_store(config, self.run, resolved, SilentReporter())
        harvester = Harvester(self.run.store_path, resolved, config.model, config.collect.batch_contexts, n_threads=1)
        for shard in writer.missing():
            harvester.harvest(shard)
        writer.seal()

    def train(self) -> None:
        job = make_job(self.config, self.run, "main", open_store(self.config, self.run))
        train_worker(replace(job, n_threads=1))


def steps(out: Path, name: str = "main") -> list[dict[str, Any]]:
    lines = (out / f"checkpoints/{name}/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def trained_weights(out: Path, name: str = "main") -> bytes:
    return (out / f"checkpoints/{name}/dictionary/sae_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def streamed(config: RunConfig, resolved, tmp_path_factory: pytest.TempPathFactory) -> InThreads:
    """An undisturbed streamed run, trained and sealed."""
    run = InThreads(config, resolved, tmp_path_factory.mktemp("streamed") / "run")
    run.train()
    return run


def test_ring_stays_within_its_capacity_and_keeps_the_slice(streamed: InThreads):
    assert 1 <= streamed.most <= CAPACITY
    assert streamed.ring.first_retained > 2 * CAPACITY, "the ring must go round"
    assert on_disk(streamed.path) == set(range(streamed.ring.first_retained, streamed.writer.spec.n_shards))
    assert verify(streamed.path) == []
    store = open_store(streamed.config, streamed.run)
    n_train = store.spec.n_train_contexts
    assert n_train - store.split_range("train")[0] >= 0.1 * n_train
    assert store.split_range("heldout") == store.spec.split_range("heldout")


def test_stream_killed_in_training_ends_as_if_nothing_had_happened(
    config: RunConfig, resolved, streamed: InThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = InThreads(config, resolved, tmp_path / "run", delay_s=0.02)
    saved = 0
    original = Consumer.advance

    def crashing(self: Consumer, first_needed: int) -> None:
        nonlocal saved
        saved += 1
        if saved in (2, 5):  # the checkpoint is durable, the cursor has not been moved
            raise Crash
        original(self, first_needed)

    monkeypatch.setattr(Consumer, "advance", crashing)
    for _ in range(2):
        with pytest.raises(Crash):
            run.train()
    run.train()
    assert steps(run.run.path) == steps(streamed.run.path)
    assert trained_weights(run.run.path) == trained_weights(streamed.run.path)
    assert 1 <= run.most <= CAPACITY


def test_two_saes_share_one_stream_and_a_kill_between_their_checkpoints(
    config: RunConfig, resolved, streamed: InThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saes = {"second": config.saes["main"].model_copy(update={"k": 4}), **config.saes}
    run = InThreads(config.model_copy(update={"saes": saes}), resolved, tmp_path / "run")
    original, saved = member.save_checkpoint, 0

    def crashing(*arguments: Any, **settings: Any) -> None:
        nonlocal saved
        saved += 1
        if saved == 6:  # `second` is saved at step 12, `main` is not
            raise Crash
        original(*arguments, **settings)

    monkeypatch.setattr(member, "save_checkpoint", crashing)
    with pytest.raises(Crash):
        run.train()
    run.train()
    assert steps(run.run.path) == steps(streamed.run.path)
    assert trained_weights(run.run.path) == trained_weights(streamed.run.path)
    assert [step["l0"] for step in steps(run.run.path, "second")] == [4.0] * 31
    assert 1 <= run.most <= CAPACITY


def test_later_stages_run_on_the_retained_slice(streamed: InThreads, tmp_path: Path):
    store = open_store(streamed.config, streamed.run)
    dictionary = Dictionary.load(streamed.run.trained("main"))
    run = RunDir(tmp_path / "run")
    latents = compute_latents(store, dictionary, run, "main", SilentReporter(), sink_multiple=3.0, digest="d")
    rows = latents.block(0, dictionary.d_sae).row
    assert len(rows)
    assert rows.min() >= store.first_kept * store.spec.context_length
    documents, _ = pool_documents(store, Reader(dictionary), split="train", sink_multiple=3.0)
    kept = store.contexts(*store.split_range("train")).document
    assert set(documents.tolist()) <= set(np.unique(kept).tolist())


def test_lost_dictionary_of_a_stream_is_not_trained_on_the_rest(streamed: InThreads, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.store_path.symlink_to(streamed.path.resolve())
    with pytest.raises(RunError, match=r"no trained dictionary .* deleted as they streamed by"):
        train(streamed.config, run, SilentReporter())


def test_store_mode_refuses_a_store_that_streamed(streamed: InThreads, resolved):
    collect = streamed.config.collect.model_copy(update={"mode": "store"})
    with pytest.raises(RunError, match=r"was filled with collect.mode: stream"):
        prepare_store(streamed.config.model_copy(update={"collect": collect}), streamed.run, resolved, SilentReporter())


def test_what_cannot_stream_is_refused_before_anything_is_collected(tiny_model: Path, tiny_texts: Path):
    def problems(**changes: Any) -> str:
        return "; ".join(stream_problems(RunConfig.model_validate(streaming(tiny_model, tiny_texts, **changes))))

    assert problems() == ""
    assert "train.n_tokens (50,000) must be at most 9,120" in problems(train__n_tokens=50_000)
    assert "collect.capacity_shards (14) must be at least 15" in problems(collect__capacity_shards=14)
    assert "a ring on an object store is not supported" in problems(collect__store="s3://bucket/store")
    with pytest.raises(UsageError, match=r"has 1 CPUs: 1 training worker.* leave none for a harvester"):
        problems(ray__num_cpus=1)
    raw = streaming(tiny_model, tiny_texts, collect__capacity_shards=3)
    with pytest.raises(UsageError, match=r"capacity_shards \(3\)"):
        check_settings(RunConfig.model_validate(raw), {"model.layers.1": 32})


def test_cpus_are_shared_between_harvesters_and_trainers(tiny_model: Path, tiny_texts: Path):
    def shares(**changes: Any) -> tuple[int, int]:
        changes = {"train__cpus_per_worker": None, "collect__n_workers": 8} | changes
        return share_cpus(RunConfig.model_validate(streaming(tiny_model, tiny_texts, **changes)))

    assert shares() == (1, 1)
    assert shares(ray__num_cpus=8) == (4, 4)
    assert shares(ray__num_cpus=8, train__num_workers=2) == (4, 2)
    assert shares(ray__num_cpus=8, train__cpus_per_worker=2) == (6, 2)
    assert shares(ray__num_cpus=8, collect__cpus_per_worker=2) == (2, 4)
    assert shares(ray__num_cpus=8, collect__n_workers=3) == (3, 4)


def test_least_capacity_holds_two_windows_and_what_lies_between_checkpoints(config: RunConfig):
    assert config.train is not None
    # two windows of 32, and 4 * 256 tokens in contexts of which 25.6 tokens count: 104 contexts, 13 shards
    assert least_capacity(config.collect, config.train) == 13 + 2


# -- real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream_file(tiny_model: Path, tiny_texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = streaming(tiny_model, tiny_texts, collect__n_tokens=16_000, train__n_tokens=11_520)
    raw["audit"] = {"concepts": []}
    path = tmp_path_factory.mktemp("stream") / "stream.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def undisturbed(stream_file: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return FinishedRun(stream_file, out, must(sae("run", stream_file, "--out", out)))


def common_shards_are_equal(out: Path, other: Path) -> bool:
    ours, theirs = shard_digests(out / "activations"), shard_digests(other / "activations")
    return len(ours) > CAPACITY and all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


@pytest.mark.slow
def test_streamed_run_killed_in_harvester_trainer_and_driver_ends_as_an_undisturbed_one(
    stream_file: Path, undisturbed: FinishedRun, tmp_path: Path
):
    out = tmp_path / "run"
    driver = Driver("run", stream_file, "--out", out, log=tmp_path / "first.log")
    n_shards = lambda: sum(line["event"] == "shard" for line in events(out))  # noqa: E731
    driver.wait_until(lambda: n_shards() >= 6)
    driver.descendants("ray::Harvester")[0].kill()
    driver.wait_until(lambda: (out / "checkpoints/main/step-00000012").exists())
    driver.descendants("ray::RayTrainWorker")[-1].kill()
    driver.wait_until(lambda: (out / "checkpoints/main/step-00000024").exists())
    assert len(steps(out)) < 45, "the kill came too late to show anything"
    driver.kill("machine")
    driver = Driver("run", stream_file, "--out", out, log=tmp_path / "second.log")
    driver.finish()
    assert steps(out) == steps(undisturbed.out)
    assert trained_weights(out) == trained_weights(undisturbed.out)
    assert common_shards_are_equal(out, undisturbed.out)
    metrics = [json.loads((path / "metrics.json").read_text()) for path in (out, undisturbed.out)]
    assert repr(metrics[0]) == repr(metrics[1])
    assert verify(out / "activations") == []
    (finished,) = [e for e in events(out) if e["event"] == "stage finished" and e["stage"] == "collect"]
    assert finished["figures"]["most_shards"] <= CAPACITY


@pytest.mark.slow
def test_streamed_and_stored_training_reach_the_same_fvu(tiny_model: Path, resolved, tmp_path: Path):
    texts = write_texts(tmp_path / "texts.jsonl", n=4800)
    fvu: dict[str, list[float]] = {"store": [], "stream": []}
    for mode, seed in itertools.product(fvu, range(3)):
        raw = streaming(tiny_model, texts, collect__mode=mode, collect__n_tokens=160_000, collect__capacity_shards=24)
        raw["collect"] |= {"contexts_per_shard": 64, "batch_contexts": 64}
        raw["train"] |= {"n_tokens": 110_080, "shuffle_contexts": 512, "max_same_context": 8}
        config = RunConfig.model_validate(raw | {"seed": seed})
        out = tmp_path / f"{mode}-{seed}"
        run = Stored(config, resolved, out) if mode == "store" else InThreads(config, resolved, out)
        run.train()
        with SilentReporter().stage("evaluate", total=1, unit="tokens") as bar:
            dictionary = Dictionary.load(run.run.trained("main"))
            figures = evaluate_reconstruction(open_store(config, run.run), dictionary, sink_multiple=3.0, bar=bar)
        fvu[mode].append(figures["fvu"])
    means = {mode: statistics.mean(values) for mode, values in fvu.items()}
    assert abs(means["store"] - means["stream"]) <= 0.005, fvu
