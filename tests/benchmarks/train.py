"""`make bench-train`: one training step against the peers' and against the encoder's product alone.

    topk_vs_saelens, batchtopk_vs_saelens         SAELens, float32, its default
    topk_vs_dictionary_learning                   dictionary_learning, float32, its default
    topk_vs_sparsify                              sparsify, float32, its default on a CPU, default optimizer
    step_vs_encoder_gemm                          our TopK step over the fastest encoder product here: lower is better
    data_…, features_…                            two ranks against one process, and what they send: see `train_ranks`
    …_autocast                                    the same peer under bfloat16 autocast, where the processor has it
    …_16384                                       the same with 16,384 latents instead of 4,608
    sweep_of_8_vs_8_runs                          eight small SAEs on one stream against eight runs (`train_sweep`)

Same batches, batch size 4,096, d_in 576, k 32, equal threads; a run is `Trainer.fit` and the peer's own trainer for one
or two steps. Quality at equal tokens is measured elsewhere: `fvu` and `fvu_best_peer` join the report in `main`, as
`report.add(Figure(...))` after the parts below.

Options: `--quick` for a run that shows only that everything works, `--only NAME …` for some of the parts.
"""

import argparse
import cProfile
import os
import pstats
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch

from sae import BatchTopKConfig, StepMetrics, TopKConfig, Trainer, TrainerConfig, build
from sae.kernels.loops import usable
from sae.kernels.select import multiplies_bf16
from tests.benchmarks import train_ranks
from tests.benchmarks.harness import ROOT, Figure, Peer, PeerAbsent, Report, interleaved, timed
from tests.benchmarks.train_setting import BATCH, D_IN, K, batches
from tests.benchmarks.train_sweep import measure_sweep

THREADS = os.cpu_count() or 1
WIDTHS = {"": 4608, "_16384": 16384}
FLOORS = {"saelens": 5.0, "dictionary_learning": 5.0, "sparsify": 2.0}
PARTS = ("gemm", "saelens", "dictionary_learning", "sparsify", "wide", "sweep", "ranks", "profile")
PEERS_SCRIPT = ROOT / "tests" / "benchmarks" / "train_peers.py"


class Ours:
    """Our trainer, a few steps at a time."""

    def __init__(self, architecture: str, d_sae: int) -> None:
        config = (TopKConfig if architecture == "topk" else BatchTopKConfig)(d_in=D_IN, d_sae=d_sae, k=K)
        self.trainer = Trainer(build(config, seed=0), TrainerConfig(), 10**6)
        self.stream = cycle(batches(torch))

    def run(self, steps: int) -> float:
        """Seconds of that many steps."""
        last = self.trainer.step + steps

        def on_step(metrics: StepMetrics) -> bool:
            return metrics.step < last

        began = time.perf_counter()
        self.trainer.fit(self.stream, on_step)
        return time.perf_counter() - began


def gemm(d_sae: int) -> Callable[[], object]:
    """The encoder's product alone, in the precision that the step uses here."""
    dtype = torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32
    x, b_enc = batches(torch)[0].to(dtype), torch.zeros(d_sae, dtype=dtype)
    W_enc, out = torch.randn(d_sae, D_IN).to(dtype).t(), torch.empty(BATCH, d_sae, dtype=dtype)
    return lambda: torch.addmm(b_enc, x, W_enc, out=out)


def measure_gemm(report: Report, suffix: str, pairs: int) -> None:
    """Our step over the product: the ratio of their speeds is that of the step's time."""
    d_sae = WIDTHS[suffix]
    ours = Ours("topk", d_sae)
    ratio = interleaved(timed(gemm(d_sae)), lambda: ours.run(1), pairs=pairs, warm_up=2)
    step, product = statistics.median(ratio.theirs_s), statistics.median(ratio.ours_s)
    dtype = "bfloat16" if multiplies_bf16(torch.device("cpu")) else "float32: no bfloat16 units in this processor"
    note = f"step {1e3 * step:.0f} ms, product {1e3 * product:.0f} ms ({dtype})"
    report.add(Figure.of(f"step_vs_encoder_gemm{suffix}", ratio, at_most=3.0, note=note))


