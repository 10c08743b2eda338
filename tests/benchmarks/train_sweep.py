"""A sweep of eight SAEs on one stream of batches, against eight runs of one SAE, on a store on disk.

Both sides are whole training workers without Ray: opening the store, sinks and scale, shuffled reading, training,
calibration, the dictionary. Ray's start-up, seconds for each run, is left out, though a sweep pays it once.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from pipelines.config import SAESpec, SinkConfig, TrainConfig
from pipelines.train_worker import train_worker
from pipelines.training.job import MemberJob, TrainJob
from storage import ActivationWriter, HookSpec, StoreSpec
from tests.benchmarks.harness import Figure, Report, interleaved
from tests.benchmarks.train_setting import BATCH, D_IN, K, batches

HOOK, LENGTH, N_SAES = "model.layers.8", 256, 8
PROVENANCE = {"model_name": "random", "context_size": LENGTH, "text": [], "packing": {"prepend_bos": False}}


def write_store(path: Path, n_contexts: int) -> Path:
    """The benchmark's batches, over and over, in bfloat16."""
    spec = StoreSpec(
        n_contexts=n_contexts,
        context_length=LENGTH,
        contexts_per_shard=16,
        n_train_contexts=n_contexts - 16,
        hooks=(HookSpec(HOOK, D_IN),),
        tables=(),
        provenance={},
    )
    shape = (n_contexts, LENGTH)
    writer = ActivationWriter.create(
        path,
        spec,
        tokens=np.zeros(shape, np.int64),
        document=np.broadcast_to(np.arange(n_contexts)[:, None], shape).copy(),
        position=np.broadcast_to(np.arange(LENGTH), shape).copy(),
    )
    rows = torch.cat(batches(torch)).bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(-1, LENGTH, D_IN)
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        writer.write_shard(shard, {HOOK: rows[np.arange(start, stop) % len(rows)]})
    writer.seal()
    return path


def sweep_job(store: Path, d_sae: int, n_steps: int, threads: int) -> TrainJob:
    """Eight seeds of a BatchTopK SAE; folders are set for each run."""
    members = tuple(
        MemberJob(f"seed{seed}", f"sweep/seed{seed}", (HOOK,), SAESpec(d_sae=d_sae, k=K), seed, "", "", PROVENANCE)
        for seed in range(N_SAES)
    )
    config = TrainConfig(n_tokens=n_steps * BATCH, batch_size=BATCH, max_same_context=1000.0)
    return TrainJob(str(store), members, config, SinkConfig(), seed=0, n_threads=threads)


def measure_sweep(report: Report, *, d_sae: int, n_steps: int, pairs: int, threads: int) -> None:
    """Adds `sweep_of_8_vs_8_runs`: how many times faster the sweep is."""
    folder = Path(tempfile.mkdtemp(prefix="sae-sweep-"))
    try:
        whole = sweep_job(write_store(folder / "store", n_contexts=144), d_sae, n_steps, threads)
        numbers = count()

        def run(groups: list[tuple[MemberJob, ...]]) -> Callable[[], float]:
            def timed() -> float:
                out = folder / f"run{next(numbers)}"
                began = time.perf_counter()
                for group in groups:
                    placed = tuple(
                        replace(
                            member, checkpoints=str(out / member.name), output=str(out / member.name / "dictionary")
                        )
                        for member in group
                    )
                    train_worker(replace(whole, members=placed))
                seconds = time.perf_counter() - began
                shutil.rmtree(out)
                return seconds

            return timed

        ratio = interleaved(run([whole.members]), run([(member,) for member in whole.members]), pairs=pairs)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    note = f"{N_SAES} seeds, {d_sae} latents, {n_steps} steps, no Ray; the store is read once against {N_SAES} times"
    report.add(Figure.of("sweep_of_8_vs_8_runs", ratio, note=note))
