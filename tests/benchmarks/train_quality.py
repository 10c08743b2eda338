"""Quality at equal tokens: our TopK and BatchTopK with their defaults against each peer's best learning rate.

    python -m tests.benchmarks.train_quality STORE --hook model.layers.8 --work FOLDER

Every trainer gets the same 245 batches of 4,096 rows of the store's training split, attention sinks too, in the same
order; k 32, 4,608 latents, float32. Peers are trained once for each learning rate of `RATES`, ours once. Measured on
the held-out split: FVU with and without sinks, and latents that never fire there. `fvu` is ours (TopK) and
`fvu_best_peer` the least of the peers' for any rate.

Each result is kept in FOLDER/results.json as soon as it is there, so that a run that was stopped goes on.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae import BatchTopKConfig, TopKConfig, Trainer, TrainerConfig, build
from sae.normalise import fit_normaliser
from sae.threshold import thresholded
from storage import ActivationStore, ShuffledReader
from tests.benchmarks.harness import ROOT, Figure, Peer, PeerAbsent, Report
from tests.benchmarks.quality_data import BATCH, D_SAE, N_STEPS, K, measure, rows

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
PEERS = ("saelens", "dictionary_learning", "sparsify")
OURS = ("topk", "batchtopk")
N_CALIBRATION = 32
"""Batches that set a threshold."""
SCRIPT = ROOT / "tests" / "benchmarks" / "quality_peers.py"
Result = dict[str, float]


def write_data(store: ActivationStore, hook: str, folder: Path) -> None:
    """The store's rows as the files of `quality_data`, unless they are there. Raises: ValueError for too few rows."""
    if (folder / "sinks.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    low, stop = store.split_range("train")
    available = (stop - low) * store.spec.context_length
    if available < BATCH * N_STEPS:
        print(f"{available} training tokens for {BATCH * N_STEPS}: the first ones come twice")
    reader = ShuffledReader(store, hook, split="train", batch_size=BATCH, seed=0, exclude_sinks=False)
    d_in = store.spec.hook(hook).d_in
    _write(folder / "train.npy", islice(iter(reader), N_STEPS), BATCH * N_STEPS, d_in)
    kept = ShuffledReader(store, hook, split="train", batch_size=BATCH, seed=0, exclude_sinks=True)
    _write(folder / "calibration.npy", islice(iter(kept), N_CALIBRATION), BATCH * N_CALIBRATION, d_in)
    low, stop = store.split_range("heldout")
    contexts = ((at, min(at + 16, stop)) for at in range(low, stop, 16))
    heldout = (store.activations(hook, *each).reshape(-1, d_in) for each in contexts)
    _write(folder / "heldout.npy", heldout, (stop - low) * store.spec.context_length, d_in)
    np.save(folder / "sinks.npy", store.sink_mask(hook, low, stop).reshape(-1))


def _write(path: Path, parts: Iterator[torch.Tensor], n: int, d_in: int) -> None:
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(n, d_in))
    at = 0
    for part in parts:
        out[at : at + len(part)] = part.to(torch.bfloat16).view(torch.uint16).numpy()
        at += len(part)
    if at != n:
        raise ValueError(f"{path.name} holds {at} rows, expected {n}.")


def ours(architecture: str, folder: Path) -> Result:
    """Our trainer with its defaults, normalised and calibrated as `sae train` does."""
    first = next(rows(folder / "train.npy", 2 * BATCH))
    config = (TopKConfig if architecture == "topk" else BatchTopKConfig)(d_in=first.shape[1], d_sae=D_SAE, k=K)
    normaliser = fit_normaliser(first, "scale")
    trainer = Trainer(build(config, seed=0), TrainerConfig(), N_STEPS, normalisers=[normaliser])
    trainer.initialise(first)
    trainer.fit(rows(folder / "train.npy", BATCH))
    sae = trainer.export()
    if (selecting := thresholded(sae)) is not None:
        selecting.calibrate_threshold(rows(folder / "calibration.npy", BATCH))

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = sae.encode(x)
        return sae.decode(latents), latents > 0

    return measure(reconstruct, folder)


def peer(name: str, lr: float, folder: Path, threads: int) -> Result:
    """One peer at one learning rate. Raises: PeerAbsent."""
    environment = {"OMP_NUM_THREADS": str(threads)}
    with Peer(SCRIPT, name, str(lr), str(folder), str(threads), env=environment) as process:
        return dict(process.call("run"))


def contenders(folder: Path, threads: int) -> dict[str, Callable[[], Result]]:
    """Every training run by its name, the ones most worth knowing first."""
    runs: dict[str, Callable[[], Result]] = {name: partial(ours, name, folder) for name in OURS}
    for lr in sorted(RATES, key=lambda rate: abs(math.log(rate / 1e-3))):
        runs |= {f"{name} {lr:g}": partial(peer, name, lr, folder, threads) for name in PEERS}
    return runs


def run_all(folder: Path, threads: int) -> dict[str, Result | str]:
    """Results by contender; a peer that is absent is its reason."""
    path = folder / "results.json"
    found: dict[str, Result | str] = json.loads(path.read_text()) if path.exists() else {}
    for name, run in contenders(folder, threads).items():
        if name in found:
            continue
        began = time.perf_counter()
        try:
            found[name] = run()
        except PeerAbsent as why:
            found[name] = f"absent: {why}"
        print(f"{name}: {found[name]}  [{time.perf_counter() - began:.0f} s]", flush=True)
        path.write_text(json.dumps(found, indent=1))
    return found


def summarise(report: Report, found: dict[str, Result | str]) -> None:
    """Ours beside the best peer of each figure, and every run in a table."""
    measured = {name: result for name, result in found.items() if isinstance(result, dict)}
    theirs = {name: result for name, result in measured.items() if name not in OURS}
    for figure, key in (("fvu", "fvu"), ("fvu_without_sinks", "fvu_without_sinks"), ("dead_share", "dead_share")):
        best = min(theirs, key=lambda name: theirs[name][key], default=None)
        limit = None if best is None else theirs[best][key]
        report.add(Figure(figure, measured["topk"][key], at_most=limit, note="TopK, default settings"))
        report.add(Figure(f"{figure}_batchtopk", measured["batchtopk"][key]))
        report.add(Figure(f"{figure}_best_peer", limit, note=best or "no peer"))
    lines = ["| trainer, learning rate | FVU | without sinks | L0 | dead |", "|---|---|---|---|---|"]
    for name, result in found.items():
        if isinstance(result, str):
            lines.append(f"| {name} | {result} | | | |")
            continue
        lines.append(
            f"| {name} | {result['fvu']:.4f} | {result['fvu_without_sinks']:.4f} | {result['l0']:.1f} "
            f"| {100 * result['dead_share']:.1f} % |"
        )
    report.sections.append(("Every run", "\n".join(lines)))


def main() -> None:
    """Write the data, train everyone, print and write the note."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="an activation store, for instance runs/wiki-1m/activations")
    parser.add_argument("--hook", default="model.layers.8")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and results")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--note", type=Path, help="folder for the note, instead of docs/benchmarks")
    asked: Any = parser.parse_args()
    torch.set_num_threads(asked.threads)
    write_data(ActivationStore.open(asked.store), asked.hook, asked.work)
    report = Report("train_quality", f"Quality at equal tokens, {asked.hook}", asked.threads)
    report.facts["setting"] = f"{N_STEPS} steps of {BATCH:,} tokens, k {K}, {D_SAE:,} latents, float32"
    summarise(report, run_all(asked.work, asked.threads))
    report.finish(*([asked.note] if asked.note else []))


if __name__ == "__main__":
    main()
