"""Blocks of latents in parallel: forked processes that see the parent's arrays without a copy.

A block's result must depend on its arguments alone, so that the number of processes changes nothing. Workers may use
NumPy only: libraries with threads of their own do not outlive a fork.
"""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_job: Callable[..., Any] | None = None


def run_blocks(job: Callable[..., T], blocks: Iterable[tuple[Any, ...]], *, n_workers: int = 0) -> Iterator[T]:
    """`job(*block)` for each block, in order; at most two blocks per process are under way.

    Args:
        blocks: arguments, made as they are needed.
        n_workers: processes; 0 is one per core, 1 runs everything here.
    """
    n_workers = n_workers or os.cpu_count() or 1
    if n_workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        for block in blocks:
            yield job(*block)
        return
    global _job
    _job = job  # inherited by the fork: closures and arrays are not pickled
    pending: deque[Future[T]] = deque()
    try:
        with ProcessPoolExecutor(n_workers, multiprocessing.get_context("fork")) as pool:
            for block in blocks:
                pending.append(pool.submit(_call, block))
                if len(pending) >= 2 * n_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        _job = None


def _call(block: tuple[Any, ...]) -> Any:
    assert _job is not None
    return _job(*block)
