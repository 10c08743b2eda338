"""Runs a function in several processes joined over gloo, and hands back what each of them returned."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 240.0


def run_ranks(function: Callable[..., dict[str, Any]], n_ranks: int, folder: Path, *args: object) -> list[Any]:
    """`function(rank, *args)` in `n_ranks` processes of one default gloo group; what it returned, by rank.

    The processes are killed once all results are on disk: gloo's background threads sometimes abort a process that
    shuts down by itself, which would tell nothing about the code under test.
    """
    context = mp.get_context("spawn")
    processes = [context.Process(target=_rank, args=(rank, n_ranks, folder, function, args)) for rank in range(n_ranks)]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not all(_result(folder, rank).exists() for rank in range(n_ranks)):
            ended = [process.exitcode for process in processes if process.exitcode is not None]
            assert not ended, f"a rank ended with exit codes {ended} before it had a result; its traceback is above"
            assert time.monotonic() < deadline, f"no result of every rank after {TIMEOUT_S} s"
            time.sleep(0.05)
        return [torch.load(_result(folder, rank), weights_only=True) for rank in range(n_ranks)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.pt"


def _rank(rank: int, n_ranks: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    unfinished = folder / f"rank-{rank}.unfinished"
    torch.save(function(rank, *args), unfinished)
    unfinished.rename(_result(folder, rank))
    while True:  # until killed: a process that leaves takes down the collectives that others still wait for
        time.sleep(1)
