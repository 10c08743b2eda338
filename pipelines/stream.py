"""stream: collect and train at once, through a store of bounded size (`collect.mode: stream`).

    harvesters ──commits──▶ ring of `capacity_shards` ──batches──▶ trainer
         ▲                          │                                 │
         └── may write shard i ◀── janitor deletes ◀── cursor ◀── checkpoint

The driver hands out shards, and deletes what the trainer's last checkpoint no longer needs; harvesters and trainer
share one Ray session. What stays is a slice that was chosen when the contexts were shuffled: at least a tenth of those
for training and all that are held out. It is sealed, and later stages run on it. All state is in the store and in the
checkpoints, so a run that is killed anywhere goes on where it was.
"""

import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.cluster.harvesters import HarvesterPool
from pipelines.cluster.local import start_ray
from pipelines.cluster.training import run_ray
from pipelines.collect import prepare_store, store_path
from pipelines.config import CollectConfig, RunConfig, TrainConfig
from pipelines.errors import RunError, UsageError
from pipelines.models import ResolvedModel, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, write_text
from pipelines.stores import StorePlace
from pipelines.train import make_job, scratch_path, untrained
from storage import ActivationStore, ActivationWriter, Consumer, Ring
from storage.ring import RingQueue

USABLE_SHARE = 0.95
"""Share of the training tokens that a stream is sure to give once: the rest may be sinks, or not fill a batch."""
LEAST_USABLE = 0.8
"""Share of a context's tokens that are no sinks, at least, by which the capacity is reckoned."""
CONSUMER = "train"
"""Name of the training job in the ring."""
FAILURE_FILE = "harvest-failed"
POLL_S = 0.25


def stream(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, Any]:
    """Collect and train; returns the figures of collect. Continues unfinished work."""
    assert config.train is not None
    resolved = resolve_model(config.model)
    writer = prepare_store(config, run, resolved, ui)
    path = store_path(config, run)
    ring = Ring.open(path)
    ring.recover()
    _require_tokens(config.train, writer, path)
    n_harvesters, n_threads = share_cpus(config)
    start_ray(config.ray)
    failure = run.path / "checkpoints" / FAILURE_FILE
    failure.unlink(missing_ok=True)
    consumer = Consumer(ring, CONSUMER, capacity=config.collect.capacity_shards)
    began = time.monotonic()
    harvest = _Harvest(config, run, path, ring, resolved, n_harvesters, failure)
    harvest.start()
    try:
        if names := untrained(config, run):
            harvest.wait_for_retained()
            job = make_job(config, run, names, ActivationStore.open(path, tail=True))
            capacity = config.collect.capacity_shards
            job = replace(
                job, n_threads=n_threads, consumer=CONSUMER, capacity=capacity, failure=str(failure.resolve())
            )
            run_ray(job, config.ray, scratch_path(run), ui)
        consumer.finish()
        harvest.join()
    except BaseException:
        harvest.stop()
        if harvest.error is not None:
            raise harvest.error from None
        raise
    if harvest.error is not None:
        raise harvest.error
    ring.sweep()
    ring.recover()  # what was under way when the trainer was done
    writer.seal()
    seconds, spec = time.monotonic() - began, writer.spec
    figures = {
        "n_tokens": spec.n_tokens,
        "n_train_tokens": spec.n_train_contexts * spec.context_length,
        "fingerprint": spec.fingerprint,
    }
    run.update_metrics("collect", figures)
    return figures | {
        "tokens_per_s": round(harvest.n_tokens / seconds, 1) if harvest.n_tokens else None,
        "most_shards": harvest.most_shards,
    }