def measure_peer(report: Report, name: str, architecture: str, suffix: str, pairs: int) -> None:
    """One peer with its defaults and, where the processor has units for it, under autocast."""
    figure = f"{architecture}_vs_{name}{suffix}"
    for autocast in (False, True):
        if autocast and not multiplies_bf16(torch.device("cpu")):
            continue
        label = figure + ("_autocast" if autocast else "")
        arguments = (name, architecture, str(WIDTHS[suffix]), str(int(autocast)), str(THREADS))
        try:
            with Peer(PEERS_SCRIPT, *arguments, env={"OMP_NUM_THREADS": str(THREADS)}) as peer:
                ours = Ours(architecture, WIDTHS[suffix])
                steps = 1 if suffix else 2

                def run(ours: Ours = ours, steps: int = steps) -> float:
                    return ours.run(steps)

                def theirs(peer: Peer = peer, steps: int = steps) -> float:
                    return float(peer.call("run", steps=steps))

                ratio = interleaved(run, theirs, pairs=pairs, warm_up=2)
        except PeerAbsent as why:
            report.add(Figure.absent(label, why))
            continue
        rates = [BATCH * steps / statistics.median(seconds) / 1e3 for seconds in (ratio.ours_s, ratio.theirs_s)]
        note = f"{rates[0]:.1f} k against {rates[1]:.1f} k tokens/s"
        report.add(Figure.of(label, ratio, at_least=None if autocast else FLOORS[name], note=note))


def profile(report: Report, steps: int) -> None:
    """Where our step's time goes: the caller's thread, which does one share of every loop."""
    parts = []
    for architecture in ("topk", "batchtopk"):
        ours = Ours(architecture, WIDTHS[""])
        ours.run(3)
        profiler = cProfile.Profile()
        profiler.enable()
        seconds = ours.run(steps)
        profiler.disable()
        entries = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        spent = sorted(((value[2], key[2]) for key, value in entries), reverse=True)[:14]
        lines = [f"{architecture}, {1e3 * seconds / steps:.0f} ms a step", "", "| function | ms a step |", "|---|---|"]
        lines += [f"| `{function}` | {1e3 * own / steps:.1f} |" for own, function in spent]
        parts.append("\n".join(lines))
    report.sections.append(("Where a step's time goes", "\n\n".join(parts)))


def main() -> None:
    """Measure, print, and write the note."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 latents")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--note", type=Path, help="folder for the note, instead of docs/benchmarks")
    asked = parser.parse_args()
    if asked.quick:
        WIDTHS.update({"": 256, "_16384": 512})
        train_ranks.WIDTHS.update(WIDTHS)
    torch.set_num_threads(THREADS)
    report = Report("train", "A training step against the peers' and against the encoder's product", THREADS)
    report.facts["setting"] = f"d_in {D_IN}, d_sae 4,608 (and 16,384), k {K}, batch {BATCH}, float32 weights"
    report.facts["loops"] = "torch operations: numba is not installed" if usable() is None else "compiled by numba"
    peers = ("saelens", "dictionary_learning", "sparsify")

    def wide() -> None:
        measure_gemm(report, "_16384", 5)
        for peer in peers:
            measure_peer(report, peer, "topk", "_16384", 5)

    def narrow(peer: str, *architectures: str) -> None:
        for architecture in architectures:
            measure_peer(report, peer, architecture, "", 5)

    parts: dict[str, Callable[[], object]] = {
        "gemm": lambda: measure_gemm(report, "", 7),
        "saelens": lambda: narrow("saelens", "topk", "batchtopk"),
        "dictionary_learning": lambda: narrow("dictionary_learning", "topk"),
        "sparsify": lambda: narrow("sparsify", "topk"),
        "wide": wide,
        "sweep": lambda: measure_sweep(report, d_sae=288 if asked.quick else 576, n_steps=4, pairs=5, threads=THREADS),
        "ranks": lambda: [train_ranks.measure(report, name, "", 5, 2) for name in train_ranks.ARCHITECTURES],
        "profile": lambda: profile(report, 5),
    }
    for part in asked.only:
        began = time.perf_counter()
        parts[part]()
        print(f"[{part}: {time.perf_counter() - began:.0f} s]", flush=True)
    report.finish(*([asked.note] if asked.note else []))


if __name__ == "__main__":
    main()
