"""When the compiled loops are used, and how threads share one.

The loops work on float32 tensors on the CPU, where numba is installed; on a GPU, with
Triton, those of `sae.kernels.cuda` are used; everything else takes torch operations.

Threads: numba's own pool beside that of torch would make both wait actively for each other's cores, so the loops are
compiled without it; they release the interpreter's lock and run on plain Python threads that sleep between calls.
"""

import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_WORK_PER_THREAD = 300_000
"""Least elements touched that are worth waking another thread for: some 50 microseconds."""


@cache
def _compiled() -> ModuleType | None:
    """`sae.kernels.compiled`, imported when first needed; None where numba (the extra `fast`) is not installed."""
    try:
        from sae.kernels import compiled
    except ImportError as error:
        if error.name != "numba":
            warnings.warn(f"The compiled loops are switched off, training is slower: {error}", stacklevel=2)
        return None
    return compiled


def usable(*tensors: Tensor) -> ModuleType | None:
    """The compiled loops if they can work on all of `tensors`, else None."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return _compiled()
    return None


@cache
def _triton() -> ModuleType | None:
    """`sae.kernels.cuda`; None without Triton, or where SAE_TRITON=0 turns it off."""
    if os.environ.get("SAE_TRITON") == "0" or importlib.util.find_spec("triton") is None:
        return None
    from sae.kernels import cuda

    return cuda


def triton_kernels(*tensors: Tensor) -> ModuleType | None:
    """`sae.kernels.cuda` if it is there and can work on all of `tensors`, else None."""
    if all(tensor.device.type == "cuda" and tensor.dtype == torch.float32 for tensor in tensors):
        return _triton()
    return None


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1), thread_name_prefix="sae-kernels")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # threads do not survive a fork


def n_shares(work: int) -> int:
    """Threads that are worth using on a loop that touches `work` elements; at most those that torch may use."""
    return max(1, min(torch.get_num_threads(), work // _WORK_PER_THREAD))


def share(loop: Callable[..., None], bounds: Sequence[int], *args: Any) -> None:
    """Run loop(start, stop, *args) for each pair of neighbours in `bounds`, in parallel; the caller does the first."""
    futures = [
        _helpers().submit(loop, start, stop, *args) for start, stop in itertools.pairwise(bounds[1:]) if stop > start
    ]
    loop(bounds[0], bounds[1], *args)
    for future in futures:
        future.result()


def share_evenly(loop: Callable[..., None], n_rows: int, work: int, *args: Any) -> None:
    """`share` with as many rows in each part; `work` is the number of elements that the loop touches in all."""
    n = n_shares(work)
    share(loop, [i * n_rows // n for i in range(n + 1)], *args)
