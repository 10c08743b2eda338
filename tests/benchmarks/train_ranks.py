"""Part of `make bench-train`, and by itself `make bench-train_ranks`: two ranks against one process.

    data_topk_efficiency, data_batchtopk_efficiency            rows spread over 2 ranks
    features_topk_efficiency, features_batchtopk_efficiency    latents spread over 2 ranks
    …_cpu_efficiency                                           the same in processor time, which other work on the
                                                               machine disturbs less; waiting is left out
    …_mb_per_step                                              what a rank sends in a step, as `Group` counts it
    …_16384                                                    the same with 16,384 latents instead of 4,608

Efficiency is the time of one process of one thread over twice the time of two ranks of one thread each, at the same
global batch (4,096 tokens of width 576, k 32): 1 would be perfect. Ranks are joined over gloo on this machine, so what
they send goes through the loopback device; its own count, where there is one, stands in the note of each figure.
"""

import argparse
import os
import statistics
import tempfile
import time
from datetime import timedelta
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sae import BatchTopKConfig, StepMetrics, TopKConfig, Trainer, TrainerConfig, build
from sae.parallel import LayoutName
from tests.benchmarks.harness import Figure, Ratio, Report, interleaved
from tests.benchmarks.train_setting import BATCH, D_IN, K, batches

N_RANKS = 2
WIDTHS = {"": 4608, "_16384": 16384}
LAYOUTS: tuple[LayoutName, ...] = ("data", "features")
ARCHITECTURES = ("topk", "batchtopk")
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


class Steps:
    """Training in this process, a few steps at a time, on this rank's rows of each batch."""

    def __init__(self, architecture: str, layout: LayoutName, d_sae: int) -> None:
        config = (TopKConfig if architecture == "topk" else BatchTopKConfig)(d_in=D_IN, d_sae=d_sae, k=K)
        self.trainer = Trainer(build(config, seed=0), TrainerConfig(), 10**6, layout=layout)
        rows = self.trainer.layout.rows.share(BATCH)
        self.stream = cycle([x[rows] for x in batches(torch)])
        self.cpu_s: list[float] = []
        """Processor time of each piece of work, of all threads."""

    def run(self, steps: int) -> float:
        """Seconds of that many steps."""
        last = self.trainer.step + steps

        def on_step(metrics: StepMetrics) -> bool:
            return metrics.step < last

        began, used = time.perf_counter(), time.process_time()
        self.trainer.fit(self.stream, on_step)
        self.cpu_s.append(time.process_time() - used)
        return time.perf_counter() - began

    @property
    def bytes_sent(self) -> int:
        return sum(group.bytes_sent for group in self.trainer.layout)


class Ranks:
    """Two processes that train together and wait, asleep, between the pieces of work that they are told to do."""

    def __init__(self, architecture: str, layout: LayoutName, d_sae: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(N_RANKS)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(
                target=_rank, args=(rank, self._folder.name, theirs, architecture, layout, d_sae), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        self.bytes_sent: list[float] = []
        """Per step and rank, of each piece of work."""
        self.loopback: list[float] = []
        self.cpu_s: list[float] = []
        """Of each piece of work, in all ranks."""

    def run(self, steps: int) -> float:
        """Seconds of that many steps, of the slower rank."""
        before = _loopback()
        for end in self._ends:
            end.send(steps)
        answers = [end.recv() for end in self._ends]
        self.loopback.append((_loopback() - before) / steps / N_RANKS)
        self.bytes_sent.append(statistics.mean(sent for _, sent, _ in answers) / steps)
        self.cpu_s.append(sum(used for _, _, used in answers))
        return max(seconds for seconds, _, _ in answers)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self._processes:  # gloo's threads would abort a process that leaves by itself
            process.kill()
            process.join()
        self._folder.cleanup()


def _rank(rank: int, folder: str, work: Connection, architecture: str, layout: LayoutName, d_sae: int) -> None:
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=N_RANKS, timeout=patience)
    steps = Steps(architecture, layout, d_sae)
    while True:
        sent = steps.bytes_sent
        seconds = steps.run(work.recv())
        work.send((seconds, steps.bytes_sent - sent, steps.cpu_s[-1]))


def _loopback() -> int:
    return int(LOOPBACK.read_text()) if LOOPBACK.exists() else 0


def measure(report: Report, architecture: str, suffix: str, pairs: int, steps: int) -> None:
    """Both layouts of one architecture and width."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = Steps(architecture, "data", WIDTHS[suffix])
    for layout in LAYOUTS:
        name = f"{layout}_{architecture}"
        alone.cpu_s.clear()
        with Ranks(architecture, layout, WIDTHS[suffix]) as ranks:
            speed = interleaved(lambda: ranks.run(steps), lambda: alone.run(steps), pairs=pairs, warm_up=2)
        efficiency = Ratio(tuple(pair / N_RANKS for pair in speed.pairs), speed.ours_s, speed.theirs_s)
        two, one = (1e3 * statistics.median(seconds) / steps for seconds in (speed.ours_s, speed.theirs_s))
        note = f"{two:.0f} ms a step against {one:.0f} ms of one process"
        report.add(Figure.of(f"{name}_efficiency{suffix}", efficiency, note=note))
        work = Ratio(
            tuple(one / two for one, two in zip(alone.cpu_s[2:], ranks.cpu_s[2:], strict=True)),
            tuple(ranks.cpu_s[2:]),
            tuple(alone.cpu_s[2:]),
        )
        two, one = (1e3 * statistics.median(seconds) / steps for seconds in (work.ours_s, work.theirs_s))
        note = f"{two:.0f} ms of processor time a step in both ranks, {one:.0f} ms in one process"
        report.add(Figure.of(f"{name}_cpu_efficiency{suffix}", work, note=note))
        sent, seen = (statistics.median(counts[2:]) / 1e6 for counts in (ranks.bytes_sent, ranks.loopback))
        note = f"the loopback device counted {seen:.1f}" if seen else ""
        report.add(Figure(f"{name}_mb_per_step{suffix}", sent, note=note))
    torch.set_num_threads(threads)


def main() -> None:
    """Measure, print, and write the note."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 latents: shows only that everything works")
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--widths", nargs="+", type=int, choices=list(WIDTHS.values()), default=list(WIDTHS.values()))
    parser.add_argument("--note", type=Path, help="folder for the note, instead of docs/benchmarks")
    asked = parser.parse_args()
    suffixes = [suffix for suffix, width in WIDTHS.items() if width in asked.widths]
    if asked.quick:
        WIDTHS.update({"": 256, "_16384": 512})
    report = Report("train_ranks", "Two ranks against one process, rows or latents spread over them", 1)
    report.facts["setting"] = f"d_in {D_IN}, k {K}, batch {BATCH}, float32, {N_RANKS} ranks of one thread over gloo"
    report.facts["cores"] = str(os.cpu_count())
    for suffix in suffixes:
        for architecture in asked.only:
            measure(report, architecture, suffix, 5, 1 if suffix else 2)
    report.finish(*([asked.note] if asked.note else []))


if __name__ == "__main__":
    main()
