"""Where the compiled loops can be used: numba installed, float32 on the CPU. Everything else takes torch operations."""

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor


@cache
def _compiled() -> ModuleType | None:
    """`sae.kernels.compiled`, imported when first needed; None where numba (the extra `fast`) is not installed."""
    try:
        from sae.kernels import compiled
    except ImportError as error:
        if getattr(error, "name", "") != "numba":
            warnings.warn(f"The compiled loops are switched off, training is slower: {error}", stacklevel=2)
        return None
    return compiled


def usable(*tensors: Tensor) -> ModuleType | None:
    """The compiled loops if they can work on all of `tensors`, else None."""
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return _compiled()
    return None


def n_threads() -> int:
    """Threads that a loop is divided among: those of torch, as far as numba may use them."""
    import numba

    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return int(threads)