class _Harvest(threading.Thread):
    """Hands out shards as the ring allows, and deletes behind the trainer."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        path: StorePlace,
        ring: Ring,
        resolved: ResolvedModel,
        n_harvesters: int,
        failure: Path,
    ) -> None:
        super().__init__(name="harvest", daemon=True)
        collect = config.collect.model_copy(update={"n_workers": n_harvesters})
        self._config, self._path, self._resolved = config.model_copy(update={"collect": collect}), path, resolved
        self._run_dir, self._ring, self._failure = run, ring, failure
        self._capacity = collect.capacity_shards
        self._stopped = threading.Event()
        self.error: BaseException | None = None
        self.n_tokens = 0
        self.most_shards = 0
        """Most shards besides the retained ones that were under way or on disk at once."""

    def run(self) -> None:
        try:
            queue = RingQueue(self._ring, self._capacity, self._check)
            with queue:
                if queue.open():
                    with HarvesterPool(self._config, self._path, self._resolved, self._ring.spec.n_shards) as pool:
                        for receipt in pool.receipts(queue):
                            self.n_tokens += receipt.n_tokens
                            self._run_dir.event("shard", shard=receipt.shard, tokens=receipt.n_tokens)
            self.most_shards = queue.most
            self._janitor_until_finished()
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self.error = error
            self._failure.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._failure, f"collecting failed: {error}")

    def stop(self) -> None:
        """End without finishing the rest."""
        self._stopped.set()
        self.join()

    def wait_for_retained(self) -> None:
        """Returns when the retained training shards are there: sinks and scales are reckoned from them."""
        waiting = set(self._ring.retained_train)
        while waiting := {shard for shard in waiting if not self._ring.readable(shard)}:
            if not self.is_alive():
                raise self.error or RunError(f"collecting ended without shard {min(waiting)}: run again to continue")
            time.sleep(POLL_S)

    def _check(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _janitor_until_finished(self) -> None:
        """Deletes behind the trainer when everything is written."""
        while min(self._ring.cursors().values(), default=0) < self._ring.spec.n_shards:
            self._ring.sweep()
            if self._stopped.wait(POLL_S):
                raise _Stopped


class _Stopped(Exception):
    """The main thread has given up."""


def share_cpus(config: RunConfig) -> tuple[int, int]:
    """Harvesters, and torch threads of each training worker, that fit beside each other.

    Raises:
        UsageError: the local Ray has too few CPUs for one harvester and the training workers.
    """
    assert config.train is not None
    train, each = config.train, config.collect.cpus_per_worker
    if config.ray.address is not None:
        return config.collect.n_workers, max(1, int(train.cpus_per_worker or 1))
    cpus = config.ray.num_cpus or os.cpu_count() or 1
    n_threads = max(1, int(train.cpus_per_worker or cpus // 2 // train.num_workers))
    n_harvesters = min(config.collect.n_workers, math.floor((cpus - n_threads * train.num_workers) / each))
    if n_harvesters < 1:
        raise UsageError(
            f"collect.mode: stream runs harvesters and trainers at once, and the local Ray has {cpus} CPUs: "
            f"{train.num_workers} training worker(s) of {n_threads} leave none for a harvester of {each:g}; lower "
            "them, or raise ray.num_cpus"
        )
    return n_harvesters, n_threads


def stream_problems(config: RunConfig) -> list[str]:
    """What cannot be streamed, before anything is collected."""
    if config.collect.mode != "stream":
        return []
    if config.train is None:
        return ["collect.mode: stream trains while it collects, and this run has no `train:`: use mode: store"]
    share_cpus(config)
    problems = []
    if isinstance(config.collect.store, str) and "://" in config.collect.store:
        problems.append("collect.mode: stream needs a local collect.store: a ring on an object store is not supported")
    if config.train.evaluate_every:
        problems.append(
            "collect.mode: stream writes held-out contexts last, so it has no held-out figures while it trains: drop "
            "train.evaluate_every, or use mode: store"
        )
    most = int(config.collect.n_tokens * (1 - config.collect.heldout_fraction) * USABLE_SHARE)
    if config.train.n_tokens > most:
        problems.append(
            f"train.n_tokens ({config.train.n_tokens:,}) must be at most {most:,} with collect.mode: stream, which "
            f"reads {USABLE_SHARE:.0%} of the training tokens once: collect more, or use mode: store"
        )
    least = least_capacity(config.collect, config.train)
    if config.collect.capacity_shards < least:
        problems.append(
            f"collect.capacity_shards ({config.collect.capacity_shards}) must be at least {least}, to hold two "
            "shuffled windows and what is read between two checkpoints; raise it, or lower train.shuffle_contexts or "
            "train.checkpoint_every"
        )
    return problems


def least_capacity(collect: CollectConfig, train: TrainConfig) -> int:
    """Shards without which trainer and harvesters could wait for each other."""
    n_train = math.ceil(collect.n_tokens * (1 - collect.heldout_fraction) / collect.context_length)
    window = min(train.shuffle_contexts, n_train)
    between = math.ceil(train.checkpoint_every * train.batch_size / (LEAST_USABLE * collect.context_length))
    return math.ceil(min(2 * window + between, n_train) / collect.contexts_per_shard) + 2


def _require_tokens(train: TrainConfig, writer: ActivationWriter, path: StorePlace) -> None:
    """Refuse a stream that is sure to end before the training does."""
    spec = writer.spec
    store = ActivationStore.open(path, tail=True)
    n_usable = 0
    for start in range(0, spec.n_train_contexts, 4096):
        stop = min(start + 4096, spec.n_train_contexts)
        n_usable += int((store.contexts(start, stop).position != 0).sum())
    if train.n_tokens > n_usable:
        raise UsageError(
            f"train.n_tokens ({train.n_tokens:,}) must be at most {n_usable:,} with collect.mode: stream: the training "
            "split has no more tokens that are not the first of a document; collect more, or use mode: store"
        )
